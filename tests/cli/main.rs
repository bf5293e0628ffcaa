//! What a person sees: `--help` of every command, the texts of errors, the shapes of JSON documents.
//!
//! Compared with `tests/cli/snapshots/`, which is reviewed like code. After a change that is meant:
//! `MESHD_UPDATE=1 cargo test --test cli`, then look at the difference.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "runs the program")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod errors;
mod help;
mod json;
mod reference;
mod snapshot;

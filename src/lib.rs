//! meshd: a mesh VPN that people run on their own machines.
//!
//! # Three kinds of code
//!
//! | kind | modules | may use |
//! |---|---|---|
//! | pure | [`wire`], [`trust`], [`engine`], [`coord`] | std collections and crypto crates; never tokio, sockets, clocks, files or OS randomness |
//! | shells | `os`, `link`, `daemon`, `server`, `cli` | tokio, TLS, libc |
//!
//! `wire` turns bytes into types; `trust` judges signed records; `engine` is a node and `coord` a coordinator, both pure
//! state machines that do not know each other. Shells do the I/O. Without the feature `shell` only the pure part is
//! built; `tests/architecture.rs` checks the direction of imports.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod coord;
pub mod engine;
pub mod time;
pub mod trust;
pub mod wire;

#[cfg(feature = "shell")]
pub mod cli;
#[cfg(feature = "shell")]
pub mod daemon;
#[cfg(feature = "shell")]
pub mod link;
#[cfg(feature = "shell")]
pub mod os;
#[cfg(feature = "shell")]
pub mod server;

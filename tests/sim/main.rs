//! A whole network in one thread of virtual time. `docs/testing.md` says how to run it and how to read a failure.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test binary reads its environment and panics when it is wrong"
)]

mod dice;
mod link;
mod nat;
mod oracle;
mod puncher;
mod scenario;
mod town;
mod trace;
mod world;

use std::io::Write as _;

/// Run everything rather than a sample.
pub(crate) fn full() -> bool {
    std::env::var_os("MESHD_SIM_FULL").is_some()
}

/// Prints past the test harness's capture: a replay is there to be read.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

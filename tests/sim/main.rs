//! A whole network in one thread of virtual time. `docs/testing.md` says how to run it and how to read a failure.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test binary reads its environment and panics when it is wrong"
)]

mod dice;
mod host;
mod inner;
mod link;
mod logs;
mod matrix;
mod nat;
mod oracle;
mod puncher;
mod scenario;
mod server;
mod sim;
mod stories;
mod town;
mod trace;
mod world;

use std::io::Write as _;

/// Run everything rather than a sample.
pub(crate) fn full() -> bool {
    std::env::var_os("MESHD_SIM_FULL").is_some()
}

/// The run to replay, if one is named; everything else is skipped then.
pub(crate) fn replay() -> Option<String> {
    std::env::var("MESHD_SIM").ok()
}

/// Print every line of the trace as it happens.
pub(crate) fn aloud() -> bool {
    replay().is_some()
}

/// Prints past the test harness's capture: a replay is there to be read.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Runs the one scenario or story that `MESHD_SIM` names, printing all of it.
#[test]
fn replay_one() {
    let Some(line) = replay() else { return };
    if let Some(line) = line.strip_prefix("punch ") {
        say(&format!("{:?}", puncher::punch(&line.parse().unwrap(), true)));
    } else if let Some(line) = line.strip_prefix("story=") {
        let (name, seed) = line.split_once(" seed=").unwrap();
        stories::run(name, seed.parse().unwrap());
    } else {
        say(&format!("{:?}", matrix::run(&line.parse().unwrap())));
    }
}

//! A whole network in one thread of virtual time. `docs/testing.md` says how to run it and how to read a failure.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test binary reads its environment and panics when it is wrong"
)]

/// Names runs that take a seed: for `MESHD_SIM='KIND=NAME seed=N'`, and as one test each, with several seeds.
macro_rules! named_runs {
    ($seeds:literal, $full:literal, $($name:ident => $run:path),+ $(,)?) => {
        /// Does one named run once.
        pub(crate) fn run(name: &str, seed: u64) {
            match name {
                $(stringify!($name) => $run(seed),)+
                _ => panic!("nothing is called {name:?}"),
            }
        }

        #[cfg(test)]
        mod tests {
            $(
                #[test]
                fn $name() {
                    if crate::replay().is_none() {
                        for seed in 1..=if crate::full() { $full } else { $seeds } {
                            super::run(stringify!($name), seed);
                        }
                    }
                }
            )+
        }
    };
}

mod adversary;
mod budget;
mod dice;
mod hard;
mod healing;
mod host;
mod inner;
#[cfg(test)]
mod lifetime;
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
mod stream;
mod tcp;
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

/// `KIND=NAME seed=N`, unless it is a scenario.
fn named(line: &str) -> Option<(&str, &str, u64)> {
    let (kind, rest) = line.split_once('=')?;
    let (name, seed) = rest.split_once(" seed=")?;
    (kind != "a").then(|| (kind, name, seed.parse().unwrap()))
}

/// Runs the one scenario, story, attack or budget that `MESHD_SIM` names, printing all of it.
#[test]
fn replay_one() {
    let Some(line) = replay() else { return };
    if let Some(line) = line.strip_prefix("punch ") {
        say(&format!("{:?}", puncher::punch(&line.parse().unwrap(), true)));
    } else if let Some(line) = line.strip_prefix("hard ") {
        say(&hard::replay(line));
    } else if let Some((kind, name, seed)) = named(&line) {
        match kind {
            "story" => stories::run(name, seed),
            "adversary" => adversary::run(name, seed),
            "budget" => budget::run(name, seed),
            _ => panic!("no kind of run is called {kind:?}"),
        }
    } else {
        say(&format!("{:?}", matrix::run(&line.parse().unwrap())));
    }
}

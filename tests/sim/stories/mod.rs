//! One named history a file, each with what must come of it, told for several seeds.

use std::time::Duration;

use crate::scenario::{Places, Scenario};
use crate::sim::{NodeRef, Series, Sim};

macro_rules! stories {
    ($($name:ident),+ $(,)?) => {
        $(mod $name;)+

        /// Tells one story once.
        pub(crate) fn run(name: &str, seed: u64) {
            match name {
                $(stringify!($name) => $name::run(seed),)+
                _ => panic!("no story is called {name:?}"),
            }
        }

        #[cfg(test)]
        mod tests {
            $(
                #[test]
                fn $name() {
                    if crate::replay().is_none() {
                        for seed in 1..=if crate::full() { 40 } else { 4 } {
                            super::$name::run(seed);
                        }
                    }
                }
            )+
        }
    };
}

stories! {
    both_initiate,
    ciphertext_only,
    coordinator_dies,
    direct_path_blackholed,
    double_nat,
    first_packet,
    ipv6_only,
    late_joiner,
    nat_reboots,
    node_restarts,
    public_and_nat,
    relay_dies_while_direct,
    restart_without_coordinator,
    revoked,
    roam,
    same_place,
    sleep_8_hours,
    symmetric_pair,
    unknown_peers,
    upgrade,
}

/// A world in which two nodes have started, reached the coordinator and asked STUN, and have never talked.
fn settled(story: &str, seed: u64, line: &str) -> (Sim, Places, NodeRef, NodeRef) {
    let scenario = Scenario { seed, ..line.parse().unwrap() };
    let (mut sim, places, a, b) = Sim::pair(&scenario, &format!("story={story} seed={seed}"));
    assert!(sim.run_until(Duration::from_secs(5), |s| s.is_synced(a) && s.is_synced(b)), "both nodes connect");
    sim.run_for(Duration::from_secs(2));
    (sim, places, a, b)
}

/// The same, and they have found their direct path; a series of pings goes on every `gap` for `time` from here.
fn talking(
    story: &str,
    seed: u64,
    line: &str,
    gap: Duration,
    time: Duration,
) -> (Sim, Places, NodeRef, NodeRef, Series) {
    let (mut sim, places, a, b) = settled(story, seed, line);
    sim.ping(a, b, 10, Duration::from_millis(100));
    let direct = sim.run_until(Duration::from_secs(10), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
    assert!(direct, "the path is direct");
    sim.run_for(Duration::from_secs(1));
    let count = u16::try_from(time.as_micros() / gap.as_micros()).unwrap();
    let series = sim.ping(a, b, count, gap);
    sim.run_for(Duration::from_millis(500));
    (sim, places, a, b, series)
}

/// No ping that had `time` to be answered is unanswered.
fn assert_none_lost(sim: &Sim, series: Series, time: Duration) {
    let lost: Vec<_> = sim
        .pings(series)
        .filter(|p| sim.now().since(p.sent) > time && p.sent < sim.now() && p.answered.is_none())
        .collect();
    assert!(lost.is_empty(), "lost: {} from {:?} to {:?}", lost.len(), lost[0].sent, lost[lost.len() - 1].sent);
}

/// The longest time without a ping that was answered: from the last one before to the first one after, by sending time.
fn longest_gap(sim: &Sim, series: Series) -> Duration {
    let mut last = None;
    let mut longest = Duration::ZERO;
    for ping in sim.pings(series).filter(|p| p.answered.is_some()) {
        longest = longest.max(last.map_or(Duration::ZERO, |before| ping.sent.since(before)));
        last = Some(ping.sent);
    }
    longest
}

//! One named history a file, each with what must come of it, told for several seeds.

use std::time::Duration;

use crate::scenario::{Places, Scenario};
use crate::sim::{NodeRef, Series, Sim};

mod both_initiate;
mod ciphertext_only;
mod coordinator_dies;
mod direct_path_blackholed;
mod double_nat;
mod fast_upgrade;
mod first_packet;
mod ipv6_only;
mod jumbo;
mod late_joiner;
mod nat_reboots;
mod node_restarts;
mod path_narrows;
mod peer_moves_behind_nat;
mod peer_relay;
mod public_and_nat;
mod quiet_roam;
mod quiet_spell;
mod rekey;
mod relay_dies_while_direct;
mod restart_remembers;
mod restart_without_coordinator;
mod revoked;
mod roam;
mod same_place;
mod sleep_8_hours;
mod small_mtu;
mod symmetric_pair;
mod through_each_other;
mod udp_comes_back;
mod unknown_peers;
mod upgrade;

named_runs! {
    4, 40,
    both_initiate => both_initiate::run,
    ciphertext_only => ciphertext_only::run,
    coordinator_dies => coordinator_dies::run,
    direct_path_blackholed => direct_path_blackholed::run,
    double_nat => double_nat::run,
    fast_upgrade => fast_upgrade::run,
    first_packet => first_packet::run,
    ipv6_only => ipv6_only::run,
    jumbo => jumbo::run,
    late_joiner => late_joiner::run,
    nat_reboots => nat_reboots::run,
    node_restarts => node_restarts::run,
    path_narrows => path_narrows::run,
    peer_moves_behind_nat => peer_moves_behind_nat::run,
    peer_relay_alone => peer_relay::alone,
    peer_relay_longer => peer_relay::longer,
    peer_relay_shorter => peer_relay::shorter,
    public_and_nat => public_and_nat::run,
    quiet_roam => quiet_roam::run,
    quiet_spell => quiet_spell::run,
    rekey => rekey::run,
    relay_dies_while_direct => relay_dies_while_direct::run,
    restart_remembers => restart_remembers::run,
    restart_without_coordinator => restart_without_coordinator::run,
    revoked => revoked::run,
    roam => roam::run,
    same_place => same_place::run,
    sleep_8_hours => sleep_8_hours::run,
    small_mtu => small_mtu::run,
    symmetric_pair => symmetric_pair::run,
    through_each_other => through_each_other::run,
    udp_comes_back => udp_comes_back::run,
    unknown_peers => unknown_peers::run,
    upgrade => upgrade::run,
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

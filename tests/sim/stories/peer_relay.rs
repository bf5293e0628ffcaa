//! Two nodes that cannot be joined directly, and one that relays for others.

use std::time::Duration;

use meshd::engine::drops::Drop;
use meshd::engine::io::{Input, RouteWish};
use meshd::wire::local::PathKind;

use super::longest_gap;
use super::through_each_other::town_of;
use crate::sim::{NodeRef, Sim};

/// Bytes a second that the volunteer carries.
const RATE: u64 = 1_000_000;

/// A volunteer with a public address, and two nodes behind NATs that cannot be punched; they talk. 80 ms there and back through
/// the volunteer.
fn stage(story: &str, seed: u64, relay_ms: u64) -> (Sim, [NodeRef; 3]) {
    let (mut sim, _, nodes) = town_of(story, seed, &["public", "apdm+apdf", "apdm+apdf"], relay_ms);
    let [r, a, b] = nodes[..] else { unreachable!("three") };
    sim.volunteer(r, RATE);
    sim.input(r, Input::Routes(RouteWish { relay: Some(RATE), ..RouteWish::default() }));
    sim.run_for(Duration::from_secs(1));
    (sim, [r, a, b])
}

fn carrier(sim: &Sim, from: NodeRef, to: NodeRef) -> String {
    let path = sim.peer_status(from, to).path;
    assert_ne!(path.kind, PathKind::Direct);
    path.endpoint.unwrap_or_default()
}

/// The way through the volunteer is the shorter one: it is found, measured and taken. When the volunteer dies under traffic, the
/// coordinator carries again within a second.
pub(crate) fn shorter(seed: u64) {
    let (mut sim, [r, a, b]) = stage("peer_relay_shorter", seed, 200);
    let series = sim.ping(a, b, 3_000, Duration::from_millis(20));
    let taken = sim.run_until(Duration::from_secs(15), |s| carrier(s, a, b) == "n0" && carrier(s, b, a) == "n0");
    assert!(taken, "{:?} {:?}", sim.peer_status(a, b).path, sim.peer_status(a, r).path);
    sim.run_for(Duration::from_secs(5));
    let recent: Vec<_> = sim.pings(series).filter(|p| sim.now().since(p.sent) < Duration::from_secs(3)).collect();
    let slow = recent.iter().filter(|p| p.answered.is_some_and(|at| at.since(p.sent) > Duration::from_millis(100)));
    assert_eq!(slow.count(), 0, "80 ms instead of 400");
    let before = sim.now();
    sim.kill(r, false);
    sim.run_for(Duration::from_secs(5));
    assert_eq!(carrier(&sim, a, b), "https://coordinator.example");
    let lost = sim.pings(series).filter(|p| p.sent > before && p.sent < sim.now() && p.answered.is_none()).count();
    assert!(longest_gap(&sim, series) <= Duration::from_secs(1), "{:?}", longest_gap(&sim, series));
    assert!(lost < 75, "{lost} of 250 unanswered, of which 20 are under way");
    sim.finish();
}

/// The coordinator's way is the shorter one: the volunteer is not troubled.
pub(crate) fn longer(seed: u64) {
    let (mut sim, [r, a, b]) = stage("peer_relay_longer", seed, 30);
    let series = sim.ping(a, b, 600, Duration::from_millis(50));
    sim.run_for(Duration::from_secs(31));
    assert_eq!((carrier(&sim, a, b), carrier(&sim, b, a)).0, "https://coordinator.example");
    assert_eq!(sim.unanswered(series), 0);
    assert_eq!(sim.dropped(r, Drop::PeerRelayLimit), 0);
    sim.finish();
}

/// The coordinator is gone for good and everybody restarts: the volunteer is known from disk, and carries.
pub(crate) fn alone(seed: u64) {
    let (mut sim, [r, a, b]) = stage("peer_relay_alone", seed, 30);
    for (from, to) in [(a, r), (b, r), (a, b)] {
        sim.ping(from, to, 20, Duration::from_millis(50));
    }
    sim.run_for(Duration::from_secs(5));
    sim.kill_server();
    for node in [r, a, b] {
        sim.kill(node, true);
    }
    sim.run_for(Duration::from_secs(300));
    for node in [r, a, b] {
        sim.start(node);
    }
    let series = sim.ping(a, b, 400, Duration::from_millis(50));
    let answered = sim.run_until(Duration::from_secs(10), |s| s.pings(series).any(|p| p.answered.is_some()));
    assert!(answered, "{:?} {:?}", sim.peer_status(a, b).path, sim.peer_status(a, r).path);
    sim.run_for(Duration::from_secs(5));
    let at = sim.now();
    sim.run_for(Duration::from_secs(4));
    let lost = sim.pings(series).filter(|p| p.sent > at && sim.now().since(p.sent) > Duration::from_secs(1));
    assert_eq!(lost.filter(|p| p.sent < sim.now() && p.answered.is_none()).count(), 0);
    assert_eq!((carrier(&sim, a, b).as_str(), carrier(&sim, b, a).as_str()), ("n0", "n0"));
    sim.finish();
}

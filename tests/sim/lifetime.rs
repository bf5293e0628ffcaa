//! NATs that forget a mapping sooner than others.

use std::time::Duration;

use meshd::engine::io::{Event, Input};
use meshd::wire::nat::UdpLifetime;

use crate::hard::stage_with;
use crate::scenario::Scenario;
use crate::sim::{NodeRef, Sim};

fn changes(sim: &Sim, node: NodeRef) -> usize {
    sim.machines(node).events.iter().filter(|(_, e)| matches!(e, Event::PathChanged { .. })).count()
}

/// How often the path of an idle pair changed within two minutes, behind NATs that keep an idle mapping for eight seconds.
fn idle_changes(seed: u64, found: Option<UdpLifetime>) -> usize {
    let kind = || "eim+apdf+life8".parse().unwrap();
    let (mut sim, _, a, b) = stage_with(&Scenario { seed, ..Scenario::pair(kind(), kind()) }, |_| ());
    // One side knows; the other hears of it.
    sim.input(if seed.is_multiple_of(2) { a } else { b }, Input::UdpLifetime(found));
    let both = |s: &Sim| s.is_surely_direct(a, b) && s.is_surely_direct(b, a);
    sim.ping(a, b, 40, Duration::from_millis(50));
    assert!(sim.run_until(Duration::from_secs(5), both), "seed {seed}");
    sim.run_for(Duration::from_secs(5));
    let before = changes(&sim, a) + changes(&sim, b);
    sim.run_for(Duration::from_secs(120));
    let changed = changes(&sim, a) + changes(&sim, b) - before;
    if found.is_some() {
        assert!(both(&sim), "seed {seed}: {:?}", sim.peer_status(a, b).path);
    }
    sim.finish();
    changed
}

#[test]
fn an_idle_path_is_kept_alive_as_often_as_its_nats_need_once_that_is_known() {
    if crate::replay().is_some() {
        return;
    }
    let known = Some(UdpLifetime { at_least_s: 5, less_than_s: Some(10) });
    for seed in 0..20 {
        assert!(idle_changes(seed, None) > 0, "seed {seed}: these NATs need no help");
        assert_eq!(idle_changes(seed, known), 0, "seed {seed}");
    }
}

//! The relay connection of one node breaks while its path to a peer is direct: not a packet is lost, the status says what
//! is missing, and all is well when it is back.

use std::time::Duration;

use super::{assert_none_lost, talking};
use crate::sim::Link;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(40));
    let (mut sim, _, a, b, series) = talking("relay_dies_while_direct", seed, "a=linux b=linux", gap, time);
    sim.break_link(a, Link::Relay, Duration::from_secs(20));
    sim.run_for(Duration::from_secs(15));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    assert!(sim.health(a).contains(&"relay-unreachable".to_owned()), "{:?}", sim.health(a));
    assert!(!sim.status(a).coordinator.relay_connected);
    assert!(sim.is_direct(a, b) && sim.is_direct(b, a));
    sim.run_for(Duration::from_secs(15));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    assert_eq!(sim.health(a), Vec::<String>::new());
    sim.finish();
}

//! The NAT of a node that is sending gets another address. Its peer hears authenticated data from the new one, checks it, and
//! answers there: hardly anything is lost, and the relay is not needed.

use std::net::IpAddr;
use std::time::Duration;

use super::{longest_gap, talking};

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(10));
    for nats in ["a=linux b=public", "a=apdm+apdf b=eim+eif"] {
        let (mut sim, places, a, b, series) = talking("peer_moves_behind_nat", seed, nats, gap, time);
        sim.run_for(Duration::from_secs(2));
        sim.world.renumber(places.site_a.gates[0], IpAddr::from([203, 0, 113, 88]));
        sim.run_for(Duration::from_secs(4));
        let silent = longest_gap(&sim, series);
        assert!(silent <= Duration::from_millis(250), "{nats}: silent for {silent:?}");
        assert!(sim.is_surely_direct(a, b) && sim.is_surely_direct(b, a), "{nats}");
        assert!(sim.peer_status(b, a).path.endpoint.unwrap().starts_with("203.0.113.88:"), "{nats}");
        sim.finish();
    }
}

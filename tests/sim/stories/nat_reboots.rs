//! A NAT forgets its mappings, without the machine behind it noticing anything: the direct path dies, the relay takes over
//! within a second of traffic, and a new direct path is found.

use std::net::IpAddr;
use std::time::Duration;

use super::{longest_gap, talking};

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(60));
    for (nats, renumbered) in
        [("a=eim+apdf b=linux", false), ("a=linux b=eim+apdf", true), ("a=eim+adf b=apdm+apdf", false)]
    {
        let (mut sim, places, a, b, series) = talking("nat_reboots", seed, nats, gap, time);
        sim.run_for(Duration::from_secs(3));
        let gate = places.site_a.gates[0];
        if renumbered {
            sim.world.renumber(gate, IpAddr::from([203, 0, 113, 77]));
        } else if let Some(nat) = sim.world.nat_mut(gate) {
            nat.reboot();
        }
        let rebooted = sim.now();
        sim.run_for(Duration::from_secs(3));
        assert!(longest_gap(&sim, series) <= Duration::from_millis(1_200), "{nats}: {:?}", longest_gap(&sim, series));
        let direct = sim.run_until(Duration::from_secs(25), |s| {
            s.now().since(rebooted) > Duration::from_secs(3) && s.is_surely_direct(a, b) && s.is_surely_direct(b, a)
        });
        assert!(direct, "{nats}: direct again: {:?}", sim.peer_status(a, b).path);
        sim.run_for(Duration::from_secs(10));
        assert!(longest_gap(&sim, series) <= Duration::from_millis(1_200), "{nats}: {:?}", longest_gap(&sim, series));
        sim.finish();
    }
}

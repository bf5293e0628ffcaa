//! The direct path goes silent, in both directions or in one: traffic is back on the relay within a second, stays there
//! without loss, and finds the direct path again when it is mended.

use std::time::Duration;

use super::{assert_none_lost, longest_gap, talking};
use crate::world::Owner;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(60));
    for (there, back) in [(true, true), (true, false), (false, true)] {
        let (mut sim, places, a, b, series) = talking("direct_path_blackholed", seed, "a=linux b=eim+apdf", gap, time);
        let (gate_a, gate_b) = (Owner::Box(places.site_a.gates[0]), Owner::Box(places.site_b.gates[0]));
        sim.world.cut(gate_a, gate_b, there);
        sim.world.cut(gate_b, gate_a, back);
        sim.run_for(Duration::from_secs(4));
        let gap = longest_gap(&sim, series);
        assert!(gap <= Duration::from_secs(1), "there {there}, back {back}: silent for {gap:?}");
        assert!(!sim.is_direct(a, b) || !sim.is_direct(b, a), "at least one side left the path");
        sim.run_for(Duration::from_secs(8));
        assert_none_lost_lately(&sim, series);
        sim.world.cut(gate_a, gate_b, false);
        sim.world.cut(gate_b, gate_a, false);
        let direct = sim.run_until(Duration::from_secs(40), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
        assert!(direct, "there {there}, back {back}: direct again");
        assert!(longest_gap(&sim, series) <= Duration::from_secs(1));
        let _ = assert_none_lost;
        sim.finish();
    }
}

/// Of the pings of the last seconds none is lost.
fn assert_none_lost_lately(sim: &crate::sim::Sim, series: crate::sim::Series) {
    let since = |p: &crate::sim::Ping| sim.now().since(p.sent);
    let lost = sim
        .pings(series)
        .filter(|p| p.sent < sim.now() && since(p) > Duration::from_millis(500) && since(p) < Duration::from_secs(6))
        .filter(|p| p.answered.is_none())
        .count();
    assert_eq!(lost, 0, "the relay loses nothing");
}

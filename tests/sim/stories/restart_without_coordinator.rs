//! The coordinator is gone and one node restarts: it finds its peer again at the address where it last was.

use std::time::Duration;

use super::talking;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(100), Duration::from_secs(5));
    let (mut sim, _, a, b, _) = talking("restart_without_coordinator", seed, "a=linux b=linux", gap, time);
    sim.kill_server();
    sim.run_for(Duration::from_secs(1));
    sim.kill(b, true);
    sim.run_for(Duration::from_secs(1));
    sim.start(b);
    sim.run_for(Duration::from_millis(100));
    let series = sim.ping(b, a, 100, gap);
    let found = sim.run_until(Duration::from_secs(8), |s| s.pings(series).any(|p| p.answered.is_some()));
    assert!(found, "the restarted node finds its peer without a coordinator");
    sim.run_for(Duration::from_secs(4));
    assert!(sim.is_direct(a, b) && sim.is_direct(b, a));
    sim.finish();
}

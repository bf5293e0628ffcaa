//! A node is killed and started again with the same keys while its peer goes on sending: the peer notices the lost session
//! and traffic flows again soon after the start; so it does when the restarted node is the one that speaks.

use std::time::Duration;

use super::talking;

/// From the start to the first answer: connecting takes four round trips to the coordinator, noticing that the direct path
/// is silent less than a second, the handshake one round trip.
const RECOVERED: Duration = Duration::from_secs(2);

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(20));
    for down_ms in [0, 50, 1_500, 5_000] {
        let (mut sim, _, a, b, series) = talking("node_restarts", seed, "a=linux b=linux", gap, time);
        sim.kill(b, true);
        sim.run_for(Duration::from_millis(down_ms));
        sim.start(b);
        let started = sim.now();
        let answered = sim.run_until(RECOVERED, |s| s.pings(series).any(|p| p.answered.is_some_and(|t| t > started)));
        assert!(answered, "down for {down_ms} ms: the peer's traffic flows again");
        let direct = sim.run_until(Duration::from_secs(8), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
        assert!(direct, "down for {down_ms} ms: and directly");
        sim.finish();

        let (mut sim, _, a, b) = super::settled("node_restarts", seed, "a=linux b=linux");
        sim.ping(a, b, 20, gap);
        sim.run_for(Duration::from_secs(5));
        sim.kill(b, true);
        sim.run_for(Duration::from_millis(down_ms));
        sim.start(b);
        let series = sim.ping(b, a, 1, Duration::ZERO);
        let answered = sim.run_until(RECOVERED, |s| s.pings(series).all(|p| p.answered.is_some()));
        assert!(answered, "down for {down_ms} ms: the restarted node's first packet is answered");
        sim.finish();
    }
}

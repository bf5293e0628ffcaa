//! Both nodes send their first packet at the same instant: both handshakes cross, both packets are answered as fast as one
//! would be, nothing is lost, and the path becomes direct.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    for skew_us in [0, 100, 900, 15_000, 29_000] {
        let (mut sim, _, a, b) = settled("both_initiate", seed, "a=linux b=eim+apdf");
        let first = sim.ping(a, b, 300, Duration::from_millis(10));
        sim.run_for(Duration::from_micros(skew_us));
        let second = sim.ping(b, a, 300, Duration::from_millis(10));
        sim.run_for(Duration::from_millis(3 * 60 + 50));
        for series in [first, second] {
            assert!(sim.pings(series).next().unwrap().answered.is_some(), "the first packet is answered in time");
        }
        sim.run_for(Duration::from_secs(4));
        for series in [first, second] {
            assert_none_lost(&sim, series, Duration::ZERO);
        }
        assert!(sim.is_surely_direct(a, b) && sim.is_surely_direct(b, a));
        sim.finish();
    }
}

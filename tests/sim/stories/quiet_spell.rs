//! Two nodes pause. While they count as in use their NATs keep the path open; afterwards it is given up. Either way the next
//! packets, from either side, are not lost.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    for pause_s in [20, 40, 100, 150, 200, 400] {
        for a_speaks in [true, false] {
            let (mut sim, _, a, b) = settled("quiet_spell", seed, "a=linux b=eim+apdf+life30");
            // Too short a talk for Linux to call it a stream: its NAT forgets after 30 s.
            sim.ping(a, b, 15, Duration::from_millis(100));
            sim.run_for(Duration::from_secs(4));
            assert!(sim.is_surely_direct(a, b) && sim.is_surely_direct(b, a));
            sim.run_for(Duration::from_secs(pause_s));
            if pause_s <= 150 {
                assert!(sim.is_surely_direct(a, b) && sim.is_surely_direct(b, a), "{pause_s} s: still open");
            }
            let (from, to) = if a_speaks { (a, b) } else { (b, a) };
            let series = sim.ping(from, to, 50, Duration::from_millis(20));
            sim.run_for(Duration::from_secs(3));
            assert_none_lost(&sim, series, Duration::ZERO);
            sim.finish();
        }
    }
}

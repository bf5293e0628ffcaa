//! Homes behind a second NAT, of the same or of another kind, each with its own or sharing one: direct within two seconds.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    for line in [
        "a=linux/eim+apdf b=linux",
        "a=linux/linux b=eim+apdf/eim+eif",
        "a=eim+apdf b=linux shape=carrier",
        "a=linux b=linux shape=carrier c=eim+apdf+hair",
    ] {
        let (mut sim, _, a, b) = settled("double_nat", seed, line);
        let start = sim.now();
        let series = sim.ping(a, b, 150, Duration::from_millis(20));
        sim.run_for(Duration::from_secs(4));
        assert_none_lost(&sim, series, Duration::ZERO);
        let direct = sim.first_direct(a, b).unwrap_or_else(|| panic!("{line}: direct"));
        assert!(direct.since(start) <= Duration::from_secs(2), "{line}: {:?}", direct.since(start));
        sim.finish();
    }
}

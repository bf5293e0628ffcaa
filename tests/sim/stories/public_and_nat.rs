//! One node has a public address and no firewall: any NAT on the other side gets a direct path, whoever speaks first.

use std::time::Duration;

use super::{assert_none_lost, settled};
use crate::nat::NAMES;

pub(crate) fn run(seed: u64) {
    for nat in NAMES.iter().filter(|name| **name != "blocked") {
        let (mut sim, _, a, b) = settled("public_and_nat", seed, &format!("a=public b={nat}"));
        let (from, to) = if seed.is_multiple_of(2) { (a, b) } else { (b, a) };
        let start = sim.now();
        let series = sim.ping(from, to, 150, Duration::from_millis(20));
        sim.run_for(Duration::from_secs(4));
        assert_none_lost(&sim, series, Duration::ZERO);
        let direct = sim.first_direct(from, to).unwrap_or_else(|| panic!("{nat}: direct"));
        assert!(direct.since(start) <= Duration::from_secs(2), "{nat}: {:?}", direct.since(start));
        sim.finish();
    }
}

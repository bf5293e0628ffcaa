//! Two nodes on one LAN use it, whatever NAT is in front of them, also when UDP to the internet is blocked.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    for nat in ["linux", "apdm+apdf", "eim+eif+hair", "blocked"] {
        let (mut sim, places, a, b) = settled("same_place", seed, &format!("a={nat} shape=lan"));
        let start = sim.now();
        let series = sim.ping(a, b, 200, Duration::from_millis(20));
        sim.run_for(Duration::from_secs(6));
        assert_none_lost(&sim, series, Duration::ZERO);
        let direct = sim.first_direct(a, b).unwrap_or_else(|| panic!("{nat}: direct"));
        assert!(direct.since(start) <= Duration::from_secs(2), "{nat}: {:?}", direct.since(start));
        let endpoint = sim.peer_status(a, b).path.endpoint.unwrap();
        let own = sim.world.addresses(places.b)[0].to_string();
        assert!(endpoint.starts_with(&own), "{nat}: over the LAN, not around: {endpoint}");
        sim.finish();
    }
}

//! Two networks that have IPv6 and nothing else, each behind a stateful firewall: direct, in time, without loss; mesh
//! addresses of both families work.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    let (mut sim, _, a, b) = settled("ipv6_only", seed, "a=linux b=linux ip=6");
    let start = sim.now();
    let v4 = sim.ping(a, b, 200, Duration::from_millis(20));
    let (source, target) = (sim.node(a).v6, sim.node(b).v6);
    let v6 = sim.ping_between(a, source, target, 200, Duration::from_millis(20));
    sim.run_for(Duration::from_secs(5));
    for series in [v4, v6] {
        assert_none_lost(&sim, series, Duration::ZERO);
    }
    let direct = sim.first_direct(a, b).expect("direct");
    assert!(direct.since(start) <= Duration::from_secs(2), "{:?}", direct.since(start));
    let endpoint = sim.peer_status(a, b).path.endpoint.unwrap();
    assert!(endpoint.starts_with('['), "an IPv6 endpoint: {endpoint}");
    sim.finish();
}

//! The internet between two nodes eats datagrams of the size that data has: small probes pass, large ones do not. Such a path
//! is never used, for it would lose every full packet; the status says why.

use std::time::Duration;

use meshd::wire::local::PathKind;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    let (mut sim, places, a, b) = settled("small_mtu", seed, "a=linux b=linux");
    sim.world.link_mut(places.town.internet).mtu = 1_300;
    let series = sim.ping(a, b, 600, Duration::from_millis(100));
    sim.run_for(Duration::from_secs(50));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    for (node, peer) in [(a, b), (b, a)] {
        assert_eq!(sim.first_direct(node, peer), None);
        let path = sim.peer_status(node, peer).path;
        assert_eq!(path.kind, PathKind::Relay);
        let reason = path.reason.unwrap_or_default();
        assert!(reason.contains("full size"), "the reason names the size: {reason:?}");
    }
    sim.finish();
}

//! Two NATs with address- and port-dependent mapping and filtering: relayed, as fast as any first packet, with a reason in
//! the status; and the search for a path that cannot be is not kept up for ever.

use std::net::SocketAddr;
use std::time::Duration;

use meshd::wire::local::PathKind;

use super::{assert_none_lost, settled};
use crate::town::STUN_PORTS;

/// Datagrams that ten minutes of talking may waste on the search, each side.
const WASTED_AT_MOST: u64 = 60;

pub(crate) fn run(seed: u64) {
    let (mut sim, _, a, b) = settled("symmetric_pair", seed, "a=apdm+apdf b=apdm+apdf");
    let series = sim.ping(a, b, 3_000, Duration::from_millis(200));
    let limit = Duration::from_millis(3 * 60 + 50);
    assert!(sim.run_until(limit, |s| s.pings(series).next().unwrap().answered.is_some()));
    sim.run_for(Duration::from_secs(600));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    for (node, peer) in [(a, b), (b, a)] {
        let path = sim.peer_status(node, peer).path;
        assert_eq!(path.kind, PathKind::Relay);
        let reason = path.reason.unwrap_or_default();
        assert!(reason.contains("NAT"), "the reason names the NATs: {reason:?}");
        let to_peer = |to: &SocketAddr| !STUN_PORTS.contains(&to.port());
        let wasted: u64 = sim.node(node).sent_to.iter().filter(|(to, _)| to_peer(to)).map(|(_, n)| n).sum();
        assert!(wasted <= WASTED_AT_MOST, "{wasted} datagrams for nothing");
    }
    sim.finish();
}

//! The internet between two nodes eats datagrams of the size that data has: small probes pass, large ones do not. The path is
//! used for what it takes, which all of TCP can be cut to; the rest goes by the relay. Over IPv4 and over IPv6.

use std::time::Duration;

use meshd::wire::local::PathKind;

use super::{assert_none_lost, settled};
use crate::inner;
use crate::stream::Stream;

pub(crate) fn run(seed: u64) {
    for (ip, takes, expected) in [(4, 1_300, 1_200), (4, 1_200, 1_120), (6, 1_200, 1_120), (4, 700, 576)] {
        let line = format!("a=linux b=linux ip={ip}");
        let (mut sim, places, a, b) = settled("small_mtu", seed, &line);
        sim.world.link_mut(places.town.internet).mtu = takes;
        let series = sim.ping(a, b, 200, Duration::from_millis(50));
        sim.run_for(Duration::from_secs(12));
        assert_none_lost(&sim, series, Duration::from_secs(1));
        for (node, peer) in [(a, b), (b, a)] {
            let path = sim.peer_status(node, peer).path;
            assert_eq!((path.kind, path.mtu), (PathKind::Direct, Some(expected)), "of {takes} bytes over IPv{ip}");
            assert_eq!(sim.machines(node).interface_mtu, 1_280);
        }
        for v6 in [false, true] {
            let mut stream = Stream::new(&sim, a, b, v6);
            stream.run(&mut sim, Duration::from_secs(4));
            assert!(stream.longest_stall <= Duration::from_millis(300), "stalled for {:?}", stream.longest_stall);
            assert_eq!(stream.longest_packet, usize::from(expected));
            // What cannot be cut arrives whole.
            let (from, to) = if v6 { (sim.node(a).v6, sim.node(b).v6) } else { (sim.node(a).v4, sim.node(b).v4) };
            let whole = inner::other(from, to, &vec![3; if v6 { 1_240 } else { 1_260 }]);
            assert_eq!(whole.len(), 1_280);
            sim.kernel_sends(a, whole.clone());
            sim.run_for(Duration::from_millis(100));
            assert!(sim.node(b).received.iter().any(|(_, packet)| *packet == whole), "by the relay");
        }
        assert!(sim.is_direct(a, b) && sim.is_direct(b, a), "still");
        sim.finish();
    }
}

//! Two nodes on a network that takes 9,000 bytes: found and used at once, over IPv4 and IPv6. When that path is lost, the
//! relay carries what can be cut, and says what cannot.

use std::time::Duration;

use super::settled;
use crate::inner;
use crate::stream::Stream;

pub(crate) fn run(seed: u64) {
    for ip in [4, 6] {
        let (mut sim, places, a, b) = settled("jumbo", seed, &format!("a=public b=public ip={ip}"));
        sim.world.link_mut(places.town.internet).mtu = 9_000;
        sim.ping(a, b, 40, Duration::from_millis(50));
        sim.run_for(Duration::from_secs(3));
        for (node, peer) in [(a, b), (b, a)] {
            assert_eq!(sim.peer_status(node, peer).path.mtu, Some(8_920));
            assert_eq!(sim.machines(node).interface_mtu, 8_920);
        }
        for v6 in [false, true] {
            let mut stream = Stream::new(&sim, a, b, v6);
            stream.run(&mut sim, Duration::from_secs(2));
            assert_eq!(stream.longest_packet, 8_920);
            assert!(stream.longest_stall <= Duration::from_millis(100), "{:?}", stream.longest_stall);
            // The direct way is lost: nothing that was under way or comes after vanishes for longer than it takes to notice.
            sim.world.link_mut(places.town.internet).mtu = 200;
            stream.run(&mut sim, Duration::from_secs(5));
            assert!(stream.longest_stall <= Duration::from_secs(1), "{:?}", stream.longest_stall);
            // By the relay a packet that cannot be cut is too long, and its sender is told how long it may be.
            let (from, to) = if v6 { (sim.node(a).v6, sim.node(b).v6) } else { (sim.node(a).v4, sim.node(b).v4) };
            let long = inner::other(from, to, &vec![3; 5_000]);
            sim.kernel_sends(a, long.clone());
            sim.run_for(Duration::from_millis(100));
            let error = meshd::wire::ip::packet_too_big(&long, 1_280).unwrap();
            assert!(sim.node(a).received.iter().any(|(_, packet)| *packet == error), "an ICMP error");
            sim.world.link_mut(places.town.internet).mtu = 9_000;
            stream.run(&mut sim, Duration::from_secs(20));
            assert_eq!(sim.peer_status(a, b).path.mtu, Some(8_920), "found again: {:?}", sim.peer_status(a, b));
        }
        sim.finish();
    }
}

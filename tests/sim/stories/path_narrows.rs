//! A stream of full packets goes directly when the path begins to eat long ones, without a word: the stream goes on within a
//! second, in packets that fit; the path stays direct. When it takes long packets again, that is found too.

use std::time::Duration;

use super::{assert_none_lost, settled};
use crate::stream::Stream;

pub(crate) fn run(seed: u64) {
    for (v6, takes, expected) in
        [(false, 1_450, 1_380), (true, 1_350, 1_280), (false, 1_200, 1_120), (true, 1_200, 1_120)]
    {
        let (mut sim, places, a, b) = settled("path_narrows", seed, "a=linux b=eim+apdf direct=20 relay=30");
        sim.ping(a, b, 100, Duration::from_millis(50));
        sim.run_for(Duration::from_secs(5));
        for (node, peer) in [(a, b), (b, a)] {
            assert_eq!(sim.peer_status(node, peer).path.mtu, Some(1_420), "Ethernet's");
            assert_eq!(sim.machines(node).interface_mtu, 1_420);
        }
        let mut stream = Stream::new(&sim, a, b, v6);
        stream.run(&mut sim, Duration::from_secs(3));
        assert_eq!((stream.longest_packet, stream.longest_stall < Duration::from_millis(200)), (1_420, true));
        sim.world.link_mut(places.town.internet).mtu = takes;
        let before = stream.received;
        stream.run(&mut sim, Duration::from_secs(12));
        assert!(stream.longest_stall <= Duration::from_secs(1), "{takes}: stalled for {:?}", stream.longest_stall);
        assert!(stream.received - before > 1_000_000, "{takes}: {} bytes", stream.received - before);
        let path = sim.peer_status(a, b).path;
        assert_eq!(path.mtu, Some(expected), "{takes}: {path:?}");
        assert!(sim.is_direct(a, b), "{takes}");
        // Small packets never suffered.
        let series = sim.ping(a, b, 20, Duration::from_millis(50));
        sim.run_for(Duration::from_secs(2));
        assert_none_lost(&sim, series, Duration::from_millis(500));
        sim.world.link_mut(places.town.internet).mtu = 1_500;
        sim.ping(a, b, 620, Duration::from_secs(1));
        sim.run_for(Duration::from_secs(620));
        stream.run(&mut sim, Duration::from_secs(1));
        assert_eq!(sim.peer_status(a, b).path.mtu, Some(1_420), "{takes}: found again");
        assert!(stream.longest_stall <= Duration::from_secs(1), "{takes}: {:?}", stream.longest_stall);
        sim.finish();
    }
}

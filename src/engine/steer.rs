//! Keeps bulk flows out of the way of all others between the kernel and this node.
//!
//! A TUN device with several queues asks no one which of them a flow's packets go to: Linux keeps to the queue that the
//! flow's packets in the other direction were last written to (`tun_flow_update`). So a worker, which reads the queues in
//! turn, sorts flows by where it writes: those that came in superpackets lately to the bulk queues, all others to the first.
//! A question or an answer then never waits behind megabytes of a transfer.

use std::net::IpAddr;
use std::time::Duration;

use crate::time::Now;
use crate::wire::ip;

/// A flow without superpackets for so long is no bulk flow any more.
const CALM: Duration = Duration::from_secs(1);
/// Places for bulk flows. Flows that share one share its fate.
const PLACES: usize = 256;

/// Which flows are bulk.
#[derive(Debug)]
pub struct Steering {
    queues: usize,
    bulk: Box<[Option<Now>; PLACES]>,
    /// A flow became bulk, and packets of it may still be in the first queue.
    moving: bool,
}

impl Steering {
    /// For a device with so many queues.
    #[must_use]
    pub fn new(queues: usize) -> Self {
        Self { queues, bulk: Box::new([None; PLACES]), moving: false }
    }

    /// A superpacket was read from the device.
    pub fn superpacket(&mut self, packet: &[u8], now: Now) {
        if self.queues < 2 {
            return;
        }
        let place = &mut self.bulk[place(packet)];
        if place.is_none_or(|last| now.since(last) >= CALM) {
            self.moving = true;
        }
        *place = Some(now);
    }

    /// The queue to write a packet to.
    #[must_use]
    pub fn queue(&self, packet: &[u8], now: Now) -> usize {
        if self.queues < 2 {
            return 0;
        }
        let place = place(packet);
        match self.bulk[place] {
            Some(last) if now.since(last) < CALM => 1 + place % (self.queues - 1),
            _ => 0,
        }
    }

    /// A queue was read, or is about to be. False: leave the bulk queues alone in this turn, because the first holds older
    /// packets of one of their flows.
    pub fn may_read(&mut self, queue: usize, first_is_empty: bool) -> bool {
        if first_is_empty {
            self.moving = false;
        }
        queue == 0 || !self.moving
    }
}

/// The place of a packet's flow, the same in both directions.
fn place(packet: &[u8]) -> usize {
    const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;
    let Ok((source, destination)) = ip::source_destination(packet) else { return 0 };
    let (protocol, l4) = match source {
        IpAddr::V4(_) => (packet[9], usize::from(packet[0] & 0x0F) * 4),
        IpAddr::V6(_) => (packet[6], 40),
    };
    let ports = match (protocol, packet.get(l4..l4 + 4)) {
        (6 | 17, Some(ports)) => [[ports[0], ports[1]], [ports[2], ports[3]]],
        _ => [[0; 2]; 2],
    };
    let end = |ip: IpAddr, port: [u8; 2]| {
        let ip = match ip {
            IpAddr::V4(ip) => u64::from(ip.to_bits()),
            #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
            IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64 ^ ip.to_bits() as u64,
        };
        (ip ^ u64::from(u16::from_be_bytes(port)) << 32).wrapping_mul(MULTIPLIER)
    };
    let hash = end(source, ports[0]) ^ end(destination, ports[1]) ^ u64::from(protocol);
    usize::try_from(hash.wrapping_mul(MULTIPLIER) >> 56).unwrap_or_default() % PLACES
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn packet(v6: bool, from: (u8, u16), to: (u8, u16)) -> Vec<u8> {
        let mut out = Vec::new();
        if v6 {
            let ip = |n: u8| [0xFD, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, n];
            let builder = etherparse::PacketBuilder::ipv6(ip(from.0), ip(to.0), 9).tcp(from.1, to.1, 1, 1);
            builder.write(&mut out, b"x").unwrap();
        } else {
            let ip = |n: u8| [10, 0, 0, n];
            let builder = etherparse::PacketBuilder::ipv4(ip(from.0), ip(to.0), 9).tcp(from.1, to.1, 1, 1);
            builder.write(&mut out, b"x").unwrap();
        }
        out
    }

    #[test]
    fn a_bulk_flow_is_told_by_its_superpackets_in_the_other_direction() {
        for v6 in [false, true] {
            let mut steering = Steering::new(4);
            let (out, back) = (packet(v6, (1, 40_000), (2, 443)), packet(v6, (2, 443), (1, 40_000)));
            let other = packet(v6, (2, 443), (1, 40_001));
            let now = Now(5_000_000);
            assert_eq!((steering.queue(&back, now), steering.queue(&other, now)), (0, 0));
            steering.superpacket(&out, now);
            assert_ne!(steering.queue(&back, now), 0);
            assert_eq!(steering.queue(&other, now), 0);
            assert_eq!(steering.queue(&back, now + CALM), 0, "calm again");
        }
        let mut single = Steering::new(1);
        let back = packet(false, (2, 443), (1, 40_000));
        single.superpacket(&back, Now(1));
        assert_eq!(single.queue(&back, Now(1)), 0);
        assert!(single.may_read(0, false));
        assert_eq!(Steering::new(4).queue(&[], Now(1)), 0);
    }

    /// What a flow left in the first queue is older than what it has in its new one.
    #[test]
    fn the_bulk_queues_wait_until_a_moving_flow_has_left_the_first() {
        let mut steering = Steering::new(4);
        assert!(steering.may_read(1, false));
        steering.superpacket(&packet(false, (1, 1), (2, 2)), Now(1));
        assert!(steering.may_read(0, false) && !steering.may_read(1, false));
        assert!(steering.may_read(0, true) && steering.may_read(3, false));
        // The same flow moves only once.
        steering.superpacket(&packet(false, (1, 1), (2, 2)), Now(2));
        assert!(steering.may_read(1, false));
        steering.superpacket(&packet(false, (1, 1), (2, 2)), Now(2) + CALM);
        assert!(!steering.may_read(1, false));
    }

    #[test]
    fn flows_are_spread_over_the_places() {
        let places: BTreeSet<usize> =
            (0..1000).map(|port| place(&packet(port % 2 == 0, (1, port), (2, 443)))).collect();
        assert!(places.len() > PLACES * 9 / 10, "{} places", places.len());
    }
}

//! Which way flows began to a network that several routers lead to, so that they stay there while new ones go another way.
//!
//! A router that translates addresses is part of every connection through it: in the middle of one, the other router's packets
//! come from a stranger. So when another router is asked (the first is to be worked on, or the other is nearer), only flows
//! that begin afterwards go there. What is remembered is bounded; only flows to such networks are.

use std::hash::Hasher as _;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use rustc_hash::{FxHashMap, FxHasher};

use crate::engine::io::PeerId;
use crate::engine::owners::Owners;
use crate::time::Now;
use crate::wire::ip;

/// Flows remembered: this many sets of [`WAYS`]. In a full set the one that was silent longest is forgotten.
const SETS: usize = 2_048;
/// Flows of one set.
const WAYS: usize = 4;
/// What is not TCP begins anew after so much silence: as long as Linux remembers a UDP stream
/// (`nf_conntrack_udp_timeout_stream`, 120 s), and a bit.
const SILENCE: Duration = Duration::from_secs(180);

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The flows, and who may keep them.
#[derive(Debug, Default)]
pub struct Flows {
    keepers: Owners,
    by_peer: FxHashMap<PeerId, Vec<IpNet>>,
    /// Made when the first is remembered.
    places: Vec<Place>,
}

/// A flow; the key 0 is none.
#[derive(Debug, Clone, Copy)]
struct Place {
    key: u64,
    peer: PeerId,
    used: Now,
}

const NOBODY: Place = Place { key: 0, peer: PeerId(0), used: Now::ZERO };

impl Flows {
    /// Makes `nets` the whole set of prefixes for which flows that began through this peer stay with it.
    pub fn set(&mut self, peer: PeerId, nets: Vec<IpNet>) {
        for net in self.by_peer.remove(&peer).unwrap_or_default() {
            self.keepers.remove(net, peer);
        }
        for net in &nets {
            self.keepers.add(*net, peer);
        }
        if !nets.is_empty() {
            self.by_peer.insert(peer, nets);
        }
        if self.by_peer.is_empty() {
            self.places = Vec::new();
        }
    }

    /// True: no network has several routers, and [`way`](Self::way) need not be asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_peer.is_empty()
    }

    /// The peer that a packet goes to: the one that is asked now, or the one its flow began with, if that keeps it.
    pub fn way(&mut self, packet: &[u8], destination: IpAddr, asked: PeerId, now: Now) -> PeerId {
        let Some(keepers) = self.keepers.longest(destination) else { return asked };
        // Somebody who is asked for want of a better one, or for a longer prefix: nothing is kept from it.
        if !self.keepers.contains(keepers, asked) {
            return asked;
        }
        let Some(flow) = Flow::of(packet) else { return asked };
        if self.places.is_empty() {
            self.places = vec![NOBODY; SETS * WAYS];
        }
        let first = usize::try_from(flow.key >> 40).unwrap_or_default() % SETS * WAYS;
        let set = &mut self.places[first..first + WAYS];
        if let Some(place) = set.iter_mut().find(|place| place.key == flow.key) {
            let over = flow.begins || (!flow.lasts && now.since(place.used) > SILENCE);
            if over || !self.keepers.contains(keepers, place.peer) {
                place.peer = asked;
            }
            place.used = now;
            return place.peer;
        }
        if let Some(oldest) = set.iter_mut().min_by_key(|place| place.used) {
            *oldest = Place { key: flow.key, peer: asked, used: now };
        }
        asked
    }
}

/// What is seen of a flow in one of its packets.
struct Flow {
    /// Never 0.
    key: u64,
    /// This packet opens it.
    begins: bool,
    /// It ends by saying so, not by silence.
    lasts: bool,
}

impl Flow {
    fn of(packet: &[u8]) -> Option<Self> {
        let (source, destination) = ip::source_destination(packet).ok()?;
        // Fragments are one flow between two machines: which connection the later ones belong to cannot be told.
        let (protocol, l4) = ip::transport(packet).unwrap_or((0, packet.len()));
        let part = |from: usize, len: usize| packet.get(l4 + from..l4 + from + len).unwrap_or_default();
        let ends = match protocol {
            TCP | UDP => part(0, 4),
            // The identifier of an echo.
            ICMP if matches!(part(0, 1), [8 | 0]) => part(4, 2),
            ICMPV6 if matches!(part(0, 1), [128 | 129]) => part(4, 2),
            _ => &[],
        };
        let mut hasher = FxHasher::default();
        for address in [source, destination] {
            match address {
                IpAddr::V4(a) => hasher.write_u32(a.to_bits()),
                IpAddr::V6(a) => hasher.write_u128(a.to_bits()),
            }
        }
        hasher.write_u8(protocol);
        hasher.write(ends);
        // SYN without ACK (RFC 9293 section 3.1).
        let begins = protocol == TCP && part(13, 1).first().is_some_and(|flags| flags & 0x12 == 0x02);
        Some(Self { key: hasher.finish().max(1), begins, lasts: protocol == TCP })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PeerId = PeerId(1);
    const B: PeerId = PeerId(2);

    fn net() -> IpNet {
        "192.168.7.0/24".parse().unwrap()
    }

    fn to() -> IpAddr {
        "192.168.7.9".parse().unwrap()
    }

    fn packet(protocol: u8, port: u16, flags: u8) -> Vec<u8> {
        let mut packet = vec![0u8; 40];
        packet[0] = 0x45;
        packet[3] = 40;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[100, 71, 0, 1]);
        packet[16..20].copy_from_slice(&[192, 168, 7, 9]);
        packet[20..22].copy_from_slice(&port.to_be_bytes());
        packet[22..24].copy_from_slice(&80u16.to_be_bytes());
        packet[33] = flags;
        packet
    }

    fn at(seconds: u64) -> Now {
        Now::ZERO + Duration::from_secs(seconds)
    }

    fn both() -> Flows {
        let mut flows = Flows::default();
        flows.set(A, vec![net()]);
        flows.set(B, vec![net()]);
        flows
    }

    #[test]
    fn what_is_under_way_stays_and_what_begins_goes_where_it_is_asked() {
        let mut flows = both();
        let (old, new) = (packet(TCP, 1_000, 0x10), packet(TCP, 1_001, 0x02));
        assert_eq!(flows.way(&packet(TCP, 1_000, 0x02), to(), A, at(0)), A);
        assert_eq!(flows.way(&old, to(), B, at(1)), A, "an hour of silence changes nothing");
        assert_eq!(flows.way(&old, to(), B, at(3_600)), A);
        assert_eq!(flows.way(&new, to(), B, at(2)), B);
        assert_eq!(flows.way(&packet(TCP, 1_001, 0x10), to(), A, at(3)), B, "and stays there too");
        // The same ports again: a new connection.
        assert_eq!(flows.way(&packet(TCP, 1_000, 0x02), to(), B, at(4_000)), B);
        let datagram = packet(UDP, 2_000, 0);
        assert_eq!(flows.way(&datagram, to(), A, at(0)), A);
        assert_eq!(flows.way(&datagram, to(), B, at(100)), A);
        assert_eq!(flows.way(&datagram, to(), B, at(400)), B, "it was silent");
    }

    #[test]
    fn one_that_cannot_forward_any_more_keeps_nothing() {
        let mut flows = both();
        let packet = packet(TCP, 1_000, 0x10);
        assert_eq!(flows.way(&packet, to(), A, at(0)), A);
        flows.set(A, vec![]);
        assert_eq!(flows.way(&packet, to(), B, at(1)), B);
        flows.set(A, vec![net()]);
        assert_eq!(flows.way(&packet, to(), A, at(2)), B, "it moved for good");
        flows.set(A, vec![]);
        flows.set(B, vec![]);
        assert!(flows.is_empty() && flows.places.is_empty());
    }

    #[test]
    fn who_is_asked_without_keeping_gets_everything_and_other_networks_are_not_looked_at() {
        let mut flows = both();
        let packet = packet(UDP, 1, 0);
        assert_eq!(flows.way(&packet, to(), A, at(0)), A);
        assert_eq!(flows.way(&packet, to(), PeerId(9), at(1)), PeerId(9));
        assert_eq!(flows.way(&packet, "10.0.0.1".parse().unwrap(), PeerId(9), at(1)), PeerId(9));
        assert_eq!(flows.way(&[], to(), B, at(1)), B);
    }

    #[test]
    fn memory_is_bounded_and_the_longest_silent_goes_first() {
        let mut flows = both();
        for port in 0..=u16::MAX {
            flows.way(&packet(UDP, port, 0), to(), A, at(u64::from(port) / 1_000));
        }
        assert_eq!(flows.places.len(), SETS * WAYS);
        let kept = |flows: &mut Flows, port| flows.way(&packet(UDP, port, 0), to(), B, at(66)) == A;
        let late = (u16::MAX - 1_000..=u16::MAX).filter(|port| kept(&mut flows, *port)).count();
        assert!(late > 900, "{late} of the last 1001 flows are remembered");
    }
}

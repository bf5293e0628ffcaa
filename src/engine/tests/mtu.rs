//! Packets and paths of different sizes, through both packet machines and the planner.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};

use super::*;
use crate::wire::ip::packet_too_big;

/// A pair with a direct path that takes inner packets of `inner` bytes, after so long that this is known.
fn on_a_path_of(inner: usize) -> Pair {
    let mut pair = Pair::new();
    pair.longest = inner + 32;
    talk(&mut pair, 150);
    pair.nodes[0].tun.clear();
    pair.nodes[1].tun.clear();
    pair
}

/// Small packets both ways, ten a second.
fn talk(pair: &mut Pair, packets: usize) {
    for _ in 0..packets {
        for (from, to) in [(0, 1), (1, 0)] {
            let (packet, now) = (pair.packet(from, to), pair.now);
            pair.nodes[from].send(&packet, now);
        }
        pair.run(pair.now + Duration::from_millis(100));
    }
}

fn mtu(pair: &Pair, node: usize) -> (PathKind, Option<u16>) {
    let path = pair.status(node).peers.remove(0).path;
    (path.kind, path.mtu)
}

fn addresses(pair: &Pair) -> ([u8; 4], [u8; 4], [u8; 16], [u8; 16]) {
    let me = |n: usize| pair.nodes[n].planner.me();
    (me(0).ipv4.octets(), me(1).ipv4.octets(), me(0).ipv6.octets(), me(1).ipv6.octets())
}

fn udp(pair: &Pair, v6: bool, len: usize, may_fragment: bool) -> Vec<u8> {
    let (a, b, a6, b6) = addresses(pair);
    let ip = if v6 { PacketBuilder::ipv6(a6, b6, 64) } else { PacketBuilder::ipv4(a, b, 64) };
    let mut out = Vec::new();
    ip.udp(1, 2).write(&mut out, &vec![7; len - if v6 { 48 } else { 28 }]).unwrap();
    if may_fragment {
        let mut header = etherparse::Ipv4Header::from_slice(&out).unwrap().0;
        header.dont_fragment = false;
        header.header_checksum = header.calc_header_checksum();
        out[..20].copy_from_slice(&header.to_bytes());
    }
    out
}

fn sent(pair: &mut Pair, packet: &[u8]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let now = pair.now;
    pair.nodes[0].send(packet, now);
    pair.run(now + Duration::from_millis(5));
    (std::mem::take(&mut pair.nodes[1].tun), std::mem::take(&mut pair.nodes[0].tun))
}

fn payloads(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut all = Vec::new();
    for packet in packets {
        let sliced = SlicedPacket::from_ip(packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("{packet:?}") };
        let sum = match sliced.net.unwrap() {
            NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
            NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
            NetSlice::Arp(_) => panic!("no IP"),
        };
        assert_eq!(sum.unwrap(), tcp.checksum());
        all.extend_from_slice(tcp.payload());
    }
    all
}

#[test]
fn the_largest_size_that_passes_is_found_and_told() {
    for (takes, found) in
        [(576, 576), (1_199, 1_120), (1_279, 1_200), (1_280, 1_280), (1_399, 1_380), (1_500, 1_420), (9_000, 8_920)]
    {
        let pair = on_a_path_of(takes);
        for node in [0, 1] {
            assert_eq!(mtu(&pair, node), (PathKind::Direct, Some(found)), "a path of {takes}");
        }
    }
    let pair = on_a_path_of(500);
    assert_eq!(mtu(&pair, 0), (PathKind::Relay, Some(1_280)));
    assert!(pair.status(0).peers.remove(0).path.reason.unwrap().contains("full size"));
}

#[test]
fn tcp_is_cut_to_the_path_superpacket_or_not() {
    for (takes, limit) in [(576, 576), (1_130, 1_120), (1_280, 1_280), (1_350, 1_340), (9_000, 8_920)] {
        let mut pair = on_a_path_of(takes);
        let payload: Vec<u8> = (0..30_000u32).map(|n| (n % 251) as u8).collect();
        for size in [500, 1_380, 8_880] {
            let (offload, packet) = superpacket(&pair, &payload, size);
            let now = pair.now;
            pair.nodes[0].send_super(offload, &packet, now);
            pair.run(now + Duration::from_millis(5));
            let got = std::mem::take(&mut pair.nodes[1].tun);
            assert_eq!(got.iter().map(Vec::len).max(), Some(limit.min(usize::from(size) + 40)));
            assert_eq!(payloads(&got), payload);
        }
        let (a, b, a6, b6) = addresses(&pair);
        for v6 in [false, true] {
            let ip = if v6 { PacketBuilder::ipv6(a6, b6, 64) } else { PacketBuilder::ipv4(a, b, 64) };
            let mut packet = Vec::new();
            ip.tcp(1, 2, 3, 4).ack(5).write(&mut packet, &payload[..1_360]).unwrap();
            let (got, told) = sent(&mut pair, &packet);
            assert_eq!(payloads(&got), payload[..1_360]);
            assert!(got.iter().all(|packet| packet.len() <= limit) && told.is_empty());
        }
        assert_eq!(pair.nodes[0].drops.get(Drop::TooBig), 0);
    }
}

#[test]
fn what_is_too_long_is_fragmented_relayed_or_refused_by_name() {
    for takes in [1_130, 1_350] {
        let limit = if takes < 1_280 { 1_120 } else { 1_340 };
        let mut pair = on_a_path_of(takes);
        let (got, told) = {
            let p = udp(&pair, false, 1_400, true);
            sent(&mut pair, &p)
        };
        assert_eq!((got.len(), told.len()), (2, 0));
        assert!(got.iter().all(|fragment| fragment.len() <= limit));
        for v6 in [false, true] {
            let long = udp(&pair, v6, 1_400, false);
            let (got, told) = sent(&mut pair, &long);
            let least = u16::try_from(limit.max(1_280)).unwrap();
            assert_eq!((got.len(), told), (0, vec![packet_too_big(&long, least).unwrap()]));
            // What every path must take arrives whole, one way or the other.
            let whole = udp(&pair, v6, 1_280, false);
            assert_eq!(sent(&mut pair, &whole), (vec![whole], vec![]));
        }
        assert_eq!(pair.nodes[0].drops.get(Drop::TooBig), 2);
    }
}

#[test]
fn connections_that_open_are_told_the_size_of_a_direct_path_in_both_directions() {
    let told = |packets: &[Vec<u8>]| {
        let sliced = SlicedPacket::from_ip(&packets[0]).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!() };
        let mut options = tcp.options_iterator().flatten();
        options.find_map(|o| if let TcpOptionElement::MaximumSegmentSize(size) = o { Some(size) } else { None })
    };
    let syn = |pair: &Pair| {
        let (a, b, ..) = addresses(pair);
        let mut out = Vec::new();
        let tcp = PacketBuilder::ipv4(a, b, 64).tcp(1, 2, 3, 4).syn();
        tcp.options(&[TcpOptionElement::MaximumSegmentSize(1_460)]).unwrap().write(&mut out, &[]).unwrap();
        out
    };
    let mut pair = on_a_path_of(1_350);
    let packet = syn(&pair);
    assert_eq!(told(&sent(&mut pair, &packet).0), Some(1_300));
    payloads(std::slice::from_ref(&packet));
    // Of two ends with different limits the receiver's counts too: it is the one that will send so much.
    let id = PeerId(0);
    pair.nodes[1].apply(Update::Mtu { peer: id, size: 1_280, settled: true }, pair.now);
    assert_eq!(told(&sent(&mut pair, &packet).0), Some(1_240));
    // A connection may outlive the relay.
    pair.udp_blocked = true;
    talk(&mut pair, 50);
    assert_eq!(pair.path(0), PathKind::Relay);
    pair.nodes[1].tun.clear();
    assert_eq!(told(&sent(&mut pair, &packet).0), Some(1_460));
}

#[test]
fn what_the_system_refuses_to_send_whole_is_taken_at_its_word() {
    let mut pair = on_a_path_of(1_420);
    let via = Via::Udp { socket: SocketId::V4, remote: pair.nodes[1].address() };
    let other = Via::Udp { socket: SocketId::V4, remote: pair.nodes[0].address() };
    for (via, len, expected) in [(other, 700, 1_420), (via, 1_420 + 32, 1_380), (via, 1_280 + 32, 1_200)] {
        let now = pair.now;
        pair.nodes[0].planner.handle(Input::Notice(Notice::TooLong { via, len }), now);
        pair.nodes[0].settle(now);
        assert_eq!(mtu(&pair, 0), (PathKind::Direct, Some(expected)));
    }
    // It was wrong, or it was about another interface: found by the next search.
    pair.nodes[0].tun.clear();
    talk(&mut pair, 6_100);
    assert_eq!(mtu(&pair, 0), (PathKind::Direct, Some(1_420)));
}

#[test]
fn nothing_is_asked_on_an_idle_path() {
    let mut pair = on_a_path_of(1_420);
    let now = pair.now;
    pair.run(now + Duration::from_millis(2_500));
    let mut long = 0;
    for _ in 0..1_200 {
        let until = pair.now + Duration::from_millis(50);
        pair.run(until);
        long += pair.wire.borrow().iter().filter(|(.., bytes)| bytes.len() > 300).count();
    }
    assert_eq!(long, 0);
}

use etherparse::PacketBuilder;

use super::*;
use crate::wire::fragment;
use crate::wire::ip;

const CLIENT: [u8; 4] = [100, 71, 0, 5];
const REAL: [u8; 4] = [192, 168, 1, 10];
const ALIAS: [u8; 4] = [100, 99, 7, 10];

fn aliases() -> Box<Aliases> {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let pairs = [(net("192.168.1.0/24"), net("100.99.7.0/24")), (net("fd00:1::/64"), net("fd00:a:b:c::/64"))];
    Aliases::new(&pairs, &Arc::default()).unwrap()
}

fn udp(from: [u8; 4], to: [u8; 4], ports: (u16, u16), len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ipv4(from, to, 9).udp(ports.0, ports.1).write(&mut out, &vec![7; len]).unwrap();
    out[6] &= !0x40;
    let mut header = etherparse::Ipv4Header::from_slice(&out).unwrap().0;
    header.header_checksum = header.calc_header_checksum();
    out[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
    out
}

/// In and out again as the worker does it; the bytes as they are then.
fn arrive(aliases: &Aliases, mut packet: Vec<u8>) -> Vec<u8> {
    let to = ip::destination(&packet).unwrap();
    let delivered = aliases.arrive(&mut packet, to);
    assert_eq!(ip::destination(&packet), Ok(delivered));
    packet
}

fn leave(aliases: &Aliases, mut packet: Vec<u8>) -> Vec<u8> {
    let (from, _) = ip::source_destination(&packet).unwrap();
    aliases.leave(&mut packet, from, false);
    packet
}

#[test]
fn an_answer_comes_from_the_address_that_was_asked() {
    let aliases = aliases();
    for _ in 0..2 {
        // Two flows of one pair of machines at once, one by each address.
        assert_eq!(arrive(&aliases, udp(CLIENT, ALIAS, (5000, 80), 9)), udp(CLIENT, REAL, (5000, 80), 9));
        assert_eq!(arrive(&aliases, udp(CLIENT, REAL, (5001, 80), 9)), udp(CLIENT, REAL, (5001, 80), 9));
        assert_eq!(leave(&aliases, udp(REAL, CLIENT, (80, 5000), 30)), udp(ALIAS, CLIENT, (80, 5000), 30));
        assert_eq!(leave(&aliases, udp(REAL, CLIENT, (80, 5001), 30)), udp(REAL, CLIENT, (80, 5001), 30));
    }
    // The same ports by the other address now.
    arrive(&aliases, udp(CLIENT, ALIAS, (5001, 80), 9));
    assert_eq!(leave(&aliases, udp(REAL, CLIENT, (80, 5001), 30)), udp(ALIAS, CLIENT, (80, 5001), 30));
    // What begins behind this node comes from the alias; what is elsewhere stays as it is.
    assert_eq!(leave(&aliases, udp(REAL, CLIENT, (9, 9), 1)), udp(ALIAS, CLIENT, (9, 9), 1));
    let other = udp([10, 0, 0, 1], CLIENT, (80, 5000), 1);
    assert_eq!(leave(&aliases, other.clone()), other);
    let other = udp(CLIENT, [10, 0, 0, 1], (80, 5000), 1);
    assert_eq!(arrive(&aliases, other.clone()), other);
}

#[test]
fn ipv6_goes_the_same_way() {
    let aliases = aliases();
    let packet = |from: &str, to: &str| {
        let [from, to] = [from, to].map(|ip| ip.parse::<Ipv6Addr>().unwrap().octets());
        let mut out = Vec::new();
        PacketBuilder::ipv6(from, to, 9).tcp(1, 2, 3, 4).write(&mut out, b"data").unwrap();
        out
    };
    assert_eq!(arrive(&aliases, packet("fd99::1", "fd00:a:b:c::10")), packet("fd99::1", "fd00:1::10"));
    assert_eq!(leave(&aliases, packet("fd00:1::10", "fd99::1")), packet("fd00:a:b:c::10", "fd99::1"));
}

#[test]
fn fragments_follow_their_first() {
    let aliases = aliases();
    let cut = |packet: &[u8]| {
        let (mut all, mut one) = (Vec::new(), Vec::new());
        let mut fragments = fragment::fragments(packet, 576).unwrap();
        while fragments.next_into(&mut one) {
            all.push(one.clone());
        }
        all
    };
    let each = |packets: Vec<Vec<u8>>, go: &dyn Fn(Vec<u8>) -> Vec<u8>| -> Vec<Vec<u8>> {
        packets.into_iter().map(go).collect()
    };
    let (asked, answer) = ((5000, 80), (80, 5000));
    let came = each(cut(&udp(CLIENT, ALIAS, asked, 2000)), &|p| arrive(&aliases, p));
    assert_eq!(came, cut(&udp(CLIENT, REAL, asked, 2000)));
    let went = each(cut(&udp(REAL, CLIENT, answer, 2000)), &|p| leave(&aliases, p));
    assert_eq!(went, cut(&udp(ALIAS, CLIENT, answer, 2000)));
    each(cut(&udp(CLIENT, REAL, asked, 2000)), &|p| arrive(&aliases, p));
    let went = each(cut(&udp(REAL, CLIENT, answer, 2000)), &|p| leave(&aliases, p));
    assert_eq!(went, cut(&udp(REAL, CLIENT, answer, 2000)));
}

#[test]
fn errors_are_about_the_packet_their_receiver_sent() {
    let aliases = aliases();
    let question = |to| udp(CLIENT, to, (5000, 80), 9);
    let refusal =
        |from: [u8; 4], about: &[u8]| ip::icmp_unreachable(about, from.into(), ip::Unreachable::Host).unwrap();
    // By the machine itself, by another one there, and by this machine.
    arrive(&aliases, question(ALIAS));
    for (from, shown) in [(REAL, ALIAS), ([192, 168, 1, 1], [100, 99, 7, 1]), ([100, 71, 0, 2], [100, 71, 0, 2])] {
        let wanted = refusal(shown, &question(ALIAS));
        assert_eq!(leave(&aliases, refusal(from, &question(REAL))), wanted, "{from:?}");
    }
    arrive(&aliases, question(REAL));
    let kept = refusal(REAL, &question(REAL));
    assert_eq!(leave(&aliases, kept.clone()), kept);
    // The client refuses an answer, and this node itself one that was about to leave.
    let answer = |from| udp(from, CLIENT, (80, 5000), 1400);
    assert_eq!(arrive(&aliases, refusal_to(&answer(ALIAS))), refusal_to(&answer(REAL)));
    let mut whole = answer(ALIAS);
    whole[6] |= 0x40;
    let mut header = etherparse::Ipv4Header::from_slice(&whole).unwrap().0;
    header.header_checksum = header.calc_header_checksum();
    whole[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
    let told = arrive(&aliases, ip::packet_too_big(&whole, 1280).unwrap());
    let seen = look(&told).unwrap();
    assert_eq!(seen.destination, IpAddr::from(REAL));
    assert_eq!(look(&told[seen.quoted.unwrap()..]).unwrap().source, IpAddr::from(REAL));
    // None of these errors has changed by which address the flow is.
    assert_eq!(leave(&aliases, answer(REAL)), answer(REAL));
}

fn refusal_to(answer: &[u8]) -> Vec<u8> {
    ip::icmp_unreachable(answer, CLIENT.into(), ip::Unreachable::Prohibited).unwrap()
}

#[test]
fn the_table_forgets_and_does_not_grow() {
    let aliases = aliases();
    for n in 0..u16::MAX {
        arrive(&aliases, udp(CLIENT, REAL, (n, 80), 1));
    }
    let known = (0..u16::MAX).filter(|n| leave(&aliases, udp(REAL, CLIENT, (80, *n), 1))[12] == 192).count();
    assert!((FLOWS / 2..=FLOWS).contains(&known), "{known}");
}

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};
use proptest::prelude::*;

use super::*;
use crate::wire::fragment;
use crate::wire::offload::{Offload, complete};

/// What a packet is made of, but for its addresses.
#[derive(Debug, Clone)]
struct Recipe {
    v6: bool,
    kind: Kind,
    ports: (u16, u16),
    payload: Vec<u8>,
    /// Of UDP over IPv4: sent without a checksum.
    absent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
    Echo,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let kind = prop_oneof![Just(Kind::Tcp), Just(Kind::Udp), Just(Kind::Echo)];
    (any::<bool>(), kind, any::<(u16, u16)>(), proptest::collection::vec(any::<u8>(), 0..600), any::<bool>())
        .prop_map(|(v6, kind, ports, payload, absent)| Recipe { v6, kind, ports, payload, absent })
}

fn address(v6: bool, bytes: [u8; 16]) -> IpAddr {
    if v6 { IpAddr::from(bytes) } else { IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]) }
}

fn start(source: IpAddr, destination: IpAddr) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 9),
        (IpAddr::V6(s), IpAddr::V6(d)) => PacketBuilder::ipv6(s.octets(), d.octets(), 9),
        _ => panic!("two families"),
    }
}

impl Recipe {
    /// The packet with these addresses, every checksum made anew over all it covers.
    fn cook(&self, source: IpAddr, destination: IpAddr) -> Vec<u8> {
        let start = start(source, destination);
        let (a, b) = self.ports;
        let mut out = Vec::new();
        match (self.kind, self.v6) {
            (Kind::Tcp, _) => start.tcp(a, b, 7, 9).write(&mut out, &self.payload).unwrap(),
            (Kind::Udp, _) => start.udp(a, b).write(&mut out, &self.payload).unwrap(),
            (Kind::Echo, false) => start.icmpv4_echo_request(a, b).write(&mut out, &self.payload).unwrap(),
            (Kind::Echo, true) => start.icmpv6_echo_request(a, b).write(&mut out, &self.payload).unwrap(),
        }
        if self.kind == Kind::Udp && !self.v6 && self.absent {
            out[26..28].fill(0);
        }
        if !self.v6 {
            // Let it be fragmented.
            out[6] &= !0x40;
            let mut header = etherparse::Ipv4Header::from_slice(&out).unwrap().0;
            header.header_checksum = header.calc_header_checksum();
            out[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
        }
        out
    }

    fn checksum_offset(&self) -> u16 {
        match self.kind {
            Kind::Tcp => 16,
            Kind::Udp => 6,
            Kind::Echo => 2,
        }
    }
}

/// An ICMP error from one to the other that quotes the beginning of a packet.
fn error(source: IpAddr, destination: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let start = start(source, destination);
    let mut out = Vec::new();
    if source.is_ipv4() {
        let header = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1280 };
        start.icmpv4(Icmpv4Type::DestinationUnreachable(header)).write(&mut out, quoted).unwrap();
    } else {
        let code = icmpv6::DestUnreachableCode::Port;
        start.icmpv6(Icmpv6Type::DestinationUnreachable(code)).write(&mut out, quoted).unwrap();
    }
    out
}

/// The fragments of a packet; IPv6 as RFC 8200 section 4.5 makes them.
fn pieces(packet: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    if packet[0] >> 4 == 4 {
        let mut fragments = fragment::fragments(packet, 20 + 96).unwrap();
        let mut one = Vec::new();
        while fragments.next_into(&mut one) {
            all.push(one.clone());
        }
        return all;
    }
    let chunks: Vec<&[u8]> = packet[40..].chunks(96).collect();
    for (n, chunk) in chunks.iter().enumerate() {
        let mut piece = packet[..40].to_vec();
        piece[4..6].copy_from_slice(&u16::try_from(chunk.len() + 8).unwrap().to_be_bytes());
        piece[6] = FRAGMENT;
        let more = u16::from(n + 1 < chunks.len());
        let place = u16::try_from(n * 96).unwrap() | more;
        piece.extend([packet[6], 0]);
        piece.extend(place.to_be_bytes());
        piece.extend([1, 2, 3, 4]);
        piece.extend_from_slice(chunk);
        all.push(piece);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// What is adjusted is what would have been made anew.
    #[test]
    fn whole_packets(recipe in recipe(), a: [u8; 16], b: [u8; 16], new: [u8; 16]) {
        let [a, b, new] = [a, b, new].map(|bytes| address(recipe.v6, bytes));
        let mut packet = recipe.cook(a, b);
        renumber(&mut packet, End::Destination, new, false);
        prop_assert_eq!(&packet, &recipe.cook(a, new));
        renumber(&mut packet, End::Source, b, false);
        prop_assert_eq!(&packet, &recipe.cook(b, new));
    }

    #[test]
    fn what_an_error_quotes(
        recipe in recipe(), a: [u8; 16], b: [u8; 16], new: [u8; 16], cut in 0usize..200,
    ) {
        let [a, b, new] = [a, b, new].map(|bytes| address(recipe.v6, bytes));
        // At least the ports, as errors have to; half a checksum is nobody's.
        let least = if recipe.v6 { 48 } else { 28 };
        let upto = |packet: &[u8]| packet[..(least + cut * 2).min(packet.len())].to_vec();
        // b did not take what a sent; on its way back b becomes new, outside and inside.
        let mut packet = error(b, a, &upto(&recipe.cook(a, b)));
        renumber(&mut packet, End::Source, new, false);
        renumber_quoted(&mut packet, End::Destination, new, false);
        prop_assert_eq!(&packet, &error(new, a, &upto(&recipe.cook(a, new))));
        // And the other way round.
        let mut packet = error(a, new, &upto(&recipe.cook(new, a)));
        renumber(&mut packet, End::Destination, b, false);
        renumber_quoted(&mut packet, End::Source, b, false);
        prop_assert_eq!(&packet, &error(a, b, &upto(&recipe.cook(b, a))));
    }

    #[test]
    fn fragments(recipe in recipe(), a: [u8; 16], b: [u8; 16], new: [u8; 16]) {
        let [a, b, new] = [a, b, new].map(|bytes| address(recipe.v6, bytes));
        let mut all = pieces(&recipe.cook(a, b));
        for piece in &mut all {
            renumber(piece, End::Source, new, false);
        }
        prop_assert_eq!(all, pieces(&recipe.cook(new, b)));
    }

    /// The kernel left the checksum to us: what is completed afterwards is right.
    #[test]
    fn checksums_left_for_later(recipe in recipe(), a: [u8; 16], b: [u8; 16], new: [u8; 16]) {
        prop_assume!(recipe.v6 || recipe.kind != Kind::Echo);
        let [a, b, new] = [a, b, new].map(|bytes| address(recipe.v6, bytes));
        let recipe = Recipe { absent: false, ..recipe };
        let mut packet = recipe.cook(a, b);
        let l4: u16 = if recipe.v6 { 40 } else { 20 };
        let at = usize::from(l4 + recipe.checksum_offset());
        let protocol = packet[if recipe.v6 { 6 } else { 9 }];
        let addresses = if recipe.v6 { 8..40 } else { 12..20 };
        let words: u64 = packet[addresses].chunks(2).map(|pair| u64::from(word(pair))).sum();
        let pseudo = fold(words + u64::from(protocol) + (packet.len() - usize::from(l4)) as u64);
        packet[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        renumber(&mut packet, End::Destination, new, true);
        let [c, d] = l4.to_ne_bytes();
        let [e, f] = recipe.checksum_offset().to_ne_bytes();
        complete(&Offload::decode(&[1, 0, 0, 0, 0, 0, c, d, e, f]), &mut packet).unwrap();
        prop_assert_eq!(packet, recipe.cook(a, new));
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool, new: [u8; 16], partial: bool) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = if v6 { 0x60 } else { 0x45 } | *first & 0x0F;
        }
        for v6 in [v6, !v6] {
            for end in [End::Source, End::Destination] {
                let len = bytes.len();
                renumber(&mut bytes, end, address(v6, new), partial);
                renumber_quoted(&mut bytes, end, address(v6, new), partial);
                prop_assert_eq!(bytes.len(), len);
            }
        }
    }
}

#[test]
fn a_packet_is_seen_as_what_it_is() {
    let (a, b) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let recipe = |kind| Recipe { v6: false, kind, ports: (40_000, 80), payload: vec![7; 300], absent: false };
    let tcp = recipe(Kind::Tcp).cook(a, b);
    let seen = look(&tcp).unwrap();
    assert_eq!((seen.source, seen.destination, seen.protocol, seen.l4), (a, b, 6, Some(20)));
    assert_eq!((seen.ports, seen.fragment, seen.quoted), ((40_000, 80), false, None));
    let echo = look(&recipe(Kind::Echo).cook(a, b)).unwrap();
    assert_eq!(echo.ports, (40_000, 40_000), "question and answer are one flow");
    let refused = error(b, a, &tcp[..28]);
    assert_eq!(look(&refused).unwrap().quoted, Some(28));
    let fragments: Vec<Look> = pieces(&tcp).iter().map(|piece| look(piece).unwrap()).collect();
    assert_eq!((fragments[0].l4, fragments[0].fragment, fragments[0].ports), (Some(20), true, (40_000, 80)));
    assert!(fragments[1..].iter().all(|piece| piece.l4.is_none() && piece.fragment && piece.ports == (0, 0)));
    assert_eq!(look(&[]), None);
    assert_eq!(look(&tcp[..19]), None);
}

//! Cutting against packets made one by one with `etherparse`; merging against cutting.

use std::collections::BTreeMap;

use etherparse::{
    IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header, Ipv6RawExtHeader,
    TcpHeader, TcpOptionElement, UdpHeader,
};
use proptest::prelude::*;

use super::*;

/// A flow's headers, from which packets are made.
#[derive(Debug, Clone)]
struct Flow {
    v6: bool,
    tcp: bool,
    host: u8,
    port: u16,
    tos: u8,
    ttl: u8,
    id: u16,
    may_fragment: bool,
    ip_options: bool,
    extension: bool,
    timestamps: Option<u32>,
    sequence: u32,
    acknowledgement: u32,
    window: u16,
    flags: u8,
}

impl Flow {
    fn tcp4() -> Self {
        Self {
            v6: false,
            tcp: true,
            host: 7,
            port: 443,
            tos: 0,
            ttl: 64,
            id: 100,
            may_fragment: false,
            ip_options: false,
            extension: false,
            timestamps: Some(9),
            sequence: 1000,
            acknowledgement: 5,
            window: 77,
            flags: ACK,
        }
    }

    fn tcp6() -> Self {
        Self { v6: true, ..Self::tcp4() }
    }

    fn udp4() -> Self {
        Self { tcp: false, timestamps: None, ..Self::tcp4() }
    }

    fn udp6() -> Self {
        Self { v6: true, ..Self::udp4() }
    }

    /// One packet as a sender without offload makes it: `done` bytes and `number` packets of the same send came before.
    fn packet(&self, payload: &[u8], done: usize, number: usize, flags: u8) -> Vec<u8> {
        let (source, destination) = ([10, 0, 0, 1], [10, 0, 0, self.host]);
        let (source6, destination6) = ([0xFD; 16], [self.host; 16]);
        let mut l4 = Vec::new();
        let number16 = u16::try_from(number).unwrap();
        if self.tcp {
            let sequence = self.sequence.wrapping_add(u32::try_from(done).unwrap());
            let mut header = TcpHeader::new(40_000, self.port, sequence, self.window);
            header.acknowledgment_number = self.acknowledgement;
            let bit = |mask: u8| flags & mask != 0;
            (header.fin, header.syn, header.rst, header.psh) = (bit(FIN), bit(0x02), bit(0x04), bit(PSH));
            (header.ack, header.urg, header.ece, header.cwr) = (bit(ACK), bit(0x20), bit(ECE), bit(CWR));
            if let Some(at) = self.timestamps {
                header
                    .set_options(&[TcpOptionElement::Noop, TcpOptionElement::Noop, TcpOptionElement::Timestamp(at, 3)])
                    .unwrap();
            }
            header.checksum = if self.v6 {
                header.calc_checksum_ipv6_raw(source6, destination6, payload).unwrap()
            } else {
                header.calc_checksum_ipv4_raw(source, destination, payload).unwrap()
            };
            header.write(&mut l4).unwrap();
        } else {
            let header = if self.v6 {
                let ip = Ipv6Header { source: source6, destination: destination6, ..Ipv6Header::default() };
                UdpHeader::with_ipv6_checksum(40_000, self.port, &ip, payload).unwrap()
            } else {
                let ip = Ipv4Header { source, destination, ..Ipv4Header::default() };
                UdpHeader::with_ipv4_checksum(40_000, self.port, &ip, payload).unwrap()
            };
            header.write(&mut l4).unwrap();
        }
        let protocol = if self.tcp { IpNumber::TCP } else { IpNumber::UDP };
        let length = u16::try_from(l4.len() + payload.len()).unwrap();
        let mut out = Vec::new();
        if self.v6 {
            let extension = Ipv6RawExtHeader::new_raw(protocol, &[1, 4, 0, 0, 0, 0]).unwrap();
            let ext_len = if self.extension { u16::try_from(extension.header_len()).unwrap() } else { 0 };
            let ip = Ipv6Header {
                traffic_class: self.tos,
                flow_label: Ipv6FlowLabel::try_new(0x12345).unwrap(),
                payload_length: length + ext_len,
                next_header: if self.extension { IpNumber::IPV6_DESTINATION_OPTIONS } else { protocol },
                hop_limit: self.ttl,
                source: source6,
                destination: destination6,
            };
            ip.write(&mut out).unwrap();
            if self.extension {
                extension.write(&mut out).unwrap();
            }
        } else {
            let options = if self.ip_options { Ipv4Options::from([0x94, 4, 0, 0]) } else { Ipv4Options::new() };
            let mut ip = Ipv4Header {
                dscp: IpDscp::try_new(self.tos >> 2).unwrap(),
                ecn: IpEcn::try_new(self.tos & 3).unwrap(),
                identification: self.id.wrapping_add(number16),
                dont_fragment: !self.may_fragment,
                fragment_offset: IpFragOffset::ZERO,
                time_to_live: self.ttl,
                protocol,
                source,
                destination,
                options,
                ..Ipv4Header::default()
            };
            ip.total_len = u16::try_from(ip.header_len()).unwrap() + length;
            ip.header_checksum = ip.calc_header_checksum();
            ip.write_raw(&mut out).unwrap();
        }
        out.extend(l4);
        out.extend(payload);
        out
    }

    /// What a kernel without offload would have sent.
    fn packets(&self, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
        let last = payload.len().div_ceil(size) - 1;
        payload
            .chunks(size)
            .enumerate()
            .map(|(n, chunk)| {
                let mut flags = self.flags;
                if n != last {
                    flags &= !(FIN | PSH);
                }
                if n != 0 {
                    flags &= !CWR;
                }
                self.packet(chunk, n * size, n, flags)
            })
            .collect()
    }

    fn headers(&self) -> usize {
        self.l4() + if self.tcp { 20 + if self.timestamps.is_some() { 12 } else { 0 } } else { 8 }
    }

    fn l4(&self) -> usize {
        match (self.v6, self.ip_options, self.extension) {
            (true, _, false) => 40,
            (true, _, true) => 48,
            (false, false, _) => 20,
            (false, true, _) => 24,
        }
    }

    /// What a kernel with offload hands over: one packet, its checksum only that of the pseudo header.
    fn superpacket(&self, payload: &[u8], size: usize) -> (Offload, Vec<u8>) {
        let mut packet = self.packet(payload, 0, 0, self.flags);
        let (l4, at) = (self.l4(), self.l4() + if self.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM });
        let protocol = if self.tcp { 6 } else { 17 };
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        let pseudo = fold(sum(&packet[addresses]) + word([0, protocol]) + word(be(packet.len() - l4)));
        packet[at..at + 2].copy_from_slice(&pseudo.to_ne_bytes());
        let kind = match (self.tcp, self.v6) {
            (true, false) => TCP4 | if self.flags & CWR == 0 { 0 } else { ECN },
            (true, true) => TCP6,
            (false, _) => UDP,
        };
        let offload = Offload {
            flags: NEEDS_CHECKSUM,
            kind,
            header_len: small(self.headers()),
            size: small(size),
            checksum_start: small(l4),
            checksum_offset: small(at - l4),
        };
        (offload, packet)
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

fn cut_all(offload: &Offload, packet: &[u8], longest: usize) -> Result<Vec<Vec<u8>>, BadSuper> {
    let mut packet = packet.to_vec();
    let mut cut = cut(offload, &mut packet, longest)?;
    let mut packets = Vec::new();
    while let Some(packet) = cut.next() {
        packets.push(packet.to_vec());
    }
    Ok(packets)
}

/// What the kernel makes of what a merger gives it.
fn expand(merged: &[(Offload, Vec<u8>, usize)]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for (offload, bytes, count) in merged {
        if offload.is_super() {
            let got = cut_all(offload, bytes, usize::MAX).unwrap();
            assert_eq!(got.len(), *count);
            packets.extend(got);
        } else {
            assert_eq!((*offload, *count), (Offload::default(), 1));
            packets.push(bytes.clone());
        }
    }
    packets
}

fn merge(packets: &[Vec<u8>]) -> Vec<(Offload, Vec<u8>, usize)> {
    merge_with(&mut Merger::new(true, true), packets)
}

fn merge_with(merger: &mut Merger, packets: &[Vec<u8>]) -> Vec<(Offload, Vec<u8>, usize)> {
    let mut memory = Vec::new();
    for packet in packets {
        let start = memory.len();
        memory.extend(packet);
        merger.add(&memory, start..memory.len());
    }
    let mut merged = Vec::new();
    merger.drain(&mut memory, |offload, memory, pieces| {
        let count = pieces.packets();
        merged.push((*offload, pieces.flat_map(|piece| memory[piece].to_vec()).collect(), count));
    });
    assert!(merger.is_empty());
    merged
}

fn counts(merged: &[(Offload, Vec<u8>, usize)]) -> Vec<usize> {
    merged.iter().map(|(_, _, count)| *count).collect()
}

#[test]
fn the_header_is_read_and_written_as_the_kernel_has_it() {
    let offload =
        Offload { flags: 1, kind: TCP6, header_len: 0x0102, size: 0x0304, checksum_start: 40, checksum_offset: 16 };
    let bytes = offload.encode();
    assert_eq!(Offload::decode(&bytes), offload);
    assert_eq!(bytes[..2], [1, 4]);
    assert_eq!(bytes[2..4], 0x0102u16.to_ne_bytes());
    assert_eq!(bytes[4..6], 0x0304u16.to_ne_bytes());
    assert_eq!((bytes[6..8].to_vec(), bytes[8..].to_vec()), (40u16.to_ne_bytes().into(), 16u16.to_ne_bytes().into()));
    assert!(offload.is_super() && !Offload::decode(&[0; HEADER]).is_super());
}

#[test]
fn a_cut_gives_what_the_sender_would_have_sent() {
    let flags = [ACK, ACK | PSH, ACK | FIN | PSH, ACK | CWR, ACK | ECE, ACK | 0x20];
    for base in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        for flags in flags {
            for (ip_options, extension, tos, timestamps) in [
                (false, false, 0, None),
                (true, true, 0xB9, Some(1)),
                (true, false, 1, None),
                (false, true, 3, Some(2)),
            ] {
                let flow =
                    Flow { flags, ip_options, extension, tos, timestamps, sequence: u32::MAX - 700, ..base.clone() };
                for (len, size) in [(1, 1), (1, 1000), (1000, 1000), (1001, 1000), (2999, 500), (40, 7), (9000, 1368)] {
                    let bytes = payload(len);
                    let (offload, packet) = flow.superpacket(&bytes, size);
                    assert_eq!(cut_all(&offload, &packet, usize::MAX).unwrap(), flow.packets(&bytes, size), "{flow:?}");
                }
            }
        }
    }
}

#[test]
fn superpackets_of_every_size_are_cut_up_to_the_largest() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        let most = MAX_SUPERPACKET - flow.headers();
        for len in (1..=most).step_by(977).chain([most - 1, most]) {
            let bytes = payload(len);
            let (offload, packet) = flow.superpacket(&bytes, 1368);
            let packets = cut_all(&offload, &packet, usize::MAX).unwrap();
            assert_eq!(packets.len(), len.div_ceil(1368));
            assert_eq!(packets, flow.packets(&bytes, 1368), "{len} bytes");
        }
    }
}

#[test]
fn tcp_is_cut_to_the_path_and_udp_is_not() {
    let bytes = payload(5000);
    let (offload, packet) = Flow::tcp4().superpacket(&bytes, 1400);
    assert_eq!(cut_all(&offload, &packet, 1280).unwrap(), Flow::tcp4().packets(&bytes, 1280 - 52));
    assert_eq!(cut_all(&offload, &packet, 1452).unwrap(), Flow::tcp4().packets(&bytes, 1400));
    assert_eq!(cut_all(&offload, &packet, 52), Err(BadSuper::TooLong));
    let (offload, packet) = Flow::udp6().superpacket(&bytes, 1400);
    assert_eq!(cut_all(&offload, &packet, 1447), Err(BadSuper::TooLong));
    assert_eq!(cut_all(&offload, &packet, 1448).unwrap().len(), 4);
    // Only the one short packet there is counts.
    let (offload, packet) = Flow::udp6().superpacket(&bytes[..100], 1400);
    assert_eq!(cut_all(&offload, &packet, 148).unwrap().len(), 1);
}

#[test]
fn malformed_superpackets_are_refused_by_name() {
    let (good, packet) = Flow::tcp4().superpacket(&payload(3000), 1000);
    let refused = |offload: Offload| cut_all(&offload, &packet, usize::MAX).unwrap_err();
    for kind in [0, 2, 3, 6, 0x7F] {
        assert_eq!(refused(Offload { kind, ..good }), BadSuper::Kind);
    }
    assert_eq!(refused(Offload { size: 0, ..good }), BadSuper::Size);
    assert_eq!(refused(Offload { flags: 0, ..good }), BadSuper::Headers);
    assert_eq!(refused(Offload { kind: TCP6, ..good }), BadSuper::Headers);
    assert_eq!(refused(Offload { kind: UDP, ..good }), BadSuper::Headers);
    for checksum_start in [0, 19, 24, 60, 3000, u16::MAX] {
        assert_eq!(refused(Offload { checksum_start, ..good }), BadSuper::Headers);
    }
    assert_eq!(refused(Offload { checksum_offset: 6, ..good }), BadSuper::Headers);
    for end in 0..52 {
        assert_eq!(cut_all(&good, &packet[..end], usize::MAX), Err(BadSuper::Headers), "{end} bytes");
    }
    assert_eq!(cut_all(&good, &packet[..52], usize::MAX), Err(BadSuper::Size));
    let mut short_header = packet.clone();
    short_header[32] = 0x40;
    assert_eq!(cut_all(&good, &short_header, usize::MAX), Err(BadSuper::Headers));
    let long = [&packet[..], &vec![0; 65_536]].concat();
    assert_eq!(cut_all(&good, &long, usize::MAX), Err(BadSuper::Headers));
}

#[test]
fn the_checksum_of_an_ordinary_packet_is_completed() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        for len in [0, 1, 2, 31, 32, 33, 1200] {
            let bytes = payload(len);
            let (offload, mut packet) = flow.superpacket(&bytes, 1);
            complete(&Offload { kind: NONE, size: 0, ..offload }, &mut packet).unwrap();
            assert_eq!(packet, flow.packet(&bytes, 0, 0, flow.flags));
            let before = packet.clone();
            complete(&Offload::default(), &mut packet).unwrap();
            assert_eq!(packet, before);
            let outside = Offload { kind: NONE, checksum_start: small(packet.len()), ..offload };
            assert_eq!(complete(&outside, &mut packet), Err(BadSuper::Headers));
            let outside = Offload { kind: NONE, checksum_offset: u16::MAX, ..offload };
            assert_eq!(complete(&outside, &mut packet), Err(BadSuper::Headers));
        }
    }
}

/// A UDP checksum that comes out as zero is sent as all ones (RFC 768).
#[test]
fn a_udp_checksum_is_never_zero() {
    let flow = Flow::udp4();
    let mut bytes = vec![0, 0, 1, 2];
    let one = flow.packet(&bytes, 0, 0, 0);
    bytes[..2].copy_from_slice(&one[26..28]);
    let packet = flow.packet(&bytes, 0, 0, 0);
    assert_eq!(packet[26..28], [0xFF, 0xFF]);
    let (offload, mut partial) = flow.superpacket(&bytes, 4);
    assert_eq!(cut_all(&offload, &partial, usize::MAX).unwrap(), std::slice::from_ref(&packet));
    complete(&Offload { kind: NONE, ..offload }, &mut partial).unwrap();
    assert_eq!(partial, packet);
    // And as such it is right: the packet takes part in merging.
    assert_eq!(counts(&merge(&[packet.clone(), packet])), [2]);
}

#[test]
fn packets_of_one_send_are_merged_into_what_was_sent() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        for flags in [ACK, ACK | PSH, ACK | ECE] {
            for (len, size) in [(3000, 1000), (3001, 1000), (64, 1), (60_000, 1368), (2000, 1000)] {
                let flow = Flow { flags, ..flow.clone() };
                let bytes = payload(len);
                let packets = flow.packets(&bytes, size);
                let merged = merge(&packets);
                let (offload, packet) = flow.superpacket(&bytes, size);
                assert_eq!(merged, [(offload, packet, packets.len())], "{flow:?} {len} {size}");
            }
        }
    }
}

#[test]
fn a_superpacket_stays_within_what_the_kernel_takes() {
    let flow = Flow::tcp4();
    let packets = flow.packets(&payload(150_000), 1368);
    let merged = merge(&packets);
    assert!(merged.iter().all(|(_, bytes, _)| bytes.len() <= MAX_SUPERPACKET));
    assert_eq!(counts(&merged), [47, 47, 16]);
    assert_eq!(expand(&merged), packets);
    let flow = Flow::udp6();
    assert_eq!(counts(&merge(&flow.packets(&payload(100), 1))), [64, 36]);
}

#[test]
fn what_the_receiver_must_see_alone_is_not_merged() {
    let flow = Flow::tcp4();
    let bytes = payload(100);
    let at = |n: usize, flags| flow.packet(&bytes, n * 100, n, flags);
    // PSH ends a superpacket, the others are never in one.
    for (flags, expected) in [
        (ACK | PSH, vec![2, 2]),
        (ACK | FIN, vec![1, 1, 2]),
        (ACK | 0x02, vec![1, 1, 2]),
        (ACK | 0x04, vec![1, 1, 2]),
        (ACK | 0x20, vec![1, 1, 2]),
        (ACK | CWR, vec![1, 1, 2]),
        (0, vec![1, 1, 2]),
    ] {
        let packets = [at(0, ACK), at(1, flags), at(2, ACK), at(3, ACK)];
        let merged = merge(&packets);
        assert_eq!(counts(&merged), expected, "flags {flags:#x}");
        assert_eq!(expand(&merged), packets);
    }
    // A bare acknowledgement, which repeats a number.
    let packets = [at(0, ACK), flow.packet(&[], 100, 1, ACK), at(1, ACK), at(2, ACK)];
    assert_eq!(counts(&merge(&packets)), [1, 1, 2]);
    assert_eq!(expand(&merge(&packets)), packets);
}

#[test]
fn a_packet_that_differs_ends_the_superpacket() {
    for base in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        let bytes = payload(500);
        let mut others: Vec<(&str, Flow)> = vec![
            ("host", Flow { host: 8, ..base.clone() }),
            ("port", Flow { port: 80, ..base.clone() }),
            ("ECN", Flow { tos: 3, ..base.clone() }),
            ("DSCP", Flow { tos: 0x20, ..base.clone() }),
            ("TTL", Flow { ttl: 63, ..base.clone() }),
        ];
        if base.tcp {
            others.extend([
                ("gap", Flow { sequence: base.sequence + 1, ..base.clone() }),
                ("acknowledgement", Flow { acknowledgement: 6, ..base.clone() }),
                ("window", Flow { window: 78, ..base.clone() }),
                ("timestamp", Flow { timestamps: Some(10), ..base.clone() }),
                ("no timestamp", Flow { timestamps: None, ..base.clone() }),
                ("ECE", Flow { flags: ACK | ECE, ..base.clone() }),
            ]);
        }
        if base.v6 {
            others.push(("extension", Flow { extension: true, ..base.clone() }));
        } else {
            others.push(("fragmentable", Flow { may_fragment: true, ..base.clone() }));
            others.push(("options", Flow { ip_options: true, ..base.clone() }));
        }
        for (what, other) in others {
            let packets = [base.packet(&bytes, 0, 0, base.flags), other.packet(&bytes, 500, 1, other.flags)];
            let merged = merge(&packets);
            assert_eq!(counts(&merged), [1, 1], "{what}");
            assert_eq!(expand(&merged), packets);
        }
    }
}

#[test]
fn order_within_a_flow_is_never_changed() {
    let flow = Flow::tcp4();
    let bytes = payload(100);
    let at = |n: usize| flow.packet(&bytes, n * 100, n, ACK);
    // A late one, a repeated one, and what follows.
    for order in [vec![0, 2, 1, 3], vec![0, 1, 1, 2], vec![3, 2, 1, 0], vec![1, 2, 0, 3, 4]] {
        let packets: Vec<_> = order.iter().map(|n| at(*n)).collect();
        assert_eq!(expand(&merge(&packets)), packets);
    }
    // A longer one cannot follow; after a shorter one nothing can.
    let long = flow.packet(&payload(101), 100, 1, ACK);
    let after_long = flow.packet(&payload(50), 201, 2, ACK);
    assert_eq!(counts(&merge(&[at(0), long, after_long])), [1, 2]);
    let short = flow.packet(&payload(50), 100, 1, ACK);
    let after_short = flow.packet(&payload(50), 150, 2, ACK);
    assert_eq!(counts(&merge(&[at(0), short, after_short])), [2, 1]);
}

#[test]
fn fragments_and_strange_packets_are_overtaken_by_nothing() {
    let flow = Flow::udp4();
    let bytes = payload(100);
    let whole = |n| flow.packet(&bytes, 0, n, 0);
    let mut fragment = whole(1);
    fragment[6] = 0x20;
    let fragment_sum = {
        fragment[10..12].fill(0);
        checksum(sum(&fragment[..20]))
    };
    fragment[10..12].copy_from_slice(&fragment_sum);
    let mut icmp = whole(1);
    icmp[9] = 1;
    for strange in [fragment, icmp, vec![0x45], vec![], vec![0xFF; 100], whole(1)[..30].to_vec()] {
        let packets = [whole(0), strange, whole(2), whole(3)];
        let merged = merge(&packets);
        assert_eq!(counts(&merged), [1, 1, 2]);
        assert_eq!(expand(&merged), packets);
    }
}

#[test]
fn interleaved_flows_are_merged_apart() {
    let flows: Vec<Flow> = (0..4).map(|n| Flow { port: 1000 + n, ..Flow::tcp6() }).collect();
    let bytes = payload(100);
    let packets: Vec<_> = (0..10)
        .flat_map(|n| flows.iter().map(move |flow| (flow, n)))
        .map(|(f, n)| f.packet(&bytes, n * 100, n, ACK))
        .collect();
    assert_eq!(counts(&merge(&packets)), [10; 4]);
    // More flows at once than are followed: no harm but to merging.
    let many: Vec<Flow> = (0..20).map(|n| Flow { port: 1000 + n, ..Flow::tcp6() }).collect();
    let packets: Vec<_> = (0..3)
        .flat_map(|n| many.iter().map(move |flow| (flow, n)))
        .map(|(f, n)| f.packet(&bytes, n * 100, n, ACK))
        .collect();
    assert_eq!(expand(&merge(&packets)), packets);
}

#[test]
fn a_wrong_checksum_arrives_as_it_was() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        for broken in 0..4 {
            let mut packets = flow.packets(&payload(4000), 1000);
            *packets[broken].last_mut().unwrap() ^= 1;
            let merged = merge(&packets);
            assert_eq!(expand(&merged), packets);
            assert!(merged.iter().any(|(_, bytes, _)| *bytes == packets[broken]), "packet {broken}");
        }
    }
    // No checksum at all is allowed with UDP over IPv4.
    let mut packets = Flow::udp4().packets(&payload(2000), 1000);
    packets.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(counts(&merge(&packets)), [1, 1]);
}

#[test]
fn only_what_the_kernel_takes_is_merged() {
    for (tcp, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        for flow in [Flow::tcp4(), Flow::udp4()] {
            let merged = merge_with(&mut Merger::new(tcp, udp), &flow.packets(&payload(3000), 1000));
            let expected = if (flow.tcp && tcp) || (!flow.tcp && udp) { vec![3] } else { vec![1; 3] };
            assert_eq!(counts(&merged), expected);
        }
    }
}

fn flow() -> impl Strategy<Value = Flow> {
    (
        (any::<bool>(), any::<bool>(), 1u8..4, 1u16..4, 0u8..8, 63u8..65, any::<u16>()),
        (proptest::bool::weighted(0.1), proptest::bool::weighted(0.1), proptest::bool::weighted(0.1)),
        (proptest::option::of(0u32..2), any::<u32>(), 0u32..2, 0u16..2),
        prop_oneof![8 => Just(ACK), 2 => Just(ACK | PSH), 1 => any::<u8>()],
    )
        .prop_map(
            |((v6, tcp, host, port, tos, ttl, id), (frag, options, extension), (stamp, seq, ack, window), flags)| {
                Flow {
                    v6,
                    tcp,
                    host,
                    port,
                    tos,
                    ttl,
                    id,
                    may_fragment: frag,
                    ip_options: options,
                    extension,
                    timestamps: stamp.filter(|_| tcp),
                    sequence: seq,
                    acknowledgement: ack,
                    window,
                    flags,
                }
            },
        )
}

/// What tells flows apart for a receiver.
fn flow_of(packet: &[u8]) -> Option<Vec<u8>> {
    let shape = shape(packet)?;
    let addresses = if shape.l4 == 40 { 8..40 } else { 12..20 };
    Some([&packet[addresses], &packet[shape.l4..shape.l4 + 4], &[shape.kind]].concat())
}

/// Without the identification where it means nothing.
fn essential(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.first() == Some(&0x45) && packet.len() >= 20 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

proptest! {
    #[test]
    fn cutting_agrees_with_the_naive_way(flow in flow(), len in 1usize..20_000, size in 1usize..2_000, less in 0usize..600) {
        let bytes = payload(len);
        let (offload, packet) = flow.superpacket(&bytes, size);
        prop_assert_eq!(cut_all(&offload, &packet, usize::MAX).unwrap(), flow.packets(&bytes, size));
        if flow.tcp && size > less {
            let size = size - less;
            prop_assert_eq!(cut_all(&offload, &packet, flow.headers() + size).unwrap(), flow.packets(&bytes, size));
        }
    }

    #[test]
    fn a_whole_tcp_packet_is_cut_like_a_superpacket(flow in flow(), len in 1usize..9_000, size in 1usize..2_000) {
        let bytes = payload(len);
        let whole = flow.packets(&bytes, len).remove(0);
        let mut packet = whole.clone();
        match tcp_as_superpacket(&mut packet) {
            Some(offload) => {
                prop_assert_eq!(cut_all(&offload, &packet, usize::MAX).unwrap(), [whole.clone()]);
                prop_assert_eq!(cut_all(&offload, &packet, flow.headers() + size).unwrap(), flow.packets(&bytes, size.min(len)));
            }
            None => {
                prop_assert_eq!(&packet, &whole, "not touched");
                prop_assert!(!flow.tcp || flow.flags & 0x26 != 0);
            }
        }
        // Nobody puts a checksum right that came wrong.
        let mut damaged = whole;
        *damaged.last_mut().unwrap() ^= 1;
        prop_assert_eq!(tcp_as_superpacket(&mut damaged), None);
    }

    #[test]
    fn merging_loses_changes_and_reorders_nothing(
        sends in proptest::collection::vec((flow(), 1usize..4_000, 1usize..1_500), 1..8),
        order in proptest::collection::vec(any::<u16>(), 200),
        damage in proptest::option::of((any::<u16>(), any::<u16>(), 1u8..)),
    ) {
        // Sends of several flows, shuffled into one another.
        let mut queues: Vec<_> = sends
            .iter()
            .map(|(flow, len, size)| flow.packets(&payload(*len), (*size).max(len / 60 + 1)).into_iter())
            .collect();
        let mut packets = Vec::new();
        for pick in order {
            let queues_left = queues.len();
            if let Some(packet) = queues[usize::from(pick) % queues_left].next() {
                packets.push(packet);
            }
        }
        if let Some((which, at, bits)) = damage && !packets.is_empty() {
            let which = usize::from(which) % packets.len();
            let at = usize::from(at) % packets[which].len();
            packets[which][at] ^= bits;
        }
        let out = expand(&merge(&packets));
        let by_flow = |packets: &[Vec<u8>]| {
            let mut flows: BTreeMap<Option<Vec<u8>>, Vec<Vec<u8>>> = BTreeMap::new();
            for packet in packets {
                flows.entry(flow_of(packet)).or_default().push(essential(packet));
            }
            flows
        };
        prop_assert_eq!(out.len(), packets.len());
        prop_assert_eq!(by_flow(&out), by_flow(&packets));
    }

    #[test]
    fn random_bytes_never_panic(
        offload in any::<[u8; HEADER]>(),
        mut packet in proptest::collection::vec(any::<u8>(), 0..300),
        kind in prop_oneof![Just(0u8), Just(1), Just(4), Just(5), any::<u8>()],
        start in 0u16..80,
        version in prop_oneof![Just(0x45u8), Just(0x60), Just(0x46), any::<u8>()],
        longest in 0usize..400,
    ) {
        let mut offload = Offload::decode(&offload);
        (offload.kind, offload.checksum_start, offload.flags) = (kind, start, 1);
        offload.checksum_offset = if kind == UDP { 6 } else { 16 };
        if let Some(first) = packet.first_mut() {
            *first = version;
        }
        let _ = complete(&offload, &mut packet.clone());
        let _ = tcp_as_superpacket(&mut packet.clone());
        let _ = cut_all(&offload, &packet, longest);
        let packets: Vec<Vec<u8>> = packet.chunks(90).map(<[u8]>::to_vec).collect();
        prop_assert_eq!(expand(&merge(&packets)), packets);
    }

    #[test]
    fn sums_agree_with_pairs(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let pairs: u64 = bytes.chunks(2).map(|pair| word([pair[0], pair.get(1).copied().unwrap_or(0)])).sum();
        prop_assert_eq!(fold(sum(&bytes)), fold(pairs));
    }
}

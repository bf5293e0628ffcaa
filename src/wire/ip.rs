//! IP headers: cheap views for the packet path, and the ICMP errors that tell a sender why its packet went nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv4::DestUnreachableHeader;
use etherparse::icmpv6::DestUnreachableCode;
use etherparse::{Icmpv4Type, Icmpv6Type, IpNumber, IpSlice, Ipv6FragmentHeaderSlice, PacketBuilder};

/// Bytes that are not one whole IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadIp {
    /// Neither version 4 nor 6.
    #[error("neither IPv4 nor IPv6")]
    Version,
    /// Shorter than its header.
    #[error("the IP header is truncated")]
    Header,
    /// The length field and the number of bytes differ.
    #[error("the IP packet's length is not what its header says")]
    Length,
}

/// Where a packet is going.
///
/// # Errors
/// The bytes are not one whole IP packet.
pub fn destination(packet: &[u8]) -> Result<IpAddr, BadIp> {
    source_destination(packet).map(|(_, destination)| destination)
}

/// Where a packet says it is from, and where it is going.
///
/// # Errors
/// The bytes are not one whole IP packet.
pub fn source_destination(packet: &[u8]) -> Result<(IpAddr, IpAddr), BadIp> {
    match packet.first().map(|b| b >> 4) {
        Some(4) => {
            let header = packet.first_chunk::<20>().ok_or(BadIp::Header)?;
            let header_len = usize::from(header[0] & 0x0F) * 4;
            if header_len < 20 || packet.len() < header_len {
                return Err(BadIp::Header);
            }
            if usize::from(u16::from_be_bytes([header[2], header[3]])) != packet.len() {
                return Err(BadIp::Length);
            }
            let at = |i: usize| Ipv4Addr::new(header[i], header[i + 1], header[i + 2], header[i + 3]).into();
            Ok((at(12), at(16)))
        }
        Some(6) => {
            let header = packet.first_chunk::<40>().ok_or(BadIp::Header)?;
            if usize::from(u16::from_be_bytes([header[4], header[5]])) + header.len() != packet.len() {
                return Err(BadIp::Length);
            }
            let at = |i: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&header[i..i + 16]);
                Ipv6Addr::from(octets).into()
            };
            Ok((at(8), at(24)))
        }
        Some(_) => Err(BadIp::Version),
        None => Err(BadIp::Header),
    }
}

/// The protocol above IP, and where its header begins. None for a fragment, and where that cannot be told: with extension
/// headers other than options and routing (RFC 8200 section 4). The packet may be cut off; what is told lies within it.
#[must_use]
pub fn transport(packet: &[u8]) -> Option<(u8, usize)> {
    /// Extension headers passed over, and how many of them.
    const PASSED: [u8; 3] = [0, 43, 60];
    const MOST: usize = 8;
    match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            let l4 = usize::from(header[0] & 0x0F) * 4;
            let whole = [header[6] & 0x3F, header[7]] == [0, 0];
            (whole && l4 >= 20 && l4 <= packet.len()).then_some((header[9], l4))
        }
        6 => {
            let (mut next, mut at) = (*packet.get(6)?, 40);
            for _ in 0..MOST {
                if !PASSED.contains(&next) {
                    return (at <= packet.len()).then_some((next, at));
                }
                let [following, len] = *packet.get(at..at + 2)?.first_chunk()?;
                (next, at) = (following, at + 8 + usize::from(len) * 8);
            }
            None
        }
        _ => None,
    }
}

/// The ECN field of a packet (RFC 3168 section 5), which a tunnel copies to its outer header (RFC 6040 section 4.1). Zero
/// for what is no IP packet.
#[must_use]
pub fn ecn(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] if first >> 4 == 4 => second & 3,
        [first, second, ..] if first >> 4 == 6 => second >> 4 & 3,
        _ => 0,
    }
}

/// The packet was marked as congested on its way through the tunnel, but its ends do not know such marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("congestion cannot be signalled to this flow")]
pub struct NotEcnCapable;

/// Carries the ECN field of the outer header a packet came in over to the packet: RFC 6040 section 4.2.
///
/// # Errors
/// The packet must be dropped, which is how its sender learns of the congestion.
pub fn apply_ecn(packet: &mut [u8], outer: u8) -> Result<(), NotEcnCapable> {
    const NOT_CAPABLE: u8 = 0;
    const ECT_1: u8 = 1;
    const ECT_0: u8 = 2;
    const CE: u8 = 3;
    let new = match (ecn(packet), outer) {
        (NOT_CAPABLE, CE) => return Err(NotEcnCapable),
        (ECT_0 | ECT_1, CE) => CE,
        (ECT_0, ECT_1) => ECT_1,
        _ => return Ok(()),
    };
    match packet {
        [first, second, ..] if *first >> 4 == 6 => *second = *second & !0x30 | new << 4,
        [_, tos, _, _, _, _, _, _, _, _, high, low, ..] => {
            // RFC 1624: the checksum follows what changed. The field is the low byte of the first pair.
            let old = u16::from(*tos);
            *tos = *tos & !3 | new;
            let sum = u32::from(!u16::from_be_bytes([*high, *low])) + u32::from(!old) + u32::from(*tos);
            let sum = (sum & 0xFFFF) + (sum >> 16);
            let sum = (sum & 0xFFFF) + (sum >> 16);
            [*high, *low] = (!u16::try_from(sum).unwrap_or_default()).to_be_bytes();
        }
        _ => {}
    }
    Ok(())
}

/// Why a destination is not reachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// Nobody owns the address: ICMP network unreachable (RFC 792), ICMPv6 no route (RFC 4443, section 3.1).
    NoRoute,
    /// The owner does not answer: ICMP host unreachable, ICMPv6 address unreachable.
    Host,
    /// Not allowed: ICMP communication administratively prohibited (RFC 1812, section 5.2.7.1), ICMPv6 the same.
    Prohibited,
}

/// [`icmp_unreachable`] for an address that nobody owns, as if sent by that address.
#[must_use]
pub fn unreachable(original: &[u8]) -> Option<Vec<u8>> {
    icmp_unreachable(original, destination(original).ok()?, Unreachable::NoRoute)
}

/// The ICMP error that tells the sender of `original` why it was not delivered, as if sent by `from`. None where none may
/// be sent: see [`answerable`]; or if `from` is of the other family.
#[must_use]
pub fn icmp_unreachable(original: &[u8], from: IpAddr, why: Unreachable) -> Option<Vec<u8>> {
    let (to, _) = answerable(original)?;
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let code = match why {
                Unreachable::NoRoute => DestUnreachableHeader::Network,
                Unreachable::Host => DestUnreachableHeader::Host,
                Unreachable::Prohibited => DestUnreachableHeader::FilterProhibited,
            };
            icmpv4(original, from, to, code)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let code = match why {
                Unreachable::NoRoute => DestUnreachableCode::NoRoute,
                Unreachable::Host => DestUnreachableCode::Address,
                Unreachable::Prohibited => DestUnreachableCode::Prohibited,
            };
            icmpv6(original, from, to, Icmpv6Type::DestinationUnreachable(code))
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

/// The ICMP error that tells the sender of `original` to send at most `mtu` bytes (RFC 1191, RFC 8201), as if sent by the
/// destination itself. None where none may be sent, see [`answerable`].
#[must_use]
pub fn packet_too_big(original: &[u8], mtu: u16) -> Option<Vec<u8>> {
    match answerable(original)? {
        (IpAddr::V4(to), IpAddr::V4(from)) => {
            icmpv4(original, from, to, DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu })
        }
        (IpAddr::V6(to), IpAddr::V6(from)) => {
            icmpv6(original, from, to, Icmpv6Type::PacketTooBig { mtu: u32::from(mtu) })
        }
        (IpAddr::V4(_) | IpAddr::V6(_), _) => None,
    }
}

/// The source and destination of a packet that may be answered with an ICMP error. RFC 1122 section 3.2.2 and RFC 4443
/// section 2.4(e) forbid it for: ICMP errors, fragments other than the first, multicast and broadcast destinations, and
/// sources that are not one host.
#[must_use]
pub fn answerable(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let (source, destination) = source_destination(packet).ok()?;
    let ip = IpSlice::from_slice(packet).ok()?;
    let one_host = match source {
        IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_broadcast() && !ip.is_multicast() && ip.octets()[0] < 240,
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
    };
    let to_many = match destination {
        IpAddr::V4(ip) => ip.is_broadcast() || ip.is_multicast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    };
    if !one_host || to_many || fragment_offset(&ip)? != 0 {
        return None;
    }
    let payload = ip.payload();
    let kind = payload.payload.first().copied();
    let is_error = match payload.ip_number {
        // RFC 792: 3 unreachable, 4 source quench, 5 redirect, 11 time exceeded, 12 parameter problem.
        IpNumber::ICMP => kind.is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12)),
        // RFC 4443, section 2.1: below 128 all are errors; 137 is redirect.
        IpNumber::IPV6_ICMP => kind.is_none_or(|kind| kind < 128 || kind == 137),
        _ => false,
    };
    (!is_error).then_some((source, destination))
}

/// In units of eight bytes. None: the extension headers make no sense.
fn fragment_offset(ip: &IpSlice<'_>) -> Option<u16> {
    match ip {
        IpSlice::Ipv4(ip) => Some(ip.header().fragments_offset().value()),
        IpSlice::Ipv6(ip) => {
            for extension in ip.extensions().clone() {
                if let etherparse::Ipv6ExtensionSlice::Fragment(fragment) = extension {
                    let fragment: Ipv6FragmentHeaderSlice<'_> = fragment;
                    return Some(fragment.fragment_offset().value());
                }
            }
            Some(0)
        }
    }
}

/// Quotes as much of the original as makes a packet of 576 bytes (RFC 1812, section 4.3.2.3).
fn icmpv4(original: &[u8], from: Ipv4Addr, to: Ipv4Addr, code: DestUnreachableHeader) -> Option<Vec<u8>> {
    let quoted = original.get(..original.len().min(576 - 20 - 8))?;
    let packet = PacketBuilder::ipv4(from.octets(), to.octets(), 64).icmpv4(Icmpv4Type::DestinationUnreachable(code));
    let mut out = Vec::with_capacity(packet.size(quoted.len()));
    packet.write(&mut out, quoted).ok()?;
    Some(out)
}

/// Quotes as much of the original as makes a packet of 1280 bytes (RFC 4443, section 2.4(c)).
fn icmpv6(original: &[u8], from: Ipv6Addr, to: Ipv6Addr, kind: Icmpv6Type) -> Option<Vec<u8>> {
    let quoted = original.get(..original.len().min(1280 - 40 - 8))?;
    let packet = PacketBuilder::ipv6(from.octets(), to.octets(), 64).icmpv6(kind);
    let mut out = Vec::with_capacity(packet.size(quoted.len()));
    packet.write(&mut out, quoted).ok()?;
    Some(out)
}

#[cfg(test)]
mod tests {
    use etherparse::{IpFragOffset, Ipv6FragmentHeader, NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    const A4: [u8; 4] = [100, 64, 0, 1];
    const B4: [u8; 4] = [100, 64, 0, 2];

    fn a6() -> [u8; 16] {
        "fd00::1".parse::<Ipv6Addr>().unwrap().octets()
    }

    fn b6() -> [u8; 16] {
        "fd00::2".parse::<Ipv6Addr>().unwrap().octets()
    }

    fn udp4(to: [u8; 4], len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        PacketBuilder::ipv4(A4, to, 9).udp(1, 2).write(&mut out, &vec![7; len]).unwrap();
        out
    }

    fn udp6(to: [u8; 16], len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        PacketBuilder::ipv6(a6(), to, 9).udp(1, 2).write(&mut out, &vec![7; len]).unwrap();
        out
    }

    #[test]
    fn addresses_are_read_from_whole_packets_only() {
        for packet in [udp4(B4, 30), udp6(b6(), 30)] {
            let (from, to) = source_destination(&packet).unwrap();
            assert_eq!(destination(&packet), Ok(to));
            assert_ne!(from, to);
            for end in 0..packet.len() {
                assert!(source_destination(&packet[..end]).is_err(), "cut to {end}");
            }
            let longer = [&packet[..], &[0]].concat();
            assert_eq!(source_destination(&longer), Err(BadIp::Length));
        }
        assert_eq!(destination(&udp4(B4, 0)), Ok(IpAddr::from(B4)));
        assert_eq!(destination(&udp6(b6(), 0)), Ok(IpAddr::from(b6())));
        assert_eq!(destination(&[0x50; 60]), Err(BadIp::Version));
        assert_eq!(destination(&[]), Err(BadIp::Header));
        let mut short_header = udp4(B4, 30);
        short_header[0] = 0x44;
        assert_eq!(destination(&short_header), Err(BadIp::Header));
        let mut long_header = udp4(B4, 0);
        long_header[0] = 0x4F;
        assert_eq!(destination(&long_header), Err(BadIp::Header));
    }

    /// Checks everything about an ICMP error but its type, and returns that.
    fn inspect(error: &[u8], from: IpAddr, to: IpAddr, original: &[u8]) -> (u8, u8) {
        assert_eq!(source_destination(error), Ok((from, to)));
        let sliced = SlicedPacket::from_ip(error).unwrap();
        match (sliced.net.unwrap(), sliced.transport.unwrap()) {
            (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
                assert!(original.starts_with(icmp.payload()) && error.len() <= 576);
                assert_eq!(internet_checksum(icmp.slice()), 0);
                (icmp.type_u8(), icmp.code_u8())
            }
            (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                assert!(original.starts_with(icmp.payload()) && error.len() <= 1280);
                assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
                (icmp.type_u8(), icmp.code_u8())
            }
            other => panic!("{other:?}"),
        }
    }

    fn internet_checksum(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xFFFF {
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn errors_quote_the_packet_and_go_to_its_source() {
        for len in [0, 40, 1200, 8000] {
            let four = udp4(B4, len);
            let (a, b) = (IpAddr::from(A4), IpAddr::from(B4));
            for (why, code) in [(Unreachable::NoRoute, 0), (Unreachable::Host, 1), (Unreachable::Prohibited, 13)] {
                let from = "100.64.9.9".parse().unwrap();
                assert_eq!(inspect(&icmp_unreachable(&four, from, why).unwrap(), from, a, &four), (3, code));
            }
            assert_eq!(inspect(&unreachable(&four).unwrap(), b, a, &four), (3, 0));
            let too_big = packet_too_big(&four, 1280).unwrap();
            assert_eq!(inspect(&too_big, b, a, &four), (3, 4));
            assert_eq!(too_big[26..28], 1280u16.to_be_bytes());

            let six = udp6(b6(), len);
            let (a, b) = (IpAddr::from(a6()), IpAddr::from(b6()));
            for (why, code) in [(Unreachable::NoRoute, 0), (Unreachable::Host, 3), (Unreachable::Prohibited, 1)] {
                assert_eq!(inspect(&icmp_unreachable(&six, b, why).unwrap(), b, a, &six), (1, code));
            }
            let too_big = packet_too_big(&six, 1280).unwrap();
            assert_eq!(inspect(&too_big, b, a, &six), (2, 0));
            assert_eq!(too_big[44..48], 1280u32.to_be_bytes());
            assert_eq!(icmp_unreachable(&six, IpAddr::from(B4), Unreachable::NoRoute), None, "other family");
        }
    }

    #[test]
    fn icmp_errors_are_never_answered_and_echo_is() {
        for error in [unreachable(&udp4(B4, 8)).unwrap(), unreachable(&udp6(b6(), 8)).unwrap()] {
            assert_eq!(unreachable(&error), None);
            assert_eq!(packet_too_big(&error, 1280), None);
        }
        let mut echo4 = Vec::new();
        PacketBuilder::ipv4(A4, B4, 9).icmpv4_echo_request(1, 1).write(&mut echo4, &[1; 8]).unwrap();
        assert!(unreachable(&echo4).is_some());
        let mut echo6 = Vec::new();
        PacketBuilder::ipv6(a6(), b6(), 9).icmpv6_echo_request(1, 1).write(&mut echo6, &[1; 8]).unwrap();
        assert!(unreachable(&echo6).is_some());
        for kind in [4, 5, 11, 12] {
            echo4[20] = kind;
            assert_eq!(unreachable(&echo4), None, "ICMP type {kind}");
        }
        for kind in [1, 2, 3, 4, 100, 127, 137] {
            echo6[40] = kind;
            assert_eq!(unreachable(&echo6), None, "ICMPv6 type {kind}");
        }
        let mut no_type = udp4(B4, 0);
        no_type.truncate(20);
        no_type[3] = 20;
        no_type[9] = 1;
        assert_eq!(unreachable(&no_type), None, "an ICMP packet that does not say what it is");
    }

    #[test]
    fn nothing_is_said_to_or_about_many() {
        for to in [[224, 0, 0, 251], [255, 255, 255, 255]] {
            assert_eq!(unreachable(&udp4(to, 8)), None);
        }
        assert_eq!(unreachable(&udp6("ff02::fb".parse::<Ipv6Addr>().unwrap().octets(), 8)), None);
        for from in [[0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255], [250, 0, 0, 1]] {
            let mut packet = udp4(B4, 8);
            packet[12..16].copy_from_slice(&from);
            assert_eq!(unreachable(&packet), None, "source {from:?}");
        }
        for from in [Ipv6Addr::UNSPECIFIED, "ff02::1".parse().unwrap()] {
            let mut packet = udp6(b6(), 8);
            packet[8..24].copy_from_slice(&from.octets());
            assert_eq!(unreachable(&packet), None, "source {from}");
        }
    }

    #[test]
    fn only_the_first_fragment_is_answered() {
        for (offset, answered) in [(0, true), (1, false), (100, false)] {
            let mut four = udp4(B4, 64);
            four[6..8].copy_from_slice(&(0x2000u16 | offset).to_be_bytes());
            assert_eq!(unreachable(&four).is_some(), answered, "IPv4, offset {offset}");

            let fragment =
                Ipv6FragmentHeader::new(IpNumber::UDP, IpFragOffset::try_new(offset).unwrap(), true, 5).to_bytes();
            let mut six = udp6(b6(), 64);
            six[6] = IpNumber::IPV6_FRAGMENTATION_HEADER.0;
            six.splice(40..40, fragment);
            let len = u16::try_from(six.len() - 40).unwrap();
            six[4..6].copy_from_slice(&len.to_be_bytes());
            assert_eq!(unreachable(&six).is_some(), answered, "IPv6, offset {offset}");
        }
    }

    #[test]
    fn the_transport_header_is_found_behind_options_and_not_in_fragments() {
        assert_eq!(transport(&udp4(B4, 8)), Some((17, 20)));
        assert_eq!(transport(&udp6(b6(), 8)), Some((17, 40)));
        for (flags, low) in [(0x20, 0), (0, 1), (0x1F, 0xFF)] {
            let mut fragment = udp4(B4, 8);
            (fragment[6], fragment[7]) = (flags, low);
            assert_eq!(transport(&fragment), None);
        }
        let with = |kind: u8, header: &[u8]| {
            let mut packet = udp6(b6(), 8);
            packet[6] = kind;
            packet.splice(40..40, header.iter().copied());
            packet
        };
        for kind in [0, 43, 60] {
            assert_eq!(transport(&with(kind, &[17, 0, 1, 4, 0, 0, 0, 0])), Some((17, 48)));
        }
        assert_eq!(transport(&with(0, &[17, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])), Some((17, 56)));
        assert_eq!(transport(&with(44, &[17, 0, 0, 1, 0, 0, 0, 1])), Some((44, 40)), "a fragment is no UDP");
        assert_eq!(transport(&with(0, &[17, 200, 1, 4, 0, 0, 0, 0])), None, "longer than the packet");
        assert_eq!(transport(&with(0, &[0; 8 * 9])), None, "no end");
    }

    #[test]
    fn congestion_marks_come_through_a_tunnel() {
        for (inner, outer, expected) in [
            (0, 0, Some(0)),
            (0, 1, Some(0)),
            (0, 2, Some(0)),
            (0, 3, None),
            (1, 0, Some(1)),
            (1, 1, Some(1)),
            (1, 2, Some(1)),
            (1, 3, Some(3)),
            (2, 0, Some(2)),
            (2, 1, Some(1)),
            (2, 2, Some(2)),
            (2, 3, Some(3)),
            (3, 0, Some(3)),
            (3, 1, Some(3)),
            (3, 2, Some(3)),
            (3, 3, Some(3)),
        ] {
            for dscp in [0u8, 0x2E, 0x3F] {
                for mut packet in [udp4(B4, 30), udp6(b6(), 30)] {
                    let four = packet[0] >> 4 == 4;
                    if four {
                        packet[1] = dscp << 2 | inner;
                        let sum = {
                            packet[10..12].fill(0);
                            internet_checksum(&packet[..20])
                        };
                        packet[10..12].copy_from_slice(&sum.to_be_bytes());
                    } else {
                        packet[0] = 0x60 | dscp >> 2;
                        packet[1] = dscp << 6 | inner << 4 | 5;
                    }
                    assert_eq!(ecn(&packet), inner);
                    let before = packet.clone();
                    let result = apply_ecn(&mut packet, outer);
                    assert_eq!(result.ok().map(|()| ecn(&packet)), expected, "inner {inner}, outer {outer}");
                    assert_eq!(result.is_ok_and(|()| ecn(&packet) != inner), packet != before);
                    if four {
                        assert_eq!(packet[1] >> 2, dscp);
                        assert_eq!(internet_checksum(&packet[..20]), 0);
                    } else {
                        assert_eq!((packet[0], packet[1] & 0xCF), (before[0], before[1] & 0xCF));
                    }
                }
            }
        }
        assert_eq!(ecn(&[]), 0);
        assert_eq!(apply_ecn(&mut [0x45], 3), Err(NotEcnCapable));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 0u8..3) {
            if let Some(first) = bytes.first_mut().filter(|_| version > 0) {
                *first = if version == 1 { 0x45 } else { 0x60 };
            }
            if version == 1 && bytes.len() >= 20 {
                let len = u16::try_from(bytes.len()).unwrap();
                bytes[2..4].copy_from_slice(&len.to_be_bytes());
            }
            if version == 2 && bytes.len() >= 40 {
                let len = u16::try_from(bytes.len() - 40).unwrap();
                bytes[4..6].copy_from_slice(&len.to_be_bytes());
            }
            let _ = source_destination(&bytes);
            prop_assert!(transport(&bytes).is_none_or(|(_, at)| at <= bytes.len()));
            for error in [unreachable(&bytes), packet_too_big(&bytes, 1280)].into_iter().flatten() {
                prop_assert!(source_destination(&error).is_ok());
                prop_assert_eq!(unreachable(&error), None);
            }
        }
    }
}

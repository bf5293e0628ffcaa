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

//! What travels inside the tunnel: pings, and the kernel that answers them.

use std::net::IpAddr;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// An experimental protocol (RFC 3692): nobody answers it.
const OTHER: u8 = 253;

/// What an inner packet is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Inner {
    EchoRequest { id: u16, seq: u16 },
    EchoReply { id: u16, seq: u16 },
    Other,
}

/// An echo request or reply of `len` payload bytes.
pub(crate) fn echo(from: IpAddr, to: IpAddr, reply: bool, id: u16, seq: u16, len: usize) -> Vec<u8> {
    let kind = match (from.is_ipv4(), reply) {
        (true, false) => 8,
        (true, true) => 0,
        (false, false) => 128,
        (false, true) => 129,
    };
    let mut body = vec![kind, 0, 0, 0];
    body.extend(id.to_be_bytes());
    body.extend(seq.to_be_bytes());
    body.resize(8 + len, b'm');
    packet(from, to, if from.is_ipv4() { ICMP } else { ICMPV6 }, &body)
}

/// A packet that nobody answers.
pub(crate) fn other(from: IpAddr, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    packet(from, to, OTHER, payload)
}

/// The kernel's answer to an echo request.
pub(crate) fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let (from, to, body) = parse(packet)?;
    match read(packet) {
        Inner::EchoRequest { id, seq } => Some(echo(to, from, true, id, seq, body.len().saturating_sub(8))),
        Inner::EchoReply { .. } | Inner::Other => None,
    }
}

/// What a packet is.
pub(crate) fn read(packet: &[u8]) -> Inner {
    let Some((from, _, body)) = parse(packet) else { return Inner::Other };
    let protocol = packet[if from.is_ipv4() { 9 } else { 6 }];
    match (protocol, body) {
        (ICMP | ICMPV6, [kind, _, _, _, i0, i1, s0, s1, ..]) => {
            let (id, seq) = (u16::from_be_bytes([*i0, *i1]), u16::from_be_bytes([*s0, *s1]));
            match kind {
                8 | 128 => Inner::EchoRequest { id, seq },
                0 | 129 => Inner::EchoReply { id, seq },
                _ => Inner::Other,
            }
        }
        _ => Inner::Other,
    }
}

/// The payload of any packet made here.
pub(crate) fn payload(packet: &[u8]) -> &[u8] {
    parse(packet).map_or(&[], |(_, _, body)| body)
}

fn parse(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let four = |at: usize| packet.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(IpAddr::from);
    let sixteen = |at: usize| packet.get(at..at + 16).and_then(|b| <[u8; 16]>::try_from(b).ok()).map(IpAddr::from);
    match packet.first()? >> 4 {
        4 => Some((four(12)?, four(16)?, packet.get(20..)?)),
        6 => Some((sixteen(8)?, sixteen(24)?, packet.get(40..)?)),
        _ => None,
    }
}

fn packet(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let len = u16::try_from(20 + body.len()).unwrap();
            out.extend([0x45, 0, len.to_be_bytes()[0], len.to_be_bytes()[1], 0, 0, 0x40, 0, 64, protocol, 0, 0]);
            out.extend(from.octets());
            out.extend(to.octets());
            let sum = checksum(&out);
            out[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let len = u16::try_from(body.len()).unwrap();
            out.extend([0x60, 0, 0, 0, len.to_be_bytes()[0], len.to_be_bytes()[1], protocol, 64]);
            out.extend(from.octets());
            out.extend(to.octets());
        }
        _ => panic!("{from} and {to} are of two families"),
    }
    out.extend(body);
    out
}

/// RFC 1071.
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ping_is_answered_to_its_sender_in_both_families() {
        for (a, b) in [("100.71.0.1", "100.71.0.2"), ("fd00::1", "fd00::2")] {
            let (a, b): (IpAddr, IpAddr) = (a.parse().unwrap(), b.parse().unwrap());
            let request = echo(a, b, false, 7, 9, 56);
            assert_eq!(read(&request), Inner::EchoRequest { id: 7, seq: 9 });
            let reply = answer(&request).unwrap();
            assert_eq!(reply, echo(b, a, true, 7, 9, 56));
            assert_eq!(answer(&reply), None);
            assert_eq!(payload(&other(a, b, b"x")), b"x");
        }
    }

    #[test]
    fn headers_are_well_formed() {
        let v4 = echo("100.71.0.1".parse().unwrap(), "100.71.0.2".parse().unwrap(), false, 1, 1, 4);
        assert_eq!(checksum(&v4[..20]), 0);
        assert_eq!(meshd::wire::ip::source_destination(&v4).unwrap().1, "100.71.0.2".parse::<IpAddr>().unwrap());
    }
}

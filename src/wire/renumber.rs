//! Other numbers for an address in a packet, with every checksum that covers it put right by what changed (RFC 1624).
//!
//! What an ICMP error quotes is a packet too, and is renumbered in its place. A fragment other than the first has an IP
//! header only. A checksum that the kernel left for later ([`super::offload`]) holds the sum over the pseudo header, which
//! changes as the addresses do. Checksums that are absent stay absent, and wrong ones stay wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Extension headers of IPv6 (RFC 8200 section 4): hop by hop, destination options, fragment.
const PASSED: [u8; 2] = [0, 60];
const FRAGMENT: u8 = 44;
const MOST_EXTENSIONS: usize = 8;

/// One of the two addresses of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where it is from.
    Source,
    /// Where it goes.
    Destination,
}

/// What matters of a packet, or of the beginning of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Where it says it is from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// The protocol above IP.
    pub protocol: u8,
    /// Where its header begins; None: it is in another fragment, or cannot be found.
    pub l4: Option<usize>,
    /// It is a fragment, and others follow or went before.
    pub fragment: bool,
    /// The ports, or the identifier of a question and its answer; zero where there are none.
    pub ports: (u16, u16),
    /// Where the packet begins that an ICMP error quotes.
    pub quoted: Option<usize>,
}

/// Looks at a packet that may be cut off. None: there is no whole IP header.
#[must_use]
pub fn look(packet: &[u8]) -> Option<Look> {
    let (source, destination, protocol, l4, fragment) = match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            let at = |i: usize| Ipv4Addr::new(header[i], header[i + 1], header[i + 2], header[i + 3]).into();
            let len = usize::from(header[0] & 0x0F) * 4;
            let (first, fragment) = ([header[6] & 0x1F, header[7]] == [0, 0], [header[6] & 0x3F, header[7]] != [0, 0]);
            let l4 = (first && len >= 20 && len <= packet.len()).then_some(len);
            (at(12), at(16), header[9], l4, fragment)
        }
        6 => {
            let header = packet.first_chunk::<40>()?;
            let at = |i: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&header[i..i + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            let (protocol, l4, fragment) = above_ipv6(packet);
            (at(8), at(24), protocol, l4, fragment)
        }
        _ => return None,
    };
    let mut look = Look { source, destination, protocol, l4, fragment, ports: (0, 0), quoted: None };
    if let Some(l4) = l4
        && let Some([a, b, c, d, ..]) = packet.get(l4..)
    {
        let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        match (protocol, *a) {
            (TCP | UDP, _) => look.ports = (word(*a, *b), word(*c, *d)),
            // RFC 792: 8 echo, 0 its reply. RFC 4443 section 4: 128, 129.
            (ICMP, 0 | 8) | (ICMPV6, 128 | 129) => {
                let id = packet.get(l4 + 4..l4 + 6).map_or(0, |id| word(id[0], id[1]));
                look.ports = (id, id);
            }
            // Errors. RFC 4443 section 2.1: below 128 all are.
            (ICMP, 3 | 4 | 5 | 11 | 12) | (ICMPV6, 1..=127) => {
                look.quoted = Some(l4 + 8).filter(|at| packet.len() > *at);
            }
            _ => {}
        }
    }
    Some(look)
}

/// The protocol above an IPv6 header, where it begins, and whether this is a fragment.
fn above_ipv6(packet: &[u8]) -> (u8, Option<usize>, bool) {
    let (mut next, mut at, mut fragment) = (packet[6], 40, false);
    for _ in 0..MOST_EXTENSIONS {
        let Some([following, len, high, low]) = packet.get(at..at + 4).and_then(|b| b.first_chunk()) else { break };
        if PASSED.contains(&next) {
            (next, at) = (*following, at + 8 + usize::from(*len) * 8);
        } else if next == FRAGMENT {
            fragment = true;
            if u16::from_be_bytes([*high, *low]) >> 3 != 0 {
                return (*following, None, true);
            }
            (next, at) = (*following, at + 8);
        } else {
            break;
        }
    }
    (next, (at <= packet.len()).then_some(at), fragment)
}

/// Gives one end of a packet another address of the same family. `partial`: the checksum above IP is not complete, and holds
/// the sum over the pseudo header.
pub fn renumber(packet: &mut [u8], end: End, new: IpAddr, partial: bool) {
    let Some(seen) = look(packet) else { return };
    let Some(change) = put(packet, end, new) else { return };
    adjust_upper(packet, &seen, change, partial);
}

/// Gives one end of the packet that an ICMP error quotes another address of the same family. `partial` as with [`renumber`].
pub fn renumber_quoted(packet: &mut [u8], end: End, new: IpAddr, partial: bool) {
    let Some(seen) = look(packet) else { return };
    let (Some(quoted), Some(l4)) = (seen.quoted, seen.l4) else { return };
    let Some(inner) = packet.get_mut(quoted..) else { return };
    let Some(inner_seen) = look(inner) else { return };
    let Some(address) = put(inner, end, new) else { return };
    // All of it lies at even places of the error's payload. IPv4's own sum over its header has come out as before.
    let of_header = if new.is_ipv4() { Change::default() } else { address };
    let of_upper = adjust_upper(inner, &inner_seen, address, false);
    if !partial {
        adjust(packet, l4 + 2, of_header.and(of_upper), false, false);
    }
}

/// A difference of sums in ones' complement arithmetic.
#[derive(Debug, Clone, Copy, Default)]
struct Change(u64);

impl Change {
    fn of(before: &[u8], after: &[u8]) -> Self {
        let pairs = before.chunks_exact(2).zip(after.chunks_exact(2));
        Self(pairs.map(|(a, b)| u64::from(!word(a)) + u64::from(word(b))).sum())
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

/// Writes an address, and puts the checksum of an IPv4 header right. None: it is of the other family.
fn put(packet: &mut [u8], end: End, new: IpAddr) -> Option<Change> {
    let (octets, is_v4): (&[u8], bool) = match &new {
        IpAddr::V4(v4) => (&v4.octets(), true),
        IpAddr::V6(v6) => (&v6.octets(), false),
    };
    if is_v4 != (packet.first()? >> 4 == 4) {
        return None;
    }
    let at = match (is_v4, end) {
        (true, End::Source) => 12,
        (true, End::Destination) => 16,
        (false, End::Source) => 8,
        (false, End::Destination) => 24,
    };
    let field = packet.get_mut(at..at + octets.len())?;
    let change = Change::of(field, octets);
    field.copy_from_slice(octets);
    if is_v4 {
        adjust(packet, 10, change, false, false);
    }
    Some(change)
}

/// Puts the checksum right that covers a pseudo header, and returns by how much its own field changed.
fn adjust_upper(packet: &mut [u8], seen: &Look, change: Change, partial: bool) -> Change {
    let Some(l4) = seen.l4 else { return Change::default() };
    match seen.protocol {
        TCP => adjust(packet, l4 + 16, change, partial, false),
        UDP => adjust(packet, l4 + 6, change, partial, true),
        ICMPV6 => adjust(packet, l4 + 2, change, partial, false),
        _ => Change::default(),
    }
}

/// Carries a change over to the checksum at `at`, if it is there. `or_absent`: zero means that there is none, and must not
/// come out.
fn adjust(packet: &mut [u8], at: usize, change: Change, partial: bool, or_absent: bool) -> Change {
    let Some(field) = packet.get_mut(at..at + 2) else { return Change::default() };
    let before = word(field);
    if or_absent && !partial && before == 0 {
        return Change::default();
    }
    let sum = if partial { before } else { !before };
    let sum = fold(u64::from(sum) + change.0);
    let after = match if partial { sum } else { !sum } {
        0 if or_absent && !partial => 0xFFFF,
        after => after,
    };
    let done = Change::of(field, &after.to_be_bytes());
    field.copy_from_slice(&after.to_be_bytes());
    done
}

fn word(pair: &[u8]) -> u16 {
    u16::from_be_bytes([pair[0], pair[1]])
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests;

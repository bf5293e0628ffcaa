//! What a datagram on the node's UDP socket (or inside a relay frame) is, decided once, by its first bytes.
//!
//! | first byte | further bytes | length | kind |
//! |---|---|---|---|
//! | `00xxxxxx` | magic cookie at 4..8 | ≥ 20 | STUN (RFC 8489, section 5) |
//! | 1, 2, 3 | three zero bytes | 148, 92, 64 | WireGuard handshake and cookie messages |
//! | 4 | three zero bytes | ≥ 32 | WireGuard data |
//! | `0xC0` | | ≥ 1 | relay datagram |
//! | `0xC1` | | ≥ 1 | sealed peer message |
//!
//! STUN is looked for first. A WireGuard message carries an index at 4..8, and this node never uses one that equals
//! the cookie ([`crate::wire::wireguard::is_reserved`]). `0xC0` and above are clear of every range RFC 7983 lists.

use crate::wire::stun::MAGIC_COOKIE;
use crate::wire::wireguard;

/// First byte of a relay datagram.
pub const RELAY_DATAGRAM: u8 = 0xC0;
/// First byte of a sealed peer message.
pub const SEALED: u8 = 0xC1;

/// The kinds of datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// WireGuard: first handshake message.
    HandshakeInit,
    /// WireGuard: second handshake message.
    HandshakeResponse,
    /// WireGuard: cookie reply.
    CookieReply,
    /// WireGuard: data, or a keepalive.
    Data,
    /// STUN: a server's answer, or a path probe.
    Stun,
    /// A sealed message from a peer's planner.
    Sealed,
    /// A relay frame in a datagram.
    RelayDatagram,
    /// Nothing meshd speaks.
    Junk,
}

/// Sorts a datagram. Looks at no more than its first eight bytes and its length.
#[must_use]
pub fn classify(bytes: &[u8]) -> Kind {
    let Some(&first) = bytes.first() else { return Kind::Junk };
    match first {
        RELAY_DATAGRAM => return Kind::RelayDatagram,
        SEALED => return Kind::Sealed,
        _ => {}
    }
    if first & 0xC0 == 0 && bytes.len() >= 20 && bytes.get(4..8) == Some(&MAGIC_COOKIE) {
        return Kind::Stun;
    }
    if bytes.get(1..4) != Some(&[0; 3]) {
        return Kind::Junk;
    }
    match (first, bytes.len()) {
        (1, wireguard::INIT_LEN) => Kind::HandshakeInit,
        (2, wireguard::RESPONSE_LEN) => Kind::HandshakeResponse,
        (3, wireguard::COOKIE_LEN) => Kind::CookieReply,
        (4, wireguard::DATA_MIN_LEN..) => Kind::Data,
        _ => Kind::Junk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths around every boundary.
    const LENGTHS: [usize; 19] = [0, 1, 3, 4, 7, 8, 19, 20, 21, 31, 32, 33, 63, 64, 65, 91, 92, 148, 1500];

    fn datagram(first: u8, len: usize, reserved: [u8; 3], cookie: bool) -> Vec<u8> {
        let mut bytes = vec![0x55; len];
        let mut head = vec![first];
        head.extend_from_slice(&reserved);
        head.extend_from_slice(if cookie { &MAGIC_COOKIE } else { &[1, 2, 3, 4] });
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = from;
        }
        bytes
    }

    #[test]
    fn every_first_byte_and_length_is_what_the_table_says() {
        for first in 0..=255u8 {
            for len in LENGTHS {
                for cookie in [false, true] {
                    let kind = classify(&datagram(first, len, [0; 3], cookie));
                    let expected = match first {
                        _ if len == 0 => Kind::Junk,
                        0xC0 => Kind::RelayDatagram,
                        0xC1 => Kind::Sealed,
                        0..=63 if cookie && len >= 20 => Kind::Stun,
                        1 if len == 148 => Kind::HandshakeInit,
                        2 if len == 92 => Kind::HandshakeResponse,
                        3 if len == 64 => Kind::CookieReply,
                        4 if len >= 32 => Kind::Data,
                        _ => Kind::Junk,
                    };
                    assert_eq!(kind, expected, "first byte {first}, {len} bytes, cookie {cookie}");
                }
            }
        }
    }

    #[test]
    fn a_wireguard_type_with_a_non_zero_reserved_byte_is_junk() {
        for first in 1..=4 {
            for position in 0..3 {
                let mut reserved = [0; 3];
                reserved[position] = 1;
                for len in LENGTHS {
                    assert_eq!(classify(&datagram(first, len, reserved, false)), Kind::Junk);
                }
            }
        }
    }
}

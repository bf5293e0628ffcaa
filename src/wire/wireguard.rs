//! The headers of the four WireGuard messages, for sorting only: boringtun does the protocol.
//!
//! Sections are those of the WireGuard paper (Donenfeld, revision e2da747). All integers are little-endian.
//!
//! ```text
//! 5.4.2 initiation  type=1 | 0 0 0 | sender (4)   | ephemeral (32) | static (48) | timestamp (28) | mac1 (16) | mac2 (16)
//! 5.4.3 response    type=2 | 0 0 0 | sender (4)   | receiver (4)   | ephemeral (32) | nothing (16) | mac1 | mac2
//! 5.4.7 cookie      type=3 | 0 0 0 | receiver (4) | nonce (24)     | cookie (32)
//! 5.4.6 data        type=4 | 0 0 0 | receiver (4) | counter (8)    | packet and tag (≥ 16)
//! ```

use crate::wire::classify::{Kind, classify};
use crate::wire::stun::MAGIC_COOKIE;

/// Bytes of a handshake initiation (5.4.2).
pub const INIT_LEN: usize = 148;
/// Bytes of a handshake response (5.4.3).
pub const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply (5.4.7).
pub const COOKIE_LEN: usize = 64;
/// Bytes of the shortest data message, a keepalive (5.4.6).
pub const DATA_MIN_LEN: usize = 32;

/// The session index that a message is addressed to, as the receiver chose it: for data, responses and cookie replies.
/// None for initiations (they are addressed by key) and for anything else.
#[must_use]
pub fn receiver_index(datagram: &[u8]) -> Option<u32> {
    let at = match classify(datagram) {
        Kind::Data | Kind::CookieReply => 4,
        Kind::HandshakeResponse => 8,
        Kind::HandshakeInit | Kind::Stun | Kind::Sealed | Kind::RelayDatagram | Kind::Junk => return None,
    };
    read_index(datagram, at)
}

/// The session index that a datagram classified as data is addressed to. Zero for what is too short to be data.
#[must_use]
pub fn data_receiver(datagram: &[u8]) -> u32 {
    read_index(datagram, 4).unwrap_or_default()
}

/// The index by which the sender of a handshake message wants to be addressed. None for anything else.
#[must_use]
pub fn sender_index(datagram: &[u8]) -> Option<u32> {
    matches!(classify(datagram), Kind::HandshakeInit | Kind::HandshakeResponse)
        .then(|| read_index(datagram, 4))
        .flatten()
}

/// The tunnel a session index belongs to: boringtun keeps our 24-bit index in the upper bits and counts sessions in
/// the lowest byte.
#[must_use]
pub const fn tunnel_index(session_index: u32) -> u32 {
    session_index >> 8
}

/// True for a tunnel index that must not be used: one of its 256 session indices, written little-endian at 4..8 of a
/// message, reads as the STUN magic cookie.
#[must_use]
pub const fn is_reserved(tunnel_index: u32) -> bool {
    tunnel_index == self::tunnel_index(u32::from_le_bytes(MAGIC_COOKIE))
}

fn read_index(datagram: &[u8], at: usize) -> Option<u32> {
    datagram.get(at..)?.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44]);
        bytes[8..12].copy_from_slice(&[0x55, 0x66, 0x77, 0x88]);
        bytes
    }

    #[test]
    fn indices_are_read_where_the_paper_puts_them() {
        assert_eq!(receiver_index(&message(1, INIT_LEN)), None);
        assert_eq!(receiver_index(&message(2, RESPONSE_LEN)), Some(0x8877_6655));
        assert_eq!(receiver_index(&message(3, COOKIE_LEN)), Some(0x4433_2211));
        assert_eq!(receiver_index(&message(4, DATA_MIN_LEN)), Some(0x4433_2211));
        assert_eq!(data_receiver(&message(4, DATA_MIN_LEN)), 0x4433_2211);
        assert_eq!(sender_index(&message(1, INIT_LEN)), Some(0x4433_2211));
        assert_eq!(sender_index(&message(2, RESPONSE_LEN)), Some(0x4433_2211));
        assert_eq!(sender_index(&message(4, DATA_MIN_LEN)), None);
        assert_eq!(receiver_index(&[4, 0, 0, 0]), None);
    }

    #[test]
    fn a_session_index_that_reads_as_the_cookie_belongs_to_a_reserved_tunnel_index() {
        let session = u32::from_le_bytes(MAGIC_COOKIE);
        assert!(is_reserved(tunnel_index(session)));
        let mut data = message(4, DATA_MIN_LEN);
        data[4..8].copy_from_slice(&session.to_le_bytes());
        assert_eq!(classify(&data), Kind::Stun, "which is why it is reserved");
        assert!(!is_reserved(tunnel_index(session) + 1));
    }
}

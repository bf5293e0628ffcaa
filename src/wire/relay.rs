//! Relay frames: what travels between a node and the relay after the node has authenticated.
//!
//! One WebSocket binary message holds one or more frames, back to back:
//!
//! ```text
//! type: u8 | length of body: u16 big-endian | body
//!
//! 0x01 Send     node → relay   destination WireGuard key (32) | payload
//! 0x02 Recv     relay → node   source WireGuard key (32)      | payload
//! 0x03 Gone     relay → node   WireGuard key (32)               that node is not connected here
//! 0x04 Ping     both ways      8 bytes
//! 0x05 Pong     both ways      the same 8 bytes
//! 0x06 Here     node → relay   empty                              deliver here, no longer by UDP (`wire/relay_udp.rs`)
//! ```
//!
//! Unknown types are skipped by their length. Numbers are never reused. The payload is what would have been a UDP
//! datagram between the nodes; the relay does not look at it.

use crate::wire::keys::WgKey;

/// The longest payload in bytes: the largest UDP datagram.
pub const MAX_PAYLOAD: usize = 65_507 - 64;
/// Bytes before the body.
pub const HEADER: usize = 3;
/// Bytes a Send or Recv frame adds to its payload.
pub const OVERHEAD: usize = HEADER + 32;

/// Frame numbers. Never reuse one.
pub mod kind {
    /// node → relay: forward this.
    pub const SEND: u8 = 0x01;
    /// relay → node: this came for you.
    pub const RECV: u8 = 0x02;
    /// relay → node: that key is not connected.
    pub const GONE: u8 = 0x03;
    /// Liveness.
    pub const PING: u8 = 0x04;
    /// Answer to a Ping.
    pub const PONG: u8 = 0x05;
    /// node → relay: deliver here, no longer by UDP.
    pub const HERE: u8 = 0x06;
}

/// One frame, borrowing from the message it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Forward `payload` to `to`.
    Send {
        /// Destination.
        to: WgKey,
        /// Opaque bytes.
        payload: &'a [u8],
    },
    /// `payload` came from `from`.
    Recv {
        /// Source, as authenticated by the relay.
        from: WgKey,
        /// Opaque bytes.
        payload: &'a [u8],
    },
    /// `peer` is not connected to this relay.
    Gone {
        /// Whom a Send was for.
        peer: WgKey,
    },
    /// Answer with a Pong of the same bytes.
    Ping([u8; 8]),
    /// Answer to a Ping.
    Pong([u8; 8]),
    /// Deliver on this connection, no longer by UDP.
    Here,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends inside a frame.
    #[error("relay frame is truncated")]
    Truncated,
    /// A known type with a body of the wrong length.
    #[error("relay frame body has the wrong length")]
    BadLength,
}

/// Appends one frame to `out`. The payload must be at most [`MAX_PAYLOAD`] bytes; a longer one is not written and false
/// is returned.
pub fn encode(frame: &Frame<'_>, out: &mut Vec<u8>) -> bool {
    let mut write = |kind: u8, key: Option<&WgKey>, rest: &[u8]| {
        let len = key.map_or(0, |_| 32) + rest.len();
        let Ok(len16) = u16::try_from(len) else { return false };
        if rest.len() > MAX_PAYLOAD {
            return false;
        }
        out.reserve(HEADER + len);
        out.push(kind);
        out.extend_from_slice(&len16.to_be_bytes());
        if let Some(key) = key {
            out.extend_from_slice(&key.0);
        }
        out.extend_from_slice(rest);
        true
    };
    match frame {
        Frame::Send { to, payload } => write(kind::SEND, Some(to), payload),
        Frame::Recv { from, payload } => write(kind::RECV, Some(from), payload),
        Frame::Gone { peer } => write(kind::GONE, Some(peer), &[]),
        Frame::Ping(nonce) => write(kind::PING, None, nonce),
        Frame::Pong(nonce) => write(kind::PONG, None, nonce),
        Frame::Here => write(kind::HERE, None, &[]),
    }
}

/// Iterates over the frames of one message. After an error it ends.
#[derive(Debug, Clone)]
pub struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    /// The frames in `message`.
    #[must_use]
    pub const fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.rest.is_empty() {
                return None;
            }
            let Some((header, rest)) = self.rest.split_first_chunk::<HEADER>() else {
                self.rest = &[];
                return Some(Err(DecodeError::Truncated));
            };
            let len = usize::from(u16::from_be_bytes([header[1], header[2]]));
            let Some((body, rest)) = rest.split_at_checked(len) else {
                self.rest = &[];
                return Some(Err(DecodeError::Truncated));
            };
            self.rest = rest;
            match decode_body(header[0], body) {
                Ok(None) => {}
                Ok(Some(frame)) => return Some(Ok(frame)),
                Err(e) => {
                    self.rest = &[];
                    return Some(Err(e));
                }
            }
        }
    }
}

fn decode_body(kind: u8, body: &[u8]) -> Result<Option<Frame<'_>>, DecodeError> {
    let keyed = || body.split_first_chunk::<32>().map(|(k, rest)| (WgKey(*k), rest)).ok_or(DecodeError::BadLength);
    let nonce = || body.try_into().map_err(|_| DecodeError::BadLength);
    Ok(Some(match kind {
        kind::SEND => keyed().map(|(to, payload)| Frame::Send { to, payload })?,
        kind::RECV => keyed().map(|(from, payload)| Frame::Recv { from, payload })?,
        kind::GONE => match keyed()? {
            (peer, []) => Frame::Gone { peer },
            _ => return Err(DecodeError::BadLength),
        },
        kind::PING => Frame::Ping(nonce()?),
        kind::PONG => Frame::Pong(nonce()?),
        kind::HERE if body.is_empty() => Frame::Here,
        kind::HERE => return Err(DecodeError::BadLength),
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_back_to_back_and_unknown_types_are_skipped() {
        let frames = [
            Frame::Send { to: WgKey([1; 32]), payload: b"ciphertext" },
            Frame::Recv { from: WgKey([2; 32]), payload: b"" },
            Frame::Gone { peer: WgKey([3; 32]) },
            Frame::Ping([4; 8]),
            Frame::Pong([5; 8]),
            Frame::Here,
        ];
        let mut message = Vec::new();
        for frame in &frames {
            assert!(encode(frame, &mut message));
            message.extend_from_slice(&[0x7f, 0, 2, 9, 9]);
        }
        let decoded: Vec<_> = Frames::new(&message).map(Result::unwrap).collect();
        assert_eq!(decoded, frames);
    }

    #[test]
    fn every_truncation_is_an_error_or_fewer_frames() {
        let mut message = Vec::new();
        assert!(encode(&Frame::Send { to: WgKey([1; 32]), payload: b"abc" }, &mut message));
        for end in 1..message.len() {
            assert_eq!(Frames::new(&message[..end]).next(), Some(Err(DecodeError::Truncated)));
        }
    }

    #[test]
    fn a_payload_over_the_limit_is_not_written() {
        let mut out = Vec::new();
        assert!(!encode(&Frame::Send { to: WgKey([0; 32]), payload: &vec![0; MAX_PAYLOAD + 1] }, &mut out));
        assert!(out.is_empty());
    }
}

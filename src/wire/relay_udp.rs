//! Relay datagrams: what travels by UDP between a node and the coordinator's relay.
//!
//! ```text
//!  0        C0
//!  1        kind
//!  2..8     counter, big-endian: grows with every datagram of one direction of one session
//!  8..12    session, big-endian: which of the coordinator's sessions this belongs to
//! 12..20    name: see below
//! 20..28    tag: SipHash-2-4 over bytes 0..20, the datagram's length, and bytes 28..44 (zeros where it is shorter)
//! 28..      payload
//!
//! 01 Send   node → relay   name: the receiver's           payload: what would have been a datagram between the nodes
//! 02 Recv   relay → node   name: the sender's             payload: the same
//! 03 Gone   relay → node   name: of a Send's receiver     the relay has no way to that node
//! 04 Ping   node → relay   name: a [`Wish`], seven zeros  payload: eight bytes of the node's choice, then padding
//! 05 Pong   relay → node   name: the Ping's               payload: the Ping's
//! ```
//!
//! The header has one size for every kind, so that a relay turns a Send into a Recv where it lies in the buffer, and a run
//! of equally long datagrams stays one. A **name** is the first eight bytes of a node's WireGuard key: both ends can
//! compute it, so there is nothing to hand out and nothing to keep in step.
//!
//! A session and its secret come over the control link, which is encrypted and authenticated. The two directions have
//! different keys. The tag proves that the sender knows the secret; it covers as much of the payload as tells one
//! WireGuard message from another, and no more, because the payload proves itself to the node that it is for. Numbers are
//! never reused.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::wire::classify::RELAY_DATAGRAM;
use crate::wire::keys::WgKey;
use crate::wire::siphash::SipKey;

/// Bytes before the payload.
pub const HEADER: usize = 28;
/// The longest payload in bytes: the largest UDP datagram over IPv4 less the header.
pub const MAX_PAYLOAD: usize = 65_507 - HEADER;
/// The largest counter. At ten million datagrams a second it lasts ten months.
pub const MAX_COUNTER: u64 = (1 << 48) - 1;
/// Bytes of a Ping's payload that are the sender's; what follows is padding.
pub const NONCE: usize = 8;

/// Bytes of payload under the tag.
const PREFIX: usize = 16;
const TAG: std::ops::Range<usize> = 20..HEADER;

/// What a datagram is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// node → relay: forward the payload to the node with this name.
    Send,
    /// relay → node: the payload came from the node with this name.
    Recv,
    /// relay → node: a Send to this name could not be delivered.
    Gone,
    /// node → relay: answer me.
    Ping,
    /// relay → node: the answer.
    Pong,
}

impl Kind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0x01 => Some(Self::Send),
            0x02 => Some(Self::Recv),
            0x03 => Some(Self::Gone),
            0x04 => Some(Self::Ping),
            0x05 => Some(Self::Pong),
            _ => None,
        }
    }

    /// Its number.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Send => 0x01,
            Self::Recv => 0x02,
            Self::Gone => 0x03,
            Self::Ping => 0x04,
            Self::Pong => 0x05,
        }
    }
}

/// How a node is called in relay datagrams: the first eight bytes of its WireGuard key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Name(pub [u8; 8]);

impl Name {
    /// The name of the node with this key.
    #[must_use]
    pub fn of(key: &WgKey) -> Self {
        let mut name = [0; 8];
        name.copy_from_slice(&key.0[..8]);
        Self(name)
    }
}

/// What a Ping asks for besides its answer. Numbers this version does not know are taken as [`Wish::Nothing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wish {
    /// Only measure.
    Nothing,
    /// Deliver to the address this Ping came from, from now on.
    DeliverHere,
    /// No longer deliver by UDP.
    DeliverElsewhere,
}

impl Wish {
    /// The wish as a Ping's name.
    #[must_use]
    pub const fn name(self) -> Name {
        let byte = match self {
            Self::Nothing => 0,
            Self::DeliverHere => 1,
            Self::DeliverElsewhere => 2,
        };
        Name([byte, 0, 0, 0, 0, 0, 0, 0])
    }

    /// The wish in a Ping's name.
    #[must_use]
    pub const fn from_name(name: Name) -> Self {
        match name.0[0] {
            1 => Self::DeliverHere,
            2 => Self::DeliverElsewhere,
            _ => Self::Nothing,
        }
    }
}

/// The fields before the tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the datagram is for.
    pub kind: Kind,
    /// Grows with every datagram, at most [`MAX_COUNTER`].
    pub counter: u64,
    /// Which session.
    pub session: u32,
    /// Whom it is about, by [`Kind`].
    pub name: Name,
}

/// Why bytes are not a relay datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than a header.
    #[error("relay datagram is truncated")]
    Truncated,
    /// The first byte is another protocol's.
    #[error("not a relay datagram")]
    NotRelay,
    /// A kind this version does not know.
    #[error("unknown kind of relay datagram")]
    UnknownKind,
    /// A kind with a payload too short or too long for it.
    #[error("relay datagram has the wrong length for its kind")]
    BadLength,
}

/// Reads the header. The tag is not looked at: until [`TagKey::verify`] says yes, nothing in it may be believed.
///
/// # Errors
/// [`DecodeError`].
pub fn decode(datagram: &[u8]) -> Result<Header, DecodeError> {
    let fields = datagram.first_chunk::<HEADER>().ok_or(DecodeError::Truncated)?;
    if fields[0] != RELAY_DATAGRAM {
        return Err(DecodeError::NotRelay);
    }
    let kind = Kind::from_byte(fields[1]).ok_or(DecodeError::UnknownKind)?;
    let payload = datagram.len() - HEADER;
    let fits = match kind {
        Kind::Send | Kind::Recv => payload <= MAX_PAYLOAD,
        Kind::Gone => payload == 0,
        Kind::Ping | Kind::Pong => (NONCE..=MAX_PAYLOAD).contains(&payload),
    };
    if !fits {
        return Err(DecodeError::BadLength);
    }
    let word = u64::from_be_bytes([0, 0, fields[2], fields[3], fields[4], fields[5], fields[6], fields[7]]);
    let session = u32::from_be_bytes([fields[8], fields[9], fields[10], fields[11]]);
    let mut name = Name::default();
    name.0.copy_from_slice(&fields[12..20]);
    Ok(Header { kind, counter: word, session, name })
}

/// The key of one direction of a session.
#[derive(Debug, Clone)]
pub struct TagKey(SipKey);

impl TagKey {
    /// Writes header and tag into the first [`HEADER`] bytes of a datagram whose payload is in place. A datagram that has no
    /// room for them is left as it is.
    pub fn seal(&self, header: &Header, datagram: &mut [u8]) {
        let Some(fields) = datagram.first_chunk_mut::<HEADER>() else { return };
        fields[..8].copy_from_slice(&(header.counter & MAX_COUNTER).to_be_bytes());
        fields[0] = RELAY_DATAGRAM;
        fields[1] = header.kind.byte();
        fields[8..12].copy_from_slice(&header.session.to_be_bytes());
        fields[12..20].copy_from_slice(&header.name.0);
        let tag = self.tag(datagram);
        datagram[TAG].copy_from_slice(&tag.to_le_bytes());
    }

    /// Whether the tag was made with this key. Takes the same time for every wrong one.
    #[must_use]
    pub fn verify(&self, datagram: &[u8]) -> bool {
        let Some(tag) = datagram.get(TAG) else { return false };
        self.tag(datagram).to_le_bytes().ct_eq(tag).into()
    }

    fn tag(&self, datagram: &[u8]) -> u64 {
        let word = |at: usize| datagram[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let length = u64::try_from(datagram.len()).unwrap_or(u64::MAX);
        // Bytes 16..20 end the header's fields; the length goes where the tag would begin.
        let third = (word(16) & 0xffff_ffff) | (length << 32);
        let payload = &datagram[HEADER..];
        let prefix = match payload.first_chunk::<PREFIX>() {
            Some(prefix) => u128::from_le_bytes(*prefix),
            None => {
                let mut padded = [0; PREFIX];
                padded[..payload.len()].copy_from_slice(payload);
                u128::from_le_bytes(padded)
            }
        };
        self.0.hash([word(0), word(8), third, prefix as u64, (prefix >> 64) as u64])
    }
}

/// A session's 32 secret bytes as they travel over the control link, in hexadecimal. Not shown by `Debug`, wiped when
/// dropped.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SessionSecret([u8; 32]);

impl SessionSecret {
    /// Wraps secret bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The keys of the two directions.
    #[must_use]
    pub fn keys(&self) -> SessionKeys {
        let (mut up, mut down) = ([0; 16], [0; 16]);
        up.copy_from_slice(&self.0[..16]);
        down.copy_from_slice(&self.0[16..]);
        let keys = SessionKeys { up: TagKey(SipKey::new(&up)), down: TagKey(SipKey::new(&down)) };
        up.zeroize();
        down.zeroize();
        keys
    }
}

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(…)")
    }
}

impl serde::Serialize for SessionSecret {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let text = zeroize::Zeroizing::new(WgKey(self.0).to_string());
        s.serialize_str(&text)
    }
}

impl<'de> serde::Deserialize<'de> for SessionSecret {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        WgKey::deserialize(d).map(|bytes| Self(bytes.0))
    }
}

/// The keys of the two directions of a session.
#[derive(Debug, Clone)]
pub struct SessionKeys {
    /// Datagrams of the node.
    pub up: TagKey,
    /// Datagrams of the relay.
    pub down: TagKey,
}

/// Which counters were seen: each is accepted once, and none that lies [`Window::SPAN`] or more behind the newest
/// (RFC 6479, in a ring of words).
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// One more than the newest counter seen; 0: none.
    next: u64,
    words: [u64; Self::WORDS],
}

/// How a counter fits into what was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fresh {
    /// The newest so far.
    Newest,
    /// Overtaken by others, but new.
    Late,
    /// Seen before, or too old to tell.
    Seen,
}

impl Window {
    const WORDS: usize = 32;
    /// How far behind the newest a counter may lie. More than one batch of segments, and more than WireGuard's own window.
    pub const SPAN: u64 = (Self::WORDS as u64 - 1) * 64;

    /// Marks a counter as seen and says what it was. Call it only for a datagram whose tag is right.
    pub fn accept(&mut self, counter: u64) -> Fresh {
        let word = |counter: u64| (counter / 64) as usize % Self::WORDS;
        let mut how = Fresh::Late;
        if counter >= self.next {
            how = Fresh::Newest;
            // Words the window moves onto are those of counters long past.
            let first = self.next.div_ceil(64);
            let last = counter / 64;
            for n in first.max(last.saturating_sub(Self::WORDS as u64 - 1))..=last {
                self.words[n as usize % Self::WORDS] = 0;
            }
            self.next = counter + 1;
        } else if self.next - counter > Self::SPAN {
            return Fresh::Seen;
        }
        let bit = 1 << (counter % 64);
        let seen = &mut self.words[word(counter)];
        if *seen & bit != 0 {
            return Fresh::Seen;
        }
        *seen |= bit;
        how
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn keys() -> SessionKeys {
        SessionSecret::new([7; 32]).keys()
    }

    fn sealed(kind: Kind, counter: u64, payload: &[u8]) -> (Header, Vec<u8>) {
        let header = Header { kind, counter, session: 0x0102_0304, name: Name([9, 8, 7, 6, 5, 4, 3, 2]) };
        let mut datagram = vec![0; HEADER];
        datagram.extend_from_slice(payload);
        keys().up.seal(&header, &mut datagram);
        (header, datagram)
    }

    #[test]
    fn headers_round_trip_and_carry_the_tag_of_their_direction() {
        for (kind, payload) in [
            (Kind::Send, &[4, 0, 0, 0, 1, 2][..]),
            (Kind::Recv, &[]),
            (Kind::Gone, &[]),
            (Kind::Ping, &[5; 8]),
            (Kind::Pong, &[5; 1312]),
        ] {
            let (header, datagram) = sealed(kind, 77, payload);
            assert_eq!(decode(&datagram), Ok(header));
            assert!(keys().up.verify(&datagram));
            assert_eq!(&datagram[HEADER..], payload);
        }
        let mut secret = [7; 32];
        secret[31] = 8;
        let other = SessionSecret::new(secret).keys();
        let (_, datagram) = sealed(Kind::Send, 1, b"x");
        assert!(other.up.verify(&datagram) && !other.down.verify(&datagram));
    }

    #[test]
    fn lengths_that_make_no_sense_are_refused() {
        let length_of = |kind, payload: &[u8]| decode(&sealed(kind, 1, payload).1);
        assert_eq!(length_of(Kind::Gone, &[1]), Err(DecodeError::BadLength));
        assert_eq!(length_of(Kind::Ping, &[1; 7]), Err(DecodeError::BadLength));
        assert_eq!(length_of(Kind::Pong, &[]), Err(DecodeError::BadLength));
        let (_, datagram) = sealed(Kind::Send, 1, &[]);
        for end in 0..HEADER {
            assert_eq!(decode(&datagram[..end]), Err(DecodeError::Truncated));
            assert!(!keys().up.verify(&datagram[..end]));
        }
    }

    #[test]
    fn every_kind_has_one_number() {
        let known: Vec<Kind> = (0..=255).filter_map(Kind::from_byte).collect();
        assert_eq!(known, [Kind::Send, Kind::Recv, Kind::Gone, Kind::Ping, Kind::Pong]);
        assert!(known.iter().all(|kind| Kind::from_byte(kind.byte()) == Some(*kind)));
        for wish in [Wish::Nothing, Wish::DeliverHere, Wish::DeliverElsewhere] {
            assert_eq!(Wish::from_name(wish.name()), wish);
        }
        assert_eq!(Wish::from_name(Name([99, 0, 0, 0, 0, 0, 0, 0])), Wish::Nothing);
    }

    #[test]
    fn the_secret_is_not_shown() {
        let secret = SessionSecret::new([0xab; 32]);
        let shown = format!("{secret:?} {:?}", secret.keys());
        assert!(!shown.contains("ab"), "{shown}");
    }

    #[test]
    fn a_window_takes_each_counter_once_and_none_too_old() {
        let mut window = Window::default();
        assert_eq!(window.accept(5), Fresh::Newest);
        assert_eq!(window.accept(5), Fresh::Seen);
        assert_eq!(window.accept(0), Fresh::Late);
        assert_eq!(window.accept(5 + Window::SPAN), Fresh::Newest);
        assert_eq!(window.accept(5), Fresh::Seen);
        assert_eq!(window.accept(6), Fresh::Late);
        assert_eq!(window.accept(MAX_COUNTER), Fresh::Newest);
        assert_eq!(window.accept(MAX_COUNTER - 1), Fresh::Late);
        assert_eq!(window.accept(MAX_COUNTER), Fresh::Seen);
    }

    proptest! {
        #[test]
        fn no_flipped_bit_under_the_tag_is_accepted(
            payload in proptest::collection::vec(any::<u8>(), 0..64), place in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let (_, mut datagram) = sealed(Kind::Send, 1, &payload);
            let covered = datagram.len().min(HEADER + PREFIX);
            datagram[place.index(covered)] ^= 1 << bit;
            prop_assert!(!keys().up.verify(&datagram));
        }

        #[test]
        fn no_shortened_or_lengthened_datagram_is_accepted(len in 0usize..100, other in 0usize..100) {
            prop_assume!(len != other);
            let (_, mut datagram) = sealed(Kind::Send, 1, &vec![0; len]);
            datagram.resize(HEADER + other, 0);
            prop_assert!(!keys().up.verify(&datagram));
        }

        #[test]
        fn random_bytes_decode_or_not_but_never_pass(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(first) = bytes.first_mut() {
                *first = RELAY_DATAGRAM;
            }
            let _ = decode(&bytes);
            prop_assert!(!keys().up.verify(&bytes));
        }

        #[test]
        fn a_window_agrees_with_a_set(steps in proptest::collection::vec(0u64..5_000, 1..400)) {
            let (mut window, mut seen, mut newest) = (Window::default(), BTreeSet::new(), None::<u64>);
            for counter in steps {
                let expected = match newest {
                    Some(n) if counter <= n && n + 1 - counter > Window::SPAN => Fresh::Seen,
                    _ if !seen.insert(counter) => Fresh::Seen,
                    Some(n) if counter < n => Fresh::Late,
                    _ => Fresh::Newest,
                };
                newest = newest.max(Some(counter));
                prop_assert_eq!(window.accept(counter), expected, "counter {}", counter);
            }
        }
    }
}

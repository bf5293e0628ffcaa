//! What two nodes say to each other inside their WireGuard session, beside IP packets: which records they hold, records
//! themselves, and datagrams to pass on to a third node.
//!
//! ```text
//! E1 | kind (1) | length of the body (2) | body            all numbers big-endian
//! ```
//!
//! The first half byte tells it from IPv4 and IPv6, so that any other WireGuard drops it; the second is the version. What
//! follows the body is padding. Unknown kinds are skipped.
//!
//! | kind | | body |
//! |---|---|---|
//! | `01` | [`Summary`] | settled (1) · count (4) · head (32) · set (32) · number of my advertisement (8) · of yours that I hold (8) |
//! | `02` | [`Branch`] | stem (9) · 16 × digest (8) |
//! | `03` | [`Have`] | answer (1) · stem (9) · n × beginning of an id (8) |
//! | `04` | [`Piece`] | number (4) · total (4) · offset (4) · bytes |
//! | `05` | [`Message::Pass`] | to: first eight bytes of a WireGuard key · datagram |
//! | `06` | [`Message::Passed`] | from: first eight bytes of a WireGuard key · datagram |
//! | `07` | [`Message::NoWay`] | to: first eight bytes of a WireGuard key |
//!
//! A stem is `digits (1) | bytes (8)`: record ids that begin with so many hexadecimal digits. A parcel, cut into pieces, is
//!
//! ```text
//! 01 | signer (32) | signature (64) | 0, or 1 and countersignature (64) | payload      a record
//! 02 | signature (64) | payload                                                        an advertisement
//! ```

use crate::trust::advert::{self, SignedAdvert};
use crate::trust::record::{self, HexSignature, SignedRecord};
use crate::wire::keys::{Digest32, WgKey};

/// First byte of a message of this version.
pub const MARK: u8 = 0xE1;
/// Bytes before the body.
pub const HEADER: usize = 4;
/// The longest body of a message that is not passed on: with its header and WireGuard's it fits every IPv6 path.
pub const MAX_BODY: usize = 1_140;
/// The most ids in one [`Have`].
pub const MAX_IDS: usize = 128;
/// The longest parcel.
pub const MAX_PARCEL: usize = advert::MAX_PAYLOAD + 128;
/// What a [`Piece`] adds to its bytes, header of the message included.
pub const PIECE_OVERHEAD: usize = HEADER + 12;
/// What [`Message::Pass`] and [`Message::Passed`] add to their datagram, header of the message included.
pub const PASS_OVERHEAD: usize = HEADER + NAME;

const NAME: usize = 8;
const SHORT: usize = 8;
const STEM: usize = 9;
const SUMMARY: usize = 1 + 4 + 32 + 32 + 8 + 8;
/// The most hexadecimal digits in a stem.
const MAX_DIGITS: u8 = 16;
const RECORD: u8 = 1;
const ADVERT: u8 = 2;

/// A node, by the first eight bytes of its WireGuard key.
pub type Name = [u8; NAME];

/// The name of a node.
#[must_use]
pub fn name_of(key: &WgKey) -> Name {
    std::array::from_fn(|i| key.0[i])
}

/// What a node holds, in a few bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The sender knows that the receiver holds the same: nothing to answer.
    pub settled: bool,
    /// Records in its log.
    pub count: u32,
    /// The running digest of its log, see [`crate::wire::control::log_head`].
    pub head: Digest32,
    /// Digest of the set of its records, in whatever order it heard them.
    pub set: Digest32,
    /// Number of the sender's own newest advertisement; 0: it has none.
    pub mine: u64,
    /// Number of the receiver's newest advertisement that the sender holds; 0: none.
    pub yours: u64,
}

/// Record ids that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stem {
    digits: u8,
    bytes: [u8; 8],
}

impl Stem {
    /// All ids.
    pub const ALL: Self = Self { digits: 0, bytes: [0; 8] };

    /// Those that go on with this hexadecimal digit. None: it is long enough.
    #[must_use]
    pub fn child(mut self, digit: u8) -> Option<Self> {
        if self.digits >= MAX_DIGITS || digit > 15 {
            return None;
        }
        let at = usize::from(self.digits / 2);
        self.bytes[at] |= if self.digits.is_multiple_of(2) { digit << 4 } else { digit };
        self.digits += 1;
        Some(self)
    }

    /// The lowest and the highest id that begin so.
    #[must_use]
    pub fn bounds(&self) -> (Digest32, Digest32) {
        let (mut low, mut high) = ([0; 32], [0xff; 32]);
        for digit in 0..self.digits {
            let at = usize::from(digit / 2);
            let mask = if digit.is_multiple_of(2) { 0xf0 } else { 0x0f };
            low[at] |= self.bytes[at] & mask;
            high[at] = (high[at] & !mask) | (self.bytes[at] & mask);
        }
        (Digest32(low), Digest32(high))
    }

    fn read(bytes: [u8; STEM]) -> Option<Self> {
        let [digits, rest @ ..] = bytes;
        (digits <= MAX_DIGITS).then_some(Self { digits, bytes: rest })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(self.digits);
        out.extend_from_slice(&self.bytes);
    }
}

/// Digests of the sixteen parts of what a node holds under a stem. Zeros: nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// Which records.
    pub stem: Stem,
    /// By their next hexadecimal digit.
    pub digests: [[u8; SHORT]; 16],
}

/// All that a node holds under a stem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Have {
    /// It answers another: it is not answered by one.
    pub answer: bool,
    /// Which records.
    pub stem: Stem,
    /// How their ids begin; at most [`MAX_IDS`].
    pub ids: Vec<[u8; SHORT]>,
}

/// How an id begins, as [`Have`] tells it.
#[must_use]
pub fn short(id: &Digest32) -> [u8; SHORT] {
    std::array::from_fn(|i| id.0[i])
}

/// A part of a parcel. They come in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Of the parcel; the sender counts.
    pub number: u32,
    /// The parcel's length; at most [`MAX_PARCEL`].
    pub total: u32,
    /// Where these bytes stand in it.
    pub offset: u32,
    /// At least one.
    pub bytes: &'a [u8],
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// What I hold.
    Summary(Summary),
    /// Where we differ, perhaps.
    Branch(Branch),
    /// What I hold there.
    Have(Have),
    /// Something that the receiver lacks.
    Piece(Piece<'a>),
    /// Please hand this to that node.
    Pass {
        /// Whom.
        to: Name,
        /// What would have been a datagram to it.
        payload: &'a [u8],
    },
    /// That node asked for this to be handed to you.
    Passed {
        /// Who, as authenticated by the sender of this.
        from: Name,
        /// What would have been a datagram from it.
        payload: &'a [u8],
    },
    /// What was to be passed to that node is dropped: there is no way from here to it.
    NoWay {
        /// Whom.
        to: Name,
    },
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Too short, too long, or its parts contradict each other.
    #[error("not a well-formed message of a peer")]
    Malformed,
    /// Of a kind or version that this program does not know.
    #[error("the message of a peer needs a newer version")]
    Unknown,
}

impl<'a> Message<'a> {
    /// Reads a message from the content of a WireGuard data message.
    ///
    /// # Errors
    /// See [`MessageError`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        use MessageError::{Malformed, Unknown};
        let ([mark, kind, high, low], rest) = bytes.split_first_chunk::<HEADER>().ok_or(Malformed)?;
        if *mark != MARK {
            return Err(if mark >> 4 == MARK >> 4 { Unknown } else { Malformed });
        }
        let body = rest.get(..usize::from(u16::from_be_bytes([*high, *low]))).ok_or(Malformed)?;
        let message = match kind {
            1 => Summary::read(body).map(Message::Summary),
            2 => Branch::read(body).map(Message::Branch),
            3 => Have::read(body).map(Message::Have),
            4 => Piece::read(body).map(Message::Piece),
            5 => named(body).map(|(to, payload)| Message::Pass { to, payload }),
            6 => named(body).map(|(from, payload)| Message::Passed { from, payload }),
            7 => body.first_chunk().map(|to| Message::NoWay { to: *to }),
            _ => return Err(Unknown),
        };
        message.ok_or(Malformed)
    }

    /// The bytes to seal. Of a datagram longer than a message can hold the rest is left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Self::Summary(s) => {
                body.push(u8::from(s.settled));
                body.extend_from_slice(&s.count.to_be_bytes());
                body.extend_from_slice(&s.head.0);
                body.extend_from_slice(&s.set.0);
                body.extend_from_slice(&s.mine.to_be_bytes());
                body.extend_from_slice(&s.yours.to_be_bytes());
                1
            }
            Self::Branch(b) => {
                b.stem.write(&mut body);
                b.digests.iter().for_each(|digest| body.extend_from_slice(digest));
                2
            }
            Self::Have(h) => {
                body.push(u8::from(h.answer));
                h.stem.write(&mut body);
                h.ids.iter().take(MAX_IDS).for_each(|id| body.extend_from_slice(id));
                3
            }
            Self::Piece(p) => {
                for number in [p.number, p.total, p.offset] {
                    body.extend_from_slice(&number.to_be_bytes());
                }
                body.extend_from_slice(p.bytes);
                4
            }
            Self::Pass { to, payload } => {
                body.extend_from_slice(to);
                body.extend_from_slice(payload);
                5
            }
            Self::Passed { from, payload } => {
                body.extend_from_slice(from);
                body.extend_from_slice(payload);
                6
            }
            Self::NoWay { to } => {
                body.extend_from_slice(to);
                7
            }
        };
        body.truncate(usize::from(u16::MAX));
        let len = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
        [&[MARK, kind, len[0], len[1]], body.as_slice()].concat()
    }
}

/// Whether the content of a WireGuard data message is one of these, of whatever version.
#[must_use]
pub fn is_message(inner: &[u8]) -> bool {
    inner.first().is_some_and(|first| first >> 4 == MARK >> 4)
}

/// What stands before a datagram in a [`Message::Pass`] or a [`Message::Passed`], for those who write it in place.
#[must_use]
pub fn pass_header(passed: bool, name: &Name, len: usize) -> [u8; PASS_OVERHEAD] {
    let [high, low] = u16::try_from(NAME + len).unwrap_or(u16::MAX).to_be_bytes();
    let mut out = [MARK, if passed { 6 } else { 5 }, high, low, 0, 0, 0, 0, 0, 0, 0, 0];
    out[HEADER..].copy_from_slice(name);
    out
}

/// Something signed that one node hands another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parcel {
    /// A record.
    Record(SignedRecord),
    /// An advertisement.
    Advert(SignedAdvert),
}

impl Parcel {
    /// As it is cut into pieces.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Record(r) => {
                let mut out = vec![RECORD];
                out.extend_from_slice(&r.signer.0);
                out.extend_from_slice(&r.sig.0);
                out.push(u8::from(r.cosig.is_some()));
                out.extend_from_slice(r.cosig.as_ref().map_or(&[], |sig| &sig.0[..]));
                out.extend_from_slice(r.payload.as_bytes());
                out
            }
            Self::Advert(a) => [&[ADVERT], &a.sig.0[..], a.payload.as_bytes()].concat(),
        }
    }

    /// Reads a parcel. Nothing about it is verified. None: it is malformed, too long, or of a kind not known here.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let (kind, rest) = bytes.split_first()?;
        match *kind {
            RECORD => {
                let (signer, rest) = rest.split_first_chunk::<32>()?;
                let (sig, rest) = rest.split_first_chunk::<64>()?;
                let (cosig, rest) = match rest.split_first()? {
                    (0, rest) => (None, rest),
                    (1, rest) => rest.split_first_chunk::<64>().map(|(sig, rest)| (Some(HexSignature(*sig)), rest))?,
                    _ => return None,
                };
                let payload = text(rest).filter(|text| text.len() <= record::MAX_PAYLOAD)?;
                Some(Self::Record(SignedRecord { payload, signer: Digest32(*signer), sig: HexSignature(*sig), cosig }))
            }
            ADVERT => {
                let (sig, rest) = rest.split_first_chunk::<64>()?;
                let payload = text(rest).filter(|text| text.len() <= advert::MAX_PAYLOAD)?;
                Some(Self::Advert(SignedAdvert { payload, sig: HexSignature(*sig) }))
            }
            _ => None,
        }
    }
}

impl Summary {
    fn read(body: &[u8]) -> Option<Self> {
        let body = body.first_chunk::<SUMMARY>()?;
        let (settled, rest) = body.split_first()?;
        let (count, rest) = rest.split_first_chunk()?;
        let (head, rest) = rest.split_first_chunk()?;
        let (set, rest) = rest.split_first_chunk()?;
        let (mine, rest) = rest.split_first_chunk()?;
        let (yours, _) = rest.split_first_chunk()?;
        Some(Self {
            settled: *settled == 1,
            count: u32::from_be_bytes(*count),
            head: Digest32(*head),
            set: Digest32(*set),
            mine: u64::from_be_bytes(*mine),
            yours: u64::from_be_bytes(*yours),
        })
    }
}

impl Branch {
    fn read(body: &[u8]) -> Option<Self> {
        let (stem, rest) = body.split_first_chunk::<STEM>()?;
        let stem = Stem::read(*stem)?;
        let digests: &[u8; 16 * SHORT] = rest.try_into().ok()?;
        let mut out = [[0; SHORT]; 16];
        for (to, from) in out.iter_mut().zip(digests.chunks_exact(SHORT)) {
            to.copy_from_slice(from);
        }
        Some(Self { stem, digests: out })
    }
}

impl Have {
    fn read(body: &[u8]) -> Option<Self> {
        let (answer, rest) = body.split_first()?;
        let (stem, rest) = rest.split_first_chunk::<STEM>()?;
        if rest.len() > MAX_IDS * SHORT || !rest.len().is_multiple_of(SHORT) {
            return None;
        }
        let ids = rest.chunks_exact(SHORT).filter_map(|id| id.first_chunk().copied()).collect();
        Some(Self { answer: *answer == 1, stem: Stem::read(*stem)?, ids })
    }
}

impl<'a> Piece<'a> {
    fn read(body: &'a [u8]) -> Option<Self> {
        let (number, rest) = body.split_first_chunk()?;
        let (total, rest) = rest.split_first_chunk()?;
        let (offset, bytes) = rest.split_first_chunk()?;
        let (total, offset) = (u32::from_be_bytes(*total), u32::from_be_bytes(*offset));
        let end = u32::try_from(bytes.len()).ok().and_then(|len| offset.checked_add(len))?;
        let fits = !bytes.is_empty() && end <= total && usize::try_from(total).is_ok_and(|total| total <= MAX_PARCEL);
        fits.then_some(Self { number: u32::from_be_bytes(*number), total, offset, bytes })
    }
}

fn named(body: &[u8]) -> Option<(Name, &[u8])> {
    body.split_first_chunk::<NAME>().map(|(name, payload)| (*name, payload))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all() -> Vec<Message<'static>> {
        let stem = Stem::ALL.child(0xa).and_then(|s| s.child(0xb)).and_then(|s| s.child(0xc)).unwrap();
        let summary = Summary {
            settled: true,
            count: 7,
            head: Digest32([1; 32]),
            set: Digest32([2; 32]),
            mine: 3,
            yours: u64::MAX,
        };
        vec![
            Message::Summary(summary),
            Message::Branch(Branch { stem, digests: std::array::from_fn(|i| [u8::try_from(i).unwrap(); 8]) }),
            Message::Have(Have { answer: false, stem, ids: vec![[4; 8], [5; 8]] }),
            Message::Have(Have { answer: true, stem: Stem::ALL, ids: Vec::new() }),
            Message::Piece(Piece { number: 9, total: 100, offset: 98, bytes: b"xy" }),
            Message::Pass { to: [6; 8], payload: b"sealed" },
            Message::Passed { from: [7; 8], payload: b"" },
            Message::NoWay { to: [8; 8] },
        ]
    }

    #[test]
    fn what_is_written_is_read_also_with_padding_and_never_when_cut() {
        for message in all() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Ok(message.clone()));
            assert!(is_message(&bytes) && bytes.len() <= HEADER + MAX_BODY);
            assert_eq!(Message::decode(&[bytes.as_slice(), &[0; 15]].concat()), Ok(message));
            for len in 0..bytes.len() {
                assert_eq!(Message::decode(&bytes[..len]), Err(MessageError::Malformed), "{len} bytes");
            }
        }
    }

    #[test]
    fn the_bytes_are_these() {
        assert_eq!(Message::NoWay { to: [8; 8] }.encode(), [&[0xE1, 7, 0, 8][..], &[8; 8]].concat());
        let pass = Message::Pass { to: [1; 8], payload: &[0xC1, 2] };
        assert_eq!(pass.encode(), [&[0xE1, 5, 0, 10][..], &[1; 8], &[0xC1, 2]].concat());
        assert_eq!(pass.encode()[..12], pass_header(false, &[1; 8], 2));
        assert_eq!(
            Message::Passed { from: [1; 8], payload: &[9; 300] }.encode()[..12],
            pass_header(true, &[1; 8], 300)
        );
    }

    #[test]
    fn other_versions_and_kinds_are_told_from_rubbish() {
        assert_eq!(Message::decode(&[0xE2, 1, 0, 0]), Err(MessageError::Unknown));
        assert_eq!(Message::decode(&[0xE1, 99, 0, 0]), Err(MessageError::Unknown));
        assert_eq!(Message::decode(&[0x45, 0, 0, 0]), Err(MessageError::Malformed));
        assert!(!is_message(&[0x45]) && !is_message(&[0x60]) && !is_message(&[]));
    }

    #[test]
    fn pieces_that_are_more_than_their_parcel_are_refused() {
        let piece = |total, offset, bytes| Message::Piece(Piece { number: 1, total, offset, bytes }).encode();
        assert!(Message::decode(&piece(4, 2, b"ab")).is_ok());
        for bad in [piece(3, 2, b"ab"), piece(4, u32::MAX, b"ab"), piece(4, 4, b""), piece(1 << 20, 0, b"ab")] {
            assert_eq!(Message::decode(&bad), Err(MessageError::Malformed));
        }
    }

    #[test]
    fn a_stem_bounds_what_begins_with_it() {
        assert_eq!(Stem::ALL.bounds(), (Digest32([0; 32]), Digest32([0xff; 32])));
        let stem = Stem::ALL.child(0xa).and_then(|s| s.child(0xb)).and_then(|s| s.child(0xc)).unwrap();
        let (low, high) = stem.bounds();
        assert_eq!(low.0[..3], [0xab, 0xc0, 0]);
        assert_eq!(high.0[..3], [0xab, 0xcf, 0xff]);
        let deepest = (0..16).try_fold(Stem::ALL, |stem, _| stem.child(1)).unwrap();
        assert_eq!(deepest.child(1), None);
    }

    #[test]
    fn parcels_come_back_and_are_bounded() {
        let record = SignedRecord {
            payload: "{}".into(),
            signer: Digest32([3; 32]),
            sig: HexSignature([4; 64]),
            cosig: Some(HexSignature([5; 64])),
        };
        let plain = SignedRecord { cosig: None, ..record.clone() };
        let advert = SignedAdvert { payload: "x".repeat(advert::MAX_PAYLOAD), sig: HexSignature([6; 64]) };
        for parcel in [Parcel::Record(record.clone()), Parcel::Record(plain), Parcel::Advert(advert)] {
            assert!(parcel.encode().len() <= MAX_PARCEL);
            assert_eq!(Parcel::decode(&parcel.encode()), Some(parcel));
        }
        let long = Parcel::Record(SignedRecord { payload: "x".repeat(record::MAX_PAYLOAD + 1), ..record });
        assert_eq!(Parcel::decode(&long.encode()), None);
        assert_eq!(Parcel::decode(&[]), None);
        assert_eq!(Parcel::decode(&[3; 200]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..9) {
            let _ = Message::decode(&bytes);
            let _ = Parcel::decode(&bytes);
            if bytes.len() >= HEADER {
                bytes[..3].copy_from_slice(&[MARK, kind, 0]);
                if let Ok(message) = Message::decode(&bytes) {
                    let again = message.encode();
                    prop_assert_eq!(Message::decode(&again), Ok(message));
                }
            }
        }
    }
}

//! What two nodes say to each other to find a path: probes on the paths themselves, and sealed messages over the relay.
//!
//! # Probes
//!
//! STUN Binding requests and responses as in ICE connectivity checks (RFC 8445, section 7), authenticated by
//! MESSAGE-INTEGRITY-SHA256 (RFC 8489, section 14.6) with a key only the two nodes can derive. Attributes, in order:
//!
//! ```text
//! request    USERNAME (16 hexadecimal digits: name of the receiver) | 0xC0DE | PADDING? | MESSAGE-INTEGRITY-SHA256 | FINGERPRINT
//! response   XOR-MAPPED-ADDRESS (where the request came from)       | 0xC0DE | PADDING? | MESSAGE-INTEGRITY-SHA256 | FINGERPRINT
//! 0xC0DE     version (1) | purpose (1) | 0 | 0
//! ```
//!
//! Name and key of a request belong to its receiver, as in ICE, and the response uses the key of the request: what I
//! send is never valid when sent back to me. Unknown comprehension-optional attributes are ignored.
//!
//! # Sealed messages
//!
//! ```text
//! 0xC1 | version = 1 | name of the receiver (8) | nonce (24) | XChaCha20-Poly1305 of a [`PeerMessage`] as JSON
//! ```
//!
//! Additional data: those 34 bytes, the sender's and the receiver's WireGuard key. At most [`MAX_SEALED`] bytes.

use std::fmt;
use std::net::SocketAddr;

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use hmac_sha256::HMAC;
use serde::{Deserialize, Deserializer, Serialize};
use subtle::ConstantTimeEq;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::trust::keys::Secret32;
use crate::wire::classify::SEALED;
use crate::wire::keys::{Digest32, WgKey};
use crate::wire::nat::{Mapper, PortModel, Seen};
use crate::wire::stun::{self, Attributes, HEADER, TransactionId, Writer, attribute, kind};

/// Our attribute, comprehension-optional: version and purpose of a probe.
pub const PROBE_ATTRIBUTE: u16 = 0xC0DE;
/// The longest sealed message in bytes: it fits the smallest IPv6 path inside UDP, with room for a relay's header.
pub const MAX_SEALED: usize = 1200;
/// The most candidates a message may hold.
pub const MAX_CANDIDATES: usize = 16;

/// The most TCP addresses a message may hold.
pub const MAX_TCP: usize = 6;

const VERSION: u8 = 1;
/// The only purpose so far: does this path carry packets both ways.
const PATH_CHECK: u8 = 1;
const DOMAIN: &[u8] = b"meshd probe v1";
const SEALED_HEADER: usize = 2 + 8 + 24;
const TAG: usize = 16;
/// The longest text in `mapping` and `filtering`, in bytes.
const MAX_WORD: usize = 64;

/// What two nodes share for finding paths: derived from their WireGuard keys, so nobody in between has it.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct ProbeKeys {
    /// Password of requests to me and their responses: 64 hexadecimal digits, so that any STUN library can use it.
    inbound_mac: [u8; 64],
    /// Password of requests to the peer and their responses.
    outbound_mac: [u8; 64],
    seal: [u8; 32],
    #[zeroize(skip)]
    inbound_name: [u8; 8],
    #[zeroize(skip)]
    outbound_name: [u8; 8],
    #[zeroize(skip)]
    me: WgKey,
    #[zeroize(skip)]
    peer: WgKey,
}

impl ProbeKeys {
    /// Derives the keys shared with `peer`. None if its key is not one (X25519 gives zero), or is mine.
    #[must_use]
    pub fn derive(my_secret: &Secret32, my_public: &WgKey, peer: &WgKey) -> Option<Self> {
        let shared = StaticSecret::from(*my_secret.expose()).diffie_hellman(&PublicKey::from(peer.0));
        if !shared.was_contributory() || my_public == peer {
            return None;
        }
        let (low, high) = if my_public < peer { (my_public, peer) } else { (peer, my_public) };
        let root = Zeroizing::new(Digest32::of(&[DOMAIN, shared.as_bytes(), &low.0, &high.0]).0);
        let part = |label: &[u8], receiver: &[u8]| Digest32::of(&[DOMAIN, label, &*root, receiver]);
        let name = |receiver: &WgKey| {
            let mut name = [0; 8];
            name.copy_from_slice(&part(b"name", &receiver.0).0[..8]);
            name
        };
        let password = |receiver: &WgKey| hex(&Zeroizing::new(part(b"mac", &receiver.0).0));
        Some(Self {
            inbound_mac: password(my_public),
            outbound_mac: password(peer),
            seal: part(b"seal", &[]).0,
            inbound_name: name(my_public),
            outbound_name: name(peer),
            me: *my_public,
            peer: *peer,
        })
    }

    /// The name in probes and sealed messages that come to me from this peer.
    #[must_use]
    pub const fn inbound_name(&self) -> [u8; 8] {
        self.inbound_name
    }

    /// The name in probes and sealed messages that I send to this peer.
    #[must_use]
    pub const fn outbound_name(&self) -> [u8; 8] {
        self.outbound_name
    }
}

/// Shows no keys.
impl fmt::Debug for ProbeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProbeKeys").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// A probe that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeRequest {
    /// To be repeated in the response.
    pub txid: TransactionId,
    /// Bytes of the whole probe.
    pub len: usize,
}

/// A probe that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeResponse {
    /// Of the request.
    pub txid: TransactionId,
    /// Where the peer saw the request come from.
    pub observed: SocketAddr,
    /// Bytes of the whole probe.
    pub len: usize,
}

/// Why bytes are no probe from this peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Not a STUN message of that kind, or a part is missing or out of place.
    #[error("not a well-formed path probe")]
    Malformed,
    /// It names another receiver.
    #[error("the path probe is for another node")]
    WrongName,
    /// A version or a required attribute that this program does not know.
    #[error("the path probe needs a newer version")]
    Unsupported,
    /// The integrity check fails: not from this peer, or altered.
    #[error("the path probe is not from this peer")]
    BadIntegrity,
}

/// Writes a request. With `pad_to` the whole UDP payload is that many bytes long (rounded down to a multiple of four, as
/// STUN has it, and never shorter than what must be said, 92 bytes).
#[must_use]
pub fn encode_request(keys: &ProbeKeys, txid: &TransactionId, pad_to: Option<usize>) -> Vec<u8> {
    let mut message = Writer::current(kind::BINDING_REQUEST, txid);
    message.attribute(attribute::USERNAME, &hex::<8, 16>(&keys.outbound_name));
    finish(message, &keys.outbound_mac, pad_to)
}

/// Writes the response to a request that came from `observed`.
#[must_use]
pub fn encode_response(keys: &ProbeKeys, txid: &TransactionId, observed: SocketAddr, pad_to: Option<usize>) -> Vec<u8> {
    let mut message = Writer::current(kind::BINDING_SUCCESS, txid);
    message.xor_address(attribute::XOR_MAPPED_ADDRESS, observed);
    finish(message, &keys.inbound_mac, pad_to)
}

/// The receiver's name in something that looks like a request; who it belongs to is not proven. Cheap.
#[must_use]
pub fn name_of(bytes: &[u8]) -> Option<[u8; 8]> {
    stun::transaction_id(bytes)?;
    let is_request = bytes.first_chunk::<2>() == Some(&kind::BINDING_REQUEST.to_be_bytes());
    is_request.then(|| stun::find(bytes, attribute::USERNAME)).flatten().and_then(unhex)
}

/// True for something that looks like a response, from a peer or from a STUN server.
#[must_use]
pub fn is_response(bytes: &[u8]) -> bool {
    let kind = bytes.first_chunk::<2>().map(|k| u16::from_be_bytes(*k));
    stun::transaction_id(bytes).is_some() && matches!(kind, Some(kind::BINDING_SUCCESS | kind::BINDING_ERROR))
}

/// The transaction id of anything that has a STUN header.
#[must_use]
pub fn transaction_id(bytes: &[u8]) -> Option<TransactionId> {
    stun::transaction_id(bytes)
}

/// Reads a request from the peer.
///
/// # Errors
/// See [`ProbeError`].
pub fn decode_request(keys: &ProbeKeys, bytes: &[u8]) -> Result<ProbeRequest, ProbeError> {
    let txid = check(bytes, kind::BINDING_REQUEST)?;
    let name = stun::find(bytes, attribute::USERNAME).and_then(unhex).ok_or(ProbeError::Malformed)?;
    if name != keys.inbound_name {
        return Err(ProbeError::WrongName);
    }
    authenticate(bytes, &keys.inbound_mac)?;
    Ok(ProbeRequest { txid, len: bytes.len() })
}

/// Reads a response from the peer. The caller knows the transaction.
///
/// # Errors
/// See [`ProbeError`].
pub fn decode_response(keys: &ProbeKeys, bytes: &[u8]) -> Result<ProbeResponse, ProbeError> {
    let txid = check(bytes, kind::BINDING_SUCCESS)?;
    authenticate(bytes, &keys.outbound_mac)?;
    let observed = stun::find(bytes, attribute::XOR_MAPPED_ADDRESS)
        .and_then(|value| stun::read_xor_address(value, &txid))
        .ok_or(ProbeError::Malformed)?;
    Ok(ProbeResponse { txid, observed, len: bytes.len() })
}

fn finish(mut message: Writer, mac: &[u8; 64], pad_to: Option<usize>) -> Vec<u8> {
    const INTEGRITY_AND_FINGERPRINT: usize = 4 + 32 + 4 + 4;
    message.attribute(PROBE_ATTRIBUTE, &[VERSION, PATH_CHECK, 0, 0]);
    let len = message.len() + INTEGRITY_AND_FINGERPRINT;
    // Padding costs at least its own header.
    if let Some(value) = pad_to.and_then(|to| (to & !3).checked_sub(len + 4)) {
        message.attribute(attribute::PADDING, &vec![0; value.min(64_000)]);
    }
    message.computed(attribute::MESSAGE_INTEGRITY_SHA256, |before| HMAC::mac(before, mac));
    message.fingerprint();
    message.finish()
}

/// Everything but who it is from.
fn check(bytes: &[u8], expected: u16) -> Result<TransactionId, ProbeError> {
    let txid = stun::transaction_id(bytes).ok_or(ProbeError::Malformed)?;
    let kind_fits = bytes.first_chunk::<2>() == Some(&expected.to_be_bytes());
    if !kind_fits || !stun::is_well_formed(bytes) || stun::fingerprint(bytes) != Some(true) {
        return Err(ProbeError::Malformed);
    }
    match stun::find(bytes, PROBE_ATTRIBUTE) {
        Some([VERSION, PATH_CHECK, ..]) => {}
        Some(_) => return Err(ProbeError::Unsupported),
        None => return Err(ProbeError::Malformed),
    }
    let known = |kind| {
        matches!(
            kind,
            attribute::USERNAME
                | attribute::XOR_MAPPED_ADDRESS
                | attribute::PADDING
                | attribute::MESSAGE_INTEGRITY_SHA256
        )
    };
    if Attributes::of(bytes).flatten().any(|a| attribute::is_required(a.kind) && !known(a.kind)) {
        return Err(ProbeError::Unsupported);
    }
    Ok(txid)
}

/// MESSAGE-INTEGRITY-SHA256 must be whole (32 bytes), and nothing but FINGERPRINT may follow it.
fn authenticate(bytes: &[u8], mac: &[u8; 64]) -> Result<(), ProbeError> {
    let attribute = Attributes::of(bytes)
        .flatten()
        .find(|a| a.kind == attribute::MESSAGE_INTEGRITY_SHA256)
        .filter(|a| a.value.len() == 32 && a.at + 36 + 8 == bytes.len())
        .ok_or(ProbeError::Malformed)?;
    // The check covers a length field that ends with the attribute.
    let mut covered = bytes.get(..attribute.at).ok_or(ProbeError::Malformed)?.to_vec();
    let len = u16::try_from(attribute.at + 36 - HEADER).map_err(|_| ProbeError::Malformed)?;
    covered.get_mut(2..4).ok_or(ProbeError::Malformed)?.copy_from_slice(&len.to_be_bytes());
    let good: bool = HMAC::mac(&covered, mac)[..].ct_eq(attribute.value).into();
    if good { Ok(()) } else { Err(ProbeError::BadIntegrity) }
}

/// What two planners say to each other. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeerMessage {
    /// 1.
    pub v: u8,
    /// Strictly increasing per sender, also across restarts: an older or equal one is a replay.
    pub n: u64,
    /// What it is.
    pub kind: MessageKind,
    /// Number of the attempt it belongs to.
    #[serde(default)]
    pub round: u32,
    /// A time of the sender's clock, to be echoed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t: Option<u64>,
    /// The receiver's `t`, plus how long the sender held it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<u64>,
    /// Where the sender may be reached, best first; at most [`MAX_CANDIDATES`]. One of a kind unknown here is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "known_candidates")]
    pub candidates: Vec<Candidate>,
    /// The sender's NAT mapping behaviour, an RFC 4787 name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<String>,
    /// The sender's NAT filtering behaviour, an RFC 4787 name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filtering: Option<String>,
    /// Whether UDP leaves and comes back at the sender's; absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp: Option<bool>,
    /// How the sender's NAT chooses ports; absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<PortModel>,
    /// The sender's IPv4 port: the one to forward in its router; absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Whether the sender's router maps ports when asked.
    #[serde(default, skip_serializing_if = "Mapper::is_unknown")]
    pub mapper: Mapper,
    /// What the sender saw of the last round, if that found no path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Seen>,
    /// In an answer: the sender has sent to the caller's candidates, so that its NAT lets the caller in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primed: Option<bool>,
    /// In a call: the sender uses a fresh port for this round, and so should the receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fresh: Option<bool>,
    /// Where the sender listens for TCP connections and makes them from, as seen from outside and by itself: given when one of
    /// the two has no UDP. At most [`MAX_TCP`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tcp: Vec<SocketAddr>,
    /// For so many seconds at least the sender's NAT keeps a UDP mapping that nobody uses; absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<u16>,
    /// The sender's part in a punch with many sockets or ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub punch: Option<Punch>,
}

/// The kinds of peer message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MessageKind {
    /// Let us find a path; here are my candidates.
    #[default]
    Call,
    /// Answer to a call, with the answerer's candidates.
    Answer,
    /// Start probing now.
    Go,
    /// What the sender learned for a punch with many sockets or ports.
    Ports,
}

/// The most numbers in a [`Punch`].
pub const MAX_NUMBERS: usize = 96;

/// One side's part in a punch with many sockets or ports (`engine/path/technique.rs`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Punch {
    /// What the sender does.
    pub role: Role,
    /// External ports of the sender to try, the likeliest first; at most [`MAX_NUMBERS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<u16>,
    /// Lowest and highest external port the sender's sockets may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<(u16, u16)>,
    /// Where the sender's NAT is in its counting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counter: Option<Counter>,
}

/// A NAT that counts its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// The port of the next mapping at the time of measuring.
    pub next: u16,
    /// From one mapping to the next.
    pub step: i16,
    /// Mappings of others in a second.
    pub per_second: u16,
    /// Microseconds from measuring to sending.
    pub age: u64,
}

/// What one side does in a punch with many sockets or ports. Each has one counterpart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Opens several sockets towards the other side and tells which ports they may have.
    Opens,
    /// Tries those ports.
    Scans,
    /// Both count: each sends to a row of the other's next ports.
    Strides,
    /// Both draw from small blocks: each sends from several sockets to many ports of the other's block.
    Grid,
    /// Counts, and sends to ports of the other's block.
    Counts,
    /// Draws from a block, and sends from several sockets to each of the other's next ports.
    Guesses,
    /// Cannot take part now.
    Busy,
    /// Something a newer version does.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Role {
    /// What the other side does.
    #[must_use]
    pub const fn counterpart(self) -> Self {
        match self {
            Self::Opens => Self::Scans,
            Self::Scans => Self::Opens,
            Self::Strides => Self::Strides,
            Self::Grid => Self::Grid,
            Self::Counts => Self::Guesses,
            Self::Guesses => Self::Counts,
            Self::Busy => Self::Busy,
            Self::Unknown => Self::Unknown,
        }
    }
}

/// An address a node may be reached at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// Where.
    pub addr: SocketAddr,
    /// How it was learned.
    pub kind: CandidateKind,
}

/// How a candidate was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateKind {
    /// An address of the machine itself.
    Host,
    /// What a STUN server or a peer saw.
    Reflexive,
    /// A port mapping granted by the router.
    Mapped,
}

/// Why bytes are no sealed message from this peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealedError {
    /// Too short, too long, or the content is not a message.
    #[error("not a well-formed sealed message")]
    Malformed,
    /// A version this program does not know.
    #[error("the sealed message needs a newer version")]
    Unsupported,
    /// It names another receiver.
    #[error("the sealed message is for another node")]
    WrongName,
    /// It does not open: not from this peer, or altered.
    #[error("the sealed message is not from this peer")]
    BadSeal,
}

/// Seals a message to the peer. `nonce` must be fresh: draw it at random. Of too much, the last candidates and then the
/// words are left out.
#[must_use]
pub fn seal(keys: &ProbeKeys, message: &PeerMessage, nonce: [u8; 24]) -> Vec<u8> {
    let plain = fitting_json(message);
    let mut out = Vec::with_capacity(SEALED_HEADER + plain.len() + TAG);
    out.extend_from_slice(&[SEALED, VERSION]);
    out.extend_from_slice(&keys.outbound_name);
    out.extend_from_slice(&nonce);
    let aad = additional_data(&out, &keys.me, &keys.peer);
    let cipher = XChaCha20Poly1305::new(&keys.seal.into());
    // Fails only for more plaintext than the cipher can count, 256 GiB.
    let sealed = cipher.encrypt(XNonce::from_slice(&nonce), Payload { msg: &plain, aad: &aad });
    out.extend_from_slice(&sealed.unwrap_or_default());
    out
}

/// Opens a sealed message from the peer.
///
/// # Errors
/// See [`SealedError`].
pub fn open(keys: &ProbeKeys, bytes: &[u8]) -> Result<PeerMessage, SealedError> {
    if bytes.len() > MAX_SEALED || bytes.first() != Some(&SEALED) {
        return Err(SealedError::Malformed);
    }
    if bytes.get(1).is_some_and(|version| *version != VERSION) {
        return Err(SealedError::Unsupported);
    }
    let (header, sealed) = bytes.split_first_chunk::<SEALED_HEADER>().ok_or(SealedError::Malformed)?;
    if header[2..10] != keys.inbound_name {
        return Err(SealedError::WrongName);
    }
    let aad = additional_data(header, &keys.peer, &keys.me);
    let cipher = XChaCha20Poly1305::new(&keys.seal.into());
    let plain = cipher
        .decrypt(XNonce::from_slice(&header[10..]), Payload { msg: sealed, aad: &aad })
        .map_err(|_| SealedError::BadSeal)?;
    let message: PeerMessage = serde_json::from_slice(&plain).map_err(|_| SealedError::Malformed)?;
    let too_long = |word: &Option<String>| word.as_ref().is_some_and(|w| w.len() > MAX_WORD);
    if too_long(&message.mapping) || too_long(&message.filtering) || message.tcp.len() > MAX_TCP {
        return Err(SealedError::Malformed);
    }
    if message.v == VERSION { Ok(message) } else { Err(SealedError::Unsupported) }
}

/// The receiver's name in something that looks like a sealed message; who it belongs to is not proven. Cheap.
#[must_use]
pub fn sealed_name(bytes: &[u8]) -> Option<[u8; 8]> {
    match bytes.split_first_chunk::<2>() {
        Some(([SEALED, _], rest)) => rest.first_chunk::<8>().copied(),
        _ => None,
    }
}

fn additional_data(header: &[u8], sender: &WgKey, receiver: &WgKey) -> Vec<u8> {
    [header, &sender.0, &receiver.0].concat()
}

/// The message as JSON that fits, leaving out what fits least.
fn fitting_json(message: &PeerMessage) -> Vec<u8> {
    let mut message = message.clone();
    message.candidates.truncate(MAX_CANDIDATES);
    loop {
        let json = serde_json::to_vec(&message).unwrap_or_default();
        if json.len() <= MAX_SEALED - SEALED_HEADER - TAG {
            return json;
        }
        if message.candidates.pop().is_none() {
            message.mapping = None;
            message.filtering = None;
        }
    }
}

fn known_candidates<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Candidate>, D::Error> {
    let list = Vec::<serde_json::Value>::deserialize(d)?;
    if list.len() > MAX_CANDIDATES {
        return Err(serde::de::Error::custom("too many candidates"));
    }
    Ok(list.into_iter().filter_map(|value| serde_json::from_value(value).ok()).collect())
}

fn hex<const N: usize, const TWO_N: usize>(bytes: &[u8; N]) -> [u8; TWO_N] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|i| {
        let byte = bytes[i / 2];
        DIGITS[usize::from(if i % 2 == 0 { byte >> 4 } else { byte & 15 })]
    })
}

fn unhex(text: &[u8]) -> Option<[u8; 8]> {
    let text: &[u8; 16] = text.try_into().ok()?;
    let mut out = [0; 8];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests;

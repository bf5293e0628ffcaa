//! The Noise protocol between node and coordinator, without any I/O.
//!
//! ```text
//! node → coordinator   message 1 of Noise_IK, payload: JSON Offer
//! node ← coordinator   message 2 of Noise_IK, payload: JSON Answer
//! node → coordinator   one transport message: an empty chunk (the confirmation)
//! afterwards, on a control link, transport messages both ways, each
//!                      more: u8 (0: last, 1: more follows) | chunk
//! ```
//!
//! The first message of IK can be replayed by whoever recorded it (Noise specification revision 34, section 7.7), so the
//! coordinator believes the node's key only after the confirmation, which needs the fresh session keys.
//!
//! Each direction is re-keyed (section 4.2 of the specification) after every [`REKEY_EVERY`] messages, counted by both
//! sides, and a nonce that ran out would end the link rather than repeat.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use snow::{Builder, HandshakeState, TransportState};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::trust::keys::Secret32;
use crate::wire::control::{MAX_MESSAGE, refusal};
use crate::wire::keys::ControlKey;
use crate::wire::version::{self, VersionRange};

/// The Noise protocol's full name.
pub const PROTOCOL: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
/// The longest Noise message in bytes (specification section 3).
pub const MAX_NOISE: usize = 65_535;
/// Bytes of the authentication tag.
const TAG: usize = 16;
/// The longest chunk of a control message in one transport message.
pub const MAX_CHUNK: usize = MAX_NOISE - TAG - 1;
/// Transport messages in one direction after which that direction gets a new key.
pub const REKEY_EVERY: u64 = 1 << 16;

/// What a connection is for. Part of the handshake's prologue, so one cannot be passed off as the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Control messages.
    Control,
    /// Relay frames.
    Relay,
}

impl Purpose {
    /// The HTTP path, after the coordinator URL's own path.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Control => "/v1/control",
            Self::Relay => "/v1/relay",
        }
    }

    /// The versions this program speaks.
    #[must_use]
    pub const fn versions(self) -> VersionRange {
        match self {
            Self::Control => version::CONTROL,
            Self::Relay => version::RELAY,
        }
    }

    const fn prologue(self) -> &'static [u8] {
        match self {
            Self::Control => b"meshd noise v1 control",
            Self::Relay => b"meshd noise v1 relay",
        }
    }
}

/// The node's side of the version agreement: the payload of message 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// What the node can speak.
    pub versions: VersionRange,
    /// Program version, for people.
    pub program: String,
}

/// The coordinator's side: the payload of message 2. Exactly one of `version` and `error` is present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The version chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u16>,
    /// Program version, for people.
    pub program: String,
    /// Why there is no version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<AnswerError>,
    /// With `error`: what the coordinator can speak.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub versions: Option<VersionRange>,
}

/// A refusal inside an [`Answer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerError {
    /// A stable word; `version` is the only one so far.
    pub code: String,
    /// What and why.
    pub text: String,
    /// What to do.
    pub hint: String,
}

/// Why bytes are not the message that was due. After any of these the link cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoiseError {
    /// The message does not decrypt: another key, another purpose, or altered bytes.
    #[error("the message does not decrypt")]
    Decrypt,
    /// It decrypts but does not have the shape it must have.
    #[error("the message is malformed: {0}")]
    Malformed(&'static str),
    /// A control message over [`MAX_MESSAGE`] bytes.
    #[error("the message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The cipher refused: out of nonces or out of randomness.
    #[error("the cipher cannot go on")]
    Cipher,
}

/// The public key of a control secret.
#[must_use]
pub fn public_key(secret: &Secret32) -> ControlKey {
    ControlKey(PublicKey::from(&StaticSecret::from(*secret.expose())).to_bytes())
}

fn builder<'a>(secret: &'a Secret32, purpose: Purpose) -> Result<Builder<'a>, NoiseError> {
    let params = PROTOCOL.parse().map_err(|_| NoiseError::Cipher)?;
    Builder::new(params)
        .prologue(purpose.prologue())
        .and_then(|b| b.local_private_key(secret.expose()))
        .map_err(|_| NoiseError::Cipher)
}

fn write(state: &mut HandshakeState, payload: &impl Serialize) -> Result<Vec<u8>, NoiseError> {
    let payload = serde_json::to_vec(payload).map_err(|_| NoiseError::Cipher)?;
    let mut message = vec![0; MAX_NOISE];
    let len = state.write_message(&payload, &mut message).map_err(|_| NoiseError::Cipher)?;
    message.truncate(len);
    Ok(message)
}

fn read(state: &mut HandshakeState, message: &[u8]) -> Result<Vec<u8>, NoiseError> {
    let mut payload = vec![0; message.len()];
    let len = state.read_message(message, &mut payload).map_err(|_| NoiseError::Decrypt)?;
    payload.truncate(len);
    Ok(payload)
}

/// The node's handshake, waiting for the coordinator's message.
#[derive(Debug)]
pub struct Initiator {
    state: Box<HandshakeState>,
}

impl Initiator {
    /// Begins a handshake; returns message 1.
    ///
    /// # Errors
    /// [`NoiseError::Cipher`] without randomness, or when `coordinator` is not a usable key.
    pub fn start(
        secret: &Secret32,
        coordinator: &ControlKey,
        purpose: Purpose,
        offer: &Offer,
    ) -> Result<(Self, Vec<u8>), NoiseError> {
        let mut state = builder(secret, purpose)?
            .remote_public_key(coordinator.as_bytes())
            .and_then(Builder::build_initiator)
            .map_err(|_| NoiseError::Cipher)?;
        let message = write(&mut state, offer)?;
        Ok((Self { state: Box::new(state) }, message))
    }

    /// Reads message 2. The session may be used if the answer holds a version.
    ///
    /// # Errors
    /// [`NoiseError::Decrypt`]: whoever answered does not hold the coordinator's key.
    pub fn finish(mut self, message: &[u8]) -> Result<(Answer, Session), NoiseError> {
        let payload = read(&mut self.state, message)?;
        let answer =
            serde_json::from_slice(&payload).map_err(|_| NoiseError::Malformed("the answer is not readable"))?;
        Ok((answer, Session::new(*self.state)?))
    }
}

/// What the coordinator made of message 1.
#[derive(Debug)]
pub struct Responded {
    /// The node's control key, not to be believed before the confirmation.
    pub key: ControlKey,
    /// What the node offered.
    pub offer: Offer,
    /// Message 2, to be sent in every case.
    pub reply: Vec<u8>,
    /// The version and the session; absent when no version is common.
    pub agreed: Option<(u16, Session)>,
}

/// The coordinator's handshake: reads message 1, makes message 2.
///
/// # Errors
/// [`NoiseError::Decrypt`]: the message was made for another key or purpose, or is no handshake at all.
pub fn respond(
    secret: &Secret32,
    purpose: Purpose,
    versions: VersionRange,
    message: &[u8],
) -> Result<Responded, NoiseError> {
    let mut state = builder(secret, purpose)?.build_responder().map_err(|_| NoiseError::Cipher)?;
    let payload = read(&mut state, message)?;
    let offer: Offer =
        serde_json::from_slice(&payload).map_err(|_| NoiseError::Malformed("the offer is not readable"))?;
    let key = state.get_remote_static().and_then(|k| k.try_into().ok()).map(ControlKey).ok_or(NoiseError::Decrypt)?;
    let common = versions.common(offer.versions);
    let reply = write(&mut state, &answer(common, versions, &offer))?;
    let session = Session::new(state)?;
    Ok(Responded { key, offer, reply, agreed: common.map(|version| (version, session)) })
}

fn answer(common: Option<u16>, ours: VersionRange, offer: &Offer) -> Answer {
    let program = version::PROGRAM.to_owned();
    if common.is_some() {
        return Answer { version: common, program, error: None, versions: None };
    }
    let (text, hint) = if offer.versions.max < ours.min {
        (
            format!("this node runs meshd {}, too old for the coordinator's {program}", offer.program),
            "upgrade meshd on this machine",
        )
    } else {
        (
            format!("this node runs meshd {}, too new for the coordinator's {program}", offer.program),
            "upgrade meshd on the coordinator's machine",
        )
    };
    let error = AnswerError { code: refusal::VERSION.to_owned(), text, hint: hint.to_owned() };
    Answer { version: None, program, error: Some(error), versions: Some(ours) }
}

/// Session keys after the handshake.
#[derive(Debug)]
pub struct Session {
    state: TransportState,
}

impl Session {
    fn new(state: HandshakeState) -> Result<Self, NoiseError> {
        state.into_transport_mode().map(|state| Self { state }).map_err(|_| NoiseError::Cipher)
    }

    /// The two directions. They share one cipher state behind a lock that is held for one message at a time.
    #[must_use]
    pub fn split(self) -> (Sealer, Opener) {
        let state = Arc::new(Mutex::new(self.state));
        (Sealer { state: Arc::clone(&state), sealed: 0 }, Opener { state, opened: 0, partial: Vec::new() })
    }
}

/// Encrypts control messages. The results must be sent in order, all of them.
#[derive(Debug)]
pub struct Sealer {
    state: Arc<Mutex<TransportState>>,
    sealed: u64,
}

impl Sealer {
    /// How many transport messages a control message of this length becomes.
    ///
    /// # Errors
    /// [`NoiseError::TooLong`].
    pub const fn count(len: usize) -> Result<usize, NoiseError> {
        if len > MAX_MESSAGE {
            return Err(NoiseError::TooLong);
        }
        Ok(if len == 0 { 1 } else { len.div_ceil(MAX_CHUNK) })
    }

    /// Encrypts one control message into [`Sealer::count`] transport messages.
    ///
    /// # Errors
    /// [`NoiseError::TooLong`] (nothing was sealed, the link can go on) or [`NoiseError::Cipher`].
    pub fn seal(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>, NoiseError> {
        let count = Self::count(message.len())?;
        let mut chunks = message.chunks(MAX_CHUNK);
        (1..=count).map(|i| self.seal_chunk(i < count, chunks.next().unwrap_or_default())).collect()
    }

    fn seal_chunk(&mut self, more: bool, chunk: &[u8]) -> Result<Vec<u8>, NoiseError> {
        let mut plain = Vec::with_capacity(1 + chunk.len());
        plain.push(u8::from(more));
        plain.extend_from_slice(chunk);
        let mut out = vec![0; plain.len() + TAG];
        let mut state = self.state.lock();
        let len = state.write_message(&plain, &mut out).map_err(|_| NoiseError::Cipher)?;
        out.truncate(len);
        self.sealed += 1;
        if self.sealed.is_multiple_of(REKEY_EVERY) {
            state.rekey_outgoing();
        }
        Ok(out)
    }
}

/// Decrypts transport messages and puts control messages together again.
#[derive(Debug)]
pub struct Opener {
    state: Arc<Mutex<TransportState>>,
    opened: u64,
    partial: Vec<u8>,
}

impl Opener {
    /// Takes the next transport message; returns a control message when it is complete.
    ///
    /// # Errors
    /// Any [`NoiseError`]; the link cannot go on.
    pub fn open(&mut self, message: &[u8]) -> Result<Option<Vec<u8>>, NoiseError> {
        let mut plain = vec![0; message.len()];
        {
            let mut state = self.state.lock();
            let len = state.read_message(message, &mut plain).map_err(|_| NoiseError::Decrypt)?;
            plain.truncate(len);
            self.opened += 1;
            if self.opened.is_multiple_of(REKEY_EVERY) {
                state.rekey_incoming();
            }
        }
        let (more, chunk) = match plain.split_first() {
            Some((0, chunk)) => (false, chunk),
            Some((1, [])) => return Err(NoiseError::Malformed("an empty chunk that is not the last")),
            Some((1, chunk)) => (true, chunk),
            Some(_) => return Err(NoiseError::Malformed("unknown chunk kind")),
            None => return Err(NoiseError::Malformed("no chunk kind")),
        };
        if self.partial.len() + chunk.len() > MAX_MESSAGE {
            return Err(NoiseError::TooLong);
        }
        self.partial.extend_from_slice(chunk);
        Ok((!more).then(|| std::mem::take(&mut self.partial)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: VersionRange = VersionRange { min: 1, max: 1 };

    fn offer(versions: VersionRange) -> Offer {
        Offer { versions, program: "0.1.0".into() }
    }

    /// A finished handshake: (node, coordinator).
    fn sessions(purpose: Purpose) -> (Session, Session) {
        let (node, coordinator) = (Secret32::new([1; 32]), Secret32::new([2; 32]));
        let (initiator, first) = Initiator::start(&node, &public_key(&coordinator), purpose, &offer(V1)).unwrap();
        let responded = respond(&coordinator, purpose, V1, &first).unwrap();
        assert_eq!(responded.key, public_key(&node));
        let (answer, session) = initiator.finish(&responded.reply).unwrap();
        assert_eq!(answer.version, Some(1));
        (session, responded.agreed.unwrap().1)
    }

    #[test]
    fn messages_of_every_size_cross_both_ways() {
        let (node, coordinator) = sessions(Purpose::Control);
        let (mut node_seal, mut node_open) = node.split();
        let (mut coord_seal, mut coord_open) = coordinator.split();
        for len in [0, 1, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, MAX_MESSAGE] {
            let message: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            for (seal, open) in [(&mut node_seal, &mut coord_open), (&mut coord_seal, &mut node_open)] {
                let sealed = seal.seal(&message).unwrap();
                assert_eq!(sealed.len(), Sealer::count(len).unwrap());
                assert!(sealed.iter().all(|m| m.len() <= MAX_NOISE));
                let mut opened: Vec<_> = sealed.iter().map(|m| open.open(m).unwrap()).collect();
                assert_eq!(opened.pop().unwrap().as_deref(), Some(message.as_slice()));
                assert!(opened.iter().all(Option::is_none));
            }
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_by_both_sides() {
        let (node, coordinator) = sessions(Purpose::Control);
        let (mut seal, _node_open) = node.split();
        let (_coord_seal, mut open) = coordinator.split();
        assert_eq!(seal.seal(&vec![0; MAX_MESSAGE + 1]), Err(NoiseError::TooLong));
        let chunk = vec![0; MAX_CHUNK];
        let ends = (0..20).find_map(|_| open.open(&seal.seal_chunk(true, &chunk).unwrap()).err());
        assert_eq!(ends, Some(NoiseError::TooLong));
    }

    #[test]
    fn replayed_reordered_and_altered_messages_do_not_open() {
        let (node, coordinator) = sessions(Purpose::Control);
        let (mut seal, _node_open) = node.split();
        let (_coord_seal, mut open) = coordinator.split();
        let first = seal.seal(b"one").unwrap().remove(0);
        let second = seal.seal(b"two").unwrap().remove(0);
        assert_eq!(open.open(&second), Err(NoiseError::Decrypt));
        let mut altered = first.clone();
        altered[0] ^= 1;
        assert_eq!(open.open(&altered), Err(NoiseError::Decrypt));
        assert_eq!(open.open(&first), Ok(Some(b"one".to_vec())));
        assert_eq!(open.open(&first), Err(NoiseError::Decrypt));
        assert_eq!(open.open(&[]), Err(NoiseError::Decrypt));
    }

    #[test]
    fn the_keys_change_on_both_sides_at_the_same_message() {
        let (node, coordinator) = sessions(Purpose::Control);
        let (mut seal, _node_open) = node.split();
        let (_coord_seal, mut open) = coordinator.split();
        for i in 0..=REKEY_EVERY + 1 {
            let sealed = seal.seal(&i.to_be_bytes()).unwrap().remove(0);
            assert_eq!(open.open(&sealed).unwrap().as_deref(), Some(i.to_be_bytes().as_slice()), "message {i}");
        }
    }

    #[test]
    fn another_key_or_another_purpose_does_not_decrypt() {
        let (node, coordinator) = (Secret32::new([1; 32]), Secret32::new([2; 32]));
        let key = public_key(&coordinator);
        let (_, first) = Initiator::start(&node, &key, Purpose::Control, &offer(V1)).unwrap();
        let other = respond(&Secret32::new([3; 32]), Purpose::Control, V1, &first);
        assert_eq!(other.err(), Some(NoiseError::Decrypt));
        assert_eq!(respond(&coordinator, Purpose::Relay, V1, &first).err(), Some(NoiseError::Decrypt));
        for end in 0..first.len() {
            assert_eq!(respond(&coordinator, Purpose::Control, V1, &first[..end]).err(), Some(NoiseError::Decrypt));
        }
        let (initiator, _) = Initiator::start(&node, &key, Purpose::Control, &offer(V1)).unwrap();
        assert_eq!(initiator.finish(&[0; 100]).err(), Some(NoiseError::Decrypt));
    }

    #[test]
    fn without_a_common_version_the_answer_says_which_side_to_upgrade() {
        let (node, coordinator) = (Secret32::new([1; 32]), Secret32::new([2; 32]));
        let range = |min, max| VersionRange { min, max };
        for (ours, theirs, machine) in
            [(range(1, 1), range(2, 3), "this machine"), (range(4, 5), range(2, 3), "coordinator's")]
        {
            let (initiator, first) =
                Initiator::start(&node, &public_key(&coordinator), Purpose::Control, &offer(ours)).unwrap();
            let responded = respond(&coordinator, Purpose::Control, theirs, &first).unwrap();
            assert!(responded.agreed.is_none());
            let (answer, _) = initiator.finish(&responded.reply).unwrap();
            let error = answer.error.unwrap();
            assert_eq!((error.code.as_str(), answer.version, answer.versions), ("version", None, Some(theirs)));
            assert!(error.hint.contains(machine), "{}", error.hint);
        }
    }
}

//! Claim and invite tokens: one line that a person can copy, with a checksum so that a truncated paste says so.
//!
//! ```text
//! token   = prefix, base64url(body, checksum) without padding (RFC 4648 section 5)
//! checksum: the first 6 bytes of BLAKE2s over the prefix and the body
//!
//! body    of a claim:  urls | coordinator key (32) | secret (32)
//! body    of an invite: urls | coordinator key (32) | network id (32) | secret (32)
//!                       | length (u16) | the Invite record's payload | its signer (32) | its signature (64)
//! urls    = count (u8), and for each: length (u16) | UTF-8
//! ```
//!
//! Numbers are big-endian. The body has no optional parts: another layout gets another number in the prefix.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::trust::founding::invite_key;
use crate::trust::keys::Secret32;
use crate::trust::record::{HexSignature, Invite, Record, SignedRecord};
use crate::wire::keys::{ControlKey, Digest32, NetworkId};

/// Starts a claim token.
pub const CLAIM_PREFIX: &str = "meshd-claim1-";
/// Starts an invite token.
pub const INVITE_PREFIX: &str = "meshd-invite1-";

/// A token, decoded. `Debug` shows no secret.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a process holds one")]
pub enum Token {
    /// Founds the network on a fresh coordinator.
    Claim(ClaimToken),
    /// Joins a network.
    Invite(InviteToken),
}

/// What a claim token holds.
#[derive(Debug)]
pub struct ClaimToken {
    /// Coordinator URLs, the first tried first.
    pub urls: Vec<String>,
    /// The coordinator's Noise key.
    pub coordinator: ControlKey,
    /// Proves that the holder was given the coordinator's claim.
    pub secret: Secret32,
}

/// What an invite token holds.
#[derive(Debug)]
pub struct InviteToken {
    /// Coordinator URLs, the first tried first.
    pub urls: Vec<String>,
    /// The coordinator's Noise key.
    pub coordinator: ControlKey,
    /// The network this node will verify everything against.
    pub network: NetworkId,
    /// The invite's ed25519 secret.
    pub secret: Secret32,
    /// The Invite record.
    pub invite: SignedRecord,
}

/// The most coordinator URLs in a token.
pub const MAX_URLS: usize = 16;
/// The longest URL in a token, in bytes.
pub const MAX_URL: usize = 2_048;
/// Longer text is no token: room for a full set of URLs and the longest record, in base64.
const MAX_TOKEN: usize = (MAX_URLS * (MAX_URL + 2) + crate::trust::record::MAX_PAYLOAD + 512) / 3 * 4;
/// Bytes of the checksum.
const CHECKSUM: usize = 6;

/// Why text is not a token: each says what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No meshd prefix.
    #[error("this is not a meshd token (one starts with meshd-claim1- or meshd-invite1-)")]
    NotAToken,
    /// A prefix of another version.
    #[error("this token was made by a newer meshd; upgrade meshd on this machine")]
    NewerVersion,
    /// A character that no token has.
    #[error("the token has a character {0:?} that does not belong there; copy it again")]
    BadCharacter(char),
    /// The checksum does not fit: truncated or mistyped.
    #[error("the token is incomplete or mistyped (its checksum does not fit); copy the whole line again")]
    BadChecksum,
    /// The checksum fits but the content does not decode.
    #[error("the token's content cannot be read by this version of meshd")]
    Unreadable,
}

impl Token {
    /// Reads a token. White space around it does not matter.
    ///
    /// An invite token that is read is whole: its record is signed, is an Invite of its network, and belongs to its
    /// secret. Whether the network knows the signer is for the ledger.
    ///
    /// # Errors
    /// [`TokenError`], fit to be shown to the person who pasted it.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let (prefix, encoded) = split_prefix(text)?;
        if let Some(bad) = encoded.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '-' || *c == '_')) {
            return Err(TokenError::BadCharacter(bad));
        }
        if encoded.len() > MAX_TOKEN {
            return Err(TokenError::BadChecksum);
        }
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::BadChecksum)?);
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(TokenError::BadChecksum)?;
        if *sum != checksum(prefix, body) {
            return Err(TokenError::BadChecksum);
        }
        let mut reader = Reader(body);
        let token =
            if prefix == CLAIM_PREFIX { reader.claim().map(Self::Claim) } else { reader.invite().map(Self::Invite) };
        token.filter(|_| reader.0.is_empty()).ok_or(TokenError::Unreadable)
    }
}

impl ClaimToken {
    /// Writes the token. URLs beyond [`MAX_URLS`] or longer than [`MAX_URL`] are left out.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut body = Zeroizing::new(Vec::with_capacity(512));
        put_urls(&mut body, &self.urls);
        body.extend_from_slice(&self.coordinator.0);
        body.extend_from_slice(self.secret.expose());
        seal(CLAIM_PREFIX, &mut body)
    }
}

impl InviteToken {
    /// Writes the token. URLs beyond [`MAX_URLS`] or longer than [`MAX_URL`] are left out.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut body = Zeroizing::new(Vec::with_capacity(2_048));
        put_urls(&mut body, &self.urls);
        body.extend_from_slice(&self.coordinator.0);
        body.extend_from_slice(&self.network.0);
        body.extend_from_slice(self.secret.expose());
        put_text(&mut body, &self.invite.payload);
        body.extend_from_slice(&self.invite.signer.0);
        body.extend_from_slice(&self.invite.sig.0);
        seal(INVITE_PREFIX, &mut body)
    }

    /// What the Invite record says; `None` if it is not signed, not an Invite, of another network or of another secret.
    #[must_use]
    pub fn terms(&self) -> Option<Invite> {
        let Ok(Record::Invite(invite)) = self.invite.open() else { return None };
        (invite.network == self.network && invite.key == invite_key(&self.secret)).then_some(invite)
    }
}

/// The prefix of this version and what follows it.
fn split_prefix(text: &str) -> Result<(&'static str, &str), TokenError> {
    for (prefix, word) in [(CLAIM_PREFIX, "meshd-claim"), (INVITE_PREFIX, "meshd-invite")] {
        if let Some(encoded) = text.strip_prefix(prefix) {
            return Ok((prefix, encoded));
        }
        let number = text.strip_prefix(word).and_then(|rest| rest.split_once('-')).map(|(number, _)| number);
        if number.and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n > 1) {
            return Err(TokenError::NewerVersion);
        }
    }
    Err(TokenError::NotAToken)
}

fn checksum(prefix: &str, body: &[u8]) -> [u8; CHECKSUM] {
    let digest = Digest32::of(&[b"meshd token checksum v1", prefix.as_bytes(), body]);
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(&digest.0[..CHECKSUM]);
    sum
}

fn seal(prefix: &str, body: &mut Vec<u8>) -> String {
    let sum = checksum(prefix, body);
    body.extend_from_slice(&sum);
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(body))
}

fn put_urls(body: &mut Vec<u8>, urls: &[String]) {
    let urls: Vec<&String> = urls.iter().filter(|url| url.len() <= MAX_URL).take(MAX_URLS).collect();
    body.push(u8::try_from(urls.len()).unwrap_or(u8::MAX));
    urls.iter().for_each(|url| put_text(body, url));
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&len.to_be_bytes());
    body.extend_from_slice(&text.as_bytes()[..usize::from(len)]);
}

/// Takes fields off the front of a body; `None` once it is too short.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn claim(&mut self) -> Option<ClaimToken> {
        Some(ClaimToken {
            urls: self.urls()?,
            coordinator: ControlKey(self.array()?),
            secret: Secret32::new(self.array()?),
        })
    }

    fn invite(&mut self) -> Option<InviteToken> {
        let urls = self.urls()?;
        let coordinator = ControlKey(self.array()?);
        let network = NetworkId(self.array()?);
        let secret = Secret32::new(self.array()?);
        let payload = self.text()?;
        let signer = Digest32(self.array()?);
        let sig = HexSignature(self.array()?);
        let invite = SignedRecord { payload, signer, sig, cosig: None };
        let token = InviteToken { urls, coordinator, network, secret, invite };
        token.terms().is_some().then_some(token)
    }

    fn urls(&mut self) -> Option<Vec<String>> {
        let [count] = self.array::<1>()?;
        let count = usize::from(count);
        if count > MAX_URLS {
            return None;
        }
        (0..count).map(|_| self.text().filter(|url| url.len() <= MAX_URL)).collect()
    }

    fn text(&mut self) -> Option<String> {
        let len = u16::from_be_bytes(self.array()?);
        let (text, rest) = self.0.split_at_checked(usize::from(len))?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*array)
    }
}

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::trust::testing::{Founder, open_terms};

    fn claim() -> ClaimToken {
        ClaimToken {
            urls: vec!["https://mesh.example.org:8443".into(), "wss://192.0.2.1".into()],
            coordinator: ControlKey([3; 32]),
            secret: Secret32::new([4; 32]),
        }
    }

    fn invite() -> InviteToken {
        let mut f = Founder::new(1);
        let (secret, invite) = f.invite(open_terms(2));
        InviteToken {
            urls: vec!["https://mesh.example.org".into()],
            coordinator: ControlKey([3; 32]),
            network: f.network,
            secret,
            invite,
        }
    }

    #[test]
    fn tokens_round_trip_and_white_space_around_them_does_not_matter() {
        let (c, i) = (claim(), invite());
        let Token::Claim(back) = Token::decode(&format!("  {}\r\n", c.encode())).unwrap() else { panic!("a claim") };
        assert_eq!((&back.urls, back.coordinator, back.secret.expose()), (&c.urls, c.coordinator, c.secret.expose()));
        let Token::Invite(back) = Token::decode(&i.encode()).unwrap() else { panic!("an invite") };
        assert_eq!((&back.urls, back.coordinator, back.network), (&i.urls, i.coordinator, i.network));
        assert_eq!((back.secret.expose(), &back.invite), (i.secret.expose(), &i.invite));
        assert_eq!(back.terms().unwrap().uses, 2);
    }

    #[test]
    fn a_token_is_one_line_that_a_double_click_selects_and_no_debug_output_tells() {
        for token in [claim().encode(), invite().encode()] {
            assert!(token.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_'), "{token}");
        }
        assert!(invite().encode().len() < 1_100, "{}", invite().encode().len());
        let shown = format!("{:?} {:?}", claim(), Token::Claim(claim()));
        assert!(!shown.contains("04040404") && !shown.contains("4, 4"), "{shown}");
    }

    #[test]
    fn every_mistake_is_named() {
        let token = claim().encode();
        let says = |text: &str| Token::decode(text).unwrap_err();
        assert_eq!(says(""), TokenError::NotAToken);
        assert_eq!(says("hello"), TokenError::NotAToken);
        assert_eq!(says("meshd-claim0-AAAA"), TokenError::NotAToken);
        assert_eq!(says("meshd-claim-AAAA"), TokenError::NotAToken);
        assert_eq!(says("meshd-claim2-AAAA"), TokenError::NewerVersion);
        assert_eq!(says("meshd-invite7-whatever it holds"), TokenError::NewerVersion);
        assert_eq!(says(CLAIM_PREFIX), TokenError::BadChecksum);
        assert_eq!(says(&token[..token.len() - 3]), TokenError::BadChecksum);
        assert_eq!(says(&format!("{token}A")), TokenError::BadChecksum);
        assert_eq!(says(&token.replacen(CLAIM_PREFIX, INVITE_PREFIX, 1)), TokenError::BadChecksum);
        let (start, end) = token.split_at(40);
        assert_eq!(says(&format!("{start} {end}")), TokenError::BadCharacter(' '));
        assert_eq!(says(&format!("{start}\n{end}")), TokenError::BadCharacter('\n'));
        assert_eq!(says(&format!("{token}…")), TokenError::BadCharacter('…'));
        assert_eq!(says(&format!("{token}=")), TokenError::BadCharacter('='));
        assert_eq!(says(&format!("{CLAIM_PREFIX}{}", "A".repeat(10_000_000))), TokenError::BadChecksum);
    }

    #[test]
    fn a_token_whose_parts_do_not_belong_together_is_unreadable() {
        let changes: [&dyn Fn(&mut InviteToken); 4] = [
            &|t| t.secret = Secret32::new([9; 32]),
            &|t| t.network = NetworkId([9; 32]),
            &|t| t.invite.sig.0[0] ^= 1,
            &|t| t.invite.payload = "{}".into(),
        ];
        for (i, change) in changes.iter().enumerate() {
            let mut token = invite();
            change(&mut token);
            assert_eq!(Token::decode(&token.encode()).unwrap_err(), TokenError::Unreadable, "change {i}");
        }
        let mut body = vec![0; 65];
        body.push(0);
        assert_eq!(Token::decode(&seal(CLAIM_PREFIX, &mut body)).unwrap_err(), TokenError::Unreadable);
        let mut body = vec![200; 300];
        assert_eq!(Token::decode(&seal(INVITE_PREFIX, &mut body)).unwrap_err(), TokenError::Unreadable);
    }

    #[test]
    fn urls_that_do_not_fit_are_left_out() {
        let long = format!("https://{}", "x".repeat(MAX_URL));
        let mut urls = vec![long];
        urls.extend((0..20).map(|i| format!("https://c{i}")));
        let Token::Claim(back) = Token::decode(&ClaimToken { urls: urls.clone(), ..claim() }.encode()).unwrap() else {
            panic!("a claim")
        };
        assert_eq!(back.urls, urls[1..=MAX_URLS]);
    }

    #[test]
    fn every_truncation_and_every_changed_character_is_refused() {
        const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        for token in [claim().encode(), invite().encode()] {
            for end in 0..token.len() {
                assert!(Token::decode(&token[..end]).is_err(), "cut at {end}");
            }
            for start in 1..token.len() {
                assert!(Token::decode(&token[start..]).is_err(), "from {start}");
            }
            for at in 0..token.len() {
                // All 64 characters at a few places, and a few everywhere.
                let step = if at < 20 || at + 20 > token.len() { 1 } else { 9 };
                for &c in ALPHABET.iter().skip(at % step).step_by(step) {
                    let mut changed = token.clone().into_bytes();
                    if changed[at] != c {
                        changed[at] = c;
                        assert!(
                            Token::decode(std::str::from_utf8(&changed).unwrap()).is_err(),
                            "{} at {at}",
                            c as char
                        );
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_decoder(
            text in any::<String>(),
            body in proptest::collection::vec(any::<u8>(), 0..600),
            prefix in prop_oneof![Just(CLAIM_PREFIX), Just(INVITE_PREFIX)],
        ) {
            prop_assert!(Token::decode(&text).is_err());
            prop_assert!(Token::decode(&(prefix.to_owned() + &text)).is_err());
            // With a right checksum: whatever it decodes to, it encodes to itself.
            let token = seal(prefix, &mut body.clone());
            match Token::decode(&token) {
                Ok(Token::Claim(claim)) => prop_assert_eq!(claim.encode(), token),
                Ok(Token::Invite(invite)) => prop_assert_eq!(invite.encode(), token),
                Err(e) => prop_assert_eq!(e, TokenError::Unreadable),
            }
        }
    }
}

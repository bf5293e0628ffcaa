//! "Are we on the same LAN?": what a node asks a subnet router whose network has the same numbers as the one the node is in.
//!
//! The question and the answer are one UDP datagram each, sent on that link and nowhere else: both leave with a time to live of
//! 255 and are accepted with 255 only, so that no router has forwarded them (RFC 5082), and each side checks the interface it
//! came in by, so that it did not come through the mesh. `docs/protocol.md` has the bytes.
//!
//! The question does not say who asks or who is asked, except to somebody who knows: its tag is a hash over a fresh nonce, the
//! network and the router's identity key. Who does not know those gets no answer, learns nothing, and cannot recognise the node
//! by it in the next place. The answer is signed by the router's identity key over the nonce and both addresses.

use std::net::{IpAddr, SocketAddr};

use blake2::{Blake2s256, Digest as _};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use subtle::ConstantTimeEq as _;

use crate::wire::keys::{IdentityKey, NetworkId};

/// Length of a question, in bytes. Longer than the answer, so that nobody is hit harder than the asker hit.
pub const QUESTION: usize = 128;
/// Length of an answer.
pub const ANSWER: usize = 108;
/// Time to live (IPv4) or hop limit (IPv6) of both.
pub const TTL: u8 = 255;

/// Both begin with it: what, version.
const MAGIC: [u8; 8] = *b"meshdLAN";
const ASKS: [u8; 4] = [1, 1, 0, 0];
const ANSWERS: [u8; 4] = [1, 2, 0, 0];
/// Prefixes of what is hashed and of what is signed.
const TAG_DOMAIN: &[u8] = b"meshd same lan tag v1\0";
const SIGN_DOMAIN: &[u8] = b"meshd same lan v1\0";

/// A number used once.
pub type Nonce = [u8; 32];

/// What an answer is signed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meeting {
    /// The network both are in.
    pub network: NetworkId,
    /// Who is asked.
    pub router: IdentityKey,
    /// Of the question.
    pub nonce: Nonce,
    /// Where the question comes from.
    pub asker: SocketAddr,
    /// Where it was sent.
    pub asked: SocketAddr,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A question, for whom is in the tag.
    Question {
        /// Its nonce.
        nonce: Nonce,
        /// See [`is_for`].
        tag: [u8; 32],
    },
    /// An answer.
    Answer {
        /// The question's nonce.
        nonce: Nonce,
        /// See [`Meeting::is_proven_by`].
        signature: [u8; 64],
    },
}

/// The bytes of a question.
#[must_use]
pub fn question(network: &NetworkId, router: &IdentityKey, nonce: &Nonce) -> [u8; QUESTION] {
    let mut bytes = [0; QUESTION];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&ASKS);
    bytes[12..44].copy_from_slice(nonce);
    bytes[44..76].copy_from_slice(&tag(network, router, nonce));
    bytes
}

/// Reads a datagram. None: it is neither.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Message> {
    let (head, rest) = bytes.split_first_chunk::<12>()?;
    let (nonce, rest) = rest.split_first_chunk::<32>()?;
    if head[..8] != MAGIC {
        return None;
    }
    let kind: [u8; 4] = *head[8..].first_chunk()?;
    match (kind, bytes.len()) {
        (ASKS, QUESTION) => Some(Message::Question { nonce: *nonce, tag: *rest.first_chunk()? }),
        (ANSWERS, ANSWER) => Some(Message::Answer { nonce: *nonce, signature: *rest.first_chunk()? }),
        _ => None,
    }
}

/// True if a question's tag names this router.
#[must_use]
pub fn is_for(network: &NetworkId, router: &IdentityKey, nonce: &Nonce, seen: &[u8; 32]) -> bool {
    tag(network, router, nonce).ct_eq(seen).into()
}

fn tag(network: &NetworkId, router: &IdentityKey, nonce: &Nonce) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    for part in [TAG_DOMAIN, &network.0, &router.0, nonce] {
        hash.update(part);
    }
    hash.finalize().into()
}

impl Meeting {
    /// The router's answer.
    #[must_use]
    pub fn answer(&self, key: &SigningKey) -> [u8; ANSWER] {
        let mut bytes = [0; ANSWER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&ANSWERS);
        bytes[12..44].copy_from_slice(&self.nonce);
        bytes[44..].copy_from_slice(&key.sign(&self.signed()).to_bytes());
        bytes
    }

    /// True if the router signed that it was asked just this, by and at these addresses.
    #[must_use]
    pub fn is_proven_by(&self, signature: &[u8; 64]) -> bool {
        let Ok(key) = VerifyingKey::from_bytes(&self.router.0) else { return false };
        key.verify_strict(&self.signed(), &Signature::from_bytes(signature)).is_ok()
    }

    fn signed(&self) -> Vec<u8> {
        let mut bytes = [SIGN_DOMAIN, &self.network.0, &self.router.0, &self.nonce].concat();
        for end in [self.asker, self.asked] {
            let ip = match end.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            bytes.extend_from_slice(&ip.octets());
            bytes.extend_from_slice(&end.port().to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(seed: u8) -> (SigningKey, IdentityKey) {
        let key = SigningKey::from_bytes(&[seed; 32]);
        let public = IdentityKey(key.verifying_key().to_bytes());
        (key, public)
    }

    fn meeting() -> Meeting {
        Meeting {
            network: NetworkId([1; 32]),
            router: key(2).1,
            nonce: [3; 32],
            asker: "192.168.7.9:40000".parse().unwrap(),
            asked: "192.168.7.1:40001".parse().unwrap(),
        }
    }

    #[test]
    fn a_question_is_understood_by_the_one_it_is_for() {
        let m = meeting();
        let bytes = question(&m.network, &m.router, &m.nonce);
        let Some(Message::Question { nonce, tag }) = read(&bytes) else { panic!("unreadable") };
        assert_eq!(nonce, m.nonce);
        assert!(is_for(&m.network, &m.router, &nonce, &tag));
        assert!(!is_for(&m.network, &key(9).1, &nonce, &tag));
        assert!(!is_for(&NetworkId([9; 32]), &m.router, &nonce, &tag));
        assert!(!is_for(&m.network, &m.router, &[9; 32], &tag));
        let identity = m.router.0;
        assert!(!bytes.windows(8).any(|w| identity.windows(8).any(|i| i == w)), "nobody is named in it");
    }

    #[test]
    fn an_answer_proves_one_meeting_and_no_other() {
        let m = meeting();
        let bytes = m.answer(&key(2).0);
        let Some(Message::Answer { nonce, signature }) = read(&bytes) else { panic!("unreadable") };
        assert_eq!(nonce, m.nonce);
        assert!(m.is_proven_by(&signature));
        let others = [
            Meeting { network: NetworkId([9; 32]), ..m },
            Meeting { router: key(9).1, ..m },
            Meeting { nonce: [9; 32], ..m },
            Meeting { asker: "192.168.7.8:40000".parse().unwrap(), ..m },
            Meeting { asker: m.asked, asked: m.asker, ..m },
            Meeting { asked: "192.168.7.1:40002".parse().unwrap(), ..m },
        ];
        assert!(others.iter().all(|other| !other.is_proven_by(&signature)));
        let Some(Message::Answer { signature, .. }) = read(&m.answer(&key(9).0)) else { panic!("unreadable") };
        assert!(!m.is_proven_by(&signature), "by another key");
        const { assert!(ANSWER < QUESTION) };
    }

    proptest! {
        #[test]
        fn nothing_that_comes_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..12) {
            let _ = read(&bytes);
            let mut near = question(&NetworkId([1; 32]), &key(2).1, &[3; 32]).to_vec();
            near[at] ^= 1;
            prop_assert_eq!(read(&near), None);
            near.truncate(bytes.len());
            let _ = read(&near);
        }
    }
}

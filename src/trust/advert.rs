//! Advertisements: what a node says of itself that it leads to. Signed by the node, replaced by the next one, and worth
//! nothing without an admin's grant for the same prefix.
//!
//! Unlike a record an advertisement is not kept for good: it may change every second (a router whose network is cut says
//! so), and of each node only the newest counts. The coordinator hands it on and can do no more with it than hold it back:
//! the node has signed it, and an older one is not accepted.

use std::net::SocketAddr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::trust::record::HexSignature;
use crate::wire::keys::{IdentityKey, NetworkId};

/// Prefix of the bytes the signature covers.
const SIGN_DOMAIN: &[u8] = b"meshd advert v1\0";
/// The version this program reads and writes.
pub const ADVERT_VERSION: u16 = 1;
/// The longest payload accepted, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// The most prefixes in one.
pub const MAX_ROUTES: usize = 1_024;
/// The most addresses in one.
pub const MAX_LAN: usize = 16;

/// An advertisement as it travels: the exact text that was signed, and the signature of the node it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedAdvert {
    /// The JSON of an [`Advert`].
    pub payload: String,
    /// Over `meshd advert v1\0` and the payload, by the identity in it.
    pub sig: HexSignature,
}

/// What a node says of itself. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advert {
    /// [`ADVERT_VERSION`].
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// Who says it; must have signed.
    pub identity: IdentityKey,
    /// Strictly increasing for each node, across restarts: the highest counts.
    pub number: u64,
    /// Prefixes it leads to now, host bits zero.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<IpNet>,
    /// Prefixes it is set up for and does not serve at the moment: what is under way there is still let through.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resting: Vec<IpNet>,
    /// Those of `resting` that rest only because somebody wants to work on the router: it still forwards, and what is under
    /// way through it stays with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<IpNet>,
    /// Where on the networks it leads to it answers who asks whether they are there too ([`crate::wire::same_lan`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lan: Vec<SocketAddr>,
    /// It relays for others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relay: bool,
}

/// Why an advertisement is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AdvertError {
    /// Longer than [`MAX_PAYLOAD`], or more than [`MAX_ROUTES`] prefixes or [`MAX_LAN`] addresses.
    #[error("the advertisement is too long")]
    TooLong,
    /// Not an advertisement of a version this program knows.
    #[error("the advertisement cannot be read by this version of meshd")]
    Unreadable,
    /// The signature is not the named node's.
    #[error("the advertisement's signature is wrong")]
    BadSignature,
    /// Of another network.
    #[error("the advertisement belongs to another network")]
    WrongNetwork,
    /// A prefix with host bits.
    #[error("the advertisement names a prefix with host bits set")]
    BadPrefix,
}

impl SignedAdvert {
    /// Signs what a node says of itself.
    #[must_use]
    pub fn sign(advert: &Advert, identity: &SigningKey) -> Self {
        let payload = serde_json::to_string(advert).unwrap_or_default();
        let sig = HexSignature(identity.sign(&signed_bytes(&payload)).to_bytes());
        Self { payload, sig }
    }

    /// Checks the signature and what can be checked without knowing the network's members. Whether the node is one, and
    /// which of the prefixes it may lead to, is for the ledger.
    ///
    /// # Errors
    /// [`AdvertError`].
    pub fn open(&self, network: &NetworkId) -> Result<Advert, AdvertError> {
        if self.payload.len() > MAX_PAYLOAD {
            return Err(AdvertError::TooLong);
        }
        let advert: Advert = serde_json::from_str(&self.payload).map_err(|_| AdvertError::Unreadable)?;
        if advert.v != ADVERT_VERSION {
            return Err(AdvertError::Unreadable);
        }
        if advert.network != *network {
            return Err(AdvertError::WrongNetwork);
        }
        let most = advert.routes.len() + advert.resting.len();
        if most > MAX_ROUTES || advert.draining.len() > MAX_ROUTES || advert.lan.len() > MAX_LAN {
            return Err(AdvertError::TooLong);
        }
        let key = VerifyingKey::from_bytes(&advert.identity.0).map_err(|_| AdvertError::BadSignature)?;
        key.verify_strict(&signed_bytes(&self.payload), &Signature::from_bytes(&self.sig.0))
            .map_err(|_| AdvertError::BadSignature)?;
        let masked = |prefix: &IpNet| prefix.addr() == prefix.network();
        if !advert.prefixes().all(masked) {
            return Err(AdvertError::BadPrefix);
        }
        Ok(advert)
    }
}

impl Advert {
    /// Everything it is set up for, served now or not.
    pub fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.routes.iter().chain(&self.resting)
    }
}

fn signed_bytes(payload: &str) -> Vec<u8> {
    [SIGN_DOMAIN, payload.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::testing::Founder;

    fn advert(f: &Founder) -> Advert {
        Advert {
            v: ADVERT_VERSION,
            network: f.network,
            identity: f.keys.identity_key(),
            number: 7,
            routes: vec!["192.168.1.0/24".parse().unwrap()],
            resting: vec!["10.0.0.0/8".parse().unwrap()],
            draining: vec!["10.0.0.0/8".parse().unwrap()],
            lan: vec!["192.168.1.2:7000".parse().unwrap()],
            relay: false,
        }
    }

    #[test]
    fn what_a_node_signed_comes_back_and_anything_else_is_refused() {
        let mut f = Founder::new(1);
        let mine = advert(&f);
        let signed = SignedAdvert::sign(&mine, &f.admin());
        assert_eq!(signed.open(&f.network), Ok(mine.clone()));
        assert_eq!(signed.open(&NetworkId([9; 32])), Err(AdvertError::WrongNetwork));
        let other = f.node();
        let by_other = SignedAdvert::sign(&mine, &other.identity.signing_key());
        assert_eq!(by_other.open(&f.network), Err(AdvertError::BadSignature));
        let changed = SignedAdvert { payload: signed.payload.replace("192.168.1", "192.168.2"), ..signed.clone() };
        assert_eq!(changed.open(&f.network), Err(AdvertError::BadSignature));
        // A record's signature is not an advertisement's.
        let garbled = SignedAdvert { payload: "{}".into(), ..signed };
        assert_eq!(garbled.open(&f.network), Err(AdvertError::Unreadable));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let f = Founder::new(2);
        let open = |change: &dyn Fn(&mut Advert)| {
            let mut advert = advert(&f);
            change(&mut advert);
            SignedAdvert::sign(&advert, &f.admin()).open(&f.network).map(drop)
        };
        assert_eq!(open(&|_| ()), Ok(()));
        assert_eq!(open(&|a| a.v = 2), Err(AdvertError::Unreadable));
        assert_eq!(open(&|a| a.resting = vec!["10.0.0.1/8".parse().unwrap()]), Err(AdvertError::BadPrefix));
        let many =
            |n: usize| (0..n).map(|i| IpNet::new([10, (i >> 8) as u8, i as u8, 0].into(), 24).unwrap()).collect();
        assert_eq!(open(&|a| a.routes = many(MAX_ROUTES - 1)), Ok(()));
        assert_eq!(open(&|a| a.routes = many(MAX_ROUTES)), Err(AdvertError::TooLong));
        assert_eq!(open(&|a| a.lan = vec![a.lan[0]; MAX_LAN + 1]), Err(AdvertError::TooLong));
        let long = SignedAdvert { payload: "x".repeat(MAX_PAYLOAD + 1), sig: HexSignature([0; 64]) };
        assert_eq!(long.open(&f.network), Err(AdvertError::TooLong));
    }
}

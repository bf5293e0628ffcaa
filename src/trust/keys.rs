//! A node's secret keys. They are never cloned, printed or logged, and are wiped when dropped.

use std::fmt;

use ed25519_dalek::SigningKey;
use rand::Rng;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::wire::keys::{ControlKey, IdentityKey, WgKey};

/// 32 secret bytes. Serialized only by the daemon's store, into a file of mode 0600.
#[derive(Zeroize, ZeroizeOnDrop, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret32(#[serde(with = "hex32")] [u8; 32]);

impl Secret32 {
    /// Wraps secret bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Draws fresh secret bytes.
    pub fn random(rng: &mut impl Rng) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The bytes, for handing to a cipher. Do not copy them elsewhere.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// These bytes as an ed25519 signing key.
    #[must_use]
    pub fn signing_key(&self) -> SigningKey {
        SigningKey::from_bytes(&self.0)
    }
}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret32(…)")
    }
}

/// The three keys of a node, each with one job.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct NodeKeys {
    /// ed25519: signs records.
    pub identity: Secret32,
    /// X25519: WireGuard.
    pub wg: Secret32,
    /// X25519: Noise to the coordinator.
    pub control: Secret32,
}

impl NodeKeys {
    /// Makes the keys of a new node.
    pub fn generate(rng: &mut impl Rng) -> Self {
        Self { identity: Secret32::random(rng), wg: Secret32::random(rng), control: Secret32::random(rng) }
    }

    /// The node's public identity.
    #[must_use]
    pub fn identity_key(&self) -> IdentityKey {
        IdentityKey(self.identity.signing_key().verifying_key().to_bytes())
    }

    /// The node's public WireGuard key.
    #[must_use]
    pub fn wg_key(&self) -> WgKey {
        WgKey(PublicKey::from(&StaticSecret::from(*self.wg.expose())).to_bytes())
    }

    /// The node's public control key.
    #[must_use]
    pub fn control_key(&self) -> ControlKey {
        ControlKey(PublicKey::from(&StaticSecret::from(*self.control.expose())).to_bytes())
    }
}

mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer};
    use zeroize::Zeroizing;

    use crate::wire::keys::Digest32;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&Zeroizing::new(Digest32(*bytes).to_string()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        Ok(Digest32::deserialize(d)?.0)
    }
}

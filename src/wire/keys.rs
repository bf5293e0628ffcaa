//! Public keys and digests as 32 bytes with a type each, written as lower-case hexadecimal.

use std::fmt;
use std::str::FromStr;

use blake2::{Blake2s256, Digest as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 hexadecimal digits")]
pub struct NotAKey;

macro_rules! key32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The raw bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        /// The first eight digits are enough to tell keys apart in a log.
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "("))?;
                self.0.iter().take(4).try_for_each(|b| write!(f, "{b:02x}"))?;
                f.write_str("…)")
            }
        }
        impl FromStr for $name {
            type Err = NotAKey;
            fn from_str(s: &str) -> Result<Self, NotAKey> {
                parse_hex32(s).map(Self).ok_or(NotAKey)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

key32!(
    /// A node's identity: an ed25519 public key that signs the node's part of records.
    IdentityKey
);
key32!(
    /// A node's WireGuard public key (X25519). Packets and relay frames are addressed by it.
    WgKey
);
key32!(
    /// A control public key (X25519): the static key of Noise between a node and the coordinator.
    ControlKey
);
key32!(
    /// The one-time ed25519 public key of an invite. Whoever holds its secret may sign Member records.
    InviteKey
);
key32!(
    /// The network's id: its root ed25519 public key.
    NetworkId
);
key32!(
    /// A BLAKE2s-256 digest.
    Digest32
);

fn parse_hex32(s: &str) -> Option<[u8; 32]> {
    let digits = s.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = [0u8; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(out)
}

impl Digest32 {
    /// BLAKE2s-256 over the parts, each preceded by its length as 8 bytes little-endian, so that no two lists of parts
    /// hash alike.
    #[must_use]
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut h = Blake2s256::new();
        for part in parts {
            h.update((part.len() as u64).to_le_bytes());
            h.update(part);
        }
        Self(h.finalize().into())
    }
}

/// The id shown to people: the first eight bytes of the hash of the identity key, as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 8]);

impl IdentityKey {
    /// The id people see for the node with this identity.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        let digest = Digest32::of(&[b"meshd node id v1", &self.0]);
        let mut id = [0u8; 8];
        id.copy_from_slice(&digest.0[..8]);
        NodeId(id)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_mistakes_are_refused() {
        let key = WgKey(std::array::from_fn(|i| u8::try_from(i * 7 % 256).unwrap()));
        assert_eq!(key.to_string().parse::<WgKey>(), Ok(key));
        assert_eq!("ab".parse::<WgKey>(), Err(NotAKey));
        assert_eq!("zz".repeat(32).parse::<WgKey>(), Err(NotAKey));
        assert_eq!("é".repeat(32).parse::<WgKey>(), Err(NotAKey));
    }

    #[test]
    fn debug_shows_only_a_prefix() {
        assert_eq!(format!("{:?}", WgKey([0xab; 32])), "WgKey(abababab…)");
    }
}

//! Signed records: statements about the network that every node checks for itself.
//!
//! A record is exact payload bytes (JSON text), the signer's public key, and a signature over a domain-separated prefix
//! plus those bytes. Nothing is re-encoded: what was signed is what is stored and forwarded.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::time::UnixSeconds;
use crate::wire::keys::{ControlKey, Digest32, IdentityKey, InviteKey, NetworkId, WgKey};

/// Prefix of the bytes an ordinary signature covers.
const SIGN_DOMAIN: &[u8] = b"meshd record v1\0";
/// Prefix of the bytes a node's countersignature on its Member record covers.
const COUNTERSIGN_DOMAIN: &[u8] = b"meshd member countersign v1\0";
/// The longest payload accepted, in bytes.
pub const MAX_PAYLOAD: usize = 4096;
/// The most addresses of a [`DnsName`].
pub const MAX_DNS_ADDRESSES: usize = 16;
/// The most servers of a [`DnsSplit`]: as many as a C library asks (resolv.conf(5), MAXNS).
pub const MAX_DNS_SERVERS: usize = 3;

/// A payload with its signature(s). Signatures are lower-case hexadecimal (128 digits) in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRecord {
    /// The exact text that was signed: the JSON of a [`Record`].
    pub payload: String,
    /// The ed25519 public key that signed: root, an admin's identity, or an invite's key.
    pub signer: Digest32,
    /// The signer's signature.
    pub sig: HexSignature,
    /// Member records only: the node's own identity key signs too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosig: Option<HexSignature>,
}

/// What a record says. Unknown fields are ignored; an unknown `kind` does not decode and the record is set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// Signed by the root key, whose public half is the network id.
    Genesis(Genesis),
    /// Signed by the root key or an admin.
    Admin(Admin),
    /// Signed by an admin.
    Invite(Invite),
    /// Signed by an invite's key and countersigned by the node.
    Member(Member),
    /// Signed by an admin.
    RouteGrant(RouteGrant),
    /// Signed by an admin.
    RouteRevoke(RouteRevoke),
    /// Signed by an admin.
    Revoke(Revoke),
    /// Signed by an admin.
    DnsName(DnsName),
    /// Signed by an admin.
    DnsSplit(DnsSplit),
    /// Signed by an admin.
    RouteAlias(RouteAlias),
}

/// The network's unchanging facts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// Record format version: 1.
    pub v: u16,
    /// The root public key; must equal the signer.
    pub network: NetworkId,
    /// A DNS label.
    pub name: String,
    /// A prefix inside 100.64.0.0/10 (or chosen by the founder), host bits zero.
    pub ipv4: Ipv4Net,
    /// A ULA /48.
    pub ipv6: Ipv6Net,
    /// When.
    pub created: UnixSeconds,
}

/// An identity that may invite, approve routes and revoke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admin {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The admin's identity key.
    pub identity: IdentityKey,
    /// When.
    pub created: UnixSeconds,
}

/// Admits up to `uses` members until `expires`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The one-time public key; Member records are signed by its secret half.
    pub key: InviteKey,
    /// How many members, at least 1.
    pub uses: u32,
    /// Not after this time.
    pub expires: UnixSeconds,
    /// The name the member must take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Labels the members carry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Prefixes the members may announce: an implied RouteGrant.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<IpNet>,
    /// True: the members are admins.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub admin: bool,
    /// When.
    pub created: UnixSeconds,
}

/// A node of the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The invite that admits it; must equal the signer.
    pub invite: InviteKey,
    /// The node's identity key; must have made the countersignature.
    pub identity: IdentityKey,
    /// The node's WireGuard key.
    pub wg: WgKey,
    /// The node's control key.
    pub control: ControlKey,
    /// A DNS label, unique among live members.
    pub name: String,
    /// Unique among live members, inside the Genesis range, neither its network nor its broadcast address.
    pub ipv4: Ipv4Addr,
    /// Must equal [`member_ipv6`].
    pub ipv6: Ipv6Addr,
    /// When.
    pub created: UnixSeconds,
}

/// Permission to announce a prefix. A prefix of length 0 is permission to be an exit node for that address family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteGrant {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// Who may announce it.
    pub identity: IdentityKey,
    /// The prefix, host bits zero.
    pub prefix: IpNet,
    /// When.
    pub created: UnixSeconds,
}

/// Takes permission to announce a prefix back, whether it came by a grant or with the node's invite. Of all that was said
/// about one node and prefix the newest `created` counts, whatever order it arrives in; at the same second, the refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRevoke {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// Who may not announce it any more.
    pub identity: IdentityKey,
    /// The prefix, host bits zero.
    pub prefix: IpNet,
    /// When.
    pub created: UnixSeconds,
}

/// What a name resolves to that is no member's. Of all that was said about one name the newest `created` counts, whatever
/// order it arrives in; at the same second, that there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsName {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The whole name, see [`crate::trust::names::domain_name`].
    pub name: String,
    /// At most [`MAX_DNS_ADDRESSES`]; empty: there is no such name any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The node behind which the addresses are, where several nodes lead to the same numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<IdentityKey>,
    /// When.
    pub created: UnixSeconds,
}

/// Who answers questions about a domain and all names in it. The newest `created` counts, as with [`DnsName`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsSplit {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The domain, see [`crate::trust::names::domain_name`].
    pub domain: String,
    /// DNS servers, asked in this order; at most [`MAX_DNS_SERVERS`]; empty: it is nobody's any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<IpAddr>,
    /// The node behind which the servers are, where several nodes lead to the same numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<IdentityKey>,
    /// When.
    pub created: UnixSeconds,
}

/// Other numbers for a prefix behind a node, so that several networks with the same numbers are reached at once. The newest
/// `created` for the node and the prefix counts, as with [`DnsName`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteAlias {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// The node that leads to the prefix.
    pub identity: IdentityKey,
    /// The prefix as it is there, host bits zero.
    pub prefix: IpNet,
    /// A prefix of the same family and length, outside the mesh's own ranges; absent: there is none any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<IpNet>,
    /// When.
    pub created: UnixSeconds,
}

/// A node or an invite is out, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoke {
    /// Record format version: 1.
    pub v: u16,
    /// The network.
    pub network: NetworkId,
    /// What is out.
    #[serde(flatten)]
    pub target: RevokeTarget,
    /// When.
    pub created: UnixSeconds,
}

/// What a Revoke puts out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RevokeTarget {
    /// A node (and its admin rights).
    Identity(IdentityKey),
    /// An invite that is not to be used any more. Members it admitted stay.
    Invite(InviteKey),
}

/// The IPv6 address of the member with this identity: the network's /48 followed by 80 bits of the hash of the identity.
#[must_use]
pub fn member_ipv6(prefix: Ipv6Net, identity: &IdentityKey) -> Ipv6Addr {
    let host = Digest32::of(&[b"meshd ipv6 host v1", identity.as_bytes()]);
    let mut octets = prefix.network().octets();
    octets[6..].copy_from_slice(&host.0[..10]);
    Ipv6Addr::from(octets)
}

/// Why a record cannot be read. Chain rules are the ledger's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("the record is too long")]
    TooLong,
    /// The payload is not the JSON of a known kind of record.
    #[error("the record cannot be read by this version of meshd")]
    Unreadable,
    /// The signature does not fit the signer and the payload.
    #[error("the record's signature is wrong")]
    BadSignature,
    /// A Member record without a fitting countersignature of the node.
    #[error("the member record is not countersigned by its node")]
    BadCountersignature,
}

impl SignedRecord {
    /// Signs a record. For a Member, `key` is the invite's key and [`SignedRecord::countersign`] must follow.
    #[must_use]
    pub fn sign(record: &Record, key: &SigningKey) -> Self {
        let payload = serde_json::to_string(record).unwrap_or_default();
        let sig = key.sign(&signed_bytes(SIGN_DOMAIN, &payload));
        Self {
            payload,
            signer: Digest32(key.verifying_key().to_bytes()),
            sig: HexSignature(sig.to_bytes()),
            cosig: None,
        }
    }

    /// Adds the node's own signature to its Member record.
    #[must_use]
    pub fn countersign(mut self, identity: &SigningKey) -> Self {
        let sig = identity.sign(&signed_bytes(COUNTERSIGN_DOMAIN, &self.payload));
        self.cosig = Some(HexSignature(sig.to_bytes()));
        self
    }

    /// The record's id: a digest over signer and payload (not over the signatures, which are not unique).
    #[must_use]
    pub fn id(&self) -> Digest32 {
        Digest32::of(&[b"meshd record id v1", self.signer.as_bytes(), self.payload.as_bytes()])
    }

    /// Checks the signature(s) and reads the payload. Says nothing about whether the signer was entitled to say it.
    ///
    /// # Errors
    /// [`RecordError`], also for a signer that is not a point on the curve. Signatures are checked strictly (no small-order
    /// keys, RFC 8032 section 5.1.7 with the cofactorless equation).
    pub fn open(&self) -> Result<Record, RecordError> {
        if self.payload.len() > MAX_PAYLOAD {
            return Err(RecordError::TooLong);
        }
        verify(&self.signer.0, &signed_bytes(SIGN_DOMAIN, &self.payload), &self.sig)
            .ok_or(RecordError::BadSignature)?;
        let record: Record = serde_json::from_str(&self.payload).map_err(|_| RecordError::Unreadable)?;
        if let Record::Member(member) = &record {
            let cosig = self.cosig.as_ref().ok_or(RecordError::BadCountersignature)?;
            verify(&member.identity.0, &signed_bytes(COUNTERSIGN_DOMAIN, &self.payload), cosig)
                .ok_or(RecordError::BadCountersignature)?;
        }
        Ok(record)
    }
}

fn signed_bytes(domain: &[u8], payload: &str) -> Vec<u8> {
    [domain, payload.as_bytes()].concat()
}

fn verify(key: &[u8; 32], message: &[u8], sig: &HexSignature) -> Option<()> {
    VerifyingKey::from_bytes(key).ok()?.verify_strict(message, &Signature::from_bytes(&sig.0)).ok()
}

/// An ed25519 signature, written as 128 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HexSignature(pub [u8; 64]);

impl std::fmt::Debug for HexSignature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HexSignature({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

impl Serialize for HexSignature {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let text: String = self.0.iter().map(|b| format!("{b:02x}")).collect();
        s.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for HexSignature {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        let bad = || serde::de::Error::custom("expected 128 hexadecimal digits");
        if text.len() != 128 || !text.is_ascii() {
            return Err(bad());
        }
        let mut out = [0u8; 64];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(out))
    }
}

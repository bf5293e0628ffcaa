//! The rules that judge records: one growing set of accepted records and what follows from it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::time::UnixSeconds;
use crate::trust::record::{Genesis, Invite, Member, RecordError, SignedRecord};
use crate::wire::keys::{Digest32, IdentityKey, InviteKey, NetworkId, WgKey};

/// Why a record is refused. Each is a sentence about the record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Cannot be read or verified at all.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// About another network.
    #[error("the record belongs to another network")]
    WrongNetwork,
    /// A second Genesis, or a Genesis not signed by the root.
    #[error("the founding record is not the root key's")]
    BadGenesis,
    /// Anything before the Genesis.
    #[error("the founding record has not arrived yet")]
    NoGenesis,
    /// Signed by a key that is neither root nor a live admin.
    #[error("the signer is not an admin of this network")]
    NotAdmin,
    /// A Member whose invite is unknown.
    #[error("no accepted invite admits this member")]
    NoInvite,
    /// A Member whose invite was revoked, or its issuer was.
    #[error("the invite was revoked")]
    InviteRevoked,
    /// The invite has admitted its number of members.
    #[error("the invite is used up")]
    InviteUsedUp,
    /// A Member created after the invite's expiry.
    #[error("the invite had expired")]
    InviteExpired,
    /// The member does not carry what the invite demands (name), or an address outside the range, or the wrong IPv6.
    #[error("the member record contradicts its invite or the network's ranges: {0}")]
    Contradiction(&'static str),
    /// The identity, WireGuard key or control key belongs to a member already.
    #[error("a member has this key already")]
    KeyTaken,
    /// A live member has the address.
    #[error("address {0} belongs to another member")]
    AddressTaken(Ipv4Addr),
    /// A live member has the name.
    #[error("the name {0:?} belongs to another member")]
    NameTaken(String),
    /// The identity was revoked and cannot come back.
    #[error("the node was revoked")]
    Revoked,
    /// A Revoke or grant for somebody unknown.
    #[error("the record is about an unknown node or invite")]
    UnknownTarget,
}

/// What accepting a record changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The record was accepted before; nothing changed.
    Known,
    /// The network exists.
    Founded,
    /// An admin was named.
    AdminAdded(IdentityKey),
    /// An invite was opened.
    InviteAdded(InviteKey),
    /// A member joined.
    MemberAdded(IdentityKey),
    /// A member is out.
    MemberRevoked(IdentityKey),
    /// An invite was closed.
    InviteRevoked(InviteKey),
    /// A prefix may be announced.
    RouteGranted(IdentityKey),
}

/// Accepted records of one network, in the order accepted. Refused records leave no trace.
#[derive(Debug, Clone)]
pub struct Ledger {
    pub(crate) network: NetworkId,
    pub(crate) genesis: Option<Genesis>,
    pub(crate) log: Vec<SignedRecord>,
    pub(crate) known: BTreeSet<Digest32>,
    pub(crate) admins: BTreeSet<IdentityKey>,
    pub(crate) invites: BTreeMap<InviteKey, OpenInvite>,
    pub(crate) members: BTreeMap<IdentityKey, Member>,
    pub(crate) by_wg: BTreeMap<WgKey, IdentityKey>,
    pub(crate) by_control: BTreeMap<[u8; 32], IdentityKey>,
    pub(crate) by_ipv4: BTreeMap<Ipv4Addr, IdentityKey>,
    pub(crate) by_name: BTreeMap<String, IdentityKey>,
    pub(crate) revoked: BTreeSet<IdentityKey>,
}

/// An invite and how far it is used.
#[derive(Debug, Clone)]
pub struct OpenInvite {
    /// The record.
    pub invite: Invite,
    /// The record as signed, for handing on.
    pub signed: SignedRecord,
    /// Who signed it.
    pub issuer: Digest32,
    /// Members admitted so far, revoked ones included.
    pub used: u32,
    /// Closed by a Revoke.
    pub revoked: bool,
}

/// The clock to judge expiry by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    /// A node reading the log: a Member is in time if its own `created` is not after the invite's expiry.
    Reader,
    /// The coordinator at redemption: additionally its own wall clock must not be after the expiry.
    Coordinator(UnixSeconds),
}

//! The rules that judge records: one growing list of accepted records and what follows from it.
//!
//! Every fact the ledger derives is stamped with the position of the record that made it. So a refused record leaves no
//! trace, and [`Ledger::truncate`] can take back the newest records exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use crate::time::UnixSeconds;
use crate::trust::addresses::TakenAddresses;
use crate::trust::ledger::newest::{Newest, Word};
use crate::trust::names::numbered;
use crate::trust::record::{Genesis, Invite, Member, RecordError, SignedRecord};
use crate::wire::keys::{ControlKey, Digest32, IdentityKey, InviteKey, NetworkId, WgKey};

mod effects;
mod newest;
mod rules;
mod set;
mod words;

pub use rules::{is_one_machine, is_sane_ipv4_range, is_ula_48};

/// The record format this program reads and writes.
pub const RECORD_VERSION: u16 = 1;

/// Why a record is refused. Each is a sentence about the record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Cannot be read or verified at all, or is of another record version.
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
    /// A Member whose invite was revoked, or whose invite's issuer was.
    #[error("the invite was revoked")]
    InviteRevoked,
    /// The invite has admitted its number of members.
    #[error("the invite is used up")]
    InviteUsedUp,
    /// A Member created after the invite's expiry.
    #[error("the invite had expired")]
    InviteExpired,
    /// The content breaks a rule: ranges that are none, a member without the name its invite demands or with an address
    /// outside the range, a route inside the mesh's own range.
    #[error("the record contradicts itself, its invite or the network's ranges: {0}")]
    Contradiction(&'static str),
    /// The identity, WireGuard key or control key belongs to a member, or did; or the invite's key to another invite.
    #[error("the key was used in this network before")]
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
    /// A prefix may not be announced any more.
    RouteRevoked(IdentityKey),
    /// Something was said about a name, or about who answers for a domain.
    NamesChanged,
    /// Something was said about other numbers for a prefix behind this node.
    AliasChanged(IdentityKey),
}

/// Addresses that an admin gave something, and the node behind which they are, if that was said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Addresses {
    /// At least one.
    pub addresses: Vec<IpAddr>,
    /// None: wherever they are reached.
    pub at: Option<IdentityKey>,
}

/// Accepted records of one network, in the order accepted. Refused records leave no trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    network: NetworkId,
    genesis: Option<Genesis>,
    log: Vec<SignedRecord>,
    /// The running digest after each record of `log`.
    heads: Vec<Digest32>,
    known: BTreeMap<Digest32, usize>,
    /// Everyone ever named an admin, with the first record that did. Live unless revoked.
    admins: BTreeMap<IdentityKey, usize>,
    invites: BTreeMap<InviteKey, OpenInvite>,
    /// Everyone ever admitted. Live unless revoked.
    nodes: BTreeMap<IdentityKey, Node>,
    revoked: BTreeMap<IdentityKey, usize>,
    grants: BTreeMap<IdentityKey, BTreeMap<IpNet, Said>>,
    dns_names: Newest<String, Addresses>,
    dns_splits: Newest<String, Addresses>,
    aliases: Newest<(IdentityKey, IpNet), IpNet>,
    /// Keys ever used: they never change hands.
    wg: BTreeMap<WgKey, IdentityKey>,
    control: BTreeMap<ControlKey, IdentityKey>,
    /// Of live members only.
    names: BTreeMap<String, IdentityKey>,
    ipv4: BTreeMap<Ipv4Addr, IdentityKey>,
    taken: TakenAddresses,
    live: usize,
}

/// What admins said about one node and prefix: when, and whether it took permission back; and where that stands in the log.
/// The last entry counts. So the order in which a coordinator hands records on makes no difference.
type Said = BTreeMap<(UnixSeconds, bool), usize>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    member: Member,
    at: usize,
}

/// An invite and how far it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenInvite {
    /// The record.
    pub invite: Invite,
    /// Who signed it: the root key or an admin's identity.
    pub issuer: Digest32,
    /// Members admitted so far, revoked ones included.
    pub used: u32,
    at: usize,
    closed_at: Option<usize>,
}

impl OpenInvite {
    /// Closed by a Revoke of the invite, or of its issuer while uses were left.
    #[must_use]
    pub const fn revoked(&self) -> bool {
        self.closed_at.is_some()
    }

    /// No use is left.
    #[must_use]
    pub const fn used_up(&self) -> bool {
        self.used >= self.invite.uses
    }
}

/// The clock to judge expiry by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    /// A node reading the log: a Member is in time if its own `created` is not after the invite's expiry.
    Reader,
    /// The coordinator at redemption: additionally its own wall clock must not be after the expiry.
    Coordinator(UnixSeconds),
}

impl Ledger {
    /// An empty ledger that will accept only what leads back to `network`.
    #[must_use]
    pub fn new(network: NetworkId) -> Self {
        Self {
            network,
            genesis: None,
            log: Vec::new(),
            heads: Vec::new(),
            known: BTreeMap::new(),
            admins: BTreeMap::new(),
            invites: BTreeMap::new(),
            nodes: BTreeMap::new(),
            revoked: BTreeMap::new(),
            grants: BTreeMap::new(),
            dns_names: Newest::default(),
            dns_splits: Newest::default(),
            aliases: Newest::default(),
            wg: BTreeMap::new(),
            control: BTreeMap::new(),
            names: BTreeMap::new(),
            ipv4: BTreeMap::new(),
            taken: TakenAddresses::default(),
            live: 0,
        }
    }

    /// Judges a record and, if nothing speaks against it, adds it. All or nothing.
    ///
    /// # Errors
    /// Why it is refused; the ledger is then unchanged. A record accepted before is [`Change::Known`], also when its
    /// signature is another (valid) one; the first stays in the log.
    pub fn admit(&mut self, signed: &SignedRecord, judge: Judge) -> Result<Change, Refusal> {
        let id = signed.id();
        let known = self.known.get(&id).and_then(|at| self.log.get(*at));
        if known == Some(signed) {
            return Ok(Change::Known);
        }
        let record = signed.open()?;
        if known.is_some() {
            return Ok(Change::Known);
        }
        self.judge(signed.signer, &record, judge)?;
        Ok(self.apply(id, signed.clone(), record))
    }

    /// Admits several records, each valid after the ones before it; all or none.
    ///
    /// # Errors
    /// The position of the first refused record and why; the ledger is then unchanged.
    pub fn admit_all(&mut self, records: &[SignedRecord], judge: Judge) -> Result<Vec<Change>, (usize, Refusal)> {
        let before = self.log.len();
        let mut changes = Vec::with_capacity(records.len());
        for (i, record) in records.iter().enumerate() {
            match self.admit(record, judge) {
                Ok(change) => changes.push(change),
                Err(refusal) => {
                    self.truncate(before);
                    return Err((i, refusal));
                }
            }
        }
        Ok(changes)
    }

    /// Takes back all records after the first `len`, and all that followed from them. For the coordinator, whose store may
    /// fail; a node never takes anything back.
    pub fn truncate(&mut self, len: usize) {
        while self.log.len() > len {
            self.heads.pop();
            let Some(signed) = self.log.pop() else { return };
            self.known.remove(&signed.id());
            // It was read when it was accepted.
            if let Ok(record) = serde_json::from_str(&signed.payload) {
                self.take_back(&record, self.log.len());
            }
        }
    }

    // What there is.

    /// The network this ledger is about.
    #[must_use]
    pub const fn network(&self) -> NetworkId {
        self.network
    }

    /// The network's facts, once its founding record was accepted.
    #[must_use]
    pub const fn genesis(&self) -> Option<&Genesis> {
        self.genesis.as_ref()
    }

    /// The accepted records, in order.
    #[must_use]
    pub fn log(&self) -> &[SignedRecord] {
        &self.log
    }

    /// The running digest over the whole log, see [`crate::wire::control::log_head`].
    #[must_use]
    pub fn head(&self) -> Digest32 {
        self.heads.last().copied().unwrap_or_default()
    }

    /// The running digest over the first `len` records; `None` if there are fewer.
    #[must_use]
    pub fn head_after(&self, len: usize) -> Option<Digest32> {
        len.checked_sub(1).map_or(Some(Digest32::default()), |last| self.heads.get(last).copied())
    }

    /// Whether the record with this id was accepted.
    #[must_use]
    pub fn contains(&self, id: &Digest32) -> bool {
        self.known.contains_key(id)
    }

    /// Where in the log the record with this id stands.
    #[must_use]
    pub fn position(&self, id: &Digest32) -> Option<usize> {
        self.known.get(id).copied()
    }

    /// The live members, in the order of their identities.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.nodes.values().map(|node| &node.member).filter(|m| !self.is_revoked(&m.identity))
    }

    /// Members that were revoked.
    pub fn removed(&self) -> impl Iterator<Item = &Member> {
        self.nodes.values().map(|node| &node.member).filter(|m| self.is_revoked(&m.identity))
    }

    /// How many live members there are.
    #[must_use]
    pub const fn live_members(&self) -> usize {
        self.live
    }

    /// The live member with this identity.
    #[must_use]
    pub fn member(&self, identity: &IdentityKey) -> Option<&Member> {
        self.nodes.get(identity).map(|node| &node.member).filter(|_| !self.is_revoked(identity))
    }

    /// The member with this identity, also if it was revoked since.
    #[must_use]
    pub fn member_ever(&self, identity: &IdentityKey) -> Option<&Member> {
        self.nodes.get(identity).map(|node| &node.member)
    }

    /// The position in the log of the Member record of this identity, revoked or not.
    #[must_use]
    pub fn member_position(&self, identity: &IdentityKey) -> Option<usize> {
        self.nodes.get(identity).map(|node| node.at)
    }

    /// The live member with this WireGuard key.
    #[must_use]
    pub fn by_wg(&self, key: &WgKey) -> Option<&Member> {
        self.member(self.wg.get(key)?)
    }

    /// The live member with this control key.
    #[must_use]
    pub fn by_control(&self, key: &ControlKey) -> Option<&Member> {
        self.member(self.control.get(key)?)
    }

    /// The member with this control key, also if it was revoked since.
    #[must_use]
    pub fn by_control_ever(&self, key: &ControlKey) -> Option<&Member> {
        self.member_ever(self.control.get(key)?)
    }

    /// The live member with this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Member> {
        self.member(self.names.get(name)?)
    }

    /// The live member with this address.
    #[must_use]
    pub fn by_ipv4(&self, address: Ipv4Addr) -> Option<&Member> {
        self.member(self.ipv4.get(&address)?)
    }

    /// Whether this identity may sign for the network now.
    #[must_use]
    pub fn is_admin(&self, identity: &IdentityKey) -> bool {
        self.admins.contains_key(identity) && !self.is_revoked(identity)
    }

    /// Whether this identity is out for good.
    #[must_use]
    pub fn is_revoked(&self, identity: &IdentityKey) -> bool {
        self.revoked.contains_key(identity)
    }

    /// The position in the log of the Revoke that put this identity out.
    #[must_use]
    pub fn revoked_position(&self, identity: &IdentityKey) -> Option<usize> {
        self.revoked.get(identity).copied()
    }

    /// An accepted invite, open or not.
    #[must_use]
    pub fn invite(&self, key: &InviteKey) -> Option<&OpenInvite> {
        self.invites.get(key)
    }

    /// All accepted invites, open or not, in the order of their keys.
    pub fn invites(&self) -> impl Iterator<Item = &OpenInvite> {
        self.invites.values()
    }

    /// An accepted invite as signed.
    #[must_use]
    pub fn invite_record(&self, key: &InviteKey) -> Option<&SignedRecord> {
        self.log.get(self.invites.get(key)?.at)
    }

    /// The prefixes this identity may announce: those granted and those its invite implies, unless taken back since.
    /// Sorted; empty once revoked.
    #[must_use]
    pub fn grants(&self, identity: &IdentityKey) -> Vec<IpNet> {
        if self.is_revoked(identity) {
            return Vec::new();
        }
        let mut prefixes: BTreeSet<IpNet> =
            self.implied(identity).into_iter().flat_map(|i| i.routes.iter().copied()).collect();
        prefixes.extend(self.grants.get(identity).into_iter().flat_map(BTreeMap::keys));
        prefixes.into_iter().filter(|prefix| self.may_announce(identity, prefix)).collect()
    }

    /// Whether this identity may announce exactly this prefix.
    #[must_use]
    pub fn may_announce(&self, identity: &IdentityKey, prefix: &IpNet) -> bool {
        let newest = self.route_said(identity, prefix);
        !self.is_revoked(identity) && newest.is_some_and(|(_, taken_back)| !taken_back)
    }

    /// When an admin last allowed this identity this prefix, or took it back. A record that is to change that must be newer.
    #[must_use]
    pub fn route_said_at(&self, identity: &IdentityKey, prefix: &IpNet) -> Option<UnixSeconds> {
        self.route_said(identity, prefix).map(|(at, _)| at)
    }

    /// When what counts was said, and whether it took permission back.
    fn route_said(&self, identity: &IdentityKey, prefix: &IpNet) -> Option<(UnixSeconds, bool)> {
        let implied = self.implied(identity).filter(|i| i.routes.contains(prefix)).map(|i| (i.created, false));
        let said = self.grants.get(identity).and_then(|p| p.get(prefix)).and_then(|said| said.last_key_value());
        implied.max(said.map(|(key, _)| *key))
    }

    /// The invite that admitted this identity.
    fn implied(&self, identity: &IdentityKey) -> Option<&Invite> {
        self.nodes.get(identity).and_then(|node| self.invites.get(&node.member.invite)).map(|open| &open.invite)
    }

    // Records for somebody who only knows the network id.

    /// The records, in order, from which an empty ledger accepts this invite: the Genesis, and what made its issuer an
    /// admin. Empty if the invite is unknown.
    #[must_use]
    pub fn chain(&self, key: &InviteKey) -> Vec<SignedRecord> {
        self.invites.get(key).map(|invite| self.proof(vec![invite.at])).unwrap_or_default()
    }

    /// The records, in order, from which an empty ledger knows every live admin: what a guest needs to verify an invite
    /// that only its token holds.
    #[must_use]
    pub fn admin_chain(&self) -> Vec<SignedRecord> {
        self.proof(self.admins.iter().filter(|(who, _)| !self.is_revoked(who)).map(|(_, at)| *at).collect())
    }

    /// The records at the positions in `open` and, again and again, what entitled their signers.
    fn proof(&self, mut open: Vec<usize>) -> Vec<SignedRecord> {
        let mut needed = BTreeSet::new();
        if self.genesis.is_some() {
            needed.insert(0);
        }
        while let Some(at) = open.pop() {
            if !needed.insert(at) {
                continue;
            }
            if let Some(signed) = self.log.get(at) {
                open.extend(self.admins.get(&IdentityKey(signed.signer.0)));
                open.extend(self.invites.get(&InviteKey(signed.signer.0)).map(|invite| invite.at));
            }
        }
        needed.into_iter().filter_map(|at| self.log.get(at)).cloned().collect()
    }

    // What is free.

    /// The lowest address that no live member has and for which `reserved` is false.
    pub fn free_ipv4(&self, reserved: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        self.taken.lowest_free(self.genesis.as_ref()?.ipv4, reserved)
    }

    /// `wanted`, or if a live member has it or `reserved` is true for it: with `-2`, `-3`, … added. `wanted` must be a label.
    pub fn free_name(&self, wanted: &str, reserved: impl Fn(&str) -> bool) -> String {
        let taken = |name: &str| self.names.contains_key(name) || reserved(name);
        if !taken(wanted) {
            return wanted.to_owned();
        }
        // A thousand machines may all be called "debian": double until free, then halve the gap.
        let taken = |number: u64| taken(&numbered(wanted, number));
        let mut below = 1;
        let mut free = 2;
        while taken(free) {
            below = free;
            free = free.saturating_mul(2);
        }
        while free - below > 1 {
            let middle = below + (free - below) / 2;
            if taken(middle) {
                below = middle;
            } else {
                free = middle;
            }
        }
        numbered(wanted, free)
    }
}

#[cfg(test)]
mod tests;

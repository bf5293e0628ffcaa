//! What follows from an accepted record, and back.

use ipnet::IpNet;

use crate::time::UnixSeconds;
use crate::trust::ledger::words::word;
use crate::trust::ledger::{Change, Ledger, Node, OpenInvite, Word};
use crate::trust::record::{
    Admin, DnsName, DnsSplit, Record, Revoke, RevokeTarget, RouteAlias, RouteGrant, RouteRevoke, SignedRecord,
};
use crate::wire::control::log_head;
use crate::wire::keys::{Digest32, IdentityKey};

impl Ledger {
    pub(super) fn apply(&mut self, id: Digest32, signed: SignedRecord, record: Record) -> Change {
        let at = self.log.len();
        let issuer = signed.signer;
        self.heads.push(log_head(self.head(), &signed));
        self.log.push(signed);
        self.known.insert(id, at);
        match record {
            Record::Genesis(genesis) => {
                self.genesis = Some(genesis);
                Change::Founded
            }
            Record::Admin(Admin { identity, .. }) => {
                self.admins.entry(identity).or_insert(at);
                Change::AdminAdded(identity)
            }
            Record::Invite(invite) => {
                let key = invite.key;
                self.invites.insert(key, OpenInvite { invite, issuer, used: 0, at, closed_at: None });
                Change::InviteAdded(key)
            }
            Record::Member(member) => {
                let identity = member.identity;
                if let Some(open) = self.invites.get_mut(&member.invite) {
                    open.used = open.used.saturating_add(1);
                    if open.invite.admin {
                        self.admins.entry(identity).or_insert(at);
                    }
                }
                self.wg.insert(member.wg, identity);
                self.control.insert(member.control, identity);
                self.nodes.insert(identity, Node { member, at });
                self.bring_in(&identity);
                Change::MemberAdded(identity)
            }
            Record::RouteGrant(RouteGrant { identity, prefix, created, .. }) => {
                self.say_route(identity, prefix, (created, false), at);
                Change::RouteGranted(identity)
            }
            Record::RouteRevoke(RouteRevoke { identity, prefix, created, .. }) => {
                self.say_route(identity, prefix, (created, true), at);
                Change::RouteRevoked(identity)
            }
            Record::Revoke(Revoke { target: RevokeTarget::Identity(identity), .. }) => {
                if !self.is_revoked(&identity) {
                    self.put_out(&identity);
                    self.revoked.insert(identity, at);
                    for open in self.invites.values_mut().filter(|i| i.issuer.0 == identity.0 && !i.used_up()) {
                        open.closed_at.get_or_insert(at);
                    }
                }
                Change::MemberRevoked(identity)
            }
            Record::Revoke(Revoke { target: RevokeTarget::Invite(key), .. }) => {
                if let Some(open) = self.invites.get_mut(&key) {
                    open.closed_at.get_or_insert(at);
                }
                Change::InviteRevoked(key)
            }
            Record::DnsName(DnsName { name, addresses, at: behind, created, .. }) => {
                self.dns_names.say(name, created, word(&addresses, behind), at);
                Change::NamesChanged
            }
            Record::DnsSplit(DnsSplit { domain, servers, at: behind, created, .. }) => {
                self.dns_splits.say(domain, created, word(&servers, behind), at);
                Change::NamesChanged
            }
            Record::RouteAlias(RouteAlias { identity, prefix, alias, created, .. }) => {
                self.aliases.say((identity, prefix), created, Word::new(alias), at);
                Change::AliasChanged(identity)
            }
        }
    }

    /// The exact reverse of [`Self::apply`] for the newest record, which stood at `at`.
    pub(super) fn take_back(&mut self, record: &Record, at: usize) {
        match record {
            Record::Genesis(_) => self.genesis = None,
            Record::Admin(Admin { identity, .. }) => self.forget_admin(identity, at),
            Record::Invite(invite) => {
                self.invites.remove(&invite.key);
            }
            Record::Member(member) => {
                self.put_out(&member.identity);
                self.nodes.remove(&member.identity);
                self.wg.remove(&member.wg);
                self.control.remove(&member.control);
                self.forget_admin(&member.identity, at);
                if let Some(open) = self.invites.get_mut(&member.invite) {
                    open.used = open.used.saturating_sub(1);
                }
            }
            Record::RouteGrant(RouteGrant { identity, prefix, created, .. }) => {
                self.unsay_route(identity, prefix, (*created, false), at);
            }
            Record::RouteRevoke(RouteRevoke { identity, prefix, created, .. }) => {
                self.unsay_route(identity, prefix, (*created, true), at);
            }
            Record::Revoke(Revoke { target: RevokeTarget::Identity(identity), .. }) => {
                if self.revoked.get(identity) == Some(&at) {
                    self.revoked.remove(identity);
                    self.bring_in(identity);
                    for open in self.invites.values_mut().filter(|i| i.closed_at == Some(at)) {
                        open.closed_at = None;
                    }
                }
            }
            Record::Revoke(Revoke { target: RevokeTarget::Invite(key), .. }) => {
                if let Some(open) = self.invites.get_mut(key).filter(|i| i.closed_at == Some(at)) {
                    open.closed_at = None;
                }
            }
            Record::DnsName(DnsName { name, addresses, at: behind, created, .. }) => {
                self.dns_names.unsay(name, *created, word(addresses, *behind), at);
            }
            Record::DnsSplit(DnsSplit { domain, servers, at: behind, created, .. }) => {
                self.dns_splits.unsay(domain, *created, word(servers, *behind), at);
            }
            Record::RouteAlias(RouteAlias { identity, prefix, alias, created, .. }) => {
                self.aliases.unsay(&(*identity, *prefix), *created, Word::new(*alias), at);
            }
        }
    }

    fn say_route(&mut self, identity: IdentityKey, prefix: IpNet, said: (UnixSeconds, bool), at: usize) {
        self.grants.entry(identity).or_default().entry(prefix).or_default().entry(said).or_insert(at);
    }

    fn unsay_route(&mut self, identity: &IdentityKey, prefix: &IpNet, said: (UnixSeconds, bool), at: usize) {
        let Some(prefixes) = self.grants.get_mut(identity) else { return };
        if let Some(all) = prefixes.get_mut(prefix) {
            if all.get(&said) == Some(&at) {
                all.remove(&said);
            }
            if all.is_empty() {
                prefixes.remove(prefix);
            }
        }
        if prefixes.is_empty() {
            self.grants.remove(identity);
        }
    }

    fn forget_admin(&mut self, identity: &IdentityKey, at: usize) {
        if self.admins.get(identity) == Some(&at) {
            self.admins.remove(identity);
        }
    }

    /// Gives a node (if the identity is one) its name and address.
    fn bring_in(&mut self, identity: &IdentityKey) {
        let Some(Node { member, .. }) = self.nodes.get(identity) else { return };
        self.names.insert(member.name.clone(), *identity);
        self.ipv4.insert(member.ipv4, *identity);
        self.taken.insert(member.ipv4);
        self.live += 1;
    }

    /// Frees the name and address of a node (if the identity is one).
    fn put_out(&mut self, identity: &IdentityKey) {
        let Some(Node { member, .. }) = self.nodes.get(identity) else { return };
        self.names.remove(&member.name);
        self.ipv4.remove(&member.ipv4);
        self.taken.remove(member.ipv4);
        self.live = self.live.saturating_sub(1);
    }

    /// Fills the log with copies of records up to a length, unjudged and without effect: for tests of long logs, where
    /// signing would take minutes.
    #[cfg(test)]
    pub(crate) fn extend_unjudged(&mut self, records: &[SignedRecord], len: usize) {
        for record in records.iter().cycle().take(len.saturating_sub(self.log.len())) {
            self.heads.push(log_head(self.head(), record));
            self.log.push(record.clone());
        }
    }
}

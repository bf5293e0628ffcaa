//! What admins said about names and about other numbers for prefixes, as the ledger has it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::time::UnixSeconds;
use crate::trust::ledger::{Addresses, Ledger, Word};
use crate::wire::keys::IdentityKey;

impl Ledger {
    /// The names that admins gave addresses, in order.
    pub fn dns_names(&self) -> impl Iterator<Item = (&str, &Addresses)> {
        self.dns_names.iter().map(|(name, target)| (name.as_str(), target))
    }

    /// What an admin gave this name.
    #[must_use]
    pub fn dns_name(&self, name: &str) -> Option<&Addresses> {
        self.dns_names.get(&name.to_owned())
    }

    /// When something was last said about this name. A record that is to change it must be newer.
    #[must_use]
    pub fn dns_name_said_at(&self, name: &str) -> Option<UnixSeconds> {
        self.dns_names.said_at(&name.to_owned())
    }

    /// The domains that have servers of their own, in order.
    pub fn dns_splits(&self) -> impl Iterator<Item = (&str, &Addresses)> {
        self.dns_splits.iter().map(|(domain, servers)| (domain.as_str(), servers))
    }

    /// The servers of exactly this domain.
    #[must_use]
    pub fn dns_split(&self, domain: &str) -> Option<&Addresses> {
        self.dns_splits.get(&domain.to_owned())
    }

    /// As [`Self::dns_name_said_at`], about the servers of a domain.
    #[must_use]
    pub fn dns_split_said_at(&self, domain: &str) -> Option<UnixSeconds> {
        self.dns_splits.said_at(&domain.to_owned())
    }

    /// The other numbers for prefixes behind live members: node, prefix, alias; in order.
    pub fn aliases(&self) -> impl Iterator<Item = (&IdentityKey, IpNet, IpNet)> {
        let all = self.aliases.iter().map(|((who, prefix), alias)| (who, *prefix, *alias));
        all.filter(|(who, _, _)| !self.is_revoked(who))
    }

    /// The other numbers for exactly this prefix behind a live member.
    #[must_use]
    pub fn alias(&self, identity: &IdentityKey, prefix: &IpNet) -> Option<IpNet> {
        self.aliases.get(&(*identity, *prefix)).copied().filter(|_| !self.is_revoked(identity))
    }

    /// As [`Self::dns_name_said_at`], about other numbers.
    #[must_use]
    pub fn alias_said_at(&self, identity: &IdentityKey, prefix: &IpNet) -> Option<UnixSeconds> {
        self.aliases.said_at(&(*identity, *prefix))
    }
}

/// Addresses as a record has them: none means that there is nothing any more.
pub(super) fn word(addresses: &[IpAddr], at: Option<IdentityKey>) -> Word<Addresses> {
    Word::new((!addresses.is_empty()).then(|| Addresses { addresses: addresses.to_vec(), at }))
}

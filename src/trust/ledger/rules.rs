//! What can speak against a record whose signatures are right.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::trust::ledger::{Judge, Ledger, RECORD_VERSION, Refusal};
use crate::trust::names::{dns_label, domain_name};
use crate::trust::record::{
    Genesis, Invite, MAX_DNS_ADDRESSES, MAX_DNS_SERVERS, Member, Record, RecordError, RevokeTarget, RouteAlias,
    member_ipv6,
};
use crate::wire::keys::{Digest32, IdentityKey, NetworkId};

impl Ledger {
    /// Everything that can speak against a record whose signatures are right.
    pub(super) fn judge(&self, signer: Digest32, record: &Record, judge: Judge) -> Result<(), Refusal> {
        let (version, network) = common_fields(record);
        if network != self.network {
            return Err(Refusal::WrongNetwork);
        }
        if version != RECORD_VERSION {
            return Err(Refusal::Record(RecordError::Unreadable));
        }
        if let Record::Genesis(genesis) = record {
            return self.judge_genesis(signer, genesis);
        }
        let genesis = self.genesis.as_ref().ok_or(Refusal::NoGenesis)?;
        match record {
            Record::Member(member) => return self.judge_member(signer, member, genesis, judge),
            Record::Genesis(_)
            | Record::Admin(_)
            | Record::Invite(_)
            | Record::RouteGrant(_)
            | Record::RouteRevoke(_)
            | Record::Revoke(_)
            | Record::DnsName(_)
            | Record::DnsSplit(_)
            | Record::RouteAlias(_) => {}
        }
        if signer.0 != self.network.0 && !self.is_admin(&IdentityKey(signer.0)) {
            return Err(Refusal::NotAdmin);
        }
        match record {
            Record::Admin(admin) => self.judge_identity(&admin.identity),
            Record::Invite(invite) => self.judge_invite(invite, genesis),
            Record::RouteGrant(grant) => {
                self.judge_identity(&grant.identity)?;
                self.nodes.get(&grant.identity).ok_or(Refusal::UnknownTarget)?;
                judge_route(&grant.prefix, genesis)
            }
            // Also one that comes before what it takes back, and one about a node that is out.
            Record::RouteRevoke(revoke) => {
                self.nodes.get(&revoke.identity).ok_or(Refusal::UnknownTarget)?;
                check(revoke.prefix.addr() == revoke.prefix.network(), "a route has host bits set")
            }
            Record::Revoke(revoke) => self.judge_revoke(&revoke.target),
            Record::DnsName(dns) => judge_words(&dns.name, &dns.addresses, MAX_DNS_ADDRESSES),
            Record::DnsSplit(split) => judge_words(&split.domain, &split.servers, MAX_DNS_SERVERS),
            Record::RouteAlias(alias) => {
                self.nodes.get(&alias.identity).ok_or(Refusal::UnknownTarget)?;
                judge_alias(alias, genesis)
            }
            Record::Genesis(_) | Record::Member(_) => Ok(()),
        }
    }

    fn judge_genesis(&self, signer: Digest32, genesis: &Genesis) -> Result<(), Refusal> {
        if signer.0 != self.network.0 || self.genesis.is_some() {
            return Err(Refusal::BadGenesis);
        }
        label(&genesis.name)?;
        check(is_sane_ipv4_range(genesis.ipv4), "the IPv4 range is not usable")?;
        check(is_ula_48(genesis.ipv6), "the IPv6 prefix is not a ULA /48")
    }

    fn judge_identity(&self, identity: &IdentityKey) -> Result<(), Refusal> {
        // So that no Revoke of a node can ever be read as one of the root.
        check(identity.0 != self.network.0, "the root key is not a node's")?;
        if self.is_revoked(identity) { Err(Refusal::Revoked) } else { Ok(()) }
    }

    fn judge_invite(&self, invite: &Invite, genesis: &Genesis) -> Result<(), Refusal> {
        if self.invites.contains_key(&invite.key) {
            return Err(Refusal::KeyTaken);
        }
        check(invite.uses > 0, "an invite admits at least one member")?;
        invite.name.as_deref().map_or(Ok(()), label)?;
        invite.routes.iter().try_for_each(|prefix| judge_route(prefix, genesis))
    }

    fn judge_revoke(&self, target: &RevokeTarget) -> Result<(), Refusal> {
        let known = match target {
            RevokeTarget::Identity(identity) => self.nodes.contains_key(identity) || self.admins.contains_key(identity),
            RevokeTarget::Invite(key) => self.invites.contains_key(key),
        };
        if known { Ok(()) } else { Err(Refusal::UnknownTarget) }
    }

    fn judge_member(&self, signer: Digest32, m: &Member, genesis: &Genesis, judge: Judge) -> Result<(), Refusal> {
        check(signer.0 == m.invite.0, "it is not signed by its invite's key")?;
        let open = self.invites.get(&m.invite).ok_or(Refusal::NoInvite)?;
        self.judge_identity(&m.identity)?;
        if open.revoked() || self.is_revoked(&IdentityKey(open.issuer.0)) {
            return Err(Refusal::InviteRevoked);
        }
        if open.used_up() {
            return Err(Refusal::InviteUsedUp);
        }
        let in_time = match judge {
            Judge::Reader => true,
            Judge::Coordinator(now) => now <= open.invite.expires,
        };
        if !in_time || m.created > open.invite.expires {
            return Err(Refusal::InviteExpired);
        }
        label(&m.name)?;
        check(open.invite.name.as_ref().is_none_or(|name| *name == m.name), "the invite demands another name")?;
        check(is_host_of(m.ipv4, genesis.ipv4), "the IPv4 address is not a host address of the network's range")?;
        check(m.ipv6 == member_ipv6(genesis.ipv6, &m.identity), "the IPv6 address does not follow from the identity")?;
        if self.nodes.contains_key(&m.identity) || self.wg.contains_key(&m.wg) || self.control.contains_key(&m.control)
        {
            return Err(Refusal::KeyTaken);
        }
        if self.ipv4.contains_key(&m.ipv4) {
            return Err(Refusal::AddressTaken(m.ipv4));
        }
        if self.names.contains_key(&m.name) {
            return Err(Refusal::NameTaken(m.name.clone()));
        }
        Ok(())
    }
}

/// Whether a network may use this IPv4 range: host bits zero, /8 to /29, not one that IPv4 gives another meaning (this
/// host, loopback, multicast and above: RFC 6890 section 2.2.2).
#[must_use]
pub fn is_sane_ipv4_range(range: Ipv4Net) -> bool {
    let first = range.addr().octets()[0];
    range.addr() == range.network()
        && (8..=29).contains(&range.prefix_len())
        && first != 0
        && first != 127
        && first < 224
}

/// Whether a network may use this IPv6 prefix: a locally assigned ULA /48 (RFC 4193 section 3.1), host bits zero.
#[must_use]
pub fn is_ula_48(prefix: Ipv6Net) -> bool {
    prefix.addr().octets()[0] == 0xfd && prefix.prefix_len() == 48 && prefix.addr() == prefix.network()
}

fn is_host_of(address: Ipv4Addr, range: Ipv4Net) -> bool {
    range.contains(&address) && address != range.network() && address != range.broadcast()
}

/// A route must be a real prefix, and not one inside the mesh: that would give a node other members' addresses.
fn judge_route(prefix: &IpNet, genesis: &Genesis) -> Result<(), Refusal> {
    check(prefix.addr() == prefix.network(), "a route has host bits set")?;
    let inside = match prefix {
        IpNet::V4(v4) => genesis.ipv4.contains(v4),
        IpNet::V6(v6) => genesis.ipv6.contains(v6),
    };
    check(!inside, "a route lies inside the mesh's own range")
}

/// What counts later is not known yet, so only what can never be right is refused.
fn judge_words(name: &str, addresses: &[IpAddr], most: usize) -> Result<(), Refusal> {
    check(domain_name(name).is_ok(), "a name is not a full name that DNS servers are asked about")?;
    check(addresses.len() <= most, "a name has too many addresses")?;
    check(addresses.iter().all(|ip| is_one_machine(*ip)), "an address is not one machine's")
}

/// Whether an address can be that of another machine.
#[must_use]
pub fn is_one_machine(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let first = v4.octets()[0];
            first != 0 && first != 127 && first < 224
        }
        IpAddr::V6(v6) => {
            !v6.is_unspecified() && !v6.is_loopback() && !v6.is_multicast() && v6.to_ipv4_mapped().is_none()
        }
    }
}

/// Other numbers for a prefix: as many, and nobody else's.
fn judge_alias(record: &RouteAlias, genesis: &Genesis) -> Result<(), Refusal> {
    judge_route(&record.prefix, genesis)?;
    let Some(alias) = record.alias else { return Ok(()) };
    judge_route(&alias, genesis)?;
    let same =
        alias.prefix_len() == record.prefix.prefix_len() && alias.addr().is_ipv4() == record.prefix.addr().is_ipv4();
    check(same, "an alias has another length than its prefix")?;
    check(alias.prefix_len() > 0, "everything has no alias")?;
    check(is_one_machine(alias.addr()), "an alias is not made of addresses of machines")?;
    let covers = match alias {
        IpNet::V4(v4) => v4.contains(&genesis.ipv4),
        IpNet::V6(v6) => v6.contains(&genesis.ipv6),
    };
    check(!covers, "an alias covers the mesh's own range")
}

fn label(name: &str) -> Result<(), Refusal> {
    check(dns_label(name).is_ok(), "a name is not a DNS label")
}

fn check(fine: bool, otherwise: &'static str) -> Result<(), Refusal> {
    if fine { Ok(()) } else { Err(Refusal::Contradiction(otherwise)) }
}

fn common_fields(record: &Record) -> (u16, NetworkId) {
    match record {
        Record::Genesis(r) => (r.v, r.network),
        Record::Admin(r) => (r.v, r.network),
        Record::Invite(r) => (r.v, r.network),
        Record::Member(r) => (r.v, r.network),
        Record::RouteGrant(r) => (r.v, r.network),
        Record::RouteRevoke(r) => (r.v, r.network),
        Record::Revoke(r) => (r.v, r.network),
        Record::DnsName(r) => (r.v, r.network),
        Record::DnsSplit(r) => (r.v, r.network),
        Record::RouteAlias(r) => (r.v, r.network),
    }
}

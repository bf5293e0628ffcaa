//! Making records: the four that found a network, and the ones a node or an admin signs later.
//!
//! Nothing here judges: what is made from wrong arguments is refused by every [`crate::trust::ledger::Ledger`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ed25519_dalek::SigningKey;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::Rng;

use crate::time::UnixSeconds;
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::ledger::RECORD_VERSION;
use crate::trust::record::{
    Admin, DnsName, DnsSplit, Genesis, Invite, Member, Record, Revoke, RevokeTarget, RouteAlias, RouteGrant,
    RouteRevoke, SignedRecord, member_ipv6,
};
use crate::wire::keys::{IdentityKey, InviteKey, NetworkId};

/// The id of the network with this root key.
#[must_use]
pub fn network_id(root: &SigningKey) -> NetworkId {
    NetworkId(root.verifying_key().to_bytes())
}

/// Draws the ranges of a new network: a /16 inside 100.64.0.0/10 (RFC 6598) and a ULA /48 (RFC 4193 section 3.2).
pub fn random_ranges(rng: &mut impl Rng) -> (Ipv4Net, Ipv6Net) {
    let mut bytes = [0u8; 6];
    rng.fill_bytes(&mut bytes);
    let [second, a, b, c, d, e] = bytes;
    let v4 = Ipv4Addr::new(100, 64 | (second & 0x3f), 0, 0);
    let mut v6 = [0u8; 16];
    v6[..6].copy_from_slice(&[0xfd, a, b, c, d, e]);
    (Ipv4Net::new_assert(v4, 16), Ipv6Net::new_assert(Ipv6Addr::from(v6), 48))
}

/// The records that found a network: Genesis, Admin, Invite, Member, in this order. The founding node gets the first
/// address of `ipv4` and its admin rights from the Admin record; the invite is used up by it.
pub fn found(
    keys: &NodeKeys,
    root: &SigningKey,
    network_name: &str,
    node_name: &str,
    ipv4: Ipv4Net,
    ipv6: Ipv6Net,
    now: UnixSeconds,
    rng: &mut impl Rng,
) -> [SignedRecord; 4] {
    let v = RECORD_VERSION;
    let network = network_id(root);
    let genesis = Genesis { v, network, name: network_name.to_owned(), ipv4, ipv6, created: now };
    let terms = Terms { expires: now, ..Terms::default() };
    let (secret, invite) = invite_record(root, network, terms, now, rng);
    let first = ipv4.hosts().next().unwrap_or(ipv4.addr());
    [
        SignedRecord::sign(&Record::Genesis(genesis), root),
        admin_record(root, network, keys.identity_key(), now),
        invite,
        member_record(keys, &secret, network, node_name, first, member_ipv6(ipv6, &keys.identity_key()), now),
    ]
}

/// A node's own Member record, signed with the invite's secret and countersigned by the node.
#[must_use]
pub fn member_record(
    keys: &NodeKeys,
    invite_secret: &Secret32,
    network: NetworkId,
    name: &str,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
    now: UnixSeconds,
) -> SignedRecord {
    let member = Member {
        v: RECORD_VERSION,
        network,
        invite: invite_key(invite_secret),
        identity: keys.identity_key(),
        wg: keys.wg_key(),
        control: keys.control_key(),
        name: name.to_owned(),
        ipv4,
        ipv6,
        created: now,
    };
    SignedRecord::sign(&Record::Member(member), &invite_secret.signing_key()).countersign(&keys.identity.signing_key())
}

/// What an invite allows. The default: one member, expired since 1970, nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// How many members, at least 1.
    pub uses: u32,
    /// Not after this time.
    pub expires: UnixSeconds,
    /// The name the member must take.
    pub name: Option<String>,
    /// Labels the members carry.
    pub tags: Vec<String>,
    /// Prefixes the members may announce, host bits zero.
    pub routes: Vec<IpNet>,
    /// The members are admins.
    pub admin: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self { uses: 1, expires: 0, name: None, tags: Vec::new(), routes: Vec::new(), admin: false }
    }
}

/// A new invite: its secret (for the token) and its record. `signer` is an admin's identity key or the root key.
pub fn invite_record(
    signer: &SigningKey,
    network: NetworkId,
    terms: Terms,
    now: UnixSeconds,
    rng: &mut impl Rng,
) -> (Secret32, SignedRecord) {
    let secret = Secret32::random(rng);
    let Terms { uses, expires, name, tags, routes, admin } = terms;
    let key = invite_key(&secret);
    let invite = Invite { v: RECORD_VERSION, network, key, uses, expires, name, tags, routes, admin, created: now };
    let record = SignedRecord::sign(&Record::Invite(invite), signer);
    (secret, record)
}

/// The public half of an invite's secret.
#[must_use]
pub fn invite_key(secret: &Secret32) -> InviteKey {
    InviteKey(secret.signing_key().verifying_key().to_bytes())
}

/// Names an admin. `signer` is an admin's identity key or the root key.
#[must_use]
pub fn admin_record(signer: &SigningKey, network: NetworkId, who: IdentityKey, now: UnixSeconds) -> SignedRecord {
    let admin = Admin { v: RECORD_VERSION, network, identity: who, created: now };
    SignedRecord::sign(&Record::Admin(admin), signer)
}

/// Puts a node or an invite out. `signer` is an admin's identity key or the root key.
#[must_use]
pub fn revoke_record(signer: &SigningKey, network: NetworkId, target: RevokeTarget, now: UnixSeconds) -> SignedRecord {
    let revoke = Revoke { v: RECORD_VERSION, network, target, created: now };
    SignedRecord::sign(&Record::Revoke(revoke), signer)
}

/// Allows a node to announce a prefix (host bits zero). `signer` is an admin's identity key or the root key. `now` must be
/// after an earlier refusal, see [`crate::trust::ledger::Ledger::route_said_at`].
#[must_use]
pub fn route_grant_record(
    signer: &SigningKey,
    network: NetworkId,
    who: IdentityKey,
    prefix: IpNet,
    now: UnixSeconds,
) -> SignedRecord {
    let grant = RouteGrant { v: RECORD_VERSION, network, identity: who, prefix, created: now };
    SignedRecord::sign(&Record::RouteGrant(grant), signer)
}

/// Takes a node's permission to announce a prefix (host bits zero) back. `signer` is an admin's identity key or the root
/// key. `now` must not be before what it takes back, see [`crate::trust::ledger::Ledger::route_said_at`].
#[must_use]
pub fn route_revoke_record(
    signer: &SigningKey,
    network: NetworkId,
    who: IdentityKey,
    prefix: IpNet,
    now: UnixSeconds,
) -> SignedRecord {
    let revoke = RouteRevoke { v: RECORD_VERSION, network, identity: who, prefix, created: now };
    SignedRecord::sign(&Record::RouteRevoke(revoke), signer)
}

/// Says what a name resolves to; no addresses: nothing any more. `signer` is an admin's identity key or the root key. `now`
/// must be after what it replaces, see [`crate::trust::ledger::Ledger::dns_name_said_at`].
#[must_use]
pub fn dns_name_record(
    signer: &SigningKey,
    network: NetworkId,
    name: &str,
    addresses: Vec<IpAddr>,
    at: Option<IdentityKey>,
    now: UnixSeconds,
) -> SignedRecord {
    let record = DnsName { v: RECORD_VERSION, network, name: name.to_owned(), addresses, at, created: now };
    SignedRecord::sign(&Record::DnsName(record), signer)
}

/// Says who answers for a domain; no servers: nobody any more. `now` as in [`dns_name_record`].
#[must_use]
pub fn dns_split_record(
    signer: &SigningKey,
    network: NetworkId,
    domain: &str,
    servers: Vec<IpAddr>,
    at: Option<IdentityKey>,
    now: UnixSeconds,
) -> SignedRecord {
    let record = DnsSplit { v: RECORD_VERSION, network, domain: domain.to_owned(), servers, at, created: now };
    SignedRecord::sign(&Record::DnsSplit(record), signer)
}

/// Gives a prefix behind a node other numbers, or none any more. `now` as in [`dns_name_record`].
#[must_use]
pub fn route_alias_record(
    signer: &SigningKey,
    network: NetworkId,
    who: IdentityKey,
    prefix: IpNet,
    alias: Option<IpNet>,
    now: UnixSeconds,
) -> SignedRecord {
    let record = RouteAlias { v: RECORD_VERSION, network, identity: who, prefix, alias, created: now };
    SignedRecord::sign(&Record::RouteAlias(record), signer)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::trust::ledger::{Change, Judge, Ledger, is_sane_ipv4_range, is_ula_48};

    #[test]
    fn a_founded_network_is_accepted_and_its_founder_is_admin() {
        let mut rng = StdRng::seed_from_u64(1);
        let keys = NodeKeys::generate(&mut rng);
        let root = Secret32::random(&mut rng).signing_key();
        let (ipv4, ipv6) = random_ranges(&mut rng);
        let records = found(&keys, &root, "home", "laptop", ipv4, ipv6, 1_000, &mut rng);
        let mut ledger = Ledger::new(network_id(&root));
        let changes = ledger.admit_all(&records, Judge::Reader).unwrap();
        assert_eq!(changes[0], Change::Founded);
        assert_eq!(changes[3], Change::MemberAdded(keys.identity_key()));
        let me = ledger.by_name("laptop").unwrap();
        assert_eq!(Some(me.ipv4), ipv4.hosts().next());
        assert!(ledger.is_admin(&me.identity));
        assert!(ledger.invite(&me.invite).unwrap().used_up());
    }

    #[test]
    fn random_ranges_are_usable() {
        let mut rng = StdRng::seed_from_u64(2);
        let shared: Ipv4Net = "100.64.0.0/10".parse().unwrap();
        for _ in 0..1_000 {
            let (ipv4, ipv6) = random_ranges(&mut rng);
            assert!(shared.contains(&ipv4) && ipv4.prefix_len() == 16 && is_sane_ipv4_range(ipv4), "{ipv4}");
            assert!(is_ula_48(ipv6), "{ipv6}");
        }
    }
}

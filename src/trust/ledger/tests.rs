use ipnet::Ipv6Net;
use proptest::prelude::*;

use super::*;
use crate::trust::founding::{
    Terms, admin_record, dns_name_record, dns_split_record, found, invite_key, invite_record, member_record,
    network_id, revoke_record, route_alias_record, route_grant_record, route_revoke_record,
};
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::record::{HexSignature, Record, RevokeTarget, member_ipv6};
use crate::trust::testing::{Founder, NOW, open_terms};
use crate::wire::control::log_head;

const READER: Judge = Judge::Reader;

fn refused(ledger: &mut Ledger, record: &SignedRecord) -> Refusal {
    let before = ledger.clone();
    let refusal = ledger.admit(record, READER).expect_err("the record must be refused");
    assert_eq!(*ledger, before, "a refused record left a trace");
    refusal
}

/// The Member inside a record, changed and signed again by who signed it before.
fn resigned(record: &SignedRecord, invite: &Secret32, keys: &NodeKeys, change: impl Fn(&mut Member)) -> SignedRecord {
    let Ok(Record::Member(mut member)) = record.open() else { panic!("not a member record") };
    change(&mut member);
    SignedRecord::sign(&Record::Member(member), &invite.signing_key()).countersign(&keys.identity.signing_key())
}

/// A network with one invite of five uses.
struct Net {
    f: Founder,
    ledger: Ledger,
    secret: Secret32,
}

fn net() -> Net {
    let mut f = Founder::new(7);
    let mut ledger = f.ledger();
    let (secret, invite) = f.invite(open_terms(5));
    ledger.admit(&invite, READER).unwrap();
    Net { f, ledger, secret }
}

// Founding.

#[test]
fn nothing_is_accepted_before_the_genesis() {
    let f = Founder::new(1);
    for record in &f.records[1..] {
        assert_eq!(refused(&mut Ledger::new(f.network), record), Refusal::NoGenesis);
    }
}

#[test]
fn another_network_s_records_are_refused() {
    let (f, other) = (Founder::new(1), Founder::new(2));
    let mut ledger = Ledger::new(f.network);
    assert_eq!(refused(&mut ledger, &other.records[0]), Refusal::WrongNetwork);
    let mut ledger = f.ledger();
    for record in &other.records {
        assert_eq!(refused(&mut ledger, record), Refusal::WrongNetwork);
    }
}

#[test]
fn the_genesis_is_the_root_s_and_the_only_one() {
    let f = Founder::new(1);
    let Ok(Record::Genesis(genesis)) = f.records[0].open() else { panic!() };
    let forged = SignedRecord::sign(&Record::Genesis(genesis.clone()), &f.admin());
    assert_eq!(refused(&mut Ledger::new(f.network), &forged), Refusal::BadGenesis);
    let second = SignedRecord::sign(&Record::Genesis(Genesis { name: "other".into(), ..genesis }), &f.root);
    assert_eq!(refused(&mut f.ledger(), &second), Refusal::BadGenesis);
}

#[test]
fn a_genesis_with_ranges_that_are_none_is_refused() {
    let f = Founder::new(1);
    let Ok(Record::Genesis(genesis)) = f.records[0].open() else { panic!() };
    let with = |ipv4: &str, ipv6: &str, name: &str| {
        let (ipv4, ipv6) = (ipv4.parse().unwrap(), ipv6.parse().unwrap());
        let genesis = Genesis { ipv4, ipv6, name: name.into(), ..genesis.clone() };
        Ledger::new(f.network).admit(&SignedRecord::sign(&Record::Genesis(genesis), &f.root), READER)
    };
    let (v4, v6) = ("10.1.0.0/16", "fd01:2:3::/48");
    assert_eq!(with(v4, v6, "home"), Ok(Change::Founded));
    assert_eq!(with("10.0.0.0/8", v6, "home"), Ok(Change::Founded));
    assert_eq!(with("10.0.0.0/29", v6, "home"), Ok(Change::Founded));
    for bad in ["10.1.0.1/16", "8.0.0.0/7", "10.0.0.0/30", "10.0.0.1/32", "0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/8"] {
        assert!(matches!(with(bad, v6, "home"), Err(Refusal::Contradiction(_))), "{bad}");
    }
    for bad in ["fd01::/47", "fd01::/64", "fc01:2:3::/48", "2001:db8::/48", "fd01:2:3::1/48"] {
        assert!(matches!(with(v4, bad, "home"), Err(Refusal::Contradiction(_))), "{bad}");
    }
    for bad in ["", "Home", "a.b", "-a"] {
        assert!(matches!(with(v4, v6, bad), Err(Refusal::Contradiction(_))), "{bad}");
    }
}

#[test]
fn another_record_version_is_refused_as_unreadable() {
    let f = Founder::new(1);
    let Ok(Record::Genesis(genesis)) = f.records[0].open() else { panic!() };
    let newer = SignedRecord::sign(&Record::Genesis(Genesis { v: 2, ..genesis }), &f.root);
    assert_eq!(refused(&mut Ledger::new(f.network), &newer), Refusal::Record(RecordError::Unreadable));
}

// Members, and what a hostile coordinator may try.

#[test]
fn a_member_is_found_by_all_it_has() {
    let Net { mut f, mut ledger, secret } = net();
    let keys = f.node();
    let record = f.member(&keys, &secret, "nas", 2);
    assert_eq!(ledger.admit(&record, READER), Ok(Change::MemberAdded(keys.identity_key())));
    let found = [
        ledger.member(&keys.identity_key()),
        ledger.by_wg(&keys.wg_key()),
        ledger.by_control(&keys.control_key()),
        ledger.by_name("nas"),
        ledger.by_ipv4([100, 71, 0, 2].into()),
    ];
    for member in found {
        assert_eq!(member.unwrap().identity, keys.identity_key());
    }
    assert_eq!((ledger.live_members(), ledger.members().count()), (2, 2));
    assert!(!ledger.is_admin(&keys.identity_key()));
}

#[test]
fn a_forged_member_is_refused_whoever_signs_it() {
    let Net { mut f, mut ledger, secret } = net();
    let (keys, stranger) = (f.node(), f.node());
    let honest = f.member(&keys, &secret, "nas", 2);
    let Ok(Record::Member(member)) = honest.open() else { panic!() };
    let record = Record::Member(member);
    let identity = keys.identity.signing_key();
    // Signed by some key instead of the invite's: a stranger, an admin, the root, the node itself.
    for signer in [stranger.identity.signing_key(), f.admin(), f.root.clone(), identity.clone()] {
        let forged = SignedRecord::sign(&record, &signer).countersign(&identity);
        assert!(matches!(refused(&mut ledger, &forged), Refusal::Contradiction(_)));
    }
    // By an invite that the coordinator made up, with and without a forged Invite record.
    let made_up = Secret32::new([9; 32]);
    let forged = f.member(&keys, &made_up, "nas", 2);
    assert_eq!(refused(&mut ledger, &forged), Refusal::NoInvite);
    let (_, invite) = invite_record(&stranger.identity.signing_key(), f.network, open_terms(1), NOW, &mut f.rng);
    assert_eq!(refused(&mut ledger, &invite), Refusal::NotAdmin);
    // The node's own signature missing, or somebody else's.
    let bare = SignedRecord { cosig: None, ..honest.clone() };
    assert_eq!(refused(&mut ledger, &bare), Refusal::Record(RecordError::BadCountersignature));
    let wrong = honest.clone().countersign(&stranger.identity.signing_key());
    assert_eq!(refused(&mut ledger, &wrong), Refusal::Record(RecordError::BadCountersignature));
    // A signature made for the other purpose.
    let swapped = SignedRecord { sig: honest.cosig.unwrap(), cosig: Some(honest.sig), ..honest };
    assert_eq!(refused(&mut ledger, &swapped), Refusal::Record(RecordError::BadSignature));
}

#[test]
fn a_swapped_wireguard_key_breaks_the_signature() {
    let Net { mut f, mut ledger, secret } = net();
    let (keys, spy) = (f.node(), f.node());
    let honest = f.member(&keys, &secret, "nas", 2);
    let payload = honest.payload.replace(&keys.wg_key().to_string(), &spy.wg_key().to_string());
    assert_ne!(payload, honest.payload);
    let swapped = SignedRecord { payload: payload.clone(), ..honest.clone() };
    assert_eq!(refused(&mut ledger, &swapped), Refusal::Record(RecordError::BadSignature));
    // Whoever also holds the invite's secret still lacks the node's countersignature …
    let resigned_by_invite =
        SignedRecord { cosig: honest.cosig, ..resigned(&honest, &secret, &spy, |m| m.wg = spy.wg_key()) };
    assert_eq!(refused(&mut ledger, &resigned_by_invite), Refusal::Record(RecordError::BadCountersignature));
    // … and after the honest record, even the node itself cannot change its keys.
    ledger.admit(&honest, READER).unwrap();
    let changed = resigned(&honest, &secret, &keys, |m| m.wg = spy.wg_key());
    assert_eq!(refused(&mut ledger, &changed), Refusal::KeyTaken);
}

#[test]
fn two_nodes_cannot_have_one_address_name_or_key() {
    let Net { mut f, mut ledger, secret } = net();
    let (first, second) = (f.node(), f.node());
    ledger.admit(&f.member(&first, &secret, "nas", 2), READER).unwrap();
    let other = f.member(&second, &secret, "nas-2", 3);
    let try_with = |ledger: &mut Ledger, change: &dyn Fn(&mut Member)| {
        refused(ledger, &resigned(&other, &secret, &second, change))
    };
    let taken = Ipv4Addr::new(100, 71, 0, 2);
    assert_eq!(try_with(&mut ledger, &|m| m.ipv4 = taken), Refusal::AddressTaken(taken));
    assert_eq!(try_with(&mut ledger, &|m| m.name = "nas".into()), Refusal::NameTaken("nas".into()));
    assert_eq!(try_with(&mut ledger, &|m| m.wg = first.wg_key()), Refusal::KeyTaken);
    assert_eq!(try_with(&mut ledger, &|m| m.control = first.control_key()), Refusal::KeyTaken);
    assert!(ledger.admit(&other, READER).is_ok());
}

#[test]
fn a_member_s_content_follows_from_network_invite_and_identity() {
    let Net { mut f, mut ledger, secret } = net();
    let (keys, other) = (f.node(), f.node());
    let honest = f.member(&keys, &secret, "nas", 2);
    let changes: [&dyn Fn(&mut Member); 8] = [
        &|m| m.ipv4 = [100, 71, 0, 0].into(),
        &|m| m.ipv4 = [100, 71, 0, 255].into(),
        &|m| m.ipv4 = [100, 71, 1, 1].into(),
        &|m| m.ipv4 = [10, 0, 0, 1].into(),
        &|m| m.ipv6 = member_ipv6("fd00:1:2::/48".parse().unwrap(), &other.identity_key()),
        &|m| m.ipv6 = "::1".parse().unwrap(),
        &|m| m.name = "NAS".into(),
        &|m| m.name = "a.b".into(),
    ];
    for (i, change) in changes.iter().enumerate() {
        let refusal = refused(&mut ledger, &resigned(&honest, &secret, &keys, change));
        assert!(matches!(refusal, Refusal::Contradiction(_)), "change {i}: {refusal}");
    }
    let wrong_network = resigned(&honest, &secret, &keys, |m| m.network = NetworkId([3; 32]));
    assert_eq!(refused(&mut ledger, &wrong_network), Refusal::WrongNetwork);
    let newer = resigned(&honest, &secret, &keys, |m| m.v = 2);
    assert_eq!(refused(&mut ledger, &newer), Refusal::Record(RecordError::Unreadable));
}

// Invites.

#[test]
fn an_invite_admits_its_number_and_no_more() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let (secret, invite) = f.invite(open_terms(2));
    ledger.admit(&invite, READER).unwrap();
    for host in 2..4 {
        let keys = f.node();
        ledger.admit(&f.member(&keys, &secret, &format!("n{host}"), host), READER).unwrap();
    }
    let third = f.node();
    let record = f.member(&third, &secret, "n4", 4);
    assert_eq!(refused(&mut ledger, &record), Refusal::InviteUsedUp);
    // Removing one of them does not open the invite again.
    let who = ledger.by_name("n2").unwrap().identity;
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(who), NOW);
    ledger.admit(&revoke, READER).unwrap();
    assert_eq!(refused(&mut ledger, &record), Refusal::InviteUsedUp);
}

#[test]
fn expiry_is_judged_by_the_record_and_at_redemption_by_the_clock_too() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let (secret, invite) = f.invite(Terms { expires: NOW + 10, ..open_terms(3) });
    ledger.admit(&invite, READER).unwrap();
    let keys = f.node();
    let honest = f.member(&keys, &secret, "nas", 2);
    let late = resigned(&honest, &secret, &keys, |m| m.created = NOW + 11);
    assert_eq!(refused(&mut ledger, &late), Refusal::InviteExpired);
    assert_eq!(ledger.admit(&honest, Judge::Coordinator(NOW + 11)), Err(Refusal::InviteExpired));
    assert!(ledger.clone().admit(&honest, Judge::Coordinator(NOW + 10)).is_ok());
    assert!(ledger.admit(&honest, READER).is_ok());
}

#[test]
fn an_invite_can_demand_a_name_and_make_admins_and_grant_routes() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let prefix: IpNet = "192.168.1.0/24".parse().unwrap();
    let terms = Terms { name: Some("gate".into()), admin: true, routes: vec![prefix], ..open_terms(1) };
    let (secret, invite) = f.invite(terms);
    ledger.admit(&invite, READER).unwrap();
    let keys = f.node();
    let other_name = f.member(&keys, &secret, "nas", 2);
    assert!(matches!(refused(&mut ledger, &other_name), Refusal::Contradiction(_)));
    ledger.admit(&f.member(&keys, &secret, "gate", 2), READER).unwrap();
    let identity = keys.identity_key();
    assert!(ledger.is_admin(&identity));
    assert_eq!(ledger.grants(&identity), [prefix]);
    let more: IpNet = "10.9.0.0/16".parse().unwrap();
    let grant = route_grant_record(&keys.identity.signing_key(), f.network, identity, more, NOW);
    assert_eq!(ledger.admit(&grant, READER), Ok(Change::RouteGranted(identity)));
    assert_eq!(ledger.grants(&identity), [more, prefix]);
}

/// What is said about one node and prefix, in any order, ends the same: the newest counts, and a refusal beats a grant of the
/// same second. A coordinator gains nothing by turning records round.
#[test]
fn of_what_is_said_about_a_route_the_newest_counts_in_any_order() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let prefix: IpNet = "192.168.1.0/24".parse().unwrap();
    let (secret, invite) = f.invite(Terms { routes: vec![prefix], ..open_terms(1) });
    let keys = f.node();
    let member = f.member(&keys, &secret, "gate", 2);
    ledger.admit_all(&[invite, member], READER).unwrap();
    let (admin, who) = (f.admin(), keys.identity_key());
    assert_eq!(ledger.route_said_at(&who, &prefix), Some(NOW));
    let grant = |at| route_grant_record(&admin, f.network, who, prefix, at);
    let refuse = |at| route_revoke_record(&admin, f.network, who, prefix, at);
    let ends = |records: &[SignedRecord]| {
        let orders = [records.to_vec(), records.iter().rev().cloned().collect()];
        let results = orders.map(|order| {
            let mut ledger = ledger.clone();
            ledger.admit_all(&order, READER).unwrap();
            // Shown again, they change nothing.
            ledger.admit_all(&order, READER).unwrap();
            ledger.may_announce(&who, &prefix)
        });
        assert_eq!(results[0], results[1], "{records:?}");
        results[0]
    };
    assert!(ends(&[]), "implied by the invite");
    assert!(!ends(&[refuse(NOW)]), "the refusal wins the same second");
    assert!(ends(&[refuse(NOW - 1)]), "older than the invite");
    assert!(ends(&[refuse(NOW), grant(NOW + 1)]));
    assert!(!ends(&[grant(NOW + 1), refuse(NOW + 1)]));
    assert!(!ends(&[refuse(NOW + 5), grant(NOW + 4), grant(NOW + 3)]));
    assert!(ends(&[grant(NOW + 9), refuse(NOW + 5), grant(NOW + 4)]));
    // Only about nodes, and only by admins.
    let nobody = f.node().identity_key();
    let stray = route_revoke_record(&admin, f.network, nobody, prefix, NOW);
    assert_eq!(refused(&mut ledger, &stray), Refusal::UnknownTarget);
    let own = route_revoke_record(&keys.identity.signing_key(), f.network, who, prefix, NOW);
    assert_eq!(refused(&mut ledger, &own), Refusal::NotAdmin);
    let bits = route_revoke_record(&admin, f.network, who, "10.0.0.1/8".parse().unwrap(), NOW);
    assert!(matches!(refused(&mut ledger, &bits), Refusal::Contradiction(_)));
    ledger.admit(&revoke_record(&admin, f.network, RevokeTarget::Identity(who), NOW), READER).unwrap();
    assert!(!ledger.may_announce(&who, &prefix) && ledger.grants(&who).is_empty());
}

#[test]
fn of_what_is_said_about_names_and_aliases_the_newest_counts_in_any_order() {
    let f = Founder::new(3);
    let (admin, me) = (f.admin(), f.keys.identity_key());
    let lan: IpNet = "192.168.1.0/24".parse().unwrap();
    let name = |host: Option<u8>, at| {
        let addresses = host.map(|host| IpAddr::from([192, 168, 1, host])).into_iter().collect();
        dns_name_record(&admin, f.network, "nas.home", addresses, None, at)
    };
    let alias = |third: Option<u8>, at| {
        let alias = third.map(|third| IpNet::new([100, 99, third, 0].into(), 24).unwrap());
        route_alias_record(&admin, f.network, me, lan, alias, at)
    };
    let ends = |records: &[SignedRecord]| {
        let orders = [records.to_vec(), records.iter().rev().cloned().collect()];
        let results = orders.map(|order| {
            let mut ledger = f.ledger();
            ledger.admit_all(&order, READER).unwrap();
            let address = ledger.dns_name("nas.home").map(|target| target.addresses[0].to_string());
            (address, ledger.alias(&me, &lan).map(|alias| alias.to_string()))
        });
        assert_eq!(results[0], results[1], "{records:?}");
        results[0].clone()
    };
    let is = |address: &str| Some(address.to_owned());
    assert_eq!(ends(&[name(Some(1), NOW), name(Some(2), NOW + 1)]), (is("192.168.1.2"), None));
    assert_eq!(ends(&[name(Some(2), NOW), name(Some(1), NOW)]), (is("192.168.1.2"), None));
    assert_eq!(ends(&[name(Some(1), NOW), name(None, NOW)]), (None, None), "at the same second there is none");
    assert_eq!(ends(&[name(None, NOW), name(Some(1), NOW + 1)]), (is("192.168.1.1"), None));
    assert_eq!(ends(&[alias(Some(1), NOW), alias(Some(2), NOW + 1), alias(None, NOW)]), (None, is("100.99.2.0/24")));
    assert_eq!(ends(&[alias(Some(1), NOW), alias(None, NOW)]), (None, None));
}

#[test]
fn words_on_names_and_aliases_that_make_no_sense_are_refused() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let (admin, me) = (f.admin(), f.keys.identity_key());
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    for (name, addresses) in [
        ("nas", vec![ip("10.0.0.1")]),
        ("NAS.home", vec![ip("10.0.0.1")]),
        ("nas.local", vec![ip("10.0.0.1")]),
        ("nas.home", vec![ip("127.0.0.1")]),
        ("nas.home", vec![ip("224.0.0.1")]),
        ("nas.home", vec![ip("::ffff:10.0.0.1")]),
        ("nas.home", (0..17).map(|n| IpAddr::from([10, 0, 0, n])).collect()),
    ] {
        let record = dns_name_record(&admin, f.network, name, addresses.clone(), None, NOW);
        assert!(matches!(refused(&mut ledger, &record), Refusal::Contradiction(_)), "{name} {addresses:?}");
    }
    let four = (1..5).map(|n| IpAddr::from([10, 0, 0, n])).collect();
    let record = dns_split_record(&admin, f.network, "corp.example", four, None, NOW);
    assert!(matches!(refused(&mut ledger, &record), Refusal::Contradiction(_)));
    for (prefix, alias) in [
        ("192.168.1.0/24", "100.99.0.0/16"),
        ("192.168.1.0/24", "fd00:9::/24"),
        ("192.168.1.0/24", "100.99.1.1/24"),
        ("192.168.1.0/24", "224.0.1.0/24"),
        ("192.168.0.0/26", "100.71.0.64/26"),
        ("192.0.0.0/8", "100.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ] {
        let (prefix, alias) = (prefix.parse().unwrap(), alias.parse().unwrap());
        let record = route_alias_record(&admin, f.network, me, prefix, Some(alias), NOW);
        assert!(matches!(refused(&mut ledger, &record), Refusal::Contradiction(_)), "{prefix} {alias}");
    }
    let nobody = f.node();
    let lan = "192.168.1.0/24".parse().unwrap();
    let record = route_alias_record(&admin, f.network, nobody.identity_key(), lan, None, NOW);
    assert_eq!(refused(&mut ledger, &record), Refusal::UnknownTarget);
    let by_nobody =
        dns_name_record(&nobody.identity.signing_key(), f.network, "nas.home", vec![ip("10.0.0.1")], None, NOW);
    assert_eq!(refused(&mut ledger, &by_nobody), Refusal::NotAdmin);
}

#[test]
fn invites_that_make_no_sense_are_refused() {
    let mut f = Founder::new(3);
    let mut ledger = f.ledger();
    let bad = [
        Terms { uses: 0, ..open_terms(1) },
        Terms { name: Some("Not A Label".into()), ..open_terms(1) },
        Terms { routes: vec!["10.0.0.1/8".parse().unwrap()], ..open_terms(1) },
        Terms { routes: vec!["100.71.0.0/25".parse().unwrap()], ..open_terms(1) },
        Terms { routes: vec!["fd00:1:2:3::/64".parse().unwrap()], ..open_terms(1) },
    ];
    for terms in bad {
        let (_, invite) = f.invite(terms.clone());
        assert!(matches!(refused(&mut ledger, &invite), Refusal::Contradiction(_)), "{terms:?}");
    }
    // The whole world is a route; a key of an earlier invite is not a new one.
    let (secret, invite) = f.invite(Terms { routes: vec!["0.0.0.0/0".parse().unwrap()], ..open_terms(1) });
    ledger.admit(&invite, READER).unwrap();
    let Ok(Record::Invite(first)) = invite.open() else { panic!() };
    assert_eq!(first.key, invite_key(&secret));
    let again = SignedRecord::sign(&Record::Invite(Invite { uses: 1_000, ..first }), &f.admin());
    assert_eq!(refused(&mut ledger, &again), Refusal::KeyTaken);
}

// Admins.

#[test]
fn only_root_and_live_admins_sign_for_the_network() {
    let Net { mut f, mut ledger, secret } = net();
    let keys = f.node();
    ledger.admit(&f.member(&keys, &secret, "nas", 2), READER).unwrap();
    let (identity, network) = (keys.identity_key(), f.network);
    let prefix: IpNet = "10.9.0.0/16".parse().unwrap();
    let by = |signer: &ed25519_dalek::SigningKey, rng: &mut rand::rngs::StdRng| {
        [
            admin_record(signer, network, identity, NOW),
            invite_record(signer, network, open_terms(1), NOW, rng).1,
            route_grant_record(signer, network, identity, prefix, NOW),
            revoke_record(signer, network, RevokeTarget::Identity(identity), NOW),
        ]
    };
    for record in by(&keys.identity.signing_key(), &mut f.rng) {
        assert_eq!(refused(&mut ledger, &record), Refusal::NotAdmin);
    }
    for signer in [f.root.clone(), f.admin()] {
        let mut ledger = ledger.clone();
        for record in by(&signer, &mut f.rng) {
            ledger.admit(&record, READER).unwrap();
        }
        assert!(!ledger.is_admin(&identity), "removed in the end");
    }
    // Named an admin, it may.
    ledger.admit(&admin_record(&f.root, network, identity, NOW), READER).unwrap();
    for record in by(&keys.identity.signing_key(), &mut f.rng) {
        ledger.admit(&record, READER).unwrap();
    }
}

#[test]
fn grants_and_revokes_are_about_somebody_known() {
    let Net { mut f, mut ledger, .. } = net();
    let nobody = f.node().identity_key();
    let admin = f.admin();
    let prefix: IpNet = "10.9.0.0/16".parse().unwrap();
    let records = [
        route_grant_record(&admin, f.network, nobody, prefix, NOW),
        revoke_record(&admin, f.network, RevokeTarget::Identity(nobody), NOW),
        revoke_record(&admin, f.network, RevokeTarget::Invite(InviteKey([1; 32])), NOW),
    ];
    for record in &records {
        assert_eq!(refused(&mut ledger, record), Refusal::UnknownTarget);
    }
    let root = IdentityKey(f.network.0);
    assert!(matches!(refused(&mut ledger, &admin_record(&admin, f.network, root, NOW)), Refusal::Contradiction(_)));
    let me = f.keys.identity_key();
    let inside: IpNet = "100.71.0.128/25".parse().unwrap();
    let grant = route_grant_record(&admin, f.network, me, inside, NOW);
    assert!(matches!(refused(&mut ledger, &grant), Refusal::Contradiction(_)));
}

// Revoking.

#[test]
fn a_revoked_node_is_out_for_good() {
    let Net { mut f, mut ledger, secret } = net();
    let keys = f.node();
    let record = f.member(&keys, &secret, "nas", 2);
    ledger.admit(&record, READER).unwrap();
    let identity = keys.identity_key();
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(identity), NOW);
    assert_eq!(ledger.admit(&revoke, READER), Ok(Change::MemberRevoked(identity)));
    assert!(ledger.is_revoked(&identity) && ledger.member(&identity).is_none());
    assert!(ledger.by_wg(&keys.wg_key()).is_none() && ledger.by_control(&keys.control_key()).is_none());
    assert!(ledger.by_name("nas").is_none() && ledger.by_ipv4([100, 71, 0, 2].into()).is_none());
    assert_eq!(ledger.live_members(), 1);
    // The old record again says nothing new, and does not bring it back.
    assert_eq!(ledger.admit(&record, READER), Ok(Change::Known));
    assert!(ledger.member(&identity).is_none());
    // A new record of the same identity is refused, and so are its other keys under a new identity.
    let again = resigned(&record, &secret, &keys, |m| m.created = NOW + 1);
    assert_eq!(refused(&mut ledger, &again), Refusal::Revoked);
    let fresh = f.node();
    let other = f.member(&fresh, &secret, "nas", 2);
    for change in
        [&(|m: &mut Member| m.wg = keys.wg_key()) as &dyn Fn(&mut Member), &|m| m.control = keys.control_key()]
    {
        assert_eq!(refused(&mut ledger, &resigned(&other, &secret, &fresh, change)), Refusal::KeyTaken);
    }
    assert_eq!(refused(&mut ledger, &admin_record(&f.root, f.network, identity, NOW)), Refusal::Revoked);
    // Name and address are free again.
    assert!(ledger.admit(&other, READER).is_ok());
}

#[test]
fn a_revoked_admin_loses_its_rights_and_its_open_invites() {
    let mut f = Founder::new(5);
    let mut ledger = f.ledger();
    let (secret, invite) = f.invite(Terms { admin: true, ..open_terms(1) });
    let second = f.node();
    ledger.admit_all(&[invite, f.member(&second, &secret, "second", 2)], READER).unwrap();
    let signer = second.identity.signing_key();
    let (used, used_record) = invite_record(&signer, f.network, open_terms(1), NOW, &mut f.rng);
    let (half, half_record) = invite_record(&signer, f.network, open_terms(2), NOW, &mut f.rng);
    let (guest, friend) = (f.node(), f.node());
    let joins = [f.member(&guest, &used, "guest", 3), f.member(&friend, &half, "friend", 4)];
    ledger.admit_all(&[used_record, half_record, joins[0].clone(), joins[1].clone()], READER).unwrap();

    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(second.identity_key()), NOW);
    ledger.admit(&revoke, READER).unwrap();
    assert!(!ledger.is_admin(&second.identity_key()));
    assert!(!ledger.invite(&invite_key(&used)).unwrap().revoked(), "it was used up before");
    assert!(ledger.invite(&invite_key(&half)).unwrap().revoked());
    assert_eq!(ledger.live_members(), 3, "those it admitted stay");
    let late = f.node();
    assert_eq!(refused(&mut ledger, &f.member(&late, &half, "late", 5)), Refusal::InviteRevoked);
    let (_, invite) = invite_record(&signer, f.network, open_terms(1), NOW, &mut f.rng);
    assert_eq!(refused(&mut ledger, &invite), Refusal::NotAdmin);
}

#[test]
fn revoking_an_invite_leaves_its_members() {
    let Net { mut f, mut ledger, secret } = net();
    let (early, late) = (f.node(), f.node());
    ledger.admit(&f.member(&early, &secret, "early", 2), READER).unwrap();
    let key = invite_key(&secret);
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Invite(key), NOW);
    assert_eq!(ledger.admit(&revoke, READER), Ok(Change::InviteRevoked(key)));
    assert_eq!(refused(&mut ledger, &f.member(&late, &secret, "late", 3)), Refusal::InviteRevoked);
    assert!(ledger.by_name("early").is_some());
}

#[test]
fn the_founder_can_be_revoked_by_another_admin_and_the_root_still_signs() {
    let mut f = Founder::new(5);
    let mut ledger = f.ledger();
    let (secret, invite) = f.invite(Terms { admin: true, ..open_terms(1) });
    let second = f.node();
    ledger.admit_all(&[invite, f.member(&second, &secret, "second", 2)], READER).unwrap();
    let founder = f.keys.identity_key();
    let revoke = revoke_record(&second.identity.signing_key(), f.network, RevokeTarget::Identity(founder), NOW);
    ledger.admit(&revoke, READER).unwrap();
    assert!(!ledger.is_admin(&founder) && ledger.is_admin(&second.identity_key()));
    let (_, by_root) = invite_record(&f.root.clone(), f.network, open_terms(1), NOW, &mut f.rng);
    assert!(ledger.admit(&by_root, READER).is_ok());
}

// The log.

#[test]
fn a_known_record_is_known_whatever_its_signature_if_that_is_valid() {
    let Net { f, mut ledger, .. } = net();
    let before = ledger.clone();
    let mut broken = f.records[0].clone();
    assert_eq!(ledger.admit(&broken, READER), Ok(Change::Known));
    broken.sig = HexSignature([7; 64]);
    assert_eq!(ledger.admit(&broken, READER), Err(Refusal::Record(RecordError::BadSignature)));
    let mut extra = f.records[0].clone();
    extra.cosig = Some(extra.sig);
    assert_eq!(ledger.admit(&extra, READER), Ok(Change::Known));
    assert_eq!(ledger, before);
}

#[test]
fn heads_tell_logs_and_their_prefixes_apart() {
    let Net { ledger, .. } = net();
    let mut head = Digest32::default();
    assert_eq!(ledger.head_after(0), Some(head));
    for (i, record) in ledger.log().iter().enumerate() {
        head = log_head(head, record);
        assert_eq!(ledger.head_after(i + 1), Some(head));
        assert_eq!(ledger.position(&record.id()), Some(i));
    }
    assert_eq!(ledger.head(), head);
    assert_eq!(ledger.head_after(ledger.log().len() + 1), None);
}

#[test]
fn several_records_are_admitted_all_or_none() {
    let Net { mut f, mut ledger, secret } = net();
    let (one, two) = (f.node(), f.node());
    let records = [f.member(&one, &secret, "one", 2), f.member(&two, &secret, "one", 3)];
    let before = ledger.clone();
    assert_eq!(ledger.admit_all(&records, READER), Err((1, Refusal::NameTaken("one".into()))));
    assert_eq!(ledger, before);
}

/// A log in which everything happens that can.
fn busy_log(seed: u64) -> (Founder, Vec<SignedRecord>) {
    let mut f = Founder::new(seed);
    let mut log = f.records.to_vec();
    let admin = f.admin();
    let (open, open_record) = f.invite(open_terms(4));
    let (deputy_secret, deputy_invite) = f.invite(Terms { admin: true, ..open_terms(1) });
    let (nas, phone, deputy, late) = (f.node(), f.node(), f.node(), f.node());
    log.extend([open_record, deputy_invite]);
    log.push(f.member(&nas, &open, "nas", 2));
    log.push(f.member(&deputy, &deputy_secret, "deputy", 3));
    log.push(f.member(&phone, &open, "phone", 4));
    let by_deputy = deputy.identity.signing_key();
    let (spare, spare_record) = invite_record(&by_deputy, f.network, open_terms(2), NOW, &mut f.rng);
    log.push(spare_record);
    log.push(f.member(&late, &spare, "late", 5));
    let lan = "192.168.7.0/24".parse().unwrap();
    log.push(route_grant_record(&by_deputy, f.network, nas.identity_key(), lan, NOW));
    log.push(route_grant_record(&admin, f.network, nas.identity_key(), lan, NOW + 1));
    log.push(route_revoke_record(&admin, f.network, nas.identity_key(), lan, NOW + 1));
    log.push(route_revoke_record(&by_deputy, f.network, nas.identity_key(), lan, NOW + 1));
    log.push(route_grant_record(&admin, f.network, nas.identity_key(), lan, NOW + 2));
    let ip = |text: &str| vec![text.parse().unwrap()];
    log.push(dns_name_record(&admin, f.network, "nas.home", ip("192.168.7.2"), None, NOW));
    log.push(dns_name_record(&by_deputy, f.network, "nas.home", ip("192.168.7.2"), None, NOW));
    log.push(dns_name_record(&admin, f.network, "nas.home", Vec::new(), None, NOW + 1));
    log.push(dns_split_record(&admin, f.network, "corp.example", ip("10.0.0.53"), Some(nas.identity_key()), NOW));
    log.push(dns_split_record(&admin, f.network, "corp.example", ip("10.0.0.54"), None, NOW + 1));
    log.push(route_alias_record(
        &admin,
        f.network,
        nas.identity_key(),
        lan,
        Some("100.99.7.0/24".parse().unwrap()),
        NOW,
    ));
    log.push(route_alias_record(&by_deputy, f.network, nas.identity_key(), lan, None, NOW));
    log.push(revoke_record(&by_deputy, f.network, RevokeTarget::Identity(phone.identity_key()), NOW));
    let again = f.node();
    log.push(f.member(&again, &open, "phone", 4));
    log.push(admin_record(&by_deputy, f.network, again.identity_key(), NOW));
    log.push(admin_record(&f.root, f.network, again.identity_key(), NOW + 1));
    log.push(revoke_record(&admin, f.network, RevokeTarget::Identity(deputy.identity_key()), NOW));
    log.push(revoke_record(&admin, f.network, RevokeTarget::Identity(deputy.identity_key()), NOW + 1));
    log.push(revoke_record(&admin, f.network, RevokeTarget::Invite(invite_key(&open)), NOW));
    (f, log)
}

#[test]
fn replaying_a_log_gives_the_same_state_and_truncating_gives_every_earlier_one() {
    let (f, log) = busy_log(11);
    let mut states = vec![Ledger::new(f.network)];
    for record in &log {
        let mut next = states.last().unwrap().clone();
        let change = next.admit(record, READER).unwrap();
        assert_ne!(change, Change::Known);
        states.push(next);
    }
    let mut replayed = Ledger::new(f.network);
    replayed.admit_all(states.last().unwrap().log(), READER).unwrap();
    assert_eq!(replayed, *states.last().unwrap());
    for (len, state) in states.iter().enumerate().rev() {
        replayed.truncate(len);
        assert_eq!(replayed, *state, "after truncating to {len}");
    }
}

#[test]
fn a_chain_convinces_somebody_who_knows_only_the_network_id() {
    let (mut f, log) = busy_log(12);
    let mut ledger = Ledger::new(f.network);
    ledger.admit_all(&log, READER).unwrap();
    // Named an admin by the deputy, who was made one by invite and is out since.
    let third = ledger.by_name("phone").unwrap().identity;
    assert!(ledger.is_admin(&third));
    for key in ledger.invites().map(|i| i.invite.key).collect::<Vec<_>>() {
        let chain = ledger.chain(&key);
        let mut guest = Ledger::new(f.network);
        guest.admit_all(&chain, READER).unwrap();
        assert_eq!(guest.invite(&key).map(|i| i.issuer), ledger.invite(&key).map(|i| i.issuer));
        assert_eq!(chain.last(), ledger.invite_record(&key));
        assert!(chain.len() < log.len());
    }
    assert!(ledger.chain(&InviteKey([1; 32])).is_empty());
    let mut guest = Ledger::new(f.network);
    guest.admit_all(&ledger.admin_chain(), READER).unwrap();
    assert!(guest.is_admin(&third) && guest.is_admin(&f.keys.identity_key()));
    let (_, unseen) = f.invite(open_terms(1));
    assert!(guest.admit(&unseen, READER).is_ok());
}

#[test]
fn free_names_count_up_past_gaps_and_thousands() {
    let Net { mut f, mut ledger, .. } = net();
    assert_eq!(ledger.free_name("nas", |_| false), "nas");
    assert_eq!(ledger.free_name("laptop", |_| false), "laptop-2");
    assert_eq!(ledger.free_name("nas", |n| n == "nas"), "nas-2");
    let (secret, invite) = f.invite(open_terms(100));
    ledger.admit(&invite, READER).unwrap();
    for host in 2..100 {
        let keys = f.node();
        let name = ledger.free_name("laptop", |_| false);
        assert_eq!(name, format!("laptop-{host}"));
        ledger.admit(&f.member(&keys, &secret, &name, host), READER).unwrap();
    }
    assert_eq!(ledger.free_ipv4(|_| false), Some([100, 71, 0, 100].into()));
    let mut looks = std::cell::Cell::new(0);
    let name = ledger.free_name("big", |n| {
        looks.set(looks.get() + 1);
        n == "big" || n.strip_prefix("big-").is_some_and(|i| i.parse::<u64>().unwrap() < 50_000)
    });
    assert_eq!(name, "big-50000");
    assert!(*looks.get_mut() < 50);
}

#[test]
fn a_network_with_a_full_range_of_members_is_handled_in_order() {
    // Without signatures: the state only, applied as the ledger would after judging.
    let mut f = Founder::new(1);
    let ipv6: Ipv6Net = "fd00::/48".parse().unwrap();
    let records = found(&f.keys, &f.root, "big", "n0", "100.71.0.0/16".parse().unwrap(), ipv6, NOW, &mut f.rng);
    let mut ledger = Ledger::new(network_id(&f.root));
    ledger.admit_all(&records, READER).unwrap();
    let (secret, invite) = invite_record(&f.root, f.network, open_terms(u32::MAX), NOW, &mut f.rng);
    ledger.admit(&invite, READER).unwrap();
    let template = member_record(&f.keys, &secret, f.network, "n", [100, 71, 0, 1].into(), "::".parse().unwrap(), NOW);
    let Ok(Record::Member(template)) = template.open() else { panic!() };
    for i in 1..65_534_u32 {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&i.to_be_bytes());
        let member = Member {
            identity: IdentityKey(key),
            wg: WgKey(key),
            control: ControlKey(key),
            name: ledger.free_name("n", |_| false),
            ipv4: ledger.free_ipv4(|_| false).unwrap(),
            ..template.clone()
        };
        let signed = SignedRecord {
            payload: format!("{{\"i\":{i}}}"),
            signer: Digest32(member.invite.0),
            sig: HexSignature([0; 64]),
            cosig: None,
        };
        ledger.apply(signed.id(), signed, Record::Member(member));
    }
    assert_eq!(ledger.free_ipv4(|_| false), None);
    assert_eq!(ledger.live_members(), 65_534);
    assert_eq!(ledger.free_name("n", |_| false), "n-65534");
}

// What nobody foresaw.

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Logs with records dropped, repeated, reordered and damaged never admit a member, an admin or an invite that the
    /// honest log does not have, never put a WireGuard key under another identity, and never forget a Revoke they accepted.
    #[test]
    fn a_mutated_log_admits_nobody_new(
        seed in 0u64..4,
        picks in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..10, any::<prop::sample::Index>(), any::<u8>()), 1..60),
    ) {
        let (f, log) = busy_log(seed);
        let mut honest = Ledger::new(f.network);
        honest.admit_all(&log, READER).unwrap();
        let mut ledger = Ledger::new(f.network);
        let mut out = BTreeSet::new();
        for (which, what, place, with) in picks {
            let mut record = which.get(&log).clone();
            match what {
                0 => damage_text(&mut record.payload, place, with),
                1 => { let i = place.index(32); record.signer.0[i] ^= with; }
                2 => { let i = place.index(64); record.sig.0[i] ^= with; }
                3 => if let Some(cosig) = &mut record.cosig { let i = place.index(64); cosig.0[i] ^= with; },
                4 => record.signer = place.get(&log).signer,
                5 => record.payload = place.get(&log).payload.clone(),
                _ => {}
            }
            let before = ledger.clone();
            if ledger.admit(&record, READER).is_err() {
                prop_assert_eq!(&ledger, &before);
            }
            out.extend(ledger.revoked.keys().copied());
            prop_assert!(out.iter().all(|who| ledger.is_revoked(who) && ledger.member(who).is_none()));
        }
        for member in ledger.members() {
            prop_assert_eq!(Some(member), honest.member_ever(&member.identity));
        }
        for who in ledger.admins.keys() {
            prop_assert!(honest.admins.contains_key(who));
        }
        for key in ledger.invites.keys() {
            prop_assert!(honest.invites.contains_key(key));
        }
        let mut replayed = Ledger::new(f.network);
        replayed.admit_all(ledger.log(), READER).unwrap();
        prop_assert_eq!(replayed, ledger);
    }
}

fn damage_text(text: &mut String, place: prop::sample::Index, with: u8) {
    let mut bytes = std::mem::take(text).into_bytes();
    let at = place.index(bytes.len());
    bytes[at] = with & 0x7f;
    *text = String::from_utf8(bytes).unwrap();
}

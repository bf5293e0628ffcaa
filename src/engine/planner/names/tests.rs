use std::sync::Arc;

use super::*;
use crate::engine::drops::Drops;
use crate::engine::io::{Input, RouteWish};
use crate::engine::planner::{Config, Limits};
use crate::time::Now;
use crate::trust::founding::route_grant_record;
use crate::trust::testing::{Founder, NOW, open_terms};
use crate::wire::control::{ToNode, log_head};

/// The founder, laptop, and a node gate that may lead to 192.168.1.0/24.
fn planner() -> Planner {
    let mut f = Founder::new(5);
    let (secret, invite) = f.invite(open_terms(9));
    let gate = f.node();
    let mut records = f.records.to_vec();
    records.extend([invite, f.member(&gate, &secret, "gate", 10)]);
    let lan = "192.168.1.0/24".parse().unwrap();
    records.push(route_grant_record(&f.admin(), f.network, gate.identity_key(), lan, NOW));
    let config = Config {
        keys: Founder::new(5).keys,
        network: f.network,
        records,
        port_v4: Some(7000),
        port_v6: None,
        last_endpoints: Vec::new(),
        worked: Vec::new(),
        seed: [1; 32],
        first_number: 1,
        adverts: Vec::new(),
        routes: RouteWish::default(),
        limits: Limits::default(),
    };
    let mut planner = Planner::new(config, Arc::<Drops>::default(), Now::ZERO).unwrap();
    planner.handle(Input::ControlUp, Now::ZERO);
    planner
}

fn word(kind: DnsKind, name: &str, addresses: &[&str]) -> DnsWord {
    DnsWord { kind, name: name.to_owned(), addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect() }
}

fn name(name: &str, addresses: &[&str]) -> DnsWord {
    word(DnsKind::Name, name, addresses)
}

/// Says it, and hands the records back as the coordinator does. True: that was told.
fn say(planner: &mut Planner, words: &[DnsWord]) -> Result<Vec<DnsChange>, Problem> {
    let (records, changes) = planner.dns_words(words, None, false, NOW)?;
    for record in records {
        let (from, head) = (planner.ledger().log().len() as u64, log_head(planner.ledger().head(), &record));
        while planner.poll_output().is_some() {}
        planner.handle(Input::Control(ToNode::Log { from, records: vec![record], head, end: true }), Now::ZERO);
        let told =
            std::iter::from_fn(|| planner.poll_output()).any(|o| matches!(o, Output::Event(Event::NamesChanged)));
        assert!(told, "nobody was told");
    }
    Ok(changes)
}

fn code(planner: &Planner, words: &[DnsWord], at: Option<&str>) -> String {
    let refused = planner.dns_words(words, at, false, NOW).unwrap_err();
    assert!(!refused.hint.is_empty(), "{refused:?}");
    refused.code
}

#[test]
fn names_come_and_go_and_change() {
    let mut planner = planner();
    let changes = say(&mut planner, &[name("NAS.home.", &["192.168.1.10"]), name("cam", &["192.168.1.30"])]).unwrap();
    assert_eq!((changes[0].name.as_str(), changes[1].name.as_str()), ("nas.home", "cam.home.internal"));
    assert!(changes.iter().all(|change| !change.already && !change.replaced && change.note.is_none()));
    let again = say(&mut planner, &[name("nas.home", &["192.168.1.10"])]).unwrap();
    assert!(again[0].already);
    let other = say(&mut planner, &[name("nas.home", &["192.168.1.11", "192.168.1.11"])]).unwrap();
    assert!(other[0].replaced && other[0].addresses.len() == 1);
    // The clock does not have to run between two words.
    assert!(say(&mut planner, &[name("nas.home", &[])]).is_ok());
    assert_eq!(planner.dns_list(&BTreeSet::new()).names.len(), 1);
    assert_eq!(code(&planner, &[name("nas.home", &[])], None), "no-such-name");
    let near = planner.dns_words(&[name("can.home.internal", &[])], None, false, NOW).unwrap_err();
    assert_eq!(near.hint, "did you mean cam.home.internal?");
    // What may be somebody else's is said.
    let public = say(&mut planner, &[name("github.com", &["192.168.1.10"])]).unwrap();
    assert!(public[0].note.as_ref().is_some_and(|note| note.contains("github.com")));
}

#[test]
fn names_and_addresses_that_cannot_be_are_refused() {
    let planner = planner();
    let refused = |typed: &str, address: &str| code(&planner, &[name(typed, &[address])], None);
    assert_eq!(refused("gate", "192.168.1.1"), "name-taken");
    assert_eq!(refused("gate.home.internal", "192.168.1.1"), "name-taken");
    assert_eq!(refused("home.internal", "192.168.1.1"), "name-taken");
    assert_eq!(refused("nas_1.home", "192.168.1.1"), "bad-name");
    assert_eq!(refused("nas.local", "192.168.1.1"), "bad-name");
    assert_eq!(refused("nas.home", "127.0.0.1"), "bad-address");
    assert_eq!(refused("nas.home", "192.168.2.1"), "address-not-routed");
    assert_eq!(refused("nas.home", "100.71.0.99"), "address-not-routed");
    assert_eq!(code(&planner, &[name("nas.home", &["192.168.1.1"])], Some("laptop")), "address-not-routed");
    assert_eq!(code(&planner, &[name("nas.home", &["192.168.1.1"])], Some("gat")), "no-such-peer");
    assert_eq!(code(&planner, &[name("a.home", &["192.168.1.1"]), name("A.home", &["192.168.1.2"])], None), "usage");
    let many: Vec<String> = (0..17).map(|n| format!("192.168.1.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(code(&planner, &[name("nas.home", &many)], None), "usage");
    let split = |domain: &str| code(&planner, &[word(DnsKind::Split, domain, &["192.168.1.53"])], None);
    assert_eq!((split("x.home.internal"), split("com")), ("name-taken".into(), "bad-name".into()));
    // An address of a node, one that is everybody's, and any with a word more.
    for address in ["100.71.0.10", "203.0.113.5"] {
        assert!(planner.dns_words(&[name("nas.home", &[address])], None, false, NOW).is_ok(), "{address}");
    }
    assert!(planner.dns_words(&[name("nas.home", &["10.9.9.9"])], None, true, NOW).is_ok());
}

#[test]
fn there_is_an_end_to_names() {
    let planner = planner();
    let words = |kind, count: usize| -> Vec<DnsWord> {
        (0..count).map(|n| word(kind, &format!("n{n}.home"), &["192.168.1.1"])).collect()
    };
    assert!(planner.dns_words(&words(DnsKind::Split, MAX_SPLITS), None, false, NOW).is_ok());
    assert_eq!(code(&planner, &words(DnsKind::Split, MAX_SPLITS + 1), None), "too-many-names");
    assert_eq!(code(&planner, &words(DnsKind::Name, MAX_NAMES + 1), None), "too-many-names");
}

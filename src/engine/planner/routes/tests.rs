use std::sync::Arc;

use super::*;
use crate::engine::drops::Drops;
use crate::engine::io::Input;
use crate::engine::planner::{Config, Limits};
use crate::trust::keys::NodeKeys;
use crate::trust::testing::{Founder, NOW, open_terms};
use crate::wire::control::{ToNode, log_head};
use crate::wire::local::{AliasChange, AliasWish};

const LAN: &str = "192.168.7.0/24";

/// The founder's planner in a network with routers `r0`, `r1`, …, and what it tells workers and shell.
struct Desk {
    f: Founder,
    routers: Vec<NodeKeys>,
    planner: Planner,
    updates: Vec<Update>,
    plans: Vec<RoutePlan>,
    kept: BTreeMap<IdentityKey, SignedAdvert>,
    said: Vec<SignedAdvert>,
    number: u64,
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

impl Desk {
    fn new(routers: u8) -> Self {
        let mut f = Founder::new(5);
        let (secret, invite) = f.invite(open_terms(9));
        let mut records = f.records.to_vec();
        records.push(invite);
        let routers: Vec<NodeKeys> = (0..routers).map(|_| f.node()).collect();
        for (keys, i) in routers.iter().zip(0u8..) {
            records.push(f.member(keys, &secret, &format!("r{i}"), 10 + i));
        }
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
        let planner = Planner::new(config, Arc::<Drops>::default(), Now::ZERO).unwrap();
        let mut desk = Self {
            f,
            routers,
            planner,
            updates: vec![],
            plans: vec![],
            kept: BTreeMap::new(),
            said: vec![],
            number: 0,
        };
        desk.input(Input::ControlUp);
        desk.updates.clear();
        desk
    }

    fn input(&mut self, input: Input) {
        self.planner.handle(input, Now::ZERO);
        while let Some(output) = self.planner.poll_output() {
            match output {
                Output::Update(update) => self.updates.push(update),
                Output::Routes(plan) => self.plans.push(plan),
                Output::KeepAdvert { of, advert: Some(advert) } => drop(self.kept.insert(of, advert)),
                Output::KeepAdvert { of, advert: None } => drop(self.kept.remove(&of)),
                Output::Control(ToCoordinator::Advertise { advert, .. }) => self.said.push(advert),
                _ => {}
            }
        }
    }

    fn advert(&mut self, router: usize, routes: &[&str], resting: &[&str]) -> SignedAdvert {
        self.number += 1;
        let keys = &self.routers[router];
        let list = |texts: &[&str]| texts.iter().map(|text| net(text)).collect();
        let advert = Advert {
            v: 1,
            network: self.f.network,
            identity: keys.identity_key(),
            number: self.number,
            routes: list(routes),
            resting: list(resting),
            draining: Vec::new(),
            lan: Vec::new(),
            relay: false,
        };
        SignedAdvert::sign(&advert, &keys.identity.signing_key())
    }

    /// A router says that it wants to be left.
    fn drain(&mut self, router: usize, prefix: &str) {
        let resting = self.advert(router, &[], &[prefix]).open(&self.f.network).unwrap();
        let advert = Advert { draining: resting.resting.clone(), ..resting };
        let signed = SignedAdvert::sign(&advert, &self.routers[router].identity.signing_key());
        self.input(Input::Control(ToNode::Adverts { adverts: vec![signed] }));
    }

    /// The routers with which flows to a prefix stay, as the workers were told last.
    fn keepers(&self, prefix: &str) -> BTreeSet<PeerId> {
        let mut keepers = BTreeSet::new();
        for update in &self.updates {
            if let Update::Peer { peer, keeps, .. } = update {
                match keeps.contains(&net(prefix)) {
                    true => keepers.insert(*peer),
                    false => keepers.remove(peer),
                };
            }
        }
        keepers
    }

    fn advertise(&mut self, router: usize, routes: &[&str], resting: &[&str]) {
        let advert = self.advert(router, routes, resting);
        self.input(Input::Control(ToNode::Adverts { adverts: vec![advert] }));
    }

    fn publish(&mut self, record: SignedRecord) {
        let ledger = self.planner.ledger();
        let (from, head) = (ledger.log().len() as u64, log_head(ledger.head(), &record));
        self.input(Input::Control(ToNode::Log { from, records: vec![record], head, end: true }));
    }

    fn word(&mut self, node: &str, prefix: &str, allow: bool) -> RouteChange {
        let (record, change) = self.planner.route_word(node, net(prefix), allow, NOW).unwrap();
        assert_eq!(record.is_none(), change.already);
        record.into_iter().for_each(|record| self.publish(record));
        change
    }

    fn presence(&mut self, online: &[usize], offline: &[usize]) {
        let keys = |list: &[usize]| list.iter().map(|i| self.routers[*i].wg_key()).collect();
        let presence = ToNode::Presence { full: false, online: keys(online), offline: keys(offline) };
        self.input(Input::Control(presence));
    }

    /// Who is asked for a prefix.
    fn asked(&self, prefix: &str) -> Option<String> {
        let line = self.lines().into_iter().find(|line| line.prefix == net(prefix) && line.via.is_some());
        line.and_then(|line| line.via)
    }

    fn lines(&self) -> Vec<RouteLine> {
        self.planner.route_lines(&BTreeMap::new())
    }

    fn state(&self, node: &str, prefix: &str) -> RouteState {
        self.lines().into_iter().find(|l| l.node == node && l.prefix == net(prefix)).unwrap().state
    }
}

#[test]
fn a_prefix_is_pending_then_active_then_pending_again() {
    let mut desk = Desk::new(1);
    desk.presence(&[0], &[]);
    desk.advertise(0, &[LAN], &[]);
    assert_eq!(desk.state("r0", LAN), RouteState::Pending);
    assert!(desk.planner.pending_routes()[0].1.contains("meshd routes approve r0 192.168.7.0/24"));
    assert!(desk.plans.iter().all(|plan| plan.accepted.is_empty()));
    assert!(!desk.word("r0", LAN, true).already);
    assert_eq!(desk.state("r0", LAN), RouteState::Active);
    assert_eq!(desk.plans.last().unwrap().accepted, [net(LAN)]);
    assert!(desk.planner.pending_routes().is_empty());
    assert!(desk.word("r0", LAN, true).already);
    // Taken back and given again within the same second of the wall clock.
    assert!(!desk.word("r0", LAN, false).already);
    assert_eq!(desk.state("r0", LAN), RouteState::Pending);
    assert!(desk.plans.last().unwrap().accepted.is_empty());
    assert!(!desk.word("r0", LAN, true).already);
    assert_eq!(desk.state("r0", LAN), RouteState::Active);
    // What it stops advertising is not used, and needs no new approval later.
    desk.advertise(0, &[], &[]);
    assert_eq!(desk.state("r0", LAN), RouteState::Approved);
    desk.advertise(0, &[LAN], &[]);
    assert_eq!(desk.state("r0", LAN), RouteState::Active);
}

#[test]
fn an_approval_is_for_one_prefix_exactly() {
    let mut desk = Desk::new(1);
    desk.word("r0", "10.0.0.0/8", true);
    let exit = desk.word("r0", "0.0.0.0/0", true);
    assert!(exit.note.unwrap().contains("does not advertise"));
    desk.advertise(0, &["10.1.0.0/16", LAN], &[]);
    assert_eq!(desk.state("r0", "10.1.0.0/16"), RouteState::Pending);
    assert_eq!(desk.state("r0", LAN), RouteState::Pending);
}

#[test]
fn of_several_routers_the_one_asked_stays_while_it_is_good() {
    let mut desk = Desk::new(3);
    for i in 0..3 {
        desk.word(&format!("r{i}"), LAN, true);
        desk.advertise(i, &[LAN], &[]);
    }
    desk.presence(&[1, 2], &[]);
    let first = desk.asked(LAN).unwrap();
    assert_ne!(first, "r0", "it is not connected");
    // Another one coming changes nothing.
    desk.presence(&[0], &[]);
    assert_eq!(desk.asked(LAN).as_ref(), Some(&first));
    // It rests: the packets go elsewhere, and what it still sends is let in.
    let resting = first[1..].parse().unwrap();
    desk.updates.clear();
    desk.advertise(resting, &[], &[LAN]);
    let second = desk.asked(LAN).unwrap();
    assert_ne!(second, first);
    let changes: Vec<(bool, bool)> = desk
        .updates
        .iter()
        .map(|u| {
            let Update::Peer { owns, admits, .. } = u else { panic!("{u:?}") };
            (owns.contains(&net(LAN)), admits.contains(&net(LAN)))
        })
        .collect();
    assert_eq!(changes, [(true, true), (false, true)], "given to the new one before it is taken from the old");
    // It serves again: the packets stay where they are.
    desk.advertise(resting, &[LAN], &[]);
    assert_eq!(desk.asked(LAN).as_ref(), Some(&second));
    // The one asked goes offline, then all of them: somebody is still asked.
    desk.presence(&[], &[second[1..].parse().unwrap()]);
    let third = desk.asked(LAN).unwrap();
    assert_ne!(third, second);
    desk.presence(&[], &[0, 1, 2]);
    assert!(desk.asked(LAN).is_some());
    // Only resting ones are left: better than nobody.
    for i in 0..3 {
        desk.advertise(i, &[], &[LAN]);
    }
    assert!(desk.asked(LAN).is_some());
}

#[test]
fn one_that_drains_keeps_its_flows_and_gets_no_new_ones() {
    let mut desk = Desk::new(2);
    for i in 0..2 {
        desk.word(&format!("r{i}"), LAN, true);
        desk.advertise(i, &[LAN], &[]);
    }
    desk.presence(&[0, 1], &[]);
    let first: usize = desk.asked(LAN).unwrap()[1..].parse().unwrap();
    let (asked, other) = (format!("r{first}"), format!("r{}", 1 - first));
    assert_eq!(desk.keepers(LAN).len(), 2);
    desk.drain(first, LAN);
    assert_eq!(desk.asked(LAN), Some(other.clone()));
    assert_eq!(desk.keepers(LAN).len(), 2, "what goes through it stays");
    let line = desk.lines().into_iter().find(|line| line.node == asked).unwrap();
    assert!(line.state == RouteState::Approved && line.why.unwrap().contains("drained"));
    // The other one drains too: somebody is asked still, and that is the better of the two.
    desk.drain(1 - first, LAN);
    assert_eq!(desk.asked(LAN), Some(other.clone()));
    desk.advertise(1 - first, &[], &[LAN]);
    assert_eq!(desk.asked(LAN), Some(asked.clone()), "a drained one forwards, a cut one does not");
    assert_eq!(desk.keepers(LAN).len(), 1, "nothing stays with the one that is cut");
    // It goes down after all.
    desk.advertise(1 - first, &[LAN], &[]);
    desk.presence(&[], &[first]);
    assert_eq!((desk.asked(LAN), desk.keepers(LAN).len()), (Some(other), 1));
}

#[test]
fn what_a_router_finds_behind_itself_is_said_at_once() {
    let mut desk = Desk::new(0);
    let wish = |draining| RouteWish { advertise: vec![net(LAN), net("10.0.0.0/8")], draining, ..RouteWish::default() };
    desk.input(Input::Routes(wish(false)));
    let lan = vec!["192.168.7.1:7000".parse().unwrap()];
    desk.input(Input::AnswersAt(lan.clone()));
    desk.input(Input::Cut(BTreeSet::from([net(LAN)])));
    let said = |desk: &mut Desk| desk.said.pop().unwrap().open(&desk.f.network).unwrap();
    let cut = said(&mut desk);
    assert_eq!((cut.routes, cut.resting, cut.draining), (vec![net("10.0.0.0/8")], vec![net(LAN)], vec![]));
    assert_eq!(cut.lan, lan);
    desk.input(Input::Routes(wish(true)));
    let drained = said(&mut desk);
    assert_eq!(drained.routes, []);
    assert_eq!((drained.resting.len(), drained.draining), (2, vec![net("10.0.0.0/8")]), "what is cut is not drained");
    desk.input(Input::Routes(wish(false)));
    desk.input(Input::Cut(BTreeSet::new()));
    assert_eq!(said(&mut desk).routes.len(), 2);
    // Said once is enough.
    desk.said.clear();
    desk.input(Input::Cut(BTreeSet::new()));
    desk.input(Input::AnswersAt(lan));
    assert!(desk.said.is_empty());
}

/// Nothing is installed in either place; what a person reads is another thing.
#[test]
fn a_network_with_the_same_numbers_is_home_or_another_place() {
    let mut desk = Desk::new(1);
    desk.word("r0", LAN, true);
    desk.advertise(0, &[LAN], &[]);
    desk.presence(&[0], &[]);
    let line = |place| {
        let overlap = Overlap { by: "eth0 is in it itself".to_owned(), interface: Some(2), place };
        desk.planner.route_lines(&BTreeMap::from([(net(LAN), overlap)])).remove(0)
    };
    for (place, words) in [
        (Some(RoutePlace::Home), "reached directly"),
        (Some(RoutePlace::Away), "another network with the same numbers"),
        (Some(RoutePlace::Unknown), "eth0 is in it itself"),
        (None, "eth0 is in it itself"),
    ] {
        let line = line(place);
        assert_eq!((line.state, line.place, line.via.clone()), (RouteState::Shadowed, place, None));
        assert!(line.why.as_ref().unwrap().contains(words), "{line:?}");
    }
    assert_eq!(desk.lines().remove(0).place, None);
}

#[test]
fn a_removed_router_leads_nowhere() {
    let mut desk = Desk::new(2);
    for i in 0..2 {
        desk.word(&format!("r{i}"), LAN, true);
        desk.advertise(i, &[LAN], &[]);
    }
    desk.presence(&[0, 1], &[]);
    let asked = desk.asked(LAN).unwrap();
    let keys = &desk.routers[asked[1..].parse::<usize>().unwrap()];
    let target = crate::trust::record::RevokeTarget::Identity(keys.identity_key());
    let revoke = crate::trust::founding::revoke_record(&desk.f.admin(), desk.f.network, target, NOW);
    desk.publish(revoke);
    assert_ne!(desk.asked(LAN).unwrap(), asked);
    assert_eq!(desk.kept.len(), 1);
    assert_eq!(desk.lines().len(), 1);
}

#[test]
fn old_forged_and_foreign_advertisements_change_nothing() {
    let mut desk = Desk::new(2);
    desk.word("r0", LAN, true);
    let old = desk.advert(0, &[LAN], &[]);
    desk.advertise(0, &[], &[]);
    desk.input(Input::Control(ToNode::Adverts { adverts: vec![old] }));
    assert_eq!(desk.state("r0", LAN), RouteState::Approved, "replayed");
    // The coordinator cannot make one, and one node's is not another's.
    let forged = SignedAdvert { sig: crate::trust::record::HexSignature([7; 64]), ..desk.advert(0, &[LAN], &[]) };
    let stranger = desk.f.node();
    let advert = desk.advert(1, &[LAN], &[]).open(&desk.f.network).unwrap();
    let foreign = Advert { identity: stranger.identity_key(), ..advert };
    let foreign = SignedAdvert::sign(&foreign, &stranger.identity.signing_key());
    desk.input(Input::Control(ToNode::Adverts { adverts: vec![forged, foreign] }));
    assert_eq!(desk.state("r0", LAN), RouteState::Approved);
    assert!(desk.asked(LAN).is_none());
}

#[test]
fn routes_can_be_refused_and_an_exit_node_is_asked_for_by_name_only() {
    let mut desk = Desk::new(1);
    desk.presence(&[0], &[]);
    for prefix in [LAN, "0.0.0.0/0", "0.0.0.0/1"] {
        let record =
            route_grant_record(&desk.f.admin(), desk.f.network, desk.routers[0].identity_key(), net(prefix), NOW);
        desk.publish(record);
    }
    desk.advertise(0, &[LAN, "0.0.0.0/0", "0.0.0.0/1"], &[]);
    assert_eq!(desk.plans.last().unwrap().accepted, [net(LAN)], "neither everything nor half of it");
    desk.input(Input::Routes(RouteWish { accept: false, ..RouteWish::default() }));
    assert!(desk.plans.last().unwrap().accepted.is_empty());
    let exit_node = Some(desk.routers[0].identity_key());
    desk.input(Input::Routes(RouteWish { accept: false, exit_node, ..RouteWish::default() }));
    assert_eq!(desk.plans.last().unwrap().accepted, [net("0.0.0.0/0"), net("::/0")]);
    assert_eq!(desk.state("r0", "0.0.0.0/0"), RouteState::Active);
    // Without it everything still leads into the tunnel, and nowhere from there.
    desk.advertise(0, &[], &[]);
    assert_eq!(desk.plans.last().unwrap().accepted, [net("0.0.0.0/0"), net("::/0")]);
    assert_eq!(desk.asked("0.0.0.0/0"), None);
}

#[test]
fn what_this_node_leads_to_is_said_again_and_survives_a_lost_memory() {
    let mut desk = Desk::new(0);
    desk.input(Input::Routes(RouteWish { advertise: vec![net(LAN)], ..RouteWish::default() }));
    let first = desk.said.pop().unwrap();
    assert!(desk.plans.iter().all(|plan| plan.serving.is_empty()), "not approved");
    desk.word("laptop", LAN, true);
    assert_eq!(desk.plans.last().unwrap().serving, [net(LAN)]);
    assert!(matches!(desk.updates.last(), Some(Update::Serves(prefixes)) if *prefixes == [net(LAN)]));
    desk.input(Input::ControlDown { problem: None });
    desk.input(Input::ControlUp);
    assert_eq!(desk.said.pop().unwrap(), first, "the same, on the next connection");
    // A newer one of ours is about: this machine's state was restored from a backup.
    let me = desk.f.keys.identity_key();
    let ahead = Advert { number: 900, routes: vec![], ..first.open(&desk.f.network).unwrap() };
    let ahead = SignedAdvert::sign(&ahead, &desk.f.admin());
    desk.input(Input::Control(ToNode::Adverts { adverts: vec![ahead] }));
    let renewed = desk.said.pop().unwrap().open(&desk.f.network).unwrap();
    assert!(renewed.number > 900 && renewed.routes == [net(LAN)]);
    assert_eq!(desk.kept[&me].open(&desk.f.network).unwrap(), renewed);
}

#[test]
fn prefixes_that_cannot_be_routes_are_named() {
    let desk = Desk::new(1);
    let code = |prefix: &str| desk.planner.check_prefix(&net(prefix)).map_err(|p| p.code);
    for good in [LAN, "10.0.0.0/8", "0.0.0.0/0", "::/0", "2001:db8::/32", "192.168.7.9/32"] {
        assert_eq!(code(good), Ok(()), "{good}");
    }
    for mesh in ["100.64.0.0/10", "100.71.0.0/25", "fd00::/16"] {
        assert_eq!(code(mesh), Err("route-covers-mesh".into()), "{mesh}");
    }
    for wide in ["0.0.0.0/1", "128.0.0.0/2", "8000::/1"] {
        assert_eq!(code(wide), Err("route-too-wide".into()), "{wide}");
    }
    let unknown = desk.planner.route_word("r9", net(LAN), true, NOW).unwrap_err();
    assert!(unknown.hint.contains("r0"), "{unknown:?}");
    assert_eq!(desk.planner.route_word("r0", net(LAN), false, NOW).unwrap_err().code, "no-such-route");
}

// ---- aliases ---------------------------------------------------------------------------------------------------------

/// Three routers that lead to networks with the same numbers.
fn three() -> Desk {
    let mut desk = Desk::new(3);
    desk.presence(&[0, 1, 2], &[]);
    for router in 0..3 {
        desk.advertise(router, &[LAN], &[]);
        desk.word(&format!("r{router}"), LAN, true);
    }
    desk
}

impl Desk {
    fn alias(&mut self, node: &str, wish: AliasWish) -> AliasChange {
        let (record, change) = self.planner.alias_word(node, net(LAN), wish, NOW).unwrap();
        assert_eq!(record.is_none(), change.already);
        record.into_iter().for_each(|record| self.publish(record));
        change
    }

    fn why(&self, node: &str) -> String {
        let line = self.lines().into_iter().find(|line| line.node == node && line.prefix == net(LAN));
        line.and_then(|line| line.why).unwrap_or_default()
    }

    fn accepted(&self) -> Vec<IpNet> {
        self.plans.last().unwrap().accepted.clone()
    }

    fn here(&self, address: &str, at: Option<usize>, shadowed: &[&str]) -> String {
        let at = at.map(|router| self.routers[router].identity_key());
        let shadowed = shadowed.iter().map(|prefix| net(prefix)).collect();
        self.planner.reach(address.parse().unwrap(), at, &shadowed).here.to_string()
    }
}

#[test]
fn networks_with_the_same_numbers_are_told_apart_by_aliases() {
    let mut desk = three();
    assert_eq!(desk.asked(LAN).as_deref(), Some("r0"));
    assert!(desk.why("r1").contains("`meshd routes alias r1 192.168.7.0/24`"), "{}", desk.why("r1"));
    let one = desk.alias("r1", AliasWish::Auto).alias.unwrap();
    let two = desk.alias("r2", AliasWish::Auto).alias.unwrap();
    assert!(desk.alias("r2", AliasWish::Auto).already);
    assert!(one != two && net("100.64.0.0/10").contains(&one) && one.prefix_len() == 24, "{one} {two}");
    assert!(desk.planner.mesh.iter().all(|mesh| !mesh.contains(&one) && !mesh.contains(&two)));
    // The numbers themselves mean the network that has no others.
    assert_eq!(desk.accepted(), BTreeSet::from([one, two, net(LAN)]).into_iter().collect::<Vec<_>>());
    assert_eq!(desk.asked(LAN).as_deref(), Some("r0"));
    let zero = desk.alias("r0", AliasWish::Block(net("100.99.0.0/24"))).alias.unwrap();
    assert_eq!(desk.accepted(), BTreeSet::from([zero, one, two]).into_iter().collect::<Vec<_>>());
    assert!(desk.why("r0").contains("100.99.0.0/24"), "{}", desk.why("r0"));
    // Each may send from its own numbers only.
    let owns = |desk: &Desk, router: usize| {
        let key = desk.routers[router].wg_key();
        let updates = desk.updates.iter().rev();
        updates.into_iter().find_map(|update| match update {
            Update::Peer { key: of, owns, admits, .. } if *of == key => {
                assert_eq!(owns, admits);
                Some(owns.iter().filter(|prefix| prefix.prefix_len() == 24).copied().collect::<Vec<_>>())
            }
            _ => None,
        })
    };
    assert_eq!((owns(&desk, 0), owns(&desk, 1)), (Some(vec![zero]), Some(vec![one])));
    // Two routers of one network have one alias, and one takes the other's place.
    assert!(desk.alias("r1", AliasWish::Block(zero)).note.unwrap().contains("r0"));
    desk.alias("r2", AliasWish::None);
    assert_eq!(desk.asked(LAN).as_deref(), Some("r2"));
    desk.advertise(0, &[], &[]);
    assert_eq!(owns(&desk, 1), Some(vec![zero]));
}

#[test]
fn a_name_is_the_address_by_which_this_node_gets_there() {
    let mut desk = three();
    let alias = AliasWish::Block(net("100.99.1.0/24"));
    desk.alias("r1", alias);
    assert_eq!(desk.here("192.168.7.9", Some(1), &[]), "100.99.1.9", "the real numbers lead to r0");
    assert_eq!(desk.here("192.168.7.9", Some(0), &[]), "192.168.7.9");
    assert_eq!(desk.here("192.168.8.9", Some(1), &[]), "192.168.8.9");
    // One network alone: by its own numbers, unless this machine is in such a network too.
    for gone in [0, 2] {
        desk.advertise(gone, &[], &[]);
    }
    assert_eq!(desk.asked(LAN).as_deref(), Some("r1"));
    assert_eq!(desk.here("192.168.7.9", None, &[]), "192.168.7.9");
    assert_eq!(desk.here("192.168.7.9", None, &[LAN]), "100.99.1.9");
    // Which of two networks is meant must be said.
    desk.alias("r2", AliasWish::Block(net("100.99.2.0/24")));
    assert_eq!(desk.here("192.168.7.9", None, &[LAN]), "192.168.7.9");
    assert_eq!(desk.here("192.168.7.9", Some(2), &[LAN]), "100.99.2.9");
    let granted = ["r0", "r1", "r2"].map(|name| (net(LAN), desk.planner.ledger().by_name(name).unwrap().identity));
    assert_eq!(desk.planner.networks_with("192.168.7.9".parse().unwrap(), &granted).len(), 3);
}

#[test]
fn a_router_renumbers_its_own_network_and_reaches_others_like_it_by_their_aliases() {
    let mut desk = three();
    desk.input(Input::Routes(RouteWish { advertise: vec![net(LAN)], ..RouteWish::default() }));
    desk.word("laptop", LAN, true);
    let mine = desk.alias("laptop", AliasWish::Auto).alias.unwrap();
    let renumbered = |desk: &Desk| {
        let updates = desk.updates.iter().rev();
        updates.into_iter().find_map(|u| if let Update::Aliases { pairs, .. } = u { Some(pairs.clone()) } else { None })
    };
    assert_eq!(renumbered(&desk), Some(vec![(net(LAN), mine)]));
    let one = desk.alias("r1", AliasWish::Auto).alias.unwrap();
    assert_eq!(desk.accepted(), [one]);
    assert_eq!(
        desk.here("192.168.7.9", Some(1), &[]).parse::<std::net::IpAddr>().map(|ip| one.contains(&ip)),
        Ok(true)
    );
    let me = desk.f.keys.identity_key();
    assert_eq!(
        desk.planner.reach("192.168.7.9".parse().unwrap(), Some(me), &BTreeSet::new()).here.to_string(),
        "192.168.7.9"
    );
    desk.word("laptop", LAN, false);
    assert_eq!(renumbered(&desk), Some(vec![]), "without a grant nothing is led anywhere");
}

#[test]
fn numbers_that_cannot_be_an_alias_are_refused() {
    let mut desk = three();
    desk.alias("r0", AliasWish::Block(net("100.99.0.0/24")));
    let code = |desk: &Desk, node: &str, prefix: &str, wish| {
        let refused = desk.planner.alias_word(node, net(prefix), wish, NOW).unwrap_err();
        assert!(!refused.hint.is_empty(), "{refused:?}");
        refused.code
    };
    let block = |text| AliasWish::Block(net(text));
    assert_eq!(code(&desk, "r1", LAN, block("100.99.0.0/16")), "bad-alias");
    assert_eq!(code(&desk, "r1", LAN, block("fd00::/24")), "bad-alias");
    assert_eq!(code(&desk, "r1", LAN, block("100.71.0.0/24")), "route-covers-mesh");
    assert_eq!(code(&desk, "r1", LAN, block(LAN)), "alias-taken");
    desk.word("r1", "100.98.0.0/16", true);
    assert_eq!(code(&desk, "r1", LAN, block("100.98.3.0/24")), "alias-taken");
    assert_eq!(code(&desk, "r1", "10.0.0.0/24", AliasWish::Auto), "no-such-route");
    assert_eq!(code(&desk, "r9", LAN, AliasWish::Auto), "no-such-peer");
    desk.word("r1", "0.0.0.0/0", true);
    assert_eq!(code(&desk, "r1", "0.0.0.0/0", AliasWish::Auto), "usage");
    desk.word("r1", "10.0.0.0/8", true);
    assert_eq!(code(&desk, "r1", "10.0.0.0/8", AliasWish::Auto), "no-free-alias");
    desk.word("r1", "fd77:1::/64", true);
    let (_, six) = desk.planner.alias_word("r1", net("fd77:1::/64"), AliasWish::Auto, NOW).unwrap();
    assert!(six.alias.is_some_and(|alias| net("fd00::/8").contains(&alias) && alias.prefix_len() == 64), "{six:?}");
}

/// What ten thousand records that come together cost is one decision, not ten thousand.
#[test]
fn grants_that_come_together_are_acted_upon_once() {
    let mut desk = Desk::new(2);
    let prefixes: Vec<String> = (0..1_000).map(|n| format!("10.{}.{}.0/24", n / 250, n % 250)).collect();
    let texts: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    desk.advertise(0, &texts, &[]);
    desk.advertise(1, &texts, &[]);
    assert!(desk.plans.iter().all(|plan| plan.accepted.is_empty()), "nothing is allowed yet");
    desk.plans.clear();
    desk.updates.clear();
    let (admin, network) = (desk.f.admin(), desk.f.network);
    let mut records = Vec::new();
    for keys in &desk.routers {
        let who = keys.identity_key();
        records.extend(texts.iter().map(|prefix| route_grant_record(&admin, network, who, net(prefix), NOW)));
    }
    let ledger = desk.planner.ledger();
    let (from, head) = (ledger.log().len() as u64, records.iter().fold(ledger.head(), log_head));
    desk.input(Input::Control(ToNode::Log { from, records, head, end: true }));
    let [plan] = desk.plans.as_slice() else { panic!("the system was told {} times", desk.plans.len()) };
    assert_eq!(plan.accepted.len(), 1_000);
    assert_eq!(desk.updates.len(), 2, "each router's peer is told once");
}

use proptest::prelude::*;

use super::log::LOG_WINDOW;
use super::*;
use crate::trust::founding::{Terms, admin_record, invite_key, invite_record, revoke_record, route_grant_record};
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::ledger::Judge;
use crate::trust::record::{RevokeTarget, SignedRecord};
use crate::trust::testing::{Founder, NOW, open_terms};
use crate::wire::control::{LOG_CHUNK, MAX_MESSAGE, log_head, refusal};

const CLAIM: [u8; 32] = [42; 32];

/// A coordinator with its shell played by the test: a store that can be slow or broken, and what was sent to whom.
struct Desk {
    c: Coordinator,
    now: Now,
    wall: UnixSeconds,
    stored: Vec<SignedRecord>,
    /// Writes the store has not carried out yet.
    writes: VecDeque<(u64, Vec<SignedRecord>)>,
    store: Store,
    sent: BTreeMap<ConnId, Vec<ToNode>>,
    closed: Vec<(ConnId, &'static str)>,
    relay: BTreeMap<ControlKey, WgKey>,
    opened: Vec<(ConnId, u64, WgKey)>,
    claim_spent: bool,
    next_conn: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    Prompt,
    Slow,
}

fn config() -> Config {
    let stun = vec![StunServer { host: None, port: 3478 }];
    Config { version: "1.2.3".into(), stun, claim: Some(claim_digest(&CLAIM)), limits: Limits::default() }
}

impl Desk {
    fn with(config: Config, ledger: Option<Ledger>) -> Self {
        let mut desk = Self {
            stored: ledger.iter().flat_map(|l| l.log().to_vec()).collect(),
            c: Coordinator::new(config, ledger),
            now: Now::ZERO,
            wall: NOW,
            writes: VecDeque::new(),
            store: Store::Prompt,
            sent: BTreeMap::new(),
            closed: Vec::new(),
            relay: BTreeMap::new(),
            opened: Vec::new(),
            claim_spent: false,
            next_conn: 1,
        };
        desk.drain();
        desk
    }

    fn fresh() -> Self {
        Self::with(config(), None)
    }

    fn of(f: &Founder) -> Self {
        Self::with(config(), Some(f.ledger()))
    }

    fn drain(&mut self) {
        loop {
            let queued = !self.c.outputs.is_empty();
            assert!(!queued || self.c.poll_timeout() <= Some(self.now), "outputs wait but no wake-up is asked for");
            let Some(output) = self.c.poll_output() else {
                if self.store == Store::Slow || self.writes.is_empty() {
                    return;
                }
                self.write(true);
                continue;
            };
            match output {
                Output::Send { conn, message } => {
                    assert!(serde_json::to_string(&message).unwrap().len() <= MAX_MESSAGE);
                    assert!(!self.closed.iter().any(|(c, _)| *c == conn), "sent to a closed connection");
                    self.sent.entry(conn).or_default().push(message);
                }
                Output::Close { conn, why } => self.closed.push((conn, why)),
                Output::Persist { ticket, records, claim_spent } => {
                    assert!(self.writes.is_empty(), "two writes at once");
                    assert!(!records.is_empty());
                    self.claim_spent |= claim_spent;
                    self.writes.push_back((ticket, records));
                }
                Output::RelayAdmit { control, wg } => {
                    self.relay.insert(control, wg);
                }
                Output::RelayExpel { control, .. } => {
                    self.relay.remove(&control);
                }
                Output::OpenRelay { conn, re, wg } => self.opened.push((conn, re, wg)),
            }
        }
    }

    /// The store carries out the write under way, or fails to.
    fn write(&mut self, ok: bool) {
        let (ticket, records) = self.writes.pop_front().expect("a write is under way");
        if ok {
            self.stored.extend(records);
        }
        self.handle(Input::Persisted { ticket, ok });
    }

    fn handle(&mut self, input: Input) {
        self.c.handle(input, self.now);
        self.drain();
    }

    fn open(&mut self, key: ControlKey) -> ConnId {
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        self.handle(Input::Opened { conn, key, from: Some("192.0.2.9".parse().unwrap()) });
        conn
    }

    fn say(&mut self, conn: ConnId, message: ToCoordinator) {
        let wall = self.wall;
        self.handle(Input::Message { conn, message, wall });
    }

    /// Says it and returns what came back on that connection.
    fn ask(&mut self, conn: ConnId, message: ToCoordinator) -> Vec<ToNode> {
        self.sent.remove(&conn);
        self.say(conn, message);
        self.sent.remove(&conn).unwrap_or_default()
    }

    fn take(&mut self, conn: ConnId) -> Vec<ToNode> {
        self.sent.remove(&conn).unwrap_or_default()
    }

    /// Lets time pass, waking the coordinator when it wants.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.c.poll_timeout().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.c.handle_timeout(self.now);
            self.drain();
        }
        self.now = end;
    }

    /// Opens a connection and says Hello with an empty log.
    fn hello(&mut self, keys: &NodeKeys) -> ConnId {
        let conn = self.open(keys.control_key());
        self.say(conn, hello(0, Digest32::default()));
        self.take(conn);
        conn
    }

    fn join(&mut self, f: &mut Founder, name: &str, terms: Terms) -> (NodeKeys, ConnId) {
        let keys = f.node();
        let (secret, invite) = f.invite(terms);
        let conn = self.open(keys.control_key());
        let (ipv4, name) = proposal(&self.ask(conn, propose(&secret, name, false)));
        let member = f.member(&keys, &secret, &name, ipv4.octets()[3]);
        assert_eq!(self.ask(conn, ToCoordinator::Redeem { re: 2, invite, member }), [ToNode::Joined { re: 2 }]);
        (keys, conn)
    }
}

fn hello(have: u64, head: Digest32) -> ToCoordinator {
    ToCoordinator::Hello { re: 9, version: "0".into(), have, head }
}

fn found(f: &Founder) -> ToCoordinator {
    ToCoordinator::Found { re: 1, claim: Digest32(CLAIM), records: f.records.to_vec() }
}

fn propose(invite: &Secret32, name: &str, exact: bool) -> ToCoordinator {
    ToCoordinator::Propose { re: 1, invite: invite_key(invite), name: name.into(), exact }
}

fn proposal(answers: &[ToNode]) -> (std::net::Ipv4Addr, String) {
    let [ToNode::Proposal { ipv4, name, .. }] = answers else { panic!("{answers:?}") };
    (*ipv4, name.clone())
}

/// The one answer is a refusal that a person can act on; its code.
fn code(answers: &[ToNode]) -> &str {
    let [.., ToNode::Refused { code, text, hint, .. }] = answers else { panic!("not refused: {answers:?}") };
    assert!(!text.is_empty() && !hint.is_empty());
    code
}

fn publish(records: &[SignedRecord]) -> ToCoordinator {
    ToCoordinator::Publish { re: 5, records: records.to_vec() }
}

fn log_records(messages: &[ToNode]) -> Vec<SignedRecord> {
    let mut all = Vec::new();
    for message in messages {
        if let ToNode::Log { records, .. } = message {
            all.extend(records.iter().cloned());
        }
    }
    all
}

// Founding.

#[test]
fn the_claim_founds_the_network_once() {
    let f = Founder::new(1);
    let mut desk = Desk::fresh();
    let conn = desk.open(f.keys.control_key());
    assert_eq!(desk.ask(conn, found(&f)), [ToNode::Joined { re: 1 }]);
    assert_eq!(desk.stored, f.records);
    assert!(desk.claim_spent);
    assert_eq!(desk.relay.get(&f.keys.control_key()), Some(&f.keys.wg_key()));
    // Again after a lost answer, on another connection too.
    assert_eq!(desk.ask(conn, found(&f)), [ToNode::Joined { re: 1 }]);
    let again = desk.open(f.keys.control_key());
    assert_eq!(desk.ask(again, found(&f)), [ToNode::Joined { re: 1 }]);
    // Not by anybody else, and not with other records.
    let other = Founder::new(2);
    let stranger = desk.open(other.keys.control_key());
    assert_eq!(code(&desk.ask(stranger, found(&other))), refusal::ALREADY_USED);
    assert_eq!(code(&desk.ask(stranger, found(&f))), refusal::ALREADY_USED);
    assert_eq!(desk.stored, f.records);
}

#[test]
fn founding_needs_the_claim_and_the_four_records_of_the_sender() {
    let (f, other) = (Founder::new(1), Founder::new(2));
    let mut desk = Desk::fresh();
    let conn = desk.open(f.keys.control_key());
    let with =
        |claim: [u8; 32], records: Vec<SignedRecord>| ToCoordinator::Found { re: 1, claim: Digest32(claim), records };
    let mut nearly = CLAIM;
    nearly[31] ^= 1;
    assert_eq!(code(&desk.ask(conn, with(nearly, f.records.to_vec()))), refusal::WRONG_CLAIM);
    for bad in [
        vec![],
        f.records[..3].to_vec(),
        other.records.to_vec(),
        f.records.iter().rev().cloned().collect(),
        [&f.records[..3], &f.records[..1]].concat(),
        [&f.records[..], &f.records[..1]].concat(),
    ] {
        assert_eq!(code(&desk.ask(conn, with(CLAIM, bad))), refusal::BAD_RECORD);
    }
    // The admin must be the founding node.
    let mut records = f.records.to_vec();
    records[1] = admin_record(&f.root, f.network, other.keys.identity_key(), NOW);
    assert_eq!(code(&desk.ask(conn, with(CLAIM, records))), refusal::BAD_RECORD);
    assert!(desk.stored.is_empty() && desk.c.ledger().is_none());
    assert_eq!(desk.ask(conn, found(&f)), [ToNode::Joined { re: 1 }]);
    // Without an open claim nothing founds.
    let mut shut = Desk::with(Config { claim: None, ..config() }, None);
    let conn = shut.open(f.keys.control_key());
    assert_eq!(code(&shut.ask(conn, found(&f))), refusal::WRONG_CLAIM);
}

#[test]
fn a_founding_that_was_not_stored_can_be_tried_again_by_anybody_with_the_claim() {
    let (f, other) = (Founder::new(1), Founder::new(2));
    let mut desk = Desk::fresh();
    desk.store = Store::Slow;
    let (a, b) = (desk.open(f.keys.control_key()), desk.open(other.keys.control_key()));
    assert_eq!(desk.ask(a, found(&f)), []);
    assert_eq!(code(&desk.ask(b, found(&other))), refusal::ALREADY_USED);
    desk.write(false);
    assert_eq!(code(&desk.take(a)), refusal::STORE_FAILED);
    desk.store = Store::Prompt;
    assert_eq!(desk.ask(b, found(&other)), [ToNode::Joined { re: 1 }]);
    assert_eq!(desk.stored, other.records);
}

#[test]
fn before_founding_everything_else_says_so() {
    let mut f = Founder::new(1);
    let mut desk = Desk::fresh();
    let conn = desk.open(f.keys.control_key());
    let (secret, invite) = f.invite(open_terms(1));
    let member = f.member(&f.keys, &secret, "x", 9);
    for message in [
        propose(&secret, "x", false),
        ToCoordinator::Redeem { re: 1, invite, member },
        hello(0, Digest32::default()),
        publish(&[]),
    ] {
        assert_eq!(code(&desk.ask(conn, message)), refusal::NO_NETWORK);
    }
    assert_eq!(desk.ask(conn, ToCoordinator::Ping { re: 3 }), [ToNode::Pong { re: 3, now: NOW }]);
}

// Joining.

#[test]
fn a_guest_joins_with_records_it_can_verify_itself() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (secret, invite) = f.invite(open_terms(1));
    let keys = f.node();
    let conn = desk.open(keys.control_key());
    // The coordinator has not seen the invite: the guest gets what it needs to judge its own.
    let answers = desk.ask(conn, propose(&secret, "NAS.local", false));
    let [ToNode::Proposal { records, ipv4, name, now, re: 1 }] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!((ipv4.to_string().as_str(), name.as_str(), *now), ("100.71.0.2", "nas", NOW));
    let mut guest = Ledger::new(f.network);
    guest.admit_all(records, Judge::Reader).unwrap();
    guest.admit(&invite, Judge::Reader).unwrap();
    let member = f.member(&keys, &secret, name, 2);
    guest.admit(&member, Judge::Reader).unwrap();

    let redeem = ToCoordinator::Redeem { re: 2, invite: invite.clone(), member: member.clone() };
    assert_eq!(desk.ask(conn, redeem.clone()), [ToNode::Joined { re: 2 }]);
    assert_eq!(desk.stored[4..], [invite, member]);
    assert_eq!(desk.relay.get(&keys.control_key()), Some(&keys.wg_key()));
    assert_eq!(desk.ask(conn, redeem), [ToNode::Joined { re: 2 }], "again after a lost answer");
    assert_eq!(desk.stored.len(), 6);
}

#[test]
fn a_known_invite_is_proposed_with_its_chain() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let admin = desk.hello(&f.keys);
    let (secret, invite) = f.invite(open_terms(1));
    assert!(desk.ask(admin, publish(std::slice::from_ref(&invite))).contains(&ToNode::Published { re: 5 }));
    let conn = desk.open(f.node().control_key());
    let answers = desk.ask(conn, propose(&secret, "nas", true));
    let [ToNode::Proposal { records, .. }] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!(records.last(), Some(&invite));
    assert!(Ledger::new(f.network).admit_all(records, Judge::Reader).is_ok());
}

#[test]
fn two_guests_at_once_are_proposed_different_addresses_and_names() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (secret, _) = f.invite(open_terms(5));
    let (one, two) = (desk.open(f.node().control_key()), desk.open(f.node().control_key()));
    let first = proposal(&desk.ask(one, propose(&secret, "nas", false)));
    let second = proposal(&desk.ask(two, propose(&secret, "nas", false)));
    assert_eq!((first.1.as_str(), second.1.as_str()), ("nas", "nas-2"));
    assert_ne!(first.0, second.0);
    assert_eq!(proposal(&desk.ask(one, propose(&secret, "nas", false))), first, "asking again gives the same");
    desk.pass(Duration::from_secs(61));
    let three = desk.open(f.node().control_key());
    assert_eq!(proposal(&desk.ask(three, propose(&secret, "nas", false))), first, "reservations end");
}

#[test]
fn a_small_range_is_used_to_the_last_address_whatever_is_reserved() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    for i in 2..=254 {
        let (_, conn) = desk.join(&mut f, &format!("n{i}"), open_terms(1));
        desk.handle(Input::Closed(conn));
        desk.pass(Duration::from_secs(2));
    }
    let (secret, _) = f.invite(open_terms(1));
    let late = desk.open(f.node().control_key());
    assert_eq!(code(&desk.ask(late, propose(&secret, "late", false))), refusal::RANGE_FULL);
    // One leaves: many may ask for its address, and each is offered it.
    let who = desk.c.ledger().unwrap().by_name("n77").unwrap().clone();
    let admin = desk.hello(&f.keys);
    desk.say(admin, publish(&[revoke_record(&f.admin(), f.network, RevokeTarget::Identity(who.identity), NOW)]));
    for _ in 0..3 {
        let conn = desk.open(f.node().control_key());
        assert_eq!(proposal(&desk.ask(conn, propose(&secret, "late", false))).0, who.ipv4);
    }
}

#[test]
fn a_single_use_invite_is_redeemed_once_even_while_the_store_is_slow() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (secret, invite) = f.invite(open_terms(1));
    let (one, two) = (f.node(), f.node());
    let redeem = |member: SignedRecord| ToCoordinator::Redeem { re: 2, invite: invite.clone(), member };
    let (first, second) = (f.member(&one, &secret, "one", 2), f.member(&two, &secret, "two", 3));
    let (a, b) = (desk.open(one.control_key()), desk.open(two.control_key()));
    desk.store = Store::Slow;
    assert_eq!(desk.ask(a, redeem(first.clone())), [], "no answer before it is stored");
    assert_eq!(code(&desk.ask(b, redeem(second.clone()))), refusal::ALREADY_USED);
    assert_eq!(desk.ask(a, redeem(first.clone())), [], "sent again meanwhile: waits for the same write");
    assert!(!desk.relay.contains_key(&one.control_key()));
    desk.write(true);
    assert_eq!(desk.take(a), [ToNode::Joined { re: 2 }, ToNode::Joined { re: 2 }]);
    assert!(desk.relay.contains_key(&one.control_key()));
    assert_eq!(code(&desk.ask(b, redeem(second))), refusal::ALREADY_USED);
    let c = desk.open(two.control_key());
    assert_eq!(code(&desk.ask(c, propose(&secret, "two", false))), refusal::ALREADY_USED);
    assert_eq!(desk.stored.len(), 6);
}

#[test]
fn a_join_that_was_not_stored_leaves_the_invite_open() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let before = desk.c.ledger().unwrap().clone();
    let (secret, invite) = f.invite(open_terms(1));
    let (one, two) = (f.node(), f.node());
    let redeem = |member: SignedRecord| ToCoordinator::Redeem { re: 2, invite: invite.clone(), member };
    let (a, b) = (desk.open(one.control_key()), desk.open(two.control_key()));
    desk.store = Store::Slow;
    desk.say(a, redeem(f.member(&one, &secret, "one", 2)));
    // Waiting behind it, and depending on it.
    let admin = desk.open(f.keys.control_key());
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(one.identity_key()), NOW);
    desk.say(admin, publish(&[revoke]));
    desk.write(false);
    assert_eq!(code(&desk.take(a)), refusal::STORE_FAILED);
    assert_eq!(code(&desk.take(admin)), refusal::STORE_FAILED);
    assert_eq!(*desk.c.ledger().unwrap(), before);
    assert!(desk.writes.is_empty() && desk.relay.len() == 1);
    desk.store = Store::Prompt;
    assert_eq!(desk.ask(b, redeem(f.member(&two, &secret, "two", 2))), [ToNode::Joined { re: 2 }]);
}

#[test]
fn requests_during_a_write_share_the_next_one() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    desk.store = Store::Slow;
    let mut conns = Vec::new();
    for host in 2..12 {
        let keys = f.node();
        let (secret, invite) = f.invite(open_terms(1));
        let conn = desk.open(keys.control_key());
        let member = f.member(&keys, &secret, &format!("n{host}"), host);
        desk.say(conn, ToCoordinator::Redeem { re: 2, invite, member });
        conns.push(conn);
    }
    assert_eq!(desk.writes[0].1.len(), 2);
    desk.write(true);
    assert_eq!(desk.take(conns[0]), [ToNode::Joined { re: 2 }]);
    assert_eq!(desk.writes[0].1.len(), 18);
    desk.write(true);
    for conn in &conns[1..] {
        assert_eq!(desk.take(*conn), [ToNode::Joined { re: 2 }]);
    }
    let mut replayed = Ledger::new(f.network);
    replayed.admit_all(&desk.stored, Judge::Reader).unwrap();
    assert_eq!(replayed, *desk.c.ledger().unwrap());
}

#[test]
fn joins_are_refused_with_a_code_that_says_why() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (other_network, keys) = (Founder::new(2), f.node());
    let conn = desk.open(keys.control_key());
    let try_it = |desk: &mut Desk, invite: &SignedRecord, member: SignedRecord| {
        let answers = desk.ask(conn, ToCoordinator::Redeem { re: 2, invite: invite.clone(), member });
        code(&answers).to_owned()
    };
    let (secret, invite) = f.invite(open_terms(9));
    assert_eq!(try_it(&mut desk, &invite, f.member(&keys, &secret, "laptop", 2)), refusal::NAME_TAKEN);
    assert_eq!(try_it(&mut desk, &invite, f.member(&keys, &secret, "nas", 1)), refusal::ADDRESS_TAKEN);
    assert_eq!(try_it(&mut desk, &invite, f.member(&keys, &secret, "nas", 0)), refusal::BAD_RECORD);
    // Somebody else's keys: the node is whom Noise says it is.
    let somebody = f.node();
    assert_eq!(try_it(&mut desk, &invite, f.member(&somebody, &secret, "nas", 2)), refusal::BAD_RECORD);
    // Records that are something else.
    assert_eq!(try_it(&mut desk, &f.records[0].clone(), f.member(&keys, &secret, "nas", 2)), refusal::BAD_RECORD);
    assert_eq!(try_it(&mut desk, &invite, invite.clone()), refusal::BAD_RECORD);
    let (old, expired) = f.invite(Terms { expires: NOW - 1, ..open_terms(1) });
    assert_eq!(try_it(&mut desk, &expired, f.member(&keys, &old, "nas", 2)), refusal::EXPIRED);
    let (foreign, foreign_invite) =
        invite_record(&other_network.admin(), other_network.network, open_terms(1), NOW, &mut f.rng);
    let member = other_network.member(&keys, &foreign, "nas", 2);
    assert_eq!(try_it(&mut desk, &foreign_invite, member), refusal::WRONG_NETWORK);
    let (forged, forged_invite) =
        invite_record(&somebody.identity.signing_key(), f.network, open_terms(1), NOW, &mut f.rng);
    assert_eq!(try_it(&mut desk, &forged_invite, f.member(&keys, &forged, "nas", 2)), refusal::BAD_RECORD);
    assert_eq!((desk.stored.len(), desk.c.ledger().unwrap().log().len()), (4, 4), "nothing stays of a refused join");
    assert_eq!(
        desk.ask(conn, ToCoordinator::Redeem { re: 2, invite, member: f.member(&keys, &secret, "nas", 2) }),
        [ToNode::Joined { re: 2 }]
    );
}

#[test]
fn proposals_are_refused_with_a_code_that_says_why() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let admin = desk.hello(&f.keys);
    let (expired, a) = f.invite(Terms { expires: NOW - 1, ..open_terms(1) });
    let (revoked, b) = f.invite(open_terms(1));
    let (named, c) = f.invite(Terms { name: Some("gate".into()), ..open_terms(2) });
    let (open, d) = f.invite(open_terms(9));
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Invite(invite_key(&revoked)), NOW);
    desk.say(admin, publish(&[a, b, c, d, revoke]));
    let conn = desk.open(f.node().control_key());
    let mut refuse =
        |invite: &Secret32, name: &str, exact| code(&desk.ask(conn, propose(invite, name, exact))).to_owned();
    assert_eq!(refuse(&expired, "nas", false), refusal::EXPIRED);
    assert_eq!(refuse(&revoked, "nas", false), refusal::REVOKED);
    assert_eq!(refuse(&open, "laptop", true), refusal::NAME_TAKEN);
    assert_eq!(refuse(&open, "Not a label", true), refusal::BAD_REQUEST);
    assert_eq!(refuse(&named, "nas", true), refusal::BAD_REQUEST);
    assert_eq!(proposal(&desk.ask(conn, propose(&named, "nas", false))).1, "gate");
    assert_eq!(proposal(&desk.ask(conn, propose(&open, "laptop", false))).1, "laptop-2");
    let member = desk.open(f.keys.control_key());
    assert_eq!(code(&desk.ask(member, propose(&open, "x", false))), refusal::ALREADY_USED);
}

#[test]
fn one_host_cannot_ask_without_end() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (secret, _) = f.invite(open_terms(1));
    let conn = desk.open(f.node().control_key());
    let burst = Limits::default().joins.burst;
    for _ in 0..burst {
        proposal(&desk.ask(conn, propose(&secret, "x", false)));
    }
    assert_eq!(code(&desk.ask(conn, propose(&secret, "x", false))), refusal::RATE_LIMITED);
    desk.now = desk.now + Limits::default().joins.every;
    proposal(&desk.ask(conn, propose(&secret, "x", false)));
}

// Members.

#[test]
fn hello_is_answered_with_welcome_log_and_presence() {
    let f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let conn = desk.open(f.keys.control_key());
    let answers = desk.ask(conn, hello(0, Digest32::default()));
    let [
        ToNode::Welcome { re: 9, version, now: NOW, stun, observed },
        ToNode::Log { from: 0, records, head, end: true },
        ToNode::Presence { full: true, online, offline },
    ] = answers.as_slice()
    else {
        panic!("{answers:?}")
    };
    assert_eq!((version.as_str(), stun.len(), *observed), ("1.2.3", 1, Some("192.0.2.9".parse().unwrap())));
    assert_eq!(records.as_slice(), f.records);
    assert_eq!(*head, f.records.iter().fold(Digest32::default(), log_head));
    assert_eq!((online.as_slice(), offline.len()), ([f.keys.wg_key()].as_slice(), 0));
}

#[test]
fn a_node_gets_only_what_it_lacks_or_everything_if_its_log_is_another() {
    let f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let heads: Vec<Digest32> = (0..=4).map(|n| f.records[..n].iter().fold(Digest32::default(), log_head)).collect();
    let mut ask = |have: u64, head| {
        let conn = desk.open(f.keys.control_key());
        let answers = desk.ask(conn, hello(have, head));
        let ToNode::Log { from, records, head, end: true } = &answers[1] else { panic!("{answers:?}") };
        assert_eq!(*head, heads[4]);
        (*from, records.len())
    };
    assert_eq!(ask(2, heads[2]), (2, 2));
    assert_eq!(ask(4, heads[4]), (4, 0));
    assert_eq!(ask(2, heads[3]), (0, 4));
    assert_eq!(ask(4, Digest32([1; 32])), (0, 4));
    assert_eq!(ask(5, heads[4]), (0, 4));
    assert_eq!(ask(u64::MAX, heads[4]), (0, 4));
}

#[test]
fn new_records_reach_every_listener_and_relay_and_presence_follow() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let laptop = desk.hello(&f.keys);
    desk.pass(Duration::from_secs(1));
    desk.take(laptop);
    let (keys, nas) = desk.join(&mut f, "nas", open_terms(1));
    let told = desk.take(laptop);
    let [ToNode::Log { from: 4, records, end: true, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(records.as_slice(), &desk.stored[4..]);
    desk.say(nas, hello(6, desk.c.ledger().unwrap().head()));
    assert_eq!(desk.take(laptop), [], "presence is batched");
    desk.pass(Duration::from_secs(1));
    let online = ToNode::Presence { full: false, online: vec![keys.wg_key()], offline: vec![] };
    assert_eq!(desk.take(laptop), [online]);
    desk.handle(Input::Closed(nas));
    desk.pass(Duration::from_secs(1));
    let offline = ToNode::Presence { full: false, online: vec![], offline: vec![keys.wg_key()] };
    assert_eq!(desk.take(laptop), [offline]);
}

#[test]
fn a_newer_connection_takes_over_once_it_spoke() {
    let f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let first = desk.hello(&f.keys);
    // A replayed first Noise message opens a connection and cannot say anything on it.
    let second = desk.open(f.keys.control_key());
    assert_eq!(desk.closed, []);
    assert_eq!(desk.ask(second, ToCoordinator::Ping { re: 1 }).len(), 1);
    assert_eq!(desk.closed, [(first, why::REPLACED)]);
    desk.handle(Input::Closed(first));
    assert_eq!(desk.ask(first, ToCoordinator::Ping { re: 2 }), [], "a closed connection is not heard");
    assert_eq!(desk.c.connections(), 1);
}

#[test]
fn strangers_may_not_do_what_members_do() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let stranger = desk.open(f.node().control_key());
    assert_eq!(code(&desk.ask(stranger, hello(0, Digest32::default()))), refusal::NOT_A_MEMBER);
    let (_, invite) = f.invite(open_terms(1));
    assert_eq!(code(&desk.ask(stranger, publish(&[invite]))), refusal::NOT_A_MEMBER);
    assert_eq!(desk.stored.len(), 4);
}

#[test]
fn publishing_is_all_or_none_and_can_be_repeated() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let admin = desk.hello(&f.keys);
    let (_, good) = f.invite(open_terms(1));
    let (_, forged) = invite_record(&f.node().identity.signing_key(), f.network, open_terms(1), NOW, &mut f.rng);
    assert_eq!(code(&desk.ask(admin, publish(&[good.clone(), forged]))), refusal::BAD_RECORD);
    assert_eq!(desk.stored.len(), 4);
    let answers = desk.ask(admin, publish(std::slice::from_ref(&good)));
    assert_eq!(answers[0], ToNode::Published { re: 5 });
    assert_eq!(log_records(&answers), std::slice::from_ref(&good));
    assert_eq!(desk.ask(admin, publish(&[good])), [ToNode::Published { re: 5 }]);
    assert_eq!(desk.ask(admin, publish(&[])), [ToNode::Published { re: 5 }]);
    let many = vec![f.records[0].clone(); LOG_CHUNK + 1];
    assert_eq!(code(&desk.ask(admin, publish(&many))), refusal::BAD_REQUEST);
    assert_eq!(desk.stored.len(), 5);
}

#[test]
fn what_is_not_stored_is_shown_to_nobody() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (nas, nas_conn) = desk.join(&mut f, "nas", open_terms(1));
    desk.store = Store::Slow;
    let admin = desk.hello(&f.keys);
    let grant = route_grant_record(&f.admin(), f.network, nas.identity_key(), "10.0.0.0/8".parse().unwrap(), NOW);
    assert_eq!(desk.ask(admin, publish(std::slice::from_ref(&grant))), []);
    let answers = desk.ask(nas_conn, hello(0, Digest32::default()));
    assert_eq!(log_records(&answers).len(), 6);
    assert_eq!(desk.ask(admin, publish(std::slice::from_ref(&grant))), [], "repeated: waits for the same write");
    // Not even to somebody who has it already.
    let head = desk.c.ledger().unwrap().head();
    assert_eq!(log_records(&desk.ask(nas_conn, hello(7, head))).len(), 6);
    desk.write(true);
    assert_eq!(log_records(&desk.take(nas_conn)), [grant]);
    assert_eq!(desk.take(admin)[..2], [ToNode::Published { re: 5 }, ToNode::Published { re: 5 }]);
}

#[test]
fn a_join_or_a_removal_counts_once_it_is_stored() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (nas, nas_conn) = desk.join(&mut f, "nas", open_terms(1));
    let admin = desk.hello(&f.keys);
    desk.store = Store::Slow;
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(nas.identity_key()), NOW);
    desk.say(admin, publish(std::slice::from_ref(&revoke)));
    let answers = desk.ask(nas_conn, hello(0, Digest32::default()));
    assert!(matches!(answers[0], ToNode::Welcome { .. }));
    assert!(!log_records(&answers).contains(&revoke));
    desk.write(false);
    assert!(desk.closed.is_empty() && desk.relay.contains_key(&nas.control_key()));
    desk.say(admin, publish(std::slice::from_ref(&revoke)));
    desk.write(true);
    assert_eq!(log_records(&desk.take(nas_conn)), std::slice::from_ref(&revoke));
    assert_eq!(desk.closed, [(nas_conn, why::REVOKED)]);

    let (secret, invite) = f.invite(open_terms(1));
    let keys = f.node();
    let member = f.member(&keys, &secret, "new", 9);
    let joining = desk.open(keys.control_key());
    desk.say(joining, ToCoordinator::Redeem { re: 2, invite, member });
    let impatient = desk.open(keys.control_key());
    assert_eq!(code(&desk.ask(impatient, hello(0, Digest32::default()))), refusal::NOT_A_MEMBER);
    desk.write(true);
    assert!(matches!(desk.ask(impatient, hello(0, Digest32::default()))[0], ToNode::Welcome { .. }));
    assert_eq!(desk.c.guests, 0);
}

#[test]
fn only_an_admin_puts_back_members_whose_invites_expired() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (nas, nas_conn) = desk.join(&mut f, "nas", open_terms(1));
    let (secret, invite) = f.invite(open_terms(1));
    let lost = f.node();
    let records = [invite, f.member(&lost, &secret, "lost", 9)];
    desk.wall = NOW + 86_400 * 30;
    assert_eq!(desk.c.ledger().unwrap().by_control(&nas.control_key()).map(|m| m.name.as_str()), Some("nas"));
    assert_eq!(code(&desk.ask(nas_conn, publish(&records))), refusal::EXPIRED);
    let admin = desk.hello(&f.keys);
    assert_eq!(desk.ask(admin, publish(&records))[0], ToNode::Published { re: 5 });
    assert!(desk.relay.contains_key(&lost.control_key()));
}

#[test]
fn a_revoked_node_is_shown_its_revoke_and_put_out() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (keys, nas) = desk.join(&mut f, "nas", open_terms(1));
    desk.say(nas, hello(0, Digest32::default()));
    desk.take(nas);
    let admin = desk.hello(&f.keys);
    desk.pass(Duration::from_secs(1));
    desk.take(admin);
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(keys.identity_key()), NOW);
    desk.say(admin, publish(std::slice::from_ref(&revoke)));
    assert_eq!(log_records(&desk.take(nas)).last(), Some(&revoke));
    assert_eq!(desk.closed, [(nas, why::REVOKED)]);
    assert!(!desk.relay.contains_key(&keys.control_key()));
    desk.pass(Duration::from_secs(1));
    let offline = ToNode::Presence { full: false, online: vec![], offline: vec![keys.wg_key()] };
    assert_eq!(desk.take(admin).last(), Some(&offline));
    // It comes back, having missed it: it is shown the record, since our word is nothing.
    let (_, _later) = desk.join(&mut f, "later", open_terms(1));
    let again = desk.open(keys.control_key());
    let before = f.records.iter().fold(Digest32::default(), log_head);
    let answers = desk.ask(again, hello(4, before));
    assert_eq!(code(&answers), refusal::REVOKED);
    let shown = log_records(&answers);
    assert_eq!((shown.len(), shown.last()), (3, Some(&revoke)), "and nothing of what came after");
    assert!(desk.closed.contains(&(again, why::REVOKED)));
    // Nor does it join again with these keys.
    let (secret, invite) = f.invite(open_terms(1));
    let guest = desk.open(keys.control_key());
    assert_eq!(code(&desk.ask(guest, propose(&secret, "nas", false))), refusal::REVOKED);
    let member = f.member(&keys, &secret, "nas", 7);
    assert_eq!(code(&desk.ask(guest, ToCoordinator::Redeem { re: 2, invite, member })), refusal::REVOKED);
}

#[test]
fn an_admin_that_removes_itself_gets_its_answer_first() {
    let f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let admin = desk.hello(&f.keys);
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(f.keys.identity_key()), NOW);
    let answers = desk.ask(admin, publish(std::slice::from_ref(&revoke)));
    assert_eq!(answers[0], ToNode::Published { re: 5 });
    assert_eq!(log_records(&answers), [revoke]);
    assert_eq!(desk.closed, [(admin, why::REVOKED)]);
}

#[test]
fn a_restarted_coordinator_goes_on_where_it_was() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (keys, _) = desk.join(&mut f, "nas", open_terms(1));
    let mut ledger = Ledger::new(f.network);
    ledger.admit_all(&desk.stored, Judge::Reader).unwrap();
    let mut desk = Desk::with(config(), Some(ledger));
    assert_eq!(desk.relay.len(), 2);
    let conn = desk.hello(&keys);
    assert!(desk.ask(conn, ToCoordinator::Ping { re: 1 }).len() == 1 && desk.closed.is_empty());
}

// Bounds.

#[test]
fn guests_are_few_and_their_time_is_short() {
    let mut f = Founder::new(1);
    let limits = Limits { guests: 2, connections: 4, ..Limits::default() };
    let mut desk = Desk::with(Config { limits, ..config() }, Some(f.ledger()));
    let guests = [desk.open(f.node().control_key()), desk.open(f.node().control_key())];
    let third = desk.open(f.node().control_key());
    assert_eq!(desk.closed, [(third, why::BUSY)]);
    // Members still get in, up to the cap on everything.
    let member = desk.hello(&f.keys);
    let silent = desk.open(f.keys.control_key());
    let last = desk.open(f.keys.control_key());
    assert_eq!(desk.closed.last(), Some(&(last, why::BUSY)));
    desk.pass(Duration::from_secs(29));
    desk.ask(guests[0], ToCoordinator::Ping { re: 1 });
    desk.pass(Duration::from_secs(2));
    for conn in [guests[0], guests[1], silent] {
        assert!(desk.closed.contains(&(conn, why::DEADLINE)), "{conn:?}");
    }
    assert!(!desk.closed.iter().any(|(c, _)| *c == member));
    assert_eq!((desk.c.connections(), desk.c.guests, desk.c.deadlines.len()), (1, 0, 0));
    // Who joins has all the time in the world.
    let (_, joined) = desk.join(&mut f, "nas", open_terms(1));
    desk.pass(Duration::from_secs(3_600));
    assert!(!desk.closed.iter().any(|(c, _)| *c == joined));
}

#[test]
fn a_long_log_is_sent_in_portions() {
    let mut f = Founder::new(1);
    let mut ledger = f.ledger();
    let total = 10_000;
    let (_, big) = f.invite(Terms { tags: vec!["x".repeat(3_000)], ..open_terms(1) });
    ledger.admit(&big, Judge::Reader).unwrap();
    let mut desk = Desk::with(config(), Some(ledger));
    desk.store = Store::Slow;
    let conn = desk.open(f.keys.control_key());
    let records: Vec<SignedRecord> = desk.c.ledger().unwrap().log().to_vec();
    desk.c.ledger.as_mut().unwrap().extend_unjudged(&records[4..], total);
    desk.c.durable = desk.c.ledger().unwrap().log().len();
    let first = desk.ask(conn, hello(0, Digest32::default()));
    assert_eq!(first.len(), 1 + LOG_WINDOW);
    let mut all = log_records(&first);
    assert_eq!(desk.ask(conn, ToCoordinator::Ping { re: 1 }).len(), 1, "other answers are not held up");
    desk.pass(Duration::from_millis(400));
    assert_eq!(desk.take(conn), [], "presence names nodes it does not know yet");
    desk.handle(Input::Drained(conn));
    all.extend(log_records(&desk.take(conn)));
    desk.handle(Input::Drained(ConnId(999)));
    desk.pass(Duration::from_secs(60));
    let rest = desk.take(conn);
    all.extend(log_records(&rest));
    assert_eq!(all, desk.c.ledger().unwrap().log());
    assert!(matches!(rest.last(), Some(ToNode::Presence { full: true, .. })), "presence comes after the log");
    let ends = rest.iter().filter(|m| matches!(m, ToNode::Log { end: true, .. })).count();
    assert_eq!(ends, 1);
}

// Anything in any order.

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever guests and members send, in whatever order, with a store that fails at times: what is stored is a log that
    /// every node accepts, nobody was told `Joined` who is not in it, and the bookkeeping stays whole.
    #[test]
    fn any_order_of_events_keeps_the_promises(steps in proptest::collection::vec((0u8..12, 0usize..6, 0usize..4), 1..80)) {
        let mut f = Founder::new(1);
        let nodes: Vec<NodeKeys> = (0..6).map(|_| f.node()).collect();
        let invites: Vec<_> = (0..4).map(|i| f.invite(open_terms(1 + i % 2))).collect();
        let mut desk = Desk::of(&f);
        desk.store = Store::Slow;
        let admin = desk.hello(&f.keys);
        let mut conns: BTreeMap<usize, ConnId> = BTreeMap::new();
        let mut joined: BTreeSet<usize> = BTreeSet::new();
        for (what, who, which) in steps {
            let (secret, invite) = &invites[which];
            let conn = conns.get(&who).copied().unwrap_or(ConnId(0));
            let host = u8::try_from(10 + who).unwrap();
            match what {
                0 | 1 => { conns.insert(who, desk.open(nodes[who].control_key())); }
                2 => desk.say(conn, propose(secret, "n", which == 0)),
                3 | 4 => {
                    let member = f.member(&nodes[who], secret, &format!("n{who}"), host);
                    desk.say(conn, ToCoordinator::Redeem { re: 7, invite: invite.clone(), member });
                }
                5 => desk.say(conn, hello(0, Digest32::default())),
                6 => {
                    let target = RevokeTarget::Identity(nodes[who].identity_key());
                    desk.say(admin, publish(&[revoke_record(&f.admin(), f.network, target, NOW)]));
                }
                7 | 8 if !desk.writes.is_empty() => desk.write(what == 7),
                9 => desk.handle(Input::Closed(conn)),
                10 => desk.pass(Duration::from_secs(who as u64 * 10)),
                _ => desk.say(conn, ToCoordinator::Ping { re: 1 }),
            }
            for (who, conn) in &conns {
                let messages = desk.sent.remove(conn).unwrap_or_default();
                if messages.contains(&ToNode::Joined { re: 7 }) {
                    joined.insert(*who);
                }
            }
            let mut node = Ledger::new(f.network);
            prop_assert!(node.admit_all(&desk.stored, Judge::Reader).is_ok());
            for who in &joined {
                prop_assert!(node.member_ever(&nodes[*who].identity_key()).is_some(), "joined but not stored");
            }
            let relay: BTreeSet<ControlKey> = node.members().map(|m| m.control).collect();
            prop_assert_eq!(desk.relay.keys().copied().collect::<BTreeSet<_>>(), relay);
            let c = &desk.c;
            prop_assert_eq!(c.guests, c.conns.values().filter(|c| c.guest).count());
            prop_assert_eq!(c.deadlines.len(), c.conns.values().filter(|c| c.deadline.is_some()).count());
            prop_assert_eq!(c.listeners.len(), c.conns.values().filter(|c| c.listening.is_some()).count());
            prop_assert!(c.by_key.values().all(|conn| c.conns.contains_key(conn)));
        }
    }
}

// Where members are.

#[test]
fn members_are_located_for_members_only_and_open_addresses_are_capped() {
    let mut f = Founder::new(31);
    let mut desk = Desk::of(&f);
    let me = desk.hello(&f.keys);
    let (other, other_conn) = desk.join(&mut f, "nas", open_terms(1));
    let asked = |desk: &mut Desk, conn, key| desk.ask(conn, ToCoordinator::Locate { re: 5, peer: key });
    let nowhere = ToNode::Located { re: 5, observed: None, open: Vec::new() };
    assert_eq!(asked(&mut desk, me, other.wg_key()), std::slice::from_ref(&nowhere), "it has not said hello");
    desk.say(other_conn, hello(0, Digest32::default()));
    let open: Vec<SocketAddr> = (1..=9).map(|port| SocketAddr::from(([198, 51, 100, 4], port))).collect();
    let announced = desk.ask(other_conn, ToCoordinator::Announce { re: 6, open: open.clone() });
    assert!(announced.contains(&ToNode::Published { re: 6 }), "{announced:?}");
    let observed = Some("192.0.2.9".parse().unwrap());
    let found = ToNode::Located { re: 5, observed, open: open[..MAX_OPEN].to_vec() };
    assert_eq!(asked(&mut desk, me, other.wg_key()), [found]);
    assert_eq!(asked(&mut desk, me, WgKey([9; 32])), std::slice::from_ref(&nowhere), "nobody");
    let stranger = desk.open(ControlKey([7; 32]));
    assert_eq!(code(&asked(&mut desk, stranger, other.wg_key())), refusal::NOT_A_MEMBER);
    assert_eq!(code(&desk.ask(stranger, ToCoordinator::Announce { re: 7, open })), refusal::NOT_A_MEMBER);
    desk.handle(Input::Closed(other_conn));
    assert_eq!(asked(&mut desk, me, other.wg_key()), [nowhere]);
}

// Advertisements.

fn advert(f: &Founder, keys: &NodeKeys, number: u64) -> crate::trust::advert::SignedAdvert {
    let advert = crate::trust::advert::Advert {
        v: 1,
        network: f.network,
        identity: keys.identity_key(),
        number,
        routes: vec!["192.168.1.0/24".parse().unwrap()],
        resting: Vec::new(),
        draining: Vec::new(),
        lan: Vec::new(),
        relay: false,
    };
    crate::trust::advert::SignedAdvert::sign(&advert, &keys.identity.signing_key())
}

fn adverts(messages: &[ToNode]) -> Vec<crate::trust::advert::SignedAdvert> {
    let lists = messages.iter().filter_map(|m| if let ToNode::Adverts { adverts } = m { Some(adverts) } else { None });
    lists.flatten().cloned().collect()
}

#[test]
fn advertisements_reach_every_listener_in_batches_and_newcomers_at_once() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (nas, nas_conn) = desk.join(&mut f, "nas", open_terms(1));
    let laptop = desk.hello(&f.keys);
    desk.pass(Duration::from_secs(1));
    desk.take(laptop);
    let say = |advert| ToCoordinator::Advertise { re: 3, advert };
    let (first, second) = (advert(&f, &nas, 1), advert(&f, &nas, 2));
    assert_eq!(desk.ask(nas_conn, say(first.clone())), [ToNode::Published { re: 3 }]);
    assert_eq!(desk.ask(nas_conn, say(second.clone())), [ToNode::Published { re: 3 }]);
    assert_eq!(desk.take(laptop), []);
    desk.pass(Duration::from_secs(1));
    assert_eq!(adverts(&desk.take(laptop)), std::slice::from_ref(&second));
    // Older or the same: nothing new for anybody.
    assert_eq!(desk.ask(nas_conn, say(first)), [ToNode::Published { re: 3 }]);
    desk.pass(Duration::from_secs(1));
    assert_eq!(desk.take(laptop), []);
    let again = desk.open(f.keys.control_key());
    assert_eq!(adverts(&desk.ask(again, hello(0, Digest32::default()))), [second]);
    // Out of the network, out of the list.
    let revoke = revoke_record(&f.admin(), f.network, RevokeTarget::Identity(nas.identity_key()), NOW);
    desk.ask(again, publish(&[revoke]));
    let third = desk.open(f.keys.control_key());
    assert_eq!(adverts(&desk.ask(third, hello(0, Digest32::default()))), []);
}

#[test]
fn a_node_advertises_only_for_itself_and_not_without_end() {
    let mut f = Founder::new(1);
    let mut desk = Desk::of(&f);
    let (nas, nas_conn) = desk.join(&mut f, "nas", open_terms(1));
    let say = |advert| ToCoordinator::Advertise { re: 3, advert };
    let other = advert(&f, &f.keys, 9);
    assert_eq!(code(&desk.ask(nas_conn, say(other))), refusal::BAD_RECORD);
    let mut forged = advert(&f, &nas, 9);
    forged.sig.0[0] ^= 1;
    assert_eq!(code(&desk.ask(nas_conn, say(forged))), refusal::BAD_RECORD);
    let stranger = desk.open(f.node().control_key());
    assert_eq!(code(&desk.ask(stranger, say(advert(&f, &nas, 9)))), refusal::NOT_A_MEMBER);
    let refused = (10..100).filter(|n| desk.ask(nas_conn, say(advert(&f, &nas, *n))) != [ToNode::Published { re: 3 }]);
    assert_eq!(refused.count(), 82, "ten at once, less the two refused ones");
    desk.pass(Duration::from_secs(2));
    assert_eq!(desk.ask(nas_conn, say(advert(&f, &nas, 100))), [ToNode::Published { re: 3 }]);
}

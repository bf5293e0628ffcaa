//! Joining against a coordinator played by a ledger, which can refuse, lie, or lose answers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::*;
use crate::trust::founding::Terms;

const WALL: UnixSeconds = 1_800_000_000;
const COORDINATOR: ControlKey = ControlKey([0xc0; 32]);

/// What befalls one request.
#[derive(Debug, Clone)]
enum Fate {
    /// Carried out, but the answer is lost.
    AnswerLost,
    /// Lost before it is carried out.
    RequestLost,
    /// Refused with this code.
    Refuse(&'static str),
    /// Carried out.
    Fine,
}

#[derive(Default)]
struct World {
    ledger: Option<Ledger>,
    claim_spent: bool,
    fates: VecDeque<Fate>,
    requests: Vec<ToCoordinator>,
    unreachable: bool,
    lie: Option<fn(&mut ToNode)>,
    shown_log: Option<Vec<SignedRecord>>,
}

#[derive(Clone, Default)]
struct Office(Rc<RefCell<World>>);

impl Desks for Office {
    type Desk = Self;
    async fn connect(&self, _: &[String], coordinator: ControlKey, _: &Secret32) -> Result<Self, Problem> {
        assert_eq!(coordinator, COORDINATOR);
        if self.0.borrow().unreachable {
            return Err(problem("coordinator-unreachable", "the coordinator cannot be reached", "check"));
        }
        Ok(self.clone())
    }
}

impl Desk for Office {
    async fn ask(&mut self, request: ToCoordinator) -> Result<ToNode, Problem> {
        let mut world = self.0.borrow_mut();
        world.requests.push(request.clone());
        let lost = || problem("coordinator-lost", "the connection broke", "again");
        let fate = if matches!(request, ToCoordinator::Propose { .. }) {
            Fate::Fine
        } else {
            world.fates.pop_front().unwrap_or(Fate::Fine)
        };
        let mut answer = match fate {
            Fate::RequestLost => return Err(lost()),
            Fate::Refuse(code) => {
                ToNode::Refused { re: 0, code: code.into(), text: format!("refused: {code}"), hint: String::new() }
            }
            Fate::Fine => world.carry_out(request),
            Fate::AnswerLost => {
                world.carry_out(request);
                return Err(lost());
            }
        };
        if let Some(lie) = world.lie {
            lie(&mut answer);
        }
        Ok(answer)
    }

    async fn log(&mut self) -> Result<Vec<SignedRecord>, Problem> {
        let world = self.0.borrow();
        Ok(world.shown_log.clone().unwrap_or_else(|| world.ledger.as_ref().unwrap().log().to_vec()))
    }
}

impl World {
    fn carry_out(&mut self, request: ToCoordinator) -> ToNode {
        let refuse = |code: &str| ToNode::Refused { re: 0, code: code.into(), text: code.into(), hint: String::new() };
        match request {
            ToCoordinator::Found { re, records, .. } => {
                if let Some(ledger) = &self.ledger {
                    return if ledger.log() == records { ToNode::Joined { re } } else { refuse(refusal::ALREADY_USED) };
                }
                let Record::Genesis(genesis) = records[0].open().unwrap() else { panic!("not a genesis") };
                let mut ledger = Ledger::new(genesis.network);
                ledger.admit_all(&records, Judge::Coordinator(WALL)).unwrap();
                self.ledger = Some(ledger);
                self.claim_spent = true;
                ToNode::Joined { re }
            }
            ToCoordinator::Propose { re, name, exact, .. } => {
                let Some(ledger) = &self.ledger else { return refuse(refusal::NO_NETWORK) };
                let free = ledger.free_name(&name, |_| false);
                if exact && free != name {
                    return refuse(refusal::NAME_TAKEN);
                }
                let ipv4 = ledger.free_ipv4(|_| false).unwrap();
                ToNode::Proposal { re, records: ledger.admin_chain(), ipv4, name: free, now: WALL }
            }
            ToCoordinator::Redeem { re, invite, member } => {
                let ledger = self.ledger.as_mut().unwrap();
                if let Err(e) = ledger.admit(&invite, Judge::Coordinator(WALL)) {
                    return refuse(&format!("{e:?}"));
                }
                match ledger.admit(&member, Judge::Coordinator(WALL)) {
                    Ok(_) => ToNode::Joined { re },
                    Err(crate::trust::ledger::Refusal::InviteUsedUp) => refuse(refusal::ALREADY_USED),
                    Err(e) => refuse(&format!("{e:?}")),
                }
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

use crate::trust::record::Record;

fn claim() -> Token {
    Token::Claim(ClaimToken {
        urls: vec!["https://mesh.example.org".into()],
        coordinator: COORDINATOR,
        secret: Secret32::new([7; 32]),
    })
}

struct Node {
    dir: tempfile::TempDir,
    office: Office,
    surroundings: Surroundings,
}

impl Node {
    fn new(office: &Office) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, office: office.clone(), surroundings: Surroundings::default() }
    }

    fn up_named(&self, token: Option<&Token>, name: Option<&str>) -> Result<Membership, Problem> {
        let mut store = Store::open(self.dir.path())?;
        let wish = Wish {
            token,
            name,
            host_label: "laptop".into(),
            network_name: None,
            ipv4_range: None,
            surroundings: &self.surroundings,
            wall: WALL,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(ensure(&mut store, &wish, &self.office, &mut rand::rng()))
    }

    fn up(&self, token: Option<&Token>) -> Result<Membership, Problem> {
        self.up_named(token, None)
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// A founded network and its founder.
fn founded() -> (Office, Node, Membership) {
    let office = Office::default();
    let founder = Node::new(&office);
    let member = founder.up(Some(&claim())).unwrap();
    (office, founder, member)
}

fn invite(founder: &Membership, terms: Terms) -> Token {
    let signer = founder.keys.identity.signing_key();
    let network = founder.network.network;
    let (secret, invite) = founding::invite_record(&signer, network, terms, WALL, &mut rand::rng());
    Token::Invite(InviteToken {
        urls: vec!["https://mesh.example.org".into()],
        coordinator: COORDINATOR,
        network,
        secret,
        invite,
    })
}

fn open_invite(founder: &Membership) -> Token {
    invite(founder, Terms { expires: WALL + 60, ..Terms::default() })
}

#[test]
fn the_founder_keeps_the_root_key_and_resumes_without_a_token() {
    let (office, founder, member) = founded();
    assert_eq!(founder.files(), ["lock", "network.json", "node.json", "records.jsonl", "root.json"]);
    assert_eq!(member.records.len(), 4);
    let (addresses, network) = own_addresses(&member, &ledger_of(member.network.network, &member.records)).unwrap();
    assert_eq!((addresses.len(), network.as_str()), (2, "home"));
    assert_eq!((addresses[0].prefix_len(), addresses[1].prefix_len()), (16, 48));
    let asked = office.0.borrow().requests.len();
    let again = founder.up(None).unwrap();
    assert_eq!(again.records, member.records);
    assert_eq!(again.keys.identity_key(), member.keys.identity_key());
    // The claim token again is harmless.
    assert_eq!(founder.up(Some(&claim())).unwrap().notes.len(), 1);
    assert_eq!(office.0.borrow().requests.len(), asked, "the coordinator was not asked");
}

#[test]
fn a_second_node_joins_verifies_and_gets_a_free_name_and_address() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    let token = open_invite(&first);
    let member = node.up(Some(&token)).unwrap();
    let ledger = ledger_of(first.network.network, &member.records);
    let me = ledger.member(&member.keys.identity_key()).unwrap();
    assert_eq!(me.name, "laptop-2");
    assert_eq!(node.files(), ["lock", "network.json", "node.json", "records.jsonl"]);
    // The same token again: already joined, nothing asked, nothing used.
    let asked = office.0.borrow().requests.len();
    assert!(node.up(Some(&token)).unwrap().notes[0].contains("already"));
    assert_eq!(office.0.borrow().requests.len(), asked);
}

#[test]
fn a_lost_answer_is_asked_for_again_with_the_same_keys() {
    for fate in [Fate::AnswerLost, Fate::RequestLost] {
        let (office, _founder, first) = founded();
        let node = Node::new(&office);
        office.0.borrow_mut().fates.extend([fate.clone()]);
        let member = node.up(Some(&open_invite(&first))).unwrap();
        assert!(office.0.borrow().ledger.as_ref().unwrap().member(&member.keys.identity_key()).is_some(), "{fate:?}");
    }
}

#[test]
fn a_join_cut_off_in_the_middle_is_resumed_without_the_token() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    office.0.borrow_mut().fates.extend(vec![Fate::AnswerLost; 4]);
    let token = open_invite(&first);
    assert_eq!(node.up(Some(&token)).unwrap_err().code, "coordinator-lost");
    assert!(node.files().contains(&"join.json".to_owned()));
    let members = office.0.borrow().ledger.as_ref().unwrap().members().count();
    assert_eq!(members, 2, "the coordinator had carried it out");
    office.0.borrow_mut().fates.clear();
    let member = node.up(None).unwrap();
    assert_eq!(office.0.borrow().ledger.as_ref().unwrap().members().count(), 2);
    assert!(own_addresses(&member, &ledger_of(member.network.network, &member.records)).is_ok());
    assert!(!node.files().contains(&"join.json".to_owned()));
}

#[test]
fn a_founding_cut_off_in_the_middle_is_resumed_with_the_same_root() {
    let office = Office::default();
    let founder = Node::new(&office);
    office.0.borrow_mut().fates.extend(vec![Fate::AnswerLost; 4]);
    assert!(founder.up(Some(&claim())).is_err());
    let id: NetworkId = office.0.borrow().ledger.as_ref().unwrap().genesis().unwrap().network;
    assert_eq!(founder.up(Some(&claim())).unwrap().network.network, id);
}

#[test]
fn a_refused_founding_leaves_no_root_key_and_nothing_to_resume() {
    let office = Office::default();
    let founder = Node::new(&office);
    office.0.borrow_mut().fates.push_back(Fate::Refuse(refusal::WRONG_CLAIM));
    assert_eq!(founder.up(Some(&claim())).unwrap_err().code, refusal::WRONG_CLAIM);
    assert_eq!(founder.files(), ["lock", "node.json"]);
    assert_eq!(founder.up(None).unwrap_err().code, "not-joined");
}

#[test]
fn an_unreachable_coordinator_leaves_no_trace() {
    let (office, _founder, first) = founded();
    office.0.borrow_mut().unreachable = true;
    for token in [claim(), open_invite(&first)] {
        let node = Node::new(&office);
        assert_eq!(node.up(Some(&token)).unwrap_err().code, "coordinator-unreachable");
        assert_eq!(node.files(), ["lock"]);
    }
}

#[test]
fn tokens_that_cannot_work_are_refused_before_anything_is_asked() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    let asked = office.0.borrow().requests.len();
    let late = invite(&first, Terms { expires: WALL - 7_300, ..Terms::default() });
    let refused = node.up(Some(&late)).unwrap_err();
    assert_eq!((refused.code.as_str(), refused.text.contains("2 h ago")), (refusal::EXPIRED, true));
    let named = invite(&first, Terms { expires: WALL + 60, name: Some("nas".into()), ..Terms::default() });
    assert_eq!(node.up_named(Some(&named), Some("other")).unwrap_err().code, "name-fixed");
    assert_eq!(node.up_named(Some(&open_invite(&first)), Some("Not A Label")).unwrap_err().code, "bad-name");
    assert_eq!(office.0.borrow().requests.len(), asked);
    assert_eq!(node.files(), ["lock"]);
}

#[test]
fn a_token_of_another_network_changes_nothing() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    node.up(Some(&open_invite(&first))).unwrap();
    let (_, _, elsewhere) = founded();
    let before = std::fs::read(node.dir.path().join("network.json")).unwrap();
    let refused = node.up(Some(&open_invite(&elsewhere))).unwrap_err();
    assert_eq!(refused.code, "wrong-network");
    assert!(refused.hint.contains("--state-dir"));
    assert_eq!(std::fs::read(node.dir.path().join("network.json")).unwrap(), before);
}

#[test]
fn a_used_invite_is_refused_and_leaves_nothing_to_resume() {
    let (office, _founder, first) = founded();
    let token = open_invite(&first);
    Node::new(&office).up(Some(&token)).unwrap();
    let late = Node::new(&office);
    assert_eq!(late.up(Some(&token)).unwrap_err().code, refusal::ALREADY_USED);
    assert!(!late.files().contains(&"join.json".to_owned()));
}

#[test]
fn a_taken_address_is_proposed_anew_and_a_taken_exact_name_is_not() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    office.0.borrow_mut().fates.push_back(Fate::Refuse(refusal::ADDRESS_TAKEN));
    assert!(node.up(Some(&open_invite(&first))).is_ok());
    let other = Node::new(&office);
    assert_eq!(other.up_named(Some(&open_invite(&first)), Some("laptop")).unwrap_err().code, refusal::NAME_TAKEN);
}

#[test]
fn a_range_in_use_on_this_machine_stops_the_join_before_it_is_redeemed() {
    let (office, _founder, first) = founded();
    let mut node = Node::new(&office);
    let (addresses, _) = own_addresses(&first, &ledger_of(first.network.network, &first.records)).unwrap();
    node.surroundings.routes.push(crate::os::netlink::Route { index: None, prefix: addresses[0].trunc() });
    assert_eq!(node.up(Some(&open_invite(&first))).unwrap_err().code, "range-clash");
    assert_eq!(office.0.borrow().ledger.as_ref().unwrap().members().count(), 1);
    assert_eq!(node.files(), ["lock"]);
    // A founder with the whole shared range in use elsewhere has nowhere to go.
    let empty = Office::default();
    let mut founder = Node::new(&empty);
    let all = crate::os::netlink::Route { index: None, prefix: "100.64.0.0/10".parse().unwrap() };
    founder.surroundings.routes.push(all);
    assert_eq!(founder.up(Some(&claim())).unwrap_err().code, "range-clash");
}

#[test]
fn a_coordinator_that_lies_in_its_proposal_is_found_out() {
    let lies: [fn(&mut ToNode); 4] = [
        // Somebody else's chain.
        |answer| {
            if let ToNode::Proposal { records, .. } = answer {
                let mut rng = rand::rng();
                let (ipv4, ipv6) = founding::random_ranges(&mut rng);
                let root = Secret32::random(&mut rng).signing_key();
                let keys = NodeKeys::generate(&mut rng);
                *records = founding::found(&keys, &root, "home", "nas", ipv4, ipv6, WALL, &mut rng).to_vec();
            }
        },
        // An address outside the range.
        |answer| {
            if let ToNode::Proposal { ipv4, .. } = answer {
                *ipv4 = Ipv4Addr::new(192, 0, 2, 1);
            }
        },
        // Another name.
        |answer| {
            if let ToNode::Proposal { name, .. } = answer {
                *name = "printer".into();
            }
        },
        // No chain at all.
        |answer| {
            if let ToNode::Proposal { records, .. } = answer {
                records.clear();
            }
        },
    ];
    for (n, lie) in lies.into_iter().enumerate() {
        let (office, _founder, first) = founded();
        office.0.borrow_mut().lie = Some(lie);
        let node = Node::new(&office);
        assert_eq!(node.up(Some(&open_invite(&first))).unwrap_err().code, "untrusted-coordinator", "lie {n}");
        assert_eq!(node.files(), ["lock"], "lie {n}");
    }
}

#[test]
fn a_lost_network_file_is_repaired_by_any_token_of_the_network() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    let member = node.up(Some(&open_invite(&first))).unwrap();
    std::fs::write(node.dir.path().join("network.json"), b"{").unwrap();
    assert_eq!(node.up(None).unwrap_err().code, "network-file");
    let again = node.up(Some(&open_invite(&first))).unwrap();
    assert_eq!(again.keys.identity_key(), member.keys.identity_key());
    assert_eq!(again.records, member.records);
    assert_eq!(office.0.borrow().ledger.as_ref().unwrap().members().count(), 2);
}

#[test]
fn another_token_of_the_same_coordinator_finishes_the_pending_join_first() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    office.0.borrow_mut().fates.extend(vec![Fate::AnswerLost; 4]);
    assert!(node.up(Some(&open_invite(&first))).is_err());
    office.0.borrow_mut().fates.clear();
    let member = node.up(Some(&open_invite(&first))).unwrap();
    assert!(member.notes[0].contains("earlier join"));
    assert_eq!(office.0.borrow().ledger.as_ref().unwrap().members().count(), 2);
}

#[test]
fn a_new_member_judges_the_log_in_its_order_so_that_old_addresses_and_names_are_no_clash() {
    let (office, _founder, first) = founded();
    let old = Node::new(&office).up_named(Some(&open_invite(&first)), Some("nas")).unwrap();
    let signer = first.keys.identity.signing_key();
    let target = crate::trust::record::RevokeTarget::Identity(old.keys.identity_key());
    let revoke = founding::revoke_record(&signer, first.network.network, target, WALL);
    office.0.borrow_mut().ledger.as_mut().unwrap().admit(&revoke, Judge::Coordinator(WALL)).unwrap();
    let new = Node::new(&office).up_named(Some(&open_invite(&first)), Some("nas")).unwrap();
    assert_eq!(
        own_addresses(&old, &ledger_of(old.network.network, &old.records)).unwrap().0[0],
        own_addresses(&new, &ledger_of(new.network.network, &new.records)).unwrap().0[0],
        "the address is used again"
    );
    assert_eq!(new.records, office.0.borrow().ledger.as_ref().unwrap().log());
}

#[test]
fn a_coordinator_whose_log_lacks_the_new_member_is_found_out() {
    let (office, _founder, first) = founded();
    office.0.borrow_mut().shown_log = Some(first.records.clone());
    let node = Node::new(&office);
    assert_eq!(node.up(Some(&open_invite(&first))).unwrap_err().code, UNTRUSTED);
    // It may come to its senses.
    office.0.borrow_mut().shown_log = None;
    assert!(node.up(None).is_ok());
}

#[test]
fn lost_records_are_fetched_again_and_what_is_left_of_them_is_kept() {
    let (office, _founder, first) = founded();
    let node = Node::new(&office);
    let member = node.up(Some(&open_invite(&first))).unwrap();
    let file = node.dir.path().join("records.jsonl");
    std::fs::write(&file, b"rubbish").unwrap();
    office.0.borrow_mut().unreachable = true;
    let refused = node.up(None).unwrap_err();
    assert!(refused.text.contains("records.jsonl") && refused.text.contains("reached"), "{refused:?}");
    office.0.borrow_mut().unreachable = false;
    let again = node.up(None).unwrap();
    assert_eq!(again.records, member.records);
    assert!(node.files().iter().any(|name| name.starts_with("records.jsonl.corrupt-")));
    assert!(node.up(None).unwrap().notes.is_empty(), "repaired once");
}

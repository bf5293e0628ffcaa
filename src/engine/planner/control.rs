//! The coordinator's messages, and what they say about the coordinator.
//!
//! Its word counts for nothing: records pass the ledger or are refused, what it showed once it cannot take back, and each
//! attempt becomes a health condition.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::engine::drops::Drop;
use crate::engine::io::{Event, Output, PeerId};
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::trust::ledger::{Change, Judge, Refusal};
use crate::trust::record::{Record, RecordError, RevokeTarget, SignedRecord};
use crate::wire::control::{MAX_OPEN, ToCoordinator, ToNode, log_head, refusal};
use crate::wire::keys::{Digest32, WgKey};
use crate::wire::local::Problem;
use crate::wire::version::PROGRAM;

/// An unanswered request to the coordinator is given up after this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Refused records remembered for the status; more are only counted.
const REFUSED_KEPT: usize = 8;
/// What the coordinator said of where a peer is counts for so long.
const LOCATED_FOR: Duration = Duration::from_secs(30);
/// Such questions that may be open at once.
const LOCATING: usize = 64;
/// Records put back in one message.
const RESTORE_CHUNK: usize = 64;

/// What is known of the coordinator.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) connected: bool,
    pub(super) down_since: Option<Now>,
    pub(super) problem: Option<Problem>,
    pub(super) last_heard: Option<Now>,
    pub(super) synced: bool,
    /// The relay's budget is spent.
    pub(super) relay_spent_since: Option<Now>,
    /// How far the coordinator's log has been read in this run, and its running digest there.
    position: Option<(u64, Digest32)>,
    /// While the whole log is read again: the ids seen so far.
    comparing: Option<BTreeSet<Digest32>>,
    next_re: u64,
    /// Whom we asked the coordinator for, by request number; the newest few.
    locating: BTreeMap<u64, PeerId>,
    /// The open addresses the coordinator was last told, and the request's number.
    announced: (Vec<SocketAddr>, u64),
    /// Publications under way: request number → the caller's token (None: our own) and the deadline.
    publishing: BTreeMap<u64, (Option<u64>, Now)>,

    /// Records of ours that the coordinator's log lacks, and since when.
    pub(super) missing: BTreeMap<Digest32, Missing>,
    pub(super) missing_since: Option<Now>,
    /// Records it showed that the chain of trust refuses.
    pub(super) refused: Vec<(Digest32, Refused)>,
    pub(super) refused_since: Option<Now>,
    /// Its log's digest did not fit its records.
    pub(super) inconsistent_since: Option<Now>,
    /// Records of a kind this version cannot read.
    pub(super) unreadable_since: Option<Now>,
}

/// A record the coordinator refuses to know.
#[derive(Debug, Clone)]
pub(super) struct Missing {
    pub(super) is_revoke: bool,
    /// Given back on this connection.
    restored: bool,
}

/// A record the ledger refused.
#[derive(Debug, Clone)]
pub(super) struct Refused {
    pub(super) what: String,
    pub(super) why: Refusal,
}

impl Control {
    pub(super) const fn new(now: Now) -> Self {
        Self {
            connected: false,
            down_since: Some(now),
            problem: None,
            last_heard: None,
            synced: false,
            relay_spent_since: None,
            position: None,
            comparing: None,
            next_re: 1,
            locating: BTreeMap::new(),
            announced: (Vec::new(), 0),
            publishing: BTreeMap::new(),
            missing: BTreeMap::new(),
            missing_since: None,
            refused: Vec::new(),
            refused_since: None,
            inconsistent_since: None,
            unreadable_since: None,
        }
    }
}

impl Planner {
    pub(super) fn control_up(&mut self) {
        self.control.connected = true;
        self.control.down_since = None;
        self.control.problem = None;
        self.control.last_heard = Some(self.now);
        self.control.synced = false;
        self.control.comparing = None;
        for missing in self.control.missing.values_mut() {
            missing.restored = false;
        }
        // What peers send before the coordinator answers must not be taken for read.
        let here = (self.ledger.log().len() as u64, self.ledger.head());
        let (have, head) = *self.control.position.get_or_insert(here);
        let re = self.request_number();
        self.say(ToCoordinator::Hello { re, version: PROGRAM.to_owned(), have, head });
        self.control.locating.clear();
        self.control.announced = (Vec::new(), 0);
        self.look_for_anchors();
        self.announce();
        self.advertise();
    }

    /// Asks where a peer is, unless that was answered lately.
    pub(super) fn locate(&mut self, id: PeerId) {
        let now = self.now;
        let Some(peer) = self.peer(id).filter(|_| self.control.connected) else { return };
        let wg = peer.wg;
        let located = peer.talk.as_deref().and_then(|t| t.located).is_some_and(|(_, at)| now.since(at) < LOCATED_FOR);
        if located || self.control.locating.values().any(|p| *p == id) {
            return;
        }
        let re = self.request_number();
        if self.control.locating.len() >= LOCATING {
            self.control.locating.pop_first();
        }
        self.control.locating.insert(re, id);
        self.say(ToCoordinator::Locate { re, peer: wg });
    }

    fn located(&mut self, re: u64, observed: Option<IpAddr>, open: &[SocketAddr]) {
        let Some(id) = self.control.locating.remove(&re) else { return };
        let now = self.now;
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.located = Some((observed, now));
        }
        let open: Vec<SocketAddr> =
            open.iter().copied().take(MAX_OPEN).filter(|addr| self.may_be_a_peer_s(addr)).collect();
        self.with_agent(id, |agent, _, cx| agent.heard_open(&open, cx));
    }

    /// Tells the coordinator where everybody can reach this node, if that changed.
    pub(super) fn announce(&mut self) {
        let mut open = self.open_addresses();
        open.truncate(MAX_OPEN);
        if self.control.connected && open != self.control.announced.0 {
            let re = self.request_number();
            self.control.announced = (open.clone(), re);
            self.say(ToCoordinator::Announce { re, open });
        }
    }

    pub(super) fn control_down(&mut self, problem: Option<Problem>) {
        if self.control.connected || self.control.down_since.is_none() {
            self.control.down_since = Some(self.now);
            self.control.connected = false;
            self.look_for_anchors();
        }
        // Said anew after the next Welcome, if it still is so.
        self.control.relay_spent_since = None;
        self.control.problem = problem.or(self.control.problem.take());
        let lost: Vec<u64> = self.control.publishing.keys().copied().collect();
        for re in lost {
            self.publication_ended(re, Some(no_answer()));
        }
        self.log_is_read(None);
    }

    pub(super) fn handle_control(&mut self, message: ToNode) {
        self.control.last_heard = Some(self.now);
        match message {
            ToNode::Welcome { stun, .. } => self.outputs.push_back(Output::ResolveStun(stun)),
            ToNode::Log { from, records, head, end } => self.handle_log(from, &records, head, end),
            ToNode::Presence { full, online, offline } => self.presence(full, &online, &offline),
            ToNode::Adverts { adverts } => self.heard_adverts(&adverts),
            ToNode::Located { re, observed, open } => self.located(re, observed, &open),
            ToNode::Published { re } => self.publication_ended(re, None),
            ToNode::Refused { re, code, text, hint } => self.request_refused(re, Problem { code, text, hint }),
            ToNode::RelayBudget { spent, .. } => {
                let since = self.control.relay_spent_since.filter(|_| spent);
                self.control.relay_spent_since = since.or(spent.then_some(self.now));
            }
            // The shell's: it chooses what carries relayed packets.
            ToNode::RelayOpened { .. } => {}
            ToNode::Pong { .. } | ToNode::Joined { .. } | ToNode::Proposal { .. } => {}
        }
    }

    /// Sends records of the local admin to the coordinator.
    pub(super) fn publish(&mut self, token: u64, records: Vec<SignedRecord>) {
        if !self.control.connected {
            let problem = self.control.problem.clone().unwrap_or_else(not_connected);
            self.outputs.push_back(Output::Event(Event::Published { token, problem: Some(problem) }));
            return;
        }
        self.send_records(Some(token), records);
    }

    /// Requests whose answers are overdue.
    pub(super) fn control_due(&mut self) {
        let overdue: Vec<u64> =
            self.control.publishing.iter().filter(|(_, (_, at))| *at <= self.now).map(|(re, _)| *re).collect();
        for re in overdue {
            self.publication_ended(re, Some(no_answer()));
        }
    }

    fn handle_log(&mut self, from: u64, records: &[SignedRecord], head: Digest32, end: bool) {
        let (have, running) =
            self.control.position.unwrap_or_else(|| (self.ledger.log().len() as u64, self.ledger.head()));
        let running = if from == 0 {
            // The coordinator's log does not continue ours: read all of it and see what is gone.
            self.control.comparing = (have > 0).then(BTreeSet::new);
            Digest32::default()
        } else if from == have {
            running
        } else {
            tracing::warn!(from, have, "the coordinator's log has a gap; asking again");
            self.control.position = None;
            let re = self.request_number();
            self.say(ToCoordinator::Hello { re, version: PROGRAM.to_owned(), have: 0, head: Digest32::default() });
            return;
        };
        let running = records.iter().fold(running, log_head);
        if running != head {
            self.control.inconsistent_since.get_or_insert(self.now);
        }
        let mut accepted = Vec::new();
        for record in records {
            if let Some(seen) = &mut self.control.comparing {
                seen.insert(record.id());
            }
            self.was_shown(&record.id());
            if self.admit(record) {
                accepted.push(record.clone());
            }
            if self.control.missing.remove(&record.id()).is_some() && self.control.missing.is_empty() {
                self.control.missing_since = None;
            }
        }
        if !accepted.is_empty() {
            self.outputs.push_back(Output::Persist(accepted));
        }
        // Once for all of them: a network may have ten thousand.
        self.freshen_routes();
        self.control.position = Some((from + records.len() as u64, running));
        if end {
            if let Some(seen) = self.control.comparing.take() {
                self.compare(&seen);
            }
            self.restore_missing();
            self.log_is_read(Some(self.now));
            if !self.control.synced {
                self.control.synced = true;
                self.outputs.push_back(Output::Event(Event::Synced));
            }
        }
    }

    /// Judges one record of the coordinator's. True: new and accepted.
    fn admit(&mut self, record: &SignedRecord) -> bool {
        match self.judge(record) {
            Ok(accepted) => accepted,
            Err(Refusal::Record(RecordError::Unreadable)) => {
                self.control.unreadable_since.get_or_insert(self.now);
                self.drops.count(Drop::UnreadableControl);
                false
            }
            Err(why) => {
                self.drops.count(Drop::RefusedRecord);
                let id = record.id();
                let known = self.control.refused.iter().any(|(r, _)| *r == id);
                if !known && self.control.refused.len() < REFUSED_KEPT {
                    tracing::warn!(%why, "refused a record from the coordinator");
                    let what = describe(record);
                    self.control.refused.push((id, Refused { what, why }));
                }
                self.control.refused_since.get_or_insert(self.now);
                false
            }
        }
    }

    /// Judges one record, whoever sent it, and applies what it changes. True: new and accepted.
    ///
    /// Routes are decided anew by the caller, [`Self::freshen_routes`], once for all records that came together.
    pub(super) fn judge(&mut self, record: &SignedRecord) -> Result<bool, Refusal> {
        match self.ledger.admit(record, Judge::Reader)? {
            Change::Known => return Ok(false),
            Change::MemberAdded(identity) => {
                if let Some(wg) = self.ledger.member(&identity).map(|m| m.wg)
                    && wg != self.me.wg
                {
                    self.add_peer(identity, wg);
                }
            }
            Change::MemberRevoked(identity) => {
                if identity == self.me.identity {
                    self.expelled = true;
                    self.outputs.push_back(Output::Event(Event::Expelled));
                } else {
                    self.remove_peer(&identity);
                }
            }
            Change::Founded | Change::AdminAdded(_) | Change::InviteAdded(_) | Change::InviteRevoked(_) => {}
            Change::RouteGranted(_) | Change::RouteRevoked(_) => self.routes_are_stale(),
            Change::AliasChanged(_) => {
                self.routes_are_stale();
                self.names_changed();
            }
            Change::NamesChanged => self.names_changed(),
        }
        self.holdings_changed();
        Ok(true)
    }

    /// The whole log was read: what of ours is not in it was taken back.
    fn compare(&mut self, seen: &BTreeSet<Digest32>) {
        let mut still = BTreeMap::new();
        for record in self.ledger.log().iter().filter(|r| !seen.contains(&r.id())) {
            let id = record.id();
            let restored = self.control.missing.get(&id).is_some_and(|m| m.restored);
            let is_revoke = matches!(record.open(), Ok(Record::Revoke(_)));
            still.insert(id, Missing { is_revoke, restored });
        }
        self.control.missing_since =
            if still.is_empty() { None } else { self.control.missing_since.or(Some(self.now)) };
        self.control.missing = still;
    }

    /// Gives the coordinator back what it lacks, once a connection, until it stays there.
    fn restore_missing(&mut self) {
        let lacks =
            |missing: &BTreeMap<Digest32, Missing>, r: &SignedRecord| missing.get(&r.id()).is_some_and(|m| !m.restored);
        if self.control.missing.values().all(|m| m.restored) {
            return;
        }
        let restore: Vec<SignedRecord> =
            self.ledger.log().iter().filter(|r| lacks(&self.control.missing, r)).cloned().collect();
        for missing in self.control.missing.values_mut() {
            missing.restored = true;
        }
        self.give_to_coordinator(restore);
    }

    /// Records that the coordinator lacks.
    pub(super) fn give_to_coordinator(&mut self, records: Vec<SignedRecord>) {
        for chunk in records.chunks(RESTORE_CHUNK) {
            tracing::warn!(
                records = chunk.len(),
                "the coordinator's log lacks records this node has; giving them back"
            );
            self.send_records(None, chunk.to_vec());
        }
    }

    fn presence(&mut self, full: bool, online: &[WgKey], offline: &[WgKey]) {
        let now = self.now;
        let unknown = online.iter().filter(|key| !self.by_wg.contains_key(key)).count();
        tracing::debug!(full, online = online.len(), offline = offline.len(), unknown, "presence");
        if full {
            let here: BTreeSet<&WgKey> = online.iter().collect();
            for peer in self.peers.iter_mut().flatten().filter(|p| !here.contains(&p.wg)) {
                peer.is_online(false, now);
            }
        }
        let mut back = Vec::new();
        for (keys, is_online) in [(online, true), (offline, false)] {
            for key in keys {
                let Some(id) = self.by_wg.get(key).copied() else { continue };
                let Some(peer) = self.peer_mut(id) else { continue };
                // A full list comes when we were away, not the peer.
                if is_online && !peer.online && !full {
                    back.push(id);
                }
                peer.is_online(is_online, now);
            }
        }
        for id in back {
            self.came_back(id);
        }
        self.presence_of_routers_changed(full || online.iter().chain(offline).any(|key| self.is_router(key)));
    }

    fn send_records(&mut self, token: Option<u64>, records: Vec<SignedRecord>) {
        let re = self.request_number();
        self.control.publishing.insert(re, (token, self.now + ANSWER_WITHIN));
        self.schedule_control();
        self.say(ToCoordinator::Publish { re, records });
    }

    fn publication_ended(&mut self, re: u64, problem: Option<Problem>) {
        let Some((token, _)) = self.control.publishing.remove(&re) else { return };
        self.schedule_control();
        match token {
            Some(token) => self.outputs.push_back(Output::Event(Event::Published { token, problem })),
            None => {
                if let Some(problem) = problem {
                    tracing::warn!(code = problem.code, "the coordinator does not take its records back");
                }
            }
        }
    }

    fn request_refused(&mut self, re: u64, problem: Problem) {
        if self.control.publishing.contains_key(&re) {
            self.publication_ended(re, Some(problem));
            return;
        }
        // An older coordinator does not know the question; or it does not know the peer. Neither is our problem.
        if self.control.locating.remove(&re).is_some() || self.control.announced.1 == re {
            return;
        }
        if self.advertising_refused(re, &problem) {
            return;
        }
        if problem.code == refusal::NOT_A_MEMBER || problem.code == refusal::REVOKED {
            tracing::warn!(code = problem.code, "the coordinator does not serve this node");
        }
        self.control.problem = Some(problem);
    }

    fn schedule_control(&mut self) {
        let next = self.control.publishing.values().map(|(_, at)| *at).min();
        self.timers.set(Why::Control, next);
    }

    pub(super) const fn request_number(&mut self) -> u64 {
        let re = self.control.next_re;
        self.control.next_re += 1;
        re
    }

    pub(super) fn say(&mut self, message: ToCoordinator) {
        self.outputs.push_back(Output::Control(message));
    }
}

/// A refused record in a few words; what it says of itself is not to be believed.
fn describe(record: &SignedRecord) -> String {
    match record.open() {
        Ok(Record::Member(m)) => format!("a member called {:?}", m.name),
        Ok(Record::Genesis(_)) => "a founding record".to_owned(),
        Ok(Record::Admin(a)) => format!("an admin {}", a.identity.node_id()),
        Ok(Record::Invite(_)) => "an invite".to_owned(),
        Ok(Record::RouteGrant(g)) => format!("a grant for {}", g.prefix),
        Ok(Record::RouteRevoke(r)) => format!("the refusal of {}", r.prefix),
        Ok(Record::DnsName(r)) => format!("the addresses of {:?}", r.name),
        Ok(Record::DnsSplit(r)) => format!("the servers of {:?}", r.domain),
        Ok(Record::RouteAlias(r)) => format!("an alias of {}", r.prefix),
        Ok(Record::Revoke(r)) => match r.target {
            RevokeTarget::Identity(identity) => format!("the removal of {}", identity.node_id()),
            RevokeTarget::Invite(_) => "the removal of an invite".to_owned(),
        },
        Err(_) => "a record".to_owned(),
    }
}

fn not_connected() -> Problem {
    Problem {
        code: "coordinator-unreachable".into(),
        text: "the coordinator cannot be reached, so nothing was changed".into(),
        hint: "see `meshd status`; try again when it is back".into(),
    }
}

fn no_answer() -> Problem {
    Problem {
        code: "no-answer".into(),
        text: "the coordinator did not answer in time; the change may or may not have been stored".into(),
        hint: "look at `meshd status`, then try again: repeating is harmless".into(),
    }
}

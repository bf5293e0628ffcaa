//! The coordinator: a mailbox that keeps signed records, hands them on, and says who is connected.
//!
//! What it accepts, every node would accept: it runs the same [`Ledger`]. It has no key that nodes believe, so all it can
//! do wrong is to hold things back. Its own work is order (one log, so that of two guests with one invite or one address
//! one comes first), durability (no answer before the record is stored) and limits.
//!
//! A record is admitted to the ledger at once and stored right after; until then nobody but later requests sees it. If the
//! store fails, the ledger goes back to what is stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use subtle::ConstantTimeEq;

use crate::coord::io::{ConnId, Input, Output, why};
use crate::coord::limits::{Grain, Rate, SourceLimiter};
use crate::coord::presence::Presence;
use crate::coord::refusals::Refused;
use crate::coord::reservations::{Proposed, Reservations};
use crate::coord::writes::{Answer, InFlight, Waiter, Write};
use crate::time::{Now, UnixSeconds};
use crate::trust::ledger::{Change, Judge, Ledger, Refusal};
use crate::trust::names::{dns_label, label_from_hostname};
use crate::trust::record::{Member, SignedRecord};
use crate::wire::control::{LOG_CHUNK, MAX_MESSAGE, StunServer, ToCoordinator, ToNode};
use crate::wire::keys::{ControlKey, Digest32, IdentityKey, InviteKey, NetworkId, WgKey};

/// How many `Log` messages are sent to one node before it is given time to take them.
const LOG_WINDOW: usize = 16;
/// How long it is given, unless the shell says earlier that they are on their way.
const LOG_PAUSE: Duration = Duration::from_millis(500);
/// Room in a message for everything but its records.
const MESSAGE_FRAME: usize = 1_024;

/// How the coordinator is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// The program's version, told to nodes for people.
    pub version: String,
    /// STUN servers offered to nodes.
    pub stun: Vec<StunServer>,
    /// [`claim_digest`] of the claim token's secret; `None` if no claim is open.
    pub claim: Option<Digest32>,
    /// What strangers may use up.
    pub limits: Limits,
}

/// Bounds on what others may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all kinds at once.
    pub connections: usize,
    /// Connections of guests (keys that are not members') at once.
    pub guests: usize,
    /// How long a guest may take to join, and a member's connection to say its first word.
    pub guest_deadline: Duration,
    /// How often one host may ask to found or join.
    pub joins: Rate,
    /// Hosts whose asking is remembered.
    pub sources: usize,
    /// How long a proposed address and name are kept from other guests.
    pub reservation: Duration,
    /// How many are kept at once.
    pub reservations: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 70_000,
            guests: 512,
            guest_deadline: Duration::from_secs(30),
            joins: Rate { burst: 120, every: Duration::from_millis(500) },
            sources: 8_192,
            reservation: Duration::from_secs(60),
            reservations: 1_024,
        }
    }
}

/// What [`Config::claim`] holds for a claim secret. A digest, so that comparing does not tell how much of it was right.
#[must_use]
pub fn claim_digest(secret: &[u8; 32]) -> Digest32 {
    Digest32::of(&[b"meshd claim v1", secret])
}

/// The coordinator as a pure state machine; see the module's text and [`crate::coord`] for how to drive it.
#[derive(Debug)]
pub struct Coordinator {
    config: Config,
    /// What was admitted, stored or about to be.
    ledger: Option<Ledger>,
    /// How many records of the ledger's log are stored. Only those are shown to anybody.
    durable: usize,
    in_flight: Option<InFlight>,
    next: Write,
    tickets: u64,

    conns: BTreeMap<ConnId, Conn>,
    /// The connection that last proved to have the key.
    by_key: BTreeMap<ControlKey, ConnId>,
    guests: usize,
    /// Connections that said `Hello`.
    listeners: BTreeSet<ConnId>,
    deadlines: BTreeSet<(Now, ConnId)>,
    /// Listeners in the middle of a long log, and when to go on.
    pauses: BTreeSet<(Now, ConnId)>,

    presence: Presence,
    reservations: Reservations,
    joins: SourceLimiter,
    outputs: VecDeque<Output>,
    now: Now,
}

#[derive(Debug)]
struct Conn {
    key: ControlKey,
    from: Option<IpAddr>,
    /// Its key was not a stored member's so far.
    guest: bool,
    /// It said something. Noise's first message can be replayed by anybody who saw it; what follows cannot.
    spoke: bool,
    deadline: Option<Now>,
    listening: Option<Listening>,
}

/// A connection that said `Hello`.
#[derive(Debug, Clone, Copy)]
struct Listening {
    wg: WgKey,
    /// How many records of the log were sent to it or are known to it.
    sent: usize,
    /// The whole log was sent once, and the full presence after it.
    complete: bool,
    paused_until: Option<Now>,
}

impl Coordinator {
    /// A coordinator with the network it stored earlier, if it has one.
    #[must_use]
    pub fn new(config: Config, ledger: Option<Ledger>) -> Self {
        let ledger = ledger.filter(|ledger| ledger.genesis().is_some());
        let limits = config.limits;
        let outputs = ledger
            .iter()
            .flat_map(Ledger::members)
            .map(|m| Output::RelayAdmit { control: m.control, wg: m.wg })
            .collect();
        Self {
            durable: ledger.as_ref().map_or(0, |ledger| ledger.log().len()),
            ledger,
            in_flight: None,
            next: Write::default(),
            tickets: 0,
            conns: BTreeMap::new(),
            by_key: BTreeMap::new(),
            guests: 0,
            listeners: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            pauses: BTreeSet::new(),
            presence: Presence::default(),
            reservations: Reservations::new(limits.reservation, limits.reservations),
            joins: SourceLimiter::new(limits.joins, Grain::HOST, limits.sources),
            outputs,
            now: Now::ZERO,
            config,
        }
    }

    /// Something happened.
    pub fn handle(&mut self, input: Input, now: Now) {
        self.now = self.now.max(now);
        match input {
            Input::Opened { conn, key, from } => self.opened(conn, key, from),
            Input::Message { conn, message, wall } => self.message(conn, message, wall),
            Input::Closed(conn) => self.forget(conn),
            Input::Drained(conn) => self.resume(conn),
            Input::Persisted { ticket, ok } => self.persisted(ticket, ok),
        }
    }

    /// A deadline passed.
    pub fn handle_timeout(&mut self, now: Now) {
        self.now = self.now.max(now);
        while let Some((_, conn)) = self.deadlines.first().filter(|(at, _)| *at <= self.now).copied() {
            self.close(conn, why::DEADLINE);
        }
        while let Some((_, conn)) = self.pauses.first().filter(|(at, _)| *at <= self.now).copied() {
            self.resume(conn);
        }
        for message in self.presence.changes(self.now) {
            let complete = |c: &&ConnId| {
                self.conns.get(c).and_then(|conn| conn.listening).is_some_and(|listening| listening.complete)
            };
            let told: Vec<ConnId> = self.listeners.iter().filter(complete).copied().collect();
            told.into_iter().for_each(|conn| self.send(conn, message.clone()));
        }
    }

    /// What is to be done next; drain until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Self::handle_timeout`] at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        if !self.outputs.is_empty() {
            return Some(self.now);
        }
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        let pause = self.pauses.first().map(|(at, _)| *at);
        [deadline, pause, self.presence.due()].into_iter().flatten().min()
    }

    /// The network, if there is one: what is stored, and possibly records that are just being stored.
    #[must_use]
    pub const fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// Open control connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    /// Connections of nodes that said `Hello`.
    #[must_use]
    pub fn nodes_online(&self) -> usize {
        self.listeners.len()
    }

    // Connections.

    fn opened(&mut self, conn: ConnId, key: ControlKey, from: Option<IpAddr>) {
        let limits = self.config.limits;
        let guest = self.member(&key).is_none();
        if self.conns.len() >= limits.connections || (guest && self.guests >= limits.guests) {
            self.outputs.push_back(Output::Close { conn, why: why::BUSY });
            return;
        }
        let deadline = self.now + limits.guest_deadline;
        self.deadlines.insert((deadline, conn));
        self.guests += usize::from(guest);
        let conn_state = Conn { key, from, guest, spoke: false, deadline: Some(deadline), listening: None };
        self.conns.insert(conn, conn_state);
    }

    fn message(&mut self, conn: ConnId, message: ToCoordinator, wall: UnixSeconds) {
        let Some(c) = self.conns.get_mut(&conn) else { return };
        let (key, from) = (c.key, c.from);
        if !std::mem::replace(&mut c.spoke, true) {
            if let Some(older) = self.by_key.insert(key, conn) {
                self.close(older, why::REPLACED);
            }
            if self.member(&key).is_some() {
                self.welcome_in(conn);
            }
        }
        let (re, result) = match message {
            ToCoordinator::Ping { re } => (re, Ok(Some(ToNode::Pong { re, now: wall }))),
            ToCoordinator::Found { re, claim, records } => {
                (re, self.limited(from).and_then(|()| self.found(conn, key, re, &claim, &records)).map(|()| None))
            }
            ToCoordinator::Propose { re, invite, name, exact } => {
                (re, self.limited(from).and_then(|()| self.propose(key, re, &invite, &name, exact, wall)).map(Some))
            }
            ToCoordinator::Redeem { re, invite, member } => (
                re,
                self.limited(from).and_then(|()| self.redeem(conn, key, re, &invite, &member, wall)).map(|()| None),
            ),
            ToCoordinator::Hello { re, version: _, have, head } => {
                (re, self.hello(conn, key, re, have, head, wall).map(|()| None))
            }
            ToCoordinator::Publish { re, records } => (re, self.publish(conn, key, re, &records, wall).map(|()| None)),
        };
        match result {
            Ok(None) => {}
            Ok(Some(answer)) => self.send(conn, answer),
            Err(refused) => {
                let expelled = refused == Refused::revoked();
                self.send(conn, refused.answer(re));
                if expelled {
                    self.close(conn, why::REVOKED);
                }
            }
        }
    }

    /// The connection's key is a stored member's: no deadline any more.
    fn welcome_in(&mut self, conn: ConnId) {
        let Some(c) = self.conns.get_mut(&conn) else { return };
        if let Some(deadline) = c.deadline.take() {
            self.deadlines.remove(&(deadline, conn));
        }
        if std::mem::replace(&mut c.guest, false) {
            self.guests -= 1;
        }
    }

    fn close(&mut self, conn: ConnId, why: &'static str) {
        if self.conns.contains_key(&conn) {
            self.forget(conn);
            self.outputs.push_back(Output::Close { conn, why });
        }
    }

    fn forget(&mut self, conn: ConnId) {
        let Some(c) = self.conns.remove(&conn) else { return };
        if self.by_key.get(&c.key) == Some(&conn) {
            self.by_key.remove(&c.key);
        }
        if let Some(deadline) = c.deadline {
            self.deadlines.remove(&(deadline, conn));
        }
        if c.guest {
            self.guests -= 1;
        }
        self.listeners.remove(&conn);
        if let Some(listening) = c.listening {
            self.presence.went(listening.wg, conn, self.now);
            if let Some(until) = listening.paused_until {
                self.pauses.remove(&(until, conn));
            }
        }
    }

    fn send(&mut self, conn: ConnId, message: ToNode) {
        if self.conns.contains_key(&conn) {
            self.outputs.push_back(Output::Send { conn, message });
        }
    }

    fn limited(&mut self, from: Option<IpAddr>) -> Result<(), Refused> {
        let from = from.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        if self.joins.allow(from, self.now) { Ok(()) } else { Err(Refused::rate_limited()) }
    }

    // Who is who.

    /// The live member with this control key whose record is stored.
    fn member(&self, key: &ControlKey) -> Option<&Member> {
        let ledger = self.ledger.as_ref()?;
        ledger.by_control(key).filter(|m| ledger.member_position(&m.identity).is_some_and(|at| at < self.durable))
    }

    /// Like [`Self::member`], with the reason if it is none.
    fn expect_member(&self, key: &ControlKey) -> Result<&Member, Refused> {
        self.member(key).ok_or_else(|| match &self.ledger {
            Some(_) if self.stored_revoke(key).is_some() => Refused::revoked(),
            Some(_) if self.durable > 0 => Refused::not_a_member(),
            _ => Refused::no_network(),
        })
    }

    /// The position of the stored Revoke that put this key's node out.
    fn stored_revoke(&self, key: &ControlKey) -> Option<usize> {
        let ledger = self.ledger.as_ref()?;
        let member = ledger.by_control_ever(key)?;
        ledger.revoked_position(&member.identity).filter(|at| *at < self.durable)
    }

    // Requests of guests.

    fn found(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        claim: &Digest32,
        records: &[SignedRecord],
    ) -> Result<(), Refused> {
        let waiter = Waiter { conn, re, answer: Answer::Joined };
        if let Some(ledger) = &self.ledger {
            let mine = ledger.by_control(&key).is_some();
            let positions: Option<Vec<usize>> = records.iter().map(|r| ledger.position(&r.id())).collect();
            return match positions.as_deref() {
                Some([.., last]) if mine && records.len() == 4 => {
                    self.answer_when_stored(*last, waiter);
                    Ok(())
                }
                _ => Err(Refused::claim_used()),
            };
        }
        let right = self.config.claim.map(|c| c.0.ct_eq(&claim_digest(&claim.0).0));
        if !right.is_some_and(bool::from) {
            return Err(Refused::wrong_claim());
        }
        let [genesis, _, _, _] = records else {
            return Err(Refused::bad_record("a network is founded by exactly four records"));
        };
        let mut ledger = Ledger::new(NetworkId(genesis.signer.0));
        // The founder's clock need not agree with ours: the claim is what entitles it.
        let changes = ledger.admit_all(records, Judge::Reader).map_err(|(i, refusal)| founding_refused(i, &refusal))?;
        match changes.as_slice() {
            [Change::Founded, Change::AdminAdded(admin), Change::InviteAdded(_), Change::MemberAdded(member)]
                if admin == member && ledger.by_control(&key).is_some_and(|m| m.identity == *member) => {}
            _ => {
                return Err(Refused::bad_record(
                    "a network is founded by a Genesis, an Admin, an Invite and a Member record of the sending node",
                ));
            }
        }
        self.ledger = Some(ledger);
        self.next.claim_spent = true;
        self.store(changes, waiter);
        Ok(())
    }

    fn propose(
        &mut self,
        key: ControlKey,
        re: u64,
        invite: &InviteKey,
        name: &str,
        exact: bool,
        now: UnixSeconds,
    ) -> Result<ToNode, Refused> {
        self.reservations.expire(self.now);
        let Some(ledger) = self.ledger.as_ref().filter(|_| self.durable > 0) else {
            return Err(Refused::no_network());
        };
        if ledger.by_control(&key).is_some() {
            return Err(Refused::member_already());
        }
        if ledger.by_control_ever(&key).is_some() {
            return Err(Refused::of_record(&Refusal::Revoked));
        }
        let open = ledger.invite(invite);
        let (records, forced) = match open {
            Some(open) if open.revoked() => return Err(Refused::invite_revoked()),
            Some(open) if open.used_up() => return Err(Refused::invite_used_up()),
            Some(open) if now > open.invite.expires => return Err(Refused::invite_expired()),
            Some(open) => (fitting(ledger.chain(invite))?, open.invite.name.as_deref()),
            // Made while its admin was offline: the guest has the record, and needs to know the admins.
            None => (fitting(ledger.admin_chain())?, None),
        };
        let wanted = match forced {
            Some(forced) if exact && forced != name => {
                return Err(Refused::bad_request(format!("the invite is for a machine named {forced:?}")));
            }
            Some(forced) => forced.to_owned(),
            None if exact => {
                dns_label(name).map_err(|e| Refused::bad_request(format!("{name:?} is not a name: {e}")))?;
                name.to_owned()
            }
            None => label_from_hostname(name),
        };
        let name = if exact || forced.is_some() {
            if ledger.by_name(&wanted).is_some() {
                return Err(Refused::name_taken(&wanted));
            }
            wanted
        } else {
            ledger.free_name(&wanted, |name| self.reservations.has_name(name, &key))
        };
        let earlier = self.reservations.of(&key).map(|p| p.ipv4).filter(|a| ledger.by_ipv4(*a).is_none());
        let ipv4 = earlier
            .or_else(|| ledger.free_ipv4(|a| self.reservations.has_ipv4(a, &key)))
            .or_else(|| ledger.free_ipv4(|_| false))
            .ok_or_else(Refused::range_full)?;
        self.reservations.reserve(key, Proposed { ipv4, name: name.clone() }, self.now);
        Ok(ToNode::Proposal { re, records, ipv4, name, now })
    }

    fn redeem(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        invite: &SignedRecord,
        member: &SignedRecord,
        now: UnixSeconds,
    ) -> Result<(), Refused> {
        let waiter = Waiter { conn, re, answer: Answer::Joined };
        let Some(ledger) = &mut self.ledger else { return Err(Refused::no_network()) };
        if ledger.by_control(&key).is_some() {
            // Only the very record that was stored: with any other the node would believe something else than the network.
            let at = ledger.position(&member.id()).ok_or_else(Refused::member_already)?;
            self.answer_when_stored(at, waiter);
            return Ok(());
        }
        let before = ledger.log().len();
        let changes = ledger
            .admit_all(&[invite.clone(), member.clone()], Judge::Coordinator(now))
            .map_err(|(_, refusal)| Refused::of_record(&refusal))?;
        let joined = matches!(changes.as_slice(), [Change::InviteAdded(_) | Change::Known, Change::MemberAdded(_)]);
        if !joined || ledger.by_control(&key).is_none() {
            ledger.truncate(before);
            return Err(Refused::bad_record("a guest joins by an Invite record and a Member record with its own keys"));
        }
        self.reservations.release(&key);
        self.store(changes, waiter);
        Ok(())
    }

    // Requests of members.

    fn hello(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        have: u64,
        head: Digest32,
        wall: UnixSeconds,
    ) -> Result<(), Refused> {
        let common = self.common_prefix(have, head);
        let wg = match self.expect_member(&key) {
            Ok(member) => member.wg,
            Err(refused) => {
                // Our word that it was revoked means nothing to the node; the record does.
                if let Some(revoke) = self.stored_revoke(&key) {
                    self.send_farewell(conn, common, revoke + 1);
                }
                return Err(refused);
            }
        };
        let observed = self.conns.get(&conn).and_then(|c| c.from);
        let (version, stun) = (self.config.version.clone(), self.config.stun.clone());
        self.send(conn, ToNode::Welcome { re, version, now: wall, stun, observed });
        if let Some(c) = self.conns.get_mut(&conn) {
            let earlier = c.listening.replace(Listening { wg, sent: common, complete: false, paused_until: None });
            if let Some(until) = earlier.and_then(|l| l.paused_until) {
                self.pauses.remove(&(until, conn));
            }
        }
        self.listeners.insert(conn);
        self.presence.came(wg, conn, self.now);
        self.send_log(conn);
        Ok(())
    }

    fn publish(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        records: &[SignedRecord],
        now: UnixSeconds,
    ) -> Result<(), Refused> {
        let sender = self.expect_member(&key)?.identity;
        if records.len() > LOG_CHUNK {
            return Err(Refused::bad_request(format!("more than {LOG_CHUNK} records at once")));
        }
        let Some(ledger) = &mut self.ledger else { return Err(Refused::no_network()) };
        // An admin may put back members that a restored store lacks, whose invites expired long ago. It gains nothing by it:
        // it could sign a new invite.
        let judge = if ledger.is_admin(&sender) { Judge::Reader } else { Judge::Coordinator(now) };
        let changes = ledger.admit_all(records, judge).map_err(|(_, refusal)| Refused::of_record(&refusal))?;
        let waiter = Waiter { conn, re, answer: Answer::Published };
        if changes.iter().any(|change| *change != Change::Known) {
            self.store(changes, waiter);
        } else {
            let last = records.iter().filter_map(|r| ledger.position(&r.id())).max();
            match last {
                Some(at) => self.answer_when_stored(at, waiter),
                None => self.answer(waiter),
            }
        }
        Ok(())
    }

    // Storing.

    /// Has what was just admitted stored, then answers.
    fn store(&mut self, changes: Vec<Change>, waiter: Waiter) {
        self.next.changes.extend(changes.into_iter().filter(|change| *change != Change::Known));
        self.next.waiters.push(waiter);
        self.start_write();
    }

    /// Answers once the record at this position of the log is stored.
    fn answer_when_stored(&mut self, at: usize, waiter: Waiter) {
        if at < self.durable {
            self.answer(waiter);
        } else if let Some(in_flight) = self.in_flight.as_mut().filter(|w| at < w.end) {
            in_flight.write.waiters.push(waiter);
        } else {
            self.next.waiters.push(waiter);
        }
    }

    fn start_write(&mut self) {
        if self.in_flight.is_some() || self.next.is_empty() {
            return;
        }
        let Some(ledger) = &self.ledger else { return };
        let write = std::mem::take(&mut self.next);
        self.tickets += 1;
        let records = ledger.log().get(self.durable..).unwrap_or_default().to_vec();
        let end = ledger.log().len();
        self.outputs.push_back(Output::Persist { ticket: self.tickets, records, claim_spent: write.claim_spent });
        self.in_flight = Some(InFlight { ticket: self.tickets, end, write });
    }

    fn persisted(&mut self, ticket: u64, ok: bool) {
        let Some(InFlight { end, write, .. }) = self.in_flight.take_if(|w| w.ticket == ticket) else { return };
        if !ok {
            self.store_failed(write);
            return;
        }
        self.durable = end;
        let expelled = self.tell_relay(&write.changes);
        write.waiters.into_iter().for_each(|waiter| self.answer(waiter));
        let listeners: Vec<ConnId> = self.listeners.iter().copied().collect();
        listeners.into_iter().for_each(|conn| self.send_log(conn));
        for key in expelled {
            if let Some(conn) = self.by_key.get(&key).copied() {
                self.close(conn, why::REVOKED);
            }
        }
        self.start_write();
    }

    /// Nothing was stored: what was admitted since is taken back, and everybody who waits is told.
    fn store_failed(&mut self, write: Write) {
        if let Some(ledger) = &mut self.ledger {
            ledger.truncate(self.durable);
        }
        if self.durable == 0 {
            self.ledger = None;
        }
        let next = std::mem::take(&mut self.next);
        for waiter in write.waiters.into_iter().chain(next.waiters) {
            self.send(waiter.conn, Refused::store_failed().answer(waiter.re));
        }
    }

    /// Tells the relay who came and who is out. Returns the control keys of those who are out.
    fn tell_relay(&mut self, changes: &[Change]) -> Vec<ControlKey> {
        let Some(ledger) = &self.ledger else { return Vec::new() };
        let keys = |who: &IdentityKey| ledger.member_ever(who).map(|m| (m.control, m.wg));
        let mut expelled = Vec::new();
        for change in changes {
            match change {
                Change::MemberAdded(who) => {
                    self.outputs.extend(keys(who).map(|(c, wg)| Output::RelayAdmit { control: c, wg }))
                }
                Change::MemberRevoked(who) => {
                    if let Some((control, wg)) = keys(who) {
                        self.outputs.push_back(Output::RelayExpel { control, wg });
                        expelled.push(control);
                    }
                }
                Change::Known
                | Change::Founded
                | Change::AdminAdded(_)
                | Change::InviteAdded(_)
                | Change::InviteRevoked(_)
                | Change::RouteGranted(_) => {}
            }
        }
        expelled
    }

    fn answer(&mut self, waiter: Waiter) {
        let Waiter { conn, re, answer } = waiter;
        match answer {
            Answer::Joined => {
                self.welcome_in(conn);
                self.send(conn, ToNode::Joined { re });
            }
            Answer::Published => self.send(conn, ToNode::Published { re }),
        }
    }

    // Handing on.

    /// How much of our stored log a node holds that says it has `have` records with this head.
    fn common_prefix(&self, have: u64, head: Digest32) -> usize {
        let have = usize::try_from(have).unwrap_or(usize::MAX);
        let same = self.ledger.as_ref().and_then(|ledger| ledger.head_after(have)) == Some(head);
        if same && have <= self.durable { have } else { 0 }
    }

    /// Sends a listener what it lacks of the stored log, at most [`LOG_WINDOW`] messages at once; the first time the log is
    /// complete, also the full presence.
    fn send_log(&mut self, conn: ConnId) {
        let Some(mut listening) = self.conns.get(&conn).and_then(|c| c.listening) else { return };
        if listening.paused_until.is_some() || (listening.complete && listening.sent == self.durable) {
            return;
        }
        for _ in 0..LOG_WINDOW {
            listening.sent = self.send_chunk(conn, listening.sent, self.durable);
            if listening.sent == self.durable {
                break;
            }
        }
        if listening.sent < self.durable {
            let until = self.now + LOG_PAUSE;
            self.pauses.insert((until, conn));
            listening.paused_until = Some(until);
        } else if !listening.complete {
            listening.complete = true;
            self.presence.full().into_iter().for_each(|message| self.send(conn, message));
        }
        if let Some(c) = self.conns.get_mut(&conn) {
            c.listening = Some(listening);
        }
    }

    /// Goes on with a log that was paused.
    fn resume(&mut self, conn: ConnId) {
        let listening = self.conns.get_mut(&conn).and_then(|c| c.listening.as_mut());
        let Some(until) = listening.and_then(|listening| listening.paused_until.take()) else { return };
        self.pauses.remove(&(until, conn));
        self.send_log(conn);
    }

    /// Sends a node that was revoked the log up to its Revoke.
    fn send_farewell(&mut self, conn: ConnId, common: usize, end: usize) {
        let mut sent = common;
        for _ in 0..LOG_WINDOW {
            if sent >= end {
                break;
            }
            sent = self.send_chunk(conn, sent, end);
        }
    }

    /// Sends one `Log` message of records `from..`, ending before `end` at the latest. Returns where it ended.
    fn send_chunk(&mut self, conn: ConnId, from: usize, end: usize) -> usize {
        let Some(ledger) = &self.ledger else { return end };
        let rest = ledger.log().get(from..end).unwrap_or_default();
        let mut room = MAX_MESSAGE - MESSAGE_FRAME;
        let fits = |record: &&SignedRecord| {
            let size = json_size(record);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        };
        let records: Vec<SignedRecord> = rest.iter().take(LOG_CHUNK).take_while(fits).cloned().collect();
        let upto = from + records.len();
        let head = ledger.head_after(upto).unwrap_or_default();
        let message = ToNode::Log { from: from as u64, records, head, end: upto == end };
        self.send(conn, message);
        upto
    }
}

fn founding_refused(at: usize, refusal: &Refusal) -> Refused {
    Refused::bad_record(format!("founding record {} of 4: {refusal}", at + 1))
}

/// The records of a proposal, if they fit into one message.
fn fitting(records: Vec<SignedRecord>) -> Result<Vec<SignedRecord>, Refused> {
    if records.iter().map(json_size).sum::<usize>() <= MAX_MESSAGE - MESSAGE_FRAME {
        Ok(records)
    } else {
        Err(Refused::bad_record("the chain of admins behind this invite is too long to be sent"))
    }
}

/// At most this many bytes of JSON: escaping at most doubles a payload, which is JSON itself.
fn json_size(record: &SignedRecord) -> usize {
    2 * record.payload.len() + 512
}

#[cfg(test)]
mod tests;

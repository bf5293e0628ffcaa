//! The coordinator: a mailbox that keeps signed records, hands them on, and says who is connected.
//!
//! What it accepts, every node would accept: it runs the same [`Ledger`]. It has no key that nodes believe, so all it can
//! do wrong is to hold things back. Its own work is order (one log, so that of two guests with one invite or one address
//! one comes first), durability (no answer before the record is stored) and limits.
//!
//! A record is admitted to the ledger at once and stored right after; until then nobody but later requests sees it. If the
//! store fails, the ledger goes back to what is stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::coord::io::{ConnId, Input, Output, why};
use crate::coord::limits::{Grain, Rate, SourceLimiter};
use crate::coord::presence::Presence;
use crate::coord::refusals::Refused;
use crate::coord::reservations::Reservations;
use crate::coord::writes::{InFlight, Write};
use crate::time::{Now, UnixSeconds};
use crate::trust::ledger::Ledger;
use crate::trust::record::Member;
use crate::wire::control::{MAX_OPEN, StunServer, ToCoordinator, ToNode};
use crate::wire::keys::{ControlKey, Digest32, WgKey};

mod adverts;
mod guests;
mod log;
mod storing;

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
    adverts: adverts::Adverts,
    reservations: Reservations,
    joins: SourceLimiter,
    /// The relay's budget is spent until then.
    relay_spent: Option<UnixSeconds>,
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
    /// Where everybody can reach the node, by its own word.
    open: Vec<SocketAddr>,
    /// When it has its full allowance of advertisements again.
    adverts_full_at: Now,
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
            adverts: adverts::Adverts::default(),
            reservations: Reservations::new(limits.reservation, limits.reservations),
            joins: SourceLimiter::new(limits.joins, Grain::HOST, limits.sources),
            relay_spent: None,
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
            Input::RelayBudget { spent, renewed } => self.relay_budget(spent, renewed),
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
        let mut news = self.presence.changes(self.now);
        news.extend(self.adverts.changes(self.now));
        for message in news {
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
        [deadline, pause, self.presence.due(), self.adverts.due()].into_iter().flatten().min()
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
        let conn_state = Conn {
            key,
            from,
            guest,
            spoke: false,
            deadline: Some(deadline),
            listening: None,
            open: Vec::new(),
            adverts_full_at: Now::ZERO,
        };
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
            ToCoordinator::OpenRelay { re } => (re, self.open_relay(conn, key, re).map(|()| None)),
            ToCoordinator::Locate { re, peer } => (re, self.locate(&key, re, &peer).map(Some)),
            ToCoordinator::Announce { re, open } => (re, self.announce(conn, &key, re, open).map(Some)),
            ToCoordinator::Advertise { re, advert } => (re, self.advertise(conn, &key, re, advert).map(Some)),
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

    /// Where a member's connection comes from, and where it says that everybody can reach it.
    fn locate(&self, key: &ControlKey, re: u64, peer: &WgKey) -> Result<ToNode, Refused> {
        self.expect_member(key)?;
        let conn = self.presence.connection(peer).and_then(|conn| self.conns.get(&conn));
        let open = conn.map(|c| c.open.clone()).unwrap_or_default();
        Ok(ToNode::Located { re, observed: conn.and_then(|c| c.from), open })
    }

    fn announce(
        &mut self,
        conn: ConnId,
        key: &ControlKey,
        re: u64,
        mut open: Vec<SocketAddr>,
    ) -> Result<ToNode, Refused> {
        self.expect_member(key)?;
        open.truncate(MAX_OPEN);
        if let Some(c) = self.conns.get_mut(&conn) {
            c.open = open;
        }
        Ok(ToNode::Published { re })
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

    // The relay.

    fn open_relay(&mut self, conn: ConnId, key: ControlKey, re: u64) -> Result<(), Refused> {
        let wg = self.expect_member(&key)?.wg;
        self.outputs.push_back(Output::OpenRelay { conn, re, wg });
        Ok(())
    }

    fn relay_budget(&mut self, spent: bool, renewed: UnixSeconds) {
        let before = std::mem::replace(&mut self.relay_spent, spent.then_some(renewed));
        if before.is_some() != spent {
            let listeners: Vec<ConnId> = self.listeners.iter().copied().collect();
            listeners.into_iter().for_each(|conn| self.send(conn, ToNode::RelayBudget { spent, renewed }));
        }
    }

    // Who is who.

    /// The member with this control key, by what is stored: a join or a removal that is still being written does not count.
    fn member(&self, key: &ControlKey) -> Option<&Member> {
        let ledger = self.ledger.as_ref()?;
        let member = ledger.by_control_ever(key)?;
        let stored = |at: usize| at < self.durable;
        let joined = ledger.member_position(&member.identity).is_some_and(stored);
        let removed = ledger.revoked_position(&member.identity).is_some_and(stored);
        (joined && !removed).then_some(member)
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
}

#[cfg(test)]
mod tests;

//! Rounds from a fresh port.
//!
//! A router whose own firewall accepts what nobody asked for takes the port pair of an early probe for its own, and keeps it
//! while anybody sends to it. A fresh port on both sides is not affected (nat.md, finding 3).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use crate::engine::io::{Output, PeerId, SocketId, Via};
use crate::engine::path::reflexive::Reflexive;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::stun::{self, Change, TransactionId};

/// A fresh port is there and seen by a STUN server within this time, or the round does without.
const PATIENCE: Duration = Duration::from_millis(500);

/// A port being prepared.
#[derive(Debug)]
pub(super) struct FreshPort {
    pub(super) peer: PeerId,
    pub(super) socket: SocketId,
    reflexive: Reflexive,
    until: Now,
}

impl Planner {
    /// Whether the peer's round waits for a fresh port; begins to prepare one.
    pub(super) fn awaits_fresh_port(&mut self, id: PeerId) -> bool {
        let wants = self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| t.agent.wants_fresh_port());
        if !wants {
            return false;
        }
        if let Some(fresh) = &self.fresh {
            if fresh.peer == id {
                return true;
            }
            // One at a time; this round does without.
            self.fresh_port_done(id, None);
            return false;
        }
        let servers: Vec<SocketAddr> = self.reflexive.servers().iter().copied().filter(SocketAddr::is_ipv4).collect();
        let socket = if servers.is_empty() { None } else { self.allocate_sockets(1, id).first().copied() };
        let Some(socket) = socket else {
            self.fresh_port_done(id, None);
            return false;
        };
        let mut reflexive = Reflexive::new();
        reflexive.set_servers(&servers);
        let until = self.now + PATIENCE;
        self.fresh = Some(FreshPort { peer: id, socket, reflexive, until });
        self.outputs.push_back(Output::OpenSockets(vec![socket]));
        self.timers.set(Why::Fresh, Some(until));
        true
    }

    /// The shell opened these.
    pub(super) fn fresh_port_opened(&mut self, opened: &[SocketId]) {
        let Some(fresh) = self.fresh.as_mut().filter(|f| opened.contains(&f.socket)) else { return };
        let mut questions = VecDeque::new();
        fresh.reflexive.refresh(self.now, self.tx_prefix, &mut self.rng, &mut questions);
        self.ask_from_fresh_port(questions);
    }

    /// Requests to repeat, or enough waited.
    pub(super) fn fresh_due(&mut self) {
        let now = self.now;
        let Some(fresh) = self.fresh.as_mut() else { return };
        let mut questions = VecDeque::new();
        let done = fresh.reflexive.tick(now, &mut questions) || fresh.until <= now;
        self.ask_from_fresh_port(questions);
        if done {
            self.fresh_port_ready();
        }
    }

    /// True: it answers a question from the fresh port.
    pub(super) fn fresh_port_heard(&mut self, txid: &TransactionId, from: SocketAddr, mapped: SocketAddr) -> bool {
        let now = self.now;
        let Some(answered) = self.fresh.as_mut().and_then(|f| f.reflexive.answer(txid, from, mapped, now)) else {
            return false;
        };
        if answered.done {
            self.fresh_port_ready();
        }
        true
    }

    fn ask_from_fresh_port(&mut self, questions: VecDeque<crate::engine::path::reflexive::Question>) {
        let Some(FreshPort { socket, reflexive, until, .. }) = &self.fresh else { return };
        let (socket, next) = (*socket, reflexive.next_deadline().map_or(*until, |at| at.min(*until)));
        for question in questions {
            let via = Via::Udp { socket, remote: question.server };
            self.send(via, stun::binding_request(&question.txid, Change::default()));
        }
        self.timers.set(Why::Fresh, Some(next));
    }

    fn fresh_port_ready(&mut self) {
        let Some(FreshPort { peer, socket, reflexive, .. }) = self.fresh.take() else { return };
        self.timers.set(Why::Fresh, None);
        let seen = reflexive.addresses();
        let usable = (!seen.is_empty()).then_some((socket, seen));
        self.fresh_port_done(peer, usable);
        self.advance_path(peer);
    }

    fn fresh_port_done(&mut self, id: PeerId, port: Option<(SocketId, Vec<SocketAddr>)>) {
        let (socket, seen) = port.map_or((None, Vec::new()), |(socket, seen)| (Some(socket), seen));
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.agent.use_fresh_port(socket);
            talk.fresh_addresses = seen;
        }
        self.release_sockets(id);
    }
}

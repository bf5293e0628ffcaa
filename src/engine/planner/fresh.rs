//! Rounds from a fresh port, and what joined two networks before.
//!
//! A router whose own firewall accepts what nobody asked for takes the port pair of an early probe for its own, and keeps it
//! while anybody sends to it. A fresh port on both sides is not affected (nat.md, finding 3).

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::engine::io::{Output, PeerId, SocketId, Via};
use crate::engine::path::reflexive::Reflexive;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::stun::{self, Change, TransactionId};

/// A fresh port is there and seen by a STUN server within this time, or the round does without.
const PATIENCE: Duration = Duration::from_millis(500);
/// Pairs of networks remembered.
const REMEMBERED: usize = 64;

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

    // ---- memory --------------------------------------------------------------------------------------------------

    /// A direct path was found: remember at which attempt.
    pub(super) fn remember_success(&mut self, id: PeerId) {
        let Some(networks) = self.networks_of(id) else { return };
        let Some(attempt) = self.peer(id).and_then(|p| p.talk.as_deref()).map(|t| t.agent.worked_at()) else { return };
        self.memory.insert(networks, attempt, self.now);
    }

    /// The attempt that worked before between this network and the peer's, if any.
    pub(super) fn worked_before(&self, id: PeerId) -> Option<usize> {
        self.memory.0.get(&self.networks_of(id)?).map(|(attempt, _)| *attempt)
    }

    /// The outside addresses of both.
    fn networks_of(&self, id: PeerId) -> Option<(IpAddr, IpAddr)> {
        let mine = self.reflexive.addresses().into_iter().find(SocketAddr::is_ipv4)?;
        let theirs = self.peer(id)?.talk.as_deref()?.target?;
        Some((mine.ip(), theirs.ip()))
    }
}

/// For pairs of networks, by their outside addresses: which attempt joined them, and when that was learned.
#[derive(Debug, Default)]
pub(super) struct Memory(BTreeMap<(IpAddr, IpAddr), (usize, Now)>);

impl Memory {
    fn insert(&mut self, networks: (IpAddr, IpAddr), attempt: usize, now: Now) {
        self.0.insert(networks, (attempt, now));
        if self.0.len() > REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, (_, at))| *at).map(|(networks, _)| *networks);
            oldest.and_then(|networks| self.0.remove(&networks));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_too_many_networks_is_forgotten() {
        let mut memory = Memory::default();
        let pair = |n: u8| (IpAddr::from([203, 0, 113, 1]), IpAddr::from([198, 51, 100, n]));
        for n in 0..=64 {
            memory.insert(pair(n), usize::from(n), Now(u64::from(n)));
        }
        assert_eq!(memory.0.len(), REMEMBERED);
        assert!(!memory.0.contains_key(&pair(0)) && memory.0.contains_key(&pair(64)));
        memory.insert(pair(1), 7, Now(99));
        memory.insert(pair(200), 7, Now(100));
        assert!(memory.0.contains_key(&pair(1)) && !memory.0.contains_key(&pair(2)));
    }
}

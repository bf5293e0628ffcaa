//! The node's own addresses: what the machine says, what STUN servers see, what a router granted, and what that tells of the
//! NAT.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::engine::io::{LocalAddress, PeerId, PortMapping, Via};
use crate::engine::path::Leg;
use crate::engine::path::candidate::{open_among, usable};
use crate::engine::path::reason::{NatView, behaviour};
use crate::engine::path::reflexive::{FRESH, Question};
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::local::Netcheck;
use crate::wire::nat::{Mapper, UdpLifetime};
use crate::wire::stun::{self, Change};

/// What peers saw counts for so long; a kept one is asked every 15 s.
const OBSERVED_FOR: std::time::Duration = std::time::Duration::from_secs(60);
/// Peers whose word is kept.
const OBSERVERS: usize = 4;

/// Where a peer saw this node's probe come from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Observed {
    by: PeerId,
    addr: SocketAddr,
    at: Now,
}

impl Planner {
    pub(super) fn addresses_changed(&mut self, mut addresses: Vec<LocalAddress>) {
        addresses.sort();
        addresses.dedup();
        addresses.retain(|a| !self.mesh.iter().any(|net| net.contains(&a.ip)));
        if addresses == self.addresses {
            return;
        }
        let first = self.addresses.is_empty();
        self.addresses = addresses;
        if !first {
            tracing::info!("this machine's addresses changed; checking every path");
            self.network_changed();
        }
    }

    /// Addresses, NAT or the time itself changed: learn the reflexive addresses anew and verify every path.
    pub(super) fn network_changed(&mut self) {
        self.reflexive.forget();
        self.observed.clear();
        self.tcp.distrust();
        self.lifetime_found(None);
        self.ask_stun();
        let ids: Vec<PeerId> = self.talking().filter(|(_, t)| t.is_wanted(self.now)).map(|(id, _)| id).collect();
        for id in ids {
            self.with_agent(id, |agent, _, cx| agent.network_changed(cx));
        }
    }

    pub(super) fn stun_servers_changed(&mut self, servers: &[SocketAddr]) {
        self.reflexive.set_servers(servers);
        if !self.reflexive.is_fresh(self.now) {
            self.ask_stun();
        }
    }

    pub(super) fn net_report(&mut self, report: Box<Netcheck>) {
        self.politeness.nat_depth(report.nat_depth);
        self.report = Some(report);
        self.refresh_nat_view();
    }

    /// Paths are kept alive often enough for it from now on, and peers hear of it with the next call or answer.
    pub(super) fn lifetime_found(&mut self, lifetime: Option<UdpLifetime>) {
        if lifetime == self.lifetime {
            return;
        }
        self.lifetime = lifetime;
        let ids: Vec<PeerId> = self.talking().map(|(id, _)| id).collect();
        for id in ids {
            self.with_agent(id, |agent, _, _| agent.own_lifetime(lifetime.map(|l| l.at_least_s)));
        }
    }

    /// What was found out of how long the NAT keeps an idle mapping.
    #[must_use]
    pub const fn udp_lifetime(&self) -> Option<UdpLifetime> {
        self.lifetime
    }

    pub(super) fn ask_stun(&mut self) {
        let mut questions = VecDeque::new();
        self.reflexive.refresh(self.now, self.tx_prefix, &mut self.rng, &mut questions);
        self.send_questions(questions);
    }

    pub(super) fn stun_due(&mut self) {
        let mut questions = VecDeque::new();
        let done = self.reflexive.tick(self.now, &mut questions);
        self.send_questions(questions);
        if done {
            self.stun_finished(false);
        }
    }

    /// Reflexive addresses are about to go stale; somebody in use needs them fresh.
    pub(super) fn stun_stale(&mut self) {
        self.ask_stun();
        self.keep_stun_fresh();
    }

    /// While any peer is in use: ask again before the answer is too old. A NAT that moved shows here.
    pub(super) fn keep_stun_fresh(&mut self) {
        let in_use = self.talking().any(|(_, t)| t.is_wanted(self.now));
        let next = (in_use && self.reflexive.has_servers()).then(|| self.now + FRESH * 9 / 10);
        self.timers.set(Why::StunFresh, next);
    }

    fn send_questions(&mut self, questions: VecDeque<Question>) {
        for question in questions {
            let bytes = stun::binding_request(&question.txid, Change::default());
            self.send(Via::Udp { socket: question.socket(), remote: question.server }, bytes);
        }
        let next = self.reflexive.next_deadline();
        self.timers.set(Why::Stun, next);
    }

    /// True: it was the answer to a question of ours.
    pub(super) fn handle_stun_answer(&mut self, from: SocketAddr, bytes: &[u8]) -> bool {
        let Ok(response) = stun::decode_binding_response(bytes) else { return false };
        if self.heavy_heard_stun(&response.txid, response.mapped)
            || self.fresh_port_heard(&response.txid, from, response.mapped)
        {
            return true;
        }
        let Some(answered) = self.reflexive.answer(&response.txid, from, response.mapped, self.now) else {
            return false;
        };
        let next = self.reflexive.next_deadline();
        self.timers.set(Why::Stun, next);
        if answered.changed {
            tracing::info!("the NAT gave this node another address; checking every path");
        }
        if answered.done {
            self.stun_finished(answered.changed);
        } else if answered.changed {
            self.verify_paths();
        }
        self.tell_new_candidates();
        self.hurry_awaiting();
        true
    }

    /// A peer says where it saw our probe come from. That counts while the coordinator's STUN servers are gone.
    pub(super) fn was_observed(&mut self, by: PeerId, leg: Leg, addr: SocketAddr) {
        let at = self.now;
        let main = leg == Leg::main(leg.remote) && addr.is_ipv4() == leg.remote.is_ipv4();
        if self.control.connected || !main || !usable(&addr, &self.mesh) || self.is_own(&addr) {
            return;
        }
        let known = self.observed.iter().any(|seen| seen.addr == addr && at.since(seen.at) < OBSERVED_FOR);
        self.observed.retain(|seen| seen.by != by && at.since(seen.at) < OBSERVED_FOR);
        if self.observed.len() >= OBSERVERS {
            self.observed.remove(0);
        }
        self.observed.push(Observed { by, addr, at });
        if !known {
            self.tell_new_candidates();
        }
    }

    /// Where this node is seen from outside: by STUN servers, and without a coordinator by peers.
    pub(super) fn outside_addresses(&self) -> Vec<SocketAddr> {
        let mut addresses = self.reflexive.addresses();
        let counts = |seen: &&Observed| !self.control.connected && self.now.since(seen.at) < OBSERVED_FOR;
        for seen in self.observed.iter().filter(counts) {
            if !addresses.contains(&seen.addr) {
                addresses.push(seen.addr);
            }
        }
        addresses
    }

    /// Calls and answers wait for STUN no longer than it is likely to tell more.
    pub(super) fn hurry_awaiting(&mut self) {
        if let Some(at) = self.reflexive.enough_at() {
            self.awaiting_stun.values_mut().for_each(|until| *until = (*until).min(at));
        }
        self.schedule_awaiting();
    }

    /// Peers that are being looked for without an address that is known by now are called (again).
    fn tell_new_candidates(&mut self) {
        let known = self.candidates();
        let ignorant: Vec<PeerId> = self
            .talking()
            .filter(|(_, t)| t.is_wanted(self.now) && !t.told.is_empty() && !t.agent.waits_for_candidates())
            .filter(|(_, t)| known.iter().any(|c| !t.told.contains(&c.addr)))
            .map(|(id, _)| id)
            .collect();
        for id in ignorant {
            self.with_agent(id, |agent, _, _| agent.candidates_grew());
        }
    }

    /// A datagram of ours cannot be sent at all, for want of an address of its family or of a route.
    pub(super) fn send_failed(&mut self, via: &Via) {
        tracing::debug!(?via, "a datagram could not be sent");
        if let Via::Udp { remote, .. } = via
            && self.reflexive.unreachable(*remote, self.now)
        {
            let next = self.reflexive.next_deadline();
            self.timers.set(Why::Stun, next);
            self.stun_finished(false);
        }
    }

    fn stun_finished(&mut self, changed: bool) {
        self.refresh_nat_view();
        if changed {
            self.verify_paths();
        }
        self.stop_awaiting_stun(true);
    }

    fn verify_paths(&mut self) {
        let ids: Vec<PeerId> = self.talking().filter(|(_, t)| t.is_wanted(self.now)).map(|(id, _)| id).collect();
        for id in ids {
            self.with_agent(id, |agent, _, cx| agent.network_changed(cx));
        }
    }

    /// Calls and answers that waited for STUN go out: all of them, or those that waited long enough.
    pub(super) fn stop_awaiting_stun(&mut self, all: bool) {
        let now = self.now;
        let ready: Vec<PeerId> =
            self.awaiting_stun.iter().filter(|(_, until)| all || **until <= now).map(|(id, _)| *id).collect();
        for id in ready {
            self.awaiting_stun.remove(&id);
            self.with_agent(id, |agent, _, cx| agent.candidates_ready(cx));
        }
        self.schedule_awaiting();
    }

    pub(super) fn schedule_awaiting(&mut self) {
        let next = self.awaiting_stun.values().min().copied();
        self.timers.set(Why::AwaitingStun, next);
    }

    /// What this node knows of its NAT: the full report where there is one, else what two servers seen differently tell.
    fn refresh_nat_view(&mut self) {
        // The STUN servers are the coordinator's: when it is gone their silence says nothing of UDP.
        let udp = self.reflexive.udp_works().filter(|works| *works || self.control.connected);
        let mut view = NatView { udp, ..NatView::default() };
        if let Some(report) = &self.report {
            view.mapping.clone_from(&report.mapping);
            view.filtering.clone_from(&report.filtering);
            view.udp = view.udp.or(Some(report.udp));
            view.ports = report.port_model;
        }
        match self.reflexive.mapping_varies() {
            // The data socket's own evidence wins over the report's, which came from another socket.
            Some(true) if view.mapping.as_deref().is_none_or(|m| m == behaviour::ENDPOINT_INDEPENDENT) => {
                view.mapping = Some(behaviour::ADDRESS_AND_PORT_DEPENDENT.to_owned());
            }
            Some(false) if view.mapping.is_none() => view.mapping = Some(behaviour::ENDPOINT_INDEPENDENT.to_owned()),
            _ => {}
        }
        let changed = view != self.nat;
        if changed {
            let lost_udp = view.udp == Some(false) && self.nat.udp != Some(false) && self.politeness.limits.tcp;
            self.nat = view;
            let ids: Vec<PeerId> = self.talking().map(|(id, _)| id).collect();
            for id in ids {
                self.with_agent(id, |agent, _, cx| {
                    agent.profile_changed(cx.now);
                    // A round under way cannot end well, and one by TCP can.
                    if lost_udp {
                        agent.candidates_grew();
                    }
                });
            }
        }
        self.announce();
    }

    /// Where everybody can reach this node, as far as it knows.
    pub(super) fn open_addresses(&self) -> Vec<SocketAddr> {
        open_among(&self.candidates(), &self.nat)
    }

    /// Whether an address may be a peer's at all: usable, of a family we have a socket for, and not our own.
    pub(super) fn may_be_a_peer_s(&self, addr: &SocketAddr) -> bool {
        usable(addr, &self.mesh) && self.has_socket_for(addr) && !self.is_own(addr)
    }

    /// Whether a TCP connection to this address may be made: usable, of a family that we have, and not to ourselves.
    pub(super) fn may_be_dialed(&self, addr: &SocketAddr) -> bool {
        usable(addr, &self.mesh) && self.has_socket_for(addr) && !self.addresses.iter().any(|a| a.ip == addr.ip())
    }

    /// A router granted, renewed or withdrew a port mapping.
    pub(super) fn port_mapped(&mut self, mapping: Option<PortMapping>) {
        self.mapper = if mapping.is_some() { Mapper::Found } else { Mapper::Absent };
        if mapping != self.port_mapping {
            self.port_mapping = mapping;
            self.announce();
            self.tell_new_candidates();
        }
    }

    fn has_socket_for(&self, addr: &SocketAddr) -> bool {
        if addr.is_ipv4() { self.port_v4.is_some() } else { self.port_v6.is_some() }
    }

    fn is_own(&self, addr: &SocketAddr) -> bool {
        let port = if addr.is_ipv4() { self.port_v4 } else { self.port_v6 };
        port == Some(addr.port()) && self.addresses.iter().any(|a| a.ip == addr.ip())
    }
}

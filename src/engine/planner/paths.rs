//! Candidates, rounds and probes: the planner's side of the path agents.

use std::net::SocketAddr;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use crate::engine::drops::Drop;
use crate::engine::io::{Event, Output, Path, PeerId, Update, Via};
use crate::engine::packet::DATA_OVERHEAD;
use crate::engine::path::Leg;
use crate::engine::path::agent::{Action, Context, HeardAnswer, Offer, PathAgent};
use crate::engine::path::candidate::{families, gather, on_link, open_among, usable};
use crate::engine::path::mtu::BASE;
use crate::engine::path::reason::{Evidence, NatView, hopeless};
use crate::engine::peer::Actions;
use crate::engine::planner::limits::Trouble;
use crate::engine::planner::sessions::IN_USE_COMMAND;
use crate::engine::planner::{Planner, Why};
use crate::wire::nat::Mapper;
use crate::wire::probe::{self, Candidate, CandidateKind, MessageKind, PeerMessage, Punch};
use crate::wire::stun;

/// UDP payload of a probe of data size: an inner packet of 1,280 bytes with WireGuard's 32. Answers are never longer.
pub(super) const FULL_SIZE: usize = BASE as usize + DATA_OVERHEAD;
/// Shorter requests are answered shortly, others at their own length.
const LONG: usize = 512;
/// A call or an answer waits this long for fresh reflexive addresses, then goes out with what is known.
const STUN_PATIENCE: Duration = Duration::from_millis(250);

/// A round trip through the relay that is believed.
const LONGEST_ROUND_TRIP: Duration = Duration::from_secs(2);

impl Planner {
    // ---- driving agents ------------------------------------------------------------------------------------------

    /// Lets the peer's agent do something and carries out what it decides.
    pub(super) fn with_agent<T>(
        &mut self,
        id: PeerId,
        act: impl FnOnce(&mut PathAgent, &dyn Fn(&SocketAddr) -> bool, &mut Context<'_, StdRng>) -> T,
    ) -> Option<T> {
        let now = self.now;
        let tx_prefix = self.tx_prefix;
        let addresses = &self.addresses;
        let talk = self.peers.get_mut(id.0 as usize).and_then(Option::as_mut)?.talk.as_deref_mut()?;
        let mut actions = Actions::new();
        let mut cx = Context { now, rng: &mut self.rng, tx_prefix, actions: &mut actions };
        let result = act(&mut talk.agent, &|addr| on_link(addr, addresses), &mut cx);
        for action in actions {
            self.carry_out(id, action);
        }
        self.release_sockets(id);
        self.advance_path(id);
        Some(result)
    }

    /// Lets a waiting call or answer go out if it can, and sets the agent's timer.
    pub(super) fn advance_path(&mut self, id: PeerId) {
        let now = self.now;
        let Some(peer) = self.peer(id) else { return };
        let Some(talk) = peer.talk.as_deref() else { return };
        if talk.agent.waits_for_candidates() {
            if self.awaits_fresh_port(id) || self.awaits_tcp(id) {
                return;
            }
            let fresh = self.reflexive.is_fresh(now) && !self.reflexive.is_asking();
            let enough = self.reflexive.enough_at().is_some_and(|at| at <= now);
            if fresh || enough || self.reflexive.is_usable() {
                if !fresh {
                    // If the answers differ from what is told now, the peer is called again.
                    self.ask_stun();
                }
                self.awaiting_stun.remove(&id);
                self.with_agent(id, |agent, _, cx| agent.candidates_ready(cx));
            } else {
                self.awaiting_stun.entry(id).or_insert(now + STUN_PATIENCE);
                self.ask_stun();
                self.hurry_awaiting();
            }
            return;
        }
        let last_tx = peer.stamps().last_tx;
        let next = talk.agent.next_deadline(last_tx, now);
        // Never in the past: an agent that has nothing to do now is looked at again a little later.
        self.timers.set(Why::Path(id), next.map(|at| at.max(now + Duration::from_millis(1))));
    }

    pub(super) fn path_due(&mut self, id: PeerId) {
        let Some(stamps) = self.peer(id).map(|p| p.stamps()) else { return };
        self.with_agent(id, |agent, _, cx| agent.tick(stamps, cx));
        let theirs = self.peer(id).and_then(|p| p.talk.as_deref()).map(|t| t.agent.theirs.clone());
        let ruled_out = |theirs: &NatView| {
            hopeless(&self.nat, theirs) && !self.could_punch_heavily(theirs) && !self.wants_tcp(theirs)
        };
        if theirs.is_some_and(|theirs| ruled_out(&theirs)) {
            self.with_agent(id, |agent, _, cx| agent.is_hopeless(cx.now));
        }
    }

    fn carry_out(&mut self, id: PeerId, action: Action) {
        match action {
            Action::Probe { txid, to, size } => {
                if !self.may_probe(id, to) {
                    self.drops.count(Drop::Polite);
                    return;
                }
                let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
                let pad = size.map(|size| usize::from(size) + DATA_OVERHEAD);
                let bytes = probe::encode_request(&talk.keys, &txid, pad);
                self.send(to.via(), bytes);
            }
            Action::Prime { txid, to } => {
                let Some(ttl) = self.politeness.limits.prime_ttl else { return };
                let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
                let bytes = probe::encode_request(&talk.keys, &txid, None);
                self.politeness.sent(to, self.now);
                self.outputs.push_back(Output::Prime { via: to.via(), bytes, ttl });
            }
            Action::Dial => self.dial_tcp(id),
            Action::Tell { kind, round, t, echo, role } => {
                self.tell(id, kind, round, t, echo, role.map(|role| Punch { role, ..Punch::default() }));
            }
            Action::Select(path) => self.select(id, path, Duration::ZERO),
            Action::Turn { leg, lead } => self.select(id, leg.direct(), lead),
            Action::Mtu { size, settled } => {
                self.update(Update::Mtu { peer: id, size, settled });
                if size > self.interface_mtu {
                    self.interface_mtu = size;
                    self.outputs.push_back(Output::InterfaceMtu(size));
                }
            }
        }
    }

    /// The system does not send datagrams of this length this way.
    pub(super) fn too_long(&mut self, via: &Via, len: usize) {
        let Some(leg) = Leg::of(via) else { return };
        let size = u16::try_from(len.saturating_sub(DATA_OVERHEAD)).unwrap_or(u16::MAX);
        let ids: Vec<PeerId> = self.talking().filter(|(_, t)| t.agent.uses(leg)).map(|(id, _)| id).collect();
        for id in ids {
            self.with_agent(id, |agent, _, cx| agent.size_refused(leg, size, cx));
        }
    }

    /// Politeness: the caps of the whole node, and a small one for addresses that only the peer says are its own.
    fn may_probe(&mut self, id: PeerId, to: Leg) -> bool {
        let now = self.now;
        let ip = to.remote.ip();
        let may = self.politeness.allowance(now) > 0
            && (to.socket.is_stream()
                || self.is_vouched(id, ip)
                || self.politeness.may_trouble(ip, Trouble::Probe, now));
        if may {
            self.politeness.sent(to, now);
        }
        may
    }

    /// `lead`: how much sooner packets arrive this way than those that went before.
    pub(super) fn select(&mut self, id: PeerId, path: Path, lead: Duration) {
        let now = self.now;
        let path = if path == Path::Relay { self.without_direct_path(id) } else { path };
        let Some(peer) = self.peer_mut(id) else { return };
        let key = peer.wg;
        let Some(talk) = peer.talk.as_deref_mut() else { return };
        if talk.path == path {
            return;
        }
        // Doubt about a path is not a change of path.
        let is_change = Leg::of_path(&talk.path) != Leg::of_path(&path);
        let was = std::mem::replace(&mut talk.path, path);
        if is_change {
            let lasted = now.since(talk.path_since);
            talk.before = (was != Path::None).then(|| (Leg::of_path(&was).map(|leg| leg.remote), lasted));
            talk.path_since = now;
        }
        match Leg::of_path(&path) {
            // What another socket reached is of no use without it.
            Some(leg) if leg == Leg::main(leg.remote) => {
                self.last_endpoints.insert(key, leg.remote);
            }
            Some(_) => {}
            // Perhaps it was lost because our NAT forgot us: what it showed before may be wrong now.
            None if is_change => self.reflexive.distrust(),
            None => {}
        }
        let left_direct = matches!(was, Path::Direct { .. }) && !matches!(path, Path::Direct { .. });
        self.update(Update::Path { peer: id, path, lead });
        self.tcp_path_changed(id, &was, &path);
        if left_direct {
            self.ping_again(id);
        }
        if is_change {
            let is_direct = Leg::of_path(&path).is_some();
            self.outputs.push_back(Output::Event(Event::PathChanged { peer: id, key, path }));
            // What worked by TCP says nothing of UDP.
            if Leg::of_path(&path).is_some_and(|leg| !leg.socket.is_stream()) {
                self.remember_success(id);
            }
            if was == Path::None {
                // A handshake that found no way out need not wait for its next repetition.
                self.repeat_handshake(id);
                self.compare_soon(id);
            }
            self.path_changed(id, path);
            if is_direct && self.heavy.as_ref().is_some_and(|h| h.peer == id) {
                self.stop_heavy();
            }
            self.release_sockets(id);
        }
    }

    /// How packets go to a peer without a direct path. With the relay link down they wait for a way.
    pub(super) fn without_direct_path(&self, id: PeerId) -> Path {
        if self.relay_up || self.carrier_of(id).is_some() { Path::Relay } else { Path::None }
    }

    /// The relay link came or went: so did the way to every peer without a direct path.
    pub(super) fn reselect_relay(&mut self) {
        let relayed = |path: &Path| matches!(path, Path::Relay | Path::None);
        let ids: Vec<PeerId> = self.talking().filter(|(_, t)| relayed(&t.path)).map(|(id, _)| id).collect();
        for id in ids {
            self.select(id, Path::Relay, Duration::ZERO);
        }
    }

    /// Seals a message to the peer and sends it through the relay.
    pub(super) fn tell(
        &mut self,
        id: PeerId,
        kind: MessageKind,
        round: u32,
        t: Option<u64>,
        echo: Option<u64>,
        punch: Option<Punch>,
    ) {
        let introduces = matches!(kind, MessageKind::Call | MessageKind::Answer);
        let fresh = self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| t.agent.fresh_port().is_some());
        let candidates = if introduces { self.candidates_for(id) } else { Vec::new() };
        let tcp = if introduces { self.tcp_candidates_for(id) } else { Vec::new() };
        if introduces {
            self.locate(id);
        }
        if introduces && let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.told = candidates.iter().map(|c| c.addr).collect();
            talk.told_tcp = !tcp.is_empty();
        }
        let seen = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.agent.seen());
        let number = self.next_number;
        self.next_number += 1;
        let message = PeerMessage {
            v: crate::wire::version::PEER,
            n: number,
            kind,
            round,
            t,
            echo,
            candidates,
            mapping: self.nat.mapping.clone(),
            filtering: self.nat.filtering.clone(),
            udp: self.nat.udp,
            ports: self.nat.ports,
            port: self.port_v4.filter(|_| introduces),
            mapper: if introduces { self.mapper } else { Mapper::Unknown },
            seen: seen.filter(|_| introduces),
            primed: (kind == MessageKind::Answer && self.politeness.limits.prime_ttl.is_some()).then_some(true),
            fresh: (kind == MessageKind::Call && fresh).then_some(true),
            tcp,
            lifetime: self.lifetime.map(|l| l.at_least_s).filter(|_| introduces),
            punch,
        };
        let mut nonce = [0u8; 24];
        self.rng.fill_bytes(&mut nonce);
        let Some(peer) = self.peer(id) else { return };
        let Some(talk) = peer.talk.as_deref() else { return };
        let via = Via::Relay { peer: peer.wg };
        let bytes = probe::seal(&talk.keys, &message, nonce);
        if !self.relay_leads_to(id) && self.carrier_of(id).is_none() {
            self.pass_on(id, &bytes);
        }
        self.send(via, bytes);
    }

    pub(super) fn candidates(&self) -> Vec<Candidate> {
        gather(
            self.port_mapping.as_ref().map(|m| m.external),
            &self.outside_addresses(),
            &self.addresses,
            self.port_v4,
            self.port_v6,
            &self.mesh,
        )
    }

    /// The same as the peer is told them: with a round's fresh port in place of the main one.
    fn candidates_for(&self, id: PeerId) -> Vec<Candidate> {
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        let Some(talk) = talk.filter(|t| t.agent.fresh_port().is_some()) else { return self.candidates() };
        let v6 = self.outside_addresses().into_iter().filter(SocketAddr::is_ipv6);
        let reflexive: Vec<SocketAddr> = talk.fresh_addresses.iter().copied().chain(v6).collect();
        let mapped = self.port_mapping.as_ref().map(|m| m.external);
        gather(mapped, &reflexive, &self.addresses, self.port_v4, self.port_v6, &self.mesh)
    }

    // ---- what comes from peers -----------------------------------------------------------------------------------

    /// A sealed message: candidates and the steps of a round.
    pub(super) fn handle_sealed(&mut self, via: &Via, bytes: &[u8]) {
        let id = match via {
            Via::Relay { peer } => self.by_wg.get(peer).copied(),
            Via::Udp { .. } => probe::sealed_name(bytes).and_then(|name| self.by_name.get(&name).copied()),
        };
        let Some(id) = id.filter(|id| self.ensure_talk(*id)) else {
            self.drops.count(Drop::UnknownPeer);
            return;
        };
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let message = match probe::open(&talk.keys, bytes) {
            Ok(message) if message.n > talk.heard_number => message,
            Ok(_) | Err(_) => {
                self.drops.count(Drop::BadSealed);
                return;
            }
        };
        talk.heard_number = message.n;
        self.speaks(id);
        if matches!(message.kind, MessageKind::Call | MessageKind::Answer) {
            let theirs = NatView {
                mapping: message.mapping.clone(),
                filtering: message.filtering.clone(),
                udp: message.udp,
                ports: message.ports,
            };
            let open = open_among(&message.candidates, &theirs);
            let usable = |addr: &SocketAddr| self.may_be_a_peer_s(addr);
            let offers: Vec<Offer> = message
                .candidates
                .iter()
                .map(|c| c.addr)
                .filter(usable)
                .map(|addr| Offer { addr, near: on_link(&addr, &self.addresses), open: open.contains(&addr) })
                .collect();
            let seen = |c: &&Candidate| c.kind == CandidateKind::Reflexive && c.addr.is_ipv4() && usable(&c.addr);
            let target = message.candidates.iter().find(seen).map(|c| c.addr);
            let tcp: Vec<SocketAddr> = message.tcp.iter().copied().filter(|addr| self.may_be_dialed(addr)).collect();
            let outlook = hopeless(&self.nat, &theirs);
            let (v4, v6) = families(&message.candidates);
            let evidence =
                Evidence { port: message.port, mapper: message.mapper, seen: message.seen, v4: Some(v4), v6: Some(v6) };
            if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
                talk.target = target;
                talk.tcp = tcp;
                talk.open = !open.is_empty();
            }
            self.with_agent(id, |agent, _, _| {
                agent.heard_candidates(&offers, theirs);
                agent.their_evidence = evidence;
                agent.their_lifetime(message.lifetime);
                agent.set_outlook(outlook);
            });
        }
        match message.kind {
            MessageKind::Call => {
                self.with_agent(id, |agent, _, cx| {
                    agent.heard_call(message.round, message.t, message.fresh == Some(true), cx)
                });
                self.want(id, IN_USE_COMMAND);
            }
            MessageKind::Answer => self.heard_answer(id, &message),
            MessageKind::Go => {
                let rtt = message.t.map(|t| Duration::from_micros(t).min(LONGEST_ROUND_TRIP));
                let awaited = self.with_agent(id, |agent, _, cx| agent.heard_go(message.round, rtt, cx));
                if let (Some(true), Some(punch)) = (awaited, message.punch) {
                    let rtt = rtt.unwrap_or_default();
                    self.asked_to_punch(id, punch.role, rtt);
                }
            }
            MessageKind::Ports => {
                if let Some(punch) = message.punch {
                    self.heard_punch(id, message.round, punch);
                }
            }
        }
    }

    fn heard_answer(&mut self, id: PeerId, message: &PeerMessage) {
        if self.must_call_again(id) {
            self.with_agent(id, |agent, _, _| agent.call_again());
            return;
        }
        let theirs = self.peer(id).and_then(|p| p.talk.as_deref()).map(|t| t.agent.theirs.clone()).unwrap_or_default();
        let role = self.role_towards(id, &theirs);
        let answer = HeardAnswer {
            round: message.round,
            held: message.t,
            echo: message.echo,
            // Its packets that died on the way have opened its NAT for UDP only.
            opened: message.primed == Some(true) && !self.wants_tcp(&theirs),
        };
        let heard = self.with_agent(id, |agent, _, cx| {
            agent.heard_answer(&answer, role, cx).then(|| agent.relay_rtt.unwrap_or_default())
        });
        if let (Some(Some(rtt)), Some(role)) = (heard, role) {
            self.start_heavy(id, role, true, rtt);
        }
    }

    /// STUN: an answer of a server, a probe of a peer, or a peer's answer to a probe of ours.
    pub(super) fn handle_stun(&mut self, via: &Via, bytes: &[u8]) {
        if !probe::is_response(bytes) {
            return self.handle_probe(via, bytes);
        }
        let Some(txid) = stun::transaction_id(bytes) else { return };
        if self.pong(&txid, via, bytes) || self.measured(&txid, bytes) {
            return;
        }
        let Via::Udp { remote, .. } = via else {
            self.drops.count(Drop::UnexpectedStun);
            return;
        };
        if self.handle_stun_answer(*remote, bytes) || self.heavy_answered(&txid, via, bytes) {
            return;
        }
        // Which peer's probe it answers is told by the address it went to.
        let now_talking: Vec<PeerId> = self.talking().map(|(id, _)| id).collect();
        for id in now_talking {
            let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { continue };
            if !talk.agent.sent(&txid) {
                continue;
            }
            match probe::decode_response(&talk.keys, bytes) {
                Ok(response) => {
                    let Some(from) = Leg::of(via).filter(|leg| self.may_come_by(id, leg.socket)) else { return };
                    self.speaks(id);
                    self.was_observed(id, from, response.observed);
                    let ours =
                        self.with_agent(id, |agent, _, cx| agent.heard_answer_to_probe(&txid, from, response.len, cx));
                    if ours == Some(true) {
                        self.answered_from(id, remote.ip());
                    }
                }
                Err(_) => self.drops.count(Drop::BadProbe),
            }
            return;
        }
        self.drops.count(Drop::UnexpectedStun);
    }

    fn handle_probe(&mut self, via: &Via, bytes: &[u8]) {
        let now = self.now;
        let id = match via {
            Via::Relay { peer } => self.by_wg.get(peer).copied(),
            Via::Udp { .. } => probe::name_of(bytes).and_then(|name| self.by_name.get(&name).copied()),
        };
        let Some(id) = id.filter(|id| self.ensure_talk(*id)) else {
            self.drops.count(Drop::UnknownProbe);
            return;
        };
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let Ok(request) = probe::decode_request(&talk.keys, bytes) else {
            self.drops.count(Drop::BadProbe);
            return;
        };
        let may_answer = talk.agent.may_answer(now);
        self.speaks(id);
        if !may_answer {
            self.drops.count(Drop::ProbeLimit);
            return;
        }
        if Leg::of(via).is_some_and(|leg| !self.may_come_by(id, leg.socket)) {
            self.drops.count(Drop::BadProbe);
            return;
        }
        let full_size = request.len >= FULL_SIZE;
        let pad = (request.len >= LONG).then_some(request.len.min(FULL_SIZE));
        let observed = match via {
            Via::Udp { remote, .. } => *remote,
            Via::Relay { .. } => SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        // Whoever asks may have lied about where it is: an address nobody vouched for is answered as sparingly as probed. A TCP
        // connection leads where it says.
        if let Via::Udp { remote, socket } = via
            && !socket.is_stream()
            && !self.is_vouched(id, remote.ip())
            && !self.politeness.may_trouble(remote.ip(), Trouble::Answer, now)
        {
            self.drops.count(Drop::Polite);
            return;
        }
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
        let answer = probe::encode_response(&talk.keys, &request.txid, observed, pad);
        self.send(*via, answer);
        if let Some(from) = Leg::of(via) {
            self.with_agent(id, |agent, near, cx| agent.heard_probe(from, near(&from.remote), full_size, cx));
            self.heavy_reached(id);
        }
    }

    /// Authenticated data from another address than the peer's current one.
    pub(super) fn roamed(&mut self, id: PeerId, via: &Via) {
        if let Via::Udp { remote, .. } = via
            && usable(remote, &self.mesh)
        {
            let Some(from) = Leg::of(via) else { return };
            self.with_agent(id, |agent, near, cx| agent.heard_data_from(from, near(remote), cx));
        }
    }
}

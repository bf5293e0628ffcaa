//! Punches with many sockets or ports: the planner's side. One at a time, within [`Limits`], and only towards an address
//! that somebody besides the peer says is the peer's.
//!
//! [`Limits`]: crate::engine::planner::Limits

use std::collections::btree_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::engine::drops::Drop;
use crate::engine::io::{Output, PeerId, SocketId, Via};
use crate::engine::path::Leg;
use crate::engine::path::heavy::{Heavy, Setting, Shot, ShotKind};
use crate::engine::path::reason::NatView;
use crate::engine::path::technique::{my_role, sockets_for};
use crate::engine::planner::{Planner, Why};
use crate::wire::probe::{self, MessageKind, Punch, Role};
use crate::wire::stun::{self, Change, TransactionId};

/// The punch under way.
#[derive(Debug)]
pub(super) struct HeavyPunch {
    pub(super) peer: PeerId,
    /// Of the calls it belongs to.
    round: u32,
    machine: Heavy,
    /// Sockets asked for.
    sockets: Vec<SocketId>,
}

impl Planner {
    /// Our part in a punch with many sockets or ports, if one has a chance and may be made now.
    pub(super) fn role_towards(&self, id: PeerId, theirs: &NatView) -> Option<Role> {
        my_role(&self.nat, theirs).filter(|role| self.may_play(id, *role))
    }

    /// Whether any such punch has a chance, now or later.
    pub(super) fn could_punch_heavily(&self, theirs: &NatView) -> bool {
        my_role(&self.nat, theirs)
            .is_some_and(|role| sockets_for(role, self.nat.ports) <= self.politeness.limits.extra_sockets)
    }

    fn may_play(&self, id: PeerId, role: Role) -> bool {
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return false };
        // Where one side lets everybody in, a plain punch comes first.
        if talk.agent.failures() == 0 && (talk.open || !self.open_addresses().is_empty()) {
            return false;
        }
        if !talk.agent.may_punch_heavily(self.now) {
            return false;
        }
        let needed = sockets_for(role, self.nat.ports);
        let is_free = self.heavy.as_ref().is_none_or(|h| h.peer == id);
        let known = !matches!(role, Role::Busy | Role::Unknown);
        let Some(target) = talk.target else { return false };
        let own = self.reflexive.addresses();
        // Two behind one NAT reach each other on its inside, or through it if it hairpins; more sockets change nothing.
        let elsewhere = !own.iter().any(|addr| addr.ip() == target.ip());
        known && is_free && elsewhere && needed <= self.sockets_left() && self.is_vouched(id, target.ip())
    }

    fn sockets_left(&self) -> u16 {
        let used = u16::try_from(self.extra.len()).unwrap_or(u16::MAX);
        self.politeness.limits.extra_sockets.saturating_sub(used)
    }

    fn target_of(&self, id: PeerId) -> Option<SocketAddr> {
        self.peer(id)?.talk.as_deref()?.target
    }

    /// Begins our part. `rtt`: to the peer and back through the relay.
    pub(super) fn start_heavy(&mut self, id: PeerId, role: Role, leads: bool, rtt: Duration) {
        if self.heavy.as_ref().is_some_and(|h| h.peer == id) {
            self.stop_heavy();
        }
        let Some(target) = self.target_of(id) else { return };
        let theirs = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.agent.theirs.ports);
        let setting = Setting {
            role,
            leads,
            mine: self.nat.ports,
            theirs,
            target,
            servers: self.reflexive.servers().iter().copied().filter(SocketAddr::is_ipv4).collect(),
            relay_one_way: rtt / 2,
        };
        let sockets = self.allocate_sockets(sockets_for(role, self.nat.ports), id);
        if !sockets.is_empty() {
            self.outputs.push_back(Output::OpenSockets(sockets.clone()));
        }
        tracing::debug!(peer = id.0, ?role, sockets = sockets.len(), "punching with many sockets or ports");
        let round = self.round_with(id);
        self.heavy = Some(HeavyPunch { peer: id, round, machine: Heavy::new(setting, self.now), sockets });
        self.with_agent(id, |agent, _, _| agent.heavy_began());
        self.schedule_heavy();
    }

    /// The peer's call to a heavy punch; `theirs` is its part.
    pub(super) fn asked_to_punch(&mut self, id: PeerId, theirs: Role, rtt: Duration) {
        let mine = theirs.counterpart();
        if self.may_play(id, mine) {
            self.start_heavy(id, mine, false, rtt);
        } else {
            self.tell_punch(id, Punch { role: Role::Busy, ..Punch::default() });
        }
    }

    /// What the peer learned for the punch under way.
    pub(super) fn heard_punch(&mut self, id: PeerId, round: u32, punch: Punch) {
        let now = self.now;
        // What an earlier punch learned was for other addresses.
        let Some(heavy) = self.heavy.as_mut().filter(|h| h.peer == id && h.round == round) else { return };
        if punch.role == Role::Busy {
            self.stop_heavy();
            return;
        }
        heavy.machine.heard_ports(punch, now, &mut self.rng);
        self.heavy_due();
    }

    /// The shell answered.
    pub(super) fn sockets_opened(&mut self, opened: &[SocketId]) {
        let now = self.now;
        self.fresh_port_opened(opened);
        let unasked: Vec<SocketId> = opened.iter().copied().filter(|s| !self.extra.contains_key(s)).collect();
        self.close(unasked);
        let Some(heavy) = self.heavy.as_mut() else { return };
        let mine: Vec<SocketId> = heavy.sockets.iter().copied().filter(|s| opened.contains(s)).collect();
        if heavy.sockets.is_empty() || (mine.is_empty() && !opened.is_empty()) {
            return; // not the answer to its question
        }
        heavy.machine.sockets_opened(&mine, now, &mut self.rng);
        self.heavy_due();
    }

    /// Something of the punch is due.
    pub(super) fn heavy_due(&mut self) {
        let now = self.now;
        let allowance = self.politeness.allowance(now);
        let Some(heavy) = self.heavy.as_mut() else { return };
        let id = heavy.peer;
        let shots = heavy.machine.fire(allowance, self.tx_prefix, &mut self.rng, now);
        for shot in shots {
            self.shoot(id, shot);
        }
        let tell = self.heavy.as_mut().and_then(|h| h.machine.poll_tell());
        if let Some(punch) = tell {
            self.tell_punch(id, punch);
        }
        if self.heavy.as_ref().is_some_and(|h| h.machine.is_over(now)) {
            self.stop_heavy();
        }
        self.schedule_heavy();
    }

    fn shoot(&mut self, id: PeerId, Shot { leg, txid, kind }: Shot) {
        self.politeness.sent(leg, self.now);
        if kind == ShotKind::Stun {
            return self.send(leg.via(), stun::binding_request(&txid, Change::default()));
        }
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.agent.count_shot();
        let bytes = probe::encode_request(&talk.keys, &txid, None);
        match self.politeness.limits.prime_ttl.filter(|_| kind == ShotKind::Opener) {
            Some(ttl) => self.outputs.push_back(Output::Prime { via: leg.via(), bytes, ttl }),
            None => self.send(leg.via(), bytes),
        }
    }

    /// True: the answer of a STUN server to the punch under way.
    pub(super) fn heavy_heard_stun(&mut self, txid: &TransactionId, mapped: SocketAddr) -> bool {
        let heard = self.heavy.as_mut().is_some_and(|h| h.machine.heard_stun(txid, mapped));
        if heard {
            self.heavy_due();
        }
        heard
    }

    /// True: it answers a probe of the punch under way, whether well or badly.
    pub(super) fn heavy_answered(&mut self, txid: &TransactionId, via: &Via, bytes: &[u8]) -> bool {
        let now = self.now;
        let Some(heavy) = self.heavy.as_mut().filter(|h| h.machine.sent(txid)) else { return false };
        let id = heavy.peer;
        let talk = self.peers.get(id.0 as usize).and_then(Option::as_ref).and_then(|p| p.talk.as_deref());
        let genuine = talk.is_some_and(|t| probe::decode_response(&t.keys, bytes).is_ok());
        let Some(from) = Leg::of(via).filter(|_| genuine) else {
            self.drops.count(Drop::BadProbe);
            return true;
        };
        if let Some(rtt) = heavy.machine.answered(txid, from, now) {
            self.answered_from(id, from.remote.ip());
            self.with_agent(id, |agent, _, cx| agent.heard_answer_to_heavy(from, rtt, cx));
        }
        true
    }

    /// The peer's probe came in: the punch may pause.
    pub(super) fn heavy_reached(&mut self, id: PeerId) {
        let now = self.now;
        if let Some(heavy) = self.heavy.as_mut().filter(|h| h.peer == id) {
            heavy.machine.reached(now);
            self.schedule_heavy();
        }
    }

    /// The punch is over, for better or worse.
    pub(super) fn stop_heavy(&mut self) {
        let Some(HeavyPunch { peer, .. }) = self.heavy.take() else { return };
        self.schedule_heavy();
        self.with_agent(peer, |agent, _, cx| agent.heavy_ended(cx.now));
        self.release_sockets(peer);
    }

    fn schedule_heavy(&mut self) {
        let (now, wait) = (self.now, self.politeness.wait());
        let next = self.heavy.as_ref().and_then(|h| h.machine.next_deadline(now, wait));
        self.timers.set(Why::Heavy, next);
    }

    fn tell_punch(&mut self, id: PeerId, punch: Punch) {
        // The call may have been repeated meanwhile; what was learned belongs to the one before.
        let of_punch = self.heavy.as_ref().filter(|h| h.peer == id && punch.role != Role::Busy).map(|h| h.round);
        let round = of_punch.unwrap_or_else(|| self.round_with(id));
        self.tell(id, MessageKind::Ports, round, None, None, Some(punch));
    }

    fn round_with(&self, id: PeerId) -> u32 {
        self.peer(id).and_then(|p| p.talk.as_deref()).map_or(0, |t| t.agent.round())
    }

    // ---- sockets -------------------------------------------------------------------------------------------------

    /// Numbers for so many sockets, or for none if there may not be so many.
    pub(super) fn allocate_sockets(&mut self, count: u16, id: PeerId) -> Vec<SocketId> {
        if count > self.sockets_left() {
            return Vec::new();
        }
        let mut out = Vec::new();
        while out.len() < usize::from(count) {
            self.next_socket += 1;
            if self.next_socket == SocketId::FIRST_STREAM {
                self.next_socket = SocketId::V6.0 + 1;
            }
            let socket = SocketId(self.next_socket);
            if let Entry::Vacant(free) = self.extra.entry(socket) {
                free.insert(id);
                out.push(socket);
            }
        }
        out
    }

    /// Closes the peer's sockets, but for the one in use, that of the round, and those of a punch under way.
    pub(super) fn release_sockets(&mut self, id: PeerId) {
        if self.extra.is_empty() || self.heavy.as_ref().is_some_and(|h| h.peer == id) {
            return;
        }
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        let in_use = [
            talk.and_then(|t| t.agent.direct()).map(|d| d.0.socket),
            talk.and_then(|t| t.agent.fresh_port()),
            self.fresh.as_ref().map(|f| f.socket),
        ];
        let lost = |(socket, owner): &(&SocketId, &PeerId)| **owner == id && !in_use.contains(&Some(**socket));
        let losers: Vec<SocketId> = self.extra.iter().filter(lost).map(|(s, _)| *s).collect();
        if losers.is_empty() {
            return;
        }
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.agent.forget_sockets(&losers);
        }
        for socket in &losers {
            self.extra.remove(socket);
        }
        self.close(losers);
    }

    fn close(&mut self, sockets: Vec<SocketId>) {
        if !sockets.is_empty() {
            self.outputs.push_back(Output::CloseSockets(sockets));
        }
    }

    // ---- whose address it is -------------------------------------------------------------------------------------

    /// Whether somebody besides the peer says that this address is the peer's: the coordinator sees its connection come from
    /// there, or it answered us there.
    pub(super) fn is_vouched(&self, id: PeerId, ip: IpAddr) -> bool {
        self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| {
            t.answered_from.contains(&ip) || t.located.as_ref().is_some_and(|(observed, _)| *observed == Some(ip))
        })
    }

    /// An answer to a probe of ours came from this address of the peer.
    pub(super) fn answered_from(&mut self, id: PeerId, ip: IpAddr) {
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut())
            && !talk.answered_from.contains(&ip)
        {
            talk.answered_from.truncate(ADDRESSES_KEPT - 1);
            talk.answered_from.insert(0, ip);
        }
    }
}

/// Addresses remembered to have answered, a peer.
const ADDRESSES_KEPT: usize = 8;

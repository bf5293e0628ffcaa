//! WireGuard sessions on demand: who starts a handshake when, and when a peer counts as in use.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::drops::Drop;
use crate::engine::inbound::pseudo_ip;
use crate::engine::io::{Path, PeerId, Update, Via};
use crate::engine::packet::MIN_ROOM;
use crate::engine::path::agent::PathAgent;
use crate::engine::peer::{Handshake, Talk};
use crate::engine::planner::{Planner, Why};
use crate::engine::session::gate::peer_of_init;
use crate::engine::session::tunnel::{HandshakeResult, Tick, Tunnel};
use crate::wire::keys::WgKey;
use crate::wire::wireguard;

/// Repetitions of an unanswered first handshake. WireGuard waits 5 s (REKEY_TIMEOUT); somebody waits for this one.
const RETRY: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// Given up after this long: REKEY_ATTEMPT_TIME, WireGuard paper section 6.1.
const GIVE_UP: Duration = Duration::from_secs(90);
/// A peer without data for so long is out of use: paths are forgotten, nothing is sent to it any more.
pub(super) const IN_USE: Duration = Duration::from_secs(180);
/// A command such as ping keeps a peer in use for this long.
pub(super) const IN_USE_COMMAND: Duration = Duration::from_secs(30);
/// A peer that was heard so recently has our session.
const HEARD_NOW: Duration = Duration::from_millis(500);
/// A peer that sends into a session we lost makes us start a handshake at most this often.
const REVIVE_GAP: Duration = Duration::from_secs(2);

impl Planner {
    /// A packet waits for a session.
    pub(super) fn need_session(&mut self, id: PeerId) {
        self.want(id, IN_USE);
        self.start_handshake(id);
    }

    /// Data went to or came from a peer that was not watched.
    pub(super) fn became_active(&mut self, id: PeerId) {
        self.want(id, IN_USE);
        self.compare_routers(id);
    }

    /// Marks a peer as in use for at least `time` from now, and looks for a path if there is none.
    pub(super) fn want(&mut self, id: PeerId, time: Duration) {
        let now = self.now;
        if !self.ensure_talk(id) {
            return;
        }
        let remembered = self.peer(id).and_then(|p| self.last_endpoints.get(&p.wg).copied());
        let attempt = self.worked_before(id);
        let Some(peer) = self.peer_mut(id) else { return };
        peer.traffic.watched.store(true, Ordering::Relaxed);
        let Some(talk) = peer.talk.as_deref_mut() else { return };
        let was_wanted = talk.is_wanted(now);
        let path = talk.path;
        if let Some(attempt) = attempt.filter(|_| !was_wanted) {
            talk.agent.begin_with(attempt);
        }
        talk.wanted_until = talk.wanted_until.max(now + time);
        talk.agent.wake(now);
        let until = talk.wanted_until;
        self.timers.set(Why::Idle(id), Some(until));
        if !was_wanted && let Some(addr) = remembered {
            self.with_agent(id, |agent, near, cx| agent.try_remembered(addr, near(&addr), cx));
        }
        if !was_wanted {
            self.path_changed(id, path);
        }
        self.advance_path(id);
        self.keep_stun_fresh();
    }

    /// The peer may be out of use.
    pub(super) fn idle_due(&mut self, id: PeerId) {
        let now = self.now;
        let Some(peer) = self.peer_mut(id) else { return };
        // The order matters: after the mark is off, a packet that comes makes a new notice; one that came just before
        // is seen in the stamps.
        peer.traffic.watched.store(false, Ordering::Relaxed);
        let in_use_until = peer.last_data().map(|at| at + IN_USE);
        let Some(talk) = peer.talk.as_deref_mut() else { return };
        let until = talk.wanted_until.max(in_use_until.unwrap_or_default());
        if until > now {
            talk.wanted_until = until;
            peer.traffic.watched.store(true, Ordering::Relaxed);
            self.timers.set(Why::Idle(id), Some(until));
            return;
        }
        self.awaiting_stun.remove(&id);
        self.with_agent(id, |agent, _, cx| agent.sleep(cx));
        self.timers.set(Why::Path(id), None);
    }

    /// A peer sends data under a session we do not have: it outlived a restart of ours.
    pub(super) fn lost_session(&mut self, key: &WgKey) {
        if let Some(id) = self.by_wg.get(key).copied().filter(|id| self.ensure_talk(*id)) {
            self.revive(id);
        }
    }

    /// A peer in use was offline and is online again: it is called at once. If it was restarted it has also lost our session, and
    /// what we send directly is dropped there while its answers to probes say that all is well; WireGuard would find out after 15 s.
    pub(super) fn came_back(&mut self, id: PeerId) {
        let now = self.now;
        let Some(peer) = self.peer(id) else { return };
        let Some(talk) = peer.talk.as_deref().filter(|talk| talk.is_wanted(now)) else { return };
        let speaks = peer.last_heard().is_some_and(|at| now.since(at) < HEARD_NOW);
        let may_have_lost_it = talk.tunnel.is_some() && !speaks;
        self.with_agent(id, |agent, _, cx| agent.peer_came(cx));
        self.advance_path(id);
        if may_have_lost_it {
            self.revive(id);
        }
    }

    /// Begins a new session in place of one that an end may have lost.
    fn revive(&mut self, id: PeerId) {
        let now = self.now;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        if talk.revived.is_none_or(|at| now.since(at) >= REVIVE_GAP) {
            talk.revived = Some(now);
            self.want(id, IN_USE_COMMAND);
            self.start_handshake(id);
        }
    }

    pub(super) fn start_handshake(&mut self, id: PeerId) {
        let now = self.now;
        let Some(tunnel) = self.ensure_tunnel(id) else { return };
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        if talk.handshake.is_some() {
            return;
        }
        if tunnel.lock().can_send(now) && talk.revived != Some(now) {
            // The worker staged just before it heard that the session is up.
            self.update(Update::Established(id));
            return;
        }
        talk.handshake = Some(Handshake { began: now, next: now + RETRY[0], tries: 0 });
        self.send_initiation(id);
    }

    pub(super) fn repeat_handshake(&mut self, id: PeerId) {
        let now = self.now;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let Some(handshake) = &mut talk.handshake else { return };
        // The peer's own handshake may have come first: then there is a session already.
        if talk.revived.is_none_or(|at| at < handshake.began)
            && talk.tunnel.as_ref().is_some_and(|t| t.lock().can_send(now))
        {
            talk.handshake = None;
            self.update(Update::Established(id));
            self.schedule_session(id);
            return;
        }
        if now.since(handshake.began) >= GIVE_UP {
            talk.handshake = None;
            tracing::debug!(peer = id.0, "gave up: no handshake was answered");
            self.update(Update::GiveUp(id));
            self.schedule_session(id);
            return;
        }
        handshake.tries += 1;
        let wait = RETRY.get(handshake.tries).or(RETRY.last()).copied().unwrap_or(GIVE_UP);
        handshake.next = now + wait;
        self.send_initiation(id);
    }

    fn send_initiation(&mut self, id: PeerId) {
        let now = self.now;
        let Some(tunnel) = self.ensure_tunnel(id) else { return };
        let mut room = [0u8; MIN_ROOM];
        let len = tunnel.lock().initiate(&mut room, true, now);
        if let Some(len) = len {
            self.send_to_peer(id, &room[..len]);
        }
        self.schedule_session(id);
    }

    /// Someone starts a handshake with us. Its MAC was checked by the worker; now the costly part.
    pub(super) fn handshake_init(&mut self, via: &Via, bytes: &[u8]) {
        let Some(key) = peer_of_init(&self.keys.wg, &self.me.wg, bytes) else {
            self.drops.count(Drop::BadHandshake);
            return;
        };
        let sender_is_relayed_as_another = matches!(via, Via::Relay { peer } if *peer != key);
        let id = self.by_wg.get(&key).copied();
        let Some(id) = id.filter(|_| !sender_is_relayed_as_another) else {
            self.drops.count(Drop::UnknownPeer);
            return;
        };
        let Some(tunnel) = self.ensure_tunnel(id) else { return };
        let mut out = [0u8; MIN_ROOM];
        let result = tunnel.lock().handshake(pseudo_ip(via), bytes, &mut out, self.now);
        match result {
            HandshakeResult::Reply { len } => self.send(*via, out[..len].to_vec()),
            HandshakeResult::Established { .. } | HandshakeResult::CookieStored => {}
            HandshakeResult::Refused(_) => self.drops.count(Drop::BadHandshake),
        }
        self.schedule_session(id);
    }

    /// An answer to a handshake of ours.
    pub(super) fn handshake_answer(&mut self, via: &Via, bytes: &[u8]) {
        let id = wireguard::receiver_index(bytes)
            .and_then(|index| self.by_index.get(&wireguard::tunnel_index(index)).copied());
        let tunnel = id.and_then(|id| self.peer(id)).and_then(|p| p.talk.as_deref()).and_then(|t| t.tunnel.clone());
        let (Some(id), Some(tunnel)) = (id, tunnel) else {
            self.drops.count(Drop::UnknownIndex);
            return;
        };
        let mut out = [0u8; MIN_ROOM];
        let result = tunnel.lock().handshake(pseudo_ip(via), bytes, &mut out, self.now);
        match result {
            HandshakeResult::Established { len } => {
                if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
                    talk.handshake = None;
                }
                // First the workers learn that they may send, then the peer does.
                self.update(Update::Established(id));
                self.send(*via, out[..len].to_vec());
                self.compare_soon(id);
            }
            HandshakeResult::Reply { len } => self.send(*via, out[..len].to_vec()),
            HandshakeResult::CookieStored => {}
            HandshakeResult::Refused(_) => self.drops.count(Drop::BadHandshake),
        }
        self.schedule_session(id);
    }

    /// The peer has sent under the session it began: it may be used, and its timers run.
    pub(super) fn session_confirmed(&mut self, id: PeerId) {
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.handshake = None;
        }
        self.schedule_session(id);
        self.compare_soon(id);
    }

    /// A timer of the peer's session or of our handshake.
    pub(super) fn session_due(&mut self, id: PeerId) {
        let now = self.now;
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
        if talk.handshake.is_some_and(|h| h.next <= now) {
            self.repeat_handshake(id);
        }
        let tunnel = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.tunnel.clone());
        if let Some(tunnel) = tunnel {
            let mut out = [0u8; MIN_ROOM];
            let tick = tunnel.lock().tick(&mut out, now);
            match tick {
                Tick::Nothing => {}
                Tick::Send { len } => self.send_to_peer(id, &out[..len]),
                Tick::Expired => {
                    let waiting = self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| t.handshake.is_some());
                    if !waiting {
                        self.update(Update::GiveUp(id));
                    }
                }
            }
        }
        self.schedule_session(id);
    }

    fn schedule_session(&mut self, id: PeerId) {
        let now = self.now;
        let next = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| {
            let session = t.tunnel.as_ref().and_then(|tunnel| tunnel.lock().next_tick(now));
            [session, t.handshake.map(|h| h.next)].into_iter().flatten().min()
        });
        self.timers.set(Why::Session(id), next);
    }

    /// Sends a WireGuard message of ours the way the peer's data goes; by the relay if that is not known.
    pub(super) fn send_to_peer(&mut self, id: PeerId, bytes: &[u8]) {
        let Some(peer) = self.peer(id) else { return };
        let Some(talk) = peer.talk.as_deref() else { return };
        let relay = Via::Relay { peer: peer.wg };
        let remembered = self.last_endpoints.get(&peer.wg).copied();
        match talk.path {
            Path::Direct { socket, remote } => self.send(Via::Udp { socket, remote }, bytes.to_vec()),
            Path::Both { socket, remote } => {
                self.send(Via::Udp { socket, remote }, bytes.to_vec());
                self.send(relay, bytes.to_vec());
            }
            Path::Relay | Path::None => {
                self.send(relay, bytes.to_vec());
                // No relay: perhaps the peer is still where it was.
                if let (false, Some(remote)) = (self.relay_up, remembered) {
                    let socket = crate::engine::io::SocketId::for_remote(&remote);
                    self.send(Via::Udp { socket, remote }, bytes.to_vec());
                }
            }
        }
    }

    /// Makes what talking to a peer needs. False: there is no such peer, or its key is no key.
    pub(super) fn ensure_talk(&mut self, id: PeerId) -> bool {
        let now = self.now;
        let Some(peer) = self.peer(id) else { return false };
        if peer.talk.is_some() {
            return true;
        }
        let wg = peer.wg;
        let Some(keys) = self.probe_keys(&wg) else { return false };
        let name = keys.inbound_name();
        let path = self.without_direct_path(id);
        let mut agent = PathAgent::new(self.me.wg < wg, now);
        agent.own_lifetime(self.lifetime.map(|l| l.at_least_s));
        if let Some(peer) = self.peer_mut(id) {
            peer.talk = Some(Box::new(Talk::new(keys, agent, path, now)));
        }
        self.update(Update::Path { peer: id, path, lead: Duration::ZERO });
        self.by_name.insert(name, id);
        self.update(Update::ProbeName { peer: id, name });
        true
    }

    fn ensure_tunnel(&mut self, id: PeerId) -> Option<Arc<Mutex<Tunnel>>> {
        if !self.ensure_talk(id) {
            return None;
        }
        let peer = self.peer(id)?;
        if let Some(tunnel) = peer.talk.as_deref().and_then(|t| t.tunnel.clone()) {
            return Some(tunnel);
        }
        let wg = peer.wg;
        let index = self.indices.allocate(&mut self.rng)?;
        let tunnel = Arc::new(Mutex::new(Tunnel::new(&self.keys.wg, &wg, index)));
        self.by_index.insert(index, id);
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
            talk.tunnel = Some(Arc::clone(&tunnel));
            talk.index = index;
        }
        // Queued before any datagram that lets the peer send under this index.
        self.update(Update::Tunnel { peer: id, tunnel: Arc::clone(&tunnel), index });
        Some(tunnel)
    }
}

//! From the network to the TUN device. Read top to bottom: classify, find the key, open, check the source, queue,
//! stamp.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use parking_lot::{ArcMutexGuard, Mutex, RawMutex};
use rustc_hash::FxBuildHasher;

use crate::engine::alias::Aliases;
use crate::engine::aqm::{self, Codel, Sign};
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Notice, Path, PeerId, Update, Via};
use crate::engine::packet::{Arrival, InboundSink, MIN_ROOM};
use crate::engine::routes::{Routes, Sources};
use crate::engine::session::gate::{Gate, Verdict};
use crate::engine::session::table::SessionTable;
use crate::engine::session::tunnel::{OpenError, Opened, Tunnel};
use crate::engine::traffic::Traffic;
use crate::time::Now;
use crate::wire::classify::{Kind, classify};
use crate::wire::keys::WgKey;
use crate::wire::peer::{self, Message, Name};
use crate::wire::{ip, mss, probe, stun, wireguard};

/// Stands for this node itself.
const HERE: PeerId = PeerId(u32::MAX);

/// Datagrams of others, and for us through others, that may wait within one batch.
const PASSING: usize = 256;

/// A datagram that one peer wants passed on to another.
#[derive(Debug)]
pub struct ToRelay {
    /// Who asked.
    pub from: PeerId,
    /// For whom.
    pub to: PeerId,
    /// The datagram.
    pub payload: Vec<u8>,
}

/// The inbound half of a data worker.
#[derive(Debug)]
pub struct Inbound {
    sources: Sources,
    serves: Routes,
    aliases: Option<Box<Aliases>>,
    peers: Vec<Option<Peer>>,
    sessions: SessionTable<(PeerId, Arc<Mutex<Tunnel>>)>,
    gate: Gate,
    own: Vec<IpAddr>,
    tx_prefix: [u8; 4],
    probe_names: HashSet<[u8; 8], FxBuildHasher>,
    /// Members, as messages of peers name them.
    names: HashMap<Name, PeerId, FxBuildHasher>,
    /// This node relays for others.
    relaying: bool,
    to_relay: VecDeque<ToRelay>,
    /// Data that came through another node, and from whom, as that says.
    passed: VecDeque<(WgKey, Vec<u8>)>,
    /// What waits in the IPv4 and in the IPv6 socket.
    queues: [Codel; 2],
    /// The next packet for which that is possible tells its sender to slow down.
    must_sign: bool,
    drops: Arc<Drops>,
}

#[derive(Debug)]
struct Peer {
    key: WgKey,
    traffic: Arc<Traffic>,
    direct: Option<Via>,
    roamed_to: Option<Via>,
    index: Option<u32>,
    probe_name: Option<[u8; 8]>,
    /// What connections that the peer opens are told about the direct path.
    clamp: Option<u16>,
}

/// The lock of the tunnel whose run of datagrams is being opened, and what is noted for its peer when the run ends.
struct Run {
    index: u32,
    id: PeerId,
    tunnel: ArcMutexGuard<RawMutex, Tunnel>,
    /// Inner bytes delivered.
    delivered: usize,
    /// Anything opened at all.
    heard: bool,
}

/// What an [`Inbound`] must know from the start.
#[derive(Debug, Clone)]
pub struct InboundConfig {
    /// Our WireGuard public key, which handshake MACs are keyed with.
    pub key: WgKey,
    /// Our mesh addresses.
    pub own: Vec<IpAddr>,
    /// The first four bytes of every STUN transaction id we use in this run, so that made-up answers cost nothing.
    pub tx_prefix: [u8; 4],
}

impl Inbound {
    /// A worker that knows no peer yet.
    #[must_use]
    pub fn new(config: &InboundConfig, drops: Arc<Drops>) -> Self {
        Self {
            sources: Sources::default(),
            serves: Routes::default(),
            aliases: None,
            peers: Vec::new(),
            sessions: SessionTable::default(),
            gate: Gate::new(&config.key),
            own: config.own.clone(),
            tx_prefix: config.tx_prefix,
            probe_names: HashSet::default(),
            names: HashMap::default(),
            relaying: false,
            to_relay: VecDeque::new(),
            passed: VecDeque::new(),
            queues: Default::default(),
            must_sign: false,
            drops,
        }
    }

    /// Keeps the mesh's own ranges free of routes.
    pub fn reserve(&mut self, ranges: &[IpNet]) {
        for range in ranges {
            self.sources.reserve(*range);
            self.serves.reserve(*range);
        }
    }

    /// Carries one datagram, from a UDP socket or out of a relay frame.
    pub fn handle_datagram(&mut self, via: &Via, bytes: &[u8], now: Now, sink: &mut impl InboundSink) {
        self.handle_train(&Arrival::by(*via), [bytes], now, sink);
    }

    /// Carries datagrams that came together, in order.
    pub fn handle_train<'a>(
        &mut self,
        arrival: &Arrival,
        datagrams: impl IntoIterator<Item = &'a [u8]>,
        now: Now,
        sink: &mut impl InboundSink,
    ) {
        let via = &arrival.via;
        self.must_sign |= match (via, arrival.waited) {
            (Via::Udp { socket, .. }, Some(waited)) => {
                self.queues.get_mut(usize::from(socket.0)).is_some_and(|queue| queue.observe(waited, now))
            }
            _ => false,
        };
        let mut run = None;
        for bytes in datagrams {
            // 1 classify
            match classify(bytes) {
                Kind::Data => {
                    self.data(arrival, bytes, &mut run, now, sink);
                    continue;
                }
                Kind::HandshakeInit | Kind::HandshakeResponse | Kind::CookieReply => {
                    self.handshake(via, bytes, now, sink);
                }
                Kind::Stun => match self.stun_is_expected(via, bytes) {
                    Ok(()) => slow(via, bytes, sink),
                    Err(why) => self.drops.count(why),
                },
                Kind::Sealed => match via {
                    // Over the relay the sender is known; by UDP only the name in the message tells.
                    Via::Udp { .. } if !probe::sealed_name(bytes).is_some_and(|n| self.probe_names.contains(&n)) => {
                        self.drops.count(Drop::BadSealed);
                    }
                    Via::Udp { .. } | Via::Relay { .. } => slow(via, bytes, sink),
                },
                Kind::RelayDatagram | Kind::Junk => self.drops.count(Drop::Junk),
            }
        }
        self.end_run(via, run, now, sink);
        // What came inside: as if by the coordinator's relay. A message inside that goes no further.
        while let Some((peer, payload)) = self.passed.pop_front() {
            let mut run = None;
            let arrival = Arrival::by(Via::Relay { peer });
            self.data(&arrival, &payload, &mut run, now, sink);
            self.end_run(&arrival.via, run, now, sink);
        }
    }

    /// The next datagram to pass on for others; ask until there is none after each batch.
    pub fn next_to_relay(&mut self) -> Option<ToRelay> {
        self.to_relay.pop_front()
    }

    /// Takes what the planner decided.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Peer { peer, key, owns: _, admits, keeps: _, traffic } => {
                self.sources.set(peer, admits);
                self.names.insert(peer::name_of(&key), peer);
                let index = peer.0 as usize;
                if self.peers.len() <= index {
                    self.peers.resize_with(index + 1, || None);
                }
                match &mut self.peers[index] {
                    Some(known) => known.traffic = traffic,
                    slot @ None => {
                        *slot = Some(Peer {
                            key,
                            traffic,
                            direct: None,
                            roamed_to: None,
                            index: None,
                            probe_name: None,
                            clamp: None,
                        });
                    }
                }
            }
            Update::Gone(peer) => {
                self.sources.remove_peer(peer);
                if let Some(gone) = self.peers.get_mut(peer.0 as usize).and_then(Option::take) {
                    self.names.remove(&peer::name_of(&gone.key));
                    if let Some(index) = gone.index {
                        self.sessions.remove(index);
                    }
                    if let Some(name) = gone.probe_name {
                        self.probe_names.remove(&name);
                    }
                }
            }
            Update::Tunnel { peer, tunnel, index } => {
                if let Some(p) = self.peer_mut(peer) {
                    p.index = Some(index);
                    self.sessions.insert(index, (peer, tunnel));
                }
            }
            Update::Path { peer, path, lead: _ } => {
                if let Some(p) = self.peer_mut(peer) {
                    p.direct = match path {
                        Path::Direct { socket, remote } | Path::Both { socket, remote } => {
                            Some(Via::Udp { socket, remote })
                        }
                        Path::None | Path::Relay => None,
                    };
                    p.roamed_to = None;
                    p.clamp = p.clamp.filter(|_| p.direct.is_some());
                }
            }
            Update::Mtu { peer, size, settled } => {
                if let Some(p) = self.peer_mut(peer) {
                    p.clamp = settled.then_some(size);
                }
            }
            Update::ProbeName { peer, name } => {
                if let Some(p) = self.peer_mut(peer) {
                    p.probe_name = Some(name);
                    self.probe_names.insert(name);
                }
            }
            Update::Serves(prefixes) => self.serves.set(HERE, prefixes),
            Update::Aliases { pairs, flows } => self.aliases = Aliases::new(&pairs, &flows),
            Update::Relaying(rate) => self.relaying = rate.is_some(),
            Update::Established(_) | Update::GiveUp(_) | Update::Through { .. } => {}
        }
    }

    fn data(&mut self, arrival: &Arrival, bytes: &[u8], run: &mut Option<Run>, now: Now, sink: &mut impl InboundSink) {
        let via = &arrival.via;
        // 2 find the key: the session is locked once for its run of datagrams
        let index = wireguard::tunnel_index(wireguard::data_receiver(bytes));
        if run.as_ref().is_none_or(|run| run.index != index) {
            self.end_run(via, run.take(), now, sink);
            let Some((id, tunnel)) = self.sessions.get(index) else {
                self.drops.count(Drop::UnknownIndex);
                if let Via::Relay { peer } = via {
                    sink.notice(Notice::UnknownIndex(*peer));
                }
                return;
            };
            *run = Some(Run { index, id: *id, tunnel: tunnel.lock_arc(), delivered: 0, heard: false });
        }
        let Some(run) = run else { return };
        // 3 replay, open
        let room = sink.tun_room(bytes.len().max(MIN_ROOM));
        let (inner, established): (&mut [u8], bool) = match run.tunnel.open(Some(pseudo_ip(via)), bytes, room, now) {
            Opened::Packet { len, established } => (&mut room[..len], established),
            Opened::Keepalive { established } => (&mut [], established),
            Opened::Message { len, established } => {
                let bytes = room[..len].to_vec();
                let from = run.id;
                if !self.is_passing(via, from, &bytes) {
                    sink.notice(Notice::Message { peer: from, bytes });
                }
                (&mut [], established)
            }
            Opened::Error(why) => return self.not_opened(run.id, via, why, now, sink),
        };
        run.heard = true;
        if !inner.is_empty() {
            // 4 source check: the longest match of the inner source must admit this very peer
            let deliver = match ip::source_destination(inner) {
                Err(_) => Err(Drop::BadInner),
                Ok((source, _)) if !self.sources.admits(source, run.id) => Err(Drop::SpoofedSource),
                Ok((_, destination)) if !self.is_for_us(self.renumbered(inner, destination)) => Err(Drop::NotForUs),
                Ok(_) => ip::apply_ecn(inner, arrival.ecn).map_err(|_| Drop::Congested),
            };
            let deliver = deliver.and_then(|()| self.sign(inner));
            // 5 queue
            match deliver {
                Ok(()) => {
                    if let Some(mtu) = self.peers.get(run.id.0 as usize).and_then(|p| p.as_ref()?.clamp) {
                        mss::clamp(inner, mtu);
                    }
                    let len = inner.len();
                    sink.tun_commit(len);
                    run.delivered += len;
                }
                Err(why) => self.drops.count(why),
            }
        }
        if established {
            sink.established(run.id);
            sink.notice(Notice::Confirmed(run.id));
        }
    }

    /// Data that is passed on, by us or to us. Only what came directly: it takes one hop, and what is inside takes none. False:
    /// the message is for the planner.
    fn is_passing(&mut self, via: &Via, by: PeerId, bytes: &[u8]) -> bool {
        if !matches!(via, Via::Udp { .. }) {
            return false;
        }
        match Message::decode(bytes) {
            Ok(Message::Pass { to, payload }) if self.relaying => match self.names.get(&to) {
                Some(to) if *to != by && classify(payload) != Kind::Junk => {
                    if self.to_relay.len() < PASSING {
                        self.to_relay.push_back(ToRelay { from: by, to: *to, payload: payload.to_vec() });
                    } else {
                        self.drops.count(Drop::PeerRelayBusy);
                    }
                    true
                }
                _ => false,
            },
            Ok(Message::Passed { from, payload }) if classify(payload) == Kind::Data => {
                let sender = self.names.get(&from).filter(|sender| **sender != by);
                let key = sender.and_then(|sender| self.peers.get(sender.0 as usize)?.as_ref()).map(|p| p.key);
                match key {
                    Some(key) if self.passed.len() < PASSING => self.passed.push_back((key, payload.to_vec())),
                    Some(_) => self.drops.count(Drop::PeerRelayBusy),
                    None => self.drops.count(Drop::NotPassedOn),
                }
                true
            }
            _ => false,
        }
    }

    /// Asks the packet's sender to slow down, if somebody is to be asked.
    fn sign(&mut self, packet: &mut [u8]) -> Result<(), Drop> {
        if !self.must_sign {
            return Ok(());
        }
        let sign = aqm::sign(packet);
        self.must_sign = sign == Sign::NotThis;
        if sign == Sign::Drop { Err(Drop::QueueDelay) } else { Ok(()) }
    }

    fn not_opened(&self, id: PeerId, via: &Via, why: OpenError, now: Now, sink: &mut impl InboundSink) {
        self.drops.count(match why {
            OpenError::BadTag | OpenError::Other => Drop::BadTag,
            OpenError::Replayed => Drop::Replayed,
            OpenError::UnknownSession => Drop::UnknownIndex,
            OpenError::BadInner => Drop::BadInner,
        });
        match (why, via) {
            (OpenError::UnknownSession, Via::Relay { peer }) => sink.notice(Notice::UnknownIndex(*peer)),
            (OpenError::Replayed, Via::Relay { peer: key }) => {
                let peer = self.peers.get(id.0 as usize).and_then(Option::as_ref);
                if let Some(peer) = peer.filter(|p| p.key == *key) {
                    peer.traffic.copy_came_by_relay(now);
                }
            }
            _ => {}
        }
    }

    /// 6 stamp, roam
    fn end_run(&mut self, via: &Via, run: Option<Run>, now: Now, sink: &mut impl InboundSink) {
        let Some(Run { id, delivered, heard: true, .. }) = run else { return };
        let Some(peer) = self.peer_mut(id) else { return };
        if delivered > 0 {
            peer.traffic.received(delivered, now);
            if peer.traffic.needs_watching() {
                sink.notice(Notice::Active(id));
            }
        }
        match via {
            Via::Relay { .. } => peer.traffic.came_by_relay(now),
            Via::Udp { .. } if peer.direct.as_ref() == Some(via) => peer.traffic.came_directly(now),
            Via::Udp { .. } if peer.roamed_to.as_ref() != Some(via) => {
                peer.roamed_to = Some(*via);
                sink.notice(Notice::Roamed { peer: id, via: *via });
            }
            Via::Udp { .. } => {}
        }
    }

    /// Cheap checks before anything that costs a Diffie-Hellman: length, MAC, rate, cookie.
    fn handshake(&mut self, via: &Via, bytes: &[u8], now: Now, sink: &mut impl InboundSink) {
        let mut cookie = [0u8; MIN_ROOM];
        match self.gate.check(pseudo_ip(via), bytes, &mut cookie, now) {
            Verdict::Pass => slow(via, bytes, sink),
            Verdict::Cookie(len) => {
                self.drops.count(Drop::HandshakeGate);
                sink.reply(via, &cookie[..len]);
            }
            Verdict::Drop => self.drops.count(Drop::HandshakeGate),
        }
    }

    /// Whether a STUN message can be one of ours, by looking only at bytes an outsider cannot guess.
    fn stun_is_expected(&self, via: &Via, bytes: &[u8]) -> Result<(), Drop> {
        if probe::is_response(bytes) {
            let ours = stun::transaction_id(bytes).is_some_and(|id| id.0[..4] == self.tx_prefix);
            return if ours { Ok(()) } else { Err(Drop::UnexpectedStun) };
        }
        match via {
            Via::Relay { .. } => Ok(()),
            Via::Udp { .. } => match probe::name_of(bytes) {
                Some(name) if self.probe_names.contains(&name) => Ok(()),
                Some(_) => Err(Drop::UnknownProbe),
                None => Err(Drop::UnexpectedStun),
            },
        }
    }

    /// Where a packet goes once an alias in it has become the real address.
    fn renumbered(&self, packet: &mut [u8], destination: IpAddr) -> IpAddr {
        match &self.aliases {
            Some(aliases) => aliases.arrive(packet, destination),
            None => destination,
        }
    }

    /// One of our addresses, or one that we lead to.
    fn is_for_us(&self, destination: IpAddr) -> bool {
        self.own.contains(&destination) || self.serves.lookup(destination).is_some()
    }

    fn peer_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(id.0 as usize).and_then(Option::as_mut)
    }
}

fn slow(via: &Via, bytes: &[u8], sink: &mut impl InboundSink) {
    sink.notice(Notice::Slow { via: *via, bytes: bytes.to_vec() });
}

/// boringtun keys cookies and rate limits by source address; a relayed datagram gets one made from its sender's key.
#[must_use]
pub fn pseudo_ip(via: &Via) -> IpAddr {
    match via {
        Via::Udp { remote, .. } => remote.ip(),
        Via::Relay { peer } => {
            let mut octets = [0u8; 16];
            octets.copy_from_slice(&peer.0[..16]);
            IpAddr::V6(Ipv6Addr::from(octets))
        }
    }
}

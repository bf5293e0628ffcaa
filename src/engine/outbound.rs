//! From the TUN device to the network. Read top to bottom: parse, route, cut, session, fit, seal, path, queue.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::{ArcMutexGuard, Mutex, RawMutex};

use crate::engine::alias::Aliases;
use crate::engine::drops::{Drop, Drops};
use crate::engine::fit::{Fit, Fitted};
use crate::engine::flows::Flows;
use crate::engine::hold::Hold;
use crate::engine::io::{Notice, Path, PeerId, SocketId, Update};
use crate::engine::packet::{DATA_OVERHEAD, Destination, FromTun, MIN_ROOM, OutboundSink};
use crate::engine::path::mtu::BASE;
use crate::engine::peer_relay::Shares;
use crate::engine::routes::Routes;
use crate::engine::session::tunnel::Tunnel;
use crate::engine::traffic::Traffic;
use crate::time::Now;
use crate::wire::keys::WgKey;
use crate::wire::offload::{self, BadSuper, Cut};
use crate::wire::peer::{Name, PASS_OVERHEAD, name_of, pass_header};
use crate::wire::{ip, mss};

/// Packets that may wait for one peer's session. As many as WireGuard for Linux stages; the oldest goes first.
pub const STAGED_PER_PEER: usize = 128;
/// Packets that may wait in all, 5 MiB: a longer one counts for every 1,280 bytes of it.
pub const STAGED_TOTAL: usize = 4096;
/// The largest inner packet: a UDP datagram less WireGuard's overhead and a relay frame header.
pub const MAX_INNER: usize = crate::wire::relay::MAX_PAYLOAD - DATA_OVERHEAD;
/// A packet that waited for a session or a path for longer is not worth sending: REKEY_ATTEMPT_TIME, WireGuard paper
/// section 6.1.
const STAGED_FOR: Duration = Duration::from_secs(90);
/// Messages this long go on any direct path: that a volunteer's carries them, full-size probes have shown before it was chosen.
const PROVEN: usize = BASE as usize + DATA_OVERHEAD + PASS_OVERHEAD;
/// Who asks for packets to be passed on in vain is told this often.
const NO_WAY: Duration = Duration::from_millis(100);
/// While packets wait, the planner is reminded this often.
const REMIND: Duration = Duration::from_secs(1);

/// The outbound half of a data worker.
#[derive(Debug)]
pub struct Outbound {
    routes: Routes,
    /// Flows that stay with a router that is not asked any more.
    flows: Flows,
    /// Networks behind this node that leave under other numbers.
    aliases: Option<Box<Aliases>>,
    peers: Vec<Option<Peer>>,
    staged_total: usize,
    /// Peers whose packets turn into a faster way, and the bytes that wait there in all.
    turning: Vec<PeerId>,
    held_bytes: usize,
    /// Holds a sealed datagram that goes both ways at once.
    scratch: Vec<u8>,
    /// Makes packets fit their path.
    fit: Fit,
    /// What this node carries for others.
    shares: Option<Shares>,
    drops: Arc<Drops>,
}

#[derive(Debug)]
struct Peer {
    key: WgKey,
    traffic: Arc<Traffic>,
    tunnel: Option<Arc<Mutex<Tunnel>>>,
    path: Path,
    /// Who carries what goes by relay, if not the coordinator.
    through: Option<PeerId>,
    /// When somebody was told last that there is no way to it.
    no_way: Option<Now>,
    /// How long packets may be on the direct path, and whether connections that open are told so.
    mtu: u16,
    settled: bool,
    /// Packets that wait for a session or a path, and since when.
    staged: VecDeque<(Now, Vec<u8>)>,
    reminded: Option<Now>,
    /// Packets that wait until those before them have arrived on a slower way.
    hold: Option<Hold>,
}

/// The lock of the peer whose run of packets is being sealed.
type Held = Option<(PeerId, ArcMutexGuard<RawMutex, Tunnel>)>;

impl Outbound {
    /// A worker that knows no peer yet.
    #[must_use]
    pub fn new(drops: Arc<Drops>) -> Self {
        Self {
            routes: Routes::default(),
            flows: Flows::default(),
            aliases: None,
            peers: Vec::new(),
            staged_total: 0,
            turning: Vec::new(),
            held_bytes: 0,
            scratch: Vec::new(),
            fit: Fit::default(),
            shares: None,
            drops,
        }
    }

    /// Keeps the mesh's own ranges free of routes.
    pub fn reserve(&mut self, ranges: &[IpNet]) {
        ranges.iter().for_each(|range| self.routes.reserve(*range));
    }

    /// Carries a batch of what was read from the TUN device, in order.
    pub fn handle_tun<'a>(
        &mut self,
        packets: impl IntoIterator<Item = FromTun<'a>>,
        now: Now,
        sink: &mut impl OutboundSink,
    ) {
        let mut held: Held = None;
        for FromTun { bytes, offload } in packets {
            // 1 parse
            let Ok(destination) = ip::destination(bytes) else {
                self.drops.count(Drop::BadIp);
                continue;
            };
            // 2 route
            let Some(mut peer) = self.routes.lookup(destination) else {
                self.drops.count(Drop::NoRoute);
                if let Some(error) = ip::unreachable(bytes) {
                    sink.to_tun(&error);
                }
                continue;
            };
            if !self.flows.is_empty() {
                peer = self.flows.way(bytes, destination, peer, now);
            }
            if let Some(aliases) = &self.aliases
                && let Ok((source, _)) = ip::source_destination(bytes)
            {
                aliases.leave(bytes, source, offload.is_partial());
            }
            // 3 cut
            let (limit, told) = self.limits(peer);
            let packets = if offload.is_super() {
                match offload::cut(&offload, bytes, usize::from(limit)) {
                    // UDP: its packets stay as they are.
                    Err(BadSuper::TooLong) => offload::cut(&offload, bytes, MAX_INNER),
                    cut => cut,
                }
                .map(Packets::Cut)
            } else {
                offload::complete(&offload, bytes).map(|()| {
                    if let Some(mtu) = told {
                        mss::clamp(bytes, mtu);
                    }
                    Packets::One(Some(bytes))
                })
            };
            match packets {
                Ok(packets) => self.send(peer, packets, now, &mut held, sink),
                Err(BadSuper::TooLong) => self.drops.count(Drop::TooBig),
                Err(BadSuper::Kind | BadSuper::Headers | BadSuper::Size) => self.drops.count(Drop::BadSuperpacket),
            }
        }
    }

    /// Takes what the planner decided.
    pub fn apply(&mut self, update: Update, now: Now, sink: &mut impl OutboundSink) {
        match update {
            Update::Peer { peer, key, owns, admits: _, keeps, traffic } => {
                self.routes.set(peer, owns);
                self.flows.set(peer, keeps);
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
                            tunnel: None,
                            path: Path::Relay,
                            through: None,
                            no_way: None,
                            mtu: BASE,
                            settled: false,
                            staged: VecDeque::new(),
                            reminded: None,
                            hold: None,
                        });
                    }
                }
            }
            Update::Gone(peer) => {
                self.drop_staged(peer, Drop::PeerGone);
                self.held_bytes -= self.held(peer).map_or(0, Hold::bytes);
                self.routes.remove_peer(peer);
                self.flows.set(peer, Vec::new());
                if let Some(slot) = self.peers.get_mut(peer.0 as usize) {
                    *slot = None;
                }
            }
            Update::Tunnel { peer, tunnel, index: _ } => {
                if let Some(peer) = self.peer_mut(peer) {
                    peer.tunnel = Some(tunnel);
                }
            }
            Update::Path { peer, path, lead } => {
                if let Some(p) = self.peer_mut(peer) {
                    if way(&p.path) != way(&path) {
                        (p.mtu, p.settled) = (BASE, false);
                    }
                    p.path = path;
                    self.turn(peer, lead, now);
                    self.flush(peer, now, sink);
                }
            }
            Update::Mtu { peer, size, settled } => {
                if let Some(p) = self.peer_mut(peer) {
                    (p.mtu, p.settled) = (size, settled);
                }
            }
            Update::Established(peer) => self.flush(peer, now, sink),
            Update::GiveUp(peer) => self.drop_staged(peer, Drop::HandshakeTimeout),
            Update::Aliases { pairs, flows } => self.aliases = Aliases::new(&pairs, &flows),
            Update::Through { peer, relay } => {
                if let Some(peer) = self.peer_mut(peer) {
                    peer.through = relay;
                }
            }
            Update::Relaying(rate) => self.shares = rate.map(Shares::new),
            Update::ProbeName { .. } | Update::Serves(_) => {}
        }
    }

    /// The peer's packets go another way from now on, which is faster by `lead`.
    fn turn(&mut self, id: PeerId, lead: Duration, now: Now) {
        let Some(peer) = self.peer_mut(id) else { return };
        let last = Traffic::stamp(&peer.traffic.last_tx).filter(|_| lead > Duration::ZERO);
        let until = last.map(|at| at + lead).filter(|until| *until > now);
        match (&mut peer.hold, until) {
            // Nothing on the way is overtaken by the relay.
            (Some(hold), _) if way(&peer.path).is_none() => hold.go_at(now, Duration::ZERO),
            (Some(hold), until) => hold.go_at(hold.until().max(until.unwrap_or_default()), lead.max(hold.span())),
            (hold @ None, Some(until)) => {
                *hold = Some(Hold::new(until, lead));
                self.turning.push(id);
            }
            (None, None) => {}
        }
    }

    /// When [`Self::release`] is due. None: nothing waits for a time.
    #[must_use]
    pub fn next_release(&self) -> Option<Now> {
        self.turning.iter().filter_map(|id| self.held(*id)).map(Hold::next).min()
    }

    /// Sends packets whose time has come, some in each turn.
    pub fn release(&mut self, now: Now, sink: &mut impl OutboundSink) {
        for id in std::mem::take(&mut self.turning) {
            let Some(peer) = self.peers.get_mut(id.0 as usize).and_then(Option::as_mut) else { continue };
            let Some(hold) = &mut peer.hold else { continue };
            if hold.next() <= now {
                let head = hold.turn(now, &mut self.held_bytes);
                let over = hold.is_over(now);
                let rest = peer.hold.take().filter(|_| !over);
                let mut held = None;
                for packet in &head {
                    self.send(id, Packets::One(Some(packet)), now, &mut held, sink);
                }
                if let Some(peer) = self.peer_mut(id) {
                    peer.hold = rest;
                }
            }
            if self.held(id).is_some() {
                self.turning.push(id);
            }
        }
    }

    fn held(&self, id: PeerId) -> Option<&Hold> {
        self.peers.get(id.0 as usize)?.as_ref()?.hold.as_ref()
    }

    /// Sends what waited for a session of this peer or a path to it, if there are both now.
    pub fn flush(&mut self, id: PeerId, now: Now, sink: &mut impl OutboundSink) {
        let Some(peer) = self.peer_mut(id) else { return };
        if peer.staged.is_empty()
            || peer.path == Path::None
            || !peer.tunnel.as_ref().is_some_and(|t| t.lock().can_send(now))
        {
            return;
        }
        let staged = std::mem::take(&mut peer.staged);
        self.staged_total -= staged.iter().map(|(_, packet)| weight(packet)).sum::<usize>();
        let mut held = None;
        for (since, packet) in staged {
            if now.since(since) > STAGED_FOR {
                self.drops.count(Drop::NoPath);
                continue;
            }
            self.send(id, Packets::One(Some(&packet)), now, &mut held, sink);
        }
    }

    /// Passes a datagram of one peer on to another, in its session, if there is a direct way and it is within what this node
    /// carries. One hop: it came directly and goes directly.
    pub fn relay(&mut self, from: PeerId, to: PeerId, payload: &[u8], now: Now, sink: &mut impl OutboundSink) {
        let sender = self.peers.get(from.0 as usize).and_then(Option::as_ref).map(|p| name_of(&p.key));
        let (Some(name), Some(shares)) = (sender, &mut self.shares) else {
            self.drops.count(Drop::NotPassedOn);
            return;
        };
        if !shares.take((from, to), payload.len(), now) {
            self.drops.count(Drop::PeerRelayLimit);
            return;
        }
        let Some(peer) = self.peers.get_mut(to.0 as usize).and_then(Option::as_mut) else {
            self.drops.count(Drop::NotPassedOn);
            return;
        };
        match peer.carrier().filter(|carrier| carrier.ready(now)) {
            Some(carrier) if payload.len() + PASS_OVERHEAD <= PROVEN => {
                self.scratch.clear();
                self.scratch.extend_from_slice(&pass_header(true, &name, payload.len()));
                self.scratch.extend_from_slice(payload);
                if carrier.send(&self.scratch, 0, &self.drops, now, sink) && peer.traffic.needs_watching() {
                    sink.notice(Notice::Active(to));
                }
            }
            _ => {
                self.drops.count(Drop::NotPassedOn);
                if peer.no_way.is_none_or(|at| now.since(at) >= NO_WAY) {
                    peer.no_way = Some(now);
                    sink.notice(Notice::NoWay { from, to });
                }
            }
        }
    }

    /// How long packets to the peer may be, and what connections that open are told about that. On the relay nothing:
    /// they outlive it, and what they send is cut as long as need be.
    fn limits(&self, id: PeerId) -> (u16, Option<u16>) {
        match self.peers.get(id.0 as usize).and_then(Option::as_ref) {
            Some(peer) => (peer.limit(), (peer.settled && way(&peer.path).is_some()).then_some(peer.mtu)),
            None => (BASE, None),
        }
    }

    /// Sends packets that all go to one address, and have one set of headers.
    fn send(&mut self, id: PeerId, mut packets: Packets<'_>, now: Now, held: &mut Held, sink: &mut impl OutboundSink) {
        let Some(peer) = self.peers.get(id.0 as usize).and_then(Option::as_ref) else {
            self.drops.count(Drop::NoRoute);
            return;
        };
        let limit = peer.limit();
        if held.as_ref().is_some_and(|(holder, _)| *holder != id) {
            // It may be the very node that carries for this peer.
            *held = None;
        }
        let carrier = peer.through.and_then(|by| self.peers.get(by.0 as usize)?.as_ref()?.carrier());
        let carrier = carrier.filter(|carrier| carrier.ready(now)).map(|carrier| (carrier, name_of(&peer.key)));
        if peer.traffic.needs_watching() {
            sink.notice(Notice::Active(id));
        }
        if peer.hold.as_ref().is_some_and(|hold| !hold.is_over(now)) {
            while let Some(packet) = packets.next() {
                self.wait_in_line(id, packet);
            }
            return;
        }
        // 4 session: lock it once for the peer's run of packets
        if held.as_ref().is_none_or(|(holder, _)| *holder != id) {
            *held = peer.tunnel.as_ref().map(|tunnel| (id, tunnel.lock_arc()));
        }
        let ready = |tunnel: &Tunnel| peer.path != Path::None && tunnel.can_send(now);
        let Some((_, tunnel)) = held.as_mut().filter(|(_, tunnel)| ready(tunnel)) else {
            *held = None;
            // They are made to fit when it is known what they must fit.
            while let Some(packet) = packets.next() {
                self.stage(id, packet, now, sink);
            }
            return;
        };
        // 5 fit, 6 seal, 7 path, 8 queue
        let mut seal = Seal { tunnel, carrier, drops: &self.drops, sent: 0, now };
        while let Some(packet) = packets.next() {
            if packet.len() <= usize::from(limit) {
                seal.send(packet, peer, &mut self.scratch, sink);
                continue;
            }
            match self.fit.fit(packet, limit, now) {
                Fitted::Pieces(mut pieces) => {
                    while let Some(piece) = pieces.next() {
                        seal.send(piece, peer, &mut self.scratch, sink);
                    }
                }
                Fitted::Whole => seal.relayed(packet, peer, &mut self.scratch, sink),
                Fitted::Refused(told) => {
                    self.drops.count(Drop::TooBig);
                    if let Some(mut error) = told {
                        // Whoever sent the packet knows its own address only.
                        if let Some(aliases) = &self.aliases
                            && let Ok(destination) = ip::destination(&error)
                        {
                            aliases.arrive(&mut error, destination);
                        }
                        sink.to_tun(&error);
                    }
                }
            }
        }
        if seal.sent > 0 {
            peer.traffic.sent(seal.sent, now);
        }
    }

    fn stage(&mut self, id: PeerId, packet: &[u8], now: Now, sink: &mut impl OutboundSink) {
        let Some(peer) = self.peers.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        if self.staged_total >= STAGED_TOTAL && peer.staged.is_empty() {
            self.drops.count(Drop::StagedOverflow);
            return;
        }
        if peer.staged.len() >= STAGED_PER_PEER || self.staged_total >= STAGED_TOTAL {
            let oldest = peer.staged.pop_front();
            self.staged_total -= oldest.map_or(0, |(_, packet)| weight(&packet));
            self.drops.count(Drop::StagedOverflow);
        }
        let first = peer.staged.is_empty();
        peer.staged.push_back((now, packet.to_vec()));
        self.staged_total += weight(packet);
        if first || peer.reminded.is_none_or(|at| now.since(at) >= REMIND) {
            peer.reminded = Some(now);
            sink.notice(Notice::NeedSession(id));
        }
    }

    fn wait_in_line(&mut self, id: PeerId, packet: &[u8]) {
        let Self { peers, held_bytes, drops, .. } = self;
        let hold = peers.get_mut(id.0 as usize).and_then(Option::as_mut).and_then(|peer| peer.hold.as_mut());
        let dropped = hold.map_or(0, |hold| hold.push(packet, held_bytes));
        drops.add(Drop::HeldOverflow, dropped as u64);
    }

    fn drop_staged(&mut self, id: PeerId, why: Drop) {
        let Some(peer) = self.peer_mut(id) else { return };
        let dropped = std::mem::take(&mut peer.staged);
        self.staged_total -= dropped.iter().map(|(_, packet)| weight(packet)).sum::<usize>();
        self.drops.add(why, dropped.len() as u64);
    }

    fn peer_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(id.0 as usize).and_then(Option::as_mut)
    }
}

impl Peer {
    /// The direct way to it, for what is passed on.
    fn carrier(&self) -> Option<Carrier> {
        let Path::Direct { socket, remote } = self.path else { return None };
        let (tunnel, traffic) = (Arc::clone(self.tunnel.as_ref()?), Arc::clone(&self.traffic));
        Some(Carrier { tunnel, to: Destination::Udp { socket, remote }, traffic })
    }

    /// How long packets may be.
    fn limit(&self) -> u16 {
        match self.path {
            Path::None | Path::Relay => BASE,
            Path::Direct { .. } => self.mtu,
            Path::Both { .. } => self.mtu.min(BASE),
        }
    }
}

/// The direct way in a path.
const fn way(path: &Path) -> Option<(SocketId, SocketAddr)> {
    match path {
        Path::None | Path::Relay => None,
        Path::Direct { socket, remote } | Path::Both { socket, remote } => Some((*socket, *remote)),
    }
}

/// One packet, or those of a superpacket. Not an iterator: a packet is gone when the next is asked for.
enum Packets<'a> {
    One(Option<&'a [u8]>),
    Cut(Cut<'a>),
}

impl Packets<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        match self {
            Self::One(packet) => packet.take(),
            Self::Cut(cut) => cut.next(),
        }
    }
}

/// A run of packets of one peer.
struct Seal<'a> {
    tunnel: &'a mut Tunnel,
    /// Who carries what goes by relay, and the peer as it is named there.
    carrier: Option<(Carrier, Name)>,
    drops: &'a Drops,
    /// Inner bytes sealed.
    sent: usize,
    now: Now,
}

impl Seal<'_> {
    /// Sends a packet that fits the way its peer's packets go.
    fn send(&mut self, packet: &[u8], peer: &Peer, scratch: &mut Vec<u8>, sink: &mut impl OutboundSink) {
        match peer.path {
            Path::None => self.drops.count(Drop::NoPath),
            Path::Relay => self.relayed(packet, peer, scratch, sink),
            Path::Direct { socket, remote } => self.straight(packet, &Destination::Udp { socket, remote }, sink),
            Path::Both { socket, remote } => {
                let ways = [Destination::Relay { peer: peer.key }, Destination::Udp { socket, remote }];
                self.both_ways(packet, &ways, scratch, sink);
            }
        }
    }

    /// Sends a packet by relay: in the session with the node that carries for this peer, or through the coordinator.
    fn relayed(&mut self, packet: &[u8], peer: &Peer, scratch: &mut Vec<u8>, sink: &mut impl OutboundSink) {
        let fits = packet.len() + DATA_OVERHEAD + PASS_OVERHEAD <= PROVEN;
        let Some((carrier, name)) = self.carrier.as_ref().filter(|_| fits) else {
            return self.straight(packet, &Destination::Relay { peer: peer.key }, sink);
        };
        scratch.resize(PASS_OVERHEAD + room_for(packet), 0);
        let Some(len) = self.tunnel.seal(packet, &mut scratch[PASS_OVERHEAD..], self.now) else {
            self.drops.count(Drop::NoPath);
            return;
        };
        scratch.truncate(PASS_OVERHEAD + len);
        scratch[..PASS_OVERHEAD].copy_from_slice(&pass_header(false, name, len));
        self.sent += packet.len();
        carrier.send(scratch, ip::ecn(packet), self.drops, self.now, sink);
    }

    /// Seals `packet` straight into the buffer that will be sent.
    fn straight(&mut self, packet: &[u8], to: &Destination, sink: &mut impl OutboundSink) {
        let Some(room) = sink.room(to, ip::ecn(packet), room_for(packet)) else {
            self.drops.count(busy(to));
            return;
        };
        match self.tunnel.seal(packet, room, self.now) {
            Some(len) => {
                self.sent += packet.len();
                sink.commit(len);
            }
            None => self.drops.count(Drop::NoPath),
        }
    }

    /// Seals `packet` once and queues it twice.
    fn both_ways(&mut self, packet: &[u8], ways: &[Destination], scratch: &mut Vec<u8>, sink: &mut impl OutboundSink) {
        scratch.resize(room_for(packet), 0);
        let Some(len) = self.tunnel.seal(packet, scratch, self.now) else {
            self.drops.count(Drop::NoPath);
            return;
        };
        self.sent += packet.len();
        for to in ways {
            match sink.room(to, ip::ecn(packet), len) {
                Some(room) => {
                    room[..len].copy_from_slice(&scratch[..len]);
                    sink.commit(len);
                }
                None => self.drops.count(busy(to)),
            }
        }
    }
}

/// A direct way to a node, in whose session something is passed on.
#[derive(Debug)]
struct Carrier {
    tunnel: Arc<Mutex<Tunnel>>,
    to: Destination,
    traffic: Arc<Traffic>,
}

impl Carrier {
    fn ready(&self, now: Now) -> bool {
        self.tunnel.lock().can_send(now)
    }

    /// Seals a message. True: it goes.
    fn send(&self, message: &[u8], ecn: u8, drops: &Drops, now: Now, sink: &mut impl OutboundSink) -> bool {
        let Some(room) = sink.room(&self.to, ecn, room_for(message)) else {
            drops.count(busy(&self.to));
            return false;
        };
        let Some(len) = self.tunnel.lock().seal(message, room, now) else {
            drops.count(Drop::NoPath);
            return false;
        };
        sink.commit(len);
        // The path is watched as under any traffic.
        self.traffic.sent(message.len(), now);
        true
    }
}

/// What a packet that waits counts for.
const fn weight(packet: &[u8]) -> usize {
    packet.len().div_ceil(BASE as usize)
}

fn room_for(packet: &[u8]) -> usize {
    (packet.len() + DATA_OVERHEAD).max(MIN_ROOM)
}

const fn busy(to: &Destination) -> Drop {
    match to {
        Destination::Udp { .. } => Drop::SendFailed,
        Destination::Relay { .. } => Drop::RelayBusy,
    }
}

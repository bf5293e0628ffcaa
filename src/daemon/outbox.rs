//! Where the packet machines write: memory handed out before anything is sealed or opened, sent after every lock is
//! released. Sealed datagrams of one size to one peer leave as a train, opened packets of one flow as a superpacket.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::daemon::relay_carrier::RelayCarrier;
use crate::daemon::relay_thread::RelayHandle;
use crate::engine::counters::{Counter, Counters};
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Notice, PeerId, SocketId, Via};
use crate::engine::packet::{Destination, InboundSink, OutboundSink};
use crate::engine::steer::Steering;
use crate::os::streams::Streams;
use crate::os::train::{MAX_BYTES, MAX_DATAGRAMS, SendError, Sender};
use crate::os::tun::{FromKernel, Tun};
use crate::os::udp::{Outgoing, UdpSockets};
use crate::time::Now;
use crate::wire::keys::WgKey;
use crate::wire::offload::Merger;
use crate::wire::relay_udp::HEADER;

/// Bytes of datagrams that one turn may produce: 128 staged packets and a batch, sealed, twice over.
const DATAGRAM_ROOM: usize = 1 << 20;
/// Bytes of inner packets that wait for the TUN device before they are written.
const TUN_ROOM: usize = 256 << 10;
/// How far the datagrams of a train may lie apart among those of others.
const LOOK_AHEAD: usize = 2 * MAX_DATAGRAMS;

/// A block of memory that items are written into one after the other.
#[derive(Debug)]
struct Arena<M> {
    bytes: Box<[u8]>,
    used: usize,
    open: Option<M>,
}

impl<M> Arena<M> {
    fn new(size: usize) -> Self {
        // Zeroed memory from the system is not resident until it is written to.
        Self { bytes: vec![0; size].into_boxed_slice(), used: 0, open: None }
    }

    const fn has_room(&self, max: usize) -> bool {
        self.bytes.len() - self.used >= max
    }

    fn room(&mut self, max: usize, meta: M) -> Option<&mut [u8]> {
        let room = self.bytes.get_mut(self.used..self.used.checked_add(max)?)?;
        self.open = Some(meta);
        Some(room)
    }

    /// Where the item in the room handed out last is, if there is one.
    fn commit(&mut self, len: usize) -> Option<(Range<usize>, M)> {
        let meta = self.open.take()?;
        let end = (self.used + len).min(self.bytes.len());
        let place = self.used..end;
        self.used = end;
        Some((place, meta))
    }

    fn clear(&mut self) {
        self.used = 0;
        self.open = None;
    }
}

/// A datagram that waits to be sent. One that is relayed has room for a header in front.
#[derive(Debug)]
struct Waiting {
    place: Range<usize>,
    to: Destination,
    ecn: u8,
    gone: bool,
}

/// Bytes in front of a datagram: the header it gets if it is relayed by UDP.
const fn head_room(to: &Destination) -> usize {
    match to {
        Destination::Udp { .. } => 0,
        Destination::Relay { .. } => HEADER,
    }
}

/// Both sinks of one data worker.
#[derive(Debug)]
pub(super) struct Outbox {
    tun: Tun,
    sockets: Arc<UdpSockets>,
    sender: Sender,
    relay: RelayHandle,
    streams: Streams,
    notices: Notices,
    /// Told after the locks are released.
    untold: Vec<Notice>,
    drops: Arc<Drops>,
    counters: Arc<Counters>,
    datagrams: Arena<(Destination, u8)>,
    waiting: Vec<Waiting>,
    inner: Arena<()>,
    merger: Merger,
    steering: Steering,
    /// Peers whose staged packets can go now.
    pub(super) established: Vec<PeerId>,
    /// When this turn began.
    now: Now,
}

impl Outbox {
    pub(super) fn new(
        tun: Tun,
        sockets: Arc<UdpSockets>,
        relay: RelayHandle,
        streams: Streams,
        notices: Notices,
        drops: Arc<Drops>,
        counters: Arc<Counters>,
    ) -> Self {
        let (offload, steering) = (tun.offload(), Steering::new(tun.queues().len()));
        Self {
            tun,
            sender: sockets.sender(),
            sockets,
            relay,
            streams,
            notices,
            untold: Vec::new(),
            drops,
            counters,
            datagrams: Arena::new(DATAGRAM_ROOM),
            waiting: Vec::new(),
            inner: Arena::new(TUN_ROOM),
            merger: Merger::new(offload.tcp, offload.udp),
            steering,
            established: Vec::new(),
            now: Now::ZERO,
        }
    }

    /// Reads one queue of the TUN device. True: nothing is left in it.
    ///
    /// # Errors
    /// The device is gone for good.
    pub(super) fn read_tun(&mut self, queue: usize, into: &mut FromKernel) -> io::Result<bool> {
        let empty = self.tun.receive(queue, into)?;
        let (packets, bytes) = into.size();
        let mut superpackets = 0;
        for (packet, _) in into.packets().filter(|(_, offload)| offload.is_super()) {
            self.steering.superpacket(packet, self.now);
            superpackets += 1;
        }
        self.counters.add(Counter::TunInBatches, 1);
        self.counters.add(Counter::TunInPackets, packets);
        self.counters.add(Counter::TunInSuper, superpackets);
        self.counters.add(Counter::TunInBytes, bytes);
        Ok(empty)
    }

    /// Whether a queue of the TUN device may be read now. Asked again for each in order, with whether the first was found
    /// empty.
    pub(super) fn may_read(&mut self, queue: usize, first_is_empty: bool) -> bool {
        self.steering.may_read(queue, first_is_empty)
    }

    /// The TUN device.
    pub(super) const fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Counts drops.
    pub(super) fn count(&self, why: Drop, n: usize) {
        self.drops.add(why, n as u64);
    }

    /// What carries relayed packets.
    pub(super) const fn carrier(&self) -> &Arc<RelayCarrier> {
        self.relay.carrier()
    }

    /// The TCP connections to peers.
    pub(super) const fn streams(&mut self) -> &mut Streams {
        &mut self.streams
    }

    /// The same, only to look at.
    pub(super) const fn streams_ref(&self) -> &Streams {
        &self.streams
    }

    /// Queues a datagram in a TCP connection.
    pub(super) fn queue_in_stream(&mut self, socket: SocketId, datagram: &[u8]) {
        if !self.streams.send(socket, datagram) {
            self.drops.count(Drop::StreamFull);
        }
    }

    /// Connections that can be read from now, after what waited in others was written.
    pub(super) fn ready_streams(&mut self, into: &mut Vec<SocketId>) {
        let mut broken = Vec::new();
        self.streams.ready(into, &mut broken);
        self.untold.extend(broken.into_iter().map(Notice::StreamClosed));
    }

    fn flush_streams(&mut self) {
        let mut broken = Vec::new();
        self.streams.flush(&mut broken);
        self.untold.extend(broken.into_iter().map(Notice::StreamClosed));
    }

    /// Counts datagrams that came together.
    pub(super) fn count_received(&self, datagrams: usize, bytes: usize) {
        self.counters.add(Counter::UdpInReceives, 1);
        self.counters.add(Counter::UdpInDatagrams, datagrams);
        self.counters.add(Counter::UdpInTrains, usize::from(datagrams > 1));
        self.counters.add(Counter::UdpInBytes, bytes);
    }

    /// A turn begins.
    pub(super) fn begin(&mut self, now: Now) {
        self.now = now;
        self.counters.add(Counter::Turns, 1);
    }

    /// Sends and delivers everything written so far.
    pub(super) fn flush(&mut self) {
        self.flush_tun();
        self.flush_datagrams();
        for notice in self.untold.drain(..) {
            self.notices.tell(notice);
        }
    }

    /// Makes sure that inner packets of `max` bytes together can be written without anything being delivered meanwhile.
    pub(super) fn reserve_tun(&mut self, max: usize) {
        if !self.inner.has_room(max) {
            self.flush_tun();
        }
    }

    fn flush_tun(&mut self) {
        let Self { inner, merger, tun, steering, drops, counters, now, .. } = self;
        if merger.is_empty() {
            return;
        }
        counters.add(Counter::TunOutBytes, inner.used);
        let (mut writes, mut written, mut joined) = (0, 0, 0);
        merger.drain(&mut inner.bytes, |offload, memory, pieces| {
            let packets = pieces.packets();
            (writes, written, joined) = (writes + 1, written + packets, joined + usize::from(packets > 1));
            let queue = steering.queue(&memory[pieces.first()], *now);
            if let Err(why) = tun.send(queue, offload, memory, pieces) {
                let name = if why.is_full() { Drop::TunFull } else { Drop::TunRefused };
                drops.add(name, packets as u64);
                tracing::trace!(%why, packets, "the kernel refused a packet");
            }
        });
        inner.clear();
        counters.add(Counter::TunOutWrites, writes);
        counters.add(Counter::TunOutPackets, written);
        counters.add(Counter::TunOutSuper, joined);
    }

    fn flush_datagrams(&mut self) {
        self.address_relayed(self.now);
        for first in 0..self.waiting.len() {
            let Waiting { to, ecn, gone, .. } = self.waiting[first];
            match to {
                _ if gone => {}
                Destination::Udp { socket, .. } if socket.is_stream() => {
                    let datagram = &self.datagrams.bytes[self.waiting[first].place.clone()];
                    if !self.streams.send(socket, datagram) {
                        self.drops.count(Drop::StreamFull);
                    }
                }
                Destination::Udp { socket, remote } => self.send_train(first, socket, remote, ecn),
                Destination::Relay { peer } => self.relay(first, peer),
            }
        }
        self.waiting.clear();
        self.datagrams.clear();
        self.flush_streams();
    }

    /// What is relayed by UDP goes to the relay's address from here on, like what goes to a peer's.
    fn address_relayed(&mut self, now: Now) {
        let Self { waiting, datagrams, relay, .. } = self;
        let mut relayed = waiting.iter_mut().filter(|w| matches!(w.to, Destination::Relay { .. })).peekable();
        if relayed.peek().is_none() {
            return;
        }
        relay.carrier().with(|carrier| {
            for item in relayed {
                let Destination::Relay { peer } = item.to else { continue };
                if let Some(remote) = carrier.seal(&peer, &mut datagrams.bytes[item.place.clone()], now) {
                    item.to = Destination::Udp { socket: SocketId::for_remote(&remote), remote };
                }
            }
        });
    }

    /// Sends the datagram, and what can go with it of what comes after.
    fn send_train(&mut self, first: usize, socket: SocketId, remote: SocketAddr, ecn: u8) {
        let bytes = &self.datagrams.bytes;
        let size = self.waiting[first].place.len();
        let mut place = self.waiting[first].place.clone();
        let (mut pieces, mut used) = ([IoSlice::new(&[]); MAX_DATAGRAMS], 0);
        let (mut datagrams, mut total) = (1, size);
        let to = Destination::Udp { socket, remote };
        for next in self.waiting.iter_mut().skip(first + 1).take(LOOK_AHEAD) {
            if next.to != to {
                continue;
            }
            let len = next.place.len();
            // What does not fit in ends the train: nothing to the same peer may overtake it.
            if next.ecn != ecn || len > size || datagrams == MAX_DATAGRAMS || total + len > MAX_BYTES {
                break;
            }
            if next.place.start == place.end {
                place.end = next.place.end;
            } else if used + 1 == MAX_DATAGRAMS {
                break;
            } else {
                pieces[used] = IoSlice::new(&bytes[place]);
                used += 1;
                place = next.place.clone();
            }
            next.gone = true;
            datagrams += 1;
            total += len;
            if len < size {
                break;
            }
        }
        pieces[used] = IoSlice::new(&bytes[place]);
        let train = Outgoing { socket, remote, ecn, size, pieces: &pieces[..=used] };
        let result = self.sockets.send_train(&mut self.sender, &train, self.now);
        self.counters.add(Counter::UdpOutSends, 1);
        self.counters.add(Counter::UdpOutDatagrams, result.sent);
        self.counters.add(Counter::UdpOutTrains, usize::from(result.as_train));
        self.counters.add(Counter::UdpOutUncoupled, usize::from(!result.as_train && datagrams > 1));
        self.counters.add(Counter::UdpOutWaits, usize::from(result.waited));
        self.counters.add(Counter::UdpOutBytes, total);
        if let Some(why) = result.error {
            self.drops.add(refused(why), result.failed as u64);
            tracing::trace!(%why, datagrams = result.failed, "datagrams were not sent");
            if why == SendError::TooBig {
                self.untold.push(Notice::TooLong { via: Via::Udp { socket, remote }, len: size });
            }
            if why == SendError::Unreachable {
                self.relay.carrier().with(|carrier| carrier.send_failed(remote, self.now));
            }
        }
    }

    fn relay(&self, item: usize, peer: WgKey) {
        let bytes = &self.datagrams.bytes[self.waiting[item].place.clone()];
        self.relay.packet(peer, bytes.get(HEADER..).unwrap_or_default().to_vec());
    }

    /// Tries again to tell the planner what it had no room for. True: nothing is left.
    pub(super) fn retry_notices(&mut self) -> bool {
        self.notices.retry()
    }
}

/// What it is called that a datagram was not sent.
pub(super) const fn refused(why: SendError) -> Drop {
    match why {
        SendError::Full => Drop::SendBufferFull,
        SendError::TooBig => Drop::TooBig,
        SendError::Unreachable | SendError::Refused(_) => Drop::SendFailed,
    }
}

impl OutboundSink for Outbox {
    fn room(&mut self, to: &Destination, ecn: u8, max: usize) -> Option<&mut [u8]> {
        if matches!(to, Destination::Relay { .. }) && !self.relay.has_room() {
            return None;
        }
        let head = head_room(to);
        self.datagrams.room(head + max, (*to, ecn))?.get_mut(head..)
    }

    fn commit(&mut self, len: usize) {
        let head = self.datagrams.open.as_ref().map_or(0, |(to, _)| head_room(to));
        if let Some((place, (to, ecn))) = self.datagrams.commit(head + len) {
            self.waiting.push(Waiting { place, to, ecn, gone: false });
        }
    }

    fn to_tun(&mut self, packet: &[u8]) {
        self.tun_room(packet.len()).copy_from_slice(packet);
        self.tun_commit(packet.len());
    }

    fn notice(&mut self, notice: Notice) {
        self.untold.push(notice);
    }
}

impl InboundSink for Outbox {
    fn tun_room(&mut self, max: usize) -> &mut [u8] {
        self.reserve_tun(max);
        // A datagram is at most 64 KiB, and the arena is empty now.
        self.inner.room(max, ()).unwrap_or_default()
    }

    fn tun_commit(&mut self, len: usize) {
        if let Some((place, ())) = self.inner.commit(len) {
            self.merger.add(&self.inner.bytes, place);
        }
    }

    fn reply(&mut self, via: &Via, bytes: &[u8]) {
        let to = match via {
            Via::Udp { socket, remote } => Destination::Udp { socket: *socket, remote: *remote },
            Via::Relay { peer } => Destination::Relay { peer: *peer },
        };
        let head = head_room(&to);
        match self.datagrams.room(head + bytes.len(), (to, 0)) {
            Some(room) => {
                room[head..].copy_from_slice(bytes);
                OutboundSink::commit(self, bytes.len());
            }
            None => self.drops.count(Drop::SendFailed),
        }
    }

    fn notice(&mut self, notice: Notice) {
        self.untold.push(notice);
    }

    fn established(&mut self, peer: PeerId) {
        if !self.established.contains(&peer) {
            self.established.push(peer);
        }
    }
}

/// The way to the planner. Datagrams are dropped by name when their queue is full; everything else is said once and kept
/// until it is heard.
#[derive(Debug)]
pub(super) struct Notices {
    slow: mpsc::Sender<Notice>,
    facts: mpsc::Sender<Notice>,
    kept: Vec<Notice>,
    drops: Arc<Drops>,
}

impl Notices {
    pub(super) const fn new(slow: mpsc::Sender<Notice>, facts: mpsc::Sender<Notice>, drops: Arc<Drops>) -> Self {
        Self { slow, facts, kept: Vec::new(), drops }
    }

    fn tell(&mut self, notice: Notice) {
        if matches!(notice, Notice::Slow { .. } | Notice::Message { .. }) {
            if self.slow.try_send(notice).is_err() {
                self.drops.count(Drop::SlowQueueFull);
            }
        } else if !self.kept.is_empty() {
            self.keep(notice);
        } else if let Err(e) = self.facts.try_send(notice) {
            self.keep(e.into_inner());
        }
    }

    /// One of each kind and peer is enough, so this cannot grow beyond a few times the number of peers.
    fn keep(&mut self, notice: Notice) {
        if !self.kept.contains(&notice) {
            self.kept.push(notice);
        }
    }

    fn retry(&mut self) -> bool {
        while let Some(first) = self.kept.first() {
            if self.facts.try_send(first.clone()).is_err() {
                return false;
            }
            self.kept.remove(0);
        }
        true
    }
}

/// A relayed datagram on its way in.
pub(super) type FromRelay = crate::daemon::relay_thread::Relayed<Bytes>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_keeps_what_was_committed_in_order_and_forgets_what_was_not() {
        let mut arena = Arena::new(10);
        arena.room(4, 'a').unwrap().copy_from_slice(b"aaaa");
        assert_eq!(arena.commit(2), Some((0..2, 'a')));
        arena.room(6, 'x').unwrap().fill(b'x');
        arena.room(3, 'b').unwrap().copy_from_slice(b"bbb");
        assert_eq!(arena.commit(3), Some((2..5, 'b')));
        assert_eq!(arena.commit(3), None);
        assert!(arena.room(6, 'c').is_none(), "five bytes are left");
        assert_eq!(arena.bytes[..5], *b"aabbb");
        arena.clear();
        assert!(arena.has_room(10));
    }

    #[test]
    fn facts_survive_a_full_queue_and_datagrams_are_dropped_by_name() {
        let drops = Arc::new(Drops::default());
        let (slow, _slow) = mpsc::channel(1);
        let (facts, mut heard) = mpsc::channel(1);
        let mut notices = Notices::new(slow, facts, Arc::clone(&drops));
        let via = Via::Relay { peer: WgKey([1; 32]) };
        for _ in 0..3 {
            notices.tell(Notice::Slow { via, bytes: vec![1] });
        }
        assert_eq!(drops.get(Drop::SlowQueueFull), 2);
        for n in [0, 1, 1, 2, 1] {
            notices.tell(Notice::NeedSession(PeerId(n)));
        }
        let mut got = Vec::new();
        while !notices.retry() {
            got.push(heard.try_recv().unwrap());
        }
        got.push(heard.try_recv().unwrap());
        assert_eq!(got, [0, 1, 2].map(|n| Notice::NeedSession(PeerId(n))));
    }
}

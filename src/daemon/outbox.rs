//! Where the packet machines write: memory handed out before anything is sealed, sent after every lock is released.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::daemon::relay_thread::RelayHandle;
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Notice, PeerId, Via};
use crate::engine::packet::{Destination, InboundSink, OutboundSink};
use crate::os::tun::Tun;
use crate::os::udp::UdpSockets;

/// Bytes of datagrams that one turn may produce: 128 staged packets and a batch, sealed, twice over.
const DATAGRAM_ROOM: usize = 1 << 20;
/// Bytes of inner packets that wait for the TUN device before they are written.
const TUN_ROOM: usize = 256 << 10;

/// A block of memory that items are written into one after the other.
#[derive(Debug)]
struct Arena<M> {
    bytes: Box<[u8]>,
    used: usize,
    open: Option<M>,
    items: Vec<(Range<usize>, M)>,
}

impl<M> Arena<M> {
    fn new(size: usize) -> Self {
        // Zeroed memory from the system is not resident until it is written to.
        Self { bytes: vec![0; size].into_boxed_slice(), used: 0, open: None, items: Vec::new() }
    }

    fn has_room(&self, max: usize) -> bool {
        self.bytes.len() - self.used >= max
    }

    fn room(&mut self, max: usize, meta: M) -> Option<&mut [u8]> {
        let room = self.bytes.get_mut(self.used..self.used.checked_add(max)?)?;
        self.open = Some(meta);
        Some(room)
    }

    fn commit(&mut self, len: usize) {
        if let Some(meta) = self.open.take() {
            let end = (self.used + len).min(self.bytes.len());
            self.items.push((self.used..end, meta));
            self.used = end;
        }
    }

    /// Hands every item to `each`, in order, and begins anew.
    fn drain(&mut self, mut each: impl FnMut(&M, &[u8])) {
        for (range, meta) in &self.items {
            each(meta, &self.bytes[range.clone()]);
        }
        self.items.clear();
        self.used = 0;
        self.open = None;
    }
}

/// Both sinks of one data worker.
#[derive(Debug)]
pub(super) struct Outbox {
    tun: Tun,
    sockets: Arc<UdpSockets>,
    relay: RelayHandle,
    notices: Notices,
    drops: Arc<Drops>,
    datagrams: Arena<Destination>,
    inner: Arena<()>,
    /// Peers whose staged packets can go now.
    pub(super) established: Vec<PeerId>,
}

impl Outbox {
    pub(super) fn new(
        tun: Tun,
        sockets: Arc<UdpSockets>,
        relay: RelayHandle,
        notices: Notices,
        drops: Arc<Drops>,
    ) -> Self {
        Self {
            tun,
            sockets,
            relay,
            notices,
            drops,
            datagrams: Arena::new(DATAGRAM_ROOM),
            inner: Arena::new(TUN_ROOM),
            established: Vec::new(),
        }
    }

    /// The TUN device.
    pub(super) const fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Sends and delivers everything written so far.
    pub(super) fn flush(&mut self) {
        self.flush_tun();
        let Self { datagrams, sockets, relay, drops, .. } = self;
        datagrams.drain(|to, bytes| match to {
            Destination::Udp { socket, remote } => {
                if let Err(why) = sockets.send(*socket, remote, bytes) {
                    drops.count(Drop::SendFailed);
                    tracing::trace!(%why, "a datagram was not sent");
                }
            }
            Destination::Relay { peer } => relay.packet(*peer, bytes.to_vec()),
        });
    }

    fn flush_tun(&mut self) {
        let Self { inner, tun, drops, .. } = self;
        inner.drain(|(), packet| {
            if let Err(why) = tun.send(packet) {
                drops.count(Drop::TunRefused);
                tracing::trace!(%why, "the kernel refused a packet");
            }
        });
    }

    /// Tries again to tell the planner what it had no room for. True: nothing is left.
    pub(super) fn retry_notices(&mut self) -> bool {
        self.notices.retry()
    }
}

impl OutboundSink for Outbox {
    fn room(&mut self, to: &Destination, max: usize) -> Option<&mut [u8]> {
        if matches!(to, Destination::Relay { .. }) && !self.relay.has_room() {
            return None;
        }
        self.datagrams.room(max, *to)
    }

    fn commit(&mut self, len: usize) {
        self.datagrams.commit(len);
    }

    fn to_tun(&mut self, packet: &[u8]) {
        self.tun_room(packet.len()).copy_from_slice(packet);
        self.tun_commit(packet.len());
    }

    fn notice(&mut self, notice: Notice) {
        self.notices.tell(notice);
    }
}

impl InboundSink for Outbox {
    fn tun_room(&mut self, max: usize) -> &mut [u8] {
        if !self.inner.has_room(max) {
            self.flush_tun();
        }
        // A datagram is at most 64 KiB, and the arena is empty now.
        self.inner.room(max, ()).unwrap_or_default()
    }

    fn tun_commit(&mut self, len: usize) {
        self.inner.commit(len);
    }

    fn reply(&mut self, via: &Via, bytes: &[u8]) {
        let to = match via {
            Via::Udp { socket, remote } => Destination::Udp { socket: *socket, remote: *remote },
            Via::Relay { peer } => Destination::Relay { peer: *peer },
        };
        match self.datagrams.room(bytes.len(), to) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.datagrams.commit(bytes.len());
            }
            None => self.drops.count(Drop::SendFailed),
        }
    }

    fn notice(&mut self, notice: Notice) {
        self.notices.tell(notice);
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
        if matches!(notice, Notice::Slow { .. }) {
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
        arena.commit(2);
        arena.room(6, 'x').unwrap().fill(b'x');
        arena.room(3, 'b').unwrap().copy_from_slice(b"bbb");
        arena.commit(3);
        arena.commit(3);
        assert!(arena.room(6, 'c').is_none(), "five bytes are left");
        let mut got = Vec::new();
        arena.drain(|meta, bytes| got.push((*meta, bytes.to_vec())));
        assert_eq!(got, [('a', b"aa".to_vec()), ('b', b"bbb".to_vec())]);
        assert!(arena.has_room(10));
    }

    #[test]
    fn facts_survive_a_full_queue_and_datagrams_are_dropped_by_name() {
        let drops = Arc::new(Drops::default());
        let (slow, _slow) = mpsc::channel(1);
        let (facts, mut heard) = mpsc::channel(1);
        let mut notices = Notices::new(slow, facts, Arc::clone(&drops));
        let via = Via::Relay { peer: crate::wire::keys::WgKey([1; 32]) };
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

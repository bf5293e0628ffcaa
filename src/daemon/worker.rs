//! The packet loop: TUN, UDP and relay, both directions, in batches. Waits only for the kernel.
//!
//! A turn: wait until something is readable; receive at most one batch from every ready source; take the planner's
//! updates (so that whoever may act on an update finds it applied); carry what came; send what that produced. A batch is
//! what is there: nothing waits for it to fill.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::sync::oneshot;

use crate::daemon::outbox::{FromRelay, Outbox};
use crate::daemon::tcp::ToStreams;
use crate::engine::drops::Drop;
use crate::engine::inbound::{Inbound, ToRelay};
use crate::engine::io::{Notice, SocketId, Update, Via};
use crate::engine::outbound::Outbound;
use crate::engine::packet::{Arrival, FromTun, MIN_ROOM, OutboundSink};
use crate::os::clock;
use crate::os::streams::{Arrived, End};
use crate::os::train::{Train, Trains};
use crate::os::tun::{FromKernel, QUEUES};
use crate::os::udp::UdpSockets;
use crate::os::wake::Wake;
use crate::time::Now;
use crate::wire::classify::RELAY_DATAGRAM;
use crate::wire::relay_udp::HEADER;

/// Relayed packets in one turn.
const BATCH: usize = 64;
/// Inner bytes that one train of datagrams may hold.
const TRAIN: usize = 1 << 16;
/// How often TCP connections are looked at that should be closed, while there are any.
const EXPIRE: Duration = Duration::from_millis(500);
/// How soon the planner is told again what it had no room for.
const RETRY_MS: u16 = 10;

/// Everything the data thread owns.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) outbound: Outbound,
    pub(super) inbound: Inbound,
    pub(super) outbox: Outbox,
    pub(super) sockets: Arc<UdpSockets>,
    pub(super) updates: Receiver<Update>,
    pub(super) relayed: Receiver<FromRelay>,
    pub(super) streams: Receiver<ToStreams>,
    pub(super) wake: Wake,
    pub(super) stop: Arc<AtomicBool>,
}

/// Starts the thread `meshd-data-0`. The receiver gets why it ended: nothing if it was told to.
///
/// # Errors
/// The system gives no thread.
pub(super) fn start(worker: Worker) -> io::Result<oneshot::Receiver<io::Result<()>>> {
    let (tell, ended) = oneshot::channel();
    std::thread::Builder::new().name("meshd-data-0".into()).spawn(move || {
        let result = worker.run();
        // Nobody listens any more when the whole process is ending.
        let _ = tell.send(result);
    })?;
    Ok(ended)
}

/// Where a datagram really came from; nothing if it was between the relay and the carrier; or why it is dropped.
type Origin = Result<Option<Via>, Drop>;

/// What became readable.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    tun: [bool; QUEUES],
    v4: bool,
    v6: bool,
    extra: bool,
    streams: bool,
}

/// What the kernel is to tell of: the numbers it tells by are those of the TUN queues, and these.
const WAKE: u64 = 100;
const V4: u64 = 101;
const V6: u64 = 102;
const EXTRA: u64 = 103;
const STREAMS: u64 = 104;

impl Worker {
    fn run(mut self) -> io::Result<()> {
        let poll = self.watch()?;
        let mut from_tun = FromKernel::default();
        let mut from_udp = Trains::default();
        let mut from_relay = Vec::with_capacity(BATCH);
        let mut origins = Vec::new();
        let mut readable = Vec::new();
        let mut from_stream = Arrived::default();
        loop {
            let heard = self.outbox.retry_notices();
            // A full batch from the relay may have left more behind, which nothing would wake us for.
            let patience = match (from_relay.len() == BATCH, heard) {
                (true, _) => EpollTimeout::ZERO,
                (false, false) => EpollTimeout::from(RETRY_MS),
                (false, true) => {
                    let expire = (!self.outbox.streams().is_empty()).then(|| clock::now() + EXPIRE);
                    self.outbound.next_release().into_iter().chain(expire).min().map_or(EpollTimeout::NONE, until)
                }
            };
            let ready = self.wait(&poll, patience)?;
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            from_relay.clear();
            from_relay.extend(self.relayed.try_iter().take(BATCH));
            let mut now = clock::now();
            self.outbox.begin(now);
            if !self.take_updates(now) {
                return Ok(());
            }
            self.look_after_streams(now);
            self.list_readable(&ready, &mut readable);
            for socket in readable.drain(..) {
                self.sockets.receive(socket, &mut from_udp);
                now = clock::now();
                // Whatever the planner let the sender know it told us before.
                if !self.take_updates(now) {
                    return Ok(());
                }
                self.carry_in(socket, &from_udp, &mut origins, now);
            }
            if ready.streams {
                self.outbox.ready_streams(&mut readable);
                for socket in readable.drain(..) {
                    let result = self.outbox.streams().receive(socket, &mut from_stream, now);
                    if !self.take_updates(now) {
                        return Ok(());
                    }
                    self.carry_stream_in(socket, &from_stream, now);
                    if let Err(end) = result {
                        self.stream_ended(socket, end);
                    }
                }
            }
            for relayed in &from_relay {
                self.inbound.handle_datagram(&Via::Relay { peer: relayed.peer }, &relayed.bytes, now, &mut self.outbox);
            }
            self.relay_for_others(now);
            self.flush_established(now);
            self.outbound.release(now, &mut self.outbox);
            self.outbox.flush();
            self.carry_out(&ready.tun, &mut from_tun, now)?;
        }
    }

    /// One batch from each queue, sent before the next is read.
    fn carry_out(&mut self, ready: &[bool; QUEUES], from_tun: &mut FromKernel, now: Now) -> io::Result<()> {
        let mut first_is_empty = !ready[0];
        for (queue, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            if !self.outbox.may_read(queue, first_is_empty) {
                continue;
            }
            let empty = self.outbox.read_tun(queue, from_tun)?;
            first_is_empty |= queue == 0 && empty;
            let packets = from_tun.packets().map(|(bytes, offload)| FromTun { bytes, offload });
            self.outbound.handle_tun(packets, now, &mut self.outbox);
            self.outbox.flush();
        }
        Ok(())
    }

    fn watch(&self) -> io::Result<Epoll> {
        let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let readable = |number| EpollEvent::new(EpollFlags::EPOLLIN, number);
        poll.add(self.wake.as_fd(), readable(WAKE))?;
        for (number, queue) in (0..).zip(self.outbox.tun().queues().take(QUEUES)) {
            poll.add(queue, readable(number))?;
        }
        for (number, socket) in [(V4, SocketId::V4), (V6, SocketId::V6)] {
            if let Some(socket) = self.sockets.descriptor(socket) {
                poll.add(socket, readable(number))?;
            }
        }
        poll.add(self.sockets.extra().descriptor(), readable(EXTRA))?;
        poll.add(self.outbox.streams_ref().descriptor(), readable(STREAMS))?;
        Ok(poll)
    }

    fn wait(&self, poll: &Epoll, patience: EpollTimeout) -> io::Result<Ready> {
        let mut events = [EpollEvent::empty(); QUEUES + 5];
        let count = match poll.wait(&mut events, patience) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let mut ready = Ready::default();
        for event in events.iter().take(count) {
            // An error condition counts as readable: the read then says what it is.
            match event.data() {
                WAKE => self.wake.silence(),
                V4 => ready.v4 = true,
                V6 => ready.v6 = true,
                EXTRA => ready.extra = true,
                STREAMS => ready.streams = true,
                queue => {
                    let queue = usize::try_from(queue).ok().and_then(|queue| ready.tun.get_mut(queue));
                    queue.into_iter().for_each(|ready| *ready = true);
                }
            }
        }
        Ok(ready)
    }

    fn list_readable(&self, ready: &Ready, into: &mut Vec<SocketId>) {
        into.extend(ready.v4.then_some(SocketId::V4));
        into.extend(ready.v6.then_some(SocketId::V6));
        if ready.extra {
            self.sockets.extra().ready(into);
        }
    }

    /// False: the planner is gone.
    fn take_updates(&mut self, now: Now) -> bool {
        loop {
            match self.updates.try_recv() {
                Ok(update) => {
                    match &update {
                        Update::Peer { peer, key, .. } => self.outbox.carrier().with(|c| c.peer(*peer, *key)),
                        Update::Gone(peer) => self.outbox.carrier().with(|c| c.peer_gone(*peer)),
                        _ => {}
                    }
                    let flushes = matches!(update, Update::Established(_));
                    self.inbound.apply(update.clone());
                    self.outbound.apply(update, now, &mut self.outbox);
                    if flushes {
                        self.outbox.flush();
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Takes what the planner wants done with TCP connections, and ends those that are of no use.
    fn look_after_streams(&mut self, now: Now) {
        while let Ok(order) = self.streams.try_recv() {
            let streams = self.outbox.streams();
            match order {
                ToStreams::Add { socket, remote, tcp } => {
                    if !streams.add(socket, remote, tcp, now) {
                        self.stream_ended(socket, End::Refused);
                    }
                }
                ToStreams::Send { socket, bytes } => self.outbox.queue_in_stream(socket, &bytes),
                ToStreams::Trust(socket) => streams.trust(socket),
                ToStreams::Close(socket) => streams.close(socket),
            }
        }
        let mut ended = Vec::new();
        self.outbox.streams().expire(now, &mut ended);
        for (socket, end) in ended {
            self.stream_ended(socket, end);
        }
        self.outbox.flush();
    }

    fn stream_ended(&mut self, socket: SocketId, end: End) {
        if end == End::Refused {
            self.outbox.count(Drop::StreamRefused, 1);
        }
        OutboundSink::notice(&mut self.outbox, Notice::StreamClosed(socket));
    }

    fn carry_stream_in(&mut self, socket: SocketId, arrived: &Arrived, now: Now) {
        let Some(remote) = arrived.remote else { return };
        let (count, bytes) = arrived.datagrams().fold((0, 0), |(n, bytes), d| (n + 1, bytes + d.len()));
        if count == 0 {
            return;
        }
        self.outbox.count_received(count, bytes);
        let arrival = Arrival::by(Via::Udp { socket, remote });
        self.inbound.handle_train(&arrival, arrived.datagrams(), now, &mut self.outbox);
    }

    fn carry_in(&mut self, socket: SocketId, trains: &Trains, origins: &mut Vec<Origin>, now: Now) {
        for train in trains.trains() {
            self.outbox.count_received(train.count(), train.bytes());
            // What is opened while a session is locked must find room.
            self.outbox.reserve_tun(TRAIN + MIN_ROOM);
            if train.datagrams().any(is_relayed) {
                self.carry_relayed_in(socket, &train, origins, now);
                continue;
            }
            let via = Via::Udp { socket, remote: train.from };
            let arrival = Arrival { via, ecn: train.ecn, waited: train.waited };
            self.inbound.handle_train(&arrival, train.datagrams(), now, &mut self.outbox);
        }
    }

    /// A train with relay datagrams in it: those of one peer go on together, as a train through the relay.
    fn carry_relayed_in(&mut self, socket: SocketId, train: &Train<'_>, origins: &mut Vec<Origin>, now: Now) {
        let Self { inbound, outbox, .. } = self;
        origins.clear();
        outbox.carrier().with(|carrier| {
            origins.extend(train.datagrams().map(|bytes| {
                if !is_relayed(bytes) {
                    return Ok(Some(Via::Udp { socket, remote: train.from }));
                }
                carrier.receive(bytes, train.from, now).map(|peer| peer.map(|peer| Via::Relay { peer }))
            }));
        });
        let mut datagrams = train.datagrams();
        for alike in origins.chunk_by(|a, b| a == b) {
            let datagrams = datagrams.by_ref().take(alike.len());
            match alike.first() {
                Some(Ok(Some(via))) => {
                    let head = if matches!(via, Via::Relay { .. }) { HEADER } else { 0 };
                    let payloads = datagrams.map(|bytes| bytes.get(head..).unwrap_or_default());
                    let arrival = Arrival { via: *via, ecn: train.ecn, waited: train.waited };
                    inbound.handle_train(&arrival, payloads, now, outbox);
                }
                // Between the relay and the carrier.
                Some(Ok(None)) | None => drop(datagrams.count()),
                Some(Err(why)) => outbox.count(*why, datagrams.count()),
            }
        }
    }

    /// What peers asked to be passed on in this turn.
    fn relay_for_others(&mut self, now: Now) {
        while let Some(ToRelay { from, to, payload }) = self.inbound.next_to_relay() {
            self.outbound.relay(from, to, &payload, now, &mut self.outbox);
        }
    }

    /// What waited for sessions that came up in this turn goes before what was read from the TUN device just now.
    fn flush_established(&mut self, now: Now) {
        while let Some(peer) = self.outbox.established.pop() {
            self.outbound.flush(peer, now, &mut self.outbox);
            self.outbox.flush();
        }
    }
}

/// Whole milliseconds until then, not one too few.
fn until(at: Now) -> EpollTimeout {
    EpollTimeout::from(u16::try_from(at.since(clock::now()).as_micros().div_ceil(1_000)).unwrap_or(u16::MAX))
}

fn is_relayed(datagram: &[u8]) -> bool {
    datagram.first() == Some(&RELAY_DATAGRAM)
}

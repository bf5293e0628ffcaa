//! The relay's thread, `meshd-forward`: the UDP sockets (STUN and relay datagrams on the same ports), and every relayed
//! packet, whichever way it came and goes.
//!
//! A turn: what the rest of the coordinator said; at most one batch of every ready socket, judged by
//! [`crate::coord::relay_table`] and queued by [`crate::coord::relay_sched`]; then what may be sent now, in the order the
//! scheduler says, in runs of one system call each. A packet that leaves in the turn it came in is not copied. Between two
//! nodes either may be on UDP or on its WebSocket; the session's address decides.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tokio::sync::{oneshot, watch};

use crate::coord::relay_budget::{Budget, Month, Usage};
use crate::coord::relay_sched::{self, Full, Item, Pair, Scheduler};
use crate::coord::relay_table::{Address, Refused, Table, Verdict};
use crate::os::clock;
use crate::os::server_socket::ServerSocket;
use crate::os::train::{MAX_BYTES, MAX_DATAGRAMS, Receiver, Run, Sender};
use crate::server::packet_store::PacketStore;
use crate::server::relay_conn::{Command, Inbox, Queue, Relay};
use crate::server::stun_socket::Stun;
use crate::time::{Now, UnixSeconds};
use crate::wire::classify::RELAY_DATAGRAM;
use crate::wire::keys::WgKey;
use crate::wire::relay::Frame;
use crate::wire::relay_udp::{HEADER, Name};

/// Receive buffers: those for receiving, and twice the scheduler's room.
const BUFFERS: usize = 144;
/// Bytes sent in a turn while more waits to be received: half of what one turn brings in at most, so that under more than
/// the relay can do packets wait in the scheduler, which is fair, and not in the kernel, which is not.
const TURN_BYTES: usize = 256 << 10;
/// How often the wall clock is looked at.
const TICK: Duration = Duration::from_secs(1);

/// What the relay may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RelayLimits {
    /// Bytes per second of all nodes together; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Bytes a month; `None`: no limit.
    pub monthly: Option<u64>,
}

/// Whether the month's budget is spent, as nodes are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct BudgetState {
    pub(super) spent: bool,
    pub(super) renewed: UnixSeconds,
}

/// What was carried this month, for whoever keeps it on disk.
#[derive(Debug, Default)]
pub(super) struct Carried {
    month: AtomicU64,
    bytes: AtomicU64,
}

impl Carried {
    fn set(&self, usage: Usage) {
        self.bytes.store(usage.bytes, Ordering::Relaxed);
        self.month.store(u64::from(usage.month.0), Ordering::Release);
    }

    pub(super) fn get(&self) -> Usage {
        let month = u32::try_from(self.month.load(Ordering::Acquire)).unwrap_or(0);
        Usage { month: Month(month), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

/// How the thread is reached from the outside, besides by [`Relay`].
#[derive(Debug)]
pub(super) struct ForwarderHandle {
    /// Changes when the budget is spent or renewed.
    pub(super) budget: watch::Receiver<BudgetState>,
    /// What was carried this month.
    pub(super) carried: Arc<Carried>,
    /// Fails when the thread has ended.
    pub(super) ended: oneshot::Receiver<()>,
    /// Drop it to end the thread.
    pub(super) stop: Stop,
}

/// Ends the thread when it is dropped.
#[derive(Debug)]
pub(super) struct Stop {
    told: Arc<AtomicBool>,
    relay: Arc<Relay>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.told.store(true, Ordering::Release);
        self.relay.wake().ring();
    }
}

/// Starts the thread.
///
/// # Errors
/// The system gives no thread.
pub(super) fn start(
    relay: Arc<Relay>,
    sockets: Vec<ServerSocket>,
    limits: RelayLimits,
    earlier: Option<Usage>,
) -> io::Result<ForwarderHandle> {
    let (alive, ended) = oneshot::channel();
    let stop = Stop { told: Arc::default(), relay: Arc::clone(&relay) };
    let (mut forwarder, budget) = Forwarder::new(relay, sockets, limits, earlier, clock::wall());
    let carried = Arc::clone(&forwarder.carried);
    let stopping = Arc::clone(&stop.told);
    std::thread::Builder::new().name("meshd-forward".into()).spawn(move || {
        let _alive: oneshot::Sender<()> = alive;
        if let Err(e) = forwarder.run(&stopping) {
            tracing::error!(error = %e, "the relay's thread ended");
        }
    })?;
    Ok(ForwarderHandle { budget, carried, ended, stop })
}

/// Everything the thread owns.
struct Forwarder {
    relay: Arc<Relay>,
    sockets: Vec<ServerSocket>,
    stun: Stun,
    table: Table,
    /// Of each place of the table, the WebSocket connection.
    connections: Vec<Option<Arc<Queue>>>,
    scheduler: Scheduler,
    store: PacketStore,
    receiver: Receiver,
    sender: Sender,
    runs: Vec<Run>,
    inbox: Inbox,
    budget: Budget,
    /// There is a budget, so the time of day matters also when nothing comes.
    budgeted: bool,
    budget_told: watch::Sender<BudgetState>,
    carried: Arc<Carried>,
    next_tick: Now,
}

impl Forwarder {
    fn new(
        relay: Arc<Relay>,
        sockets: Vec<ServerSocket>,
        limits: RelayLimits,
        earlier: Option<Usage>,
        wall: UnixSeconds,
    ) -> (Self, watch::Receiver<BudgetState>) {
        let (budget_told, told) = watch::channel(BudgetState::default());
        let config = relay_sched::Config::for_rate(limits.rate);
        let forwarder = Self {
            relay,
            stun: Stun::new(&sockets),
            sockets,
            table: Table::new(),
            connections: Vec::new(),
            store: PacketStore::new(BUFFERS, config.items + 1),
            scheduler: Scheduler::new(config),
            receiver: Receiver::default(),
            sender: Sender::new(true),
            runs: Vec::new(),
            inbox: Inbox::default(),
            budget: Budget::new(limits.monthly, earlier, wall),
            budgeted: limits.monthly.is_some(),
            budget_told,
            carried: Arc::default(),
            next_tick: Now::ZERO,
        };
        (forwarder, told)
    }

    fn run(&mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut ready = vec![false; self.sockets.len()];
        let mut more = false;
        loop {
            let now = clock::now();
            let patience = match self.scheduler.poll_timeout() {
                _ if more => Some(Duration::ZERO),
                Some(at) => Some(at.since(now).min(TICK)),
                None if self.budgeted => Some(TICK),
                None => None,
            };
            self.wait(patience, &mut ready)?;
            if stop.load(Ordering::Acquire) {
                return Ok(());
            }
            more = self.turn(&ready, clock::now(), clock::wall);
        }
    }

    fn wait(&self, patience: Option<Duration>, ready: &mut [bool]) -> io::Result<()> {
        let mut fds = Vec::with_capacity(1 + self.sockets.len());
        fds.push(PollFd::new(self.relay.wake().as_fd(), PollFlags::POLLIN));
        fds.extend(self.sockets.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
        match ppoll(&mut fds, patience.map(TimeSpec::from), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        // An error condition counts as readable: receiving takes it off.
        for (ready, fd) in ready.iter_mut().zip(fds.iter().skip(1)) {
            *ready = fd.any() == Some(true);
        }
        Ok(())
    }

    /// One turn. True: more waits to be received or sent than was taken.
    fn turn(&mut self, ready: &[bool], now: Now, wall: impl FnOnce() -> UnixSeconds) -> bool {
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.tick(wall());
        }
        self.take_inbox(now);
        let mut more = false;
        for (index, ready) in ready.iter().enumerate() {
            if *ready {
                more |= self.receive(index, now);
            }
        }
        self.send(if more { TURN_BYTES } else { usize::MAX }, now);
        self.store.end_turn();
        more
    }

    fn tick(&mut self, wall: UnixSeconds) {
        self.budget.tick(wall);
        self.carried.set(self.budget.usage());
        let state = BudgetState { spent: self.budget.spent(), renewed: self.budget.ends() };
        self.budget_told.send_if_modified(|told| {
            let news = told.spent != state.spent;
            *told = state;
            news
        });
    }

    // What the rest of the coordinator says.

    fn take_inbox(&mut self, now: Now) {
        let mut inbox = std::mem::take(&mut self.inbox);
        self.relay.take_inbox(&mut inbox);
        for command in inbox.commands.drain(..) {
            self.obey(command, now);
        }
        let mut rest = inbox.bytes.as_slice();
        for (from, to, len) in &inbox.frames {
            let (payload, after) = rest.split_at(*len);
            rest = after;
            self.take_frame(from, to, payload, now);
        }
        self.inbox = inbox;
    }

    fn obey(&mut self, command: Command, now: Now) {
        match command {
            Command::Admit(key) => {
                let place = self.table.admit(key) as usize;
                if self.connections.len() <= place {
                    self.connections.resize_with(place + 1, || None);
                }
            }
            Command::Expel(key) => {
                if let Some(place) = self.table.expel(&key) {
                    self.connections[place as usize] = None;
                }
            }
            Command::Connection(key, queue) => {
                if let Some(place) = self.table.place(&key) {
                    // Perhaps the node was started anew and knows no session. One that does says so with its next Ping.
                    if queue.is_some() {
                        self.table.deliver_elsewhere(place);
                    }
                    self.connections[place as usize] = queue;
                }
            }
            Command::Here(key) => {
                if let Some(place) = self.table.place(&key) {
                    self.table.deliver_elsewhere(place);
                }
            }
            Command::Open(key, secret, answer) => {
                let session = if self.sockets.is_empty() { None } else { self.table.open(&key, &secret, now) };
                // Whoever asked may have gone.
                let _ = answer.send(session);
            }
        }
    }

    /// A frame that came by WebSocket.
    fn take_frame(&mut self, from: &WgKey, to: &WgKey, payload: &[u8], now: Now) {
        // Expelled a moment ago; its connection is being closed.
        let Some(from) = self.table.place(from) else { return };
        let receiver = self.table.place(to).filter(|to| self.is_reachable(*to, now));
        let Some(receiver) = receiver else {
            count(&self.relay.counters.not_connected, 1);
            if let Some(queue) = self.connection(from) {
                queue.push(&Frame::Gone { peer: *to });
            }
            return;
        };
        let bytes = HEADER + payload.len();
        if !self.budget.take(payload, bytes as u64, now) {
            count(&self.relay.counters.over_budget, 1);
            return;
        }
        match self.store.copy(HEADER, payload) {
            Some(handle) => self.queue(Pair { from, to: receiver }, handle, bytes, 1),
            None => {
                self.budget.give_back(bytes as u64);
                count(&self.relay.counters.relay_full, 1);
            }
        }
    }

    // What comes by UDP.

    /// Receives one batch. True: there may be more.
    fn receive(&mut self, index: usize, now: Now) -> bool {
        let Some(socket) = self.sockets.get(index) else { return false };
        let (buffers, free) = self.store.receivable();
        let room = free.len();
        let received = match socket.receive(&mut self.receiver, buffers, free) {
            Ok(received) => received,
            // Nothing there, or an ICMP error for something sent earlier, which this call has taken off.
            Err(e) => {
                tracing::trace!(error = %e, "receive error passed over");
                return e.kind() != io::ErrorKind::WouldBlock;
            }
        };
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        runs.extend_from_slice(self.receiver.runs());
        for run in &runs {
            self.store.received(run.buffer);
        }
        for run in &runs {
            self.take_run(index, run, now);
        }
        self.runs = runs;
        received == room
    }

    /// Judges the datagrams of a run, and queues those for one receiver together.
    fn take_run(&mut self, index: usize, run: &Run, now: Now) {
        let socket = u16::try_from(index).unwrap_or(u16::MAX);
        // The sockets are asked to tell; should the kernel not, an answer leaves from where it thinks best.
        let Some(bound) = self.sockets.get(index).map(ServerSocket::bound) else { return };
        let local = run.local.unwrap_or(bound.ip());
        let at = Address { socket, remote: run.from, local };
        let longest = (self.scheduler.config().quantum() as usize).max(run.size);
        let mut open: Option<(Pair, Range<usize>)> = None;
        let mut start = 0;
        while start < run.len {
            let end = (start + run.size).min(run.len);
            let Some(datagram) = self.store.buffer(run.buffer).get_mut(start..end) else { return };
            let verdict = if datagram.first() == Some(&RELAY_DATAGRAM) {
                Some(self.table.judge(datagram, at, now))
            } else {
                self.stun.answer(&self.sockets, index, datagram, run.from, local, now);
                None
            };
            let pair = match verdict {
                Some(Verdict::Forward(pair)) => Some(pair),
                _ => None,
            };
            open = match (open, pair) {
                (Some((before, range)), Some(pair)) if before == pair && end - range.start <= longest => {
                    Some((pair, range.start..end))
                }
                (before, pair) => {
                    if let Some((before, range)) = before {
                        self.take_sends(before, run, range, now);
                    }
                    pair.map(|pair| (pair, start..end))
                }
            };
            if let Some(verdict) = verdict {
                self.act_on(verdict, run, start..end, at);
            }
            start = end;
        }
        if let Some((pair, range)) = open {
            self.take_sends(pair, run, range, now);
        }
    }

    fn act_on(&mut self, verdict: Verdict, run: &Run, range: Range<usize>, at: Address) {
        let counters = &self.relay.counters;
        match verdict {
            Verdict::Forward(_) => {}
            Verdict::Answer => {
                let bytes = self.store.buffer(run.buffer).get(range).unwrap_or_default();
                send_alone(&self.sockets, at, bytes);
            }
            Verdict::NoSuchPeer { from, to } => {
                count(&counters.not_connected, 1);
                self.tell_gone(from, to, None);
            }
            Verdict::Drop(why) => count(
                match why {
                    Refused::Malformed => &counters.malformed,
                    Refused::UnknownSession => &counters.unknown_session,
                    Refused::BadTag => &counters.bad_tag,
                    Refused::Replayed => &counters.replayed,
                },
                1,
            ),
        }
    }

    /// Queues Sends of one pair that lie together in a buffer.
    fn take_sends(&mut self, pair: Pair, run: &Run, range: Range<usize>, now: Now) {
        let packets = range.len().div_ceil(run.size);
        if self.budget.take_run(range.len() as u64) {
            match self.store.keep(run.buffer, range.clone(), run.size) {
                Some(handle) => self.queue(pair, handle, range.len(), packets),
                None => {
                    self.budget.give_back(range.len() as u64);
                    count(&self.relay.counters.relay_full, packets);
                }
            }
            return;
        }
        // The budget is spent, or nearly: packet by packet.
        let mut start = range.start;
        while start < range.end {
            let one = start..(start + run.size).min(range.end);
            start = one.end;
            let bytes = one.len() as u64;
            let datagram = self.store.buffer(run.buffer).get(one.clone()).unwrap_or_default();
            if !self.budget.take(datagram.get(HEADER..).unwrap_or_default(), bytes, now) {
                count(&self.relay.counters.over_budget, 1);
                continue;
            }
            match self.store.keep(run.buffer, one.clone(), one.len()) {
                Some(handle) => self.queue(pair, handle, one.len(), 1),
                None => {
                    self.budget.give_back(bytes);
                    count(&self.relay.counters.relay_full, 1);
                }
            }
        }
    }

    fn queue(&mut self, pair: Pair, handle: u32, bytes: usize, packets: usize) {
        let item = Item { handle, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) };
        if let Err(full) = self.scheduler.offer(pair, item) {
            self.store.release(handle);
            self.budget.give_back(bytes as u64);
            let counters = &self.relay.counters;
            count(if full == Full::Pair { &counters.pair_full } else { &counters.relay_full }, packets);
        }
    }

    // What goes.

    /// Sends what may go now, at most about this many bytes.
    fn send(&mut self, most: usize, now: Now) {
        let mut sent = 0;
        let mut next = self.scheduler.next(now);
        while let Some((pair, first)) = next {
            let mut train = Train::new(first.handle, self.store.get(first.handle));
            next = loop {
                if sent + train.bytes >= most {
                    break None;
                }
                match self.scheduler.next(now) {
                    Some((other, item)) if other == pair && train.couple(item.handle, self.store.get(item.handle)) => {}
                    other => break other,
                }
            };
            sent += train.bytes;
            self.deliver(pair, &train, now);
            train.handles().iter().for_each(|handle| self.store.release(*handle));
        }
    }

    fn deliver(&mut self, pair: Pair, train: &Train, now: Now) {
        if let Some(address) = self.table.address(pair.to, now) {
            self.deliver_udp(pair, train, address, now);
        } else if let Some(queue) = self.connection(pair.to).cloned() {
            self.deliver_websocket(pair, train, &queue);
        } else {
            count(&self.relay.counters.not_connected, train.packets);
            if let Some(to) = self.table.key(pair.to) {
                self.tell_gone(pair.from, Name::of(&to), Some(to));
            }
        }
    }

    fn deliver_udp(&mut self, pair: Pair, train: &Train, address: Address, now: Now) {
        for handle in train.handles() {
            let (bytes, segment) = self.store.get_mut(*handle);
            for datagram in bytes.chunks_mut(segment) {
                if !self.table.readdress(pair, datagram) {
                    // The member went in this very turn.
                    count(&self.relay.counters.not_connected, 1);
                    return;
                }
            }
        }
        let mut parts = [IoSlice::new(&[]); MAX_DATAGRAMS];
        for (part, handle) in parts.iter_mut().zip(train.handles()) {
            *part = IoSlice::new(self.store.get(*handle).0);
        }
        let parts = parts.get(..train.handles().len()).unwrap_or_default();
        let Some(socket) = self.sockets.get(usize::from(address.socket)) else { return };
        let counters = &self.relay.counters;
        let mut way = socket.way(address.remote, address.local);
        let result = self.sender.send(&mut way, address.remote, parts, train.segment, now);
        count(&counters.forwarded_udp, result.sent);
        count(&counters.forwarded_bytes, train.bytes_of(result.sent));
        if let Some(e) = result.error {
            tracing::trace!(error = %e, datagrams = result.failed, "relay datagrams not sent");
            count(&counters.send_failed, result.failed);
        }
    }

    fn deliver_websocket(&self, pair: Pair, train: &Train, queue: &Queue) {
        let counters = &self.relay.counters;
        let Some(from) = self.table.key(pair.from) else { return };
        for handle in train.handles() {
            let (bytes, segment) = self.store.get(*handle);
            for datagram in bytes.chunks(segment) {
                let payload = datagram.get(HEADER..).unwrap_or_default();
                if queue.push(&Frame::Recv { from, payload }) {
                    count(&counters.forwarded_websocket, 1);
                    count(&counters.forwarded_bytes, datagram.len());
                } else {
                    count(&counters.queue_full, 1);
                }
            }
        }
    }

    /// Tells a sender that a receiver is not to be reached, by the way the sender is reached. The whole key is not known of
    /// somebody who is not a member.
    fn tell_gone(&mut self, to: u32, about: Name, key: Option<WgKey>) {
        let queue = self.connections.get(to as usize).and_then(Option::as_ref);
        if let (Some(queue), Some(peer)) = (queue, key) {
            queue.push(&Frame::Gone { peer });
        } else if let (Some(address), Some(datagram)) = (self.table.last_address(to), self.table.gone(to, about)) {
            send_alone(&self.sockets, address, &datagram);
        }
    }

    fn is_reachable(&self, place: u32, now: Now) -> bool {
        self.connection(place).is_some() || self.table.address(place, now).is_some()
    }

    fn connection(&self, place: u32) -> Option<&Arc<Queue>> {
        self.connections.get(place as usize).and_then(Option::as_ref)
    }
}

/// Packets of one pair that leave in one system call: all of one length, but for the last.
struct Train {
    handles: [u32; MAX_DATAGRAMS],
    len: usize,
    segment: usize,
    packets: usize,
    bytes: usize,
}

impl Train {
    fn new(handle: u32, (bytes, segment): (&[u8], usize)) -> Self {
        let mut handles = [0; MAX_DATAGRAMS];
        handles[0] = handle;
        Self { handles, len: 1, segment, packets: bytes.len().div_ceil(segment), bytes: bytes.len() }
    }

    /// Appends a packet, if it fits behind what is there.
    fn couple(&mut self, handle: u32, (bytes, segment): (&[u8], usize)) -> bool {
        let packets = bytes.len().div_ceil(segment);
        // A run of one packet may be shorter than the others, and then is the last.
        let alike = segment == self.segment || (packets == 1 && bytes.len() < self.segment);
        let fits = alike
            && self.bytes == self.packets * self.segment
            && self.packets + packets <= MAX_DATAGRAMS
            && self.bytes + bytes.len() <= MAX_BYTES;
        if fits {
            self.handles[self.len] = handle;
            self.len += 1;
            self.packets += packets;
            self.bytes += bytes.len();
        }
        fits
    }

    /// Bytes of so many of its packets.
    fn bytes_of(&self, packets: usize) -> usize {
        (packets * self.segment).min(self.bytes)
    }

    fn handles(&self) -> &[u32] {
        self.handles.get(..self.len).unwrap_or_default()
    }
}

fn send_alone(sockets: &[ServerSocket], to: Address, bytes: &[u8]) {
    let Some(socket) = sockets.get(usize::from(to.socket)) else { return };
    // Lost, as the network might have lost it; the node asks again.
    if let Err(e) = socket.send(to.remote, to.local, bytes) {
        tracing::trace!(error = %e, "relay answer not sent");
    }
}

fn count(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;

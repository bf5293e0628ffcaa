//! The relay's WebSocket connections, and what they share with the thread that forwards ([`crate::server::udp_relay`]).
//!
//! A connection's task reads frames into the [`Inbox`] and sends what the thread puts into the connection's [`Queue`]: both
//! are bounded and drop the newest, because a relay that buffers turns loss into latency. Frames are never looked into.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, oneshot, watch};

use crate::coord::relay_hub::{RelayConn, RelayHub};
use crate::link::{LinkError, RelayLink, RelayReceiver, RelaySender, close};
use crate::os::wake::Wake;
use crate::wire::keys::{ControlKey, WgKey};
use crate::wire::relay::{self, Frame, Frames};
use crate::wire::relay_udp::SessionSecret;

/// Frames queued to one connection.
pub(super) const QUEUE_FRAMES: usize = 512;
/// Bytes queued to one connection: enough for a burst, little enough to drain in a moment.
pub(super) const QUEUE_BYTES: usize = 512 << 10;
/// Bytes after which a batch is full.
const BATCH: usize = 64 << 10;
/// Bytes of frames of all connections that wait for the thread.
const INBOX_BYTES: usize = 2 << 20;

/// The relay's members and connections, and what waits for its thread.
#[derive(Debug)]
pub struct Relay {
    state: RwLock<State>,
    next: AtomicU64,
    inbox: Mutex<Inbox>,
    wake: Wake,
    /// What became of packets.
    pub counters: RelayCounters,
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// What became of packets, since the start. Each packet that is dropped counts in exactly one of them.
        #[derive(Debug, Default)]
        pub struct RelayCounters {
            $($(#[doc = $doc])+ pub $name: AtomicU64),+
        }

        impl RelayCounters {
            /// Names and values, in this order.
            #[must_use]
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed))),+]
            }
        }
    };
}

counters! {
    /// Sent to the receiver by UDP.
    forwarded_udp,
    /// Queued to the receiver's WebSocket connection.
    forwarded_websocket,
    /// Bytes of both, as relay datagrams.
    forwarded_bytes,
    /// Dropped: the pair of sender and receiver has its share of the room waiting already.
    pair_full,
    /// Dropped: no room at all is left.
    relay_full,
    /// Dropped: the queue of the receiver's connection is full.
    queue_full,
    /// Dropped: frames came faster from all connections than they are forwarded.
    inbox_full,
    /// Dropped: the budget of the month is spent.
    over_budget,
    /// Dropped, and the sender told: the receiver is not connected.
    not_connected,
    /// Dropped: the system refused the datagram.
    send_failed,
    /// Dropped: no relay datagram, or of a kind that nodes do not send.
    malformed,
    /// Dropped: a relay datagram of no session.
    unknown_session,
    /// Dropped: a relay datagram whose tag is wrong.
    bad_tag,
    /// Dropped: a relay datagram seen before, or too old to tell.
    replayed,
}

#[derive(Debug, Default)]
struct State {
    members: BTreeMap<ControlKey, WgKey>,
    hub: RelayHub,
    queues: BTreeMap<RelayConn, Arc<Queue>>,
}

/// What the relay's thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// A member may use the relay.
    Admit(WgKey),
    /// A member is out.
    Expel(WgKey),
    /// The connection that a member is reached by.
    Connection(WgKey, Option<Arc<Queue>>),
    /// A member wants to be delivered to by its connection.
    Here(WgKey),
    /// Begin a session at the UDP port; answered with its number.
    Open(WgKey, SessionSecret, oneshot::Sender<Option<u32>>),
}

/// What waits for the relay's thread.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// In order; all of them before the frames.
    pub(super) commands: Vec<Command>,
    /// Frames: sender, receiver, and the length of the payload in `bytes`.
    pub(super) frames: Vec<(WgKey, WgKey, usize)>,
    /// Payloads, back to back.
    pub(super) bytes: Vec<u8>,
}

impl Inbox {
    const fn is_empty(&self) -> bool {
        self.commands.is_empty() && self.frames.is_empty()
    }

    fn clear(&mut self) {
        self.commands.clear();
        self.frames.clear();
        self.bytes.clear();
    }
}

impl Relay {
    /// A relay without members.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: RwLock::default(),
            next: AtomicU64::new(0),
            inbox: Mutex::default(),
            wake: Wake::new()?,
            counters: RelayCounters::default(),
        })
    }

    /// A member may use the relay from now on.
    pub fn admit(&self, control: ControlKey, wg: WgKey) {
        let mut state = self.state.write();
        state.members.insert(control, wg);
        // Under the lock, so that the thread hears of changes in their order.
        self.tell(Command::Admit(wg));
    }

    /// A member was revoked: its connections are closed and no new one is taken.
    pub fn expel(&self, control: &ControlKey, wg: &WgKey) {
        let mut state = self.state.write();
        state.members.remove(control);
        for conn in state.hub.expel(wg) {
            if let Some(queue) = state.queues.remove(&conn) {
                queue.close(close::NOT_A_MEMBER, "this node was removed from the network");
            }
        }
        self.tell(Command::Expel(*wg));
    }

    /// Begins a session of a member at the UDP port. `None`: it gets none.
    pub(super) async fn open(&self, wg: WgKey, secret: SessionSecret) -> Option<u32> {
        let (tell, told) = oneshot::channel();
        self.tell(Command::Open(wg, secret, tell));
        told.await.ok().flatten()
    }

    /// Takes what waits for the thread, leaving an empty inbox in its place.
    pub(super) fn take_inbox(&self, into: &mut Inbox) {
        into.clear();
        self.wake.silence();
        std::mem::swap(&mut *self.inbox.lock(), into);
    }

    /// Rings when something waits for the thread.
    pub(super) const fn wake(&self) -> &Wake {
        &self.wake
    }

    fn tell(&self, command: Command) {
        self.inbox.lock().commands.push(command);
        self.wake.ring();
    }

    pub(super) fn join(&self, control: &ControlKey) -> Option<Joined<'_>> {
        let mut state = self.state.write();
        let wg = *state.members.get(control)?;
        let conn = RelayConn(self.next.fetch_add(1, Ordering::Relaxed));
        let queue = Arc::new(Queue::default());
        state.queues.insert(conn, Arc::clone(&queue));
        if let Some(oldest) = state.hub.join(conn, wg)
            && let Some(old) = state.queues.remove(&oldest)
        {
            old.close(close::REPLACED, "newer connections of this node took its place");
        }
        self.tell(Command::Connection(wg, Some(Arc::clone(&queue))));
        Some(Joined { relay: self, conn, wg, queue })
    }

    /// Takes one message of frames from a connection. False: it is malformed.
    pub(super) fn take(&self, from: &Joined<'_>, message: &[u8]) -> bool {
        let mut lost = 0;
        let mut here = false;
        let mut inbox = self.inbox.lock();
        let empty = inbox.is_empty();
        let mut well_formed = true;
        for frame in Frames::new(message) {
            match frame {
                Ok(Frame::Send { to, payload }) if inbox.bytes.len() + payload.len() <= INBOX_BYTES => {
                    inbox.bytes.extend_from_slice(payload);
                    inbox.frames.push((from.wg, to, payload.len()));
                }
                Ok(Frame::Send { .. }) => lost += 1,
                Ok(Frame::Ping(nonce)) => {
                    from.queue.push(&Frame::Pong(nonce));
                }
                Ok(Frame::Pong(_)) => {}
                Ok(Frame::Here) => here = true,
                Ok(Frame::Recv { .. } | Frame::Gone { .. }) | Err(_) => {
                    well_formed = false;
                    break;
                }
            }
        }
        let news = empty && !inbox.is_empty();
        drop(inbox);
        if here {
            self.tell(Command::Here(from.wg));
        }
        if news {
            self.wake.ring();
        }
        self.counters.inbox_full.fetch_add(lost, Ordering::Relaxed);
        well_formed
    }

    /// Serves one connection whose other side proved to have the control key, until it ends or `stop` changes.
    pub async fn serve(&self, control: &ControlKey, link: RelayLink, mut stop: watch::Receiver<bool>) -> Ended {
        let (mut sender, mut receiver) = link.split();
        let Some(joined) = self.join(control) else {
            sender.close(close::NOT_A_MEMBER, "this key is not a member of the network").await;
            // Reading until the other side goes lets it read why.
            while let Ok(Some(_)) = receiver.recv().await {}
            return Ended::NotAMember;
        };
        let (code, reason) = tokio::select! {
            ended = self.read(&joined, &mut receiver) => match ended {
                Err(e) => return Ended::Link(e),
                Ok(()) => (close::PROTOCOL, "malformed relay frame"),
            },
            ended = joined.queue.drain(&mut sender) => match ended {
                Err(e) => return Ended::Link(e),
                Ok(closing) => closing,
            },
            _ = stop.changed() => (close::GOING_AWAY, "the coordinator is stopping"),
        };
        drop(joined);
        sender.close(code, reason).await;
        while let Ok(Some(_)) = receiver.recv().await {}
        Ended::Closed { code, reason }
    }

    /// Ends with `Ok` at the first malformed message.
    async fn read(&self, joined: &Joined<'_>, receiver: &mut RelayReceiver) -> Result<(), LinkError> {
        loop {
            let message = receiver.recv().await?.ok_or(LinkError::ClosedHere)?;
            if !self.take(joined, &message) {
                return Ok(());
            }
        }
    }
}

/// How a connection ended, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The key belongs to no live member.
    NotAMember,
    /// The other side or the network ended it.
    Link(LinkError),
    /// We closed it.
    Closed {
        /// A code of [`close`].
        code: u16,
        /// Why.
        reason: &'static str,
    },
}

/// A connection that takes part. Dropping it leaves.
pub(super) struct Joined<'a> {
    relay: &'a Relay,
    conn: RelayConn,
    wg: WgKey,
    pub(super) queue: Arc<Queue>,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        let mut state = self.relay.state.write();
        state.hub.leave(self.conn);
        state.queues.remove(&self.conn);
        let active = state.hub.active(&self.wg).and_then(|conn| state.queues.get(&conn).cloned());
        self.relay.tell(Command::Connection(self.wg, active));
    }
}

/// What is to be sent to one connection.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Encoded frames, and how many they are.
    batches: VecDeque<(Vec<u8>, usize)>,
    frames: usize,
    bytes: usize,
    close: Option<(u16, &'static str)>,
}

impl Queue {
    /// Queues a frame. False: it is full, or closing.
    pub(super) fn push(&self, frame: &Frame<'_>) -> bool {
        let mut waiting = self.waiting.lock();
        if waiting.frames >= QUEUE_FRAMES || waiting.bytes >= QUEUE_BYTES || waiting.close.is_some() {
            return false;
        }
        if waiting.batches.back().is_none_or(|(batch, _)| batch.len() >= BATCH) {
            waiting.batches.push_back((Vec::new(), 0));
        }
        let Some((batch, frames)) = waiting.batches.back_mut() else { return false };
        let before = batch.len();
        if !relay::encode(frame, batch) {
            return false;
        }
        *frames += 1;
        let added = batch.len() - before;
        waiting.frames += 1;
        waiting.bytes += added;
        drop(waiting);
        self.ready.notify_one();
        true
    }

    fn close(&self, code: u16, reason: &'static str) {
        self.waiting.lock().close = Some((code, reason));
        self.ready.notify_one();
    }

    pub(super) fn pop(&self) -> Result<Option<Vec<u8>>, (u16, &'static str)> {
        let mut waiting = self.waiting.lock();
        if let Some(closing) = waiting.close {
            return Err(closing);
        }
        let Some((batch, frames)) = waiting.batches.pop_front() else { return Ok(None) };
        waiting.frames -= frames;
        waiting.bytes -= batch.len();
        Ok(Some(batch))
    }

    /// Sends what is queued until the queue is closed; returns how.
    async fn drain(&self, sender: &mut RelaySender) -> Result<(u16, &'static str), LinkError> {
        loop {
            match self.pop() {
                Ok(Some(batch)) => sender.send(batch).await?,
                Ok(None) => self.ready.notified().await,
                Err(closing) => return Ok(closing),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Frame<'_> = Frame::Recv { from: WgKey([1; 32]), payload: &[7; 1400] };

    fn frames_in(queue: &Queue) -> usize {
        let mut frames = 0;
        while let Ok(Some(batch)) = queue.pop() {
            assert!(batch.len() <= crate::link::MAX_RELAY_MESSAGE);
            frames += Frames::new(&batch).map(Result::unwrap).count();
        }
        frames
    }

    #[test]
    fn a_full_queue_drops_the_newest_and_takes_more_once_drained() {
        let queue = Queue::default();
        let taken = (0..2 * QUEUE_FRAMES).take_while(|_| queue.push(&FRAME)).count();
        assert!(taken <= QUEUE_FRAMES && taken * 1_400 <= QUEUE_BYTES + 1_400, "{taken}");
        assert_eq!(frames_in(&queue), taken);
        assert!(queue.push(&FRAME));
        assert_eq!(frames_in(&queue), 1);
    }

    #[test]
    fn small_frames_are_bounded_by_number_and_large_ones_by_bytes() {
        let queue = Queue::default();
        let small = Frame::Recv { from: WgKey([1; 32]), payload: &[] };
        assert_eq!((0..2 * QUEUE_FRAMES).take_while(|_| queue.push(&small)).count(), QUEUE_FRAMES);
        let queue = Queue::default();
        let payload = vec![0; relay::MAX_PAYLOAD];
        let large = Frame::Recv { from: WgKey([1; 32]), payload: &payload };
        let taken = (0..100).take_while(|_| queue.push(&large)).count();
        assert_eq!(taken, QUEUE_BYTES.div_ceil(relay::MAX_PAYLOAD + relay::OVERHEAD));
        assert_eq!(frames_in(&queue), taken);
    }

    fn joined(relay: &Relay) -> Joined<'_> {
        let control = ControlKey([1; 32]);
        relay.admit(control, WgKey([2; 32]));
        relay.join(&control).unwrap()
    }

    fn encoded(frame: &Frame<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(relay::encode(frame, &mut out));
        out
    }

    #[test]
    fn only_members_join_and_the_revoked_are_put_out() {
        let relay = Relay::new().unwrap();
        assert!(relay.join(&ControlKey([1; 32])).is_none());
        let joined = joined(&relay);
        relay.expel(&ControlKey([1; 32]), &WgKey([2; 32]));
        assert_eq!(joined.queue.pop(), Err((close::NOT_A_MEMBER, "this node was removed from the network")));
        assert!(relay.join(&ControlKey([1; 32])).is_none());
    }

    #[test]
    fn the_thread_hears_who_is_reached_how() {
        let relay = Relay::new().unwrap();
        let first = joined(&relay);
        let second = relay.join(&ControlKey([1; 32])).unwrap();
        let (first_queue, second_queue) = (Arc::clone(&first.queue), Arc::clone(&second.queue));
        drop(second);
        drop(first);
        let mut inbox = Inbox::default();
        relay.take_inbox(&mut inbox);
        let told: Vec<Option<*const Queue>> = inbox
            .commands
            .iter()
            .filter_map(|command| match command {
                Command::Connection(_, queue) => Some(queue.as_ref().map(Arc::as_ptr)),
                _ => None,
            })
            .collect();
        let (first, second) = (Some(Arc::as_ptr(&first_queue)), Some(Arc::as_ptr(&second_queue)));
        assert_eq!(told, [first, second, first, None]);
    }

    #[test]
    fn frames_a_node_must_not_send_and_garbage_are_malformed() {
        let relay = Relay::new().unwrap();
        let joined = joined(&relay);
        assert!(!relay.take(&joined, &encoded(&FRAME)));
        assert!(!relay.take(&joined, &encoded(&Frame::Gone { peer: WgKey([1; 32]) })));
        assert!(!relay.take(&joined, &[relay::kind::SEND, 0, 9, 1]));
        // A type of a later version.
        assert!(relay.take(&joined, &[0x7f, 0, 2, 1, 2]));
        assert!(relay.take(&joined, &encoded(&Frame::Ping([3; 8]))));
        assert_eq!(joined.queue.pop().unwrap().unwrap(), encoded(&Frame::Pong([3; 8])));
    }

    #[test]
    fn frames_wait_in_bounded_room_and_the_newest_is_dropped() {
        let relay = Relay::new().unwrap();
        let joined = joined(&relay);
        let send = encoded(&Frame::Send { to: WgKey([9; 32]), payload: &[7; 1_000] });
        for _ in 0..INBOX_BYTES / 1_000 + 5 {
            assert!(relay.take(&joined, &send));
        }
        let mut inbox = Inbox::default();
        relay.take_inbox(&mut inbox);
        assert_eq!(inbox.frames.len(), INBOX_BYTES / 1_000);
        assert_eq!(relay.counters.inbox_full.load(Ordering::Relaxed), 5);
        assert!(relay.take(&joined, &send));
        relay.take_inbox(&mut inbox);
        assert_eq!(inbox.frames, [(WgKey([2; 32]), WgKey([9; 32]), 1_000)]);
        assert_eq!(inbox.bytes, [7; 1_000]);
    }
}

//! The relay: frames from one member's connection to another's, by key, never looked into.
//!
//! Each connection has one bounded queue of what is to be sent to it, already encoded, in batches that each become one
//! WebSocket message. What does not fit is dropped, newest first: a relay that buffers turns loss into latency.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};

use crate::coord::relay_hub::{Delivery, RelayConn, RelayHub};
use crate::link::{LinkError, RelayLink, RelayReceiver, RelaySender, close};
use crate::wire::keys::{ControlKey, WgKey};
use crate::wire::relay::{self, Frame, Frames};

/// Frames queued to one connection.
pub(super) const QUEUE_FRAMES: usize = 512;
/// Bytes queued to one connection: enough for a burst, little enough to drain in a moment.
pub(super) const QUEUE_BYTES: usize = 512 << 10;
/// Bytes after which a batch is full.
const BATCH: usize = 64 << 10;

/// The relay's members, connections and counters, shared by all connections.
#[derive(Debug, Default)]
pub struct Relay {
    state: RwLock<State>,
    next: AtomicU64,
    /// What became of frames.
    pub counters: RelayCounters,
}

/// What became of Send frames, since the start.
#[derive(Debug, Default)]
pub struct RelayCounters {
    /// Queued to the receiver.
    pub forwarded: AtomicU64,
    /// Dropped: the receiver's queue was full.
    pub queue_full: AtomicU64,
    /// Dropped, and the sender told: the receiver has no connection.
    pub not_connected: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    members: BTreeMap<ControlKey, WgKey>,
    hub: RelayHub,
    queues: BTreeMap<RelayConn, Arc<Queue>>,
}

impl Relay {
    /// A member may use the relay from now on.
    pub fn admit(&self, control: ControlKey, wg: WgKey) {
        self.state.write().members.insert(control, wg);
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
    }

    fn join(&self, control: &ControlKey) -> Option<Joined<'_>> {
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
        Some(Joined { relay: self, conn, queue })
    }

    /// Takes one message of frames from a connection. False: it is malformed.
    fn forward(&self, from: &Joined<'_>, message: &[u8]) -> bool {
        let state = self.state.read();
        for frame in Frames::new(message) {
            match frame {
                Ok(Frame::Send { to, payload }) => match state.hub.deliver(from.conn, &to) {
                    Delivery::To { conn, from } => {
                        let queued = state.queues.get(&conn).is_some_and(|q| q.push(&Frame::Recv { from, payload }));
                        let counter = if queued { &self.counters.forwarded } else { &self.counters.queue_full };
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    Delivery::Gone => {
                        self.counters.not_connected.fetch_add(1, Ordering::Relaxed);
                        from.queue.push(&Frame::Gone { peer: to });
                    }
                    // Put out a moment ago; its queue says so to the other side.
                    Delivery::NotJoined => return true,
                },
                Ok(Frame::Ping(nonce)) => {
                    from.queue.push(&Frame::Pong(nonce));
                }
                Ok(Frame::Pong(_)) => {}
                Ok(Frame::Recv { .. } | Frame::Gone { .. }) | Err(_) => return false,
            }
        }
        true
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
            if !self.forward(joined, &message) {
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
struct Joined<'a> {
    relay: &'a Relay,
    conn: RelayConn,
    queue: Arc<Queue>,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        let mut state = self.relay.state.write();
        state.hub.leave(self.conn);
        state.queues.remove(&self.conn);
    }
}

/// What is to be sent to one connection.
#[derive(Debug, Default)]
struct Queue {
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
    fn push(&self, frame: &Frame<'_>) -> bool {
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

    fn pop(&self) -> Result<Option<Vec<u8>>, (u16, &'static str)> {
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

    #[test]
    fn only_members_join_and_the_revoked_are_put_out() {
        let relay = Relay::default();
        let (control, wg) = (ControlKey([1; 32]), WgKey([2; 32]));
        assert!(relay.join(&control).is_none());
        relay.admit(control, wg);
        let joined = relay.join(&control).unwrap();
        relay.expel(&control, &wg);
        assert_eq!(joined.queue.pop(), Err((close::NOT_A_MEMBER, "this node was removed from the network")));
        assert!(relay.join(&control).is_none());
    }

    #[test]
    fn frames_a_node_must_not_send_and_garbage_are_malformed() {
        let relay = Relay::default();
        let control = ControlKey([1; 32]);
        relay.admit(control, WgKey([1; 32]));
        let joined = relay.join(&control).unwrap();
        let encoded = |frame: &Frame<'_>| {
            let mut out = Vec::new();
            assert!(relay::encode(frame, &mut out));
            out
        };
        assert!(!relay.forward(&joined, &encoded(&FRAME)));
        assert!(!relay.forward(&joined, &encoded(&Frame::Gone { peer: WgKey([1; 32]) })));
        assert!(!relay.forward(&joined, &[relay::kind::SEND, 0, 9, 1]));
        // A type of a later version.
        assert!(relay.forward(&joined, &[0x7f, 0, 2, 1, 2]));
        assert!(relay.forward(&joined, &encoded(&Frame::Ping([3; 8]))));
        assert_eq!(joined.queue.pop().unwrap().unwrap(), encoded(&Frame::Pong([3; 8])));
        let to = WgKey([9; 32]);
        assert!(relay.forward(&joined, &encoded(&Frame::Send { to, payload: b"x" })));
        assert_eq!(joined.queue.pop().unwrap().unwrap(), encoded(&Frame::Gone { peer: to }));
        assert_eq!(relay.counters.not_connected.load(Ordering::Relaxed), 1);
    }
}

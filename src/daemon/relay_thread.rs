//! The relay link, on a thread of its own so that TLS work for relayed packets stays off the control thread.
//!
//! Packets cross one bounded queue on the way in and one on the way out; the newest is dropped by name when one is full.
//! What the planner sends (handshakes, candidates) has a small queue of its own and goes first. What goes by UDP
//! ([`crate::daemon::relay_carrier`]) does not come here.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::daemon::links::{Backoff, Bells, Coordinator};
use crate::daemon::outbox::refused;
use crate::daemon::relay_carrier::RelayCarrier;
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Input, SocketId};
use crate::link::{LinkError, RelayLink, close, connect_relay};
use crate::os::clock;
use crate::os::train::SendError;
use crate::os::udp::UdpSockets;
use crate::os::wake::Wake;
use crate::wire::keys::WgKey;
use crate::wire::local::Problem;
use crate::wire::relay::{Frame, Frames, OVERHEAD, encode};
use crate::wire::relay_udp::HEADER;

/// Packets to and from the data thread that may wait.
pub(super) const QUEUE: usize = 512;
/// Datagrams of the planner that may wait.
const URGENT: usize = 64;
/// A WebSocket message is closed when it is this long, in bytes.
const MESSAGE: usize = 60 << 10;
/// Round trips that may be asked for at once.
const RTT_ASKS: usize = 8;

/// A datagram that goes through, or came through, the relay.
#[derive(Debug, Clone)]
pub(super) struct Relayed<B> {
    /// The other end.
    pub(super) peer: WgKey,
    /// The datagram.
    pub(super) bytes: B,
}

/// Where the relay thread delivers to the data thread.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    /// The queue.
    pub(super) queue: SyncSender<Relayed<Bytes>>,
    /// Tells the data thread to look.
    pub(super) wake: Wake,
}

/// The other threads' end.
#[derive(Debug, Clone)]
pub(super) struct RelayHandle {
    packets: mpsc::Sender<Relayed<Vec<u8>>>,
    urgent: mpsc::Sender<Relayed<Vec<u8>>>,
    rtt: mpsc::Sender<oneshot::Sender<Duration>>,
    here: mpsc::Sender<()>,
    carrier: Arc<RelayCarrier>,
    sockets: Arc<UdpSockets>,
    drops: Arc<Drops>,
    /// Why there is no WebSocket now, if there is none.
    pub(super) problem: watch::Receiver<Option<Problem>>,
}

impl RelayHandle {
    /// Queues a data packet for the WebSocket.
    pub(super) fn packet(&self, peer: WgKey, bytes: Vec<u8>) {
        self.push(&self.packets, peer, bytes);
    }

    /// Room is left for a data packet.
    pub(super) fn has_room(&self) -> bool {
        self.carrier.is_udp() || self.packets.capacity() > 0
    }

    /// Sends a datagram of the planner, by UDP, or queued for the WebSocket before data packets.
    pub(super) fn urgent(&self, peer: WgKey, bytes: Vec<u8>) {
        let mut with_room = [&[0; HEADER][..], &bytes].concat();
        if !self.by_udp(peer, &mut with_room) {
            self.push(&self.urgent, peer, bytes);
        }
    }

    /// Tells the relay to deliver by WebSocket.
    pub(super) fn here(&self) {
        // One that waits already is enough, and a new connection needs none: the relay forgets sessions that are silent.
        let _ = self.here.try_send(());
    }

    /// What carries relayed packets.
    pub(super) const fn carrier(&self) -> &Arc<RelayCarrier> {
        &self.carrier
    }

    /// False: it has to go by WebSocket.
    fn by_udp(&self, peer: WgKey, bytes: &mut [u8]) -> bool {
        let Some(to) = self.carrier.with(|c| c.seal(&peer, bytes, clock::now())) else { return false };
        match self.sockets.send(SocketId::for_remote(&to), &to, bytes) {
            Ok(()) => true,
            Err(SendError::Unreachable) => {
                self.carrier.with(|c| c.send_failed(to, clock::now()));
                false
            }
            Err(why) => {
                self.drops.count(refused(why));
                tracing::trace!(%why, "a relay datagram was not sent");
                true
            }
        }
    }

    fn push(&self, queue: &mpsc::Sender<Relayed<Vec<u8>>>, peer: WgKey, bytes: Vec<u8>) {
        if queue.try_send(Relayed { peer, bytes }).is_err() {
            self.drops.count(Drop::RelayBusy);
        }
    }

    /// The link's round trip now; none if it is down or does not answer within `patience`.
    pub(super) async fn rtt(&self, patience: Duration) -> Option<Duration> {
        let (tell, told) = oneshot::channel();
        self.rtt.try_send(tell).ok()?;
        tokio::time::timeout(patience, told).await.ok()?.ok()
    }
}

/// Starts the thread. It ends when the bells say stop; the receiver then fails.
///
/// # Errors
/// The system gives no thread.
pub(super) fn start(
    coordinator: Arc<Coordinator>,
    planner: mpsc::Sender<Input>,
    delivery: Delivery,
    carrier: Arc<RelayCarrier>,
    sockets: Arc<UdpSockets>,
    drops: Arc<Drops>,
    bells: Bells,
) -> io::Result<(RelayHandle, oneshot::Receiver<()>)> {
    let (packets, outgoing) = mpsc::channel(QUEUE);
    let (urgent, urgent_outgoing) = mpsc::channel(URGENT);
    let (rtt, rtt_asks) = mpsc::channel(RTT_ASKS);
    let (alive, ended) = oneshot::channel();
    let (here, heres) = mpsc::channel(1);
    let (problem, shown) = watch::channel(None);
    let handle = RelayHandle {
        packets,
        urgent,
        rtt,
        here,
        carrier: Arc::clone(&carrier),
        sockets,
        drops: Arc::clone(&drops),
        problem: shown,
    };
    let keeper = Keeper {
        coordinator,
        planner,
        delivery,
        carrier,
        drops,
        bells,
        outgoing,
        urgent: urgent_outgoing,
        rtt_asks,
        heres,
        problem,
        nonce: 0,
    };
    std::thread::Builder::new().name("meshd-relay".into()).spawn(move || {
        let _alive: oneshot::Sender<()> = alive;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .thread_keep_alive(super::HELPER_IDLE)
            .thread_name("meshd-resolve")
            .build();
        match runtime {
            Ok(runtime) => {
                runtime.block_on(keeper.run());
                runtime.shutdown_timeout(Duration::from_millis(200));
            }
            Err(e) => tracing::error!(error = %e, "the relay link cannot be used"),
        }
    })?;
    Ok((handle, ended))
}

struct Keeper {
    coordinator: Arc<Coordinator>,
    planner: mpsc::Sender<Input>,
    delivery: Delivery,
    carrier: Arc<RelayCarrier>,
    drops: Arc<Drops>,
    bells: Bells,
    outgoing: mpsc::Receiver<Relayed<Vec<u8>>>,
    urgent: mpsc::Receiver<Relayed<Vec<u8>>>,
    rtt_asks: mpsc::Receiver<oneshot::Sender<Duration>>,
    heres: mpsc::Receiver<()>,
    problem: watch::Sender<Option<Problem>>,
    nonce: u64,
}

impl Keeper {
    async fn run(mut self) {
        let mut stop = self.bells.stop();
        let mut backoff = Backoff::default();
        for n in 0.. {
            let coordinator = Arc::clone(&self.coordinator);
            let target = coordinator.target(n);
            let mut connecting = std::pin::pin!(connect_relay(&target));
            let connected = loop {
                tokio::select! {
                    connected = &mut connecting => break connected,
                    () = self.discard() => {}
                    () = stop.rung() => return,
                }
            };
            match connected {
                Ok(link) => {
                    tracing::info!("connected to the relay");
                    backoff.reset();
                    self.problem.send_replace(None);
                    // The carrier tells the planner: there may be a relay without this link.
                    self.carrier.with(|c| c.websocket(true, clock::now()));
                    let Some(why) = self.carry(link).await else { return };
                    tracing::info!("the connection to the relay was lost: {why}");
                    self.carrier.with(|c| c.websocket(false, clock::now()));
                }
                Err(e) => {
                    tracing::debug!("no connection to the relay: {e}");
                    self.problem.send_replace(Some(Problem::from(e)));
                }
            }
            let mut pause = std::pin::pin!(tokio::time::sleep(backoff.pause(&mut rand::rng())));
            let nudge = Arc::clone(&self.bells.nudge);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    () = nudge.notified() => break,
                    () = self.discard() => {}
                    () = stop.rung() => return,
                }
            }
        }
    }

    /// Without a link nothing can be sent, and nothing is kept: a packet that waited for seconds is of no use.
    async fn discard(&mut self) {
        let gone = tokio::select! {
            gone = self.urgent.recv() => gone.is_some(),
            gone = self.outgoing.recv() => gone.is_some(),
            ask = self.rtt_asks.recv() => return drop(ask),
            Some(()) = self.heres.recv() => return,
        };
        if gone {
            self.drops.count(Drop::NoPath);
        } else {
            // All senders are gone: the daemon is stopping, which the bells say too.
            std::future::pending::<()>().await;
        }
    }

    /// Carries frames until the link breaks (then says why) or the daemon stops (then `None`).
    async fn carry(&mut self, link: RelayLink) -> Option<LinkError> {
        let (mut sender, mut receiver) = link.split();
        let mut pings: Vec<(u64, Instant, oneshot::Sender<Duration>)> = Vec::new();
        let mut batch = Vec::new();
        let nudge = Arc::clone(&self.bells.nudge);
        let mut stop = self.bells.stop();
        loop {
            let sent = tokio::select! {
                biased;
                () = stop.rung() => {
                    sender.close(close::GOING_AWAY, "the node stops").await;
                    return None;
                }
                Some(first) = self.urgent.recv() => {
                    self.fill(first, &mut batch);
                    sender.send(std::mem::take(&mut batch)).await
                }
                received = receiver.recv() => match received {
                    Ok(Some(message)) => {
                        let answer = self.deliver(&message, &mut pings).await;
                        if answer.is_empty() { Ok(()) } else { sender.send(answer).await }
                    }
                    Ok(None) => Err(LinkError::Closed { code: close::NORMAL, reason: "the relay stopped".into() }),
                    Err(e) => Err(e),
                },
                Some(first) = self.outgoing.recv() => {
                    self.fill(first, &mut batch);
                    sender.send(std::mem::take(&mut batch)).await
                }
                Some(()) = self.heres.recv() => {
                    let mut here = Vec::new();
                    encode(&Frame::Here, &mut here);
                    sender.send(here).await
                }
                Some(tell) = self.rtt_asks.recv() => {
                    pings.retain(|(_, _, tell)| !tell.is_closed());
                    self.nonce += 1;
                    pings.push((self.nonce, Instant::now(), tell));
                    let mut ping = Vec::new();
                    encode(&Frame::Ping(self.nonce.to_be_bytes()), &mut ping);
                    sender.send(ping).await
                }
                () = nudge.notified() => {
                    sender.nudge();
                    Ok(())
                }
            };
            match sent {
                Ok(()) | Err(LinkError::TooLong) => {}
                Err(e) => return Some(e),
            }
        }
    }

    /// As many waiting frames as one message holds, the planner's first.
    fn fill(&mut self, first: Relayed<Vec<u8>>, batch: &mut Vec<u8>) {
        let mut next = Some(first);
        while let Some(Relayed { peer, bytes }) = next {
            if !encode(&Frame::Send { to: peer, payload: &bytes }, batch) {
                self.drops.count(Drop::TooBig);
            }
            if batch.len() + OVERHEAD >= MESSAGE {
                return;
            }
            next = self.urgent.try_recv().or_else(|_| self.outgoing.try_recv()).ok();
        }
    }

    /// Hands the frames of one message on. Returns what is to be answered.
    async fn deliver(&self, message: &Bytes, pings: &mut Vec<(u64, Instant, oneshot::Sender<Duration>)>) -> Vec<u8> {
        let mut answer = Vec::new();
        let mut delivered = false;
        for frame in Frames::new(message) {
            match frame {
                Ok(Frame::Recv { from, payload }) => {
                    let relayed = Relayed { peer: from, bytes: message.slice_ref(payload) };
                    match self.delivery.queue.try_send(relayed) {
                        Ok(()) => delivered = true,
                        Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                            self.drops.count(Drop::RelayInboundFull);
                        }
                    }
                }
                Ok(Frame::Gone { peer }) => {
                    // The planner is never waited for while packets are to be delivered.
                    if delivered {
                        self.delivery.wake.ring();
                    }
                    if self.planner.send(Input::RelayGone(peer)).await.is_err() {
                        return answer;
                    }
                }
                Ok(Frame::Ping(nonce)) => {
                    encode(&Frame::Pong(nonce), &mut answer);
                }
                Ok(Frame::Pong(nonce)) => {
                    let nonce = u64::from_be_bytes(nonce);
                    if let Some(at) = pings.iter().position(|(asked, ..)| *asked == nonce) {
                        let (_, sent, tell) = pings.swap_remove(at);
                        // Nobody waits any more: fine.
                        let _ = tell.send(sent.elapsed());
                    }
                }
                Ok(Frame::Send { .. } | Frame::Here) | Err(_) => self.drops.count(Drop::Junk),
            }
        }
        if delivered {
            self.delivery.wake.ring();
            self.carrier.with(|c| c.came_by_websocket(clock::now()));
        }
        answer
    }
}

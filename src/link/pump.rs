//! Moves WebSocket messages between a connection and two bounded queues, and notices a dead peer.
//!
//! # Liveness
//! A laptop that talks to nobody should be left alone, so an idle link is asked for a sign of life only every
//! [`Keepalive::idle`]. But as soon as something was sent and nothing has come back, the question is urgent: a WebSocket
//! ping goes out after [`PING_AGAIN`] and again every [`PING_AGAIN`], and after [`Keepalive::dead`] without a single byte
//! the link is given up. So a link in use is known to be dead within 12 s; an idle one within 32 s; and one that the owner
//! doubts (the network changed, the machine woke up) within [`NUDGE_DEAD`] of `nudge`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::link::error::{LinkError, plainly};

/// WebSocket close codes. Those from 4000 on are meshd's (RFC 6455 section 7.4.2 leaves them to applications).
pub mod close {
    /// Done, no complaint.
    pub const NORMAL: u16 = 1000;
    /// The side that closes is shutting down.
    pub const GOING_AWAY: u16 = 1001;
    /// The Noise handshake's first message does not decrypt: it was made for another coordinator key.
    pub const WRONG_KEY: u16 = 4001;
    /// No protocol version in common; the Noise answer before it says more.
    pub const VERSION: u16 = 4002;
    /// The node is not (any more) a member.
    pub const NOT_A_MEMBER: u16 = 4003;
    /// A newer connection with the same key took this one's place.
    pub const REPLACED: u16 = 4004;
    /// The other side broke the protocol.
    pub const PROTOCOL: u16 = 4005;
    /// Too many connections or requests.
    pub const BUSY: u16 = 4006;
    /// The other side did not do in time what it came for.
    pub const DEADLINE: u16 = 4007;
}

/// After something was sent unanswered: when to ping, and how often again.
const PING_AGAIN: Duration = Duration::from_secs(3);
/// How long a nudged link may stay silent.
const NUDGE_DEAD: Duration = Duration::from_secs(5);
/// How long a closing side waits for the other's goodbye.
const LINGER: Duration = Duration::from_secs(1);

/// When to ask for signs of life.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Silence in both directions after which a ping is sent.
    pub idle: Duration,
    /// Time without an answer after which the link is dead.
    pub dead: Duration,
}

impl Keepalive {
    /// The node's side.
    pub const NODE: Self = Self { idle: Duration::from_secs(20), dead: Duration::from_secs(12) };
    /// The coordinator's side: its idle time is longer, so that normally only the node pings.
    pub const COORDINATOR: Self = Self { idle: Duration::from_secs(30), dead: Duration::from_secs(12) };
}

/// The limits of one kind of link.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The longest WebSocket message accepted, in bytes.
    pub(super) message: usize,
    /// WebSocket messages queued in each direction.
    pub(super) queue: usize,
}

impl Limits {
    /// The WebSocket settings that go with these limits. Buffers are small: a coordinator has many links.
    pub(super) fn websocket(self) -> WebSocketConfig {
        WebSocketConfig::default()
            .read_buffer_size(16 << 10)
            .write_buffer_size(16 << 10)
            .max_message_size(Some(self.message))
            .max_frame_size(Some(self.message))
    }
}

enum Outgoing {
    Message(Bytes),
    Close { code: u16, reason: &'static str },
}

/// The sending half.
#[derive(Debug)]
pub(super) struct Sink {
    queue: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct Source {
    queue: mpsc::Receiver<Bytes>,
    shared: Arc<Shared>,
}

/// Starts moving messages of `ws`, on a task that ends when the link does or when a half is dropped.
pub(super) fn start<S>(ws: WebSocketStream<S>, limits: Limits, keepalive: Keepalive) -> (Sink, Source)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = Arc::new(Shared::new(keepalive));
    let (out, outgoing) = mpsc::channel(limits.queue);
    let (incoming, inc) = mpsc::channel(limits.queue);
    tokio::spawn(run(ws, outgoing, incoming, Arc::clone(&shared)));
    (Sink { queue: out, shared: Arc::clone(&shared) }, Source { queue: inc, shared })
}

impl Sink {
    /// Waits for room for `count` messages, then queues what `make` returns (at most `count`). If the wait is cancelled,
    /// `make` was not called.
    pub(super) async fn send(
        &mut self,
        count: usize,
        make: impl FnOnce() -> Result<Vec<Vec<u8>>, LinkError>,
    ) -> Result<(), LinkError> {
        let Ok(permits) = self.queue.reserve_many(count).await else { return Err(self.shared.ended()) };
        for (permit, message) in permits.zip(make()?) {
            permit.send(Outgoing::Message(message.into()));
        }
        Ok(())
    }

    /// Closes the link after what is queued. Does not wait for that.
    pub(super) async fn close(self, code: u16, reason: &'static str) {
        // An error means that the link is gone already.
        let _ = self.queue.send(Outgoing::Close { code, reason }).await;
    }

    /// Asks for a sign of life now; without one the link ends within [`NUDGE_DEAD`].
    pub(super) fn nudge(&self) {
        self.shared.nudge();
    }
}

impl Source {
    /// The next message; `None` after an orderly end. Can be cancelled.
    pub(super) async fn recv(&mut self) -> Result<Option<Bytes>, LinkError> {
        if let Some(message) = self.queue.recv().await {
            return Ok(Some(message));
        }
        let end = self.shared.ended();
        let orderly =
            matches!(end, LinkError::Closed { code: close::NORMAL | close::GOING_AWAY, .. } | LinkError::ClosedHere);
        if orderly { Ok(None) } else { Err(end) }
    }
}

#[derive(Debug)]
struct Shared {
    keepalive: Keepalive,
    life: Mutex<Life>,
    /// The watchdog must look again before its deadline.
    look: Notify,
    /// The writer must ping.
    ping: Notify,
    end: Mutex<Option<LinkError>>,
}

#[derive(Debug)]
struct Life {
    heard: Instant,
    /// Something was sent unanswered: when the link is given up, and when the next ping is due.
    waiting: Option<Waiting>,
    /// A received message waits for the owner, so nothing is read from the connection: its silence means nothing.
    delivering: bool,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    dead: Instant,
    ping: Instant,
}

/// What the watchdog has to do.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    /// Nothing before this time.
    Wait(Instant),
    Ping,
    Dead,
}

impl Life {
    fn sent(&mut self, now: Instant, keepalive: Keepalive) -> bool {
        let first = self.waiting.is_none();
        if first {
            self.waiting = Some(Waiting { dead: now + keepalive.dead, ping: now + PING_AGAIN });
        }
        first
    }

    fn due(&mut self, now: Instant, keepalive: Keepalive) -> Due {
        if self.delivering {
            return Due::Wait(now + PING_AGAIN);
        }
        match &mut self.waiting {
            Some(waiting) if now >= waiting.dead => Due::Dead,
            Some(waiting) if now >= waiting.ping => {
                waiting.ping = now + PING_AGAIN;
                Due::Ping
            }
            Some(waiting) => Due::Wait(waiting.dead.min(waiting.ping)),
            None if now >= self.heard + keepalive.idle => {
                self.waiting = Some(Waiting { dead: now + keepalive.dead, ping: now + PING_AGAIN });
                Due::Ping
            }
            None => Due::Wait(self.heard + keepalive.idle),
        }
    }
}

impl Shared {
    fn new(keepalive: Keepalive) -> Self {
        let life = Life { heard: Instant::now(), waiting: None, delivering: false };
        Self { keepalive, life: Mutex::new(life), look: Notify::new(), ping: Notify::new(), end: Mutex::new(None) }
    }

    fn heard(&self) {
        let mut life = self.life.lock();
        life.heard = Instant::now();
        life.waiting = None;
    }

    fn delivering(&self, delivering: bool) {
        self.life.lock().delivering = delivering;
        if !delivering {
            self.heard();
        }
    }

    fn sent(&self) {
        if self.life.lock().sent(Instant::now(), self.keepalive) {
            self.look.notify_one();
        }
    }

    fn nudge(&self) {
        let now = Instant::now();
        let mut life = self.life.lock();
        let dead = life.waiting.map_or(now + NUDGE_DEAD, |w| w.dead.min(now + NUDGE_DEAD));
        life.waiting = Some(Waiting { dead, ping: now });
        drop(life);
        self.look.notify_one();
    }

    fn ended(&self) -> LinkError {
        self.end.lock().clone().unwrap_or(LinkError::ClosedHere)
    }
}

async fn run<S>(
    ws: WebSocketStream<S>,
    outgoing: mpsc::Receiver<Outgoing>,
    incoming: mpsc::Sender<Bytes>,
    shared: Arc<Shared>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sink, mut stream) = ws.split();
    let end = tokio::select! {
        end = read(&mut stream, &incoming, &shared) => end,
        end = write(&mut sink, outgoing, &shared) => end,
        end = watch(&shared) => end,
        // What is queued for sending still gets a moment.
        () = async { incoming.closed().await; sleep(LINGER).await } => LinkError::ClosedHere,
    };
    let goodbye = match &end {
        // tungstenite has queued the answer to a Close; reading on sends it.
        LinkError::Closed { .. } => None,
        LinkError::Silent | LinkError::Broken(_) => {
            *shared.end.lock() = Some(end);
            return;
        }
        LinkError::ClosedHere => Some((close::NORMAL, "")),
        LinkError::Protocol(_) | LinkError::TooLong => Some((close::PROTOCOL, "the protocol was broken")),
    };
    *shared.end.lock() = Some(end);
    drop(incoming);
    // Unread bytes at the time the socket is dropped would make the kernel send a reset, and the other side could lose the
    // close code. So say goodbye, then read to the end. Everything here is best effort within LINGER.
    let _ = timeout(LINGER, async {
        if let Some((code, reason)) = goodbye {
            let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
            if sink.send(Message::Close(Some(frame))).await.is_err() {
                // Closed by `write` already, which is the usual case.
                let _ = sink.flush().await;
            }
        }
        while let Some(Ok(_)) = stream.next().await {}
    })
    .await;
}

async fn read<S>(
    stream: &mut SplitStream<WebSocketStream<S>>,
    incoming: &mpsc::Sender<Bytes>,
    shared: &Shared,
) -> LinkError
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let message = match stream.next().await {
            Some(Ok(message)) => message,
            Some(Err(e)) => return broken(e),
            None => return LinkError::Broken("it was cut off".into()),
        };
        shared.heard();
        match message {
            Message::Binary(bytes) => {
                let bytes = match incoming.try_send(bytes) {
                    // Closed: the owner wants no more; `run` ends the link soon.
                    Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => continue,
                    Err(mpsc::error::TrySendError::Full(bytes)) => bytes,
                };
                shared.delivering(true);
                let _ = incoming.send(bytes).await;
                shared.delivering(false);
            }
            // tungstenite answers pings by itself.
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Close(frame) => return closed(frame),
            Message::Text(_) | Message::Frame(_) => {
                return LinkError::Protocol("a WebSocket message that is not binary".into());
            }
        }
    }
}

pub(super) fn closed(frame: Option<CloseFrame>) -> LinkError {
    match frame {
        Some(frame) => LinkError::Closed { code: frame.code.into(), reason: frame.reason.as_str().to_owned() },
        None => LinkError::Closed { code: close::NORMAL, reason: String::new() },
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "another crate's errors; what is not named here broke the connection"
)]
pub(super) fn broken(e: WsError) -> LinkError {
    match e {
        WsError::Capacity(e) => LinkError::Protocol(e.to_string()),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => LinkError::Broken("it was cut off".into()),
        WsError::Protocol(e) => LinkError::Protocol(e.to_string()),
        WsError::Io(e) => LinkError::Broken(plainly(&e)),
        e => LinkError::Broken(e.to_string()),
    }
}

async fn write<S>(
    sink: &mut SplitSink<WebSocketStream<S>, Message>,
    mut outgoing: mpsc::Receiver<Outgoing>,
    shared: &Shared,
) -> LinkError
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let next = tokio::select! {
            biased;
            () = shared.ping.notified() => Next::Ping,
            out = outgoing.recv() => Next::Queued(out),
        };
        let message = match next {
            Next::Ping => Message::Ping(Bytes::new()),
            Next::Queued(Some(Outgoing::Message(bytes))) => {
                shared.sent();
                Message::Binary(bytes)
            }
            Next::Queued(Some(Outgoing::Close { code, reason })) => {
                let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
                return sink.send(Message::Close(Some(frame))).await.map_or_else(broken, |()| LinkError::ClosedHere);
            }
            Next::Queued(None) => return LinkError::ClosedHere,
        };
        // What is queued together leaves together.
        let sent = if outgoing.is_empty() { sink.send(message).await } else { sink.feed(message).await };
        if let Err(e) = sent {
            return broken(e);
        }
    }
}

enum Next {
    Ping,
    Queued(Option<Outgoing>),
}

async fn watch(shared: &Shared) -> LinkError {
    loop {
        let due = shared.life.lock().due(Instant::now(), shared.keepalive);
        match due {
            Due::Dead => return LinkError::Silent,
            Due::Ping => shared.ping.notify_one(),
            Due::Wait(until) => tokio::select! {
                () = sleep_until(until) => {}
                () = shared.look.notified() => {}
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPALIVE: Keepalive = Keepalive { idle: Duration::from_secs(20), dead: Duration::from_secs(12) };

    /// The times, in seconds, at which pings are due and the link is dead, if nothing is heard from second 0 on.
    fn play(mut life: Life, start: Instant) -> (Vec<u64>, u64) {
        let mut pings = Vec::new();
        let mut now = start;
        loop {
            match life.due(now, KEEPALIVE) {
                Due::Wait(until) => now = until,
                Due::Ping => pings.push((now - start).as_secs()),
                Due::Dead => return (pings, (now - start).as_secs()),
            }
        }
    }

    #[test]
    fn a_dead_peer_is_noticed_soon_in_use_and_later_when_idle() {
        let start = Instant::now();
        let life = || Life { heard: start, waiting: None, delivering: false };
        assert_eq!(play(life(), start), (vec![20, 23, 26, 29], 32));
        let mut used = life();
        assert!(used.sent(start, KEEPALIVE));
        assert!(!used.sent(start + Duration::from_secs(1), KEEPALIVE));
        assert_eq!(play(used, start), (vec![3, 6, 9], 12));
    }

    #[tokio::test]
    async fn a_nudge_pings_now_and_shortens_the_wait() {
        let shared = Shared::new(KEEPALIVE);
        shared.nudge();
        let start = Instant::now();
        let mut life = shared.life.lock();
        assert_eq!(life.due(start, KEEPALIVE), Due::Ping);
        assert_eq!(life.due(start + NUDGE_DEAD, KEEPALIVE), Due::Dead);
    }
}

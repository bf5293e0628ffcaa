//! One peer's WireGuard session: boringtun's state machine, driven by timers of our own.
//!
//! boringtun does the cryptography and the handshake. Its timers are not used: they stamp events with the time of the
//! last `update_timers` rather than the time of the event, forget a keepalive that is due, give up for ever after 90 s,
//! and know no limit of age when nobody calls them. `update_timers` is called only to move boringtun's own idea of the
//! time forward before a handshake, and to make it forget sessions that are past their age; whatever it wants to
//! send at those times is dropped, because this file sends it when it is due.
//!
//! Numbers are from the WireGuard paper, section 6.1.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use super::sync_clock;
use crate::engine::packet::{DATA_OVERHEAD, MIN_ROOM};
use crate::time::Now;
use crate::trust::keys::Secret32;
use crate::wire::classify::{Kind, classify};
use crate::wire::keys::WgKey;
use crate::wire::{peer, wireguard};

/// A session's initiator starts the next handshake when it sends with a session this old.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// A session this old is not used, in either direction.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Unanswered handshakes are given up after this time.
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// An unanswered initiation is repeated after this time (and up to a third of a second more).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Data received and nothing sent for this long: a keepalive is sent.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A session's initiator starts the next handshake when it receives with a session this old, so that a side that only
/// receives does not run into [`REJECT_AFTER_TIME`].
const REKEY_ON_RECEIVE: Duration = Duration::from_secs(165);
/// Data sent and nothing received for this long: a handshake is started.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// A session that has sent this many messages is renewed, and no longer used after eight times as many.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
const REJECT_AFTER_MESSAGES: u64 = 1 << 63;
/// While a session lives, `next_tick` is never further away than this: workers seal and open without telling the
/// planner, so due times must be looked for.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// Sessions are forgotten this long after they were last usable: boringtun lets go of them only after, not at, their end.
const GRACE: Duration = Duration::from_secs(1);
/// boringtun's ring of sessions; a session's place is its index modulo this.
const RING: usize = 8;

/// What came of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The first `len` bytes of the buffer are an inner packet.
    Packet {
        /// Bytes.
        len: usize,
        /// This message made a session usable for sending.
        established: bool,
    },
    /// The first `len` bytes of the buffer are a message of the peer's planner ([`crate::wire::peer`]), padding included.
    Message {
        /// Bytes.
        len: usize,
        /// This message made a session usable for sending.
        established: bool,
    },
    /// The peer is alive and had nothing to say.
    Keepalive {
        /// This message made a session usable for sending.
        established: bool,
    },
    /// Nothing usable.
    Error(OpenError),
}

/// Why a data message was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Not sealed with this session's key, or altered.
    #[error("the seal does not open")]
    BadTag,
    /// Its counter was seen before, or is more than 1024 behind.
    #[error("replayed or far too late")]
    Replayed,
    /// No such session (any more).
    #[error("no such session")]
    UnknownSession,
    /// Opened, but the content is no IP packet.
    #[error("the sealed content is no IP packet")]
    BadInner,
    /// Not a data message, or the buffer is too small for it.
    #[error("not a data message that fits the buffer")]
    Other,
}

/// What came of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandshakeResult {
    /// Send the first `len` bytes of the buffer (a response) back. The session is usable once the peer has sent with it.
    Reply {
        /// Bytes.
        len: usize,
    },
    /// The session is up. Send the first `len` bytes of the buffer (a keepalive): the peer may not send before it came.
    Established {
        /// Bytes.
        len: usize,
    },
    /// The peer is under load. The next initiation will carry its cookie.
    CookieStored,
    /// Not accepted.
    Refused(RefusedHandshake),
}

/// Why a handshake message was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RefusedHandshake {
    /// Not a handshake message for this key.
    #[error("not made for this key")]
    WrongKey,
    /// Its timestamp is not newer than the last accepted one.
    #[error("replayed, or made before the last one")]
    Replayed,
    /// An answer to nothing that is outstanding.
    #[error("an answer nobody waits for")]
    Unexpected,
    /// It does not decrypt.
    #[error("does not decrypt")]
    BadTag,
    /// Not a handshake message at all, or the buffer is too small (148 bytes are needed).
    #[error("not a handshake message")]
    Malformed,
}

/// What a tick wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// Nothing.
    Nothing,
    /// Send the first `len` bytes of the buffer: an initiation or a keepalive.
    Send {
        /// Bytes.
        len: usize,
    },
    /// No handshake was answered for [`REKEY_ATTEMPT_TIME`]. Said once; [`Tunnel::initiate`] starts again.
    Expired,
}

/// One peer's WireGuard session: boringtun's state machine with the timers it gets wrong.
///
/// Keep one for as long as the peer is a member: the newest handshake timestamp lives in it, and a new one would accept
/// old initiations again.
pub struct Tunnel {
    tunn: Tunn,
    index: u32,
    /// Mirrors boringtun's ring: which session is at which place, and how old it is.
    ring: [Option<Session>; RING],
    /// Place in the ring of the session that sends; set only once the peer is known to have it.
    current: Option<usize>,
    attempt: Option<Attempt>,
    /// When the last session became usable.
    established_at: Option<Now>,
    /// A session became usable by a message whose caller could not be told.
    announce: bool,
    /// Data was sent or received with a session that is due for renewal.
    rekey: bool,
    keepalive_due: Option<Now>,
    reply_due: Option<Now>,
    last_tick: Now,
}

#[derive(Debug, Clone, Copy)]
struct Session {
    /// Our index of it, as in the receiver field.
    index: u32,
    since: Now,
    initiator: bool,
    sent: u64,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    started: Now,
    last: Now,
}

impl Tunnel {
    /// A tunnel to `peer` without a session. `index` must be below 2²⁴ and not
    /// [`reserved`](wireguard::is_reserved); higher bits are ignored.
    #[must_use]
    pub fn new(my_secret: &Secret32, peer: &WgKey, index: u32) -> Self {
        // Handshake timestamps count from the creation of the Tunn. Under the mock clock that must be the epoch, or a
        // node restarted in the simulator would send timestamps older than those of its earlier life.
        sync_clock(Now::ZERO);
        let index = index & 0x00FF_FFFF;
        let secret = StaticSecret::from(*my_secret.expose());
        // decapsulate verifies and counts every handshake again after the gate did; this limiter never objects.
        let no_limit = Arc::new(RateLimiter::new(&PublicKey::from(&secret), u64::MAX));
        Self {
            tunn: Tunn::new(secret, PublicKey::from(peer.0), None, None, index, Some(no_limit)),
            index,
            ring: [None; RING],
            current: None,
            attempt: None,
            established_at: None,
            announce: false,
            rekey: false,
            keepalive_due: None,
            reply_due: None,
            last_tick: Now::ZERO,
        }
    }

    /// The 24-bit index that this tunnel's messages carry in the upper bits of the receiver field.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// True if a session is there to send with.
    #[must_use]
    pub fn can_send(&self, now: Now) -> bool {
        self.sending(now).is_some()
    }

    /// Time since the session that sends, or the last one that did, became usable.
    #[must_use]
    pub fn last_handshake_age(&self, now: Now) -> Option<Duration> {
        self.established_at.map(|at| now.since(at))
    }

    /// True while an initiation is out and unanswered.
    #[must_use]
    pub const fn is_initiating(&self) -> bool {
        self.attempt.is_some()
    }

    /// Seals an inner packet (an empty one is a keepalive) and returns the datagram's length. None if there is no session
    /// or `out` is shorter than the packet plus 32 bytes; nothing is queued.
    pub fn seal(&mut self, packet: &[u8], out: &mut [u8], now: Now) -> Option<usize> {
        let place = self.sending(now)?;
        if out.len() < packet.len().checked_add(DATA_OVERHEAD)? {
            return None;
        }
        sync_clock(now);
        let len = match self.tunn.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(datagram) if classify(datagram) == Kind::Data => datagram.len(),
            TunnResult::WriteToNetwork(_)
            | TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {
                self.current = None;
                return None;
            }
        };
        self.keepalive_due = None;
        if let Some(session) = self.ring[place].as_mut() {
            session.sent += 1;
            let old = session.initiator && now.since(session.since) >= REKEY_AFTER_TIME;
            self.rekey |= !packet.is_empty() && (old || session.sent >= REKEY_AFTER_MESSAGES);
        }
        if !packet.is_empty() && self.reply_due.is_none() {
            self.reply_due = Some(now + REPLY_TIMEOUT + self.jitter());
        }
        Some(len)
    }

    /// Opens a data message into `out`, which must be at least as long as the datagram minus 16 bytes. `from` is where it
    /// came from, if it has an address.
    pub fn open(&mut self, from: Option<IpAddr>, datagram: &[u8], out: &mut [u8], now: Now) -> Opened {
        if classify(datagram) != Kind::Data || out.len() < datagram.len() - 16 {
            return Opened::Error(OpenError::Other);
        }
        let index = wireguard::receiver_index(datagram).unwrap_or_default();
        let place = index as usize % RING;
        let Some(session) = self.ring[place].filter(|s| s.index == index && now.since(s.since) < REJECT_AFTER_TIME)
        else {
            return Opened::Error(OpenError::UnknownSession);
        };
        sync_clock(now);
        let result = match self.tunn.decapsulate(from, datagram, out) {
            TunnResult::WriteToTunnelV4(packet, _) => Ok(packet.len()),
            TunnResult::WriteToTunnelV6(packet, _) => Ok(packet.len()),
            TunnResult::Done => Ok(0),
            TunnResult::Err(e) => Err(open_error(&e)),
            TunnResult::WriteToNetwork(_) => Err(OpenError::Other),
        };
        // What is no IP packet boringtun has opened all the same, where it would have put a packet.
        let inner = datagram.len() - DATA_OVERHEAD;
        let message = result == Err(OpenError::BadInner) && out.get(..inner).is_some_and(peer::is_message);
        let len = if message { Ok(inner) } else { result };
        if !matches!(len, Ok(_) | Err(OpenError::BadInner)) {
            return Opened::Error(len.err().unwrap_or(OpenError::Other));
        }
        // Authenticated: the peer has this session's key, so it may be sent with.
        self.reply_due = None;
        let newer = self.current.and_then(|c| self.ring[c]).is_none_or(|c| session.since > c.since);
        if newer && self.current != Some(place) {
            self.establish(place, now);
            self.announce = true;
        }
        match len {
            Err(e) => Opened::Error(e),
            Ok(0) => Opened::Keepalive { established: std::mem::take(&mut self.announce) },
            Ok(len) => {
                if self.keepalive_due.is_none() {
                    self.keepalive_due = Some(now + KEEPALIVE_TIMEOUT);
                }
                self.rekey |= session.initiator && now.since(session.since) >= REKEY_ON_RECEIVE;
                let established = std::mem::take(&mut self.announce);
                if message { Opened::Message { len, established } } else { Opened::Packet { len, established } }
            }
        }
    }

    /// Writes a handshake initiation and returns its length. None if one is out already (unless `force`) or `out` is
    /// shorter than 148 bytes.
    ///
    /// Only the last two initiations can be answered, so forcing one more often than every half round trip never
    /// completes. An initiation may be sent on several paths at once: the peer answers the first copy.
    pub fn initiate(&mut self, out: &mut [u8], force: bool, now: Now) -> Option<usize> {
        if out.len() < MIN_ROOM || (self.attempt.is_some() && !force) {
            return None;
        }
        let attempt = self.attempt;
        if attempt.is_none() {
            self.refresh(now);
        }
        sync_clock(now);
        let TunnResult::WriteToNetwork(datagram) = self.tunn.format_handshake_initiation(out, true) else {
            return None;
        };
        let len = datagram.len();
        if attempt.is_some() {
            // Sessions are dated by the last refresh; with one just sent boringtun has nothing to add.
            self.refresh(now);
        }
        self.attempt = Some(Attempt { started: attempt.map_or(now, |a| a.started), last: now });
        self.rekey = false;
        self.reply_due = None;
        Some(len)
    }

    /// Processes an initiation, a response or a cookie reply that passed the gate. `out` needs 148 bytes. `from` must be
    /// the sender's address; for a message through a relay, a fixed pseudo address.
    pub fn handshake(&mut self, from: IpAddr, datagram: &[u8], out: &mut [u8], now: Now) -> HandshakeResult {
        let kind = classify(datagram);
        if out.len() < MIN_ROOM || !matches!(kind, Kind::HandshakeInit | Kind::HandshakeResponse | Kind::CookieReply) {
            return HandshakeResult::Refused(RefusedHandshake::Malformed);
        }
        if kind == Kind::HandshakeInit {
            self.refresh(now);
        }
        sync_clock(now);
        let reply = match self.tunn.decapsulate(Some(from), datagram, out) {
            TunnResult::WriteToNetwork(reply) => reply,
            TunnResult::Done if kind == Kind::CookieReply => return HandshakeResult::CookieStored,
            TunnResult::Err(e) => return HandshakeResult::Refused(handshake_error(&e)),
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                return HandshakeResult::Refused(RefusedHandshake::Malformed);
            }
        };
        let len = reply.len();
        let initiator = kind == Kind::HandshakeResponse;
        // Our index of the new session: the receiver of a response, the sender of our own response.
        let index = if initiator { wireguard::receiver_index(datagram) } else { wireguard::sender_index(reply) };
        let Some(index) = index else { return HandshakeResult::Refused(RefusedHandshake::Malformed) };
        let place = index as usize % RING;
        self.ring[place] = Some(Session { index, since: now, initiator, sent: 0 });
        if initiator {
            self.establish(place, now);
            // The keepalive in `out` is the first message of the session.
            self.keepalive_due = None;
            return HandshakeResult::Established { len };
        }
        if self.current == Some(place) {
            // The ring went round: the new session took the place of the one that sends, before the peer confirmed it.
            self.current = None;
        }
        HandshakeResult::Reply { len }
    }

    /// Does what is due. `out` needs 148 bytes, or nothing is sent. One call does one thing: call again while it says
    /// `Send`.
    pub fn tick(&mut self, out: &mut [u8], now: Now) -> Tick {
        self.last_tick = now;
        self.forget_old_sessions(now);
        if let Some(attempt) = self.attempt {
            if now.since(attempt.started) >= REKEY_ATTEMPT_TIME {
                self.attempt = None;
                self.reply_due = None;
                self.rekey = false;
                return Tick::Expired;
            }
            if now >= attempt.last + REKEY_TIMEOUT + self.jitter() {
                return self.initiate(out, true, now).map_or(Tick::Nothing, |len| Tick::Send { len });
            }
        } else if self.rekey || self.reply_due.is_some_and(|due| due <= now) {
            return self.initiate(out, false, now).map_or(Tick::Nothing, |len| Tick::Send { len });
        }
        if self.keepalive_due.is_some_and(|due| due <= now) {
            self.keepalive_due = None;
            return self.seal(&[], out, now).map_or(Tick::Nothing, |len| Tick::Send { len });
        }
        Tick::Nothing
    }

    /// When to call [`Self::tick`] next. None: never, as there is neither a session nor a handshake under way. Ask again
    /// after every call of `initiate`, `handshake` and `tick`, and when `open` said `established`; `seal` and `open`
    /// otherwise never bring it forward by more than is bearable.
    #[must_use]
    pub fn next_tick(&self, now: Now) -> Option<Now> {
        let attempt =
            self.attempt.map(|a| (a.last + REKEY_TIMEOUT + self.jitter()).min(a.started + REKEY_ATTEMPT_TIME));
        let expiry = self.ring.iter().flatten().map(|s| s.since + REJECT_AFTER_TIME + GRACE).min();
        let due = self.sending(now).and_then(|_| {
            let rekey = (self.rekey && self.attempt.is_none()).then_some(now);
            let watch = Some(self.last_tick.max(self.established_at.unwrap_or_default()) + WATCH_INTERVAL);
            [rekey, watch, self.keepalive_due, self.reply_due.filter(|_| self.attempt.is_none())]
                .into_iter()
                .flatten()
                .min()
        });
        [attempt, expiry, due].into_iter().flatten().min()
    }

    /// Place of the session to send with.
    fn sending(&self, now: Now) -> Option<usize> {
        let place = self.current?;
        let session = self.ring[place].as_ref()?;
        (now.since(session.since) < REJECT_AFTER_TIME && session.sent < REJECT_AFTER_MESSAGES).then_some(place)
    }

    fn establish(&mut self, place: usize, now: Now) {
        self.current = Some(place);
        self.established_at = Some(now);
        self.attempt = None;
        self.rekey = false;
        self.reply_due = None;
    }

    fn forget_old_sessions(&mut self, now: Now) {
        let mut forgot = false;
        for (place, slot) in self.ring.iter_mut().enumerate() {
            if slot.is_some_and(|s| now.since(s.since) >= REJECT_AFTER_TIME + GRACE) {
                *slot = None;
                forgot = true;
                if self.current == Some(place) {
                    self.current = None;
                    self.keepalive_due = None;
                    self.reply_due = None;
                    self.rekey = false;
                }
            }
        }
        // Keys of dead sessions should not stay in memory. With a live session or a handshake under way boringtun
        // might use the call to give up or to start over, so that waits.
        if forgot && self.attempt.is_none() && self.ring.iter().all(Option::is_none) {
            self.refresh(now);
        }
    }

    /// Moves boringtun's idea of the time forward. It dates sessions by it, and would otherwise find a new session as old
    /// as the last call.
    fn refresh(&mut self, now: Now) {
        sync_clock(now);
        let mut unsent = [0; MIN_ROOM];
        // What it wants to send is sent by our own timers; that it considers the connection expired is undone by the
        // next initiation.
        let _ = self.tunn.update_timers(&mut unsent);
        if self.tunn.time_since_last_handshake().is_none() {
            self.current = None;
        }
    }

    /// Keeps two ends from repeating themselves in step: 0 to 333 ms, fixed for a tunnel.
    const fn jitter(&self) -> Duration {
        Duration::from_millis((self.index % 334) as u64)
    }
}

/// Shows no keys.
impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("index", &format_args!("{:#08x}", self.index))
            .field("current", &self.current.and_then(|c| self.ring[c]))
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

const fn open_error(error: &WireGuardError) -> OpenError {
    match error {
        WireGuardError::InvalidAeadTag => OpenError::BadTag,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => OpenError::Replayed,
        WireGuardError::WrongIndex | WireGuardError::NoCurrentSession | WireGuardError::ConnectionExpired => {
            OpenError::UnknownSession
        }
        // After the length check, boringtun says this of content that is no IP packet only.
        WireGuardError::InvalidPacket => OpenError::BadInner,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::UnexpectedPacket
        | WireGuardError::WrongPacketType
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::WrongTai64nTimestamp
        | WireGuardError::InvalidMac
        | WireGuardError::LockFailed
        | WireGuardError::UnderLoad => OpenError::Other,
    }
}

const fn handshake_error(error: &WireGuardError) -> RefusedHandshake {
    match error {
        WireGuardError::WrongKey | WireGuardError::InvalidMac => RefusedHandshake::WrongKey,
        WireGuardError::WrongTai64nTimestamp | WireGuardError::InvalidTai64nTimestamp => RefusedHandshake::Replayed,
        WireGuardError::UnexpectedPacket | WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => {
            RefusedHandshake::Unexpected
        }
        WireGuardError::InvalidAeadTag => RefusedHandshake::BadTag,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::InvalidCounter
        | WireGuardError::DuplicateCounter
        | WireGuardError::InvalidPacket
        | WireGuardError::LockFailed
        | WireGuardError::ConnectionExpired
        | WireGuardError::UnderLoad => RefusedHandshake::Malformed,
    }
}

#[cfg(test)]
mod tests;

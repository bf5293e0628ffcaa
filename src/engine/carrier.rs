//! What carries relayed packets: the relay's UDP port when UDP passes, the WebSocket otherwise.
//!
//! The planner and the packet machines do not notice: to them there is a relay. The shell asks here for every packet.
//!
//! ```text
//! Asleep ── a relayed packet ──► Opening ── the coordinator's answer ──► Proving ── a Pong of data size ──► Carrying
//!    ▲                              │                                       │                                  │
//!    │                              └───────────── no answer ───────────────┴──► Resting ◄── a second's silence ┤
//!    └──────────────────────── after a while ──────────────────────────────────────┘                            │
//!    └──────────────────────────────── nothing relayed for half a minute ───────────────────────────────────────┘
//! ```
//!
//! At the start the two race: the WebSocket has a head start, then UDP is tried without waiting for a packet.
//!
//! Only in `Carrying` does anything go by UDP, and only then does the relay deliver by it. While traffic goes, a Ping asks
//! every 300 ms whether UDP still passes both ways; without an answer the WebSocket takes over within a second. A node that
//! is idle sends nothing, lets its NAT forget, and is reached by the WebSocket, which is there anyway.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use rustc_hash::FxBuildHasher;

use crate::engine::drops::Drop;
use crate::engine::io::PeerId;
use crate::time::Now;
use crate::wire::keys::WgKey;
use crate::wire::relay_udp::{
    self, Fresh, HEADER, Header, Kind, NONCE, Name, SessionKeys, SessionSecret, Window, Wish,
};

/// Payload of a Ping that proves a way: a sealed packet of 1,280 bytes fits where it fits.
pub const PROOF: usize = 1_312;
/// Addresses of the relay that are tried.
pub const MAX_ADDRESSES: usize = 4;

/// Head start of the WebSocket: without one so long after the control link came up, UDP is tried before anything is relayed.
const HEAD_START: Duration = Duration::from_millis(150);
/// How long the coordinator may take to open a session.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// When, after the first, further Pings are sent to prove a way, and when it is given up.
const PROVE_AT_MS: [u64; 4] = [150, 400, 900, 2_000];
/// Traffic goes as long as there was a packet so recently.
const TRAFFIC: Duration = Duration::from_secs(1);
/// With traffic, a Ping follows so long after the last Pong.
const ASK: Duration = Duration::from_millis(300);
/// Without. The relay delivers to sessions heard of in the last 15 s.
const ASK_QUIET: Duration = Duration::from_secs(5);
/// An unanswered Ping is repeated after this.
const ASK_AGAIN: Duration = Duration::from_millis(150);
/// Unanswered Pings are given up after this, or after twice the round trip and a little.
const SILENCE: Duration = Duration::from_millis(600);
/// Nothing relayed for so long: let UDP go.
const SLEEP: Duration = Duration::from_secs(30);
/// How long UDP is left alone after it failed, doubled with every failure in a row up to the second.
const REST: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));
/// What carried for so long did not fail in a row.
const GOOD: Duration = Duration::from_secs(60);

/// What carries relayed packets now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    /// The relay's UDP port.
    Udp,
    /// The WebSocket.
    WebSocket,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Ask the coordinator for a session; answer with [`Carrier::opened`] or [`Carrier::refused`].
    Open,
    /// Send this datagram from the node's own socket.
    Send {
        /// To the relay.
        to: SocketAddr,
        /// What.
        bytes: Vec<u8>,
    },
    /// Tell the relay by WebSocket to deliver there.
    Here,
    /// There is a relay now, or there is none.
    Relay(bool),
    /// The relay has no way to this peer.
    Gone(WgKey),
}

/// The choice of a carrier.
#[derive(Debug)]
pub struct Carrier {
    state: State,
    session: Option<Session>,
    names: HashMap<Name, Option<(PeerId, WgKey)>, FxBuildHasher>,
    control: bool,
    websocket: bool,
    /// When UDP is tried, should there be no WebSocket by then.
    race_at: Option<Now>,
    told: bool,
    /// Failures in a row.
    failures: u32,
    last_traffic: Option<Now>,
    rtt: Option<Duration>,
    outputs: VecDeque<Output>,
    news: bool,
}

#[derive(Debug)]
struct Session {
    number: u32,
    keys: SessionKeys,
    sent: u64,
    window: Window,
    at: Vec<SocketAddr>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Asleep,
    Opening {
        since: Now,
    },
    Proving {
        since: Now,
        tries: usize,
    },
    Carrying {
        at: SocketAddr,
        since: Now,
        answered: Now,
        /// Since when Pings are unanswered, and when the last was sent.
        asking: Option<(Now, Now)>,
    },
    Resting {
        until: Now,
    },
}

impl Default for Carrier {
    fn default() -> Self {
        Self::new()
    }
}

impl Carrier {
    /// Without links, session or peers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Asleep,
            session: None,
            names: HashMap::default(),
            control: false,
            websocket: false,
            race_at: None,
            told: false,
            failures: 0,
            last_traffic: None,
            rtt: None,
            outputs: VecDeque::new(),
            news: false,
        }
    }

    /// What carries relayed packets now; `None`: nothing.
    #[must_use]
    pub const fn carries(&self) -> Option<Carries> {
        match self.state {
            State::Carrying { .. } => Some(Carries::Udp),
            _ if self.websocket => Some(Carries::WebSocket),
            _ => None,
        }
    }

    /// The round trip to the relay's UDP port, as last measured.
    #[must_use]
    pub const fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    // Who there is.

    /// A peer exists.
    pub fn peer(&mut self, peer: PeerId, key: WgKey) {
        let entry = self.names.entry(Name::of(&key)).or_insert(Some((peer, key)));
        if entry.is_some_and(|(_, known)| known != key) {
            *entry = None;
        }
    }

    /// A peer is out.
    pub fn peer_gone(&mut self, peer: PeerId) {
        self.names.retain(|_, known| known.is_none_or(|(id, _)| id != peer));
    }

    // The links.

    /// The control link came up or went.
    pub fn control(&mut self, up: bool, now: Now) {
        self.control = up;
        self.race_at = (up && !self.websocket).then(|| now + HEAD_START);
        self.news = true;
        // A coordinator that was started anew knows no session of before. One that carries proves itself.
        if up && !matches!(self.state, State::Carrying { .. }) {
            self.session = None;
            self.state = State::Asleep;
            self.failures = 0;
            self.wake_for_recent_traffic(now);
        }
    }

    /// The WebSocket came up or went.
    pub fn websocket(&mut self, up: bool, now: Now) {
        self.websocket = up;
        self.race_at = None;
        self.news = true;
        self.tell();
        // UDP is the only way left.
        if !up && matches!(self.state, State::Asleep) {
            self.wake(now);
        }
    }

    /// The coordinator opened a session.
    pub fn opened(&mut self, number: u32, secret: &SessionSecret, mut at: Vec<SocketAddr>, now: Now) {
        at.truncate(MAX_ADDRESSES);
        let (keys, window) = (secret.keys(), Window::default());
        self.session = Some(Session { number, keys, sent: 0, window, at });
        self.prove(now);
    }

    /// The coordinator opens no session.
    pub fn refused(&mut self, now: Now) {
        if matches!(self.state, State::Opening { .. }) {
            self.set(State::Resting { until: now + REST.1 });
        }
    }

    /// The machine's addresses changed, or it was asleep.
    pub fn network_changed(&mut self, now: Now) {
        match self.state {
            State::Carrying { at, .. } => self.ask(at, now),
            State::Resting { .. } => {
                self.failures = 0;
                self.set(State::Asleep);
                self.wake_for_recent_traffic(now);
            }
            State::Asleep | State::Opening { .. } | State::Proving { .. } => {}
        }
    }

    // Packets.

    /// Whether a packet to this peer goes by UDP. If so, header and tag are written into the first [`HEADER`] bytes of
    /// `datagram`, whose payload is in place, and it is to be sent to the address; if not, it goes by WebSocket.
    pub fn seal(&mut self, to: &WgKey, datagram: &mut [u8], now: Now) -> Option<SocketAddr> {
        self.traffic(now);
        let State::Carrying { at, .. } = self.state else { return None };
        let name = Name::of(to);
        // Not for somebody who shares the name with another.
        self.names.get(&name).copied().flatten().filter(|(_, known)| known == to)?;
        self.session.as_mut()?.seal(Kind::Send, name, datagram);
        Some(at)
    }

    /// A packet came by WebSocket.
    pub fn came_by_websocket(&mut self, now: Now) {
        self.traffic(now);
    }

    /// A relay datagram came. With a packet in it (behind the first [`HEADER`] bytes): who sent it.
    ///
    /// # Errors
    /// Why it is dropped.
    pub fn receive(&mut self, datagram: &[u8], from: SocketAddr, now: Now) -> Result<Option<WgKey>, Drop> {
        let header = relay_udp::decode(datagram).map_err(|_| Drop::BadRelayDatagram)?;
        let session = self.session.as_mut().filter(|s| s.number == header.session).ok_or(Drop::BadRelayDatagram)?;
        if !session.keys.down.verify(datagram) {
            return Err(Drop::BadRelayTag);
        }
        if session.window.accept(header.counter) == Fresh::Seen {
            return Err(Drop::RelayReplayed);
        }
        let known = |names: &HashMap<Name, Option<(PeerId, WgKey)>, FxBuildHasher>| {
            names.get(&header.name).copied().flatten().map(|(_, key)| key)
        };
        match header.kind {
            Kind::Recv => {
                self.traffic(now);
                known(&self.names).map(Some).ok_or(Drop::UnknownRelaySender)
            }
            Kind::Gone => {
                if let Some(peer) = known(&self.names) {
                    self.put(Output::Gone(peer));
                }
                Ok(None)
            }
            Kind::Pong => {
                self.pong(datagram.get(HEADER..).unwrap_or_default(), from, now);
                Ok(None)
            }
            Kind::Send | Kind::Ping => Err(Drop::BadRelayDatagram),
        }
    }

    /// The system refuses to send to an address; perhaps it is the relay's.
    pub fn send_failed(&mut self, to: SocketAddr, now: Now) {
        if matches!(self.state, State::Carrying { at, .. } if at == to) {
            self.fail(now);
        }
    }

    // Time.

    /// A deadline passed, or may have.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.race_at.is_some_and(|at| now >= at) {
            self.race_at = None;
            if matches!(self.state, State::Asleep) {
                self.wake(now);
            }
        }
        match self.state {
            State::Asleep => {}
            State::Opening { since } if now.since(since) >= OPEN_PATIENCE => self.fail(now),
            State::Opening { .. } => {}
            State::Proving { since, tries } => {
                let due = |tries: usize| {
                    PROVE_AT_MS.get(tries).is_some_and(|ms| now.since(since) >= Duration::from_millis(*ms))
                };
                if due(tries) && tries + 1 == PROVE_AT_MS.len() {
                    self.fail(now);
                } else if due(tries) {
                    self.state = State::Proving { since, tries: tries + 1 };
                    self.ping_all(now);
                }
            }
            State::Carrying { at, asking: Some((first, last)), .. } => {
                if now.since(first) >= self.patience() {
                    self.fail(now);
                } else if now.since(last) >= ASK_AGAIN {
                    self.ask(at, now);
                }
            }
            State::Carrying { at, since, answered, asking: None } => {
                if self.sleep_at(since).is_some_and(|at| now >= at) {
                    let bytes = self.ping(Wish::DeliverElsewhere, NONCE, now);
                    self.outputs.extend(bytes.map(|bytes| Output::Send { to: at, bytes }));
                    self.put(Output::Here);
                    self.set(State::Asleep);
                } else if now >= self.ask_at(answered) {
                    self.ask(at, now);
                }
            }
            State::Resting { until } if now >= until => {
                self.set(State::Asleep);
                self.wake_for_recent_traffic(now);
            }
            State::Resting { .. } => {}
        }
    }

    /// When to call [`Self::handle_timeout`] at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        if !self.outputs.is_empty() {
            return Some(Now::ZERO);
        }
        let step = self.step_at();
        self.race_at.map_or(step, |race| Some(step.map_or(race, |step| step.min(race))))
    }

    fn step_at(&self) -> Option<Now> {
        match self.state {
            State::Asleep => None,
            State::Opening { since } => Some(since + OPEN_PATIENCE),
            State::Proving { since, tries } => PROVE_AT_MS.get(tries).map(|ms| since + Duration::from_millis(*ms)),
            State::Carrying { asking: Some((first, last)), .. } => {
                Some((first + self.patience()).min(last + ASK_AGAIN))
            }
            State::Carrying { since, answered, asking: None, .. } => {
                let ask = self.ask_at(answered);
                Some(self.sleep_at(since).map_or(ask, |sleep| ask.min(sleep)))
            }
            State::Resting { until } => Some(until),
        }
    }

    /// What the shell is to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// True once after something happened that may have changed [`Self::poll_timeout`] or brought an output: whoever drives
    /// the timer must look.
    pub const fn take_news(&mut self) -> bool {
        std::mem::replace(&mut self.news, false)
    }

    // Steps.

    fn traffic(&mut self, now: Now) {
        let before = self.last_traffic.replace(now);
        match self.state {
            State::Asleep => self.wake(now),
            // The timer was set for a quiet spell.
            State::Carrying { .. } => self.news |= before.is_none_or(|before| now.since(before) >= TRAFFIC),
            State::Opening { .. } | State::Proving { .. } | State::Resting { .. } => {}
        }
    }

    fn wake_for_recent_traffic(&mut self, now: Now) {
        if self.last_traffic.is_some() && self.quiet_for(now) < OPEN_PATIENCE {
            self.wake(now);
        }
    }

    fn wake(&mut self, now: Now) {
        if self.session.is_some() {
            self.prove(now);
        } else if self.control {
            self.put(Output::Open);
            self.set(State::Opening { since: now });
        }
    }

    fn prove(&mut self, now: Now) {
        self.set(State::Proving { since: now, tries: 0 });
        self.ping_all(now);
    }

    fn ping_all(&mut self, now: Now) {
        let at = self.session.as_ref().map(|s| s.at.clone()).unwrap_or_default();
        for to in at {
            let bytes = self.ping(Wish::Nothing, PROOF, now);
            self.outputs.extend(bytes.map(|bytes| Output::Send { to, bytes }));
        }
        self.news = true;
    }

    fn ask(&mut self, at: SocketAddr, now: Now) {
        let bytes = self.ping(Wish::DeliverHere, NONCE, now);
        self.outputs.extend(bytes.map(|bytes| Output::Send { to: at, bytes }));
        if let State::Carrying { asking, .. } = &mut self.state {
            *asking = Some((asking.map_or(now, |(first, _)| first), now));
        }
        self.news = true;
    }

    /// A Ping; its eight bytes are the time, so that its Pong tells the round trip.
    fn ping(&mut self, wish: Wish, len: usize, now: Now) -> Option<Vec<u8>> {
        let mut bytes = vec![0; HEADER + len];
        bytes.get_mut(HEADER..HEADER + NONCE)?.copy_from_slice(&now.0.to_be_bytes());
        self.session.as_mut()?.seal(Kind::Ping, wish.name(), &mut bytes);
        Some(bytes)
    }

    fn pong(&mut self, payload: &[u8], from: SocketAddr, now: Now) {
        let Some(sent) = payload.first_chunk().map(|b| Now(u64::from_be_bytes(*b))) else { return };
        self.rtt = Some(now.since(sent));
        match &mut self.state {
            State::Proving { .. } if payload.len() >= PROOF => {
                self.set(State::Carrying { at: from, since: now, answered: now, asking: None });
                self.ask(from, now);
                self.tell();
            }
            State::Carrying { answered, asking, .. } => {
                (*answered, *asking) = (now, None);
                self.news = true;
            }
            State::Asleep | State::Opening { .. } | State::Proving { .. } | State::Resting { .. } => {}
        }
    }

    fn fail(&mut self, now: Now) {
        if let State::Carrying { since, .. } = self.state {
            self.put(Output::Here);
            if now.since(since) >= GOOD {
                self.failures = 0;
            }
        } else {
            // It may be a session the coordinator no longer knows.
            self.session = None;
        }
        let rest = REST.0.saturating_mul(1 << self.failures.min(10)).min(REST.1);
        self.failures = self.failures.saturating_add(1);
        self.rtt = None;
        self.set(State::Resting { until: now + rest });
    }

    fn set(&mut self, state: State) {
        self.state = state;
        self.news = true;
        self.tell();
    }

    fn put(&mut self, output: Output) {
        self.outputs.push_back(output);
        self.news = true;
    }

    fn tell(&mut self) {
        let relay = self.carries().is_some();
        if std::mem::replace(&mut self.told, relay) != relay {
            self.put(Output::Relay(relay));
        }
    }

    fn patience(&self) -> Duration {
        SILENCE.max(self.rtt.unwrap_or_default() * 2 + ASK_AGAIN)
    }

    /// When the next Ping is due: soon if there will have been traffic shortly before it.
    fn ask_at(&self, answered: Now) -> Now {
        let soon = answered + ASK;
        if self.last_traffic.is_some_and(|last| soon <= last + TRAFFIC) { soon } else { answered + ASK_QUIET }
    }

    /// When UDP is let go if nothing more comes: never while there is nothing else.
    fn sleep_at(&self, since: Now) -> Option<Now> {
        self.websocket.then(|| self.last_traffic.map_or(since, |last| last.max(since)) + SLEEP)
    }

    fn quiet_for(&self, now: Now) -> Duration {
        self.last_traffic.map_or(Duration::MAX, |last| now.since(last))
    }
}

impl Session {
    fn seal(&mut self, kind: Kind, name: Name, datagram: &mut [u8]) {
        self.sent += 1;
        self.keys.up.seal(&Header { kind, counter: self.sent, session: self.number, name }, datagram);
    }
}

#[cfg(test)]
mod tests;

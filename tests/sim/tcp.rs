//! TCP between nodes, as far as NATs matter: segments travel the same networks as datagrams and pass the same kinds of NAT, which
//! keep a table of their own for TCP and let it out where they let no UDP out. The kernels' side is the usual three-way
//! handshake with simultaneous open (RFC 9293 section 3.5), a reset from where nobody listens, and nothing else: a lost segment
//! arrives later, a path that is cut loses what is on it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use meshd::engine::drops::Drop as Reason;
use meshd::engine::io::{Input, Notice, SocketId, TcpOrder, Via};
use meshd::time::Now;

use crate::sim::{Event, Life, Sim};
use crate::town::SERVER_V4;
use crate::world::HostId;

/// The coordinator's port, which answers STUN.
const COORDINATOR_PORT: u16 = 443;
/// What the real shell does when (`src/daemon/tcp.rs`, `src/os/streams.rs`).
const SEEN_WITHIN: Duration = Duration::from_millis(700);
const HELD: Duration = Duration::from_secs(3);
const SYN_AGAIN: Duration = Duration::from_secs(1);
const RESET_PAUSE: Duration = Duration::from_millis(100);
const STRANGERS_TIME: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(45);

/// The first byte of a segment.
mod kind {
    pub(super) const SYN: u8 = 1;
    pub(super) const SYN_ACK: u8 = 2;
    pub(super) const ACK: u8 = 3;
    pub(super) const RESET: u8 = 4;
    pub(super) const DATA: u8 = 5;
    /// How am I seen? And: like this.
    pub(super) const ASK: u8 = 6;
    pub(super) const SEEN: u8 = 7;
}

/// A node's port and connections.
#[derive(Debug, Default)]
pub(crate) struct Tcp {
    /// Open.
    listens: bool,
    /// When it was asked how the port is seen.
    asked: Option<Now>,
    connections: BTreeMap<SocketAddr, Connection>,
    accepted: u16,
    /// SYNs sent.
    pub(crate) syns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Connection {
    socket: SocketId,
    state: State,
    began: Now,
    heard: Now,
    trusted: bool,
    /// Ours, whose planner waits to hear of it.
    ordered: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    SynSent,
    SynReceived,
    Open,
}

impl Tcp {
    /// Connections that are up.
    pub(crate) fn open(&self) -> usize {
        self.connections.values().filter(|c| c.state == State::Open).count()
    }

    pub(crate) const fn listens(&self) -> bool {
        self.listens
    }
}

impl Sim {
    /// What the planner wants done.
    pub(crate) fn tcp_order(&mut self, life: Life, order: TcpOrder) {
        let now = self.now();
        match order {
            TcpOrder::Gather => {
                let tcp = self.tcp_of(life);
                (tcp.listens, tcp.asked) = (true, Some(now));
                self.segment(life, SocketAddr::from((SERVER_V4[0], COORDINATOR_PORT)), &[kind::ASK]);
                self.world.at(now + SEEN_WITHIN, Event::TcpSeen(life, now));
            }
            TcpOrder::Dial { socket, to } => {
                let tcp = self.tcp_of(life);
                if tcp.connections.contains_key(&to) {
                    return self.tcp_closed(life, socket);
                }
                let state = State::SynSent;
                let connection = Connection { socket, state, began: now, heard: now, trusted: false, ordered: true };
                tcp.connections.insert(to, connection);
                self.syn(life, to);
                for at in [SYN_AGAIN, HELD, STRANGERS_TIME] {
                    self.world.at(now + at, Event::TcpTimer(life, to));
                }
            }
            TcpOrder::Trust(socket) => {
                for connection in self.tcp_of(life).connections.values_mut().filter(|c| c.socket == socket) {
                    connection.trusted = true;
                }
            }
            TcpOrder::Close(sockets) => {
                let theirs = |c: &Connection| sockets.contains(&c.socket);
                let gone: Vec<SocketAddr> =
                    self.tcp_of(life).connections.iter().filter(|(_, c)| theirs(c)).map(|(to, _)| *to).collect();
                for remote in gone {
                    self.tcp_of(life).connections.remove(&remote);
                    self.segment(life, remote, &[kind::RESET]);
                }
            }
            TcpOrder::Stop => {
                let tcp = self.tcp_of(life);
                assert!(tcp.connections.is_empty(), "the port is closed under its connections");
                tcp.listens = false;
            }
        }
    }

    /// A datagram in a connection. It is dropped where there is none.
    pub(crate) fn tcp_send(&mut self, life: Life, socket: SocketId, bytes: &[u8]) {
        let found = self.tcp_of(life).connections.iter().find(|(_, c)| c.socket == socket && c.state == State::Open);
        if let Some(remote) = found.map(|(remote, _)| *remote) {
            self.segment(life, remote, &[&[kind::DATA], bytes].concat());
        }
    }

    /// How the port is seen was not said in time.
    pub(crate) fn tcp_seen_late(&mut self, life: Life, asked: Now) {
        if self.is_current(life) && self.tcp_of(life).asked == Some(asked) {
            self.tcp_of(life).asked = None;
            let port = Some(self.port(Self::node_of(life)));
            self.input(Self::node_of(life), Input::TcpReady { port, seen: Vec::new() });
        }
    }

    /// A connection is looked at: it was made, or is repeated, or is given up, or was silent for too long.
    pub(crate) fn tcp_timer(&mut self, life: Life, remote: SocketAddr) {
        let now = self.now();
        if !self.is_current(life) {
            return;
        }
        let Some(connection) = self.tcp_of(life).connections.get(&remote).copied() else { return };
        match connection.state {
            State::SynSent if now.since(connection.began) < HELD => self.syn(life, remote),
            State::SynSent | State::SynReceived if now.since(connection.began) >= HELD => self.tcp_end(life, remote),
            State::SynReceived | State::SynSent => {}
            State::Open if !connection.trusted && now.since(connection.began) >= STRANGERS_TIME => {
                self.segment(life, remote, &[kind::RESET]);
                self.tcp_end(life, remote);
            }
            State::Open if now.since(connection.heard) >= IDLE => {
                self.segment(life, remote, &[kind::RESET]);
                self.tcp_end(life, remote);
            }
            State::Open => self.world.at(connection.heard + IDLE, Event::TcpTimer(life, remote)),
        }
    }

    /// A segment reached a host.
    pub(crate) fn tcp_arrived(&mut self, host: HostId, to: SocketAddr, from: SocketAddr, bytes: &[u8]) {
        let Some((segment, rest)) = bytes.split_first() else { return };
        if host == self.server_host() {
            if *segment == kind::ASK {
                let seen = [&[kind::SEEN], from.to_string().as_bytes()].concat();
                self.world.send_tcp(host, to.port(), from, seen);
            }
            return;
        }
        let Some(life) = self.life_at(host) else { return };
        let now = self.now();
        let own = self.port(Self::node_of(life));
        let tcp = self.tcp_of(life);
        let connection = tcp.connections.get(&from).copied().filter(|_| to.port() == own);
        match (*segment, connection.map(|c| c.state)) {
            (kind::SEEN, _) if tcp.asked.take().is_some() => {
                let seen = vec![String::from_utf8_lossy(rest).parse().unwrap()];
                self.input(Self::node_of(life), Input::TcpReady { port: Some(own), seen });
            }
            (kind::SYN, Some(State::SynSent)) => {
                self.tcp_is(life, from, State::SynReceived);
                self.segment(life, from, &[kind::SYN_ACK]);
            }
            (kind::SYN, Some(State::SynReceived)) => self.segment(life, from, &[kind::SYN_ACK]),
            // An old connection's other end began anew: it is told, and this end learns what became of it (RFC 5961).
            (kind::SYN, Some(State::Open)) => {
                self.segment(life, from, &[kind::RESET]);
                self.tcp_end(life, from);
            }
            (kind::SYN, None) if to.port() == own && tcp.listens => {
                let socket = SocketId(SocketId::FIRST_ACCEPTED + tcp.accepted);
                tcp.accepted += 1;
                let state = State::SynReceived;
                let stranger = Connection { socket, state, began: now, heard: now, trusted: false, ordered: false };
                tcp.connections.insert(from, stranger);
                self.segment(life, from, &[kind::SYN_ACK]);
                for at in [HELD, STRANGERS_TIME] {
                    self.world.at(now + at, Event::TcpTimer(life, from));
                }
            }
            (kind::SYN_ACK, Some(State::SynSent | State::SynReceived)) => {
                self.segment(life, from, &[kind::ACK]);
                self.tcp_opened(life, from);
            }
            (kind::ACK, Some(State::SynReceived)) => self.tcp_opened(life, from),
            (kind::RESET, Some(State::SynSent)) => self.world.at(now + RESET_PAUSE, Event::TcpTimer(life, from)),
            (kind::RESET, Some(_)) => self.tcp_end(life, from),
            (kind::DATA, Some(state)) => {
                if state != State::Open {
                    self.tcp_opened(life, from);
                }
                self.tcp_data(life, from, rest);
            }
            (kind::SYN | kind::SYN_ACK | kind::DATA, None) => {
                self.world.send_tcp(host, to.port(), from, vec![kind::RESET]);
            }
            _ => {}
        }
    }

    fn tcp_data(&mut self, life: Life, from: SocketAddr, datagram: &[u8]) {
        let now = self.now();
        let Some(connection) = self.tcp_of(life).connections.get_mut(&from) else { return };
        connection.heard = now;
        let via = Via::Udp { socket: connection.socket, remote: from };
        self.deliver(life, via, datagram);
    }

    fn tcp_opened(&mut self, life: Life, remote: SocketAddr) {
        self.tcp_is(life, remote, State::Open);
        let Some(connection) = self.tcp_of(life).connections.get(&remote).copied() else { return };
        self.world.at(self.now() + IDLE, Event::TcpTimer(life, remote));
        self.input(Self::node_of(life), Input::TcpOpened { socket: connection.socket, remote });
    }

    fn tcp_is(&mut self, life: Life, remote: SocketAddr, state: State) {
        let now = self.now();
        if let Some(connection) = self.tcp_of(life).connections.get_mut(&remote) {
            (connection.state, connection.heard) = (state, now);
        }
    }

    fn tcp_end(&mut self, life: Life, remote: SocketAddr) {
        let Some(connection) = self.tcp_of(life).connections.remove(&remote) else { return };
        // Of one that never came about only those hear who wanted it.
        if connection.state == State::Open || connection.ordered {
            self.tcp_closed(life, connection.socket);
        }
    }

    fn tcp_closed(&mut self, life: Life, socket: SocketId) {
        self.world.at(self.now(), Event::Input(life, Box::new(Input::Notice(Notice::StreamClosed(socket)))));
    }

    fn syn(&mut self, life: Life, to: SocketAddr) {
        self.tcp_of(life).syns += 1;
        self.segment(life, to, &[kind::SYN]);
    }

    fn segment(&mut self, life: Life, to: SocketAddr, bytes: &[u8]) {
        let node = Self::node_of(life);
        let (host, port) = (self.node(node).host, self.port(node));
        self.world.send_tcp(host, port, to, bytes.to_vec());
    }

    fn tcp_of(&mut self, life: Life) -> &mut Tcp {
        &mut self.node_mut(life).tcp
    }
}

#[cfg(test)]
mod tests {
    use meshd::wire::local::PathKind;

    use super::*;
    use crate::dice::Dice;
    use crate::hard::stage_with;
    use crate::nat::Kind;
    use crate::scenario::{Places, Scenario};
    use crate::sim::NodeRef;

    const RUNS: u64 = 50;

    fn stage(a: &str, b: &str, seed: u64) -> (Sim, Places, NodeRef, NodeRef) {
        let kind = |name: &str| name.parse::<Kind>().unwrap();
        let (mut a, mut b) = (kind(a), kind(b));
        if seed % 2 == 1 {
            std::mem::swap(&mut a, &mut b);
        }
        stage_with(&Scenario { seed, ..Scenario::pair(a, b) }, |_| ())
    }

    fn by_tcp(sim: &Sim, a: NodeRef, b: NodeRef) -> bool {
        let is = |x, y| sim.is_surely_direct(x, y) && sim.peer_status(x, y).path.tcp == Some(true);
        is(a, b) && is(b, a)
    }

    /// No UDP on one side, TCP free: the relay answers first, then a TCP connection is the path, in every run.
    #[test]
    fn without_udp_on_one_side_the_path_is_a_tcp_connection() {
        for (a, b) in [
            ("blocked", "public"),
            ("blocked", "linux"),
            ("blocked", "eim+eif"),
            ("blocked", "eim+adf"),
            ("blocked", "eim+apdf"),
            ("blocked", "blocked"),
        ] {
            let (mut good, mut worst) = (0, Duration::ZERO);
            for seed in 0..RUNS {
                let (mut sim, _, a, b) = stage(a, b, seed);
                let start = sim.now();
                let series = sim.ping(a, b, 400, Duration::from_millis(50));
                if sim.run_until(Duration::from_secs(8), |s| by_tcp(s, a, b)) {
                    good += 1;
                    worst = worst.max(sim.now().since(start));
                }
                let first = sim.pings(series).next().and_then(|p| p.answered).expect("the relay answers");
                assert!(first.since(start) <= Duration::from_millis(300), "{a:?} × {b:?}, seed {seed}");
                sim.run_for(Duration::from_secs(20));
                assert_eq!(sim.unanswered(series), 0, "nothing is lost in the change");
                assert!(by_tcp(&sim, a, b), "it stays: {:?}", sim.peer_status(a, b).path);
                sim.finish();
            }
            assert!(good * 100 >= RUNS * 99, "{a} × {b}: {good} of {RUNS}");
            assert!(worst <= Duration::from_secs(1), "{a} × {b}: the slowest after {} ms", worst.as_millis());
        }
    }

    /// Where the NATs' ports cannot be told in advance there is no such connection, and no storm.
    #[test]
    fn towards_a_symmetric_nat_it_stays_relayed_and_calm() {
        for seed in 0..10 {
            let (mut sim, _, a, b) = stage("blocked", "apdm+apdf", seed);
            sim.ping(a, b, 2_000, Duration::from_millis(200));
            sim.run_for(Duration::from_secs(60));
            let syns = |s: &Sim| [a, b].map(|n| s.node(n).tcp.syns);
            let before = syns(&sim);
            sim.run_for(Duration::from_secs(120));
            assert_eq!(sim.peer_status(a, b).path.kind, PathKind::Relay);
            let after = syns(&sim);
            assert!((0..2).all(|i| after[i] - before[i] <= 60), "{before:?} → {after:?}");
            let reason = sim.peer_status(a, b).path.reason.unwrap();
            assert!(reason.contains("no UDP gets out of") && reason.contains("TCP"), "{reason}");
            sim.finish();
        }
    }

    /// What was on the connection when the path died comes by the relay within a second, and the connection is made anew.
    #[test]
    fn a_dead_connection_is_left_within_a_second_and_made_again() {
        for seed in 0..RUNS {
            let (mut sim, places, a, b) = stage("blocked", "eim+apdf", seed);
            let series = sim.ping(a, b, 3_000, Duration::from_millis(20));
            assert!(sim.run_until(Duration::from_secs(8), |s| by_tcp(s, a, b)));
            sim.run_for(Duration::from_secs(3));
            let (ga, gb) = (places.site_a.gates[0], places.site_b.gates[0]);
            let cut = |sim: &mut Sim, cut| {
                use crate::world::Owner;
                sim.world.cut(Owner::Box(ga), Owner::Box(gb), cut);
                if seed % 3 != 0 {
                    sim.world.cut(Owner::Box(gb), Owner::Box(ga), cut);
                }
            };
            cut(&mut sim, true);
            let when = sim.now();
            sim.run_for(Duration::from_secs(4));
            let gap =
                sim.pings(series).filter(|p| p.sent > when && p.answered.is_none()).map(|p| p.sent.since(when)).max();
            assert!(
                gap.is_none_or(|gap| gap <= Duration::from_secs(1) || gap >= Duration::from_millis(3_800)),
                "{gap:?}"
            );
            assert!(!by_tcp(&sim, a, b));
            cut(&mut sim, false);
            let again = sim.run_until(Duration::from_secs(30), |s| by_tcp(s, a, b));
            assert!(again, "seed {seed}: {:?}", sim.peer_status(a, b).path);
            sim.finish();
        }
    }

    /// Nothing is kept for a peer that nobody talks to, and the port is closed.
    #[test]
    fn after_use_connections_and_port_are_closed() {
        for seed in 0..10 {
            let (mut sim, _, a, b) = stage("blocked", "linux", seed);
            assert!(!sim.node(a).tcp.listens() && !sim.node(b).tcp.listens(), "nobody listens without need");
            sim.ping(a, b, 40, Duration::from_millis(50));
            assert!(sim.run_until(Duration::from_secs(8), |s| by_tcp(s, a, b)));
            sim.run_for(Duration::from_secs(10));
            assert_eq!([a, b].map(|n| sim.node(n).tcp.open()), [1, 1], "one is enough");
            sim.run_for(Duration::from_secs(600));
            assert_eq!([a, b].map(|n| sim.node(n).tcp.open()), [0, 0]);
            assert!(!sim.node(a).tcp.listens() && !sim.node(b).tcp.listens());
            sim.ping(a, b, 40, Duration::from_millis(50));
            assert!(sim.run_until(Duration::from_secs(8), |s| by_tcp(s, a, b)), "and again");
            sim.finish();
        }
    }

    /// A stranger that knows the port learns nothing and is rid of.
    #[test]
    fn strangers_are_closed_unanswered() {
        let (mut sim, places, a, b) = stage("blocked", "public", 0);
        sim.ping(a, b, 400, Duration::from_millis(50));
        assert!(sim.run_until(Duration::from_secs(8), |s| by_tcp(s, a, b)));
        let to = SocketAddr::new(sim.world.addresses(places.b)[0], sim.port(b));
        let mut dice = Dice::new(5);
        for port in 1..40 {
            sim.world.send_tcp(places.server, 1_000 + port, to, vec![kind::SYN]);
            sim.run_for(Duration::from_millis(100));
            sim.world.send_tcp(places.server, 1_000 + port, to, vec![kind::ACK]);
            let junk = [vec![kind::DATA], dice.bytes(200)].concat();
            sim.world.send_tcp(places.server, 1_000 + port, to, junk);
        }
        sim.run_for(Duration::from_secs(10));
        assert_eq!(sim.node(b).tcp.open(), 1, "only the peer's is left");
        assert!(sim.dropped(b, Reason::Junk) + sim.dropped(b, Reason::UnknownIndex) > 0);
        assert!(by_tcp(&sim, a, b));
        sim.finish();
    }
}

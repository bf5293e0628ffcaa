//! The thread itself, on loopback, with nodes that are a socket and a key.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use super::*;
use crate::link::close;
use crate::server::relay_conn::Joined;
use crate::server::stun_socket;
use crate::wire::keys::ControlKey;
use crate::wire::relay::{self, Frames};
use crate::wire::relay_udp::{self, Header, Kind, SessionKeys, SessionSecret, Wish};
use crate::wire::stun::{BindingResponse, Change, TransactionId, binding_request, decode_binding_response};

/// No step takes this long.
const DEADLINE: Duration = Duration::from_secs(5);

/// A relay on loopback.
struct Rig {
    relay: Arc<Relay>,
    at: Vec<SocketAddr>,
    handle: ForwarderHandle,
}

impl Rig {
    fn with(limits: RelayLimits, addresses: &[&str]) -> Self {
        let addresses: Vec<SocketAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let sockets = stun_socket::bind(&addresses).unwrap();
        let at = sockets.iter().map(ServerSocket::bound).collect();
        let relay = Arc::new(Relay::new().unwrap());
        let handle = start(Arc::clone(&relay), sockets, limits, None).unwrap();
        Self { relay, at, handle }
    }

    fn new() -> Self {
        Self::with(RelayLimits::default(), &["127.0.0.1:0"])
    }

    /// A member with a session.
    fn member(&self, n: u8) -> Member {
        let key = WgKey([n; 32]);
        self.relay.admit(ControlKey([n; 32]), key);
        let secret = SessionSecret::new([n ^ 0x55; 32]);
        let session = block_on(self.relay.open(key, secret.clone())).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.connect(self.at[0]).unwrap();
        Member { key, keys: secret.keys(), session, socket, counter: 0 }
    }

    /// A member that is delivered to by UDP.
    fn member_here(&self, n: u8) -> Member {
        let mut member = self.member(n);
        assert_eq!(member.ping(Wish::DeliverHere, 8).kind, Kind::Pong);
        member
    }

    /// A member's WebSocket connection, of which the thread has heard.
    fn join(&self, n: u8) -> Joined<'_> {
        let joined = self.relay.join(&ControlKey([n; 32])).unwrap();
        assert!(block_on(self.relay.open(WgKey([0; 32]), SessionSecret::new([0; 32]))).is_none());
        joined
    }

    /// Waits until a counter says this.
    fn wait_for(&self, name: &str, value: u64) {
        let start = Instant::now();
        loop {
            let all = self.relay.counters.all();
            let now = all.iter().find(|(n, _)| *n == name).unwrap().1;
            if now == value {
                return;
            }
            assert!(now < value && start.elapsed() < DEADLINE, "{name} is {now}, not {value}: {all:?}");
            std::thread::yield_now();
        }
    }
}

struct Member {
    key: WgKey,
    keys: SessionKeys,
    session: u32,
    socket: UdpSocket,
    counter: u64,
}

impl Member {
    fn sealed(&mut self, kind: Kind, name: Name, payload: &[u8]) -> Vec<u8> {
        self.counter += 1;
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(payload);
        let header = Header { kind, counter: self.counter, session: self.session, name };
        self.keys.up.seal(&header, &mut bytes);
        bytes
    }

    fn send(&mut self, to: &Self, payload: &[u8]) {
        let bytes = self.sealed(Kind::Send, Name::of(&to.key), payload);
        self.socket.send(&bytes).unwrap();
    }

    fn ping(&mut self, wish: Wish, padding: usize) -> Header {
        let bytes = self.sealed(Kind::Ping, wish.name(), &vec![7; padding]);
        self.socket.send(&bytes).unwrap();
        let (header, payload) = self.recv();
        assert_eq!(payload, vec![7; padding], "a Pong is its Ping");
        header
    }

    fn recv(&self) -> (Header, Vec<u8>) {
        let mut buffer = [0; 2_048];
        let len = self.socket.recv(&mut buffer).unwrap();
        assert!(self.keys.down.verify(&buffer[..len]));
        (relay_udp::decode(&buffer[..len]).unwrap(), buffer[HEADER..len].to_vec())
    }

    fn expect_from(&self, from: &Self, payload: &[u8]) {
        let (header, got) = self.recv();
        assert_eq!((header.kind, header.name, header.session), (Kind::Recv, Name::of(&from.key), self.session));
        assert_eq!(got, payload);
    }

    fn expect_nothing(&self) {
        self.socket.set_nonblocking(true).unwrap();
        assert_eq!(self.socket.recv(&mut [0; 100]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        self.socket.set_nonblocking(false).unwrap();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The frames of a connection's queue, once there are this many.
fn frames(queue: &Queue, count: usize) -> Vec<(WgKey, Vec<u8>)> {
    let (start, mut found) = (Instant::now(), Vec::new());
    while found.len() < count {
        assert!(start.elapsed() < DEADLINE, "{} of {count} frames", found.len());
        let Some(batch) = queue.pop().unwrap() else { continue };
        found.extend(Frames::new(&batch).map(|frame| match frame.unwrap() {
            Frame::Recv { from, payload } => (from, payload.to_vec()),
            Frame::Gone { peer } => (peer, b"gone".to_vec()),
            other => panic!("{other:?}"),
        }));
    }
    found
}

fn message(to: &Member, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    assert!(relay::encode(&Frame::Send { to: to.key, payload }, &mut out));
    out
}

#[test]
fn datagrams_cross_between_members() {
    let rig = Rig::new();
    let (mut a, mut b) = (rig.member_here(1), rig.member_here(2));
    for size in [0, 1, 100, 1_400] {
        let payload = vec![4; size];
        a.send(&b, &payload);
        b.expect_from(&a, &payload);
    }
    b.send(&a, b"back");
    a.expect_from(&b, b"back");
    rig.wait_for("forwarded_udp", 5);
}

#[test]
fn a_pong_is_as_long_as_its_ping() {
    let rig = Rig::new();
    let mut a = rig.member(1);
    for padding in [8, 100, 1_312] {
        assert_eq!(a.ping(Wish::Nothing, padding).kind, Kind::Pong);
    }
}

#[test]
fn pairs_with_a_websocket_at_either_end_work() {
    let rig = Rig::new();
    let (mut a, b) = (rig.member_here(1), rig.member(2));
    let connection = rig.join(2);
    a.send(&b, b"to the WebSocket");
    assert_eq!(frames(&connection.queue, 1), [(a.key, b"to the WebSocket".to_vec())]);
    assert!(rig.relay.take(&connection, &message(&a, b"to UDP")));
    a.expect_from(&b, b"to UDP");
    let c = rig.member(3);
    let other = rig.join(3);
    assert!(rig.relay.take(&connection, &message(&c, &[9; 9_000])));
    assert_eq!(frames(&other.queue, 1), [(b.key, vec![9; 9_000])]);
}

#[test]
fn a_node_says_by_which_carrier_it_is_delivered_to() {
    let rig = Rig::new();
    let (mut a, mut b) = (rig.member_here(1), rig.member_here(2));
    let connection = rig.join(2);
    b.ping(Wish::DeliverHere, 8);
    a.send(&b, b"one");
    b.expect_from(&a, b"one");
    let mut here = Vec::new();
    assert!(relay::encode(&Frame::Here, &mut here));
    assert!(rig.relay.take(&connection, &here));
    // What follows on the same connection is taken after it.
    assert!(rig.relay.take(&connection, &message(&a, b"mark")));
    a.expect_from(&b, b"mark");
    a.send(&b, b"two");
    assert_eq!(frames(&connection.queue, 1), [(a.key, b"two".to_vec())]);
    b.ping(Wish::DeliverHere, 8);
    a.send(&b, b"three");
    b.expect_from(&a, b"three");
    b.ping(Wish::DeliverElsewhere, 8);
    a.send(&b, b"four");
    assert_eq!(frames(&connection.queue, 1), [(a.key, b"four".to_vec())]);
}

#[test]
fn a_node_that_was_started_anew_is_delivered_to_by_its_new_connection() {
    let rig = Rig::new();
    let (mut a, mut b) = (rig.member_here(1), rig.member_here(2));
    a.send(&b, b"one");
    b.expect_from(&a, b"one");
    // Killed: nothing was said, and the session still looks alive.
    let connection = rig.join(2);
    a.send(&b, b"two");
    assert_eq!(frames(&connection.queue, 1), [(a.key, b"two".to_vec())]);
    // It was only the connection that was new.
    b.ping(Wish::DeliverHere, 8);
    a.send(&b, b"three");
    b.expect_from(&a, b"three");
}

#[test]
fn who_is_not_there_is_gone_and_the_sender_is_told() {
    let rig = Rig::new();
    let (mut a, b) = (rig.member_here(1), rig.member(2));
    a.send(&b, b"nobody home");
    let (header, _) = a.recv();
    assert_eq!((header.kind, header.name), (Kind::Gone, Name::of(&b.key)));
    rig.relay.expel(&ControlKey([2; 32]), &b.key);
    a.send(&b, b"not a member");
    assert_eq!(a.recv().0.kind, Kind::Gone);
    rig.wait_for("not_connected", 2);
    let connection = rig.join(1);
    assert!(rig.relay.take(&connection, &message(&b, b"x")));
    assert_eq!(frames(&connection.queue, 1), [(b.key, b"gone".to_vec())]);
}

#[test]
fn what_is_forged_or_replayed_is_counted_and_never_answered() {
    let rig = Rig::new();
    let (mut a, b) = (rig.member_here(1), rig.member_here(2));
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let good = a.sealed(Kind::Ping, Wish::DeliverHere.name(), &[0; 8]);
    let mut forged = good.clone();
    forged[25] ^= 1;
    let mut elsewhere = good.clone();
    elsewhere[8..12].copy_from_slice(&77u32.to_be_bytes());
    for bytes in [&forged[..], &elsewhere, &good[..20], &[0xC0], b"junk"] {
        stranger.send_to(bytes, rig.at[0]).unwrap();
    }
    rig.wait_for("bad_tag", 1);
    rig.wait_for("unknown_session", 1);
    rig.wait_for("malformed", 2);
    // The real one arrives, and then again from elsewhere.
    a.socket.send(&good).unwrap();
    assert_eq!(a.recv().0.kind, Kind::Pong);
    stranger.send_to(&good, rig.at[0]).unwrap();
    rig.wait_for("replayed", 1);
    stranger.set_nonblocking(true).unwrap();
    assert_eq!(stranger.recv(&mut [0; 100]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // Deliveries still go to the node.
    let mut b = b;
    b.send(&a, b"still yours");
    a.expect_from(&b, b"still yours");
}

#[test]
fn an_expelled_member_neither_sends_nor_receives() {
    let rig = Rig::new();
    let (mut a, mut b) = (rig.member_here(1), rig.member_here(2));
    let connection = rig.join(2);
    rig.relay.expel(&ControlKey([2; 32]), &b.key);
    assert_eq!(connection.queue.pop().unwrap_err().0, close::NOT_A_MEMBER);
    b.send(&a, b"x");
    rig.wait_for("unknown_session", 1);
    a.send(&b, b"y");
    assert_eq!(a.recv().0.kind, Kind::Gone);
    b.expect_nothing();
    assert!(block_on(rig.relay.open(b.key, SessionSecret::new([0; 32]))).is_none());
}

#[test]
fn a_roaming_node_is_followed() {
    let rig = Rig::new();
    let (mut a, mut b) = (rig.member_here(1), rig.member_here(2));
    let moved = UdpSocket::bind("127.0.0.1:0").unwrap();
    moved.set_read_timeout(Some(DEADLINE)).unwrap();
    moved.connect(rig.at[0]).unwrap();
    let old = std::mem::replace(&mut b.socket, moved);
    b.send(&a, b"from my new address");
    a.expect_from(&b, b"from my new address");
    a.send(&b, b"there you are");
    b.expect_from(&a, b"there you are");
    drop(old);
}

/// Runs of many datagrams to several receivers, good and bad ones mixed: what is good arrives, in order and whole.
#[test]
fn runs_are_taken_apart_and_put_together() {
    let rig = Rig::new();
    let (mut a, b, c) = (rig.member_here(1), rig.member_here(2), rig.member_here(3));
    let gso = ServerSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut bytes = Vec::new();
    for i in 0..44u8 {
        let to = if i % 11 == 10 { &c } else { &b };
        let mut datagram = a.sealed(Kind::Send, Name::of(&to.key), &[i; 1_300]);
        if i % 7 == 6 {
            datagram[30] ^= 0xff;
        }
        bytes.extend(datagram);
    }
    // The last is shorter.
    bytes.extend(a.sealed(Kind::Send, Name::of(&b.key), &[99; 10]));
    let mut way = gso.way(rig.at[0], [127, 0, 0, 1].into());
    let sent = Sender::new(true).send(&mut way, rig.at[0], &[IoSlice::new(&bytes)], HEADER + 1_300, Now(1));
    assert_eq!((sent.sent, sent.failed), (45, 0));
    for i in (0..44u8).filter(|i| i % 7 != 6) {
        let to = if i % 11 == 10 { &c } else { &b };
        to.expect_from(&a, &[i; 1_300]);
    }
    b.expect_from(&a, &[99; 10]);
    rig.wait_for("bad_tag", 6);
    rig.wait_for("forwarded_udp", 39);
}

#[test]
fn a_spent_budget_lets_little_things_through_and_nodes_are_told() {
    let rig = Rig::with(RelayLimits { rate: None, monthly: Some(4_000) }, &["127.0.0.1:0"]);
    let (mut a, b) = (rig.member_here(1), rig.member_here(2));
    let mut data = vec![4, 0, 0, 0];
    data.resize(1_300, 1);
    for _ in 0..4 {
        a.send(&b, &data);
    }
    (0..4).for_each(|_| b.expect_from(&a, &data));
    a.send(&b, &data);
    rig.wait_for("over_budget", 1);
    a.send(&b, &data[..100]);
    b.expect_from(&a, &data[..100]);
    let mut budget = rig.handle.budget.clone();
    let told = block_on(async {
        tokio::time::timeout(DEADLINE, budget.wait_for(|state| state.spent)).await.unwrap().unwrap().renewed
    });
    assert_eq!(told, Month::of(clock::wall()).end());
    assert!(rig.handle.carried.get().bytes >= 4 * 1_328);
}

/// The sender goes as fast as it can, the relay as fast as it may: what leaves keeps the rate, what is dropped is counted,
/// and what another pair sends beside it arrives.
#[test]
fn a_rate_is_kept_and_a_keystroke_passes_beside_bulk() {
    let rate = 2_000_000;
    let rig = Rig::with(RelayLimits { rate: Some(rate), monthly: None }, &["127.0.0.1:0"]);
    let (mut a, b) = (rig.member_here(1), rig.member_here(2));
    let (mut c, d) = (rig.member_here(3), rig.member_here(4));
    let start = Instant::now();
    for _ in 0..20 {
        for _ in 0..100 {
            a.send(&b, &[4; 1_372]);
        }
        // How soon is the scheduler's business, shown in virtual time in coord/; that it is not lost is shown here.
        c.send(&d, b"keystroke");
        d.expect_from(&c, b"keystroke");
    }
    rig.wait_for_drops_or_time(start);
    let sent = rig.relay.counters.forwarded_bytes.load(Ordering::Relaxed);
    let allowed = start.elapsed().as_micros() as u64 * rate / 1_000_000 + 20_000;
    assert!(sent <= allowed, "{sent} > {allowed}");
}

impl Rig {
    /// All that was taken is sent, or a while has passed.
    fn wait_for_drops_or_time(&self, start: Instant) {
        let total = |rig: &Self| -> u64 {
            let c = rig.relay.counters.all();
            c.iter().filter(|(n, _)| ["forwarded_udp", "pair_full", "relay_full"].contains(n)).map(|(_, v)| v).sum()
        };
        while total(self) < 2_020 && start.elapsed() < DEADLINE {
            std::thread::yield_now();
        }
        assert_eq!(total(self), 2_020, "every packet is sent or dropped by name");
    }
}

#[test]
fn without_sockets_there_are_no_sessions_and_websockets_work() {
    let rig = Rig::with(RelayLimits::default(), &[]);
    for n in [1, 2] {
        rig.relay.admit(ControlKey([n; 32]), WgKey([n; 32]));
    }
    assert!(block_on(rig.relay.open(WgKey([1; 32]), SessionSecret::new([0; 32]))).is_none());
    let (a, b) = (rig.join(1), rig.join(2));
    let mut out = Vec::new();
    assert!(relay::encode(&Frame::Send { to: WgKey([2; 32]), payload: b"hello" }, &mut out));
    assert!(rig.relay.take(&a, &out));
    assert_eq!(frames(&b.queue, 1), [(WgKey([1; 32]), b"hello".to_vec())]);
}

#[test]
fn dropping_the_handle_ends_the_thread() {
    let rig = Rig::new();
    let ForwarderHandle { stop, ended, .. } = rig.handle;
    drop(stop);
    assert!(block_on(async { tokio::time::timeout(DEADLINE, ended).await }).unwrap().is_err());
}

// STUN on the same sockets.

fn ask(server: SocketAddr, change: Change) -> (SocketAddr, BindingResponse, SocketAddr) {
    let any: IpAddr = if server.is_ipv4() { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() };
    let client = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.send_to(&binding_request(&TransactionId([7; 12]), change), server).unwrap();
    let mut buffer = [0; 1500];
    let (len, from) = client.recv_from(&mut buffer).unwrap();
    (from, decode_binding_response(&buffer[..len]).unwrap(), client.local_addr().unwrap())
}

#[test]
fn stun_answers_come_from_where_they_are_asked_to_come_from() {
    let rig = Rig::with(RelayLimits::default(), &["127.0.0.1:0", "127.0.0.2:0", "127.0.0.1:0"]);
    let (from, response, me) = ask(rig.at[0], Change::default());
    assert_eq!((from, response.mapped), (rig.at[0], me));
    assert_eq!(response.other, Some(rig.at[1]));
    assert_eq!(ask(rig.at[0], Change { ip: true, port: true }).0, rig.at[1]);
    assert_eq!(ask(rig.at[0], Change { ip: false, port: true }).0, rig.at[2]);
}

#[test]
fn a_wildcard_socket_answers_from_the_address_that_was_asked() {
    for wildcard in ["[::]:0", "0.0.0.0:0"] {
        let rig = Rig::with(RelayLimits::default(), &[wildcard, wildcard]);
        // 127.0.0.3 is not what the kernel would choose by itself.
        let asked = SocketAddr::new([127, 0, 0, 3].into(), rig.at[0].port());
        let (from, response, me) = ask(asked, Change::default());
        assert_eq!((from, response.mapped), (asked, me), "{wildcard}");
        let (from, _, _) = ask(asked, Change { ip: false, port: true });
        assert_eq!(from, SocketAddr::new(asked.ip(), rig.at[1].port()), "{wildcard}");
    }
}

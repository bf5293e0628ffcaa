//! A whole coordinator in this process, on loopback, and nodes that are only links: what they may do, what they are told,
//! what survives a restart.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use meshd::link::{
    self, ControlLink, ControlReceiver, ControlSender, LinkError, RelayLink, RelayReceiver, RelaySender, Target, close,
};
use meshd::os::clock::wall as now;
use meshd::server::{Config, RelayLimits, Server, Tls};
use meshd::trust::founding::{self, Terms};
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::trust::ledger::{Judge, Ledger};
use meshd::trust::record::{Record, RevokeTarget, SignedRecord, member_ipv6};
use meshd::trust::token::{ClaimToken, Token};
use meshd::wire::control::{StunServer, ToCoordinator, ToNode, refusal};
use meshd::wire::keys::{ControlKey, Digest32, NetworkId, WgKey};
use meshd::wire::local::Problem;
use meshd::wire::relay::{self, Frame, Frames};
use meshd::wire::relay_udp::{self, HEADER, Header, Kind, Name, SessionKeys, Wish};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// No step of any test takes this long.
const DEADLINE: Duration = Duration::from_secs(15);

async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("took too long")
}

// The coordinator.

struct Running {
    url: String,
    listen: SocketAddr,
    stun: Vec<SocketAddr>,
    key: ControlKey,
    claim: Option<String>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), Problem>>,
}

fn config(state_dir: &Path, tls: Tls) -> Config {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    Config {
        listen: any,
        stun: vec![any, any],
        public_url: None,
        state_dir: state_dir.to_owned(),
        store: None,
        tls,
        relay: RelayLimits::default(),
    }
}

async fn start_with(config: &Config) -> Running {
    let server = within(Server::start(config)).await.unwrap_or_else(|p| panic!("{p:?}"));
    let (stop, stopped) = oneshot::channel();
    Running {
        url: server.public_url().url.clone(),
        listen: server.listen(),
        stun: server.stun().to_vec(),
        key: server.key(),
        claim: server.claim().map(str::to_owned),
        stop,
        task: tokio::spawn(server.run_until(async { drop(stopped.await) })),
    }
}

async fn start(state_dir: &Path) -> Running {
    start_with(&config(state_dir, Tls::Off)).await
}

impl Running {
    async fn stop(self) {
        drop(self.stop);
        within(self.task).await.unwrap().unwrap();
    }

    fn claim(&self) -> ClaimToken {
        match Token::decode(self.claim.as_ref().expect("a claim is open")).unwrap() {
            Token::Claim(claim) => claim,
            Token::Invite(_) => panic!("an invite where a claim should be"),
        }
    }
}

// A node.

struct Node {
    keys: NodeKeys,
}

/// A node's control connection.
struct Control {
    sender: ControlSender,
    receiver: ControlReceiver,
    re: u64,
}

impl Node {
    fn new() -> Self {
        Self { keys: NodeKeys::generate(&mut rand::rng()) }
    }

    fn target(&self, to: &Running) -> Target<'_> {
        let (url, proxies) = (to.url.clone(), &link::proxy::DIRECT);
        Target { url, coordinator: to.key, secret: &self.keys.control, proxies, timeout: DEADLINE }
    }

    async fn control(&self, to: &Running) -> Control {
        let link: ControlLink = within(link::connect_control(&self.target(to))).await.unwrap();
        let (sender, receiver) = link.split();
        Control { sender, receiver, re: 0 }
    }

    async fn relay(&self, to: &Running) -> RelayLink {
        within(link::connect_relay(&self.target(to))).await.unwrap()
    }

    fn wg(&self) -> WgKey {
        self.keys.wg_key()
    }
}

impl Control {
    async fn ask(&mut self, make: impl FnOnce(u64) -> ToCoordinator) -> ToNode {
        self.re += 1;
        within(self.sender.send(&make(self.re))).await.unwrap();
        loop {
            let message = self.next().await;
            if answers(&message) == Some(self.re) {
                return message;
            }
        }
    }

    async fn next(&mut self) -> ToNode {
        within(self.receiver.recv()).await.unwrap().expect("the link is up")
    }

    /// Reads on until `wanted` finds what it wants.
    async fn until<T>(&mut self, mut wanted: impl FnMut(ToNode) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next().await) {
                return found;
            }
        }
    }

    async fn hello(&mut self) -> ToNode {
        self.ask(|re| ToCoordinator::Hello { re, version: "test".into(), have: 0, head: Digest32::default() }).await
    }

    /// The whole log, after a Hello.
    async fn log(&mut self) -> Vec<SignedRecord> {
        let mut log = Vec::new();
        self.until(|message| {
            if let ToNode::Log { records, end, .. } = message {
                log.extend(records);
                return end.then_some(());
            }
            None
        })
        .await;
        log
    }

    async fn online(&mut self, who: WgKey) {
        self.until(|m| matches!(m, ToNode::Presence { online, .. } if online.contains(&who)).then_some(())).await;
    }

    async fn closed(&mut self) -> LinkError {
        loop {
            match within(self.receiver.recv::<ToNode>()).await {
                Ok(Some(_)) => {}
                Ok(None) => return LinkError::ClosedHere,
                Err(e) => return e,
            }
        }
    }
}

fn answers(message: &ToNode) -> Option<u64> {
    match message {
        ToNode::Refused { re, .. }
        | ToNode::Proposal { re, .. }
        | ToNode::Joined { re }
        | ToNode::Welcome { re, .. }
        | ToNode::Published { re }
        | ToNode::Located { re, .. }
        | ToNode::Pong { re, .. }
        | ToNode::RelayOpened { re, .. } => Some(*re),
        ToNode::Log { .. } | ToNode::Presence { .. } | ToNode::Adverts { .. } | ToNode::RelayBudget { .. } => None,
    }
}

fn code(message: &ToNode) -> &str {
    match message {
        ToNode::Refused { code, .. } => code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

// A network.

struct Network {
    admin: Node,
    id: NetworkId,
    genesis: [SignedRecord; 4],
}

async fn found(on: &Running) -> (Network, Control) {
    let mut rng = rand::rng();
    let admin = Node::new();
    let root = Secret32::random(&mut rng).signing_key();
    let (ipv4, ipv6) = founding::random_ranges(&mut rng);
    let genesis = founding::found(&admin.keys, &root, "home", "laptop", ipv4, ipv6, now(), &mut rng);
    let mut control = admin.control(on).await;
    let claim = Digest32(*on.claim().secret.expose());
    let answer = control.ask(|re| ToCoordinator::Found { re, claim, records: genesis.to_vec() }).await;
    assert!(matches!(answer, ToNode::Joined { .. }), "{answer:?}");
    (Network { id: founding::network_id(&root), admin, genesis }, control)
}

impl Network {
    fn invite(&self) -> (Secret32, SignedRecord) {
        let terms = Terms { expires: now() + 3_600, ..Terms::default() };
        founding::invite_record(&self.admin.keys.identity.signing_key(), self.id, terms, now(), &mut rand::rng())
    }

    fn ipv6(&self) -> ipnet::Ipv6Net {
        match self.genesis[0].open().unwrap() {
            Record::Genesis(genesis) => genesis.ipv6,
            other => panic!("not a genesis: {other:?}"),
        }
    }
}

/// Proposes and redeems; returns the last answer.
async fn join(
    node: &Node,
    control: &mut Control,
    network: &Network,
    invite: &(Secret32, SignedRecord),
    name: &str,
) -> ToNode {
    let key = founding::invite_key(&invite.0);
    let proposal = control.ask(|re| ToCoordinator::Propose { re, invite: key, name: name.into(), exact: false }).await;
    let (ipv4, name) = match proposal {
        ToNode::Proposal { ipv4, name, .. } => (ipv4, name),
        other => return other,
    };
    let ipv6 = member_ipv6(network.ipv6(), &node.keys.identity_key());
    let member = founding::member_record(&node.keys, &invite.0, network.id, &name, ipv4, ipv6, now());
    control.ask(|re| ToCoordinator::Redeem { re, invite: invite.1.clone(), member }).await
}

/// A coordinator with a network of the admin and one more member, both connected and said hello.
async fn two_members(on: &Running) -> (Network, Control, Node, Control) {
    let (network, mut admin) = found(on).await;
    assert!(matches!(admin.hello().await, ToNode::Welcome { .. }));
    let invite = network.invite();
    let published = admin.ask(|re| ToCoordinator::Publish { re, records: vec![invite.1.clone()] }).await;
    assert!(matches!(published, ToNode::Published { .. }), "{published:?}");
    let node = Node::new();
    let mut control = node.control(on).await;
    let joined = join(&node, &mut control, &network, &invite, "nas").await;
    assert!(matches!(joined, ToNode::Joined { .. }), "{joined:?}");
    assert!(matches!(control.hello().await, ToNode::Welcome { .. }));
    (network, admin, node, control)
}

fn send_frame(to: WgKey, payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    assert!(relay::encode(&Frame::Send { to, payload }, &mut message));
    message
}

#[tokio::test]
async fn a_network_is_founded_joined_and_told_to_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (network, mut admin, node, mut control) = two_members(&server).await;
    // Everybody gets a log that proves itself up to the network's id.
    let log = control.log().await;
    let mut ledger = Ledger::new(network.id);
    ledger.admit_all(&log, Judge::Reader).unwrap();
    assert_eq!(ledger.members().count(), 2);
    assert_eq!(ledger.by_wg(&node.wg()).unwrap().name, "nas");
    admin.online(node.wg()).await;
    drop(control);
    admin.until(|m| matches!(m, ToNode::Presence { offline, .. } if offline.contains(&node.wg())).then_some(())).await;
    server.stop().await;
}

#[tokio::test]
async fn welcome_names_the_stun_servers_and_where_the_node_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (_network, mut admin) = found(&server).await;
    let ToNode::Welcome { stun, observed, .. } = admin.hello().await else { panic!("no welcome") };
    let offered: Vec<StunServer> =
        server.stun.iter().map(|a| StunServer { host: Some(a.ip().to_string()), port: a.port() }).collect();
    assert_eq!(stun, offered);
    assert_eq!(observed, Some([127, 0, 0, 1].into()));
    server.stop().await;
}

#[tokio::test]
async fn a_claim_and_a_single_use_invite_work_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let secret = Digest32(*server.claim().secret.expose());
    let (network, mut admin) = found(&server).await;
    let thief = Node::new();
    let mut control = thief.control(&server).await;
    let records = network.genesis.to_vec();
    let again = control.ask(|re| ToCoordinator::Found { re, claim: secret, records }).await;
    assert_eq!(code(&again), refusal::ALREADY_USED);

    let invite = network.invite();
    admin.ask(|re| ToCoordinator::Publish { re, records: vec![invite.1.clone()] }).await;
    let (first, second) = (Node::new(), Node::new());
    let mut control = first.control(&server).await;
    assert!(matches!(join(&first, &mut control, &network, &invite, "nas").await, ToNode::Joined { .. }));
    let mut control = second.control(&server).await;
    assert_eq!(code(&join(&second, &mut control, &network, &invite, "nas").await), refusal::ALREADY_USED);
    server.stop().await;
}

#[tokio::test]
async fn a_wrong_claim_founds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let node = Node::new();
    let mut control = node.control(&server).await;
    let answer = control.ask(|re| ToCoordinator::Found { re, claim: Digest32([7; 32]), records: vec![] }).await;
    assert_eq!(code(&answer), refusal::WRONG_CLAIM);
    found(&server).await;
    server.stop().await;
}

#[tokio::test]
async fn what_was_answered_survives_a_restart_and_the_claim_stays_used() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let key = server.key;
    let (network, _admin, node, mut control) = two_members(&server).await;
    let before = control.log().await;
    server.stop().await;

    let server = start(dir.path()).await;
    assert_eq!((server.key, server.claim.as_deref()), (key, None));
    let mut control = node.control(&server).await;
    assert!(matches!(control.hello().await, ToNode::Welcome { .. }));
    assert_eq!(control.log().await, before);
    let mut admin = network.admin.control(&server).await;
    assert!(matches!(admin.hello().await, ToNode::Welcome { .. }));
    admin.online(node.wg()).await;
    // Members may use the relay again at once.
    let _relay = node.relay(&server).await;
    server.stop().await;
}

#[tokio::test]
async fn the_relay_carries_frames_between_members_under_the_sender_s_key() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_with(&config(dir.path(), Tls::SelfMade)).await;
    assert!(server.url.starts_with("https://127.0.0.1:"), "{}", server.url);
    let (network, _admin_control, node, _control) = two_members(&server).await;
    let (mut admin_tx, mut admin_rx) = network.admin.relay(&server).await.split();

    // Nobody there yet.
    admin_tx.send(send_frame(node.wg(), b"early")).await.unwrap();
    let message = within(admin_rx.recv()).await.unwrap().unwrap();
    assert_eq!(Frames::new(&message).next(), Some(Ok(Frame::Gone { peer: node.wg() })));

    let (mut node_tx, mut node_rx) = node.relay(&server).await.split();
    // The relay knows a connection once it answers.
    let mut ping = Vec::new();
    relay::encode(&Frame::Ping([5; 8]), &mut ping);
    node_tx.send(ping).await.unwrap();
    let message = within(node_rx.recv()).await.unwrap().unwrap();
    assert_eq!(Frames::new(&message).next(), Some(Ok(Frame::Pong([5; 8]))));

    let big = vec![9; relay::MAX_PAYLOAD];
    for payload in [b"ciphertext".as_slice(), &[], &big] {
        admin_tx.send(send_frame(node.wg(), payload)).await.unwrap();
        let message = within(node_rx.recv()).await.unwrap().unwrap();
        let from = network.admin.wg();
        assert_eq!(Frames::new(&message).next(), Some(Ok(Frame::Recv { from, payload })));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_second_relay_connection_takes_over_until_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (network, _admin_control, node, _control) = two_members(&server).await;
    let (mut tx, mut admin_rx) = network.admin.relay(&server).await.split();
    let ready = |link: RelayLink| async {
        let (mut tx, mut rx) = link.split();
        let mut ping = Vec::new();
        relay::encode(&Frame::Ping([1; 8]), &mut ping);
        tx.send(ping).await.unwrap();
        within(rx.recv()).await.unwrap().unwrap();
        (tx, rx)
    };
    let (_first_tx, mut first) = ready(node.relay(&server).await).await;
    let second = ready(node.relay(&server).await).await;
    tx.send(send_frame(node.wg(), b"to the second")).await.unwrap();
    let (second_tx, mut second_rx) = second;
    assert!(within(second_rx.recv()).await.unwrap().is_some());
    second_tx.close(close::NORMAL, "").await;
    assert_eq!(within(second_rx.recv()).await, Ok(None));
    // Frames may still go to the second until the relay has seen its end; then the first gets them.
    let received = async {
        loop {
            tx.send(send_frame(node.wg(), b"to the first")).await.unwrap();
            tokio::select! {
                got = first.recv() => return got,
                _gone = admin_rx.recv() => {}
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
    };
    assert!(within(received).await.unwrap().is_some());
    server.stop().await;
}

#[tokio::test]
async fn strangers_get_no_relay() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    found(&server).await;
    let (_tx, mut rx) = Node::new().relay(&server).await.split();
    let end = within(rx.recv()).await;
    assert!(matches!(end, Err(LinkError::Closed { code: close::NOT_A_MEMBER, .. })), "{end:?}");
    server.stop().await;
}

#[tokio::test]
async fn a_revoked_member_is_cut_off_and_stays_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (network, mut admin, node, mut control) = two_members(&server).await;
    let (_relay_tx, mut relay_rx) = node.relay(&server).await.split();
    let signer = network.admin.keys.identity.signing_key();
    let target = RevokeTarget::Identity(node.keys.identity_key());
    let revoke = founding::revoke_record(&signer, network.id, target, now());
    let published = admin.ask(|re| ToCoordinator::Publish { re, records: vec![revoke] }).await;
    assert!(matches!(published, ToNode::Published { .. }), "{published:?}");

    let end = control.closed().await;
    assert!(matches!(end, LinkError::Closed { code: close::NOT_A_MEMBER, .. }), "{end:?}");
    let end = within(relay_rx.recv()).await;
    assert!(matches!(end, Err(LinkError::Closed { code: close::NOT_A_MEMBER, .. })), "{end:?}");

    let mut control = node.control(&server).await;
    assert_eq!(code(&control.hello().await), refusal::REVOKED);
    let (_tx, mut rx) = node.relay(&server).await.split();
    let end = within(rx.recv()).await;
    assert!(matches!(end, Err(LinkError::Closed { code: close::NOT_A_MEMBER, .. })), "{end:?}");
    server.stop().await;
}

#[tokio::test]
async fn an_unknown_message_is_answered_and_the_connection_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let mut control = Node::new().control(&server).await;
    control.sender.send(&serde_json::json!({"t": "from-the-future", "re": 77})).await.unwrap();
    let answer = control.next().await;
    assert_eq!((answers(&answer), code(&answer)), (Some(77), refusal::UNKNOWN_MESSAGE));
    assert!(matches!(control.ask(|re| ToCoordinator::Ping { re }).await, ToNode::Pong { .. }));
    server.stop().await;
}

#[tokio::test]
async fn http_answers_people_and_load_balancers() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let get = |path: &'static str| async move {
        let mut tcp = TcpStream::connect(server.listen).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        within(tcp.read_to_string(&mut answer)).await.unwrap();
        answer
    };
    let health = get("/healthz").await;
    assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
    let body: serde_json::Value = serde_json::from_str(health.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!((&body["status"], &body["network"]), (&"ok".into(), &false.into()));
    assert!(get("/").await.starts_with("HTTP/1.1 404 "));
    assert!(get("/v1/control").await.starts_with("HTTP/1.1 426 "));
    server.stop().await;
}

#[tokio::test]
async fn stopping_tells_nodes_and_takes_two_seconds_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (_network, mut admin, node, _control) = two_members(&server).await;
    let (_relay_tx, mut relay_rx) = node.relay(&server).await.split();
    // Also with a connection that says nothing at all.
    let _silent = TcpStream::connect(server.listen).await.unwrap();
    let begin = std::time::Instant::now();
    server.stop().await;
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!(admin.closed().await, LinkError::ClosedHere, "an orderly end");
    assert_eq!(within(relay_rx.recv()).await, Ok(None));
}

#[tokio::test]
async fn one_state_directory_serves_one_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let problem = within(Server::start(&config(dir.path(), Tls::Off))).await.unwrap_err();
    assert_eq!(problem.code, "already-running");
    server.stop().await;
    start(dir.path()).await.stop().await;
}

#[tokio::test]
async fn problems_of_a_start_are_said_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let other = tempfile::tempdir().unwrap();
    let taken = Config { listen: server.listen, ..config(other.path(), Tls::Off) };
    let problem = within(Server::start(&taken)).await.unwrap_err();
    assert_eq!(problem.code, "listen");
    assert!(problem.text.contains(&server.listen.to_string()) && problem.hint.contains("--listen"), "{problem:?}");
    server.stop().await;

    std::fs::write(dir.path().join("store.db"), b"scribble".repeat(1000)).unwrap();
    let problem = within(Server::start(&config(dir.path(), Tls::Off))).await.unwrap_err();
    assert_eq!(problem.code, "store-damaged");
    assert_eq!(std::fs::read(dir.path().join("store.db")).unwrap(), b"scribble".repeat(1000));
    std::fs::remove_file(dir.path().join("store.db")).unwrap();
    let problem = within(Server::start(&config(dir.path(), Tls::Off))).await.unwrap_err();
    assert_eq!(problem.code, "store-missing");
}

// The relay by UDP: what the control link hands out works at the UDP port, and with a WebSocket at the other end.

struct UdpNode {
    socket: tokio::net::UdpSocket,
    keys: SessionKeys,
    session: u32,
    counter: u64,
}

impl UdpNode {
    async fn open(control: &mut Control) -> Self {
        let ToNode::RelayOpened { session, secret, at, .. } = control.ask(|re| ToCoordinator::OpenRelay { re }).await
        else {
            panic!("no session");
        };
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect((at[0].host.as_deref().unwrap_or("127.0.0.1"), at[0].port)).await.unwrap();
        Self { socket, keys: secret.keys(), session, counter: 0 }
    }

    async fn send(&mut self, kind: Kind, name: Name, payload: &[u8]) {
        self.counter += 1;
        let mut datagram = [&[0; HEADER][..], payload].concat();
        let header = Header { kind, counter: self.counter, session: self.session, name };
        self.keys.up.seal(&header, &mut datagram);
        self.socket.send(&datagram).await.unwrap();
    }

    async fn recv(&self) -> (Header, Vec<u8>) {
        let mut buffer = [0; 2_048];
        let len = within(self.socket.recv(&mut buffer)).await.unwrap();
        assert!(self.keys.down.verify(&buffer[..len]));
        (relay_udp::decode(&buffer[..len]).unwrap(), buffer[HEADER..len].to_vec())
    }
}

/// Waits until the relay has taken a connection in.
async fn joined(sender: &mut RelaySender, receiver: &mut RelayReceiver) {
    let mut ping = Vec::new();
    assert!(relay::encode(&Frame::Ping([1; 8]), &mut ping));
    within(sender.send(ping)).await.unwrap();
    let message = within(receiver.recv()).await.unwrap().unwrap();
    assert_eq!(Frames::new(&message).next(), Some(Ok(Frame::Pong([1; 8]))));
}

#[tokio::test]
async fn the_udp_relay_carries_between_members_and_to_websockets() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path()).await;
    let (network, mut control) = found(&server).await;
    let founder = &network.admin;
    let relay = founder.relay(&server).await;
    let mut node = UdpNode::open(&mut control).await;
    // To oneself, by the other carrier: both ends of one member.
    let me = Name::of(&founder.wg());
    let (mut sender, mut receiver) = relay.split();
    joined(&mut sender, &mut receiver).await;
    node.send(Kind::Send, me, b"by UDP").await;
    let message = within(receiver.recv()).await.unwrap().unwrap();
    let frames: Vec<_> = Frames::new(&message).map(Result::unwrap).collect();
    assert_eq!(frames, [Frame::Recv { from: founder.wg(), payload: b"by UDP" }]);
    node.send(Kind::Ping, Wish::DeliverHere.name(), &[9; 20]).await;
    assert_eq!(node.recv().await.0.kind, Kind::Pong);
    let mut out = Vec::new();
    assert!(relay::encode(&Frame::Send { to: founder.wg(), payload: b"by WebSocket" }, &mut out));
    within(sender.send(out)).await.unwrap();
    let (header, payload) = node.recv().await;
    assert_eq!((header.kind, header.name, payload.as_slice()), (Kind::Recv, me, &b"by WebSocket"[..]));
    server.stop().await;
}

#[tokio::test]
async fn strangers_get_no_session_and_neither_does_anybody_without_udp_ports() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_with(&Config { stun: Vec::new(), ..config(dir.path(), Tls::Off) }).await;
    let mut stranger = Node::new().control(&server).await;
    assert_eq!(code(&stranger.ask(|re| ToCoordinator::OpenRelay { re }).await), refusal::NO_NETWORK);
    let (_, mut control) = found(&server).await;
    assert_eq!(code(&control.ask(|re| ToCoordinator::OpenRelay { re }).await), refusal::NO_UDP_RELAY);
    server.stop().await;
}

#[tokio::test]
async fn what_the_relay_carried_survives_a_restart_and_nodes_hear_of_a_spent_budget() {
    let dir = tempfile::tempdir().unwrap();
    let limits = RelayLimits { rate: None, monthly: Some(1_000) };
    let limited = Config { relay: limits, ..config(dir.path(), Tls::Off) };
    let server = start_with(&limited).await;
    let (network, mut control) = found(&server).await;
    let founder = &network.admin;
    control.hello().await;
    let (mut sender, mut receiver) = founder.relay(&server).await.split();
    joined(&mut sender, &mut receiver).await;
    let mut out = Vec::new();
    assert!(relay::encode(&Frame::Send { to: founder.wg(), payload: &[4; 1_200] }, &mut out));
    within(sender.send(out)).await.unwrap();
    within(receiver.recv()).await.unwrap().unwrap();
    let told = |message| match message {
        ToNode::RelayBudget { spent, renewed } => Some((spent, renewed)),
        _ => None,
    };
    let (spent, renewed) = control.until(told).await;
    assert!(spent && renewed > now());
    server.stop().await;
    let again = start_with(&limited).await;
    let mut control = founder.control(&again).await;
    control.hello().await;
    assert_eq!(control.until(told).await, (true, renewed));
    again.stop().await;
}

/// RFC 8489 section 6.2.2, on the port that speaks HTTP and TLS.
#[tokio::test]
async fn the_tcp_port_also_answers_stun() {
    use meshd::wire::stun::{Change, TransactionId, binding_request, decode_binding_response};
    let dir = tempfile::tempdir().unwrap();
    for tls in [Tls::Off, Tls::SelfMade] {
        let server = start_with(&config(&dir.path().join(format!("{tls:?}")), tls)).await;
        let mut stream = within(TcpStream::connect(server.listen)).await.unwrap();
        for n in 0..3 {
            let txid = TransactionId([n; 12]);
            // In two pieces, as a stream may come.
            let request = binding_request(&txid, Change::default());
            stream.write_all(&request[..7]).await.unwrap();
            stream.flush().await.unwrap();
            stream.write_all(&request[7..]).await.unwrap();
            let mut head = [0; 20];
            within(stream.read_exact(&mut head)).await.unwrap();
            let mut answer = head.to_vec();
            answer.resize(20 + usize::from(u16::from_be_bytes([head[2], head[3]])), 0);
            within(stream.read_exact(&mut answer[20..])).await.unwrap();
            let response = decode_binding_response(&answer).unwrap();
            assert_eq!((response.txid, response.mapped), (txid, stream.local_addr().unwrap()));
        }
        // Too long, and not STUN after all: the end of it.
        for junk in [&b"\x00\x01\xff\xff"[..], &b"\x00"[..]] {
            let mut stream = within(TcpStream::connect(server.listen)).await.unwrap();
            stream.write_all(junk).await.unwrap();
            stream.write_all(&[0xff; 30]).await.unwrap();
            let mut rest = Vec::new();
            // Closed, with or without a reset for what was not read.
            let _ = within(stream.read_to_end(&mut rest)).await;
            assert!(rest.is_empty());
        }
        server.stop().await;
    }
}

//! Drives nodes and the coordinator through virtual time: takes the earliest of what the world delivers and what a
//! machine waits for, lets it happen, carries out what follows, repeats.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use ipnet::{Ipv4Net, Ipv6Net};
use meshd::coord::io::ConnId;
use meshd::coord::relay_hub::RelayConn;
use meshd::engine::drops::Drop as Reason;
use meshd::engine::io::{Command, Event as NodeEvent, Input, LocalAddress, Notice, Path, RouteWish, SocketId, Via};
use meshd::engine::netcheck::{Netcheck, SocketSlot};
use meshd::engine::planner::{Config, Limits, ShellStatus, Worked};
use meshd::time::{Now, UnixSeconds};
use meshd::trust::advert::SignedAdvert;
use meshd::trust::founding::{Terms, found, invite_record, member_record, network_id};
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::trust::record::{SignedRecord, member_ipv6};
use meshd::wire::classify::{Kind, classify};
use meshd::wire::control::{StunServer, ToCoordinator, ToNode};
use meshd::wire::keys::{ControlKey, NetworkId, WgKey};
use meshd::wire::local::{PathKind, Status, StatusPeer};
use meshd::wire::relay::{Frame, Frames, encode};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tracing::subscriber::DefaultGuard;

use crate::dice::Dice;
use crate::host::{self, Machines};
use crate::inner::{self, Inner};
use crate::logs;
use crate::scenario::{Places, Scenario};
use crate::server::{self, Server};
use crate::tcp::Tcp;
use crate::town::{SERVER_V4, SERVER_V6};
use crate::world::{HostId, Step, World};

/// A node, by the order of being added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeRef(pub(crate) usize);

/// One life of a node: what was under way to an earlier one is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life(usize, u32);

/// Which of a node's two connections to the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    Control,
    Relay,
}

#[derive(Debug)]
pub(crate) enum Event {
    Worker(Life),
    Notice(Life, Notice),
    Input(Life, Box<Input>),
    Tun(Life, Vec<u8>),
    /// The shell tries to connect.
    Dial(Life, Link),
    /// The server's end of a new connection is there.
    Accepted(Life, Link, u64, ControlKey, SocketAddr),
    /// The node's end is there.
    Connected(Life, Link, u64),
    /// A connection is gone, seen from the node.
    Broken(Life, Link, u64),
    /// A connection is gone, seen from the server.
    Closed(Link, u64),
    ToServer(u64, Box<ToCoordinator>),
    ToNode(Life, u64, Box<ToNode>),
    RelayToServer(u64, Vec<u8>),
    RelayToNode(Life, u64, Vec<u8>),
    Persisted(u64),
    /// How the coordinator sees the TCP port should be known by now.
    TcpSeen(Life, Now),
    /// A TCP connection is to be looked at.
    TcpTimer(Life, SocketAddr),
    /// The shell's NAT check begins, or something of it is due.
    Check(Life, Option<Vec<SocketAddr>>),
}

/// A node's life so far and what survives it.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) host: HostId,
    key_seed: u64,
    pub(crate) wg: WgKey,
    control: ControlKey,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    port: u16,
    /// Where it thinks peers are, kept over restarts.
    last_endpoints: BTreeMap<WgKey, SocketAddr>,
    /// What joined networks, kept over restarts.
    pub(crate) worked: Vec<Worked>,
    /// Relays for others, so many bytes a second.
    pub(crate) relays: Option<u64>,
    /// The newest advertisements it heard, kept over restarts.
    adverts: Vec<SignedAdvert>,
    /// The record file.
    pub(crate) store: Vec<SignedRecord>,
    life: u32,
    pub(crate) machines: Option<Machines>,
    links: BTreeMap<Link, Connection>,
    dials: BTreeMap<Link, u32>,
    /// Inner packets that came, other than echo.
    pub(crate) received: Vec<(Now, Vec<u8>)>,
    /// Datagrams sent, by destination.
    pub(crate) sent_to: BTreeMap<SocketAddr, u64>,
    pub(crate) relay_sent: u64,
    pub(crate) control_sent: u64,
    /// The kernel is asleep: nothing is received, no timer runs.
    asleep: bool,
    /// Ports of the sockets besides the main one, and what they are for.
    pub(crate) extra: BTreeMap<u16, Extra>,
    /// The TCP port and its connections.
    pub(crate) tcp: Tcp,
    pub(crate) check: Option<Box<Netcheck>>,
    /// What the last one found.
    pub(crate) report: Option<Box<meshd::wire::local::Netcheck>>,
    /// Probes and STUN requests sent by the planner.
    pub(crate) probes: u64,
    /// The most sockets for the planner that were open at once.
    pub(crate) most_extra: usize,
}

/// What a socket besides the main one is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extra {
    Data(SocketId),
    Check(SocketSlot),
}

/// A connection that is up.
#[derive(Debug, Clone, Copy)]
struct Connection {
    number: u64,
}

/// One direction of a reliable, ordered connection.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    last: Now,
}

/// One echo request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ping {
    pub(crate) sent: Now,
    pub(crate) answered: Option<Now>,
    pub(crate) answers: u32,
}

/// A series of pings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Series(u16);

/// See the module.
pub(crate) struct Sim {
    pub(crate) world: World<Event>,
    dice: Dice,
    replay: String,
    server_host: HostId,
    server: Server,
    server_wants: Vec<server::Want>,
    server_is_deaf: bool,
    /// A record that the coordinator keeps from these nodes.
    pub(crate) withheld: Option<(SignedRecord, Vec<NodeRef>)>,
    /// Server-side: which life of which node a connection belongs to.
    peers_of: BTreeMap<(Link, u64), Life>,
    streams: BTreeMap<(Link, u64, bool), Stream>,
    next_number: u64,
    /// From a node to the coordinator by TCP.
    tcp_delay: Duration,
    /// Percent of segments that have to be sent again.
    tcp_loss: u8,
    nodes: Vec<Node>,
    network: Network,
    pings: BTreeMap<(Series, u16), Ping>,
    next_series: u16,
    /// Watches for these bytes in relay frames and control messages.
    forbidden: Option<Vec<u8>>,
    leaked: u64,
    /// What the nodes' shells can do for punches.
    pub(crate) limits: Limits,
    /// What the relay passes on to this node from then on comes so much later.
    pub(crate) late: Option<(NodeRef, Now, Duration)>,
    /// A proxy stands before the coordinator: it does not see where nodes are.
    pub(crate) proxied: bool,
    /// The nodes' shells run the NAT check once STUN servers are known.
    pub(crate) checks: bool,
    /// Ended by [`Self::finish`]: nothing to report.
    finished: bool,
    _logs: DefaultGuard,
}

/// Who may sign what.
struct Network {
    root: Secret32,
    id: NetworkId,
    ipv4: Ipv4Net,
    ipv6: Ipv6Net,
    log: Vec<SignedRecord>,
    rng: StdRng,
}

/// The wall clock at the world's epoch.
pub(crate) const WALL: UnixSeconds = 1_800_000_000;
/// What a lost segment costs: the shortest retransmission timeout of Linux.
const RETRANSMIT: Duration = Duration::from_millis(200);
/// TCP, TLS, WebSocket, Noise.
const ROUND_TRIPS_TO_CONNECT: u32 = 4;
/// Waits between attempts to connect.
const REDIAL_MS: [u64; 4] = [500, 1_000, 2_000, 4_000];
/// Resolving a name.
const RESOLVE: Duration = Duration::from_millis(5);
/// The shell opens sockets.
const OPENING: Duration = Duration::from_millis(1);
/// The kernel answers an echo request.
const KERNEL: Duration = Duration::from_micros(50);
/// A server notices a node that vanished without a word.
const VANISHED: Duration = Duration::from_secs(20);

impl Sim {
    /// A world with its hosts; `replay` is the line that runs it again.
    pub(crate) fn new(replay: &str, seed: u64, world: World<Event>, server_host: HostId, relay: Duration) -> Self {
        let dice = Dice::new(seed).fork("sim");
        let mut key_dice = dice.fork("network");
        let mut rng = StdRng::seed_from_u64(key_dice.next());
        let root = Secret32::random(&mut rng);
        let id = network_id(&root.signing_key());
        let network = Network {
            root,
            id,
            ipv4: Ipv4Net::new_assert(Ipv4Addr::new(100, 71, 0, 0), 16),
            ipv6: "fd5d:e51a:b0a7::/48".parse().unwrap(),
            log: Vec::new(),
            rng,
        };
        Self {
            world,
            dice,
            replay: replay.to_owned(),
            server_host,
            server: Server::new(id),
            server_wants: Vec::new(),
            server_is_deaf: false,
            withheld: None,
            peers_of: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_number: 0,
            tcp_delay: relay / 2,
            tcp_loss: 0,
            nodes: Vec::new(),
            network,
            pings: BTreeMap::new(),
            next_series: 1,
            forbidden: None,
            leaked: 0,
            limits: Limits { prime_ttl: Some(2), ..Limits::default() },
            late: None,
            proxied: false,
            checks: false,
            finished: false,
            _logs: logs::catch(crate::aloud()),
        }
    }

    /// The two hosts of a scenario as nodes, started, with a coordinator that is up.
    pub(crate) fn pair(scenario: &Scenario, replay: &str) -> (Self, Places, NodeRef, NodeRef) {
        let mut world = World::new(Dice::new(scenario.seed).fork("world"), crate::aloud());
        let places = scenario.build(&mut world);
        let relay = Duration::from_millis(scenario.relay_ms);
        let mut sim = Self::new(replay, scenario.seed, world, places.server, relay);
        sim.tcp_loss = scenario.loss;
        let a = sim.add_node("a", places.a);
        let b = sim.add_node("b", places.b);
        sim.start_server();
        sim.start(a);
        sim.run_for(Duration::from_millis(scenario.skew_ms));
        sim.start(b);
        (sim, places, a, b)
    }

    // ---- building ----

    /// Makes a member; the first one founds the network. It does not run yet.
    pub(crate) fn add_node(&mut self, name: &str, host: HostId) -> NodeRef {
        let key_seed = self.dice.fork(&format!("keys {name}")).next();
        let keys = keys_from(key_seed);
        let number = self.nodes.len();
        let net = &mut self.network;
        if number == 0 {
            let root = net.root.signing_key();
            net.log.extend(found(&keys, &root, "sim", name, net.ipv4, net.ipv6, WALL, &mut net.rng));
        } else {
            let admin = keys_from(self.nodes[0].key_seed);
            let terms = Terms { expires: WALL + 86_400, ..Terms::default() };
            let (secret, invite) = invite_record(&admin.identity.signing_key(), net.id, terms, WALL, &mut net.rng);
            let ipv4 = net.ipv4.hosts().nth(number).unwrap();
            let ipv6 = member_ipv6(net.ipv6, &keys.identity_key());
            let member = member_record(&keys, &secret, net.id, name, ipv4, ipv6, WALL);
            net.log.extend([invite, member]);
        }
        let port = 20_000 + u16::try_from(self.dice.fork(&format!("port {name}")).below(40_000)).unwrap();
        self.nodes.push(Node {
            name: name.to_owned(),
            host,
            key_seed,
            wg: keys.wg_key(),
            control: keys.control_key(),
            v4: net.ipv4.hosts().nth(number).unwrap().into(),
            v6: member_ipv6(net.ipv6, &keys.identity_key()).into(),
            port,
            last_endpoints: BTreeMap::new(),
            worked: Vec::new(),
            relays: None,
            adverts: Vec::new(),
            store: net.log.clone(),
            life: 0,
            machines: None,
            links: BTreeMap::new(),
            dials: BTreeMap::new(),
            received: Vec::new(),
            sent_to: BTreeMap::new(),
            relay_sent: 0,
            control_sent: 0,
            asleep: false,
            extra: BTreeMap::new(),
            tcp: Tcp::default(),
            check: None,
            report: None,
            probes: 0,
            most_extra: 0,
        });
        NodeRef(number)
    }

    /// A new member redeems its invite at the running coordinator. It does not run yet.
    pub(crate) fn join(&mut self, name: &str, host: HostId) -> NodeRef {
        let node = self.add_node(name, host);
        let key = self.nodes[node.0].control;
        let [.., invite, member] = self.network.log.as_slice() else { unreachable!("the log ends with both") };
        let message = ToCoordinator::Redeem { re: 1, invite: invite.clone(), member: member.clone() };
        let number = self.next_number;
        self.next_number += 1;
        let (now, wall) = (self.world.now(), WALL + self.world.now().0 / 1_000_000);
        let from = SocketAddr::new(SERVER_V6.into(), 1);
        self.with_server(|s, wants| s.opened(ConnId(number), key, from, now, wants));
        self.with_server(|s, wants| s.message(ConnId(number), message, wall, now, wants));
        self.world.at(now + self.tcp_delay * 2, Event::Closed(Link::Control, number));
        node
    }

    /// Starts the coordinator; the first time with every record made so far.
    pub(crate) fn start_server(&mut self) {
        if self.server.store.is_empty() {
            self.server.store.clone_from(&self.network.log);
        }
        let mut wants = std::mem::take(&mut self.server_wants);
        self.server.start(self.world.now(), &mut wants);
        self.server_wants = wants;
        self.settle_server();
    }

    /// What the coordinator will find on its disk when it starts.
    pub(crate) fn server_store(&mut self) -> &mut Vec<SignedRecord> {
        &mut self.server.store
    }

    /// The coordinator dies; every connection to it breaks.
    pub(crate) fn kill_server(&mut self) {
        self.server.kill();
        let broken: Vec<_> = std::mem::take(&mut self.peers_of).into_iter().collect();
        for ((link, number), life) in broken {
            self.world.at(self.world.now() + self.tcp_delay, Event::Broken(life, link, number));
        }
    }

    /// Starts a node from its store.
    pub(crate) fn start(&mut self, node: NodeRef) {
        let now = self.world.now();
        let addresses = self.local_addresses(node);
        let seed = self.dice.next();
        let n = &mut self.nodes[node.0];
        n.life += 1;
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            keys: keys_from(n.key_seed),
            network: self.network.id,
            records: n.store.clone(),
            port_v4: Some(n.port),
            port_v6: Some(n.port),
            last_endpoints: n.last_endpoints.iter().map(|(k, a)| (*k, *a)).collect(),
            worked: n.worked.clone(),
            seed: bytes,
            first_number: WALL * 1_000_000 + now.0,
            limits: self.limits,
            adverts: n.adverts.clone(),
            routes: RouteWish { relay: n.relays, ..RouteWish::default() },
        };
        let mut wants = Vec::new();
        n.machines = Some(Machines::new(config, now, Dice::new(seed).fork("threads"), &mut wants));
        n.asleep = false;
        n.extra.clear();
        n.tcp = Tcp::default();
        n.check = None;
        let life = Life(node.0, n.life);
        self.carry_out(life, wants);
        self.input(node, Input::Addresses(addresses));
        for link in [Link::Control, Link::Relay] {
            self.world.at(now, Event::Dial(life, link));
        }
        self.note(node, "starts");
    }

    /// kill -9, or the battery is out. The kernel closes the connections if it lives (`kernel_lives`).
    pub(crate) fn kill(&mut self, node: NodeRef, kernel_lives: bool) {
        let now = self.world.now();
        let n = &mut self.nodes[node.0];
        if let Some(machines) = n.machines.take() {
            n.worked = machines.planner.worked();
            n.store.extend(machines.persisted);
            n.adverts = machines.adverts.into_values().collect();
        }
        n.life += 1;
        let delay = if kernel_lives { self.tcp_delay } else { VANISHED };
        for (link, connection) in std::mem::take(&mut n.links) {
            self.peers_of.remove(&(link, connection.number));
            self.world.at(now + delay, Event::Closed(link, connection.number));
        }
        self.note(node, "is killed");
    }

    /// From its next start on the node relays for others.
    pub(crate) fn volunteer(&mut self, node: NodeRef, per_second: u64) {
        self.nodes[node.0].relays = Some(per_second);
    }

    /// Its disk has lost what joined networks, and where peers were.
    pub(crate) fn forget_what_worked(&mut self, node: NodeRef) {
        self.nodes[node.0].worked.clear();
    }

    // ---- what happens to a node ----

    /// Hands an input to the planner at once.
    pub(crate) fn input(&mut self, node: NodeRef, input: Input) {
        let now = self.world.now();
        let life = self.life(node);
        let mut wants = Vec::new();
        if let Some(machines) = &mut self.nodes[node.0].machines {
            machines.input(input, now, &mut wants);
        }
        self.carry_out(life, wants);
    }

    /// A packet from the node's kernel into its TUN device.
    pub(crate) fn kernel_sends(&mut self, node: NodeRef, packet: Vec<u8>) {
        let life = self.life(node);
        self.world.at(self.world.now(), Event::Tun(life, packet));
    }

    /// A message of the coordinator that the coordinator never wrote.
    pub(crate) fn forge_control(&mut self, node: NodeRef, message: ToNode) {
        self.input(node, Input::Control(message));
    }

    /// A frame of the relay that the relay made up, or put another sender on.
    pub(crate) fn forge_relay(&mut self, node: NodeRef, from: WgKey, payload: &[u8]) {
        let (life, now) = (self.life(node), self.world.now());
        let via = Via::Relay { peer: from };
        self.with_machines(life, |m, wants| m.datagram(via, payload, now, wants));
    }

    /// From now on the coordinator ignores (or hears again) what nodes publish.
    pub(crate) const fn deafen_server(&mut self, deaf: bool) {
        self.server_is_deaf = deaf;
    }

    /// The machine's addresses changed: the kernel says so, and connections bound to the old ones die.
    pub(crate) fn moved(&mut self, node: NodeRef) {
        let addresses = self.local_addresses(node);
        self.break_links(node);
        self.input(node, Input::Addresses(addresses));
        self.note(node, "moves");
    }

    /// The machine sleeps: it receives nothing and no timer runs. Connections die unnoticed.
    pub(crate) fn sleep(&mut self, node: NodeRef) {
        self.nodes[node.0].asleep = true;
        let links: Vec<_> = self.nodes[node.0].links.iter().map(|(l, c)| (*l, c.number)).collect();
        for (link, number) in links {
            self.peers_of.remove(&(link, number));
            self.world.at(self.world.now() + VANISHED, Event::Closed(link, number));
        }
        self.note(node, "sleeps");
    }

    /// The machine is awake again and finds its connections dead.
    pub(crate) fn awaken(&mut self, node: NodeRef) {
        self.nodes[node.0].asleep = false;
        if let Some(machines) = &mut self.nodes[node.0].machines {
            machines.overslept();
        }
        self.note(node, "wakes up");
        self.break_links(node);
    }

    /// One connection to the coordinator breaks, seen at once from both sides, and is made again after `for_`.
    pub(crate) fn break_link(&mut self, node: NodeRef, link: Link, for_: Duration) {
        let life = self.life(node);
        if let Some(connection) = self.nodes[node.0].links.remove(&link) {
            self.peers_of.remove(&(link, connection.number));
            self.world.at(self.world.now(), Event::Closed(link, connection.number));
            self.link_down(node, link);
            self.world.at(self.world.now() + for_, Event::Dial(life, link));
        }
    }

    fn break_links(&mut self, node: NodeRef) {
        let life = self.life(node);
        for (link, connection) in std::mem::take(&mut self.nodes[node.0].links) {
            self.peers_of.remove(&(link, connection.number));
            self.world.at(self.world.now() + VANISHED, Event::Closed(link, connection.number));
            self.link_down(node, link);
            self.world.at(self.world.now(), Event::Dial(life, link));
        }
    }

    fn link_down(&mut self, node: NodeRef, link: Link) {
        self.input(
            node,
            match link {
                Link::Control => Input::ControlDown { problem: None },
                Link::Relay => Input::RelayDown,
            },
        );
    }

    // ---- pings ----

    /// `count` echo requests from one node's kernel to another's mesh address, `every` so often, the first now.
    pub(crate) fn ping(&mut self, from: NodeRef, to: NodeRef, count: u16, every: Duration) -> Series {
        let (source, target) = (self.nodes[from.0].v4, self.nodes[to.0].v4);
        self.ping_between(from, source, target, count, every)
    }

    /// The same with chosen inner addresses.
    pub(crate) fn ping_between(
        &mut self,
        from: NodeRef,
        source: IpAddr,
        target: IpAddr,
        count: u16,
        every: Duration,
    ) -> Series {
        let series = Series(self.next_series);
        self.next_series += 1;
        let life = self.life(from);
        for seq in 0..count {
            let sent = self.world.now() + every * u32::from(seq);
            self.pings.insert((series, seq), Ping { sent, answered: None, answers: 0 });
            self.world.at(sent, Event::Tun(life, inner::echo(source, target, false, series.0, seq, 56)));
        }
        series
    }

    pub(crate) fn pings(&self, series: Series) -> impl Iterator<Item = &Ping> {
        self.pings.range((series, 0)..=(series, u16::MAX)).map(|(_, ping)| ping)
    }

    /// How many pings that were sent by now are unanswered.
    pub(crate) fn unanswered(&self, series: Series) -> usize {
        let now = self.world.now();
        self.pings(series).filter(|p| p.sent < now && p.answered.is_none()).count()
    }

    // ---- looking ----

    pub(crate) fn node(&self, node: NodeRef) -> &Node {
        &self.nodes[node.0]
    }

    pub(crate) fn machines(&self, node: NodeRef) -> &Machines {
        self.nodes[node.0].machines.as_ref().expect("the node runs")
    }

    pub(crate) fn dropped(&self, node: NodeRef, why: Reason) -> u64 {
        self.machines(node).dropped(why)
    }

    pub(crate) fn status(&self, node: NodeRef) -> Status {
        let shell = ShellStatus {
            state: "running".into(),
            coordinator_url: "https://coordinator.example".into(),
            interface: "meshd0".into(),
            health: Vec::new(),
        };
        self.machines(node).planner.status(shell, self.world.now())
    }

    /// One peer as another node's status shows it.
    pub(crate) fn peer_status(&self, node: NodeRef, peer: NodeRef) -> StatusPeer {
        let name = &self.nodes[peer.0].name;
        self.status(node).peers.into_iter().find(|p| p.name == *name).expect("the peer is a member")
    }

    /// The codes of a node's health lines.
    pub(crate) fn health(&self, node: NodeRef) -> Vec<String> {
        self.status(node).health.into_iter().map(|h| h.code).collect()
    }

    pub(crate) fn is_direct(&self, node: NodeRef, peer: NodeRef) -> bool {
        self.peer_status(node, peer).path.kind == PathKind::Direct
    }

    /// Direct, and in no doubt about it.
    pub(crate) fn is_surely_direct(&self, node: NodeRef, peer: NodeRef) -> bool {
        matches!(self.machines(node).paths.get(&self.nodes[peer.0].wg), Some(Path::Direct { .. }))
            && self.is_direct(node, peer)
    }

    /// The worker sends to the peer directly, and not by the relay too.
    pub(crate) fn sends_directly(&self, node: NodeRef, peer: NodeRef) -> bool {
        let machines = self.machines(node);
        let id = machines.planner.find_peer(&self.nodes[peer.0].name);
        id.is_ok_and(|id| matches!(machines.sending.get(&id), Some(Path::Direct { .. })))
    }

    /// When a node's packets to a peer first went directly.
    pub(crate) fn first_direct(&self, node: NodeRef, peer: NodeRef) -> Option<Now> {
        let wanted = self.nodes[peer.0].wg;
        self.machines(node).events.iter().find_map(|(at, event)| match event {
            NodeEvent::PathChanged { key, path: Path::Direct { .. } | Path::Both { .. }, .. } if *key == wanted => {
                Some(*at)
            }
            _ => None,
        })
    }

    pub(crate) fn is_synced(&self, node: NodeRef) -> bool {
        let n = &self.nodes[node.0];
        let both = n.links.len() == 2;
        both && self.machines(node).events.iter().any(|(_, e)| *e == NodeEvent::Synced)
    }

    /// Both links are up.
    pub(crate) fn is_connected(&self, node: NodeRef) -> bool {
        self.nodes[node.0].links.len() == 2
    }

    /// Secret keys of a member, for those who play false.
    pub(crate) fn keys(&self, node: NodeRef) -> NodeKeys {
        keys_from(self.nodes[node.0].key_seed)
    }

    pub(crate) const fn network(&self) -> NetworkId {
        self.network.id
    }

    pub(crate) fn log(&self) -> &[SignedRecord] {
        &self.network.log
    }

    /// The root key's secret, for making records that are true or false.
    pub(crate) fn root(&self) -> SigningKey {
        self.network.root.signing_key()
    }

    /// The UDP port of a node.
    pub(crate) fn port(&self, node: NodeRef) -> u16 {
        self.nodes[node.0].port
    }

    /// Watches that these bytes never leave a node in the clear.
    pub(crate) fn forbid(&mut self, marker: &[u8]) {
        self.world.forbid(marker);
        self.forbidden = Some(marker.to_vec());
    }

    /// How often they did.
    pub(crate) const fn leaked(&self) -> u64 {
        self.leaked + self.world.leaked()
    }

    pub(crate) const fn now(&self) -> Now {
        self.world.now()
    }

    pub(crate) fn note(&mut self, node: NodeRef, text: &str) {
        let who = self.world.who(self.nodes[node.0].host);
        self.world.trace.note(self.world.now(), who, text.to_owned());
    }

    /// A payload as the relay delivers it, though nobody sent it.
    pub(crate) fn forge_relayed(&mut self, node: NodeRef, from: WgKey, payload: &[u8]) {
        let (now, life) = (self.world.now(), self.life(node));
        self.with_machines(life, |m, wants| m.datagram(Via::Relay { peer: from }, payload, now, wants));
    }

    /// Hands a command to a node's planner, as the local API does.
    pub(crate) fn command(&mut self, node: NodeRef, command: Command) {
        self.input(node, Input::Command(command));
    }

    // ---- running ----

    pub(crate) fn run_for(&mut self, time: Duration) {
        let until = self.world.now() + time;
        while self.step(until) {}
        self.world.advance(until);
        self.check_errors();
    }

    /// Runs until the condition holds; false if it does not within `time`. Looks every millisecond of virtual time.
    pub(crate) fn run_until(&mut self, time: Duration, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let until = self.world.now() + time;
        loop {
            if holds(self) {
                self.check_errors();
                return true;
            }
            if self.world.now() >= until {
                self.check_errors();
                return false;
            }
            let next = (self.world.now() + Duration::from_millis(1)).min(until);
            // Nothing can change before the next event.
            let next = self.next_due().unwrap_or(until).clamp(next, until);
            while self.step(next) {}
            self.world.advance(next);
        }
    }

    /// The run ends well: its trace hash.
    pub(crate) fn finish(mut self) -> u64 {
        self.check_errors();
        self.finished = true;
        self.world.trace.hash()
    }

    fn check_errors(&self) {
        assert_eq!(logs::errors(), Vec::<String>::new(), "ERROR events");
    }

    fn next_due(&self) -> Option<Now> {
        let timers = self.nodes.iter().filter(|n| !n.asleep).filter_map(|n| n.machines.as_ref()?.deadline());
        timers.chain(self.server.deadline()).chain(self.world.next_due()).min()
    }

    /// One thing happens, if it is due by `until`. What the world delivers at an instant comes before timers due then.
    fn step(&mut self, until: Now) -> bool {
        let timer = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, n)| !n.asleep)
            .filter_map(|(i, n)| Some((n.machines.as_ref()?.deadline()?, i)))
            .chain(self.server.deadline().map(|at| (at, usize::MAX)))
            .min()
            .filter(|(at, _)| *at <= until);
        // The world may not run past a timer, not even where nothing concerns the nodes.
        let bound = timer.map_or(until, |(at, _)| at.max(self.world.now()));
        match (self.world.next(bound), timer) {
            (Some(Step::Arrived { host, to, from, bytes }), _) => self.arrived(host, to, from, &bytes),
            (Some(Step::Segment { host, to, from, bytes }), _) => self.tcp_arrived(host, to, from, &bytes),
            (Some(Step::Own(event)), _) => self.happen(event),
            (None, Some((_, who))) => {
                self.world.advance(bound);
                self.wake(who);
            }
            (None, None) => return false,
        }
        true
    }

    fn wake(&mut self, who: usize) {
        let now = self.world.now();
        if who == usize::MAX {
            self.with_server(|server, wants| server.wake(now, wants));
            return;
        }
        let life = self.life(NodeRef(who));
        let mut wants = Vec::new();
        if let Some(machines) = &mut self.nodes[who].machines {
            machines.wake(now, &mut wants);
        }
        self.carry_out(life, wants);
    }

    fn arrived(&mut self, host: HostId, to: SocketAddr, from: SocketAddr, bytes: &[u8]) {
        if host == self.server_host {
            if let Some(answer) = self.server.stun(bytes, from, to) {
                self.world.send_as(host, answer.send_from, SocketAddr::new(from.ip(), answer.port), answer.bytes);
            }
            return;
        }
        let Some(i) = self.nodes.iter().position(|n| n.host == host) else { return };
        let now = self.world.now();
        let life = self.life(NodeRef(i));
        let socket = match self.nodes[i].extra.get(&to.port()).copied() {
            _ if self.nodes[i].asleep => return,
            None if to.port() == self.nodes[i].port => SocketId::for_remote(&from),
            Some(Extra::Data(socket)) => socket,
            Some(Extra::Check(slot)) => return self.check_heard(life, slot, from, bytes),
            None => return,
        };
        let node = &mut self.nodes[i];
        let via = Via::Udp { socket, remote: from };
        let mut wants = Vec::new();
        if let Some(machines) = &mut node.machines {
            machines.datagram(via, bytes, now, &mut wants);
        }
        self.carry_out(life, wants);
    }

    fn happen(&mut self, event: Event) {
        let now = self.world.now();
        match event {
            Event::Worker(life) => self.with_machines(life, |m, wants| m.worker(now, wants)),
            Event::Notice(life, notice) => {
                self.with_machines(life, |m, wants| m.input(Input::Notice(notice), now, wants));
            }
            Event::Input(life, input) => self.with_machines(life, |m, wants| m.input(*input, now, wants)),
            Event::Tun(life, packet) => self.with_machines(life, |m, wants| m.kernel_sends(&packet, now, wants)),
            Event::Dial(life, link) => self.dial(life, link),
            Event::Accepted(life, link, number, key, from) => self.accepted(life, link, number, key, from),
            Event::Connected(life, link, number) => self.connected(life, link, number),
            Event::Broken(life, link, number) => self.broken(life, link, number),
            Event::Closed(Link::Control, number) => {
                self.peers_of.remove(&(Link::Control, number));
                self.with_server(|s, wants| s.closed(ConnId(number), now, wants));
            }
            Event::Closed(Link::Relay, number) => {
                self.peers_of.remove(&(Link::Relay, number));
                self.server.relay_closed(RelayConn(number));
            }
            Event::ToServer(_, message) if self.server_is_deaf && matches!(*message, ToCoordinator::Publish { .. }) => {
            }
            Event::ToServer(number, message) => {
                let wall = WALL + now.0 / 1_000_000;
                self.with_server(|s, wants| s.message(ConnId(number), *message, wall, now, wants));
            }
            Event::ToNode(life, number, message) => {
                if self.is_current(life) && self.link_is(life, Link::Control, number) {
                    self.with_machines(life, |m, wants| m.input(Input::Control(*message), now, wants));
                }
            }
            Event::RelayToServer(number, bytes) => {
                self.with_server(|s, wants| s.relay_frames(RelayConn(number), &bytes, wants));
            }
            Event::RelayToNode(life, number, bytes) => {
                if self.is_current(life) && self.link_is(life, Link::Relay, number) {
                    self.relay_frames(life, &bytes);
                }
            }
            Event::TcpSeen(life, asked) => self.tcp_seen_late(life, asked),
            Event::TcpTimer(life, remote) => self.tcp_timer(life, remote),
            Event::Check(life, servers) => self.check_due(life, servers),
            Event::Persisted(ticket) => self.with_server(|s, wants| s.persisted(ticket, now, wants)),
        }
    }

    fn relay_frames(&mut self, life: Life, bytes: &[u8]) {
        let now = self.world.now();
        for frame in Frames::new(bytes) {
            match frame.unwrap() {
                Frame::Recv { from, payload } => {
                    let via = Via::Relay { peer: from };
                    self.with_machines(life, |m, wants| m.datagram(via, payload, now, wants));
                }
                Frame::Gone { peer } => {
                    self.with_machines(life, |m, wants| m.input(Input::RelayGone(peer), now, wants));
                }
                Frame::Send { .. } | Frame::Ping(_) | Frame::Pong(_) | Frame::Here => {}
            }
        }
    }

    // ---- connections ----

    fn dial(&mut self, life: Life, link: Link) {
        let Life(i, _) = life;
        if !self.is_current(life) || self.nodes[i].links.contains_key(&link) || self.nodes[i].asleep {
            return;
        }
        let now = self.world.now();
        let reachable = !self.world.addresses(self.nodes[i].host).is_empty();
        if !self.server.is_up() || !reachable {
            return self.redial(life, link);
        }
        let number = self.next_number;
        self.next_number += 1;
        let key = self.nodes[i].control;
        let outside = self.world.seen_from_outside(self.nodes[i].host).unwrap();
        let seen = if self.proxied { SERVER_V4[1].into() } else { outside };
        let from = SocketAddr::new(seen, 1);
        let mut setup = self.tcp_delay * 2 * ROUND_TRIPS_TO_CONNECT;
        for _ in 0..2 * ROUND_TRIPS_TO_CONNECT {
            if self.dice.percent(self.tcp_loss) {
                setup += RETRANSMIT;
            }
        }
        self.world.at(now + (setup - self.tcp_delay), Event::Accepted(life, link, number, key, from));
    }

    fn redial(&mut self, Life(i, n): Life, link: Link) {
        let tries = self.nodes[i].dials.entry(link).or_default();
        let wait = REDIAL_MS[(*tries as usize).min(REDIAL_MS.len() - 1)];
        *tries += 1;
        let jitter = self.dice.below(wait / 4 + 1);
        self.world.at(self.world.now() + Duration::from_millis(wait + jitter), Event::Dial(Life(i, n), link));
    }

    fn accepted(&mut self, life: Life, link: Link, number: u64, key: ControlKey, from: SocketAddr) {
        let now = self.world.now();
        let welcome = match link {
            Link::Control => self.server.is_up(),
            Link::Relay => {
                let mut wants = std::mem::take(&mut self.server_wants);
                let ok = self.server.relay_opened(RelayConn(number), &key, &mut wants);
                self.server_wants = wants;
                self.settle_server();
                ok
            }
        };
        if !welcome {
            return self.redial(life, link);
        }
        self.peers_of.insert((link, number), life);
        self.world.at(now + self.tcp_delay, Event::Connected(life, link, number));
        if link == Link::Control {
            self.with_server(|s, wants| s.opened(ConnId(number), key, from, now, wants));
        }
    }

    fn connected(&mut self, life: Life, link: Link, number: u64) {
        if !self.is_current(life) || self.nodes[life.0].asleep {
            // Nobody is there any more.
            self.world.at(self.world.now() + self.tcp_delay, Event::Closed(link, number));
            return;
        }
        if !self.peers_of.contains_key(&(link, number)) {
            return self.redial(life, link); // closed meanwhile
        }
        let node = &mut self.nodes[life.0];
        node.links.insert(link, Connection { number });
        node.dials.remove(&link);
        self.input(
            NodeRef(life.0),
            match link {
                Link::Control => Input::ControlUp,
                Link::Relay => Input::RelayUp,
            },
        );
    }

    fn broken(&mut self, life: Life, link: Link, number: u64) {
        if self.is_current(life) && self.link_is(life, link, number) && !self.nodes[life.0].asleep {
            self.nodes[life.0].links.remove(&link);
            self.link_down(NodeRef(life.0), link);
            self.redial(life, link);
        }
    }

    /// When something sent now arrives on a reliable, ordered connection.
    fn arrival(&mut self, link: Link, number: u64, to_server: bool) -> Now {
        let mut at = self.world.now() + self.tcp_delay;
        while self.dice.percent(self.tcp_loss) {
            at = at + RETRANSMIT;
        }
        let stream = self.streams.entry((link, number, to_server)).or_default();
        stream.last = stream.last.max(at);
        stream.last
    }

    fn watch(&mut self, bytes: &[u8]) {
        if let Some(marker) = &self.forbidden
            && bytes.windows(marker.len()).any(|w| w == marker)
        {
            self.leaked += 1;
        }
    }

    // ---- carrying out ----

    fn with_machines(&mut self, life: Life, act: impl FnOnce(&mut Machines, &mut Vec<host::Want>)) {
        if !self.is_current(life) || self.nodes[life.0].asleep {
            return;
        }
        let mut wants = Vec::new();
        if let Some(machines) = &mut self.nodes[life.0].machines {
            act(machines, &mut wants);
        }
        self.carry_out(life, wants);
    }

    fn with_server(&mut self, act: impl FnOnce(&mut Server, &mut Vec<server::Want>)) {
        let mut wants = std::mem::take(&mut self.server_wants);
        act(&mut self.server, &mut wants);
        self.server_wants = wants;
        self.settle_server();
    }

    fn carry_out(&mut self, life: Life, wants: Vec<host::Want>) {
        let now = self.world.now();
        for want in wants {
            let node = &mut self.nodes[life.0];
            match want {
                host::Want::Tcp(order) => self.tcp_order(life, order),
                host::Want::Udp { socket, bytes, .. } if socket.is_stream() => {
                    node.probes += u64::from(classify(&bytes) == Kind::Stun);
                    self.tcp_send(life, socket, &bytes);
                }
                host::Want::Udp { socket, remote, bytes, ttl } => {
                    *node.sent_to.entry(remote).or_default() += 1;
                    node.probes += u64::from(classify(&bytes) == Kind::Stun);
                    let extra = node.extra.iter().find(|(_, e)| **e == Extra::Data(socket)).map(|(port, _)| *port);
                    let main = socket == SocketId::for_remote(&remote);
                    let Some(port) = extra.or(main.then_some(node.port)) else { continue };
                    let host = node.host;
                    let sent = match ttl {
                        Some(ttl) => self.world.send_within(host, port, remote, bytes, ttl),
                        None => self.world.send(host, port, remote, bytes),
                    };
                    if !sent {
                        let via = Via::Udp { socket, remote };
                        self.world.at(now, Event::Input(life, Box::new(Input::SendFailed(via))));
                    }
                }
                host::Want::Open(sockets) => {
                    let opened = self.open_sockets(life, &sockets);
                    self.world.at(now + OPENING, Event::Input(life, Box::new(Input::SocketsOpened(opened))));
                }
                host::Want::Close(sockets) => {
                    node.extra.retain(|_, e| !matches!(e, Extra::Data(socket) if sockets.contains(socket)));
                }
                host::Want::Relay { peer, bytes } => {
                    node.relay_sent += 1;
                    let mut frame = Vec::new();
                    assert!(encode(&Frame::Send { to: peer, payload: &bytes }, &mut frame));
                    let connection = node.links.get(&Link::Relay).copied();
                    self.trace_link(life, crate::trace::label(&bytes), bytes.len(), connection.is_none());
                    if let Some(Connection { number }) = connection {
                        self.watch(&frame);
                        let at = self.arrival(Link::Relay, number, true);
                        self.world.at(at, Event::RelayToServer(number, frame));
                    }
                }
                host::Want::Control(message) => {
                    node.control_sent += 1;
                    let text = serde_json::to_string(&message).unwrap();
                    let connection = node.links.get(&Link::Control).copied();
                    self.trace_link(life, "control", text.len(), connection.is_none());
                    if let Some(Connection { number }) = connection {
                        self.watch(text.as_bytes());
                        let read = serde_json::from_str(&text).unwrap();
                        let at = self.arrival(Link::Control, number, true);
                        self.world.at(at, Event::ToServer(number, Box::new(read)));
                    }
                }
                host::Want::ResolveStun(servers) => {
                    let resolved = resolve(&servers);
                    if self.checks {
                        self.world.at(now + RESOLVE, Event::Check(life, Some(resolved.clone())));
                    }
                    self.world.at(now + RESOLVE, Event::Input(life, Box::new(Input::StunServers(resolved))));
                }
                host::Want::ToKernel(packet) => self.kernel_gets(life, packet),
                host::Want::Worker(at) => self.world.at(at, Event::Worker(life)),
                host::Want::Notice(at, notice) => self.world.at(at, Event::Notice(life, notice)),
            }
        }
        let node = &mut self.nodes[life.0];
        if let Some(machines) = &node.machines {
            for (key, path) in &machines.paths {
                if let Path::Direct { remote, socket } = path
                    && !socket.is_stream()
                {
                    node.last_endpoints.insert(*key, *remote);
                }
            }
        }
    }

    fn kernel_gets(&mut self, life: Life, packet: Vec<u8>) {
        let now = self.world.now();
        match inner::read(&packet) {
            Inner::EchoRequest { .. } => {
                if let Some(reply) = inner::answer(&packet) {
                    self.world.at(now + KERNEL, Event::Tun(life, reply));
                }
            }
            Inner::EchoReply { id, seq } => {
                if let Some(ping) = self.pings.get_mut(&(Series(id), seq)) {
                    ping.answered.get_or_insert(now);
                    ping.answers += 1;
                }
            }
            Inner::Other => self.nodes[life.0].received.push((now, packet)),
        }
    }

    fn settle_server(&mut self) {
        let now = self.world.now();
        for want in std::mem::take(&mut self.server_wants) {
            match want {
                server::Want::Control(conn, message) => {
                    let Some(life) = self.peers_of.get(&(Link::Control, conn.0)).copied() else { continue };
                    if self.is_withheld(life, &message) {
                        continue;
                    }
                    let text = serde_json::to_string(&message).unwrap();
                    self.watch(text.as_bytes());
                    let read = serde_json::from_str(&text).unwrap();
                    let at = self.arrival(Link::Control, conn.0, false);
                    self.world.at(at, Event::ToNode(life, conn.0, Box::new(read)));
                }
                server::Want::CloseControl(conn) => self.server_closes(Link::Control, conn.0),
                server::Want::Relay(conn, bytes) => {
                    let Some(life) = self.peers_of.get(&(Link::Relay, conn.0)).copied() else { continue };
                    self.watch(&bytes);
                    let late = self.late.filter(|(node, from, _)| node.0 == life.0 && *from <= now).map(|(.., by)| by);
                    let at = self.arrival(Link::Relay, conn.0, false) + late.unwrap_or_default();
                    self.world.at(at, Event::RelayToNode(life, conn.0, bytes));
                }
                server::Want::CloseRelay(conn) => self.server_closes(Link::Relay, conn.0),
                server::Want::Persisted(at, ticket) => self.world.at(at, Event::Persisted(ticket)),
            }
        }
        debug_assert!(now == self.world.now());
    }

    fn is_withheld(&self, life: Life, message: &ToNode) -> bool {
        let ToNode::Log { records, .. } = message else { return false };
        let kept = self.withheld.as_ref().filter(|(_, from)| from.contains(&NodeRef(life.0)));
        kept.is_some_and(|(record, _)| records.contains(record))
    }

    fn server_closes(&mut self, link: Link, number: u64) {
        if let Some(life) = self.peers_of.remove(&(link, number)) {
            let at = self.arrival(link, number, false);
            self.world.at(at, Event::Broken(life, link, number));
        }
    }

    fn trace_link(&mut self, life: Life, label: &'static str, len: usize, lost: bool) {
        let from = self.world.who(self.nodes[life.0].host);
        let to = self.world.who(self.server_host);
        let lost = lost.then_some("not connected");
        self.world.trace.hop_labelled(self.world.now(), from, to, label, len, lost);
    }

    fn local_addresses(&self, node: NodeRef) -> Vec<LocalAddress> {
        let prefix_len = |ip: &IpAddr| if ip.is_ipv4() { 24 } else { 64 };
        let host = self.nodes[node.0].host;
        self.world.addresses(host).iter().map(|ip| LocalAddress { ip: *ip, prefix_len: prefix_len(ip) }).collect()
    }

    pub(crate) fn carry_out_check(&mut self, Life(i, _): Life, port: u16, to: SocketAddr, bytes: Vec<u8>) {
        self.world.send(self.nodes[i].host, port, to, bytes);
    }

    pub(crate) fn node_mut(&mut self, Life(i, _): Life) -> &mut Node {
        &mut self.nodes[i]
    }

    pub(crate) const fn node_of(Life(i, _): Life) -> NodeRef {
        NodeRef(i)
    }

    /// A port that no socket of the node has.
    pub(crate) fn free_port(&mut self, Life(i, _): Life) -> u16 {
        loop {
            let port = 32_768 + u16::try_from(self.dice.below(28_000)).unwrap();
            if port != self.nodes[i].port && !self.nodes[i].extra.contains_key(&port) {
                return port;
            }
        }
    }

    pub(crate) const fn server_host(&self) -> HostId {
        self.server_host
    }

    /// The node on a host, if it is awake.
    pub(crate) fn life_at(&self, host: HostId) -> Option<Life> {
        let i = self.nodes.iter().position(|n| n.host == host && !n.asleep && n.machines.is_some())?;
        Some(self.life(NodeRef(i)))
    }

    /// A datagram reached a node's worker.
    pub(crate) fn deliver(&mut self, life: Life, via: Via, bytes: &[u8]) {
        let now = self.world.now();
        self.with_machines(life, |m, wants| m.datagram(via, bytes, now, wants));
    }

    fn life(&self, node: NodeRef) -> Life {
        Life(node.0, self.nodes[node.0].life)
    }

    pub(crate) fn is_current(&self, life: Life) -> bool {
        self.nodes[life.0].life == life.1
    }

    fn link_is(&self, life: Life, link: Link, number: u64) -> bool {
        self.nodes[life.0].links.get(&link).is_some_and(|c| c.number == number)
    }
}

impl Drop for Sim {
    /// Says how to see a failure again, and what happened last.
    fn drop(&mut self) {
        if std::thread::panicking() && !self.finished {
            crate::say(&self.world.trace.mermaid());
            crate::say(&format!(
                "replay: MESHD_SIM='{}' cargo test --no-default-features --features sim --test sim replay",
                self.replay
            ));
        }
    }
}

/// A node's keys follow from a number, so that a restarted node has the same.
fn keys_from(seed: u64) -> NodeKeys {
    NodeKeys::generate(&mut StdRng::seed_from_u64(seed))
}

/// The coordinator's name resolves to its addresses.
fn resolve(servers: &[StunServer]) -> Vec<SocketAddr> {
    let of = |ip: IpAddr| servers.iter().map(move |server| SocketAddr::new(ip, server.port));
    of(SERVER_V4[0].into()).chain(of(SERVER_V6.into())).collect()
}

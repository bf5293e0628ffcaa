//! What the benchmarks of the packet path measure: each case prepares an operation and then does it. Shared by
//! `packet_path` (time, criterion) and `costs` (instruction counts, callgrind).

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use etherparse::PacketBuilder;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use meshd::coord::relay_table::{Address, Table, Verdict};
use meshd::engine::drops::Drops;
use meshd::engine::inbound::{Inbound, InboundConfig};
use meshd::engine::io::{Notice, Path, PeerId, SocketId, Update, Via};
use meshd::engine::outbound::Outbound;
use meshd::engine::packet::{Arrival, Destination, FromTun, InboundSink, OutboundSink};
use meshd::engine::routes::Routes;
use meshd::engine::session::tunnel::{HandshakeResult, Opened, Tunnel};
use meshd::time::Now;
use meshd::trust::keys::Secret32;
use meshd::wire::classify::classify;
use meshd::wire::keys::WgKey;
use meshd::wire::offload::{Merger, Offload};
use meshd::wire::relay_udp::{self, HEADER, Header, Kind, Name, SessionSecret, Wish};
use parking_lot::Mutex;
use x25519_dalek::{PublicKey, StaticSecret};

/// One thing to measure.
pub(crate) trait Case {
    /// What has to be done before each time and is not measured.
    fn prepare(&mut self) {}
    /// The operation.
    fn run(&mut self);
    /// How many packets, or lookups, one operation stands for.
    fn count(&self) -> u64;
}

/// Makes a case when it is its turn.
pub(crate) type Make = fn() -> Box<dyn Case>;

/// All of them.
pub(crate) const CASES: &[(&str, Make)] = &[
    ("out-64", || Box::new(Out::new(64, 1))),
    ("out-1392", || Box::new(Out::new(1392, 1))),
    ("out-train", || Box::new(Out::new(1392, TRAIN))),
    ("in-64", || Box::new(In::new(64, 1))),
    ("in-1392", || Box::new(In::new(1392, 1))),
    ("in-train", || Box::new(In::new(1392, TRAIN))),
    ("seal-1392", || Box::new(Seal(Session::new(1392)))),
    ("open-1392", || Box::new(Open(Session::new(1392)))),
    ("route-host-v4", || Box::new(Lookup::new(|n| ours(n).into(), BUSY))),
    ("route-host-v6", || Box::new(Lookup::new(|n| ours6(n).into(), BUSY))),
    ("route-prefix-v4", || Box::new(Lookup::new(|n| behind(n).into(), BUSY))),
    ("route-prefix-v6", || Box::new(Lookup::new(|n| behind6(n).into(), BUSY))),
    ("route-everybody", || Box::new(Lookup::new(|n| ours(n).into(), PEERS))),
    ("route-everybody-v6", || Box::new(Lookup::new(|n| ours6(n).into(), PEERS))),
    ("route-all-prefixes", || Box::new(Lookup::new(|n| behind(n).into(), PREFIXES))),
    ("route-all-prefixes-v6", || Box::new(Lookup::new(|n| behind6(n).into(), PREFIXES))),
    ("classify", || Box::new(Classify::new())),
    ("relay-forward", || Box::new(Forward::new())),
];

/// Packets in a superpacket.
const TRAIN: usize = 44;
/// Members of the largest network.
const PEERS: u32 = 65_536;
/// Prefixes behind them: half IPv4, half IPv6.
const PREFIXES: u32 = 10_000;
/// Addresses that a busy node talks to at once.
const BUSY: u32 = 256;
/// Lookups, or datagrams to classify, in one operation.
const LOOKUPS: u32 = 1024;

const NOW: Now = Now(1_000_000);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1));
const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 64, 0, 2));
const REMOTE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 7000);
const PEER: PeerId = PeerId(1);

fn key(secret: &Secret32) -> WgKey {
    WgKey(PublicKey::from(&StaticSecret::from(*secret.expose())).to_bytes())
}

/// Two ends with a session: the first sends, the second receives.
fn tunnels() -> [(Tunnel, WgKey); 2] {
    let secrets = [Secret32::new([1; 32]), Secret32::new([2; 32])];
    let [a_key, b_key] = [key(&secrets[0]), key(&secrets[1])];
    let mut a = Tunnel::new(&secrets[0], &b_key, 1);
    let mut b = Tunnel::new(&secrets[1], &a_key, 2);
    let (mut one, mut two) = ([0; 256], [0; 256]);
    let len = a.initiate(&mut one, false, NOW).expect("an initiation");
    let HandshakeResult::Reply { len } = b.handshake(REMOTE.ip(), &one[..len], &mut two, NOW) else {
        panic!("no reply to the initiation")
    };
    let HandshakeResult::Established { len } = a.handshake(REMOTE.ip(), &two[..len], &mut one, NOW) else {
        panic!("no session from the reply")
    };
    let Opened::Keepalive { established: true } = b.open(Some(REMOTE.ip()), &one[..len], &mut two, NOW) else {
        panic!("the session was not confirmed")
    };
    [(a, b_key), (b, a_key)]
}

/// A TCP packet of `len` bytes, or a superpacket of `packets` such packets, as the kernel hands it over.
fn from_kernel(len: usize, packets: usize) -> (Offload, Vec<u8>) {
    let payload = vec![7; (len - 40) * packets];
    let (IpAddr::V4(from), IpAddr::V4(to)) = (HERE, THERE) else { unreachable!("constants") };
    let mut bytes = Vec::new();
    let packet = PacketBuilder::ipv4(from.octets(), to.octets(), 64).tcp(40_000, 5201, 1, 1000).ack(1);
    packet.write(&mut bytes, &payload).expect("a packet");
    // The sum over the pseudo header alone, RFC 9293 section 3.1: the rest is left to the device.
    let length = u16::try_from(bytes.len() - 20).expect("a length").to_be_bytes();
    let pseudo = [&bytes[12..20], &[0, 6], &length].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = u16::try_from((sum & 0xFFFF) + (sum >> 16)).expect("a folded sum");
    bytes[36..38].copy_from_slice(&sum.to_be_bytes());
    let mut header = [0; 10];
    // What `struct virtio_net_hdr` calls NEEDS_CSUM, GSO_TCPV4, hdr_len, gso_size, csum_start, csum_offset.
    header[0] = 1;
    header[1] = u8::from(packets > 1);
    header[2..4].copy_from_slice(&40u16.to_ne_bytes());
    header[4..6].copy_from_slice(&u16::try_from(len - 40).expect("a size").to_ne_bytes());
    header[6..8].copy_from_slice(&20u16.to_ne_bytes());
    header[8..10].copy_from_slice(&16u16.to_ne_bytes());
    (Offload::decode(&header), bytes)
}

/// Takes packets and forgets them, with the memory and the merging of the real one.
struct Sink {
    bytes: Vec<u8>,
    used: usize,
    places: Vec<Range<usize>>,
    merger: Merger,
}

impl Sink {
    fn new() -> Self {
        Self { bytes: vec![0; 1 << 20], used: 0, places: Vec::with_capacity(1024), merger: Merger::new(true, true) }
    }

    fn clear(&mut self) {
        self.used = 0;
        self.places.clear();
    }

    fn keep(&mut self, len: usize) {
        self.places.push(self.used..self.used + len);
        self.used += len;
    }
}

impl OutboundSink for Sink {
    fn room(&mut self, _: &Destination, _: u8, max: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..self.used + max)
    }

    fn commit(&mut self, len: usize) {
        self.keep(len);
    }

    fn to_tun(&mut self, _: &[u8]) {}

    fn notice(&mut self, _: Notice) {}
}

impl InboundSink for Sink {
    fn tun_room(&mut self, max: usize) -> &mut [u8] {
        &mut self.bytes[self.used..self.used + max]
    }

    fn tun_commit(&mut self, len: usize) {
        self.merger.add(&self.bytes, self.used..self.used + len);
        self.keep(len);
    }

    fn reply(&mut self, _: &Via, _: &[u8]) {}

    fn notice(&mut self, _: Notice) {}

    fn established(&mut self, _: PeerId) {}
}

/// What both machines are told about their peer, at `ip`, with whom there is a session.
fn introduce(tunnel: Tunnel, key: WgKey, ip: IpAddr) -> [Update; 4] {
    let index = tunnel.index();
    [
        Update::Peer {
            peer: PEER,
            key,
            owns: vec![ip.into()],
            admits: vec![ip.into()],
            keeps: vec![],
            traffic: Arc::default(),
        },
        Update::Tunnel { peer: PEER, tunnel: Arc::new(Mutex::new(tunnel)), index },
        Update::Path { peer: PEER, path: Path::Direct { socket: SocketId::V4, remote: REMOTE }, lead: Duration::ZERO },
        Update::Mtu { peer: PEER, size: 1420, settled: true },
    ]
}

/// From the TUN device to the send buffer: parse, route, cut, seal.
struct Out {
    outbound: Outbound,
    sink: Sink,
    offload: Offload,
    packet: Vec<u8>,
    room: Vec<u8>,
    packets: usize,
}

impl Out {
    fn new(len: usize, packets: usize) -> Self {
        let [(tunnel, key), _] = tunnels();
        let mut sink = Sink::new();
        let mut outbound = Outbound::new(Arc::new(Drops::default()));
        for update in introduce(tunnel, key, THERE) {
            outbound.apply(update, NOW, &mut sink);
        }
        let (offload, packet) = from_kernel(len, packets);
        Self { outbound, sink, offload, room: packet.clone(), packet, packets }
    }
}

impl Case for Out {
    fn prepare(&mut self) {
        // It is cut in place.
        self.room.copy_from_slice(&self.packet);
        self.sink.clear();
    }

    fn run(&mut self) {
        let packets = [FromTun { bytes: &mut self.room, offload: self.offload }];
        self.outbound.handle_tun(packets, NOW, &mut self.sink);
        assert_eq!(self.sink.places.len(), self.packets);
    }

    fn count(&self) -> u64 {
        self.packets as u64
    }
}

/// From the network to the TUN device: classify, open, check, merge.
struct In {
    from: Out,
    inbound: Inbound,
    sink: Sink,
}

impl In {
    fn new(len: usize, packets: usize) -> Self {
        let [(a, b_key), (b, a_key)] = tunnels();
        let mut from = Out::new(len, packets);
        for update in introduce(a, b_key, THERE) {
            from.outbound.apply(update, NOW, &mut from.sink);
        }
        let config = InboundConfig { key: b_key, own: vec![THERE], tx_prefix: [0; 4] };
        let mut inbound = Inbound::new(&config, Arc::new(Drops::default()));
        for update in introduce(b, a_key, HERE) {
            inbound.apply(update);
        }
        Self { from, inbound, sink: Sink::new() }
    }
}

impl Case for In {
    fn prepare(&mut self) {
        self.from.prepare();
        self.from.run();
        self.sink.clear();
    }

    fn run(&mut self) {
        let arrival = Arrival::by(Via::Udp { socket: SocketId::V4, remote: REMOTE });
        let datagrams = self.from.sink.places.iter().map(|place| &self.from.sink.bytes[place.clone()]);
        self.inbound.handle_train(&arrival, datagrams, NOW, &mut self.sink);
        assert_eq!(self.sink.places.len(), self.from.packets);
        let Sink { merger, bytes, .. } = &mut self.sink;
        let mut writes = 0;
        merger.drain(bytes, |_, _, pieces| writes += usize::from(black_box(pieces).count() > 0));
        assert_eq!(writes, 1);
    }

    fn count(&self) -> u64 {
        self.from.count()
    }
}

/// The session alone.
struct Session {
    tunnels: [(Tunnel, WgKey); 2],
    packet: Vec<u8>,
    datagram: Vec<u8>,
    len: usize,
}

impl Session {
    fn new(len: usize) -> Self {
        Self { tunnels: tunnels(), packet: from_kernel(len, 1).1, datagram: vec![0; len + 64], len: 0 }
    }

    fn seal(&mut self) {
        self.len = self.tunnels[0].0.seal(&self.packet, &mut self.datagram, NOW).expect("there is a session");
    }
}

struct Seal(Session);

impl Case for Seal {
    fn run(&mut self) {
        self.0.seal();
    }

    fn count(&self) -> u64 {
        1
    }
}

struct Open(Session);

impl Case for Open {
    fn prepare(&mut self) {
        self.0.seal();
    }

    fn run(&mut self) {
        let Session { tunnels, packet, datagram, len } = &mut self.0;
        let mut room = [0; 2048];
        let opened = tunnels[1].0.open(Some(REMOTE.ip()), &datagram[..*len], &mut room, NOW);
        assert_eq!(opened, Opened::Packet { len: packet.len(), established: false });
        black_box(&room);
    }

    fn count(&self) -> u64 {
        1
    }
}

/// Spreads numbers over a space, each to a place of its own.
const fn spread(n: u32, bits: u32) -> u32 {
    n.wrapping_mul(0x9E37_79B1) >> (32 - bits)
}

fn ours(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x6440_0000 | n)
}

fn ours6(n: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(0xFD00_0102_0304_u128 << 80 | u128::from(n.wrapping_mul(0x9E37_79B1)) << 32 | u128::from(n))
}

/// An address in the prefix that is the `n`th.
fn behind(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0A00_0000 | spread(n, 16) << 8 | 7)
}

fn behind6(n: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(0x2001_0DB8_u128 << 96 | u128::from(spread(n, 24)) << 64 | 7)
}

/// The table of the largest network, and who is asked for.
struct Lookup {
    routes: Routes,
    asked: Vec<IpAddr>,
}

impl Lookup {
    fn new(address: fn(u32) -> IpAddr, of: u32) -> Self {
        let mut routes = Routes::default();
        for n in 0..PEERS {
            let mut owns: Vec<IpNet> = vec![IpAddr::from(ours(n)).into(), IpAddr::from(ours6(n)).into()];
            if n < PREFIXES / 2 {
                owns.push(Ipv4Net::new_assert(behind(n), 24).into());
                owns.push(Ipv6Net::new_assert(behind6(n), 64).into());
            }
            routes.set(PeerId(n), owns);
        }
        let of = if of == PREFIXES { PREFIXES / 2 } else { of };
        let asked: Vec<IpAddr> = (0..LOOKUPS).map(|n| address(spread(n, 30) % of)).collect();
        assert!(asked.iter().all(|ip| routes.lookup(*ip).is_some()));
        Self { routes, asked }
    }
}

impl Case for Lookup {
    fn run(&mut self) {
        for ip in &self.asked {
            black_box(self.routes.lookup(*black_box(ip)));
        }
    }

    fn count(&self) -> u64 {
        self.asked.len() as u64
    }
}

/// One of each kind of datagram, mostly data.
struct Classify(Vec<Vec<u8>>);

impl Classify {
    fn new() -> Self {
        let mut data = vec![0; 1424];
        data[0] = 4;
        let mut handshake = vec![0; 148];
        handshake[0] = 1;
        let mut stun = vec![0; 20];
        stun[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
        Self(vec![data.clone(), data.clone(), data.clone(), data, handshake, stun, vec![0xC0; 100], vec![0xFF; 100]])
    }
}

impl Case for Classify {
    fn run(&mut self) {
        for n in 0..LOOKUPS as usize {
            black_box(classify(black_box(&self.0[n % self.0.len()])));
        }
    }

    fn count(&self) -> u64 {
        u64::from(LOOKUPS)
    }
}

/// What the relay does with a datagram between its two system calls: check, find the receiver, address it anew.
struct Forward {
    table: Table,
    from: u32,
    keys: relay_udp::SessionKeys,
    name: Name,
    counter: u64,
    datagrams: Vec<Vec<u8>>,
}

impl Forward {
    fn new() -> Self {
        let [a, b] = [1, 2].map(|n| key(&Secret32::new([n; 32])));
        let secrets = [SessionSecret::new([3; 32]), SessionSecret::new([4; 32])];
        let mut table = Table::new();
        let mut sessions = [0; 2];
        for (n, member) in [a, b].iter().enumerate() {
            table.admit(*member);
            let session = table.open(member, &secrets[n], NOW).expect("a member");
            sessions[n] = session;
            let mut ping = vec![0; HEADER + relay_udp::NONCE];
            let header = Header { kind: Kind::Ping, counter: 1, session, name: Wish::DeliverHere.name() };
            secrets[n].keys().up.seal(&header, &mut ping);
            assert!(matches!(table.judge(&mut ping, Self::address(), NOW), Verdict::Answer));
        }
        let datagrams = vec![vec![7; HEADER + 1424]; TRAIN];
        Self { table, from: sessions[0], keys: secrets[0].keys(), name: Name::of(&b), counter: 1, datagrams }
    }

    const fn address() -> Address {
        Address { socket: 0, remote: REMOTE, local: IpAddr::V4(Ipv4Addr::LOCALHOST) }
    }
}

impl Case for Forward {
    fn prepare(&mut self) {
        for datagram in &mut self.datagrams {
            self.counter += 1;
            let header = Header { kind: Kind::Send, counter: self.counter, session: self.from, name: self.name };
            self.keys.up.seal(&header, datagram);
        }
    }

    fn run(&mut self) {
        for datagram in &mut self.datagrams {
            let Verdict::Forward(pair) = self.table.judge(datagram, Self::address(), NOW) else {
                panic!("the datagram was refused")
            };
            black_box(self.table.address(pair.to, NOW).expect("both are there"));
            assert!(self.table.readdress(pair, datagram));
        }
    }

    fn count(&self) -> u64 {
        self.datagrams.len() as u64
    }
}

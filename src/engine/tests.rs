//! Two nodes in memory, joined by a relay and by an open network. NATs, loss and time travel are the simulator's.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::engine::drops::{Drop, Drops};
use crate::engine::inbound::Inbound;
use crate::engine::io::{
    Command, Event, Input, LocalAddress, Notice, Output, PeerId, RouteWish, SocketId, Update, Via,
};
use crate::engine::outbound::Outbound;
use crate::engine::packet::{Arrival, Destination, FromTun, InboundSink, OutboundSink};
use crate::engine::planner::{Config, Limits, Planner};
use crate::time::Now;
use crate::trust::advert::SignedAdvert;
use crate::trust::founding::{
    Terms, found, invite_record, member_record, network_id, random_ranges, route_grant_record, route_revoke_record,
};
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::record::{SignedRecord, member_ipv6};
use crate::wire::control::{ToCoordinator, ToNode, log_head};
use crate::wire::local::{PathKind, Status};
use crate::wire::offload::Offload;

mod mtu;

/// A datagram under way: from whom, how, with which ECN field, what.
type Wire = Rc<RefCell<VecDeque<(usize, Via, u8, Vec<u8>)>>>;

struct Node {
    planner: Planner,
    outbound: Outbound,
    inbound: Inbound,
    drops: Arc<Drops>,
    number: usize,
    wire: Wire,
    tun: Vec<Vec<u8>>,
    notices: VecDeque<Notice>,
    events: Vec<Event>,
    flush: Vec<PeerId>,
    room: Vec<u8>,
    room_for: Option<(Destination, u8)>,
    /// How long datagrams wait for this node.
    waited: Duration,
    adverts: Vec<SignedAdvert>,
}

struct Sink<'a> {
    number: usize,
    wire: &'a Wire,
    tun: &'a mut Vec<Vec<u8>>,
    notices: &'a mut VecDeque<Notice>,
    flush: &'a mut Vec<PeerId>,
    room: &'a mut Vec<u8>,
    room_for: &'a mut Option<(Destination, u8)>,
}

impl OutboundSink for Sink<'_> {
    fn room(&mut self, to: &Destination, ecn: u8, max: usize) -> Option<&mut [u8]> {
        self.room.clear();
        self.room.resize(max, 0);
        *self.room_for = Some((*to, ecn));
        Some(self.room)
    }
    fn commit(&mut self, len: usize) {
        let (to, ecn) = self.room_for.take().unwrap();
        let via = match to {
            Destination::Udp { socket, remote } => Via::Udp { socket, remote },
            Destination::Relay { peer } => Via::Relay { peer },
        };
        self.wire.borrow_mut().push_back((self.number, via, ecn, self.room[..len].to_vec()));
    }
    fn to_tun(&mut self, packet: &[u8]) {
        self.tun.push(packet.to_vec());
    }
    fn notice(&mut self, notice: Notice) {
        self.notices.push_back(notice);
    }
}

impl InboundSink for Sink<'_> {
    fn tun_room(&mut self, max: usize) -> &mut [u8] {
        self.room.clear();
        self.room.resize(max, 0);
        self.room
    }
    fn tun_commit(&mut self, len: usize) {
        self.tun.push(self.room[..len].to_vec());
    }
    fn reply(&mut self, via: &Via, bytes: &[u8]) {
        self.wire.borrow_mut().push_back((self.number, *via, 0, bytes.to_vec()));
    }
    fn notice(&mut self, notice: Notice) {
        self.notices.push_back(notice);
    }
    fn established(&mut self, peer: PeerId) {
        self.flush.push(peer);
    }
}

macro_rules! sink {
    ($node:expr) => {
        Sink {
            number: $node.number,
            wire: &$node.wire,
            tun: &mut $node.tun,
            notices: &mut $node.notices,
            flush: &mut $node.flush,
            room: &mut $node.room,
            room_for: &mut $node.room_for,
        }
    };
}

impl Node {
    fn address(&self) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, u8::try_from(self.number).unwrap() + 1], 7000))
    }

    fn settle(&mut self, now: Now) {
        loop {
            if let Some(notice) = self.notices.pop_front() {
                self.planner.handle(Input::Notice(notice), now);
            }
            while let Some(output) = self.planner.poll_output() {
                match output {
                    Output::Send { via, bytes } => self.wire.borrow_mut().push_back((self.number, via, 0, bytes)),
                    Output::Update(update) => self.apply(update, now),
                    Output::Event(event) => self.events.push(event),
                    Output::Control(ToCoordinator::Advertise { advert, .. }) => self.adverts.push(advert),
                    Output::Control(_)
                    | Output::Persist(_)
                    | Output::KeepAdvert { .. }
                    | Output::Routes(_)
                    | Output::ResolveStun(_)
                    | Output::Prime { .. }
                    | Output::OpenSockets(_)
                    | Output::InterfaceMtu(_)
                    | Output::CloseSockets(_)
                    | Output::Tcp(_) => {}
                }
            }
            if self.notices.is_empty() {
                return;
            }
        }
    }

    fn apply(&mut self, update: Update, now: Now) {
        self.inbound.apply(update.clone());
        let (outbound, mut sink) = (&mut self.outbound, sink!(self));
        outbound.apply(update, now, &mut sink);
    }

    fn send(&mut self, packet: &[u8], now: Now) {
        self.send_super(Offload::default(), packet, now);
    }

    fn send_super(&mut self, offload: Offload, packet: &[u8], now: Now) {
        let (outbound, mut sink) = (&mut self.outbound, sink!(self));
        outbound.handle_tun([FromTun { bytes: &mut packet.to_vec(), offload }], now, &mut sink);
        self.settle(now);
    }

    fn receive(&mut self, via: &Via, ecn: u8, bytes: &[u8], now: Now) {
        let (inbound, mut sink) = (&mut self.inbound, sink!(self));
        let arrival = Arrival { via: *via, ecn, waited: Some(self.waited) };
        inbound.handle_train(&arrival, [bytes], now, &mut sink);
        for peer in std::mem::take(&mut self.flush) {
            let (outbound, mut sink) = (&mut self.outbound, sink!(self));
            outbound.flush(peer, now, &mut sink);
        }
        self.settle(now);
    }
}

struct Pair {
    nodes: Vec<Node>,
    wire: Wire,
    now: Now,
    /// Drops everything sent by UDP.
    udp_blocked: bool,
    /// Marks everything sent by UDP as having met congestion.
    congested: bool,
    /// Drops longer datagrams sent by UDP.
    longest: usize,
}

impl Pair {
    fn new() -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        let root = Secret32::random(&mut rng).signing_key();
        let (v4, v6) = random_ranges(&mut rng);
        let keys: Vec<NodeKeys> = (0..2).map(|_| NodeKeys::generate(&mut rng)).collect();
        let mut records: Vec<SignedRecord> = found(&keys[0], &root, "home", "a", v4, v6, 0, &mut rng).into();
        let network = network_id(&root);
        let terms = Terms { expires: 10, ..Terms::default() };
        let (secret, invite) = invite_record(&keys[0].identity.signing_key(), network, terms, 0, &mut rng);
        let second = v4.hosts().nth(1).unwrap();
        records.push(invite);
        records.push(member_record(
            &keys[1],
            &secret,
            network,
            "b",
            second,
            member_ipv6(v6, &keys[1].identity_key()),
            0,
        ));
        let wire = Wire::default();
        let nodes = keys
            .into_iter()
            .enumerate()
            .map(|(number, keys)| {
                let drops = Arc::new(Drops::default());
                let config = Config {
                    keys,
                    network,
                    records: records.clone(),
                    port_v4: Some(7000),
                    port_v6: None,
                    last_endpoints: Vec::new(),
                    worked: Vec::new(),
                    seed: [u8::try_from(number).unwrap(); 32],
                    first_number: 1,
                    limits: Limits::default(),
                    adverts: Vec::new(),
                    routes: RouteWish::default(),
                };
                let planner = Planner::new(config, Arc::clone(&drops), Now::ZERO).unwrap();
                let (outbound, inbound) = planner.worker();
                let mut node = Node {
                    planner,
                    outbound,
                    inbound,
                    drops,
                    number,
                    wire: Rc::clone(&wire),
                    tun: Vec::new(),
                    notices: VecDeque::new(),
                    events: Vec::new(),
                    flush: Vec::new(),
                    room: Vec::new(),
                    room_for: None,
                    waited: Duration::ZERO,
                    adverts: Vec::new(),
                };
                let ip = node.address().ip();
                node.planner.handle(Input::Addresses(vec![LocalAddress { ip, prefix_len: 24 }]), Now::ZERO);
                node.planner.handle(Input::RelayUp, Now::ZERO);
                node.settle(Now::ZERO);
                node
            })
            .collect();
        Self { nodes, wire, now: Now::ZERO, udp_blocked: false, congested: false, longest: usize::MAX }
    }

    /// Delivers what is under way (a millisecond each hop) and fires timers until `until`.
    fn run(&mut self, until: Now) {
        while self.now < until {
            let under_way: Vec<_> = self.wire.borrow_mut().drain(..).collect();
            self.now = self.now + Duration::from_millis(1);
            for (from, via, ecn, bytes) in under_way {
                let to = 1 - from;
                let arrives = match via {
                    Via::Udp { .. } if bytes.len() > self.longest => continue,
                    Via::Udp { socket, remote } if !self.udp_blocked && remote == self.nodes[to].address() => {
                        Via::Udp { socket, remote: self.nodes[from].address() }
                    }
                    Via::Udp { .. } => continue,
                    Via::Relay { .. } => Via::Relay { peer: self.nodes[from].planner.me().wg },
                };
                let congested = self.congested && matches!(via, Via::Udp { .. });
                self.nodes[to].receive(&arrives, if congested { 3 } else { ecn }, &bytes, self.now);
            }
            for node in &mut self.nodes {
                if node.planner.poll_timeout().is_some_and(|(at, _)| at <= self.now) {
                    node.planner.handle_timeout(self.now);
                    node.settle(self.now);
                }
            }
        }
    }

    fn packet(&self, from: usize, to: usize) -> Vec<u8> {
        let ip = |n: usize| self.nodes[n].planner.me().ipv4.octets();
        let mut packet = Vec::new();
        etherparse::PacketBuilder::ipv4(ip(from), ip(to), 64).udp(1, 2).write(&mut packet, b"marker").unwrap();
        packet
    }

    fn path(&self, node: usize) -> PathKind {
        self.status(node).peers[0].path.kind
    }

    fn status(&self, node: usize) -> Status {
        let shell = crate::engine::planner::ShellStatus {
            state: "running".into(),
            coordinator_url: "https://c".into(),
            interface: "mesh0".into(),
            health: Vec::new(),
        };
        self.nodes[node].planner.status(shell, self.now)
    }
}

#[test]
fn the_first_packet_arrives_through_the_relay_and_the_path_becomes_direct() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    pair.nodes[0].send(&packet, Now::ZERO);
    pair.run(Now::from_millis(20));
    assert_eq!(pair.nodes[1].tun, vec![packet.clone()]);
    pair.run(Now::from_millis(600));
    assert_eq!((pair.path(0), pair.path(1)), (PathKind::Direct, PathKind::Direct));
    // The second packet goes directly: the relay sees nothing of it.
    let now = pair.now;
    pair.nodes[0].send(&packet, now);
    let sent: Vec<Via> = pair.wire.borrow().iter().map(|(_, via, ..)| *via).collect();
    assert!(sent.iter().all(|via| matches!(via, Via::Udp { .. })), "{sent:?}");
    pair.run(now + Duration::from_millis(5));
    assert_eq!(pair.nodes[1].tun.len(), 2);
}

#[test]
fn without_udp_everything_stays_on_the_relay() {
    let mut pair = Pair::new();
    pair.udp_blocked = true;
    let packet = pair.packet(0, 1);
    for i in 0..100u64 {
        let now = Now::from_millis(i * 50);
        pair.run(now);
        pair.nodes[0].send(&packet, pair.now);
    }
    pair.run(Now::from_millis(6000));
    assert_eq!(pair.nodes[1].tun.len(), 100);
    assert_eq!(pair.path(0), PathKind::Relay);
}

#[test]
fn a_dead_direct_path_is_left_within_a_second_and_found_again() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    pair.nodes[0].send(&packet, Now::ZERO);
    pair.run(Now::from_millis(1000));
    assert_eq!(pair.path(0), PathKind::Direct);
    pair.udp_blocked = true;
    let died = pair.now;
    let mut received_at = Vec::new();
    while pair.now.since(died) < Duration::from_secs(3) {
        let before = pair.nodes[1].tun.len();
        let now = pair.now;
        pair.nodes[0].send(&packet, now);
        pair.run(now + Duration::from_millis(10));
        if pair.nodes[1].tun.len() > before {
            received_at.push(pair.now.since(died));
        }
    }
    assert!(received_at[0] < Duration::from_millis(1000), "silent for {:?}", received_at[0]);
    assert_eq!(pair.path(0), PathKind::Relay);
    pair.udp_blocked = false;
    let until = pair.now + Duration::from_secs(30);
    while pair.now < until {
        let now = pair.now;
        pair.nodes[0].send(&packet, now);
        pair.run(now + Duration::from_millis(100));
    }
    assert_eq!(pair.path(0), PathKind::Direct);
}

#[test]
fn a_peer_that_comes_back_gets_a_new_session_before_its_silence_is_noticed() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    pair.nodes[0].send(&packet, Now::ZERO);
    pair.run(Now::from_millis(2_000));
    assert_eq!(pair.path(0), PathKind::Direct);
    // The same node, restarted: its keys are as before, its sessions are gone.
    let mut restarted = Pair::new().nodes.remove(1);
    restarted.wire = Rc::clone(&pair.wire);
    pair.nodes[1] = restarted;
    let wg = pair.nodes[1].planner.me().wg;
    for (online, offline) in [(vec![], vec![wg]), (vec![wg], vec![])] {
        let presence = ToNode::Presence { full: false, online, offline };
        let now = pair.now;
        pair.nodes[0].planner.handle(Input::Control(presence), now);
        pair.nodes[0].settle(now);
    }
    pair.run(pair.now + Duration::from_millis(20));
    let now = pair.now;
    pair.nodes[0].send(&packet, now);
    pair.run(now + Duration::from_millis(5));
    assert_eq!(pair.nodes[1].tun, vec![packet]);
}

#[test]
fn a_packet_from_an_address_that_is_not_the_peers_is_dropped_by_name() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    pair.nodes[0].send(&packet, Now::ZERO);
    pair.run(Now::from_millis(100));
    let mut forged = packet.clone();
    forged[15] ^= 0x40;
    let now = pair.now;
    pair.nodes[0].send(&forged, now);
    pair.run(now + Duration::from_millis(10));
    assert_eq!(pair.nodes[1].tun.len(), 1);
    assert_eq!(pair.nodes[1].drops.get(Drop::SpoofedSource), 1);
}

#[test]
fn ping_reports_the_path_it_took() {
    let mut pair = Pair::new();
    let peer = pair.nodes[0].planner.find_peer("b").unwrap();
    let ping = |pair: &mut Pair, token| {
        let command = Command::Ping { token, seq: 1, peer, timeout_ms: 1000 };
        let now = pair.now;
        pair.nodes[0].planner.handle(Input::Command(command), now);
        pair.nodes[0].settle(now);
        pair.run(now + Duration::from_millis(1500));
    };
    ping(&mut pair, 1);
    ping(&mut pair, 2);
    let kinds: Vec<PathKind> = pair.nodes[0]
        .events
        .iter()
        .filter_map(|e| match e {
            Event::Pong { pong, .. } => Some(pong.path),
            Event::Published { .. }
            | Event::Synced
            | Event::PathChanged { .. }
            | Event::Expelled
            | Event::NamesChanged => None,
        })
        .collect();
    assert_eq!(kinds, [PathKind::Relay, PathKind::Direct]);
}

#[test]
fn a_peer_out_of_use_gets_no_packet_and_comes_back_through_the_relay() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    pair.nodes[0].send(&packet, Now::ZERO);
    // WireGuard's own keepalive and re-key timers end with the session, 180 s after it began.
    pair.run(Now::from_millis(400_000));
    assert_eq!(pair.path(0), PathKind::None);
    pair.wire.borrow_mut().clear();
    let mut sent = 0;
    for _ in 0..600 {
        let until = pair.now + Duration::from_secs(1);
        pair.run(until);
        sent += pair.wire.borrow().len();
    }
    assert_eq!(sent, 0);
    let now = pair.now;
    pair.nodes[0].send(&packet, now);
    pair.run(now + Duration::from_millis(50));
    assert_eq!(pair.nodes[1].tun.len(), 2);
}

#[test]
fn an_answer_that_nobody_asked_for_changes_nothing() {
    let mut pair = Pair::new();
    let via = Via::Udp { socket: SocketId::V4, remote: pair.nodes[1].address() };
    let bytes = crate::wire::stun::binding_request(&crate::wire::stun::TransactionId([9; 12]), Default::default());
    let mut response = bytes.clone();
    response[0] = 1;
    pair.nodes[0].receive(&via, 0, &response, Now::ZERO);
    pair.nodes[0].receive(&via, 0, &bytes, Now::ZERO);
    assert_eq!(pair.nodes[0].drops.get(Drop::UnexpectedStun), 2);
    assert!(pair.wire.borrow().is_empty());
}

#[test]
fn outbound_stages_a_bounded_number_and_drops_the_oldest() {
    let mut pair = Pair::new();
    let packet = pair.packet(0, 1);
    let node = &mut pair.nodes[0];
    for _ in 0..200 {
        let (outbound, mut sink) = (&mut node.outbound, sink!(node));
        outbound.handle_tun([FromTun::whole(&mut packet.clone())], Now::ZERO, &mut sink);
    }
    assert_eq!(node.drops.get(Drop::StagedOverflow), 200 - crate::engine::outbound::STAGED_PER_PEER as u64);
    let mut to_nobody = {
        let mut p = packet.clone();
        p[16..20].copy_from_slice(&[8, 8, 8, 8]);
        p
    };
    let (outbound, mut sink) = (&mut node.outbound, sink!(node));
    let mut malformed = [0x45, 0];
    let packets = [FromTun::whole(&mut to_nobody), FromTun::whole(&mut malformed)];
    outbound.handle_tun(packets, Now::ZERO, &mut sink);
    assert_eq!((node.drops.get(Drop::NoRoute), node.drops.get(Drop::BadIp)), (1, 1));
    assert_eq!(node.tun.len(), 1, "an ICMP error tells the application");
}

/// A TCP packet as the kernel hands it over: as many bytes as `payload`, to be cut to `size`.
fn superpacket(pair: &Pair, payload: &[u8], size: u16) -> (Offload, Vec<u8>) {
    let ip = |n: usize| pair.nodes[n].planner.me().ipv4.octets();
    let mut packet = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4(ip(0), ip(1), 64).tcp(1, 2, 3, 4).ack(5);
    builder.write(&mut packet, payload).unwrap();
    // The sum over the pseudo header alone, RFC 9293 section 3.1.
    let length = u16::try_from(packet.len() - 20).unwrap().to_be_bytes();
    let pseudo = [&packet[12..20], &[0, 6], &length].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = u16::try_from((sum & 0xFFFF) + (sum >> 16)).unwrap();
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    let size = size.to_ne_bytes();
    // Checksum needed; TCP over IPv4; 40 bytes of headers; sizes; the checksum is 16 bytes into what begins at 20.
    let [twenty, sixteen] = [20u16, 16].map(u16::to_ne_bytes);
    let header = [1, 1, 40, 0, size[0], size[1], twenty[0], twenty[1], sixteen[0], sixteen[1]];
    (Offload::decode(&header), packet)
}

#[test]
fn a_superpacket_arrives_as_whole_packets_with_and_without_a_session() {
    let mut pair = Pair::new();
    let payload: Vec<u8> = (0..3000u32).map(|n| (n % 251) as u8).collect();
    let (offload, packet) = superpacket(&pair, &payload, 1000);
    // The first is staged, the second sealed straight.
    for expected in [3, 6] {
        let now = pair.now;
        pair.nodes[0].send_super(offload, &packet, now);
        pair.run(now + Duration::from_millis(20));
        assert_eq!(pair.nodes[1].tun.len(), expected);
    }
    let mut got = Vec::new();
    for (n, packet) in pair.nodes[1].tun[3..].iter().enumerate() {
        let sliced = etherparse::SlicedPacket::from_ip(packet).unwrap();
        let (Some(etherparse::NetSlice::Ipv4(ip)), Some(etherparse::TransportSlice::Tcp(tcp))) =
            (sliced.net, sliced.transport)
        else {
            panic!("{packet:?}")
        };
        assert_eq!(tcp.sequence_number(), 3 + 1000 * u32::try_from(n).unwrap());
        let checksum = tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), tcp.payload()).unwrap();
        assert_eq!(tcp.checksum(), checksum);
        got.extend_from_slice(tcp.payload());
    }
    assert_eq!(got, payload);
    let counted = |node: usize| {
        let peer = pair.status(node).peers.remove(0);
        (peer.tx_bytes, peer.rx_bytes)
    };
    assert_eq!((counted(0), counted(1)), ((2 * (3000 + 3 * 40), 0), (0, 2 * (3000 + 3 * 40))));
}

#[test]
fn malformed_and_oversized_superpackets_are_dropped_by_name() {
    let mut pair = Pair::new();
    let (offload, packet) = superpacket(&pair, &[1; 3000], 1000);
    pair.nodes[0].send_super(offload, &packet, Now::ZERO);
    pair.run(Now::from_millis(20));
    let mut kind = offload.encode();
    kind[1] = 3;
    let (no_size, _) = superpacket(&pair, &[1; 3000], 0);
    for malformed in [Offload::decode(&kind), no_size] {
        let now = pair.now;
        pair.nodes[0].send_super(malformed, &packet, now);
    }
    assert_eq!(pair.nodes[0].drops.get(Drop::BadSuperpacket), 2);
    let mut outside = offload.encode();
    (outside[1], outside[6]) = (0, 255);
    let (now, whole) = (pair.now, pair.packet(0, 1));
    pair.nodes[0].send_super(Offload::decode(&outside), &whole, now);
    assert_eq!(pair.nodes[0].drops.get(Drop::BadSuperpacket), 3);
    pair.nodes[0].send_super(offload, &whole[..20], now);
    assert_eq!(pair.nodes[0].drops.get(Drop::BadIp), 1);
    pair.run(now + Duration::from_millis(20));
    assert_eq!(pair.nodes[1].tun.len(), 3);
}

/// RFC 6040: copied to the outer header on the way in, combined on the way out; the DSCP stays inside.
#[test]
fn congestion_marks_go_through_the_tunnel_both_ways() {
    let mut pair = Pair::new();
    let plain = pair.packet(0, 1);
    pair.nodes[0].send(&plain, Now::ZERO);
    pair.run(Now::from_millis(600));
    assert_eq!(pair.path(0), PathKind::Direct);
    let marked = |ecn: u8| {
        let mut header = etherparse::Ipv4Header::from_slice(&plain).unwrap().0;
        header.ecn = etherparse::IpEcn::try_new(ecn).unwrap();
        header.dscp = etherparse::IpDscp::try_new(46).unwrap();
        let mut packet = Vec::new();
        header.header_checksum = header.calc_header_checksum();
        header.write(&mut packet).unwrap();
        packet.extend(&plain[20..]);
        packet
    };
    for (congested, ecn, expected) in [
        (false, 0, Some(0)),
        (false, 2, Some(2)),
        (false, 3, Some(3)),
        (true, 1, Some(3)),
        (true, 2, Some(3)),
        (true, 0, None),
    ] {
        pair.congested = congested;
        pair.nodes[1].tun.clear();
        let now = pair.now;
        pair.nodes[0].send(&marked(ecn), now);
        assert_eq!(pair.wire.borrow().back().map(|(_, _, outer, _)| *outer), Some(ecn));
        pair.run(now + Duration::from_millis(5));
        let got: Vec<_> = pair.nodes[1].tun.iter().map(|packet| packet[1]).collect();
        assert_eq!(got, expected.map(|ecn| 46 << 2 | ecn).into_iter().collect::<Vec<_>>());
        if let Some(ecn) = expected {
            assert_eq!(pair.nodes[1].tun, [marked(ecn)]);
        }
    }
    assert_eq!(pair.nodes[1].drops.get(Drop::Congested), 1);
}

#[test]
fn a_queue_that_stays_long_costs_a_bulk_flow_a_packet_and_nobody_else() {
    let mut pair = Pair::new();
    let small = pair.packet(0, 1);
    pair.nodes[0].send(&small, Now::ZERO);
    pair.run(Now::from_millis(600));
    assert_eq!(pair.path(0), PathKind::Direct);
    let (offload, bulk) = superpacket(&pair, &[1; 3000], 1000);
    pair.nodes[1].waited = Duration::from_millis(5);
    pair.nodes[1].tun.clear();
    for _ in 0..90 {
        let now = pair.now;
        pair.nodes[0].send(&small, now);
        pair.run(now + Duration::from_millis(1));
    }
    let drops = |pair: &Pair| pair.nodes[1].drops.get(Drop::QueueDelay);
    assert_eq!((pair.nodes[1].tun.len(), drops(&pair)), (90, 0));
    for _ in 0..30 {
        let now = pair.now;
        pair.nodes[0].send(&small, now);
        pair.nodes[0].send_super(offload, &bulk, now);
        pair.run(now + Duration::from_millis(1));
    }
    // The queue was too long for an interval: one packet of the flow that fills it.
    assert_eq!(drops(&pair), 1);
    pair.nodes[1].waited = Duration::ZERO;
    pair.run(pair.now + Duration::from_millis(5));
    let arrived = |len: usize| pair.nodes[1].tun.iter().filter(|packet| packet.len() == len).count();
    assert_eq!((arrived(small.len()), arrived(1040)), (120, 89));
}

/// A packet with these addresses.
fn between(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4(source, destination, 64).udp(1, 2).write(&mut packet, b"marker").unwrap();
    packet
}

/// Everybody hears of a record.
fn log(pair: &mut Pair, record: &SignedRecord) {
    for node in &mut pair.nodes {
        let from = node.planner.ledger().log().len() as u64;
        let head = log_head(node.planner.ledger().head(), record);
        let message = ToNode::Log { from, records: vec![record.clone()], head, end: true };
        node.planner.handle(Input::Control(message), pair.now);
        node.settle(pair.now);
    }
}

#[test]
fn packets_for_a_subnet_go_through_its_router_once_both_it_and_an_admin_say_so() {
    let mut pair = Pair::new();
    let lan: ipnet::IpNet = "192.168.7.0/24".parse().unwrap();
    let me = pair.nodes[0].planner.me().ipv4.octets();
    let there = between(me, [192, 168, 7, 9]);
    let back = between([192, 168, 7, 9], me);
    let beside = between([192, 168, 8, 9], me);
    let try_it = |pair: &mut Pair| {
        let before = [pair.nodes[0].tun.len(), pair.nodes[1].tun.len()];
        let now = pair.now;
        pair.nodes[0].send(&there, now);
        pair.nodes[1].send(&back, now);
        pair.nodes[1].send(&beside, now);
        pair.run(now + Duration::from_millis(100));
        let new = |n: usize, wanted: &[u8]| pair.nodes[n].tun[before[n]..].iter().any(|p| p == wanted);
        assert!(!new(0, &beside), "from beside what the router leads to");
        (new(1, &there), new(0, &back))
    };
    assert_eq!(try_it(&mut pair), (false, false));
    for node in &mut pair.nodes {
        node.planner.handle(Input::ControlUp, Now::ZERO);
    }
    let wish = RouteWish { advertise: vec![lan], ..RouteWish::default() };
    let now = pair.now;
    pair.nodes[1].planner.handle(Input::Routes(wish), now);
    pair.nodes[1].settle(now);
    let advert = pair.nodes[1].adverts.pop().expect("it is told to the coordinator");
    pair.nodes[0].planner.handle(Input::Control(ToNode::Adverts { adverts: vec![advert] }), now);
    pair.nodes[0].settle(now);
    assert_eq!(try_it(&mut pair), (false, false), "not granted");
    let (admin, router) = (&pair.nodes[0].planner.keys().identity.signing_key(), pair.nodes[1].planner.me().identity);
    let network = pair.nodes[0].planner.ledger().network();
    log(&mut pair, &route_grant_record(admin, network, router, lan, 5));
    assert_eq!(try_it(&mut pair), (true, true));
    assert_eq!(pair.status(0).peers[0].routes, [lan]);
    // What goes past what it leads to is not let in.
    let past = between(me, [192, 168, 7, 9].map(|b| b + 1));
    let dropped = pair.nodes[1].drops.get(Drop::NotForUs);
    let peer = pair.nodes[0].planner.find_peer("b").unwrap();
    let everything = Update::Peer {
        peer,
        key: pair.nodes[1].planner.me().wg,
        owns: vec!["0.0.0.0/0".parse().unwrap()],
        admits: Vec::new(),
        keeps: Vec::new(),
        traffic: Arc::default(),
    };
    let now = pair.now;
    pair.nodes[0].apply(everything, now);
    pair.nodes[0].send(&past, now);
    pair.run(now + Duration::from_millis(50));
    assert_eq!(pair.nodes[1].drops.get(Drop::NotForUs), dropped + 1);
    // Taken back.
    log(&mut pair, &route_revoke_record(admin, network, router, lan, 5));
    assert_eq!(try_it(&mut pair), (false, false));
}

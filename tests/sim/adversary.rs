//! Enemies: on the wire, in the coordinator's place, and among the members. Each attack is refused, counted by name or shown
//! as a health line, and disturbs nothing else.

use std::net::SocketAddr;
use std::time::Duration;

use meshd::engine::drops::Drop;
use meshd::engine::io::{Input, RouteWish};
use meshd::engine::session::tunnel::{HandshakeResult, Tunnel};
use meshd::trust::founding::{Terms, invite_record, member_record, revoke_record};
use meshd::trust::keys::NodeKeys;
use meshd::trust::record::{Member, Record, RevokeTarget, SignedRecord, member_ipv6};
use meshd::wire::control::{ToNode, log_head};
use meshd::wire::keys::Digest32;
use meshd::wire::peer::{Branch, Have, MARK, Message, Parcel, Piece, Stem, Summary, name_of};
use meshd::wire::probe::{self, ProbeKeys};
use meshd::wire::stun::TransactionId;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::dice::Dice;
use crate::inner;
use crate::scenario::{Places, Scenario};
use crate::sim::{NodeRef, Series, Sim, WALL};
use crate::trace::label;
use crate::world::{HostId, Tapped};

named_runs! {
    2, 20,
    bad_bytes => bad_bytes,
    replays => replays,
    reflections => reflections,
    probes_for_a_third_party => probes_for_a_third_party,
    forged_probes => forged_probes,
    junk_flood => junk_flood,
    handshake_flood => handshake_flood,
    stranger => stranger,
    lying_relay => lying_relay,
    spoofing_member => spoofing_member,
    invented_member => invented_member,
    swapped_key => swapped_key,
    shared_address => shared_address,
    shortened_log => shortened_log,
    forgotten_revoke => forgotten_revoke,
    contradicting_digest => contradicting_digest,
    hidden_removal => hidden_removal,
    unruly_member => unruly_member,
    looping_member => looping_member,
    greedy_member => greedy_member,
}

/// A running ping may lose less than one in a hundred under attack.
const MAY_LOSE_PER_CENT: usize = 1;

/// Two nodes talking directly, and somebody on the internet who can send with any source address and taps every wire.
struct Stage {
    sim: Sim,
    places: Places,
    a: NodeRef,
    b: NodeRef,
    mallory: HostId,
    pings: Series,
    /// Where datagrams for `a` go, and where `b`'s come from, as the internet sees both.
    to_a: SocketAddr,
    from_b: SocketAddr,
}

/// The first node has no NAT in front of it, so that everything thrown at it arrives.
fn stage(name: &str, seed: u64, pings: u16) -> Stage {
    let scenario = Scenario { seed, ..Scenario::pair("public".parse().unwrap(), "linux".parse().unwrap()) };
    let (mut sim, mut places, a, b) = Sim::pair(&scenario, &format!("adversary={name} seed={seed}"));
    let lair = places.town.site(&mut sim.world, "mallory", &[], None);
    let mallory = lair.host(&mut sim.world, "mallory", 1);
    sim.world.tap();
    assert!(sim.run_until(Duration::from_secs(5), |s| s.is_synced(a) && s.is_synced(b)));
    sim.run_for(Duration::from_secs(2));
    sim.ping(a, b, 20, Duration::from_millis(50));
    sim.run_for(Duration::from_secs(4));
    assert!(sim.is_surely_direct(a, b) && sim.is_surely_direct(b, a));
    let to_a = SocketAddr::new(sim.world.addresses(places.a)[0], sim.port(a));
    let from_b = sim.peer_status(a, b).path.endpoint.unwrap().parse().unwrap();
    let pings = sim.ping(a, b, pings, Duration::from_millis(50));
    Stage { sim, places, a, b, mallory, pings, to_a, from_b }
}

impl Stage {
    fn throw(&mut self, source: SocketAddr, bytes: Vec<u8>) {
        self.sim.world.send_as(self.mallory, source, self.to_a, bytes);
    }

    fn dropped(&self, why: Drop) -> u64 {
        self.sim.dropped(self.a, why)
    }

    /// What was seen on its way to `a`, of one kind.
    fn seen(&mut self, kind: &str) -> Vec<Tapped> {
        let to_a = self.to_a;
        self.sim.world.tapped().into_iter().filter(|t| t.destination == to_a && label(&t.bytes) == kind).collect()
    }

    /// The running ping lost next to nothing, and the path is what it was.
    fn undisturbed(mut self) {
        self.sim.run_for(Duration::from_secs(2));
        let now = self.sim.now();
        let due = self.sim.pings(self.pings).filter(|p| now.since(p.sent) > Duration::from_secs(1)).count();
        let lost = self.sim.unanswered(self.pings).saturating_sub(1);
        assert!(due >= 20 && lost * 100 <= due * MAY_LOSE_PER_CENT, "{lost} of {due} pings lost");
        assert!(self.sim.is_surely_direct(self.a, self.b) && self.sim.is_surely_direct(self.b, self.a));
        let endpoint: SocketAddr = self.sim.peer_status(self.a, self.b).path.endpoint.unwrap().parse().unwrap();
        assert_eq!(endpoint, self.from_b, "the path was not moved");
        self.sim.finish();
    }
}

/// Real datagrams of every kind, each cut to every length, with every byte changed once, and with bytes added.
fn bad_bytes(seed: u64) {
    let mut stage = stage("bad_bytes", seed, 400);
    let mut dice = Dice::new(seed);
    let mut kinds: Vec<Tapped> = Vec::new();
    let to_a = stage.to_a;
    for seen in stage.sim.world.tapped() {
        let new = !kinds.iter().any(|k| label(&k.bytes) == label(&seen.bytes));
        if new && seen.destination == to_a {
            kinds.push(seen);
        }
    }
    let names: Vec<_> = kinds.iter().map(|k| label(&k.bytes)).collect();
    for kind in ["wg-data", "probe", "probe-answer", "stun-answer"] {
        assert!(names.contains(&kind), "{names:?}");
    }
    // Handshakes went through the relay: one more, made with b's keys and never sent whole.
    let mut room = [0; 148];
    let (b, key_a) = (stage.sim.keys(stage.b), stage.sim.node(stage.a).wg);
    Tunnel::new(&b.wg, &key_a, 3).initiate(&mut room, true, stage.sim.now()).unwrap();
    kinds.push(Tapped { source: stage.from_b, destination: to_a, bytes: room.to_vec() });
    for Tapped { source, bytes, .. } in kinds {
        for len in 0..bytes.len() {
            stage.throw(source, bytes[..len].to_vec());
        }
        for i in 0..bytes.len().min(400) {
            let mut changed = bytes.clone();
            changed[i] ^= u8::try_from(1 + dice.below(255)).unwrap();
            stage.throw(source, changed);
        }
        stage.throw(source, [bytes.as_slice(), &dice.bytes(40)].concat());
        stage.sim.run_for(Duration::from_millis(200));
    }
    assert!(stage.dropped(Drop::BadTag) > 0 && stage.dropped(Drop::Junk) > 0 && stage.dropped(Drop::UnknownIndex) > 0);
    // No handshake without a valid MAC gets as far as costing a Diffie-Hellman.
    assert!(stage.dropped(Drop::HandshakeGate) > 100, "{}", stage.dropped(Drop::HandshakeGate));
    // The last sixteen bytes are a second MAC, looked at only under load: with those changed it is still b's handshake.
    assert!(stage.dropped(Drop::BadHandshake) + stage.dropped(Drop::UnknownPeer) <= 16);
    stage.undisturbed();
}

/// Everything that went to `a` so far is sent again, from where it came and from elsewhere.
fn replays(seed: u64) {
    let mut stage = stage("replays", seed, 400);
    stage.sim.run_for(Duration::from_secs(3));
    let elsewhere = "198.51.100.222:4444".parse().unwrap();
    let to_a = stage.to_a;
    let all: Vec<Tapped> = stage.sim.world.tapped().into_iter().filter(|t| t.destination == to_a).collect();
    let data = all.iter().filter(|t| label(&t.bytes) == "wg-data").count() as u64;
    let before = stage.dropped(Drop::Replayed);
    for source in [None, Some(elsewhere)] {
        for seen in &all {
            stage.throw(source.unwrap_or(seen.source), seen.bytes.clone());
        }
        stage.sim.run_for(Duration::from_secs(1));
    }
    // A data message crosses no NAT on the way to `a`, so the tap saw each once.
    assert_eq!(stage.dropped(Drop::Replayed) - before, 2 * data);
    stage.undisturbed();
}

/// What a node sent comes back to it.
fn reflections(seed: u64) {
    let mut stage = stage("reflections", seed, 400);
    stage.sim.run_for(Duration::from_secs(2));
    let (to_a, from_b) = (stage.to_a, stage.from_b);
    let own: Vec<Tapped> = stage.sim.world.tapped().into_iter().filter(|t| t.source == to_a).collect();
    assert!(own.len() > 20);
    for seen in own {
        stage.throw(from_b, seen.bytes.clone());
        stage.throw(seen.destination, seen.bytes);
    }
    stage.sim.run_for(Duration::from_secs(1));
    assert!(stage.dropped(Drop::UnknownIndex) > 0);
    stage.undisturbed();
}

/// Probes that the peer really sent are sent again, a hundred a second, as if they came from somebody who has nothing to do with
/// it: what that one gets because of us is three datagrams a second at most, no longer than what was sent.
fn probes_for_a_third_party(seed: u64) {
    let mut stage = stage("probes_for_a_third_party", seed, 400);
    stage.sim.run_for(Duration::from_secs(17));
    let probes = stage.seen("probe");
    assert!(!probes.is_empty(), "the keepalive's, at least");
    let longest = probes.iter().map(|p| p.bytes.len()).max().unwrap();
    let victim: SocketAddr = "198.51.100.222:4444".parse().unwrap();
    let mut hits = Vec::new();
    for tick in 0..500 {
        stage.throw(victim, probes[tick % probes.len()].bytes.clone());
        stage.sim.run_for(Duration::from_millis(10));
        let now = stage.sim.now();
        for seen in stage.sim.world.tapped().iter().filter(|t| t.destination.ip() == victim.ip()) {
            assert!(seen.bytes.len() <= longest.max(1_312), "{} bytes", seen.bytes.len());
            hits.push(now);
        }
    }
    assert!(!hits.is_empty(), "a probe is answered: the peer may have moved there");
    for window in hits.windows(4) {
        assert!(window[3].since(window[0]) >= Duration::from_millis(980), "{window:?}");
    }
    assert!(stage.dropped(Drop::Polite) > 100, "{}", stage.dropped(Drop::Polite));
    stage.undisturbed();
}

/// Probes and answers made by somebody without the keys: for the right receiver, with its name, and as answers to the probes that
/// are really under way. None is answered, none proves anything, each is counted.
fn forged_probes(seed: u64) {
    let mut stage = stage("forged_probes", seed, 400);
    let outsider = NodeKeys::generate(&mut StdRng::seed_from_u64(seed));
    let (of_a, of_b) = (stage.sim.node(stage.a).wg, stage.sim.node(stage.b).wg);
    let keys = ProbeKeys::derive(&outsider.wg, &of_b, &of_a).unwrap();
    stage.sim.run_for(Duration::from_secs(17));
    let genuine = stage.seen("probe").pop().unwrap();
    let mine = stage.sim.world.tapped();
    let elsewhere: SocketAddr = "198.51.100.223:5555".parse().unwrap();
    let before = stage.dropped(Drop::BadProbe) + stage.dropped(Drop::UnknownProbe);
    for n in 0..50u8 {
        let txid = TransactionId([n; 12]);
        // The name of the receiver is no secret: it is in every genuine probe.
        let mut forged = probe::encode_request(&keys, &txid, None);
        let (from, to) = (name_at(&forged), name_at(&genuine.bytes));
        let name = genuine.bytes[to..to + 16].to_vec();
        forged[from..from + 16].copy_from_slice(&name);
        stage.throw(elsewhere, forged);
        stage.throw(elsewhere, probe::encode_request(&keys, &txid, Some(1_312)));
    }
    for seen in mine.iter().filter(|t| label(&t.bytes) == "probe") {
        let Some(txid) = probe::transaction_id(&seen.bytes) else { continue };
        stage.throw(seen.destination, probe::encode_response(&keys, &txid, elsewhere, None));
    }
    stage.sim.run_for(Duration::from_secs(1));
    assert!(stage.dropped(Drop::BadProbe) + stage.dropped(Drop::UnknownProbe) - before >= 50, "each is counted");
    assert_eq!(stage.sim.node(stage.a).sent_to.get(&elsewhere), None, "no answer");
    stage.undisturbed();
}

/// Where the receiver's name is in a probe: the value of USERNAME, the first attribute.
fn name_at(probe: &[u8]) -> usize {
    assert_eq!(probe[20..22], [0, 6], "USERNAME comes first");
    24
}

/// Ten thousand datagrams a second of nothing in particular, for two seconds.
fn junk_flood(seed: u64) {
    let mut stage = stage("junk_flood", seed, 400);
    let mut dice = Dice::new(seed);
    for _ in 0..2_000 {
        for _ in 0..10 {
            let source = SocketAddr::from(([198, 51, 100, 100], 1 + u16::try_from(dice.below(60_000)).unwrap()));
            let first = [0, 1, 2, 3, 4, 0xc0, 0xc1, 0x45][usize::try_from(dice.below(8)).unwrap()];
            let len = 1 + usize::try_from(dice.below(200)).unwrap();
            let mut bytes = dice.bytes(len);
            bytes[0] = first;
            if let Some(zeros) = bytes.get_mut(1..4) {
                zeros.fill(0);
            }
            stage.throw(source, bytes);
        }
        stage.sim.run_for(Duration::from_millis(1));
    }
    stage.undisturbed();
}

/// A real initiation, with a valid MAC, sent again 500 times a second from many addresses for longer than a session lasts:
/// the session is renewed all the same.
fn handshake_flood(seed: u64) {
    let mut stage = stage("handshake_flood", seed, 2_900);
    let mut dice = Dice::new(seed);
    // The handshake itself went through the relay; `a`'s own restart makes `b` start one that the tap can see.
    let outsider = NodeKeys::generate(&mut StdRng::seed_from_u64(dice.next()));
    let now = stage.sim.now();
    let mut room = [0; 148];
    let mut tunnel = Tunnel::new(&outsider.wg, &stage.sim.node(stage.a).wg, 77);
    let len = tunnel.initiate(&mut room, true, now).unwrap();
    for _ in 0..14_000 {
        for _ in 0..5 {
            let source = SocketAddr::from(([198, 51, 100, 50 + u8::try_from(dice.below(200)).unwrap()], 7_777));
            stage.throw(source, room[..len].to_vec());
        }
        stage.sim.run_for(Duration::from_millis(10));
    }
    assert!(stage.dropped(Drop::HandshakeGate) > 10_000, "the gate holds: {}", stage.dropped(Drop::HandshakeGate));
    assert!(stage.dropped(Drop::UnknownPeer) > 0);
    let age = stage.sim.peer_status(stage.a, stage.b).last_handshake_s.unwrap();
    assert!(age < 125, "the session was renewed {age} s ago");
    stage.undisturbed();
}

/// Somebody who is no member starts a handshake: no answer, counted by name.
fn stranger(seed: u64) {
    let mut stage = stage("stranger", seed, 200);
    let keys = NodeKeys::generate(&mut StdRng::seed_from_u64(seed));
    let mut tunnel = Tunnel::new(&keys.wg, &stage.sim.node(stage.a).wg, 5);
    let mut room = [0; 148];
    let len = tunnel.initiate(&mut room, true, stage.sim.now()).unwrap();
    let source = SocketAddr::new(stage.sim.world.addresses(stage.mallory)[0], 9_000);
    stage.throw(source, room[..len].to_vec());
    stage.sim.run_for(Duration::from_secs(1));
    assert_eq!(stage.dropped(Drop::UnknownPeer), 1);
    assert_eq!(stage.sim.node(stage.a).sent_to.get(&source), None, "no answer");
    stage.undisturbed();
}

/// The relay puts another member's name on what it forwards, invents frames, and repeats old ones.
fn lying_relay(seed: u64) {
    let mut stage = stage("lying_relay", seed, 400);
    let (a, b) = (stage.a, stage.b);
    let site = stage.places.town.site(&mut stage.sim.world, "c", &["linux".parse().unwrap()], None);
    let host = site.host(&mut stage.sim.world, "c", 1);
    let c = stage.sim.join("c", host);
    stage.sim.run_for(Duration::from_secs(1));
    let (key_b, key_c) = (stage.sim.node(b).wg, stage.sim.node(c).wg);
    let mut tunnel = Tunnel::new(&stage.sim.keys(c).wg, &stage.sim.node(a).wg, 9);
    let mut room = [0; 148];
    let len = tunnel.initiate(&mut room, true, stage.sim.now()).unwrap();
    stage.sim.forge_relay(a, key_b, &room[..len]);
    stage.sim.run_for(Duration::from_millis(50));
    assert_eq!(stage.dropped(Drop::UnknownPeer), 1, "c's handshake under b's name");
    let old = stage.seen("wg-data");
    for seen in old.iter().take(50) {
        stage.sim.forge_relay(a, key_b, &seen.bytes);
        stage.sim.forge_relay(a, key_c, &seen.bytes);
    }
    let mut dice = Dice::new(seed);
    for _ in 0..200 {
        let len = usize::try_from(dice.below(300)).unwrap();
        let bytes = dice.bytes(len);
        stage.sim.forge_relay(a, key_b, &bytes);
    }
    stage.undisturbed();
}

/// A member sends a packet whose inner source belongs to somebody else.
fn spoofing_member(seed: u64) {
    let mut stage = stage("spoofing_member", seed, 200);
    let (a, b) = (stage.a, stage.b);
    let target = stage.sim.node(a).v4;
    let spoofed = ["100.71.0.77", "8.8.8.8", "127.0.0.1"].map(|ip| ip.parse().unwrap());
    for (n, source) in spoofed.into_iter().chain([target]).enumerate() {
        stage.sim.kernel_sends(b, inner::other(source, target, b"trust me"));
        stage.sim.run_for(Duration::from_millis(100));
        assert_eq!(stage.dropped(Drop::SpoofedSource), n as u64 + 1, "{source}");
    }
    assert!(stage.sim.node(a).received.is_empty());
    let honest = stage.sim.node(b).v4;
    stage.sim.kernel_sends(b, inner::other(honest, target, b"it is me"));
    stage.sim.run_for(Duration::from_millis(100));
    assert_eq!(stage.sim.node(a).received.len(), 1);
    stage.undisturbed();
}

// ---- the coordinator as an enemy ----

/// A log that continues what the node has with these records, as only the coordinator can send it.
fn continue_log(sim: &mut Sim, node: NodeRef, records: Vec<SignedRecord>) {
    let known = sim.machines(node).planner.ledger().log();
    let (from, head) = (known.len() as u64, known.iter().fold(Digest32::default(), log_head));
    let head = records.iter().fold(head, log_head);
    sim.forge_control(node, ToNode::Log { from, records, head, end: true });
}

/// The record was refused, the status says who is to blame, nothing else changed.
fn refused(mut stage: Stage, records: Vec<SignedRecord>) {
    let a = stage.a;
    let before = stage.sim.status(a).peers.iter().map(|p| (p.name.clone(), p.addresses.clone())).collect::<Vec<_>>();
    let count = records.len() as u64;
    let log = stage.sim.machines(a).planner.ledger().log().to_vec();
    continue_log(&mut stage.sim, a, records);
    stage.sim.run_for(Duration::from_millis(100));
    assert_eq!(stage.dropped(Drop::RefusedRecord), count);
    assert_eq!(stage.sim.health(a), ["coordinator-forged-record"]);
    let after = stage.sim.status(a).peers.iter().map(|p| (p.name.clone(), p.addresses.clone())).collect::<Vec<_>>();
    assert_eq!(before, after, "no peer came, went or changed");
    assert_eq!(stage.sim.machines(a).planner.ledger().log(), log);
    assert!(stage.sim.machines(a).persisted.len() <= log.len(), "nothing of it is kept");
    stage.undisturbed();
}

/// It adds a member: with an invite of its own making, with one that exists, with the root key's name on it.
fn invented_member(seed: u64) {
    let stage = stage("invented_member", seed, 200);
    let mut rng = StdRng::seed_from_u64(seed);
    let evil = NodeKeys::generate(&mut rng);
    let (network, ipv4) = (stage.sim.network(), "100.71.0.66".parse().unwrap());
    let ipv6 = member_ipv6("fd5d:e51a:b0a7::/48".parse().unwrap(), &evil.identity_key());
    let terms = Terms { expires: WALL + 9_999, ..Terms::default() };
    let (secret, invite) = invite_record(&evil.identity.signing_key(), network, terms, WALL, &mut rng);
    let member = member_record(&evil, &secret, network, "evil", ipv4, ipv6, WALL);
    let mut forged_invite = invite.clone();
    forged_invite.signer = Digest32(stage.sim.root().verifying_key().to_bytes());
    refused(stage, vec![invite, member, forged_invite]);
}

/// It swaps a peer's key: the record altered, and a new one signed by somebody else for the same name and address.
fn swapped_key(seed: u64) {
    let stage = stage("swapped_key", seed, 200);
    let mut rng = StdRng::seed_from_u64(seed);
    let evil = NodeKeys::generate(&mut rng);
    let genuine = stage.sim.log().last().unwrap().clone();
    let Ok(Record::Member(member)) = genuine.open() else { panic!("the last record is b's") };
    let mut altered = genuine.clone();
    altered.payload = altered.payload.replace(&member.wg.to_string(), &evil.wg_key().to_string());
    assert_ne!(altered, genuine);
    let other = Member { wg: evil.wg_key(), ..member };
    let resigned = SignedRecord::sign(&Record::Member(other), &evil.identity.signing_key())
        .countersign(&stage.sim.keys(stage.b).identity.signing_key());
    refused(stage, vec![altered, resigned]);
}

/// It gives a second node the address (and the name) of a first one, with an invite that is true.
fn shared_address(seed: u64) {
    let mut stage = stage("shared_address", seed, 200);
    let (a, b) = (stage.a, stage.b);
    let mut rng = StdRng::seed_from_u64(seed);
    let network = stage.sim.network();
    let admin = stage.sim.keys(a).identity.signing_key();
    let terms = Terms { uses: 5, expires: WALL + 9_999, ..Terms::default() };
    let (secret, invite) = invite_record(&admin, network, terms, WALL, &mut rng);
    continue_log(&mut stage.sim, a, vec![invite]);
    let evil = NodeKeys::generate(&mut rng);
    let std::net::IpAddr::V4(of_b) = stage.sim.node(b).v4 else { panic!("IPv4") };
    let std::net::IpAddr::V4(of_a) = stage.sim.node(a).v4 else { panic!("IPv4") };
    let ipv6 = member_ipv6("fd5d:e51a:b0a7::/48".parse().unwrap(), &evil.identity_key());
    let make = |name: &str, ipv4| member_record(&evil, &secret, network, name, ipv4, ipv6, WALL);
    let records = vec![make("evil", of_b), make("evil", of_a), make("b", "100.71.0.66".parse().unwrap())];
    refused(stage, records);
}

/// It comes back with an old log: nothing that the nodes know is unlearned, the status says so, and they give it back.
fn shortened_log(seed: u64) {
    let mut stage = stage("shortened_log", seed, 2_000);
    let (a, b) = (stage.a, stage.b);
    let whole = stage.sim.server_store().clone();
    stage.sim.deafen_server(true);
    stage.sim.kill_server();
    stage.sim.run_for(Duration::from_millis(100));
    // b's membership is in the last two records.
    stage.sim.server_store().truncate(whole.len() - 2);
    stage.sim.start_server();
    let seen =
        stage.sim.run_until(Duration::from_secs(12), |s| s.health(a).contains(&"coordinator-rollback".to_owned()));
    assert!(seen, "{:?}", stage.sim.health(a));
    stage.sim.run_for(Duration::from_secs(3));
    assert!(stage.sim.health(a).contains(&"coordinator-rollback".to_owned()), "it stays until it is mended");
    assert_eq!(stage.sim.status(a).peers.len(), 1, "b is still a peer");
    assert_eq!(stage.sim.machines(a).planner.ledger().log(), whole);
    // Restored honestly, it takes the records back.
    stage.sim.deafen_server(false);
    stage.sim.kill_server();
    stage.sim.run_for(Duration::from_millis(100));
    stage.sim.start_server();
    let mended = stage.sim.run_until(Duration::from_secs(60), |s| s.health(a).is_empty() && s.health(b).is_empty());
    assert!(mended, "{:?} {:?}", stage.sim.health(a), stage.sim.health(b));
    let mut stored = stage.sim.server_store().clone();
    stored.sort_by_key(SignedRecord::id);
    let mut wanted = whole;
    wanted.sort_by_key(SignedRecord::id);
    assert_eq!(stored, wanted);
    stage.undisturbed();
}

/// It drops a Revoke that it showed before: the removed node stays out, over restarts too, and the status says so.
fn forgotten_revoke(seed: u64) {
    let mut stage = stage("forgotten_revoke", seed, 2_000);
    let (a, b) = (stage.a, stage.b);
    let site = stage.places.town.site(&mut stage.sim.world, "c", &["linux".parse().unwrap()], None);
    let host = site.host(&mut stage.sim.world, "c", 1);
    let c = stage.sim.join("c", host);
    stage.sim.start(c);
    stage.sim.run_for(Duration::from_secs(1));
    let admin = stage.sim.keys(a).identity.signing_key();
    let target = RevokeTarget::Identity(stage.sim.keys(c).identity_key());
    let revoke = revoke_record(&admin, stage.sim.network(), target, WALL);
    stage.sim.command(a, meshd::engine::io::Command::Publish { token: 1, records: vec![revoke.clone()] });
    stage.sim.run_for(Duration::from_secs(1));
    for node in [a, b] {
        assert_eq!(stage.sim.status(node).peers.len(), 1, "c is out");
    }
    stage.sim.deafen_server(true);
    stage.sim.kill_server();
    stage.sim.run_for(Duration::from_millis(100));
    assert_eq!(stage.sim.server_store().pop(), Some(revoke));
    stage.sim.start_server();
    for node in [a, b] {
        let seen = stage
            .sim
            .run_until(Duration::from_secs(12), |s| s.health(node).contains(&"coordinator-rollback".to_owned()));
        assert!(seen, "{:?}", stage.sim.health(node));
        assert_eq!(stage.sim.status(node).peers.len(), 1, "c is still out");
    }
    stage.sim.kill(b, true);
    stage.sim.start(b);
    stage.sim.run_for(Duration::from_secs(5));
    assert_eq!(stage.sim.status(b).peers.len(), 1, "and after a restart");
    let (source, target) = (stage.sim.node(c).v4, stage.sim.node(b).v4);
    stage.sim.kernel_sends(c, inner::other(source, target, b"let me in"));
    stage.sim.run_for(Duration::from_secs(3));
    assert!(stage.sim.node(b).received.is_empty());
    stage.sim.finish();
}

/// Its log does not add up to the digest it gives.
fn contradicting_digest(seed: u64) {
    let mut stage = stage("contradicting_digest", seed, 200);
    let a = stage.a;
    let from = stage.sim.machines(a).planner.ledger().log().len() as u64;
    stage.sim.forge_control(a, ToNode::Log { from, records: Vec::new(), head: Digest32([9; 32]), end: true });
    assert_eq!(stage.sim.health(a), ["coordinator-inconsistent"]);
    stage.undisturbed();
}

// ---- what peers know ----

/// Adds a third member, which runs.
fn third(stage: &mut Stage) -> NodeRef {
    let site = stage.places.town.site(&mut stage.sim.world, "c", &["linux".parse().unwrap()], None);
    let host = site.host(&mut stage.sim.world, "c", 1);
    let c = stage.sim.join("c", host);
    stage.sim.start(c);
    assert!(stage.sim.run_until(Duration::from_secs(5), |s| s.is_synced(c)));
    stage.sim.run_for(Duration::from_secs(2));
    c
}

/// It keeps a removal from a node from the beginning, and from the removed one: a peer tells, the node puts the removed one out,
/// gives the record back, and says who withheld it.
fn hidden_removal(seed: u64) {
    let mut stage = stage("hidden_removal", seed, 2_000);
    let (a, b) = (stage.a, stage.b);
    let c = third(&mut stage);
    stage.sim.ping(c, b, 20, Duration::from_millis(50));
    stage.sim.run_for(Duration::from_secs(3));
    assert!(stage.sim.is_surely_direct(c, b));
    let admin = stage.sim.keys(a).identity.signing_key();
    let target = RevokeTarget::Identity(stage.sim.keys(c).identity_key());
    let revoke = revoke_record(&admin, stage.sim.network(), target, WALL);
    stage.sim.withheld = Some((revoke.clone(), vec![b, c]));
    stage.sim.command(a, meshd::engine::io::Command::Publish { token: 1, records: vec![revoke.clone()] });
    stage.sim.run_for(Duration::from_secs(1));
    assert_eq!(stage.sim.status(a).peers.len(), 1, "c is out");
    let heard = stage.sim.run_until(Duration::from_secs(4), |s| s.status(b).peers.len() == 1);
    assert!(heard, "b hears of the removal from a");
    let (source, target) = (stage.sim.node(c).v4, stage.sim.node(b).v4);
    let before = stage.sim.node(b).received.len();
    stage.sim.kernel_sends(c, inner::other(source, target, b"still here"));
    stage.sim.run_for(Duration::from_secs(2));
    assert_eq!(stage.sim.node(b).received.len(), before);
    let code = "coordinator-withholds".to_owned();
    assert!(!stage.sim.health(b).contains(&code), "perhaps the coordinator is only slow");
    let named = stage.sim.run_until(Duration::from_secs(20), |s| s.health(b).contains(&code));
    assert!(named, "{:?}", stage.sim.health(b));
    assert_eq!(stage.sim.health(a), Vec::<String>::new(), "a was told");
    assert!(stage.sim.machines(b).persisted.contains(&revoke), "and it is kept");
    // It shows the record after all.
    stage.sim.withheld = None;
    stage.sim.kill_server();
    stage.sim.run_for(Duration::from_millis(100));
    stage.sim.start_server();
    let mended = stage.sim.run_until(Duration::from_secs(20), |s| s.is_connected(b) && s.health(b).is_empty());
    assert!(mended, "{:?}", stage.sim.health(b));
    stage.undisturbed();
}

/// A member that is no meshd: it has b's keys, and a session with a.
struct Insider {
    tunnel: Tunnel,
    at: SocketAddr,
}

impl Insider {
    fn new(stage: &mut Stage) -> Self {
        stage.sim.kill(stage.b, false);
        let (b, key_a) = (stage.sim.keys(stage.b), stage.sim.node(stage.a).wg);
        let at: SocketAddr = "198.51.100.222:4444".parse().unwrap();
        let mut room = [0; 200];
        let mut tunnel = Tunnel::new(&b.wg, &key_a, 77);
        let len = tunnel.initiate(&mut room, true, stage.sim.now()).unwrap();
        stage.sim.world.tapped();
        stage.throw(at, room[..len].to_vec());
        stage.sim.run_for(Duration::from_millis(300));
        let answered = stage.sim.world.tapped().into_iter().find(|t| t.destination == at && t.bytes.len() == 92);
        let response = answered.expect("a answers a member").bytes;
        let result = tunnel.handshake(at.ip(), &response, &mut room, stage.sim.now());
        let HandshakeResult::Established { len } = result else { panic!("{result:?}") };
        stage.throw(at, room[..len].to_vec());
        Self { tunnel, at }
    }

    fn says(&mut self, stage: &mut Stage, plain: &[u8]) {
        let mut out = vec![0; plain.len() + 200];
        let len = self.tunnel.seal(plain, &mut out, stage.sim.now()).unwrap();
        stage.throw(self.at, out[..len].to_vec());
    }
}

/// Messages that are malformed, forged, too large or too many: each is dropped by its name, nothing is believed, and what they
/// draw is bounded.
fn unruly_member(seed: u64) {
    let mut stage = stage("unruly_member", seed, 1);
    let a = stage.a;
    let c = third(&mut stage);
    let series = stage.sim.ping(a, c, 400, Duration::from_millis(50));
    stage.sim.run_for(Duration::from_secs(3));
    let mut insider = Insider::new(&mut stage);
    let log = stage.sim.machines(a).planner.ledger().log().to_vec();

    let mut dice = Dice::new(seed);
    let good = Message::Have(Have { answer: false, stem: Stem::ALL, ids: vec![[1; 8]] }).encode();
    for len in 1..good.len() {
        insider.says(&mut stage, &good[..len]);
    }
    for kind in 0..=255 {
        let noise = [&[MARK, kind, 0, 60], dice.bytes(60).as_slice()].concat();
        insider.says(&mut stage, &noise);
        insider.says(&mut stage, &[MARK ^ 3, kind, 0, 0]);
        stage.sim.run_for(Duration::from_millis(20));
    }
    assert!(stage.dropped(Drop::BadPeerMessage) > 300, "{}", stage.dropped(Drop::BadPeerMessage));

    // Records of its own making, and true ones altered.
    let mut rng = StdRng::seed_from_u64(seed);
    let evil = NodeKeys::generate(&mut rng);
    let (secret, invite) =
        invite_record(&evil.identity.signing_key(), stage.sim.network(), Terms::default(), WALL, &mut rng);
    let ipv6 = member_ipv6("fd5d:e51a:b0a7::/48".parse().unwrap(), &evil.identity_key());
    let network = stage.sim.network();
    let member = member_record(&evil, &secret, network, "evil", "100.71.0.66".parse().unwrap(), ipv6, WALL);
    let mut altered = log.last().unwrap().clone();
    altered.payload = altered.payload.replace("\"c\"", "\"d\"");
    let before = stage.dropped(Drop::RefusedRecord);
    for (number, record) in (0u32..).zip([invite, member, altered]) {
        let parcel = Parcel::Record(record).encode();
        let total = u32::try_from(parcel.len()).unwrap();
        insider.says(&mut stage, &Message::Piece(Piece { number, total, offset: 0, bytes: &parcel }).encode());
        // Its beginning again, its end without a beginning, one that never ends.
        insider.says(&mut stage, &Message::Piece(Piece { number, total, offset: 0, bytes: &parcel[..9] }).encode());
        insider.says(&mut stage, &Message::Piece(Piece { number, total, offset: 5, bytes: &parcel[5..] }).encode());
        let endless = Piece { number: 99, total: 60_000, offset: 0, bytes: &parcel };
        insider.says(&mut stage, &Message::Piece(endless).encode());
    }
    stage.sim.run_for(Duration::from_secs(1));
    assert_eq!(stage.dropped(Drop::RefusedRecord), before + 3);
    assert_eq!(stage.sim.machines(a).planner.ledger().log(), log);
    assert_eq!(stage.sim.health(a), Vec::<String>::new(), "a peer's nonsense is not the coordinator's");

    // It asks for everything, again and again; and lies about what it holds.
    let sent = |stage: &Stage| stage.sim.node(a).sent_to.values().sum::<u64>() + stage.sim.node(a).relay_sent;
    let (before, from) = (sent(&stage), stage.sim.now());
    let nothing = Message::Have(Have { answer: false, stem: Stem::ALL, ids: Vec::new() }).encode();
    let branch = Message::Branch(Branch { stem: Stem::ALL, digests: [[9; 8]; 16] }).encode();
    let digest = Digest32([9; 32]);
    let liar = Summary { settled: false, count: u32::MAX, head: digest, set: digest, mine: u64::MAX, yours: u64::MAX };
    for _ in 0..400 {
        for message in [&nothing, &branch, &Message::Summary(liar).encode()] {
            insider.says(&mut stage, message);
        }
        stage.sim.run_for(Duration::from_millis(10));
    }
    let seconds = stage.sim.now().since(from).as_secs();
    // 64 KiB a second of records of at least 600 bytes, 32 messages a second with at most sixteen answers, and what pings take.
    assert!(sent(&stage) - before <= 128 * 17 + 110 + seconds * (110 + 32 * 17 + 60), "{}", sent(&stage) - before);
    assert!(stage.dropped(Drop::PeerMessageLimit) > 500, "{}", stage.dropped(Drop::PeerMessageLimit));
    assert_eq!(stage.sim.machines(a).planner.ledger().log(), log);
    stage.sim.run_for(Duration::from_secs(2));
    let lost = stage.sim.unanswered(series);
    assert!(lost <= 4, "{lost} pings to somebody else were lost");
    stage.sim.finish();
}

/// What is to be passed on and should not be: to oneself, to nobody, what is not sealed, what was passed on already, what is not
/// from whom it says.
fn looping_member(seed: u64) {
    let mut stage = stage("looping_member", seed, 1);
    let (a, b) = (stage.a, stage.b);
    let c = third(&mut stage);
    let series = stage.sim.ping(a, c, 300, Duration::from_millis(50));
    stage.sim.run_for(Duration::from_secs(3));
    let mut insider = Insider::new(&mut stage);
    let [of_a, of_b, of_c] = [a, b, c].map(|node| name_of(&stage.sim.node(node).wg));
    let sealed = [&[0xC1, 1][..], &[5; 90]].concat();
    let data = [&[4, 0, 0, 0][..], &[5; 90]].concat();
    let inside = Message::Pass { to: of_c, payload: &sealed }.encode();
    let refused = [
        Message::Pass { to: of_b, payload: &sealed },
        Message::Pass { to: of_a, payload: &sealed },
        Message::Pass { to: [0; 8], payload: &sealed },
        Message::Pass { to: of_c, payload: &data },
        Message::Pass { to: of_c, payload: &inside },
        Message::Pass { to: of_c, payload: &[] },
        Message::Passed { from: of_b, payload: &sealed },
        Message::Passed { from: of_a, payload: &sealed },
        Message::Passed { from: of_c, payload: &inside },
    ];
    for (n, message) in (1..).zip(&refused) {
        insider.says(&mut stage, &message.encode());
        stage.sim.run_for(Duration::from_millis(50));
        assert_eq!(stage.dropped(Drop::NotPassedOn), n, "{message:?}");
    }
    // Sealed, but not by whom it says: it is passed on, and does not open.
    let before = (stage.dropped(Drop::BadSealed), stage.sim.dropped(c, Drop::BadSealed));
    insider.says(&mut stage, &Message::Passed { from: of_c, payload: &sealed }.encode());
    insider.says(&mut stage, &Message::Pass { to: of_c, payload: &sealed }.encode());
    stage.sim.run_for(Duration::from_millis(200));
    assert_eq!((stage.dropped(Drop::BadSealed), stage.sim.dropped(c, Drop::BadSealed)), (before.0 + 1, before.1 + 1));
    stage.sim.run_for(Duration::from_secs(2));
    assert!(stage.sim.unanswered(series) <= 2);
    stage.sim.finish();
}

/// A member that has a volunteer relay more than it offered, to nobody, to itself, and round about.
fn greedy_member(seed: u64) {
    const RATE: u64 = 100_000;
    let mut stage = stage("greedy_member", seed, 1);
    let (a, b) = (stage.a, stage.b);
    let c = third(&mut stage);
    let series = stage.sim.ping(a, c, 300, Duration::from_millis(50));
    stage.sim.run_for(Duration::from_secs(3));
    stage.sim.input(a, Input::Routes(RouteWish { relay: Some(RATE), ..RouteWish::default() }));
    stage.sim.run_for(Duration::from_millis(100));
    let mut insider = Insider::new(&mut stage);
    let [of_a, of_b, of_c] = [a, b, c].map(|node| name_of(&stage.sim.node(node).wg));
    let data = [&[4, 0, 0, 0][..], &[5; 1_000]].concat();
    let inside = Message::Pass { to: of_c, payload: &data }.encode();
    for (n, message) in (1..).zip(&[
        Message::Pass { to: of_b, payload: &data },
        Message::Pass { to: of_a, payload: &data },
        Message::Pass { to: [0; 8], payload: &data },
        Message::Pass { to: of_c, payload: &inside },
        Message::Passed { from: of_b, payload: &data },
    ]) {
        insider.says(&mut stage, &message.encode());
        stage.sim.run_for(Duration::from_millis(50));
        assert_eq!(stage.dropped(Drop::NotPassedOn), n, "{message:?}");
    }
    // Nobody holds a session with these numbers.
    let before = stage.sim.dropped(c, Drop::UnknownIndex);
    let from = stage.sim.now();
    for _ in 0..200 {
        for _ in 0..10 {
            insider.says(&mut stage, &Message::Pass { to: of_c, payload: &data }.encode());
        }
        stage.sim.run_for(Duration::from_millis(10));
    }
    stage.sim.run_for(Duration::from_millis(200));
    let came = stage.sim.dropped(c, Drop::UnknownIndex) - before;
    let most = RATE * (u64::try_from(stage.sim.now().since(from).as_millis()).unwrap() + 100) / 1_000 / 1_004;
    assert!(came > most / 2 && came <= most, "{came} of 2000 were relayed, {most} may be");
    assert!(stage.dropped(Drop::PeerRelayLimit) >= 2_000 - most, "{}", stage.dropped(Drop::PeerRelayLimit));
    assert!(stage.sim.unanswered(series) <= 2);
    stage.sim.finish();
}

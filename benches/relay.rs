//! The relay's UDP port against a plain UDP forwarder of the same shape, on loopback, in turns; and what a bulk pair does
//! to the round trip of an interactive one. `scripts/bench --relay`, which is `cargo bench --bench relay`.
//!
//! The plain forwarder is one thread that receives batches of runs and sends each run on, with the same sockets and system
//! calls and nothing else. What is compared is processor time per packet of the forwarding thread: on a busy machine that
//! is steadier than packets per second, and what one core could do follows from it. Says of each of the two bars whether
//! it is kept, and exits with 1 if one is not.

#![expect(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a benchmark")]

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use meshd::link::{self, Target};
use meshd::os::clock::wall;
use meshd::os::server_socket::ServerSocket;
use meshd::os::train::{BATCH, Buffers, Receiver, Sender};
use meshd::server::{Config, RelayLimits, Server, Tls};
use meshd::time::Now;
use meshd::trust::founding::{self, Terms};
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::trust::record::member_ipv6;
use meshd::trust::token::Token;
use meshd::wire::control::{ToCoordinator, ToNode};
use meshd::wire::keys::Digest32;
use meshd::wire::relay_udp::{HEADER, Header, Kind, Name, SessionKeys, Wish};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// How long one measurement takes, and how many there are of each.
const TURN: Duration = Duration::from_millis(1_500);
const TURNS: usize = 5;
/// What `docs/` promises: the plain forwarder's share of processor time in the relay's.
const BAR: f64 = 0.70;

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let bench = runtime.block_on(Bench::start(dir.path()));
    let mut missed = false;
    println!("processor time per packet of the forwarding thread, medians of {TURNS} turns");
    for (what, segment, run) in [
        ("1,400-byte datagrams in runs of 44", 1_400, 44),
        ("1,400-byte datagrams one by one", 1_400, 1),
        ("100-byte datagrams one by one", 100, 1),
    ] {
        let (mut plain, mut relay) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            plain.push(measure_plain(&bench, segment, run));
            relay.push(measure_relay(&bench, segment, run));
        }
        let (plain, relay) = (median(plain), median(relay));
        let share = plain / relay;
        missed |= share < BAR;
        println!(
            "  {what:38} plain {plain:6.0} ns   relay {relay:6.0} ns   relay makes {:3.0} % of its packets; bar {:.0} %: {}",
            100.0 * share,
            100.0 * BAR,
            verdict(share >= BAR)
        );
    }
    let (idle, loaded) = (round_trips(&bench), {
        let bulk = Bulk::start(&bench);
        let trips = round_trips(&bench);
        bulk.stop();
        trips
    });
    let allowed = 2 * idle.1 + Duration::from_millis(5);
    missed |= loaded.1 > allowed;
    println!("round trip of an interactive pair: idle median {:?} p99 {:?}", idle.0, idle.1);
    println!(
        "  while a bulk pair sends all it can: median {:?} p99 {:?}; bar {allowed:?}: {}",
        loaded.0,
        loaded.1,
        verdict(loaded.1 <= allowed)
    );
    std::process::exit(i32::from(missed));
}

const fn verdict(kept: bool) -> &'static str {
    if kept { "kept" } else { "MISSED" }
}

/// A coordinator with two members.
struct Bench {
    server: Server,
    at: SocketAddr,
    bulk: Member,
    quiet: Member,
}

/// One end of a session; it sends to itself, which is a pair like any other.
#[derive(Clone)]
struct Member {
    keys: SessionKeys,
    session: u32,
    name: Name,
    socket: Arc<ServerSocket>,
    counter: Arc<AtomicU64>,
}

impl Bench {
    async fn start(dir: &std::path::Path) -> Self {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            listen: any,
            stun: vec![any],
            public_url: None,
            state_dir: dir.to_owned(),
            store: None,
            tls: Tls::Off,
            relay: RelayLimits::default(),
        };
        let server = Server::start(&config).await.unwrap();
        let at = server.stun()[0];
        let mut rng = rand::rng();
        let root = Secret32::random(&mut rng).signing_key();
        let (founder, guest) = (NodeKeys::generate(&mut rng), NodeKeys::generate(&mut rng));
        let (ipv4, ipv6) = founding::random_ranges(&mut rng);
        let genesis = founding::found(&founder, &root, "home", "bulk", ipv4, ipv6, wall(), &mut rng).to_vec();
        let Token::Claim(claim) = Token::decode(server.claim().unwrap()).unwrap() else { panic!("no claim") };
        let claim = Digest32(*claim.secret.expose());
        let bulk = Member::join(&server, &founder, |re| ToCoordinator::Found { re, claim, records: genesis }).await;
        let id = founding::network_id(&root);
        let terms = Terms { expires: wall() + 3_600, ..Terms::default() };
        let (secret, invite) = founding::invite_record(&founder.identity.signing_key(), id, terms, wall(), &mut rng);
        let address = member_ipv6(ipv6, &guest.identity_key());
        let host = ipv4.hosts().nth(9).unwrap();
        let member = founding::member_record(&guest, &secret, id, "quiet", host, address, wall());
        let quiet = Member::join(&server, &guest, |re| ToCoordinator::Redeem { re, invite, member }).await;
        Self { server, at, bulk, quiet }
    }
}

impl Member {
    async fn join(server: &Server, keys: &NodeKeys, request: impl FnOnce(u64) -> ToCoordinator) -> Self {
        let target = Target {
            url: server.public_url().url.clone(),
            coordinator: server.key(),
            secret: &keys.control,
            proxies: &link::proxy::DIRECT,
            timeout: Duration::from_secs(5),
        };
        let (mut sender, mut receiver) = link::connect_control(&target).await.unwrap().split();
        sender.send(&request(1)).await.unwrap();
        let (session, secret) = loop {
            match receiver.recv().await.unwrap().unwrap() {
                ToNode::Joined { .. } => sender.send(&ToCoordinator::OpenRelay { re: 2 }).await.unwrap(),
                ToNode::RelayOpened { session, secret, .. } => break (session, secret),
                ToNode::Refused { text, .. } => panic!("{text}"),
                _ => {}
            }
        };
        let socket = Arc::new(ServerSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap());
        let name = Name::of(&keys.wg_key());
        let member = Self { keys: secret.keys(), session, name, socket, counter: Arc::default() };
        member.send(server.stun()[0], Kind::Ping, Wish::DeliverHere.name(), &mut [0; HEADER + 8], HEADER + 8);
        member
    }

    /// Seals the datagrams in `bytes` and sends them as one run.
    fn send(&self, to: SocketAddr, kind: Kind, name: Name, bytes: &mut [u8], segment: usize) {
        for datagram in bytes.chunks_mut(segment) {
            let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
            self.keys.up.seal(&Header { kind, counter, session: self.session, name }, datagram);
        }
        // What does not fit into the kernel's buffer is lost; the forwarder's work is what counts.
        let mut way = self.socket.way(to, LOCALHOST);
        Sender::new(true).send(&mut way, to, &[IoSlice::new(bytes)], segment, Now(1));
    }
}

/// Sends as fast as it can for one turn, and keeps the session's delivery alive.
fn flood(member: &Member, to: SocketAddr, segment: usize, run: usize, until: impl Fn() -> bool) {
    pin(1);
    let mut bytes = vec![4; segment * run];
    member.send(to, Kind::Ping, Wish::DeliverHere.name(), &mut [0; HEADER + 8], HEADER + 8);
    while !until() {
        member.send(to, Kind::Send, member.name, &mut bytes, segment);
    }
}

/// Nanoseconds of processor time per packet.
fn measure_relay(bench: &Bench, segment: usize, run: usize) -> f64 {
    let thread = thread_named("meshd-forward");
    pin_thread(thread, 0);
    let sent = || bench.server.relay_counters().forwarded_udp.load(Ordering::Relaxed);
    let (cpu, packets, start) = (cpu_time(thread), sent(), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&bench.bulk, bench.at, segment, run, || start.elapsed() > TURN));
    });
    (cpu_time(thread) - cpu) as f64 / (sent() - packets).max(1) as f64
}

fn measure_plain(bench: &Bench, segment: usize, run: usize) -> f64 {
    let socket = ServerSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (at, sink) = (socket.bound(), bench.bulk.socket.bound());
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let forwarder: JoinHandle<(u64, u64)> = std::thread::spawn(move || {
        pin(0);
        let (mut receiver, mut buffers, mut packets) = (Receiver::default(), Buffers::new(BATCH), 0);
        let free: Vec<usize> = (0..BATCH).collect();
        let mut sender = Sender::new(true);
        while !stopping.load(Ordering::Relaxed) {
            let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(50u16));
            if socket.receive(&mut receiver, &mut buffers, &free).is_err() {
                continue;
            }
            for run in receiver.runs() {
                let parts = [IoSlice::new(&buffers.get(run.buffer)[..run.len])];
                let sent = sender.send(&mut socket.way(sink, LOCALHOST), sink, &parts, run.size, Now(1));
                if sent.failed == 0 {
                    packets += sent.sent as u64;
                }
            }
        }
        (packets, cpu_time(nix::unistd::gettid().as_raw()))
    });
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&bench.bulk, at, segment, run, || start.elapsed() > TURN));
    });
    stop.store(true, Ordering::Relaxed);
    let (packets, cpu) = forwarder.join().unwrap();
    cpu as f64 / packets.max(1) as f64
}

/// Keeps the bulk pair busy.
struct Bulk {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Bulk {
    fn start(bench: &Bench) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (member, to, stopping) = (bench.bulk.clone(), bench.at, Arc::clone(&stop));
        let thread = std::thread::spawn(move || flood(&member, to, 1_400, 44, || stopping.load(Ordering::Relaxed)));
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Median and 99th percentile.
fn round_trips(bench: &Bench) -> (Duration, Duration) {
    let member = &bench.quiet;
    let (mut receiver, mut buffers) = (Receiver::default(), Buffers::new(BATCH));
    let free: Vec<usize> = (0..BATCH).collect();
    let mut receive = |wanted: Kind| {
        loop {
            let ready = poll(&mut [PollFd::new(member.socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1_000u16));
            assert_eq!(ready, Ok(1), "nothing came back within a second");
            if member.socket.receive(&mut receiver, &mut buffers, &free).is_ok()
                && receiver.runs().iter().any(|run| buffers.get(run.buffer)[1] == wanted.byte())
            {
                return;
            }
        }
    };
    let mut trips = Vec::new();
    while trips.len() < 2_000 {
        if trips.len() % 500 == 0 {
            member.send(bench.at, Kind::Ping, Wish::DeliverHere.name(), &mut [0; HEADER + 8], HEADER + 8);
            receive(Kind::Pong);
        }
        let start = Instant::now();
        // There and back: through the relay twice.
        for _ in 0..2 {
            member.send(bench.at, Kind::Send, member.name, &mut [4; HEADER + 120], HEADER + 120);
            receive(Kind::Recv);
        }
        trips.push(start.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    trips.sort_unstable();
    (trips[trips.len() / 2], trips[trips.len() * 99 / 100])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn pin(cpu: usize) {
    pin_thread(0, cpu);
}

fn pin_thread(thread: i32, cpu: usize) {
    let mut set = CpuSet::new();
    // Fewer processors than wished for: the system places the thread.
    if set.set(cpu).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(thread), &set);
    }
}

fn thread_named(name: &str) -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut found = tasks.filter_map(|task| {
        let id: i32 = task.ok()?.file_name().to_str()?.parse().ok()?;
        let comm = std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).ok()?;
        (comm.trim() == name).then_some(id)
    });
    found.next().unwrap()
}

/// Nanoseconds a thread was on a processor.
fn cpu_time(thread: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

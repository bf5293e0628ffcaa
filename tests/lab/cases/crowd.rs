//! Fifty peers at once from behind one home router with a small session table, which somebody else uses too.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use meshd::cli::demo::net::Namespace;
use meshd::wire::local::PathKind;

use crate::nats;
use crate::packets::delay;
use crate::runner::Case;
use crate::world::{Icmp, Node, World, ensure, until};

pub fn cases() -> Vec<Case> {
    vec![Case { name: "crowd::fifty_peers_behind_a_small_router", limit: Duration::from_secs(300), run: fifty_peers }]
}

/// Sessions in the small router's table.
const TABLE: u32 = 300;
const ROUTERS: u8 = 5;
const BEHIND_EACH: u8 = 10;

/// The kernel's own limit is one for the whole machine, so a rule stands in for it: what would be one entry more than fits is
/// dropped.
fn small_table() -> String {
    format!(
        "table inet small {{
           chain forward {{
             type filter hook forward priority -10
             ct state new ct count over {TABLE} drop
           }}
         }}
        "
    )
}

/// ```text
///   me, neighbour ── [small router .21] ──┐
///   ten machines ─── [router .41] ────────┼── internet, routed ── coordinator .10/.11
///   …                 …                   │
///   ten machines ─── [router .45] ────────┘
/// ```
fn fifty_peers() -> Result<()> {
    let world = World::new()?;
    nats::routed(&world.internet)?;
    let home = nats::router(&world.internet, "home", 21, "linux")?;
    home.namespace.nft(&small_table())?;
    delay(&world.internet, "home", Duration::from_millis(10))?;
    let mut machines = vec![Node::new("me", home.lan.host("me", 2)?)];
    let neighbour = home.lan.host("neighbour", 3)?;
    for n in 1..=ROUTERS {
        let name = format!("r{n}");
        let router = nats::router(&world.internet, &name, 40 + n, "linux")?;
        delay(&world.internet, &name, Duration::from_millis(10))?;
        for m in 0..BEHIND_EACH {
            let name = format!("p{n}x{m}");
            machines.push(Node::new(&name, router.lan.host(&name, 2 + m)?));
        }
    }
    let nodes: Vec<&Node> = machines.iter().collect();
    world.join_at_once(&nodes)?;
    for node in &nodes {
        until(&format!("{} knows its NAT", node.name), Duration::from_secs(30), || {
            Ok(node.status()?.nat.filtering.is_some().then_some(()))
        })?;
    }
    let me = nodes[0];
    let peers = me.status()?.peers;
    ensure(peers.len() == usize::from(ROUTERS * BEHIND_EACH), || format!("{} peers", peers.len()))?;

    let others = Neighbour::start(&neighbour, world.coordinator.node.namespace.clone())?;
    let start = Instant::now();
    let mut pings = Vec::new();
    for peer in &peers {
        let to: IpAddr = *peer.addresses.first().context("a peer has an address")?;
        pings.push((peer.name.clone(), me.start_icmp(to, &["-q", "-i", "0.2", "-c", "60", "-W", "5"])?));
    }
    let mut most = 0;
    let all = until("all are reached directly", Duration::from_secs(20), || {
        most = most.max(entries(&home.namespace)?);
        let direct = me.status()?.peers.iter().filter(|peer| peer.path.kind == PathKind::Direct).count();
        Ok((direct == peers.len()).then(|| start.elapsed()))
    })?;
    let mut lost = 0;
    for (name, ping) in pings {
        let seen = Icmp::wait(ping, Duration::from_secs(40))?;
        most = most.max(entries(&home.namespace)?);
        lost += seen.sent - seen.received;
        // Fifty-one nodes run on this machine; a peer that a full table kept away would answer none.
        ensure(seen.sent == 60 && seen.received >= 54, || {
            format!("to {name}: {seen:?}\n{}", me.run(&["status", "--drops"]).unwrap_or_default())
        })?;
    }
    let (asked, answered) = others.stop()?;
    println!(
        "{} peers direct after {all:?}, {lost} of their 3000 pings lost; at most {most} of {TABLE} sessions in the table; \
         {answered} of a neighbour's {asked} new sessions answered",
        peers.len()
    );
    ensure(asked == NEW_SESSIONS && answered == asked, || {
        format!("a neighbour's {asked} sessions: {answered} answered")
    })?;
    ensure(me.status()?.peers.iter().all(|p| p.path.kind == PathKind::Direct), || "not all stayed direct".to_owned())
}

/// Sessions that the router keeps.
fn entries(router: &Namespace) -> Result<u32> {
    let count = router.enter(|| std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"))??;
    Ok(count.trim().parse()?)
}

/// Sessions that a neighbour opens meanwhile, as in the simulator.
const NEW_SESSIONS: u32 = 50;

/// Somebody on the same LAN, who opens a session every 100 ms to somebody who answers.
struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u32, u32)>>,
}

/// Where the answers come from.
const ECHO: &str = "203.0.113.10:7";

impl Neighbour {
    fn start(machine: &Namespace, server: Namespace) -> Result<Self> {
        let echo = server.enter(|| UdpSocket::bind(ECHO))??;
        echo.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, echo_stopped) = (Arc::clone(&stop), Arc::clone(&stop));
        std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
            let mut buffer = [0; 64];
            while !echo_stopped.load(Ordering::Relaxed) {
                if let Ok((n, from)) = echo.recv_from(&mut buffer) {
                    let _ = echo.send_to(&buffer[..n], from);
                }
            }
        })?;
        let machine = machine.clone();
        let thread = std::thread::Builder::new().name("neighbour".to_owned()).spawn(move || {
            let (mut asked, mut answered) = (0, 0);
            while asked < NEW_SESSIONS && !stopped.load(Ordering::Relaxed) {
                let socket = machine.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                asked += 1;
                // As programs do; what has no room in a full table has none a second later.
                let heard = || socket.send_to(b"hello", ECHO).and_then(|_| socket.recv(&mut [0; 64])).is_ok();
                answered += u32::from(heard() || heard());
                std::thread::park_timeout(Duration::from_millis(100));
            }
            Ok((asked, answered))
        })?;
        Ok(Self { stop, thread })
    }

    /// Sessions opened, and answered.
    fn stop(self) -> Result<(u32, u32)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a thread panicked"))?
    }
}

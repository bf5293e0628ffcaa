//! Traffic goes on when the network under it changes: for how long it is interrupted, and how soon it goes directly again.
//! Direct 20 ms one way, relayed 60 ms. Bars are those of the 95th percentile of five and more troubles.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow};
use meshd::cli::demo::net::{Namespace, Nat, Router};
use meshd::wire::local::PathKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::contact;
use crate::flow::{Flow, percentile};
use crate::nats;
use crate::net::{Topology, two_homes};
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Node, World, ensure, eventually, let_pass, until};

pub fn cases() -> Vec<Case> {
    let long = |case: Case| Case { limit: Duration::from_secs(240), ..case };
    vec![
        long(case("healing::blackhole_both_ways_under_traffic", || blackhole(true, true))),
        long(case("healing::blackhole_of_what_is_sent", || blackhole(true, false))),
        long(case("healing::blackhole_of_what_is_received", || blackhole(false, true))),
        long(case("healing::roam_to_another_nat_and_tcp_survives", roam)),
        case("healing::roam_to_a_network_with_the_same_addresses", same_addresses),
        long(case("healing::nat_reboot_under_traffic", reboot)),
        long(case("healing::router_gets_another_address", renumber)),
        long(case("healing::coordinator_gone_and_back", coordinator_gone)),
        case("healing::a_stopped_daemon_goes_on", stopped),
        case("healing::first_contact_of_easy_nats", first_contact),
    ]
}

/// Troubles of each kind.
fn rounds() -> usize {
    if std::env::var_os("MESHD_LAB_SHORT").is_some() { 2 } else { 6 }
}

/// An answer within this time came and went directly: 40 ms, with 80 ms if one way is relayed.
const DIRECT: Duration = Duration::from_millis(62);
/// Time after which no answer to a trouble is expected any more.
const LIMIT: Duration = Duration::from_secs(30);

/// When a trouble began; since when the network itself carries packets by some way, and what is silent is counted; when it was
/// wholly mended; until when it was watched.
#[derive(Debug, Clone, Copy)]
struct Trouble {
    began: Instant,
    works: Instant,
    mended: Instant,
    ended: Instant,
}

/// What came of several troubles of one kind.
struct Outcome {
    gaps: Vec<Duration>,
    direct: Vec<Duration>,
}

/// Makes trouble several times while a flow goes from `a` to `b`, and waits until the path is direct again after each.
fn trouble(nodes: &[Node], mut make: impl FnMut(usize) -> Result<[Instant; 3]>) -> Result<Outcome> {
    let flow = Flow::start(&nodes[0], &nodes[1])?;
    both_direct(nodes)?;
    let_pass(Duration::from_secs(2));
    let mut troubles = Vec::new();
    for number in 0..rounds() {
        let [began, works, mended] = make(number)?;
        // It was left, at least for a moment; then it is there again. What the flow saw counts, not this.
        let_pass(Duration::from_millis(1_500));
        both_direct(nodes)?;
        let_pass(Duration::from_millis(2_500));
        troubles.push(Trouble { began, works, mended, ended: Instant::now() });
    }
    let beats = flow.stop()?;
    let changes = [path_changes(&nodes[0])?, path_changes(&nodes[1])?];
    let mut outcome = Outcome { gaps: Vec::new(), direct: Vec::new() };
    for Trouble { began, works, mended, ended } in troubles {
        let gap = beats.longest_gap(works, ended);
        let direct = both_were_direct(&changes, began, mended, ended);
        println!(
            "network away {} ms; silent {} ms, {} lost, direct again after {} ms, then {} ms round trip",
            (works.saturating_duration_since(began)).as_millis(),
            gap.as_millis(),
            beats.lost(began, ended),
            direct.map_or(-1.0, |d| d.as_secs_f64() * 1e3).round(),
            beats.median(ended - Duration::from_secs(1), ended).as_millis(),
        );
        outcome.gaps.push(gap);
        outcome.direct.push(direct.unwrap_or(LIMIT));
    }
    for (what, times) in [("silent", &outcome.gaps), ("direct again", &outcome.direct)] {
        let at = |percent| percentile(times.clone(), percent).as_millis();
        println!("{what}: median {} ms, 95 % {} ms, worst {} ms, n = {}", at(50), at(95), at(100), times.len());
    }
    Ok(outcome)
}

/// A node's changes of path, by its log: when, and whether to a direct one.
fn path_changes(node: &Node) -> Result<Vec<(Instant, bool)>> {
    const DAY: f64 = 86_400.0;
    let (now, wall) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() % DAY);
    let log = std::fs::read_to_string(node.state_dir().join("meshd.log"))?;
    let changes = log.lines().filter(|line| line.contains(": path changed peer="));
    Ok(changes
        .filter_map(|line| {
            let time = line.split(['T', 'Z']).nth(1)?;
            let parts: Vec<f64> = time.split(':').filter_map(|part| part.parse().ok()).collect();
            let [h, m, s] = parts.as_slice() else { return None };
            let ago = (wall - (h * 3_600.0 + m * 60.0 + s)).rem_euclid(DAY);
            Some((now.checked_sub(Duration::from_secs_f64(ago))?, line.contains("path=\"direct\"")))
        })
        .collect())
}

/// How long after `mended` both nodes had their last change of path before `ended`, if that was to a direct one. None: not so.
/// Nothing changed: at once.
fn both_were_direct(
    changes: &[Vec<(Instant, bool)>; 2],
    began: Instant,
    mended: Instant,
    ended: Instant,
) -> Option<Duration> {
    let last = |of: &Vec<(Instant, bool)>| {
        let change = of.iter().rfind(|(at, _)| *at > began && *at < ended);
        match change {
            None => Some(Duration::ZERO),
            Some((at, true)) => Some(at.saturating_duration_since(mended)),
            Some((_, false)) => None,
        }
    };
    Some(last(&changes[0])?.max(last(&changes[1])?))
}

impl Outcome {
    fn within(&self, gap_ms: u64, direct_ms: u64) -> Result<()> {
        let (gap, direct) = (percentile(self.gaps.clone(), 95), percentile(self.direct.clone(), 95));
        ensure(gap <= Duration::from_millis(gap_ms), || format!("silent for {gap:?}, allowed are {gap_ms} ms"))?;
        ensure(direct <= Duration::from_millis(direct_ms), || {
            format!("direct again after {direct:?}, allowed are {direct_ms} ms")
        })
    }
}

fn both_direct(nodes: &[Node]) -> Result<()> {
    until("both are direct", LIMIT, || {
        let direct =
            nodes[0].path(&nodes[1].name)? == PathKind::Direct && nodes[1].path(&nodes[0].name)? == PathKind::Direct;
        Ok(direct.then_some(()))
    })
}

struct Home {
    lab: Topology,
    ra: Router,
}

fn home() -> Result<Home> {
    let (lab, ra, _) = two_homes(Nat::Home, Nat::Home, Duration::from_millis(20))?;
    Ok(Home { lab, ra })
}

fn blackhole(there: bool, back: bool) -> Result<()> {
    let Home { lab, ra } = home()?;
    let nodes = lab.join()?;
    let outcome = trouble(&nodes, |_| {
        let lines = [(there, "daddr"), (back, "saddr")].into_iter().filter(|(cut, _)| *cut);
        let rules: String =
            lines.map(|(_, which)| format!(" ip {which} 203.0.113.22 udp dport != 53 drop\n")).collect();
        let began = Instant::now();
        ra.namespace.nft(&format!(
            "table inet hole {{\n chain f {{\n type filter hook forward priority -10\n{rules} }}\n}}\n"
        ))?;
        let_pass(Duration::from_secs(4));
        ra.namespace.nft("delete table inet hole\n")?;
        Ok([began, began, Instant::now()])
    })?;
    // Rounds are made 1, 3, 8 … seconds after each other.
    outcome.within(1_000, 10_000)
}

/// Pulls the machine's cable and plugs it in elsewhere.
pub(super) fn move_to(machine: &Namespace, router: &Router, number: u8) -> Result<()> {
    machine.ip("link del eth0")?;
    router.lan.plug(machine, "eth0")?;
    router.lan.number(machine, "eth0", number)
}

fn roam() -> Result<()> {
    let Home { lab, ra } = home()?;
    let rc = lab.world.internet.router("rc", 23, Nat::Home)?;
    delay(&lab.world.internet, "rc", Duration::from_millis(10))?;
    let nodes = lab.join()?;
    let mut tcp = Tcp::open(&nodes[1], &nodes[0])?;
    tcp.works()?;
    let a = nodes[0].namespace.clone();
    let outcome = trouble(&nodes, |number| {
        let began = Instant::now();
        move_to(&a, if number % 2 == 0 { &rc } else { &ra }, 2)?;
        let moved = Instant::now();
        tcp.works()?;
        Ok([began, moved, moved])
    })?;
    tcp.works()?;
    outcome.within(500, 1_500)
}

/// Most home networks have the same numbers: nothing but the interface and the router are other ones.
fn same_addresses() -> Result<()> {
    let Home { lab, .. } = home()?;
    let rc = lab.world.internet.router("rc", 23, Nat::Home)?;
    for line in ["addr add 192.168.21.1/24 dev lan", "-6 addr flush dev lan"] {
        rc.namespace.ip(line)?;
    }
    delay(&lab.world.internet, "rc", Duration::from_millis(10))?;
    for (_, machine) in &lab.machines {
        machine.ip("-6 addr flush dev eth0")?;
    }
    let nodes = lab.join()?;
    let a = nodes[0].namespace.clone();
    let flow = Flow::start(&nodes[0], &nodes[1])?;
    both_direct(&nodes)?;
    let_pass(Duration::from_secs(2));
    let began = Instant::now();
    a.ip("link del eth0")?;
    rc.lan.plug(&a, "eth0")?;
    a.ip("addr add 192.168.21.2/24 dev eth0")?;
    a.ip("route add default via 192.168.21.1")?;
    let_pass(Duration::from_secs(4));
    both_direct(&nodes)?;
    let ended = Instant::now();
    let gap = flow.stop()?.longest_gap(began, ended);
    println!("silent {} ms", gap.as_millis());
    ensure(gap <= Duration::from_millis(1_000), || format!("silent for {gap:?}"))?;
    eventually("b sees a at its new router", Duration::from_secs(5), || {
        let endpoint = nodes[1].peer("a")?.path.endpoint.unwrap_or_default();
        ensure(endpoint.starts_with("203.0.113.23:"), || format!("it is at {endpoint}"))
    })
}

fn reboot() -> Result<()> {
    let Home { lab, ra } = home()?;
    let nodes = lab.join()?;
    let port = nodes[0].status()?.me.port;
    let mut seen = Vec::new();
    let outcome = trouble(&nodes, |number| {
        seen.push(nodes[1].peer("a")?.path.endpoint.unwrap_or_default());
        let began = Instant::now();
        // The interface goes down: the kernel forgets what was masqueraded there.
        ra.namespace.ip("link set wan down")?;
        ra.namespace.nft(&format!(
            "delete table ip nat\ntable ip nat {{ chain post {{ type nat hook postrouting priority 100;\n \
             oifname \"wan\" udp sport {port} masquerade to :{}\n oifname \"wan\" masquerade\n }}\n }}\n",
            45_001 + number
        ))?;
        ra.namespace.ip("link set wan up")?;
        let works = Instant::now();
        Ok([began, works, works])
    })?;
    seen.push(nodes[1].peer("a")?.path.endpoint.unwrap_or_default());
    println!("b sees a at {}", seen.join(", "));
    ensure(seen.windows(2).all(|two| two[0] != two[1]), || format!("the NAT kept its mapping: {seen:?}"))?;
    outcome.within(1_000, 3_000)
}

fn renumber() -> Result<()> {
    let Home { lab, ra } = home()?;
    let nodes = lab.join()?;
    let outcome = trouble(&nodes, |number| {
        let (old, new) = if number % 2 == 0 { (21, 121) } else { (121, 21) };
        let began = Instant::now();
        ra.namespace.ip(&format!("addr del 203.0.113.{old}/24 dev wan"))?;
        ra.namespace.ip(&format!("addr add 203.0.113.{new}/24 dev wan"))?;
        let works = Instant::now();
        Ok([began, works, works])
    })?;
    outcome.within(1_000, 3_000)
}

fn coordinator_gone() -> Result<()> {
    let Home { mut lab, ra } = home()?;
    let nodes = lab.join()?;
    let flow = Flow::start(&nodes[0], &nodes[1])?;
    both_direct(&nodes)?;
    let_pass(Duration::from_secs(1));
    let killed = Instant::now();
    lab.world.coordinator.kill()?;
    let_pass(Duration::from_secs(if rounds() > 2 { 60 } else { 15 }));
    let back = Instant::now();
    lab.world.coordinator.restart()?;
    until("both nodes are connected again", Duration::from_secs(60), || {
        let connected = |node: &Node| Ok::<_, anyhow::Error>(node.status()?.coordinator.connected);
        Ok((connected(&nodes[0])? && connected(&nodes[1])?).then_some(()))
    })?;
    println!("connected again {} ms after it was back", back.elapsed().as_millis());
    // What was learned since counts: the network heals as before.
    let_pass(Duration::from_secs(2));
    let moved = Instant::now();
    ra.namespace.ip("addr del 203.0.113.21/24 dev wan")?;
    ra.namespace.ip("addr add 203.0.113.121/24 dev wan")?;
    let_pass(Duration::from_secs(5));
    both_direct(&nodes)?;
    let ended = Instant::now();
    let beats = flow.stop()?;
    let (without, after) = (beats.lost(killed, moved), beats.longest_gap(moved, ended));
    println!("{without} lost without a coordinator; another address later: silent {} ms", after.as_millis());
    let time = moved - killed;
    let all = time.as_millis() / crate::flow::GAP.as_millis();
    ensure(without as u128 * 100 <= all, || format!("{without} of {all} datagrams were lost on the direct path"))?;
    ensure(after <= Duration::from_millis(1_500), || format!("silent for {after:?} after another address"))
}

/// SIGSTOP and SIGCONT: the process sleeps and its clock does not, as when the machine is suspended.
fn stopped() -> Result<()> {
    let Home { lab, .. } = home()?;
    let nodes = lab.join()?;
    let flow = Flow::start(&nodes[0], &nodes[1])?;
    both_direct(&nodes)?;
    let daemon = Pid::from_raw(i32::try_from(nodes[1].pid()?)?);
    kill(daemon, Signal::SIGSTOP)?;
    let_pass(Duration::from_secs(40));
    kill(daemon, Signal::SIGCONT)?;
    let awake = Instant::now();
    let_pass(Duration::from_secs(6));
    both_direct(&nodes)?;
    let_pass(Duration::from_secs(1));
    let ended = Instant::now();
    let beats = flow.stop()?;
    let first = beats.first_faster_than(Duration::from_secs(1), awake, ended).context("no answer after it woke up")?;
    let direct = beats.first_faster_than(DIRECT, awake, ended).context("not direct after it woke up")?;
    println!("awake: answered after {} ms, directly after {} ms", first.as_millis(), direct.as_millis());
    ensure(first <= Duration::from_secs(3), || format!("answered only {first:?} after it woke up"))?;
    ensure(direct <= Duration::from_secs(7), || format!("direct only {direct:?} after it woke up"))
}

/// ```text
///   a 192.168.21.2 ── [NAT ra .21] ── internet ─┬─ [NAT r1 .31] ── b1
///                                               ├─ [NAT r2 .32] ── b2      … each NAT 10 ms away, the coordinator 5 ms:
///                                               └─ coordinator             direct 20 ms one way, relayed 30 ms
/// ```
fn first_contact() -> Result<()> {
    let release = std::env::var_os("MESHD_LAB_RELEASE");
    const NAMES: [&str; 5] = ["b1", "b2", "b3", "b4", "b5"];
    const ROUTERS: [&str; 5] = ["r1", "r2", "r3", "r4", "r5"];
    let world = World::new()?;
    nats::routed(&world.internet)?;
    delay(&world.internet, "coord", Duration::from_millis(5))?;
    let site = |name: &'static str, router: &str, number: u8, kind: &str| -> Result<(&'static str, Namespace)> {
        let r = nats::router(&world.internet, router, number, kind)?;
        delay(&world.internet, router, Duration::from_millis(10))?;
        Ok((name, r.lan.host(name, 2)?))
    };
    let mut machines = vec![site("a", "ra", 21, "linux")?];
    for (number, (name, router)) in (31..).zip(NAMES.into_iter().zip(ROUTERS)) {
        machines.push(site(name, router, number, if number % 2 == 0 { "linux+open" } else { "linux" })?);
    }
    let lab = Topology { world, machines };
    let nodes = lab.machines.iter().map(|(name, machine)| Node {
        binary: release.clone().map_or_else(|| env!("CARGO_BIN_EXE_meshd").into(), Into::into),
        ..Node::new(name, machine.clone())
    });
    let nodes = lab.world.join_as(nodes.collect())?;
    // Every NAT was examined by now.
    let_pass(Duration::from_secs(4));
    let mut met = Vec::new();
    for node in &nodes[1..] {
        met.push((contact::make(&nodes[0], node, LIMIT)?, ()));
    }
    contact::judge("one port for all destinations on both sides", &met, Duration::from_millis(150), |()| true)
}

/// A TCP connection through the mesh.
struct Tcp {
    near: TcpStream,
    far: TcpStream,
}

impl Tcp {
    fn open(server: &Node, client: &Node) -> Result<Self> {
        let address = SocketAddr::new(server.address(true)?, 5005);
        let listener = server.namespace.enter(|| TcpListener::bind(address))??;
        let near = client.namespace.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)))??;
        let (far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            stream.set_nodelay(true)?;
        }
        Ok(Self { near, far })
    }

    /// A word goes there and back.
    fn works(&mut self) -> Result<()> {
        let mut word = [0; 4];
        let failed = |e| anyhow!("the TCP connection is broken: {e}");
        self.near.write_all(b"ping").map_err(failed)?;
        self.far.read_exact(&mut word).map_err(failed)?;
        self.far.write_all(&word).map_err(failed)?;
        self.near.read_exact(&mut word).map_err(failed)
    }
}

//! Pairs of NATs by the kernel: how long it takes until both sides send directly, and how many packets.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::Router;
use meshd::wire::local::{PathKind, Punching};

use crate::nats::{self, Foreign};
use crate::packets::{behind, delay};
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, World, ensure, eventually, let_pass, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("hard::endpoint_independent_to_the_same", || row("eim+apdf", "linux", 0, Bar::ms(150))),
        case("hard::address_restricted_to_symmetric", || row("eim+adf", "linux+random", 0, Bar::ms(200))),
        case("hard::routers_without_a_firewall", || row("linux+open", "linux+open", 0, Bar::ms(300))),
        case("hard::sequential_to_port_restricted", || {
            row("apdm+apdf+seq", "linux", 200, Bar { packets: Some(150), ..Bar::ms(500) })
        }),
        case("hard::sequential_to_sequential", || {
            row("apdm+apdf+seq", "apdm+apdf+seq", 200, Bar { packets: Some(300), ..Bar::ms(1_000) })
        }),
        case("hard::random_to_port_restricted", || {
            row("linux+random", "linux", 0, Bar { packets: Some(2_600), ..Bar::ms(2_000) })
        }),
        case("hard::block_to_port_restricted", || row("linux+block512", "linux", 0, Bar::ms(500))),
        case("hard::block_to_block", || {
            row("linux+block512", "linux+block512", 0, Bar { packets_a_side: Some(2_000), ..Bar::ms(2_000) })
        }),
        case("hard::random_by_address_to_random", || row("apdm+adf", "linux+random", 0, Bar::ms(2_000))),
        case("hard::few_descriptors_are_named_and_the_pair_is_relayed", few_descriptors),
        case("hard::random_to_random_is_relayed_without_a_storm", hopeless),
    ]
}

/// Pairs of one row.
const PAIRS: u8 = 5;
/// What is not direct by then is not.
const PATIENCE: Duration = Duration::from_secs(12);

/// A pair that met while the machine was further behind than this, or so many threads wanted each processor, says nothing about
/// time.
const BEHIND: Duration = Duration::from_millis(4);
const CROWDED: f64 = 2.0;

/// Threads on this machine that run or want to.
fn runnable() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let counts = text.split_whitespace().nth(3).and_then(|field| field.split('/').next()?.parse().ok());
    counts.context("/proc/loadavg is not as expected")
}

/// What is promised of a row: all pairs must be direct in the end, and of those measured on a machine that kept up all but one
/// in time.
#[derive(Clone, Copy)]
struct Bar {
    time: Duration,
    /// Of both sides together.
    packets: Option<u64>,
    packets_a_side: Option<u64>,
}

impl Bar {
    const fn ms(ms: u64) -> Self {
        Self { time: Duration::from_millis(ms), packets: None, packets_a_side: None }
    }
}

/// Two machines that have not met.
struct Pair {
    nodes: [Node; 2],
    routers: [Router; 2],
}

/// ```text
///              coordinator .10/.11
///                   │ 5 ms
///  ─────────────────┴──── internet, routed ──
///     │ 10 ms                 │ 10 ms
///  [NAT .21 … .25]        [NAT .41 … .45]
///     a1 … a5                 b1 … b5
/// ```
///
/// One way: a to b 20 ms, relayed 30 ms.
fn pairs(left: &str, right: &str, count: u8) -> Result<(World, Vec<Pair>)> {
    let world = World::new()?;
    nats::routed(&world.internet)?;
    delay(&world.internet, "coord", Duration::from_millis(5))?;
    let mut pairs = Vec::new();
    for n in 1..=count {
        let site = |side: &str, number: u8, kind: &str| -> Result<(Node, Router)> {
            let name = format!("r{side}{n}");
            let router = nats::router(&world.internet, &name, number, kind)?;
            delay(&world.internet, &name, Duration::from_millis(10))?;
            let name = format!("{side}{n}");
            Ok((Node::new(&name, router.lan.host(&name, 2)?), router))
        };
        let ((a, ra), (b, rb)) = (site("a", 20 + n, left)?, site("b", 40 + n, right)?);
        pairs.push(Pair { nodes: [a, b], routers: [ra, rb] });
    }
    Ok((world, pairs))
}

/// Brings all of them up in one network, and waits until each has looked at its NAT.
fn join(world: &World, pairs: &[Pair]) -> Result<()> {
    let nodes: Vec<&Node> = pairs.iter().flat_map(|pair| &pair.nodes).collect();
    world.join_at_once(&nodes)?;
    for node in &nodes {
        until(&format!("{} knows its NAT", node.name), Duration::from_secs(20), || {
            let nat = node.status()?.nat;
            let is_hard = nat.mapping.as_deref().is_some_and(|m| m != "endpoint-independent");
            Ok((nat.filtering.is_some() && (!is_hard || nat.port_model.is_some())).then_some(()))
        })?;
    }
    Ok(())
}

fn punching(node: &Node) -> Result<Punching> {
    Ok(node.status()?.nat.punching.unwrap_or_default())
}

/// How one pair met.
#[derive(Debug, Clone, Copy)]
struct Met {
    after: Option<Duration>,
    /// Of each side, until then.
    packets: [u64; 2],
    /// The most that a frame came late meanwhile.
    behind: Duration,
    /// Threads that wanted a processor meanwhile, on average, for each there is.
    load: f64,
}

impl Pair {
    fn packets(&self) -> Result<[u64; 2]> {
        Ok([punching(&self.nodes[0])?.probes, punching(&self.nodes[1])?.probes])
    }

    fn is_direct(&self) -> Result<bool> {
        let [a, b] = &self.nodes;
        Ok(a.path(&b.name)? == PathKind::Direct && b.path(&a.name)? == PathKind::Direct)
    }

    /// From the first packet until both send directly.
    fn meet(&self) -> Result<Met> {
        let [a, b] = &self.nodes;
        let (before, to) = (self.packets()?, b.address(true)?);
        behind();
        let start = Instant::now();
        let mut pings = Pings(a.start_icmp(to, &["-q", "-i", "0.02", "-W", "5"])?.0);
        let mut met = Met { after: None, packets: [0; 2], behind: Duration::ZERO, load: 0.0 };
        let mut load = Vec::new();
        while met.after.is_none() && start.elapsed() < PATIENCE {
            let_pass(Duration::from_millis(3));
            load.push(runnable()?);
            met.after = self.is_direct()?.then(|| start.elapsed());
        }
        pings.end();
        met.behind = behind();
        met.load =
            load.iter().sum::<f64>() / load.len().max(1) as f64 / std::thread::available_parallelism()?.get() as f64;
        let after = self.packets()?;
        met.packets = [after[0] - before[0], after[1] - before[1]];
        Ok(met)
    }

    /// What was opened and is not used is closed, and what is left carries packets both ways.
    fn settles(&self) -> Result<()> {
        for (here, there) in [(0, 1), (1, 0)] {
            let (node, peer) = (&self.nodes[here], &self.nodes[there]);
            eventually(&format!("{} has closed its sockets", node.name), Duration::from_secs(10), || {
                let punching = punching(node)?;
                ensure(punching.sockets <= 1 && punching.heavy.is_none(), || format!("{punching:?}"))
            })?;
            let to = peer.address(true)?;
            // A machine that is busy with other things may shorten a queue once.
            eventually(&format!("nothing from {} is lost", node.name), Duration::from_secs(10), || {
                let seen = node.icmp(to, &["-q", "-c", "20", "-i", "0.01", "-W", "5", "-s", "1000"])?;
                let drops = || [node, peer].map(|n| n.run(&["status", "--drops"]).unwrap_or_default()).join("\n");
                ensure(seen.received == 20, || format!("{seen:?}\n{}", drops()))
            })?;
        }
        let [a, b] = &self.nodes;
        eventually(&format!("{} and {} stay direct", a.name, b.name), Duration::from_secs(10), || {
            ensure(self.is_direct()?, || format!("{:?}", a.peer(&b.name).map(|peer| peer.path)))
        })
    }
}

/// A `ping` that ends with this.
struct Pings(Child);

impl Pings {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        self.end();
    }
}

/// Every pair of a row meets, one after the other.
fn row(left: &str, right: &str, foreign: u32, bar: Bar) -> Result<()> {
    let (world, pairs) = pairs(left, right, PAIRS)?;
    let mut others = Vec::new();
    for router in pairs.iter().flat_map(|pair| &pair.routers).filter(|_| foreign > 0) {
        others.push(Foreign::start(&router.namespace, foreign)?);
    }
    join(&world, &pairs)?;
    let mut met = Vec::new();
    for pair in &pairs {
        met.push(pair.meet()?);
    }
    report(left, right, foreign, &met);
    for pair in &pairs {
        pair.settles()?;
    }
    let good = |m: &&Met| {
        m.after.is_some_and(|after| after <= bar.time)
            && bar.packets.is_none_or(|most| m.packets.iter().sum::<u64>() <= most)
            && bar.packets_a_side.is_none_or(|most| m.packets.iter().all(|side| *side <= most))
    };
    let judged: Vec<&Met> = met.iter().filter(|m| m.behind <= BEHIND && m.load <= CROWDED).collect();
    let in_time = judged.iter().copied().filter(good).count();
    ensure(met.iter().all(|m| m.after.is_some()), || format!("not all are direct: {met:?}"))?;
    ensure(in_time + 1 >= judged.len(), || format!("only {in_time} within {:?}: {met:?}", bar.time))
}

fn report(left: &str, right: &str, foreign: u32, met: &[Met]) {
    let mut times: Vec<u128> = met.iter().filter_map(|m| m.after).map(|after| after.as_millis()).collect();
    times.sort_unstable();
    let packets: Vec<u64> = met.iter().map(|m| m.packets.iter().sum()).collect();
    let behind = met.iter().map(|m| m.behind).max().unwrap_or_default();
    let load = met.iter().map(|m| m.load).fold(0.0, f64::max);
    println!(
        "{left} × {right}, {foreign} others a second: {} of {} direct after {times:?} ms; packets of both {packets:?}; \
         the machine was at most {behind:?} behind, with {load:.1} threads a processor",
        times.len(),
        met.len(),
    );
}

/// A machine that may open few files cannot open 256 sockets: no such punch is begun, and `status` says why.
fn few_descriptors() -> Result<()> {
    let (world, mut pairs) = pairs("linux+random", "linux", 1)?;
    let a = &mut pairs[0].nodes[0];
    let wrapper = a.state_dir().with_extension("sh");
    std::fs::write(&wrapper, format!("#!/bin/sh\nulimit -n 200\nexec {} \"$@\"\n", a.binary.display()))?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
    a.binary = wrapper;
    join(&world, &pairs)?;
    let [a, b] = &pairs[0].nodes;
    let status = a.status()?;
    ensure(status.health.iter().any(|h| h.code == "sockets-few" && !h.hint.is_empty()), || {
        format!("{:?}", status.health)
    })?;
    let most = punching(a)?.sockets_max;
    ensure(most == 72, || format!("{most} sockets of 200 descriptors"))?;
    let (code, pongs) = a.ping(&b.name, &["--until-direct", "--timeout", "4s", "--interval", "200ms"])?;
    ensure(code == 1 && pongs.iter().all(|pong| pong.answered), || format!("{code}: {pongs:?}"))?;
    ensure(punching(a)?.sockets == 0, || "sockets were opened".to_owned())?;
    let reason = a.peer(&b.name)?.path.reason;
    ensure(reason.is_some(), || "no reason".to_owned())
}

/// No punch can succeed, so next to none is tried.
fn hopeless() -> Result<()> {
    let (world, pairs) = pairs("linux+random", "linux+random", PAIRS)?;
    join(&world, &pairs)?;
    let before: Vec<[u64; 2]> = pairs.iter().map(Pair::packets).collect::<Result<_>>()?;
    let mut pings = Vec::new();
    for Pair { nodes: [a, b], .. } in &pairs {
        pings.push(a.start_icmp(b.address(true)?, &["-q", "-c", "600", "-i", "0.1", "-W", "5"])?);
    }
    let mut sent = Vec::new();
    for ping in pings {
        let seen = Icmp::wait(ping, Duration::from_secs(80))?;
        ensure(seen.received + 3 >= seen.sent, || format!("the relay lost some: {seen:?}"))?;
    }
    for (pair, before) in pairs.iter().zip(&before) {
        let after = pair.packets()?;
        sent.extend([after[0] - before[0], after[1] - before[1]]);
        let path = pair.nodes[0].peer(&pair.nodes[1].name)?.path;
        ensure(path.kind == PathKind::Relay && path.reason.is_some(), || format!("{path:?}"))?;
    }
    println!("probes of each node in a minute: {sent:?}");
    ensure(sent.iter().all(|probes| *probes <= 50), || format!("a storm: {sent:?}"))
}

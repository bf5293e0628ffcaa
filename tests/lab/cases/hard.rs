//! Pairs of NATs by the kernel: how long it takes until both sides send directly, and how many packets.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::Result;
use meshd::cli::demo::net::Router;
use meshd::wire::local::{PathKind, Punching};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::contact::{self, Contact};
use crate::nats::{self, Foreign};
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, World, ensure, eventually, let_pass, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("hard::endpoint_independent_to_the_same", || row("eim+apdf", "linux", 0, Bar::ms(150))),
        case("hard::address_restricted_to_symmetric", || row("eim+adf", "linux+random", 0, Bar::ms(200))),
        case("hard::full_cone_to_symmetric", || row("eim+eif", "linux+random", 0, Bar::ms(100))),
        case("hard::symmetric_to_full_cone", || row("linux+random", "eim+eif", 0, Bar::ms(100))),
        case("hard::routers_without_a_firewall", || row("linux+open", "linux+open", 0, Bar::ms(300))),
        case("hard::routers_without_a_firewall_and_one_side_300_ms_late", || {
            row("linux+open", "linux+open", 0, Bar { late: Some(Duration::from_millis(300)), ..Bar::ms(300) })
        }),
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

/// What is promised of a row: all pairs must be direct in the end, and of those measured on a machine that kept up all but one
/// in time.
#[derive(Clone, Copy)]
struct Bar {
    time: Duration,
    /// Of both sides together.
    packets: Option<u64>,
    packets_a_side: Option<u64>,
    /// The called node stands still for so long from the first packet on; the time counts from there.
    late: Option<Duration>,
}

impl Bar {
    const fn ms(ms: u64) -> Self {
        Self { time: Duration::from_millis(ms), packets: None, packets_a_side: None, late: None }
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

impl Pair {
    fn packets(&self) -> Result<[u64; 2]> {
        Ok([punching(&self.nodes[0])?.probes, punching(&self.nodes[1])?.probes])
    }

    fn is_direct(&self) -> Result<bool> {
        let [a, b] = &self.nodes;
        Ok(a.path(&b.name)? == PathKind::Direct && b.path(&a.name)? == PathKind::Direct)
    }

    /// How the two met, and the packets of each until then.
    fn meet(&self, late: Option<Duration>) -> Result<(Contact, [u64; 2])> {
        let [a, b] = &self.nodes;
        let before = self.packets()?;
        let pid = Pid::from_raw(i32::try_from(b.pid()?)?);
        let met = contact::make_while(a, b, PATIENCE, || {
            if let Some(late) = late {
                kill(pid, Signal::SIGSTOP)?;
                let_pass(late);
                kill(pid, Signal::SIGCONT)?;
            }
            Ok(())
        })?;
        let after = self.packets()?;
        Ok((met, [after[0] - before[0], after[1] - before[1]]))
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

/// Every pair of a row meets, one after the other.
fn row(left: &str, right: &str, foreign: u32, bar: Bar) -> Result<()> {
    let (world, pairs) = pairs(left, right, PAIRS)?;
    let mut others = Vec::new();
    for router in pairs.iter().flat_map(|pair| &pair.routers).filter(|_| foreign > 0) {
        others.push(Foreign::start(&router.namespace, foreign)?);
    }
    join(&world, &pairs)?;
    let met: Vec<(Contact, [u64; 2])> = pairs.iter().map(|pair| pair.meet(bar.late)).collect::<Result<_>>()?;
    for pair in &pairs {
        pair.settles()?;
    }
    let polite = |packets: &[u64; 2]| {
        bar.packets.is_none_or(|most| packets.iter().sum::<u64>() <= most)
            && bar.packets_a_side.is_none_or(|most| packets.iter().all(|side| *side <= most))
    };
    let packets: Vec<u64> = met.iter().map(|(_, packets)| packets.iter().sum()).collect();
    let what = format!("{left} × {right}, {foreign} others a second, packets of both {packets:?}");
    contact::judge(&what, &met, bar.time + bar.late.unwrap_or_default(), polite)
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

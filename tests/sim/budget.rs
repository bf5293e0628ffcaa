//! What being idle may cost, counted: no datagram, no relay frame, no control message and hardly a timer. What the shells do
//! to keep their two connections to the coordinator alive is not in it.

use std::time::Duration;

use crate::dice::Dice;
use crate::scenario::Scenario;
use crate::sim::{NodeRef, Sim};
use crate::town::STUN_PORTS;
use crate::world::World;

named_runs! {
    1, 3,
    never_talked => never_talked,
    stopped_talking => stopped_talking,
    talking => talking,
}

/// Timer calls of a node's planner in one idle hour. Idle means idle: nothing needs a look.
const IDLE_WAKES_PER_HOUR: u64 = 60;
/// Timer calls of a node's planner in one second of talking to one peer: it looks at the path ten times.
const TALKING_WAKES_PER_SECOND: u64 = 40;
const HOURS: u64 = 5;

/// A network of `count` nodes behind NATs of all kinds, connected and quiet.
fn network(name: &str, seed: u64, count: u8) -> (Sim, Vec<NodeRef>) {
    let scenario = Scenario { seed, ..Scenario::default() };
    let mut world = World::new(Dice::new(seed).fork("world"), crate::aloud());
    let mut places = scenario.build(&mut world);
    let kinds = crate::nat::Kind::all();
    let hosts: Vec<_> = (0..count)
        .map(|i| {
            let name = format!("n{i}");
            let site = places.town.site(&mut world, &name, &[kinds[usize::from(i) % kinds.len()]], None);
            site.host(&mut world, &name, 1)
        })
        .collect();
    let replay = format!("budget={name} seed={seed}");
    let mut sim = Sim::new(&replay, seed, world, places.server, Duration::from_millis(30));
    let nodes: Vec<NodeRef> = hosts.iter().enumerate().map(|(i, host)| sim.add_node(&format!("n{i}"), *host)).collect();
    sim.start_server();
    for node in &nodes {
        sim.start(*node);
    }
    assert!(sim.run_until(Duration::from_secs(5), |s| nodes.iter().all(|n| s.is_synced(*n))));
    sim.run_for(Duration::from_secs(5));
    (sim, nodes)
}

/// What a node has done so far.
#[derive(Debug, Clone, Copy)]
struct Cost {
    to_peers: u64,
    stun: u64,
    relay: u64,
    control: u64,
    wakes: u64,
}

fn cost(sim: &Sim, node: NodeRef) -> Cost {
    let n = sim.node(node);
    let udp =
        |stun: bool| n.sent_to.iter().filter(|(to, _)| STUN_PORTS.contains(&to.port()) == stun).map(|(_, n)| n).sum();
    Cost {
        to_peers: udp(false),
        stun: udp(true),
        relay: n.relay_sent,
        control: n.control_sent,
        wakes: sim.machines(node).timeouts.values().sum(),
    }
}

fn assert_idle(sim: &mut Sim, nodes: &[NodeRef]) {
    let before: Vec<Cost> = nodes.iter().map(|n| cost(sim, *n)).collect();
    sim.run_for(Duration::from_secs(HOURS * 3_600));
    for (node, before) in nodes.iter().zip(before) {
        let after = cost(sim, *node);
        assert_eq!(after.to_peers, before.to_peers, "datagrams to peers not in use");
        assert_eq!(after.relay, before.relay, "relay frames to peers not in use");
        assert_eq!(after.stun, before.stun, "STUN requests although nobody is talked to");
        assert_eq!(after.control, before.control, "control messages although nothing happens");
        let wakes = after.wakes - before.wakes;
        assert!(wakes <= IDLE_WAKES_PER_HOUR * HOURS, "{wakes} wake-ups: {:?}", sim.machines(*node).timeouts);
    }
}

/// Eight nodes that never talk, for five hours.
fn never_talked(seed: u64) {
    let (mut sim, nodes) = network("never_talked", seed, 8);
    assert_idle(&mut sim, &nodes);
    sim.finish();
}

/// Four nodes that all talked to each other, and stopped: sessions, paths and searches come to rest, and no two of them keep
/// each other awake.
fn stopped_talking(seed: u64) {
    let (mut sim, nodes) = network("stopped_talking", seed, 4);
    for (i, a) in nodes.iter().enumerate() {
        for b in &nodes[i + 1..] {
            sim.ping(*a, *b, 100, Duration::from_millis(100));
        }
    }
    sim.run_for(Duration::from_secs(15));
    // A peer counts as in use for three minutes after its last packet, a session lives for three.
    sim.run_for(Duration::from_secs(600));
    assert_idle(&mut sim, &nodes);
    // And they are there when they are wanted.
    let series = sim.ping(nodes[0], nodes[3], 3, Duration::from_millis(100));
    sim.run_for(Duration::from_secs(1));
    assert_eq!(sim.unanswered(series), 0);
    sim.finish();
}

/// Two nodes that talk: the planner looks at their path, and does not spin.
fn talking(seed: u64) {
    let (mut sim, nodes) = network("talking", seed, 2);
    let (a, b) = (nodes[0], nodes[1]);
    sim.ping(a, b, 6_000, Duration::from_millis(10));
    sim.run_for(Duration::from_secs(5));
    let before = [cost(&sim, a), cost(&sim, b)];
    sim.run_for(Duration::from_secs(50));
    for (node, before) in [a, b].into_iter().zip(before) {
        let wakes = cost(&sim, node).wakes - before.wakes;
        assert!(wakes <= TALKING_WAKES_PER_SECOND * 50, "{wakes} wake-ups: {:?}", sim.machines(node).timeouts);
    }
    sim.finish();
}

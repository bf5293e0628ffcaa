//! The coordinator is gone for good, every node restarts, and one of them is in another network by then. They come up from
//! disk, find each other at their last addresses and through each other, and all of them answer within ten seconds, although
//! all but one are behind NATs that let nobody in. What is signed goes round as well: who was away learns it from peers.

use std::time::Duration;

use meshd::engine::io::Command;
use meshd::trust::founding::revoke_record;
use meshd::trust::record::RevokeTarget;

use crate::dice::Dice;
use crate::scenario::Scenario;
use crate::sim::{NodeRef, Sim, WALL};
use crate::town::Town;
use crate::world::World;

/// So many nodes behind NATs of these kinds, the first of them the admin, all connected; and where more can be put.
pub(super) fn town_of(story: &str, seed: u64, kinds: &[&str], relay_ms: u64) -> (Sim, Town, Vec<NodeRef>) {
    let scenario = Scenario { seed, relay_ms, ..Scenario::default() };
    let mut world = World::new(Dice::new(seed).fork("world"), crate::aloud());
    let mut places = scenario.build(&mut world);
    let hosts: Vec<_> = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| {
            let name = format!("n{i}");
            let site = places.town.site(&mut world, &name, &[kind.parse().unwrap()], None);
            site.host(&mut world, &name, 1)
        })
        .collect();
    let replay = format!("story={story} seed={seed}");
    let mut sim = Sim::new(&replay, seed, world, places.server, Duration::from_millis(relay_ms));
    let nodes: Vec<NodeRef> = hosts.iter().enumerate().map(|(i, host)| sim.add_node(&format!("n{i}"), *host)).collect();
    sim.start_server();
    for node in &nodes {
        sim.start(*node);
    }
    assert!(sim.run_until(Duration::from_secs(5), |s| nodes.iter().all(|n| s.is_synced(*n))));
    sim.run_for(Duration::from_secs(2));
    (sim, places.town, nodes)
}

pub(super) fn pairs(nodes: &[NodeRef]) -> Vec<(NodeRef, NodeRef)> {
    nodes.iter().enumerate().flat_map(|(i, a)| nodes[i + 1..].iter().map(|b| (*a, *b))).collect()
}

pub(super) fn all_direct(sim: &mut Sim, nodes: &[NodeRef]) {
    for (a, b) in pairs(nodes) {
        sim.ping(a, b, 10, Duration::from_millis(100));
    }
    let direct = |s: &Sim| pairs(nodes).iter().all(|(a, b)| s.is_surely_direct(*a, *b) && s.is_surely_direct(*b, *a));
    assert!(sim.run_until(Duration::from_secs(10), direct), "every pair is direct");
}

pub(crate) fn run(seed: u64) {
    let (mut sim, mut town, nodes) =
        town_of("through_each_other", seed, &["public", "linux", "eim+apdf", "linux", "linux"], 30);
    all_direct(&mut sim, &nodes);
    let away = nodes[4];
    // The last one is off when an admin removes a node: it hears of that from peers only.
    sim.kill(away, true);
    let identity = sim.keys(nodes[2]).identity_key();
    let signer = sim.keys(nodes[0]).identity.signing_key();
    let records = vec![revoke_record(&signer, sim.network(), RevokeTarget::Identity(identity), WALL)];
    sim.command(nodes[0], Command::Publish { token: 1, records });
    sim.run_for(Duration::from_secs(1));
    let removed = nodes[2];
    let nodes: Vec<NodeRef> = nodes.into_iter().filter(|n| *n != removed).collect();
    assert_eq!(sim.status(nodes[1]).peers.len(), 3, "one is out");

    // More than a NAT remembers.
    sim.kill_server();
    for node in nodes.iter().filter(|n| **n != away) {
        sim.kill(*node, true);
    }
    let elsewhere = town.site(&mut sim.world, "elsewhere", &["eim+apdf".parse().unwrap()], None);
    let host = sim.node(away).host;
    elsewhere.welcome(&mut sim.world, host, 5);
    sim.run_for(Duration::from_secs(600));
    for node in &nodes {
        sim.start(*node);
    }
    let series: Vec<_> =
        pairs(&nodes).into_iter().map(|(a, b)| sim.ping(a, b, 200, Duration::from_millis(100))).collect();
    let answered = sim.run_until(Duration::from_secs(10), |s| {
        series.iter().all(|series| s.pings(*series).any(|p| p.answered.is_some()))
    });
    let paths: Vec<_> = pairs(&nodes).iter().map(|(a, b)| (*a, *b, sim.peer_status(*a, *b).path)).collect();
    assert!(answered, "{paths:#?}");
    sim.run_for(Duration::from_secs(8));
    for (a, b) in pairs(&nodes) {
        assert!(sim.is_direct(a, b) && sim.is_direct(b, a), "{a:?} {b:?}");
    }
    assert_eq!(sim.status(away).peers.len(), 3, "who was away knows of the removal");
    assert!(sim.machines(away).persisted.len() == 1, "and keeps it");
    assert!(!sim.health(away).contains(&"udp-blocked".to_owned()), "the silence of STUN servers says nothing now");
    sim.finish();
}

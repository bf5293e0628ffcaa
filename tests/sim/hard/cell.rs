//! One pair of NATs, many times: how often a direct path was found, how fast, and with how many packets.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use meshd::engine::io::{Input, PortMapping};
use meshd::engine::planner::Limits;

use crate::dice::Dice;
use crate::scenario::{Places, Scenario};
use crate::sim::{NodeRef, Sim};
use crate::town::Site;
use crate::world::World;

/// How one run ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// From the first packet until both sides' packets went directly.
    pub(crate) both: Option<Duration>,
    /// Probes and STUN requests of the busier side until then.
    pub(crate) packets: u64,
    /// Of both sides.
    pub(crate) packets_both: u64,
}

/// Many runs.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) runs: Vec<Run>,
}

/// Two nodes whose shells can do everything, synced, with their NATs examined.
pub(crate) fn stage(scenario: &Scenario) -> (Sim, Places, NodeRef, NodeRef) {
    stage_with(scenario, |_| ())
}

/// The same with something changed before the nodes start.
pub(crate) fn stage_with(scenario: &Scenario, change: impl FnOnce(&mut Sim)) -> (Sim, Places, NodeRef, NodeRef) {
    let mut world = World::new(Dice::new(scenario.seed).fork("world"), crate::aloud());
    let places = scenario.build(&mut world);
    let relay = Duration::from_millis(scenario.relay_ms);
    let mut sim = Sim::new(&format!("hard {scenario}"), scenario.seed, world, places.server, relay);
    sim.limits = Limits { extra_sockets: 512, tcp: true, prime_ttl: Some(2), ..Limits::default() };
    sim.checks = true;
    change(&mut sim);
    let a = sim.add_node("a", places.a);
    let b = sim.add_node("b", places.b);
    sim.start_server();
    sim.start(a);
    sim.run_for(Duration::from_millis(scenario.skew_ms));
    sim.start(b);
    assert!(sim.run_until(Duration::from_secs(20), |s| s.is_synced(a) && s.is_synced(b)));
    sim.run_for(Duration::from_secs(5));
    (sim, places, a, b)
}

/// The router in front of a node grants it its own port.
pub(crate) fn grant(sim: &mut Sim, node: NodeRef, site: &Site) -> SocketAddr {
    let inside = SocketAddr::new(sim.world.addresses(sim.node(node).host)[0], sim.port(node));
    let external = sim.world.nat_mut(site.gates[0]).unwrap().forward(inside);
    sim.input(node, Input::PortMapped(Some(PortMapping { external, protocol: "pcp".into() })));
    external
}

/// Whose router maps its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapped {
    Nobody,
    A,
    B,
}

/// Runs a scenario until both sides send directly, at most for `patience`.
pub(crate) fn run(scenario: &Scenario, mapped: Mapped, patience: Duration) -> Run {
    let (mut sim, places, a, b) = stage(scenario);
    match mapped {
        Mapped::Nobody => {}
        Mapped::A => drop(grant(&mut sim, a, &places.site_a)),
        Mapped::B => drop(grant(&mut sim, b, &places.site_b)),
    }
    if mapped != Mapped::Nobody {
        sim.run_for(Duration::from_secs(1));
    }
    let start = sim.now();
    let before = [sim.node(a).probes, sim.node(b).probes];
    sim.ping(a, b, u16::try_from(patience.as_millis() / 50).unwrap(), Duration::from_millis(50));
    sim.run_until(patience, |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
    let firsts = [sim.first_direct(a, b), sim.first_direct(b, a)].map(|at| at.map(|at| at.since(start)));
    let spent = [sim.node(a).probes - before[0], sim.node(b).probes - before[1]];
    for node in [a, b] {
        let open = sim.node(node).extra.len();
        assert!(open <= 1 || firsts.contains(&None), "{open} sockets are left open");
    }
    let run = Run {
        both: firsts[0].zip(firsts[1]).map(|(x, y)| x.max(y)),
        packets: spent[0].max(spent[1]),
        packets_both: spent[0] + spent[1],
    };
    sim.finish();
    run
}

impl Cell {
    /// The same pair with `n` seeds; who speaks first alternates. `mapped`: the router of the first of the pair maps its port.
    pub(crate) fn measure(scenario: &Scenario, mapped: bool, n: u64, patience: Duration) -> Self {
        let runs = (0..n).map(|i| {
            let mut s = Scenario { seed: scenario.seed + i, ..scenario.clone() };
            let swap = i % 2 == 1;
            if swap {
                std::mem::swap(&mut s.a, &mut s.b);
            }
            let mapped = match (mapped, swap) {
                (false, _) => Mapped::Nobody,
                (true, false) => Mapped::A,
                (true, true) => Mapped::B,
            };
            run(&s, mapped, patience)
        });
        Self { runs: runs.collect() }
    }

    /// Percent of runs in which both sides sent directly within this time.
    pub(crate) fn within(&self, time: Duration) -> f64 {
        let good = self.runs.iter().filter(|r| r.both.is_some_and(|t| t <= time)).count();
        100.0 * good as f64 / self.runs.len() as f64
    }

    /// The time that this share of the successful runs needed at most.
    pub(crate) fn percentile(&self, percent: usize) -> Option<Duration> {
        let mut times: Vec<Duration> = self.runs.iter().filter_map(|r| r.both).collect();
        times.sort();
        times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied()
    }

    /// The most packets any side sent, and the mean of both together.
    pub(crate) fn packets(&self) -> (u64, u64, u64) {
        let most = self.runs.iter().map(|r| r.packets).max().unwrap_or(0);
        let most_both = self.runs.iter().map(|r| r.packets_both).max().unwrap_or(0);
        (most, most_both, self.runs.iter().map(|r| r.packets_both).sum::<u64>() / self.runs.len() as u64)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |t: Option<Duration>| t.map_or("–".to_owned(), |t| format!("{}", t.as_millis()));
        let direct = self.runs.iter().filter(|r| r.both.is_some()).count();
        let (most, most_both, mean) = self.packets();
        write!(
            f,
            "{direct}/{} direct, median {} ms, 95 % {} ms, worst {} ms; packets: mean {mean}, most {most_both}, of one side {most}",
            self.runs.len(),
            ms(self.percentile(50)),
            ms(self.percentile(95)),
            ms(self.percentile(100)),
        )
    }
}

//! How long traffic is interrupted when the network under a direct path changes, and how soon it goes directly again: many
//! times, for the published figures and the bars that were promised.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use crate::scenario::{Places, Scenario};
use crate::sim::{NodeRef, Series, Sim};
use crate::world::Owner;

/// Runs of each row.
pub(crate) const RUNS: u64 = 50;
/// Between two pings.
const GAP: Duration = Duration::from_millis(10);
/// How long the series of pings goes on.
const TIME: Duration = Duration::from_secs(20);

/// What happens to the network.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Trouble {
    /// Nothing passes between the two sites, in these directions, until it is mended after eight seconds.
    Blackhole { there: bool, back: bool },
    /// One of the machines is in another network from one moment to the next.
    Roam(&'static str),
    /// The first one's NAT forgets everything and starts with other ports.
    Reboot,
    /// The first one's NAT has another address.
    Renumber,
}

/// A promise: a trouble, between which NATs, and what may come of it at the 95th percentile.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) pair: (&'static str, &'static str),
    trouble: Trouble,
    /// Longest interruption, in milliseconds.
    pub(crate) gap_ms: u64,
    /// Until both send directly again, from the trouble, or from when it was mended.
    pub(crate) direct_ms: u64,
}

const fn row(
    name: &'static str,
    pair: (&'static str, &'static str),
    trouble: Trouble,
    gap_ms: u64,
    direct_ms: u64,
) -> Row {
    Row { name, pair, trouble, gap_ms, direct_ms }
}

/// What is promised.
pub(crate) const ROWS: [Row; 8] = [
    row("blackhole, both ways", ("linux", "eim+apdf"), Trouble::Blackhole { there: true, back: true }, 1_000, 30_000),
    row("blackhole, only there", ("linux", "eim+apdf"), Trouble::Blackhole { there: true, back: false }, 1_000, 30_000),
    row("blackhole, only back", ("linux", "eim+apdf"), Trouble::Blackhole { there: false, back: true }, 1_000, 30_000),
    row("roam to another NAT", ("linux", "linux"), Trouble::Roam("eim+apdf"), 500, 1_500),
    row("roam to a network without a NAT", ("eim+apdf", "linux"), Trouble::Roam("public"), 500, 1_500),
    row("NAT reboot", ("eim+apdf", "linux"), Trouble::Reboot, 1_000, 3_000),
    row("NAT reboot, peer filters by address", ("eim+apdf", "eim+adf"), Trouble::Reboot, 1_000, 3_000),
    row("NAT renumbered", ("linux", "eim+apdf"), Trouble::Renumber, 1_000, 3_000),
];

/// One run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// The longest time between two pings that were answered, by when they were sent.
    pub(crate) gap: Duration,
    /// Until both sent directly again; `None`: not in time.
    pub(crate) direct: Option<Duration>,
    /// Pings without an answer.
    pub(crate) lost: usize,
}

/// All runs of a row.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) runs: Vec<Run>,
}

impl Outcome {
    pub(crate) fn gap(&self, percent: usize) -> Duration {
        percentile(self.runs.iter().map(|r| r.gap).collect(), percent)
    }

    /// A run that never came back counts as the whole time.
    pub(crate) fn direct(&self, percent: usize) -> Duration {
        percentile(self.runs.iter().map(|r| r.direct.unwrap_or(TIME)).collect(), percent)
    }

    pub(crate) fn lost(&self) -> usize {
        self.runs.iter().map(|r| r.lost).sum::<usize>() / self.runs.len()
    }

    pub(crate) fn holds(&self, row: &Row) -> bool {
        self.gap(95) <= Duration::from_millis(row.gap_ms) && self.direct(95) <= Duration::from_millis(row.direct_ms)
    }
}

fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort();
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// Every row with what was measured; measured once.
pub(crate) fn measured() -> &'static [(Row, Outcome)] {
    static MEASURED: OnceLock<Vec<(Row, Outcome)>> = OnceLock::new();
    MEASURED.get_or_init(|| {
        ROWS.into_iter()
            .map(|row| {
                let runs = (1..=RUNS).map(|seed| run(&row, seed)).collect();
                (row, Outcome { runs })
            })
            .collect()
    })
}

/// One run. Who speaks alternates, and so does who moves.
pub(crate) fn run(row: &Row, seed: u64) -> Run {
    let kind = |name: &str| name.parse().unwrap();
    let scenario = Scenario { seed, ..Scenario::pair(kind(row.pair.0), kind(row.pair.1)) };
    let (mut sim, mut places, a, b) = Sim::pair(&scenario, &format!("healing {scenario}"));
    assert!(sim.run_until(Duration::from_secs(5), |s| s.is_synced(a) && s.is_synced(b)), "both nodes connect");
    sim.run_for(Duration::from_secs(2));
    sim.ping(a, b, 10, Duration::from_millis(100));
    assert!(sim.run_until(Duration::from_secs(10), |s| both_direct(s, a, b)), "the path is direct");
    let (speaker, listener) = if seed.is_multiple_of(2) { (a, b) } else { (b, a) };
    let series = sim.ping(speaker, listener, u16::try_from(TIME.as_micros() / GAP.as_micros()).unwrap(), GAP);
    // Not always at the same moment of everybody's timers.
    sim.run_for(Duration::from_millis(3_000 + seed * 37 % 1_000));
    let since = match row.trouble {
        Trouble::Blackhole { there, back } => {
            let gates = (Owner::Box(places.site_a.gates[0]), Owner::Box(places.site_b.gates[0]));
            sim.world.cut(gates.0, gates.1, there);
            sim.world.cut(gates.1, gates.0, back);
            sim.run_for(Duration::from_secs(8));
            assert!(!both_direct(&sim, a, b), "the path was left");
            sim.world.cut(gates.0, gates.1, false);
            sim.world.cut(gates.1, gates.0, false);
            sim.now()
        }
        trouble => {
            happens(trouble, &mut sim, &mut places, (a, b), seed);
            let since = sim.now();
            // A path may be moved without ever being left.
            if !sim.run_until(Duration::from_secs(2), |s| !both_direct(s, a, b)) {
                let gap = longest_gap(&sim, series);
                let found = Run { gap, direct: Some(gap), lost: lost(&sim, series) };
                sim.finish();
                return found;
            }
            since
        }
    };
    let direct = sim.run_until(Duration::from_secs(30), |s| both_direct(s, a, b)).then(|| sim.now().since(since));
    // It stays so.
    sim.run_for(Duration::from_secs(3));
    let found = Run { gap: longest_gap(&sim, series), direct, lost: lost(&sim, series) };
    sim.finish();
    found
}

fn happens(trouble: Trouble, sim: &mut Sim, places: &mut Places, (a, b): (NodeRef, NodeRef), seed: u64) {
    match trouble {
        Trouble::Roam(to) => {
            let elsewhere = places.town.site(&mut sim.world, "elsewhere", &[to.parse().unwrap()], None);
            let (mover, host) = if seed % 4 < 2 { (a, places.a) } else { (b, places.b) };
            elsewhere.welcome(&mut sim.world, host, 5);
            sim.moved(mover);
        }
        Trouble::Reboot => {
            if let Some(nat) = sim.world.nat_mut(places.site_a.gates[0]) {
                nat.reboot();
            }
        }
        Trouble::Renumber => sim.world.renumber(places.site_a.gates[0], IpAddr::from([203, 0, 113, 77])),
        Trouble::Blackhole { .. } => {}
    }
}

fn both_direct(sim: &Sim, a: NodeRef, b: NodeRef) -> bool {
    sim.sends_directly(a, b) && sim.sends_directly(b, a)
}

fn longest_gap(sim: &Sim, series: Series) -> Duration {
    let mut last = None;
    let mut longest = Duration::ZERO;
    for ping in sim.pings(series).filter(|p| p.answered.is_some()) {
        longest = longest.max(last.map_or(Duration::ZERO, |before| ping.sent.since(before)));
        last = Some(ping.sent);
    }
    longest
}

fn lost(sim: &Sim, series: Series) -> usize {
    let due = |p: &&crate::sim::Ping| sim.now().since(p.sent) > Duration::from_secs(1) && p.sent < sim.now();
    sim.pings(series).filter(due).filter(|p| p.answered.is_none()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_of_healing_holds() {
        if crate::replay().is_some() {
            return;
        }
        let mut broken = Vec::new();
        for (row, outcome) in measured() {
            let line = format!(
                "{}: gap {:?}/{:?}/{:?}, direct {:?}/{:?}/{:?}, {} lost",
                row.name,
                outcome.gap(50),
                outcome.gap(95),
                outcome.gap(100),
                outcome.direct(50),
                outcome.direct(95),
                outcome.direct(100),
                outcome.lost()
            );
            if !outcome.holds(row) {
                broken.push(line);
            }
        }
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}

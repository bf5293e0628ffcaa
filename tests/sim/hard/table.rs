//! What is promised of pairs of NATs, row by row.

use std::sync::OnceLock;
use std::time::Duration;

use crate::hard::cell::Cell;
use crate::nat::Kind;
use crate::scenario::Scenario;

/// Runs of each row.
pub(crate) const RUNS: u64 = 50;

/// A promise.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) pairs: &'static [(&'static str, &'static str)],
    /// So many percent of the runs of each pair …
    pub(crate) percent: f64,
    /// … are direct both ways after so many milliseconds …
    pub(crate) within_ms: u64,
    /// … with so many probes and STUN requests of both sides together, if that matters …
    pub(crate) packets: Option<u64>,
    /// … or of each side.
    pub(crate) packets_a_side: Option<u64>,
    /// The router of the first of each pair maps its port.
    pub(crate) mapped: bool,
}

const fn row(name: &'static str, pairs: &'static [(&'static str, &'static str)], percent: f64, within_ms: u64) -> Row {
    Row { name, pairs, percent, within_ms, packets: None, packets_a_side: None, mapped: false }
}

impl Row {
    pub(crate) fn holds(&self, cell: &Cell) -> bool {
        let (a_side, both, _) = cell.packets();
        cell.within(Duration::from_millis(self.within_ms)) >= self.percent
            && self.packets.is_none_or(|most| both <= most)
            && self.packets_a_side.is_none_or(|most| a_side <= most)
    }
}

/// From easy to hard.
pub(crate) const ROWS: [Row; 12] = [
    row(
        "endpoint-independent on both sides",
        &[
            ("eim+apdf", "eim+apdf"),
            ("eim+adf", "eim+apdf"),
            ("linux", "linux"),
            ("linux", "eim+apdf"),
            ("eim+adf", "eim+adf"),
        ],
        100.0,
        150,
    ),
    row(
        "public or full cone, and anything",
        &[
            ("public", "eim+apdf"),
            ("public", "linux+open"),
            ("public", "apdm+apdf"),
            ("public", "apdm+apdf+seq+foreign200"),
            ("public", "linux+block512"),
            ("eim+eif", "eim+apdf"),
            ("eim+eif", "adm+apdf"),
            ("eim+eif", "apdm+apdf"),
        ],
        100.0,
        100,
    ),
    Row {
        mapped: true,
        ..row(
            "a mapped port, and anything",
            &[
                ("eim+apdf+keep", "eim+apdf"),
                ("eim+apdf+keep", "linux+open"),
                ("eim+apdf+keep", "apdm+apdf"),
                ("eim+apdf+keep", "apdm+apdf+seq+foreign200"),
                ("eim+apdf+keep", "linux+block512"),
                ("linux", "linux+random"),
            ],
            100.0,
            100,
        )
    },
    row(
        "address-restricted and symmetric",
        &[("eim+adf", "apdm+apdf"), ("eim+adf", "adm+apdf"), ("eim+adf", "apdm+apdf+seq"), ("eim+adf", "linux+random")],
        100.0,
        200,
    ),
    row("Linux routers with an open INPUT chain", &[("linux+open", "linux+open")], 100.0, 150),
    Row {
        packets: Some(150),
        ..row(
            "counting, 200 others a second, and port-restricted",
            &[("apdm+apdf+seq+foreign200", "eim+apdf"), ("apdm+apdf+seq+foreign200", "linux")],
            99.0,
            500,
        )
    },
    Row {
        packets: Some(300),
        ..row(
            "counting on both sides, 200 others a second each",
            &[("apdm+apdf+seq+foreign200", "apdm+apdf+seq+foreign200")],
            97.0,
            1000,
        )
    },
    Row {
        packets: Some(2600),
        ..row("random and port-restricted", &[("apdm+apdf", "eim+apdf"), ("linux+random", "linux")], 98.0, 2000)
    },
    row("block of 512 and port-restricted", &[("linux+block512", "eim+apdf"), ("linux+block512", "linux")], 99.9, 500),
    Row {
        packets_a_side: Some(2000),
        ..row("blocks of 512 on both sides", &[("linux+block512", "linux+block512")], 95.0, 2000)
    },
    row(
        "random that filters by address, and random",
        &[("apdm+adf", "apdm+apdf"), ("apdm+adf", "linux+random")],
        97.0,
        2000,
    ),
    row(
        "no UDP on one side, TCP free",
        &[
            ("blocked", "public"),
            ("blocked", "linux"),
            ("blocked", "eim+eif"),
            ("blocked", "eim+adf"),
            ("blocked", "eim+apdf"),
            ("blocked", "blocked"),
        ],
        99.0,
        1000,
    ),
];

/// The runs of one pair.
pub(crate) fn measure((a, b): (&str, &str), mapped: bool, n: u64) -> Cell {
    let kind = |name: &str| name.parse::<Kind>().unwrap();
    Cell::measure(&Scenario { seed: 1, ..Scenario::pair(kind(a), kind(b)) }, mapped, n, Duration::from_secs(8))
}

/// Every row with what was measured of each of its pairs; measured once.
pub(crate) fn measured() -> &'static [(Row, Vec<Cell>)] {
    static MEASURED: OnceLock<Vec<(Row, Vec<Cell>)>> = OnceLock::new();
    MEASURED.get_or_init(|| {
        ROWS.into_iter()
            .map(|row| {
                let cells = row.pairs.iter().map(|pair| measure(*pair, row.mapped, RUNS)).collect();
                (row, cells)
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hard::cell::{stage, stage_with};

    #[test]
    fn every_row_of_the_promise_holds() {
        if crate::replay().is_some() {
            return;
        }
        let mut broken = Vec::new();
        for (row, cells) in measured() {
            for (pair, cell) in row.pairs.iter().zip(cells).filter(|(_, cell)| !row.holds(cell)) {
                broken.push(format!("{}: {} × {}: {cell}", row.name, pair.0, pair.1));
            }
        }
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }

    /// The caller's first probe reaches the other router 300 ms before that side is told to start.
    #[test]
    fn open_input_chains_and_300_ms_of_skew() {
        for seed in 0..RUNS {
            let s = Scenario { seed, ..Scenario::pair("linux+open".parse().unwrap(), "linux+open".parse().unwrap()) };
            let (mut sim, _, a, b) = stage(&s);
            let start = sim.now();
            sim.late = Some((b, start + Duration::from_millis(40), Duration::from_millis(300)));
            sim.ping(a, b, 20, Duration::from_millis(50));
            let direct =
                sim.run_until(Duration::from_millis(300), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
            assert!(direct, "seed {seed}: {:?}", sim.peer_status(a, b).path);
            sim.finish();
        }
    }

    /// Without the low time to live the same start fails: the routers take the early probe for their own, and keep it while
    /// anybody sends there. A fresh port on both sides cures that, and the next time it comes first.
    #[test]
    fn a_poisoned_port_pair_is_left_for_a_fresh_one() {
        for seed in 0..10 {
            let s = Scenario { seed, ..Scenario::pair("linux+open".parse().unwrap(), "linux+open".parse().unwrap()) };
            let (mut sim, _, a, b) = stage_with(&s, |sim| sim.limits.prime_ttl = None);
            let start = sim.now();
            sim.late = Some((b, start + Duration::from_millis(40), Duration::from_millis(300)));
            sim.ping(a, b, 400, Duration::from_millis(50));
            assert!(!sim.run_until(Duration::from_secs(2), |s| s.is_surely_direct(a, b)));
            sim.late = None;
            let both = |s: &crate::sim::Sim| s.is_surely_direct(a, b) && s.is_surely_direct(b, a);
            assert!(sim.run_until(Duration::from_secs(12), both), "seed {seed}: {:?}", sim.peer_status(a, b).path);
            assert_eq!(sim.node(a).extra.len(), 1, "the path has a socket of its own");
            // Out of use, and in use again: the fresh port comes first.
            sim.run_for(Duration::from_secs(400));
            assert_eq!(sim.node(a).extra.len(), 0, "closed");
            sim.ping(a, b, 40, Duration::from_millis(50));
            assert!(sim.run_until(Duration::from_millis(400), both), "seed {seed}");
            assert_eq!(sim.node(a).extra.len(), 1);
            sim.finish();
        }
    }

    /// Two NATs that draw from all ports and filter by port: relayed, said so, and left in peace.
    #[test]
    fn the_hopeless_are_relayed_and_rest() {
        for seed in 0..RUNS {
            let s = Scenario { seed, ..Scenario::pair("apdm+apdf".parse().unwrap(), "apdm+apdf".parse().unwrap()) };
            let (mut sim, _, a, b) = stage(&s);
            sim.ping(a, b, 10_000, Duration::from_millis(250));
            let mut before = [0, 0];
            for minute in 0..if seed == 0 { 15 } else { 1 } {
                sim.run_for(Duration::from_secs(60));
                for (node, before) in [a, b].into_iter().zip(&mut before) {
                    let sent = sim.node(node).probes - *before;
                    assert!(sent <= 50, "seed {seed}, minute {minute}: {sent} packets");
                    *before += sent;
                }
            }
            assert_eq!(sim.first_direct(a, b), None);
            let reason = sim.peer_status(a, b).path.reason.unwrap();
            assert!(reason.contains("both NATs pick a new port"), "{reason}");
            sim.finish();
        }
    }

    /// One datagram in twenty is lost, each way, also to the STUN servers and on the relay's TCP.
    #[test]
    fn hard_pairs_meet_on_a_lossy_internet() {
        for row in ROWS.iter().filter(|row| row.packets.is_some() || row.packets_a_side.is_some()) {
            let (a, b) = row.pairs[0];
            let s = Scenario { seed: 1, loss: 5, ..Scenario::pair(a.parse().unwrap(), b.parse().unwrap()) };
            let cell = Cell::measure(&s, false, 12, Duration::from_secs(30));
            assert!(cell.within(Duration::from_secs(30)) >= 100.0, "{}: {cell}", row.name);
            assert!(cell.percentile(50).is_some_and(|t| t < Duration::from_secs(2)), "{}: {cell}", row.name);
        }
    }

    /// Nobody spoke for ten minutes, so that every NAT has forgotten what its STUN servers were told.
    #[test]
    fn after_a_long_silence() {
        for (a, b, within_ms) in [
            ("eim+apdf", "eim+apdf", 200),
            ("linux", "linux", 150),
            ("eim+eif", "eim+apdf", 250),
            ("eim+adf", "apdm+apdf", 250),
            ("apdm+apdf+seq+foreign200", "eim+apdf", 500),
        ] {
            for seed in 0..RUNS {
                let s = Scenario { seed, ..Scenario::pair(a.parse().unwrap(), b.parse().unwrap()) };
                let (mut sim, _, a, b) = stage(&s);
                sim.run_for(Duration::from_secs(600));
                let (a, b) = if seed % 2 == 0 { (a, b) } else { (b, a) };
                sim.ping(a, b, 40, Duration::from_millis(50));
                let both = |s: &crate::sim::Sim| s.is_surely_direct(a, b) && s.is_surely_direct(b, a);
                assert!(sim.run_until(Duration::from_millis(within_ms), both), "{s}: {:?}", sim.peer_status(a, b).path);
                sim.finish();
            }
        }
    }
}

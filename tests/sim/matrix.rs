//! Every pair of NAT kinds, apart, on one LAN and behind one carrier, with and without loss: direct exactly where the oracle
//! says, relayed everywhere else, nothing lost that the first way could carry.

use std::time::Duration;

use crate::oracle::direct_is_possible;
use crate::scenario::Scenario;
use crate::sim::{Ping, Sim};

/// How one scenario ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// From the first packet until both sides sent directly.
    pub(crate) direct_after: Option<Duration>,
    /// From the first packet to its answer.
    pub(crate) first_answer: Duration,
    /// Of the whole run.
    pub(crate) trace: u64,
}

/// A path that exists is found within this time, even when one datagram in five is lost.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where no path exists, traffic is watched for this long.
const WATCHED: Duration = Duration::from_secs(12);
/// Between pings.
const GAP: Duration = Duration::from_millis(20);
/// By when something is answered where datagrams are lost and TCP repeats its segments.
const LOSSY_LIMIT: Duration = Duration::from_secs(6);

/// Runs a scenario and checks everything that must hold in any.
pub(crate) fn run(scenario: &Scenario) -> Outcome {
    let (mut sim, _places, a, b) = Sim::pair(scenario, &scenario.to_string());
    assert!(
        sim.run_until(Duration::from_secs(20), |s| s.is_synced(a) && s.is_synced(b)),
        "both nodes reach the coordinator"
    );
    let start = sim.now();
    let possible = direct_is_possible(scenario);
    let count = if possible { 3_000 } else { u16::try_from(WATCHED.as_millis() / GAP.as_millis()).unwrap() };
    let series = sim.ping(a, b, count, GAP);
    // The first packet is never lost, and its answer takes at most three round trips through the relay. Where datagrams
    // are lost, it may be on a direct path by then; but some packet gets through soon.
    let relay_round_trip = Duration::from_millis(2 * scenario.relay_ms);
    let (needed, limit) = match scenario.loss {
        0 => (1, 3 * relay_round_trip + Duration::from_millis(50)),
        _ => (usize::MAX, LOSSY_LIMIT),
    };
    let answered = |s: &Sim| s.pings(series).take(needed).find_map(|p| p.answered);
    assert!(sim.run_until(limit, |s| answered(s).is_some()), "the first packet is answered within {limit:?}");
    let first_answer = answered(&sim).unwrap().since(start);
    let mut direct_after = None;
    if possible {
        let found = sim.run_until(PATIENCE, |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
        assert!(found, "a direct path exists and is not found: {:?}", sim.peer_status(a, b).path);
        direct_after = Some(sim.now().since(start));
        sim.run_for(Duration::from_secs(2));
    } else {
        sim.run_for(WATCHED);
        for (node, peer) in [(a, b), (b, a)] {
            assert_eq!(sim.first_direct(node, peer), None, "there is no direct path, yet one was chosen");
            let reason = sim.peer_status(node, peer).path.reason;
            assert!(reason.is_some_and(|r| !r.is_empty()), "the status says why");
        }
    }
    sim.run_for(Duration::from_secs(1));
    // A relay loses nothing, though TCP may hold things back. With a direct path only a lossless internet promises that.
    if scenario.loss == 0 || !possible {
        let patience = if scenario.loss == 0 { Duration::from_millis(900) } else { Duration::from_secs(4) };
        let due = |p: &&Ping| p.sent < sim.now() && sim.now().since(p.sent) > patience;
        let lost = sim.pings(series).filter(due).filter(|p| p.answered.is_none()).count();
        assert_eq!(lost, 0, "pings lost");
    }
    // Two seconds on the network of the promise; elsewhere its round trips count.
    if let (0, Some(after)) = (scenario.loss, direct_after) {
        let limit = Duration::from_secs(2) + Duration::from_millis(20 * scenario.relay_ms.saturating_sub(30));
        assert!(after <= limit || scenario.is_rough(), "direct only after {after:?}");
    }
    Outcome { direct_after, first_answer, trace: sim.finish() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Dice;
    use crate::nat::Kind;
    use crate::scenario::Shape;

    const SHAPES: [Shape; 3] = [Shape::Apart, Shape::Lan, Shape::Carrier];
    const LOSSES: [u8; 3] = [0, 5, 20];

    fn pairs() -> Vec<(Kind, Kind)> {
        let kinds = Kind::all();
        kinds.iter().enumerate().flat_map(|(i, a)| kinds[i..].iter().map(move |b| (*a, *b))).collect()
    }

    /// By default each pair meets every shape and every loss once; with `MESHD_SIM_FULL` every combination, often.
    #[test]
    fn every_pair_ends_as_the_oracle_says() {
        if crate::replay().is_some() {
            return;
        }
        for (n, (a, b)) in pairs().into_iter().enumerate() {
            for (i, shape) in SHAPES.into_iter().enumerate() {
                for (j, loss) in LOSSES.into_iter().enumerate() {
                    let seeds = if crate::full() { 5 } else { u64::from((i + j) % 3 == n % 3) };
                    for seed in 0..seeds {
                        let seed = 1 + 100 * n as u64 + seed;
                        // Who speaks first alternates.
                        let (a, b) = if (seed + i as u64).is_multiple_of(2) { (a, b) } else { (b, a) };
                        run(&Scenario { shape, loss, seed, ..Scenario::pair(a, b) });
                    }
                }
            }
        }
    }

    #[test]
    fn scenarios_made_of_bytes_end_as_the_oracle_says() {
        if crate::replay().is_some() {
            return;
        }
        let mut dice = Dice::new(2_026);
        for _ in 0..if crate::full() { 3_000 } else { 150 } {
            run(&Scenario::from_bytes(&dice.bytes(24)));
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        if crate::replay().is_some() {
            return;
        }
        let mut dice = Dice::new(12);
        for _ in 0..15 {
            let scenario = Scenario::from_bytes(&dice.bytes(24));
            assert_eq!(run(&scenario), run(&scenario), "{scenario}");
        }
        let one: Scenario = "a=linux b=linux loss=20 seed=1".parse().unwrap();
        assert_ne!(run(&one).trace, run(&Scenario { seed: 2, ..one }).trace);
    }
}

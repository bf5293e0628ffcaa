//! The smallest thing that can punch: two hosts with one socket each, no engine. It proves that the world, the NAT models
//! and the oracle agree, and that they reproduce what `research/nat.md` measured with kernel NATs.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use meshd::time::Now;

use crate::dice::Dice;
use crate::scenario::Scenario;
use crate::town::{SERVER_V4, SERVER_V6, STUN_PORTS};
use crate::world::{HostId, Step, World};

/// How one punch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Punch {
    /// Microseconds from the first side's start until both sides had an answer.
    pub(crate) direct_after_us: Option<u64>,
    /// Of the whole run.
    pub(crate) trace: u64,
}

#[derive(Debug, Clone, Copy)]
enum Tick {
    /// Ask the STUN server again.
    Stun(usize),
    /// Probe every candidate.
    Probe(usize),
}

#[derive(Debug)]
struct Side {
    host: HostId,
    reflexive: Option<SocketAddr>,
    candidates: BTreeSet<SocketAddr>,
    answered: bool,
}

const PORT: u16 = 40_000;
const EVERY_US: u64 = 100_000;
const STUN_EVERY_US: u64 = 250_000;
/// Between knowing the addresses and the first probe.
const SIGNALLING_US: u64 = 100_000;
/// Neither side tries longer.
const PATIENCE_US: u64 = 12_000_000;

/// Runs one scenario: STUN, exchange of addresses, probes every 100 ms, answers and triggered probes.
pub(crate) fn punch(scenario: &Scenario, aloud: bool) -> Punch {
    let mut world: World<Tick> = World::new(Dice::new(scenario.seed).fork("world"), aloud);
    let places = scenario.build(&mut world);
    let server = if scenario.families().v4() { SERVER_V4[0].into() } else { SERVER_V6.into() };
    let server = SocketAddr::new(server, STUN_PORTS[0]);
    let mut sides =
        [places.a, places.b].map(|host| Side { host, reflexive: None, candidates: BTreeSet::new(), answered: false });
    let mut end = world.now().0 + PATIENCE_US;
    let mut started = None;
    for i in 0..2 {
        world.at(world.now(), Tick::Stun(i));
    }
    while let Some(step) = world.next(Now(end)) {
        let now = world.now().0;
        match step {
            Step::Own(Tick::Stun(i)) if sides[i].reflexive.is_none() => {
                world.send(sides[i].host, PORT, server, b"?".to_vec());
                world.at(Now(now + STUN_EVERY_US), Tick::Stun(i));
            }
            Step::Own(Tick::Stun(_)) | Step::Segment { .. } => {}
            Step::Own(Tick::Probe(i)) => {
                for candidate in sides[i].candidates.clone() {
                    world.send(sides[i].host, PORT, candidate, b"ping".to_vec());
                }
                world.at(Now(now + EVERY_US), Tick::Probe(i));
            }
            Step::Arrived { host, from, to, bytes } if host == places.server => {
                if bytes == b"?" && to == server {
                    world.send(host, to.port(), from, from.to_string().into_bytes());
                }
            }
            Step::Arrived { host, from, bytes, .. } => {
                let i = usize::from(sides[1].host == host);
                match bytes.as_slice() {
                    b"ping" => {
                        world.send(host, PORT, from, b"pong".to_vec());
                        sides[i].candidates.insert(from);
                        if !sides[i].answered {
                            world.send(host, PORT, from, b"ping".to_vec());
                        }
                    }
                    b"pong" => sides[i].answered = true,
                    seen => sides[i].reflexive = std::str::from_utf8(seen).ok().and_then(|s| s.parse().ok()),
                }
            }
        }
        let both_know = sides.iter().all(|side| side.reflexive.is_some());
        // A host that cannot reach the STUN server still has its own addresses to offer.
        if started.is_none() && (both_know || now + PATIENCE_US / 2 >= end) {
            let start = now + SIGNALLING_US;
            started = Some(start);
            end = start + scenario.skew_ms * 1_000 + PATIENCE_US;
            for i in 0..2 {
                let peer = &sides[1 - i];
                let own = world.addresses(peer.host).iter().map(|ip| SocketAddr::new(*ip, PORT));
                let offered: BTreeSet<_> = own.chain(peer.reflexive).collect();
                sides[i].candidates = offered;
                let skew = if i == 0 { 0 } else { scenario.skew_ms * 1_000 };
                world.at(Now(start + skew), Tick::Probe(i));
            }
        }
        if let (Some(start), true) = (started, sides.iter().all(|side| side.answered)) {
            return Punch { direct_after_us: Some(now.saturating_sub(start)), trace: world.trace.hash() };
        }
    }
    Punch { direct_after_us: None, trace: world.trace.hash() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::{Kind, NAMES};
    use crate::oracle::direct_is_possible;
    use crate::scenario::Shape;

    /// `research/nat.md` section 2.1, measured with kernel NATs: `1` one round trip, `p` one and a half (needs
    /// peer-reflexive learning), `-` never. Columns as the first eleven of [`NAMES`].
    const MEASURED: [&str; 11] = [
        "1 1 1 1 1 p p p 1 p p",
        "1 1 1 1 1 p p p 1 p p",
        "1 1 1 1 1 p p p 1 p p",
        "1 1 1 1 1 - - - p - -",
        "1 1 1 1 1 - - - p - -",
        "p p p - - - - - p - -",
        "p p p - - - - - p - -",
        "p p p - - - - - p - -",
        "1 1 1 p p p p p 1 p p",
        "p p p - - - - - p - -",
        "p p p - - - - - p - -",
    ];

    #[test]
    fn the_models_reproduce_the_measured_table() {
        for (row, cells) in NAMES.iter().zip(MEASURED) {
            for (column, cell) in NAMES.iter().zip(cells.split(' ')) {
                let scenario = Scenario::pair(row.parse().unwrap(), column.parse().unwrap());
                let got = match punch(&scenario, false).direct_after_us {
                    None => "-",
                    Some(us) if us <= 42_000 => "1",
                    Some(us) if us <= 63_000 => "p",
                    Some(us) => panic!("{scenario}: {us} µs"),
                };
                assert_eq!(got, cell, "{scenario}");
                assert_eq!(direct_is_possible(&scenario), cell != "-", "{scenario}");
            }
        }
    }

    #[test]
    fn every_pair_shape_and_loss_ends_as_the_oracle_says() {
        let kinds = Kind::all();
        let mut runs = 0;
        for (i, a) in kinds.iter().enumerate() {
            for b in &kinds[i..] {
                for shape in [Shape::Apart, Shape::Lan, Shape::Carrier] {
                    for loss in [0, 5, 20] {
                        for seed in 0..if crate::full() { 10 } else { 2 } {
                            agrees(&Scenario { shape, loss, seed, ..Scenario::pair(*a, *b) });
                            runs += 1;
                        }
                    }
                }
            }
        }
        assert!(runs >= 91 * 9 * 2, "{runs}");
    }

    #[test]
    fn scenarios_made_of_bytes_end_as_the_oracle_says() {
        let mut dice = Dice::new(77);
        for _ in 0..if crate::full() { 5_000 } else { 500 } {
            let mut scenario = Scenario::from_bytes(&dice.bytes(24));
            // Two hosts that start further apart than a datagram travels need a second try, which is not asked here.
            scenario.skew_ms = 0;
            agrees(&scenario);
        }
    }

    #[test]
    fn double_and_carrier_nats_end_as_the_oracle_says() {
        for line in [
            "a=eim+apdf/eim+eif b=linux/eim+apdf",
            "a=eim+apdf/apdm+apdf b=eim+adf",
            "a=eim+apdf/apdm+apdf b=eim+apdf",
            "a=linux/linux b=linux/linux",
            "a=apdm+eif/eim+apdf b=eim+apdf",
            "a=eim+apdf b=eim+apdf shape=carrier c=eim+eif",
            "a=public b=apdm+apdf shape=carrier c=eim+eif",
            "a=eim+apdf b=eim+apdf shape=carrier c=linux",
            "a=eim+adf b=apdm+apdf shape=carrier c=eim+apdf+hair",
            "a=linux b=eim+apdf ip=6",
            "a=linux b=apdm+apdf ip=46",
            "a=blocked b=public ip=6",
        ] {
            for seed in 0..5 {
                agrees(&Scenario { seed, ..line.parse().unwrap() });
            }
        }
    }

    fn agrees(scenario: &Scenario) {
        let got = punch(scenario, false).direct_after_us.is_some();
        assert_eq!(got, direct_is_possible(scenario), "replay: MESHD_SIM='punch {scenario}'");
    }

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        let mut dice = Dice::new(5);
        for _ in 0..50 {
            let scenario = Scenario::from_bytes(&dice.bytes(24));
            assert_eq!(punch(&scenario, false), punch(&scenario, false), "{scenario}");
        }
        let one: Scenario = "a=linux b=linux loss=20 seed=1".parse().unwrap();
        assert_ne!(punch(&one, false).trace, punch(&Scenario { seed: 2, ..one }, false).trace);
    }

    /// `research/nat.md` section 4.3, measured with kernel NATs at 20 ms one way.
    #[test]
    fn a_linux_router_with_an_open_input_chain_is_poisoned_by_an_early_probe() {
        let works = |a: &str, b: &str, skew_ms: u64| {
            let scenario = Scenario { skew_ms, ..Scenario::pair(a.parse().unwrap(), b.parse().unwrap()) };
            punch(&scenario, false).direct_after_us.is_some()
        };
        for skew in [0, 10, 30, 100, 300] {
            assert!(works("linux", "linux", skew), "INPUT drop is harmless, skew {skew}");
            assert!(works("linux+open", "linux", skew), "only the earlier side accepts, skew {skew}");
            let in_time = skew < 20;
            assert_eq!(works("linux", "linux+open", skew), in_time, "only the later side accepts, skew {skew}");
            assert_eq!(works("linux+open", "linux+open", skew), in_time, "both accept, skew {skew}");
            assert!(works("eim+adf", "linux+open", skew), "a filter by address forgives, skew {skew}");
        }
    }
}

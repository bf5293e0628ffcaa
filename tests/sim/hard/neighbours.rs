//! Nodes that share a NAT: their own, or their carrier's.

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::hard::cell::{grant, stage};
    use crate::scenario::{Scenario, Shape};
    use crate::sim::{NodeRef, Sim};
    use crate::world::Owner;

    const RUNS: u64 = 50;

    fn meet(sim: &mut Sim, a: NodeRef, b: NodeRef, within: Duration) -> bool {
        sim.ping(a, b, 60, Duration::from_millis(50));
        sim.run_until(within, |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a))
    }

    fn scenario(shape: Shape, kind: &str, carrier: &str, seed: u64) -> Scenario {
        let kind = kind.parse().unwrap();
        Scenario { shape, carrier: carrier.parse().unwrap(), seed, ..Scenario::pair(kind, kind) }
    }

    #[test]
    fn on_one_lan_the_path_is_inside() {
        for kind in ["linux", "eim+apdf", "apdm+apdf", "apdm+apdf+seq"] {
            for seed in 0..RUNS {
                let (mut sim, _, a, b) = stage(&scenario(Shape::Lan, kind, "eim+eif+hair", seed));
                assert!(meet(&mut sim, a, b, Duration::from_millis(150)), "{kind} {seed}");
                let endpoint = sim.peer_status(a, b).path.endpoint.unwrap();
                assert!(endpoint.starts_with("192.168.1."), "{endpoint}");
                sim.finish();
            }
        }
    }

    /// Guests on one Wi-Fi that may not talk to each other, behind a NAT that hairpins.
    #[test]
    fn isolated_clients_meet_through_a_hairpin() {
        for kind in ["eim+apdf+hair", "eim+eif+hair"] {
            for seed in 0..RUNS {
                let (mut sim, places, a, b) = stage(&scenario(Shape::Lan, kind, "eim+eif+hair", seed));
                let (one, other) = (Owner::Host(places.a), Owner::Host(places.b));
                sim.world.cut(one, other, true);
                sim.world.cut(other, one, true);
                assert!(meet(&mut sim, a, b, Duration::from_millis(250)), "{kind} {seed}");
                sim.finish();
            }
        }
    }

    #[test]
    fn behind_one_carrier_that_hairpins() {
        for seed in 0..RUNS {
            let (mut sim, _, a, b) = stage(&scenario(Shape::Carrier, "linux", "eim+apdf+hair", seed));
            assert!(meet(&mut sim, a, b, Duration::from_millis(250)), "{seed}");
            sim.finish();
        }
    }

    /// The carrier's NAT does not hairpin, but the home routers grant ports: their outside address, 100.64.0.x, is reachable
    /// from the other home. Nothing else is.
    #[test]
    fn behind_one_carrier_that_does_not_hairpin_with_port_mappings() {
        for seed in 0..RUNS {
            let s = scenario(Shape::Carrier, "linux", "eim+apdf", seed);
            let (mut sim, places, a, b) = stage(&s);
            let granted = grant(&mut sim, a, &places.site_a);
            assert!(granted.to_string().starts_with("100.64.0."), "{granted}");
            assert!(meet(&mut sim, a, b, Duration::from_millis(250)), "{seed}");
            assert_eq!(sim.peer_status(b, a).path.endpoint.unwrap(), granted.to_string());
            sim.finish();
            if seed == 0 {
                let (mut sim, _, a, b) = stage(&s);
                assert!(!meet(&mut sim, a, b, Duration::from_secs(3)), "without one there is no way");
                sim.finish();
            }
        }
    }

    /// A mapped port makes the worst NAT as good as none; whoever has it, and whoever speaks first.
    #[test]
    fn a_mapped_port_reaches_through_any_nat() {
        for kind in ["linux", "apdm+apdf", "apdm+apdf+seq", "linux+random"] {
            for seed in 0..RUNS {
                let s = Scenario { seed, ..Scenario::pair("eim+apdf+keep".parse().unwrap(), kind.parse().unwrap()) };
                let (mut sim, places, a, b) = stage(&s);
                grant(&mut sim, a, &places.site_a);
                sim.run_for(Duration::from_secs(1));
                let (first, second) = if seed % 2 == 0 { (a, b) } else { (b, a) };
                assert!(meet(&mut sim, first, second, Duration::from_millis(100)), "{kind} {seed}");
                sim.finish();
            }
        }
    }
}

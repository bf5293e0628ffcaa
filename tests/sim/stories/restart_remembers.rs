//! Two routers take the first packets that come from the other side for their own, so that only a fresh port on both sides
//! joins them. A node that restarts has that from its disk and begins with it: it is direct again at once, where one that has
//! lost its memory fails twice first.

use std::time::Duration;

use crate::hard::stage_with;
use crate::scenario::Scenario;
use crate::sim::Sim;

/// Seconds until direct again, and probes of both sides until then.
fn restarted(seed: u64, remembers: bool) -> (Duration, u64) {
    let kind = || "linux+open".parse().unwrap();
    let scenario = Scenario { seed, ..Scenario::pair(kind(), kind()) };
    // Without packets that die on the way, which would keep the routers from it.
    let (mut sim, _, a, b) = stage_with(&scenario, |sim| sim.limits.prime_ttl = None);
    sim.late = Some((b, sim.now() + Duration::from_millis(40), Duration::from_millis(300)));
    sim.ping(a, b, 1_000, Duration::from_millis(50));
    sim.run_for(Duration::from_secs(2));
    sim.late = None;
    let both = |s: &Sim| s.sends_directly(a, b) && s.sends_directly(b, a);
    assert!(sim.run_until(Duration::from_secs(15), both), "seed {seed}: a fresh port joins them");
    sim.run_for(Duration::from_secs(1));
    sim.kill(a, true);
    assert_eq!(sim.node(a).worked.len(), 1, "it is kept");
    if !remembers {
        sim.forget_what_worked(a);
    }
    sim.start(a);
    assert!(sim.run_until(Duration::from_secs(5), |s| s.is_synced(a)));
    sim.run_for(Duration::from_millis(500));
    let (start, before) = (sim.now(), sim.node(a).probes + sim.node(b).probes);
    sim.ping(a, b, 600, Duration::from_millis(50));
    assert!(sim.run_until(Duration::from_secs(30), both), "seed {seed}, remembers {remembers}: direct again");
    let found = (sim.now().since(start), sim.node(a).probes + sim.node(b).probes - before);
    sim.finish();
    found
}

pub(crate) fn run(seed: u64) {
    let (with, without) = (restarted(seed, true), restarted(seed, false));
    assert!(with.0 <= Duration::from_secs(1), "direct {:?} after the first packet", with.0);
    assert!(with.0 < without.0 && with.1 < without.1, "with memory {with:?}, without {without:?}");
}

//! A node joins while the network runs: the others learn of it from the coordinator's log and can be reached, and reach it,
//! at once.

use std::time::Duration;

use super::settled;

pub(crate) fn run(seed: u64) {
    let (mut sim, mut places, a, b) = settled("late_joiner", seed, "a=linux b=apdm+apdf");
    let site = places.town.site(&mut sim.world, "c", &["eim+adf".parse().unwrap()], None);
    let host = site.host(&mut sim.world, "c", 3);
    let c = sim.join("c", host);
    sim.run_for(Duration::from_millis(200));
    assert_eq!(sim.status(a).peers.len(), 2, "known before it ever ran");
    sim.start(c);
    assert!(sim.run_until(Duration::from_secs(3), |s| s.is_synced(c)));
    let all = [(c, a), (b, c), (a, c)].map(|(from, to)| sim.ping(from, to, 100, Duration::from_millis(20)));
    sim.run_for(Duration::from_secs(3));
    for series in all {
        assert_eq!(sim.unanswered(series), 0);
    }
    assert!(sim.is_direct(a, c) && sim.is_direct(b, c), "and directly");
    sim.finish();
}

//! The coordinator is killed: peers with a direct path go on without loss, and the status says what is wrong. When it is
//! back, all nodes are connected again within ten seconds and its store is as it was.

use std::time::Duration;

use super::{assert_none_lost, talking};

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(50), Duration::from_secs(80));
    let (mut sim, _, a, b, series) = talking("coordinator_dies", seed, "a=linux b=eim+apdf", gap, time);
    let stored = sim.server_store().clone();
    sim.kill_server();
    sim.run_for(Duration::from_secs(40));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    for node in [a, b] {
        assert!(!sim.status(node).coordinator.connected);
        assert!(sim.health(node).contains(&"coordinator-unreachable".to_owned()), "{:?}", sim.health(node));
    }
    sim.start_server();
    let back = sim.run_until(Duration::from_secs(10), |s| {
        [a, b].iter().all(|n| s.is_connected(*n) && s.status(*n).coordinator.connected)
    });
    assert!(back, "reconnected within ten seconds");
    sim.run_for(Duration::from_secs(5));
    for node in [a, b] {
        assert_eq!(sim.health(node), Vec::<String>::new());
    }
    assert_eq!(*sim.server_store(), stored);
    sim.run_for(Duration::from_secs(30));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    sim.finish();
}

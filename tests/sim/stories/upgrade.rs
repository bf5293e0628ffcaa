//! The default NAT of Linux on both sides, 20 ms one way directly and 30 ms by the relay: 500 pings at 10 ms, sent while the
//! path changes from relayed to direct, all come back, each once, and the path is direct within two seconds.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    let (mut sim, _, a, b) = settled("upgrade", seed, "a=linux b=linux direct=20 relay=30");
    let start = sim.now();
    let series = sim.ping(a, b, 500, Duration::from_millis(10));
    sim.run_for(Duration::from_secs(6));
    assert_none_lost(&sim, series, Duration::ZERO);
    assert!(sim.pings(series).all(|p| p.answers == 1), "an answer came twice");
    for (node, peer) in [(a, b), (b, a)] {
        let direct = sim.first_direct(node, peer).expect("the path is direct");
        assert!(direct.since(start) <= Duration::from_secs(2), "direct after {:?}", direct.since(start));
        assert!(sim.is_surely_direct(node, peer), "and stays so");
    }
    let last = sim.pings(series).last().unwrap();
    assert!(last.answered.unwrap().since(last.sent) < Duration::from_millis(45), "at the direct path's speed");
    sim.finish();
}

//! The first packet between two nodes that never talked is answered within three relay round trips and 50 ms, whatever
//! the NATs, in either direction, and not lost.

use std::time::Duration;

use super::settled;

/// Three round trips of 60 ms, and 50 ms.
const LIMIT: Duration = Duration::from_millis(3 * 60 + 50);

pub(crate) fn run(seed: u64) {
    for nats in ["a=linux b=linux", "a=apdm+apdf b=apdm+apdf", "a=blocked b=eim+apdf", "a=public b=adm+adf"] {
        let (mut sim, _, a, b) = settled("first_packet", seed, nats);
        let (from, to) = if seed.is_multiple_of(2) { (a, b) } else { (b, a) };
        let series = sim.ping(from, to, 1, Duration::ZERO);
        assert!(sim.run_until(LIMIT, |s| s.unanswered(series) == 0 && s.pings(series).all(|p| p.answered.is_some())));
        sim.finish();
    }
}

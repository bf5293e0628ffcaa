//! A node moves to another network while nobody says anything. Some seconds later its peer speaks first, and is heard: the
//! move itself made both sides look for their path.

use std::time::Duration;

use super::{assert_none_lost, talking};

pub(crate) fn run(seed: u64) {
    for (nats, to) in
        [("a=linux b=linux", "eim+apdf"), ("a=public b=linux", "linux"), ("a=linux b=public", "apdm+apdf")]
    {
        let (gap, time) = (Duration::from_millis(100), Duration::from_secs(2));
        let (mut sim, mut places, a, b, _) = talking("quiet_roam", seed, nats, gap, time);
        let elsewhere = places.town.site(&mut sim.world, "elsewhere", &[to.parse().unwrap()], None);
        sim.run_for(Duration::from_secs(3));
        elsewhere.welcome(&mut sim.world, places.a, 5);
        sim.moved(a);
        // Before a keepalive of either side is due, which would notice by itself.
        sim.run_for(Duration::from_secs(4));
        let series = sim.ping(b, a, 100, Duration::from_millis(20));
        sim.run_for(Duration::from_secs(5));
        assert_none_lost(&sim, series, Duration::ZERO);
        sim.finish();
    }
}

//! A node moves to another network, with another NAT and another address, in the middle of a transfer: traffic flows again
//! within two seconds and directly within six, without a restart.

use std::time::Duration;

use super::talking;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(20), Duration::from_secs(30));
    for (nats, to) in
        [("a=linux b=linux", "eim+apdf"), ("a=eim+apdf b=linux", "public"), ("a=public b=eim+adf", "linux")]
    {
        let (mut sim, mut places, a, b, series) = talking("roam", seed, nats, gap, time);
        let elsewhere = places.town.site(&mut sim.world, "elsewhere", &[to.parse().unwrap()], None);
        sim.run_for(Duration::from_secs(1));
        // Whether the moving node is the one that sends or the one that answers.
        let (mover, host) = if seed.is_multiple_of(2) { (a, places.a) } else { (b, places.b) };
        elsewhere.welcome(&mut sim.world, host, 5);
        sim.moved(mover);
        let moved = sim.now();
        let flows =
            sim.run_until(Duration::from_secs(2), |s| s.pings(series).any(|p| p.sent >= moved && p.answered.is_some()));
        assert!(flows, "{nats} → {to}: traffic flows again");
        let direct = sim.run_until(Duration::from_secs(6), |s| {
            s.now().since(moved) > Duration::from_secs(1) && s.is_surely_direct(a, b) && s.is_surely_direct(b, a)
        });
        assert!(direct, "{nats} → {to}: and directly: {:?}", sim.peer_status(a, b).path);
        let settled = sim.now();
        sim.run_for(Duration::from_secs(5));
        let lost = sim
            .pings(series)
            .filter(|p| p.sent > settled && sim.now().since(p.sent) > Duration::from_secs(1) && p.sent < sim.now())
            .filter(|p| p.answered.is_none())
            .count();
        assert_eq!(lost, 0, "{nats} → {to}: and stays");
        sim.finish();
    }
}

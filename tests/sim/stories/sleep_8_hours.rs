//! A laptop sleeps for eight hours in the middle of talking. When it wakes up, every timer is hours late, every connection
//! and mapping is gone; the first packets are answered within seconds, in both directions, and directly soon after.

use std::time::Duration;

use super::talking;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(100), Duration::from_secs(5));
    for sleeper_speaks in [true, false] {
        let (mut sim, _, a, b, _) = talking("sleep_8_hours", seed, "a=eim+apdf b=linux", gap, time);
        sim.sleep(a);
        sim.run_for(Duration::from_secs(8 * 3_600));
        sim.awaken(a);
        sim.run_for(Duration::from_millis(100));
        let series = if sleeper_speaks { sim.ping(a, b, 100, gap) } else { sim.ping(b, a, 100, gap) };
        let answered = sim.run_until(Duration::from_secs(3), |s| s.pings(series).any(|p| p.answered.is_some()));
        assert!(answered, "sleeper speaks: {sleeper_speaks}: answered within seconds");
        let direct = sim.run_until(Duration::from_secs(7), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
        assert!(direct, "sleeper speaks: {sleeper_speaks}: directly again: {:?}", sim.peer_status(a, b).path);
        assert!(sim.is_connected(a));
        sim.finish();
    }
}

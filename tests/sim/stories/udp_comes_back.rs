//! A network lets no UDP through, says the status; peers are relayed. When UDP is let through, the path becomes direct
//! without anybody doing anything.

use std::time::Duration;

use meshd::wire::local::PathKind;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    let (mut sim, places, a, b) = settled("udp_comes_back", seed, "a=linux b=linux");
    // Only datagrams are the world's; connections to the coordinator go on.
    sim.world.link_mut(places.site_a.net).up = false;
    let series = sim.ping(a, b, 2_000, Duration::from_millis(100));
    sim.run_for(Duration::from_secs(60));
    assert_eq!(sim.peer_status(a, b).path.kind, PathKind::Relay);
    assert!(sim.health(a).contains(&"udp-blocked".to_owned()), "{:?}", sim.health(a));
    assert_eq!(sim.status(a).nat.udp, Some(false));
    sim.world.link_mut(places.site_a.net).up = true;
    let direct = sim.run_until(Duration::from_secs(40), |s| s.is_surely_direct(a, b) && s.is_surely_direct(b, a));
    assert!(direct, "direct once UDP passes: {:?}", sim.peer_status(a, b).path);
    sim.run_for(Duration::from_secs(30));
    assert_none_lost(&sim, series, Duration::from_secs(1));
    assert_eq!(sim.health(a), Vec::<String>::new());
    sim.finish();
}

//! Packets to addresses that nobody owns are answered by the kernel's own "unreachable" and counted; packets to members that
//! are not there wait, then are dropped by name, and the members are reached once they appear.

use std::time::Duration;

use meshd::engine::drops::Drop;

use super::settled;
use crate::inner;

pub(crate) fn run(seed: u64) {
    let (mut sim, _, a, b) = settled("unknown_peers", seed, "a=linux b=linux");
    let (source, nobody) = (sim.node(a).v4, "100.71.200.1".parse().unwrap());
    sim.kernel_sends(a, inner::other(source, nobody, b"hello?"));
    sim.run_for(Duration::from_millis(10));
    assert_eq!(sim.dropped(a, Drop::NoRoute), 1);
    let (_, answer) = sim.node(a).received.last().expect("the kernel hears of it");
    assert_eq!(inner::payload(answer)[0], 3, "ICMP destination unreachable (RFC 792)");

    sim.kill(b, true);
    sim.run_for(Duration::from_secs(1));
    let lost = sim.ping(a, b, 5, Duration::from_millis(10));
    sim.run_for(Duration::from_secs(120));
    assert_eq!(sim.unanswered(lost), 5);
    assert_eq!(sim.dropped(a, Drop::HandshakeTimeout), 5, "what waited is dropped by name");
    sim.start(b);
    sim.run_for(Duration::from_secs(2));
    let series = sim.ping(a, b, 3, Duration::from_millis(10));
    sim.run_for(Duration::from_secs(1));
    assert_eq!(sim.unanswered(series), 0, "and it is reached once it is there");
    sim.finish();
}

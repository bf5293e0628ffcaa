//! An admin removes a node: the others stop hearing it and it stops by itself; it cannot come back.

use std::time::Duration;

use meshd::engine::io::{Command, Event};
use meshd::trust::founding::revoke_record;
use meshd::trust::record::RevokeTarget;

use super::talking;
use crate::inner;
use crate::sim::WALL;

pub(crate) fn run(seed: u64) {
    let (gap, time) = (Duration::from_millis(50), Duration::from_secs(10));
    let (mut sim, _, a, b, series) = talking("revoked", seed, "a=linux b=linux", gap, time);
    let admin = sim.keys(a).identity.signing_key();
    let target = RevokeTarget::Identity(sim.keys(b).identity_key());
    let records = vec![revoke_record(&admin, sim.network(), target, WALL)];
    sim.command(a, Command::Publish { token: 7, records });
    sim.run_for(Duration::from_secs(1));
    let published = |(_, e): &(_, Event)| matches!(e, Event::Published { token: 7, problem: None });
    assert!(sim.machines(a).events.iter().any(published), "stored by the coordinator");
    assert!(sim.machines(b).events.iter().any(|(_, e)| *e == Event::Expelled), "the removed node is told");
    assert_eq!(sim.status(a).peers.len(), 0);
    let now = sim.now();
    sim.run_for(Duration::from_secs(2));
    assert!(sim.pings(series).all(|p| p.answered.is_none_or(|at| at <= now)), "nothing flows any more");
    let (source, target) = (sim.node(b).v4, sim.node(a).v4);
    sim.kernel_sends(b, inner::other(source, target, b"still here"));
    sim.run_for(Duration::from_secs(2));
    assert!(sim.node(a).received.iter().all(|(_, packet)| inner::payload(packet) != b"still here"));
    sim.finish();
}

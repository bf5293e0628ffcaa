//! A marker that one node sends to another never shows on any wire, nor at the coordinator, on the way through the relay or
//! directly.

use std::time::Duration;

use super::settled;
use crate::inner;

pub(crate) fn run(seed: u64) {
    for nats in ["a=linux b=linux", "a=apdm+apdf b=apdm+apdf"] {
        let (mut sim, _, a, b) = settled("ciphertext_only", seed, nats);
        let marker = b"the-marker-that-nobody-else-may-see";
        sim.forbid(marker);
        let (source, target) = (sim.node(a).v4, sim.node(b).v4);
        for _ in 0..200 {
            sim.kernel_sends(a, inner::other(source, target, marker));
            sim.run_for(Duration::from_millis(10));
        }
        sim.run_for(Duration::from_secs(1));
        assert_eq!(sim.node(b).received.len(), 200, "all arrive");
        assert!(sim.node(b).received.iter().all(|(_, packet)| inner::payload(packet) == marker));
        assert_eq!(sim.leaked(), 0, "none in the clear");
        sim.finish();
    }
}

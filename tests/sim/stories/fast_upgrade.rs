//! 500 Mbit/s while the path changes from relayed to direct, however much faster that is: nothing is lost, nothing is
//! overtaken, and nothing pauses for more than 50 ms.

use std::time::Duration;

use meshd::engine::drops::Drop;
use meshd::engine::io::Input;
use meshd::time::Now;

use super::settled;
use crate::inner;
use crate::sim::Sim;
use crate::world::Owner;

/// One packet; with the tunnel's headers 1,312 bytes of UDP.
const PACKET: usize = 1_280;
/// How many come together, and how often: 500 Mbit/s.
const BATCH: u32 = 49;
const GAP: Duration = Duration::from_millis(1);
/// So often.
const TIME: u32 = 450;

pub(crate) fn run(seed: u64) {
    for (direct, relay) in [(20, 30), (10, 90)] {
        for to_the_called in [true, false] {
            one(seed, direct, relay, to_the_called);
        }
    }
}

fn one(seed: u64, direct: u64, relay: u64, to_the_called: bool) {
    let line = format!("a=linux b=eim+apdf direct={direct} relay={relay}");
    let (mut sim, places, a, b) = settled("fast_upgrade", seed, &line);
    let (gate_a, gate_b) = (Owner::Box(places.site_a.gates[0]), Owner::Box(places.site_b.gates[0]));
    let cut = |sim: &mut Sim, cut| {
        sim.world.cut(gate_a, gate_b, cut);
        sim.world.cut(gate_b, gate_a, cut);
    };
    cut(&mut sim, true);
    sim.ping(a, b, 4, Duration::from_secs(1));
    sim.run_for(Duration::from_secs(4));
    cut(&mut sim, false);
    sim.input(a, Input::NetworkChanged);
    let (from, to) = if to_the_called { (a, b) } else { (b, a) };
    assert!(!sim.sends_directly(from, to), "{line}: relayed when the flow begins");
    let (here, there) = (sim.node(from).v4, sim.node(to).v4);
    for batch in 0..TIME {
        for n in batch * BATCH..(batch + 1) * BATCH {
            let mut payload = vec![0; PACKET - 20];
            payload[..4].copy_from_slice(&n.to_be_bytes());
            sim.kernel_sends(from, inner::other(here, there, &payload));
        }
        sim.run_for(GAP);
    }
    assert!(sim.sends_directly(from, to), "{line}: direct when it ends");
    sim.run_for(Duration::from_millis(300));
    let came: Vec<(Now, u32)> = sim
        .node(to)
        .received
        .iter()
        .map(|(at, packet)| (*at, u32::from_be_bytes(packet[20..24].try_into().unwrap())))
        .collect();
    let sent = TIME * BATCH;
    let drops = |why| sim.dropped(from, why) + sim.dropped(to, why);
    assert_eq!(came.len(), sent as usize, "{line}: lost; {} too late for the window", drops(Drop::Replayed));
    assert!(came.is_sorted_by_key(|(_, n)| *n), "{line}: overtaken");
    let pause = came.windows(2).map(|two| two[1].0.since(two[0].0)).max().unwrap();
    assert!(pause <= Duration::from_millis(50), "{line}: nothing came for {pause:?}");
    sim.finish();
}

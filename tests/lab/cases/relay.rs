//! What carries relayed packets: UDP where it passes, the WebSocket where it does not, and nothing lost between.

use std::time::{Duration, Instant};

use anyhow::Result;
use meshd::cli::demo::net::{Namespace, Nat};

use crate::net::Topology;
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, World, ensure, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("relay::by_udp_where_udp_passes_and_nothing_is_lost_on_the_way_there", by_udp),
        case("relay::by_websocket_within_a_second_when_udp_is_shut_and_back", shut_and_back),
        case("relay::restarted_coordinator_gives_a_new_session", restarted),
    ]
}

/// Two machines that can only be relayed, and the first one's router.
fn relayed() -> Result<(Topology, Namespace)> {
    let world = World::new()?;
    let (ra, rb) = (world.internet.router("ra", 21, Nat::Symmetric)?, world.internet.router("rb", 22, Nat::Symmetric)?);
    delay(&world.internet, "coord", Duration::from_millis(15))?;
    let machines = vec![("a", ra.lan.host("a", 2)?), ("b", rb.lan.host("b", 2)?)];
    Ok((Topology { world, machines }, ra.namespace))
}

fn carrier(node: &Node) -> Result<String> {
    Ok(node.status()?.coordinator.relay.unwrap_or_default())
}

/// Waits for a carrier; how long it took.
fn until_by(node: &Node, wanted: &str, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    until(&format!("{} is relayed by {wanted}", node.name), limit, || {
        Ok((carrier(node)? == wanted).then(|| start.elapsed()))
    })
}

fn by_udp() -> Result<()> {
    let (lab, _) = relayed()?;
    let nodes = lab.join()?;
    let pings = nodes[0].start_icmp(nodes[1].address(true)?, &["-q", "-c", "300", "-i", "0.01", "-W", "5"])?;
    for node in &nodes {
        until_by(node, "udp", Duration::from_secs(3))?;
    }
    let seen = Icmp::wait(pings, Duration::from_secs(30))?;
    ensure(seen.sent == 300 && seen.received == 300, || format!("{seen:?}"))?;
    let text = nodes[0].run(&["status"])?;
    ensure(text.contains("relaying by UDP"), || format!("the table does not say so:\n{text}"))
}

fn shut_and_back() -> Result<()> {
    let (lab, router) = relayed()?;
    let nodes = lab.join()?;
    let (a, b) = (&nodes[0], &nodes[1]);
    let pings = a.start_icmp(b.address(true)?, &["-q", "-c", "2500", "-i", "0.01", "-W", "5"])?;
    until_by(a, "udp", Duration::from_secs(3))?;
    until_by(b, "udp", Duration::from_secs(3))?;
    router.nft(
        "table inet shut {\n chain f {\n type filter hook forward priority -10\n meta l4proto udp drop\n }\n}\n",
    )?;
    let left = until_by(a, "websocket", Duration::from_secs(5))?;
    println!("by WebSocket {left:?} after UDP was shut");
    ensure(left <= Duration::from_millis(1_200), || format!("only after {left:?}"))?;
    ensure(carrier(b)? == "udp", || "the other end's UDP was not touched".to_owned())?;
    router.nft("delete table inet shut\n")?;
    let back = until_by(a, "udp", Duration::from_secs(15))?;
    println!("by UDP again {back:?} after it was opened");
    let seen = Icmp::wait(pings, Duration::from_secs(60))?;
    println!("{} of {} pings lost", seen.sent - seen.received, seen.sent);
    // A hundred a second: what was under way in the second of silence.
    ensure(seen.sent == 2_500 && seen.received >= 2_500 - 130, || format!("{seen:?}"))
}

fn restarted() -> Result<()> {
    let (mut lab, _) = relayed()?;
    let nodes = lab.join()?;
    let to = nodes[1].address(true)?;
    nodes[0].icmp(to, &["-q", "-c", "50", "-i", "0.02", "-W", "5"])?;
    until_by(&nodes[0], "udp", Duration::from_secs(3))?;
    lab.world.coordinator.kill()?;
    lab.world.coordinator.restart()?;
    let pings = nodes[0].start_icmp(to, &["-q", "-c", "2000", "-i", "0.01", "-W", "5"])?;
    for node in &nodes {
        until(&format!("{} is relayed by UDP again", node.name), Duration::from_secs(18), || {
            let status = node.status()?;
            Ok((status.coordinator.connected && status.coordinator.relay.as_deref() == Some("udp")).then_some(()))
        })?;
    }
    let seen = Icmp::wait(pings, Duration::from_secs(40))?;
    ensure(seen.received > 0, || format!("nothing came through: {seen:?}"))
}

//! What carries relayed packets: UDP where it passes, the WebSocket where it does not, and nothing lost between.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use meshd::cli::demo::net::{Namespace, Nat, tool};
use meshd::wire::local::PathKind;

use crate::net::Topology;
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, World, ensure, eventually, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("relay::by_udp_where_udp_passes_and_nothing_is_lost_on_the_way_there", by_udp),
        case("relay::by_websocket_within_a_second_when_udp_is_shut_and_back", shut_and_back),
        case("relay::restarted_coordinator_gives_a_new_session", restarted),
        case("relay::by_a_node_that_volunteers_when_the_coordinator_is_gone", by_a_node),
    ]
}

/// ```text
///   hub .31, relays ──┬── internet ── coordinator .10/.11, deleted
///   [NAT ra .21] a    [NAT rb .22] b          neither NAT can be punched
/// ```
fn by_a_node() -> Result<()> {
    let world = World::new()?;
    let (ra, rb) = (world.internet.router("ra", 21, Nat::Symmetric)?, world.internet.router("rb", 22, Nat::Symmetric)?);
    let machines = [("hub", world.internet.host("hub", 31)?), ("a", ra.lan.host("a", 2)?), ("b", rb.lan.host("b", 2)?)];
    let machines: Vec<(&str, &Namespace)> = machines.iter().map(|(name, machine)| (*name, machine)).collect();
    let nodes = world.join(&machines)?;
    let [hub, a, b] = nodes.as_slice() else { bail!("three joined") };
    hub.run(&["set", "--relay", "--relay-rate", "5MB"])?;
    for node in [a, b] {
        node.ping_until_direct("hub")?;
    }
    let (to_b, to_a) = (b.address(true)?, a.address(true)?);
    a.icmp(to_b, &["-q", "-c", "5", "-i", "0.2", "-W", "2"])?;
    let World { internet, mut coordinator } = world;
    coordinator.kill()?;
    let deleted = tool("ip").args(["netns", "delete", coordinator.node.namespace.name()]).status()?;
    ensure(deleted.success(), || "the coordinator's namespace cannot be deleted".to_owned())?;
    for node in &nodes {
        node.run(&["down"])?;
    }
    std::thread::scope(|scope| {
        let starting: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.run(&["up", "--timeout", "20s"]))).collect();
        starting.into_iter().try_for_each(|up| up.join().map_err(|_| anyhow!("a thread panicked"))?.map(drop))
    })?;
    let start = Instant::now();
    eventually("b answers a", Duration::from_secs(10), || {
        let seen = a.icmp(to_b, &["-c", "1", "-W", "1"])?;
        ensure(seen.received == 1, || format!("path {:?}", a.peer("b").map(|p| p.path)))
    })?;
    println!("answered after {} ms", start.elapsed().as_millis());
    for (node, peer, to) in [(a, "b", to_b), (b, "a", to_a)] {
        for size in ["56", "1200", "4000"] {
            let seen = node.icmp(to, &["-q", "-c", "20", "-i", "0.05", "-W", "2", "-s", size])?;
            ensure(seen.received >= 19, || format!("{} to {peer}, {size} bytes: {seen:?}", node.name))?;
        }
        let path = node.peer(peer)?.path;
        ensure(path.kind == PathKind::Relay && path.endpoint.as_deref() == Some("hub"), || format!("{path:?}"))?;
        let text = node.run(&["ping", "-c", "1", peer])?;
        ensure(text.contains("via relay hub"), || text.clone())?;
        let text = node.run(&["why", peer])?;
        ensure(text.contains("relayed by hub"), || text.clone())?;
    }
    drop(internet);
    Ok(())
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

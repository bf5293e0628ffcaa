//! Routers that map ports: what they make reachable, and what becomes of a mapping.

use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat};
use meshd::wire::local::Netcheck;

use crate::contact::{self, Contact};
use crate::home_router::{Miniupnpd, Speaks, grant_by_pcp, hairpin, kill, public_address, reach_public_addresses};
use crate::net::Topology;
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Node, World, ensure, eventually, let_pass, until, wait_for_peers};

/// First contacts that are timed in each case.
const CONTACTS: usize = 7;

pub fn cases() -> Vec<Case> {
    vec![
        case("portmap::a_real_router_by_pcp", || granted(Speaks::Everything, "pcp")),
        case("portmap::a_real_router_by_nat_pmp", || granted(Speaks::NatPmpAndUpnp, "nat-pmp")),
        case("portmap::a_real_router_by_upnp", || granted(Speaks::Upnp, "upnp")),
        case("portmap::a_router_that_answers_nothing_is_named", nobody),
        case("portmap::mapped_home_to_fully_random", || mapped(Nat::Home)),
        case("portmap::mapped_fully_random_to_fully_random", || mapped(Nat::Symmetric)),
        case("portmap::two_behind_one_nat_are_direct", one_nat),
        case("portmap::one_carrier_without_hairpin_with_pcp_at_home", || carrier(Carrier::Pcp)),
        case("portmap::one_carrier_with_hairpin", || carrier(Carrier::Hairpin)),
    ]
}

fn netcheck(node: &Node) -> Result<Netcheck> {
    Ok(serde_json::from_str(&node.run(&["netcheck", "--json"])?)?)
}

/// Waits until a router maps the node's port, and says how.
fn wait_for_mapping(node: &Node) -> Result<String> {
    until(&format!("a port of {} is mapped", node.name), Duration::from_secs(6), || Ok(node.status()?.nat.port_mapping))
}

/// ```text
///   a 192.168.21.2 ── [NAT ra .21 with miniupnpd, also 11.0.0.21] ── internet
/// ```
fn granted(speaks: Speaks, by: &str) -> Result<()> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let mut router = Miniupnpd::start(&ra, 21, speaks)?;
    // Its epoch counts whole seconds, and is to be seen going back.
    let_pass(Duration::from_secs(4));
    let nodes = world.join(&[("a", &ra.lan.host("a", 2)?)])?;
    let a = &nodes[0];
    let protocol = wait_for_mapping(a)?;
    ensure(protocol == by, || format!("mapped by {protocol}"))?;
    let port = a.status()?.me.port;
    let external = format!("{}:{port}", public_address(21));
    let report = netcheck(a)?;
    let mapper = report.port_mapper.context("netcheck says nothing")?;
    println!("netcheck: {mapper:?}");
    ensure(report.port_mapping.as_deref() == Some(by), || format!("{:?}", report.port_mapping))?;
    ensure(mapper.external.is_some_and(|e| e.to_string() == external), || format!("not {external}: {mapper:?}"))?;
    let states: Vec<&str> = mapper.protocols.iter().map(|p| p.state.as_str()).collect();
    let expected = match speaks {
        Speaks::Everything => ["granted", "answers", "answers"],
        Speaks::NatPmpAndUpnp => ["silent", "granted", "answers"],
        Speaks::Upnp => ["silent", "silent", "granted"],
    };
    ensure(states == expected, || format!("{states:?}"))?;
    let rule = format!("dnat ip to 192.168.21.2:{port}");
    let is_mapped = |router: &Miniupnpd| anyhow::Ok(router.mapped()?.contains(&rule));
    ensure(is_mapped(&router)?, || "the router has no rule".to_owned())?;

    // A power cut at the router. By UPnP nothing tells of it before the mapping is renewed.
    router.reboot()?;
    if by != "upnp" {
        until("the node is mapped again", Duration::from_secs(8), || Ok(is_mapped(&router)?.then_some(())))?;
    }

    // One that was killed finds its mapping again, and one that is stopped takes it along.
    kill(a.pid()?)?;
    eventually("it starts again", Duration::from_secs(10), || a.run(&["up"]))?;
    let protocol = wait_for_mapping(a)?;
    ensure(protocol == by && a.status()?.me.port == port, || format!("mapped by {protocol} after being killed"))?;
    ensure(is_mapped(&router)?, || "the router has no rule after that".to_owned())?;
    a.run(&["down"])?;
    ensure(!is_mapped(&router)?, || format!("the rule stays after `down`:\n{}", router.mapped().unwrap_or_default()))?;

    a.run(&["up", "--no-port-mapping"])?;
    let mapper = netcheck(a)?.port_mapper.context("netcheck says nothing")?;
    ensure(!mapper.enabled && mapper.external.is_none(), || format!("not switched off: {mapper:?}"))?;
    ensure(!is_mapped(&router)?, || "switched off, and yet mapped".to_owned())
}

fn nobody() -> Result<()> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let nodes = world.join(&[("a", &ra.lan.host("a", 2)?)])?;
    let text = until("all were asked", Duration::from_secs(10), || {
        let text = nodes[0].run(&["netcheck"])?;
        Ok(text.contains("answers neither PCP nor NAT-PMP nor UPnP").then_some(text))
    })?;
    ensure(text.contains("none at the router 192.168.21.1"), || text.clone())
}

/// Brings both up anew and times from b's first packet to a direct path, several times; b then knows nothing of earlier paths.
fn first_contacts(nodes: &[Node], endpoint: impl Fn(&str) -> bool) -> Result<Vec<(Contact, ())>> {
    let (a, b) = (&nodes[0], &nodes[1]);
    let mut times = Vec::new();
    for _ in 0..CONTACTS {
        for node in [a, b] {
            node.run(&["down"])?;
            // Where peers were reached last is kept for a coordinator that is away.
            let _ = std::fs::remove_file(node.state_dir().join("state.json"));
        }
        for node in [a, b] {
            node.run(&["up", "--name", &node.name])?;
        }
        for node in [a, b] {
            wait_for_peers(node, 1)?;
            until("the peer is online", Duration::from_secs(10), || {
                Ok(node.status()?.peers.iter().all(|peer| peer.online).then_some(()))
            })?;
        }
        // The mapping and the NATs are known by then: what is timed is the way to each other.
        until("the NATs are known", Duration::from_secs(10), || {
            let known = |node: &Node| anyhow::Ok(node.status()?.nat.filtering.is_some());
            Ok((known(a)? && known(b)?).then_some(()))
        })?;
        let met = contact::make(b, a, Duration::from_secs(5))?;
        let at = b.peer(&a.name)?.path.endpoint.unwrap_or_default();
        ensure(endpoint(&at), || format!("direct, but to {at}: {met:?}"))?;
        times.push((met, ()));
    }
    Ok(times)
}

/// ```text
///            coordinator .10/.11
///                 │ 5 ms
///  ───────────────┴───────────── internet 203.0.113.0/24 ──
///     │ 10 ms                       │ 10 ms
///  [ra .21 and 11.0.0.21,        [rb .22, another port for each destination]
///   maps ports]                     │
///     a                             b
/// ```
///
/// One way: a to b 20 ms, relayed 30 ms.
fn mapped(nat: Nat) -> Result<()> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, nat)?;
    let rb = world.internet.router("rb", 22, Nat::Symmetric)?;
    reach_public_addresses(&rb.namespace, "wan")?;
    let _router = Miniupnpd::start(&ra, 21, Speaks::Everything)?;
    delay(&world.internet, "coord", Duration::from_millis(5))?;
    delay(&world.internet, "ra", Duration::from_millis(10))?;
    delay(&world.internet, "rb", Duration::from_millis(10))?;
    let (a, b) = (ra.lan.host("a", 2)?, rb.lan.host("b", 2)?);
    without_ipv6(&[&a, &b])?;
    let nodes = Topology { world, machines: vec![("a", a), ("b", b)] }.join()?;
    wait_for_mapping(&nodes[0])?;
    let contacts = first_contacts(&nodes, |at| at.starts_with(&format!("{}:", public_address(21))))?;
    contact::judge("a mapped port and another port for each destination", &contacts, Duration::from_millis(100), |()| {
        true
    })
}

/// ```text
///   coordinator ── internet ── [NAT ra .21] ─┬─ a .2
///                                            └─ b .3
/// ```
fn one_nat() -> Result<()> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Symmetric)?;
    delay(&world.internet, "coord", Duration::from_millis(5))?;
    delay(&world.internet, "ra", Duration::from_millis(10))?;
    let (a, b) = (ra.lan.host("a", 2)?, ra.lan.host("b", 3)?);
    let nodes = Topology { world, machines: vec![("a", a), ("b", b)] }.join()?;
    first_contacts(&nodes, |at| at.starts_with("192.168.21.2:") || at.starts_with("[2001:db8:21:")).map(drop)
}

/// IPv6 has no NAT and would lead past all of this, or here into nowhere: the internet has no route back.
fn without_ipv6(machines: &[&Namespace]) -> Result<()> {
    machines.iter().try_for_each(|machine| machine.ip("-6 addr flush dev eth0").map(drop))
}

enum Carrier {
    /// It does not hairpin, and the home routers map ports.
    Pcp,
    /// It hairpins, and they do not.
    Hairpin,
}

/// ```text
///   a 192.168.41.2 ── [NAT ra 192.168.21.41] ──┐
///                                              ├── [carrier's NAT .21] ── internet ── coordinator .10/.11
///   b 192.168.42.2 ── [NAT rb 192.168.21.42] ──┘
/// ```
fn carrier(with: Carrier) -> Result<()> {
    let world = World::new()?;
    let isp = world.internet.router("isp", 21, Nat::Home)?;
    let ra = isp.lan.router("ra", 41, Nat::Home)?;
    let rb = isp.lan.router("rb", 42, Nat::Home)?;
    delay(&world.internet, "coord", Duration::from_millis(5))?;
    delay(&world.internet, "isp", Duration::from_millis(10))?;
    let (a, b) = (ra.lan.host("a", 2)?, rb.lan.host("b", 2)?);
    without_ipv6(&[&a, &b])?;
    match with {
        Carrier::Pcp => {
            grant_by_pcp(&ra, &isp.lan, 41)?;
            grant_by_pcp(&rb, &isp.lan, 42)?;
        }
        Carrier::Hairpin => hairpin(&isp, &world.internet, 21)?,
    }
    let nodes = Topology { world, machines: vec![("a", a), ("b", b)] }.join()?;
    let outside = match with {
        Carrier::Pcp => {
            for node in &nodes {
                ensure(wait_for_mapping(node)? == "pcp", || "not by PCP".to_owned())?;
            }
            "192.168.21.41:"
        }
        Carrier::Hairpin => "203.0.113.21:",
    };
    first_contacts(&nodes, |at| at.starts_with(outside)).map(drop)
}

//! Subnets behind nodes, and exit nodes.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use meshd::cli::demo::net::{Namespace, Nat, Segment};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::picture::{picture, unchanged};
use crate::runner::{Case, case};
use crate::services::{echo, fetch, stream, web};
use crate::world::{Node, World, ensure, error_of, eventually, let_pass};

pub fn cases() -> Vec<Case> {
    vec![
        case("routes::a_subnet_is_reached_by_a_node_that_only_ran_up", subnet),
        case("routes::the_network_a_machine_is_in_is_never_taken", own_network),
        case("routes::a_firewall_that_drops_what_is_forwarded_is_opened_and_closed_again", firewall),
        case("routes::when_a_router_goes_another_takes_over", takes_over),
        case("routes::two_sites_without_address_translation", two_sites),
        case("routes::mistakes_are_named", mistakes),
        case("exit::all_traffic_goes_through_and_comes_back", exit_node),
        case("exit::it_can_be_chosen_while_joining", exit_node_at_once),
        case("exit::a_change_that_is_not_confirmed_is_taken_back", confirm),
    ]
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// ```text
///            coordinator .10/.11      web .40, 2001:db8::40
///                 │                    │
///  ───────────────┴────────────────────┴── internet 203.0.113.0/24 ──
///     │                       │
///  [NAT ra .21]            [NAT rb .22]
///     │ 192.168.21.0/24       │ 192.168.22.0/24, 2001:db8:22:0::/64
///     a .2                    b .2 (meshd), printer .3
/// ```
struct Site {
    world: World,
    home: Segment,
    office: Segment,
    a: Node,
    b: Node,
    printer: Namespace,
}

impl Site {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let ra = world.internet.router("ra", 21, Nat::Home)?;
        let rb = world.internet.router("rb", 22, Nat::Home)?;
        let a = Node::new("a", ra.lan.host("a", 2)?);
        let b = Node::new("b", rb.lan.host("b", 2)?);
        let printer = rb.lan.host("printer", 3)?;
        let site = Self { world, home: ra.lan, office: rb.lan, a, b, printer };
        for address in [site.office.v4(3), site.office.v6(3)] {
            web(&site.printer, at(&address, 80), "printer")?;
            echo(&site.printer, at(&address, 7))?;
        }
        Ok(site)
    }

    /// a founds the network, b joins it and leads to what it says.
    fn join(&self, b_up: &[&str]) -> Result<()> {
        self.a.up(&self.world.coordinator.claim()?)?;
        up(&self.b, &self.a.invite()?, b_up)
    }

    fn lans(&self) -> String {
        format!("192.168.22.0/24,{}", "2001:db8:22::/64")
    }
}

fn up(node: &Node, token: &str, args: &[&str]) -> Result<()> {
    let args = [&["up", "--name", &node.name][..], args].concat();
    node.namespace.run(node.meshd(&args).env("MESHD_TOKEN", token)).map(drop)
}

fn routes(node: &Node) -> Result<Vec<Value>> {
    let document: Value = serde_json::from_str(&node.run(&["routes", "--json"])?)?;
    Ok(document["routes"].as_array().cloned().unwrap_or_default())
}

/// Waits until a node sees a route of another in a state.
fn wait_for_route(node: &Node, prefix: &str, of: &str, state: &str) -> Result<()> {
    eventually(&format!("{prefix} of {of} is {state} on {}", node.name), Duration::from_secs(10), || {
        let routes = routes(node)?;
        let there = routes.iter().any(|r| r["prefix"] == prefix && r["node"] == of && r["state"] == state);
        ensure(there, || format!("{routes:?}"))
    })
}

fn page(machine: &Namespace, address: &str) -> Result<(String, String)> {
    fetch(machine, at(address, 80))
}

fn subnet() -> Result<()> {
    let site = Site::new()?;
    let (a, b) = (&site.a, &site.b);
    site.join(&["--advertise-routes", &site.lans()])?;
    wait_for_route(a, "192.168.22.0/24", "b", "pending")?;
    ensure(page(&a.namespace, "192.168.22.3").is_err(), || "it is reached without approval".to_owned())?;
    let health = serde_json::to_string(&b.status()?.health)?;
    ensure(health.contains("meshd routes approve b"), || format!("b does not say what to do: {health}"))?;
    a.run(&["routes", "approve", "b", "192.168.22.0/24"])?;
    a.run(&["routes", "approve", "b", "2001:db8:22::/64"])?;
    for address in ["192.168.22.3", "2001:db8:22::3"] {
        eventually("the printer's page", Duration::from_secs(10), || page(&a.namespace, address))?;
        // Under b's own address: the printer knows no other way back.
        let (text, from) = page(&a.namespace, address)?;
        ensure(text == "printer" && from == address.replace(".3", ".2").replace("::3", "::2"), || {
            format!("{text} {from}")
        })?;
        // An IPv6 router cuts no packet: the printer's first long answer only teaches it the tunnel's MTU.
        let lost = u32::from(!address.contains('.'));
        for (args, lost) in
            [(&["-c", "3", "-i", "0.1", "-W", "2"][..], 0), (&["-c", "3", "-s", "4000", "-W", "2"], lost)]
        {
            let seen = a.icmp(ip(address), args)?;
            ensure(seen.sent <= seen.received + lost, || format!("ping {args:?} {address}: {seen:?}"))?;
        }
        let back = stream(&a.namespace, at(address, 7), 200)?;
        ensure(back >= 199, || format!("{back} of 200 datagrams came back from {address}"))?;
    }
    // And the other way round nothing new is let in: the printer cannot begin a connection to a.
    let mesh = a.address(true)?;
    site.printer.ip(&format!("route add {mesh}/32 via {}", site.office.v4(2)))?;
    web(&a.namespace, SocketAddr::new(mesh, 80), "a")?;
    ensure(page(&site.printer, &mesh.to_string()).is_err(), || "the printer reaches into the mesh".to_owned())?;
    // A node that does not accept routes, and one that does again, without a restart.
    a.run(&["set", "--accept-routes=false"])?;
    eventually("the route is gone", Duration::from_secs(5), || {
        ensure(page(&a.namespace, "192.168.22.3").is_err(), || "it is still reached".to_owned())
    })?;
    a.run(&["set", "--accept-routes"])?;
    eventually("the route is back", Duration::from_secs(5), || page(&a.namespace, "192.168.22.3"))?;
    // Everything survives a restart of both, the coordinator being gone.
    let main = a.namespace.ip("route show table main")?;
    ensure(!main.contains("192.168.22.0"), || format!("the main table has it:\n{main}"))?;
    a.run(&["routes", "revoke", "b", "192.168.22.0/24"])?;
    eventually("it is taken back", Duration::from_secs(5), || {
        ensure(page(&a.namespace, "192.168.22.3").is_err(), || "it is still reached".to_owned())
    })?;
    a.run(&["routes", "approve", "b", "192.168.22.0/24"])?;
    wait_for_route(b, "192.168.22.0/24", "b", "active")?;
    drop(site.world.coordinator);
    for node in [a, b] {
        node.run(&["down"])?;
        node.run(&["up"])?;
    }
    eventually("without the coordinator", Duration::from_secs(20), || page(&a.namespace, "192.168.22.3")).map(drop)
}

fn own_network() -> Result<()> {
    let site = Site::new()?;
    // A hotel with the same numbers, and a printer of its own.
    let isp = site.world.internet.router("isp", 23, Nat::Home)?;
    let hotel = isp.lan.router("hotel", 22, Nat::Home)?;
    let c = Node::new("c", hotel.lan.host("c", 9)?);
    let other = hotel.lan.host("other", 3)?;
    web(&other, at("192.168.22.3", 80), "hotel")?;
    site.a.up(&site.world.coordinator.claim()?)?;
    let token = site.a.run(&["invite", "--routes", "192.168.22.0/24,192.168.0.0/16"])?;
    up(&site.b, token.trim(), &["--advertise-routes", "192.168.22.0/24,192.168.0.0/16"])?;
    c.up(&site.a.invite()?)?;
    wait_for_route(&c, "192.168.22.0/24", "b", "shadowed")?;
    // The wider one is used, but for what c is in.
    wait_for_route(&c, "192.168.0.0/16", "b", "active")?;
    for _ in 0..5 {
        let (text, _) = page(&c.namespace, "192.168.22.3")?;
        ensure(text == "hotel", || format!("c reached {text}"))?;
    }
    let why = c.run(&["routes"])?;
    ensure(why.contains("eth0 is in 192.168.22.0/24 itself"), || why)?;
    eventually("a reaches the office", Duration::from_secs(10), || {
        let (text, _) = page(&site.a.namespace, "192.168.22.3")?;
        ensure(text == "printer", || text)
    })
}

/// What Docker, ufw and firewalld do.
const CLOSED: &str = "table ip filter {\n chain FORWARD {\n  type filter hook forward priority filter; policy drop;\n  ct state \
                      invalid drop\n }\n}\ntable inet firewalld {\n chain filter_FORWARD {\n  type filter hook forward priority \
                      filter + 10; policy accept;\n  ct state established,related accept\n  reject with icmpx \
                      admin-prohibited\n }\n}\n";

fn firewall() -> Result<()> {
    let site = Site::new()?;
    site.b.namespace.nft(CLOSED)?;
    let before = picture(&site.b.namespace)?;
    site.a.up(&site.world.coordinator.claim()?)?;
    let token = site.a.run(&["invite", "--routes", "192.168.22.0/24"])?;
    up(&site.b, token.trim(), &["--advertise-routes", "192.168.22.0/24"])?;
    eventually("the printer's page", Duration::from_secs(10), || page(&site.a.namespace, "192.168.22.3"))?;
    let list = site.b.run(&["footprint"])?;
    for word in ["FORWARD", "filter_FORWARD", "meshd_mesh0", "forwarding", "address"] {
        ensure(list.contains(word), || format!("the footprint does not name {word}:\n{list}"))?;
    }
    site.b.run(&["down"])?;
    unchanged(&before, &picture(&site.b.namespace)?)?;
    let empty = site.b.run(&["footprint", "--json"])?;
    ensure(empty.contains(r#""changes":[]"#), || empty)
}

fn takes_over() -> Result<()> {
    let site = Site::new()?;
    let spare = Node::new("spare", site.office.host("spare", 4)?);
    site.a.up(&site.world.coordinator.claim()?)?;
    let token = site.a.run(&["invite", "--uses", "2", "--routes", "192.168.22.0/24"])?;
    for node in [&site.b, &spare] {
        up(node, token.trim(), &["--advertise-routes", "192.168.22.0/24"])?;
    }
    eventually("the printer's page", Duration::from_secs(10), || page(&site.a.namespace, "192.168.22.3"))?;
    let via = || -> Result<String> {
        let routes = routes(&site.a)?;
        Ok(routes.first().and_then(|r| r["via"].as_str()).unwrap_or_default().to_owned())
    };
    let first = via()?;
    let (gone, left) = if first == "b" { (&site.b, &spare) } else { (&spare, &site.b) };
    let (_, from) = page(&site.a.namespace, "192.168.22.3")?;
    let begin = Instant::now();
    gone.run(&["down"])?;
    let (_, by) = eventually("another router is asked", Duration::from_secs(3), || {
        let (text, by) = page(&site.a.namespace, "192.168.22.3")?;
        ensure(by != from, || format!("still by {by}"))?;
        Ok((text, by))
    })?;
    println!("the other router ({by}) was asked after {:?}", begin.elapsed());
    ensure(via()? == left.name, || format!("via {:?}", via()))?;
    // Back again: flows stay where they are.
    gone.run(&["up"])?;
    wait_for_route(gone, "192.168.22.0/24", &gone.name, "active")?;
    let_pass(Duration::from_secs(1));
    ensure(via()? == left.name, || "the packets moved back for nothing".to_owned())
}

fn two_sites() -> Result<()> {
    let site = Site::new()?;
    let camera = site.home.host("camera", 3)?;
    web(&camera, at("192.168.21.3", 80), "camera")?;
    // Each site's machines know the way to the other: by their own node.
    camera.ip(&format!("route add 192.168.22.0/24 via {}", site.home.v4(2)))?;
    site.printer.ip(&format!("route add 192.168.21.0/24 via {}", site.office.v4(2)))?;
    up(&site.a, &site.world.coordinator.claim()?, &["--advertise-routes", "192.168.21.0/24", "--snat=false"])?;
    let token = site.a.run(&["invite", "--routes", "192.168.22.0/24"])?;
    up(&site.b, token.trim(), &["--advertise-routes", "192.168.22.0/24", "--snat=false"])?;
    site.a.run(&["routes", "approve", "a", "192.168.21.0/24"])?;
    for (from, to, page_there) in [(&camera, "192.168.22.3", "printer"), (&site.printer, "192.168.21.3", "camera")] {
        let (text, seen) = eventually("the other site", Duration::from_secs(10), || page(from, to))?;
        let own = if page_there == "printer" { "192.168.21.3" } else { "192.168.22.3" };
        ensure(text == page_there && seen == own, || format!("{text}, seen as {seen}"))?;
    }
    Ok(())
}

fn mistakes() -> Result<()> {
    let site = Site::new()?;
    site.join(&[])?;
    let code = |node: &Node, args: &[&str], wanted: &str| -> Result<()> {
        let output = node.output(&[args, &["--json"]].concat())?;
        ensure(!output.status.success(), || format!("{args:?} succeeded"))?;
        let error = error_of(&output)?;
        let complete = error["code"] == wanted && error["hint"].as_str().is_some_and(|hint| !hint.is_empty());
        ensure(complete, || format!("{args:?}: {error}"))
    };
    code(&site.b, &["set", "--advertise-routes", "100.64.0.0/10"], "route-covers-mesh")?;
    code(&site.b, &["set", "--advertise-routes", "0.0.0.0/0"], "route-too-wide")?;
    code(&site.b, &["set", "--advertise-routes", "128.0.0.0/1"], "route-too-wide")?;
    code(&site.b, &["up", "--advertise-routes", "100.64.0.0/10"], "route-covers-mesh")?;
    code(&site.a, &["routes", "approve", "b", "100.64.0.0/10"], "route-covers-mesh")?;
    code(&site.a, &["routes", "approve", "bb", "10.0.0.0/8"], "no-such-peer")?;
    code(&site.a, &["routes", "revoke", "b", "10.0.0.0/8"], "no-such-route")?;
    code(&site.b, &["routes", "approve", "b", "10.0.0.0/8"], "not-an-admin")?;
    code(&site.a, &["set", "--exit-node", "b"], "no-exit-node")?;
    code(&site.a, &["set", "--confirm"], "nothing-to-confirm")?;
    code(&site.b, &["footprint", "--undo"], "already-running").or_else(|_| {
        // Nothing was changed that outlives the process: then there is nothing to refuse.
        site.b.run(&["footprint", "--undo"]).map(drop)
    })?;
    // A prefix that this machine has no way to itself is said.
    let token = site.a.run(&["invite", "--routes", "172.30.0.0/16"])?;
    let c = Node::new("c", site.world.internet.host("c", 41)?);
    up(&c, token.trim(), &["--advertise-routes", "172.30.0.0/16"])?;
    eventually("c says that it has no way there", Duration::from_secs(5), || {
        let health = serde_json::to_string(&c.status()?.health)?;
        ensure(health.contains("route-leads-nowhere"), || health)
    })
}

/// The site with a gate in the office, a camera beside a, and a web server on the Internet that knows the way back.
fn gated() -> Result<(Site, Node)> {
    let site = Site::new()?;
    let internet = &site.world.internet;
    let gate = Node::new("gate", site.office.host("gate", 5)?);
    let server = internet.host("web", 40)?;
    for (lan, router) in [(21, 21), (22, 22)] {
        server.ip(&format!("-6 route add 2001:db8:{lan}::/64 via {}", internet.v6(router)))?;
    }
    for address in [internet.v4(40), internet.v6(40)] {
        web(&server, at(&address, 80), "web")?;
    }
    let camera = site.home.host("camera", 3)?;
    web(&camera, at("192.168.21.3", 80), "camera")?;
    site.join(&[])?;
    up(&gate, &site.a.invite()?, &["--advertise-exit-node"])?;
    for prefix in ["0.0.0.0/0", "::/0"] {
        wait_for_route(&site.a, prefix, "gate", "pending")?;
    }
    site.a.run(&["routes", "approve", "gate", "exit-node"])?;
    wait_for_route(&site.a, "::/0", "gate", "approved")?;
    wait_for_route(&gate, "::/0", "gate", "active")?;
    Ok((site, gate))
}

fn exit_node() -> Result<()> {
    let (site, gate) = gated()?;
    let a = &site.a;
    let internet = &site.world.internet;
    let (v4, v6) = (internet.v4(40), internet.v6(40));
    let before = picture(&a.namespace)?;
    let seen = |address: &str| page(&a.namespace, address).map(|(_, from)| from);
    let (own4, own6, gate4, gate6) = (internet.v4(21), site.home.v6(2), internet.v4(22), site.office.v6(5));
    let is = |address: &str, wanted: &str| -> Result<()> {
        let (from, wanted) = (ip(&seen(address)?), ip(wanted));
        ensure(from == wanted, || format!("{address} saw {from}, not {wanted}"))
    };
    is(&v4, &own4)?;
    is(&v6, &own6)?;
    a.run(&["set", "--exit-node", "gate"])?;
    for (address, through) in [(&v4, &gate4), (&v6, &gate6)] {
        eventually("all traffic goes through the gate", Duration::from_secs(10), || is(address, through))?;
    }
    ensure(page(&a.namespace, "192.168.21.3")?.0 == "camera", || "the own network is lost".to_owned())?;
    for inside in ["192.168.22.3", &site.office.v6(3)] {
        ensure(page(&a.namespace, inside).is_err(), || format!("the gate leads to its neighbour {inside}"))?;
    }
    let status = a.status()?;
    ensure(status.coordinator.connected, || "the coordinator is lost".to_owned())?;
    a.run(&["set", "--exit-node-allow-lan-access=false"])?;
    eventually("the own network is cut off", Duration::from_secs(5), || {
        ensure(page(&a.namespace, "192.168.21.3").is_err(), || "it is still reached".to_owned())
    })?;
    is(&v4, &gate4)?;
    a.run(&["set", "--exit-node-allow-lan-access", "--kill-switch"])?;
    eventually("the own network is back", Duration::from_secs(5), || page(&a.namespace, "192.168.21.3"))?;
    // The exit node goes: nothing leaves beside it.
    gate.run(&["down"])?;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        ensure(seen(&v4).is_err() && seen(&v6).is_err(), || "traffic leaves beside the exit node".to_owned())?;
    }
    gate.run(&["up"])?;
    eventually("the gate is back", Duration::from_secs(10), || seen(&v4))?;
    // Not even when the daemon is killed.
    kill(Pid::from_raw(i32::try_from(a.pid()?)?), Signal::SIGKILL)?;
    eventually("it is dead", Duration::from_secs(5), || ensure(a.pid().is_err(), || "it holds its lock".to_owned()))?;
    ensure(seen(&v4).is_err() && seen(&v6).is_err(), || "the kill switch does not hold".to_owned())?;
    a.run(&["up"])?;
    eventually("the gate is used after a restart", Duration::from_secs(10), || is(&v4, &gate4))?;
    a.run(&["set", "--exit-node", "none"])?;
    eventually("it is as before", Duration::from_secs(5), || is(&v4, &own4))?;
    is(&v6, &own6)?;
    // Everything but the interface, which is still up, and another one since the restart.
    let own = |line: &&str| line.contains("mesh0") || line.contains("fe80::");
    let strip = |text: &str| text.lines().filter(|line| !own(line)).collect::<Vec<_>>().join("\n");
    unchanged(&strip(&before), &strip(&picture(&a.namespace)?))
}

/// Nothing of a node that joins has left beside the exit node it joins with, once it is up.
fn exit_node_at_once() -> Result<()> {
    let (site, _gate) = gated()?;
    let c = Node::new("c", site.home.host("c", 7)?);
    up(&c, &site.a.invite()?, &["--exit-node", "gate", "--kill-switch"])?;
    let v4 = site.world.internet.v4(40);
    let (_, from) = eventually("the web sees the gate", Duration::from_secs(10), || page(&c.namespace, &v4))?;
    ensure(from == site.world.internet.v4(22), || format!("it saw {from}"))?;
    // One that is none is refused.
    let d = Node::new("d", site.home.host("d", 8)?);
    ensure(up(&d, &site.a.invite()?, &["--exit-node", "b"]).is_err(), || "b was taken for an exit node".to_owned())
}

fn confirm() -> Result<()> {
    let (site, _gate) = gated()?;
    let a = &site.a;
    let exit = || -> Result<Value> {
        let set: Value = serde_json::from_str(&a.run(&["set", "--json"])?)?;
        Ok(set["exit_node"].clone())
    };
    a.run(&["set", "--exit-node", "gate", "--confirm", "2s"])?;
    ensure(exit()? == "gate", || "it is not set".to_owned())?;
    eventually("it is taken back", Duration::from_secs(6), || ensure(exit()?.is_null(), || "still set".to_owned()))?;
    a.run(&["set", "--exit-node", "gate", "--confirm", "2s"])?;
    a.run(&["set", "--confirm"])?;
    let_pass(Duration::from_millis(3_500));
    ensure(exit()? == "gate", || "a confirmed change was taken back".to_owned())?;
    // A daemon that dies on trial comes back as it was before.
    a.run(&["set", "--exit-node", "none", "--confirm", "10m"])?;
    kill(Pid::from_raw(i32::try_from(a.pid()?)?), Signal::SIGKILL)?;
    eventually("it is dead", Duration::from_secs(5), || ensure(a.pid().is_err(), || "it holds its lock".to_owned()))?;
    a.run(&["up"])?;
    ensure(exit()? == "gate", || "an unconfirmed change survived a restart".to_owned())
}

//! Several networks with the same numbers, reached at once by their aliases.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat, Segment};
use serde_json::Value;

use crate::machine::need;
use crate::runner::{Case, case};
use crate::services::{echo, fetch, stream, web};
use crate::world::{Node, World, ensure, error_of, eventually};

pub fn cases() -> Vec<Case> {
    vec![
        case("sites::three_networks_with_the_same_numbers_are_reached_at_once", three),
        case("sites::by_alias_and_by_its_own_numbers_at_once", both),
        case("sites::machines_of_two_networks_with_the_same_numbers_reach_each_other", joined),
    ]
}

/// The numbers that all of them have.
const LAN: &str = "192.168.22.0/24";

/// A network 192.168.22.0/24 behind two NATs, with a node .2 that leads to it, and a web server and an echo at .3.
struct Site {
    name: &'static str,
    node: Node,
    server: Namespace,
}

impl Site {
    fn new(world: &World, name: &'static str, number: u8) -> Result<Self> {
        let lan = same_numbers(world, name, number)?;
        let node = Node::new(name, lan.host(name, 2)?);
        let server = lan.host(&format!("web-{name}"), 3)?;
        web(&server, at(&lan.v4(3), 80), &format!("{name}{}", ".".repeat(200_000)))?;
        echo(&server, at(&lan.v4(3), 7))?;
        Ok(Self { name, node, server })
    }

    fn up(&self, token: &str, more: &[&str]) -> Result<()> {
        let up = [&["up", "--name", self.name, "--advertise-routes", LAN], more].concat();
        self.node.namespace.run(self.node.meshd(&up).env("MESHD_TOKEN", token)).map(drop)
    }
}

fn same_numbers(world: &World, name: &str, number: u8) -> Result<Segment> {
    let outer = world.internet.router(&format!("isp-{name}"), number, Nat::Home)?;
    Ok(outer.lan.router(&format!("nat-{name}"), 22, Nat::Home)?.lan)
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Which site's page it is, complete.
fn page(machine: &Namespace, address: &str) -> Result<(String, String)> {
    let (text, from) = fetch(machine, at(address, 80))?;
    let name = text.trim_end_matches('.').to_owned();
    ensure(text.len() == name.len() + 200_000, || format!("{} bytes of {name}", text.len()))?;
    Ok((name, from))
}

/// Gives a site an alias; the address of its server there.
fn alias(admin: &Node, site: &str) -> Result<String> {
    let said: Value = serde_json::from_str(&admin.run(&["routes", "alias", site, LAN, "--json"])?)?;
    let alias = said["alias"].as_str().context("no alias")?;
    Ok(alias.replace(".0/24", ".3"))
}

/// A machine with an `/etc/resolv.conf` of its own, as `ip netns exec` makes it.
fn with_resolver(name: &str, namespace: Namespace) -> Result<Node> {
    let mut node = Node::new(name, namespace);
    let script = format!("/run/lab/meshd-{name}");
    fs::write("/run/lab/resolv.conf", "search lan\n")?;
    let program =
        format!("mount --bind /run/lab/resolv.conf /etc/resolv.conf && exec {} \"$@\"", node.binary.display());
    fs::write(&script, format!("#!/bin/sh\nexec unshare --mount sh -c '{program}' meshd \"$@\"\n"))?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    node.binary = script.into();
    Ok(node)
}

/// Runs a shell command on a machine that sees that file.
fn shell(node: &Node, command: &str) -> Result<String> {
    let program = format!("mount --bind /run/lab/resolv.conf /etc/resolv.conf && {command}");
    node.namespace.run(Command::new("unshare").args(["--mount", "bash", "-c", &program]))
}

/// Fetches by name, as a program does.
fn by_name(node: &Node, name: &str) -> Result<String> {
    let page = shell(node, &format!("curl -sS --max-time 20 http://{name}/"))?;
    ensure(page.len() > 200_000, || format!("{} bytes of {name}", page.len()))?;
    Ok(page.split('.').next().unwrap_or_default().to_owned())
}

/// The client is itself in a network with these numbers, and has a printer there.
fn three() -> Result<()> {
    need(&[("curl", "curl"), ("ping", "iputils-ping")])?;
    let world = World::new()?;
    let sites = [("one", 31), ("two", 32), ("three", 33)].map(|(name, number)| Site::new(&world, name, number));
    let sites: Vec<Site> = sites.into_iter().collect::<Result<_>>()?;
    let home = same_numbers(&world, "home", 34)?;
    let c = with_resolver("c", home.host("c", 9)?)?;
    let printer = home.host("printer", 3)?;
    web(&printer, at("192.168.22.3", 80), &format!("printer{}", ".".repeat(200_000)))?;
    c.up(&world.coordinator.claim()?)?;
    let token = c.run(&["invite", "--uses", "3", "--routes", LAN])?;
    for site in &sites {
        site.up(token.trim(), &[])?;
    }
    // Nothing is guessed: it is said, with the command.
    eventually("it is said how to tell them apart", Duration::from_secs(10), || {
        let routes = c.run(&["routes"])?;
        ensure(routes.contains("meshd routes alias") || routes.matches("shadowed").count() >= 3, || routes)
    })?;
    let token = c.invite()?;
    let outside = Node::new("outside", world.internet.host("outside", 45)?);
    outside.up(&token)?;
    eventually("a node elsewhere is told the command", Duration::from_secs(10), || {
        let routes = outside.run(&["routes"])?;
        ensure(routes.contains("`meshd routes alias") && routes.contains("192.168.22.0/24`"), || routes)
    })?;
    let servers: Vec<String> = sites.iter().map(|site| alias(&c, site.name)).collect::<Result<_>>()?;
    let unsaid = error_of(&c.output(&["dns", "add", "web.lan", "192.168.22.3", "--json"])?)?;
    ensure(unsaid["code"] == "several-networks", || unsaid.to_string())?;
    for site in &sites {
        c.run(&["dns", "add", &format!("web.{}", site.name), "192.168.22.3", "--at", site.name])?;
    }
    for (site, server) in sites.iter().zip(&servers) {
        eventually(&format!("{server} is {}", site.name), Duration::from_secs(15), || {
            let (name, from) = page(&c.namespace, server)?;
            ensure(name == site.name && from == "192.168.22.2", || format!("{name}, seen as {from}"))
        })?;
    }
    // All at once, by alias and by name, again and again.
    std::thread::scope(|scope| {
        let mut fetching = Vec::new();
        for (site, server) in sites.iter().zip(&servers) {
            for by in ["alias", "name"] {
                let c = &c;
                fetching.push(scope.spawn(move || -> Result<()> {
                    for _ in 0..5 {
                        let name = match by {
                            "alias" => page(&c.namespace, server)?.0,
                            _ => by_name(c, &format!("web.{}", site.name))?,
                        };
                        ensure(name == site.name, || format!("{} by {by} is {name}", site.name))?;
                    }
                    Ok(())
                }));
            }
        }
        fetching.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a thread died"))?)
    })?;
    for (site, server) in sites.iter().zip(&servers) {
        let found = shell(&c, &format!("getent hosts {server}"))?;
        ensure(found.contains(&format!("web.{}", site.name)), || format!("{server} is {found}"))?;
        let to: IpAddr = server.parse()?;
        // Fragments, a stream of datagrams, and an error that quotes what was sent.
        for args in [&["-c", "3", "-i", "0.1", "-W", "2"][..], &["-c", "3", "-s", "4000", "-W", "2"]] {
            let seen = c.icmp(to, args)?;
            ensure(seen.sent == seen.received, || format!("ping {args:?} {server}: {seen:?}"))?;
        }
        let back = stream(&c.namespace, at(server, 7), 100)?;
        ensure(back >= 99, || format!("{back} of 100 datagrams came back from {server}"))?;
        let refused = c.namespace.enter(|| -> Result<std::io::ErrorKind> {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(at(server, 9))?;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            socket.send(b"is anybody there")?;
            Ok(socket.recv(&mut [0; 10]).err().map_or(std::io::ErrorKind::Other, |e| e.kind()))
        })??;
        ensure(refused == std::io::ErrorKind::ConnectionRefused, || format!("{server}: {refused:?}"))?;
    }
    // The machine beside the client is still its own.
    ensure(page(&c.namespace, "192.168.22.3")?.0 == "printer", || "the printer was taken".to_owned())?;
    // A site reaches another one that looks the same.
    eventually("one reaches two", Duration::from_secs(10), || {
        let (name, _) = page(&sites[0].node.namespace, &servers[1])?;
        ensure(name == "two", || name)
    })?;
    Ok(())
}

/// A client elsewhere uses the network's own numbers and its alias in turn and at once.
fn both() -> Result<()> {
    let world = World::new()?;
    let site = Site::new(&world, "one", 31)?;
    let c = with_resolver("c", world.internet.host("c", 41)?)?;
    c.up(&world.coordinator.claim()?)?;
    let token = c.run(&["invite", "--routes", LAN])?;
    site.up(token.trim(), &[])?;
    let server = alias(&c, "one")?;
    for address in ["192.168.22.3", &server] {
        eventually(address, Duration::from_secs(15), || page(&c.namespace, address))?;
    }
    std::thread::scope(|scope| {
        let fetching: Vec<_> = ["192.168.22.3", &server]
            .into_iter()
            .map(|address| {
                let c = &c;
                scope.spawn(move || (0..10).try_for_each(|_| page(&c.namespace, address).map(drop)))
            })
            .collect();
        fetching.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a thread died"))?)
    })?;
    // Its name is its own number here, and the alias is that name too.
    c.run(&["dns", "add", "web.one", "192.168.22.3"])?;
    eventually("the name", Duration::from_secs(5), || {
        let found = shell(&c, "getent ahostsv4 web.one")?;
        ensure(found.starts_with("192.168.22.3"), || found)
    })?;
    let found = shell(&c, &format!("getent hosts {server}"))?;
    ensure(found.contains("web.one"), || found)?;
    // Without the alias its numbers lead nowhere.
    c.run(&["routes", "alias", "one", LAN, "none"])?;
    eventually("the alias is gone", Duration::from_secs(5), || {
        ensure(page(&c.namespace, &server).is_err(), || "it is still there".to_owned())
    })?;
    page(&c.namespace, "192.168.22.3").map(drop)
}

/// The network of a server's alias.
fn network(server: &str) -> String {
    format!("{}.0/24", server.strip_suffix(".3").unwrap_or(server))
}

/// Neither network knows of the other's numbers: each sees the other's machines under their aliases.
fn joined() -> Result<()> {
    let world = World::new()?;
    let (one, two) = (Site::new(&world, "one", 31)?, Site::new(&world, "two", 32)?);
    one.up(&world.coordinator.claim()?, &["--snat=false"])?;
    let admin = &one.node;
    let token = admin.run(&["invite", "--routes", LAN])?;
    two.up(token.trim(), &["--snat=false"])?;
    admin.run(&["routes", "approve", "one", LAN])?;
    let (first, second) = (alias(admin, "one")?, alias(admin, "two")?);
    for (site, other) in [(&one, &second), (&two, &first)] {
        site.server.ip(&format!("route add {} via 192.168.22.2", network(other)))?;
    }
    for (site, to, wanted, seen) in [(&one, &second, "two", &first), (&two, &first, "one", &second)] {
        let (name, from) =
            eventually(&format!("{} reaches {to}", site.name), Duration::from_secs(15), || page(&site.server, to))?;
        ensure(name == wanted && from == *seen, || format!("{name}, seen as {from}"))?;
    }
    Ok(())
}

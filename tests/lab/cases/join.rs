//! Joining, and the first packet.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use meshd::wire::local::PathKind;

use crate::net;
use crate::runner::{Case, case};
use crate::world::{Node, ensure, wait_for_peers};

/// A relay round trip in the topologies with delay: 30 ms to the coordinator and 30 on, both ways.
const RELAY_RTT: Duration = Duration::from_millis(120);

pub fn cases() -> Vec<Case> {
    vec![
        case("join::up_returns_within_three_seconds_and_says_what_is_up", up_is_quick),
        case("join::up_twice_is_harmless", up_twice),
        case("join::a_token_file_works_and_no_token_stays_in_ps", token_file),
        case("join::an_invite_for_three_admits_three", three_uses),
        case("first_packet::right_after_up_it_is_answered", right_after_up),
        case("first_packet::icmp_is_answered_and_not_lost", first_icmp),
        case("first_packet::meshd_ping_is_answered", first_meshd_ping),
    ]
}

fn up_is_quick() -> Result<()> {
    let lab = net::public()?;
    let [a, b, c] = ["a", "b", "c"].map(|name| Node::new(name, namespace(&lab, name)));
    let mut token = lab.world.coordinator.claim()?;
    for node in [&a, &b, &c] {
        let start = Instant::now();
        let said = node.up(&token)?;
        let took = start.elapsed();
        ensure(took <= Duration::from_secs(3), || format!("up on {} took {took:?}", node.name))?;
        let status = node.status()?;
        ensure(status.me.name == node.name, || format!("{} is called {}", node.name, status.me.name))?;
        ensure(status.me.addresses.len() == 2, || format!("addresses: {:?}", status.me.addresses))?;
        for word in status.me.addresses.iter().map(ToString::to_string).chain([node.name.clone()]) {
            ensure(said.contains(&word), || format!("up does not print {word}:\n{said}"))?;
        }
        token = a.invite()?;
    }
    wait_for_peers(&c, 2)?;
    let status = b.output(&["up"])?;
    let text = String::from_utf8_lossy(&status.stdout);
    ensure(text.contains("a ") && text.contains("c "), || format!("up does not list the peers:\n{text}"))
}

fn up_twice() -> Result<()> {
    let lab = net::public()?;
    let nodes = lab.join()?;
    let before = nodes[1].pid()?;
    let output = nodes[1].output(&["up"])?;
    ensure(output.status.success(), || String::from_utf8_lossy(&output.stderr).into_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure(said.contains("already up"), || format!("it does not say so: {said}"))?;
    ensure(nodes[1].pid()? == before, || "another daemon runs now".to_owned())
}

fn token_file() -> Result<()> {
    let lab = net::public()?;
    let [a, b, c] = ["a", "b", "c"].map(|name| Node::new(name, namespace(&lab, name)));
    a.up(&lab.world.coordinator.claim()?)?;
    let file = "/run/lab/token";
    std::fs::write(file, a.invite()? + "\n")?;
    b.run(&["up", "--name", "b", "--token-file", file])?;
    // As an argument, in the foreground: the process that stays must not show it.
    let token = a.invite()?;
    let mut command = c.meshd(&["up", "--name", "c", "--foreground", &token]);
    let mut daemon = c.namespace.spawn(&mut command, "/run/lab/c.log".as_ref())?;
    crate::world::eventually("c is up", Duration::from_secs(10), || {
        ensure(c.status()?.coordinator.connected, || "not connected".to_owned())
    })?;
    let pids = [a.pid()?, b.pid()?, c.pid()?, daemon.id()];
    for pid in pids {
        for file in ["cmdline", "environ"] {
            let text = std::fs::read(format!("/proc/{pid}/{file}"))?;
            let text = String::from_utf8_lossy(&text);
            let found = text.contains("meshd-invite1-") || text.contains("meshd-claim1-");
            ensure(!found, || format!("a token is in /proc/{pid}/{file}: {text:?}"))?;
        }
    }
    ensure(c.pid()? == daemon.id(), || "the daemon is not the process that was started".to_owned())?;
    c.run(&["down"])?;
    daemon.wait()?;
    Ok(())
}

fn three_uses() -> Result<()> {
    let lab = net::public()?;
    let [a, b, c] = ["a", "b", "c"].map(|name| Node::new(name, namespace(&lab, name)));
    a.up(&lab.world.coordinator.claim()?)?;
    let token = a.run(&["invite", "--uses", "2"])?;
    b.up(token.trim())?;
    c.up(token.trim())?;
    let d = Node::new("d", lab.world.internet.host("d", 34)?);
    let refused = d.namespace.output(d.meshd(&["up", "--json"]).env("MESHD_TOKEN", token.trim()))?;
    ensure(!refused.status.success(), || "a third machine joined with an invite for two".to_owned())?;
    let error = crate::world::error_of(&refused)?;
    ensure(error["code"] == "already-used", || format!("{error}"))
}

/// Nobody waits for anything here: the founder pings as soon as `up` has returned on the other machine.
fn right_after_up() -> Result<()> {
    let lab = net::symmetric()?;
    let [a, b] = ["a", "b"].map(|name| Node::new(name, namespace(&lab, name)));
    a.up(&lab.world.coordinator.claim()?)?;
    b.up(&a.invite()?)?;
    let seen = a.icmp(b.address(true)?, &["-c", "1", "-W", "5"])?;
    ensure(seen.received == 1, || "the first packet was lost".to_owned())?;
    let (code, pongs) = b.ping("a", &["-c", "1"])?;
    ensure(code == 0, || format!("a ping back was lost: {pongs:?}"))
}

fn first_icmp() -> Result<()> {
    let lab = net::symmetric()?;
    let nodes = lab.join()?;
    for v4 in [true, false] {
        // The first direction of each family is a first packet only once; the second family finds a session.
        let to = nodes[1].address(v4)?;
        let seen = nodes[0].icmp(to, &["-c", "1", "-W", "5"])?;
        ensure(seen.received == 1, || format!("the first ping to {to} was lost"))?;
        let limit = (RELAY_RTT * 3 + Duration::from_millis(50)).as_secs_f64() * 1000.0;
        ensure(seen.worst <= limit, || format!("the first ping to {to} took {} ms of {limit}", seen.worst))?;
    }
    ensure(nodes[0].path("b")? == PathKind::Relay, || "the path is not relayed".to_owned())
}

fn first_meshd_ping() -> Result<()> {
    let lab = net::home_nat()?;
    let nodes = lab.world.join(&[("laptop", &namespace(&lab, "a")), ("printer", &namespace(&lab, "b"))])?;
    let start = Instant::now();
    let (code, pongs) = nodes[0].ping("printer", &["-c", "1"])?;
    let took = start.elapsed();
    let pong = pongs.first().context("no answer was printed")?;
    ensure(code == 0 && pong.answered, || format!("exit code {code}, {pong:?}"))?;
    // The process's own start counts too, as it does for a person.
    let limit = RELAY_RTT * 3 + Duration::from_millis(50);
    let rtt = pong.rtt_ms.unwrap_or(f64::INFINITY);
    ensure(rtt <= limit.as_secs_f64() * 1000.0, || format!("it took {rtt} ms, {took:?} with the command's start"))?;
    let human = nodes[0].run(&["ping", "-c", "1", "printer"])?;
    ensure(human.starts_with("pong from printer (100."), || format!("the line reads {human}"))?;
    let by_address = nodes[0].address(true)?.to_string();
    nodes[1].run(&["ping", "-c", "1", &by_address])?;
    let unknown = nodes[0].output(&["ping", "-c", "1", "pritner"])?;
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure(unknown.status.code() == Some(2) && said.contains("printer"), || format!("an unknown peer: {said}"))
}

pub(super) fn namespace(lab: &net::Topology, name: &str) -> meshd::cli::demo::net::Namespace {
    lab.machines.iter().find(|(known, _)| *known == name).map(|(_, machine)| machine.clone()).unwrap()
}

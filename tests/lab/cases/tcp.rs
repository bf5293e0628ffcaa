//! Direct connections by TCP where a router lets no UDP out.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat};
use meshd::wire::local::PathKind;

use crate::net::{Topology, public_nat, two_homes};
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, ensure, eventually, until, wait_for_peers};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp::direct_between_two_homes_when_one_has_no_udp", || meets(homes(Nat::Home)?)),
        case("tcp::direct_between_routers_without_a_firewall", || meets(homes(Nat::OpenInput)?)),
        case("tcp::direct_to_a_public_address", || {
            let (lab, router) = to_public()?;
            shut(&router)?;
            meets((lab, router))
        }),
        case("tcp::a_dead_connection_is_left_for_the_relay_and_made_again", dies),
        case("tcp::udp_takes_over_when_it_comes_back", udp_comes_back),
        case("tcp::strangers_are_closed_unanswered", strangers),
    ]
}

/// Meetings of one pair.
const MEETINGS: usize = 5;

/// No UDP gets further than this router.
fn shut(router: &Namespace) -> Result<()> {
    router.nft("table inet shut {\n chain f {\n type filter hook forward priority -10\n meta l4proto udp drop\n }\n}\n")
}

/// Two homes as everywhere; the first router, which lets no UDP out.
fn homes(nat: Nat) -> Result<(Topology, Namespace)> {
    let (lab, ra, _) = two_homes(nat, nat, Duration::from_millis(20))?;
    shut(&ra.namespace)?;
    Ok((lab, ra.namespace))
}

/// A machine with a public address, and one behind a router.
fn to_public() -> Result<(Topology, Namespace)> {
    let mut lab = public_nat()?;
    let router = lab.world.internet.router("rc", 23, Nat::Home)?;
    lab.machines[1] = ("b", router.lan.host("b2", 2)?);
    Ok((lab, router.namespace))
}

fn by_tcp(node: &Node, peer: &str) -> Result<bool> {
    let path = node.peer(peer)?.path;
    Ok(path.kind == PathKind::Direct && path.tcp == Some(true))
}

fn both_by_tcp(nodes: &[Node], patience: Duration) -> Result<()> {
    until("both sides use a TCP connection", patience, || {
        Ok((by_tcp(&nodes[0], "b")? && by_tcp(&nodes[1], "a")?).then_some(()))
    })
}

/// Started anew each time, both find the other by TCP, by the words of every command, and lose nothing on the way.
fn meets((lab, _router): (Topology, Namespace)) -> Result<()> {
    let nodes = lab.join()?;
    let to = nodes[1].address(true)?;
    let mut seen = Vec::new();
    for n in 0..MEETINGS {
        if n > 0 {
            nodes[0].run(&["down"])?;
            nodes[0].run(&["up"])?;
            wait_for_peers(&nodes[0], 1)?;
        }
        until("a lack of UDP is known", Duration::from_secs(20), || {
            Ok((nodes.iter().any(|node| node.status().is_ok_and(|s| s.nat.udp == Some(false)))).then_some(()))
        })?;
        let start = Instant::now();
        let pings = nodes[0].start_icmp(to, &["-q", "-c", "400", "-i", "0.02", "-W", "5"])?;
        both_by_tcp(&nodes, Duration::from_secs(20))?;
        seen.push(start.elapsed().as_millis());
        let answers = Icmp::wait(pings, Duration::from_secs(40))?;
        ensure(answers.received == 400, || format!("meeting {n}: {answers:?}"))?;
    }
    println!("by TCP both ways after {seen:?} ms, {MEETINGS} of {MEETINGS}");
    let (code, pongs) = nodes[0].ping("b", &["-c", "1"])?;
    ensure(code == 0 && pongs.iter().all(|p| p.tcp == Some(true)), || format!("{pongs:?}"))?;
    let why = nodes[0].run(&["why", "b"])?;
    ensure(why.contains("TCP"), || format!("meshd why does not say so:\n{why}"))?;
    let table = nodes[0].run(&["status"])?;
    ensure(table.contains("direct, TCP"), || format!("the table does not say so:\n{table}"))?;
    // Bulk both ways: what does not fit is dropped by name, and the connection lives.
    let seen = nodes[0].icmp(to, &["-q", "-c", "300", "-i", "0.002", "-s", "1200", "-W", "5"])?;
    ensure(seen.received >= 299, || format!("{seen:?}"))
}

fn dies() -> Result<()> {
    let (lab, router) = homes(Nat::Home)?;
    let nodes = lab.join()?;
    let pings = nodes[0].start_icmp(nodes[1].address(true)?, &["-q", "-c", "1500", "-i", "0.02", "-W", "5"])?;
    both_by_tcp(&nodes, Duration::from_secs(20))?;
    let hole = |which: &str| format!(" ip {which} 203.0.113.22 meta l4proto tcp drop\n");
    router.nft(&format!(
        "table inet hole {{\n chain f {{\n type filter hook forward priority -10\n{}{} }}\n}}\n",
        hole("daddr"),
        hole("saddr")
    ))?;
    let cut = Instant::now();
    until("the relay carries", Duration::from_secs(10), || Ok((nodes[0].path("b")? == PathKind::Relay).then_some(())))?;
    println!("relayed {:?} after the connection was cut", cut.elapsed());
    router.nft("delete table inet hole\n")?;
    both_by_tcp(&nodes, Duration::from_secs(60))?;
    println!("a new connection {:?} after that", cut.elapsed());
    let answers = Icmp::wait(pings, Duration::from_secs(60))?;
    println!("{} of {} pings lost", answers.sent - answers.received, answers.sent);
    // Fifty a second: what was under way in the second of silence.
    ensure(answers.received + 65 >= answers.sent, || format!("{answers:?}"))
}

fn udp_comes_back() -> Result<()> {
    let (lab, router) = homes(Nat::Home)?;
    let nodes = lab.join()?;
    let pings = nodes[0].start_icmp(nodes[1].address(true)?, &["-q", "-c", "2500", "-i", "0.02", "-W", "5"])?;
    both_by_tcp(&nodes, Duration::from_secs(20))?;
    router.nft("delete table inet shut\n")?;
    let opened = Instant::now();
    until("both sides use UDP", Duration::from_secs(45), || {
        let udp = |node: &Node, peer: &str| -> Result<bool> {
            let path = node.peer(peer)?.path;
            Ok(path.kind == PathKind::Direct && path.tcp == Some(false))
        };
        Ok((udp(&nodes[0], "b")? && udp(&nodes[1], "a")?).then_some(()))
    })?;
    println!("by UDP {:?} after it was let out", opened.elapsed());
    let answers = Icmp::wait(pings, Duration::from_secs(90))?;
    ensure(answers.received + 2 >= answers.sent, || format!("{answers:?}"))
}

/// The port is closed until it is needed. Then whoever connects and is no peer is told nothing, and is rid of soon.
fn strangers() -> Result<()> {
    let (lab, router) = to_public()?;
    shut(&router)?;
    let nodes = lab.join()?;
    let stranger = lab.world.internet.host("stranger", 66)?;
    let to = SocketAddr::new("203.0.113.31".parse::<IpAddr>()?, nodes[0].status()?.me.port);
    let connect = || stranger.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
    ensure(connect()?.is_err(), || "it listens although nobody needs it".to_owned())?;
    nodes[1].ping("a", &["-c", "5", "--interval", "200ms"])?;
    until("both sides use a TCP connection", Duration::from_secs(20), || {
        nodes[1].ping("a", &["-c", "1"])?;
        Ok((by_tcp(&nodes[0], "b")? && by_tcp(&nodes[1], "a")?).then_some(()))
    })?;
    for first in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &b"\x00\x20\x04\x00\x00\x00"[..], &b"\xff\xff"[..], &b""[..]]
    {
        let mut stream = connect()?.context("cannot connect")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(first)?;
        let begun = Instant::now();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        let closed = end.as_ref().map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |_| true);
        ensure(closed && rest.is_empty(), || format!("after {first:?}: {end:?}, {} bytes", rest.len()))?;
        ensure(begun.elapsed() < Duration::from_secs(9), || format!("only after {:?}", begun.elapsed()))?;
    }
    // A crowd of them; the peer's connection goes on.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.extend(connect()?.ok());
    }
    eventually("they are counted", Duration::from_secs(15), || {
        let drops = nodes[0].run(&["status", "--drops"])?;
        ensure(drops.contains("stream-refused"), || drops)
    })?;
    drop(crowd);
    let seen = nodes[1].icmp(nodes[0].address(true)?, &["-q", "-c", "20", "-i", "0.02", "-W", "5"])?;
    ensure(seen.received == 20 && by_tcp(&nodes[1], "a")?, || format!("{seen:?}"))
}

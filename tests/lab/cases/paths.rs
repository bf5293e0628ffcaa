//! Which way packets go, and that none is lost when the way changes.

use std::time::{Duration, Instant};

use anyhow::Result;
use meshd::cli::demo::net::{Namespace, Nat, Segment};
use meshd::wire::local::PathKind;

use crate::net::{self, Topology};
use crate::runner::{Case, case};
use crate::world::{Coordinator, Icmp, World, ensure, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("upgrade::home_nat_to_home_nat_within_two_seconds_without_loss", || upgrade(net::home_nat()?)),
        case("upgrade::routers_without_a_firewall", || upgrade(net::open_input()?)),
        case("relay::symmetric_to_symmetric_stays_relayed_and_says_why", || stays_relayed(&net::symmetric()?)),
        case("direct::same_lan_by_lan_address", same_lan),
        case("direct::public_to_nat", || becomes_direct(&net::public_nat()?)),
        case("direct::home_to_symmetric", || becomes_direct(&net::one_symmetric()?)),
        case("direct::double_nat", || becomes_direct(&net::double_nat()?)),
        case("direct::two_public_addresses", || becomes_direct(&net::public()?)),
        case("direct::ipv6_only_behind_firewalls", ipv6_only),
        case("traffic::tcp_carries_a_megabyte_both_ways", tcp),
    ]
}

fn upgrade(lab: Topology) -> Result<()> {
    let nodes = lab.join()?;
    let to = nodes[1].address(true)?;
    let start = Instant::now();
    let pings = nodes[0].start_icmp(to, &["-q", "-c", "500", "-i", "0.01", "-W", "5"])?;
    let direct_after = until("a reaches b directly", Duration::from_secs(10), || {
        Ok((nodes[0].path("b")? == PathKind::Direct).then(|| start.elapsed()))
    })?;
    let seen = Icmp::wait(pings, Duration::from_secs(30))?;
    ensure(direct_after <= Duration::from_secs(2), || format!("direct only after {direct_after:?}"))?;
    ensure(seen.sent == 500 && seen.received == 500, || {
        format!("of {} pings {} were answered", seen.sent, seen.received)
    })?;
    let endpoint = nodes[0].peer("b")?.path.endpoint.unwrap_or_default();
    ensure(endpoint.starts_with("203.0.113.22:"), || format!("direct, but to {endpoint}"))
}

fn stays_relayed(lab: &Topology) -> Result<()> {
    let nodes = lab.join()?;
    let (code, pongs) = nodes[0].ping("b", &["--until-direct", "--timeout", "5s", "--interval", "200ms"])?;
    ensure(code == 1, || format!("ping --until-direct ends with {code}: {pongs:?}"))?;
    ensure(!pongs.is_empty() && pongs.iter().all(|pong| pong.answered && pong.path == PathKind::Relay), || {
        format!("not every ping was answered through the relay: {pongs:?}")
    })?;
    for (here, there) in [(0, "b"), (1, "a")] {
        let path = nodes[here].peer(there)?.path;
        ensure(path.kind == PathKind::Relay, || format!("{path:?}"))?;
        ensure(path.reason.as_ref().is_some_and(|reason| reason.len() > 10), || format!("no reason given: {path:?}"))?;
    }
    let text = nodes[0].run(&["status"])?;
    ensure(text.contains("b is relayed: "), || format!("the reason is not in the table:\n{text}"))
}

fn becomes_direct(lab: &Topology) -> Result<()> {
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    nodes[1].ping_until_direct("a")?;
    let seen = nodes[1].icmp(nodes[0].address(false)?, &["-c", "5", "-i", "0.05", "-W", "2"])?;
    ensure(seen.received == 5, || format!("inner IPv6: {seen:?}"))
}

fn same_lan() -> Result<()> {
    let lab = net::same_lan()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    until("the path is the LAN's", Duration::from_secs(5), || {
        let endpoint = nodes[0].peer("b")?.path.endpoint.unwrap_or_default();
        // Over IPv6 the LAN's own prefix is as good.
        Ok((endpoint.starts_with("192.168.21.3:") || endpoint.starts_with("[2001:db8:21:")).then_some(()))
    })
}

/// ```text
///   a 2001:db8:21::2 ── [firewall ra] ── internet ── [firewall rb] ── b 2001:db8:22::2
///                                           └─ coordinator 2001:db8::10/::11
/// ```
///
/// No IPv4 anywhere on the machines; the routers let in what was asked for.
fn ipv6_only() -> Result<()> {
    let internet = Segment::internet()?;
    let coordinator = Coordinator::start_at(&internet, &format!("https://[{}]:8443", internet.v6(10)))?;
    let ra = internet.router("ra", 21, Nat::Home)?;
    let rb = internet.router("rb", 22, Nat::Home)?;
    let everyone: [&Namespace; 3] = [&coordinator.node.namespace, &ra.namespace, &rb.namespace];
    for (number, router) in [(21, &ra), (22, &rb)] {
        for machine in everyone.iter().filter(|machine| **machine != &router.namespace) {
            machine.ip(&format!("-6 route add 2001:db8:{number}::/64 via {}", internet.v6(number)))?;
        }
    }
    let (a, b) = (ra.lan.host("a", 2)?, rb.lan.host("b", 2)?);
    for machine in [&a, &b] {
        machine.ip("-4 addr flush dev eth0")?;
    }
    let lab = Topology { world: World { internet, coordinator }, machines: vec![("a", a), ("b", b)] };
    becomes_direct(&lab)
}

fn tcp() -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    const BYTES: usize = 1 << 20;
    let lab = net::home_nat()?;
    let nodes = lab.join()?;
    let server = SocketAddr::new(nodes[1].address(true)?, 5000);
    let data: Vec<u8> = (0..BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let listener = nodes[1].namespace.enter(|| TcpListener::bind(server))??;
    std::thread::scope(|scope| -> Result<()> {
        let echo = scope.spawn(|| -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            let mut got = vec![0; BYTES];
            stream.read_exact(&mut got)?;
            stream.write_all(&got)?;
            Ok(())
        });
        let mut stream =
            nodes[0].namespace.enter(|| TcpStream::connect_timeout(&server, Duration::from_secs(10)))??;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.write_all(&data)?;
        let mut back = vec![0; BYTES];
        stream.read_exact(&mut back)?;
        ensure(back == data, || "what came back is not what was sent".to_owned())?;
        echo.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
    })
}

//! Paths that take shorter or longer packets than Ethernet, with and without a word about it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use meshd::cli::demo::net::{Namespace, Nat};
use meshd::wire::local::PathKind;

use crate::net::{self, Topology};
use crate::packets::delay;
use crate::runner::{Case, case};
use crate::world::{Node, World, ensure, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("mtu::a_path_that_drops_packets_over_1200_bytes_is_used_for_what_fits", drops_from_the_start),
        case("mtu::a_path_that_begins_to_drop_packets_over_1200_bytes_stalls_tcp_for_less_than_a_second", || {
            begins(1_200)
        }),
        case("mtu::a_path_that_begins_to_drop_packets_over_1400_bytes_stalls_tcp_for_less_than_a_second", || {
            begins(1_400)
        }),
        case("mtu::the_longest_datagram_over_a_narrow_path_and_by_the_relay", longest),
        case("mtu::a_link_of_1400_bytes_behind_a_router_that_says_so", || link_of_1400(true)),
        case("mtu::a_link_of_1400_bytes_behind_a_router_that_says_nothing", || link_of_1400(false)),
        case("mtu::a_network_of_9000_bytes_is_used", jumbo),
        case("mtu::the_machine_s_own_link_becomes_narrow_under_tcp", own_link),
    ]
}

/// As `home-nat` in `net.rs`; with the routers in front of a and of b.
fn homes() -> Result<(Topology, [Namespace; 2])> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let rb = world.internet.router("rb", 22, Nat::Home)?;
    delay(&world.internet, "coord", Duration::from_millis(20))?;
    delay(&world.internet, "ra", Duration::from_millis(10))?;
    delay(&world.internet, "rb", Duration::from_millis(10))?;
    let machines = vec![("a", ra.lan.host("a", 2)?), ("b", rb.lan.host("b", 2)?)];
    Ok((Topology { world, machines }, [ra.namespace, rb.namespace]))
}

/// The router drops what is longer, in both directions.
fn narrow(router: &Namespace, most: u32) -> Result<()> {
    router.nft(&format!(
        "table inet narrow {{ chain forward {{ type filter hook forward priority -10;\n\
           meta l4proto udp meta length > {most} drop;\n }}\n }}\n"
    ))
}

/// Datagrams of a train cross the routers one by one, as on a real cable.
fn one_by_one(nodes: &[Node]) -> Result<()> {
    for node in nodes {
        node.namespace.ip("link set eth0 gso_max_segs 1")?;
    }
    Ok(())
}

fn mtu(node: &Node, peer: &str) -> Result<(PathKind, Option<u16>)> {
    let path = node.peer(peer)?.path;
    Ok((path.kind, path.mtu))
}

fn found(nodes: &[Node], expected: u16, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    for (here, there) in [(0, "b"), (1, "a")] {
        until(&format!("{} finds {expected} bytes", nodes[here].name), limit, || {
            // Never a probe on an idle path.
            let other = nodes[1 - here].address(true)?;
            nodes[here].icmp(other, &["-c", "1", "-W", "1"])?;
            Ok((mtu(&nodes[here], there)? == (PathKind::Direct, Some(expected))).then_some(()))
        })
        .map_err(|e| anyhow!("{e:#}: {:?}", mtu(&nodes[here], there)))?;
    }
    Ok(start.elapsed())
}

/// Sends by TCP from a to b for `time`; `halfway` happens in the middle. Returns the bytes and the longest pause between two
/// pieces that arrived.
fn stream(nodes: &[Node], time: Duration, halfway: impl FnOnce() -> Result<()>) -> Result<(usize, Duration)> {
    let server = SocketAddr::new(nodes[1].address(true)?, 5000);
    let listener = nodes[1].namespace.enter(|| TcpListener::bind(server))??;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || -> Result<(usize, Duration)> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
            let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
            loop {
                let n = stream.read(&mut buffer)?;
                longest = longest.max(last.elapsed());
                last = Instant::now();
                bytes += n;
                if n == 0 {
                    return Ok((bytes, longest));
                }
            }
        });
        let mut stream =
            nodes[0].namespace.enter(|| TcpStream::connect_timeout(&server, Duration::from_secs(10)))??;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        let (start, data) = (Instant::now(), vec![7; 20_000]);
        let mut halfway = Some(halfway);
        while start.elapsed() < time {
            stream.write_all(&data)?;
            // Some 4 MB/s: what is measured is pauses, not speed.
            std::thread::park_timeout(Duration::from_millis(5));
            if start.elapsed() > time / 2
                && let Some(happen) = halfway.take()
            {
                happen()?;
            }
        }
        drop(stream);
        receiver.join().map_err(|_| anyhow!("the receiver panicked"))?
    })
}

fn drops_from_the_start() -> Result<()> {
    let (lab, [ra, _]) = homes()?;
    narrow(&ra, 1_200)?;
    let nodes = lab.join()?;
    one_by_one(&nodes)?;
    let took = found(&nodes, 1_120, Duration::from_secs(20))?;
    let (bytes, pause) = stream(&nodes, Duration::from_secs(6), || Ok(()))?;
    println!("1,120 bytes found after {took:.1?}; {bytes} bytes of TCP, longest pause {pause:.0?}");
    ensure(bytes > 1_000_000, || format!("{bytes} bytes arrived"))?;
    ensure(pause < Duration::from_secs(1), || format!("stalled for {pause:?}"))?;
    ensure(mtu(&nodes[0], "b")? == (PathKind::Direct, Some(1_120)), || "not direct any more".to_owned())?;
    // What cannot be cut goes by the relay: full packets of the interface, over IPv4 and IPv6.
    for (v4, payload) in [(true, "1252"), (false, "1232")] {
        let pings =
            nodes[0].icmp(nodes[1].address(v4)?, &["-c", "10", "-i", "0.05", "-W", "3", "-M", "do", "-s", payload])?;
        ensure(pings.received == 10, || format!("full packets: {pings:?}"))?;
    }
    Ok(())
}

/// 65,507 bytes of UDP arrive whole, each time: by the relay's UDP, and over a path that takes 1,200 bytes.
fn longest() -> Result<()> {
    let (lab, [ra, _]) = homes()?;
    ra.nft(
        "table inet hole {\n chain f {\n type filter hook forward priority -10\n ip daddr 203.0.113.22 meta l4proto udp drop\n \
         ip saddr 203.0.113.22 meta l4proto udp drop\n }\n}\n",
    )?;
    let nodes = lab.join()?;
    until("packets are relayed by UDP", Duration::from_secs(10), || {
        nodes[0].ping("b", &["-c", "1"])?;
        let by_udp = |node: &Node| anyhow::Ok(node.status()?.coordinator.relay.as_deref() == Some("udp"));
        Ok((by_udp(&nodes[0])? && by_udp(&nodes[1])?).then_some(()))
    })?;
    whole_datagrams(&nodes, "by the relay")?;
    ensure(mtu(&nodes[0], "b")?.0 == PathKind::Relay, || "not relayed".to_owned())?;
    narrow(&ra, 1_200)?;
    ra.nft("delete table inet hole\n")?;
    one_by_one(&nodes)?;
    nodes[0].namespace.ip("addr add 192.168.21.77/24 dev eth0")?;
    found(&nodes, 1_120, Duration::from_secs(40))?;
    whole_datagrams(&nodes, "directly, in packets of 1,120 bytes")?;
    ensure(mtu(&nodes[0], "b")? == (PathKind::Direct, Some(1_120)), || "not direct any more".to_owned())
}

/// Ten there and ten back, one after the other.
fn whole_datagrams(nodes: &[Node], how: &str) -> Result<()> {
    const LONGEST: usize = 65_507;
    for (here, there) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        let bind = |node: &Node| -> Result<UdpSocket> {
            let address = node.address(true)?;
            Ok(node.namespace.enter(|| UdpSocket::bind((address, 0)))??)
        };
        let (from, to) = (bind(here)?, bind(there)?);
        to.set_read_timeout(Some(Duration::from_secs(2)))?;
        let (mut sent, mut came) = (vec![0; LONGEST], vec![0; LONGEST + 1]);
        let mut whole = 0;
        for number in 0..10 {
            sent.fill(number);
            from.send_to(&sent, to.local_addr()?)?;
            whole += usize::from(to.recv(&mut came).is_ok_and(|n| came[..n] == sent));
        }
        println!("{whole} of 10 datagrams of {LONGEST} bytes from {} to {} {how}", here.name, there.name);
        let drops = || nodes.iter().map(|n| n.run(&["status", "--drops"]).unwrap_or_default()).collect::<String>();
        // One fragment lost by a busy machine is one datagram.
        ensure(whole >= 9, || format!("{whole} of 10 arrived {how}\n{}", drops()))?;
    }
    Ok(())
}

fn begins(most: u32) -> Result<()> {
    let (lab, [ra, _]) = homes()?;
    let nodes = lab.join()?;
    one_by_one(&nodes)?;
    found(&nodes, 1_420, Duration::from_secs(10))?;
    let (bytes, pause) = stream(&nodes, Duration::from_secs(12), || narrow(&ra, most))?;
    let now = mtu(&nodes[0], "b")?;
    println!("{bytes} bytes of TCP, longest pause {pause:.0?}, path now {now:?}");
    ensure(bytes > 4_000_000, || format!("{bytes} bytes arrived"))?;
    ensure(pause < Duration::from_secs(1), || format!("stalled for {pause:?}"))?;
    let expected = if most == 1_200 { 1_120 } else { 1_340 };
    ensure(now == (PathKind::Direct, Some(expected)), || format!("{now:?}"))
}

fn link_of_1400(says_so: bool) -> Result<()> {
    let (lab, routers) = homes()?;
    for router in &routers {
        router.ip("link set wan mtu 1400")?;
        if !says_so {
            router.nft(
                "table inet silent { chain output { type filter hook output priority 0;\n\
                   icmp type destination-unreachable drop;\n icmpv6 type packet-too-big drop;\n }\n\
                   chain forward { type filter hook forward priority 0;\n\
                   tcp flags syn tcp option maxseg size set 1340;\n }\n }\n",
            )?;
        }
    }
    let nodes = lab.join()?;
    one_by_one(&nodes)?;
    let took = found(&nodes, 1_340, Duration::from_secs(20))?;
    let (bytes, pause) = stream(&nodes, Duration::from_secs(6), || Ok(()))?;
    println!("1,340 bytes found after {took:.1?}; {bytes} bytes of TCP, longest pause {pause:.0?}");
    ensure(pause < Duration::from_secs(1), || format!("stalled for {pause:?}"))?;
    let pings =
        nodes[0].icmp(nodes[1].address(true)?, &["-c", "5", "-i", "0.1", "-W", "2", "-M", "do", "-s", "1312"])?;
    ensure(pings.received == 5, || format!("packets of 1,340 bytes: {pings:?}"))
}

fn own_link() -> Result<()> {
    let (lab, _) = homes()?;
    let nodes = lab.join()?;
    found(&nodes, 1_420, Duration::from_secs(10))?;
    let change = || nodes[0].namespace.ip("link set eth0 mtu 1300").map(drop);
    let (bytes, pause) = stream(&nodes, Duration::from_secs(8), change)?;
    let now = mtu(&nodes[0], "b")?;
    println!("{bytes} bytes of TCP, longest pause {pause:.0?}, path now {now:?}");
    ensure(pause < Duration::from_secs(1), || format!("stalled for {pause:?}"))?;
    ensure(now == (PathKind::Direct, Some(1_200)), || format!("{now:?}"))
}

fn jumbo() -> Result<()> {
    let lab = net::public()?;
    let internet = lab.world.internet.namespace();
    for (name, machine) in &lab.machines {
        internet.ip(&format!("link set p-{name} mtu 9000"))?;
        machine.ip("link set eth0 mtu 9000")?;
    }
    internet.ip(&format!("link set {} mtu 9000", lab.world.internet.bridge_name()))?;
    let nodes = lab.join()?;
    let took = found(&nodes, 8_920, Duration::from_secs(10))?;
    let payload = ["-c", "5", "-i", "0.1", "-W", "2", "-M", "do", "-s", "8892"];
    let pings = until("the interface takes long packets", Duration::from_secs(5), || {
        let pings = nodes[0].icmp(nodes[1].address(true)?, &payload)?;
        Ok((pings.received == 5).then_some(pings))
    })?;
    let (bytes, pause) = stream(&nodes, Duration::from_secs(3), || Ok(()))?;
    println!("8,920 bytes found after {took:.1?}; {pings:?}; {bytes} bytes of TCP, longest pause {pause:.0?}");
    ensure(pause < Duration::from_secs(1), || format!("stalled for {pause:?}"))
}

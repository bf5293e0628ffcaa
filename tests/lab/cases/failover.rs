//! Several routers for one subnet: one whose own leg is cut, one that is drained, and what flows notice of it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat, Router};
use serde_json::Value;

use crate::runner::{Case, case};
use crate::services::{echo, fetch, web};
use crate::world::{Node, World, ensure, eventually, let_pass};

pub fn cases() -> Vec<Case> {
    vec![
        case("failover::a_router_whose_leg_is_cut_is_left_although_it_is_online", leg_cut),
        case("failover::a_quiet_lan_is_not_given_up", quiet),
        case("failover::the_machine_that_was_named_decides", named),
        case("failover::a_drained_router_keeps_its_connections_and_gets_no_new_ones", drained),
    ]
}

const LAN: &str = "192.168.22.0/24";
/// How fast traffic is on the other way.
const BAR: Duration = Duration::from_secs(3);
/// How long an answer of the LAN may take.
const ANSWER: Duration = Duration::from_millis(250);

/// ```text
///            coordinator .10/.11
///                 │
///  ───────────────┴──────────────────────── internet 203.0.113.0/24 ──
///     │                  │ .41      │ .42      │
///  [NAT ra .21]         one        two      [rb .22]
///     │ 192.168.21.0/24  │ .6       │ .7       │ .1
///     a .2            ───┴──────────┴──────────┴── 192.168.22.0/24, printer .3 ──
/// ```
struct Office {
    world: World,
    rb: Router,
    a: Node,
    routers: [Node; 2],
    printer: Namespace,
}

impl Office {
    /// Both routers lead to the office, with these settings.
    fn new(settings: &[&str]) -> Result<Self> {
        let world = World::new()?;
        let ra = world.internet.router("ra", 21, Nat::Home)?;
        let rb = world.internet.router("rb", 22, Nat::Home)?;
        let a = Node::new("a", ra.lan.host("a", 2)?);
        let mut routers = Vec::new();
        for (name, outside, inside) in [("one", 41, 6), ("two", 42, 7)] {
            let machine = world.internet.host(name, outside)?;
            rb.lan.plug(&machine, "lan0")?;
            machine.ip(&format!("addr add {}/24 dev lan0", rb.lan.v4(inside)))?;
            routers.push(Node::new(name, machine));
        }
        let [one, two] = <[Node; 2]>::try_from(routers).ok().context("two routers")?;
        let printer = rb.lan.host("printer", 3)?;
        web(&printer, SocketAddr::new(office(3), 80), "printer")?;
        echo(&printer, SocketAddr::new(office(3), 7))?;
        let site = Self { world, rb, a, routers: [one, two], printer };
        site.a.up(&site.world.coordinator.claim()?)?;
        let token = site.a.run(&["invite", "--uses", "2", "--routes", LAN])?;
        for router in &site.routers {
            let args = [&["up", "--name", &router.name, "--advertise-routes", LAN], settings].concat();
            router.namespace.run(router.meshd(&args).env("MESHD_TOKEN", token.trim()))?;
        }
        Ok(site)
    }

    /// The router that a asks, and the other one.
    fn asked(&self) -> Result<(&Node, &Node)> {
        let via = via(&self.a)?;
        let [one, two] = &self.routers;
        if via == one.name { Ok((one, two)) } else { Ok((two, one)) }
    }

    /// Waits until the printer answers a, then how the routers stand.
    fn ready(&self) -> Result<(&Node, &Node)> {
        eventually("both routers are known", Duration::from_secs(10), || {
            let known = routes(&self.a)?.iter().filter(|route| route["prefix"] == LAN).count();
            ensure(known == 2, || format!("{known}"))
        })?;
        eventually("the printer answers", Duration::from_secs(10), || self.seen())?;
        // Nobody has to be found first when the way changes, and who has answered is known.
        let_pass(Duration::from_secs(3));
        self.asked()
    }

    /// Under which address the printer sees a new flow of a's.
    fn seen(&self) -> Result<IpAddr> {
        let ip: IpAddr = fetch(&self.a.namespace, SocketAddr::new(office(3), 80))?.1.parse()?;
        Ok(ip)
    }

    /// How long it takes until a new datagram of a's is answered.
    fn until_answered(&self) -> Result<Duration> {
        let begin = Instant::now();
        eventually("a datagram is answered", BAR * 2, || {
            self.a.namespace.enter(|| -> Result<()> {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(ANSWER))?;
                socket.send_to(b"?", SocketAddr::new(office(3), 7))?;
                socket.recv(&mut [0; 8])?;
                Ok(())
            })?
        })?;
        Ok(begin.elapsed())
    }

    fn port(&self, of: &Node, change: &str) -> Result<()> {
        let to = if change == "join" { "master lan up".to_owned() } else { change.to_owned() };
        self.rb.namespace.ip(&format!("link set p-{} {to}", of.name)).map(drop)
    }
}

fn office(number: u8) -> IpAddr {
    IpAddr::from([192, 168, 22, number])
}

fn routes(node: &Node) -> Result<Vec<Value>> {
    let document: Value = serde_json::from_str(&node.run(&["routes", "--json"])?)?;
    Ok(document["routes"].as_array().cloned().unwrap_or_default())
}

fn via(node: &Node) -> Result<String> {
    let routes = routes(node)?;
    let line = routes.iter().find(|route| route["prefix"] == LAN && route["via"].is_string());
    Ok(line.and_then(|line| line["via"].as_str()).unwrap_or_default().to_owned())
}

fn health(node: &Node) -> Result<String> {
    Ok(serde_json::to_string(&node.status()?.health)?)
}

fn leg_cut() -> Result<()> {
    let site = Office::new(&[])?;
    // The cable is pulled: no carrier. Then only the switch forgets the port: the carrier stays.
    for (cut, mend) in [("down", "up"), ("nomaster", "join")] {
        let (first, second) = site.ready()?;
        site.port(first, cut)?;
        let took = site.until_answered()?;
        println!("{cut}: by way of {} after {took:?}", second.name);
        ensure(took <= BAR, || format!("{cut}: it took {took:?}"))?;
        ensure(via(&site.a)? == second.name, || "the router that is cut is still asked".to_owned())?;
        let status = first.status()?;
        ensure(status.coordinator.connected, || format!("{} is offline, which proves nothing", first.name))?;
        eventually("the router says so", Duration::from_secs(5), || {
            let health = health(first)?;
            ensure(health.contains("route-cut"), || health)
        })?;
        // Mended: it leads there again, and the packets stay where they are.
        site.port(first, mend)?;
        eventually("it leads there again", Duration::from_secs(30), || {
            let health = health(first)?;
            ensure(!health.contains("route-cut"), || health)
        })?;
        let_pass(Duration::from_millis(500));
        ensure(via(&site.a)? == second.name, || "the packets moved back for nothing".to_owned())?;
    }
    Ok(())
}

fn quiet() -> Result<()> {
    let site = Office::new(&[])?;
    let (first, second) = site.ready()?;
    let before = via(&site.a)?;
    // The only machine that answered is switched off. The routers answer each other.
    site.printer.ip("link set eth0 down")?;
    let_pass(Duration::from_secs(6));
    for router in [first, second] {
        let health = health(router)?;
        ensure(!health.contains("route-cut"), || format!("{}: {health}", router.name))?;
    }
    ensure(via(&site.a)? == before, || "the way changed".to_owned())
}

fn named() -> Result<()> {
    let site = Office::new(&[])?;
    site.ready()?;
    // One machine is named as what matters: the router that does not reach it is left, although others answer it.
    for router in &site.routers {
        router.run(&["set", "--probe", "192.168.22.0/24=192.168.22.3"])?;
    }
    eventually("the printer answers", Duration::from_secs(10), || site.seen())?;
    let_pass(Duration::from_secs(2));
    let (first, second) = site.asked()?;
    first
        .namespace
        .nft("table arp cut {\n chain in {\n type filter hook input priority 0; policy accept;\n arp saddr ip 192.168.22.3 drop\n }\n }\n")?;
    first.namespace.ip("neigh flush dev lan0")?;
    let begin = Instant::now();
    eventually("the other router is asked", BAR * 2, || {
        let via = via(&site.a)?;
        ensure(via == second.name, || via)
    })?;
    println!("the named machine does not answer: the other router after {:?}", begin.elapsed());
    let mistake = second.output(&["set", "--probe", "10.0.0.0/8=10.0.0.1"])?;
    ensure(!mistake.status.success(), || "a probe without a route was taken".to_owned())?;
    second.run(&["set", "--probe", "none"]).map(drop)
}

/// Sends a byte every 5 ms, to everybody who connects.
fn drip(machine: &Namespace, at: SocketAddr) -> Result<()> {
    let listener = machine.enter(|| TcpListener::bind(at))??;
    let serve = |mut stream: TcpStream| {
        let mut number = 0u8;
        while stream.write_all(&[number]).is_ok() {
            number = number.wrapping_add(1);
            let_pass(Duration::from_millis(5));
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    Ok(())
}

fn drained() -> Result<()> {
    let site = Office::new(&[])?;
    drip(&site.printer, SocketAddr::new(office(3), 81))?;
    let (first, second) = site.ready()?;
    let own = |node: &Node| if node.name == "one" { office(6) } else { office(7) };
    ensure(site.seen()? == own(first), || "not under the asked router's address".to_owned())?;
    // A download and a flow of datagrams begin through the first.
    let mut download = site.a.namespace.enter(|| TcpStream::connect(SocketAddr::new(office(3), 81)))??;
    download.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut expected = 0u8;
    let mut read = |download: &mut TcpStream, bytes: usize| -> Result<()> {
        let mut buffer = [0; 64];
        let mut left = bytes;
        while left > 0 {
            let n = download.read(&mut buffer).context("the download broke")?;
            ensure(n > 0, || "the download ended".to_owned())?;
            for byte in &buffer[..n] {
                ensure(*byte == expected, || "bytes are missing".to_owned())?;
                expected = expected.wrapping_add(1);
            }
            left = left.saturating_sub(n);
        }
        Ok(())
    };
    read(&mut download, 100)?;
    let said: Value = serde_json::from_str(&first.run(&["drain", "--json"])?)?;
    ensure(said["draining"] == true && said["routes"][0]["others"][0] == second.name.as_str(), || said.to_string())?;
    let begin = Instant::now();
    eventually("new connections go the other way", BAR, || {
        let seen = site.seen()?;
        ensure(seen == own(second), || format!("{seen}"))
    })?;
    println!("new connections went the other way after {:?}", begin.elapsed());
    // For seconds after that, byte by byte.
    read(&mut download, 800)?;
    ensure(site.seen()? == own(second), || "new connections go back".to_owned())?;
    let health = health(first)?;
    ensure(health.contains("meshd drain off"), || health)?;
    // It stays drained over a restart, and traffic does not come back by itself afterwards.
    drop(download);
    first.run(&["down"])?;
    first.run(&["up"])?;
    eventually("it says that it is drained", Duration::from_secs(10), || {
        let text = site.a.run(&["routes"])?;
        ensure(text.contains("is drained"), || text)
    })?;
    ensure(first.run(&["drain", "off"])?.contains("asked again"), || "it does not say so".to_owned())?;
    let_pass(Duration::from_secs(1));
    ensure(via(&site.a)? == second.name, || "the packets moved back for nothing".to_owned())?;
    // And now the second can go. (WireGuard needs up to 15 s to notice that the other end has restarted.)
    let mesh = first.address(true)?;
    eventually("the first answers under a new session", Duration::from_secs(20), || {
        let seen = site.a.icmp(mesh, &["-c", "1", "-W", "1"])?;
        ensure(seen.received == 1, || format!("{seen:?}"))
    })?;
    second.run(&["drain"])?;
    eventually("the first is asked again", BAR, || {
        let seen = site.seen()?;
        ensure(seen == own(first), || format!("{seen}"))
    })
    .map(drop)
}

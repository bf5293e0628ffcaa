//! At home or away: a node that moves between the network it also reaches through the mesh, another one with the same numbers,
//! and one with others.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use meshd::cli::demo::net::{Namespace, Nat, Segment};
use serde_json::Value;

use crate::runner::{Case, case};
use crate::services::{fetch, web};
use crate::world::{Node, World, ensure, eventually, wait_for_peers};

pub fn cases() -> Vec<Case> {
    vec![
        case("places::home_a_hotel_with_the_same_numbers_and_a_mobile_network", moving),
        case("places::nobody_but_a_neighbour_is_answered", only_neighbours),
    ]
}

const LAN: &str = "192.168.22.0/24";
/// How fast the right machine answers after a move.
const BAR: Duration = Duration::from_secs(3);
/// The printer's address, at home and in the hotel.
const PRINTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 22, 3));

/// A home with a router node `nas` and a printer, and a laptop that is somewhere else.
struct Places {
    _world: World,
    home: Segment,
    hotel: Segment,
    mobile: Segment,
    nas: Node,
    laptop: Node,
}

impl Places {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let (home, isp) = (world.internet.router("rb", 22, Nat::Home)?, world.internet.router("isp", 23, Nat::Home)?);
        let hotel = isp.lan.router("hotel", 22, Nat::Home)?;
        let mobile = world.internet.router("mobile", 24, Nat::Symmetric)?;
        for (lan, page) in [(&home.lan, "home"), (&hotel.lan, "hotel")] {
            let printer = lan.host(&format!("printer-{page}"), 3)?;
            web(&printer, SocketAddr::new(PRINTER, 80), page)?;
        }
        let nas = Node::new("nas", home.lan.host("nas", 2)?);
        let laptop = Node::new("laptop", mobile.lan.host("laptop", 9)?);
        nas.namespace.run(
            nas.meshd(&["up", "--name", "nas", "--advertise-routes", LAN])
                .env("MESHD_TOKEN", world.coordinator.claim()?),
        )?;
        nas.run(&["routes", "approve", "nas", LAN])?;
        laptop.up(&nas.invite()?)?;
        wait_for_peers(&laptop, 1)?;
        web(&nas.namespace, SocketAddr::new(nas.address(true)?, 80), "nas")?;
        Ok(Self { _world: world, home: home.lan, hotel: hotel.lan, mobile: mobile.lan, nas, laptop })
    }

    /// The laptop leaves its network and joins another.
    fn travel(&self, to: &Segment) -> Result<Instant> {
        let machine = &self.laptop.namespace;
        machine.ip("link del eth0")?;
        to.plug(machine, "eth0")?;
        to.number(machine, "eth0", 9)?;
        Ok(Instant::now())
    }

    fn page(&self, of: IpAddr) -> Result<(String, String)> {
        fetch(&self.laptop.namespace, SocketAddr::new(of, 80))
    }

    fn line(&self) -> Result<Value> {
        let document: Value = serde_json::from_str(&self.laptop.run(&["routes", "--json"])?)?;
        let lines = document["routes"].as_array().context("no routes")?;
        lines.iter().find(|line| line["prefix"] == LAN).cloned().context("no such route")
    }

    /// The printer's address leads to this page, asked from that address, and the place is known, all in time.
    fn arrive(&self, at: Instant, page: &str, from: &str, place: Option<&str>) -> Result<()> {
        let mut answered = Duration::ZERO;
        eventually("the right printer answers", BAR, || {
            let (text, seen) = self.page(PRINTER)?;
            answered = at.elapsed();
            ensure(text == page && seen == from, || format!("{text}, asked from {seen}"))
        })?;
        eventually("the place is known", BAR.saturating_sub(at.elapsed()), || {
            let line = self.line()?;
            ensure(line["place"].as_str() == place, || line.to_string())
        })?;
        println!("{page} by {from}: the page after {answered:?}, the place after {:?}", at.elapsed());
        Ok(())
    }
}

fn moving() -> Result<()> {
    let places = Places::new()?;
    let main = |what: &str| -> Result<bool> { Ok(places.laptop.namespace.ip("route show table all")?.contains(what)) };
    eventually("the printer at home answers", Duration::from_secs(10), || places.page(PRINTER))?;
    let nas: IpAddr = places.nas.address(true)?;
    // The home's own numbers elsewhere, from everywhere.
    places.nas.run(&["routes", "alias", "nas", LAN])?;
    places.nas.run(&["dns", "add", "printer.home", "192.168.22.3"])?;
    let alias = eventually("the alias is known", Duration::from_secs(5), || {
        let line = places.line()?;
        let block = line["alias"].as_str().with_context(|| line.to_string())?;
        let (first, _) = block.rsplit_once('.').context("an alias")?;
        Ok::<IpAddr, anyhow::Error>(format!("{first}.3").parse()?)
    })?;
    let named = |address: IpAddr| {
        eventually("the name is the address for this place", BAR, || {
            let list: Value = serde_json::from_str(&places.laptop.run(&["dns", "list", "--json"])?)?;
            let text = list.to_string();
            ensure(text.contains(&format!("\"here\":[\"{address}\"]")), || text)
        })
    };
    for round in 0..2 {
        let at = places.travel(&places.home)?;
        places.arrive(at, "home", "192.168.22.9", Some("home"))?;
        ensure(!main(&format!("{LAN} dev mesh0"))?, || "a route stands in the way at home".to_owned())?;
        let text = places.laptop.run(&["routes"])?;
        ensure(text.contains("at home") && text.contains("reached directly"), || text)?;
        named(PRINTER)?;
        // From home to the hotel without anything between: only the network is another.
        let at = places.travel(&places.hotel)?;
        places.arrive(at, "hotel", "192.168.22.9", Some("away"))?;
        ensure(!main(&format!("{LAN} dev mesh0"))?, || "the hotel's network is taken".to_owned())?;
        let health = serde_json::to_string(&places.laptop.status()?.health)?;
        ensure(health.contains("away-same-numbers"), || health)?;
        named(alias)?;
        eventually("the printer at home answers by its alias", BAR, || {
            let (text, _) = places.page(alias)?;
            ensure(text == "home", || text)
        })?;
        println!("the printer at home by its alias after {:?}", at.elapsed());
        ensure(at.elapsed() <= BAR, || format!("it took {:?}", at.elapsed()))?;
        eventually("the nas answers by its mesh address", BAR, || {
            let (text, _) = places.page(nas)?;
            ensure(text == "nas", || text)
        })?;
        if round == 0 {
            // And back, as if nothing had been.
            let at = places.travel(&places.home)?;
            places.arrive(at, "home", "192.168.22.9", Some("home"))?;
            places.travel(&places.hotel)?;
        }
        let at = places.travel(&places.mobile)?;
        places.arrive(at, "home", "192.168.22.2", None)?;
        let health = serde_json::to_string(&places.laptop.status()?.health)?;
        ensure(!health.contains("away-same-numbers"), || health)?;
    }
    Ok(())
}

/// The nas answers on its LAN and not through the mesh: an answer cannot be fetched from afar.
fn only_neighbours() -> Result<()> {
    let places = Places::new()?;
    eventually("the printer at home answers", Duration::from_secs(10), || places.page(PRINTER))?;
    let listening = || -> Result<u16> {
        let sockets = places.nas.namespace.run(&mut udp_sockets())?;
        let ports = sockets.lines().filter_map(|line| line.split_whitespace().nth(3)?.rsplit(':').next()?.parse().ok());
        let mut ports: Vec<u16> = ports.collect();
        ports.sort_unstable();
        // The node's own port, and the next one.
        ports.windows(2).find(|pair| pair[1] == pair[0] + 1).map(|pair| pair[1]).context(sockets)
    };
    let port = eventually("the nas listens", Duration::from_secs(5), listening)?;
    let at = SocketAddr::from(([192, 168, 22, 2], port));
    let other = places.home.host("other", 7)?;
    let ledger = places.nas.state_dir().join("records.jsonl");
    let asks = |machine: &Namespace, ttl: u32| -> Result<bool> { ask(machine, at, ttl, &ledger) };
    ensure(asks(&other, 255)?, || "a neighbour is not answered".to_owned())?;
    ensure(!asks(&other, 254)?, || "one that a router forwarded is answered".to_owned())?;
    ensure(!asks(&places.laptop.namespace, 255)?, || "it is answered through the mesh".to_owned())
}

fn udp_sockets() -> std::process::Command {
    let mut command = meshd::cli::demo::net::tool("ss");
    command.args(["-H", "-l", "-n", "-u"]);
    command
}

/// Whether a question to the nas is answered. It knows whom to ask from the network's records.
fn ask(machine: &Namespace, at: SocketAddr, ttl: u32, ledger: &std::path::Path) -> Result<bool> {
    use meshd::trust::ledger::{Judge, Ledger};
    use meshd::trust::record::{Record, SignedRecord};
    use meshd::wire::same_lan;

    let text = std::fs::read_to_string(ledger)?;
    let records: Vec<SignedRecord> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let Record::Genesis(genesis) = records.first().context("no records")?.open()? else { bail!("no genesis") };
    let network = genesis.network;
    let mut known = Ledger::new(network);
    for record in &records {
        known.admit(record, Judge::Reader).map_err(|why| anyhow::anyhow!("{why}"))?;
    }
    let nas = known.by_name("nas").context("no nas")?.identity;
    machine.enter(|| -> Result<bool> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.set_ttl(ttl)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send_to(&same_lan::question(&network, &nas, &[9; 32]), at)?;
        let mut buffer = [0; 256];
        Ok(matches!(socket.recv(&mut buffer), Ok(same_lan::ANSWER)))
    })?
}

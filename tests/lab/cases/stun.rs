//! STUN against programs of others, and `meshd netcheck` against the kernel's NATs.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use meshd::cli::demo::net::{Namespace, Nat};
use meshd::wire::local::Netcheck;
use meshd::wire::nat::PortModel;

use crate::nats;
use crate::net;
use crate::runner::{Case, case, skip};
use crate::world::{Node, World, ensure, eventually};

pub fn cases() -> Vec<Case> {
    vec![
        case("netcheck::classifies_the_kernels_nats", classify),
        case("netcheck::the_kernels_nats_are_the_simulators", calibrate),
        case("netcheck::finds_how_long_an_idle_mapping_is_kept", lifetime),
        case("netcheck::says_that_udp_is_blocked", udp_blocked),
        case("netcheck::asks_a_server_of_others", third_party),
        case("stun::turnutils_finds_the_nat_behaviour_with_our_server", natdiscovery),
        case("stun::stun_client_is_answered_by_our_server", stun_client),
    ]
}

fn netcheck(node: &Node) -> Result<Netcheck> {
    Ok(serde_json::from_str(&node.run(&["netcheck", "--json"])?)?)
}

/// ```text
///   home  .2 ── [masquerade] ──┐
///   sym   .2 ── [fully-random] ┼── internet ── coordinator .10/.11
///   open  .31 ─────────────────┘
/// ```
fn classify() -> Result<()> {
    let world = World::new()?;
    let home = world.internet.router("rh", 21, Nat::Home)?.lan.host("home", 2)?;
    let sym = world.internet.router("rs", 22, Nat::Symmetric)?.lan.host("sym", 2)?;
    let open = world.internet.host("open", 31)?;
    let nodes = world.join(&[("open", &open), ("home", &home), ("sym", &sym)])?;
    for (node, mapping, filtering, address) in [
        (&nodes[0], "endpoint-independent", "endpoint-independent", "203.0.113.31"),
        (&nodes[1], "endpoint-independent", "address-and-port-dependent", "203.0.113.21"),
        (&nodes[2], "address-and-port-dependent", "address-and-port-dependent", "203.0.113.22"),
    ] {
        let report = netcheck(node)?;
        let found = (report.mapping.as_deref(), report.filtering.as_deref());
        ensure(report.udp && found == (Some(mapping), Some(filtering)), || format!("{}: {report:?}", node.name))?;
        let seen: Vec<String> = report.reflexive.iter().map(|a| a.ip().to_string()).collect();
        ensure(seen.iter().any(|ip| ip == address), || format!("{} is seen as {seen:?}", node.name))?;
        ensure(!report.meaning.is_empty(), || "no sentence on what it means".to_owned())?;
        let text = node.run(&["netcheck"])?;
        ensure(text.contains(mapping) && text.contains(&report.meaning), || format!("the text lacks it:\n{text}"))?;
    }
    Ok(())
}

/// One machine behind each kind of NAT in the table of `nat-matrix.md`, which the simulator wrote.
fn calibrate() -> Result<()> {
    let page = include_str!("../../../docs/reference/nat-matrix.md");
    let rows: Vec<Vec<&str>> = page
        .lines()
        .skip_while(|line| !line.starts_with("| kind |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    ensure(rows.len() >= 16, || format!("{} kinds in the table", rows.len()))?;
    let world = World::new()?;
    nats::routed(&world.internet)?;
    let mut machines = Vec::new();
    for (row, number) in rows.iter().zip(21..) {
        let router = nats::router(&world.internet, &format!("r{number}"), number, row[0])?;
        let name = format!("n{number}");
        machines.push(Node::new(&name, router.lan.host(&name, 2)?));
    }
    let nodes: Vec<&Node> = machines.iter().collect();
    world.join_at_once(&nodes)?;
    let reports: Vec<Netcheck> = std::thread::scope(|scope| {
        let checks: Vec<_> = nodes.iter().map(|node| scope.spawn(|| netcheck(node))).collect();
        checks.into_iter().map(|c| c.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?).collect::<Result<_>>()
    })?;
    let mut differ = Vec::new();
    for (report, row) in reports.iter().zip(&rows) {
        let found = [
            report.mapping.as_deref().unwrap_or("unknown"),
            report.filtering.as_deref().unwrap_or("unknown"),
            report.port_model.map_or("not asked", PortModel::name),
            report.hairpin.map_or("not asked", |yes| if yes { "yes" } else { "no" }),
        ];
        println!(
            "{:<16} {:<28} {:<28} {:<12} {:<10} {:?}",
            row[0], found[0], found[1], found[2], found[3], report.nat_depth
        );
        if found[..] != row[1..] || report.nat_depth != Some(1) {
            differ.push(format!("{}: {found:?} instead of {:?}, {:?} NATs", row[0], &row[1..], report.nat_depth));
        }
    }
    ensure(differ.is_empty(), || differ.join("\n"))
}

/// A router that forgets after seven seconds.
fn lifetime() -> Result<()> {
    let world = World::new()?;
    let router = world.internet.router("rh", 21, Nat::Home)?;
    for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        if let Err(why) = router.namespace.sysctl(&format!("netfilter/{key}"), "7") {
            println!("not tried: this user may not change how long the kernel's NAT remembers ({why})");
            return Ok(());
        }
    }
    let nodes = world.join(&[("home", &router.lan.host("home", 2)?)])?;
    let report: Netcheck = serde_json::from_str(&nodes[0].run(&["netcheck", "--lifetime", "--json"])?)?;
    let found = report.udp_lifetime.map(|l| (l.at_least_s, l.less_than_s));
    ensure(found == Some((5, Some(10))), || format!("{report:?}"))?;
    let status = nodes[0].status()?;
    ensure(status.nat.udp_lifetime == report.udp_lifetime, || format!("{:?}", status.nat))?;
    let text = nodes[0].run(&["netcheck"])?;
    ensure(text.contains("5 s idle, less than 10 s"), || format!("the text lacks it:\n{text}"))
}

fn udp_blocked() -> Result<()> {
    let world = World::new()?;
    let open = world.internet.host("open", 31)?;
    let router = world.internet.router("rb", 22, Nat::Home)?;
    router.namespace.nft(
        "table inet block { chain forward { type filter hook forward priority -10; meta l4proto udp drop; }\n }\n",
    )?;
    let blocked = router.lan.host("blocked", 2)?;
    let nodes = world.join(&[("open", &open), ("blocked", &blocked)])?;
    let report = netcheck(&nodes[1])?;
    ensure(!report.udp, || format!("{report:?}"))?;
    let (code, pongs) = nodes[1].ping("open", &["-c", "3", "--interval", "200ms"])?;
    ensure(code == 0, || format!("not even relayed: {pongs:?}"))?;
    eventually("status says so", Duration::from_secs(20), || {
        let health = nodes[1].status()?.health;
        ensure(health.iter().any(|line| line.code == "udp-blocked" && !line.hint.is_empty()), || format!("{health:?}"))
    })
}

/// coturn at 203.0.113.40 and .41 instead of the coordinator.
fn third_party() -> Result<()> {
    if !installed("turnserver") {
        return skip("turnserver is not installed (apt-get install coturn)");
    }
    let world = World::new()?;
    let other = world.internet.host("other", 40)?;
    other.ip("addr add 203.0.113.41/24 dev eth0")?;
    let mut coturn = Command::new("turnserver");
    coturn.args(["-n", "--stun-only", "--no-cli", "--no-tls", "--no-dtls", "--log-file=stdout"]);
    coturn.args(["-L", "203.0.113.40", "-L", "203.0.113.41", "-p", "3478", "--alt-listening-port=3479"]);
    coturn.args(["--pidfile=/run/lab/coturn.pid", "--userdb=/run/lab/coturn.db"]);
    other.spawn(&mut coturn, Path::new("/run/lab/coturn.log"))?;
    let home = world.internet.router("rh", 21, Nat::Home)?.lan.host("home", 2)?;
    let open = world.internet.host("open", 31)?;
    let nodes = world.join(&[("open", &open), ("home", &home)])?;
    let named = ["netcheck", "--stun", "203.0.113.40", "--json"];
    eventually("coturn tells the NAT's behaviour", Duration::from_secs(20), || {
        let report: Netcheck = serde_json::from_str(&nodes[1].run(&named)?)?;
        let found = (report.mapping.as_deref(), report.filtering.as_deref());
        let wanted = (Some("endpoint-independent"), Some("address-and-port-dependent"));
        let asked_there = report.servers.iter().all(|s| !s.server.ip().to_string().starts_with("203.0.113.1"));
        ensure(report.udp && found == wanted && asked_there, || format!("{report:?}"))
    })?;
    let refused = nodes[1].output(&["netcheck", "--stun", "no-such-host.invalid"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let good = !refused.status.success() && said.contains("STUN server") && said.contains("hint");
    ensure(good, || format!("no sentence: {said:?}"))
}

pub(super) fn installed(program: &str) -> bool {
    ["/usr/bin", "/usr/sbin", "/bin", "/usr/local/bin"].iter().any(|place| Path::new(place).join(program).is_file())
}

fn behind(world: &World, name: &str, number: u8, nat: Nat) -> Result<Namespace> {
    world.internet.router(&format!("r{number}"), number, nat)?.lan.host(name, 2)
}

fn natdiscovery() -> Result<()> {
    if !installed("turnutils_natdiscovery") {
        return skip("turnutils_natdiscovery is not installed (apt-get install coturn)");
    }
    let world = World::new()?;
    let home = behind(&world, "home", 21, Nat::Home)?;
    let sym = behind(&world, "sym", 22, Nat::Symmetric)?;
    for (machine, mapping, filtering) in [
        (&home, "Endpoint Independent Mapping", "Address and Port Dependent Filtering"),
        (&sym, "Address and Port Dependent Mapping", "Address and Port Dependent Filtering"),
    ] {
        let mut command = Command::new("turnutils_natdiscovery");
        let output = machine.output(command.args(["-m", "-f", "203.0.113.10"]))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        // It words NAT behaviour in its own way in places; compare without case and punctuation.
        let plain = |text: &str| text.to_lowercase().replace(['-', '!', '"'], " ");
        for wanted in [mapping, filtering] {
            ensure(plain(&said).contains(&plain(wanted)), || format!("{}: no {wanted:?} in\n{said}", machine.name()))?;
        }
    }
    Ok(())
}

fn stun_client() -> Result<()> {
    if !installed("stun") {
        return skip("stun is not installed (apt-get install stun-client)");
    }
    let lab = net::public_nat()?;
    let machine = super::join::namespace(&lab, "b");
    let mut command = Command::new("stun");
    let output = machine.output(command.args(["203.0.113.10", "1", "-v"]))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !said.contains("203.0.113.22") {
        bail!("it was not told its address:\n{said}");
    }
    Ok(())
}

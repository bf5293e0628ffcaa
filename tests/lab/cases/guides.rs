//! The guides in `docs/guides`, followed to the letter: every command of every ```` ```sh ```` block is run on the machine that the
//! text before the block names, as a person would type it.
//!
//! * "On the NAS:" says where. A block without such words fails the case: no command is left out.
//! * `TOKEN` is the token that a command printed last.
//! * A command with `# fails` beside it must fail.
//! * What a ```` ```typed ```` block has is typed into the command before it.
//! * Commands that only look are tried again for some seconds, as a person would.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use meshd::cli::demo::net::{COMMAND_LIMIT, Nat, Router, Segment};

use crate::machine::{Machine, need};
use crate::runner::{Case, case};
use crate::services::web;
use crate::world::{ensure, eventually};

pub fn cases() -> Vec<Case> {
    vec![
        case("guides::every_guide_is_followed", complete),
        case("guides::reach_my_nas", reach_my_nas),
        case("guides::join_two_offices", join_two_offices),
        case("guides::replace_port_forwarding", replace_port_forwarding),
        case("guides::family_relay", family_relay),
        case("guides::corporate_proxy", corporate_proxy),
    ]
}

/// Those followed below.
const GUIDES: [&str; 5] =
    ["corporate-proxy.md", "family-relay.md", "join-two-offices.md", "reach-my-nas.md", "replace-port-forwarding.md"];
/// What all guides call the server.
const SERVER: &str = "203.0.113.5 vpn.example.org\n";
/// Commands that change nothing.
const LOOKS: [&str; 5] = ["curl ", "ping ", "sudo meshd ping ", "sudo meshd status", "sudo meshd routes\n"];
/// How long something may take that the text does not say to wait for.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a command that only looks is given.
const LOOK: Duration = Duration::from_secs(8);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/guides")
}

/// A new guide is followed too, and found by readers.
fn complete() -> Result<()> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder())? {
        found.push(entry?.file_name().to_string_lossy().into_owned());
    }
    found.retain(|name| name != "README.md");
    found.sort();
    ensure(found == GUIDES, || format!("docs/guides has {found:?}"))?;
    let list = fs::read_to_string(folder().join("README.md"))?;
    for guide in GUIDES {
        ensure(list.contains(&format!("({guide})")), || format!("docs/guides/README.md does not name {guide}"))?;
    }
    Ok(())
}

/// One command of a guide.
struct Step {
    /// As the text names it, in lower case.
    machine: String,
    command: String,
    fails: bool,
}

/// The commands of a guide, in order.
fn read(guide: &str) -> Result<Vec<Step>> {
    let text = fs::read_to_string(folder().join(guide))?;
    let mut steps = Vec::new();
    // The paragraph before a block; its last "On X" or "on X" says where.
    let (mut paragraph, mut block): (String, Option<String>) = (String::new(), None);
    let mut typed = false;
    for line in text.lines() {
        let line = line.trim_start();
        match (&mut block, line) {
            (None, "```sh") => block = Some(machine_of(&paragraph).with_context(|| format!("{guide}: {paragraph}"))?),
            (None, "```typed") => (block, typed) = (Some(String::new()), true),
            // Another kind of block: not to be run.
            (None, line) if line.starts_with("```") => block = Some(String::new()),
            (Some(_), "```") => (block, paragraph, typed) = (None, String::new(), false),
            (Some(_), line) if typed => {
                let step: &mut Step = steps.last_mut().with_context(|| format!("{guide}: nothing waits for {line}"))?;
                step.command = format!("printf '%s\\n' '{line}' | {}", step.command);
            }
            (Some(machine), line) if !machine.is_empty() => {
                let (command, fails) = line.strip_suffix("# fails").map_or((line, false), |command| (command, true));
                steps.push(Step { machine: machine.clone(), command: command.trim().to_owned(), fails });
            }
            (Some(_), _) => {}
            (None, "") if !paragraph.ends_with(':') => paragraph.clear(),
            (None, line) => paragraph = format!("{paragraph} {line}").trim().to_owned(),
        }
    }
    Ok(steps)
}

/// "…, on the north router:" → "north router".
fn machine_of(paragraph: &str) -> Option<String> {
    let lower = paragraph.to_lowercase();
    let text = lower.strip_suffix(':')?;
    // What may follow the name: "On the laptop, nothing is to be done:".
    let at = text.rfind(" on ").map(|at| at + 4).or_else(|| text.strip_prefix("on ").map(|_| 3))?;
    let name = text[at..].split(',').next()?;
    let name = ["the ", "your "].iter().find_map(|article| name.strip_prefix(article)).unwrap_or(name);
    Some(name.to_owned())
}

/// Does what a guide says. What each command printed, by the command as it is in the guide.
fn follow(guide: &str, machines: &[(&str, &Machine)]) -> Result<BTreeMap<String, String>> {
    let (mut token, mut said) = (None::<String>, BTreeMap::new());
    let steps = read(guide)?;
    ensure(steps.len() >= 10, || format!("{guide} has {} commands", steps.len()))?;
    for step in &steps {
        let (_, machine) = machines
            .iter()
            .find(|(name, _)| *name == step.machine)
            .with_context(|| format!("{guide} names {:?}, which is none of its machines", step.machine))?;
        let command = match (&token, step.command.contains("TOKEN")) {
            (Some(token), true) => step.command.replace("TOKEN", token),
            (None, true) => bail!("{guide} uses a token before any was printed"),
            _ => step.command.clone(),
        };
        if step.fails {
            ensure(machine.output(&command)?.status.code() != Some(0), || format!("{guide}: {} worked", step.command))?;
            continue;
        }
        let looks = LOOKS.iter().any(|word| format!("{}\n", step.command).starts_with(word));
        let patience = if looks { PATIENCE } else { Duration::ZERO };
        // What was begun before a route was there waits for it in vain, and a person presses Ctrl-C.
        let limit = if looks { LOOK } else { COMMAND_LIMIT };
        let text = eventually(&step.command, patience, || machine.sh_within(&command, limit))
            .with_context(|| format!("{guide}, on {}: {}", step.machine, step.command))?;
        for word in
            text.split_whitespace().filter(|w| w.starts_with("meshd-claim1-") || w.starts_with("meshd-invite1-"))
        {
            token = Some(word.to_owned());
        }
        said.insert(step.command.clone(), text);
    }
    println!("    {} commands", steps.len());
    Ok(said)
}

/// A command printed this.
fn printed(said: &BTreeMap<String, String>, command: &str, wanted: &str) -> Result<()> {
    let text = said.get(command).with_context(|| format!("no guide has the command {command}"))?;
    ensure(text.contains(wanted), || format!("{command}: {text}"))
}

fn internet() -> Result<(Segment, Machine)> {
    need(&[("curl", "curl"), ("ping", "iputils-ping")])?;
    let internet = Segment::internet()?;
    let server = Machine::new("server", internet.host("server", 5)?, SERVER)?;
    Ok((internet, server))
}

/// A machine behind a router.
fn at(router: &Router, name: &str, number: u8) -> Result<Machine> {
    Machine::new(name, router.lan.host(name, number)?, SERVER)
}

/// A web page at an address of a machine, `any` being all.
fn page(machine: &Machine, at: &str, text: &str) -> Result<()> {
    web(&machine.namespace, at.parse::<SocketAddr>()?, text)
}

fn reach_my_nas() -> Result<()> {
    let (internet, server) = internet()?;
    let home = internet.router("home", 1, Nat::Home)?;
    let cafe = internet.router("cafe", 8, Nat::Home)?;
    let (nas, laptop) = (at(&home, "nas", 2)?, at(&cafe, "laptop", 2)?);
    let printer = at(&home, "printer", 20)?;
    page(&nas, "[::]:80", "nas")?;
    page(&printer, "192.168.1.20:80", "printer")?;
    let said = follow("reach-my-nas.md", &[("server", &server), ("nas", &nas), ("laptop", &laptop)])?;
    printed(&said, "curl http://nas/", "nas")?;
    printed(&said, "curl http://192.168.1.20/", "printer")?;
    printed(&said, "sudo meshd ping nas", "pong from nas")?;
    eventually("the lost laptop is out", PATIENCE, || {
        ensure(laptop.output("curl --max-time 1 http://nas/")?.status.code() != Some(0), || "it is in".to_owned())
    })
}

fn join_two_offices() -> Result<()> {
    let (internet, server) = internet()?;
    let (north, south) = (internet.router("north", 10, Nat::Home)?, internet.router("south", 20, Nat::Home)?);
    let (northgate, southgate) = (at(&north, "northgate", 2)?, at(&south, "southgate", 2)?);
    let (desk, printer) = (at(&north, "desk", 3)?, at(&south, "printer", 3)?);
    let north_router = Machine::new("router-n", north.namespace.clone(), SERVER)?;
    let south_router = Machine::new("router-s", south.namespace.clone(), SERVER)?;
    page(&printer, "192.168.20.3:80", "printer")?;
    let machines = [
        ("server", &server),
        ("northgate", &northgate),
        ("southgate", &southgate),
        ("north router", &north_router),
        ("south router", &south_router),
        ("desk", &desk),
    ];
    let said = follow("join-two-offices.md", &machines)?;
    // Under its own address.
    printed(&said, "curl http://192.168.20.3/", "printer 192.168.10.3")?;
    printed(&said, "sudo meshd routes", "192.168.10.0/24")
}

fn replace_port_forwarding() -> Result<()> {
    let (internet, server) = internet()?;
    let home = internet.router("home", 1, Nat::Home)?;
    let cafe = internet.router("cafe", 8, Nat::Home)?;
    let elsewhere = internet.router("elsewhere", 9, Nat::Home)?;
    home.namespace.nft(
        "table ip forwarded { chain prerouting { type nat hook prerouting priority -100; iifname \"wan\" tcp dport 8080 dnat to \
         192.168.1.2; }\n }\nadd rule inet fw forward ct status dnat accept\n",
    )?;
    let router = Machine::new("router", home.namespace.clone(), SERVER)?;
    let (homeserver, laptop) = (at(&home, "homeserver", 2)?, at(&cafe, "laptop", 2)?);
    let friend = at(&elsewhere, "friend", 2)?;
    page(&homeserver, "[::]:8080", "page")?;
    let machines = [
        ("server", &server),
        ("homeserver", &homeserver),
        ("laptop", &laptop),
        ("router", &router),
        ("friend's machine", &friend),
    ];
    let said = follow("replace-port-forwarding.md", &machines)?;
    printed(&said, "curl http://homeserver:8080/", "page ")
}

fn family_relay() -> Result<()> {
    let (internet, server) = internet()?;
    let home = internet.router("home", 1, Nat::Home)?;
    let hers = internet.router("hers", 8, Nat::Symmetric)?;
    let carrier = internet.router("carrier", 9, Nat::Symmetric)?;
    let (desktop, grandma, cottage) = (at(&home, "desktop", 2)?, at(&hers, "grandma", 2)?, at(&carrier, "cottage", 2)?);
    let machines =
        [("server", &server), ("desktop", &desktop), ("grandma's laptop", &grandma), ("cottage's computer", &cottage)];
    let said = follow("family-relay.md", &machines)?;
    printed(&said, "sudo meshd status", "grandma")?;
    printed(&said, "sudo meshd status", "family")?;
    // The firewall is shut for all else.
    page(&server, "[::]:8080", "open")?;
    let open = desktop.output("curl --max-time 1 http://vpn.example.org:8080/")?.status.success();
    ensure(!open, || "the server's firewall is open".to_owned())?;
    server.sh("tar -tzf /root/meshd-coordinator.tar.gz meshd-coordinator/store.db").map(drop)
}

fn corporate_proxy() -> Result<()> {
    need(&[("tinyproxy", "tinyproxy-bin")])?;
    let (internet, server) = internet()?;
    let work = internet.router("work", 7, Nat::Home)?;
    let home = internet.router("homenat", 1, Nat::Home)?;
    work.namespace.nft(
        "table inet only { chain forward { type filter hook forward priority -10; policy drop;\n ct state established,related \
         accept;\n }\n }\n",
    )?;
    let proxy = Machine::new("proxy", work.namespace.clone(), SERVER)?;
    proxy.sh(
        "printf 'Port 3128\\nListen 192.168.7.1\\nTimeout 600\\nMaxClients 100\\nBasicAuth ann s3cret\\nConnectPort 443\\n' > \
         /root/tinyproxy.conf",
    )?;
    let mut running = proxy.start("tinyproxy -d -c /root/tinyproxy.conf")?;
    eventually("the proxy listens", PATIENCE, || {
        let sockets = proxy.sh("ss -ltn")?;
        ensure(sockets.contains(":3128 "), || sockets)
    })?;
    let machine = at(&home, "home", 2)?;
    page(&machine, "[::]:80", "home")?;
    // Nothing but the proxy's name can be resolved there.
    let worker = Machine::new("work-pc", work.lan.host("work-pc", 2)?, "192.168.7.1 proxy.corp.example\n")?;
    let machines = [("server", &server), ("home machine", &machine), ("work machine", &worker)];
    let said = follow("corporate-proxy.md", &machines)?;
    printed(&said, "curl http://home/", "home")?;
    printed(&said, "sudo meshd status", "proxy.corp.example:3128")?;
    printed(&said, "sudo meshd ping home", "via relay")?;
    running.kill()?;
    Ok(())
}

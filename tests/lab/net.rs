//! Topologies by name, and a shell inside one (`scripts/lab NAME`). Cases build theirs from the same functions.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use meshd::cli::demo::contain::{After, contain};
use meshd::cli::demo::net::{Namespace, Nat, Router};

use crate::packets::delay;
use crate::world::World;

/// Machines by name, ready to join.
pub struct Topology {
    pub world: World,
    pub machines: Vec<(&'static str, Namespace)>,
}

impl Topology {
    pub fn join(&self) -> Result<Vec<crate::world::Node>> {
        let machines: Vec<(&str, &Namespace)> = self.machines.iter().map(|(name, machine)| (*name, machine)).collect();
        self.world.join(&machines)
    }
}

type Builder = fn() -> Result<Topology>;

/// Every topology with what it is for.
pub const TOPOLOGIES: &[(&str, &str, Builder)] = &[
    ("home-nat", "two machines, each behind an ordinary NAT, 20 ms apart", home_nat),
    ("open-input", "the same, on routers without a firewall of their own", open_input),
    ("symmetric", "two machines, each behind a NAT that cannot be punched", symmetric),
    ("one-symmetric", "one machine behind an ordinary NAT, one behind one that cannot be punched", one_symmetric),
    ("same-lan", "two machines on one LAN", same_lan),
    ("public-nat", "a machine with a public address and one behind an ordinary NAT", public_nat),
    ("double-nat", "one machine behind two NATs, one behind one", double_nat),
    ("public", "three machines with public addresses", public),
];

/// ```text
///            coordinator .10/.11
///                 │ 20 ms
///  ───────────────┴─────── internet 203.0.113.0/24 ──
///     │ 10 ms                 │ 10 ms
///  [NAT ra .21]            [NAT rb .22]
///     │ 192.168.21.0/24       │ 192.168.22.0/24
///     a .2                    b .2
/// ```
///
/// One way: a to b 20 ms, either to the coordinator 30 ms, relayed 60 ms.
fn two_nats(left: Nat, right: Nat) -> Result<Topology> {
    Ok(two_homes(left, right, Duration::from_millis(20))?.0)
}

/// The same with the coordinator so far from the internet's middle, and both routers.
pub fn two_homes(left: Nat, right: Nat, coordinator: Duration) -> Result<(Topology, Router, Router)> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, left)?;
    let rb = world.internet.router("rb", 22, right)?;
    delay(&world.internet, "coord", coordinator)?;
    delay(&world.internet, "ra", Duration::from_millis(10))?;
    delay(&world.internet, "rb", Duration::from_millis(10))?;
    let machines = vec![("a", ra.lan.host("a", 2)?), ("b", rb.lan.host("b", 2)?)];
    Ok((Topology { world, machines }, ra, rb))
}

pub fn home_nat() -> Result<Topology> {
    two_nats(Nat::Home, Nat::Home)
}

pub fn open_input() -> Result<Topology> {
    two_nats(Nat::OpenInput, Nat::OpenInput)
}

pub fn symmetric() -> Result<Topology> {
    two_nats(Nat::Symmetric, Nat::Symmetric)
}

pub fn one_symmetric() -> Result<Topology> {
    two_nats(Nat::Home, Nat::Symmetric)
}

/// ```text
///   coordinator .10/.11 ── internet ── [NAT ra .21] ─┬─ a 192.168.21.2
///                                                    └─ b 192.168.21.3
/// ```
pub fn same_lan() -> Result<Topology> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let machines = vec![("a", ra.lan.host("a", 2)?), ("b", ra.lan.host("b", 3)?)];
    Ok(Topology { world, machines })
}

/// ```text
///   a 203.0.113.31 ── internet ── [NAT rb .22] ── b 192.168.22.2
///                        └─ coordinator .10/.11
/// ```
pub fn public_nat() -> Result<Topology> {
    let world = World::new()?;
    let rb = world.internet.router("rb", 22, Nat::Home)?;
    let machines = vec![("a", world.internet.host("a", 31)?), ("b", rb.lan.host("b", 2)?)];
    Ok(Topology { world, machines })
}

/// ```text
///   a 192.168.41.2 ── [NAT ra .41] ── [NAT isp .21] ── internet ── [NAT rb .22] ── b 192.168.22.2
///                                                         └─ coordinator .10/.11
/// ```
pub fn double_nat() -> Result<Topology> {
    let world = World::new()?;
    let isp = world.internet.router("isp", 21, Nat::Home)?;
    let ra = isp.lan.router("ra", 41, Nat::Home)?;
    let rb = world.internet.router("rb", 22, Nat::Home)?;
    let machines = vec![("a", ra.lan.host("a", 2)?), ("b", rb.lan.host("b", 2)?)];
    Ok(Topology { world, machines })
}

/// ```text
///   a .31 ──┐
///   b .32 ──┼── internet ── coordinator .10/.11
///   c .33 ──┘
/// ```
pub fn public() -> Result<Topology> {
    let world = World::new()?;
    let mut machines = Vec::new();
    for (name, number) in [("a", 31), ("b", 32), ("c", 33)] {
        machines.push((name, world.internet.host(name, number)?));
    }
    Ok(Topology { world, machines })
}

/// `scripts/lab NAME`.
pub fn shell(name: &str) -> ExitCode {
    match try_shell(name) {
        Ok(code) => code,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_shell(name: &str) -> Result<ExitCode> {
    let Some((_, about, build)) = TOPOLOGIES.iter().find(|(known, ..)| *known == name) else {
        let list: Vec<String> = TOPOLOGIES.iter().map(|(name, about, _)| format!("  {name:<14} {about}")).collect();
        println!("usage: scripts/lab TOPOLOGY\n\n{}", list.join("\n"));
        if name.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        bail!("there is no topology {name:?}");
    };
    if let Some(ended) = contain(After::Discard)? {
        return Ok(ExitCode::from(ended.code));
    }
    let nodes = build()?.join()?;
    println!("{about}. Machines:");
    for node in &nodes {
        let meshd = env!("CARGO_BIN_EXE_meshd");
        println!("  ip netns exec {} {meshd} --state-dir {} status", node.namespace.name(), node.state_dir().display());
    }
    println!("Leave the shell to remove it all.");
    // The process inside has no standard input of its own: the terminal it is.
    let status = Command::new("bash").stdin(std::fs::File::open("/dev/tty")?).status()?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

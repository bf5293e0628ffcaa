//! What is left of a daemon that was killed: nothing, after `meshd down`.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Result;
use meshd::cli::demo::net::Nat;
use meshd::daemon::footprint;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::picture::{picture, unchanged};
use crate::runner::{Case, case};
use crate::world::{Node, World, ensure, eventually, let_pass, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("footprint::killed_at_any_change_of_up_nothing_stays", killed_in_up),
        case("footprint::killed_at_any_moment_of_a_change_nothing_stays", killed_in_set),
    ]
}

/// Everything drops what is forwarded, so that everything has to be changed.
const CLOSED: &str =
    "table ip filter {\n chain FORWARD {\n  type filter hook forward priority filter; policy drop;\n }\n}\n";

struct Places {
    _world: World,
    /// Founder, and a router to its LAN and an exit node.
    gate: Node,
    /// Uses both, and leads to its own LAN.
    a: Node,
}

fn places() -> Result<Places> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let rb = world.internet.router("rb", 22, Nat::Home)?;
    let gate = Node::new("gate", rb.lan.host("gate", 2)?);
    let a = Node::new("a", ra.lan.host("a", 2)?);
    a.namespace.nft(CLOSED)?;
    gate.up(&world.coordinator.claim()?)?;
    gate.run(&["set", "--advertise-routes", "192.168.22.0/24,2001:db8:22::/64", "--advertise-exit-node"])?;
    for prefix in ["192.168.22.0/24", "2001:db8:22::/64", "exit-node"] {
        gate.run(&["routes", "approve", "gate", prefix])?;
    }
    Ok(Places { _world: world, gate, a })
}

impl Places {
    fn kill(&self) -> Result<()> {
        if let Ok(pid) = self.a.pid() {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        }
        eventually("it is dead", Duration::from_secs(5), || {
            ensure(self.a.pid().is_err(), || "it holds its lock".to_owned())
        })
    }

    fn changes(&self) -> usize {
        footprint::read(&self.a.state_dir()).map_or(0, |changes| changes.len())
    }
}

fn killed_in_up() -> Result<()> {
    let places = places()?;
    let a = &places.a;
    let before = picture(&a.namespace)?;
    let token = places.gate.run(&["invite", "--routes", "192.168.21.0/24,2001:db8:21::/64"])?;
    a.up(token.trim())?;
    a.run(&["set", "--advertise-routes", "192.168.21.0/24,2001:db8:21::/64", "--exit-node", "gate", "--kill-switch"])?;
    let all = until("everything is changed", Duration::from_secs(10), || {
        let health = serde_json::to_string(&a.status()?.health)?;
        ensure(!health.contains("\"error\""), || health)?;
        let n = places.changes();
        Ok((n >= 8).then_some(n))
    })?;
    a.run(&["down"])?;
    unchanged(&before, &picture(&a.namespace)?)?;
    for n in 1..=all {
        let mut command = a.meshd(&["up"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut starting = a.namespace.spawn(&mut command, "/run/lab/starting".as_ref())?;
        until(&format!("{n} changes are written down"), Duration::from_secs(10), || {
            Ok((places.changes() >= n).then_some(()))
        })?;
        places.kill()?;
        starting.wait()?;
        // By `down` without a daemon, by the command for a service manager, or by the next `up`.
        match n % 3 {
            0 => drop(a.run(&["down"])?),
            1 => drop(a.run(&["footprint", "--undo"])?),
            _ => {
                a.run(&["up"])?;
                a.run(&["down"])?;
            }
        }
        unchanged(&before, &picture(&a.namespace)?).map_err(|e| e.context(format!("killed after {n} of {all}")))?;
        ensure(places.changes() == 0, || "the journal is not empty".to_owned())?;
    }
    println!("killed after each of {all} changes");
    Ok(())
}

fn killed_in_set() -> Result<()> {
    let places = places()?;
    let a = &places.a;
    let before = picture(&a.namespace)?;
    let token = places.gate.run(&["invite", "--routes", "192.168.21.0/24,2001:db8:21::/64"])?;
    a.up(token.trim())?;
    let changes: [&[&str]; 2] = [
        &["set", "--advertise-routes", "192.168.21.0/24,2001:db8:21::/64", "--exit-node", "gate", "--kill-switch"],
        &["set", "--advertise-routes", "none", "--exit-node", "none", "--kill-switch=false"],
    ];
    // Spread over what a change takes, more densely at its beginning.
    for (round, micros) in [0_u64, 500, 1_000, 2_000, 4_000, 7_000, 11_000, 16_000, 25_000, 40_000].iter().enumerate() {
        eventually("the exit node is known", Duration::from_secs(10), || a.run(&["set", "--exit-node", "gate"]))?;
        a.run(&["set", "--exit-node", "none"])?;
        for change in changes {
            let mut command = a.meshd(change);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut setting = a.namespace.spawn(&mut command, "/run/lab/setting".as_ref())?;
            // The command's own start takes a few milliseconds.
            let_pass(Duration::from_micros(3_000 + micros));
            places.kill()?;
            setting.wait()?;
            a.run(&["down"])?;
            unchanged(&before, &picture(&a.namespace)?).map_err(|e| e.context(format!("round {round}: {change:?}")))?;
            a.run(&["up"])?;
        }
    }
    a.run(&["down"])?;
    unchanged(&before, &picture(&a.namespace)?)
}

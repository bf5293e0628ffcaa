//! What is left of a daemon that was killed: nothing, after `meshd down`.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Result;
use meshd::cli::demo::net::Nat;
use meshd::daemon::footprint;
use meshd::os::lock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::machine::Machine;
use crate::picture::{picture, unchanged};
use crate::runner::{Case, case};
use crate::world::{Node, World, ensure, eventually, let_pass, until};

pub fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "footprint::killed_at_any_step_of_the_journal_nothing_stays",
            limit: Duration::from_secs(400),
            run: killed_in_each_phase,
        },
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

/// A change of what the node does, with what is set up before it.
struct Operation {
    name: &'static str,
    /// `meshd set` with these, once the daemon is up.
    before: &'static str,
    /// Then `meshd down`.
    from_down: bool,
    /// `meshd` with these is where the daemon dies.
    command: &'static str,
}

const ALL: &str = "--advertise-routes 192.168.21.0/24,2001:db8:21::/64 --exit-node gate --kill-switch --accept-dns";
const NOTHING: &str = "--advertise-routes none --exit-node none --kill-switch=false --accept-dns=false";

const OPERATIONS: [Operation; 8] = [
    Operation { name: "up", before: ALL, from_down: true, command: "up" },
    Operation { name: "down", before: ALL, from_down: false, command: "down" },
    Operation {
        name: "routes",
        before: NOTHING,
        from_down: false,
        command: "set --advertise-routes 192.168.21.0/24,2001:db8:21::/64",
    },
    Operation { name: "no routes", before: ALL, from_down: false, command: "set --advertise-routes none" },
    Operation { name: "names", before: NOTHING, from_down: false, command: "set --accept-dns" },
    Operation { name: "no names", before: ALL, from_down: false, command: "set --accept-dns=false" },
    Operation { name: "exit node", before: NOTHING, from_down: false, command: "set --exit-node gate --kill-switch" },
    Operation {
        name: "no exit node",
        before: ALL,
        from_down: false,
        command: "set --exit-node none --kill-switch=false",
    },
];

/// A machine with its own resolver, on which the daemon dies at a step of its journal.
struct Patient {
    machine: Machine,
    state_dir: PathBuf,
}

impl Patient {
    fn crash_at(&self) -> PathBuf {
        self.state_dir.join("crash-at")
    }

    /// What is written down now, without its numbers: those of the interface are others after each start.
    fn journal(&self) -> Vec<String> {
        let without_numbers = |text: String| text.chars().filter(|c| !c.is_ascii_digit()).collect();
        let changes = footprint::read(&self.state_dir).unwrap_or_default();
        let mut changes: Vec<String> = changes.iter().map(|change| without_numbers(change.text())).collect();
        changes.sort();
        changes
    }

    fn picture(&self) -> Result<String> {
        Ok(picture(&self.machine.namespace)? + &self.machine.sh("cat /etc/resolv.conf")?)
    }

    fn is_dead(&self) -> bool {
        lock::holder(&self.state_dir.join("lock")).is_none()
    }

    /// Up and settled as an operation needs it. `settled` is the journal then, once that is known.
    fn prepare(&self, operation: &Operation, settled: Option<&Vec<String>>) -> Result<Vec<String>> {
        self.machine.sh("meshd up")?;
        eventually("the exit node is known", Duration::from_secs(10), || {
            self.machine.sh(&format!("meshd set {}", operation.before))
        })?;
        match settled {
            Some(settled) => {
                until("it is settled", Duration::from_secs(10), || Ok((self.journal() == *settled).then_some(())))?
            }
            None => let_pass(Duration::from_millis(1_500)),
        }
        let journal = self.journal();
        if operation.from_down {
            self.machine.sh("meshd down")?;
        }
        Ok(journal)
    }

    /// How many steps an operation has.
    fn steps(&self, operation: &Operation) -> Result<u32> {
        const MANY: u32 = 1_000;
        fs::write(self.crash_at(), MANY.to_string())?;
        self.machine.sh(&format!("meshd {}", operation.command))?;
        if operation.command != "down" {
            let_pass(Duration::from_millis(1_500));
        }
        let left: u32 = fs::read_to_string(self.crash_at())?.trim().parse()?;
        fs::remove_file(self.crash_at())?;
        if operation.command != "down" {
            self.machine.sh("meshd down")?;
        }
        Ok(MANY - left)
    }
}

fn killed_in_each_phase() -> Result<()> {
    let world = World::new()?;
    let ra = world.internet.router("ra", 21, Nat::Home)?;
    let rb = world.internet.router("rb", 22, Nat::Home)?;
    let gate = Node::new("gate", rb.lan.host("gate", 2)?);
    gate.up(&world.coordinator.claim()?)?;
    gate.run(&["set", "--advertise-exit-node"])?;
    gate.run(&["routes", "approve", "gate", "exit-node"])?;
    let machine = Machine::new("a", ra.lan.host("a", 2)?, "")?;
    let patient = Patient { state_dir: machine.files().join("meshd"), machine };
    patient.machine.namespace.nft(CLOSED)?;
    let before = patient.picture()?;
    let token = gate.run(&["invite", "--routes", "192.168.21.0/24,2001:db8:21::/64"])?;
    patient.machine.sh(&format!("meshd up {}", token.trim()))?;
    patient.machine.sh("meshd down")?;
    unchanged(&before, &patient.picture()?)?;
    let mut phases = 0;
    for operation in &OPERATIONS {
        let settled = patient.prepare(operation, None)?;
        let steps = patient.steps(operation)?;
        unchanged(&before, &patient.picture()?).map_err(|e| e.context(operation.name))?;
        println!("    {}: {steps} steps", operation.name);
        for step in 0..steps {
            patient.prepare(operation, Some(&settled))?;
            fs::write(patient.crash_at(), step.to_string())?;
            // It may be said to have worked: the daemon goes on with it afterwards.
            patient.machine.output(&format!("meshd {}", operation.command))?;
            let which = format!("{}, killed at step {} of {steps}", operation.name, step + 1);
            until(&format!("{which}: it is dead"), Duration::from_secs(10), || Ok(patient.is_dead().then_some(())))?;
            ensure(!patient.crash_at().exists(), || format!("{which}: it ended by itself"))?;
            // By `down` without a daemon, by the command for a service manager, or by the next `up`.
            let repair = ["meshd down", "meshd footprint --undo", "meshd up && meshd down"][phases % 3];
            patient.machine.sh(repair).map_err(|e| e.context(which.clone()))?;
            unchanged(&before, &patient.picture()?).map_err(|e| e.context(which.clone()))?;
            ensure(patient.journal().is_empty(), || format!("{which}: the journal is not empty"))?;
            phases += 1;
        }
    }
    println!("    killed in {phases} phases");
    ensure(phases >= 20, || format!("only {phases} phases"))
}

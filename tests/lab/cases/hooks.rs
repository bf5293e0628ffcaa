//! Programs that hear of events.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::net;
use crate::runner::{Case, case};
use crate::world::{Node, ensure, error_of, eventually, until};

pub fn cases() -> Vec<Case> {
    vec![
        case("hooks::a_program_hears_of_peers_paths_routes_and_health", hears),
        case("hooks::one_that_hangs_or_fails_is_named_and_holds_nobody_up", hangs),
    ]
}

const PATIENCE: Duration = Duration::from_secs(15);
/// What the program wrote down.
const HEARD: &str = "/run/lab/heard";

fn program(name: &str, text: &str) -> Result<String> {
    let file = format!("/run/lab/{name}");
    fs::write(&file, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&file, Permissions::from_mode(0o755))?;
    Ok(file)
}

fn heard() -> Result<Vec<Value>> {
    let text = fs::read_to_string(HEARD).unwrap_or_default();
    // The last line may be half written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// Waits until the program has heard of something.
fn wait_for(what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    until(what, PATIENCE, || Ok(heard()?.into_iter().find(|event| is(event))))
        .with_context(|| format!("heard: {:#?}", heard().unwrap_or_default()))
}

/// Three machines, the first two with meshd.
fn two() -> Result<(net::Topology, Node, Node)> {
    let lab = net::public()?;
    let nodes: Vec<Node> = lab.machines.iter().map(|(name, machine)| Node::new(name, machine.clone())).collect();
    let (a, b) = (nodes[0].clone(), nodes[1].clone());
    Ok((lab, a, b))
}

fn hears() -> Result<()> {
    let (lab, a, b) = two()?;
    let hook = program("hook", &format!("cat >> {HEARD}"))?;
    a.namespace
        .run(a.meshd(&["up", "--name", "a", "--on-event", &hook]).env("MESHD_TOKEN", lab.world.coordinator.claim()?))?;
    b.up(a.invite()?.as_str())?;
    let of = |event: &Value, kind: &str, peer: &str| event["kind"] == kind && event["peer"]["name"] == peer;
    let up = wait_for("b is up", |event| of(event, "peer-up", "b"))?;
    let address = b.address(true)?.to_string();
    ensure(up["peer"]["addresses"][0] == address.as_str() && up["v"] == 1, || up.to_string())?;
    ensure(up["network"] == "home" && up["node"] == "a" && up["time"].as_u64() > Some(1_600_000_000), || {
        up.to_string()
    })?;
    a.ping_until_direct("b")?;
    let path = wait_for("a direct path", |event| of(event, "path", "b") && event["path"] == "direct")?;
    ensure(path["endpoint"].as_str().is_some_and(|at| at.starts_with("203.0.113.32:")), || path.to_string())?;
    b.run(&["set", "--advertise-routes", "10.99.0.0/16"])?;
    a.run(&["routes", "approve", "b", "10.99.0.0/16"])?;
    let is_route = |event: &Value| event["kind"] == "route" && event["prefix"] == "10.99.0.0/16";
    wait_for("a route", |event| is_route(event) && event["via"] == "b")?;
    a.run(&["routes", "revoke", "b", "10.99.0.0/16"])?;
    wait_for("no route", |event| is_route(event) && event["via"].is_null() && event["before"] == "b")?;
    b.run(&["down"])?;
    wait_for("b is down", |event| of(event, "peer-down", "b"))?;
    // It hears of health too: the coordinator is gone.
    drop(lab.world.coordinator);
    wait_for("health", |event| event["kind"] == "health" && event["over"] == false)?;
    // In order, with nothing missing.
    let numbers: Vec<u64> = heard()?.iter().filter_map(|event| event["seq"].as_u64()).collect();
    ensure(numbers.iter().copied().eq(1..=numbers.len() as u64), || format!("numbers {numbers:?}"))?;
    println!("    {} events", numbers.len());
    // It is kept over a restart, and ended by a word.
    a.run(&["down"])?;
    a.run(&["up"])?;
    ensure(a.run(&["set"])?.contains(&hook), || "it is forgotten".to_owned())?;
    a.run(&["set", "--on-event", "none"])?;
    ensure(!a.run(&["set"])?.contains(&hook), || "it is still set".to_owned())
}

fn hangs() -> Result<()> {
    let (lab, a, b) = two()?;
    a.up(&lab.world.coordinator.claim()?)?;
    for wrong in ["hook", "/nonexistent/hook", "/etc/passwd"] {
        let output = a.output(&["set", "--on-event", wrong, "--json"])?;
        ensure(!output.status.success() && error_of(&output)?["code"] == "on-event", || {
            format!("{wrong} is accepted")
        })?;
    }
    let says = |words: &str| {
        eventually(&format!("status says: {words}"), Duration::from_secs(20), || {
            let health = a.status()?.health;
            let line = health.iter().find(|line| line.code == "on-event");
            ensure(line.is_some_and(|line| line.text.contains(words)), || format!("{health:?}"))
        })
    };
    let fails = program("fails", "exit 7")?;
    a.run(&["set", "--on-event", &fails])?;
    b.up(&a.invite()?)?;
    says("exit code 7")?;
    let hook = program("hangs", "echo $$ > /run/lab/hangs.pid; exec sleep 1000")?;
    a.run(&["set", "--on-event", &hook])?;
    let pid = until("it runs", PATIENCE, || {
        Ok(fs::read_to_string("/run/lab/hangs.pid").ok().filter(|pid| pid.ends_with('\n')))
    })?;
    // Meanwhile everything works.
    a.ping_until_direct("b")?;
    let (code, pongs) = a.ping("b", &["-c", "3", "--interval", "100ms"])?;
    ensure(code == 0 && pongs.len() == 3, || format!("{code} {pongs:?}"))?;
    says("took longer than 10 s")?;
    let alive = || Path::new("/proc").join(pid.trim()).exists();
    ensure(!alive(), || "it still runs".to_owned())?;
    // One that is called is ended with the setting.
    let again = until("it runs for the next event", PATIENCE, || {
        let other = |now: &String| now.ends_with('\n') && *now != pid;
        Ok(fs::read_to_string("/run/lab/hangs.pid").ok().filter(other))
    })?;
    a.run(&["set", "--on-event", "none"])?;
    eventually("it is ended", Duration::from_secs(5), || {
        ensure(!Path::new("/proc").join(again.trim()).exists(), || "it still runs".to_owned())
    })?;
    eventually("nothing is said of it any more", Duration::from_secs(5), || {
        let health = a.status()?.health;
        ensure(health.iter().all(|line| line.code != "on-event"), || format!("{health:?}"))
    })
}

//! Starting, dying and leaving: what a node does to its machine.

use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net;
use crate::picture::{picture, unchanged};
use crate::runner::{Case, case};
use crate::world::{Node, ensure, error_of, eventually};

pub fn cases() -> Vec<Case> {
    vec![
        case("daemon::killed_it_is_back_within_three_seconds_with_the_same_addresses", killed),
        case("daemon::down_leaves_addresses_routes_and_rules_as_before", down),
        case("daemon::sigterm_does_what_down_does", sigterm),
        case("daemon::exit_codes_of_status", status_codes),
        case("daemon::a_removed_node_is_out", removed),
    ]
}

fn killed() -> Result<()> {
    let lab = net::home_nat()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    let before = nodes[1].status()?.me;
    kill(Pid::from_raw(i32::try_from(nodes[1].pid()?)?), Signal::SIGKILL)?;
    eventually("the daemon is gone", Duration::from_secs(5), || {
        ensure(nodes[1].pid().is_err(), || "it holds its lock".to_owned())
    })?;
    let start = Instant::now();
    nodes[1].run(&["up"])?;
    let took = start.elapsed();
    ensure(took <= Duration::from_secs(3), || format!("up took {took:?}"))?;
    let after = nodes[1].status()?.me;
    ensure(before.addresses == after.addresses && before.id == after.id, || format!("{before:?} is now {after:?}"))?;
    let (code, pongs) = nodes[0].ping("b", &["-c", "3"])?;
    ensure(code == 0, || format!("b does not answer after it: {pongs:?}"))
}

fn down() -> Result<()> {
    let lab = net::public()?;
    let c = Node::new("c", super::join::namespace(&lab, "c"));
    let before = picture(&c.namespace)?;
    lab.join()?;
    ensure(picture(&c.namespace)? != before, || {
        "up changes nothing: is the picture taken of the right machine?".to_owned()
    })?;
    c.run(&["down"])?;
    unchanged(&before, &picture(&c.namespace)?)?;
    // Twice is harmless; and after a SIGKILL there is still a way to leave nothing behind.
    c.run(&["down"])?;
    c.run(&["up"])?;
    kill(Pid::from_raw(i32::try_from(c.pid()?)?), Signal::SIGKILL)?;
    eventually("the daemon is gone", Duration::from_secs(5), || ensure(c.pid().is_err(), || "it is there".to_owned()))?;
    c.run(&["up"])?;
    c.run(&["down"])?;
    unchanged(&before, &picture(&c.namespace)?)
}

fn sigterm() -> Result<()> {
    let lab = net::public()?;
    let c = Node::new("c", super::join::namespace(&lab, "c"));
    let before = picture(&c.namespace)?;
    lab.join()?;
    kill(Pid::from_raw(i32::try_from(c.pid()?)?), Signal::SIGTERM)?;
    eventually("the daemon is gone", Duration::from_secs(5), || ensure(c.pid().is_err(), || "it is there".to_owned()))?;
    unchanged(&before, &picture(&c.namespace)?)
}

fn status_codes() -> Result<()> {
    let mut lab = net::public()?;
    let nodes = lab.join()?;
    let code = |args: &[&str]| -> Result<Option<i32>> { Ok(nodes[1].output(args)?.status.code()) };
    for args in [&["status"][..], &["status", "--check", "live"], &["status", "--check", "ready"]] {
        let code = code(args)?;
        ensure(code == Some(0), || format!("running: {args:?} ends with {code:?}"))?;
    }
    lab.world.coordinator.kill()?;
    eventually("the coordinator is missed", Duration::from_secs(40), || {
        ensure(!nodes[1].status()?.coordinator.connected, || "still connected".to_owned())
    })?;
    ensure(code(&["status", "--check", "ready"])? == Some(1), || "ready without a coordinator".to_owned())?;
    ensure(code(&["status", "--check", "live"])? == Some(0), || "not live without a coordinator".to_owned())?;
    ensure(code(&["status"])? == Some(0), || "status fails without a coordinator".to_owned())?;
    nodes[1].run(&["down"])?;
    for args in [&["status"][..], &["status", "--check", "live"], &["status", "--check", "ready"]] {
        let code = code(args)?;
        ensure(code == Some(1), || format!("down: {args:?} ends with {code:?}"))?;
    }
    let error = error_of(&nodes[1].output(&["status", "--json"])?)?;
    ensure(error["code"] == "not-running", || error.to_string())
}

fn removed() -> Result<()> {
    let lab = net::public()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("c")?;
    nodes[1].ping_until_direct("c")?;
    nodes[0].run(&["remove", "c"])?;
    for node in &nodes[..2] {
        eventually("c is out", Duration::from_secs(5), || {
            ensure(node.peer("c").is_err(), || format!("{} lists it", node.name))
        })?;
    }
    let to = nodes[0].address(true)?;
    // Without a way there, ping says so and sums nothing up.
    let seen = nodes[2].icmp(to, &["-c", "2", "-i", "0.2", "-W", "1"]);
    ensure(seen.is_err() || seen.is_ok_and(|seen| seen.received == 0), || "it is still answered".to_owned())?;
    eventually("the removed node has stopped", Duration::from_secs(5), || {
        ensure(nodes[2].pid().is_err(), || "its daemon runs".to_owned())
    })?;
    let again = nodes[2].output(&["up", "--json", "--timeout", "5s"])?;
    ensure(!again.status.success(), || "a removed node came up again".to_owned())?;
    ensure(error_of(&again)?["text"].as_str().is_some_and(|text| text.contains("removed")), || format!("{again:?}"))?;
    let refused = nodes[1].output(&["remove", "a", "--json"])?;
    ensure(!refused.status.success(), || "a node that is no admin removed another".to_owned())?;
    error_of(&refused).map(drop)
}

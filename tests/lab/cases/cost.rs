//! What an idle node costs.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::net;
use crate::packets::Tap;
use crate::runner::{Case, case};
use crate::world::{Node, ensure, let_pass};

pub fn cases() -> Vec<Case> {
    vec![case("cost::an_idle_node_is_small_and_quiet", idle)]
}

/// A number from `/proc/PID/status`.
pub(super) fn proc_status(node: &Node, field: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", node.pid()?))?;
    let line = text.lines().find(|line| line.starts_with(field)).with_context(|| format!("no {field} in {text}"))?;
    let number = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    number.with_context(|| format!("no number in {line}"))
}

/// Bars: 20 MiB resident, 6 threads. A debug build's code alone takes most of that, so the whole is only measured where
/// `MESHD_LAB_RELEASE` names a release build, as `scripts/check` does; what is not code is measured always.
fn idle() -> Result<()> {
    let release = std::env::var_os("MESHD_LAB_RELEASE");
    let lab = net::public()?;
    let nodes = lab.machines.iter().map(|(name, machine)| Node {
        binary: release.clone().map_or_else(|| env!("CARGO_BIN_EXE_meshd").into(), Into::into),
        ..Node::new(name, machine.clone())
    });
    let nodes = lab.world.join_as(nodes.collect())?;
    nodes[0].ping_until_direct("b")?;
    // Nobody talks for a while: half a minute is longer than any keepalive.
    let tap = Tap::start(&nodes[2].namespace, b"no such word")?;
    let_pass(Duration::from_secs(30));
    let quiet = tap.stop();
    for node in &nodes {
        let resident = proc_status(node, "VmRSS:")?;
        let anonymous = proc_status(node, "RssAnon:")?;
        let threads = proc_status(node, "Threads:")?;
        println!("{}: {resident} KiB resident ({anonymous} KiB of it not from files), {threads} threads", node.name);
        ensure(threads <= 6, || format!("{} runs {threads} threads", node.name))?;
        ensure(anonymous <= 8 << 10, || format!("{} holds {anonymous} KiB besides its code", node.name))?;
        let fits = release.is_none() || resident <= 20 << 10;
        ensure(fits, || format!("{} holds {resident} KiB", node.name))?;
    }
    println!("c, which talked to nobody: {} frames in 30 s", quiet.frames);
    // Only the link to the coordinator may be heard: a few keepalives a minute, each with its acknowledgements.
    ensure(quiet.frames <= 120, || format!("an idle node sees {} frames in 30 s", quiet.frames))
}

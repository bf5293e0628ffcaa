//! `meshd demo`, as the README's first command runs it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use serde_json::Value;

use crate::runner::{Case, skip};
use crate::world::{ensure, inherit_nothing};

pub fn cases() -> Vec<Case> {
    let limit = Duration::from_secs(120);
    vec![
        Case { name: "demo::shows_the_main_job", limit, run: as_this_user },
        Case { name: "demo::shows_the_main_job_to_an_ordinary_user", limit, run: as_ordinary_user },
    ]
}

fn check(command: &mut Command) -> Result<()> {
    inherit_nothing(command);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure(output.status.success(), || format!("{said}{}", String::from_utf8_lossy(&output.stderr)))?;
    let document: Value = serde_json::from_str(said.trim()).with_context(|| said.clone())?;
    let path = |peer: &str| {
        let peers = document["status"]["peers"].as_array().cloned().unwrap_or_default();
        let found = peers.into_iter().find(|p| p["name"] == peer).unwrap_or_default();
        found["path"]["kind"].as_str().unwrap_or_default().to_owned()
    };
    ensure(path("nas") == "direct" && path("phone") == "relay", || said.clone())?;
    let steps = document["steps"].as_array().map_or(0, Vec::len);
    ensure(steps >= 8, || format!("only {steps} steps: {said}"))
}

/// A box inside the case's own: namespaces nest.
fn as_this_user() -> Result<()> {
    check(Command::new(env!("CARGO_BIN_EXE_meshd")).args(["demo", "--json"]))
}

/// As `nobody`, for whom the program is copied to a place that it can read.
fn as_ordinary_user() -> Result<()> {
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    if map.split_whitespace().nth(2) == Some("1") {
        return skip("this run is an ordinary user's already: demo::shows_the_main_job shows it");
    }
    let none: Option<&str> = None;
    mount(none, "/mnt", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_meshd"), "/mnt/meshd")?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "/mnt/meshd", "demo", "--json"]);
    check(&mut command)
}

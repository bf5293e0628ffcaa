//! `meshd demo`, as the README's first command runs it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::contain::ROLE;
use serde_json::Value;

use crate::runner::Case;
use crate::world::ensure;

pub fn cases() -> Vec<Case> {
    let limit = Duration::from_secs(120);
    vec![
        Case { name: "demo::shows_the_main_job", limit, run: as_this_user },
        Case { name: "demo::shows_the_main_job_to_an_ordinary_user", limit, run: as_ordinary_user },
    ]
}

fn check(command: &mut Command) -> Result<()> {
    let output = command.env_remove(ROLE).output()?;
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

/// In a case the only user is root; a user namespace inside it in which that root has no rights outside is what an
/// ordinary user gets.
fn as_ordinary_user() -> Result<()> {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--", env!("CARGO_BIN_EXE_meshd"), "demo", "--json"]);
    check(&mut command)
}

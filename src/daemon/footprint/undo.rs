//! Taking changes back. Nothing here minds that a change was never made, or was undone by somebody else.

use std::path::Path;

use crate::daemon::footprint::{Change, Journal, read};
use crate::daemon::names;
use crate::daemon::problem;
use crate::daemon::routing::{nft, sysctl};
use crate::daemon::settings::Kept;
use crate::os::lock::{DirLock, LockError};
use crate::os::netlink::Netlink;
use crate::wire::local::Problem;

/// The settings of a state directory say that nothing may leave beside an exit node, not even when the daemon was killed.
#[must_use]
pub fn is_kept_closed(dir: &Path) -> bool {
    let kept =
        std::fs::read(dir.join("settings.json")).ok().and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
    kept.is_some_and(|kept| kept.settings.kill_switch && kept.settings.exit_node.is_some())
}

/// Takes back what is in the journal, the newest first. What cannot be undone stays in it and is returned, a sentence each.
pub async fn undo(journal: &Journal, netlink: &Netlink) -> Vec<String> {
    let mut failed = Vec::new();
    for change in journal.changes().iter().rev() {
        match undo_one(change, netlink).await {
            Ok(()) => journal.undone(change),
            Err(why) => {
                tracing::warn!(%why, "could not undo: {}", change.text());
                failed.push(format!("{}: {why}", change.text()));
            }
        }
    }
    failed
}

async fn undo_one(change: &Change, netlink: &Netlink) -> Result<(), String> {
    let shown = |e: std::io::Error| e.to_string();
    match change {
        Change::RouteTable { table } => netlink.flush_table(*table).await.map_err(shown),
        Change::Rule(rule) => netlink.remove_rule(rule).await.map_err(shown),
        Change::NftTable { name } => nft::remove_table(name).await.map_err(|p| p.text),
        Change::NftRules { family, table, chain, comment } => {
            nft::remove_rules(family, table, chain, comment).await.map_err(|p| p.text)
        }
        Change::ResolvconfEntry { entry } => names::system::remove_entry(entry).await.map_err(|p| p.text),
        Change::ResolvConfFile { path, before } => names::system::put_back(path, before).map_err(|p| p.text),
        Change::Sysctl { name, before, set } => sysctl::put_back(name, before, set).map_err(shown),
    }
}

/// For a command that finds no daemon: takes back what one left that was killed. Returns what was undone.
///
/// # Errors
/// Codes `already-running` (a daemon has the directory), `footprint` (the file cannot be read, or something in it cannot be
/// undone).
pub fn undo_left_behind(dir: &Path) -> Result<Vec<Change>, Problem> {
    let before = read(dir)?;
    if before.is_empty() {
        return Ok(before);
    }
    let _lock = DirLock::take(&dir.join("lock")).map_err(|e| match e {
        LockError::Held { .. } => problem(
            "already-running",
            "a meshd daemon is running; what it changed is undone when it stops",
            "`meshd down` stops it",
        ),
        LockError::Io(e) => problem("footprint", format!("the state directory cannot be locked: {e}"), "run as root"),
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| problem("resources", format!("the runtime cannot start: {e}"), ""))?;
    runtime.block_on(async {
        let journal = Journal::open(dir)?;
        let netlink = Netlink::connect()
            .map_err(|e| problem("interface", format!("the kernel's routing system does not answer: {e}"), ""))?;
        let failed = undo(&journal, &netlink).await;
        if failed.is_empty() {
            return Ok(before);
        }
        Err(problem(
            "footprint",
            format!("some changes could not be undone: {}", failed.join("; ")),
            "run as root; `meshd footprint` lists what is left",
        ))
    })
}

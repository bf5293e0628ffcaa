//! The footprint as people see it: the journal, and what hangs on the interface while the daemon runs.

use std::path::Path;

use serde::Serialize;

use crate::daemon::footprint::{Change, read};
use crate::daemon::problem;
use crate::os::netlink::Netlink;
use crate::wire::local::{Problem, Status};

/// One change to the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// `interface`, `address`, `route`, `rule`, `nft-table`, `nft-rules`, `dns`, `sysctl`.
    pub kind: &'static str,
    /// For people.
    pub text: String,
}

impl Entry {
    /// A change of the journal.
    #[must_use]
    pub fn of(change: &Change) -> Self {
        let kind = match change {
            Change::RouteTable { .. } => "route",
            Change::Rule(_) => "rule",
            Change::NftTable { .. } => "nft-table",
            Change::NftRules { .. } => "nft-rules",
            Change::ResolvconfEntry { .. } | Change::ResolvConfFile { .. } => "dns",
            Change::Sysctl { .. } => "sysctl",
        };
        Self { kind, text: change.text() }
    }
}

/// Everything. Without `status` no daemon runs, and there is no interface.
///
/// # Errors
/// Code `footprint`: the journal or the kernel's routes cannot be read.
pub fn list(dir: &Path, status: Option<&Status>) -> Result<Vec<Entry>, Problem> {
    let mut entries = Vec::new();
    if let Some(status) = status {
        let interface = &status.me.interface;
        entries.push(Entry { kind: "interface", text: interface.clone() });
        let on = |address| Entry { kind: "address", text: format!("{address} on {interface}") };
        entries.extend(status.me.addresses.iter().map(on));
    }
    for change in read(dir)? {
        let Change::RouteTable { table } = change else {
            entries.push(Entry::of(&change));
            continue;
        };
        for (prefix, nowhere) in routes(table)? {
            let kind = if nowhere { "unreachable " } else { "" };
            entries.push(Entry { kind: "route", text: format!("{kind}{prefix} in table {table}") });
        }
    }
    Ok(entries)
}

fn routes(table: u32) -> Result<Vec<(ipnet::IpNet, bool)>, Problem> {
    let cannot = |e: std::io::Error| problem("footprint", format!("the kernel's routes cannot be listed: {e}"), "");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    runtime.block_on(async { Netlink::connect()?.table(table).await }).map_err(cannot)
}

//! What meshd changed on this machine, so that all of it can be undone: by `meshd down`, by the next `meshd up`, and by
//! `meshd footprint --undo` for a service manager, whatever was killed when.
//!
//! `footprint.json` in the state directory holds every change that outlives the process. A change is written there (and on
//! the disk) before it is made, and struck out after it was undone, so the list may name what was never done but never
//! lacks what was. Undoing what is not there is harmless. What hangs on the interface (its addresses, the routes through
//! it, its own sysctls) goes with the process and is not in the file.

mod crash;
mod list;
mod undo;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::daemon::names::resolv_conf::Before;
use crate::daemon::problem;
use crate::daemon::store::write_atomically;
use crate::os::netlink::Rule;
use crate::wire::local::Problem;

pub use list::{Entry, list};
pub use undo::{is_kept_closed, undo, undo_left_behind};

/// The file's name in the state directory.
const FILE: &str = "footprint.json";
/// The most changes written down; a node makes a few dozen.
const MOST: usize = 1_024;

/// One change to the machine that outlives the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Change {
    /// Everything in a routing table of both families is meshd's.
    RouteTable {
        /// Its number.
        table: u32,
    },
    /// A routing policy rule.
    Rule(Rule),
    /// A whole nftables table of the `inet` family.
    NftTable {
        /// Its name.
        name: String,
    },
    /// Rules in somebody else's chain, known by their comment.
    NftRules {
        /// `ip`, `ip6` or `inet`.
        family: String,
        /// The table's name.
        table: String,
        /// The chain's name.
        chain: String,
        /// The comment of our rules.
        comment: String,
    },
    /// An entry in resolvconf's list.
    #[serde(rename = "resolvconf")]
    ResolvconfEntry {
        /// Its name.
        entry: String,
    },
    /// The file that says whom this machine asks for names.
    #[serde(rename = "resolv-conf")]
    ResolvConfFile {
        /// Where.
        path: PathBuf,
        /// What was there.
        before: Before,
    },
    /// A kernel setting.
    Sysctl {
        /// Below `/proc/sys/`.
        name: String,
        /// What it was.
        before: String,
        /// What meshd set.
        set: String,
    },
}

impl Change {
    /// For people, as a command would name it.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::RouteTable { table } => format!("routes in table {table}"),
            Self::Rule(rule) => rule.to_string(),
            Self::NftTable { name } => format!("table inet {name}"),
            Self::NftRules { family, table, chain, comment } => {
                format!("rules with the comment {comment:?} in {family} {table} {chain}")
            }
            Self::ResolvconfEntry { entry } => format!("entry {entry} in resolvconf"),
            Self::ResolvConfFile { path, .. } => format!("{} (what was there is kept)", path.display()),
            Self::Sysctl { name, before, set } => format!("{name} = {set} (was {before})"),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    v: u16,
    /// In the order made.
    changes: Vec<Change>,
}

/// The list on disk. Clones are the same.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
    changes: Arc<Mutex<Vec<Change>>>,
}

impl Journal {
    /// The list of a state directory; empty if there is no file.
    ///
    /// # Errors
    /// Code `footprint`: the file cannot be read.
    pub fn open(dir: &Path) -> Result<Self, Problem> {
        let changes = read(dir)?;
        Ok(Self { dir: dir.to_owned(), changes: Arc::new(Mutex::new(changes)) })
    }

    /// What is in it, in the order made.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        self.changes.lock().clone()
    }

    /// Writes a change down. Only when this has returned may it be made.
    ///
    /// # Errors
    /// Code `footprint`: the disk does not take it; then it must not be made.
    pub fn about_to(&self, change: &Change) -> Result<(), Problem> {
        let mut changes = self.changes.lock();
        if changes.contains(change) {
            return Ok(());
        }
        if changes.len() >= MOST {
            return Err(problem("footprint", "meshd would change too much on this machine", "see `meshd footprint`"));
        }
        changes.push(change.clone());
        let written = self.write(&changes);
        match written {
            Ok(()) => crash::step(&self.dir),
            Err(_) => drop(changes.pop()),
        }
        written
    }

    /// Strikes a change out that was undone. A disk that does not take it costs a harmless second undoing later.
    pub fn undone(&self, change: &Change) {
        crash::step(&self.dir);
        let mut changes = self.changes.lock();
        changes.retain(|known| known != change);
        if let Err(e) = self.write(&changes) {
            tracing::warn!(code = e.code, "{}", e.text);
        }
    }

    fn write(&self, changes: &[Change]) -> Result<(), Problem> {
        let path = self.dir.join(FILE);
        let written = if changes.is_empty() {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            }
        } else {
            serde_json::to_vec_pretty(&File { v: 1, changes: changes.to_vec() })
                .map_err(io::Error::from)
                .and_then(|text| write_atomically(&self.dir, FILE, &text))
        };
        written.map_err(|e| {
            problem("footprint", format!("{} cannot be written: {e}", path.display()), "is the disk full or read-only?")
        })
    }
}

/// The changes written down in a state directory.
///
/// # Errors
/// Code `footprint`.
pub fn read(dir: &Path) -> Result<Vec<Change>, Problem> {
    let path = dir.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => {
            let hint = "run as the user the daemon runs as (`sudo meshd …`)";
            return Err(problem("footprint", format!("{} cannot be read: {e}", path.display()), hint));
        }
    };
    match serde_json::from_slice::<File>(&bytes) {
        Ok(file) if file.v == 1 => Ok(file.changes),
        _ => Err(problem(
            "footprint",
            format!("{} is damaged, or of another version of meshd", path.display()),
            "undo by hand what it names (`ip rule`, `nft list ruleset`), then move it away",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctl(n: u32) -> Change {
        Change::Sysctl { name: format!("net/ipv4/conf/eth{n}/forwarding"), before: "0".into(), set: "1".into() }
    }

    #[test]
    fn a_change_is_on_disk_before_it_is_made_and_gone_when_undone() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let table = Change::RouteTable { table: 70_003 };
        for change in [&table, &sysctl(0), &table] {
            journal.about_to(change).unwrap();
            assert!(read(dir.path()).unwrap().contains(change));
        }
        assert_eq!(read(dir.path()).unwrap(), [table.clone(), sysctl(0)], "in order, each once");
        // What a killed daemon left is known to the next.
        assert_eq!(Journal::open(dir.path()).unwrap().changes().len(), 2);
        journal.undone(&table);
        journal.undone(&sysctl(0));
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn a_disk_that_takes_nothing_forbids_the_change() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        drop(dir);
        assert_eq!(journal.about_to(&sysctl(1)).unwrap_err().code, "footprint");
        assert!(journal.changes().is_empty());
    }

    #[test]
    fn damage_is_said_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), b"{\"v\":1,").unwrap();
        assert_eq!(read(dir.path()).unwrap_err().code, "footprint");
        assert!(dir.path().join(FILE).exists());
    }
}

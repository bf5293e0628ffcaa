//! A place for a test to have the daemon die: at a step of its journal, between two system calls, the same one each time.
//!
//! `crash-at` in the state directory says how many steps from now. Builds for people have none of this.

use std::path::Path;

/// The file's name in the state directory.
#[cfg(debug_assertions)]
const FILE: &str = "crash-at";

/// One step. If it is the one, the process is killed like by `kill -9`.
#[cfg(debug_assertions)]
pub(super) fn step(dir: &Path) {
    let file = dir.join(FILE);
    let Some(left) = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u32>().ok()) else {
        return;
    };
    match left.checked_sub(1) {
        Some(left) => drop(std::fs::write(&file, left.to_string())),
        None => {
            drop(std::fs::remove_file(&file));
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub(super) const fn step(_: &Path) {}

//! Kernel settings under `/proc/sys`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where they are.
const ROOT: &str = "/proc/sys";

fn path(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// What a setting is now; an error if the kernel has no such setting.
pub(super) fn get(name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path(name))?.trim().to_owned())
}

/// The names in a directory of settings, sorted.
pub(super) fn list(name: &str) -> Vec<String> {
    let entries = fs::read_dir(path(name)).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// Sets it.
pub(super) fn set(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value)
}

/// Puts a setting back, unless somebody else has changed it since or it is gone with its interface.
pub(in crate::daemon) fn put_back(name: &str, before: &str, ours: &str) -> io::Result<()> {
    match get(name) {
        Ok(now) if now == ours => set(name, before),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

//! One daemon for each state directory, enforced by the kernel: the lock goes with the process, however it ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The lock, held until dropped.
#[derive(Debug)]
pub struct DirLock {
    _file: Flock<File>,
}

/// Why the lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("held by another process")]
    Held {
        /// That process, if it wrote its number down.
        pid: Option<u32>,
    },
    /// The lock file could not be opened or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl DirLock {
    /// Takes the lock in the file at `path`, made with mode 0600 if it is missing, and writes this process's number into
    /// it for others to read.
    ///
    /// # Errors
    /// [`LockError`]; never waits.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut locked = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((back, Errno::EWOULDBLOCK)) => {
                file = back;
                return Err(LockError::Held { pid: read_pid(&mut file) });
            }
            Err((_, errno)) => return Err(LockError::Io(errno.into())),
        };
        locked.set_len(0)?;
        locked.seek(SeekFrom::Start(0))?;
        writeln!(locked, "{}", std::process::id())?;
        Ok(Self { _file: locked })
    }
}

/// The process that holds the lock at `path`, as far as it can be told; none if it is free.
#[must_use]
pub fn holder(path: &Path) -> Option<u32> {
    let mut file = File::open(path).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_free) => None,
        Err((back, _)) => {
            file = back;
            read_pid(&mut file)
        }
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_learns_who_holds_the_lock_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert_eq!(holder(&path), None);
        let held = DirLock::take(&path).unwrap();
        match DirLock::take(&path) {
            Err(LockError::Held { pid }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("expected Held, got {other:?}"),
        }
        assert_eq!(holder(&path), Some(std::process::id()));
        drop(held);
        assert_eq!(holder(&path), None);
        DirLock::take(&path).unwrap();
    }
}

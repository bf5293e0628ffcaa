//! The coordinator's state directory.
//!
//! | file | holds |
//! |---|---|
//! | `coordinator.lock` | the lock of the running coordinator |
//! | `store.db` | the network's records (SQLite; `store.db-wal` and `store.db-shm` beside it while in use) |
//! | `coordinator.key` | the Noise secret whose public half every token pins |
//! | `claim.secret` | what the claim token proves knowledge of; useless once the network is founded |
//! | `public-url` | the URL that tokens carry, as of the last start |
//! | `relay-usage` | what the relay carried this month: `2026-11 123456` (bytes) |
//! | `tls-cert.pem`, `tls-key.pem` | the self-made certificate |
//!
//! The directory is made with mode 0700, files with 0600. Small files are written to a temporary file, synced and renamed.
//! The store is made first and the key last: a key without a store means that a store was lost, which is an error and
//! never a fresh start.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::coord::relay_budget::{Month, Usage};
use crate::os::lock::{DirLock, LockError};
use crate::trust::keys::Secret32;
use crate::wire::keys::Digest32;
use crate::wire::local::Problem;

/// Where the state is unless `--state-dir` says otherwise.
pub const DEFAULT: &str = "/var/lib/meshd-coordinator";

const LOCK: &str = "coordinator.lock";
const STORE: &str = "store.db";
const KEY: &str = "coordinator.key";
const CLAIM: &str = "claim.secret";
const PUBLIC_URL: &str = "public-url";
const RELAY_USAGE: &str = "relay-usage";
const TLS_CERT: &str = "tls-cert.pem";
const TLS_KEY: &str = "tls-key.pem";

/// A state directory that exists.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// The coordinator's long-lived secrets.
#[derive(Debug)]
pub struct Secrets {
    /// Noise.
    pub key: Secret32,
    /// The claim.
    pub claim: Secret32,
}

impl StateDir {
    /// Opens the directory, making it if it is missing.
    ///
    /// # Errors
    /// `state-dir`: it cannot be made or is not a directory.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| unusable(path, &e))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The store's file.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.path.join(STORE)
    }

    /// The self-made certificate's files: chain and key.
    #[must_use]
    pub fn tls(&self) -> (PathBuf, PathBuf) {
        (self.path.join(TLS_CERT), self.path.join(TLS_KEY))
    }

    /// Takes the lock that one coordinator at a time holds.
    ///
    /// # Errors
    /// `already-running` or `state-dir`.
    pub fn lock(&self) -> Result<DirLock, Problem> {
        DirLock::take(&self.path.join(LOCK)).map_err(|e| match e {
            LockError::Held { pid } => Problem {
                code: "already-running".into(),
                text: format!(
                    "another coordinator{} already uses the state directory {}",
                    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(),
                    self.path.display()
                ),
                hint: "stop it first, or choose another directory with --state-dir DIR".into(),
            },
            LockError::Io(e) => unusable(&self.path, &e),
        })
    }

    /// True once [`StateDir::make_secrets`] has been here.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.path.join(KEY).exists()
    }

    /// Draws and keeps the secrets of a new coordinator, the key last.
    ///
    /// # Errors
    /// `state-dir`.
    pub fn make_secrets(&self) -> Result<(), Problem> {
        let mut rng = rand::rng();
        for file in [CLAIM, KEY] {
            let secret = Secret32::random(&mut rng);
            let text = Zeroizing::new(format!("{}\n", Zeroizing::new(Digest32(*secret.expose()).to_string()).as_str()));
            self.write(file, text.as_bytes())?;
        }
        Ok(())
    }

    /// Reads the secrets.
    ///
    /// # Errors
    /// `state-damaged`, `state-dir`.
    pub fn secrets(&self) -> Result<Secrets, Problem> {
        Ok(Secrets { key: self.secret(KEY)?, claim: self.secret(CLAIM)? })
    }

    fn secret(&self, file: &str) -> Result<Secret32, Problem> {
        let path = self.path.join(file);
        let text = Zeroizing::new(fs::read_to_string(&path).map_err(|e| unusable(&path, &e))?);
        let bytes: Digest32 = text.trim().parse().map_err(|_| Problem {
            code: "state-damaged".into(),
            text: format!("{} is damaged: it should hold 64 hexadecimal digits", path.display()),
            hint: "restore the file from a backup; without it existing tokens and nodes cannot use this coordinator"
                .into(),
        })?;
        Ok(Secret32::new(bytes.0))
    }

    /// The URL kept by [`StateDir::keep_public_url`].
    #[must_use]
    pub fn public_url(&self) -> Option<String> {
        let text = fs::read_to_string(self.path.join(PUBLIC_URL)).ok()?;
        let url = text.trim();
        (!url.is_empty()).then(|| url.to_owned())
    }

    /// Keeps the URL for `meshd coordinator claim`.
    ///
    /// # Errors
    /// `state-dir`.
    pub fn keep_public_url(&self, url: &str) -> Result<(), Problem> {
        if self.public_url().as_deref() == Some(url) {
            return Ok(());
        }
        self.write(PUBLIC_URL, format!("{url}\n").as_bytes())
    }

    /// What the relay carried, as kept by [`StateDir::keep_relay_usage`]. A file that cannot be read counts as none.
    #[must_use]
    pub fn relay_usage(&self) -> Option<Usage> {
        let text = fs::read_to_string(self.path.join(RELAY_USAGE)).ok()?;
        let (month, bytes) = text.trim().split_once(' ')?;
        let (year, month) = month.split_once('-')?;
        let (year, month): (u32, u32) = (year.parse().ok()?, month.parse().ok()?);
        let month = (1..=12).contains(&month).then(|| year.checked_mul(12)?.checked_add(month - 1)).flatten()?;
        Some(Usage { month: Month(month), bytes: bytes.parse().ok()? })
    }

    /// Keeps what the relay carried.
    ///
    /// # Errors
    /// `state-dir`.
    pub fn keep_relay_usage(&self, usage: Usage) -> Result<(), Problem> {
        let (year, month) = (usage.month.0 / 12, usage.month.0 % 12 + 1);
        self.write(RELAY_USAGE, format!("{year}-{month:02} {}\n", usage.bytes).as_bytes())
    }

    /// Keeps a self-made certificate, the key last.
    ///
    /// # Errors
    /// `state-dir`.
    pub fn keep_certificate(&self, chain: &str, key: &str) -> Result<(), Problem> {
        self.write(TLS_CERT, chain.as_bytes())?;
        self.write(TLS_KEY, key.as_bytes())
    }

    /// Replaces a file so that a crash leaves the old one or the new one.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Problem> {
        let write = || -> io::Result<()> {
            let temporary = self.path.join(format!("{name}.new"));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, self.path.join(name))?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|e| unusable(&self.path.join(name), &e))
    }
}

/// A path of the state directory that the system will not let us use.
pub(super) fn unusable(path: &Path, e: &io::Error) -> Problem {
    let hint = match e.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "run as the user that owns it (or as root), or choose another directory with --state-dir DIR"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space on that file system",
        _ => "choose another directory with --state-dir DIR",
    };
    Problem {
        code: "state-dir".into(),
        text: format!("the coordinator's state at {} cannot be used: {e}", path.display()),
        hint: hint.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_are_made_once_and_private() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&parent.path().join("a/b")).unwrap();
        assert!(!dir.is_initialized());
        dir.make_secrets().unwrap();
        assert!(dir.is_initialized());
        let (first, again) = (dir.secrets().unwrap(), dir.secrets().unwrap());
        assert_eq!(first.key.expose(), again.key.expose());
        assert_ne!(first.key.expose(), first.claim.expose());
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        for entry in fs::read_dir(dir.path()).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_second_coordinator_on_one_directory_is_told_who_has_it() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(parent.path()).unwrap();
        let held = dir.lock().unwrap();
        let problem = dir.lock().unwrap_err();
        assert_eq!(problem.code, "already-running");
        assert!(problem.text.contains(&std::process::id().to_string()), "{}", problem.text);
        drop(held);
        dir.lock().unwrap();
    }

    #[test]
    fn what_the_relay_carried_is_kept_and_nonsense_is_none() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(parent.path()).unwrap();
        assert_eq!(dir.relay_usage(), None);
        for month in [Month(2026 * 12 + 10), Month(2027 * 12), Month(2027 * 12 + 11)] {
            let usage = Usage { month, bytes: 123_456_789_012 };
            dir.keep_relay_usage(usage).unwrap();
            assert_eq!(dir.relay_usage(), Some(usage));
        }
        for text in ["", "2026-11", "2026-13 5", "2026-00 5", "x-1 5", "2026-11 -5", "4294967295-01 5"] {
            fs::write(dir.path().join(RELAY_USAGE), text).unwrap();
            assert_eq!(dir.relay_usage(), None, "{text}");
        }
    }

    #[test]
    fn a_damaged_key_is_said_and_kept() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(parent.path()).unwrap();
        dir.make_secrets().unwrap();
        fs::write(dir.path().join(KEY), "abc").unwrap();
        assert_eq!(dir.secrets().unwrap_err().code, "state-damaged");
        assert_eq!(fs::read(dir.path().join(KEY)).unwrap(), b"abc");
    }

    #[test]
    fn a_path_that_is_no_directory_gets_a_sentence_and_a_hint() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let problem = StateDir::open(file.path()).unwrap_err();
        assert_eq!(problem.code, "state-dir");
        assert!(!problem.hint.is_empty());
    }
}

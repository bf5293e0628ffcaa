//! A node's state directory.
//!
//! ```text
//! node.json      the three keys of the node                          written once, never changed
//! root.json      founder only: the network's root key                written once, never changed
//! join.json      a join that was sent but not yet answered           gone once it is answered
//! network.json   network id, coordinator, how it was joined          its presence means: joined
//! records.jsonl  accepted records, one a line                        only appended to
//! state.json     UDP port, last endpoints, what joined networks, advertisements, clock      replaced
//! settings.json  what a person set the node up to do                  replaced
//! footprint.json what was changed on this machine (daemon/footprint)   replaced; gone when all is undone
//! lock           flock: one daemon for each directory
//! meshd.log      what a daemon in the background says
//! ```
//!
//! The directory has mode 0700, the files 0600. A file is replaced by writing a temporary one, `fsync`, rename, and `fsync`
//! of the directory. A file that cannot be read is never replaced silently: it is kept as `NAME.corrupt-TIME` and said.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::daemon::problem;
use crate::daemon::settings::Kept;
use crate::engine::planner::Worked;
use crate::os::clock;
use crate::os::lock::{DirLock, LockError};
use crate::os::process;
use crate::time::UnixSeconds;
use crate::trust::advert::SignedAdvert;
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::record::SignedRecord;
use crate::wire::control::ToCoordinator;
use crate::wire::keys::{ControlKey, Digest32, NetworkId, WgKey};
use crate::wire::local::Problem;

/// The version of every file here.
const VERSION: u16 = 1;
/// The longest state file read, in bytes. `records.jsonl` of a full /16 network is about 60 MB.
const MAX_FILE: u64 = 256 << 20;
/// How long a daemon that is ending may still hold the lock.
const LOCK_PATIENCE: Duration = Duration::from_millis(1_500);

/// The state directory, locked for this process.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    notes: Vec<String>,
    _lock: DirLock,
}

/// `network.json`: present once the node is a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// 1.
    pub v: u16,
    /// What every record is verified against.
    pub network: NetworkId,
    /// Coordinator URLs, the first tried first.
    pub urls: Vec<String>,
    /// The coordinator's Noise key.
    pub coordinator: ControlKey,
    /// Which token this node joined by (see [`crate::daemon::join::token_mark`]), so that the same one is recognised.
    pub token: Digest32,
}

/// `join.json`: everything needed to ask again after a lost answer, with the same keys.
#[derive(Debug, Serialize, Deserialize)]
pub struct PendingJoin {
    /// 1.
    pub v: u16,
    /// What [`Network`] will say.
    pub network: Network,
    /// The request as it was, or will be, sent: `Found` or `Redeem`.
    pub request: ToCoordinator,
}

/// `state.json`: conveniences. Losing them costs a new UDP port and slower first contacts, nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// 1.
    pub v: u16,
    /// The UDP port used last.
    #[serde(default)]
    pub port: u16,
    /// Where peers were reached last.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// What joined this node's networks with peers', the oldest first.
    #[serde(default)]
    pub worked: Vec<Joined>,
    /// The latest wall clock seen, to notice a clock that was set back.
    #[serde(default)]
    pub latest_wall: UnixSeconds,
    /// The newest advertisements heard, our own among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adverts: Vec<SignedAdvert>,
}

/// One peer's last known address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Who.
    pub peer: WgKey,
    /// Where it was reached directly.
    pub address: SocketAddr,
}

/// How two networks were joined ([`Worked`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// With whom.
    pub peer: WgKey,
    /// The outside address of this node's network.
    pub here: IpAddr,
    /// Of the peer's.
    pub there: IpAddr,
    /// How many rounds had failed before.
    pub attempt: u8,
}

impl Joined {
    pub(super) const fn kept(worked: &Worked) -> Self {
        let Worked { peer, here, there, attempt } = *worked;
        Self { peer, here, there, attempt }
    }

    pub(super) const fn known(&self) -> Worked {
        Worked { peer: self.peer, here: self.here, there: self.there, attempt: self.attempt }
    }
}

#[derive(Serialize, Deserialize)]
struct NodeFile {
    v: u16,
    keys: NodeKeys,
}

#[derive(Serialize, Deserialize)]
struct RootFile {
    v: u16,
    root: Secret32,
}

impl Store {
    /// Makes the directory if it is missing, checks whose it is, and locks it.
    ///
    /// # Errors
    /// Codes `state-dir` (cannot be made, not writable, somebody else's) and `already-running`.
    pub fn open(dir: &Path) -> Result<Self, Problem> {
        let meta = prepare_dir(dir)?;
        let lock = take_lock(dir)?;
        let store = Self { dir: dir.to_owned(), notes: Vec::new(), _lock: lock };
        store.tighten(&meta);
        Ok(store)
    }

    /// A directory that holds nothing but meshd's own files is made private; one that is used otherwise is left alone.
    fn tighten(&self, meta: &fs::Metadata) {
        const OWN: [&str; 10] = [
            "lock",
            "node.json",
            "root.json",
            "join.json",
            "network.json",
            "records.jsonl",
            "state.json",
            "settings.json",
            "footprint.json",
            "meshd",
        ];
        if meta.permissions().mode() & 0o077 == 0 {
            return;
        }
        let Ok(mut entries) = fs::read_dir(&self.dir) else { return };
        let ours = entries.all(|entry| {
            entry.is_ok_and(|e| OWN.iter().any(|own| e.file_name().as_encoded_bytes().starts_with(own.as_bytes())))
        });
        if ours {
            // Best effort: the files themselves are private in any case.
            let _ = fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700));
        }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Files that were found damaged and kept aside, a sentence each.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The node's keys, if it has any.
    ///
    /// # Errors
    /// Code `node-keys`: the file cannot be read, is damaged, or may be read by other users. It is left as it is.
    pub fn keys(&self) -> Result<Option<NodeKeys>, Problem> {
        let path = self.path("node.json");
        let restore =
            "restore it from a backup; without one, move the state directory away and join anew with a new invite";
        let Some(bytes) = self.read_secret("node.json")? else { return Ok(None) };
        match serde_json::from_slice::<NodeFile>(&bytes) {
            Ok(file) if file.v == VERSION => Ok(Some(file.keys)),
            Ok(file) => Err(problem(
                "node-keys",
                format!("the key file {} has version {}, which this meshd does not know", path.display(), file.v),
                "upgrade meshd on this machine",
            )),
            Err(_) => Err(problem("node-keys", format!("the key file {} is damaged", path.display()), restore)),
        }
    }

    /// Keeps new keys. Refuses to overwrite others.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn keep_keys(&self, keys: NodeKeys) -> Result<NodeKeys, Problem> {
        let file = NodeFile { v: VERSION, keys };
        if !self.path("node.json").exists() {
            self.write("node.json", &file)?;
        }
        Ok(file.keys)
    }

    /// Keeps the root key of a network founded here.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn keep_root(&self, root: Secret32) -> Result<(), Problem> {
        self.write("root.json", &RootFile { v: VERSION, root })
    }

    /// Drops the root key of a founding that was refused.
    pub fn drop_root(&self) {
        let _ = fs::remove_file(self.path("root.json"));
    }

    /// The network this node is a member of.
    ///
    /// # Errors
    /// Code `network-file`: damaged (and kept aside).
    pub fn network(&mut self) -> Result<Option<Network>, Problem> {
        match self.read_or_keep_aside::<Network>("network.json")? {
            Read1::Missing => Ok(None),
            Read1::Good(network) => Ok(Some(network)),
            Read1::KeptAside(aside) => Err(problem(
                "network-file",
                format!(
                    "the file that says which network this node is in was damaged; it is kept as {}",
                    aside.display()
                ),
                "`meshd up TOKEN` with any invite to the same network repairs it, without using the invite up",
            )),
        }
    }

    /// Says for good that this node is a member: writes the records it starts with, then `network.json`, and forgets the
    /// pending join.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn joined(&self, network: &Network, records: &[SignedRecord]) -> Result<(), Problem> {
        if !self.path("network.json").exists() && !records.is_empty() {
            self.replace_records(records)?;
        }
        self.write("network.json", network)?;
        self.drop_pending();
        Ok(())
    }

    /// A join that was begun and not finished.
    ///
    /// # Errors
    /// Code `state-read`.
    pub fn pending(&mut self) -> Result<Option<PendingJoin>, Problem> {
        Ok(match self.read_or_keep_aside("join.json")? {
            Read1::Good(pending) => Some(pending),
            Read1::Missing | Read1::KeptAside(_) => None,
        })
    }

    /// Keeps a join before it is sent.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn keep_pending(&self, pending: &PendingJoin) -> Result<(), Problem> {
        self.write("join.json", pending)
    }

    /// Forgets the pending join.
    pub fn drop_pending(&self) {
        let _ = fs::remove_file(self.path("join.json"));
    }

    /// Conveniences of the last run.
    ///
    /// # Errors
    /// Code `state-read`.
    pub fn state(&mut self) -> Result<State, Problem> {
        Ok(match self.read_or_keep_aside("state.json")? {
            Read1::Good(state) => state,
            Read1::Missing | Read1::KeptAside(_) => State::default(),
        })
    }

    /// Replaces the conveniences.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn keep_state(&self, state: &State) -> Result<(), Problem> {
        self.write("state.json", &State { v: VERSION, ..state.clone() })
    }

    /// What a person set the node up to do.
    ///
    /// # Errors
    /// Code `settings`: the file cannot be read. It is left as it is, so that nothing is set up that nobody wanted.
    pub fn settings(&self) -> Result<Kept, Problem> {
        let path = self.path("settings.json");
        let Some(bytes) = read_file(&path).map_err(|e| cannot_read(&path, &e))? else { return Ok(Kept::default()) };
        serde_json::from_slice::<Kept>(&bytes).ok().filter(|kept| kept.v == VERSION).ok_or_else(|| {
            problem(
                "settings",
                format!("{} is damaged, or of another version of meshd", path.display()),
                "correct it, or move it away to start with the defaults",
            )
        })
    }

    /// A handle with which settings are replaced while the daemon runs.
    #[must_use]
    pub fn settings_file(&self) -> SettingsFile {
        SettingsFile { dir: self.dir.clone() }
    }

    /// The accepted records, in order. A torn last line (the machine stopped while it was written) is moved aside; any other
    /// damage leaves a copy of the whole aside and the readable lines in place.
    ///
    /// # Errors
    /// Code `state-read` or `state-write`.
    pub fn records(&mut self) -> Result<Vec<SignedRecord>, Problem> {
        let path = self.path("records.jsonl");
        let Some(bytes) = read_file(&path).map_err(|e| cannot_read(&path, &e))? else { return Ok(Vec::new()) };
        let mut records = Vec::new();
        let mut damaged = 0;
        let mut whole = 0;
        let mut lines = bytes.split_inclusive(|b| *b == b'\n').peekable();
        while let Some(line) = lines.next() {
            let torn = !line.ends_with(b"\n") && lines.peek().is_none();
            match serde_json::from_slice(line) {
                Ok(record) if !torn => records.push(record),
                _ if torn => break,
                _ => damaged += 1,
            }
            whole += line.len();
        }
        if damaged > 0 {
            let aside = self.put_aside("records.jsonl", &bytes)?;
            self.notes.push(format!(
                "{damaged} lines of {} were damaged and left out; a copy is kept as {}",
                path.display(),
                aside.display()
            ));
            self.replace_records(&records)?;
        } else if whole < bytes.len() {
            let aside = self.put_aside("records.jsonl", &bytes[whole..])?;
            self.notes.push(format!(
                "the last line of {} was not written completely and is kept as {}; the coordinator will send it again",
                path.display(),
                aside.display()
            ));
            let file = OpenOptions::new().write(true).open(&path).map_err(|e| cannot_write(&path, &e))?;
            file.set_len(whole as u64).and_then(|()| file.sync_all()).map_err(|e| cannot_write(&path, &e))?;
        }
        Ok(records)
    }

    /// Replaces all records.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn replace_records(&self, records: &[SignedRecord]) -> Result<(), Problem> {
        let mut text = Vec::new();
        for record in records {
            push_line(&mut text, record);
        }
        self.replace("records.jsonl", &text)
    }

    /// A handle with which accepted records are appended from another thread.
    #[must_use]
    pub fn record_log(&self) -> RecordLog {
        RecordLog { path: self.path("records.jsonl") }
    }

    fn read_secret(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, Problem> {
        let path = self.path(name);
        let bytes = read_file(&path).map_err(|e| cannot_read(&path, &e))?.map(Zeroizing::new);
        let mode = fs::metadata(&path).map_or(0, |m| m.permissions().mode());
        if mode & 0o077 != 0 {
            return Err(problem(
                "node-keys",
                format!("other users may read the key file {} (mode {:o})", path.display(), mode & 0o777),
                format!("`chmod 600 {}`; if somebody may have read it, remove this node and join anew", path.display()),
            ));
        }
        Ok(bytes)
    }

    fn read_or_keep_aside<T: DeserializeOwned>(&mut self, name: &str) -> Result<Read1<T>, Problem> {
        let path = self.path(name);
        let Some(bytes) = read_file(&path).map_err(|e| cannot_read(&path, &e))? else { return Ok(Read1::Missing) };
        if let Ok(value) = serde_json::from_slice(&bytes) {
            return Ok(Read1::Good(value));
        }
        let aside = self.path(&Self::aside(name));
        fs::rename(&path, &aside).map_err(|e| cannot_write(&aside, &e))?;
        self.notes.push(format!("{} was damaged; it is kept as {}", path.display(), aside.display()));
        Ok(Read1::KeptAside(aside))
    }

    fn aside(name: &str) -> String {
        format!("{name}.corrupt-{}", clock::wall())
    }

    fn put_aside(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Problem> {
        let aside = Self::aside(name);
        self.replace(&aside, bytes)?;
        Ok(self.path(&aside))
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), Problem> {
        let path = self.path(name);
        let text = serde_json::to_vec_pretty(value).map_err(|e| cannot_write(&path, &e.into()))?;
        self.replace(name, &Zeroizing::new(text))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Problem> {
        let path = self.path(name);
        write_atomically(&self.dir, name, bytes).map_err(|e| cannot_write(&path, &e))
    }
}

/// Makes the directory if it is missing and checks that it belongs to this user.
///
/// # Errors
/// Code `state-dir`.
pub(super) fn prepare_dir(dir: &Path) -> Result<fs::Metadata, Problem> {
    let shown = dir.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| problem("state-dir", format!("the state directory {shown} cannot be made: {e}"), hint_for(&e)))?;
    let meta = fs::metadata(dir).map_err(|e| {
        problem("state-dir", format!("the state directory {shown} cannot be looked at: {e}"), hint_for(&e))
    })?;
    if !meta.is_dir() {
        return Err(problem(
            "state-dir",
            format!("{shown} is not a directory"),
            "give a directory with `--state-dir DIR`",
        ));
    }
    if meta.uid() != process::effective_uid() {
        return Err(problem(
            "state-dir",
            format!("the state directory {shown} belongs to user {}, not to this one", meta.uid()),
            "run meshd as that user, or give another directory with `--state-dir DIR`",
        ));
    }
    Ok(meta)
}

enum Read1<T> {
    Missing,
    Good(T),
    KeptAside(PathBuf),
}

/// Appends accepted records to `records.jsonl`.
#[derive(Debug, Clone)]
pub struct RecordLog {
    path: PathBuf,
}

impl RecordLog {
    /// Appends the records and waits until they are on disk. After an error nothing of them is in the file.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn append(&self, records: &[SignedRecord]) -> Result<(), Problem> {
        let mut text = Vec::new();
        for record in records {
            push_line(&mut text, record);
        }
        let written = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path).and_then(|mut file| {
            let before = file.metadata()?.len();
            let done = file.write_all(&text).and_then(|()| file.sync_data());
            if done.is_err() {
                let _ = file.set_len(before);
            }
            done
        });
        written.map_err(|e| cannot_write(&self.path, &e))
    }
}

/// Replaces `settings.json`.
#[derive(Debug, Clone)]
pub struct SettingsFile {
    dir: PathBuf,
}

impl SettingsFile {
    /// Replaces it.
    ///
    /// # Errors
    /// Code `state-write`.
    pub fn keep(&self, settings: &Kept) -> Result<(), Problem> {
        let write = || {
            let text = Zeroizing::new(serde_json::to_vec_pretty(&Kept { v: VERSION, ..settings.clone() })?);
            write_atomically(&self.dir, "settings.json", &text)
        };
        write().map_err(|e: io::Error| cannot_write(&self.dir.join("settings.json"), &e))
    }
}

fn push_line(text: &mut Vec<u8>, record: &SignedRecord) {
    // A record is strings and numbers; it always has a JSON form.
    if serde_json::to_writer(&mut *text, record).is_ok() {
        text.push(b'\n');
    }
}

fn take_lock(dir: &Path) -> Result<DirLock, Problem> {
    let path = dir.join("lock");
    let deadline = clock::now() + LOCK_PATIENCE;
    loop {
        match DirLock::take(&path) {
            Ok(lock) => return Ok(lock),
            // The holder may be a daemon that is just ending; a live one is still there after the deadline.
            Err(LockError::Held { .. }) if clock::now() < deadline => {
                let _ = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(50u16));
            }
            Err(LockError::Held { pid }) => {
                let who = pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
                return Err(problem(
                    "already-running",
                    format!("a meshd daemon already uses the state directory {} ({who})", dir.display()),
                    "`meshd status` asks it, `meshd down` stops it; for a second node on this machine give another `--state-dir`",
                ));
            }
            Err(LockError::Io(e)) => {
                return Err(problem(
                    "state-dir",
                    format!("the state directory {} is not writable: {e}", dir.display()),
                    hint_for(&e),
                ));
            }
        }
    }
}

/// Reads a whole file; `None` if there is none.
fn read_file(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    if file.take(MAX_FILE).read_to_end(&mut bytes)? as u64 == MAX_FILE {
        return Err(io::Error::other("it is unreasonably long"));
    }
    Ok(Some(bytes))
}

/// Replaces a file so that after a crash it has either its old or its new content.
pub(super) fn write_atomically(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    let result = (|| {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, dir.join(name))?;
        File::open(dir)?.sync_all()
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn cannot_read(path: &Path, e: &io::Error) -> Problem {
    problem("state-read", format!("{} cannot be read: {e}", path.display()), hint_for(e))
}

fn cannot_write(path: &Path, e: &io::Error) -> Problem {
    problem("state-write", format!("{} cannot be written: {e}", path.display()), hint_for(e))
}

fn hint_for(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as root (`sudo meshd …`), or give a directory you own: `--state-dir DIR`"
        }
        io::ErrorKind::ReadOnlyFilesystem => "give a directory on a writable file system: `--state-dir DIR`",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some disk space",
        io::ErrorKind::NotADirectory => "a part of the path is a file; give another directory with `--state-dir DIR`",
        _ => "check the directory and its file system, or give another with `--state-dir DIR`",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::settings::Settings;
    use crate::link::ProxySetting;
    use crate::trust::record::{Admin, Record};
    use crate::wire::keys::IdentityKey;

    fn record(n: u8) -> SignedRecord {
        let admin = Admin { v: 1, network: NetworkId([1; 32]), identity: IdentityKey([n; 32]), created: 7 };
        SignedRecord::sign(&Record::Admin(admin), &Secret32::new([n; 32]).signing_key())
    }

    fn network() -> Network {
        Network {
            v: 1,
            network: NetworkId([1; 32]),
            urls: vec!["https://mesh.example.org".into()],
            coordinator: ControlKey([2; 32]),
            token: Digest32([3; 32]),
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn joined() -> Joined {
        let (here, there) = ([203, 0, 113, 1].into(), [198, 51, 100, 7].into());
        Joined { peer: WgKey([7; 32]), here, there, attempt: 2 }
    }

    #[test]
    fn everything_written_is_private_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/state");
        let keys = NodeKeys::generate(&mut rand::rng());
        let id = keys.identity_key();
        {
            let mut store = Store::open(&path).unwrap();
            assert!(store.keys().unwrap().is_none() && store.network().unwrap().is_none());
            store.keep_keys(keys).unwrap();
            // Keys are never overwritten.
            store.keep_keys(NodeKeys::generate(&mut rand::rng())).unwrap();
            store.joined(&network(), &[record(1)]).unwrap();
            store.record_log().append(&[record(2), record(3)]).unwrap();
            let endpoints = vec![Endpoint { peer: WgKey([9; 32]), address: "192.0.2.1:5".parse().unwrap() }];
            store
                .keep_state(&State {
                    v: 1,
                    port: 40_000,
                    endpoints,
                    worked: vec![joined()],
                    latest_wall: 5,
                    adverts: vec![],
                })
                .unwrap();
            let proxy = ProxySetting::parse("http://ann:secret@proxy:3128").unwrap();
            let settings = Settings { proxy, ..Settings::default() };
            store.settings_file().keep(&Kept { settings, ..Kept::default() }).unwrap();
        }
        let mut store = Store::open(&path).unwrap();
        assert_eq!(store.keys().unwrap().unwrap().identity_key(), id);
        assert_eq!(store.network().unwrap(), Some(network()));
        assert_eq!(store.records().unwrap(), [record(1), record(2), record(3)]);
        assert_eq!(store.state().unwrap().port, 40_000);
        assert_eq!(store.state().unwrap().worked, [joined()]);
        assert_eq!(*store.settings().unwrap().settings.proxy.secret_text(), "http://ann:secret@proxy:3128");
        assert!(store.notes().is_empty());
        assert_eq!(mode(&path), 0o700);
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(mode(&entry.path()), 0o600, "{:?}", entry.file_name());
            assert!(!entry.file_name().to_string_lossy().ends_with(".tmp"));
        }
    }

    #[test]
    fn a_torn_last_line_is_kept_aside_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        store.record_log().append(&[record(1), record(2)]).unwrap();
        let path = dir.path().join("records.jsonl");
        let whole = fs::read(&path).unwrap();
        for cut in (1..whole.len() / 2).step_by(23) {
            fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            store.notes.clear();
            assert_eq!(store.records().unwrap(), [record(1)], "cut {cut}");
            // Cut exactly at the line's end, nothing is torn.
            let torn = whole.len() - cut > fs::read(&path).unwrap().len();
            assert_eq!(store.notes().len(), usize::from(torn));
            store.record_log().append(&[record(3)]).unwrap();
            assert_eq!(store.records().unwrap(), [record(1), record(3)]);
        }
    }

    #[test]
    fn damage_in_the_middle_keeps_a_copy_and_the_good_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let path = dir.path().join("records.jsonl");
        let mut text = Vec::new();
        push_line(&mut text, &record(1));
        text.extend_from_slice(b"\0\0garbage\n");
        push_line(&mut text, &record(2));
        fs::write(&path, &text).unwrap();
        assert_eq!(store.records().unwrap(), [record(1), record(2)]);
        assert_eq!(store.notes().len(), 1);
        let copies: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.to_string_lossy().contains("records.jsonl.corrupt-"))
            .collect();
        assert_eq!(fs::read(&copies[0]).unwrap(), text);
        assert_eq!(store.records().unwrap().len(), 2);
        assert_eq!(store.notes().len(), 1, "repaired once");
    }

    #[test]
    fn damaged_files_are_kept_aside_and_keys_stop_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        for name in ["state.json", "network.json", "node.json"] {
            fs::write(dir.path().join(name), b"{\"v\":").unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        assert_eq!(store.state().unwrap(), State::default());
        assert_eq!(store.network().unwrap_err().code, "network-file");
        assert_eq!(store.network().unwrap(), None, "kept aside");
        let refused = store.keys().unwrap_err();
        assert_eq!(refused.code, "node-keys");
        assert!(!refused.hint.is_empty());
        assert_eq!(fs::read(dir.path().join("node.json")).unwrap(), b"{\"v\":", "left as it is");
        assert_eq!(store.notes().len(), 2);
    }

    #[test]
    fn keys_that_others_may_read_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.keep_keys(NodeKeys::generate(&mut rand::rng())).unwrap();
        fs::set_permissions(dir.path().join("node.json"), fs::Permissions::from_mode(0o640)).unwrap();
        let refused = store.keys().unwrap_err();
        assert!(refused.text.contains("640") && refused.hint.contains("chmod 600"), "{refused:?}");
    }

    #[test]
    fn a_second_daemon_on_one_directory_is_refused_and_names_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        let refused = Store::open(dir.path()).unwrap_err();
        assert_eq!(refused.code, "already-running");
        assert!(refused.text.contains(&std::process::id().to_string()), "{refused:?}");
    }

    #[test]
    fn a_directory_used_for_other_things_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("homework.txt"), b"x").unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert_eq!(mode(dir.path()), 0o755);
        fs::remove_file(dir.path().join("homework.txt")).unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert_eq!(mode(dir.path()), 0o700);
    }

    #[test]
    fn a_file_in_place_of_the_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        for path in [file.clone(), file.join("state")] {
            let refused = Store::open(&path).unwrap_err();
            assert_eq!(refused.code, "state-dir");
            assert!(refused.text.contains("file") && !refused.hint.is_empty());
        }
    }
}

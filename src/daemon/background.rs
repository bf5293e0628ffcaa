//! `meshd up` without `--foreground`: starts the daemon as a process of its own and waits until it is up.
//!
//! The child is this program again, as `meshd up --foreground`, in a session of its own, told by an environment variable
//! that it is one. It reads its orders (with the token, which must not show in `ps`) as JSON from standard input, and
//! writes what became of them as JSON lines to standard output. What it logs goes to `STATE_DIR/meshd.log`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::daemon::{Options, UpReport, client, problem, store};
use crate::os::{clock, lock, process};
use crate::time::Now;
use crate::trust::token::Token;
use crate::wire::local::{Problem, SettingsChange, Status};

/// Set in the child's environment.
const CHILD: &str = "MESHD_BACKGROUND";
/// A longer log is begun anew when a daemon starts.
const MAX_LOG: u64 = 5 << 20;
/// How long a daemon that holds the lock may take until it answers, or is gone.
const SETTLE: Duration = Duration::from_secs(2);
/// How long a child that is told to stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// One line from the child.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// What it is doing, to be named if the time runs out.
    Stage(String),
    /// It is up.
    Ready(Box<UpReport>),
    /// It is not, and ends.
    Failed(Problem),
}

/// Starts a daemon and waits until the node is up, at most `timeout`. If one runs already for this state directory, says
/// what is so.
///
/// # Errors
/// Whatever stopped the daemon from coming up. It is then not running, except where the problem is `already-running`.
pub fn spawn_background(options: &Options, timeout: Duration) -> Result<UpReport, Problem> {
    let deadline = clock::now() + timeout;
    // A daemon that started another daemon would do so without end.
    if std::env::var_os(CHILD).is_some() {
        return Err(problem(
            "daemon",
            "this process is itself a daemon that is starting".to_owned(),
            "unset the variable it was started with",
        ));
    }
    let options = absolute(options)?;
    let token = options.token.as_ref().map(|t| decode(t.text())).transpose()?;
    if let Some(status) = running(&options)? {
        return already(status, token.as_ref(), &options);
    }
    store::prepare_dir(&options.state_dir)?;
    let log = open_log(&options.state_dir.join("meshd.log"))?;
    let log_from = log.metadata().map_or(0, |m| m.len());
    let mut child = start(&options, log)?;
    let result = wait(&mut child, deadline, timeout, &options.state_dir, log_from);
    if result.is_err() {
        stop(&mut child);
    }
    result
}

/// Reads a token, with the mistake in it as a problem.
pub(super) fn decode(text: &str) -> Result<Token, Problem> {
    Token::decode(text).map_err(|e| {
        problem(
            "bad-token",
            e.to_string(),
            "a claim token comes from `meshd coordinator claim`, an invite token from `meshd invite` on an admin node",
        )
    })
}

fn absolute(options: &Options) -> Result<Options, Problem> {
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|e| problem("usage", format!("the path {} cannot be used: {e}", path.display()), ""))
    };
    Ok(Options { state_dir: absolute(&options.state_dir)?, socket: absolute(&options.socket)?, ..options.clone() })
}

/// The status of the daemon that runs for this state directory, if one does.
fn running(options: &Options) -> Result<Option<Status>, Problem> {
    let lock_file = options.state_dir.join("lock");
    let deadline = clock::now() + SETTLE;
    loop {
        let Some(pid) = lock::holder(&lock_file) else { return Ok(None) };
        match client::status(&options.socket) {
            Ok(status) => return Ok(Some(status)),
            // Just starting, or just ending.
            Err(_) if clock::now() < deadline => {
                let _ = poll(&mut [], PollTimeout::from(50u16));
            }
            Err(why) => {
                return Err(problem(
                    "already-running",
                    format!(
                        "a meshd daemon (process {pid}) uses the state directory {}, but it does not answer on {}: {}",
                        options.state_dir.display(),
                        options.socket.display(),
                        why.text
                    ),
                    format!("if it was started with another `--socket`, give that; else end it: `sudo kill {pid}`"),
                ));
            }
        }
    }
}

/// Running `up` again is harmless, unless the token asks for something else than what runs.
fn already(status: Status, token: Option<&Token>, options: &Options) -> Result<UpReport, Problem> {
    let name = status.network.name.clone();
    let mut notes = vec![format!("already up in the network {name:?}")];
    match token {
        Some(Token::Invite(invite)) if invite.network.to_string() != status.network.id => {
            return Err(other_network(&name));
        }
        Some(Token::Claim(claim)) if !claim.urls.contains(&status.coordinator.url) => return Err(other_network(&name)),
        Some(_) => notes.push("the token was not needed and not used".into()),
        None => {}
    }
    if options.settings != SettingsChange::default() {
        let set = client::set(&options.socket, options.settings.clone())?;
        notes.push("it is set up as given".into());
        notes.extend(set.notes);
    }
    Ok(UpReport { status, already_running: true, notes, warning: None })
}

/// The state directory holds a node of another network than the token's.
pub(super) fn other_network(name: &str) -> Problem {
    problem(
        "wrong-network",
        format!("this node is in the network {name:?} already, and the token is for another one"),
        "use another `--state-dir` for a second node on this machine, or move this state directory away to leave its network",
    )
}

fn open_log(path: &Path) -> Result<File, Problem> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .and_then(|log| {
            if log.metadata()?.len() > MAX_LOG {
                log.set_len(0)?;
            }
            Ok(log)
        })
        .map_err(|e| {
            problem(
                "state-dir",
                format!("the log {} cannot be written: {e}", path.display()),
                "run as root (`sudo meshd …`), or give a directory you own: `--state-dir DIR`",
            )
        })
}

fn start(options: &Options, log: File) -> Result<Child, Problem> {
    let cannot = |e: io::Error| problem("daemon", format!("the daemon could not be started: {e}"), "");
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("meshd")
        .args(["up", "--foreground", "--state-dir"])
        .arg(&options.state_dir)
        .arg("--socket")
        .arg(&options.socket)
        .env(CHILD, "1")
        .env_remove("MESHD_TOKEN")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log));
    let mut child = process::in_new_session(&mut command).spawn().map_err(cannot)?;
    if let Some(mut stdin) = child.stdin.take() {
        let orders = zeroize::Zeroizing::new(serde_json::to_vec(options).map_err(|e| cannot(e.into()))?);
        // A child that ended at once says why on its standard output.
        let _ = stdin.write_all(&orders);
    }
    Ok(child)
}

fn wait(
    child: &mut Child,
    deadline: Now,
    timeout: Duration,
    state_dir: &Path,
    log_from: u64,
) -> Result<UpReport, Problem> {
    let mut lines = Lines { from: child.stdout.take(), buffer: Vec::new() };
    let mut stage = "starting".to_owned();
    loop {
        match lines.next(deadline) {
            Next::Line(Line::Stage(now)) => stage = now,
            Next::Line(Line::Ready(report)) => return Ok(*report),
            Next::Line(Line::Failed(why)) => return Err(why),
            Next::Timeout => {
                return Err(problem(
                    "timeout",
                    format!("the node was not up within {timeout:?}; it was still {stage}"),
                    format!(
                        "try again with a longer `--timeout`; the log is {}",
                        state_dir.join("meshd.log").display()
                    ),
                ));
            }
            Next::End => {
                let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                let said = last_words(&state_dir.join("meshd.log"), log_from);
                return Err(problem(
                    "daemon",
                    format!("the daemon ended while {stage} ({status}){said}"),
                    format!("the log is {}", state_dir.join("meshd.log").display()),
                ));
            }
        }
    }
}

/// Lines of JSON from a pipe, with a deadline.
struct Lines {
    from: Option<ChildStdout>,
    buffer: Vec<u8>,
}

enum Next {
    Line(Line),
    Timeout,
    End,
}

impl Lines {
    fn next(&mut self, deadline: Now) -> Next {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Ok(line) = serde_json::from_slice(&line) {
                    return Next::Line(line);
                }
                continue;
            }
            let Some(from) = &mut self.from else { return Next::End };
            let left = u16::try_from(deadline.since(clock::now()).as_millis()).unwrap_or(u16::MAX);
            if left == 0 {
                return Next::Timeout;
            }
            let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut ready, PollTimeout::from(left)), Ok(n) if n > 0) {
                continue;
            }
            let mut chunk = [0; 4096];
            match from.read(&mut chunk) {
                Ok(n) if n > 0 => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => self.from = None,
            }
        }
    }
}

/// The last line the child logged, for a person.
fn last_words(log: &Path, from: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(len.saturating_sub(4096))))?;
        let mut text = Vec::new();
        file.take(4096).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = read().unwrap_or_default();
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .map_or_else(String::new, |line| format!(": {}", line.trim()))
}

/// Ends a child that is of no use any more.
fn stop(child: &mut Child) {
    let _ = process::terminate(child.id());
    let deadline = clock::now() + STOP_PATIENCE;
    while clock::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        let _ = poll(&mut [], PollTimeout::from(20u16));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The child's way to the command that started it; silent in a daemon that was started in the foreground.
#[derive(Debug)]
pub(super) struct Reporter {
    to_parent: bool,
}

impl Reporter {
    /// If this process is the child of `meshd up`, reads its orders.
    ///
    /// # Errors
    /// The orders cannot be read.
    pub(super) fn take_over(options: Options) -> Result<(Self, Options), Problem> {
        if std::env::var_os(CHILD).is_none() {
            return Ok((Self { to_parent: false }, absolute(&options)?));
        }
        let bad = |e: &dyn std::fmt::Display| problem("daemon", format!("orders could not be read: {e}"), "");
        let mut orders = zeroize::Zeroizing::new(Vec::new());
        io::stdin().take(1 << 20).read_to_end(&mut orders).map_err(|e| bad(&e))?;
        let options = serde_json::from_slice(&orders).map_err(|e| bad(&e))?;
        Ok((Self { to_parent: true }, options))
    }

    /// Says what is being done now.
    pub(super) fn stage(&self, what: &str) {
        tracing::debug!(stage = what);
        self.write(&Line::Stage(what.to_owned()));
    }

    /// Says that the node is up. False: the command that wanted it is gone.
    pub(super) fn ready(&mut self, report: UpReport) -> bool {
        let heard = self.write(&Line::Ready(Box::new(report)));
        self.to_parent = false;
        heard
    }

    /// Says why the node is not up.
    pub(super) fn failed(&self, why: &Problem) {
        self.write(&Line::Failed(why.clone()));
    }

    fn write(&self, line: &Line) -> bool {
        if !self.to_parent {
            return true;
        }
        let Ok(mut text) = serde_json::to_vec(line) else { return true };
        text.push(b'\n');
        let mut out = io::stdout().lock();
        out.write_all(&text).and_then(|()| out.flush()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_token_is_refused_before_anything_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        let options = Options {
            socket: state_dir.join("meshd.sock"),
            state_dir: state_dir.clone(),
            token: Some("meshd-invite1-abc".to_owned().into()),
            ..Options::default()
        };
        let refused = spawn_background(&options, Duration::from_secs(1)).unwrap_err();
        assert_eq!(refused.code, "bad-token");
        assert!(!state_dir.exists());
    }

    #[test]
    fn a_directory_held_by_somebody_who_does_not_answer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _held = lock::DirLock::take(&dir.path().join("lock")).unwrap();
        let options =
            Options { socket: dir.path().join("meshd.sock"), state_dir: dir.path().to_owned(), ..Options::default() };
        let refused = spawn_background(&options, Duration::from_secs(1)).unwrap_err();
        assert_eq!(refused.code, "already-running");
        assert!(refused.text.contains(&std::process::id().to_string()));
    }

    #[test]
    fn orders_carry_the_token_and_debug_does_not() {
        let options = Options { token: Some("meshd-invite1-secret".to_owned().into()), port: 7, ..Options::default() };
        let back: Options = serde_json::from_slice(&serde_json::to_vec(&options).unwrap()).unwrap();
        assert_eq!(back.token.as_ref().unwrap().text(), "meshd-invite1-secret");
        assert_eq!(back.port, 7);
        assert!(!format!("{options:?}").contains("secret"));
    }
}

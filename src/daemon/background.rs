//! `meshd up` without `--foreground`: starts the daemon as a process of its own and waits until it is up.
//!
//! The child is this program again, as `meshd up --foreground`, in a session of its own, told by an environment variable
//! that it is one. It reads its orders (with the token, which must not show in `ps`) as JSON from standard input, and
//! writes what became of them as JSON lines to standard output. What it logs goes to `STATE_DIR/meshd.log`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::daemon::{Options, UpReport, client, problem, service, store};
use crate::os::manager::Manager;
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
pub(super) enum Line {
    /// What it is doing, to be named if the time runs out.
    Stage(String),
    /// It is up.
    Ready(Box<UpReport>),
    /// It is not, and ends.
    Failed(Problem),
}

/// Starts a daemon and waits until the node is up, at most `timeout`. If one runs already for this state directory, says
/// what is so. With `for_service` (default directories) the daemon is the installed service, where there is one.
///
/// # Errors
/// Whatever stopped the daemon from coming up. It is then not running, except where the problem is `already-running`.
pub fn spawn_background(options: &Options, timeout: Duration, for_service: bool) -> Result<UpReport, Problem> {
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
    if for_service && service::is_installed() {
        return service::hand_over(&options, deadline, timeout);
    }
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
    if options.proxy.is_some() {
        notes.push("the proxy was left as it is; run `meshd down` first, then this again, to change it".into());
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
        .env_remove("MESHD_PROXY")
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
    let log = format!("the log is {}", state_dir.join("meshd.log").display());
    let Some(stdout) = child.stdout.take() else { return Err(problem("daemon", "the daemon has no output", log)) };
    follow(stdout, deadline, timeout, &log, |stage| {
        let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
        let said = last_words(&state_dir.join("meshd.log"), log_from);
        format!("the daemon ended while {stage} ({status}){said}")
    })
}

/// Follows a start by its lines, until it is over or its time is. `ended` words the end of the lines before that.
///
/// # Errors
/// What the daemon says, its end, or the end of the time; `log` says where to read more.
pub(super) fn follow<R: Read + AsFd>(
    from: R,
    deadline: Now,
    timeout: Duration,
    log: &str,
    ended: impl FnOnce(&str) -> String,
) -> Result<UpReport, Problem> {
    let mut lines = Lines::new(from);
    let mut outcome = Outcome::default();
    loop {
        match lines.next(deadline) {
            Next::Line(line) => {
                if let Some(result) = outcome.hear(line) {
                    return result;
                }
            }
            Next::Timeout => return Err(outcome.timeout(timeout, log)),
            Next::End => return Err(problem("daemon", ended(&outcome.stage), log)),
        }
    }
}

/// What is known so far of a start, from its lines.
struct Outcome {
    stage: String,
}

impl Default for Outcome {
    fn default() -> Self {
        Self { stage: "starting".to_owned() }
    }
}

impl Outcome {
    /// Takes a line in; a result if it was the last.
    fn hear(&mut self, line: Line) -> Option<Result<UpReport, Problem>> {
        match line {
            Line::Stage(now) => {
                self.stage = now;
                None
            }
            Line::Ready(report) => Some(Ok(*report)),
            Line::Failed(why) => Some(Err(why)),
        }
    }

    /// The time is up.
    fn timeout(&self, timeout: Duration, log: &str) -> Problem {
        problem(
            "timeout",
            format!("the node was not up within {timeout:?}; it was still {}", self.stage),
            format!("try again with a longer `--timeout`; {log}"),
        )
    }
}

/// Lines of JSON from a pipe or a socket, with a deadline.
struct Lines<R> {
    from: Option<R>,
    buffer: Vec<u8>,
}

/// What came next.
enum Next {
    Line(Line),
    Timeout,
    End,
}

impl<R: Read + AsFd> Lines<R> {
    const fn new(from: R) -> Self {
        Self { from: Some(from), buffer: Vec::new() }
    }

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

/// The daemon's way to whoever started it: the command that waits for it, and the service manager.
#[derive(Debug)]
pub(super) struct Reporter {
    to: Listener,
    manager: Manager,
}

/// The command that waits until the node is up.
#[derive(Debug)]
enum Listener {
    /// Nobody: the daemon was started in the foreground, or has said all there was.
    Nobody,
    /// `meshd up`, the parent, by standard output.
    Parent,
    /// `meshd up`, by the socket of [`service`].
    Command(UnixStream),
}

impl Reporter {
    /// If a command waits for this process, reads its orders.
    ///
    /// # Errors
    /// The orders cannot be read.
    pub(super) fn take_over(options: Options) -> Result<(Self, Options), Problem> {
        let manager = Manager::of_this_process();
        if std::env::var_os(CHILD).is_none() {
            let own = absolute(&options)?;
            return Ok(match service::orders(&own)? {
                Some((options, stream)) => (Self { to: Listener::Command(stream), manager }, absolute(&options)?),
                None => (Self { to: Listener::Nobody, manager }, own),
            });
        }
        let bad = |e: &dyn std::fmt::Display| problem("daemon", format!("orders could not be read: {e}"), "");
        let mut orders = zeroize::Zeroizing::new(Vec::new());
        io::stdin().take(1 << 20).read_to_end(&mut orders).map_err(|e| bad(&e))?;
        let options = serde_json::from_slice(&orders).map_err(|e| bad(&e))?;
        Ok((Self { to: Listener::Parent, manager }, options))
    }

    /// Whoever supervises this process.
    pub(super) const fn manager(&self) -> &Manager {
        &self.manager
    }

    /// Says what is being done now.
    pub(super) fn stage(&self, what: &str) {
        tracing::debug!(stage = what);
        self.manager.status(what);
        self.write(&Line::Stage(what.to_owned()));
    }

    /// Says that the node is up. False: the command that wanted it is gone.
    pub(super) fn ready(&mut self, report: UpReport) -> bool {
        let network = report.status.network.name.clone();
        let heard = self.write(&Line::Ready(Box::new(report)));
        self.to = Listener::Nobody;
        if heard {
            self.manager.ready(&format!("up in the network {network:?}"));
        }
        heard
    }

    /// Says why the node is not up.
    pub(super) fn failed(&self, why: &Problem) {
        self.manager.status(&why.text);
        self.write(&Line::Failed(why.clone()));
    }

    fn write(&self, line: &Line) -> bool {
        let Ok(mut text) = serde_json::to_vec(line) else { return true };
        text.push(b'\n');
        match &self.to {
            Listener::Nobody => true,
            Listener::Parent => {
                let mut out = io::stdout().lock();
                out.write_all(&text).and_then(|()| out.flush()).is_ok()
            }
            Listener::Command(stream) => (&*stream).write_all(&text).is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::ProxySetting;

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
        let refused = spawn_background(&options, Duration::from_secs(1), false).unwrap_err();
        assert_eq!(refused.code, "bad-token");
        assert!(!state_dir.exists());
    }

    #[test]
    fn a_directory_held_by_somebody_who_does_not_answer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _held = lock::DirLock::take(&dir.path().join("lock")).unwrap();
        let options =
            Options { socket: dir.path().join("meshd.sock"), state_dir: dir.path().to_owned(), ..Options::default() };
        let refused = spawn_background(&options, Duration::from_secs(1), false).unwrap_err();
        assert_eq!(refused.code, "already-running");
        assert!(refused.text.contains(&std::process::id().to_string()));
    }

    #[test]
    fn orders_carry_the_secrets_and_debug_does_not() {
        let token = Some("meshd-invite1-secret".to_owned().into());
        let proxy = Some(ProxySetting::parse("http://ann:secret@proxy:1").unwrap());
        let options = Options { token, proxy, port: 7, ..Options::default() };
        let back: Options = serde_json::from_slice(&serde_json::to_vec(&options).unwrap()).unwrap();
        assert_eq!(back.token.as_ref().unwrap().text(), "meshd-invite1-secret");
        assert_eq!(back.port, 7);
        assert_eq!(back.proxy, options.proxy);
        assert!(!format!("{options:?}").contains("secret"));
    }
}

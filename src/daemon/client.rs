//! The command line's side of the local socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::daemon::problem;
use crate::wire::local::{Call, MAX_LINE, Problem, Request, Response, SettingsChange, SettingsDocument, Status};
use crate::wire::version;

/// The code of the problem "no daemon runs here".
pub const NOT_RUNNING: &str = "not-running";
/// How long a daemon may take over a simple answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Answers to one call, as they come. Ends after the last; a refusal is an error and the last item.
#[derive(Debug)]
pub struct Replies {
    lines: BufReader<UnixStream>,
    ended: bool,
}

/// Makes one call. `patience` is how long to wait for each answer; give a ping or a NAT check more than its own timeout.
///
/// # Errors
/// Code `not-running` if no daemon listens on the socket, `not-permitted` if it may not be used by this user.
pub fn call(socket: &Path, call: Call, patience: Duration) -> Result<Replies, Problem> {
    let stream = UnixStream::connect(socket).map_err(|e| no_daemon(socket, &e))?;
    let request = Request { v: version::LOCAL, call };
    let mut line = serde_json::to_vec(&request).map_err(|e| broken(&e.into()))?;
    line.push(b'\n');
    let sent = stream
        .set_read_timeout(Some(patience.max(Duration::from_millis(1))))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .and_then(|()| (&stream).write_all(&line));
    match sent {
        // A daemon that refuses the caller answers and closes before it has read anything: its answer comes first.
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        Err(e) => return Err(broken(&e)),
    }
    Ok(Replies { lines: BufReader::new(stream), ended: false })
}

/// The daemon's status.
///
/// # Errors
/// As [`call`], or what the daemon says.
pub fn status(socket: &Path) -> Result<Status, Problem> {
    for reply in call(socket, Call::Status, PATIENCE)? {
        if let Response::Status(status) = reply? {
            return Ok(*status);
        }
    }
    Err(broken(&io::ErrorKind::UnexpectedEof.into()))
}

/// Changes what the node is set up to do.
///
/// # Errors
/// As [`call`], or what speaks against the change.
pub fn set(socket: &Path, change: SettingsChange) -> Result<SettingsDocument, Problem> {
    for reply in call(socket, Call::Set { change, confirm_s: None }, PATIENCE)? {
        if let Response::Settings(settings) = reply? {
            return Ok(settings);
        }
    }
    Err(broken(&io::ErrorKind::UnexpectedEof.into()))
}

impl Iterator for Replies {
    type Item = Result<Response, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let mut line = Vec::new();
        let read = (&mut self.lines).take(MAX_LINE as u64).read_until(b'\n', &mut line);
        let reply = match read {
            Ok(_) if line.ends_with(b"\n") => serde_json::from_slice(&line).map_err(|_| {
                problem(
                    "protocol",
                    "the daemon's answer cannot be read by this program",
                    "the running daemon is of another version: `meshd down`, then `meshd up`",
                )
            }),
            Ok(_) => Err(broken(&io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(broken(&e)),
        };
        match reply {
            Ok(Response::Done) => {
                self.ended = true;
                None
            }
            Ok(Response::Error(refusal)) => {
                self.ended = true;
                Some(Err(refusal))
            }
            Ok(reply) => Some(Ok(reply)),
            Err(e) => {
                self.ended = true;
                Some(Err(e))
            }
        }
    }
}

fn no_daemon(socket: &Path, e: &io::Error) -> Problem {
    let shown = socket.display();
    match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => problem(
            NOT_RUNNING,
            format!("no meshd daemon is running (nothing answers on {shown})"),
            "start it with `sudo meshd up`; if it runs elsewhere, give its `--state-dir` or `--socket`",
        ),
        io::ErrorKind::PermissionDenied => problem(
            "not-permitted",
            format!("this user may not talk to the meshd daemon on {shown}"),
            "use `sudo`, or run as the user the daemon runs as",
        ),
        _ => problem(
            NOT_RUNNING,
            format!("the socket {shown} cannot be used: {e}"),
            "check the path given by `--socket` or `--state-dir`",
        ),
    }
}

fn broken(e: &io::Error) -> Problem {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => problem(
            "timeout",
            "the daemon did not answer in time",
            "try again; if it stays so, look at its log and restart it",
        ),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => problem(
            "stopped",
            "the daemon ended before it had answered",
            "`meshd status` shows whether it runs; its log says why it ended",
        ),
        _ => problem("local", format!("the connection to the daemon broke: {e}"), "try again"),
    }
}

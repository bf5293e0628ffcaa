//! `meshd up` on a machine where meshd is an installed service: the command hands its orders (with the token, which must
//! not show in `ps` or lie on the disk) to the service instead of starting a daemon of its own.
//!
//! The command listens on `STATE_DIR/handover.sock`, asks systemd to start the service, and the service fetches the orders
//! from that socket: one JSON document, to the end of the stream. On the same stream it answers with the lines that a daemon
//! in the background writes ([`super::background`]).

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::daemon::background::follow;
use crate::daemon::{Options, UpReport, problem};
use crate::os::{clock, process};
use crate::time::Now;
use crate::wire::local::Problem;

/// Set in the service's environment by its unit.
const SERVICE: &str = "MESHD_SERVICE";
/// The unit.
const UNIT: &str = "meshd.service";
/// Present while systemd is the init system: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";
/// More than this are no orders.
const ORDERS_LIMIT: u64 = 1 << 20;
/// How long the service waits for a command that made the socket but says nothing.
const ORDERS_PATIENCE: Duration = Duration::from_secs(5);

/// The service exists here, so a node with the default directories is its affair.
pub(super) fn is_installed() -> bool {
    Path::new(BOOTED).is_dir()
        && Command::new("systemctl")
            .args(["show", "--property=LoadState", "--value", UNIT])
            .stdin(Stdio::null())
            .output()
            .is_ok_and(|output| output.stdout.trim_ascii() == b"loaded")
}

/// Has the service do what `options` say, and waits until the node is up.
///
/// # Errors
/// What stopped the node from coming up; the service is then stopped.
pub(super) fn hand_over(options: &Options, deadline: Now, timeout: Duration) -> Result<UpReport, Problem> {
    let door = Door::open(&options.state_dir)?;
    // After too many failures in a row systemd starts nothing until somebody says so; this is somebody.
    let _ = systemctl(&["reset-failed", UNIT]);
    systemctl(&["start", "--no-block", UNIT]).map_err(|why| {
        problem("service", format!("systemd does not start {UNIT}: {why}"), "see `systemctl status meshd`")
    })?;
    let result = door.serve(options, deadline).and_then(|stream| {
        follow(stream, deadline, timeout, "the log is in `journalctl -u meshd`", |stage| {
            format!("the service ended while {stage}")
        })
    });
    if result.is_err() {
        let _ = systemctl(&["stop", UNIT]);
    }
    result
}

/// The orders of a command that waits for this service, if there is one, and the way to answer it. Options that the orders
/// leave open are those of the service's own command line.
///
/// # Errors
/// A command waits, but its orders cannot be read.
pub(super) fn orders(own: &Options) -> Result<Option<(Options, UnixStream)>, Problem> {
    if env::var_os(SERVICE).is_none() {
        return Ok(None);
    }
    let path = door_path(&own.state_dir);
    let Ok(stream) = UnixStream::connect(&path) else {
        // Nobody waits: the machine was booted, or the service restarted. A socket left by a command that was killed would
        // have systemd start the service at every boot, network or not.
        let _ = fs::remove_file(&path);
        return Ok(None);
    };
    if !same_user(&stream) {
        return Err(bad_orders(&"the command belongs to another user"));
    }
    let read = || -> io::Result<Zeroizing<Vec<u8>>> {
        let mut orders = Zeroizing::new(Vec::new());
        stream.set_read_timeout(Some(ORDERS_PATIENCE))?;
        // What is answered later is a few lines; a command that is stopped must not stop the node.
        stream.set_write_timeout(Some(ORDERS_PATIENCE))?;
        (&stream).take(ORDERS_LIMIT).read_to_end(&mut orders)?;
        Ok(orders)
    };
    let orders = read().map_err(|e| bad_orders(&e))?;
    let given = serde_json::from_slice(&orders).map_err(|e| bad_orders(&e))?;
    let merged = merge(given, own).map_err(|e| bad_orders(&e))?;
    Ok(Some((merged, stream)))
}

fn bad_orders(why: &dyn std::fmt::Display) -> Problem {
    problem("service", format!("the orders of `meshd up` could not be read: {why}"), "run `meshd up` again")
}

/// What was `given`, and the service's `own` value wherever that is the default. Both are the same machine's words, so
/// the field names agree.
fn merge(given: Value, own: &Options) -> serde_json::Result<Options> {
    let default = serde_json::to_value(Options::default())?;
    let (Value::Object(mut given), Value::Object(own), Value::Object(default)) =
        (given, serde_json::to_value(own)?, default)
    else {
        return Ok(own.clone());
    };
    for (name, value) in own {
        if given.get(&name) == default.get(&name) {
            given.insert(name, value);
        }
    }
    serde_json::from_value(Value::Object(given))
}

/// The socket on which a command waits for the service. Its file goes when it is dropped.
struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    fn open(state_dir: &Path) -> Result<Self, Problem> {
        let path = door_path(state_dir);
        let open = || -> io::Result<UnixListener> {
            // One left by a command that was killed; the directory is this user's alone.
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        match open() {
            Ok(listener) => Ok(Self { listener, path }),
            Err(e) => Err(problem("state-dir", format!("the socket {} cannot be made: {e}", path.display()), "")),
        }
    }

    /// Waits for the service and gives it its orders.
    fn serve(&self, options: &Options, deadline: Now) -> Result<UnixStream, Problem> {
        let failed = |e: &dyn std::fmt::Display| problem("service", format!("the service could not be told: {e}"), "");
        loop {
            let left = deadline.since(clock::now());
            if left.is_zero() {
                return Err(problem(
                    "timeout",
                    "systemd did not start the service in time",
                    "see `systemctl status meshd` and `journalctl -u meshd`",
                ));
            }
            let left = u16::try_from(left.as_millis().max(1)).unwrap_or(u16::MAX);
            let mut ready = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut ready, PollTimeout::from(left)), Ok(n) if n > 0) {
                continue;
            }
            let Ok((stream, _)) = self.listener.accept() else { continue };
            if !same_user(&stream) {
                continue;
            }
            let orders = Zeroizing::new(serde_json::to_vec(options).map_err(|e| failed(&e))?);
            stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_write_timeout(Some(ORDERS_PATIENCE)))
                .and_then(|()| (&stream).write_all(&orders))
                .and_then(|()| stream.shutdown(Shutdown::Write))
                .map_err(|e| failed(&e))?;
            return Ok(stream);
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // If it stays, the next command removes it.
        let _ = fs::remove_file(&self.path);
    }
}

fn door_path(state_dir: &Path) -> PathBuf {
    state_dir.join("handover.sock")
}

fn same_user(stream: &UnixStream) -> bool {
    getsockopt(stream, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == process::effective_uid())
}

fn systemctl(args: &[&str]) -> Result<(), String> {
    let output =
        Command::new("systemctl").args(args).stdin(Stdio::null()).output().map_err(|e| format!("systemctl: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.lines().next().map_or_else(|| output.status.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::TokenText;

    #[test]
    fn orders_go_before_the_services_own_options_and_these_fill_the_gaps() {
        let given = Options {
            state_dir: "/var/lib/meshd".into(),
            token: Some(TokenText::from("meshd-invite1-x".to_owned())),
            port: 7,
            ..Options::default()
        };
        let own = Options {
            state_dir: "/var/lib/meshd".into(),
            port: 9,
            tun: Some("mesh7".into()),
            no_offload: true,
            ..Options::default()
        };
        let merged = merge(serde_json::to_value(&given).unwrap(), &own).unwrap();
        assert_eq!((merged.port, merged.tun.as_deref(), merged.no_offload), (7, Some("mesh7"), true));
        assert_eq!(merged.token.unwrap().text(), "meshd-invite1-x");
    }

    #[test]
    fn the_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        // One left behind is no obstacle.
        drop(UnixListener::bind(door_path(dir.path())).unwrap());
        let door = Door::open(dir.path()).unwrap();
        assert_eq!(fs::metadata(&door.path).unwrap().permissions().mode() & 0o777, 0o600);
        let path = door.path.clone();
        drop(door);
        assert!(!path.exists());
    }

    #[test]
    fn what_the_service_is_told_arrives_whole() {
        let dir = tempfile::tempdir().unwrap();
        let door = Door::open(dir.path()).unwrap();
        let options = Options { name: Some("nas".into()), ..Options::default() };
        let path = door.path.clone();
        let service = std::thread::spawn(move || {
            let mut text = String::new();
            UnixStream::connect(path).unwrap().read_to_string(&mut text).unwrap();
            text
        });
        let _stream = door.serve(&options, clock::now() + Duration::from_secs(10)).unwrap();
        let heard: Options = serde_json::from_str(&service.join().unwrap()).unwrap();
        assert_eq!(heard.name.as_deref(), Some("nas"));
    }
}

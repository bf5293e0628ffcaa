//! The service manager's notification socket, as in sd_notify(3): the daemon says when it is up, what it does and that it
//! is alive. Without a manager nothing is sent.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Whoever supervises this process.
#[derive(Debug, Default)]
pub struct Manager {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// The manager that started this process, by `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`. A socket that cannot be
    /// reached counts as none.
    #[must_use]
    pub fn of_this_process() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let socket = match connect(&name) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, socket = ?name, "the service manager cannot be told anything");
                None
            }
        };
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| meant && *micros > 0).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// The start is complete.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// What the daemon is doing, for `systemctl status`.
    pub fn status(&self, status: &str) {
        self.say(&format!("STATUS={}", one_line(status)));
    }

    /// The stop has begun.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// The daemon works; to be said every [`Self::alive_every`].
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// How often the manager is to hear [`Self::alive`]: twice as often as it asks for. `None`: it does not watch.
    #[must_use]
    pub fn alive_every(&self) -> Option<Duration> {
        self.socket.as_ref().and(self.watchdog).map(|limit| limit / 2)
    }

    fn say(&self, what: &str) {
        let Some(socket) = &self.socket else { return };
        // The socket does not block: a manager that does not read must not stop its service.
        if let Err(error) = socket.send(what.as_bytes()) {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// A name that starts with `@` is in the abstract namespace (unix(7)).
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_hears_each_word_on_a_path_and_on_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("@meshd-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        for (listener, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str().to_owned()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), name.into()),
        ] {
            let manager = Manager { socket: Some(connect(&name).unwrap()), watchdog: Some(Duration::from_secs(30)) };
            manager.ready("up in\nhome");
            manager.alive();
            manager.stopping();
            let mut heard = Vec::new();
            for _ in 0..3 {
                let mut buffer = [0; 100];
                let length = listener.recv(&mut buffer).unwrap();
                heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
            assert_eq!(heard, ["READY=1\nSTATUS=up in home", "WATCHDOG=1", "STOPPING=1"]);
            assert_eq!(manager.alive_every(), Some(Duration::from_secs(15)));
        }
    }

    #[test]
    fn without_a_manager_nothing_is_said_and_nothing_is_watched() {
        let manager = Manager { socket: None, watchdog: Some(Duration::from_secs(30)) };
        manager.ready("up");
        assert_eq!(manager.alive_every(), None);
    }
}

//! What goes wrong with links, as sentences for people.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::link::noise::NoiseError;
use crate::link::proxy::ProxyFailure;
use crate::wire::local::Problem;

/// Which side has the older program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upgrade {
    /// This machine.
    Node,
    /// The coordinator's machine.
    Coordinator,
}

/// Why there is no link. Each is one sentence with its cause; [`ConnectError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The coordinator's URL cannot be used.
    #[error("the coordinator's URL {url:?} cannot be used: {why}")]
    BadUrl {
        /// The URL.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// A proxy's URL cannot be used.
    #[error("the proxy {shown:?} cannot be used: {why}")]
    BadProxy {
        /// The URL without credentials.
        shown: String,
        /// What is wrong with it.
        why: String,
    },
    /// The proxy does not connect to the coordinator.
    #[error("{}", .failure.sentence(.proxy, .target))]
    Proxy {
        /// The proxy's URL without credentials.
        proxy: String,
        /// What it was asked to reach, `host:port`.
        target: String,
        /// What it does instead.
        failure: ProxyFailure,
    },
    /// The host name does not resolve.
    #[error("the coordinator's name {host:?} cannot be resolved: {cause}")]
    DnsFailed {
        /// The name.
        host: String,
        /// What the resolver said.
        cause: String,
    },
    /// No TCP connection.
    #[error("the coordinator at {addr} cannot be reached: {cause}")]
    Unreachable {
        /// `host:port` as in the URL.
        addr: String,
        /// The address tried last.
        tried: SocketAddr,
        /// What the system said.
        cause: String,
    },
    /// TCP works, TLS does not.
    #[error("no secure connection to the coordinator at {addr}: {cause}")]
    TlsFailed {
        /// `host:port` as in the URL.
        addr: String,
        /// What TLS said.
        cause: String,
    },
    /// Something answers, but not a meshd coordinator.
    #[error("what answers at {addr} is not a meshd coordinator: {detail}")]
    NotACoordinator {
        /// `host:port` as in the URL.
        addr: String,
        /// What it did.
        detail: String,
    },
    /// The coordinator, or a proxy in front of it, asks to come back later.
    #[error("the coordinator at {addr} is not available now: it answered HTTP {status}")]
    Unavailable {
        /// `host:port` as in the URL.
        addr: String,
        /// 429, 502, 503 or 504.
        status: u16,
    },
    /// A coordinator answers, but not the one the token names.
    #[error("the coordinator at {addr} does not have the key in the token")]
    WrongKey {
        /// `host:port` as in the URL.
        addr: String,
    },
    /// No protocol version in common.
    #[error("{text}")]
    Version {
        /// What and why.
        text: String,
        /// Which side is older.
        upgrade: Upgrade,
    },
    /// The deadline passed.
    #[error("the coordinator at {addr} did not answer within {after:?} ({stage})")]
    TimedOut {
        /// `host:port` as in the URL.
        addr: String,
        /// The deadline.
        after: Duration,
        /// What was being waited for.
        stage: &'static str,
    },
}

impl ConnectError {
    /// A stable word for programs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::BadUrl { .. } => "coordinator-url",
            Self::BadProxy { .. } => "proxy-url",
            Self::Proxy { failure, .. } => failure.code(),
            Self::DnsFailed { .. } => "coordinator-dns",
            Self::Unreachable { .. } => "coordinator-unreachable",
            Self::TlsFailed { .. } => "coordinator-tls",
            Self::NotACoordinator { .. } => "not-a-coordinator",
            Self::Unavailable { .. } => "coordinator-unavailable",
            Self::WrongKey { .. } => "coordinator-wrong-key",
            Self::Version { .. } => "version",
            Self::TimedOut { .. } => "coordinator-timeout",
        }
    }

    /// What the person can do.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::BadUrl { .. } => "ask for a new token; the coordinator's --public-url decides what tokens carry",
            Self::BadProxy { .. } => {
                "write http://NAME:PASSWORD@HOST:PORT or socks5://…; `meshd up --proxy none` goes without, whatever the environment says"
            }
            Self::Proxy { failure, .. } => failure.hint(),
            Self::DnsFailed { .. } => "check this machine's DNS and the host name in the coordinator's --public-url",
            Self::Unreachable { .. } => {
                "check that `meshd coordinator` runs there, that its port is open in firewalls, and this machine's network"
            }
            Self::TlsFailed { .. } => {
                "check that the coordinator's --public-url starts with https:// only if it (or its proxy) speaks TLS on that port"
            }
            Self::NotACoordinator { .. } => {
                "check host, port and path of the coordinator's --public-url; a proxy in front must pass WebSockets"
            }
            Self::Unavailable { .. } => "try again in a moment; if it stays so, look at the coordinator's log",
            Self::WrongKey { .. } => {
                "get a new token: the coordinator was set up again, or the token's URL leads to another coordinator"
            }
            Self::Version { upgrade: Upgrade::Node, .. } => "upgrade meshd on this machine",
            Self::Version { upgrade: Upgrade::Coordinator, .. } => "upgrade meshd on the coordinator's machine",
            Self::TimedOut { .. } => "check this machine's network, and firewalls between here and the coordinator",
        }
    }

    /// True: trying again later can help without anybody changing anything.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Proxy { .. }
            | Self::DnsFailed { .. }
            | Self::Unreachable { .. }
            | Self::TlsFailed { .. }
            | Self::NotACoordinator { .. }
            | Self::Unavailable { .. }
            | Self::TimedOut { .. } => true,
            Self::BadUrl { .. } | Self::BadProxy { .. } | Self::WrongKey { .. } | Self::Version { .. } => false,
        }
    }
}

impl From<&ConnectError> for Problem {
    fn from(e: &ConnectError) -> Self {
        Self { code: e.code().to_owned(), text: e.to_string(), hint: e.hint().to_owned() }
    }
}

impl From<ConnectError> for Problem {
    fn from(e: ConnectError) -> Self {
        Self::from(&e)
    }
}

/// Why a link that was up is not any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The other side closed it and said why.
    #[error("closed by the other side: {reason} (code {code})")]
    Closed {
        /// A WebSocket close code; meshd's own are in [`crate::link::close`].
        code: u16,
        /// A sentence, maybe empty.
        reason: String,
    },
    /// This side closed it.
    #[error("closed by this side")]
    ClosedHere,
    /// Nothing came although an answer was due.
    #[error("the other side does not answer")]
    Silent,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The other side broke the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// This side wanted to send something it must not; the link is still up.
    #[error("the message is too long to send")]
    TooLong,
}

impl From<NoiseError> for LinkError {
    fn from(e: NoiseError) -> Self {
        Self::Protocol(e.to_string())
    }
}

/// What a system or TLS error means to a person, without the libraries' advice to programmers.
pub(super) fn plainly(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => "it was cut off".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => "it was reset".to_owned(),
        io::ErrorKind::TimedOut => "the other side does not answer".to_owned(),
        _ => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_connection_is_said_without_advice_to_programmers() {
        let advice = "peer closed connection without sending TLS close_notify: https://docs.rs/…";
        assert_eq!(plainly(&io::Error::new(io::ErrorKind::UnexpectedEof, advice)), "it was cut off");
        assert_eq!(plainly(&io::ErrorKind::ConnectionReset.into()), "it was reset");
        assert_eq!(plainly(&io::Error::other("strange")), "strange");
    }
}

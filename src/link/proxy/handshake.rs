//! What is said to a proxy until it passes bytes on. No socket and no clock.

use zeroize::Zeroizing;

use crate::link::proxy::failure::ProxyFailure;
use crate::link::proxy::http::Connect;
use crate::link::proxy::socks::Socks;
use crate::link::proxy::{Kind, MAX_HOST, Proxy, authority};

/// What follows from bytes of the proxy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More of them are needed.
    More,
    /// This is to be sent.
    Send(Zeroizing<Vec<u8>>),
    /// The proxy passes bytes on from here.
    Done,
}

/// The two kinds behind one face.
pub(super) enum Handshake {
    Http(Connect),
    Socks(Socks),
}

impl Handshake {
    /// For a connection to `host`, and what is to be sent first.
    ///
    /// # Errors
    /// The host is longer than a proxy can be told.
    pub(super) fn start(proxy: &Proxy, host: &str, port: u16) -> Result<(Self, Zeroizing<Vec<u8>>), ProxyFailure> {
        if host.len() > MAX_HOST {
            return Err(ProxyFailure::Refused("the coordinator's name is longer than 255 bytes".to_owned()));
        }
        Ok(match proxy.kind {
            Kind::Http => {
                let is_ipv6 = host.parse::<std::net::Ipv6Addr>().is_ok();
                let (connect, first) = Connect::start(&authority(host, port, is_ipv6), proxy.credentials.as_ref());
                (Self::Http(connect), first)
            }
            Kind::Socks5 => {
                let (socks, first) = Socks::start(host, port, proxy.credentials.clone());
                (Self::Socks(socks), first)
            }
        })
    }

    /// Takes what came. All of it is used; nothing may come after the last byte of the handshake, because who speaks first
    /// through a proxy is the side that asked for the connection.
    ///
    /// # Errors
    /// The proxy does not connect.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Result<Step, ProxyFailure> {
        match self {
            Self::Http(connect) => connect.receive(bytes),
            Self::Socks(socks) => socks.receive(bytes),
        }
    }

    /// The proxy ended the connection.
    pub(super) fn closed(&self) -> ProxyFailure {
        match self {
            Self::Http(connect) => connect.closed(),
            Self::Socks(socks) => socks.closed(),
        }
    }
}

/// A few bytes, for a person.
pub(super) fn shown(bytes: &[u8]) -> String {
    let some = bytes.get(..bytes.len().min(32)).unwrap_or_default();
    format!("\"{}\"", some.escape_ascii())
}

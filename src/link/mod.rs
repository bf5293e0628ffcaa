//! NODE ↔ COORDINATOR, THE CONNECTION: Noise over WebSocket over TLS over TCP, both ends.
//!
//! ```text
//! control:  JSON │ Noise transport messages │ WebSocket binary messages │ TLS (or none) │ TCP
//! relay:    relay frames (wire/relay.rs)    │ WebSocket binary messages │ TLS (or none) │ TCP
//! ```
//!
//! Both begin with the same Noise_IK handshake, in which the coordinator proves the key that the node's token names and
//! the node proves its control key. [`noise`] is that protocol as pure code; `connect` and `accept` are its two ends;
//! `pump` moves messages and notices a dead peer; `control` and `relay` are what the two kinds of link look like
//! afterwards. [`proxy`] goes through an HTTP or SOCKS5 proxy on the way. Dropping either half of a link ends it.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod accept;
mod connect;
mod control;
mod endpoint;
mod error;
pub mod noise;
pub mod proxy;
mod pump;
mod relay;
mod tls;

pub use accept::{AcceptError, HANDSHAKE_DEADLINE, Peer, accept_control, accept_relay};
pub use connect::{Connected, Target, connect, connect_control, connect_relay};
pub use control::{ControlLink, ControlReceiver, ControlSender};
pub use endpoint::Endpoint;
pub use error::{ConnectError, LinkError, Upgrade};
pub use noise::{Purpose, public_key};
pub use proxy::{Proxies, ProxySetting};
pub use pump::{Keepalive, close};
pub use relay::{MAX_RELAY_MESSAGE, RelayLink, RelayReceiver, RelaySender};

use std::net::SocketAddr;

/// What is known of a link besides its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// The other end of the TCP connection; absent where the transport has none.
    pub peer_addr: Option<SocketAddr>,
    /// This end of the TCP connection; absent where the transport has none.
    pub local_addr: Option<SocketAddr>,
    /// The protocol version both sides speak.
    pub version: u16,
    /// The other side's program version, for people.
    pub program: String,
}

#[cfg(test)]
mod tests;

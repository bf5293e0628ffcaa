//! How a peer can be reached directly.
//!
//! A direct path is found in a *round*. The caller sends its candidates through the relay (`call`), the other side
//! answers with its own (`answer`), and the caller says `go` and starts half a round trip later, so that both sides'
//! first probes leave within a few milliseconds of each other. That matters: a probe that reaches a Linux router whose
//! own host behind it has not sent yet can claim the port pair there, and the punch then fails for good. (DCUtR of
//! libp2p synchronises the same way.)
//!
//! A path is promoted only by our own probe of data size that was answered at data size, and demoted only by evidence.

use std::net::SocketAddr;

use crate::engine::io::{Path, SocketId, Via};

pub mod agent;
pub mod candidate;
pub(crate) mod heavy;
pub mod mtu;
pub mod ports;
pub mod reason;
pub mod reflexive;
pub(crate) mod tcp;
pub mod why;

pub(crate) mod technique;

/// One way a datagram can take: from one of our sockets to an address of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Leg {
    pub(crate) socket: SocketId,
    pub(crate) remote: SocketAddr,
}

impl Leg {
    /// From the socket that carries data by default.
    pub(crate) const fn main(remote: SocketAddr) -> Self {
        Self { socket: SocketId::for_remote(&remote), remote }
    }

    /// None: through the relay.
    pub(crate) const fn of(via: &Via) -> Option<Self> {
        match via {
            Via::Udp { socket, remote } => Some(Self { socket: *socket, remote: *remote }),
            Via::Relay { .. } => None,
        }
    }

    /// Of a path that is or was direct.
    pub(crate) const fn of_path(path: &Path) -> Option<Self> {
        match path {
            Path::Direct { socket, remote } | Path::Both { socket, remote } => {
                Some(Self { socket: *socket, remote: *remote })
            }
            Path::None | Path::Relay => None,
        }
    }

    pub(crate) const fn via(self) -> Via {
        Via::Udp { socket: self.socket, remote: self.remote }
    }

    pub(crate) const fn direct(self) -> Path {
        Path::Direct { socket: self.socket, remote: self.remote }
    }

    pub(crate) const fn both(self) -> Path {
        Path::Both { socket: self.socket, remote: self.remote }
    }
}

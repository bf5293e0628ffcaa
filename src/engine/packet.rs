//! What the packet machines read, and where they write: sinks that hand out room, so that sealing and opening go
//! straight into the buffer that will be sent.

use std::net::SocketAddr;
use std::time::Duration;

use crate::engine::io::{Notice, PeerId, SocketId, Via};
use crate::wire::keys::WgKey;
use crate::wire::offload::Offload;

/// Bytes a data message adds to its inner packet: type, receiver, counter (16) and tag (16). WireGuard paper, 5.4.6.
pub const DATA_OVERHEAD: usize = 32;
/// boringtun wants at least this much room, whatever it writes: the size of a handshake initiation.
pub const MIN_ROOM: usize = 148;

/// What one read from the TUN device gave.
#[derive(Debug)]
pub struct FromTun<'a> {
    /// An IP packet, or a superpacket. It is cut and completed in place.
    pub bytes: &'a mut [u8],
    /// Which of the two, and how it is to be completed.
    pub offload: Offload,
}

impl<'a> FromTun<'a> {
    /// An ordinary, complete packet.
    #[must_use]
    pub fn whole(bytes: &'a mut [u8]) -> Self {
        Self { bytes, offload: Offload::default() }
    }
}

/// How datagrams came.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// From where.
    pub via: Via,
    /// The ECN field of their outer headers (RFC 3168 section 5).
    pub ecn: u8,
    /// How long they waited for this node to take them, if that is known.
    pub waited: Option<Duration>,
}

impl Arrival {
    /// Nothing is known but from where.
    #[must_use]
    pub const fn by(via: Via) -> Self {
        Self { via, ecn: 0, waited: None }
    }
}

/// Where one sealed datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// By UDP.
    Udp {
        /// Which of our sockets.
        socket: SocketId,
        /// The peer's address.
        remote: SocketAddr,
    },
    /// Through the relay.
    Relay {
        /// The peer.
        peer: WgKey,
    },
}

/// Outbound's view of the shell.
pub trait OutboundSink {
    /// Room for one datagram of at most `max` bytes to `to`, to be sent with the ECN field `ecn` (RFC 3168 section 5);
    /// exactly `max` bytes long. None: that queue is full, and the packet is dropped by name.
    fn room(&mut self, to: &Destination, ecn: u8, max: usize) -> Option<&mut [u8]>;
    /// The datagram in the room handed out last is `len` bytes long (at its beginning). Without a commit it is discarded.
    fn commit(&mut self, len: usize);
    /// A packet for our own kernel (an ICMP error).
    fn to_tun(&mut self, packet: &[u8]);
    /// Tell the planner.
    fn notice(&mut self, notice: Notice);
}

/// Inbound's view of the shell.
pub trait InboundSink {
    /// Room for one inner packet of at most `max` bytes; exactly `max` bytes long.
    fn tun_room(&mut self, max: usize) -> &mut [u8];
    /// The packet in the room handed out last is the first `len` bytes of it. Without a commit it is discarded.
    fn tun_commit(&mut self, len: usize);
    /// Answer a datagram at once (a cookie reply, a data message flushed by a handshake).
    fn reply(&mut self, via: &Via, bytes: &[u8]);
    /// Tell the planner.
    fn notice(&mut self, notice: Notice);
    /// A session of this peer may now be used for sending; the worker calls `Outbound::flush` after the batch.
    fn established(&mut self, peer: PeerId);
}

//! Every reason a packet or message is dropped. There is no unnamed drop. Tests and `meshd status --drops` use the names.

use std::sync::atomic::{AtomicU64, Ordering};

named! {
    /// Why something was dropped.
    Drop:
    /// Outbound: not an IPv4 or IPv6 packet, or its lengths contradict each other.
    BadIp = "bad-ip",
    /// Outbound: the kernel handed over several packets as one in a form that cannot be cut.
    BadSuperpacket = "bad-superpacket",
    /// Outbound: no peer owns the destination address.
    NoRoute = "no-route",
    /// Outbound: more packets waited for a session than the queue holds; the oldest was dropped.
    StagedOverflow = "staged-overflow",
    /// Outbound: more packets waited for those before them on a slower path than there is room for; the oldest was dropped.
    HeldOverflow = "held-overflow",
    /// Outbound: the peer did not answer any handshake while the packet waited.
    HandshakeTimeout = "handshake-timeout",
    /// Outbound: the peer was removed from the network while the packet waited.
    PeerGone = "peer-gone",
    /// Outbound: the packet is longer than the path to the peer takes; its sender is told how long it may be.
    TooBig = "too-big",
    /// Outbound: there is no path to the peer, not even a relay.
    NoPath = "no-path",
    /// Outbound: the queue to the relay is full; newest dropped.
    RelayBusy = "relay-busy",
    /// Outbound: the socket refused the datagram.
    SendFailed = "send-failed",
    /// Outbound: the kernel's buffer for datagrams to send stayed full, or the kernel had no memory.
    SendBufferFull = "send-buffer-full",
    /// Outbound: more waits in the TCP connection to the peer than it may hold, or it is gone; newest dropped.
    StreamFull = "stream-full",
    /// Inbound: a TCP connection of a stranger that was one too many, took too long, or sent something else than a path probe.
    StreamRefused = "stream-refused",
    /// Outbound: the kernel's queue to this program was full. Counted by the interface, where the kernel tells.
    TunQueueFull = "tun-queue-full",
    /// Inbound: the kernel's buffer of datagrams that came was full. Counted by the sockets, where the kernel tells.
    UdpQueueFull = "udp-queue-full",
    /// Inbound: the first bytes are those of no protocol that meshd speaks.
    Junk = "junk",
    /// Inbound: the queue of handshakes and probes to the planner is full; newest dropped.
    SlowQueueFull = "slow-queue-full",
    /// Inbound: a handshake without a valid MAC, or over the rate limit and answered with a cookie.
    HandshakeGate = "handshake-gate",
    /// Inbound: a handshake from a key that is not a member of the network.
    UnknownPeer = "unknown-peer",
    /// Inbound: a valid handshake header that boringtun refused (replayed, or for an old key).
    BadHandshake = "bad-handshake",
    /// Inbound: data for a session this node does not have.
    UnknownIndex = "unknown-index",
    /// Inbound: data that does not open under the session's key.
    BadTag = "bad-tag",
    /// Inbound: data with a counter already seen, or too old to tell.
    Replayed = "replayed",
    /// Inbound: the sealed content is no IP packet.
    BadInner = "bad-inner",
    /// Inbound: a queue in this node stayed long, and one sender was asked to slow down by the loss of this packet.
    QueueDelay = "queue-delay",
    /// Inbound: marked as congested on its way, and its ends do not know such marks (RFC 6040).
    Congested = "congested",
    /// Inbound: the inner source address does not belong to the peer that sent it.
    SpoofedSource = "spoofed-source",
    /// Inbound: the inner destination is not this node.
    NotForUs = "not-for-us",
    /// Inbound: a STUN message that is neither an expected answer nor a path probe.
    UnexpectedStun = "unexpected-stun",
    /// Inbound: a path probe that names no peer this node talks to.
    UnknownProbe = "unknown-probe",
    /// Inbound: a path probe whose integrity check fails.
    BadProbe = "bad-probe",
    /// Inbound: more path probes from one peer than are answered.
    ProbeLimit = "probe-limit",
    /// Outbound: a path probe held back for politeness: too many in all, or too many to an address nobody vouched for.
    Polite = "polite",
    /// Inbound: a sealed peer message that does not open, is old, or is malformed.
    BadSealed = "bad-sealed",
    /// Inbound: a message of a peer inside its session that is malformed, or that this version does not know.
    BadPeerMessage = "bad-peer-message",
    /// Inbound: more messages from one peer than are answered.
    PeerMessageLimit = "peer-message-limit",
    /// Inbound: a peer asked for something to be passed on that is not passed on, or to a node that cannot be reached from here.
    NotPassedOn = "not-passed-on",
    /// Relaying for others: more than this node volunteered to carry, or more than the pair's share of it.
    PeerRelayLimit = "peer-relay-limit",
    /// Relaying for others: packets came faster than they could be passed on; newest dropped.
    PeerRelayBusy = "peer-relay-busy",
    /// Inbound: the TUN device refused the packet.
    TunRefused = "tun-refused",
    /// Inbound: the kernel had no room for the packet.
    TunFull = "tun-full",
    /// Inbound: the queue from the relay is full; newest dropped.
    RelayInboundFull = "relay-inbound-full",
    /// Inbound: a relay datagram that is malformed, or of no session of this node.
    BadRelayDatagram = "bad-relay-datagram",
    /// Inbound: a relay datagram whose tag is wrong.
    BadRelayTag = "bad-relay-tag",
    /// Inbound: a relay datagram seen before, or too old to tell.
    RelayReplayed = "relay-replayed",
    /// Inbound: a relay datagram from a node that this one does not know.
    UnknownRelaySender = "unknown-relay-sender",
    /// Control: a message that this version cannot read.
    UnreadableControl = "unreadable-control",
    /// Control: a record that the chain of trust does not support.
    RefusedRecord = "refused-record",
}

/// One counter a reason. Shared between threads; counting costs one relaxed addition.
#[derive(Debug)]
pub struct Drops {
    counts: [AtomicU64; Drop::ALL.len()],
}

impl Default for Drops {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Drops {
    /// Counts one drop.
    pub fn count(&self, why: Drop) {
        self.add(why, 1);
    }

    /// Counts `n` drops.
    pub fn add(&self, why: Drop, n: u64) {
        self.counts[why as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Says how often something happened that somebody else counts.
    pub fn set(&self, why: Drop, n: u64) {
        self.counts[why as usize].store(n, Ordering::Relaxed);
    }

    /// How often this happened.
    #[must_use]
    pub fn get(&self, why: Drop) -> u64 {
        self.counts[why as usize].load(Ordering::Relaxed)
    }
}

//! What goes into and comes out of the three machines of a node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::Mutex;

use crate::engine::alias::RealFlows;
use crate::engine::session::tunnel::Tunnel;
use crate::engine::traffic::Traffic;
use crate::trust::advert::SignedAdvert;
use crate::trust::record::SignedRecord;
use crate::wire::control::{ToCoordinator, ToNode};
use crate::wire::keys::{IdentityKey, WgKey};
use crate::wire::local::{Netcheck, Pong, Problem};
use crate::wire::nat::UdpLifetime;

/// A peer, as a small number the planner gives out and never reuses in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// One of the node's UDP sockets, or a TCP connection in the place of one. The first is the IPv4 one, the second the IPv6 one;
/// others are opened and closed as the planner asks for ([`Output::OpenSockets`], [`Output::Tcp`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(pub u16);

impl SocketId {
    /// The IPv4 socket.
    pub const V4: Self = Self(0);
    /// The IPv6 socket.
    pub const V6: Self = Self(1);

    /// From here on the number is that of a TCP connection to a peer, which carries datagrams one after the other
    /// ([`crate::wire::framed`]). Those that this node makes are numbered by the planner.
    pub const FIRST_STREAM: u16 = 0x8000;
    /// From here on it is one that somebody else made, numbered by the shell.
    pub const FIRST_ACCEPTED: u16 = 0xC000;

    /// It is a TCP connection.
    #[must_use]
    pub const fn is_stream(self) -> bool {
        self.0 >= Self::FIRST_STREAM
    }

    /// The socket that reaches `remote`.
    #[must_use]
    pub const fn for_remote(remote: &SocketAddr) -> Self {
        match remote {
            SocketAddr::V4(_) => Self::V4,
            SocketAddr::V6(_) => Self::V6,
        }
    }
}

/// How a datagram came or is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// By UDP, or in a TCP connection to the peer if [`SocketId::is_stream`].
    Udp {
        /// Which of our sockets.
        socket: SocketId,
        /// The other end.
        remote: SocketAddr,
    },
    /// Through the relay. Inbound, `peer` is the sender as authenticated by the relay; outbound, the receiver.
    Relay {
        /// The other end.
        peer: WgKey,
    },
}

/// Where a peer's packets go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Nowhere: no relay link and no proven address.
    None,
    /// Through the relay.
    Relay,
    /// By UDP to a proven address, or in a TCP connection.
    Direct {
        /// Which of our sockets.
        socket: SocketId,
        /// The peer's address.
        remote: SocketAddr,
    },
    /// Both ways at once, while a direct path is in doubt.
    Both {
        /// Which of our sockets.
        socket: SocketId,
        /// The peer's address.
        remote: SocketAddr,
    },
}

/// Planner → data workers. A worker drains these after each receive and before it processes the batch.
#[derive(Debug, Clone)]
pub enum Update {
    /// A peer exists and owns these prefixes.
    Peer {
        /// Who.
        peer: PeerId,
        /// Its key, the address of relay frames.
        key: WgKey,
        /// Prefixes whose packets go to it, host bits zero. Replaces the earlier set.
        owns: Vec<IpNet>,
        /// Prefixes it may send from, host bits zero: what it owns, and what it leads to while another is asked first.
        /// Replaces the earlier set.
        admits: Vec<IpNet>,
        /// Prefixes, among those that several nodes lead to, for which flows that began through it stay with it while another
        /// is asked. Replaces the earlier set.
        keeps: Vec<IpNet>,
        /// Its counters.
        traffic: Arc<Traffic>,
    },
    /// Besides our own addresses, packets for these prefixes may come in: this node leads to them. Replaces the earlier set.
    Serves(Vec<IpNet>),
    /// Networks behind this node have other numbers for everybody else. Replaces the earlier set.
    Aliases {
        /// A prefix as it is here, and its alias, of the same family and length each.
        pairs: Vec<(IpNet, IpNet)>,
        /// Flows that came by the real addresses.
        flows: Arc<RealFlows>,
    },
    /// The peer is out: forget everything about it.
    Gone(PeerId),
    /// The peer has a tunnel object (a session may or may not be up in it).
    Tunnel {
        /// Who.
        peer: PeerId,
        /// Shared by both machines and the planner; locked once per batch, never across a system call.
        tunnel: Arc<Mutex<Tunnel>>,
        /// The 24-bit index in the receiver field of its messages (bits 8 to 31).
        index: u32,
    },
    /// Where its packets go.
    Path {
        /// Who.
        peer: PeerId,
        /// Where.
        path: Path,
        /// The first packet this way waits so long behind the last that went the way before, which is slower.
        lead: Duration,
    },
    /// How long inner packets may be on its direct path. A new direct path starts with
    /// [`BASE`](crate::engine::path::mtu::BASE).
    Mtu {
        /// Who.
        peer: PeerId,
        /// Bytes.
        size: u16,
        /// Larger ones are ruled out for now: connections that open are told.
        settled: bool,
    },
    /// A session may now be used for sending: flush what was staged.
    Established(PeerId),
    /// No handshake succeeded: drop what was staged.
    GiveUp(PeerId),
    /// Who carries what goes to the peer by relay; None: the coordinator.
    Through {
        /// Whose packets.
        peer: PeerId,
        /// A node that relays for others, reached directly.
        relay: Option<PeerId>,
    },
    /// This node relays for others, so many bytes a second; None: it does not.
    Relaying(Option<u64>),
    /// Path probes and sealed messages with this name in them come from that peer.
    ProbeName {
        /// Who.
        peer: PeerId,
        /// See [`crate::wire::probe`].
        name: [u8; 8],
    },
}

/// Data workers → planner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A packet is staged for a peer without a session.
    NeedSession(PeerId),
    /// Data was sent to or came from a peer whose `watched` mark was off (see [`Traffic`]).
    Active(PeerId),
    /// A datagram for the planner: handshake, probe, STUN answer, sealed message.
    Slow {
        /// How it came.
        via: Via,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// A message of the peer's planner came inside its session ([`crate::wire::peer`]).
    Message {
        /// Who.
        peer: PeerId,
        /// What was sealed.
        bytes: Vec<u8>,
    },
    /// A peer asked for packets to be passed on to another, to which there is no direct way from here.
    NoWay {
        /// Who asked.
        from: PeerId,
        /// To whom.
        to: PeerId,
    },
    /// Authenticated data came from a UDP address that is not the peer's current one.
    Roamed {
        /// Who.
        peer: PeerId,
        /// From where.
        via: Via,
    },
    /// The peer's first data under a session it began: the session may now be used for sending.
    Confirmed(PeerId),
    /// Data for an unknown session came through the relay from this peer: it holds a session we lost.
    UnknownIndex(WgKey),
    /// The system does not send a datagram of so many bytes this way: it would have to be fragmented (EMSGSIZE).
    TooLong {
        /// The way.
        via: Via,
        /// UDP payload, bytes.
        len: usize,
    },
    /// A TCP connection is gone, or was never made.
    StreamClosed(SocketId),
}

/// A port mapping granted by a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// Where the outside reaches the IPv4 socket.
    pub external: SocketAddr,
    /// `pcp`, `nat-pmp` or `upnp`.
    pub protocol: String,
}

/// What this node is set up to do with routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteWish {
    /// Prefixes to advertise, host bits zero. One of length 0 offers an exit node.
    pub advertise: Vec<IpNet>,
    /// Traffic is to go through other nodes, before somebody works on this one. What is under way is still forwarded.
    pub draining: bool,
    /// Use the routes of others.
    pub accept: bool,
    /// Send what goes nowhere else through this node.
    pub exit_node: Option<IdentityKey>,
    /// Relay for others, so many bytes a second.
    pub relay: Option<u64>,
}

impl Default for RouteWish {
    fn default() -> Self {
        Self { advertise: Vec::new(), draining: false, accept: true, exit_node: None, relay: None }
    }
}

/// What the system is to do for routes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RoutePlan {
    /// Prefixes that lead into the tunnel. With an exit node also those of length 0, whether it can be reached or not.
    pub accepted: Vec<IpNet>,
    /// Prefixes of this machine's surroundings that are forwarded to.
    pub serving: Vec<IpNet>,
    /// The other nodes that lead to any of these prefixes.
    pub others: BTreeMap<IpNet, Vec<Arc<OtherRouter>>>,
}

/// Another node that leads to a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherRouter {
    /// Who.
    pub identity: IdentityKey,
    /// Its name.
    pub name: String,
    /// Where on its networks it answers ([`crate::trust::advert::Advert::lan`]).
    pub lan: Vec<SocketAddr>,
}

/// A local interface address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalAddress {
    /// The address.
    pub ip: IpAddr,
    /// Its on-link prefix length.
    pub prefix_len: u8,
}

/// Something happened: what the planner is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// From a data worker.
    Notice(Notice),
    /// From the coordinator.
    Control(ToNode),
    /// The control link is up (authenticated, nothing sent yet).
    ControlUp,
    /// The control link is down; the shell reconnects by itself.
    ControlDown {
        /// Why, for people.
        problem: Option<Problem>,
    },
    /// The relay link is up.
    RelayUp,
    /// The relay link is down; the shell reconnects by itself.
    RelayDown,
    /// The relay has no connection of this peer.
    RelayGone(WgKey),
    /// The machine's addresses, without loopback and without the mesh's own. Sent at start and on every change.
    Addresses(Vec<LocalAddress>),
    /// The machine's ways out changed, but not its addresses: it may be in another network.
    NetworkChanged,
    /// The STUN servers' addresses, resolved, in order of preference. Sent when known and on change.
    StunServers(Vec<SocketAddr>),
    /// Result of a full NAT check, run by the shell on a socket of its own.
    NetReport(Box<Netcheck>),
    /// How long the NAT in front keeps an idle UDP mapping, found out by the shell; None: it is not known any more.
    UdpLifetime(Option<UdpLifetime>),
    /// Those of the sockets asked for that are open now, each on a fresh port. Answers every [`Output::OpenSockets`]; what
    /// arrives on them is handed in like anything else, with their number in [`Via::Udp`].
    SocketsOpened(Vec<SocketId>),
    /// Answers [`TcpOrder::Gather`]: the TCP port that is listened on, and how servers see connections made from it. None: there
    /// is none to be had.
    TcpReady {
        /// Listened on in both families.
        port: Option<u16>,
        /// From outside.
        seen: Vec<SocketAddr>,
    },
    /// A TCP connection is there: one that was ordered, or somebody else's.
    TcpOpened {
        /// Its number.
        socket: SocketId,
        /// The other end.
        remote: SocketAddr,
    },
    /// A router granted a port mapping to the IPv4 socket, or renewed it; None: it is gone. A private or 100.64/10 address is
    /// worth telling too: it serves peers behind the same carrier.
    PortMapped(Option<PortMapping>),
    /// The link that carries datagrams refused one for good (address family missing, interface gone).
    SendFailed(Via),
    /// The node is set up otherwise, as far as routes go.
    Routes(RouteWish),
    /// Prefixes this node leads to that cannot be reached from it at the moment.
    Cut(BTreeSet<IpNet>),
    /// Where this node answers on the networks it leads to ([`crate::trust::advert::Advert::lan`]).
    AnswersAt(Vec<SocketAddr>),
    /// From the local API.
    Command(Command),
}

/// What the local API asks of the planner.
#[derive(Debug, Clone)]
pub enum Command {
    /// Send one ping to a peer; answered by `Event::Pong` with the same `token`.
    Ping {
        /// Chosen by the caller.
        token: u64,
        /// Counts from 1.
        seq: u32,
        /// Whom.
        peer: PeerId,
        /// Milliseconds until it counts as lost.
        timeout_ms: u64,
    },
    /// Send records to the coordinator; answered by `Event::Published` with the same `token`.
    Publish {
        /// Chosen by the caller.
        token: u64,
        /// Signed by this node's admin identity.
        records: Vec<SignedRecord>,
    },
}

/// What the planner wants done.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send a datagram, in one piece or not at all: [`Notice::TooLong`] if that cannot be.
    Send {
        /// How.
        via: Via,
        /// What.
        bytes: Vec<u8>,
    },
    /// Send a datagram that dies after `ttl` routers (IP time to live, IPv6 hop limit): it opens our own NAT and reaches
    /// nobody. Only with [`crate::engine::planner::Limits::prime_ttl`].
    Prime {
        /// From which socket, where to.
        via: Via,
        /// What.
        bytes: Vec<u8>,
        /// Of this one datagram.
        ttl: u8,
    },
    /// Open IPv4 UDP sockets on fresh ports, under these numbers, and answer with [`Input::SocketsOpened`] at once, with
    /// fewer or none if it cannot be helped. Never more in all than
    /// [`crate::engine::planner::Limits::extra_sockets`].
    OpenSockets(Vec<SocketId>),
    /// Close these. Their numbers may be used again.
    CloseSockets(Vec<SocketId>),
    /// Do something about TCP connections to peers. Only with [`crate::engine::planner::Limits::tcp`].
    Tcp(TcpOrder),
    /// Tell every data worker. Queued before any datagram that lets the peer act on it.
    Update(Update),
    /// The network interface should take packets of this many bytes from now on: some direct path does. Only ever more than
    /// before; it begins with [`BASE`](crate::engine::path::mtu::BASE).
    InterfaceMtu(u16),
    /// Send to the coordinator (only while the control link is up).
    Control(ToCoordinator),
    /// Append these accepted records to the node's own store, in order.
    Persist(Vec<SignedRecord>),
    /// Keep a member's newest advertisement over restarts; None: it is out.
    KeepAdvert {
        /// Whose.
        of: IdentityKey,
        /// What it says.
        advert: Option<SignedAdvert>,
    },
    /// Make the system route as planned.
    Routes(RoutePlan),
    /// The coordinator's STUN offer: resolve and answer with `Input::StunServers`.
    ResolveStun(Vec<crate::wire::control::StunServer>),
    /// Something a watcher may want to know.
    Event(Event),
}

/// What the shell does for TCP connections to peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TcpOrder {
    /// Listen on a TCP port, if that is not so yet, and ask a STUN server over TCP, in a connection made from that port and kept
    /// for a while, how it is seen from outside. Answered by [`Input::TcpReady`] within a second.
    Gather,
    /// Connect from the port, and keep trying for a few seconds while the other side may be late. Answered by
    /// [`Input::TcpOpened`] or [`Notice::StreamClosed`].
    Dial {
        /// Its number from now on.
        socket: SocketId,
        /// Where to.
        to: SocketAddr,
    },
    /// A peer has proven itself on this connection: it counts as a stranger's no more.
    Trust(SocketId),
    /// End these. No notice follows.
    Close(Vec<SocketId>),
    /// Listen no more.
    Stop,
}

/// For the local API, logs and hooks.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A ping was answered or lost.
    Pong {
        /// Of the command.
        token: u64,
        /// The document.
        pong: Pong,
    },
    /// A publication was stored, or refused.
    Published {
        /// Of the command.
        token: u64,
        /// Empty: stored.
        problem: Option<Problem>,
    },
    /// The coordinator answered `Hello` and the log is complete: the node is fully up.
    Synced,
    /// A peer's path changed.
    PathChanged {
        /// Who.
        peer: PeerId,
        /// Its key.
        key: WgKey,
        /// Where its packets go now.
        path: Path,
    },
    /// This node was revoked: it must stop.
    Expelled,
    /// What an admin gave names, or who answers for a domain, has changed.
    NamesChanged,
}

//! Direct connections by TCP, for pairs of which a side has no UDP: when they are worth trying, what is told to the peer, which
//! connections there are and which are given up. A pure machine; the planner feeds it (`planner/tcp.rs`).
//!
//! Both sides listen on a port and connect from that same port to where the other's is seen, at the same moment: whichever
//! SYN comes second finds the NAT before it open, and the kernel makes one connection of two (simultaneous open, RFC 9293
//! section 3.5; TCP candidates of RFC 6544, all of them simultaneous-open and passive at once). One attempt is held for
//! seconds: a socket closed too early answers the other side's SYN with a reset (nat.md, section 2.2).
//!
//! To a path agent a connection is one more leg, whose socket has a number from [`SocketId::FIRST_STREAM`] on: it proves
//! itself by the same probes, is watched and left like any other, and is left for UDP as soon as UDP proves itself.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::engine::io::{LocalAddress, PeerId, SocketId};
use crate::engine::path::candidate::usable;
use crate::engine::path::reason::NatView;
use crate::time::Now;
use crate::wire::probe::MAX_TCP;

/// A call or an answer waits this long for the port and how it is seen from outside, then goes out without.
const PATIENCE: Duration = Duration::from_millis(800);
/// What was learned is told for so long: NATs keep a TCP mapping for minutes (RFC 5382, REQ-5), and the shell holds the
/// connection that it was learned by.
const FRESH: Duration = Duration::from_secs(20);
/// Nothing is asked again for so long after there was no port to be had.
const FAILED: Duration = Duration::from_secs(60);
/// The port is closed when nobody has used it for so long.
const LINGER: Duration = Duration::from_secs(180);
/// A connection that was chosen makes the peer's others superfluous after this time: what is under way on them arrives.
const SETTLE: Duration = Duration::from_secs(1);
/// Connections being made at once, of the whole node.
const MOST_DIALS: usize = 16;

/// A connection is worth trying: no datagram gets through on one side.
pub(crate) fn is_wanted(mine: &NatView, theirs: &NatView) -> bool {
    mine.udp == Some(false) || theirs.udp == Some(false)
}

/// The node's TCP port, and its connections to peers.
#[derive(Debug)]
pub(crate) struct Tcp {
    port: Port,
    streams: BTreeMap<SocketId, Stream>,
    next: u16,
    /// When a call last needed the port, or a connection was there.
    used: Now,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Port {
    Closed,
    Asked(Now),
    Open { port: u16, seen: Vec<SocketAddr>, at: Now },
    Failed(Now),
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Whose it is; None: somebody connected who has not proven to be anybody.
    peer: Option<PeerId>,
    remote: SocketAddr,
    open: bool,
    proven: bool,
    /// Superfluous from then on.
    closes: Option<Now>,
}

/// Whether the port can be told to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    /// As far as it ever will be.
    Yes,
    /// It was asked for.
    Soon,
    /// Ask the shell for it.
    Ask,
}

impl Tcp {
    pub(crate) const fn new(now: Now) -> Self {
        Self { port: Port::Closed, streams: BTreeMap::new(), next: SocketId::FIRST_STREAM, used: now }
    }

    /// Somebody is about to be told the port.
    pub(crate) fn prepare(&mut self, now: Now) -> Ready {
        self.used = now;
        match &self.port {
            Port::Open { at, .. } if now.since(*at) < FRESH => Ready::Yes,
            Port::Asked(at) if now.since(*at) < PATIENCE => Ready::Soon,
            Port::Asked(_) => {
                self.port = Port::Failed(now);
                Ready::Yes
            }
            Port::Failed(at) if now.since(*at) < FAILED => Ready::Yes,
            Port::Open { .. } | Port::Failed(_) | Port::Closed => {
                self.port = Port::Asked(now);
                Ready::Ask
            }
        }
    }

    /// The shell listens on this port, seen from outside at these addresses; or there is none to be had.
    pub(crate) fn ready(&mut self, port: Option<u16>, seen: Vec<SocketAddr>, now: Now) {
        self.port = port.map_or(Port::Failed(now), |port| Port::Open { port, seen, at: now });
    }

    /// The network changed: how the port is seen is not known any more.
    pub(crate) fn distrust(&mut self) {
        if !matches!(self.port, Port::Asked(_)) {
            self.port = Port::Closed;
        }
    }

    pub(crate) const fn has_port(&self) -> bool {
        matches!(self.port, Port::Open { .. })
    }

    /// No port is to be had for now.
    pub(crate) const fn failed(&self) -> bool {
        matches!(self.port, Port::Failed(_))
    }

    /// Where the peer may connect to: as seen from outside, then the machine's own addresses; at most [`MAX_TCP`].
    pub(crate) fn candidates(&self, local: &[LocalAddress], mesh: &[IpNet]) -> Vec<SocketAddr> {
        let Port::Open { port, seen, .. } = &self.port else { return Vec::new() };
        let own = local.iter().map(|a| SocketAddr::new(a.ip, *port));
        let mut out: Vec<SocketAddr> = Vec::new();
        for addr in seen.iter().copied().chain(own) {
            if out.len() < MAX_TCP && usable(&addr, mesh) && !out.contains(&addr) {
                out.push(addr);
            }
        }
        out
    }

    /// A number for a connection to be made to the peer there; None: there is one already, or too many are being made.
    pub(crate) fn dial(&mut self, peer: PeerId, remote: SocketAddr, now: Now) -> Option<SocketId> {
        let dialing = self.streams.values().filter(|s| !s.open).count();
        if dialing >= MOST_DIALS || self.streams.values().any(|s| s.peer == Some(peer) && s.remote == remote) {
            return None;
        }
        self.used = now;
        for _ in SocketId::FIRST_STREAM..SocketId::FIRST_ACCEPTED {
            let socket = SocketId(self.next);
            self.next = if self.next + 1 == SocketId::FIRST_ACCEPTED { SocketId::FIRST_STREAM } else { self.next + 1 };
            if let Entry::Vacant(free) = self.streams.entry(socket) {
                free.insert(Stream { peer: Some(peer), remote, open: false, proven: false, closes: None });
                return Some(socket);
            }
        }
        None
    }

    /// A connection is there: one of ours, whose peer is returned, or a stranger's.
    pub(crate) fn opened(&mut self, socket: SocketId, remote: SocketAddr) -> Option<PeerId> {
        if socket.0 >= SocketId::FIRST_ACCEPTED {
            let stranger = Stream { peer: None, remote, open: true, proven: false, closes: None };
            self.streams.insert(socket, stranger);
            return None;
        }
        let stream = self.streams.get_mut(&socket)?;
        stream.open = true;
        stream.peer
    }

    /// The peer's probe, or its answer to one of ours, came this way. None: the connection is gone or another's; else whether
    /// it is the first proof of whose it is.
    pub(crate) fn proves(&mut self, socket: SocketId, peer: PeerId, now: Now) -> Option<bool> {
        let stream = self.streams.get_mut(&socket).filter(|s| s.peer.is_none_or(|owner| owner == peer))?;
        self.used = now;
        stream.peer = Some(peer);
        Some(!std::mem::replace(&mut stream.proven, true))
    }

    /// A connection is gone, or was never made. Returns whose it was.
    pub(crate) fn closed(&mut self, socket: SocketId) -> Option<PeerId> {
        self.streams.remove(&socket)?.peer
    }

    /// The peer's packets take this connection now: its others are superfluous soon.
    pub(crate) fn chosen(&mut self, peer: PeerId, socket: SocketId, now: Now) {
        for (other, stream) in self.streams.iter_mut().filter(|(_, s)| s.peer == Some(peer)) {
            stream.closes = (*other != socket).then_some(now + SETTLE);
        }
    }

    /// All connections to a peer, forgotten.
    pub(crate) fn take_all(&mut self, peer: PeerId) -> Vec<SocketId> {
        let theirs: Vec<SocketId> =
            self.streams.iter().filter(|(_, s)| s.peer == Some(peer)).map(|(socket, _)| *socket).collect();
        self.streams.retain(|_, s| s.peer != Some(peer));
        theirs
    }

    /// Connections that are superfluous by now.
    pub(crate) fn superfluous(&self, now: Now) -> Vec<SocketId> {
        self.streams.iter().filter(|(_, s)| s.closes.is_some_and(|at| at <= now)).map(|(socket, _)| *socket).collect()
    }

    /// True: nobody has used the port for long, and it is forgotten.
    pub(crate) fn rests(&mut self, now: Now) -> bool {
        let idle = self.has_port() && self.streams.is_empty() && now.since(self.used) >= LINGER;
        if idle {
            self.port = Port::Closed;
        }
        idle
    }

    /// When something here is due.
    pub(crate) fn next_deadline(&self) -> Option<Now> {
        let waiting = match &self.port {
            Port::Asked(at) => Some(*at + PATIENCE),
            Port::Open { .. } if self.streams.is_empty() => Some(self.used + LINGER),
            Port::Open { .. } | Port::Closed | Port::Failed(_) => None,
        };
        self.streams.values().filter_map(|s| s.closes).chain(waiting).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_port_is_asked_for_once_and_told_while_it_is_fresh() {
        let mut tcp = Tcp::new(Now::ZERO);
        assert_eq!((tcp.prepare(Now::ZERO), tcp.prepare(Now::ZERO)), (Ready::Ask, Ready::Soon));
        tcp.ready(Some(4_000), vec![addr("203.0.113.7:4001")], Now::from_millis(90));
        assert_eq!(tcp.prepare(Now::from_millis(100)), Ready::Yes);
        let local = [LocalAddress { ip: "192.168.1.2".parse().unwrap(), prefix_len: 24 }];
        assert_eq!(tcp.candidates(&local, &[]), [addr("203.0.113.7:4001"), addr("192.168.1.2:4000")]);
        assert_eq!(tcp.prepare(Now::from_millis(30_000)), Ready::Ask, "the NAT may have forgotten it");
        assert_eq!(tcp.prepare(Now::from_millis(31_000)), Ready::Yes, "nobody waits for ever");
        assert!(tcp.failed() && tcp.candidates(&local, &[]).is_empty());
    }

    #[test]
    fn a_strangers_connection_belongs_to_the_first_that_proves_itself() {
        let mut tcp = Tcp::new(Now::ZERO);
        let socket = SocketId(SocketId::FIRST_ACCEPTED);
        assert_eq!(tcp.opened(socket, addr("203.0.113.9:7")), None);
        assert_eq!(tcp.proves(socket, PeerId(3), Now::ZERO), Some(true));
        assert_eq!(tcp.proves(socket, PeerId(3), Now::ZERO), Some(false));
        assert_eq!(tcp.proves(socket, PeerId(4), Now::ZERO), None);
        assert_eq!(tcp.closed(socket), Some(PeerId(3)));
        assert_eq!(tcp.proves(socket, PeerId(3), Now::ZERO), None);
    }

    #[test]
    fn the_chosen_connection_outlives_the_others_and_the_port_the_last_of_them() {
        let mut tcp = Tcp::new(Now::ZERO);
        tcp.ready(Some(4_000), Vec::new(), Now::ZERO);
        let one = tcp.dial(PeerId(1), addr("203.0.113.9:7"), Now::ZERO).unwrap();
        let two = tcp.dial(PeerId(1), addr("203.0.113.9:8"), Now::ZERO).unwrap();
        assert_eq!(tcp.dial(PeerId(1), addr("203.0.113.9:8"), Now::ZERO), None, "it is being made");
        tcp.chosen(PeerId(1), two, Now::ZERO);
        assert_eq!(tcp.next_deadline(), Some(Now::from_millis(1_000)));
        assert_eq!(tcp.superfluous(Now::from_millis(1_000)), [one]);
        assert!(!tcp.rests(Now::from_millis(1_000_000)));
        tcp.closed(one);
        tcp.closed(two);
        assert!(!tcp.rests(Now::from_millis(179_000)) && tcp.rests(Now::from_millis(180_000)));
    }

    #[test]
    fn few_connections_are_made_at_once() {
        let mut tcp = Tcp::new(Now::ZERO);
        let dial =
            |tcp: &mut Tcp, port: u16| tcp.dial(PeerId(1), SocketAddr::from(([203, 0, 113, 9], port)), Now::ZERO);
        let made = (1..=100).filter_map(|port| dial(&mut tcp, port)).count();
        assert_eq!(made, MOST_DIALS);
    }
}

//! The addresses of the peer, and what each showed.

use super::*;

/// Addresses of one peer tried at once: its candidates and those learned from its probes.
const MAX_REMOTES: usize = 24;

#[derive(Debug)]
pub(super) struct Remote {
    pub(super) leg: Leg,
    /// On a network this machine is attached to: probed first, preferred.
    pub(super) near: bool,
    /// Lets everybody in, as far as the peer knows.
    pub(super) open: bool,
    /// The peer's probes come from here.
    pub(super) heard: bool,
    /// How often in a row it was better than the path in use, and when to measure again.
    pub(super) wins: u8,
    pub(super) review: Option<Now>,
    pub(super) rtt: Option<Duration>,
    pub(super) last_sent: Option<Now>,
    pub(super) last_pong: Option<Now>,
    /// Our probe of data size came back, and how long it was.
    pub(super) proven: Option<Now>,
    pub(super) size: u16,
    pub(super) last_full: Option<Now>,
    pub(super) full_tries: u8,
    /// A triggered check that had to wait.
    pub(super) check: Option<Now>,
}

impl PathAgent {
    /// By what a way was found that is about to be used.
    pub(super) fn how(&self, leg: Leg) -> How {
        let remote = self.remotes.iter().find(|r| r.leg == leg);
        match remote {
            _ if leg.socket.is_stream() => How::Tcp,
            Some(r) if r.near => How::SameNetwork,
            Some(r) if r.open => How::OpenAddress,
            _ if self.heavy => How::ManyPorts,
            _ if leg != Leg::main(leg.remote) => How::FreshPort,
            _ => How::Punch,
        }
    }

    /// A fresh port for this round, or none. What is learned from now on is probed from it.
    pub(crate) fn use_fresh_port(&mut self, socket: Option<SocketId>) {
        self.fresh = socket.map_or(Fresh::No, Fresh::Yes);
        if let Some(socket) = socket {
            let current = self.current.map(|c| c.leg);
            for remote in &mut self.remotes {
                let idle = remote.last_pong.is_none() && Some(remote.leg) != current;
                if idle && !remote.near && remote.leg.remote.is_ipv4() {
                    remote.leg.socket = socket;
                }
            }
        }
    }

    /// The peer sent its candidates (already filtered).
    pub(crate) fn heard_candidates(&mut self, candidates: &[Offer], theirs: NatView) {
        self.theirs = theirs;
        let current = self.current.map(|c| c.leg);
        // The newest list replaces older ones; what has answered lately stays, and what may be about to: an address that the
        // peer does not know of itself, but its probes come from.
        let Self { remotes, in_flight, .. } = self;
        remotes.retain(|r| {
            let asked = r.heard && in_flight.iter().any(|p| p.to == r.leg);
            let offered = || candidates.iter().any(|c| c.addr == r.leg.remote);
            let known = r.last_pong.is_some() || r.leg.socket.is_stream();
            Some(r.leg) == current || known || asked || offered()
        });
        for offer in candidates {
            let leg = self.leg_to(offer.addr, offer.near);
            self.learn(leg, offer.near);
            if let Some(remote) = self.remote_mut(leg) {
                remote.open = offer.open;
            }
        }
    }

    /// From the socket of this round; on our own networks from the main one, which needs no NAT.
    pub(super) fn leg_to(&self, addr: SocketAddr, near: bool) -> Leg {
        match self.fresh {
            Fresh::Yes(socket) if !near && addr.is_ipv4() => Leg { socket, remote: addr },
            Fresh::Yes(_) | Fresh::Wanted | Fresh::No => Leg::main(addr),
        }
    }

    /// These sockets are closed.
    pub(crate) fn forget_sockets(&mut self, closed: &[SocketId]) {
        self.remotes.retain(|r| !closed.contains(&r.leg.socket));
        self.in_flight.retain(|p| !closed.contains(&p.to.socket));
    }

    /// Remembers an address; false if there is no room.
    pub(super) fn learn(&mut self, leg: Leg, near: bool) -> bool {
        if self.remotes.iter().any(|r| r.leg == leg) {
            return true;
        }
        if self.remotes.len() >= MAX_REMOTES {
            let current = self.current.map(|c| c.leg);
            let Some(spare) = self.remotes.iter().position(|r| r.last_pong.is_none() && Some(r.leg) != current) else {
                return false;
            };
            self.remotes.remove(spare);
        }
        self.remotes.push(Remote {
            leg,
            near,
            open: false,
            heard: false,
            wins: 0,
            review: None,
            rtt: None,
            last_sent: None,
            last_pong: None,
            proven: None,
            size: BASE,
            last_full: None,
            full_tries: 0,
            check: None,
        });
        true
    }

    pub(super) fn remote_mut(&mut self, leg: Leg) -> Option<&mut Remote> {
        self.remotes.iter_mut().find(|r| r.leg == leg)
    }
}

impl Remote {
    /// It answered a small probe lately, but none of data size yet.
    pub(super) fn wants_confirmation(&self, now: Now) -> bool {
        self.proven.is_none()
            && self.full_tries < CONFIRM_TRIES
            && self.last_pong.is_some_and(|at| now.since(at) < PROBE_LIFETIME)
    }

    pub(super) fn next_confirmation(&self) -> Now {
        self.last_full.map_or(Now::ZERO, |at| at + CONFIRM_GAP)
    }

    pub(super) fn forget(&mut self) {
        self.proven = None;
        self.last_pong = None;
        self.full_tries = 0;
    }
}

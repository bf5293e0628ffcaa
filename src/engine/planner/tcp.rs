//! Direct connections by TCP, the planner's side: asks the shell for the port, has connections made when a round says go, and
//! tells path agents which there are. What is decided when is in `engine/path/tcp.rs`.

use std::net::SocketAddr;

use crate::engine::drops::Drop;
use crate::engine::io::{Output, Path, PeerId, SocketId, TcpOrder};
use crate::engine::path::Leg;
use crate::engine::path::reason::NatView;
use crate::engine::path::tcp::{Ready, is_wanted};
use crate::engine::planner::limits::Trouble;
use crate::engine::planner::{Planner, Why};

impl Planner {
    /// Whether the pair should have a TCP connection.
    pub(super) fn wants_tcp(&self, theirs: &NatView) -> bool {
        self.politeness.limits.tcp && is_wanted(&self.nat, theirs)
    }

    fn wants_tcp_to(&self, id: PeerId) -> bool {
        self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| self.wants_tcp(&t.agent.theirs))
    }

    /// Whether the peer's call or answer waits for the TCP port; begins to ask for it.
    pub(super) fn awaits_tcp(&mut self, id: PeerId) -> bool {
        if !self.wants_tcp_to(id) {
            return false;
        }
        let ready = self.tcp.prepare(self.now);
        if ready == Ready::Ask {
            self.outputs.push_back(Output::Tcp(TcpOrder::Gather));
        }
        self.schedule_tcp();
        if ready == Ready::Yes {
            return false;
        }
        self.awaiting_tcp.insert(id);
        true
    }

    /// What goes into a call or an answer.
    pub(super) fn tcp_candidates_for(&self, id: PeerId) -> Vec<SocketAddr> {
        if self.wants_tcp_to(id) { self.tcp.candidates(&self.addresses, &self.mesh) } else { Vec::new() }
    }

    /// The shell listens, or cannot.
    pub(super) fn tcp_ready(&mut self, port: Option<u16>, seen: Vec<SocketAddr>) {
        self.tcp.ready(port, seen, self.now);
        self.stop_awaiting_tcp();
        self.schedule_tcp();
    }

    fn stop_awaiting_tcp(&mut self) {
        for id in std::mem::take(&mut self.awaiting_tcp) {
            self.advance_path(id);
        }
    }

    /// The peer has no UDP, as its answer says, and was called without a TCP address of ours: it is called again with one.
    pub(super) fn must_call_again(&self, id: PeerId) -> bool {
        let told = self.peer(id).and_then(|p| p.talk.as_deref()).is_some_and(|t| t.told_tcp);
        !told && !self.tcp.failed() && self.wants_tcp_to(id)
    }

    /// The round says go: connect to where the peer may be, from the port it was told.
    pub(super) fn dial_tcp(&mut self, id: PeerId) {
        if !self.wants_tcp_to(id) || !self.tcp.has_port() {
            return;
        }
        let now = self.now;
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
        if talk.agent.direct().is_some() {
            return;
        }
        let mut strangers = 0;
        for to in talk.tcp.clone() {
            // Nobody vouches for it: one attempt a round, whose SYNs the kernel repeats after seconds.
            if !self.is_vouched(id, to.ip()) {
                strangers += 1;
                if strangers > 1 || !self.politeness.may_trouble(to.ip(), Trouble::Probe, now) {
                    self.drops.count(Drop::Polite);
                    continue;
                }
            }
            if let Some(socket) = self.tcp.dial(id, to, now) {
                self.politeness.sent(Leg { socket, remote: to }, now);
                self.outputs.push_back(Output::Tcp(TcpOrder::Dial { socket, to }));
            }
        }
        self.schedule_tcp();
    }

    /// A connection is there.
    pub(super) fn stream_opened(&mut self, socket: SocketId, remote: SocketAddr) {
        if let Some(id) = self.tcp.opened(socket, remote) {
            let leg = Leg { socket, remote };
            self.with_agent(id, |agent, near, cx| agent.stream_opened(leg, near(&remote), cx));
        }
        self.schedule_tcp();
    }

    /// A connection is gone, or could not be made.
    pub(super) fn stream_closed(&mut self, socket: SocketId) {
        if let Some(id) = self.tcp.closed(socket) {
            self.with_agent(id, |agent, _, cx| agent.stream_closed(socket, cx));
        }
        self.schedule_tcp();
    }

    /// A probe of the peer, or its answer to one of ours, came this way. False: on a connection that is not the peer's.
    pub(super) fn may_come_by(&mut self, id: PeerId, socket: SocketId) -> bool {
        if !socket.is_stream() {
            return true;
        }
        match self.tcp.proves(socket, id, self.now) {
            None => false,
            Some(false) => true,
            Some(true) => {
                self.outputs.push_back(Output::Tcp(TcpOrder::Trust(socket)));
                true
            }
        }
    }

    /// The peer's packets go another way now than before.
    pub(super) fn tcp_path_changed(&mut self, id: PeerId, was: &Path, is: &Path) {
        let stream = |path: &Path| Leg::of_path(path).map(|leg| leg.socket).filter(|socket| socket.is_stream());
        match (stream(was), stream(is)) {
            // One side closes what is superfluous, so that no connection is closed that the other side has chosen.
            (_, Some(chosen)) if self.wins_ties(id) => self.tcp.chosen(id, chosen, self.now),
            // It fell silent. What the kernel still has of it would come far too late.
            (Some(lost), None) if Leg::of_path(is).is_none() => self.close_streams(vec![lost]),
            _ => {}
        }
        self.schedule_tcp();
    }

    /// Ends all connections to the peer.
    pub(super) fn forget_streams(&mut self, id: PeerId) {
        self.awaiting_tcp.remove(&id);
        let streams = self.tcp.take_all(id);
        if !streams.is_empty() {
            self.outputs.push_back(Output::Tcp(TcpOrder::Close(streams)));
        }
    }

    fn close_streams(&mut self, streams: Vec<SocketId>) {
        if streams.is_empty() {
            return;
        }
        for socket in &streams {
            if let Some(id) = self.tcp.closed(*socket) {
                self.with_agent(id, |agent, _, cx| agent.stream_closed(*socket, cx));
            }
        }
        self.outputs.push_back(Output::Tcp(TcpOrder::Close(streams)));
    }

    /// Something of it is due.
    pub(super) fn tcp_due(&mut self) {
        self.close_streams(self.tcp.superfluous(self.now));
        // Those that waited long enough go on without a port.
        self.stop_awaiting_tcp();
        if self.tcp.rests(self.now) {
            self.outputs.push_back(Output::Tcp(TcpOrder::Stop));
        }
        self.schedule_tcp();
    }

    fn schedule_tcp(&mut self) {
        let soonest = self.now + std::time::Duration::from_millis(1);
        let next = self.tcp.next_deadline().map(|at| at.max(soonest));
        self.timers.set(Why::Tcp, next);
    }

    fn wins_ties(&self, id: PeerId) -> bool {
        self.peer(id).is_some_and(|p| self.me.wg < p.wg)
    }
}

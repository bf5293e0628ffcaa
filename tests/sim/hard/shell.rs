//! What the shell does for punches: opens and closes sockets, and runs the NAT check on sockets of its own.

use std::net::SocketAddr;

use meshd::engine::io::{Input, SocketId};
use meshd::engine::netcheck::{Netcheck, SocketSlot};

use crate::sim::{Event, Extra, Life, Sim};

impl Sim {
    /// Opens what is asked for, each on a fresh port.
    pub(crate) fn open_sockets(&mut self, life: Life, sockets: &[SocketId]) -> Vec<SocketId> {
        for socket in sockets {
            let port = self.free_port(life);
            self.node_mut(life).extra.insert(port, Extra::Data(*socket));
        }
        let node = self.node_mut(life);
        let open = node.extra.values().filter(|e| matches!(e, Extra::Data(_))).count();
        node.most_extra = node.most_extra.max(open);
        sockets.to_vec()
    }

    /// Begins the check, or goes on with it.
    pub(crate) fn check_due(&mut self, life: Life, servers: Option<Vec<SocketAddr>>) {
        if !self.is_current(life) {
            return;
        }
        let now = self.now();
        let addresses = self.world.addresses(self.node(Self::node_of(life)).host).to_vec();
        let node = self.node_mut(life);
        match (servers, &mut node.check) {
            (Some(servers), None) => {
                let mut check = Box::new(Netcheck::new(servers, now.0, now));
                check.set_local_addresses(addresses);
                node.check = Some(check);
            }
            (_, Some(check)) => check.handle_timeout(now),
            (None, None) => return,
        }
        self.carry_on(life);
    }

    /// Something arrived on a socket of the check.
    pub(crate) fn check_heard(&mut self, life: Life, slot: SocketSlot, from: SocketAddr, bytes: &[u8]) {
        let now = self.now();
        if let Some(check) = &mut self.node_mut(life).check {
            check.handle_datagram(slot, from, bytes, now);
        }
        self.carry_on(life);
    }

    fn carry_on(&mut self, life: Life) {
        while let Some((slot, to, bytes)) = self.node_mut(life).check.as_mut().and_then(|c| c.poll_transmit()) {
            let open = self.node_mut(life).extra.iter().find(|(_, e)| **e == Extra::Check(slot)).map(|(port, _)| *port);
            let port = open.unwrap_or_else(|| self.free_port(life));
            let node = self.node_mut(life);
            node.extra.insert(port, Extra::Check(slot));
            if let Some(check) = &mut node.check {
                check.set_local_port(slot, port);
            }
            self.carry_out_check(life, port, to, bytes);
        }
        let node = self.node_mut(life);
        let Some(check) = &node.check else { return };
        match check.poll_timeout() {
            Some(at) => self.world.at(at, Event::Check(life, None)),
            None => {
                let report = Box::new(check.finish());
                node.check = None;
                node.report = Some(report.clone());
                node.extra.retain(|_, e| matches!(e, Extra::Data(_)));
                self.input(Self::node_of(life), Input::NetReport(report));
            }
        }
    }
}

//! A stream of data through the tunnel as a kernel's TCP sends it: a window of full segments, acknowledgements, and
//! retransmission after a silence that doubles. No congestion control: what is measured is how long nothing arrives.

use std::net::IpAddr;
use std::time::Duration;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use meshd::time::Now;

use crate::sim::{NodeRef, Sim};

/// How often the two kernels look at what came.
const TURN: Duration = Duration::from_millis(2);
/// Segments under way at most.
const WINDOW: u32 = 8;
/// Linux's least: TCP_RTO_MIN.
const TIMEOUT: Duration = Duration::from_millis(200);
const PORTS: (u16, u16) = (40_000, 5_001);

pub(crate) struct Stream {
    from: NodeRef,
    to: NodeRef,
    v6: bool,
    /// Payload of a segment.
    mss: u32,
    /// Bytes sent, acknowledged, and received in order.
    sent: u32,
    acknowledged: u32,
    pub(crate) received: u32,
    /// When the sender's patience ends, and how long it is.
    timeout: Now,
    patience: Duration,
    /// Packets looked at, at either end.
    seen: [usize; 2],
    /// When the last byte arrived.
    last: Now,
    /// The longest time in which nothing did.
    pub(crate) longest_stall: Duration,
    /// The longest packet that arrived.
    pub(crate) longest_packet: usize,
}

impl Stream {
    /// A connection that is open. Its segments fill packets of the sender's interface.
    pub(crate) fn new(sim: &Sim, from: NodeRef, to: NodeRef, v6: bool) -> Self {
        let mtu = u32::from(sim.machines(from).interface_mtu.min(sim.machines(to).interface_mtu));
        let now = sim.now();
        Self {
            from,
            to,
            v6,
            mss: mtu - if v6 { 60 } else { 40 },
            sent: 0,
            acknowledged: 0,
            received: 0,
            timeout: now + TIMEOUT,
            patience: TIMEOUT,
            seen: [sim.node(from).received.len(), sim.node(to).received.len()],
            last: now,
            longest_stall: Duration::ZERO,
            longest_packet: 0,
        }
    }

    /// Sends for so long.
    pub(crate) fn run(&mut self, sim: &mut Sim, time: Duration) {
        let end = sim.now() + time;
        // Whatever it waited for meanwhile.
        (self.last, self.timeout) = (sim.now(), sim.now() + self.patience);
        while sim.now() < end {
            self.receiver(sim);
            self.sender(sim);
            sim.run_for(TURN);
        }
        self.longest_stall = self.longest_stall.max(sim.now().since(self.last));
    }

    fn receiver(&mut self, sim: &mut Sim) {
        let news: Vec<_> = sim.node(self.to).received[self.seen[1]..].to_vec();
        self.seen[1] += news.len();
        let mut any = false;
        for (at, packet) in news {
            let Some((sequence, _, len)) = self.read(&packet, PORTS) else { continue };
            any = true;
            let end = sequence + len;
            if sequence <= self.received && end > self.received {
                self.received = end;
                self.longest_stall = self.longest_stall.max(at.since(self.last));
                self.last = self.last.max(at);
                self.longest_packet = self.longest_packet.max(packet.len());
            }
        }
        if any {
            let packet = self.packet(sim, false, 1, self.received, 0);
            sim.kernel_sends(self.to, packet);
        }
    }

    fn sender(&mut self, sim: &mut Sim) {
        let news: Vec<_> = sim.node(self.from).received[self.seen[0]..].to_vec();
        self.seen[0] += news.len();
        let now = sim.now();
        for (_, packet) in news {
            let Some((_, acknowledged, _)) = self.read(&packet, (PORTS.1, PORTS.0)) else { continue };
            if acknowledged > self.acknowledged {
                self.acknowledged = acknowledged;
                self.sent = self.sent.max(acknowledged);
                self.patience = TIMEOUT;
                self.timeout = now + TIMEOUT;
            }
        }
        if now >= self.timeout {
            // Begin again with one segment.
            self.sent = self.acknowledged;
            self.patience *= 2;
            self.timeout = now + self.patience;
            self.segment(sim);
        } else if self.patience == TIMEOUT {
            while self.sent < self.acknowledged + WINDOW * self.mss {
                self.segment(sim);
            }
        }
    }

    fn segment(&mut self, sim: &mut Sim) {
        let packet = self.packet(sim, true, self.sent, 1, self.mss as usize);
        self.sent += self.mss;
        sim.kernel_sends(self.from, packet);
    }

    fn packet(&self, sim: &Sim, there: bool, sequence: u32, acknowledged: u32, len: usize) -> Vec<u8> {
        let (from, to) = if there { (self.from, self.to) } else { (self.to, self.from) };
        let (from, to) = (sim.node(from), sim.node(to));
        let ports = if there { PORTS } else { (PORTS.1, PORTS.0) };
        let ip = match (self.v6, from.v4, to.v4, from.v6, to.v6) {
            (false, IpAddr::V4(from), IpAddr::V4(to), ..) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
            (true, _, _, IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
            other => panic!("{other:?}"),
        };
        let mut out = Vec::new();
        ip.tcp(ports.0, ports.1, sequence, 65_000).ack(acknowledged).write(&mut out, &vec![b's'; len]).unwrap();
        out
    }

    /// Sequence number, acknowledgement and length of a segment of this connection, whose checksum is right.
    fn read(&self, packet: &[u8], ports: (u16, u16)) -> Option<(u32, u32, u32)> {
        let sliced = SlicedPacket::from_ip(packet).ok()?;
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
        let sum = match sliced.net? {
            NetSlice::Ipv4(ip) if !self.v6 => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
            NetSlice::Ipv6(ip) if self.v6 => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
            _ => return None,
        };
        assert_eq!(sum.unwrap(), tcp.checksum(), "the checksum is right");
        let len = u32::try_from(tcp.payload().len()).unwrap();
        ((tcp.source_port(), tcp.destination_port()) == ports)
            .then(|| (tcp.sequence_number(), tcp.acknowledgment_number(), len))
    }
}

//! What kind of NAT is in front of this machine: the tests of RFC 5780, section 4, as a pure machine.
//!
//! The shell opens fresh sockets, one for each [`SocketSlot`] the machine sends on. Mapping tests (section 4.3) ask
//! several addresses from one socket and compare what they saw. Filtering tests (section 4.4) use another socket, which
//! never sends to any address but one, and ask that server to answer from elsewhere. Servers that have only one address,
//! or cannot answer from elsewhere, leave some questions open; the report then says null and why.
//!
//! A NAT that maps independently of the destination is also asked whether it hairpins (RFC 4787, section 6). Of one that does
//! not, two bursts of eight sockets show how it chooses ports ([`crate::engine::path::ports`]).
//!
//! Everything is over within [`LIMIT`]. The contract is that of all machines: after each `handle_*` drain
//! `poll_transmit`, then ask `poll_timeout`; None means done.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::engine::path::ports::{self, Sample};
use crate::engine::path::technique::sockets_for;
use crate::time::Now;
use crate::wire::local::{self, NetcheckServer};
use crate::wire::nat::PortModel;
use crate::wire::probe::Role;
use crate::wire::stun::{self, BindingResponse, Change, StunError, TransactionId};

mod meaning;
mod report;
#[cfg(test)]
mod tests;

/// The longest a check takes: two rounds of questions, then two bursts.
pub const LIMIT: Duration = Duration::from_millis(3500);
/// The most servers asked.
pub const MAX_SERVERS: usize = 8;
/// A question is sent at these times after the first, until answered.
const SENDS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(250), Duration::from_millis(750)];
/// And given up at this time.
const PATIENCE: Duration = Duration::from_millis(1250);
/// The same for the questions of a burst and for the hairpin test.
const SHORT_PATIENCE: Duration = Duration::from_millis(700);
/// Sockets in a burst, each asked for once.
const BURST: u8 = 8;
/// Between the bursts: long enough to see what others do meanwhile.
const BURST_GAP: Duration = Duration::from_millis(200);

/// One of the sockets the shell opens for a check, each on a fresh port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketSlot {
    /// IPv4, sends to many addresses.
    MappingV4,
    /// IPv4, sends to one address only.
    FilteringV4,
    /// IPv6, sends to many addresses.
    MappingV6,
    /// IPv6, sends to one address only.
    FilteringV6,
    /// IPv4, one of the sockets that show how ports are chosen. Sends to one address only.
    Burst(u8),
}

impl SocketSlot {
    /// True for the slots that need an IPv4 socket.
    #[must_use]
    pub const fn is_ipv4(self) -> bool {
        matches!(self, Self::MappingV4 | Self::FilteringV4 | Self::Burst(_))
    }

    const fn mapping(server: &SocketAddr) -> Self {
        if server.is_ipv4() { Self::MappingV4 } else { Self::MappingV6 }
    }

    const fn filtering(server: &SocketAddr) -> Self {
        if server.is_ipv4() { Self::FilteringV4 } else { Self::FilteringV6 }
    }
}

/// Routers asked for [`nat_depth`].
pub const HOPS: u8 = 4;

/// How many of the routers next to this machine are NATs, if `hops` are the addresses under which they answer, the nearest
/// first: all up to the first with a public address. None: one of them is silent, so that there is no saying.
#[must_use]
pub fn nat_depth(hops: &[Option<Ipv4Addr>]) -> Option<u8> {
    let inside = |ip: &Ipv4Addr| ip.is_private() || is_shared(ip);
    let private = hops.iter().take_while(|hop| hop.as_ref().is_some_and(inside)).count();
    hops.get(private)?.and(u8::try_from(private).ok())
}

/// RFC 6598: between a carrier and its customers.
const fn is_shared(ip: &Ipv4Addr) -> bool {
    ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64
}

/// RFC 4787's three behaviours, for mapping (section 4.1) and filtering (section 5) alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Behaviour {
    /// The same for all remote addresses.
    EndpointIndependent,
    /// Depends on the remote address.
    AddressDependent,
    /// Depends on the remote address and port.
    AddressAndPortDependent,
}

impl Behaviour {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressDependent => "address-dependent",
            Self::AddressAndPortDependent => "address-and-port-dependent",
        }
    }
}

/// One check.
#[derive(Debug)]
pub struct Netcheck {
    servers: Vec<SocketAddr>,
    rng: StdRng,
    questions: Vec<Question>,
    outbox: VecDeque<(SocketSlot, SocketAddr, Vec<u8>)>,
    /// Per family (IPv4 first): the server used for the second round, once chosen.
    chosen: [Option<Chosen>; 2],
    local: Vec<IpAddr>,
    local_ports: BTreeMap<SocketSlot, u16>,
    extra_sockets: u16,
    bursts: Option<Bursts>,
    hairpin: Option<Hairpin>,
    now: Now,
}

/// How ports are chosen is being found out.
#[derive(Debug, Clone, Copy)]
struct Bursts {
    server: SocketAddr,
    /// When the second one is due; None: it was sent.
    second: Option<Now>,
}

/// A question to ourselves through the NAT's outside.
#[derive(Debug, Clone, Copy)]
struct Hairpin {
    txid: TransactionId,
    to: SocketAddr,
    began: Now,
    sends: usize,
    seen: bool,
}

/// What the second round works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chosen {
    /// A server with another address and another port.
    Full(SocketAddr),
    /// A server with another port only.
    PortOnly(SocketAddr),
    /// There is no server that could tell more.
    Nothing,
}

#[derive(Debug)]
struct Question {
    slot: SocketSlot,
    to: SocketAddr,
    change: Change,
    asked: Now,
    /// Each repetition has an id of its own, so that round trips are not ambiguous.
    sent: Vec<(TransactionId, Now)>,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Pending,
    Answered {
        response: BindingResponse,
        rtt: Duration,
    },
    /// The server cannot do as asked.
    Unable,
    Silence,
}

impl Question {
    fn next_step(&self) -> Option<Now> {
        let (sends, patience) = self.pace();
        matches!(self.outcome, Outcome::Pending)
            .then(|| self.asked + sends.get(self.sent.len()).copied().unwrap_or(patience))
    }

    const fn pace(&self) -> (&'static [Duration], Duration) {
        match self.slot {
            SocketSlot::Burst(_) => (SENDS.split_at(2).0, SHORT_PATIENCE),
            _ => (&SENDS, PATIENCE),
        }
    }

    const fn answer(&self) -> Option<&BindingResponse> {
        match &self.outcome {
            Outcome::Answered { response, .. } => Some(response),
            Outcome::Pending | Outcome::Unable | Outcome::Silence => None,
        }
    }
}

impl Hairpin {
    /// Sent twice, then waited for.
    fn next_step(&self) -> Option<Now> {
        let times = [Duration::ZERO, SENDS[1], SHORT_PATIENCE];
        times.get(self.sends).filter(|_| !self.seen).map(|after| self.began + *after)
    }
}

impl Netcheck {
    /// Starts a check with these servers, in order of preference; at most [`MAX_SERVERS`] are asked. `seed` must be random:
    /// transaction ids are drawn from it.
    #[must_use]
    pub fn new(servers: Vec<SocketAddr>, seed: u64, now: Now) -> Self {
        let mut distinct: Vec<SocketAddr> = Vec::new();
        for server in servers {
            if stun::is_usable(&server) && !distinct.contains(&server) && distinct.len() < MAX_SERVERS {
                distinct.push(server);
            }
        }
        let mut check = Self {
            servers: distinct,
            rng: StdRng::seed_from_u64(seed),
            questions: Vec::new(),
            outbox: VecDeque::new(),
            chosen: [None; 2],
            local: Vec::new(),
            local_ports: BTreeMap::new(),
            extra_sockets: 0,
            bursts: None,
            hairpin: None,
            now,
        };
        for server in check.servers.clone() {
            check.ask(SocketSlot::mapping(&server), server, Change::default());
        }
        check.handle_timeout(now);
        check
    }

    /// The machine's own addresses, so that the report can tell that there is no NAT.
    pub fn set_local_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.local = addresses;
    }

    /// How many sockets the node may open for hard punches ([`crate::engine::planner::Limits`]), so that the report can tell what
    /// comes of them. Optional: none.
    pub const fn set_extra_sockets(&mut self, count: u16) {
        self.extra_sockets = count;
    }

    /// The port a slot's socket is bound to, so that the report can tell that the NAT keeps ports. Optional.
    pub fn set_local_port(&mut self, slot: SocketSlot, port: u16) {
        self.local_ports.insert(slot, port);
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<(SocketSlot, SocketAddr, Vec<u8>)> {
        self.outbox.pop_front()
    }

    /// When to call [`Self::handle_timeout`] at the latest. None: the check is over.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        if !self.outbox.is_empty() {
            return Some(self.now);
        }
        let second_burst = self.bursts.and_then(|b| b.second);
        let hairpin = self.hairpin.as_ref().and_then(Hairpin::next_step);
        self.questions.iter().filter_map(Question::next_step).chain(second_burst).chain(hairpin).min()
    }

    /// True once there is nothing more to wait for.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.poll_timeout().is_none()
    }

    /// Something arrived on a socket of the check. Anything but an answer to a question is ignored.
    pub fn handle_datagram(&mut self, slot: SocketSlot, from: SocketAddr, bytes: &[u8], now: Now) {
        self.now = now;
        if let Some(hairpin) = self.hairpin.as_mut().filter(|h| stun::is_request_with(bytes, &h.txid)) {
            hairpin.seen |= slot == SocketSlot::MappingV4;
            return;
        }
        let decoded = stun::decode_binding_response(bytes);
        let (Ok(BindingResponse { txid, .. }) | Err(StunError::Refused { txid, .. })) = decoded else { return };
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        for question in self.questions.iter_mut().filter(|q| q.slot == slot) {
            let Some((_, sent)) = question.sent.iter().find(|(id, _)| *id == txid) else { continue };
            if !matches!(question.outcome, Outcome::Pending | Outcome::Silence) {
                break;
            }
            let rtt = now.since(*sent);
            let as_asked = Change { ip: from.ip() != question.to.ip(), port: from.port() != question.to.port() };
            match decoded {
                Ok(response) if as_asked == question.change => question.outcome = Outcome::Answered { response, rtt },
                // An old server that does not know the attribute answers as if it was not there.
                Ok(_) | Err(_) if from == question.to => question.outcome = Outcome::Unable,
                Ok(_) | Err(_) => {}
            }
            break;
        }
        self.second_round();
        self.handle_timeout(now);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Now) {
        self.now = now;
        loop {
            for i in 0..self.questions.len() {
                if self.questions[i].next_step().is_some_and(|at| at <= now) {
                    self.step(i);
                }
            }
            let before = self.questions.len();
            self.second_round();
            self.bursts();
            if self.questions.len() == before {
                break;
            }
        }
        self.ask_hairpin();
    }

    fn ask(&mut self, slot: SocketSlot, to: SocketAddr, change: Change) {
        let question = Question { slot, to, change, asked: self.now, sent: Vec::new(), outcome: Outcome::Pending };
        self.questions.push(question);
    }

    /// Sends a question again, or gives it up.
    fn step(&mut self, i: usize) {
        let question = &mut self.questions[i];
        if question.sent.len() == question.pace().0.len() {
            question.outcome = Outcome::Silence;
            return;
        }
        let mut id = [0; 12];
        self.rng.fill_bytes(&mut id);
        let txid = TransactionId(id);
        question.sent.push((txid, self.now));
        self.outbox.push_back((question.slot, question.to, stun::binding_request(&txid, question.change)));
    }

    /// Starts the second round of a family as soon as a server is known that can tell everything, or all have answered
    /// or not.
    fn second_round(&mut self) {
        for ipv4 in [true, false] {
            let family = usize::from(!ipv4);
            if self.chosen[family].is_some() {
                continue;
            }
            let first_round = || self.questions[..self.servers.len()].iter().filter(|q| q.to.is_ipv4() == ipv4);
            let full = first_round().find_map(|q| Some((q.to, full_alternate(q.to, q.answer()?.other?)?)));
            if let Some((server, other)) = full {
                self.chosen[family] = Some(Chosen::Full(server));
                self.ask_mapping(SocketAddr::new(other.ip(), server.port()));
                self.ask_mapping(other);
                self.ask_filtering(server, Change::default());
                self.ask_filtering(server, Change { ip: true, port: true });
                self.ask_filtering(server, Change { ip: false, port: true });
            } else if first_round().all(|q| !matches!(q.outcome, Outcome::Pending)) {
                // The other port of a server with one address: offered by it, or on the list itself.
                let port_only = first_round().filter(|q| q.answer().is_some()).find_map(|q| {
                    let offered = q.answer()?.other.filter(|o| o.ip() == q.to.ip() && o.port() != q.to.port());
                    let listed = self.servers.iter().find(|s| s.ip() == q.to.ip() && s.port() != q.to.port());
                    offered.or_else(|| listed.copied()).map(|other| (q.to, other))
                });
                self.chosen[family] = Some(match port_only {
                    Some((server, other)) => {
                        self.ask_mapping(other);
                        self.ask_filtering(server, Change::default());
                        self.ask_filtering(server, Change { ip: false, port: true });
                        Chosen::PortOnly(server)
                    }
                    None => Chosen::Nothing,
                });
            }
        }
    }

    fn ask_mapping(&mut self, to: SocketAddr) {
        let slot = SocketSlot::mapping(&to);
        if !self.questions.iter().any(|q| q.slot == slot && q.to == to) {
            self.ask(slot, to, Change::default());
        }
    }

    fn ask_filtering(&mut self, to: SocketAddr, change: Change) {
        self.ask(SocketSlot::filtering(&to), to, change);
    }

    /// Once the IPv4 mapping is known to depend on the destination: the bursts, when they are due.
    fn bursts(&mut self) {
        match self.bursts {
            None => {
                let depends = self.mapping(true).is_some_and(|m| m != Behaviour::EndpointIndependent);
                let answers = |q: &&Question| q.to.is_ipv4() && q.answer().is_some();
                if let Some(server) = self.questions.iter().find(answers).map(|q| q.to).filter(|_| depends) {
                    self.bursts = Some(Bursts { server, second: Some(self.now + BURST_GAP) });
                    (0..BURST).for_each(|n| self.ask(SocketSlot::Burst(n), server, Change::default()));
                }
            }
            Some(Bursts { server, second: Some(at) }) if at <= self.now => {
                self.bursts = Some(Bursts { server, second: None });
                (BURST..2 * BURST).for_each(|n| self.ask(SocketSlot::Burst(n), server, Change::default()));
            }
            Some(_) => {}
        }
    }

    /// A NAT that keeps one mapping is asked to let us reach ourselves through it.
    fn ask_hairpin(&mut self) {
        if self.hairpin.is_none() && self.mapping(true) == Some(Behaviour::EndpointIndependent) {
            let mapped = |q: &Question| q.answer().filter(|_| q.slot == SocketSlot::MappingV4).map(|r| r.mapped);
            let own = self.questions.iter().find_map(mapped).filter(|to| !self.local.contains(&to.ip()));
            let mut id = [0; 12];
            self.rng.fill_bytes(&mut id);
            self.hairpin =
                own.map(|to| Hairpin { txid: TransactionId(id), to, began: self.now, sends: 0, seen: false });
        }
        if let Some(hairpin) = self.hairpin.as_mut().filter(|h| h.next_step().is_some_and(|at| at <= self.now)) {
            if hairpin.sends < 2 {
                let question = stun::binding_request(&hairpin.txid, Change::default());
                self.outbox.push_back((SocketSlot::MappingV4, hairpin.to, question));
            }
            hairpin.sends += 1;
        }
    }
}

/// OTHER-ADDRESS, if it can be used to test with: another address and another port, of the same family, and not a
/// private one offered by a server that is not.
fn full_alternate(server: SocketAddr, other: SocketAddr) -> Option<SocketAddr> {
    let fits = other.is_ipv4() == server.is_ipv4() && other.ip() != server.ip() && other.port() != server.port();
    (fits && (is_private(server.ip()) || !is_private(other.ip()))).then_some(other)
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

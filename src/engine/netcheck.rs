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
use std::fmt::Write as _;
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

    /// What was found out, as far as it is known now. Port mapping and the coordinator's round trips are not its business.
    #[must_use]
    pub fn finish(&self) -> local::Netcheck {
        let first_round = &self.questions[..self.servers.len()];
        let mut reflexive: Vec<SocketAddr> = Vec::new();
        let mut servers = Vec::new();
        for question in first_round {
            let mapped = question.answer().map(|r| r.mapped);
            if let Some(mapped) = mapped.filter(|m| !reflexive.contains(m)) {
                reflexive.push(mapped);
            }
            let rtt_ms = match question.outcome {
                Outcome::Answered { rtt, .. } => Some(rtt.as_secs_f64() * 1e3),
                Outcome::Pending | Outcome::Unable | Outcome::Silence => None,
            };
            servers.push(NetcheckServer { server: question.to, rtt_ms, reflexive: mapped });
        }
        let answered = |ipv4: bool| first_round.iter().any(|q| q.to.is_ipv4() == ipv4 && q.answer().is_some());
        let ipv4 = answered(true);
        let ipv6 = answered(false);
        // What a person calls "my NAT" is the IPv4 one; only without IPv4 the report is about IPv6.
        let about_ipv4 = ipv4 || !ipv6;
        let mapping = self.mapping(about_ipv4);
        let filtering = self.filtering(about_ipv4);
        let port_model = if about_ipv4 { self.port_model(mapping) } else { None };
        local::Netcheck {
            schema: 1,
            udp: ipv4 || ipv6,
            mapping: mapping.map(|b| b.name().to_owned()),
            filtering: filtering.map(|b| b.name().to_owned()),
            port_model,
            hairpin: self.hairpin.as_ref().map(|h| h.seen),
            double_nat: self.double_nat(&reflexive),
            nat_depth: None,
            port_mapping: None,
            punching: None,
            port_mapper: None,
            ipv6,
            coordinator_rtt_ms: None,
            relay_rtt_ms: None,
            meaning: self.meaning(ipv4 || ipv6, about_ipv4, &reflexive, mapping, filtering, port_model),
            reflexive,
            servers,
        }
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

    fn port_model(&self, mapping: Option<Behaviour>) -> Option<PortModel> {
        let sample = |q: &Question| {
            let local = self.local_ports.get(&q.slot).copied().unwrap_or(0);
            Some(Sample { local, external: q.answer()?.mapped.port() })
        };
        if mapping? == Behaviour::EndpointIndependent {
            // One mapping tells only whether its port was kept.
            let one = self.questions.iter().filter(|q| q.slot == SocketSlot::MappingV4).find_map(sample)?;
            return (one.local == one.external).then_some(PortModel::Preserving);
        }
        let burst = |numbers: std::ops::Range<u8>| -> Vec<Sample> {
            let of_burst = |q: &&Question| matches!(q.slot, SocketSlot::Burst(n) if numbers.contains(&n));
            self.questions.iter().filter(of_burst).filter_map(sample).collect()
        };
        ports::classify(&burst(0..BURST), &burst(BURST..2 * BURST), BURST_GAP)
    }

    /// True: the address "outside" is itself a carrier's (RFC 6598), so there is another NAT behind.
    fn double_nat(&self, reflexive: &[SocketAddr]) -> Option<bool> {
        let shared = |ip: &IpAddr| matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64);
        let translated = reflexive.iter().any(|r| r.is_ipv4() && !self.local.contains(&r.ip()));
        (translated && self.local.iter().any(shared)).then_some(true)
    }

    /// RFC 5780, section 4.3, from whatever was asked on the mapping socket.
    fn mapping(&self, ipv4: bool) -> Option<Behaviour> {
        let seen: Vec<(SocketAddr, SocketAddr)> = self
            .questions
            .iter()
            .filter(|q| matches!(q.slot, SocketSlot::MappingV4 | SocketSlot::MappingV6) && q.to.is_ipv4() == ipv4)
            .filter_map(|q| Some((q.to, q.answer()?.mapped)))
            .collect();
        let pairs = || seen.iter().enumerate().flat_map(|(i, a)| seen[i + 1..].iter().map(move |b| (a, b)));
        let same_ip = |a: &SocketAddr, b: &SocketAddr| a.ip() == b.ip();
        if pairs().all(|(a, b)| a.1 == b.1) {
            // One address asked on two ports says nothing about other addresses.
            return pairs().any(|(a, b)| !same_ip(&a.0, &b.0)).then_some(Behaviour::EndpointIndependent);
        }
        let one_ip_two_ports = || pairs().filter(|(a, b)| same_ip(&a.0, &b.0));
        if one_ip_two_ports().next().is_some() && one_ip_two_ports().all(|(a, b)| a.1 == b.1) {
            return Some(Behaviour::AddressDependent);
        }
        // Known to depend on the port too, or not known: then the worse.
        Some(Behaviour::AddressAndPortDependent)
    }

    /// RFC 5780, section 4.4.
    fn filtering(&self, ipv4: bool) -> Option<Behaviour> {
        let outcome = |change: Change| {
            let mut asked = self.questions.iter().filter(|q| {
                matches!(q.slot, SocketSlot::FilteringV4 | SocketSlot::FilteringV6) && q.to.is_ipv4() == ipv4
            });
            asked.find(|q| q.change == change).map(|q| q.outcome)
        };
        // Silence says something only if the plain question was answered.
        let Some(Outcome::Answered { .. }) = outcome(Change::default()) else { return None };
        let other_port = outcome(Change { ip: false, port: true });
        match (outcome(Change { ip: true, port: true }), other_port) {
            (Some(Outcome::Answered { .. }), _) => Some(Behaviour::EndpointIndependent),
            (Some(Outcome::Silence), Some(Outcome::Answered { .. })) => Some(Behaviour::AddressDependent),
            (_, Some(Outcome::Silence)) => Some(Behaviour::AddressAndPortDependent),
            (_, _) => None,
        }
    }

    fn meaning(
        &self,
        udp: bool,
        ipv4: bool,
        reflexive: &[SocketAddr],
        mapping: Option<Behaviour>,
        filtering: Option<Behaviour>,
        port_model: Option<PortModel>,
    ) -> String {
        if self.servers.is_empty() {
            return "No STUN server is known, so nothing can be said about the NAT.".to_owned();
        }
        if !udp {
            return "UDP does not reach any STUN server and come back: all traffic goes through the relay.".to_owned();
        }
        let no_nat = reflexive.iter().any(|r| r.is_ipv4() == ipv4 && self.local.contains(&r.ip()));
        let mut text = match (no_nat, mapping) {
            (true, _) if filtering == Some(Behaviour::EndpointIndependent) => {
                "There is no NAT and no firewall in the way: direct connections work with all peers."
            }
            (true, _) => "There is no NAT: direct connections work with most peers.",
            (false, Some(Behaviour::EndpointIndependent)) if filtering == Some(Behaviour::EndpointIndependent) => {
                "Your NAT keeps one port for all destinations and lets everybody in: direct connections work with all peers."
            }
            (false, Some(Behaviour::EndpointIndependent)) => {
                "Your NAT keeps one port for all destinations: direct connections work with most peers."
            }
            (false, Some(Behaviour::AddressDependent | Behaviour::AddressAndPortDependent))
                if port_model.is_some_and(|model| sockets_for(Role::Opens, Some(model)) <= self.extra_sockets) =>
            {
                match port_model {
                    Some(PortModel::Random) => {
                        "Your NAT uses another port for each destination, drawn at random: direct connections work with \
                         peers whose NAT keeps its port, at the price of up to 2,600 small packets; the others are reached \
                         through the relay."
                    }
                    Some(PortModel::Block { .. }) => {
                        "Your NAT uses another port for each destination, out of a small block: direct connections work \
                         with most peers, at the price of some hundred small packets."
                    }
                    _ => {
                        "Your NAT uses another port for each destination, but in an order that can be foreseen: direct \
                         connections work with most peers."
                    }
                }
            }
            (false, Some(Behaviour::AddressDependent | Behaviour::AddressAndPortDependent)) => {
                "Your NAT uses another port for each destination: direct connections work only with peers whose NAT is \
                 easier, the others are reached through the relay."
            }
            (false, None) => {
                "The servers asked have too few addresses to tell how your NAT chooses ports; peers show whether direct \
                 connections work."
            }
        }
        .to_owned();
        if mapping.is_some_and(|m| m != Behaviour::EndpointIndependent) {
            match port_model {
                Some(PortModel::Sequential { step, per_second }) => {
                    let (way, others) = (if step > 0 { "up" } else { "down" }, per_second);
                    let _ = write!(text, " It counts its ports {way} ({others} connections of others a second).");
                }
                Some(PortModel::Block { low, high }) => {
                    let _ = write!(text, " It takes its ports from about {low} to {high}.");
                }
                Some(PortModel::Random) => text.push_str(" It takes any port."),
                Some(PortModel::Preserving | PortModel::Unknown) | None => {}
            }
        }
        if mapping.is_some() && filtering.is_none() {
            text.push_str(" How it filters is not known: no server could answer from another address.");
        }
        text
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
    use super::*;
    use crate::wire::stun::ServerLayout;

    const ALL: [Behaviour; 3] = [EndpointIndependent, AddressDependent, AddressAndPortDependent];
    const ONE_WAY: Duration = Duration::from_millis(20);

    /// A NAT with one public address. What it keeps is told by how much of the remote address goes into the key.
    struct Nat {
        mapping: Behaviour,
        filtering: Behaviour,
        public: IpAddr,
        ports: BTreeMap<(SocketSlot, Option<IpAddr>, Option<u16>), u16>,
        allowed: Vec<(u16, SocketAddr)>,
        /// The port of the `n`-th mapping.
        choose: fn(u16) -> u16,
        hairpins: bool,
    }

    fn scope(behaviour: Behaviour, remote: SocketAddr) -> (Option<IpAddr>, Option<u16>) {
        match behaviour {
            EndpointIndependent => (None, None),
            AddressDependent => (Some(remote.ip()), None),
            AddressAndPortDependent => (Some(remote.ip()), Some(remote.port())),
        }
    }

    impl Nat {
        fn new(mapping: Behaviour, filtering: Behaviour, public: IpAddr) -> Self {
            let choose = |n| 40_000 + n;
            Self { mapping, filtering, public, ports: BTreeMap::new(), allowed: Vec::new(), choose, hairpins: false }
        }

        fn outbound(&mut self, slot: SocketSlot, to: SocketAddr) -> SocketAddr {
            let (ip, port) = scope(self.mapping, to);
            let next = (self.choose)(u16::try_from(self.ports.len()).unwrap());
            let port = *self.ports.entry((slot, ip, port)).or_insert(next);
            self.allowed.push((port, to));
            SocketAddr::new(self.public, port)
        }

        fn inbound(&self, from: SocketAddr, to: SocketAddr) -> Option<SocketSlot> {
            let open = self.allowed.iter().any(|(port, remote)| {
                *port == to.port() && scope(self.filtering, *remote) == scope(self.filtering, from)
            });
            let owner = self.ports.iter().find(|(_, port)| **port == to.port())?;
            open.then_some(owner.0.0)
        }
    }

    fn run(
        servers: &[SocketAddr],
        layout: &ServerLayout,
        nat: &mut Nat,
        mut lost: impl FnMut(SocketSlot, SocketAddr, &[u8]) -> bool,
    ) -> (local::Netcheck, Duration) {
        let mut now = Now::from_millis(5);
        let start = now;
        let mut check = Netcheck::new(servers.to_vec(), 1, now);
        // When it arrives, at which socket, from where, what.
        let mut network: Vec<(Now, SocketSlot, SocketAddr, Vec<u8>)> = Vec::new();
        loop {
            while let Some((slot, to, bytes)) = check.poll_transmit() {
                let source = nat.outbound(slot, to);
                if let Some(slot) = nat.inbound(source, to).filter(|_| to.ip() == nat.public && nat.hairpins) {
                    network.push((now + Duration::from_millis(1), slot, source, bytes));
                    continue;
                }
                if lost(slot, to, &bytes) || !layout.endpoints.contains(&to) {
                    continue;
                }
                let Some(answer) = stun::answer(&bytes, source, to, layout) else { continue };
                if let Some(slot) = nat.inbound(answer.send_from, source) {
                    network.push((now + ONE_WAY + ONE_WAY, slot, answer.send_from, answer.bytes));
                }
            }
            network.sort_by_key(|(at, ..)| *at);
            let Some(deadline) = check.poll_timeout() else { break };
            match network.first() {
                Some((at, ..)) if *at <= deadline => {
                    let (at, slot, from, bytes) = network.remove(0);
                    now = at;
                    check.handle_datagram(slot, from, &bytes, now);
                }
                _ => {
                    now = deadline;
                    check.handle_timeout(now);
                }
            }
        }
        (check.finish(), now.since(start))
    }

    fn endpoints(list: &[&str]) -> (Vec<SocketAddr>, ServerLayout) {
        let endpoints: Vec<SocketAddr> = list.iter().map(|e| e.parse().unwrap()).collect();
        (endpoints[..1].to_vec(), ServerLayout { endpoints })
    }

    const TWO_BY_TWO: [&str; 4] = ["203.0.113.1:3478", "203.0.113.1:3479", "203.0.113.2:3478", "203.0.113.2:3479"];
    const TWO_BY_TWO_V6: [&str; 4] =
        ["[2001:db8::1]:3478", "[2001:db8::1]:3479", "[2001:db8::2]:3478", "[2001:db8::2]:3479"];

    #[test]
    fn all_nine_kinds_are_told_apart_with_a_full_server_in_both_families() {
        for (list, public) in [(TWO_BY_TWO, "198.51.100.7"), (TWO_BY_TWO_V6, "2001:db8:7::7")] {
            let (servers, layout) = endpoints(&list);
            for mapping in ALL {
                for filtering in ALL {
                    let mut nat = Nat::new(mapping, filtering, public.parse().unwrap());
                    let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
                    assert_eq!(report.mapping.as_deref(), Some(mapping.name()), "{mapping:?} × {filtering:?}");
                    assert_eq!(report.filtering.as_deref(), Some(filtering.name()), "{mapping:?} × {filtering:?}");
                    assert!(report.udp);
                    assert_eq!(report.ipv6, public.contains(':'));
                    assert_eq!(report.reflexive, [format_address(public, 40_000)]);
                    assert_eq!(report.servers[0].rtt_ms, Some(40.0));
                    assert!(took <= LIMIT, "took {took:?}");
                }
            }
        }
    }

    fn format_address(ip: &str, port: u16) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), port)
    }

    #[test]
    fn a_nat_that_maps_by_destination_shows_how_it_chooses_ports() {
        let (servers, layout) = endpoints(&TWO_BY_TWO);
        type Choice = fn(u16) -> u16;
        let choices: [(Choice, &str, &str); 3] = [
            (|n| 40_000 + 2 * n, "sequential", "counts its ports up"),
            (|n| 20_000 + n * 331 % 512, "block", "takes its ports from about"),
            (|n| (n + 3).wrapping_mul(24_593) | 1_024, "random", "takes any port"),
        ];
        for (choose, name, said) in choices {
            for mapping in [AddressDependent, AddressAndPortDependent] {
                let public = "198.51.100.7".parse().unwrap();
                let mut nat = Nat { choose, ..Nat::new(mapping, AddressAndPortDependent, public) };
                let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
                assert_eq!(report.port_model.map(PortModel::name), Some(name), "{report:?}");
                assert!(report.meaning.contains(said), "{}", report.meaning);
                assert!(took <= LIMIT, "took {took:?}");
                assert_eq!(nat.ports.keys().filter(|(slot, ..)| matches!(slot, SocketSlot::Burst(_))).count(), 16);
                assert_eq!(report.hairpin, None, "not asked");
            }
        }
    }

    #[test]
    fn what_a_hard_nat_means_depends_on_the_sockets_there_may_be() {
        let mut check = Netcheck::new(vec!["203.0.113.1:3478".parse().unwrap()], 1, Now::ZERO);
        let mut meaning = |sockets, model| {
            check.set_extra_sockets(sockets);
            check.meaning(true, true, &[], Some(AddressAndPortDependent), Some(AddressAndPortDependent), Some(model))
        };
        let counting = PortModel::Sequential { step: 1, per_second: 3 };
        assert!(meaning(0, counting).contains("only with peers whose NAT is easier"));
        assert!(meaning(8, counting).contains("can be foreseen"));
        assert!(meaning(8, PortModel::Random).contains("only with peers whose NAT is easier"));
        assert!(meaning(256, PortModel::Random).contains("drawn at random"));
        assert!(meaning(32, PortModel::Block { low: 1, high: 9 }).contains("small block"));
    }

    #[test]
    fn nats_are_counted_up_to_the_first_public_router() {
        let depth = |hops: &[&str]| nat_depth(&hops.iter().map(|hop| hop.parse().ok()).collect::<Vec<_>>());
        assert_eq!(depth(&["192.168.1.1", "203.0.113.1", "10.0.0.1", ""]), Some(1));
        assert_eq!(depth(&["192.168.1.1", "100.64.0.1", "203.0.113.1"]), Some(2));
        assert_eq!(depth(&["203.0.113.1"]), Some(0));
        for silent in [&["192.168.1.1", "", "203.0.113.1"][..], &["", "203.0.113.1"], &["10.0.0.1", "10.0.0.2"], &[]] {
            assert_eq!(depth(silent), None, "{silent:?}");
        }
    }

    #[test]
    fn hairpinning_is_seen_and_its_absence_too() {
        let (servers, layout) = endpoints(&TWO_BY_TWO);
        for hairpins in [true, false] {
            for filtering in ALL {
                let public = "198.51.100.7".parse().unwrap();
                let mut nat = Nat { hairpins, ..Nat::new(EndpointIndependent, filtering, public) };
                let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
                assert_eq!(report.hairpin, Some(hairpins), "{filtering:?}");
                assert_eq!(report.port_model, None, "its sockets' own ports are not known");
                assert!(took <= LIMIT);
            }
        }
    }

    #[test]
    fn a_kept_port_and_a_carrier_s_address_are_seen() {
        let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
        let other: SocketAddr = "192.0.2.9:3478".parse().unwrap();
        let mut check = Netcheck::new(vec![server, other], 1, Now::ZERO);
        check.set_local_addresses(vec!["100.64.3.4".parse().unwrap()]);
        check.set_local_port(SocketSlot::MappingV4, 50_000);
        for _ in 0..2 {
            let (slot, to, bytes) = check.poll_transmit().unwrap();
            let seen = "198.51.100.7:50000".parse().unwrap();
            let answer = stun::answer(&bytes, seen, to, &ServerLayout { endpoints: vec![to] }).unwrap();
            check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(10));
        }
        assert_eq!(check.finish().port_model, Some(PortModel::Preserving));
        assert_eq!(check.finish().double_nat, Some(true));
    }

    #[test]
    fn losing_every_question_twice_changes_nothing() {
        let (servers, layout) = endpoints(&TWO_BY_TWO);
        for mapping in ALL {
            for filtering in ALL {
                let mut nat = Nat::new(mapping, filtering, "198.51.100.7".parse().unwrap());
                let mut sent = BTreeMap::new();
                let lost_twice = |slot: SocketSlot, to: SocketAddr, bytes: &[u8]| {
                    let times = sent
                        .entry((slot, to, bytes.get(20..28).map(<[u8]>::to_vec).filter(|_| bytes.len() > 28)))
                        .or_insert(0);
                    *times += 1;
                    *times <= 2
                };
                let (report, took) = run(&servers, &layout, &mut nat, lost_twice);
                assert_eq!(report.mapping.as_deref(), Some(mapping.name()));
                assert_eq!(report.filtering.as_deref(), Some(filtering.name()));
                assert!(took <= LIMIT, "took {took:?}");
            }
        }
    }

    #[test]
    fn one_address_with_two_ports_tells_only_what_it_can() {
        // As the coordinator offers itself: both ports on the list.
        let (_, layout) = endpoints(&["203.0.113.1:3478", "203.0.113.1:3479"]);
        for mapping in ALL {
            for filtering in ALL {
                let mut nat = Nat::new(mapping, filtering, "198.51.100.7".parse().unwrap());
                let (report, _) = run(&layout.endpoints, &layout, &mut nat, |_, _, _| false);
                let port_dependent = mapping == AddressAndPortDependent;
                assert_eq!(report.mapping.as_deref(), port_dependent.then_some(mapping.name()));
                let strict = filtering == AddressAndPortDependent;
                assert_eq!(report.filtering.as_deref(), strict.then_some(filtering.name()));
                assert_eq!(report.meaning.contains("too few addresses"), !port_dependent);
            }
        }
    }

    #[test]
    fn two_servers_without_alternates_tell_the_mapping() {
        let servers: Vec<SocketAddr> = vec!["203.0.113.1:3478".parse().unwrap(), "192.0.2.9:19302".parse().unwrap()];
        for (mapping, expected) in [
            (EndpointIndependent, EndpointIndependent),
            (AddressDependent, AddressAndPortDependent),
            (AddressAndPortDependent, AddressAndPortDependent),
        ] {
            let mut nat = Nat::new(mapping, AddressDependent, "198.51.100.7".parse().unwrap());
            // Each server knows only itself.
            let mut check = Netcheck::new(servers.clone(), 1, Now::ZERO);
            while let Some((slot, to, bytes)) = check.poll_transmit() {
                let source = nat.outbound(slot, to);
                let answer = stun::answer(&bytes, source, to, &ServerLayout { endpoints: vec![to] }).unwrap();
                check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(30));
            }
            while let Some(at) = check.poll_timeout() {
                check.handle_timeout(at);
                while check.poll_transmit().is_some() {}
            }
            let report = check.finish();
            assert_eq!(report.mapping.as_deref(), Some(expected.name()));
            assert_eq!(report.filtering, None);
            assert!(report.meaning.contains("no server could answer from another address"), "{}", report.meaning);
        }
    }

    #[test]
    fn blocked_udp_is_said_in_time() {
        let (servers, layout) = endpoints(&TWO_BY_TWO);
        let mut nat = Nat::new(EndpointIndependent, EndpointIndependent, "198.51.100.7".parse().unwrap());
        let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| true);
        assert!(!report.udp && report.reflexive.is_empty() && report.mapping.is_none());
        assert!(report.meaning.starts_with("UDP does not reach"));
        assert_eq!(took, PATIENCE);
        assert!(Netcheck::new(Vec::new(), 1, Now::ZERO).is_done(), "no server, nothing to wait for");
    }

    #[test]
    fn no_nat_is_recognised() {
        let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
        let me: SocketAddr = "198.51.100.7:50000".parse().unwrap();
        let mut check = Netcheck::new(vec![server], 1, Now::ZERO);
        check.set_local_addresses(vec![me.ip()]);
        let (slot, to, bytes) = check.poll_transmit().unwrap();
        let answer = stun::answer(&bytes, me, to, &ServerLayout { endpoints: vec![to] }).unwrap();
        check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(10));
        assert!(check.finish().meaning.starts_with("There is no NAT"));
    }

    #[test]
    fn answers_from_strangers_and_to_other_questions_do_not_count() {
        let (servers, layout) = endpoints(&TWO_BY_TWO);
        let mut check = Netcheck::new(servers.clone(), 1, Now::ZERO);
        let (slot, to, bytes) = check.poll_transmit().unwrap();
        let me: SocketAddr = "198.51.100.7:50000".parse().unwrap();
        let answer = stun::answer(&bytes, me, to, &layout).unwrap();
        let stranger = "192.0.2.66:3478".parse().unwrap();
        check.handle_datagram(slot, stranger, &answer.bytes, Now::from_millis(10));
        check.handle_datagram(SocketSlot::FilteringV4, to, &answer.bytes, Now::from_millis(10));
        let other = stun::binding_request(&TransactionId([9; 12]), Change::default());
        let unasked = stun::answer(&other, stranger, to, &layout).unwrap();
        check.handle_datagram(slot, to, &unasked.bytes, Now::from_millis(10));
        check.handle_datagram(slot, to, b"junk", Now::from_millis(10));
        assert!(!check.finish().udp);
        check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(40));
        assert_eq!(check.finish().reflexive, [me]);
    }
}

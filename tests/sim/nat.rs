//! NAT and firewall models: RFC 4787 mapping × filtering, expiry, refresh on outbound, hairpin, port choice; and Linux
//! connection tracking, which is none of the nine kinds once it is disturbed.
//!
//! Two properties of real devices are modelled because `docs/reference/nat-matrix.md` depends on them:
//!
//! * A datagram that is let in opens the way back through the same external port, as connection tracking does. Without
//!   it an address-and-port-dependent NAT that lets everybody in could be sent to and never answer.
//! * Linux keeps the inside port only while the tuple (that port, the remote) is free. A stranger's early datagram that
//!   the router's INPUT chain accepts takes the tuple, and our own later flow to that stranger gets another port.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use meshd::time::Now;

use crate::dice::Dice;

/// RFC 4787 section 4.1: which remotes share a mapping. Ordered from kind to unkind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Mapping {
    /// Endpoint-independent.
    Eim,
    /// Address-dependent.
    Adm,
    /// Address- and port-dependent.
    Apdm,
}

/// RFC 4787 section 5: who may send to a mapping. Ordered from kind to unkind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Filtering {
    /// Anybody.
    Eif,
    /// Addresses it was used to.
    Adf,
    /// Addresses and ports it was used to.
    Apdf,
}

/// How an external port is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Ports {
    /// The inside port if it is free, else drawn.
    Keep,
    /// Drawn.
    Random,
    /// One more than the last.
    Sequential,
    /// Drawn from a block of so many.
    Block(u16),
}

/// What stands between a host and the network outside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// Nothing: a host with a public address and no firewall.
    Public,
    /// A NAT that lets no UDP out.
    Blocked,
    /// One of the nine.
    Rfc4787(Rfc4787),
    /// Linux masquerade: connection tracking, ports kept while free, no hairpin.
    Linux {
        /// The router's INPUT chain accepts what nobody asked for (plain Docker, libvirt and lab routers).
        open_input: bool,
        /// `masquerade fully-random`: ports are drawn for every flow, from a block of so many or from all (0).
        draws: Option<u16>,
        /// Flows its table holds; 0: as many as there are.
        table: u16,
    },
}

/// Parameters of one of the nine kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Rfc4787 {
    pub(crate) mapping: Mapping,
    pub(crate) filtering: Filtering,
    pub(crate) ports: Ports,
    /// Inside hosts reach each other at the external address (REQ-9).
    pub(crate) hairpin: bool,
    /// Seconds until an unused mapping is gone.
    pub(crate) lifetime_s: u16,
    /// Mappings that others behind a NAT that counts make in a second.
    pub(crate) foreign: u16,
}

/// RFC 4787 REQ-5: at least two minutes.
const LIFETIME_S: u16 = 120;
/// Linux `nf_conntrack_udp_timeout`.
const LINUX_NEW: Duration = Duration::from_secs(30);
/// Linux `nf_conntrack_udp_timeout_stream`.
const LINUX_STREAM: Duration = Duration::from_secs(120);
/// A Linux flow counts as a stream once it was two-way for this long.
const LINUX_STREAM_AFTER: Duration = Duration::from_secs(2);
/// External ports are drawn from here up.
const FIRST_PORT: u16 = 1_024;
/// Where blocks begin.
const BLOCK_BASE: u16 = 20_000;

impl Kind {
    /// The columns of `research/nat.md` section 2.1, then what completes the nine kinds, then no UDP at all.
    pub(crate) fn all() -> Vec<Self> {
        NAMES.iter().map(|name| name.parse().unwrap_or_else(|e| panic!("{name}: {e}"))).collect()
    }
}

/// The kinds that matrices are made of. The first eleven are the columns of `research/nat.md` section 2.1.
pub(crate) const NAMES: [&str; 13] = [
    "public",
    "eim+eif",
    "eim+adf",
    "eim+apdf",
    "linux",
    "adm+adf",
    "adm+apdf",
    "apdm+apdf+seq",
    "apdm+eif",
    "apdm+adf",
    "apdm+apdf",
    "adm+eif",
    "blocked",
];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Public => f.write_str("public"),
            Self::Blocked => f.write_str("blocked"),
            Self::Linux { open_input, draws, table } => {
                f.write_str(if *open_input { "linux+open" } else { "linux" })?;
                match draws {
                    None => {}
                    Some(0) => f.write_str("+random")?,
                    Some(n) => write!(f, "+block{n}")?,
                }
                if *table == 0 { Ok(()) } else { write!(f, "+table{table}") }
            }
            Self::Rfc4787(kind) => {
                let mapping = match kind.mapping {
                    Mapping::Eim => "eim",
                    Mapping::Adm => "adm",
                    Mapping::Apdm => "apdm",
                };
                let filtering = match kind.filtering {
                    Filtering::Eif => "eif",
                    Filtering::Adf => "adf",
                    Filtering::Apdf => "apdf",
                };
                let ports = match kind.ports {
                    Ports::Keep => "+keep",
                    Ports::Random => "",
                    Ports::Sequential | Ports::Block(_) => "",
                };
                let hairpin = if kind.hairpin { "+hair" } else { "" };
                write!(f, "{mapping}+{filtering}{ports}")?;
                match kind.ports {
                    Ports::Sequential => f.write_str("+seq")?,
                    Ports::Block(n) => write!(f, "+block{n}")?,
                    Ports::Keep | Ports::Random => {}
                }
                f.write_str(hairpin)?;
                if kind.foreign != 0 {
                    write!(f, "+foreign{}", kind.foreign)?;
                }
                if kind.lifetime_s == LIFETIME_S { Ok(()) } else { write!(f, "+life{}", kind.lifetime_s) }
            }
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "public" => return Ok(Self::Public),
            "blocked" => return Ok(Self::Blocked),
            _ => {}
        }
        let mut words = text.split('+');
        if text == "linux" || text.starts_with("linux+") {
            let (mut open_input, mut draws, mut table) = (false, None, 0);
            for word in words.skip(1) {
                let number = |name: &str| word.strip_prefix(name).and_then(|n| n.parse().ok());
                match (word, number("block"), number("table")) {
                    ("open", ..) => open_input = true,
                    ("random", ..) => draws = Some(0),
                    (_, Some(n), _) => draws = Some(n),
                    (_, _, Some(n)) => table = n,
                    _ => return Err(format!("no option {word:?} in {text:?}")),
                }
            }
            return Ok(Self::Linux { open_input, draws, table });
        }
        let mapping = match words.next() {
            Some("eim") => Mapping::Eim,
            Some("adm") => Mapping::Adm,
            Some("apdm") => Mapping::Apdm,
            other => return Err(format!("no mapping {other:?} in {text:?}")),
        };
        let filtering = match words.next() {
            Some("eif") => Filtering::Eif,
            Some("adf") => Filtering::Adf,
            Some("apdf") => Filtering::Apdf,
            other => return Err(format!("no filtering {other:?} in {text:?}")),
        };
        let mut kind = Rfc4787::new(mapping, filtering);
        for word in words {
            match word {
                "keep" => kind.ports = Ports::Keep,
                "seq" => kind.ports = Ports::Sequential,
                "hair" => kind.hairpin = true,
                _ => {
                    let number = |name: &str| word.strip_prefix(name).and_then(|n| n.parse().ok());
                    match (number("life"), number("block"), number("foreign")) {
                        (Some(seconds), ..) => kind.lifetime_s = seconds,
                        (_, Some(ports), _) => kind.ports = Ports::Block(ports),
                        (.., Some(rate)) => kind.foreign = rate,
                        _ => return Err(format!("no option {word:?} in {text:?}")),
                    }
                }
            }
        }
        Ok(Self::Rfc4787(kind))
    }
}

/// One NAT with its state.
#[derive(Debug)]
pub(crate) struct Nat {
    external: IpAddr,
    dice: Dice,
    state: State,
    /// External ports that somebody asked to be forwarded, and to whom.
    forwards: BTreeMap<u16, SocketAddr>,
}

#[derive(Debug)]
enum State {
    Blocked,
    Rfc4787(Rfc4787, Table),
    Linux {
        open_input: bool,
        flows: Flows,
    },
    /// An IPv6 firewall: no translation, lets in what answers.
    Firewall(BTreeMap<(SocketAddr, SocketAddr), Now>),
}

/// How much of the remote a mapping depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Any,
    Address(IpAddr),
    Both(SocketAddr),
}

#[derive(Debug, Default)]
struct Table {
    /// Inside endpoint and remote → external port.
    rows: BTreeMap<(SocketAddr, Key), u16>,
    /// External port → inside endpoint, and when the mapping ends.
    owners: BTreeMap<u16, (SocketAddr, Now)>,
    /// External port and remote it was used to → until when the remote may answer.
    permits: BTreeMap<(u16, SocketAddr), Now>,
    last_port: u16,
    /// When somebody else makes the next mapping.
    foreign_at: Now,
}

#[derive(Debug, Default)]
struct Flows {
    /// Inside endpoint and remote → the flow.
    flows: BTreeMap<(SocketAddr, SocketAddr), Flow>,
    /// External port and remote → whose tuple it is (`None`: the router's own).
    tuples: BTreeMap<(u16, SocketAddr), (Option<SocketAddr>, Now)>,
    /// See [`Kind::Linux`].
    draws: Option<u16>,
    room: u16,
}

#[derive(Debug, Clone, Copy)]
struct Flow {
    port: u16,
    created: Now,
    answered: bool,
}

impl Nat {
    /// A NAT with this external address. `None` for a kind that is no NAT.
    pub(crate) fn new(kind: Kind, external: IpAddr, dice: Dice) -> Option<Self> {
        let state = match kind {
            Kind::Public => return None,
            Kind::Blocked => State::Blocked,
            Kind::Rfc4787(kind) => State::Rfc4787(kind, Table { last_port: 29_999, ..Table::default() }),
            Kind::Linux { open_input, draws, table } => {
                State::Linux { open_input, flows: Flows { draws, room: table, ..Flows::default() } }
            }
        };
        Some(Self { external, dice, state, forwards: BTreeMap::new() })
    }

    /// What the same box does with TCP: the same, from a table of its own. One that lets no UDP out maps TCP as routers do.
    pub(crate) fn for_tcp(&self) -> Self {
        let state = match &self.state {
            State::Blocked => {
                let kind = Rfc4787 { ports: Ports::Keep, ..Rfc4787::new(Mapping::Eim, Filtering::Apdf) };
                State::Rfc4787(kind, Table { last_port: 29_999, ..Table::default() })
            }
            State::Rfc4787(kind, _) => State::Rfc4787(*kind, Table { last_port: 29_999, ..Table::default() }),
            State::Linux { open_input, flows } => {
                let flows = Flows { draws: flows.draws, room: flows.room, ..Flows::default() };
                State::Linux { open_input: *open_input, flows }
            }
            State::Firewall(_) => State::Firewall(BTreeMap::new()),
        };
        Self { external: self.external, dice: self.dice.fork("tcp"), state, forwards: BTreeMap::new() }
    }

    /// A stateful firewall without translation, as in front of IPv6 hosts.
    pub(crate) fn firewall(prefix: IpAddr) -> Self {
        Self {
            external: prefix,
            dice: Dice::new(0),
            state: State::Firewall(BTreeMap::new()),
            forwards: BTreeMap::new(),
        }
    }

    pub(crate) const fn external(&self) -> IpAddr {
        self.external
    }

    /// Grants a port mapping (PCP, NAT-PMP, UPnP, or by hand): where the outside reaches it.
    pub(crate) fn forward(&mut self, inside: SocketAddr) -> SocketAddr {
        self.forwards.insert(inside.port(), inside);
        SocketAddr::new(self.external, inside.port())
    }

    /// Forgets everything, as a reboot does.
    pub(crate) fn reboot(&mut self) {
        self.forwards.clear();
        match &mut self.state {
            State::Blocked => {}
            State::Rfc4787(_, table) => {
                *table = Table { last_port: table.last_port, foreign_at: table.foreign_at, ..Table::default() };
            }
            State::Linux { flows, .. } => *flows = Flows { draws: flows.draws, room: flows.room, ..Flows::default() },
            State::Firewall(permits) => permits.clear(),
        }
    }

    /// A reboot with a new external address.
    pub(crate) fn renumber(&mut self, external: IpAddr) {
        self.reboot();
        self.external = external;
    }

    /// A datagram leaves: its source as the outside sees it, or nothing if it may not leave.
    pub(crate) fn outbound(&mut self, now: Now, inside: SocketAddr, remote: SocketAddr) -> Option<SocketAddr> {
        let port = match &mut self.state {
            State::Blocked => return None,
            State::Rfc4787(kind, table) => table.outbound(kind, now, inside, remote, &mut self.dice),
            State::Linux { flows, .. } => flows.outbound(now, inside, remote, &mut self.dice)?,
            State::Firewall(permits) => {
                permits.insert((inside, remote), now + LINUX_STREAM);
                return Some(inside);
            }
        };
        Some(SocketAddr::new(self.external, port))
    }

    /// A datagram arrives at the outside: the inside endpoint it goes to, or nothing if it is not let in.
    pub(crate) fn inbound(&mut self, now: Now, remote: SocketAddr, external: SocketAddr) -> Option<SocketAddr> {
        if let Some(inside) = self.forwards.get(&external.port()).copied() {
            // The answer leaves by the same port.
            match &mut self.state {
                State::Rfc4787(kind, table) => {
                    table.rows.insert((inside, kind.key(remote)), external.port());
                    table.owners.insert(external.port(), (inside, now + kind.lifetime()));
                    table.permits.insert((external.port(), remote), now + kind.lifetime());
                }
                State::Linux { flows, .. } => {
                    let flow = Flow { port: external.port(), created: now, answered: false };
                    flows.flows.entry((inside, remote)).or_insert(flow);
                    flows.tuples.insert((external.port(), remote), (Some(inside), now + LINUX_NEW));
                }
                State::Blocked | State::Firewall(_) => {}
            }
            return Some(inside);
        }
        match &mut self.state {
            State::Blocked => None,
            State::Rfc4787(kind, table) => table.inbound(kind, now, remote, external.port()),
            State::Linux { open_input, flows } => flows.inbound(*open_input, now, remote, external.port()),
            State::Firewall(permits) => {
                permits.get(&(external, remote)).is_some_and(|end| now < *end).then_some(external)
            }
        }
    }

    /// A datagram from inside to the external address: where it comes back in, and as whose.
    pub(crate) fn hairpin(
        &mut self,
        now: Now,
        inside: SocketAddr,
        external: SocketAddr,
    ) -> Option<(SocketAddr, SocketAddr)> {
        match &self.state {
            State::Rfc4787(kind, _) if kind.hairpin => {}
            State::Rfc4787(..) | State::Blocked | State::Linux { .. } | State::Firewall(_) => return None,
        }
        let source = self.outbound(now, inside, external)?;
        let target = self.inbound(now, source, external)?;
        Some((source, target))
    }
}

impl Rfc4787 {
    /// Draws its ports, does not hairpin, forgets after the shortest lifetime that RFC 4787 allows.
    pub(crate) const fn new(mapping: Mapping, filtering: Filtering) -> Self {
        Self { mapping, filtering, ports: Ports::Random, hairpin: false, lifetime_s: LIFETIME_S, foreign: 0 }
    }

    const fn key(&self, remote: SocketAddr) -> Key {
        match self.mapping {
            Mapping::Eim => Key::Any,
            Mapping::Adm => Key::Address(remote.ip()),
            Mapping::Apdm => Key::Both(remote),
        }
    }

    const fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime_s as u64)
    }
}

impl Table {
    fn outbound(&mut self, kind: &Rfc4787, now: Now, inside: SocketAddr, remote: SocketAddr, dice: &mut Dice) -> u16 {
        let row = (inside, kind.key(remote));
        let port = match self.rows.get(&row) {
            Some(port) if self.owner(*port, now) == Some(inside) => *port,
            _ => self.allocate(kind, now, inside.port(), dice),
        };
        self.rows.insert(row, port);
        self.owners.insert(port, (inside, now + kind.lifetime()));
        self.permits.insert((port, remote), now + kind.lifetime());
        port
    }

    fn inbound(&mut self, kind: &Rfc4787, now: Now, remote: SocketAddr, port: u16) -> Option<SocketAddr> {
        let inside = self.owner(port, now)?;
        let lowest = SocketAddr::new(remote.ip(), 0);
        let highest = SocketAddr::new(remote.ip(), u16::MAX);
        let permitted = match kind.filtering {
            Filtering::Eif => true,
            Filtering::Adf => self.permits.range((port, lowest)..=(port, highest)).any(|(_, end)| now < *end),
            Filtering::Apdf => self.permits.get(&(port, remote)).is_some_and(|end| now < *end),
        };
        if !permitted {
            return None;
        }
        self.rows.insert((inside, kind.key(remote)), port);
        Some(inside)
    }

    fn owner(&self, port: u16, now: Now) -> Option<SocketAddr> {
        self.owners.get(&port).filter(|(_, end)| now < *end).map(|(inside, _)| *inside)
    }

    fn allocate(&mut self, kind: &Rfc4787, now: Now, wanted: u16, dice: &mut Dice) -> u16 {
        let ports = kind.ports;
        if ports == Ports::Keep && self.owner(wanted, now).is_none() {
            return wanted;
        }
        self.others_count_on(kind.foreign, now, dice);
        loop {
            let port = match ports {
                Ports::Sequential => {
                    self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
                    self.last_port
                }
                Ports::Block(n) => BLOCK_BASE + u16::try_from(dice.below(u64::from(n))).unwrap_or(0),
                Ports::Keep | Ports::Random => draw_port(dice),
            };
            if self.owner(port, now).is_none() {
                // A port that is used again starts without the rights of its last life.
                let (lowest, highest) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::from(u128::MAX).into());
                let old = (port, SocketAddr::new(lowest, 0))..=(port, SocketAddr::new(highest, u16::MAX));
                for right in self.permits.range(old).map(|(right, _)| *right).collect::<Vec<_>>() {
                    self.permits.remove(&right);
                }
                return port;
            }
        }
    }

    /// Mappings of others since the last look: a Poisson process.
    fn others_count_on(&mut self, a_second: u16, now: Now, dice: &mut Dice) {
        if a_second == 0 {
            return;
        }
        while self.foreign_at <= now {
            self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
            let mean = 1_000_000.0 / f64::from(a_second);
            let unit = (dice.below(1 << 30) + 1) as f64 / f64::from(1 << 30);
            self.foreign_at = Now(self.foreign_at.0 + (-unit.ln() * mean) as u64 + 1);
        }
    }
}

impl Flows {
    fn outbound(&mut self, now: Now, inside: SocketAddr, remote: SocketAddr, dice: &mut Dice) -> Option<u16> {
        let alive = self
            .flows
            .get(&(inside, remote))
            .copied()
            .filter(|f| self.holder(f.port, remote, now) == Some(Some(inside)));
        if alive.is_none() && self.room != 0 {
            self.tuples.retain(|_, (_, end)| now < *end);
            if self.tuples.len() >= usize::from(self.room) {
                return None; // "nf_conntrack: table full, dropping packet"
            }
        }
        let flow = alive.unwrap_or_else(|| {
            let mut draw = || match self.draws {
                Some(n) if n > 0 => BLOCK_BASE + u16::try_from(dice.below(u64::from(n))).unwrap_or(0),
                _ => draw_port(dice),
            };
            let mut port = if self.draws.is_some() { draw() } else { inside.port() };
            while self.holder(port, remote, now).is_some() {
                port = draw();
            }
            Flow { port, created: now, answered: false }
        });
        self.flows.insert((inside, remote), flow);
        self.tuples.insert((flow.port, remote), (Some(inside), now + flow.lifetime(now)));
        Some(flow.port)
    }

    fn inbound(&mut self, open_input: bool, now: Now, remote: SocketAddr, port: u16) -> Option<SocketAddr> {
        match self.holder(port, remote, now) {
            Some(Some(inside)) => {
                let flow = self.flows.get_mut(&(inside, remote))?;
                flow.answered = true;
                self.tuples.insert((port, remote), (Some(inside), now + flow.lifetime(now)));
                Some(inside)
            }
            Some(None) => {
                self.tuples.insert((port, remote), (None, now + LINUX_NEW));
                None
            }
            None => {
                if open_input {
                    self.tuples.insert((port, remote), (None, now + LINUX_NEW));
                }
                None
            }
        }
    }

    /// Whose tuple this is, if it is alive: `Some(None)` is the router's own.
    fn holder(&self, port: u16, remote: SocketAddr, now: Now) -> Option<Option<SocketAddr>> {
        self.tuples.get(&(port, remote)).filter(|(_, end)| now < *end).map(|(who, _)| *who)
    }
}

impl Flow {
    fn lifetime(&self, now: Now) -> Duration {
        if self.answered && now.since(self.created) > LINUX_STREAM_AFTER { LINUX_STREAM } else { LINUX_NEW }
    }
}

fn draw_port(dice: &mut Dice) -> u16 {
    let span = u64::from(u16::MAX - FIRST_PORT) + 1;
    u16::try_from(dice.below(span)).map_or(FIRST_PORT, |n| FIRST_PORT + n)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "192.168.1.10:5000";
    const OTHER: &str = "192.168.1.11:5000";
    const R1: &str = "198.51.100.1:1000";
    const R1B: &str = "198.51.100.1:1001";
    const R2: &str = "198.51.100.2:1000";

    fn at(seconds: u64) -> Now {
        Now::from_millis(seconds * 1_000)
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn nat(kind: &str) -> Nat {
        Nat::new(kind.parse().unwrap(), "203.0.113.7".parse().unwrap(), Dice::new(4)).unwrap()
    }

    fn out(nat: &mut Nat, s: u64, inside: &str, remote: &str) -> SocketAddr {
        nat.outbound(at(s), addr(inside), addr(remote)).unwrap()
    }

    #[test]
    fn every_name_reads_back() {
        for name in NAMES.iter().chain(&[
            "linux+open",
            "linux+block512",
            "linux+open+random+table300",
            "eim+apdf+keep+hair+life30",
            "adm+eif+seq",
            "apdm+apdf+seq+foreign200",
            "apdm+adf+block512",
        ]) {
            assert_eq!(name.parse::<Kind>().unwrap().to_string(), *name);
        }
        for bad in ["", "eim", "eim+xxx", "eim+apdf+fast", "linux+shut", "eim+apdf+life"] {
            assert!(bad.parse::<Kind>().is_err(), "{bad}");
        }
    }

    #[test]
    fn mapping_depends_on_what_it_says() {
        for (mapping, same_address, other_address) in
            [("eim", true, true), ("adm", true, false), ("apdm", false, false)]
        {
            for filtering in ["eif", "adf", "apdf"] {
                let mut n = nat(&format!("{mapping}+{filtering}"));
                let first = out(&mut n, 0, HOST, R1);
                assert_eq!(out(&mut n, 1, HOST, R1), first, "a mapping in use is used again");
                assert_eq!(out(&mut n, 1, HOST, R1B) == first, same_address, "{mapping}");
                assert_eq!(out(&mut n, 1, HOST, R2) == first, other_address, "{mapping}");
                assert_ne!(out(&mut n, 1, OTHER, R1), first, "two hosts never share a port");
            }
        }
    }

    #[test]
    fn filtering_lets_in_whom_it_says() {
        for (filtering, same_address, stranger) in [("eif", true, true), ("adf", true, false), ("apdf", false, false)] {
            for mapping in ["eim", "adm", "apdm"] {
                let mut n = nat(&format!("{mapping}+{filtering}"));
                let e = out(&mut n, 0, HOST, R1);
                let lets = |n: &mut Nat, from: &str| n.inbound(at(1), addr(from), e) == Some(addr(HOST));
                assert!(lets(&mut n, R1));
                assert_eq!(lets(&mut n, R1B), same_address, "{mapping}+{filtering}");
                assert_eq!(lets(&mut n, R2), stranger, "{mapping}+{filtering}");
            }
        }
    }

    #[test]
    fn what_is_let_in_is_answered_through_the_same_port() {
        let mut n = nat("apdm+eif");
        let e = out(&mut n, 0, HOST, R1);
        assert_ne!(out(&mut n, 0, HOST, R2), e);
        assert!(n.inbound(at(1), addr(R2), e).is_some());
        assert_eq!(out(&mut n, 1, HOST, R2), e);
    }

    #[test]
    fn a_mapping_ends_unless_used_outbound() {
        let mut n = nat("eim+eif+life30");
        let e = out(&mut n, 0, HOST, R1);
        assert!(n.inbound(at(29), addr(R2), e).is_some());
        assert!(n.inbound(at(30), addr(R2), e).is_none(), "inbound does not refresh");
        let e = out(&mut n, 31, HOST, R1);
        out(&mut n, 50, HOST, R1);
        assert!(n.inbound(at(79), addr(R2), e).is_some(), "outbound does");
        n.reboot();
        assert!(n.inbound(at(79), addr(R2), e).is_none());
    }

    #[test]
    fn permission_ends_before_the_mapping_does() {
        let mut n = nat("eim+apdf+life30");
        let e = out(&mut n, 0, HOST, R1);
        out(&mut n, 20, HOST, R2);
        assert!(n.inbound(at(35), addr(R2), e).is_some());
        assert!(n.inbound(at(35), addr(R1), e).is_none());
    }

    #[test]
    fn ports_are_kept_drawn_or_counted() {
        assert_eq!(out(&mut nat("eim+apdf+keep"), 0, HOST, R1).port(), 5000);
        assert_ne!(out(&mut nat("eim+apdf"), 0, HOST, R1).port(), 5000);
        let mut n = nat("apdm+apdf+seq");
        let ports: Vec<u16> = [R1, R1B, R2].iter().map(|r| out(&mut n, 0, HOST, r).port()).collect();
        assert_eq!(ports, [30_000, 30_001, 30_002]);
    }

    #[test]
    fn hairpin_shows_the_external_source() {
        let mut n = nat("eim+eif+hair");
        let a = out(&mut n, 0, HOST, R1);
        let b = out(&mut n, 0, OTHER, R1);
        assert_eq!(n.hairpin(at(1), addr(HOST), b), Some((a, addr(OTHER))));
        assert_eq!(nat("eim+eif").hairpin(at(1), addr(HOST), b), None);
        assert_eq!(nat("linux").hairpin(at(1), addr(HOST), b), None);
        let mut n = nat("eim+apdf+hair");
        let b = out(&mut n, 0, OTHER, R1);
        assert_eq!(n.hairpin(at(1), addr(HOST), b), None, "filters hold for hairpins too");
    }

    #[test]
    fn linux_keeps_ports_and_lets_only_answers_in() {
        let mut n = nat("linux");
        let e = out(&mut n, 0, HOST, R1);
        assert_eq!(e.port(), 5000);
        assert_eq!(out(&mut n, 0, HOST, R2), e);
        assert!(n.inbound(at(1), addr(R1), e).is_some());
        assert!(n.inbound(at(1), addr(R1B), e).is_none());
    }

    #[test]
    fn linux_gives_the_second_host_with_the_same_port_ports_that_differ_by_destination() {
        let mut n = nat("linux");
        out(&mut n, 0, HOST, R1);
        assert_ne!(out(&mut n, 0, OTHER, R1).port(), 5000);
        assert_eq!(out(&mut n, 0, OTHER, R2).port(), 5000);
    }

    #[test]
    fn an_early_probe_poisons_linux_with_an_open_input_chain() {
        let external = SocketAddr::new("203.0.113.7".parse().unwrap(), 5000);
        let mut closed = nat("linux");
        assert!(closed.inbound(at(0), addr(R1), external).is_none());
        assert_eq!(out(&mut closed, 1, HOST, R1).port(), 5000);
        let mut open = nat("linux+open");
        assert!(open.inbound(at(0), addr(R1), external).is_none());
        assert_ne!(out(&mut open, 1, HOST, R1).port(), 5000, "the router owns the tuple");
        assert_eq!(out(&mut open, 1, HOST, R2).port(), 5000, "towards others nothing changed");
        let mut early = nat("linux+open");
        out(&mut early, 0, HOST, R1);
        assert!(early.inbound(at(1), addr(R1), external).is_some(), "whose own packet left first is not poisoned");
    }

    #[test]
    fn linux_flows_live_thirty_seconds_then_two_minutes() {
        let mut n = nat("linux");
        let e = out(&mut n, 0, HOST, R1);
        assert!(n.inbound(at(29), addr(R1), e).is_some());
        let mut n = nat("linux");
        let e = out(&mut n, 0, HOST, R1);
        assert!(n.inbound(at(1), addr(R1), e).is_some());
        assert!(n.inbound(at(41), addr(R1), e).is_none(), "talked for 1 s, idle 40 s: dead");
        let mut n = nat("linux");
        let e = out(&mut n, 0, HOST, R1);
        assert!(n.inbound(at(3), addr(R1), e).is_some());
        assert!(n.inbound(at(43), addr(R1), e).is_some(), "talked for 3 s, idle 40 s: alive");
    }

    #[test]
    fn a_firewall_translates_nothing_and_lets_answers_in() {
        let (host, remote) = (addr("[2001:db8:a::1]:5000"), addr("[2001:db8:b::1]:7000"));
        let mut wall = Nat::firewall("2001:db8:a::".parse().unwrap());
        assert!(wall.inbound(at(0), remote, host).is_none());
        assert_eq!(wall.outbound(at(0), host, remote), Some(host));
        assert_eq!(wall.inbound(at(1), remote, host), Some(host));
    }

    #[test]
    fn blocked_lets_nothing_out() {
        assert_eq!(nat("blocked").outbound(at(0), addr(HOST), addr(R1)), None);
    }
}

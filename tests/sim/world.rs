//! The virtual clock, the queue of what happens next, and the networks that datagrams cross.
//!
//! A [`World`] is made of networks. Hosts and boxes (NATs, firewalls) own addresses in a network; a datagram goes to the
//! owner of its destination, or to the network's gateway, which passes it on to the network outside. Every crossing is an
//! event, so that a box sees datagrams in the order in which they reach it, which is what hole punching is about.
//!
//! Events happen in the order of (time, sequence number). The driver's own events ride in the same queue.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use meshd::time::Now;

use crate::dice::Dice;
use crate::link::Link;
use crate::nat::Nat;
use crate::trace::{Trace, Who};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostId(usize);
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BoxId(usize);
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NetId(usize);

/// Who holds an address in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    Host(HostId),
    Box(BoxId),
}

/// A datagram under way.
#[derive(Debug, Clone)]
struct Packet {
    source: SocketAddr,
    destination: SocketAddr,
    ttl: u8,
    /// A segment of a TCP connection, to which NATs apply a table of their own.
    tcp: bool,
    bytes: Vec<u8>,
}

/// How much later a lost segment arrives, and how often that happens at most.
const RETRANSMIT_US: u64 = 200_000;
const RETRANSMITS: u64 = 5;

/// The usual one.
const TTL: u8 = 64;

#[derive(Debug)]
struct Net {
    link: Link,
    owners: BTreeMap<IpAddr, Owner>,
    /// Prefixes behind a box, untranslated (IPv6).
    prefixes: Vec<(IpNet, BoxId)>,
    gateway: Option<BoxId>,
    /// Microseconds from the middle of the network to an owner.
    distance: BTreeMap<Owner, u64>,
}

#[derive(Debug)]
struct Gate {
    who: Who,
    inside: NetId,
    outside: NetId,
    v4: Option<Nat>,
    v6: Option<Nat>,
    /// IPv4.
    tcp: Option<Nat>,
}

#[derive(Debug)]
struct Host {
    who: Who,
    net: NetId,
    addresses: Vec<IpAddr>,
}

#[derive(Debug)]
enum Event<E> {
    Hop { net: NetId, from: Owner, to: Owner, packet: Packet },
    Own(E),
}

/// What [`World::next`] hands to the driver.
#[derive(Debug)]
pub(crate) enum Step<E> {
    /// A datagram reached a host.
    Arrived { host: HostId, to: SocketAddr, from: SocketAddr, bytes: Vec<u8> },
    /// A segment of a TCP connection did.
    Segment { host: HostId, to: SocketAddr, from: SocketAddr, bytes: Vec<u8> },
    /// The driver's own event is due.
    Own(E),
}

/// See the module. `E` is the driver's own kind of event.
#[derive(Debug)]
pub(crate) struct World<E> {
    now: Now,
    sequence: u64,
    queue: BTreeMap<(Now, u64), Event<E>>,
    nets: Vec<Net>,
    boxes: Vec<Gate>,
    hosts: Vec<Host>,
    /// Pairs of owners between which nothing passes, in this direction.
    cuts: BTreeSet<(Owner, Owner)>,
    dice: Dice,
    /// What happened.
    pub(crate) trace: Trace,
    /// Must not appear in any datagram; see [`World::forbid`].
    forbidden: Option<Vec<u8>>,
    leaked: u64,
    /// What a tap on the wires saw, while there is one.
    tapped: Option<Vec<Tapped>>,
}

/// One datagram as a tap saw it set out.
#[derive(Debug, Clone)]
pub(crate) struct Tapped {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

impl<E> World<E> {
    pub(crate) fn new(dice: Dice, aloud: bool) -> Self {
        Self {
            now: Now::from_millis(1_000),
            sequence: 0,
            queue: BTreeMap::new(),
            nets: Vec::new(),
            boxes: Vec::new(),
            hosts: Vec::new(),
            cuts: BTreeSet::new(),
            dice,
            trace: Trace::new(aloud),
            forbidden: None,
            leaked: 0,
            tapped: None,
        }
    }

    // ---- building ----

    pub(crate) fn add_net(&mut self, link: Link) -> NetId {
        self.nets.push(Net {
            link,
            owners: BTreeMap::new(),
            prefixes: Vec::new(),
            gateway: None,
            distance: BTreeMap::new(),
        });
        NetId(self.nets.len() - 1)
    }

    /// Puts a box between two networks; it becomes the gateway of the inner one.
    pub(crate) fn add_box(
        &mut self,
        name: &str,
        inside: NetId,
        outside: NetId,
        distance_us: u64,
        v4: Option<Nat>,
        v6: Option<(IpNet, Nat)>,
    ) -> BoxId {
        let id = BoxId(self.boxes.len());
        let who = self.trace.name(name);
        let owner = Owner::Box(id);
        if let Some(nat) = &v4 {
            self.nets[outside.0].owners.insert(nat.external(), owner);
        }
        if let Some((prefix, _)) = &v6 {
            self.nets[outside.0].prefixes.push((*prefix, id));
        }
        self.nets[outside.0].distance.insert(owner, distance_us);
        self.nets[inside.0].gateway = Some(id);
        let tcp = v4.as_ref().map(Nat::for_tcp);
        self.boxes.push(Gate { who, inside, outside, v4, v6: v6.map(|(_, wall)| wall), tcp });
        id
    }

    pub(crate) fn add_host(&mut self, name: &str, net: NetId, distance_us: u64, addresses: &[IpAddr]) -> HostId {
        let id = HostId(self.hosts.len());
        let who = self.trace.name(name);
        self.hosts.push(Host { who, net, addresses: Vec::new() });
        self.move_host(id, net, distance_us, addresses);
        id
    }

    /// The host is in another network from now on, or has other addresses there.
    pub(crate) fn move_host(&mut self, host: HostId, net: NetId, distance_us: u64, addresses: &[IpAddr]) {
        let owner = Owner::Host(host);
        for other in &mut self.nets {
            other.owners.retain(|_, o| *o != owner);
            other.distance.remove(&owner);
        }
        for address in addresses {
            self.nets[net.0].owners.insert(*address, owner);
        }
        self.nets[net.0].distance.insert(owner, distance_us);
        self.hosts[host.0].net = net;
        self.hosts[host.0].addresses = addresses.to_vec();
    }

    pub(crate) fn link_mut(&mut self, net: NetId) -> &mut Link {
        &mut self.nets[net.0].link
    }

    /// The NAT (or firewall) of a box.
    pub(crate) fn nat_mut(&mut self, gate: BoxId) -> Option<&mut Nat> {
        self.boxes[gate.0].v4.as_mut()
    }

    /// Gives a NAT another external address; it forgets its mappings.
    pub(crate) fn renumber(&mut self, gate: BoxId, external: IpAddr) {
        let outside = self.boxes[gate.0].outside;
        let owner = Owner::Box(gate);
        self.nets[outside.0].owners.retain(|_, o| *o != owner);
        self.nets[outside.0].owners.insert(external, owner);
        let Gate { v4, tcp, .. } = &mut self.boxes[gate.0];
        for nat in [v4, tcp].into_iter().flatten() {
            nat.renumber(external);
        }
    }

    /// Nothing passes between two owners of addresses in one network any more, or again.
    pub(crate) fn cut(&mut self, from: Owner, to: Owner, cut: bool) {
        if cut {
            self.cuts.insert((from, to));
        } else {
            self.cuts.remove(&(from, to));
        }
    }

    /// Sees every datagram in every network from now on.
    pub(crate) fn tap(&mut self) {
        self.tapped = Some(Vec::new());
    }

    /// What the tap saw since it was put on or last read.
    pub(crate) fn tapped(&mut self) -> Vec<Tapped> {
        self.tapped.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Counts datagrams that contain `marker` from now on.
    pub(crate) fn forbid(&mut self, marker: &[u8]) {
        self.forbidden = Some(marker.to_vec());
    }

    /// How many crossings showed the marker.
    pub(crate) const fn leaked(&self) -> u64 {
        self.leaked
    }

    pub(crate) fn who(&self, host: HostId) -> Who {
        self.hosts[host.0].who
    }

    pub(crate) fn addresses(&self, host: HostId) -> &[IpAddr] {
        &self.hosts[host.0].addresses
    }

    // ---- running ----

    pub(crate) const fn now(&self) -> Now {
        self.now
    }

    /// Lets `event` happen at `when`, after whatever is already due then.
    pub(crate) fn at(&mut self, when: Now, event: E) {
        self.push(when.max(self.now), Event::Own(event));
    }

    /// When the next event is due.
    pub(crate) fn next_due(&self) -> Option<Now> {
        self.queue.keys().next().map(|(when, _)| *when)
    }

    /// Lets time pass without an event.
    pub(crate) fn advance(&mut self, to: Now) {
        assert!(to >= self.now, "time never goes back: {:?} → {to:?}", self.now);
        assert!(self.next_due().is_none_or(|due| due >= to), "an event would be skipped");
        self.now = to;
    }

    /// Sends from a host's own address of the right family. False: it has none, as the kernel would say.
    pub(crate) fn send(&mut self, host: HostId, port: u16, to: SocketAddr, bytes: Vec<u8>) -> bool {
        self.send_within(host, port, to, bytes, TTL)
    }

    /// A segment of a TCP connection from a host's own address.
    pub(crate) fn send_tcp(&mut self, host: HostId, port: u16, to: SocketAddr, bytes: Vec<u8>) {
        let Some(ip) = self.hosts[host.0].addresses.iter().find(|a| a.is_ipv4() == to.is_ipv4()).copied() else {
            return;
        };
        let net = self.hosts[host.0].net;
        let packet = Packet { source: SocketAddr::new(ip, port), destination: to, ttl: TTL, tcp: true, bytes };
        self.emit(net, Owner::Host(host), packet);
    }

    /// The same with a time to live.
    pub(crate) fn send_within(&mut self, host: HostId, port: u16, to: SocketAddr, bytes: Vec<u8>, ttl: u8) -> bool {
        let source = self.hosts[host.0].addresses.iter().find(|a| a.is_ipv4() == to.is_ipv4()).copied();
        let Host { who, net, .. } = self.hosts[host.0];
        match source {
            Some(ip) => {
                let packet = Packet { source: SocketAddr::new(ip, port), destination: to, ttl, tcp: false, bytes };
                self.emit(net, Owner::Host(host), packet);
            }
            None => self.trace.hop(self.now, who, who, &bytes, Some("no address of that family")),
        }
        source.is_some()
    }

    /// The address that a host's connections seem to come from, on the outermost network; IPv4 if it has one.
    pub(crate) fn seen_from_outside(&self, host: HostId) -> Option<IpAddr> {
        let own = self.hosts[host.0].addresses.first().copied()?;
        let (mut net, mut seen) = (self.hosts[host.0].net, own);
        while let Some(gate) = self.nets[net.0].gateway.map(|gate| &self.boxes[gate.0]) {
            seen = gate.v4.as_ref().filter(|_| own.is_ipv4()).map_or(seen, Nat::external);
            net = gate.outside;
        }
        Some(seen)
    }

    /// Sends with any source address, as somebody with a raw socket can.
    pub(crate) fn send_as(&mut self, host: HostId, source: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        let net = self.hosts[host.0].net;
        self.emit(net, Owner::Host(host), Packet { source, destination: to, ttl: TTL, tcp: false, bytes });
    }

    /// The next step that concerns the driver, if one is due by `until`. The clock stands at its time.
    pub(crate) fn next(&mut self, until: Now) -> Option<Step<E>> {
        loop {
            let (when, _) = *self.queue.keys().next()?;
            if when > until {
                return None;
            }
            let (_, event) = self.queue.pop_first()?;
            self.now = when;
            match event {
                Event::Own(event) => return Some(Step::Own(event)),
                Event::Hop { net, from, to, packet } => {
                    self.trace.hop(when, self.name(from), self.name(to), &packet.bytes, None);
                    match to {
                        Owner::Host(host) => {
                            let Packet { source: from, destination: to, bytes, tcp, .. } = packet;
                            return Some(if tcp {
                                Step::Segment { host, to, from, bytes }
                            } else {
                                Step::Arrived { host, to, from, bytes }
                            });
                        }
                        Owner::Box(gate) => self.pass(gate, net, packet),
                    }
                }
            }
        }
    }

    /// A datagram sets out in a network.
    fn emit(&mut self, net: NetId, from: Owner, packet: Packet) {
        if let Some(marker) = &self.forbidden
            && packet.bytes.windows(marker.len()).any(|w| w == marker)
        {
            self.leaked += 1;
        }
        let Some(ttl) = packet.ttl.checked_sub(self.nets[net.0].link.hops).filter(|ttl| *ttl > 0) else {
            return self.trace.hop(self.now, self.name(from), self.name(from), &packet.bytes, Some("expired"));
        };
        let packet = Packet { ttl, ..packet };
        if let Some(tapped) = &mut self.tapped {
            let Packet { source, destination, ref bytes, .. } = packet;
            tapped.push(Tapped { source, destination, bytes: bytes.clone() });
        }
        let place = &self.nets[net.0];
        let ip = packet.destination.ip();
        let routed = place.prefixes.iter().find(|(prefix, _)| prefix.contains(&ip)).map(|(_, b)| Owner::Box(*b));
        let owner = place.owners.get(&ip).copied().or(routed).or(place.gateway.map(Owner::Box));
        let me = self.name(from);
        let Some(to) = owner.filter(|to| !(matches!(from, Owner::Box(_)) && *to == from)) else {
            return self.trace.hop(self.now, me, me, &packet.bytes, Some("no such address"));
        };
        if self.cuts.contains(&(from, to)) {
            return self.trace.hop(self.now, me, self.name(to), &packet.bytes, Some("cut"));
        }
        let distance = |owner: &Owner| place.distance.get(owner).copied().unwrap_or(0);
        let distance = distance(&from) + distance(&to);
        let headers = if packet.destination.is_ipv4() { 28 } else { 48 };
        let mut arrivals = place.link.carry(packet.bytes.len() + headers, &mut self.dice);
        for late in 1..=RETRANSMITS {
            if packet.tcp && arrivals[0].is_none() {
                let again = place.link.carry(headers, &mut self.dice)[0];
                arrivals = [again.map(|delay| delay + late * RETRANSMIT_US), None];
            }
        }
        if arrivals[0].is_none() {
            self.trace.hop(self.now, me, self.name(to), &packet.bytes, Some("lost"));
        }
        for delay in arrivals.into_iter().flatten() {
            let when = Now(self.now.0 + distance + delay);
            self.push(when, Event::Hop { net, from, to, packet: packet.clone() });
        }
    }

    /// A datagram is at a box and passes through it, or does not.
    fn pass(&mut self, gate: BoxId, net: NetId, mut packet: Packet) {
        let now = self.now;
        let Gate { who, inside, outside, v4, v6, tcp } = &mut self.boxes[gate.0];
        let (who, inside, outside) = (*who, *inside, *outside);
        let v4 = if packet.tcp { tcp } else { v4 };
        let nat = if packet.destination.is_ipv4() { v4 } else { v6 };
        packet.ttl -= 1;
        let expired = packet.ttl == 0;
        // From outside, the router looks for whose it is before it looks at the time to live.
        let Some(nat) = nat.as_mut().filter(|_| !expired || net == outside) else {
            return self.trace.hop(now, who, who, &packet.bytes, Some("not forwarded"));
        };
        let Packet { source, destination, .. } = packet;
        let next = if net == outside {
            nat.inbound(now, source, destination).map(|target| (inside, source, target))
        } else if destination.ip() == nat.external() {
            nat.hairpin(now, source, destination).map(|(seen, target)| (inside, seen, target))
        } else {
            nat.outbound(now, source, destination).map(|seen| (outside, seen, destination))
        };
        match next {
            Some(_) if expired => self.trace.hop(now, who, who, &packet.bytes, Some("expired")),
            Some((net, source, destination)) => {
                self.emit(net, Owner::Box(gate), Packet { source, destination, ..packet });
            }
            None => self.trace.hop(now, who, who, &packet.bytes, Some("filtered")),
        }
    }

    fn push(&mut self, when: Now, event: Event<E>) {
        self.sequence += 1;
        self.queue.insert((when, self.sequence), event);
    }

    fn name(&self, owner: Owner) -> Who {
        match owner {
            Owner::Host(host) => self.hosts[host.0].who,
            Owner::Box(gate) => self.boxes[gate.0].who,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn arrivals(world: &mut World<u8>) -> Vec<(u64, HostId, SocketAddr, SocketAddr)> {
        let mut out = Vec::new();
        while let Some(step) = world.next(Now(u64::MAX)) {
            if let Step::Arrived { host, to, from, .. } = step {
                out.push((world.now().0, host, from, to));
            }
        }
        out
    }

    #[test]
    fn events_happen_in_order_of_time_then_of_being_queued() {
        let mut world = World::new(Dice::new(1), false);
        let t = world.now();
        for (after, event) in [(5, 1u8), (3, 2), (5, 3), (3, 4)] {
            world.at(Now(t.0 + after), event);
        }
        let mut order = Vec::new();
        while let Some(Step::Own(event)) = world.next(Now(t.0 + 4)) {
            order.push(event);
        }
        assert_eq!(order, [2, 4]);
        assert_eq!(world.next_due(), Some(Now(t.0 + 5)));
        while let Some(Step::Own(event)) = world.next(Now(u64::MAX)) {
            order.push(event);
        }
        assert_eq!(order, [2, 4, 1, 3]);
    }

    #[test]
    fn a_datagram_leaves_through_two_nats_and_its_answer_comes_back() {
        let mut world: World<u8> = World::new(Dice::new(1), false);
        let internet = world.add_net(Link::default());
        let carrier = world.add_net(Link::default());
        let home = world.add_net(Link { delay_us: 10, ..Link::default() });
        let nat = |kind: &str, at: &str| Nat::new(kind.parse().unwrap(), ip(at), Dice::new(2));
        world.add_box("carrier", carrier, internet, 500, nat("eim+apdf+keep", "203.0.113.1"), None);
        world.add_box("home", home, carrier, 100, nat("eim+apdf+keep", "100.64.0.9"), None);
        let a = world.add_host("a", home, 0, &[ip("192.168.1.2")]);
        let b = world.add_host("b", internet, 1_000, &[ip("198.51.100.1")]);
        let start = world.now().0;
        world.send(a, 7_000, "198.51.100.1:80".parse().unwrap(), vec![1]);
        let out = arrivals(&mut world);
        let seen: SocketAddr = "203.0.113.1:7000".parse().unwrap();
        assert_eq!(out, [(start + 10 + 100 + 1_500, b, seen, "198.51.100.1:80".parse().unwrap())]);
        world.send(b, 81, seen, vec![2]);
        assert_eq!(arrivals(&mut world), [], "another port is filtered");
        world.send(b, 80, seen, vec![2]);
        assert_eq!(arrivals(&mut world)[0].3, "192.168.1.2:7000".parse().unwrap());
    }

    #[test]
    fn cuts_are_one_way_and_mend() {
        let mut world: World<u8> = World::new(Dice::new(1), false);
        let net = world.add_net(Link::default());
        let a = world.add_host("a", net, 0, &[ip("10.0.0.1")]);
        let b = world.add_host("b", net, 0, &[ip("10.0.0.2")]);
        world.cut(Owner::Host(a), Owner::Host(b), true);
        world.send(a, 1, "10.0.0.2:1".parse().unwrap(), vec![]);
        world.send(b, 1, "10.0.0.1:1".parse().unwrap(), vec![]);
        assert_eq!(arrivals(&mut world).len(), 1);
        world.cut(Owner::Host(a), Owner::Host(b), false);
        world.send(a, 1, "10.0.0.2:1".parse().unwrap(), vec![]);
        assert_eq!(arrivals(&mut world).len(), 1);
    }

    #[test]
    fn a_marker_in_the_clear_is_noticed() {
        let mut world: World<u8> = World::new(Dice::new(1), false);
        let net = world.add_net(Link::default());
        let a = world.add_host("a", net, 0, &[ip("10.0.0.1")]);
        world.forbid(b"secret");
        world.send(a, 1, "10.0.0.1:1".parse().unwrap(), b"no secre t".to_vec());
        assert_eq!(world.leaked(), 0);
        world.send(a, 1, "10.0.0.1:1".parse().unwrap(), b"a secret".to_vec());
        assert_eq!(world.leaked(), 1);
    }
}

//! Builds networks: an internet with a coordinator on it, and sites behind chains of NATs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

use crate::dice::Dice;
use crate::link::Link;
use crate::nat::{Kind, Nat};
use crate::world::{BoxId, HostId, NetId, World};

/// Which address families hosts have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Families {
    V4,
    V6,
    Both,
}

impl Families {
    pub(crate) const fn v4(self) -> bool {
        matches!(self, Self::V4 | Self::Both)
    }
    pub(crate) const fn v6(self) -> bool {
        matches!(self, Self::V6 | Self::Both)
    }
}

/// The internet and what is needed to add to it.
#[derive(Debug)]
pub(crate) struct Town {
    pub(crate) internet: NetId,
    families: Families,
    /// From a site to the middle of the internet: half the one-way time between two sites.
    distance_us: u64,
    dice: Dice,
    sites: u8,
}

/// One place where hosts live.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    /// The network of its hosts.
    pub(crate) net: NetId,
    /// The boxes in front of it, the nearest first.
    pub(crate) gates: Vec<BoxId>,
    v4: [u8; 3],
    v6: Ipv6Net,
    distance_us: u64,
    families: Families,
    /// Added to a host's number, so that hosts of several public sites do not clash.
    base: u8,
}

/// Routers of the internet between two sites.
const HOPS: u8 = 6;
/// One crossing of a home network.
const LAN: Link =
    Link { delay_us: 200, jitter_us: 0, loss: 0, duplicate: 0, reorder: 0, mtu: 1_500, hops: 0, up: true };
/// Where the coordinator is.
pub(crate) const SERVER_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)];
pub(crate) const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 1);
/// Its STUN ports.
pub(crate) const STUN_PORTS: [u16; 2] = [3_478, 3_479];

impl Town {
    /// `weather` is how the internet treats datagrams; its delay comes on top of the distances.
    pub(crate) fn new<E>(
        world: &mut World<E>,
        weather: Link,
        direct_one_way_us: u64,
        families: Families,
        dice: Dice,
    ) -> Self {
        let internet = world.add_net(Link { hops: HOPS, ..weather });
        Self { internet, families, distance_us: direct_one_way_us / 2, dice, sites: 0 }
    }

    /// The coordinator's host, with two IPv4 addresses so that STUN can tell mappings apart.
    pub(crate) fn server<E>(&self, world: &mut World<E>, relay_one_way_us: u64) -> HostId {
        let distance = (relay_one_way_us / 2).saturating_sub(self.distance_us);
        let mut addresses: Vec<IpAddr> = Vec::new();
        if self.families.v4() {
            addresses.extend(SERVER_V4.map(IpAddr::from));
        }
        if self.families.v6() {
            addresses.push(SERVER_V6.into());
        }
        world.add_host("server", self.internet, distance, &addresses)
    }

    /// A network of a carrier's customers, behind one NAT on the internet.
    pub(crate) fn carrier<E>(&mut self, world: &mut World<E>, kind: Kind) -> Site {
        let net = world.add_net(Link { delay_us: 1_000, ..Link::default() });
        let external = Ipv4Addr::new(203, 0, 113, 200);
        let v6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 48);
        let nat = Nat::new(kind, external.into(), self.dice.fork("carrier"));
        let wall = self.families.v6().then(|| (IpNet::V6(v6), Nat::firewall(v6.network().into())));
        let gate = world.add_box("carrier", net, self.internet, self.distance_us, nat, wall);
        Site { net, gates: vec![gate], v4: [100, 64, 0], v6, distance_us: 0, families: self.families, base: 0 }
    }

    /// A site behind `chain` (the nearest box first), attached to the internet or to a carrier's network.
    pub(crate) fn site<E>(&mut self, world: &mut World<E>, name: &str, chain: &[Kind], within: Option<&Site>) -> Site {
        self.sites += 1;
        let n = self.sites;
        let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, u16::from(n), 0, 0, 0, 0), 64);
        let (outer, outer_v4, distance_us) = match within {
            Some(carrier) => (carrier.net, carrier.v4, 0),
            None => (self.internet, [203, 0, 113], self.distance_us),
        };
        let mut site = Site {
            net: outer,
            gates: Vec::new(),
            v4: if within.is_some() { outer_v4 } else { [198, 51, 100] },
            v6,
            distance_us,
            families: self.families,
            base: 20u8.wrapping_mul(n),
        };
        let mut outside_v4 = Ipv4Addr::new(outer_v4[0], outer_v4[1], outer_v4[2], 10 + n);
        // From the outermost box inwards.
        for (depth, kind) in chain.iter().enumerate().rev().filter(|(_, kind)| **kind != Kind::Public) {
            let inside = world.add_net(LAN);
            let label = if chain.len() == 1 { format!("nat-{name}") } else { format!("nat-{name}{depth}") };
            let nat = Nat::new(*kind, outside_v4.into(), self.dice.fork(&label));
            let open = self.families.v6() && *kind != Kind::Blocked;
            let wall = open.then(|| (IpNet::V6(v6), Nat::firewall(v6.network().into())));
            let gate = world.add_box(&label, inside, site.net, site.distance_us, nat, wall);
            site.gates.insert(0, gate);
            site.net = inside;
            site.distance_us = 0;
            site.base = 9;
            // Every home uses the same numbers, as homes do.
            site.v4 = if depth == 0 { [192, 168, 1] } else { [10, n, u8::try_from(depth).unwrap_or(0)] };
            outside_v4 = Ipv4Addr::new(site.v4[0], site.v4[1], site.v4[2], 2);
        }
        site
    }
}

impl Site {
    /// The addresses of the `n`-th host here.
    pub(crate) fn addresses(&self, n: u8) -> Vec<IpAddr> {
        let [x, y, z] = self.v4;
        let mut out: Vec<IpAddr> = Vec::new();
        if self.families.v4() {
            out.push(Ipv4Addr::new(x, y, z, self.base + n).into());
        }
        if self.families.v6() {
            let mut octets = self.v6.network().octets();
            octets[15] = 16 + n;
            out.push(Ipv6Addr::from(octets).into());
        }
        out
    }

    /// Adds the `n`-th host.
    pub(crate) fn host<E>(&self, world: &mut World<E>, name: &str, n: u8) -> HostId {
        world.add_host(name, self.net, self.distance_us, &self.addresses(n))
    }

    /// Moves a host here, as its `n`-th.
    pub(crate) fn welcome<E>(&self, world: &mut World<E>, host: HostId, n: u8) {
        world.move_host(host, self.net, self.distance_us, &self.addresses(n));
    }
}

//! Which peer owns an address: the longest prefix decides, in both directions.
//!
//! Outbound asks [`Routes`] where to send: one peer a prefix. Inbound asks [`Sources`] whether the sender may send from an
//! address: several peers may lead to one prefix, and answers come back through whichever was asked.

use std::net::IpAddr;

use ipnet::IpNet;
use rustc_hash::FxHashMap;

use crate::engine::io::PeerId;
use crate::engine::owners::Owners;
use crate::engine::prefixes::Prefixes;

/// Prefix → peer.
#[derive(Debug, Default)]
pub struct Routes {
    owners: Prefixes<PeerId>,
    by_peer: FxHashMap<PeerId, Vec<IpNet>>,
}

impl Routes {
    /// Gives a prefix to a peer, taking it from whoever had it. Host bits are ignored.
    pub fn insert(&mut self, net: IpNet, peer: PeerId) {
        let net = net.trunc();
        let before = self.owners.insert(net, peer);
        if before == Some(peer) {
            return;
        }
        if let Some(before) = before
            && let Some(nets) = self.by_peer.get_mut(&before)
        {
            nets.retain(|n| *n != net);
        }
        self.by_peer.entry(peer).or_default().push(net);
    }

    /// Makes `nets` the whole set of a peer's prefixes.
    pub fn set(&mut self, peer: PeerId, nets: Vec<IpNet>) {
        self.remove_peer(peer);
        for net in nets {
            self.insert(net, peer);
        }
    }

    /// Takes everything from a peer.
    pub fn remove_peer(&mut self, peer: PeerId) {
        for net in self.by_peer.remove(&peer).unwrap_or_default() {
            self.owners.remove(net);
        }
    }

    /// In this range only single addresses have owners: the mesh's own, which no route, however wide, takes in.
    pub fn reserve(&mut self, range: IpNet) {
        self.owners.reserve(range);
    }

    /// The owner of the longest prefix that holds `ip`.
    #[inline]
    #[must_use]
    pub fn lookup(&self, ip: IpAddr) -> Option<PeerId> {
        self.owners.longest(ip)
    }
}

/// Prefix → the peers that may send from it.
#[derive(Debug, Default)]
pub struct Sources {
    owners: Owners,
    by_peer: FxHashMap<PeerId, Vec<IpNet>>,
}

impl Sources {
    /// Makes `nets` the whole set of prefixes that a peer may send from. A single address has one owner: the last.
    pub fn set(&mut self, peer: PeerId, nets: Vec<IpNet>) {
        self.remove_peer(peer);
        for net in &nets {
            let net = net.trunc();
            if net.prefix_len() < net.max_prefix_len() {
                self.owners.add(net, peer);
            } else {
                self.owners.give(net, peer);
            }
        }
        self.by_peer.insert(peer, nets);
    }

    /// Takes everything from a peer.
    pub fn remove_peer(&mut self, peer: PeerId) {
        for net in self.by_peer.remove(&peer).unwrap_or_default() {
            self.owners.remove(net.trunc(), peer);
        }
    }

    /// As [`Routes::reserve`].
    pub fn reserve(&mut self, range: IpNet) {
        self.owners.reserve(range);
    }

    /// True if the longest prefix that holds `ip` is one that this peer may send from.
    #[inline]
    #[must_use]
    pub fn admits(&self, ip: IpAddr, peer: PeerId) -> bool {
        self.owners.longest(ip).is_some_and(|owner| self.owners.contains(owner, peer))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// The same by looking at everything.
    #[derive(Default)]
    struct Oracle(Vec<(IpNet, PeerId)>);

    impl Oracle {
        fn insert(&mut self, net: IpNet, peer: PeerId) {
            self.0.retain(|(n, _)| *n != net.trunc());
            self.0.push((net.trunc(), peer));
        }
        fn remove_peer(&mut self, peer: PeerId) {
            self.0.retain(|(_, p)| *p != peer);
        }
        fn lookup(&self, ip: IpAddr) -> Option<PeerId> {
            self.0.iter().filter(|(n, _)| n.contains(&ip)).max_by_key(|(n, _)| n.prefix_len()).map(|(_, p)| *p)
        }
    }

    /// Few distinct bits, so that prefixes nest and collide.
    fn address() -> impl Strategy<Value = IpAddr> {
        (any::<bool>(), 0u8..4, 0u8..4, 0u8..8).prop_map(|(v4, a, b, c)| {
            if v4 {
                Ipv4Addr::new(100, 64 + a, b << 6, c).into()
            } else {
                Ipv6Addr::new(0xfd00, u16::from(a), 0, 0, 0, 0, u16::from(b) << 14, u16::from(c)).into()
            }
        })
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (address(), 0u8..=128).prop_map(|(ip, len)| {
            let len = if ip.is_ipv4() { len % 33 } else { len };
            IpNet::new(ip, len).unwrap()
        })
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(IpNet, u32),
        Set(u32, Vec<IpNet>),
        Remove(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (net(), 0u32..5).prop_map(|(n, p)| Step::Insert(n, p)),
            (0u32..5, proptest::collection::vec(net(), 0..6)).prop_map(|(p, n)| Step::Set(p, n)),
            (0u32..5).prop_map(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            steps in proptest::collection::vec(step(), 1..30),
            probes in proptest::collection::vec(address(), 20),
        ) {
            let mut routes = Routes::default();
            let mut oracle = Oracle::default();
            for step in steps {
                match step {
                    Step::Insert(net, peer) => {
                        routes.insert(net, PeerId(peer));
                        oracle.insert(net, PeerId(peer));
                    }
                    Step::Set(peer, nets) => {
                        routes.set(PeerId(peer), nets.clone());
                        oracle.remove_peer(PeerId(peer));
                        for net in nets {
                            oracle.insert(net, PeerId(peer));
                        }
                    }
                    Step::Remove(peer) => {
                        routes.remove_peer(PeerId(peer));
                        oracle.remove_peer(PeerId(peer));
                    }
                }
                // The second time it is what was kept from the first.
                for ip in probes.iter().chain(&probes) {
                    prop_assert_eq!(routes.lookup(*ip), oracle.lookup(*ip));
                }
            }
        }

        #[test]
        fn who_may_send_agrees_with_a_linear_search(
            steps in proptest::collection::vec((0u32..5, proptest::collection::vec(net(), 0..6)), 1..30),
            probes in proptest::collection::vec(address(), 20),
        ) {
            let mut sources = Sources::default();
            let mut all: Vec<(IpNet, PeerId)> = Vec::new();
            for (peer, nets) in steps {
                let peer = PeerId(peer);
                sources.set(peer, nets.clone());
                all.retain(|(_, owner)| *owner != peer);
                for net in nets {
                    // A single address has one owner.
                    all.retain(|(known, _)| *known != net.trunc() || net.prefix_len() < net.max_prefix_len());
                    all.push((net.trunc(), peer));
                }
                for ip in probes.iter().chain(&probes) {
                    let longest = all.iter().filter(|(net, _)| net.contains(ip)).map(|(net, _)| net.prefix_len()).max();
                    for peer in (0..5).map(PeerId) {
                        let may = all.iter().any(|(net, owner)| {
                            *owner == peer && net.contains(ip) && Some(net.prefix_len()) == longest
                        });
                        prop_assert_eq!(sources.admits(*ip, peer), may, "{} by {:?}", ip, peer);
                    }
                }
                let (used, made) = sources.owners.lists();
                prop_assert_eq!(used, made);
            }
        }
    }

    #[test]
    fn the_owner_is_the_longest_match_only() {
        let mut routes = Routes::default();
        routes.insert("10.0.0.0/8".parse().unwrap(), PeerId(1));
        routes.insert("10.1.0.7/32".parse().unwrap(), PeerId(2));
        let owner = |ip: &str| routes.lookup(ip.parse().unwrap());
        assert_eq!(owner("10.1.0.8"), Some(PeerId(1)));
        assert_eq!(owner("10.1.0.7"), Some(PeerId(2)));
        assert_eq!(owner("11.0.0.1"), None);
    }

    #[test]
    fn several_peers_may_send_from_a_prefix_and_the_longest_match_decides() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mut sources = Sources::default();
        sources.set(PeerId(1), vec![net("10.0.0.0/8"), net("100.71.0.1/32")]);
        sources.set(PeerId(2), vec![net("10.0.0.0/8"), net("10.1.0.0/16"), net("fd00::/64")]);
        let admits = |sources: &Sources, ip: &str, peer| sources.admits(ip.parse().unwrap(), PeerId(peer));
        assert!(admits(&sources, "10.9.0.1", 1) && admits(&sources, "10.9.0.1", 2));
        assert!(!admits(&sources, "10.1.0.1", 1) && admits(&sources, "10.1.0.1", 2));
        assert!(admits(&sources, "fd00::9", 2) && !admits(&sources, "fd00::9", 1));
        assert!(admits(&sources, "100.71.0.1", 1) && !admits(&sources, "100.71.0.1", 2));
        sources.set(PeerId(2), vec![]);
        assert!(admits(&sources, "10.1.0.1", 1) && !admits(&sources, "10.9.0.1", 2));
        sources.remove_peer(PeerId(1));
        assert!(!admits(&sources, "10.9.0.1", 1) && !admits(&sources, "100.71.0.1", 1));
    }

    /// An exit node owns the rest of the world, not the addresses that no member of the mesh has yet.
    #[test]
    fn no_route_takes_in_the_mesh_itself() {
        let everything: IpNet = "0.0.0.0/0".parse().unwrap();
        let (mut routes, mut sources) = (Routes::default(), Sources::default());
        routes.reserve("100.71.0.0/16".parse().unwrap());
        sources.reserve("100.71.0.0/16".parse().unwrap());
        routes.set(PeerId(1), vec![everything, "100.71.0.1/32".parse().unwrap()]);
        sources.set(PeerId(1), vec![everything, "100.71.0.1/32".parse().unwrap()]);
        for (ip, owned) in [("100.71.0.1", true), ("100.71.0.9", false), ("100.72.0.1", true), ("8.8.8.8", true)] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(routes.lookup(ip) == Some(PeerId(1)), owned, "{ip}");
            assert_eq!(sources.admits(ip, PeerId(1)), owned, "{ip}");
        }
    }
}

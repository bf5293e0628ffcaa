//! Which peer owns an address: the longest prefix decides, in both directions.
//!
//! Outbound asks it where to send, inbound asks it whether the sender owns the inner source. Nearly all lookups are for
//! a node's own address, so single addresses are in a hash map (4 ns); the rest is in a prefix trie (30 ns).

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;
use rustc_hash::FxHashMap;

use crate::engine::io::PeerId;

/// Prefix → peer.
#[derive(Debug, Default)]
pub struct Routes {
    hosts: FxHashMap<IpAddr, PeerId>,
    nets4: PrefixMap<Ipv4Net, PeerId>,
    nets6: PrefixMap<Ipv6Net, PeerId>,
    by_peer: FxHashMap<PeerId, Vec<IpNet>>,
}

impl Routes {
    /// Gives a prefix to a peer, taking it from whoever had it. Host bits are ignored.
    pub fn insert(&mut self, net: IpNet, peer: PeerId) {
        let net = net.trunc();
        let before = match host(&net) {
            Some(ip) => self.hosts.insert(ip, peer),
            None => match net {
                IpNet::V4(net) => self.nets4.insert(net, peer),
                IpNet::V6(net) => self.nets6.insert(net, peer),
            },
        };
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
            match host(&net) {
                Some(ip) => drop(self.hosts.remove(&ip)),
                None => match net {
                    IpNet::V4(net) => drop(self.nets4.remove(&net)),
                    IpNet::V6(net) => drop(self.nets6.remove(&net)),
                },
            }
        }
    }

    /// The owner of the longest prefix that holds `ip`.
    #[must_use]
    pub fn lookup(&self, ip: IpAddr) -> Option<PeerId> {
        if let Some(peer) = self.hosts.get(&ip) {
            return Some(*peer);
        }
        match ip {
            IpAddr::V4(ip) => self.nets4.get_lpm(&Ipv4Net::from(ip)).map(|(_, peer)| *peer),
            IpAddr::V6(ip) => self.nets6.get_lpm(&Ipv6Net::from(ip)).map(|(_, peer)| *peer),
        }
    }

    /// True if the longest prefix that holds `ip` is this peer's.
    #[must_use]
    pub fn owner_is(&self, ip: IpAddr, peer: PeerId) -> bool {
        self.lookup(ip) == Some(peer)
    }
}

/// The address of a prefix that holds just one.
fn host(net: &IpNet) -> Option<IpAddr> {
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
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
                for ip in &probes {
                    prop_assert_eq!(routes.lookup(*ip), oracle.lookup(*ip));
                }
            }
        }
    }

    #[test]
    fn the_owner_is_the_longest_match_only() {
        let mut routes = Routes::default();
        routes.insert("10.0.0.0/8".parse().unwrap(), PeerId(1));
        routes.insert("10.1.0.7/32".parse().unwrap(), PeerId(2));
        assert!(routes.owner_is("10.1.0.8".parse().unwrap(), PeerId(1)));
        assert!(routes.owner_is("10.1.0.7".parse().unwrap(), PeerId(2)));
        assert!(!routes.owner_is("10.1.0.7".parse().unwrap(), PeerId(1)));
        assert!(!routes.owner_is("11.0.0.1".parse().unwrap(), PeerId(1)));
    }
}

//! What is to be routed how on this machine, worked out from what the planner wants and what is there already.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::daemon::apply::Surroundings;
use crate::engine::place::Overlap;
use crate::os::netlink::{InterfaceAddress, OWN_TABLES, Rule, TableRoute};

/// Marks what meshd itself sends: it never goes into the tunnel.
use crate::os::mark::MARK;

/// Routes of the main table shorter than this are ways of saying "everything", and do not go before ours.
const SHORTEST_IPV4: u8 = 8;
/// The same for IPv6.
const SHORTEST_IPV6: u8 = 16;
/// Our table's number is this plus the interface's, so that several nodes on one machine have one each.
const TABLE_BASE: u32 = OWN_TABLES;
/// Our rules are asked before the main table's (32766).
const PRIORITY_BASE: u32 = 27_000;
/// The kernel's main table.
const MAIN: u32 = 254;

/// Our interface, as routes need it.
#[derive(Debug, Clone)]
pub(super) struct Own {
    /// Its number.
    pub(super) index: u32,
    /// Its addresses. Without an IPv6 one the machine has no IPv6 inside the mesh.
    pub(super) addresses: Vec<IpAddr>,
}

/// How all traffic goes through an exit node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exit {
    /// Networks this machine is in are still reached directly.
    pub(super) lan: bool,
    /// Nothing leaves without the tunnel, not even when the daemon was killed.
    pub(super) kill_switch: bool,
}

/// What the kernel is to hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Wanted {
    pub(super) routes: BTreeSet<TableRoute>,
    pub(super) rules: Vec<Rule>,
    /// What is not routed because something on this machine goes before it, and what.
    pub(super) shadowed: BTreeMap<IpNet, Overlap>,
}

impl Own {
    /// The number of our table.
    pub(super) const fn table(&self) -> u32 {
        TABLE_BASE + self.index
    }

    const fn priority(&self) -> u32 {
        PRIORITY_BASE + 4 * (self.index % 1_000)
    }

    fn source(&self, v4: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|a| a.is_ipv4() == v4)
    }

    /// What the kernel is to hold so that these prefixes lead into the tunnel.
    pub(super) fn wanted(&self, accepted: &[IpNet], around: &Surroundings, exit: Option<Exit>) -> Wanted {
        let mut wanted = Wanted::default();
        for prefix in accepted {
            let v4 = matches!(prefix, IpNet::V4(_));
            let Some(source) = self.source(v4) else { continue };
            if let Some(by) = around.goes_before(prefix) {
                wanted.shadowed.insert(*prefix, by);
                continue;
            }
            wanted.routes.insert(TableRoute { prefix: *prefix, interface: Some(self.index), source: Some(source) });
            if prefix.prefix_len() == 0 && exit.is_some_and(|exit| exit.kill_switch) {
                wanted.routes.insert(TableRoute { prefix: *prefix, interface: None, source: None });
            }
        }
        for v6 in [false, true] {
            let routed = |r: &&TableRoute| matches!(r.prefix, IpNet::V6(_)) == v6;
            let mut routes = wanted.routes.iter().filter(routed).peekable();
            if routes.peek().is_none() {
                continue;
            }
            let everything = routes.any(|r| r.prefix.prefix_len() == 0);
            let ours = |priority| Rule { v6, priority, table: self.table(), unless_mark: Some(MARK), suppress: None };
            if everything && exit.is_some_and(|exit| !exit.lan) {
                wanted.rules.push(ours(self.priority()));
                continue;
            }
            // The main table is asked first, but for its default routes: what this machine is in, or has a route to, stays.
            let shorter = u32::from(if v6 { SHORTEST_IPV6 } else { SHORTEST_IPV4 }) - 1;
            let priority = self.priority() + 1;
            wanted.rules.push(Rule { v6, priority, table: MAIN, unless_mark: None, suppress: Some(shorter) });
            wanted.rules.push(ours(priority + 1));
        }
        wanted
    }
}

impl Surroundings {
    /// What on this machine takes the packets for all of a prefix, in words. Something that takes a part of it only is asked
    /// first for that part.
    fn goes_before(&self, prefix: &IpNet) -> Option<Overlap> {
        if prefix.prefix_len() == 0 {
            return None;
        }
        let shortest = if matches!(prefix, IpNet::V4(_)) { SHORTEST_IPV4 } else { SHORTEST_IPV6 };
        let on = |index: Option<u32>| index.and_then(|i| self.names.get(&i)).map_or("this machine", String::as_str);
        let takes = |net: &IpNet| net.prefix_len() >= shortest && net.contains(prefix);
        for found in &self.addresses {
            if let Ok(net) = IpNet::new(found.address.ip, found.address.prefix_len)
                && takes(&net.trunc())
            {
                let by = format!("{} is in {} itself", on(Some(found.index)), net.trunc());
                return Some(Overlap { by, interface: Some(found.index), place: None });
            }
        }
        let route = self.routes.iter().find(|route| takes(&route.prefix))?;
        let by = format!("there is a route to {} on {}", route.prefix, on(route.index));
        Some(Overlap { by, interface: None, place: None })
    }

    /// The networks this machine is in that are not everybody's: an IPv4 network with public addresses is.
    pub(super) fn neighbours(&self) -> Vec<IpNet> {
        let nets = self.addresses.iter().filter_map(|a| IpNet::new(a.address.ip, a.address.prefix_len).ok());
        let private = |net: &IpNet| match net.addr() {
            IpAddr::V4(a) => {
                a.is_private() || a.is_link_local() || (a.octets()[0] == 100 && a.octets()[1] & 0xc0 == 64)
            }
            IpAddr::V6(a) => !a.is_loopback(),
        };
        let mut nets: Vec<IpNet> = nets.map(|net| net.trunc()).filter(private).collect();
        nets.sort_unstable();
        nets.dedup();
        nets
    }

    /// The interface whose network an address is in.
    pub(super) fn on_link(&self, ip: IpAddr) -> Option<u32> {
        let net = |a: &InterfaceAddress| IpNet::new(a.address.ip, a.address.prefix_len).ok();
        let near = self.addresses.iter().filter(|a| net(a).is_some_and(|net| net.contains(&ip)));
        near.max_by_key(|a| a.address.prefix_len).map(|a| a.index)
    }

    /// The interfaces that lead to some part of a prefix by a route of their own.
    pub(super) fn leading_to(&self, prefix: &IpNet) -> BTreeSet<u32> {
        let touches = |net: &IpNet| net.contains(prefix) || prefix.contains(net);
        let addressed = self.addresses.iter().filter(|a| {
            let net = IpNet::new(a.address.ip, a.address.prefix_len);
            net.is_ok_and(|net| !net.addr().is_loopback() && touches(&net.trunc()))
        });
        let routed = self.routes.iter().filter(|r| r.prefix.prefix_len() > 0 && touches(&r.prefix));
        addressed.map(|a| a.index).chain(routed.filter_map(|r| r.index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::io::LocalAddress;
    use crate::os::netlink::{InterfaceAddress, Route};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn own() -> Own {
        Own { index: 7, addresses: vec!["100.71.0.1".parse().unwrap(), "fd00:1:2::1".parse().unwrap()] }
    }

    fn around(addresses: &[(&str, u8)], routes: &[&str]) -> Surroundings {
        Surroundings {
            addresses: addresses
                .iter()
                .map(|(ip, prefix_len)| InterfaceAddress {
                    index: 2,
                    address: LocalAddress { ip: ip.parse().unwrap(), prefix_len: *prefix_len },
                })
                .collect(),
            routes: routes.iter().map(|r| Route { index: Some(3), prefix: net(r) }).collect(),
            names: BTreeMap::from([(2, "eth0".into()), (3, "eth1".into())]),
        }
    }

    #[test]
    fn the_local_network_is_never_taken() {
        let around = around(&[("127.0.0.1", 8), ("192.168.1.5", 24)], &["10.0.0.0/8", "0.0.0.0/1"]);
        let accepted =
            ["192.168.1.0/24", "192.168.1.128/25", "192.168.0.0/16", "10.1.0.0/16", "172.16.0.0/12"].map(net);
        let wanted = own().wanted(&accepted, &around, None);
        let installed: Vec<String> = wanted.routes.iter().map(|r| r.prefix.to_string()).collect();
        // The wider one is routed: for the part this machine is in, the main table is asked first.
        assert_eq!(installed, ["172.16.0.0/12", "192.168.0.0/16"]);
        assert_eq!(wanted.shadowed[&net("192.168.1.0/24")].by, "eth0 is in 192.168.1.0/24 itself");
        assert_eq!(wanted.shadowed[&net("10.1.0.0/16")].by, "there is a route to 10.0.0.0/8 on eth1");
        assert_eq!(wanted.shadowed.len(), 3);
        let [main, ours] = wanted.rules.as_slice() else { panic!("{:?}", wanted.rules) };
        assert_eq!((main.table, main.suppress, main.v6), (254, Some(7), false));
        assert_eq!((ours.table, ours.unless_mark), (70_007, Some(MARK)));
        assert!(main.priority < ours.priority && ours.priority < 32_766);
    }

    #[test]
    fn an_exit_node_takes_both_families_with_or_without_the_lan() {
        let around = around(&[("192.168.1.5", 24)], &[]);
        let everything = ["0.0.0.0/0", "::/0"].map(net);
        let exit = |lan, kill_switch| own().wanted(&everything, &around, Some(Exit { lan, kill_switch }));
        assert_eq!((exit(true, false).routes.len(), exit(true, false).rules.len()), (2, 4));
        assert_eq!(exit(true, true).routes.iter().filter(|r| r.interface.is_none()).count(), 2);
        let cut = exit(false, false).rules;
        assert!(cut.len() == 2 && cut.iter().all(|rule| rule.table == 70_007), "{cut:?}");
    }

    #[test]
    fn without_ipv6_in_the_mesh_there_are_no_ipv6_routes() {
        let own = Own { addresses: vec!["100.71.0.1".parse().unwrap()], ..own() };
        let wanted = own.wanted(&["fd00:9::/64", "172.16.0.0/12"].map(net), &Surroundings::default(), None);
        assert!(wanted.routes.len() == 1 && wanted.rules.iter().all(|rule| !rule.v6));
    }

    #[test]
    fn neighbours_are_the_networks_that_are_not_everybody_s() {
        let here = [
            ("127.0.0.1", 8),
            ("192.168.1.5", 24),
            ("203.0.113.4", 24),
            ("100.64.9.9", 10),
            ("::1", 128),
            ("2001:db8::5", 64),
        ];
        let nets: Vec<String> = around(&here, &[]).neighbours().iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["100.64.0.0/10", "192.168.1.0/24", "2001:db8::/64"]);
    }

    #[test]
    fn interfaces_behind_a_prefix_are_found_by_address_and_route() {
        let around = around(&[("127.0.0.1", 8), ("192.168.1.5", 24)], &["10.0.0.0/8"]);
        assert_eq!(around.leading_to(&net("192.168.1.0/24")), BTreeSet::from([2]));
        assert_eq!(around.leading_to(&net("192.168.0.0/16")), BTreeSet::from([2]));
        assert_eq!(around.leading_to(&net("10.3.0.0/16")), BTreeSet::from([3]));
        assert!(around.leading_to(&net("172.16.0.0/12")).is_empty());
    }
}

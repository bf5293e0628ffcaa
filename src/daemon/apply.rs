//! Makes the system match the plan: looks for clashes, then gives the interface its addresses.
//!
//! Everything set here hangs on the TUN device and goes with it; nothing is left to undo.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::daemon::problem;
use crate::engine::path::mtu::BASE;
use crate::os::netlink::{InterfaceAddress, Netlink, NoIpv6, Route};
use crate::wire::local::Problem;

/// The interface's MTU at first: the least that IPv6 allows (RFC 8200 section 5), so that it fits every path with room for our
/// headers. Paths that take more raise it.
pub const MTU: u32 = BASE as u32;
/// Routes shorter than this are ways of saying "everything" (`0.0.0.0/1`), not somebody's network.
const SHORTEST_IPV4: u8 = 8;
/// The same for IPv6.
const SHORTEST_IPV6: u8 = 16;

/// The machine's addresses and routes at one moment, without those of our own interface.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// All addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// Unicast routes other than the default ones.
    pub routes: Vec<Route>,
    /// Interface names by number.
    pub names: BTreeMap<u32, String>,
}

impl Surroundings {
    /// Looks around, leaving out the interface `own`.
    ///
    /// # Errors
    /// Code `interface`: the kernel does not answer.
    pub async fn look(netlink: &Netlink, own: u32) -> Result<Self, Problem> {
        let mut addresses = netlink.addresses().await.map_err(|e| no_netlink(&e))?;
        addresses.retain(|a| a.index != own);
        let mut routes = netlink.routes().await.map_err(|e| no_netlink(&e))?;
        routes.retain(|r| r.index != Some(own));
        let mut names = BTreeMap::new();
        for index in addresses.iter().map(|a| a.index).chain(routes.iter().filter_map(|r| r.index)) {
            if let std::collections::btree_map::Entry::Vacant(entry) = names.entry(index)
                && let Ok(Some(interface)) = netlink.interface(index).await
            {
                entry.insert(interface.name);
            }
        }
        Ok(Self { addresses, routes, names })
    }

    /// What on this machine overlaps one of the mesh's ranges, in words.
    #[must_use]
    pub fn clash(&self, ranges: &[IpNet]) -> Option<String> {
        let hit = |net: &IpNet| ranges.iter().any(|range| overlap(range, net));
        let on = |index: Option<u32>| {
            index.and_then(|i| self.names.get(&i)).map_or_else(String::new, |name| format!(" on {name}"))
        };
        for InterfaceAddress { index, address } in &self.addresses {
            if let Ok(net) = IpNet::new(address.ip, address.prefix_len)
                && hit(&net)
            {
                return Some(format!("the address {net}{}", on(Some(*index))));
            }
        }
        let named = |route: &&Route| {
            let shortest = if matches!(route.prefix, IpNet::V4(_)) { SHORTEST_IPV4 } else { SHORTEST_IPV6 };
            route.prefix.prefix_len() >= shortest && hit(&route.prefix)
        };
        self.routes.iter().find(named).map(|route| format!("the route to {}{}", route.prefix, on(route.index)))
    }
}

/// The mesh's range cannot be used here.
pub(super) fn range_clash(ranges: &[IpNet], what: &str) -> Problem {
    let shown: Vec<_> = ranges.iter().map(ToString::to_string).collect();
    problem(
        "range-clash",
        format!("the network's range ({}) overlaps {what}", shown.join(" and ")),
        "remove that address or route from this machine (another VPN?), or found the network with another `--ipv4-range`",
    )
}

/// Gives the interface its addresses and brings it up.
///
/// # Errors
/// Code `interface`.
pub async fn bring_up(netlink: &Netlink, index: u32, addresses: &[IpNet]) -> Result<Option<NoIpv6>, Problem> {
    netlink.bring_up(index, addresses, MTU).await.map_err(|e| {
        problem(
            "interface",
            format!("the network interface cannot be set up: {e}"),
            "run as root, or give the program the capability: `sudo setcap cap_net_admin+ep $(which meshd)`",
        )
    })
}

/// An address with the length of the network it is in.
#[must_use]
pub fn with_prefix(ip: IpAddr, range: IpNet) -> Option<IpNet> {
    IpNet::new(ip, range.prefix_len()).ok()
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn no_netlink(e: &io::Error) -> Problem {
    problem("interface", format!("the system's addresses and routes cannot be listed: {e}"), "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::io::LocalAddress;

    fn surroundings(addresses: &[(&str, u8)], routes: &[&str]) -> Surroundings {
        Surroundings {
            addresses: addresses
                .iter()
                .map(|(ip, prefix_len)| InterfaceAddress {
                    index: 2,
                    address: LocalAddress { ip: ip.parse().unwrap(), prefix_len: *prefix_len },
                })
                .collect(),
            routes: routes.iter().map(|r| Route { index: Some(2), prefix: r.parse().unwrap() }).collect(),
            names: BTreeMap::from([(2, "eth0".into())]),
        }
    }

    #[test]
    fn overlaps_are_found_whichever_range_is_wider() {
        let ranges: [IpNet; 2] = ["100.71.0.0/16".parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap()];
        let clash = |addresses: &[(&str, u8)], routes: &[&str]| surroundings(addresses, routes).clash(&ranges);
        assert_eq!(clash(&[("192.168.1.5", 24), ("fe80::1", 64)], &["192.168.0.0/16", "10.0.0.0/8"]), None);
        // A carrier's own use of the shared range, wider than ours.
        assert_eq!(clash(&[("100.64.5.3", 10)], &[]).as_deref(), Some("the address 100.64.5.3/10 on eth0"));
        assert_eq!(clash(&[], &["100.71.3.0/24"]).as_deref(), Some("the route to 100.71.3.0/24 on eth0"));
        assert_eq!(
            clash(&[("fd12:3456:789a:1::1", 64)], &[]).as_deref(),
            Some("the address fd12:3456:789a:1::1/64 on eth0")
        );
        // Ways of saying "everything" are nobody's network.
        assert_eq!(clash(&[], &["0.0.0.0/1", "64.0.0.0/2", "::/1", "fc00::/7"]), None);
        assert_eq!(clash(&[("100.70.255.255", 16)], &["100.72.0.0/16"]), None);
    }
}

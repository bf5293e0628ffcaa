//! Interface addresses, routes and their changes, by rtnetlink. Nobody else knows the rtnetlink crate.

mod neighbours;
mod policy;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder};

use crate::engine::io::LocalAddress;
use crate::engine::packet::DATA_OVERHEAD;
use crate::engine::portmap::Gateway;
use crate::os::train::{MAX_BYTES, MAX_DATAGRAMS};

pub use neighbours::Neighbour;
pub use policy::{Rule, TableRoute};

/// A change is reported after this long, with what came meanwhile: one change of network is many messages.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Reports are at least this far apart.
const REPORTS_APART: Duration = Duration::from_millis(100);
/// The kernel's table of its own addresses; those are listed as addresses, not as routes.
const TABLE_LOCAL: u32 = 255;
/// meshd's own tables have this number and higher ones.
pub const OWN_TABLES: u32 = 70_000;
/// The kernel's usual table of routes.
const TABLE_MAIN: u32 = 254;

/// A connection to the kernel's routing system. Lives on the tokio runtime it was made in.
#[derive(Debug, Clone)]
pub struct Netlink {
    handle: Handle,
}

/// An address with the interface it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface's number.
    pub index: u32,
    /// The address.
    pub address: LocalAddress,
}

/// A unicast route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The interface it leads to, if a single one.
    pub index: Option<u32>,
    /// Where to.
    pub prefix: IpNet,
}

/// A default route: where packets for everybody else leave.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WayOut {
    /// The interface it leads to, if a single one.
    pub index: Option<u32>,
    /// The router; `None`: everybody is on the link.
    pub gateway: Option<IpAddr>,
}

/// An interface as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// It is switched on.
    pub up: bool,
    /// The longest packet it takes, in bytes.
    pub mtu: u32,
}

/// Why the IPv6 address could not be set although IPv4 works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoIpv6(pub String);

/// Packets the kernel queues for us before it drops them.
const QUEUE_LENGTH: u32 = 1_000;

impl Netlink {
    /// Connects.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All addresses of all interfaces, loopback and link-local ones included.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn addresses(&self) -> io::Result<Vec<InterfaceAddress>> {
        let mut found = Vec::new();
        let mut stream = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = stream.try_next().await.map_err(other)? {
            // On a point-to-point interface `Local` is ours and `Address` is the other end's.
            let mut ip = None;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(local) => ip = Some(*local),
                    AddressAttribute::Address(address) if ip.is_none() => ip = Some(*address),
                    _ => {}
                }
            }
            if let Some(ip) = ip {
                let address = LocalAddress { ip, prefix_len: message.header.prefix_len };
                found.push(InterfaceAddress { index: message.header.index, address });
            }
        }
        Ok(found)
    }

    /// The unicast routes of every table, without the default routes and the kernel's table of local addresses.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn routes(&self) -> io::Result<Vec<Route>> {
        let mut found = Vec::new();
        for request in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()]
        {
            let mut stream = std::pin::pin!(self.handle.route().get(request).execute());
            while let Some(message) = stream.try_next().await.map_err(other)? {
                found.extend(route(&message));
            }
        }
        Ok(found)
    }

    /// The default routes of every table, but for those of the interface `not_by`, sorted.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn ways_out(&self, not_by: u32) -> io::Result<Vec<WayOut>> {
        let mut found = Vec::new();
        for request in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()]
        {
            let mut stream = std::pin::pin!(self.handle.route().get(request).execute());
            while let Some(message) = stream.try_next().await.map_err(other)? {
                found.extend(way_out(&message).filter(|way| way.index != Some(not_by)));
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// The IPv4 router that the default route of the main table leads to, not over the interface `not_on` (our own TUN
    /// device), and this machine's address towards it. Of several the one with the lowest metric; `None`: there is none.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn gateway(&self, not_on: u32) -> io::Result<Option<Gateway>> {
        let mut best: Option<DefaultRoute> = None;
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut stream = std::pin::pin!(self.handle.route().get(request).execute());
        while let Some(message) = stream.try_next().await.map_err(other)? {
            let found = default_route(&message).filter(|found| found.index != not_on);
            if let Some(found) = found
                && best.as_ref().is_none_or(|best| found.metric < best.metric)
            {
                best = Some(found);
            }
        }
        let Some(best) = best else { return Ok(None) };
        if let Some(own) = best.source {
            return Ok(Some(Gateway { router: best.router, own }));
        }
        let addresses = self.addresses().await?;
        let here = addresses.iter().filter(|a| a.index == best.index).filter_map(|a| match a.address.ip {
            IpAddr::V4(ip) => Some((ip, a.address.prefix_len)),
            IpAddr::V6(_) => None,
        });
        let beside = |(ip, prefix_len): &(Ipv4Addr, u8)| {
            ipnet::Ipv4Net::new(*ip, *prefix_len).is_ok_and(|net| net.contains(&best.router))
        };
        let own = here.clone().find(beside).or_else(|| here.clone().next());
        Ok(own.map(|(own, _)| Gateway { router: best.router, own }))
    }

    /// Gives the interface its addresses (with the networks' prefix lengths, so that the kernel makes the on-link routes
    /// itself) and its MTU, and brings it up. What was set before stays.
    ///
    /// # Errors
    /// The IPv4 part failed. A failure of IPv6 alone is the returned note.
    pub async fn bring_up(&self, index: u32, addresses: &[IpNet], mtu: u32) -> io::Result<Option<NoIpv6>> {
        // By netlink, because the older ioctl is refused to the root of a user namespace.
        let up = LinkUnspec::new_with_index(index).mtu(mtu).txqueuelen(QUEUE_LENGTH).up().build();
        self.handle.link().set(up).execute().await.map_err(named)?;
        self.limit_superpackets(index, mtu).await;
        let mut note = None;
        for net in addresses {
            let added = self.handle.address().add(index, net.addr(), net.prefix_len()).replace().execute().await;
            match (added.map_err(named), net) {
                (Ok(()), _) => {}
                (Err(e), IpNet::V6(_)) => note = Some(NoIpv6(e.to_string())),
                (Err(e), IpNet::V4(_)) => return Err(e),
            }
        }
        Ok(note)
    }

    /// Raises the longest packet an interface takes; what is higher already stays.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        if self.interface(index).await?.is_none_or(|now| now.mtu >= mtu) {
            return Ok(());
        }
        let raise = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.handle.link().set(raise).execute().await.map_err(named)?;
        self.limit_superpackets(index, mtu).await;
        Ok(())
    }

    /// A superpacket that leaves as one train rather than as one and a rest. Only a matter of speed: older kernels do not let
    /// it be set.
    async fn limit_superpackets(&self, index: u32, mtu: u32) {
        // Not fewer than on Ethernet: connections to other peers may have shorter packets.
        let packets = (MAX_BYTES / ((mtu as usize).min(1420) + DATA_OVERHEAD)).clamp(1, MAX_DATAGRAMS);
        let limit = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::GsoMaxSegs(u32::try_from(packets).unwrap_or(1)))
            .build();
        let _ = self.handle.link().set(limit).execute().await;
    }

    /// Packets that the kernel dropped instead of sending them out of an interface; `None` if it is gone or nobody counts.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn dropped(&self, index: u32) -> io::Result<Option<u64>> {
        let mut stream = std::pin::pin!(self.handle.link().get().match_index(index).execute());
        let Some(message) = stream.try_next().await.map_err(other)? else { return Ok(None) };
        Ok(message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
            _ => None,
        }))
    }

    /// An interface by its number; `None` if it is gone.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn interface(&self, index: u32) -> io::Result<Option<Interface>> {
        let mut stream = std::pin::pin!(self.handle.link().get().match_index(index).execute());
        let Some(message) = stream.try_next().await.map_err(other)? else { return Ok(None) };
        let mut found = Interface { name: String::new(), up: message.header.flags.contains(LinkFlags::Up), mtu: 0 };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
                _ => {}
            }
        }
        Ok(Some(found))
    }
}

/// A route that meshd itself has just made. One of ours that is gone is news: somebody may have swept it away.
fn is_own_doing(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => table_of(route) >= OWN_TABLES,
        _ => false,
    }
}

/// Reports that links, addresses or routes changed: 20 ms after the first change, then every 100 ms while they go on, and always
/// after the last.
#[derive(Debug)]
pub struct Changes {
    changed: tokio::sync::mpsc::Receiver<()>,
}

impl Changes {
    /// Subscribes. Do so before the first look, so that no change falls between.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn watch() -> io::Result<Self> {
        use MulticastGroup::{Ipv4Ifaddr, Ipv4Route, Ipv6Ifaddr, Ipv6Route, Link};
        let groups = [Link, Ipv4Ifaddr, Ipv6Ifaddr, Ipv4Route, Ipv6Route];
        let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&groups)?;
        let (tell, changed) = tokio::sync::mpsc::channel(1);
        tokio::spawn(connection);
        tokio::spawn(async move {
            let mut told: Option<tokio::time::Instant> = None;
            while let Some((message, _)) = messages.next().await {
                if is_own_doing(&message) {
                    continue;
                }
                // Swallow what follows within the debounce time, then tell once. A full channel holds the news already.
                let now = tokio::time::Instant::now();
                let at = told.map_or(now, |told| told + REPORTS_APART).max(now + DEBOUNCE);
                let quiet = tokio::time::sleep_until(at);
                tokio::pin!(quiet);
                loop {
                    tokio::select! {
                        () = &mut quiet => break,
                        more = messages.next() => if more.is_none() { break },
                    }
                }
                told = Some(at);
                if let Err(tokio::sync::mpsc::error::TrySendError::Closed(())) = tell.try_send(()) {
                    break;
                }
            }
        });
        Ok(Self { changed })
    }

    /// Waits for the next change.
    pub async fn next(&mut self) {
        if self.changed.recv().await.is_none() {
            // The watch died (the kernel closed the socket): say nothing rather than spin.
            std::future::pending::<()>().await;
        }
    }
}

/// The addresses another node may try: without loopback, multicast and link-local ones, without those of the interface
/// `not_on` (our own TUN device), sorted, each once.
#[must_use]
pub fn candidates(all: &[InterfaceAddress], not_on: u32) -> Vec<LocalAddress> {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(a) => !(a.is_loopback() || a.is_unspecified() || a.is_link_local() || a.is_multicast()),
        IpAddr::V6(a) => !(a.is_loopback() || a.is_unspecified() || a.is_unicast_link_local() || a.is_multicast()),
    };
    let mut list: Vec<_> =
        all.iter().filter(|a| a.index != not_on && usable(&a.address.ip)).map(|a| a.address).collect();
    list.sort_unstable();
    list.dedup();
    list
}

fn table_of(message: &RouteMessage) -> u32 {
    let table = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    table.unwrap_or_else(|| u32::from(message.header.table))
}

fn route(message: &RouteMessage) -> Option<Route> {
    let header: &RouteHeader = &message.header;
    if header.kind != RouteType::Unicast || table_of(message) == TABLE_LOCAL {
        return None;
    }
    let mut index = None;
    let mut destination = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(RouteAddress::Inet(a)) => destination = Some(IpAddr::V4(*a)),
            RouteAttribute::Destination(RouteAddress::Inet6(a)) => destination = Some(IpAddr::V6(*a)),
            _ => {}
        }
    }
    debug_assert!(matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6));
    // No destination is the default route.
    let prefix = IpNet::new(destination?, header.destination_prefix_length).ok()?;
    Some(Route { index, prefix })
}

fn way_out(message: &RouteMessage) -> Option<WayOut> {
    if message.header.kind != RouteType::Unicast || message.header.destination_prefix_length != 0 {
        return None;
    }
    let mut way = WayOut { index: None, gateway: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => way.index = Some(*oif),
            RouteAttribute::Gateway(RouteAddress::Inet(a)) => way.gateway = Some(IpAddr::V4(*a)),
            RouteAttribute::Gateway(RouteAddress::Inet6(a)) => way.gateway = Some(IpAddr::V6(*a)),
            _ => {}
        }
    }
    Some(way)
}

/// A default route over a router.
#[derive(Debug, PartialEq, Eq)]
struct DefaultRoute {
    router: Ipv4Addr,
    index: u32,
    metric: u32,
    source: Option<Ipv4Addr>,
}

fn default_route(message: &RouteMessage) -> Option<DefaultRoute> {
    let (mut router, mut index, mut metric, mut source) = (None, None, 0, None);
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => router = Some(*ip),
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => source = Some(*ip),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(_) => return None,
            _ => {}
        }
    }
    let usual = message.header.kind == RouteType::Unicast && table == TABLE_MAIN;
    if !usual || message.header.destination_prefix_length != 0 {
        return None;
    }
    Some(DefaultRoute { router: router?, index: index?, metric, source })
}

fn other(e: rtnetlink::Error) -> io::Error {
    io::Error::other(e)
}

/// The error as the kernel numbered it.
fn named(e: rtnetlink::Error) -> io::Error {
    match e {
        rtnetlink::Error::NetlinkError(message) => message.code.map_or_else(
            || io::Error::other("netlink"),
            |code| io::Error::from(Errno::from_raw(code.get().saturating_abs())),
        ),
        e => other(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(index: u32, ip: &str, prefix_len: u8) -> InterfaceAddress {
        InterfaceAddress { index, address: LocalAddress { ip: ip.parse().unwrap(), prefix_len } }
    }

    #[test]
    fn candidates_leave_out_what_nobody_else_can_reach() {
        let all = [
            on(1, "127.0.0.1", 8),
            on(1, "::1", 128),
            on(2, "fe80::1", 64),
            on(2, "2001:db8::5", 64),
            on(2, "192.168.1.7", 24),
            on(3, "169.254.3.3", 16),
            on(9, "100.71.0.1", 16),
            on(2, "192.168.1.7", 24),
        ];
        let got: Vec<_> = candidates(&all, 9).iter().map(|a| a.ip.to_string()).collect();
        assert_eq!(got, ["192.168.1.7", "2001:db8::5"]);
    }

    #[test]
    fn a_default_route_over_a_router_of_the_main_table_counts() {
        let router: Ipv4Addr = "192.168.1.1".parse().unwrap();
        let usual = || RouteMessageBuilder::<Ipv4Addr>::new().gateway(router).output_interface(2);
        let found = default_route(&usual().priority(100).build()).unwrap();
        assert_eq!(found, DefaultRoute { router, index: 2, metric: 100, source: None });
        let own = "192.168.1.7".parse().unwrap();
        assert_eq!(default_route(&usual().pref_source(own).build()).unwrap().source, Some(own));
        let elsewhere = usual().destination_prefix("10.0.0.0".parse().unwrap(), 8).build();
        assert_eq!(default_route(&elsewhere), None);
        assert_eq!(default_route(&usual().table_id(51_820).build()), None, "a tunnel's own table");
        let no_router = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(2).build();
        assert_eq!(default_route(&no_router), None);
    }

    #[tokio::test]
    async fn the_loopback_address_is_listed_and_is_not_a_route() {
        let netlink = Netlink::connect().unwrap();
        let addresses = netlink.addresses().await.unwrap();
        let Some(loopback) = addresses.iter().find(|a| a.address.ip.to_string() == "127.0.0.1") else {
            eprintln!("SKIPPED: loopback has no address here");
            return;
        };
        assert_eq!(loopback.address.prefix_len, 8);
        assert_eq!(netlink.interface(loopback.index).await.unwrap().unwrap().name, "lo");
        let routes = netlink.routes().await.unwrap();
        assert!(routes.iter().all(|r| r.prefix.prefix_len() > 0 && !r.prefix.addr().is_loopback()), "{routes:?}");
    }
}

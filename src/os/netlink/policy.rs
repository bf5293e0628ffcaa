//! Routing tables and the rules that choose among them.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt, stream};
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use serde::{Deserialize, Serialize};

use super::{Netlink, named, other, table_of};

/// So many requests are with the kernel before the answer to the first.
const AT_ONCE: usize = 64;
/// The kernel's main routing table.
const MAIN: u32 = 254;

/// A routing policy rule: which table is asked, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// For IPv6 packets rather than IPv4 ones.
    pub v6: bool,
    /// Rules are asked in this order.
    pub priority: u32,
    /// The table it asks.
    pub table: u32,
    /// Only for packets without this mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unless_mark: Option<u32>,
    /// Answers with a prefix of this length or shorter do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suppress: Option<u32>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "-6 " } else { "" };
        write!(f, "{family}rule {}:", self.priority)?;
        if let Some(mark) = self.unless_mark {
            write!(f, " not fwmark {mark:#x}")?;
        }
        write!(f, " lookup {}", self.table)?;
        if let Some(length) = self.suppress {
            write!(f, " suppress_prefixlength {length}")?;
        }
        Ok(())
    }
}

impl Rule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = if self.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.header.action = RuleAction::ToTable;
        message.header.table = u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.attributes.push(RuleAttribute::Table(self.table));
        message.attributes.push(RuleAttribute::Priority(self.priority));
        if let Some(mark) = self.unless_mark {
            message.header.flags = RuleFlags::Invert;
            message.attributes.push(RuleAttribute::FwMark(mark));
            message.attributes.push(RuleAttribute::FwMask(u32::MAX));
        }
        if let Some(length) = self.suppress {
            message.attributes.push(RuleAttribute::SuppressPrefixLen(length));
        }
        message
    }
}

/// A route of a table of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableRoute {
    /// Where to.
    pub prefix: IpNet,
    /// The interface; None: nowhere, with an error to the sender, if nothing better is found.
    pub interface: Option<u32>,
    /// The address that packets of this machine leave under.
    pub source: Option<IpAddr>,
}

/// Of several routes to the same prefix the lowest metric counts; nowhere is the last resort.
const NOWHERE_METRIC: u32 = u32::MAX - 1;

impl TableRoute {
    /// What tells it from the other routes of its table: the prefix, and whether it leads nowhere.
    #[must_use]
    pub const fn key(&self) -> (IpNet, bool) {
        (self.prefix, self.interface.is_none())
    }

    fn message(&self, table: u32) -> io::Result<RouteMessage> {
        let bad = |e: &dyn fmt::Display| io::Error::new(io::ErrorKind::InvalidInput, e.to_string());
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(self.prefix.network(), self.prefix.prefix_len())
            .map_err(|e| bad(&e))?
            .table_id(table);
        builder = match self.interface {
            Some(index) => builder.output_interface(index).scope(RouteScope::Link),
            None => builder.kind(RouteType::Unreachable).priority(NOWHERE_METRIC),
        };
        if let Some(source) = self.source {
            builder = builder.pref_source(source).map_err(|e| bad(&e))?;
        }
        Ok(builder.build())
    }
}

impl Netlink {
    /// Adds a rule; one that is there already is fine.
    ///
    /// # Errors
    /// The kernel refused it.
    pub async fn add_rule(&self, rule: &Rule) -> io::Result<()> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule.message();
        match request.execute().await.map_err(named) {
            Err(e) if e.raw_os_error() == Some(Errno::EEXIST as i32) => Ok(()),
            result => result,
        }
    }

    /// Removes a rule; one that is gone is fine.
    ///
    /// # Errors
    /// The kernel refused it.
    pub async fn remove_rule(&self, rule: &Rule) -> io::Result<()> {
        absent_is_fine(self.handle.rule().del(rule.message()).execute().await.map_err(named))
    }

    /// Adds routes to a table, or replaces those to the same prefixes. None waits for the answer about the one before.
    ///
    /// # Errors
    /// The kernel refused one: which, and why. Others may have been added.
    pub async fn add_routes(&self, table: u32, routes: &[TableRoute]) -> Result<(), (IpNet, io::Error)> {
        let add = |route: &TableRoute| {
            let (prefix, message, handle) = (route.prefix, route.message(table), self.handle.clone());
            async move {
                let message = message.map_err(|e| (prefix, e))?;
                handle.route().add(message).replace().execute().await.map_err(|e| (prefix, named(e)))
            }
        };
        stream::iter(routes.iter().map(add)).buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Removes routes from a table, by what tells them from others; those that are gone are fine.
    ///
    /// # Errors
    /// The kernel refused it.
    pub async fn remove_routes(&self, table: u32, gone: &BTreeSet<(IpNet, bool)>) -> io::Result<()> {
        if gone.is_empty() {
            return Ok(());
        }
        self.remove_those(|m| table_of(m) == table && key(m).is_some_and(|key| gone.contains(&key))).await
    }

    /// Removes every route of a table, in both families.
    ///
    /// # Errors
    /// The kernel refused to list or remove one.
    pub async fn flush_table(&self, table: u32) -> io::Result<()> {
        self.remove_those(|m| table_of(m) == table).await
    }

    async fn remove_those(&self, meant: impl Fn(&RouteMessage) -> bool) -> io::Result<()> {
        let remove = |message| {
            let handle = self.handle.clone();
            async move { absent_is_fine(handle.route().del(message).execute().await.map_err(named)) }
        };
        let found = self.dump().await?.into_iter().filter(meant);
        stream::iter(found.map(remove)).buffer_unordered(AT_ONCE).try_collect().await
    }

    /// The routes of a table: where to, and whether nowhere.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn table(&self, table: u32) -> io::Result<Vec<(IpNet, bool)>> {
        Ok(self.dump().await?.iter().filter(|m| table_of(m) == table).filter_map(key).collect())
    }

    /// The interfaces that default routes of the main table lead to, for one family.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn default_interfaces(&self, v6: bool) -> io::Result<Vec<u32>> {
        let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let mut found = Vec::new();
        for message in self.dump().await? {
            let header = &message.header;
            if header.address_family != family
                || header.destination_prefix_length != 0
                || header.kind != RouteType::Unicast
                || table_of(&message) != MAIN
            {
                continue;
            }
            for attribute in &message.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => found.push(*index),
                    RouteAttribute::MultiPath(hops) => found.extend(hops.iter().map(|hop| hop.interface_index)),
                    _ => {}
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Every route of every table.
    async fn dump(&self) -> io::Result<Vec<RouteMessage>> {
        let mut found = Vec::new();
        for request in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let mut stream = std::pin::pin!(self.handle.route().get(request).execute());
            while let Some(message) = stream.try_next().await.map_err(other)? {
                found.push(message);
            }
        }
        Ok(found)
    }
}

fn key(message: &RouteMessage) -> Option<(IpNet, bool)> {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(a)) => Some(IpAddr::V4(*a)),
        RouteAttribute::Destination(RouteAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
        _ => None,
    });
    let prefix = IpNet::new(destination.unwrap_or(any), message.header.destination_prefix_length).ok()?;
    Some((prefix, message.header.kind == RouteType::Unreachable))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    const ABSENT: [Errno; 4] = [Errno::ENOENT, Errno::ESRCH, Errno::ENODEV, Errno::EAFNOSUPPORT];
    match result {
        Err(e) if e.raw_os_error().is_some_and(|code| ABSENT.contains(&Errno::from_raw(code))) => Ok(()),
        result => result,
    }
}

//! Other numbers for the networks behind this node. Packets for an alias come in and go on under the addresses that the
//! machines there have; what these answer leaves under the alias again. One to one, by the bits of the prefix alone.
//!
//! A machine behind this node can be reached by its own address too, and its answers must come from the address that was
//! asked. So flows that came by the real address are remembered; all others leave under the alias, also those that a machine
//! there begins. What is remembered is one word a flow in a table of fixed size: when it is full, or the daemon restarts, a
//! flow by the real address is taken for one by the alias until its next packet comes in.

use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;
use rustc_hash::FxBuildHasher;

use crate::engine::prefixes::Prefixes;
use crate::wire::renumber::{End, Look, look, renumber, renumber_quoted};

/// Flows remembered: a power of two. 64 KiB.
const FLOWS: usize = 8_192;

/// Flows that came by real addresses. Shared by both directions of the packet path; a word is read or written at once, and
/// nothing else depends on it. The table is made when the first is remembered.
#[derive(Debug, Default)]
pub struct RealFlows(OnceLock<Box<[AtomicU64]>>);

impl RealFlows {
    fn set(&self, flow: u64, real: bool) {
        if real {
            let table = self.0.get_or_init(|| std::iter::repeat_with(AtomicU64::default).take(FLOWS).collect());
            if let Some(place) = place(table, flow) {
                place.store(flow, Ordering::Relaxed);
            }
        } else if self.holds(flow)
            && let Some(place) = self.0.get().and_then(|table| place(table, flow))
        {
            place.store(0, Ordering::Relaxed);
        }
    }

    fn holds(&self, flow: u64) -> bool {
        let place = self.0.get().and_then(|table| place(table, flow));
        place.is_some_and(|place| place.load(Ordering::Relaxed) == flow)
    }
}

/// Where a flow stands in the table, if anywhere.
fn place(table: &[AtomicU64], flow: u64) -> Option<&AtomicU64> {
    table.get((flow >> 32) as usize % FLOWS)
}

/// What is renumbered how. Each direction of a worker has one.
#[derive(Debug)]
pub struct Aliases {
    to_real: Prefixes<IpNet>,
    to_alias: Prefixes<IpNet>,
    flows: Arc<RealFlows>,
}

impl Aliases {
    /// `pairs`: a real prefix and its alias each, of the same family and length. None: nothing is renumbered.
    #[must_use]
    pub fn new(pairs: &[(IpNet, IpNet)], flows: &Arc<RealFlows>) -> Option<Box<Self>> {
        if pairs.is_empty() {
            return None;
        }
        let mut aliases =
            Self { to_real: Prefixes::default(), to_alias: Prefixes::default(), flows: Arc::clone(flows) };
        for (real, alias) in pairs {
            aliases.to_real.insert(*alias, *real);
            aliases.to_alias.insert(*real, *alias);
        }
        Some(Box::new(aliases))
    }

    /// A packet came out of the tunnel, or is an error for one that was to go in. Returns where it goes.
    pub fn arrive(&self, packet: &mut [u8], destination: IpAddr) -> IpAddr {
        let real = self.to_real.longest(destination);
        if real.is_none() && self.to_alias.longest(destination).is_none() {
            return destination;
        }
        let Some(seen) = look(packet) else { return destination };
        let here = real.map_or(destination, |real| exchange(destination, real));
        match seen.quoted {
            None if seen.l4.is_some() => self.flows.set(incoming(&seen, here), real.is_none()),
            // The rest of a fragmented packet says nothing, and an error speaks of a packet that went the other way.
            None => {}
            Some(at) => {
                let inner = packet.get(at..).and_then(look);
                let of = inner.and_then(|inner| Some((inner.source, self.to_real.longest(inner.source)?)));
                if let Some((source, real)) = of {
                    renumber_quoted(packet, End::Source, exchange(source, real), false);
                }
            }
        }
        if real.is_some() {
            renumber(packet, End::Destination, here, false);
        }
        here
    }

    /// A packet is about to go into the tunnel. `partial`: its checksum is not complete.
    pub fn leave(&self, packet: &mut [u8], source: IpAddr, partial: bool) {
        let alias = self.to_alias.longest(source);
        // Errors may come from anywhere, also from this machine itself.
        let is_icmp = match packet.first().map(|first| first >> 4) {
            Some(4) => packet.get(9) == Some(&1),
            _ => true,
        };
        if alias.is_none() && !is_icmp {
            return;
        }
        let Some(seen) = look(packet) else { return };
        let by_alias = match seen.quoted.and_then(|at| packet.get(at..)).and_then(look) {
            // It is about a packet that came in.
            Some(inner) => match self.to_alias.longest(inner.destination) {
                Some(of) => {
                    let by_alias = !self.flows.holds(incoming(&inner, inner.destination));
                    if by_alias {
                        renumber_quoted(packet, End::Destination, exchange(inner.destination, of), partial);
                    }
                    by_alias
                }
                None => true,
            },
            None => alias.is_some() && self.leaves_by_alias(&seen),
        };
        if let Some(alias) = alias.filter(|_| by_alias) {
            renumber(packet, End::Source, exchange(source, alias), partial);
        }
    }

    fn leaves_by_alias(&self, seen: &Look) -> bool {
        // All fragments between two machines go as the latest first one did.
        let together = flow(seen.source, seen.destination, seen.protocol, (u16::MAX, u16::MAX));
        if seen.l4.is_none() {
            return !self.flows.holds(together);
        }
        let (a, b) = seen.ports;
        let real = self.flows.holds(flow(seen.source, seen.destination, seen.protocol, (a, b)));
        if seen.fragment {
            self.flows.set(together, real);
        }
        !real
    }
}

/// The flow of a packet that came in for a machine here.
fn incoming(seen: &Look, here: IpAddr) -> u64 {
    let (theirs, ours) = seen.ports;
    flow(here, seen.source, seen.protocol, (ours, theirs))
}

fn flow(here: IpAddr, there: IpAddr, protocol: u8, ports: (u16, u16)) -> u64 {
    // Never zero, which stands for nothing.
    FxBuildHasher.hash_one((here, there, protocol, ports)) | 1
}

/// The address with the bits of this prefix in place of its own.
#[must_use]
pub fn exchange(ip: IpAddr, prefix: IpNet) -> IpAddr {
    match (ip, prefix) {
        (IpAddr::V4(ip), IpNet::V4(net)) => {
            let host = u32::from(net.hostmask());
            Ipv4Addr::from(u32::from(net.network()) | (u32::from(ip) & host)).into()
        }
        (IpAddr::V6(ip), IpNet::V6(net)) => {
            let host = u128::from(net.hostmask());
            Ipv6Addr::from(u128::from(net.network()) | (u128::from(ip) & host)).into()
        }
        (ip, _) => ip,
    }
}

#[cfg(test)]
mod tests;

//! The kernel's table of neighbours (ARP and Neighbor Discovery), and asking the kernel to ask one of them.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::{Netlink, named, other};

/// Times in the table are counted in these (`USER_HZ`, 100 a second on every architecture Rust knows).
const TICK: Duration = Duration::from_millis(10);

/// A machine on the same link as one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub index: u32,
    /// The machine.
    pub ip: IpAddr,
    /// How long ago it answered, or was seen to receive; None: it is not known to be there now.
    pub answered: Option<Duration>,
    /// Its link-layer address is known, right or not.
    known: bool,
    is_router: bool,
}

impl Netlink {
    /// The neighbours of both families.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn neighbours(&self) -> io::Result<Vec<Neighbour>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let request = self.handle.neighbours().get().set_address_family(family);
            let mut stream = std::pin::pin!(request.execute());
            while let Some(message) = stream.try_next().await.map_err(other)? {
                found.extend(neighbour(&message));
            }
        }
        Ok(found)
    }

    /// Has the kernel ask a machine whether it is there: at once, and again a second later. `known`: the entries of the table
    /// as listed last.
    ///
    /// # Errors
    /// The kernel refused; an entry that went meanwhile is asked for the next time.
    pub async fn ask_neighbour(&self, index: u32, ip: IpAddr, known: &[Neighbour]) -> io::Result<()> {
        let entry = known.iter().find(|n| n.index == index && n.ip == ip && n.known);
        let Some(entry) = entry else {
            // As if somebody had a packet for it.
            return self.set_neighbour(index, ip, NeighbourState::None, NeighbourFlags::Use).await;
        };
        let flags = if entry.is_router { NeighbourFlags::Router } else { NeighbourFlags::empty() };
        // An entry that is being asked for already is not asked for again: so it is not, first.
        self.set_neighbour(index, ip, NeighbourState::Stale, flags).await?;
        self.set_neighbour(index, ip, NeighbourState::Probe, flags).await
    }

    async fn set_neighbour(
        &self,
        index: u32,
        ip: IpAddr,
        state: NeighbourState,
        flags: NeighbourFlags,
    ) -> io::Result<()> {
        let request = self.handle.neighbours().add(index, ip).state(state).flags(flags).replace();
        request.execute().await.map_err(named)
    }

    /// The interfaces that are switched on and have carrier.
    ///
    /// # Errors
    /// The kernel's answer could not be read.
    pub async fn with_carrier(&self) -> io::Result<Vec<u32>> {
        let both = LinkFlags::Up | LinkFlags::LowerUp;
        let mut found = Vec::new();
        let mut stream = std::pin::pin!(self.handle.link().get().execute());
        while let Some(message) = stream.try_next().await.map_err(other)? {
            if message.header.flags.contains(both) {
                found.push(message.header.index);
            }
        }
        Ok(found)
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let state = message.header.state;
    let (mut ip, mut age, mut addressed) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => ip = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => ip = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(address) => addressed = !address.is_empty(),
            NeighbourAttribute::CacheInfo(info) => age = Some(TICK * info.confirmed),
            _ => {}
        }
    }
    let valid = [NeighbourState::Reachable, NeighbourState::Stale, NeighbourState::Delay, NeighbourState::Probe];
    Some(Neighbour {
        index: message.header.ifindex,
        ip: ip.filter(|ip| !ip.is_multicast())?,
        answered: age.filter(|_| state == NeighbourState::Reachable),
        known: addressed && valid.contains(&state),
        is_router: message.header.flags.contains(NeighbourFlags::Router),
    })
}

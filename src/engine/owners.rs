//! Prefix → the peers it belongs to, of which there may be several.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::engine::io::PeerId;
use crate::engine::prefixes::Prefixes;

/// Who owns which prefix. Nearly all have one owner, and there are many prefixes, so only the others have a list.
#[derive(Debug, Default)]
pub struct Owners {
    prefixes: Prefixes<Owner>,
    lists: Vec<Vec<PeerId>>,
    /// Lists that are not in use.
    free: Vec<usize>,
}

/// The owners of one prefix; [`Owners::contains`] tells who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This peer alone.
    One(PeerId),
    /// Those in the list with this number.
    Several(usize),
}

impl Owners {
    /// Adds a peer to the owners of a prefix.
    pub fn add(&mut self, net: IpNet, peer: PeerId) {
        let owner = match self.prefixes.get(net) {
            None => Owner::One(peer),
            Some(Owner::One(one)) if one == peer => return,
            Some(Owner::One(one)) => {
                let number = self.free.pop().unwrap_or(self.lists.len());
                self.lists.resize_with(self.lists.len().max(number + 1), Vec::new);
                self.lists[number] = vec![one, peer];
                Owner::Several(number)
            }
            Some(Owner::Several(number)) => {
                let list = &mut self.lists[number];
                if !list.contains(&peer) {
                    list.push(peer);
                }
                return;
            }
        };
        self.prefixes.insert(net, owner);
    }

    /// Gives a prefix that never has several owners to this one alone.
    pub fn give(&mut self, net: IpNet, peer: PeerId) {
        self.prefixes.insert(net, Owner::One(peer));
    }

    /// Takes a peer from the owners of a prefix.
    pub fn remove(&mut self, net: IpNet, peer: PeerId) {
        match self.prefixes.get(net) {
            Some(Owner::One(one)) if one == peer => {
                self.prefixes.remove(net);
            }
            Some(Owner::Several(number)) => {
                let list = &mut self.lists[number];
                list.retain(|owner| *owner != peer);
                if let [last] = list[..] {
                    list.clear();
                    self.free.push(number);
                    self.prefixes.insert(net, Owner::One(last));
                }
            }
            Some(Owner::One(_)) | None => {}
        }
    }

    /// In this range only single addresses have owners.
    pub fn reserve(&mut self, range: IpNet) {
        self.prefixes.reserve(range);
    }

    /// The owners of the longest prefix that holds `ip`.
    #[inline]
    #[must_use]
    pub fn longest(&self, ip: IpAddr) -> Option<Owner> {
        self.prefixes.longest(ip)
    }

    /// True if the peer is one of them.
    #[inline]
    #[must_use]
    pub fn contains(&self, owner: Owner, peer: PeerId) -> bool {
        match owner {
            Owner::One(one) => one == peer,
            Owner::Several(number) => self.lists.get(number).is_some_and(|list| list.contains(&peer)),
        }
    }

    /// Lists in use, and all that were made.
    #[cfg(test)]
    pub(super) fn lists(&self) -> (usize, usize) {
        (self.lists.iter().filter(|list| !list.is_empty()).count(), self.lists.len() - self.free.len())
    }
}

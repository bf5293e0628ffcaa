//! Longest match: what belongs to the longest prefix that holds an address.
//!
//! The answers for the addresses asked for lately are kept, and asked for first: a packet's address was nearly always that of
//! a packet a moment ago, and then one place of memory is looked at, however large the network and whatever the family.
//!
//! Behind it, the single addresses of a family (the mesh's own) are in one hash map, and its prefixes in another, which is
//! asked for each length in use, the longest first. Figures are in `docs/performance.md`.

use std::cell::Cell;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;

use ipnet::IpNet;
use rustc_hash::{FxBuildHasher, FxHashMap};

/// Places for answers: a power of two, and many times the addresses that a busy node talks to, so that few share one.
const KEPT: usize = 4096;

/// Prefix → value. Values are small and handed out by copy.
#[derive(Debug)]
pub struct Prefixes<T> {
    v4: Table<u32, T>,
    v6: Table<u128, T>,
    reserved: Vec<IpNet>,
}

impl<T> Default for Prefixes<T> {
    fn default() -> Self {
        Self { v4: Table::default(), v6: Table::default(), reserved: Vec::new() }
    }
}

impl<T: Copy> Prefixes<T> {
    /// Sets the value of a prefix whose host bits are zero. Returns the one it had.
    pub fn insert(&mut self, net: IpNet, value: T) -> Option<T> {
        match net {
            IpNet::V4(net) => self.v4.insert(net.addr().to_bits(), net.prefix_len(), value),
            IpNet::V6(net) => self.v6.insert(net.addr().to_bits(), net.prefix_len(), value),
        }
    }

    /// Takes out a prefix whose host bits are zero.
    pub fn remove(&mut self, net: IpNet) -> Option<T> {
        match net {
            IpNet::V4(net) => self.v4.remove(net.addr().to_bits(), net.prefix_len()),
            IpNet::V6(net) => self.v6.remove(net.addr().to_bits(), net.prefix_len()),
        }
    }

    /// The value of exactly this prefix, whose host bits are zero.
    #[must_use]
    pub fn get(&self, net: IpNet) -> Option<T> {
        match net {
            IpNet::V4(net) => self.v4.get(net.addr().to_bits(), net.prefix_len()),
            IpNet::V6(net) => self.v6.get(net.addr().to_bits(), net.prefix_len()),
        }
    }

    /// In this range only single addresses count, whatever prefixes it lies in.
    pub fn reserve(&mut self, range: IpNet) {
        self.reserved.push(range);
        self.v4.forget();
        self.v6.forget();
    }

    /// The value of the longest prefix that holds `ip`.
    #[inline]
    #[must_use]
    pub fn longest(&self, ip: IpAddr) -> Option<T> {
        let free = || !self.reserved.iter().any(|range| range.contains(&ip));
        match ip {
            IpAddr::V4(ip) => self.v4.longest(ip.to_bits(), free),
            IpAddr::V6(ip) => self.v6.longest(ip.to_bits(), free),
        }
    }
}

/// An address as a number.
trait Bits: Copy + Default + Eq + Hash + fmt::Debug {
    const LEN: u8;
    /// The address with all bits behind the first `len` zero.
    fn first(self, len: u8) -> Self;
}

impl Bits for u32 {
    const LEN: u8 = 32;

    fn first(self, len: u8) -> Self {
        self & Self::MAX.checked_shl(32 - Self::from(len)).unwrap_or_default()
    }
}

impl Bits for u128 {
    const LEN: u8 = 128;

    fn first(self, len: u8) -> Self {
        self & Self::MAX.checked_shl(128 - u32::from(len)).unwrap_or_default()
    }
}

/// The prefixes of one address family.
struct Table<A, T> {
    hosts: FxHashMap<A, T>,
    nets: FxHashMap<(A, u8), T>,
    /// The lengths in `nets`, the longest first, and how many prefixes have each.
    lengths: Vec<(u8, usize)>,
    /// Empty while there is nothing to answer.
    kept: Box<[Cell<Kept<A, T>>]>,
    /// Counts changes; what is kept from before one is void.
    change: u64,
}

/// What the answer for an address was.
#[derive(Debug, Clone, Copy)]
struct Kept<A, T> {
    ip: A,
    value: Option<T>,
    /// See [`Table::change`]; 0: nothing is kept here.
    at: u64,
}

impl<A: Default, T> Default for Kept<A, T> {
    fn default() -> Self {
        Self { ip: A::default(), value: None, at: 0 }
    }
}

impl<A: fmt::Debug, T: fmt::Debug> fmt::Debug for Table<A, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("hosts", &self.hosts).field("nets", &self.nets).finish_non_exhaustive()
    }
}

impl<A, T> Default for Table<A, T> {
    fn default() -> Self {
        Self {
            hosts: FxHashMap::default(),
            nets: FxHashMap::default(),
            lengths: Vec::new(),
            kept: Box::default(),
            change: 0,
        }
    }
}

impl<A: Bits, T: Copy> Table<A, T> {
    fn insert(&mut self, ip: A, len: u8, value: T) -> Option<T> {
        if self.kept.is_empty() {
            self.kept = std::iter::repeat_with(Cell::default).take(KEPT).collect();
        }
        self.forget();
        if len == A::LEN {
            return self.hosts.insert(ip, value);
        }
        let before = self.nets.insert((ip, len), value);
        if before.is_none() {
            match self.lengths.binary_search_by(|(known, _)| len.cmp(known)) {
                Ok(at) => self.lengths[at].1 += 1,
                Err(at) => self.lengths.insert(at, (len, 1)),
            }
        }
        before
    }

    fn remove(&mut self, ip: A, len: u8) -> Option<T> {
        self.forget();
        if len == A::LEN {
            return self.hosts.remove(&ip);
        }
        let removed = self.nets.remove(&(ip, len))?;
        if let Ok(at) = self.lengths.binary_search_by(|(known, _)| len.cmp(known)) {
            self.lengths[at].1 -= 1;
            if self.lengths[at].1 == 0 {
                self.lengths.remove(at);
            }
        }
        Some(removed)
    }

    fn get(&self, ip: A, len: u8) -> Option<T> {
        if len == A::LEN { self.hosts.get(&ip) } else { self.nets.get(&(ip, len)) }.copied()
    }

    /// What is kept is void.
    const fn forget(&mut self) {
        self.change += 1;
    }

    #[inline]
    fn longest(&self, ip: A, free: impl Fn() -> bool) -> Option<T> {
        #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
        let place = FxBuildHasher.hash_one(ip) as usize % KEPT;
        let kept = self.kept.get(place)?;
        let Kept { ip: asked, value, at } = kept.get();
        if asked == ip && at == self.change {
            return value;
        }
        let value = self.search(ip, free);
        kept.set(Kept { ip, value, at: self.change });
        value
    }

    fn search(&self, ip: A, free: impl Fn() -> bool) -> Option<T> {
        if let Some(value) = self.hosts.get(&ip) {
            return Some(*value);
        }
        let mut lengths = self.lengths.iter().map(|(len, _)| *len);
        lengths.find_map(|len| self.nets.get(&(ip.first(len), len))).copied().filter(|_| free())
    }
}

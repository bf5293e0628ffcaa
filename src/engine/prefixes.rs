//! Longest match: what belongs to the longest prefix that holds an address.
//!
//! The prefixes of a family are in one hash map, which is asked for each length in use, the longest first. Single addresses,
//! the mesh's own, are in another, which is asked before: nearly all lookups end there. A network may use many lengths; which
//! was the right one is kept for the addresses asked for lately. With 65,536 members and 10,000 prefixes a lookup takes
//! 3 to 25 ns (`benches/`).

use std::cell::Cell;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;

use ipnet::IpNet;
use rustc_hash::{FxBuildHasher, FxHashMap};

/// Addresses whose prefix length is kept: a power of two.
const KEPT: usize = 1024;

/// Prefix → value.
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

impl<T> Prefixes<T> {
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
    pub fn get_mut(&mut self, net: IpNet) -> Option<&mut T> {
        match net {
            IpNet::V4(net) => self.v4.get_mut(net.addr().to_bits(), net.prefix_len()),
            IpNet::V6(net) => self.v6.get_mut(net.addr().to_bits(), net.prefix_len()),
        }
    }

    /// In this range only single addresses count, whatever prefixes it lies in.
    pub fn reserve(&mut self, range: IpNet) {
        self.reserved.push(range);
        self.v4.nets_change();
        self.v6.nets_change();
    }

    /// The value of the longest prefix that holds `ip`.
    #[must_use]
    pub fn longest(&self, ip: IpAddr) -> Option<&T> {
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
    /// Empty while there are no nets.
    kept: Box<[Cell<Kept<A>>]>,
    /// Counts changes of `nets`; what is kept from before one is void.
    change: u64,
}

/// Which prefix holds an address.
#[derive(Debug, Clone, Copy, Default)]
struct Kept<A> {
    ip: A,
    /// None: none does.
    len: Option<u8>,
    /// See [`Table::change`]; 0: nothing is kept here.
    at: u64,
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

impl<A: Bits, T> Table<A, T> {
    fn insert(&mut self, ip: A, len: u8, value: T) -> Option<T> {
        if len == A::LEN {
            return self.hosts.insert(ip, value);
        }
        let before = self.nets.insert((ip, len), value);
        if before.is_none() {
            match self.lengths.binary_search_by(|(known, _)| len.cmp(known)) {
                Ok(at) => self.lengths[at].1 += 1,
                Err(at) => self.lengths.insert(at, (len, 1)),
            }
            if self.kept.is_empty() {
                self.kept = std::iter::repeat_with(Cell::default).take(KEPT).collect();
            }
            self.nets_change();
        }
        before
    }

    fn remove(&mut self, ip: A, len: u8) -> Option<T> {
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
        self.nets_change();
        Some(removed)
    }

    fn get_mut(&mut self, ip: A, len: u8) -> Option<&mut T> {
        if len == A::LEN { self.hosts.get_mut(&ip) } else { self.nets.get_mut(&(ip, len)) }
    }

    const fn nets_change(&mut self) {
        self.change += 1;
    }

    fn longest(&self, ip: A, free: impl Fn() -> bool) -> Option<&T> {
        if let Some(value) = self.hosts.get(&ip) {
            return Some(value);
        }
        if self.lengths.is_empty() {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
        let place = FxBuildHasher.hash_one(ip) as usize % KEPT;
        let kept = self.kept.get(place)?;
        let Kept { ip: asked, len, at } = kept.get();
        if asked == ip && at == self.change {
            return self.nets.get(&(ip.first(len?), len?));
        }
        let mut lengths = self.lengths.iter().map(|(len, _)| *len);
        let found = lengths.find_map(|len| Some((len, self.nets.get(&(ip.first(len), len))?))).filter(|_| free());
        kept.set(Kept { ip, len: found.map(|(len, _)| len), at: self.change });
        found.map(|(_, value)| value)
    }
}

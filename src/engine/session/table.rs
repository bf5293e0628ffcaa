//! Session indices: which are taken, and which tunnel each belongs to.

use rand::Rng;
use rustc_hash::FxHashMap;

use crate::wire::wireguard;

/// Tunnel indices are 24 bits: boringtun shifts them left by eight and counts sessions in the lowest byte, silently
/// losing anything above.
const INDEX_MASK: u32 = 0x00FF_FFFF;
/// Draws before giving up. With half of all 16.7 million indices taken, 64 draws all hit a taken one with chance 2⁻⁶⁴.
const DRAWS: usize = 64;

/// Gives out tunnel indices. They are random, so that an index says nothing about how many peers there are and a
/// restarted node does not mistake old data for new.
#[derive(Debug, Default)]
pub struct IndexAllocator {
    taken: FxHashMap<u32, ()>,
}

impl IndexAllocator {
    /// A free 24-bit index, taken until [`Self::free`]. Never one whose sessions could be mistaken for STUN. None if
    /// (nearly) all are taken.
    pub fn allocate(&mut self, rng: &mut impl Rng) -> Option<u32> {
        for _ in 0..DRAWS {
            let index = rng.next_u32() & INDEX_MASK;
            if !wireguard::is_reserved(index) && self.taken.insert(index, ()).is_none() {
                return Some(index);
            }
        }
        None
    }

    /// Makes an index available again.
    pub fn free(&mut self, index: u32) {
        self.taken.remove(&index);
    }
}

/// Tunnel index → whatever belongs to it. One lookup a packet.
#[derive(Debug)]
pub struct SessionTable<T> {
    by_index: FxHashMap<u32, T>,
}

impl<T> Default for SessionTable<T> {
    fn default() -> Self {
        Self { by_index: FxHashMap::default() }
    }
}

impl<T> SessionTable<T> {
    /// Registers a tunnel; returns what was there before.
    pub fn insert(&mut self, index: u32, value: T) -> Option<T> {
        self.by_index.insert(index, value)
    }

    /// Forgets a tunnel.
    pub fn remove(&mut self, index: u32) -> Option<T> {
        self.by_index.remove(&index)
    }

    /// What belongs to a tunnel index.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<&T> {
        self.by_index.get(&index)
    }

    /// What belongs to a tunnel index.
    #[must_use]
    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.by_index.get_mut(&index)
    }

    /// What the session index in a received datagram belongs to (see [`wireguard::receiver_index`]).
    #[must_use]
    pub fn by_session(&self, session_index: u32) -> Option<&T> {
        self.get(wireguard::tunnel_index(session_index))
    }

    /// What the session index in a received datagram belongs to.
    #[must_use]
    pub fn by_session_mut(&mut self, session_index: u32) -> Option<&mut T> {
        self.get_mut(wireguard::tunnel_index(session_index))
    }

    /// How many tunnels are registered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_index.len()
    }

    /// True if none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    use rand::SeedableRng;
    use rand::TryRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::wire::stun::MAGIC_COOKIE;

    #[test]
    fn indices_are_24_bit_distinct_and_reusable() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut allocator = IndexAllocator::default();
        let indices: BTreeSet<_> = (0..1000).map(|_| allocator.allocate(&mut rng).unwrap()).collect();
        assert_eq!(indices.len(), 1000);
        assert!(indices.iter().all(|i| *i <= INDEX_MASK));
        let first = *indices.first().unwrap();
        allocator.free(first);
        let mut only = Fixed(first);
        assert_eq!(allocator.allocate(&mut only), Some(first));
        assert_eq!(allocator.allocate(&mut only), None, "taken, and the generator yields nothing else");
    }

    #[test]
    fn the_index_of_the_stun_cookie_is_never_given_out() {
        let mut rng = Fixed(wireguard::tunnel_index(u32::from_le_bytes(MAGIC_COOKIE)));
        assert_eq!(IndexAllocator::default().allocate(&mut rng), None);
    }

    #[test]
    fn a_session_finds_its_tunnel_whatever_its_lowest_byte() {
        let mut table = SessionTable::default();
        assert_eq!(table.insert(0x00AB_CDEF, 'x'), None);
        for low in 0..=255 {
            assert_eq!(table.by_session(0xABCD_EF00 | low), Some(&'x'));
        }
        assert_eq!(table.by_session(0xABCD_EE00), None);
        assert_eq!(table.remove(0x00AB_CDEF), Some('x'));
        assert!(table.is_empty());
    }

    /// A generator stuck on one number.
    struct Fixed(u32);

    impl TryRng for Fixed {
        type Error = Infallible;
        fn try_next_u32(&mut self) -> Result<u32, Infallible> {
            Ok(self.0)
        }
        fn try_next_u64(&mut self) -> Result<u64, Infallible> {
            Ok(u64::from(self.0))
        }
        fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
            dst.fill(0);
            Ok(())
        }
    }
}

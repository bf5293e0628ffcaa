//! How often one source may ask: a token bucket per source, in bounded memory.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::time::Now;

/// How often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// This many at once.
    pub burst: u32,
    /// And one more each time this has passed.
    pub every: Duration,
}

/// How much of an address makes a source: everybody in one such prefix shares a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grain {
    /// Bits of an IPv4 address, at most 32.
    pub v4: u8,
    /// Bits of an IPv6 address, at most 128.
    pub v6: u8,
}

impl Grain {
    /// One host: an IPv4 address, or the /64 an IPv6 host can pick addresses from.
    pub const HOST: Self = Self { v4: 32, v6: 64 };
    /// One site: for sources that can be forged.
    pub const SITE: Self = Self { v4: 24, v6: 56 };

    /// The source that `address` belongs to. An IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2) is an IPv4 one.
    #[must_use]
    pub fn source(self, address: IpAddr) -> IpAddr {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.v4.min(32))).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(v4) & mask))
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.v6.min(128))).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(v6) & mask))
            }
        }
    }
}

/// A token bucket per source.
///
/// Of each bucket only the time is kept at which it will be full again; a full bucket needs no entry. Entries live in two
/// generations: when the young one is full, the old one is forgotten. So a flood of sources costs bounded memory and no
/// sweep, and what it makes the limiter forget are the sources not heard of for longest.
#[derive(Debug)]
pub struct SourceLimiter {
    rate: Rate,
    grain: Grain,
    generation: usize,
    young: BTreeMap<IpAddr, Now>,
    old: BTreeMap<IpAddr, Now>,
}

impl SourceLimiter {
    /// A limiter that remembers at most about `capacity` sources.
    #[must_use]
    pub const fn new(rate: Rate, grain: Grain, capacity: usize) -> Self {
        let generation = if capacity < 2 { 1 } else { capacity / 2 };
        Self { rate, grain, generation, young: BTreeMap::new(), old: BTreeMap::new() }
    }

    /// Takes a token from the bucket of `from`. False: there is none, and none was taken.
    pub fn allow(&mut self, from: IpAddr, now: Now) -> bool {
        let source = self.grain.source(from);
        let full_at = self.young.get(&source).or_else(|| self.old.get(&source)).copied().unwrap_or(now).max(now);
        let after = full_at + self.rate.every;
        let allowed = after.since(now) <= self.rate.every.saturating_mul(self.rate.burst);
        if self.young.len() >= self.generation && !self.young.contains_key(&source) {
            self.old = std::mem::take(&mut self.young);
        }
        // Also when refused: who keeps asking must not be forgotten.
        self.young.insert(source, if allowed { after } else { full_at });
        allowed
    }

    /// How many sources are remembered.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 3, every: Duration::from_secs(1) };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_burst_then_one_each_interval() {
        let mut limiter = SourceLimiter::new(RATE, Grain::HOST, 100);
        let at = |ms| Now::from_millis(ms);
        let mut allowed = |ms| limiter.allow(ip("192.0.2.1"), at(ms));
        assert_eq!([allowed(0), allowed(0), allowed(0), allowed(0)], [true, true, true, false]);
        assert_eq!([allowed(999), allowed(1_000), allowed(1_001)], [false, true, false]);
        assert_eq!([allowed(60_000), allowed(60_000), allowed(60_000), allowed(60_000)], [true, true, true, false]);
    }

    #[test]
    fn sources_are_prefixes() {
        let same = |grain: Grain, a, b| grain.source(ip(a)) == grain.source(ip(b));
        assert!(!same(Grain::HOST, "192.0.2.1", "192.0.2.2"));
        assert!(same(Grain::SITE, "192.0.2.1", "192.0.2.200"));
        assert!(!same(Grain::SITE, "192.0.2.1", "192.0.3.1"));
        assert!(same(Grain::HOST, "2001:db8::1", "2001:db8::ffff:1"));
        assert!(!same(Grain::HOST, "2001:db8:0:1::1", "2001:db8:0:2::1"));
        assert!(same(Grain::SITE, "2001:db8:0:1::1", "2001:db8:0:2::1"));
        assert!(same(Grain::HOST, "::ffff:192.0.2.1", "192.0.2.1"));
        assert!(same(Grain { v4: 0, v6: 0 }, "192.0.2.1", "10.0.0.1"));
    }

    #[test]
    fn one_source_does_not_use_up_another_s() {
        let mut limiter = SourceLimiter::new(RATE, Grain::HOST, 100);
        for _ in 0..10 {
            limiter.allow(ip("192.0.2.1"), Now::ZERO);
        }
        assert!(limiter.allow(ip("192.0.2.2"), Now::ZERO));
    }

    #[test]
    fn memory_is_bounded_and_a_busy_source_is_not_forgotten_by_a_flood_of_others() {
        let mut limiter = SourceLimiter::new(RATE, Grain::HOST, 1_000);
        for i in 0..100_000_u32 {
            if i % 400 == 0 {
                let allowed = limiter.allow(ip("192.0.2.1"), Now::ZERO);
                assert_eq!(allowed, i < 3 * 400, "at {i}");
            }
            limiter.allow(IpAddr::from(Ipv4Addr::from(0x0a00_0000 + i)), Now::ZERO);
            assert!(limiter.remembered() <= 1_000);
        }
    }
}

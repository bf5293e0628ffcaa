//! So much at once, and so much a second: what others may make this node do.

use std::time::Duration;

use crate::time::Now;

/// A token bucket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    capacity: u32,
    per_second: u32,
    left: u32,
    refilled: Now,
}

impl Bucket {
    /// A full one.
    pub(crate) const fn new(capacity: u32, per_second: u32, now: Now) -> Self {
        Self { capacity, per_second, left: capacity, refilled: now }
    }

    /// Takes so many tokens, or none if there are not so many.
    pub(crate) fn take(&mut self, tokens: u32, now: Now) -> bool {
        let per_second = u64::from(self.per_second.max(1));
        let passed = u64::try_from(now.since(self.refilled).as_micros()).unwrap_or(u64::MAX);
        let earned = passed.saturating_mul(per_second) / 1_000_000;
        if earned > 0 {
            // What is not yet a whole token stays earned.
            let spent = Duration::from_micros(earned.saturating_mul(1_000_000) / per_second);
            self.refilled = self.refilled + spent;
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(self.capacity);
        }
        let may = self.left >= tokens;
        if may {
            self.left -= tokens;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_so_much_a_second_however_often_it_is_asked() {
        let mut bucket = Bucket::new(10, 4, Now::from_millis(1_000));
        assert!(bucket.take(10, Now::from_millis(1_000)) && !bucket.take(1, Now::from_millis(1_000)));
        let taken = (1..=1_000).filter(|ms| bucket.take(1, Now::from_millis(1_000 + ms))).count();
        assert_eq!(taken, 4);
        assert!(!bucket.take(11, Now::from_millis(100_000)) && bucket.take(10, Now::from_millis(100_000)));
    }
}

//! How much the relay may carry in a month.
//!
//! A relay that costs its owner money stops before the bill does. Over the budget it still lets nodes find each other: what
//! sets up sessions and direct paths passes, and so do small packets, in a trickle. The rest is dropped by name and nodes
//! are told, so that `meshd status` can say why a relayed peer is slow.

use std::time::Duration;

use crate::time::{Now, UnixSeconds};
use crate::wire::classify::{Kind, classify};

/// Over the budget, data up to this many bytes of payload passes: a keystroke, a ping, the frames of a call.
pub const SMALL: usize = 320;
/// Over the budget, bytes per second of what passes.
const TRICKLE: u64 = 32 << 10;
/// And saved up for this long.
const TRICKLE_BURST: Duration = Duration::from_secs(1);

/// A month, counted from January of year 0 (proleptic Gregorian, UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month(pub u32);

impl Month {
    /// The month that a time lies in.
    #[must_use]
    pub fn of(time: UnixSeconds) -> Self {
        let (year, month) = year_and_month(time / 86_400);
        Self(u32::try_from(year * 12 + month).unwrap_or(u32::MAX))
    }

    /// When it is over.
    #[must_use]
    pub fn end(self) -> UnixSeconds {
        let next = u64::from(self.0) + 1;
        first_day(next / 12, next % 12) * 86_400
    }
}

/// Year, and month from 0, of a day counted from 1970-01-01.
const fn year_and_month(day: u64) -> (u64, u64) {
    // Years here begin on 1 March, so that a leap day is the last of its year; day 0 is 1 March of year 0.
    let day = day + 719_468;
    let era = day / 146_097;
    let of_era = day % 146_097;
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let year = era * 400 + year;
    if month < 10 { (year, month + 2) } else { (year + 1, month - 10) }
}

/// The day, counted from 1970-01-01, of the first of a month counted from 0.
const fn first_day(year: u64, month: u64) -> u64 {
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let (era, of_era) = (year / 400, year % 400);
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * month + 2) / 5 - 719_468
}

/// What was carried in a month, as it is kept over restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Which month.
    pub month: Month,
    /// Bytes forwarded in it, as they were on the wire.
    pub bytes: u64,
}

/// The budget.
#[derive(Debug)]
pub struct Budget {
    limit: Option<u64>,
    usage: Usage,
    ends: UnixSeconds,
    trickle: u64,
    filled: Now,
}

impl Budget {
    /// A budget of `limit` bytes a month, or none, with what was carried before.
    #[must_use]
    pub fn new(limit: Option<u64>, earlier: Option<Usage>, wall: UnixSeconds) -> Self {
        let month = Month::of(wall);
        let usage = earlier.filter(|usage| usage.month == month).unwrap_or(Usage { month, bytes: 0 });
        Self { limit, usage, ends: month.end(), trickle: 0, filled: Now::ZERO }
    }

    /// What was carried this month.
    #[must_use]
    pub const fn usage(&self) -> Usage {
        self.usage
    }

    /// The budget is spent.
    #[must_use]
    pub fn spent(&self) -> bool {
        self.limit.is_some_and(|limit| self.usage.bytes >= limit)
    }

    /// When a new month begins.
    #[must_use]
    pub const fn ends(&self) -> UnixSeconds {
        self.ends
    }

    /// The wall clock was read: a new month begins with nothing used. A clock that goes back changes nothing.
    pub fn tick(&mut self, wall: UnixSeconds) {
        let month = Month::of(wall);
        if month > self.usage.month {
            self.usage = Usage { month, bytes: 0 };
            self.ends = month.end();
        }
    }

    /// Whether a packet with this payload may pass, and if so counts its `bytes`.
    pub fn take(&mut self, payload: &[u8], bytes: u64, now: Now) -> bool {
        if self.spent() {
            if payload.len() > SMALL && classify(payload) == Kind::Data {
                return false;
            }
            let full = TRICKLE * TRICKLE_BURST.as_secs();
            let passed = u64::try_from(now.since(self.filled).as_micros()).unwrap_or(u64::MAX);
            self.trickle = full.min(self.trickle + passed.min(10_000_000) * TRICKLE / 1_000_000);
            self.filled = now;
            if self.trickle < bytes {
                return false;
            }
            self.trickle -= bytes;
        }
        self.usage.bytes += bytes;
        true
    }

    /// What was counted was not carried after all.
    pub const fn give_back(&mut self, bytes: u64) {
        self.usage.bytes = self.usage.bytes.saturating_sub(bytes);
    }

    /// Counts a run of packets at once. False: the budget is, or would by this be, spent, and each must be asked about.
    pub fn take_run(&mut self, bytes: u64) -> bool {
        if self.limit.is_some_and(|limit| self.usage.bytes + bytes >= limit) {
            return false;
        }
        self.usage.bytes += bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOV_20_2026: UnixSeconds = 1_795_132_800;
    const DEC_1_2026: UnixSeconds = 1_796_083_200;

    fn data(len: usize) -> Vec<u8> {
        let mut payload = vec![0; len];
        payload[0] = 4;
        payload
    }

    #[test]
    fn months_begin_and_end_where_calendars_say() {
        assert_eq!(Month::of(0), Month(1970 * 12));
        assert_eq!(Month::of(NOV_20_2026), Month(2026 * 12 + 10));
        assert_eq!(Month::of(NOV_20_2026).end(), DEC_1_2026);
        assert_eq!(Month::of(DEC_1_2026 - 1), Month(2026 * 12 + 10));
        assert_eq!(Month::of(DEC_1_2026), Month(2026 * 12 + 11));
        // 29 February 2028, and the end of a year.
        assert_eq!(Month::of(1_835_400_000), Month(2028 * 12 + 1));
        assert_eq!(Month(2028 * 12 + 1).end(), 1_835_481_600);
        assert_eq!(Month(2026 * 12 + 11).end(), 1_798_761_600);
    }

    #[test]
    fn a_spent_budget_passes_little_things_in_a_trickle_and_comes_back_with_the_month() {
        let mut budget = Budget::new(Some(10_000), None, NOV_20_2026);
        let mut now = Now::from_millis(1_000);
        assert!(budget.take_run(9_000) && !budget.spent());
        assert!(!budget.take_run(1_000), "a run that would spend it is looked at packet by packet");
        assert!(budget.take(&data(1_400), 1_400, now) && budget.spent());
        assert!(!budget.take(&data(1_400), 1_400, now) && !budget.take_run(100));
        assert!(budget.take(&data(100), 156, now));
        let mut handshake = vec![0; 148];
        handshake[0] = 1;
        assert!(budget.take(&handshake, 204, now));
        assert!(budget.take(&[0xC1; 900], 956, now), "candidates of a hole punch");
        let passed = (0..10_000).filter(|_| budget.take(&data(100), 156, now)).count();
        assert!(passed < 220, "{passed}");
        now = now + Duration::from_secs(1);
        assert!(budget.take(&data(100), 156, now));
        budget.tick(DEC_1_2026 - 1);
        assert!(budget.spent());
        budget.tick(DEC_1_2026);
        assert!(!budget.spent() && budget.take_run(5_000));
        budget.tick(NOV_20_2026);
        assert_eq!(budget.usage(), Usage { month: Month(2026 * 12 + 11), bytes: 5_000 });
    }

    #[test]
    fn what_was_used_survives_a_restart_in_the_same_month_only() {
        let used = Usage { month: Month::of(NOV_20_2026), bytes: 10_000 };
        assert!(Budget::new(Some(10_000), Some(used), NOV_20_2026).spent());
        assert!(!Budget::new(Some(10_000), Some(used), DEC_1_2026).spent());
        assert!(!Budget::new(None, Some(used), NOV_20_2026).spent());
    }

    proptest! {
        #[test]
        fn every_time_lies_in_its_month(time in 0u64..8_000_000_000) {
            let month = Month::of(time);
            prop_assert!(time < month.end());
            prop_assert_eq!(Month::of(month.end()), Month(month.0 + 1));
            prop_assert_eq!(Month::of(month.end() - 1), month);
        }
    }
}

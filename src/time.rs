//! Time as the pure code sees it: a number handed in, never read from a clock.
//!
//! [`Now`] can be made from a number, printed, hashed, stored in a trace and compared across runs, so a whole
//! network runs in virtual time. `os/clock.rs` is the only producer in the real program.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// Microseconds since the process's clock epoch. Monotonic, and counts time spent suspended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Now(pub u64);

impl Now {
    /// The clock's epoch.
    pub const ZERO: Self = Self(0);

    /// The time `ms` milliseconds after the epoch.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1_000)
    }

    /// Whole milliseconds since the epoch.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0 / 1_000
    }

    /// Time passed since `earlier`; zero if `earlier` lies in the future.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Now {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Now {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

impl fmt::Debug for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}s", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// Seconds since 1970-01-01 00:00 UTC. Only for what people set and read (expiry, creation), never for timers.
pub type UnixSeconds = u64;

//! A peer's WireGuard session.

pub mod gate;
pub mod table;
pub mod tunnel;

use crate::time::Now;

/// boringtun reads a clock of its own. In the simulator that clock is a mock, set to the virtual time before each call.
#[cfg(feature = "sim")]
pub(super) fn sync_clock(now: Now) {
    mock_instant::MockClock::set_time(std::time::Duration::from_micros(now.0));
}

/// boringtun reads a clock of its own: the same one as `os/clock.rs`, so there is nothing to do.
#[cfg(not(feature = "sim"))]
pub(super) const fn sync_clock(_: Now) {}

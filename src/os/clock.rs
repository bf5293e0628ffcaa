//! The only clocks of the program.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;

use crate::time::{Now, UnixSeconds};

/// Microseconds since the machine started, suspended time included (`CLOCK_BOOTTIME`).
#[must_use]
pub fn now() -> Now {
    // Only an address outside the process or an unknown clock can fail here, and neither can be.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Now::ZERO, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        let micros = u64::try_from(t.tv_nsec()).unwrap_or(0) / 1_000;
        Now(seconds.saturating_mul(1_000_000).saturating_add(micros))
    })
}

/// The wall clock. For expiry and creation times only.
#[must_use]
pub fn wall() -> UnixSeconds {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// An alarm on the same clock as [`now`]: one set before the machine was suspended rings as soon as it is awake again.
#[derive(Debug)]
pub struct Alarm {
    timer: AsyncFd<Timer>,
    set_for: Option<Now>,
}

#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Alarm {
    /// An alarm that is not set. Must be made inside a tokio runtime.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(TimerClock::CLOCK_BOOTTIME, flags)?;
        #[expect(unsafe_code, reason = "tokio cannot see that the descriptor outlives its registration")]
        // SAFETY: `Timer` owns its descriptor, always reports that one, and is neither replaced nor closed while `AsyncFd`
        // owns it.
        let timer = unsafe { AsyncFd::register(Timer(timer)) }?;
        Ok(Self { timer, set_for: None })
    }

    /// Rings at `at` (at once if that is past), or never.
    ///
    /// # Errors
    /// The kernel refused the time.
    pub fn set(&mut self, at: Option<Now>) -> io::Result<()> {
        if at == self.set_for {
            return Ok(());
        }
        match at {
            None => self.timer.get_ref().0.unset()?,
            Some(at) => {
                // A time of exactly zero would switch the timer off.
                let micros = i64::try_from(at.0.max(1)).unwrap_or(i64::MAX);
                let spec = TimeSpec::new(micros / 1_000_000, (micros % 1_000_000) * 1_000);
                self.timer.get_ref().0.set(Expiration::OneShot(spec), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            }
        }
        self.set_for = at;
        Ok(())
    }

    /// Waits until the alarm rings. It is then not set any more.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn ring(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.timer.readable().await?;
            // Reading takes the expiry; "nothing to read" means that it was set anew meanwhile.
            if guard.try_io(|timer| timer.get_ref().0.wait().map_err(io::Error::from)).is_ok() {
                self.set_for = None;
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_goes_forward_and_is_not_zero() {
        let first = now();
        assert!(first > Now::ZERO);
        assert!(now() >= first);
        assert!(wall() > 1_700_000_000);
    }

    /// `/proc/uptime` counts the time the machine was suspended, in hundredths of a second.
    #[test]
    fn the_clock_counts_suspended_time() {
        let uptime = || {
            let text = std::fs::read_to_string("/proc/uptime").unwrap();
            let seconds: f64 = text.split_whitespace().next().unwrap().parse().unwrap();
            Duration::from_secs_f64(seconds)
        };
        let (before, now, after) = (uptime(), Duration::from_micros(now().0), uptime());
        let tick = Duration::from_millis(10);
        assert!(before <= now + tick && now <= after + tick, "{before:?}, {now:?}, {after:?}");
    }

    #[tokio::test]
    async fn an_alarm_rings_at_its_time_and_once() {
        let mut alarm = Alarm::new().unwrap();
        let at = now() + Duration::from_millis(20);
        alarm.set(Some(at)).unwrap();
        tokio::time::timeout(Duration::from_secs(5), alarm.ring()).await.unwrap().unwrap();
        assert!(now() >= at);
        assert!(tokio::time::timeout(Duration::from_millis(30), alarm.ring()).await.is_err());
        // A time in the past rings at once.
        alarm.set(Some(Now(1))).unwrap();
        tokio::time::timeout(Duration::from_secs(5), alarm.ring()).await.unwrap().unwrap();
    }
}

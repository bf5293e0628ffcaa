//! Tells a thread that waits in `poll` that a channel holds something for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// A bell: any thread may ring it, one thread polls it. Clones are the same bell.
#[derive(Debug, Clone)]
pub struct Wake(Arc<EventFd>);

impl Wake {
    /// A silent bell.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Makes the bell readable. Ringing it twice is the same as once.
    pub fn ring(&self) {
        // The only failure is a full counter, and then it is readable already.
        let _ = self.0.write(1);
    }

    /// Silences the bell. Call it before looking into the channels, so that nothing that came in between is missed.
    pub fn silence(&self) {
        // The only failure is that it was silent.
        let _ = self.0.read();
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn readable(wake: &Wake) -> bool {
        poll(&mut [PollFd::new(wake.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_rung_bell_is_readable_until_silenced() {
        let wake = Wake::new().unwrap();
        assert!(!readable(&wake));
        wake.ring();
        wake.clone().ring();
        assert!(readable(&wake));
        wake.silence();
        assert!(!readable(&wake));
    }
}

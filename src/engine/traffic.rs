//! A peer's counters, shared by the data workers (which write) and the planner (which reads). Relaxed atomics: no
//! lock, no order between them is relied on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::time::Now;

/// Counters and stamps of one peer. Times are [`Now`] microseconds; 0 is never.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Inner bytes sent.
    pub tx_bytes: AtomicU64,
    /// Inner bytes received.
    pub rx_bytes: AtomicU64,
    /// Last inner packet sealed.
    pub last_tx: AtomicU64,
    /// Last authenticated inner packet (keepalives not counted).
    pub last_rx: AtomicU64,
    /// Last authenticated datagram, keepalives included, that came from the current direct address.
    pub last_rx_direct: AtomicU64,
    /// Last authenticated datagram that came through the relay.
    pub last_rx_relay: AtomicU64,
    /// Last repetition through the relay of a datagram that came before: the peer sends both ways, because it doubts the
    /// direct path. Not proven: the relay could repeat an old one, which costs no more than answering both ways for a while.
    pub last_copy_relay: AtomicU64,
    /// Set by the planner while it watches this peer. A worker that finds it off sets it and sends `Notice::Active`.
    pub watched: AtomicBool,
}

impl Traffic {
    /// Notes an inner packet of `bytes` bytes sent.
    pub fn sent(&self, bytes: usize, now: Now) {
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_tx.store(now.0.max(1), Ordering::Relaxed);
    }

    /// Notes an inner packet of `bytes` bytes received.
    pub fn received(&self, bytes: usize, now: Now) {
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_rx.store(now.0.max(1), Ordering::Relaxed);
    }

    /// Notes an authenticated datagram from the current direct address.
    pub fn came_directly(&self, now: Now) {
        self.last_rx_direct.store(now.0.max(1), Ordering::Relaxed);
    }

    /// Notes an authenticated datagram that came through the relay.
    pub fn came_by_relay(&self, now: Now) {
        self.last_rx_relay.store(now.0.max(1), Ordering::Relaxed);
    }

    /// Notes a repetition that came through the relay.
    pub fn copy_came_by_relay(&self, now: Now) {
        self.last_copy_relay.store(now.0.max(1), Ordering::Relaxed);
    }

    /// True exactly once after the planner stopped watching.
    pub fn needs_watching(&self) -> bool {
        !self.watched.load(Ordering::Relaxed) && !self.watched.swap(true, Ordering::Relaxed)
    }

    /// A stamp as a time, if it ever happened.
    #[must_use]
    pub fn stamp(field: &AtomicU64) -> Option<Now> {
        match field.load(Ordering::Relaxed) {
            0 => None,
            t => Some(Now(t)),
        }
    }
}

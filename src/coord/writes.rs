//! Who waits for which write. One write is under way at a time; what comes meanwhile shares the next one.

use crate::coord::io::ConnId;
use crate::trust::ledger::Change;

/// What to say once a write is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Joined,
    Published,
}

/// Somebody whose answer waits for a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiter {
    pub(super) conn: ConnId,
    pub(super) re: u64,
    pub(super) answer: Answer,
}

/// Records on their way to the store, and who waits for that.
#[derive(Debug, Default)]
pub(super) struct Write {
    /// What the records change.
    pub(super) changes: Vec<Change>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) claim_spent: bool,
}

impl Write {
    pub(super) const fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.waiters.is_empty()
    }
}

/// A write that the shell is carrying out.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) ticket: u64,
    /// The length of the log once it is stored.
    pub(super) end: usize,
    pub(super) write: Write,
}

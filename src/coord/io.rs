//! What goes into and comes out of the coordinator.

use std::net::IpAddr;

use crate::time::UnixSeconds;
use crate::trust::record::SignedRecord;
use crate::wire::control::{ToCoordinator, ToNode};
use crate::wire::keys::{ControlKey, WgKey};

/// One control connection, numbered by the shell and never reused in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Something happened.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one is made, moved and taken apart per message; none is kept")]
pub enum Input {
    /// A control connection passed its Noise handshake.
    Opened {
        /// Which.
        conn: ConnId,
        /// The peer's static key, from the handshake and nowhere else.
        key: ControlKey,
        /// Where it comes from (for rate limits and `observed`).
        from: Option<IpAddr>,
    },
    /// A message came.
    Message {
        /// On which connection.
        conn: ConnId,
        /// What.
        message: ToCoordinator,
        /// The wall clock, for expiry.
        wall: UnixSeconds,
    },
    /// The connection is gone.
    Closed(ConnId),
    /// All that was sent on the connection is on its way: a node that is being sent a long log is ready for more. Saying
    /// so is optional; without it the log goes on at a fixed pace.
    Drained(ConnId),
    /// An `Output::Persist` was carried out (or failed: then nothing of it was stored).
    Persisted {
        /// The output's ticket.
        ticket: u64,
        /// Stored for good.
        ok: bool,
    },
    /// Whether the relay's budget is spent.
    RelayBudget {
        /// It is.
        spent: bool,
        /// When it is renewed.
        renewed: UnixSeconds,
    },
}

/// What the coordinator wants done.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send a message on a connection.
    Send {
        /// Which.
        conn: ConnId,
        /// What.
        message: ToNode,
    },
    /// Close a connection, after what was queued to it. The coordinator has forgotten it already; `Input::Closed` may
    /// follow or not.
    Close {
        /// Which.
        conn: ConnId,
        /// Why: one of [`why`].
        why: &'static str,
    },
    /// Store these records in one transaction, durably, then say `Input::Persisted`. Answers wait for it. There is never a
    /// second one before the first is answered.
    Persist {
        /// Names this output.
        ticket: u64,
        /// Appended to the log in this order.
        records: Vec<SignedRecord>,
        /// The claim is spent by this write.
        claim_spent: bool,
    },
    /// Who may use the relay changed: the member with this control key has this WireGuard key. Said for every member at
    /// start, and for a new one before it is told that it joined.
    RelayAdmit {
        /// Noise key.
        control: ControlKey,
        /// Relay address.
        wg: WgKey,
    },
    /// The node was revoked: close its relay connection and refuse new ones.
    RelayExpel {
        /// Noise key.
        control: ControlKey,
        /// Relay address.
        wg: WgKey,
    },
    /// A member wants a session at the relay's UDP port: answer it on this connection, `RelayOpened` or `Refused`.
    OpenRelay {
        /// Which.
        conn: ConnId,
        /// The request's number.
        re: u64,
        /// Whose session.
        wg: WgKey,
    },
}

/// Why connections are closed.
pub mod why {
    /// A newer connection with the same key took its place.
    pub const REPLACED: &str = "replaced by a newer connection of the same node";
    /// The node was revoked.
    pub const REVOKED: &str = "the node was revoked";
    /// Too many connections.
    pub const BUSY: &str = "too many connections";
    /// A guest did not join, or a node did not speak, in time.
    pub const DEADLINE: &str = "it did not join in time";
}

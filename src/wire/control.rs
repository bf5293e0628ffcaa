//! Messages between a node and the coordinator: JSON inside Noise inside a WebSocket.
//!
//! Requests carry `re`, a number the sender chooses; the answer carries the same number. Unknown fields are ignored;
//! an unknown message type is answered with `Refused { code: "unknown-message" }` by the coordinator and skipped by a
//! node. A message is at most [`MAX_MESSAGE`] bytes of JSON.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::time::UnixSeconds;
use crate::trust::advert::SignedAdvert;
use crate::trust::record::SignedRecord;
use crate::wire::keys::{Digest32, InviteKey, WgKey};
use crate::wire::relay_udp::SessionSecret;

/// The longest control message, in bytes of JSON. A longer one ends the connection.
pub const MAX_MESSAGE: usize = 1 << 20;

/// The most addresses in an [`ToCoordinator::Announce`].
pub const MAX_OPEN: usize = 4;

/// The most records in one [`ToNode::Log`] message, so that it stays under [`MAX_MESSAGE`].
pub const LOG_CHUNK: usize = 256;

/// From a node (or a guest that wants to become one) to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "kebab-case")]
pub enum ToCoordinator {
    /// Guest: creates the network. `records` is exactly Genesis, Admin, Invite, Member, in this order. Sent again after
    /// a lost answer it is answered `Joined` again.
    Found {
        /// Answer number.
        re: u64,
        /// The claim token's secret, 64 hexadecimal digits.
        claim: Digest32,
        /// The network's first four records.
        records: Vec<SignedRecord>,
    },
    /// Guest: asks for an address and a free name before signing a Member record.
    Propose {
        /// Answer number.
        re: u64,
        /// The invite this guest holds.
        invite: InviteKey,
        /// The name wanted.
        name: String,
        /// True: refuse with `name-taken` rather than propose another (`--name` was given).
        exact: bool,
    },
    /// Guest: joins. One atomic write at the coordinator. Sent again after a lost answer it is answered `Joined` again.
    Redeem {
        /// Answer number.
        re: u64,
        /// The Invite record from the token (the coordinator may not have seen it yet).
        invite: SignedRecord,
        /// Signed by the invite's key, countersigned by the node.
        member: SignedRecord,
    },
    /// Member: asks for the records after the first `have`, and for presence from now on.
    Hello {
        /// Answer number.
        re: u64,
        /// The node's program version, for people.
        version: String,
        /// How many records of the coordinator's log the node holds.
        have: u64,
        /// The running digest over those records, see [`log_head`].
        head: Digest32,
    },
    /// Member: adds signed records to the log. All or none.
    Publish {
        /// Answer number.
        re: u64,
        /// Each must be valid after the ones before it; one already in the log is fine.
        records: Vec<SignedRecord>,
    },
    /// Member: asks where another member is, as far as the coordinator knows; answered by `Located`.
    Locate {
        /// Answer number.
        re: u64,
        /// Whom.
        peer: WgKey,
    },
    /// Member: everybody can reach it at these UDP addresses. Replaces the earlier list; answered by `Published`.
    Announce {
        /// Answer number.
        re: u64,
        /// At most [`MAX_OPEN`].
        open: Vec<SocketAddr>,
    },
    /// Member: the prefixes it leads to. Replaces what it said before; answered by `Published`.
    Advertise {
        /// Answer number.
        re: u64,
        /// Signed by the member itself.
        advert: SignedAdvert,
    },
    /// Liveness; answered by `Pong`.
    Ping {
        /// Answer number.
        re: u64,
    },
    /// Member: asks for a session at the relay's UDP port ([`crate::wire::relay_udp`]), which ends the one it had.
    /// Answered by `RelayOpened`, or `Refused` with `no-udp-relay`.
    OpenRelay {
        /// Answer number.
        re: u64,
    },
}

/// From the coordinator to a node or guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "kebab-case")]
pub enum ToNode {
    /// The request was not carried out; nothing changed.
    Refused {
        /// The request's number.
        re: u64,
        /// A stable word, see [`refusal`].
        code: String,
        /// One sentence: what and why.
        text: String,
        /// What the person can do.
        hint: String,
    },
    /// Answer to `Propose`.
    Proposal {
        /// The request's number.
        re: u64,
        /// The records that lead from the network id to the invite (Genesis first), for the guest to verify.
        records: Vec<SignedRecord>,
        /// A free address.
        ipv4: Ipv4Addr,
        /// A free name: the one wanted, or with `-2`, `-3`, … added.
        name: String,
        /// The coordinator's wall clock.
        now: UnixSeconds,
    },
    /// Answer to `Found` and `Redeem`: stored for good. The connection now belongs to a member; `Hello` may follow.
    Joined {
        /// The request's number.
        re: u64,
    },
    /// Answer to `Hello`. `Log` messages and a full `Presence` follow.
    Welcome {
        /// The request's number.
        re: u64,
        /// The coordinator's program version, for people.
        version: String,
        /// The coordinator's wall clock.
        now: UnixSeconds,
        /// STUN servers the coordinator offers.
        stun: Vec<StunServer>,
        /// The address the control connection comes from.
        observed: Option<IpAddr>,
    },
    /// Records `from..from + records.len()` of the log, in order. `from == 0` with a node that holds more means that the
    /// coordinator's log is not an extension of the node's; the node keeps what it has and compares.
    Log {
        /// Index of the first record.
        from: u64,
        /// At most [`LOG_CHUNK`].
        records: Vec<SignedRecord>,
        /// Running digest after the last of these records.
        head: Digest32,
        /// False: more follows at once.
        end: bool,
    },
    /// Answer to `Publish`: stored for good. The records also arrive in a `Log`.
    Published {
        /// The request's number.
        re: u64,
    },
    /// Which nodes are connected.
    Presence {
        /// True: `online` is the whole set.
        full: bool,
        /// Came online.
        online: Vec<WgKey>,
        /// Went offline.
        offline: Vec<WgKey>,
    },
    /// The newest advertisements of members: all of them once after `Hello`, then those that are new.
    Adverts {
        /// Each signed by its member. Of several of one member the highest number counts.
        adverts: Vec<SignedAdvert>,
    },
    /// Answer to `Locate`. A claim of the coordinator's: good enough to decide where to look, no more.
    Located {
        /// The request's number.
        re: u64,
        /// Where the member's control connection comes from; null: it has none, or hides behind a proxy of the coordinator's.
        observed: Option<IpAddr>,
        /// What it announced.
        open: Vec<SocketAddr>,
    },
    /// Answer to `Ping`.
    Pong {
        /// The request's number.
        re: u64,
        /// The coordinator's wall clock.
        now: UnixSeconds,
    },
    /// Answer to `OpenRelay`: a session at the relay's UDP port. It lasts until the next one is opened, the node is
    /// removed, or the coordinator stops.
    RelayOpened {
        /// The request's number.
        re: u64,
        /// Its number in relay datagrams.
        session: u32,
        /// What its datagrams are tagged with.
        secret: SessionSecret,
        /// Where the relay listens, in order of preference, named as STUN servers are.
        at: Vec<StunServer>,
    },
    /// Whether the relay's budget for this month is spent: it then carries only what sets up sessions and paths, and small
    /// packets. Sent when that changes, and after `Welcome` while it is so.
    RelayBudget {
        /// It is spent.
        spent: bool,
        /// When the next month begins.
        renewed: UnixSeconds,
    },
}

/// One STUN server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StunServer {
    /// Host name or address; absent: the host of the coordinator's URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// UDP port.
    pub port: u16,
}

/// The digest of a log of `n` records: `h(0) = 0`, `h(i) = BLAKE2s(h(i-1), id of record i)`.
#[must_use]
pub fn log_head(before: Digest32, record: &SignedRecord) -> Digest32 {
    Digest32::of(&[b"meshd log v1", before.as_bytes(), record.id().as_bytes()])
}

/// Stable refusal codes.
pub mod refusal {
    /// The claim or invite was used (up) before.
    pub const ALREADY_USED: &str = "already-used";
    /// The claim secret is not this coordinator's.
    pub const WRONG_CLAIM: &str = "wrong-claim";
    /// The invite is past its expiry.
    pub const EXPIRED: &str = "expired";
    /// The invite or member was revoked.
    pub const REVOKED: &str = "revoked";
    /// The invite belongs to another network than this coordinator's.
    pub const WRONG_NETWORK: &str = "wrong-network";
    /// The coordinator has no network yet.
    pub const NO_NETWORK: &str = "no-network";
    /// A live node has that name.
    pub const NAME_TAKEN: &str = "name-taken";
    /// A live node has that address: ask for another proposal.
    pub const ADDRESS_TAKEN: &str = "address-taken";
    /// No address is left in the range.
    pub const RANGE_FULL: &str = "range-full";
    /// The request itself makes no sense (a name that is none, too many records).
    pub const BAD_REQUEST: &str = "bad-request";
    /// A record does not verify.
    pub const BAD_RECORD: &str = "bad-record";
    /// The connection's key is not a member's.
    pub const NOT_A_MEMBER: &str = "not-a-member";
    /// Too many requests; try again later.
    pub const RATE_LIMITED: &str = "rate-limited";
    /// The coordinator could not write its store.
    pub const STORE_FAILED: &str = "store-failed";
    /// The relay has no UDP port, or none for this node.
    pub const NO_UDP_RELAY: &str = "no-udp-relay";
    /// The message type is unknown.
    pub const UNKNOWN_MESSAGE: &str = "unknown-message";
    /// The program on this side is too old or too new.
    pub const VERSION: &str = "version";
}

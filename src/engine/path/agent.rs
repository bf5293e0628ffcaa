//! One peer's search for a direct path, and the watch over the one in use. A pure machine: the planner feeds it and
//! carries out the [`Action`]s it leaves behind.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use rand::Rng;

use crate::engine::io::{Path, SocketId};
use crate::engine::packet::DATA_OVERHEAD;
use crate::engine::path::Leg;
use crate::engine::path::mtu::{BASE, Search};
use crate::engine::path::reason::{Attempt, Evidence, Found, How, NatView};
use crate::engine::path::reflexive::fresh_txid;
use crate::time::Now;
use crate::wire::nat::Seen;
use crate::wire::probe::{MessageKind, Role};
use crate::wire::stun::TransactionId;

mod asked;
mod probing;
mod remotes;
mod rounds;
mod size;
#[cfg(test)]
mod tests;
mod watch;

use remotes::Remote;

/// When probes go out after the start of a punch (nat.md 5.3). Halved or doubled gaps cost either latency or packets.
const PUNCH_MS: [u64; 8] = [0, 20, 50, 100, 200, 400, 800, 1400];
/// A punch without a path this long after its start has failed.
const PUNCH_ENDS: Duration = Duration::from_millis(2400);
/// The answering side starts by itself if the `go` was lost.
const GO_TIMEOUT: Duration = Duration::from_millis(700);
/// After so many failed rounds others are made from a fresh port: a router may have taken the port pair for its own, and
/// keeps it as long as anybody sends to it (nat.md, finding 3).
const FRESH_PORT_AFTER: usize = 2;
/// A probe unanswered for so long is lost.
const PROBE_LIFETIME: Duration = Duration::from_secs(3);
/// A remote is probed in answer to its own probe at most this often.
const TRIGGERED_GAP: Duration = Duration::from_millis(50);
/// A small answer is followed by probes of data size this often, and this many times.
const CONFIRM_GAP: Duration = Duration::from_millis(150);
const CONFIRM_TRIES: u8 = 14;
/// Probes of data size. From these tries on, of sizes that narrow paths take.
const FULL: Option<u16> = Some(BASE);
const NARROW: [(u8, u16); 3] = [(8, 1200), (10, 1120), (12, 576)];
const SMALL: Option<u16> = None;
/// Nothing sent for so long on a direct path: probe, so that the NATs keep their mappings. Linux forgets a flow that
/// was one-way for long after 30 s (nat.md, finding 7).
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Where a NAT forgets sooner than that, after this share of its time, in quarters, and never more often than this.
const KEEPALIVE_QUARTERS: u32 = 3;
const KEEPALIVE_LEAST: Duration = Duration::from_secs(3);
/// An unanswered question puts the path in doubt: data goes both ways.
const DOUBT_AFTER: Duration = Duration::from_millis(120);
/// A path in doubt for so long is dead.
const DEAD_AFTER: Duration = Duration::from_millis(600);
/// Gap between questions on a doubted path.
const DOUBT_PROBE_GAP: Duration = Duration::from_millis(100);
/// Probe answers one peer can draw from us: a burst, and so many a second.
const ANSWER_BURST: u32 = 120;

/// What the planner is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a path probe: with a size, one as long as an inner packet of so many bytes makes, else a small one.
    Probe { txid: TransactionId, to: Leg, size: Option<u16> },
    /// Send a probe that opens our own NAT and dies on the way, if there is a way to do so.
    Prime { txid: TransactionId, to: Leg },
    /// The round says go: make TCP connections, if a side has no UDP.
    Dial,
    /// Seal a message to the peer and send it through the relay. The planner adds candidates and NAT view.
    Tell { kind: MessageKind, round: u32, t: Option<u64>, echo: Option<u64>, role: Option<Role> },
    /// Use this path from now on.
    Select(Path),
    /// Use this direct path from now on. Packets arrive there so much sooner that the first must wait.
    Turn { leg: Leg, lead: Duration },
    /// The direct path in use takes inner packets of this size; `settled`: and no larger ones, as far as can be told.
    Mtu { size: u16, settled: bool },
}

/// An address the peer offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) addr: SocketAddr,
    /// On a network this machine is attached to.
    pub(crate) near: bool,
    /// Lets everybody in, as far as the peer knows.
    pub(crate) open: bool,
}

/// What an answer to a call says about the round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeardAnswer {
    pub(crate) round: u32,
    /// Microseconds the peer held the call.
    pub(crate) held: Option<u64>,
    /// The call's time stamp.
    pub(crate) echo: Option<u64>,
    /// The peer's NAT lets our first probe in.
    pub(crate) opened: bool,
}

/// What the agent needs of its surroundings to act.
pub(crate) struct Context<'a, R: Rng> {
    pub(crate) now: Now,
    pub(crate) rng: &'a mut R,
    pub(crate) tx_prefix: [u8; 4],
    pub(crate) actions: &'a mut VecDeque<Action>,
}

/// The stamps of a peer's traffic, as the agent judges paths by.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stamps {
    pub(crate) last_tx: Option<Now>,
    pub(crate) last_rx_direct: Option<Now>,
    pub(crate) last_rx_relay: Option<Now>,
    pub(crate) last_copy_relay: Option<Now>,
}

/// One peer's paths.
#[derive(Debug)]
pub(crate) struct PathAgent {
    /// Our key sorts before the peer's: our call wins over a simultaneous one of the peer.
    wins_ties: bool,
    remotes: Vec<Remote>,
    stage: Stage,
    round: u32,
    failures: usize,
    /// How many rounds had failed when the path in use was found.
    worked_at: usize,
    next_round: Option<Now>,
    /// A punch with many sockets or ports is under way, or how many of them failed in a row.
    heavy: bool,
    heavy_failures: usize,
    /// No such punch before then.
    heavy_not_before: Option<Now>,
    /// What is known of both NATs rules a plain punch out.
    brief: bool,
    /// This round is to be made from a fresh port, or is made from it.
    fresh: Fresh,
    in_flight: VecDeque<InFlight>,
    current: Option<Current>,
    pub(crate) relay_rtt: Option<Duration>,
    pub(crate) theirs: NatView,
    /// What the peer knows of its network and saw of the last round, as it says.
    pub(crate) their_evidence: Evidence,
    /// What is seen of the round under way, and what was of the last that failed.
    tally: Seen,
    failed: Option<Seen>,
    /// The last round ended because the peer did not answer the call.
    called_in_vain: bool,
    answers_left: u32,
    answers_refilled: Now,
    full_size_lost: bool,
    awake: bool,
    next_review: Now,
    /// For how many seconds our NAT and the peer's keep an idle mapping, if that is known.
    lifetimes: [Option<u16>; 2],
    /// How long packets may be on the path in use.
    search: Search,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    /// Call to be sent as soon as our own candidates are fresh.
    ToCall,
    /// Call sent; waiting for the answer.
    Called {
        at: Now,
        tries: usize,
        next: Now,
    },
    /// The peer called; our answer goes out as soon as our own candidates are fresh.
    ToAnswer {
        t: Option<u64>,
        since: Now,
    },
    /// Answered; waiting for the go.
    Answered {
        at: Now,
    },
    /// Punching.
    Punching {
        start: Now,
        step: usize,
    },
}

/// Whether a round uses a port of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fresh {
    No,
    Wanted,
    Yes(SocketId),
}

#[derive(Debug)]
struct InFlight {
    txid: TransactionId,
    to: Leg,
    sent: Now,
    size: Option<u16>,
}

#[derive(Debug, Clone, Copy)]
struct Current {
    leg: Leg,
    since: Now,
    rtt: Duration,
    last_pong: Now,
    last_probe: Now,
    doubt: Option<Doubt>,
    found: Found,
}

#[derive(Debug, Clone, Copy)]
struct Doubt {
    since: Now,
    /// Data goes both ways already.
    both: bool,
    /// It is the peer's: what comes from it shows nothing, only its answer to a probe does.
    theirs: bool,
}

impl PathAgent {
    pub(crate) fn new(wins_ties: bool, now: Now) -> Self {
        Self {
            wins_ties,
            remotes: Vec::new(),
            stage: Stage::Idle,
            round: 0,
            failures: 0,
            worked_at: 0,
            next_round: None,
            heavy: false,
            heavy_failures: 0,
            heavy_not_before: None,
            brief: false,
            fresh: Fresh::No,
            in_flight: VecDeque::new(),
            current: None,
            relay_rtt: None,
            theirs: NatView::default(),
            their_evidence: Evidence::default(),
            tally: Seen::default(),
            failed: None,
            called_in_vain: false,
            answers_left: ANSWER_BURST,
            answers_refilled: now,
            full_size_lost: false,
            awake: false,
            next_review: now,
            lifetimes: [None, None],
            search: Search::new(BASE, now),
        }
    }
}

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

mod size;
#[cfg(test)]
mod tests;
mod watch;

/// When probes go out after the start of a punch (nat.md 5.3). Halved or doubled gaps cost either latency or packets.
const PUNCH_MS: [u64; 8] = [0, 20, 50, 100, 200, 400, 800, 1400];
/// A punch without a path this long after its start has failed.
const PUNCH_ENDS: Duration = Duration::from_millis(2400);
/// Repetition of an unanswered call. Relay frames are rarely lost, but either side may be about to connect, and after a move
/// the first goes to a connection that is dead without knowing it.
const CALL_RETRY: [Duration; 4] =
    [Duration::from_millis(400), Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// The answering side starts by itself if the `go` was lost.
const GO_TIMEOUT: Duration = Duration::from_millis(700);
/// Waits between failed rounds while the peer is in use; the last one repeats.
const BACKOFF_S: [u64; 7] = [1, 3, 8, 20, 45, 120, 300];
/// After so many failed rounds others are made from a fresh port: a router may have taken the port pair for its own, and
/// keeps it as long as anybody sends to it (nat.md, finding 3).
const FRESH_PORT_AFTER: usize = 2;
/// Waits between rounds that what is known of both NATs rules out.
const HOPELESS_S: u64 = 600;
/// In such a round only so many of the probes go out: what is known may be wrong, or the peer may be on the same LAN.
const BRIEF_STEPS: usize = 3;
/// Waits after a punch with many sockets or ports that found nothing; the last one repeats.
const HEAVY_BACKOFF_S: [u64; 4] = [5, 60, 600, 3600];
/// Addresses of one peer tried at once: its candidates and those learned from its probes.
const MAX_REMOTES: usize = 24;
/// Probes that may be under way at once; older ones are forgotten first.
const MAX_IN_FLIGHT: usize = 96;
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
/// Silence after which a path that carries our data is asked, in multiples of its round trip and at least.
const QUIET_RTTS: u32 = 3;
const QUIET_MIN: Duration = Duration::from_millis(300);
/// An unanswered question puts the path in doubt: data goes both ways.
const DOUBT_AFTER: Duration = Duration::from_millis(120);
/// A path in doubt for so long is dead.
const DEAD_AFTER: Duration = Duration::from_millis(600);
/// Packets on the relay when a path is chosen have arrived after this time.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// Gap between questions on a doubted path.
const DOUBT_PROBE_GAP: Duration = Duration::from_millis(100);
/// Another path must be better by both of these to take over (hysteresis).
const BETTER_BY: Duration = Duration::from_millis(5);
const BETTER_PERCENT: u32 = 10;
/// Other paths that answered once are measured again this often while one is in use (nat.md 5.7).
const REVIEW: Duration = Duration::from_secs(60);
/// So many of them.
const REVIEWED: usize = 4;
/// A path in use for longer than this is left for a better one only after so many measurements, so far apart.
const SETTLED: Duration = Duration::from_secs(3);
const WINS: u8 = 3;
const WIN_GAP: Duration = Duration::from_millis(500);
/// Probe answers one peer can draw from us: a burst, and so many a second.
const ANSWER_BURST: u32 = 120;
const ANSWERS_PER_SECOND: u32 = 60;

/// What the planner is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a path probe: with a size, one as long as an inner packet of so many bytes makes, else a small one.
    Probe { txid: TransactionId, to: Leg, size: Option<u16> },
    /// Send a probe that opens our own NAT and dies on the way, if there is a way to do so.
    Prime { txid: TransactionId, to: Leg },
    /// Seal a message to the peer and send it through the relay. The planner adds candidates and NAT view.
    Tell { kind: MessageKind, round: u32, t: Option<u64>, echo: Option<u64>, role: Option<Role> },
    /// Use this path from now on.
    Select(Path),
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
struct Remote {
    leg: Leg,
    /// On a network this machine is attached to: probed first, preferred.
    near: bool,
    /// Lets everybody in, as far as the peer knows.
    open: bool,
    /// The peer's probes come from here.
    heard: bool,
    /// How often in a row it was better than the path in use, and when to measure again.
    wins: u8,
    review: Option<Now>,
    rtt: Option<Duration>,
    last_sent: Option<Now>,
    last_pong: Option<Now>,
    /// Our probe of data size came back, and how long it was.
    proven: Option<Now>,
    size: u16,
    last_full: Option<Now>,
    full_tries: u8,
    /// A triggered check that had to wait.
    check: Option<Now>,
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
            search: Search::new(BASE, now),
        }
    }

    // ---- what the planner asks -----------------------------------------------------------------------------------

    /// The way in use, when it was chosen, and its round trip.
    pub(crate) fn direct(&self) -> Option<(Leg, Now, Duration)> {
        self.current.map(|c| (c.leg, c.since, c.rtt))
    }

    /// A round is under way.
    pub(crate) fn is_searching(&self) -> bool {
        self.heavy || self.stage != Stage::Idle
    }

    /// How the way in use was found.
    pub(crate) fn found(&self) -> Option<Found> {
        self.current.map(|c| c.found)
    }

    /// What was seen of the last round, if it failed.
    pub(crate) const fn seen(&self) -> Option<Seen> {
        self.failed
    }

    /// Whether the last round ended because the peer did not answer the call.
    pub(crate) const fn called_in_vain(&self) -> bool {
        self.called_in_vain
    }

    /// How long until the next round, if one is set.
    pub(crate) fn next_round_in(&self, now: Now) -> Option<Duration> {
        self.next_round.filter(|_| self.awake && self.current.is_none()).map(|at| at.since(now))
    }

    /// A probe of a heavy punch went to the peer.
    pub(crate) const fn count_shot(&mut self) {
        self.tally.sent = self.tally.sent.saturating_add(1);
    }

    /// By what a way was found that is about to be used.
    fn how(&self, leg: Leg) -> How {
        let remote = self.remotes.iter().find(|r| r.leg == leg);
        match remote {
            Some(r) if r.near => How::SameNetwork,
            Some(r) if r.open => How::OpenAddress,
            _ if self.heavy => How::ManyPorts,
            _ if leg != Leg::main(leg.remote) => How::FreshPort,
            _ => How::Punch,
        }
    }

    /// Whether a call or an answer waits for fresh candidates of our own.
    pub(crate) const fn waits_for_candidates(&self) -> bool {
        matches!(self.stage, Stage::ToCall | Stage::ToAnswer { .. })
    }

    /// Whether this round should be made from a fresh port, which is not there yet.
    pub(crate) fn wants_fresh_port(&self) -> bool {
        self.fresh == Fresh::Wanted
    }

    /// The fresh port of this round, if it has one.
    pub(crate) const fn fresh_port(&self) -> Option<SocketId> {
        match self.fresh {
            Fresh::Yes(socket) => Some(socket),
            Fresh::No | Fresh::Wanted => None,
        }
    }

    /// The number of the round under way or the last one, the same on both sides.
    pub(crate) const fn round(&self) -> u32 {
        self.round
    }

    /// How many rounds failed since there was a path, or since the network changed.
    pub(crate) const fn failures(&self) -> usize {
        self.failures
    }

    /// How many had failed when the path in use was found.
    pub(crate) const fn worked_at(&self) -> usize {
        self.worked_at
    }

    /// Whether a heavy punch may be made again.
    pub(crate) fn may_punch_heavily(&self, now: Now) -> bool {
        self.heavy_not_before.is_none_or(|at| at <= now)
    }

    /// Whether this transaction is a probe of ours that may still be answered.
    pub(crate) fn sent(&self, txid: &TransactionId) -> bool {
        self.in_flight.iter().any(|p| p.txid == *txid)
    }

    /// How far the search is.
    pub(crate) const fn attempt(&self) -> Attempt {
        match self.stage {
            _ if self.heavy => Attempt::Heavy,
            Stage::ToCall | Stage::Called { .. } => Attempt::Waiting,
            Stage::ToAnswer { .. } | Stage::Answered { .. } | Stage::Punching { .. } => Attempt::Running,
            Stage::Idle => Attempt::Failed { full_size_lost: self.full_size_lost, heavy: self.heavy_failures > 0 },
        }
    }

    /// When the agent wants to be ticked next.
    pub(crate) fn next_deadline(&self, last_tx: Option<Now>, now: Now) -> Option<Now> {
        let stage = match self.stage {
            Stage::Idle => self.next_round.filter(|_| self.awake),
            // The planner ticks these when candidates are fresh.
            Stage::ToCall | Stage::ToAnswer { .. } => None,
            Stage::Called { next, .. } => Some(next),
            Stage::Answered { at } => Some(at + GO_TIMEOUT),
            Stage::Punching { start, step } => Some(match PUNCH_MS.get(step) {
                Some(ms) => start + Duration::from_millis(*ms),
                None => start + PUNCH_ENDS,
            }),
        };
        let confirm = self.remotes.iter().filter(|r| r.wants_confirmation(now)).map(Remote::next_confirmation).min();
        let watch = self.current.filter(|_| self.awake).map(|c| match c.doubt {
            Some(doubt) if !doubt.both => (doubt.since + DOUBT_AFTER).min(c.last_probe + DOUBT_PROBE_GAP),
            Some(doubt) => (doubt.since + DEAD_AFTER).min(c.last_probe + DOUBT_PROBE_GAP),
            None => {
                let keepalive = c.last_probe.max(c.last_pong) + KEEPALIVE;
                // While data flows, look often enough to leave a dead path within a second.
                match last_tx {
                    Some(tx) if now.since(tx) < Duration::from_secs(2) => {
                        keepalive.min(now + Duration::from_millis(100))
                    }
                    _ => keepalive.min(now + Duration::from_secs(1)),
                }
            }
        });
        let check = self.remotes.iter().filter_map(|r| r.check).min();
        let size = self.size_due(last_tx, now);
        [stage, confirm, check, watch, size].into_iter().flatten().min()
    }

    // ---- what happens --------------------------------------------------------------------------------------------

    /// The peer is in use: look for a direct path if there is none.
    pub(crate) fn wake(&mut self, now: Now) {
        self.awake = true;
        if self.current.is_none() && self.stage == Stage::Idle && self.next_round.is_none_or(|at| at <= now) {
            self.stage = Stage::ToCall;
        }
    }

    /// What joined these two networks before: rounds begin with the attempt that worked then.
    pub(crate) fn begin_with(&mut self, attempt: usize) {
        if self.failures == 0 {
            self.failures = attempt;
            self.fresh = if attempt >= FRESH_PORT_AFTER { Fresh::Wanted } else { Fresh::No };
        }
    }

    /// A fresh port for this round, or none. What is learned from now on is probed from it.
    pub(crate) fn use_fresh_port(&mut self, socket: Option<SocketId>) {
        self.fresh = socket.map_or(Fresh::No, Fresh::Yes);
        if let Some(socket) = socket {
            let current = self.current.map(|c| c.leg);
            for remote in &mut self.remotes {
                let idle = remote.last_pong.is_none() && Some(remote.leg) != current;
                if idle && !remote.near && remote.leg.remote.is_ipv4() {
                    remote.leg.socket = socket;
                }
            }
        }
    }

    /// We learned addresses of ours that the peer was not told: what is under way cannot use them, so call (again).
    pub(crate) fn candidates_grew(&mut self) {
        if self.awake && self.current.is_none() {
            self.next_round = None;
            self.stage = Stage::ToCall;
        }
    }

    /// The peer is not in use any more: no packet goes to it on our account.
    pub(crate) fn sleep<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.awake = false;
        self.stage = Stage::Idle;
        self.next_round = None;
        self.failures = 0;
        self.fresh = Fresh::No;
        self.remotes.clear();
        self.in_flight.clear();
        if self.current.take().is_some() {
            cx.actions.push_back(Action::Select(Path::Relay));
        }
    }

    /// The network around this node changed: what was proven is doubtful, what failed may work now.
    pub(crate) fn network_changed<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.failures = 0;
        self.fresh = Fresh::No;
        self.heavy_failures = 0;
        self.heavy_not_before = None;
        self.next_round = None;
        for remote in &mut self.remotes {
            remote.forget();
        }
        if let Some(current) = &mut self.current {
            current.doubt = Some(Doubt { since: cx.now, both: true, theirs: false });
            let leg = current.leg;
            cx.actions.push_back(Action::Select(leg.both()));
            self.probe(leg, FULL, cx);
            self.search.suspect(cx.now);
        }
        // A call of the peer is answered with what is known soon: the peer may be the one that ignores calls meanwhile.
        if self.awake && !matches!(self.stage, Stage::ToAnswer { .. }) {
            self.stage = Stage::ToCall;
        }
    }

    /// Addresses worth trying without asking the peer first, such as the one that worked last time.
    pub(crate) fn try_remembered<R: Rng>(&mut self, addr: SocketAddr, near: bool, cx: &mut Context<'_, R>) {
        if self.learn(Leg::main(addr), near) {
            self.probe(Leg::main(addr), SMALL, cx);
        }
    }

    /// Our own candidates are fresh: a waiting call or answer goes out.
    pub(crate) fn candidates_ready<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        match self.stage {
            Stage::ToCall => {
                self.round = self.round.wrapping_add(1);
                self.tally = Seen::default();
                self.stage = Stage::Called { at: cx.now, tries: 0, next: cx.now + CALL_RETRY[0] };
                self.tell(MessageKind::Call, Some(cx.now.0), None, None, cx);
            }
            Stage::ToAnswer { t, since } => {
                let held = u64::try_from(cx.now.since(since).as_micros()).unwrap_or(u64::MAX);
                self.tally = Seen::default();
                self.stage = Stage::Answered { at: cx.now };
                self.tell(MessageKind::Answer, Some(held), t, None, cx);
                // Our NAT is opened now, so that the caller's first probe finds it open; what needs no opening, or lets
                // everybody in, is probed at once.
                self.probe_unhindered(cx);
                let closed = |r: &&Remote| !r.near && !r.open && r.proven.is_none();
                for to in self.remotes.iter().filter(closed).map(|r| r.leg).collect::<Vec<_>>() {
                    cx.actions.push_back(Action::Prime { txid: fresh_txid(cx.tx_prefix, cx.rng), to });
                }
            }
            Stage::Idle | Stage::Called { .. } | Stage::Answered { .. } | Stage::Punching { .. } => {}
        }
    }

    /// The peer sent its candidates (already filtered).
    pub(crate) fn heard_candidates(&mut self, candidates: &[Offer], theirs: NatView) {
        self.theirs = theirs;
        let current = self.current.map(|c| c.leg);
        // The newest list replaces older ones; what has answered lately stays.
        self.remotes.retain(|r| {
            Some(r.leg) == current || r.last_pong.is_some() || candidates.iter().any(|c| c.addr == r.leg.remote)
        });
        for offer in candidates {
            let leg = self.leg_to(offer.addr, offer.near);
            self.learn(leg, offer.near);
            if let Some(remote) = self.remote_mut(leg) {
                remote.open = offer.open;
            }
        }
    }

    /// From the socket of this round; on our own networks from the main one, which needs no NAT.
    fn leg_to(&self, addr: SocketAddr, near: bool) -> Leg {
        match self.fresh {
            Fresh::Yes(socket) if !near && addr.is_ipv4() => Leg { socket, remote: addr },
            Fresh::Yes(_) | Fresh::Wanted | Fresh::No => Leg::main(addr),
        }
    }

    /// Somebody says that everybody can reach the peer here.
    pub(crate) fn heard_open<R: Rng>(&mut self, addrs: &[SocketAddr], cx: &mut Context<'_, R>) {
        for leg in addrs.iter().map(|addr| Leg::main(*addr)) {
            if self.awake && self.current.is_none() && self.learn(leg, false) {
                self.probe(leg, FULL, cx);
            }
        }
    }

    /// Whether what is known of both NATs rules a plain punch out.
    pub(crate) const fn set_outlook(&mut self, hopeless: bool) {
        self.brief = hopeless;
    }

    /// The peer called.
    pub(crate) fn heard_call<R: Rng>(&mut self, round: u32, t: Option<u64>, fresh: bool, cx: &mut Context<'_, R>) {
        if self.wins_ties && matches!(self.stage, Stage::Called { .. }) {
            return; // it will answer our call
        }
        self.awake = true;
        self.round = round;
        self.fresh = if fresh { Fresh::Wanted } else { Fresh::No };
        self.stage = Stage::ToAnswer { t, since: cx.now };
        // Who has a path that works does not call: until ours has answered, what we send goes both ways.
        if let Some(current) = self.current.filter(|c| c.doubt.is_none_or(|d| !d.both)) {
            self.doubt(true, true, cx.now);
            cx.actions.push_back(Action::Select(current.leg.both()));
            self.probe(current.leg, self.data_size(), cx);
        }
    }

    /// There is a relay again: a call that went nowhere is repeated at once.
    pub(crate) fn relay_came<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        if matches!(self.stage, Stage::Called { .. }) {
            self.stage = Stage::Called { at: cx.now, tries: 0, next: cx.now + CALL_RETRY[0] };
            self.tell(MessageKind::Call, Some(cx.now.0), None, None, cx);
        }
    }

    /// The peer answered our call. `opened`: its NAT lets our first probe in, so there is nothing to wait for. `role`: our
    /// part in a heavy punch, told to the peer. Returns whether the answer was to our latest call.
    pub(crate) fn heard_answer<R: Rng>(
        &mut self,
        answer: &HeardAnswer,
        role: Option<Role>,
        cx: &mut Context<'_, R>,
    ) -> bool {
        let Stage::Called { at, .. } = self.stage else { return false };
        if answer.round != self.round {
            return false;
        }
        let asked = answer.echo.map_or(at, Now).max(at);
        let rtt = cx.now.since(asked).saturating_sub(Duration::from_micros(answer.held.unwrap_or(0)));
        self.relay_rtt = Some(rtt);
        self.tell(MessageKind::Go, u64::try_from(rtt.as_micros()).ok(), None, role, cx);
        // If that has failed before, perhaps its NAT was not opened after all: then both start at the same moment.
        let start = if answer.opened && self.failures == 0 { cx.now } else { cx.now + rtt / 2 };
        self.stage = Stage::Punching { start, step: 0 };
        self.probe_unhindered(cx);
        self.punch(cx);
        true
    }

    /// The caller says go. Returns whether that was awaited.
    pub(crate) fn heard_go<R: Rng>(&mut self, round: u32, cx: &mut Context<'_, R>) -> bool {
        let awaited = matches!(self.stage, Stage::Answered { .. }) && round == self.round;
        if awaited {
            self.stage = Stage::Punching { start: cx.now, step: 0 };
            self.tick(Stamps::default(), cx);
        }
        awaited
    }

    /// A heavy punch towards the peer begins: the next round waits for its end.
    pub(crate) const fn heavy_began(&mut self) {
        self.heavy = true;
        self.next_round = None;
    }

    /// It is over. Without a path the next one comes later than the last.
    pub(crate) fn heavy_ended(&mut self, now: Now) {
        self.heavy = false;
        if self.current.is_none() {
            self.heavy_failed(now);
        }
    }

    fn heavy_failed(&mut self, now: Now) {
        let wait = HEAVY_BACKOFF_S.get(self.heavy_failures).or(HEAVY_BACKOFF_S.last()).copied().unwrap_or(HOPELESS_S);
        self.heavy_failures += 1;
        self.failed = Some(self.tally);
        self.heavy_not_before = Some(now + Duration::from_secs(wait));
        let shift = if self.wins_ties { 0 } else { 1500 };
        if matches!(self.stage, Stage::Idle | Stage::Punching { .. }) {
            self.stage = Stage::Idle;
            self.next_round = Some(now + Duration::from_millis(wait * 1000 + shift));
        }
    }

    /// Whether one more probe of this peer may be answered now.
    pub(crate) fn may_answer(&mut self, now: Now) -> bool {
        let earned = now.since(self.answers_refilled).as_millis() * u128::from(ANSWERS_PER_SECOND) / 1000;
        if earned > 0 {
            self.answers_left =
                u32::try_from(earned).unwrap_or(u32::MAX).saturating_add(self.answers_left).min(ANSWER_BURST);
            self.answers_refilled = now;
        }
        let may = self.answers_left > 0;
        self.answers_left = self.answers_left.saturating_sub(1);
        may
    }

    /// An authenticated probe of the peer came from `from` (and was answered). A new address is peer-reflexive (RFC 8445
    /// section 7.3.1.3); any is probed back (a triggered check, section 7.3.1.4).
    pub(crate) fn heard_probe<R: Rng>(&mut self, from: Leg, near: bool, full_size: bool, cx: &mut Context<'_, R>) {
        if !self.awake {
            return;
        }
        self.tally.heard = self.tally.heard.saturating_add(1);
        self.learn(from, near);
        let Some(remote) = self.remote_mut(from) else { return };
        remote.heard = true;
        let pinged_lately = remote.last_sent.filter(|at| cx.now.since(*at) < TRIGGERED_GAP);
        let known_good = remote.proven.is_some_and(|at| cx.now.since(at) < KEEPALIVE);
        match pinged_lately {
            _ if known_good => {}
            // That one may have come too early for the peer to know us.
            Some(at) if remote.last_pong.is_none() => remote.check = Some(at + TRIGGERED_GAP),
            Some(_) => {}
            None => self.probe(from, if full_size { FULL } else { SMALL }, cx),
        }
    }

    /// A probe of a heavy punch was answered from where it went.
    pub(crate) fn heard_answer_to_heavy<R: Rng>(&mut self, from: Leg, rtt: Duration, cx: &mut Context<'_, R>) {
        self.learn(from, false);
        let Some(remote) = self.remote_mut(from) else { return };
        remote.last_pong = Some(cx.now);
        remote.rtt = Some(remote.rtt.map_or(rtt, |old| old.min(rtt)));
        if remote.proven.is_none() {
            self.confirm(from, cx);
        }
    }

    /// These sockets are closed.
    pub(crate) fn forget_sockets(&mut self, closed: &[SocketId]) {
        self.remotes.retain(|r| !closed.contains(&r.leg.socket));
        self.in_flight.retain(|p| !closed.contains(&p.to.socket));
    }

    /// Somebody waits for an answer on the path in use: if none comes, it is in doubt.
    pub(crate) fn question<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.ask_current(false, cx);
    }

    /// Authenticated data came from an address that is not the current one: the peer moved, perhaps.
    pub(crate) fn heard_data_from<R: Rng>(&mut self, from: Leg, near: bool, cx: &mut Context<'_, R>) {
        self.learn(from, near);
        if let Some(remote) = self.remote_mut(from) {
            remote.full_tries = 0;
        }
        // Whichever of the two answers first is used: if both do, both sides choose alike.
        if self.current.is_some_and(|c| c.leg != from) {
            self.ask_current(true, cx);
        }
        self.probe(from, FULL, cx);
    }

    /// Puts the path in use in doubt. `theirs`: the peer does as if it had not this path any more.
    fn ask_current<R: Rng>(&mut self, theirs: bool, cx: &mut Context<'_, R>) {
        if let Some(current) = self.current.filter(|c| c.doubt.is_none()) {
            self.doubt(false, theirs, cx.now);
            self.probe(current.leg, if theirs { self.data_size() } else { SMALL }, cx);
        }
    }

    /// One of our probes was answered by `len` bytes, from the address it went to. Returns whether the probe was ours.
    pub(crate) fn heard_answer_to_probe<R: Rng>(
        &mut self,
        txid: &TransactionId,
        from: Leg,
        len: usize,
        cx: &mut Context<'_, R>,
    ) -> bool {
        let Some(position) = self.in_flight.iter().position(|p| p.txid == *txid && p.to == from) else { return false };
        let Some(probe) = self.in_flight.remove(position) else { return false };
        self.tally.answered = self.tally.answered.saturating_add(1);
        let rtt = cx.now.since(probe.sent);
        // The answer is as long, up to the size that every path is asked for.
        let proves = probe.size.filter(|size| len >= usize::from((*size).min(BASE)) + DATA_OVERHEAD);
        if let Some(current) = self.current.as_mut().filter(|c| c.leg == from) {
            current.last_pong = cx.now;
            current.rtt = (current.rtt * 7 + rtt) / 8;
            // What does not arrive may be only what is long.
            let small_is_enough = !self.search.is_suspecting() && current.doubt.is_some_and(|d| !d.theirs);
            let settled = proves.is_some() || small_is_enough;
            if settled && current.doubt.take().is_some_and(|d| d.both) {
                cx.actions.push_back(Action::Select(from.direct()));
            }
            if let Some(size) = proves {
                self.size_passed(size, cx);
            }
        }
        let Some(remote) = self.remote_mut(from) else { return true };
        remote.last_pong = Some(cx.now);
        remote.rtt = Some(remote.rtt.map_or(rtt, |old| old.min(rtt)));
        if let Some(size) = proves {
            remote.proven = Some(cx.now);
            remote.size = size.min(BASE);
            remote.full_tries = 0;
            self.consider(from, rtt, cx);
        } else if remote.proven.is_none() {
            self.confirm(from, cx);
        }
        true
    }

    /// A deadline passed, or the stamps are worth a look.
    pub(crate) fn tick<R: Rng>(&mut self, stamps: Stamps, cx: &mut Context<'_, R>) {
        let now = cx.now;
        while self.in_flight.front().is_some_and(|p| now.since(p.sent) > PROBE_LIFETIME) {
            self.in_flight.pop_front();
        }
        self.watch(stamps, cx);
        self.look_at_size(stamps, cx);
        let unconfirmed: Vec<Leg> = self
            .remotes
            .iter()
            .filter(|r| r.wants_confirmation(now) && r.next_confirmation() <= now)
            .map(|r| r.leg)
            .collect();
        for leg in unconfirmed {
            self.confirm(leg, cx);
        }
        self.review(cx);
        let due = |r: &&mut Remote| r.check.is_some_and(|at| at <= now);
        let checks: Vec<Leg> = self.remotes.iter_mut().filter(due).map(|r| r.leg).collect();
        for leg in checks {
            self.probe(leg, SMALL, cx);
        }
        match self.stage {
            Stage::Idle => {
                if self.awake && self.current.is_none() && self.next_round.is_some_and(|at| at <= now) {
                    self.next_round = None;
                    self.stage = Stage::ToCall;
                }
            }
            Stage::Called { at, tries, next } if next <= now => match CALL_RETRY.get(tries + 1) {
                Some(wait) => {
                    self.stage = Stage::Called { at, tries: tries + 1, next: now + *wait };
                    self.tell(MessageKind::Call, Some(now.0), None, None, cx);
                }
                None => self.round_failed(now),
            },
            Stage::Answered { at } if at + GO_TIMEOUT <= now => {
                self.stage = Stage::Punching { start: now, step: 0 };
                self.punch(cx);
            }
            Stage::Punching { .. } => self.punch(cx),
            Stage::ToCall | Stage::Called { .. } | Stage::ToAnswer { .. } | Stage::Answered { .. } => {}
        }
    }

    /// The profiles of both NATs changed: a sleeping hopeless pair may try again.
    pub(crate) fn profile_changed(&mut self, now: Now) {
        self.heavy_failures = 0;
        self.heavy_not_before = None;
        if self.awake && self.current.is_none() {
            self.failures = 0;
            self.next_round = Some(now);
        }
    }

    /// What is known of both NATs rules a plain punch out: wait long before trying again.
    pub(crate) fn is_hopeless(&mut self, now: Now) {
        if self.stage == Stage::Idle && self.current.is_none() && self.failures > 0 {
            self.next_round = self.next_round.map(|at| at.max(now + Duration::from_secs(HOPELESS_S)));
        }
    }

    // ---- how -----------------------------------------------------------------------------------------------------

    fn punch<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let Stage::Punching { start, mut step } = self.stage else { return };
        let mut due = false;
        let steps = if self.brief { BRIEF_STEPS } else { PUNCH_MS.len() };
        while PUNCH_MS.get(step).is_some_and(|ms| start + Duration::from_millis(*ms) <= cx.now) {
            step += 1;
            due |= step <= steps;
        }
        self.stage = Stage::Punching { start, step };
        if due {
            // The first are of data size: answered, they prove the path in one round trip. The second are small, so that a
            // path that drops large packets shows itself.
            let full_size = !step.is_multiple_of(2);
            // Once a path is proven only what answered is measured further: no probes into the void.
            let settled = self.current.is_some_and(|c| c.doubt.is_none());
            let mut order: Vec<(bool, bool, Leg)> = self
                .remotes
                .iter()
                .filter(|r| r.proven.is_none() && (!settled || r.last_pong.is_some()))
                .map(|r| (!r.near, !r.heard, r.leg))
                .collect();
            order.sort();
            for (.., leg) in order {
                self.probe(leg, if full_size { FULL } else { SMALL }, cx);
            }
        }
        if start + PUNCH_ENDS <= cx.now {
            if self.current.is_some() {
                self.stage = Stage::Idle;
                self.failures = 0;
                self.next_round = None;
            } else {
                self.round_failed(cx.now);
            }
        }
    }

    /// Probes what needs no opening first: addresses on our own networks, and those that let everybody in.
    fn probe_unhindered<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let now = cx.now;
        let fresh = |r: &&Remote| {
            (r.near || r.open) && r.proven.is_none() && r.last_sent.is_none_or(|at| now.since(at) >= TRIGGERED_GAP)
        };
        for leg in self.remotes.iter().filter(fresh).map(|r| r.leg).collect::<Vec<_>>() {
            self.probe(leg, FULL, cx);
        }
    }

    fn round_failed(&mut self, now: Now) {
        if self.heavy {
            self.stage = Stage::Idle;
            return;
        }
        // A call that nobody answered shows nothing of the network between.
        self.called_in_vain = matches!(self.stage, Stage::Called { .. });
        if !self.called_in_vain {
            self.failed = Some(self.tally);
        }
        self.stage = Stage::Idle;
        self.full_size_lost = self.remotes.iter().any(|r| r.last_pong.is_some() && r.proven.is_none());
        let wait = BACKOFF_S.get(self.failures).or(BACKOFF_S.last()).copied().unwrap_or(HOPELESS_S);
        self.failures += 1;
        self.fresh = if self.failures >= FRESH_PORT_AFTER && !self.brief { Fresh::Wanted } else { Fresh::No };
        // Two sides that failed together must not call together: the tie winner goes first.
        let shift = if self.wins_ties { 0 } else { 1500 };
        self.next_round = Some(now + Duration::from_millis(wait * 1000 + shift));
        let current = self.current.map(|c| c.leg);
        self.remotes.retain(|r| Some(r.leg) == current || r.last_pong.is_some());
        for remote in &mut self.remotes {
            remote.full_tries = 0;
        }
    }

    fn confirm<R: Rng>(&mut self, leg: Leg, cx: &mut Context<'_, R>) {
        if let Some(remote) = self.remote_mut(leg) {
            if remote.full_tries >= CONFIRM_TRIES || remote.last_full.is_some_and(|at| cx.now.since(at) < CONFIRM_GAP) {
                return;
            }
            let narrow = NARROW.iter().rev().find(|(tries, _)| remote.full_tries >= *tries);
            self.probe(leg, narrow.map_or(FULL, |(_, size)| Some(*size)), cx);
        }
    }

    fn probe<R: Rng>(&mut self, to: Leg, size: Option<u16>, cx: &mut Context<'_, R>) {
        let txid = fresh_txid(cx.tx_prefix, cx.rng);
        self.tally.sent = self.tally.sent.saturating_add(1);
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            self.in_flight.pop_front();
        }
        self.in_flight.push_back(InFlight { txid, to, sent: cx.now, size });
        if let Some(remote) = self.remote_mut(to) {
            remote.last_sent = Some(cx.now);
            remote.check = None;
            if size.is_some() {
                remote.last_full = Some(cx.now);
                remote.full_tries = remote.full_tries.saturating_add(1);
            }
        }
        if let Some(current) = self.current.as_mut().filter(|c| c.leg == to) {
            current.last_probe = cx.now;
        }
        cx.actions.push_back(Action::Probe { txid, to, size });
    }

    fn tell<R: Rng>(
        &self,
        kind: MessageKind,
        t: Option<u64>,
        echo: Option<u64>,
        role: Option<Role>,
        cx: &mut Context<'_, R>,
    ) {
        cx.actions.push_back(Action::Tell { kind, round: self.round, t, echo, role });
    }

    /// Remembers an address; false if there is no room.
    fn learn(&mut self, leg: Leg, near: bool) -> bool {
        if self.remotes.iter().any(|r| r.leg == leg) {
            return true;
        }
        if self.remotes.len() >= MAX_REMOTES {
            let current = self.current.map(|c| c.leg);
            let Some(spare) = self.remotes.iter().position(|r| r.last_pong.is_none() && Some(r.leg) != current) else {
                return false;
            };
            self.remotes.remove(spare);
        }
        self.remotes.push(Remote {
            leg,
            near,
            open: false,
            heard: false,
            wins: 0,
            review: None,
            rtt: None,
            last_sent: None,
            last_pong: None,
            proven: None,
            size: BASE,
            last_full: None,
            full_tries: 0,
            check: None,
        });
        true
    }

    fn remote_mut(&mut self, leg: Leg) -> Option<&mut Remote> {
        self.remotes.iter_mut().find(|r| r.leg == leg)
    }
}

impl Remote {
    /// It answered a small probe lately, but none of data size yet.
    fn wants_confirmation(&self, now: Now) -> bool {
        self.proven.is_none()
            && self.full_tries < CONFIRM_TRIES
            && self.last_pong.is_some_and(|at| now.since(at) < PROBE_LIFETIME)
    }

    fn next_confirmation(&self) -> Now {
        self.last_full.map_or(Now::ZERO, |at| at + CONFIRM_GAP)
    }

    fn forget(&mut self) {
        self.proven = None;
        self.last_pong = None;
        self.full_tries = 0;
    }
}

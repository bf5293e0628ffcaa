//! One punch with many sockets or ports, from this node's side: what to open, what to send when, what to tell the peer.
//! A pure machine; `technique.rs` says which roles there are and why they work.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rustc_hash::FxBuildHasher;

use crate::engine::io::SocketId;
use crate::engine::path::Leg;
use crate::engine::path::ports::{self, Sample};
use crate::engine::path::reflexive::fresh_txid;
use crate::engine::path::technique::{GRID_FLOWS, MOST_SCANNED, MOST_STRIDE_FLOWS, ROW, STRIDE_FLOWS};
use crate::time::Now;
use crate::wire::nat::PortModel;
use crate::wire::probe::{Counter, MAX_NUMBERS, Punch, Role};
use crate::wire::stun::TransactionId;

/// A punch is over after this long: 2,048 probes at 1,000 a second, and the ways there and back.
const LASTS: Duration = Duration::from_secs(6);
/// Sockets that were asked for are there by then, or not at all.
const OPEN_WITHIN: Duration = Duration::from_secs(1);
/// STUN answers are waited for this long; requests are repeated once, at half of it.
const STUN_WITHIN: Duration = Duration::from_millis(300);
/// Between the two bursts that measure how fast a NAT counts.
const BURST_GAP: Duration = Duration::from_millis(150);
/// Sockets in one such burst.
const BURST: usize = 4;
/// A few predicted ports are tried at these times.
const NUMBERS_AGAIN: [Duration; 3] = [Duration::ZERO, Duration::from_millis(150), Duration::from_millis(450)];
/// After a hit nothing is sent for so long: the path is being proven.
const HELD: Duration = Duration::from_millis(400);
/// After the last probe this long is waited for an answer.
const SPENT: Duration = Duration::from_millis(800);
/// A probe unanswered for so long is lost.
const LOST: Duration = Duration::from_secs(3);
/// The ports that a NAT can choose from where nothing else is known.
const ALL_PORTS: (u16, u16) = (1024, u16::MAX);

/// What a punch starts from.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) role: Role,
    /// This node called.
    pub(crate) leads: bool,
    /// How the NAT here chooses ports.
    pub(crate) mine: Option<PortModel>,
    /// How the peer's does.
    pub(crate) theirs: Option<PortModel>,
    /// Where the peer is seen.
    pub(crate) target: SocketAddr,
    /// STUN servers, IPv4.
    pub(crate) servers: Vec<SocketAddr>,
    /// From here to the peer through the relay.
    pub(crate) relay_one_way: Duration,
}

/// One datagram to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shot {
    pub(crate) leg: Leg,
    pub(crate) txid: TransactionId,
    pub(crate) kind: ShotKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShotKind {
    /// A Binding request to a STUN server.
    Stun,
    /// A probe to the peer.
    Probe,
    /// A probe that need not arrive: it makes our NAT expect the peer.
    Opener,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Heavy {
    setting: Setting,
    began: Now,
    sockets: Vec<SocketId>,
    opened: bool,
    shots: VecDeque<(Leg, ShotKind)>,
    last_shot: Option<Now>,
    /// Not before then.
    held_until: Now,
    /// STUN requests: which socket, when first, what the server saw.
    asked: Vec<Asked>,
    second_burst: Option<Now>,
    repeat_stun: Option<Now>,
    /// STUN answers are waited for until then.
    measuring: Option<Now>,
    told: Option<Now>,
    tell: Option<Punch>,
    heard: Option<(Punch, Now)>,
    /// Few ports are tried several times.
    again: VecDeque<Now>,
    volley: Option<Now>,
    sent: HashMap<TransactionId, (Leg, Now), FxBuildHasher>,
    hit: bool,
    failed: bool,
}

#[derive(Debug)]
struct Asked {
    txid: TransactionId,
    leg: Leg,
    at: Now,
    external: Option<u16>,
}

impl Heavy {
    pub(crate) fn new(setting: Setting, now: Now) -> Self {
        Self {
            opened: false,
            began: now,
            sockets: Vec::new(),
            shots: VecDeque::new(),
            last_shot: None,
            held_until: now,
            asked: Vec::new(),
            second_burst: None,
            repeat_stun: None,
            measuring: None,
            told: None,
            tell: None,
            heard: None,
            again: VecDeque::new(),
            volley: None,
            sent: HashMap::default(),
            hit: false,
            failed: false,
            setting,
        }
    }

    /// Nothing more will come of it.
    pub(crate) fn is_over(&self, now: Now) -> bool {
        self.failed || now >= self.ends()
    }

    /// Whoever has sent all it had waits for the last answer only; whoever opened sockets, for as long as they may be found.
    fn ends(&self) -> Now {
        let sends = matches!(self.setting.role, Role::Scans | Role::Strides | Role::Guesses);
        let spent = self.heard.is_some() && self.shots.is_empty() && self.again.is_empty() && self.volley.is_none();
        let last = self.last_shot.filter(|_| sends && spent && !self.hit).map(|at| at + SPENT);
        last.unwrap_or(self.began + LASTS).min(self.began + LASTS)
    }

    /// What the peer must be told now.
    pub(crate) const fn poll_tell(&mut self) -> Option<Punch> {
        self.tell.take()
    }

    /// When [`Self::fire`] has something to do again; `rate` is how many shots a second there may be.
    pub(crate) fn next_deadline(&self, now: Now, wait_for_token: Duration) -> Option<Now> {
        let shots = (!self.shots.is_empty()).then(|| self.held_until.max(now + wait_for_token));
        let opened = (!self.opened && self.setting.role != Role::Scans).then_some(self.began + OPEN_WITHIN);
        [
            shots,
            opened,
            self.second_burst,
            self.repeat_stun,
            self.measuring,
            self.again.front().copied(),
            self.volley,
            Some(self.ends()),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // ---- what happens --------------------------------------------------------------------------------------------

    /// The sockets asked for are there; perhaps fewer.
    pub(crate) fn sockets_opened(&mut self, sockets: &[SocketId], now: Now, rng: &mut impl Rng) {
        if self.opened {
            return;
        }
        self.opened = true;
        self.sockets = sockets.to_vec();
        self.failed |= sockets.is_empty();
        match self.setting.role {
            Role::Opens => self.open(now),
            Role::Strides => {
                self.failed |= sockets.len() <= 2 * BURST;
                self.ask(0..BURST, now);
                self.second_burst = Some(now + BURST_GAP);
                self.measuring = Some(now + BURST_GAP + STUN_WITHIN);
            }
            Role::Counts => self.send_row(now, rng),
            Role::Grid => self.fill_grid(rng),
            Role::Guesses => self.guess(rng),
            Role::Scans | Role::Busy | Role::Unknown => {}
        }
    }

    /// A STUN server answered one of the punch's sockets. False: not a question of ours.
    pub(crate) fn heard_stun(&mut self, txid: &TransactionId, mapped: SocketAddr) -> bool {
        let Some(asked) = self.asked.iter_mut().find(|a| a.txid == *txid) else { return false };
        asked.external.get_or_insert(mapped.port());
        true
    }

    /// The peer tells what it learned.
    pub(crate) fn heard_ports(&mut self, mut punch: Punch, now: Now, rng: &mut impl Rng) {
        punch.numbers.truncate(MAX_NUMBERS);
        if self.heard.is_some() || punch.role != self.setting.role.counterpart() {
            return;
        }
        self.heard = Some((punch, now));
        match self.setting.role {
            Role::Scans => self.scan(now, rng),
            Role::Guesses if self.opened => self.guess(rng),
            Role::Strides => self.schedule_volley(now),
            _ => {}
        }
    }

    /// A probe of ours was answered: from where it went, and after how long.
    pub(crate) fn answered(&mut self, txid: &TransactionId, from: Leg, now: Now) -> Option<Duration> {
        let (leg, at) = self.sent.get(txid).copied()?;
        if leg != from {
            return None;
        }
        self.sent.remove(txid);
        self.reached(now);
        Some(now.since(at))
    }

    /// Whether this transaction is a probe of this punch.
    pub(crate) fn sent(&self, txid: &TransactionId) -> bool {
        self.sent.contains_key(txid)
    }

    /// The peer's probe, or its answer, came through: the rest can wait.
    pub(crate) fn reached(&mut self, now: Now) {
        if !self.hit {
            self.hit = true;
            self.held_until = now + HELD;
        }
    }

    /// What is due, at most `allowance` datagrams.
    pub(crate) fn fire(&mut self, allowance: usize, prefix: [u8; 4], rng: &mut impl Rng, now: Now) -> Vec<Shot> {
        self.due(now);
        if now >= self.held_until {
            self.hit = false;
        }
        let mut shots = Vec::new();
        while now >= self.held_until && shots.len() < allowance {
            let Some((leg, kind)) = self.shots.pop_front() else { break };
            let txid = fresh_txid(prefix, rng);
            match kind {
                ShotKind::Stun => match self.asked.iter_mut().find(|a| a.leg == leg) {
                    // A repetition keeps the id: whichever answer comes tells the same mapping.
                    Some(asked) => {
                        shots.push(Shot { leg, txid: asked.txid, kind });
                        continue;
                    }
                    None => self.asked.push(Asked { txid, leg, at: now, external: None }),
                },
                ShotKind::Probe => {
                    self.sent.insert(txid, (leg, now));
                }
                ShotKind::Opener => {}
            }
            shots.push(Shot { leg, txid, kind });
        }
        if shots.iter().any(|s| s.kind == ShotKind::Probe) {
            self.last_shot = Some(now);
        }
        self.report(now);
        shots
    }

    fn due(&mut self, now: Now) {
        let passed = |at: Option<Now>| at.is_some_and(|at| at <= now);
        self.failed |= !self.opened && self.setting.role != Role::Scans && now >= self.began + OPEN_WITHIN;
        if self.sent.len() > 256 {
            self.sent.retain(|_, (_, at)| now.since(*at) < LOST);
        }
        if passed(self.second_burst) {
            self.second_burst = None;
            self.ask(BURST..2 * BURST, now);
        }
        if passed(self.repeat_stun) {
            self.repeat_stun = None;
            let silent = self.asked.iter().filter(|a| a.external.is_none()).map(|a| (a.leg, ShotKind::Stun));
            self.shots.extend(silent.collect::<Vec<_>>());
        }
        if self.again.front().is_some_and(|at| *at <= now) {
            self.again.pop_front();
            self.try_numbers();
        }
        if passed(self.volley) {
            self.volley = None;
            self.fire_volley(now);
        }
    }

    // ---- opening -------------------------------------------------------------------------------------------------

    /// Openers from every socket; where ports can be predicted, each right after a question that shows where the NAT is
    /// in its counting. Nobody else's mapping fits in between.
    fn open(&mut self, now: Now) {
        let target = self.setting.target;
        for socket in self.sockets.clone() {
            if self.predicts() {
                self.shots.extend(self.question(socket));
            }
            self.shots.push_back((Leg { socket, remote: target }, ShotKind::Opener));
        }
        if self.predicts() {
            self.repeat_stun = Some(now + STUN_WITHIN / 2);
            self.measuring = Some(now + STUN_WITHIN);
        }
    }

    const fn predicts(&self) -> bool {
        matches!(self.setting.mine, Some(PortModel::Sequential { .. } | PortModel::Preserving))
    }

    /// Our flows into the block of the peer, between two questions that show which ports they got.
    fn send_row(&mut self, now: Now, rng: &mut impl Rng) {
        let [first, row, last] = self.sockets[..] else {
            self.failed = true;
            return;
        };
        self.shots.extend(self.question(first));
        let block = range_of(self.setting.theirs);
        for port in distinct(block, usize::from(ROW), rng) {
            let remote = SocketAddr::new(self.setting.target.ip(), port);
            self.shots.push_back((Leg { socket: row, remote }, ShotKind::Opener));
        }
        self.shots.extend(self.question(last));
        self.repeat_stun = Some(now + STUN_WITHIN / 2);
        self.measuring = Some(now + STUN_WITHIN);
    }

    /// Tells the peer, once what it needs is known.
    fn report(&mut self, now: Now) {
        let ready = self.told.is_none() && self.opened && self.shots.is_empty() && self.second_burst.is_none();
        let missing = |asked: &[Asked]| asked.iter().filter(|a| a.external.is_none()).count();
        let answers_missing = match self.setting.role {
            // A counter goes on while one waits: three answers of the second burst are enough.
            Role::Strides => missing(self.asked.get(BURST..).unwrap_or_default()) > 1,
            _ => missing(&self.asked) > 0,
        };
        let patient = self.measuring.is_some_and(|until| now < until);
        if !ready || (answers_missing && patient) {
            return;
        }
        let role = self.setting.role;
        let punch = match role {
            Role::Opens if self.predicts() => self.predicted_numbers(),
            Role::Opens => Some(Punch { role, range: Some(range_of(self.setting.mine)), ..Punch::default() }),
            Role::Counts => self.row_numbers(),
            Role::Strides => self.counter(now).map(|c| Punch { role, counter: Some(c), ..Punch::default() }),
            Role::Scans | Role::Grid | Role::Guesses | Role::Busy | Role::Unknown => return,
        };
        self.measuring = None;
        self.told = Some(now);
        self.failed |= punch.is_none();
        self.tell = punch;
        self.schedule_volley(now);
    }

    /// The ports between those that the servers saw.
    fn predicted_numbers(&self) -> Option<Punch> {
        let seen: Vec<u16> = self.asked.iter().filter_map(|a| a.external).collect();
        let numbers = match self.setting.mine {
            Some(PortModel::Sequential { step, .. }) => {
                // The likeliest first: one step after each. Then what lies between two answers, where others came between;
                // after the last one nobody knows.
                let first = seen.iter().map(|port| step_on(*port, step, 1));
                let others = seen.iter().enumerate().flat_map(|(i, port)| {
                    let apart = |next: &u16| (i32::from(*next) - i32::from(*port)) / i32::from(step);
                    let between = seen.get(i + 1).map(apart).filter(|n| (1..64).contains(n)).unwrap_or(4);
                    (2..between).map(|n| step_on(*port, step, n))
                });
                first.chain(others).filter(|port| !seen.contains(port)).collect()
            }
            // A NAT that keeps ports where it can keeps them towards the peer too.
            _ => seen.clone(),
        };
        let mut distinct: Vec<u16> = Vec::new();
        for number in numbers {
            if !distinct.contains(&number) && distinct.len() < MAX_NUMBERS {
                distinct.push(number);
            }
        }
        (!distinct.is_empty()).then(|| Punch { role: Role::Opens, numbers: distinct, ..Punch::default() })
    }

    /// The ports of the row: those after the first answer, or those before the last.
    fn row_numbers(&self) -> Option<Punch> {
        let Some(PortModel::Sequential { step, .. }) = self.setting.mine else { return None };
        let first = self.asked.first().and_then(|a| a.external);
        let last = self.asked.get(1).and_then(|a| a.external);
        let row = i32::from(ROW);
        let numbers: Vec<u16> = match (first, last) {
            (Some(first), _) => (1..=row).map(|n| step_on(first, step, n)).collect(),
            (None, Some(last)) => (1..=row).map(|n| step_on(last, step, -n)).collect(),
            (None, None) => return None,
        };
        Some(Punch { role: Role::Counts, numbers, ..Punch::default() })
    }

    /// Where our NAT is in its counting, and how fast others make it count.
    fn counter(&self, now: Now) -> Option<Counter> {
        let Some(PortModel::Sequential { step, per_second: before }) = self.setting.mine else { return None };
        let burst = |range: std::ops::Range<usize>| -> Vec<Sample> {
            let asked = self.asked.iter().skip(range.start).take(range.len());
            asked.filter_map(|a| a.external).map(|external| Sample { local: 0, external }).collect()
        };
        let (first, second) = (burst(0..BURST), burst(BURST..2 * BURST));
        let newest = second.last().or(first.last())?.external;
        let at = self.asked.last()?.at;
        // Two measurements are better than one, unless the counter wrapped around.
        let measured = ports::foreign(&first, &second, step, BURST_GAP);
        let per_second = measured.map_or(before, |measured| measured / 2 + before / 2);
        let age = u64::try_from(now.since(at).as_micros()).unwrap_or(u64::MAX);
        Some(Counter { next: step_on(newest, step, 1), step, per_second, age })
    }

    // ---- both count ----------------------------------------------------------------------------------------------

    /// Both sides send when the later of the two reports has arrived.
    fn schedule_volley(&mut self, now: Now) {
        if let (Role::Strides, Some(told), Some((_, heard))) = (self.setting.role, self.told, &self.heard)
            && self.volley.is_none()
        {
            self.volley = Some((told + self.setting.relay_one_way).max(*heard).max(now));
        }
    }

    /// A row of flows to the ports that the peer's NAT is about to give out. The error of the prediction on one side moves
    /// along one row, that on the other along both; strides of 1 and 2 meet for any two errors (Klinec and Matyáš 2014).
    fn fire_volley(&mut self, now: Now) {
        let Some((Punch { counter: Some(counter), .. }, heard)) = &self.heard else {
            self.failed = true;
            return;
        };
        let Some(socket) = self.sockets.get(2 * BURST).copied() else { return };
        let old = Duration::from_micros(counter.age) + self.setting.relay_one_way + now.since(*heard);
        let (rate, seconds) = (f64::from(counter.per_second), old.as_secs_f64());
        let expected = rate * seconds;
        // Others' mappings come at random, and how many come in a second was measured over the gap of the bursts only.
        let deviation = (expected * (1.0 + seconds / BURST_GAP.as_secs_f64())).sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "a few hundred at most")]
        let first = (expected - 3.0 * deviation).floor() as i32 - 2;
        let stride = if self.setting.leads { 1 } else { 2 };
        // Long enough for the errors of both sides.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the clamp")]
        let flows = (15.0 * deviation).clamp(f64::from(STRIDE_FLOWS), f64::from(MOST_STRIDE_FLOWS)) as u16;
        for i in 0..i32::from(flows) {
            let port = step_on(counter.next, counter.step, first + stride * i);
            let remote = SocketAddr::new(self.setting.target.ip(), port);
            self.shots.push_back((Leg { socket, remote }, ShotKind::Probe));
        }
    }

    // ---- trying many ports ---------------------------------------------------------------------------------------

    fn scan(&mut self, now: Now, rng: &mut impl Rng) {
        let Some((punch, _)) = &self.heard else { return };
        if !punch.numbers.is_empty() {
            self.again = NUMBERS_AGAIN.iter().map(|after| now + *after).collect();
        } else if let Some((low, high)) = punch.range.filter(|(low, high)| low <= high && *low > 0) {
            for port in distinct((low, high), MOST_SCANNED, rng) {
                self.shots.push_back((self.main_leg(port), ShotKind::Probe));
            }
        } else {
            self.failed = true;
        }
    }

    fn try_numbers(&mut self) {
        let Some((punch, _)) = &self.heard else { return };
        let legs: Vec<Leg> = punch.numbers.iter().filter(|n| **n > 0).map(|port| self.main_leg(*port)).collect();
        self.shots.extend(legs.into_iter().map(|leg| (leg, ShotKind::Probe)));
    }

    fn main_leg(&self, port: u16) -> Leg {
        Leg::main(SocketAddr::new(self.setting.target.ip(), port))
    }

    /// Every socket to each of many ports of the peer's block.
    fn fill_grid(&mut self, rng: &mut impl Rng) {
        let columns = usize::from(GRID_FLOWS) / self.sockets.len().max(1);
        for port in distinct(range_of(self.setting.theirs), columns, rng) {
            for socket in &self.sockets {
                let remote = SocketAddr::new(self.setting.target.ip(), port);
                self.shots.push_back((Leg { socket: *socket, remote }, ShotKind::Probe));
            }
        }
    }

    /// Every socket to each of the ports the peer's row has, in any order.
    fn guess(&mut self, rng: &mut impl Rng) {
        let Some((punch, _)) = &self.heard else { return };
        let ip: IpAddr = self.setting.target.ip();
        let mut legs: Vec<Leg> = Vec::new();
        for socket in &self.sockets {
            let ports = punch.numbers.iter().filter(|n| **n > 0).take(usize::from(ROW));
            legs.extend(ports.map(|port| Leg { socket: *socket, remote: SocketAddr::new(ip, *port) }));
        }
        legs.shuffle(rng);
        self.shots.extend(legs.into_iter().map(|leg| (leg, ShotKind::Probe)));
    }

    // ---- questions -----------------------------------------------------------------------------------------------

    fn question(&self, socket: SocketId) -> Option<(Leg, ShotKind)> {
        self.setting.servers.first().map(|server| (Leg { socket, remote: *server }, ShotKind::Stun))
    }

    fn ask(&mut self, sockets: std::ops::Range<usize>, now: Now) {
        let questions: Vec<_> =
            self.sockets.get(sockets).unwrap_or_default().iter().filter_map(|s| self.question(*s)).collect();
        self.shots.extend(questions);
        self.repeat_stun = Some(now + STUN_WITHIN / 2);
    }
}

/// `n` steps on from a port.
fn step_on(port: u16, step: i16, n: i32) -> u16 {
    let moved = i32::from(port) + i32::from(step) * n;
    u16::try_from(moved.rem_euclid(1 << 16)).unwrap_or(port)
}

/// The ports that a NAT may choose.
const fn range_of(model: Option<PortModel>) -> (u16, u16) {
    match model {
        Some(PortModel::Block { low, high }) if low <= high && low > 0 => (low, high),
        _ => ALL_PORTS,
    }
}

/// Up to `count` different ports of a range, in any order.
fn distinct((low, high): (u16, u16), count: usize, rng: &mut impl Rng) -> Vec<u16> {
    let mut all: Vec<u16> = (low..=high).collect();
    let count = count.min(all.len());
    for i in 0..count {
        let other = rng.random_range(i..all.len());
        all.swap(i, other);
    }
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests;

//! In which order the relay sends what waits, how much may wait, and how fast it goes.
//!
//! Packets wait in one queue for each pair of sender and receiver. A pair that had nothing waiting goes first, once, with
//! as much as its share of a round; from then on the pairs take turns, each with an equal share of bytes (deficit round
//! robin with a list of new flows, as in RFC 8290 section 4.1.2, without its dropping). So who sends little, a keystroke, a
//! call, a handshake, passes those who send much, whatever the size of the packets, and nobody can keep the others
//! waiting. Within a pair the order is kept: the relay cannot see flows, and a flow must not overtake itself.
//!
//! Room is bounded in bytes. A pair may hold as much as is left free, so one pair alone gets half of it, `n` greedy ones
//! `1/(n+1)` each, and there is always room for one more pair. What does not fit is refused, which is the newest.
//!
//! A token bucket bounds the rate of all pairs together; the turns make each pair's share of it equal.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rustc_hash::FxBuildHasher;

use crate::time::Now;

/// Sender and receiver, as numbers of [`crate::coord::relay_table`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Who sends.
    pub from: u32,
    /// Who receives.
    pub to: u32,
}

/// Something to be sent: one packet or a run of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// The shell's name for it.
    pub handle: u32,
    /// Its size in bytes on the wire.
    pub bytes: u32,
}

/// How much at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Bytes per second of all pairs together; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Bytes that may wait.
    pub room: u32,
    /// Items that may wait.
    pub items: u32,
}

/// Without a rate: bytes that may wait. Some milliseconds of what one core forwards.
const ROOM: u32 = 4 << 20;
/// With a rate: how much of it may wait, so that one greedy pair alone adds half of this to its own delay.
const ROOM_TIME: Duration = Duration::from_millis(100);
/// The least room: two of the longest runs.
const LEAST_ROOM: u32 = 128 << 10;
/// Items that may wait.
const ITEMS: u32 = 8_192;
/// The longest run, and a pair's share of a round, without a rate.
const QUANTUM: u32 = 64 << 10;
/// With a rate: a run takes at most this long, so that it does not hold up others for longer.
const RUN_TIME: Duration = Duration::from_millis(1);
/// And is at least this long, in bytes: one packet.
const LEAST_QUANTUM: u32 = 2 << 10;
/// An unused rate is saved up for this long.
const BURST: Duration = Duration::from_millis(5);
/// What the smallest packet costs of the room, in bytes.
const LEAST_COST: u32 = 512;

impl Config {
    /// The configuration for a rate in bytes per second, or for none.
    #[must_use]
    pub fn for_rate(rate: Option<u64>) -> Self {
        let room = rate.map_or(ROOM, |rate| amount(rate, ROOM_TIME).clamp(LEAST_ROOM, ROOM));
        Self { rate, room, items: ITEMS }
    }

    /// The longest run that should be offered as one item, in bytes; also a pair's share of a round.
    #[must_use]
    pub fn quantum(&self) -> u32 {
        self.rate.map_or(QUANTUM, |rate| amount(rate, RUN_TIME).clamp(LEAST_QUANTUM, QUANTUM))
    }

    fn burst(&self) -> i64 {
        self.rate.map_or(0, |rate| i64::from(amount(rate, BURST).max(self.quantum())))
    }
}

/// What passes at `rate` bytes per second in `time`.
fn amount(rate: u64, time: Duration) -> u32 {
    let bytes = u128::from(rate) * time.as_micros() / 1_000_000;
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Why an item was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Full {
    /// The pair has as much waiting as it may.
    Pair,
    /// No room is left for anybody.
    All,
}

/// The queues. Everything is allocated when it is made.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    /// Pairs with a queue, by their place in `queues`.
    places: HashMap<Pair, u32, FxBuildHasher>,
    queues: Vec<Queue>,
    free_queues: Vec<u32>,
    entries: Vec<Entry>,
    free_entries: Vec<u32>,
    new: VecDeque<u32>,
    old: VecDeque<u32>,
    room_used: u32,
    waiting: u32,
    /// Microseconds times bytes per second: a millionth of a byte each. Below zero after an item that was larger than what
    /// was left.
    tokens: i128,
    filled: Now,
}

#[derive(Debug, Clone, Copy)]
struct Queue {
    pair: Pair,
    first: u32,
    last: u32,
    room_used: u32,
    deficit: i64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    item: Item,
    next: u32,
}

/// No entry.
const NONE: u32 = u32::MAX;
/// Parts of a byte in which tokens are counted.
const PARTS: i128 = 1_000_000;

impl Scheduler {
    /// Empty queues and a full bucket.
    #[must_use]
    pub fn new(config: Config) -> Self {
        // A queue may outlive its items by one round, so there are more than items.
        let queues = config.items.saturating_mul(2);
        let pair = Pair { from: 0, to: 0 };
        let capacity = queues as usize;
        Self {
            config,
            places: HashMap::with_capacity_and_hasher(capacity, FxBuildHasher),
            queues: vec![Queue { pair, first: NONE, last: NONE, room_used: 0, deficit: 0 }; capacity],
            free_queues: (0..queues).rev().collect(),
            entries: vec![Entry { item: Item { handle: 0, bytes: 0 }, next: NONE }; config.items as usize],
            free_entries: (0..config.items).rev().collect(),
            new: VecDeque::with_capacity(capacity),
            old: VecDeque::with_capacity(capacity),
            room_used: 0,
            waiting: 0,
            tokens: i128::from(config.burst()) * PARTS,
            filled: Now::ZERO,
        }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Items that wait.
    #[must_use]
    pub const fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Queues an item of a pair.
    ///
    /// # Errors
    /// It was not taken, and nothing changed.
    pub fn offer(&mut self, pair: Pair, item: Item) -> Result<(), Full> {
        let cost = item.bytes.max(LEAST_COST);
        let free = self.config.room - self.room_used;
        if cost > free {
            return Err(Full::All);
        }
        let known = self.places.get(&pair).copied();
        let held = known.and_then(|place| self.queues.get(place as usize)).map_or(0, |queue| queue.room_used);
        // The first item of a pair always has its turn; after that a pair holds at most what is left for the others.
        if held > 0 && held + cost > free - cost {
            return Err(Full::Pair);
        }
        let Some(place) = known.or_else(|| self.free_queues.last().copied()) else { return Err(Full::All) };
        let Some(at) = self.free_entries.pop() else { return Err(Full::All) };
        if known.is_none() {
            self.free_queues.pop();
            self.places.insert(pair, place);
            self.new.push_back(place);
            self.queues[place as usize] =
                Queue { pair, first: NONE, last: NONE, room_used: 0, deficit: i64::from(self.config.quantum()) };
        }
        self.entries[at as usize] = Entry { item, next: NONE };
        let queue = &mut self.queues[place as usize];
        let last = std::mem::replace(&mut queue.last, at);
        if queue.first == NONE {
            queue.first = at;
        } else if let Some(last) = self.entries.get_mut(last as usize) {
            last.next = at;
        }
        queue.room_used += cost;
        self.room_used += cost;
        self.waiting += 1;
        Ok(())
    }

    /// The next item to send now. `None`: nothing waits, or it has to wait for [`Self::poll_timeout`].
    pub fn next(&mut self, now: Now) -> Option<(Pair, Item)> {
        if self.waiting == 0 {
            self.forget_queues();
            return None;
        }
        self.fill(now);
        if self.config.rate.is_some() && self.tokens <= 0 {
            return None;
        }
        loop {
            let from_new = !self.new.is_empty();
            let place = self.new.front().or_else(|| self.old.front()).copied()?;
            let quantum = i64::from(self.config.quantum());
            let queue = self.queues.get_mut(place as usize)?;
            if queue.deficit <= 0 {
                queue.deficit += quantum;
                self.move_to_end_of_old(from_new);
                continue;
            }
            let Some(Entry { item, next }) = self.entries.get(queue.first as usize).copied() else {
                // Emptied. From the new list it keeps its place for one round, so that coming back does not make it new
                // again at the expense of the old.
                if from_new {
                    self.move_to_end_of_old(true);
                } else {
                    self.old.pop_front();
                    self.places.remove(&queue.pair);
                    self.free_queues.push(place);
                }
                continue;
            };
            self.free_entries.push(queue.first);
            queue.first = next;
            if next == NONE {
                queue.last = NONE;
            }
            let cost = item.bytes.max(LEAST_COST);
            queue.room_used -= cost;
            queue.deficit -= i64::from(item.bytes);
            let pair = queue.pair;
            self.room_used -= cost;
            self.waiting -= 1;
            self.tokens -= i128::from(item.bytes) * PARTS;
            return Some((pair, item));
        }
    }

    /// When [`Self::next`] may have something again; `None` if nothing waits. With a time that has passed, it has now.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        if self.waiting == 0 {
            return None;
        }
        let Some(rate) = self.config.rate.filter(|_| self.tokens <= 0) else { return Some(Now::ZERO) };
        let wait = (1 - self.tokens).unsigned_abs().div_ceil(u128::from(rate.max(1)));
        Some(self.filled + Duration::from_micros(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    /// Nothing waits: the next to come is new to everybody.
    fn forget_queues(&mut self) {
        for place in self.new.drain(..).chain(self.old.drain(..)) {
            self.free_queues.push(place);
        }
        self.places.clear();
    }

    fn move_to_end_of_old(&mut self, from_new: bool) {
        let place = if from_new { self.new.pop_front() } else { self.old.pop_front() };
        self.old.extend(place);
    }

    fn fill(&mut self, now: Now) {
        let Some(rate) = self.config.rate else { return };
        let passed = i128::from(now.0.saturating_sub(self.filled.0));
        self.filled = self.filled.max(now);
        self.tokens = (self.tokens + passed * i128::from(rate)).min(i128::from(self.config.burst()) * PARTS);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const fn pair(from: u32) -> Pair {
        Pair { from, to: 1_000_000 }
    }

    fn drain(scheduler: &mut Scheduler, now: Now) -> Vec<(u32, u32)> {
        std::iter::from_fn(|| scheduler.next(now)).map(|(pair, item)| (pair.from, item.handle)).collect()
    }

    #[test]
    fn a_pair_keeps_its_order() {
        let mut scheduler = Scheduler::new(Config::for_rate(None));
        for handle in 0..500 {
            scheduler.offer(pair(1), Item { handle, bytes: 100 + 13 * (handle % 90) }).unwrap();
        }
        let sent: Vec<u32> = drain(&mut scheduler, Now::ZERO).into_iter().map(|(_, handle)| handle).collect();
        assert_eq!(sent, (0..500).collect::<Vec<_>>());
        assert_eq!((scheduler.waiting(), scheduler.room_used, scheduler.poll_timeout()), (0, 0, None));
    }

    #[test]
    fn who_sends_little_goes_first() {
        let mut scheduler = Scheduler::new(Config::for_rate(None));
        for handle in 0..20 {
            scheduler.offer(pair(1), Item { handle, bytes: QUANTUM }).unwrap();
        }
        assert_eq!(scheduler.next(Now::ZERO).unwrap().0, pair(1));
        assert_eq!(scheduler.next(Now::ZERO).unwrap().0, pair(1));
        scheduler.offer(pair(2), Item { handle: 99, bytes: 120 }).unwrap();
        assert_eq!(scheduler.next(Now::ZERO).unwrap().1.handle, 99);
        assert_eq!(scheduler.next(Now::ZERO).unwrap().0, pair(1));
    }

    #[test]
    fn greedy_pairs_share_equally_whatever_the_size_of_their_packets() {
        let mut scheduler = Scheduler::new(Config { items: 100_000, ..Config::for_rate(None) });
        let size = |from: u32| if from == 1 { 1_400 } else { 9_000 };
        let mut sent = BTreeMap::<u32, u64>::new();
        for _ in 0..20_000 {
            for from in [1, 2] {
                while scheduler.offer(pair(from), Item { handle: 0, bytes: size(from) }).is_ok() {}
            }
            let (pair, item) = scheduler.next(Now::ZERO).unwrap();
            *sent.entry(pair.from).or_default() += u64::from(item.bytes);
        }
        let (a, b) = (sent[&1] as f64, sent[&2] as f64);
        assert!((a / b - 1.0).abs() < 0.01, "{a} {b}");
    }

    #[test]
    fn one_pair_cannot_take_the_room_of_others() {
        let mut scheduler = Scheduler::new(Config::for_rate(None));
        let fill = |scheduler: &mut Scheduler, from| {
            let mut taken = 0;
            while scheduler.offer(pair(from), Item { handle: 0, bytes: 1_400 }).is_ok() {
                taken += 1_400;
            }
            taken
        };
        let half = fill(&mut scheduler, 1);
        assert!(half <= ROOM / 2 && half > ROOM / 2 - 3 * 1_400, "{half}");
        assert_eq!(scheduler.offer(pair(1), Item { handle: 0, bytes: 1_400 }), Err(Full::Pair));
        for from in 2..10 {
            assert!(fill(&mut scheduler, from) >= 1_400, "pair {from}");
        }
    }

    #[test]
    fn the_rate_is_kept_and_unused_rate_is_saved_only_for_a_moment() {
        let rate = 1_000_000;
        let config = Config::for_rate(Some(rate));
        let mut scheduler = Scheduler::new(config);
        let mut now = Now::from_millis(1_000);
        let mut sent = 0_u64;
        while now < Now::from_millis(11_000) {
            while scheduler.offer(pair(1), Item { handle: 0, bytes: 1_400 }).is_ok() {}
            while let Some((_, item)) = scheduler.next(now) {
                sent += u64::from(item.bytes);
            }
            let next = scheduler.poll_timeout().unwrap();
            assert!(next > now, "no busy loop");
            now = next;
        }
        assert!((10 * rate..10 * rate + u64::try_from(config.burst()).unwrap() + 1_400).contains(&sent), "{sent}");
    }

    /// One pair always has more than the relay may send; another asks and answers. What it waits is bounded by what was
    /// being sent when it came, at every rate.
    #[test]
    fn an_interactive_pair_hardly_waits_for_a_bulk_pair() {
        for rate in [200_000, 1_000_000, 12_500_000, 125_000_000] {
            let config = Config::for_rate(Some(rate));
            let mut scheduler = Scheduler::new(config);
            let mut waits = Vec::new();
            let mut asked = None;
            let mut next_ask = 50_000;
            let mut now = Now::ZERO;
            while waits.len() < 500 {
                while scheduler.offer(pair(1), Item { handle: 0, bytes: config.quantum() }).is_ok() {}
                if now.0 >= next_ask && asked.is_none() {
                    scheduler.offer(pair(2), Item { handle: 1, bytes: 150 }).unwrap();
                    asked = Some(next_ask);
                    next_ask = now.0 + 20_000 + (now.0 % 7_001);
                }
                while let Some((_, item)) = scheduler.next(now) {
                    if item.handle == 1 {
                        waits.extend(asked.take().map(|at| now.0 - at));
                    }
                    while scheduler.offer(pair(1), Item { handle: 0, bytes: config.quantum() }).is_ok() {}
                }
                now = scheduler.poll_timeout().unwrap().min(Now(next_ask.max(now.0 + 1)));
            }
            waits.sort_unstable();
            let p99 = waits[waits.len() * 99 / 100];
            let one_run = u64::from(config.quantum()) * 1_000_000 / rate;
            assert!(p99 <= one_run + 1_000, "at {rate} B/s: p99 {p99} µs, one run {one_run} µs");
        }
    }

    #[test]
    fn coming_back_again_and_again_does_not_starve_the_others() {
        let mut scheduler = Scheduler::new(Config::for_rate(None));
        let mut sent = BTreeMap::<u32, u64>::new();
        for _ in 0..10_000 {
            while scheduler.offer(pair(1), Item { handle: 0, bytes: 1_400 }).is_ok() {}
            // Always exactly one packet waits of each of these.
            for from in 2..6 {
                if scheduler.places.get(&pair(from)).is_none_or(|p| scheduler.queues[*p as usize].first == NONE) {
                    scheduler.offer(pair(from), Item { handle: 0, bytes: 1_400 }).unwrap();
                }
            }
            let (pair, item) = scheduler.next(Now::ZERO).unwrap();
            *sent.entry(pair.from).or_default() += u64::from(item.bytes);
        }
        let total: u64 = sent.values().sum();
        assert!(sent[&1] * 6 > total, "{sent:?}");
    }

    proptest! {
        /// Whatever is offered and taken, counts agree and nothing is lost, doubled or left behind.
        #[test]
        fn everything_taken_is_sent_once(
            steps in proptest::collection::vec((0u32..6, 1u32..70_000, 0u32..4), 1..300), rate in proptest::option::of(1u64..10_000_000),
        ) {
            let mut scheduler = Scheduler::new(Config { items: 64, ..Config::for_rate(rate) });
            let (mut taken, mut sent, mut now) = (Vec::new(), Vec::new(), Now::ZERO);
            for (handle, (from, bytes, takes)) in steps.into_iter().enumerate() {
                let handle = u32::try_from(handle).unwrap();
                if scheduler.offer(pair(from), Item { handle, bytes }).is_ok() {
                    taken.push(handle);
                }
                prop_assert!(scheduler.room_used <= scheduler.config.room);
                for _ in 0..takes {
                    now = now.max(scheduler.poll_timeout().unwrap_or(now));
                    sent.extend(scheduler.next(now).map(|(_, item)| item.handle));
                }
            }
            while let Some(at) = scheduler.poll_timeout() {
                now = now.max(at);
                sent.push(scheduler.next(now).unwrap().1.handle);
            }
            sent.sort_unstable();
            prop_assert_eq!(sent, taken);
            prop_assert_eq!(scheduler.next(now), None);
            prop_assert_eq!((scheduler.room_used, scheduler.free_entries.len()), (0, 64));
            prop_assert_eq!((scheduler.places.len(), scheduler.free_queues.len()), (0, 128));
        }
    }
}

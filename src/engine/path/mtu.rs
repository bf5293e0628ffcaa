//! How long a packet may be on a direct path: path MTU discovery by probes alone (RFC 8899 in spirit), because the errors
//! that routers should send are lost, filtered and easily made up. A pure machine of one path; sizes are those of inner
//! packets.
//!
//! A size is *in use* once a probe of that size was answered. Upwards it is searched among [`SIZES`], the likeliest first,
//! while the path carries data and at once when it is new. The size in use is asked again every ten seconds, and at once when
//! nothing comes back ([`Search::suspect`]): a path that goes on answering small probes and not those of that size has become
//! narrower without saying so.

use std::time::Duration;

use crate::time::Now;

/// Inner sizes tried. An outer packet has 60 bytes more over IPv4, 80 over IPv6: 1120 fits where 1,200 bytes do, 1200 where
/// only the least that IPv6 allows (1,280), 1420 on Ethernet, 8920 on 9,000 bytes. The smallest fits wherever UDP goes.
pub(crate) const SIZES: [u16; 9] = [576, 1120, 1200, BASE, 1340, 1380, 1420, 8800, 8920];
/// The size that a path is expected to take, and the relay does take.
pub const BASE: u16 = 1280;
/// Asked first: most paths are Ethernet's.
const LIKELIEST: usize = 6;
/// How long each try of a larger size waits for its answer.
const TRIES: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// The size in use is asked again this often.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// Sizes that failed are tried again this often.
const WIDEN_EVERY: Duration = Duration::from_secs(600);
/// An answer is late after this, or after somewhat more than a round trip.
const LATE: Duration = Duration::from_millis(40);
/// Probes of the size in use before it counts as lost.
const DOUBTS: u32 = 3;
/// The size in use is not doubted so soon after it was proven.
const BELIEVED: Duration = Duration::from_millis(500);
/// A suspicion that was not looked after for so long tells nothing.
const STALE: Duration = Duration::from_secs(1);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send a probe of this size.
    Ask(u16),
    /// Send a small probe: is the path alive?
    Ping,
    /// The size in use, or whether it is the last word, changed.
    Use,
    /// Not even the smallest size passes, but small probes do.
    Unable,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Search {
    /// The place in [`SIZES`] of the size in use.
    at: usize,
    /// The first place known to fail.
    fails: usize,
    phase: Phase,
    checked: Now,
    widened: Now,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Rest,
    /// A larger size was asked `tries` times.
    Widen {
        size: usize,
        tries: usize,
        next: Now,
    },
    /// The size in use was asked.
    Check {
        since: Now,
    },
    /// It is doubted: it and the base are asked several times. `passed`: the largest that was answered.
    Suspect {
        since: Now,
        tries: u32,
        next: Now,
        passed: Option<usize>,
    },
}

impl Search {
    /// A path that took a probe of the largest size up to `size`.
    pub(crate) fn new(size: u16, now: Now) -> Self {
        let at = SIZES.iter().rposition(|s| *s <= size).unwrap_or(0);
        Self { at, fails: SIZES.len(), phase: Phase::Rest, checked: now, widened: now }
    }

    /// The size in use.
    pub(crate) const fn size(&self) -> u16 {
        SIZES[self.at]
    }

    /// Nothing larger is expected for now.
    pub(crate) const fn is_settled(&self) -> bool {
        self.at + 1 == self.fails
    }

    /// When something is to be done, if the path carries data then.
    pub(crate) fn next(&self, rtt: Duration) -> Now {
        match self.phase {
            Phase::Rest if !self.is_settled() => Now::ZERO,
            Phase::Rest => (self.checked + CHECK_EVERY).min(self.widened + WIDEN_EVERY),
            Phase::Widen { next, .. } | Phase::Suspect { next, .. } => next,
            Phase::Check { since } => since + late(rtt),
        }
    }

    /// The size in use is doubted.
    pub(crate) const fn is_suspecting(&self) -> bool {
        matches!(self.phase, Phase::Suspect { .. })
    }

    /// Data of the size in use is answered by nothing.
    pub(crate) fn suspect(&mut self, now: Now) {
        if !self.is_suspecting() && now.since(self.checked) >= BELIEVED {
            self.phase = Phase::Suspect { since: now, tries: 0, next: now, passed: None };
        }
    }

    /// Nothing at all passes for now: what is not answered tells nothing about its size.
    pub(crate) fn hold(&mut self, now: Now) {
        if let Phase::Widen { next, .. } = &mut self.phase {
            *next = (*next).max(now + TRIES[0]);
        }
    }

    /// A probe of this size was answered. True: the size in use, or whether that is the last word, changed.
    pub(crate) fn answered(&mut self, size: u16, now: Now) -> bool {
        let Some(place) = SIZES.iter().position(|s| *s == size) else { return false };
        let before = (self.at, self.fails);
        if place >= self.at {
            (self.at, self.checked) = (place, now);
            // What fails now and then is left alone until the next search.
            self.fails = self.fails.max(place + 1);
            self.phase = Phase::Rest;
        } else if let Phase::Suspect { passed, .. } = &mut self.phase {
            *passed = (*passed).max(Some(place));
        }
        before != (self.at, self.fails)
    }

    /// The system cannot send a packet of `size` bytes this way. True: as with [`Search::answered`].
    pub(crate) fn refused(&mut self, size: u16, now: Now) -> bool {
        let place = SIZES.iter().position(|s| *s >= size).unwrap_or(SIZES.len());
        let before = (self.at, self.fails);
        self.fails = self.fails.min(place.max(1));
        if self.at >= self.fails {
            self.at = self.fails - 1;
            self.phase = Phase::Suspect { since: now, tries: 0, next: now, passed: None };
        } else if matches!(self.phase, Phase::Widen { size, .. } if size >= self.fails) {
            self.phase = Phase::Rest;
            self.widened = now;
        }
        before != (self.at, self.fails)
    }

    /// Does what is due on a path that carries data. `alive`: when a probe of any size was answered last.
    pub(crate) fn tick(&mut self, alive: Now, rtt: Duration, now: Now, steps: &mut Vec<Step>) {
        // Every turn of this loop asks something, or ends a question.
        while self.next(rtt) <= now {
            match self.phase {
                Phase::Rest if !self.is_settled() || self.widened + WIDEN_EVERY <= now => {
                    if self.is_settled() {
                        // Whatever failed may pass by now.
                        self.fails = SIZES.len();
                        if self.is_settled() {
                            self.widened = now;
                            continue;
                        }
                    }
                    self.phase = Phase::Widen { size: self.promising(), tries: 0, next: now };
                }
                Phase::Rest => {
                    self.phase = Phase::Check { since: now };
                    steps.push(Step::Ask(self.size()));
                }
                Phase::Widen { size, tries, .. } => match TRIES.get(tries) {
                    Some(wait) => {
                        self.phase = Phase::Widen { size, tries: tries + 1, next: now + *wait };
                        steps.push(Step::Ask(SIZES[size]));
                    }
                    None => {
                        self.fails = size;
                        self.phase = Phase::Rest;
                        self.widened = now;
                        if self.is_settled() {
                            steps.push(Step::Use);
                        }
                    }
                },
                Phase::Check { .. } => {
                    self.phase = Phase::Suspect { since: now, tries: 0, next: now, passed: None };
                    steps.push(Step::Ping);
                }
                Phase::Suspect { since, tries, passed, next } => {
                    if now.since(next) > STALE {
                        self.phase = Phase::Suspect { since: now, tries: 0, next: now, passed: None };
                    } else if tries < DOUBTS {
                        let next = now + late(rtt);
                        self.phase = Phase::Suspect { since, tries: tries + 1, next, passed };
                        steps.push(Step::Ask(self.size()));
                        // Mostly the first is answered.
                        if tries > 0 && self.size() > BASE {
                            steps.push(Step::Ask(BASE));
                        }
                    } else if passed.is_none() && alive <= since {
                        // The path is dead, or was for a while: that is not for us to say.
                        (self.phase, self.checked) = (Phase::Rest, now);
                    } else {
                        self.fall(passed, now, steps);
                    }
                }
            }
        }
    }

    /// The size in use is lost.
    fn fall(&mut self, passed: Option<usize>, now: Now, steps: &mut Vec<Step>) {
        if self.at == 0 {
            (self.phase, self.checked) = (Phase::Rest, now);
            steps.push(Step::Unable);
            return;
        }
        // The base was asked too, or is what was lost.
        self.fails = if passed.is_none() { self.at.min(base()) } else { self.at };
        self.at = passed.unwrap_or(0);
        (self.checked, self.widened) = (now, now);
        // What did not just pass is asked at once.
        self.phase = match passed {
            Some(_) => Phase::Rest,
            None => Phase::Suspect { since: now, tries: 0, next: now, passed: None },
        };
        steps.push(Step::Use);
        if passed.is_none() {
            steps.push(Step::Ping);
        }
    }

    /// The size to ask next: what every path should take, then the likeliest, then the middle of what is left.
    fn promising(&self) -> usize {
        let open = |place: &usize| self.at < *place && *place < self.fails;
        [base(), LIKELIEST].into_iter().find(open).unwrap_or(usize::midpoint(self.at, self.fails))
    }
}

/// The place of the base.
fn base() -> usize {
    SIZES.iter().position(|size| *size == BASE).unwrap_or(0)
}

fn late(rtt: Duration) -> Duration {
    LATE.max(rtt * 5 / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(40);

    /// A path that takes packets up to `takes` bytes and answers after a round trip; what is asked and when.
    struct Road {
        search: Search,
        now: Now,
        takes: u16,
        small: bool,
        alive: Now,
        under_way: Vec<(Now, Option<u16>)>,
        asked: Vec<(u64, u16)>,
        uses: Vec<(u64, u16)>,
        unable: usize,
    }

    impl Road {
        fn new(takes: u16) -> Self {
            let now = Now::from_millis(1);
            Self {
                search: Search::new(BASE, now),
                now,
                takes,
                small: true,
                alive: now,
                under_way: Vec::new(),
                asked: Vec::new(),
                uses: Vec::new(),
                unable: 0,
            }
        }

        fn ms(&self) -> u64 {
            self.now.0 / 1_000
        }

        fn run(&mut self, ms: u64) -> &mut Self {
            for _ in 0..ms {
                self.now = self.now + Duration::from_millis(1);
                let now = self.now;
                for (_, size) in self.under_way.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
                    self.alive = now;
                    if size.is_some_and(|size| self.search.answered(size, now)) {
                        self.uses.push((self.ms(), self.search.size()));
                    }
                }
                let mut steps = Vec::new();
                self.search.tick(self.alive, RTT, now, &mut steps);
                for step in steps {
                    match step {
                        Step::Ask(size) => {
                            self.asked.push((self.ms(), size));
                            if size <= self.takes && self.small {
                                self.under_way.push((now + RTT, Some(size)));
                            }
                        }
                        Step::Ping if self.small => self.under_way.push((now + RTT, None)),
                        Step::Ping => {}
                        Step::Use => self.uses.push((self.ms(), self.search.size())),
                        Step::Unable => self.unable += 1,
                    }
                }
            }
            self
        }
    }

    #[test]
    fn ethernet_is_found_in_one_round_trip_and_jumbo_is_ruled_out() {
        let mut road = Road::new(1420);
        road.run(5_000);
        assert_eq!(road.uses[0], (42, 1420));
        assert_eq!(road.asked.iter().map(|a| a.1).collect::<Vec<_>>(), [1420, 8800, 8800, 8800]);
        assert!(road.search.is_settled());
        assert_eq!(road.uses.last().unwrap().1, 1420, "told that it is the last word");
    }

    #[test]
    fn every_size_is_found() {
        for takes in [1280, 1299, 1340, 1379, 1380, 1400, 1420, 1500, 8800, 8919, 8920, 65_000] {
            let mut road = Road::new(takes);
            road.run(12_000);
            let best = SIZES.iter().rev().find(|size| **size <= takes).unwrap();
            assert_eq!(road.search.size(), *best, "a path of {takes}");
            assert!(road.search.is_settled());
        }
    }

    #[test]
    fn the_size_in_use_is_asked_every_ten_seconds_and_larger_ones_every_ten_minutes() {
        let mut road = Road::new(1420);
        road.run(10_000);
        road.asked.clear();
        road.run(3_600_000);
        let of = |size| road.asked.iter().filter(|a| a.1 == size).count();
        assert!((350..365).contains(&of(1420)), "{}", of(1420));
        assert!((12..=18).contains(&of(8800)), "three tries each: {}", of(8800));
        assert_eq!(road.uses.iter().filter(|u| u.1 != 1420).count(), 0);
    }

    #[test]
    fn a_path_that_becomes_narrow_is_found_when_asked_again() {
        for (takes, at_once, in_the_end) in [(1300, 1280, 1280), (1390, 1280, 1380), (1130, 576, 1120), (600, 576, 576)]
        {
            let mut road = Road::new(1420);
            road.run(6_000);
            road.uses.clear();
            road.takes = takes;
            road.run(12_000);
            assert_eq!(road.uses[0].1, at_once, "a path of {takes}: {:?}", road.uses);
            road.run(8_000);
            assert_eq!(road.search.size(), in_the_end, "a path of {takes}: {:?}", road.uses);
            assert_eq!(road.unable, 0);
        }
    }

    #[test]
    fn a_suspicion_is_settled_in_a_few_round_trips() {
        let mut road = Road::new(1420);
        road.run(6_000);
        (road.takes, road.uses) = (1300, Vec::new());
        let start = road.ms();
        road.search.suspect(road.now);
        road.run(400);
        assert_eq!(road.uses[0].1, 1280);
        assert!(road.uses[0].0 - start <= 160, "{:?} from {start}", road.uses);
        // Without cause it costs nothing.
        let mut road = Road::new(1420);
        road.run(6_000);
        road.uses.clear();
        road.search.suspect(road.now);
        road.run(4_000);
        assert_eq!(road.uses, []);
    }

    #[test]
    fn a_dead_path_is_not_a_narrow_one() {
        let mut road = Road::new(1420);
        road.run(6_000);
        (road.small, road.uses) = (false, Vec::new());
        road.search.suspect(road.now);
        road.run(30_000);
        assert_eq!((road.search.size(), road.unable), (1420, 0));
        assert_eq!(road.uses, []);
    }

    #[test]
    fn a_path_that_takes_nothing_of_data_size_is_given_up() {
        let mut road = Road::new(1420);
        road.run(6_000);
        road.takes = 100;
        road.search.suspect(road.now);
        // Somebody else's small probes are answered.
        for _ in 0..10 {
            road.alive = road.now;
            road.run(100);
        }
        assert!(road.unable > 0);
    }

    #[test]
    fn what_the_system_refuses_is_not_asked_again() {
        let mut road = Road::new(1420);
        road.run(200);
        assert_eq!(road.search.size(), 1420);
        assert!(road.search.refused(8800, road.now));
        assert!(road.search.is_settled());
        // Its interface has less now.
        assert!(road.search.refused(1400, road.now));
        assert_eq!(road.search.size(), 1380);
        road.run(1_000);
        assert_eq!((road.search.size(), road.search.is_settled()), (1380, true));
        for refused in [600, 577, 576, 1, 0] {
            road.search.refused(refused, road.now);
            assert_eq!(road.search.size(), 576);
        }
    }

    #[test]
    fn a_pause_in_the_data_is_no_evidence() {
        let mut road = Road::new(1420);
        road.run(6_000);
        road.search.suspect(road.now);
        road.run(41);
        let asked = road.asked.len();
        // Nobody looked for an hour.
        road.now = road.now + Duration::from_secs(3_600);
        road.alive = road.now;
        road.uses.clear();
        road.under_way.clear();
        road.run(1_000);
        assert_eq!(road.search.size(), 1420);
        assert!(road.asked.len() > asked);
        assert!(road.uses.iter().all(|u| u.1 >= 1420));
    }
}

//! Whether a router reaches the networks it leads to: "is the daemon up" is not the question, "does traffic arrive" is.
//!
//! A network is reached while an interface with carrier leads there, and, once something on it has ever answered, while something
//! does. Who answered before is a witness and is asked now and then: by the kernel's own neighbour probes (ARP, RFC 826;
//! Neighbor Discovery, RFC 4861 section 7.3), which every machine answers whatever its firewall says. One that is silent proves
//! nothing, for machines sleep; only when all of them are is the network given up. Where nothing ever answered nobody is
//! asked, and the carrier alone decides. A machine that a person named is the only witness, and one from the start.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::time::Now;

/// How often a witness is asked where another router leads too.
const OFTEN: Duration = Duration::from_millis(500);
/// And where none does: a person wants to know, but no traffic can be moved.
const SELDOM: Duration = Duration::from_secs(10);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(250);
/// So often all witnesses are asked, each time with [`PATIENCE`], before the network is given up.
const ROUNDS: u32 = 3;
/// Witnesses asked at a time while all is well: those that answered last.
const ASKED: usize = 2;
/// Witnesses remembered for a network.
const WITNESSES: usize = 16;
/// A network given up is asked for this often.
const RETRY: Duration = Duration::from_secs(1);
/// And counts as reached again after so long; twice as long each time it is lost again within [`CALM`].
const HOLD: Duration = Duration::from_secs(2);
/// The longest of these.
const LONGEST_HOLD: Duration = Duration::from_secs(60);
/// A network that was reached so long starts afresh.
const CALM: Duration = Duration::from_secs(300);

/// A machine on a network, as a neighbour of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Witness {
    /// The interface's number.
    pub interface: u32,
    /// The machine.
    pub ip: IpAddr,
}

/// How this machine stands towards a network, as far as it can tell by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footing {
    /// The interfaces that lead there and have carrier.
    pub interfaces: BTreeSet<u32>,
    /// The machine that a person named, if it is a neighbour.
    pub named: Option<Witness>,
    /// The other nodes that lead there, where they are neighbours. They are no witnesses by themselves, but when all of
    /// those are silent their answers count.
    pub fellows: BTreeSet<Witness>,
    /// Another node leads there too.
    pub shared: bool,
}

/// Why a network is not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// No interface with carrier leads there.
    NoCarrier,
    /// Those who answered before do not any more.
    Silent,
}

/// The networks a node leads to. Asks through [`poll_ask`](Self::poll_ask) after every call; then read
/// [`poll_timeout`](Self::poll_timeout).
#[derive(Debug, Default)]
pub struct Watch {
    legs: BTreeMap<IpNet, Leg>,
    asks: BTreeSet<Witness>,
}

#[derive(Debug)]
struct Leg {
    footing: Footing,
    /// When each answered last.
    witnesses: BTreeMap<Witness, Now>,
    state: State,
    /// Since when it is reached.
    since: Now,
    hold: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Reached; the next question is due then.
    Good { ask: Now },
    /// Asked, not answered yet; the question is repeated or given up then.
    Asked { since: Now, round: u32, until: Now },
    /// Not reached. `answered`: since when there are answers again.
    Lost { why: Cut, since: Now, ask: Now, answered: Option<Now> },
}

impl Watch {
    /// How things stand with each network. Networks that are missing are forgotten.
    pub fn look(&mut self, footings: BTreeMap<IpNet, Footing>, now: Now) {
        self.legs.retain(|prefix, _| footings.contains_key(prefix));
        for (prefix, footing) in footings {
            let leg = self.legs.entry(prefix).or_insert_with(|| Leg {
                footing: Footing::default(),
                witnesses: BTreeMap::new(),
                state: State::Good { ask: now },
                since: now,
                hold: HOLD,
            });
            leg.look(footing, now);
        }
    }

    /// When these machines answered last, asked or not.
    pub fn answered(&mut self, who: &[(Witness, Now)], now: Now) {
        for leg in self.legs.values_mut() {
            leg.answered(who, now);
        }
    }

    /// A deadline passed.
    pub fn handle_timeout(&mut self, now: Now) {
        for leg in self.legs.values_mut() {
            leg.due(now, &mut self.asks);
        }
    }

    /// Whom to ask now; drain after every `handle_timeout`.
    pub fn poll_ask(&mut self) -> Option<Witness> {
        self.asks.pop_first()
    }

    /// When `handle_timeout` must be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        self.legs.values().map(Leg::next).min()
    }

    /// True: somebody was asked just now, and the answer is to be looked for.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.legs.values().any(|leg| matches!(leg.state, State::Asked { .. }))
    }

    /// The networks that are not reached, and why.
    pub fn cut(&self) -> impl Iterator<Item = (IpNet, Cut)> + '_ {
        self.legs.iter().filter_map(|(prefix, leg)| match leg.state {
            State::Lost { why, .. } => Some((*prefix, why)),
            State::Good { .. } | State::Asked { .. } => None,
        })
    }
}

impl Leg {
    fn look(&mut self, footing: Footing, now: Now) {
        self.witnesses.retain(|witness, _| footing.interfaces.contains(&witness.interface));
        if footing.named != self.footing.named {
            self.witnesses.clear();
        }
        if let Some(named) = footing.named {
            self.witnesses.entry(named).or_insert(Now::ZERO);
        }
        let shared_now = footing.shared && !self.footing.shared;
        self.footing = footing;
        if self.footing.interfaces.is_empty() {
            if !matches!(self.state, State::Lost { why: Cut::NoCarrier, .. }) {
                self.lose(Cut::NoCarrier, now);
            }
        } else if let State::Lost { why: Cut::NoCarrier, .. } = self.state {
            // It is back: whether anything is behind it, witnesses say; without any the carrier is the answer.
            let answered = self.witnesses.is_empty().then_some(now);
            self.state = State::Lost { why: Cut::Silent, since: now, ask: now, answered };
        } else if let State::Good { ask } = &mut self.state
            && shared_now
        {
            *ask = (*ask).min(now + OFTEN);
        }
    }

    fn answered(&mut self, who: &[(Witness, Now)], now: Now) {
        let mine = |w: &Witness| match &self.footing.named {
            Some(named) => w == named,
            None => self.footing.interfaces.contains(&w.interface),
        };
        let mut newest = None;
        for (witness, at) in who.iter().filter(|(witness, _)| mine(witness)) {
            let last = self.witnesses.entry(*witness).or_insert(*at);
            *last = (*last).max(*at);
            newest = newest.max(Some(*at));
        }
        let Some(newest) = newest else { return };
        while self.witnesses.len() > WITNESSES {
            let oldest = self.witnesses.iter().min_by_key(|(_, at)| **at).map(|(w, _)| *w);
            oldest.map(|w| self.witnesses.remove(&w));
        }
        match &mut self.state {
            State::Good { .. } | State::Lost { answered: Some(_), .. } => {}
            State::Asked { since, .. } if newest >= *since => self.state = State::Good { ask: now + self.every() },
            State::Lost { since, answered, .. } if newest >= *since => *answered = Some(now),
            // From before anybody was asked.
            State::Asked { .. } | State::Lost { .. } => {}
        }
    }

    fn due(&mut self, now: Now, asks: &mut BTreeSet<Witness>) {
        if now < self.next() {
            return;
        }
        match self.state {
            State::Good { .. } if self.witnesses.is_empty() => self.state = State::Good { ask: now + self.every() },
            State::Good { .. } => {
                asks.extend(self.latest().take(ASKED));
                self.state = State::Asked { since: now, round: 0, until: now + PATIENCE };
            }
            State::Asked { since, round, .. } if round < ROUNDS => {
                asks.extend(self.latest().chain(self.fellows()));
                self.state = State::Asked { since, round: round + 1, until: now + PATIENCE };
            }
            State::Asked { .. } => self.lose(Cut::Silent, now),
            State::Lost { answered: Some(again), .. } if now >= again + self.hold => {
                self.state = State::Good { ask: now + self.every() };
                self.since = now;
            }
            State::Lost { why, since, answered, .. } => {
                asks.extend(self.latest().chain(self.fellows()));
                let silent = self.witnesses.values().all(|at| now.since(*at) > RETRY + PATIENCE);
                // It was a single answer.
                let answered = answered.filter(|_| !silent || self.witnesses.is_empty());
                self.state = State::Lost { why, since, ask: now + RETRY, answered };
            }
        }
    }

    fn lose(&mut self, why: Cut, now: Now) {
        if !matches!(self.state, State::Lost { .. }) {
            self.hold = if now.since(self.since) > CALM { HOLD } else { (self.hold * 2).min(LONGEST_HOLD) };
        }
        self.state = State::Lost { why, since: now, ask: now + RETRY, answered: None };
    }

    /// The witnesses, those that answered last first.
    fn latest(&self) -> impl Iterator<Item = Witness> + use<> {
        let mut list: Vec<(Now, Witness)> = self.witnesses.iter().map(|(w, at)| (*at, *w)).collect();
        list.sort_unstable_by(|a, b| b.cmp(a));
        list.into_iter().map(|(_, witness)| witness)
    }

    /// Where a machine was named, nobody else counts.
    fn fellows(&self) -> impl Iterator<Item = Witness> + use<> {
        let fellows = if self.footing.named.is_none() { self.footing.fellows.clone() } else { BTreeSet::new() };
        fellows.into_iter().take(WITNESSES)
    }

    const fn every(&self) -> Duration {
        if self.footing.shared { OFTEN } else { SELDOM }
    }

    fn next(&self) -> Now {
        match self.state {
            State::Good { ask } => ask,
            State::Asked { until, .. } => until,
            State::Lost { answered: Some(again), ask, .. } => ask.min(again + self.hold),
            State::Lost { ask, .. } => ask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTER: Witness = Witness { interface: 3, ip: IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 7, 3)) };
    const PHONE: Witness = Witness { interface: 3, ip: IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 7, 4)) };
    const ELSEWHERE: Witness = Witness { interface: 2, ip: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)) };

    /// A router with one network, and who of its neighbours answers.
    struct Desk {
        watch: Watch,
        now: Now,
        answers: Vec<Witness>,
        asked: u32,
        fellow: Option<Witness>,
    }

    impl Desk {
        fn new() -> Self {
            let mut desk =
                Self { watch: Watch::default(), now: Now(1_000_000), answers: vec![], asked: 0, fellow: None };
            desk.look(&[3], None);
            desk
        }

        fn look(&mut self, interfaces: &[u32], named: Option<Witness>) {
            let interfaces = interfaces.iter().copied().collect();
            let fellows = self.fellow.into_iter().collect();
            let footing = Footing { interfaces, named, fellows, shared: true };
            self.watch.look(BTreeMap::from([("192.168.7.0/24".parse().unwrap(), footing)]), self.now);
        }

        fn saw(&mut self, who: &[Witness]) {
            let who: Vec<_> = who.iter().map(|w| (*w, self.now)).collect();
            self.watch.answered(&who, self.now);
        }

        fn cut(&self) -> Option<Cut> {
            self.watch.cut().next().map(|(_, why)| why)
        }

        /// Lets so many milliseconds pass; after how many the network was lost or found for the first time.
        fn run(&mut self, ms: u64) -> Option<u64> {
            let (begin, before, mut changed) = (self.now, self.cut().is_some(), None);
            let end = begin + Duration::from_millis(ms);
            while let Some(next) = self.watch.poll_timeout().filter(|next| *next <= end) {
                self.now = self.now.max(next);
                self.watch.handle_timeout(self.now);
                let mut back = vec![];
                while let Some(who) = self.watch.poll_ask() {
                    self.asked += 1;
                    back.extend(self.answers.contains(&who).then_some((who, self.now)));
                }
                self.watch.answered(&back, self.now);
                if changed.is_none() && self.cut().is_some() != before {
                    changed = Some(self.now.since(begin).as_millis() as u64);
                }
            }
            self.now = end;
            changed
        }
    }

    #[test]
    fn where_nothing_ever_answers_the_carrier_alone_decides() {
        let mut desk = Desk::new();
        assert_eq!(desk.run(3_600_000), None);
        assert_eq!((desk.cut(), desk.asked), (None, 0));
        desk.look(&[], None);
        assert_eq!(desk.cut(), Some(Cut::NoCarrier), "at once");
        desk.run(60_000);
        assert_eq!(desk.cut(), Some(Cut::NoCarrier));
        desk.look(&[3], None);
        assert!(desk.run(10_000).is_some_and(|ms| ms >= 2_000), "it comes back, but not at once");
    }

    #[test]
    fn all_who_answered_fall_silent() {
        let mut desk = Desk::new();
        desk.saw(&[PRINTER, PHONE, ELSEWHERE]);
        desk.answers = vec![PRINTER, PHONE];
        assert_eq!(desk.run(600_000), None);
        // One machine sleeps: nothing follows from that.
        desk.answers = vec![PRINTER];
        assert_eq!(desk.run(600_000), None);
        desk.answers = vec![PHONE];
        assert_eq!(desk.run(600_000), None);
        desk.answers.clear();
        let lost = desk.run(5_000).unwrap();
        assert!(lost <= 1_500, "after {lost} ms");
        assert_eq!(desk.cut(), Some(Cut::Silent));
        assert_eq!(desk.run(600_000), None);
        desk.answers = vec![PRINTER];
        let found = desk.run(10_000).unwrap();
        assert!((2_000..=6_000).contains(&found), "after {found} ms");
    }

    #[test]
    fn where_the_only_machine_sleeps_the_other_router_s_answer_counts() {
        let mut desk = Desk::new();
        desk.fellow = Some(PHONE);
        desk.look(&[3], None);
        assert_eq!((desk.run(60_000), desk.asked), (None, 0), "nobody is asked for nothing");
        desk.saw(&[PRINTER]);
        desk.answers = vec![PHONE];
        assert_eq!(desk.run(600_000), None);
        desk.answers.clear();
        assert!(desk.run(5_000).is_some());
    }

    #[test]
    fn one_that_comes_and_goes_is_left_alone_for_longer_each_time() {
        let mut desk = Desk::new();
        desk.saw(&[PRINTER]);
        let mut took = vec![];
        for _ in 0..8 {
            desk.answers.clear();
            desk.run(10_000).unwrap();
            desk.answers = vec![PRINTER];
            took.push(desk.run(100_000).unwrap());
            desk.run(5_000);
        }
        assert!(took[0] < 6_000 && took.is_sorted() && (60_000..62_000).contains(&took[7]), "{took:?}");
        assert_eq!(desk.run(400_000), None);
        desk.answers.clear();
        desk.run(10_000).unwrap();
        desk.answers = vec![PRINTER];
        assert!(desk.run(10_000).is_some(), "forgiven");
    }

    #[test]
    fn a_named_machine_is_the_only_witness_and_one_from_the_start() {
        let mut desk = Desk::new();
        desk.look(&[3], Some(PHONE));
        desk.answers = vec![PRINTER];
        desk.saw(&[PRINTER]);
        assert!(desk.run(5_000).is_some_and(|ms| ms < 2_500));
        desk.answers = vec![PHONE];
        assert!(desk.run(10_000).is_some());
        desk.look(&[3], None);
        assert_eq!(desk.run(100_000), None, "nobody is named any more");
    }

    #[test]
    fn a_router_alone_asks_seldom_and_one_that_leaves_is_forgotten() {
        let mut desk = Desk::new();
        desk.saw(&[PRINTER]);
        desk.answers = vec![PRINTER];
        let footing = Footing { interfaces: BTreeSet::from([3]), ..Footing::default() };
        desk.watch.look(BTreeMap::from([("192.168.7.0/24".parse().unwrap(), footing)]), desk.now);
        desk.run(600_000);
        assert!(desk.asked <= 61, "{}", desk.asked);
        desk.watch.look(BTreeMap::new(), desk.now);
        assert_eq!(desk.watch.poll_timeout(), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut desk = Desk::new();
        for i in 0..1_000u32 {
            let who = Witness { interface: 3, ip: std::net::Ipv4Addr::from(0xc0a8_0000 + i).into() };
            desk.now = desk.now + Duration::from_millis(1);
            desk.saw(&[who]);
        }
        assert_eq!(desk.watch.legs.values().next().unwrap().witnesses.len(), WITNESSES);
    }
}

//! At home or away: whether the network this machine is in is the one that a subnet router leads to, or only has its numbers.
//!
//! The router is asked on that very link ([`crate::wire::same_lan`]), at each change of the machine's network and now and then.
//! An answer counts for the interface it came in by. Either way the kernel's own route to the network stays; what depends on
//! it is how the router's network is reached: directly, or not by these numbers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::engine::io::{LocalAddress, OtherRouter, RoutePlan};
use crate::time::Now;
use crate::trust::keys::Secret32;
use crate::wire::keys::{IdentityKey, NetworkId};
use crate::wire::local::RoutePlace;
use crate::wire::same_lan::{self, ANSWER, Meeting, Message, Nonce, QUESTION, TTL};

/// When a question is repeated, from the first on.
const TRIES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(250), Duration::from_millis(450)];
/// How long the last may wait for its answer. Only so long is an answer good: one that was fetched from far away is late.
const PATIENCE: Duration = Duration::from_millis(150);
/// Asked again so long after an answer.
const AGAIN: Duration = Duration::from_secs(60);
/// Asked again after silence: twice as long each time, up to [`AGAIN`].
const AGAIN_SILENT: Duration = Duration::from_secs(5);
/// Questions open at once.
const MOST: usize = 64;
/// Answers given at once, and how often one more.
const BURST: u32 = 20;
const EVERY: Duration = Duration::from_millis(50);

/// An address of this machine and the interface it is on, loopback and our own left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foot {
    /// The interface's number.
    pub interface: u32,
    /// Address and length of the network.
    pub address: LocalAddress,
}

impl Foot {
    /// The network it is in.
    #[must_use]
    pub fn net(&self) -> Option<IpNet> {
        IpNet::new(self.address.ip, self.address.prefix_len).ok().map(|net| net.trunc())
    }

    /// Not itself, nor the network's first or last address.
    fn is_beside(&self, ip: IpAddr) -> bool {
        let inside = |net: IpNet| net.contains(&ip) && ip != net.network() && (ip != net.broadcast() || ip.is_ipv6());
        ip != self.address.ip && self.net().is_some_and(inside)
    }
}

/// Something on this machine that goes before a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// What, in words.
    pub by: String,
    /// The interface in whose network the prefix lies; None: it is a route.
    pub interface: Option<u32>,
    /// Whether that network is the one the routers lead to; None: it was not asked.
    pub place: Option<RoutePlace>,
}

/// The prefixes whose addresses lead to something else on this machine: not where the network is the very one.
#[must_use]
pub fn elsewhere(overlaps: &BTreeMap<IpNet, Overlap>) -> BTreeSet<IpNet> {
    let other = overlaps.iter().filter(|(_, overlap)| overlap.place != Some(RoutePlace::Home));
    other.map(|(prefix, _)| *prefix).collect()
}

/// A question to a router, on one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// The interface's number.
    pub interface: u32,
    /// This machine's address there.
    pub own: IpAddr,
    /// Where the router says it answers.
    pub asked: SocketAddr,
    /// Who.
    pub router: IdentityKey,
}

/// How a datagram came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// The sender.
    pub from: SocketAddr,
    /// The address of ours that it was sent to.
    pub to: SocketAddr,
    /// The interface it came in by.
    pub interface: u32,
    /// Time to live or hop limit on arrival.
    pub ttl: u8,
}

/// Whom this machine met, and where.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meetings {
    /// Routers that answered on an interface.
    pub met: BTreeSet<(u32, IdentityKey)>,
    /// Those that were asked for the first time and may still answer.
    pub awaited: BTreeSet<(u32, IdentityKey)>,
    /// Those that do not.
    pub silent: BTreeSet<(u32, IdentityKey)>,
}

impl Meetings {
    /// What the network on an interface is to a prefix that these nodes lead to.
    #[must_use]
    pub fn place<'a>(&self, interface: u32, routers: impl Iterator<Item = &'a OtherRouter>) -> RoutePlace {
        let keys: Vec<(u32, IdentityKey)> = routers.map(|router| (interface, router.identity)).collect();
        let any = |set: &BTreeSet<(u32, IdentityKey)>| keys.iter().any(|key| set.contains(key));
        match (any(&self.met), any(&self.awaited), any(&self.silent)) {
            (true, _, _) => RoutePlace::Home,
            (false, false, true) => RoutePlace::Away,
            (false, true, _) | (false, false, false) => RoutePlace::Unknown,
        }
    }
}

/// The questions to ask: routers of prefixes that lie in a network of ours, where they say to be in it too.
#[must_use]
pub fn questions(plan: &RoutePlan, feet: &[Foot]) -> BTreeSet<Question> {
    let mut questions = BTreeSet::new();
    for foot in feet {
        let Some(net) = foot.net() else { continue };
        for prefix in plan.accepted.iter().filter(|prefix| net.contains(*prefix)) {
            for router in plan.others.get(prefix).into_iter().flatten() {
                for asked in router.lan.iter().filter(|asked| asked.port() != 0 && foot.is_beside(asked.ip())) {
                    let (interface, own) = (foot.interface, foot.address.ip);
                    questions.insert(Question { interface, own, asked: *asked, router: router.identity });
                    if questions.len() >= MOST {
                        return questions;
                    }
                }
            }
        }
    }
    questions
}

/// Asks. See the module.
#[derive(Debug)]
pub struct Asker {
    network: NetworkId,
    rng: StdRng,
    questions: BTreeMap<Question, State>,
    out: VecDeque<(Question, [u8; QUESTION])>,
}

#[derive(Debug)]
struct State {
    /// Whether it answered, if that is known.
    met: Option<bool>,
    /// Asked since the beginning of this round, with these nonces.
    open: Vec<(Nonce, Now)>,
    next: Now,
    pause: Duration,
}

impl Asker {
    /// Asks nobody yet.
    #[must_use]
    pub fn new(network: NetworkId, seed: [u8; 32]) -> Self {
        Self { network, rng: StdRng::from_seed(seed), questions: BTreeMap::new(), out: VecDeque::new() }
    }

    /// The machine's network changed, or who leads where: these are the questions now. All are asked anew; what is known holds
    /// until then, as long as the question stays.
    pub fn look(&mut self, questions: &BTreeSet<Question>, now: Now) {
        self.questions.retain(|question, _| questions.contains(question));
        for question in questions {
            let fresh = || State { met: None, open: Vec::new(), next: now, pause: AGAIN_SILENT };
            let state = self.questions.entry(*question).or_insert_with(fresh);
            if state.open.is_empty() {
                state.next = now;
            }
        }
    }

    /// A deadline passed.
    pub fn handle_timeout(&mut self, now: Now) {
        for (question, state) in self.questions.iter_mut().filter(|(_, state)| state.next <= now) {
            if state.open.len() < TRIES.len() {
                let mut nonce = [0; 32];
                self.rng.fill_bytes(&mut nonce);
                state.open.push((nonce, now));
                let tries = state.open.len();
                state.next = match TRIES.get(tries) {
                    Some(at) => now + (*at - TRIES[tries - 1]),
                    None => now + PATIENCE,
                };
                self.out.push_back((*question, same_lan::question(&self.network, &question.router, &nonce)));
            } else {
                state.open.clear();
                state.met = Some(false);
                state.next = now + state.pause;
                state.pause = (state.pause * 2).min(AGAIN);
            }
        }
    }

    /// What to send; drain after every `handle_timeout`.
    pub fn poll_output(&mut self) -> Option<(Question, [u8; QUESTION])> {
        self.out.pop_front()
    }

    /// When `handle_timeout` must be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        self.questions.values().map(|state| state.next).min()
    }

    /// Somebody answers. True: it proves something.
    pub fn heard(&mut self, arrival: &Arrival, bytes: &[u8], now: Now) -> bool {
        let Some(Message::Answer { nonce, signature }) = same_lan::read(bytes) else { return false };
        if arrival.ttl != TTL {
            return false;
        }
        let ours = self.questions.iter_mut().find(|(question, state)| {
            let way = question.interface == arrival.interface && question.own == arrival.to.ip();
            way && question.asked == arrival.from && state.open.iter().any(|(open, _)| *open == nonce)
        });
        let Some((question, state)) = ours else { return false };
        let in_time = state.open.iter().any(|(open, at)| *open == nonce && now.since(*at) <= PATIENCE);
        let (asker, asked) = (arrival.to, arrival.from);
        let meeting = Meeting { network: self.network, router: question.router, nonce, asker, asked };
        if !in_time || !meeting.is_proven_by(&signature) {
            return false;
        }
        *state = State { met: Some(true), open: Vec::new(), next: now + AGAIN, pause: AGAIN_SILENT };
        true
    }

    /// What is known now.
    #[must_use]
    pub fn meetings(&self) -> Meetings {
        let mut meetings = Meetings::default();
        for (question, state) in &self.questions {
            let set = match state.met {
                Some(true) => &mut meetings.met,
                Some(false) => &mut meetings.silent,
                None => &mut meetings.awaited,
            };
            set.insert((question.interface, question.router));
        }
        meetings
    }
}

/// Answers. Says nothing to anybody who is not on the link, or does not know whom to ask.
#[derive(Debug)]
pub struct Answerer {
    network: NetworkId,
    me: IdentityKey,
    secret: Secret32,
    full_at: Now,
}

impl Answerer {
    /// Answers for this node, with its identity's secret.
    #[must_use]
    pub const fn new(network: NetworkId, me: IdentityKey, secret: Secret32) -> Self {
        Self { network, me, secret, full_at: Now::ZERO }
    }

    /// The answer to a datagram, if it deserves one. `feet`: where this node leads to.
    pub fn answer(&mut self, arrival: &Arrival, bytes: &[u8], feet: &[Foot], now: Now) -> Option<[u8; ANSWER]> {
        let Some(Message::Question { nonce, tag }) = same_lan::read(bytes) else { return None };
        let here = |foot: &&Foot| {
            foot.interface == arrival.interface
                && foot.address.ip == arrival.to.ip()
                && foot.is_beside(arrival.from.ip())
        };
        if arrival.ttl != TTL || !feet.iter().any(|foot| here(&foot)) {
            return None;
        }
        if !same_lan::is_for(&self.network, &self.me, &nonce, &tag) {
            return None;
        }
        let full_at = self.full_at.max(now) + EVERY;
        if full_at.since(now) > EVERY * BURST {
            return None;
        }
        self.full_at = full_at;
        let meeting = Meeting { network: self.network, router: self.me, nonce, asker: arrival.from, asked: arrival.to };
        Some(meeting.answer(&self.secret.signing_key()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const ROUTER: u32 = 3;
    const NODE: u32 = 2;
    const NETWORK: NetworkId = NetworkId([7; 32]);

    fn foot(interface: u32, ip: &str) -> Foot {
        Foot { interface, address: LocalAddress { ip: ip.parse().unwrap(), prefix_len: 24 } }
    }

    fn secret() -> Secret32 {
        Secret32::new([5; 32])
    }

    fn router_key() -> IdentityKey {
        IdentityKey(secret().signing_key().verifying_key().to_bytes())
    }

    fn other(lan: &[&str]) -> OtherRouter {
        let lan = lan.iter().map(|at| at.parse().unwrap()).collect();
        OtherRouter { identity: router_key(), name: "nas".to_owned(), lan }
    }

    fn plan(prefix: &str, lan: &[&str]) -> RoutePlan {
        let prefix: IpNet = prefix.parse().unwrap();
        let others = BTreeMap::from([(prefix, vec![Arc::new(other(lan))])]);
        RoutePlan { accepted: vec![prefix], serving: Vec::new(), others }
    }

    /// A node and a router on one link, or so it seems.
    struct Desk {
        asker: Asker,
        answerer: Answerer,
        questions: BTreeSet<Question>,
        now: Now,
        sent: u32,
    }

    impl Desk {
        fn new() -> Self {
            let questions = questions(&plan("192.168.7.0/24", &["192.168.7.1:41"]), &[foot(NODE, "192.168.7.9")]);
            assert_eq!(questions.len(), 1);
            let mut asker = Asker::new(NETWORK, [1; 32]);
            let now = Now(5_000_000);
            asker.look(&questions, now);
            let answerer = Answerer::new(NETWORK, router_key(), secret());
            Self { asker, answerer, questions, now, sent: 0 }
        }

        /// Runs for so long; `way` says how a question arrives, and how its answer does and after how many milliseconds.
        fn run(&mut self, ms: u64, way: impl Fn(Arrival, Arrival) -> Option<(Arrival, Arrival, u64)>) {
            let end = self.now + Duration::from_millis(ms);
            while let Some(next) = self.asker.poll_timeout().filter(|next| *next <= end) {
                self.now = self.now.max(next);
                self.asker.handle_timeout(self.now);
                while let Some((question, bytes)) = self.asker.poll_output() {
                    self.sent += 1;
                    let (from, to) = (SocketAddr::new(question.own, 40), question.asked);
                    let there = Arrival { from, to, interface: ROUTER, ttl: TTL };
                    let back = Arrival { from: to, to: from, interface: NODE, ttl: TTL };
                    let Some((there, back, late)) = way(there, back) else { continue };
                    let feet = [foot(ROUTER, "192.168.7.1")];
                    if let Some(answer) = self.answerer.answer(&there, &bytes, &feet, self.now) {
                        self.asker.heard(&back, &answer, self.now + Duration::from_millis(late));
                    }
                }
            }
            self.now = end;
        }

        fn place(&self) -> RoutePlace {
            self.asker.meetings().place(NODE, std::iter::once(&other(&[])))
        }
    }

    #[test]
    fn at_home_the_router_answers_and_in_a_hotel_nobody_does() {
        let mut desk = Desk::new();
        assert_eq!(desk.place(), RoutePlace::Unknown);
        desk.run(1, |there, back| Some((there, back, 3)));
        assert_eq!((desk.place(), desk.sent), (RoutePlace::Home, 1));
        // Moved to a hotel: the link was gone for a moment.
        desk.asker.look(&BTreeSet::new(), desk.now);
        desk.asker.look(&desk.questions, desk.now);
        assert_eq!(desk.place(), RoutePlace::Unknown);
        desk.run(700, |_, _| None);
        assert_eq!((desk.place(), desk.sent), (RoutePlace::Away, 5));
        // And seldom asked from then on.
        desk.run(3_600_000, |_, _| None);
        assert!(desk.sent < 300, "{}", desk.sent);
        desk.run(61_000, |there, back| Some((there, back, 3)));
        assert_eq!(desk.place(), RoutePlace::Home, "the router was only switched off");
        desk.asker.look(&desk.questions, desk.now);
        assert_eq!(desk.place(), RoutePlace::Home, "asked anew, but not in doubt");
        desk.run(700, |_, _| None);
        assert_eq!(desk.place(), RoutePlace::Away);
    }

    /// Every way by which an answer could come from elsewhere.
    #[test]
    fn an_answer_that_was_carried_here_counts_for_nothing() {
        type Way = fn(Arrival, Arrival) -> Option<(Arrival, Arrival, u64)>;
        let ways: [(&str, Way); 10] = [
            ("a router forwarded the question", |there, back| Some((Arrival { ttl: 254, ..there }, back, 3))),
            ("a router forwarded the answer", |there, back| Some((there, Arrival { ttl: 254, ..back }, 3))),
            ("the question came through the mesh", |there, back| Some((Arrival { interface: 9, ..there }, back, 3))),
            ("the answer came through the mesh", |there, back| Some((there, Arrival { interface: 9, ..back }, 3))),
            ("it was fetched from far away", |there, back| Some((there, back, 151))),
            ("somebody else asks for us", |there, back| {
                Some((Arrival { from: "192.168.7.77:40".parse().unwrap(), ..there }, back, 3))
            }),
            ("from another port", |there, back| {
                Some((Arrival { from: SocketAddr::new(there.from.ip(), 41), ..there }, back, 3))
            }),
            ("from outside the link", |there, back| {
                Some((Arrival { from: "10.0.0.1:40".parse().unwrap(), ..there }, back, 3))
            }),
            ("somebody else answers", |there, back| {
                Some((there, Arrival { from: "192.168.7.2:41".parse().unwrap(), ..back }, 3))
            }),
            ("to another address of ours", |there, back| {
                Some((there, Arrival { to: "192.168.7.10:40".parse().unwrap(), ..back }, 3))
            }),
        ];
        for (what, way) in ways {
            let mut desk = Desk::new();
            desk.run(1_000, way);
            assert_eq!(desk.place(), RoutePlace::Away, "{what}");
        }
    }

    #[test]
    fn an_old_answer_and_one_for_another_are_no_answers() {
        let mut desk = Desk::new();
        let question = *desk.questions.first().unwrap();
        let (from, to) = (SocketAddr::new(question.own, 40), question.asked);
        let back = Arrival { from: to, to: from, interface: NODE, ttl: TTL };
        desk.asker.handle_timeout(desk.now);
        let (_, first) = desk.asker.poll_output().unwrap();
        let there = Arrival { from, to, interface: ROUTER, ttl: TTL };
        let feet = [foot(ROUTER, "192.168.7.1")];
        let answer = desk.answerer.answer(&there, &first, &feet, desk.now).unwrap();
        assert!(desk.asker.heard(&back, &answer, desk.now));
        assert!(!desk.asker.heard(&back, &answer, desk.now), "used up");
        // A stranger's program, or another network of the same machines.
        let mut stranger = Answerer::new(NetworkId([8; 32]), router_key(), secret());
        assert!(stranger.answer(&there, &first, &feet, desk.now).is_none());
        assert!(desk.answerer.answer(&there, &answer, &feet, desk.now).is_none(), "answers are not answered");
    }

    #[test]
    fn nobody_is_answered_without_end() {
        let mut desk = Desk::new();
        let bytes = same_lan::question(&NETWORK, &router_key(), &[1; 32]);
        let there = Arrival {
            from: "192.168.7.9:40".parse().unwrap(),
            to: "192.168.7.1:41".parse().unwrap(),
            interface: ROUTER,
            ttl: TTL,
        };
        let feet = [foot(ROUTER, "192.168.7.1")];
        let answered = (0..1_000).filter(|_| desk.answerer.answer(&there, &bytes, &feet, desk.now).is_some()).count();
        assert_eq!(answered, BURST as usize);
        assert!(desk.answerer.answer(&there, &bytes, &feet, desk.now + EVERY).is_some());
    }

    #[test]
    fn routers_are_asked_only_where_they_say_to_be_and_on_a_network_that_holds_the_prefix() {
        let ask = |prefix: &str, lan: &[&str]| questions(&plan(prefix, lan), &[foot(NODE, "192.168.7.9")]).len();
        assert_eq!(ask("192.168.0.0/16", &["192.168.7.1:41"]), 0, "it is routed, but for the part we are in");
        assert_eq!(ask("192.168.7.128/25", &["192.168.7.1:41"]), 1, "inside it");
        assert_eq!(ask("192.168.8.0/24", &["192.168.7.1:41"]), 0, "no overlap");
        assert_eq!(ask("0.0.0.0/0", &["192.168.7.1:41"]), 0, "an exit node");
        let odd =
            ["192.168.7.9:41", "192.168.7.255:41", "192.168.7.0:41", "192.168.7.1:0", "10.0.0.1:41", "[fd00::1]:41"];
        assert_eq!(ask("192.168.7.0/24", &odd), 0, "ourselves, everybody, or elsewhere");
        let many: Vec<String> = (1..=200).map(|i| format!("192.168.7.{}:41", i + 9)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(ask("192.168.7.0/24", &many), MOST);
    }
}

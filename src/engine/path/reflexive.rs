//! The node's own addresses as STUN servers see them (RFC 8489 Binding), asked from the sockets that carry data.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use rand::Rng;

use crate::engine::io::SocketId;
use crate::time::Now;
use crate::wire::stun::TransactionId;

/// Waits before each repetition of an unanswered request. Shorter than RFC 8489's 500 ms: a call waits for this.
const RETRY: [Duration; 3] = [Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800)];
/// Once a whole family has answered, the others are not waited for longer than twice as long as it took, and at least this.
const OVERDUE: Duration = Duration::from_millis(50);
/// Servers asked in each family: two, so that a mapping that depends on the destination shows.
const SERVERS_PER_FAMILY: usize = 2;
/// An answer younger than this is taken for true. NATs must keep a mapping for 30 s at least (nat.md: Linux, one-way).
pub(crate) const FRESH: Duration = Duration::from_secs(25);

/// Asks, remembers, and says when the answer changed.
#[derive(Debug)]
pub(crate) struct Reflexive {
    servers: Vec<SocketAddr>,
    asked: Vec<Asked>,
    seen: Vec<Seen>,
    last_done: Option<Now>,
    /// When the questions under way were first sent, and how long the slowest answer took.
    began: Now,
    slowest: Duration,
    ever_answered: bool,
    unanswered_since: Option<Now>,
}

#[derive(Debug)]
struct Asked {
    txid: TransactionId,
    server: SocketAddr,
    tries: usize,
    next: Now,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    server: SocketAddr,
    mapped: SocketAddr,
    at: Now,
}

impl Reflexive {
    pub(crate) const fn new() -> Self {
        Self {
            servers: Vec::new(),
            asked: Vec::new(),
            seen: Vec::new(),
            last_done: None,
            began: Now::ZERO,
            slowest: Duration::ZERO,
            ever_answered: false,
            unanswered_since: None,
        }
    }

    /// Replaces the servers. What was learned from others is forgotten.
    pub(crate) fn set_servers(&mut self, servers: &[SocketAddr]) {
        let mut chosen: Vec<SocketAddr> = Vec::new();
        for server in servers {
            let same_family = chosen.iter().filter(|c| c.is_ipv4() == server.is_ipv4()).count();
            if same_family < SERVERS_PER_FAMILY && !chosen.contains(server) {
                chosen.push(*server);
            }
        }
        if chosen != self.servers {
            self.asked.clear();
            self.seen.retain(|s| chosen.contains(&s.server));
            self.last_done = None;
            self.servers = chosen;
        }
    }

    pub(crate) fn has_servers(&self) -> bool {
        !self.servers.is_empty()
    }

    pub(crate) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// Whether what is known is worth telling at once: it was asked for in earnest, and nothing happened since that makes it
    /// doubtful. If it is not fresh, ask beside telling it.
    pub(crate) const fn is_usable(&self) -> bool {
        self.last_done.is_some() && !self.seen.is_empty()
    }

    pub(crate) fn is_asking(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Whether a call may go out with what is known.
    pub(crate) fn is_fresh(&self, now: Now) -> bool {
        self.servers.is_empty() || self.last_done.is_some_and(|at| now.since(at) < FRESH)
    }

    /// From when on a call may go out although a family has not answered: it is blocked, or leads nowhere. None: no family has
    /// answered as a whole.
    pub(crate) fn enough_at(&self) -> Option<Now> {
        let answered = |v4: bool| {
            let seen = self.seen.iter().any(|s| s.server.is_ipv4() == v4);
            seen && !self.asked.iter().any(|a| a.server.is_ipv4() == v4)
        };
        (self.is_asking() && (answered(true) || answered(false))).then(|| self.began + OVERDUE.max(self.slowest * 2))
    }

    /// Forgets what was learned: the network changed.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
        self.asked.clear();
        self.last_done = None;
    }

    /// Begins to ask all servers, unless it is asking already.
    pub(crate) fn refresh(&mut self, now: Now, prefix: [u8; 4], rng: &mut impl Rng, send: &mut VecDeque<Question>) {
        if self.is_asking() {
            return;
        }
        (self.began, self.slowest) = (now, Duration::ZERO);
        for server in self.servers.clone() {
            let txid = fresh_txid(prefix, rng);
            send.push_back(Question { txid, server });
            self.asked.push(Asked { txid, server, tries: 0, next: now + RETRY[0] });
        }
    }

    /// What was learned may be out of date: ask before it is told to anybody again.
    pub(crate) const fn distrust(&mut self) {
        self.last_done = None;
    }

    /// A request could not even be sent: its server does not count. True: that finished the asking.
    pub(crate) fn unreachable(&mut self, server: SocketAddr, now: Now) -> bool {
        let before = self.asked.len();
        self.asked.retain(|a| a.server != server);
        before > self.asked.len() && self.finish_if_done(now)
    }

    pub(crate) fn next_deadline(&self) -> Option<Now> {
        self.asked.iter().map(|a| a.next).min()
    }

    /// Repeats what is due and gives up what was repeated enough. True: just finished asking.
    pub(crate) fn tick(&mut self, now: Now, send: &mut VecDeque<Question>) -> bool {
        if !self.is_asking() {
            return false;
        }
        self.asked.retain_mut(|a| {
            if a.next > now {
                return true;
            }
            a.tries += 1;
            let Some(wait) = RETRY.get(a.tries) else { return false };
            a.next = now + *wait;
            send.push_back(Question { txid: a.txid, server: a.server });
            true
        });
        self.finish_if_done(now)
    }

    /// Takes an answer. None: not to a question of ours.
    pub(crate) fn answer(
        &mut self,
        txid: &TransactionId,
        from: SocketAddr,
        mapped: SocketAddr,
        now: Now,
    ) -> Option<Answered> {
        let position = self.asked.iter().position(|a| a.txid == *txid && a.server == from)?;
        let Asked { server, tries, .. } = self.asked.swap_remove(position);
        if tries == 0 {
            self.slowest = self.slowest.max(now.since(self.began));
        }
        self.ever_answered = true;
        let before = self.seen.iter().find(|s| s.server == server).map(|s| s.mapped);
        self.seen.retain(|s| s.server != server);
        self.seen.push(Seen { server, mapped, at: now });
        self.seen.sort_by_key(|s| self.servers.iter().position(|x| *x == s.server));
        Some(Answered { changed: before.is_some_and(|b| b != mapped), done: self.finish_if_done(now) })
    }

    fn finish_if_done(&mut self, now: Now) -> bool {
        if self.is_asking() {
            return false;
        }
        self.last_done = Some(now);
        let answered = self.seen.iter().any(|s| now.since(s.at) < FRESH);
        self.unanswered_since = if answered { None } else { self.unanswered_since.or(Some(now)) };
        // Servers of a family that does not answer must not hold back what another family told.
        self.seen.retain(|s| now.since(s.at) < FRESH * 2);
        true
    }

    /// Reflexive addresses, one a server and family, without repetition.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let mut out: Vec<SocketAddr> = Vec::new();
        for seen in &self.seen {
            if !out.contains(&seen.mapped) {
                out.push(seen.mapped);
            }
        }
        out
    }

    /// True: two servers see different IPv4 addresses of one socket. None: not known.
    pub(crate) fn mapping_varies(&self) -> Option<bool> {
        let mut v4 = self.seen.iter().filter(|s| s.mapped.is_ipv4());
        let first = v4.next()?;
        let second = v4.next()?;
        Some(first.mapped != second.mapped)
    }

    /// Whether UDP passes; None: not known yet.
    pub(crate) fn udp_works(&self) -> Option<bool> {
        if self.unanswered_since.is_some() {
            Some(false)
        } else if !self.seen.is_empty() {
            Some(true)
        } else if self.last_done.is_some() && self.has_servers() {
            Some(false)
        } else {
            None
        }
    }

    /// Since when no server answered.
    pub(crate) const fn unanswered_since(&self) -> Option<Now> {
        self.unanswered_since
    }
}

/// A Binding request to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) txid: TransactionId,
    pub(crate) server: SocketAddr,
}

impl Question {
    pub(crate) const fn socket(&self) -> SocketId {
        SocketId::for_remote(&self.server)
    }
}

/// What an answer meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answered {
    /// The server sees another address than before: the NAT lost or moved the mapping.
    pub(crate) changed: bool,
    /// All servers have answered or were given up.
    pub(crate) done: bool,
}

/// A transaction id: four bytes known to the inbound worker, eight random ones.
pub(crate) fn fresh_txid(prefix: [u8; 4], rng: &mut impl Rng) -> TransactionId {
    let mut id = [0u8; 12];
    rng.fill_bytes(&mut id);
    id[..4].copy_from_slice(&prefix);
    TransactionId(id)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn ask(r: &mut Reflexive, now: Now) -> Vec<Question> {
        let mut send = VecDeque::new();
        r.refresh(now, [1, 2, 3, 4], &mut StdRng::seed_from_u64(now.0), &mut send);
        send.into()
    }

    #[test]
    fn two_servers_that_differ_show_a_varying_mapping() {
        let mut r = Reflexive::new();
        let servers: Vec<SocketAddr> = vec!["203.0.113.1:3478".parse().unwrap(), "203.0.113.1:3479".parse().unwrap()];
        r.set_servers(&servers);
        let questions = ask(&mut r, Now(0));
        assert_eq!(questions.len(), 2);
        let a = r.answer(&questions[0].txid, servers[0], "198.51.100.1:5".parse().unwrap(), Now(10)).unwrap();
        assert_eq!(a, Answered { changed: false, done: false });
        assert_eq!(r.mapping_varies(), None);
        let a = r.answer(&questions[1].txid, servers[1], "198.51.100.1:6".parse().unwrap(), Now(20)).unwrap();
        assert!(a.done);
        assert_eq!(r.mapping_varies(), Some(true));
        assert_eq!(r.addresses().len(), 2);
    }

    #[test]
    fn an_answer_from_elsewhere_or_twice_is_not_ours() {
        let mut r = Reflexive::new();
        let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
        r.set_servers(&[server]);
        let q = ask(&mut r, Now(0))[0];
        let mapped = "198.51.100.1:5".parse().unwrap();
        assert_eq!(r.answer(&q.txid, "203.0.113.9:3478".parse().unwrap(), mapped, Now(1)), None);
        assert!(r.answer(&q.txid, server, mapped, Now(1)).is_some());
        assert_eq!(r.answer(&q.txid, server, mapped, Now(1)), None);
    }

    #[test]
    fn a_server_that_cannot_be_sent_to_is_not_waited_for() {
        let mut r = Reflexive::new();
        let servers: Vec<SocketAddr> = vec!["203.0.113.1:3478".parse().unwrap(), "[2001:db8::1]:3478".parse().unwrap()];
        r.set_servers(&servers);
        let questions = ask(&mut r, Now(0));
        assert!(!r.unreachable(servers[1], Now(1)), "the other one is still asked");
        assert!(r.answer(&questions[0].txid, servers[0], "198.51.100.1:5".parse().unwrap(), Now(2)).unwrap().done);
        assert!(r.is_fresh(Now(3)));
        r.distrust();
        assert!(!r.is_fresh(Now(3)));
        assert_eq!(r.addresses().len(), 1, "known until something better is");
    }

    #[test]
    fn a_family_that_does_not_answer_is_not_waited_for() {
        let mut r = Reflexive::new();
        let servers: Vec<SocketAddr> =
            ["203.0.113.1:3478", "203.0.113.1:3479", "[2001:db8::1]:3478"].map(|s| s.parse().unwrap()).to_vec();
        r.set_servers(&servers);
        let questions = ask(&mut r, Now::from_millis(1_000));
        let mapped = "198.51.100.1:5".parse().unwrap();
        r.answer(&questions[0].txid, servers[0], mapped, Now::from_millis(1_020)).unwrap();
        assert_eq!(r.enough_at(), None, "the same family may tell more");
        r.answer(&questions[1].txid, servers[1], mapped, Now::from_millis(1_040)).unwrap();
        assert_eq!(r.enough_at(), Some(Now::from_millis(1_080)));
        assert!(r.is_asking() && !r.is_usable());
    }

    #[test]
    fn silence_ends_after_the_retries_and_says_udp_does_not_work() {
        let mut r = Reflexive::new();
        r.set_servers(&["203.0.113.1:3478".parse().unwrap()]);
        ask(&mut r, Now(0));
        let mut sent = VecDeque::new();
        let mut done = false;
        while let Some(at) = r.next_deadline() {
            done = r.tick(at, &mut sent);
        }
        assert!(done);
        assert_eq!(sent.len(), 2, "two repetitions");
        assert_eq!(r.udp_works(), Some(false));
        assert!(r.unanswered_since().is_some());
    }
}

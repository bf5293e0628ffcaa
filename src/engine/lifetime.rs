//! How long the NAT in front keeps a UDP mapping that nobody uses (RFC 5780 section 4.6), as a pure machine.
//!
//! Several sockets ask the STUN server once, at the same time, and then keep silent, each for longer than the one before. When a
//! socket's silence is over, another socket asks the server to answer to the first one's mapping (RESPONSE-PORT): what arrives
//! shows that the mapping is still there, and does not depend on whether the NAT would give the same port again. A socket that
//! hears nothing ends the test, for those that are silent for longer would hear nothing either. Politely: at most
//! three dozen packets, and as many entries in the NAT's table as there are steps, each for as long as the NAT keeps it anyway.
//!
//! The mappings are new ones that saw one question and its answer. Some NATs keep those that carried more for longer; what is found
//! here holds for both.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::time::Now;
use crate::wire::nat::UdpLifetime;
use crate::wire::stun::{self, Change, TransactionId};

/// The silences, in seconds: between the timeouts in use, and one that any mapping outlives, which shows that the server does
/// as asked.
const SILENCES_S: [u16; 10] = [1, 5, 10, 20, 35, 65, 125, 185, 245, 305];
/// A question is sent at these times, until answered.
const SENDS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(400), Duration::from_millis(900)];
/// And given up at this time.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// The longest a test takes.
pub const LIMIT: Duration = Duration::from_secs(310);

/// One of the sockets the shell opens for a test, each on a fresh port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// Asks for the others.
    Asker,
    /// One that keeps silent.
    Silent(u8),
}

/// One test, of IPv4.
#[derive(Debug)]
pub struct LifetimeTest {
    server: SocketAddr,
    rng: StdRng,
    steps: Vec<Step>,
    outbox: VecDeque<(Slot, SocketAddr, Vec<u8>)>,
    now: Now,
}

#[derive(Debug)]
struct Step {
    silence: Duration,
    /// Where its socket is seen, and since when it has been silent.
    mapped: Option<(SocketAddr, Now)>,
    question: Question,
    outcome: Option<Outcome>,
}

/// What is asked of the server now: first how the socket is seen, then for an answer there.
#[derive(Debug, Default)]
struct Question {
    began: Now,
    sent: Vec<TransactionId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Alive,
    Gone,
    /// The server did not answer at all, or cannot do as asked.
    Unknown,
}

impl LifetimeTest {
    /// Starts a test with an IPv4 server. `seed` must be random: transaction ids are drawn from it.
    #[must_use]
    pub fn new(server: SocketAddr, seed: u64, now: Now) -> Self {
        let step = |seconds: u16| Step {
            silence: Duration::from_secs(seconds.into()),
            mapped: None,
            question: Question { began: now, sent: Vec::new() },
            outcome: None,
        };
        let steps = SILENCES_S.into_iter().map(step).collect();
        let mut test = Self { server, rng: StdRng::seed_from_u64(seed), steps, outbox: VecDeque::new(), now };
        test.handle_timeout(now);
        test
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<(Slot, SocketAddr, Vec<u8>)> {
        self.outbox.pop_front()
    }

    /// When to call [`Self::handle_timeout`] at the latest. None: the test is over.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        if !self.outbox.is_empty() {
            return Some(self.now);
        }
        if self.is_decided() {
            return None;
        }
        self.steps.iter().filter(|s| s.outcome.is_none()).map(Step::next).min()
    }

    /// Something arrived on a socket of the test. Anything but an answer to a question is ignored.
    pub fn handle_datagram(&mut self, slot: Slot, from: SocketAddr, bytes: &[u8], now: Now) {
        self.now = now;
        let Slot::Silent(number) = slot else { return };
        let Ok(response) = stun::decode_binding_response(bytes) else { return };
        let Some(step) = self.steps.get_mut(usize::from(number)).filter(|_| from == self.server) else { return };
        if step.outcome.is_some() || !step.question.sent.contains(&response.txid) {
            return;
        }
        if step.mapped.is_none() {
            step.mapped = Some((response.mapped, now));
            step.question = Question { began: now + step.silence, sent: Vec::new() };
        } else {
            step.outcome = Some(Outcome::Alive);
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Now) {
        self.now = now;
        if self.is_decided() {
            return;
        }
        for (number, step) in (0..).zip(&mut self.steps).filter(|(_, s)| s.outcome.is_none()) {
            if now.since(step.question.began) >= PATIENCE && step.question.began <= now {
                step.outcome = Some(if step.mapped.is_some() { Outcome::Gone } else { Outcome::Unknown });
                continue;
            }
            while step.next() <= now && step.question.sent.len() < SENDS.len() {
                let mut id = [0; 12];
                self.rng.fill_bytes(&mut id);
                let txid = TransactionId(id);
                step.question.sent.push(txid);
                self.outbox.push_back(match step.mapped {
                    None => (Slot::Silent(number), self.server, stun::binding_request(&txid, Change::default())),
                    Some((mapped, _)) => (Slot::Asker, self.server, stun::request_to_port(&txid, mapped.port())),
                });
            }
        }
    }

    /// What was found, or nothing if the server does not answer, or not as asked (RESPONSE-PORT is optional).
    #[must_use]
    pub fn finish(&self) -> Option<UdpLifetime> {
        let seconds = |step: &Step| u16::try_from(step.silence.as_secs()).unwrap_or(u16::MAX);
        let gone = self.steps.iter().position(|s| s.outcome == Some(Outcome::Gone));
        let before = self.steps.get(..gone.unwrap_or(self.steps.len()))?;
        let alive = before.iter().rev().find(|s| s.outcome == Some(Outcome::Alive))?;
        let less_than_s = gone.and_then(|gone| self.steps.get(gone)).map(seconds);
        Some(UdpLifetime { at_least_s: seconds(alive), less_than_s })
    }

    /// One is gone, and nothing shorter is open.
    fn is_decided(&self) -> bool {
        let open = self.steps.iter().position(|s| s.outcome.is_none());
        let gone = self.steps.iter().position(|s| s.outcome == Some(Outcome::Gone));
        match (gone, open) {
            (_, None) => true,
            (Some(gone), Some(open)) => gone < open,
            (None, Some(_)) => false,
        }
    }
}

impl Step {
    fn next(&self) -> Now {
        self.question.began + SENDS.get(self.question.sent.len()).copied().unwrap_or(PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::wire::stun::ServerLayout;

    const ONE_WAY: Duration = Duration::from_millis(20);

    /// A NAT that keeps a mapping for so long after the last packet out, in front of a server that knows RESPONSE-PORT or not.
    fn run(keeps: Duration, knows: bool, loses: impl Fn(usize) -> bool) -> (Option<UdpLifetime>, Duration, usize) {
        let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
        let layout = ServerLayout { endpoints: vec![server] };
        let start = Now::from_millis(1_000);
        let mut test = LifetimeTest::new(server, 1, start);
        let (mut now, mut sent) = (start, 0);
        let mut used: BTreeMap<u16, (Slot, Now)> = BTreeMap::new();
        let mut arriving: Vec<(Now, Slot, Vec<u8>)> = Vec::new();
        loop {
            while let Some((slot, to, bytes)) = test.poll_transmit() {
                assert_eq!(to, server);
                sent += 1;
                let port = match slot {
                    Slot::Asker => 7_000,
                    Slot::Silent(n) => 8_000 + u16::from(n),
                };
                used.insert(port, (slot, now));
                if loses(sent) {
                    continue;
                }
                let source = SocketAddr::from(([198, 51, 100, 7], port));
                let answer = stun::answer(&bytes, source, server, &layout).unwrap();
                let port = if knows { answer.port } else { port };
                let at = now + ONE_WAY + ONE_WAY;
                let (slot, last) = used[&port];
                if at.since(last) <= keeps {
                    arriving.push((at, slot, answer.bytes));
                }
            }
            arriving.sort_by_key(|(at, ..)| std::cmp::Reverse(*at));
            let Some(next) = test.poll_timeout() else { return (test.finish(), now.since(start), sent) };
            match arriving.last().map(|(at, ..)| *at) {
                Some(at) if at <= next => {
                    let (at, slot, bytes) = arriving.pop().unwrap();
                    now = at.max(now);
                    test.handle_datagram(slot, server, &bytes, now);
                }
                _ => {
                    now = next.max(now);
                    test.handle_timeout(now);
                }
            }
        }
    }

    #[test]
    fn the_timeout_is_found_between_two_steps_and_no_sooner_than_it_passes() {
        for (keeps_s, at_least_s, less_than_s) in
            [(3, 1, Some(5)), (30, 20, Some(35)), (60, 35, Some(65)), (120, 65, Some(125)), (900, 305, None)]
        {
            let (found, took, sent) = run(Duration::from_secs(keeps_s), true, |_| false);
            assert_eq!(found, Some(UdpLifetime { at_least_s, less_than_s }), "{keeps_s} s");
            let end = Duration::from_secs(less_than_s.unwrap_or(305).into());
            assert!(took >= end && took <= end + Duration::from_secs(2) && took <= LIMIT, "{took:?}");
            assert!(sent <= 3 * SILENCES_S.len(), "{sent}");
        }
    }

    #[test]
    fn a_lost_question_is_repeated() {
        let (found, ..) = run(Duration::from_secs(30), true, |n| n <= 10 || n == 21);
        assert_eq!(found, Some(UdpLifetime { at_least_s: 20, less_than_s: Some(35) }));
    }

    #[test]
    fn a_server_that_is_silent_or_answers_elsewhere_tells_nothing() {
        let (found, took, _) = run(Duration::from_secs(30), false, |_| false);
        assert_eq!(found, None);
        assert!(took < Duration::from_secs(4), "{took:?}");
        assert_eq!(run(Duration::from_secs(30), true, |_| true).0, None);
    }
}

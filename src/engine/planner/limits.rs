//! Politeness: how much a node may send into the unknown, and to whom. Hard caps for the whole node, and a small one for
//! each address that nobody has vouched for.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::engine::path::Leg;
use crate::time::Now;

/// What the shell can do for the planner, and how far the planner may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sockets the shell can serve besides the two that carry data by default; at most [`MOST_SOCKETS`] are used. 0: punches
    /// that need several are never chosen.
    pub extra_sockets: u16,
    /// The shell makes TCP connections to peers ([`crate::engine::io::Output::Tcp`]).
    pub tcp: bool,
    /// The time to live that gets a datagram through the NATs here but no further: their number plus one, as long as no NAT
    /// check tells that number. None: it is not known ([`crate::engine::io::Output::Prime`] does not come).
    pub prime_ttl: Option<u8>,
    /// Probes a second, in all.
    pub probes_per_second: u32,
    /// Addresses probed in a minute, each of which costs an entry in the NAT's table.
    pub entries_per_minute: u32,
}

/// The most sockets ever open at once.
pub const MOST_SOCKETS: u16 = 512;
/// Probes that may go out at once after a pause.
const BURST: u32 = 128;
/// Probes and answers to probes in any second to an address that nobody vouched for: three in all. Apart, so that our own
/// questions leave room to answer the peer's.
const STRANGER_PROBES: usize = 2;
const STRANGER_ANSWERS: usize = 1;
const STRANGER_WINDOW: Duration = Duration::from_secs(1);
/// How long an entry in a NAT's table is counted.
const ENTRY: Duration = Duration::from_secs(60);
/// How often old entries are looked for.
const PRUNE: Duration = Duration::from_secs(1);

impl Default for Limits {
    fn default() -> Self {
        Self { extra_sockets: 0, tcp: false, prime_ttl: None, probes_per_second: 1000, entries_per_minute: 4000 }
    }
}

/// Keeps the limits.
#[derive(Debug)]
pub(super) struct Politeness {
    pub(super) limits: Limits,
    /// As it was set, before any NAT check.
    usual_ttl: Option<u8>,
    /// In millionths.
    tokens: u64,
    refilled: Now,
    entries: BTreeMap<Leg, Now>,
    pruned: Now,
    strangers: BTreeMap<(IpAddr, Trouble), VecDeque<Now>>,
    pub(super) probes: u64,
}

const TOKEN: u64 = 1_000_000;

/// What is sent to somebody who may not want it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trouble {
    Probe,
    Answer,
}

impl Politeness {
    pub(super) fn new(mut limits: Limits, now: Now) -> Self {
        limits.extra_sockets = limits.extra_sockets.min(MOST_SOCKETS);
        let tokens = u64::from(BURST) * TOKEN;
        Self {
            limits,
            usual_ttl: limits.prime_ttl,
            tokens,
            refilled: now,
            entries: BTreeMap::new(),
            pruned: now,
            strangers: BTreeMap::new(),
            probes: 0,
        }
    }

    /// A NAT check told how many NATs there are here.
    pub(super) fn nat_depth(&mut self, depth: Option<u8>) {
        self.limits.prime_ttl = depth.map(|nats| nats.saturating_add(1)).or(self.usual_ttl);
    }

    /// How many probes may go out now.
    pub(super) fn allowance(&mut self, now: Now) -> usize {
        let elapsed = u64::try_from(now.since(self.refilled).as_micros()).unwrap_or(u64::MAX);
        let earned = elapsed.saturating_mul(u64::from(self.limits.probes_per_second));
        self.tokens = self.tokens.saturating_add(earned).min(u64::from(BURST) * TOKEN);
        self.refilled = now;
        let entries_left = (self.limits.entries_per_minute as usize).saturating_sub(self.entries_used(now));
        usize::try_from(self.tokens / TOKEN).unwrap_or(usize::MAX).min(entries_left)
    }

    /// How long until another few probes may go out.
    pub(super) fn wait(&self) -> Duration {
        // Eight at a time: fewer wake-ups.
        Duration::from_micros(8 * TOKEN / u64::from(self.limits.probes_per_second.max(1)))
    }

    /// One probe goes out.
    pub(super) fn sent(&mut self, leg: Leg, now: Now) {
        self.tokens = self.tokens.saturating_sub(TOKEN);
        self.probes += 1;
        self.entries.insert(leg, now);
    }

    /// Whether a probe or an answer may go to an address that nobody vouched for; counts it if so.
    pub(super) fn may_trouble(&mut self, ip: IpAddr, with: Trouble, now: Now) -> bool {
        self.prune(now);
        let times = self.strangers.entry((ip, with)).or_default();
        let most = match with {
            Trouble::Probe => STRANGER_PROBES,
            Trouble::Answer => STRANGER_ANSWERS,
        };
        while times.front().is_some_and(|at| now.since(*at) >= STRANGER_WINDOW) {
            times.pop_front();
        }
        let may = times.len() < most;
        if may {
            times.push_back(now);
        }
        may
    }

    /// Entries in the NAT's table that probes of the last minute made.
    pub(super) fn entries_used(&mut self, now: Now) -> usize {
        self.prune(now);
        self.entries.len()
    }

    /// The same without tidying up.
    pub(super) fn entries(&self, now: Now) -> usize {
        self.entries.values().filter(|at| now.since(**at) < ENTRY).count()
    }

    fn prune(&mut self, now: Now) {
        if now.since(self.pruned) >= PRUNE {
            self.pruned = now;
            self.entries.retain(|_, at| now.since(*at) < ENTRY);
            self.strangers.retain(|_, times| times.back().is_some_and(|at| now.since(*at) < STRANGER_WINDOW));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(port: u16) -> Leg {
        Leg::main(([203, 0, 113, 9], port).into())
    }

    #[test]
    fn a_burst_is_followed_by_the_steady_rate() {
        let mut polite = Politeness::new(Limits { probes_per_second: 100, ..Limits::default() }, Now::ZERO);
        let mut sent = 0u32;
        for ms in 0..2_000 {
            let now = Now::from_millis(ms);
            for _ in 0..polite.allowance(now) {
                polite.sent(leg(1), now);
                sent += 1;
            }
        }
        assert!((BURST + 198..=BURST + 200).contains(&sent), "{sent}");
    }

    #[test]
    fn new_addresses_are_capped_by_the_minute_and_known_ones_count_once() {
        let mut polite = Politeness::new(Limits { entries_per_minute: 50, ..Limits::default() }, Now::ZERO);
        let mut reached = 0;
        for port in 1..=100 {
            if polite.allowance(Now::ZERO) > 0 {
                polite.sent(leg(port), Now::ZERO);
                polite.sent(leg(port), Now::ZERO);
                reached += 1;
            }
        }
        assert_eq!((reached, polite.entries(Now::ZERO)), (50, 50));
        assert_eq!(polite.allowance(Now::from_millis(59_000)), 0);
        assert!(polite.allowance(Now::from_millis(61_000)) > 0);
    }

    #[test]
    fn strangers_get_three_in_any_second() {
        let mut polite = Politeness::new(Limits::default(), Now::ZERO);
        let ip: IpAddr = [203, 0, 113, 9].into();
        let mut sent = Vec::new();
        for ms in 0..5_000 {
            for with in [Trouble::Answer, Trouble::Probe] {
                sent.extend(polite.may_trouble(ip, with, Now::from_millis(ms)).then_some(ms));
            }
        }
        assert_eq!(sent.len(), 15);
        for window in sent.windows(4) {
            assert!(window[3] - window[0] >= 1_000, "{window:?}");
        }
    }
}

//! The watch over the path in use: is it alive, and is there a better one?

use rand::Rng;

use super::*;

/// Silence after which a path that carries our data is asked, in multiples of its round trip and at least.
const QUIET_RTTS: u32 = 3;
const QUIET_MIN: Duration = Duration::from_millis(300);
/// Packets on the relay when a path is chosen have arrived after this time.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// Half the difference of two round trips is how much sooner packets arrive; queues may make it so much more.
const LEAD_SLACK: Duration = Duration::from_millis(15);
/// The same where nobody has measured the relay, and at most.
const LEAD_UNKNOWN: Duration = Duration::from_millis(40);
const LEAD_MAX: Duration = Duration::from_millis(500);
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

/// Whether anything came by the relay after that, first or as a copy.
fn is_relayed_since(stamps: &Stamps, since: Now) -> bool {
    stamps.last_rx_relay.max(stamps.last_copy_relay).is_some_and(|rx| rx > since)
}

impl PathAgent {
    /// Is there a better path than the one in use?
    pub(super) fn review<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let now = cx.now;
        let Some(current) = self.current.filter(|c| self.awake && c.doubt.is_none()) else { return };
        let all = self.next_review <= now;
        if all {
            self.next_review = now + REVIEW;
        }
        let due = |r: &&mut Remote| {
            let due = r.review.is_some_and(|at| at <= now) || (all && r.rtt.is_some());
            // From UDP nothing leads back to TCP but need.
            let worse = r.leg.socket.is_stream() && !current.leg.socket.is_stream();
            due && r.leg != current.leg && !worse
        };
        let legs: Vec<Leg> = self
            .remotes
            .iter_mut()
            .filter(due)
            .take(REVIEWED)
            .map(|r| {
                r.review = None;
                r.leg
            })
            .collect();
        for leg in legs {
            self.probe(leg, FULL, cx);
        }
    }

    /// Is the path in use alive?
    pub(super) fn watch<R: Rng>(&mut self, stamps: Stamps, cx: &mut Context<'_, R>) {
        let now = cx.now;
        let Some(current) = self.current else { return };
        let heard = current.last_pong.max(stamps.last_rx_direct.unwrap_or(Now::ZERO));
        match current.doubt {
            None => {
                let quiet = (current.rtt * QUIET_RTTS).max(QUIET_MIN);
                let sending_into_silence = stamps.last_tx.is_some_and(|tx| tx > heard && now.since(heard) > quiet);
                // The peer's packets come (also) by the relay although ours go directly: it does not hear us here. Those
                // that were under way when the path was chosen do not count.
                let peer_doubts = stamps.last_rx_relay.max(stamps.last_copy_relay).is_some_and(|rx| {
                    rx > current.since + UNDER_WAY && now.since(rx) < quiet && rx > current.last_pong
                });
                // On a narrow path what is long goes by the relay, and that is no doubt as long as the rest comes directly.
                let heard_here = stamps.last_rx_direct.is_some_and(|at| now.since(at) < quiet);
                let peer_doubts = peer_doubts && !(self.search.size() < BASE && heard_here);
                let keepalive_due =
                    self.awake && now.since(current.last_probe.max(current.last_pong)) >= self.keepalive();
                if peer_doubts {
                    self.doubt(true, true, now);
                    cx.actions.push_back(Action::Select(current.leg.both()));
                    self.probe(current.leg, self.data_size(), cx);
                } else if sending_into_silence {
                    self.doubt(false, false, now);
                    self.probe(current.leg, SMALL, cx);
                    // Perhaps only what is long does not arrive.
                    self.search.suspect(now);
                } else if keepalive_due {
                    self.probe(current.leg, SMALL, cx);
                    // An unanswered keepalive must raise doubt too.
                    self.doubt(false, false, now);
                }
            }
            // A doubt is settled by an answer to a probe; one of our own also by data that came after it arose, unless it came
            // by the relay too: then the peer doubts as well, and what it does not hear is ours.
            Some(doubt)
                if heard > doubt.since
                    && !doubt.theirs
                    && !self.search.is_suspecting()
                    && !is_relayed_since(&stamps, doubt.since) =>
            {
                if let Some(c) = &mut self.current {
                    c.doubt = None;
                }
                if doubt.both {
                    cx.actions.push_back(Action::Select(current.leg.direct()));
                }
            }
            Some(doubt) => {
                let patience = DOUBT_AFTER.max(current.rtt * 2);
                // One that answers small probes is not dead, perhaps narrow.
                let silent = if doubt.theirs { doubt.since } else { doubt.since.max(current.last_pong) };
                if now.since(silent) >= DEAD_AFTER.max(current.rtt * 5) {
                    self.lost(cx);
                    return;
                }
                if !doubt.both && now.since(doubt.since) >= patience {
                    self.doubt(true, doubt.theirs, now);
                    cx.actions.push_back(Action::Select(current.leg.both()));
                }
                if now.since(current.last_probe) >= DOUBT_PROBE_GAP {
                    self.probe(current.leg, if doubt.theirs { self.data_size() } else { SMALL }, cx);
                }
            }
        }
    }

    pub(super) fn doubt(&mut self, both: bool, theirs: bool, now: Now) {
        if let Some(current) = &mut self.current {
            let since = current.doubt.map_or(now, |d| d.since);
            current.doubt = Some(Doubt { since, both, theirs });
        }
    }

    fn lost<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let Some(current) = self.current else { return };
        self.remotes.retain(|r| r.leg != current.leg);
        self.leave(cx);
        self.full_size_lost = false;
    }

    /// The relay carries alone, and a new round begins.
    pub(super) fn leave<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.current = None;
        for remote in &mut self.remotes {
            remote.forget();
        }
        cx.actions.push_back(Action::Select(Path::Relay));
        self.failures = 0;
        if matches!(self.stage, Stage::Idle) {
            self.next_round = Some(cx.now + Duration::from_millis(if self.wins_ties { 50 } else { 400 }));
        }
    }

    /// How much sooner a packet that goes a way with this round trip arrives than one sent just now.
    fn lead(&self, rtt: Duration) -> Duration {
        let before = match &self.current {
            None => self.relay_rtt,
            Some(c) if c.doubt.is_some() => self.relay_rtt.max(Some(c.rtt)),
            Some(c) => Some(c.rtt),
        };
        before.map_or(LEAD_UNKNOWN, |before| (before / 2 + LEAD_SLACK).saturating_sub(rtt / 2)).min(LEAD_MAX)
    }

    /// A path is proven both ways: is it the one to use?
    pub(super) fn consider<R: Rng>(&mut self, leg: Leg, rtt: Duration, cx: &mut Context<'_, R>) {
        let near = self.remotes.iter().any(|r| r.leg == leg && r.near);
        let size = self.remotes.iter().find(|r| r.leg == leg).map_or(BASE, |r| r.size);
        let better = match &self.current {
            None => true,
            Some(c) if c.leg == leg => false,
            Some(c) if c.doubt.is_some() => true,
            // Datagrams in a stream wait for those that were lost before them: any way by UDP is better.
            Some(c) if leg.socket.is_stream() != c.leg.socket.is_stream() => c.leg.socket.is_stream() && size >= BASE,
            // One that takes packets of every size is better than one that does not.
            Some(_) if size < BASE => false,
            Some(_) if self.search.size() < BASE => true,
            Some(c) => {
                let current_near = self.remotes.iter().any(|r| r.leg == c.leg && r.near);
                let clearly = rtt + BETTER_BY < c.rtt && rtt * 100 < c.rtt * (100 - BETTER_PERCENT);
                let better = (near && !current_near && rtt <= c.rtt + BETTER_BY) || (clearly && near >= current_near);
                let settled = cx.now.since(c.since) > SETTLED;
                let Some(remote) = self.remotes.iter_mut().find(|r| r.leg == leg) else { return };
                remote.wins = if better { remote.wins.saturating_add(1) } else { 0 };
                remote.review = (better && settled && remote.wins < WINS).then(|| cx.now + WIN_GAP);
                better && (!settled || remote.wins >= WINS)
            }
        };
        if better {
            let found = Found { how: self.how(leg), attempt: self.failures };
            let lead = self.lead(rtt);
            self.current =
                Some(Current { leg, since: cx.now, rtt, last_pong: cx.now, last_probe: cx.now, doubt: None, found });
            self.failed = None;
            self.full_size_lost = false;
            self.worked_at = self.failures;
            self.failures = 0;
            self.heavy_failures = 0;
            self.heavy_not_before = None;
            self.fresh = Fresh::No;
            self.next_round = None;
            self.next_review = cx.now + REVIEW;
            self.search = Search::new(size, cx.now);
            cx.actions.push_back(Action::Turn { leg, lead });
            self.tell_size(cx);
        }
    }
}

//! What the planner asks of the agent. Nothing here changes anything.

use super::*;

impl PathAgent {
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

    /// For how many seconds our NAT keeps an idle mapping.
    pub(crate) const fn own_lifetime(&mut self, seconds: Option<u16>) {
        self.lifetimes[0] = seconds;
    }

    /// The same of the peer's.
    pub(crate) const fn their_lifetime(&mut self, seconds: Option<u16>) {
        self.lifetimes[1] = seconds;
    }

    /// After so much silence the path in use is probed, so that the NATs keep their mappings.
    pub(super) fn keepalive(&self) -> Duration {
        let shortest = self.lifetimes.iter().flatten().min().copied();
        let wanted = shortest.map(|seconds| Duration::from_secs(seconds.into()) * KEEPALIVE_QUARTERS / 4);
        wanted.map_or(KEEPALIVE, |wanted| wanted.clamp(KEEPALIVE_LEAST, KEEPALIVE))
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
            // A call that nobody answered may fail after a path was found without it.
            Stage::Idle => self.next_round.filter(|_| self.awake && self.current.is_none()),
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
                let keepalive = c.last_probe.max(c.last_pong) + self.keepalive();
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
}

//! How long packets may be on the path in use: what the search needs of the agent.

use rand::Rng;

use super::*;
use crate::engine::path::mtu::Step;

/// Data went out this recently: the path is not idle.
const FLOWING: Duration = Duration::from_secs(2);

impl PathAgent {
    /// The size of the longest packets that go directly; the relay takes them too.
    pub(super) fn data_size(&self) -> Option<u16> {
        Some(self.search.size().min(BASE))
    }

    /// The size in use, and whether larger ones are ruled out. None: no direct path.
    pub(crate) fn mtu(&self) -> Option<(u16, bool)> {
        self.current.map(|c| (self.search.size(), self.search.is_settled() || c.leg.socket.is_stream()))
    }

    /// When the search wants to be looked after.
    pub(super) fn size_due(&self, last_tx: Option<Now>, now: Now) -> Option<Now> {
        let current = self
            .current
            .filter(|c| self.awake && !c.leg.socket.is_stream() && last_tx.is_some_and(|tx| now.since(tx) < FLOWING))?;
        (current.doubt.is_none() || self.search.is_suspecting()).then(|| self.search.next(current.rtt))
    }

    /// Asks what is due, while data flows.
    pub(super) fn look_at_size<R: Rng>(&mut self, stamps: Stamps, cx: &mut Context<'_, R>) {
        if self.size_due(stamps.last_tx, cx.now).is_none_or(|at| at > cx.now) {
            if self.current.is_some_and(|c| c.doubt.is_some()) {
                self.search.hold(cx.now);
            }
            return;
        }
        let Some(current) = self.current else { return };
        let mut steps = Vec::new();
        self.search.tick(current.last_pong, current.rtt, cx.now, &mut steps);
        for step in steps {
            match step {
                Step::Ask(size) => self.probe(current.leg, Some(size), cx),
                Step::Ping => self.probe(current.leg, SMALL, cx),
                Step::Use => self.tell_size(cx),
                Step::Unable => return self.too_narrow(cx),
            }
        }
    }

    pub(super) fn size_passed<R: Rng>(&mut self, size: u16, cx: &mut Context<'_, R>) {
        if self.search.answered(size, cx.now) {
            self.tell_size(cx);
        }
    }

    /// Packets or probes go this way, or did.
    pub(crate) fn uses(&self, leg: Leg) -> bool {
        self.remotes.iter().any(|r| r.leg == leg)
    }

    /// The system cannot send an inner packet of `size` bytes this way.
    pub(crate) fn size_refused<R: Rng>(&mut self, leg: Leg, size: u16, cx: &mut Context<'_, R>) {
        if self.current.is_some_and(|c| c.leg == leg) {
            if self.search.refused(size, cx.now) {
                self.tell_size(cx);
            }
        } else if let Some(remote) = self.remote_mut(leg) {
            // No need to ask for it again: on to what it may take.
            let skip = NARROW.iter().find(|(_, narrow)| *narrow < size).map_or(CONFIRM_TRIES, |(tries, _)| *tries);
            remote.full_tries = remote.full_tries.max(skip);
        }
    }

    /// In a TCP connection packets of the usual size go and no larger ones: nothing is gained by them there.
    pub(super) fn tell_size<R: Rng>(&self, cx: &mut Context<'_, R>) {
        if let Some((size, settled)) = self.mtu() {
            cx.actions.push_back(Action::Mtu { size, settled });
        }
    }

    /// Small probes are answered, but nothing that data needs.
    fn too_narrow<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.leave(cx);
        self.full_size_lost = true;
    }
}

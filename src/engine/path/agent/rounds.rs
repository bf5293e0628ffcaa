//! How a round goes: call, answer, go, and the punch; and when the next one is made.

use rand::Rng;

use super::*;

/// Repetition of an unanswered call. Relay frames are rarely lost, but either side may be about to connect, and after a move
/// the first goes to a connection that is dead without knowing it.
const CALL_RETRY: [Duration; 4] =
    [Duration::from_millis(400), Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// Waits between failed rounds while the peer is in use; the last one repeats.
const BACKOFF_S: [u64; 7] = [1, 3, 8, 20, 45, 120, 300];
/// Waits between rounds that what is known of both NATs rules out.
const HOPELESS_S: u64 = 600;
/// In such a round only so many of the probes go out: what is known may be wrong, or the peer may be on the same LAN.
const BRIEF_STEPS: usize = 3;
/// Waits after a punch with many sockets or ports that found nothing; the last one repeats.
const HEAVY_BACKOFF_S: [u64; 4] = [5, 60, 600, 3600];

impl PathAgent {
    /// A probe of a heavy punch went to the peer.
    pub(crate) const fn count_shot(&mut self) {
        self.tally.sent = self.tally.sent.saturating_add(1);
    }

    /// The peer is in use: look for a direct path if there is none.
    pub(crate) fn wake(&mut self, now: Now) {
        self.awake = true;
        if self.current.is_none() && self.stage == Stage::Idle && self.next_round.is_none_or(|at| at <= now) {
            self.stage = Stage::ToCall;
        }
    }

    /// What joined these two networks before: rounds begin with the attempt that worked then.
    pub(crate) fn begin_with(&mut self, attempt: usize) {
        if self.failures == 0 {
            self.failures = attempt;
            self.fresh = if attempt >= FRESH_PORT_AFTER { Fresh::Wanted } else { Fresh::No };
        }
    }

    /// We learned addresses of ours that the peer was not told: what is under way cannot use them, so call (again).
    pub(crate) fn candidates_grew(&mut self) {
        if self.awake && self.current.is_none() {
            self.next_round = None;
            self.stage = Stage::ToCall;
        }
    }

    /// The peer was called without what it needs: call again.
    pub(crate) const fn call_again(&mut self) {
        self.stage = Stage::ToCall;
    }

    /// A TCP connection to the peer is there: it proves itself like any other way.
    pub(crate) fn stream_opened<R: Rng>(&mut self, leg: Leg, near: bool, cx: &mut Context<'_, R>) {
        if self.awake && self.learn(leg, near) {
            self.probe(leg, FULL, cx);
        }
    }

    /// It is gone.
    pub(crate) fn stream_closed<R: Rng>(&mut self, socket: SocketId, cx: &mut Context<'_, R>) {
        self.forget_sockets(&[socket]);
        if self.current.is_some_and(|c| c.leg.socket == socket) {
            let other = self.remotes.iter().filter(|r| r.proven.is_some()).max_by_key(|r| r.last_pong).map(|r| r.leg);
            self.leave(cx);
            if let Some(leg) = other {
                self.probe(leg, FULL, cx);
            }
        }
    }

    /// No way but a TCP connection: one by UDP is still looked for.
    fn lacks_udp(&self) -> bool {
        self.current.is_none_or(|c| c.leg.socket.is_stream())
    }

    /// The peer is not in use any more: no packet goes to it on our account.
    pub(crate) fn sleep<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.awake = false;
        self.stage = Stage::Idle;
        self.next_round = None;
        self.failures = 0;
        self.fresh = Fresh::No;
        self.remotes.clear();
        self.in_flight.clear();
        if self.current.take().is_some() {
            cx.actions.push_back(Action::Select(Path::Relay));
        }
    }

    /// The network around this node changed: what was proven is doubtful, what failed may work now.
    pub(crate) fn network_changed<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.failures = 0;
        self.fresh = Fresh::No;
        self.heavy_failures = 0;
        self.heavy_not_before = None;
        self.next_round = None;
        for remote in &mut self.remotes {
            remote.forget();
        }
        if let Some(current) = &mut self.current {
            current.doubt = Some(Doubt { since: cx.now, both: true, theirs: false });
            let leg = current.leg;
            cx.actions.push_back(Action::Select(leg.both()));
            self.probe(leg, FULL, cx);
            self.search.suspect(cx.now);
        }
        // A call of the peer is answered with what is known soon: the peer may be the one that ignores calls meanwhile.
        if self.awake && !matches!(self.stage, Stage::ToAnswer { .. }) {
            self.stage = Stage::ToCall;
        }
    }

    /// Our own candidates are fresh: a waiting call or answer goes out.
    pub(crate) fn candidates_ready<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        match self.stage {
            Stage::ToCall => {
                self.round = self.round.wrapping_add(1);
                self.tally = Seen::default();
                self.stage = Stage::Called { at: cx.now, tries: 0, next: cx.now + CALL_RETRY[0] };
                self.tell(MessageKind::Call, Some(cx.now.0), None, None, cx);
            }
            Stage::ToAnswer { t, since } => {
                let held = u64::try_from(cx.now.since(since).as_micros()).unwrap_or(u64::MAX);
                self.tally = Seen::default();
                self.stage = Stage::Answered { at: cx.now };
                self.tell(MessageKind::Answer, Some(held), t, None, cx);
                // Our NAT is opened now, so that the caller's first probe finds it open; what needs no opening, or lets
                // everybody in, is probed at once.
                self.probe_unhindered(cx);
                let closed = |r: &&Remote| !r.near && !r.open && r.proven.is_none();
                for to in self.remotes.iter().filter(closed).map(|r| r.leg).collect::<Vec<_>>() {
                    cx.actions.push_back(Action::Prime { txid: fresh_txid(cx.tx_prefix, cx.rng), to });
                }
            }
            Stage::Idle | Stage::Called { .. } | Stage::Answered { .. } | Stage::Punching { .. } => {}
        }
    }

    /// Whether what is known of both NATs rules a plain punch out.
    pub(crate) const fn set_outlook(&mut self, hopeless: bool) {
        self.brief = hopeless;
    }

    /// The peer called.
    pub(crate) fn heard_call<R: Rng>(&mut self, round: u32, t: Option<u64>, fresh: bool, cx: &mut Context<'_, R>) {
        if self.wins_ties && matches!(self.stage, Stage::Called { .. }) {
            return; // it will answer our call
        }
        self.awake = true;
        self.round = round;
        self.fresh = if fresh { Fresh::Wanted } else { Fresh::No };
        self.stage = Stage::ToAnswer { t, since: cx.now };
        // Who has a path that works does not call: until ours has answered, what we send goes both ways.
        if let Some(current) = self.current.filter(|c| c.doubt.is_none_or(|d| !d.both)) {
            self.doubt(true, true, cx.now);
            cx.actions.push_back(Action::Select(current.leg.both()));
            self.probe(current.leg, self.data_size(), cx);
        }
    }

    /// There is a relay again: a call that went nowhere is repeated at once.
    pub(crate) fn relay_came<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        if matches!(self.stage, Stage::Called { .. }) {
            self.stage = Stage::Called { at: cx.now, tries: 0, next: cx.now + CALL_RETRY[0] };
            self.tell(MessageKind::Call, Some(cx.now.0), None, None, cx);
        }
    }

    /// The peer was away and is back: what it did not hear is said again, now.
    pub(crate) fn peer_came<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        if !self.awake {
            return;
        }
        self.failures = 0;
        self.next_round = None;
        self.relay_came(cx);
        self.wake(cx.now);
    }

    /// The peer answered our call. `opened`: its NAT lets our first probe in, so there is nothing to wait for. `role`: our
    /// part in a heavy punch, told to the peer. Returns whether the answer was to our latest call.
    pub(crate) fn heard_answer<R: Rng>(
        &mut self,
        answer: &HeardAnswer,
        role: Option<Role>,
        cx: &mut Context<'_, R>,
    ) -> bool {
        let Stage::Called { at, .. } = self.stage else { return false };
        if answer.round != self.round {
            return false;
        }
        let asked = answer.echo.map_or(at, Now).max(at);
        let rtt = cx.now.since(asked).saturating_sub(Duration::from_micros(answer.held.unwrap_or(0)));
        self.relay_rtt = Some(rtt);
        self.tell(MessageKind::Go, u64::try_from(rtt.as_micros()).ok(), None, role, cx);
        // If that has failed before, perhaps its NAT was not opened after all: then both start at the same moment.
        let start = if answer.opened && self.failures == 0 { cx.now } else { cx.now + rtt / 2 };
        self.stage = Stage::Punching { start, step: 0 };
        self.probe_unhindered(cx);
        self.punch(cx);
        true
    }

    /// The caller says go, and how long the round trip through the relay took it. Returns whether that was awaited.
    pub(crate) fn heard_go<R: Rng>(&mut self, round: u32, rtt: Option<Duration>, cx: &mut Context<'_, R>) -> bool {
        let awaited = matches!(self.stage, Stage::Answered { .. }) && round == self.round;
        if awaited {
            self.relay_rtt = rtt.or(self.relay_rtt);
            self.stage = Stage::Punching { start: cx.now, step: 0 };
            self.tick(Stamps::default(), cx);
        }
        awaited
    }

    /// A heavy punch towards the peer begins: the next round waits for its end.
    pub(crate) const fn heavy_began(&mut self) {
        self.heavy = true;
        self.next_round = None;
    }

    /// It is over. Without a path the next one comes later than the last.
    pub(crate) fn heavy_ended(&mut self, now: Now) {
        self.heavy = false;
        if self.current.is_none() {
            self.heavy_failed(now);
        }
    }

    pub(super) fn heavy_failed(&mut self, now: Now) {
        let wait = HEAVY_BACKOFF_S.get(self.heavy_failures).or(HEAVY_BACKOFF_S.last()).copied().unwrap_or(HOPELESS_S);
        self.heavy_failures += 1;
        self.failed = Some(self.tally);
        self.heavy_not_before = Some(now + Duration::from_secs(wait));
        let shift = if self.wins_ties { 0 } else { 1500 };
        if matches!(self.stage, Stage::Idle | Stage::Punching { .. }) {
            self.stage = Stage::Idle;
            self.next_round = Some(now + Duration::from_millis(wait * 1000 + shift));
        }
    }

    /// A deadline passed, or the stamps are worth a look.
    pub(crate) fn tick<R: Rng>(&mut self, stamps: Stamps, cx: &mut Context<'_, R>) {
        let now = cx.now;
        while self.in_flight.front().is_some_and(|p| now.since(p.sent) > PROBE_LIFETIME) {
            self.in_flight.pop_front();
        }
        self.watch(stamps, cx);
        self.look_at_size(stamps, cx);
        let unconfirmed: Vec<Leg> = self
            .remotes
            .iter()
            .filter(|r| r.wants_confirmation(now) && r.next_confirmation() <= now)
            .map(|r| r.leg)
            .collect();
        for leg in unconfirmed {
            self.confirm(leg, cx);
        }
        self.review(cx);
        let due = |r: &&mut Remote| r.check.is_some_and(|at| at <= now);
        let checks: Vec<Leg> = self.remotes.iter_mut().filter(due).map(|r| r.leg).collect();
        for leg in checks {
            self.probe(leg, SMALL, cx);
        }
        match self.stage {
            Stage::Idle => {
                if self.awake && self.lacks_udp() && self.next_round.is_some_and(|at| at <= now) {
                    self.next_round = None;
                    self.stage = Stage::ToCall;
                }
            }
            Stage::Called { at, tries, next } if next <= now => match CALL_RETRY.get(tries + 1) {
                Some(wait) => {
                    self.stage = Stage::Called { at, tries: tries + 1, next: now + *wait };
                    self.tell(MessageKind::Call, Some(now.0), None, None, cx);
                }
                None => self.round_failed(now),
            },
            Stage::Answered { at } if at + GO_TIMEOUT <= now => {
                self.stage = Stage::Punching { start: now, step: 0 };
                self.punch(cx);
            }
            Stage::Punching { .. } => self.punch(cx),
            Stage::ToCall | Stage::Called { .. } | Stage::ToAnswer { .. } | Stage::Answered { .. } => {}
        }
    }

    /// The profiles of both NATs changed: a sleeping hopeless pair may try again.
    pub(crate) fn profile_changed(&mut self, now: Now) {
        self.heavy_failures = 0;
        self.heavy_not_before = None;
        if self.awake && self.lacks_udp() {
            self.failures = 0;
            self.next_round = Some(now);
        }
    }

    /// What is known of both NATs rules a plain punch out: wait long before trying again.
    pub(crate) fn is_hopeless(&mut self, now: Now) {
        if self.stage == Stage::Idle && self.current.is_none() && self.failures > 0 {
            self.next_round = self.next_round.map(|at| at.max(now + Duration::from_secs(HOPELESS_S)));
        }
    }

    pub(super) fn punch<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let Stage::Punching { start, mut step } = self.stage else { return };
        let mut due = false;
        if step == 0 && start <= cx.now {
            cx.actions.push_back(Action::Dial);
        }
        let steps = if self.brief { BRIEF_STEPS } else { PUNCH_MS.len() };
        while PUNCH_MS.get(step).is_some_and(|ms| start + Duration::from_millis(*ms) <= cx.now) {
            step += 1;
            due |= step <= steps;
        }
        self.stage = Stage::Punching { start, step };
        if due {
            // The first are of data size: answered, they prove the path in one round trip. The second are small, so that a
            // path that drops large packets shows itself.
            let full_size = !step.is_multiple_of(2);
            // Once a path is proven only what answered is measured further: no probes into the void.
            let settled = self.current.is_some_and(|c| c.doubt.is_none());
            let mut order: Vec<(bool, bool, Leg)> = self
                .remotes
                .iter()
                .filter(|r| r.proven.is_none() && (!settled || r.last_pong.is_some()))
                .map(|r| (!r.near, !r.heard, r.leg))
                .collect();
            order.sort();
            for (.., leg) in order {
                self.probe(leg, if full_size { FULL } else { SMALL }, cx);
            }
        }
        if start + PUNCH_ENDS <= cx.now {
            if self.current.is_some() {
                self.stage = Stage::Idle;
                self.failures = 0;
                self.next_round = None;
            } else {
                self.round_failed(cx.now);
            }
        }
    }

    /// Probes what needs no opening first: addresses on our own networks, and those that let everybody in.
    pub(super) fn probe_unhindered<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        let now = cx.now;
        let fresh = |r: &&Remote| {
            (r.near || r.open) && r.proven.is_none() && r.last_sent.is_none_or(|at| now.since(at) >= TRIGGERED_GAP)
        };
        for leg in self.remotes.iter().filter(fresh).map(|r| r.leg).collect::<Vec<_>>() {
            self.probe(leg, FULL, cx);
        }
    }

    pub(super) fn round_failed(&mut self, now: Now) {
        if self.heavy {
            self.stage = Stage::Idle;
            return;
        }
        // A call that nobody answered shows nothing of the network between.
        self.called_in_vain = matches!(self.stage, Stage::Called { .. });
        if !self.called_in_vain {
            self.failed = Some(self.tally);
        }
        self.stage = Stage::Idle;
        self.full_size_lost = self.remotes.iter().any(|r| r.last_pong.is_some() && r.proven.is_none());
        let wait = BACKOFF_S.get(self.failures).or(BACKOFF_S.last()).copied().unwrap_or(HOPELESS_S);
        self.failures += 1;
        self.fresh = if self.failures >= FRESH_PORT_AFTER && !self.brief { Fresh::Wanted } else { Fresh::No };
        // Two sides that failed together must not call together: the tie winner goes first.
        let shift = if self.wins_ties { 0 } else { 1500 };
        self.next_round = Some(now + Duration::from_millis(wait * 1000 + shift));
        let current = self.current.map(|c| c.leg);
        let stays = |r: &Remote| Some(r.leg) == current || r.last_pong.is_some() || r.leg.socket.is_stream();
        self.remotes.retain(stays);
        for remote in &mut self.remotes {
            remote.full_tries = 0;
        }
    }

    pub(super) fn tell<R: Rng>(
        &self,
        kind: MessageKind,
        t: Option<u64>,
        echo: Option<u64>,
        role: Option<Role>,
        cx: &mut Context<'_, R>,
    ) {
        cx.actions.push_back(Action::Tell { kind, round: self.round, t, echo, role });
    }
}

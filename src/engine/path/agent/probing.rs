//! Probes: sent, answered, and those of the peer.

use rand::Rng;

use super::*;

/// Probes that may be under way at once; older ones are forgotten first.
const MAX_IN_FLIGHT: usize = 96;
const ANSWERS_PER_SECOND: u32 = 60;

impl PathAgent {
    /// Addresses worth trying without asking the peer first, such as the one that worked last time.
    pub(crate) fn try_remembered<R: Rng>(&mut self, addr: SocketAddr, near: bool, cx: &mut Context<'_, R>) {
        if self.learn(Leg::main(addr), near) {
            self.probe(Leg::main(addr), SMALL, cx);
        }
    }

    /// Somebody says that everybody can reach the peer here.
    pub(crate) fn heard_open<R: Rng>(&mut self, addrs: &[SocketAddr], cx: &mut Context<'_, R>) {
        for leg in addrs.iter().map(|addr| Leg::main(*addr)) {
            if self.awake && self.current.is_none() && self.learn(leg, false) {
                self.probe(leg, FULL, cx);
            }
        }
    }

    /// Whether one more probe of this peer may be answered now.
    pub(crate) fn may_answer(&mut self, now: Now) -> bool {
        let earned = now.since(self.answers_refilled).as_millis() * u128::from(ANSWERS_PER_SECOND) / 1000;
        if earned > 0 {
            self.answers_left =
                u32::try_from(earned).unwrap_or(u32::MAX).saturating_add(self.answers_left).min(ANSWER_BURST);
            self.answers_refilled = now;
        }
        let may = self.answers_left > 0;
        self.answers_left = self.answers_left.saturating_sub(1);
        may
    }

    /// An authenticated probe of the peer came from `from` (and was answered). A new address is peer-reflexive (RFC 8445
    /// section 7.3.1.3); any is probed back (a triggered check, section 7.3.1.4).
    pub(crate) fn heard_probe<R: Rng>(&mut self, from: Leg, near: bool, full_size: bool, cx: &mut Context<'_, R>) {
        if !self.awake {
            return;
        }
        self.tally.heard = self.tally.heard.saturating_add(1);
        self.learn(from, near);
        let Some(remote) = self.remote_mut(from) else { return };
        remote.heard = true;
        let pinged_lately = remote.last_sent.filter(|at| cx.now.since(*at) < TRIGGERED_GAP);
        let known_good = remote.proven.is_some_and(|at| cx.now.since(at) < KEEPALIVE);
        match pinged_lately {
            _ if known_good => {}
            // That one may have come too early for the peer to know us.
            Some(at) if remote.last_pong.is_none() => remote.check = Some(at + TRIGGERED_GAP),
            Some(_) => {}
            None => self.probe(from, if full_size { FULL } else { SMALL }, cx),
        }
    }

    /// A probe of a heavy punch was answered from where it went.
    pub(crate) fn heard_answer_to_heavy<R: Rng>(&mut self, from: Leg, rtt: Duration, cx: &mut Context<'_, R>) {
        self.learn(from, false);
        let Some(remote) = self.remote_mut(from) else { return };
        remote.last_pong = Some(cx.now);
        remote.rtt = Some(remote.rtt.map_or(rtt, |old| old.min(rtt)));
        if remote.proven.is_none() {
            self.confirm(from, cx);
        }
    }

    /// Somebody waits for an answer on the path in use: if none comes, it is in doubt.
    pub(crate) fn question<R: Rng>(&mut self, cx: &mut Context<'_, R>) {
        self.ask_current(false, cx);
    }

    /// Authenticated data came from an address that is not the current one: the peer moved, perhaps.
    pub(crate) fn heard_data_from<R: Rng>(&mut self, from: Leg, near: bool, cx: &mut Context<'_, R>) {
        self.learn(from, near);
        if let Some(remote) = self.remote_mut(from) {
            remote.full_tries = 0;
        }
        // Of several connections the tie winner's choice stands, and the other side follows it.
        let settled = self.current.is_some_and(|c| c.leg.socket.is_stream() && c.doubt.is_none());
        if settled && from.socket.is_stream() && self.wins_ties {
            return;
        }
        // Whichever of the two answers first is used: if both do, both sides choose alike.
        if self.current.is_some_and(|c| c.leg != from) {
            self.ask_current(true, cx);
        }
        self.probe(from, FULL, cx);
    }

    /// Puts the path in use in doubt. `theirs`: the peer does as if it had not this path any more.
    pub(super) fn ask_current<R: Rng>(&mut self, theirs: bool, cx: &mut Context<'_, R>) {
        if let Some(current) = self.current.filter(|c| c.doubt.is_none()) {
            self.doubt(false, theirs, cx.now);
            self.probe(current.leg, if theirs { self.data_size() } else { SMALL }, cx);
        }
    }

    /// One of our probes was answered by `len` bytes, from the address it went to. Returns whether the probe was ours.
    pub(crate) fn heard_answer_to_probe<R: Rng>(
        &mut self,
        txid: &TransactionId,
        from: Leg,
        len: usize,
        cx: &mut Context<'_, R>,
    ) -> bool {
        let Some(position) = self.in_flight.iter().position(|p| p.txid == *txid && p.to == from) else { return false };
        let Some(probe) = self.in_flight.remove(position) else { return false };
        self.tally.answered = self.tally.answered.saturating_add(1);
        let rtt = cx.now.since(probe.sent);
        // The answer is as long, up to the size that every path is asked for.
        let proves = probe.size.filter(|size| len >= usize::from((*size).min(BASE)) + DATA_OVERHEAD);
        if let Some(current) = self.current.as_mut().filter(|c| c.leg == from) {
            current.last_pong = cx.now;
            current.rtt = (current.rtt * 7 + rtt) / 8;
            // What does not arrive may be only what is long.
            let small_is_enough = !self.search.is_suspecting() && current.doubt.is_some_and(|d| !d.theirs);
            let settled = proves.is_some() || small_is_enough;
            if settled && current.doubt.take().is_some_and(|d| d.both) {
                cx.actions.push_back(Action::Select(from.direct()));
            }
            if let Some(size) = proves {
                self.size_passed(size, cx);
            }
        }
        let Some(remote) = self.remote_mut(from) else { return true };
        remote.last_pong = Some(cx.now);
        remote.rtt = Some(remote.rtt.map_or(rtt, |old| old.min(rtt)));
        if let Some(size) = proves {
            remote.proven = Some(cx.now);
            remote.size = size.min(BASE);
            remote.full_tries = 0;
            self.consider(from, rtt, cx);
        } else if remote.proven.is_none() {
            self.confirm(from, cx);
        }
        true
    }

    pub(super) fn confirm<R: Rng>(&mut self, leg: Leg, cx: &mut Context<'_, R>) {
        if let Some(remote) = self.remote_mut(leg) {
            if remote.full_tries >= CONFIRM_TRIES || remote.last_full.is_some_and(|at| cx.now.since(at) < CONFIRM_GAP) {
                return;
            }
            let narrow = NARROW.iter().rev().find(|(tries, _)| remote.full_tries >= *tries);
            self.probe(leg, narrow.map_or(FULL, |(_, size)| Some(*size)), cx);
        }
    }

    pub(super) fn probe<R: Rng>(&mut self, to: Leg, size: Option<u16>, cx: &mut Context<'_, R>) {
        let txid = fresh_txid(cx.tx_prefix, cx.rng);
        self.tally.sent = self.tally.sent.saturating_add(1);
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            self.in_flight.pop_front();
        }
        self.in_flight.push_back(InFlight { txid, to, sent: cx.now, size });
        if let Some(remote) = self.remote_mut(to) {
            remote.last_sent = Some(cx.now);
            remote.check = None;
            if size.is_some() {
                remote.last_full = Some(cx.now);
                remote.full_tries = remote.full_tries.saturating_add(1);
            }
        }
        if let Some(current) = self.current.as_mut().filter(|c| c.leg == to) {
            current.last_probe = cx.now;
        }
        cx.actions.push_back(Action::Probe { txid, to, size });
    }
}

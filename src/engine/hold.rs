//! Packets that wait a moment where they turn into a faster way.
//!
//! What goes the faster way from one moment on overtakes what is still under way on the slower. WireGuard's receiver forgives
//! 1,024 packets of that, which is 24 ms of 500 Mbit/s. So the first that would go the new way waits until the last that went
//! the old one has had the time to arrive, and everything behind it waits in line. The receiver sees no pause: while they wait
//! here, what is still under way arrives there. Decision 16.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Now;

/// Bytes that may wait for one peer.
const PER_PEER: usize = 8 << 20;
/// Bytes that may wait in all.
const TOTAL: usize = 16 << 20;
/// So much less, and the line begins to move whatever the time: 500 Mbit/s for 110 ms are there.
const BRIM: usize = 1 << 20;
/// Bytes released in one turn, so that neither the shell's memory nor a socket's is too small for them.
const TURN: usize = 192 << 10;
/// How often some of a line leave.
const PACE: Duration = Duration::from_millis(1);

/// The line of one peer. When its time has come it leaves within as long as it waited, not at once: that would be a burst that
/// no router on the way has room for.
#[derive(Debug)]
pub(crate) struct Hold {
    until: Now,
    /// How long it takes to leave, and how many bytes began to.
    span: Duration,
    full: Option<usize>,
    next: Now,
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Hold {
    /// Nothing leaves until then, and all have left `span` later.
    pub(crate) const fn new(until: Now, span: Duration) -> Self {
        Self { until, span, full: None, next: until, packets: VecDeque::new(), bytes: 0 }
    }

    /// The path changed once more: what waits goes then.
    pub(crate) const fn go_at(&mut self, until: Now, span: Duration) {
        (self.until, self.span, self.full, self.next) = (until, span, None, until);
    }

    pub(crate) const fn until(&self) -> Now {
        self.until
    }

    pub(crate) const fn span(&self) -> Duration {
        self.span
    }

    /// When some may leave.
    pub(crate) const fn next(&self) -> Now {
        self.next
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// It is time, and nobody waits any more.
    pub(crate) fn is_over(&self, now: Now) -> bool {
        self.until <= now && self.packets.is_empty()
    }

    /// To the end of the line. Returns what is dropped for it: the oldest, if there is no room.
    #[must_use]
    pub(crate) fn push(&mut self, packet: &[u8], in_all: &mut usize) -> usize {
        let mut dropped = 0;
        while self.bytes + packet.len() > PER_PEER || *in_all + packet.len() > TOTAL {
            let Some(oldest) = self.packets.pop_front() else { return dropped + 1 };
            self.bytes -= oldest.len();
            *in_all -= oldest.len();
            dropped += 1;
        }
        self.bytes += packet.len();
        *in_all += packet.len();
        self.packets.push_back(packet.to_vec());
        // What overtakes from here on is less than what would be dropped.
        if self.bytes > PER_PEER - BRIM || *in_all > TOTAL - BRIM {
            self.go_at(Now::ZERO, Duration::ZERO);
        }
        dropped
    }

    /// Those that leave now.
    pub(crate) fn turn(&mut self, now: Now, in_all: &mut usize) -> Vec<Vec<u8>> {
        let full = *self.full.get_or_insert(self.bytes);
        let left = self.span.saturating_sub(now.since(self.until));
        let stay = full as u128 * left.as_micros() / self.span.as_micros().max(1);
        let stay = usize::try_from(stay).unwrap_or(full);
        let (mut head, mut gone) = (Vec::new(), 0);
        while self.bytes > stay
            && gone < TURN
            && let Some(packet) = self.packets.pop_front()
        {
            gone += packet.len();
            self.bytes -= packet.len();
            head.push(packet);
        }
        *in_all -= gone;
        self.next = if self.bytes > stay { now } else { now + PACE };
        head
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_leaves_in_order_and_by_turns() {
        let (mut hold, mut all) = (Hold::new(Now(5), Duration::ZERO), 0);
        for n in 0..400u16 {
            assert_eq!(hold.push(&[&n.to_be_bytes()[..], &[0; 998]].concat(), &mut all), 0);
        }
        assert_eq!((all, hold.until()), (400_000, Now(5)));
        let mut seen = Vec::new();
        while !hold.is_over(Now(5)) {
            let turn = hold.turn(Now(5), &mut all);
            assert!(turn.iter().map(Vec::len).sum::<usize>() < TURN + 1_000);
            seen.extend(turn.iter().map(|p| u16::from_be_bytes([p[0], p[1]])));
        }
        assert_eq!((seen, all), ((0..400).collect(), 0));
        assert!(!hold.is_over(Now(4)), "whoever comes now waits still");
    }

    #[test]
    fn a_line_leaves_within_as_long_as_it_waited() {
        let wait = Duration::from_millis(20);
        let (mut hold, mut all) = (Hold::new(Now::ZERO + wait, wait), 0);
        let second = |hold: &mut Hold, all: &mut usize| (0..10).for_each(|_| assert_eq!(hold.push(&[0; 100], all), 0));
        (0..20).for_each(|_| second(&mut hold, &mut all));
        let mut now = hold.next();
        let mut left = Vec::new();
        while !hold.is_over(now) {
            second(&mut hold, &mut all);
            left.push(hold.turn(now, &mut all).len());
            now = hold.next();
        }
        assert_eq!(now, Now::ZERO + wait * 2 + PACE);
        assert!(left[1..].iter().all(|n| (19..=21).contains(n)), "ten came every millisecond: {left:?}");
    }

    #[test]
    fn a_line_that_is_almost_full_leaves_and_one_that_is_full_loses_its_head() {
        let (mut hold, mut all) = (Hold::new(Now(5), Duration::ZERO), 0);
        let mut dropped = 0;
        for n in 0..140 {
            assert_eq!(hold.until() == Now::ZERO, n * 65_000 > PER_PEER - BRIM);
            dropped += hold.push(&[0; 65_000], &mut all);
        }
        assert!(hold.bytes() <= PER_PEER && all == hold.bytes());
        assert_eq!(dropped, 140 - PER_PEER / 65_000);
        let mut crowd = TOTAL - 10;
        assert_eq!(
            Hold::new(Now(5), Duration::ZERO).push(&[0; 11], &mut crowd),
            1,
            "others have all the room there is"
        );
        assert_eq!(crowd, TOTAL - 10);
    }
}

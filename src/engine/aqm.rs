//! Keeps the queue in front of a node that is the bottleneck short, after CoDel (RFC 8289).
//!
//! Where opening packets is what limits a flow, what is under way of it waits in the UDP socket's buffer, megabytes of it,
//! and everything else waits behind. A buffer that short bursts do not overflow has to be large; what must not be is a
//! queue that stays. So when packets for a whole interval waited longer than the target, one sender is asked to slow down:
//! by a mark if its flow knows ECN (RFC 3168), else by the loss of one packet, which it sends again.
//!
//! CoDel takes the shortest wait of the interval, this the running mean: here the queue grows while the scheduler lets
//! others run, and is empty for a moment after, so that the shortest wait says nothing.

use std::time::Duration;

use crate::time::Now;
use crate::wire::ip;

/// A mean wait longer than this is too long.
const TARGET: Duration = Duration::from_millis(1);
/// For how long it must have been too long. As long as the round trip of most flows, so that they had time to react to the last
/// sign.
const INTERVAL: Duration = Duration::from_millis(100);
/// Weight of the past in the mean, in observations.
const MEMORY: u32 = 64;
/// Smaller packets are no bulk: questions, answers, acknowledgements.
const BULK: usize = 600;

/// The state of one queue.
#[derive(Debug, Default)]
pub struct Codel {
    mean: Duration,
    /// When it will have been too long for an interval.
    patient_until: Option<Now>,
    /// While signs are given: when the next one is due.
    next: Option<Now>,
    /// When the last sign of the last phase was given.
    last: Now,
    /// Signs given in this phase.
    count: u32,
}

impl Codel {
    /// Something taken off the queue had waited for `waited`. True: a sign is due.
    pub fn observe(&mut self, waited: Duration, now: Now) -> bool {
        self.mean = (self.mean * (MEMORY - 1) + waited) / MEMORY;
        if self.mean < TARGET {
            self.patient_until = None;
            self.next = None;
            return false;
        }
        let until = *self.patient_until.get_or_insert(now + INTERVAL);
        if now < until {
            return false;
        }
        match self.next {
            Some(next) if now < next => return false,
            Some(_) => self.count = self.count.saturating_add(1),
            // Soon after the last phase the rate of signs that it took is nearly right.
            None if self.count > 2 && now.since(self.last) < 8 * INTERVAL => self.count -= 2,
            None => self.count = 1,
        }
        self.last = now;
        self.next = Some(now + INTERVAL.div_f64(f64::from(self.count).sqrt()));
        true
    }
}

/// What to do with a packet that a sign is to be given with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It was marked (RFC 3168): deliver it.
    Marked,
    /// Drop it.
    Drop,
    /// Its sender would not understand, or it is no bulk: deliver it, and take another.
    NotThis,
}

/// Gives the sign with this packet, if it is of a kind whose sender reacts: bulk TCP.
pub fn sign(packet: &mut [u8]) -> Sign {
    const TCP: u8 = 6;
    let is_tcp = match packet.first().map(|b| b >> 4) {
        Some(4) => packet.get(9) == Some(&TCP),
        Some(6) => packet.get(6) == Some(&TCP),
        _ => false,
    };
    if !is_tcp || packet.len() < BULK {
        return Sign::NotThis;
    }
    match ip::apply_ecn(packet, 3) {
        Ok(()) => Sign::Marked,
        Err(ip::NotEcnCapable) => Sign::Drop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Now {
        Now::from_millis(ms)
    }

    /// Times of signs when everything waits for `waited` from the start, looked at each millisecond.
    fn signs(codel: &mut Codel, waited: Duration, from: u64, to: u64) -> Vec<u64> {
        (from..to).filter(|t| codel.observe(waited, ms(*t))).collect()
    }

    const LONG: Duration = Duration::from_millis(10);

    /// Enough observations for the mean to follow.
    fn settle(codel: &mut Codel, waited: Duration, at: u64) {
        for _ in 0..1000 {
            codel.observe(waited, ms(at));
        }
    }

    #[test]
    fn bursts_are_left_alone_and_a_queue_that_stays_is_not() {
        let mut codel = Codel::default();
        for burst in 0..10 {
            assert_eq!(signs(&mut codel, LONG, burst * 1000, burst * 1000 + 90), [0; 0]);
            settle(&mut codel, Duration::ZERO, burst * 1000 + 90);
        }
        let mut codel = Codel::default();
        settle(&mut codel, LONG, 0);
        assert_eq!(signs(&mut codel, LONG, 0, 100), [0; 0]);
        // More and more often while nothing changes, though it may be empty for moments.
        codel.observe(Duration::ZERO, ms(99));
        assert_eq!(signs(&mut codel, LONG, 100, 500), [100, 200, 271, 329, 379, 424, 465]);
        // Silent as soon as it is short, and patient again.
        settle(&mut codel, TARGET / 2, 500);
        settle(&mut codel, LONG, 501);
        assert_eq!(signs(&mut codel, LONG, 501, 601), [0; 0]);
        // Soon after, signs go on about as often as before.
        assert_eq!(signs(&mut codel, LONG, 601, 700), [601, 646, 687]);
        // Much later they begin anew.
        settle(&mut codel, Duration::ZERO, 9_000);
        settle(&mut codel, LONG, 10_000);
        assert_eq!(signs(&mut codel, LONG, 10_000, 10_300), [10_100, 10_200, 10_271]);
    }

    #[test]
    fn only_bulk_tcp_is_asked_to_slow_down() {
        let packet = |v6: bool, protocol: u8, ecn: u8, len: usize| {
            let mut packet = vec![0; len];
            if v6 {
                (packet[0], packet[1], packet[6]) = (0x60, ecn << 4, protocol);
            } else {
                (packet[0], packet[1], packet[9]) = (0x45, ecn, protocol);
            }
            packet
        };
        for v6 in [false, true] {
            assert_eq!(sign(&mut packet(v6, 6, 0, 1280)), Sign::Drop);
            for ecn in [1, 2, 3] {
                let mut marked = packet(v6, 6, ecn, 1280);
                assert_eq!(sign(&mut marked), Sign::Marked);
                assert_eq!(ip::ecn(&marked), 3);
            }
            for (protocol, len) in [(6, BULK - 1), (6, 60), (17, 1280), (1, 1280)] {
                assert_eq!(sign(&mut packet(v6, protocol, 2, len)), Sign::NotThis);
            }
        }
        assert_eq!(sign(&mut []), Sign::NotThis);
        assert_eq!(sign(&mut [0x60; 3]), Sign::NotThis);
    }
}

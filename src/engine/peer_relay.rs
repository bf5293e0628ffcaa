//! What a node that volunteered as a relay carries for others: so many bytes a second in all, shared equally between the pairs
//! that send. Nothing waits here; what is too much is dropped, so that its senders slow down.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::io::PeerId;
use crate::time::Now;

/// Shares are given out anew this often.
const WINDOW: Duration = Duration::from_millis(100);
/// Windows in a second.
const WINDOWS: u64 = 10;
/// A share is never less than a few packets of full size.
const LEAST: u64 = 4_096;
/// A packet costs at least as much as this many bytes: small ones are work, too.
const PACKET: u64 = 200;
/// Pairs that are told apart; further ones wait for the next window.
const PAIRS: usize = 4_096;

/// The rate of one volunteer.
#[derive(Debug)]
pub(crate) struct Shares {
    /// Bytes that may go in one window.
    window: u64,
    began: Now,
    left: u64,
    /// What each pair has had in this window; a pair counts in one direction.
    had: BTreeMap<(PeerId, PeerId), u64>,
    /// Pairs that sent in the last window.
    pairs: u64,
}

impl Shares {
    /// So many bytes a second.
    pub(crate) fn new(per_second: u64) -> Self {
        let window = (per_second / WINDOWS).max(LEAST);
        Self { window, began: Now::ZERO, left: window, had: BTreeMap::new(), pairs: 1 }
    }

    /// Whether a packet of a pair goes.
    pub(crate) fn take(&mut self, pair: (PeerId, PeerId), bytes: usize, now: Now) -> bool {
        if now.since(self.began) >= WINDOW {
            let idle = now.since(self.began) >= WINDOW * 2;
            self.pairs = if idle { 1 } else { (self.had.len() as u64).max(1) };
            self.had.clear();
            (self.began, self.left) = (now, self.window);
        }
        if self.had.len() >= PAIRS && !self.had.contains_key(&pair) {
            return false;
        }
        let cost = (bytes as u64).max(PACKET);
        // More pairs than in the last window may be there already.
        let share = (self.window / self.pairs.max(self.had.len() as u64).max(1)).max(LEAST);
        let had = self.had.entry(pair).or_default();
        let may = cost <= self.left && had.saturating_add(cost) <= share;
        if may {
            *had += cost;
            self.left -= cost;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_shared_equally() {
        let mut shares = Shares::new(1_000_000);
        let (greedy, modest) = ((PeerId(1), PeerId(2)), (PeerId(3), PeerId(4)));
        let mut went = [0; 2];
        for ms in 1_000..3_000 {
            for (i, (pair, packets)) in [(greedy, 10), (modest, 1)].into_iter().enumerate() {
                went[i] += (0..packets).filter(|_| shares.take(pair, 1_000, Now::from_millis(ms))).count();
            }
        }
        // Two seconds.
        assert!(went[0] + went[1] <= 2_100 && went[0] + went[1] >= 1_500, "{went:?}");
        assert!(went[1] >= 900, "the modest one gets its half: {went:?}");
    }
}

//! What a network does to a datagram that crosses it: delay, jitter, loss, duplication, reordering, MTU, up or down.

use crate::dice::Dice;

/// One network's manners. The defaults are a perfect wire without delay.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    /// Delay of every crossing, in microseconds; the ends' distances come on top.
    pub(crate) delay_us: u64,
    /// Up to this much more, drawn for each datagram. More than the gap between two datagrams reorders them.
    pub(crate) jitter_us: u64,
    /// Percent of datagrams lost.
    pub(crate) loss: u8,
    /// Percent delivered twice.
    pub(crate) duplicate: u8,
    /// Percent held back by [`HELD_BACK_US`], so that later ones overtake them.
    pub(crate) reorder: u8,
    /// Longest IP packet in bytes; a longer one vanishes, as behind a filter that eats ICMP.
    pub(crate) mtu: usize,
    /// Routers within it that every datagram crosses.
    pub(crate) hops: u8,
    /// A network that is down carries nothing.
    pub(crate) up: bool,
}

/// How long a datagram chosen for reordering waits.
pub(crate) const HELD_BACK_US: u64 = 30_000;

impl Default for Link {
    fn default() -> Self {
        Self { delay_us: 0, jitter_us: 0, loss: 0, duplicate: 0, reorder: 0, mtu: 1_500, hops: 0, up: true }
    }
}

impl Link {
    /// When the copies of one datagram arrive, in microseconds from now: none, one or two.
    pub(crate) fn carry(&self, ip_len: usize, dice: &mut Dice) -> [Option<u64>; 2] {
        if !self.up || ip_len > self.mtu || dice.percent(self.loss) {
            return [None, None];
        }
        let first = self.one_delay(dice);
        let second = dice.percent(self.duplicate).then(|| self.one_delay(dice));
        [Some(first), second]
    }

    fn one_delay(&self, dice: &mut Dice) -> u64 {
        let jitter = if self.jitter_us == 0 { 0 } else { dice.below(self.jitter_us + 1) };
        let held = if dice.percent(self.reorder) { HELD_BACK_US } else { 0 };
        self.delay_us + jitter + held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perfect_wire_delivers_once_after_its_delay() {
        let link = Link { delay_us: 7, ..Link::default() };
        assert_eq!(link.carry(1_500, &mut Dice::new(1)), [Some(7), None]);
    }

    #[test]
    fn too_long_or_down_vanishes() {
        assert_eq!(Link::default().carry(1_501, &mut Dice::new(1)), [None, None]);
        assert_eq!(Link { up: false, ..Link::default() }.carry(1, &mut Dice::new(1)), [None, None]);
    }

    #[test]
    fn manners_have_their_stated_frequency() {
        let link = Link { loss: 20, duplicate: 10, reorder: 5, jitter_us: 1_000, ..Link::default() };
        let mut dice = Dice::new(5);
        let all: Vec<_> = (0..10_000).map(|_| link.carry(100, &mut dice)).collect();
        let lost = all.iter().filter(|d| d[0].is_none()).count();
        let twice = all.iter().filter(|d| d[1].is_some()).count();
        let held = all.iter().filter(|d| d[0].is_some_and(|t| t >= HELD_BACK_US)).count();
        assert!((1_900..2_100).contains(&lost), "{lost}");
        assert!((700..900).contains(&twice), "{twice}");
        assert!((320..480).contains(&held), "{held}");
        assert!(all.iter().flatten().flatten().all(|t| *t <= HELD_BACK_US + 1_000));
    }
}

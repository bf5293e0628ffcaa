//! The only source of chance in the simulator: SplitMix64, small enough to stay the same for ever, so that a replay
//! line written today replays the same run after every dependency has moved on.

/// A stream of numbers that follows from its seed and nothing else.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// An independent stream named `label`. Drawing from it does not move this one, so that adding a draw in one part
    /// of the world does not shift every other part.
    pub(crate) fn fork(&self, label: &str) -> Self {
        let mut state = self.0 ^ 0x9e37_79b9_7f4a_7c15;
        for byte in label.bytes() {
            state = mix(state ^ u64::from(byte)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
        Self(state)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// 0 to `n - 1`; 0 if `n` is 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let draw = u128::from(self.next()) * u128::from(n);
        u64::try_from(draw >> 64).unwrap_or(0)
    }

    /// True with this probability.
    pub(crate) fn percent(&mut self, percent: u8) -> bool {
        percent > 0 && self.below(100) < u64::from(percent)
    }

    /// Random bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// The finalizer of SplitMix64.
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_for_ever() {
        // The first outputs of SplitMix64 for seed 0, as published with the algorithm.
        let mut dice = Dice::new(0);
        assert_eq!(dice.next(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(dice.next(), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn chance_has_the_stated_frequency() {
        let mut dice = Dice::new(3);
        let hits = (0..10_000).filter(|_| dice.percent(20)).count();
        assert!((1_900..2_100).contains(&hits), "{hits}");
        assert!(!Dice::new(1).percent(0));
        assert!(Dice::new(1).percent(100));
    }

    #[test]
    fn forks_are_independent_of_each_other_and_of_draws() {
        let dice = Dice::new(9);
        let first = dice.fork("a").next();
        let mut moved = dice.clone();
        assert_eq!(dice.fork("a").next(), first);
        assert_ne!(dice.fork("b").next(), first);
        moved.next();
        assert_ne!(moved.next(), first);
    }
}

//! Learning how a NAT chooses ports, from what STUN servers saw of sockets opened one after the other.
//!
//! The samples are two bursts: sockets that each asked the same server once, in the order of asking. Within a burst a
//! sequential NAT shows its step, between the bursts how many mappings others made meanwhile. A NAT that hands out
//! blocks shows a narrow range. (`research/nat.md` section 5.1.)

use std::time::Duration;

use crate::wire::nat::PortModel;

/// Fewer answers than this say nothing.
pub const MIN_SAMPLES: usize = 5;
/// The largest step of a sequential NAT that is believed.
const MAX_STEP: i32 = 16;
/// Mappings that others may make between two of ours in a burst.
const MAX_SKIPPED: i32 = 8;
/// A wider range of ports is not called a block.
const WIDEST_BLOCK: u32 = 8192;
/// NATs do not give out ports below this one (RFC 4787 section 4.2.2: not the well-known ones).
const LOWEST: u16 = 1024;

/// One socket's mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// The socket's own port; 0 if not known.
    pub local: u16,
    /// The external port the server saw.
    pub external: u16,
}

/// The model that explains two bursts, each in the order of asking, the second `gap` after the first. None: too few
/// answers to tell.
#[must_use]
pub fn classify(first: &[Sample], second: &[Sample], gap: Duration) -> Option<PortModel> {
    let all = || first.iter().chain(second);
    let count = all().count();
    if count < MIN_SAMPLES {
        return None;
    }
    if all().filter(|s| s.local == s.external).count() * 4 >= count * 3 {
        return Some(PortModel::Preserving);
    }
    if let Some(step) = step(first, second) {
        let per_second = foreign(first, second, step, gap).unwrap_or(0);
        return Some(PortModel::Sequential { step, per_second });
    }
    let (low, high) = range(all().map(|s| s.external))?;
    Some(if u32::from(high - low) < WIDEST_BLOCK { PortModel::Block { low, high } } else { PortModel::Random })
}

/// The step that most neighbours differ by, if nearly all differ by a small multiple of it.
fn step(first: &[Sample], second: &[Sample]) -> Option<i16> {
    let deltas: Vec<i32> = [first, second].into_iter().flat_map(|burst| burst.windows(2).map(delta)).collect();
    let mut votes: Vec<(usize, i32)> =
        (-MAX_STEP..=MAX_STEP).filter(|s| *s != 0).map(|s| (deltas.iter().filter(|d| **d == s).count(), s)).collect();
    // Of equals the smallest step: the others are its multiples.
    votes.sort_by_key(|(count, step)| (std::cmp::Reverse(*count), step.abs()));
    let (count, step) = *votes.first()?;
    let explained = deltas.iter().filter(|d| **d % step == 0 && (1..=MAX_SKIPPED).contains(&(**d / step))).count();
    let fits = count * 2 >= deltas.len() && explained * 5 >= deltas.len() * 4 && deltas.len() >= 3;
    fits.then(|| i16::try_from(step).ok()).flatten()
}

fn delta(pair: &[Sample]) -> i32 {
    match pair {
        [a, b] => i32::from(b.external) - i32::from(a.external),
        _ => 0,
    }
}

/// Mappings made by others in a second; None if the counter wrapped in between.
pub(crate) fn foreign(first: &[Sample], second: &[Sample], step: i16, gap: Duration) -> Option<u16> {
    let (last, next) = (first.last()?, second.first()?);
    let moved = (i32::from(next.external) - i32::from(last.external)) / i32::from(step) - 1;
    let millis = u64::try_from(gap.as_millis()).ok().filter(|ms| *ms > 0)?;
    let others = u64::try_from(moved).ok()?;
    u16::try_from(others * 1000 / millis).ok()
}

/// The range that ports like these are drawn from. Of `k` samples of a range the outermost are on average one part in
/// `k + 1` away from its ends.
#[must_use]
pub fn range(samples: impl Iterator<Item = u16> + Clone) -> Option<(u16, u16)> {
    let (min, max) = (samples.clone().min()?, samples.clone().max()?);
    let count = u16::try_from(samples.count()).ok()?.max(2);
    let beyond = ((max - min) / (count - 1)).saturating_add(1);
    let low = min.saturating_sub(beyond).max(LOWEST.min(min));
    Some((low, max.saturating_add(beyond)))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const GAP: Duration = Duration::from_millis(200);

    fn samples(ports: impl IntoIterator<Item = u16>) -> Vec<Sample> {
        ports.into_iter().enumerate().map(|(i, external)| Sample { local: 50_000 + i as u16 * 7, external }).collect()
    }

    #[test]
    fn counting_up_and_down_is_seen_with_its_step_and_rate() {
        for (step, foreign) in [(1, 0), (1, 40), (2, 11), (-1, 7), (-2, 0)] {
            let port = |n: i32| u16::try_from(30_000 + step * n).unwrap();
            let first = samples((0..8).map(port));
            let second = samples((8 + foreign..16 + foreign).map(port));
            let per_second = u16::try_from(foreign * 5).unwrap();
            let expected = PortModel::Sequential { step: i16::try_from(step).unwrap(), per_second };
            assert_eq!(classify(&first, &second, GAP), Some(expected));
        }
    }

    #[test]
    fn a_mapping_of_somebody_else_within_a_burst_and_a_lost_answer_do_not_hide_the_step() {
        let first = samples([100, 101, 103, 104, 105, 107, 108].map(|n| n + 40_000));
        let second = samples([150, 151, 152, 153, 155, 156, 157, 158].map(|n| n + 40_000));
        assert_eq!(classify(&first, &second, GAP), Some(PortModel::Sequential { step: 1, per_second: 205 }));
    }

    #[test]
    fn a_counter_that_wraps_is_still_sequential() {
        let first = samples([65_530, 65_531, 65_532, 65_533, 65_534, 65_535, 1024, 1025]);
        let second = samples(1026..1034);
        assert!(matches!(classify(&first, &second, GAP), Some(PortModel::Sequential { step: 1, .. })));
    }

    #[test]
    fn blocks_are_found_with_nearly_their_bounds() {
        let mut rng = StdRng::seed_from_u64(3);
        for (low, size) in [(20_000u16, 512u16), (5_000, 2_048), (60_000, 64)] {
            let mut covered = 0;
            for _ in 0..200 {
                let mut draw = || samples((0..8).map(|_| rng.random_range(low..low + size)).collect::<Vec<_>>());
                let (first, second) = (draw(), draw());
                // Sixteen draws from a tiny block can look like anything; from these they cannot.
                let Some(PortModel::Block { low: found, high }) = classify(&first, &second, GAP) else {
                    panic!("{first:?} {second:?}")
                };
                let inside = u32::from(high.min(low + size - 1) - found.max(low)) + 1;
                covered += inside * 100 / u32::from(size);
                assert!(u32::from(high - found) < u32::from(size) * 3 / 2);
            }
            assert!(covered / 200 >= 93, "covers {} % of {size} on average", covered / 200);
        }
    }

    #[test]
    fn drawing_from_all_ports_is_random_and_few_answers_say_nothing() {
        let mut rng = StdRng::seed_from_u64(4);
        for _ in 0..500 {
            let mut draw = || samples((0..8).map(|_| rng.random_range(1024..=65_535)).collect::<Vec<_>>());
            let (first, second) = (draw(), draw());
            assert_eq!(classify(&first, &second, GAP), Some(PortModel::Random));
        }
        assert_eq!(classify(&samples([1, 2]), &samples([3, 4]), GAP), None);
    }

    #[test]
    fn kept_ports_are_preserved() {
        let kept: Vec<Sample> = (0..8).map(|i| Sample { local: 7_000 + 3 * i, external: 7_000 + 3 * i }).collect();
        assert_eq!(classify(&kept, &kept, GAP), Some(PortModel::Preserving));
        let unknown: Vec<Sample> = kept.iter().map(|s| Sample { local: 0, ..*s }).collect();
        assert_eq!(classify(&unknown, &unknown, GAP).map(PortModel::name), Some("sequential"), "as far as it shows");
    }
}

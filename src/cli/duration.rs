//! Durations as people write them: `500ms`, `30s`, `5m`, `24h`, `7d`, and sums such as `1h30m`.

use std::time::Duration;

use crate::cli::nearest::nearest;

const UNITS: &[(&str, u64)] =
    &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 604_800_000)];
const WORDS: &[(&str, &str)] = &[
    ("sec", "s"),
    ("secs", "s"),
    ("second", "s"),
    ("seconds", "s"),
    ("min", "m"),
    ("mins", "m"),
    ("minute", "m"),
    ("minutes", "m"),
    ("hour", "h"),
    ("hours", "h"),
    ("hr", "h"),
    ("hrs", "h"),
    ("day", "d"),
    ("days", "d"),
    ("week", "w"),
    ("weeks", "w"),
];

/// Parses a duration.
///
/// # Errors
/// A sentence that names the mistake and what was probably meant.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("a duration is missing; write for example 30s, 24h or 7d".to_owned());
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err(format!("a number is missing before {rest:?}; write for example 30s, 24h or 7d"));
        }
        let letters = after.bytes().take_while(|b| !b.is_ascii_digit()).count();
        let (unit, after) = after.split_at(letters);
        let factor = factor(text, number, unit.trim())?;
        let part = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        total = part.and_then(|part| total.checked_add(part)).ok_or_else(|| format!("{text} is too long"))?;
        rest = after;
    }
    if total == 0 {
        return Err(format!("{text} is no time at all"));
    }
    Ok(Duration::from_millis(total))
}

fn factor(text: &str, number: &str, unit: &str) -> Result<u64, String> {
    if let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) {
        return Ok(*factor);
    }
    if unit.is_empty() {
        return Err(format!("{text} has no unit; did you mean {text}s?"));
    }
    let meant = WORDS
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(unit))
        .map(|(_, unit)| *unit)
        .or_else(|| nearest(unit, UNITS.iter().map(|(name, _)| *name)));
    match meant {
        Some(meant) => Err(format!("{unit:?} is no unit (ms, s, m, h, d, w); did you mean {number}{meant}?")),
        None => Err(format!("{unit:?} is no unit (ms, s, m, h, d, w); write for example 30s, 24h or 7d")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        assert_eq!(parse("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse("7d"), Ok(Duration::from_secs(604_800)));
        assert_eq!(parse("1h30m"), Ok(Duration::from_secs(5_400)));
    }

    #[test]
    fn mistakes_are_named_with_the_nearest_match() {
        let mistake = |text: &str| parse(text).unwrap_err();
        assert_eq!(mistake("30"), "30 has no unit; did you mean 30s?");
        assert!(mistake("7days").ends_with("did you mean 7d?"), "{}", mistake("7days"));
        assert!(mistake("5S").ends_with("did you mean 5s?"), "{}", mistake("5S"));
        assert!(mistake("abc").starts_with("a number is missing before \"abc\""));
        assert!(mistake("-5s").starts_with("a number is missing"));
        assert_eq!(mistake("0s"), "0s is no time at all");
        assert_eq!(mistake("99999999999999999999s"), "99999999999999999999s is too long");
        assert!(mistake("7é").contains("is no unit"));
    }
}

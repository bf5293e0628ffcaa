//! Numbers of bytes as people write them: `500kB`, `10MB`, `1.5TB`, `1GiB`, `64M`.

/// Decimal units and binary ones, without the B that may follow.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
];

/// Parses a number of bytes, of which there must be at least one.
///
/// # Errors
/// A sentence that names the mistake and what was probably meant.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim();
    let unit = unit.strip_suffix("/s").unwrap_or(unit);
    if number.is_empty() {
        return Err("a number is missing; write for example 500kB, 10MB or 1TB".to_owned());
    }
    let factor = factor(number, unit)?;
    let thousandths =
        thousandths(number).ok_or_else(|| format!("{number:?} is no number; write for example 10MB or 1.5GB"))?;
    let bytes = thousandths.checked_mul(u128::from(factor)).map(|n| n / 1_000).and_then(|n| u64::try_from(n).ok());
    match bytes {
        Some(0) => Err(format!("{text} is not even one byte")),
        Some(bytes) => Ok(bytes),
        None => Err(format!("{text} is too much")),
    }
}

fn factor(number: &str, unit: &str) -> Result<u64, String> {
    let plain = unit.strip_suffix('B').unwrap_or(unit);
    if let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == plain) {
        return Ok(*factor);
    }
    let lower = unit.to_ascii_lowercase();
    if lower.ends_with("bit") || lower.ends_with("bps") || (unit.len() > 1 && unit.ends_with('b')) {
        return Err(format!("{unit:?} counts bits, and bytes are wanted: write B, a byte has eight bits"));
    }
    let meant = UNITS.iter().skip(1).find(|(name, _)| lower.trim_end_matches('b').eq_ignore_ascii_case(name));
    match meant {
        Some((meant, _)) => Err(format!("{unit:?} is no unit; did you mean {number}{meant}B?")),
        None => Err(format!("{unit:?} is no unit (kB, MB, GB, TB, KiB, MiB, GiB, TiB); write for example 10MB")),
    }
}

/// A decimal number with at most three places, in thousandths.
fn thousandths(number: &str) -> Option<u128> {
    let (whole, places) = number.split_once('.').unwrap_or((number, ""));
    if places.len() > 3 || (whole.is_empty() && places.is_empty()) {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let part: u128 = format!("{places:0<3}").parse().ok()?;
    whole.checked_mul(1_000)?.checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        for (text, bytes) in [
            ("1", 1),
            ("500kB", 500_000),
            ("10MB", 10_000_000),
            ("10 MB", 10_000_000),
            ("10M", 10_000_000),
            ("12.5MB/s", 12_500_000),
            ("1.5TB", 1_500_000_000_000),
            ("1GiB", 1 << 30),
            (".5k", 500),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let mistake = |text: &str| parse(text).unwrap_err();
        assert!(mistake("").contains("number is missing") && mistake("MB").contains("number is missing"));
        assert!(
            mistake("100Mbit").contains("bits")
                && mistake("100Mb").contains("bits")
                && mistake("9Mbps").contains("bits")
        );
        assert_eq!(mistake("5mb"), "\"mb\" counts bits, and bytes are wanted: write B, a byte has eight bits");
        assert!(mistake("5mB").ends_with("did you mean 5MB?"), "{}", mistake("5mB"));
        assert!(mistake("5K").ends_with("did you mean 5kB?"), "{}", mistake("5K"));
        assert!(mistake("5 parsecs").contains("is no unit"));
        assert!(mistake("1.2.3M").contains("is no number") && mistake("-5M").contains("number is missing"));
        assert_eq!(mistake("0"), "0 is not even one byte");
        assert!(mistake("99999999999T").ends_with("is too much") && mistake("5é").contains("is no unit"));
    }
}

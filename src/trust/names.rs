//! Names of nodes and networks: DNS labels (RFC 1035 section 2.3.1, with digits allowed first as in RFC 1123 section 2.1),
//! in lower case.

/// The longest label, in bytes (RFC 1035 section 2.3.4).
pub const MAX_LABEL: usize = 63;

/// Why text is not a usable name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No characters.
    #[error("a name needs at least one character")]
    Empty,
    /// More than [`MAX_LABEL`] characters.
    #[error("a name has at most 63 characters")]
    TooLong,
    /// A character other than a–z, 0–9 and the hyphen.
    #[error("a name is made of lower-case letters, digits and hyphens; {0:?} is not one")]
    BadCharacter(char),
    /// Starts or ends with a hyphen.
    #[error("a name neither starts nor ends with a hyphen")]
    HyphenAtEnd,
}

/// Checks that `name` is a DNS label in lower case.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn dns_label(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if let Some(bad) = name.chars().find(|c| !is_label_char(*c)) {
        return Err(NameError::BadCharacter(bad));
    }
    if name.len() > MAX_LABEL {
        return Err(NameError::TooLong);
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(NameError::HyphenAtEnd);
    }
    Ok(())
}

/// A label as like `hostname` as possible: its first part, in lower case, other characters as single hyphens, cut to
/// [`MAX_LABEL`]. `node` when nothing is left.
#[must_use]
pub fn label_from_hostname(hostname: &str) -> String {
    let first = hostname.split('.').find(|part| !part.is_empty()).unwrap_or_default();
    let mut label = String::new();
    for c in first.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            label.push(c);
        } else if !label.is_empty() && !label.ends_with('-') {
            label.push('-');
        }
        if label.len() == MAX_LABEL {
            break;
        }
    }
    label.truncate(label.trim_end_matches('-').len());
    if label.is_empty() { "node".to_owned() } else { label }
}

/// `base` with `-number` added, `base` shortened so that the result is a label. `base` must be a label.
#[must_use]
pub fn numbered(base: &str, number: u64) -> String {
    let suffix = format!("-{number}");
    let keep = MAX_LABEL.saturating_sub(suffix.len());
    let cut: String = base.chars().take(keep).collect();
    format!("{}{suffix}", cut.trim_end_matches('-'))
}

/// The candidate a person most likely meant by `wanted`: the nearest by edit distance (swapped neighbours count as one
/// edit), if it is near enough to be a typing mistake. Of equally near ones the first.
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted: Vec<char> = wanted.chars().flat_map(char::to_lowercase).take(MAX_LABEL + 1).collect();
    let limit = (wanted.len() / 3).clamp(1, 3);
    let mut best: Option<(usize, &'a str)> = None;
    for candidate in candidates {
        let chars: Vec<char> = candidate.chars().flat_map(char::to_lowercase).take(MAX_LABEL + 1).collect();
        if chars.len().abs_diff(wanted.len()) > limit {
            continue;
        }
        let distance = edit_distance(&wanted, &chars);
        if distance <= limit && distance < chars.len() && best.is_none_or(|(d, _)| distance < d) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// The longest name, in characters without the final dot (RFC 1035 section 2.3.4).
pub const MAX_NAME: usize = 253;

/// Why text is not a name that an admin can give addresses or servers to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// One of its labels is none.
    #[error("{0:?} is no part of a name: {1}")]
    Label(String, NameError),
    /// More than [`MAX_NAME`] characters.
    #[error("a name has at most 253 characters")]
    TooLong,
    /// A single label: everybody's.
    #[error("it needs at least two parts, with a dot between")]
    OneLabel,
    /// Machines do not ask DNS servers about it.
    #[error(
        "names that end in {0:?} have a meaning of their own on every machine, and DNS servers are not asked about them"
    )]
    Special(&'static str),
}

/// Ends of names that machines resolve by other means or not at all: RFC 6761, 6762, 7686; and reverse names, which follow
/// from addresses.
const SPECIAL: [&str; 5] = ["localhost", "local", "invalid", "onion", "arpa"];
/// Under `arpa`, and for everybody's own use: RFC 8375.
const HOME: &str = "home.arpa";

/// Checks that `name` is a full name in lower case, without the final dot, that DNS servers are asked about.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn domain_name(name: &str) -> Result<(), DomainError> {
    if name.len() > MAX_NAME {
        return Err(DomainError::TooLong);
    }
    for label in name.split('.') {
        dns_label(label).map_err(|why| DomainError::Label(label.to_owned(), why))?;
    }
    let special = |end: &&&str| name == **end || is_below(name, end);
    match SPECIAL.iter().find(special) {
        Some(_) if is_below(name, HOME) => {}
        Some(end) => return Err(DomainError::Special(end)),
        None => {}
    }
    if name.contains('.') { Ok(()) } else { Err(DomainError::OneLabel) }
}

/// Whether `name` lies in `domain` and is not that itself. Both in lower case and without the final dot.
#[must_use]
pub fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

fn is_label_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn edit_distance(a: &[char], b: &[char]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, cb) in b.iter().enumerate() {
            let replace = last[j] + usize::from(ca != cb);
            let mut cost = replace.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i - 1] == *cb && *ca == b[j - 1] {
                cost = cost.min(before_last[j - 1] + 1);
            }
            row.push(cost);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn labels_and_their_mistakes() {
        for good in ["a", "nas", "web-2", "0", "3com", &"x".repeat(63)] {
            assert_eq!(dns_label(good), Ok(()), "{good}");
        }
        assert_eq!(dns_label(""), Err(NameError::Empty));
        assert_eq!(dns_label(&"x".repeat(64)), Err(NameError::TooLong));
        assert_eq!(dns_label("NAS"), Err(NameError::BadCharacter('N')));
        assert_eq!(dns_label("a.b"), Err(NameError::BadCharacter('.')));
        assert_eq!(dns_label("a_b"), Err(NameError::BadCharacter('_')));
        assert_eq!(dns_label("naß"), Err(NameError::BadCharacter('ß')));
        assert_eq!(dns_label("-a"), Err(NameError::HyphenAtEnd));
        assert_eq!(dns_label("a-"), Err(NameError::HyphenAtEnd));
    }

    #[test]
    fn whole_names_and_their_mistakes() {
        let long = format!("{}.{}.{}.{}", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61));
        for good in ["nas.home", "web.site-1.corp.example", "nas.home.arpa", "github.com", "nolocal.mylocal", &long] {
            assert_eq!(domain_name(good), Ok(()), "{good}");
        }
        assert_eq!(domain_name(&format!("{long}d")), Err(DomainError::TooLong));
        assert_eq!(domain_name("nas"), Err(DomainError::OneLabel));
        for (bad, why) in [("", NameError::Empty), ("a..b", NameError::Empty), ("nas.home.", NameError::Empty)] {
            assert_eq!(domain_name(bad), Err(DomainError::Label(String::new(), why)), "{bad}");
        }
        let label = DomainError::Label("NAS".into(), NameError::BadCharacter('N'));
        assert_eq!(domain_name("NAS.home"), Err(label));
        for (special, end) in
            [("nas.local", "local"), ("localhost", "localhost"), ("1.in-addr.arpa", "arpa"), ("home.arpa", "arpa")]
        {
            assert_eq!(domain_name(special), Err(DomainError::Special(end)), "{special}");
        }
    }

    #[test]
    fn hostnames_become_labels() {
        assert_eq!(label_from_hostname("Laptop.example.org"), "laptop");
        assert_eq!(label_from_hostname("Ann's MacBook Pro"), "ann-s-macbook-pro");
        assert_eq!(label_from_hostname("__db__01__"), "db-01");
        assert_eq!(label_from_hostname(""), "node");
        assert_eq!(label_from_hostname("日本"), "node");
        assert_eq!(label_from_hostname(&"y".repeat(99)).len(), MAX_LABEL);
    }

    #[test]
    fn the_nearest_name_is_a_likely_typo_only() {
        let names = ["nas", "laptop", "printer"];
        assert_eq!(nearest("labtop", names), Some("laptop"));
        assert_eq!(nearest("LAPTPO", names), Some("laptop"));
        assert_eq!(nearest("nsa", names), Some("nas"));
        assert_eq!(nearest("server", names), None);
        assert_eq!(nearest("x", ["y"]), None);
        assert_eq!(nearest("", names), None);
    }

    #[test]
    fn numbers_fit_into_a_label() {
        assert_eq!(numbered("nas", 2), "nas-2");
        let long = numbered(&"x".repeat(63), 1234);
        assert_eq!((long.len(), dns_label(&long)), (63, Ok(())));
        assert_eq!(numbered(&format!("{}-yy", "x".repeat(60)), 2), format!("{}-2", "x".repeat(60)));
    }

    proptest! {
        #[test]
        fn any_hostname_gives_a_label(hostname in any::<String>(), number in any::<u64>()) {
            let label = label_from_hostname(&hostname);
            prop_assert_eq!(dns_label(&label), Ok(()));
            prop_assert_eq!(dns_label(&numbered(&label, number)), Ok(()));
        }
    }
}

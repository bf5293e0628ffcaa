//! Prefixes as people write them: `192.168.1.0/24`, or several with commas between.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::wire::local::RouteProbe;

/// Several prefixes, with commas between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prefixes(pub(super) Vec<IpNet>);

/// The word for an empty list.
const NONE: &str = "none";

/// Parses one prefix.
///
/// # Errors
/// A sentence that names the mistake and what was probably meant.
pub(super) fn parse(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let prefix: IpNet = text.parse().map_err(|_| unreadable(text))?;
    if prefix.addr() == prefix.network() {
        return Ok(prefix);
    }
    Err(format!("{text} has bits set outside its prefix; did you mean {}?", prefix.trunc()))
}

fn unreadable(text: &str) -> String {
    let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
    match (address.parse::<IpAddr>(), length) {
        (Ok(address), None) => {
            let (net, host) = if address.is_ipv4() { (24, 32) } else { (64, 128) };
            let net = IpNet::new(address, net).map_or_else(|_| text.to_owned(), |net| net.trunc().to_string());
            format!("{text} has no prefix length; did you mean {net}, or {text}/{host} for that one machine?")
        }
        (Ok(address), Some(length)) => {
            let most = if address.is_ipv4() { 32 } else { 128 };
            format!("{length:?} is no prefix length; for {address} it is a number from 0 to {most}")
        }
        (Err(_), _) => format!("{text:?} is no prefix; write for example 192.168.1.0/24"),
    }
}

/// Parses a list; `none` is the empty one.
///
/// # Errors
/// As [`parse`], about the first that is wrong.
pub(super) fn parse_list(text: &str) -> Result<Prefixes, String> {
    if text.trim() == NONE {
        return Ok(Prefixes(Vec::new()));
    }
    text.split(',').map(parse).collect::<Result<_, _>>().map(Prefixes)
}

/// Machines to probe, with commas between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probes(pub(super) Vec<RouteProbe>);

/// Parses `192.168.1.0/24=192.168.1.10`, or several; `none` is the empty list.
///
/// # Errors
/// A sentence that names the first mistake.
pub(super) fn parse_probes(text: &str) -> Result<Probes, String> {
    if text.trim() == NONE {
        return Ok(Probes(Vec::new()));
    }
    text.split(',').map(probe).collect::<Result<_, _>>().map(Probes)
}

fn probe(text: &str) -> Result<RouteProbe, String> {
    let text = text.trim();
    let (prefix, target) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} names no machine; write for example 192.168.1.0/24=192.168.1.10"))?;
    let prefix = parse(prefix)?;
    let target: IpAddr = target.trim().parse().map_err(|_| format!("{target:?} is no address of a machine"))?;
    if target.is_ipv4() != prefix.addr().is_ipv4() {
        return Err(format!("{target} is not of the same family as {prefix}"));
    }
    Ok(RouteProbe { prefix, target })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_to_probe_are_read_and_mistakes_named() {
        let said = |text: &str| parse_probes(text).map(|p| p.0.len());
        assert_eq!(said("none"), Ok(0));
        assert_eq!(said("192.168.1.0/24=192.168.1.10, fd00:1::/64=fd00:1::9"), Ok(2));
        assert!(said("192.168.1.0/24").unwrap_err().contains("names no machine"));
        assert!(said("192.168.1.1/24=192.168.1.10").unwrap_err().contains("did you mean 192.168.1.0/24"));
        assert!(said("192.168.1.0/24=printer").unwrap_err().contains("no address"));
        assert!(said("192.168.1.0/24=fd00::1").unwrap_err().contains("family"));
    }

    #[test]
    fn what_people_write_is_understood() {
        let list = |text: &str| parse_list(text).map(|p| p.0.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(list("192.168.1.0/24"), Ok(vec!["192.168.1.0/24".to_owned()]));
        assert_eq!(list("10.0.0.0/8, fd00::/64").unwrap(), ["10.0.0.0/8", "fd00::/64"]);
        assert_eq!(list("none"), Ok(vec![]));
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        let mistake = |text: &str| parse_list(text).unwrap_err();
        assert_eq!(
            mistake("192.168.1.7/24"),
            "192.168.1.7/24 has bits set outside its prefix; did you mean 192.168.1.0/24?"
        );
        assert!(mistake("192.168.1.7").contains("did you mean 192.168.1.0/24, or 192.168.1.7/32"));
        assert!(mistake("fd00::7").contains("did you mean fd00::/64, or fd00::7/128"));
        assert!(mistake("10.0.0.0/33").contains("\"33\" is no prefix length"));
        assert!(mistake("home").contains("is no prefix"));
        assert!(mistake("10.0.0.0/8,").contains("is no prefix"));
    }
}

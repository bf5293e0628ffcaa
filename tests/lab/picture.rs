//! Everything on a machine that meshd might change.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use meshd::cli::demo::net::{Namespace, tool};

use crate::world::{ensure, eventually};

/// Addresses, routes, rules, links, the packet filter, kernel settings, the resolver.
pub fn picture(machine: &Namespace) -> Result<String> {
    // A new link-local address is not there completely before nobody else has claimed it for a second.
    eventually("addresses are settled", Duration::from_secs(5), || {
        let addresses = machine.ip("-6 addr")?;
        ensure(!addresses.contains("tentative"), || addresses)
    })?;
    let mut text = String::new();
    for args in ["addr", "route show table all", "-6 route show table all", "rule", "-6 rule", "link"] {
        let mut lines: Vec<String> = machine.ip(args)?.lines().map(without_lifetimes).collect();
        lines.sort();
        text.push_str(&format!("ip {args}\n{}\n", lines.join("\n")));
    }
    text.push_str(&machine.run(tool("nft").args(["list", "ruleset"]))?);
    text.push_str(&machine.enter(sysctls)?);
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    Ok(text + &resolver)
}

fn without_lifetimes(line: &str) -> String {
    line.split(" expires ").next().unwrap_or(line).trim().to_owned()
}

fn sysctls() -> String {
    let mut lines = Vec::new();
    for family in ["ipv4", "ipv6"] {
        let conf = format!("/proc/sys/net/{family}/conf");
        for entry in fs::read_dir(conf).into_iter().flatten().flatten() {
            for name in ["forwarding", "force_forwarding", "rp_filter", "accept_ra", "accept_redirects"] {
                let path = entry.path().join(name);
                if let Ok(value) = fs::read_to_string(&path) {
                    lines.push(format!("{} = {}\n", path.display(), value.trim()));
                }
            }
        }
    }
    lines.push(format!("ip_forward = {}\n", fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default()));
    lines.sort();
    lines.concat()
}

/// Says what is gone and what is new.
pub fn unchanged(before: &str, after: &str) -> Result<()> {
    let only =
        |a: &str, b: &str| a.lines().filter(|line| !b.lines().any(|l| l == *line)).collect::<Vec<_>>().join("\n");
    ensure(before == after, || format!("gone:\n{}\nnew:\n{}", only(before, after), only(after, before)))
}

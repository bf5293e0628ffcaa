//! The kernel's packet filter, through the program `nft`. Everything of ours is one table, given in one transaction.
//!
//! An accept in our table does not undo a drop in somebody else's: a packet must pass every chain of a hook. So chains of
//! others that drop what is forwarded (Docker, ufw, firewalld) get two accepts at their head, known by their comment.

use std::fmt::Write as _;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::daemon::problem;
use crate::wire::local::Problem;

/// How long `nft` may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The code of the problem that there is no `nft`.
pub(in crate::daemon) const MISSING: &str = "no-nft";

/// What the table is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ruleset {
    /// Our interface.
    pub(super) interface: String,
    /// Prefixes that are forwarded to; those of length 0 stand for everything but `neighbours`.
    pub(super) serving: Vec<IpNet>,
    /// Networks this machine is in, which an exit node does not lead to.
    pub(super) neighbours: Vec<IpNet>,
    /// Packets leave under this machine's own address.
    pub(super) masquerade: bool,
}

/// The table's name for an interface. nft takes letters, digits and underscores.
pub(super) fn table_name(interface: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    format!("meshd_{}", interface.chars().map(plain).collect::<String>())
}

impl Ruleset {
    /// The transaction that replaces the table.
    pub(super) fn text(&self) -> String {
        let name = table_name(&self.interface);
        let interface = &self.interface;
        let mut text = format!("table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n");
        // What the members began goes out; back comes what belongs to it, and more only where both sides route.
        let back = if self.masquerade {
            format!(
                "    oifname \"{interface}\" ct state established,related accept\n    oifname \"{interface}\" drop\n"
            )
        } else {
            String::new()
        };
        let _ = write!(
            text,
            "  chain forward {{\n    type filter hook forward priority filter; policy accept;\n    oifname \"{interface}\" tcp flags \
             & (syn | rst) == syn tcp option maxseg size set rt mtu\n    iifname \"{interface}\" jump from_mesh\n{back}  }}\n"
        );
        let _ = writeln!(text, "  chain from_mesh {{\n    oifname \"{interface}\" drop");
        for v4 in [true, false] {
            let family = |net: &&IpNet| matches!(net, IpNet::V4(_)) == v4;
            let word = if v4 { "ip" } else { "ip6" };
            let listed = |nets: Vec<&IpNet>| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let subnets: Vec<&IpNet> = widest(&self.serving).into_iter().filter(family).collect();
            if !subnets.is_empty() {
                let _ = writeln!(text, "    {word} daddr {{ {} }} accept", listed(subnets));
            }
            if self.serving.iter().filter(family).any(|net| net.prefix_len() == 0) {
                let near: Vec<&IpNet> = widest(&self.neighbours).into_iter().filter(family).collect();
                if !near.is_empty() {
                    let _ = writeln!(text, "    {word} daddr {{ {} }} drop", listed(near));
                }
                let _ = writeln!(text, "    meta nfproto {} accept", if v4 { "ipv4" } else { "ipv6" });
            }
        }
        text.push_str("    drop\n  }\n");
        if self.masquerade {
            let _ = writeln!(
                text,
                "  chain postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;\n    iifname \"{interface}\" \
                 oifname != \"{interface}\" masquerade\n  }}"
            );
        }
        text.push_str("}\n");
        text
    }
}

/// Prefixes without those of length 0 and without those inside another: nft refuses intervals that overlap.
fn widest(nets: &[IpNet]) -> Vec<&IpNet> {
    let real = |net: &&IpNet| net.prefix_len() > 0;
    let inside = |net: &IpNet| nets.iter().filter(real).any(|other| other != net && other.contains(net));
    let mut list: Vec<&IpNet> = nets.iter().filter(real).filter(|net| !inside(net)).collect();
    list.sort_unstable();
    list.dedup();
    list
}

/// A chain of somebody else's that drops what is forwarded unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Barrier {
    pub(super) family: String,
    pub(super) table: String,
    pub(super) chain: String,
    /// Two rules with our comment are in it.
    pub(super) opened: bool,
}

/// The packet filter as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Seen {
    /// Our table is there.
    pub(super) table: bool,
    /// See [`Barrier`].
    pub(super) barriers: Vec<Barrier>,
}

/// Looks at the whole ruleset.
pub(super) async fn look(name: &str) -> Result<Seen, Problem> {
    let text = run(&["-j", "list", "ruleset"], None).await?;
    let list: Value = serde_json::from_slice(&text).map_err(|e| failed(&e.to_string()))?;
    Ok(seen(&list, name))
}

fn seen(list: &Value, name: &str) -> Seen {
    let mut seen = Seen::default();
    let objects = || list["nftables"].as_array().into_iter().flatten();
    let word = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    seen.table = objects().any(|o| o["table"]["name"] == name && o["table"]["family"] == "inet");
    for chain in objects().map(|o| &o["chain"]).filter(|c| c["hook"] == "forward" && c["type"] == "filter") {
        let (family, table, chain_name) = (word(chain, "family"), word(chain, "table"), word(chain, "name"));
        // firewalld's chain accepts by policy and rejects in its last rule.
        let drops = chain["policy"] == "drop" || (table == "firewalld" && chain_name == "filter_FORWARD");
        if table == name || !drops || !["ip", "ip6", "inet"].contains(&family.as_str()) {
            continue;
        }
        let ours = |rule: &&Value| {
            rule["family"] == *family
                && rule["table"] == *table
                && rule["chain"] == *chain_name
                && rule["comment"] == name
        };
        let opened = objects().map(|o| &o["rule"]).filter(ours).count() >= 2;
        seen.barriers.push(Barrier { family, table, chain: chain_name, opened });
    }
    seen
}

/// Puts two accepts at the head of a chain of somebody else's.
pub(super) async fn open(barrier: &Barrier, interface: &str, masquerade: bool) -> Result<(), Problem> {
    let Barrier { family, table, chain, .. } = barrier;
    let comment = table_name(interface);
    let state = if masquerade { "ct state established,related " } else { "" };
    let text = format!(
        "insert rule {family} {table} {chain} oifname \"{interface}\" {state}accept comment \"{comment}\"\n\
         insert rule {family} {table} {chain} iifname \"{interface}\" accept comment \"{comment}\"\n"
    );
    run(&["-f", "-"], Some(&text)).await.map(drop)
}

/// Replaces our table.
pub(super) async fn replace(ruleset: &Ruleset) -> Result<(), Problem> {
    run(&["-f", "-"], Some(&ruleset.text())).await.map(drop)
}

/// Removes our table, if it is there.
pub(in crate::daemon) async fn remove_table(name: &str) -> Result<(), Problem> {
    // Naming it first makes it if it is missing, so that deleting it always works.
    run(&["-f", "-"], Some(&format!("table inet {name}\ndelete table inet {name}\n"))).await.map(drop)
}

/// Removes the rules with our comment from a chain of somebody else's, if it and they are there.
pub(in crate::daemon) async fn remove_rules(
    family: &str,
    table: &str,
    chain: &str,
    comment: &str,
) -> Result<(), Problem> {
    let Ok(text) = run(&["-j", "-a", "list", "chain", family, table, chain], None).await else {
        // The chain is gone, and what was in it; or there is no nft any more, and then no way to look.
        return Ok(());
    };
    let list: Value = serde_json::from_slice(&text).map_err(|e| failed(&e.to_string()))?;
    let rules = list["nftables"].as_array().into_iter().flatten().map(|o| &o["rule"]);
    let handles: Vec<u64> = rules.filter(|r| r["comment"] == comment).filter_map(|r| r["handle"].as_u64()).collect();
    if handles.is_empty() {
        return Ok(());
    }
    let text: String = handles.iter().map(|h| format!("delete rule {family} {table} {chain} handle {h}\n")).collect();
    run(&["-f", "-"], Some(&text)).await.map(drop)
}

/// Runs `nft`; what it printed on standard output.
async fn run(args: &[&str], input: Option<&str>) -> Result<Vec<u8>, Problem> {
    let mut command = Command::new("nft");
    // Services are started with a short PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin:/usr/local/sbin")).args(args).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = async {
        let mut child = command.spawn()?;
        if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
            stdin.write_all(text.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    match timeout(PATIENCE, running).await {
        Err(_) => Err(failed("it did not answer")),
        Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => Err(problem(
            MISSING,
            "the program nft is not installed, and without it this machine cannot forward packets for others",
            "`sudo apt-get install nftables` (or your system's package of that name)",
        )),
        Ok(Err(e)) => Err(failed(&e.to_string())),
        Ok(Ok(output)) if output.status.success() => Ok(output.stdout),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(said.lines().next().unwrap_or("it failed")))
        }
    }
}

fn failed(why: &str) -> Problem {
    problem(
        "nft",
        format!("the packet filter cannot be set with nft: {why}"),
        "run as root; try `sudo nft list ruleset`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ruleset() -> Ruleset {
        Ruleset { interface: "mesh0".into(), serving: vec![], neighbours: nets(&["192.168.1.0/24"]), masquerade: true }
    }

    #[test]
    fn the_table_forwards_what_is_served_and_nothing_else() {
        let text = Ruleset { serving: nets(&["10.0.0.0/8", "10.1.0.0/16", "fd00:9::/64"]), ..ruleset() }.text();
        assert!(text.starts_with("table inet meshd_mesh0\ndelete table inet meshd_mesh0\ntable inet meshd_mesh0 {\n"));
        assert!(text.contains("    ip daddr { 10.0.0.0/8 } accept\n"), "{text}");
        assert!(text.contains("    ip6 daddr { fd00:9::/64 } accept\n"), "{text}");
        assert!(!text.contains("192.168.1.0") && !text.contains("meta nfproto"), "{text}");
        assert!(text.contains("masquerade") && text.contains("    drop\n  }\n"), "{text}");
        let plain = Ruleset { serving: nets(&["10.0.0.0/8"]), masquerade: false, ..ruleset() }.text();
        assert!(!plain.contains("masquerade") && !plain.contains("established"), "{plain}");
    }

    #[test]
    fn an_exit_node_does_not_lead_to_its_neighbours() {
        let text = Ruleset { serving: nets(&["0.0.0.0/0"]), ..ruleset() }.text();
        let drop = text.find("ip daddr { 192.168.1.0/24 } drop").unwrap();
        let accept = text.find("meta nfproto ipv4 accept").unwrap();
        assert!(drop < accept && !text.contains("ipv6 accept"), "{text}");
        // Unless it leads there as a subnet router.
        let both = Ruleset { serving: nets(&["0.0.0.0/0", "192.168.1.0/24"]), ..ruleset() }.text();
        assert!(
            both.find("ip daddr { 192.168.1.0/24 } accept") < both.find("ip daddr { 192.168.1.0/24 } drop"),
            "{both}"
        );
    }

    #[test]
    fn barriers_of_others_are_seen() {
        let list = serde_json::json!({ "nftables": [
            { "table": { "family": "inet", "name": "meshd_mesh0" } },
            { "chain": { "family": "inet", "table": "meshd_mesh0", "name": "forward", "type": "filter", "hook": "forward", "policy": "accept" } },
            { "chain": { "family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "policy": "drop" } },
            { "chain": { "family": "ip6", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "policy": "accept" } },
            { "chain": { "family": "inet", "table": "firewalld", "name": "filter_FORWARD", "type": "filter", "hook": "forward", "policy": "accept" } },
            { "rule": { "family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "comment": "meshd_mesh0" } },
            { "rule": { "family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "comment": "meshd_mesh0" } },
        ] });
        let seen = seen(&list, "meshd_mesh0");
        assert!(seen.table);
        let found: Vec<_> = seen.barriers.iter().map(|b| (b.table.as_str(), b.opened)).collect();
        assert_eq!(found, [("filter", false), ("firewalld", true)]);
    }

    #[test]
    fn any_interface_name_gives_a_name_for_a_table() {
        assert_eq!(table_name("mesh0"), "meshd_mesh0");
        assert_eq!(table_name("wg-home.1"), "meshd_wg_home_1");
    }
}

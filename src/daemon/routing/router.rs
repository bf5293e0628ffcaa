//! A machine that forwards for others: the kernel's switches, and the packet filter.
//!
//! Forwarding is switched on for the interfaces concerned and no others, where the kernel has a switch for each; so a
//! machine with several networks does not become a router between them.

use std::collections::BTreeSet;
use std::io;

use ipnet::IpNet;

use crate::daemon::apply::Surroundings;
use crate::daemon::footprint::{Change, Journal};
use crate::daemon::health::Health;
use crate::daemon::problem;
use crate::daemon::routing::nft::{self, Barrier, Ruleset};
use crate::daemon::routing::sysctl;
use crate::daemon::settings::Settings;
use crate::os::netlink::Netlink;
use crate::wire::local::{Problem, Severity};

/// Health conditions of this file.
const CONDITIONS: [&str; 4] = ["forwarding", "firewall", "route-leads-nowhere", "forwarding-blocked"];

/// What was made so far.
#[derive(Debug)]
pub(super) struct Router {
    interface: String,
    netlink: Netlink,
    journal: Journal,
    health: Health,
    /// The table as last given to the kernel.
    ruleset: Option<Ruleset>,
    serving: bool,
}

impl Router {
    pub(super) fn new(interface: &str, netlink: Netlink, journal: Journal, health: Health) -> Self {
        Self { interface: interface.to_owned(), netlink, journal, health, ruleset: None, serving: false }
    }

    /// Forwards to these prefixes and to nothing else.
    pub(super) async fn settle(&mut self, serving: &[IpNet], around: &Surroundings, settings: &Settings) {
        if serving.is_empty() {
            if std::mem::take(&mut self.serving) {
                self.stop().await;
            }
            return;
        }
        self.serving = true;
        let filtered = match self.filter(serving, around, settings).await {
            Ok(set) => {
                self.ruleset = set;
                Ok(())
            }
            Err(why) => Err(why),
        };
        self.report("firewall", filtered);
        let leading = self.leading(serving, around).await;
        let lost: Vec<String> = leading.iter().filter(|(_, to)| to.is_empty()).map(|(p, _)| p.to_string()).collect();
        self.report(
            "route-leads-nowhere",
            match lost.as_slice() {
                [] => Ok(()),
                some => Err(problem(
                    "route-leads-nowhere",
                    format!("this machine has no way to {} itself", some.join(", ")),
                    "connect it to that network, or `meshd up --advertise-routes` without it",
                )),
            },
        );
        let forwarding = self.forward(&leading, around);
        self.report("forwarding", forwarding);
        match blocked_by_old_tables(&self.interface) {
            Ok(()) => self.health.clear("forwarding-blocked"),
            Err(why) => self.health.set("forwarding-blocked", Severity::Info, why.text, why.hint),
        }
    }

    fn report(&self, code: &'static str, result: Result<(), Problem>) {
        match result {
            Ok(()) => self.health.clear(code),
            Err(why) => self.health.set(code, Severity::Error, why.text, why.hint),
        }
    }

    async fn stop(&mut self) {
        self.ruleset = None;
        for change in self.journal.changes().iter().rev() {
            let undone = match change {
                Change::NftTable { name } => nft::remove_table(name).await,
                Change::NftRules { family, table, chain, comment } => {
                    nft::remove_rules(family, table, chain, comment).await
                }
                Change::Sysctl { name, .. } if !is_ours(name) => continue,
                Change::Sysctl { name, before, set } => {
                    sysctl::put_back(name, before, set).map_err(|e| problem("forwarding", e.to_string(), ""))
                }
                Change::RouteTable { .. }
                | Change::Rule(_)
                | Change::ResolvconfEntry { .. }
                | Change::ResolvConfFile { .. } => {
                    continue;
                }
            };
            match undone {
                Ok(()) => self.journal.undone(change),
                Err(why) => tracing::warn!(code = why.code, "could not undo {}: {}", change.text(), why.text),
            }
        }
        CONDITIONS.iter().for_each(|code| self.health.clear(code));
    }

    // ---- the packet filter -------------------------------------------------------------------------------------------

    /// Sets our table and opens what others closed. Returns the table as it is now.
    async fn filter(
        &self,
        serving: &[IpNet],
        around: &Surroundings,
        settings: &Settings,
    ) -> Result<Option<Ruleset>, Problem> {
        let ruleset = Ruleset {
            interface: self.interface.clone(),
            serving: serving.to_vec(),
            neighbours: around.neighbours(),
            masquerade: settings.snat,
        };
        let name = nft::table_name(&self.interface);
        let seen = match nft::look(&name).await {
            Ok(seen) => seen,
            // Without address translation the table only narrows what is forwarded, and the tunnel does that too.
            Err(why) if why.code == nft::MISSING && !settings.snat => return Ok(None),
            Err(why) => return Err(why),
        };
        if !seen.table || self.ruleset.as_ref() != Some(&ruleset) {
            self.journal.about_to(&Change::NftTable { name: name.clone() })?;
            nft::replace(&ruleset).await?;
        }
        for barrier in seen.barriers.iter().filter(|barrier| !barrier.opened) {
            let Barrier { family, table, chain, .. } = barrier;
            let change = Change::NftRules {
                family: family.clone(),
                table: table.clone(),
                chain: chain.clone(),
                comment: name.clone(),
            };
            self.journal.about_to(&change)?;
            // One rule of two was swept away: begin anew.
            nft::remove_rules(family, table, chain, &name).await?;
            tracing::info!(
                family,
                table,
                chain,
                "a firewall drops what is forwarded; letting the tunnel's packets through"
            );
            nft::open(barrier, &self.interface, settings.snat)
                .await
                .map_err(|why| closed(barrier, &self.interface, &why))?;
        }
        Ok(Some(ruleset))
    }

    // ---- the kernel's switches -----------------------------------------------------------------------------------------

    /// The interfaces behind each prefix.
    async fn leading(&self, serving: &[IpNet], around: &Surroundings) -> Vec<(IpNet, BTreeSet<u32>)> {
        let mut leading = Vec::new();
        for prefix in serving {
            let mut to = if prefix.prefix_len() > 0 { around.leading_to(prefix) } else { BTreeSet::new() };
            if to.is_empty() {
                let v6 = matches!(prefix, IpNet::V6(_));
                to.extend(self.netlink.default_interfaces(v6).await.unwrap_or_default());
            }
            leading.push((*prefix, to));
        }
        leading
    }

    fn forward(&self, leading: &[(IpNet, BTreeSet<u32>)], around: &Surroundings) -> Result<(), Problem> {
        let mut wanted: Vec<(String, &str)> = Vec::new();
        for v6 in [false, true] {
            let family = leading.iter().filter(|(prefix, _)| matches!(prefix, IpNet::V6(_)) == v6);
            let behind: BTreeSet<u32> = family.flat_map(|(_, to)| to.iter().copied()).collect();
            if behind.is_empty() {
                continue;
            }
            let names = behind.iter().filter_map(|index| around.names.get(index)).map(String::as_str);
            let interfaces: Vec<&str> = names.chain([self.interface.as_str()]).collect();
            wanted.extend(if v6 { ipv6_switches(&interfaces) } else { ipv4_switches(&interfaces) });
        }
        for change in self.journal.changes() {
            if let Change::Sysctl { name, before, set } = &change
                && is_ours(name)
                && !wanted.iter().any(|(wanted, _)| wanted == name)
                && sysctl::put_back(name, before, set).is_ok()
            {
                self.journal.undone(&change);
            }
        }
        for (name, value) in wanted {
            let before = sysctl::get(&name).map_err(|e| forbidden(&name, &e))?;
            if before != value {
                let change = Change::Sysctl { name: name.clone(), before, set: value.to_owned() };
                self.journal.about_to(&change)?;
                sysctl::set(&name, value).map_err(|e| forbidden(&name, &e))?;
            }
        }
        Ok(())
    }
}

/// The settings this file changes.
fn is_ours(name: &str) -> bool {
    ["/forwarding", "/force_forwarding", "/accept_ra"].iter().any(|end| name.ends_with(end))
}

/// IPv4 looks at the switch of the interface that a packet comes in by.
fn ipv4_switches(interfaces: &[&str]) -> Vec<(String, &'static str)> {
    interfaces.iter().map(|name| (format!("net/ipv4/conf/{name}/forwarding"), "1")).collect()
}

/// IPv6 has such a switch since Linux 6.17. Before that there is one for the whole machine, which also makes it deaf to
/// router advertisements, and so lose its own default route, unless told otherwise before.
fn ipv6_switches(interfaces: &[&str]) -> Vec<(String, &'static str)> {
    let forced = |name: &str| format!("net/ipv6/conf/{name}/force_forwarding");
    if interfaces.iter().all(|name| sysctl::get(&forced(name)).is_ok()) {
        return interfaces.iter().map(|name| (forced(name), "1")).collect();
    }
    let mut switches = Vec::new();
    for name in sysctl::list("net/ipv6/conf") {
        let advertisements = format!("net/ipv6/conf/{name}/accept_ra");
        if sysctl::get(&advertisements).is_ok_and(|now| now == "1" || now == "2") {
            switches.push((advertisements, "2"));
        }
    }
    // Undone in the other order: every interface's own switch after the one for all, which sets them.
    for name in sysctl::list("net/ipv6/conf").iter().filter(|name| !["all", "default"].contains(&name.as_str())) {
        switches.push((format!("net/ipv6/conf/{name}/forwarding"), "1"));
    }
    switches.push(("net/ipv6/conf/default/forwarding".to_owned(), "1"));
    switches.push(("net/ipv6/conf/all/forwarding".to_owned(), "1"));
    switches
}

fn forbidden(name: &str, e: &io::Error) -> Problem {
    problem(
        "forwarding",
        format!(
            "the kernel does not let this machine forward packets ({name}: {e}), so nobody reaches what it leads to"
        ),
        "in a container, give it the capability and a writable /proc/sys, or set it from outside",
    )
}

fn closed(barrier: &Barrier, interface: &str, why: &Problem) -> Problem {
    let Barrier { family, table, chain, .. } = barrier;
    let hint = if table == "firewalld" {
        format!("`sudo firewall-cmd --zone=trusted --add-interface={interface}`")
    } else {
        format!("`sudo nft insert rule {family} {table} {chain} iifname {interface} accept`, and the same with oifname")
    };
    problem("firewall", format!("the chain {chain} of {family} {table} drops what is forwarded: {}", why.text), hint)
}

/// Rules of the old kind (iptables-legacy) are not seen by nft.
fn blocked_by_old_tables(interface: &str) -> Result<(), Problem> {
    let has_filter = |path: &str| std::fs::read_to_string(path).is_ok_and(|t| t.lines().any(|line| line == "filter"));
    if !has_filter("/proc/net/ip_tables_names") && !has_filter("/proc/net/ip6_tables_names") {
        return Ok(());
    }
    Err(problem(
        "forwarding-blocked",
        "this machine has rules of iptables-legacy, which may drop what is forwarded",
        format!(
            "`sudo iptables-legacy -S FORWARD`; if its policy is DROP: `sudo iptables-legacy -I FORWARD -i {interface} -j ACCEPT` \
             and the same with -o"
        ),
    ))
}

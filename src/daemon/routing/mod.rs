//! Makes the system route as the planner wants: accepted prefixes into the tunnel by a table and rules of our own, served
//! prefixes out of it by forwarding and the packet filter.
//!
//! One task compares what is wanted with what the kernel holds, and changes the difference; it does so again whenever the
//! planner, the settings or the machine's network change, and now and then where others may have swept our rules away. What
//! outlives the process is in the footprint's journal before it is done ([`crate::daemon::footprint`]).

pub(in crate::daemon) mod behind;
pub(in crate::daemon) mod nft;
pub(in crate::daemon) mod place;
mod plan;
mod router;
pub(in crate::daemon) mod sysctl;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;

use crate::daemon::apply::Surroundings;
use crate::daemon::footprint::{Change, Journal};
use crate::daemon::health::Health;
use crate::daemon::problem;
use crate::daemon::settings::Settings;
use crate::engine::io::RoutePlan;
use crate::engine::place::{Meetings, Overlap};
use crate::os::netlink::{Changes, Netlink};
use crate::wire::local::{Problem, RoutePlace, Severity};

use plan::{Exit, Own, Wanted};
use router::Router;

/// While this machine forwards for others, the packet filter is looked at this often: reloading a firewall sweeps rules away.
const LOOK_AGAIN: Duration = Duration::from_secs(20);

/// What the task needs.
pub(super) struct Wiring {
    pub(super) netlink: Netlink,
    pub(super) changes: Changes,
    /// Our interface's number.
    pub(super) index: u32,
    /// Our interface's name.
    pub(super) interface: String,
    /// Our addresses in the mesh; without an IPv6 one if the interface has none.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) journal: Journal,
    pub(super) plan: watch::Receiver<RoutePlan>,
    pub(super) settings: watch::Receiver<Settings>,
    pub(super) shadowed: watch::Sender<BTreeMap<IpNet, Overlap>>,
    /// Which routers were met on the networks this machine is in.
    pub(super) meetings: watch::Receiver<Meetings>,
    pub(super) health: Health,
}

/// The task.
pub(super) struct Routing {
    w: Wiring,
    own: Own,
    router: Router,
}

impl Routing {
    pub(super) fn new(w: Wiring) -> Self {
        let own = Own { index: w.index, addresses: w.addresses.clone() };
        let router = Router::new(&w.interface, w.netlink.clone(), w.journal.clone(), w.health.clone());
        Self { w, own, router }
    }

    /// Runs until it is aborted. Undoing is the caller's, by the journal.
    pub(super) async fn run(mut self) {
        loop {
            let serving = self.settle().await;
            let again = async {
                if serving {
                    tokio::time::sleep(LOOK_AGAIN).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            // A sender that is gone means that the daemon stops.
            let going_on = tokio::select! {
                changed = self.w.plan.changed() => changed.is_ok(),
                changed = self.w.settings.changed() => changed.is_ok(),
                changed = self.w.meetings.changed() => changed.is_ok(),
                () = self.w.changes.next() => true,
                () = again => true,
            };
            if !going_on {
                return;
            }
        }
    }

    /// Makes it so. True: this machine forwards for others.
    async fn settle(&mut self) -> bool {
        let plan = self.w.plan.borrow_and_update().clone();
        let settings = self.w.settings.borrow_and_update().clone();
        let around = match Surroundings::look(&self.w.netlink, self.own.index).await {
            Ok(around) => around,
            Err(why) => {
                tracing::warn!(code = why.code, "{}", why.text);
                return false;
            }
        };
        let meetings = self.w.meetings.borrow_and_update().clone();
        match self.accept(&plan, &around, &settings, &meetings).await {
            Ok(()) => self.w.health.clear("routes"),
            Err(why) => self.w.health.set("routes", Severity::Error, why.text, why.hint),
        }
        self.router.settle(&plan.serving, &around, &settings).await;
        !plan.serving.is_empty()
    }

    /// Leads prefixes into the tunnel.
    async fn accept(
        &self,
        plan: &RoutePlan,
        around: &Surroundings,
        settings: &Settings,
        meetings: &Meetings,
    ) -> Result<(), Problem> {
        let exit = settings
            .exit_node
            .is_some()
            .then_some(Exit { lan: settings.exit_node_allow_lan_access, kill_switch: settings.kill_switch });
        let mut wanted = self.own.wanted(&plan.accepted, around, exit);
        self.locate(&mut wanted.shadowed, plan, meetings);
        self.w.shadowed.send_if_modified(|shadowed| {
            let changed = *shadowed != wanted.shadowed;
            shadowed.clone_from(&wanted.shadowed);
            changed
        });
        let (netlink, journal, table) = (&self.w.netlink, &self.w.journal, self.own.table());
        let refused = |what: String, e: &io::Error| {
            let hint = "`ip rule` and `ip route show table all` show what is there; the log says more";
            problem("routes", format!("the kernel refused {what}: {e}"), hint)
        };
        let whole = Change::RouteTable { table };
        let held: BTreeSet<_> = if journal.changes().contains(&whole) {
            netlink.table(table).await.map_err(|e| refused("to list routes".into(), &e))?.into_iter().collect()
        } else {
            BTreeSet::new()
        };
        // Routes before the rules that lead to them, so that nothing falls through in between.
        if !wanted.routes.is_empty() {
            journal.about_to(&whole)?;
        }
        let new: Vec<_> = wanted.routes.iter().filter(|route| !held.contains(&route.key())).copied().collect();
        let added = netlink.add_routes(table, &new).await;
        added.map_err(|(prefix, e)| refused(format!("the route to {prefix}"), &e))?;
        for rule in &wanted.rules {
            journal.about_to(&Change::Rule(*rule))?;
            netlink.add_rule(rule).await.map_err(|e| refused(rule.to_string(), &e))?;
        }
        self.loosen(&wanted)?;
        // And away in the other order.
        for change in journal.changes() {
            if let Change::Rule(rule) = &change
                && !wanted.rules.contains(rule)
            {
                netlink.remove_rule(rule).await.map_err(|e| refused(format!("to remove {rule}"), &e))?;
                journal.undone(&change);
            }
        }
        let keep: BTreeSet<_> = wanted.routes.iter().map(|route| route.key()).collect();
        let gone: BTreeSet<_> = held.difference(&keep).copied().collect();
        netlink.remove_routes(table, &gone).await.map_err(|e| refused("to remove routes".into(), &e))?;
        if !new.is_empty() || !gone.is_empty() {
            tracing::info!(added = new.len(), removed = gone.len(), "routes into the tunnel changed");
        }
        if wanted.routes.is_empty() && journal.changes().contains(&whole) {
            netlink.flush_table(table).await.map_err(|e| refused("to empty a table".into(), &e))?;
            journal.undone(&whole);
        }
        Ok(())
    }

    /// Adds what is known of the places.
    fn locate(&self, shadowed: &mut BTreeMap<IpNet, Overlap>, plan: &RoutePlan, meetings: &Meetings) {
        let mut away = Vec::new();
        for (prefix, overlap) in shadowed.iter_mut() {
            let Some(interface) = overlap.interface else { continue };
            let routers = plan.others.get(prefix).map(Vec::as_slice).unwrap_or_default();
            let place = meetings.place(interface, routers.iter().map(AsRef::as_ref));
            if place == RoutePlace::Away {
                let names: Vec<&str> = routers.iter().map(|router| router.name.as_str()).collect();
                away.push(format!("{prefix} of {}", names.join(" and ")));
            }
            overlap.place = Some(place);
        }
        if away.is_empty() {
            self.w.health.clear("away-same-numbers");
            return;
        }
        let text = format!(
            "this machine is in another network with the numbers of {}, which is therefore not reached by them",
            away.join(", ")
        );
        let hint = "the nodes are reached by name and mesh address, and their networks by an alias: `meshd routes` shows it, \
                    `meshd routes alias NODE CIDR` on an admin node gives one";
        self.w.health.set("away-same-numbers", Severity::Info, text, hint);
    }

    /// With everything in the tunnel, what comes from outside for the tunnel itself fails a strict check of its source
    /// (RFC 3704 section 2.2): the loose one takes its place.
    fn loosen(&self, wanted: &Wanted) -> Result<(), Problem> {
        let everything = wanted.routes.iter().any(|r| r.prefix.prefix_len() == 0 && r.prefix.addr().is_ipv4());
        let strict = |name: &str| sysctl::get(&format!("net/ipv4/conf/{name}/rp_filter")).is_ok_and(|now| now == "1");
        let all = strict("all");
        let mut names = sysctl::list("net/ipv4/conf");
        names.retain(|name| name != "all" && name != "default" && name != "lo" && *name != self.w.interface);
        for interface in names.into_iter().filter(|name| everything && (all || strict(name))) {
            let name = format!("net/ipv4/conf/{interface}/rp_filter");
            let Ok(before) = sysctl::get(&name) else { continue };
            if before != "2" {
                self.w.journal.about_to(&Change::Sysctl { name: name.clone(), before, set: "2".to_owned() })?;
                let hint = "`sysctl net.ipv4.conf.all.rp_filter=2`";
                sysctl::set(&name, "2").map_err(|e| problem("routes", format!("{name} cannot be set: {e}"), hint))?;
            }
        }
        for change in self.w.journal.changes() {
            if let Change::Sysctl { name, before, set } = &change
                && !everything
                && name.ends_with("/rp_filter")
                && sysctl::put_back(name, before, set).is_ok()
            {
                self.w.journal.undone(&change);
            }
        }
        Ok(())
    }
}

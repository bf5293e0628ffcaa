//! What a person set this node up to do (`meshd up`, `meshd set`), kept over restarts in `settings.json`.
//!
//! A change can be made on trial: unless it is confirmed in time it is taken back, also if the daemon was restarted
//! meanwhile. So nobody is cut off from a machine far away by a wrong exit node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::daemon::hooks;
use crate::daemon::planner_task::PlannerHandle;
use crate::daemon::problem;
use crate::daemon::store::SettingsFile;
use crate::engine::io::{Input, RouteWish};
use crate::engine::planner::Planner;
use crate::link::ProxySetting;
use crate::os::clock;
use crate::time::{Now, UnixSeconds};
use crate::trust::advert::MAX_ROUTES;
use crate::wire::keys::IdentityKey;
use crate::wire::local::{Problem, RouteProbe, SettingsChange, SettingsDocument};
use crate::wire::version;

/// What a node that relays for others carries unless told otherwise, bytes per second.
const RELAY_RATE: u64 = 10_000_000;
/// The word for no exit node.
const NONE: &str = "none";

/// What the node is set up to do. What is missing in the file has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Prefixes this node leads to, once an admin approves.
    pub advertise_routes: Vec<IpNet>,
    /// Offer to carry all traffic of others, once an admin approves.
    pub advertise_exit_node: bool,
    /// Use the routes of others.
    pub accept_routes: bool,
    /// This machine asks us for names.
    pub accept_dns: bool,
    /// What is forwarded for others leaves under this machine's own address.
    pub snat: bool,
    /// All traffic goes through this node.
    pub exit_node: Option<IdentityKey>,
    /// But what is for the networks this machine is in.
    pub exit_node_allow_lan_access: bool,
    /// And nothing else leaves, not even when the daemon was killed.
    pub kill_switch: bool,
    /// Relay for others.
    pub relay: bool,
    /// So many bytes a second.
    pub relay_rate: u64,
    /// This program hears of events.
    pub on_event: Option<PathBuf>,
    /// Others are to be asked for what this node leads to; what is under way through it is still forwarded.
    pub drain: bool,
    /// Machines on the networks this node leads to that show by their answers that it reaches them.
    pub probes: BTreeMap<IpNet, IpAddr>,
    /// How the coordinator is reached; with a proxy's credentials. Given at the start only.
    pub proxy: ProxySetting,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            advertise_routes: Vec::new(),
            advertise_exit_node: false,
            accept_routes: true,
            accept_dns: true,
            snat: true,
            exit_node: None,
            exit_node_allow_lan_access: true,
            kill_switch: false,
            relay: false,
            relay_rate: RELAY_RATE,
            on_event: None,
            drain: false,
            probes: BTreeMap::new(),
            proxy: ProxySetting::Auto,
        }
    }
}

/// `settings.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// 1.
    pub v: u16,
    /// What holds.
    #[serde(flatten)]
    pub settings: Settings,
    /// What it goes back to, if that holds on trial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trial: Option<Trial>,
}

/// Settings that hold until confirmed or taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// What was before.
    pub before: Settings,
    /// When it is again, unless confirmed.
    pub until: UnixSeconds,
}

impl Settings {
    /// What the planner must know of it.
    #[must_use]
    pub fn wish(&self) -> RouteWish {
        let mut advertise = self.advertise_routes.clone();
        if self.advertise_exit_node {
            advertise.extend([IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())]);
        }
        let (accept, relay) = (self.accept_routes, self.relay.then_some(self.relay_rate));
        RouteWish { advertise, draining: self.drain, accept, exit_node: self.exit_node, relay }
    }

    /// These settings with a change made.
    ///
    /// # Errors
    /// What in the change cannot be.
    pub fn with(&self, change: &SettingsChange, planner: &Planner) -> Result<Self, Problem> {
        let mut next = self.clone();
        if let Some(prefixes) = &change.advertise_routes {
            next.advertise_routes = advertised(prefixes, planner)?;
        }
        next.advertise_exit_node = change.advertise_exit_node.unwrap_or(next.advertise_exit_node);
        next.accept_routes = change.accept_routes.unwrap_or(next.accept_routes);
        next.accept_dns = change.accept_dns.unwrap_or(next.accept_dns);
        next.snat = change.snat.unwrap_or(next.snat);
        next.drain = change.drain.unwrap_or(next.drain);
        if let Some(probes) = &change.probes {
            next.probes = probes.iter().map(|probe| (probe.prefix.trunc(), probe.target)).collect();
        }
        if let Some(prefix) = next.probes.keys().find(|prefix| !next.advertise_routes.contains(prefix)) {
            return Err(problem(
                "probe-without-route",
                format!("a machine to probe is named for {prefix}, which this node does not lead to"),
                format!("`--advertise-routes {prefix}`, or `--probe none`"),
            ));
        }
        match change.exit_node.as_deref() {
            None => {}
            Some(NONE) => next.exit_node = None,
            Some(wanted) => next.exit_node = Some(planner.find_exit_node(wanted)?),
        }
        next.exit_node_allow_lan_access = change.exit_node_allow_lan_access.unwrap_or(next.exit_node_allow_lan_access);
        next.kill_switch = change.kill_switch.unwrap_or(next.kill_switch);
        next.relay = change.relay.unwrap_or(next.relay);
        next.relay_rate = change.relay_rate.unwrap_or(next.relay_rate).max(1);
        if let Some(text) = &change.on_event {
            next.on_event = hooks::chosen(text)?;
        }
        if next.advertise_exit_node && next.exit_node.is_some() {
            return Err(problem(
                "usage",
                "a node that sends all its traffic through another cannot carry the traffic of others",
                "`meshd set --exit-node none`, or `--advertise-exit-node=false`",
            ));
        }
        Ok(next)
    }
}

fn advertised(prefixes: &[IpNet], planner: &Planner) -> Result<Vec<IpNet>, Problem> {
    let mut list: Vec<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
    list.sort_unstable();
    list.dedup();
    // Two stay free for an exit node.
    if list.len() > MAX_ROUTES - 2 {
        return Err(problem(
            "too-many-routes",
            format!("a node can advertise {} prefixes, and these are {}", MAX_ROUTES - 2, list.len()),
            "join neighbouring prefixes into wider ones, or divide them among several nodes",
        ));
    }
    for prefix in &list {
        if prefix.prefix_len() == 0 {
            return Err(problem(
                "route-too-wide",
                format!("{prefix} is everything, which is not a subnet"),
                "to carry all traffic of others there is `--advertise-exit-node`",
            ));
        }
        planner.check_prefix(prefix)?;
    }
    Ok(list)
}

/// The settings of a running node. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct SettingsDesk {
    file: SettingsFile,
    kept: Arc<Mutex<Kept>>,
    changed: watch::Sender<Settings>,
    /// Rings when a trial begins or ends.
    trial: Arc<Notify>,
}

impl SettingsDesk {
    /// Takes settings of an earlier run over. Those that were on trial then were not confirmed.
    ///
    /// # Errors
    /// The disk does not take it.
    pub(super) fn new(file: SettingsFile, mut kept: Kept) -> Result<Self, Problem> {
        if let Some(trial) = kept.trial.take() {
            tracing::warn!("settings were not confirmed before the daemon ended; they are as before again");
            kept.settings = trial.before;
            file.keep(&kept)?;
        }
        let (changed, _) = watch::channel(kept.settings.clone());
        Ok(Self { file, kept: Arc::new(Mutex::new(kept)), changed, trial: Arc::default() })
    }

    pub(super) fn get(&self) -> Settings {
        self.kept.lock().settings.clone()
    }

    /// Hears of changes.
    pub(super) fn watch(&self) -> watch::Receiver<Settings> {
        self.changed.subscribe()
    }

    /// Makes a change: on disk first, then in the planner. With `trial` it is taken back after so many seconds, unless
    /// confirmed before.
    ///
    /// # Errors
    /// The change cannot be, or the disk does not take it; then nothing changed.
    pub(super) fn change(
        &self,
        change: &SettingsChange,
        trial: Option<u64>,
        planner: &mut Planner,
        now: Now,
    ) -> Result<(), Problem> {
        let kept = self.kept.lock().clone();
        let settings = kept.settings.with(change, planner)?;
        if settings == kept.settings && trial.is_none() {
            return Ok(());
        }
        let before = kept.trial.as_ref().map_or(&kept.settings, |trial| &trial.before).clone();
        let until = |seconds| clock::wall().saturating_add(seconds);
        // A second trial goes back to what was before the first; a change that is meant to stay ends it.
        let trial = trial.map(|seconds| Trial { before, until: until(seconds) });
        let settings = self.keep(Kept { v: 1, settings, trial })?;
        planner.handle(Input::Routes(settings.wish()), now);
        Ok(())
    }

    /// What is on trial stays. False: nothing was.
    ///
    /// # Errors
    /// The disk does not take it.
    pub(super) fn confirm(&self) -> Result<bool, Problem> {
        let kept = self.kept.lock().clone();
        let there_was = kept.trial.is_some();
        self.keep(Kept { trial: None, ..kept })?;
        Ok(there_was)
    }

    /// Only the control thread makes changes, so nothing comes between what it read and what it writes; the lock is not
    /// held while the disk is waited for.
    fn keep(&self, next: Kept) -> Result<Settings, Problem> {
        let settings = next.settings.clone();
        if next != *self.kept.lock() {
            self.file.keep(&next)?;
            *self.kept.lock() = next;
            self.changed.send_replace(settings.clone());
            self.trial.notify_one();
        }
        Ok(settings)
    }

    /// Takes back what is not confirmed in time. Runs until it is aborted.
    pub(super) async fn watch_trials(self, planner: PlannerHandle) {
        loop {
            let until = self.kept.lock().trial.as_ref().map(|trial| trial.until);
            let over = async {
                match until {
                    Some(until) => tokio::time::sleep(Duration::from_secs(until.saturating_sub(clock::wall()))).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => {}
                () = self.trial.notified() => continue,
            }
            let desk = self.clone();
            let asked = planner.with(move |planner, now| desk.take_back(planner, now)).await;
            match asked {
                Ok(Ok(())) => {}
                Ok(Err(why)) => {
                    tracing::error!(code = why.code, "{}", why.text);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                // The daemon stops.
                Err(_) => return,
            }
        }
    }

    fn take_back(&self, planner: &mut Planner, now: Now) -> Result<(), Problem> {
        let trial = self.kept.lock().trial.clone();
        let Some(trial) = trial.filter(|trial| trial.until <= clock::wall()) else { return Ok(()) };
        tracing::warn!("the settings were not confirmed in time; they are as before again");
        let settings = self.keep(Kept { v: 1, settings: trial.before, trial: None })?;
        planner.handle(Input::Routes(settings.wish()), now);
        Ok(())
    }

    /// As people's scripts read it.
    pub(super) fn document(&self, planner: &Planner) -> SettingsDocument {
        let kept = self.kept.lock();
        let Settings { advertise_routes, advertise_exit_node, accept_routes, accept_dns, snat, .. } =
            kept.settings.clone();
        let name = |who: &IdentityKey| {
            planner.ledger().member_ever(who).map_or_else(|| who.node_id().to_string(), |m| m.name.clone())
        };
        let pending = planner.pending_routes().into_iter().map(|(text, hint)| format!("{text}; {hint}"));
        SettingsDocument {
            schema: version::LOCAL,
            advertise_routes,
            advertise_exit_node,
            accept_routes,
            accept_dns,
            snat,
            exit_node: kept.settings.exit_node.as_ref().map(name),
            exit_node_allow_lan_access: kept.settings.exit_node_allow_lan_access,
            kill_switch: kept.settings.kill_switch,
            relay: kept.settings.relay,
            relay_rate: kept.settings.relay_rate,
            on_event: kept.settings.on_event.as_ref().map(|program| program.display().to_string()),
            drain: kept.settings.drain,
            probes: kept.settings.probes.iter().map(|(p, t)| RouteProbe { prefix: *p, target: *t }).collect(),
            reverts_in_s: kept.trial.as_ref().map(|trial| trial.until.saturating_sub(clock::wall())),
            notes: pending.collect(),
        }
    }
}

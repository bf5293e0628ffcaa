//! What a person set this node up to do (`meshd up`, `meshd set`), kept over restarts in `settings.json`.

use std::sync::Arc;

use ipnet::IpNet;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::daemon::problem;
use crate::daemon::store::SettingsFile;
use crate::engine::io::{Input, RouteWish};
use crate::engine::planner::Planner;
use crate::link::ProxySetting;
use crate::time::Now;
use crate::trust::advert::MAX_ROUTES;
use crate::wire::local::{Problem, SettingsChange, SettingsDocument};
use crate::wire::version;

/// `settings.json`. What is missing in it has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// 1.
    pub v: u16,
    /// Prefixes this node leads to, once an admin approves.
    pub advertise_routes: Vec<IpNet>,
    /// Use the routes of others.
    pub accept_routes: bool,
    /// How the coordinator is reached; with a proxy's credentials. Given at the start only.
    pub proxy: ProxySetting,
}

impl Default for Settings {
    fn default() -> Self {
        Self { v: 1, advertise_routes: Vec::new(), accept_routes: true, proxy: ProxySetting::Auto }
    }
}

impl Settings {
    /// What the planner must know of it.
    #[must_use]
    pub fn wish(&self) -> RouteWish {
        RouteWish {
            advertise: self.advertise_routes.clone(),
            resting: Vec::new(),
            accept: self.accept_routes,
            exit_node: None,
        }
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
        if let Some(accept) = change.accept_routes {
            next.accept_routes = accept;
        }
        Ok(next)
    }

    /// As people's scripts read it.
    #[must_use]
    pub fn document(&self, notes: Vec<String>) -> SettingsDocument {
        SettingsDocument {
            schema: version::LOCAL,
            advertise_routes: self.advertise_routes.clone(),
            accept_routes: self.accept_routes,
            notes,
        }
    }
}

fn advertised(prefixes: &[IpNet], planner: &Planner) -> Result<Vec<IpNet>, Problem> {
    let mut list: Vec<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
    list.sort_unstable();
    list.dedup();
    if list.len() > MAX_ROUTES {
        return Err(problem(
            "too-many-routes",
            format!("a node can advertise {MAX_ROUTES} prefixes, and these are {}", list.len()),
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
    now: Arc<Mutex<Settings>>,
}

impl SettingsDesk {
    pub(super) fn new(file: SettingsFile, settings: Settings) -> Self {
        Self { file, now: Arc::new(Mutex::new(settings)) }
    }

    /// Makes a change: on disk first, then in the planner.
    ///
    /// # Errors
    /// The change cannot be, or the disk does not take it; then nothing changed.
    pub(super) fn change(&self, change: &SettingsChange, planner: &mut Planner, now: Now) -> Result<Settings, Problem> {
        let mut settings = self.now.lock();
        let next = settings.with(change, planner)?;
        if next != *settings {
            self.file.keep(&next)?;
            planner.handle(Input::Routes(next.wish()), now);
            settings.clone_from(&next);
        }
        Ok(next)
    }
}

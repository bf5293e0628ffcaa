//! Watches what surrounds the node: addresses and ways out of the machine, the coordinator's STUN servers, the NAT in front.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use crate::daemon::apply::{MTU, Surroundings, range_clash};
use crate::daemon::control_link::ControlHandle;
use crate::daemon::health::Health;
use crate::daemon::netcheck;
use crate::daemon::relay_thread::RelayHandle;
use crate::engine::io::{Input, LocalAddress};
use crate::link::Endpoint;
use crate::os::clock;
use crate::os::netlink::{Changes, Netlink, WayOut, candidates};
use crate::wire::control::StunServer;
use crate::wire::local::Severity;

/// STUN servers used, of those the coordinator names.
const MAX_SERVERS: usize = 8;
/// Pause after names that did not resolve, doubled each time up to the second.
const RESOLVE_AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// NAT checks by ourselves are at least this far apart.
const CHECK_EVERY: Duration = Duration::from_secs(20);

/// What a NAT check needs to know. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    around: Arc<Mutex<(Vec<SocketAddr>, Vec<IpAddr>)>>,
    /// Sockets that punches may open.
    pub(super) punch_sockets: u16,
}

impl Known {
    /// Nothing yet, but how many sockets punches may open.
    pub(super) fn new(punch_sockets: u16) -> Self {
        Self { punch_sockets, ..Self::default() }
    }

    /// STUN servers and local addresses.
    pub(super) fn get(&self) -> (Vec<SocketAddr>, Vec<IpAddr>) {
        self.around.lock().clone()
    }
}

/// Tells the planner the machine's addresses, now and whenever they or the ways out change (a machine may have the same address
/// in another network); then also doubts the links, and looks whether something new overlaps the mesh.
pub(super) struct NetworkWatch {
    pub(super) netlink: Netlink,
    pub(super) changes: Changes,
    /// Our own interface's number.
    pub(super) own: u32,
    /// The mesh's ranges.
    pub(super) ranges: Vec<IpNet>,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) nudge: Vec<Arc<Notify>>,
    pub(super) check: Arc<Notify>,
    pub(super) known: Known,
    pub(super) health: Health,
}

impl NetworkWatch {
    /// Runs until the planner is gone.
    pub(super) async fn run(mut self) {
        let mut last: Option<(Vec<LocalAddress>, Vec<WayOut>)> = None;
        loop {
            match Surroundings::look(&self.netlink, self.own).await {
                Ok(around) => {
                    match around.clash(&self.ranges) {
                        Some(what) => {
                            let problem = range_clash(&self.ranges, &what);
                            self.health.set("range-clash", Severity::Warning, problem.text, problem.hint);
                        }
                        None => self.health.clear("range-clash"),
                    }
                    let addresses = candidates(&around.addresses, self.own);
                    let ways = self.netlink.ways_out(self.own).await.unwrap_or_default();
                    let seen = (addresses, ways);
                    if last.as_ref() != Some(&seen) {
                        let (addresses, _) = &seen;
                        self.known.around.lock().1 = addresses.iter().map(|a| a.ip).collect();
                        let mut inputs = Vec::new();
                        if last.as_ref().is_none_or(|(before, _)| before != addresses) {
                            inputs.push(Input::Addresses(addresses.clone()));
                        }
                        // To the planner some of the addresses that come and go are all the same; another way out never is.
                        if last.as_ref().is_some_and(|(_, before)| *before != seen.1) {
                            inputs.push(Input::NetworkChanged);
                        }
                        if last.is_some() {
                            tracing::info!("the machine's addresses or ways out changed");
                            // The relay first: the planner is about to need it.
                            self.nudge.iter().for_each(|bell| bell.notify_one());
                            self.check.notify_one();
                        }
                        for input in inputs {
                            if self.inputs.send(input).await.is_err() {
                                return;
                            }
                        }
                        last = Some(seen);
                    }
                }
                Err(e) => tracing::warn!(code = e.code, "{}", e.text),
            }
            self.look_at_own().await;
            self.changes.next().await;
        }
    }
}

impl NetworkWatch {
    /// Somebody may have changed our own interface.
    async fn look_at_own(&self) {
        // One that is gone ends the daemon by way of the data thread.
        let Ok(Some(own)) = self.netlink.interface(self.own).await else { return };
        if own.up {
            self.health.clear("interface-down");
        } else {
            // Its IPv6 address went with it, so switching it on again would not be enough.
            let text = format!("the interface {} was switched off", own.name);
            self.health.set("interface-down", Severity::Error, text, "`meshd down`, then `meshd up`, makes it anew");
        }
        if own.mtu >= MTU {
            self.health.clear("mtu-changed");
        } else {
            let text = format!("the MTU of {} was changed to {}; the mesh has no IPv6 below {MTU}", own.name, own.mtu);
            let hint = format!("`sudo ip link set {} mtu {MTU}`", own.name);
            self.health.set("mtu-changed", Severity::Warning, text, hint);
        }
    }
}

/// Lets our own interface take what paths were found to take. Runs until nobody asks any more.
pub(super) async fn keep_mtu(netlink: Netlink, own: u32, mut wanted: watch::Receiver<u16>) {
    while wanted.changed().await.is_ok() {
        let mtu = u32::from(*wanted.borrow_and_update());
        match netlink.set_mtu(own, mtu).await {
            Ok(()) => tracing::info!(mtu, "a direct path takes longer packets: the interface's MTU was raised"),
            // Shorter packets do.
            Err(why) => tracing::warn!(mtu, %why, "the interface's MTU cannot be raised"),
        }
    }
}

/// Resolves the coordinator's STUN offers. Runs until the planner is gone.
pub(super) async fn resolve(
    mut offers: mpsc::Receiver<Vec<StunServer>>,
    url: String,
    inputs: mpsc::Sender<Input>,
    known: Known,
    check: Arc<Notify>,
    health: Health,
) {
    let own_host = Endpoint::parse(&url).map(|e| e.host).unwrap_or_default();
    let mut last = Vec::new();
    while let Some(mut offer) = offers.recv().await {
        let mut pause = RESOLVE_AGAIN.0;
        loop {
            let mut found: Vec<SocketAddr> = Vec::new();
            for server in offer.iter().take(MAX_SERVERS) {
                let host = server.host.as_deref().unwrap_or(&own_host);
                if let Ok(addresses) = tokio::net::lookup_host((host, server.port)).await {
                    let addresses: Vec<_> = addresses.collect();
                    // One of each family: more are the same server.
                    found.extend(addresses.iter().find(|a| a.is_ipv4()));
                    found.extend(addresses.iter().find(|a| a.is_ipv6()));
                }
            }
            found.truncate(MAX_SERVERS);
            if !found.is_empty() || offer.is_empty() {
                health.clear("stun-unresolved");
                if found != last {
                    known.around.lock().0.clone_from(&found);
                    check.notify_one();
                    last.clone_from(&found);
                }
                if inputs.send(Input::StunServers(found)).await.is_err() {
                    return;
                }
                break;
            }
            health.set(
                "stun-unresolved",
                Severity::Info,
                "the coordinator's name cannot be resolved on this machine, so its STUN servers are not asked: most peers will be relayed",
                "behind a proxy that resolves names this is as expected; otherwise check this machine's DNS",
            );
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(RESOLVE_AGAIN.1),
                newer = offers.recv() => match newer {
                    Some(newer) => (offer, pause) = (newer, RESOLVE_AGAIN.0),
                    None => return,
                },
            }
        }
    }
}

/// Checks the NAT when asked to by `check`, not too often, and tells the planner. Runs until the planner is gone.
pub(super) async fn check_nat(
    check: Arc<Notify>,
    known: Known,
    control: ControlHandle,
    relay: RelayHandle,
    inputs: mpsc::Sender<Input>,
) {
    let mut last = None;
    loop {
        check.notified().await;
        if let Some(last) = last {
            let passed = clock::now().since(last);
            tokio::time::sleep(CHECK_EVERY.saturating_sub(passed)).await;
        }
        let (servers, local) = known.get();
        if servers.is_empty() {
            continue;
        }
        last = Some(clock::now());
        let report = netcheck::run(servers, local, known.punch_sockets, &control, &relay).await;
        if inputs.send(Input::NetReport(Box::new(report))).await.is_err() {
            return;
        }
    }
}

//! Names on this machine: answers DNS questions about the network on the node's own mesh addresses, and has the system ask
//! there.
//!
//! What the answers are is [`crate::engine::names`]; this is its sockets ([`server`]), the way to other resolvers where the
//! system can be given only one ([`forward`]), and the system's settings ([`system`], [`resolv_conf`]).

mod forward;
pub(in crate::daemon) mod resolv_conf;
mod server;
pub(in crate::daemon) mod system;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;

use crate::daemon::footprint::Journal;
use crate::daemon::health::Health;
use crate::daemon::planner_task::PlannerHandle;
use crate::daemon::settings::Settings;
use crate::engine::io::Event;
use crate::engine::names::Zone;
use crate::engine::place::{Overlap, elsewhere};
use crate::os::netlink::Changes;
use crate::wire::local::Severity;

use server::Server;
use system::System;

/// The system's settings are looked at this often besides when the network changes: DHCP clients write `/etc/resolv.conf` anew.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What the task needs.
pub(super) struct Wiring {
    pub(super) planner: PlannerHandle,
    /// Our interface's name.
    pub(super) interface: String,
    /// Our addresses in the mesh.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) journal: Journal,
    pub(super) changes: Changes,
    pub(super) settings: watch::Receiver<Settings>,
    /// Routes that something on this machine goes before, and what.
    pub(super) shadowed: watch::Receiver<BTreeMap<IpNet, Overlap>>,
    pub(super) health: Health,
}

/// Runs until it is aborted. Undoing what outlives the process is the caller's, by the journal.
pub(super) async fn run(mut w: Wiring) {
    let zones = Zones { planner: w.planner.clone(), shadowed: Arc::default(), cached: Arc::default() };
    let mut events = w.planner.events();
    let Some(zone) = zones.current().await else { return };
    let local = local_address(&w.addresses);
    let served = Server::start(&w.addresses, local, &zones);
    match &served.problem {
        None => w.health.clear("names"),
        Some(why) => w.health.set("names", Severity::Warning, why.text.clone(), why.hint.clone()),
    }
    let mut system = System::new(&w.interface, &zone, served.addresses.clone(), served.local, w.journal.clone());
    loop {
        zones.go_before(&w.shadowed.borrow_and_update());
        let Some(zone) = zones.current().await else { return };
        system.ask_for(&zone);
        let wanted = w.settings.borrow_and_update().accept_dns;
        let set_up = system.settle(wanted).await;
        // With no way set up nothing is forwarded.
        served.forward_to(system.upstream());
        match set_up {
            Ok(()) => w.health.clear("names-system"),
            Err(why) => w.health.set("names-system", Severity::Info, why.text, why.hint),
        }
        let going_on = tokio::select! {
            changed = w.settings.changed() => changed.is_ok(),
            () = w.changes.next() => true,
            changed = names_change(&mut events) => changed,
            changed = w.shadowed.changed() => changed.is_ok(),
            () = tokio::time::sleep(LOOK_AGAIN) => true,
        };
        if !going_on {
            return;
        }
    }
}

/// Waits until there are other names, as often as that may have happened meanwhile. False: the daemon stops.
async fn names_change(events: &mut broadcast::Receiver<Event>) -> bool {
    loop {
        match events.recv().await {
            Ok(Event::NamesChanged) | Err(RecvError::Lagged(_)) => break,
            Ok(_) => {}
            Err(RecvError::Closed) => return false,
        }
    }
    while events.try_recv().is_ok() {}
    true
}

/// Where the system asks if it can be given only an address that is there always: one of the loopback network, made from the
/// mesh address so that several nodes on a machine have different ones. When the daemon is gone, questions to it are refused
/// at once, and the system asks the next server.
fn local_address(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|address| match address {
        IpAddr::V4(v4) => {
            let [_, b, c, d] = v4.octets();
            Some(Ipv4Addr::new(127, b, c, d))
        }
        IpAddr::V6(_) => None,
    })
}

/// The zone as the planner's ledger has it, made anew when that has grown.
#[derive(Debug, Clone)]
struct Zones {
    planner: PlannerHandle,
    /// Prefixes that something on this machine goes before.
    shadowed: Arc<Mutex<Arc<BTreeSet<IpNet>>>>,
    cached: Arc<Mutex<Option<Cached>>>,
}

/// A zone and its version.
type Cached = (u64, Arc<Zone>);

impl Zones {
    /// Takes note of what goes before routes on this machine: names there have other addresses then.
    fn go_before(&self, shadowed: &BTreeMap<IpNet, Overlap>) {
        let now = elsewhere(shadowed);
        let mut known = self.shadowed.lock();
        if **known != now {
            *known = Arc::new(now);
            *self.cached.lock() = None;
        }
    }

    /// `None`: the daemon is stopping.
    async fn current(&self) -> Option<Arc<Zone>> {
        let known = self.cached.lock().as_ref().map(|(version, _)| *version);
        let shadowed = Arc::clone(&self.shadowed.lock());
        let newer = self.planner.with(move |planner, _| planner.zone(known, &shadowed)).await.ok()?;
        let mut cached = self.cached.lock();
        if let Some((version, zone)) = newer {
            *cached = Some((version, Arc::new(zone)));
        }
        cached.as_ref().map(|(_, zone)| Arc::clone(zone))
    }
}

//! What the lab shows. One subject a file.

mod coordinator;
mod cost;
mod crowd;
mod daemon;
mod demonstration;
mod failover;
mod footprint;
mod guides;
mod hard;
mod healing;
mod hooks;
mod interop;
mod join;
mod large;
mod mistakes;
mod mtu;
mod names;
mod paths;
mod places;
mod portmap;
mod proxy;
mod relay;
mod routes;
mod secrecy;
mod services;
mod sites;
mod stun;
mod tcp;
mod upgrade;
mod why;

use crate::runner::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    let mut cases = join::cases();
    cases.extend(paths::cases());
    cases.extend(upgrade::cases());
    cases.extend(healing::cases());
    cases.extend(mtu::cases());
    cases.extend(portmap::cases());
    cases.extend(relay::cases());
    cases.extend(proxy::cases());
    cases.extend(hard::cases());
    cases.extend(crowd::cases());
    cases.extend(daemon::cases());
    cases.extend(routes::cases());
    cases.extend(failover::cases());
    cases.extend(places::cases());
    cases.extend(services::cases());
    cases.extend(sites::cases());
    cases.extend(guides::cases());
    cases.extend(hooks::cases());
    cases.extend(footprint::cases());
    cases.extend(coordinator::cases());
    cases.extend(secrecy::cases());
    cases.extend(stun::cases());
    cases.extend(tcp::cases());
    cases.extend(why::cases());
    cases.extend(names::cases());
    cases.extend(mistakes::cases());
    cases.extend(cost::cases());
    cases.extend(large::cases());
    cases.extend(interop::cases());
    cases.extend(demonstration::cases());
    cases
}

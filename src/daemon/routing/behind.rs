//! Looks whether the networks that this node leads to are reached, and has the planner say so ([`crate::engine::behind`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};

use crate::daemon::apply::Surroundings;
use crate::daemon::health::Health;
use crate::daemon::settings::Settings;
use crate::engine::behind::{Cut, Footing, Watch, Witness};
use crate::engine::io::{Input, RoutePlan};
use crate::os::clock;
use crate::os::netlink::{Changes, Neighbour, Netlink};
use crate::time::Now;
use crate::wire::local::Severity;

/// How often answers are looked for while a question is open.
const LOOK: Duration = Duration::from_millis(50);

/// What the task needs.
pub(in crate::daemon) struct Wiring {
    /// A connection of its own: one lists one thing at a time.
    pub(in crate::daemon) netlink: Netlink,
    pub(in crate::daemon) changes: Changes,
    /// Our interface's number.
    pub(in crate::daemon) index: u32,
    pub(in crate::daemon) plan: watch::Receiver<RoutePlan>,
    pub(in crate::daemon) settings: watch::Receiver<Settings>,
    pub(in crate::daemon) inputs: mpsc::Sender<Input>,
    pub(in crate::daemon) health: Health,
}

/// Runs until it is aborted.
pub(in crate::daemon) async fn run(mut w: Wiring) {
    let mut watch = Watch::default();
    let mut said: BTreeMap<IpNet, Cut> = BTreeMap::new();
    let mut known: Vec<Neighbour> = Vec::new();
    loop {
        let (plan, settings) = (w.plan.borrow_and_update().clone(), w.settings.borrow_and_update().clone());
        drained(&w.health, settings.drain && !plan.serving.is_empty());
        let serving: Vec<IpNet> = plan.serving.iter().filter(|prefix| prefix.prefix_len() > 0).copied().collect();
        match footings(&w, &serving, &plan, &settings).await {
            Some(footings) => watch.look(footings, clock::now()),
            // Nothing is known against anybody; the log says why.
            None => watch.look(BTreeMap::new(), clock::now()),
        }
        // Until something changes but the answers.
        loop {
            if !serving.is_empty()
                && let Ok(neighbours) = w.netlink.neighbours().await
            {
                let now = clock::now();
                let answers: Vec<(Witness, Now)> = neighbours.iter().filter_map(|n| answer(n, now)).collect();
                watch.answered(&answers, now);
                known = neighbours;
            }
            watch.handle_timeout(clock::now());
            while let Some(Witness { interface, ip }) = watch.poll_ask() {
                if let Err(error) = w.netlink.ask_neighbour(interface, ip, &known).await {
                    tracing::debug!(%error, %ip, "a neighbour cannot be asked");
                }
            }
            let cut: BTreeMap<IpNet, Cut> = watch.cut().collect();
            if cut != said {
                report(&w.health, &cut);
                let found: BTreeSet<IpNet> = cut.keys().copied().collect();
                let news = found.len() != said.len() || !found.iter().all(|prefix| said.contains_key(prefix));
                said = cut;
                // The planner is gone only when the daemon stops.
                if news && w.inputs.send(Input::Cut(found)).await.is_err() {
                    return;
                }
            }
            let due = async {
                match watch.poll_timeout() {
                    Some(next) => {
                        let left = next.since(clock::now());
                        tokio::time::sleep(if watch.is_waiting() { left.min(LOOK) } else { left }).await;
                    }
                    None => std::future::pending().await,
                }
            };
            // A sender that is gone means that the daemon stops.
            let going_on = tokio::select! {
                () = due => continue,
                changed = w.plan.changed() => changed.is_ok(),
                changed = w.settings.changed() => changed.is_ok(),
                () = w.changes.next() => true,
            };
            if !going_on {
                return;
            }
            break;
        }
    }
}

fn answer(neighbour: &Neighbour, now: Now) -> Option<(Witness, Now)> {
    let ago = u64::try_from(neighbour.answered?.as_micros()).ok()?;
    let witness = Witness { interface: neighbour.index, ip: neighbour.ip };
    Some((witness, Now(now.0.saturating_sub(ago))))
}

/// How this machine stands towards the networks it leads to. None: the kernel does not say.
async fn footings(
    w: &Wiring,
    serving: &[IpNet],
    plan: &RoutePlan,
    settings: &Settings,
) -> Option<BTreeMap<IpNet, Footing>> {
    if serving.is_empty() {
        w.health.clear("probe-not-a-neighbour");
        return Some(BTreeMap::new());
    }
    let around = Surroundings::look(&w.netlink, w.index).await;
    let around = around.inspect_err(|why| tracing::warn!(code = why.code, "{}", why.text)).ok()?;
    let carrier = w.netlink.with_carrier().await;
    let carrier = carrier.inspect_err(|error| tracing::warn!(%error, "links cannot be listed")).ok()?;
    let (mut footings, mut strangers) = (BTreeMap::new(), Vec::new());
    for prefix in serving {
        let mut leading = around.leading_to(prefix);
        if leading.is_empty() {
            let v6 = matches!(prefix, IpNet::V6(_));
            leading.extend(w.netlink.default_interfaces(v6).await.unwrap_or_default());
        }
        let interfaces: BTreeSet<u32> = leading.into_iter().filter(|index| carrier.contains(index)).collect();
        let named = settings.probes.get(prefix).and_then(|target| {
            let interface = around.on_link(*target);
            if interface.is_none() {
                strangers.push(target.to_string());
            }
            interface.filter(|index| interfaces.contains(index)).map(|interface| Witness { interface, ip: *target })
        });
        let others = plan.others.get(prefix).map(Vec::as_slice).unwrap_or_default();
        let near = others.iter().flat_map(|other| &other.lan).filter_map(|at| {
            let interface = around.on_link(at.ip()).filter(|index| interfaces.contains(index))?;
            Some(Witness { interface, ip: at.ip() })
        });
        let (fellows, shared) = (near.collect(), !others.is_empty());
        footings.insert(*prefix, Footing { interfaces, named, fellows, shared });
    }
    if strangers.is_empty() {
        w.health.clear("probe-not-a-neighbour");
    } else {
        let text = format!("{} cannot be probed: this machine is in no network with it", strangers.join(", "));
        let hint = "name a machine on the same link, such as the next router: `meshd set --probe CIDR=ADDRESS`";
        w.health.set("probe-not-a-neighbour", Severity::Warning, text, hint);
    }
    Some(footings)
}

fn report(health: &Health, cut: &BTreeMap<IpNet, Cut>) {
    let of = |why: Cut| {
        let list: Vec<String> = cut.iter().filter(|(_, w)| **w == why).map(|(p, _)| p.to_string()).collect();
        list.join(", ")
    };
    let (dark, silent) = (of(Cut::NoCarrier), of(Cut::Silent));
    let mut text = Vec::new();
    if !dark.is_empty() {
        text.push(format!("no interface with carrier leads to {dark}"));
    }
    if !silent.is_empty() {
        text.push(format!("nobody answers any more of those who did on {silent}"));
    }
    if text.is_empty() {
        health.clear("route-cut");
        return;
    }
    let hint = "check cable and switch; other nodes that lead there are asked meanwhile. Where machines only sleep, name one \
                that does not: `meshd set --probe CIDR=ADDRESS`";
    health.set("route-cut", Severity::Warning, text.join("; "), hint);
}

fn drained(health: &Health, drained: bool) {
    if drained {
        let text =
            "this node is drained: others are asked for what it leads to, and what was under way is still forwarded";
        health.set("drained", Severity::Info, text, "`meshd drain off` when the work is done");
    } else {
        health.clear("drained");
    }
}

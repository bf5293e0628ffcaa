//! Asks on the networks this machine is in whether they are those that subnet routers lead to, and answers such questions
//! ([`crate::engine::place`]). The sockets are open only while there is somebody to ask, or a network to answer on.

use std::collections::BTreeSet;
use std::future::pending;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

use crate::daemon::apply::Surroundings;
use crate::engine::io::{Input, RoutePlan};
use crate::engine::place::{Answerer, Arrival, Asker, Foot, Meetings, questions};
use crate::os::clock;
use crate::os::lan::{self, Arrived};
use crate::os::netlink::{Changes, Netlink};
use crate::trust::keys::Secret32;
use crate::wire::keys::{IdentityKey, NetworkId};
use crate::wire::same_lan::{QUESTION, TTL};

/// What the task needs.
pub(in crate::daemon) struct Wiring {
    /// A connection of its own: one lists one thing at a time.
    pub(in crate::daemon) netlink: Netlink,
    pub(in crate::daemon) changes: Changes,
    /// Our interface's number.
    pub(in crate::daemon) index: u32,
    pub(in crate::daemon) plan: watch::Receiver<RoutePlan>,
    pub(in crate::daemon) inputs: mpsc::Sender<Input>,
    /// Hears who was met where.
    pub(in crate::daemon) meetings: watch::Sender<Meetings>,
    pub(in crate::daemon) network: NetworkId,
    pub(in crate::daemon) me: IdentityKey,
    /// The identity's.
    pub(in crate::daemon) secret: Secret32,
    /// The port to answer at, if it is free.
    pub(in crate::daemon) port: u16,
}

/// Both families' sockets, while they are needed.
#[derive(Default)]
struct Sockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

/// Runs until it is aborted.
pub(in crate::daemon) async fn run(mut w: Wiring) {
    let mut asker = Asker::new(w.network, rand::random());
    let mut answerer = Answerer::new(w.network, w.me, w.secret);
    let mut sockets = Sockets::default();
    let mut said: Vec<SocketAddr> = Vec::new();
    loop {
        let plan = w.plan.borrow_and_update().clone();
        let feet = feet(&w.netlink, w.index).await.unwrap_or_default();
        let wanted = questions(&plan, &feet);
        let served = served(&plan, &feet);
        let families: BTreeSet<bool> =
            wanted.iter().map(|q| q.own.is_ipv4()).chain(served.iter().map(|f| f.address.ip.is_ipv4())).collect();
        sockets.keep(&families, w.port);
        let mut lan: Vec<SocketAddr> = served.iter().filter_map(|foot| sockets.at(foot)).collect();
        lan.sort_unstable();
        lan.dedup();
        if lan != said {
            said.clone_from(&lan);
            // The planner is gone only when the daemon stops.
            if w.inputs.send(Input::AnswersAt(lan)).await.is_err() {
                return;
            }
        }
        asker.look(&wanted, clock::now());
        // Until something changes but the answers.
        loop {
            asker.handle_timeout(clock::now());
            while let Some((question, bytes)) = asker.poll_output() {
                let Some(socket) = sockets.of(question.own.is_ipv4()) else { continue };
                if let Err(error) = lan::send(socket.as_fd(), &bytes, question.own, question.interface, question.asked)
                {
                    tracing::debug!(%error, "a router on this network cannot be asked");
                }
            }
            let meetings = asker.meetings();
            w.meetings.send_if_modified(|known| {
                let changed = *known != meetings;
                known.clone_from(&meetings);
                changed
            });
            let due = async {
                match asker.poll_timeout() {
                    Some(next) => tokio::time::sleep(next.since(clock::now())).await,
                    None => pending().await,
                }
            };
            let mut buffer = [0; QUESTION + 1];
            // A sender that is gone means that the daemon stops.
            let going_on = tokio::select! {
                () = due => continue,
                (arrived, socket) = sockets.receive(&mut buffer) => {
                    let Ok(port) = socket.local_addr().map(|at| at.port()) else { continue };
                    let Arrived { from, to, interface, ttl, len } = arrived;
                    let arrival = Arrival { from, to: SocketAddr::new(to, port), interface, ttl };
                    let bytes = buffer.get(..len).unwrap_or_default();
                    if asker.heard(&arrival, bytes, clock::now()) {
                        tracing::info!(interface, "a router of the mesh is on this very network");
                    } else if let Some(answer) = answerer.answer(&arrival, bytes, &served, clock::now())
                        && let Err(error) = lan::send(socket.as_fd(), &answer, to, interface, from)
                    {
                        tracing::debug!(%error, "somebody on this network cannot be answered");
                    }
                    continue;
                }
                changed = w.plan.changed() => changed.is_ok(),
                () = w.changes.next() => true,
            };
            if !going_on {
                return;
            }
            break;
        }
    }
}

/// Where this machine stands, with carrier.
async fn feet(netlink: &Netlink, own: u32) -> Option<Vec<Foot>> {
    let around = Surroundings::look(netlink, own).await.ok()?;
    let carrier = netlink.with_carrier().await.ok()?;
    let usable = |foot: &Foot| {
        let ip = foot.address.ip;
        let linked = match ip {
            std::net::IpAddr::V4(ip) => ip.is_link_local(),
            std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        carrier.contains(&foot.interface) && !ip.is_loopback() && !linked
    };
    let feet = around.addresses.iter().map(|a| Foot { interface: a.index, address: a.address });
    Some(feet.filter(usable).collect())
}

/// Those in networks that this node leads to.
fn served(plan: &RoutePlan, feet: &[Foot]) -> Vec<Foot> {
    let leads = |foot: &&Foot| {
        foot.net().is_some_and(|net| {
            let touches = |p: &&ipnet::IpNet| p.prefix_len() > 0 && (p.contains(&net) || net.contains(*p));
            plan.serving.iter().any(|p| touches(&p))
        })
    };
    feet.iter().filter(leads).copied().collect()
}

impl Sockets {
    /// Opens and closes.
    fn keep(&mut self, families: &BTreeSet<bool>, port: u16) {
        for v4 in [true, false] {
            let slot = if v4 { &mut self.v4 } else { &mut self.v6 };
            if !families.contains(&v4) {
                *slot = None;
            } else if slot.is_none() {
                let open = |port| lan::socket(v4, port, TTL).and_then(UdpSocket::from_std);
                match open(port).or_else(|_| open(0)) {
                    Ok(socket) => *slot = Some(socket),
                    Err(error) => tracing::warn!(%error, "no socket to ask this network with"),
                }
            }
        }
    }

    const fn of(&self, v4: bool) -> Option<&UdpSocket> {
        if v4 { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// Where it answers.
    fn at(&self, foot: &Foot) -> Option<SocketAddr> {
        let port = self.of(foot.address.ip.is_ipv4())?.local_addr().ok()?.port();
        Some(SocketAddr::new(foot.address.ip, port))
    }

    async fn receive(&self, buffer: &mut [u8; QUESTION + 1]) -> (Arrived, &UdpSocket) {
        loop {
            let v4 = tokio::select! {
                () = wait(self.v4.as_ref()) => true,
                () = wait(self.v6.as_ref()) => false,
            };
            let Some(socket) = self.of(v4) else { continue };
            // Errors are of datagrams sent before: whoever is not there does not answer.
            if let Ok(Some(arrived)) = socket.try_io(Interest::READABLE, || lan::receive(socket.as_fd(), buffer)) {
                return (arrived, socket);
            }
        }
    }
}

/// Waits until there is something in it; without one, for ever.
async fn wait(socket: Option<&UdpSocket>) {
    match socket {
        Some(socket) => {
            if let Err(error) = socket.readable().await {
                tracing::debug!(%error, "a socket cannot be waited for");
                pending().await
            }
        }
        None => pending().await,
    }
}

//! Runs the engine's NAT check on sockets of its own, so that the node's mappings are not disturbed.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{Interest, ReadBuf};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::daemon::control_link::ControlHandle;
use crate::daemon::relay_thread::RelayHandle;
use crate::engine::lifetime::{self, LifetimeTest};
use crate::engine::netcheck::{HOPS, LIMIT, Netcheck, nat_depth};
use crate::os::{clock, hops, udp};
use crate::wire::local;
use crate::wire::nat::UdpLifetime;
use crate::wire::stun::{self, Change, TransactionId};

/// How long to wait for the links' round trips.
const RTT_PATIENCE: Duration = Duration::from_secs(2);

/// How long routers may take to say that a datagram died there.
const HOP_PATIENCE: Duration = Duration::from_millis(800);
/// Servers a person may name for one check.
const MAX_NAMED: usize = 4;
/// Where STUN servers listen (RFC 8489 section 8.1).
const STUN_PORT: u16 = 3478;
/// How long to wait for a name server.
const DNS_PATIENCE: Duration = Duration::from_secs(3);

/// Asks `servers` and both links. Takes at most as long as [`LIMIT`] and a little.
pub(super) async fn run(
    servers: Vec<SocketAddr>,
    local: Vec<IpAddr>,
    punch_sockets: u16,
    control: &ControlHandle,
    relay: &RelayHandle,
) -> local::Netcheck {
    let server = servers.iter().copied().find(SocketAddr::is_ipv4);
    let (mut report, nat_depth, control_rtt, relay_rtt) = tokio::join!(
        check(servers, local, punch_sockets),
        depth(server),
        control.rtt(RTT_PATIENCE),
        relay.rtt(RTT_PATIENCE)
    );
    report.nat_depth = nat_depth;
    let millis = |rtt: Duration| (rtt.as_secs_f64() * 1e5).round() / 100.0;
    report.coordinator_rtt_ms = control_rtt.map(millis);
    report.relay_rtt_ms = relay_rtt.map(millis);
    report
}

/// How long the NAT keeps an idle UDP mapping, asked of the first server with an IPv4 address. Takes at most as long as
/// [`lifetime::LIMIT`]; None: there is no such server, or it cannot tell.
pub(super) async fn udp_lifetime(servers: &[SocketAddr]) -> Option<UdpLifetime> {
    let server = servers.iter().copied().find(SocketAddr::is_ipv4)?;
    let mut sockets = Sockets::default();
    let mut machine = LifetimeTest::new(server, rand::random(), clock::now());
    let deadline = clock::now() + lifetime::LIMIT;
    let mut buffer = [0; 1500];
    loop {
        while let Some((slot, to, bytes)) = machine.poll_transmit() {
            if let Some((socket, _)) = sockets.get(slot, false) {
                // An unreachable server is one that does not answer.
                let _ = socket.send_to(&bytes, to).await;
            }
        }
        let now = clock::now();
        let Some(at) = machine.poll_timeout().filter(|_| now < deadline) else { return machine.finish() };
        if at <= now {
            machine.handle_timeout(now);
            continue;
        }
        tokio::select! {
            (slot, from, len) = sockets.receive(&mut buffer) => {
                machine.handle_datagram(slot, from, &buffer[..len], clock::now());
            }
            () = tokio::time::sleep(at.since(now)) => {}
        }
    }
}

/// The addresses of STUN servers that a person named.
///
/// # Errors
/// `stun-server` for a name that cannot be used or resolved.
pub(super) async fn resolve(named: &[String]) -> Result<Vec<SocketAddr>, local::Problem> {
    let mut servers = Vec::new();
    for name in named.iter().take(MAX_NAMED) {
        let target = match name.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, STUN_PORT).to_string(),
            Err(_) if name.contains(':') => name.clone(),
            Err(_) => format!("{name}:{STUN_PORT}"),
        };
        let found = match timeout(DNS_PATIENCE, tokio::net::lookup_host(target)).await {
            Ok(Ok(found)) => found.collect::<Vec<_>>(),
            Ok(Err(e)) => return Err(unusable(name, &e.to_string())),
            Err(_) => return Err(unusable(name, "the name server does not answer")),
        };
        servers.extend(found);
    }
    Ok(servers)
}

fn unusable(name: &str, why: &str) -> local::Problem {
    local::Problem {
        code: "stun-server".into(),
        text: format!("the STUN server {name:?} cannot be used: {why}"),
        hint: "give HOST or HOST:PORT, for example stun.example.org:3478".into(),
    }
}

/// How many NATs are in front of this machine, by what the routers on the way to a server answer.
async fn depth(server: Option<SocketAddr>) -> Option<u8> {
    let server = server?;
    let mut hops = [None; HOPS as usize];
    let [first, second, third, fourth] = &mut hops;
    let ask = |number: u8| async move { timeout(HOP_PATIENCE, hop(number, server)).await.ok().flatten() };
    (*first, *second, *third, *fourth) = tokio::join!(ask(1), ask(2), ask(3), ask(4));
    tracing::debug!(?hops, "routers on the way to the STUN server");
    nat_depth(&hops)
}

/// The router at which a datagram with this time to live dies.
async fn hop(number: u8, server: SocketAddr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::from_std(hops::dying_at(number).ok()?).ok()?;
    let question = stun::binding_request(&TransactionId(rand::random()), Change::default());
    socket.send_to(&question, server).await.ok()?;
    let told = || hops::died_at(socket.as_fd()).ok_or_else(|| ErrorKind::WouldBlock.into());
    socket.async_io(Interest::ERROR, told).await.ok()
}

async fn check(servers: Vec<SocketAddr>, local: Vec<IpAddr>, punch_sockets: u16) -> local::Netcheck {
    let mut sockets = Sockets::default();
    let mut machine = Netcheck::new(servers, rand::random(), clock::now());
    machine.set_local_addresses(local);
    machine.set_extra_sockets(punch_sockets);
    let deadline = clock::now() + LIMIT + Duration::from_millis(500);
    let mut buffer = [0; 1500];
    loop {
        while let Some((slot, to, bytes)) = machine.poll_transmit() {
            if let Some((socket, port)) = sockets.get(slot, !slot.is_ipv4()) {
                machine.set_local_port(slot, port);
                // An unreachable server is one that does not answer.
                let _ = socket.send_to(&bytes, to).await;
            }
        }
        let now = clock::now();
        let Some(at) = machine.poll_timeout().filter(|_| now < deadline) else { return machine.finish() };
        if at <= now {
            machine.handle_timeout(now);
            continue;
        }
        tokio::select! {
            (slot, from, len) = sockets.receive(&mut buffer) => {
                machine.handle_datagram(slot, from, &buffer[..len], clock::now());
            }
            () = tokio::time::sleep(at.since(now)) => {}
        }
    }
}

/// The sockets of a check, each opened when it is first needed.
struct Sockets<S>(BTreeMap<S, Option<(UdpSocket, u16)>>);

impl<S> Default for Sockets<S> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<S: Ord + Copy> Sockets<S> {
    /// The slot's socket and its port; `None`: it cannot be opened, so its questions stay unanswered.
    fn get(&mut self, slot: S, v6: bool) -> Option<(&UdpSocket, u16)> {
        let open = || {
            let socket = udp::scratch(v6).and_then(UdpSocket::from_std).ok()?;
            let port = socket.local_addr().ok()?.port();
            Some((socket, port))
        };
        self.0.entry(slot).or_insert_with(open).as_ref().map(|(socket, port)| (socket, *port))
    }

    /// The next datagram on any of them.
    async fn receive(&self, buffer: &mut [u8]) -> (S, SocketAddr, usize) {
        poll_fn(|cx| {
            for (slot, socket) in &self.0 {
                let Some((socket, _)) = socket else { continue };
                let mut into = ReadBuf::new(buffer);
                // An error is one that another host caused; the socket goes on.
                while let Poll::Ready(received) = socket.poll_recv_from(cx, &mut into) {
                    if let Ok(from) = received {
                        return Poll::Ready((*slot, from, into.filled().len()));
                    }
                }
            }
            Poll::Pending
        })
        .await
    }
}

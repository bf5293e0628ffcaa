//! Runs the engine's NAT check on sockets of its own, so that the node's mappings are not disturbed.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;

use crate::daemon::control_link::ControlHandle;
use crate::daemon::relay_thread::RelayHandle;
use crate::engine::netcheck::{LIMIT, Netcheck, SocketSlot};
use crate::os::{clock, udp};
use crate::wire::local;

/// The sockets a check uses.
const SLOTS: [SocketSlot; 4] =
    [SocketSlot::MappingV4, SocketSlot::MappingV6, SocketSlot::FilteringV4, SocketSlot::FilteringV6];
/// How long to wait for the links' round trips.
const RTT_PATIENCE: Duration = Duration::from_secs(2);

/// Asks `servers` and both links. Takes at most as long as [`LIMIT`] and a little.
pub(super) async fn run(
    servers: Vec<SocketAddr>,
    local: Vec<IpAddr>,
    control: &ControlHandle,
    relay: &RelayHandle,
) -> local::Netcheck {
    let (mut report, control_rtt, relay_rtt) =
        tokio::join!(check(servers, local), control.rtt(RTT_PATIENCE), relay.rtt(RTT_PATIENCE));
    let millis = |rtt: Duration| (rtt.as_secs_f64() * 1e5).round() / 100.0;
    report.coordinator_rtt_ms = control_rtt.map(millis);
    report.relay_rtt_ms = relay_rtt.map(millis);
    report
}

async fn check(servers: Vec<SocketAddr>, local: Vec<IpAddr>) -> local::Netcheck {
    // A family that is missing has no sockets, and its questions stay unanswered.
    let sockets = SLOTS.map(|slot| udp::scratch(!slot.is_ipv4()).and_then(UdpSocket::from_std).ok());
    let mut machine = Netcheck::new(servers, rand::random(), clock::now());
    machine.set_local_addresses(local);
    let deadline = clock::now() + LIMIT + Duration::from_millis(500);
    loop {
        while let Some((slot, to, bytes)) = machine.poll_transmit() {
            if let Some(Some(socket)) = SLOTS.iter().position(|s| *s == slot).map(|n| &sockets[n]) {
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
        let [a, b, c, d] = &sockets;
        let (mut ba, mut bb, mut bc, mut bd) = ([0; 1500], [0; 1500], [0; 1500], [0; 1500]);
        let received = tokio::select! {
            r = receive(a.as_ref(), &mut ba) => r.map(|(len, from)| (SLOTS[0], from, &ba[..len])),
            r = receive(b.as_ref(), &mut bb) => r.map(|(len, from)| (SLOTS[1], from, &bb[..len])),
            r = receive(c.as_ref(), &mut bc) => r.map(|(len, from)| (SLOTS[2], from, &bc[..len])),
            r = receive(d.as_ref(), &mut bd) => r.map(|(len, from)| (SLOTS[3], from, &bd[..len])),
            () = tokio::time::sleep(at.since(now)) => None,
        };
        if let Some((slot, from, bytes)) = received {
            machine.handle_datagram(slot, from, bytes, clock::now());
        }
    }
}

/// `None`: an error that another host caused; the socket goes on.
async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
    match socket {
        Some(socket) => socket.recv_from(buffer).await.ok(),
        None => std::future::pending().await,
    }
}

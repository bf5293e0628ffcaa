//! The UDP sockets, and what is answered on them to STUN requests. The answer leaves from the address the request came
//! to, or from the one it asked for, also on sockets bound to every address of the machine. The thread that serves the
//! sockets is [`crate::server::udp_relay`]'s.
//!
//! Telling all kinds of NAT apart takes two addresses and two ports (RFC 5780 section 3). Sockets bound to every address
//! offer a second one if the machine has two public IPv4 addresses; a private one could be meaningless to whoever asks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::ifaddrs::getifaddrs;

use crate::coord::limits::{Grain, Rate, SourceLimiter};
use crate::os::server_socket::ServerSocket;
use crate::server::listener::is_missing_family;
use crate::time::Now;
use crate::wire::local::Problem;
use crate::wire::stun::{self, ServerLayout};

/// Requests answered to one site: enough for many nodes behind one address, too few to make a useful reflector.
const RATE: Rate = Rate { burst: 500, every: std::time::Duration::from_millis(5) };
/// Sites remembered.
const SOURCES: usize = 16_384;

/// Opens a socket for each address. An IPv6 wildcard takes IPv4 too; on a machine without IPv6 it becomes the IPv4 one.
///
/// # Errors
/// `stun-listen`.
pub(super) fn bind(addresses: &[SocketAddr]) -> Result<Vec<ServerSocket>, Problem> {
    addresses.iter().map(|a| bind_one(*a).map_err(|e| refused(*a, &e))).collect()
}

fn bind_one(address: SocketAddr) -> io::Result<ServerSocket> {
    match ServerSocket::bind(address) {
        Err(e) if is_missing_family(&e) && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            ServerSocket::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        result => result,
    }
}

fn refused(address: SocketAddr, e: &io::Error) -> Problem {
    let hint = match e.kind() {
        io::ErrorKind::AddrInUse => {
            "another program (a STUN server?) has that UDP port: stop it, or choose others with --stun-listen ADDR:PORT"
        }
        io::ErrorKind::PermissionDenied => "run as root, or choose ports from 1024 on with --stun-listen ADDR:PORT",
        _ => "give an address of this machine with --stun-listen ADDR:PORT",
    };
    Problem { code: "stun-listen".into(), text: format!("STUN cannot listen on UDP {address}: {e}"), hint: hint.into() }
}

/// Answers STUN requests.
#[derive(Debug)]
pub(super) struct Stun {
    bound: Vec<SocketAddr>,
    /// The machine's public IPv4 addresses, in order.
    public: Vec<Ipv4Addr>,
    limiter: SourceLimiter,
}

impl Stun {
    /// A server on these sockets.
    pub(super) fn new(sockets: &[ServerSocket]) -> Self {
        let bound = sockets.iter().map(ServerSocket::bound).collect();
        Self { bound, public: public_addresses(), limiter: SourceLimiter::new(RATE, Grain::SITE, SOURCES) }
    }

    /// Answers a request that came from `source` to our address `local` on the socket with this index.
    pub(super) fn answer(
        &mut self,
        sockets: &[ServerSocket],
        index: usize,
        request: &[u8],
        source: SocketAddr,
        local: IpAddr,
        now: Now,
    ) {
        let Some(bound) = self.bound.get(index) else { return };
        let received_on = SocketAddr::new(local, bound.port());
        if !self.limiter.allow(source.ip(), now) {
            tracing::trace!("STUN request over the rate of its site");
            return;
        }
        let layout = ServerLayout { endpoints: self.endpoints(local) };
        let Some(answer) = stun::answer(request, source, received_on, &layout) else { return };
        let from = self.bound.iter().position(|bound| has(bound, answer.send_from));
        let Some(socket) = from.and_then(|from| sockets.get(from)) else { return };
        let to = SocketAddr::new(source.ip(), answer.port);
        // A full buffer loses an answer, as the network might have.
        if let Err(e) = socket.send(to, answer.send_from.ip(), &answer.bytes) {
            tracing::trace!(error = %e, "STUN answer not sent");
        }
    }

    /// The addresses by which somebody who reached one of our sockets at `local` reaches all of them.
    fn endpoints(&self, local: IpAddr) -> Vec<SocketAddr> {
        let second = match local {
            IpAddr::V4(first) if self.public.contains(&first) => self.public.iter().find(|ip| **ip != first),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        let of = |bound: &SocketAddr| {
            let ips = match bound.ip() {
                ip if ip.is_unspecified() => [Some(local), second.copied().map(IpAddr::V4)],
                ip => [Some(ip), None],
            };
            ips.into_iter().flatten().map(|ip| SocketAddr::new(ip, bound.port())).collect::<Vec<_>>()
        };
        self.bound.iter().flat_map(of).collect()
    }
}

/// A socket bound so can send from this address.
fn has(bound: &SocketAddr, endpoint: SocketAddr) -> bool {
    bound.port() == endpoint.port() && (bound.ip().is_unspecified() || bound.ip() == endpoint.ip())
}

fn public_addresses() -> Vec<Ipv4Addr> {
    let mut addresses: Vec<Ipv4Addr> = getifaddrs()
        .into_iter()
        .flatten()
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .filter(|ip| is_public(*ip))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Not one of the ranges that mean something else elsewhere: RFC 1918, RFC 6598, loopback, link-local.
const fn is_public(ip: Ipv4Addr) -> bool {
    let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
    !(ip.is_private() || shared || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcard_sockets_offer_a_second_public_address_and_no_private_one() {
        let sockets = bind(&["0.0.0.0:0".parse().unwrap()]).unwrap();
        let mut stun = Stun::new(&sockets);
        stun.public = vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()];
        let port = sockets[0].bound().port();
        let ips = |local: &str| -> Vec<String> {
            let endpoints = stun.endpoints(local.parse().unwrap());
            assert!(endpoints.iter().all(|e| e.port() == port));
            endpoints.iter().map(|e| e.ip().to_string()).collect()
        };
        assert_eq!(ips("192.0.2.1"), ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(ips("192.0.2.2"), ["192.0.2.2", "192.0.2.1"]);
        assert_eq!(ips("10.0.0.1"), ["10.0.0.1"]);
        for private in ["10.1.2.3", "192.168.1.1", "100.64.0.1", "100.127.0.1", "127.0.0.1", "169.254.1.1"] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        assert!(is_public("100.128.0.1".parse().unwrap()) && is_public("203.0.113.1".parse().unwrap()));
    }

    #[test]
    fn a_port_in_use_gets_a_sentence_and_a_hint() {
        let at: Vec<SocketAddr> =
            bind(&["127.0.0.1:0".parse().unwrap()]).unwrap().iter().map(ServerSocket::bound).collect();
        let taken = ServerSocket::bind(at[0]);
        assert!(taken.is_ok(), "free again");
        let problem = bind(&at).unwrap_err();
        assert_eq!(problem.code, "stun-listen");
        assert!(problem.text.contains(&at[0].to_string()) && problem.hint.contains("--stun-listen"));
    }
}

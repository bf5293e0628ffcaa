//! STUN: UDP in, [`stun::answer`], UDP out. The answer leaves from the address the request came to, or from the one it
//! asked for, also on sockets bound to every address of the machine.
//!
//! Telling all kinds of NAT apart takes two addresses and two ports (RFC 5780 section 3). Sockets bound to every address
//! offer a second one if the machine has two public IPv4 addresses; a private one could be meaningless to whoever asks.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::coord::limits::{Grain, Rate, SourceLimiter};
use crate::os::clock;
use crate::server::listener::is_missing_family;
use crate::wire::local::Problem;
use crate::wire::stun::{self, ServerLayout};

/// Requests answered to one site: enough for many nodes behind one address, too few to make a useful reflector.
const RATE: Rate = Rate { burst: 500, every: std::time::Duration::from_millis(5) };
/// Sites remembered.
const SOURCES: usize = 16_384;

/// All STUN sockets of the coordinator.
#[derive(Debug)]
pub(super) struct StunSockets {
    sockets: Vec<StunSocket>,
    /// The machine's public IPv4 addresses, in order.
    public: Vec<Ipv4Addr>,
    limiter: Mutex<SourceLimiter>,
}

#[derive(Debug)]
struct StunSocket {
    udp: UdpSocket,
    bound: SocketAddr,
}

impl StunSockets {
    /// Opens a socket for each address. An IPv6 wildcard takes IPv4 too; on a machine without IPv6 it becomes the IPv4
    /// one.
    ///
    /// # Errors
    /// `stun-listen`.
    pub(super) fn bind(addresses: &[SocketAddr]) -> Result<Arc<Self>, Problem> {
        let sockets = addresses.iter().map(|a| bind(*a).map_err(|e| refused(*a, &e))).collect::<Result<_, _>>()?;
        let limiter = Mutex::new(SourceLimiter::new(RATE, Grain::SITE, SOURCES));
        Ok(Arc::new(Self { sockets, public: public_addresses(), limiter }))
    }

    /// The addresses the sockets are bound to.
    #[must_use]
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|s| s.bound).collect()
    }

    /// Answers on the socket with this index until `stop` changes.
    pub(super) async fn serve(self: Arc<Self>, index: usize, mut stop: watch::Receiver<bool>) {
        let Some(socket) = self.sockets.get(index) else { return };
        let mut buffer = [0; stun::MAX_REQUEST + 1];
        loop {
            let received = tokio::select! {
                received = socket.receive(&mut buffer) => received,
                _ = stop.changed() => return,
            };
            match received {
                Ok((len, source, local)) => self.answer(socket, buffer.get(..len).unwrap_or_default(), source, local),
                // An ICMP error for an earlier answer, or no memory for a moment: neither is a reason to stop.
                Err(e) => tracing::debug!(error = %e, "STUN socket"),
            }
        }
    }

    /// The addresses by which somebody who reached one of our sockets at `local` reaches all of them.
    fn endpoints(&self, local: IpAddr) -> Vec<SocketAddr> {
        let second = match local {
            IpAddr::V4(first) if self.public.contains(&first) => self.public.iter().find(|ip| **ip != first),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        let of = |socket: &StunSocket| {
            let ips = match socket.bound.ip() {
                ip if ip.is_unspecified() => [Some(local), second.copied().map(IpAddr::V4)],
                ip => [Some(ip), None],
            };
            ips.into_iter().flatten().map(|ip| SocketAddr::new(ip, socket.bound.port())).collect::<Vec<_>>()
        };
        self.sockets.iter().flat_map(of).collect()
    }

    fn answer(&self, socket: &StunSocket, request: &[u8], source: SocketAddr, local: IpAddr) {
        let received_on = SocketAddr::new(local, socket.bound.port());
        if !self.limiter.lock().allow(source.ip(), clock::now()) {
            tracing::trace!("STUN request over the rate of its site");
            return;
        }
        let layout = ServerLayout { endpoints: self.endpoints(local) };
        let Some(answer) = stun::answer(request, source, received_on, &layout) else { return };
        let Some(from) = self.sockets.iter().find(|s| s.has(answer.send_from)) else { return };
        // A full buffer loses an answer, as the network might have.
        if let Err(e) = from.send(&answer.bytes, source, answer.send_from.ip()) {
            tracing::trace!(error = %e, "STUN answer not sent");
        }
    }
}

impl StunSocket {
    /// The socket can send from this address.
    fn has(&self, endpoint: SocketAddr) -> bool {
        let ip = self.bound.ip();
        self.bound.port() == endpoint.port() && (ip.is_unspecified() || ip == endpoint.ip())
    }

    /// The next datagram: its length, who sent it, and to which of our addresses.
    async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, IpAddr)> {
        self.udp
            .async_io(Interest::READABLE, || {
                let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
                let mut iov = [IoSliceMut::new(buffer)];
                let message = recvmsg::<SockaddrStorage>(
                    self.udp.as_raw_fd(),
                    &mut iov,
                    Some(&mut control),
                    MsgFlags::MSG_DONTWAIT,
                )?;
                let source = message.address.as_ref().and_then(to_socket_addr).ok_or(io::ErrorKind::InvalidData)?;
                let local = message.cmsgs()?.find_map(|c| local_address(&c)).unwrap_or_else(|| self.bound.ip());
                Ok((message.bytes, source, local.to_canonical()))
            })
            .await
    }

    fn send(&self, bytes: &[u8], to: SocketAddr, from: IpAddr) -> io::Result<()> {
        let iov = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let to = SockaddrStorage::from(to);
        let fd = self.udp.as_raw_fd();
        match (self.bound.ip(), from) {
            (IpAddr::V6(_), from) => {
                let from = match from {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let info = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: from.octets() }, ipi6_ifindex: 0 };
                sendmsg(fd, &iov, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to))?;
            }
            (IpAddr::V4(_), IpAddr::V4(from)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                sendmsg(fd, &iov, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to))?;
            }
            (IpAddr::V4(_), IpAddr::V6(_)) => return Err(io::ErrorKind::AddrNotAvailable.into()),
        }
        Ok(())
    }
}

fn to_socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the kernel's list of control messages is open-ended")]
fn local_address(message: &ControlMessageOwned) -> Option<IpAddr> {
    match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes())),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
        _ => None,
    }
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

fn bind(address: SocketAddr) -> io::Result<StunSocket> {
    match bind_exactly(address) {
        Err(e) if is_missing_family(&e) && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            bind_exactly(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        result => result,
    }
}

fn bind_exactly(address: SocketAddr) -> io::Result<StunSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    socket.bind(&address.into())?;
    let udp = UdpSocket::from_std(socket.into())?;
    let bound = udp.local_addr()?;
    Ok(StunSocket { udp, bound })
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::wire::stun::{Change, TransactionId, binding_request, decode_binding_response};

    async fn ask(server: SocketAddr, change: Change) -> (SocketAddr, stun::BindingResponse, SocketAddr) {
        let any = SocketAddr::new(if server.is_ipv4() { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() }, 0);
        let client = UdpSocket::bind(any).await.unwrap();
        client.send_to(&binding_request(&TransactionId([7; 12]), change), server).await.unwrap();
        let mut buffer = [0; 1500];
        let (len, from) = timeout(Duration::from_secs(5), client.recv_from(&mut buffer)).await.unwrap().unwrap();
        (from, decode_binding_response(&buffer[..len]).unwrap(), client.local_addr().unwrap())
    }

    fn start(addresses: &[SocketAddr]) -> (Vec<SocketAddr>, watch::Sender<bool>) {
        let (stop, stopped) = watch::channel(false);
        let sockets = StunSockets::bind(addresses).unwrap();
        for index in 0..addresses.len() {
            tokio::spawn(Arc::clone(&sockets).serve(index, stopped.clone()));
        }
        (sockets.addresses(), stop)
    }

    #[tokio::test]
    async fn answers_come_from_where_they_are_asked_to_come_from() {
        let (at, _stop) =
            start(&["127.0.0.1:0".parse().unwrap(), "127.0.0.2:0".parse().unwrap(), "127.0.0.1:0".parse().unwrap()]);
        let (from, response, me) = ask(at[0], Change::default()).await;
        assert_eq!((from, response.mapped), (at[0], me));
        assert_eq!(response.other, Some(at[1]));
        let (from, _, _) = ask(at[0], Change { ip: true, port: true }).await;
        assert_eq!(from, at[1]);
        let (from, _, _) = ask(at[0], Change { ip: false, port: true }).await;
        assert_eq!(from, at[2]);
    }

    #[tokio::test]
    async fn a_wildcard_socket_answers_from_the_address_that_was_asked() {
        for wildcard in ["[::]:0", "0.0.0.0:0"] {
            let (at, _stop) = start(&[wildcard.parse().unwrap(), wildcard.parse().unwrap()]);
            // 127.0.0.3 is not what the kernel would choose by itself.
            let asked = SocketAddr::new([127, 0, 0, 3].into(), at[0].port());
            let (from, response, me) = ask(asked, Change::default()).await;
            assert_eq!((from, response.mapped), (asked, me), "{wildcard}");
            let (from, _, _) = ask(asked, Change { ip: false, port: true }).await;
            assert_eq!(from, SocketAddr::new(asked.ip(), at[1].port()), "{wildcard}");
        }
    }

    #[tokio::test]
    async fn wildcard_sockets_offer_a_second_public_address_and_no_private_one() {
        let wildcard: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let mut sockets = Arc::into_inner(StunSockets::bind(&[wildcard]).unwrap()).unwrap();
        sockets.public = vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()];
        let port = sockets.addresses()[0].port();
        let ips = |local: &str| -> Vec<String> {
            let endpoints = sockets.endpoints(local.parse().unwrap());
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

    #[tokio::test]
    async fn a_port_in_use_gets_a_sentence_and_a_hint() {
        let (at, _stop) = start(&["127.0.0.1:0".parse().unwrap()]);
        let problem = StunSockets::bind(&at).unwrap_err();
        assert_eq!(problem.code, "stun-listen");
        assert!(problem.text.contains(&at[0].to_string()) && problem.hint.contains("--stun-listen"));
    }
}

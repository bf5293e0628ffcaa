//! The node's UDP sockets: one for each address family, on the same port.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::{Rng, RngExt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::io::SocketId;
use crate::os::batch::Batch;

/// Ports to draw from when none is asked for: above the well-known, below the usual ephemeral range's end.
pub const PORTS: Range<u16> = 20_000..60_000;
/// Ports tried before giving up.
const PORT_TRIES: usize = 64;
/// Bytes asked for in each kernel buffer (`research`: 7 to 8 MB where the kernel allows).
const BUFFER: usize = 7 << 20;
/// How long one datagram may wait for room in the kernel's send buffer.
const SEND_PATIENCE_MS: u16 = 5;

/// Both sockets. The IPv6 one is missing on a machine without IPv6.
#[derive(Debug)]
pub struct UdpSockets {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    port: u16,
    without_v6: Option<io::Error>,
}

/// Why no sockets could be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The port asked for is taken.
    #[error("UDP port {0} is used by another program")]
    PortTaken(u16),
    /// Ports below 1024 need a privilege.
    #[error("UDP port {0} needs root or CAP_NET_BIND_SERVICE")]
    Forbidden(u16),
    /// None of the ports tried was free for both families.
    #[error("no free UDP port found in {PORT_TRIES} tries")]
    NoneFree,
    /// Anything else.
    #[error("cannot open a UDP socket: {0}")]
    Io(#[from] io::Error),
}

/// Why one datagram was not sent. None of these ends a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The kernel's buffer stayed full.
    #[error("the send buffer is full")]
    Full,
    /// Larger than the path or the interface takes.
    #[error("the datagram is too long for the path")]
    TooBig,
    /// No route, address family missing, interface gone: this destination will not work until the network changes.
    #[error("the destination is unreachable from here")]
    Unreachable,
    /// A local firewall rule or an invalid destination.
    #[error("the system refused the datagram (error {0})")]
    Refused(i32),
}

impl SendError {
    /// What an error of a send means.
    pub(super) const fn of(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => Self::Full,
            Errno::EMSGSIZE => Self::TooBig,
            Errno::ENETUNREACH
            | Errno::EHOSTUNREACH
            | Errno::ENETDOWN
            | Errno::EADDRNOTAVAIL
            | Errno::EAFNOSUPPORT
            | Errno::ENODEV
            | Errno::ENONET => Self::Unreachable,
            errno => Self::Refused(errno as i32),
        }
    }
}

impl UdpSockets {
    /// Opens the sockets on `port`, or with 0 on `kept` if it is free, or else on a random port of [`PORTS`].
    ///
    /// # Errors
    /// [`BindError`]. A machine without IPv6 is not an error, see [`UdpSockets::without_v6`].
    pub fn bind(port: u16, kept: Option<u16>, rng: &mut impl Rng) -> Result<Self, BindError> {
        if port != 0 {
            return Self::bind_both(port).map_err(|e| match e.kind() {
                io::ErrorKind::AddrInUse => BindError::PortTaken(port),
                io::ErrorKind::PermissionDenied => BindError::Forbidden(port),
                _ => BindError::Io(e),
            });
        }
        let tries = std::iter::repeat_with(|| rng.random_range(PORTS)).take(PORT_TRIES);
        for port in kept.filter(|p| *p != 0).into_iter().chain(tries) {
            match Self::bind_both(port) {
                Ok(sockets) => return Ok(sockets),
                Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {}
                Err(e) => return Err(BindError::Io(e)),
            }
        }
        Err(BindError::NoneFree)
    }

    fn bind_both(port: u16) -> io::Result<Self> {
        let v4 = open(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
        let port = v4.local_addr()?.port();
        match open(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into()) {
            Ok(v6) => Ok(Self { v4, v6: Some(v6), port, without_v6: None }),
            Err(e) if no_such_family(&e) => Ok(Self { v4, v6: None, port, without_v6: Some(e) }),
            Err(e) => Err(e),
        }
    }

    /// The port of both sockets.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Why there is no IPv6 socket, if there is none.
    #[must_use]
    pub const fn without_v6(&self) -> Option<&io::Error> {
        self.without_v6.as_ref()
    }

    /// A socket's descriptor, to poll it.
    #[must_use]
    pub fn descriptor(&self, socket: SocketId) -> Option<BorrowedFd<'_>> {
        self.get(socket).map(AsFd::as_fd)
    }

    fn get(&self, socket: SocketId) -> Option<&UdpSocket> {
        if socket == SocketId::V4 { Some(&self.v4) } else { self.v6.as_ref() }
    }

    /// Receives what is there into the free slots of `batch`, until it is full or nothing is left. Errors that other
    /// hosts can cause (ICMP) are passed over.
    pub fn recv_batch(&self, socket: SocketId, batch: &mut Batch<SocketAddr>) {
        let Some(udp) = self.get(socket) else { return };
        // An error queued by ICMP is taken off by the call that reports it; more than this many in a row can wait.
        let mut errors_left = 16;
        while let Some(slot) = batch.slot() {
            match udp.recv_from(slot) {
                Ok((len, from)) => batch.push(len, canonical(from)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::trace!(error = %e, "receive error passed over");
                    errors_left -= 1;
                    if errors_left == 0 {
                        return;
                    }
                }
            }
        }
    }

    /// Sends one datagram. Waits a few milliseconds at most for room in the kernel's buffer.
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send(&self, socket: SocketId, remote: &SocketAddr, bytes: &[u8]) -> Result<(), SendError> {
        let udp = self.get(socket).ok_or(SendError::Unreachable)?;
        let mut patience = true;
        loop {
            let Err(error) = udp.send_to(bytes, remote) else { return Ok(()) };
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => {}
                Some(Errno::EAGAIN | Errno::ENOBUFS) if patience => {
                    patience = false;
                    let mut wait = [PollFd::new(udp.as_fd(), PollFlags::POLLOUT)];
                    // Whatever it says, the send is tried once more.
                    let _ = poll(&mut wait, PollTimeout::from(SEND_PATIENCE_MS));
                }
                errno => return Err(errno.map_or(SendError::Refused(0), SendError::of)),
            }
        }
    }
}

/// Opens a socket of its own for a NAT check, on any free port; non-blocking.
///
/// # Errors
/// The address family is missing, or no descriptor is left.
pub fn scratch(v6: bool) -> io::Result<UdpSocket> {
    if v6 {
        open(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0).into())
    } else {
        open(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into())
    }
}

fn open(local: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    enlarge_buffers(&socket);
    socket.bind(&local.into())?;
    Ok(socket.into())
}

/// A larger buffer survives a longer pause of the data thread. Best effort: the plain option is capped by the system's
/// limit, the forcing one needs `CAP_NET_ADMIN` in the first user namespace.
fn enlarge_buffers(socket: &Socket) {
    use nix::sys::socket::{setsockopt, sockopt};
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER);
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = socket.set_send_buffer_size(BUFFER);
    }
}

fn no_such_family(e: &io::Error) -> bool {
    matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

/// The address without flow information, and with a scope only where it means something (link-local).
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(a) => {
            let scope = if a.ip().is_unicast_link_local() { a.scope_id() } else { 0 };
            SocketAddrV6::new(*a.ip(), a.port(), 0, scope).into()
        }
        SocketAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets() -> UdpSockets {
        UdpSockets::bind(0, None, &mut rand::rng()).unwrap()
    }

    fn wait_readable(sockets: &UdpSockets, socket: SocketId) {
        let fd = sockets.descriptor(socket).unwrap();
        assert_eq!(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(5_000u16)).unwrap(), 1);
    }

    #[test]
    fn both_families_share_one_port_and_carry_datagrams() {
        let (a, b) = (sockets(), sockets());
        assert!(PORTS.contains(&a.port()));
        let mut families = vec![(SocketId::V4, SocketAddr::from((Ipv4Addr::LOCALHOST, b.port())))];
        if a.without_v6().is_none() {
            families.push((SocketId::V6, SocketAddr::from((Ipv6Addr::LOCALHOST, b.port()))));
        }
        for (socket, to) in families {
            a.send(socket, &to, b"hello").unwrap();
            wait_readable(&b, socket);
            let mut batch = Batch::new(4);
            b.recv_batch(socket, &mut batch);
            let got: Vec<_> = batch.iter_mut().map(|(bytes, from)| (bytes.to_vec(), *from)).collect();
            assert_eq!(got, [(b"hello".to_vec(), SocketAddr::new(to.ip(), a.port()))]);
        }
    }

    #[test]
    fn a_taken_port_is_named_and_a_kept_one_is_only_a_wish() {
        let first = sockets();
        match UdpSockets::bind(first.port(), None, &mut rand::rng()) {
            Err(BindError::PortTaken(port)) => assert_eq!(port, first.port()),
            other => panic!("expected PortTaken, got {other:?}"),
        }
        let second = UdpSockets::bind(0, Some(first.port()), &mut rand::rng()).unwrap();
        assert_ne!(second.port(), first.port());
        let port = second.port();
        drop(second);
        assert_eq!(UdpSockets::bind(0, Some(port), &mut rand::rng()).unwrap().port(), port);
    }

    #[test]
    fn refusals_are_named_and_leave_the_socket_usable() {
        let a = sockets();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, a.port()));
        assert_eq!(a.send(SocketId::V4, &to, &vec![0; 70_000]), Err(SendError::TooBig));
        assert!(a.send(SocketId::V6, &to, b"x").is_err(), "the wrong family");
        let nobody = SocketAddr::from((Ipv4Addr::BROADCAST, 9));
        assert!(matches!(a.send(SocketId::V4, &nobody, b"x"), Err(SendError::Refused(_) | SendError::Unreachable)));
        a.send(SocketId::V4, &to, b"still works").unwrap();
        wait_readable(&a, SocketId::V4);
    }
}

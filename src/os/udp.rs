//! The node's UDP sockets: one for each address family, on the same port, and others for a while.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use rand::{Rng, RngExt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::io::SocketId;
use crate::os::extra::ExtraSockets;
use crate::os::mark::mark;
use crate::os::train::{self, SendError, Sender, Sent, Trains, Way};
use crate::time::Now;

/// Ports to draw from when none is asked for: above the well-known, below the usual ephemeral range's end.
pub const PORTS: Range<u16> = 20_000..60_000;
/// Ports tried before giving up.
const PORT_TRIES: usize = 64;
/// Bytes asked for in each kernel buffer: what one round trip of 10 Gbit/s over 6 ms holds.
pub(super) const BUFFER: usize = 7 << 20;

/// Both sockets, and those opened besides. The IPv6 one is missing on a machine without IPv6.
#[derive(Debug)]
pub struct UdpSockets {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    extra: ExtraSockets,
    port: u16,
    trains: bool,
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

impl UdpSockets {
    /// Opens the sockets on `port`, or with 0 on `kept` if it is free, or else on a random port of [`PORTS`]. With `trains`
    /// false every datagram is sent and received alone.
    ///
    /// # Errors
    /// [`BindError`]. A machine without IPv6 is not an error, see [`UdpSockets::without_v6`].
    pub fn bind(port: u16, kept: Option<u16>, trains: bool, rng: &mut impl Rng) -> Result<Self, BindError> {
        if port != 0 {
            return Self::bind_both(port, trains).map_err(|e| match e.kind() {
                io::ErrorKind::AddrInUse => BindError::PortTaken(port),
                io::ErrorKind::PermissionDenied => BindError::Forbidden(port),
                _ => BindError::Io(e),
            });
        }
        let tries = std::iter::repeat_with(|| rng.random_range(PORTS)).take(PORT_TRIES);
        for port in kept.filter(|p| *p != 0).into_iter().chain(tries) {
            match Self::bind_both(port, trains) {
                Ok(sockets) => return Ok(sockets),
                Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {}
                Err(e) => return Err(BindError::Io(e)),
            }
        }
        Err(BindError::NoneFree)
    }

    fn bind_both(port: u16, trains: bool) -> io::Result<Self> {
        let v4 = open_for_data(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into(), trains)?;
        let port = v4.local_addr()?.port();
        let (v6, without_v6) = match open_for_data(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into(), trains)
        {
            Ok(v6) => (Some(v6), None),
            Err(e) if no_such_family(&e) => (None, Some(e)),
            Err(e) => return Err(e),
        };
        Ok(Self { v4, v6, extra: ExtraSockets::new(trains)?, port, trains, without_v6 })
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

    /// The descriptor of one of the two main sockets, to poll it.
    #[must_use]
    pub fn descriptor(&self, socket: SocketId) -> Option<BorrowedFd<'_>> {
        match socket {
            SocketId::V4 => Some(self.v4.as_fd()),
            SocketId::V6 => self.v6.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// Datagrams that came while the buffer of a main socket was full.
    #[must_use]
    pub fn overflowed(&self) -> u64 {
        train::overflowed(&self.v4) + self.v6.as_ref().map_or(0, train::overflowed)
    }

    /// The sockets besides the two main ones.
    #[must_use]
    pub const fn extra(&self) -> &ExtraSockets {
        &self.extra
    }

    /// Does something with a socket, if it is open.
    fn with<R>(&self, socket: SocketId, work: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        if let SocketId::V4 | SocketId::V6 = socket {
            return self.descriptor(socket).map(work);
        }
        self.extra.get(socket).map(|udp| work(udp.as_fd()))
    }

    /// Receives what is there in one call, in the place of what `into` held.
    pub fn receive(&self, socket: SocketId, into: &mut Trains) {
        if self.with(socket, |udp| into.receive(udp)).is_none() {
            into.clear();
        }
    }

    /// Sends one datagram. Waits a few milliseconds at most for room in the kernel's buffer.
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send(&self, socket: SocketId, remote: &SocketAddr, bytes: &[u8]) -> Result<(), SendError> {
        let sent =
            self.with(socket, |udp| train::alone(&mut Way { socket: udp, to: *remote, from: None, ecn: 0 }, bytes));
        // One that is missing, or closed meanwhile, reaches nobody.
        sent.unwrap_or(Err(SendError::Unreachable))
    }

    /// Sends datagrams; see [`Sender::send`].
    pub fn send_train(&self, sender: &mut Sender, what: &Outgoing<'_>, now: Now) -> Sent {
        let Outgoing { socket, remote, ecn, size, pieces } = *what;
        let sent = self.with(socket, |udp| {
            sender.send(&mut Way { socket: udp, to: remote, from: None, ecn }, remote, pieces, size, now)
        });
        sent.unwrap_or_else(|| {
            let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
            let failed = bytes.div_ceil(size.max(1));
            Sent { failed, error: Some(SendError::Unreachable), ..Sent::default() }
        })
    }

    /// What sends the trains of one thread through these sockets.
    #[must_use]
    pub fn sender(&self) -> Sender {
        Sender::new(self.trains)
    }

    /// Sends one datagram that dies after `ttl` routers; see [`train::send_dying`].
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send_dying(&self, socket: SocketId, remote: &SocketAddr, bytes: &[u8], ttl: u8) -> Result<(), SendError> {
        let sent = self.with(socket, |udp| train::send_dying(udp, remote, bytes, ttl));
        sent.unwrap_or(Err(SendError::Unreachable))
    }
}

/// Datagrams to one address with one ECN field, all of one size but for the last, which may be shorter.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// From which socket.
    pub socket: SocketId,
    /// To whom.
    pub remote: SocketAddr,
    /// RFC 3168 section 5.
    pub ecn: u8,
    /// Bytes of each datagram.
    pub size: usize,
    /// The datagrams; every piece but the last holds whole ones. At most [`train::MAX_DATAGRAMS`] in all go as a train.
    pub pieces: &'a [IoSlice<'a>],
}

/// Opens a socket of its own for a NAT check, on any free port; non-blocking.
///
/// # Errors
/// The address family is missing, or no descriptor is left.
pub fn scratch(v6: bool) -> io::Result<UdpSocket> {
    if v6 {
        open(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0).into()).map(UdpSocket::from)
    } else {
        open(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into()).map(UdpSocket::from)
    }
}

fn open_for_data(local: SocketAddr, trains: bool) -> io::Result<UdpSocket> {
    let socket = open(local)?;
    let trains = train::enable(&socket, trains, local.is_ipv6());
    let (receive, send) = train::buffers(&socket)?;
    tracing::info!(address = %local, receive, send, trains, "UDP socket open; bytes of the kernel's buffers as granted");
    Ok(socket.into())
}

fn open(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    mark(&socket);
    train::enlarge_buffers(&socket, BUFFER);
    never_fragment(&socket, local.is_ipv6());
    socket.bind(&local.into())?;
    Ok(socket)
}

/// Datagrams go in one piece or are refused (EMSGSIZE), by the size of the interface alone: what the kernel believes of the
/// path behind it can be made up by anybody (RFC 8899 section 4.6). Best effort: without it long datagrams are fragmented,
/// which costs speed.
pub(super) fn never_fragment(socket: &Socket, v6: bool) {
    let done = if v6 { train::probe_only_v6(socket) } else { train::probe_only_v4(socket) };
    if let Err(errno) = done {
        tracing::warn!(%errno, "UDP sockets cannot be kept from fragmenting");
    }
}

fn no_such_family(e: &io::Error) -> bool {
    matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn sockets() -> UdpSockets {
        UdpSockets::bind(0, None, true, &mut rand::rng()).unwrap()
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
            let mut receiver = Trains::default();
            b.receive(socket, &mut receiver);
            let got: Vec<_> = receiver.trains().map(|t| (t.datagrams().collect::<Vec<_>>(), t.from)).collect();
            assert_eq!(got, [(vec![&b"hello"[..]], SocketAddr::new(to.ip(), a.port()))]);
        }
    }

    #[test]
    fn a_taken_port_is_named_and_a_kept_one_is_only_a_wish() {
        let first = sockets();
        match UdpSockets::bind(first.port(), None, true, &mut rand::rng()) {
            Err(BindError::PortTaken(port)) => assert_eq!(port, first.port()),
            other => panic!("expected PortTaken, got {other:?}"),
        }
        let second = UdpSockets::bind(0, Some(first.port()), true, &mut rand::rng()).unwrap();
        assert_ne!(second.port(), first.port());
        let port = second.port();
        drop(second);
        assert_eq!(UdpSockets::bind(0, Some(port), true, &mut rand::rng()).unwrap().port(), port);
    }

    #[test]
    fn datagrams_of_the_largest_size_go_whole_and_longer_ones_are_refused_each_by_itself() {
        let (a, b) = (sockets(), sockets());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let bytes = vec![7; train::MAX_BYTES + 1];
        a.send(SocketId::V4, &to, &bytes[..train::MAX_BYTES]).unwrap();
        assert_eq!(lengths(&b, train::MAX_BYTES), [train::MAX_BYTES]);
        assert_eq!(a.send(SocketId::V4, &to, &bytes), Err(SendError::TooBig));
        let sent = a.send_train(&mut a.sender(), &outgoing(to, bytes.len(), &[IoSlice::new(&bytes)]), Now(1));
        assert_eq!((sent.sent, sent.failed, sent.error), (0, 1, Some(SendError::TooBig)));
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

    fn outgoing<'a>(to: SocketAddr, size: usize, pieces: &'a [IoSlice<'a>]) -> Outgoing<'a> {
        Outgoing { socket: SocketId::V4, remote: to, ecn: 0, size, pieces }
    }

    fn lengths(sockets: &UdpSockets, mut bytes: usize) -> Vec<usize> {
        let (mut receiver, mut lengths) = (Trains::default(), Vec::new());
        while bytes > 0 {
            wait_readable(sockets, SocketId::V4);
            sockets.receive(SocketId::V4, &mut receiver);
            for datagram in receiver.trains().flat_map(|train| train.datagrams()) {
                bytes -= datagram.len();
                lengths.push(datagram.len());
            }
        }
        lengths
    }

    #[test]
    fn trains_and_single_datagrams_arrive_alike() {
        let bytes = vec![1; 5000];
        for trains in [true, false] {
            let [a, b] = [trains, trains].map(|t| UdpSockets::bind(0, None, t, &mut rand::rng()).unwrap());
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
            let mut sender = a.sender();
            let pieces = [IoSlice::new(&bytes[..3000]), IoSlice::new(&bytes[3000..4100])];
            let sent = a.send_train(&mut sender, &outgoing(to, 1000, &pieces), Now(1));
            assert_eq!((sent.sent, sent.failed, sent.error), (5, 0, None));
            assert_eq!(lengths(&b, 4100), [1000, 1000, 1000, 1000, 100]);
            let sent = a.send_train(&mut sender, &outgoing(to, 1000, &pieces[1..]), Now(1));
            assert_eq!((sent.sent, sent.failed, sent.error), (2, 0, None));
            assert_eq!(lengths(&b, 1100), [1000, 100]);
            let missing = Outgoing { socket: SocketId(77), ..outgoing(to, 1000, &pieces) };
            let sent = a.send_train(&mut sender, &missing, Now(1));
            assert_eq!((sent.sent, sent.failed, sent.error), (0, 5, Some(SendError::Unreachable)));
        }
    }
}

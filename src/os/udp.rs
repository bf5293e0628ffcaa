//! The node's UDP sockets: one for each address family, on the same port, and others for a while.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::{Rng, RngExt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::io::SocketId;
use crate::os::extra::ExtraSockets;
use crate::os::mark::mark;
use crate::os::train::{self, Receiver};
use crate::time::Now;

/// Ports to draw from when none is asked for: above the well-known, below the usual ephemeral range's end.
pub const PORTS: Range<u16> = 20_000..60_000;
/// Ports tried before giving up.
const PORT_TRIES: usize = 64;
/// Bytes asked for in each kernel buffer: what one round trip of 10 Gbit/s over 6 ms holds.
const BUFFER: usize = 7 << 20;
/// How long one datagram may wait for room in the kernel's send buffer.
const SEND_PATIENCE_MS: u16 = 5;
/// A way that refused a train is sent single datagrams for so long: drivers and routes change.
const REFUSED_FOR: Duration = Duration::from_secs(600);
/// Ways that are remembered to refuse trains.
const REFUSALS: usize = 64;
/// Pieces of memory that one train may be put together from.
pub const PIECES: usize = train::MAX_DATAGRAMS;

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
    pub fn receive(&self, socket: SocketId, into: &mut Receiver) {
        if self.with(socket, |udp| into.receive(udp)).is_none() {
            into.clear();
        }
    }

    /// Sends one datagram. Waits a few milliseconds at most for room in the kernel's buffer.
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send(&self, socket: SocketId, remote: &SocketAddr, bytes: &[u8]) -> Result<(), SendError> {
        self.send_marked(socket, remote, 0, &[IoSlice::new(bytes)], None).map_err(SendError::of)
    }

    fn send_marked(
        &self,
        socket: SocketId,
        remote: &SocketAddr,
        ecn: u8,
        pieces: &[IoSlice<'_>],
        size: Option<u16>,
    ) -> Result<(), Errno> {
        let send = |udp: BorrowedFd<'_>| {
            let mut patience = true;
            loop {
                match train::send(udp, remote, ecn, pieces, size) {
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN | Errno::ENOBUFS) if patience => {
                        patience = false;
                        let mut wait = [PollFd::new(udp, PollFlags::POLLOUT)];
                        // Whatever it says, the send is tried once more.
                        let _ = poll(&mut wait, PollTimeout::from(SEND_PATIENCE_MS));
                    }
                    done => return done,
                }
            }
        };
        // One that is missing, or closed meanwhile, reaches nobody.
        self.with(socket, send).unwrap_or(Err(Errno::EAFNOSUPPORT))
    }

    /// Sends one datagram that dies after `ttl` routers; see [`train::send_dying`].
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send_dying(&self, socket: SocketId, remote: &SocketAddr, bytes: &[u8], ttl: u8) -> Result<(), SendError> {
        let sent = self.with(socket, |udp| train::send_dying(udp, remote, bytes, ttl));
        sent.unwrap_or(Err(Errno::EAFNOSUPPORT)).map_err(SendError::of)
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
    /// The datagrams; every piece but the last holds whole ones. More than [`PIECES`] go one by one.
    pub pieces: &'a [&'a [u8]],
}

/// What became of the datagrams of an [`Outgoing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Datagrams that the kernel took.
    pub sent: usize,
    /// Datagrams that it did not, and why the last of them.
    pub failed: usize,
    /// See `failed`.
    pub error: Option<SendError>,
    /// They went as one.
    pub as_train: bool,
}

/// Sends trains, and remembers which ways refuse them: some drivers cannot, and some kernels do not know how.
#[derive(Debug, Default)]
pub struct Sender {
    refused: Vec<(SocketAddr, Now)>,
}

impl Sender {
    /// Sends; waits a few milliseconds at most for room in the kernel's buffer, once for a train or a datagram.
    pub fn send(&mut self, sockets: &UdpSockets, what: &Outgoing<'_>, now: Now) -> Sent {
        let bytes: usize = what.pieces.iter().map(|piece| piece.len()).sum();
        let count = bytes.div_ceil(what.size.max(1));
        let mut refused = false;
        if sockets.trains && count > 1 && what.pieces.len() <= PIECES && self.takes_trains(&what.remote, now) {
            let mut slices = [IoSlice::new(&[]); PIECES];
            for (slice, piece) in slices.iter_mut().zip(what.pieces) {
                *slice = IoSlice::new(piece);
            }
            let pieces = &slices[..what.pieces.len()];
            let size = u16::try_from(what.size).ok();
            match sockets.send_marked(what.socket, &what.remote, what.ecn, pieces, size) {
                Ok(()) => return Sent { sent: count, as_train: true, ..Sent::default() },
                // EIO: the device cannot do it. EINVAL: the kernel cannot, or it is an old one that says so of datagrams
                // that are too long, which they are one by one as well.
                Err(errno @ (Errno::EIO | Errno::EINVAL | Errno::EOPNOTSUPP)) => {
                    tracing::debug!(%errno, "a train was refused, datagrams go one by one");
                    refused = true;
                }
                Err(errno) => return Sent { failed: count, error: Some(SendError::of(errno)), ..Sent::default() },
            }
        }
        let mut result = Sent::default();
        for datagram in what.pieces.iter().flat_map(|piece| piece.chunks(what.size.max(1))) {
            match sockets.send_marked(what.socket, &what.remote, what.ecn, &[IoSlice::new(datagram)], None) {
                Ok(()) => result.sent += 1,
                Err(errno) => {
                    result.failed += 1;
                    result.error = Some(SendError::of(errno));
                }
            }
        }
        if refused && result.error != Some(SendError::TooBig) {
            self.refuse(what.remote, now);
        }
        result
    }

    fn takes_trains(&mut self, remote: &SocketAddr, now: Now) -> bool {
        if self.refused.is_empty() {
            return true;
        }
        self.refused.retain(|(_, at)| now.since(*at) < REFUSED_FOR);
        !self.refused.iter().any(|(refused, _)| refused == remote)
    }

    fn refuse(&mut self, remote: SocketAddr, now: Now) {
        if self.refused.len() == REFUSALS {
            self.refused.remove(0);
        }
        self.refused.push((remote, now));
    }
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
    enlarge_buffers(&socket);
    never_fragment(&socket, local.is_ipv6());
    socket.bind(&local.into())?;
    Ok(socket)
}

/// A larger buffer survives a longer pause of the data thread. Best effort: the plain option is capped by the system's
/// limit, the forcing one needs `CAP_NET_ADMIN` in the first user namespace.
pub(super) fn enlarge_buffers(socket: &impl AsFd) {
    use nix::sys::socket::{setsockopt, sockopt};
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &BUFFER);
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &BUFFER);
    }
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
            let mut receiver = Receiver::default();
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
    fn every_error_of_a_send_has_its_meaning() {
        for errno in [Errno::EAGAIN, Errno::ENOBUFS, Errno::ENOMEM] {
            assert_eq!(SendError::of(errno), SendError::Full);
        }
        assert_eq!(SendError::of(Errno::EMSGSIZE), SendError::TooBig);
        for errno in [Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::ENETDOWN, Errno::EADDRNOTAVAIL, Errno::ENODEV] {
            assert_eq!(SendError::of(errno), SendError::Unreachable);
        }
        for errno in [Errno::EPERM, Errno::EINVAL, Errno::ECONNREFUSED] {
            assert_eq!(SendError::of(errno), SendError::Refused(errno as i32));
        }
    }

    #[test]
    fn datagrams_of_the_largest_size_go_whole_and_longer_ones_are_refused_each_by_itself() {
        let (a, b) = (sockets(), sockets());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let bytes = vec![7; train::MAX_BYTES + 1];
        a.send(SocketId::V4, &to, &bytes[..train::MAX_BYTES]).unwrap();
        assert_eq!(lengths(&b, train::MAX_BYTES), [train::MAX_BYTES]);
        assert_eq!(a.send(SocketId::V4, &to, &bytes), Err(SendError::TooBig));
        let mut sender = Sender::default();
        let sent = sender.send(&a, &outgoing(to, bytes.len(), &[&bytes]), Now(1));
        assert_eq!((sent.sent, sent.failed, sent.error), (0, 1, Some(SendError::TooBig)));
        assert!(sender.takes_trains(&to, Now(1)), "that says nothing about trains");
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

    fn outgoing<'a>(to: SocketAddr, size: usize, pieces: &'a [&'a [u8]]) -> Outgoing<'a> {
        Outgoing { socket: SocketId::V4, remote: to, ecn: 0, size, pieces }
    }

    fn lengths(sockets: &UdpSockets, mut bytes: usize) -> Vec<usize> {
        let (mut receiver, mut lengths) = (Receiver::default(), Vec::new());
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
            let mut sender = Sender::default();
            let sent = sender.send(&a, &outgoing(to, 1000, &[&bytes[..3000], &bytes[3000..4100]]), Now(1));
            assert_eq!((sent.sent, sent.failed, sent.error), (5, 0, None));
            assert_eq!(lengths(&b, 4100), [1000, 1000, 1000, 1000, 100]);
            let sent = sender.send(&a, &outgoing(to, 1000, &[&bytes[..1000]]), Now(1));
            assert_eq!(sent, Sent { sent: 1, ..Sent::default() });
            assert_eq!(lengths(&b, 1000), [1000]);
        }
    }

    #[test]
    fn a_refused_train_goes_one_by_one_and_is_not_tried_again_for_a_while() {
        let (a, b) = (sockets(), sockets());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        // More datagrams than a kernel cuts.
        let bytes = vec![1; 1000];
        let mut sender = Sender::default();
        let sent = sender.send(&a, &outgoing(to, 1, &[&bytes]), Now(1));
        assert_eq!(sent, Sent { sent: 1000, ..Sent::default() });
        assert_eq!(lengths(&b, 1000), [1; 1000]);
        let pieces = [&bytes[..]];
        let two = outgoing(to, 500, &pieces);
        assert!(!sender.send(&a, &two, Now(2)).as_train, "remembered");
        let later = Now(1) + REFUSED_FOR;
        assert!(sender.send(&a, &two, later).as_train, "tried again");
        let other = SocketAddr::from((Ipv4Addr::LOCALHOST, a.port()));
        sender.refuse(to, later);
        assert!(sender.send(&a, &outgoing(other, 500, &[&bytes]), later).as_train, "another way");
        for n in 0..1000u16 {
            sender.refuse(SocketAddr::from((Ipv4Addr::LOCALHOST, n)), later);
        }
        assert_eq!(sender.refused.len(), REFUSALS);
        let nowhere = SocketAddr::from((Ipv4Addr::BROADCAST, 9));
        let sent = sender.send(&a, &outgoing(nowhere, 500, &[&bytes]), later);
        assert_eq!((sent.sent, sent.failed), (0, 2));
        assert!(sent.error.is_some());
    }
}

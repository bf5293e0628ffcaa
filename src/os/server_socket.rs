//! A UDP socket for a server that forwards: every datagram comes with the address it came to, and leaves from the one it
//! should. Trains of datagrams both ways ([`crate::os::train`]).

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::os::train::{self, Buffers, Receiver, SendError, Way};

/// Bytes asked for in each kernel buffer.
const KERNEL_BUFFER: usize = 4 << 20;

/// The socket.
#[derive(Debug)]
pub struct ServerSocket {
    udp: UdpSocket,
    bound: SocketAddr,
}

impl ServerSocket {
    /// Binds a socket to exactly this address. An IPv6 wildcard takes IPv4 too.
    ///
    /// # Errors
    /// The address is not ours, in use, or of a family the machine lacks.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(!address.ip().is_unspecified())?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        // Best effort: without it, datagrams come one by one.
        let _ = setsockopt(&socket, sockopt::UdpGroSegment, &true);
        train::enlarge_buffers(&socket, KERNEL_BUFFER);
        socket.bind(&address.into())?;
        let udp: UdpSocket = socket.into();
        let bound = udp.local_addr()?;
        Ok(Self { udp, bound })
    }

    /// The address it is bound to.
    #[must_use]
    pub const fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Receives up to [`train::BATCH`] trains without waiting, into these rooms; see [`Receiver::receive`]. Each has the
    /// address it came to.
    ///
    /// # Errors
    /// Nothing is there (`WouldBlock`), or an ICMP error for something sent earlier, which is of no interest.
    pub fn receive(&self, receiver: &mut Receiver, buffers: &mut Buffers, free: &[usize]) -> io::Result<usize> {
        Ok(receiver.receive(self.udp.as_fd(), buffers, free)?)
    }

    /// The way from our address `from` to this one.
    #[must_use]
    pub fn way(&self, to: SocketAddr, from: IpAddr) -> Way<'_> {
        let to = match (self.bound, to) {
            (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            _ => to,
        };
        Way { socket: self.udp.as_fd(), to, from: Some(from), ecn: 0 }
    }

    /// Sends one datagram from our address `from`. Waits a few milliseconds at most for room in the kernel's buffer.
    ///
    /// # Errors
    /// [`SendError`]; the socket stays usable.
    pub fn send(&self, to: SocketAddr, from: IpAddr, datagram: &[u8]) -> Result<(), SendError> {
        train::alone(&mut self.way(to, from), datagram)
    }
}

impl AsFd for ServerSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.udp.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::os::train::{BATCH, Run, Sender};
    use crate::time::Now;

    fn wait(socket: &ServerSocket) {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5_000u16)).unwrap(), 1);
    }

    /// Receives until this many bytes came; the datagrams, in order, and the first train.
    fn take(socket: &ServerSocket, bytes: usize) -> (Vec<Vec<u8>>, Run) {
        let (mut receiver, mut buffers) = (Receiver::default(), Buffers::new(BATCH));
        let (mut datagrams, mut first) = (Vec::new(), None);
        while datagrams.iter().map(Vec::len).sum::<usize>() < bytes {
            wait(socket);
            socket.receive(&mut receiver, &mut buffers, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
            for run in receiver.runs() {
                first.get_or_insert(*run);
                datagrams.extend(buffers.get(run.buffer)[..run.len].chunks(run.size).map(<[u8]>::to_vec));
            }
        }
        (datagrams, first.unwrap())
    }

    fn local(socket: &ServerSocket, ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), socket.bound().port())
    }

    #[test]
    fn trains_arrive_as_the_datagrams_they_were_and_say_where_they_came_to() {
        for (bind, ip) in [("127.0.0.1:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let Ok(a) = ServerSocket::bind(bind.parse().unwrap()) else { continue };
            let b = ServerSocket::bind(bind.parse().unwrap()).unwrap();
            for (size, len) in
                [(1_400, 1_400), (1_400, 1_400 * 44), (1_400, 1_400 * 10 + 7), (9, 9 * 64), (60_000, 60_000)]
            {
                let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
                let (first, second) = bytes.split_at(len / size / 2 * size);
                let parts = [IoSlice::new(first), IoSlice::new(second)];
                let (to, from) = (local(&b, ip), ip.parse().unwrap());
                let sent = Sender::new(true).send(&mut a.way(to, from), to, &parts, size, Now(1));
                assert_eq!((sent.sent, sent.failed), (len.div_ceil(size), 0), "{bind}: {size}, {len}");
                let (datagrams, run) = take(&b, len);
                assert_eq!(datagrams, bytes.chunks(size).collect::<Vec<_>>(), "{bind}: {size}, {len}");
                assert_eq!((run.from, run.local), (local(&a, ip), Some(from)), "{bind}");
            }
        }
    }

    #[test]
    fn datagrams_leave_from_the_address_asked_for() {
        for bind in ["0.0.0.0:0", "[::]:0"] {
            let Ok(a) = ServerSocket::bind(bind.parse().unwrap()) else { continue };
            let b = ServerSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
            // Not what the kernel would choose by itself.
            a.send(b.bound(), [127, 0, 0, 3].into(), b"hello").unwrap();
            assert_eq!(take(&b, 5).1.from, local(&a, "127.0.0.3"));
            b.send(local(&a, "127.0.0.4"), [127, 0, 0, 1].into(), b"hello").unwrap();
            assert_eq!(take(&a, 5).1.local, Some(IpAddr::from([127, 0, 0, 4])));
        }
    }

    #[test]
    fn nothing_there_is_said_at_once_and_refusals_are_named() {
        let a = ServerSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let e = a.receive(&mut Receiver::default(), &mut Buffers::new(1), &[0]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(a.send(a.bound(), [127, 0, 0, 1].into(), &[0; 70_000]), Err(SendError::TooBig));
        assert_eq!(a.send("[::1]:9".parse().unwrap(), [127, 0, 0, 1].into(), b"x"), Err(SendError::Unreachable));
    }
}

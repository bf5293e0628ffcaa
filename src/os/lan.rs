//! UDP sockets that know by which interface a datagram came and how far it has travelled, and send by a given one.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::mark::mark;

/// A datagram that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// The sender.
    pub from: SocketAddr,
    /// The address it was sent to.
    pub to: IpAddr,
    /// The interface it came in by.
    pub interface: u32,
    /// Time to live (IPv4) or hop limit (IPv6) on arrival.
    pub ttl: u8,
    /// Its length in bytes.
    pub len: usize,
}

/// A non-blocking socket for one family, on a port (0: any), whose datagrams leave with a time to live of `ttl`.
///
/// # Errors
/// The port is taken, the family is missing, or no descriptor is left.
pub fn socket(v4: bool, port: u16, ttl: u8) -> io::Result<UdpSocket> {
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    mark(&socket);
    let any: IpAddr = if v4 {
        socket.set_ttl_v4(ttl.into())?;
        setsockopt(&socket, sockopt::Ipv4RecvTtl, &true)?;
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        socket.set_only_v6(true)?;
        socket.set_unicast_hops_v6(ttl.into())?;
        setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        Ipv6Addr::UNSPECIFIED.into()
    };
    socket.bind(&SocketAddr::new(any, port).into())?;
    Ok(socket.into())
}

/// Receives a datagram. None: one that says too little about itself.
///
/// # Errors
/// `WouldBlock`: none is there. Others are of a datagram sent before.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<Arrived>> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::c_int);
    let mut room = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let got = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut room, Some(&mut control), flags)?;
    let (mut way, mut ttl) = (None, None);
    for message in got.cmsgs()? {
        match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                let to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                way = u32::try_from(info.ipi_ifindex).ok().map(|index| (IpAddr::V4(to), index));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                way = Some((IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)), info.ipi6_ifindex));
            }
            ControlMessageOwned::Ipv4Ttl(left) | ControlMessageOwned::Ipv6HopLimit(left) => {
                ttl = u8::try_from(left).ok();
            }
            _ => {}
        }
    }
    let from = got.address.as_ref().and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|a| SocketAddr::new(a.ip().into(), a.port()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| SocketAddr::new(a.ip().into(), a.port())))
    });
    let len = got.bytes;
    Ok(way.zip(ttl).zip(from).map(|(((to, interface), ttl), from)| Arrived { from, to, interface, ttl, len }))
}

/// Sends a datagram by an interface, from an address of ours, whatever the routes say.
///
/// # Errors
/// The kernel does not send it.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], from: IpAddr, interface: u32, to: SocketAddr) -> io::Result<()> {
    let (v4, v6);
    let way = match from {
        IpAddr::V4(from) => {
            v4 = libc::in_pktinfo {
                ipi_ifindex: i32::try_from(interface).map_err(|_| Errno::ENODEV)?,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            ControlMessage::Ipv4PacketInfo(&v4)
        }
        IpAddr::V6(from) => {
            v6 = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: from.octets() }, ipi6_ifindex: interface };
            ControlMessage::Ipv6PacketInfo(&v6)
        }
    };
    let to = SockaddrStorage::from(to);
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(bytes)], &[way], MsgFlags::MSG_DONTWAIT, Some(&to))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_datagram_tells_how_it_came() {
        for v4 in [true, false] {
            let ip: IpAddr = if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            if UdpSocket::bind((ip, 0)).is_err() {
                eprintln!("SKIPPED: no {ip} here");
                continue;
            }
            let (a, b) = (socket(v4, 0, 255).unwrap(), socket(v4, 0, 255).unwrap());
            let to = SocketAddr::new(ip, b.local_addr().unwrap().port());
            let mut buffer = [0; 16];
            assert_eq!(receive(b.as_fd(), &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            // The loopback interface is the first everywhere.
            send(a.as_fd(), b"hello", ip, 1, to).unwrap();
            let came = receive(b.as_fd(), &mut buffer).unwrap().unwrap();
            let from = SocketAddr::new(ip, a.local_addr().unwrap().port());
            assert_eq!(came, Arrived { from, to: ip, interface: 1, ttl: 255, len: 5 });
        }
    }
}

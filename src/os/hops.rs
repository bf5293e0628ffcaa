//! Which routers are next to this machine: the ICMP answers to datagrams that die on the way (what `traceroute` does, but
//! without privileges).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// ICMP's Time Exceeded, in transit (RFC 792).
const TIME_EXCEEDED: (u8, u8) = (11, 0);

/// A non-blocking IPv4 socket whose datagrams die at the router number `hop`, counted from 1.
///
/// # Errors
/// No descriptor is left.
pub fn dying_at(hop: u8) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    super::mark::mark(&socket);
    socket.set_ttl_v4(hop.into())?;
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into())?;
    Ok(socket.into())
}

/// Who said that a datagram of this socket died there, if anybody has yet. Other errors that wait are passed over.
#[must_use]
pub fn died_at(socket: BorrowedFd<'_>) -> Option<Ipv4Addr> {
    // An error is taken off by the call that reports it; more than this many are not this socket's own.
    for _ in 0..16 {
        let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let got = recvmsg::<()>(socket.as_raw_fd(), &mut [], Some(&mut control), flags).ok()?;
        let found = got.cmsgs().ok()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4RecvErr(error, Some(from))
                if error.ee_origin == libc::SO_EE_ORIGIN_ICMP && (error.ee_type, error.ee_code) == TIME_EXCEEDED =>
            {
                Some(Ipv4Addr::from(from.sin_addr.s_addr.to_ne_bytes()))
            }
            _ => None,
        });
        if found.is_some() {
            return found;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn nothing_dies_on_the_way_to_oneself() {
        let socket = dying_at(1).unwrap();
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = other.local_addr().unwrap();
        socket.send_to(b"x", to).unwrap();
        assert_eq!(other.recv(&mut [0; 4]).unwrap(), 1);
        // Refused by ICMP, which is another error.
        drop(other);
        socket.send_to(b"x", to).unwrap();
        assert_eq!(died_at(socket.as_fd()), None);
        assert_eq!(socket.ttl().unwrap(), 1);
    }
}

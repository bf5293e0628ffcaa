//! Sockets towards the router in front, each bound to this machine's address there, so that nothing goes another way.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// All hosts on the network: where routers announce to (RFC 6887 section 14.1.2, RFC 6886 section 3.2.1).
const ALL_HOSTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);

/// Talks to one port of the router; what comes from elsewhere is not received. Non-blocking.
///
/// # Errors
/// The address is not this machine's, or no descriptor is left.
pub fn towards(own: Ipv4Addr, router: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = open()?;
    socket.bind(&SocketAddrV4::new(own, 0).into())?;
    socket.connect(&router.into())?;
    Ok(socket.into())
}

/// Sends multicast searches to the network that `own` is in, and receives the answers. Non-blocking.
///
/// # Errors
/// As [`towards`].
pub fn searching(own: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = open()?;
    socket.bind(&SocketAddrV4::new(own, 0).into())?;
    socket.set_multicast_if_v4(&own)?;
    // UPnP Device Architecture 2.0 section 1.3.2.
    socket.set_multicast_ttl_v4(2)?;
    socket.set_multicast_loop_v4(false)?;
    Ok(socket.into())
}

/// Receives what routers announce to all hosts at `port`, together with other programs that do. Non-blocking.
///
/// # Errors
/// Another program keeps the port to itself, or no descriptor is left.
pub fn announcements(port: u16) -> io::Result<UdpSocket> {
    let socket = open()?;
    socket.set_reuse_address(true)?;
    // Only what is sent to the group.
    socket.bind(&SocketAddrV4::new(ALL_HOSTS, port).into())?;
    Ok(socket.into())
}

fn open() -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    super::mark::mark(&socket);
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_router_is_heard() {
        let router = UdpSocket::bind("127.0.0.1:0").unwrap();
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(at) = router.local_addr().unwrap() else { unreachable!() };
        let socket = towards(Ipv4Addr::LOCALHOST, at).unwrap();
        socket.set_nonblocking(false).unwrap();
        let here = socket.local_addr().unwrap();
        stranger.send_to(b"lie", here).unwrap();
        router.send_to(b"truth", here).unwrap();
        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"truth");
    }

    #[test]
    fn several_programs_may_wait_for_announcements() {
        let first = announcements(0).unwrap();
        let port = first.local_addr().unwrap().port();
        announcements(port).unwrap();
        searching(Ipv4Addr::LOCALHOST).unwrap();
    }
}

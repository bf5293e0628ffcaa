//! Trains of datagrams: many of one size, to or from one address, in one system call.
//!
//! What a datagram costs is its way through the kernel's network stack, not the system call. A train goes that way as one
//! (`UDP_SEGMENT` cuts it as late as the hardware allows, `UDP_GRO` hands over what was put together on the way in), which
//! is worth a factor of ten and more. Calls that only take several datagrams at once (`sendmmsg`, io_uring) gain nothing.
//!
//! Nodes ([`crate::os::udp`]) and the coordinator's relay ([`crate::os::server_socket`]) send and receive with the same code.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use socket2::Socket;

mod receive;
mod send;

pub use receive::{Buffers, Receiver, Run, Train, Trains};
pub use send::{Exit, SendError, Sender, Sent, Way, alone, send_dying};

/// Datagrams in a train at most: what every kernel with `UDP_SEGMENT` takes (`UDP_MAX_SEGMENTS`).
pub const MAX_DATAGRAMS: usize = 64;
/// Bytes of a train at most: those of the largest UDP payload over IPv4.
pub const MAX_BYTES: usize = 65_507;
/// Trains received by one call.
pub const BATCH: usize = 8;
/// Room for one train, in bytes.
pub const ROOM: usize = 1 << 16;
/// Room for what the kernel tells or is told about a train.
const CONTROL: usize = 128;

/// The kernel wants these numbers aligned like its own header.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Switches a socket to telling ECN marks and times of arrival, and if `trains` to receiving trains. True if the kernel does
/// put datagrams together (Linux 5.0).
pub fn enable(socket: &Socket, trains: bool, v6: bool) -> bool {
    // Without the marks, congestion shows as loss, as it does with most tunnels.
    let _ = if v6 { socket.set_recv_tclass_v6(true) } else { socket.set_recv_tos_v4(true) };
    // Without the time, a queue that stays long is not noticed.
    let _ = setsockopt(socket, sockopt::ReceiveTimestampns, &true);
    trains && setsockopt(socket, sockopt::UdpGroSegment, &true).is_ok()
}

/// Asks for kernel buffers of so many bytes. A larger buffer survives a longer pause of the thread that reads it. Best effort:
/// the plain option is capped by the system's limit, the forcing one needs `CAP_NET_ADMIN` in the first user namespace.
pub fn enlarge_buffers(socket: &impl AsFd, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &bytes);
    }
}

/// The kernel buffers of a socket as granted, in bytes: to receive and to send. Linux counts its own overhead in.
///
/// # Errors
/// The descriptor is no socket.
pub fn buffers(socket: &impl AsFd) -> io::Result<(usize, usize)> {
    Ok((getsockopt(socket, sockopt::RcvBuf)?, getsockopt(socket, sockopt::SndBuf)?))
}

/// Datagrams that came while a socket's buffer was full, since it was opened; 0 if the kernel does not tell.
pub fn overflowed(socket: &impl AsRawFd) -> u64 {
    // The kernel's `SK_MEMINFO_DROPS`.
    const DROPS: usize = 8;
    let mut info = [0u32; 9];
    let mut len = size_of_val(&info) as libc::socklen_t;
    #[expect(unsafe_code, reason = "nix does not know this option")]
    // SAFETY: the pointers are to memory of the size beside them and to that size, exclusively borrowed for the call.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    Errno::result(done).map_or(0, |_| u64::from(info[DROPS]))
}

/// Has an IPv4 socket send datagrams in one piece, whatever the kernel believes of the path (`IP_PMTUDISC_PROBE`).
///
/// # Errors
/// The kernel does not know how.
pub fn probe_only_v4(socket: &impl AsRawFd) -> nix::Result<()> {
    set_number(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
}

/// The same for an IPv6 socket (`IPV6_PMTUDISC_PROBE`).
///
/// # Errors
/// The kernel does not know how.
pub fn probe_only_v6(socket: &impl AsRawFd) -> nix::Result<()> {
    set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
}

fn set_number(socket: &impl AsRawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> nix::Result<()> {
    #[expect(unsafe_code, reason = "nix knows this option only in part")]
    // SAFETY: the pointer is to a number of the size beside it, which is only read during the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(done).map(drop)
}

/// An address as it is compared and kept: IPv4 as IPv4, no flow information, and a scope only where it means something
/// (link-local). `None`: of a family that was not asked for.
fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let name: *const libc::sockaddr_storage = name;
    #[expect(unsafe_code, reason = "a C union by another name")]
    // SAFETY: the storage is large enough and aligned for every kind of address, and its family says which it is.
    unsafe {
        match i32::from((*name).ss_family) {
            libc::AF_INET => {
                let v4 = &*name.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let v6 = &*name.cast::<libc::sockaddr_in6>();
                let port = u16::from_be(v6.sin6_port);
                Some(match Ipv6Addr::from(v6.sin6_addr.s6_addr).to_canonical() {
                    IpAddr::V4(ip) => SocketAddrV4::new(ip, port).into(),
                    IpAddr::V6(ip) => {
                        let scope = if ip.is_unicast_link_local() { v6.sin6_scope_id } else { 0 };
                        SocketAddrV6::new(ip, port, 0, scope).into()
                    }
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;

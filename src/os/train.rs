//! Trains of datagrams: many of one size, to or from one address, in one system call.
//!
//! What a datagram costs is its way through the kernel's network stack, not the system call. A train goes that way as one
//! (`UDP_SEGMENT` cuts it as late as the hardware allows, `UDP_GRO` hands over what was put together on the way in), which
//! is worth a factor of ten and more. Calls that only take several datagrams at once (`sendmmsg`, io_uring) gain nothing.

use std::io::{self, IoSlice};
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockAddr, Socket};

/// Datagrams in a train at most: what every kernel with `UDP_SEGMENT` takes (`UDP_MAX_SEGMENTS`).
pub const MAX_DATAGRAMS: usize = 64;
/// Bytes of a train at most: those of the largest UDP payload over IPv4.
pub const MAX_BYTES: usize = 65_507;
/// Trains received by one call.
const TRAINS: usize = 8;
/// Room for one train.
const ROOM: usize = 1 << 16;
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
/// Room for what the kernel tells about a train: its datagrams' size, the traffic class, and when it came.
const CONTROL: usize = 128;
/// A wait longer than this is a clock that was set.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Switches a socket to telling ECN marks, and if `trains` to receiving trains. True if the kernel does put datagrams
/// together (Linux 5.0).
pub fn enable(socket: &Socket, trains: bool, v6: bool) -> bool {
    // Without the marks, congestion shows as loss, as it does with most tunnels.
    let _ = if v6 { socket.set_recv_tclass_v6(true) } else { socket.set_recv_tos_v4(true) };
    // Without the time, a queue that stays long is not noticed.
    let _ = setsockopt(socket, sockopt::ReceiveTimestampns, &true);
    trains && setsockopt(socket, sockopt::UdpGroSegment, &true).is_ok()
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

/// Memory for the trains of one receiving call. Pages that no datagram reached are not resident.
pub struct Receiver {
    bytes: Box<[u8]>,
    trains: [Meta; TRAINS],
    filled: usize,
}

#[derive(Debug, Clone, Copy)]
struct Meta {
    from: SocketAddr,
    len: usize,
    size: usize,
    ecn: u8,
    waited: Option<Duration>,
}

/// Datagrams that came from one address with one ECN mark.
#[derive(Debug, Clone, Copy)]
pub struct Train<'a> {
    /// The sender.
    pub from: SocketAddr,
    /// The ECN field of the IP header, RFC 3168 section 5.
    pub ecn: u8,
    /// How long it was in the socket's queue.
    pub waited: Option<Duration>,
    bytes: &'a [u8],
    size: usize,
}

impl<'a> Train<'a> {
    /// Bytes of all datagrams.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// How many datagrams there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.size)
    }

    /// The datagrams in the order they came. All are as long as the first, but for the last, which may be shorter.
    pub fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.bytes.chunks(self.size)
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("trains", &&self.trains[..self.filled]).finish_non_exhaustive()
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            bytes: vec![0; TRAINS * ROOM].into_boxed_slice(),
            trains: [Meta { from: NOBODY, len: 0, size: 1, ecn: 0, waited: None }; TRAINS],
            filled: 0,
        }
    }
}

/// The kernel wants these numbers aligned like its own header.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

impl Receiver {
    /// Takes what a non-blocking socket holds, in one call, in the place of what was here before. Errors that other hosts
    /// can cause (ICMP) are passed over.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) {
        self.filled = 0;
        // An error queued by ICMP is taken off by the call that reports it; more than this many in a row can wait.
        for _ in 0..16 {
            match self.receive_once(socket) {
                Ok(()) | Err(Errno::EAGAIN) => return,
                Err(error) => tracing::trace!(%error, "receive error passed over"),
            }
        }
    }

    fn receive_once(&mut self, socket: BorrowedFd<'_>) -> nix::Result<()> {
        #[expect(unsafe_code, reason = "C structures without invalid values")]
        // SAFETY: all-zero bytes are valid for these plain C structures (numbers and pointers that may be null).
        let (mut names, mut headers): ([libc::sockaddr_storage; TRAINS], [libc::mmsghdr; TRAINS]) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        let mut control = [Control([0; CONTROL]); TRAINS];
        let mut places = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; TRAINS];
        for (place, bytes) in places.iter_mut().zip(self.bytes.chunks_exact_mut(ROOM)) {
            *place = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        }
        for (n, header) in headers.iter_mut().enumerate() {
            header.msg_hdr.msg_name = (&raw mut names[n]).cast();
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_iov = &raw mut places[n];
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control[n].0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL as _;
        }
        #[expect(unsafe_code, reason = "nix's wrapper needs memory of its own for every call")]
        // SAFETY: `headers` points to TRAINS valid headers, each of which points to memory of the length it says that lives
        // until after the call and is used by nobody else: `names`, `control`, `places`, and disjoint parts of `bytes`.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                TRAINS as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let got = usize::try_from(Errno::result(got)?).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for ((header, name), meta) in headers.iter().zip(&names).zip(&mut self.trains).take(got) {
            let told = told(&header.msg_hdr);
            // Only an address of a family that was not asked for is none; then there is nothing to look at.
            let (from, len) = address(name).map_or((NOBODY, 0), |from| (from, header.msg_len as usize));
            let waited = told.came.and_then(|came| now.checked_sub(came)).filter(|waited| *waited < LONGEST_WAIT);
            *meta = Meta { from, len, size: told.size.unwrap_or(len).max(1), ecn: told.ecn, waited };
        }
        self.filled = got.min(TRAINS);
        Ok(())
    }

    /// Forgets what came.
    pub const fn clear(&mut self) {
        self.filled = 0;
    }

    /// True if the call filled every place, so that more may wait.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.filled == TRAINS
    }

    /// What came, in order.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        self.trains[..self.filled].iter().zip(self.bytes.chunks(ROOM)).map(|(meta, bytes)| Train {
            from: meta.from,
            ecn: meta.ecn,
            waited: meta.waited,
            bytes: bytes.get(..meta.len).unwrap_or_default(),
            size: meta.size,
        })
    }
}

/// What the kernel tells about a train.
#[derive(Debug, Default)]
struct Told {
    /// Its datagrams' size, if there is more than one.
    size: Option<usize>,
    ecn: u8,
    /// When it came, since 1970.
    came: Option<Duration>,
}

fn told(header: &libc::msghdr) -> Told {
    let mut told = Told::default();
    #[expect(unsafe_code, reason = "the kernel's list is walked by the C library's own rules")]
    // SAFETY: `header` was filled by a successful receiving call and its control memory is still there; these functions stay
    // within `msg_controllen`. Each kind of data is read with the size the kernel writes it with.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(cmsg) = message.as_ref() {
            let data = libc::CMSG_DATA(cmsg);
            match (cmsg.cmsg_level, cmsg.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    told.size = usize::try_from(data.cast::<libc::c_int>().read_unaligned()).ok();
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => told.ecn = data.read() & 3,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    told.ecn = (data.cast::<libc::c_int>().read_unaligned() & 3) as u8;
                }
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                    let time = data.cast::<libc::timespec>().read_unaligned();
                    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
                    told.came = Some(Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default()));
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    told
}

/// An address without flow information, and with a scope only where it means something (link-local).
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
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                let scope = if ip.is_unicast_link_local() { v6.sin6_scope_id } else { 0 };
                Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, scope).into())
            }
            _ => None,
        }
    }
}

/// Sends one datagram, or with `size` a train: `pieces`, put together, are cut into datagrams of `size` bytes (the last
/// may be shorter), at most [`MAX_DATAGRAMS`] and [`MAX_BYTES`]. Their IP headers carry the ECN field `ecn` and no DSCP.
///
/// # Errors
/// As of `sendmsg`. For a train, EIO, EINVAL or EMSGSIZE mean that it cannot go as one; nothing was sent then.
pub fn send(
    socket: BorrowedFd<'_>,
    to: &SocketAddr,
    ecn: u8,
    pieces: &[IoSlice<'_>],
    size: Option<u16>,
) -> nix::Result<()> {
    send_with(socket, to, pieces, &Extras { ecn, size, ttl: None })
}

/// Sends one datagram that dies after `ttl` routers (IPv4 time to live, IPv6 hop limit). The socket's others are not affected.
///
/// # Errors
/// As of `sendmsg`. EINVAL: `ttl` is 0.
pub fn send_dying(socket: BorrowedFd<'_>, to: &SocketAddr, bytes: &[u8], ttl: u8) -> nix::Result<()> {
    send_with(socket, to, &[IoSlice::new(bytes)], &Extras { ecn: 0, size: None, ttl: Some(ttl) })
}

/// What the kernel is told about a datagram or a train.
struct Extras {
    ecn: u8,
    size: Option<u16>,
    ttl: Option<u8>,
}

fn send_with(socket: BorrowedFd<'_>, to: &SocketAddr, pieces: &[IoSlice<'_>], extras: &Extras) -> nix::Result<()> {
    let to = SockAddr::from(*to);
    let mut control = Control([0; CONTROL]);
    #[expect(unsafe_code, reason = "C structures without invalid values")]
    // SAFETY: all-zero bytes are a valid header: numbers, and pointers that may be null.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = to.as_ptr().cast_mut().cast();
    header.msg_namelen = to.len();
    // `IoSlice` is documented to be the same as an `iovec`.
    header.msg_iov = pieces.as_ptr().cast_mut().cast();
    header.msg_iovlen = pieces.len() as _;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL as _;
    let mut used = 0;
    {
        let mut tell = |level, kind, data: &[u8]| {
            #[expect(unsafe_code, reason = "the kernel's list is written by the C library's own rules")]
            // SAFETY: at most three messages of at most four bytes are written, which `CONTROL` has room for at the kernel's
            // alignment (3 × 24 bytes), and `used` is where the one before ended. `CMSG_DATA` is where the length says.
            unsafe {
                let message: *mut libc::cmsghdr = control.0.as_mut_ptr().add(used).cast();
                (*message).cmsg_level = level;
                (*message).cmsg_type = kind;
                (*message).cmsg_len = libc::CMSG_LEN(data.len() as libc::c_uint) as _;
                slice::from_raw_parts_mut(libc::CMSG_DATA(message), data.len()).copy_from_slice(data);
                used += libc::CMSG_SPACE(data.len() as libc::c_uint) as usize;
            }
        };
        if let Some(size) = extras.size {
            tell(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes());
        }
        let mut tell_ip = |v4, v6, value: u8| {
            let value = libc::c_int::from(value).to_ne_bytes();
            if to.is_ipv6() { tell(libc::IPPROTO_IPV6, v6, &value) } else { tell(libc::IPPROTO_IP, v4, &value) }
        };
        if extras.ecn != 0 {
            tell_ip(libc::IP_TOS, libc::IPV6_TCLASS, extras.ecn);
        }
        if let Some(ttl) = extras.ttl {
            tell_ip(libc::IP_TTL, libc::IPV6_HOPLIMIT, ttl);
        }
    }
    header.msg_controllen = used as _;
    #[expect(unsafe_code, reason = "nix's wrapper allocates for every call")]
    // SAFETY: every pointer in `header` is to memory of the length beside it that outlives the call and is only read.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
    Errno::result(sent).map(drop)
}

/// The kernel buffers of a socket as granted, in bytes: to receive and to send. Linux counts its own overhead in.
///
/// # Errors
/// The descriptor is no socket.
pub fn buffers(socket: &impl std::os::fd::AsFd) -> io::Result<(usize, usize)> {
    use nix::sys::socket::getsockopt;
    Ok((getsockopt(socket, sockopt::RcvBuf)?, getsockopt(socket, sockopt::SndBuf)?))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use socket2::{Domain, Protocol, Type};

    use super::*;

    fn open(v6: bool) -> Option<(UdpSocket, bool)> {
        let ip: std::net::IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let local = SocketAddr::new(ip, 0);
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP)).ok()?;
        socket.bind(&local.into()).ok()?;
        let gro = enable(&socket, true, v6);
        Some((socket.into(), gro))
    }

    fn wait(socket: &UdpSocket) {
        assert_eq!(poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5_000u16)), Ok(1));
    }

    /// Everything that arrives until `bytes` bytes did.
    fn receive(socket: &UdpSocket, mut bytes: usize) -> (Vec<(SocketAddr, u8, Vec<u8>)>, usize) {
        let mut receiver = Receiver::default();
        let (mut got, mut trains) = (Vec::new(), 0);
        while bytes > 0 {
            wait(socket);
            receiver.receive(socket.as_fd());
            for train in receiver.trains() {
                trains += 1;
                assert!(train.waited.is_some_and(|waited| waited < Duration::from_secs(5)), "{:?}", train.waited);
                for datagram in train.datagrams() {
                    bytes -= datagram.len();
                    got.push((train.from, train.ecn, datagram.to_vec()));
                }
            }
        }
        (got, trains)
    }

    #[test]
    fn a_train_arrives_as_the_datagrams_it_was_made_of() {
        for v6 in [false, true] {
            let (Some((a, _)), Some((b, gro))) = (open(v6), open(v6)) else {
                eprintln!("SKIPPED: no address of this family here");
                continue;
            };
            let to = b.local_addr().unwrap();
            let bytes: Vec<u8> = (0..64 * 1000).map(|n| (n / 7) as u8).collect();
            for (len, size, ecn) in [(64_000, 1000, 0), (5500, 1000, 1), (1000, 1000, 2), (2, 1, 3)] {
                let (one, two) = bytes[..len].split_at(len / size / 2 * size);
                let pieces = [IoSlice::new(one), IoSlice::new(two)];
                match send(a.as_fd(), &to, ecn, &pieces, Some(size as u16)) {
                    Ok(()) => {}
                    Err(e) => {
                        eprintln!("SKIPPED: this kernel cuts no trains ({e})");
                        return;
                    }
                }
                let (got, trains) = receive(&b, len);
                let from = a.local_addr().unwrap();
                let expected: Vec<_> = bytes[..len].chunks(size).map(|d| (from, ecn, d.to_vec())).collect();
                assert_eq!(got, expected);
                assert!(!gro || trains < got.len() || got.len() <= 2, "{trains} trains of {} datagrams", got.len());
            }
        }
    }

    #[test]
    fn single_datagrams_of_every_size_arrive_up_to_the_largest() {
        let ((a, _), (b, _)) = (open(false).unwrap(), open(false).unwrap());
        let bytes = vec![7; MAX_BYTES + 1];
        for len in [1, 20, 1500, MAX_BYTES] {
            send(a.as_fd(), &b.local_addr().unwrap(), 0, &[IoSlice::new(&bytes[..len])], None).unwrap();
            let (got, _) = receive(&b, len);
            assert_eq!(got.iter().map(|(_, _, bytes)| bytes.len()).collect::<Vec<_>>(), [len]);
        }
        let too_long = send(a.as_fd(), &b.local_addr().unwrap(), 0, &[IoSlice::new(&bytes)], None);
        assert_eq!(too_long, Err(Errno::EMSGSIZE));
        // More than a train holds.
        let pieces = [IoSlice::new(&bytes[..MAX_BYTES])];
        assert!(send(a.as_fd(), &b.local_addr().unwrap(), 0, &pieces, Some(100)).is_err());
    }

    #[test]
    fn one_datagram_has_a_time_to_live_of_its_own() {
        for v6 in [false, true] {
            let (Some((a, _)), Some((b, _))) = (open(v6), open(v6)) else {
                eprintln!("SKIPPED: no address of this family here");
                continue;
            };
            let to = b.local_addr().unwrap();
            if v6 {
                setsockopt(&b, sockopt::Ipv6RecvHopLimit, &true).unwrap();
            } else {
                setsockopt(&b, sockopt::Ipv4RecvTtl, &true).unwrap();
            }
            let hops = |socket: &UdpSocket| {
                use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
                wait(socket);
                let (mut bytes, mut control) = ([0; 16], nix::cmsg_space!([libc::c_int; 16]));
                let mut into = [io::IoSliceMut::new(&mut bytes)];
                let got = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::empty()).unwrap();
                let told = got.cmsgs().unwrap().find_map(|message| match message {
                    ControlMessageOwned::Ipv4Ttl(hops) | ControlMessageOwned::Ipv6HopLimit(hops) => Some(hops),
                    _ => None,
                });
                told.unwrap()
            };
            send_dying(a.as_fd(), &to, b"dies", 3).unwrap();
            assert_eq!(hops(&b), 3);
            send(a.as_fd(), &to, 0, &[IoSlice::new(b"lives")], None).unwrap();
            assert!(hops(&b) > 3);
            if !v6 {
                assert_eq!(send_dying(a.as_fd(), &to, b"dead", 0), Err(Errno::EINVAL));
            }
        }
    }

    #[test]
    fn several_senders_and_sizes_are_told_apart() {
        let (b, _) = open(false).unwrap();
        let to = b.local_addr().unwrap();
        let senders: Vec<_> = (0..10).map(|_| open(false).unwrap().0).collect();
        let mut total = 0;
        for (n, sender) in senders.iter().enumerate() {
            let bytes = vec![n as u8; 100 + n];
            total += bytes.len();
            send(sender.as_fd(), &to, (n % 4) as u8, &[IoSlice::new(&bytes)], None).unwrap();
        }
        let (got, _) = receive(&b, total);
        for (n, ((from, ecn, bytes), sender)) in got.iter().zip(&senders).enumerate() {
            assert_eq!((*from, *ecn), (sender.local_addr().unwrap(), (n % 4) as u8));
            assert_eq!(*bytes, vec![n as u8; 100 + n]);
        }
        assert_eq!(got.len(), senders.len());
        let (rcv, snd) = buffers(&b).unwrap();
        assert!(rcv > 0 && snd > 0);
    }
}

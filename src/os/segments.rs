//! A UDP socket for a server that forwards: many datagrams per system call, each with the address it came to.
//!
//! What costs in UDP is the way through the stack for each buffer, not the system call. With UDP_GRO one buffer holds a run
//! of equally long datagrams of one sender, with UDP_SEGMENT one call sends such a run; together they are worth five times
//! and more. Where the kernel or the device refuses to cut a run, it is sent datagram by datagram.

#![expect(unsafe_code, reason = "recvmmsg and sendmsg with control messages")]

use std::io::{self, IoSlice};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_void};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::os::udp::SendError;

/// Bytes of one receive buffer: the longest run the kernel makes.
pub const BUFFER: usize = 64 << 10;
/// Buffers filled by one receive.
pub const BATCH: usize = 8;
/// The most datagrams in one send (the kernel's UDP_MAX_SEGMENTS before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// The most bytes in one send.
pub const MAX_RUN: usize = 65_507;
/// Bytes asked for in each kernel buffer.
const KERNEL_BUFFER: usize = 4 << 20;
/// How long a send may wait for room in the kernel's buffer.
const SEND_PATIENCE_MS: u16 = 5;
/// Room for the control messages of one datagram.
const CONTROL: usize = 128;

/// Receive buffers of [`BUFFER`] bytes in one block. Pages are taken from the system when they are first written to.
#[derive(Debug)]
pub struct Buffers {
    bytes: Box<[u8]>,
}

impl Buffers {
    /// `count` buffers.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { bytes: vec![0; count * BUFFER].into_boxed_slice() }
    }

    /// One buffer; empty if there is none with this number.
    #[must_use]
    pub fn get(&self, index: usize) -> &[u8] {
        self.bytes.chunks_exact(BUFFER).nth(index).unwrap_or_default()
    }

    /// Copies `len` bytes from one place in one buffer to one in another.
    pub fn copy_within(&mut self, from: usize, at: usize, to: usize, to_at: usize, len: usize) {
        let source = from * BUFFER + at;
        self.bytes.copy_within(source..source + len, to * BUFFER + to_at);
    }

    /// One buffer to write to; empty if there is none with this number.
    pub fn get_mut(&mut self, index: usize) -> &mut [u8] {
        self.bytes.chunks_exact_mut(BUFFER).nth(index).unwrap_or_default()
    }
}

/// A run of datagrams from one sender in one buffer: equally long, but for the last, which may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which buffer.
    pub buffer: usize,
    /// Bytes in it.
    pub len: usize,
    /// Bytes of each datagram but the last.
    pub segment: usize,
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of our addresses.
    pub local: IpAddr,
}

/// The structures a receive needs, kept from one to the next.
pub struct Receiver {
    names: [libc::sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    runs: Vec<Run>,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("runs", &self.runs).finish_non_exhaustive()
    }
}

impl Default for Receiver {
    fn default() -> Self {
        // SAFETY: a sockaddr_storage is plain integers, for which zeros are valid.
        let names = unsafe { mem::zeroed() };
        Self { names, controls: [Control([0; CONTROL]); BATCH], runs: Vec::with_capacity(BATCH) }
    }
}

impl Receiver {
    /// What the last receive brought.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }
}

/// The socket.
#[derive(Debug)]
pub struct SegmentSocket {
    udp: UdpSocket,
    bound: SocketAddr,
    cuts: AtomicBool,
}

impl SegmentSocket {
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
        // Best effort: without either, datagrams come and go one by one, and pauses lose a few more.
        let _ = setsockopt(&socket, sockopt::UdpGroSegment, &true);
        if setsockopt(&socket, sockopt::RcvBufForce, &KERNEL_BUFFER).is_err() {
            let _ = socket.set_recv_buffer_size(KERNEL_BUFFER);
        }
        if setsockopt(&socket, sockopt::SndBufForce, &KERNEL_BUFFER).is_err() {
            let _ = socket.set_send_buffer_size(KERNEL_BUFFER);
        }
        socket.bind(&address.into())?;
        let udp: UdpSocket = socket.into();
        let bound = udp.local_addr()?;
        Ok(Self { udp, bound, cuts: AtomicBool::new(true) })
    }

    /// The address it is bound to.
    #[must_use]
    pub const fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Receives up to [`BATCH`] runs without waiting, into these buffers. Returns how many; [`Receiver::runs`] has them.
    /// Fewer than there were buffers means that nothing is left for now.
    ///
    /// # Errors
    /// Nothing is there (`WouldBlock`), or an ICMP error for something sent earlier, which is of no interest.
    pub fn recv(&self, receiver: &mut Receiver, buffers: &mut Buffers, free: &[usize]) -> io::Result<usize> {
        receiver.runs.clear();
        // SAFETY: an iovec is a pointer and a length; null and zero are valid.
        let mut iovs: [libc::iovec; BATCH] = unsafe { mem::zeroed() };
        // SAFETY: an mmsghdr is pointers and integers; null and zero are valid.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let mut count = 0;
        let (block, end) = (buffers.bytes.as_mut_ptr(), buffers.bytes.len());
        for (i, buffer) in free.iter().take(BATCH).enumerate() {
            let Some(at) = buffer.checked_mul(BUFFER).filter(|at| at + BUFFER <= end) else { break };
            // SAFETY: `at + BUFFER` lies within the block.
            iovs[i] = libc::iovec { iov_base: unsafe { block.add(at) }.cast(), iov_len: BUFFER };
            let header = &mut headers[i].msg_hdr;
            header.msg_name = (&raw mut receiver.names[i]).cast();
            header.msg_namelen = size_u32::<libc::sockaddr_storage>();
            header.msg_iov = &raw mut iovs[i];
            header.msg_iovlen = 1;
            header.msg_control = receiver.controls[i].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
            count += 1;
        }
        // SAFETY: `count` headers point to names, buffers and control room that live in `receiver`, `buffers` and this
        // frame, exclusively borrowed for the call, with their true lengths. A repeated number in `free` makes two headers
        // share one buffer, into which the kernel then writes one datagram after the other.
        let received = unsafe {
            libc::recvmmsg(
                self.udp.as_raw_fd(),
                headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (i, message) in headers.iter().enumerate().take(received) {
            let len = message.msg_len as usize;
            let Some(from) = socket_address(&receiver.names[i]) else { continue };
            let (segment, local) = control_messages(&message.msg_hdr);
            receiver.runs.push(Run {
                buffer: free.get(i).copied().unwrap_or_default(),
                len: len.min(BUFFER),
                segment: segment.filter(|s| *s > 0).unwrap_or(len).min(len).max(1),
                from: canonical(from),
                local: local.unwrap_or_else(|| self.bound.ip()).to_canonical(),
            });
        }
        Ok(received)
    }

    /// Sends the datagrams in `parts`, back to back, all `segment` bytes long but the last, from our address `from`. At most
    /// [`MAX_SEGMENTS`] and [`MAX_RUN`] bytes. Waits a few milliseconds at most for room in the kernel's buffer.
    ///
    /// # Errors
    /// [`SendError`]; what was not sent is lost, and the socket stays usable.
    pub fn send(&self, to: SocketAddr, from: IpAddr, parts: &[IoSlice<'_>], segment: usize) -> Result<(), SendError> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if total <= segment {
            return self.send_once(to, from, parts, None);
        }
        let cut = u16::try_from(segment).map_err(|_| SendError::TooBig)?;
        if self.cuts.load(Ordering::Relaxed) {
            match self.send_once(to, from, parts, Some(cut)) {
                // No checksum offload: it will never work.
                Err(SendError::Refused(errno)) if errno == Errno::EIO as i32 => {
                    tracing::debug!("this machine's network devices do not cut UDP runs");
                    self.cuts.store(false, Ordering::Relaxed);
                }
                // A segment longer than the path's MTU is fragmented only when sent alone.
                Err(SendError::TooBig) => {}
                Err(SendError::Refused(errno)) if errno == Errno::EINVAL as i32 => {}
                result => return result,
            }
        }
        let mut result = Ok(());
        for datagram in parts.iter().flat_map(|part| part.chunks(segment.max(1))) {
            result = result.and(self.send_once(to, from, &[IoSlice::new(datagram)], None));
        }
        result
    }

    fn send_once(
        &self,
        to: SocketAddr,
        from: IpAddr,
        parts: &[IoSlice<'_>],
        cut: Option<u16>,
    ) -> Result<(), SendError> {
        let (mut name, name_len) = self.storage(to).ok_or(SendError::Unreachable)?;
        let mut control = Control([0; CONTROL]);
        // SAFETY: a msghdr is pointers and integers; null and zero are valid.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = name_len;
        // IoSlice is guaranteed to have the layout of iovec, and sendmsg does not write through it.
        header.msg_iov = parts.as_ptr().cast_mut().cast();
        header.msg_iovlen = parts.len() as _;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = self.control(&mut control, from, cut) as _;
        let mut patience = true;
        loop {
            // SAFETY: name, parts and control live until the call returns, with their true lengths.
            let sent = unsafe { libc::sendmsg(self.udp.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
            if sent >= 0 {
                return Ok(());
            }
            match Errno::last() {
                Errno::EINTR => {}
                Errno::EAGAIN if patience => {
                    patience = false;
                    let mut wait = [PollFd::new(self.udp.as_fd(), PollFlags::POLLOUT)];
                    // Whatever it says, the send is tried once more.
                    let _ = poll(&mut wait, PollTimeout::from(SEND_PATIENCE_MS));
                }
                errno => return Err(SendError::of(errno)),
            }
        }
    }

    /// Writes the control messages of a send; returns their length.
    fn control(&self, control: &mut Control, from: IpAddr, cut: Option<u16>) -> usize {
        let mut used = 0;
        match (self.bound.ip(), from) {
            (IpAddr::V6(_), from) => {
                let address = match from {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let ipi6_addr = libc::in6_addr { s6_addr: address.octets() };
                let info = libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: 0 };
                used += push(control, used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            (IpAddr::V4(_), IpAddr::V4(from)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                used += push(control, used, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            // Cannot be what a datagram came to; the kernel chooses.
            (IpAddr::V4(_), IpAddr::V6(_)) => {}
        }
        if let Some(cut) = cut {
            used += push(control, used, libc::SOL_UDP, libc::UDP_SEGMENT, cut);
        }
        used
    }

    /// An address as this socket's family writes it.
    fn storage(&self, to: SocketAddr) -> Option<(libc::sockaddr_storage, libc::socklen_t)> {
        let to = match (self.bound, to) {
            (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) => return None,
            _ => to,
        };
        let address = socket2::SockAddr::from(to);
        // SAFETY: a sockaddr_storage is plain integers, for which zeros are valid.
        let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
        // SAFETY: the address is `len` bytes at `as_ptr`, which is at most the size of a sockaddr_storage; they do not
        // overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                address.as_ptr().cast::<u8>(),
                (&raw mut storage).cast::<u8>(),
                (address.len() as usize).min(size_of::<libc::sockaddr_storage>()),
            );
        }
        Some((storage, address.len()))
    }
}

impl AsFd for SegmentSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.udp.as_fd()
    }
}

/// Appends one control message at `at`; returns the room it takes.
fn push<T>(control: &mut Control, at: usize, level: c_int, kind: c_int, value: T) -> usize {
    let size = size_u32::<T>();
    // SAFETY: only computes.
    let (space, len) = unsafe { (libc::CMSG_SPACE(size) as usize, libc::CMSG_LEN(size)) };
    if at + space > CONTROL {
        return 0;
    }
    // SAFETY: `at + space` lies within the control room, which is aligned for a cmsghdr, as `at` is a sum of CMSG_SPACEs.
    unsafe {
        let header = control.0.as_mut_ptr().add(at).cast::<libc::cmsghdr>();
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = len as _;
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
    }
    space
}

/// The segment size and the local address among a received message's control messages.
fn control_messages(header: &libc::msghdr) -> (Option<usize>, Option<IpAddr>) {
    let (mut segment, mut local) = (None, None);
    // SAFETY: the kernel filled the control room of this header and set its length; the macros walk no further. Each value
    // is read unaligned, and only where the message is long enough for it.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(m) = message.as_ref() {
            let data = libc::CMSG_DATA(m);
            let holds = |size: u32| m.cmsg_len >= libc::CMSG_LEN(size) as _;
            match (m.cmsg_level, m.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) if holds(size_u32::<c_int>()) => {
                    segment = usize::try_from(data.cast::<c_int>().read_unaligned()).ok();
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) if holds(size_u32::<libc::in_pktinfo>()) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    local = Some(IpAddr::V4(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes())));
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if holds(size_u32::<libc::in6_pktinfo>()) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    local = Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)));
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, m);
        }
    }
    (segment, local)
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let bytes = (&raw const *storage).cast::<c_void>();
    match c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: a sockaddr_storage is at least as large and as aligned as a sockaddr_in, which its family says it is.
            let v4 = unsafe { &*bytes.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above, for a sockaddr_in6.
            let v6 = unsafe { &*bytes.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// IPv4 as IPv4, and a scope only where it means something (link-local).
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(a) => match a.ip().to_canonical() {
            IpAddr::V4(v4) => SocketAddrV4::new(v4, a.port()).into(),
            IpAddr::V6(v6) => {
                let scope = if v6.is_unicast_link_local() { a.scope_id() } else { 0 };
                SocketAddrV6::new(v6, a.port(), 0, scope).into()
            }
        },
        SocketAddr::V4(_) => address,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "structures of a few bytes")]
const fn size_u32<T>() -> u32 {
    size_of::<T>() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(socket: &SegmentSocket) {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5_000u16)).unwrap(), 1);
    }

    /// Receives until this many bytes came; the datagrams, in order, and the first run.
    fn take(socket: &SegmentSocket, bytes: usize) -> (Vec<Vec<u8>>, Run) {
        let (mut receiver, mut buffers) = (Receiver::default(), Buffers::new(BATCH));
        let (mut datagrams, mut first) = (Vec::new(), None);
        while datagrams.iter().map(Vec::len).sum::<usize>() < bytes {
            wait(socket);
            socket.recv(&mut receiver, &mut buffers, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
            for run in receiver.runs() {
                first.get_or_insert(*run);
                datagrams.extend(buffers.get(run.buffer)[..run.len].chunks(run.segment).map(<[u8]>::to_vec));
            }
        }
        (datagrams, first.unwrap())
    }

    fn local(socket: &SegmentSocket, ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), socket.bound().port())
    }

    #[test]
    fn runs_arrive_as_the_datagrams_they_were() {
        for (bind, ip) in [("127.0.0.1:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let Ok(a) = SegmentSocket::bind(bind.parse().unwrap()) else { continue };
            let b = SegmentSocket::bind(bind.parse().unwrap()).unwrap();
            for (segment, len) in
                [(1_400, 1_400), (1_400, 1_400 * 44), (1_400, 1_400 * 10 + 7), (9, 9 * 64), (60_000, 60_000)]
            {
                let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
                let (first, second) = bytes.split_at(len / segment / 2 * segment);
                let parts = [IoSlice::new(first), IoSlice::new(second)];
                a.send(local(&b, ip), ip.parse().unwrap(), &parts, segment).unwrap();
                let (datagrams, run) = take(&b, len);
                assert_eq!(datagrams, bytes.chunks(segment).collect::<Vec<_>>(), "{bind}: {segment}, {len}");
                assert_eq!((run.from, run.local), (local(&a, ip), ip.parse::<IpAddr>().unwrap()), "{bind}");
            }
        }
    }

    #[test]
    fn datagrams_leave_from_the_address_asked_for() {
        for bind in ["0.0.0.0:0", "[::]:0"] {
            let Ok(a) = SegmentSocket::bind(bind.parse().unwrap()) else { continue };
            let b = SegmentSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
            // Not what the kernel would choose by itself.
            a.send(b.bound(), [127, 0, 0, 3].into(), &[IoSlice::new(b"hello")], 5).unwrap();
            assert_eq!(take(&b, 5).1.from, local(&a, "127.0.0.3"));
            b.send(local(&a, "127.0.0.4"), [127, 0, 0, 1].into(), &[IoSlice::new(b"hello")], 5).unwrap();
            assert_eq!(take(&a, 5).1.local, IpAddr::from([127, 0, 0, 4]));
        }
    }

    #[test]
    fn a_run_that_cannot_be_cut_is_sent_one_by_one() {
        let a = SegmentSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let b = SegmentSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        a.cuts.store(false, Ordering::Relaxed);
        let bytes = vec![7; 2_500];
        a.send(b.bound(), [127, 0, 0, 1].into(), &[IoSlice::new(&bytes)], 1_000).unwrap();
        let lens: Vec<usize> = take(&b, 2_500).0.iter().map(Vec::len).collect();
        assert_eq!(lens, [1_000, 1_000, 500]);
    }

    #[test]
    fn nothing_there_is_said_at_once_and_refusals_are_named() {
        let a = SegmentSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let e = a.recv(&mut Receiver::default(), &mut Buffers::new(1), &[0]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        let long = vec![0; 70_000];
        let sent = a.send(a.bound(), [127, 0, 0, 1].into(), &[IoSlice::new(&long)], long.len());
        assert_eq!(sent, Err(SendError::TooBig));
        assert_eq!(
            a.send("[::1]:9".parse().unwrap(), [127, 0, 0, 1].into(), &[IoSlice::new(b"x")], 1),
            Err(SendError::Unreachable)
        );
    }
}

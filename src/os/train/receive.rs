//! Receiving trains: into memory of the caller's choosing, so that a relay can forward what came where it lies.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

use super::{BATCH, CONTROL, Control, ROOM, address};

/// A wait longer than this is a clock that was set.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// An error queued by ICMP is taken off by the call that reports it; more than this many in a row can wait.
const ERRORS_PASSED: usize = 16;

/// Rooms of [`ROOM`] bytes in one block. Pages are taken from the system when they are first written to.
pub struct Buffers {
    bytes: Box<[u8]>,
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").field("bytes", &self.bytes.len()).finish()
    }
}

impl Buffers {
    /// So many rooms.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { bytes: vec![0; count * ROOM].into_boxed_slice() }
    }

    /// One room; empty if there is none with this number.
    #[must_use]
    pub fn get(&self, index: usize) -> &[u8] {
        self.bytes.chunks_exact(ROOM).nth(index).unwrap_or_default()
    }

    /// One room to write to; empty if there is none with this number.
    pub fn get_mut(&mut self, index: usize) -> &mut [u8] {
        self.bytes.chunks_exact_mut(ROOM).nth(index).unwrap_or_default()
    }

    /// Copies `len` bytes from one place in one room to one in another.
    pub fn copy_within(&mut self, from: usize, at: usize, to: usize, to_at: usize, len: usize) {
        let source = from * ROOM + at;
        self.bytes.copy_within(source..source + len, to * ROOM + to_at);
    }
}

/// Where a train lies, and what the kernel says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which of the [`Buffers`].
    pub buffer: usize,
    /// Bytes in it.
    pub len: usize,
    /// Bytes of each datagram but the last, which may be shorter. At least 1.
    pub size: usize,
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of our addresses, if the socket tells.
    pub local: Option<IpAddr>,
    /// The ECN field of the IP header, RFC 3168 section 5.
    pub ecn: u8,
    /// How long it was in the socket's queue, if the socket tells.
    pub waited: Option<Duration>,
}

/// The structures that a receiving call needs, kept from one to the next.
pub struct Receiver {
    names: [libc::sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    runs: Vec<Run>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("runs", &self.runs).finish_non_exhaustive()
    }
}

impl Default for Receiver {
    fn default() -> Self {
        #[expect(unsafe_code, reason = "a C structure without invalid values")]
        // SAFETY: all-zero bytes are valid for addresses, which are numbers.
        let names = unsafe { mem::zeroed() };
        Self { names, controls: [Control([0; CONTROL]); BATCH], runs: Vec::with_capacity(BATCH) }
    }
}

impl Receiver {
    /// What the last call brought, in order.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Takes up to [`BATCH`] trains off a socket in one call, without waiting, into the rooms numbered in `free`. Returns how
    /// many rooms were filled; fewer than there were means that nothing is left for now.
    ///
    /// # Errors
    /// Nothing is there (`EAGAIN`), or an ICMP error for something sent earlier, which is of no interest and taken off.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, buffers: &mut Buffers, free: &[usize]) -> nix::Result<usize> {
        self.runs.clear();
        #[expect(unsafe_code, reason = "C structures without invalid values")]
        // SAFETY: all-zero bytes are valid for these plain C structures (numbers and pointers that may be null).
        let (mut places, mut headers): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        let mut count = 0;
        for (n, room) in free.iter().take(BATCH).enumerate() {
            let room = buffers.get_mut(*room);
            places[n] = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            let header = &mut headers[n].msg_hdr;
            header.msg_name = (&raw mut self.names[n]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut places[n];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[n].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
            count += 1;
        }
        #[expect(unsafe_code, reason = "nix's wrapper needs memory of its own for every call")]
        // SAFETY: the first `count` headers are valid and point to memory of the length they say that lives until after the
        // call and is used by nobody else: `names`, `controls`, `places`, and rooms of `buffers`, exclusively borrowed. If a
        // number is in `free` twice, the kernel writes one datagram after the other into the same room.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let got = usize::try_from(Errno::result(got)?).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for ((header, name), buffer) in headers.iter().zip(&self.names).zip(free).take(got) {
            // Only an address of a family that was not asked for is none.
            let Some(from) = address(name) else { continue };
            let len = (header.msg_len as usize).min(ROOM);
            let told = told(&header.msg_hdr);
            let waited = told.came.and_then(|came| now.checked_sub(came)).filter(|waited| *waited < LONGEST_WAIT);
            let size = told.size.unwrap_or(len).min(len).max(1);
            self.runs.push(Run { buffer: *buffer, len, size, from, local: told.local, ecn: told.ecn, waited });
        }
        Ok(got)
    }
}

/// What the kernel tells about a train.
#[derive(Debug, Default)]
struct Told {
    /// Its datagrams' size, if there is more than one.
    size: Option<usize>,
    local: Option<IpAddr>,
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
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    told.local = Some(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    told.local = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    told
}

/// A [`Receiver`] with rooms of its own, which what comes takes from the first.
#[derive(Debug)]
pub struct Trains {
    receiver: Receiver,
    buffers: Buffers,
}

impl Default for Trains {
    fn default() -> Self {
        Self { receiver: Receiver::default(), buffers: Buffers::new(BATCH) }
    }
}

impl Trains {
    /// Takes what a non-blocking socket holds, in one call, in the place of what was here before. Errors that other hosts
    /// can cause (ICMP) are passed over.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) {
        const ALL: [usize; BATCH] = [0, 1, 2, 3, 4, 5, 6, 7];
        for _ in 0..ERRORS_PASSED {
            match self.receiver.receive(socket, &mut self.buffers, &ALL) {
                Ok(_) | Err(Errno::EAGAIN) => return,
                Err(error) => tracing::trace!(error = %io::Error::from(error), "receive error passed over"),
            }
        }
    }

    /// Forgets what came.
    pub fn clear(&mut self) {
        self.receiver.runs.clear();
    }

    /// What came, in order.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        self.receiver.runs.iter().map(|run| Train {
            from: run.from,
            ecn: run.ecn,
            waited: run.waited,
            bytes: self.buffers.get(run.buffer).get(..run.len).unwrap_or_default(),
            size: run.size,
        })
    }
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

//! Sending trains, and what to do where the kernel does not take one: a [`Sender`] decides, an [`Exit`] is the system call.

use std::io::IoSlice;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustc_hash::FxHashMap;
use socket2::SockAddr;

use super::{CONTROL, Control};
use crate::time::Now;

/// How long a send may wait for room in the kernel's buffer.
const PATIENCE_MS: u16 = 5;
/// An address whose way refused a train is sent single datagrams for so long: drivers and routes change.
pub(super) const REFUSED_FOR: Duration = Duration::from_secs(600);
/// Addresses that are remembered to refuse trains.
pub(super) const REFUSALS: usize = 1024;

/// Why a datagram was not sent. None of these ends a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The kernel's buffer stayed full, or the kernel had no memory.
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
    #[must_use]
    pub const fn of(errno: Errno) -> Self {
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

/// What datagrams leave through: a [`Way`], or in tests something that refuses.
pub trait Exit {
    /// One system call: sends the pieces, put together, as one datagram, or with `size` as a train of datagrams of so many
    /// bytes (the last may be shorter), at most [`super::MAX_DATAGRAMS`] and [`super::MAX_BYTES`].
    ///
    /// # Errors
    /// As of `sendmsg`. For a train, EIO, EINVAL or EMSGSIZE mean that it cannot go as one; nothing was sent then.
    fn send(&mut self, pieces: &[IoSlice<'_>], size: Option<u16>) -> nix::Result<()>;

    /// Waits until the kernel's buffer has room, for a few milliseconds at most.
    fn wait(&mut self);
}

/// A non-blocking socket, an address to send to, and what the IP headers say.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// From which socket.
    pub socket: BorrowedFd<'a>,
    /// To whom, as the socket's family writes it.
    pub to: SocketAddr,
    /// From which of our addresses; the kernel chooses if there is none, or one of another family.
    pub from: Option<IpAddr>,
    /// RFC 3168 section 5.
    pub ecn: u8,
}

impl Exit for Way<'_> {
    fn send(&mut self, pieces: &[IoSlice<'_>], size: Option<u16>) -> nix::Result<()> {
        send_message(self, pieces, size, None)
    }

    fn wait(&mut self) {
        // Whatever it says, the send is tried once more.
        let _ = poll(&mut [PollFd::new(self.socket, PollFlags::POLLOUT)], PollTimeout::from(PATIENCE_MS));
    }
}

/// Sends one datagram; waits once for room in the kernel's buffer.
///
/// # Errors
/// [`SendError`]; the socket stays usable.
pub fn alone(exit: &mut impl Exit, datagram: &[u8]) -> Result<(), SendError> {
    Sender::new(false).patiently(exit, &[IoSlice::new(datagram)], None).map_err(SendError::of)
}

/// Sends one datagram that dies after `ttl` routers (IPv4 time to live, IPv6 hop limit). The socket's others are not affected.
///
/// # Errors
/// [`SendError`]; the socket stays usable. EINVAL: `ttl` is 0.
pub fn send_dying(socket: BorrowedFd<'_>, to: &SocketAddr, bytes: &[u8], ttl: u8) -> Result<(), SendError> {
    let way = Way { socket, to: *to, from: None, ecn: 0 };
    send_message(&way, &[IoSlice::new(bytes)], None, Some(ttl)).map_err(SendError::of)
}

/// What became of the datagrams of one [`Sender::send`].
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
    /// The kernel's buffer was full, and was waited for.
    pub waited: bool,
}

/// Sends trains, and remembers which ways refuse them: some drivers cannot, and some kernels do not know how.
#[derive(Debug)]
pub struct Sender {
    trains: bool,
    refused: FxHashMap<SocketAddr, Now>,
    /// The last wait for room in the kernel's buffer was in vain: nobody waits again before something went.
    stuck: bool,
    waited: bool,
}

impl Sender {
    /// With `trains` false every datagram is sent alone.
    #[must_use]
    pub fn new(trains: bool) -> Self {
        Self { trains, refused: FxHashMap::default(), stuck: false, waited: false }
    }

    /// Sends datagrams of `size` bytes each, but for the last, which may be shorter; every piece but the last holds whole
    /// ones. `to` is where `exit` leads. Waits a few milliseconds at most for room in the kernel's buffer, and not for every
    /// datagram anew if that is in vain.
    pub fn send(
        &mut self,
        exit: &mut impl Exit,
        to: SocketAddr,
        pieces: &[IoSlice<'_>],
        size: usize,
        now: Now,
    ) -> Sent {
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        let count = bytes.div_ceil(size.max(1));
        let mut refused = false;
        self.waited = false;
        if self.trains && count > 1 && self.takes_trains(&to, now) {
            match self.patiently(exit, pieces, u16::try_from(size).ok()) {
                Ok(()) => return Sent { sent: count, as_train: true, waited: self.waited, ..Sent::default() },
                // EIO: the device cannot do it. EINVAL: the kernel cannot, or it is an old one that says so of datagrams
                // that are too long. EMSGSIZE: they are; alone each is told so by itself, or the kernel fragments it.
                Err(errno @ (Errno::EIO | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EMSGSIZE)) => {
                    tracing::debug!(%errno, %to, "a train was refused, datagrams go one by one");
                    refused = true;
                }
                Err(errno) => {
                    let error = Some(SendError::of(errno));
                    return Sent { failed: count, error, waited: self.waited, ..Sent::default() };
                }
            }
        }
        let mut result = Sent::default();
        for datagram in pieces.iter().flat_map(|piece| piece.chunks(size.max(1))) {
            match self.patiently(exit, &[IoSlice::new(datagram)], None) {
                Ok(()) => result.sent += 1,
                Err(errno) => {
                    result.failed += 1;
                    result.error = Some(SendError::of(errno));
                }
            }
        }
        // What is too long also alone says nothing about trains.
        if refused && result.sent > 0 && result.error != Some(SendError::TooBig) {
            self.refuse(to, now);
        }
        Sent { waited: self.waited, ..result }
    }

    fn patiently(&mut self, exit: &mut impl Exit, pieces: &[IoSlice<'_>], size: Option<u16>) -> nix::Result<()> {
        let mut patience = !self.stuck;
        loop {
            match exit.send(pieces, size) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) if patience => {
                    patience = false;
                    self.waited = true;
                    exit.wait();
                }
                done => {
                    self.stuck = matches!(done, Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM));
                    return done;
                }
            }
        }
    }

    fn takes_trains(&mut self, to: &SocketAddr, now: Now) -> bool {
        match self.refused.get(to) {
            Some(at) if now.since(*at) < REFUSED_FOR => false,
            Some(_) => {
                self.refused.remove(to);
                true
            }
            None => true,
        }
    }

    #[cfg(test)]
    pub(super) fn refusals(&self) -> usize {
        self.refused.len()
    }

    fn refuse(&mut self, to: SocketAddr, now: Now) {
        if self.refused.len() >= REFUSALS {
            self.refused.retain(|_, at| now.since(*at) < REFUSED_FOR);
        }
        if self.refused.len() >= REFUSALS {
            // Each is found out again by one system call.
            self.refused.clear();
        }
        self.refused.insert(to, now);
    }
}

fn send_message(way: &Way<'_>, pieces: &[IoSlice<'_>], size: Option<u16>, ttl: Option<u8>) -> nix::Result<()> {
    let to = SockAddr::from(way.to);
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
            // SAFETY: at most three messages of at most four bytes and one of at most twenty are written, which `CONTROL` has
            // room for at the kernel's alignment (3 × 24 + 40 bytes), and `used` is where the one before ended. `CMSG_DATA`
            // is where the length says.
            unsafe {
                let message: *mut libc::cmsghdr = control.0.as_mut_ptr().add(used).cast();
                (*message).cmsg_level = level;
                (*message).cmsg_type = kind;
                (*message).cmsg_len = libc::CMSG_LEN(data.len() as libc::c_uint) as _;
                slice::from_raw_parts_mut(libc::CMSG_DATA(message), data.len()).copy_from_slice(data);
                used += libc::CMSG_SPACE(data.len() as libc::c_uint) as usize;
            }
        };
        if let Some(size) = size {
            tell(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes());
        }
        let v6 = to.is_ipv6();
        let mut tell_ip = |in_v4, in_v6, value: u8| {
            let value = libc::c_int::from(value).to_ne_bytes();
            if v6 { tell(libc::IPPROTO_IPV6, in_v6, &value) } else { tell(libc::IPPROTO_IP, in_v4, &value) }
        };
        if way.ecn != 0 {
            tell_ip(libc::IP_TOS, libc::IPV6_TCLASS, way.ecn);
        }
        if let Some(ttl) = ttl {
            tell_ip(libc::IP_TTL, libc::IPV6_HOPLIMIT, ttl);
        }
        match (v6, way.from) {
            (true, Some(from)) => {
                let from = match from {
                    IpAddr::V4(from) => from.to_ipv6_mapped(),
                    IpAddr::V6(from) => from,
                };
                // `struct in6_pktinfo`: an address, and the number of an interface, which is left open.
                let mut info = [0; 20];
                info[..16].copy_from_slice(&from.octets());
                tell(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
            (false, Some(IpAddr::V4(from))) => {
                // `struct in_pktinfo`: the number of an interface, the address to send from, and one that is not looked at.
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&from.octets());
                tell(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            (false, Some(IpAddr::V6(_))) | (_, None) => {}
        }
    }
    header.msg_controllen = used as _;
    #[expect(unsafe_code, reason = "nix's wrapper allocates for every call")]
    // SAFETY: every pointer in `header` is to memory of the length beside it that outlives the call and is only read.
    let sent = unsafe { libc::sendmsg(way.socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
    Errno::result(sent).map(drop)
}

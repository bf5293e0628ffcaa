//! The TUN device: where the kernel hands over packets for the mesh and takes those from it.
//!
//! tun-rs makes the device; addresses are set by [`crate::os::netlink`]. The device belongs to the process: when its
//! descriptor closes, however the process ends, the interface and its addresses and routes are gone.
//!
//! With offload (`IFF_VNET_HDR`) every packet has ten bytes in front, and one may stand for many: [`crate::wire::offload`].
//! With it there are several queues too, so that flows need not wait for each other: [`crate::engine::steer`].

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::sys::uio::writev;
use nix::unistd::read;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::os::clock;
use crate::wire::offload::{HEADER, MAX_PACKETS, MAX_SUPERPACKET, Offload, Pieces};

/// Where the kernel offers TUN devices.
const DEVICE_NODE: &str = "/dev/net/tun";
/// Interface names tried: `mesh0` to `mesh99`.
const NAMES: u32 = 100;
/// The longest interface name, in bytes (`IFNAMSIZ` less the final zero).
const MAX_NAME: usize = 15;
/// How long a name may still be held by a daemon that is ending.
const NAME_PATIENCE: Duration = Duration::from_millis(1_500);

/// Queues of a device with offload.
pub const QUEUES: usize = 4;
/// Packets of one queue in one turn.
const PACKETS: usize = 64;
/// What one read may bring.
const ROOM: usize = HEADER + MAX_SUPERPACKET;
/// Memory for the packets of one queue in one turn: a superpacket after many small ones, or after another.
const MEMORY: usize = 2 * ROOM;

/// An open TUN device, without addresses and down until [`crate::os::netlink::Netlink::bring_up`].
pub struct Tun {
    queues: Vec<SyncDevice>,
    name: String,
    index: u32,
    offload: Offloads,
}

/// What the device takes and gives in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// TCP; and the header in front of every packet.
    pub tcp: bool,
    /// UDP: Linux 6.2.
    pub udp: bool,
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun")
            .field("name", &self.name)
            .field("index", &self.index)
            .field("offload", &self.offload)
            .field("queues", &self.queues.len())
            .finish_non_exhaustive()
    }
}

/// Why there is no TUN device. Each is a sentence; [`TunError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel offers none.
    #[error("this system has no TUN devices ({DEVICE_NODE} is missing or does not work)")]
    NoDevice,
    /// Not allowed.
    #[error("meshd is not allowed to create a network interface")]
    NotAllowed,
    /// The name asked for exists.
    #[error("a network interface named {0:?} exists already")]
    NameTaken(String),
    /// The name asked for cannot be one.
    #[error("{0:?} cannot be the name of a network interface")]
    BadName(String),
    /// Anything else.
    #[error("cannot create a network interface: {0}")]
    Io(#[from] io::Error),
}

impl TunError {
    /// A stable word.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoDevice => "no-tun",
            Self::NotAllowed => "not-permitted",
            Self::NameTaken(_) => "interface-taken",
            Self::BadName(_) => "bad-interface-name",
            Self::Io(_) => "interface",
        }
    }

    /// What a person can do.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::NoDevice => {
                "load the kernel module: `sudo modprobe tun`; in a container, pass the device in: `--device /dev/net/tun`"
            }
            Self::NotAllowed => {
                "run as root (`sudo meshd up`), or give the program the capability: `sudo setcap cap_net_admin+ep $(which meshd)`"
            }
            Self::NameTaken(_) => {
                "choose another with `--tun NAME`, or leave `--tun` out and the first free `meshN` is taken"
            }
            Self::BadName(_) => "use 1 to 15 letters, digits, `-`, `_` or `.`",
            Self::Io(_) => "see `ip link` for the interfaces there are",
        }
    }
}

impl Tun {
    /// Makes the device: with this name, or the first free of `mesh0`, `mesh1`, …; with `offload`, if the kernel can.
    ///
    /// # Errors
    /// [`TunError`]. With a name, waits a moment for a daemon that is just giving it up.
    pub fn create(name: Option<&str>, offload: bool) -> Result<Self, TunError> {
        if !Path::new(DEVICE_NODE).exists() {
            // Looked at first, because tun-rs would make the device node.
            return Err(TunError::NoDevice);
        }
        if let Some(name) = name {
            check_name(name)?;
            let deadline = clock::now() + NAME_PATIENCE;
            loop {
                match Self::create_named(name, offload) {
                    Err(TunError::NameTaken(_)) if clock::now() < deadline => pause(),
                    done => return done,
                }
            }
        }
        let mut last = TunError::NameTaken("mesh0".into());
        for n in 0..NAMES {
            match Self::create_named(&format!("mesh{n}"), offload) {
                Err(taken @ TunError::NameTaken(_)) => last = taken,
                done => return done,
            }
        }
        Err(last)
    }

    fn create_named(name: &str, offload: bool) -> Result<Self, TunError> {
        // An existing persistent device would be attached to, with whatever addresses it has.
        if if_nametoindex(name).is_ok() {
            return Err(TunError::NameTaken(name.into()));
        }
        let named = |e: io::Error| match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPERM | Errno::EACCES) => TunError::NotAllowed,
            // The last two: what is there is not the device (a file, or another device).
            Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ENOTTY | Errno::EISDIR) => TunError::NoDevice,
            Some(Errno::EBUSY | Errno::EEXIST) => TunError::NameTaken(name.into()),
            _ => TunError::Io(e),
        };
        let build = |offload: bool| {
            let more = |more: &mut tun_rs::DeviceBuilderGuard<'_>| {
                more.offload(offload).multi_queue(offload);
            };
            DeviceBuilder::new().name(name).inherit_enable_state().with(more).build_sync()
        };
        let device = match build(offload) {
            Err(e) if offload && e.raw_os_error() == Some(Errno::EINVAL as i32) => {
                tracing::info!("this kernel's TUN devices know no offload");
                build(false)
            }
            made => made,
        };
        let device = device.map_err(named)?;
        let offload = Offloads { tcp: device.tcp_gso(), udp: device.udp_gso() };
        let mut queues = vec![device];
        while offload.tcp && queues.len() < QUEUES {
            match queues[0].try_clone() {
                Ok(queue) => queues.push(queue),
                Err(error) => {
                    tracing::info!(%error, queues = queues.len(), "the interface has fewer queues than it could use");
                    break;
                }
            }
        }
        for queue in &queues {
            let flags = fcntl(queue, FcntlArg::F_GETFL).map_err(io::Error::from)?;
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl(queue, FcntlArg::F_SETFL(flags)).map_err(io::Error::from)?;
        }
        let index = if_nametoindex(name).map_err(io::Error::from)?;
        Ok(Self { queues, name: name.into(), index, offload })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's number in the kernel.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// What the device takes and gives in one piece.
    #[must_use]
    pub const fn offload(&self) -> Offloads {
        self.offload
    }

    /// The descriptors of its queues, to poll them.
    pub fn queues(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd)
    }

    /// Takes what the kernel has for the mesh in one queue, as far as there is room, in the place of what `batch` held.
    /// True: nothing is left.
    ///
    /// # Errors
    /// The device is gone for good.
    pub fn receive(&self, queue: usize, batch: &mut FromKernel) -> io::Result<bool> {
        batch.packets.clear();
        let Some(queue) = self.queues.get(queue) else { return Ok(true) };
        let mut at = 0;
        while let Some(room) = batch.bytes.get_mut(at..at + ROOM).filter(|_| batch.packets.len() < PACKETS) {
            match read(queue, room) {
                Ok(len) => {
                    batch.keep(at, len, self.offload.tcp);
                    // Headers are read and written as numbers: let each begin at an even place.
                    at += len.next_multiple_of(8);
                }
                // EIO: the interface was set down by somebody; it may come up again.
                Err(Errno::EAGAIN | Errno::EIO) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(false)
    }

    /// Gives a packet, or a superpacket, to the kernel in one queue: the `pieces` of `memory`, put together.
    ///
    /// # Errors
    /// The kernel did not take it; see [`NotTaken`].
    pub fn send(&self, queue: usize, offload: &Offload, memory: &[u8], pieces: Pieces<'_>) -> Result<(), NotTaken> {
        let queue = self.queues.get(queue).ok_or(NotTaken(Errno::EINVAL))?;
        let header = offload.encode();
        let mut slices = [IoSlice::new(&[]); 1 + MAX_PACKETS];
        let mut used = 0;
        if self.offload.tcp {
            slices[0] = IoSlice::new(&header);
            used = 1;
        }
        for piece in pieces {
            let (Some(slice), Some(bytes)) = (slices.get_mut(used), memory.get(piece)) else {
                return Err(NotTaken(Errno::EINVAL));
            };
            *slice = IoSlice::new(bytes);
            used += 1;
        }
        give(|| writev(queue, &slices[..used]))
    }
}

/// The kernel did not take a packet, which is lost: nobody waits, because what comes next is as urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel did not take a packet: {0}")]
pub struct NotTaken(Errno);

impl NotTaken {
    /// It had no room or no memory, and may soon have. If not: the packet is malformed, or the interface is down.
    #[must_use]
    pub const fn is_full(self) -> bool {
        matches!(self.0, Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM)
    }
}

/// Writes until the kernel has said something about it. A packet is taken as a whole or not at all.
fn give(mut write: impl FnMut() -> nix::Result<usize>) -> Result<(), NotTaken> {
    loop {
        match write() {
            Err(Errno::EINTR) => {}
            written => return written.map(drop).map_err(NotTaken),
        }
    }
}

/// What the kernel had for the mesh in one turn.
#[derive(Debug)]
pub struct FromKernel {
    bytes: Box<[u8]>,
    packets: Vec<(Range<usize>, Offload)>,
}

impl Default for FromKernel {
    fn default() -> Self {
        Self { bytes: vec![0; MEMORY].into_boxed_slice(), packets: Vec::with_capacity(PACKETS) }
    }
}

impl FromKernel {
    fn keep(&mut self, at: usize, len: usize, with_header: bool) {
        let header = self.bytes.get(at..at + len).and_then(|packet| packet.first_chunk::<HEADER>());
        match header {
            Some(header) if with_header => {
                self.packets.push((at + HEADER..at + len, Offload::decode(header)));
            }
            // The kernel writes the header or nothing.
            None if with_header => {}
            _ => self.packets.push((at..at + len, Offload::default())),
        }
    }

    /// The packets in order. They may be changed in place.
    pub fn packets(&mut self) -> impl Iterator<Item = (&mut [u8], Offload)> {
        let mut rest = &mut self.bytes[..];
        let mut passed = 0;
        self.packets.iter().map(move |(place, offload)| {
            let (_, from) = std::mem::take(&mut rest).split_at_mut(place.start - passed);
            let (packet, after) = from.split_at_mut(place.len());
            (rest, passed) = (after, place.end);
            (packet, *offload)
        })
    }

    /// How many packets and superpackets came, and how many bytes they have.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.packets.len(), self.packets.iter().map(|(place, _)| place.len()).sum())
    }

    /// Nothing came.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

fn check_name(name: &str) -> Result<(), TunError> {
    let good = (1..=MAX_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if good { Ok(()) } else { Err(TunError::BadName(name.into())) }
}

/// A short wait between two looks at a condition with a deadline.
fn pause() {
    let _ = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(20u16));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_names_are_refused_before_anything_is_made() {
        for bad in ["", "a/b", "sixteen-letters-", "mesh 0", "..", "é"] {
            assert!(matches!(Tun::create(Some(bad), true), Err(TunError::BadName(_) | TunError::NoDevice)), "{bad:?}");
        }
        assert!(check_name("mesh0").is_ok());
    }

    #[test]
    fn every_error_says_what_to_do() {
        for error in [
            TunError::NoDevice,
            TunError::NotAllowed,
            TunError::NameTaken("x".into()),
            TunError::BadName("x".into()),
            TunError::Io(io::Error::other("x")),
        ] {
            assert!(!error.hint().is_empty() && !error.code().is_empty());
        }
    }

    #[test]
    fn what_the_kernel_does_not_take_has_its_reason() {
        let mut answers = [Err(Errno::EINTR), Err(Errno::EINTR), Ok(9), Err(Errno::EIO)].into_iter();
        assert_eq!(give(|| answers.next().unwrap()), Ok(()));
        assert_eq!(answers.len(), 1, "written once");
        for (errno, full) in [
            (Errno::EAGAIN, true),
            (Errno::ENOBUFS, true),
            (Errno::ENOMEM, true),
            (Errno::EINVAL, false),
            (Errno::EIO, false),
            (Errno::EMSGSIZE, false),
        ] {
            let mut asked = 0;
            let not_taken = give(|| {
                asked += 1;
                Err(errno)
            });
            assert_eq!(not_taken.map_err(NotTaken::is_full), Err(full), "{errno}");
            assert_eq!(asked, 1, "{errno}: nobody waits");
        }
    }

    #[test]
    fn the_loopback_name_is_taken() {
        if Path::new(DEVICE_NODE).exists() {
            assert!(matches!(Tun::create_named("lo", true), Err(TunError::NameTaken(_))));
        } else {
            eprintln!("SKIPPED: no {DEVICE_NODE} here");
        }
    }
}

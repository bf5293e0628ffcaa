//! The TUN device: where the kernel hands over packets for the mesh and takes those from it.
//!
//! tun-rs makes the device; addresses are set by [`crate::os::netlink`]. The device belongs to the process: when its
//! descriptor closes, however the process ends, the interface and its addresses and routes are gone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::os::batch::Batch;
use crate::os::clock;

/// Where the kernel offers TUN devices.
const DEVICE_NODE: &str = "/dev/net/tun";
/// Interface names tried: `mesh0` to `mesh99`.
const NAMES: u32 = 100;
/// The longest interface name, in bytes (`IFNAMSIZ` less the final zero).
const MAX_NAME: usize = 15;
/// How long a name may still be held by a daemon that is ending.
const NAME_PATIENCE: Duration = Duration::from_millis(1_500);

/// An open TUN device, without addresses and down until [`crate::os::netlink::Netlink::bring_up`].
pub struct Tun {
    device: SyncDevice,
    name: String,
    index: u32,
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun").field("name", &self.name).field("index", &self.index).finish_non_exhaustive()
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
    /// Makes the device: with this name, or the first free of `mesh0`, `mesh1`, …
    ///
    /// # Errors
    /// [`TunError`]. With a name, waits a moment for a daemon that is just giving it up.
    pub fn create(name: Option<&str>) -> Result<Self, TunError> {
        if !Path::new(DEVICE_NODE).exists() {
            // Looked at first, because tun-rs would make the device node.
            return Err(TunError::NoDevice);
        }
        if let Some(name) = name {
            check_name(name)?;
            let deadline = clock::now() + NAME_PATIENCE;
            loop {
                match Self::create_named(name) {
                    Err(TunError::NameTaken(_)) if clock::now() < deadline => pause(),
                    done => return done,
                }
            }
        }
        let mut last = TunError::NameTaken("mesh0".into());
        for n in 0..NAMES {
            match Self::create_named(&format!("mesh{n}")) {
                Err(taken @ TunError::NameTaken(_)) => last = taken,
                done => return done,
            }
        }
        Err(last)
    }

    fn create_named(name: &str) -> Result<Self, TunError> {
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
        let device = DeviceBuilder::new().name(name).inherit_enable_state().build_sync().map_err(named)?;
        let flags = fcntl(&device, FcntlArg::F_GETFL).map_err(io::Error::from)?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&device, FcntlArg::F_SETFL(flags)).map_err(io::Error::from)?;
        let index = if_nametoindex(name).map_err(io::Error::from)?;
        Ok(Self { device, name: name.into(), index })
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

    /// Takes what the kernel has for the mesh, until `batch` is full or nothing is left.
    ///
    /// # Errors
    /// The device is gone for good.
    pub fn recv_batch(&self, batch: &mut Batch<()>) -> io::Result<()> {
        while let Some(slot) = batch.slot() {
            match self.device.recv(slot) {
                Ok(len) => batch.push(len, ()),
                Err(e) => match e.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EAGAIN) => return Ok(()),
                    Some(Errno::EINTR) => {}
                    // The interface was set down by somebody; it may come up again.
                    Some(Errno::EIO) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Gives one packet to the kernel.
    ///
    /// # Errors
    /// The kernel refused it (malformed, or the interface is down).
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            match self.device.send(packet) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                sent => return sent.map(|_| ()),
            }
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
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
            assert!(matches!(Tun::create(Some(bad)), Err(TunError::BadName(_) | TunError::NoDevice)), "{bad:?}");
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
    fn the_loopback_name_is_taken() {
        if Path::new(DEVICE_NODE).exists() {
            assert!(matches!(Tun::create_named("lo"), Err(TunError::NameTaken(_))));
        } else {
            eprintln!("SKIPPED: no {DEVICE_NODE} here");
        }
    }
}

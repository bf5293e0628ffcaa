//! Raw frames: a cable that takes its time, and a tap that looks for a word. This kernel has no netem.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Segment};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeSpec;

/// Larger than any frame with segmentation offload, and the header in front of it.
const FRAME: usize = 70_000;
/// Bytes that may wait until a cable's thread takes them.
const KERNEL_BUFFER: usize = 8 << 20;
/// Frames a cable holds at most; more are dropped, as by any full queue.
const CABLE_HOLDS: usize = 20_000;

/// Makes the cable between a machine and a segment take `one_way` in each direction. Call after the machine was plugged
/// in. Lasts as long as the process.
///
/// ```text
///   machine eth0 ── p-NAME )( x-NAME ── y-NAME ── bridge
///                   this process carries frames across, late
/// ```
pub fn delay(segment: &Segment, machine: &str, one_way: Duration) -> Result<()> {
    let namespace = segment.namespace();
    let (near, far, port) = (format!("p-{machine}"), format!("x-{machine}"), format!("y-{machine}"));
    let bridge = segment.bridge_name();
    namespace.ip(&format!("link set {near} nomaster"))?;
    namespace.ip(&format!("link add {far} type veth peer name {port}"))?;
    namespace.ip(&format!("link set {port} master {bridge} up"))?;
    namespace.ip(&format!("link set {far} up"))?;
    let (near, far) = (open(namespace, Some(&near))?, open(namespace, Some(&far))?);
    carry(near.try_clone()?, far.try_clone()?, one_way)?;
    carry(far, near, one_way)
}

/// The longest that a frame was later than its cable takes, in microseconds: how busy the machine is.
static BEHIND: AtomicU64 = AtomicU64::new(0);

/// How much later than it should a frame came since this was asked last.
pub fn behind() -> Duration {
    Duration::from_micros(BEHIND.swap(0, Ordering::Relaxed))
}

fn carry(from: OwnedFd, to: OwnedFd, late: Duration) -> Result<()> {
    let work = move || {
        let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut buffer = vec![0; FRAME];
        loop {
            let now = Instant::now();
            while under_way.front().is_some_and(|(due, _)| *due <= now) {
                if let Some((due, frame)) = under_way.pop_front() {
                    let behind = now.saturating_duration_since(due).as_micros();
                    BEHIND.fetch_max(u64::try_from(behind).unwrap_or(u64::MAX), Ordering::Relaxed);
                    let _ = nix::unistd::write(&to, &frame);
                }
            }
            let wait = under_way.front().map_or(Duration::from_secs(1), |(due, _)| due.saturating_duration_since(now));
            if !readable(&from, wait) {
                continue;
            }
            if let Ok(n) = nix::unistd::read(&from, &mut buffer)
                && under_way.len() < CABLE_HOLDS
            {
                under_way.push_back((Instant::now() + late, buffer[..n].to_vec()));
            }
        }
    };
    std::thread::Builder::new().name("cable".to_owned()).spawn(work)?;
    Ok(())
}

/// Listens on all interfaces of a namespace.
pub struct Tap {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    hits: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// What a tap saw.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Frames in all.
    pub frames: u64,
    /// Those that hold the word.
    pub hits: u64,
}

impl Tap {
    /// Starts to look for `word` in every frame.
    pub fn start(namespace: &Namespace, word: &[u8]) -> Result<Self> {
        let socket = open(namespace, None)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (frames, hits) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::Builder::new().name("tap".to_owned()).spawn({
            let (stop, frames, hits, word) = (Arc::clone(&stop), Arc::clone(&frames), Arc::clone(&hits), word.to_vec());
            move || {
                let mut buffer = vec![0; FRAME];
                while !stop.load(Ordering::Relaxed) {
                    if !readable(&socket, Duration::from_millis(100)) {
                        continue;
                    }
                    let Ok(n) = nix::unistd::read(&socket, &mut buffer) else { continue };
                    frames.fetch_add(1, Ordering::Relaxed);
                    if buffer[..n].windows(word.len()).any(|part| part == word) {
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        })?;
        Ok(Self { stop, frames, hits, thread })
    }

    /// Stops and says what was seen.
    pub fn stop(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        Seen { frames: self.frames.load(Ordering::Relaxed), hits: self.hits.load(Ordering::Relaxed) }
    }
}

fn readable(socket: &impl AsFd, wait: Duration) -> bool {
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    matches!(ppoll(&mut ready, Some(TimeSpec::from_duration(wait)), None), Ok(n) if n > 0)
}

/// A packet socket on one interface of a namespace, or on all. Frames carry a virtio header in front, so that what the
/// kernel left to be done by hardware (checksums, segmentation) is still known when they go out again.
#[expect(unsafe_code, reason = "the standard library knows no packet sockets")]
fn open(namespace: &Namespace, interface: Option<&str>) -> Result<OwnedFd> {
    let interface = interface.map(str::to_owned);
    namespace.enter(move || {
        let index = match &interface {
            Some(name) => nix::net::if_::if_nametoindex(name.as_str())?,
            None => 0,
        };
        let protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context("cannot open a packet socket");
        }
        // SAFETY: `fd` was just opened and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&socket, sockopt::RcvBufForce, &KERNEL_BUFFER)
            // In a user namespace the system's limit holds.
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &KERNEL_BUFFER))?;
        const PACKET_IGNORE_OUTGOING: i32 = 23;
        let mut options = vec![];
        if interface.is_some() {
            options = vec![libc::PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING];
        }
        for option in options {
            let on: libc::c_int = 1;
            // SAFETY: the pointer is to an int that lives through the call, and its size is given.
            let result = unsafe {
                let size = libc::socklen_t::try_from(size_of_val(&on))?;
                libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), size)
            };
            if result < 0 {
                return Err(std::io::Error::last_os_error()).context("cannot set up a packet socket");
            }
        }
        // SAFETY: all fields are integers or arrays of integers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index)?;
        // SAFETY: the pointer is to a sockaddr_ll that lives through the call, and its size is given.
        let result = unsafe {
            let size = libc::socklen_t::try_from(size_of_val(&address))?;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size)
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error()).context("cannot bind a packet socket");
        }
        Ok(socket)
    })?
}

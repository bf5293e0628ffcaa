//! Tools for `scripts/bench`; not part of the program.
//!
//! ```text
//! bench-tool pipe NAME LOCAL REMOTE [--no-offload]   a tunnel without encryption or bookkeeping: the yardstick
//! bench-tool session NAME LOCAL SECRET PUBLIC REMOTE meshd's sessions without its daemon, for another WireGuard
//! bench-tool echo ADDRESS                            answers every datagram
//! bench-tool ask ADDRESS SECONDS                     round trips by UDP, one at a time: JSON with microseconds
//! bench-tool drain ADDRESS                           takes what is poured
//! bench-tool pour ADDRESS BYTES RATE SECONDS         sends so many datagrams a second: JSON with what became of them
//! bench-tool gaps ADDRESS SECONDS                    asks every 10 ms: JSON with the longest time without an answer
//! ```
//!
//! The pipe moves bytes between a TUN device and a UDP socket with the fewest system calls the kernel allows and looks at
//! none of them: what the kernel hands over with its segmentation header (up to 64 KiB) leaves as one call cut by the
//! kernel (`UDP_SEGMENT`), and what arrives in one call (`UDP_GRO`) goes back to the kernel as it was. A real tunnel
//! must cut, seal, open, check and merge: the distance to the pipe is what that costs.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::print_stdout)]

mod session;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recv, recvmsg, sendmsg, sendto, setsockopt, sockopt,
};
use nix::unistd::{read, write};
use tun_rs::{DeviceBuilder, SyncDevice};

/// Bytes of a datagram on a link with an MTU of 1500: less IPv4 and UDP headers, and what WireGuard and an inner MTU of
/// 1420 leave.
const DATAGRAM: u16 = 1452;
/// What the kernel hands over at most: its segmentation header and a packet.
const SUPERPACKET: usize = 10 + 65_535;
/// Kernel buffers.
const BUFFER: usize = 7 << 20;
/// Packets of one direction before the other has its turn.
const TURN: usize = 64;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["pipe", name, local, remote, rest @ ..] => {
            let offload = match rest {
                [] => true,
                ["--no-offload"] => false,
                _ => bail!("unknown: {rest:?}"),
            };
            Pipe::open(name, local.parse()?, remote.parse()?, offload)?.run()
        }
        ["session", name, local, secret, public, remote] => {
            session::End::open(name, local, secret, public, remote)?.run()
        }
        ["echo", address] => echo(address.parse()?),
        ["ask", address, seconds] => ask(address.parse()?, Duration::from_secs_f64(seconds.parse()?)),
        ["drain", address] => drain(address.parse()?),
        ["pour", address, bytes, rate, seconds] => {
            pour(address.parse()?, bytes.parse()?, rate.parse()?, Duration::from_secs_f64(seconds.parse()?))
        }
        ["gaps", address, seconds] => gaps(address.parse()?, Duration::from_secs_f64(seconds.parse()?)),
        _ => bail!(
            "usage: bench-tool pipe NAME LOCAL REMOTE [--no-offload] \
             | session NAME LOCAL SECRET PUBLIC REMOTE | echo ADDRESS | ask ADDRESS SECONDS | drain ADDRESS \
             | pour ADDRESS BYTES RATE SECONDS | gaps ADDRESS SECONDS"
        ),
    }
}

struct Pipe {
    tun: SyncDevice,
    socket: UdpSocket,
    offload: bool,
}

impl Pipe {
    fn open(name: &str, local: SocketAddr, remote: SocketAddr, offload: bool) -> Result<Self> {
        let tun = DeviceBuilder::new()
            .name(name)
            .inherit_enable_state()
            .with(|more| {
                more.offload(offload);
            })
            .build_sync()?;
        let flags = OFlag::from_bits_retain(fcntl(&tun, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK;
        fcntl(&tun, FcntlArg::F_SETFL(flags))?;
        let socket = UdpSocket::bind(local)?;
        socket.connect(remote)?;
        socket.set_nonblocking(true)?;
        if offload {
            setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
        }
        // Needs a capability outside of which the plain option, capped, has to do.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &BUFFER)?;
        }
        Ok(Self { tun, socket, offload })
    }

    fn run(&self) -> Result<()> {
        let mut buffer = vec![0; SUPERPACKET];
        loop {
            let mut fds =
                [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN), PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE)?;
            let ready = fds.map(|fd| fd.any().unwrap_or(false));
            if ready[1] {
                self.inward(&mut buffer)?;
            }
            if ready[0] {
                self.outward(&mut buffer)?;
            }
        }
    }

    fn outward(&self, buffer: &mut [u8]) -> Result<()> {
        for _ in 0..TURN {
            let len = match read(&self.tun, buffer) {
                Ok(len) => len,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(e) => return Err(e).context("the TUN device"),
            };
            let bytes = [IoSlice::new(&buffer[..len])];
            let cut = [ControlMessage::UdpGsoSegments(&DATAGRAM)];
            let cut = if self.offload && len > usize::from(DATAGRAM) { &cut[..] } else { &[] };
            // A full buffer drops, as a full queue anywhere does.
            match sendmsg::<()>(self.socket.as_raw_fd(), &bytes, cut, MsgFlags::empty(), None) {
                Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ECONNREFUSED) => {}
                Err(e) => return Err(e).context("sending"),
            }
        }
        Ok(())
    }

    fn inward(&self, buffer: &mut [u8]) -> Result<()> {
        for _ in 0..TURN {
            let len = match recv(self.socket.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(len) => len,
                Err(Errno::EAGAIN | Errno::ECONNREFUSED) => return Ok(()),
                Err(e) => return Err(e).context("receiving"),
            };
            // What the kernel finds malformed it counts and refuses.
            match write(&self.tun, &buffer[..len]) {
                Ok(_) | Err(Errno::EINVAL | Errno::EIO | Errno::ENOBUFS) => {}
                Err(e) => return Err(e).context("the TUN device"),
            }
        }
        Ok(())
    }
}

fn echo(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(address)?;
    let mut buffer = [0; 2048];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        // An asker that is gone.
        let _ = socket.send_to(&buffer[..len], from);
    }
}

/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(1);

fn connect(address: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    Ok(socket)
}

/// A datagram of this many bytes asks what came since the last question.
const QUESTION: usize = 8;

/// Counts what comes. To a question it answers with how many datagrams came and how many of them found this socket's buffer
/// full, which no tunnel can help. The kernel tells the latter with a datagram that came after.
fn drain(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(address)?;
    setsockopt(&socket, sockopt::RxqOvfl, &1)?;
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
    }
    let (mut came, mut full, mut buffer) = (0u64, 0u32, vec![0; 1 << 16]);
    let mut space = nix::cmsg_space!([u32; 4]);
    loop {
        let mut into = [IoSliceMut::new(&mut buffer)];
        let got = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::empty())?;
        if let Some(ControlMessageOwned::RxqOvfl(now)) =
            got.cmsgs()?.find(|message| matches!(message, ControlMessageOwned::RxqOvfl(_)))
        {
            full = now;
        }
        if got.bytes != QUESTION {
            came += 1;
            continue;
        }
        let answer = format!("{came} {full}");
        let Some(from) = got.address else { continue };
        // An asker that is gone.
        let _ = sendto(socket.as_raw_fd(), answer.as_bytes(), &from, MsgFlags::empty());
    }
}

/// What a drain says: datagrams that came, and that found its buffer full, since it started.
fn ask_drain(socket: &UdpSocket) -> Result<(u64, u64)> {
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let mut answer = [0; 64];
    for _ in 0..20 {
        socket.send(&[0; QUESTION])?;
        let Ok(len) = socket.recv(&mut answer) else { continue };
        let text = std::str::from_utf8(&answer[..len])?;
        let (came, full) = text.split_once(' ').context("the drain's answer")?;
        return Ok((came.parse()?, full.parse()?));
    }
    bail!("the drain does not answer")
}

/// The longest time whose datagrams are sent at once, after the system let others run. What was missed before is not made
/// up for: how large a burst a program sends after a pause says nothing of the tunnel.
const CATCH_UP: Duration = Duration::from_millis(4);
/// A pause between two looks at the clock.
const BREATH: Duration = Duration::from_micros(200);

fn pour(address: SocketAddr, bytes: usize, rate: f64, time: Duration) -> Result<()> {
    let socket = connect(address)?;
    let packet = vec![7; bytes.max(QUESTION + 1)];
    let before = ask_drain(&socket)?;
    let start = Instant::now();
    let (mut done, mut sent, mut due) = (Duration::ZERO, 0u64, 0.0);
    while done < time {
        let now = start.elapsed();
        due += (now - done).min(CATCH_UP).as_secs_f64() * rate;
        done = now;
        while due >= 1.0 {
            socket.send(&packet)?;
            sent += 1;
            due -= 1.0;
        }
        std::thread::sleep(BREATH);
    }
    let took = start.elapsed().as_secs_f64();
    // What is still on its way.
    std::thread::sleep(Duration::from_millis(300));
    let after = ask_drain(&socket)?;
    let (came, full) = (after.0 - before.0, after.1 - before.1);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let sent_rate = sent as f64 / took;
    println!(
        "{{\"sent\":{sent},\"came\":{came},\"receiver_full\":{full},\"lost\":{},\"rate\":{sent_rate:.0}}}",
        sent.saturating_sub(came + full)
    );
    Ok(())
}

/// How often a question is asked to find gaps.
const BEAT: Duration = Duration::from_millis(10);
/// A longer time without an answer is a stall.
const STALL: Duration = Duration::from_secs(1);

fn gaps(address: SocketAddr, time: Duration) -> Result<()> {
    let socket = connect(address)?;
    let start = Instant::now();
    let (mut next, mut last) = (start, start);
    let (mut asked, mut answered, mut stalls, mut longest) = (0u64, 0u64, Vec::new(), Duration::ZERO);
    let mut answer = [0u8; 64];
    while start.elapsed() < time {
        if Instant::now() >= next {
            asked += 1;
            next += BEAT;
            // Refused for a moment when the network changes: that counts as unanswered.
            let _ = socket.send(&asked.to_le_bytes());
        }
        let patience = next.saturating_duration_since(Instant::now()).max(Duration::from_micros(100));
        socket.set_read_timeout(Some(patience))?;
        if socket.recv(&mut answer).is_err() {
            continue;
        }
        answered += 1;
        let gap = last.elapsed();
        last = Instant::now();
        longest = longest.max(gap);
        if gap > STALL {
            stalls.push(format!("[{:.1},{:.3}]", (last - gap - start).as_secs_f64(), gap.as_secs_f64()));
        }
    }
    longest = longest.max(last.elapsed());
    println!(
        "{{\"asked\":{asked},\"answered\":{answered},\"longest_ms\":{:.1},\"stalls\":{},\"stalls_at\":[{}]}}",
        longest.as_secs_f64() * 1e3,
        stalls.len(),
        stalls.join(",")
    );
    Ok(())
}

fn ask(address: SocketAddr, time: Duration) -> Result<()> {
    let socket = connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let end = Instant::now() + time;
    let mut took = Vec::with_capacity(1 << 20);
    let mut lost = 0u32;
    let mut number = 0u64;
    let mut bytes = [0u8; 64];
    while Instant::now() < end {
        number += 1;
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let asked = Instant::now();
        socket.send(&bytes)?;
        loop {
            let mut answer = [0u8; 64];
            match socket.recv(&mut answer) {
                // A late answer to an earlier question is passed over.
                Ok(_) if answer[..8] != bytes[..8] => {}
                Ok(_) => {
                    took.push(asked.elapsed());
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    lost += 1;
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => bail!("nobody answers at {address}"),
                Err(e) => return Err(e.into()),
            }
        }
    }
    if took.is_empty() {
        bail!("no answer from {address}");
    }
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100].as_secs_f64() * 1e6;
    println!(
        "{{\"asked\":{number},\"lost\":{lost},\"p50\":{:.1},\"p99\":{:.1},\"max\":{:.1}}}",
        at(50),
        at(99),
        at(100)
    );
    Ok(())
}

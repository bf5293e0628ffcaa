//! One end of a tunnel: meshd's sessions between a TUN device and a UDP socket, so that the other end can be any WireGuard.
//! A node's daemon talks only to members of its network.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use anyhow::{Context as _, Result};
use meshd::engine::packet::MIN_ROOM;
use meshd::engine::session::tunnel::{HandshakeResult, Opened, Tick, Tunnel};
use meshd::os::clock;
use meshd::trust::keys::Secret32;
use meshd::wire::classify::{Kind, classify};
use meshd::wire::keys::WgKey;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use tun_rs::{DeviceBuilder, SyncDevice};

/// Room for a packet, sealed.
const ROOM: usize = 2048;
/// Packets of one direction before the other has its turn.
const TURN: usize = 64;
/// How often the session's timers are looked at.
const TICK_MS: u16 = 50;

/// One end.
pub(crate) struct End {
    tun: SyncDevice,
    socket: UdpSocket,
    tunnel: Tunnel,
    /// Where the other end was heard last.
    remote: SocketAddr,
    out: Vec<u8>,
}

impl End {
    /// Keys are hexadecimal.
    pub(crate) fn open(name: &str, local: &str, secret: &str, public: &str, remote: &str) -> Result<Self> {
        let tun = DeviceBuilder::new().name(name).inherit_enable_state().build_sync()?;
        let flags = OFlag::from_bits_retain(fcntl(&tun, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK;
        fcntl(&tun, FcntlArg::F_SETFL(flags))?;
        let socket = UdpSocket::bind(local.parse::<SocketAddr>()?)?;
        socket.set_nonblocking(true)?;
        let tunnel = Tunnel::new(&Secret32::new(key(secret)?), &WgKey(key(public)?), 1);
        Ok(Self { tun, socket, tunnel, remote: remote.parse()?, out: vec![0; ROOM.max(MIN_ROOM)] })
    }

    pub(crate) fn run(&mut self) -> Result<()> {
        let mut buffer = vec![0; ROOM];
        loop {
            let mut fds =
                [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN), PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(TICK_MS))?;
            while let Tick::Send { len } = self.tunnel.tick(&mut self.out, clock::now()) {
                self.send(len);
            }
            for _ in 0..TURN {
                let Ok((len, from)) = self.socket.recv_from(&mut buffer) else { break };
                self.inward(&buffer[..len], from)?;
            }
            for _ in 0..TURN {
                match read(&self.tun, &mut buffer) {
                    Ok(len) => self.outward(&buffer[..len]),
                    Err(Errno::EAGAIN) => break,
                    Err(e) => return Err(e).context("the TUN device"),
                }
            }
        }
    }

    fn inward(&mut self, datagram: &[u8], from: SocketAddr) -> Result<()> {
        let now = clock::now();
        if classify(datagram) != Kind::Data {
            if let HandshakeResult::Reply { len } | HandshakeResult::Established { len } =
                self.tunnel.handshake(from.ip(), datagram, &mut self.out, now)
            {
                self.remote = from;
                self.send(len);
            }
            return Ok(());
        }
        match self.tunnel.open(Some(from.ip()), datagram, &mut self.out, now) {
            Opened::Packet { len, .. } => {
                self.remote = from;
                match write(&self.tun, &self.out[..len]) {
                    Ok(_) | Err(Errno::EINVAL | Errno::EIO | Errno::ENOBUFS) => {}
                    Err(e) => return Err(e).context("the TUN device"),
                }
            }
            Opened::Keepalive { .. } => self.remote = from,
            // Of a meshd at the other end; a WireGuard has none.
            Opened::Message { .. } | Opened::Error(_) => {}
        }
        Ok(())
    }

    fn outward(&mut self, packet: &[u8]) {
        let now = clock::now();
        // Without a session what comes is lost, as on a full queue: nothing here waits.
        let len = match self.tunnel.seal(packet, &mut self.out, now) {
            Some(len) => Some(len),
            None => self.tunnel.initiate(&mut self.out, false, now),
        };
        if let Some(len) = len {
            self.send(len);
        }
    }

    /// What does not go is lost, as on any way.
    fn send(&self, len: usize) {
        let _ = self.socket.send_to(&self.out[..len], self.remote);
    }
}

fn key(text: &str) -> Result<[u8; 32]> {
    let digits: Option<Vec<u8>> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect();
    digits.and_then(|bytes| bytes.try_into().ok()).context("a key is 64 hexadecimal digits")
}

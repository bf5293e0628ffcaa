//! UDP sockets that are opened for a while, each on a fresh port: a hard NAT is punched with many, and the one that got
//! through goes on to carry the path.
//!
//! One thread opens, closes and sends; another waits for all of them in one descriptor and receives.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use parking_lot::RwLock;
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::io::SocketId;
use crate::os::mark::mark;
use crate::os::{train, udp};

/// Sockets received from in one turn of the data thread; the others come in the next.
const READY: usize = 16;
/// Descriptors given back when there are no more, so that the links can still be made anew.
const SPARE: usize = 16;

/// The sockets besides the two that carry data by default. IPv4 only: there is no NAT to be punched with many in IPv6.
#[derive(Debug)]
pub struct ExtraSockets {
    open: RwLock<BTreeMap<SocketId, Arc<UdpSocket>>>,
    ready: Epoll,
    trains: bool,
}

/// What came of opening some.
#[derive(Debug)]
pub struct Opened {
    /// Those that are open now.
    pub sockets: Vec<SocketId>,
    /// Why not all.
    pub error: Option<io::Error>,
}

impl ExtraSockets {
    /// None yet. With `trains` false every datagram is received alone.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(trains: bool) -> io::Result<Self> {
        Ok(Self { open: RwLock::default(), ready: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, trains })
    }

    /// Opens sockets under these numbers, each on a port that the system chooses. Stops at the first that cannot be had.
    pub fn open(&self, wanted: &[SocketId]) -> Opened {
        let mut sockets = Vec::new();
        for id in wanted {
            match self.open_one(*id) {
                Ok(()) => sockets.push(*id),
                Err(error) => {
                    if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE)) {
                        self.close(&sockets.split_off(sockets.len().saturating_sub(SPARE)));
                    }
                    return Opened { sockets, error: Some(error) };
                }
            }
        }
        Opened { sockets, error: None }
    }

    fn open_one(&self, id: SocketId) -> io::Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        mark(&socket);
        // The kernel's buffers stay as they are: what hundreds of sockets may hold at once is bounded by that.
        train::enable(&socket, self.trains, false);
        udp::never_fragment(&socket, false);
        socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into())?;
        self.ready.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0)))?;
        self.open.write().insert(id, Arc::new(socket.into()));
        Ok(())
    }

    /// Closes these; numbers that are not open are passed over.
    pub fn close(&self, sockets: &[SocketId]) {
        let mut open = self.open.write();
        let closed: Vec<_> = sockets.iter().filter_map(|id| open.remove(id)).collect();
        drop(open);
        for socket in closed {
            // One that is being received from right now would stay on the list until that is over.
            let _ = self.ready.delete(&*socket);
        }
    }

    /// How many are open.
    #[must_use]
    pub fn count(&self) -> usize {
        self.open.read().len()
    }

    /// From now on this socket carries data, so it gets the kernel buffers for it.
    pub fn carries_data(&self, socket: SocketId) {
        if let Some(socket) = self.get(socket) {
            train::enlarge_buffers(&*socket, udp::BUFFER);
        }
    }

    pub(super) fn get(&self, socket: SocketId) -> Option<Arc<UdpSocket>> {
        self.open.read().get(&socket).cloned()
    }

    /// Readable while any of them is.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }

    /// Adds those that can be received from now, at most [`READY`]; over several calls all get their turn.
    pub fn ready(&self, into: &mut Vec<SocketId>) {
        let mut events = [EpollEvent::empty(); READY];
        // An interrupted call is repeated in the next turn.
        let count = self.ready.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        into.extend(events.iter().take(count).filter_map(|event| u16::try_from(event.data()).ok()).map(SocketId));
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn numbers(range: std::ops::Range<u16>) -> Vec<SocketId> {
        range.map(SocketId).collect()
    }

    fn port(extra: &ExtraSockets, socket: SocketId) -> u16 {
        extra.get(socket).unwrap().local_addr().unwrap().port()
    }

    fn readable(extra: &ExtraSockets, patience: u16) -> bool {
        poll(&mut [PollFd::new(extra.descriptor(), PollFlags::POLLIN)], PollTimeout::from(patience)).unwrap() == 1
    }

    /// Runs again as a process of its own, with few descriptors.
    #[test]
    fn when_there_are_no_more_descriptors_some_are_given_back() {
        const FEW: &str = "MESHD_TEST_FEW_DESCRIPTORS";
        let name = "os::extra::tests::when_there_are_no_more_descriptors_some_are_given_back";
        if std::env::var_os(FEW).is_none() {
            let mut again = std::process::Command::new("/bin/sh");
            again.args(["-c", "ulimit -n 80 && exec \"$0\" --exact \"$1\""]).arg(std::env::current_exe().unwrap());
            let output = again.arg(name).env(FEW, "1").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let extra = ExtraSockets::new(true).unwrap();
        let Opened { sockets, error } = extra.open(&numbers(2..514));
        assert_eq!(error.unwrap().raw_os_error(), Some(libc::EMFILE));
        assert!((20..80).contains(&sockets.len()), "{}", sockets.len());
        assert_eq!(extra.count(), sockets.len());
        let spare: Vec<_> = (0..SPARE).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        drop(spare);
        extra.close(&sockets);
        assert_eq!(extra.count(), 0);
    }

    #[test]
    fn many_sockets_are_waited_for_as_one_and_closed_ones_are_gone() {
        let extra = ExtraSockets::new(true).unwrap();
        let ids = numbers(2..42);
        let opened = extra.open(&ids);
        assert!(opened.error.is_none());
        assert_eq!((opened.sockets, extra.count()), (ids.clone(), 40));
        let mut ports: Vec<u16> = ids.iter().map(|id| port(&extra, *id)).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 40, "each has a port of its own");
        assert!(!readable(&extra, 0));

        // All of them have something to say; each gets its turn.
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for id in &ids {
            sender.send_to(b"hello", (Ipv4Addr::LOCALHOST, port(&extra, *id))).unwrap();
        }
        let (mut heard, mut receiver) = (Vec::new(), train::Trains::default());
        while heard.len() < ids.len() {
            assert!(readable(&extra, 5_000));
            let mut ready = Vec::new();
            extra.ready(&mut ready);
            for id in ready {
                receiver.receive(extra.get(id).unwrap().as_fd());
                assert_eq!(receiver.trains().count(), 1);
                heard.push(id);
            }
        }
        heard.sort_unstable();
        assert_eq!(heard, ids);

        // Only one is left.
        let (winner, losers) = ids.split_first().unwrap();
        let lost = port(&extra, losers[0]);
        sender.send_to(b"late", (Ipv4Addr::LOCALHOST, lost)).unwrap();
        extra.close(losers);
        extra.close(losers);
        assert_eq!(extra.count(), 1);
        assert!(!readable(&extra, 0));
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, lost)).expect("its port is free again");
        extra.carries_data(*winner);
        let to = sender.local_addr().unwrap();
        let winner_socket = extra.get(*winner).unwrap();
        let mut way = train::Way { socket: winner_socket.as_fd(), to, from: None, ecn: 0 };
        train::alone(&mut way, b"data").unwrap();
        assert_eq!(sender.recv_from(&mut [0; 16]).unwrap().1.port(), port(&extra, *winner));
    }
}

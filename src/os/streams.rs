//! The TCP connections to peers, as the data thread has them: it alone reads and writes them, without waiting. A connection
//! carries datagrams ([`crate::wire::framed`]); what does not fit into its bounded queue is dropped, as a full link would.
//!
//! A connection is a stranger's until the planner has heard a peer's probe on it. Strangers are few, may send little, only what
//! looks like STUN, and have a few seconds.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::SockRef;

use crate::engine::io::SocketId;
use crate::engine::packet::DATA_OVERHEAD;
use crate::engine::path::mtu::BASE;
use crate::time::Now;
use crate::wire::classify::{Kind, classify};
use crate::wire::framed::{self, HEAD};

/// Connections read from in one turn of the data thread.
const READY: usize = 16;
/// Bytes that may wait for the kernel to take them, in each connection: some tens of milliseconds at most rates.
const QUEUE: usize = 256 << 10;
/// Bytes that the kernel takes without having sent them; the rest of its buffer is for what is under way.
const UNSENT: u32 = 128 << 10;
/// The longest datagram: WireGuard's and what may be inside a jumbo frame.
const LONGEST: usize = 9_216;
/// The longest from a stranger: a probe of data size, with some room for what later versions say in it.
const STRANGERS_LONGEST: usize = BASE as usize + DATA_OVERHEAD + 64;
/// Bytes that a stranger may send in all.
const STRANGERS_BYTES: usize = 16 << 10;
/// How long somebody may be a stranger.
const STRANGERS_TIME: Duration = Duration::from_secs(5);
/// Strangers at once. More are turned away.
pub const STRANGERS: usize = 16;
/// Connections at once.
const CONNECTIONS: usize = 512;
/// One on which nothing has come for so long is closed: probes keep the one in use alive.
const IDLE: Duration = Duration::from_secs(45);
/// Bytes read from a connection in one turn.
const READ: usize = 256 << 10;

#[derive(Debug)]
struct Stream {
    tcp: TcpStream,
    remote: SocketAddr,
    /// Nobody has proven itself yet: since when, and how much has come.
    stranger: Option<(Now, usize)>,
    heard: Now,
    /// The beginning of a datagram whose rest has not come.
    partial: Vec<u8>,
    /// What waits to be written, from `written` on.
    out: Vec<u8>,
    written: usize,
    /// The kernel was asked to say when it takes more.
    waits: bool,
}

/// What came from one connection in one turn.
#[derive(Debug, Default)]
pub struct Arrived {
    /// As long as was ever needed; only the beginning is of this turn.
    bytes: Vec<u8>,
    whole: Vec<Range<usize>>,
    /// The other end.
    pub remote: Option<SocketAddr>,
}

impl Arrived {
    /// The datagrams, in order.
    pub fn datagrams(&self) -> impl Iterator<Item = &[u8]> {
        self.whole.iter().filter_map(|place| self.bytes.get(place.clone()))
    }
}

/// Why a connection is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The other side ended it, or it broke.
    Gone,
    /// A stranger was turned away.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub struct Streams {
    open: BTreeMap<SocketId, Stream>,
    ready: Epoll,
    /// Written to in this turn.
    touched: Vec<SocketId>,
}

impl Streams {
    /// None yet.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { open: BTreeMap::new(), ready: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, touched: Vec::new() })
    }

    /// Readable while any of them has something to say.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }

    /// No connection is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// A connection was made. False: it was turned away, for there are too many.
    pub fn add(&mut self, socket: SocketId, remote: SocketAddr, tcp: TcpStream, now: Now) -> bool {
        let strangers = self.open.values().filter(|s| s.stranger.is_some()).count();
        if self.open.len() >= CONNECTIONS || (socket.0 >= SocketId::FIRST_ACCEPTED && strangers >= STRANGERS) {
            return false;
        }
        // Best effort: a connection works without, only worse.
        let _ = tcp.set_nodelay(true);
        let _ = SockRef::from(&tcp).set_tcp_notsent_lowat(UNSENT);
        // Ended by a reset: a port pair that lingers could not be used for the next attempt.
        let _ = SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
        let watched = tcp.set_nonblocking(true).is_ok()
            && self.ready.add(&tcp, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(socket.0))).is_ok();
        if watched {
            let stream = Stream {
                tcp,
                remote,
                stranger: Some((now, 0)),
                heard: now,
                partial: Vec::new(),
                out: Vec::new(),
                written: 0,
                waits: false,
            };
            self.open.insert(socket, stream);
        }
        watched
    }

    /// A peer has proven itself on this one.
    pub fn trust(&mut self, socket: SocketId) {
        if let Some(stream) = self.open.get_mut(&socket) {
            stream.stranger = None;
        }
    }

    /// Ends one, if it is there.
    pub fn close(&mut self, socket: SocketId) {
        // Closing the descriptor takes it off the list.
        self.open.remove(&socket);
    }

    /// Queues a datagram; [`Self::flush`] sends it. False: the connection is full, or gone.
    pub fn send(&mut self, socket: SocketId, datagram: &[u8]) -> bool {
        let Some(stream) = self.open.get_mut(&socket) else { return false };
        if stream.out.len() - stream.written + HEAD + datagram.len() > QUEUE || !framed::push(datagram, &mut stream.out)
        {
            return false;
        }
        if !self.touched.contains(&socket) {
            self.touched.push(socket);
        }
        true
    }

    /// Writes what was queued in this turn, as far as the kernel takes it. Those that broke are closed and told.
    pub fn flush(&mut self, broken: &mut Vec<SocketId>) {
        for socket in std::mem::take(&mut self.touched) {
            self.write(socket, broken);
        }
    }

    fn write(&mut self, socket: SocketId, broken: &mut Vec<SocketId>) {
        let Some(stream) = self.open.get_mut(&socket) else { return };
        let waits = match stream.write() {
            Ok(waits) => waits,
            Err(why) => {
                tracing::debug!(%why, "a connection to a peer broke");
                self.open.remove(&socket);
                broken.push(socket);
                return;
            }
        };
        if waits != stream.waits {
            let wanted = if waits { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let mut event = EpollEvent::new(wanted, u64::from(socket.0));
            stream.waits = waits && self.ready.modify(&stream.tcp, &mut event).is_ok();
        }
    }

    /// Those that something can be read from, at most [`READY`]; writes what waited in those that take it.
    pub fn ready(&mut self, into: &mut Vec<SocketId>, broken: &mut Vec<SocketId>) {
        let mut events = [EpollEvent::empty(); READY];
        // An interrupted call is repeated in the next turn.
        let count = self.ready.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in events.iter().take(count) {
            let Ok(socket) = u16::try_from(event.data()).map(SocketId) else { continue };
            if event.events().contains(EpollFlags::EPOLLOUT) {
                self.write(socket, broken);
            }
            // An error condition counts as readable: the read then says what it is.
            if event.events() != EpollFlags::EPOLLOUT && self.open.contains_key(&socket) {
                into.push(socket);
            }
        }
    }

    /// Reads what is there, once. On an error the connection is closed.
    ///
    /// # Errors
    /// Why it was closed.
    pub fn receive(&mut self, socket: SocketId, into: &mut Arrived, now: Now) -> Result<(), End> {
        into.whole.clear();
        let Some(stream) = self.open.get_mut(&socket) else { return Ok(()) };
        let result = stream.read(into, now);
        if result.is_err() {
            self.open.remove(&socket);
        }
        result
    }

    /// Closes those on which nothing comes, and strangers that had their time. They are told.
    pub fn expire(&mut self, now: Now, ended: &mut Vec<(SocketId, End)>) {
        let before = ended.len();
        ended.extend(self.open.iter().filter_map(|(socket, stream)| {
            let refused = stream.stranger.is_some_and(|(since, _)| now.since(since) >= STRANGERS_TIME);
            let end = if refused { Some(End::Refused) } else { (now.since(stream.heard) >= IDLE).then_some(End::Gone) };
            end.map(|end| (*socket, end))
        }));
        for (socket, _) in &ended[before..] {
            self.open.remove(socket);
        }
    }
}

impl Stream {
    /// True: the kernel takes no more for now.
    fn write(&mut self) -> io::Result<bool> {
        while self.written < self.out.len() {
            match self.tcp.write(&self.out[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    // Moved to the front seldom enough that it costs little.
                    if self.written >= QUEUE / 2 {
                        self.out.drain(..self.written);
                        self.written = 0;
                    }
                    return Ok(true);
                }
                Err(e) => return Err(e),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(false)
    }

    fn read(&mut self, into: &mut Arrived, now: Now) -> Result<(), End> {
        let (room, longest) = match self.stranger {
            Some((_, read)) => (STRANGERS_BYTES.saturating_sub(read), STRANGERS_LONGEST),
            None => (READ, LONGEST),
        };
        if room == 0 {
            return Err(End::Refused);
        }
        let kept = self.partial.len();
        into.remote = Some(self.remote);
        if into.bytes.len() < kept + room {
            into.bytes.resize(kept + room, 0);
        }
        into.bytes[..kept].copy_from_slice(&self.partial);
        let read = match self.tcp.read(&mut into.bytes[kept..kept + room]) {
            Ok(0) => return Err(End::Gone),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(_) => return Err(End::Gone),
        };
        let come = into.bytes.get(..kept + read).unwrap_or_default();
        let refused = if self.stranger.is_some() { End::Refused } else { End::Gone };
        let used = framed::split(come, longest, &mut into.whole).map_err(|_| refused)?;
        self.partial.clear();
        self.partial.extend_from_slice(come.get(used..).unwrap_or_default());
        if read > 0 {
            self.heard = now;
        }
        if let Some((_, total)) = &mut self.stranger {
            *total += read;
            if into.datagrams().any(|datagram| classify(datagram) != Kind::Stun) {
                return Err(End::Refused);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const ONE: SocketId = SocketId(SocketId::FIRST_STREAM);

    fn accepted(n: u16) -> SocketId {
        SocketId(SocketId::FIRST_ACCEPTED + n)
    }

    /// A connection: our end, and theirs.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    fn add(streams: &mut Streams, socket: SocketId) -> TcpStream {
        let (ours, theirs) = pair();
        let remote = ours.peer_addr().unwrap();
        assert!(streams.add(socket, remote, ours, Now::ZERO));
        theirs
    }

    fn wait(streams: &Streams) {
        let mut fds = [PollFd::new(streams.descriptor(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5_000u16)).unwrap(), 1);
    }

    /// Everything that comes until the connection says something final or `enough` datagrams are there.
    fn read(streams: &mut Streams, socket: SocketId, enough: usize) -> (Vec<Vec<u8>>, Option<End>) {
        let (mut got, mut arrived) = (Vec::new(), Arrived::default());
        while got.len() < enough {
            wait(streams);
            let (mut ready, mut broken) = (Vec::new(), Vec::new());
            streams.ready(&mut ready, &mut broken);
            for _ in ready.iter().filter(|s| **s == socket) {
                let result = streams.receive(socket, &mut arrived, Now::ZERO);
                got.extend(arrived.datagrams().map(<[u8]>::to_vec));
                if let Err(end) = result {
                    return (got, Some(end));
                }
            }
        }
        (got, None)
    }

    #[test]
    fn datagrams_come_out_as_they_went_in_also_in_pieces() {
        let mut streams = Streams::new().unwrap();
        let mut theirs = add(&mut streams, ONE);
        streams.trust(ONE);
        theirs.write_all(b"\x00\x03abc\x00\x02d").unwrap();
        assert_eq!(read(&mut streams, ONE, 1).0, [b"abc"]);
        theirs.write_all(b"e").unwrap();
        assert_eq!(read(&mut streams, ONE, 1).0, [b"de"]);

        assert!(streams.send(ONE, b"xyz") && streams.send(ONE, b"!"));
        streams.flush(&mut Vec::new());
        let mut got = [0; 8];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"\x00\x03xyz\x00\x01!");
        drop(theirs);
        assert_eq!(read(&mut streams, ONE, 1), (Vec::new(), Some(End::Gone)));
        assert!(streams.is_empty());
        assert!(!streams.send(ONE, b"late"));
    }

    #[test]
    fn a_full_connection_drops_and_goes_on_when_it_is_read_again() {
        let mut streams = Streams::new().unwrap();
        let mut theirs = add(&mut streams, ONE);
        let (datagram, mut sent) = ([7; 1_000], 0);
        // The kernel's buffers, then ours.
        while streams.send(ONE, &datagram) {
            sent += 1;
            streams.flush(&mut Vec::new());
            assert!(sent < 100_000, "nothing is ever full");
        }
        assert!(streams.send(ONE, b"small") || !streams.send(ONE, &datagram));
        let reader = std::thread::spawn(move || {
            let mut head = [0; 2];
            let mut whole = 0;
            while whole < sent {
                theirs.read_exact(&mut head).unwrap();
                let mut rest = vec![0; usize::from(u16::from_be_bytes(head))];
                theirs.read_exact(&mut rest).unwrap();
                whole += usize::from(rest == datagram);
            }
        });
        let mut broken = Vec::new();
        while !reader.is_finished() {
            let mut fds = [PollFd::new(streams.descriptor(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u16)).unwrap();
            streams.ready(&mut Vec::new(), &mut broken);
        }
        reader.join().unwrap();
    }

    #[test]
    fn strangers_are_few_brief_and_say_nothing_but_stun() {
        let mut streams = Streams::new().unwrap();
        let mut held: Vec<TcpStream> =
            (0..u16::try_from(STRANGERS).unwrap()).map(|n| add(&mut streams, accepted(n))).collect();
        let (one_more, _theirs) = pair();
        assert!(!streams.add(accepted(100), one_more.peer_addr().unwrap(), one_more, Now::ZERO));
        // Data, as if there were a session.
        held[0].write_all(b"\x00\x20\x04\x00\x00\x00").unwrap();
        held[0].write_all(&[0; 28]).unwrap();
        assert_eq!(read(&mut streams, accepted(0), 2).1, Some(End::Refused));
        // Announces more than a probe is long.
        held[1].write_all(b"\x20\x00").unwrap();
        assert_eq!(read(&mut streams, accepted(1), 1).1, Some(End::Refused));
        // A peer proves itself on one; the others had their time.
        streams.trust(accepted(2));
        let mut ended = Vec::new();
        streams.expire(Now::from_millis(4_999), &mut ended);
        assert!(ended.is_empty());
        streams.expire(Now::from_millis(5_000), &mut ended);
        assert_eq!(ended.len(), STRANGERS - 3);
        assert!(ended.iter().all(|(socket, end)| *socket != accepted(2) && *end == End::Refused));
        ended.clear();
        streams.expire(Now::from_millis(45_000), &mut ended);
        assert_eq!(ended, [(accepted(2), End::Gone)]);
    }
}

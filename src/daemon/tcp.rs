//! Makes TCP connections to peers: listens while they are wanted, learns how the port is seen from outside, connects from it.
//! What is made is handed to the data thread, and the planner is told ([`crate::engine::io::TcpOrder`]).

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::daemon::links::Coordinator;
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Input, Notice, SocketId, TcpOrder};
use crate::link::Endpoint;
use crate::os::mark::mark;
use crate::os::streams::STRANGERS;
use crate::os::wake::Wake;
use crate::wire::stun::{self, Change, TransactionId};

/// Orders to the data thread that may wait.
const TO_STREAMS: usize = 1_024;
/// Orders to the task that may wait: the planner makes few connections at once.
const ORDERS: usize = 64;
/// How long the coordinator may take to say how it sees the port, from its name on. The planner waits a little longer.
const SEEN_WITHIN: Duration = Duration::from_millis(700);
/// How long of that the connection of last time gets.
const AGAIN_WITHIN: Duration = Duration::from_millis(200);
/// An attempt is held for so long: either SYN may be the one that finds the other's NAT open, and the kernel repeats ours
/// after one second.
const HELD: Duration = Duration::from_secs(3);
/// Pause after a reset, which a router sends as long as the other side has not begun; doubled each time.
const RESET_PAUSE: Duration = Duration::from_millis(100);
/// Connections of others that are taken in a second.
const ACCEPTS_PER_SECOND: u32 = 20;
/// Connections that may wait to be taken.
const BACKLOG: i32 = 16;
/// The longest answer to a Binding request that is read.
const LONGEST_ANSWER: usize = 512;

/// What the data thread is to do with connections.
#[derive(Debug)]
pub(super) enum ToStreams {
    /// Carry datagrams over it from now on.
    Add { socket: SocketId, remote: SocketAddr, tcp: std::net::TcpStream },
    /// Send one.
    Send { socket: SocketId, bytes: Vec<u8> },
    /// A peer has proven itself.
    Trust(SocketId),
    /// End it.
    Close(SocketId),
}

/// What the planner's task holds.
#[derive(Debug, Clone)]
pub(super) struct TcpHandle {
    orders: mpsc::Sender<TcpOrder>,
    streams: SyncSender<ToStreams>,
    wake: Wake,
    drops: Arc<Drops>,
}

/// Makes the ways between the planner's task, this one and the data thread.
pub(super) fn channels(wake: Wake, drops: Arc<Drops>) -> (TcpHandle, mpsc::Receiver<TcpOrder>, Receiver<ToStreams>) {
    let (orders, taken) = mpsc::channel(ORDERS);
    let (streams, queue) = std::sync::mpsc::sync_channel(TO_STREAMS);
    (TcpHandle { orders, streams, wake, drops }, taken, queue)
}

impl TcpHandle {
    /// Has something done.
    pub(super) fn order(&self, order: TcpOrder) {
        match &order {
            TcpOrder::Trust(socket) => return self.tell(ToStreams::Trust(*socket)),
            TcpOrder::Close(sockets) => sockets.iter().for_each(|socket| self.tell(ToStreams::Close(*socket))),
            TcpOrder::Gather | TcpOrder::Dial { .. } | TcpOrder::Stop => {}
        }
        // A connection that is not made is as good as one that is not answered.
        if self.orders.try_send(order).is_err() {
            tracing::warn!("too many orders for TCP connections wait; one is left out");
        }
    }

    /// Sends a datagram in a connection.
    pub(super) fn send(&self, socket: SocketId, bytes: Vec<u8>) {
        self.tell(ToStreams::Send { socket, bytes });
    }

    /// Full: the data thread ends by itself what it was not told to, sooner or later.
    fn tell(&self, what: ToStreams) {
        if self.streams.try_send(what).is_err() {
            self.drops.count(Drop::StreamFull);
        }
        self.wake.ring();
    }
}

/// What the task needs.
pub(super) struct Driver {
    pub(super) orders: mpsc::Receiver<TcpOrder>,
    pub(super) handle: TcpHandle,
    pub(super) planner: mpsc::Sender<Input>,
    pub(super) coordinator: Arc<Coordinator>,
    /// The port to listen on if it is free: that of the UDP sockets, so that one rule of a firewall lets both in.
    pub(super) wanted: u16,
}

/// The port while it is open.
struct Port {
    number: u16,
    listeners: Vec<TcpListener>,
    /// The connection by which the coordinator sees it, while nobody uses it.
    seen_by: Option<TcpStream>,
}

/// What a task of this one did.
enum Done {
    Seen(Vec<SocketAddr>, Option<TcpStream>),
    Dialed(SocketId, SocketAddr, Option<TcpStream>),
}

impl Driver {
    /// Runs until the planner is gone.
    pub(super) async fn run(mut self) {
        let mut port: Option<Port> = None;
        let mut work: JoinSet<Done> = JoinSet::new();
        let mut dials: BTreeMap<SocketId, AbortHandle> = BTreeMap::new();
        let mut accepts = Accepts::default();
        loop {
            let input = tokio::select! {
                order = self.orders.recv() => match order {
                    None => return,
                    Some(TcpOrder::Gather) => self.gather(&mut port, &mut work),
                    Some(TcpOrder::Dial { socket, to }) => match &port {
                        Some(port) => {
                            let number = port.number;
                            let dial = work.spawn(async move { Done::Dialed(socket, to, dial(number, to).await) });
                            dials.insert(socket, dial);
                            None
                        }
                        None => Some(Input::Notice(Notice::StreamClosed(socket))),
                    },
                    Some(TcpOrder::Close(sockets)) => {
                        sockets.iter().filter_map(|socket| dials.remove(socket)).for_each(|dial| dial.abort());
                        None
                    }
                    Some(TcpOrder::Stop) => {
                        port = None;
                        None
                    }
                    Some(TcpOrder::Trust(_)) => None,
                },
                Some(done) = work.join_next(), if !work.is_empty() => match done {
                    Ok(Done::Seen(seen, by)) => port.as_mut().map(|port| {
                        port.seen_by = by;
                        Input::TcpReady { port: Some(port.number), seen }
                    }),
                    Ok(Done::Dialed(socket, to, connection)) => {
                        dials.remove(&socket);
                        Some(match connection.and_then(|c| self.hand_over(socket, to, c).then_some(())) {
                            Some(()) => Input::TcpOpened { socket, remote: to },
                            None => Input::Notice(Notice::StreamClosed(socket)),
                        })
                    }
                    // Ended before its time: nobody waits for it.
                    Err(_) => None,
                },
                accepted = accept(port.as_ref()) => self.accepted(accepted, &mut accepts).await,
            };
            if let Some(input) = input
                && self.planner.send(input).await.is_err()
            {
                return;
            }
        }
    }

    /// Listens, if that is not so yet, and asks how the port is seen.
    fn gather(&self, port: &mut Option<Port>, work: &mut JoinSet<Done>) -> Option<Input> {
        if port.is_none() {
            match listen(self.wanted) {
                Ok(open) => {
                    tracing::info!(port = open.number, "listening for TCP connections of peers");
                    *port = Some(open);
                }
                Err(why) => tracing::warn!(%why, "no TCP port can be listened on"),
            }
        }
        let Some(port) = port else { return Some(Input::TcpReady { port: None, seen: Vec::new() }) };
        let (number, before, coordinator) = (port.number, port.seen_by.take(), Arc::clone(&self.coordinator));
        work.spawn(async move {
            let by = timeout(SEEN_WITHIN, see(number, before, &coordinator)).await.ok().flatten();
            by.map_or(Done::Seen(Vec::new(), None), |(seen, by)| Done::Seen(vec![seen], Some(by)))
        });
        None
    }

    async fn accepted(&self, accepted: io::Result<(TcpStream, SocketAddr)>, accepts: &mut Accepts) -> Option<Input> {
        let (connection, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "a connection could not be taken");
                sleep(RESET_PAUSE).await;
                return None;
            }
        };
        let Some(socket) = accepts.number() else {
            // Its port pair must not linger, nor may it be told that anything is here.
            let _ = SockRef::from(&connection).set_linger(Some(Duration::ZERO));
            self.handle.drops.count(Drop::StreamRefused);
            return None;
        };
        let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
        self.hand_over(socket, remote, connection).then_some(Input::TcpOpened { socket, remote })
    }

    /// Gives a connection to the data thread. False: it could not be.
    fn hand_over(&self, socket: SocketId, remote: SocketAddr, connection: TcpStream) -> bool {
        let Ok(tcp) = connection.into_std() else { return false };
        let given = self.handle.streams.try_send(ToStreams::Add { socket, remote, tcp }).is_ok();
        self.handle.wake.ring();
        given
    }
}

/// How many connections of others were taken lately, and the number of the next.
struct Accepts {
    next: u16,
    second: Instant,
    taken: u32,
}

impl Default for Accepts {
    fn default() -> Self {
        Self { next: SocketId::FIRST_ACCEPTED, second: Instant::now(), taken: 0 }
    }
}

impl Accepts {
    /// None: too many in a second.
    fn number(&mut self) -> Option<SocketId> {
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.taken) = (Instant::now(), 0);
        }
        self.taken += 1;
        if self.taken > ACCEPTS_PER_SECOND {
            return None;
        }
        let socket = SocketId(self.next);
        // Far more numbers than connections, so the oldest is free again when its turn comes.
        self.next = self.next.checked_add(1).unwrap_or(SocketId::FIRST_ACCEPTED);
        Some(socket)
    }
}

const _: () = assert!(STRANGERS < (u16::MAX - SocketId::FIRST_ACCEPTED) as usize);

/// A socket that shares the port with others of ours.
fn bound(to: IpAddr, port: u16) -> io::Result<Socket> {
    let (domain, any) = match to {
        IpAddr::V4(_) => (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        IpAddr::V6(_) => (Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    mark(&socket);
    if to.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    Ok(socket)
}

fn listen(wanted: u16) -> io::Result<Port> {
    let v4 = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let first = bound(v4, wanted).or_else(|_| bound(v4, 0))?;
    let number = first.local_addr()?.as_socket().map_or(0, |addr| addr.port());
    let mut listeners = Vec::new();
    // A machine without IPv6, or with that port taken there, does without.
    for socket in [Some(first), bound(Ipv6Addr::UNSPECIFIED.into(), number).ok()].into_iter().flatten() {
        socket.listen(BACKLOG)?;
        listeners.push(TcpListener::from_std(socket.into())?);
    }
    Ok(Port { number, listeners, seen_by: None })
}

/// The next connection of somebody else; without a port there is none.
async fn accept(port: Option<&Port>) -> io::Result<(TcpStream, SocketAddr)> {
    match port.map(|port| port.listeners.as_slice()) {
        Some([one]) => one.accept().await,
        Some([one, other, ..]) => tokio::select! {
            accepted = one.accept() => accepted,
            accepted = other.accept() => accepted,
        },
        Some([]) | None => std::future::pending().await,
    }
}

fn connecting(port: u16, to: SocketAddr) -> io::Result<TcpSocket> {
    Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(bound(to.ip(), port)?)))
}

/// Connects, until it works or the time is over.
async fn dial(port: u16, to: SocketAddr) -> Option<TcpStream> {
    let until = Instant::now() + HELD;
    let mut pause = RESET_PAUSE;
    loop {
        let error = match timeout_at(until, connecting(port, to).ok()?.connect(to)).await.ok()? {
            Ok(connection) => return Some(connection),
            Err(error) => error,
        };
        tracing::debug!(%error, "a connection to a peer was not made");
        if !matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) {
            // Among others: the peer's came first, and the listener has it.
            return None;
        }
        sleep(pause).await;
        pause *= 2;
        if Instant::now() + pause >= until {
            return None;
        }
    }
}

/// How the coordinator sees a connection from the port (STUN over TCP, RFC 8489 section 6.2.2), by the one of last time if it
/// still answers. The connection is kept, so that NATs keep the port's mapping.
async fn see(port: u16, before: Option<TcpStream>, coordinator: &Coordinator) -> Option<(SocketAddr, TcpStream)> {
    if let Some(connection) = before
        && let Ok(Some(seen)) = timeout(AGAIN_WITHIN, ask(connection)).await
    {
        return Some(seen);
    }
    let endpoint = coordinator.urls.iter().find_map(|url| Endpoint::parse(url).ok())?;
    // What a proxy does says nothing of what a peer would see.
    if coordinator.proxies.towards(&endpoint).is_some() {
        return None;
    }
    let mut addresses = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await.ok()?;
    let to = addresses.find(SocketAddr::is_ipv4)?;
    let connection = connecting(port, to).ok()?.connect(to).await;
    let connection = connection
        .inspect_err(|error| tracing::debug!(%error, "the coordinator is not reached from the TCP port"))
        .ok()?;
    // The port pair is free again at once.
    let _ = SockRef::from(&connection).set_linger(Some(Duration::ZERO));
    ask(connection).await
}

async fn ask(mut connection: TcpStream) -> Option<(SocketAddr, TcpStream)> {
    let txid = TransactionId(rand::random());
    connection.write_all(&stun::binding_request(&txid, Change::default())).await.ok()?;
    let mut answer = vec![0; stun::HEADER];
    connection.read_exact(&mut answer).await.ok()?;
    let len = usize::from(u16::from_be_bytes([answer[2], answer[3]]));
    if len > LONGEST_ANSWER {
        return None;
    }
    answer.resize(stun::HEADER + len, 0);
    connection.read_exact(&mut answer[stun::HEADER..]).await.ok()?;
    let response = stun::decode_binding_response(&answer).ok().filter(|r| r.txid == txid)?;
    Some((response.mapped, connection))
}

//! The sockets on which questions come, by UDP and TCP (RFC 7766), at port 53 of the node's mesh addresses and of one loopback
//! address. Only this machine is answered.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::daemon::names::{Zones, forward};
use crate::daemon::problem;
use crate::engine::names::{Reply, Transport, failed, refuse};
use crate::wire::local::Problem;

/// DNS.
const PORT: u16 = 53;
/// The longest question that is read; real ones have some 50 bytes.
const QUESTION: usize = 4_096;
/// Questions that may wait for other servers at once; further ones are answered "failed".
const WAITING: usize = 64;
/// TCP connections at once; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 32;
/// A connection that says nothing is closed after this (RFC 7766 section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// How long the sockets wait after an error before they are used again.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// The running server. It ends when this is dropped.
pub(super) struct Server {
    /// The mesh addresses on which it answers.
    pub(super) addresses: Vec<IpAddr>,
    /// The loopback address on which it answers.
    pub(super) local: Option<Ipv4Addr>,
    /// Where it does not, and why.
    pub(super) problem: Option<Problem>,
    upstream: watch::Sender<Vec<IpAddr>>,
    _tasks: JoinSet<()>,
}

/// What every socket's task has.
#[derive(Clone)]
struct Desk {
    zones: Zones,
    own: Arc<[IpAddr]>,
    upstream: watch::Receiver<Vec<IpAddr>>,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    pub(super) fn start(addresses: &[IpAddr], local: Option<Ipv4Addr>, zones: &Zones) -> Self {
        let (upstream, upstream_watch) = watch::channel(Vec::new());
        let desk = Desk {
            zones: zones.clone(),
            own: addresses.into(),
            upstream: upstream_watch,
            waiting: Arc::new(Semaphore::new(WAITING)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        };
        let mut server = Self { addresses: Vec::new(), local: None, problem: None, upstream, _tasks: JoinSet::new() };
        for address in addresses {
            match server.listen(*address, &desk) {
                Ok(()) => server.addresses.push(*address),
                Err(e) => server.problem = Some(cannot_listen(*address, &e)),
            }
        }
        if let Some(local) = local {
            match server.listen(local.into(), &desk) {
                Ok(()) => server.local = Some(local),
                Err(e) => tracing::debug!(%local, error = %e, "no names on this address"),
            }
        }
        server
    }

    /// Questions about other names go to these servers; to none, they are refused.
    pub(super) fn forward_to(&self, servers: Vec<IpAddr>) {
        self.upstream.send_if_modified(|current| {
            let changed = *current != servers;
            *current = servers;
            changed
        });
    }

    fn listen(&mut self, address: IpAddr, desk: &Desk) -> io::Result<()> {
        let at = SocketAddr::new(address, PORT);
        let udp = std::net::UdpSocket::bind(at)?;
        udp.set_nonblocking(true)?;
        let tcp = std::net::TcpListener::bind(at)?;
        tcp.set_nonblocking(true)?;
        let udp = Arc::new(UdpSocket::from_std(udp)?);
        let tcp = TcpListener::from_std(tcp)?;
        self._tasks.spawn(datagrams(udp, desk.clone()));
        self._tasks.spawn(connections(tcp, desk.clone()));
        Ok(())
    }
}

fn cannot_listen(address: IpAddr, e: &io::Error) -> Problem {
    let hint = match e.kind() {
        io::ErrorKind::AddrInUse => {
            "another DNS server listens on every address of this machine; `ss -lnup sport = :53` names it, and most can be told their addresses"
        }
        io::ErrorKind::PermissionDenied => "port 53 needs root or CAP_NET_BIND_SERVICE",
        _ => "names of nodes do not resolve on this machine; addresses work",
    };
    problem("names", format!("no names are answered on {address}: {e}"), hint)
}

impl Desk {
    /// Packets to a mesh address come from peers too, and a server for others is a tool for amplification: only this machine
    /// is answered.
    fn is_ours(&self, from: IpAddr) -> bool {
        from.is_loopback() || self.own.contains(&from)
    }

    async fn reply(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let zone = self.zones.current().await?;
        let reply = match zone.reply(question, transport) {
            Reply::Elsewhere => self.ask_elsewhere(question, transport).await,
            Reply::Ask(servers) => ask(&servers, question, transport).await,
            reply => reply,
        };
        match reply {
            Reply::Answer(bytes) => Some(bytes),
            Reply::Elsewhere | Reply::Ask(_) | Reply::Nothing => None,
        }
    }

    async fn ask_elsewhere(&self, question: &[u8], transport: Transport) -> Reply {
        let servers = self.upstream.borrow().clone();
        if servers.is_empty() {
            return refuse(question);
        }
        ask(&servers, question, transport).await
    }
}

async fn ask(servers: &[IpAddr], question: &[u8], transport: Transport) -> Reply {
    forward::ask(servers, question, transport).await.map_or_else(|| failed(question), Reply::Answer)
}

async fn datagrams(socket: Arc<UdpSocket>, desk: Desk) {
    let mut buffer = vec![0; QUESTION];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(e) => {
                // A refusal of an earlier answer, or the address is gone with the interface; the daemon ends then.
                tracing::debug!(error = %e, "a DNS socket failed");
                tokio::time::sleep(AFTER_ERROR).await;
                continue;
            }
        };
        if !desk.is_ours(from.ip()) {
            continue;
        }
        let question = buffer[..length].to_vec();
        let Ok(turn) = Arc::clone(&desk.waiting).try_acquire_owned() else {
            if let Reply::Answer(answer) = failed(&question) {
                let _ = socket.send_to(&answer, from).await;
            }
            continue;
        };
        let (socket, desk) = (Arc::clone(&socket), desk.clone());
        tokio::spawn(async move {
            if let Some(answer) = desk.reply(&question, Transport::Udp).await {
                // Whoever asked may be gone.
                let _ = socket.send_to(&answer, from).await;
            }
            drop(turn);
        });
    }
}

async fn connections(listener: TcpListener, desk: Desk) {
    loop {
        let Ok(turn) = Arc::clone(&desk.connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) if desk.is_ours(from.ip()) => {
                let desk = desk.clone();
                tokio::spawn(async move {
                    if let Err(e) = converse(stream, &desk).await {
                        tracing::trace!(error = %e, "a DNS connection ended");
                    }
                    drop(turn);
                });
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(AFTER_ERROR).await,
        }
    }
}

/// Questions and answers on a stream, each with its length before it (RFC 1035 section 4.2.2), one after the other.
async fn converse(mut stream: TcpStream, desk: &Desk) -> io::Result<()> {
    let slow = |_| io::Error::from(io::ErrorKind::TimedOut);
    loop {
        let length = timeout(IDLE, stream.read_u16()).await.map_err(slow)??;
        let mut question = vec![0; usize::from(length)];
        timeout(IDLE, stream.read_exact(&mut question)).await.map_err(slow)??;
        let Some(answer) = desk.reply(&question, Transport::Tcp).await else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(&answer);
        timeout(IDLE, stream.write_all(&framed)).await.map_err(slow)??;
    }
}

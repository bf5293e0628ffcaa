//! The coordinator's TCP port: HTTP/1.1, with or without TLS; the path says what a connection is for.
//!
//! | path | |
//! |---|---|
//! | `/v1/control`, `/v1/relay` | WebSocket, then Noise (`link/`) |
//! | `/healthz` | JSON for load balancers and people |
//!
//! What begins like STUN is STUN over TCP (`server/stun_tcp.rs`), before TLS.
//!
//! The path of the public URL, if it has one, may stand before these. Every step of a connection has a deadline, the number
//! of connections a cap, and a site may begin only so many a second: what a flood of strangers can cost is bounded before
//! any key is computed with.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::errno::Errno;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::coord::limits::{Grain, Rate, SourceLimiter};
use crate::link::{self, Purpose};
use crate::os::clock;
use crate::server::control_conn;
use crate::server::coordinator_task::Handle;
use crate::server::relay_conn::Relay;
use crate::server::stun_tcp;
use crate::trust::keys::Secret32;
use crate::wire::local::Problem;
use crate::wire::version;

/// Connections at once, of all kinds and in all stages.
const CONNECTIONS: usize = 100_000;
/// New connections of one site.
const SITE_RATE: Rate = Rate { burst: 1_000, every: Duration::from_millis(10) };
/// New connections of everybody, for each address family: handshakes stay under about one core.
const TOTAL_RATE: Rate = Rate { burst: 10_000, every: Duration::from_micros(500) };
/// Everybody is one source.
const EVERYBODY: Grain = Grain { v4: 0, v6: 0 };
/// Sites remembered.
const SOURCES: usize = 16_384;
/// For the TLS handshake.
const TLS_DEADLINE: Duration = Duration::from_secs(10);
/// For the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// For everything before an upgrade, over all requests on a connection.
const HTTP_DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// Connections the kernel holds until they are accepted: a whole network may come back at once.
const BACKLOG: i32 = 4_096;
/// After an error of `accept` (no descriptors left): until the next try.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);
/// Unsent bytes the kernel may hold for a connection.
const UNSENT: u32 = 128 << 10;

/// What every connection needs.
pub(super) struct App {
    pub(super) secret: Secret32,
    pub(super) coordinator: Handle,
    pub(super) relay: Arc<Relay>,
    /// The path of the public URL without a slash at its end; usually empty.
    pub(super) prefix: String,
    /// A proxy in front adds `X-Forwarded-For`; believed only from loopback addresses.
    pub(super) behind_proxy: bool,
}

/// Opens the listening socket. An IPv6 wildcard takes IPv4 too; on a machine without IPv6 it becomes the IPv4 one.
///
/// # Errors
/// `listen`.
pub(super) fn bind(address: SocketAddr) -> Result<TcpListener, Problem> {
    let result = match bind_exactly(address) {
        Err(e) if is_missing_family(&e) && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            bind_exactly(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        result => result,
    };
    result.map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::AddrInUse => {
                "another program has that TCP port: stop it, or choose another with --listen ADDR:PORT"
            }
            io::ErrorKind::PermissionDenied => "run as root, or choose a port from 1024 on with --listen ADDR:PORT",
            _ => "give an address of this machine with --listen ADDR:PORT",
        };
        Problem {
            code: "listen".into(),
            text: format!("the coordinator cannot listen on TCP {address}: {e}"),
            hint: hint.into(),
        }
    })
}

fn bind_exactly(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // A port whose old connections linger is free; one that another program listens on is not.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// The machine has no such address family.
pub(super) fn is_missing_family(e: &io::Error) -> bool {
    matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

/// Accepts connections until `stop` changes, then waits for all of them to end.
pub(super) async fn serve(tcp: TcpListener, tls: Option<TlsAcceptor>, app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut sites = SourceLimiter::new(SITE_RATE, Grain::SITE, SOURCES);
    let mut total = SourceLimiter::new(TOTAL_RATE, EVERYBODY, 2);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = tcp.accept() => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            _ = stop.changed() => break,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a connection");
                sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        if !sites.allow(from.ip(), clock::now()) || !total.allow(from.ip(), clock::now()) {
            tracing::debug!("a connection too many in a moment");
            continue;
        }
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            tracing::debug!("all {CONNECTIONS} connections are in use");
            continue;
        };
        let connection =
            Connection { app: Arc::clone(&app), peer: from, local: stream.local_addr().ok(), stop: stop.clone() };
        let tls = tls.clone();
        connections.spawn(async move {
            connection.run(stream, tls).await;
            drop(place);
        });
    }
    drop(tcp);
    while connections.join_next().await.is_some() {}
}

struct Connection {
    app: Arc<App>,
    peer: SocketAddr,
    local: Option<SocketAddr>,
    stop: watch::Receiver<bool>,
}

/// What came of the HTTP part of a connection.
struct Upgrade {
    purpose: Purpose,
    connection: OnUpgrade,
    from: IpAddr,
}

impl Connection {
    async fn run(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        // Best effort: a connection works without.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        let mut first = [0];
        match timeout(HEAD_DEADLINE, stream.peek(&mut first)).await {
            Ok(Ok(1)) => {}
            Ok(_) => return,
            Err(_) => return tracing::debug!("nothing came on a connection"),
        }
        if let (stun_tcp::FIRST_BYTE, Some(local)) = (first[0], self.local) {
            let mut stop = self.stop;
            return tokio::select! {
                () = stun_tcp::serve(stream, self.peer, local) => {}
                _ = stop.changed() => {}
            };
        }
        let Some(tls) = tls else { return self.http(stream).await };
        match timeout(TLS_DEADLINE, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.http(stream).await,
            Ok(Err(e)) => tracing::debug!(error = %e, "TLS handshake failed"),
            Err(_) => tracing::debug!("TLS handshake took too long"),
        }
    }

    async fn http<S>(mut self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let upgrade = Mutex::new(None);
        let service = service_fn(|request| {
            let response = self.answer(request, &upgrade);
            async move { Ok::<_, Infallible>(response) }
        });
        let mut stop = self.stop.clone();
        let http = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::select! {
            served = timeout(HTTP_DEADLINE, http) => match served {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::debug!(error = %e, "HTTP connection ended"),
                Err(_) => tracing::debug!("HTTP connection took too long"),
            },
            _ = stop.changed() => return,
        }
        if let Some(upgrade) = upgrade.into_inner() {
            self.stop = stop;
            self.websocket(upgrade).await;
        }
    }

    async fn websocket(self, upgrade: Upgrade) {
        let stream = match upgrade.connection.await {
            Ok(stream) => TokioIo::new(stream),
            Err(e) => return tracing::debug!(error = %e, "upgrade failed"),
        };
        let app = &*self.app;
        let addresses = (Some(self.peer), self.local);
        match upgrade.purpose {
            Purpose::Control => match link::accept_control(stream, &app.secret, addresses).await {
                Ok((peer, link)) => {
                    control_conn::serve(&app.coordinator, peer, Some(upgrade.from), link, self.stop).await;
                }
                Err(e) => tracing::debug!(error = %e, "control handshake failed"),
            },
            Purpose::Relay => match link::accept_relay(stream, &app.secret, addresses).await {
                Ok((peer, link)) => {
                    let ended = app.relay.serve(&peer.key, link, self.stop).await;
                    tracing::debug!(peer = ?peer.key, ?ended, "relay connection ended");
                }
                Err(e) => tracing::debug!(error = %e, "relay handshake failed"),
            },
        }
    }

    fn answer(&self, mut request: Request<Incoming>, upgrade: &Mutex<Option<Upgrade>>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let path = path.strip_prefix(self.app.prefix.as_str()).unwrap_or(path);
        let purpose = match path {
            "/healthz" => return self.health(request.method()),
            path if path == Purpose::Control.path() => Purpose::Control,
            path if path == Purpose::Relay.path() => Purpose::Relay,
            _ => {
                return text(
                    StatusCode::NOT_FOUND,
                    "This is a meshd coordinator, and nothing is here. Machines join its network with `meshd up TOKEN`.\n",
                );
            }
        };
        let Some(accept) = websocket_accept(&request) else {
            let mut response = text(
                StatusCode::UPGRADE_REQUIRED,
                "This is a meshd coordinator. meshd nodes connect here by WebSocket; a proxy in between must pass the \
                 Upgrade header.\n",
            );
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            return response;
        };
        let from = self.from(request.headers());
        *upgrade.lock() = Some(Upgrade { purpose, connection: hyper::upgrade::on(&mut request), from });
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        response
    }

    fn health(&self, method: &Method) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "Only GET.\n");
        }
        let document = serde_json::json!({
            "status": "ok",
            "version": version::PROGRAM,
            "network": self.app.coordinator.facts().network,
        });
        let mut response = Response::new(Full::from(format!("{document}\n")));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    /// Where a request comes from: the TCP connection's other end, or what a proxy on this machine says.
    fn from(&self, headers: &HeaderMap) -> IpAddr {
        let direct = self.peer.ip().to_canonical();
        if !(self.app.behind_proxy && direct.is_loopback()) {
            return direct;
        }
        // The last entry is the one our own proxy added.
        let forwarded = headers.get_all("x-forwarded-for").iter().next_back().and_then(|v| v.to_str().ok());
        forwarded.and_then(|v| v.rsplit(',').next()).and_then(|v| v.trim().parse().ok()).unwrap_or(direct)
    }
}

/// The answer to a WebSocket opening handshake (RFC 6455 section 4.2.1); `None` if the request is none.
fn websocket_accept(request: &Request<Incoming>) -> Option<HeaderValue> {
    let headers = request.headers();
    let has = |name, wanted: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .any(|v| v.trim().eq_ignore_ascii_case(wanted))
    };
    let is_websocket = request.method() == Method::GET
        && has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_websocket)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

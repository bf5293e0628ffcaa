//! The node's end: from a URL to a link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::link::error::{ConnectError, LinkError, Upgrade, plainly};
use crate::link::noise::{Answer, Initiator, NoiseError, Offer, Opener, Purpose, Sealer};
use crate::link::proxy::{self, Proxies, Proxy};
use crate::link::pump::{self, Keepalive, Limits, close};
use crate::link::{ControlLink, Endpoint, LinkInfo, RelayLink, control, relay, tls};
use crate::os::mark::mark;
use crate::trust::keys::Secret32;
use crate::wire::keys::ControlKey;
use crate::wire::version::{self, VersionRange};

/// The next address of a host is tried when the one before has not answered for this long (RFC 8305 section 5).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// Addresses of one host that are tried.
const MAX_ADDRESSES: usize = 8;
/// Unsent bytes the kernel may hold for a connection, so that a ping does not wait behind megabytes.
pub(super) const UNSENT: u32 = 128 << 10;

/// Whom to connect to, and as whom.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The coordinator's URL, from the token.
    pub url: String,
    /// The coordinator's Noise key, from the token.
    pub coordinator: ControlKey,
    /// The node's control secret.
    pub secret: &'a Secret32,
    /// The proxies on the way, if any.
    pub proxies: &'a Proxies,
    /// For everything from name resolution to the last handshake message.
    pub timeout: Duration,
}

/// A link that is up.
#[derive(Debug)]
pub enum Connected {
    /// For control messages.
    Control(ControlLink),
    /// For relay frames.
    Relay(RelayLink),
}

/// Connects for one purpose.
///
/// # Errors
/// [`ConnectError`], within the target's timeout.
pub async fn connect(target: &Target<'_>, purpose: Purpose) -> Result<Connected, ConnectError> {
    match purpose {
        Purpose::Control => connect_control(target).await.map(Connected::Control),
        Purpose::Relay => connect_relay(target).await.map(Connected::Relay),
    }
}

/// Connects the control link.
///
/// # Errors
/// [`ConnectError`], within the target's timeout.
pub async fn connect_control(target: &Target<'_>) -> Result<ControlLink, ConnectError> {
    let (ws, ciphers, info) = establish(target, Purpose::Control, version::CONTROL, control::LIMITS).await?;
    Ok(match ws {
        Ws::Tls(ws) => ControlLink::start(*ws, ciphers, info, Keepalive::NODE),
        Ws::Plain(ws) => ControlLink::start(*ws, ciphers, info, Keepalive::NODE),
    })
}

/// Connects the relay link.
///
/// # Errors
/// [`ConnectError`], within the target's timeout.
pub async fn connect_relay(target: &Target<'_>) -> Result<RelayLink, ConnectError> {
    let (ws, _ciphers, info) = establish(target, Purpose::Relay, version::RELAY, relay::LIMITS).await?;
    Ok(match ws {
        Ws::Tls(ws) => RelayLink::start(*ws, info, Keepalive::NODE),
        Ws::Plain(ws) => RelayLink::start(*ws, info, Keepalive::NODE),
    })
}

type Ciphers = (Sealer, Opener);

pub(super) enum Ws {
    Tls(Box<WebSocketStream<tokio_rustls::client::TlsStream<TcpStream>>>),
    Plain(Box<WebSocketStream<TcpStream>>),
}

/// Everything up to the confirmation.
pub(super) async fn establish(
    target: &Target<'_>,
    purpose: Purpose,
    versions: VersionRange,
    limits: Limits,
) -> Result<(Ws, Ciphers, LinkInfo), ConnectError> {
    let endpoint = Endpoint::parse(&target.url)?;
    let proxy = target.proxies.towards(&endpoint);
    // For errors: who answered, or did not.
    let shown = match proxy {
        Some(proxy) => format!("{endpoint} (through the proxy {proxy})"),
        None => endpoint.to_string(),
    };
    let mut stage = "resolving its name";
    let steps = async {
        let tcp = tcp(&endpoint, proxy, &mut stage).await?;
        let info = LinkInfo {
            peer_addr: tcp.peer_addr().ok(),
            local_addr: tcp.local_addr().ok(),
            version: 0,
            program: String::new(),
        };
        let steps = Steps { target, endpoint: &endpoint, shown: &shown, purpose, versions, limits };
        let (ws, ciphers, answer) = if endpoint.tls {
            stage = "during the TLS handshake";
            let tls = steps.tls(tcp).await?;
            stage = "during the WebSocket and Noise handshakes";
            let (ws, ciphers, answer) = steps.websocket_and_noise(tls).await?;
            (Ws::Tls(Box::new(ws)), ciphers, answer)
        } else {
            stage = "during the WebSocket and Noise handshakes";
            let (ws, ciphers, answer) = steps.websocket_and_noise(tcp).await?;
            (Ws::Plain(Box::new(ws)), ciphers, answer)
        };
        Ok((ws, ciphers, LinkInfo { version: answer.version.unwrap_or_default(), program: answer.program, ..info }))
    };
    match timeout(target.timeout, steps).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::TimedOut { addr: shown.clone(), after: target.timeout, stage }),
    }
}

async fn tcp(endpoint: &Endpoint, proxy: Option<&Proxy>, stage: &mut &'static str) -> Result<TcpStream, ConnectError> {
    if let Some(proxy) = proxy {
        // It has a deadline of its own.
        *stage = "connecting";
        return proxy::through(proxy, &endpoint.host, endpoint.port).await;
    }
    dial(&endpoint.host, endpoint.port, stage).await.map_err(|e| match e {
        Dial::Dns(cause) => ConnectError::DnsFailed { host: endpoint.host.clone(), cause },
        Dial::Unreachable(tried, cause) => ConnectError::Unreachable { addr: endpoint.to_string(), tried, cause },
    })
}

/// Why there is no TCP connection.
pub(super) enum Dial {
    /// The name does not resolve, and what the resolver said.
    Dns(String),
    /// The address tried last, and what the system said.
    Unreachable(SocketAddr, String),
}

/// Connects to the first address of a host that answers. `stage` says meanwhile what is being waited for.
pub(super) async fn dial(host: &str, port: u16, stage: &mut &'static str) -> Result<TcpStream, Dial> {
    let found = tokio::net::lookup_host((host, port)).await.map_err(|e| Dial::Dns(e.to_string()))?;
    let addresses = alternate(found.collect());
    *stage = "connecting";
    let Some(&first) = addresses.first() else { return Err(Dial::Dns("it has no address".into())) };
    let mut attempts: FuturesUnordered<_> = (0u32..)
        .zip(addresses)
        .map(|(i, address)| async move {
            sleep(NEXT_ADDRESS * i).await;
            outside_the_tunnel(address).await.map_err(|e| (address, e))
        })
        .collect();
    let mut last = (first, "no attempt was made".to_owned());
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(tcp) => {
                tune(&tcp);
                return Ok(tcp);
            }
            Err((address, e)) => last = (address, e.to_string()),
        }
    }
    Err(Dial::Unreachable(last.0, last.1))
}

/// A connection that does not go through a tunnel of our own, whatever that takes in.
async fn outside_the_tunnel(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    mark(&socket);
    socket.connect(address).await
}

/// Addresses in the resolver's order but with the families taking turns (RFC 8305 section 4).
fn alternate(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else { return addresses };
    let six_first = first.is_ipv6();
    let (mut a, mut b): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|x| x.is_ipv6() == six_first);
    a.reverse();
    b.reverse();
    let mut out = Vec::with_capacity(a.len() + b.len());
    while !(a.is_empty() && b.is_empty()) {
        out.extend(a.pop());
        out.extend(b.pop());
    }
    out.truncate(MAX_ADDRESSES);
    out
}

/// Small messages leave at once, and a ping does not wait behind megabytes. Best effort: a link works without.
pub(super) fn tune(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    let _ = SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT);
}

struct Steps<'a> {
    target: &'a Target<'a>,
    endpoint: &'a Endpoint,
    shown: &'a str,
    purpose: Purpose,
    versions: VersionRange,
    limits: Limits,
}

impl Steps<'_> {
    fn not_a_coordinator(&self, detail: impl Into<String>) -> ConnectError {
        ConnectError::NotACoordinator { addr: self.shown.to_owned(), detail: detail.into() }
    }

    async fn tls(&self, tcp: TcpStream) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ConnectError> {
        let failed = |cause: String| ConnectError::TlsFailed { addr: self.shown.to_owned(), cause };
        let config = tls::client_config().map_err(|e| failed(e.to_string()))?;
        let name = ServerName::try_from(self.endpoint.host.clone()).map_err(|e| failed(e.to_string()))?;
        TlsConnector::from(Arc::clone(&config)).connect(name, tcp).await.map_err(|e| failed(plainly(&e)))
    }

    async fn websocket_and_noise<S>(&self, stream: S) -> Result<(WebSocketStream<S>, Ciphers, Answer), ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut request = self
            .endpoint
            .websocket_url(self.purpose)
            .into_client_request()
            .map_err(|e| ConnectError::BadUrl { url: self.target.url.clone(), why: e.to_string() })?;
        let agent = HeaderValue::from_static(concat!("meshd/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(header::USER_AGENT, agent);
        let (mut ws, _response) = client_async_with_config(request, stream, Some(self.limits.websocket()))
            .await
            .map_err(|e| self.websocket_failed(&e))?;
        let (ciphers, answer) = self.noise(&mut ws).await?;
        Ok((ws, ciphers, answer))
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "another crate's errors; each means the same here")]
    fn websocket_failed(&self, e: &WsError) -> ConnectError {
        let addr = self.shown.to_owned();
        match e {
            WsError::Http(response) => match response.status().as_u16() {
                status @ (429 | 502 | 503 | 504) => ConnectError::Unavailable { addr, status },
                status => self.not_a_coordinator(format!("it answered HTTP {status}")),
            },
            WsError::Io(e) => {
                self.not_a_coordinator(format!("the connection broke before it answered ({})", plainly(e)))
            }
            e => self.not_a_coordinator(format!("its answer is not a WebSocket's ({e})")),
        }
    }

    /// The coordinator closed the connection instead of answering.
    fn refused(&self, end: &LinkError) -> ConnectError {
        let addr = self.shown.to_owned();
        if let LinkError::Closed { code: close::WRONG_KEY, .. } = end {
            ConnectError::WrongKey { addr }
        } else if let LinkError::Closed { code: close::BUSY, .. } = end {
            ConnectError::Unavailable { addr, status: 429 }
        } else {
            self.not_a_coordinator(end.to_string())
        }
    }

    async fn noise<S>(&self, ws: &mut WebSocketStream<S>) -> Result<(Ciphers, Answer), ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let offer = Offer { versions: self.versions, program: version::PROGRAM.to_owned() };
        let wrong_key = || ConnectError::WrongKey { addr: self.shown.to_owned() };
        let (initiator, message) = Initiator::start(self.target.secret, &self.target.coordinator, self.purpose, &offer)
            .map_err(|_| wrong_key())?;
        let cut = |e: WsError| {
            let how = pump::broken(e);
            self.not_a_coordinator(format!("the handshake was not finished: {how}"))
        };
        ws.send(Message::Binary(message.into())).await.map_err(cut)?;
        let reply = loop {
            match ws.next().await {
                Some(Ok(Message::Binary(reply))) => break reply,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(frame))) => return Err(self.refused(&pump::closed(frame))),
                Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                    return Err(self.not_a_coordinator("it answered with text"));
                }
                Some(Err(e)) => return Err(cut(e)),
                None => return Err(self.not_a_coordinator("it closed the connection during the handshake")),
            }
        };
        let (answer, session) = initiator.finish(&reply).map_err(|e| match e {
            NoiseError::Decrypt | NoiseError::Cipher => wrong_key(),
            NoiseError::Malformed(_) | NoiseError::TooLong => self.not_a_coordinator(e.to_string()),
        })?;
        if let Some(e) = answer.error {
            let node_is_older = answer.versions.is_none_or(|theirs| self.versions.max < theirs.min);
            let upgrade = if node_is_older { Upgrade::Node } else { Upgrade::Coordinator };
            return Err(ConnectError::Version { text: e.text, upgrade });
        }
        if answer.version.is_none_or(|v| v < self.versions.min || v > self.versions.max) {
            return Err(self.not_a_coordinator("it chose a protocol version that was not offered"));
        }
        let (mut sealer, opener) = session.split();
        for confirmation in sealer.seal(&[]).map_err(|_| wrong_key())? {
            ws.send(Message::Binary(confirmation.into())).await.map_err(cut)?;
        }
        Ok(((sealer, opener), answer))
    }
}

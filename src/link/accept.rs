//! The coordinator's end: from an upgraded HTTP connection to a link whose other side has proved its key.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use crate::link::noise::{self, NoiseError, Opener, Purpose, Sealer};
use crate::link::pump::{Keepalive, Limits, close};
use crate::link::{ControlLink, LinkInfo, RelayLink, control, relay};
use crate::trust::keys::Secret32;
use crate::wire::keys::ControlKey;
use crate::wire::version::VersionRange;

/// A node has this long for its part of the Noise handshake.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a refused connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Who is on the other side, as proved by the Noise handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The node's control key.
    pub key: ControlKey,
}

/// Why no link came of a connection. For the log; the other side was told in the way it can understand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// The handshake was not finished within [`HANDSHAKE_DEADLINE`].
    #[error("the handshake took too long")]
    TimedOut,
    /// The connection ended before the handshake did.
    #[error("the connection ended during the handshake")]
    Ended,
    /// The first message was made for another key or purpose, or is no handshake.
    #[error("the handshake does not decrypt: made for another coordinator key, or no handshake at all")]
    WrongKey,
    /// The handshake decrypts but is not as it must be, or the confirmation is wrong.
    #[error("the handshake is malformed")]
    Malformed,
    /// No protocol version in common.
    #[error("no protocol version in common with meshd {program}")]
    Version {
        /// The other side's program version.
        program: String,
    },
}

/// Takes a connection on the control path after its HTTP upgrade, and does the handshake.
///
/// # Errors
/// [`AcceptError`] within [`HANDSHAKE_DEADLINE`] and a second for goodbyes.
pub async fn accept_control<S>(
    stream: S,
    secret: &Secret32,
    addresses: (Option<SocketAddr>, Option<SocketAddr>),
) -> Result<(Peer, ControlLink), AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let purpose = Purpose::Control;
    let (ws, done) = accept(stream, secret, purpose, purpose.versions(), control::LIMITS).await?;
    let info = done.info(addresses);
    Ok((Peer { key: done.key }, ControlLink::start(ws, done.ciphers, info, Keepalive::COORDINATOR)))
}

/// Takes a connection on the relay path after its HTTP upgrade, and does the handshake.
///
/// # Errors
/// As [`accept_control`].
pub async fn accept_relay<S>(
    stream: S,
    secret: &Secret32,
    addresses: (Option<SocketAddr>, Option<SocketAddr>),
) -> Result<(Peer, RelayLink), AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let purpose = Purpose::Relay;
    let (ws, done) = accept(stream, secret, purpose, purpose.versions(), relay::LIMITS).await?;
    let info = done.info(addresses);
    Ok((Peer { key: done.key }, RelayLink::start(ws, info, Keepalive::COORDINATOR)))
}

#[derive(Debug)]
pub(super) struct Done {
    pub(super) key: ControlKey,
    version: u16,
    program: String,
    ciphers: (Sealer, Opener),
}

impl Done {
    fn info(&self, (peer_addr, local_addr): (Option<SocketAddr>, Option<SocketAddr>)) -> LinkInfo {
        LinkInfo { peer_addr, local_addr, version: self.version, program: self.program.clone() }
    }
}

/// As [`accept_control`], with the versions to agree on.
pub(super) async fn accept<S>(
    stream: S,
    secret: &Secret32,
    purpose: Purpose,
    versions: VersionRange,
    limits: Limits,
) -> Result<(WebSocketStream<S>, Done), AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut ws = WebSocketStream::from_raw_socket(stream, Role::Server, Some(limits.websocket())).await;
    let steps = handshake(&mut ws, secret, purpose, versions);
    let error = match timeout(HANDSHAKE_DEADLINE, steps).await {
        Ok(Ok(done)) => return Ok((ws, done)),
        Ok(Err(e)) => e,
        Err(_) => AcceptError::TimedOut,
    };
    let (code, reason) = match &error {
        AcceptError::WrongKey => (close::WRONG_KEY, "made for another coordinator key"),
        AcceptError::Version { .. } => (close::VERSION, "no protocol version in common"),
        AcceptError::TimedOut | AcceptError::Ended | AcceptError::Malformed => (close::PROTOCOL, "bad handshake"),
    };
    let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
    // Best effort: the other side may be gone. Reading to the end keeps the kernel from cutting off the close frame.
    let _ = timeout(GOODBYE, async {
        let _ = ws.close(Some(frame)).await;
        while let Some(Ok(_)) = ws.next().await {}
    })
    .await;
    Err(error)
}

async fn handshake<S>(
    ws: &mut WebSocketStream<S>,
    secret: &Secret32,
    purpose: Purpose,
    versions: VersionRange,
) -> Result<Done, AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let first = next_binary(ws).await?;
    let responded = noise::respond(secret, purpose, versions, &first).map_err(|e| match e {
        NoiseError::Decrypt => AcceptError::WrongKey,
        NoiseError::Malformed(_) | NoiseError::TooLong | NoiseError::Cipher => AcceptError::Malformed,
    })?;
    ws.send(Message::Binary(responded.reply.into())).await.map_err(|_| AcceptError::Ended)?;
    let Some((version, session)) = responded.agreed else {
        return Err(AcceptError::Version { program: responded.offer.program });
    };
    let (sealer, mut opener) = session.split();
    // Until here the node may be a recording. The confirmation needs this handshake's keys.
    let confirmation = next_binary(ws).await?;
    match opener.open(&confirmation) {
        Ok(Some(empty)) if empty.is_empty() => {}
        Ok(_) | Err(_) => return Err(AcceptError::Malformed),
    }
    Ok(Done { key: responded.key, version, program: responded.offer.program, ciphers: (sealer, opener) })
}

async fn next_binary<S>(ws: &mut WebSocketStream<S>) -> Result<bytes::Bytes, AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match ws.next().await {
            Some(Ok(Message::Binary(bytes))) => return Ok(bytes),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Text(_) | Message::Frame(_))) => return Err(AcceptError::Malformed),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(AcceptError::Ended),
        }
    }
}

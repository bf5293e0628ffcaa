//! A control link: JSON values over Noise transport messages.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;

use crate::link::LinkInfo;
use crate::link::error::LinkError;
use crate::link::noise::{MAX_NOISE, Opener, Sealer};
use crate::link::pump::{self, Keepalive, Limits, Sink, Source};

/// One WebSocket message is one Noise message; the longest control message is 17 of them.
pub(super) const LIMITS: Limits = Limits { message: MAX_NOISE, queue: 64 };

/// A control link that is up.
#[derive(Debug)]
pub struct ControlLink {
    sender: ControlSender,
    receiver: ControlReceiver,
    info: LinkInfo,
}

impl ControlLink {
    pub(super) fn start<S>(
        ws: WebSocketStream<S>,
        (sealer, opener): (Sealer, Opener),
        info: LinkInfo,
        keepalive: Keepalive,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, source) = pump::start(ws, LIMITS, keepalive);
        Self { sender: ControlSender { sink, sealer }, receiver: ControlReceiver { source, opener, skipped: 0 }, info }
    }

    /// Addresses and versions.
    #[must_use]
    pub const fn info(&self) -> &LinkInfo {
        &self.info
    }

    /// The two halves. Dropping either ends the link.
    #[must_use]
    pub fn split(self) -> (ControlSender, ControlReceiver) {
        (self.sender, self.receiver)
    }
}

/// Sends control messages.
#[derive(Debug)]
pub struct ControlSender {
    sink: Sink,
    sealer: Sealer,
}

impl ControlSender {
    /// Queues one message, waiting for room. Cancelling the wait sends nothing.
    ///
    /// # Errors
    /// [`LinkError::TooLong`] (the link stays up), or why the link is gone.
    pub async fn send(&mut self, message: &impl Serialize) -> Result<(), LinkError> {
        let json = serde_json::to_vec(message).map_err(|e| LinkError::Protocol(e.to_string()))?;
        let count = Sealer::count(json.len()).map_err(|_| LinkError::TooLong)?;
        let sealer = &mut self.sealer;
        self.sink.send(count, || sealer.seal(&json).map_err(LinkError::from)).await
    }

    /// Asks the other side for a sign of life now; without one the link ends within 5 s. For when the network changed or
    /// the machine woke up.
    pub fn nudge(&self) {
        self.sink.nudge();
    }

    /// Closes the link once everything sent has left. `code` is one of [`crate::link::close`].
    pub async fn close(self, code: u16, reason: &'static str) {
        self.sink.close(code, reason).await;
    }
}

/// Receives control messages.
#[derive(Debug)]
pub struct ControlReceiver {
    source: Source,
    opener: Opener,
    skipped: u64,
}

impl ControlReceiver {
    /// The next message that can be read as `T`; others are skipped and counted. `None`: the link was closed in an
    /// orderly way. Can be cancelled.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LinkError> {
        while let Some(bytes) = self.recv_bytes().await? {
            match serde_json::from_slice(&bytes) {
                Ok(message) => return Ok(Some(message)),
                Err(e) => {
                    self.skipped += 1;
                    tracing::debug!(skipped = self.skipped, error = %e, "skipped a control message that cannot be read");
                }
            }
        }
        Ok(None)
    }

    /// The next message's bytes, whatever they say. `None`: the link was closed in an orderly way. Can be cancelled.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn recv_bytes(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        while let Some(sealed) = self.source.recv().await? {
            if let Some(bytes) = self.opener.open(&sealed)? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Authentic messages that could not be read.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }
}

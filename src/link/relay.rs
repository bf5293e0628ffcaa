//! A relay link: WebSocket messages of relay frames.

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;

use crate::link::LinkInfo;
use crate::link::error::LinkError;
use crate::link::pump::{self, Keepalive, Limits, Sink, Source};

/// The longest relay message accepted, in bytes. Senders batch frames up to about 64 KiB.
pub const MAX_RELAY_MESSAGE: usize = 192 << 10;

/// The queue is short: whoever sends has its own, and drops there what does not fit, rather than buffer into latency.
pub(super) const LIMITS: Limits = Limits { message: MAX_RELAY_MESSAGE, queue: 4 };

/// A relay link that is up.
#[derive(Debug)]
pub struct RelayLink {
    sender: RelaySender,
    receiver: RelayReceiver,
    info: LinkInfo,
}

impl RelayLink {
    pub(super) fn start<S>(ws: WebSocketStream<S>, info: LinkInfo, keepalive: Keepalive) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, source) = pump::start(ws, LIMITS, keepalive);
        Self { sender: RelaySender { sink }, receiver: RelayReceiver { source }, info }
    }

    /// Addresses and versions.
    #[must_use]
    pub const fn info(&self) -> &LinkInfo {
        &self.info
    }

    /// The two halves. Dropping either ends the link.
    #[must_use]
    pub fn split(self) -> (RelaySender, RelayReceiver) {
        (self.sender, self.receiver)
    }
}

/// Sends relay messages.
#[derive(Debug)]
pub struct RelaySender {
    sink: Sink,
}

impl RelaySender {
    /// Queues one message, one or more frames of [`crate::wire::relay`] back to back, waiting for room. Cancelling the
    /// wait sends nothing.
    ///
    /// # Errors
    /// [`LinkError::TooLong`] (the link stays up), or why the link is gone.
    pub async fn send(&mut self, message: Vec<u8>) -> Result<(), LinkError> {
        if message.len() > MAX_RELAY_MESSAGE {
            return Err(LinkError::TooLong);
        }
        self.sink.send(1, || Ok(vec![message])).await
    }

    /// Asks the other side for a sign of life now; without one the link ends within 5 s.
    pub fn nudge(&self) {
        self.sink.nudge();
    }

    /// Closes the link once everything sent has left. `code` is one of [`crate::link::close`].
    pub async fn close(self, code: u16, reason: &'static str) {
        self.sink.close(code, reason).await;
    }
}

/// Receives relay messages.
#[derive(Debug)]
pub struct RelayReceiver {
    source: Source,
}

impl RelayReceiver {
    /// The next message, to be read with [`crate::wire::relay::Frames`]. `None`: closed in an orderly way. Can be
    /// cancelled.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, LinkError> {
        self.source.recv().await
    }
}

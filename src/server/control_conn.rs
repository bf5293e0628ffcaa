//! One node's control connection: messages between its link and the coordinator's task.

use std::net::IpAddr;

use serde::Deserialize;
use tokio::sync::{mpsc, watch};

use crate::coord::io::why;
use crate::link::{ControlLink, ControlReceiver, ControlSender, LinkError, Peer, close};
use crate::server::coordinator_task::{Handle, Registration, ToConn};
use crate::wire::control::{ToCoordinator, ToNode, refusal};

/// Serves one connection until it ends or `stop` changes. `from` is where it comes from, as far as that is known.
pub(super) async fn serve(
    coordinator: &Handle,
    peer: Peer,
    from: Option<IpAddr>,
    link: ControlLink,
    mut stop: watch::Receiver<bool>,
) {
    let (mut sender, mut receiver) = link.split();
    let Some((registration, mut outbox)) = coordinator.open(peer.key, from).await else {
        sender.close(close::GOING_AWAY, STOPPING).await;
        return;
    };
    // Answers to what the coordinator never sees.
    let (answers, mut unseen) = mpsc::channel(8);
    let ended = tokio::select! {
        ended = read(&registration, &mut receiver, answers) => ended,
        ended = write(&registration, &mut sender, &mut outbox, &mut unseen) => ended,
        _ = stop.changed() => Ok((close::GOING_AWAY, STOPPING)),
    };
    registration.closed().await;
    match ended {
        Err(e) => tracing::debug!(peer = ?peer.key, error = %e, "control connection ended"),
        Ok((code, reason)) => {
            tracing::debug!(peer = ?peer.key, reason, "closing a control connection");
            sender.close(code, reason).await;
            // Reading until the other side goes lets it read why. The link ends this soon in any case.
            while let Ok(Some(_)) = receiver.recv_bytes().await {}
        }
    }
}

const STOPPING: &str = "the coordinator is stopping";

async fn read(
    registration: &Registration,
    receiver: &mut ControlReceiver,
    answers: mpsc::Sender<ToNode>,
) -> Result<(u16, &'static str), LinkError> {
    while let Some(bytes) = receiver.recv_bytes().await? {
        let going_on = match serde_json::from_slice::<ToCoordinator>(&bytes) {
            Ok(message) => registration.message(message).await,
            Err(e) => {
                tracing::debug!(error = %e, "a control message that cannot be read");
                answers.send(unknown(&bytes)).await.is_ok()
            }
        };
        if !going_on {
            return Ok((close::GOING_AWAY, STOPPING));
        }
    }
    Err(LinkError::ClosedHere)
}

/// The answer to a message that this version cannot read.
fn unknown(bytes: &[u8]) -> ToNode {
    #[derive(Deserialize)]
    struct Numbered {
        re: u64,
    }
    let re = serde_json::from_slice::<Numbered>(bytes).map_or(0, |n| n.re);
    ToNode::Refused {
        re,
        code: refusal::UNKNOWN_MESSAGE.to_owned(),
        text: "the coordinator does not know this kind of message".to_owned(),
        hint: "upgrade meshd on the coordinator's machine".to_owned(),
    }
}

async fn write(
    registration: &Registration,
    sender: &mut ControlSender,
    outbox: &mut mpsc::Receiver<ToConn>,
    unseen: &mut mpsc::Receiver<ToNode>,
) -> Result<(u16, &'static str), LinkError> {
    loop {
        let message = tokio::select! {
            next = outbox.recv() => match next {
                Some(ToConn::Message(message)) => *message,
                Some(ToConn::Close(why)) => return Ok((close_code(why), why)),
                None => return Ok((close::BUSY, "the connection does not take its messages")),
            },
            Some(answer) = unseen.recv() => answer,
        };
        match sender.send(&message).await {
            Ok(()) => {}
            // Cannot happen with records that were accepted; the node asks again for what it misses.
            Err(LinkError::TooLong) => tracing::error!("a control message is too long and was not sent"),
            Err(e) => return Err(e),
        }
        let more_wanted = matches!(message, ToNode::Log { end: false, .. }) && outbox.is_empty();
        if more_wanted && !registration.drained().await {
            return Ok((close::GOING_AWAY, STOPPING));
        }
    }
}

fn close_code(reason: &str) -> u16 {
    match reason {
        why::REPLACED => close::REPLACED,
        why::REVOKED => close::NOT_A_MEMBER,
        why::BUSY => close::BUSY,
        why::DEADLINE => close::DEADLINE,
        _ => close::NORMAL,
    }
}

//! A guest's or new member's requests over a real control link.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::daemon::join::{Desk, Desks};
use crate::daemon::links::{CONNECT_TIMEOUT, broken};
use crate::daemon::problem;
use crate::link::{ConnectError, ControlReceiver, ControlSender, LinkError, Proxies, Target, close, connect_control};
use crate::trust::keys::Secret32;
use crate::trust::record::SignedRecord;
use crate::wire::control::{ToCoordinator, ToNode};
use crate::wire::keys::{ControlKey, Digest32};
use crate::wire::local::Problem;
use crate::wire::version;

/// How long the coordinator may take over one answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long the whole log of a large network may take.
const WHOLE_LOG: Duration = Duration::from_secs(60);

/// Connects by [`crate::link`].
#[derive(Debug)]
pub(super) struct LinkDesks {
    /// The proxies on the way, if any.
    pub(super) proxies: Arc<Proxies>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct LinkDesk {
    sender: ControlSender,
    receiver: ControlReceiver,
}

impl Desks for LinkDesks {
    type Desk = LinkDesk;

    async fn connect(&self, urls: &[String], coordinator: ControlKey, secret: &Secret32) -> Result<LinkDesk, Problem> {
        let mut first: Option<ConnectError> = None;
        for url in urls {
            let (url, proxies) = (url.clone(), &*self.proxies);
            let target = Target { url, coordinator, secret, proxies, timeout: CONNECT_TIMEOUT };
            match connect_control(&target).await {
                Ok(link) => {
                    let (sender, receiver) = link.split();
                    return Ok(LinkDesk { sender, receiver });
                }
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.map_or_else(
            || problem("bad-token", "the token names no coordinator", "ask for a new token"),
            Problem::from,
        ))
    }
}

impl Desk for LinkDesk {
    async fn ask(&mut self, request: ToCoordinator) -> Result<ToNode, Problem> {
        let wanted = asked(&request);
        let exchange = async {
            self.sender.send(&request).await?;
            loop {
                let message = self.next().await?;
                // Anything else is not for us: a newer coordinator may say things unasked.
                if answered(&message) == Some(wanted) {
                    return Ok(message);
                }
            }
        };
        in_time(ANSWER, exchange).await
    }

    async fn log(&mut self) -> Result<Vec<SignedRecord>, Problem> {
        let hello =
            ToCoordinator::Hello { re: 3, version: version::PROGRAM.to_owned(), have: 0, head: Digest32::default() };
        let reading = async {
            self.sender.send(&hello).await?;
            let mut log = Vec::new();
            loop {
                match self.next().await? {
                    ToNode::Log { from, records, end, .. } => {
                        if from != log.len() as u64 {
                            return Err(LinkError::Protocol("its log has a gap".into()));
                        }
                        log.extend(records);
                        if end {
                            return Ok(log);
                        }
                    }
                    ToNode::Refused { re: 3, text, .. } => return Err(LinkError::Protocol(text)),
                    _ => {}
                }
            }
        };
        in_time(WHOLE_LOG, reading).await
    }
}

impl LinkDesk {
    async fn next(&mut self) -> Result<ToNode, LinkError> {
        let gone = || LinkError::Closed { code: close::NORMAL, reason: "without an answer".into() };
        self.receiver.recv().await?.ok_or_else(gone)
    }
}

async fn in_time<T>(patience: Duration, exchange: impl Future<Output = Result<T, LinkError>>) -> Result<T, Problem> {
    match timeout(patience, exchange).await {
        Ok(answer) => answer.map_err(|e| Problem {
            hint: "run the same command again: a join is never half done".into(),
            ..broken(&e)
        }),
        Err(_) => Err(problem(
            "coordinator-timeout",
            format!("the coordinator did not answer within {} s", patience.as_secs()),
            "run the same command again: a join is never half done; look at the coordinator's log if it stays so",
        )),
    }
}

const fn asked(request: &ToCoordinator) -> u64 {
    match request {
        ToCoordinator::Found { re, .. }
        | ToCoordinator::Propose { re, .. }
        | ToCoordinator::Redeem { re, .. }
        | ToCoordinator::Hello { re, .. }
        | ToCoordinator::Publish { re, .. }
        | ToCoordinator::Locate { re, .. }
        | ToCoordinator::Announce { re, .. }
        | ToCoordinator::Ping { re }
        | ToCoordinator::Advertise { re, .. }
        | ToCoordinator::OpenRelay { re } => *re,
    }
}

const fn answered(message: &ToNode) -> Option<u64> {
    match message {
        ToNode::Refused { re, .. }
        | ToNode::Proposal { re, .. }
        | ToNode::Joined { re }
        | ToNode::Welcome { re, .. }
        | ToNode::Published { re }
        | ToNode::Located { re, .. }
        | ToNode::Pong { re, .. }
        | ToNode::RelayOpened { re, .. } => Some(*re),
        ToNode::Log { .. } | ToNode::Presence { .. } | ToNode::Adverts { .. } | ToNode::RelayBudget { .. } => None,
    }
}

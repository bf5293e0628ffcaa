//! Keeps a control connection to the coordinator: connects, tells the planner, carries messages, connects again. Never
//! gives up.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::daemon::links::{Backoff, Bells, Coordinator, broken};
use crate::daemon::problem;
use crate::daemon::relay_carrier::{OPEN_RELAY, RelayCarrier};
use crate::engine::io::Input;
use crate::link::{ControlLink, LinkError, close, connect_control};
use crate::os::clock;
use crate::wire::control::{ToCoordinator, ToNode};
use crate::wire::local::Problem;

/// Messages between planner and link, each way.
pub(super) const QUEUE: usize = 64;
/// Request numbers of our own pings start here, far from the planner's.
const PING_BASE: u64 = 1 << 62;
/// Round trips that may be asked for at once.
const RTT_ASKS: usize = 8;

/// The planner's and the local API's end.
#[derive(Debug, Clone)]
pub(super) struct ControlHandle {
    outgoing: mpsc::Sender<ToCoordinator>,
    reset: Arc<tokio::sync::Notify>,
    rtt: mpsc::Sender<oneshot::Sender<Duration>>,
    /// Why there is no link now, if there is none.
    pub(super) problem: watch::Receiver<Option<Problem>>,
}

impl ControlHandle {
    /// Queues a message. If the coordinator does not take messages any more, the link is reset instead: it resynchronises.
    pub(super) fn send(&self, message: ToCoordinator) {
        if self.outgoing.try_send(message).is_err() {
            self.reset.notify_one();
        }
    }

    /// The link's round trip now; none if it is down or does not answer within `patience`.
    pub(super) async fn rtt(&self, patience: Duration) -> Option<Duration> {
        let (tell, told) = oneshot::channel();
        self.rtt.try_send(tell).ok()?;
        tokio::time::timeout(patience, told).await.ok()?.ok()
    }
}

/// Starts the task that keeps the link. It ends when the bells say stop.
pub(super) fn start(
    coordinator: Arc<Coordinator>,
    planner: mpsc::Sender<Input>,
    relay: ForRelay,
    bells: Bells,
) -> (ControlHandle, tokio::task::JoinHandle<()>) {
    let (outgoing, messages) = mpsc::channel(QUEUE);
    let (rtt, rtt_asks) = mpsc::channel(RTT_ASKS);
    let (problem, shown) = watch::channel(None);
    let reset = Arc::new(tokio::sync::Notify::new());
    let keeper = Keeper { coordinator, planner, bells, messages, rtt_asks, reset: Arc::clone(&reset), problem, relay };
    (ControlHandle { outgoing, reset, rtt, problem: shown }, tokio::spawn(keeper.run()))
}

struct Keeper {
    coordinator: Arc<Coordinator>,
    planner: mpsc::Sender<Input>,
    bells: Bells,
    messages: mpsc::Receiver<ToCoordinator>,
    rtt_asks: mpsc::Receiver<oneshot::Sender<Duration>>,
    reset: Arc<tokio::sync::Notify>,
    problem: watch::Sender<Option<Problem>>,
    relay: ForRelay,
}

/// Where what concerns the relay's UDP port goes: not to the planner.
#[derive(Debug)]
pub(super) struct ForRelay {
    /// Hears of the link.
    pub(super) carrier: Arc<RelayCarrier>,
    /// Answers to [`OPEN_RELAY`].
    pub(super) answers: mpsc::Sender<ToNode>,
}

impl Keeper {
    async fn run(mut self) {
        let mut stop = self.bells.stop();
        let mut backoff = Backoff::default();
        for n in 0.. {
            let coordinator = Arc::clone(&self.coordinator);
            let target = coordinator.target(n);
            let connected = tokio::select! {
                connected = connect_control(&target) => connected,
                () = stop.rung() => return,
            };
            let why = match connected {
                Ok(link) => {
                    tracing::info!("connected to the coordinator");
                    backoff.reset();
                    self.problem.send_replace(None);
                    // What was meant for the link before is of no use on this one.
                    while self.messages.try_recv().is_ok() {}
                    if self.planner.send(Input::ControlUp).await.is_err() {
                        return;
                    }
                    self.relay.carrier.with(|c| c.control(true, clock::now()));
                    let ended = self.carry(link).await;
                    self.relay.carrier.with(|c| c.control(false, clock::now()));
                    match ended {
                        Some(why) => why,
                        None => return,
                    }
                }
                Err(e) => Problem::from(e),
            };
            // Said once; the repetitions are for whoever looks closer.
            let before = self.problem.send_replace(Some(why.clone()));
            if before.is_none_or(|before| before.code != why.code) {
                tracing::info!(code = why.code, "no connection to the coordinator: {}", why.text);
            } else {
                tracing::debug!(code = why.code, "still no connection to the coordinator: {}", why.text);
            }
            if self.planner.send(Input::ControlDown { problem: Some(why) }).await.is_err() {
                return;
            }
            let pause = backoff.pause(&mut rand::rng());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.bells.nudge.notified() => {}
                () = stop.rung() => return,
            }
        }
    }

    /// Carries messages until the link breaks (then says why) or the daemon stops (then `None`).
    async fn carry(&mut self, link: ControlLink) -> Option<Problem> {
        let (mut sender, mut receiver) = link.split();
        let mut stop = self.bells.stop();
        let mut pings: Vec<(u64, Instant, oneshot::Sender<Duration>)> = Vec::new();
        let mut next_ping = PING_BASE;
        loop {
            let sent = tokio::select! {
                Some(message) = self.messages.recv() => sender.send(&message).await,
                Some(tell) = self.rtt_asks.recv() => {
                    pings.retain(|(_, _, tell)| !tell.is_closed());
                    let re = next_ping;
                    next_ping += 1;
                    pings.push((re, Instant::now(), tell));
                    sender.send(&ToCoordinator::Ping { re }).await
                }
                received = receiver.recv::<ToNode>() => match received {
                    Ok(Some(ToNode::Pong { re, .. })) if pings.iter().any(|(asked, ..)| *asked == re) => {
                        if let Some(at) = pings.iter().position(|(asked, ..)| *asked == re) {
                            let (_, sent, tell) = pings.swap_remove(at);
                            // Nobody waits any more: fine.
                            let _ = tell.send(sent.elapsed());
                        }
                        Ok(())
                    }
                    Ok(Some(
                        message @ (ToNode::RelayOpened { .. } | ToNode::Refused { re: OPEN_RELAY, .. }),
                    )) => {
                        // Full: it answers a question that has been given up.
                        let _ = self.relay.answers.try_send(message);
                        Ok(())
                    }
                    Ok(Some(message)) => {
                        // Waiting here is the backpressure on the coordinator.
                        self.planner.send(Input::Control(message)).await.ok()?;
                        Ok(())
                    }
                    Ok(None) => Err(LinkError::Closed { code: close::NORMAL, reason: "the coordinator stopped".into() }),
                    Err(e) => Err(e),
                },
                () = self.bells.nudge.notified() => {
                    sender.nudge();
                    Ok(())
                }
                () = self.reset.notified() => {
                    return Some(problem("coordinator-lost", "the coordinator does not take messages; connecting anew", ""));
                }
                () = stop.rung() => {
                    sender.close(close::GOING_AWAY, "the node stops").await;
                    return None;
                }
            };
            match sent {
                Ok(()) => {}
                // The link is still up, and the planner learns of it by the missing answer.
                Err(LinkError::TooLong) => tracing::warn!("a control message was too long to be sent"),
                Err(e) => return Some(broken(&e)),
            }
        }
    }
}

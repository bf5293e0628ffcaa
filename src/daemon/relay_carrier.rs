//! Runs the choice between UDP and WebSocket for relayed packets ([`crate::engine::carrier`]): the data thread and the
//! planner ask it for every packet, and one task drives its timer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use crate::daemon::control_link::ControlHandle;
use crate::daemon::relay_thread::RelayHandle;
use crate::engine::carrier::{Carrier, Carries, MAX_ADDRESSES, Output};
use crate::engine::io::{Input, SocketId};
use crate::link::Endpoint;
use crate::os::clock;
use crate::os::train::SendError;
use crate::os::udp::UdpSockets;
use crate::wire::control::{StunServer, ToCoordinator, ToNode};

/// The request number of our question for a session: far from the planner's and from the link's own pings.
pub(super) const OPEN_RELAY: u64 = (1 << 62) - 1;
/// Answers of the coordinator that may wait.
pub(super) const ANSWERS: usize = 4;
/// How long names may take to resolve.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(4);

/// The carrier, shared between threads. The lock is never held across a system call.
#[derive(Debug, Default)]
pub(super) struct RelayCarrier {
    carrier: Mutex<Carrier>,
    by_udp: AtomicBool,
    news: Notify,
}

impl RelayCarrier {
    /// Does something with the carrier, and has its timer looked at if that changed.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Carrier) -> R) -> R {
        let mut carrier = self.carrier.lock();
        let result = f(&mut carrier);
        let news = carrier.take_news();
        if news {
            self.by_udp.store(carrier.carries() == Some(Carries::Udp), Ordering::Relaxed);
        }
        drop(carrier);
        if news {
            self.news.notify_one();
        }
        result
    }

    /// Packets go by UDP now. Without a lock, and so perhaps a moment ago.
    pub(super) fn is_udp(&self) -> bool {
        self.by_udp.load(Ordering::Relaxed)
    }

    /// For `meshd status`: `udp`, `websocket`, or nothing.
    pub(super) fn name(&self) -> Option<String> {
        self.carrier.lock().carries().map(|carries| match carries {
            Carries::Udp => "udp".to_owned(),
            Carries::WebSocket => "websocket".to_owned(),
        })
    }
}

/// What the task needs.
pub(super) struct Driver {
    pub(super) shared: Arc<RelayCarrier>,
    pub(super) sockets: Arc<UdpSockets>,
    pub(super) control: ControlHandle,
    pub(super) relay: RelayHandle,
    pub(super) planner: mpsc::Sender<Input>,
    /// The coordinator's first URL: its host is the relay's unless it says otherwise.
    pub(super) url: String,
    /// Answers to [`OPEN_RELAY`].
    pub(super) answers: mpsc::Receiver<ToNode>,
    /// The network changed or the machine woke up.
    pub(super) nudge: Arc<Notify>,
}

impl Driver {
    /// Runs until the planner is gone.
    pub(super) async fn run(mut self) {
        let mut carried = None;
        loop {
            let now = clock::now();
            let (outputs, wake, carries) = self.shared.with(|c| {
                c.handle_timeout(now);
                let outputs: Vec<Output> = std::iter::from_fn(|| c.poll_output()).collect();
                (outputs, c.poll_timeout(), c.carries())
            });
            if carries != carried {
                carried = carries;
                tracing::info!(carrier = ?carries, "what carries relayed packets changed");
                // What was sent by the other carrier just now may be lost: a call is repeated at once.
                if carries.is_some() && self.planner.send(Input::RelayUp).await.is_err() {
                    return;
                }
            }
            for output in outputs {
                if !self.carry_out(output).await {
                    return;
                }
            }
            let wake = wake.map(|at| Instant::now() + at.since(clock::now()));
            tokio::select! {
                () = self.shared.news.notified() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                Some(answer) = self.answers.recv() => self.opened(answer).await,
                () = self.nudge.notified() => self.shared.with(|c| c.network_changed(clock::now())),
            }
        }
    }

    /// False: the planner is gone.
    async fn carry_out(&self, output: Output) -> bool {
        match output {
            Output::Open => self.control.send(ToCoordinator::OpenRelay { re: OPEN_RELAY }),
            Output::Send { to, bytes } => match self.sockets.send(SocketId::for_remote(&to), &to, &bytes) {
                Ok(()) => {}
                Err(SendError::Unreachable) => self.shared.with(|c| c.send_failed(to, clock::now())),
                // Lost, as the network might have lost it.
                Err(e) => tracing::trace!(error = %e, "a ping of the relay was not sent"),
            },
            Output::Here => self.relay.here(),
            Output::Relay(up) => {
                let input = if up { Input::RelayUp } else { Input::RelayDown };
                return self.planner.send(input).await.is_ok();
            }
            Output::Gone(peer) => return self.planner.send(Input::RelayGone(peer)).await.is_ok(),
        }
        true
    }

    async fn opened(&self, answer: ToNode) {
        let ToNode::RelayOpened { session, secret, at, .. } = answer else {
            tracing::debug!("the coordinator does not relay by UDP");
            return self.shared.with(|c| c.refused(clock::now()));
        };
        // Without addresses nothing is sent, and it is tried again later.
        let at = timeout(RESOLVE_PATIENCE, resolve(&self.url, &at, self.sockets.without_v6().is_none())).await;
        self.shared.with(|c| c.opened(session, &secret, at.unwrap_or_default(), clock::now()));
    }
}

/// The relay's addresses: of each port one of each family that this machine has, the first port's first.
async fn resolve(url: &str, at: &[StunServer], v6: bool) -> Vec<SocketAddr> {
    let own_host = Endpoint::parse(url).map(|e| e.host).unwrap_or_default();
    let mut found: Vec<SocketAddr> = Vec::new();
    for server in at.iter().take(MAX_ADDRESSES) {
        let host = server.host.as_deref().unwrap_or(&own_host);
        let Ok(addresses) = tokio::net::lookup_host((host, server.port)).await else { continue };
        let addresses: Vec<SocketAddr> = addresses.collect();
        found.extend(addresses.iter().find(|a| a.is_ipv4()));
        found.extend(addresses.iter().find(|a| a.is_ipv6() && v6));
    }
    found.truncate(MAX_ADDRESSES);
    found
}

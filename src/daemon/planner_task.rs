//! Drives the planner: everything that concerns it comes in through one loop and goes out of it, with one timer.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};

use crate::daemon::control_link::ControlHandle;
use crate::daemon::health::Health;
use crate::daemon::outbox::refused;
use crate::daemon::relay_thread::RelayHandle;
use crate::daemon::tcp::TcpHandle;
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Event, Input, Notice, Output, Path, RoutePlan, SocketId, Update, Via};
use crate::engine::planner::{Planner, Worked};
use crate::os::clock::{self, Alarm};
use crate::os::extra::Opened;
use crate::os::train::SendError;
use crate::os::udp::UdpSockets;
use crate::os::wake::Wake;
use crate::time::Now;
use crate::trust::advert::SignedAdvert;
use crate::trust::record::SignedRecord;
use crate::wire::control::StunServer;
use crate::wire::keys::{IdentityKey, WgKey};
use crate::wire::local::{Problem, Severity};

use super::problem;

/// Inputs from links, the network watch and resolvers that may wait.
pub(super) const INPUTS: usize = 64;
/// Datagrams from the data thread that may wait.
pub(super) const SLOW: usize = 1_024;
/// Facts from the data thread that may wait; more are kept there.
pub(super) const FACTS: usize = 1_024;
/// Updates to the data thread that may wait; then the planner waits.
pub(super) const UPDATES: usize = 1_024;
/// Calls of the local API that may wait.
const ASKS: usize = 64;
/// Events a watcher may lag behind before it misses some.
const EVENTS: usize = 1_024;
/// What to do where the system gives too few sockets.
pub(super) const SOCKETS_HINT: &str =
    "let the daemon open more files (`LimitNOFILE=` of its unit, `ulimit -n`), or give fewer with `--punch-sockets`";
/// The two clocks may differ by this much before the machine counts as having slept.
const SLEPT: Duration = Duration::from_secs(5);

/// Something to do with the planner, between two inputs.
type Ask = Box<dyn FnOnce(&mut Planner, Now) + Send>;

/// What other tasks hold to talk to the planner.
#[derive(Debug, Clone)]
pub(super) struct PlannerHandle {
    asks: mpsc::Sender<Ask>,
    /// For links, the network watch and resolvers.
    pub(super) inputs: mpsc::Sender<Input>,
    events: broadcast::Sender<Event>,
}

impl PlannerHandle {
    /// Runs `f` on the planner and returns what it says.
    ///
    /// # Errors
    /// Code `stopping`: the daemon ends.
    pub(super) async fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Planner, Now) -> R + Send + 'static,
    ) -> Result<R, Problem> {
        let stopping = || problem("stopping", "the daemon is stopping", "");
        let (tell, told) = oneshot::channel();
        let ask: Ask = Box::new(move |planner, now| {
            // Whoever asked may have gone.
            let _ = tell.send(f(planner, now));
        });
        self.asks.send(ask).await.map_err(|_| stopping())?;
        told.await.map_err(|_| stopping())
    }

    /// Events from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}

/// Records accepted but not yet on disk, and where peers were reached last. Written by tasks of their own, so that the
/// planner does not wait for a disk. Bounded by what the planner itself holds of both.
#[derive(Debug, Default)]
pub(super) struct ToStore {
    pub(super) records: Mutex<Vec<SignedRecord>>,
    pub(super) endpoints: Mutex<BTreeMap<WgKey, SocketAddr>>,
    pub(super) adverts: Mutex<BTreeMap<IdentityKey, SignedAdvert>>,
    pub(super) worked: Mutex<Vec<Worked>>,
    /// Rings when there are records.
    pub(super) records_changed: Notify,
    /// Rings when there is a new endpoint or advertisement.
    pub(super) endpoints_changed: Notify,
    finished: AtomicBool,
}

impl ToStore {
    /// Nothing more will come.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Release);
        self.records_changed.notify_one();
    }

    /// Nothing more will come.
    pub(super) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }
}

/// What the task needs.
pub(super) struct Wiring {
    pub(super) planner: Planner,
    pub(super) sockets: Arc<UdpSockets>,
    pub(super) tcp: TcpHandle,
    pub(super) updates: SyncSender<Update>,
    pub(super) wake: Wake,
    pub(super) slow: mpsc::Receiver<Notice>,
    pub(super) facts: mpsc::Receiver<Notice>,
    pub(super) store: Arc<ToStore>,
    pub(super) resolve: mpsc::Sender<Vec<StunServer>>,
    /// Hears how the system is to route.
    pub(super) routes: watch::Sender<RoutePlan>,
    pub(super) nudge: Vec<Arc<Notify>>,
    pub(super) interface_mtu: watch::Sender<u16>,
    pub(super) drops: Arc<Drops>,
    pub(super) health: Health,
}

/// Handles made before the links are, because the links need one end of them.
pub(super) struct Ends {
    pub(super) handle: PlannerHandle,
    asks: mpsc::Receiver<Ask>,
    inputs: mpsc::Receiver<Input>,
}

/// Makes the channels to the planner.
pub(super) fn channels() -> Ends {
    let (asks, asked) = mpsc::channel(ASKS);
    let (inputs, received) = mpsc::channel(INPUTS);
    let (events, _) = broadcast::channel(EVENTS);
    Ends { handle: PlannerHandle { asks, inputs, events }, asks: asked, inputs: received }
}

/// Starts the task. It ends when it is aborted or the data thread is gone.
///
/// # Errors
/// The system gives no timer.
pub(super) fn start(
    wiring: Wiring,
    ends: Ends,
    control: ControlHandle,
    relay: RelayHandle,
) -> io::Result<tokio::task::JoinHandle<()>> {
    let alarm = Alarm::new()?;
    let driver = Driver { w: wiring, control, relay, events: ends.handle.events };
    Ok(tokio::spawn(driver.run(ends.asks, ends.inputs, alarm)))
}

struct Driver {
    w: Wiring,
    control: ControlHandle,
    relay: RelayHandle,
    events: broadcast::Sender<Event>,
}

impl Driver {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>, mut inputs: mpsc::Receiver<Input>, mut alarm: Alarm) {
        let mut clocks = (clock::now(), Instant::now());
        loop {
            if !self.carry_out() {
                tracing::error!("the data thread is gone");
                return;
            }
            if let Err(e) = alarm.set(self.w.planner.poll_timeout().map(|(at, _)| at)) {
                tracing::error!(error = %e, "the timer cannot be set");
                return;
            }
            tokio::select! {
                Some(input) = inputs.recv() => self.w.planner.handle(input, clock::now()),
                Some(fact) = self.w.facts.recv() => self.w.planner.handle(Input::Notice(fact), clock::now()),
                Some(slow) = self.w.slow.recv() => {
                    if let Notice::Slow { via, bytes } = &slow {
                        tracing::trace!(?via, bytes = bytes.len(), "came for the planner");
                    }
                    self.w.planner.handle(Input::Notice(slow), clock::now());
                }
                Some(ask) = asks.recv() => ask(&mut self.w.planner, clock::now()),
                rung = alarm.ring() => match rung {
                    Ok(()) => self.w.planner.handle_timeout(clock::now()),
                    Err(_) => return,
                },
            }
            let (boot, awake) = (clock::now(), Instant::now());
            if boot.since(clocks.0) > awake.duration_since(clocks.1) + SLEPT {
                tracing::info!("the machine was suspended; the links to the coordinator are checked");
                self.w.nudge.iter().for_each(|bell| bell.notify_one());
            }
            clocks = (boot, awake);
        }
    }

    /// Does what the planner wants done, until it wants nothing more. False: the data thread is gone.
    fn carry_out(&mut self) -> bool {
        let mut updated = false;
        while let Some(output) = self.w.planner.poll_output() {
            match output {
                Output::Update(update) => {
                    updated = true;
                    if let Update::Path { path: Path::Direct { socket, .. } | Path::Both { socket, .. }, .. } = &update
                    {
                        self.w.sockets.extra().carries_data(*socket);
                    }
                    match self.w.updates.try_send(update) {
                        Ok(()) => {}
                        Err(TrySendError::Full(update)) => {
                            // The data thread waits for nobody, so this wait is short.
                            self.w.wake.ring();
                            if self.w.updates.send(update).is_err() {
                                return false;
                            }
                        }
                        Err(TrySendError::Disconnected(_)) => return false,
                    }
                }
                Output::Send { via, bytes } => self.send(via, bytes),
                Output::Prime { via, bytes, ttl } => self.prime(via, &bytes, ttl),
                Output::OpenSockets(sockets) => self.open(&sockets),
                Output::CloseSockets(sockets) => self.w.sockets.extra().close(&sockets),
                Output::Tcp(order) => self.w.tcp.order(order),
                // Whoever sets it may have gone, when the daemon ends.
                Output::InterfaceMtu(mtu) => drop(self.w.interface_mtu.send(mtu)),
                Output::Control(message) => self.control.send(message),
                Output::Persist(records) => {
                    self.w.store.records.lock().extend(records);
                    self.w.store.records_changed.notify_one();
                }
                Output::KeepAdvert { of, advert } => {
                    let mut adverts = self.w.store.adverts.lock();
                    match advert {
                        Some(advert) => drop(adverts.insert(of, advert)),
                        None => drop(adverts.remove(&of)),
                    }
                    drop(adverts);
                    self.w.store.endpoints_changed.notify_one();
                }
                Output::Routes(plan) => drop(self.w.routes.send_replace(plan)),
                Output::ResolveStun(servers) => {
                    // Full: an earlier offer is being resolved, and the next Welcome brings this one again.
                    let _ = self.w.resolve.try_send(servers);
                }
                Output::Event(event) => self.tell(event),
            }
        }
        if updated {
            self.w.wake.ring();
        }
        true
    }

    fn send(&mut self, via: Via, bytes: Vec<u8>) {
        tracing::trace!(?via, bytes = bytes.len(), "sent by the planner");
        match via {
            Via::Relay { peer } => self.relay.urgent(peer, bytes),
            Via::Udp { socket, .. } if socket.is_stream() => self.w.tcp.send(socket, bytes),
            Via::Udp { socket, remote } => {
                let sent = self.w.sockets.send(socket, &remote, &bytes);
                self.note_sent(via, bytes.len(), sent);
            }
        }
    }

    fn prime(&mut self, via: Via, bytes: &[u8], ttl: u8) {
        // Nothing dies on the way through the relay.
        let Via::Udp { socket, remote } = via else { return };
        tracing::trace!(?via, bytes = bytes.len(), ttl, "sent by the planner, to die on the way");
        let sent = self.w.sockets.send_dying(socket, &remote, bytes, ttl);
        self.note_sent(via, bytes.len(), sent);
    }

    fn note_sent(&mut self, via: Via, len: usize, sent: Result<(), SendError>) {
        match sent {
            Ok(()) => {}
            Err(SendError::Unreachable) => {
                self.w.drops.count(Drop::SendFailed);
                self.w.planner.handle(Input::SendFailed(via), clock::now());
            }
            // A question with its answer: nothing that somebody waits for was dropped.
            Err(SendError::TooBig) => {
                self.w.planner.handle(Input::Notice(Notice::TooLong { via, len }), clock::now());
            }
            Err(why @ (SendError::Full | SendError::Refused(_))) => self.w.drops.count(refused(why)),
        }
    }

    /// Opens sockets for a punch, as many as the system gives.
    fn open(&mut self, wanted: &[SocketId]) {
        let Opened { sockets, error } = self.w.sockets.extra().open(wanted);
        match error {
            Some(error) => {
                let text = format!("a punch wanted {} more sockets and got {}: {error}", wanted.len(), sockets.len());
                self.w.health.set("sockets-short", Severity::Warning, text, SOCKETS_HINT);
            }
            None => self.w.health.clear("sockets-short"),
        }
        self.w.planner.handle(Input::SocketsOpened(sockets), clock::now());
    }

    fn tell(&self, event: Event) {
        match &event {
            Event::PathChanged { peer, key, path } => {
                let (kind, address) = match path {
                    Path::None => ("none", None),
                    Path::Relay => ("relay", None),
                    // Where a connection leads is no place to send datagrams to.
                    Path::Direct { socket, .. } if socket.is_stream() => ("direct, TCP", None),
                    Path::Direct { remote, .. } => ("direct", Some(*remote)),
                    Path::Both { remote, .. } => ("both", Some(*remote)),
                };
                tracing::info!(peer = peer.0, path = kind, "path changed");
                tracing::debug!(peer = ?key, ?address, "path changed");
                if let (Path::Direct { .. }, Some(address)) = (path, address) {
                    self.w.store.endpoints.lock().insert(*key, address);
                    *self.w.store.worked.lock() = self.w.planner.worked();
                    self.w.store.endpoints_changed.notify_one();
                }
            }
            Event::Synced => tracing::info!("the coordinator's log is read completely"),
            Event::Expelled => tracing::warn!("this node was removed from its network"),
            Event::Pong { .. } | Event::Published { .. } | Event::NamesChanged => {}
        }
        // Nobody may be listening.
        let _ = self.events.send(event);
    }
}

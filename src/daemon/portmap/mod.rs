//! Runs the engine's port mapper: finds the router by netlink, carries datagrams and HTTP between the two, tells the planner.
//!
//! Nothing waits for it: a node is up without a mapping, and gets one when the router answers.

mod http;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::engine::io::Input;
use crate::engine::portmap::{Gateway, Output, PortMapper};
use crate::os::clock::{self, Alarm};
use crate::os::netlink::{Changes, Netlink};
use crate::os::router;
use crate::time::Now;
use crate::trust::keys::Secret32;
use crate::wire::{local, pcp, upnp};

/// Callers of netcheck that may wait.
const ASKS: usize = 8;
/// How long netcheck waits for protocols that were not needed until then.
const SURVEY_PATIENCE: Duration = Duration::from_millis(2_500);
/// How long `meshd down` waits for the mapping to go; the machine itself takes at most 800 ms.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// Pause after sockets that could not be opened.
const OPEN_AGAIN: Duration = Duration::from_secs(30);

/// What others ask of the task.
enum Ask {
    Survey(oneshot::Sender<local::PortMapper>),
    Stop(oneshot::Sender<()>),
}

/// The other tasks' end.
#[derive(Debug, Clone)]
pub(super) struct PortMapHandle {
    /// None: switched off.
    asks: Option<mpsc::Sender<Ask>>,
    port: u16,
}

impl PortMapHandle {
    /// No port is to be mapped.
    pub(super) const fn off(port: u16) -> Self {
        Self { asks: None, port }
    }

    /// What the router does, after asking it by every protocol.
    pub(super) async fn survey(&self) -> local::PortMapper {
        let without = |enabled, reason: &str| local::PortMapper {
            enabled,
            internal_port: self.port,
            reason: Some(reason.to_owned()),
            ..local::PortMapper::default()
        };
        let Some(asks) = &self.asks else { return without(false, "switched off by --no-port-mapping") };
        let (tell, told) = oneshot::channel();
        let asked = async {
            asks.send(Ask::Survey(tell)).await.ok()?;
            told.await.ok()
        };
        match tokio::time::timeout(SURVEY_PATIENCE * 2, asked).await {
            Ok(Some(found)) => found,
            Ok(None) | Err(_) => without(true, "the daemon cannot ask the router; see the log"),
        }
    }

    /// Ends the mapping, within a second.
    pub(super) async fn stop(&self) {
        let Some(asks) = &self.asks else { return };
        let (tell, told) = oneshot::channel();
        let stopped = async {
            if asks.send(Ask::Stop(tell)).await.is_ok() {
                // An error means the same: the task is gone.
                let _ = told.await;
            }
        };
        if tokio::time::timeout(STOP_PATIENCE, stopped).await.is_err() {
            tracing::warn!(
                "the router does not confirm that the mapped port is closed; it closes when its time is over"
            );
        }
    }
}

/// Starts the task. It ends when it is told to stop or aborted.
///
/// # Errors
/// The system gives no timer or netlink socket.
pub(super) fn start(
    port: u16,
    secret: Secret32,
    own_interface: u32,
    inputs: mpsc::Sender<Input>,
) -> io::Result<(PortMapHandle, tokio::task::JoinHandle<()>)> {
    let (asks, asked) = mpsc::channel(ASKS);
    let task = Task {
        machine: PortMapper::new(port, secret, rand::random()),
        own_interface,
        netlink: Netlink::connect()?,
        gateway: None,
        mapped: false,
        sockets: None,
        open_at: None,
        jobs: JoinSet::new(),
        surveys: Vec::new(),
        inputs,
    };
    let (changes, alarm) = (Changes::watch()?, Alarm::new()?);
    Ok((PortMapHandle { asks: Some(asks), port }, tokio::spawn(task.run(asked, changes, alarm))))
}

/// What a request by HTTP brought.
enum Done {
    Fetched(u32, Result<String, String>),
    Called(u32, Result<String, String>),
}

struct Task {
    machine: PortMapper,
    own_interface: u32,
    netlink: Netlink,
    gateway: Option<Gateway>,
    /// Whether there was a mapping when last heard of one.
    mapped: bool,
    sockets: Option<Sockets>,
    /// Sockets that could not be opened are tried again then.
    open_at: Option<Now>,
    jobs: JoinSet<Done>,
    /// Who waits for the router's answers, and until when.
    surveys: Vec<(Now, oneshot::Sender<local::PortMapper>)>,
    inputs: mpsc::Sender<Input>,
}

impl Task {
    async fn run(mut self, mut asked: mpsc::Receiver<Ask>, mut changes: Changes, mut alarm: Alarm) {
        let mut stopping = None;
        let mut buffer = vec![0; upnp::MAX_SEARCH_ANSWER];
        self.look().await;
        loop {
            if !self.carry_out().await {
                return;
            }
            let now = clock::now();
            self.answer_surveys(now);
            if self.machine.is_stopped(now) {
                if let Some(tell) = stopping.take() {
                    let tell: oneshot::Sender<()> = tell;
                    // Who asked may have lost patience.
                    let _ = tell.send(());
                }
                return;
            }
            let wake = self.surveys.iter().map(|(until, _)| *until).chain(self.open_at);
            let wake = wake.chain(self.machine.poll_timeout()).min();
            if let Err(e) = alarm.set(wake) {
                tracing::error!(error = %e, "the timer cannot be set; no port is mapped");
                return;
            }
            tokio::select! {
                ask = asked.recv() => match ask {
                    Some(Ask::Survey(tell)) => {
                        self.machine.survey(clock::now());
                        self.surveys.push((clock::now() + SURVEY_PATIENCE, tell));
                    }
                    Some(Ask::Stop(tell)) => {
                        self.machine.stop(clock::now());
                        stopping = Some(tell);
                    }
                    None => return,
                },
                () = changes.next() => {
                    self.look().await;
                    self.machine.nudge(clock::now());
                }
                heard = hear(self.sockets.as_ref(), &mut buffer) => match heard {
                    Heard::Router(from, length) => {
                        self.machine.handle_datagram(from, &buffer[..length], clock::now());
                    }
                    Heard::Found(from, length) => self.machine.found(from.ip(), &buffer[..length], clock::now()),
                    // Such as a router that refuses by ICMP: not to answer means the same.
                    Heard::Nothing => {}
                },
                Some(done) = self.jobs.join_next() => match done {
                    Ok(Done::Fetched(id, text)) => {
                        self.machine.fetched(id, text.as_deref().map_err(String::as_str), clock::now());
                    }
                    Ok(Done::Called(id, text)) => {
                        self.machine.called(id, text.as_deref().map_err(String::as_str), clock::now());
                    }
                    // Aborted, since something else was asked for.
                    Err(_) => {}
                },
                rung = alarm.ring() => {
                    if rung.is_err() {
                        return;
                    }
                    let now = clock::now();
                    if self.open_at.is_some_and(|at| at <= now) {
                        self.open(now);
                    }
                    self.machine.handle_timeout(now);
                }
            }
        }
    }

    /// Finds the router, and opens sockets towards it if it is another one.
    async fn look(&mut self) {
        let gateway = match self.netlink.gateway(self.own_interface).await {
            Ok(found) => found,
            Err(e) => {
                tracing::warn!(error = %e, "the default route cannot be read");
                return;
            }
        };
        if gateway == self.gateway {
            return;
        }
        tracing::debug!(?gateway, "the way out");
        self.gateway = gateway;
        self.jobs.abort_all();
        self.open(clock::now());
        self.machine.set_gateway(gateway, clock::now());
    }

    fn open(&mut self, now: Now) {
        (self.sockets, self.open_at) = (None, None);
        let Some(gateway) = self.gateway.filter(|g| g.may_translate()) else { return };
        match Sockets::open(gateway) {
            Ok(sockets) => self.sockets = Some(sockets),
            Err(e) => {
                tracing::info!(error = %e, "no socket towards the router yet");
                self.open_at = Some(now + OPEN_AGAIN);
            }
        }
    }

    /// Does what the machine wants done. False: the planner is gone.
    async fn carry_out(&mut self) -> bool {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Send(bytes) => {
                    if let Some(sockets) = &self.sockets {
                        // One that is lost here is repeated like one that is lost there.
                        let _ = sockets.router.try_send(&bytes);
                    }
                }
                Output::Search => {
                    if let Some(sockets) = &self.sockets {
                        for target in upnp::SEARCHED {
                            let search = upnp::search(target);
                            let _ = sockets.search.try_send_to(search.as_bytes(), upnp::SEARCH_GROUP.into());
                        }
                    }
                }
                Output::Fetch(id, url) => {
                    let Some(own) = self.gateway.map(|g| g.own) else { continue };
                    self.jobs.abort_all();
                    self.jobs.spawn(async move { Done::Fetched(id, http::get(own, &url).await) });
                }
                Output::Call(id, service, action) => {
                    let Some(own) = self.gateway.map(|g| g.own) else { continue };
                    self.jobs.abort_all();
                    self.jobs.spawn(async move {
                        let (header, body) = upnp::call(&service, &action);
                        Done::Called(id, http::post(own, &service.control, &header, body).await)
                    });
                }
                Output::Mapped(mapping) => {
                    match &mapping {
                        Some(m) => {
                            tracing::info!(protocol = m.protocol, external = %m.external, "the router maps our port")
                        }
                        None if self.mapped => tracing::info!("the router no longer maps our port"),
                        None => tracing::debug!("the router maps no port"),
                    }
                    self.mapped = mapping.is_some();
                    if self.inputs.send(Input::PortMapped(mapping)).await.is_err() {
                        return false;
                    }
                }
            }
        }
        true
    }

    fn answer_surveys(&mut self, now: Now) {
        let all = self.machine.is_quiet();
        for (until, tell) in std::mem::take(&mut self.surveys) {
            if all || until <= now {
                // Who asked may have gone.
                let _ = tell.send(self.machine.status(now));
            } else {
                self.surveys.push((until, tell));
            }
        }
    }
}

/// Sockets towards one router.
struct Sockets {
    router: UdpSocket,
    search: UdpSocket,
    /// None: another program keeps the port to itself. Then a reboot of the router is noticed at the next check.
    announcements: Option<UdpSocket>,
}

impl Sockets {
    fn open(gateway: Gateway) -> io::Result<Self> {
        let at = std::net::SocketAddrV4::new(gateway.router, pcp::SERVER_PORT);
        Ok(Self {
            router: UdpSocket::from_std(router::towards(gateway.own, at)?)?,
            search: UdpSocket::from_std(router::searching(gateway.own)?)?,
            announcements: router::announcements(pcp::CLIENT_PORT).and_then(UdpSocket::from_std).ok(),
        })
    }
}

/// What came, and how many bytes of it.
enum Heard {
    Router(SocketAddr, usize),
    Found(SocketAddr, usize),
    Nothing,
}

/// The next datagram.
async fn hear(sockets: Option<&Sockets>, buffer: &mut [u8]) -> Heard {
    let Some(sockets) = sockets else { return std::future::pending().await };
    let announced = async {
        match &sockets.announcements {
            Some(socket) => socket.readable().await,
            None => std::future::pending().await,
        }
    };
    let (socket, found) = tokio::select! {
        _ = sockets.router.readable() => (&sockets.router, false),
        _ = announced => (sockets.announcements.as_ref().unwrap_or(&sockets.router), false),
        _ = sockets.search.readable() => (&sockets.search, true),
    };
    match socket.try_recv_from(buffer) {
        Ok((length, from)) if found => Heard::Found(from, length),
        Ok((length, from)) => Heard::Router(from, length),
        Err(_) => Heard::Nothing,
    }
}

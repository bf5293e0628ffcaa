//! The local API: a unix socket that answers the command line. One connection, one call; see [`crate::wire::local`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::time::{Instant, timeout};

use crate::daemon::control_link::ControlHandle;
use crate::daemon::health::Health;
use crate::daemon::kernel_queues::KernelQueues;
use crate::daemon::planner_task::PlannerHandle;
use crate::daemon::portmap::PortMapHandle;
use crate::daemon::relay_thread::RelayHandle;
use crate::daemon::settings::SettingsDesk;
use crate::daemon::stop::Stopper;
use crate::daemon::watch::Known;
use crate::daemon::{netcheck, problem};
use crate::engine::counters::{Counter, Counters};
use crate::engine::drops::{Drop, Drops};
use crate::engine::io::{Command, Event, Input};
use crate::engine::place::{self, Overlap};
use crate::engine::planner::{Planner, ShellStatus};
use crate::os::{clock, process};
use crate::time::Now;
use crate::trust::founding::{self, Terms};
use crate::trust::names::dns_label;
use crate::trust::record::{RevokeTarget, SignedRecord};
use crate::trust::token::InviteToken;
use crate::wire::keys::ControlKey;
use crate::wire::local::{
    AliasChange, AliasWish, Call, CounterValue, CounterValues, DnsChanges, DnsWord, Drained, DropCount, MAX_DNS_WORDS,
    MAX_REQUEST, PathKind, PeerWhy, Pong, Problem, Removed, Request, Response, RouteChange, RouteList, SettingsChange,
    Status, TokenReply,
};
use crate::wire::version;

/// Callers at once.
const CLIENTS: u32 = 64;
/// How long a caller may take to say what it wants, or to read a line.
const LINE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the coordinator may take to store a record.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(15);
/// How long a call that needs the coordinator waits for the link to come back.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// While waiting for a direct path: how long one ping may take before the next.
const DIRECT_PING: Duration = Duration::from_millis(2_000);
/// How long `meshd why` waits for an attempt at a path to end, and how often it looks.
const WHY_PATIENCE: Duration = Duration::from_secs(4);
const WHY_LOOK: Duration = Duration::from_millis(100);
/// The longest time one call may ask to wait.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);
/// The longest `sun_path` (unix(7)), less the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// The listening socket. Its file goes when this is dropped.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Listens at `path`, replacing a socket that a killed daemon left.
    ///
    /// # Errors
    /// Code `socket`: the path cannot be used. Code `already-running`: somebody answers there.
    pub(super) fn bind(path: &Path) -> Result<Self, Problem> {
        let shown = path.display();
        let cannot = |e: &io::Error| {
            problem(
                "socket",
                format!("the local socket {shown} cannot be made: {e}"),
                "run as root, or choose another place with `--socket PATH` or `--state-dir DIR`",
            )
        };
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(problem(
                "socket",
                format!("the path of the local socket is too long for a socket ({shown})"),
                format!("give a path of at most {MAX_SOCKET_PATH} bytes with `--socket PATH`"),
            ));
        }
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(|e| cannot(&e))?;
        }
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(problem(
                        "already-running",
                        format!("another daemon already answers on {shown}"),
                        "stop it with `meshd down`, or give this one another `--socket`",
                    ));
                }
                fs::remove_file(path).map_err(|e| cannot(&e))?;
            }
            Ok(_) => return Err(cannot(&io::Error::other("something that is not a socket is there"))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(cannot(&e)),
        }
        let listener = UnixListener::bind(path).map_err(|e| cannot(&e))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|e| cannot(&e))?;
        Ok(Self { path: path.to_owned(), listener })
    }
}

impl std::ops::Drop for Socket {
    fn drop(&mut self) {
        // Gone already: fine.
        let _ = fs::remove_file(&self.path);
    }
}

/// What answers need.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) planner: PlannerHandle,
    pub(super) control: ControlHandle,
    pub(super) relay: RelayHandle,
    pub(super) port_mapper: PortMapHandle,
    pub(super) known: Known,
    pub(super) health: Health,
    pub(super) drops: Arc<Drops>,
    pub(super) counters: Arc<Counters>,
    pub(super) queues: KernelQueues,
    pub(super) stopper: Stopper,
    pub(super) settings: SettingsDesk,
    /// Routes that something on this machine goes before, and what.
    pub(super) shadowed: watch::Receiver<BTreeMap<IpNet, Overlap>>,
    /// The interface's name.
    pub(super) interface: String,
    /// Coordinator URLs, as in the token.
    pub(super) urls: Vec<String>,
    /// The coordinator's Noise key.
    pub(super) coordinator: ControlKey,
    /// The proxy on the way to the coordinator, without credentials.
    pub(super) proxy: Option<String>,
    /// True once everything is taken down.
    pub(super) gone: watch::Receiver<bool>,
    pub(super) callers: Callers,
}

/// Whom the socket serves.
#[derive(Debug)]
pub(super) struct Callers {
    places: Arc<Semaphore>,
    /// Names pings and publications.
    tokens: AtomicU64,
}

impl Default for Callers {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(CLIENTS as usize)), tokens: AtomicU64::new(1) }
    }
}

impl Api {
    /// Answers callers until the task is aborted; the socket's file goes with it.
    pub(super) async fn serve(self: Arc<Self>, socket: Socket) {
        loop {
            // Above the limit callers wait in the kernel's queue.
            let Ok(permit) = Arc::clone(&self.callers.places).acquire_owned().await else { return };
            match socket.listener.accept().await {
                Ok((stream, _)) => {
                    let api = Arc::clone(&self);
                    tokio::spawn(async move {
                        if let Err(e) = api.client(stream).await {
                            tracing::debug!(error = %e, "a caller went away");
                        }
                        drop(permit);
                    });
                }
                Err(e) => {
                    tracing::warn!(error = %e, "a caller could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Waits until no caller is being answered, at most `patience`.
    pub(super) async fn idle(&self, patience: Duration) {
        // Out of patience: whoever is left finds a closed connection.
        let _ = timeout(patience, self.callers.places.acquire_many(CLIENTS)).await;
    }

    /// The status document.
    pub(super) async fn status(&self) -> Result<Status, Problem> {
        let shell = ShellStatus {
            state: "running".into(),
            coordinator_url: self.urls.first().cloned().unwrap_or_default(),
            interface: self.interface.clone(),
            health: self.health.list(),
        };
        let mut status = self.planner.with(move |planner, now| planner.status(shell, now)).await?;
        status.coordinator.relay = self.relay.carrier().name();
        status.coordinator.proxy.clone_from(&self.proxy);
        status.coordinator.problem.clone_from(&self.control.problem.borrow());
        // The planner knows that there is no relay, the thread why.
        if let Some(why) = &*self.relay.problem.borrow() {
            for line in status.health.iter_mut().filter(|line| line.code == "relay-unreachable") {
                line.text = format!("{} ({})", line.text, why.text);
                line.hint.clone_from(&why.hint);
            }
        }
        Ok(status)
    }

    async fn client(&self, stream: UnixStream) -> io::Result<()> {
        let caller = stream.peer_cred()?.uid();
        let (reader, writer) = stream.into_split();
        let mut out = Lines { writer };
        if caller != 0 && caller != process::effective_uid() {
            return out
                .write(&Response::Error(problem(
                    "not-permitted",
                    "this user may not talk to the meshd daemon",
                    "use `sudo`, or run as the user the daemon runs as",
                )))
                .await;
        }
        let answered = match read_request(reader).await? {
            Ok(call) => self.answer(call, &mut out).await,
            Err(refused) => Err(refused.into()),
        };
        match answered {
            Ok(()) => out.write(&Response::Done).await,
            Err(Ended::Refused(why)) => out.write(&Response::Error(why)).await,
            Err(Ended::Gone(e)) => Err(e),
        }
    }

    async fn answer(&self, call: Call, out: &mut Lines) -> Result<(), Ended> {
        match call {
            Call::Status => out.write(&Response::Status(Box::new(self.status().await?))).await?,
            Call::Down => {
                self.stopper.stop("asked to by `meshd down`");
                let mut gone = self.gone.clone();
                // A sender that is gone means the same.
                let _ = gone.wait_for(|gone| *gone).await;
            }
            Call::Ping { peer, count, timeout_ms, interval_ms, until_direct } => {
                let ping = PingCall { count, timeout_ms, interval_ms, until_direct };
                self.ping(peer, ping, out).await?;
            }
            Call::Why { peer } => {
                let reply = self.why(peer).await?;
                out.write(&Response::Why(Box::new(reply))).await?;
            }
            Call::Netcheck { stun, lifetime } => {
                let (offered, local) = self.known.get();
                let servers = if stun.is_empty() { offered } else { netcheck::resolve(&stun).await? };
                let idle = async { if lifetime { Some(netcheck::udp_lifetime(&servers).await) } else { None } };
                let (mut report, mapper, idle) = tokio::join!(
                    netcheck::run(servers.clone(), local, self.known.punch_sockets, &self.control, &self.relay),
                    self.port_mapper.survey(),
                    idle
                );
                // What strangers' servers say is shown, and not acted upon.
                let mut inputs = Vec::new();
                if stun.is_empty() {
                    inputs.push(Input::NetReport(Box::new(report.clone())));
                    inputs.extend(idle.flatten().map(|found| Input::UdpLifetime(Some(found))));
                }
                let (punching, known) = self
                    .planner
                    .with(move |planner, now| {
                        inputs.into_iter().for_each(|input| planner.handle(input, now));
                        (planner.punching(now), planner.udp_lifetime())
                    })
                    .await?;
                report.punching = Some(punching);
                report.udp_lifetime = idle.unwrap_or(known);
                report.port_mapping.clone_from(&mapper.protocol);
                report.port_mapper = Some(mapper);
                out.write(&Response::Netcheck(Box::new(report))).await?;
            }
            Call::Invite { name, uses, expires_s, admin, routes } => {
                let routes = routes.iter().map(IpNet::trunc).collect();
                let terms = Terms {
                    uses,
                    expires: clock::wall().saturating_add(expires_s),
                    name,
                    tags: Vec::new(),
                    routes,
                    admin,
                };
                let reply = self.invite(terms).await?;
                out.write(&Response::Token(reply)).await?;
            }
            Call::Remove { peer } => {
                let reply = self.remove(peer).await?;
                out.write(&Response::Removed(reply)).await?;
            }
            Call::Set { change, confirm_s } => {
                let desk = self.settings.clone();
                let set = self.planner.with(move |planner, now| {
                    desk.change(&change, confirm_s, planner, now)?;
                    Ok::<_, Problem>(desk.document(planner))
                });
                out.write(&Response::Settings(set.await??)).await?;
            }
            Call::Confirm => {
                let desk = self.settings.clone();
                if !desk.confirm()? {
                    let hint = "a change is made on trial with `meshd set … --confirm 60s`";
                    return Err(problem("nothing-to-confirm", "no change waits to be confirmed", hint).into());
                }
                let set = self.planner.with(move |planner, _| desk.document(planner)).await?;
                out.write(&Response::Settings(set)).await?;
            }
            Call::Drain { on } => {
                let desk = self.settings.clone();
                let drained = self.planner.with(move |planner, now| {
                    let already = desk.get().drain == on;
                    let change = SettingsChange { drain: Some(on), ..SettingsChange::default() };
                    desk.change(&change, None, planner, now)?;
                    let routes = planner.shared_routes();
                    Ok::<_, Problem>(Drained { schema: version::LOCAL, draining: on, already, routes })
                });
                out.write(&Response::Drained(drained.await??)).await?;
            }
            Call::Routes => {
                let shadowed = self.shadowed.borrow().clone();
                let routes = self.planner.with(move |planner, _| planner.route_lines(&shadowed)).await?;
                out.write(&Response::Routes(RouteList { schema: version::LOCAL, routes })).await?;
            }
            Call::RouteWord { peer, prefix, allow } => {
                let change = self.route_word(peer, prefix.trunc(), allow).await?;
                out.write(&Response::RouteChanged(change)).await?;
            }
            Call::RouteAlias { peer, prefix, alias } => {
                let change = self.route_alias(peer, prefix.trunc(), alias).await?;
                out.write(&Response::AliasChanged(change)).await?;
            }
            Call::Dns => {
                let shadowed = place::elsewhere(&self.shadowed.borrow());
                let list = self.planner.with(move |planner, _| planner.dns_list(&shadowed)).await?;
                out.write(&Response::Dns(list)).await?;
            }
            Call::DnsWords { words, at, anyway } => {
                let changes = self.dns_words(words, at, anyway).await?;
                out.write(&Response::DnsChanged(changes)).await?;
            }
            Call::Drops => {
                self.queues.note(&self.drops).await;
                let counts = Drop::ALL.iter().map(|why| DropCount {
                    reason: why.name().to_owned(),
                    packets: self.drops.get(*why),
                    text: why.text().to_owned(),
                });
                out.write(&Response::Drops(counts.collect())).await?;
            }
            Call::Counters => {
                let counters = Counter::ALL.iter().map(|what| CounterValue {
                    name: what.name().to_owned(),
                    value: self.counters.get(*what),
                    text: what.text().to_owned(),
                });
                let counters = counters.collect();
                out.write(&Response::Counters(CounterValues { schema: version::LOCAL, counters })).await?;
            }
        }
        Ok(())
    }

    async fn ping(&self, wanted: String, call: PingCall, out: &mut Lines) -> Result<(), Ended> {
        let peer = self.planner.with(move |planner, _| planner.find_peer(&wanted)).await??;
        let mut events = self.planner.events();
        let limit = Duration::from_millis(call.timeout_ms).min(LONGEST);
        let begin = Instant::now();
        let mut seq = 0;
        loop {
            seq += 1;
            let patience =
                if call.until_direct { limit.saturating_sub(begin.elapsed()).min(DIRECT_PING) } else { limit };
            let token = self.callers.tokens.fetch_add(1, Ordering::Relaxed);
            let timeout_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX).max(1);
            let command = Command::Ping { token, seq, peer, timeout_ms };
            let sent = Instant::now();
            self.planner.with(move |planner, now| planner.handle(Input::Command(command), now)).await?;
            // The planner says itself when a ping is lost.
            let pong = wait_for(&mut events, patience + LINE_PATIENCE, |event| match event {
                Event::Pong { token: of, pong } if of == token => Some(pong),
                _ => None,
            })
            .await?;
            let is_direct = pong.answered && pong.path == PathKind::Direct;
            // One that the end of the time cut short says nothing about the peer.
            let cut_short = call.until_direct && seq > 1 && patience < DIRECT_PING && !pong.answered;
            if !cut_short {
                out.write(&Response::Pong(Pong { seq, ..pong })).await?;
            }
            let done = if call.until_direct { is_direct || begin.elapsed() >= limit } else { seq >= call.count.max(1) };
            if done {
                return Ok(());
            }
            let interval = Duration::from_millis(call.interval_ms).min(LONGEST).saturating_sub(sent.elapsed());
            let interval =
                if call.until_direct { interval.min(limit.saturating_sub(begin.elapsed())) } else { interval };
            tokio::time::sleep(interval).await;
        }
    }

    /// Has a path looked for if there is none, waits until that is over, and says what came of it.
    async fn why(&self, wanted: String) -> Result<PeerWhy, Problem> {
        let peer = self.planner.with(move |planner, _| planner.find_peer(&wanted)).await??;
        let token = self.callers.tokens.fetch_add(1, Ordering::Relaxed);
        let timeout_ms = u64::try_from(WHY_PATIENCE.as_millis()).unwrap_or(u64::MAX);
        let command = Command::Ping { token, seq: 1, peer, timeout_ms };
        self.planner.with(move |planner, now| planner.handle(Input::Command(command), now)).await?;
        let begin = Instant::now();
        // The next round may begin a moment after the last one failed; what is known by then is enough.
        tokio::time::sleep(WHY_LOOK).await;
        while begin.elapsed() < WHY_PATIENCE && self.planner.with(move |planner, _| planner.is_trying(peer)).await? {
            tokio::time::sleep(WHY_LOOK).await;
        }
        let url = self.urls.first().cloned().unwrap_or_default();
        let reply = self.planner.with(move |planner, now| planner.why(peer, &url, now)).await?;
        reply.ok_or_else(|| problem("no-such-peer", "that node is gone", "see `meshd status`"))
    }

    async fn invite(&self, terms: Terms) -> Result<TokenReply, Problem> {
        if let Some(name) = &terms.name
            && let Err(why) = dns_label(name)
        {
            return Err(problem(
                "bad-name",
                format!("{name:?} cannot be a node's name: {why}"),
                "such as `nas` or `web-2`",
            ));
        }
        if terms.uses == 0 {
            return Err(problem("usage", "an invite must have at least one use", "leave `--uses` out for exactly one"));
        }
        if terms.name.is_some() && terms.uses > 1 {
            return Err(problem(
                "usage",
                "an invite for a name can be used once only",
                "leave out `--name` or `--uses`",
            ));
        }
        let (uses, expires) = (terms.uses, terms.expires);
        let made: Result<_, Problem> = self
            .planner
            .with(move |planner, _| {
                as_admin(planner)?;
                terms.routes.iter().try_for_each(|prefix| planner.check_prefix(prefix))?;
                if let Some(name) = &terms.name
                    && planner.ledger().by_name(name).is_some()
                {
                    return Err(problem(
                        "name-taken",
                        format!("the name {name:?} belongs to a node of this network already"),
                        "choose another name, or remove that node first: `meshd remove`",
                    ));
                }
                let network = planner.ledger().network();
                let signer = planner.keys().identity.signing_key();
                let (secret, invite) =
                    founding::invite_record(&signer, network, terms, clock::wall(), &mut rand::rng());
                Ok((network, secret, invite))
            })
            .await?;
        let (network, secret, invite) = made?;
        self.publish(vec![invite.clone()]).await?;
        let key = founding::invite_key(&secret).to_string();
        let token = InviteToken { urls: self.urls.clone(), coordinator: self.coordinator, network, secret, invite };
        Ok(TokenReply { schema: 1, token: token.encode(), invite: key, uses, expires })
    }

    async fn remove(&self, wanted: String) -> Result<Removed, Problem> {
        let made: Result<_, Problem> = self
            .planner
            .with(move |planner, _| {
                as_admin(planner)?;
                let peer = planner.find_peer(&wanted)?;
                let member = planner.member_of(peer).ok_or_else(|| problem("no-such-peer", "that node is gone", ""))?;
                let target = RevokeTarget::Identity(member.identity);
                let signer = planner.keys().identity.signing_key();
                let revoke = founding::revoke_record(&signer, planner.ledger().network(), target, clock::wall());
                let removed =
                    Removed { schema: 1, name: member.name.clone(), id: member.identity.node_id().to_string() };
                Ok((revoke, removed))
            })
            .await?;
        let (revoke, removed) = made?;
        self.publish(vec![revoke]).await?;
        Ok(removed)
    }

    async fn route_word(&self, peer: String, prefix: IpNet, allow: bool) -> Result<RouteChange, Problem> {
        let made: Result<_, Problem> = self
            .planner
            .with(move |planner, _| {
                as_admin(planner)?;
                planner.route_word(&peer, prefix, allow, clock::wall())
            })
            .await?;
        let (record, change) = made?;
        if let Some(record) = record {
            self.publish(vec![record]).await?;
        }
        Ok(change)
    }

    async fn route_alias(&self, peer: String, prefix: IpNet, alias: AliasWish) -> Result<AliasChange, Problem> {
        let made: Result<_, Problem> = self
            .planner
            .with(move |planner, _| {
                as_admin(planner)?;
                planner.alias_word(&peer, prefix, alias, clock::wall())
            })
            .await?;
        let (record, change) = made?;
        if let Some(record) = record {
            self.publish(vec![record]).await?;
        }
        Ok(change)
    }

    async fn dns_words(&self, words: Vec<DnsWord>, at: Option<String>, anyway: bool) -> Result<DnsChanges, Problem> {
        if words.len() > MAX_DNS_WORDS {
            return Err(problem("usage", format!("more than {MAX_DNS_WORDS} names in one call"), "give fewer at once"));
        }
        let made: Result<_, Problem> = self
            .planner
            .with(move |planner, _| {
                as_admin(planner)?;
                planner.dns_words(&words, at.as_deref(), anyway, clock::wall())
            })
            .await?;
        let (records, changes) = made?;
        if !records.is_empty() {
            self.publish(records).await?;
        }
        Ok(DnsChanges { schema: version::LOCAL, changes })
    }

    /// Waits until the coordinator has stored the records. If the link breaks before the answer, asks again when it is
    /// back: a record that was stored already is stored again for nothing.
    async fn publish(&self, records: Vec<SignedRecord>) -> Result<(), Problem> {
        let mut events = self.planner.events();
        let back = |event| matches!(event, Event::Synced).then_some(());
        if !self.status().await?.coordinator.connected {
            // The link may be coming back just now; if not, the planner says why there is none.
            let _ = wait_for(&mut events, RECONNECT_PATIENCE, back).await;
        }
        let deadline = Instant::now() + PUBLISH_PATIENCE;
        let left = || deadline.saturating_duration_since(Instant::now());
        loop {
            let token = self.callers.tokens.fetch_add(1, Ordering::Relaxed);
            let command = Command::Publish { token, records: records.clone() };
            self.planner
                .with(move |planner: &mut Planner, now: Now| planner.handle(Input::Command(command), now))
                .await?;
            let refused = wait_for(&mut events, left(), |event| match event {
                Event::Published { token: of, problem } if of == token => Some(problem),
                _ => None,
            })
            .await?;
            match refused {
                None => return Ok(()),
                Some(lost) if lost.code == "no-answer" && !left().is_zero() => {
                    wait_for(&mut events, left(), back).await.map_err(|_| lost)?;
                }
                Some(refused) => return Err(refused),
            }
        }
    }
}

/// The parameters of `meshd ping`.
struct PingCall {
    count: u32,
    timeout_ms: u64,
    interval_ms: u64,
    until_direct: bool,
}

/// How an answer ended early.
enum Ended {
    Refused(Problem),
    Gone(io::Error),
}

impl From<Problem> for Ended {
    fn from(why: Problem) -> Self {
        Self::Refused(why)
    }
}

impl From<io::Error> for Ended {
    fn from(e: io::Error) -> Self {
        Self::Gone(e)
    }
}

/// Writes lines of JSON.
struct Lines {
    writer: OwnedWriteHalf,
}

impl Lines {
    async fn write(&mut self, response: &Response) -> io::Result<()> {
        let mut line = serde_json::to_vec(response)?;
        line.push(b'\n');
        timeout(LINE_PATIENCE, self.writer.write_all(&line)).await?
    }
}

/// Reads the one request of a connection. The inner error is what is wrong with it.
async fn read_request(reader: OwnedReadHalf) -> io::Result<Result<Call, Problem>> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader).take(MAX_REQUEST as u64 + 1);
    timeout(LINE_PATIENCE, reader.read_until(b'\n', &mut line)).await??;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let unreadable = || {
        problem(
            "protocol",
            "the daemon does not understand this call",
            "the program and the running daemon are of different versions: `meshd down`, then `meshd up`",
        )
    };
    if !line.ends_with(b"\n") {
        return Ok(Err(unreadable()));
    }
    Ok(match serde_json::from_slice::<Request>(&line) {
        Ok(request) if request.v == version::LOCAL => Ok(request.call),
        Ok(_) | Err(_) => Err(unreadable()),
    })
}

async fn wait_for<T>(
    events: &mut broadcast::Receiver<Event>,
    patience: Duration,
    mut pick: impl FnMut(Event) -> Option<T>,
) -> Result<T, Problem> {
    let waiting = async {
        loop {
            match events.recv().await {
                Ok(event) => {
                    if let Some(found) = pick(event) {
                        return Ok(found);
                    }
                }
                // The answer may have been among the missed ones; the deadline then ends the wait.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => {
                    return Err(problem("stopping", "the daemon is stopping", ""));
                }
            }
        }
    };
    timeout(patience, waiting)
        .await
        .unwrap_or_else(|_| Err(problem("timeout", "no answer came in time", "see `meshd status`, then try again")))
}

fn as_admin(planner: &Planner) -> Result<(), Problem> {
    if planner.ledger().is_admin(&planner.me().identity) {
        return Ok(());
    }
    let ledger = planner.ledger();
    let admins: Vec<&str> =
        ledger.members().filter(|m| ledger.is_admin(&m.identity)).map(|m| m.name.as_str()).collect();
    Err(problem(
        "not-an-admin",
        "this node is not an admin of its network",
        match admins.as_slice() {
            [] => "no admin node is left".to_owned(),
            some => format!("run the command on an admin node: {}", some.join(", ")),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::client;

    #[tokio::test]
    async fn a_socket_left_by_a_killed_daemon_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/meshd.sock");
        let first = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Socket::bind(&path).unwrap_err().code, "already-running");
        // A killed daemon leaves its file.
        let left = dir.path().join("left.sock");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        assert!(left.exists());
        drop(Socket::bind(&left).unwrap());
        drop(first);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn paths_that_cannot_be_sockets_are_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"precious").unwrap();
        for path in [file.clone(), file.join("meshd.sock"), dir.path().join("x".repeat(120))] {
            let refused = Socket::bind(&path).unwrap_err();
            assert_eq!(refused.code, "socket");
            assert!(!refused.hint.is_empty());
        }
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }

    /// What a server that speaks `lines` looks like to the client.
    fn replies(lines: &'static [&'static str]) -> Vec<Result<Response, Problem>> {
        use std::io::{BufRead, Write};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::Builder::new()
            .spawn(move || {
                let (stream, _) = listener.accept().unwrap();
                let mut request = String::new();
                io::BufReader::new(&stream).read_line(&mut request).unwrap();
                assert!(request.contains(r#""call":"drops""#), "{request}");
                for line in lines {
                    (&stream).write_all(line.as_bytes()).unwrap();
                }
            })
            .unwrap();
        let got = client::call(&path, Call::Drops, Duration::from_secs(5)).unwrap().collect();
        server.join().unwrap();
        got
    }

    #[test]
    fn the_client_reads_answers_until_done_and_names_what_breaks() {
        const DROPS: &str = "{\"reply\":\"drops\",\"body\":0}\n";
        assert_eq!(replies(&["{\"reply\":\"done\"}\n"]).len(), 0);
        let refused = replies(&["{\"reply\":\"error\",\"body\":{\"code\":\"c\",\"text\":\"t\"}}\n"]);
        assert_eq!(refused[0].as_ref().unwrap_err().code, "c");
        assert_eq!(replies(&[])[0].as_ref().unwrap_err().code, "stopped");
        assert_eq!(replies(&[DROPS])[0].as_ref().unwrap_err().code, "protocol");
        assert_eq!(replies(&["{\"reply\":\"do"])[0].as_ref().unwrap_err().code, "stopped");
    }

    #[test]
    fn no_daemon_is_said_with_its_code() {
        let dir = tempfile::tempdir().unwrap();
        let missing = client::status(&dir.path().join("none")).unwrap_err();
        assert_eq!(missing.code, client::NOT_RUNNING);
        let left = dir.path().join("left.sock");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        assert_eq!(client::status(&left).unwrap_err().code, client::NOT_RUNNING);
    }
}

//! Starts a node, waits, and takes it down again.
//!
//! Start: state directory and its lock · local socket · TUN device · UDP sockets · membership (joining if need be) ·
//! addresses on the interface · planner, data thread, relay thread, control link, watchers · "up" · callers are answered.
//!
//! Whatever a person must put right (privileges, a taken name or port, an unwritable directory) is found before the
//! coordinator hears of this node. Stop is the reverse; the interface goes with the data thread, and a caller of
//! `meshd down` is answered when nothing is left but the process.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::daemon::apply::{self, Surroundings, range_clash};
use crate::daemon::background::{Reporter, decode};
use crate::daemon::control_link::ForRelay;
use crate::daemon::desk::LinkDesks;
use crate::daemon::footprint::{self, Journal};
use crate::daemon::health::Health;
use crate::daemon::hooks;
use crate::daemon::join::{self, Membership, Wish};
use crate::daemon::kernel_queues::KernelQueues;
use crate::daemon::links::{Bells, Coordinator};
use crate::daemon::local_api::{Api, Callers, Socket};
use crate::daemon::names;
use crate::daemon::outbox::{Notices, Outbox};
use crate::daemon::planner_task::{self, ToStore, Wiring};
use crate::daemon::portmap::{self, PortMapHandle};
use crate::daemon::relay_carrier::{self, RelayCarrier};
use crate::daemon::relay_thread::{self, Delivery};
use crate::daemon::routing::{self, Routing};
use crate::daemon::settings::SettingsDesk;
use crate::daemon::stop::{Reason, Stopper};
use crate::daemon::store::{Endpoint, Joined, State, Store};
use crate::daemon::tcp;
use crate::daemon::watch::{self as surroundings, Known, NetworkWatch};
use crate::daemon::worker::{self, Worker};
use crate::daemon::{Options, UpReport, control_link, problem};
use crate::engine::counters::Counters;
use crate::engine::drops::Drops;
use crate::engine::io::{Event, Input, RoutePlan, SocketId};
use crate::engine::path::mtu::BASE;
use crate::engine::place::Meetings;
use crate::engine::planner::{Config, Limits, MOST_SOCKETS, Planner, StartError, judge};
use crate::link::proxy::Environment;
use crate::link::{self, Proxies};
use crate::os::manager::Manager;
use crate::os::netlink::{Changes, Netlink};
use crate::os::streams::Streams;
use crate::os::tun::{Tun, TunError};
use crate::os::udp::{BindError, UdpSockets};
use crate::os::wake::Wake;
use crate::os::{clock, process};
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::ledger::Ledger;
use crate::trust::names::label_from_hostname;
use crate::wire::local::{Problem, SettingsChange, Severity};

/// How long a node that knows its network waits for the coordinator before it calls itself up without it.
const COORDINATOR_PATIENCE: Duration = Duration::from_secs(5);
/// How much longer it waits for the relay, so that the first packet of whoever waits for `meshd up` is not lost.
const RELAY_PATIENCE: Duration = Duration::from_secs(1);
/// How often it looks meanwhile.
const RELAY_LOOK: Duration = Duration::from_millis(20);
/// How long threads may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long undoing may take.
const UNDO_PATIENCE: Duration = Duration::from_secs(8);
/// Conveniences are written at most this often.
const STATE_EVERY: Duration = Duration::from_secs(10);
/// And at least this often, for the wall clock in them.
const STATE_AT_LEAST: Duration = Duration::from_secs(600);
/// A clock this far behind an earlier reading is worth a warning, in seconds.
const CLOCK_SLACK: u64 = 60;

/// Descriptors left to everything but punches: files, links, callers, a NAT check.
const OTHER_FILES: u64 = 128;

/// Runs a node until it is told to stop.
pub(super) async fn run(options: Options, reporter: &mut Reporter) -> Result<(), Problem> {
    let stopper = Stopper::new();
    listen_to_signals(&stopper)?;
    let starting = Node::start(&options, reporter, &stopper);
    let node = tokio::select! {
        node = starting => node?,
        reason = stopper.reason() => return ended(reason),
    };
    let reason = tokio::select! {
        said = node.say_up(reporter) => match said {
            Ok(()) => stopper.reason().await,
            Err(why) => Reason::Failed(why),
        },
        reason = stopper.reason() => reason,
    };
    match &reason {
        Reason::Asked(why) => tracing::info!("stopping: {why}"),
        Reason::Failed(why) => tracing::error!(code = why.code, "stopping: {}", why.text),
    }
    reporter.manager().stopping();
    node.stop().await;
    ended(reason)
}

fn ended(reason: Reason) -> Result<(), Problem> {
    match reason {
        Reason::Asked(_) => Ok(()),
        Reason::Failed(why) => Err(why),
    }
}

/// A node that runs.
struct Node {
    store: Store,
    state: State,
    to_store: Arc<ToStore>,
    api: Arc<Api>,
    routing: JoinHandle<()>,
    names: JoinHandle<()>,
    footprint: (Journal, Netlink),
    stop: watch::Sender<bool>,
    gone: watch::Sender<bool>,
    data_stop: Arc<AtomicBool>,
    wake: Wake,
    data_ended: oneshot::Receiver<()>,
    relay_ended: oneshot::Receiver<()>,
    control_task: JoinHandle<()>,
    port_mapper: PortMapHandle,
    /// Ended by being aborted, in this order.
    tasks: Vec<JoinHandle<()>>,
    writer: JoinHandle<()>,
    events: broadcast::Receiver<Event>,
    notes: Vec<String>,
}

impl Node {
    async fn start(options: &Options, reporter: &Reporter, stopper: &Stopper) -> Result<Self, Problem> {
        reporter.stage("taking the state directory");
        let token = options.token.as_ref().map(|t| decode(t.text())).transpose()?;
        let mut store = Store::open(&options.state_dir)?;
        let journal = Journal::open(&options.state_dir)?;
        let socket = Socket::bind(&options.socket)?;
        let state = store.state()?;
        let proxies = Arc::new(decide_proxies(&store, options)?);
        reporter.stage("making the network interface");
        let tun = Tun::create(options.tun.as_deref(), !options.no_offload).map_err(tun_problem)?;
        let kept = (state.port != 0).then_some(state.port);
        let sockets =
            UdpSockets::bind(options.port, kept, !options.no_udp_offload, &mut rand::rng()).map_err(udp_problem)?;
        let sockets = Arc::new(sockets);
        let changes = Changes::watch().map_err(netlink_problem)?;
        let netlink = Netlink::connect().map_err(netlink_problem)?;
        let left = footprint::undo(&journal, &netlink).await;
        if !left.is_empty() {
            let hint = "`meshd footprint` lists what is left of a daemon that was killed";
            return Err(problem("footprint", format!("cannot undo: {}", left.join("; ")), hint));
        }
        let around = Surroundings::look(&netlink, tun.index()).await?;

        reporter.stage(if token.is_some() { "joining the network" } else { "reading what is known of the network" });
        let wish = Wish {
            token: token.as_ref(),
            name: options.name.as_deref(),
            host_label: label_from_hostname(&process::host_name()),
            network_name: options.network_name.as_deref(),
            ipv4_range: options.ipv4_range,
            surroundings: &around,
            wall: clock::wall(),
        };
        let desks = LinkDesks { proxies: Arc::clone(&proxies) };
        let mut membership = join::ensure(&mut store, &wish, &desks, &mut rand::rng()).await?;
        keep_settings(&store, options)?;

        reporter.stage("setting the interface up");
        // Once: a large network has thousands of signatures.
        let drops = Arc::new(Drops::default());
        let ledger = judge(membership.network.network, &membership.records, &drops);
        let (addresses, network_name) = join::own_addresses(&membership, &ledger)?;
        // The ledger has its own, and what comes next finds room where these were.
        membership.records = Vec::new();
        let ranges: Vec<IpNet> = addresses.iter().map(IpNet::trunc).collect();
        if let Some(what) = around.clash(&ranges) {
            return Err(range_clash(&ranges, &what));
        }
        let health = Health::default();
        let mut mesh: Vec<IpAddr> = addresses.iter().map(IpNet::addr).collect();
        if let Some(note) = apply::bring_up(&netlink, tun.index(), &addresses).await? {
            mesh.retain(IpAddr::is_ipv4);
            let text = format!("this machine has no IPv6 inside the mesh: {}", note.0);
            health.set("no-ipv6", Severity::Info, text, "IPv4 works; enable IPv6 in the kernel for both");
        }
        tracing::info!(interface = tun.name(), port = sockets.port(), "the interface is up");
        tracing::debug!(network = network_name, ?addresses, "addresses");
        note_conditions(&health, &store, &state, &sockets);

        reporter.stage("connecting to the coordinator");
        let limits = punch_limits(options, &health);
        let (change, map_port) = (&options.settings, !options.no_port_mapping);
        Self::assemble(
            store, state, membership, ledger, drops, proxies, tun, sockets, limits, netlink, changes, ranges, mesh,
            journal, health, socket, change, map_port, stopper,
        )
    }

    #[expect(clippy::too_many_lines, reason = "the wiring of the whole daemon is easier to follow in one place")]
    fn assemble(
        store: Store,
        mut state: State,
        membership: Membership,
        ledger: Ledger,
        drops: Arc<Drops>,
        proxies: Arc<Proxies>,
        tun: Tun,
        sockets: Arc<UdpSockets>,
        limits: Limits,
        netlink: Netlink,
        changes: Changes,
        ranges: Vec<IpNet>,
        mesh: Vec<IpAddr>,
        journal: Journal,
        health: Health,
        socket: Socket,
        change: &SettingsChange,
        map_port: bool,
        stopper: &Stopper,
    ) -> Result<Self, Problem> {
        let Membership { keys, network, records: _, mut notes } = membership;
        notes.extend(store.notes().iter().cloned());
        let (control_secret, nonce_secret) = (copy_of_control(&keys), copy_of_control(&keys));
        let (me, identity_secret) = (keys.identity_key(), Secret32::new(*keys.identity.expose()));
        let interface = tun.name().to_owned();
        let own = tun.index();

        // The planner and the data thread.
        let port = sockets.port();
        let settings = SettingsDesk::new(store.settings_file(), store.settings()?)?;
        let latest = state.latest_wall.saturating_add(1).saturating_mul(1_000_000);
        let config = Config {
            keys,
            network: network.network,
            records: Vec::new(),
            port_v4: Some(port),
            port_v6: sockets.without_v6().is_none().then_some(port),
            last_endpoints: state.endpoints.iter().map(|e| (e.peer, e.address)).collect(),
            worked: state.worked.iter().map(Joined::known).collect(),
            seed: rand::random(),
            first_number: wall_micros().max(latest),
            limits,
            adverts: state.adverts.clone(),
            routes: settings.get().wish(),
        };
        let mut planner =
            Planner::with_ledger(config, ledger, Arc::clone(&drops), clock::now()).map_err(start_problem)?;
        settings.change(change, None, &mut planner, clock::now())?;
        let (outbound, inbound) = planner.worker();
        let wake = Wake::new().map_err(|e| thread_problem(&e))?;
        let (slow, slow_notices) = mpsc::channel(planner_task::SLOW);
        let (facts, fact_notices) = mpsc::channel(planner_task::FACTS);
        let (updates, update_queue) = std::sync::mpsc::sync_channel(planner_task::UPDATES);
        let (relayed, relayed_queue) = std::sync::mpsc::sync_channel(relay_thread::QUEUE);

        // The links.
        let ends = planner_task::channels();
        let handle = ends.handle.clone();
        let events = handle.events();
        let (stop, stopped) = watch::channel(false);
        let bells = || Bells { nudge: Arc::new(Notify::new()), stop: stopped.clone() };
        let (control_bells, relay_bells) = (bells(), bells());
        let carrier_nudge = Arc::new(Notify::new());
        let nudge = vec![Arc::clone(&control_bells.nudge), Arc::clone(&relay_bells.nudge), Arc::clone(&carrier_nudge)];
        let carrier = Arc::new(RelayCarrier::default());
        let (answers, relay_answers) = mpsc::channel(relay_carrier::ANSWERS);
        let coordinator = Arc::new(Coordinator {
            urls: network.urls.clone(),
            key: network.coordinator,
            secret: control_secret,
            proxies: Arc::clone(&proxies),
        });
        let (tcp, tcp_orders, to_streams) = tcp::channels(wake.clone(), Arc::clone(&drops));
        let connections = tcp::Driver {
            orders: tcp_orders,
            handle: tcp.clone(),
            planner: handle.inputs.clone(),
            coordinator: Arc::clone(&coordinator),
            wanted: port,
        };
        let delivery = Delivery { queue: relayed, wake: wake.clone() };
        let (relay, relay_ended) = relay_thread::start(
            Arc::clone(&coordinator),
            handle.inputs.clone(),
            delivery,
            Arc::clone(&carrier),
            Arc::clone(&sockets),
            Arc::clone(&drops),
            relay_bells,
        )
        .map_err(|e| thread_problem(&e))?;
        let (control, control_task) = control_link::start(
            coordinator,
            handle.inputs.clone(),
            ForRelay { carrier: Arc::clone(&carrier), answers },
            control_bells,
        );
        let carrier_driver = relay_carrier::Driver {
            shared: carrier,
            sockets: Arc::clone(&sockets),
            control: control.clone(),
            relay: relay.clone(),
            planner: handle.inputs.clone(),
            url: network.urls.first().cloned().unwrap_or_default(),
            answers: relay_answers,
            nudge: carrier_nudge,
        };

        let queues = KernelQueues { interface: own, sockets: Arc::clone(&sockets) };

        // The data thread; when it ends by itself, so does the daemon.
        let data_stop = Arc::new(AtomicBool::new(false));
        let notices = Notices::new(slow, facts, Arc::clone(&drops));
        let counters = Arc::new(Counters::default());
        let streams = Streams::new().map_err(|e| thread_problem(&e))?;
        let outbox = Outbox::new(
            tun,
            Arc::clone(&sockets),
            relay.clone(),
            streams,
            notices,
            Arc::clone(&drops),
            Arc::clone(&counters),
        );
        let worker = Worker {
            outbound,
            inbound,
            outbox,
            sockets: Arc::clone(&sockets),
            updates: update_queue,
            relayed: relayed_queue,
            streams: to_streams,
            wake: wake.clone(),
            stop: Arc::clone(&data_stop),
        };
        let data_result = worker::start(worker).map_err(|e| thread_problem(&e))?;
        let (tell_data_ended, data_ended) = oneshot::channel();
        let on_failure = stopper.clone();
        let data_watch = tokio::spawn(async move {
            if let Ok(Err(e)) = data_result.await {
                on_failure.fail(problem(
                    "interface-lost",
                    format!("the network interface cannot be used any more: {e}"),
                    "somebody removed it; `meshd up` makes it again",
                ));
            }
            // Nobody waits when the daemon is not stopping.
            let _ = tell_data_ended.send(());
        });

        // Everything around them.
        let to_store = Arc::new(ToStore::default());
        *to_store.worked.lock() = state.worked.iter().map(Joined::known).collect();
        *to_store.endpoints.lock() = state.endpoints.iter().map(|e| (e.peer, e.address)).collect();
        let (routes, plan) = watch::channel(RoutePlan::default());
        let (shadows, shadowed) = watch::channel(BTreeMap::new());
        let (hooks_plan, hooks_settings, hooks_health) = (plan.clone(), settings.watch(), health.clone());
        let hooks_events = handle.events();
        // A netlink socket lists one thing at a time, so this task has its own.
        let own_netlink = Netlink::connect().map_err(netlink_problem)?;
        let names = names::run(names::Wiring {
            planner: handle.clone(),
            interface: interface.clone(),
            addresses: mesh.clone(),
            journal: journal.clone(),
            changes: Changes::watch().map_err(netlink_problem)?,
            settings: settings.watch(),
            shadowed: shadowed.clone(),
            health: health.clone(),
        });
        let behind = routing::behind::run(routing::behind::Wiring {
            netlink: Netlink::connect().map_err(netlink_problem)?,
            changes: Changes::watch().map_err(netlink_problem)?,
            index: own,
            plan: plan.clone(),
            settings: settings.watch(),
            inputs: handle.inputs.clone(),
            health: health.clone(),
        });
        let (meetings, met) = watch::channel(Meetings::default());
        let place = routing::place::run(routing::place::Wiring {
            netlink: Netlink::connect().map_err(netlink_problem)?,
            changes: Changes::watch().map_err(netlink_problem)?,
            index: own,
            plan: plan.clone(),
            inputs: handle.inputs.clone(),
            meetings,
            network: network.network,
            me,
            secret: identity_secret,
            port: port.wrapping_add(1),
        });
        let routing = Routing::new(routing::Wiring {
            netlink: own_netlink.clone(),
            changes: Changes::watch().map_err(netlink_problem)?,
            index: own,
            interface: interface.clone(),
            addresses: mesh,
            journal: journal.clone(),
            plan,
            settings: settings.watch(),
            shadowed: shadows,
            meetings: met,
            health: health.clone(),
        });
        let footprint = (journal, own_netlink);
        let (offers, offered) = mpsc::channel(1);
        let check = Arc::new(Notify::new());
        let known = Known::new(limits.extra_sockets);
        let (interface_mtu, wanted_mtu) = watch::channel(BASE);
        let mtu_keeper = surroundings::keep_mtu(netlink.clone(), own, wanted_mtu);
        let wiring = Wiring {
            planner,
            sockets,
            tcp,
            updates,
            wake: wake.clone(),
            slow: slow_notices,
            facts: fact_notices,
            store: Arc::clone(&to_store),
            resolve: offers,
            routes,
            nudge: nudge.clone(),
            interface_mtu,
            drops: Arc::clone(&drops),
            health: health.clone(),
        };
        let planner_task =
            planner_task::start(wiring, ends, control.clone(), relay.clone()).map_err(|e| thread_problem(&e))?;
        let network_watch = NetworkWatch {
            netlink,
            changes,
            own,
            ranges,
            inputs: handle.inputs.clone(),
            nudge,
            check: Arc::clone(&check),
            known: known.clone(),
            health: health.clone(),
        };
        let url = network.urls.first().cloned().unwrap_or_default();
        let inputs = handle.inputs.clone();
        let resolver =
            surroundings::resolve(offered, url, inputs.clone(), known.clone(), Arc::clone(&check), health.clone());
        let checker = surroundings::check_nat(check, known.clone(), control.clone(), relay.clone(), inputs);
        let expelled = stop_when_expelled(handle.events(), stopper.clone());
        state.port = port;
        let writer = tokio::spawn(write_records(store.record_log(), Arc::clone(&to_store), health.clone()));

        let first = network.urls.first().and_then(|url| link::Endpoint::parse(url).ok());
        let proxy = first.and_then(|endpoint| proxies.towards(&endpoint).map(ToString::to_string));
        if let Some(proxy) = &proxy {
            tracing::info!(proxy, "the coordinator is reached through a proxy");
        }
        let (port_mapper, port_task) = start_port_mapping(map_port, port, nonce_secret, own, &handle.inputs);
        let trials = settings.clone().watch_trials(handle.clone());
        let (gone, gone_watch) = watch::channel(false);
        let api = Arc::new(Api {
            planner: handle,
            control,
            relay,
            port_mapper: port_mapper.clone(),
            known,
            health,
            drops,
            counters,
            queues,
            stopper: stopper.clone(),
            settings,
            shadowed,
            interface,
            urls: network.urls,
            coordinator: network.coordinator,
            proxy,
            gone: gone_watch,
            callers: Callers::default(),
        });
        let hooks = hooks::run(hooks::Wiring {
            api: Arc::clone(&api),
            settings: hooks_settings,
            events: hooks_events,
            plan: hooks_plan,
            health: hooks_health,
        });
        let mut tasks = vec![
            tokio::spawn(Arc::clone(&api).serve(socket)),
            tokio::spawn(hooks),
            tokio::spawn(network_watch.run()),
            tokio::spawn(mtu_keeper),
            tokio::spawn(resolver),
            tokio::spawn(checker),
            tokio::spawn(expelled),
            tokio::spawn(carrier_driver.run()),
            tokio::spawn(connections.run()),
            tokio::spawn(trials),
            tokio::spawn(behind),
            tokio::spawn(place),
            data_watch,
            planner_task,
        ];
        tasks.extend(port_task);
        Ok(Self {
            store,
            state,
            to_store,
            api,
            routing: tokio::spawn(routing.run()),
            names: tokio::spawn(names),
            footprint,
            stop,
            gone,
            data_stop,
            wake,
            data_ended,
            relay_ended,
            control_task,
            port_mapper,
            tasks,
            writer,
            events,
            notes,
        })
    }

    /// Waits for the coordinator, tells whoever started the daemon, and then keeps the conveniences on disk for ever.
    async fn say_up(&self, reporter: &mut Reporter) -> Result<(), Problem> {
        self.keep_state();
        let mut events = self.events.resubscribe();
        let mut log = self.api.status().await?.coordinator.connected;
        let synced = async {
            while !log {
                match events.recv().await {
                    Ok(Event::Synced) | Err(broadcast::error::RecvError::Closed) => log = true,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                }
            }
        };
        let warning = match timeout(COORDINATOR_PATIENCE, synced).await {
            Ok(()) => None,
            Err(_) => Some(self.api.control.problem.borrow().clone().unwrap_or_else(|| {
                problem(
                    "coordinator-timeout",
                    "the coordinator has not answered yet",
                    "meshd keeps trying; `meshd status` shows when it is connected",
                )
            })),
        };
        let mut status = self.api.status().await?;
        let relay_by = clock::now() + RELAY_PATIENCE;
        while warning.is_none() && !status.coordinator.relay_connected && clock::now() < relay_by {
            tokio::time::sleep(RELAY_LOOK).await;
            status = self.api.status().await?;
        }
        tracing::info!(peers = status.peers.len(), connected = warning.is_none(), "the node is up");
        let mut notes = self.notes.clone();
        let pending = self.api.planner.with(|planner, _| planner.pending_routes()).await?;
        notes.extend(pending.into_iter().map(|(text, hint)| format!("{text}; {hint}")));
        let report = UpReport { status, already_running: false, notes, warning };
        if !reporter.ready(report) {
            return Err(problem("cancelled", "the command that started the daemon is gone", ""));
        }
        tokio::select! {
            // Both end only with the daemon.
            () = self.keep_state_always() => Ok(()),
            () = self.stay_watched(reporter.manager()) => Ok(()),
        }
    }

    /// Tells the service manager, if it watches, that the node answers: the planner's answer is the proof.
    async fn stay_watched(&self, manager: &Manager) {
        let Some(every) = manager.alive_every() else { return std::future::pending().await };
        loop {
            if self.api.status().await.is_ok() {
                manager.alive();
            }
            tokio::time::sleep(every).await;
        }
    }

    async fn keep_state_always(&self) {
        loop {
            let changed = timeout(STATE_AT_LEAST, self.endpoints_changed()).await;
            self.keep_state();
            if changed.is_ok() {
                tokio::time::sleep(STATE_EVERY).await;
            }
        }
    }

    async fn endpoints_changed(&self) {
        self.to_store.endpoints_changed.notified().await;
    }

    fn keep_state(&self) {
        let endpoints: BTreeMap<_, _> = self.to_store.endpoints.lock().clone();
        let state = State {
            endpoints: endpoints.into_iter().map(|(peer, address)| Endpoint { peer, address }).collect(),
            worked: self.to_store.worked.lock().iter().map(Joined::kept).collect(),
            latest_wall: self.state.latest_wall.max(clock::wall()),
            adverts: self.to_store.adverts.lock().values().cloned().collect(),
            ..self.state.clone()
        };
        match self.store.keep_state(&state) {
            Ok(()) => self.api.health.clear("state-write"),
            Err(e) => self.api.health.set("state-write", Severity::Warning, e.text, e.hint),
        }
    }

    async fn stop(self) {
        // No more callers: the socket's file goes with the first task. Those being answered stay until the end.
        let mut tasks = self.tasks.iter();
        if let Some(accepting) = tasks.next() {
            accepting.abort();
        }
        self.keep_state();
        self.stop.send_replace(true);
        self.data_stop.store(true, Ordering::Release);
        self.wake.ring();
        // First of all: others could be let in at a port that the next program here may get.
        self.port_mapper.stop().await;
        if timeout(STOP_PATIENCE, self.data_ended).await.is_err() {
            tracing::error!("the data thread does not end");
        }
        if timeout(STOP_PATIENCE, self.relay_ended).await.is_err() {
            tracing::warn!("the relay thread does not end");
        }
        // Either it said goodbye or it was not connected.
        let _ = timeout(STOP_PATIENCE, self.control_task).await;
        for task in tasks {
            task.abort();
        }
        for changing in [self.routing, self.names] {
            changing.abort();
            // Aborted: it changes nothing any more.
            let _ = changing.await;
        }
        let (journal, netlink) = self.footprint;
        if timeout(UNDO_PATIENCE, footprint::undo(&journal, &netlink)).await.is_err() {
            tracing::error!("what was changed on this machine is not undone; `meshd footprint --undo` tries again");
        }
        self.to_store.finish();
        if timeout(STOP_PATIENCE, self.writer).await.is_err() {
            tracing::error!("records are still being written");
        }
        drop(self.store);
        tracing::info!("stopped");
        self.gone.send_replace(true);
        self.api.idle(Duration::from_secs(1)).await;
    }
}

/// Asks the router for the node's port, unless that is switched off. Without what it takes the node works as well as it can.
fn start_port_mapping(
    wanted: bool,
    port: u16,
    secret: Secret32,
    own: u32,
    inputs: &mpsc::Sender<Input>,
) -> (PortMapHandle, Option<JoinHandle<()>>) {
    if !wanted {
        return (PortMapHandle::off(port), None);
    }
    match portmap::start(port, secret, own, inputs.clone()) {
        Ok((handle, task)) => (handle, Some(task)),
        Err(e) => {
            tracing::warn!(error = %e, "no port is mapped at the router");
            (PortMapHandle::off(port), None)
        }
    }
}

/// Appends accepted records to the disk, in order, without holding up the planner.
async fn write_records(log: crate::daemon::store::RecordLog, to_store: Arc<ToStore>, health: Health) {
    loop {
        let batch = std::mem::take(&mut *to_store.records.lock());
        if batch.is_empty() {
            if to_store.is_finished() {
                return;
            }
            to_store.records_changed.notified().await;
            continue;
        }
        let log = log.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let written = log.append(&batch);
            (batch, written)
        });
        // An error means that the runtime is shutting down.
        let Ok((batch, written)) = writing.await else { return };
        match written {
            Ok(()) => health.clear("records-write"),
            Err(e) => {
                health.set("records-write", Severity::Error, e.text, e.hint);
                to_store.records.lock().splice(0..0, batch);
                if to_store.is_finished() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        }
    }
}

async fn stop_when_expelled(mut events: broadcast::Receiver<Event>, stopper: Stopper) {
    loop {
        match events.recv().await {
            Ok(Event::Expelled) => break,
            Err(broadcast::error::RecvError::Closed) => return,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
        }
    }
    stopper.fail(start_problem(StartError::Revoked));
}

fn listen_to_signals(stopper: &Stopper) -> Result<(), Problem> {
    for (kind, why) in [
        (SignalKind::terminate(), "asked to by SIGTERM"),
        (SignalKind::interrupt(), "asked to by SIGINT"),
        (SignalKind::hangup(), "the terminal is gone"),
    ] {
        let mut signals = signal(kind).map_err(|e| thread_problem(&e))?;
        let stopper = stopper.clone();
        tokio::spawn(async move {
            if signals.recv().await.is_some() {
                stopper.stop(why);
            }
        });
    }
    Ok(())
}

fn note_conditions(health: &Health, store: &Store, state: &State, sockets: &UdpSockets) {
    if !store.notes().is_empty() {
        health.set(
            "state-damaged",
            Severity::Warning,
            store.notes().join("; "),
            "look for a failing disk; the files kept aside can be removed once looked at",
        );
    }
    if let Some(why) = sockets.without_v6() {
        health.set(
            "no-ipv6-socket",
            Severity::Info,
            format!("this machine has no IPv6: {why}"),
            "IPv4 works; pairs that could meet only by IPv6 use the relay",
        );
    }
    let wall = clock::wall();
    if wall.saturating_add(CLOCK_SLACK) < state.latest_wall {
        health.set(
            "clock-behind",
            Severity::Warning,
            format!("this machine's clock is {} s behind what it was before", state.latest_wall - wall),
            "set the clock; until then peers that know this node may refuse its handshakes",
        );
    }
    if sockets.descriptor(SocketId::V4).is_none() {
        health.set("no-udp", Severity::Error, "there is no IPv4 socket", "see the log");
    }
}

/// How far punches may go here: what was asked for, as far as the system gives the descriptors.
fn punch_limits(options: &Options, health: &Health) -> Limits {
    let usual = Limits::default();
    let wanted = options.punch_sockets.unwrap_or(MOST_SOCKETS).min(MOST_SOCKETS);
    let files = process::raise_descriptor_limit().unwrap_or_else(|e| {
        tracing::warn!(error = %e, "the limit of open files cannot be raised");
        process::descriptor_limit().unwrap_or(0)
    });
    let extra_sockets = wanted.min(u16::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(u16::MAX));
    if extra_sockets < wanted {
        let text = format!(
            "punches through hard NATs may open {extra_sockets} sockets instead of {wanted}: \
             this process may have {files} files open"
        );
        health.set("sockets-few", Severity::Info, text, planner_task::SOCKETS_HINT);
    }
    Limits {
        extra_sockets,
        tcp: true,
        probes_per_second: options.punch_rate.unwrap_or(usual.probes_per_second),
        entries_per_minute: options.punch_entries.unwrap_or(usual.entries_per_minute),
        ..usual
    }
}

/// What was set now, else before; the environment decides where that leaves it to it.
fn decide_proxies(store: &Store, options: &Options) -> Result<Proxies, Problem> {
    let setting = match &options.proxy {
        Some(setting) => setting.clone(),
        None => store.settings()?.settings.proxy,
    };
    Ok(Proxies::new(setting, &Environment::read())?)
}

/// What was set holds from now on: the node is a member.
fn keep_settings(store: &Store, options: &Options) -> Result<(), Problem> {
    let Some(proxy) = &options.proxy else { return Ok(()) };
    let known = store.settings()?;
    let mut kept = known.clone();
    kept.settings.proxy = proxy.clone();
    if let Some(trial) = &mut kept.trial {
        trial.before.proxy = proxy.clone();
    }
    if kept == known { Ok(()) } else { store.settings_file().keep(&kept) }
}

/// The control secret, once more: the planner owns the keys, the links and the port mapper need this one.
fn copy_of_control(keys: &NodeKeys) -> Secret32 {
    Secret32::new(*keys.control.expose())
}

fn wall_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

fn start_problem(e: StartError) -> Problem {
    let (code, hint) = match e {
        StartError::Revoked => (
            crate::wire::control::refusal::REVOKED,
            "to come back, move the state directory away and join with a new invite",
        ),
        StartError::NotAMember => (
            "records",
            "restore records.jsonl from a backup, or move the state directory away and join with a new invite",
        ),
    };
    problem(code, e.to_string(), hint)
}

fn tun_problem(e: TunError) -> Problem {
    problem(e.code(), e.to_string(), e.hint())
}

fn udp_problem(e: BindError) -> Problem {
    let (code, hint) = match &e {
        BindError::PortTaken(_) => ("port-taken", "choose another with `--port`, or leave `--port` out"),
        BindError::Forbidden(_) => ("not-permitted", "run as root, or choose a port above 1023 with `--port`"),
        BindError::NoneFree | BindError::Io(_) => ("udp", "see `ss -u -a` for the sockets there are"),
    };
    problem(code, e.to_string(), hint)
}

fn netlink_problem(e: std::io::Error) -> Problem {
    problem("interface", format!("the kernel's routing system does not answer: {e}"), "meshd needs Linux with netlink")
}

fn thread_problem(e: &std::io::Error) -> Problem {
    problem("resources", format!("the system gives no more resources: {e}"), "see `ulimit -a`")
}

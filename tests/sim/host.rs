//! A real node in the simulated world: its three machines, the threads between them, its sockets, its TUN device and its
//! store. The rules that every driver of the machines must keep (`docs/architecture.md`) are asserted here.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use meshd::engine::drops::{Drop, Drops};
use meshd::engine::inbound::{Inbound, ToRelay};
use meshd::engine::io::{self, Input, Notice, Output, Path, PeerId, SocketId, Update, Via};
use meshd::engine::outbound::Outbound;
use meshd::engine::packet::{Destination, FromTun, InboundSink, OutboundSink};
use meshd::engine::planner::{Config, Planner, Why};
use meshd::time::Now;
use meshd::trust::advert::SignedAdvert;
use meshd::trust::record::SignedRecord;
use meshd::wire::keys::{IdentityKey, WgKey};

use crate::dice::Dice;

/// Between threads of one process, at most.
const THREAD_DELAY_US: u64 = 1_000;
/// Datagrams that may wait for the planner (`docs/architecture.md` section 9).
const SLOW_QUEUE: usize = 1_024;
/// A machine that asks to be woken more often than this in one second spins.
const WAKES_PER_SECOND: u32 = 1_000;

/// What a node wants from the world around it.
#[derive(Debug)]
pub(crate) enum Want {
    /// A datagram out of one of our UDP sockets, with its time to live if it is not the usual one.
    Udp { socket: SocketId, remote: SocketAddr, bytes: Vec<u8>, ttl: Option<u8> },
    /// More sockets.
    Open(Vec<SocketId>),
    /// Fewer.
    Close(Vec<SocketId>),
    /// Something about TCP connections.
    Tcp(io::TcpOrder),
    /// A payload for a peer through the relay.
    Relay { peer: WgKey, bytes: Vec<u8> },
    /// A control message.
    Control(meshd::wire::control::ToCoordinator),
    /// The STUN servers are to be resolved.
    ResolveStun(Vec<meshd::wire::control::StunServer>),
    /// A packet came out of the tunnel.
    ToKernel(Vec<u8>),
    /// Look after the worker at this time at the latest: updates wait for it.
    Worker(Now),
    /// Tell the planner at this time.
    Notice(Now, Notice),
}

/// The running part of a node: everything a restart loses.
pub(crate) struct Machines {
    pub(crate) planner: Planner,
    outbound: Outbound,
    inbound: Inbound,
    pub(crate) drops: Arc<Drops>,
    dice: Dice,
    /// Updates on their way to the worker, and when they are there.
    updates: VecDeque<(Now, Update)>,
    last_update: Now,
    /// When the worker is looked after because packets wait.
    release: Option<Now>,
    last_notice: Now,
    slow_waiting: usize,
    now: Now,
    /// By when the planner must be called, unless the machine sleeps.
    promised: Option<Now>,
    wake_second: u64,
    wakes: u32,
    /// Every event the planner told.
    pub(crate) events: Vec<(Now, io::Event)>,
    /// Where each peer's packets go, by the events.
    pub(crate) paths: BTreeMap<WgKey, Path>,
    /// Where the worker sends each peer's packets.
    pub(crate) sending: BTreeMap<PeerId, Path>,
    /// The newest advertisements, as the shell keeps them.
    pub(crate) adverts: BTreeMap<IdentityKey, SignedAdvert>,
    /// Records accepted since the start.
    pub(crate) persisted: Vec<SignedRecord>,
    /// Every time `handle_timeout` was called, by reason.
    pub(crate) timeouts: BTreeMap<String, u64>,
    /// The longest packet its kernel hands over.
    pub(crate) interface_mtu: u16,
}

impl Machines {
    pub(crate) fn new(config: Config, now: Now, dice: Dice, wants: &mut Vec<Want>) -> Self {
        set_boringtuns_clock(now);
        let drops = Arc::new(Drops::default());
        let planner = Planner::new(config, Arc::clone(&drops), now).unwrap();
        let (outbound, inbound) = planner.worker();
        let mut machines = Self {
            planner,
            outbound,
            inbound,
            drops,
            dice,
            updates: VecDeque::new(),
            last_update: now,
            release: None,
            last_notice: now,
            slow_waiting: 0,
            now,
            promised: None,
            wake_second: 0,
            wakes: 0,
            events: Vec::new(),
            paths: BTreeMap::new(),
            sending: BTreeMap::new(),
            adverts: BTreeMap::new(),
            persisted: Vec::new(),
            timeouts: BTreeMap::new(),
            interface_mtu: 1_280,
        };
        machines.drain(wants);
        machines
    }

    /// Something for the planner.
    pub(crate) fn input(&mut self, input: Input, now: Now, wants: &mut Vec<Want>) {
        self.tick(now);
        if let Input::Notice(Notice::Slow { .. } | Notice::Message { .. }) = &input {
            self.slow_waiting -= 1;
        }
        self.planner.handle(input, now);
        self.drain(wants);
    }

    /// When the planner must be woken.
    pub(crate) fn deadline(&self) -> Option<Now> {
        self.planner.poll_timeout().map(|(at, _)| at)
    }

    /// Why the planner would be woken next.
    pub(crate) fn reason(&self) -> Option<Why> {
        self.planner.poll_timeout().map(|(_, why)| why)
    }

    pub(crate) fn wake(&mut self, now: Now, wants: &mut Vec<Want>) {
        self.tick(now);
        if let Some(why) = self.reason() {
            let why = format!("{why:?}");
            let name = why.split('(').next().unwrap_or(&why).to_owned();
            *self.timeouts.entry(name).or_default() += 1;
        }
        let second = now.0 / 1_000_000;
        self.wakes = if second == self.wake_second { self.wakes + 1 } else { 1 };
        self.wake_second = second;
        assert!(self.wakes <= WAKES_PER_SECOND, "the planner spins: {:?}", self.planner.poll_timeout());
        self.planner.handle_timeout(now);
        self.drain(wants);
    }

    /// A datagram from a socket or out of a relay frame.
    pub(crate) fn datagram(&mut self, via: Via, bytes: &[u8], now: Now, wants: &mut Vec<Want>) {
        self.tick(now);
        let mut sink = Sink::default();
        self.apply_updates(None, &mut sink);
        self.inbound.handle_datagram(&via, bytes, now, &mut sink);
        while let Some(ToRelay { from, to, payload }) = self.inbound.next_to_relay() {
            self.outbound.relay(from, to, &payload, now, &mut sink);
        }
        for peer in std::mem::take(&mut sink.established) {
            self.outbound.flush(peer, now, &mut sink);
        }
        self.collect(sink, wants);
    }

    /// A packet from the kernel.
    pub(crate) fn kernel_sends(&mut self, packet: &[u8], now: Now, wants: &mut Vec<Want>) {
        self.tick(now);
        let mut sink = Sink::default();
        self.apply_updates(None, &mut sink);
        self.outbound.handle_tun([FromTun::whole(&mut packet.to_vec())], now, &mut sink);
        self.collect(sink, wants);
    }

    /// Updates have reached the worker.
    pub(crate) fn worker(&mut self, now: Now, wants: &mut Vec<Want>) {
        self.tick(now);
        let mut sink = Sink::default();
        self.apply_updates(Some(now), &mut sink);
        self.outbound.release(now, &mut sink);
        self.release = None;
        self.collect(sink, wants);
    }

    fn tick(&mut self, now: Now) {
        assert!(now >= self.now, "time never goes back: {:?} → {now:?}", self.now);
        assert!(self.promised.is_none_or(|at| now <= at), "the world forgot a timer: {:?} at {now:?}", self.promised);
        self.now = now;
        set_boringtuns_clock(now);
    }

    /// The machine slept: timers are late.
    pub(crate) const fn overslept(&mut self) {
        self.promised = None;
    }

    /// The worker drains what is queued before it processes anything; without work it does so when it hears of it.
    fn apply_updates(&mut self, until: Option<Now>, sink: &mut Sink) {
        while let Some((at, _)) = self.updates.front() {
            if until.is_some_and(|until| *at > until) {
                return;
            }
            let Some((_, update)) = self.updates.pop_front() else { return };
            if let Update::Path { peer, path, .. } = &update {
                self.sending.insert(*peer, *path);
            }
            self.inbound.apply(update.clone());
            self.outbound.apply(update, self.now, sink);
        }
    }

    fn collect(&mut self, sink: Sink, wants: &mut Vec<Want>) {
        // One look for each time that something is due, not one for each packet.
        let due = self.outbound.next_release().map(|at| at.max(self.now)).filter(|at| self.release != Some(*at));
        if let Some(at) = due {
            wants.push(Want::Worker(at));
        }
        self.release = due.or(self.release);
        for (to, bytes) in sink.datagrams {
            wants.push(match to {
                Destination::Udp { socket, remote } => Want::Udp { socket, remote, bytes, ttl: None },
                Destination::Relay { peer } => Want::Relay { peer, bytes },
            });
        }
        wants.extend(sink.kernel.into_iter().map(Want::ToKernel));
        for notice in sink.notices {
            if matches!(notice, Notice::Slow { .. } | Notice::Message { .. }) {
                if self.slow_waiting == SLOW_QUEUE {
                    self.drops.count(Drop::SlowQueueFull);
                    continue;
                }
                self.slow_waiting += 1;
            }
            // Order is kept within the channel.
            self.last_notice = self.last_notice.max(Now(self.now.0 + self.dice.below(THREAD_DELAY_US)));
            wants.push(Want::Notice(self.last_notice, notice));
        }
    }

    fn drain(&mut self, wants: &mut Vec<Want>) {
        let promised = self.planner.poll_timeout();
        let mut first = true;
        while let Some(output) = self.planner.poll_output() {
            if std::mem::take(&mut first) {
                assert!(
                    promised.is_some_and(|(at, _)| at <= self.now),
                    "output is queued but the planner wants to sleep until {promised:?}"
                );
            }
            match output {
                Output::Send { via: Via::Udp { socket, remote }, bytes } => {
                    wants.push(Want::Udp { socket, remote, bytes, ttl: None });
                }
                Output::Prime { via: Via::Udp { socket, remote }, bytes, ttl } => {
                    wants.push(Want::Udp { socket, remote, bytes, ttl: Some(ttl) });
                }
                Output::Prime { via: Via::Relay { .. }, .. } => panic!("nothing dies on the way through the relay"),
                Output::OpenSockets(sockets) => wants.push(Want::Open(sockets)),
                Output::CloseSockets(sockets) => wants.push(Want::Close(sockets)),
                Output::Tcp(order) => wants.push(Want::Tcp(order)),
                Output::Send { via: Via::Relay { peer }, bytes } => wants.push(Want::Relay { peer, bytes }),
                Output::Update(update) => {
                    self.last_update = self.last_update.max(Now(self.now.0 + self.dice.below(THREAD_DELAY_US)));
                    self.updates.push_back((self.last_update, update));
                    wants.push(Want::Worker(self.last_update));
                }
                Output::InterfaceMtu(mtu) => {
                    assert!(mtu > self.interface_mtu, "the interface's MTU only grows");
                    self.interface_mtu = mtu;
                }
                Output::Control(message) => wants.push(Want::Control(message)),
                Output::Persist(records) => self.persisted.extend(records),
                Output::KeepAdvert { of, advert: Some(advert) } => drop(self.adverts.insert(of, advert)),
                Output::KeepAdvert { of, advert: None } => drop(self.adverts.remove(&of)),
                // No node of the simulator leads to a subnet.
                Output::Routes(_) => {}
                Output::ResolveStun(servers) => wants.push(Want::ResolveStun(servers)),
                Output::Event(event) => {
                    if let io::Event::PathChanged { key, path, .. } = &event {
                        self.paths.insert(*key, *path);
                    }
                    self.events.push((self.now, event));
                }
            }
        }
        self.promised = self.planner.poll_timeout().map(|(at, _)| at.max(self.now));
    }

    /// How often something was dropped for this reason.
    pub(crate) fn dropped(&self, why: Drop) -> u64 {
        self.drops.get(why)
    }
}

/// boringtun reads a clock of its own, one a thread.
fn set_boringtuns_clock(now: Now) {
    mock_instant::MockClock::set_time(std::time::Duration::from_micros(now.0));
}

/// What the packet machines write into.
#[derive(Default)]
struct Sink {
    room: Vec<u8>,
    to: Option<Destination>,
    datagrams: Vec<(Destination, Vec<u8>)>,
    kernel: Vec<Vec<u8>>,
    notices: Vec<Notice>,
    established: Vec<PeerId>,
}

/// Room is handed out with this in it, so that nobody relies on zeros.
const DIRT: u8 = 0xd5;

impl OutboundSink for Sink {
    fn room(&mut self, to: &Destination, _: u8, max: usize) -> Option<&mut [u8]> {
        self.to = Some(*to);
        self.room = vec![DIRT; max];
        Some(&mut self.room)
    }

    fn commit(&mut self, len: usize) {
        let to = self.to.take().expect("committed without room");
        self.datagrams.push((to, self.room[..len].to_vec()));
    }

    fn to_tun(&mut self, packet: &[u8]) {
        self.kernel.push(packet.to_vec());
    }

    fn notice(&mut self, notice: Notice) {
        self.notices.push(notice);
    }
}

impl InboundSink for Sink {
    fn tun_room(&mut self, max: usize) -> &mut [u8] {
        self.room = vec![DIRT; max];
        &mut self.room
    }

    fn tun_commit(&mut self, len: usize) {
        self.kernel.push(self.room[..len].to_vec());
    }

    fn reply(&mut self, via: &Via, bytes: &[u8]) {
        let to = match via {
            Via::Udp { socket, remote } => Destination::Udp { socket: *socket, remote: *remote },
            Via::Relay { peer } => Destination::Relay { peer: *peer },
        };
        self.datagrams.push((to, bytes.to_vec()));
    }

    fn notice(&mut self, notice: Notice) {
        self.notices.push(notice);
    }

    fn established(&mut self, peer: PeerId) {
        self.established.push(peer);
    }
}

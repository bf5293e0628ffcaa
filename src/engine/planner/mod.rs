//! The planner decides everything that is not a data packet: who is a peer, which sessions and paths exist, what is said
//! to the coordinator. A pure machine: `handle`, `handle_timeout`, then drain `poll_output`, then re-read `poll_timeout`.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | the contract: inputs, outputs, deadlines |
//! | `anchors.rs` | without the coordinator: which peers are kept so that others are found through them |
//! | `carry.rs` | peers that relay for others, and which of them carries |
//! | `control.rs` | the coordinator's messages; records through the ledger; health of that relation |
//! | `messages.rs` | messages of peers inside their sessions |
//! | `exchange.rs` | peers compare what they hold, and send what the other lacks |
//! | `withheld.rs` | what peers know and the coordinator does not show |
//! | `pass.rs` | calls and answers through a third node |
//! | `sessions.rs` | handshakes, timers of WireGuard sessions, when a peer counts as in use |
//! | `paths.rs` | candidates, rounds, probes; carries out what path agents decide |
//! | `fresh.rs` | rounds from a fresh port |
//! | `memory.rs` | what joined two networks before |
//! | `heavy.rs` | punches with many sockets or ports |
//! | `limits.rs` | politeness: how much may be sent into the unknown |
//! | `tcp.rs` | direct connections by TCP |
//! | `stun.rs` | the node's own addresses and its NAT |
//! | `pings.rs` | `meshd ping` |
//! | `routes.rs` | advertisements, and which node leads to which prefix |
//! | `aliases.rs` | other numbers for prefixes, and by which address this node reaches what is behind others |
//! | `names.rs` | the zone of names, and what an admin says of names |
//! | `status.rs` | the status document |
//! | `why.rs` | `meshd why`: what is known of a peer's path, from both ends |

mod aliases;
mod anchors;
pub(crate) mod carry;
mod control;
pub(crate) mod exchange;
mod fresh;
mod heavy;
mod limits;
mod memory;
pub(crate) mod messages;
mod names;
mod pass;
mod paths;
mod pings;
mod routes;
mod sessions;
mod status;
mod stun;
mod tcp;
mod why;
mod withheld;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustc_hash::FxBuildHasher;

use crate::engine::drops::{Drop, Drops};
use crate::engine::inbound::{Inbound, InboundConfig};
use crate::engine::io::{
    Command, Input, LocalAddress, Notice, Output, PeerId, PortMapping, RouteWish, SocketId, Update, Via,
};
use crate::engine::outbound::Outbound;
use crate::engine::path::mtu::BASE;
use crate::engine::path::reason::NatView;
use crate::engine::path::reflexive::Reflexive;
use crate::engine::path::tcp::Tcp;
use crate::engine::peer::Peer;
use crate::engine::session::table::IndexAllocator;
use crate::engine::timers::Timers;
use crate::time::Now;
use crate::trust::advert::SignedAdvert;
use crate::trust::keys::NodeKeys;
use crate::trust::ledger::{Judge, Ledger};
use crate::trust::record::{Member, SignedRecord};
use crate::wire::classify::{Kind, classify};
use crate::wire::keys::{IdentityKey, NetworkId, WgKey};
use crate::wire::local::Netcheck;
use crate::wire::nat::{Mapper, UdpLifetime};
use crate::wire::peer::name_of;
use crate::wire::probe::ProbeKeys;

pub use limits::{Limits, MOST_SOCKETS};
pub use memory::{REMEMBERED, Worked};
pub use status::ShellStatus;

/// What a planner needs from the start.
#[derive(Debug)]
pub struct Config {
    /// The node's secret keys.
    pub keys: NodeKeys,
    /// The network id from the node's own token.
    pub network: NetworkId,
    /// The records the node has accepted before, in order. They are judged again.
    pub records: Vec<SignedRecord>,
    /// The IPv4 socket's port, if there is one.
    pub port_v4: Option<u16>,
    /// The IPv6 socket's port, if there is one.
    pub port_v6: Option<u16>,
    /// Where peers were last reached directly.
    pub last_endpoints: Vec<(WgKey, SocketAddr)>,
    /// What joined networks in earlier runs ([`Planner::worked`]).
    pub worked: Vec<Worked>,
    /// Everything random in the planner comes from this.
    pub seed: [u8; 32],
    /// Greater than any number sent in a sealed message before; the wall clock in microseconds does.
    pub first_number: u64,
    /// The newest advertisements the node has heard, its own among them. They are judged again.
    pub adverts: Vec<SignedAdvert>,
    /// What the node is set up to do with routes.
    pub routes: RouteWish,
    /// What the shell can do for hard punches, and how far they may go.
    pub limits: Limits,
}

/// Why a planner cannot start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The stored records do not make this node a member.
    #[error("the stored records do not show this node as a member of its network")]
    NotAMember,
    /// The node was revoked.
    #[error("this node was removed from its network")]
    Revoked,
}

/// The names of the planner's deadlines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// Output is queued: drain it.
    Output,
    /// A WireGuard session's timer.
    Session(PeerId),
    /// A path agent's deadline.
    Path(PeerId),
    /// The peer may be out of use.
    Idle(PeerId),
    /// STUN requests to repeat.
    Stun,
    /// STUN answers are about to go stale while they are needed.
    StunFresh,
    /// Rounds that waited for STUN long enough.
    AwaitingStun,
    /// A punch with many sockets or ports.
    Heavy,
    /// A fresh port for a round.
    Fresh,
    /// The TCP port or a connection.
    Tcp,
    /// A ping counts as lost.
    Ping(u64),
    /// A request to the coordinator was not answered.
    Control,
    /// The own advertisement is to be sent again.
    Advertise,
    /// A router that the coordinator misses may have fallen silent.
    Routers,
    /// A peer is to be told what this node holds.
    Compare(PeerId),
    /// Without the coordinator: peers to look for at their last addresses.
    Anchors,
    /// The ways to a relayed peer are to be measured.
    Carry(PeerId),
    /// The coordinator is to be given what peers know and it does not show.
    Withheld,
}

/// See the module.
#[derive(Debug)]
pub struct Planner {
    keys: NodeKeys,
    me: Member,
    ledger: Ledger,
    mesh: Vec<IpNet>,
    drops: Arc<Drops>,
    rng: StdRng,
    tx_prefix: [u8; 4],
    port_v4: Option<u16>,
    port_v6: Option<u16>,
    last_endpoints: BTreeMap<WgKey, SocketAddr>,

    /// By [`PeerId`]; a removed peer leaves a hole.
    peers: Vec<Option<Peer>>,
    by_identity: BTreeMap<IdentityKey, PeerId>,
    by_wg: HashMap<WgKey, PeerId, FxBuildHasher>,
    by_index: HashMap<u32, PeerId, FxBuildHasher>,
    by_name: HashMap<[u8; 8], PeerId, FxBuildHasher>,
    /// By the first bytes of the WireGuard key, as messages of peers name nodes.
    by_short: HashMap<[u8; 8], PeerId, FxBuildHasher>,
    indices: IndexAllocator,

    addresses: Vec<LocalAddress>,
    reflexive: Reflexive,
    report: Option<Box<Netcheck>>,
    nat: NatView,
    /// How long the NAT keeps an idle mapping, if somebody wanted to know.
    lifetime: Option<UdpLifetime>,
    /// Peers whose call or answer waits for fresh reflexive addresses, and until when.
    awaiting_stun: BTreeMap<PeerId, Now>,
    next_number: u64,

    politeness: limits::Politeness,
    heavy: Option<heavy::HeavyPunch>,
    fresh: Option<fresh::FreshPort>,
    memory: memory::Memory,
    /// Sockets besides the two main ones, asked for or open, and for whom.
    extra: BTreeMap<SocketId, PeerId>,
    next_socket: u16,
    tcp: Tcp,
    /// Peers whose call or answer waits for the TCP port.
    awaiting_tcp: BTreeSet<PeerId>,
    port_mapping: Option<PortMapping>,
    /// Whether the router maps ports when asked.
    mapper: Mapper,

    /// The size of packets the network interface takes.
    interface_mtu: u16,

    control: control::Control,
    withheld: withheld::Withheld,
    set_digest: exchange::SetDigest,
    anchors: anchors::Anchors,
    /// What answers something that was passed on goes back through who passed it.
    reply_through: Option<(PeerId, PeerId)>,
    /// Where peers see this node, when no STUN server tells.
    observed: Vec<stun::Observed>,
    routes: routes::RouteBook,
    relay_up: bool,
    relay_down_since: Option<Now>,
    pings: pings::Pings,

    timers: Timers<Why>,
    outputs: VecDeque<Output>,
    now: Now,
    expelled: bool,
}

/// Everything in `records` that the chain supports.
#[must_use]
pub fn judge(network: NetworkId, records: &[SignedRecord], drops: &Drops) -> Ledger {
    let mut ledger = Ledger::new(network);
    for record in records {
        // A record this version cannot accept was accepted by another one; it stays on disk and counts for nothing here.
        if ledger.admit(record, Judge::Reader).is_err() {
            drops.count(Drop::RefusedRecord);
        }
    }
    ledger
}

impl Planner {
    /// Judges the stored records and queues what the data workers must know.
    ///
    /// # Errors
    /// [`StartError`] if the records do not make this node a live member.
    pub fn new(config: Config, drops: Arc<Drops>, now: Now) -> Result<Self, StartError> {
        let ledger = judge(config.network, &config.records, &drops);
        Self::with_ledger(config, ledger, drops, now)
    }

    /// The same with records that were judged already, by [`judge`]; those of `config` are not looked at.
    ///
    /// # Errors
    /// [`StartError`] if the records do not make this node a live member.
    pub fn with_ledger(config: Config, ledger: Ledger, drops: Arc<Drops>, now: Now) -> Result<Self, StartError> {
        let identity = config.keys.identity_key();
        if ledger.is_revoked(&identity) {
            return Err(StartError::Revoked);
        }
        let me = ledger.member(&identity).ok_or(StartError::NotAMember)?.clone();
        let mesh =
            ledger.genesis().map(|g| vec![IpNet::V4(g.ipv4), IpNet::V6(g.ipv6)]).ok_or(StartError::NotAMember)?;
        let mut rng = StdRng::from_seed(config.seed);
        let mut tx_prefix = [0; 4];
        rng.fill_bytes(&mut tx_prefix);
        let mut planner = Self {
            indices: IndexAllocator::default(),
            keys: config.keys,
            me,
            ledger,
            mesh,
            drops,
            rng,
            tx_prefix,
            port_v4: config.port_v4,
            port_v6: config.port_v6,
            last_endpoints: config.last_endpoints.into_iter().collect(),
            peers: Vec::new(),
            by_identity: BTreeMap::new(),
            by_wg: HashMap::default(),
            by_index: HashMap::default(),
            by_name: HashMap::default(),
            by_short: HashMap::default(),
            addresses: Vec::new(),
            reflexive: Reflexive::new(),
            report: None,
            nat: NatView::default(),
            lifetime: None,
            awaiting_stun: BTreeMap::new(),
            next_number: config.first_number,
            politeness: limits::Politeness::new(config.limits, now),
            heavy: None,
            fresh: None,
            memory: memory::Memory::restored(config.worked),
            extra: BTreeMap::new(),
            next_socket: SocketId::V6.0,
            tcp: Tcp::new(now),
            awaiting_tcp: BTreeSet::new(),
            port_mapping: None,
            mapper: Mapper::Unknown,
            interface_mtu: BASE,
            control: control::Control::new(now),
            withheld: withheld::Withheld::default(),
            set_digest: None,
            anchors: anchors::Anchors::default(),
            reply_through: None,
            observed: Vec::new(),
            routes: routes::RouteBook::new(config.routes),
            relay_up: false,
            relay_down_since: Some(now),
            pings: pings::Pings::default(),
            timers: Timers::new(),
            outputs: VecDeque::new(),
            now,
            expelled: false,
        };
        let others: Vec<(IdentityKey, WgKey)> =
            planner.ledger.members().filter(|m| m.identity != identity).map(|m| (m.identity, m.wg)).collect();
        for (identity, wg) in others {
            planner.add_peer(identity, wg);
        }
        planner.remember_adverts(config.adverts);
        planner.look_for_anchors();
        Ok(planner)
    }

    /// A fresh pair of packet machines for one data worker. It must be given every [`Update`] from then on, the queued
    /// ones included.
    #[must_use]
    pub fn worker(&self) -> (Outbound, Inbound) {
        let own = vec![IpAddr::V4(self.me.ipv4), IpAddr::V6(self.me.ipv6)];
        let config = InboundConfig { key: self.me.wg, own, tx_prefix: self.tx_prefix };
        let (mut outbound, mut inbound) =
            (Outbound::new(Arc::clone(&self.drops)), Inbound::new(&config, Arc::clone(&self.drops)));
        outbound.reserve(&self.mesh);
        inbound.reserve(&self.mesh);
        (outbound, inbound)
    }

    /// This node's own Member record.
    #[must_use]
    pub const fn me(&self) -> &Member {
        &self.me
    }

    /// The records accepted so far.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The node's secret keys, for signing as an admin.
    #[must_use]
    pub const fn keys(&self) -> &NodeKeys {
        &self.keys
    }

    /// True once a valid Revoke of this node was seen. Nothing more is sent.
    #[must_use]
    pub const fn is_expelled(&self) -> bool {
        self.expelled
    }

    /// Something happened.
    pub fn handle(&mut self, input: Input, now: Now) {
        self.now = self.now.max(now);
        match input {
            Input::Notice(notice) => self.handle_notice(notice),
            Input::Control(message) => self.handle_control(message),
            Input::ControlUp => self.control_up(),
            Input::ControlDown { problem } => self.control_down(problem),
            Input::RelayUp => self.relay_changed(true),
            Input::RelayDown => self.relay_changed(false),
            Input::RelayGone(key) => {
                let now = self.now;
                if let Some(peer) = self.by_wg.get(&key).copied().and_then(|id| self.peer_mut(id)) {
                    peer.is_online(false, now);
                }
            }
            Input::Addresses(addresses) => self.addresses_changed(addresses),
            Input::NetworkChanged => {
                tracing::info!("this machine's ways out changed; checking every path");
                self.network_changed();
            }
            Input::StunServers(servers) => self.stun_servers_changed(&servers),
            Input::NetReport(report) => self.net_report(report),
            Input::UdpLifetime(lifetime) => self.lifetime_found(lifetime),
            Input::SocketsOpened(sockets) => self.sockets_opened(&sockets),
            Input::TcpReady { port, seen } => self.tcp_ready(port, seen),
            Input::TcpOpened { socket, remote } => self.stream_opened(socket, remote),
            Input::PortMapped(mapping) => self.port_mapped(mapping),
            Input::SendFailed(via) => self.send_failed(&via),
            Input::Routes(wish) => self.route_wish(wish),
            Input::Cut(prefixes) => self.found_cut(prefixes),
            Input::AnswersAt(lan) => self.answers_at(lan),
            Input::Command(Command::Ping { token, seq, peer, timeout_ms }) => self.ping(token, seq, peer, timeout_ms),
            Input::Command(Command::Publish { token, records }) => self.publish(token, records),
        }
    }

    /// A deadline passed. May be called early, twice, or hours late: what is due is done once.
    pub fn handle_timeout(&mut self, now: Now) {
        self.now = self.now.max(now);
        // What is set anew in this turn is looked at in the next, so that no deadline can keep the loop here.
        let mut due = Vec::new();
        while let Some(timer) = self.timers.pop_due(self.now) {
            due.push(timer);
        }
        if due.iter().any(|(at, _)| self.now.since(*at) > SUSPENDED) {
            tracing::info!("time jumped: the machine was suspended; checking every path");
            self.network_changed();
        }
        for (_, why) in due {
            match why {
                Why::Output => {}
                Why::Session(peer) => self.session_due(peer),
                Why::Path(peer) => self.path_due(peer),
                Why::Idle(peer) => self.idle_due(peer),
                Why::Stun => self.stun_due(),
                Why::StunFresh => self.stun_stale(),
                Why::AwaitingStun => self.stop_awaiting_stun(false),
                Why::Heavy => self.heavy_due(),
                Why::Fresh => self.fresh_due(),
                Why::Tcp => self.tcp_due(),
                Why::Ping(token) => self.ping_lost(token),
                Why::Control => self.control_due(),
                Why::Advertise => self.advertise(),
                Why::Routers => self.routes_changed(),
                Why::Compare(peer) => self.compare_due(peer),
                Why::Anchors => self.anchors_due(),
                Why::Withheld => self.withheld_due(),
                Why::Carry(peer) => self.carry_due(peer),
            }
        }
    }

    /// The next thing to do; drain until None after every `handle` and `handle_timeout`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When `handle_timeout` must be called at the latest, and why.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Now, Why)> {
        if self.outputs.is_empty() { self.timers.first() } else { Some((self.now, Why::Output)) }
    }

    fn handle_notice(&mut self, notice: Notice) {
        match notice {
            Notice::NeedSession(peer) => self.need_session(peer),
            Notice::Active(peer) => self.became_active(peer),
            Notice::Slow { via, bytes } => self.handle_slow(&via, &bytes),
            Notice::NoWay { from, to } => self.cannot_pass(from, to),
            Notice::Message { peer, bytes } => self.handle_message(peer, &bytes),
            Notice::Roamed { peer, via } => self.roamed(peer, &via),
            Notice::Confirmed(peer) => self.session_confirmed(peer),
            Notice::UnknownIndex(key) => self.lost_session(&key),
            Notice::TooLong { via, len } => self.too_long(&via, len),
            Notice::StreamClosed(socket) => self.stream_closed(socket),
        }
    }

    fn handle_slow(&mut self, via: &Via, bytes: &[u8]) {
        match classify(bytes) {
            Kind::HandshakeInit => self.handshake_init(via, bytes),
            Kind::HandshakeResponse | Kind::CookieReply => self.handshake_answer(via, bytes),
            Kind::Stun => self.handle_stun(via, bytes),
            Kind::Sealed => self.handle_sealed(via, bytes),
            Kind::Data | Kind::RelayDatagram | Kind::Junk => self.drops.count(Drop::Junk),
        }
    }

    fn relay_changed(&mut self, up: bool) {
        let changed = std::mem::replace(&mut self.relay_up, up) != up;
        self.relay_down_since = if up { None } else { self.relay_down_since.or(Some(self.now)) };
        self.reselect_relay();
        if changed {
            self.look_for_anchors();
        }
        if up {
            // Handshakes that found no way out need not wait for their next repetition.
            let waiting: Vec<PeerId> =
                self.talking().filter(|(_, t)| t.handshake.is_some()).map(|(id, _)| id).collect();
            for id in waiting {
                self.repeat_handshake(id);
            }
            let talking: Vec<PeerId> =
                self.talking().filter(|(_, t)| t.is_wanted(self.now)).map(|(id, _)| id).collect();
            for id in talking {
                self.with_agent(id, |agent, _, cx| agent.relay_came(cx));
            }
        }
    }

    // ---- peers ---------------------------------------------------------------------------------------------------

    fn add_peer(&mut self, identity: IdentityKey, wg: WgKey) {
        let Ok(number) = u32::try_from(self.peers.len()) else { return };
        let id = PeerId(number);
        let peer = Peer::new(id, identity, wg);
        let owns = self.prefixes_of(&identity);
        self.by_identity.insert(identity, id);
        self.by_wg.insert(wg, id);
        self.by_short.insert(name_of(&wg), id);
        let traffic = Arc::clone(&peer.traffic);
        self.update(Update::Peer { peer: id, key: wg, admits: owns.clone(), owns, keeps: Vec::new(), traffic });
        self.peers.push(Some(peer));
    }

    fn remove_peer(&mut self, identity: &IdentityKey) {
        let Some(id) = self.by_identity.remove(identity) else { return };
        if self.heavy.as_ref().is_some_and(|h| h.peer == id) {
            self.stop_heavy();
        }
        let Some(peer) = self.peers.get_mut(id.0 as usize).and_then(Option::take) else { return };
        self.release_sockets(id);
        self.forget_streams(id);
        self.by_wg.remove(&peer.wg);
        self.by_short.remove(&name_of(&peer.wg));
        self.awaiting_stun.remove(&id);
        if let Some(talk) = &peer.talk {
            self.by_name.remove(&talk.keys.inbound_name());
            if talk.tunnel.is_some() {
                self.by_index.remove(&talk.index);
                self.indices.free(talk.index);
            }
        }
        for why in [Why::Session(id), Why::Path(id), Why::Idle(id), Why::Compare(id), Why::Carry(id)] {
            self.timers.set(why, None);
        }
        self.stop_carrying(id);
        self.update(Update::Gone(id));
        self.router_gone(identity, id);
    }

    /// The prefixes whose packets belong to this member: its own two addresses.
    fn prefixes_of(&self, identity: &IdentityKey) -> Vec<IpNet> {
        self.ledger
            .member(identity)
            .map(|m| vec![IpNet::from(IpAddr::V4(m.ipv4)), IpNet::from(IpAddr::V6(m.ipv6))])
            .unwrap_or_default()
    }

    fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.get(id.0 as usize).and_then(Option::as_ref)
    }

    fn peer_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(id.0 as usize).and_then(Option::as_mut)
    }

    fn name_of(&self, id: PeerId) -> String {
        let member = self.peer(id).and_then(|p| self.ledger.member(&p.identity));
        member.map_or_else(|| format!("peer {}", id.0), |m| m.name.clone())
    }

    /// Peers that were talked to, in the order of their ids.
    fn talking(&self) -> impl Iterator<Item = (PeerId, &crate::engine::peer::Talk)> {
        self.peers.iter().flatten().filter_map(|p| p.talk.as_deref().map(|t| (p.id, t)))
    }

    fn probe_keys(&self, wg: &WgKey) -> Option<ProbeKeys> {
        ProbeKeys::derive(&self.keys.wg, &self.me.wg, wg)
    }

    // ---- outputs -------------------------------------------------------------------------------------------------

    fn update(&mut self, update: Update) {
        self.outputs.push_back(Output::Update(update));
    }

    fn send(&mut self, via: Via, bytes: Vec<u8>) {
        if self.expelled {
            return;
        }
        let through = if let Via::Relay { peer } = &via { self.by_wg.get(peer).copied() } else { None };
        if !through.is_some_and(|id| self.send_through(id, &bytes)) {
            self.outputs.push_back(Output::Send { via, bytes });
        }
    }
}

/// A deadline missed by more than this means that the machine slept.
const SUSPENDED: std::time::Duration = std::time::Duration::from_secs(10);

//! Messages between the command line and the daemon, and the `--json` documents people's scripts read.
//!
//! One connection carries one call. The client writes one line of JSON, a [`Request`]; the daemon writes [`Response`]
//! lines, the last of which is `done` or `error`. A line is at most [`MAX_LINE`] bytes. Fields may be added to the
//! documents, never renamed or removed: they are schema 1.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::wire::nat::{Mapper, PortModel, Seen, UdpLifetime};

/// The longest line either side reads, in bytes.
pub const MAX_LINE: usize = 64 << 20;
/// The longest request line, in bytes.
pub const MAX_REQUEST: usize = 256 << 10;
/// The most words on names in one call.
pub const MAX_DNS_WORDS: usize = 128;

/// One call.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// [`crate::wire::version::LOCAL`] of the caller.
    pub v: u16,
    /// What is asked.
    #[serde(flatten)]
    pub call: Call,
}

/// What can be asked of a running daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum Call {
    /// Answered by one `status`.
    Status,
    /// Answered by `done` once the interface is gone and the daemon is about to exit.
    Down,
    /// Answered by one `pong` a ping, then `done`.
    Ping {
        /// Name, mesh IP, or id prefix.
        peer: String,
        /// How many; at least 1.
        count: u32,
        /// Milliseconds to wait for each answer.
        timeout_ms: u64,
        /// Milliseconds between pings.
        interval_ms: u64,
        /// Go on (up to `timeout_ms` in all) until the path is direct.
        until_direct: bool,
    },
    /// Answered by one `why`, after an attempt at a path that is under way has ended.
    Why {
        /// Name, mesh IP, or id prefix.
        peer: String,
    },
    /// Answered by one `netcheck`.
    Netcheck {
        /// Ask these STUN servers (`HOST` or `HOST:PORT`) rather than the coordinator's.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        stun: Vec<String>,
        /// Also find out how long an idle UDP mapping is kept: takes up to [`crate::engine::lifetime::LIMIT`].
        #[serde(default)]
        lifetime: bool,
    },
    /// Answered by one `token`. Only on an admin node.
    Invite {
        /// The name the node must take.
        name: Option<String>,
        /// How many nodes may use it.
        uses: u32,
        /// Seconds until it expires.
        expires_s: u64,
        /// The joining node becomes an admin.
        admin: bool,
        /// Prefixes the node may announce.
        routes: Vec<IpNet>,
    },
    /// Answered by one `removed`. Only on an admin node.
    Remove {
        /// Name, mesh IP, or id prefix.
        peer: String,
    },
    /// Answered by one `drops`.
    Drops,
    /// Answered by one `counters`.
    Counters,
    /// Changes what the node is set up to do; answered by one `settings`.
    Set {
        /// What to change; nothing: only say how it is.
        change: SettingsChange,
        /// Go back after so many seconds, unless confirmed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        confirm_s: Option<u64>,
    },
    /// A change that would be taken back stays; answered by one `settings`.
    Confirm,
    /// Has others asked for what this node leads to, or ends that; answered by one `drained`.
    Drain {
        /// Begin.
        on: bool,
    },
    /// Answered by one `routes`.
    Routes,
    /// An admin's word on a node and a prefix; answered by one `route-changed`. Only on an admin node.
    RouteWord {
        /// Name, mesh IP, or id prefix.
        peer: String,
        /// Host bits zero.
        prefix: IpNet,
        /// True: it may lead there. False: not any more.
        allow: bool,
    },
    /// Other numbers for a prefix behind a node; answered by one `alias-changed`. Only on an admin node.
    RouteAlias {
        /// Name, mesh IP, or id prefix.
        peer: String,
        /// Host bits zero.
        prefix: IpNet,
        /// Which.
        alias: AliasWish,
    },
    /// Answered by one `dns`.
    Dns,
    /// An admin's words on names and domains; answered by one `dns-changed`. Only on an admin node.
    DnsWords {
        /// At most [`MAX_DNS_WORDS`]. All or none is done.
        words: Vec<DnsWord>,
        /// The node behind which the addresses are: name, mesh IP, or id prefix.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<String>,
        /// Also addresses that nobody leads to.
        #[serde(default)]
        anyway: bool,
    },
}

/// Which other numbers a prefix is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AliasWish {
    /// Those it has, or some that are free.
    Auto,
    /// None any more.
    None,
    /// These, host bits zero.
    Block(IpNet),
}

/// What an admin says of a name or a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsWord {
    /// Which of both.
    pub kind: DnsKind,
    /// A full name; of kind `name` also one label.
    pub name: String,
    /// Addresses, or servers; none: it has none any more.
    pub addresses: Vec<IpAddr>,
}

/// What an admin can say something of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DnsKind {
    /// A name that has addresses.
    Name,
    /// A domain that has servers.
    Split,
}

/// One line of an answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", content = "body", rename_all = "kebab-case")]
pub enum Response {
    /// The status document.
    Status(Box<Status>),
    /// One answered or lost ping.
    Pong(Pong),
    /// Why a peer is reached the way it is.
    Why(Box<PeerWhy>),
    /// The netcheck document.
    Netcheck(Box<Netcheck>),
    /// A new invite.
    Token(TokenReply),
    /// A node was revoked.
    Removed(Removed),
    /// Drop counters.
    Drops(DropCounts),
    /// What the packet path did.
    Counters(CounterValues),
    /// What the node is set up to do.
    Settings(SettingsDocument),
    /// The routes document.
    Routes(RouteList),
    /// An admin's word was stored, or was so already.
    RouteChanged(RouteChange),
    /// An admin's word was stored, or was so already.
    AliasChanged(AliasChange),
    /// The names document.
    Dns(DnsList),
    /// An admin's words were stored, or were so already.
    DnsChanged(DnsChanges),
    /// Others are asked for what this node leads to, or not any more.
    Drained(Drained),
    /// The call is complete.
    Done,
    /// The call failed; nothing changed.
    Error(Problem),
}

/// What went wrong, for a person: one sentence, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable word.
    pub code: String,
    /// What and why.
    pub text: String,
    /// What to do; may be empty.
    #[serde(default)]
    pub hint: String,
}

/// `meshd status --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// 1.
    pub schema: u16,
    /// `running`, `starting` or `stopping`.
    pub state: String,
    /// The network.
    pub network: StatusNetwork,
    /// This node.
    #[serde(rename = "self")]
    pub me: StatusSelf,
    /// The coordinator.
    pub coordinator: StatusCoordinator,
    /// What is known of the NAT in front of this node.
    pub nat: StatusNat,
    /// The other members, by name.
    pub peers: Vec<StatusPeer>,
    /// Unhealthy conditions; empty when all is well.
    pub health: Vec<Health>,
}

/// The network a node is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusNetwork {
    /// A DNS label.
    pub name: String,
    /// The root public key.
    pub id: String,
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusSelf {
    /// A DNS label.
    pub name: String,
    /// The short id.
    pub id: String,
    /// Mesh addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Prefixes this node announces.
    pub routes: Vec<IpNet>,
    /// Program version.
    pub version: String,
    /// May invite, approve and revoke.
    pub admin: bool,
    /// The interface's name.
    pub interface: String,
    /// The UDP port.
    pub port: u16,
}

/// The connection to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusCoordinator {
    /// As in the token.
    pub url: String,
    /// The control link is up.
    pub connected: bool,
    /// Seconds since anything came from it; null: never in this run.
    pub last_heard_s: Option<f64>,
    /// There is a relay.
    pub relay_connected: bool,
    /// What carries relayed packets now: `udp` or `websocket`; null: nothing.
    #[serde(default)]
    pub relay: Option<String>,
    /// The proxy on the way there, as a URL without credentials; null: none.
    #[serde(default)]
    pub proxy: Option<String>,
    /// Why there is no connection; null: there is one, or none was tried yet.
    #[serde(default)]
    pub problem: Option<Problem>,
}

/// What is known of the NAT.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatusNat {
    /// UDP reaches the STUN servers and comes back; null: not known yet.
    pub udp: Option<bool>,
    /// RFC 4787 section 4.1 name, or null.
    pub mapping: Option<String>,
    /// RFC 4787 section 5 name, or null.
    pub filtering: Option<String>,
    /// How the NAT chooses ports, as far as it was needed to know, or null.
    #[serde(default)]
    pub port_model: Option<PortModel>,
    /// The node's addresses as STUN servers see them.
    pub reflexive: Vec<SocketAddr>,
    /// Port mapping protocol in use, or null.
    pub port_mapping: Option<String>,
    /// Limits of punches, and how much of them is used.
    #[serde(default)]
    pub punching: Option<Punching>,
    /// How long the NAT keeps an idle UDP mapping, if `meshd netcheck --lifetime` found out since the network last changed.
    #[serde(default)]
    pub udp_lifetime: Option<UdpLifetime>,
}

/// How far punches may go, and how far they went.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Punching {
    /// Sockets open besides the main ones.
    pub sockets: u16,
    /// How many there may be; 0: punches that need several sockets are not made.
    pub sockets_max: u16,
    /// Probes sent since the start.
    pub probes: u64,
    /// How many there may be in a second.
    pub probes_per_second_max: u32,
    /// Addresses probed in the last minute; each costs an entry in the NAT's table.
    pub entries_last_minute: u32,
    /// How many there may be.
    pub entries_per_minute_max: u32,
    /// The peer that a punch with many sockets or ports is under way to; there is never more than one.
    pub heavy: Option<String>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusPeer {
    /// A DNS label.
    pub name: String,
    /// The short id.
    pub id: String,
    /// Mesh addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Prefixes behind it.
    pub routes: Vec<IpNet>,
    /// Connected to the coordinator, or heard from directly in the last seconds.
    pub online: bool,
    /// How packets reach it now.
    pub path: StatusPath,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Seconds since the last completed handshake.
    pub last_handshake_s: Option<u64>,
}

/// How packets reach a peer now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusPath {
    /// `direct`, `relay`, or `none`.
    pub kind: PathKind,
    /// Direct: the peer's address. Relay: the coordinator's URL.
    pub endpoint: Option<String>,
    /// Last measured round trip.
    pub rtt_ms: Option<f64>,
    /// Seconds since this path was chosen.
    pub since_s: Option<u64>,
    /// Relay: why not direct, in words.
    #[serde(default)]
    pub reason: Option<String>,
    /// Bytes of the longest packets that go this way whole.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Direct: by a TCP connection instead of UDP.
    #[serde(default)]
    pub tcp: Option<bool>,
}

/// The kinds of path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathKind {
    /// To the peer's own address, by UDP or in a TCP connection.
    Direct,
    /// Through a relay.
    Relay,
    /// Nothing sent lately.
    None,
}

/// An unhealthy condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// A stable word.
    pub code: String,
    /// How bad.
    pub severity: Severity,
    /// What is wrong.
    pub text: String,
    /// What to try.
    pub hint: String,
    /// Seconds since it began.
    pub since_s: u64,
}

/// How bad a condition is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something works worse than it could.
    Warning,
    /// Something does not work, or somebody misbehaves.
    Error,
}

/// One ping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    /// 1.
    pub schema: u16,
    /// Counts from 1.
    pub seq: u32,
    /// The peer's name.
    pub peer: String,
    /// The peer's mesh IPv4 address.
    pub address: IpAddr,
    /// An answer came.
    pub answered: bool,
    /// The path it took.
    pub path: PathKind,
    /// Direct: the peer's address. Relay: `coordinator`.
    pub endpoint: Option<String>,
    /// Direct: by a TCP connection instead of UDP.
    #[serde(default)]
    pub tcp: Option<bool>,
    /// Round trip in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// `meshd why PEER --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerWhy {
    /// 1.
    pub schema: u16,
    /// The peer's name.
    pub peer: String,
    /// Its short id.
    pub id: String,
    /// As in [`StatusPeer`].
    pub online: bool,
    /// How packets reach it now.
    pub path: StatusPath,
    /// A stable word for the first cause; `docs/operations.md` lists them.
    pub code: String,
    /// How packets go, and the first cause.
    pub text: String,
    /// The causes behind it, one a sentence.
    pub because: Vec<String>,
    /// What would help, each by itself.
    pub fix: Vec<String>,
    /// Direct: how that was found.
    #[serde(default)]
    pub found: Option<WhyFound>,
    /// Attempts at a direct path that failed in a row.
    pub failed: u32,
    /// Seconds until the next attempt, if one is set.
    pub next_attempt_s: Option<u64>,
    /// What this machine knows of its own network.
    pub here: WhySide,
    /// What the peer says of its; null: it has said nothing yet.
    pub there: Option<WhySide>,
}

/// How a direct path was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyFound {
    /// `same-network`, `open-address`, `punch`, `fresh-port` or `many-ports`.
    pub how: String,
    /// Attempts that had failed before.
    pub failed_before: u32,
    /// What it replaced: `relay`, or the address used before.
    pub replaced: Option<String>,
}

/// One end's network, as that end knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhySide {
    /// UDP passes; null: not known.
    pub udp: Option<bool>,
    /// As in [`Netcheck`].
    pub mapping: Option<String>,
    /// As in [`Netcheck`].
    pub filtering: Option<String>,
    /// As in [`Netcheck`].
    pub port_model: Option<PortModel>,
    /// Whether the router maps ports when asked: `found`, `absent` or `unknown`.
    pub port_mapping: Mapper,
    /// The UDP port to forward.
    pub port: Option<u16>,
    /// It has an IPv4 address to offer.
    pub ipv4: Option<bool>,
    /// It has an IPv6 address to offer.
    pub ipv6: Option<bool>,
    /// What this end saw of the last attempt, if that failed.
    pub last_attempt: Option<Seen>,
}

/// `meshd netcheck --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Netcheck {
    /// 1.
    pub schema: u16,
    /// UDP reaches a STUN server and comes back.
    pub udp: bool,
    /// Addresses as STUN servers see them.
    pub reflexive: Vec<SocketAddr>,
    /// RFC 4787 section 4.1: `endpoint-independent`, `address-dependent`, `address-and-port-dependent`, or null.
    pub mapping: Option<String>,
    /// RFC 4787 section 5, same words, or null.
    pub filtering: Option<String>,
    /// How the NAT chooses ports, as far as it was needed to know, or null.
    #[serde(default)]
    pub port_model: Option<PortModel>,
    /// Machines behind the NAT reach each other at its outside address (RFC 4787 section 6), or null.
    #[serde(default)]
    pub hairpin: Option<bool>,
    /// There is a second NAT behind the first; null: not known.
    #[serde(default)]
    pub double_nat: Option<bool>,
    /// NATs between this machine and the internet, as its routers answer; null: they do not, or there is no saying.
    #[serde(default)]
    pub nat_depth: Option<u8>,
    /// Port mapping protocol found, or null.
    pub port_mapping: Option<String>,
    /// IPv6 reaches a STUN server and comes back.
    pub ipv6: bool,
    /// Each STUN server asked.
    pub servers: Vec<NetcheckServer>,
    /// Round trip of the control link; null: not connected.
    pub coordinator_rtt_ms: Option<f64>,
    /// Round trip of the relay link; null: not connected.
    pub relay_rtt_ms: Option<f64>,
    /// One sentence on what that means.
    pub meaning: String,
    /// Limits of punches, and how much of them is used; null: not known to who examined.
    #[serde(default)]
    pub punching: Option<Punching>,
    /// What the router in front does for this node's port; null: not known to who examined.
    #[serde(default)]
    pub port_mapper: Option<PortMapper>,
    /// How long the NAT keeps an idle UDP mapping; null: nobody has found out since the network last changed.
    #[serde(default)]
    pub udp_lifetime: Option<UdpLifetime>,
}

/// What the router in front does for this node's port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PortMapper {
    /// Not switched off by `meshd up --no-port-mapping`.
    pub enabled: bool,
    /// The router asked, or null.
    pub gateway: Option<IpAddr>,
    /// The UDP port of this node.
    pub internal_port: u16,
    /// Who granted a mapping: `pcp`, `nat-pmp` or `upnp`; null: nobody.
    pub protocol: Option<String>,
    /// Where the outside reaches the port; behind a carrier's NAT, where the carrier's other customers do.
    pub external: Option<SocketAddr>,
    /// Seconds granted; null: no mapping, or one without an end.
    pub lifetime_s: Option<u64>,
    /// Seconds left of them.
    pub expires_s: Option<u64>,
    /// Each protocol.
    pub protocols: Vec<PortMapperProtocol>,
    /// Why there is no mapping, in words; null: there is one.
    pub reason: Option<String>,
}

/// What a router says by one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapperProtocol {
    /// `pcp`, `nat-pmp` or `upnp`.
    pub name: String,
    /// `granted`, `answers`, `refused`, `silent` or `not-asked`.
    pub state: String,
    /// Refused: why, in words.
    #[serde(default)]
    pub text: Option<String>,
}

/// One STUN server's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetcheckServer {
    /// Where.
    pub server: SocketAddr,
    /// Null: no answer.
    pub rtt_ms: Option<f64>,
    /// What it saw.
    pub reflexive: Option<SocketAddr>,
}

/// A new invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenReply {
    /// 1.
    pub schema: u16,
    /// The token, one line.
    pub token: String,
    /// The invite's public key.
    pub invite: String,
    /// How many nodes may use it.
    pub uses: u32,
    /// Unix seconds.
    pub expires: u64,
}

/// A node was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// 1.
    pub schema: u16,
    /// Its name.
    pub name: String,
    /// Its short id.
    pub id: String,
}

/// A change of what the node is set up to do. What is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsChange {
    /// The whole list of prefixes to advertise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise_routes: Option<Vec<IpNet>>,
    /// Offer to carry all traffic of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise_exit_node: Option<bool>,
    /// Use the routes of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_routes: Option<bool>,
    /// Have this machine's programs ask us for names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_dns: Option<bool>,
    /// What is forwarded for others leaves under this machine's own address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snat: Option<bool>,
    /// The node that all traffic goes through: name, mesh IP or id prefix; `none`: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_node: Option<String>,
    /// With an exit node, the networks this machine is in are still reached directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_node_allow_lan_access: Option<bool>,
    /// With an exit node, nothing leaves beside it, not even when the daemon was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kill_switch: Option<bool>,
    /// Relay for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<bool>,
    /// So many bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay_rate: Option<u64>,
    /// The program that hears of events: a whole path; `none`: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_event: Option<String>,
    /// Have others asked for what this node leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<bool>,
    /// The whole list of machines that show by their answers that this node reaches a network it leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<Vec<RouteProbe>>,
}

/// A machine that shows by its answers that a router reaches the network it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteProbe {
    /// The network.
    pub prefix: IpNet,
    /// The machine.
    pub target: IpAddr,
}

/// `meshd set --json`: what a node is set up to do, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsDocument {
    /// 1.
    pub schema: u16,
    /// Prefixes the node leads to, as far as an admin approves.
    pub advertise_routes: Vec<IpNet>,
    /// It offers to carry all traffic of others.
    pub advertise_exit_node: bool,
    /// It uses the routes of others.
    pub accept_routes: bool,
    /// Programs on its machine ask it for names.
    pub accept_dns: bool,
    /// What it forwards for others leaves under its own address.
    pub snat: bool,
    /// The name of the node that all traffic goes through, or null.
    pub exit_node: Option<String>,
    /// The networks the machine is in are reached directly all the same.
    pub exit_node_allow_lan_access: bool,
    /// Nothing leaves beside the exit node, not even when the daemon was killed.
    pub kill_switch: bool,
    /// It relays for others.
    #[serde(default)]
    pub relay: bool,
    /// At most so many bytes a second.
    #[serde(default)]
    pub relay_rate: u64,
    /// The program that hears of events, or null.
    #[serde(default)]
    pub on_event: Option<String>,
    /// It is drained: others are asked for what it leads to.
    #[serde(default)]
    pub drain: bool,
    /// Machines that show by their answers that it reaches what it leads to.
    #[serde(default)]
    pub probes: Vec<RouteProbe>,
    /// Seconds until the settings go back to what they were, unless `meshd set --confirm` comes before; null: they stay.
    pub reverts_in_s: Option<u64>,
    /// What there is to say about that, such as routes that wait for an admin.
    pub notes: Vec<String>,
}

/// `meshd routes --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteList {
    /// 1.
    pub schema: u16,
    /// One entry for each prefix of each node, by prefix.
    pub routes: Vec<RouteLine>,
}

/// A prefix that a node advertises, or may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteLine {
    /// Host bits zero; of length 0: an exit node.
    pub prefix: IpNet,
    /// The node's name.
    pub node: String,
    /// Its short id.
    pub id: String,
    /// What becomes of it on this node.
    pub state: RouteState,
    /// The name of the node that this node's packets for the prefix go through now; null: none does.
    pub via: Option<String>,
    /// Of a shadowed one: whether this machine is where the prefix is; null: that was not asked.
    #[serde(default)]
    pub place: Option<RoutePlace>,
    /// Why it is not active, or what is wrong with it.
    pub why: Option<String>,
    /// Other numbers under which the network is reached always.
    #[serde(default)]
    pub alias: Option<IpNet>,
}

/// Whether the network this machine is in is the one that a node leads to, or only has its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoutePlace {
    /// It is: it is reached directly.
    Home,
    /// It is another: the prefix is not reached by these addresses.
    Away,
    /// Nobody could be asked, or has answered yet.
    Unknown,
}

/// What becomes of a prefix of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouteState {
    /// Advertised, and no admin has approved it.
    Pending,
    /// An admin allows it, and this node's packets do not go that way now.
    Approved,
    /// This node's packets for the prefix go through that node; of this node itself: it leads there.
    Active,
    /// Something on this machine goes before it.
    Shadowed,
}

/// `meshd drain --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// 1.
    pub schema: u16,
    /// Others are asked for what this node leads to.
    pub draining: bool,
    /// It was so before; nothing changed.
    pub already: bool,
    /// What this node leads to.
    pub routes: Vec<DrainedRoute>,
}

/// A prefix of a node that is drained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainedRoute {
    /// The prefix.
    pub prefix: IpNet,
    /// The names of those who lead there too and can be asked now.
    pub others: Vec<String>,
}

/// An admin's word on a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteChange {
    /// 1.
    pub schema: u16,
    /// The prefix.
    pub prefix: IpNet,
    /// The node's name.
    pub node: String,
    /// Its short id.
    pub id: String,
    /// The node may lead there now.
    pub approved: bool,
    /// It was so before; nothing changed.
    pub already: bool,
    /// Something worth knowing, such as that the node does not advertise the prefix.
    pub note: Option<String>,
}

/// An admin's word on other numbers for a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AliasChange {
    /// 1.
    pub schema: u16,
    /// The prefix as it is behind the node.
    pub prefix: IpNet,
    /// The node's name.
    pub node: String,
    /// Its short id.
    pub id: String,
    /// Its other numbers; null: none any more.
    pub alias: Option<IpNet>,
    /// It was so before; nothing changed.
    pub already: bool,
    /// Something worth knowing.
    pub note: Option<String>,
}

/// `meshd dns list --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsList {
    /// 1.
    pub schema: u16,
    /// Names that an admin gave addresses, by name.
    pub names: Vec<DnsLine>,
    /// Domains that an admin gave servers, by name.
    pub splits: Vec<DnsLine>,
}

/// A name with its addresses, or a domain with its servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsLine {
    /// Which of both.
    pub kind: DnsKind,
    /// The full name.
    pub name: String,
    /// As the admin gave them.
    pub addresses: Vec<IpAddr>,
    /// The name of the node behind which they are, if the admin said.
    pub at: Option<String>,
    /// What this node answers, or whom it asks.
    pub here: Vec<IpAddr>,
    /// Why that is nothing, or another address.
    pub why: Option<String>,
}

/// Admin's words on names and domains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsChanges {
    /// 1.
    pub schema: u16,
    /// One for each word, in order.
    pub changes: Vec<DnsChange>,
}

/// One word on a name or a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsChange {
    /// Which of both.
    pub kind: DnsKind,
    /// The full name.
    pub name: String,
    /// What it has now; empty: nothing any more.
    pub addresses: Vec<IpAddr>,
    /// The name of the node behind which they are.
    pub at: Option<String>,
    /// It was so before; nothing changed.
    pub already: bool,
    /// It had others before.
    pub replaced: bool,
    /// Something worth knowing.
    pub note: Option<String>,
}

/// `meshd status --drops --json`, schema 1. (A list alone could not be told apart from other answers: an answer is an
/// object with a `reply` field.)
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropCounts {
    /// 1.
    pub schema: u16,
    /// Every reason, also those that never happened.
    pub drops: Vec<DropCount>,
}

impl FromIterator<DropCount> for DropCounts {
    fn from_iter<I: IntoIterator<Item = DropCount>>(counts: I) -> Self {
        Self { schema: 1, drops: counts.into_iter().collect() }
    }
}

/// `meshd status --counters --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterValues {
    /// 1.
    pub schema: u16,
    /// Every counter of the packet path.
    pub counters: Vec<CounterValue>,
}

/// One counter of the packet path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterValue {
    /// Its stable name.
    pub name: String,
    /// Since the daemon started.
    pub value: u64,
    /// What it counts.
    pub text: String,
}

/// One drop counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropCount {
    /// The reason's stable name.
    pub reason: String,
    /// Packets.
    pub packets: u64,
    /// What it means.
    pub text: String,
}

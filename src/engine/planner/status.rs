//! The status document, and finding a peer by what a person typed.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::engine::io::{Path, PeerId};
use crate::engine::path::mtu::BASE;
use crate::engine::path::reason::why_relayed;
use crate::engine::peer::Peer;
use crate::engine::planner::Planner;
use crate::time::Now;
use crate::trust::names;
use crate::trust::record::Member;
use crate::wire::local::{
    Health, PathKind, Problem, Punching, Severity, Status, StatusCoordinator, StatusNat, StatusNetwork, StatusPath,
    StatusPeer, StatusSelf,
};
use crate::wire::version::{LOCAL, PROGRAM};

/// Unanswered STUN for so long is a health condition.
const UDP_BLOCKED_AFTER: Duration = Duration::from_secs(3);
/// A link that is down for so long is one.
const LINK_DOWN_AFTER: Duration = Duration::from_secs(2);
/// Heard from directly this recently counts as online.
const HEARD_LATELY: Duration = Duration::from_secs(20);

/// What only the shell knows of a status.
#[derive(Debug, Clone)]
pub struct ShellStatus {
    /// `running`, `starting` or `stopping`.
    pub state: String,
    /// The coordinator's URL as in the token.
    pub coordinator_url: String,
    /// The TUN interface's name.
    pub interface: String,
    /// Conditions the shell noticed.
    pub health: Vec<Health>,
}

impl Planner {
    /// The status document as of `now`.
    #[must_use]
    pub fn status(&self, shell: ShellStatus, now: Now) -> Status {
        let url = shell.coordinator_url;
        let mut peers: Vec<StatusPeer> =
            self.peers.iter().flatten().filter_map(|peer| self.status_peer(peer, &url, now)).collect();
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        let mut health = self.health(&url, now);
        health.extend(shell.health);
        health.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.code.cmp(&b.code)));
        Status {
            schema: LOCAL,
            state: shell.state,
            network: StatusNetwork {
                name: self.ledger.genesis().map(|g| g.name.clone()).unwrap_or_default(),
                id: self.ledger.network().to_string(),
            },
            me: StatusSelf {
                name: self.me.name.clone(),
                id: self.me.identity.node_id().to_string(),
                addresses: addresses(&self.me),
                routes: self.routes_of(&self.me.identity),
                version: PROGRAM.to_owned(),
                admin: self.ledger.is_admin(&self.me.identity),
                interface: shell.interface,
                port: self.port_v4.or(self.port_v6).unwrap_or(0),
            },
            coordinator: StatusCoordinator {
                connected: self.control.connected && self.control.synced,
                last_heard_s: self.control.last_heard.map(|at| now.since(at).as_secs_f64()),
                relay_connected: self.relay_up,
                // The shell knows.
                relay: None,
                proxy: None,
                problem: None,
                url,
            },
            nat: StatusNat {
                udp: self.nat.udp,
                mapping: self.nat.mapping.clone(),
                filtering: self.nat.filtering.clone(),
                port_model: self.nat.ports,
                reflexive: self.reflexive.addresses(),
                port_mapping: self.port_mapping.as_ref().map(|m| m.protocol.clone()),
                punching: Some(self.punching(now)),
                udp_lifetime: self.lifetime,
            },
            peers,
            health,
        }
    }

    /// The member a person means, this node included, as [`Self::find_peer`] finds it.
    ///
    /// # Errors
    /// As [`Self::find_peer`].
    pub fn find_member(&self, wanted: &str) -> Result<&Member, Problem> {
        let typed = wanted.trim().to_lowercase();
        let mine = typed == self.me.name
            || typed.parse().is_ok_and(|ip| addresses(&self.me).contains(&ip))
            || (typed.len() >= 4 && self.me.identity.node_id().to_string().starts_with(&typed));
        if mine {
            return Ok(&self.me);
        }
        let gone = || Problem { code: "no-such-peer".into(), text: "that node is gone".into(), hint: String::new() };
        self.member_of(self.find_peer(wanted)?).ok_or_else(gone)
    }

    /// The peer a person means: a name, a mesh address, or the beginning of an id.
    ///
    /// # Errors
    /// A sentence with the nearest match, or with the candidates if several fit.
    pub fn find_peer(&self, wanted: &str) -> Result<PeerId, Problem> {
        let wanted = wanted.trim();
        let members = || self.ledger.members().filter(|m| m.identity != self.me.identity);
        let address: Option<IpAddr> = wanted.parse().ok();
        let exact =
            members().find(|m| m.name == wanted.to_lowercase() || address.is_some_and(|ip| addresses(m).contains(&ip)));
        let by_id = |prefix: &str| -> Vec<&Member> {
            members().filter(|m| m.identity.node_id().to_string().starts_with(prefix)).collect()
        };
        let found = match exact {
            Some(member) => vec![member],
            None if wanted.len() >= 4 => by_id(&wanted.to_lowercase()),
            None => Vec::new(),
        };
        let problem = |text: String, hint: String| Problem { code: "no-such-peer".into(), text, hint };
        let removed = || self.ledger.removed().find(|m| m.name == wanted.to_lowercase());
        match found.as_slice() {
            [member] => self
                .by_identity
                .get(&member.identity)
                .copied()
                .ok_or_else(|| problem(format!("{wanted:?} is not reachable"), "see `meshd status`".into())),
            [] if wanted == self.me.name || address.is_some_and(|ip| addresses(&self.me).contains(&ip)) => {
                Err(problem(format!("{wanted:?} is this machine"), "name another node; see `meshd status`".into()))
            }
            [] if removed().is_some() => Err(Problem {
                code: "removed".into(),
                text: format!("{wanted:?} was removed from this network: no node talks to it any more"),
                hint: "to let the machine in again, give it a new state directory and a new invite".into(),
            }),
            [] => {
                let names: Vec<&str> = members().map(|m| m.name.as_str()).collect();
                let hint = match names::nearest(wanted, names.iter().copied()) {
                    Some(near) => format!("did you mean {near:?}? `meshd status` lists all peers"),
                    None => "`meshd status` lists all peers by name, address and id".to_owned(),
                };
                Err(problem(format!("no node of this network is called {wanted:?} or has that address or id"), hint))
            }
            several => {
                let names: Vec<&str> = several.iter().map(|m| m.name.as_str()).collect();
                Err(problem(
                    format!("the id {wanted:?} fits {} nodes: {}", several.len(), names.join(", ")),
                    "give more digits, or the name".into(),
                ))
            }
        }
    }

    /// Limits of punches, and how much of them is used.
    #[must_use]
    pub fn punching(&self, now: Now) -> Punching {
        let limits = self.politeness.limits;
        Punching {
            sockets: u16::try_from(self.extra.len()).unwrap_or(u16::MAX),
            sockets_max: limits.extra_sockets,
            probes: self.politeness.probes,
            probes_per_second_max: limits.probes_per_second,
            entries_last_minute: u32::try_from(self.politeness.entries(now)).unwrap_or(u32::MAX),
            entries_per_minute_max: limits.entries_per_minute,
            heavy: self.heavy.as_ref().map(|h| self.name_of(h.peer)),
        }
    }

    /// The Member record of a peer.
    #[must_use]
    pub fn member_of(&self, id: PeerId) -> Option<&Member> {
        self.peer(id).and_then(|p| self.ledger.member(&p.identity))
    }

    /// Whether a peer is online: the coordinator says so, or it was heard itself since the coordinator said otherwise.
    pub(super) fn is_online(&self, peer: &Peer, now: Now) -> bool {
        let connected = self.control.connected;
        let stamps = peer.stamps();
        // A coordinator that is away says nothing: what was heard before counts too.
        let gone = peer.gone_since.filter(|_| connected);
        let heard = stamps.last_rx_direct.max(stamps.last_rx_relay).filter(|at| gone.is_none_or(|gone| *at > gone));
        (connected && peer.online) || heard.is_some_and(|at| now.since(at) < HEARD_LATELY)
    }

    fn status_peer(&self, peer: &Peer, coordinator: &str, now: Now) -> Option<StatusPeer> {
        let member = self.ledger.member(&peer.identity)?;
        let talk = peer.talk.as_deref();
        Some(StatusPeer {
            name: member.name.clone(),
            id: member.identity.node_id().to_string(),
            addresses: addresses(member),
            routes: self.routes_of(&peer.identity),
            online: self.is_online(peer, now),
            path: self.status_path(peer, &member.name, coordinator, now),
            rx_bytes: peer.traffic.rx_bytes.load(Ordering::Relaxed),
            tx_bytes: peer.traffic.tx_bytes.load(Ordering::Relaxed),
            last_handshake_s: talk
                .and_then(|t| t.tunnel.as_ref())
                .and_then(|t| t.lock().last_handshake_age(now))
                .map(|age| age.as_secs()),
        })
    }

    pub(super) fn status_path(&self, peer: &Peer, name: &str, coordinator: &str, now: Now) -> StatusPath {
        let none = StatusPath {
            kind: PathKind::None,
            endpoint: None,
            rtt_ms: None,
            since_s: None,
            reason: None,
            mtu: None,
            tcp: None,
        };
        let Some(talk) = peer.talk.as_deref().filter(|t| t.is_wanted(now)) else { return none };
        let since_s = Some(now.since(talk.path_since).as_secs());
        let ms = |rtt: Duration| rtt.as_secs_f64() * 1000.0;
        match talk.path {
            Path::Direct { remote, socket } | Path::Both { remote, socket } => StatusPath {
                kind: PathKind::Direct,
                endpoint: Some(remote.to_string()),
                rtt_ms: talk.agent.direct().map(|(_, _, rtt)| ms(rtt)),
                since_s,
                reason: None,
                mtu: talk.agent.mtu().map(|(size, _)| size),
                tcp: Some(socket.is_stream()),
            },
            Path::Relay | Path::None => StatusPath {
                kind: PathKind::Relay,
                endpoint: Some(self.relayed_by(peer.id).unwrap_or_else(|| coordinator.to_owned())),
                rtt_ms: talk.agent.relay_rtt.map(ms),
                since_s,
                reason: Some(why_relayed(&self.nat, &talk.agent.theirs, name, talk.agent.attempt())),
                mtu: (talk.path == Path::Relay).then_some(BASE),
                tcp: None,
            },
        }
    }

    fn health(&self, coordinator: &str, now: Now) -> Vec<Health> {
        let mut out = Vec::new();
        let mut add = |code: &str, severity, since: Now, text: String, hint: &str| {
            out.push(Health {
                code: code.to_owned(),
                severity,
                text,
                hint: hint.to_owned(),
                since_s: now.since(since).as_secs(),
            });
        };
        let control = &self.control;
        if let Some(since) = control.down_since.filter(|at| now.since(*at) >= LINK_DOWN_AFTER) {
            let why = control.problem.as_ref().map(|p| format!(": {}", p.text)).unwrap_or_default();
            let hint = control.problem.as_ref().map(|p| p.hint.as_str()).filter(|h| !h.is_empty());
            add(
                "coordinator-unreachable",
                Severity::Warning,
                since,
                format!("no connection to the coordinator {coordinator}{why}"),
                hint.unwrap_or("existing direct connections go on; meshd keeps trying"),
            );
        } else if let (true, Some(problem)) = (control.connected, &control.problem) {
            add(&problem.code, Severity::Error, now, problem.text.clone(), &problem.hint);
        }
        if let Some(since) = self.relay_down_since.filter(|at| now.since(*at) >= LINK_DOWN_AFTER && control.connected) {
            add(
                "relay-unreachable",
                Severity::Warning,
                since,
                "the coordinator answers but its relay does not: peers without a direct path cannot be reached".into(),
                "if a proxy stands before the coordinator, let WebSockets through on /v1/relay",
            );
        }
        if let Some(since) = control.relay_spent_since {
            add(
                "relay-budget-spent",
                Severity::Warning,
                since,
                "the coordinator's relay has carried its budget for this month: relayed peers get only small packets \
                 through until the next month begins"
                    .into(),
                "make a direct path possible (`meshd netcheck`), or raise `--relay-monthly` on the coordinator",
            );
        }
        let no_stun = self.reflexive.unanswered_since().filter(|_| control.connected);
        if let Some(since) = no_stun.filter(|at| now.since(*at) >= UDP_BLOCKED_AFTER) {
            add(
                "udp-blocked",
                Severity::Warning,
                since,
                "no STUN server answers: UDP seems to be blocked here, so peers are reached by TCP or relayed".into(),
                "allow outgoing UDP, at least to the coordinator's ports 3478 and 3479",
            );
        }
        if let Some(since) = control.refused_since {
            let first = control.refused.first();
            let detail = first.map(|(_, r)| format!(" ({}: {})", r.what, r.why)).unwrap_or_default();
            add(
                "coordinator-forged-record",
                Severity::Error,
                since,
                format!(
                    "the coordinator showed a record that the network's keys do not support; it was refused{detail}"
                ),
                "the coordinator may be compromised: check the server; this node goes on with the records it has verified",
            );
        }
        if let Some(since) = control.missing_since {
            let revokes = control.missing.values().filter(|m| m.is_revoke).count();
            let text = match revokes {
                0 => format!("the coordinator has forgotten {} record(s) it showed before", control.missing.len()),
                n => format!("the coordinator has taken back {n} removal(s) it showed before; they still hold here"),
            };
            add(
                "coordinator-rollback",
                Severity::Error,
                since,
                text,
                "it was restored from an old backup, or is hostile; this node keeps what it has seen and gives it back",
            );
        }
        if let Some((records, removals, since)) = self.kept_back(now) {
            let what = match removals {
                0 => format!("{records} record(s)"),
                n => format!("{n} removal(s) among {records} record(s)"),
            };
            add(
                "coordinator-withholds",
                Severity::Error,
                since,
                format!("the coordinator does not show {what} that other nodes know; they hold here"),
                "it may be hostile or have lost its data: check the server; this node has given them back",
            );
        }
        if let Some(since) = control.inconsistent_since {
            add(
                "coordinator-inconsistent",
                Severity::Error,
                since,
                "the coordinator's log does not fit its own digest".into(),
                "the coordinator may be faulty or hostile; records are still verified one by one",
            );
        }
        if let Some((text, nothing)) = self.exit_node_trouble() {
            let severity = if nothing { Severity::Error } else { Severity::Warning };
            let hint = "choose another with `meshd set --exit-node NAME`, or `meshd set --exit-node none`";
            add("exit-node", severity, now, text, hint);
        }
        let pending = self.pending_routes();
        if let Some((text, hint)) = pending.first() {
            let others = pending.len() - 1;
            let text = if others > 0 { format!("{text} (and {others} more: `meshd routes`)") } else { text.clone() };
            add("routes-pending", Severity::Info, now, text, hint);
        }
        if let Some(since) = self.routes.unknown_since {
            add(
                "coordinator-too-old",
                Severity::Warning,
                since,
                "the coordinator does not hand on routes: nobody learns what this node leads to".into(),
                "upgrade meshd on the coordinator's machine",
            );
        }
        if let Some(since) = control.unreadable_since {
            add(
                "unknown-record",
                Severity::Warning,
                since,
                "the network has records of a kind that this version of meshd cannot read".into(),
                "upgrade meshd on this machine",
            );
        }
        out
    }
}

fn addresses(member: &Member) -> Vec<IpAddr> {
    vec![IpAddr::V4(member.ipv4), IpAddr::V6(member.ipv6)]
}

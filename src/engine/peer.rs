//! One peer as the planner sees it.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::io::{Path, PeerId};
use crate::engine::path::agent::{PathAgent, Stamps};
use crate::engine::planner::carry::Carry;
use crate::engine::planner::exchange::Exchange;
use crate::engine::planner::messages::Patience;
use crate::engine::session::tunnel::Tunnel;
use crate::engine::traffic::Traffic;
use crate::time::Now;
use crate::wire::keys::{IdentityKey, WgKey};
use crate::wire::probe::ProbeKeys;

/// A member of the network other than ourselves. What talking to it needs is made on first use and kept in `talk`.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    pub(crate) identity: IdentityKey,
    pub(crate) wg: WgKey,
    /// Connected to the coordinator, as far as that says.
    pub(crate) online: bool,
    /// When the coordinator said that it is gone, if it did.
    pub(crate) gone_since: Option<Now>,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) talk: Option<Box<Talk>>,
}

/// What a peer that was talked to in this run costs.
#[derive(Debug)]
pub(crate) struct Talk {
    pub(crate) keys: ProbeKeys,
    pub(crate) agent: PathAgent,
    /// Kept for as long as the process runs: boringtun remembers in it which handshakes it has seen (replays).
    pub(crate) tunnel: Option<Arc<Mutex<Tunnel>>>,
    pub(crate) index: u32,
    pub(crate) handshake: Option<Handshake>,
    /// Where the data workers send now.
    pub(crate) path: Path,
    pub(crate) path_since: Now,
    /// What the path replaced, a direct one to this address or the relay, and how long that was in use.
    pub(crate) before: Option<(Option<SocketAddr>, Duration)>,
    /// In use until then, unless traffic prolongs it.
    pub(crate) wanted_until: Now,
    /// The addresses in our last call or answer.
    pub(crate) told: Vec<SocketAddr>,
    /// Where the peer is seen, IPv4.
    pub(crate) target: Option<SocketAddr>,
    /// Where the peer takes TCP connections, and whether our last call or answer told where we do.
    pub(crate) tcp: Vec<SocketAddr>,
    pub(crate) told_tcp: bool,
    /// One of the peer's candidates lets everybody in, as far as it knows.
    pub(crate) open: bool,
    /// What STUN servers see of this round's fresh port, if it has one.
    pub(crate) fresh_addresses: Vec<SocketAddr>,
    /// Addresses of the peer that answered a probe of ours, the newest first.
    pub(crate) answered_from: Vec<IpAddr>,
    /// Where the coordinator sees the peer's connection come from, and when it said so.
    pub(crate) located: Option<(Option<IpAddr>, Now)>,
    /// The number in the last sealed message from the peer; only greater ones are accepted.
    pub(crate) heard_number: u64,
    /// The last time a lost session of the peer made us start a handshake.
    pub(crate) revived: Option<Now>,
    /// It has shown that it is a meshd: messages inside the session are for it.
    pub(crate) speaks: bool,
    pub(crate) patience: Patience,
    pub(crate) exchange: Exchange,
    pub(crate) carry: Carry,
    /// Who passed its last sealed message on to us.
    pub(crate) through: Option<PeerId>,
}

/// A handshake we started and that has not succeeded yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Handshake {
    pub(crate) began: Now,
    pub(crate) next: Now,
    pub(crate) tries: usize,
}

impl Peer {
    pub(crate) fn new(id: PeerId, identity: IdentityKey, wg: WgKey) -> Self {
        Self { id, identity, wg, online: false, gone_since: None, traffic: Arc::default(), talk: None }
    }

    /// The coordinator says so.
    pub(crate) fn is_online(&mut self, online: bool, now: Now) {
        if !online && self.online {
            self.gone_since = Some(now);
        } else if online {
            self.gone_since = None;
        }
        self.online = online;
    }

    /// When data last went either way.
    pub(crate) fn last_data(&self) -> Option<Now> {
        Traffic::stamp(&self.traffic.last_tx).max(Traffic::stamp(&self.traffic.last_rx))
    }

    /// When data last came from it, either way.
    pub(crate) fn last_heard(&self) -> Option<Now> {
        Traffic::stamp(&self.traffic.last_rx)
    }

    pub(crate) fn stamps(&self) -> Stamps {
        Stamps {
            last_tx: Traffic::stamp(&self.traffic.last_tx),
            last_rx_direct: Traffic::stamp(&self.traffic.last_rx_direct),
            last_rx_relay: Traffic::stamp(&self.traffic.last_rx_relay),
            last_copy_relay: Traffic::stamp(&self.traffic.last_copy_relay),
        }
    }
}

impl Talk {
    pub(crate) fn new(keys: ProbeKeys, agent: PathAgent, path: Path, now: Now) -> Self {
        Self {
            keys,
            agent,
            tunnel: None,
            index: 0,
            handshake: None,
            path,
            path_since: now,
            before: None,
            wanted_until: Now::ZERO,
            told: Vec::new(),
            tcp: Vec::new(),
            told_tcp: false,
            target: None,
            open: false,
            fresh_addresses: Vec::new(),
            answered_from: Vec::new(),
            located: None,
            heard_number: 0,
            revived: None,
            speaks: false,
            patience: Patience::new(now),
            exchange: Exchange::new(now),
            carry: Carry::default(),
            through: None,
        }
    }

    /// In use now.
    pub(crate) fn is_wanted(&self, now: Now) -> bool {
        now < self.wanted_until
    }
}

/// What agents leave behind, carried out by the planner.
pub(crate) type Actions = VecDeque<crate::engine::path::agent::Action>;

//! `meshd ping`: an authenticated probe on the path that data takes now.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::engine::io::{Event, Output, Path, PeerId, Via};
use crate::engine::path::reflexive::fresh_txid;
use crate::engine::planner::sessions::IN_USE_COMMAND;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::local::{PathKind, Pong};
use crate::wire::probe;
use crate::wire::stun::TransactionId;

/// Pings that may wait for an answer at once; one more is lost at once.
const MAX_PENDING: usize = 256;

/// Pings under way.
#[derive(Debug, Default)]
pub(super) struct Pings {
    pending: BTreeMap<u64, Pending>,
}

#[derive(Debug)]
struct Pending {
    txids: [TransactionId; 2],
    peer: PeerId,
    seq: u32,
    sent: Now,
}

impl Planner {
    pub(super) fn ping(&mut self, token: u64, seq: u32, id: PeerId, timeout_ms: u64) {
        self.want(id, IN_USE_COMMAND);
        self.start_handshake(id);
        let txids = std::array::from_fn(|_| fresh_txid(self.tx_prefix, &mut self.rng));
        let pending = Pending { txids, peer: id, seq, sent: self.now };
        let full = self.pings.pending.len() >= MAX_PENDING;
        let Some((wg, path)) = self.peer(id).and_then(|p| p.talk.as_deref().map(|t| (p.wg, t.path))).filter(|_| !full)
        else {
            self.report(token, &pending, None);
            return;
        };
        let direct = match path {
            Path::Direct { socket, remote } | Path::Both { socket, remote } => Some(Via::Udp { socket, remote }),
            Path::None | Path::Relay => None,
        };
        let relay = (!matches!(path, Path::Direct { .. })).then_some(Via::Relay { peer: wg });
        for (via, txid) in direct.into_iter().chain(relay).zip(txids) {
            if let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) {
                let bytes = probe::encode_request(&talk.keys, &txid, None);
                self.send(via, bytes);
            }
        }
        self.pings.pending.insert(token, pending);
        self.timers.set(Why::Ping(token), Some(self.now + Duration::from_millis(timeout_ms)));
        // Pings are no data, but somebody waits for them all the same: a dead path must show.
        self.with_agent(id, |agent, _, cx| agent.question(cx));
    }

    /// The path that unanswered pings took is in doubt or lost: they go by the relay as well.
    pub(super) fn ping_again(&mut self, id: PeerId) {
        let Some(peer) = self.peer(id) else { return };
        let (Some(talk), via) = (peer.talk.as_deref(), Via::Relay { peer: peer.wg }) else { return };
        let waiting = self.pings.pending.values().filter(|p| p.peer == id);
        let requests: Vec<Vec<u8>> = waiting.map(|p| probe::encode_request(&talk.keys, &p.txids[1], None)).collect();
        for request in requests {
            self.send(via, request);
        }
    }

    /// True: the answer to a ping.
    pub(super) fn pong(&mut self, txid: &TransactionId, via: &Via, bytes: &[u8]) -> bool {
        let Some((token, id)) =
            self.pings.pending.iter().find(|(_, p)| p.txids.contains(txid)).map(|(token, p)| (*token, p.peer))
        else {
            return false;
        };
        let authentic = self
            .peer(id)
            .and_then(|p| p.talk.as_deref())
            .is_some_and(|talk| probe::decode_response(&talk.keys, bytes).is_ok());
        if !authentic {
            return false;
        }
        self.timers.set(Why::Ping(token), None);
        if let Some(pending) = self.pings.pending.remove(&token) {
            let rtt = self.now.since(pending.sent);
            if let (Via::Relay { .. }, Some(talk)) = (via, self.peer_mut(id).and_then(|p| p.talk.as_deref_mut())) {
                talk.agent.relay_rtt = Some(rtt);
            }
            self.report(token, &pending, Some((via, rtt)));
        }
        true
    }

    pub(super) fn ping_lost(&mut self, token: u64) {
        if let Some(pending) = self.pings.pending.remove(&token) {
            self.report(token, &pending, None);
        }
    }

    fn report(&mut self, token: u64, pending: &Pending, answer: Option<(&Via, Duration)>) {
        let member = self.peer(pending.peer).and_then(|p| self.ledger.member(&p.identity));
        let address = member.map_or(IpAddr::from([0, 0, 0, 0]), |m| IpAddr::V4(m.ipv4));
        let endpoint = |via: &Via| match via {
            Via::Udp { remote, .. } => canonical(*remote).to_string(),
            Via::Relay { .. } => self.relayed_by(pending.peer).unwrap_or_else(|| "coordinator".to_owned()),
        };
        let pong = Pong {
            schema: crate::wire::version::LOCAL,
            seq: pending.seq,
            peer: self.name_of(pending.peer),
            address,
            answered: answer.is_some(),
            path: match answer {
                Some((Via::Udp { .. }, _)) => PathKind::Direct,
                Some((Via::Relay { .. }, _)) => PathKind::Relay,
                None => PathKind::None,
            },
            endpoint: answer.map(|(via, _)| endpoint(via)),
            tcp: answer.and_then(|(via, _)| match via {
                Via::Udp { socket, .. } => Some(socket.is_stream()),
                Via::Relay { .. } => None,
            }),
            rtt_ms: answer.map(|(_, rtt)| rtt.as_secs_f64() * 1000.0),
        };
        self.outputs.push_back(Output::Event(Event::Pong { token, pong }));
    }
}

/// An IPv4 address in IPv6 clothes shown as what it is.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

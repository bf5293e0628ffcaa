//! `meshd why`: what is known of a peer's path, from both ends.

use crate::engine::io::{Path, PeerId};
use crate::engine::path::candidate::families;
use crate::engine::path::reason::{Attempt, Evidence, How};
use crate::engine::path::why::{Facts, Side, Way};
use crate::engine::peer::Talk;
use crate::engine::planner::Planner;
use crate::time::Now;
use crate::wire::local::{PeerWhy, WhyFound, WhySide};

impl Planner {
    /// Why packets to the peer go the way they go, as of `now`. None: it is gone.
    #[must_use]
    pub fn why(&self, id: PeerId, coordinator: &str, now: Now) -> Option<PeerWhy> {
        let peer = self.peer(id)?;
        let member = self.ledger.member(&peer.identity)?;
        let talk = peer.talk.as_deref();
        let facts = self.facts(id, now)?;
        let mut said = facts.explain();
        if let (Way::Relay, Some(by)) = (&facts.way, self.relayed_by(id)) {
            said.because
                .insert(0, format!("relayed by {by}, which relays for others: the only way now, or the shorter one"));
        }
        let found = match facts.way {
            Way::Direct { found, before, .. } => Some(WhyFound {
                how: how(found.how).to_owned(),
                failed_before: u32::try_from(found.attempt).unwrap_or(u32::MAX),
                replaced: before.map(|(addr, _)| addr.map_or_else(|| "relay".to_owned(), |addr| addr.to_string())),
            }),
            Way::Relay | Way::Nowhere | Way::Idle => None,
        };
        Some(PeerWhy {
            schema: 1,
            peer: member.name.clone(),
            id: member.identity.node_id().to_string(),
            online: facts.online,
            path: self.status_path(peer, &member.name, coordinator, now),
            code: said.code.to_owned(),
            text: said.text,
            because: said.because,
            fix: said.fix,
            found,
            failed: talk.map_or(0, |t| u32::try_from(t.agent.failures()).unwrap_or(u32::MAX)),
            next_attempt_s: facts.next_round.map(|wait| wait.as_secs()),
            here: side(&facts.here),
            there: facts.there.as_ref().map(side),
        })
    }

    /// Whether an attempt at a direct path is under way, whose end is worth waiting for.
    #[must_use]
    pub fn is_trying(&self, id: PeerId) -> bool {
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        talk.is_some_and(|t| {
            t.agent.direct().is_none() && t.agent.is_searching() || t.handshake.is_some_and(|h| h.tries == 0)
        })
    }

    fn facts(&self, id: PeerId, now: Now) -> Option<Facts> {
        let peer = self.peer(id)?;
        let talk = peer.talk.as_deref();
        let agent = talk.map(|t| &t.agent);
        let (v4, v6) = families(&self.candidates());
        let evidence = Evidence {
            port: self.port_v4,
            mapper: self.mapper,
            seen: agent.and_then(|a| a.seen()),
            v4: Some(v4),
            v6: Some(v6),
        };
        // Until it has told its addresses, nothing is known of the other end.
        let told = agent.filter(|a| a.their_evidence.v4.is_some());
        Some(Facts {
            peer: self.name_of(id),
            way: talk.map_or(Way::Idle, |t| way(t, now)),
            here: Side { nat: self.nat.clone(), evidence },
            there: told.map(|a| Side { nat: a.theirs.clone(), evidence: a.their_evidence }),
            coordinator: self.control.connected,
            online: self.is_online(peer, now),
            // One that came and went between two words of the coordinator was heard of itself, perhaps.
            offline_for: peer.gone_since.or_else(|| peer.last_heard()).map(|at| now.since(at)),
            handshake_for: talk.and_then(|t| t.handshake).map(|h| now.since(h.began)),
            attempt: agent.map_or(Attempt::Waiting, |a| a.attempt()),
            failures: agent.map_or(0, |a| a.failures()),
            called_in_vain: agent.is_some_and(|a| a.called_in_vain()),
            next_round: agent.and_then(|a| a.next_round_in(now)),
        })
    }
}

fn way(talk: &Talk, now: Now) -> Way {
    if !talk.is_wanted(now) {
        return Way::Idle;
    }
    match (talk.path, talk.agent.found()) {
        (Path::Direct { remote, .. } | Path::Both { remote, .. }, Some(found)) => {
            Way::Direct { remote, found, before: talk.before }
        }
        (Path::Direct { .. } | Path::Both { .. } | Path::Relay, _) => Way::Relay,
        (Path::None, _) => Way::Nowhere,
    }
}

const fn how(how: How) -> &'static str {
    match how {
        How::SameNetwork => "same-network",
        How::OpenAddress => "open-address",
        How::Punch => "punch",
        How::FreshPort => "fresh-port",
        How::ManyPorts => "many-ports",
        How::Tcp => "tcp",
    }
}

fn side(side: &Side) -> WhySide {
    let Side { nat, evidence } = side;
    WhySide {
        udp: nat.udp,
        mapping: nat.mapping.clone(),
        filtering: nat.filtering.clone(),
        port_model: nat.ports,
        port_mapping: evidence.mapper,
        port: evidence.port,
        ipv4: evidence.v4,
        ipv6: evidence.v6,
        last_attempt: evidence.seen,
    }
}

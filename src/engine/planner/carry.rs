//! Peers that relay for others: who does, and which of them carries packets to a peer without a direct path.
//!
//! A volunteer carries them when the coordinator's relay is gone, or when the way through it is shorter, as measured by probes
//! through both. To the rest of the node there is one relay; who carries is one more carrier of it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::io::{Path, PeerId, Update, Via};
use crate::engine::path::reflexive::fresh_txid;
use crate::engine::planner::paths::FULL_SIZE;
use crate::engine::planner::sessions::IN_USE_COMMAND;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::peer::{Message, name_of};
use crate::wire::probe;
use crate::wire::stun::TransactionId;

/// Volunteers that are considered for one peer.
const CONSIDERED: usize = 3;
/// A direct path is looked for first.
const DIRECT_FIRST: Duration = Duration::from_secs(3);
/// Between measurements; while one of two ways is about to win; and while there is no way at all.
const MEASURE: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_millis(500);
const NO_WAY: Duration = Duration::from_millis(200);
/// A measurement counts for so long.
const FRESH: Duration = Duration::from_secs(25);
/// Another way must be better by both of these, so many times in a row.
const BETTER_BY: Duration = Duration::from_millis(5);
const BETTER_PERCENT: u32 = 10;
const WINS: u8 = 3;

/// Who carries a peer's relayed packets, and who might. None stands for the coordinator.
#[derive(Debug, Default)]
pub(crate) struct Carry {
    pub(crate) by: Option<PeerId>,
    asked: Vec<(TransactionId, Option<PeerId>, Now)>,
    measured: BTreeMap<Option<PeerId>, (Duration, Now)>,
    /// Who was better than the one in use, and how often in a row.
    wins: (Option<PeerId>, u8),
    due: Option<Now>,
}

impl Planner {
    // ---- who carries now -------------------------------------------------------------------------------------------

    /// The volunteer that carries what goes to the peer by relay.
    pub(super) fn carrier_of(&self, id: PeerId) -> Option<PeerId> {
        match self.reply_through {
            Some((peer, through)) if peer == id => Some(through),
            _ => self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.carry.by),
        }
    }

    /// Hands a datagram for the peer to the volunteer that carries for it. False: there is none, or it cannot.
    pub(super) fn send_through(&mut self, id: PeerId, payload: &[u8]) -> bool {
        let Some(by) = self.carrier_of(id).filter(|by| self.is_direct_to(*by)) else { return false };
        let Some(to) = self.peer(id).map(|p| name_of(&p.wg)) else { return false };
        self.send_message(by, &Message::Pass { to, payload })
    }

    fn is_direct_to(&self, id: PeerId) -> bool {
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        talk.is_some_and(|t| matches!(t.path, Path::Direct { .. }))
    }

    fn carry_by(&mut self, id: PeerId, by: Option<PeerId>) {
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.carry.wins = (None, 0);
        if talk.carry.by == by {
            return;
        }
        talk.carry.by = by;
        let relayed = matches!(talk.path, Path::Relay | Path::None);
        let name = by.map_or_else(|| "the coordinator".to_owned(), |by| self.name_of(by));
        tracing::info!(peer = id.0, by = name, "relayed by another");
        self.update(Update::Through { peer: id, relay: by });
        if relayed {
            let was = self.peer(id).and_then(|p| p.talk.as_deref()).map(|t| t.path);
            self.select(id, Path::Relay, Duration::ZERO);
            if was == Some(Path::None) && by.is_some() {
                // What found no way out need not wait for its next repetition.
                self.repeat_handshake(id);
                self.with_agent(id, |agent, _, cx| agent.relay_came(cx));
            }
        }
    }

    /// Something came from a peer through a volunteer, and there is no other way back.
    pub(super) fn adopt_carrier(&mut self, id: PeerId, by: PeerId) {
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        let lost = talk.is_some_and(|t| t.carry.by.is_none() && t.path == Path::None);
        if lost && self.can_carry(by) && self.volunteering().contains(&by) {
            self.carry_by(id, Some(by));
        }
    }

    /// The path of a peer changed: what it carried for others goes another way, and what is to be carried for it may be.
    pub(super) fn path_changed(&mut self, id: PeerId, path: Path) {
        if !matches!(path, Path::Direct { .. }) {
            self.stop_carrying(id);
        }
        if matches!(path, Path::Direct { .. }) {
            self.carry_by(id, None);
        } else {
            self.carry_soon(id, if self.relay_up { DIRECT_FIRST } else { NO_WAY });
        }
    }

    /// A volunteer cannot carry any more.
    pub(super) fn stop_carrying(&mut self, by: PeerId) {
        let carried: Vec<PeerId> = self.talking().filter(|(_, t)| t.carry.by == Some(by)).map(|(id, _)| id).collect();
        for id in carried {
            self.drop_carrier(id, by);
        }
    }

    /// A volunteer cannot carry to this peer.
    pub(super) fn drop_carrier(&mut self, id: PeerId, by: PeerId) {
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.carry.measured.remove(&Some(by));
        talk.carry.asked.retain(|(_, way, _)| *way != Some(by));
        if talk.carry.by == Some(by) {
            self.carry_by(id, None);
            self.carry_soon(id, NO_WAY);
        }
    }

    // ---- who might -------------------------------------------------------------------------------------------------

    /// Looks for a volunteer for the peer before long.
    pub(super) fn carry_soon(&mut self, id: PeerId, wait: Duration) {
        let at = self.now + wait;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let due = talk.carry.due.map_or(at, |due| due.min(at));
        talk.carry.due = Some(due);
        self.timers.set(Why::Carry(id), Some(due));
    }

    /// Measures the ways to the peer through the coordinator and through volunteers.
    pub(super) fn carry_due(&mut self, id: PeerId) {
        let now = self.now;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.carry.due = None;
        if !talk.is_wanted(now) || !matches!(talk.path, Path::Relay | Path::None) {
            return;
        }
        let volunteers = self.volunteers(id);
        if volunteers.is_empty() {
            self.carry_by(id, None);
            return;
        }
        for volunteer in &volunteers {
            self.want(*volunteer, IN_USE_COMMAND);
            self.ensure_session(*volunteer);
        }
        let ways = volunteers.into_iter().filter(|v| self.can_carry(*v)).map(Some);
        let ways: Vec<Option<PeerId>> = ways.chain(self.relay_leads_to(id).then_some(None)).collect();
        for way in &ways {
            self.measure(id, *way);
        }
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
        let wait = match talk.path {
            Path::None => NO_WAY * 2,
            _ if talk.carry.wins.1 > 0 => SOON,
            _ if ways.iter().all(Option::is_none) => SOON * 4,
            _ => MEASURE,
        };
        self.carry_soon(id, wait);
    }

    /// Nodes that relay for others, the nearest first.
    fn volunteers(&self, id: PeerId) -> Vec<PeerId> {
        let mut all: Vec<(bool, Duration, PeerId)> = self
            .volunteering()
            .into_iter()
            .filter(|volunteer| *volunteer != id)
            .map(|v| (!self.is_direct_to(v), self.distance(v).unwrap_or(Duration::MAX), v))
            .collect();
        all.sort_unstable();
        all.into_iter().take(CONSIDERED).map(|(.., volunteer)| volunteer).collect()
    }

    /// Somebody began to relay for others, or ended.
    pub(super) fn volunteers_changed(&mut self) {
        let volunteers = self.volunteering();
        let now = self.now;
        let relayed: Vec<(PeerId, Option<PeerId>)> = self
            .talking()
            .filter(|(_, t)| t.is_wanted(now) && matches!(t.path, Path::Relay | Path::None))
            .map(|(id, t)| (id, t.carry.by))
            .collect();
        for (id, by) in relayed {
            match by.filter(|by| !volunteers.contains(by)) {
                Some(gone) => self.drop_carrier(id, gone),
                None => self.carry_soon(id, SOON),
            }
        }
    }

    fn can_carry(&self, id: PeerId) -> bool {
        self.is_direct_to(id) && self.can_tell(id)
    }

    fn measure(&mut self, id: PeerId, way: Option<PeerId>) {
        let now = self.now;
        let txid = fresh_txid(self.tx_prefix, &mut self.rng);
        let Some(peer) = self.peer_mut(id) else { return };
        let key = peer.wg;
        let Some(talk) = peer.talk.as_deref_mut() else { return };
        talk.carry.asked.retain(|(.., at)| now.since(*at) < FRESH);
        if talk.carry.asked.len() >= 4 * CONSIDERED {
            talk.carry.asked.remove(0);
        }
        talk.carry.asked.push((txid, way, now));
        // Of data size: a way that does not carry that is none.
        let request = probe::encode_request(&talk.keys, &txid, Some(FULL_SIZE));
        match way {
            Some(by) => {
                self.send_message(by, &Message::Pass { to: name_of(&key), payload: &request });
            }
            None => self
                .outputs
                .push_back(crate::engine::io::Output::Send { via: Via::Relay { peer: key }, bytes: request }),
        }
    }

    /// True: the answer to a measurement.
    pub(super) fn measured(&mut self, txid: &TransactionId, bytes: &[u8]) -> bool {
        let now = self.now;
        let found = self
            .talking()
            .find_map(|(id, t)| t.carry.asked.iter().position(|(asked, ..)| asked == txid).map(|at| (id, at)));
        let Some((id, at)) = found else { return false };
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return false };
        if !probe::decode_response(&talk.keys, bytes).is_ok_and(|response| response.len >= FULL_SIZE) {
            return false;
        }
        let (_, way, sent) = talk.carry.asked.swap_remove(at);
        let rtt = now.since(sent);
        talk.carry.measured.insert(way, (rtt, now));
        if way == talk.carry.by {
            talk.agent.relay_rtt = Some(rtt);
        }
        self.decide_carrier(id, way);
        true
    }

    /// A way was just measured: is it the one to use?
    fn decide_carrier(&mut self, id: PeerId, way: Option<PeerId>) {
        let now = self.now;
        let leads = self.relay_leads_to(id);
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let carry = &mut talk.carry;
        if way == carry.by || !matches!(talk.path, Path::Relay | Path::None) {
            return;
        }
        if carry.by.is_none() && !leads {
            return self.carry_by(id, way);
        }
        let fresh = |way: &Option<PeerId>| carry.measured.get(way).filter(|(_, at)| now.since(*at) < FRESH);
        let (Some((rtt, _)), Some((current, _))) = (fresh(&way), fresh(&carry.by)) else { return };
        let better = *rtt + BETTER_BY < *current && *rtt * 100 < *current * (100 - BETTER_PERCENT);
        let before = if carry.wins.0 == way { carry.wins.1 } else { 0 };
        if !better {
            if carry.wins.0 == way {
                carry.wins = (None, 0);
            }
            return;
        }
        carry.wins = (way, before + 1);
        if carry.wins.1 >= WINS {
            self.carry_by(id, way);
        } else {
            self.carry_soon(id, SOON);
        }
    }

    /// Where packets to a relayed peer go, for people: a node's name, or the coordinator.
    pub(super) fn relayed_by(&self, id: PeerId) -> Option<String> {
        let by = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.carry.by)?;
        Some(self.name_of(by))
    }

    /// What was passed on and came from nowhere else is answered the same way.
    pub(super) fn answering_through<T>(&mut self, id: PeerId, by: PeerId, act: impl FnOnce(&mut Self) -> T) -> T {
        self.reply_through = Some((id, by));
        let result = act(self);
        self.reply_through = None;
        result
    }
}

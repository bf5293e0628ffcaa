//! Calls, answers and the like through a third node, when the coordinator's relay does not lead to the peer.
//!
//! Every node passes sealed messages on, for members and to members it has a session with. What was passed on to a node is
//! for that node: nothing goes round.

use crate::engine::drops::Drop;
use crate::engine::io::{Path, PeerId, Via};
use crate::engine::planner::Planner;
use crate::wire::classify::{Kind, classify};
use crate::wire::peer::{Message, Name, name_of};

/// Nodes that one message is handed to: which of them reaches the peer is not known.
const HELPERS: usize = 3;

impl Planner {
    /// Whether the coordinator's relay leads to the peer, as far as is known.
    pub(super) fn relay_leads_to(&self, id: PeerId) -> bool {
        self.relay_up && (!self.control.connected || self.peer(id).is_some_and(|p| p.online))
    }

    /// Asks other peers to pass a sealed message on.
    pub(super) fn pass_on(&mut self, id: PeerId, payload: &[u8]) {
        let Some(to) = self.peer(id).map(|p| name_of(&p.wg)) else { return };
        let through = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.through);
        let mut helpers: Vec<(bool, PeerId)> = self
            .talking()
            .filter(|(other, t)| *other != id && t.is_wanted(self.now) && t.path != Path::None)
            .map(|(other, _)| (Some(other) != through, other))
            .filter(|(_, other)| self.can_tell(*other))
            .collect();
        helpers.sort_unstable();
        for (_, helper) in helpers.into_iter().take(HELPERS) {
            self.send_message(helper, &Message::Pass { to, payload });
        }
    }

    /// A peer asks for something to be passed on.
    pub(super) fn asked_to_pass(&mut self, from: PeerId, to: Name, payload: &[u8]) {
        let Some(name) = self.peer(from).map(|p| name_of(&p.wg)) else { return };
        let target = self.by_short.get(&to).copied().filter(|target| *target != from);
        let Some(target) = target.filter(|_| classify(payload) == Kind::Sealed) else {
            self.drops.count(Drop::NotPassedOn);
            return;
        };
        if !self.send_message(target, &Message::Passed { from: name, payload }) {
            self.drops.count(Drop::NotPassedOn);
            self.send_message(from, &Message::NoWay { to });
        }
    }

    /// Something was passed on to this node. Who really made it, its seal, MAC or keys tell.
    pub(super) fn was_passed(&mut self, by: PeerId, from: Name, payload: &[u8]) {
        let sender = self.by_short.get(&from).copied().filter(|sender| *sender != by);
        // Data is the workers' business, and comes here only if it did not come directly.
        let wanted = !matches!(classify(payload), Kind::Junk | Kind::Data | Kind::RelayDatagram);
        let Some(sender) = sender.filter(|_| wanted) else {
            self.drops.count(Drop::NotPassedOn);
            return;
        };
        let Some(key) = self.peer(sender).map(|p| p.wg) else { return };
        if !self.ensure_talk(sender) {
            return;
        }
        if let Some(talk) = self.peer_mut(sender).and_then(|p| p.talk.as_deref_mut()) {
            talk.through = Some(by);
        }
        // Answers to calls may go elsewhere as well; all else goes back the way it came.
        if classify(payload) == Kind::Sealed {
            self.handle_sealed(&Via::Relay { peer: key }, payload);
        } else {
            self.adopt_carrier(sender, by);
            self.answering_through(sender, by, |planner| planner.handle_slow(&Via::Relay { peer: key }, payload));
        }
    }

    /// A worker cannot pass packets on: whoever asked is told.
    pub(super) fn cannot_pass(&mut self, from: PeerId, to: PeerId) {
        let Some(to) = self.peer(to).map(|p| name_of(&p.wg)) else { return };
        self.send_message(from, &Message::NoWay { to });
    }

    /// A peer could not pass something on.
    pub(super) fn no_way(&mut self, by: PeerId, to: Name) {
        let Some(id) = self.by_short.get(&to).copied() else { return };
        if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut())
            && talk.through == Some(by)
        {
            talk.through = None;
        }
        self.drop_carrier(id, by);
    }
}

//! Messages to and from peers inside their sessions ([`crate::wire::peer`]).

use crate::engine::bucket::Bucket;
use crate::engine::drops::Drop;
use crate::engine::io::{Path, PeerId};
use crate::engine::packet::{DATA_OVERHEAD, MIN_ROOM};
use crate::engine::planner::Planner;
use crate::time::Now;
use crate::wire::peer::Message;

/// What one peer's messages may cost us at once, and a second. Most cost 1.
const BURST: u32 = 128;
const PER_SECOND: u32 = 32;
/// Bytes of parcels that one peer may send us at once, and a second.
const BYTES: u32 = 256 << 10;

/// How much more one peer may ask of us.
#[derive(Debug)]
pub(crate) struct Patience {
    messages: Bucket,
    bytes: Bucket,
}

impl Patience {
    pub(crate) const fn new(now: Now) -> Self {
        Self { messages: Bucket::new(BURST, PER_SECOND, now), bytes: Bucket::new(BYTES, BYTES, now) }
    }
}

impl Planner {
    /// A message came inside the peer's session.
    pub(super) fn handle_message(&mut self, id: PeerId, bytes: &[u8]) {
        let now = self.now;
        let Ok(message) = Message::decode(bytes) else {
            self.drops.count(Drop::BadPeerMessage);
            return;
        };
        self.speaks(id);
        let cost = self.cost_of(&message);
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let may = match &message {
            Message::Piece(piece) => {
                talk.patience.bytes.take(u32::try_from(piece.bytes.len()).unwrap_or(u32::MAX), now)
            }
            _ => talk.patience.messages.take(cost, now),
        };
        if !may {
            self.drops.count(Drop::PeerMessageLimit);
            return;
        }
        match message {
            Message::Summary(summary) => self.heard_summary(id, &summary),
            Message::Branch(branch) => self.heard_branch(id, &branch),
            Message::Have(have) => self.heard_have(id, &have),
            Message::Piece(piece) => self.heard_piece(id, &piece),
            Message::Pass { to, payload } => self.asked_to_pass(id, to, payload),
            Message::Passed { from, payload } => self.was_passed(id, from, payload),
            Message::NoWay { to } => self.no_way(id, to),
        }
    }

    /// The peer has shown that it is a meshd of this kind: messages are for it.
    pub(super) fn speaks(&mut self, id: PeerId) {
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        if !std::mem::replace(&mut talk.speaks, true) {
            self.compare_soon(id);
        }
    }

    /// Whether a message to the peer would leave now.
    pub(super) fn can_tell(&self, id: PeerId) -> bool {
        let talk = self.peer(id).and_then(|p| p.talk.as_deref());
        talk.is_some_and(|t| {
            t.speaks && t.path != Path::None && t.tunnel.as_ref().is_some_and(|tunnel| tunnel.lock().can_send(self.now))
        })
    }

    /// Seals a message to the peer and sends it the way its data goes. False: there is no session or no way.
    pub(super) fn send_message(&mut self, id: PeerId, message: &Message<'_>) -> bool {
        let now = self.now;
        if !self.can_tell(id) {
            return false;
        }
        let tunnel = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.tunnel.clone());
        let Some(tunnel) = tunnel else { return false };
        let plain = message.encode();
        let mut out = vec![0; (plain.len() + DATA_OVERHEAD).max(MIN_ROOM)];
        let Some(len) = tunnel.lock().seal(&plain, &mut out, now) else { return false };
        out.truncate(len);
        self.send_to_peer(id, &out);
        true
    }
}

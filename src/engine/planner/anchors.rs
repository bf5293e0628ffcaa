//! Without the coordinator: a node looks for peers at their last addresses and keeps a few of them, so that others find it
//! through them, and it others. With the coordinator back they are let go.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::io::{Path, PeerId};
use crate::engine::planner::sessions::IN_USE_COMMAND;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;

/// So many are kept, and looked for at once. All nodes look in the same order, so that they meet at the same ones.
const MOST: usize = 8;
/// A coordinator that was connected is waited for so long; after a start, so long.
const PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE_AT_START: Duration = Duration::from_millis(1_500);
/// While some are being looked for, and while all are found or given up for now.
const LOOK: Duration = Duration::from_secs(1);
const REST: Duration = Duration::from_secs(5);
/// Tries in a row, and the rest after them, which doubles up to so many times.
const TRIES: u32 = 6;
const PAUSE: Duration = Duration::from_secs(30);
const DOUBLED: u32 = 5;

/// Peers that were looked for in vain, how often, and until when they are left alone.
#[derive(Debug, Default)]
pub(super) struct Anchors {
    tried: BTreeMap<PeerId, (u32, Now)>,
}

impl Planner {
    /// The coordinator or its relay came or went: either of them is enough.
    pub(super) fn look_for_anchors(&mut self) {
        self.anchors = Anchors::default();
        let patience = if self.control.last_heard.is_some() { PATIENCE } else { PATIENCE_AT_START };
        let gone = self.control.down_since.zip(self.relay_down_since).filter(|_| self.has_no_coordinator());
        let at = gone.map(|(control, relay)| (control.max(relay) + patience).max(self.now));
        self.timers.set(Why::Anchors, at);
    }

    fn has_no_coordinator(&self) -> bool {
        !self.control.connected && !self.relay_up && !self.expelled
    }

    /// Looks for peers at their last addresses, and keeps those that are there.
    pub(super) fn anchors_due(&mut self) {
        let now = self.now;
        if !self.has_no_coordinator() {
            return;
        }
        let known: Vec<(PeerId, std::net::SocketAddr)> =
            self.last_endpoints.iter().filter_map(|(key, at)| Some((*self.by_wg.get(key)?, *at))).collect();
        let is_reached = |id: &PeerId| {
            let path = self.peer(*id).and_then(|p| p.talk.as_deref()).map(|t| t.path);
            matches!(path, Some(Path::Direct { .. } | Path::Both { .. }))
        };
        let (reached, missed): (Vec<_>, Vec<_>) = known.into_iter().partition(|(id, _)| is_reached(id));
        for (id, _) in reached.iter().take(MOST) {
            self.anchors.tried.remove(id);
            self.want(*id, IN_USE_COMMAND);
            self.ensure_session(*id);
        }
        let mut looking = 0;
        for (id, addr) in missed {
            if reached.len() + looking >= MOST {
                break;
            }
            let (tries, next) = self.anchors.tried.get(&id).copied().unwrap_or((0, now));
            if next > now {
                // One that rests makes room for the next.
                looking += usize::from(!tries.is_multiple_of(TRIES));
                continue;
            }
            looking += 1;
            let tries = tries + 1;
            let pause = PAUSE * (1 << (tries / TRIES).saturating_sub(1).min(DOUBLED));
            let wait = if tries.is_multiple_of(TRIES) { pause } else { LOOK };
            self.anchors.tried.insert(id, (tries, now + wait));
            self.want(id, IN_USE_COMMAND);
            self.ensure_session(id);
            self.with_agent(id, |agent, near, cx| agent.try_remembered(addr, near(&addr), cx));
        }
        self.timers.set(Why::Anchors, Some(now + if looking > 0 { LOOK } else { REST }));
    }

    /// Begins a session, if there is none.
    pub(super) fn ensure_session(&mut self, id: PeerId) {
        let tunnel = self.peer(id).and_then(|p| p.talk.as_deref()).and_then(|t| t.tunnel.clone());
        if !tunnel.is_some_and(|tunnel| tunnel.lock().can_send(self.now)) {
            self.start_handshake(id);
        }
    }
}

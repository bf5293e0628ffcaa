//! What joined two networks before: tried first when they are to be joined again, also after a restart (the shell keeps it).

use std::net::{IpAddr, SocketAddr};

use crate::engine::io::PeerId;
use crate::engine::planner::Planner;
use crate::wire::keys::WgKey;

/// Pairs of networks remembered.
pub const REMEMBERED: usize = 64;
/// Rounds differ up to this attempt: at first plain, then both at the same moment, then from fresh ports.
const MOST: u8 = 2;

/// Between two networks, this attempt found a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Worked {
    /// With whom.
    pub peer: WgKey,
    /// The outside address of this node's network.
    pub here: IpAddr,
    /// Of the peer's.
    pub there: IpAddr,
    /// How many rounds had failed before the one that found it.
    pub attempt: u8,
}

/// The newest last, each pair of networks once.
#[derive(Debug, Default)]
pub(super) struct Memory(Vec<Worked>);

impl Memory {
    /// From an earlier run. What is too much or senseless is left out.
    pub(super) fn restored(worked: Vec<Worked>) -> Self {
        let mut memory = Self::default();
        for one in worked {
            memory.insert(one);
        }
        memory
    }

    fn insert(&mut self, mut new: Worked) {
        new.attempt = new.attempt.min(MOST);
        self.0.retain(|old| (old.here, old.there) != (new.here, new.there));
        if self.0.len() >= REMEMBERED {
            self.0.remove(0);
        }
        self.0.push(new);
    }

    /// Between these networks; if it is not known where the peer is now, from here to where it was last.
    fn find(&self, peer: &WgKey, here: IpAddr, there: Option<IpAddr>) -> Option<&Worked> {
        let fits = |w: &&Worked| w.here == here && there.map_or(w.peer == *peer, |there| w.there == there);
        self.0.iter().rev().find(fits)
    }
}

impl Planner {
    /// What is to be remembered over a restart, the oldest first; at most [`REMEMBERED`].
    #[must_use]
    pub fn worked(&self) -> Vec<Worked> {
        self.memory.0.clone()
    }

    /// A direct path was found: remember at which attempt.
    pub(super) fn remember_success(&mut self, id: PeerId) {
        let Some((peer, here, Some(there))) = self.networks_of(id) else { return };
        let Some(attempt) = self.peer(id).and_then(|p| p.talk.as_deref()).map(|t| t.agent.worked_at()) else { return };
        let attempt = u8::try_from(attempt).unwrap_or(MOST);
        self.memory.insert(Worked { peer, here, there, attempt });
    }

    /// The attempt that worked before between this network and the peer's, if any.
    pub(super) fn worked_before(&self, id: PeerId) -> Option<usize> {
        let (peer, here, there) = self.networks_of(id)?;
        self.memory.find(&peer, here, there).map(|w| usize::from(w.attempt))
    }

    /// The outside addresses of both.
    fn networks_of(&self, id: PeerId) -> Option<(WgKey, IpAddr, Option<IpAddr>)> {
        let here = self.reflexive.addresses().into_iter().find(SocketAddr::is_ipv4)?.ip();
        let peer = self.peer(id)?;
        let there = peer.talk.as_deref().and_then(|t| t.target).map(|at| at.ip());
        Some((peer.wg, here, there))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worked(n: u8, attempt: u8) -> Worked {
        let there = IpAddr::from([198, 51, 100, n]);
        Worked { peer: WgKey([n; 32]), here: IpAddr::from([203, 0, 113, 1]), there, attempt }
    }

    #[test]
    fn the_oldest_of_too_many_networks_is_forgotten() {
        let mut memory = Memory::default();
        for n in 0..=64 {
            memory.insert(worked(n, n));
        }
        assert_eq!(memory.0.len(), REMEMBERED);
        let found = |memory: &Memory, n: u8| {
            memory.find(&WgKey([9; 32]), worked(n, 0).here, Some(worked(n, 0).there)).is_some()
        };
        assert!(!found(&memory, 0) && found(&memory, 64));
        memory.insert(worked(1, 1));
        memory.insert(worked(200, 1));
        assert!(found(&memory, 1) && !found(&memory, 2));
    }

    #[test]
    fn what_was_kept_is_bounded_and_found_by_the_peer_until_it_says_where_it_is() {
        let kept: Vec<Worked> = (0..200).map(|n| worked(n, 250)).collect();
        let memory = Memory::restored(kept);
        assert_eq!(memory.0.len(), REMEMBERED);
        let here = worked(0, 0).here;
        assert_eq!(memory.find(&WgKey([199; 32]), here, None).map(|w| w.attempt), Some(MOST));
        assert_eq!(memory.find(&WgKey([1; 32]), here, None), None, "forgotten");
        assert_eq!(memory.find(&WgKey([199; 32]), IpAddr::from([10, 0, 0, 1]), None), None, "from elsewhere");
        assert_eq!(memory.find(&WgKey([199; 32]), here, Some(IpAddr::from([10, 0, 0, 1]))), None, "it has moved");
    }
}

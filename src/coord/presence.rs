//! Who is connected, and what of it the listeners have not been told yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::coord::io::ConnId;
use crate::time::Now;
use crate::wire::control::ToNode;
use crate::wire::keys::WgKey;

/// Changes within this time are told together.
pub(super) const BATCH: Duration = Duration::from_millis(250);
/// The most keys in one message, so that it stays far below [`crate::wire::control::MAX_MESSAGE`] (67 bytes a key).
const MAX_KEYS: usize = 8_192;

/// The connected members.
#[derive(Debug, Default)]
pub(super) struct Presence {
    online: BTreeMap<WgKey, ConnId>,
    /// Those that listeners were told are online.
    told: BTreeSet<WgKey>,
    /// Those that may differ from what listeners were told, and whether they were there at any time since.
    touched: BTreeMap<WgKey, bool>,
    due: Option<Now>,
}

impl Presence {
    pub(super) fn came(&mut self, key: WgKey, conn: ConnId, now: Now) {
        self.online.insert(key, conn);
        self.touch(key, true, now);
    }

    /// The connection is gone; the node may have a newer one.
    pub(super) fn went(&mut self, key: WgKey, conn: ConnId, now: Now) {
        if self.online.get(&key) == Some(&conn) {
            self.online.remove(&key);
            self.touch(key, false, now);
        }
    }

    /// The messages that tell a new listener the whole set.
    pub(super) fn full(&self) -> Vec<ToNode> {
        let keys: Vec<WgKey> = self.online.keys().copied().collect();
        let mut messages = messages(&keys, &[]);
        match messages.first_mut() {
            Some(ToNode::Presence { full, .. }) => *full = true,
            _ => messages.push(ToNode::Presence { full: true, online: Vec::new(), offline: Vec::new() }),
        }
        messages
    }

    /// The connection of a member that is online.
    pub(super) fn connection(&self, key: &WgKey) -> Option<ConnId> {
        self.online.get(key).copied()
    }

    /// When changes are due to be told.
    pub(super) const fn due(&self) -> Option<Now> {
        self.due
    }

    /// The messages that tell listeners what changed, if it is time. Who came and went meanwhile is told as both.
    pub(super) fn changes(&mut self, now: Now) -> Vec<ToNode> {
        if self.due.is_none_or(|due| now < due) {
            return Vec::new();
        }
        self.due = None;
        let (mut online, mut offline) = (Vec::new(), Vec::new());
        let mut passed = Vec::new();
        for (key, came) in std::mem::take(&mut self.touched) {
            if self.online.contains_key(&key) {
                if self.told.insert(key) {
                    online.push(key);
                }
            } else if self.told.remove(&key) {
                offline.push(key);
            } else if came {
                passed.push(key);
            }
        }
        // In messages of their own: within one there is no order.
        let visits = messages(&passed, &[]).into_iter().chain(messages(&[], &passed));
        messages(&online, &offline).into_iter().chain(visits).collect()
    }

    fn touch(&mut self, key: WgKey, came: bool, now: Now) {
        *self.touched.entry(key).or_default() |= came;
        self.due.get_or_insert(now + BATCH);
    }
}

fn messages(online: &[WgKey], offline: &[WgKey]) -> Vec<ToNode> {
    let came = online.chunks(MAX_KEYS).map(|keys| (keys.to_vec(), Vec::new()));
    let went = offline.chunks(MAX_KEYS).map(|keys| (Vec::new(), keys.to_vec()));
    let mut messages: Vec<ToNode> =
        came.chain(went).map(|(online, offline)| ToNode::Presence { full: false, online, offline }).collect();
    if let [ToNode::Presence { offline, .. }, ToNode::Presence { offline: more, .. }] = messages.as_mut_slice()
        && offline.is_empty()
        && online.len() + more.len() <= MAX_KEYS
    {
        std::mem::swap(offline, more);
        messages.pop();
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(i: u32) -> WgKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&i.to_be_bytes());
        WgKey(bytes)
    }

    #[test]
    fn a_reconnect_within_a_batch_is_not_told() {
        let mut p = Presence::default();
        p.came(key(1), ConnId(1), Now::ZERO);
        let due = p.due().unwrap();
        assert_eq!(p.changes(Now::ZERO), []);
        assert_eq!(p.changes(due), [ToNode::Presence { full: false, online: vec![key(1)], offline: vec![] }]);
        p.went(key(1), ConnId(1), due);
        p.came(key(1), ConnId(2), due);
        assert_eq!(p.changes(due + BATCH), []);
        assert_eq!(p.due(), None);
    }

    #[test]
    fn a_visit_within_a_batch_is_told_as_both() {
        let mut p = Presence::default();
        let presence = |online, offline| ToNode::Presence { full: false, online, offline };
        p.came(key(1), ConnId(1), Now::ZERO);
        p.went(key(1), ConnId(1), Now(1));
        p.came(key(2), ConnId(2), Now(2));
        let told = p.changes(Now::ZERO + BATCH);
        assert_eq!(
            told,
            [presence(vec![key(2)], vec![]), presence(vec![key(1)], vec![]), presence(vec![], vec![key(1)])]
        );
        // One that is told already only goes.
        p.went(key(2), ConnId(2), Now::ZERO + BATCH);
        p.came(key(2), ConnId(3), Now::ZERO + BATCH);
        p.went(key(2), ConnId(3), Now::ZERO + BATCH);
        assert_eq!(p.changes(Now::ZERO + BATCH + BATCH), [presence(vec![], vec![key(2)])]);
    }

    #[test]
    fn the_end_of_a_replaced_connection_is_not_the_node_s() {
        let mut p = Presence::default();
        p.came(key(1), ConnId(1), Now::ZERO);
        p.came(key(1), ConnId(2), Now::ZERO);
        p.went(key(1), ConnId(1), Now::ZERO);
        assert_eq!(p.full(), [ToNode::Presence { full: true, online: vec![key(1)], offline: vec![] }]);
    }

    #[test]
    fn comings_and_goings_share_a_message() {
        let mut p = Presence::default();
        p.came(key(1), ConnId(1), Now::ZERO);
        p.changes(Now::ZERO + BATCH);
        p.went(key(1), ConnId(1), Now::ZERO + BATCH);
        p.came(key(2), ConnId(2), Now::ZERO + BATCH);
        let told = p.changes(Now::ZERO + BATCH + BATCH);
        assert_eq!(told, [ToNode::Presence { full: false, online: vec![key(2)], offline: vec![key(1)] }]);
    }

    #[test]
    fn a_large_set_is_told_in_messages_that_fit() {
        let mut p = Presence::default();
        for i in 0..65_536 {
            p.came(key(i), ConnId(u64::from(i)), Now::ZERO);
        }
        let mut seen = 0;
        for (i, message) in p.full().iter().enumerate() {
            assert!(serde_json::to_string(message).unwrap().len() < crate::wire::control::MAX_MESSAGE);
            let ToNode::Presence { full, online, .. } = message else { panic!("{message:?}") };
            assert_eq!(*full, i == 0);
            seen += online.len();
        }
        assert_eq!(seen, 65_536);
        assert_eq!(Presence::default().full().len(), 1);
    }
}

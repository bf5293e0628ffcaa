//! Which relay connection gets the frames for a key. The bounded queues and the sockets are the shell's.

use std::collections::BTreeMap;

use crate::wire::keys::WgKey;

/// One relay connection, numbered by the shell and never reused in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayConn(pub u64);

/// The most connections one key may have; a further one puts out the oldest. Two are normal while a node changes
/// networks, more are not.
pub const MAX_PER_KEY: usize = 4;

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// To this connection, as coming from this key.
    To {
        /// Whose queue.
        conn: RelayConn,
        /// The sender, as authenticated when its connection joined.
        from: WgKey,
    },
    /// The receiver has no connection here: tell the sender.
    Gone,
    /// The sending connection has not joined, or was put out.
    NotJoined,
}

/// WireGuard key → connections.
///
/// A second connection with a key makes the first inactive rather than killing it: the node may be moving between
/// networks, and which of the two survives is not the relay's to guess. Frames go to the newest; when that leaves, to the
/// newest of the others.
#[derive(Debug, Default)]
pub struct RelayHub {
    /// Of each key, oldest first; the last is the active one. Never empty.
    by_key: BTreeMap<WgKey, Vec<RelayConn>>,
    by_conn: BTreeMap<RelayConn, WgKey>,
}

impl RelayHub {
    /// A hub without connections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A connection authenticated as the owner of `key`. Returns the connection that is to be closed for it, if the key
    /// has too many.
    pub fn join(&mut self, conn: RelayConn, key: WgKey) -> Option<RelayConn> {
        self.leave(conn);
        self.by_conn.insert(conn, key);
        let conns = self.by_key.entry(key).or_default();
        conns.push(conn);
        if conns.len() <= MAX_PER_KEY {
            return None;
        }
        let oldest = conns.remove(0);
        self.by_conn.remove(&oldest);
        Some(oldest)
    }

    /// A connection is gone. Returns its key if that has no connection left.
    pub fn leave(&mut self, conn: RelayConn) -> Option<WgKey> {
        let key = self.by_conn.remove(&conn)?;
        let conns = self.by_key.get_mut(&key)?;
        conns.retain(|other| *other != conn);
        if !conns.is_empty() {
            return None;
        }
        self.by_key.remove(&key);
        Some(key)
    }

    /// The owner of `key` was revoked. Returns its connections, to be closed.
    pub fn expel(&mut self, key: &WgKey) -> Vec<RelayConn> {
        let conns = self.by_key.remove(key).unwrap_or_default();
        for conn in &conns {
            self.by_conn.remove(conn);
        }
        conns
    }

    /// Where a frame goes that came on `from` for the owner of `to`. An inactive connection may still send.
    #[must_use]
    pub fn deliver(&self, from: RelayConn, to: &WgKey) -> Delivery {
        let Some(sender) = self.by_conn.get(&from) else { return Delivery::NotJoined };
        match self.active(to) {
            Some(conn) => Delivery::To { conn, from: *sender },
            None => Delivery::Gone,
        }
    }

    /// The connection that gets the frames for `key`.
    #[must_use]
    pub fn active(&self, key: &WgKey) -> Option<RelayConn> {
        self.by_key.get(key)?.last().copied()
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.by_conn.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: WgKey = WgKey([1; 32]);
    const B: WgKey = WgKey([2; 32]);

    #[test]
    fn frames_go_to_the_key_under_the_sender_s_authenticated_name() {
        let mut hub = RelayHub::new();
        hub.join(RelayConn(1), A);
        assert_eq!(hub.deliver(RelayConn(1), &B), Delivery::Gone);
        hub.join(RelayConn(2), B);
        assert_eq!(hub.deliver(RelayConn(1), &B), Delivery::To { conn: RelayConn(2), from: A });
        assert_eq!(hub.deliver(RelayConn(9), &B), Delivery::NotJoined);
    }

    #[test]
    fn a_second_connection_makes_the_first_inactive_and_its_end_makes_it_active_again() {
        let mut hub = RelayHub::new();
        hub.join(RelayConn(1), A);
        hub.join(RelayConn(2), B);
        assert_eq!(hub.join(RelayConn(3), A), None);
        assert_eq!(hub.active(&A), Some(RelayConn(3)));
        assert_eq!(hub.deliver(RelayConn(1), &B), Delivery::To { conn: RelayConn(2), from: A });
        assert_eq!(hub.leave(RelayConn(3)), None);
        assert_eq!(hub.active(&A), Some(RelayConn(1)));
        assert_eq!(hub.leave(RelayConn(1)), Some(A));
        assert_eq!(hub.active(&A), None);
    }

    #[test]
    fn an_inactive_connection_leaves_without_notice() {
        let mut hub = RelayHub::new();
        hub.join(RelayConn(1), A);
        hub.join(RelayConn(2), A);
        assert_eq!(hub.leave(RelayConn(1)), None);
        assert_eq!(hub.active(&A), Some(RelayConn(2)));
    }

    #[test]
    fn a_key_with_too_many_connections_loses_its_oldest() {
        let mut hub = RelayHub::new();
        for i in 0..MAX_PER_KEY as u64 {
            assert_eq!(hub.join(RelayConn(i), A), None);
        }
        assert_eq!(hub.join(RelayConn(99), A), Some(RelayConn(0)));
        assert_eq!(hub.connections(), MAX_PER_KEY);
        assert_eq!(hub.deliver(RelayConn(0), &A), Delivery::NotJoined);
    }

    #[test]
    fn expelled_is_out_with_all_connections() {
        let mut hub = RelayHub::new();
        hub.join(RelayConn(1), A);
        hub.join(RelayConn(2), A);
        assert_eq!(hub.expel(&A), [RelayConn(1), RelayConn(2)]);
        assert_eq!((hub.connections(), hub.active(&A)), (0, None));
        assert_eq!(hub.leave(RelayConn(1)), None);
    }

    proptest! {
        #[test]
        fn both_directions_agree(steps in proptest::collection::vec((0u8..3, 0u64..6, 0u8..3), 0..100)) {
            let mut hub = RelayHub::new();
            for (what, conn, key) in steps {
                match what {
                    0 => { hub.join(RelayConn(conn), WgKey([key; 32])); }
                    1 => { hub.leave(RelayConn(conn)); }
                    _ => { hub.expel(&WgKey([key; 32])); }
                }
                prop_assert_eq!(hub.by_key.values().map(Vec::len).sum::<usize>(), hub.by_conn.len());
                for (key, conns) in &hub.by_key {
                    prop_assert!(!conns.is_empty() && conns.len() <= MAX_PER_KEY);
                    prop_assert!(conns.iter().all(|c| hub.by_conn.get(c) == Some(key)));
                }
            }
        }
    }
}

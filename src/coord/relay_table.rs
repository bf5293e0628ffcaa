//! Who may use the relay by UDP, where each node's datagrams are to go, and what a datagram that came is worth.
//!
//! Every member has a place here, numbered from 0, and at most one session. A session's address is learned only from a
//! datagram whose tag is right and whose counter is higher than every one before it: what was captured earlier, or made
//! without the secret, moves nothing. Nothing is ever answered to a datagram whose tag is wrong.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustc_hash::FxBuildHasher;

use crate::coord::relay_sched::Pair;
use crate::time::Now;
use crate::wire::keys::WgKey;
use crate::wire::relay_udp::{self, Fresh, Header, Kind, Name, SessionKeys, SessionSecret, Window, Wish};

/// A session not heard of for so long gets nothing more by UDP: its NAT binding may be gone, and with it the node. A node
/// that is being delivered to says something at least every third of this.
pub const HOLD: Duration = Duration::from_secs(15);

/// Where a node's datagrams come from, and so where its own go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Which of the relay's sockets.
    pub socket: u16,
    /// The node's address.
    pub remote: SocketAddr,
    /// Which of our addresses the node knows.
    pub local: IpAddr,
}

/// Why a datagram was dropped. Each has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// No relay datagram, or of a kind that nodes do not send.
    Malformed,
    /// No such session.
    UnknownSession,
    /// The tag is wrong.
    BadTag,
    /// Its counter was seen before, or is too old to tell.
    Replayed,
}

/// What to do with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Forward the payload.
    Forward(Pair),
    /// A Send to somebody who is not a member: answer with [`Table::gone`].
    NoSuchPeer {
        /// Who sent it.
        from: u32,
        /// To whom.
        to: Name,
    },
    /// It is a Pong now: send it back to where it came from.
    Answer,
    /// Drop it and count why.
    Drop(Refused),
}

/// Members and their sessions.
#[derive(Debug, Default)]
pub struct Table {
    places: Vec<Place>,
    free: Vec<u32>,
    by_key: BTreeMap<WgKey, u32>,
    /// Of a name that two members share: none of them, so that neither gets what is meant for the other.
    by_name: HashMap<Name, Option<u32>, FxBuildHasher>,
}

#[derive(Debug, Default)]
struct Place {
    key: WgKey,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    keys: SessionKeys,
    window: Window,
    /// Datagrams sent to the node.
    sent: u64,
    at: Option<Address>,
    /// The node wants to be delivered to by UDP.
    deliver: bool,
    heard: Now,
}

impl Table {
    /// A table without members.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A member may use the relay. Returns its place; a second time, the same.
    pub fn admit(&mut self, key: WgKey) -> u32 {
        if let Some(place) = self.by_key.get(&key) {
            return *place;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX)
        });
        if let Some(p) = self.places.get_mut(place as usize) {
            *p = Place { key, session: None };
        }
        self.by_key.insert(key, place);
        self.by_name.entry(Name::of(&key)).and_modify(|both| *both = None).or_insert(Some(place));
        place
    }

    /// A member is out. Its place may be given to another. Returns which it was.
    pub fn expel(&mut self, key: &WgKey) -> Option<u32> {
        let place = self.by_key.remove(key)?;
        let name = Name::of(key);
        let others: Vec<u32> = self.by_key.iter().filter(|(k, _)| Name::of(k) == name).map(|(_, p)| *p).collect();
        match others.as_slice() {
            [] => self.by_name.remove(&name),
            [one] => self.by_name.insert(name, Some(*one)),
            _ => self.by_name.insert(name, None),
        };
        if let Some(p) = self.places.get_mut(place as usize) {
            *p = Place::default();
        }
        self.free.push(place);
        Some(place)
    }

    /// Begins a session of a member, which ends the one it had. Returns its number; `None`: it is not a member, or shares
    /// its name with another and has to use the WebSocket.
    pub fn open(&mut self, key: &WgKey, secret: &SessionSecret, now: Now) -> Option<u32> {
        let place = *self.by_key.get(key)?;
        self.by_name.get(&Name::of(key)).copied().flatten()?;
        let session =
            Session { keys: secret.keys(), window: Window::default(), sent: 0, at: None, deliver: false, heard: now };
        self.places.get_mut(place as usize)?.session = Some(session);
        Some(place)
    }

    /// A member's place.
    #[must_use]
    pub fn place(&self, key: &WgKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// The key of the member in a place.
    #[must_use]
    pub fn key(&self, place: u32) -> Option<WgKey> {
        self.places.get(place as usize).map(|p| p.key)
    }

    /// The member said on another link that it no longer wants to be delivered to by UDP.
    pub fn deliver_elsewhere(&mut self, place: u32) {
        if let Some(session) = self.session_mut(place) {
            session.deliver = false;
        }
    }

    /// Judges a datagram that came from `at`. A Ping is turned into its Pong where it lies; anything else is left as it is.
    pub fn judge(&mut self, datagram: &mut [u8], at: Address, now: Now) -> Verdict {
        let Ok(header) = relay_udp::decode(datagram) else { return Verdict::Drop(Refused::Malformed) };
        if !matches!(header.kind, Kind::Send | Kind::Ping) {
            return Verdict::Drop(Refused::Malformed);
        }
        let Some(session) = self.session_mut(header.session) else { return Verdict::Drop(Refused::UnknownSession) };
        if !session.keys.up.verify(datagram) {
            return Verdict::Drop(Refused::BadTag);
        }
        match session.window.accept(header.counter) {
            Fresh::Seen => return Verdict::Drop(Refused::Replayed),
            Fresh::Newest => {
                session.at = Some(at);
                session.heard = now;
            }
            Fresh::Late => {}
        }
        match header.kind {
            Kind::Send => {
                let from = header.session;
                match self.by_name.get(&header.name).copied().flatten() {
                    Some(to) => Verdict::Forward(Pair { from, to }),
                    None => Verdict::NoSuchPeer { from, to: header.name },
                }
            }
            Kind::Ping => {
                match Wish::from_name(header.name) {
                    Wish::Nothing => {}
                    Wish::DeliverHere => session.deliver = true,
                    Wish::DeliverElsewhere => session.deliver = false,
                }
                session.seal(Kind::Pong, header.session, header.name, datagram);
                Verdict::Answer
            }
            Kind::Recv | Kind::Gone | Kind::Pong => Verdict::Drop(Refused::Malformed),
        }
    }

    /// Where to deliver by UDP what is meant for the member in this place; `None`: it is not to be reached so.
    #[must_use]
    pub fn address(&self, place: u32, now: Now) -> Option<Address> {
        let session = self.places.get(place as usize)?.session.as_ref()?;
        session.at.filter(|_| session.deliver && now.since(session.heard) <= HOLD)
    }

    /// Where the last datagram of the member in this place came from.
    #[must_use]
    pub fn last_address(&self, place: u32) -> Option<Address> {
        self.places.get(place as usize)?.session.as_ref()?.at
    }

    /// Turns a Send of `pair.from`, or any bytes with room for a header in front of the payload, into the Recv for
    /// `pair.to`. False: one of them has gone meanwhile.
    pub fn readdress(&mut self, pair: Pair, datagram: &mut [u8]) -> bool {
        let Some(from) = self.key(pair.from) else { return false };
        let Some(session) = self.session_mut(pair.to) else { return false };
        session.seal(Kind::Recv, pair.to, Name::of(&from), datagram);
        true
    }

    /// The datagram that tells `to` that a node is not to be reached. `None`: it has no session.
    pub fn gone(&mut self, to: u32, about: Name) -> Option<[u8; relay_udp::HEADER]> {
        let mut datagram = [0; relay_udp::HEADER];
        self.session_mut(to)?.seal(Kind::Gone, to, about, &mut datagram);
        Some(datagram)
    }

    /// How many members there are.
    #[must_use]
    pub fn members(&self) -> usize {
        self.by_key.len()
    }

    fn session_mut(&mut self, place: u32) -> Option<&mut Session> {
        self.places.get_mut(place as usize)?.session.as_mut()
    }
}

impl Session {
    fn seal(&mut self, kind: Kind, session: u32, name: Name, datagram: &mut [u8]) {
        self.sent += 1;
        self.keys.down.seal(&Header { kind, counter: self.sent, session, name }, datagram);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::relay_udp::HEADER;

    const A: WgKey = WgKey([1; 32]);
    const B: WgKey = WgKey([2; 32]);
    const SECRET_A: SessionSecret = SessionSecret::new([3; 32]);
    const SECRET_B: SessionSecret = SessionSecret::new([4; 32]);

    fn address(port: u16) -> Address {
        Address { socket: 0, remote: ([192, 0, 2, 1], port).into(), local: [198, 51, 100, 1].into() }
    }

    /// A and B are members with a session each.
    fn table() -> Table {
        let mut table = Table::new();
        assert_eq!((table.admit(A), table.admit(B), table.admit(A)), (0, 1, 0));
        assert_eq!(table.open(&A, &SECRET_A, Now::ZERO), Some(0));
        assert_eq!(table.open(&B, &SECRET_B, Now::ZERO), Some(1));
        table
    }

    fn datagram(secret: &SessionSecret, kind: Kind, counter: u64, session: u32, name: Name, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(payload);
        secret.keys().up.seal(&Header { kind, counter, session, name }, &mut bytes);
        bytes
    }

    fn ping(counter: u64, wish: Wish) -> Vec<u8> {
        datagram(&SECRET_A, Kind::Ping, counter, 0, wish.name(), &[5; 16])
    }

    fn send(counter: u64, to: &WgKey) -> Vec<u8> {
        datagram(&SECRET_A, Kind::Send, counter, 0, Name::of(to), b"ciphertext")
    }

    #[test]
    fn a_send_becomes_the_receivers_recv_in_place() {
        let mut table = table();
        let mut bytes = send(1, &B);
        let verdict = table.judge(&mut bytes, address(1), Now::ZERO);
        assert_eq!(verdict, Verdict::Forward(Pair { from: 0, to: 1 }));
        assert!(table.readdress(Pair { from: 0, to: 1 }, &mut bytes));
        assert!(SECRET_B.keys().down.verify(&bytes));
        let header = relay_udp::decode(&bytes).unwrap();
        assert_eq!(header, Header { kind: Kind::Recv, counter: 1, session: 1, name: Name::of(&A) });
        assert_eq!(&bytes[HEADER..], b"ciphertext");
    }

    #[test]
    fn a_ping_becomes_its_pong_and_carries_a_wish() {
        let mut table = table();
        assert_eq!(table.address(0, Now::ZERO), None);
        let mut bytes = ping(1, Wish::Nothing);
        assert_eq!(table.judge(&mut bytes, address(1), Now::ZERO), Verdict::Answer);
        assert!(SECRET_A.keys().down.verify(&bytes));
        assert_eq!(relay_udp::decode(&bytes).unwrap().kind, Kind::Pong);
        assert_eq!(&bytes[HEADER..], [5; 16]);
        assert_eq!(table.address(0, Now::ZERO), None, "it was only measured");
        table.judge(&mut ping(2, Wish::DeliverHere), address(2), Now::ZERO);
        assert_eq!(table.address(0, Now::ZERO), Some(address(2)));
        assert_eq!(table.address(0, Now::ZERO + HOLD), Some(address(2)));
        assert_eq!(table.address(0, Now::ZERO + HOLD + Duration::from_micros(1)), None);
        table.judge(&mut ping(3, Wish::DeliverElsewhere), address(2), Now::ZERO);
        assert_eq!(table.address(0, Now::ZERO), None);
        table.judge(&mut ping(4, Wish::DeliverHere), address(2), Now::ZERO);
        table.deliver_elsewhere(0);
        assert_eq!(table.address(0, Now::ZERO), None);
    }

    #[test]
    fn what_is_captured_moves_no_address() {
        let mut table = table();
        let first = ping(1, Wish::DeliverHere);
        table.judge(&mut first.clone(), address(1), Now::ZERO);
        let late = ping(2, Wish::DeliverHere);
        table.judge(&mut ping(3, Wish::DeliverHere), address(1), Now::ZERO);
        assert_eq!(table.judge(&mut first.clone(), address(9), Now::ZERO), Verdict::Drop(Refused::Replayed));
        // Held back on its way and not seen yet, but overtaken.
        assert_eq!(table.judge(&mut late.clone(), address(9), Now::ZERO), Verdict::Answer);
        assert_eq!(table.address(0, Now::ZERO), Some(address(1)));
        table.judge(&mut ping(4, Wish::Nothing), address(3), Now::ZERO);
        assert_eq!(table.address(0, Now::ZERO), Some(address(3)), "the node itself moves it");
    }

    #[test]
    fn what_is_wrong_is_named_and_changes_nothing() {
        let mut table = table();
        table.judge(&mut ping(1, Wish::DeliverHere), address(1), Now::ZERO);
        let cases = [
            (vec![0xC0; 3], Refused::Malformed),
            (datagram(&SECRET_A, Kind::Recv, 2, 0, Name::of(&B), b"x"), Refused::Malformed),
            (datagram(&SECRET_A, Kind::Ping, 2, 7, Name::default(), &[0; 8]), Refused::UnknownSession),
            (datagram(&SECRET_B, Kind::Send, 9, 0, Name::of(&B), b"x"), Refused::BadTag),
            (ping(1, Wish::DeliverElsewhere), Refused::Replayed),
        ];
        for (mut bytes, refused) in cases {
            let before = bytes.clone();
            assert_eq!(table.judge(&mut bytes, address(9), Now::ZERO), Verdict::Drop(refused));
            assert_eq!((bytes, table.address(0, Now::ZERO)), (before, Some(address(1))));
        }
    }

    #[test]
    fn a_new_session_ends_the_old_one_and_the_expelled_have_none() {
        let mut table = table();
        table.judge(&mut ping(1, Wish::DeliverHere), address(1), Now::ZERO);
        let secret = SessionSecret::new([9; 32]);
        assert_eq!(table.open(&A, &secret, Now::ZERO), Some(0));
        assert_eq!(table.address(0, Now::ZERO), None);
        let verdict = table.judge(&mut ping(2, Wish::DeliverHere), address(1), Now::ZERO);
        assert_eq!(verdict, Verdict::Drop(Refused::BadTag));
        assert_eq!(table.expel(&A), Some(0));
        let mut bytes = datagram(&secret, Kind::Ping, 1, 0, Name::default(), &[0; 8]);
        assert_eq!(table.judge(&mut bytes, address(1), Now::ZERO), Verdict::Drop(Refused::UnknownSession));
        assert_eq!((table.expel(&A), table.open(&A, &secret, Now::ZERO), table.members()), (None, None, 1));
        assert!(!table.readdress(Pair { from: 1, to: 0 }, &mut bytes));
    }

    #[test]
    fn a_send_to_a_stranger_is_told_to_its_sender_only() {
        let mut table = table();
        let nobody = WgKey([8; 32]);
        let verdict = table.judge(&mut send(1, &nobody), address(1), Now::ZERO);
        assert_eq!(verdict, Verdict::NoSuchPeer { from: 0, to: Name::of(&nobody) });
        let gone = table.gone(0, Name::of(&nobody)).unwrap();
        assert!(SECRET_A.keys().down.verify(&gone));
        assert_eq!(relay_udp::decode(&gone).unwrap().kind, Kind::Gone);
    }

    #[test]
    fn members_whose_names_are_alike_get_nothing_by_udp() {
        let mut table = table();
        let mut twin = B;
        twin.0[31] = 0;
        table.admit(twin);
        assert_eq!(table.open(&twin, &SECRET_B, Now::ZERO), None);
        assert!(matches!(table.judge(&mut send(1, &B), address(1), Now::ZERO), Verdict::NoSuchPeer { .. }));
        table.expel(&twin);
        assert!(matches!(table.judge(&mut send(2, &B), address(1), Now::ZERO), Verdict::Forward(_)));
    }

    proptest! {
        /// Nothing made without the secret is forwarded, answered, or moves the address.
        #[test]
        fn forged_and_changed_datagrams_do_nothing(
            place in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
            noise in proptest::collection::vec(any::<u8>(), 0..80), which in 0u8..3,
        ) {
            let mut table = table();
            table.judge(&mut ping(1, Wish::DeliverHere), address(1), Now::ZERO);
            let mut bytes = send(2, &B);
            match which {
                0 => bytes[place.index(HEADER + 10)] ^= 1 << bit,
                1 => bytes.truncate(cut.index(HEADER + 10)),
                _ => bytes = [&[0xC0, 0x01][..], &noise].concat(),
            }
            prop_assert!(matches!(table.judge(&mut bytes, address(9), Now::ZERO), Verdict::Drop(_)));
            prop_assert_eq!(table.address(0, Now::ZERO), Some(address(1)));
        }

        /// Whatever of what a node sent is delivered again, in any order and from anywhere, the address stays with the newest.
        #[test]
        fn replays_never_move_the_address(order in proptest::collection::vec((0u64..40, 1u16..1000), 1..200)) {
            let mut table = table();
            let (mut newest, mut expected) = (None, None);
            for (counter, port) in order {
                table.judge(&mut ping(counter, Wish::DeliverHere), address(port), Now::ZERO);
                if newest.is_none_or(|n| counter > n) {
                    (newest, expected) = (Some(counter), Some(address(port)));
                }
                prop_assert_eq!(table.address(0, Now::ZERO), expected);
            }
        }
    }
}

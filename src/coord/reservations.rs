//! Addresses and names proposed to guests that have not joined yet, so that two guests at once are proposed different ones.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::time::Now;
use crate::wire::keys::ControlKey;

/// What a guest was proposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Proposed {
    pub(super) ipv4: Ipv4Addr,
    pub(super) name: String,
}

/// At most `capacity` reservations, each for `keep`; a further one puts out the oldest. A reservation binds nobody: it
/// only steers later proposals elsewhere.
#[derive(Debug)]
pub(super) struct Reservations {
    keep: Duration,
    capacity: usize,
    by_guest: BTreeMap<ControlKey, (u64, Proposed)>,
    by_ipv4: BTreeMap<Ipv4Addr, ControlKey>,
    by_name: BTreeMap<String, ControlKey>,
    /// In the order made, which is the order they end. One that was replaced or released is found out by its number.
    ends: VecDeque<(Now, ControlKey, u64)>,
    made: u64,
}

impl Reservations {
    pub(super) const fn new(keep: Duration, capacity: usize) -> Self {
        Self {
            keep,
            capacity,
            by_guest: BTreeMap::new(),
            by_ipv4: BTreeMap::new(),
            by_name: BTreeMap::new(),
            ends: VecDeque::new(),
            made: 0,
        }
    }

    /// Reserves for `guest`, in place of what was reserved for it before.
    pub(super) fn reserve(&mut self, guest: ControlKey, proposed: Proposed, now: Now) {
        self.expire(now);
        self.release(&guest);
        while self.ends.len() >= self.capacity {
            self.end_oldest();
        }
        self.made += 1;
        self.by_ipv4.insert(proposed.ipv4, guest);
        self.by_name.insert(proposed.name.clone(), guest);
        self.by_guest.insert(guest, (self.made, proposed));
        self.ends.push_back((now + self.keep, guest, self.made));
    }

    pub(super) fn release(&mut self, guest: &ControlKey) {
        let Some((_, Proposed { ipv4, name })) = self.by_guest.remove(guest) else { return };
        if self.by_ipv4.get(&ipv4) == Some(guest) {
            self.by_ipv4.remove(&ipv4);
        }
        if self.by_name.get(&name) == Some(guest) {
            self.by_name.remove(&name);
        }
    }

    /// Forgets what has ended.
    pub(super) fn expire(&mut self, now: Now) {
        while self.ends.front().is_some_and(|(end, ..)| *end <= now) {
            self.end_oldest();
        }
    }

    /// What `guest` was proposed.
    pub(super) fn of(&self, guest: &ControlKey) -> Option<&Proposed> {
        self.by_guest.get(guest).map(|(_, proposed)| proposed)
    }

    /// Whether somebody other than `guest` was proposed this address.
    pub(super) fn has_ipv4(&self, ipv4: Ipv4Addr, guest: &ControlKey) -> bool {
        self.by_ipv4.get(&ipv4).is_some_and(|holder| holder != guest)
    }

    /// Whether somebody other than `guest` was proposed this name.
    pub(super) fn has_name(&self, name: &str, guest: &ControlKey) -> bool {
        self.by_name.get(name).is_some_and(|holder| holder != guest)
    }

    fn end_oldest(&mut self) {
        if let Some((_, guest, number)) = self.ends.pop_front()
            && self.by_guest.get(&guest).is_some_and(|(made, _)| *made == number)
        {
            self.release(&guest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(i: u8) -> ControlKey {
        ControlKey([i; 32])
    }

    fn proposed(i: u8) -> Proposed {
        Proposed { ipv4: Ipv4Addr::new(10, 0, 0, i), name: format!("n{i}") }
    }

    #[test]
    fn a_reservation_holds_against_others_and_ends() {
        let mut r = Reservations::new(Duration::from_secs(60), 10);
        r.reserve(guest(1), proposed(1), Now::ZERO);
        assert!(r.has_ipv4(proposed(1).ipv4, &guest(2)) && r.has_name("n1", &guest(2)));
        assert!(!r.has_ipv4(proposed(1).ipv4, &guest(1)) && !r.has_name("n1", &guest(1)));
        r.expire(Now::from_millis(59_999));
        assert_eq!(r.of(&guest(1)), Some(&proposed(1)));
        r.expire(Now::from_millis(60_000));
        assert_eq!(r.of(&guest(1)), None);
        assert!(!r.has_ipv4(proposed(1).ipv4, &guest(2)) && !r.has_name("n1", &guest(2)));
    }

    #[test]
    fn a_renewed_reservation_outlives_the_end_of_the_first() {
        let mut r = Reservations::new(Duration::from_secs(60), 10);
        r.reserve(guest(1), proposed(1), Now::ZERO);
        r.reserve(guest(1), proposed(1), Now::from_millis(30_000));
        r.expire(Now::from_millis(60_000));
        assert_eq!(r.of(&guest(1)), Some(&proposed(1)));
    }

    #[test]
    fn memory_is_bounded() {
        let mut r = Reservations::new(Duration::from_secs(60), 3);
        for i in 0..200 {
            r.reserve(guest(i), proposed(i), Now::ZERO);
            r.reserve(guest(7), proposed(7), Now::ZERO);
            assert!(r.by_guest.len() <= 3 && r.ends.len() <= 3 && r.by_ipv4.len() <= 3 && r.by_name.len() <= 3);
        }
    }
}

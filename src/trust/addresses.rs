//! Which IPv4 addresses of the network's range are taken, kept so that a free one is found without a search.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// The addresses taken, as runs of neighbours that never touch: first of a run → its last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TakenAddresses {
    runs: BTreeMap<u32, u32>,
}

impl TakenAddresses {
    /// Takes an address. Taking one twice changes nothing.
    pub fn insert(&mut self, address: Ipv4Addr) {
        let at = u32::from(address);
        if self.run_with(at).is_some() {
            return;
        }
        let mut first = at;
        let mut last = at;
        if let Some(before) = at.checked_sub(1).and_then(|b| self.run_with(b)) {
            first = before.0;
        }
        if let Some(after) = at.checked_add(1).and_then(|a| self.runs.remove(&a)) {
            last = after;
        }
        self.runs.insert(first, last);
    }

    /// Frees an address.
    pub fn remove(&mut self, address: Ipv4Addr) {
        let at = u32::from(address);
        let Some((first, last)) = self.run_with(at) else { return };
        self.runs.remove(&first);
        if first < at {
            self.runs.insert(first, at - 1);
        }
        if at < last {
            self.runs.insert(at + 1, last);
        }
    }

    /// The lowest free host address of `range` for which `reserved` is false. Costs one look-up for each reserved address
    /// it passes over, however many are taken.
    pub fn lowest_free(&self, range: Ipv4Net, reserved: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        let end = u32::from(range.broadcast());
        let mut at = u32::from(range.network()).checked_add(1)?;
        while at < end {
            if let Some((_, last)) = self.run_with(at) {
                at = last.checked_add(1)?;
            } else if reserved(Ipv4Addr::from(at)) {
                at += 1;
            } else {
                return Some(Ipv4Addr::from(at));
            }
        }
        None
    }

    fn run_with(&self, at: u32) -> Option<(u32, u32)> {
        self.runs.range(..=at).next_back().map(|(first, last)| (*first, *last)).filter(|(_, last)| *last >= at)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn network_and_broadcast_are_never_given() {
        let range: Ipv4Net = "10.0.0.0/30".parse().unwrap();
        let mut taken = TakenAddresses::default();
        let mut given = Vec::new();
        while let Some(free) = taken.lowest_free(range, |_| false) {
            taken.insert(free);
            given.push(free.to_string());
        }
        assert_eq!(given, ["10.0.0.1", "10.0.0.2"]);
    }

    #[test]
    fn reserved_addresses_are_passed_over() {
        let range: Ipv4Net = "10.0.0.0/29".parse().unwrap();
        let mut taken = TakenAddresses::default();
        taken.insert("10.0.0.1".parse().unwrap());
        let reserved: Ipv4Addr = "10.0.0.2".parse().unwrap();
        assert_eq!(taken.lowest_free(range, |a| a == reserved), Some("10.0.0.3".parse().unwrap()));
    }

    #[test]
    fn a_full_sixteen_is_filled_without_a_search_per_address() {
        let range: Ipv4Net = "100.71.0.0/16".parse().unwrap();
        let mut taken = TakenAddresses::default();
        for _ in 0..65_534 {
            let free = taken.lowest_free(range, |_| false).unwrap();
            taken.insert(free);
        }
        assert_eq!(taken.lowest_free(range, |_| false), None);
        assert_eq!(taken.runs.len(), 1);
    }

    proptest! {
        #[test]
        fn runs_agree_with_a_plain_set(steps in proptest::collection::vec((any::<bool>(), 0u32..40), 0..200)) {
            let range: Ipv4Net = "10.0.0.0/27".parse().unwrap();
            let base = u32::from(range.network());
            let mut taken = TakenAddresses::default();
            let mut plain = BTreeSet::new();
            for (insert, offset) in steps {
                let address = Ipv4Addr::from(base + offset);
                if insert {
                    taken.insert(address);
                    plain.insert(address);
                } else {
                    taken.remove(address);
                    plain.remove(&address);
                }
                let lowest = (base + 1..base + 31).map(Ipv4Addr::from).find(|a| !plain.contains(a));
                prop_assert_eq!(taken.lowest_free(range, |_| false), lowest);
                let mut last_end = None;
                for (first, last) in &taken.runs {
                    prop_assert!(first <= last);
                    prop_assert!(last_end.is_none_or(|end: u32| end + 1 < *first), "runs touch");
                    last_end = Some(*last);
                }
            }
        }
    }
}

//! A small table of named deadlines.

use std::collections::{BTreeMap, BTreeSet};

use crate::time::Now;

/// Deadlines by name. Setting one replaces the earlier one of the same name.
#[derive(Debug)]
pub(crate) struct Timers<K> {
    by_name: BTreeMap<K, Now>,
    by_time: BTreeSet<(Now, K)>,
}

impl<K: Copy + Ord> Timers<K> {
    pub(crate) const fn new() -> Self {
        Self { by_name: BTreeMap::new(), by_time: BTreeSet::new() }
    }

    /// Sets or clears the deadline called `name`.
    pub(crate) fn set(&mut self, name: K, at: Option<Now>) {
        let before = match at {
            Some(at) => self.by_name.insert(name, at),
            None => self.by_name.remove(&name),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.by_time.remove(&(before, name));
        }
        if let Some(at) = at {
            self.by_time.insert((at, name));
        }
    }

    /// The earliest deadline.
    pub(crate) fn first(&self) -> Option<(Now, K)> {
        self.by_time.first().copied()
    }

    /// Takes the earliest deadline that has passed.
    pub(crate) fn pop_due(&mut self, now: Now) -> Option<(Now, K)> {
        let first @ (at, name) = self.first()?;
        if at > now {
            return None;
        }
        self.by_time.remove(&first);
        self.by_name.remove(&name);
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_deadline_and_they_pop_in_order() {
        let mut timers = Timers::new();
        timers.set('a', Some(Now(30)));
        timers.set('b', Some(Now(20)));
        timers.set('a', Some(Now(10)));
        assert_eq!(timers.first(), Some((Now(10), 'a')));
        timers.set('b', None);
        assert_eq!(timers.pop_due(Now(9)), None);
        assert_eq!(timers.pop_due(Now(10)), Some((Now(10), 'a')));
        assert_eq!(timers.first(), None);
    }
}

//! What admins say about things again and again: of all that was said about one thing the newest counts, whatever order it
//! arrives in. So the order in which a coordinator hands records on makes no difference.

use std::collections::BTreeMap;

use crate::time::UnixSeconds;

/// What was said about a thing. At the same second the greater counts, so that all who hold the same records agree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Word<V> {
    /// It is this.
    Is(V),
    /// It is nothing any more.
    Gone,
}

impl<V> Word<V> {
    pub(super) fn new(value: Option<V>) -> Self {
        value.map_or(Self::Gone, Self::Is)
    }
}

/// All that was said, each with the position in the log of the first record that said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Newest<K, V>(BTreeMap<K, BTreeMap<(UnixSeconds, Word<V>), usize>>);

impl<K, V> Default for Newest<K, V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, V: Ord> Newest<K, V> {
    pub(super) fn say(&mut self, about: K, created: UnixSeconds, word: Word<V>, at: usize) {
        self.0.entry(about).or_default().entry((created, word)).or_insert(at);
    }

    /// The exact reverse of [`Self::say`] for the record that stood at `at`.
    pub(super) fn unsay(&mut self, about: &K, created: UnixSeconds, word: Word<V>, at: usize) {
        let Some(said) = self.0.get_mut(about) else { return };
        let word = (created, word);
        if said.get(&word) == Some(&at) {
            said.remove(&word);
        }
        if said.is_empty() {
            self.0.remove(about);
        }
    }

    /// When what counts was said.
    pub(super) fn said_at(&self, about: &K) -> Option<UnixSeconds> {
        self.0.get(about)?.last_key_value().map(|((created, _), _)| *created)
    }

    pub(super) fn get(&self, about: &K) -> Option<&V> {
        value(self.0.get(about)?)
    }

    /// Everything that is something now, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().filter_map(|(about, said)| Some((about, value(said)?)))
    }
}

fn value<V: Ord>(said: &BTreeMap<(UnixSeconds, Word<V>), usize>) -> Option<&V> {
    match said.last_key_value() {
        Some(((_, Word::Is(value)), _)) => Some(value),
        Some(((_, Word::Gone), _)) | None => None,
    }
}

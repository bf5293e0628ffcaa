//! The accepted records as a set, for nodes that compare theirs: two that hold the same may have heard it in another order.

use crate::trust::ledger::Ledger;
use crate::wire::keys::Digest32;
use crate::wire::peer::Stem;

impl Ledger {
    /// The ids of accepted records that begin so, in their order, each with its place in the log.
    pub fn under(&self, stem: &Stem) -> impl Iterator<Item = (&Digest32, usize)> {
        let (low, high) = stem.bounds();
        self.known.range(low..=high).map(|(id, at)| (id, *at))
    }

    /// A digest of the set of accepted records whose ids begin so. Takes time in proportion to their number.
    #[must_use]
    pub fn set_digest(&self, stem: &Stem) -> Digest32 {
        let parts: Vec<&[u8]> =
            std::iter::once(&b"meshd records v1"[..]).chain(self.under(stem).map(|(id, _)| &id.0[..])).collect();
        if parts.len() == 1 { Digest32::default() } else { Digest32::of(&parts) }
    }

    /// The record at a place in the log.
    #[must_use]
    pub fn record_at(&self, at: usize) -> Option<&crate::trust::record::SignedRecord> {
        self.log.get(at)
    }
}

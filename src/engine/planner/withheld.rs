//! Records that peers know and the coordinator does not show: it gets them back, and who keeps them back is named.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::drops::Drop;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::trust::record::{Record, SignedRecord};
use crate::wire::keys::Digest32;

/// The coordinator hands a record to all nodes at about the same time: after so long it lacks it.
const GIVE_AFTER: Duration = Duration::from_secs(5);
/// It was given, and does not show it: it keeps it back.
const NAME_AFTER: Duration = Duration::from_secs(15);

/// Records that came from peers only.
#[derive(Debug, Default)]
pub(super) struct Withheld {
    records: BTreeMap<Digest32, One>,
    /// Since when the coordinator's log is read to its end on this connection.
    read_since: Option<Now>,
}

#[derive(Debug, Clone, Copy)]
struct One {
    since: Now,
    is_revoke: bool,
    given: bool,
}

impl Planner {
    /// Judges a record that a peer sent, as one from the coordinator is. True: new and accepted.
    pub(super) fn admit_from_peer(&mut self, record: &SignedRecord) -> bool {
        match self.judge(record) {
            Ok(true) => {
                self.freshen_routes();
                let is_revoke = matches!(record.open(), Ok(Record::Revoke(_)));
                let one = One { since: self.now, is_revoke, given: false };
                self.withheld.records.insert(record.id(), one);
                self.schedule_withheld();
                true
            }
            Ok(false) => false,
            Err(why) => {
                // Perhaps one that it follows from was lost on the way.
                tracing::debug!(%why, "refused a record from a peer");
                self.drops.count(Drop::RefusedRecord);
                false
            }
        }
    }

    /// The coordinator shows a record.
    pub(super) fn was_shown(&mut self, id: &Digest32) {
        self.withheld.records.remove(id);
    }

    /// The coordinator's log is read to its end, or (None) there is no coordinator.
    pub(super) fn log_is_read(&mut self, since: Option<Now>) {
        self.withheld.read_since = since.map(|now| self.withheld.read_since.unwrap_or(now));
        if since.is_none() {
            self.withheld.records.values_mut().for_each(|one| one.given = false);
        }
        self.schedule_withheld();
    }

    fn schedule_withheld(&mut self) {
        let next = self.withheld.read_since.and_then(|read| {
            self.withheld.records.values().filter(|one| !one.given).map(|one| one.since.max(read) + GIVE_AFTER).min()
        });
        self.timers.set(Why::Withheld, next.map(|at| at.max(self.now)));
    }

    /// Gives the coordinator what it lacks.
    pub(super) fn withheld_due(&mut self) {
        let now = self.now;
        let Some(read) = self.withheld.read_since else { return };
        let due: Vec<Digest32> = self
            .withheld
            .records
            .iter_mut()
            .filter(|(_, one)| !one.given && one.since.max(read) + GIVE_AFTER <= now)
            .map(|(id, one)| {
                one.given = true;
                *id
            })
            .collect();
        let mut places: Vec<usize> = due.iter().filter_map(|id| self.ledger.position(id)).collect();
        places.sort_unstable();
        let records = places.into_iter().filter_map(|at| self.ledger.record_at(at).cloned()).collect();
        self.give_to_coordinator(records);
        self.schedule_withheld();
    }

    /// Records that the coordinator keeps back: how many, how many removals among them, and since when.
    pub(super) fn kept_back(&self, now: Now) -> Option<(usize, usize, Now)> {
        let read = self.withheld.read_since?;
        let kept: Vec<&One> =
            self.withheld.records.values().filter(|one| now.since(one.since.max(read)) >= NAME_AFTER).collect();
        let since = kept.iter().map(|one| one.since.max(read)).min()?;
        Some((kept.len(), kept.iter().filter(|one| one.is_revoke).count(), since))
    }
}

//! Unhealthy conditions that only the shell sees. Those of the network and its coordinator are the planner's.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::os::clock;
use crate::time::Now;
use crate::wire::local::{self, Severity};

/// The conditions that hold now. Clones are the same list.
#[derive(Debug, Clone, Default)]
pub(super) struct Health(Arc<Mutex<BTreeMap<&'static str, Condition>>>);

#[derive(Debug)]
struct Condition {
    severity: Severity,
    text: String,
    hint: String,
    since: Now,
}

impl Health {
    /// A condition holds. Said again, it keeps its time.
    pub(super) fn set(&self, code: &'static str, severity: Severity, text: impl Into<String>, hint: impl Into<String>) {
        let (text, hint) = (text.into(), hint.into());
        let mut conditions = self.0.lock();
        match conditions.get_mut(code) {
            Some(known) => {
                known.severity = severity;
                known.text = text;
                known.hint = hint;
            }
            None => {
                tracing::warn!(code, "{text}");
                conditions.insert(code, Condition { severity, text, hint, since: clock::now() });
            }
        }
    }

    /// A condition does not hold any more.
    pub(super) fn clear(&self, code: &'static str) {
        if self.0.lock().remove(code).is_some() {
            tracing::info!(code, "a health condition is over");
        }
    }

    /// The conditions as they go into the status document.
    pub(super) fn list(&self) -> Vec<local::Health> {
        let now = clock::now();
        self.0
            .lock()
            .iter()
            .map(|(code, c)| local::Health {
                code: (*code).to_owned(),
                severity: c.severity,
                text: c.text.clone(),
                hint: c.hint.clone(),
                since_s: now.since(c.since).as_secs(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_said_twice_is_one_and_is_gone_when_cleared() {
        let health = Health::default();
        health.set("a", Severity::Warning, "first", "");
        health.clone().set("a", Severity::Error, "second", "hint");
        let list = health.list();
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].text.as_str(), list[0].severity), ("second", Severity::Error));
        health.clear("a");
        assert!(health.list().is_empty());
    }
}

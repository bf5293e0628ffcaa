//! Why and when the daemon stops.

use tokio::sync::watch;

use crate::wire::local::Problem;

/// Asks the daemon to stop. Clones are the same; the first reason counts.
#[derive(Debug, Clone)]
pub(super) struct Stopper(watch::Sender<Option<Reason>>);

/// Why the daemon stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reason {
    /// Somebody wants it.
    Asked(&'static str),
    /// It cannot go on.
    Failed(Problem),
}

impl Stopper {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Somebody wants the daemon to stop.
    pub(super) fn stop(&self, why: &'static str) {
        self.give(Reason::Asked(why));
    }

    /// The daemon cannot go on.
    pub(super) fn fail(&self, why: Problem) {
        self.give(Reason::Failed(why));
    }

    fn give(&self, reason: Reason) {
        self.0.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(reason);
            }
            first
        });
    }

    /// Waits until the daemon is to stop.
    pub(super) async fn reason(&self) -> Reason {
        let mut watch = self.0.subscribe();
        match watch.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(Reason::Asked("")),
            Err(_) => Reason::Asked(""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_counts_and_is_not_missed() {
        let stopper = Stopper::new();
        stopper.stop("first");
        stopper.clone().stop("second");
        assert_eq!(stopper.reason().await, Reason::Asked("first"));
    }
}

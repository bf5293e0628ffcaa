//! What both links to the coordinator have in common: who is called, how long to wait between tries, and how a link that
//! broke is put in words.

use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, RngExt};
use tokio::sync::{Notify, watch};

use crate::daemon::problem;
use crate::link::{LinkError, Proxies, Target, close};
use crate::trust::keys::Secret32;
use crate::wire::keys::ControlKey;
use crate::wire::local::Problem;

/// Everything from name resolution to the last handshake message. Shorter than the kernel's patience, so that a
/// coordinator that comes back is found by a fresh try.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(6);
/// Pauses between tries. Never longer than the last, so that all nodes are back within 10 s of the coordinator.
const PAUSES_MS: [u64; 5] = [200, 500, 1_000, 2_000, 3_000];

/// The coordinator as a node knows it, and the node as the coordinator knows it.
#[derive(Debug)]
pub(super) struct Coordinator {
    /// URLs, the first tried first.
    pub(super) urls: Vec<String>,
    /// The coordinator's Noise key.
    pub(super) key: ControlKey,
    /// The node's control secret.
    pub(super) secret: Secret32,
    /// The proxies on the way, if any.
    pub(super) proxies: Arc<Proxies>,
}

impl Coordinator {
    /// The `n`th try's target: the URLs in turn.
    pub(super) fn target(&self, n: usize) -> Target<'_> {
        let url = self.urls.get(n % self.urls.len().max(1)).cloned().unwrap_or_default();
        Target { url, coordinator: self.key, secret: &self.secret, proxies: &self.proxies, timeout: CONNECT_TIMEOUT }
    }
}

/// Rings for a link task.
#[derive(Debug, Clone)]
pub(super) struct Bells {
    /// The network changed or the machine woke up: doubt the link, or try at once.
    pub(super) nudge: Arc<Notify>,
    /// The daemon stops.
    pub(super) stop: watch::Receiver<bool>,
}

impl Bells {
    /// The stop bell alone.
    pub(super) fn stop(&self) -> StopBell {
        StopBell(self.stop.clone())
    }
}

/// Rings when the daemon stops.
#[derive(Debug, Clone)]
pub(super) struct StopBell(watch::Receiver<bool>);

impl StopBell {
    /// Waits until the daemon stops.
    pub(super) async fn rung(&mut self) {
        // A sender that is gone means the same.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// Pauses between tries, with jitter so that a thousand nodes do not come back at once.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: usize,
}

impl Backoff {
    /// The link was up: begin anew.
    pub(super) const fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next try: half to the whole of the step.
    pub(super) fn pause(&mut self, rng: &mut impl Rng) -> Duration {
        let step = PAUSES_MS[self.failures.min(PAUSES_MS.len() - 1)];
        self.failures = self.failures.saturating_add(1);
        Duration::from_millis(rng.random_range(step / 2..=step))
    }
}

/// A link that was up and broke.
pub(super) fn broken(e: &LinkError) -> Problem {
    match e {
        LinkError::Closed { code: close::NOT_A_MEMBER, .. } => problem(
            "not-a-member",
            "the coordinator says that this node is not a member of its network",
            "if it was removed on purpose, join anew with a new invite and another `--state-dir`; else look at the coordinator's log",
        ),
        LinkError::Closed { code: close::REPLACED, .. } => problem(
            "replaced",
            "another process with this node's keys connected to the coordinator",
            "the state directory was copied to another machine; give that one an identity of its own with a new invite",
        ),
        LinkError::Broken(how) => lost(how),
        _ => lost(&e.to_string()),
    }
}

fn lost(how: &str) -> Problem {
    problem(
        "coordinator-lost",
        format!("the connection to the coordinator was lost: {how}"),
        "meshd keeps trying; existing direct paths go on meanwhile",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_anew_after_success() {
        let mut backoff = Backoff::default();
        let rng = &mut rand::rng();
        assert!(backoff.pause(rng) <= Duration::from_millis(200));
        for _ in 0..50 {
            assert!(backoff.pause(rng) <= Duration::from_secs(3));
        }
        assert!(backoff.pause(rng) >= Duration::from_millis(1_500));
        backoff.reset();
        assert!(backoff.pause(rng) <= Duration::from_millis(200));
    }

    #[test]
    fn urls_are_tried_in_turn() {
        let coordinator = Coordinator {
            urls: vec!["https://a".into(), "https://b".into()],
            key: ControlKey([0; 32]),
            secret: Secret32::new([1; 32]),
            proxies: Arc::new(Proxies::direct()),
        };
        let urls: Vec<_> = (0..3).map(|n| coordinator.target(n).url).collect();
        assert_eq!(urls, ["https://a", "https://b", "https://a"]);
    }
}

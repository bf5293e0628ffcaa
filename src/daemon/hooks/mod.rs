//! Runs a person's program with each thing that happens (`--on-event`).
//!
//! One task looks at the node when something may have changed, compares ([`crate::engine::happened`]), and hands what happened
//! to the program, one call at a time. What waits is bounded and what is dropped is counted; a call that takes too long is
//! ended. Nothing in the daemon ever waits for the program.

mod program;

use std::collections::VecDeque;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};

use crate::daemon::health::Health;
use crate::daemon::local_api::Api;
use crate::daemon::settings::Settings;
use crate::engine::happened::{ABOUT_HOOKS, Seen};
use crate::engine::io::{Event, RoutePlan};
use crate::os::clock;
use crate::wire::hook::{Happened, HookEvent, VERSION};
use crate::wire::local::{Problem, Severity};

pub(super) use program::check;

/// Events that may wait for the program; more are dropped, the newest first.
const QUEUE: usize = 1_024;
/// The node is looked at this often: health and presence ring no bell.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// And not sooner after the last look, however much happens.
const REST: Duration = Duration::from_millis(100);
/// A look at a large network takes longer; this many times as long it rests.
const REST_TIMES: u32 = 50;
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the task needs.
pub(super) struct Wiring {
    pub(super) api: Arc<Api>,
    pub(super) settings: watch::Receiver<Settings>,
    pub(super) events: broadcast::Receiver<Event>,
    pub(super) plan: watch::Receiver<RoutePlan>,
    pub(super) health: Health,
}

/// What waits for the program.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<HookEvent>,
    /// Events so far, dropped ones among them.
    seq: u64,
    dropped: u64,
}

impl Queue {
    fn push(&mut self, what: Happened, network: &str, node: &str) {
        self.seq += 1;
        if self.waiting.len() >= QUEUE {
            self.dropped += 1;
            return;
        }
        self.waiting.push_back(HookEvent {
            v: VERSION,
            seq: self.seq,
            time: clock::wall(),
            dropped: self.dropped,
            network: network.to_owned(),
            node: node.to_owned(),
            what,
        });
    }
}

/// A call of the program that is under way.
type Running = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// Runs until it is aborted; a call under way is then ended.
pub(super) async fn run(mut w: Wiring) {
    let mut queue = Queue::default();
    loop {
        let program = w.settings.borrow_and_update().on_event.clone();
        match program {
            Some(program) => {
                tracing::info!(program = %program.display(), "this program hears of events");
                if !serve(&mut w, &program, &mut queue).await {
                    return;
                }
                // Another one begins with what is so, and not with what the last one has missed.
                queue.waiting.clear();
            }
            None => {
                w.health.clear(ABOUT_HOOKS);
                if w.settings.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Until another program, or none, is to be run. False: the daemon stops.
async fn serve(w: &mut Wiring, program: &Path, queue: &mut Queue) -> bool {
    let mut seen = Seen::default();
    let mut running: Option<Running> = None;
    let (mut due, mut earliest) = (Instant::now(), Instant::now());
    loop {
        if running.is_none()
            && let Some(event) = queue.waiting.pop_front()
        {
            tracing::debug!(kind = event.what.kind(), seq = event.seq, "the program hears of an event");
            running = Some(Box::pin(program::call(program.to_owned(), event, PATIENCE)));
        }
        let ended = async {
            match &mut running {
                Some(call) => call.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = ended => {
                running = None;
                note(&w.health, program, queue, result);
            }
            () = sleep_until(due) => {
                let began = Instant::now();
                let Ok((network, node, now)) = look(&w.api).await else { return false };
                for what in now.since(&seen) {
                    queue.push(what, &network, &node);
                }
                seen = now;
                earliest = Instant::now() + REST.max(began.elapsed() * REST_TIMES);
                due = earliest.max(began + LOOK_EVERY);
            }
            told = w.events.recv() => match told {
                Err(broadcast::error::RecvError::Closed) => return false,
                // Whatever it was, and however many were missed: the look shows what is so.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => due = due.min(earliest),
            },
            changed = w.plan.changed() => match changed {
                Ok(()) => due = due.min(earliest),
                Err(_) => return false,
            },
            changed = w.settings.changed() => match changed {
                Ok(()) if w.settings.borrow().on_event.as_deref() == Some(program) => {}
                Ok(()) => return true,
                Err(_) => return false,
            },
        }
    }
}

/// How a call ended, for the log and for `meshd status`.
fn note(health: &Health, program: &Path, queue: &Queue, result: Result<(), String>) {
    let hint = "run it by hand with a line of docs/reference/events.md on its standard input; the log has what it says";
    match result {
        Ok(()) if queue.waiting.len() < QUEUE / 2 => health.clear(ABOUT_HOOKS),
        Ok(()) if queue.dropped > 0 => {
            let text = format!("{} is too slow: {} events were dropped", program.display(), queue.dropped);
            health.set(ABOUT_HOOKS, Severity::Warning, text, "let it do in the background what takes long");
        }
        Ok(()) => {}
        Err(why) => {
            let text = format!("the program for events, {}, {why}", program.display());
            tracing::warn!(code = ABOUT_HOOKS, "{text}");
            health.set(ABOUT_HOOKS, Severity::Warning, text, hint);
        }
    }
}

/// The network's and the node's name, and what is so.
async fn look(api: &Api) -> Result<(String, String, Seen), Problem> {
    let status = api.status().await?;
    let shadowed = api.shadowed.borrow().clone();
    let routes = api.planner.with(move |planner, _| planner.route_lines(&shadowed)).await?;
    Ok((status.network.name.clone(), status.me.name.clone(), Seen::of(status, &routes)))
}

/// The word or path of the setting.
pub(super) fn chosen(text: &str) -> Result<Option<PathBuf>, Problem> {
    if text == "none" {
        return Ok(None);
    }
    let program = PathBuf::from(text);
    check(&program)?;
    Ok(Some(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_dropped_counted_and_seen_in_the_numbers() {
        let mut queue = Queue::default();
        let route = |n: usize| Happened::Route {
            prefix: format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap(),
            via: None,
            before: None,
        };
        for n in 0..QUEUE + 5 {
            queue.push(route(n), "home", "nas");
        }
        assert_eq!((queue.waiting.len(), queue.dropped), (QUEUE, 5));
        queue.waiting.pop_front();
        queue.push(route(0), "home", "nas");
        let last = queue.waiting.back().unwrap();
        assert_eq!((last.seq, last.dropped), (QUEUE as u64 + 6, 5));
    }
}

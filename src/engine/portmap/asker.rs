//! One request to the router, repeated until it is answered or given up.

use std::time::Duration;

use crate::time::Now;

/// How long each sending waits for an answer. Three, in 1.25 s: the router is on the same network.
const PATIENCE: [Duration; 3] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(500)];

/// Why the router is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Purpose {
    /// To learn whether it speaks the protocol.
    #[default]
    Probe,
    /// For a mapping, new or renewed.
    Map,
    /// To learn whether it still has the mapping.
    Check,
    /// To end a mapping.
    Delete,
}

/// What is known of the router and one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Heard {
    /// It was not asked.
    #[default]
    Nothing,
    /// It did not answer.
    Silence,
    /// It answers.
    Answer,
    /// It answers, and refuses.
    Refusal(String),
}

/// The exchange of one protocol.
#[derive(Debug, Default)]
pub(super) struct Asker {
    pub(super) heard: Heard,
    pub(super) purpose: Purpose,
    request: Vec<u8>,
    sent: usize,
    next: Option<Now>,
}

/// What is to be done at a time.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing yet.
    Wait,
    /// Send this.
    Send(Vec<u8>),
    /// Nobody answered.
    GaveUp,
}

impl Asker {
    /// Begins to ask at a time, instead of what was asked before.
    pub(super) fn start(&mut self, purpose: Purpose, request: Vec<u8>, at: Now) {
        (self.purpose, self.request, self.sent, self.next) = (purpose, request, 0, Some(at));
    }

    /// Asks now what was to be asked later.
    pub(super) fn hurry(&mut self, now: Now) {
        if self.sent == 0 && self.next.is_some() {
            self.next = Some(now);
        }
    }

    /// Waits for an answer, or to begin.
    pub(super) const fn is_under_way(&self) -> bool {
        self.next.is_some()
    }

    /// Has been sent and waits for an answer for that purpose.
    pub(super) fn waits_for(&self, purpose: Purpose) -> bool {
        self.next.is_some() && self.sent > 0 && self.purpose == purpose
    }

    /// It is known that this protocol brings no mapping.
    pub(super) const fn is_hopeless(&self) -> bool {
        self.next.is_none() && matches!(self.heard, Heard::Silence | Heard::Refusal(_))
    }

    /// Asks no more; what was heard stays.
    pub(super) fn stop(&mut self) {
        self.next = None;
    }

    pub(super) const fn timeout(&self) -> Option<Now> {
        self.next
    }

    /// To be repeated while it does not say [`Step::Wait`].
    pub(super) fn step(&mut self, now: Now) -> Step {
        if self.next.is_none_or(|at| at > now) {
            return Step::Wait;
        }
        let Some(patience) = PATIENCE.get(self.sent) else {
            self.next = None;
            if self.purpose != Purpose::Check {
                self.heard = Heard::Silence;
            }
            return Step::GaveUp;
        };
        self.sent += 1;
        self.next = Some(now + *patience);
        Step::Send(self.request.clone())
    }
}

//! What members ask, and handing the log on to them.

use std::time::Duration;

use crate::coord::coordinator::{Coordinator, Listening};
use crate::coord::io::ConnId;
use crate::coord::refusals::Refused;
use crate::coord::writes::{Answer, Waiter};
use crate::time::UnixSeconds;
use crate::trust::ledger::{Change, Judge};
use crate::trust::record::SignedRecord;
use crate::wire::control::{LOG_CHUNK, MAX_MESSAGE, ToNode};
use crate::wire::keys::{ControlKey, Digest32};

/// How many `Log` messages are sent to one node before it is given time to take them.
pub(super) const LOG_WINDOW: usize = 16;
/// How long it is given, unless the shell says earlier that they are on their way.
const LOG_PAUSE: Duration = Duration::from_millis(500);
/// Room in a message for everything but its records.
pub(super) const MESSAGE_FRAME: usize = 1_024;

impl Coordinator {
    pub(super) fn hello(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        have: u64,
        head: Digest32,
        wall: UnixSeconds,
    ) -> Result<(), Refused> {
        let common = self.common_prefix(have, head);
        let wg = match self.expect_member(&key) {
            Ok(member) => member.wg,
            Err(refused) => {
                // Our word that it was revoked means nothing to the node; the record does.
                if let Some(revoke) = self.stored_revoke(&key) {
                    self.send_farewell(conn, common, revoke + 1);
                }
                return Err(refused);
            }
        };
        self.welcome_in(conn);
        let observed = self.conns.get(&conn).and_then(|c| c.from);
        let (version, stun) = (self.config.version.clone(), self.config.stun.clone());
        self.send(conn, ToNode::Welcome { re, version, now: wall, stun, observed });
        if let Some(renewed) = self.relay_spent {
            self.send(conn, ToNode::RelayBudget { spent: true, renewed });
        }
        if let Some(c) = self.conns.get_mut(&conn) {
            let earlier = c.listening.replace(Listening { wg, sent: common, complete: false, paused_until: None });
            if let Some(until) = earlier.and_then(|l| l.paused_until) {
                self.pauses.remove(&(until, conn));
            }
        }
        self.listeners.insert(conn);
        self.presence.came(wg, conn, self.now);
        self.send_log(conn);
        Ok(())
    }

    pub(super) fn publish(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        records: &[SignedRecord],
        now: UnixSeconds,
    ) -> Result<(), Refused> {
        let sender = self.expect_member(&key)?.identity;
        if records.len() > LOG_CHUNK {
            return Err(Refused::bad_request(format!("more than {LOG_CHUNK} records at once")));
        }
        let Some(ledger) = &mut self.ledger else { return Err(Refused::no_network()) };
        // An admin may put back members that a restored store lacks, whose invites expired long ago. It gains nothing by it:
        // it could sign a new invite.
        let judge = if ledger.is_admin(&sender) { Judge::Reader } else { Judge::Coordinator(now) };
        let changes = ledger.admit_all(records, judge).map_err(|(_, refusal)| Refused::of_record(&refusal))?;
        let waiter = Waiter { conn, re, answer: Answer::Published };
        if changes.iter().any(|change| *change != Change::Known) {
            self.store(changes, waiter);
        } else {
            let last = records.iter().filter_map(|r| ledger.position(&r.id())).max();
            match last {
                Some(at) => self.answer_when_stored(at, waiter),
                None => self.answer(waiter),
            }
        }
        Ok(())
    }

    /// How much of our stored log a node holds that says it has `have` records with this head.
    pub(super) fn common_prefix(&self, have: u64, head: Digest32) -> usize {
        let have = usize::try_from(have).unwrap_or(usize::MAX);
        let same = self.ledger.as_ref().and_then(|ledger| ledger.head_after(have)) == Some(head);
        if same && have <= self.durable { have } else { 0 }
    }

    /// Sends a listener what it lacks of the stored log, at most [`LOG_WINDOW`] messages at once; the first time the log is
    /// complete, also the full presence.
    pub(super) fn send_log(&mut self, conn: ConnId) {
        let Some(mut listening) = self.conns.get(&conn).and_then(|c| c.listening) else { return };
        if listening.paused_until.is_some() {
            return;
        }
        for _ in 0..LOG_WINDOW {
            listening.sent = self.send_chunk(conn, listening.sent, self.durable);
            if listening.sent == self.durable {
                break;
            }
        }
        if listening.sent < self.durable {
            let until = self.now + LOG_PAUSE;
            self.pauses.insert((until, conn));
            listening.paused_until = Some(until);
        } else if !listening.complete {
            listening.complete = true;
            let all = self.presence.full().into_iter().chain(self.adverts.full());
            all.collect::<Vec<_>>().into_iter().for_each(|message| self.send(conn, message));
        }
        if let Some(c) = self.conns.get_mut(&conn) {
            c.listening = Some(listening);
        }
    }

    /// Goes on with a log that was paused.
    pub(super) fn resume(&mut self, conn: ConnId) {
        let listening = self.conns.get_mut(&conn).and_then(|c| c.listening.as_mut());
        let Some(until) = listening.and_then(|listening| listening.paused_until.take()) else { return };
        self.pauses.remove(&(until, conn));
        self.send_log(conn);
    }

    /// Sends a node that was revoked the log up to its Revoke.
    pub(super) fn send_farewell(&mut self, conn: ConnId, common: usize, end: usize) {
        let mut sent = common;
        for _ in 0..LOG_WINDOW {
            if sent >= end {
                break;
            }
            sent = self.send_chunk(conn, sent, end);
        }
    }

    /// Sends one `Log` message of records `from..`, ending before `end` at the latest. Returns where it ended.
    pub(super) fn send_chunk(&mut self, conn: ConnId, from: usize, end: usize) -> usize {
        let Some(ledger) = &self.ledger else { return end };
        let rest = ledger.log().get(from..end).unwrap_or_default();
        let mut room = MAX_MESSAGE - MESSAGE_FRAME;
        let fits = |record: &&SignedRecord| {
            let size = json_size(record);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        };
        let records: Vec<SignedRecord> = rest.iter().take(LOG_CHUNK).take_while(fits).cloned().collect();
        let upto = from + records.len();
        let head = ledger.head_after(upto).unwrap_or_default();
        let message = ToNode::Log { from: from as u64, records, head, end: upto == end };
        self.send(conn, message);
        upto
    }
}

/// At most this many bytes of JSON: escaping at most doubles a payload, which is JSON itself.
pub(super) fn json_size(record: &SignedRecord) -> usize {
    2 * record.payload.len() + 512
}

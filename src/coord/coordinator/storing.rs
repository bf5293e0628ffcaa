//! Having records stored, and what follows when they are or are not.

use crate::coord::coordinator::Coordinator;
use crate::coord::io::{ConnId, Output, why};
use crate::coord::refusals::Refused;
use crate::coord::writes::{Answer, InFlight, Waiter, Write};
use crate::trust::ledger::Change;
use crate::wire::control::ToNode;
use crate::wire::keys::{ControlKey, IdentityKey};

impl Coordinator {
    /// Has what was just admitted stored, then answers.
    pub(super) fn store(&mut self, changes: Vec<Change>, waiter: Waiter) {
        self.next.changes.extend(changes.into_iter().filter(|change| *change != Change::Known));
        self.next.waiters.push(waiter);
        self.start_write();
    }

    /// Answers once the record at this position of the log is stored.
    pub(super) fn answer_when_stored(&mut self, at: usize, waiter: Waiter) {
        if at < self.durable {
            self.answer(waiter);
        } else if let Some(in_flight) = self.in_flight.as_mut().filter(|w| at < w.end) {
            in_flight.write.waiters.push(waiter);
        } else {
            self.next.waiters.push(waiter);
        }
    }

    pub(super) fn start_write(&mut self) {
        if self.in_flight.is_some() || self.next.is_empty() {
            return;
        }
        let Some(ledger) = &self.ledger else { return };
        let write = std::mem::take(&mut self.next);
        self.tickets += 1;
        let records = ledger.log().get(self.durable..).unwrap_or_default().to_vec();
        let end = ledger.log().len();
        self.outputs.push_back(Output::Persist { ticket: self.tickets, records, claim_spent: write.claim_spent });
        self.in_flight = Some(InFlight { ticket: self.tickets, end, write });
    }

    pub(super) fn persisted(&mut self, ticket: u64, ok: bool) {
        let Some(InFlight { end, write, .. }) = self.in_flight.take_if(|w| w.ticket == ticket) else { return };
        if !ok {
            self.store_failed(write);
            return;
        }
        self.durable = end;
        let expelled = self.tell_relay(&write.changes);
        write.waiters.into_iter().for_each(|waiter| self.answer(waiter));
        let listeners: Vec<ConnId> = self.listeners.iter().copied().collect();
        listeners.into_iter().for_each(|conn| self.send_log(conn));
        for key in expelled {
            if let Some(conn) = self.by_key.get(&key).copied() {
                self.close(conn, why::REVOKED);
            }
        }
        self.start_write();
    }

    /// Nothing was stored: what was admitted since is taken back, and everybody who waits is told.
    pub(super) fn store_failed(&mut self, write: Write) {
        if let Some(ledger) = &mut self.ledger {
            ledger.truncate(self.durable);
        }
        if self.durable == 0 {
            self.ledger = None;
        }
        let next = std::mem::take(&mut self.next);
        for waiter in write.waiters.into_iter().chain(next.waiters) {
            self.send(waiter.conn, Refused::store_failed().answer(waiter.re));
        }
    }

    /// Tells the relay who came and who is out. Returns the control keys of those who are out.
    pub(super) fn tell_relay(&mut self, changes: &[Change]) -> Vec<ControlKey> {
        for change in changes {
            if let Change::MemberRevoked(who) = change {
                self.forget_advert(who);
            }
        }
        let Some(ledger) = &self.ledger else { return Vec::new() };
        let keys = |who: &IdentityKey| ledger.member_ever(who).map(|m| (m.control, m.wg));
        let mut expelled = Vec::new();
        for change in changes {
            match change {
                Change::MemberAdded(who) => {
                    self.outputs.extend(keys(who).map(|(c, wg)| Output::RelayAdmit { control: c, wg }))
                }
                Change::MemberRevoked(who) => {
                    if let Some((control, wg)) = keys(who) {
                        self.outputs.push_back(Output::RelayExpel { control, wg });
                        expelled.push(control);
                    }
                }
                Change::Known
                | Change::Founded
                | Change::AdminAdded(_)
                | Change::InviteAdded(_)
                | Change::InviteRevoked(_)
                | Change::RouteGranted(_)
                | Change::RouteRevoked(_)
                | Change::NamesChanged
                | Change::AliasChanged(_) => {}
            }
        }
        expelled
    }

    pub(super) fn answer(&mut self, waiter: Waiter) {
        let Waiter { conn, re, answer } = waiter;
        match answer {
            Answer::Joined => {
                self.welcome_in(conn);
                self.send(conn, ToNode::Joined { re });
            }
            Answer::Published => self.send(conn, ToNode::Published { re }),
        }
    }
}

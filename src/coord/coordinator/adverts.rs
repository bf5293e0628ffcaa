//! Handing on what members say of themselves that they lead to. Not stored: a node says it again on every connection, and
//! the others keep what they have heard.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::coord::coordinator::Coordinator;
use crate::coord::coordinator::log::MESSAGE_FRAME;
use crate::coord::io::ConnId;
use crate::coord::presence::BATCH;
use crate::coord::refusals::Refused;
use crate::time::Now;
use crate::trust::advert::{AdvertError, SignedAdvert};
use crate::wire::control::{MAX_MESSAGE, ToNode, refusal};
use crate::wire::keys::{ControlKey, IdentityKey};

/// How often one connection may change what its node leads to: so many at once, then one each [`EVERY`].
const BURST: u32 = 10;
/// See [`BURST`].
const EVERY: Duration = Duration::from_secs(1);
/// Bytes of advertisements kept in all.
const MAX_BYTES: usize = 4 << 20;

/// The newest advertisement of each member that has one.
#[derive(Debug, Default)]
pub(super) struct Adverts {
    newest: BTreeMap<IdentityKey, (u64, SignedAdvert)>,
    bytes: usize,
    /// Whose changed since listeners were told.
    changed: BTreeSet<IdentityKey>,
    due: Option<Now>,
}

impl Adverts {
    /// When changes are due to be told.
    pub(super) const fn due(&self) -> Option<Now> {
        self.due
    }

    /// Takes an advertisement. True: it is newer than what was known.
    fn take(&mut self, who: IdentityKey, number: u64, advert: SignedAdvert, now: Now) -> Result<bool, Refused> {
        let known = self.newest.get(&who);
        if known.is_some_and(|(newest, _)| *newest >= number) {
            return Ok(false);
        }
        let bytes = self.bytes - known.map_or(0, |(_, old)| old.payload.len()) + advert.payload.len();
        if bytes > MAX_BYTES {
            return Err(Refused::new(
                refusal::BAD_REQUEST,
                "the network advertises more prefixes than the coordinator keeps",
                "join neighbouring prefixes into wider ones",
            ));
        }
        self.bytes = bytes;
        self.newest.insert(who, (number, advert));
        self.changed.insert(who);
        self.due.get_or_insert(now + BATCH);
        Ok(true)
    }

    fn forget(&mut self, who: &IdentityKey) {
        if let Some((_, old)) = self.newest.remove(who) {
            self.bytes -= old.payload.len();
        }
        self.changed.remove(who);
    }

    /// The messages that tell listeners what changed, if it is time.
    pub(super) fn changes(&mut self, now: Now) -> Vec<ToNode> {
        if self.due.is_none_or(|due| now < due) {
            return Vec::new();
        }
        self.due = None;
        let changed = std::mem::take(&mut self.changed);
        messages(changed.iter().filter_map(|who| self.newest.get(who)).map(|(_, advert)| advert))
    }

    /// The messages that tell a new listener all of them.
    pub(super) fn full(&self) -> Vec<ToNode> {
        messages(self.newest.values().map(|(_, advert)| advert))
    }
}

fn messages<'a>(adverts: impl Iterator<Item = &'a SignedAdvert>) -> Vec<ToNode> {
    let mut messages = Vec::new();
    let (mut batch, mut room) = (Vec::new(), MAX_MESSAGE - MESSAGE_FRAME);
    for advert in adverts {
        // Escaping at most doubles a payload, which is JSON itself.
        let size = 2 * advert.payload.len() + 256;
        if size > room && !batch.is_empty() {
            messages.push(ToNode::Adverts { adverts: std::mem::take(&mut batch) });
            room = MAX_MESSAGE - MESSAGE_FRAME;
        }
        room = room.saturating_sub(size);
        batch.push(advert.clone());
    }
    if !batch.is_empty() {
        messages.push(ToNode::Adverts { adverts: batch });
    }
    messages
}

impl Coordinator {
    pub(super) fn advertise(
        &mut self,
        conn: ConnId,
        key: &ControlKey,
        re: u64,
        advert: SignedAdvert,
    ) -> Result<ToNode, Refused> {
        let who = self.expect_member(key)?.identity;
        let now = self.now;
        let Some(c) = self.conns.get_mut(&conn) else { return Err(Refused::not_a_member()) };
        let full_at = c.adverts_full_at.max(now) + EVERY;
        if full_at.since(now) > EVERY * BURST {
            return Err(Refused::new(
                refusal::RATE_LIMITED,
                "this node changes what it leads to too often",
                "it is said again with the next change",
            ));
        }
        c.adverts_full_at = full_at;
        let Some(ledger) = &self.ledger else { return Err(Refused::no_network()) };
        let opened = advert.open(&ledger.network()).map_err(|e| match e {
            AdvertError::WrongNetwork => Refused::bad_request(e.to_string()),
            e => Refused::bad_record(e.to_string()),
        })?;
        if opened.identity != who {
            return Err(Refused::bad_record("an advertisement is sent by the node it names"));
        }
        self.adverts.take(who, opened.number, advert, now)?;
        Ok(ToNode::Published { re })
    }

    pub(super) fn forget_advert(&mut self, who: &IdentityKey) {
        self.adverts.forget(who);
    }
}

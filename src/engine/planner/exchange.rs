//! Peers compare what they hold: the network's records, and their own advertisements. What a coordinator withholds comes so,
//! and what it cannot hand on because it is gone.
//!
//! A peer is trusted no more than the coordinator: the ledger judges what it sends. Only peers in use are talked to, a
//! summary says whether there is anything to talk about, and of what differs only so much is sent at once.
//!
//! ```text
//! A ── Summary ─────────► B    the same: B says so, once, and both are silent until something changes
//!                              A's log is the beginning of B's: B sends what follows
//!                              A's is longer: B answers with its own summary, and A does the same
//! A ◄─ Branch or Have ─── B    neither: B tells its ids, or where there are many, digests of sixteen parts; A goes on
//!                              where they differ, sends what B lacks, and tells its ids where it lacks something
//! A ◄─ Piece … ────────── B    records, in the order in which one follows from another
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use crate::engine::bucket::Bucket;
use crate::engine::drops::Drop;
use crate::engine::io::{Output, PeerId};
use crate::engine::packet::DATA_OVERHEAD;
use crate::engine::path::mtu::BASE;
use crate::engine::planner::{Planner, Why};
use crate::time::Now;
use crate::wire::keys::Digest32;
use crate::wire::peer::{
    Branch, Have, MAX_BODY, MAX_IDS, MAX_PARCEL, Message, PIECE_OVERHEAD, Parcel, Piece, Stem, Summary, short,
};

/// A session that came up, or a peer that shows what it is: probably more happens just now.
const SOON: Duration = Duration::from_millis(200);
/// After a change here: the coordinator tells most nodes at the same time.
const AFTER_CHANGE: Duration = Duration::from_secs(2);
/// The same without a coordinator, and after something came from the peer.
const AT_ONCE: Duration = Duration::from_millis(100);
/// The same summary is not repeated sooner.
const REPEAT: Duration = Duration::from_secs(1);
/// Waits between summaries while the two differ and nothing comes of it; the last one repeats.
const RETRY_S: [u64; 6] = [2, 5, 15, 60, 180, 600];
/// Bytes of parcels sent to one peer at once, and a second.
const GIVEN: u32 = 64 << 10;
/// Ids that cost as much as a message to look through.
const IDS_A_TOKEN: usize = 4_096;

/// What is known of what a peer holds.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// The last summary sent, and when.
    told: Option<(Summary, Now)>,
    /// The last one heard.
    theirs: Option<Summary>,
    due: Option<Now>,
    tries: usize,
    incoming: Option<Incoming>,
    parcels: u32,
    given: Bucket,
}

/// A parcel that is coming.
#[derive(Debug)]
struct Incoming {
    number: u32,
    total: usize,
    got: Vec<u8>,
}

impl Exchange {
    pub(crate) const fn new(now: Now) -> Self {
        Self {
            told: None,
            theirs: None,
            due: None,
            tries: 0,
            incoming: None,
            parcels: 0,
            given: Bucket::new(GIVEN, GIVEN, now),
        }
    }
}

impl Planner {
    // ---- when ------------------------------------------------------------------------------------------------------

    /// Something about the peer is new: see whether both hold the same.
    pub(super) fn compare_soon(&mut self, id: PeerId) {
        self.compare_in(id, SOON);
    }

    /// The records or this node's advertisement changed.
    pub(super) fn holdings_changed(&mut self) {
        let wait = if self.control.connected { AFTER_CHANGE } else { AT_ONCE };
        let ids: Vec<PeerId> =
            self.talking().filter(|(_, t)| t.speaks && t.is_wanted(self.now)).map(|(id, _)| id).collect();
        for (n, id) in (0u32..).zip(ids) {
            if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
                talk.exchange.tries = 0;
            }
            // Not all at the same moment.
            self.compare_in(id, wait + Duration::from_millis(u64::from(n % 1_000)));
        }
    }

    fn compare_in(&mut self, id: PeerId, wait: Duration) {
        let at = self.now + wait;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let due = talk.exchange.due.map_or(at, |due| due.min(at));
        talk.exchange.due = Some(due);
        self.timers.set(Why::Compare(id), Some(due));
    }

    /// Tells the peer what this node holds, if it does not know.
    pub(super) fn compare_due(&mut self, id: PeerId) {
        let now = self.now;
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.exchange.due = None;
        if !talk.is_wanted(now) || !self.can_tell(id) {
            return;
        }
        let ours = self.summary_for(id);
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let agreed = talk.exchange.theirs.is_some_and(|theirs| agree(&ours, &theirs));
        let known = talk.exchange.told.is_some_and(|(told, _)| same(&told, &ours));
        if agreed && known {
            return;
        }
        if !agreed {
            let wait = RETRY_S.get(talk.exchange.tries).or(RETRY_S.last()).copied().unwrap_or(600);
            talk.exchange.tries += 1;
            self.compare_in(id, Duration::from_secs(wait));
        }
        self.tell_summary(id, Summary { settled: agreed, ..ours });
    }

    fn tell_summary(&mut self, id: PeerId, summary: Summary) {
        let now = self.now;
        let Some(talk) = self.peer(id).and_then(|p| p.talk.as_deref()) else { return };
        if talk.exchange.told.is_some_and(|(told, at)| same(&told, &summary) && now.since(at) < REPEAT) {
            return;
        }
        if self.send_message(id, &Message::Summary(summary))
            && let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut())
        {
            talk.exchange.told = Some((summary, now));
        }
    }

    /// What this node holds, as told to that peer.
    fn summary_for(&mut self, id: PeerId) -> Summary {
        let count = self.ledger.log().len();
        let set = match self.set_digest {
            Some((at, digest)) if at == count => digest,
            _ => self.ledger.set_digest(&Stem::ALL),
        };
        self.set_digest = Some((count, set));
        let yours = self.peer(id).map_or(0, |peer| self.advert_number(&peer.identity));
        Summary {
            settled: false,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            head: self.ledger.head(),
            set,
            mine: self.advert_number(&self.me.identity),
            yours,
        }
    }

    // ---- what comes ------------------------------------------------------------------------------------------------

    /// What a message may cost to answer: digests are made of all ids that begin so.
    pub(super) fn cost_of(&self, message: &Message<'_>) -> u32 {
        let stem = match message {
            Message::Branch(branch) => branch.stem,
            Message::Have(have) => have.stem,
            // A summary may be answered by a branch of everything.
            Message::Summary(_) => Stem::ALL,
            Message::Piece(_) | Message::Pass { .. } | Message::Passed { .. } | Message::NoWay { .. } => return 1,
        };
        let ids = if stem == Stem::ALL { self.ledger.log().len() } else { self.ledger.under(&stem).count() };
        1 + u32::try_from(ids / IDS_A_TOKEN).unwrap_or(u32::MAX - 1).min(64)
    }

    pub(super) fn heard_summary(&mut self, id: PeerId, theirs: &Summary) {
        let ours = self.summary_for(id);
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        talk.exchange.theirs = Some(*theirs);
        if theirs.yours < ours.mine
            && let Some(own) = self.own_advert()
        {
            self.give(id, &Parcel::Advert(own));
        }
        let lacks_advert = theirs.mine > ours.yours;
        if theirs.set == ours.set {
            if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut())
                && agree(&ours, theirs)
            {
                talk.exchange.tries = 0;
                talk.exchange.due = None;
                self.timers.set(Why::Compare(id), None);
            }
            if !theirs.settled || lacks_advert {
                self.tell_summary(id, Summary { settled: agree(&ours, theirs), ..ours });
            }
            return;
        }
        let (count, held) = (usize::try_from(theirs.count).unwrap_or(usize::MAX), self.ledger.log().len());
        if self.ledger.head_after(count) == Some(theirs.head) {
            self.give_records(id, (count..held).collect());
        } else if count > held {
            self.tell_summary(id, ours);
        } else {
            self.compare_under(id, Stem::ALL);
        }
        self.compare_in(id, Duration::from_secs(RETRY_S[0]));
    }

    /// Tells all ids that begin so, or, where they are too many, digests.
    fn compare_under(&mut self, id: PeerId, stem: Stem) {
        let ids: Vec<_> = self.ledger.under(&stem).take(MAX_IDS + 1).map(|(id, _)| short(id)).collect();
        let message = if ids.len() <= MAX_IDS {
            Message::Have(Have { answer: false, stem, ids })
        } else {
            Message::Branch(Branch { stem, digests: std::array::from_fn(|digit| self.digest_of(&stem, digit)) })
        };
        self.send_message(id, &message);
    }

    fn digest_of(&self, stem: &Stem, digit: usize) -> [u8; 8] {
        let child = u8::try_from(digit).ok().and_then(|digit| stem.child(digit));
        child.map_or([0; 8], |child| short(&self.ledger.set_digest(&child)))
    }

    pub(super) fn heard_branch(&mut self, id: PeerId, theirs: &Branch) {
        for (digit, digest) in theirs.digests.iter().enumerate() {
            if self.digest_of(&theirs.stem, digit) != *digest
                && let Some(child) = u8::try_from(digit).ok().and_then(|digit| theirs.stem.child(digit))
            {
                self.compare_under(id, child);
            }
        }
    }

    pub(super) fn heard_have(&mut self, id: PeerId, theirs: &Have) {
        let listed: BTreeSet<[u8; 8]> = theirs.ids.iter().copied().collect();
        let ours: BTreeSet<[u8; 8]> = self.ledger.under(&theirs.stem).map(|(id, _)| short(id)).collect();
        let lacking = self.ledger.under(&theirs.stem).filter(|(id, _)| !listed.contains(&short(id)));
        let mut lacking: Vec<usize> = lacking.map(|(_, at)| at).collect();
        lacking.sort_unstable();
        self.give_records(id, lacking);
        if !theirs.answer && listed.iter().any(|id| !ours.contains(id)) && ours.len() <= MAX_IDS {
            let ids = ours.into_iter().collect();
            self.send_message(id, &Message::Have(Have { answer: true, stem: theirs.stem, ids }));
        }
    }

    pub(super) fn heard_piece(&mut self, id: PeerId, piece: &Piece<'_>) {
        let (total, offset) = (usize::try_from(piece.total), usize::try_from(piece.offset));
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return };
        let (Ok(total), Ok(offset)) = (total, offset) else { return };
        if offset == 0 {
            talk.exchange.incoming = Some(Incoming { number: piece.number, total, got: Vec::new() });
        }
        let mut parcel = talk.exchange.incoming.take();
        match &mut parcel {
            Some(p) if p.number == piece.number && p.total == total && p.got.len() == offset && total <= MAX_PARCEL => {
                p.got.extend_from_slice(piece.bytes);
            }
            // One before it was lost, or overtaken. What is lacking then is found again.
            _ => {
                self.drops.count(Drop::BadPeerMessage);
                return;
            }
        }
        match parcel {
            Some(whole) if whole.got.len() == whole.total => self.heard_parcel(id, &whole.got),
            unfinished => talk.exchange.incoming = unfinished,
        }
    }

    fn heard_parcel(&mut self, id: PeerId, bytes: &[u8]) {
        match Parcel::decode(bytes) {
            Some(Parcel::Record(record)) => {
                if self.admit_from_peer(&record) {
                    self.outputs.push_back(Output::Persist(vec![record]));
                    if let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) {
                        talk.exchange.tries = 0;
                    }
                    self.compare_in(id, AT_ONCE);
                }
            }
            Some(Parcel::Advert(advert)) => {
                self.heard_adverts(&[advert]);
                self.compare_in(id, AT_ONCE);
            }
            None => self.drops.count(Drop::BadPeerMessage),
        }
    }

    // ---- what is given ---------------------------------------------------------------------------------------------

    /// Sends the records at these places of the log, as many as may be sent now; what is left is found lacking again.
    fn give_records(&mut self, id: PeerId, places: Vec<usize>) {
        for at in places {
            let Some(record) = self.ledger.record_at(at).cloned() else { continue };
            if !self.give(id, &Parcel::Record(record)) {
                return;
            }
        }
    }

    /// Sends a parcel in pieces. False: too much was sent lately, or there is no way.
    fn give(&mut self, id: PeerId, parcel: &Parcel) -> bool {
        let now = self.now;
        let bytes = parcel.encode();
        let Some(talk) = self.peer_mut(id).and_then(|p| p.talk.as_deref_mut()) else { return false };
        let Ok(total) = u32::try_from(bytes.len()) else { return false };
        // A parcel that is more than may be sent at once costs all of that.
        if !talk.exchange.given.take(total.min(GIVEN), now) {
            return false;
        }
        let number = talk.exchange.parcels;
        talk.exchange.parcels = number.wrapping_add(1);
        let inner = talk.agent.mtu().map_or(BASE, |(size, _)| size.min(BASE));
        let room = usize::from(inner).saturating_sub(PIECE_OVERHEAD + DATA_OVERHEAD).clamp(256, MAX_BODY - 12);
        let mut offset = 0;
        bytes.chunks(room).all(|chunk| {
            let sent = self.send_message(id, &Message::Piece(Piece { number, total, offset, bytes: chunk }));
            offset = offset.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
            sent
        })
    }
}

/// The same is held, as far as summaries tell.
fn same(a: &Summary, b: &Summary) -> bool {
    (a.count, a.head, a.set, a.mine, a.yours) == (b.count, b.head, b.set, b.mine, b.yours)
}

/// Neither lacks anything that the other holds.
fn agree(ours: &Summary, theirs: &Summary) -> bool {
    ours.set == theirs.set && theirs.yours >= ours.mine && ours.yours >= theirs.mine
}

/// The digest of the set of records, and of how many it was made.
pub(super) type SetDigest = Option<(usize, Digest32)>;

//! What guests ask: to found the network, to be proposed an address and a name, to join.

use subtle::ConstantTimeEq;

use crate::coord::coordinator::log::{MESSAGE_FRAME, json_size};
use crate::coord::coordinator::{Coordinator, claim_digest};
use crate::coord::io::ConnId;
use crate::coord::refusals::Refused;
use crate::coord::reservations::Proposed;
use crate::coord::writes::{Answer, Waiter};
use crate::time::UnixSeconds;
use crate::trust::ledger::{Change, Judge, Ledger, Refusal};
use crate::trust::names::{dns_label, label_from_hostname};
use crate::trust::record::SignedRecord;
use crate::wire::control::{MAX_MESSAGE, ToNode};
use crate::wire::keys::{ControlKey, Digest32, InviteKey, NetworkId};

impl Coordinator {
    pub(super) fn found(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        claim: &Digest32,
        records: &[SignedRecord],
    ) -> Result<(), Refused> {
        let waiter = Waiter { conn, re, answer: Answer::Joined };
        if let Some(ledger) = &self.ledger {
            let mine = ledger.by_control(&key).is_some();
            let positions: Option<Vec<usize>> = records.iter().map(|r| ledger.position(&r.id())).collect();
            return match positions.as_deref() {
                Some([.., last]) if mine && records.len() == 4 => {
                    self.answer_when_stored(*last, waiter);
                    Ok(())
                }
                _ => Err(Refused::claim_used()),
            };
        }
        let right = self.config.claim.map(|c| c.0.ct_eq(&claim_digest(&claim.0).0));
        if !right.is_some_and(bool::from) {
            return Err(Refused::wrong_claim());
        }
        let [genesis, _, _, _] = records else {
            return Err(Refused::bad_record("a network is founded by exactly four records"));
        };
        let mut ledger = Ledger::new(NetworkId(genesis.signer.0));
        // The founder's clock need not agree with ours: the claim is what entitles it.
        let changes = ledger.admit_all(records, Judge::Reader).map_err(|(i, refusal)| founding_refused(i, &refusal))?;
        match changes.as_slice() {
            [Change::Founded, Change::AdminAdded(admin), Change::InviteAdded(_), Change::MemberAdded(member)]
                if admin == member && ledger.by_control(&key).is_some_and(|m| m.identity == *member) => {}
            _ => {
                return Err(Refused::bad_record(
                    "a network is founded by a Genesis, an Admin, an Invite and a Member record of the sending node",
                ));
            }
        }
        self.ledger = Some(ledger);
        self.next.claim_spent = true;
        self.store(changes, waiter);
        Ok(())
    }

    pub(super) fn propose(
        &mut self,
        key: ControlKey,
        re: u64,
        invite: &InviteKey,
        name: &str,
        exact: bool,
        now: UnixSeconds,
    ) -> Result<ToNode, Refused> {
        self.reservations.expire(self.now);
        let Some(ledger) = self.ledger.as_ref().filter(|_| self.durable > 0) else {
            return Err(Refused::no_network());
        };
        if ledger.by_control(&key).is_some() {
            return Err(Refused::member_already());
        }
        if ledger.by_control_ever(&key).is_some() {
            return Err(Refused::of_record(&Refusal::Revoked));
        }
        let open = ledger.invite(invite);
        let (records, forced) = match open {
            Some(open) if open.revoked() => return Err(Refused::invite_revoked()),
            Some(open) if open.used_up() => return Err(Refused::invite_used_up()),
            Some(open) if now > open.invite.expires => return Err(Refused::invite_expired()),
            Some(open) => (fitting(ledger.chain(invite))?, open.invite.name.as_deref()),
            // Made while its admin was offline: the guest has the record, and needs to know the admins.
            None => (fitting(ledger.admin_chain())?, None),
        };
        let wanted = match forced {
            Some(forced) if exact && forced != name => {
                return Err(Refused::bad_request(format!("the invite is for a machine named {forced:?}")));
            }
            Some(forced) => forced.to_owned(),
            None if exact => {
                dns_label(name).map_err(|e| Refused::bad_request(format!("{name:?} is not a name: {e}")))?;
                name.to_owned()
            }
            None => label_from_hostname(name),
        };
        let name = if exact || forced.is_some() {
            if ledger.by_name(&wanted).is_some() {
                return Err(Refused::name_taken(&wanted));
            }
            wanted
        } else {
            ledger.free_name(&wanted, |name| self.reservations.has_name(name, &key))
        };
        let earlier = self.reservations.of(&key).map(|p| p.ipv4).filter(|a| ledger.by_ipv4(*a).is_none());
        let ipv4 = earlier
            .or_else(|| ledger.free_ipv4(|a| self.reservations.has_ipv4(a, &key)))
            .or_else(|| ledger.free_ipv4(|_| false))
            .ok_or_else(Refused::range_full)?;
        self.reservations.reserve(key, Proposed { ipv4, name: name.clone() }, self.now);
        Ok(ToNode::Proposal { re, records, ipv4, name, now })
    }

    pub(super) fn redeem(
        &mut self,
        conn: ConnId,
        key: ControlKey,
        re: u64,
        invite: &SignedRecord,
        member: &SignedRecord,
        now: UnixSeconds,
    ) -> Result<(), Refused> {
        let waiter = Waiter { conn, re, answer: Answer::Joined };
        let Some(ledger) = &mut self.ledger else { return Err(Refused::no_network()) };
        if ledger.by_control(&key).is_some() {
            // Only the very record that was stored: with any other the node would believe something else than the network.
            let at = ledger.position(&member.id()).ok_or_else(Refused::member_already)?;
            self.answer_when_stored(at, waiter);
            return Ok(());
        }
        let before = ledger.log().len();
        let changes = ledger
            .admit_all(&[invite.clone(), member.clone()], Judge::Coordinator(now))
            .map_err(|(_, refusal)| Refused::of_record(&refusal))?;
        let joined = matches!(changes.as_slice(), [Change::InviteAdded(_) | Change::Known, Change::MemberAdded(_)]);
        if !joined || ledger.by_control(&key).is_none() {
            ledger.truncate(before);
            return Err(Refused::bad_record("a guest joins by an Invite record and a Member record with its own keys"));
        }
        self.reservations.release(&key);
        self.store(changes, waiter);
        Ok(())
    }
}

fn founding_refused(at: usize, refusal: &Refusal) -> Refused {
    Refused::bad_record(format!("founding record {} of 4: {refusal}", at + 1))
}

/// The records of a proposal, if they fit into one message.
fn fitting(records: Vec<SignedRecord>) -> Result<Vec<SignedRecord>, Refused> {
    if records.iter().map(json_size).sum::<usize>() <= MAX_MESSAGE - MESSAGE_FRAME {
        Ok(records)
    } else {
        Err(Refused::bad_record("the chain of admins behind this invite is too long to be sent"))
    }
}

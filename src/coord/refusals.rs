//! What people are told when a request is refused: what and why in one sentence, and what they can do.

use crate::trust::ledger::Refusal;
use crate::trust::record::RecordError;
use crate::wire::control::{ToNode, refusal as code};

/// A refusal without the number of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) code: &'static str,
    pub(super) text: String,
    pub(super) hint: &'static str,
}

const NEW_INVITE: &str = "ask an admin of the network for a new invite (`meshd invite` on an admin's machine)";

impl Refused {
    pub(super) fn new(code: &'static str, text: impl Into<String>, hint: &'static str) -> Self {
        Self { code, text: text.into(), hint }
    }

    pub(super) fn answer(self, re: u64) -> ToNode {
        ToNode::Refused { re, code: self.code.to_owned(), text: self.text, hint: self.hint.to_owned() }
    }

    pub(super) fn wrong_claim() -> Self {
        Self::new(
            code::WRONG_CLAIM,
            "the claim token is not this coordinator's",
            "run `meshd coordinator claim` on the coordinator's machine and use the token it prints",
        )
    }

    pub(super) fn claim_used() -> Self {
        Self::new(
            code::ALREADY_USED,
            "the claim token was used: this coordinator has a network already",
            "join that network with an invite (`meshd invite` on an admin's machine)",
        )
    }

    pub(super) fn no_network() -> Self {
        Self::new(
            code::NO_NETWORK,
            "this coordinator has no network yet",
            "found it on the first machine: `meshd up` with the token that `meshd coordinator claim` prints",
        )
    }

    pub(super) fn not_a_member() -> Self {
        Self::new(code::NOT_A_MEMBER, "this machine is not a member of the coordinator's network", NEW_INVITE)
    }

    pub(super) fn revoked() -> Self {
        Self::new(code::REVOKED, "this machine was removed from the network", NEW_INVITE)
    }

    pub(super) fn member_already() -> Self {
        Self::new(
            code::ALREADY_USED,
            "this machine's keys belong to a member of the network already",
            "start it without a token: `meshd up`; if its records were lost, join anew with an empty `--state-dir`",
        )
    }

    pub(super) fn invite_used_up() -> Self {
        Self::new(code::ALREADY_USED, "the invite has been used up", NEW_INVITE)
    }

    pub(super) fn invite_expired() -> Self {
        Self::new(code::EXPIRED, "the invite has expired", NEW_INVITE)
    }

    pub(super) fn invite_revoked() -> Self {
        Self::new(code::REVOKED, "the invite was revoked, or the admin who made it was removed", NEW_INVITE)
    }

    pub(super) fn name_taken(name: &str) -> Self {
        Self::new(
            code::NAME_TAKEN,
            format!("the name {name:?} belongs to another machine of the network"),
            "choose another with `--name`, or leave `--name` out to get a free one",
        )
    }

    pub(super) fn range_full() -> Self {
        Self::new(
            code::RANGE_FULL,
            "no address is left in the network's IPv4 range",
            "remove machines that are gone (`meshd remove`), or found a network with a larger `--ipv4-range`",
        )
    }

    pub(super) fn rate_limited() -> Self {
        Self::new(code::RATE_LIMITED, "too many attempts to join come from this address", "try again in a minute")
    }

    pub(super) fn store_failed() -> Self {
        Self::new(
            code::STORE_FAILED,
            "the coordinator could not write its store; nothing was changed",
            "see the coordinator's log (a full disk is the usual cause), then try again",
        )
    }

    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self::new(code::BAD_REQUEST, text, "correct the command and try again")
    }

    pub(super) fn bad_record(text: impl Into<String>) -> Self {
        Self::new(
            code::BAD_RECORD,
            text,
            "if meshd is of the same version on both sides, this is a fault: report it with this text",
        )
    }

    /// What to say about a record the ledger refused.
    pub(super) fn of_record(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::WrongNetwork => Self::new(
                code::WRONG_NETWORK,
                "the token belongs to another network than this coordinator's",
                "check that the token is for this network, or ask an admin of the network for a new one",
            ),
            Refusal::InviteUsedUp => Self::invite_used_up(),
            Refusal::InviteExpired => Self::invite_expired(),
            Refusal::InviteRevoked => Self::invite_revoked(),
            Refusal::Revoked => Self::new(
                code::REVOKED,
                "the machine was removed from the network, and removed keys cannot come back",
                "join again as a new machine: `meshd up` with a new invite and an empty `--state-dir`",
            ),
            Refusal::NameTaken(name) => Self::name_taken(name),
            Refusal::AddressTaken(address) => Self::new(
                code::ADDRESS_TAKEN,
                format!("the address {address} was taken by another machine in the meantime"),
                "try again",
            ),
            Refusal::NotAdmin => Self::new(
                code::BAD_RECORD,
                "the record is not signed by an admin of this network",
                "do this on an admin's machine, or ask an admin for a new invite",
            ),
            Refusal::UnknownTarget => Self::new(
                code::BAD_RECORD,
                "the record is about a machine or an invite that this network does not know",
                "see `meshd status` for the machines of the network",
            ),
            Refusal::Record(RecordError::Unreadable) => Self::new(
                code::BAD_RECORD,
                "the record cannot be read by this coordinator's version of meshd",
                "upgrade meshd on the coordinator's machine",
            ),
            Refusal::Record(_)
            | Refusal::BadGenesis
            | Refusal::NoGenesis
            | Refusal::NoInvite
            | Refusal::Contradiction(_)
            | Refusal::KeyTaken => Self::bad_record(refusal.to_string()),
        }
    }
}

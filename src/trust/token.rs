//! Claim and invite tokens: one line that a person can copy, with a checksum so that a truncated paste says so.

use crate::trust::keys::Secret32;
use crate::trust::record::SignedRecord;
use crate::wire::keys::{ControlKey, NetworkId};

/// Starts a claim token.
pub const CLAIM_PREFIX: &str = "meshd-claim1-";
/// Starts an invite token.
pub const INVITE_PREFIX: &str = "meshd-invite1-";

/// A token, decoded. `Debug` shows no secret.
#[derive(Debug)]
pub enum Token {
    /// Founds the network on a fresh coordinator.
    Claim(ClaimToken),
    /// Joins a network.
    Invite(InviteToken),
}

/// What a claim token holds.
#[derive(Debug)]
pub struct ClaimToken {
    /// Coordinator URLs, the first tried first.
    pub urls: Vec<String>,
    /// The coordinator's Noise key.
    pub coordinator: ControlKey,
    /// Proves that the holder was given the coordinator's claim.
    pub secret: Secret32,
}

/// What an invite token holds.
#[derive(Debug)]
pub struct InviteToken {
    /// Coordinator URLs, the first tried first.
    pub urls: Vec<String>,
    /// The coordinator's Noise key.
    pub coordinator: ControlKey,
    /// The network this node will verify everything against.
    pub network: NetworkId,
    /// The invite's ed25519 secret.
    pub secret: Secret32,
    /// The Invite record.
    pub invite: SignedRecord,
}

/// Why text is not a token: each says what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No meshd prefix.
    #[error("this is not a meshd token (one starts with meshd-claim1- or meshd-invite1-)")]
    NotAToken,
    /// A prefix of another version.
    #[error("this token was made by a newer meshd; upgrade meshd on this machine")]
    NewerVersion,
    /// A character that no token has.
    #[error("the token has a character {0:?} that does not belong there; copy it again")]
    BadCharacter(char),
    /// The checksum does not fit: truncated or mistyped.
    #[error("the token is incomplete or mistyped (its checksum does not fit); copy the whole line again")]
    BadChecksum,
    /// The checksum fits but the content does not decode.
    #[error("the token's content cannot be read by this version of meshd")]
    Unreadable,
}

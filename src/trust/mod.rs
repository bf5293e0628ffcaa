//! WHO BELONGS TO THE NETWORK. Signed records and the rules that judge them; shared by node and coordinator.
//!
//! The coordinator is a mailbox: it stores and forwards records and runs the same [`ledger::Ledger`] as every node, but
//! its word counts for nothing. A node starts from the network id in its own token and accepts what the chain proves.

pub mod addresses;
pub mod advert;
pub mod founding;
pub mod keys;
pub mod ledger;
pub mod names;
pub mod record;
pub mod token;

#[cfg(test)]
pub(crate) mod testing;

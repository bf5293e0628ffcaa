//! THE COORDINATOR, PURE. Decides who may do what; the shell in `server/` stores and sends.
//!
//! The contract is that of every pure machine here: `handle` something, then drain `poll_output` to `None`, then re-read
//! `poll_timeout`.

pub mod coordinator;
pub mod io;
pub mod limits;
mod presence;
mod refusals;
pub mod relay_budget;
pub mod relay_hub;
pub mod relay_sched;
pub mod relay_table;
mod reservations;
mod writes;

pub use coordinator::{Config, Coordinator, Limits, claim_digest};

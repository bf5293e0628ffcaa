//! Hard NATs: pairs that a plain punch cannot join, the NAT profile that decides what to do, and politeness.

mod cell;
mod matrix;
mod neighbours;
mod polite;
mod shell;
mod table;

use std::time::Duration;

pub(crate) use cell::stage_with;

/// Runs the one pair that a replay names.
pub(crate) fn replay(scenario: &str) -> String {
    format!("{:?}", cell::run(&scenario.parse().unwrap(), cell::Mapped::Nobody, Duration::from_secs(8)))
}

//! Asking the daemon: one call over its socket, each answer handed on as it comes.

use std::time::Duration;

use crate::cli::Global;
use crate::cli::error::CliError;
use crate::daemon::client;
use crate::wire::local::{Call, Response, Status};

/// How long the daemon may take over one answer. An examination of the NAT waits for servers that do not answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Makes one call and hands every answer but the closing one to `on_reply`. `patience` is how long each may take.
///
/// # Errors
/// [`super::error::Kind::NotRunning`] if no daemon answers, what the daemon says if it refuses, and what `on_reply` says.
pub(super) fn call(
    global: &Global,
    call: Call,
    patience: Duration,
    on_reply: &mut dyn FnMut(Response) -> Result<(), CliError>,
) -> Result<(), CliError> {
    for reply in client::call(&global.socket(), call, patience)? {
        on_reply(reply?)?;
    }
    Ok(())
}

/// Makes a call that has one answer, which `pick` takes out of the reply.
///
/// # Errors
/// As [`call`]; also if the answer is of another kind.
pub(super) fn ask<T>(global: &Global, what: Call, pick: impl Fn(Response) -> Option<T>) -> Result<T, CliError> {
    ask_for(global, what, PATIENCE, pick)
}

/// The same with so much patience.
///
/// # Errors
/// As [`call`]; also if the answer is of another kind.
pub(super) fn ask_for<T>(
    global: &Global,
    what: Call,
    patience: Duration,
    pick: impl Fn(Response) -> Option<T>,
) -> Result<T, CliError> {
    let mut found = None;
    call(global, what, patience, &mut |reply| {
        found = pick(reply).or(found.take());
        Ok(())
    })?;
    found.ok_or_else(unexpected)
}

/// The daemon's status.
///
/// # Errors
/// As [`ask`].
pub(super) fn status(global: &Global) -> Result<Status, CliError> {
    ask(global, Call::Status, |reply| if let Response::Status(status) = reply { Some(*status) } else { None })
}

/// The daemon answered something that was not asked for.
fn unexpected() -> CliError {
    CliError::failed(
        "protocol",
        "the daemon's answer is not one this command understands",
        "the running daemon may be of another version: meshd down, then meshd up",
    )
}

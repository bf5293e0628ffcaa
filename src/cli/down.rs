//! `meshd down`.

use serde::Serialize;

use crate::cli::error::{CliError, Kind};
use crate::cli::{Global, client};
use crate::daemon::footprint;
use crate::wire::local::Call;
use crate::wire::version;

#[derive(Serialize)]
struct Document {
    schema: u16,
    state: &'static str,
    was_running: bool,
}

/// Stopping what does not run is no failure: afterwards it is down, as asked.
pub(super) fn run(global: &Global) -> Result<(), CliError> {
    let was_running = match client::call(global, Call::Down, client::PATIENCE, &mut |_| Ok(())) {
        Ok(()) => true,
        Err(error) if error.kind == Kind::NotRunning => false,
        Err(error) => return Err(error),
    };
    if !was_running {
        // What a daemon left that was killed.
        footprint::undo_left_behind(&global.state_dir())?;
    }
    let document = Document { schema: version::LOCAL, state: "stopped", was_running };
    global
        .output()
        .show(&document, |d| if d.was_running { "meshd is down" } else { "meshd was not running" }.to_owned())
}

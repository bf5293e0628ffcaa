//! `meshd footprint`.

use serde::Serialize;

use crate::cli::Global;
use crate::cli::error::CliError;
use crate::daemon::client;
use crate::daemon::footprint::{self, Entry};
use crate::wire::version;

/// Options of `meshd footprint`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What meshd changed on this machine: its interface and addresses, routes, rules, nftables tables and
kernel settings. All of it is undone by `meshd down`, by the next `meshd up` after a crash, and by
`meshd footprint --undo`, which is for a service manager after the daemon has ended (ExecStopPost).")]
pub struct Args {
    /// Undo what a daemon that is gone has left
    #[arg(long)]
    undo: bool,
}

#[derive(Serialize)]
struct Document {
    schema: u16,
    changes: Vec<Entry>,
}

#[derive(Serialize)]
struct Undone {
    schema: u16,
    undone: Vec<Entry>,
}

/// systemd runs this command because the daemon did not end well: systemd.exec(5), `SERVICE_RESULT`.
fn service_failed() -> bool {
    std::env::var("SERVICE_RESULT").is_ok_and(|result| result != "success")
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let dir = global.state_dir();
    if args.undo && service_failed() && footprint::is_kept_closed(&dir) {
        let text = "the kill switch is on and the service failed: nothing is undone, so that nothing leaves beside the exit node";
        let hint = "the next start takes over; `meshd down` undoes it";
        return Err(CliError::failed("kill-switch", text, hint));
    }
    if args.undo {
        let undone = footprint::undo_left_behind(&dir)?.iter().map(Entry::of).collect();
        return global.output().show(&Undone { schema: version::LOCAL, undone }, |d| match d.undone.as_slice() {
            [] => "nothing was left to undo".to_owned(),
            some => some.iter().map(|entry| format!("undone: {}\n", entry.text)).collect(),
        });
    }
    // A daemon that does not answer has no interface.
    let status = client::status(&global.socket()).ok();
    let changes = footprint::list(&dir, status.as_ref())?;
    global.output().show(&Document { schema: version::LOCAL, changes }, |d| match d.changes.as_slice() {
        [] => "meshd has changed nothing on this machine".to_owned(),
        some => some.iter().map(|entry| format!("{:<12} {}\n", entry.kind, entry.text)).collect(),
    })
}

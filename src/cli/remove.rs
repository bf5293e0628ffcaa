//! `meshd remove PEER`.

use crate::cli::error::CliError;
use crate::cli::{Global, client};
use crate::wire::local::{Call, Response};

/// Options of `meshd remove`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every node stops talking to it as soon as it hears of it, and never forgets. To let the machine in
again, give it a new invite and a new state directory.

Example:
  meshd remove old-phone")]
pub struct Args {
    /// The node's name, mesh address or id prefix
    peer: String,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let call = Call::Remove { peer: args.peer.clone() };
    let removed = client::ask(global, call, |reply| if let Response::Removed(r) = reply { Some(r) } else { None })?;
    global.output().show(&removed, |r| format!("{} ({}) is out of the network", r.name, r.id))
}

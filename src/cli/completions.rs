//! `meshd completions SHELL`.

use clap::CommandFactory as _;
use clap_complete::Shell;
use serde::Serialize;

use crate::cli::error::CliError;
use crate::cli::{Cli, Global};
use crate::wire::version;

/// Options of `meshd completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  meshd completions bash > /etc/bash_completion.d/meshd")]
pub struct Args {
    /// The shell to complete for
    shell: Shell,
}

#[derive(Serialize)]
struct Document {
    schema: u16,
    shell: String,
    script: String,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "meshd", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let document = Document { schema: version::LOCAL, shell: args.shell.to_string(), script };
    global.output().show(&document, |d| d.script.clone())
}

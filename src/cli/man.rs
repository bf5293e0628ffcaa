//! `meshd man DIR`: the manual pages, made from the same grammar as `--help`.

use std::fs;
use std::path::PathBuf;

use clap::CommandFactory as _;
use serde::Serialize;

use crate::cli::error::{CliError, Kind};
use crate::cli::{Cli, Global};
use crate::wire::version;

/// Options of `meshd man`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A package installs them; from a checkout:
  sudo meshd man /usr/local/share/man/man1")]
pub struct Args {
    /// An existing directory; each command's page is written there, in section 1
    dir: PathBuf,
}

#[derive(Serialize)]
struct Document {
    schema: u16,
    pages: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let mut pages = Vec::new();
    let mut command = Cli::command();
    command.build();
    write(&command, "meshd", args, &mut pages)?;
    pages.sort();
    let document = Document { schema: version::LOCAL, pages };
    global.output().show(&document, |d| {
        let lines: Vec<String> = d.pages.iter().map(|page| page.display().to_string()).collect();
        lines.join("\n")
    })
}

/// Writes the page of a command, named as in `meshd-coordinator-claim.1`, and of those below it.
fn write(command: &clap::Command, name: &str, args: &Args, pages: &mut Vec<PathBuf>) -> Result<(), CliError> {
    let path = args.dir.join(format!("{name}.1"));
    // Leaked: clap keeps names for ever, and this process ends when the pages are written.
    let title: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let page = clap_mangen::Man::new(command.clone().name(title)).title(title).manual("meshd").source(version::PROGRAM);
    let mut text = Vec::new();
    page.render(&mut text).and_then(|()| fs::write(&path, &text)).map_err(|e| {
        let text = format!("the page {} cannot be written: {e}", path.display());
        CliError::new(Kind::Failed, "man", text, "give an existing directory that this user may write to")
    })?;
    pages.push(path);
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        write(below, &format!("{name}-{}", below.get_name()), args, pages)?;
    }
    Ok(())
}

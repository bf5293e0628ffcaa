//! What a person types. One command a file; [`output`] is the only place that prints, [`error`] says how failures look.
//!
//! Commands about a running node ask its daemon over the local socket ([`client`]); `up` starts one; `coordinator` and
//! `demo` run in the foreground.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod cidr;
mod client;
mod completions;
pub mod coordinator;
pub mod demo;
mod dns;
mod down;
mod drain;
mod duration;
pub mod error;
mod footprint;
mod invite;
mod ip;
mod man;
mod nearest;
mod netcheck;
pub mod output;
mod ping;
mod remove;
mod routes;
mod set;
mod size;
mod status;
mod up;
mod version;
mod why;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::cli::error::{CliError, Kind};
use crate::cli::output::Output;

/// Where a node keeps its state unless `--state-dir` says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/meshd";
/// Where a daemon listens unless `--socket` or `--state-dir` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/meshd/meshd.sock";

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "meshd",
    bin_name = "meshd",
    version,
    about = "A mesh VPN: your machines reach each other by mesh address, wherever they are",
    after_help = "\
A network in three commands:
  server$  meshd coordinator --public-url https://vpn.example.org
  first$   meshd up meshd-claim1-…           the claim token the coordinator printed
  first$   meshd invite                      prints a token for the next machine
  next$    meshd up meshd-invite1-…

No machines at hand? `meshd demo` shows all of it in network namespaces on this one.",
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct Cli {
    /// Options every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options every command takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// Directory with keys and state [default: /var/lib/meshd]
    #[arg(long, global = true, value_name = "DIR", env = "MESHD_STATE_DIR", hide_env_values = true)]
    pub state_dir: Option<PathBuf>,
    /// Socket of the daemon [default: /run/meshd/meshd.sock, or STATE_DIR/meshd.sock with --state-dir]
    #[arg(long, global = true, value_name = "PATH", env = "MESHD_SOCKET", hide_env_values = true)]
    pub socket: Option<PathBuf>,
    /// Print JSON documents (schema 1) instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// The node's state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| DEFAULT_STATE_DIR.into())
    }

    /// The daemon's socket. With a state directory given and no socket, it is inside that directory, so that several
    /// nodes can run on one host.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        match (&self.socket, &self.state_dir) {
            (Some(socket), _) => socket.clone(),
            (None, Some(dir)) => dir.join("meshd.sock"),
            (None, None) => DEFAULT_SOCKET.into(),
        }
    }

    /// Where this command prints.
    #[must_use]
    pub const fn output(&self) -> Output {
        Output::new(self.json)
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join a network with a token, or resume the one this machine is in
    Up(up::Args),
    /// Stop the daemon and put addresses, routes and rules back as they were
    Down,
    /// Show this node, its peers and how each is reached
    Status(status::Args),
    /// Ask a peer for an answer through the mesh, and say which way it came
    Ping(ping::Args),
    /// Explain why a peer is reached the way it is, and what would help
    Why(why::Args),
    /// Examine the network this machine is in: UDP, NAT behaviour, relay
    Netcheck(netcheck::Args),
    /// Print mesh addresses, one a line
    Ip(ip::Args),
    /// Make a token that lets one more machine join (admin nodes only)
    Invite(invite::Args),
    /// Put a node out of the network for good (admin nodes only)
    Remove(remove::Args),
    /// List the subnets behind nodes, and say which node may lead to which (admin nodes only)
    Routes(routes::Args),
    /// List the names besides those of nodes, and give names addresses (admin nodes only)
    Dns(dns::Args),
    /// Move traffic away from this node before work on it, and back
    Drain(drain::Args),
    /// Show or change what this node is set up to do: routes, exit node
    Set(set::Args),
    /// List what meshd changed on this machine, or undo what a killed daemon left
    Footprint(footprint::Args),
    /// Run a coordinator: it introduces machines to each other and relays what cannot go directly
    Coordinator(coordinator::Args),
    /// Show a whole network on this one machine, in network namespaces
    Demo(demo::Args),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Write the manual pages
    Man(man::Args),
}

/// Runs the command line `args` (program name first) and returns the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let parsed = Cli::command().try_get_matches_from(&args).and_then(|matches| Cli::from_arg_matches(&matches));
    let (output, result) = match parsed {
        Ok(cli) => (cli.global.output(), dispatch(&cli)),
        Err(error) => {
            let output = Output::new(args.iter().any(|arg| arg == "--json"));
            (output, explain(&error, &args, output))
        }
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            output.error(&error);
            error.kind.exit_code()
        }
    }
}

/// Prints help where help was asked for; says what is wrong with the command line where it was not.
fn explain(error: &clap::Error, args: &[OsString], output: Output) -> Result<(), CliError> {
    let help = error.render().ansi().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => output.raw(help.as_bytes()),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if !output.is_json() => {
            output.note(help.trim_end());
            Err(CliError::new(Kind::Told(Kind::Usage.exit_code()), "usage", "a command is missing", ""))
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Err(CliError::new(Kind::Usage, "usage", "a command is missing", "meshd --help lists the commands"))
        }
        _ => {
            let known = Cli::command();
            let named = |arg: &&OsString| known.get_subcommands().any(|sub| sub.get_name() == **arg);
            let command = args.iter().find(named).and_then(|arg| arg.to_str());
            Err(error::from_clap(error, command))
        }
    }
}

fn dispatch(cli: &Cli) -> Result<(), CliError> {
    let global = &cli.global;
    match &cli.command {
        Command::Up(args) => up::run(args, global),
        Command::Down => down::run(global),
        Command::Drain(args) => drain::run(args, global),
        Command::Status(args) => status::run(args, global),
        Command::Ping(args) => ping::run(args, global),
        Command::Why(args) => why::run(args, global),
        Command::Netcheck(args) => netcheck::run(args, global),
        Command::Ip(args) => ip::run(args, global),
        Command::Invite(args) => invite::run(args, global),
        Command::Remove(args) => remove::run(args, global),
        Command::Routes(args) => routes::run(args, global),
        Command::Dns(args) => dns::run(args, global),
        Command::Set(args) => set::run(args, global),
        Command::Footprint(args) => footprint::run(args, global),
        Command::Coordinator(args) => coordinator::run(args, global),
        Command::Demo(args) => demo::run(args, global),
        Command::Version => version::run(global),
        Command::Completions(args) => completions::run(args, global),
        Command::Man(args) => man::run(args, global),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_socket_follows_the_state_directory() {
        let global = |dir: Option<&str>, socket: Option<&str>| Global {
            state_dir: dir.map(PathBuf::from),
            socket: socket.map(PathBuf::from),
            json: false,
        };
        assert_eq!(global(None, None).socket(), PathBuf::from("/run/meshd/meshd.sock"));
        assert_eq!(global(Some("/tmp/a"), None).socket(), PathBuf::from("/tmp/a/meshd.sock"));
        assert_eq!(global(Some("/tmp/a"), Some("/tmp/b")).socket(), PathBuf::from("/tmp/b"));
    }
}

//! `meshd demo`: a whole network on one machine, with the same binary, the same commands and real NATs.
//!
//! ```text
//!                        coordinator 203.0.113.10, .11
//!                                  │
//!          ────────────────────────┴─ internet 203.0.113.0/24 ─────────────
//!             │ .21                    │ .22                    │ .23
//!      [home NAT]               [home NAT]        [symmetric, strict NAT]
//!             │                        │                        │
//!          laptop                     nas                     phone
//!     192.168.21.2               192.168.22.2             192.168.23.2
//! ```
//!
//! Laptop and nas meet directly. The phone's NAT gives every destination another port and lets UDP out to a few ports
//! only, so it is reached through the relay. Each step is checked; the exit code says whether all were seen.

pub mod contain;
mod http;
pub mod net;
mod story;

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::cli::Global;
use crate::cli::error::{CliError, Kind};
use crate::wire::local::Status;
use crate::wire::version;
use contain::{After, contain};

/// Options of `meshd demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Needs no root, no configuration and no network: everything happens in namespaces that are gone afterwards.
Needs the programs ip and nft (apt-get install iproute2 nftables) and /dev/net/tun.

Examples:
  meshd demo
  meshd demo --keep      leave it running and print how to enter it")]
pub struct Args {
    /// Leave everything running, and print how to enter it and how to remove it
    #[arg(long)]
    keep: bool,
}

/// `meshd demo --json`.
#[derive(Debug, Serialize)]
struct Document {
    schema: u16,
    steps: Vec<Step>,
    /// The laptop's status at the end.
    status: Status,
}

/// Something that was done and seen to work.
#[derive(Debug, Serialize)]
struct Step {
    text: String,
    /// Since the start.
    after_ms: u64,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    preconditions()?;
    let after = if args.keep { After::Keep } else { After::Discard };
    let ended = contain(after).map_err(|error| {
        let hint = "run it as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), \
                    kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container, start it privileged";
        CliError::failed("no-namespaces", format!("cannot make a network of its own: {error:#}"), hint)
    })?;
    let Some(ended) = ended else { return inside(args.keep, global) };
    if let Some(init) = ended.kept {
        global.output().note(&how_to_enter(init));
    }
    if ended.code == 0 {
        return Ok(());
    }
    Err(CliError::new(Kind::Told(ended.code), "failed", "the demonstration failed", ""))
}

/// What the demonstration cannot do without, each with what to do about it.
fn preconditions() -> Result<(), CliError> {
    let missing = net::missing_tools();
    if !missing.is_empty() {
        let text = format!("the demonstration needs the program{} {}", plural(missing.len()), missing.join(" and "));
        return Err(CliError::failed("missing-tool", text, "sudo apt-get install -y iproute2 nftables"));
    }
    let tun = Path::new("/dev/net/tun");
    if let Err(error) = fs::File::options().read(true).write(true).open(tun) {
        let text = format!("the demonstration needs {}: {error}", tun.display());
        let hint = "modprobe tun; in a container, pass --device /dev/net/tun";
        return Err(CliError::failed("no-tun", text, hint));
    }
    Ok(())
}

const fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn inside(keep: bool, global: &Global) -> Result<(), CliError> {
    let output = global.output();
    let mut steps = Vec::new();
    let told = story::tell(&mut |step| {
        if !output.is_json() {
            let seconds = std::time::Duration::from_millis(step.after_ms).as_secs_f64();
            output.show(&step, |step| format!("[{seconds:4.1} s] {}", step.text))?;
        }
        steps.push(step);
        Ok(())
    });
    let story = told.map_err(|error| match error.downcast::<CliError>() {
        Ok(error) => error,
        Err(error) => {
            let hint =
                "a busy machine may be too slow for a step: try again; if it fails again, report it with this output";
            CliError::failed("demo", format!("{error:#}"), hint)
        }
    })?;
    let document = Document { schema: version::LOCAL, steps, status: story.status };
    output.show(&document, |d| {
        let gone = if keep { "" } else { "\nEverything worked; nothing was left behind." };
        format!("\n$ meshd status        (on laptop)\n{}{gone}", super::status::text(&d.status))
    })
}

/// Printed after `--keep`.
fn how_to_enter(init: u32) -> String {
    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    let user = if of(&init.to_string()) == of("self") { "" } else { " -U --preserve-credentials" };
    let meshd = std::env::current_exe().map_or_else(|_| "meshd".to_owned(), |path| path.display().to_string());
    format!(
        "
It is still running. To look around:
  nsenter -t {init}{user} -m -n -p bash
  ip netns exec laptop {meshd} --state-dir /run/laptop status      (also: nas, phone)
  ip netns exec laptop ping $({meshd} --state-dir /run/laptop ip -4 nas)
To remove it all:
  kill {init}"
    )
}

//! `meshd why PEER`.

use std::fmt::Write as _;

use crate::cli::error::CliError;
use crate::cli::netcheck::ports;
use crate::cli::output::{BOLD, millis, paint};
use crate::cli::{Global, client};
use crate::wire::local::{Call, PeerWhy, Response, WhySide};
use crate::wire::nat::{Mapper, Seen};

/// Options of `meshd why`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
If there is no direct path, one is tried first. What the peer knows of its own network and what it
saw of the attempt comes from the peer itself.

Example:
  meshd why nas")]
pub struct Args {
    /// The node's name, mesh address or id prefix
    peer: String,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let call = Call::Why { peer: args.peer.clone() };
    let why = client::ask(global, call, |reply| if let Response::Why(w) = reply { Some(*w) } else { None })?;
    global.output().show(&why, text)
}

fn text(why: &PeerWhy) -> String {
    let mut text = why.text.clone();
    if let Some(ms) = why.path.rtt_ms {
        let _ = write!(text, " ({} round trip)", millis(ms));
    }
    text.push('\n');
    for (title, lines) in [("because", &why.because), ("what would help", &why.fix)] {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{}", paint(title, BOLD));
        }
        for line in lines {
            let _ = writeln!(text, "  - {line}");
        }
    }
    let _ = writeln!(text, "\n{}", paint("evidence", BOLD));
    let _ = writeln!(text, "  here: {}", side(&why.here));
    let there = why.there.as_ref().map_or_else(|| "it has told nothing yet".to_owned(), side);
    let _ = writeln!(text, "  {}: {there}", why.peer);
    text
}

fn side(side: &WhySide) -> String {
    let mut parts = Vec::new();
    match side.udp {
        Some(true) => parts.push("UDP passes".to_owned()),
        Some(false) => parts.push("no UDP".to_owned()),
        None => {}
    }
    parts.push(format!("mapping {}", side.mapping.as_deref().unwrap_or("unknown")));
    parts.push(format!("filtering {}", side.filtering.as_deref().unwrap_or("unknown")));
    if side.port_model.is_some() {
        parts.push(format!("ports {}", ports(side.port_model)));
    }
    parts.push(
        match side.port_mapping {
            Mapper::Found => "the router maps ports",
            Mapper::Absent => "the router maps no ports",
            Mapper::Unknown => "port mapping unknown",
        }
        .to_owned(),
    );
    parts.extend(side.port.map(|port| format!("UDP port {port}")));
    if let Some(Seen { sent, answered, heard }) = side.last_attempt {
        parts.push(format!("last attempt: {sent} probes sent, {answered} answered, {heard} heard"));
    }
    parts.join(", ")
}

//! `meshd ip [PEER]`.

use std::net::IpAddr;

use serde::Serialize;

use crate::cli::error::CliError;
use crate::cli::nearest::nearest;
use crate::cli::{Global, client};
use crate::wire::local::Status;
use crate::wire::version;

/// Options of `meshd ip`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  meshd ip\n  ssh root@$(meshd ip -4 nas)")]
pub struct Args {
    /// A peer's name, mesh address or id prefix; without it, this node
    peer: Option<String>,
    /// Only the IPv4 address
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Only the IPv6 address
    #[arg(short = '6')]
    v6: bool,
}

#[derive(Serialize)]
struct Document {
    schema: u16,
    name: String,
    addresses: Vec<IpAddr>,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let status = client::status(global)?;
    let (name, mut addresses) = match &args.peer {
        None => (status.me.name, status.me.addresses),
        Some(peer) => find(peer, &status)?,
    };
    addresses.retain(|address| if args.v4 { address.is_ipv4() } else { !args.v6 || address.is_ipv6() });
    let document = Document { schema: version::LOCAL, name, addresses };
    global.output().show(&document, |d| d.addresses.iter().map(|address| format!("{address}\n")).collect())
}

fn find(wanted: &str, status: &Status) -> Result<(String, Vec<IpAddr>), CliError> {
    let me = (&status.me.name, &status.me.id, &status.me.addresses);
    let everyone = status.peers.iter().map(|peer| (&peer.name, &peer.id, &peer.addresses));
    let everyone: Vec<_> = std::iter::once(me).chain(everyone).collect();
    let address: Option<IpAddr> = wanted.parse().ok();
    let exact = everyone.iter().find(|(name, _, addresses)| {
        name.eq_ignore_ascii_case(wanted) || address.is_some_and(|a| addresses.contains(&a))
    });
    if let Some((name, _, addresses)) = exact {
        return Ok(((*name).clone(), (*addresses).clone()));
    }
    let by_id: Vec<_> = everyone.iter().filter(|(_, id, _)| id.starts_with(&wanted.to_lowercase())).collect();
    match by_id.as_slice() {
        [(name, _, addresses)] if wanted.len() >= 4 => Ok(((*name).clone(), (*addresses).clone())),
        [_, _, ..] if wanted.len() >= 4 => {
            let names: Vec<&str> = by_id.iter().map(|(name, _, _)| name.as_str()).collect();
            let text = format!("the id prefix {wanted} fits {} nodes: {}", names.len(), names.join(", "));
            Err(CliError::failed("ambiguous-peer", text, "give more digits of the id, or the name"))
        }
        _ => {
            let hint = nearest(wanted, everyone.iter().map(|(name, _, _)| name.as_str()))
                .map_or_else(|| "meshd status lists the peers".to_owned(), |name| format!("did you mean {name}?"));
            let text = format!("no node in this network is called {wanted:?}, or has that address or id");
            Err(CliError::failed("unknown-peer", text, hint))
        }
    }
}

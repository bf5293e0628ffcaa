//! `meshd routes`.

use ipnet::IpNet;

use crate::cli::error::CliError;
use crate::cli::output::{BOLD, GREEN, YELLOW, paint, table};
use crate::cli::{Global, cidr, client};
use crate::wire::local::{AliasChange, AliasWish, Call, Response, RouteChange, RouteLine, RoutePlace, RouteState};

/// Options of `meshd routes`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "\
A node leads to a subnet when it says so (`meshd up --advertise-routes`) and an admin allows it.
STATE is `pending` (advertised, no admin has approved it), `approved` (allowed, not used here now),
`active` (packets go that way; on the node itself: it leads there) or `shadowed` (something on this
machine goes before it): `at home` where that is the very network the node leads to, `away` where
it is another one with the same numbers.

Networks behind several nodes may have the same numbers. With an alias each is reached under
numbers of its own, from all nodes and always: 192.168.1.10 as 100.99.7.10, say.

Examples:
  meshd routes
  meshd routes approve nas 192.168.1.0/24
  meshd routes approve gate exit-node
  meshd routes revoke nas 192.168.1.0/24
  meshd routes alias nas 192.168.1.0/24",
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    #[command(subcommand)]
    word: Option<Word>,
}

#[derive(Debug, clap::Subcommand)]
enum Word {
    /// Let a node lead to a subnet (admin nodes only)
    Approve(Which),
    /// Take that back (admin nodes only)
    Revoke(Which),
    /// Give a subnet behind a node other numbers, under which it is reached besides (admin nodes only)
    Alias(Alias),
}

#[derive(Debug, clap::Args)]
struct Alias {
    /// The node's name, mesh address or id prefix
    node: String,
    /// The subnet as it is there, such as 192.168.1.0/24
    #[arg(value_name = "CIDR", value_parser = cidr::parse)]
    subnet: IpNet,
    /// A subnet of the same size, `auto` for numbers that are free, or `none` to end it
    #[arg(value_name = "ALIAS", default_value = "auto", value_parser = alias)]
    alias: AliasWish,
}

fn alias(text: &str) -> Result<AliasWish, String> {
    match text {
        "auto" => Ok(AliasWish::Auto),
        "none" => Ok(AliasWish::None),
        block => cidr::parse(block).map(AliasWish::Block),
    }
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The node's name, mesh address or id prefix
    node: String,
    /// The subnet, such as 192.168.1.0/24, or `exit-node` for everything
    #[arg(value_name = "CIDR", value_parser = subnet)]
    subnet: Subnet,
}

/// A prefix, or all of both families.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Subnet(Vec<IpNet>);

fn subnet(text: &str) -> Result<Subnet, String> {
    if text == "exit-node" {
        return Ok(Subnet(vec![IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())]));
    }
    cidr::parse(text).map(|prefix| Subnet(vec![prefix]))
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let (which, allow) = match &args.word {
        None => return list(global),
        Some(Word::Approve(which)) => (which, true),
        Some(Word::Revoke(which)) => (which, false),
        Some(Word::Alias(args)) => return give_alias(args, global),
    };
    let output = global.output();
    for prefix in &which.subnet.0 {
        let call = Call::RouteWord { peer: which.node.clone(), prefix: *prefix, allow };
        let change =
            client::ask(global, call, |reply| if let Response::RouteChanged(c) = reply { Some(c) } else { None })?;
        if let Some(note) = &change.note {
            output.note(&format!("{} {note}", paint("note:", BOLD)));
        }
        output.show(&change, said)?;
    }
    Ok(())
}

fn give_alias(args: &Alias, global: &Global) -> Result<(), CliError> {
    let call = Call::RouteAlias { peer: args.node.clone(), prefix: args.subnet, alias: args.alias };
    let change = client::ask(global, call, |reply| if let Response::AliasChanged(c) = reply { Some(c) } else { None })?;
    let output = global.output();
    if let Some(note) = &change.note {
        output.note(&format!("{} {note}", paint("note:", BOLD)));
    }
    output.show(&change, |change| {
        let AliasChange { prefix, node, already, .. } = change;
        match (change.alias, already) {
            (Some(alias), false) => format!("{prefix} behind {node} is reached as {alias}"),
            (Some(alias), true) => format!("{prefix} behind {node} is reached as {alias} already"),
            (None, false) => format!("{prefix} behind {node} has no alias any more"),
            (None, true) => format!("{prefix} behind {node} has no alias, as before"),
        }
    })
}

fn said(change: &RouteChange) -> String {
    let RouteChange { node, prefix, approved, already, .. } = change;
    match (approved, already) {
        (true, false) => format!("{node} may lead to {prefix}"),
        (true, true) => format!("{node} may lead to {prefix} already"),
        (false, false) => format!("{node} may not lead to {prefix} any more"),
        (false, true) => format!("{node} may not lead to {prefix}, as before"),
    }
}

fn list(global: &Global) -> Result<(), CliError> {
    let routes =
        client::ask(global, Call::Routes, |reply| if let Response::Routes(r) = reply { Some(r) } else { None })?;
    global.output().show(&routes, |r| text(&r.routes))
}

/// The routes as a person reads them: a line each, then what is to be said about some.
fn text(routes: &[RouteLine]) -> String {
    if routes.is_empty() {
        return "no node leads to a subnet; on one that does: meshd up --advertise-routes 192.168.1.0/24".to_owned();
    }
    let aliased = routes.iter().any(|route| route.alias.is_some());
    let mut rows = vec![["PREFIX", "NODE", "STATE", "VIA"].map(str::to_owned).to_vec()];
    if aliased {
        rows[0].push("ALIAS".to_owned());
    }
    rows.extend(routes.iter().map(|route| {
        let via = route.via.clone().unwrap_or_else(|| "-".to_owned());
        let mut row = vec![route.prefix.to_string(), route.node.clone(), word(route).to_owned(), via];
        if aliased {
            row.push(route.alias.map_or_else(|| "-".to_owned(), |alias| alias.to_string()));
        }
        row
    }));
    let mut text = table(&rows);
    for route in routes {
        if let Some(why) = &route.why {
            let good = route.state == RouteState::Approved || route.place == Some(RoutePlace::Home);
            let style = if good { GREEN } else { YELLOW };
            let what = paint(word(route), style);
            text.push_str(&format!("{} of {} is {what}: {why}\n", route.prefix, route.node));
        }
    }
    text
}

const fn word(route: &RouteLine) -> &'static str {
    match (route.state, route.place) {
        (RouteState::Pending, _) => "pending",
        (RouteState::Approved, _) => "approved",
        (RouteState::Active, _) => "active",
        (RouteState::Shadowed, Some(RoutePlace::Home)) => "at home",
        (RouteState::Shadowed, Some(RoutePlace::Away)) => "away",
        (RouteState::Shadowed, Some(RoutePlace::Unknown) | None) => "shadowed",
    }
}

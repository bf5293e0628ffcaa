//! `meshd invite`.

use std::time::Duration;

use crate::cli::cidr::{self, Prefixes};
use crate::cli::error::{CliError, Kind};
use crate::cli::{Global, client, duration};
use crate::wire::local::{Call, Response};

/// Options of `meshd invite`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The token alone goes to standard output. Whoever holds it can join until it expires or is used up:
treat it like a password.

Examples:
  meshd invite                              one machine, within 24 hours
  meshd invite --name nas                   one machine, which will be called nas
  meshd invite --name nas --routes 192.168.1.0/24
  meshd invite --uses 10 --expires 7d > token
  meshd invite | ssh nas meshd up --token-file -")]
pub struct Args {
    /// The name the machine will have
    #[arg(long)]
    name: Option<String>,
    /// How many machines may join with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    uses: u32,
    /// How long it can be used, such as 30m, 24h or 7d
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration::parse)]
    expires: Duration,
    /// The machine becomes an admin: it may invite and remove others
    #[arg(long)]
    admin: bool,
    /// Subnets the machine may lead to without further approval, such as 192.168.1.0/24
    #[arg(long, value_name = "CIDR,…", value_parser = cidr::parse_list)]
    routes: Option<Prefixes>,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    if args.name.is_some() && args.uses != 1 {
        let text = format!("one name cannot be given to {} machines", args.uses);
        return Err(CliError::new(Kind::Usage, "usage", text, "leave out --name, or make an invite each"));
    }
    let call = Call::Invite {
        name: args.name.clone(),
        uses: args.uses,
        expires_s: args.expires.as_secs().max(1),
        admin: args.admin,
        routes: args.routes.as_ref().map(|list| list.0.clone()).unwrap_or_default(),
    };
    let token = client::ask(global, call, |reply| if let Response::Token(t) = reply { Some(t) } else { None })?;
    global.output().show(&token, |t| t.token.clone())
}

//! `meshd drain`.

use clap::ValueEnum;

use crate::cli::error::CliError;
use crate::cli::{Global, client};
use crate::wire::local::{Call, Drained, Response};

/// Options of `meshd drain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Before work on a machine that leads to subnets: other nodes that lead there are asked from now on.
What is under way through this one is still forwarded, so that no connection breaks; when that has
ended (`meshd status` shows what still passes), the machine can go down. It stays drained over a
restart, until `meshd drain off`. Traffic does not come back by itself then: it stays where it is good.

Examples:
  meshd drain
  meshd drain off")]
pub struct Args {
    /// Begin or end
    #[arg(value_enum, default_value_t = Switch::On)]
    switch: Switch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// Have others asked
    On,
    /// Be asked again
    Off,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let call = Call::Drain { on: args.switch == Switch::On };
    let drained = client::ask(global, call, |reply| if let Response::Drained(d) = reply { Some(d) } else { None })?;
    global.output().show(&drained, text)
}

fn text(drained: &Drained) -> String {
    let as_before = if drained.already { ", as before" } else { "" };
    if !drained.draining {
        return format!("this node is asked again for what it leads to{as_before}");
    }
    if drained.routes.is_empty() {
        return format!("this node is drained{as_before}; it leads to nothing now");
    }
    let mut text = format!("this node is drained{as_before}\n");
    for route in &drained.routes {
        let line = match route.others.as_slice() {
            [] => format!("{}: nobody else leads there, so this node is asked on", route.prefix),
            others => format!("{}: {} instead", route.prefix, others.join(" or ")),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

//! `meshd set`, and the options it shares with `meshd up`.

use std::time::Duration;

use crate::cli::cidr::{self, Prefixes, Probes};
use crate::cli::error::{CliError, Kind};
use crate::cli::output::{BOLD, paint};
use crate::cli::{Global, client, duration, size};
use crate::wire::local::{Call, Response, RouteProbe, SettingsChange, SettingsDocument};

/// Settings of a node that `meshd up` and `meshd set` take. Each is kept until it is given otherwise.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Settings, kept until given otherwise")]
pub(super) struct Routing {
    /// Subnets this machine leads to, such as 192.168.1.0/24, or none
    #[arg(long, value_name = "CIDR,…", value_parser = cidr::parse_list)]
    advertise_routes: Option<Prefixes>,
    /// Offer to carry all traffic of others [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    advertise_exit_node: Option<bool>,
    /// Use the subnets that others lead to [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    accept_routes: Option<bool>,
    /// Have this machine's programs ask meshd for the names of nodes [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    accept_dns: Option<bool>,
    /// Let what is forwarded for others leave under this machine's own address [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    snat: Option<bool>,
    /// Send all traffic through this node (name, mesh address or id prefix), or none
    #[arg(long, value_name = "NODE")]
    exit_node: Option<String>,
    /// With an exit node, still reach the networks this machine is in directly [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    exit_node_allow_lan_access: Option<bool>,
    /// With an exit node, let nothing leave beside it, not even when meshd was killed [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    kill_switch: Option<bool>,
    /// Relay for pairs of nodes that have no direct path, when the coordinator is gone or this way is shorter [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    relay: Option<bool>,
    /// Relay at most so many bytes a second, such as 500kB or 10MB; pairs share it equally [default: 10MB]
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    relay_rate: Option<u64>,
    /// Run this program with each event as JSON on its standard input, or none (docs/reference/events.md)
    #[arg(long, value_name = "PROGRAM")]
    on_event: Option<String>,
    /// Machine that shows by its answers that a subnet is reached, such as 192.168.1.0/24=192.168.1.10, or
    /// none [default: whoever has answered before]
    #[arg(long, value_name = "CIDR=ADDRESS,…", value_parser = cidr::parse_probes)]
    probe: Option<Probes>,
}

impl Routing {
    pub(super) fn change(&self) -> SettingsChange {
        SettingsChange {
            advertise_routes: self.advertise_routes.as_ref().map(|list| list.0.clone()),
            advertise_exit_node: self.advertise_exit_node,
            accept_routes: self.accept_routes,
            accept_dns: self.accept_dns,
            snat: self.snat,
            exit_node: self.exit_node.clone(),
            exit_node_allow_lan_access: self.exit_node_allow_lan_access,
            kill_switch: self.kill_switch,
            relay: self.relay,
            relay_rate: self.relay_rate,
            on_event: self.on_event.clone(),
            probes: self.probe.as_ref().map(|list| list.0.clone()),
            ..SettingsChange::default()
        }
    }
}

/// Options of `meshd set`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without options it shows what is set. With --confirm TIME the change is taken back after that time,
unless `meshd set --confirm` comes before: a machine far away is not cut off by a mistake.

Examples:
  meshd set
  meshd set --advertise-routes 192.168.1.0/24
  meshd set --exit-node gate --confirm 60s
  meshd set --confirm
  meshd set --exit-node none")]
pub struct Args {
    #[command(flatten)]
    routing: Routing,
    /// Take the change back after this time; alone: keep the change
    #[arg(long, value_name = "TIME", num_args = 0..=1, value_parser = duration::parse)]
    confirm: Option<Option<Duration>>,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let change = args.routing.change();
    let changes = change != SettingsChange::default();
    let call = match args.confirm {
        None => Call::Set { change, confirm_s: None },
        Some(Some(time)) if changes => Call::Set { change, confirm_s: Some(time.as_secs().max(1)) },
        Some(None) if !changes => Call::Confirm,
        Some(Some(_)) => {
            let hint = "give what to change, as in meshd set --exit-node gate --confirm 60s; to keep a change: meshd set --confirm";
            return Err(CliError::new(Kind::Usage, "usage", "nothing is changed, so nothing can be taken back", hint));
        }
        Some(None) => {
            let hint = "such as --confirm 60s; to keep an earlier change: meshd set --confirm, with nothing else";
            return Err(CliError::new(Kind::Usage, "usage", "--confirm needs a time when something is changed", hint));
        }
    };
    let set = client::ask(global, call, |reply| if let Response::Settings(s) = reply { Some(s) } else { None })?;
    let output = global.output();
    for note in &set.notes {
        output.note(&format!("{} {note}", paint("note:", BOLD)));
    }
    output.show(&set, text)
}

fn probes(probes: &[RouteProbe]) -> String {
    match probes {
        [] => "whoever has answered before".to_owned(),
        some => some.iter().map(|p| format!("{}={}", p.prefix, p.target)).collect::<Vec<_>>().join(", "),
    }
}

fn text(set: &SettingsDocument) -> String {
    let yes = |on: bool| if on { "yes" } else { "no" }.to_owned();
    let list = |prefixes: &[ipnet::IpNet]| match prefixes {
        [] => "none".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let mut rows = vec![
        ("advertise-routes", list(&set.advertise_routes)),
        ("advertise-exit-node", yes(set.advertise_exit_node)),
        ("accept-routes", yes(set.accept_routes)),
        ("accept-dns", yes(set.accept_dns)),
        ("snat", yes(set.snat)),
        ("drain", yes(set.drain)),
        ("probe", probes(&set.probes)),
        ("exit-node", set.exit_node.clone().unwrap_or_else(|| "none".to_owned())),
        ("exit-node-allow-lan-access", yes(set.exit_node_allow_lan_access)),
        ("kill-switch", yes(set.kill_switch)),
        ("relay", if set.relay { format!("yes, {} bytes/s", set.relay_rate) } else { yes(false) }),
        ("on-event", set.on_event.clone().unwrap_or_else(|| "none".to_owned())),
    ];
    if let Some(seconds) = set.reverts_in_s {
        rows.push(("taken back", format!("in {seconds} s, unless confirmed: meshd set --confirm")));
    }
    rows.into_iter().map(|(name, value)| format!("{} {value}\n", paint(&format!("{name:<27}"), BOLD))).collect()
}

//! `meshd netcheck`.

use std::fmt::Write as _;

use crate::cli::error::CliError;
use crate::cli::output::{BOLD, millis, paint};
use crate::cli::{Global, client};
use crate::engine::lifetime::LIMIT;
use crate::wire::local::{Call, Netcheck, PortMapper, PortMapperProtocol, Punching, Response};
use crate::wire::nat::{PortModel, UdpLifetime};

/// Options of `meshd netcheck`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
NAT behaviour is given in the words of RFC 4787: endpoint-independent mapping lets two nodes meet
directly, address-and-port-dependent mapping on both sides needs the relay.")]
pub struct Args {
    /// Ask this STUN server instead of the coordinator's; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    stun: Vec<String>,

    /// Also find out how long the NAT keeps an idle UDP mapping: takes until it has forgotten one, five minutes at most
    #[arg(long)]
    lifetime: bool,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let call = Call::Netcheck { stun: args.stun.clone(), lifetime: args.lifetime };
    let patience = if args.lifetime { LIMIT + client::PATIENCE } else { client::PATIENCE };
    let pick = |reply| if let Response::Netcheck(r) = reply { Some(*r) } else { None };
    let report = client::ask_for(global, call, patience, pick)?;
    let unknown = args.lifetime && report.udp_lifetime.is_none();
    global.output().show(&report, |report| {
        let mut text = text(report);
        if unknown {
            text.push_str(
                " How long an idle mapping is kept is not known: the STUN server does not answer to another port.",
            );
        }
        text
    })
}

fn seconds(lifetime: UdpLifetime) -> String {
    match lifetime {
        UdpLifetime { at_least_s, less_than_s: Some(less) } => format!("{at_least_s} s idle, less than {less} s"),
        UdpLifetime { at_least_s, less_than_s: None } => format!("{at_least_s} s idle, or longer"),
    }
}

fn text(report: &Netcheck) -> String {
    let mut text = String::new();
    let mut row = |label: &str, value: &str| {
        let _ = writeln!(text, "{} {value}", paint(&format!("{label:<13}"), BOLD));
    };
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    let time = |ms: Option<f64>| ms.map_or_else(|| "not connected".to_owned(), millis);
    row("UDP", yes_no(report.udp));
    row("IPv6", yes_no(report.ipv6));
    let reflexive: Vec<String> = report.reflexive.iter().map(ToString::to_string).collect();
    row("seen as", if reflexive.is_empty() { "unknown".to_owned() } else { reflexive.join(", ") }.as_str());
    row("mapping", report.mapping.as_deref().unwrap_or("unknown"));
    row("filtering", report.filtering.as_deref().unwrap_or("unknown"));
    let known = |yes: Option<bool>| yes.map_or("unknown", yes_no);
    row("ports", &ports(report.port_model));
    row("hairpin", known(report.hairpin));
    if let Some(lifetime) = report.udp_lifetime {
        row("UDP lifetime", &seconds(lifetime));
    }
    match (report.nat_depth, report.double_nat) {
        (Some(0), _) => row("NATs", "none"),
        (Some(1), _) => row("NATs", "one"),
        (Some(2), _) | (None, Some(true)) => row("NATs", "two, one behind the other"),
        (Some(more), _) => row("NATs", &format!("{more}, one behind the other")),
        (None, _) => {}
    }
    match &report.port_mapper {
        None => row("port mapping", report.port_mapping.as_deref().unwrap_or("none")),
        Some(mapper) => {
            row("port mapping", &port_mapping(mapper));
            for protocol in &mapper.protocols {
                row("", &by_protocol(protocol));
            }
        }
    }
    if let Some(punching) = &report.punching {
        row("punching", &limits(punching));
    }
    row("coordinator", &time(report.coordinator_rtt_ms));
    row("relay", &time(report.relay_rtt_ms));
    for server in &report.servers {
        let answer = match (server.rtt_ms, server.reflexive) {
            (Some(ms), Some(seen)) => format!("{} answered in {}, saw {seen}", server.server, millis(ms)),
            (Some(ms), None) => format!("{} answered in {}", server.server, millis(ms)),
            (None, _) => format!("{} did not answer", server.server),
        };
        row("STUN", &answer);
    }
    text.push('\n');
    text.push_str(&report.meaning);
    text
}

fn port_mapping(mapper: &PortMapper) -> String {
    let router = mapper.gateway.map(|ip| format!(" at the router {ip}")).unwrap_or_default();
    match (&mapper.protocol, mapper.external) {
        (Some(protocol), Some(external)) => {
            let left = match (mapper.lifetime_s, mapper.expires_s) {
                (Some(granted), Some(left)) => format!("for {} min, {} left", granted / 60, left / 60),
                _ => "without an end".to_owned(),
            };
            format!("{external} to port {} by {}{router}, {left}", mapper.internal_port, name(protocol))
        }
        _ => format!("none{router}: {}", mapper.reason.as_deref().unwrap_or("unknown")),
    }
}

fn by_protocol(protocol: &PortMapperProtocol) -> String {
    let state = match protocol.state.as_str() {
        "granted" => "granted",
        "answers" => "answers",
        "refused" => "refused",
        "silent" => "no answer",
        "not-asked" => "not asked",
        other => other,
    };
    let why = protocol.text.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!("{:<8} {state}{why}", name(&protocol.name))
}

/// As the specifications write it.
fn name(protocol: &str) -> &str {
    match protocol {
        "pcp" => "PCP",
        "nat-pmp" => "NAT-PMP",
        "upnp" => "UPnP",
        other => other,
    }
}

fn limits(p: &Punching) -> String {
    let heavy = p.heavy.as_ref().map(|peer| format!(", under way to {peer}")).unwrap_or_default();
    format!(
        "at most {} extra sockets ({} open), {} probes a second, {} addresses a minute ({} in the last){heavy}",
        p.sockets_max, p.sockets, p.probes_per_second_max, p.entries_per_minute_max, p.entries_last_minute,
    )
}

pub(super) fn ports(model: Option<PortModel>) -> String {
    match model {
        None | Some(PortModel::Unknown) => "unknown".to_owned(),
        Some(PortModel::Preserving) => "kept where they are free".to_owned(),
        Some(PortModel::Sequential { step, per_second }) => {
            format!("one after the other (step {step}, {per_second} of others a second)")
        }
        Some(PortModel::Block { low, high }) => format!("from a block, about {low} to {high}"),
        Some(PortModel::Random) => "at random".to_owned(),
    }
}

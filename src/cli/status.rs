//! `meshd status`.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::cli::error::{CliError, Kind};
use crate::cli::output::{BOLD, GREEN, YELLOW, bytes, millis, paint, seconds, severity_style, table};
use crate::cli::{Global, client};
use crate::wire::local::{Call, CounterValue, DropCount, PathKind, Response, Severity, Status, StatusPeer};

/// Options of `meshd status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  running
  1  not running, or not what --check asked for

PATH is `direct` (to the peer's own address), `relay` (through the coordinator or a node
that relays, which see ciphertext only), `idle` (nothing sent lately; sessions are made on demand)
or `offline`.")]
pub struct Args {
    /// Only say by the exit code whether the daemon answers (live), or is also connected (ready)
    #[arg(long, value_name = "WHAT")]
    check: Option<Check>,
    /// Show how many packets were dropped, and why
    #[arg(long, conflicts_with = "check")]
    drops: bool,
    /// Show what the packet path did: packets, bytes, batches, and how often offloads joined packets
    #[arg(long, conflicts_with_all = ["check", "drops"])]
    counters: bool,
}

/// What `--check` asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// The daemon answers.
    Live,
    /// It is up and the coordinator answers.
    Ready,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    if args.drops {
        return drops(global);
    }
    if args.counters {
        return counters(global);
    }
    let status = client::status(global)?;
    match args.check {
        None => global.output().show(&status, text),
        Some(Check::Live) => Ok(()),
        Some(Check::Ready) => ready(&status),
    }
}

fn ready(status: &Status) -> Result<(), CliError> {
    if status.state != "running" {
        let text = format!("the daemon is {}, not running yet", status.state);
        return Err(CliError::new(Kind::NotRunning, "not-ready", text, "try again in a moment"));
    }
    if !status.coordinator.connected {
        let text = format!("the coordinator {} does not answer", status.coordinator.url);
        let hint = "peers already known are still reached; meshd status shows what else is wrong";
        return Err(CliError::new(Kind::NotRunning, "not-ready", text, hint));
    }
    Ok(())
}

fn drops(global: &Global) -> Result<(), CliError> {
    let drops = client::ask(global, Call::Drops, |reply| if let Response::Drops(d) = reply { Some(d) } else { None })?;
    global.output().show(&drops, |d| drops_text(&d.drops))
}

fn counters(global: &Global) -> Result<(), CliError> {
    let take = |reply| if let Response::Counters(c) = reply { Some(c) } else { None };
    global.output().show(&client::ask(global, Call::Counters, take)?, |c| counters_text(&c.counters))
}

fn counters_text(counters: &[CounterValue]) -> String {
    let mut rows = vec![vec!["COUNTER".to_owned(), "VALUE".to_owned(), "MEANING".to_owned()]];
    rows.extend(counters.iter().map(|c| vec![c.name.clone(), c.value.to_string(), c.text.clone()]));
    table(&rows)
}

fn drops_text(counts: &[DropCount]) -> String {
    let mut rows = vec![vec!["REASON".to_owned(), "PACKETS".to_owned(), "MEANING".to_owned()]];
    rows.extend(
        counts.iter().filter(|c| c.packets > 0).map(|c| vec![c.reason.clone(), c.packets.to_string(), c.text.clone()]),
    );
    if rows.len() == 1 { "nothing was dropped".to_owned() } else { table(&rows) }
}

/// The status as a person reads it: this node, its peers, then what is wrong.
pub(super) fn text(status: &Status) -> String {
    let mut text = head(status);
    text.push('\n');
    if status.peers.is_empty() {
        text.push_str("no peers yet");
        text.push_str(if status.me.admin { "; meshd invite makes a token for the next machine\n" } else { "\n" });
    } else {
        text.push_str(&table(&peers(status)));
    }
    for peer in &status.peers {
        if let (PathKind::Relay, Some(reason)) = (peer.path.kind, &peer.path.reason) {
            let _ = writeln!(text, "{} is relayed: {reason}", peer.name);
        }
    }
    if !status.health.is_empty() {
        text.push('\n');
    }
    for health in &status.health {
        let word = match health.severity {
            Severity::Info => "note:",
            Severity::Warning => "warning:",
            Severity::Error => "error:",
        };
        let since = seconds(health.since_s);
        let _ = writeln!(text, "{} {} (for {since})", paint(word, severity_style(health.severity)), health.text);
        if !health.hint.is_empty() {
            let _ = writeln!(text, "  {} {}", paint("hint:", BOLD), health.hint);
        }
    }
    text
}

fn head(status: &Status) -> String {
    let mut text = String::new();
    let mut row = |label: &str, value: &str| {
        let _ = writeln!(text, "{} {value}", paint(&format!("{label:<12}"), BOLD));
    };
    let id = status.network.id.get(..16).unwrap_or(&status.network.id);
    row("network", &format!("{} ({id})", status.network.name));
    let admin = if status.me.admin { ", admin" } else { "" };
    let state = if status.state == "running" { String::new() } else { format!(", {}", status.state) };
    row("this node", &format!("{} ({}{admin}{state})", status.me.name, status.me.id));
    row("addresses", &addresses(&status.me.addresses));
    let heard = status.coordinator.last_heard_s.map_or_else(
        || ", never heard in this run".to_owned(),
        |s| format!(", last heard {} ago", seconds(whole_seconds(s))),
    );
    let link = match (status.coordinator.connected, status.coordinator.relay_connected) {
        (true, true) if status.coordinator.relay.as_deref() == Some("udp") => {
            paint("connected, relaying by UDP", GREEN)
        }
        (true, true) => paint("connected", GREEN),
        (true, false) => paint("connected, relay not", YELLOW),
        (false, _) => paint(&format!("not connected{heard}"), YELLOW),
    };
    row("coordinator", &format!("{} {link}", status.coordinator.url));
    if let Some(proxy) = &status.coordinator.proxy {
        row("proxy", proxy);
    }
    let nat = &status.nat;
    let unknown = "unknown";
    let behaviour = match nat.udp {
        None => "not examined yet".to_owned(),
        Some(false) => "UDP does not pass".to_owned(),
        Some(true) => format!(
            "mapping {}, filtering {}",
            nat.mapping.as_deref().unwrap_or(unknown),
            nat.filtering.as_deref().unwrap_or(unknown)
        ),
    };
    row("NAT", &behaviour);
    text
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown in whole seconds, clamped first")]
fn whole_seconds(s: f64) -> u64 {
    s.clamp(0.0, 1e12) as u64
}

fn addresses(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn peers(status: &Status) -> Vec<Vec<String>> {
    let heading = ["NAME", "ADDRESS", "PATH", "ENDPOINT", "RTT", "RX", "TX", "HANDSHAKE"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(status.peers.iter().map(peer_row));
    rows
}

fn peer_row(peer: &StatusPeer) -> Vec<String> {
    let dash = || "-".to_owned();
    let path = match peer.path.kind {
        PathKind::Direct if peer.path.tcp == Some(true) => "direct, TCP",
        PathKind::Direct => "direct",
        PathKind::Relay => "relay",
        PathKind::None if peer.online => "idle",
        PathKind::None => "offline",
    };
    vec![
        peer.name.clone(),
        peer.addresses.first().map_or_else(dash, ToString::to_string),
        path.to_owned(),
        peer.path.endpoint.clone().unwrap_or_else(dash),
        peer.path.rtt_ms.map_or_else(dash, millis),
        bytes(peer.rx_bytes),
        bytes(peer.tx_bytes),
        peer.last_handshake_s.map_or_else(dash, |s| format!("{} ago", seconds(s))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"{"schema":1,"state":"running","network":{"name":"home","id":"00112233445566778899"},
        "self":{"name":"laptop","id":"aa11","addresses":["100.71.0.1","fd00::1"],"routes":[],"version":"0.1.0",
                "admin":true,"interface":"mesh0","port":40000},
        "coordinator":{"url":"https://vpn.example.org","connected":true,"last_heard_s":0.4,"relay_connected":true},
        "nat":{"udp":true,"mapping":"endpoint-independent","filtering":"address-and-port-dependent",
               "reflexive":["203.0.113.7:50112"],"port_mapping":null},
        "peers":[{"name":"nas","id":"bb22","addresses":["100.71.0.2","fd00::2"],"routes":[],"online":true,
                  "path":{"kind":"direct","endpoint":"198.51.100.4:38220","rtt_ms":11.8,"since_s":63},
                  "rx_bytes":2048,"tx_bytes":1,"last_handshake_s":12},
                 {"name":"phone","id":"cc33","addresses":["100.71.0.3"],"routes":[],"online":true,
                  "path":{"kind":"relay","endpoint":"https://vpn.example.org","rtt_ms":31.0,"since_s":5,
                          "reason":"both NATs give every destination another port"},
                  "rx_bytes":0,"tx_bytes":0,"last_handshake_s":null},
                 {"name":"tv","id":"dd44","addresses":["100.71.0.4"],"routes":[],"online":false,
                  "path":{"kind":"none","endpoint":null,"rtt_ms":null,"since_s":null},
                  "rx_bytes":0,"tx_bytes":0,"last_handshake_s":null}],
        "health":[{"code":"udp-blocked","severity":"warning","text":"UDP does not pass","hint":"allow UDP","since_s":90}]}"#;

    #[test]
    fn the_text_shows_peers_reasons_and_health() {
        let status: Status = serde_json::from_str(EXAMPLE).unwrap();
        let text = anstream::adapter::strip_str(&text(&status)).to_string();
        let want = "\
network      home (0011223344556677)
this node    laptop (aa11, admin)
addresses    100.71.0.1, fd00::1
coordinator  https://vpn.example.org connected
NAT          mapping endpoint-independent, filtering address-and-port-dependent

NAME   ADDRESS     PATH     ENDPOINT                 RTT    RX       TX   HANDSHAKE
nas    100.71.0.2  direct   198.51.100.4:38220       12 ms  2.0 KiB  1 B  12s ago
phone  100.71.0.3  relay    https://vpn.example.org  31 ms  0 B      0 B  -
tv     100.71.0.4  offline  -                        -      0 B      0 B  -
phone is relayed: both NATs give every destination another port

warning: UDP does not pass (for 1m 30s)
  hint: allow UDP
";
        assert_eq!(text, want);
    }

    #[test]
    fn ready_needs_the_coordinator() {
        let mut status: Status = serde_json::from_str(EXAMPLE).unwrap();
        assert_eq!(ready(&status), Ok(()));
        status.coordinator.connected = false;
        assert_eq!(ready(&status).map_err(|e| e.kind.exit_code()), Err(1));
    }
}

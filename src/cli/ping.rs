//! `meshd ping PEER`.

use std::time::Duration;

use crate::cli::error::{CliError, Kind};
use crate::cli::output::millis;
use crate::cli::{Global, client, duration};
use crate::wire::local::{Call, PathKind, Pong, Response};

/// Options of `meshd ping`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  answered (with --until-direct: over a direct path)
  1  answered, but with --until-direct only through the relay
  2  no answer, or the ping could not be sent

Examples:
  meshd ping nas
  meshd ping -c 1 100.71.0.2
  meshd ping --until-direct --timeout 10s nas")]
pub struct Args {
    /// The peer's name, mesh address or id prefix
    peer: String,
    /// How many pings
    #[arg(short = 'c', long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Go on until the path is direct, for at most --timeout
    #[arg(long)]
    until_direct: bool,
    /// How long to wait for an answer (with --until-direct: for a direct path), such as 500ms or 5s
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration::parse)]
    timeout: Duration,
    /// Time between pings
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration::parse)]
    interval: Duration,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let call = Call::Ping {
        peer: args.peer.clone(),
        count: args.count,
        timeout_ms: whole_millis(args.timeout),
        interval_ms: whole_millis(args.interval),
        until_direct: args.until_direct,
    };
    let (mut answered, mut direct) = (false, false);
    let patience = args.timeout.saturating_add(args.interval).saturating_add(client::PATIENCE);
    let result = client::call(global, call, patience, &mut |reply| {
        let Response::Pong(pong) = reply else { return Ok(()) };
        answered |= pong.answered;
        direct |= pong.answered && pong.path == PathKind::Direct;
        global.output().show(&pong, line)
    });
    match result {
        Ok(()) => verdict(&args.peer, args.until_direct, answered, direct),
        Err(error) if error.kind == Kind::BrokenPipe => Err(error),
        Err(error) => Err(error.with_kind(Kind::NoAnswer)),
    }
}

fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn verdict(peer: &str, until_direct: bool, answered: bool, direct: bool) -> Result<(), CliError> {
    if !answered {
        let text = format!("{peer} did not answer");
        let hint = "meshd status says whether it is online, meshd netcheck what this network allows";
        return Err(CliError::new(Kind::NoAnswer, "no-answer", text, hint));
    }
    if until_direct && !direct {
        let text = format!("{peer} answers, but only through the relay");
        let hint = "meshd status says why; meshd netcheck on both machines tells the kinds of NAT";
        return Err(CliError::new(Kind::RelayOnly, "relay-only", text, hint));
    }
    Ok(())
}

/// `pong from nas (100.71.0.2) via direct 203.0.113.9:50112 in 12 ms`.
fn line(pong: &Pong) -> String {
    let Pong { seq, peer, address, endpoint, .. } = pong;
    if !pong.answered {
        return format!("no answer from {peer} ({address}) to ping {seq}");
    }
    let kind = match pong.path {
        PathKind::Direct => "direct",
        PathKind::Relay => "relay",
        PathKind::None => "an unknown path",
    };
    let tcp = if pong.tcp == Some(true) { " (TCP)" } else { "" };
    let endpoint = endpoint.as_ref().map_or_else(String::new, |endpoint| format!(" {endpoint}{tcp}"));
    let time = pong.rtt_ms.map_or_else(String::new, |ms| format!(" in {}", millis(ms)));
    format!("pong from {peer} ({address}) via {kind}{endpoint}{time}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pong(path: PathKind, endpoint: &str, rtt_ms: f64) -> Pong {
        Pong {
            schema: 1,
            seq: 1,
            peer: "nas".to_owned(),
            address: "100.71.0.2".parse().unwrap(),
            answered: true,
            path,
            endpoint: Some(endpoint.to_owned()),
            tcp: None,
            rtt_ms: Some(rtt_ms),
        }
    }

    #[test]
    fn the_line_is_the_one_scripts_rely_on() {
        let direct = pong(PathKind::Direct, "203.0.113.9:50112", 12.3);
        assert_eq!(line(&direct), "pong from nas (100.71.0.2) via direct 203.0.113.9:50112 in 12 ms");
        let tcp = Pong { tcp: Some(true), ..direct };
        assert_eq!(line(&tcp), "pong from nas (100.71.0.2) via direct 203.0.113.9:50112 (TCP) in 12 ms");
        let relay = pong(PathKind::Relay, "coordinator", 30.8);
        assert_eq!(line(&relay), "pong from nas (100.71.0.2) via relay coordinator in 31 ms");
        let lost = Pong { answered: false, ..relay };
        assert_eq!(line(&lost), "no answer from nas (100.71.0.2) to ping 1");
    }

    #[test]
    fn the_exit_code_tells_direct_from_relayed_from_silent() {
        let code = |until_direct, answered, direct| {
            verdict("nas", until_direct, answered, direct).err().map_or(0, |error| error.kind.exit_code())
        };
        assert_eq!(code(false, true, false), 0);
        assert_eq!(code(true, true, true), 0);
        assert_eq!(code(true, true, false), 1);
        assert_eq!(code(true, false, false), 2);
        assert_eq!(code(false, false, false), 2);
    }
}

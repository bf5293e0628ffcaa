//! `meshd up`: find the token, start the daemon (or be it), say what is up.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::cli::error::{CliError, Kind};
use crate::cli::output::{BOLD, YELLOW, paint};
use crate::cli::{Global, duration, set, status};
use crate::daemon::{self, Options, TokenText, UpReport};
use crate::link::ProxySetting;
use crate::wire::local::{Problem, Status};
use crate::wire::version;

/// More than this is no token.
const TOKEN_LIMIT: u64 = 64 << 10;

/// Options of `meshd up`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With a claim token (printed by `meshd coordinator`) this machine founds the network, with an invite
token (from `meshd invite`) it joins one, without a token it resumes. Running it twice is harmless.

A token is a secret: give it by --token-file or MESHD_TOKEN to keep it out of the shell's history.
So is a proxy's URL with a password in it: give that by --proxy-file or MESHD_PROXY.

The coordinator is reached through the proxy given last by --proxy, which is remembered; else, as
the environment says when the daemon starts, through HTTPS_PROXY or ALL_PROXY, except for hosts in
NO_PROXY.

Examples:
  meshd up meshd-invite1-…
  meshd up --token-file token --name nas
  ssh laptop meshd invite | sudo meshd up --token-file -
  meshd up                                   resume after a reboot
  meshd up --advertise-routes 192.168.1.0/24  lead others to the network this machine is in
  meshd up --foreground                      for systemd; logs to standard error
  meshd up --proxy http://proxy.corp:3128    socks5:// works too; none: no proxy; auto: environment")]
pub struct Args {
    /// Claim or invite token
    #[arg(conflicts_with = "token_file")]
    token: Option<TokenText>,
    /// Read the token from a file, or from standard input with `-`
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// This machine's name in the network [default: the host name]
    #[arg(long)]
    name: Option<String>,
    /// Name of the interface [default: the first free of mesh0, mesh1, …]
    #[arg(long, value_name = "NAME")]
    tun: Option<String>,
    /// UDP port [default: the one used last, at first a random one]
    #[arg(long)]
    port: Option<u16>,
    /// Do not ask the router to let peers in at that port (PCP, NAT-PMP, UPnP)
    #[arg(long)]
    no_port_mapping: bool,
    /// Leave the offloads of the network interface unused, for kernels where they have faults
    #[arg(long)]
    no_offload: bool,
    /// Leave the offloads of UDP unused, for kernels and network drivers where they have faults
    #[arg(long)]
    no_udp_offload: bool,
    /// Sockets to open for a punch through a hard NAT at most, up to 512; 0: never try
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(0..=512))]
    punch_sockets: Option<u16>,
    /// Probes a second at most, in all [default: 1000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(10..=10_000))]
    punch_rate: Option<u32>,
    /// Addresses tried a minute at most, each an entry in the router's table [default: 4000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(50..=60_000))]
    punch_entries: Option<u32>,
    /// Reach the coordinator through this proxy; none: through none; auto: as the environment says [env: MESHD_PROXY]
    #[arg(long, value_name = "URL", conflicts_with = "proxy_file")]
    proxy: Option<Hidden>,
    /// Read the proxy's URL, with its password, from a file
    #[arg(long, value_name = "FILE")]
    proxy_file: Option<PathBuf>,
    /// How long to wait until the node is up, such as 30s
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    foreground: bool,
    /// Name of the network, when founding one [default: home]
    #[arg(long, value_name = "NAME")]
    network_name: Option<String>,
    /// IPv4 range of the network, when founding one [default: a free /16 of 100.64.0.0/10]
    #[arg(long, value_name = "CIDR", value_parser = range)]
    ipv4_range: Option<Ipv4Net>,
    #[command(flatten)]
    routing: set::Routing,
}

/// A text that may hold a password. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
struct Hidden(Zeroizing<String>);

impl From<String> for Hidden {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(…)")
    }
}

/// `meshd up --json`.
#[derive(Debug, Serialize)]
struct Document {
    schema: u16,
    already_running: bool,
    notes: Vec<String>,
    warning: Option<Problem>,
    status: Status,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let proxy = proxy(args)?;
    let shown_in_ps = matches!((&proxy, &args.proxy), (Some(ProxySetting::Use(p)), Some(_)) if p.has_credentials());
    if args.foreground && (args.token.is_some() || shown_in_ps) {
        return without_secrets_in_ps(args.token.as_ref(), args.proxy.as_ref().filter(|_| shown_in_ps));
    }
    let options = Options {
        state_dir: global.state_dir(),
        socket: global.socket(),
        tun: args.tun.clone(),
        name: args.name.clone(),
        token: token(args)?,
        proxy,
        port: args.port.unwrap_or(0),
        network_name: args.network_name.clone(),
        ipv4_range: args.ipv4_range,
        no_offload: args.no_offload,
        no_udp_offload: args.no_udp_offload,
        settings: args.routing.change(),
        punch_sockets: args.punch_sockets,
        punch_rate: args.punch_rate,
        punch_entries: args.punch_entries,
        no_port_mapping: args.no_port_mapping,
    };
    if args.foreground {
        return Ok(daemon::run(options)?);
    }
    // The installed service runs the node that has the default directories.
    let for_service = global.state_dir.is_none() && global.socket.is_none();
    let report = daemon::spawn_background(&options, args.timeout, for_service)?;
    show(report, global)
}

/// Parses an IPv4 prefix, naming the mistake.
fn range(text: &str) -> Result<Ipv4Net, String> {
    let net: Ipv4Net = text.parse().map_err(|_| match text.parse::<std::net::Ipv4Addr>() {
        Ok(address) => format!("{address} has no prefix length; did you mean {address}/16?"),
        Err(_) => "it is no IPv4 prefix; write for example 100.71.0.0/16".to_owned(),
    })?;
    if net.addr() == net.network() {
        return Ok(net);
    }
    Err(format!("{text} has bits set outside its prefix; did you mean {}?", net.trunc()))
}

fn show(report: UpReport, global: &Global) -> Result<(), CliError> {
    let output = global.output();
    for note in &report.notes {
        output.note(&format!("{} {note}", paint("note:", BOLD)));
    }
    if let Some(warning) = &report.warning {
        output.note(&format!("{} {}", paint("warning:", YELLOW), warning.text));
        if !warning.hint.is_empty() {
            output.note(&format!("{} {}", paint("hint:", BOLD), warning.hint));
        }
    }
    let UpReport { status, already_running, notes, warning } = report;
    let document = Document { schema: version::LOCAL, already_running, notes, warning, status };
    output.show(&document, |d| status::text(&d.status))
}

/// The token: the argument, else the file, else the environment.
fn token(args: &Args) -> Result<Option<TokenText>, CliError> {
    let text = match (&args.token, &args.token_file) {
        (Some(token), _) => Some(token.text().to_owned()),
        (None, Some(file)) => Some(read_secret(file, "token-file", "a token")?.to_string()),
        (None, None) => std::env::var("MESHD_TOKEN").ok().filter(|token| !token.trim().is_empty()),
    };
    Ok(text.map(|text| TokenText::from(text.trim().to_owned())))
}

/// What was given of a proxy: the argument, else the file, else the environment.
fn proxy(args: &Args) -> Result<Option<ProxySetting>, CliError> {
    let text = match (&args.proxy, &args.proxy_file) {
        (Some(url), _) => Some(url.0.clone()),
        (None, Some(file)) => Some(read_secret(file, "proxy-file", "a proxy's URL")?),
        (None, None) => std::env::var("MESHD_PROXY").ok().map(Zeroizing::new),
    };
    let text = text.filter(|text| !text.trim().is_empty());
    Ok(text.map(|text| ProxySetting::parse(&text)).transpose().map_err(Problem::from)?)
}

/// Reads what a file holds; `what` names it.
fn read_secret(file: &Path, code: &str, what: &str) -> Result<Zeroizing<String>, CliError> {
    let mut text = Zeroizing::new(String::new());
    let from_stdin = file == Path::new("-");
    let read = if from_stdin {
        std::io::stdin().take(TOKEN_LIMIT).read_to_string(&mut text)
    } else {
        File::open(file).and_then(|file| file.take(TOKEN_LIMIT).read_to_string(&mut text))
    };
    let shown = if from_stdin { "standard input".to_owned() } else { file.display().to_string() };
    match read {
        Err(error) => {
            let text = format!("cannot read {what} from {shown}: {error}");
            let hint = format!("give the file that holds {what}, or - for standard input");
            Err(CliError::new(Kind::Failed, code, text, hint))
        }
        Ok(_) if text.trim().is_empty() => {
            let hint = match code {
                "token-file" => "meshd invite on an admin node prints one",
                _ => "write it as http://NAME:PASSWORD@HOST:PORT",
            };
            Err(CliError::failed(code, format!("{shown} holds no {}", what.trim_start_matches("a ")), hint))
        }
        Ok(_) => Ok(text),
    }
}

/// Runs this command again in its own place, with the token coming through a pipe and the proxy's URL in the environment,
/// which only the same user can read: a daemon in the foreground lives long, and everybody on the machine can read its
/// arguments.
fn without_secrets_in_ps(token: Option<&TokenText>, proxy: Option<&Hidden>) -> Result<(), CliError> {
    let failed =
        |error: std::io::Error| CliError::failed("daemon", format!("cannot hide secrets from ps: {error}"), "");
    let secrets: Vec<&[u8]> =
        token.map(|t| t.text().as_bytes()).into_iter().chain(proxy.map(|p| p.0.as_bytes())).collect();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("meshd").args(public_args(std::env::args_os().skip(1), &secrets));
    if let Some(token) = token {
        let (reader, mut writer) = std::io::pipe().map_err(failed)?;
        // A token is far smaller than what a pipe holds.
        writer.write_all(token.text().as_bytes()).map_err(failed)?;
        drop(writer);
        command.args(["--token-file", "-"]).stdin(Stdio::from(reader));
    }
    if let Some(proxy) = proxy {
        command.env("MESHD_PROXY", &*proxy.0);
    }
    Err(failed(command.exec()))
}

/// The arguments without the secrets, and without the `--proxy` that went before one.
fn public_args(args: impl Iterator<Item = OsString>, secrets: &[&[u8]]) -> Vec<OsString> {
    let mut kept: Vec<OsString> = Vec::new();
    for arg in args {
        let bytes = arg.as_encoded_bytes();
        if !secrets.contains(&bytes.strip_prefix(b"--proxy=").unwrap_or(bytes)) {
            kept.push(arg);
        } else if kept.last().is_some_and(|last| last == "--proxy") {
            kept.pop();
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(token: Option<&str>, token_file: Option<&Path>) -> Args {
        Args {
            token: token.map(|token| TokenText::from(token.to_owned())),
            token_file: token_file.map(Path::to_owned),
            name: None,
            tun: None,
            port: None,
            timeout: Duration::from_secs(30),
            foreground: false,
            no_offload: false,
            no_udp_offload: false,
            routing: set::Routing::default(),
            punch_sockets: None,
            punch_rate: None,
            punch_entries: None,
            proxy: None,
            proxy_file: None,
            no_port_mapping: false,
            network_name: None,
            ipv4_range: None,
        }
    }

    #[test]
    fn secrets_leave_the_arguments_and_nothing_else_does() {
        let args = |args: &[&str]| args.iter().map(OsString::from).collect::<Vec<_>>();
        let all = args(&["up", "--proxy", "http://u:p@h:1", "meshd-invite1-x", "--foreground", "--name", "nas"]);
        let secrets: [&[u8]; 2] = [b"http://u:p@h:1", b"meshd-invite1-x"];
        let left = args(&["up", "--foreground", "--name", "nas"]);
        assert_eq!(public_args(all.clone().into_iter(), &secrets), left);
        assert_eq!(
            public_args(args(&["up", "--proxy=http://u:p@h:1", "--foreground"]).into_iter(), &secrets),
            left[..2]
        );
        assert_eq!(public_args(left.clone().into_iter(), &[]), left);
    }

    #[test]
    fn a_proxy_comes_from_an_argument_or_a_file_and_a_mistake_shows_no_password() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("proxy");
        std::fs::write(&file, "http://ann:secret@proxy:3128\n").unwrap();
        let given = |url: Option<&str>, file: Option<&Path>| Args {
            proxy: url.map(|url| Hidden::from(url.to_owned())),
            proxy_file: file.map(Path::to_owned),
            ..args(None, None)
        };
        let read = proxy(&given(None, Some(&file))).unwrap().unwrap();
        assert_eq!(*read.secret_text(), "http://ann:secret@proxy:3128");
        assert_eq!(proxy(&given(Some("none"), None)).unwrap(), Some(ProxySetting::None));
        let wrong = given(Some("gopher://ann:secret@proxy"), None);
        let refused = proxy(&wrong).unwrap_err();
        assert_eq!(refused.problem.code, "proxy-url");
        assert!(!format!("{refused:?} {wrong:?}").contains("secret"));
        assert_eq!(proxy(&given(None, Some(&dir.path().join("none")))).unwrap_err().problem.code, "proxy-file");
    }

    #[test]
    fn a_token_comes_from_an_argument_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "meshd-invite1-abc\n").unwrap();
        let text = |args: &Args| token(args).unwrap().unwrap().text().to_owned();
        assert_eq!(text(&args(Some(" meshd-invite1-x "), None)), "meshd-invite1-x");
        assert_eq!(text(&args(None, Some(&file))), "meshd-invite1-abc");
        std::fs::write(&file, "\n").unwrap();
        assert_eq!(token(&args(None, Some(&file))).unwrap_err().problem.code, "token-file");
        assert_eq!(token(&args(None, Some(&dir.path().join("none")))).unwrap_err().problem.code, "token-file");
    }
}

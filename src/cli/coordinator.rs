//! `meshd coordinator`, `meshd coordinator claim` and `meshd coordinator check`.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::cli::Global;
use crate::cli::error::CliError;
use crate::cli::size;
use crate::os::manager::Manager;
use crate::os::process;
use crate::server::{Config, RelayLimits, Server, Tls, admin, state_dir, store};
use crate::wire::version;

/// Options of `meshd coordinator`.
#[expect(rustdoc::broken_intra_doc_links, reason = "the comments are help texts, and [::] is an address")]
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The claim token goes to standard output, everything else to standard error. Nodes know the
coordinator by a key in its state directory, which their tokens carry: back it up, and any
certificate will do.

Examples:
  meshd coordinator --public-url https://mesh.example.org
  meshd coordinator claim                      the claim token once more
  meshd coordinator --tls off --listen 127.0.0.1:8080 --public-url https://mesh.example.org
                                               behind a proxy that passes WebSockets

MESHD_LOG=debug shows more.")]
pub struct Args {
    /// Something else than running
    #[command(subcommand)]
    command: Option<Action>,
    /// TCP address and port for control and relay [default: [::]:443 as root, [::]:8443 otherwise]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    listen: Option<SocketAddr>,
    /// UDP address and port for STUN and the relay, or none. Two are needed to tell kinds of NAT apart [default: [::]:3478,[::]:3479]
    #[arg(long, value_name = "ADDR:PORT", value_delimiter = ',', value_parser = parse_stun)]
    stun_listen: Vec<StunListen>,
    /// The URL under which other machines reach this one; tokens carry it [default: made of the listening address]
    #[arg(long, value_name = "URL")]
    public_url: Option<String>,
    /// Directory with the coordinator's key and store [default: /var/lib/meshd-coordinator]
    #[arg(long, global = true, value_name = "DIR", env = "MESHD_COORDINATOR_STATE_DIR", hide_env_values = true)]
    state_dir: Option<PathBuf>,
    /// Where the records are kept [default: sqlite://STATE_DIR/store.db]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// TLS on the TCP port: auto (self-made certificate, or the one given), or off (a proxy in front does it)
    #[arg(long, value_name = "MODE", default_value = "auto")]
    tls: TlsMode,
    /// Certificate chain to use, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Relay at most so many bytes per second, shared equally by the pairs of machines, as in 10MB
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    relay_rate: Option<u64>,
    /// Relay at most so many bytes a month (UTC), as in 1TB; then only what machines need to connect, and small packets
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    relay_monthly: Option<u64>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the claim token, if it has not been used
    Claim {
        /// The URL in the token [default: that of the coordinator's last start]
        #[arg(long, value_name = "URL")]
        public_url: Option<String>,
        /// Where the records are kept, if the coordinator was started with --store
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// Read the whole store and verify every record; the coordinator must not be running
    Check {
        /// Where the records are kept, if the coordinator was started with --store
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    Auto,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StunListen {
    None,
    At(SocketAddr),
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    let any = text.strip_prefix(':').and_then(|port| port.parse().ok());
    any.map(|port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).or_else(|| text.parse().ok()).ok_or_else(|| {
        "expected an address of this machine and a port, like 203.0.113.5:8443, [::]:8443 or :8443".to_owned()
    })
}

fn parse_stun(text: &str) -> Result<StunListen, String> {
    if text == "none" { Ok(StunListen::None) } else { parse_address(text).map(StunListen::At) }
}

impl Args {
    fn config(&self) -> Result<Config, CliError> {
        let tls = match (self.tls, &self.tls_cert, &self.tls_key) {
            (TlsMode::Off, None, None) => Tls::Off,
            (TlsMode::Off, ..) => {
                let hint = "leave out --tls off, or --tls-cert and --tls-key";
                return Err(CliError::failed("usage", "a certificate was given although TLS is off", hint));
            }
            (TlsMode::Auto, Some(cert), Some(key)) => Tls::Files { cert: cert.clone(), key: key.clone() },
            (TlsMode::Auto, ..) => Tls::SelfMade,
        };
        Ok(Config {
            listen: self.listen.unwrap_or_else(default_listen),
            stun: self.stun(),
            public_url: self.public_url.clone(),
            state_dir: self.state_dir(),
            store: self.store.as_deref().map(store::path_from_url).transpose()?,
            tls,
            relay: RelayLimits { rate: self.relay_rate, monthly: self.relay_monthly },
        })
    }

    fn stun(&self) -> Vec<SocketAddr> {
        if self.stun_listen.is_empty() {
            return [3478, 3479].map(|port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).to_vec();
        }
        self.stun_listen
            .iter()
            .filter_map(|listen| match listen {
                StunListen::None => None,
                StunListen::At(address) => Some(*address),
            })
            .collect()
    }

    fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| state_dir::DEFAULT.into())
    }
}

fn default_listen() -> SocketAddr {
    let port = if process::effective_uid() == 0 { 443 } else { 8443 };
    SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
}

/// Runs a coordinator until it is asked to stop, or prints its claim token.
///
/// # Errors
/// Why it could not start, or had to stop.
pub fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    let runtime = Runtime::new().map_err(|e| CliError::failed("system", format!("cannot start threads: {e}"), ""))?;
    if let Some(action) = &args.command {
        return runtime.block_on(act(action, args, global));
    }
    start_logging();
    if let Err(e) = process::raise_descriptor_limit() {
        tracing::debug!(error = %e, "the limit of open files stays as it is");
    }
    runtime.block_on(serve(&args.config()?, global))
}

async fn act(action: &Action, args: &Args, global: &Global) -> Result<(), CliError> {
    let config = args.config()?;
    let (Action::Claim { store, .. } | Action::Check { store }) = action;
    let store = store.as_deref().map(store::path_from_url).transpose()?.or(config.store);
    match action {
        Action::Claim { public_url, .. } => {
            let url = public_url.as_deref().or(config.public_url.as_deref());
            let tls = config.tls != Tls::Off;
            let claim = admin::claim(&config.state_dir, store.as_deref(), url, config.listen, tls).await?;
            global.output().show(&claim, |claim| claim.token.clone())
        }
        Action::Check { .. } => {
            let check = admin::check(&config.state_dir, store.as_deref()).await?;
            global.output().show(&check, |c| match &c.network {
                Some(id) => format!("network {id}: {} records, {} members, all valid", c.records, c.members),
                None => "no network has been founded yet; the store is sound".to_owned(),
            })
        }
    }
}

/// What `meshd coordinator --json` prints once it answers.
#[derive(Debug, Serialize)]
struct Started<'a> {
    schema: u16,
    listen: SocketAddr,
    stun: &'a [SocketAddr],
    public_url: &'a str,
    /// Null once there is a network.
    claim: Option<&'a str>,
}

async fn serve(config: &Config, global: &Global) -> Result<(), CliError> {
    // Before anything is started, so that a signal during the start is not lost.
    let signals =
        Signals::listen().map_err(|e| CliError::failed("system", format!("cannot watch signals: {e}"), ""))?;
    let output = global.output();
    let server = Server::start(config).await?;
    output.note(summary(&server, config).trim_end());
    let started = Started {
        schema: version::LOCAL,
        listen: server.listen(),
        stun: server.stun(),
        public_url: &server.public_url().url,
        claim: server.claim(),
    };
    if started.claim.is_some() {
        output.note("\nClaim token (use once, on the first machine, as in `meshd up TOKEN`):");
    }
    if let Err(e) = output.show(&started, |s| s.claim.unwrap_or_default().to_owned()) {
        output.note(&format!("{e}; `meshd coordinator claim` prints the token again"));
    }
    let manager = Manager::of_this_process();
    manager.ready(&format!("answers at {}", server.public_url().url));
    server
        .run_until(async {
            let name = tokio::select! {
                name = signals.wait() => name,
                never = stay_watched(&manager) => match never {},
            };
            manager.stopping();
            output.note(&format!("{name}: stopping"));
        })
        .await
        .map_err(CliError::from)
}

/// Tells the service manager, if it watches, that this thread's tasks still run.
async fn stay_watched(manager: &Manager) -> Infallible {
    let Some(every) = manager.alive_every() else { return std::future::pending().await };
    loop {
        manager.alive();
        tokio::time::sleep(every).await;
    }
}

fn summary(server: &Server, config: &Config) -> String {
    let mut text = format!("meshd coordinator {} is ready\n", version::PROGRAM);
    let tls = match &config.tls {
        Tls::Off => "no TLS",
        Tls::SelfMade => "TLS with a self-made certificate",
        Tls::Files { .. } => "TLS with the certificate given",
    };
    let stun: Vec<String> = server.stun().iter().map(SocketAddr::to_string).collect();
    let stun = if stun.is_empty() { "off".to_owned() } else { format!("UDP {}", stun.join(", ")) };
    let url = server.public_url();
    let derived =
        if url.given { "" } else { "  (derived; if machines reach this one by another name, say --public-url URL)" };
    // Writing to a String does not fail.
    let _ = writeln!(text, "  listening on    TCP {}, {tls}", server.listen());
    let _ = writeln!(text, "  STUN            {stun}");
    let _ = writeln!(text, "  tokens carry    {}{derived}", url.url);
    let _ = writeln!(text, "  state           {}", config.state_dir.display());
    text
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Logs to standard error, at INFO unless `MESHD_LOG` says otherwise.
fn start_logging() {
    let filter = EnvFilter::try_from_env("MESHD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // An error means that logging is on already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false).try_init();
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<(Args, Global), clap::Error> {
        let cli = Cli::try_parse_from(line.split_whitespace())?;
        match cli.command {
            Command::Coordinator(args) => Ok((args, cli.global)),
            other => panic!("not the coordinator: {other:?}"),
        }
    }

    #[test]
    fn defaults_and_options_become_a_configuration() {
        let config = parse("meshd coordinator").unwrap().0.config().unwrap();
        assert_eq!(config.stun, ["[::]:3478".parse().unwrap(), "[::]:3479".parse().unwrap()]);
        assert_eq!((config.tls, config.store, config.public_url), (Tls::SelfMade, None, None));
        let line =
            "meshd coordinator --listen :9000 --stun-listen 127.0.0.1:1,127.0.0.2:2 --stun-listen [::1]:3 --tls off";
        let config = parse(line).unwrap().0.config().unwrap();
        assert_eq!(config.listen, "[::]:9000".parse().unwrap());
        assert_eq!(config.stun.len(), 3);
        assert_eq!(config.tls, Tls::Off);
        let limits =
            parse("meshd coordinator --relay-rate 12.5MB --relay-monthly 1TB").unwrap().0.config().unwrap().relay;
        assert_eq!(limits, RelayLimits { rate: Some(12_500_000), monthly: Some(1_000_000_000_000) });
        assert!(parse("meshd coordinator --stun-listen none").unwrap().0.config().unwrap().stun.is_empty());
        let config = parse("meshd coordinator --store sqlite:///x/y.db").unwrap().0.config().unwrap();
        assert_eq!(config.store, Some("/x/y.db".into()));
    }

    #[test]
    fn mistakes_are_refused() {
        for line in [
            "meshd coordinator --listen localhost:1",
            "meshd coordinator --listen 8443",
            "meshd coordinator --stun-listen 3478",
            "meshd coordinator --tls maybe",
            "meshd coordinator --tls-cert x",
            "meshd coordinator --relay-rate 100Mbit",
            "meshd coordinator --relay-monthly 0",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("meshd coordinator --tls off --tls-cert a --tls-key b").unwrap().0.config().is_err());
        let error = parse("meshd coordinator --store postgres://x").unwrap().0.config().unwrap_err();
        assert_eq!(error.problem.code, "store-url");
    }

    #[test]
    fn the_state_directory_may_stand_before_or_after_the_command() {
        for line in [
            "meshd coordinator --state-dir /x",
            "meshd --state-dir /x coordinator",
            "meshd coordinator --state-dir /x claim",
            "meshd coordinator claim --state-dir /x",
            "meshd coordinator claim --state-dir /x --json",
        ] {
            let (args, global) = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(args.state_dir(), PathBuf::from("/x"), "{line}");
            assert_eq!(global.json, line.contains("--json"));
        }
    }
}

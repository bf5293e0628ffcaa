//! What the demonstration does, in order, and what it must see at each step.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::contain::{NOT_INHERITED, THIS_PROGRAM};
use super::net::{Namespace, Nat, Segment};
use super::{Step, http};
use crate::cli::error::CliError;
use crate::wire::local::{PathKind, Status};

/// The page on the nas.
const PAGE: &str = "This page is on the nas, behind its NAT, and came through the mesh.";
const URL: &str = "https://203.0.113.10";
const LISTEN: &str = "203.0.113.10:443";
/// Two addresses with two ports each, so that nodes can tell kinds of NAT apart (RFC 5780).
const STUN: &str = "203.0.113.10:3478,203.0.113.10:3479,203.0.113.11:3478,203.0.113.11:3479";

/// The phone's network, like that of many a hotel, lets UDP out to a few ports only: no guess at ports helps there.
const STRICT: &str = "table ip strict {
    chain forward {
        type filter hook forward priority -10; policy accept;
        iifname \"lan\" udp dport != { 53, 443, 3478, 3479 } drop;
    }
}
";

/// What there is to show at the end.
pub(super) struct Told {
    /// The laptop's status.
    pub(super) status: Status,
}

/// One machine with meshd on it.
struct Machine {
    name: &'static str,
    namespace: Namespace,
}

impl Machine {
    fn state_dir(&self) -> PathBuf {
        Path::new("/run").join(self.name)
    }

    /// `meshd ARGS` on this machine, untouched by the settings of the person who started the demonstration.
    fn meshd(&self, args: &[&str]) -> Command {
        let mut command = Command::new(THIS_PROGRAM);
        command.arg0("meshd").arg("--state-dir").arg(self.state_dir()).args(args);
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        self.namespace.run(&mut self.meshd(args)).with_context(|| format!("on {}", self.name))
    }

    fn status(&self) -> Result<Status> {
        serde_json::from_str(&self.run(&["status", "--json"])?).context("cannot read the status document")
    }

    fn up(&self, token: &str) -> Result<Status> {
        let mut command = self.meshd(&["up", "--name", self.name]);
        command.env("MESHD_TOKEN", token.trim());
        self.namespace.run(&mut command).with_context(|| format!("on {}", self.name))?;
        self.status()
    }
}

/// Runs the demonstration, reporting each step once it was seen to work.
pub(super) fn tell(report: &mut dyn FnMut(Step) -> Result<(), CliError>) -> Result<Told> {
    let start = Instant::now();
    let mut done =
        |text: String| report(Step { text, after_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX) });

    let internet = Segment::internet()?;
    let coordinator = Machine { name: "coordinator", namespace: internet.host("coordinator", 10)? };
    coordinator.namespace.ip(&format!("addr add {}/24 dev eth0", internet.v4(11)))?;
    let behind = |name, number, nat, more: &str| -> Result<Machine> {
        let router = internet.router(&format!("{name}-router"), number, nat)?;
        router.namespace.nft(more)?;
        Ok(Machine { name, namespace: router.lan.host(name, 2)? })
    };
    let laptop = behind("laptop", 21, Nat::Home, "")?;
    let nas = behind("nas", 22, Nat::Home, "")?;
    let phone = behind("phone", 23, Nat::Symmetric, STRICT)?;
    done("made an internet, laptop and nas behind home NATs, phone behind a NAT that cannot be punched".to_owned())?;

    let log = Path::new("/run/coordinator.log");
    let mut serve = coordinator.meshd(&["coordinator", "--public-url", URL, "--listen", LISTEN, "--stun-listen", STUN]);
    let mut server = coordinator.namespace.spawn(&mut serve, log)?;
    let claim = until("the coordinator prints a claim token", Duration::from_secs(15), || {
        if let Some(status) = server.try_wait()? {
            bail!("the coordinator ended ({status}): {}", fs::read_to_string(log).unwrap_or_default());
        }
        Ok(coordinator.run(&["coordinator", "claim"]).ok())
    })?;
    done(format!("meshd coordinator runs at {URL}"))?;

    let status = laptop.up(&claim)?;
    done(format!("meshd up CLAIM on laptop founded the network {}: {}", status.network.name, addresses(&status)))?;
    for machine in [&nas, &phone] {
        let invite = laptop.run(&["invite"])?;
        let status = machine.up(&invite)?;
        done(format!("meshd invite on laptop, meshd up INVITE on {}: {}", machine.name, addresses(&status)))?;
    }

    let pong = last_line(&laptop.run(&["ping", "--until-direct", "--timeout", "15s", "nas"])?);
    done(format!("meshd ping nas on laptop: {pong}"))?;
    for (from, to) in [(&laptop, &phone), (&phone, &nas)] {
        let pong = last_line(&from.run(&["ping", "-c", "2", to.name])?);
        done(format!("meshd ping {} on {}: {pong}", to.name, from.name))?;
    }

    let nas_v4 = address(&nas.status()?, IpAddr::is_ipv4)?;
    let page = fetch_across(&laptop, &nas, SocketAddr::new(nas_v4, 80))?;
    done(format!("http://{nas_v4}/ fetched on laptop: \"{page}\""))?;

    // Only now: the pings above also gave the phone time for every attempt at a direct path.
    let status = laptop.status()?;
    expect_path(&status, nas.name, PathKind::Direct)?;
    expect_path(&status, phone.name, PathKind::Relay)?;
    Ok(Told { status })
}

fn fetch_across(from: &Machine, to: &Machine, server: SocketAddr) -> Result<String> {
    let listener =
        to.namespace.enter(|| TcpListener::bind(server))?.with_context(|| format!("cannot listen on {server}"))?;
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| http::serve_once(&listener, PAGE));
        let page = from.namespace.enter(|| http::fetch(server))?;
        if page.is_ok() {
            serving.join().map_err(|_| anyhow::anyhow!("the page's server panicked"))??;
        }
        page
    })
}

/// Tries until there is an answer.
///
/// # Errors
/// What `attempt` says, or that the time is over.
fn until<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {} s in vain until {what}", limit.as_secs());
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn expect_path(status: &Status, peer: &str, kind: PathKind) -> Result<()> {
    let found = status.peers.iter().find(|p| p.name == peer).with_context(|| format!("{peer} is not in the status"))?;
    if found.path.kind != kind {
        bail!("the path to {peer} is {:?}, expected {kind:?}", found.path.kind);
    }
    Ok(())
}

fn address(status: &Status, wanted: impl Fn(&IpAddr) -> bool) -> Result<IpAddr> {
    status.me.addresses.iter().copied().find(wanted).context("the node has no such address")
}

fn addresses(status: &Status) -> String {
    status.me.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or_default().to_owned()
}

//! A NODE, RUNNING. Start order, stop order, and one table of threads.
//!
//! | thread | runs | blocks in |
//! |---|---|---|
//! | `meshd` (the first) | tokio, current-thread: planner task, control link, local API, netlink, signals | tokio |
//! | `meshd-data-0` | `Outbound` and `Inbound`, one batch from each ready source a turn ([`worker`]) | `epoll`: TUN, UDP, wake |
//! | `meshd-relay` | tokio, current-thread: the relay link ([`relay_thread`]) | tokio |
//!
//! Besides these tokio starts up to two helpers for name resolution and disk writes on the first thread and one on the
//! relay thread; they end when idle. Waiting goes one way only: links and the command line may wait for the planner, the
//! planner may wait for the data thread, the data thread waits for nobody.
//!
//! A panic in any thread ends the process: half a daemon is worse than none, and the next start repairs what is left.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod apply;
mod background;
pub mod client;
mod control_link;
mod desk;
pub mod footprint;
mod health;
mod hooks;
pub mod join;
mod kernel_queues;
mod links;
mod local_api;
mod names;
mod netcheck;
mod node;
mod outbox;
mod planner_task;
mod portmap;
mod relay_carrier;
mod relay_thread;
mod routing;
mod service;
pub mod settings;
mod stop;
pub mod store;
mod tcp;
mod watch;
mod worker;

use std::fmt;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub use crate::daemon::background::spawn_background;
use crate::link::ProxySetting;
use crate::os::process;
use crate::wire::local::{Problem, SettingsChange, Status};

/// Helpers for name resolution and disk writes end when idle for so long.
const HELPER_IDLE: Duration = Duration::from_secs(2);

/// How a node is to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Options {
    /// Keys and state.
    pub state_dir: PathBuf,
    /// The local API's socket.
    pub socket: PathBuf,
    /// The interface's name; absent: the first free of `mesh0`, `mesh1`, …
    pub tun: Option<String>,
    /// The node's name; absent: the host name, with a number if that is taken. Only for joining.
    pub name: Option<String>,
    /// A claim or invite token, as text. Absent: resume.
    pub token: Option<TokenText>,
    /// Exchange every packet with the interface alone, as kernels without its offloads need it.
    #[serde(default)]
    pub no_offload: bool,
    /// Send and receive every datagram alone, as kernels and drivers without UDP's offloads need it.
    #[serde(default)]
    pub no_udp_offload: bool,
    /// How the coordinator is reached; absent: as set before, else as the environment says.
    #[serde(default)]
    pub proxy: Option<ProxySetting>,
    /// Ask no router for a port.
    #[serde(default)]
    pub no_port_mapping: bool,
    /// UDP port; 0: the one used last, or a random one.
    pub port: u16,
    /// Sockets that punches through hard NATs may open; 0: none are made. Absent: as many as are ever of use.
    #[serde(default)]
    pub punch_sockets: Option<u16>,
    /// Probes that punches may send a second. Absent: the usual number.
    #[serde(default)]
    pub punch_rate: Option<u32>,
    /// Addresses that punches may try a minute, each of which is an entry in the NAT's table. Absent: the usual number.
    #[serde(default)]
    pub punch_entries: Option<u32>,
    /// Name of the network; only for founding. Absent: `home`.
    pub network_name: Option<String>,
    /// IPv4 range of the network; only for founding. Absent: a random /16 of 100.64.0.0/10 that is free here.
    pub ipv4_range: Option<Ipv4Net>,
    /// What is to be set up otherwise than before.
    #[serde(default)]
    pub settings: SettingsChange,
}

/// A token as a person gave it. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
pub struct TokenText(Zeroizing<String>);

impl TokenText {
    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl From<String> for TokenText {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for TokenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenText(…)")
    }
}

impl Serialize for TokenText {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TokenText {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Self::from)
    }
}

/// What `meshd up` has to say when the node is up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpReport {
    /// Network, name, addresses, peers.
    pub status: Status,
    /// A daemon was running before; nothing was started.
    pub already_running: bool,
    /// Sentences worth saying: "already in this network", damaged files kept aside, …
    pub notes: Vec<String>,
    /// The node is up, but the coordinator has not answered yet and why. It goes on trying.
    pub warning: Option<Problem>,
}

/// A problem for a person.
pub(crate) fn problem(code: &str, text: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { code: code.to_owned(), text: text.into(), hint: hint.into() }
}

/// Runs a node in this process until it is told to stop (`meshd down`, SIGTERM, SIGINT), logging to standard error.
/// `MESHD_LOG` sets what is logged, as in `MESHD_LOG=debug`.
///
/// # Errors
/// Why the node could not start, or could not go on.
pub fn run(options: Options) -> Result<(), Problem> {
    end_on_panic();
    log_to_stderr();
    process::name_main_thread();
    // Whatever is made from here on is private.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let (mut reporter, options) = background::Reporter::take_over(options)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .thread_keep_alive(HELPER_IDLE)
        .thread_name("meshd-helper")
        .build()
        .map_err(|e| problem("resources", format!("the runtime cannot start: {e}"), "see `ulimit -a`"))?;
    let result = runtime.block_on(node::run(options, &mut reporter));
    if let Err(why) = &result {
        tracing::error!(code = why.code, "{}", why.text);
        reporter.failed(why);
    }
    // A name that is being resolved, or a disk that hangs, does not hold up the end.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

/// Half a daemon is worse than none: a panic in any thread ends the process, and the next start repairs what is left.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MESHD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // Somebody else has set logging up already: fine. The journal writes the time itself.
    let _ = if std::env::var_os("JOURNAL_STREAM").is_some() { log.without_time().try_init() } else { log.try_init() };
}

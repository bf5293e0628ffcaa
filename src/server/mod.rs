//! A COORDINATOR, RUNNING: start order, stop order, and the tasks.
//!
//! # Start
//! State directory → lock → store and secrets → the network's records judged → sockets → tasks. What can fail for a reason
//! a person can mend has failed before anything is answered.
//!
//! # Tasks
//! | task | runs | ends |
//! |---|---|---|
//! | `listener` | accepts TCP; one task a connection | on stop, with its connections |
//! | `relay` | watches the thread that forwards, and keeps what it carried on disk | on stop, with the thread |
//! | `coordinator` | [`crate::coord::Coordinator`], and the store's writer | when the last connection is gone |
//!
//! The UDP sockets and all relayed packets are one thread's, `meshd-forward` ([`udp_relay`]): it must not wait for
//! anything else.
//!
//! # Stop
//! The listener closes its port and tells every connection why; the coordinator's task ends when they are gone and what
//! was being stored is stored; the store is closed. After [`STOP_DEADLINE`] whatever is left is cut off, which loses
//! nothing: every answered request is on disk.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod admin;
mod control_conn;
mod coordinator_task;
mod listener;
mod packet_store;
mod relay_conn;
pub mod state_dir;
pub mod store;
mod stun_socket;
mod stun_tcp;
pub mod tls;
mod udp_relay;

pub use relay_conn::{Relay, RelayCounters};
pub use tls::Tls;
pub use udp_relay::RelayLimits;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::coord::{self, Coordinator};
use crate::link;
use crate::os::lock::DirLock;
use crate::os::server_socket::ServerSocket;
use crate::server::coordinator_task::CoordinatorTask;
use crate::server::listener::App;
use crate::server::state_dir::{Secrets, StateDir};
use crate::server::store::Store;
use crate::server::udp_relay::{Carried, ForwarderHandle};
use crate::trust::ledger::{Judge, Ledger};
use crate::trust::record::SignedRecord;
use crate::wire::control::StunServer;
use crate::wire::keys::{ControlKey, NetworkId};
use crate::wire::local::Problem;
use crate::wire::version;

/// A stop takes at most this long.
pub const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// How often what the relay carried is kept on disk. A crash forgets at most so much of it.
const KEEP_USAGE: Duration = Duration::from_secs(60);

/// How a coordinator is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// TCP address and port; port 0 takes any.
    pub listen: SocketAddr,
    /// UDP addresses and ports for STUN and the relay.
    pub stun: Vec<SocketAddr>,
    /// What tokens carry; without it one is derived from `listen`.
    pub public_url: Option<String>,
    /// Keys, claim, certificate, and the store unless `store` says otherwise.
    pub state_dir: PathBuf,
    /// The store's file.
    pub store: Option<PathBuf>,
    /// TLS on the TCP port.
    pub tls: Tls,
    /// What the relay may carry.
    pub relay: RelayLimits,
}

/// A coordinator whose tasks are running. Dropping it cuts everything off; [`Server::run_until`] stops it properly.
#[derive(Debug)]
pub struct Server {
    listen: SocketAddr,
    stun: Vec<SocketAddr>,
    public_url: admin::PublicUrl,
    key: ControlKey,
    claim: Option<String>,
    relay: Arc<Relay>,
    tasks: JoinSet<(String, Result<(), Problem>)>,
    stop: watch::Sender<bool>,
    _lock: DirLock,
}

impl Server {
    /// Starts a coordinator; when this returns it answers.
    ///
    /// # Errors
    /// A [`Problem`] that a person can mend; nothing was changed except that an empty state directory may have been made.
    pub async fn start(config: &Config) -> Result<Self, Problem> {
        let dir = StateDir::open(&config.state_dir)?;
        let lock = dir.lock()?;
        let Opened { secrets, store, records, claim_spent } = open_state(&dir, config.store.as_deref()).await?;
        let ledger = judge(&store_path(&dir, config.store.as_deref()), &records)?;
        let claim_open = ledger.is_none() && !claim_spent;

        let tcp = listener::bind(config.listen)?;
        let listen = tcp.local_addr().map_err(|e| state_dir::unusable(dir.path(), &e))?;
        let sockets = stun_socket::bind(&config.stun)?;
        let stun: Vec<SocketAddr> = sockets.iter().map(ServerSocket::bound).collect();
        let public_url = admin::PublicUrl::decide(config.public_url.as_deref(), listen, config.tls != Tls::Off)?;
        let tls = config.tls.server_config(&dir, &public_url.host)?.map(TlsAcceptor::from);
        dir.keep_public_url(&public_url.url)?;

        let key = link::public_key(&secrets.key);
        let claim = claim_open.then(|| admin::claim_token(&public_url.url, &secrets));
        let coordinator = Coordinator::new(
            coord::Config {
                version: version::PROGRAM.to_owned(),
                stun: offered(&stun),
                claim: claim_open.then(|| coord::claim_digest(secrets.claim.expose())),
                limits: coord::Limits::default(),
            },
            ledger,
        );

        let relay = Arc::new(Relay::new().map_err(|e| no_resources(&e))?);
        let forwarder = udp_relay::start(Arc::clone(&relay), sockets, config.relay, dir.relay_usage());
        let ForwarderHandle { budget, carried, mut ended, stop: stop_forwarder } =
            forwarder.map_err(|e| no_resources(&e))?;
        let (task, handle) = CoordinatorTask::new(coordinator, store, Arc::clone(&relay), offered(&stun), budget);
        let app = Arc::new(App {
            secret: secrets.key,
            coordinator: handle,
            relay: Arc::clone(&relay),
            prefix: public_url.prefix.clone(),
            behind_proxy: config.tls == Tls::Off,
        });
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { ("coordinator".to_owned(), task.run().await) });
        let mut stopped = stopping.clone();
        tasks.spawn(async move {
            tokio::select! {
                // The thread says why in the log.
                _ = &mut ended => {}
                () = keep_usage(&dir, &carried) => {}
                _ = stopped.changed() => {}
            }
            drop(stop_forwarder);
            // It fails when the thread is gone.
            let _ = ended.await;
            if let Err(e) = dir.keep_relay_usage(carried.get()) {
                tracing::warn!(code = e.code, "{}", e.text);
            }
            ("relay".to_owned(), Ok(()))
        });
        tasks.spawn(async move {
            listener::serve(tcp, tls, app, stopping).await;
            ("listener".to_owned(), Ok(()))
        });
        Ok(Self { listen, stun, public_url, key, claim, relay, tasks, stop, _lock: lock })
    }

    /// The TCP address.
    #[must_use]
    pub const fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// The STUN sockets' addresses.
    #[must_use]
    pub fn stun(&self) -> &[SocketAddr] {
        &self.stun
    }

    /// What tokens carry, and how it was found.
    #[must_use]
    pub const fn public_url(&self) -> &admin::PublicUrl {
        &self.public_url
    }

    /// The Noise key that tokens carry.
    #[must_use]
    pub const fn key(&self) -> ControlKey {
        self.key
    }

    /// The claim token; `None` once there is a network.
    #[must_use]
    pub fn claim(&self) -> Option<&str> {
        self.claim.as_deref()
    }

    /// What became of relayed frames.
    #[must_use]
    pub fn relay_counters(&self) -> &RelayCounters {
        &self.relay.counters
    }

    /// Runs until `stop` is ready, then stops within [`STOP_DEADLINE`].
    ///
    /// # Errors
    /// What made a task end by itself.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> Result<(), Problem> {
        let early = tokio::select! {
            () = stop => None,
            ended = self.tasks.join_next() => ended,
        };
        // Nobody listens any more if all tasks are gone.
        let _ = self.stop.send(true);
        let ended_early = early.map(|ended| match ended {
            Ok((_, Err(problem))) => problem,
            Ok((task, Ok(()))) => crashed(&format!("its task `{task}` ended")),
            Err(e) => crashed(&e.to_string()),
        });
        let finish = async {
            let mut first = None;
            while let Some(ended) = self.tasks.join_next().await {
                if let Ok((_, Err(problem))) = ended {
                    first.get_or_insert(problem);
                }
            }
            first
        };
        let ended_late = match timeout(STOP_DEADLINE, finish).await {
            Ok(problem) => problem,
            Err(_) => {
                tracing::info!("some connections did not end in time and are cut off");
                None
            }
        };
        ended_early.or(ended_late).map_or(Ok(()), Err)
    }
}

fn crashed(why: &str) -> Problem {
    Problem {
        code: "coordinator-failed".into(),
        text: format!("the coordinator had to stop: {why}"),
        hint: "start it again; what was answered is stored. If it happens again, please report it".into(),
    }
}

fn no_resources(e: &io::Error) -> Problem {
    Problem {
        code: "resources".into(),
        text: format!("the relay cannot start: {e}"),
        hint: "see `ulimit -a`: threads and open files are what it needs".into(),
    }
}

/// Keeps what the relay carried on disk, for ever.
async fn keep_usage(dir: &StateDir, carried: &Carried) {
    let mut kept = carried.get();
    loop {
        sleep(KEEP_USAGE).await;
        let now = carried.get();
        if now != kept {
            match dir.keep_relay_usage(now) {
                Ok(()) => kept = now,
                Err(e) => tracing::warn!(code = e.code, "{}", e.text),
            }
        }
    }
}

struct Opened {
    secrets: Secrets,
    store: Store,
    records: Vec<SignedRecord>,
    claim_spent: bool,
}

fn store_path(dir: &StateDir, store: Option<&Path>) -> PathBuf {
    store.map_or_else(|| dir.store(), Path::to_owned)
}

/// Opens store and secrets, making them for a directory that has not been used. The caller holds the lock.
async fn open_state(dir: &StateDir, store: Option<&Path>) -> Result<Opened, Problem> {
    let fresh = !dir.is_initialized();
    let path = store_path(dir, store);
    let (store, contents) = Store::open(&path, fresh).await?;
    if fresh && !contents.records.is_empty() {
        store.close().await;
        return Err(Problem {
            code: "state-damaged".into(),
            text: format!("the store {} holds a network, but the key in {} is missing", path.display(), dir.path().display()),
            hint: "restore coordinator.key and claim.secret from a backup: tokens and nodes know the coordinator by its key"
                .into(),
        });
    }
    if fresh {
        dir.make_secrets()?;
    }
    let secrets = dir.secrets()?;
    Ok(Opened { secrets, store, records: contents.records, claim_spent: contents.claim_spent })
}

/// The network whose records these are, judged as every node judges them; `None` for no records.
fn judge(store: &Path, records: &[SignedRecord]) -> Result<Option<Ledger>, Problem> {
    let Some(first) = records.first() else { return Ok(None) };
    let mut ledger = Ledger::new(NetworkId(first.signer.0));
    ledger.admit_all(records, Judge::Reader).map_err(|(i, refusal)| Problem {
        code: "store-damaged".into(),
        text: format!("the coordinator's store {} cannot be used: record {i} is not valid: {refusal}", store.display()),
        hint: "it was left as it is. Restore it from a backup, or run the meshd version that wrote it".into(),
    })?;
    Ok(Some(ledger))
}

/// What nodes are told of the STUN sockets. A wildcard socket is reached at the host of the coordinator's URL.
fn offered(addresses: &[SocketAddr]) -> Vec<StunServer> {
    let host = |a: &SocketAddr| (!a.ip().is_unspecified()).then(|| a.ip().to_string());
    addresses.iter().map(|a| StunServer { host: host(a), port: a.port() }).collect()
}

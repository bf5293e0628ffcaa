//! Drives the pure [`Coordinator`]: one task owns it, connections reach it by a bounded queue, a second task writes the
//! store.
//!
//! Connections wait for this task, never the other way round: a connection whose own queue is full is closed, and comes
//! back for what it missed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::coord::Coordinator;
use crate::coord::io::{ConnId, Input, Output};
use crate::os::clock;
use crate::server::relay_conn::Relay;
use crate::server::store::{Store, WriteError};
use crate::server::udp_relay::BudgetState;
use crate::trust::record::SignedRecord;
use crate::wire::control::{StunServer, ToCoordinator, ToNode, refusal};
use crate::wire::keys::{ControlKey, WgKey};
use crate::wire::local::Problem;
use crate::wire::relay_udp::SessionSecret;

/// Inputs of all connections that wait for the coordinator.
const INPUTS: usize = 1_024;
/// Messages that wait to be sent on one connection.
const OUTBOX: usize = 256;

/// What a connection is to do.
#[derive(Debug)]
pub(super) enum ToConn {
    /// Send this.
    Message(Box<ToNode>),
    /// Close, with one of [`crate::coord::io::why`].
    Close(&'static str),
}

enum Command {
    Opened { conn: ConnId, key: ControlKey, from: Option<IpAddr>, outbox: mpsc::Sender<ToConn> },
    Input(Input),
}

/// What anybody may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Facts {
    /// The network is founded.
    pub(super) network: bool,
}

/// How connections reach the coordinator.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    commands: mpsc::Sender<Command>,
    next: Arc<AtomicU64>,
    facts: watch::Receiver<Facts>,
}

/// One connection's place at the coordinator.
#[derive(Debug)]
pub(super) struct Registration {
    commands: mpsc::Sender<Command>,
    conn: ConnId,
}

impl Handle {
    /// A connection passed its handshake. Returns `None` when the coordinator is stopping.
    pub(super) async fn open(
        &self,
        key: ControlKey,
        from: Option<IpAddr>,
    ) -> Option<(Registration, mpsc::Receiver<ToConn>)> {
        let conn = ConnId(self.next.fetch_add(1, Ordering::Relaxed));
        let (outbox, queue) = mpsc::channel(OUTBOX);
        self.commands.send(Command::Opened { conn, key, from, outbox }).await.ok()?;
        Some((Registration { commands: self.commands.clone(), conn }, queue))
    }

    /// What anybody may know.
    pub(super) fn facts(&self) -> Facts {
        *self.facts.borrow()
    }
}

impl Registration {
    /// A message came. False: the coordinator is stopping.
    pub(super) async fn message(&self, message: ToCoordinator) -> bool {
        self.input(Input::Message { conn: self.conn, message, wall: clock::wall() }).await
    }

    /// Everything queued was sent. False: the coordinator is stopping.
    pub(super) async fn drained(&self) -> bool {
        self.input(Input::Drained(self.conn)).await
    }

    /// The connection is gone.
    pub(super) async fn closed(self) {
        self.input(Input::Closed(self.conn)).await;
    }

    async fn input(&self, input: Input) -> bool {
        self.commands.send(Command::Input(input)).await.is_ok()
    }
}

/// The task, ready to run.
pub(super) struct CoordinatorTask {
    coordinator: Coordinator,
    store: Store,
    relay: Arc<Relay>,
    relay_at: Vec<StunServer>,
    budget: watch::Receiver<BudgetState>,
    commands: mpsc::Receiver<Command>,
    facts: watch::Sender<Facts>,
}

impl CoordinatorTask {
    /// The task, and how to reach it. `relay_at` is where nodes reach the relay by UDP.
    pub(super) fn new(
        coordinator: Coordinator,
        store: Store,
        relay: Arc<Relay>,
        relay_at: Vec<StunServer>,
        budget: watch::Receiver<BudgetState>,
    ) -> (Self, Handle) {
        let (sender, commands) = mpsc::channel(INPUTS);
        let (facts, watch) = watch::channel(Facts::default());
        let handle = Handle { commands: sender, next: Arc::new(AtomicU64::new(1)), facts: watch };
        (Self { coordinator, store, relay, relay_at, budget, commands, facts }, handle)
    }

    /// Runs until every [`Handle`] and [`Registration`] is gone and what was being stored is stored.
    ///
    /// # Errors
    /// `store-failed`: the store does not say whether a write happened.
    pub(super) async fn run(self) -> Result<(), Problem> {
        let (jobs, queue) = mpsc::channel(1);
        let (done, results) = mpsc::channel(1);
        let driver = Driver {
            coordinator: self.coordinator,
            relay: self.relay,
            relay_at: self.relay_at,
            facts: self.facts,
            outboxes: BTreeMap::new(),
            jobs,
            writing: false,
        };
        let (stored, ()) =
            tokio::join!(write(self.store, queue, done), driver.run(self.commands, results, self.budget));
        stored
    }
}

/// A write of the coordinator's: there is one at a time.
struct Job {
    ticket: u64,
    records: Vec<SignedRecord>,
    claim_spent: bool,
}

async fn write(mut store: Store, mut jobs: mpsc::Receiver<Job>, done: mpsc::Sender<Input>) -> Result<(), Problem> {
    while let Some(Job { ticket, records, claim_spent }) = jobs.recv().await {
        let ok = match store.append(&records, claim_spent).await {
            Ok(()) => true,
            Err(e @ WriteError::NotStored(_)) => {
                tracing::error!(error = %e, "the store refused a write");
                false
            }
            Err(e @ WriteError::Unknown(_)) => {
                return Err(Problem {
                    code: "store-failed".into(),
                    text: format!("the coordinator's store failed: {e}"),
                    hint: "check the disk, then start the coordinator again; what was answered is stored".into(),
                });
            }
        };
        if done.send(Input::Persisted { ticket, ok }).await.is_err() {
            break;
        }
    }
    store.close().await;
    Ok(())
}

struct Driver {
    coordinator: Coordinator,
    relay: Arc<Relay>,
    relay_at: Vec<StunServer>,
    facts: watch::Sender<Facts>,
    outboxes: BTreeMap<ConnId, mpsc::Sender<ToConn>>,
    jobs: mpsc::Sender<Job>,
    writing: bool,
}

impl Driver {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut results: mpsc::Receiver<Input>,
        mut budget: watch::Receiver<BudgetState>,
    ) {
        let mut open = true;
        loop {
            self.act();
            if !open && !self.writing {
                return;
            }
            let wake = self.coordinator.poll_timeout().map(|at| Instant::now() + at.since(clock::now()));
            tokio::select! {
                command = commands.recv(), if open => match command {
                    Some(command) => self.handle(command),
                    None => open = false,
                },
                result = results.recv() => match result {
                    Some(input) => {
                        self.writing = false;
                        self.coordinator.handle(input, clock::now());
                    }
                    // The store is given up; its task says why.
                    None => return,
                },
                Ok(()) = budget.changed() => {
                    let BudgetState { spent, renewed } = *budget.borrow_and_update();
                    self.coordinator.handle(Input::RelayBudget { spent, renewed }, clock::now());
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.coordinator.handle_timeout(clock::now());
                }
            }
        }
    }

    fn handle(&mut self, command: Command) {
        let input = match command {
            Command::Opened { conn, key, from, outbox } => {
                self.outboxes.insert(conn, outbox);
                Input::Opened { conn, key, from }
            }
            Command::Input(input) => {
                if let Input::Closed(conn) = &input {
                    self.outboxes.remove(conn);
                }
                input
            }
        };
        self.coordinator.handle(input, clock::now());
    }

    /// Carries out what the coordinator wants, in its order.
    fn act(&mut self) {
        while let Some(output) = self.coordinator.poll_output() {
            match output {
                Output::Send { conn, message } => self.hand_over(conn, ToConn::Message(Box::new(message))),
                Output::Close { conn, why } => {
                    self.hand_over(conn, ToConn::Close(why));
                    self.outboxes.remove(&conn);
                }
                Output::Persist { ticket, records, claim_spent } => {
                    self.writing = true;
                    // There is room: the coordinator has one write at a time. A writer that is gone ends the loop.
                    let _ = self.jobs.try_send(Job { ticket, records, claim_spent });
                }
                Output::RelayAdmit { control, wg } => self.relay.admit(control, wg),
                Output::RelayExpel { control, wg } => self.relay.expel(&control, &wg),
                Output::OpenRelay { conn, re, wg } => self.open_relay(conn, re, wg),
            }
        }
        let facts = Facts { network: self.coordinator.ledger().is_some() };
        self.facts.send_if_modified(|old| std::mem::replace(old, facts) != facts);
    }

    /// Answers once the relay's thread has begun the session.
    fn open_relay(&self, conn: ConnId, re: u64, wg: WgKey) {
        let Some(outbox) = self.outboxes.get(&conn).cloned() else { return };
        let (relay, at) = (Arc::clone(&self.relay), self.relay_at.clone());
        tokio::spawn(async move {
            let mut bytes = [0; 32];
            rand::rng().fill_bytes(&mut bytes);
            let secret = SessionSecret::new(bytes);
            let message = match relay.open(wg, secret.clone()).await {
                Some(session) => ToNode::RelayOpened { re, session, secret, at },
                None => ToNode::Refused {
                    re,
                    code: refusal::NO_UDP_RELAY.to_owned(),
                    text: "this coordinator does not relay by UDP".to_owned(),
                    hint: "the relay's WebSocket works without; `--stun-listen` gives the coordinator UDP ports"
                        .to_owned(),
                },
            };
            // A full outbox means that the node does not take its messages; it asks again when it needs the session.
            let _ = outbox.try_send(ToConn::Message(Box::new(message)));
        });
    }

    fn hand_over(&mut self, conn: ConnId, what: ToConn) {
        let Some(outbox) = self.outboxes.get(&conn) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = outbox.try_send(what) {
            // It does not take its messages. Without its outbox it is closed, and comes back for what it missed.
            tracing::debug!(conn = conn.0, "a connection does not keep up");
            self.outboxes.remove(&conn);
            self.coordinator.handle(Input::Closed(conn), clock::now());
        }
    }
}

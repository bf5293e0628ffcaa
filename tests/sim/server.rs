//! The real coordinator, relay hub and STUN server in the simulated world, with a store that survives a crash.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use meshd::coord::coordinator::{Config, Coordinator, Limits};
use meshd::coord::io::{ConnId, Input, Output};
use meshd::coord::relay_hub::{Delivery, RelayConn, RelayHub};
use meshd::time::{Now, UnixSeconds};
use meshd::trust::ledger::{Judge, Ledger};
use meshd::trust::record::SignedRecord;
use meshd::wire::control::{StunServer, ToCoordinator, ToNode, refusal};
use meshd::wire::keys::{ControlKey, NetworkId, WgKey};
use meshd::wire::relay::{Frame, Frames, encode};
use meshd::wire::stun::{Answer, ServerLayout, answer};

use crate::town::{SERVER_V4, SERVER_V6, STUN_PORTS};

/// One durable write.
const FSYNC: Duration = Duration::from_millis(3);

/// What the server wants from the world around it.
#[derive(Debug)]
pub(crate) enum Want {
    Control(ConnId, ToNode),
    CloseControl(ConnId),
    Relay(RelayConn, Vec<u8>),
    CloseRelay(RelayConn),
    /// The write is on disk at this time.
    Persisted(Now, u64),
}

/// A process, and the disk it runs on.
pub(crate) struct Server {
    network: NetworkId,
    /// What is on disk.
    pub(crate) store: Vec<SignedRecord>,
    writing: BTreeMap<u64, Vec<SignedRecord>>,
    process: Option<Process>,
    layout: ServerLayout,
    now: Now,
}

struct Process {
    coordinator: Coordinator,
    hub: RelayHub,
    admitted: BTreeMap<ControlKey, WgKey>,
}

impl Server {
    /// A server that is down.
    pub(crate) fn new(network: NetworkId) -> Self {
        let v4 = SERVER_V4.iter().flat_map(|ip| STUN_PORTS.map(|port| SocketAddr::new((*ip).into(), port)));
        let v6 = STUN_PORTS.map(|port| SocketAddr::new(SERVER_V6.into(), port));
        Self {
            network,
            store: Vec::new(),
            writing: BTreeMap::new(),
            process: None,
            layout: ServerLayout { endpoints: v4.chain(v6).collect() },
            now: Now::ZERO,
        }
    }

    pub(crate) const fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the process from what is on disk.
    pub(crate) fn start(&mut self, now: Now, wants: &mut Vec<Want>) {
        let mut ledger = Ledger::new(self.network);
        ledger.admit_all(&self.store, Judge::Reader).unwrap();
        let config = Config {
            version: "sim".into(),
            stun: STUN_PORTS.map(|port| StunServer { host: None, port }).to_vec(),
            claim: None,
            limits: Limits::default(),
        };
        let coordinator = Coordinator::new(config, Some(ledger));
        self.process = Some(Process { coordinator, hub: RelayHub::new(), admitted: BTreeMap::new() });
        self.drain(now, wants);
    }

    /// Kills the process. What was not on disk is gone.
    pub(crate) fn kill(&mut self) {
        self.process = None;
        self.writing.clear();
    }

    pub(crate) fn deadline(&self) -> Option<Now> {
        self.process.as_ref().and_then(|p| p.coordinator.poll_timeout())
    }

    pub(crate) fn wake(&mut self, now: Now, wants: &mut Vec<Want>) {
        if let Some(process) = &mut self.process {
            process.coordinator.handle_timeout(now);
        }
        self.drain(now, wants);
    }

    pub(crate) fn opened(&mut self, conn: ConnId, key: ControlKey, from: SocketAddr, now: Now, wants: &mut Vec<Want>) {
        self.input(Input::Opened { conn, key, from: Some(from.ip()) }, now, wants);
    }

    pub(crate) fn message(
        &mut self,
        conn: ConnId,
        message: ToCoordinator,
        wall: UnixSeconds,
        now: Now,
        wants: &mut Vec<Want>,
    ) {
        self.input(Input::Message { conn, message, wall }, now, wants);
    }

    pub(crate) fn closed(&mut self, conn: ConnId, now: Now, wants: &mut Vec<Want>) {
        self.input(Input::Closed(conn), now, wants);
    }

    pub(crate) fn persisted(&mut self, ticket: u64, now: Now, wants: &mut Vec<Want>) {
        if let Some(records) = self.writing.remove(&ticket) {
            self.store.extend(records);
            self.input(Input::Persisted { ticket, ok: true }, now, wants);
        }
    }

    /// A relay connection authenticated. False: it is refused.
    pub(crate) fn relay_opened(&mut self, conn: RelayConn, key: &ControlKey, wants: &mut Vec<Want>) -> bool {
        let Some(process) = &mut self.process else { return false };
        let Some(wg) = process.admitted.get(key) else { return false };
        if let Some(old) = process.hub.join(conn, *wg) {
            wants.push(Want::CloseRelay(old));
        }
        true
    }

    pub(crate) fn relay_closed(&mut self, conn: RelayConn) {
        if let Some(process) = &mut self.process {
            process.hub.leave(conn);
        }
    }

    /// Relay frames of one message, forwarded or answered.
    pub(crate) fn relay_frames(&self, conn: RelayConn, message: &[u8], wants: &mut Vec<Want>) {
        let Some(process) = &self.process else { return };
        for frame in Frames::new(message) {
            let Frame::Send { to, payload } = frame.unwrap() else { continue };
            let mut out = Vec::new();
            let receiver = match process.hub.deliver(conn, &to) {
                Delivery::To { conn, from } => {
                    encode(&Frame::Recv { from, payload }, &mut out);
                    conn
                }
                Delivery::Gone => {
                    encode(&Frame::Gone { peer: to }, &mut out);
                    conn
                }
                Delivery::NotJoined => continue,
            };
            wants.push(Want::Relay(receiver, out));
        }
    }

    /// The answer of the STUN server.
    pub(crate) fn stun(&self, request: &[u8], from: SocketAddr, to: SocketAddr) -> Option<Answer> {
        self.process.as_ref()?;
        answer(request, from, to, &self.layout)
    }

    fn input(&mut self, input: Input, now: Now, wants: &mut Vec<Want>) {
        if let Some(process) = &mut self.process {
            process.coordinator.handle(input, now);
        }
        self.drain(now, wants);
    }

    fn drain(&mut self, now: Now, wants: &mut Vec<Want>) {
        assert!(now >= self.now, "time never goes back");
        self.now = now;
        let Some(process) = &mut self.process else { return };
        while let Some(output) = process.coordinator.poll_output() {
            match output {
                Output::Send { conn, message } => wants.push(Want::Control(conn, message)),
                Output::Close { conn, .. } => wants.push(Want::CloseControl(conn)),
                Output::Persist { ticket, records, .. } => {
                    self.writing.insert(ticket, records);
                    wants.push(Want::Persisted(now + FSYNC, ticket));
                }
                Output::RelayAdmit { control, wg } => {
                    process.admitted.insert(control, wg);
                }
                Output::RelayExpel { control, wg } => {
                    process.admitted.remove(&control);
                    wants.extend(process.hub.expel(&wg).into_iter().map(Want::CloseRelay));
                }
                Output::OpenRelay { conn, re, .. } => {
                    let code = refusal::NO_UDP_RELAY.to_owned();
                    let message = ToNode::Refused { re, code, text: String::new(), hint: String::new() };
                    wants.push(Want::Control(conn, message));
                }
            }
        }
    }
}

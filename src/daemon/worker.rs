//! The packet loop: TUN, UDP and relay, both directions, in batches. Waits only for the kernel.
//!
//! A turn: wait until something is readable; receive at most one batch from every ready source; take the planner's
//! updates (so that whoever may act on an update finds it applied); carry what came; send what that produced.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;

use crate::daemon::outbox::{FromRelay, Outbox};
use crate::engine::inbound::Inbound;
use crate::engine::io::{SocketId, Update, Via};
use crate::engine::outbound::Outbound;
use crate::os::batch::Batch;
use crate::os::clock;
use crate::os::udp::UdpSockets;
use crate::os::wake::Wake;
use crate::time::Now;

/// Packets of one source in one turn.
const BATCH: usize = 64;
/// How soon the planner is told again what it had no room for.
const RETRY_MS: u16 = 10;

/// Everything the data thread owns.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) outbound: Outbound,
    pub(super) inbound: Inbound,
    pub(super) outbox: Outbox,
    pub(super) sockets: Arc<UdpSockets>,
    pub(super) updates: Receiver<Update>,
    pub(super) relayed: Receiver<FromRelay>,
    pub(super) wake: Wake,
    pub(super) stop: Arc<AtomicBool>,
}

/// Starts the thread `meshd-data-0`. The receiver gets why it ended: nothing if it was told to.
///
/// # Errors
/// The system gives no thread.
pub(super) fn start(worker: Worker) -> io::Result<oneshot::Receiver<io::Result<()>>> {
    let (tell, ended) = oneshot::channel();
    std::thread::Builder::new().name("meshd-data-0".into()).spawn(move || {
        let result = worker.run();
        // Nobody listens any more when the whole process is ending.
        let _ = tell.send(result);
    })?;
    Ok(ended)
}

/// What became readable.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    tun: bool,
    v4: bool,
    v6: bool,
}

impl Worker {
    fn run(mut self) -> io::Result<()> {
        let mut from_tun = Batch::new(BATCH);
        let mut from_udp = [Batch::new(BATCH), Batch::new(BATCH)];
        let mut from_relay = Vec::with_capacity(BATCH);
        loop {
            let heard = self.outbox.retry_notices();
            // A full batch from the relay may have left more behind, which nothing would wake us for.
            let patience = match (from_relay.len() == BATCH, heard) {
                (true, _) => PollTimeout::ZERO,
                (false, false) => PollTimeout::from(RETRY_MS),
                (false, true) => PollTimeout::NONE,
            };
            let ready = self.wait(patience)?;
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            from_tun.clear();
            from_udp.iter_mut().for_each(Batch::clear);
            from_relay.clear();
            if ready.tun {
                self.outbox.tun().recv_batch(&mut from_tun)?;
            }
            let [v4, v6] = &mut from_udp;
            if ready.v4 {
                self.sockets.recv_batch(SocketId::V4, v4);
            }
            if ready.v6 {
                self.sockets.recv_batch(SocketId::V6, v6);
            }
            from_relay.extend(self.relayed.try_iter().take(BATCH));

            let now = clock::now();
            if !self.take_updates(now) {
                return Ok(());
            }
            self.carry_in(SocketId::V4, v4, now);
            self.carry_in(SocketId::V6, v6, now);
            for relayed in &from_relay {
                self.inbound.handle_datagram(&Via::Relay { peer: relayed.peer }, &relayed.bytes, now, &mut self.outbox);
            }
            self.flush_established(now);
            self.outbound.handle_tun(from_tun.iter_mut().map(|(packet, ())| &*packet), now, &mut self.outbox);
            self.outbox.flush();
        }
    }

    fn wait(&self, patience: PollTimeout) -> io::Result<Ready> {
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.outbox.tun().as_fd(), PollFlags::POLLIN));
        for socket in [SocketId::V4, SocketId::V6] {
            fds.extend(self.sockets.descriptor(socket).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        }
        match poll(&mut fds, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        // An error condition counts as readable: the read then says what it is.
        let mut any = fds.iter().map(|fd| fd.any() == Some(true));
        if any.next() == Some(true) {
            self.wake.silence();
        }
        let mut next = || any.next().unwrap_or(false);
        Ok(Ready { tun: next(), v4: next(), v6: next() })
    }

    /// False: the planner is gone.
    fn take_updates(&mut self, now: Now) -> bool {
        loop {
            match self.updates.try_recv() {
                Ok(update) => {
                    let flushes = matches!(update, Update::Established(_));
                    self.inbound.apply(update.clone());
                    self.outbound.apply(update, now, &mut self.outbox);
                    if flushes {
                        self.outbox.flush();
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn carry_in(&mut self, socket: SocketId, batch: &mut Batch<SocketAddr>, now: Now) {
        for (bytes, remote) in batch.iter_mut() {
            let via = Via::Udp { socket, remote: *remote };
            self.inbound.handle_datagram(&via, bytes, now, &mut self.outbox);
        }
    }

    /// What waited for sessions that came up in this turn goes before what was read from the TUN device just now.
    fn flush_established(&mut self, now: Now) {
        while let Some(peer) = self.outbox.established.pop() {
            self.outbound.flush(peer, now, &mut self.outbox);
            self.outbox.flush();
        }
    }
}

//! A steady flow of small datagrams through the mesh, each answered by the other end: when, or never. What was interrupted, for
//! how long, and by which way packets went is read from it afterwards, so that asking disturbs nothing.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::world::Node;

/// The other end listens there.
const PORT: u16 = 7007;
/// Between two datagrams.
pub const GAP: Duration = Duration::from_millis(10);
/// A datagram that is not answered within this time is lost.
const LOST: Duration = Duration::from_secs(2);

/// A flow under way.
pub struct Flow {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Vec<Instant>>,
    listener: JoinHandle<Vec<(usize, Instant)>>,
    echo: JoinHandle<()>,
}

/// One datagram.
#[derive(Debug, Clone, Copy)]
pub struct Beat {
    pub sent: Instant,
    /// Its round trip; `None`: it was lost.
    pub rtt: Option<Duration>,
}

impl Flow {
    /// Starts to send from one node's mesh address to the other's.
    pub fn start(from: &Node, to: &Node) -> Result<Self> {
        let (here, there) = (from.address(true)?, to.address(true)?);
        let stop = Arc::new(AtomicBool::new(false));
        let answering = to.namespace.enter(|| UdpSocket::bind((there, PORT)))?.context("cannot listen")?;
        let socket = from.namespace.enter(|| UdpSocket::bind((here, 0)))?.context("cannot send")?;
        for socket in [&answering, &socket] {
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        }
        let hearing = socket.try_clone()?;
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let done = Arc::clone(&stop);
        let echo = thread("echo").spawn(move || {
            let mut bytes = [0; 64];
            while !done.load(Ordering::Relaxed) {
                if let Ok((n, from)) = answering.recv_from(&mut bytes) {
                    let _ = answering.send_to(&bytes[..n], from);
                }
            }
        })?;
        let done = Arc::clone(&stop);
        let listener = thread("listener").spawn(move || {
            let (mut heard, mut bytes) = (Vec::new(), [0; 64]);
            while !done.load(Ordering::Relaxed) {
                if let Ok(n) = hearing.recv(&mut bytes)
                    && let Some(number) = bytes[..n].first_chunk()
                {
                    heard.push((u64::from_be_bytes(*number) as usize, Instant::now()));
                }
            }
            heard
        })?;
        let done = Arc::clone(&stop);
        let sender = thread("sender").spawn(move || {
            let (to, mut sent) = (SocketAddr::new(there, PORT), Vec::new());
            let mut due = Instant::now();
            while !done.load(Ordering::Relaxed) {
                let number = sent.len() as u64;
                sent.push(Instant::now());
                // Without a way out the kernel may refuse; then it is one more that was lost.
                let _ = socket.send_to(&number.to_be_bytes(), to);
                due += GAP;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            sent
        })?;
        Ok(Self { stop, sender, listener, echo })
    }

    /// Ends the flow and says what became of every datagram.
    pub fn stop(self) -> Result<Beats> {
        // The last ones are still under way.
        std::thread::sleep(Duration::from_millis(500));
        self.stop.store(true, Ordering::Relaxed);
        let panicked = |_| anyhow!("a thread of the flow panicked");
        self.echo.join().map_err(panicked)?;
        let sent = self.sender.join().map_err(panicked)?;
        let heard = self.listener.join().map_err(panicked)?;
        let mut beats: Vec<Beat> = sent.into_iter().map(|sent| Beat { sent, rtt: None }).collect();
        for (number, at) in heard {
            if let Some(beat) = beats.get_mut(number) {
                let rtt = at.saturating_duration_since(beat.sent);
                beat.rtt = beat.rtt.or(Some(rtt)).filter(|rtt| *rtt < LOST);
            }
        }
        Ok(Beats(beats))
    }
}

/// All datagrams of a flow.
#[derive(Debug)]
pub struct Beats(Vec<Beat>);

impl Beats {
    fn answered_within(&self, from: Instant, until: Instant) -> impl Iterator<Item = &Beat> {
        self.0.iter().filter(move |b| b.sent >= from && b.sent < until && b.rtt.is_some())
    }

    /// The longest time between two answered datagrams, by when they were sent. Everything is lost: the whole time.
    pub fn longest_gap(&self, from: Instant, until: Instant) -> Duration {
        let mut last = from;
        let mut longest = Duration::ZERO;
        for beat in self.answered_within(from, until) {
            longest = longest.max(beat.sent - last);
            last = beat.sent;
        }
        longest.max((until - last).saturating_sub(GAP * 2))
    }

    /// How many were lost.
    pub fn lost(&self, from: Instant, until: Instant) -> usize {
        self.0.iter().filter(|b| b.sent >= from && b.sent < until && b.rtt.is_none()).count()
    }

    /// How long after `from` the first datagram was sent whose answer was back within `rtt`, as only the direct path brings it.
    pub fn first_faster_than(&self, rtt: Duration, from: Instant, until: Instant) -> Option<Duration> {
        let fast = |b: &&Beat| b.rtt.is_some_and(|r| r < rtt);
        self.answered_within(from, until).find(fast).map(|b| b.sent - from)
    }

    /// The middle round trip.
    pub fn median(&self, from: Instant, until: Instant) -> Duration {
        let times = self.answered_within(from, until).filter_map(|b| b.rtt).collect();
        percentile(times, 50)
    }
}

/// The time that this share of them took at most.
pub fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort();
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or_default()
}

//! Two nodes that have not met: how long from the first packet until both send directly. Read off their own logs afterwards, as
//! asking them would take the processor they need.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

use crate::packets::behind;
use crate::world::{Node, let_pass};

/// A contact made while the machine was further behind than this, or so many threads wanted each processor, says nothing about
/// time.
const BEHIND: Duration = Duration::from_millis(4);
const CROWDED: f64 = 2.0;
/// Between two packets, until there is a path.
const GAP: Duration = Duration::from_millis(20);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How two nodes met.
#[derive(Debug, Clone, Copy)]
pub struct Contact {
    /// When both sent directly; none: they did not in time.
    pub after: Option<Duration>,
    /// The most that a frame came late meanwhile.
    behind: Duration,
    /// Threads that wanted a processor meanwhile, on average, for each there is.
    load: f64,
}

/// Sends from one to the other until both send directly, or for as long as `patience`.
pub fn make(from: &Node, to: &Node, patience: Duration) -> Result<Contact> {
    make_while(from, to, patience, || Ok(()))
}

/// The same, while something happens right after the first packet.
pub fn make_while(from: &Node, to: &Node, patience: Duration, happens: impl FnOnce() -> Result<()>) -> Result<Contact> {
    let (here, there) = (from.address(true)?, to.address(true)?);
    let socket = from.namespace.enter(|| UdpSocket::bind((here, 0)))?.context("cannot send")?;
    let mut logs = [Log::at_its_end(from)?, Log::at_its_end(to)?];
    behind();
    let start = SystemTime::now();
    let mut samples = Vec::new();
    let mut next = Duration::ZERO;
    let mut happens = Some(happens);
    let mut after = None;
    while after.is_none() && start.elapsed()? < patience {
        if start.elapsed()? >= next {
            // Nobody listens there, and the kernel may say so.
            let _ = socket.send_to(b"hello", (there, 9));
            next += GAP;
        }
        happens.take().map_or(Ok(()), |happen| happen())?;
        let_pass(Duration::from_millis(2));
        samples.push(runnable()?);
        let [a, b] = &mut logs;
        after = a.first_direct(start)?.zip(b.first_direct(start)?).map(|(a, b)| a.max(b));
    }
    let load = samples.iter().sum::<f64>() / samples.len().max(1) as f64;
    let load = load / std::thread::available_parallelism()?.get() as f64;
    Ok(Contact { after, behind: behind(), load })
}

impl Contact {
    /// The machine kept up, so that the time says something about the two nodes.
    pub fn counts(&self) -> bool {
        self.behind <= BEHIND && self.load <= CROWDED
    }

    fn is_in_time(&self, bar: Duration) -> bool {
        self.after.is_some_and(|after| after <= bar)
    }
}

/// All are direct in the end; of those made while the machine kept up, all but one in time and `good` otherwise.
pub fn judge<T>(what: &str, met: &[(Contact, T)], bar: Duration, good: impl Fn(&T) -> bool) -> Result<()> {
    let mut times: Vec<u128> = met.iter().filter_map(|(c, _)| c.after).map(|after| after.as_millis()).collect();
    times.sort_unstable();
    let behind = met.iter().map(|(c, _)| c.behind).max().unwrap_or_default();
    let load = met.iter().map(|(c, _)| c.load).fold(0.0, f64::max);
    let judged: Vec<&(Contact, T)> = met.iter().filter(|(c, _)| c.counts()).collect();
    let in_time = judged.iter().filter(|(c, rest)| c.is_in_time(bar) && good(rest)).count();
    println!(
        "{what}: {} of {} direct after {times:?} ms, {in_time} of {} within {bar:?}; {} do not count: the machine was at most \
         {behind:?} behind, with {load:.1} threads a processor",
        times.len(),
        met.len(),
        judged.len(),
        met.len() - judged.len(),
    );
    ensure!(times.len() == met.len(), "not all are direct");
    ensure!(in_time + 1 >= judged.len(), "{what}: only {in_time} of {} within {bar:?}", judged.len());
    Ok(())
}

/// Threads on this machine that run or want to.
fn runnable() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let counts = text.split_whitespace().nth(3).and_then(|field| field.split('/').next()?.parse().ok());
    counts.context("/proc/loadavg is not as expected")
}

/// What a node writes from some time on.
struct Log {
    path: PathBuf,
    from: u64,
}

impl Log {
    fn at_its_end(node: &Node) -> Result<Self> {
        let path = node.state_dir().join("meshd.log");
        Ok(Self { from: std::fs::metadata(&path)?.len(), path })
    }

    /// How long after `start` a path became direct.
    fn first_direct(&self, start: SystemTime) -> Result<Option<Duration>> {
        let (mut text, mut file) = (String::new(), File::open(&self.path)?);
        file.seek(SeekFrom::Start(self.from))?;
        file.read_to_string(&mut text)?;
        let Some(line) = text.lines().find(|line| line.contains("path=\"direct\"")) else { return Ok(None) };
        let since_midnight = time_of_day(line).with_context(|| format!("no time in {line:?}"))?;
        let started = Duration::from_nanos((start.duration_since(UNIX_EPOCH)?.as_nanos() % DAY.as_nanos()) as u64);
        Ok(Some(since_midnight.checked_sub(started).unwrap_or(since_midnight + DAY - started)))
    }
}

/// Of `2026-11-20T18:03:16.595712Z …`.
fn time_of_day(line: &str) -> Option<Duration> {
    let (_, time) = line.split_whitespace().next()?.split_once('T')?;
    let mut parts = time.strip_suffix('Z')?.split(':');
    let mut part = || parts.next()?.parse::<f64>().ok();
    Some(Duration::from_secs_f64(part()? * 3_600.0 + part()? * 60.0 + part()?))
}

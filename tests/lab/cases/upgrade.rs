//! From the relay to the direct path in the middle of a fast flow: nothing is lost, and nothing stands still.

use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use meshd::cli::demo::net::Nat;
use meshd::wire::local::PathKind;

use crate::net::two_homes;
use crate::runner::{Case, case, skip};
use crate::world::{Node, ensure, let_pass, until};

pub fn cases() -> Vec<Case> {
    vec![
        Case { limit: Duration::from_secs(180), ..case("upgrade::a_flow_does_not_overtake_itself", slow_relay) },
        Case { limit: Duration::from_secs(180), ..case("upgrade::fast_udp_goes_on_without_loss", fast) },
    ]
}

/// Datagrams handed to the kernel in one call.
const BURST: usize = 10;
/// How long nothing may arrive.
const PAUSE: Duration = Duration::from_millis(50);

/// What is sent.
#[derive(Debug, Clone, Copy)]
struct Rate {
    /// Payload of a datagram, in bytes.
    size: usize,
    per_second: u64,
}

/// What became of a flow.
#[derive(Debug, Clone)]
struct Flood {
    sent: u64,
    arrivals: Vec<(Instant, u64)>,
}

impl Flood {
    fn lost(&self) -> u64 {
        let mut seen: Vec<u64> = self.arrivals.iter().map(|(_, number)| *number).collect();
        seen.sort_unstable();
        seen.dedup();
        self.sent - seen.len() as u64
    }

    /// The longest time without an arrival.
    fn pause(&self) -> Duration {
        self.arrivals.windows(2).map(|two| two[1].0 - two[0].0).max().unwrap_or(Duration::MAX)
    }

    /// Datagrams that came after one that was sent later, by how many numbers at most.
    fn late_by(&self) -> u64 {
        let mut newest = 0;
        let mut late = 0;
        for (_, number) in &self.arrivals {
            late = late.max(newest - number.min(&newest));
            newest = newest.max(*number);
        }
        late
    }
}

/// Sends datagrams from one node to the other while `meanwhile` runs.
fn flood(from: &Node, to: &Node, rate: Rate, meanwhile: impl FnOnce() -> Result<()>) -> Result<Flood> {
    const PORT: u16 = 7_700;
    let (here, there) = (from.address(true)?, to.address(true)?);
    let receiver = to.namespace.enter(|| UdpSocket::bind((there, PORT)))?.context("cannot listen")?;
    let sender = from.namespace.enter(|| UdpSocket::bind((here, 0)))?.context("cannot send")?;
    option(&receiver, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)?;
    option(&sender, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64 << 20)?;
    option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, libc::c_int::try_from(rate.size)?)?;
    receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
    sender.connect((there, PORT))?;
    let (stop_sending, stop_receiving) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&stop_receiving);
    let receiving = std::thread::Builder::new().name("receiver".to_owned()).spawn(move || {
        let (mut arrivals, mut bytes) = (Vec::new(), [0; 2_048]);
        while !stop.load(Ordering::Relaxed) {
            if receiver.recv(&mut bytes).is_ok()
                && let Some(number) = bytes.first_chunk()
            {
                arrivals.push((Instant::now(), u64::from_be_bytes(*number)));
            }
        }
        arrivals
    })?;
    let stop = Arc::clone(&stop_sending);
    let sending = std::thread::Builder::new().name("sender".to_owned()).spawn(move || {
        let gap = Duration::from_secs(BURST as u64) / u32::try_from(rate.per_second).unwrap_or(u32::MAX);
        let (mut sent, mut due, mut train) = (0u64, Instant::now(), vec![0; BURST * rate.size]);
        while !stop.load(Ordering::Relaxed) {
            for datagram in train.chunks_mut(rate.size) {
                datagram[..8].copy_from_slice(&sent.to_be_bytes());
                sent += 1;
            }
            // A full queue of the interface is a loss like any other.
            let _ = sender.send(&train);
            due += gap;
            let now = Instant::now();
            // Who was kept from running does not catch up all at once.
            due = due.max(now.checked_sub(Duration::from_millis(5)).unwrap_or(now));
            std::thread::park_timeout(due.saturating_duration_since(now));
        }
        sent
    })?;
    let done = meanwhile();
    stop_sending.store(true, Ordering::Relaxed);
    let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
    let_pass(Duration::from_millis(700));
    stop_receiving.store(true, Ordering::Relaxed);
    let arrivals = receiving.join().map_err(|_| anyhow!("the receiver panicked"))?;
    done?;
    Ok(Flood { sent, arrivals })
}

#[expect(unsafe_code, reason = "std sets no such socket options")]
fn option(socket: &UdpSocket, level: i32, name: i32, value: libc::c_int) -> Result<()> {
    // SAFETY: the pointer is to an int that lives through the call, and its size is given.
    let result = unsafe {
        let size = libc::socklen_t::try_from(size_of_val(&value))?;
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size)
    };
    // The buffers are as large as the system lets them be.
    let needed = level == libc::SOL_UDP;
    if result < 0 && needed { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// Directly 20 ms one way and by the relay 260: 1,200 packets lie between the two, more than the receiver's window is wide.
fn slow_relay() -> Result<()> {
    let rates = [5_500, 5_000].map(|per_second| Rate { size: 200, per_second });
    upgrade(None, Duration::from_millis(120), &rates)
}

/// The promised row: directly 20 ms one way, by the relay 30.
fn fast() -> Result<()> {
    let Some(release) = std::env::var_os("MESHD_LAB_RELEASE") else {
        return skip("MESHD_LAB_RELEASE names no release build, and a debug build is too slow for this");
    };
    let rates = [500, 250, 100].map(|megabits| Rate { size: 1_200, per_second: megabits * 1_000_000 / 8 / 1_200 });
    upgrade(Some(release.into()), Duration::from_millis(5), &rates)
}

/// A flow of the first of these rates that the relay carries without loss on this machine.
fn upgrade(binary: Option<PathBuf>, coordinator: Duration, rates: &[Rate]) -> Result<()> {
    let (lab, ra, _) = two_homes(Nat::Home, Nat::Home, coordinator)?;
    ra.namespace.nft(
        "table inet hole {\n chain f {\n type filter hook forward priority -10\n ip daddr 203.0.113.22 meta l4proto udp drop\n \
         ip saddr 203.0.113.22 meta l4proto udp drop\n }\n}\n",
    )?;
    let node = |name: &str, machine: &meshd::cli::demo::net::Namespace| {
        let node = Node::new(name, machine.clone());
        Node { binary: binary.clone().unwrap_or_else(|| node.binary.clone()), ..node }
    };
    let nodes = lab.world.join_as(lab.machines.iter().map(|(name, machine)| node(name, machine)).collect())?;
    let (a, b) = (&nodes[0], &nodes[1]);
    until("packets are relayed by UDP", Duration::from_secs(20), || {
        a.ping("b", &["-c", "1"])?;
        let by_udp = |node: &Node| Ok::<_, anyhow::Error>(node.status()?.coordinator.relay.as_deref() == Some("udp"));
        Ok((by_udp(a)? && by_udp(b)?).then_some(()))
    })?;
    let mut carried = None;
    for rate in rates {
        let relayed = flood(a, b, *rate, || {
            let_pass(Duration::from_millis(1_500));
            Ok(())
        })?;
        println!(
            "{} datagrams of {} bytes a second, relayed: {} of {} lost, longest pause {:?}",
            rate.per_second,
            rate.size,
            relayed.lost(),
            relayed.sent,
            relayed.pause()
        );
        if relayed.lost() == 0 && relayed.pause() <= PAUSE {
            carried = Some(*rate);
            break;
        }
    }
    let Some(rate) = carried else {
        return skip("this machine's relay loses packets, or pauses, at any rate tried");
    };
    let flow = flood(a, b, rate, || {
        let_pass(Duration::from_millis(500));
        ra.namespace.nft("delete table inet hole\n")?;
        // The search would go on by itself, in up to half a minute; another address begins it anew.
        a.namespace.ip("addr add 192.168.21.77/24 dev eth0")?;
        until("the path is direct", Duration::from_secs(30), || {
            let_pass(Duration::from_millis(100));
            Ok((a.path("b")? == PathKind::Direct && b.path("a")? == PathKind::Direct).then_some(()))
        })?;
        let_pass(Duration::from_millis(1_000));
        Ok(())
    })?;
    let (lost, pause) = (flow.lost(), flow.pause());
    println!(
        "{} datagrams of {} bytes a second from the relay to the direct path: {lost} of {} lost, longest pause {pause:?}, \
         late by {} datagrams at most",
        rate.per_second,
        rate.size,
        flow.sent,
        flow.late_by()
    );
    let drops = || [a, b].map(|node| node.run(&["status", "--drops"]).unwrap_or_default()).join("\n");
    ensure(lost == 0, || format!("{lost} of {} datagrams were lost\n{}", flow.sent, drops()))?;
    ensure(pause <= PAUSE, || format!("nothing arrived for {pause:?}"))
}

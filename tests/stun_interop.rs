//! Our STUN against other people's, on loopback: Debian's `stun` (RFC 3489) asks our server, our NAT check asks coturn.
//! Where one of them is not installed the test says so and counts for nothing.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "sockets, clocks and processes, in a test")]

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use meshd::engine::netcheck::{Netcheck, SocketSlot};
use meshd::time::Now;
use meshd::wire::local;
use meshd::wire::stun::{self, ServerLayout};

/// The longest anything here may take.
const DEADLINE: Duration = Duration::from_secs(30);

fn installed(program: &str) -> bool {
    let found = ["/usr/bin", "/usr/local/bin", "/bin"]
        .iter()
        .any(|dir| fs::exists(format!("{dir}/{program}")).unwrap_or(false));
    if !found {
        eprintln!("SKIPPED: {program} is not installed (Debian: apt-get install stun-client coturn)");
    }
    found
}

/// Two ports that are free on both loopback addresses, as sockets that hold them.
fn two_by_two() -> (Vec<SocketAddr>, Vec<UdpSocket>) {
    for _ in 0..100 {
        let ports: Vec<UdpSocket> = (0..2).map(|_| UdpSocket::bind("127.0.0.1:0").expect("loopback")).collect();
        let mut sockets = Vec::new();
        for first in ports {
            let port = first.local_addr().expect("bound").port();
            sockets.push(first);
            sockets.extend(UdpSocket::bind(("127.0.0.2", port)));
        }
        if sockets.len() == 4 {
            return (sockets.iter().map(|s| s.local_addr().expect("bound")).collect(), sockets);
        }
    }
    panic!("no free ports on loopback");
}

fn serve(endpoints: Vec<SocketAddr>, sockets: Vec<UdpSocket>, stop: &AtomicBool) {
    let layout = ServerLayout { endpoints };
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(2))).expect("timeout");
    }
    while !stop.load(Ordering::Relaxed) {
        for (socket, received_on) in sockets.iter().zip(&layout.endpoints) {
            let mut buffer = [0; 2048];
            let Ok((len, source)) = socket.recv_from(&mut buffer) else { continue };
            let Some(answer) = stun::answer(&buffer[..len], source, *received_on, &layout) else { continue };
            let from = layout.endpoints.iter().position(|e| *e == answer.send_from).expect("one of ours");
            sockets[from].send_to(&answer.bytes, source).expect("loopback");
        }
    }
}

/// Runs the machine over real sockets.
fn netcheck(servers: Vec<SocketAddr>) -> local::Netcheck {
    let start = Instant::now();
    let now = || Now(u64::try_from(start.elapsed().as_micros()).expect("a short test"));
    let mut sockets: BTreeMap<SocketSlot, UdpSocket> = BTreeMap::new();
    let mut check = Netcheck::new(servers, 42, now());
    loop {
        while let Some((slot, to, bytes)) = check.poll_transmit() {
            let socket = sockets.entry(slot).or_insert_with(|| {
                let socket = UdpSocket::bind(if slot.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).expect("loopback");
                socket.set_read_timeout(Some(Duration::from_millis(2))).expect("timeout");
                socket
            });
            socket.send_to(&bytes, to).expect("loopback");
        }
        let Some(deadline) = check.poll_timeout() else { return check.finish() };
        if deadline <= now() {
            check.handle_timeout(now());
        }
        for (slot, socket) in &sockets {
            let mut buffer = [0; 2048];
            match socket.recv_from(&mut buffer) {
                Ok((len, from)) => check.handle_datagram(*slot, from, &buffer[..len], now()),
                // Nobody listens there yet.
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
                Err(e) => assert!(matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{e}"),
            }
        }
    }
}

/// A child that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn debians_stun_client_understands_our_server() {
    if !installed("stun") {
        return;
    }
    let (endpoints, sockets) = two_by_two();
    let server = endpoints[0].to_string();
    let stop = Arc::new(AtomicBool::new(false));
    let thread = {
        let stop = Arc::clone(&stop);
        thread::Builder::new()
            .name("server".to_owned())
            .spawn(move || serve(endpoints, sockets, &stop))
            .expect("a thread")
    };
    let client =
        Command::new("stun").arg(&server).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let output = client.wait_with_output().expect("it gives up by itself");
    stop.store(true, Ordering::Relaxed);
    thread.join().expect("the server ran to its end");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("Primary: Open"), "there is no NAT on loopback, but the client said: {said}");
}

#[test]
fn our_check_understands_coturn() {
    if !installed("turnserver") {
        return;
    }
    let (endpoints, sockets) = two_by_two();
    drop(sockets);
    let dir = tempfile::tempdir().expect("a folder");
    let port = |i: usize| endpoints[i].port().to_string();
    let mut command = Command::new("turnserver");
    command.args(["-n", "--stun-only", "--no-cli", "--no-tls", "--no-dtls", "--log-file=stdout"]);
    command.args(["-L", "127.0.0.1", "-L", "127.0.0.2", "-p", &port(0)]);
    command.arg(format!("--alt-listening-port={}", port(2)));
    command.arg(format!("--pidfile={}", dir.path().join("pid").display()));
    command.arg(format!("--userdb={}", dir.path().join("db").display()));
    let server = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts"));
    let start = Instant::now();
    let report = loop {
        let report = netcheck(vec![endpoints[0]]);
        if report.udp || start.elapsed() > DEADLINE {
            break report;
        }
    };
    drop(server);
    assert!(report.udp, "no answer in {DEADLINE:?}");
    assert_eq!(report.mapping.as_deref(), Some("endpoint-independent"));
    assert_eq!(report.filtering.as_deref(), Some("endpoint-independent"));
    assert_eq!(report.reflexive.len(), 1);
    assert!(report.reflexive[0].ip().is_loopback());
}

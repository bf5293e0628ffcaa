//! meshd's session against stock WireGuard: Debian's wireguard-go, configured with `wg`.
//!
//! ```text
//!   us 203.0.113.31: meshd's Tunnel over a UDP socket ── internet ── peer 203.0.113.32: wireguard-go, wg0
//!      inner 10.9.0.1                                                   inner 10.9.0.2
//! ```

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use meshd::cli::demo::net::{Namespace, Segment};
use meshd::engine::packet::MIN_ROOM;
use meshd::engine::session::tunnel::{HandshakeResult, Opened, Tick, Tunnel};
use meshd::os::clock;
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::wire::classify::{Kind, classify};
use meshd::wire::keys::WgKey;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::runner::{Case, case, skip};
use crate::world::{Icmp, Node, ensure, eventually};

pub fn cases() -> Vec<Case> {
    let limit = Duration::from_secs(320);
    vec![
        Case { name: "interop::wireguard_go_with_meshd_initiating", limit, run: || interop(true) },
        Case { name: "interop::wireguard_go_initiating", limit, run: || interop(false) },
        case("interop::a_stranger_is_not_answered", stranger),
    ]
}

/// The public key of a node that is up.
pub fn wireguard_key(node: &Node) -> Result<WgKey> {
    let text = std::fs::read(node.state_dir().join("node.json"))?;
    let document: serde_json::Value = serde_json::from_slice(&text)?;
    let keys: NodeKeys = serde_json::from_value(document["keys"].clone())?;
    Ok(keys.wg_key())
}

/// A handshake initiation to `victim` from a key nobody knows.
pub fn stranger_initiation(victim: WgKey, n: u32) -> Result<Vec<u8>> {
    let secret = Secret32::random(&mut StdRng::seed_from_u64(u64::from(n)));
    let mut out = vec![0; 2048];
    let length = Tunnel::new(&secret, &victim, n).initiate(&mut out, false, clock::now()).context("no initiation")?;
    out.truncate(length);
    Ok(out)
}

/// wireguard-go with one peer.
struct Stock {
    namespace: Namespace,
    key: WgKey,
}

impl Stock {
    fn start(internet: &Segment, peer: &WgKey, endpoint: Option<&str>) -> Result<Self> {
        let namespace = internet.host("peer", 32)?;
        std::fs::create_dir_all("/run/lab")?;
        namespace.spawn(Command::new("wireguard-go").args(["-f", "wg0"]), Path::new("/run/lab/wireguard-go.log"))?;
        let keys = NodeKeys::generate(&mut StdRng::seed_from_u64(7));
        std::fs::write("/run/lab/wg.key", STANDARD.encode(keys.wg.expose()))?;
        let peer = STANDARD.encode(peer.0);
        let mut set = vec!["set", "wg0", "private-key", "/run/lab/wg.key", "listen-port", "51820", "peer", &peer];
        set.extend(["allowed-ips", "10.9.0.1/32"]);
        if let Some(endpoint) = endpoint {
            set.extend(["endpoint", endpoint]);
        }
        eventually("wireguard-go takes its settings", Duration::from_secs(10), || {
            namespace.run(Command::new("wg").args(&set)).map(drop)
        })?;
        namespace.ip("addr add 10.9.0.2/24 dev wg0")?;
        namespace.ip("link set wg0 mtu 1280 up")?;
        Ok(Self { namespace, key: keys.wg_key() })
    }

    /// Unix seconds of the last handshake, and bytes received and sent, as `wg show` tells.
    fn latest_handshake(&self) -> Result<u64> {
        let text = self.namespace.run(Command::new("wg").args(["show", "wg0", "latest-handshakes"]))?;
        text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).with_context(|| text.clone())
    }
}

/// meshd's session on a plain socket, pinging and answering pings.
struct Session {
    tunnel: Tunnel,
    socket: UdpSocket,
    remote: Option<SocketAddr>,
    asked: u16,
    answered: u32,
    answers_given: u32,
    handshakes: u32,
}

impl Session {
    fn run(&mut self, length: Duration, ask: bool) -> Result<()> {
        let end = Instant::now() + length;
        let mut next_ask = Instant::now();
        let (mut datagram, mut out) = (vec![0; 2048], vec![0; 2048]);
        self.socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        while Instant::now() < end {
            if let Ok((n, from)) = self.socket.recv_from(&mut datagram) {
                self.receive(&datagram[..n], from, &mut out)?;
            }
            while let Tick::Send { len } = self.tunnel.tick(&mut out, clock::now()) {
                self.send(&out[..len])?;
            }
            if ask && Instant::now() >= next_ask {
                next_ask += Duration::from_millis(250);
                self.ask(&mut out)?;
            }
        }
        Ok(())
    }

    fn ask(&mut self, out: &mut [u8]) -> Result<()> {
        let now = clock::now();
        if !self.tunnel.can_send(now) {
            if let Some(len) = self.tunnel.initiate(out, false, now) {
                self.send(&out[..len])?;
            }
            return Ok(());
        }
        let request = echo(8, [10, 9, 0, 1], [10, 9, 0, 2], self.asked);
        if let Some(len) = self.tunnel.seal(&request, out, now) {
            self.asked += 1;
            self.send(&out[..len])?;
        }
        Ok(())
    }

    fn receive(&mut self, datagram: &[u8], from: SocketAddr, out: &mut [u8]) -> Result<()> {
        let now = clock::now();
        if classify(datagram) != Kind::Data {
            match self.tunnel.handshake(from.ip(), datagram, out, now) {
                HandshakeResult::Reply { len } | HandshakeResult::Established { len } => {
                    self.handshakes += 1;
                    self.remote = Some(from);
                    self.send(&out[..len])?;
                }
                HandshakeResult::CookieStored | HandshakeResult::Refused(_) => {}
            }
            return Ok(());
        }
        let Opened::Packet { len, .. } = self.tunnel.open(Some(from.ip()), datagram, out, now) else { return Ok(()) };
        let packet = out[..len].to_vec();
        match packet.get(20) {
            Some(0) => self.answered += 1,
            Some(8) => {
                let mut answer = packet;
                answer[20] = 0;
                let (source, destination) = ([10, 9, 0, 1], [10, 9, 0, 2]);
                answer[12..16].copy_from_slice(&source);
                answer[16..20].copy_from_slice(&destination);
                answer[22..24].fill(0);
                let sum = checksum(&answer[20..]);
                answer[22..24].copy_from_slice(&sum);
                if let Some(len) = self.tunnel.seal(&answer, out, now) {
                    self.answers_given += 1;
                    self.send(&out[..len])?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn send(&self, datagram: &[u8]) -> Result<()> {
        if let Some(remote) = self.remote {
            self.socket.send_to(datagram, remote)?;
        }
        Ok(())
    }
}

/// An ICMP echo message in an IPv4 packet.
fn echo(kind: u8, source: [u8; 4], destination: [u8; 4], sequence: u16) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0, 0x12, 0x34];
    icmp.extend(sequence.to_be_bytes());
    icmp.extend(*b"meshd talks to stock WireGuard..");
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let total = u16::try_from(20 + icmp.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(icmp);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

fn set_up(configured: bool) -> Result<(Stock, Session)> {
    for program in ["wireguard-go", "wg"] {
        if !["/usr/bin", "/usr/local/bin", "/bin"].iter().any(|place| Path::new(place).join(program).is_file()) {
            return skip(format!("{program} is not installed (apt-get install wireguard-go wireguard-tools)"));
        }
    }
    let internet = Segment::internet()?;
    let us = internet.host("us", 31)?;
    let keys = NodeKeys::generate(&mut StdRng::seed_from_u64(8));
    let stock = Stock::start(&internet, &keys.wg_key(), configured.then_some("203.0.113.31:40000"))?;
    let socket = us.enter(|| UdpSocket::bind("0.0.0.0:40000"))??;
    let remote = (!configured).then_some("203.0.113.32:51820").map(str::parse).transpose()?;
    let tunnel = Tunnel::new(&keys.wg, &stock.key, 0x1234);
    let session = Session { tunnel, socket, remote, asked: 0, answered: 0, answers_given: 0, handshakes: 0 };
    Ok((stock, session))
}

/// Three minutes of pings both ways; the re-key comes after two.
fn interop(meshd_first: bool) -> Result<()> {
    let short = std::env::var_os("MESHD_LAB_SHORT").is_some();
    let length = Duration::from_secs(if short { 15 } else { 185 });
    let (stock, mut session) = set_up(!meshd_first)?;
    if meshd_first {
        // wireguard-go knows no address of ours until we speak.
        session.run(Duration::from_secs(2), true)?;
        ensure(session.handshakes == 1, || format!("{} handshakes", session.handshakes))?;
    }
    let count = (length.as_secs() - 3) * 4;
    let count = count.to_string();
    let log = Path::new("/run/lab/stock-ping");
    let mut ping = Command::new("ping");
    ping.args(["-n", "-q", "-i", "0.25", "-W", "2", "-c", &count, "10.9.0.1"]);
    let mut pings = stock.namespace.spawn(&mut ping, log)?;
    if !meshd_first {
        // The first handshake is to be wireguard-go's.
        session.run(Duration::from_secs(2), false)?;
        ensure(session.handshakes >= 1, || "wireguard-go does not shake hands".to_owned())?;
    }
    let first = stock.latest_handshake()?;
    session.run(length, true)?;
    // On a busy machine ping falls behind its own interval: answer until it has asked all it wanted to.
    for _ in 0..60 {
        if pings.try_wait()?.is_some() {
            break;
        }
        session.run(Duration::from_secs(1), true)?;
    }
    let theirs = Icmp::wait((pings, log.to_path_buf()), Duration::from_secs(20))?;
    let asked = u32::from(session.asked);
    println!(
        "meshd asked {asked}, got {}; wireguard-go: {theirs:?}; {} handshakes",
        session.answered, session.handshakes
    );
    // The last request of ours may still be under way.
    ensure(asked > 40 && session.answered + 1 >= asked, || {
        format!("of {asked} pings {} were answered", session.answered)
    })?;
    ensure(theirs.sent > 40 && theirs.received == theirs.sent, || format!("wireguard-go: {theirs:?}"))?;
    ensure(session.answers_given >= theirs.received, || format!("{} given", session.answers_given))?;
    if !short {
        ensure(session.handshakes >= 2, || format!("no re-key: {} handshakes", session.handshakes))?;
        let last = stock.latest_handshake()?;
        ensure(last >= first + 100, || format!("wireguard-go's last handshakes were at {first} and {last}"))?;
    }
    Ok(())
}

/// A key that wireguard-go does not know gets no answer; neither does a corrupted initiation from one that it knows.
fn stranger() -> Result<()> {
    let (stock, mut session) = set_up(false)?;
    let target: SocketAddr = "203.0.113.32:51820".parse()?;
    session.socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    session.socket.send_to(&stranger_initiation(stock.key, 1)?, target)?;
    let mut datagram = [0; 2048];
    ensure(session.socket.recv_from(&mut datagram).is_err(), || "a stranger was answered".to_owned())?;
    let mut out = vec![0; MIN_ROOM.max(2048)];
    let len = session.tunnel.initiate(&mut out, false, clock::now()).context("no initiation")?;
    session.socket.send_to(&out[..len], target)?;
    let (n, from) = session.socket.recv_from(&mut datagram).context("our own key was not answered")?;
    // And meshd for its part refuses an altered answer, and takes the true one.
    let mut altered = datagram[..n].to_vec();
    altered[50] ^= 1;
    let ip: IpAddr = from.ip();
    let refused = session.tunnel.handshake(ip, &altered, &mut out, clock::now());
    ensure(matches!(refused, HandshakeResult::Refused(_)), || format!("an altered answer: {refused:?}"))?;
    let taken = session.tunnel.handshake(ip, &datagram[..n], &mut out, clock::now());
    ensure(matches!(taken, HandshakeResult::Established { .. }), || format!("the true answer: {taken:?}"))
}

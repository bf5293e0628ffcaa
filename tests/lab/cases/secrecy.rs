//! What others can read, forge and flood.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::net;
use crate::packets::Tap;
use crate::runner::{Case, case};
use crate::world::{Node, ensure, let_pass};

/// Nothing else on these wires looks like it.
const WORD: &[u8] = b"ORIGINAL-CONTENT-THAT-ONLY-TWO-NODES-MAY-READ";

pub fn cases() -> Vec<Case> {
    vec![
        case("secrecy::relayed_traffic_is_ciphertext_to_coordinator_and_tap", || ciphertext_only(&net::symmetric()?)),
        case("secrecy::direct_traffic_is_ciphertext_to_a_tap", || ciphertext_only(&net::home_nat()?)),
        case("spoofing::a_foreign_inner_source_is_dropped_and_counted", spoofed_source),
        case("flood::junk_does_not_stop_a_ping", || flood(&junk)),
        case("flood::handshake_initiations_do_not_stop_a_ping", || flood(&initiations)),
    ]
}

fn ciphertext_only(lab: &net::Topology) -> Result<()> {
    let nodes = lab.join()?;
    let _ = nodes[0].ping("b", &["--until-direct", "--timeout", "3s", "--interval", "200ms"])?;
    let outside = Tap::start(lab.world.internet.namespace(), WORD)?;
    let at_coordinator = Tap::start(&lab.world.coordinator.node.namespace, WORD)?;
    // In the sender's own namespace the word passes in the clear, through the interface: the tap can see it at all.
    let at_sender = Tap::start(&nodes[0].namespace, WORD)?;
    let text = WORD.repeat(20);
    let server = SocketAddr::new(nodes[1].address(true)?, 7000);
    let listener = nodes[1].namespace.enter(|| TcpListener::bind(server))??;
    let mut stream = nodes[0].namespace.enter(|| TcpStream::connect_timeout(&server, Duration::from_secs(10)))??;
    stream.write_all(&text)?;
    let (mut other, _) = listener.accept()?;
    let mut got = vec![0; text.len()];
    other.set_read_timeout(Some(Duration::from_secs(10)))?;
    std::io::Read::read_exact(&mut other, &mut got)?;
    ensure(got == text, || "what arrived is not what was sent".to_owned())?;
    let (outside, at_coordinator, at_sender) = (outside.stop(), at_coordinator.stop(), at_sender.stop());
    ensure(at_sender.hits > 0, || format!("the tap is deaf: {at_sender:?}"))?;
    ensure(outside.frames > 0 && outside.hits == 0, || format!("on the internet: {outside:?}"))?;
    ensure(at_coordinator.hits == 0, || format!("at the coordinator: {at_coordinator:?}"))?;
    // On disk neither.
    let output = std::process::Command::new("grep")
        .args(["-rl", "--binary-files=text"])
        .arg(std::str::from_utf8(WORD)?)
        .arg("/run/lab")
        .output()?;
    ensure(output.stdout.is_empty(), || format!("on disk: {}", String::from_utf8_lossy(&output.stdout)))
}

fn dropped(node: &Node, reason: &str) -> Result<u64> {
    let text = node.run(&["status", "--drops", "--json"])?;
    let document: serde_json::Value = serde_json::from_str(&text)?;
    let drops = document["drops"].as_array().context("no list of drops")?;
    Ok(drops.iter().find(|drop| drop["reason"] == reason).and_then(|drop| drop["packets"].as_u64()).unwrap_or(0))
}

/// b gives its interface c's mesh address and talks to a with it.
fn spoofed_source() -> Result<()> {
    let lab = net::public()?;
    let nodes = lab.join()?;
    nodes[1].ping_until_direct("a")?;
    let interface = nodes[1].status()?.me.interface;
    let foreign = nodes[2].address(true)?;
    let before = dropped(&nodes[0], "spoofed-source")?;
    nodes[1].namespace.ip(&format!("addr add {foreign}/32 dev {interface}"))?;
    let to = nodes[0].address(true)?;
    let seen = nodes[1].icmp(to, &["-c", "3", "-i", "0.1", "-W", "1", "-I", &foreign.to_string()])?;
    ensure(seen.received == 0, || "a answered a forged source".to_owned())?;
    let after = dropped(&nodes[0], "spoofed-source")?;
    ensure(after >= before + 3, || format!("a counted {before} before and {after} after three forged packets"))?;
    let seen = nodes[1].icmp(to, &["-c", "3", "-i", "0.1", "-W", "1"])?;
    ensure(seen.received == 3, || format!("the honest source: {seen:?}"))
}

/// Makes one packet of a flood after the other.
type Flood = Box<dyn FnMut(u32) -> Vec<u8> + Send>;

/// a pings b while somebody else on the internet floods b's UDP port.
fn flood(make: &dyn Fn(&Node) -> Result<Flood>) -> Result<()> {
    let lab = net::public()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    nodes[1].ping_until_direct("a")?;
    let target: SocketAddr = format!("203.0.113.32:{}", nodes[1].status()?.me.port).parse()?;
    let attacker = lab.world.internet.host("attacker", 66)?;
    let socket = attacker.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    let mut packet = make(&nodes[1])?;
    let stop = AtomicBool::new(false);
    let (seen, sent) = std::thread::scope(|scope| -> Result<_> {
        let flooding = scope.spawn(|| {
            let mut sent = 0u32;
            while !stop.load(Ordering::Relaxed) {
                // 2,000 every tenth of a second at most, so that on two cores it is the daemon that is tested.
                for _ in 0..200 {
                    let _ = socket.send_to(&packet(sent), target);
                    sent += 1;
                }
                let_pass(Duration::from_millis(10));
            }
            sent
        });
        let seen = nodes[0].icmp(nodes[1].address(true)?, &["-q", "-c", "500", "-i", "0.01", "-W", "2"]);
        stop.store(true, Ordering::Relaxed);
        let sent = flooding.join().map_err(|_| anyhow::anyhow!("the attacker panicked"))?;
        Ok((seen?, sent))
    })?;
    println!("{sent} packets of flood, {seen:?}");
    ensure(sent > 10_000, || format!("only {sent} packets were sent: no flood"))?;
    ensure(seen.sent == 500 && seen.received >= 496, || format!("under {sent} packets of flood: {seen:?}"))
}

fn junk(_: &Node) -> Result<Box<dyn FnMut(u32) -> Vec<u8> + Send>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    Ok(Box::new(move |n| {
        let length = usize::try_from(n % 1400).unwrap_or(0) + 1;
        let byte = || {
            // xorshift: any bytes will do, as long as they are the same in every run.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        };
        let mut bytes: Vec<u8> = std::iter::repeat_with(byte).take(length).collect();
        // Every other packet looks like WireGuard data, a probe's STUN header or a relay frame at first sight.
        let head: &[u8] = match n % 6 {
            0 => &[4, 0, 0, 0],
            1 => &[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42],
            2 => &[0xc0],
            _ => &[],
        };
        if bytes.len() > head.len() {
            bytes[..head.len()].copy_from_slice(head);
        }
        bytes
    }))
}

/// Real handshake initiations: each from a stranger's key, each with a valid first MAC, so that only the gate stands
/// between them and the victim's Diffie-Hellman.
fn initiations(victim: &Node) -> Result<Box<dyn FnMut(u32) -> Vec<u8> + Send>> {
    let public = super::interop::wireguard_key(victim)?;
    let prepared: Vec<Vec<u8>> =
        (0..200u32).map(|n| super::interop::stranger_initiation(public, n)).collect::<Result<_>>()?;
    Ok(Box::new(move |n| prepared[usize::try_from(n).unwrap_or(0) % prepared.len()].clone()))
}

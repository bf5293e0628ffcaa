//! The simulator's kinds of NAT (`tests/sim/nat.rs`), by the same names, as nftables rules.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use meshd::cli::demo::net::{INTERNET_V4, Namespace, Router, Segment};

/// Where blocks begin, and where counting does.
const BLOCK_BASE: u32 = 20_000;
const COUNTING_FROM: u32 = 30_000;
/// Ports that are counted through, before it begins again.
const COUNTED: u32 = 4_096;
/// The internet's own router.
const HOP: &str = "203.0.113.254";

/// A kind of NAT, parsed.
struct Kind<'a> {
    /// What a flow's port is made from, as an nftables statement.
    ports: String,
    filtering: &'a str,
    open_input: bool,
    hairpin: bool,
}

impl<'a> Kind<'a> {
    fn parse(name: &'a str, wan: &str) -> Result<Self> {
        let mut words = name.split('+');
        let first = words.next().unwrap_or_default();
        let filtering = if first == "linux" { "apdf" } else { words.next().context("no filtering")? };
        // Hashes are endpoint-independent, or address-dependent: what goes in decides.
        let hash = |keys: &str| format!("snat ip to {wan} : jhash {keys} mod 60000 seed 0x5eed offset 2000");
        let mut kind = Self {
            ports: match first {
                "linux" => "masquerade".to_owned(),
                "eim" => hash("ip saddr . udp sport"),
                "adm" => hash("ip saddr . udp sport . ip daddr"),
                "apdm" => "masquerade fully-random".to_owned(),
                _ => bail!("no NAT is called {name:?}"),
            },
            filtering,
            open_input: false,
            hairpin: false,
        };
        for word in words {
            match word {
                "open" => kind.open_input = true,
                "random" => kind.ports = "masquerade fully-random".to_owned(),
                "hair" => kind.hairpin = true,
                "seq" => {
                    let ports: Vec<String> = (0..COUNTED).map(|n| format!("{n} : {}", COUNTING_FROM + n)).collect();
                    let ports = ports.join(", ");
                    kind.ports = format!("snat ip to {wan} : numgen inc mod {COUNTED} map {{ {ports} }}");
                }
                _ => {
                    let width: u32 = word.strip_prefix("block").context("no such option")?.parse()?;
                    kind.ports = format!("masquerade to :{BLOCK_BASE}-{} fully-random", BLOCK_BASE + width - 1);
                }
            }
        }
        Ok(kind)
    }

    /// What is learned about a flow's port once it is chosen lets others in: all, or those of an address.
    fn rules(&self, wan: &str) -> Result<String> {
        let dnat = match self.filtering {
            "eif" => "iifname \"wan\" meta l4proto udp dnat ip to udp dport map @inside\n",
            "adf" => "iifname \"wan\" udp dport . ip saddr @known dnat ip to udp dport map @inside\n",
            "apdf" => "",
            other => bail!("no filtering is called {other:?}"),
        };
        let (mut hairpin, mut back) = (String::new(), String::new());
        if self.hairpin {
            hairpin = format!("iifname \"lan\" ip daddr {wan} meta l4proto udp dnat ip to udp dport map @inside\n");
            back = format!("iifname \"lan\" oifname \"lan\" meta l4proto udp {}\n", self.ports);
        }
        let input = if self.open_input { "accept" } else { "drop" };
        let ports = &self.ports;
        Ok(format!(
            "table ip nat {{
               map inside {{
                 type inet_service : ipv4_addr . inet_service
                 flags dynamic,timeout
                 timeout 2m
                 size 65535
               }}
               set known {{
                 type inet_service . ipv4_addr
                 flags dynamic,timeout
                 timeout 2m
                 size 65535
               }}
               chain pre {{
                 type nat hook prerouting priority -100
                 {hairpin}{dnat}
               }}
               chain post {{
                 type nat hook postrouting priority 100
                 {back}oifname \"wan\" meta l4proto udp {ports}
                 oifname \"wan\" masquerade
               }}
               chain learn {{
                 type filter hook postrouting priority 110
                 oifname \"wan\" meta l4proto udp ct direction original update @inside {{ ct reply proto-dst : ct original ip saddr . ct original proto-src }}
                 oifname \"wan\" meta l4proto udp ct direction original update @known {{ ct reply proto-dst . ip daddr }}
               }}
             }}
             table inet fw {{
               chain input {{
                 type filter hook input priority 0
                 iifname \"wan\" ct state new meta l4proto {{ udp, tcp }} {input}
               }}
               chain forward {{
                 type filter hook forward priority 0; policy drop;
                 ct state established,related accept
                 ct status dnat accept
                 iifname \"lan\" accept
               }}
             }}
            "
        ))
    }
}

/// A router with a NAT of this kind on the internet, see [`routed`].
pub fn router(segment: &Segment, name: &str, number: u8, kind: &str) -> Result<Router> {
    let wan = segment.v4(number);
    let rules = Kind::parse(kind, &wan).and_then(|k| k.rules(&wan)).with_context(|| format!("the NAT {kind}"))?;
    let made = segment.router_with(name, number, &rules).with_context(|| format!("the NAT {kind}"))?;
    made.namespace.ip(&format!("route replace {INTERNET_V4}.0/24 via {HOP} dev wan onlink"))?;
    Ok(made)
}

/// Makes the internet a router, for the routers made by [`router`]: there is a hop between any two, what dies there is told, and
/// none of them has to ask for another's hardware address, which would take the first packet a round trip.
///
/// ```text
///   ra ──┐                   ┌── rb
///        ├─ bridge = router ─┤        through it, and out of the bridge again
///   coord┘                   └── rc
/// ```
pub fn routed(internet: &Segment) -> Result<()> {
    let (namespace, bridge) = (internet.namespace(), internet.bridge_name());
    namespace.ip(&format!("addr add {HOP}/24 dev {bridge}"))?;
    namespace.sysctl("ipv4/ip_forward", "1")?;
    // Only the bridge answers for its address: the near end of a slow cable would lead past the cable.
    namespace.sysctl("ipv4/conf/all/arp_ignore", "1")?;
    for which in ["all", bridge] {
        namespace.sysctl(&format!("ipv4/conf/{which}/send_redirects"), "0")?;
    }
    Ok(())
}

/// Others behind a router, who open so many flows a second until this is dropped.
pub struct Foreign {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Foreign {
    pub fn start(router: &Namespace, per_second: u32) -> Result<Self> {
        let socket = router.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("foreign".to_owned()).spawn(move || {
            let (start, mut sent) = (Instant::now(), 0u32);
            while !stopped.load(Ordering::Relaxed) {
                let due = start.elapsed().as_secs_f64() * f64::from(per_second);
                while f64::from(sent) < due {
                    // Each to a port of its own, which makes it a flow of its own.
                    let port = 1_024 + u16::try_from(sent % 60_000).unwrap_or_default();
                    let _ = socket.send_to(b"x", (HOP, port));
                    sent += 1;
                }
                std::thread::park_timeout(Duration::from_millis(5));
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

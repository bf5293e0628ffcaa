//! Home routers that map ports: Debian's miniupnpd, and a small one for where miniupnpd refuses to work, which is behind
//! another NAT.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use meshd::cli::demo::net::{Namespace, Router, Segment, tool};

use crate::runner::skip;
use crate::world::until;

/// What miniupnpd is to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    Everything,
    /// Its PCP requests are dropped on the way.
    NatPmpAndUpnp,
    Upnp,
}

/// miniupnpd on a router. It gives nothing away for addresses that are not public ones, and those of documentation count as
/// such, so the router gets another: [`public_address`].
#[derive(Debug)]
pub struct Miniupnpd {
    router: Namespace,
    config: PathBuf,
    process: Child,
}

/// The address that router `number` has outside, besides its usual one.
pub fn public_address(number: u8) -> String {
    format!("11.0.0.{number}")
}

/// Lets a machine on the internet reach such addresses.
pub fn reach_public_addresses(machine: &Namespace, interface: &str) -> Result<()> {
    machine.ip(&format!("route add 11.0.0.0/24 dev {interface}")).map(drop)
}

impl Miniupnpd {
    /// Starts it on a router of the internet.
    pub fn start(router: &Router, number: u8, speaks: Speaks) -> Result<Self> {
        let namespace = router.namespace.clone();
        if tool("miniupnpd").get_program() == "miniupnpd" {
            return skip("miniupnpd is not installed (apt-get install miniupnpd-nftables)");
        }
        namespace.ip(&format!("addr add {}/32 dev wan", public_address(number)))?;
        // What it maps must also get through the router's own firewall.
        namespace.nft("add rule inet fw forward ct status dnat accept")?;
        namespace.nft(
            "table inet miniupnpd {\n chain prerouting { type nat hook prerouting priority -100; jump prerouting_m; }\n\
             chain postrouting { type nat hook postrouting priority 90; jump postrouting_m; }\n\
             chain miniupnpd { }\n chain prerouting_m { }\n chain postrouting_m { }\n }",
        )?;
        if speaks == Speaks::NatPmpAndUpnp {
            namespace.nft("add rule inet fw input udp dport 5351 @th,64,8 2 drop")?;
        }
        let nat_pmp = if speaks == Speaks::Upnp { "no" } else { "yes" };
        let folder = Path::new("/run/lab");
        fs::create_dir_all(folder)?;
        let config = folder.join(format!("miniupnpd-{number}.conf"));
        let text = format!(
            "ext_ifname=wan\next_ip={}\nlistening_ip=lan\nhttp_port=5000\nenable_natpmp={nat_pmp}\nenable_upnp=yes\n\
             secure_mode=yes\nsystem_uptime=no\nuuid=6f0d7a3c-25e1-4c8e-9a55-0000000000{number:02}\n\
             upnp_table_name=miniupnpd\nupnp_nat_table_name=miniupnpd\nupnp_forward_chain=miniupnpd\n\
             upnp_nat_chain=prerouting_m\nupnp_nat_postrouting_chain=postrouting_m\n\
             allow 1024-65535 0.0.0.0/0 1024-65535\n",
            public_address(number)
        );
        fs::write(&config, text)?;
        let process = Self::spawn(&namespace, &config)?;
        let running = Self { router: namespace, config, process };
        running.wait()?;
        Ok(running)
    }

    fn spawn(router: &Namespace, config: &Path) -> Result<Child> {
        let mut command = tool("miniupnpd");
        command.args(["-d", "-f"]).arg(config).arg("-P").arg(config.with_extension("pid"));
        router.spawn(&mut command, &config.with_extension("log"))
    }

    /// Until its web server, which it opens first of all, listens.
    fn wait(&self) -> Result<()> {
        until("miniupnpd listens", Duration::from_secs(5), || {
            let sockets = self.router.run(tool("ss").args(["-ltn"]))?;
            Ok(sockets.contains(":5000 ").then_some(()))
        })
        .with_context(|| fs::read_to_string(self.config.with_extension("log")).unwrap_or_default())
    }

    /// The inside ports it maps now.
    pub fn mapped(&self) -> Result<String> {
        self.router.run(tool("nft").args(["list", "chain", "inet", "miniupnpd", "prerouting_m"]))
    }

    /// What a power cut does: it starts anew, and knows nothing.
    pub fn reboot(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.router.nft("flush chain inet miniupnpd prerouting_m\nflush chain inet miniupnpd miniupnpd")?;
        self.process = Self::spawn(&self.router, &self.config)?;
        self.wait()?;
        // It announces a new address outside by itself, but not its start.
        signal(self.process.id(), "-USR1")
    }
}

impl Drop for Miniupnpd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A router on `outside` that answers PCP on its LAN and makes the rules itself. Lasts as long as the process. Written after
/// RFC 6887 and not with the program's own code.
pub fn grant_by_pcp(router: &Router, outside: &Segment, number: u8) -> Result<()> {
    let namespace = router.namespace.clone();
    namespace.nft("table ip pcp { chain pre { type nat hook prerouting priority -100; }\n }")?;
    namespace.nft("add rule inet fw forward ct status dnat accept")?;
    let external: Ipv4Addr = outside.v4(number).parse()?;
    let socket = namespace.enter(|| UdpSocket::bind((router.lan.v4(1).as_str(), 5351)))??;
    let started = Instant::now();
    let serve = move || {
        let mut buffer = [0; 1_100];
        loop {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { return };
            let request = &buffer[..length];
            if length < 24 || request[0] != 2 {
                continue;
            }
            let mut answer = request.to_vec();
            answer[1] |= 0x80;
            let epoch = u32::try_from(started.elapsed().as_secs()).unwrap_or(u32::MAX);
            answer[8..12].copy_from_slice(&epoch.to_be_bytes());
            answer[12..24].fill(0);
            if request[1] == 1 && length == 60 {
                let port = u16::from_be_bytes([request[40], request[41]]);
                let wanted = request[4..8] != [0; 4];
                let rule = format!("add rule ip pcp pre iifname \"wan\" udp dport {port} dnat to {}:{port}", from.ip());
                let made = if wanted { namespace.nft(&rule) } else { namespace.nft("flush chain ip pcp pre") };
                answer[3] = if made.is_ok() { 0 } else { 8 };
                answer[42..44].copy_from_slice(&port.to_be_bytes());
                answer[44..60].copy_from_slice(&external.to_ipv6_mapped().octets());
            }
            let _ = socket.send_to(&answer, from);
        }
    };
    std::thread::Builder::new().name("pcp".to_owned()).spawn(serve)?;
    Ok(())
}

/// Lets the machines behind a router with `number` on the internet reach each other at its outside address: what it maps is
/// noted, and what comes for it from inside is sent back in with the outside address of the sender (RFC 4787 section 6).
pub fn hairpin(router: &Router, internet: &Segment, number: u8) -> Result<()> {
    let outside = internet.v4(number);
    router.namespace.nft(&format!(
        "table ip hair {{\n map m {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 300s; \
         size 1024; }}\n\
         chain learn {{ type filter hook postrouting priority 110;\n oifname \"wan\" meta l4proto udp ct direction original \
         update @m {{ ct reply proto-dst : ct original ip saddr . ct original proto-src }}\n }}\n\
         chain pre {{ type nat hook prerouting priority -100;\n iifname \"lan\" ip daddr {outside} meta l4proto udp \
         dnat to udp dport map @m\n }}\n\
         chain post {{ type nat hook postrouting priority 90;\n iifname \"lan\" oifname \"lan\" ct status dnat \
         snat to {outside}\n }}\n }}"
    ))
}

/// Ends a daemon as a power cut does.
pub fn kill(pid: u32) -> Result<()> {
    signal(pid, "-9")
}

fn signal(pid: u32, which: &str) -> Result<()> {
    let status = Command::new("kill").args([which, &pid.to_string()]).status()?;
    if status.success() { Ok(()) } else { Err(anyhow!("kill {which} {pid}: {status}")) }
}

//! What people reach through a mesh: real servers, by mesh address, by an address of the subnet behind, and by name.
//!
//! ```text
//!   coordinator ── internet ──┬── [NAT ra] ── laptop       only ran `meshd up TOKEN`
//!                             └── [NAT rb] ─┬─ box         meshd; leads to its LAN
//!                                           └─ nas         knows nothing of meshd
//! ```
//!
//! The same servers run on box and on nas.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::Nat;

use crate::machine::{Machine, need, need_users};
use crate::runner::{Case, case};
use crate::services::{echo, stream};
use crate::world::{Icmp, World, ensure, eventually};

pub fn cases() -> Vec<Case> {
    vec![
        case("services::ssh_sftp_and_a_git_clone", ssh),
        case("services::http", http),
        case("services::smb", smb),
        case("services::dns", dns),
        case("services::a_udp_stream_and_ping_in_fragments", datagrams),
    ]
}

const PATIENCE: Duration = Duration::from_secs(15);

struct Site {
    _world: World,
    laptop: Machine,
    box_: Machine,
    nas: Machine,
    targets: Vec<Target>,
}

/// One way to say where a server is.
struct Target {
    host: String,
    /// The machine that is meant.
    machine: &'static str,
}

impl Target {
    /// As in a URL.
    fn url(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }

    fn is_ipv6(&self) -> bool {
        self.host.contains(':')
    }
}

impl Site {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let ra = world.internet.router("ra", 21, Nat::Home)?;
        let rb = world.internet.router("rb", 22, Nat::Home)?;
        let laptop = Machine::new("laptop", ra.lan.host("laptop", 2)?, "")?;
        let box_ = Machine::new("box", rb.lan.host("box", 2)?, "")?;
        let nas = Machine::new("nas", rb.lan.host("nas", 3)?, "")?;
        let claim = world.coordinator.claim()?;
        box_.sh(&format!("meshd up --advertise-routes 192.168.22.0/24 {claim}"))?;
        box_.sh("meshd routes approve box 192.168.22.0/24")?;
        let invite = box_.sh("meshd invite")?;
        laptop.sh(&format!("meshd up {}", invite.trim()))?;
        let mut targets = Vec::new();
        for family in ["-4", "-6"] {
            targets.push((box_.sh(&format!("meshd ip {family}"))?.trim().to_owned(), "box"));
        }
        targets.push(("192.168.22.3".to_owned(), "nas"));
        targets.push(("box".to_owned(), "box"));
        targets.push(("box.home.internal".to_owned(), "box"));
        let targets = targets.into_iter().map(|(host, machine)| Target { host, machine }).collect();
        let site = Self { _world: world, laptop, box_, nas, targets };
        for target in &site.targets {
            eventually(&format!("{} answers", target.host), PATIENCE, || {
                site.laptop.sh(&format!("ping -c 1 -W 1 {}", target.host))
            })?;
        }
        Ok(site)
    }

    fn servers(&self) -> [&Machine; 2] {
        [&self.box_, &self.nas]
    }

    /// Waits until a server listens on its own machine.
    fn listens(&self, machine: &Machine, tcp: u16) -> Result<()> {
        eventually(&format!("port {tcp} of {} is open", machine.name), PATIENCE, || {
            let sockets = machine.sh("ss -ltn")?;
            ensure(sockets.contains(&format!(":{tcp} ")), || format!("{sockets}\n{}", machine.log()))
        })
    }

    /// The laptop does this with every target; `HOST` and `URL` stand for it. What it printed must be `wanted` of the machine.
    fn each(&self, script: &str, wanted: impl Fn(&Target, &str) -> bool) -> Result<()> {
        for target in &self.targets {
            let script = script.replace("HOST", &target.host).replace("URL", &target.url());
            let said = self.laptop.sh(&script).with_context(|| format!("the server's log:\n{}", self.log(target)))?;
            ensure(wanted(target, said.trim()), || format!("{script}: {said}"))?;
        }
        Ok(())
    }

    fn log(&self, target: &Target) -> String {
        if target.machine == "box" { self.box_.log() } else { self.nas.log() }
    }
}

const SSHD: &str = "
mkdir -p /root/ssh
ssh-keygen -q -t ed25519 -N '' -f /root/ssh/host
cp /run/lab/key.pub /root/ssh/authorized
cat > /root/ssh/config <<END
Port 22
HostKey /root/ssh/host
AuthorizedKeysFile /root/ssh/authorized
PermitRootLogin prohibit-password
PidFile none
UsePAM no
Subsystem sftp internal-sftp
END
git init -q --bare /root/project.git
git clone -q /root/project.git /root/work 2>&1
cd /root/work
hostname > README
git add README
git -c user.name=lab -c user.email=lab@lab.example commit -q -m first
git push -q origin HEAD 2>&1
";

fn ssh() -> Result<()> {
    need(&[
        ("sshd", "openssh-server"),
        ("ssh", "openssh-client"),
        ("sftp", "openssh-client"),
        ("git", "git"),
        ("ssh-keygen", "openssh-client"),
    ])?;
    need_users()?;
    let site = Site::new()?;
    site.laptop.sh(
        "mkdir -m 700 /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 && cp /root/.ssh/id_ed25519.pub \
         /run/lab/key.pub && printf 'Host *\\n BatchMode yes\\n StrictHostKeyChecking accept-new\\n ConnectTimeout 10\\n' > \
         /root/.ssh/config && head -c 3000000 /dev/urandom > /root/photo",
    )?;
    let mut running = Vec::new();
    for machine in site.servers() {
        machine.sh(SSHD)?;
        running.push(machine.start("/usr/sbin/sshd -D -e -f /root/ssh/config")?);
        site.listens(machine, 22)?;
    }
    site.each("ssh root@HOST hostname", |target, said| said == target.machine)?;
    // Both ways, with a file that takes many packets.
    let sftp = "printf 'put /root/photo /root/photo\\nget /root/photo /root/back\\n' | sftp -q -b - root@URL > /root/sftp.log 2>&1 \
                || { cat /root/sftp.log; exit 1; }\ncmp /root/photo /root/back && rm /root/back && echo same";
    site.each(sftp, |_, said| said == "same")?;
    site.each(
        "rm -rf /root/clone && git clone -q ssh://root@URL/root/project.git /root/clone && cat /root/clone/README",
        |t, said| said == t.machine,
    )?;
    drop(running);
    Ok(())
}

const NGINX: &str = "
mkdir -p /root/web/pages /root/web/temp
hostname > /root/web/pages/index.html
cp /run/lab/large /root/web/pages/large
cat > /root/web/config <<END
daemon off;
user root;
pid /root/web/pid;
events {}
http {
  access_log off;
  client_body_temp_path /root/web/temp;
  proxy_temp_path /root/web/temp;
  fastcgi_temp_path /root/web/temp;
  uwsgi_temp_path /root/web/temp;
  scgi_temp_path /root/web/temp;
  server { listen 80; listen [::]:80; root /root/web/pages; }
}
END
";

fn http() -> Result<()> {
    need(&[("nginx", "nginx-light"), ("curl", "curl")])?;
    need_users()?;
    let site = Site::new()?;
    site.laptop.sh("head -c 8000000 /dev/urandom > /run/lab/large")?;
    let mut running = Vec::new();
    for machine in site.servers() {
        machine.sh(NGINX)?;
        running.push(machine.start("nginx -e stderr -p /root/web -c /root/web/config")?);
        site.listens(machine, 80)?;
    }
    site.each("curl -sS --max-time 20 http://URL/", |target, said| said == target.machine)?;
    site.each("curl -sS --max-time 50 http://URL/large | cmp - /run/lab/large && echo same", |_, said| said == "same")?;
    drop(running);
    Ok(())
}

const SMBD: &str = "
mkdir -p /root/smb/files
hostname > /root/smb/files/whose
cat > /root/smb/config <<END
[global]
  server role = standalone server
  workgroup = LAB
  disable netbios = yes
  smb ports = 445
  load printers = no
  printcap name = /dev/null
  pid directory = /root/smb
  lock directory = /root/smb
  state directory = /root/smb
  cache directory = /root/smb
  private dir = /root/smb
  ncalrpc dir = /root/smb/rpc
  log file = /root/smb/log
[files]
  path = /root/smb/files
  read only = no
END
printf 'secret\\nsecret\\n' | smbpasswd -c /root/smb/config -s -a root
";

fn smb() -> Result<()> {
    need(&[("smbd", "samba"), ("smbclient", "smbclient"), ("smbpasswd", "samba-common-bin")])?;
    need_users()?;
    let site = Site::new()?;
    site.laptop
        .sh("head -c 2000000 /dev/urandom > /root/photo && printf '[global]\\n workgroup = LAB\\n' > /root/smb.conf")?;
    let mut running = Vec::new();
    for machine in site.servers() {
        machine.sh(SMBD)?;
        running.push(machine.start("smbd --foreground --no-process-group --debug-stdout -s /root/smb/config")?);
        site.listens(machine, 445)?;
    }
    // A share is named by //HOST/NAME, which an IPv6 address cannot be part of.
    let open = "smbclient -s /root/smb.conf -t 20 -U root%secret //HOST/files -c";
    let by_name: Vec<&Target> = site.targets.iter().filter(|target| !target.is_ipv6()).collect();
    ensure(by_name.len() == 4, || "a target is missing".to_owned())?;
    for target in by_name {
        let script = format!(
            "{open} 'get whose /root/whose; put /root/photo photo; get photo /root/back' > /root/smb.log 2>&1 || {{ cat \
             /root/smb.log; exit 1; }}\ncmp /root/photo /root/back && cat /root/whose && rm /root/back /root/whose"
        );
        let said = site.laptop.sh(&script.replace("HOST", &target.host)).with_context(|| site.log(target))?;
        ensure(said.trim() == target.machine, || format!("{}: {said}", target.host))?;
    }
    drop(running);
    Ok(())
}

/// On box, port 53 of the mesh addresses is meshd's own.
const DNS_PORT: u16 = 5300;

fn dns() -> Result<()> {
    need(&[("dnsmasq", "dnsmasq-base"), ("dig", "bind9-dnsutils")])?;
    let site = Site::new()?;
    let mut running = Vec::new();
    for machine in site.servers() {
        // Longer than a packet: the answer to the text is truncated by UDP and asked again by TCP.
        let long: Vec<String> = (0..12).map(|n| format!("--txt-record=long.lan,{n}{}", "x".repeat(200))).collect();
        running.push(machine.start(&format!(
            "dnsmasq --no-daemon --conf-file=/dev/null --user=root --pid-file= --no-resolv --no-hosts --port={DNS_PORT} \
             --txt-record=whose.lan,{} --address=/printer.lan/192.168.22.9 {}",
            machine.name,
            long.join(" ")
        ))?);
        site.listens(machine, DNS_PORT)?;
    }
    let dig = format!("dig +short +time=5 +tries=2 -p {DNS_PORT} @HOST");
    site.each(&format!("{dig} whose.lan TXT"), |target, said| said == format!("\"{}\"", target.machine))?;
    site.each(&format!("{dig} printer.lan A"), |_, said| said == "192.168.22.9")?;
    site.each(&format!("{dig} +tcp printer.lan A"), |_, said| said == "192.168.22.9")?;
    site.each(&format!("{dig} long.lan TXT"), |_, said| said.lines().count() == 12)?;
    drop(running);
    Ok(())
}

fn datagrams() -> Result<()> {
    let site = Site::new()?;
    // At one address each: what has several may answer under another.
    for target in site.targets.iter().take(3) {
        let machine = if target.machine == "box" { &site.box_ } else { &site.nas };
        echo(&machine.namespace, SocketAddr::new(target.host.parse()?, 7))?;
    }
    for target in &site.targets {
        let resolved = site.laptop.sh(&format!("getent ahosts {}", target.host))?;
        let address: IpAddr = resolved.split_whitespace().next().context("it does not resolve")?.parse()?;
        let back = stream(&site.laptop.namespace, SocketAddr::new(address, 7), 500)?;
        ensure(back >= 499, || format!("{back} of 500 datagrams came back from {}", target.host))?;
        let said = site.laptop.sh(&format!("ping -c 5 -i 0.2 -W 2 -s 8000 {} || true", target.host))?;
        let seen = Icmp::parse(&said)?;
        println!(
            "    {}: {back} of 500 datagrams, {} of {} pings of 8000 bytes",
            target.host, seen.received, seen.sent
        );
        ensure(seen.received == seen.sent, || format!("{}: {said}", target.host))?;
    }
    Ok(())
}

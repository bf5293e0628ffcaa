//! Network namespaces, cables, bridges and NAT routers on this machine: an internet small enough to take along.
//!
//! The demonstration and the lab (`tests/lab`) build their topologies from these parts:
//!
//! ```text
//!   [host]──┐ lan bridge          wan ┌────────────┐
//!   [host]──┴──[router: nftables]─────┤            ├──[host with a public address]
//!   [host]─────[router]──[router]─────┤  internet  │
//!                (double NAT)         │   bridge   ├──[coordinator: two public addresses]
//!                                     └────────────┘
//! ```
//!
//! Everything lives inside the namespaces of [`mod@super::contain`], so nothing has to be removed afterwards.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The internet's IPv4 prefix, without the last number.
pub const INTERNET_V4: &str = "203.0.113";
/// The internet's IPv6 prefix, a /64.
pub const INTERNET_V6: &str = "2001:db8:0:0";

/// How long any command that is waited for may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// One network namespace. Cheap to clone; it stays until the surrounding mount namespace goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with its loopback up.
    ///
    /// # Errors
    /// If `ip netns add` fails.
    pub fn new(name: &str) -> Result<Self> {
        run(tool("ip").args(["netns", "add", name]))?;
        let made = Self { name: name.to_owned() };
        // Nobody else has our addresses; waiting a second to be sure of it helps no one. Fails without IPv6.
        for which in ["all", "default"] {
            let _ = made.sysctl(&format!("ipv6/conf/{which}/accept_dad"), "0");
        }
        made.ip("link set lo up")?;
        Ok(made)
    }

    /// Its name, as `ip netns exec` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside the namespace. Processes started there stay there; sockets opened there too.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(Path::new("/run/netns").join(&self.name))
            .with_context(|| format!("cannot open the namespace {}", self.name))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(work())
            });
            match inside.join() {
                Ok(done) => done.with_context(|| format!("cannot enter the namespace {}", self.name)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs a command inside and returns what it printed and how it ended. It is killed after [`COMMAND_LIMIT`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        self.enter(|| output(command))?
    }

    /// Runs a command inside and returns its standard output.
    ///
    /// # Errors
    /// If it cannot be started or fails; the error holds what it said.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        checked(command, |command| self.output(command))
    }

    /// Starts a command inside, in a process group of its own, its output going to `log`.
    ///
    /// # Errors
    /// If it cannot be started or the log cannot be written.
    pub fn spawn(&self, command: &mut Command, log: &Path) -> Result<Child> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        self.enter(|| command.spawn())?.with_context(|| format!("cannot start {}", show(command)))
    }

    /// `ip ARGS` inside.
    ///
    /// # Errors
    /// If it fails.
    pub fn ip(&self, args: &str) -> Result<String> {
        run(tool("ip").args(["-n", &self.name]).args(args.split_whitespace()))
    }

    /// Loads nftables rules inside, in addition to those there.
    ///
    /// # Errors
    /// If nft does not accept them.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let mut command = tool("nft");
        command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.enter(|| command.spawn())?.context("cannot run nft")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("nft in {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Sets `/proc/sys/net/KEY` inside.
    ///
    /// # Errors
    /// If there is no such setting.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys/net").join(key);
        self.enter(|| std::fs::write(&path, value))?.with_context(|| format!("cannot set {}", path.display()))
    }
}

/// How a router translates and filters. The words are those of RFC 4787.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// `masquerade`, the Linux default: endpoint-independent mapping that keeps the port, address-and-port-dependent
    /// filtering. Unasked packets to the router itself are dropped, as home routers do.
    Home,
    /// `masquerade fully-random`: another port for every destination. Cannot be punched when the other side filters.
    Symmetric,
    /// IPv4 as [`Nat::Home`], but unasked packets reach the router and are refused by ICMP: a Linux box with only a
    /// masquerade rule and no firewall.
    OpenInput,
}

impl Nat {
    fn rules(self) -> String {
        let masquerade = if self == Self::Symmetric { "masquerade fully-random" } else { "masquerade" };
        let input = if self == Self::OpenInput { "accept" } else { "drop" };
        format!(
            "table ip nat {{ chain post {{ type nat hook postrouting priority 100; oifname \"wan\" {masquerade}; }}\n }}\n\
             table inet fw {{\n\
               chain input {{ type filter hook input priority 0; policy accept;\n\
                 iifname \"wan\" ct state new meta l4proto {{ udp, tcp }} {input};\n }}\n\
               chain forward {{ type filter hook forward priority 0; policy drop;\n\
                 ct state established,related accept;\n iifname \"lan\" accept;\n }}\n\
             }}\n"
        )
    }
}

/// A link that several machines share: the internet, or the LAN of a router.
#[derive(Debug, Clone)]
pub struct Segment {
    namespace: Namespace,
    bridge: String,
    /// First three numbers of the /24.
    v4: String,
    /// First four groups of the /64.
    v6: String,
    /// Number of the router that leads away from here, if any.
    gateway: Option<u8>,
}

impl Segment {
    /// The internet: a bridge in a namespace of its own.
    ///
    /// # Errors
    /// If the namespace or the bridge cannot be made.
    pub fn internet() -> Result<Self> {
        let namespace = Namespace::new("inet")?;
        Self::bridge(namespace, "br0", INTERNET_V4.to_owned(), INTERNET_V6.to_owned(), None)
    }

    fn bridge(namespace: Namespace, bridge: &str, v4: String, v6: String, gateway: Option<u8>) -> Result<Self> {
        namespace.ip(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0"))?;
        namespace.ip(&format!("link set {bridge} up"))?;
        for family in ["iptables", "ip6tables"] {
            // Only there when the kernel has br_netfilter; then every new namespace starts with bridged NAT switched on.
            let _ = namespace.sysctl(&format!("bridge/bridge-nf-call-{family}"), "0");
        }
        Ok(Self { namespace, bridge: bridge.to_owned(), v4, v6, gateway })
    }

    /// The namespace that holds the bridge.
    #[must_use]
    pub const fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The bridge's interface.
    #[must_use]
    pub fn bridge_name(&self) -> &str {
        &self.bridge
    }

    /// The IPv4 address of machine `number` here.
    #[must_use]
    pub fn v4(&self, number: u8) -> String {
        format!("{}.{number}", self.v4)
    }

    /// The IPv6 address of machine `number` here.
    #[must_use]
    pub fn v6(&self, number: u8) -> String {
        format!("{}::{number}", self.v6)
    }

    /// Plugs a namespace in as `interface`, without addresses. Returns the name of the bridge's end of the cable.
    ///
    /// # Errors
    /// If the cable cannot be made.
    pub fn plug(&self, machine: &Namespace, interface: &str) -> Result<String> {
        let port = format!("p-{}", machine.name());
        let (from, to) = (machine.name(), self.namespace.name());
        run(tool("ip")
            .args(["link", "add", interface, "netns", from, "type", "veth", "peer", "name", &port, "netns", to]))?;
        self.namespace.ip(&format!("link set {port} master {} up", self.bridge))?;
        machine.ip(&format!("link set {interface} up"))?;
        Ok(port)
    }

    /// Gives the machine's interface the addresses of machine `number`, and the way out of here if there is one.
    ///
    /// # Errors
    /// If an address or route cannot be set.
    pub fn number(&self, machine: &Namespace, interface: &str, number: u8) -> Result<()> {
        machine.ip(&format!("addr add {}/24 dev {interface}", self.v4(number)))?;
        machine.ip(&format!("addr add {}/64 dev {interface} nodad", self.v6(number)))?;
        if let Some(gateway) = self.gateway {
            machine.ip(&format!("route add default via {}", self.v4(gateway)))?;
            machine.ip(&format!("-6 route add default via {}", self.v6(gateway)))?;
        }
        Ok(())
    }

    /// A machine here, with one interface `eth0`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn host(&self, name: &str, number: u8) -> Result<Namespace> {
        let machine = Namespace::new(name)?;
        self.plug(&machine, "eth0")?;
        self.number(&machine, "eth0", number)?;
        Ok(machine)
    }

    /// A router here, with a LAN `192.168.NUMBER.0/24` behind it.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn router(&self, name: &str, number: u8, nat: Nat) -> Result<Router> {
        self.router_with(name, number, &nat.rules())
    }

    /// The same with other nftables rules; its interfaces are `wan` and `lan`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn router_with(&self, name: &str, number: u8, rules: &str) -> Result<Router> {
        let namespace = Namespace::new(name)?;
        self.plug(&namespace, "wan")?;
        self.number(&namespace, "wan", number)?;
        namespace.sysctl("ipv4/ip_forward", "1")?;
        namespace.sysctl("ipv6/conf/all/forwarding", "1")?;
        let (v4, v6) = (format!("192.168.{number}"), format!("2001:db8:{number}:0"));
        let lan = Self::bridge(namespace.clone(), "lan", v4, v6, Some(1))?;
        namespace.ip(&format!("addr add {}/24 dev lan", lan.v4(1)))?;
        namespace.ip(&format!("addr add {}/64 dev lan nodad", lan.v6(1)))?;
        namespace.nft(rules)?;
        Ok(Router { namespace, lan })
    }
}

/// A router with one LAN.
#[derive(Debug, Clone)]
pub struct Router {
    /// Where its rules and its `wan` interface are.
    pub namespace: Namespace,
    /// What is behind it.
    pub lan: Segment,
}

/// The programs the parts above call, if any is not installed.
#[must_use]
pub fn missing_tools() -> Vec<&'static str> {
    ["ip", "nft"].into_iter().filter(|tool| find(tool).is_none()).collect()
}

/// A command for a system program, also where an ordinary user's `PATH` lacks the directories of such.
#[must_use]
pub fn tool(name: &str) -> Command {
    Command::new(find(name).unwrap_or_else(|| name.into()))
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    places.map(|place| place.join(tool)).find(|file| file.is_file())
}

fn run(command: &mut Command) -> Result<String> {
    checked(command, output)
}

fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("cannot run {}", show(command)))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let (done, wait) = mpsc::channel::<()>();
    let watchdog = std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        if wait.recv_timeout(COMMAND_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    })?;
    let output = child.wait_with_output()?;
    drop(done);
    let _ = watchdog.join();
    Ok(output)
}

fn checked(command: &mut Command, run: impl FnOnce(&mut Command) -> Result<Output>) -> Result<String> {
    let output = run(command)?;
    if !output.status.success() {
        let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        let said = String::from_utf8_lossy(&said);
        return Err(anyhow!("{} failed ({}): {}", show(command), output.status, said.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as a person would type it, with tokens left out.
fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| {
        let word = word.to_string_lossy();
        match word.as_ref() {
            super::contain::THIS_PROGRAM => "meshd".into(),
            token if token.starts_with("meshd-claim1-") || token.starts_with("meshd-invite1-") => "TOKEN".into(),
            _ => word,
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

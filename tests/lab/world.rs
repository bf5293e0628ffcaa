//! Machines with meshd on them, and what a case asks of them.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use meshd::cli::demo::contain::NOT_INHERITED;
use meshd::cli::demo::net::{Namespace, Segment};
use meshd::daemon::client;
use meshd::os::lock;
use meshd::wire::local::{PathKind, Pong, Status, StatusPeer};
use serde_json::Value;

/// Where state directories and logs are; a tmpfs that goes with the case.
const HOME: &str = "/run/lab";
/// The coordinator's URL.
pub const URL: &str = "https://203.0.113.10:8443";

/// A machine with meshd on it.
#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub namespace: Namespace,
    /// The program.
    pub binary: PathBuf,
}

impl Node {
    pub fn new(name: &str, namespace: Namespace) -> Self {
        Self { name: name.to_owned(), namespace, binary: env!("CARGO_BIN_EXE_meshd").into() }
    }

    pub fn state_dir(&self) -> PathBuf {
        Path::new(HOME).join(&self.name)
    }

    pub fn socket(&self) -> PathBuf {
        self.state_dir().join("meshd.sock")
    }

    /// `meshd --state-dir … ARGS`.
    pub fn meshd(&self, args: &[&str]) -> Command {
        let mut command = undisturbed(&self.binary, args);
        command.arg("--state-dir").arg(self.state_dir());
        command
    }

    /// Runs it; what it printed on standard output.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.namespace.run(&mut self.meshd(args)).with_context(|| format!("on {}", self.name))
    }

    /// Runs it; how it ended.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.namespace.output(&mut self.meshd(args))
    }

    /// Joins with a token.
    pub fn up(&self, token: &str) -> Result<String> {
        self.namespace
            .run(self.meshd(&["up", "--name", &self.name]).env("MESHD_TOKEN", token))
            .with_context(|| format!("on {}", self.name))
    }

    /// A new invite.
    pub fn invite(&self) -> Result<String> {
        Ok(self.run(&["invite"])?.trim().to_owned())
    }

    pub fn status(&self) -> Result<Status> {
        client::status(&self.socket()).map_err(|p| anyhow!("{}: {}", self.name, p.text))
    }

    pub fn peer(&self, name: &str) -> Result<StatusPeer> {
        let status = self.status()?;
        let found = status.peers.into_iter().find(|peer| peer.name == name);
        found.with_context(|| format!("{} does not list {name}", self.name))
    }

    pub fn path(&self, peer: &str) -> Result<PathKind> {
        Ok(self.peer(peer)?.path.kind)
    }

    /// Its first mesh address of a family.
    pub fn address(&self, v4: bool) -> Result<IpAddr> {
        let addresses = self.status()?.me.addresses;
        addresses.into_iter().find(|a| a.is_ipv4() == v4).with_context(|| format!("{} has no such address", self.name))
    }

    /// `meshd ping ARGS PEER`: the exit code and every answer.
    pub fn ping(&self, peer: &str, args: &[&str]) -> Result<(i32, Vec<Pong>)> {
        let output = self.output(&[&["ping", "--json"], args, &[peer]].concat())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let pongs = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Ok((output.status.code().unwrap_or(-1), pongs))
    }

    /// Pings until the path is direct.
    pub fn ping_until_direct(&self, peer: &str) -> Result<()> {
        let (code, pongs) = self.ping(peer, &["--until-direct", "--timeout", "10s", "--interval", "100ms"])?;
        if code != 0 {
            let why = self.peer(peer).ok().and_then(|peer| peer.path.reason);
            bail!("{} reaches {peer} with exit code {code}, reason {why:?}, answers {pongs:?}", self.name);
        }
        Ok(())
    }

    /// The daemon's process.
    pub fn pid(&self) -> Result<u32> {
        lock::holder(&self.state_dir().join("lock")).with_context(|| format!("no daemon runs on {}", self.name))
    }

    /// ICMP through the interface.
    pub fn icmp(&self, to: IpAddr, args: &[&str]) -> Result<Icmp> {
        let mut command = Command::new("ping");
        command.args(["-n"]).args(args).arg(to.to_string());
        let output = self.namespace.output(&mut command)?;
        Icmp::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// Starts ICMP through the interface; the child's output is in the returned file.
    pub fn start_icmp(&self, to: IpAddr, args: &[&str]) -> Result<(Child, PathBuf)> {
        let log = Path::new(HOME).join(format!("{}-ping-{}", self.name, fresh()));
        let mut command = Command::new("ping");
        command.args(["-n"]).args(args).arg(to.to_string());
        Ok((self.namespace.spawn(&mut command, &log)?, log))
    }
}

/// A number no one else in this process got.
fn fresh() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What `ping` summed up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Icmp {
    pub sent: u32,
    pub received: u32,
    /// Milliseconds.
    pub worst: f64,
}

impl Icmp {
    pub fn parse(text: &str) -> Result<Self> {
        let line =
            text.lines().find(|line| line.contains("packets transmitted")).with_context(|| format!("ping: {text}"))?;
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [sent, received, ..] = numbers.as_slice() else { bail!("ping: {line}") };
        let worst = text
            .lines()
            .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))
            .and_then(|line| line.split('/').nth(2)?.parse().ok())
            .unwrap_or(f64::INFINITY);
        Ok(Self { sent: *sent, received: *received, worst })
    }

    /// Waits for a `ping` started by [`Node::start_icmp`].
    pub fn wait((mut child, log): (Child, PathBuf), limit: Duration) -> Result<Self> {
        until("ping ends", limit, || Ok(child.try_wait()?.is_some().then_some(())))?;
        Self::parse(&fs::read_to_string(log)?)
    }
}

/// A coordinator on its own machine.
#[derive(Debug)]
pub struct Coordinator {
    pub node: Node,
    process: Child,
    port: u16,
    args: Vec<String>,
}

impl Coordinator {
    /// Starts one at 203.0.113.10, with .11 as its second address for STUN.
    pub fn start(internet: &Segment) -> Result<Self> {
        Self::start_at(internet, URL)
    }

    /// The same under another URL.
    pub fn start_at(internet: &Segment, url: &str) -> Result<Self> {
        Self::start_listening(internet, url, 8443)
    }

    /// The same on another TCP port.
    pub fn start_listening(internet: &Segment, url: &str, port: u16) -> Result<Self> {
        let namespace = internet.host("coord", 10)?;
        namespace.ip(&format!("addr add {}/24 dev eth0", internet.v4(11)))?;
        namespace.ip(&format!("addr add {}/64 dev eth0 nodad", internet.v6(11)))?;
        // RFC 5780: two addresses with two ports each, or filtering behaviour cannot be told.
        let (first, second) = ((internet.v4(10), internet.v6(10)), (internet.v4(11), internet.v6(11)));
        let addresses = [first, second].map(|(v4, v6)| format!("{v4}:3478,{v4}:3479,[{v6}]:3478,[{v6}]:3479"));
        let args = ["--public-url", url, "--stun-listen", &addresses.join(",")];
        Self::start_with(Node::new("coord", namespace), port, &args)
    }

    pub fn start_on(node: Node, args: &[&str]) -> Result<Self> {
        Self::start_with(node, 8443, args)
    }

    /// On a TCP port, with nothing but these arguments.
    pub fn start_with(node: Node, port: u16, args: &[&str]) -> Result<Self> {
        fs::create_dir_all(HOME)?;
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let process = Self::spawn(&node, port, &args)?;
        let mut coordinator = Self { node, process, port, args };
        coordinator.wait()?;
        Ok(coordinator)
    }

    fn spawn(node: &Node, port: u16, args: &[String]) -> Result<Child> {
        let mut command = node.meshd(&["coordinator", "--listen", &format!("[::]:{port}")]);
        command.args(args);
        node.namespace.spawn(&mut command, &Path::new(HOME).join("coordinator.log"))
    }

    /// Until it answers on TCP.
    fn wait(&mut self) -> Result<()> {
        until("the coordinator listens", Duration::from_secs(15), || {
            if let Some(status) = self.process.try_wait()? {
                bail!("the coordinator ended ({status})");
            }
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], self.port));
            let limit = Duration::from_secs(1);
            let connected = self.node.namespace.enter(|| std::net::TcpStream::connect_timeout(&address, limit))?;
            Ok(connected.ok().map(drop))
        })
    }

    pub fn claim(&self) -> Result<String> {
        Ok(self.node.run(&["coordinator", "claim"])?.trim().to_owned())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Starts it again after [`Coordinator::kill`].
    pub fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.node, self.port, &self.args)?;
        self.wait()
    }
}

/// An internet, a coordinator, and machines that are up in one network, the first being its founder.
pub struct World {
    pub internet: Segment,
    pub coordinator: Coordinator,
}

impl World {
    pub fn new() -> Result<Self> {
        let internet = Segment::internet()?;
        let coordinator = Coordinator::start(&internet)?;
        Ok(Self { internet, coordinator })
    }

    /// Brings the machines up in one network.
    pub fn join(&self, machines: &[(&str, &Namespace)]) -> Result<Vec<Node>> {
        let nodes = machines.iter().map(|(name, namespace)| Node::new(name, (*namespace).clone()));
        self.join_as(nodes.collect())
    }

    /// The same for many, which come up at the same time.
    pub fn join_at_once(&self, nodes: &[&Node]) -> Result<()> {
        let (first, others) = nodes.split_first().context("a network needs a machine")?;
        first.up(&self.coordinator.claim()?)?;
        let invites: Vec<String> = others.iter().map(|_| first.invite()).collect::<Result<_>>()?;
        std::thread::scope(|scope| {
            let up = others.iter().zip(&invites).map(|(node, invite)| scope.spawn(|| node.up(invite)));
            let joining: Vec<_> = up.collect();
            joining.into_iter().try_for_each(|node| node.join().map_err(|_| anyhow!("a thread panicked"))?.map(drop))
        })?;
        nodes.iter().try_for_each(|node| wait_for_peers(node, others.len()))
    }

    /// The same for nodes that are special in some way.
    pub fn join_as(&self, nodes: Vec<Node>) -> Result<Vec<Node>> {
        let (first, others) = nodes.split_first().context("a network needs a machine")?;
        first.up(&self.coordinator.claim()?)?;
        for node in others {
            node.up(&first.invite()?)?;
        }
        for node in &nodes {
            wait_for_peers(node, nodes.len() - 1)?;
        }
        Ok(nodes)
    }
}

/// Waits until a node knows so many others.
pub fn wait_for_peers(node: &Node, count: usize) -> Result<()> {
    until(&format!("{} knows {count} peers", node.name), Duration::from_secs(10), || {
        Ok((node.status()?.peers.len() >= count).then_some(()))
    })
}

/// `meshd ARGS` without a state directory.
pub fn plain(args: &[&str]) -> Command {
    undisturbed(env!("CARGO_BIN_EXE_meshd").as_ref(), args)
}

/// A command untouched by the settings of the person who runs the tests.
fn undisturbed(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    inherit_nothing(&mut command);
    command.env("MESHD_LOG", std::env::var("MESHD_LAB_LOG").unwrap_or_else(|_| "info".to_owned()));
    command
}

/// Takes away what a command would inherit from the surroundings of the test.
pub fn inherit_nothing(command: &mut Command) {
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
}

/// Tries every 20 ms until there is an answer, and fails with the name of what did not happen.
pub fn until<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {:.1} s in vain until {what}", limit.as_secs_f64());
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The same for something that is allowed to fail until then.
pub fn eventually<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waited {:.1} s in vain until {what}", limit.as_secs_f64())));
            }
            Err(_) => std::thread::park_timeout(Duration::from_millis(20)),
        }
    }
}

/// Lets time pass: for what must happen, or must not, while nobody does anything.
pub fn let_pass(time: Duration) {
    std::thread::sleep(time);
}

/// Says no to what was expected.
pub fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(anyhow!(otherwise())) }
}

/// The `error` of a document printed by a command that failed with `--json`.
pub fn error_of(output: &Output) -> Result<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&output.stderr)))?;
    let document: Value = serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))?;
    document.get("error").cloned().with_context(|| format!("no error in {line}"))
}

/// The end of every log, for a case that failed. They are gone with its namespaces.
pub fn print_logs() {
    let mut logs: Vec<PathBuf> = vec![Path::new(HOME).join("coordinator.log")];
    if let Ok(entries) = fs::read_dir(HOME) {
        for entry in entries.filter_map(Result::ok) {
            logs.extend(["meshd.log", "meshd/meshd.log"].map(|log| entry.path().join(log)));
        }
    }
    for log in logs {
        let Ok(text) = fs::read_to_string(&log) else { continue };
        let lines: Vec<&str> = text.lines().collect();
        println!("\n{} (last of {} lines):", log.display(), lines.len());
        for line in lines.iter().skip(lines.len().saturating_sub(30)) {
            println!("  {line}");
        }
        if let Ok(keep) = std::env::var("MESHD_LAB_KEEP_LOGS") {
            let name = log.display().to_string().replace('/', "_");
            let _ = fs::create_dir_all(&keep).and_then(|()| fs::write(Path::new(&keep).join(name), &text));
        }
    }
}

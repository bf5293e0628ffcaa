//! Has the system's programs ask us for names, in the gentlest way the machine offers:
//!
//! 1. systemd-resolved, where the system asks it: questions about our zone, and about names and domains that an admin typed, go
//!    to us, by our interface, and nothing else does.
//! 2. resolvconf, where it makes `/etc/resolv.conf`: our server among the others.
//! 3. `/etc/resolv.conf` itself, with what was there kept.
//!
//! With 2 and 3 all questions come to us first, and those that are not ours go on to the servers of before. These stay in
//! the file, so a machine whose daemon was killed has names as before.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime};
use std::{env, fs};

use nix::net::if_::if_nametoindex;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use crate::daemon::footprint::{Change, Journal};
use crate::daemon::names::resolv_conf::{self, Before, PATH};
use crate::daemon::problem;
use crate::engine::names::Zone;
use crate::wire::local::Problem;

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Our entry in resolvconf: entries of the loopback interface come first, in Debian's resolvconf and in openresolv.
pub(in crate::daemon) const ENTRY: &str = "lo.meshd";
/// The most domains that systemd-resolved is given: it takes 256 for an interface (`LINK_SEARCH_DOMAINS_MAX`).
const ROUTED: usize = 200;
/// Where systemd-resolved names the servers that it asks itself (systemd-resolved.service(8)).
const UPLINKS: &str = "/run/systemd/resolve/resolv.conf";
/// Where systemd-resolved keeps what it was told about an interface, in a file by the interface's number.
const KEPT: &str = "/run/systemd/resolve/netif";
/// systemd-resolved's address for the system.
const STUB: &str = "127.0.0.53";

/// How the system is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Resolved,
    Resolvconf,
    File,
}

/// The system's settings for names.
pub(super) struct System {
    interface: String,
    domain: String,
    reverse: Vec<String>,
    /// What else systemd-resolved is to ask us about.
    routed: Vec<String>,
    addresses: Vec<IpAddr>,
    local: Option<Ipv4Addr>,
    journal: Journal,
    set: Option<Way>,
    told: Option<Told>,
}

/// What systemd-resolved was told, and since when it has kept it: as long as both are the same it need not be told again.
#[derive(PartialEq, Eq)]
struct Told {
    calls: [Vec<String>; 3],
    kept: SystemTime,
}

impl System {
    /// `addresses` and `local` are where we answer.
    pub(super) fn new(
        interface: &str,
        zone: &Zone,
        addresses: Vec<IpAddr>,
        local: Option<Ipv4Addr>,
        journal: Journal,
    ) -> Self {
        let (domain, reverse) = (zone.domain(), zone.reverse_domains());
        Self {
            interface: interface.to_owned(),
            domain,
            reverse,
            routed: Vec::new(),
            addresses,
            local,
            journal,
            set: None,
            told: None,
        }
    }

    /// What the system is to ask us about besides the network's own names.
    pub(super) fn ask_for(&mut self, zone: &Zone) {
        self.routed = zone.routing_domains(ROUTED);
    }

    /// Where questions about other names are to go: the servers of before, if the system asks us for everything.
    pub(super) fn upstream(&self) -> Vec<IpAddr> {
        match self.set {
            Some(Way::Resolvconf | Way::File) => resolv_conf::servers(&resolv_conf::text(Path::new(PATH)), self.local),
            // It asks us about names that an admin typed and all that is below them, which is not ours.
            Some(Way::Resolved) => {
                let mut servers = resolv_conf::servers(&resolv_conf::text(Path::new(UPLINKS)), self.local);
                servers.retain(|server| !self.addresses.contains(server) && server.to_string() != STUB);
                servers
            }
            None => Vec::new(),
        }
    }

    /// Sets the system up, or not; done again it repairs what others have changed.
    ///
    /// # Errors
    /// The system cannot be set up; names are answered to those who ask us all the same.
    pub(super) async fn settle(&mut self, wanted: bool) -> Result<(), Problem> {
        if !wanted {
            self.undo().await;
            return Ok(());
        }
        let Some(way) = self.way()? else { return Ok(()) };
        if self.set.is_some_and(|set| set != way) {
            self.undo().await;
        }
        let first = self.set.is_none();
        match way {
            Way::Resolved => self.by_resolved().await?,
            Way::Resolvconf => self.by_resolvconf().await?,
            Way::File => self.by_file()?,
        }
        self.set = Some(way);
        if first {
            tracing::info!(domain = self.domain, ?way, "this machine asks meshd for names");
        }
        Ok(())
    }

    /// `None`: the system's settings are none of this daemon's business.
    fn way(&self) -> Result<Option<Way>, Problem> {
        let by_hand = || {
            let at = self.addresses.first().map_or_else(String::new, ToString::to_string);
            format!("names are answered at {at}: ask there for {}", self.domain)
        };
        if self.addresses.is_empty() {
            return Err(problem("names-system", "this machine cannot resolve names of nodes", "addresses work"));
        }
        if !is_for_this_namespace() {
            tracing::debug!("{PATH} belongs to another network namespace and is left alone; {}", by_hand());
            return Ok(None);
        }
        let text = resolv_conf::text(Path::new(PATH));
        if self.set == Some(Way::File) && resolv_conf::is_ours(&text) {
            return Ok(Some(Way::File));
        }
        if text.lines().any(|line| line.split_whitespace().eq(["nameserver", STUB])) && has_program("resolvectl") {
            return Ok(Some(Way::Resolved));
        }
        let made_by_resolvconf = fs::read_link(PATH)
            .is_ok_and(|target| target.to_string_lossy().contains("resolvconf"))
            || text.lines().take_while(|line| line.starts_with('#')).any(|line| line.contains("resolvconf"));
        if self.local.is_none() {
            let text = format!("this machine's resolver cannot be set up: 127.0.0.0/8 port 53 is taken ({STUB} aside)");
            return Err(problem("names-system", text, by_hand()));
        }
        Ok(Some(if made_by_resolvconf && has_program("resolvconf") { Way::Resolvconf } else { Way::File }))
    }

    /// What is set so goes with the interface.
    async fn by_resolved(&mut self) -> Result<(), Problem> {
        let call = |verb: &str, words: Vec<String>| [vec![verb.to_owned(), self.interface.clone()], words].concat();
        let routed = self.reverse.iter().chain(&self.routed).map(|name| format!("~{name}"));
        let calls = [
            call("dns", self.addresses.iter().map(ToString::to_string).collect()),
            call("domain", [self.domain.clone()].into_iter().chain(routed).collect()),
            call("default-route", vec!["false".to_owned()]),
        ];
        let told = self.kept_since().map(|kept| Told { calls: calls.clone(), kept });
        if told.is_some() && told == self.told {
            return Ok(());
        }
        for call in &calls {
            run("resolvectl", &call.iter().map(String::as_str).collect::<Vec<_>>(), "").await?;
        }
        self.told = self.kept_since().map(|kept| Told { calls, kept });
        Ok(())
    }

    /// `None`: it keeps nothing, or not there.
    fn kept_since(&self) -> Option<SystemTime> {
        let index = if_nametoindex(self.interface.as_str()).ok()?;
        fs::metadata(Path::new(KEPT).join(index.to_string())).ok()?.modified().ok()
    }

    async fn by_resolvconf(&self) -> Result<(), Problem> {
        let Some(local) = self.local else { return Ok(()) };
        let text = resolv_conf::text(Path::new(PATH));
        if resolv_conf::servers(&text, None).contains(&IpAddr::V4(local)) {
            return Ok(());
        }
        self.journal.about_to(&Change::ResolvconfEntry { entry: ENTRY.to_owned() })?;
        run("resolvconf", &["-a", ENTRY], &format!("nameserver {local}\nsearch {}\n", self.domain)).await
    }

    fn by_file(&self) -> Result<(), Problem> {
        let Some(local) = self.local else { return Ok(()) };
        let path = Path::new(PATH);
        let failed = |e: std::io::Error| {
            let hint =
                format!("add `nameserver {local}` and `search {}` to it, or make it writable for meshd", self.domain);
            problem("names-system", format!("{PATH} cannot be changed: {e}"), hint)
        };
        let now = resolv_conf::text(path);
        if resolv_conf::is_ours(&now) {
            return Ok(());
        }
        // A DHCP client has written it anew: that is now what was there before.
        for change in self.journal.changes().iter().filter(|change| matches!(change, Change::ResolvConfFile { .. })) {
            self.journal.undone(change);
        }
        let before = resolv_conf::look(path).map_err(failed)?;
        self.journal.about_to(&Change::ResolvConfFile { path: path.to_owned(), before })?;
        resolv_conf::put(path, &resolv_conf::with_ours(&now, local, &self.domain)).map_err(failed)
    }

    async fn undo(&mut self) {
        self.told = None;
        match self.set.take() {
            Some(Way::Resolved) => {
                if let Err(why) = run("resolvectl", &["revert", &self.interface], "").await {
                    tracing::warn!(code = why.code, "{}", why.text);
                }
            }
            Some(Way::Resolvconf | Way::File) => {
                for change in self.journal.changes() {
                    let undone = match &change {
                        Change::ResolvconfEntry { entry } => remove_entry(entry).await,
                        Change::ResolvConfFile { path, before } => put_back(path, before),
                        _ => continue,
                    };
                    match undone {
                        Ok(()) => self.journal.undone(&change),
                        Err(why) => tracing::warn!(code = why.code, "{}", why.text),
                    }
                }
            }
            None => {}
        }
    }
}

/// Takes our entry out of resolvconf; without resolvconf there is none.
///
/// # Errors
/// It refuses.
pub(in crate::daemon) async fn remove_entry(entry: &str) -> Result<(), Problem> {
    if !has_program("resolvconf") {
        return Ok(());
    }
    run("resolvconf", &["-f", "-d", entry], "").await
}

/// Puts back what was at `path`, unless somebody else has changed it since.
///
/// # Errors
/// The file system refuses.
pub(in crate::daemon) fn put_back(path: &Path, before: &Before) -> Result<(), Problem> {
    resolv_conf::put_back(path, before).map_err(|e| {
        let text = format!("{} cannot be put back as it was: {e}", path.display());
        problem("names-system", text, "what was there is in `meshd footprint --json`")
    })
}

/// `/etc/resolv.conf` is for the network this process is in: it is a mount of its own (as `ip netns exec` makes), or the network
/// is that of the first process, or it is the service that a package installed.
fn is_for_this_namespace() -> bool {
    let mounted = fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|mounts| mounts.lines().any(|line| line.split_whitespace().nth(4) == Some(PATH)));
    let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    mounted
        || env::var_os("MESHD_SERVICE").is_some()
        || network("1").is_some_and(|first| Some(first) == network("self"))
}

fn has_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(name).is_file())
}

/// Runs a program with `input` and waits until it ends.
async fn run(program: &str, args: &[&str], input: &str) -> Result<(), Problem> {
    let failed = |why: String| {
        problem(
            "names-system",
            format!("`{program} {}` failed: {why}", args.join(" ")),
            "try it by hand; the log says more",
        )
    };
    let shown = |e: std::io::Error| failed(e.to_string());
    let mut child = Command::new(program)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(shown)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read says why on its standard error.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = timeout(PATIENCE, child.wait_with_output())
        .await
        .map_err(|_| failed(format!("no end after {PATIENCE:?}")))?
        .map_err(shown)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(said.lines().next().map_or_else(|| output.status.to_string(), str::to_owned)))
}

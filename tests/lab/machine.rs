//! A machine with more of its own than its network: host name, `/etc/hosts`, `/etc/resolv.conf`, `/etc/default`, root's home,
//! and the directories where meshd keeps its things when nobody says otherwise. So what a person types there can be run as it
//! stands.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use meshd::cli::demo::net::{COMMAND_LIMIT, Namespace};

use crate::runner::skip;
use crate::world::inherit_nothing;

/// Where the machines' files are; a tmpfs that goes with the case.
const HOME: &str = "/run/lab";
/// Programs that only machines here have.
const BIN: &str = "/run/lab/bin";

/// The mounts, made by a process that then holds them as long as the case lasts. The program and the packaging may lie below a
/// directory that is covered, so they come first.
const FURNISH: &str = r#"
mount --bind "$MESHD" /run/lab/bin/meshd
mount -t tmpfs -o mode=755 tmpfs /var/lib
for name in meshd meshd-coordinator; do
  mkdir -p /var/lib/$name "$FILES/$name"
  mount --bind "$FILES/$name" /var/lib/$name
done
mkdir -p /run/meshd /run/sshd
mount -t tmpfs -o mode=755 tmpfs /run/meshd
mount --bind "$FILES/default" /etc/default
mount --bind "$FILES/hosts" /etc/hosts
mount --bind "$FILES/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o mode=700 tmpfs /root
hostname "$NAME"
echo ready
exec sleep infinity
"#;

/// What stands for the service manager: starts a unit of ours as its `ExecStart` says and returns when it listens, or stops it. The units
/// themselves run under a real one in `scripts/package-test`.
const SYSTEMCTL: &str = r#"#!/bin/sh
for unit; do :; done
if [ "$1" = stop ]; then
  kill "$(cat "/run/lab/$unit.pid")"
  for attempt in $(seq 200); do
    ss -ltn | grep -q ':443 ' || exit 0
    sleep 0.05
  done
  exit 1
fi
. "/etc/default/$unit"
(eval "exec setsid $(sed -n 's,^ExecStart=/usr/bin/,,p' "/run/lab/units/$unit.service")") >"/run/lab/coordinator.log" 2>&1 &
echo $! >"/run/lab/$unit.pid"
for attempt in $(seq 200); do
  ss -ltn | grep -q ':443 ' && exit 0
  sleep 0.05
done
echo "$unit does not listen" >&2
exit 1
"#;

/// Such a machine. It lasts as long as the case.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub namespace: Namespace,
    keeper: Child,
}

impl Machine {
    /// Furnishes the machine `namespace`, which knows other hosts by these lines of `/etc/hosts`.
    pub fn new(name: &str, namespace: Namespace, hosts: &str) -> Result<Self> {
        prepare()?;
        let files = Path::new(HOME).join(format!("files-{name}"));
        fs::create_dir_all(files.join("default"))?;
        fs::write(files.join("hosts"), format!("127.0.0.1 localhost\n{hosts}"))?;
        fs::write(files.join("resolv.conf"), "# none\n")?;
        for service in ["meshd", "meshd-coordinator"] {
            fs::copy(packaging().join("default").join(service), files.join("default").join(service))?;
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--", "sh", "-euc", FURNISH]);
        command.env("FILES", &files).env("NAME", name).env("MESHD", env!("CARGO_BIN_EXE_meshd"));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut keeper = namespace.enter(|| command.spawn())??;
        let mut said = String::new();
        BufReader::new(keeper.stdout.take().context("no output")?).read_line(&mut said)?;
        if said.trim() != "ready" {
            bail!("{name} cannot be furnished: {}", keeper.wait()?);
        }
        Ok(Self { name: name.to_owned(), namespace, keeper })
    }

    /// Where its directories are, as the case sees them.
    pub fn files(&self) -> PathBuf {
        Path::new(HOME).join(format!("files-{}", self.name))
    }

    /// `PREFIX sh -euc SCRIPT` as root of this machine.
    fn command(&self, prefix: &[&str], script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--uts", "--target", &self.keeper.id().to_string(), "--"]);
        command.args(prefix).args(["sh", "-euc", script]);
        inherit_nothing(&mut command);
        command.env("PATH", format!("{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
        command.env("HOME", "/root").env("MESHD_LOG", "info").current_dir("/");
        command
    }

    /// Runs a script; how it ended.
    pub fn output(&self, script: &str) -> Result<Output> {
        self.namespace.output(&mut self.command(&[], script))
    }

    /// Runs a script; what it printed on standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.sh_within(script, COMMAND_LIMIT)
    }

    /// The same; it is ended and has failed after `limit`.
    pub fn sh_within(&self, script: &str, limit: Duration) -> Result<String> {
        let seconds = limit.as_secs().to_string();
        let output = self.namespace.output(&mut self.command(&["timeout", &seconds], script))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(anyhow!("on {}: {script}: {}\n{text}{said}", self.name, output.status))
    }

    /// Starts a program that stays.
    pub fn start(&self, script: &str) -> Result<Child> {
        let mut command = self.command(&[], &format!("exec {script}"));
        self.namespace.spawn(&mut command, &Path::new(HOME).join(format!("{}.log", self.name)))
    }

    /// What programs started there have said.
    pub fn log(&self) -> String {
        fs::read_to_string(Path::new(HOME).join(format!("{}.log", self.name))).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging")
}

/// The programs every machine here has. Being root already, `sudo` has nothing to do.
fn prepare() -> Result<()> {
    fs::create_dir_all(BIN)?;
    fs::create_dir_all("/run/lab/units")?;
    fs::write(Path::new(BIN).join("meshd"), "")?;
    for (name, text) in [("sudo", "#!/bin/sh\nexec \"$@\"\n"), ("systemctl", SYSTEMCTL)] {
        let file = Path::new(BIN).join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, Permissions::from_mode(0o755))?;
    }
    for entry in fs::read_dir(packaging().join("systemd"))? {
        let entry = entry?;
        fs::copy(entry.path(), Path::new("/run/lab/units").join(entry.file_name()))?;
    }
    Ok(())
}

/// Leaves the case out unless these programs are there: each with its Debian package.
pub fn need(programs: &[(&str, &str)]) -> Result<()> {
    let found =
        |program: &str| ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().any(|d| Path::new(d).join(program).is_file());
    let missing: Vec<_> = programs.iter().filter(|(program, _)| !found(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    skip(format!("{} not installed (apt-get install {})", names.join(" and "), packages.join(" ")))
}

/// Leaves the case out where there is only one user: servers that change to another cannot start there.
pub fn need_users() -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    if map.split_whitespace().nth(2) == Some("1") {
        return skip("a server that gives up its rights needs more than this run's one user: run the lab as root");
    }
    Ok(())
}

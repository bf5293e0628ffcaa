//! A box for the network on one machine: user (unless root), mount, network and process namespaces of its own.
//!
//! Three processes:
//!
//! ```text
//!   outside        what the person started; waits, and takes the box with it when it ends, however it ends
//!   └─ init        first process of the new process namespace; reaps; when it ends the kernel kills all others
//!      └─ inside   does the work; its daemons become children of init
//! ```
//!
//! Nothing has to be cleaned up: interfaces, rules, mounts and processes go when init goes, and the kernel kills init
//! when `outside` is gone, be it by Ctrl-C or SIGKILL. Only [`After::Keep`] breaks that tie.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdout, getgid, getuid, setsid};

/// The environment variable that says which of the three processes this is.
const ROLE: &str = "MESHD_CONTAINED";

/// Environment variables that programs started inside must not inherit: the settings of the person who started it all.
pub const NOT_INHERITED: [&str; 12] = [
    ROLE,
    "MESHD_STATE_DIR",
    "MESHD_COORDINATOR_STATE_DIR",
    "MESHD_SOCKET",
    "MESHD_TOKEN",
    "MESHD_PROXY",
    "NO_PROXY",
    "no_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Names the program of the process that starts another, wherever its file is and whatever is mounted over that.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";

/// What happens to the box when the work inside is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It goes.
    Discard,
    /// It stays if the work succeeded, until its init process is told to end.
    Keep,
}

/// What became of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit code of the process inside.
    pub code: u8,
    /// The init process of a box that was kept.
    pub kept: Option<u32>,
}

/// In the process inside, where the work is to be done: nothing. In the one outside: runs this same program again inside
/// a new box and returns how that ended.
///
/// Must be called before the process starts any thread.
///
/// # Errors
/// If the system does not allow a box; the error says what is missing.
pub fn contain(after: After) -> Result<Option<Ended>> {
    match std::env::var(ROLE).as_deref() {
        Ok("inside") => Ok(None),
        Ok("init") => init(after),
        _ => outside().map(Some),
    }
}

fn outside() -> Result<Ended> {
    let (uid, gid) = (getuid(), getgid());
    // Mounts and network are init's own business: this process keeps seeing the outside.
    let mut flags = CloneFlags::CLONE_NEWPID;
    // Root in a container may lack the capability; then a user namespace is worth a try.
    if !uid.is_root() || unshare(flags).is_err() {
        flags |= CloneFlags::CLONE_NEWUSER;
        unshare(flags).map_err(explain)?;
        fs::write("/proc/self/setgroups", "deny").context("cannot write /proc/self/setgroups")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("cannot map the user id")?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1")).context("cannot map the group id")?;
    }
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = again("init").stdin(OwnedFd::from(theirs)).spawn().context("cannot start a second process")?;
    // Init writes its exit code when the box stays; when it ends, the socket closes without a word.
    let mut code = [0];
    if ours.read(&mut code)? == 1 {
        return Ok(Ended { code: code[0], kept: Some(child.id()) });
    }
    let status = child.wait()?;
    Ok(Ended { code: status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1), kept: None })
}

fn explain(error: Errno) -> anyhow::Error {
    let why = match error {
        Errno::EPERM => "the system does not let this user make namespaces",
        Errno::ENOSPC => "no more namespaces are allowed (/proc/sys/user/max_user_namespaces)",
        Errno::EINVAL | Errno::ENOSYS => "this kernel has no user namespaces",
        _ => return anyhow::anyhow!("cannot make namespaces: {}", error.desc()),
    };
    anyhow::anyhow!("{why} ({})", error.desc())
}

/// This program again, with the same arguments, in another role.
fn again(role: &str) -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    command.arg0(std::env::args_os().next().unwrap_or_else(|| "meshd".into()));
    command.args(std::env::args_os().skip(1)).env(ROLE, role);
    command
}

fn init(after: After) -> Result<Option<Ended>> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).map_err(explain)?;
    furnish()?;
    let child = again("inside").stdin(Stdio::null()).spawn().context("cannot start the process inside")?;
    let child = Pid::from_raw(i32::try_from(child.id())?);
    // Blocked only now, because a new process inherits what is blocked.
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGCHLD);
    wanted.add(Signal::SIGTERM);
    wanted.thread_block()?;
    let code = loop {
        if let Some(code) = reap(child) {
            break code;
        }
        if wanted.wait()? == Signal::SIGTERM {
            bail!("stopped");
        }
    };
    if after == After::Keep && code == 0 {
        prctl::set_pdeathsig(None)?;
        setsid().context("cannot leave the terminal")?;
        // Whoever reads the output waits for its end.
        let nowhere = File::options().write(true).open("/dev/null")?;
        dup2_stdout(&nowhere)?;
        dup2_stderr(&nowhere)?;
        let mut outside = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        outside.write_all(&[code])?;
        outside.shutdown(std::net::Shutdown::Both)?;
        while wanted.wait()? != Signal::SIGTERM {
            reap(child);
        }
    }
    Ok(Some(Ended { code, kept: None }))
}

/// Takes leave of everything that ended; the exit code of `child` if that was among it.
fn reap(child: Pid) -> Option<u8> {
    let mut code = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == child => code = Some(u8::try_from(status).unwrap_or(1)),
            Ok(WaitStatus::Signaled(pid, ..)) if pid == child => code = Some(1),
            Ok(WaitStatus::StillAlive) | Err(_) => return code,
            Ok(_) => {}
        }
    }
}

/// Private mounts: an own `/run` for `ip netns` and for our files, `/proc` and `/sys` of the new namespaces.
fn furnish() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make the mounts private")?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("cannot mount a /run")?;
    // Containers may forbid these two; then a few tools inside show the outside's processes and interfaces.
    let _ = mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none);
    let _ = mount(Some("sys"), "/sys", Some("sysfs"), MsFlags::empty(), none);
    Ok(())
}

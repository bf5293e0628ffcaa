//! Processes: the daemon that outlives the command which started it, and who is at the other end of a unix socket.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, geteuid};

/// Makes the child the leader of a session of its own, so that it gets no signals of the caller's terminal.
pub fn in_new_session(command: &mut Command) -> &mut Command {
    #[expect(unsafe_code, reason = "std offers no other way to run setsid between fork and exec")]
    // SAFETY: the closure runs in the child after fork and before exec, where only async-signal-safe functions may be
    // called; setsid(2) is one, and building an io::Error from an errno does not allocate.
    unsafe {
        command
            .pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(|errno| io::Error::from_raw_os_error(errno as i32)))
    }
}

/// Names the first thread, and with it the process, `meshd`, also when it was started as `/proc/self/exe`.
pub fn name_main_thread() {
    // Only a name that is no C string could fail.
    let _ = nix::sys::prctl::set_name(c"meshd");
}

/// This process's effective user.
#[must_use]
pub fn effective_uid() -> u32 {
    geteuid().as_raw()
}

/// A process with this number exists.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(|pid| !matches!(kill(Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH)))
}

/// Asks a process to end (SIGTERM).
///
/// # Errors
/// It is gone, or not ours.
pub fn terminate(pid: u32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    Ok(kill(Pid::from_raw(pid), Signal::SIGTERM)?)
}

/// Ends a process group: asks it to (SIGTERM), or does not ask (SIGKILL). One that is gone has ended.
pub fn end_group(leader: u32, at_once: bool) {
    if let Ok(leader) = i32::try_from(leader)
        && leader > 1
    {
        let _ = killpg(Pid::from_raw(leader), if at_once { Signal::SIGKILL } else { Signal::SIGTERM });
    }
}

/// Lets this process open as many descriptors as the system allows it to. Returns how many that are.
///
/// # Errors
/// The system does not say, or refuses; the limit is as before.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many descriptors this process may open.
///
/// # Errors
/// The system does not say.
pub fn descriptor_limit() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// The machine's host name, as the kernel has it.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_leads_a_session_of_its_own() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "cut -d' ' -f1,6 /proc/$$/stat"]);
        let output = in_new_session(&mut command).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (pid, session) = text.trim().split_once(' ').unwrap();
        assert_eq!(pid, session);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}

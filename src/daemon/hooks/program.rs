//! One call of a person's program: an event on its standard input, an end in time.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::daemon::problem;
use crate::os::process;
use crate::wire::hook::HookEvent;
use crate::wire::local::Problem;

/// All the program finds in its environment.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long one that is asked to end may take over it.
const GRACE: Duration = Duration::from_secs(1);

/// Refuses what cannot be run, and what somebody else could change: it runs with the daemon's rights.
///
/// # Errors
/// Code `on-event`.
pub(in crate::daemon) fn check(program: &Path) -> Result<(), Problem> {
    let shown = program.display();
    let refused = |why: String, hint: &str| Err(problem("on-event", why, hint));
    if !program.is_absolute() {
        return refused(format!("{shown} is not a whole path"), "give it from the root, as in /usr/local/bin/on-event");
    }
    let meta = match std::fs::metadata(program) {
        Ok(meta) => meta,
        Err(e) => return refused(format!("{shown} cannot be run: {e}"), "is the path right?"),
    };
    let mode = meta.permissions().mode();
    if !meta.is_file() || mode & 0o111 == 0 {
        return refused(format!("{shown} is not a program"), "`chmod +x` makes a script one");
    }
    if mode & 0o022 != 0 {
        return refused(
            format!("{shown} can be changed by others, and would run with meshd's rights"),
            "`chmod go-w` closes it; its directory should be closed to others as well",
        );
    }
    Ok(())
}

/// Runs the program: no shell, no arguments, nothing in the environment but a `PATH`, a process group of its own. What it prints
/// goes to the daemon's log.
///
/// # Errors
/// How it failed, as the end of a sentence that begins with its name.
pub(super) async fn call(program: PathBuf, event: HookEvent, patience: Duration) -> Result<(), String> {
    let mut line = serde_json::to_vec(&event).map_err(|e| format!("cannot be told of an event: {e}"))?;
    line.push(b'\n');
    let mut child = start(&program).map_err(|e| format!("cannot be run: {e}"))?;
    let Some(pid) = child.id() else { return Ok(()) };
    let mut group = Group(Some(pid));
    let work = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A program that reads nothing is as good; its exit status says the rest.
            let _ = stdin.write_all(&line).await;
        }
        child.wait().await
    };
    let ended = timeout(patience, work).await;
    if ended.is_ok() {
        // What it left in the background is its own affair.
        group.0 = None;
    }
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("failed with {} on {}", shown(status), event.what.kind())),
        Ok(Err(e)) => Err(format!("cannot be waited for: {e}")),
        Err(_) => {
            process::end_group(pid, false);
            let _ = timeout(GRACE, child.wait()).await;
            Err(format!("was ended: it took longer than {} s over {}", patience.as_secs(), event.what.kind()))
        }
    }
}

fn start(program: &Path) -> io::Result<Child> {
    // The daemon's standard output may be for somebody who started it.
    let log = Stdio::from(io::stderr().as_fd().try_clone_to_owned()?);
    let output = Stdio::from(io::stderr().as_fd().try_clone_to_owned()?);
    let mut command = Command::new(program);
    command.env_clear().env("PATH", SEARCH_PATH).current_dir("/");
    command.stdin(Stdio::piped()).stdout(output).stderr(log).process_group(0).kill_on_drop(true);
    command.spawn()
}

/// A call that is cut off takes what it has started with it.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            process::end_group(leader, true);
        }
    }
}

fn shown(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit code {code}"),
        None => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;
    use crate::wire::hook::{Happened, VERSION};

    fn event() -> HookEvent {
        let what = Happened::Route { prefix: "10.0.0.0/8".parse().unwrap(), via: Some("nas".into()), before: None };
        HookEvent { v: VERSION, seq: 1, time: 5, dropped: 0, network: "home".into(), node: "laptop".into(), what }
    }

    fn script(dir: &Path, text: &str) -> PathBuf {
        let file = dir.join("hook");
        fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o755)).unwrap();
        file
    }

    async fn run(text: &str, patience: Duration) -> (Result<(), String>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let text = text.replace("DIR", &dir.path().display().to_string());
        let program = script(dir.path(), &text);
        check(&program).unwrap();
        let mut result = call(program.clone(), event(), patience).await;
        // A program that another thread's fork still holds open for writing.
        while result.as_ref().is_err_and(|why| why.contains("Text file busy")) {
            result = call(program.clone(), event(), patience).await;
        }
        (result, dir)
    }

    #[tokio::test]
    async fn the_program_gets_the_event_and_nothing_else() {
        let (result, dir) = run("cat > DIR/read; env > DIR/env; pwd > DIR/pwd; echo $# > DIR/args", PATIENCE).await;
        assert_eq!(result, Ok(()));
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("read"), serde_json::to_string(&event()).unwrap() + "\n");
        // The shell of this script adds two of its own.
        let names: Vec<String> = read("env").lines().filter_map(|l| l.split('=').next().map(str::to_owned)).collect();
        assert!(names.iter().all(|name| ["PATH", "PWD", "_", "SHLVL", "OLDPWD"].contains(&name.as_str())), "{names:?}");
        assert_eq!((read("pwd").as_str(), read("args").as_str()), ("/\n", "0\n"));
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn how_it_ends_is_said() {
        let (result, _dir) = run("exit 3", PATIENCE).await;
        assert_eq!(result, Err("failed with exit code 3 on route".to_owned()));
        let missing = call("/nonexistent/hook".into(), event(), PATIENCE).await.unwrap_err();
        assert!(missing.starts_with("cannot be run"), "{missing}");
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_ended_with_what_it_started() {
        let text = "trap '' TERM; sleep 3000 & echo $! > DIR/pid; wait; sleep 3000";
        let (result, dir) = run(text, Duration::from_millis(1_500)).await;
        assert!(result.unwrap_err().starts_with("was ended"), "no deadline");
        let pid: u32 = fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
        // Killed; somebody still has to take leave of it.
        let gone = || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
        timeout(PATIENCE, async {
            while !gone() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }

    #[test]
    fn what_is_no_program_or_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = script(dir.path(), "exit 0");
        assert!(check(&file).is_ok());
        for mode in [0o644, 0o775, 0o757] {
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            assert_eq!(check(&file).unwrap_err().code, "on-event", "{mode:o}");
        }
        for wrong in [Path::new("hook"), dir.path(), Path::new("/nonexistent")] {
            let why = check(wrong).unwrap_err();
            assert!(why.code == "on-event" && !why.hint.is_empty(), "{wrong:?}");
        }
    }
}

//! Runs cases one after the other, each in a process of its own, and sums up the way cargo's own runner does.
//!
//! Cases measure real time on a machine that others use too. One that fails is run once more; passing then counts, and is said
//! at the end with what went wrong at first. More than a few of these are no accident and fail the run. `MESHD_LAB_ONCE=1` takes
//! the first word for it.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use meshd::cli::demo::contain::{After, contain};
use meshd::cli::demo::net::missing_tools;

use crate::net;

/// Names the case a process is to run.
const CASE: &str = "MESHD_LAB_CASE";
/// The most cases that may need a second attempt.
const LUCKY: usize = 3;
/// Set: a case that fails is not run again.
const ONCE: &str = "MESHD_LAB_ONCE";
/// Exit code of a case that cannot run here.
const SKIPPED: u8 = 77;

/// One thing to show.
pub struct Case {
    pub name: &'static str,
    /// It is killed and failed after this long.
    pub limit: Duration,
    pub run: fn() -> Result<()>,
}

/// A case in this file of cases that should be over within two minutes.
pub const fn case(name: &'static str, run: fn() -> Result<()>) -> Case {
    Case { name, limit: Duration::from_secs(120), run }
}

/// Why a case cannot run on this machine; returned as an error.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Leaves the case out with a reason.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(anyhow!(Skip(why.into())))
}

enum Outcome {
    Passed(String),
    Skipped(String),
    Failed(String),
}

pub fn main(cases: &[Case]) -> ExitCode {
    if let Ok(name) = std::env::var(CASE) {
        return inside(cases, &name);
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = args.iter().position(|arg| arg == "--shell") {
        return net::shell(args.get(at + 1).map_or("", String::as_str));
    }
    let exact = args.iter().any(|arg| arg == "--exact");
    let words: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |case: &&Case| {
        words.is_empty() || words.iter().any(|word| if exact { case.name == *word } else { case.name.contains(word) })
    };
    let chosen: Vec<&Case> = cases.iter().filter(wanted).collect();
    if args.iter().any(|arg| arg == "--list") {
        chosen.iter().for_each(|case| println!("{}: test", case.name));
        println!("\n{} tests, 0 benchmarks", chosen.len());
        return ExitCode::SUCCESS;
    }
    let show = args.iter().any(|arg| arg == "--nocapture" || arg == "--show-output");
    run_all(&chosen, cases.len() - chosen.len(), show)
}

fn run_all(chosen: &[&Case], filtered: usize, show: bool) -> ExitCode {
    println!("\nrunning {} tests", chosen.len());
    let start = Instant::now();
    let impossible = impossible();
    let once = std::env::var_os(ONCE).is_some();
    let (mut passed, mut ignored, mut failures, mut lucky) = (0, 0, Vec::new(), Vec::new());
    for case in chosen {
        let began = Instant::now();
        let mut outcome = match &impossible {
            Some(why) => Outcome::Skipped(why.clone()),
            None => run_one(case),
        };
        let mut attempt = "";
        if let (Outcome::Failed(why), false) = (&outcome, once || lucky.len() >= LUCKY) {
            let again = run_one(case);
            if matches!(again, Outcome::Passed(_)) {
                lucky.push((case.name, why.clone()));
                attempt = "at the second attempt, ";
                outcome = again;
            }
        }
        let took = began.elapsed().as_secs_f64();
        match outcome {
            Outcome::Passed(said) => {
                passed += 1;
                println!("test {} ... ok ({attempt}{took:.1} s)", case.name);
                if show {
                    said.lines().for_each(|line| println!("    {line}"));
                }
            }
            Outcome::Skipped(why) => {
                ignored += 1;
                println!("test {} ... ignored, {why}", case.name);
            }
            Outcome::Failed(why) => {
                println!("test {} ... FAILED ({took:.1} s)", case.name);
                failures.push((case.name, why));
            }
        }
    }
    if !lucky.is_empty() {
        println!("\npassed at the second attempt only:");
        lucky.iter().for_each(|(name, why)| println!("\n---- {name}, the first ----\n{why}"));
    }
    if !failures.is_empty() {
        println!("\nfailures:");
        for (name, why) in &failures {
            println!("\n---- {name} ----\n{why}");
        }
        println!("\nfailures:");
        failures.iter().for_each(|(name, _)| println!("    {name}"));
    }
    let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {ignored} ignored; 0 measured; {filtered} filtered out; \
         finished in {:.2}s\n",
        failures.len(),
        start.elapsed().as_secs_f64()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Why no case can run on this machine.
fn impossible() -> Option<String> {
    let missing = missing_tools();
    if !missing.is_empty() {
        return Some(format!("{} not installed (apt-get install iproute2 nftables)", missing.join(" and ")));
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        return Some(format!("/dev/net/tun cannot be opened ({error})"));
    }
    match run_one(&case("(probe)", || Ok(()))) {
        Outcome::Passed(_) => None,
        Outcome::Skipped(why) | Outcome::Failed(why) => Some(format!("namespaces cannot be made here: {}", why.trim())),
    }
}

fn run_one(case: &Case) -> Outcome {
    match try_one(case) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

fn try_one(case: &Case) -> Result<Outcome> {
    let mut log = tempfile::tempfile()?;
    let mut child = Command::new(std::env::current_exe()?)
        .env(CASE, case.name)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn()?;
    let deadline = Instant::now() + case.limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            // The kernel then ends everything in the case's namespaces.
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    };
    let mut said = String::new();
    log.rewind()?;
    log.read_to_string(&mut said)?;
    Ok(match status.map(|status| status.code()) {
        Some(Some(0)) => Outcome::Passed(said),
        Some(Some(code)) if code == i32::from(SKIPPED) => Outcome::Skipped(said.trim().to_owned()),
        Some(_) => Outcome::Failed(said),
        None => Outcome::Failed(format!("{said}\nkilled after {} s", case.limit.as_secs())),
    })
}

/// In the process of one case.
fn inside(cases: &[Case], name: &str) -> ExitCode {
    match contain(After::Discard) {
        Ok(None) => {}
        Ok(Some(ended)) => return ExitCode::from(ended.code),
        Err(error) => {
            println!("{error:#}");
            return ExitCode::from(SKIPPED);
        }
    }
    let Some(case) = cases.iter().find(|case| case.name == name) else {
        // The probe: being here is all it wants.
        return ExitCode::SUCCESS;
    };
    match (case.run)() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(why) => {
                println!("{why}");
                ExitCode::from(SKIPPED)
            }
            None => {
                println!("{error:#}");
                crate::world::print_logs();
                ExitCode::FAILURE
            }
        },
    }
}

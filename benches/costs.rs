//! What the packet path's steps cost, without system calls.
//!
//! ```text
//! cargo run --release --example costs              instructions; exit 1 if a step takes over 5 % more than noted
//! MESHD_UPDATE=1 cargo run --release --example costs    notes them in benches/instructions.txt
//! cargo run --release --example costs time         nanoseconds, as JSON (`cargo bench --bench packet_path` says more)
//! ```
//!
//! Instructions are counted by callgrind. Unlike times, counts are the same on a busy machine and, with one toolchain and one C library, hardly differ between
//! processors: valgrind shows a program the same instruction sets on all that have AVX2. Where they do differ (another
//! toolchain, an older processor) note them anew. Without valgrind nothing is counted and that is said.
//!
//! An example and not a benchmark, because it then shares everything that was built for the release.

#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a tool that starts programs and reads files")]

mod path;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use path::{CASES, Case};

/// Where the numbers are noted: a step's name and its instructions a packet on each line.
const NOTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");
/// By how much a step may grow.
const MOST: f64 = 1.05;
/// Operations that are counted: enough that what only now and then happens is in.
const TIMES: u64 = 50;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => compare(),
        ["time"] => Ok(time()),
        ["run", name] => run(name).map(|()| ExitCode::SUCCESS),
        _ => bail!("usage: costs [time | run STEP]"),
    }
}

/// What valgrind runs: everything but `counted` happens uncounted.
fn run(name: &str) -> Result<()> {
    let (_, make) = CASES.iter().find(|(known, _)| *known == name).with_context(|| format!("no step {name}"))?;
    let mut case = make();
    // What happens only the first time is no matter.
    case.prepare();
    black_box(&mut case).run();
    for _ in 0..TIMES {
        case.prepare();
        counted(&mut *case);
    }
    Ok(())
}

#[inline(never)]
fn counted(case: &mut dyn Case) {
    black_box(case).run();
}

/// How often the time of an operation is taken; the shortest is what it takes when nothing else runs.
const TIMED: usize = 1000;

fn time() -> ExitCode {
    println!("{{");
    for (n, (name, make)) in CASES.iter().enumerate() {
        let mut case = make();
        let shortest = (0..TIMED).map(|_| {
            case.prepare();
            let start = Instant::now();
            counted(&mut *case);
            start.elapsed()
        });
        let shortest = shortest.min().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let each = shortest.as_nanos() as f64 / case.count() as f64;
        println!("  \"{name}\": {each:.1}{}", if n + 1 < CASES.len() { "," } else { "" });
    }
    println!("}}");
    ExitCode::SUCCESS
}

/// Instructions a packet.
fn count(name: &str, count: u64) -> Result<f64> {
    let program = std::env::current_exe().context("this program")?;
    let out = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*costs::counted*"])
        .arg(program)
        .args(["run", name])
        .output()
        .context("valgrind")?;
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        bail!("{name}: valgrind failed:\n{said}");
    }
    let all = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
    let all = all.filter(|n| *n > 0).with_context(|| format!("{name}: valgrind counted nothing:\n{said}"))?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    Ok(all as f64 / (TIMES * count) as f64)
}

fn compare() -> Result<ExitCode> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: instruction counts (valgrind is not installed: sudo apt-get install -y valgrind)");
        return Ok(ExitCode::SUCCESS);
    }
    let noted = noted()?;
    let update = std::env::var_os("MESHD_UPDATE").is_some();
    let mut now = String::new();
    let mut worse = Vec::new();
    println!("{:20} {:>12} {:>12}", "instructions", "a packet", "noted");
    for (name, make) in CASES {
        let counted = count(name, make().count())?;
        writeln!(now, "{name} {counted:.1}")?;
        let Some(before) = noted.get(*name) else {
            println!("{name:20} {counted:12.1} {:>12}", "-");
            worse.push(*name);
            continue;
        };
        let change = 100.0 * (counted / before - 1.0);
        println!("{name:20} {counted:12.1} {before:12.1}  {change:+.1} %");
        if counted > before * MOST {
            worse.push(*name);
        }
    }
    if update {
        std::fs::write(NOTED, now).context(NOTED)?;
        return Ok(ExitCode::SUCCESS);
    }
    if worse.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("more than 5 % over what is noted in benches/instructions.txt, or not noted: {}", worse.join(", "));
    eprintln!(
        "hint: make it cheaper; or, if it is worth that, note it: MESHD_UPDATE=1 cargo run --release --example costs"
    );
    Ok(ExitCode::FAILURE)
}

fn noted() -> Result<BTreeMap<String, f64>> {
    let text = match std::fs::read_to_string(NOTED) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        text => text.context(NOTED)?,
    };
    text.lines()
        .map(|line| {
            let (name, count) = line.split_once(' ').with_context(|| format!("{NOTED}: {line}"))?;
            Ok((name.to_owned(), count.parse().with_context(|| format!("{NOTED}: {line}"))?))
        })
        .collect()
}

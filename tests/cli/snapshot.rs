//! Runs the program and compares what it prints with a committed file.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

/// The program, with nothing of the surrounding environment that changes what it prints.
pub(crate) fn meshd(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshd"));
    command.args(args).env_clear().env("COLUMNS", "100").env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// What it printed and how it ended, in one text.
pub(crate) fn transcript(args: &[&str], output: &Output) -> String {
    let mut text = format!("$ meshd {}\n[exit {}]\n", args.join(" "), output.status.code().unwrap_or(-1));
    for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        if !bytes.is_empty() {
            text.push_str(&format!("--- {name}\n{}", String::from_utf8_lossy(bytes)));
        }
    }
    text
}

/// Fails if `text` is not what `snapshots/NAME.txt` holds.
pub(crate) fn assert_snapshot(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cli/snapshots").join(format!("{name}.txt"));
    // Trailing spaces are nobody's intention and editors remove them.
    let text: String = text.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    if std::env::var_os("MESHD_UPDATE").is_some() {
        fs::write(&path, &text).unwrap();
        return;
    }
    let want = fs::read_to_string(&path).unwrap_or_default();
    if want == text {
        return;
    }
    let first = want
        .lines()
        .zip(text.lines())
        .position(|(a, b)| a != b)
        .unwrap_or(want.lines().count().min(text.lines().count()));
    panic!(
        "{name} is not what {} holds; the first difference is in line {}.\n--- expected\n{want}\n--- printed\n{text}\n\
         If it is meant: MESHD_UPDATE=1 cargo test --test cli",
        path.display(),
        first + 1
    );
}

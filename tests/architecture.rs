//! The rules of `docs/architecture.md` that a compiler does not check, read off the sources.
//!
//! Each failure names the file, the line and the reason.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders of pure code: no clock, socket, file, task or operating system randomness.
const PURE: &[&str] = &["src/wire", "src/trust", "src/engine", "src/coord"];
/// Folders of code that does I/O.
const SHELLS: &[&str] = &["src/os", "src/link", "src/daemon", "src/server", "src/cli"];

/// What pure code may name from outside its own crate. Everything else needs a reason and a line here.
const ALLOWED_CRATES: &[(&str, &str)] = &[
    ("core", "the language"),
    ("alloc", "the language"),
    ("crate", "this crate; directions are checked apart"),
    ("super", "this crate"),
    ("self", "this crate"),
    ("base64", "encodes records"),
    ("blake2", "hashes and keyed hashes"),
    ("boringtun", "WireGuard sessions"),
    ("chacha20poly1305", "sealed peer messages"),
    ("ed25519_dalek", "signatures"),
    ("etherparse", "IP headers"),
    ("hickory_proto", "DNS messages"),
    ("hmac_sha256", "integrity of path probes; what stun_rs uses itself"),
    ("ipnet", "prefixes"),
    ("mock_instant", "the simulator's clock, never in the shipped program"),
    ("parking_lot", "the mutex around a session"),
    ("proptest", "property tests"),
    ("rand", "seeded randomness, injected"),
    ("rustc_hash", "hash maps for lookup"),
    ("serde", "messages"),
    ("serde_json", "messages"),
    ("stun_rs", "STUN messages"),
    ("subtle", "comparison in constant time"),
    ("thiserror", "errors"),
    ("tracing", "logs"),
    ("x25519_dalek", "keys"),
    ("zeroize", "secrets are wiped"),
];

/// What pure code must not name even though `std` or an allowed crate offers it.
const FORBIDDEN_IN_PURE: &[(&str, &str)] = &[
    ("std::fs", "pure code does not touch files"),
    ("std::env", "configuration is an argument"),
    ("std::process", "pure code starts nothing"),
    ("std::thread", "threads belong to shells"),
    ("std::os", "pure code does not talk to the system"),
    ("std::net::UdpSocket", "pure code does no I/O"),
    ("std::net::Tcp", "pure code does no I/O"),
    ("UdpSocket", "pure code does no I/O"),
    ("TcpStream", "pure code does no I/O"),
    ("TcpListener", "pure code does no I/O"),
    ("std::time::Instant", "time is an argument of type Now"),
    ("std::time::SystemTime", "wall-clock time is an argument"),
    ("Instant::now", "time is an argument of type Now"),
    ("SystemTime::now", "wall-clock time is an argument"),
    ("rand::rng(", "randomness is injected"),
    ("OsRng", "randomness is injected"),
    ("tokio", "pure code has no tasks"),
    ("libc::", "pure code does not talk to the system"),
    ("nix::", "pure code does not talk to the system"),
    ("rustls", "TLS belongs to shells"),
    ("async fn", "pure code is polled, not awaited"),
    (".await", "pure code is polled, not awaited"),
];

/// One line of code with comments taken off.
struct Line {
    file: PathBuf,
    number: usize,
    code: String,
}

#[test]
fn pure_code_names_only_what_it_may() {
    let mut wrong = Vec::new();
    for line in PURE.iter().flat_map(|folder| lines(folder)) {
        for (word, reason) in FORBIDDEN_IN_PURE {
            if mentions(&line.code, word) {
                wrong.push(complain(&line, &format!("names `{word}`: {reason}")));
            }
        }
        if let Some(first) = imported(&line.code)
            && first != "std"
            && !ALLOWED_CRATES.iter().any(|(name, _)| *name == first)
            && !is_local(&line, first)
        {
            wrong
                .push(complain(&line, &format!("imports `{first}`, which is not on the list of crates for pure code")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_point_down() {
    let rules: &[(&str, &[&str], &str)] = &[
        (
            "src/engine",
            &["coord", "os", "link", "daemon", "server", "cli"],
            "a node does not know the coordinator or the shells",
        ),
        (
            "src/coord",
            &["engine", "os", "link", "daemon", "server", "cli"],
            "the coordinator does not know a node's engine or the shells",
        ),
        (
            "src/trust",
            &["engine", "coord", "os", "link", "daemon", "server", "cli"],
            "trust is judged without knowing who asks",
        ),
        (
            "src/wire",
            &["engine", "coord", "os", "link", "daemon", "server", "cli"],
            "bytes do not know what is done with them",
        ),
        ("src/os", &["link", "daemon", "server", "cli"], "system calls serve everybody above"),
        ("src/link", &["daemon", "server", "cli"], "links serve the daemon and the server"),
        ("src/server", &["daemon", "engine", "cli"], "a server is not a node"),
        ("src/daemon", &["server", "coord", "cli"], "a node is not a server"),
    ];
    let mut wrong = Vec::new();
    for (folder, banned, reason) in rules {
        for line in lines(folder) {
            for module in *banned {
                if mentions(&line.code, &format!("crate::{module}")) {
                    wrong.push(complain(&line, &format!("names `crate::{module}`: {reason}")));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_in_os_only() {
    let mut wrong = Vec::new();
    for line in lines("src").filter(|line| !line.file.starts_with("src/os")) {
        if mentions(&line.code, "unsafe") || line.code.contains("unsafe_code") {
            wrong.push(complain(&line, "unsafe code belongs in src/os"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_shells_allow_what_clippy_disallows() {
    let lifts = |line: &Line| {
        (line.code.contains("allow(") || line.code.contains("expect(")) && line.code.contains("disallowed_")
    };
    let mut wrong = Vec::new();
    for line in lines("src").filter(lifts) {
        if !SHELLS.iter().any(|shell| line.file == Path::new(shell).join("mod.rs")) {
            wrong.push(complain(&line, "only the mod.rs of a shell may allow the disallowed methods and types"));
        }
    }
    for shell in SHELLS {
        if !lines(shell).any(|line| line.file == Path::new(shell).join("mod.rs") && lifts(&line)) {
            wrong.push(format!("{shell}/mod.rs does not say that it is a shell (see clippy.toml)"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_test_file_is_part_of_a_test() {
    let mut wrong = Vec::new();
    for folder in ["tests/sim", "tests/lab", "tests/cli"] {
        let all = files(Path::new(folder));
        for file in &all {
            let name = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            let module = if name == "mod" { parent_name(file) } else { name.to_owned() };
            let included = name == "main"
                || all.iter().any(|other| {
                    let text = fs::read_to_string(other).unwrap_or_default();
                    // Declared, or named in the list of a macro that declares.
                    let forms = [format!("mod {module};"), format!("pub mod {module};"), format!("{module},")];
                    text.lines().any(|line| forms.iter().any(|form| line.trim() == form))
                });
            if !included {
                wrong.push(format!("{} is in no test: write `mod {module};`", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_for_later() {
    // Split, so that this list does not find itself.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("HA", "CK"),
        concat!("unimplement", "ed!"),
    ];
    let marks = marks.iter().copied().chain([concat!("to", "do!("), concat!("#[ign", "ore")]);
    let marks: Vec<&str> = marks.collect();
    let mut wrong = Vec::new();
    for file in ["src", "tests"].iter().flat_map(|folder| files(Path::new(folder))) {
        let text = fs::read_to_string(&file).expect("a source file can be read");
        for (number, line) in text.lines().enumerate() {
            for mark in &marks {
                if mentions(line, mark) {
                    wrong.push(format!("{}:{}: holds `{mark}`", file.display(), number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_rules_find_what_they_forbid() {
    assert!(mentions("use std::fs;", "std::fs"));
    assert!(!mentions("let fast = 1;", "fs"));
    assert!(mentions("let x = std::time::Instant::now();", "Instant::now"));
    assert!(!mentions("pub unsafety: bool", "unsafe"));
    assert_eq!(imported("use tokio::net;"), Some("tokio"));
    assert_eq!(imported("pub(crate) use crate::wire::ip;"), Some("crate"));
    assert_eq!(imported("    use ::libc as c;"), Some("libc"));
    assert_eq!(imported("let reuse = 1;"), None);
    assert_eq!(without_comment("let url = \"https://x\"; // use tokio"), "let url = \"https://x\"; ");
    assert_eq!(without_comment("/// use tokio::net"), "");
}

fn complain(line: &Line, what: &str) -> String {
    format!("{}:{}: {what}", line.file.display(), line.number)
}

/// The word stands there, and not as a part of a longer word.
fn mentions(code: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let starts = word.starts_with(part_of_word);
    let ends = word.ends_with(part_of_word);
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !(starts && before.is_some_and(part_of_word) || ends && after.is_some_and(part_of_word))
    })
}

/// The first segment of a `use` declaration.
fn imported(code: &str) -> Option<&str> {
    let code = code.trim();
    let rest = code.strip_prefix("use ").or_else(|| {
        let after = code.strip_prefix("pub")?;
        let after = if after.starts_with('(') { after.split_once(')')?.1 } else { after };
        after.trim_start().strip_prefix("use ")
    })?;
    let rest = rest.trim_start_matches("::").trim_start();
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
    rest.get(..end).filter(|name| !name.is_empty())
}

/// A `use` of a module or enum of the same file's neighbourhood: `use Token::*`, `use contain::After`.
fn is_local(line: &Line, first: &str) -> bool {
    if first.starts_with(char::is_uppercase) {
        return true;
    }
    let text = fs::read_to_string(&line.file).expect("a source file can be read");
    text.lines().any(|l| {
        let l = l.trim_start();
        let l = l.strip_prefix("pub(crate) ").or_else(|| l.strip_prefix("pub ")).unwrap_or(l);
        l.starts_with(&format!("mod {first};")) || l.starts_with(&format!("mod {first} {{"))
    })
}

fn lines(folder: &str) -> impl Iterator<Item = Line> {
    let found = files(Path::new(folder));
    assert!(!found.is_empty(), "{folder} holds no sources: is the test looking in the right place?");
    found.into_iter().flat_map(|file| {
        let text = fs::read_to_string(&file).expect("a source file can be read");
        let numbered: Vec<Line> = text
            .lines()
            .enumerate()
            .map(|(i, line)| Line { file: file.clone(), number: i + 1, code: without_comment(line).to_owned() })
            .collect();
        numbered
    })
}

fn without_comment(line: &str) -> &str {
    let mut inside = false;
    let mut before = ' ';
    for (at, c) in line.char_indices() {
        match c {
            '"' if before != '\\' && before != '\'' => inside = !inside,
            '/' if before == '/' && !inside => return &line[..at - 1],
            _ => {}
        }
        before = c;
    }
    line
}

fn parent_name(file: &Path) -> String {
    file.parent().and_then(Path::file_name).and_then(|n| n.to_str()).unwrap_or_default().to_owned()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return found };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

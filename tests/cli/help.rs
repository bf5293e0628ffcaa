//! The help of every command. Together they are also the reference page `docs/reference/cli.md`.

use std::fs;
use std::path::Path;

use clap::CommandFactory as _;
use meshd::cli::Cli;

use crate::snapshot::{assert_snapshot, meshd};

/// Every command that is not hidden, as the words to type, the program itself first.
fn commands() -> Vec<Vec<String>> {
    fn walk(command: &clap::Command, words: &[String], found: &mut Vec<Vec<String>>) {
        found.push(words.to_vec());
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            walk(sub, &[words, &[sub.get_name().to_owned()]].concat(), found);
        }
    }
    let mut found = Vec::new();
    walk(&Cli::command(), &[], &mut found);
    found
}

fn help_of(words: &[String]) -> String {
    let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
    args.push("--help");
    let output = meshd(&args).output().unwrap();
    assert!(output.status.success(), "{args:?}");
    assert!(output.stderr.is_empty(), "help that was asked for is data");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_command_has_its_help() {
    for words in commands() {
        let name = if words.is_empty() { "help".to_owned() } else { format!("help-{}", words.join("-")) };
        assert_snapshot(&name, &help_of(&words));
    }
}

#[test]
fn no_snapshot_is_left_of_a_command_that_is_gone() {
    let known: Vec<String> = commands().iter().map(|words| format!("help-{}.txt", words.join("-"))).collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/snapshots");
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with("help-") || known.contains(&name), "{name} shows a command that does not exist");
    }
}

#[test]
fn every_command_takes_the_common_options() {
    for words in commands() {
        let help = help_of(&words);
        for option in ["--json", "--state-dir", "--socket"] {
            assert!(help.contains(option), "meshd {} --help does not list {option}", words.join(" "));
        }
    }
}

#[test]
fn the_reference_page_is_the_help() {
    let mut page =
        "# Commands\n\nWhat `meshd COMMAND --help` prints. Written by `MESHD_UPDATE=1 cargo test --test cli`.\n"
            .to_owned();
    for words in commands() {
        let name = if words.is_empty() { "meshd".to_owned() } else { format!("meshd {}", words.join(" ")) };
        let help: String = help_of(&words).lines().map(|line| format!("{}\n", line.trim_end())).collect();
        page.push_str(&format!("\n## {name}\n\n```text\n{}```\n", help));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/cli.md");
    if std::env::var_os("MESHD_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &page).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == page, "docs/reference/cli.md is not the help: MESHD_UPDATE=1 cargo test --test cli");
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = meshd(&["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains("netcheck"), "{shell}");
    }
}

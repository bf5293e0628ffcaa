//! The help of every command.

use std::fs;
use std::path::Path;

use clap::CommandFactory as _;
use meshd::cli::Cli;

use crate::snapshot::{assert_snapshot, meshd};

/// Every command that is not hidden, as the words to type, the program itself first.
pub(crate) fn commands() -> Vec<Vec<String>> {
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

pub(crate) fn help_of(words: &[String]) -> String {
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
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = meshd(&["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains("netcheck"), "{shell}");
    }
}

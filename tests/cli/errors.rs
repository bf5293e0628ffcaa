//! Mistakes on the command line, and commands that need a daemon where there is none.

use std::process::Stdio;

use crate::snapshot::{assert_snapshot, meshd, transcript};

fn check(name: &str, lines: &[&[&str]]) {
    let texts: Vec<String> = lines
        .iter()
        .map(|args| {
            let output = meshd(args).stdin(Stdio::null()).output().unwrap();
            assert!(!output.status.success(), "{args:?} succeeded");
            transcript(args, &output)
        })
        .collect();
    assert_snapshot(name, &texts.join("\n"));
}

#[test]
fn wrong_command_lines() {
    check(
        "usage",
        &[
            &["stauts"],
            &["ping"],
            &["ping", "--jsno", "nas"],
            &["ping", "nas", "--timeout", "5"],
            &["ping", "nas", "--timeout", "five"],
            &["ping", "nas", "--timeout", "5sec"],
            &["ping", "nas", "-c", "0"],
            &["invite", "--expires", "7days"],
            &["invite", "--uses", "0"],
            &["invite", "--uses", "3", "--name", "nas"],
            &["status", "--check", "redy"],
            &["up", "--port", "70000"],
            &["up", "--ipv4-range", "100.64.0.0"],
            &["up", "--ipv4-range", "100.64.3.0/16"],
            &["up", "--ipv4-range", "home"],
            &["up", "--advertise-routes", "192.168.1.7/24"],
            &["up", "--advertise-routes", "192.168.1.0/24,10.0.0.1"],
            &["up", "--accept-routes=maybe"],
            &["invite", "--routes", "home"],
            &["routes", "approve", "nas"],
            &["routes", "alias", "nas", "192.168.1.0"],
            &["routes", "alias", "nas", "192.168.1.0/24", "100.99.1.1/24"],
            &["dns", "add", "nas.home"],
            &["dns", "add", "nas.home", "192.168.1"],
            &["dns", "remove"],
            &["dns", "split", "corp.example", "ns.corp.example"],
            &["routes", "approve", "nas", "192.168.1.0/33"],
            &["routes", "aprove", "nas", "192.168.1.0/24"],
            &["set", "--confirm", "60s"],
            &["set", "--snat=false", "--confirm"],
            &["set", "--kill-switch=perhaps"],
            &["completions", "bahs"],
            &["up", "--token-file", "/nonexistent/token"],
            &["stauts", "--json"],
        ],
    );
}

#[test]
fn no_daemon() {
    let dir = ["--state-dir", "/nonexistent/meshd"];
    let lines: Vec<Vec<&str>> = [
        &["status"][..],
        &["status", "--json"],
        &["status", "--check", "live"],
        &["ping", "nas"],
        &["netcheck"],
        &["ip"],
        &["invite"],
        &["remove", "nas"],
        &["routes"],
        &["dns"],
        &["set"],
        &["set", "--exit-node", "gate"],
        &["routes", "approve", "nas", "192.168.1.0/24"],
    ]
    .iter()
    .map(|args| [args, &dir[..]].concat())
    .collect();
    let lines: Vec<&[&str]> = lines.iter().map(Vec::as_slice).collect();
    check("not-running", &lines);
}

#[test]
fn nothing_to_undo_where_nothing_runs() {
    let dir = ["--state-dir", "/nonexistent/meshd"];
    for (name, args) in [("footprint-none", &["footprint"][..]), ("footprint-undo-none", &["footprint", "--undo"])] {
        let texts = [&[][..], &["--json"]].map(|form| {
            let args = [args, &dir[..], form].concat();
            transcript(&args, &meshd(&args).output().unwrap())
        });
        assert_snapshot(name, &texts.join("\n"));
    }
}

#[test]
fn tokens_that_are_none() {
    let dir = ["--state-dir", "/nonexistent/meshd"];
    let lines: Vec<Vec<&str>> = [
        &["up", "hello"][..],
        &["up", "meshd-invite1-abc"],
        &["up", "meshd-invite9-abc"],
        &["up", "meshd-invite1-a b"],
    ]
    .iter()
    .map(|args| [args, &dir[..]].concat())
    .collect();
    let lines: Vec<&[&str]> = lines.iter().map(Vec::as_slice).collect();
    check("tokens", &lines);
}

#[test]
fn without_a_command_the_help_goes_to_standard_error() {
    let output = meshd(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("Commands:"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = meshd(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn colour_is_for_terminals() {
    let output = meshd(&["status", "--state-dir", "/nonexistent/meshd"]).output().unwrap();
    assert!(!output.stderr.contains(&0x1b), "{}", String::from_utf8_lossy(&output.stderr));
}

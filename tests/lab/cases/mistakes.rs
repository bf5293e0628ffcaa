//! Mistakes get a sentence, a hint and a non-zero exit, and change nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::Result;

use crate::net::{self, Topology};
use crate::runner::{Case, case};
use crate::world::{Coordinator, Node, ensure, error_of, inherit_nothing, let_pass, plain};

pub fn cases() -> Vec<Case> {
    vec![
        case("mistakes::tokens", tokens),
        case("mistakes::a_token_of_another_network", wrong_network),
        case("mistakes::coordinator_not_there", coordinator_not_there),
        case("mistakes::coordinator_with_another_key", wrong_key),
        case("mistakes::name_taken", name_taken),
        case("mistakes::no_privilege_and_no_tun", no_privilege),
        case("mistakes::address_range_clash", range_clash),
        case("mistakes::state_directory", state_directory),
        case("mistakes::second_daemon_on_one_state_directory", second_daemon),
        case("mistakes::corrupt_state_is_kept_aside_and_said", corrupt_state),
        case("mistakes::status_without_a_daemon", no_daemon),
    ]
}

/// The command failed as every command should, and its text holds one of the words.
fn refused(what: &str, output: &Output, words: &[&str]) -> Result<()> {
    let code = output.status.code();
    ensure(code.is_some_and(|code| code != 0), || format!("{what}: exit code {code:?}"))?;
    let error = error_of(output)?;
    let (text, hint) = (error["text"].as_str().unwrap_or_default(), error["hint"].as_str().unwrap_or_default());
    ensure(text.len() > 10 && hint.len() > 5, || format!("{what}: no sentence or no hint: {error}"))?;
    ensure(error["code"].as_str().is_some_and(|code| !code.is_empty()), || format!("{what}: no code: {error}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure(stderr.contains("error: ") && stderr.contains("hint: "), || format!("{what}: stderr reads {stderr}"))?;
    let said = format!("{text} {hint}").to_lowercase();
    ensure(words.iter().any(|word| said.contains(word)), || format!("{what}: none of {words:?} in: {said}"))?;
    println!("{what}: {text} | {hint}");
    Ok(())
}

/// Runs `meshd up` on a machine that is in no network, and sees that it is in none afterwards.
fn try_up(node: &Node, token: &str, args: &[&str]) -> Result<Output> {
    let before = machine(node)?;
    let mut command = node.meshd(&[&["up", "--json", "--timeout", "8s"], args].concat());
    let output = node.namespace.output(command.env("MESHD_TOKEN", token))?;
    ensure(!output.status.success(), || format!("up succeeded: {}", String::from_utf8_lossy(&output.stdout)))?;
    let after = machine(node)?;
    ensure(before == after, || format!("it changed the machine:\n{before}\n-- is now --\n{after}"))?;
    ensure(node.pid().is_err(), || "a daemon was left running".to_owned())?;
    Ok(output)
}

fn machine(node: &Node) -> Result<String> {
    let all = ["-o link", "-o addr", "route show table all", "-6 route show table all", "rule"];
    let parts: Result<Vec<String>> = all.iter().map(|args| node.namespace.ip(args)).collect();
    Ok(parts?.join("\n"))
}

fn lab() -> Result<(Topology, [Node; 3])> {
    let lab = net::public()?;
    let nodes = ["a", "b", "c"].map(|name| Node::new(name, super::join::namespace(&lab, name)));
    nodes[0].up(&lab.world.coordinator.claim()?)?;
    Ok((lab, nodes))
}

fn tokens() -> Result<()> {
    let (lab, [a, b, c]) = lab()?;
    let token = a.invite()?;
    let middle = token.len() / 2;
    let swapped = {
        let mut letters: Vec<char> = token.chars().collect();
        letters[middle] = if letters[middle] == 'a' { 'b' } else { 'a' };
        letters.into_iter().collect::<String>()
    };
    refused("truncated", &try_up(&b, &token[..middle], &[])?, &["incomplete", "checksum"])?;
    refused("mistyped", &try_up(&b, &swapped, &[])?, &["mistyped", "checksum"])?;
    refused("no token", &try_up(&b, "hello", &[])?, &["not a meshd token"])?;
    refused("newer", &try_up(&b, &token.replace("meshd-invite1-", "meshd-invite2-"), &[])?, &["newer", "upgrade"])?;
    refused("nothing to resume", &try_up(&b, "", &[])?, &["token"])?;
    let short = a.run(&["invite", "--expires", "1s"])?;
    let_pass(Duration::from_millis(2_500));
    refused("expired", &try_up(&b, short.trim(), &[])?, &["expired"])?;
    b.up(&token)?;
    refused("used", &try_up(&c, &token, &[])?, &["used"])?;
    let claim = lab.world.coordinator.node.output(&["coordinator", "claim", "--json"])?;
    ensure(!claim.status.success(), || "the claim token is printed although it was used".to_owned())?;
    c.up(&a.invite()?).map(drop)
}

fn wrong_network() -> Result<()> {
    let (lab, [a, b, _]) = lab()?;
    b.up(&a.invite()?)?;
    // A second coordinator on the same machine, with a network of its own.
    let other = Node::new("coord2", lab.world.internet.host("coord2", 12)?);
    let other = Coordinator::start_on(other, &["--public-url", "https://203.0.113.12:8443"])?;
    let founder = Node::new("d", lab.world.internet.host("d", 34)?);
    founder.up(&other.claim()?)?;
    let before = b.status()?;
    let output = b.namespace.output(b.meshd(&["up", "--json"]).env("MESHD_TOKEN", founder.invite()?))?;
    refused("another network", &output, &["network"])?;
    let after = b.status()?;
    ensure(before.network == after.network && before.me == after.me, || format!("{after:?}"))
}

fn coordinator_not_there() -> Result<()> {
    let (mut lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    lab.world.coordinator.kill()?;
    refused("coordinator down", &try_up(&b, &token, &[])?, &["coordinator", "203.0.113.10"])?;
    // A name that cannot be resolved: there is no resolver in here at all.
    let named = Node::new("coord3", lab.world.internet.host("coord3", 13)?);
    let named = Coordinator::start_on(named, &["--public-url", "https://vpn.example.invalid:8443"])?;
    refused("DNS", &try_up(&b, &named.claim()?, &[])?, &["vpn.example.invalid"])?;
    // An address nobody has.
    let silent = Node::new("coord4", lab.world.internet.host("coord4", 14)?);
    let silent = Coordinator::start_on(silent, &["--public-url", "https://203.0.113.99:8443"])?;
    refused("unknown coordinator", &try_up(&b, &silent.claim()?, &[])?, &["203.0.113.99"])
}

fn wrong_key() -> Result<()> {
    let (mut lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    lab.world.coordinator.kill()?;
    // Somebody else answers at the address.
    fs::rename(lab.world.coordinator.node.state_dir(), "/run/lab/away")?;
    lab.world.coordinator.restart()?;
    refused("another key", &try_up(&b, &token, &[])?, &["key"])
}

fn name_taken() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    refused("name taken", &try_up(&b, &token, &["--name", "a"])?, &["\"a\"", "name"])?;
    refused("no name", &try_up(&b, &token, &["--name", "not_a_label!"])?, &["name"])?;
    b.up(&token).map(drop)
}

fn no_privilege() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--"]);
    let up = b.meshd(&["up", "--json"]);
    command.arg(up.get_program()).args(up.get_args()).env("MESHD_TOKEN", &token);
    inherit_nothing(&mut command);
    let output = b.namespace.output(&mut command)?;
    refused("no CAP_NET_ADMIN", &output, &["cap_net_admin", "root", "sudo"])?;
    // No /dev/net/tun: an empty directory lies over it, for this process tree only.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "sh"]);
    let up = b.meshd(&["up", "--json"]);
    command.arg(up.get_program()).args(up.get_args()).env("MESHD_TOKEN", &token);
    inherit_nothing(&mut command);
    let output = b.namespace.output(&mut command)?;
    refused("no /dev/net/tun", &output, &["/dev/net/tun", "tun"])?;
    b.up(&token).map(drop)
}

fn range_clash() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    let mine = a.address(true)?.to_string();
    let range: Vec<&str> = mine.split('.').collect();
    let clash = format!("{}.{}.77.1/24", range[0], range[1]);
    b.namespace.ip("link add lan0 type bridge")?;
    b.namespace.ip("link set lan0 up")?;
    b.namespace.ip(&format!("addr add {clash} dev lan0"))?;
    refused("address range", &try_up(&b, &token, &[])?, &["overlap", "range", "already"])?;
    b.namespace.ip(&format!("addr del {clash} dev lan0"))?;
    b.namespace.ip(&format!("route add {}.{}.0.0/17 via 203.0.113.10", range[0], range[1]))?;
    refused("route", &try_up(&b, &token, &[])?, &["overlap", "range", "route"])?;
    b.namespace.ip(&format!("route del {}.{}.0.0/17 via 203.0.113.10", range[0], range[1]))?;
    b.up(&token).map(drop)
}

fn state_directory() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    let token = a.invite()?;
    for dir in ["/proc/meshd", "/dev/null/meshd"] {
        let mut command = plain(&["up", "--json", "--state-dir", dir]);
        let output = b.namespace.output(command.env("MESHD_TOKEN", &token))?;
        refused(&format!("state directory {dir}"), &output, &["--state-dir", dir])?;
    }
    b.up(&token).map(drop)
}

fn second_daemon() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    let before = (a.pid()?, a.status()?.me);
    let output = a.output(&["up", "--foreground", "--json"])?;
    refused("second daemon", &output, &["state directory", "already"])?;
    ensure(before == (a.pid()?, a.status()?.me), || "the first daemon is not what it was".to_owned())?;
    // From another machine that shares the directory.
    let mut command = plain(&["up", "--foreground", "--json", "--state-dir"]);
    command.arg(a.state_dir());
    let output = b.namespace.output(&mut command)?;
    refused("second daemon elsewhere", &output, &["state directory", "already"])
}

fn contents(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            found.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
        }
    }
    Ok(found)
}

/// Damages every file of a stopped node in turn: `up` either refuses, or goes on having said what it put aside where.
fn corrupt_state() -> Result<()> {
    let (_lab, [a, b, _]) = lab()?;
    b.up(&a.invite()?)?;
    let addresses = b.status()?.me.addresses;
    b.run(&["down"])?;
    let whole = contents(&b.state_dir())?;
    let state: Vec<&String> = whole.keys().filter(|name| name.as_str() != "lock" && !name.ends_with(".log")).collect();
    ensure(!state.is_empty(), || format!("no state in {}", b.state_dir().display()))?;
    for name in state {
        let file = b.state_dir().join(name);
        let rubbish = b"{\"this is\": not what was wri\n".to_vec();
        fs::write(&file, &rubbish)?;
        let output = b.output(&["up", "--json", "--timeout", "8s"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure(said.contains(name.as_str()), || format!("{name} was damaged, and up does not name it: {said}"))?;
        let kept = contents(&b.state_dir())?.values().any(|bytes| *bytes == rubbish);
        ensure(kept, || format!("{name} was damaged, and what was in it is gone"))?;
        if output.status.success() {
            let now = b.status()?.me.addresses;
            ensure(now == addresses, || format!("{name} was damaged, and the addresses are {now:?}"))?;
            b.run(&["down"])?;
        } else {
            refused(&format!("damaged {name}"), &output, &[&name.to_lowercase()])?;
        }
        for extra in contents(&b.state_dir())?.keys().filter(|name| !whole.contains_key(*name)) {
            fs::remove_file(b.state_dir().join(extra))?;
        }
        for (name, bytes) in &whole {
            fs::write(b.state_dir().join(name), bytes)?;
        }
    }
    b.run(&["up"]).map(drop)
}

fn no_daemon() -> Result<()> {
    let (_lab, [_, b, _]) = lab()?;
    for args in [&["status"][..], &["ping", "a"], &["netcheck"], &["ip"], &["invite"], &["remove", "a"]] {
        let output = b.output(&[args, &["--json"]].concat())?;
        refused(&args.join(" "), &output, &["meshd up"])?;
        ensure(error_of(&output)?["code"] == "not-running", || format!("{args:?}"))?;
    }
    let down = b.output(&["down"])?;
    ensure(down.status.success(), || "down without a daemon is a failure".to_owned())
}

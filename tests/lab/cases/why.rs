//! `meshd why` says what is the matter, from both ends, and what would help.

use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat};
use meshd::wire::local::PeerWhy;

use crate::net::{self, Topology, two_homes};
use crate::runner::{Case, case};
use crate::world::{Node, ensure, error_of, eventually, let_pass};

pub fn cases() -> Vec<Case> {
    vec![
        case("why::direct_names_the_technique", direct),
        case("why::both_random_names_the_port_to_forward", both_random),
        case("why::udp_blocked_on_one_side_is_named_on_both", udp_blocked),
        case("why::a_firewall_between_shows_in_both_ends_evidence", firewall),
        case("why::a_firewall_that_drops_one_way_is_told_from_the_other", one_way),
        case("why::a_peer_that_is_down_or_removed", down_or_removed),
        case("why::no_coordinator", no_coordinator),
    ]
}

fn why(node: &Node, peer: &str) -> Result<PeerWhy> {
    let text = node.run(&["why", peer, "--json"])?;
    serde_json::from_str(text.trim()).with_context(|| text.clone())
}

/// The code, and words of the text that a person reads.
fn says(node: &Node, peer: &str, code: &str, words: &[&str]) -> Result<()> {
    let why = why(node, peer)?;
    let text = node.run(&["why", peer])?;
    println!("{text}");
    ensure(why.code == code, || format!("{} rather than {code}: {why:?}", why.code))?;
    for word in words {
        ensure(text.contains(word), || format!("{word:?} is not in\n{text}"))?;
    }
    Ok(())
}

/// Asked again until it says so: a search takes its time, and what the other end saw comes with its next call.
fn will_say(node: &Node, peer: &str, code: &str, words: &[&str]) -> Result<()> {
    eventually(&format!("why says {code}"), Duration::from_secs(45), || says(node, peer, code, words))
}

fn direct() -> Result<()> {
    let nodes = net::home_nat()?.join()?;
    nodes[0].ping_until_direct("b")?;
    says(
        &nodes[0],
        "b",
        "direct",
        &["b is reached directly at 203.0.113.22:", "(IPv4)", "both sent at the same moment", "evidence"],
    )?;
    let said = why(&nodes[0], "b")?;
    ensure(said.found.is_some_and(|f| f.how == "punch" && f.replaced.as_deref() == Some("relay")), || {
        "how it was found is missing".to_owned()
    })?;
    ensure(said.there.is_some_and(|there| there.port == nodes[1].status().ok().map(|s| s.me.port)), || {
        "the other end has not told its port".to_owned()
    })
}

fn both_random() -> Result<()> {
    let nodes = net::symmetric()?.join()?;
    let port = nodes[0].status()?.me.port;
    let other = nodes[1].status()?.me.port;
    let forward = [
        format!("forward UDP {port} to this machine in its router"),
        format!("forward UDP {other} to b in its router"),
    ];
    let words = ["b is relayed: both NATs pick a new", "for every destination", &forward[0], &forward[1]];
    will_say(&nodes[0], "b", "both-hard", &words)
}

/// Neither side's UDP gets further than this router.
fn block_udp(router: &Namespace) -> Result<()> {
    router.nft("table inet shut {\n chain f {\n type filter hook forward priority -10\n meta l4proto udp drop\n }\n}\n")
}

fn udp_blocked() -> Result<()> {
    let (lab, ra, _) = two_homes(Nat::Home, Nat::Home, Duration::from_millis(20))?;
    block_udp(&ra.namespace)?;
    // Nor does TCP to anybody but the coordinator.
    ra.namespace.nft("table inet shut {\n chain f {\n type filter hook forward priority -10\n iifname \"lan\" meta l4proto tcp ip daddr != 203.0.113.10 drop\n oifname \"lan\" tcp flags & (syn | ack) == syn drop\n }\n}\n")?;
    let nodes = lab.join()?;
    will_say(
        &nodes[0],
        "b",
        "udp-blocked-here",
        &["no UDP gets out of this network", "allow outgoing UDP", "no UDP, "],
    )?;
    will_say(&nodes[1], "a", "udp-blocked-there", &["no UDP gets out of a's network", "a says that no STUN server"])
}

/// Drops UDP between the two routers, at the first, in these directions.
fn cut(router: &Namespace, directions: &[&str]) -> Result<()> {
    let rules: String =
        directions.iter().map(|which| format!(" ip {which} 203.0.113.22 meta l4proto udp drop\n")).collect();
    router.nft(&format!("table inet hole {{\n chain f {{\n type filter hook forward priority -10\n{rules} }}\n}}\n"))
}

fn homes_with_a_cut(directions: &[&str]) -> Result<(Topology, Vec<Node>)> {
    let (lab, ra, _) = two_homes(Nat::Home, Nat::Home, Duration::from_millis(20))?;
    cut(&ra.namespace, directions)?;
    let nodes = lab.join()?;
    Ok((lab, nodes))
}

fn firewall() -> Result<()> {
    let (_lab, nodes) = homes_with_a_cut(&["daddr", "saddr"])?;
    let words = [
        "sent from both sides at the same time, and none arrived",
        "probes sent, 0 answered, 0 of the other side's came in",
        "firewall between",
    ];
    will_say(&nodes[0], "b", "punch-failed", &words)?;
    will_say(&nodes[1], "a", "punch-failed", &words)
}

fn one_way() -> Result<()> {
    let (_lab, nodes) = homes_with_a_cut(&["saddr"])?;
    let port = nodes[0].status()?.me.port;
    let fix = format!("allow incoming UDP to port {port} in the firewall of");
    will_say(
        &nodes[0],
        "b",
        "one-way-out",
        &["our packets arrive at b, but nothing from b arrives here", &format!("{fix} this machine")],
    )?;
    will_say(
        &nodes[1],
        "a",
        "one-way-in",
        &["a's packets arrive here, but ours do not arrive there", &format!("{fix} a")],
    )
}

fn down_or_removed() -> Result<()> {
    let lab = net::public()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    // The coordinator tells who came and went every 250 ms, and of one that did both in between nothing.
    let_pass(Duration::from_millis(500));
    nodes[1].run(&["down"])?;
    will_say(&nodes[0], "b", "peer-offline", &["b is not connected to the coordinator for", "start b"])?;
    nodes[0].run(&["remove", "c"])?;
    eventually("c is out", Duration::from_secs(5), || {
        let error = error_of(&nodes[0].output(&["why", "c", "--json"])?)?;
        ensure(error["code"] == "removed", || error.to_string())
    })?;
    let error = error_of(&nodes[0].output(&["why", "nobody", "--json"])?)?;
    ensure(error["code"] == "no-such-peer", || error.to_string())
}

fn no_coordinator() -> Result<()> {
    let mut lab = net::symmetric()?;
    let nodes = lab.join()?;
    let (code, _) = nodes[0].ping("b", &["-c", "1"])?;
    ensure(code == 0, || "b does not answer".to_owned())?;
    lab.world.coordinator.kill()?;
    will_say(&nodes[0], "b", "coordinator-unreachable", &["there is no way to b now", "not reachable from here"])
}

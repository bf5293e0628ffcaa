use super::*;
use crate::engine::path::reason::behaviour::{ADDRESS_AND_PORT_DEPENDENT, ENDPOINT_INDEPENDENT};

fn nat(mapping: &str) -> NatView {
    NatView {
        mapping: Some(mapping.into()),
        filtering: Some(ADDRESS_AND_PORT_DEPENDENT.into()),
        udp: Some(true),
        ports: None,
    }
}

fn side(mapping: &str, port: u16) -> Side {
    let evidence = Evidence { port: Some(port), v4: Some(true), v6: Some(false), ..Evidence::default() };
    Side { nat: nat(mapping), evidence }
}

/// Relayed, both behind ordinary NATs, the last round failed and showed nothing.
fn facts() -> Facts {
    Facts {
        peer: "nas".into(),
        way: Way::Relay,
        here: side(ENDPOINT_INDEPENDENT, 50_112),
        there: Some(side(ENDPOINT_INDEPENDENT, 40_404)),
        coordinator: true,
        online: true,
        offline_for: None,
        handshake_for: None,
        attempt: Attempt::Failed { full_size_lost: false, heavy: false },
        failures: 2,
        called_in_vain: false,
        next_round: None,
    }
}

fn there(facts: &mut Facts) -> &mut Side {
    facts.there.as_mut().unwrap()
}

fn direct(how: How, attempt: usize) -> Way {
    let before = Some((None, Duration::from_secs(3)));
    Way::Direct { remote: "203.0.113.9:40404".parse().unwrap(), found: Found { how, attempt }, before }
}

type Change = fn(&mut Facts);

/// Cause, what brings it about, and words that must be in the sentence, in the causes and in the fixes.
const TABLE: &[(&str, Change, &str, &str, &str)] = &[
    ("direct", |f| f.way = direct(How::SameNetwork, 0), "directly at 203.0.113.9:40404", "on one network", ""),
    ("direct", |f| f.way = direct(How::OpenAddress, 0), "directly", "forwarded or mapped", ""),
    ("direct", |f| f.way = direct(How::Punch, 1), "(IPv4)", "one attempt had failed", ""),
    ("direct", |f| f.way = direct(How::FreshPort, 2), "directly", "replaced the relay, in use for 3 s", ""),
    ("direct", |f| f.way = direct(How::ManyPorts, 0), "directly", "many ports were tried", ""),
    ("idle", |f| f.way = Way::Idle, "nothing has gone to nas lately", "first packet", ""),
    (
        "coordinator-unreachable",
        |f| {
            f.way = Way::Nowhere;
            f.coordinator = false;
            f.online = false;
        },
        "no way to nas",
        "not reachable from here",
        "meshd status",
    ),
    ("relay-unreachable", |f| f.way = Way::Nowhere, "no relay", "its relay does not", "meshd status"),
    (
        "peer-offline",
        |f| {
            f.online = false;
            f.offline_for = Some(Duration::from_secs(300));
            f.handshake_for = Some(Duration::from_secs(9));
        },
        "nas is not connected to the coordinator for 5 min",
        "unanswered for 9 s",
        "start nas",
    ),
    (
        "no-session",
        |f| f.handshake_for = Some(Duration::from_secs(12)),
        "nas does not answer: the handshake with it has been unanswered for 12 s",
        "so it runs",
        "clocks",
    ),
    ("udp-blocked-here", |f| f.here.nat.udp = Some(false), "no UDP gets out of this network", "STUN", "3478"),
    ("udp-blocked-there", |f| there(f).nat.udp = Some(false), "no UDP gets out of nas's network", "nas says", "3478"),
    ("not-answered", |f| f.there = None, "has not told its addresses", "", ""),
    ("not-answered", |f| f.attempt = Attempt::Waiting, "has not answered with its addresses", "2 attempts", ""),
    ("not-answered", |f| f.called_in_vain = true, "did not answer the last call", "2 attempts", "meshd status"),
    ("trying", |f| f.attempt = Attempt::Running, "is being tried", "2 attempts have failed", ""),
    (
        "no-common-family",
        |f| (there(f).evidence.v4, there(f).evidence.v6) = (Some(false), Some(true)),
        "this machine has IPv4 only, and nas has IPv6 only",
        "do not reach",
        "give this machine IPv6, or nas IPv4",
    ),
    (
        "both-hard",
        |f| {
            f.here.nat = nat(ADDRESS_AND_PORT_DEPENDENT);
            there(f).nat = nat(ADDRESS_AND_PORT_DEPENDENT);
            f.here.nat.ports = Some(PortModel::Random);
            there(f).nat.ports = Some(PortModel::Random);
            f.here.evidence.mapper = Mapper::Absent;
            f.attempt = Attempt::Failed { full_size_lost: false, heavy: true };
            f.next_round = Some(Duration::from_secs(600));
        },
        "both NATs pick a new random port for every destination",
        "your router maps no port when asked (UPnP, NAT-PMP, PCP)",
        "forward UDP 50112 to this machine in its router (`meshd up --port 50112` keeps the port), or switch on UPnP",
    ),
    (
        "hard-here",
        |f| {
            f.here.nat = nat(ADDRESS_AND_PORT_DEPENDENT);
            f.next_round = Some(Duration::from_secs(600));
        },
        "the NAT here picks a new port for every destination, and nas's lets in only ports",
        "in 10 min, or as soon as what is known of either NAT changes",
        "forward UDP 50112 to this machine",
    ),
    (
        "hard-there",
        |f| {
            there(f).nat = nat(ADDRESS_AND_PORT_DEPENDENT);
            there(f).nat.ports = Some(PortModel::Sequential { step: 1, per_second: 3 });
            there(f).evidence.mapper = Mapper::Found;
        },
        "nas's NAT picks the next port in a row",
        "nas's router has mapped a port, but it was not reached",
        "forward UDP 40404 to nas in its router",
    ),
    (
        "full-size-lost",
        |f| f.attempt = Attempt::Failed { full_size_lost: true, heavy: false },
        "loses packets of full size",
        "small probes came back",
        "MTU",
    ),
    (
        "punch-failed",
        |f| {
            f.here.evidence.seen = Some(Seen { sent: 8, answered: 0, heard: 0 });
            there(f).evidence.seen = Some(Seen { sent: 7, answered: 0, heard: 0 });
            f.next_round = Some(Duration::from_secs(8));
        },
        "sent from both sides at the same time, and none arrived",
        "nas: 7 probes sent, 0 answered, 0 of the other side's came in",
        "firewall between",
    ),
    (
        "one-way-in",
        |f| {
            f.here.evidence.seen = Some(Seen { sent: 8, answered: 0, heard: 5 });
            there(f).evidence.seen = Some(Seen { sent: 7, answered: 0, heard: 0 });
        },
        "nas's packets arrive here, but ours do not arrive there",
        "here: 8 probes sent, 0 answered, 5 of the other side's came in",
        "allow incoming UDP to port 40404 in the firewall of nas",
    ),
    (
        "one-way-out",
        |f| {
            f.here.evidence.seen = Some(Seen { sent: 8, answered: 0, heard: 0 });
            there(f).evidence.seen = Some(Seen { sent: 7, answered: 0, heard: 6 });
        },
        "our packets arrive at nas, but nothing from nas arrives here",
        "6 of the other side's came in",
        "allow incoming UDP to port 50112 in the firewall of this machine",
    ),
    (
        "answers-lost",
        |f| {
            f.here.evidence.seen = Some(Seen { sent: 8, answered: 0, heard: 2 });
            there(f).evidence.seen = Some(Seen { sent: 7, answered: 0, heard: 6 });
        },
        "their answers do not come back",
        "2 attempts have failed",
        "netcheck",
    ),
];

#[test]
fn every_cause_is_named_with_its_fix() {
    for (code, change, text, because, fix) in TABLE {
        let mut facts = facts();
        change(&mut facts);
        let said = facts.explain();
        assert_eq!(said.code, *code, "{said:?}");
        assert!(said.text.contains(text), "{code}: {:?}", said.text);
        let (causes, fixes) = (said.because.join(". "), said.fix.join(". "));
        assert!(causes.contains(because), "{code}: {causes:?} lacks {because:?}");
        assert!(fixes.contains(fix), "{code}: {fixes:?} lacks {fix:?}");
        // What works needs no fix; what waits needs patience only.
        let helpless = ["direct", "idle", "trying", "not-answered"].contains(code);
        assert!(helpless || !said.fix.is_empty(), "{code} names no fix");
    }
}

#[test]
fn a_mapped_port_is_not_asked_for() {
    let mut facts = facts();
    facts.here.nat = nat(ADDRESS_AND_PORT_DEPENDENT);
    facts.here.evidence.mapper = Mapper::Found;
    assert!(!facts.explain().fix[0].contains("UPnP"));
}

#[test]
fn one_sided_evidence_blames_nobody() {
    let mut facts = facts();
    facts.here.evidence.seen = Some(Seen { sent: 8, answered: 0, heard: 4 });
    // An older peer tells nothing of what it saw.
    assert_eq!(facts.explain().code, "punch-failed");
}

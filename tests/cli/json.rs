//! The documents scripts read: their fields may grow in number, never change their names.
//!
//! A daemon of straw answers on a socket, so that every command's document is made by the real program.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::process::Output;

use meshd::wire::local::{
    AliasChange, CounterValue, CounterValues, DnsChange, DnsChanges, DnsKind, DnsLine, DnsList, Drained, DrainedRoute,
    DropCount, Health, Netcheck, NetcheckServer, PathKind, PeerWhy, Pong, PortMapper, PortMapperProtocol, Problem,
    Punching, Removed, Request, Response, RouteChange, RouteLine, RouteList, RoutePlace, RouteProbe, RouteState,
    SettingsDocument, Severity, Status, StatusCoordinator, StatusNat, StatusNetwork, StatusPath, StatusPeer,
    StatusSelf, TokenReply, WhyFound, WhySide,
};
use meshd::wire::nat::{Mapper, PortModel, Seen, UdpLifetime};

use crate::snapshot::{assert_snapshot, meshd, transcript};

/// Runs a command against a daemon that gives these answers to one call. Returns the call too.
fn with_daemon(args: &[&str], answers: &[Response]) -> (Output, String) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("meshd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        let daemon = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            serde_json::from_str::<Request>(&line).unwrap();
            for answer in answers {
                stream.write_all((serde_json::to_string(answer).unwrap() + "\n").as_bytes()).unwrap();
            }
            line
        });
        let output = meshd(args).arg("--socket").arg(&socket).output().unwrap();
        (output, daemon.join().unwrap())
    })
}

fn check(name: &str, args: &[&str], answers: &[Response]) {
    let mut text = String::new();
    for form in [&[][..], &["--json"]] {
        let args = [args, form].concat();
        let (output, call) = with_daemon(&args, answers);
        text.push_str(&format!("{}\n", transcript(&args, &output)));
        if form.is_empty() {
            text.push_str(&format!("(asked: {})\n\n", call.trim()));
        }
    }
    assert_snapshot(name, &text);
}

fn status() -> Status {
    let path = |kind, endpoint: Option<&str>, rtt_ms, reason: Option<&str>| StatusPath {
        kind,
        endpoint: endpoint.map(str::to_owned),
        rtt_ms,
        since_s: rtt_ms.map(|_| 63),
        reason: reason.map(str::to_owned),
        mtu: rtt_ms.map(|_| if kind == PathKind::Direct { 1420 } else { 1280 }),
        tcp: (kind == PathKind::Direct).then_some(false),
    };
    let peer = |name: &str, number: u8, online, path| StatusPeer {
        name: name.to_owned(),
        id: format!("bb2200000000000{number}"),
        addresses: vec![format!("100.71.0.{number}").parse().unwrap(), format!("fd00::{number}").parse().unwrap()],
        routes: vec![],
        online,
        path,
        rx_bytes: 123_456,
        tx_bytes: 789,
        last_handshake_s: Some(12),
    };
    Status {
        schema: 1,
        state: "running".to_owned(),
        network: StatusNetwork { name: "home".to_owned(), id: "00112233445566778899".repeat(3) },
        me: StatusSelf {
            name: "laptop".to_owned(),
            id: "aa11000000000000".to_owned(),
            addresses: vec!["100.71.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            routes: vec![],
            version: "0.1.0".to_owned(),
            admin: true,
            interface: "mesh0".to_owned(),
            port: 40_000,
        },
        coordinator: StatusCoordinator {
            url: "https://vpn.example.org".to_owned(),
            connected: false,
            last_heard_s: Some(75.4),
            relay_connected: false,
            relay: None,
            proxy: Some("http://proxy.example.org:3128".to_owned()),
            problem: Some(Problem {
                code: "proxy-auth-needed".to_owned(),
                text: "the proxy wants a name and a password".to_owned(),
                hint: "give them".to_owned(),
            }),
        },
        nat: StatusNat {
            udp: Some(true),
            mapping: Some("endpoint-independent".to_owned()),
            filtering: Some("address-and-port-dependent".to_owned()),
            port_model: None,
            reflexive: vec!["203.0.113.7:50112".parse().unwrap()],
            port_mapping: None,
            punching: Some(Punching {
                sockets_max: 512,
                probes_per_second_max: 1000,
                entries_per_minute_max: 4000,
                probes: 28,
                entries_last_minute: 3,
                ..Punching::default()
            }),
            udp_lifetime: None,
        },
        peers: vec![
            peer("nas", 2, true, path(PathKind::Direct, Some("198.51.100.4:38220"), Some(11.8), None)),
            peer(
                "phone",
                3,
                true,
                path(PathKind::Relay, Some("https://vpn.example.org"), Some(31.0), Some("both NATs are symmetric")),
            ),
            peer("tv", 4, false, path(PathKind::None, None, None, None)),
        ],
        health: vec![Health {
            code: "coordinator-unreachable".to_owned(),
            severity: Severity::Warning,
            text: "the coordinator does not answer".to_owned(),
            hint: "check that it runs".to_owned(),
            since_s: 70,
        }],
    }
}

fn pong(seq: u32, answered: bool, path: PathKind, endpoint: &str, rtt_ms: f64) -> Response {
    Response::Pong(Pong {
        schema: 1,
        seq,
        peer: "nas".to_owned(),
        address: "100.71.0.2".parse().unwrap(),
        answered,
        path,
        endpoint: answered.then(|| endpoint.to_owned()),
        tcp: (answered && path == PathKind::Direct).then_some(false),
        rtt_ms: answered.then_some(rtt_ms),
    })
}

#[test]
fn status_document() {
    check("status", &["status"], &[Response::Status(Box::new(status())), Response::Done]);
}

#[test]
fn status_checks() {
    let answers = [Response::Status(Box::new(status())), Response::Done];
    check("status-live", &["status", "--check", "live"], &answers);
    check("status-ready", &["status", "--check", "ready"], &answers);
}

#[test]
fn drops_document() {
    let count =
        |reason: &str, packets, text: &str| DropCount { reason: reason.to_owned(), packets, text: text.to_owned() };
    let drops = [count("no-route", 3, "no peer owns the destination address"), count("replayed", 0, "seen before")];
    check("drops", &["status", "--drops"], &[Response::Drops(drops.into_iter().collect()), Response::Done]);
}

#[test]
fn counters_document() {
    let counters = [("udp-out-trains", 7, "trains that went as one"), ("turns", 0, "turns of the packet loop")]
        .map(|(name, value, text)| CounterValue { name: name.to_owned(), value, text: text.to_owned() });
    let values = CounterValues { schema: 1, counters: counters.to_vec() };
    check("counters", &["status", "--counters"], &[Response::Counters(values), Response::Done]);
}

#[test]
fn ping_documents_and_exit_codes() {
    let relay = pong(1, true, PathKind::Relay, "coordinator", 31.2);
    let direct = pong(2, true, PathKind::Direct, "203.0.113.9:50112", 12.4);
    let lost = pong(1, false, PathKind::None, "", 0.0);
    check("ping", &["ping", "nas"], &[relay.clone(), direct, Response::Done]);
    check("ping-relay-only", &["ping", "--until-direct", "nas"], &[relay, Response::Done]);
    check("ping-lost", &["ping", "-c", "1", "nas"], &[lost, Response::Done]);
    let unknown = Problem {
        code: "unknown-peer".to_owned(),
        text: "no node in this network is called \"nsa\"".to_owned(),
        hint: "did you mean nas?".to_owned(),
    };
    check("ping-unknown", &["ping", "nsa"], &[Response::Error(unknown)]);
}

#[test]
fn netcheck_document() {
    let report = Netcheck {
        schema: 1,
        udp: true,
        reflexive: vec!["203.0.113.7:50112".parse().unwrap()],
        mapping: Some("endpoint-independent".to_owned()),
        filtering: None,
        port_model: Some(PortModel::Preserving),
        hairpin: Some(false),
        double_nat: None,
        nat_depth: Some(1),
        port_mapping: None,
        ipv6: false,
        servers: vec![
            NetcheckServer {
                server: "198.51.100.1:3478".parse().unwrap(),
                rtt_ms: Some(21.0),
                reflexive: Some("203.0.113.7:50112".parse().unwrap()),
            },
            NetcheckServer { server: "198.51.100.2:3478".parse().unwrap(), rtt_ms: None, reflexive: None },
        ],
        coordinator_rtt_ms: Some(20.4),
        relay_rtt_ms: None,
        meaning: "Most peers will be reached directly.".to_owned(),
        punching: Some(Punching { probes: 28, probes_per_second_max: 1000, ..Punching::default() }),
        port_mapper: Some(port_mapper(Some("203.0.113.7:50112"))),
        udp_lifetime: Some(UdpLifetime { at_least_s: 20, less_than_s: Some(35) }),
    };
    check("netcheck", &["netcheck"], &[Response::Netcheck(Box::new(report.clone())), Response::Done]);
    let refused = Netcheck { port_mapper: Some(port_mapper(None)), ..report };
    check("netcheck-not-mapped", &["netcheck"], &[Response::Netcheck(Box::new(refused)), Response::Done]);
}

fn port_mapper(external: Option<&str>) -> PortMapper {
    let protocol = |name: &str, state: &str, text: Option<&str>| PortMapperProtocol {
        name: name.to_owned(),
        state: state.to_owned(),
        text: text.map(ToOwned::to_owned),
    };
    let common = PortMapper {
        enabled: true,
        gateway: Some("192.168.1.1".parse().unwrap()),
        internal_port: 50_112,
        ..PortMapper::default()
    };
    match external {
        Some(external) => PortMapper {
            protocol: Some("pcp".to_owned()),
            external: Some(external.parse().unwrap()),
            lifetime_s: Some(7_200),
            expires_s: Some(7_000),
            protocols: vec![
                protocol("pcp", "granted", None),
                protocol("nat-pmp", "answers", None),
                protocol("upnp", "silent", None),
            ],
            ..common
        },
        None => PortMapper {
            protocols: vec![
                protocol("pcp", "refused", Some("it does not allow it")),
                protocol("nat-pmp", "silent", None),
                protocol("upnp", "silent", None),
            ],
            reason: Some("the router refuses".to_owned()),
            ..common
        },
    }
}

#[test]
fn ip_documents() {
    let answers = [Response::Status(Box::new(status())), Response::Done];
    check("ip", &["ip"], &answers);
    check("ip-peer", &["ip", "-4", "nas"], &answers);
    check("ip-by-id", &["ip", "-6", "bb22000000000003"], &answers);
    check("ip-ambiguous", &["ip", "bb22"], &answers);
    check("ip-unknown", &["ip", "nsa"], &answers);
}

#[test]
fn dns_documents() {
    let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<_>>();
    let line = |kind, name: &str, addresses: &[&str], at: Option<&str>, here: &[&str], why: Option<&str>| DnsLine {
        kind,
        name: name.to_owned(),
        addresses: ips(addresses),
        at: at.map(str::to_owned),
        here: ips(here),
        why: why.map(str::to_owned),
    };
    let names = vec![
        line(DnsKind::Name, "nas.home", &["192.168.1.10", "fd00:9::10"], None, &["192.168.1.10", "fd00:9::10"], None),
        line(DnsKind::Name, "tv.home.internal", &["192.168.1.20"], None, &[], Some("the node tv goes before it")),
    ];
    let splits = vec![line(DnsKind::Split, "corp.example", &["10.0.0.53"], Some("gate"), &["10.0.0.53"], None)];
    check("dns", &["dns"], &[Response::Dns(DnsList { schema: 1, names, splits }), Response::Done]);
    let none = DnsList { schema: 1, names: vec![], splits: vec![] };
    check("dns-none", &["dns", "list"], &[Response::Dns(none), Response::Done]);
    let change = |kind, name: &str, addresses: &[&str], already, note: Option<&str>| {
        let (name, note) = (name.to_owned(), note.map(str::to_owned));
        let change = DnsChange { kind, name, addresses: ips(addresses), at: None, already, replaced: already, note };
        [Response::DnsChanged(DnsChanges { schema: 1, changes: vec![change] }), Response::Done]
    };
    let note = "github.com may be somebody's on the Internet; all nodes of this network get this address now";
    let added = change(DnsKind::Name, "github.com", &["10.0.0.1"], false, Some(note));
    check("dns-add", &["dns", "add", "github.com", "10.0.0.1"], &added);
    let split = change(DnsKind::Split, "corp.example", &["10.0.0.53"], false, None);
    check("dns-split", &["dns", "split", "corp.example", "10.0.0.53"], &split);
    let gone = change(DnsKind::Name, "nas.home", &[], false, None);
    check("dns-remove", &["dns", "remove", "nas.home"], &gone);
}

#[test]
fn routes_documents() {
    let line = |prefix: &str, node: &str, state, via: Option<&str>, why: Option<&str>| RouteLine {
        prefix: prefix.parse().unwrap(),
        node: node.to_owned(),
        id: "bb22000000000002".to_owned(),
        state,
        place: None,
        via: via.map(str::to_owned),
        why: why.map(str::to_owned),
        alias: None,
    };
    let approve = "no admin has approved it: `meshd routes approve nas 10.0.0.0/24`";
    let placed = |place, route: RouteLine| RouteLine { place: Some(place), ..route };
    let (shadowed, in_it) = (RouteState::Shadowed, Some("eth0 is in 192.168.8.0/24 itself"));
    let routes = vec![
        line("10.0.0.0/24", "nas", RouteState::Pending, None, Some(approve)),
        line("192.168.1.0/24", "nas", RouteState::Active, Some("nas"), None),
        line("192.168.1.0/24", "spare", RouteState::Approved, Some("nas"), Some("nas is asked for it")),
        line("192.168.7.0/24", "office", RouteState::Shadowed, None, Some("eth0 is in 192.168.7.0/24")),
        placed(RoutePlace::Home, line("192.168.8.0/24", "shop", shadowed, None, in_it)),
        placed(RoutePlace::Away, line("192.168.8.0/25", "barn", shadowed, None, in_it)),
    ];
    check("routes", &["routes"], &[Response::Routes(RouteList { schema: 1, routes }), Response::Done]);
    let with = |node: &str, third: u8| RouteLine {
        alias: Some(format!("100.99.{third}.0/24").parse().unwrap()),
        ..line("192.168.1.0/24", node, RouteState::Approved, None, Some("several networks have these numbers"))
    };
    let routes =
        vec![line("10.0.0.0/24", "nas", RouteState::Active, Some("nas"), None), with("one", 1), with("two", 2)];
    check("routes-aliases", &["routes"], &[Response::Routes(RouteList { schema: 1, routes }), Response::Done]);
    let aliased = AliasChange {
        schema: 1,
        prefix: "192.168.1.0/24".parse().unwrap(),
        node: "nas".to_owned(),
        id: "bb22000000000002".to_owned(),
        alias: Some("100.99.1.0/24".parse().unwrap()),
        already: false,
        note: Some("spare has the same alias: both lead to one network".to_owned()),
    };
    check(
        "routes-alias",
        &["routes", "alias", "nas", "192.168.1.0/24"],
        &[Response::AliasChanged(aliased), Response::Done],
    );
    let empty = RouteList { schema: 1, routes: vec![] };
    check("routes-none", &["routes"], &[Response::Routes(empty), Response::Done]);
    let change = |approved, already, note: Option<&str>| RouteChange {
        schema: 1,
        prefix: "10.0.0.0/24".parse().unwrap(),
        node: "nas".to_owned(),
        id: "bb22000000000002".to_owned(),
        approved,
        already,
        note: note.map(str::to_owned),
    };
    let noted = change(true, false, Some("nas does not advertise 10.0.0.0/24 yet"));
    check(
        "routes-approve",
        &["routes", "approve", "nas", "10.0.0.0/24"],
        &[Response::RouteChanged(noted), Response::Done],
    );
    let taken = change(false, false, None);
    check(
        "routes-revoke",
        &["routes", "revoke", "nas", "10.0.0.0/24"],
        &[Response::RouteChanged(taken), Response::Done],
    );
}

#[test]
fn settings_document() {
    let settings = SettingsDocument {
        schema: 1,
        advertise_routes: vec!["192.168.1.0/24".parse().unwrap()],
        advertise_exit_node: false,
        accept_routes: true,
        accept_dns: true,
        snat: true,
        exit_node: Some("gate".to_owned()),
        exit_node_allow_lan_access: true,
        kill_switch: false,
        relay: true,
        relay_rate: 10_000_000,
        on_event: None,
        drain: true,
        probes: vec![RouteProbe { prefix: "192.168.1.0/24".parse().unwrap(), target: "192.168.1.10".parse().unwrap() }],
        reverts_in_s: Some(59),
        notes: vec!["laptop advertises 192.168.1.0/24, and no admin has approved it".to_owned()],
    };
    let args = ["set", "--exit-node", "gate", "--confirm", "60s"];
    check("set", &args, &[Response::Settings(settings.clone()), Response::Done]);
    let kept = SettingsDocument { reverts_in_s: None, notes: vec![], ..settings };
    check("set-confirm", &["set", "--confirm"], &[Response::Settings(kept), Response::Done]);
}

#[test]
fn drain_document() {
    let drained = |draining, already, routes: &[(&str, &[&str])]| Drained {
        schema: 1,
        draining,
        already,
        routes: routes
            .iter()
            .map(|(prefix, others)| DrainedRoute {
                prefix: prefix.parse().unwrap(),
                others: others.iter().map(|name| (*name).to_owned()).collect(),
            })
            .collect(),
    };
    let routes: [(&str, &[&str]); 2] = [("192.168.1.0/24", &["spare", "gate"]), ("10.0.0.0/24", &[])];
    check("drain", &["drain"], &[Response::Drained(drained(true, false, &routes)), Response::Done]);
    let none = [Response::Drained(drained(true, true, &[])), Response::Done];
    check("drain-nothing", &["drain", "on"], &none);
    check("drain-off", &["drain", "off"], &[Response::Drained(drained(false, false, &routes)), Response::Done]);
}

#[test]
fn invite_remove_down_version() {
    let token = TokenReply {
        schema: 1,
        token: "meshd-invite1-abcdef".to_owned(),
        invite: "ee".repeat(32),
        uses: 1,
        expires: 1_800_000_000,
    };
    check("invite", &["invite", "--name", "nas", "--expires", "1h30m"], &[Response::Token(token), Response::Done]);
    let removed = Removed { schema: 1, name: "phone".to_owned(), id: "bb22000000000003".to_owned() };
    check("remove", &["remove", "phone"], &[Response::Removed(removed), Response::Done]);
    check("down", &["down"], &[Response::Done]);
    let text: Vec<String> = [&["version"][..], &["version", "--json"], &["--version"]]
        .iter()
        .map(|args| transcript(args, &meshd(args).output().unwrap()))
        .collect();
    assert_snapshot("version", &text.join("\n"));
}

fn why_side(port: u16) -> WhySide {
    WhySide {
        udp: Some(true),
        mapping: Some("address-and-port-dependent".to_owned()),
        filtering: Some("address-and-port-dependent".to_owned()),
        port_model: Some(PortModel::Random),
        port_mapping: Mapper::Absent,
        port: Some(port),
        ipv4: Some(true),
        ipv6: Some(false),
        last_attempt: Some(Seen { sent: 1041, answered: 0, heard: 0 }),
    }
}

#[test]
fn why_documents() {
    let relayed = PeerWhy {
        schema: 1,
        peer: "nas".to_owned(),
        id: "bb22000000000002".to_owned(),
        online: true,
        path: StatusPath {
            kind: PathKind::Relay,
            endpoint: Some("https://vpn.example.org".to_owned()),
            rtt_ms: Some(61.5),
            since_s: Some(63),
            reason: Some("both NATs pick a new port for every destination".to_owned()),
            mtu: Some(1280),
            tcp: None,
        },
        code: "both-hard".to_owned(),
        text: "nas is relayed: both NATs pick a new random port for every destination".to_owned(),
        because: vec!["your router maps no port when asked (UPnP, NAT-PMP, PCP)".to_owned()],
        fix: vec!["forward UDP 50112 to this machine in its router".to_owned()],
        found: None,
        failed: 3,
        next_attempt_s: Some(540),
        here: why_side(50_112),
        there: Some(why_side(40_404)),
    };
    check("why", &["why", "nas"], &[Response::Why(Box::new(relayed.clone())), Response::Done]);
    let direct = PeerWhy {
        path: StatusPath {
            kind: PathKind::Direct,
            endpoint: Some("203.0.113.9:40404".to_owned()),
            rtt_ms: Some(40.2),
            since_s: Some(4),
            reason: None,
            mtu: Some(1420),
            tcp: Some(false),
        },
        code: "direct".to_owned(),
        text: "nas is reached directly at 203.0.113.9:40404 (IPv4)".to_owned(),
        because: vec!["it replaced the relay, in use for 3 s".to_owned()],
        fix: vec![],
        found: Some(WhyFound { how: "punch".to_owned(), failed_before: 0, replaced: Some("relay".to_owned()) }),
        failed: 0,
        next_attempt_s: None,
        there: None,
        ..relayed
    };
    check("why-direct", &["why", "nas"], &[Response::Why(Box::new(direct)), Response::Done]);
}

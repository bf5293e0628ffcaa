//! Golden bytes: what STUN, path probes, sealed peer messages and relay datagrams look like on the wire.
//!
//! `tests/vectors/<protocol>/v<N>/<message>.hex` holds the bytes, the `.json` beside it what they say. Old bytes must
//! decode for as long as their version is supported, and today's values must encode to today's bytes. To change a vector
//! is to change the protocol: it needs a line in the changelog. `MESHD_WRITE_VECTORS=1 cargo test --test vectors_wire`
//! writes them anew.

#![expect(clippy::disallowed_methods, reason = "reads files and one environment variable")]

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::wire::keys::WgKey;
use meshd::wire::nat::{Mapper, Seen};
use meshd::wire::probe::{self, Candidate, CandidateKind, MessageKind, PeerMessage, ProbeKeys};
use meshd::wire::relay_udp::{self, HEADER, Header, Kind, Name, SessionSecret, Wish};
use meshd::wire::stun::{self, Change, ServerLayout, TransactionId};
use serde_json::{Value, json};

const TXID: TransactionId = TransactionId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
const NONCE: [u8; 24] = [0x5A; 24];

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(32) {
        for byte in line {
            write!(text, "{byte:02x}").expect("a string takes everything");
        }
        text.push('\n');
    }
    text
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).expect("a digit")).collect();
    digits.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect()
}

/// Compares the committed bytes with `bytes` and the committed meaning with `says`; returns the committed bytes.
fn golden(name: &str, bytes: &[u8], says: &Value) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    let (hex_file, json_file) = (path.with_extension("hex"), path.with_extension("json"));
    if std::env::var("MESHD_WRITE_VECTORS").is_ok() {
        fs::create_dir_all(path.parent().expect("has a folder")).expect("folder");
        fs::write(&hex_file, hex(bytes)).expect("write");
        fs::write(&json_file, serde_json::to_string_pretty(says).expect("json") + "\n").expect("write");
    }
    let read = |file: &PathBuf| fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let committed = unhex(&read(&hex_file));
    assert_eq!(hex(&committed), hex(bytes), "{name}: these bytes are promised to stay as they are");
    let meaning: Value = serde_json::from_str(&read(&json_file)).expect("json");
    assert_eq!(&meaning, says, "{name}");
    committed
}

fn node(n: u8) -> (Secret32, WgKey) {
    let keys =
        NodeKeys { identity: Secret32::new([0; 32]), wg: Secret32::new([n; 32]), control: Secret32::new([0; 32]) };
    let public = keys.wg_key();
    (keys.wg, public)
}

/// What node 1 shares with node 2, and node 2 with node 1. A node's secret key is 32 times its number.
fn pair() -> (ProbeKeys, ProbeKeys) {
    let ((one, one_public), (two, two_public)) = (node(1), node(2));
    (
        ProbeKeys::derive(&one, &one_public, &two_public).expect("good keys"),
        ProbeKeys::derive(&two, &two_public, &one_public).expect("good keys"),
    )
}

#[test]
fn stun_v1() {
    let four = ["203.0.113.1:3478", "203.0.113.1:3479", "203.0.113.2:3478", "203.0.113.2:3479"];
    let layout = ServerLayout { endpoints: four.map(address).to_vec() };
    let source = "198.51.100.7:50000";
    let answer =
        |request: &[u8]| stun::answer(request, address(source), layout.endpoints[0], &layout).expect("an answer");

    let plain = golden(
        "stun/v1/binding-request",
        &stun::binding_request(&TXID, Change::default()),
        &json!({"binding": "request", "change": null}),
    );
    let response = golden(
        "stun/v1/binding-response",
        &answer(&plain).bytes,
        &json!({"binding": "success", "mapped": source, "other": four[3], "origin": four[0]}),
    );
    let decoded = stun::decode_binding_response(&response).expect("decodes");
    assert_eq!((decoded.txid, decoded.mapped), (TXID, address(source)));
    assert_eq!((decoded.other, decoded.origin), (Some(address(four[3])), Some(address(four[0]))));

    let change = golden(
        "stun/v1/binding-request-change",
        &stun::binding_request(&TXID, Change { ip: true, port: true }),
        &json!({"binding": "request", "change": ["ip", "port"]}),
    );
    assert_eq!(answer(&change).send_from, address(four[3]));

    let six = ServerLayout { endpoints: vec![address("[2001:db8::1]:3478")] };
    let source6 = "[2001:db8:7::7]:50000";
    let answer6 = stun::answer(&plain, address(source6), six.endpoints[0], &six).expect("an answer");
    let response6 = golden(
        "stun/v1/binding-response-ipv6",
        &answer6.bytes,
        &json!({"binding": "success", "mapped": source6, "other": null, "origin": "[2001:db8::1]:3478"}),
    );
    assert_eq!(stun::decode_binding_response(&response6).expect("decodes").mapped, address(source6));

    let refused =
        stun::answer(&change, address(source), layout.endpoints[0], &ServerLayout::default()).expect("refusal");
    let refusal = golden(
        "stun/v1/binding-error",
        &refused.bytes,
        &json!({"binding": "error", "code": 420, "unknown": ["CHANGE-REQUEST"]}),
    );
    assert_eq!(stun::decode_binding_response(&refusal), Err(stun::StunError::Refused { txid: TXID, code: 420 }));

    // RFC 3489, as Debian's `stun` sends it: type, length, 16 bytes of id, CHANGE-REQUEST without flags.
    let mut classic = vec![0, 1, 0, 8];
    classic.extend_from_slice(&[0x33; 16]);
    classic.extend_from_slice(&[0, 3, 0, 4, 0, 0, 0, 0]);
    let classic = golden("stun/v1/classic-request", &classic, &json!({"binding": "request", "change": []}));
    golden(
        "stun/v1/classic-response",
        &answer(&classic).bytes,
        &json!({"binding": "success", "mapped": source, "changed": four[3], "source": four[0]}),
    );
}

#[test]
fn probe_v1() {
    let (one, two) = pair();
    let request = golden(
        "probe/v1/request",
        &probe::encode_request(&one, &TXID, None),
        &json!({"probe": "request", "from": 1, "to": 2, "padded_to": null}),
    );
    assert_eq!(probe::name_of(&request), Some(two.inbound_name()));
    assert_eq!(probe::decode_request(&two, &request).map(|r| r.txid), Ok(TXID));

    let padded = golden(
        "probe/v1/request-padded",
        &probe::encode_request(&one, &TXID, Some(256)),
        &json!({"probe": "request", "from": 1, "to": 2, "padded_to": 256}),
    );
    assert_eq!(probe::decode_request(&two, &padded).map(|r| r.len), Ok(256));

    for (name, observed) in [("response", "198.51.100.7:50000"), ("response-ipv6", "[2001:db8:7::7]:50000")] {
        let response = golden(
            &format!("probe/v1/{name}"),
            &probe::encode_response(&two, &TXID, address(observed), None),
            &json!({"probe": "response", "from": 2, "to": 1, "observed": observed}),
        );
        let decoded = probe::decode_response(&one, &response).expect("decodes");
        assert_eq!((decoded.txid, decoded.observed), (TXID, address(observed)));
    }
}

#[test]
fn sealed_v1() {
    let (one, two) = pair();
    let full = PeerMessage {
        v: 1,
        n: 1_700_000_000_000_001,
        kind: MessageKind::Call,
        round: 4,
        t: Some(99),
        echo: Some(98),
        candidates: vec![
            Candidate { addr: address("192.168.1.5:41641"), kind: CandidateKind::Host },
            Candidate { addr: address("198.51.100.7:50000"), kind: CandidateKind::Reflexive },
            Candidate { addr: address("[2001:db8::5]:41641"), kind: CandidateKind::Mapped },
        ],
        mapping: Some("endpoint-independent".to_owned()),
        filtering: Some("address-and-port-dependent".to_owned()),
        udp: Some(true),
        ..PeerMessage::default()
    };
    let evidence = PeerMessage {
        port: Some(41_641),
        mapper: Mapper::Absent,
        seen: Some(Seen { sent: 8, answered: 0, heard: 3 }),
        kind: MessageKind::Answer,
        n: 4,
        ..full.clone()
    };
    let short = PeerMessage { v: 1, n: 2, kind: MessageKind::Go, ..PeerMessage::default() };
    let answer = PeerMessage { v: 1, n: 3, kind: MessageKind::Answer, udp: Some(false), ..PeerMessage::default() };
    for (name, message) in [("call", full), ("go", short), ("answer", answer), ("answer-with-evidence", evidence)] {
        let says = json!({"from": 1, "to": 2, "nonce": "5a, 24 times", "message": message});
        let sealed = golden(&format!("sealed/v1/{name}"), &probe::seal(&one, &message, NONCE), &says);
        assert_eq!(probe::sealed_name(&sealed), Some(two.inbound_name()));
        assert_eq!(probe::open(&two, &sealed), Ok(message));
    }
}

#[test]
fn relay_udp_v1() {
    let keys = SessionSecret::new(std::array::from_fn(|i| u8::try_from(i).expect("32 are few"))).keys();
    let (peer, session) = (Name::of(&node(2).1), 0x0001_0203);
    let data = [&[4, 0, 0, 0, 9, 9, 9, 9, 1, 0, 0, 0, 0, 0, 0, 0][..], &[0x77; 16]].concat();
    let cases: [(&str, Kind, u64, Name, &[u8]); 6] = [
        ("send", Kind::Send, 1, peer, &data),
        ("send-empty", Kind::Send, relay_udp::MAX_COUNTER, peer, &[]),
        ("recv", Kind::Recv, 2, peer, &data),
        ("gone", Kind::Gone, 3, peer, &[]),
        ("ping", Kind::Ping, 4, Wish::DeliverHere.name(), b"12345678 and padding"),
        ("pong", Kind::Pong, 5, Wish::DeliverElsewhere.name(), b"12345678"),
    ];
    for (file, kind, counter, name, payload) in cases {
        let header = Header { kind, counter, session, name };
        let key = if matches!(kind, Kind::Send | Kind::Ping) { &keys.up } else { &keys.down };
        let mut datagram = [&[0; HEADER][..], payload].concat();
        key.seal(&header, &mut datagram);
        let says = json!({
            "kind": format!("{kind:?}"), "counter": counter, "session": session, "name": hex(&name.0).trim_end(),
            "secret": "00 01 02 … 1f", "payload": hex(payload).trim_end(),
        });
        let committed = golden(&format!("relay-udp/v1/{file}"), &datagram, &says);
        assert_eq!(relay_udp::decode(&committed), Ok(header));
        assert!(key.verify(&committed));
    }
}

//! Golden vectors: the exact bytes of every record, token, control message and relay frame, and what they mean.
//!
//! `tests/vectors/PROTOCOL/vN/NAME.wire` holds the bytes (`.hex`: in hexadecimal), `NAME.json` beside it what they decode
//! to, for people and other implementations. Old bytes must decode to the stored value for as long as the version is
//! supported; today's encoding of the value must be those bytes. After a deliberate change of the protocol,
//! `MESHD_WRITE_VECTORS=1 cargo test --test vectors` writes them anew; that needs a line in the changelog.

#![allow(clippy::disallowed_methods, reason = "a test reads and writes its files")]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;
use meshd::trust::advert::{Advert, SignedAdvert};
use meshd::trust::founding::{
    admin_record, dns_name_record, dns_split_record, invite_key, member_record, network_id, revoke_record,
    route_alias_record, route_grant_record, route_revoke_record,
};
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::trust::ledger::{Judge, Ledger};
use meshd::trust::record::{Genesis, Invite, Record, RevokeTarget, SignedRecord, member_ipv6};
use meshd::trust::token::{ClaimToken, InviteToken, Token};
use meshd::wire::control::{StunServer, ToCoordinator, ToNode, log_head, refusal};
use meshd::wire::keys::{ControlKey, Digest32, NetworkId, WgKey};
use meshd::wire::relay::{self, Frame, Frames};
use meshd::wire::relay_udp::SessionSecret;
use proptest::prelude::*;
use serde_json::{Value, json};

const NOW: u64 = 1_800_000_000;

/// One vector: where it is, today's bytes, and what a decoder makes of bytes.
struct Vector {
    /// Below `tests/vectors/`, without ending.
    path: String,
    wire: Vec<u8>,
    ending: &'static str,
    decode: fn(&[u8]) -> Value,
}

fn text_vector(path: String, wire: String, decode: fn(&[u8]) -> Value) -> Vector {
    Vector { path, wire: wire.into_bytes(), ending: "wire", decode }
}

// The network all vectors are about. Its keys are no secrets.

struct Home {
    root: SigningKey,
    keys: NodeKeys,
    invite: Secret32,
}

impl Home {
    fn new() -> Self {
        let secret = |n| Secret32::new([n; 32]);
        Self {
            root: secret(1).signing_key(),
            keys: NodeKeys { identity: secret(2), wg: secret(3), control: secret(4) },
            invite: secret(5),
        }
    }

    fn network(&self) -> NetworkId {
        network_id(&self.root)
    }

    fn genesis(&self) -> SignedRecord {
        let (ipv4, ipv6) = ("100.71.0.0/16".parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap());
        let genesis = Genesis { v: 1, network: self.network(), name: "home".into(), ipv4, ipv6, created: NOW };
        SignedRecord::sign(&Record::Genesis(genesis), &self.root)
    }

    fn admin(&self) -> SignedRecord {
        admin_record(&self.root, self.network(), self.keys.identity_key(), NOW)
    }

    fn invite_with(&self, change: impl FnOnce(&mut Invite)) -> SignedRecord {
        let mut invite = Invite {
            v: 1,
            network: self.network(),
            key: invite_key(&self.invite),
            uses: 1,
            expires: NOW + 86_400,
            name: None,
            tags: Vec::new(),
            routes: Vec::new(),
            admin: false,
            created: NOW,
        };
        change(&mut invite);
        SignedRecord::sign(&Record::Invite(invite), &self.root)
    }

    fn invite(&self) -> SignedRecord {
        self.invite_with(|_| {})
    }

    fn member(&self) -> SignedRecord {
        let ipv6 = member_ipv6("fd12:3456:789a::/48".parse().unwrap(), &self.keys.identity_key());
        member_record(&self.keys, &self.invite, self.network(), "laptop", [100, 71, 0, 1].into(), ipv6, NOW)
    }

    fn founding(&self) -> Vec<SignedRecord> {
        vec![self.genesis(), self.admin(), self.invite(), self.member()]
    }
}

fn records() -> Vec<(&'static str, SignedRecord)> {
    let home = Home::new();
    let (network, who) = (home.network(), home.keys.identity_key());
    let admin = home.keys.identity.signing_key();
    let full = home.invite_with(|i| {
        i.uses = 3;
        i.name = Some("gate".into());
        i.tags = vec!["server".into()];
        i.routes = vec!["192.168.1.0/24".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()];
        i.admin = true;
    });
    let both = vec![[192, 168, 1, 10].into(), "2001:db8:1::10".parse().unwrap()];
    let lan = "192.168.1.0/24".parse().unwrap();
    vec![
        ("genesis", home.genesis()),
        ("admin", home.admin()),
        ("invite", home.invite()),
        ("invite-full", full),
        ("member", home.member()),
        ("route-grant", route_grant_record(&admin, network, who, "192.168.1.0/24".parse().unwrap(), NOW)),
        ("route-revoke", route_revoke_record(&admin, network, who, "192.168.1.0/24".parse().unwrap(), NOW + 1)),
        ("revoke-identity", revoke_record(&admin, network, RevokeTarget::Identity(who), NOW)),
        ("revoke-invite", revoke_record(&admin, network, RevokeTarget::Invite(invite_key(&home.invite)), NOW)),
        ("dns-name", dns_name_record(&admin, network, "nas.home", both, Some(who), NOW)),
        ("dns-name-gone", dns_name_record(&admin, network, "nas.home", Vec::new(), None, NOW + 1)),
        ("dns-split", dns_split_record(&admin, network, "corp.example", vec![[10, 0, 0, 53].into()], None, NOW)),
        ("route-alias", route_alias_record(&admin, network, who, lan, Some("100.99.1.0/24".parse().unwrap()), NOW)),
        ("route-alias-gone", route_alias_record(&admin, network, who, lan, None, NOW + 1)),
    ]
}

fn advert() -> SignedAdvert {
    let home = Home::new();
    let advert = Advert {
        v: 1,
        network: home.network(),
        identity: home.keys.identity_key(),
        number: NOW * 1_000_000,
        routes: vec!["192.168.1.0/24".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()],
        resting: vec!["0.0.0.0/0".parse().unwrap()],
        draining: Vec::new(),
        lan: Vec::new(),
        relay: false,
    };
    SignedAdvert::sign(&advert, &home.keys.identity.signing_key())
}

fn to_coordinator() -> Vec<ToCoordinator> {
    let home = Home::new();
    let records = home.founding();
    let head = records.iter().fold(Digest32::default(), log_head);
    vec![
        ToCoordinator::Found { re: 1, claim: Digest32([6; 32]), records: records.clone() },
        ToCoordinator::Propose { re: 2, invite: invite_key(&home.invite), name: "nas".into(), exact: true },
        ToCoordinator::Redeem { re: 3, invite: home.invite(), member: home.member() },
        ToCoordinator::Hello { re: 4, version: "0.1.0".into(), have: 4, head },
        ToCoordinator::Publish { re: 5, records: records[2..3].to_vec() },
        ToCoordinator::Ping { re: u64::MAX },
        ToCoordinator::OpenRelay { re: 6 },
        ToCoordinator::Locate { re: 7, peer: WgKey([7; 32]) },
        ToCoordinator::Announce { re: 8, open: vec!["203.0.113.7:50112".parse().unwrap()] },
        ToCoordinator::Advertise { re: 9, advert: advert() },
    ]
}

fn to_node() -> Vec<ToNode> {
    let home = Home::new();
    let records = home.founding();
    let head = records.iter().fold(Digest32::default(), log_head);
    let stun =
        vec![StunServer { host: None, port: 3478 }, StunServer { host: Some("stun.example.org".into()), port: 3479 }];
    vec![
        ToNode::Refused {
            re: 1,
            code: refusal::EXPIRED.into(),
            text: "the invite has expired".into(),
            hint: "ask for a new one".into(),
        },
        ToNode::Proposal {
            re: 2,
            records: records[..3].to_vec(),
            ipv4: [100, 71, 0, 2].into(),
            name: "nas".into(),
            now: NOW,
        },
        ToNode::Joined { re: 3 },
        ToNode::Welcome {
            re: 4,
            version: "0.1.0".into(),
            now: NOW,
            stun: stun.clone(),
            observed: Some("203.0.113.7".parse().unwrap()),
        },
        ToNode::Log { from: 3, records: records[3..].to_vec(), head, end: true },
        ToNode::Published { re: 5 },
        ToNode::Presence { full: true, online: vec![WgKey([7; 32])], offline: vec![WgKey([8; 32])] },
        ToNode::Pong { re: 6, now: NOW },
        ToNode::RelayOpened { re: 7, session: 258, secret: SessionSecret::new([0xa5; 32]), at: stun },
        ToNode::RelayBudget { spent: true, renewed: NOW + 86_400 },
        ToNode::Located {
            re: 8,
            observed: Some("203.0.113.7".parse().unwrap()),
            open: vec!["203.0.113.7:50112".parse().unwrap()],
        },
        ToNode::Adverts { adverts: vec![advert()] },
    ]
}

/// A new message fails to compile here until it has a name, and the test until it has a vector.
const TO_COORDINATOR: [&str; 10] =
    ["found", "propose", "redeem", "hello", "publish", "ping", "open-relay", "locate", "announce", "advertise"];
const TO_NODE: [&str; 12] = [
    "refused",
    "proposal",
    "joined",
    "welcome",
    "log",
    "published",
    "presence",
    "pong",
    "relay-opened",
    "relay-budget",
    "located",
    "adverts",
];

fn name_to_coordinator(message: &ToCoordinator) -> &'static str {
    match message {
        ToCoordinator::Found { .. } => "found",
        ToCoordinator::Propose { .. } => "propose",
        ToCoordinator::Redeem { .. } => "redeem",
        ToCoordinator::Hello { .. } => "hello",
        ToCoordinator::Publish { .. } => "publish",
        ToCoordinator::Ping { .. } => "ping",
        ToCoordinator::OpenRelay { .. } => "open-relay",
        ToCoordinator::Locate { .. } => "locate",
        ToCoordinator::Announce { .. } => "announce",
        ToCoordinator::Advertise { .. } => "advertise",
    }
}

fn name_to_node(message: &ToNode) -> &'static str {
    match message {
        ToNode::Refused { .. } => "refused",
        ToNode::Proposal { .. } => "proposal",
        ToNode::Joined { .. } => "joined",
        ToNode::Welcome { .. } => "welcome",
        ToNode::Log { .. } => "log",
        ToNode::Published { .. } => "published",
        ToNode::Presence { .. } => "presence",
        ToNode::Pong { .. } => "pong",
        ToNode::RelayOpened { .. } => "relay-opened",
        ToNode::RelayBudget { .. } => "relay-budget",
        ToNode::Located { .. } => "located",
        ToNode::Adverts { .. } => "adverts",
    }
}

fn relay_frames() -> Vec<(&'static str, Vec<Frame<'static>>)> {
    let (a, b) = (WgKey([9; 32]), WgKey([10; 32]));
    let send = Frame::Send { to: a, payload: b"\x04\0\0\0ciphertext" };
    let recv = Frame::Recv { from: b, payload: b"" };
    let (ping, pong) = (Frame::Ping(*b"12345678"), Frame::Pong(*b"12345678"));
    vec![
        ("send", vec![send]),
        ("recv", vec![recv]),
        ("gone", vec![Frame::Gone { peer: a }]),
        ("ping", vec![ping]),
        ("pong", vec![pong]),
        ("here", vec![Frame::Here]),
        ("several", vec![send, ping, recv]),
    ]
}

fn tokens() -> Vec<(&'static str, String)> {
    let home = Home::new();
    let claim = ClaimToken {
        urls: vec!["https://mesh.example.org:8443".into(), "ws://192.0.2.1".into()],
        coordinator: ControlKey([11; 32]),
        secret: Secret32::new([6; 32]),
    };
    let invite = InviteToken {
        urls: vec!["https://mesh.example.org".into()],
        coordinator: ControlKey([11; 32]),
        network: home.network(),
        secret: Secret32::new(*home.invite.expose()),
        invite: home.invite(),
    };
    vec![("claim", claim.encode()), ("invite", invite.encode())]
}

fn vectors() -> Vec<Vector> {
    let mut all = Vec::new();
    for (name, record) in records() {
        all.push(text_vector(format!("record/v1/{name}"), serde_json::to_string(&record).unwrap(), decode_record));
    }
    for message in to_coordinator() {
        let path = format!("control/v1/to-coordinator/{}", name_to_coordinator(&message));
        all.push(text_vector(path, serde_json::to_string(&message).unwrap(), decode_to_coordinator));
    }
    for message in to_node() {
        let path = format!("control/v1/to-node/{}", name_to_node(&message));
        all.push(text_vector(path, serde_json::to_string(&message).unwrap(), decode_to_node));
    }
    for (name, frames) in relay_frames() {
        let mut wire = Vec::new();
        assert!(frames.iter().all(|frame| relay::encode(frame, &mut wire)));
        all.push(Vector { path: format!("relay/v1/{name}"), wire, ending: "hex", decode: decode_relay });
    }
    for (name, token) in tokens() {
        all.push(text_vector(format!("token/v1/{name}"), token, decode_token));
    }
    all
}

// Decoding, to what the `.json` files show.

fn decode_record(wire: &[u8]) -> Value {
    let signed: SignedRecord = serde_json::from_slice(wire).unwrap();
    let record = signed.open().expect("the signatures are right");
    json!({ "id": signed.id(), "signer": signed.signer, "cosigned": signed.cosig.is_some(), "record": record })
}

fn decode_to_coordinator(wire: &[u8]) -> Value {
    serde_json::to_value(serde_json::from_slice::<ToCoordinator>(wire).unwrap()).unwrap()
}

fn decode_to_node(wire: &[u8]) -> Value {
    serde_json::to_value(serde_json::from_slice::<ToNode>(wire).unwrap()).unwrap()
}

fn decode_relay(wire: &[u8]) -> Value {
    Frames::new(wire)
        .map(|frame| match frame.unwrap() {
            Frame::Send { to, payload } => json!({ "type": "send", "to": to, "payload": hex(payload) }),
            Frame::Recv { from, payload } => json!({ "type": "recv", "from": from, "payload": hex(payload) }),
            Frame::Gone { peer } => json!({ "type": "gone", "peer": peer }),
            Frame::Ping(nonce) => json!({ "type": "ping", "nonce": hex(&nonce) }),
            Frame::Pong(nonce) => json!({ "type": "pong", "nonce": hex(&nonce) }),
            Frame::Here => json!({ "type": "here" }),
        })
        .collect()
}

fn decode_token(wire: &[u8]) -> Value {
    match Token::decode(std::str::from_utf8(wire).unwrap()).unwrap() {
        Token::Claim(t) => {
            json!({ "kind": "claim", "urls": t.urls, "coordinator": t.coordinator, "secret": hex(t.secret.expose()) })
        }
        Token::Invite(t) => json!({
            "kind": "invite", "urls": t.urls, "coordinator": t.coordinator, "network": t.network,
            "secret": hex(t.secret.expose()), "invite": t.invite,
        }),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

// The tests.

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

#[test]
fn old_bytes_decode_and_today_s_encoding_gives_them() {
    let write = std::env::var_os("MESHD_WRITE_VECTORS").is_some();
    for Vector { path, wire, ending, decode } in vectors() {
        let (bytes, value) = (folder().join(format!("{path}.{ending}")), folder().join(format!("{path}.json")));
        let as_file = if ending == "hex" { hex(&wire) } else { String::from_utf8(wire.clone()).unwrap() } + "\n";
        if write {
            fs::create_dir_all(bytes.parent().unwrap()).unwrap();
            fs::write(&bytes, &as_file).unwrap();
            fs::write(&value, serde_json::to_string_pretty(&decode(&wire)).unwrap() + "\n").unwrap();
        }
        let stored = fs::read_to_string(&bytes).unwrap_or_else(|e| panic!("{}: {e}", bytes.display()));
        let stored_wire = if ending == "hex" { unhex(&stored) } else { stored.trim_end().as_bytes().to_vec() };
        let stored_value: Value = serde_json::from_str(&fs::read_to_string(&value).unwrap()).unwrap();
        assert_eq!(decode(&stored_wire), stored_value, "{path}: the stored bytes mean something else now");
        assert_eq!(stored, as_file, "{path}: today's encoding is another");
    }
}

#[test]
fn every_message_has_a_vector_and_every_file_a_message() {
    let in_order: Vec<&str> = to_coordinator().iter().map(name_to_coordinator).collect();
    assert_eq!(in_order, TO_COORDINATOR);
    let in_order: Vec<&str> = to_node().iter().map(name_to_node).collect();
    assert_eq!(in_order, TO_NODE);
    let mut expected = BTreeSet::new();
    for Vector { path, ending, .. } in vectors() {
        expected.insert(folder().join(format!("{path}.{ending}")));
        expected.insert(folder().join(format!("{path}.json")));
    }
    let mut found = BTreeSet::new();
    for protocol in ["record", "control", "relay", "token"] {
        files(&folder().join(protocol), &mut found);
    }
    assert_eq!(found, expected);
}

fn files(folder: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.insert(path);
        }
    }
}

#[test]
fn the_vectors_records_found_a_network_that_a_ledger_accepts() {
    let home = Home::new();
    let mut ledger = Ledger::new(home.network());
    ledger.admit_all(&home.founding(), Judge::Reader).unwrap();
    assert_eq!(ledger.by_name("laptop").map(|m| m.wg), Some(home.keys.wg_key()));
}

#[test]
fn unknown_fields_are_ignored_and_unknown_messages_and_kinds_are_not_understood() {
    let ping: ToCoordinator = serde_json::from_str(r#"{"t":"ping","re":1,"colour":"blue"}"#).unwrap();
    assert_eq!(ping, ToCoordinator::Ping { re: 1 });
    assert!(serde_json::from_str::<ToCoordinator>(r#"{"t":"dance","re":1}"#).is_err());
    assert!(serde_json::from_str::<ToNode>(r#"{"t":"dance","re":1}"#).is_err());
    let home = Home::new();
    let admin = serde_json::to_string(&Record::Admin(match home.admin().open().unwrap() {
        Record::Admin(admin) => admin,
        other => panic!("{other:?}"),
    }))
    .unwrap();
    let with_field: Record = serde_json::from_str(&admin.replacen('{', r#"{"colour":"blue","#, 1)).unwrap();
    assert_eq!(Ok(with_field), home.admin().open());
    assert!(serde_json::from_str::<Record>(&admin.replace("\"admin\"", "\"policy\"")).is_err());
}

/// Runs every decoder over bytes; that none panics is the point.
fn decode_all(bytes: &[u8]) {
    let _ = serde_json::from_slice::<ToCoordinator>(bytes);
    let _ = serde_json::from_slice::<ToNode>(bytes);
    let _ = serde_json::from_slice::<Record>(bytes);
    if let Ok(signed) = serde_json::from_slice::<SignedRecord>(bytes) {
        let _ = (signed.id(), signed.open());
        let _ = Ledger::new(NetworkId(signed.signer.0)).admit(&signed, Judge::Reader);
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = Token::decode(&text);
    let _ = SignedRecord { payload: text.into_owned(), ..Home::new().genesis() }.open();
    let consumed: usize = Frames::new(bytes)
        .map_while(Result::ok)
        .map(|frame| match frame {
            Frame::Send { payload, .. } | Frame::Recv { payload, .. } => relay::OVERHEAD + payload.len(),
            Frame::Gone { .. } => relay::OVERHEAD,
            Frame::Ping(_) | Frame::Pong(_) => relay::HEADER + 8,
            Frame::Here => relay::HEADER,
        })
        .sum();
    assert!(consumed <= bytes.len());
}

#[test]
fn every_decoder_survives_every_truncation() {
    for vector in vectors() {
        for end in 0..=vector.wire.len() {
            decode_all(&vector.wire[..end]);
        }
    }
}

proptest! {
    #[test]
    fn every_decoder_survives_flipped_bytes(
        which in any::<prop::sample::Index>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let vectors = vectors();
        let mut wire = which.get(&vectors).wire.clone();
        for (place, byte) in changes {
            let at = place.index(wire.len());
            wire[at] ^= byte;
        }
        decode_all(&wire);
    }

    #[test]
    fn every_decoder_survives_spliced_messages(
        first in any::<prop::sample::Index>(),
        second in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        join in any::<prop::sample::Index>(),
    ) {
        let vectors = vectors();
        let (a, b) = (&first.get(&vectors).wire, &second.get(&vectors).wire);
        decode_all(&[&a[..cut.index(a.len())], &b[join.index(b.len())..]].concat());
    }

    #[test]
    fn every_decoder_survives_random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
        decode_all(&bytes);
    }

    /// A record changed in any bit is refused: by its signature, or because it is no record any more.
    #[test]
    fn no_changed_record_verifies(which in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), bit in 0u8..8) {
        let records = records();
        let (_, mut signed) = which.get(&records).clone();
        let len = signed.payload.len();
        match place.index(len + 32 + 64) {
            at if at < len => {
                let mut payload = signed.payload.into_bytes();
                payload[at] ^= 1 << bit;
                signed.payload = String::from_utf8_lossy(&payload).into_owned();
            }
            at if at < len + 32 => signed.signer.0[at - len] ^= 1 << bit,
            at => signed.sig.0[at - len - 32] ^= 1 << bit,
        }
        prop_assert!(signed.open().is_err());
    }
}

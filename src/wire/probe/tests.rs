use proptest::prelude::*;
use stun_rs::attributes::stun::{MessageIntegritySha256, XorMappedAddress};
use stun_rs::{DecoderContextBuilder, HMACKey, MessageDecoderBuilder};

use super::*;
use crate::wire::classify::{Kind, classify};

const TXID: TransactionId = TransactionId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
const NONCE: [u8; 24] = [9; 24];

fn public(n: u8) -> WgKey {
    WgKey(PublicKey::from(&StaticSecret::from([n; 32])).to_bytes())
}

/// The keys that node `me` shares with node `peer`.
fn keys(me: u8, peer: u8) -> ProbeKeys {
    ProbeKeys::derive(&Secret32::new([me; 32]), &public(me), &public(peer)).unwrap()
}

fn here() -> SocketAddr {
    "198.51.100.7:50000".parse().unwrap()
}

fn message() -> PeerMessage {
    PeerMessage {
        v: 1,
        n: 77,
        kind: MessageKind::Answer,
        round: 3,
        t: Some(123),
        echo: Some(456),
        candidates: vec![
            Candidate { addr: here(), kind: CandidateKind::Reflexive },
            Candidate { addr: "[2001:db8::1]:7".parse().unwrap(), kind: CandidateKind::Host },
        ],
        mapping: Some("endpoint-independent".to_owned()),
        filtering: None,
        udp: Some(true),
        ports: None,
        port: Some(50_112),
        mapper: Mapper::Absent,
        seen: Some(Seen { sent: 8, answered: 0, heard: 3 }),
        primed: None,
        fresh: None,
        tcp: vec!["198.51.100.7:40001".parse().unwrap()],
        lifetime: Some(20),
        punch: None,
    }
}

#[test]
fn two_nodes_derive_the_same_and_nobody_else_does() {
    let (a, b, c) = (keys(1, 2), keys(2, 1), keys(1, 3));
    assert_eq!((a.inbound_name, a.outbound_name), (b.outbound_name, b.inbound_name));
    assert_eq!((a.inbound_mac, a.outbound_mac, a.seal), (b.outbound_mac, b.inbound_mac, b.seal));
    assert!(a.inbound_name != a.outbound_name && a.inbound_mac != a.outbound_mac);
    assert!(a.inbound_name != c.inbound_name && a.inbound_mac != c.inbound_mac && a.seal != c.seal);
}

#[test]
fn a_key_that_gives_no_secret_is_refused() {
    let secret = Secret32::new([1; 32]);
    assert!(ProbeKeys::derive(&secret, &public(1), &WgKey([0; 32])).is_none());
    // The point of order two: also gives zero.
    let mut one = [0; 32];
    one[0] = 1;
    assert!(ProbeKeys::derive(&secret, &public(1), &WgKey(one)).is_none());
    assert!(ProbeKeys::derive(&secret, &public(1), &public(1)).is_none(), "with oneself there is nothing to share");
}

#[test]
fn a_probe_and_its_answer() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let request = encode_request(&a, &TXID, None);
    assert_eq!(classify(&request), Kind::Stun);
    assert_eq!(name_of(&request), Some(b.inbound_name()));
    assert!(!is_response(&request));
    assert_eq!(transaction_id(&request), Some(TXID));
    assert_eq!(decode_request(&b, &request), Ok(ProbeRequest { txid: TXID, len: request.len() }));
    for observed in [here(), "[2001:db8::7]:9".parse().unwrap()] {
        let response = encode_response(&b, &TXID, observed, None);
        assert_eq!(classify(&response), Kind::Stun);
        assert!(is_response(&response) && name_of(&response).is_none());
        let len = response.len();
        assert_eq!(decode_response(&a, &response), Ok(ProbeResponse { txid: TXID, observed, len }));
    }
}

#[test]
fn probes_are_padded_to_the_byte() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let bare = encode_request(&a, &TXID, None).len();
    assert_eq!(bare, 92);
    for pad_to in [bare + 4, bare + 8, 500, 1200, 1232, 1280, 1392, 1452, 8192] {
        let request = encode_request(&a, &TXID, Some(pad_to));
        assert_eq!(request.len(), pad_to);
        assert_eq!(decode_request(&b, &request).unwrap().len, pad_to);
        let response = encode_response(&b, &TXID, here(), Some(pad_to));
        assert_eq!(response.len(), pad_to);
        assert_eq!(decode_response(&a, &response).unwrap().len, pad_to);
    }
    assert_eq!(encode_request(&a, &TXID, Some(1203)).len(), 1200, "STUN counts in fours");
    for too_small in [0, 1, bare - 1, bare, bare + 3] {
        assert_eq!(encode_request(&a, &TXID, Some(too_small)).len(), bare);
    }
    assert!(decode_request(&b, &encode_request(&a, &TXID, Some(usize::MAX))).is_ok());
}

#[test]
fn another_stun_implementation_accepts_the_probes() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    for (bytes, password) in [
        (encode_request(&a, &TXID, Some(1200)), &a.outbound_mac),
        (encode_response(&b, &TXID, here(), Some(1200)), &a.outbound_mac),
        (encode_request(&a, &TXID, None), &b.inbound_mac),
    ] {
        let key = HMACKey::new_short_term(std::str::from_utf8(password).unwrap()).unwrap();
        let context = DecoderContextBuilder::default().with_key(key).with_validation().build();
        let decoder = MessageDecoderBuilder::default().with_context(context).build();
        let (decoded, len) = decoder.decode(&bytes).unwrap();
        assert_eq!(len, bytes.len());
        assert!(decoded.get::<MessageIntegritySha256>().is_some());
        if is_response(&bytes) {
            let mapped = decoded.get::<XorMappedAddress>().unwrap().expect_xor_mapped_address();
            assert_eq!(*mapped.socket_address(), here());
        }
    }
}

#[test]
fn a_reflected_or_misdirected_probe_is_never_valid() {
    let (a, b, c) = (keys(1, 2), keys(2, 1), keys(3, 2));
    let request = encode_request(&a, &TXID, None);
    assert_eq!(decode_request(&a, &request), Err(ProbeError::WrongName), "sent back to its sender");
    assert_eq!(decode_request(&c, &request), Err(ProbeError::WrongName), "sent on to another peer of the receiver");
    assert_eq!(decode_response(&b, &request), Err(ProbeError::Malformed));
    let response = encode_response(&b, &TXID, here(), None);
    assert_eq!(decode_response(&b, &response), Err(ProbeError::BadIntegrity), "sent back to its sender");
    assert_eq!(decode_response(&c, &response), Err(ProbeError::BadIntegrity));
    assert_eq!(decode_request(&a, &response), Err(ProbeError::Malformed));
}

#[test]
fn who_knows_only_the_names_cannot_make_a_probe() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let mut forged = Writer::current(kind::BINDING_REQUEST, &TXID);
    forged.attribute(attribute::USERNAME, &hex::<8, 16>(&a.outbound_name));
    assert_eq!(decode_request(&b, &finish(forged, &[b'0'; 64], None)), Err(ProbeError::BadIntegrity));
    let mut bare = Writer::current(kind::BINDING_REQUEST, &TXID);
    bare.attribute(attribute::USERNAME, &hex::<8, 16>(&a.outbound_name));
    bare.attribute(PROBE_ATTRIBUTE, &[1, 1, 0, 0]);
    bare.fingerprint();
    assert_eq!(decode_request(&b, &bare.finish()), Err(ProbeError::Malformed), "no integrity at all");
}

#[test]
fn nothing_may_follow_the_integrity_check() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let mut message = Writer::current(kind::BINDING_SUCCESS, &TXID);
    message.attribute(PROBE_ATTRIBUTE, &[1, 1, 0, 0]);
    message.computed(attribute::MESSAGE_INTEGRITY_SHA256, |before| HMAC::mac(before, b.inbound_mac));
    message.xor_address(attribute::XOR_MAPPED_ADDRESS, here());
    message.fingerprint();
    assert_eq!(decode_response(&a, &message.finish()), Err(ProbeError::Malformed));
}

#[test]
fn newer_versions_and_unknown_required_attributes_are_told_apart_from_junk() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let probe = |version: u8, extra: u16| {
        let mut message = Writer::current(kind::BINDING_REQUEST, &TXID);
        message.attribute(attribute::USERNAME, &hex::<8, 16>(&a.outbound_name));
        message.attribute(PROBE_ATTRIBUTE, &[version, 1, 0, 0, 5, 5]);
        message.attribute(extra, b"new");
        message.computed(attribute::MESSAGE_INTEGRITY_SHA256, |before| HMAC::mac(before, a.outbound_mac));
        message.fingerprint();
        decode_request(&b, &message.finish())
    };
    assert!(probe(1, 0xC0DF).is_ok(), "a new optional attribute and a longer value of ours");
    assert_eq!(probe(1, 0x7FFF), Err(ProbeError::Unsupported));
    assert_eq!(probe(2, 0xC0DF), Err(ProbeError::Unsupported));
}

#[test]
fn no_bit_of_a_probe_can_be_changed_and_nothing_cut_off() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let request = encode_request(&a, &TXID, Some(120));
    let response = encode_response(&b, &TXID, here(), Some(120));
    for at in 0..120 {
        for bit in 0..8 {
            let mut flipped = request.clone();
            flipped[at] ^= 1 << bit;
            assert!(decode_request(&b, &flipped).is_err(), "request, byte {at}, bit {bit}");
            let mut flipped = response.clone();
            flipped[at] ^= 1 << bit;
            assert!(decode_response(&a, &flipped).is_err(), "response, byte {at}, bit {bit}");
        }
        assert!(decode_request(&b, &request[..at]).is_err());
        assert!(decode_response(&a, &response[..at]).is_err());
    }
    for extra in 1..9 {
        let mut longer = request.clone();
        longer.resize(120 + extra, 0);
        assert!(decode_request(&b, &longer).is_err());
    }
}

#[test]
fn a_sealed_message_opens_at_its_receiver_only() {
    let (a, b, c) = (keys(1, 2), keys(2, 1), keys(3, 2));
    let sealed = seal(&a, &message(), NONCE);
    assert_eq!(classify(&sealed), Kind::Sealed);
    assert_eq!(sealed_name(&sealed), Some(b.inbound_name()));
    assert_eq!(open(&b, &sealed), Ok(message()));
    assert_eq!(open(&a, &sealed), Err(SealedError::WrongName), "sent back to its sender");
    assert_eq!(open(&c, &sealed), Err(SealedError::WrongName));
    let mut renamed = sealed.clone();
    renamed[2..10].copy_from_slice(&a.inbound_name);
    assert_eq!(open(&a, &renamed), Err(SealedError::BadSeal), "the name is under the seal");
}

#[test]
fn no_bit_of_a_sealed_message_can_be_changed_and_nothing_cut_off() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let sealed = seal(&a, &message(), NONCE);
    for at in 0..sealed.len() {
        for bit in 0..8 {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1 << bit;
            assert!(open(&b, &flipped).is_err(), "byte {at}, bit {bit}");
        }
        assert!(open(&b, &sealed[..at]).is_err());
    }
    assert!(open(&b, &[sealed, vec![0]].concat()).is_err());
}

/// Seals any text, as a newer or a broken peer might.
fn seal_text(keys: &ProbeKeys, text: &str) -> Vec<u8> {
    let mut out = vec![SEALED, VERSION];
    out.extend_from_slice(&keys.outbound_name);
    out.extend_from_slice(&NONCE);
    let aad = additional_data(&out, &keys.me, &keys.peer);
    let cipher = XChaCha20Poly1305::new(&keys.seal.into());
    let payload = Payload { msg: text.as_bytes(), aad: &aad };
    out.extend_from_slice(&cipher.encrypt(XNonce::from_slice(&NONCE), payload).unwrap());
    out
}

#[test]
fn unknown_fields_and_candidate_kinds_are_ignored_and_limits_enforced() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let received = |text: &str| open(&b, &seal_text(&a, text));
    let newer = r#"{"v":1,"n":5,"kind":"go","colour":"red","candidates":[
        {"addr":"192.0.2.1:5","kind":"satellite"},{"addr":"192.0.2.2:6","kind":"mapped","age":3},{"addr":"nowhere","kind":"host"}]}"#;
    let message = received(newer).unwrap();
    assert_eq!((message.n, message.kind, message.round), (5, MessageKind::Go, 0));
    let mapped = Candidate { addr: "192.0.2.2:6".parse().unwrap(), kind: CandidateKind::Mapped };
    assert_eq!(message.candidates, [mapped]);

    let many = |n: usize| {
        let list = vec![r#"{"addr":"1.2.3.4:5","kind":"host"}"#; n].join(",");
        received(&format!(r#"{{"v":1,"n":5,"kind":"call","candidates":[{list}]}}"#))
    };
    assert_eq!(many(MAX_CANDIDATES).unwrap().candidates.len(), MAX_CANDIDATES);
    assert_eq!(many(MAX_CANDIDATES + 1), Err(SealedError::Malformed));
    assert_eq!(received(r#"{"v":2,"n":5,"kind":"call"}"#), Err(SealedError::Unsupported));
    assert_eq!(received(r#"{"v":1,"n":5,"kind":"sing"}"#), Err(SealedError::Malformed));
    assert_eq!(received(r#"{"v":1,"n":-5,"kind":"call"}"#), Err(SealedError::Malformed));
    assert_eq!(received("[]"), Err(SealedError::Malformed));
    let wordy = format!(r#"{{"v":1,"n":5,"kind":"call","mapping":"{}"}}"#, "x".repeat(65));
    assert_eq!(received(&wordy), Err(SealedError::Malformed));
    let mut version = seal_text(&a, r#"{"v":1,"n":5,"kind":"call"}"#);
    version[1] = 2;
    assert_eq!(open(&b, &version), Err(SealedError::Unsupported));
}

#[test]
fn a_message_with_too_much_in_it_is_cut_to_fit() {
    let (a, b) = (keys(1, 2), keys(2, 1));
    let addr = "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535".parse().unwrap();
    let long = Candidate { addr, kind: CandidateKind::Reflexive };
    let full =
        PeerMessage { candidates: vec![long; 40], ..PeerMessage { tcp: Vec::new(), lifetime: None, ..message() } };
    let sealed = seal(&a, &full, NONCE);
    assert!(sealed.len() <= MAX_SEALED);
    let kept = open(&b, &sealed).unwrap().candidates.len();
    assert!((12..=MAX_CANDIDATES).contains(&kept), "{kept} candidates kept");
    let wordy = PeerMessage { mapping: Some("x".repeat(5000)), ..message() };
    let received = open(&b, &seal(&a, &wordy, NONCE)).unwrap();
    assert_eq!((received.mapping, received.n), (None, 77));
}

#[test]
fn debug_shows_no_keys() {
    assert_eq!(format!("{:?}", keys(1, 2)), format!("ProbeKeys {{ peer: {:?}, .. }}", public(2)));
}

proptest! {
    #[test]
    fn random_bytes_never_panic_and_are_never_accepted(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), shape in 0u8..4) {
        let b = keys(2, 1);
        if shape > 0 && bytes.len() > 60 {
            let len = u16::try_from(bytes.len() - HEADER).unwrap();
            bytes[..2].copy_from_slice(&if shape == 1 { kind::BINDING_REQUEST } else { kind::BINDING_SUCCESS }.to_be_bytes());
            bytes[2..4].copy_from_slice(&len.to_be_bytes());
            bytes[4..8].copy_from_slice(&stun::MAGIC_COOKIE);
            if shape == 3 {
                bytes[..2].copy_from_slice(&[SEALED, VERSION]);
                bytes[2..10].copy_from_slice(&b.inbound_name);
            }
        }
        prop_assert!(decode_request(&b, &bytes).is_err());
        prop_assert!(decode_response(&b, &bytes).is_err());
        prop_assert!(open(&b, &bytes).is_err());
        let _ = (name_of(&bytes), sealed_name(&bytes), is_response(&bytes), transaction_id(&bytes));
    }
}

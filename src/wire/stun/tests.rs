use proptest::prelude::*;
use stun_rs::{DecoderContextBuilder, MessageDecoderBuilder};

use super::*;

const TXID: TransactionId = TransactionId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn four() -> ServerLayout {
    let all = ["203.0.113.1:3478", "203.0.113.1:3479", "203.0.113.2:3478", "203.0.113.2:3479"];
    ServerLayout { endpoints: all.map(at).to_vec() }
}

fn ask(request: &[u8], layout: &ServerLayout) -> Option<Answer> {
    answer(request, at("198.51.100.7:50000"), layout.endpoints[0], layout)
}

/// A strict decoder by other hands.
fn strictly(bytes: &[u8]) -> StunMessage {
    let context = DecoderContextBuilder::default().with_validation().build();
    let (message, len) = MessageDecoderBuilder::default().with_context(context).build().decode(bytes).unwrap();
    assert_eq!(len, bytes.len());
    message
}

#[test]
fn a_request_is_answered_with_the_source_address() {
    let request = binding_request(&TXID, Change::default());
    assert_eq!((request.len(), transaction_id(&request)), (28, Some(TXID)));
    assert_eq!(strictly(&request).method(), BINDING);
    let answer = ask(&request, &four()).unwrap();
    assert_eq!(answer.send_from, at("203.0.113.1:3478"));
    strictly(&answer.bytes);
    let expected = BindingResponse {
        txid: TXID,
        mapped: at("198.51.100.7:50000"),
        other: Some(at("203.0.113.2:3479")),
        origin: Some(at("203.0.113.1:3478")),
    };
    assert_eq!(decode_binding_response(&answer.bytes), Ok(expected));
}

#[test]
fn ipv6_works_the_same_and_mapped_ipv4_counts_as_ipv4() {
    let layout = ServerLayout { endpoints: vec![at("[2001:db8::1]:3478")] };
    let request = binding_request(&TXID, Change::default());
    let answer6 = answer(&request, at("[2001:db8:7::7]:50000"), layout.endpoints[0], &layout).unwrap();
    let response = decode_binding_response(&answer6.bytes).unwrap();
    assert_eq!((response.mapped, response.other), (at("[2001:db8:7::7]:50000"), None));
    let mapped = answer(&request, at("[::ffff:198.51.100.7]:5"), layout.endpoints[0], &layout).unwrap();
    assert_eq!(decode_binding_response(&mapped.bytes).unwrap().mapped, at("198.51.100.7:5"));
}

#[test]
fn a_change_is_answered_from_the_endpoint_asked_for_or_refused() {
    for (ip, port, from) in
        [(false, true, "203.0.113.1:3479"), (true, false, "203.0.113.2:3478"), (true, true, "203.0.113.2:3479")]
    {
        let request = binding_request(&TXID, Change { ip, port });
        assert_eq!(request.len(), 36);
        let answer = ask(&request, &four()).unwrap();
        assert_eq!(answer.send_from, at(from));
        assert_eq!(decode_binding_response(&answer.bytes).unwrap().origin, Some(at(from)));

        let two_ports = ServerLayout { endpoints: vec![at("203.0.113.1:3478"), at("203.0.113.1:3479")] };
        let answer = ask(&request, &two_ports).unwrap();
        let decoded = decode_binding_response(&answer.bytes);
        if ip {
            assert_eq!(decoded, Err(StunError::Refused { txid: TXID, code: 420 }));
            assert_eq!(answer.send_from, at("203.0.113.1:3478"));
        } else {
            assert_eq!(answer.send_from, at("203.0.113.1:3479"));
            assert_eq!(decoded.unwrap().other, Some(at("203.0.113.1:3479")), "the address is visibly the same");
        }
    }
}

#[test]
fn an_endpoint_that_clients_cannot_use_is_not_offered() {
    let layout = ServerLayout { endpoints: vec![at("0.0.0.0:3478"), at("0.0.0.0:3479")] };
    let response = decode_binding_response(&ask(&binding_request(&TXID, Change::default()), &layout).unwrap().bytes);
    let response = response.unwrap();
    assert_eq!((response.other, response.origin), (None, None));
}

#[test]
fn unknown_required_attributes_are_named_and_optional_ones_ignored() {
    let mut message = Writer::current(kind::BINDING_REQUEST, &TXID);
    message.attribute(0x7F00, b"abc");
    message.attribute(0x7F01, b"");
    message.attribute(0x7F00, b"again");
    let answer = ask(&message.finish(), &four()).unwrap();
    assert_eq!(decode_binding_response(&answer.bytes), Err(StunError::Refused { txid: TXID, code: 420 }));
    assert_eq!(find(&answer.bytes, attribute::UNKNOWN_ATTRIBUTES), Some(&[0x7F, 0, 0x7F, 1][..]));
    assert_eq!(find(&answer.bytes, attribute::FINGERPRINT), None, "the request had none");

    let mut message = Writer::current(kind::BINDING_REQUEST, &TXID);
    message.attribute(0x8022, b"a client");
    message.attribute(attribute::USERNAME, b"somebody");
    assert!(decode_binding_response(&ask(&message.finish(), &four()).unwrap().bytes).is_ok());
}

#[test]
fn what_is_no_sound_binding_request_gets_no_answer() {
    let good = binding_request(&TXID, Change::default());
    let layout = four();
    assert!(ask(&good, &layout).is_some());
    for end in 0..good.len() {
        assert_eq!(ask(&good[..end], &layout), None, "cut to {end}");
    }
    let mut broken = good.clone();
    broken[27] ^= 1;
    assert_eq!(ask(&broken, &layout), None, "wrong fingerprint");
    for kind in [0x0011, kind::BINDING_SUCCESS, kind::BINDING_ERROR, 0x0003, 0x4001, 0x8001, 0xC001] {
        assert_eq!(ask(&Writer::current(kind, &TXID).finish(), &layout), None, "type {kind:#06x}");
    }
    let long = |value: usize| {
        let mut message = Writer::current(kind::BINDING_REQUEST, &TXID);
        message.attribute(0x8022, &vec![b'a'; value]);
        message.finish()
    };
    assert!(ask(&long(MAX_REQUEST - HEADER - 4), &layout).is_some());
    assert_eq!(ask(&long(MAX_REQUEST - HEADER), &layout), None, "too long");
    assert_eq!(answer(&good, at("198.51.100.7:0"), layout.endpoints[0], &layout), None, "cannot be answered");
    assert_eq!(answer(&good, at("224.0.0.1:5"), layout.endpoints[0], &layout), None, "must not be answered");
}

#[test]
fn an_answer_on_the_wire_is_about_twice_its_request_at_most() {
    let six = ["[2001:db8::1]:3478", "[2001:db8::1]:3479", "[2001:db8::2]:3478", "[2001:db8::2]:3479"];
    let layout6 = ServerLayout { endpoints: six.map(at).to_vec() };
    let bare = Writer::current(kind::BINDING_REQUEST, &TXID).finish();
    let classic = Writer::new(kind::BINDING_REQUEST, &[7; 16]).finish();
    let mut unknown = Writer::current(kind::BINDING_REQUEST, &TXID);
    for kind in 0x7000..0x7040 {
        unknown.attribute(kind, b"");
    }
    let source6 = at("[2001:db8:7::7]:50000");
    for (request, source, layout, headers) in [
        (&bare, at("198.51.100.7:50000"), &four(), 28),
        (&bare, source6, &layout6, 48),
        (&classic, at("198.51.100.7:50000"), &four(), 28),
        (&unknown.finish(), source6, &layout6, 48),
    ] {
        let answer = answer(request, source, layout.endpoints[0], layout).unwrap();
        let (sent, received) = (headers + answer.bytes.len(), headers + request.len());
        assert!(sent * 10 <= received * 21, "{received} bytes answered with {sent}");
    }
}

/// What Debian's `stun` sends (checked against stun 0.97): no cookie, always a CHANGE-REQUEST.
fn classic(flags: u8) -> Vec<u8> {
    let mut message = Writer::new(kind::BINDING_REQUEST, &[7; 16]);
    message.attribute(attribute::CHANGE_REQUEST, &[0, 0, 0, flags]);
    message.finish()
}

#[test]
fn a_classic_client_gets_a_classic_answer() {
    for (flags, from) in
        [(0, "203.0.113.1:3478"), (2, "203.0.113.1:3479"), (4, "203.0.113.2:3478"), (6, "203.0.113.2:3479")]
    {
        let answer = ask(&classic(flags), &four()).unwrap();
        assert_eq!(answer.send_from, at(from));
        assert_eq!(answer.bytes[..2], kind::BINDING_SUCCESS.to_be_bytes());
        assert_eq!(answer.bytes[4..20], [7; 16]);
        assert!(is_well_formed(&answer.bytes));
        let address = |kind| find(&answer.bytes, kind).and_then(read_address);
        assert_eq!(address(attribute::MAPPED_ADDRESS), Some(at("198.51.100.7:50000")));
        assert_eq!(address(attribute::SOURCE_ADDRESS), Some(at(from)));
        assert_eq!(address(attribute::CHANGED_ADDRESS), Some(at("203.0.113.2:3479")));
        let known = [attribute::MAPPED_ADDRESS, attribute::SOURCE_ADDRESS, attribute::CHANGED_ADDRESS];
        assert!(Attributes::of(&answer.bytes).flatten().all(|a| known.contains(&a.kind)));
    }
    let single = ServerLayout { endpoints: vec![at("203.0.113.1:3478")] };
    assert!(ask(&classic(0), &single).is_some());
    assert_eq!(ask(&classic(6), &single), None, "any answer would be taken for the one asked for");
    let six = ServerLayout { endpoints: vec![at("[2001:db8::1]:3478")] };
    assert_eq!(answer(&classic(0), at("[2001:db8:7::7]:1"), six.endpoints[0], &six), None, "IPv4 only");
}

#[test]
fn a_classic_request_cannot_aim_the_answer_at_somebody_else() {
    const RESPONSE_ADDRESS: u16 = 0x0002;
    let mut message = Writer::new(kind::BINDING_REQUEST, &[7; 16]);
    message.address(RESPONSE_ADDRESS, at("192.0.2.66:53"));
    let answer = ask(&message.finish(), &four()).unwrap();
    assert!(is_well_formed(&answer.bytes));
    assert_eq!(answer.bytes[..2], kind::BINDING_ERROR.to_be_bytes());
    assert_eq!(find(&answer.bytes, attribute::ERROR_CODE).map(|v| &v[..4]), Some(&[0, 0, 4, 20][..]));
    assert_eq!(find(&answer.bytes, attribute::UNKNOWN_ATTRIBUTES), Some(&[0, 2, 0, 2][..]));
}

#[test]
fn old_servers_are_understood() {
    let mut message = Writer::current(kind::BINDING_SUCCESS, &TXID);
    message.address(attribute::MAPPED_ADDRESS, at("198.51.100.7:50000"));
    message.address(attribute::SOURCE_ADDRESS, at("203.0.113.1:3478"));
    message.address(attribute::CHANGED_ADDRESS, at("203.0.113.2:3479"));
    let expected = BindingResponse {
        txid: TXID,
        mapped: at("198.51.100.7:50000"),
        other: Some(at("203.0.113.2:3479")),
        origin: Some(at("203.0.113.1:3478")),
    };
    assert_eq!(decode_binding_response(&message.finish()), Ok(expected));
}

#[test]
fn answers_that_cannot_be_right_are_refused() {
    let success = |build: fn(&mut Writer)| {
        let mut message = Writer::current(kind::BINDING_SUCCESS, &TXID);
        build(&mut message);
        decode_binding_response(&message.finish())
    };
    assert_eq!(success(|_| {}), Err(StunError::NoAddress));
    assert_eq!(success(|m| m.xor_address(attribute::XOR_MAPPED_ADDRESS, at("0.0.0.0:5"))), Err(StunError::NoAddress));
    assert_eq!(success(|m| m.attribute(attribute::XOR_MAPPED_ADDRESS, &[0, 1, 2])), Err(StunError::Malformed));
    let request = binding_request(&TXID, Change::default());
    assert_eq!(decode_binding_response(&request), Err(StunError::NotAResponse));
    let mut wrong = ask(&request, &four()).unwrap().bytes;
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    assert_eq!(decode_binding_response(&wrong), Err(StunError::BadFingerprint));
}

#[test]
fn the_sample_responses_of_rfc_5769_decode() {
    // Section 2.2.
    let ipv4 = [
        0x01, 0x01, 0x00, 0x3c, 0x21, 0x12, 0xa4, 0x42, 0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87,
        0xdf, 0xae, 0x80, 0x22, 0x00, 0x0b, 0x74, 0x65, 0x73, 0x74, 0x20, 0x76, 0x65, 0x63, 0x74, 0x6f, 0x72, 0x20,
        0x00, 0x20, 0x00, 0x08, 0x00, 0x01, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43, 0x00, 0x08, 0x00, 0x14, 0x2b, 0x91,
        0xf5, 0x99, 0xfd, 0x9e, 0x90, 0xc3, 0x8c, 0x74, 0x89, 0xf9, 0x2a, 0xf9, 0xba, 0x53, 0xf0, 0x6b, 0xe7, 0xd7,
        0x80, 0x28, 0x00, 0x04, 0xc0, 0x7d, 0x4c, 0x96,
    ];
    assert_eq!(fingerprint(&ipv4), Some(true));
    assert_eq!(decode_binding_response(&ipv4).unwrap().mapped, at("192.0.2.1:32853"));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), header in 0u8..4) {
        // Mostly things that look like STUN, so that the inner layers are reached.
        if header > 0 && bytes.len() >= HEADER {
            bytes[0] = 0;
            bytes[1] = 1;
            let len = u16::try_from(bytes.len() - HEADER).unwrap();
            bytes[2..4].copy_from_slice(&len.to_be_bytes());
            if header > 1 {
                bytes[4..8].copy_from_slice(&MAGIC_COOKIE);
            }
            if header > 2 {
                bytes[0] = 1;
            }
        }
        let _ = decode_binding_response(&bytes);
        let _ = ask(&bytes, &four());
    }

    #[test]
    fn random_attributes_never_panic(
        attributes in proptest::collection::vec((0u16..0x40, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
        success in any::<bool>(),
    ) {
        let mut message = Writer::current(if success { kind::BINDING_SUCCESS } else { kind::BINDING_REQUEST }, &TXID);
        for (kind, optional, value) in attributes {
            message.attribute(kind | if optional { 0x8000 } else { 0 }, &value);
        }
        let bytes = message.finish();
        prop_assert!(is_well_formed(&bytes));
        let _ = decode_binding_response(&bytes);
        let _ = ask(&bytes, &four());
    }

    #[test]
    fn a_flipped_bit_is_noticed_unless_it_hides_the_fingerprint(position in 0usize..28, bit in 0u8..8) {
        let mut request = binding_request(&TXID, Change::default());
        request[position] ^= 1 << bit;
        if find(&request, attribute::FINGERPRINT).is_some() {
            prop_assert_eq!(ask(&request, &four()), None);
        }
    }
}

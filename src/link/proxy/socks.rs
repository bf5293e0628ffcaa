//! SOCKS5 (RFC 1928) with name and password (RFC 1929). The host goes to the proxy as it stands in the coordinator's URL, so
//! that names are resolved there.
//!
//! ```text
//! → 05 n methods                     methods: 00 none, 02 name and password
//! ← 05 method                        FF: none of these
//! → 01 len name len password         only if 02 was chosen
//! ← 01 status                        00: accepted
//! → 05 01 00 type host port          type 01: 4 bytes, 04: 16 bytes, 03: len name; port big-endian
//! ← 05 reply 00 type host port       reply 00: from here on bytes pass both ways
//! ```

use std::net::IpAddr;

use zeroize::Zeroizing;

use crate::link::proxy::Credentials;
use crate::link::proxy::failure::ProxyFailure;
use crate::link::proxy::handshake::{Step, shown};

const VERSION: u8 = 5;
const AUTH_VERSION: u8 = 1;
const NONE: u8 = 0;
const PASSWORD: u8 = 2;
const NO_METHOD: u8 = 0xFF;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// Where a SOCKS5 handshake stands.
pub(super) struct Socks {
    state: State,
    credentials: Option<Credentials>,
    request: Vec<u8>,
    /// Bytes of the answer that is being waited for; the longest is 262.
    got: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Method,
    Auth,
    Reply,
}

impl Socks {
    pub(super) fn start(host: &str, port: u16, credentials: Option<Credentials>) -> (Self, Zeroizing<Vec<u8>>) {
        let mut request = vec![VERSION, CONNECT, 0];
        match host.parse() {
            Ok(IpAddr::V4(ip)) => {
                request.push(IPV4);
                request.extend(ip.octets());
            }
            Ok(IpAddr::V6(ip)) => {
                request.push(IPV6);
                request.extend(ip.octets());
            }
            Err(_) => {
                request.push(NAME);
                push_short(&mut request, host.as_bytes());
            }
        }
        request.extend(port.to_be_bytes());
        let first = if credentials.is_some() { vec![VERSION, 2, NONE, PASSWORD] } else { vec![VERSION, 1, NONE] };
        (Self { state: State::Method, credentials, request, got: Vec::new() }, Zeroizing::new(first))
    }

    pub(super) fn receive(&mut self, bytes: &[u8]) -> Result<Step, ProxyFailure> {
        let mut bytes = bytes.iter();
        let mut step = Step::More;
        for byte in bytes.by_ref() {
            self.got.push(*byte);
            step = self.judge()?;
            if step != Step::More {
                break;
            }
        }
        if bytes.len() > 0 {
            return Err(ProxyFailure::NotAProxy("it speaks before it was spoken to".to_owned()));
        }
        Ok(step)
    }

    pub(super) fn closed(&self) -> ProxyFailure {
        ProxyFailure::Closed(
            match (self.state, self.got.is_empty()) {
                (State::Method, true) => "without a word",
                (State::Auth, true) => "on the name and password",
                (State::Reply, true) => "on the request to connect",
                (_, false) => "in the middle of its answer",
            }
            .to_owned(),
        )
    }

    /// Looks at the bytes so far, of which the last has just come.
    fn judge(&mut self) -> Result<Step, ProxyFailure> {
        match (self.state, self.got.as_slice()) {
            (State::Method | State::Reply, [VERSION]) | (State::Auth, [AUTH_VERSION]) => Ok(Step::More),
            (_, [_]) => Err(self.nonsense()),
            (State::Method, got) => {
                let method = got.get(1).copied().unwrap_or(NO_METHOD);
                self.chosen(method)
            }
            (State::Auth, [_, 0]) => Ok(self.ask(State::Reply)),
            (State::Auth, _) => Err(ProxyFailure::AuthRefused("SOCKS5 authentication failed".to_owned())),
            (State::Reply, &[_, reply]) if reply != 0 => Err(refused(reply)),
            (State::Reply, got) => {
                let len = match got {
                    [_, _, _] | [_, _] => return Ok(Step::More),
                    [_, _, _, IPV4, ..] => 4 + 4 + 2,
                    [_, _, _, IPV6, ..] => 4 + 16 + 2,
                    [_, _, _, NAME] => return Ok(Step::More),
                    [_, _, _, NAME, name, ..] => 4 + 1 + usize::from(*name) + 2,
                    _ => return Err(self.nonsense()),
                };
                Ok(if got.len() == len { Step::Done } else { Step::More })
            }
        }
    }

    fn chosen(&mut self, method: u8) -> Result<Step, ProxyFailure> {
        match (method, &self.credentials) {
            (NONE, _) => Ok(self.ask(State::Reply)),
            (PASSWORD, Some(Credentials { name, password })) => {
                let mut message = Zeroizing::new(Vec::with_capacity(3 + name.len() + password.len()));
                message.push(AUTH_VERSION);
                push_short(&mut message, name);
                push_short(&mut message, password);
                self.expect(State::Auth);
                Ok(Step::Send(message))
            }
            (NO_METHOD, None) => Err(ProxyFailure::AuthNeeded("it takes no SOCKS5 connection without".to_owned())),
            (NO_METHOD, Some(_)) => {
                Err(ProxyFailure::AuthUnsupported("it takes neither none nor a name and password".to_owned()))
            }
            _ => Err(self.nonsense()),
        }
    }

    fn ask(&mut self, state: State) -> Step {
        self.expect(state);
        Step::Send(Zeroizing::new(self.request.clone()))
    }

    fn expect(&mut self, state: State) {
        self.state = state;
        self.got.clear();
    }

    fn nonsense(&self) -> ProxyFailure {
        let hint = if self.got.first() == Some(&b'H') { "; it may be an HTTP proxy" } else { "" };
        ProxyFailure::NotAProxy(format!("it sent {}{hint}", shown(&self.got)))
    }
}

/// A length of one byte, then so many bytes. What is longer was refused before.
fn push_short(out: &mut Vec<u8>, bytes: &[u8]) {
    let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    out.push(len);
    out.extend_from_slice(bytes.get(..usize::from(len)).unwrap_or_default());
}

/// RFC 1928 section 6.
fn refused(reply: u8) -> ProxyFailure {
    let how = |text: &str| format!("SOCKS5 reply {reply}: {text}");
    match reply {
        1 => ProxyFailure::Refused(how("general failure")),
        2 => ProxyFailure::Forbidden(how("not allowed by its rules")),
        3 => ProxyFailure::NoWay(how("network unreachable")),
        4 => ProxyFailure::NoWay(how("host unreachable")),
        5 => ProxyFailure::NoWay(how("connection refused")),
        6 => ProxyFailure::NoWay(how("took too long")),
        7 => ProxyFailure::Refused(how("it does not know how to connect")),
        8 => ProxyFailure::Refused(how("it does not know this kind of address")),
        _ => ProxyFailure::Refused(how("unknown")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn credentials() -> Option<Credentials> {
        Some(Credentials { name: b"ann".to_vec().into(), password: b"pw".to_vec().into() })
    }

    /// The handshake against these answers: everything that was sent, and how it ended.
    fn play(
        host: &str,
        credentials: Option<Credentials>,
        answers: &[&[u8]],
    ) -> (Vec<Vec<u8>>, Result<Step, ProxyFailure>) {
        let (mut socks, first) = Socks::start(host, 443, credentials);
        let mut sent = vec![first.to_vec()];
        let mut last = Ok(Step::More);
        for answer in answers {
            for byte in *answer {
                last = socks.receive(&[*byte]);
                if let Ok(Step::Send(bytes)) = &last {
                    sent.push(bytes.to_vec());
                }
            }
        }
        (sent, last)
    }

    #[test]
    fn names_and_addresses_go_to_the_proxy_as_they_are() {
        let ok: [&[u8]; 2] = [&[5, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]];
        let (sent, end) = play("vpn.org", None, &ok);
        assert_eq!(end, Ok(Step::Done));
        assert_eq!(sent, [vec![5, 1, 0], [&[5, 1, 0, 3, 7], &b"vpn.org"[..], &[1, 187]].concat()]);
        let (sent, _) = play("192.0.2.1", None, &ok);
        assert_eq!(sent[1], [5, 1, 0, 1, 192, 0, 2, 1, 1, 187]);
        let (sent, _) = play("2001:db8::1", None, &ok);
        assert_eq!(
            sent[1],
            [&[5, 1, 0, 4][..], &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], &[1, 187]].concat()
        );
    }

    #[test]
    fn name_and_password_go_when_the_proxy_asks_for_them() {
        let reply: &[u8] = &[5, 0, 0, 3, 2, b'x', b'y', 0, 80];
        let (sent, end) = play("h", credentials(), &[&[5, 2], &[1, 0], reply]);
        assert_eq!(end, Ok(Step::Done));
        assert_eq!(sent[..2], [vec![5, 2, 0, 2], b"\x01\x03ann\x02pw".to_vec()]);
        assert_eq!(sent.len(), 3);
        let (sent, end) =
            play("h", credentials(), &[&[5, 0], &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]);
        assert_eq!((sent.len(), end), (2, Ok(Step::Done)), "not asked for, not told");
    }

    #[test]
    fn every_refusal_has_its_name() {
        let code = |given, answers: &[&[u8]]| play("h", given, answers).1.unwrap_err().code();
        assert_eq!(code(None, &[&[5, 0xFF]]), "proxy-auth-needed");
        assert_eq!(code(credentials(), &[&[5, 0xFF]]), "proxy-auth-unsupported");
        assert_eq!(code(credentials(), &[&[5, 2], &[1, 1]]), "proxy-auth-refused");
        for (reply, name) in [
            (1, "proxy-refused"),
            (2, "proxy-forbidden"),
            (3, "proxy-no-way"),
            (4, "proxy-no-way"),
            (5, "proxy-no-way"),
            (6, "proxy-no-way"),
            (7, "proxy-refused"),
            (8, "proxy-refused"),
            (200, "proxy-refused"),
        ] {
            assert_eq!(code(None, &[&[5, 0], &[5, reply]]), name, "{reply}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_told_at_the_first_wrong_byte() {
        for answers in [&[&b"H"[..]][..], &[&[4]], &[&[5, 2]], &[&[5, 9]], &[&[5, 0], &[4]], &[&[5, 0], &[5, 0, 0, 9]]]
        {
            let end = play("h", None, answers).1;
            assert_eq!(end.as_ref().map_err(ProxyFailure::code), Err("not-a-proxy"), "{answers:?}");
        }
        let (mut socks, _) = Socks::start("h", 1, None);
        assert_eq!(socks.closed(), ProxyFailure::Closed("without a word".to_owned()));
        assert!(matches!(socks.receive(&[5, 0, 7]), Err(ProxyFailure::NotAProxy(_))), "more than was asked for");
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_within_bounds(pieces in proptest::collection::vec(any::<Vec<u8>>(), 0..20), given: bool) {
            let (mut socks, _) = Socks::start("h", 1, if given { credentials() } else { None });
            let _ = socks.receive(&[5, 0]);
            for piece in pieces {
                if socks.receive(&piece).is_err() {
                    break;
                }
                prop_assert!(socks.got.len() <= 262);
            }
        }
    }
}

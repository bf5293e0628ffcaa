//! HTTP/1.1 CONNECT (RFC 9110 section 9.3.6) with Basic authentication (RFC 7617).
//!
//! ```text
//! CONNECT HOST:PORT HTTP/1.1 ⏎ Host: HOST:PORT ⏎ User-Agent: meshd/… ⏎ [Proxy-Authorization: Basic …] ⏎ ⏎
//! HTTP/1.x 2xx … ⏎ … ⏎ ⏎     from here on bytes pass both ways
//! ```
//!
//! The credentials go with the first request: meshd knows no other scheme, so there is nothing to wait for.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use zeroize::Zeroizing;

use crate::link::proxy::Credentials;
use crate::link::proxy::failure::ProxyFailure;
use crate::link::proxy::handshake::{Step, shown};

/// The longest head of an answer that is read, in bytes.
const MAX_HEAD: usize = 16 << 10;
/// How every answer begins.
const BEGINNING: &[u8] = b"HTTP/1.";

/// Waits for the answer to a CONNECT.
pub(super) struct Connect {
    with_credentials: bool,
    head: Vec<u8>,
}

impl Connect {
    pub(super) fn start(authority: &str, credentials: Option<&Credentials>) -> (Self, Zeroizing<Vec<u8>>) {
        let agent = concat!("meshd/", env!("CARGO_PKG_VERSION"));
        let mut request = Zeroizing::new(Vec::with_capacity(1024));
        request.extend_from_slice(
            format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: {agent}\r\n").as_bytes(),
        );
        if let Some(Credentials { name, password }) = credentials {
            let plain = Zeroizing::new([name.as_slice(), b":", password.as_slice()].concat());
            let encoded = Zeroizing::new(BASE64_STANDARD.encode(&*plain));
            request.extend_from_slice(b"Proxy-Authorization: Basic ");
            request.extend_from_slice(encoded.as_bytes());
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"\r\n");
        (Self { with_credentials: credentials.is_some(), head: Vec::new() }, request)
    }

    pub(super) fn receive(&mut self, bytes: &[u8]) -> Result<Step, ProxyFailure> {
        self.head.extend_from_slice(bytes.get(..bytes.len().min(MAX_HEAD + 1 - self.head.len())).unwrap_or_default());
        loop {
            let begun = self.head.len().min(BEGINNING.len());
            if self.head.get(..begun) != BEGINNING.get(..begun) {
                return Err(ProxyFailure::NotAProxy(format!("it sent {}", shown(&self.head))));
            }
            let Some(end) = end_of_head(&self.head) else {
                if self.head.len() > MAX_HEAD {
                    return Err(ProxyFailure::NotAProxy("its answer does not end".to_owned()));
                }
                return Ok(Step::More);
            };
            let status = status(&self.head)
                .ok_or_else(|| ProxyFailure::NotAProxy(format!("its answer begins {}", shown(&self.head))))?;
            match status {
                // Interim: the answer is still to come (RFC 9110 section 15.2).
                100..200 => {
                    self.head.drain(..end);
                    if self.head.is_empty() {
                        return Ok(Step::More);
                    }
                }
                200..300 if self.head.len() == end => return Ok(Step::Done),
                200..300 => return Err(ProxyFailure::NotAProxy("it speaks before it was spoken to".to_owned())),
                status => return Err(self.refused(status, end)),
            }
        }
    }

    pub(super) fn closed(&self) -> ProxyFailure {
        ProxyFailure::Closed(
            if self.head.is_empty() { "without a word" } else { "in the middle of its answer" }.to_owned(),
        )
    }

    fn refused(&self, status: u16, end: usize) -> ProxyFailure {
        let how = format!("it answered HTTP {status}");
        match status {
            // 401 is tinyproxy's answer to wrong credentials.
            401 | 407 => {
                let schemes = challenges(self.head.get(..end).unwrap_or_default());
                let basic = schemes.is_empty() || schemes.iter().any(|scheme| scheme.eq_ignore_ascii_case("basic"));
                if !basic {
                    ProxyFailure::AuthUnsupported(format!("{how} and offers {}", schemes.join(", ")))
                } else if self.with_credentials {
                    ProxyFailure::AuthRefused(how)
                } else {
                    ProxyFailure::AuthNeeded(how)
                }
            }
            403 | 405 => ProxyFailure::Forbidden(how),
            // Squid says 503, others 502 or 504, when the other side does not take the connection.
            502..=504 => ProxyFailure::NoWay(how),
            _ => ProxyFailure::Refused(how),
        }
    }
}

/// Where the head ends, behind its empty line.
fn end_of_head(head: &[u8]) -> Option<usize> {
    let at = |end: &[u8]| head.windows(end.len()).position(|window| window == end).map(|at| at + end.len());
    match (at(b"\r\n\r\n"), at(b"\n\n")) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The status code of `HTTP/1.x 200 …`.
fn status(head: &[u8]) -> Option<u16> {
    let line = head.split(|b| *b == b'\n').next()?;
    let rest = line.strip_prefix(BEGINNING)?;
    let (version, rest) = rest.split_first()?;
    let digits = rest.strip_prefix(b" ")?.first_chunk::<3>()?;
    let ended = rest.get(4).is_none_or(|b| matches!(b, b' ' | b'\r'));
    if !version.is_ascii_digit() || !digits.iter().all(u8::is_ascii_digit) || !ended {
        return None;
    }
    let status = digits.iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'));
    (100..600).contains(&status).then_some(status)
}

/// The schemes of all Proxy-Authenticate fields (RFC 9110 section 11.7.1): the words that begin a challenge, which are those
/// that no `=` belongs to. A few, for a person; what is not a word is left out.
fn challenges(head: &[u8]) -> Vec<String> {
    let mut schemes: Vec<String> = Vec::new();
    for line in head.split(|b| *b == b'\n') {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) = line.split_at(colon);
        if !name.eq_ignore_ascii_case(b"proxy-authenticate") {
            continue;
        }
        for part in String::from_utf8_lossy(value.get(1..).unwrap_or_default()).split(',') {
            let word = part.split_whitespace().next().unwrap_or_default();
            let is_word = !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if is_word && word.len() <= 16 && schemes.len() < 4 && !schemes.iter().any(|known| known == word) {
                schemes.push(word.to_owned());
            }
        }
    }
    schemes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn credentials() -> Credentials {
        Credentials { name: b"ann".to_vec().into(), password: b"s:ecret".to_vec().into() }
    }

    fn answer(with_credentials: bool, answer: &[u8]) -> Result<Step, ProxyFailure> {
        let given = credentials();
        Connect::start("vpn.example.org:443", with_credentials.then_some(&given)).0.receive(answer)
    }

    fn code(with_credentials: bool, text: &str) -> &'static str {
        answer(with_credentials, text.as_bytes()).unwrap_err().code()
    }

    #[test]
    fn the_request_names_the_host_and_carries_the_credentials() {
        let (_, request) = Connect::start("vpn.example.org:443", None);
        let agent = concat!("meshd/", env!("CARGO_PKG_VERSION"));
        let plain =
            format!("CONNECT vpn.example.org:443 HTTP/1.1\r\nHost: vpn.example.org:443\r\nUser-Agent: {agent}\r\n");
        assert_eq!(String::from_utf8_lossy(&request), format!("{plain}\r\n"));
        let (_, request) = Connect::start("vpn.example.org:443", Some(&credentials()));
        let authorization = "Proxy-Authorization: Basic YW5uOnM6ZWNyZXQ=\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&request), format!("{plain}{authorization}"));
    }

    #[test]
    fn a_tunnel_begins_with_any_2xx_in_pieces_of_any_size() {
        for text in [
            "HTTP/1.1 200 Connection established\r\n\r\n",
            "HTTP/1.0 200\r\nProxy-Agent: x\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\n\n",
        ] {
            for size in 1..=text.len() {
                let (mut connect, _) = Connect::start("h:1", None);
                let mut steps: Vec<_> = text.as_bytes().chunks(size).map(|c| connect.receive(c).unwrap()).collect();
                assert_eq!(steps.pop(), Some(Step::Done), "{text:?} by {size}");
                assert!(steps.iter().all(|step| *step == Step::More));
            }
        }
    }

    #[test]
    fn every_refusal_has_its_name() {
        let basic = "HTTP/1.1 407 Auth\r\nProxy-Authenticate: Basic realm=\"a, b\"\r\n\r\n";
        assert_eq!(code(false, basic), "proxy-auth-needed");
        assert_eq!(code(true, basic), "proxy-auth-refused");
        assert_eq!(code(true, "HTTP/1.1 407 Auth\r\n\r\n"), "proxy-auth-refused");
        assert_eq!(code(true, "HTTP/1.0 401 Unauthorized\r\nWWW-Authenticate: x\r\n\r\n"), "proxy-auth-refused");
        let others = "HTTP/1.1 407 Auth\r\nproxy-authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n";
        assert_eq!(code(true, others), "proxy-auth-unsupported");
        let said = format!("{:?}", answer(true, others.as_bytes()));
        assert!(said.contains("NTLM, Negotiate"), "{said}");
        let either = "HTTP/1.1 407 Auth\r\nProxy-Authenticate: NTLM, Basic realm=\"x\"\r\n\r\n";
        assert_eq!(code(false, either), "proxy-auth-needed");
        for (status, name) in [
            (403, "proxy-forbidden"),
            (405, "proxy-forbidden"),
            (502, "proxy-no-way"),
            (503, "proxy-no-way"),
            (400, "proxy-refused"),
            (500, "proxy-refused"),
            (302, "proxy-refused"),
        ] {
            assert_eq!(code(false, &format!("HTTP/1.1 {status} No\r\nContent-Length: 2\r\n\r\nhi")), name, "{status}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_told_at_the_first_wrong_byte() {
        for text in [
            "SSH-2.0-OpenSSH_9.9\r\n",
            "\x05\x00",
            "HTTX",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 999 What\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n220 ready",
        ] {
            assert_eq!(code(false, text), "not-a-proxy", "{text:?}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(MAX_HEAD));
        assert_eq!(code(false, &endless), "not-a-proxy");
        let (mut connect, _) = Connect::start("h:1", None);
        assert_eq!(connect.closed(), ProxyFailure::Closed("without a word".to_owned()));
        assert_eq!(connect.receive(b"HTTP/1.1 20"), Ok(Step::More));
        assert_eq!(connect.closed(), ProxyFailure::Closed("in the middle of its answer".to_owned()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_within_bounds(pieces in proptest::collection::vec(any::<Vec<u8>>(), 0..50), real: bool) {
            let (mut connect, _) = Connect::start("h:1", None);
            if real {
                connect.receive(b"HTTP/1.1 2").unwrap();
            }
            for piece in pieces {
                if connect.receive(&piece).is_err() {
                    break;
                }
                prop_assert!(connect.head.len() <= MAX_HEAD + 1);
            }
        }
    }
}

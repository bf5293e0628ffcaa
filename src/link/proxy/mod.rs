//! Reaching the coordinator through an HTTP CONNECT or SOCKS5 proxy.
//!
//! ```text
//! choice.rs     which proxy, if any: `--proxy`, else HTTPS_PROXY and ALL_PROXY with NO_PROXY
//! http.rs       CONNECT (RFC 9110 section 9.3.6), Basic (RFC 7617)    ┐ pure: bytes in, bytes out
//! socks.rs      SOCKS5 (RFC 1928), name and password (RFC 1929)       ┘
//! handshake.rs  the two behind one face
//! failure.rs    what a proxy does instead of connecting, as sentences
//! tunnel.rs     sockets and deadlines
//! ```
//!
//! A proxy only moves bytes: TLS and Noise run through it to the coordinator, whose key the token pins. Names are resolved
//! by the proxy. What a person must not see in a log or a status, the credentials, is in no `Debug` or `Display` here.

mod choice;
mod failure;
mod handshake;
mod http;
mod socks;
mod tunnel;

pub use choice::{DIRECT, Environment, Proxies, ProxySetting};
pub use failure::ProxyFailure;
pub(super) use tunnel::through;

use std::fmt;

use url::{Host, Url};
use zeroize::Zeroizing;

use crate::link::error::ConnectError;

/// The longest name and the longest password (RFC 1929 section 2), in bytes.
const MAX_CREDENTIAL: usize = 255;
/// The longest host name SOCKS5 can carry (RFC 1928 section 5), in bytes.
const MAX_HOST: usize = 255;

/// What a proxy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// HTTP/1.1 CONNECT.
    Http,
    /// SOCKS version 5.
    Socks5,
}

/// A proxy, as named by a URL.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    kind: Kind,
    host: String,
    host_is_ipv6: bool,
    port: u16,
    credentials: Option<Credentials>,
}

/// A name and a password for a proxy. Wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
struct Credentials {
    name: Zeroizing<Vec<u8>>,
    password: Zeroizing<Vec<u8>>,
}

impl Proxy {
    /// Reads `http://[NAME:PASSWORD@]HOST[:PORT]`, the same with `socks5://` or `socks5h://`, or `HOST:PORT`, which is an HTTP
    /// proxy. Without a port it is 80 or 1080. Percent-encoding in name and password is decoded.
    ///
    /// # Errors
    /// [`ConnectError::BadProxy`]; what it shows of the text has no credentials in it.
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        let text = text.trim();
        let bad = |why: &str| ConnectError::BadProxy { shown: redacted(text), why: why.to_owned() };
        let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let url = Url::parse(&Zeroizing::new(full)).map_err(|e| bad(&e.to_string()))?;
        let kind = match url.scheme() {
            "http" => Kind::Http,
            "socks5" | "socks5h" => Kind::Socks5,
            "https" => return Err(bad("TLS to the proxy itself is not supported; most proxies take http:// as well")),
            other => return Err(bad(&format!("the scheme {other:?} is not http, socks5 or socks5h"))),
        };
        let (host, host_is_ipv6) = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => (name.to_owned(), false),
            Some(Host::Ipv4(ip)) => (ip.to_string(), false),
            Some(Host::Ipv6(ip)) => (ip.to_string(), true),
            Some(Host::Domain(_)) | None => return Err(bad("it has no host")),
        };
        let default = if kind == Kind::Http { 80 } else { 1080 };
        let port = url.port().unwrap_or(default);
        if port == 0 {
            return Err(bad("its port is 0"));
        }
        // Most likely a password with a sign in it that ends the host.
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(bad("something follows the host; signs such as / ? # in a password are written %2F %3F %23"));
        }
        let credentials = credentials(&url, kind).map_err(bad)?;
        Ok(Self { kind, host, host_is_ipv6, port, credentials })
    }

    /// The URL with the credentials in it, for a private file.
    fn secret_text(&self) -> Zeroizing<String> {
        let Some(credentials) = &self.credentials else { return Zeroizing::new(self.to_string()) };
        let (name, password) = (encoded(&credentials.name), encoded(&credentials.password));
        Zeroizing::new(format!("{}://{}:{}@{}", self.scheme(), *name, *password, self.authority()))
    }

    /// It was given a name and a password.
    #[must_use]
    pub const fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    const fn scheme(&self) -> &'static str {
        match self.kind {
            Kind::Http => "http",
            Kind::Socks5 => "socks5",
        }
    }

    fn authority(&self) -> String {
        authority(&self.host, self.port, self.host_is_ipv6)
    }
}

/// The URL without credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority())
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

fn authority(host: &str, port: u16, is_ipv6: bool) -> String {
    if is_ipv6 { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn credentials(url: &Url, kind: Kind) -> Result<Option<Credentials>, &'static str> {
    let (name, password) = (decoded(url.username()), decoded(url.password().unwrap_or_default()));
    if name.is_empty() && password.is_empty() {
        return Ok(None);
    }
    let all = || name.iter().chain(password.iter());
    if name.is_empty() {
        return Err("it has a password but no name");
    }
    if name.len() > MAX_CREDENTIAL || password.len() > MAX_CREDENTIAL {
        return Err("its name or password is longer than 255 bytes");
    }
    if all().any(u8::is_ascii_control) {
        return Err("its name or password has a control character in it");
    }
    // RFC 7617 section 2: the first colon ends the name.
    if kind == Kind::Http && name.contains(&b':') {
        return Err("its name has a colon in it, which an HTTP proxy cannot be told");
    }
    Ok(Some(Credentials { name, password }))
}

/// What may be shown of a text that should be a proxy's URL: a mistyped one may hold a password anywhere before its last `@`.
fn redacted(text: &str) -> String {
    match text.rsplit_once('@') {
        Some((_, after)) => format!("…@{after}"),
        None => text.to_owned(),
    }
}

/// Percent-decoding (RFC 3986 section 2.1); a stray `%` stands for itself.
fn decoded(text: &str) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'%').then(|| after.first_chunk()).flatten().and_then(|[a, b]: &[u8; 2]| {
            let digit = |c: &u8| char::from(*c).to_digit(16).and_then(|d| u8::try_from(d).ok());
            Some(digit(a)? << 4 | digit(b)?)
        });
        out.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    out
}

/// The reverse: everything but letters and digits is escaped.
fn encoded(bytes: &[u8]) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(bytes.len() * 3));
    for byte in bytes {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod url_tests {
    use super::*;

    #[test]
    fn urls_become_proxies_and_show_no_credentials() {
        for (text, shown, secret) in [
            ("http://proxy.corp:3128", "http://proxy.corp:3128", "http://proxy.corp:3128"),
            ("proxy.corp:3128", "http://proxy.corp:3128", "http://proxy.corp:3128"),
            (" http://proxy.corp/ ", "http://proxy.corp:80", "http://proxy.corp:80"),
            ("socks5://10.0.0.1", "socks5://10.0.0.1:1080", "socks5://10.0.0.1:1080"),
            ("socks5h://u@[2001:db8::1]:9050", "socks5://[2001:db8::1]:9050", "socks5://u:@[2001:db8::1]:9050"),
            ("http://ann:s%40crE%74@p:1", "http://p:1", "http://ann:s%40crEt@p:1"),
            ("http://ann:pass@word@p:1", "http://p:1", "http://ann:pass%40word@p:1"),
        ] {
            let proxy = Proxy::parse(text).unwrap();
            assert_eq!(proxy.to_string(), shown, "{text}");
            assert_eq!(*proxy.secret_text(), secret, "{text}");
            assert_eq!(Proxy::parse(&proxy.secret_text()).unwrap(), proxy);
            assert!(!format!("{proxy:?}").contains("ss"), "{proxy:?}");
        }
    }

    #[test]
    fn what_is_no_proxy_url_is_refused_without_its_password() {
        let long = format!("http://{}:x@p:1", "u".repeat(256));
        for text in [
            "",
            "https://u:secret@proxy:443",
            "socks4://u:secret@proxy:1",
            "ftp://u:secret@proxy",
            "http://u:sec/ret@proxy:1",
            "http://u:secret@proxy:99999",
            "http://:secret@proxy:1",
            "http://a%3Ab:secret@proxy:1",
            "http://u:sec%0aret@proxy:1",
            "http://proxy:0",
            "http://u:1/secret@proxy:1",
            "http://u:1#secret@proxy:1",
            "socks5://:1080",
            &long,
        ] {
            let error = Proxy::parse(text).unwrap_err();
            assert_eq!(error.code(), "proxy-url", "{text:?}");
            let shown = format!("{error} {error:?} {}", error.hint());
            assert!(!shown.contains("secret") && !shown.contains("sec/ret") && !shown.contains("uuu"), "{shown}");
        }
    }

    #[test]
    fn percent_encoding_is_undone_and_a_stray_sign_is_itself() {
        for (text, bytes) in [("a%20b", &b"a b"[..]), ("100%", b"100%"), ("%zz%41", b"%zzA"), ("%4", b"%4"), ("", b"")]
        {
            assert_eq!(decoded(text).as_slice(), bytes);
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(*decoded(&encoded(&all)), all);
    }
}

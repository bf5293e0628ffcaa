//! A coordinator's URL, taken apart.

use std::fmt;

use url::{Host, Url};

use crate::link::error::ConnectError;
use crate::link::noise::Purpose;

/// Where a coordinator is: scheme, host, port and path prefix of its URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `https` or `wss`.
    pub tls: bool,
    /// A DNS name, or an address (IPv6 without brackets).
    pub host: String,
    /// TCP port.
    pub port: u16,
    host_is_ipv6: bool,
    prefix: String,
}

impl Endpoint {
    /// Reads `https://`, `wss://`, `http://` or `ws://`, a host, and optionally a port (else 443 or 80) and a path that
    /// goes before meshd's own. Query and fragment are ignored.
    ///
    /// # Errors
    /// [`ConnectError::BadUrl`].
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        let bad = |why: &str| ConnectError::BadUrl { url: text.to_owned(), why: why.to_owned() };
        let url = Url::parse(text).map_err(|e| bad(&e.to_string()))?;
        let tls = match url.scheme() {
            "https" | "wss" => true,
            "http" | "ws" => false,
            other => return Err(bad(&format!("the scheme {other:?} is not https, http, wss or ws"))),
        };
        let (host, host_is_ipv6) = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => (name.to_owned(), false),
            Some(Host::Ipv4(ip)) => (ip.to_string(), false),
            Some(Host::Ipv6(ip)) => (ip.to_string(), true),
            Some(Host::Domain(_)) | None => return Err(bad("it has no host")),
        };
        let port = url.port_or_known_default().unwrap_or(if tls { 443 } else { 80 });
        Ok(Self { tls, host, port, host_is_ipv6, prefix: url.path().trim_end_matches('/').to_owned() })
    }

    /// The WebSocket URL of one purpose.
    #[must_use]
    pub fn websocket_url(&self, purpose: Purpose) -> String {
        let scheme = if self.tls { "wss" } else { "ws" };
        format!("{scheme}://{self}{}{}", self.prefix, purpose.path())
    }
}

/// `host:port`, as in a URL.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host_is_ipv6 {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_endpoints() {
        for (url, tls, shown, websocket) in [
            ("https://mesh.example.org", true, "mesh.example.org:443", "wss://mesh.example.org:443/v1/control"),
            ("http://10.0.0.1", false, "10.0.0.1:80", "ws://10.0.0.1:80/v1/control"),
            ("wss://[2001:db8::1]:8443/", true, "[2001:db8::1]:8443", "wss://[2001:db8::1]:8443/v1/control"),
            ("ws://localhost:8080/mesh/", false, "localhost:8080", "ws://localhost:8080/mesh/v1/control"),
        ] {
            let endpoint = Endpoint::parse(url).unwrap();
            assert_eq!((endpoint.tls, endpoint.to_string().as_str()), (tls, shown));
            assert_eq!(endpoint.websocket_url(Purpose::Control), websocket);
        }
        assert_eq!(Endpoint::parse("https://[::1]:1/").unwrap().host, "::1");
    }

    #[test]
    fn what_is_not_a_coordinator_url_is_refused_with_its_reason() {
        for url in ["", "mesh.example.org", "ftp://x", "https://", "https://x:99999", "file:///etc/passwd"] {
            let error = Endpoint::parse(url).unwrap_err();
            assert!(matches!(error, ConnectError::BadUrl { .. }), "{url:?}: {error}");
        }
    }
}

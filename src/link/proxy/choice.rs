//! Which proxy, if any: what a person set, else what the environment says.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::link::Endpoint;
use crate::link::error::ConnectError;
use crate::link::proxy::Proxy;

/// What a person decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxySetting {
    /// The environment decides.
    #[default]
    Auto,
    /// No proxy, whatever the environment says.
    None,
    /// This one, whatever the environment says.
    Use(Proxy),
}

impl ProxySetting {
    /// Reads `auto`, `none`, or a proxy's URL.
    ///
    /// # Errors
    /// As [`Proxy::parse`].
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            url => Proxy::parse(url).map(Self::Use),
        }
    }

    /// The text that [`Self::parse`] reads, with the credentials in it.
    #[must_use]
    pub fn secret_text(&self) -> Zeroizing<String> {
        match self {
            Self::Auto => Zeroizing::new("auto".to_owned()),
            Self::None => Zeroizing::new("none".to_owned()),
            Self::Use(proxy) => proxy.secret_text(),
        }
    }
}

/// With the credentials: for a private file, or a pipe.
impl Serialize for ProxySetting {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.secret_text())
    }
}

impl<'de> Deserialize<'de> for ProxySetting {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(d)?);
        Self::parse(&text).map_err(D::Error::custom)
    }
}

/// What the environment says of proxies.
#[derive(Clone, Default)]
pub struct Environment {
    /// `https_proxy`, else `HTTPS_PROXY`.
    pub https: Option<Zeroizing<String>>,
    /// `all_proxy`, else `ALL_PROXY`.
    pub all: Option<Zeroizing<String>>,
    /// `no_proxy`, else `NO_PROXY`.
    pub none: Option<String>,
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").field("none", &self.none).finish_non_exhaustive()
    }
}

impl Environment {
    /// Of this process. The lower-case names win, as with other programs; an empty value counts as none.
    #[must_use]
    pub fn read() -> Self {
        let first = |names: [&str; 2]| {
            names.iter().find_map(|name| std::env::var(name).ok()).filter(|value| !value.trim().is_empty())
        };
        Self {
            https: first(["https_proxy", "HTTPS_PROXY"]).map(Zeroizing::new),
            all: first(["all_proxy", "ALL_PROXY"]).map(Zeroizing::new),
            none: first(["no_proxy", "NO_PROXY"]),
        }
    }
}

/// The proxies in force, and the hosts that are reached without.
#[derive(Debug, Clone)]
pub struct Proxies {
    proxy: Option<Proxy>,
    except: Exceptions,
}

/// No proxy at all.
pub static DIRECT: Proxies = Proxies::direct();

impl Proxies {
    /// No proxy at all.
    #[must_use]
    pub const fn direct() -> Self {
        Self { proxy: None, except: Exceptions(Vec::new()) }
    }

    /// Decides. A proxy that a person set is used for every host; one from the environment for those that `NO_PROXY` does not
    /// name. The coordinator's link is a tunnel whatever its URL says, so `HTTPS_PROXY` holds for `http://` too.
    ///
    /// # Errors
    /// [`ConnectError::BadProxy`]: the environment's proxy cannot be used.
    pub fn new(setting: ProxySetting, environment: &Environment) -> Result<Self, ConnectError> {
        match setting {
            ProxySetting::None => Ok(Self::direct()),
            ProxySetting::Use(proxy) => Ok(Self { proxy: Some(proxy), ..Self::direct() }),
            ProxySetting::Auto => {
                let text = environment.https.as_ref().or(environment.all.as_ref());
                let proxy = text.map(|text| Proxy::parse(text)).transpose()?;
                Ok(Self { proxy, except: Exceptions::parse(environment.none.as_deref().unwrap_or_default()) })
            }
        }
    }

    /// The proxy on the way to a coordinator.
    #[must_use]
    pub fn towards(&self, endpoint: &Endpoint) -> Option<&Proxy> {
        self.proxy.as_ref().filter(|_| !self.except.names(&endpoint.host, endpoint.port))
    }
}

/// `NO_PROXY`: hosts that are reached without a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Exceptions(Vec<Exception>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    Everything,
    /// An address or a range of them.
    Range(IpNet, Option<u16>),
    /// A name, in lower case without a dot at either end; what ends in it counts too.
    Name(String, Option<u16>),
}

impl Exceptions {
    /// Entries are parted by commas or spaces; each is `*`, an address, a range, or a name, perhaps with a leading `.` or `*.`,
    /// and all but `*` perhaps with a port. What is none of these names nothing.
    fn parse(text: &str) -> Self {
        let entries = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty());
        Self(entries.filter_map(Exception::parse).collect())
    }

    fn names(&self, host: &str, port: u16) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let fits = |wanted: &Option<u16>| wanted.is_none_or(|wanted| wanted == port);
        self.0.iter().any(|exception| match exception {
            Exception::Everything => true,
            Exception::Range(range, at) => fits(at) && address.is_some_and(|ip| range.contains(&ip)),
            Exception::Name(name, at) => {
                let before = host.strip_suffix(name.as_str());
                fits(at) && address.is_none() && before.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        })
    }
}

impl Exception {
    fn parse(entry: &str) -> Option<Self> {
        if entry == "*" {
            return Some(Self::Everything);
        }
        if let Some(range) = range(entry) {
            return Some(Self::Range(range, None));
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if let Some(range) = range(bare) {
            return Some(Self::Range(range, port));
        }
        let name = host.trim_start_matches("*.").trim_matches('.').to_ascii_lowercase();
        (!name.is_empty() && !name.contains('*')).then_some(Self::Name(name, port))
    }
}

fn range(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(https: Option<&str>, all: Option<&str>, none: &str) -> Environment {
        let secret = |text: &str| Zeroizing::new(text.to_owned());
        Environment { https: https.map(secret), all: all.map(secret), none: Some(none.to_owned()) }
    }

    fn chosen(setting: ProxySetting, environment: &Environment, url: &str) -> Option<String> {
        let proxies = Proxies::new(setting, environment).unwrap();
        proxies.towards(&Endpoint::parse(url).unwrap()).map(ToString::to_string)
    }

    #[test]
    fn a_set_proxy_wins_over_the_environment_and_its_exceptions() {
        let env = environment(Some("http://env:1"), Some("socks5://all:2"), "vpn.example.org");
        let set = || ProxySetting::parse("http://set:3").unwrap();
        assert_eq!(chosen(set(), &env, "https://vpn.example.org").as_deref(), Some("http://set:3"));
        assert_eq!(chosen(ProxySetting::Auto, &env, "https://vpn.example.org"), None);
        assert_eq!(chosen(ProxySetting::Auto, &env, "https://other.org").as_deref(), Some("http://env:1"));
        assert_eq!(chosen(ProxySetting::Auto, &env, "http://other.org").as_deref(), Some("http://env:1"));
        assert_eq!(chosen(ProxySetting::None, &env, "https://other.org"), None);
        let all = environment(None, Some("socks5://all:2"), "");
        assert_eq!(chosen(ProxySetting::Auto, &all, "https://other.org").as_deref(), Some("socks5://all:2"));
        assert_eq!(chosen(ProxySetting::Auto, &Environment::default(), "https://other.org"), None);
    }

    #[test]
    fn a_proxy_of_the_environment_that_cannot_be_used_is_named() {
        let env = environment(Some("https://u:secret@p:1"), None, "");
        let error = Proxies::new(ProxySetting::Auto, &env).unwrap_err();
        assert_eq!(error.code(), "proxy-url");
        assert!(Proxies::new(ProxySetting::None, &env).is_ok());
        assert!(!format!("{env:?} {error:?}").contains("secret"));
    }

    #[test]
    fn no_proxy_knows_names_suffixes_addresses_ranges_ports_and_all() {
        for (list, host, port, named) in [
            ("*", "anything.org", 443, true),
            ("a.org,b.org", "b.org", 443, true),
            ("a.org b.org", "B.ORG.", 443, true),
            ("example.org", "vpn.example.org", 443, true),
            (".example.org", "vpn.example.org", 443, true),
            ("*.example.org", "vpn.example.org", 443, true),
            (".example.org", "example.org", 443, true),
            ("example.org", "badexample.org", 443, false),
            ("vpn.example.org", "example.org", 443, false),
            ("example.org:8443", "vpn.example.org", 8443, true),
            ("example.org:8443", "vpn.example.org", 443, false),
            ("10.0.0.1", "10.0.0.1", 443, true),
            ("10.0.0.1:443", "10.0.0.1", 443, true),
            ("10.0.0.1:80", "10.0.0.1", 443, false),
            ("10.0.0.0/8", "10.9.8.7", 443, true),
            ("10.0.0.0/8", "11.9.8.7", 443, false),
            ("0.1", "10.0.0.1", 443, false),
            ("2001:db8::/32", "2001:db8::7", 443, true),
            ("[2001:db8::7]:443", "2001:db8::7", 443, true),
            ("2001:db8::7", "2001:db8::7", 443, true),
            ("::1", "2001:db8::1", 443, false),
            ("", "example.org", 443, false),
            (",, ,", "example.org", 443, false),
            ("exa*le.org,example.org:no", "example.org", 443, false),
        ] {
            assert_eq!(Exceptions::parse(list).names(host, port), named, "{list:?} for {host}:{port}");
        }
    }

    #[test]
    fn a_setting_survives_a_private_file_and_shows_nothing_in_debug() {
        for text in ["auto", "none", "http://ann:secret@p:1", "socks5://p:1080"] {
            let setting = ProxySetting::parse(text).unwrap();
            let json = serde_json::to_string(&setting).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<ProxySetting>(&json).unwrap(), setting);
            assert!(!format!("{setting:?}").contains("secret"));
        }
        assert!(serde_json::from_str::<ProxySetting>("\"gopher://x\"").is_err());
    }
}

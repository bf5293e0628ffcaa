//! What a person at the coordinator's machine is told: the URL and the claim token.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

use nix::ifaddrs::getifaddrs;
use serde::Serialize;
use url::{Host, Url};

use crate::link::{self, ConnectError, Endpoint};
use crate::server::state_dir::{Secrets, StateDir};
use crate::server::{judge, open_state, store, store_path};
use crate::trust::keys::Secret32;
use crate::trust::token::ClaimToken;
use crate::wire::local::Problem;

/// The URL that tokens carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    /// The URL, without a slash at its end.
    pub url: String,
    /// Its host.
    pub host: String,
    /// Its path, without a slash at its end; usually empty.
    pub prefix: String,
    /// False: nobody said it; it was derived from the listening address.
    pub given: bool,
}

impl PublicUrl {
    /// The URL given, or one made of the listening address (for a wildcard: the machine's most public address).
    ///
    /// # Errors
    /// `public-url`.
    pub fn decide(given: Option<&str>, listen: SocketAddr, tls: bool) -> Result<Self, Problem> {
        let url = match given {
            Some(url) => url.to_owned(),
            None => derived(listen, tls),
        };
        let bad = |why: &str| Problem {
            code: "public-url".into(),
            text: format!("{url:?} cannot be the coordinator's public URL: {why}"),
            hint: "give the URL under which other machines reach this one, like --public-url https://mesh.example.org"
                .into(),
        };
        let endpoint = Endpoint::parse(&url).map_err(|e| match e {
            ConnectError::BadUrl { why, .. } => bad(&why),
            other => bad(&other.to_string()),
        })?;
        let parsed = Url::parse(&url).map_err(|e| bad(&e.to_string()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() || !parsed.username().is_empty() {
            return Err(bad("only scheme, host, port and path may be in it"));
        }
        let unreachable = match parsed.host() {
            Some(Host::Ipv4(ip)) => ip.is_unspecified(),
            Some(Host::Ipv6(ip)) => ip.is_unspecified(),
            Some(Host::Domain(_)) | None => false,
        };
        if unreachable {
            return Err(bad("no machine can connect to that address"));
        }
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            host: endpoint.host,
            prefix: parsed.path().trim_end_matches('/').to_owned(),
            given: given.is_some(),
        })
    }
}

fn derived(listen: SocketAddr, tls: bool) -> String {
    let ip = if listen.ip().is_unspecified() { own_address() } else { listen.ip() };
    let (scheme, usual) = if tls { ("https", 443) } else { ("http", 80) };
    let host = match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    if listen.port() == usual { format!("{scheme}://{host}") } else { format!("{scheme}://{host}:{}", listen.port()) }
}

/// The address this machine uses towards the internet, or else its first one that is not loopback.
fn own_address() -> IpAddr {
    // Connecting a UDP socket sends nothing; it only asks the kernel which source address it would use.
    let towards = |local: &str, remote: &str| -> Option<IpAddr> {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
    };
    towards("0.0.0.0:0", "192.0.2.1:9")
        .or_else(|| towards("[::]:0", "[2001:db8::1]:9"))
        .or_else(first_address)
        .unwrap_or(IpAddr::from([127, 0, 0, 1]))
}

fn first_address() -> Option<IpAddr> {
    let addresses: Vec<IpAddr> = getifaddrs()
        .ok()?
        .filter_map(|interface| {
            let address = interface.address?;
            address
                .as_sockaddr_in()
                .map(|a| IpAddr::V4(a.ip()))
                .or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .filter(|ip| match ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
        })
        .collect();
    addresses.iter().find(|ip| ip.is_ipv4()).or_else(|| addresses.first()).copied()
}

/// The claim token of a coordinator with these secrets.
#[must_use]
pub(super) fn claim_token(url: &str, secrets: &Secrets) -> String {
    ClaimToken {
        urls: vec![url.to_owned()],
        coordinator: link::public_key(&secrets.key),
        secret: Secret32::new(*secrets.claim.expose()),
    }
    .encode()
}

/// `meshd coordinator claim --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Claim {
    /// 1.
    pub schema: u16,
    /// The claim token, one line.
    pub token: String,
    /// The URL in it.
    pub url: String,
}

/// The claim token of the coordinator with this state directory, which may be running, or may never have been started
/// (then its secrets are made now). The URL in it is `public_url`, or the one of the last start.
///
/// # Errors
/// `not-started` if neither is known; `already-claimed` once the network is founded; problems of the state directory.
pub async fn claim(
    state_dir: &Path,
    store: Option<&Path>,
    public_url: Option<&str>,
    listen: SocketAddr,
    tls: bool,
) -> Result<Claim, Problem> {
    let dir = StateDir::open(state_dir)?;
    let kept = dir.public_url();
    let Some(url) = public_url.or(kept.as_deref()) else {
        return Err(Problem {
            code: "not-started".into(),
            text: "no coordinator has been started here yet, so there is no address to put into a claim token".into(),
            hint: "start `meshd coordinator` first (it prints the token too), or give --public-url URL".into(),
        });
    };
    let (secrets, spent) = if dir.is_initialized() {
        (dir.secrets()?, store::claim_is_spent(&store_path(&dir, store)).await?)
    } else {
        let _lock = dir.lock()?;
        let opened = open_state(&dir, store).await?;
        opened.store.close().await;
        (opened.secrets, opened.claim_spent)
    };
    if spent {
        return Err(Problem {
            code: "already-claimed".into(),
            text: "this coordinator's claim token has been used: its network is founded".into(),
            hint: "on the machine that founded it (or another admin), `meshd invite` makes a token for the next one"
                .into(),
        });
    }
    let url = PublicUrl::decide(Some(url), listen, tls)?.url;
    Ok(Claim { schema: 1, token: claim_token(&url, &secrets), url })
}

/// `meshd coordinator check --json`, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// 1.
    pub schema: u16,
    /// Records in the log.
    pub records: usize,
    /// Live members.
    pub members: usize,
    /// The network's id; null: not founded.
    pub network: Option<String>,
}

/// Reads and judges the whole store of a coordinator that is not running, as its next start will.
///
/// # Errors
/// `already-running`, `not-initialized`, or whatever is wrong with the state.
pub async fn check(state_dir: &Path, store: Option<&Path>) -> Result<Check, Problem> {
    let dir = StateDir::open(state_dir)?;
    let _lock = dir.lock()?;
    if !dir.is_initialized() {
        return Err(Problem {
            code: "not-initialized".into(),
            text: format!("no coordinator has ever run on {}", dir.path().display()),
            hint: "name the coordinator's directory with --state-dir DIR".into(),
        });
    }
    let path = store_path(&dir, store);
    let opened = open_state(&dir, store).await?;
    opened.store.close().await;
    let ledger = judge(&path, &opened.records)?;
    let network = opened.records.first().map(|genesis| genesis.signer.to_string());
    let members = ledger.map_or(0, |ledger| ledger.members().count());
    Ok(Check { schema: 1, records: opened.records.len(), members, network })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::token::Token;

    fn decide(given: Option<&str>, listen: &str, tls: bool) -> Result<PublicUrl, Problem> {
        PublicUrl::decide(given, listen.parse().unwrap(), tls)
    }

    #[test]
    fn a_url_is_taken_or_derived() {
        let url = decide(Some("https://mesh.example.org/"), "[::]:443", true).unwrap();
        assert_eq!(
            (url.url.as_str(), url.host.as_str(), url.given),
            ("https://mesh.example.org", "mesh.example.org", true)
        );
        assert_eq!(decide(Some("http://x/mesh/"), "[::]:443", true).unwrap().prefix, "/mesh");
        for (listen, tls, expected) in [
            ("203.0.113.5:443", true, "https://203.0.113.5"),
            ("203.0.113.5:8443", true, "https://203.0.113.5:8443"),
            ("[2001:db8::5]:80", false, "http://[2001:db8::5]"),
            ("127.0.0.1:443", false, "http://127.0.0.1:443"),
        ] {
            let url = decide(None, listen, tls).unwrap();
            assert_eq!((url.url.as_str(), url.given), (expected, false));
        }
        assert!(!decide(None, "[::]:443", true).unwrap().host.is_empty());
    }

    #[test]
    fn a_url_that_nobody_could_use_is_refused() {
        for url in
            ["mesh.example.org", "ftp://x", "https://0.0.0.0", "https://x/?a=b", "https://user@x", "http://[::]:1"]
        {
            let problem = decide(Some(url), "[::]:443", true).unwrap_err();
            assert_eq!(problem.code, "public-url", "{url}");
        }
    }

    #[tokio::test]
    async fn the_claim_of_a_coordinator_that_never_ran_is_made_and_stays_the_same() {
        let parent = tempfile::tempdir().unwrap();
        let listen = "203.0.113.5:443".parse().unwrap();
        let url = Some("https://203.0.113.5");
        assert_eq!(claim(parent.path(), None, None, listen, true).await.unwrap_err().code, "not-started");
        let first = claim(parent.path(), None, url, listen, true).await.unwrap();
        let again = claim(parent.path(), None, url, listen, true).await.unwrap();
        assert_eq!(first, again);
        let Token::Claim(token) = Token::decode(&first.token).unwrap() else { panic!("not a claim") };
        assert_eq!(token.urls, ["https://203.0.113.5"]);
        let dir = StateDir::open(parent.path()).unwrap();
        assert_eq!(token.coordinator, link::public_key(&dir.secrets().unwrap().key));
        let clean = Check { schema: 1, records: 0, members: 0, network: None };
        assert_eq!(check(parent.path(), None).await.unwrap(), clean);
    }
}

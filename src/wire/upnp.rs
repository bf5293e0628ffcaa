//! What it takes to ask a router for a UDP port by UPnP: finding it (SSDP), its description, and the calls of its
//! WAN connection (Internet Gateway Device, versions 1 and 2).
//!
//! Only the machine that is the gateway is ever believed or called, by its address: names are not resolved, and every URL it
//! gives must lead to itself.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use crate::wire::xml::{Item, Items, text_of};

/// Where devices listen for searches.
pub const SEARCH_GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 255, 255, 250), 1900);
/// The longest answer to a search that is read, in bytes.
pub const MAX_SEARCH_ANSWER: usize = 1_500;
/// The longest description or answer to a call that is read, in bytes.
pub const MAX_DOCUMENT: usize = 128 << 10;
/// The longest path in a URL of a router, in bytes.
const MAX_PATH: usize = 512;

/// What is searched for: the device, and for routers that announce only the service, the service.
pub const SEARCHED: [&str; 4] = [
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];

/// Services that map ports, best first.
const SERVICES: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];

/// Errors of calls (WANIPConnection:2 section 2.5, and UPnP Device Architecture table 3-3).
pub mod fault {
    /// No such mapping.
    pub const NO_SUCH_ENTRY: u16 = 714;
    /// The port outside is taken.
    pub const CONFLICT: u16 = 718;
    /// The port outside must be the one inside.
    pub const SAME_PORT_REQUIRED: u16 = 724;
    /// Only mappings without an end.
    pub const ONLY_PERMANENT: u16 = 725;

    /// In words.
    #[must_use]
    pub const fn text(code: u16) -> &'static str {
        match code {
            401 | 602 => "it does not know the call",
            402 | 600 | 601 => "it calls the request malformed",
            501 => "it failed",
            606 => "it does not allow it",
            NO_SUCH_ENTRY => "it has no such mapping",
            CONFLICT => "every port asked for is taken",
            SAME_PORT_REQUIRED => "it wants the same port inside and outside",
            ONLY_PERMANENT => "it makes only mappings without an end",
            728 => "it has no room for more mappings",
            729 => "the mapping collides with one of its owner's",
            _ => "it gives an unknown error",
        }
    }
}

/// Where something of a router is: `http://ADDRESS:PORT/PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// The router.
    pub address: SocketAddrV4,
    /// Begins with `/`; printable ASCII.
    pub path: String,
}

/// The service that maps ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Where to send calls.
    pub control: Url,
    /// Its name, one of those known here.
    pub kind: &'static str,
}

/// A call with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// What is the address outside?
    ExternalAddress,
    /// Map a port.
    Add {
        /// Outside.
        external_port: u16,
        /// Inside.
        internal: SocketAddrV4,
        /// Seconds; 0: without an end.
        lifetime_s: u32,
    },
    /// End a mapping.
    Delete {
        /// Outside.
        external_port: u16,
    },
}

/// What a call brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The address outside.
    Address(Ipv4Addr),
    /// Done.
    Done,
    /// Refused, with the reason's number; see [`fault`].
    Fault(u16),
}

/// A search, to be sent to [`SEARCH_GROUP`] once for each of [`SEARCHED`].
#[must_use]
pub fn search(target: &str) -> String {
    format!(
        "M-SEARCH * HTTP/1.1\r\nHOST: {SEARCH_GROUP}\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: {target}\r\n\
         USER-AGENT: unix UPnP/1.1 meshd/1\r\n\r\n"
    )
}

/// Where the description is, from an answer to a search; `None`: it is none, or it leads away from `router`.
#[must_use]
pub fn location(answer: &[u8], router: Ipv4Addr) -> Option<Url> {
    let text = std::str::from_utf8(answer.get(..answer.len().min(MAX_SEARCH_ANSWER))?).ok()?;
    let mut lines = text.lines();
    let status = lines.next()?;
    if !status.starts_with("HTTP/1.") || status.split_ascii_whitespace().nth(1) != Some("200") {
        return None;
    }
    let headers: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(':')).collect();
    let header =
        |name: &str| headers.iter().find(|(n, _)| n.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim());
    SEARCHED.iter().chain(&SERVICES).find(|known| header("ST") == Some(known))?;
    absolute(header("LOCATION")?, router)
}

/// The best service of a description that was read from `at`.
#[must_use]
pub fn service(description: &str, at: &Url) -> Option<Service> {
    let mut base = at.clone();
    let mut found: Vec<(usize, String)> = Vec::new();
    let (mut kind, mut control): (Option<usize>, Option<String>) = (None, None);
    let mut inside = "";
    for item in Items::of(description) {
        match item {
            Item::Open(name) => {
                inside = name;
                if name == "service" {
                    (kind, control) = (None, None);
                }
            }
            Item::Text(text) => match inside {
                "URLBase" => base = absolute(&text, *at.address.ip())?,
                "serviceType" => kind = SERVICES.iter().position(|known| *known == text),
                "controlURL" => control = Some(text.into_owned()),
                _ => {}
            },
            Item::Close(name) => {
                inside = "";
                if name == "service"
                    && let (Some(kind), Some(control)) = (kind.take(), control.take())
                    && found.len() < SERVICES.len()
                {
                    found.push((kind, control));
                }
            }
        }
    }
    let (kind, control) = found.into_iter().min_by_key(|(kind, _)| *kind)?;
    Some(Service { control: join(&base, &control)?, kind: SERVICES[kind] })
}

/// The value of the header `SOAPAction`, and the body of a call.
#[must_use]
pub fn call(service: &Service, action: &Action) -> (String, String) {
    let name = name(action);
    let mut arguments = String::new();
    let mut put = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a string cannot fail.
        let _ = write!(arguments, "<{key}>{value}</{key}>");
    };
    match action {
        Action::ExternalAddress => {}
        Action::Add { external_port, internal, lifetime_s } => {
            put("NewRemoteHost", &"");
            put("NewExternalPort", external_port);
            put("NewProtocol", &"UDP");
            put("NewInternalPort", &internal.port());
            put("NewInternalClient", internal.ip());
            put("NewEnabled", &1);
            put("NewPortMappingDescription", &"meshd");
            put("NewLeaseDuration", lifetime_s);
        }
        Action::Delete { external_port } => {
            put("NewRemoteHost", &"");
            put("NewExternalPort", external_port);
            put("NewProtocol", &"UDP");
        }
    }
    let kind = service.kind;
    let body = format!(
        "<?xml version=\"1.0\"?>\r\n<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
         s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>\
         <u:{name} xmlns:u=\"{kind}\">{arguments}</u:{name}></s:Body></s:Envelope>\r\n"
    );
    (format!("\"{kind}#{name}\""), body)
}

/// Reads the answer to a call; `None`: it is none.
#[must_use]
pub fn reply(action: &Action, document: &str) -> Option<Reply> {
    if let Some(code) = text_of(document, "errorCode") {
        return Some(Reply::Fault(code.trim().parse().ok()?));
    }
    if *action == Action::ExternalAddress {
        return Some(Reply::Address(text_of(document, "NewExternalIPAddress")?.trim().parse().ok()?));
    }
    let done = format!("{}Response", name(action));
    Items::of(document).any(|item| item == Item::Open(&done)).then_some(Reply::Done)
}

const fn name(action: &Action) -> &'static str {
    match action {
        Action::ExternalAddress => "GetExternalIPAddress",
        Action::Add { .. } => "AddPortMapping",
        Action::Delete { .. } => "DeletePortMapping",
    }
}

/// An absolute URL that leads to `router`.
fn absolute(text: &str, router: Ipv4Addr) -> Option<Url> {
    let scheme = text.get(..7)?;
    if !scheme.eq_ignore_ascii_case("http://") {
        return None;
    }
    let rest = &text[7..];
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let address = match host.parse::<SocketAddr>() {
        Ok(SocketAddr::V4(address)) => address,
        Ok(SocketAddr::V6(_)) => return None,
        Err(_) => match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => SocketAddrV4::new(ip, 80),
            _ => return None,
        },
    };
    let path = if path.is_empty() { "/" } else { path };
    (*address.ip() == router && address.port() != 0 && is_path(path)).then(|| Url { address, path: path.to_owned() })
}

/// A URL in a description, relative to it.
fn join(base: &Url, reference: &str) -> Option<Url> {
    if reference.contains("://") {
        return absolute(reference, *base.address.ip());
    }
    let path = if reference.starts_with('/') {
        reference.to_owned()
    } else {
        let folder = &base.path[..=base.path.rfind('/')?];
        format!("{folder}{reference}")
    };
    is_path(&path).then_some(Url { address: base.address, path })
}

fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= MAX_PATH && path.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

    fn at(path: &str) -> Url {
        Url { address: SocketAddrV4::new(ROUTER, 5000), path: path.to_owned() }
    }

    fn answer(st: &str, location: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nSt: {st}\r\nEXT:\r\nLocation: {location}\r\n\r\n")
            .into()
    }

    #[test]
    fn a_search_is_answered_only_by_the_router_about_itself() {
        let good = answer(SEARCHED[1], "http://192.168.1.1:5000/rootDesc.xml");
        assert_eq!(location(&good, ROUTER), Some(at("/rootDesc.xml")));
        let no_port = answer(SEARCHED[0], "HTTP://192.168.1.1");
        assert_eq!(location(&no_port, ROUTER).unwrap().address.port(), 80);
        for (st, to) in [
            (SEARCHED[1], "http://192.168.1.2:5000/rootDesc.xml"),
            (SEARCHED[1], "http://example.org/rootDesc.xml"),
            (SEARCHED[1], "https://192.168.1.1/rootDesc.xml"),
            (SEARCHED[1], "http://user@192.168.1.1/"),
            (SEARCHED[1], "http://192.168.1.1:0/"),
            (SEARCHED[1], "http://192.168.1.1/a b"),
            (SEARCHED[1], "http://é"),
            ("urn:schemas-upnp-org:device:MediaServer:1", "http://192.168.1.1:5000/rootDesc.xml"),
        ] {
            assert_eq!(location(&answer(st, to), ROUTER), None, "{st} {to}");
        }
        assert_eq!(location(b"NOTIFY * HTTP/1.1\r\n\r\n", ROUTER), None);
    }

    fn described(base: &str, services: &[(&str, &str)]) -> String {
        let services: String = services
            .iter()
            .map(|(kind, control)| {
                format!("<service><serviceType>{kind}</serviceType><controlURL>{control}</controlURL></service>")
            })
            .collect();
        format!(
            "<?xml version=\"1.0\"?><root xmlns=\"urn:schemas-upnp-org:device-1-0\">{base}<device><serviceList>{services}</serviceList></device></root>"
        )
    }

    #[test]
    fn the_best_service_is_found() {
        let both = [("urn:x", "/no"), (SERVICES[2], "/ppp"), (SERVICES[1], "ctl/IP?x=1")];
        let found = service(&described("", &both), &at("/igd/desc.xml")).unwrap();
        assert_eq!((found.kind, found.control), (SERVICES[1], at("/igd/ctl/IP?x=1")));
        let based = described("<URLBase>http://192.168.1.1:80/</URLBase>", &both[1..2]);
        assert_eq!(service(&based, &at("/d")).unwrap().control.address.port(), 80);
        for hostile in [
            described("", &[(SERVICES[0], "http://192.168.1.2/x")]),
            described("<URLBase>http://10.0.0.1/</URLBase>", &both),
            described("", &[(SERVICES[0], "/a\u{e9}")]),
            described("", &[(SERVICES[0], &format!("/{}", "a".repeat(MAX_PATH)))]),
            described("", &both[..1]),
        ] {
            assert_eq!(service(&hostile, &at("/d")), None, "{hostile}");
        }
    }

    #[test]
    fn calls_are_written_and_answers_read() {
        let service = Service { control: at("/c"), kind: SERVICES[1] };
        let add =
            Action::Add { external_port: 4_660, internal: "192.168.1.7:50112".parse().unwrap(), lifetime_s: 7_200 };
        let (header, body) = call(&service, &add);
        assert_eq!(header, "\"urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping\"");
        for part in [
            "<NewRemoteHost></NewRemoteHost><NewExternalPort>4660</NewExternalPort><NewProtocol>UDP</NewProtocol>",
            "<NewInternalPort>50112</NewInternalPort><NewInternalClient>192.168.1.7</NewInternalClient>",
            "<NewLeaseDuration>7200</NewLeaseDuration>",
        ] {
            assert!(body.contains(part), "{body}");
        }
        let envelope = |inside: &str| format!("<s:Envelope><s:Body>{inside}</s:Body></s:Envelope>");
        let done = envelope("<u:AddPortMappingResponse xmlns:u=\"x\"></u:AddPortMappingResponse>");
        assert_eq!(reply(&add, &done), Some(Reply::Done));
        assert_eq!(reply(&Action::Delete { external_port: 1 }, &done), None, "an answer to something else");
        let address = envelope(
            "<u:GetExternalIPAddressResponse><NewExternalIPAddress>100.64.0.9</NewExternalIPAddress></u:GetExternalIPAddressResponse>",
        );
        assert_eq!(reply(&Action::ExternalAddress, &address), Some(Reply::Address(Ipv4Addr::new(100, 64, 0, 9))));
        let fault = envelope("<s:Fault><detail><UPnPError><errorCode>725</errorCode></UPnPError></detail></s:Fault>");
        assert_eq!(reply(&add, &fault), Some(Reply::Fault(fault::ONLY_PERMANENT)));
        assert_eq!(reply(&add, "<html>no</html>"), None);
    }

    proptest! {
        #[test]
        fn any_document_is_survived(text in "(<(/)?(service|serviceType|controlURL|URLBase|errorCode)>|[a-z/:<&é]){0,60}") {
            let _ = service(&text, &at("/d"));
            let _ = reply(&Action::ExternalAddress, &text);
            let _ = location(text.as_bytes(), ROUTER);
        }
    }
}

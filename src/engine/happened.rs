//! What happened between two looks at a node, for hook programs.
//!
//! Two looks are compared, rather than every step told: whoever is slow hears of less and never of a state that is not so any
//! more.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::wire::hook::{Happened, HookPeer};
use crate::wire::local::{Health, PathKind, RouteLine, RouteState, Status, StatusPeer};

/// The health line that is about the hook program itself. Telling the program of it would go round in circles.
pub const ABOUT_HOOKS: &str = "on-event";

/// What was seen of a node at one time. The default is to have seen nothing.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// By short id.
    peers: BTreeMap<String, StatusPeer>,
    /// Who is asked for a prefix now.
    routes: BTreeMap<IpNet, String>,
    health: BTreeMap<String, Health>,
}

impl Seen {
    /// From the documents people see.
    #[must_use]
    pub fn of(status: Status, routes: &[RouteLine]) -> Self {
        let mine = status.me.id;
        let active = routes.iter().filter(|line| line.state == RouteState::Active && line.id != mine);
        let told = status.health.into_iter().filter(|line| line.code != ABOUT_HOOKS);
        Self {
            peers: status.peers.into_iter().map(|peer| (peer.id.clone(), peer)).collect(),
            routes: active.filter_map(|line| Some((line.prefix, line.via.clone()?))).collect(),
            health: told.map(|line| (line.code.clone(), line)).collect(),
        }
    }

    /// What happened since `before`: what is over first.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<Happened> {
        let mut happened = Vec::new();
        for (code, line) in before.health.iter().filter(|(code, _)| !self.health.contains_key(*code)) {
            happened.push(health(code, line, true));
        }
        for (id, was) in before.peers.iter().filter(|(_, was)| was.online) {
            if !self.peers.get(id).is_some_and(|is| is.online) {
                happened.push(Happened::PeerDown { peer: peer(was) });
            }
        }
        for (id, is) in &self.peers {
            let was = before.peers.get(id);
            if is.online && !was.is_some_and(|was| was.online) {
                happened.push(Happened::PeerUp { peer: peer(is) });
            }
            let (went, at) = was.map_or((PathKind::None, None), |was| (was.path.kind, was.path.endpoint.clone()));
            if (went, &at) != (is.path.kind, &is.path.endpoint) {
                let endpoint = is.path.endpoint.clone();
                happened.push(Happened::Path { peer: peer(is), path: is.path.kind, endpoint, before: went });
            }
        }
        for prefix in before.routes.keys().filter(|prefix| !self.routes.contains_key(*prefix)) {
            happened.push(Happened::Route { prefix: *prefix, via: None, before: before.routes.get(prefix).cloned() });
        }
        for (prefix, via) in &self.routes {
            let was = before.routes.get(prefix);
            if was != Some(via) {
                happened.push(Happened::Route { prefix: *prefix, via: Some(via.clone()), before: was.cloned() });
            }
        }
        for (code, line) in self.health.iter().filter(|(code, _)| !before.health.contains_key(*code)) {
            happened.push(health(code, line, false));
        }
        happened
    }
}

fn peer(peer: &StatusPeer) -> HookPeer {
    HookPeer { name: peer.name.clone(), id: peer.id.clone(), addresses: peer.addresses.clone() }
}

fn health(code: &str, line: &Health, over: bool) -> Happened {
    let Health { severity, text, hint, .. } = line.clone();
    Happened::Health { code: code.to_owned(), severity, text, hint, over }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::local::{Severity, StatusPath};

    fn peer_of(name: &str, online: bool, kind: PathKind, endpoint: Option<&str>) -> StatusPeer {
        StatusPeer {
            name: name.to_owned(),
            id: format!("id-{name}"),
            addresses: vec!["100.71.0.2".parse().unwrap()],
            routes: Vec::new(),
            online,
            path: StatusPath {
                kind,
                endpoint: endpoint.map(str::to_owned),
                rtt_ms: None,
                since_s: None,
                reason: None,
                mtu: None,
                tcp: None,
            },
            rx_bytes: 0,
            tx_bytes: 0,
            last_handshake_s: None,
        }
    }

    fn seen(peers: &[StatusPeer], routes: &[(&str, &str)], health: &[&str]) -> Seen {
        Seen {
            peers: peers.iter().map(|peer| (peer.id.clone(), peer.clone())).collect(),
            routes: routes.iter().map(|(prefix, via)| (prefix.parse().unwrap(), (*via).to_owned())).collect(),
            health: health.iter().map(|code| ((*code).to_owned(), line(code))).collect(),
        }
    }

    fn line(code: &str) -> Health {
        Health { code: code.into(), severity: Severity::Warning, text: "t".into(), hint: "h".into(), since_s: 1 }
    }

    fn kinds(happened: &[Happened]) -> Vec<&'static str> {
        happened.iter().map(Happened::kind).collect()
    }

    #[test]
    fn the_first_look_tells_what_is_so_and_the_same_again_tells_nothing() {
        let nas = peer_of("nas", true, PathKind::Relay, Some("https://c"));
        let gone = peer_of("old", false, PathKind::None, None);
        let now = seen(&[nas, gone], &[("10.0.0.0/8", "nas")], &["udp-blocked"]);
        assert_eq!(kinds(&now.since(&Seen::default())), ["peer-up", "path", "route", "health"]);
        assert!(now.since(&now.clone()).is_empty());
    }

    #[test]
    fn each_change_is_told_once_with_what_was_before() {
        let before = seen(
            &[peer_of("nas", true, PathKind::Relay, Some("https://c")), peer_of("tv", true, PathKind::None, None)],
            &[("10.0.0.0/8", "nas"), ("10.1.0.0/16", "nas")],
            &["udp-blocked"],
        );
        let after = seen(
            &[peer_of("nas", true, PathKind::Direct, Some("1.2.3.4:5")), peer_of("tv", false, PathKind::None, None)],
            &[("10.0.0.0/8", "tv"), ("10.2.0.0/16", "nas")],
            &["no-ipv6"],
        );
        let happened = after.since(&before);
        assert_eq!(kinds(&happened), ["health", "peer-down", "path", "route", "route", "route", "health"]);
        assert!(matches!(&happened[2], Happened::Path { path: PathKind::Direct, before: PathKind::Relay, .. }));
        assert!(matches!(&happened[3], Happened::Route { via: None, before: Some(was), .. } if was == "nas"));
        assert!(matches!(&happened[4], Happened::Route { via: Some(is), before: Some(_), .. } if is == "tv"));
        assert!(matches!(&happened[0], Happened::Health { code, over: true, .. } if code == "udp-blocked"));
        assert!(matches!(&happened[6], Happened::Health { code, over: false, .. } if code == "no-ipv6"));
    }

    #[test]
    fn a_removed_member_that_was_online_is_down() {
        let before = seen(&[peer_of("nas", true, PathKind::None, None)], &[], &[]);
        assert_eq!(kinds(&seen(&[], &[], &[]).since(&before)), ["peer-down"]);
    }
}

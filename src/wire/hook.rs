//! What a program gets to read that `meshd up --on-event` names: one JSON object on one line. `docs/reference/events.md` shows
//! each kind. Fields and kinds may be added; a program must pass over what it does not know.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::time::UnixSeconds;
use crate::wire::local::{PathKind, Severity};

/// The version of the object.
pub const VERSION: u16 = 1;

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookEvent {
    /// [`VERSION`].
    pub v: u16,
    /// Counts from 1 in each run of the daemon. Where it skips, events were dropped.
    pub seq: u64,
    /// When it was noticed.
    pub time: UnixSeconds,
    /// How many events were dropped so far because the program was too slow.
    pub dropped: u64,
    /// The network's name.
    pub network: String,
    /// This node's name.
    pub node: String,
    /// What.
    #[serde(flatten)]
    pub what: Happened,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Happened {
    /// A member is online now; at the start, each that is.
    PeerUp {
        /// Who.
        peer: HookPeer,
    },
    /// A member is not online any more, or was removed.
    PeerDown {
        /// Who.
        peer: HookPeer,
    },
    /// Packets to a member go another way.
    Path {
        /// Who.
        peer: HookPeer,
        /// How they go.
        path: PathKind,
        /// Direct: the UDP address. Relay: the coordinator's URL.
        endpoint: Option<String>,
        /// How they went.
        before: PathKind,
    },
    /// Packets for a prefix go through another member.
    Route {
        /// The prefix; of length 0: everything.
        prefix: IpNet,
        /// The member's name; null: through none.
        via: Option<String>,
        /// Through whom they went.
        before: Option<String>,
    },
    /// An unhealthy condition began, or is over.
    Health {
        /// Its stable word.
        code: String,
        /// How bad.
        severity: Severity,
        /// What is wrong.
        text: String,
        /// What to try.
        hint: String,
        /// It is over.
        over: bool,
    },
}

impl Happened {
    /// The word in `kind`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::PeerUp { .. } => "peer-up",
            Self::PeerDown { .. } => "peer-down",
            Self::Path { .. } => "path",
            Self::Route { .. } => "route",
            Self::Health { .. } => "health",
        }
    }
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPeer {
    /// A DNS label.
    pub name: String,
    /// The short id.
    pub id: String,
    /// Mesh addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every example in the reference is what the program writes, and every kind has one.
    #[test]
    fn the_reference_shows_every_kind_as_it_is() {
        let page = include_str!("../../docs/reference/events.md");
        let mut kinds = Vec::new();
        for line in page.lines().filter(|line| line.starts_with("{\"v\":")) {
            let event: HookEvent = serde_json::from_str(line).unwrap();
            assert_eq!(serde_json::to_string(&event).unwrap(), line);
            assert_eq!(event.v, VERSION);
            kinds.push(event.what.kind());
        }
        kinds.dedup();
        assert_eq!(kinds, ["peer-up", "peer-down", "path", "route", "health"]);
    }
}

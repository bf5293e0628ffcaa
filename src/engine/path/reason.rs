//! Why a peer is relayed, in words.

use crate::wire::nat::{Mapper, PortModel, Seen};

/// What a node knows of the NAT in front of it, as told to its peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatView {
    /// RFC 4787 section 4.1 name; None: not known.
    pub mapping: Option<String>,
    /// RFC 4787 section 5 name; None: not known.
    pub filtering: Option<String>,
    /// UDP passes at all; None: not known.
    pub udp: Option<bool>,
    /// How it chooses ports; None: not known.
    pub ports: Option<PortModel>,
}

/// What a node knows of its own network besides the NAT's ways, and what it saw of the last round that failed, as told to the
/// peer. Only for explaining.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The node's IPv4 port: the one to forward in its router.
    pub port: Option<u16>,
    /// Whether its router maps ports when asked.
    pub mapper: Mapper,
    /// What it saw of the last round that found no path.
    pub seen: Option<Seen>,
    /// It has offered an IPv4 address; None: no offer is known.
    pub v4: Option<bool>,
    /// The same of IPv6.
    pub v6: Option<bool>,
}

/// How a path in use was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// By what.
    pub how: How,
    /// Rounds that had failed before.
    pub attempt: usize,
}

/// By what a path was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The peer's address is on a network this machine is attached to.
    SameNetwork,
    /// The peer lets everybody in there: a public, forwarded or mapped address.
    OpenAddress,
    /// Both sent at the same moment, so that both NATs let the other in.
    Punch,
    /// The same from fresh ports on both sides.
    FreshPort,
    /// Many sockets or ports were tried.
    ManyPorts,
    /// A TCP connection, because a side has no UDP.
    Tcp,
}

/// RFC 4787 names.
pub mod behaviour {
    /// One port for all destinations; or: anything may come in.
    pub const ENDPOINT_INDEPENDENT: &str = "endpoint-independent";
    /// One port per destination address; or: only from addresses sent to.
    pub const ADDRESS_DEPENDENT: &str = "address-dependent";
    /// One port per destination address and port; or: only from addresses and ports sent to.
    pub const ADDRESS_AND_PORT_DEPENDENT: &str = "address-and-port-dependent";
}

use behaviour::{ADDRESS_AND_PORT_DEPENDENT, ENDPOINT_INDEPENDENT};

impl NatView {
    /// A new port per destination: the port others see cannot be told in advance.
    #[must_use]
    pub fn is_hard(&self) -> bool {
        self.mapping.as_deref().is_some_and(|m| m != ENDPOINT_INDEPENDENT)
    }

    /// A new port also for another port of the same address; if that is not known, no.
    #[must_use]
    pub fn maps_by_port(&self) -> bool {
        self.mapping.as_deref() == Some(ADDRESS_AND_PORT_DEPENDENT)
    }

    pub(crate) fn filters_ports(&self) -> bool {
        self.filtering.as_deref().is_none_or(|f| f == ADDRESS_AND_PORT_DEPENDENT)
    }

    pub(crate) fn filters_nothing(&self) -> bool {
        self.filtering.as_deref() == Some(ENDPOINT_INDEPENDENT)
    }
}

/// Whether what both sides know of their NATs rules a plain punch out: it works only if both map independently of the
/// destination, or one filters nothing, or one maps independently and filters by address at most (nat.md, 2.1).
#[must_use]
pub fn hopeless(mine: &NatView, theirs: &NatView) -> bool {
    if mine.udp == Some(false) || theirs.udp == Some(false) {
        return true;
    }
    let side = |hard: &NatView, other: &NatView| {
        hard.is_hard()
            && !hard.filters_nothing()
            && !other.filters_nothing()
            && (other.is_hard() || other.filters_ports())
    };
    let known = mine.mapping.is_some() && theirs.mapping.is_some();
    known && (side(mine, theirs) || side(theirs, mine))
}

/// One sentence on why `peer` is not reached directly.
#[must_use]
pub fn why_relayed(mine: &NatView, theirs: &NatView, peer: &str, state: Attempt) -> String {
    let tcp = match state {
        Attempt::Running | Attempt::Heavy | Attempt::Waiting => "a TCP connection is being tried",
        Attempt::Failed { .. } => "no TCP connection came about either",
    };
    if mine.udp == Some(false) {
        return format!("no UDP gets out of this network; {tcp}");
    }
    if theirs.udp == Some(false) {
        return format!("no UDP gets out of {peer}'s network; {tcp}");
    }
    match (mine.is_hard(), theirs.is_hard()) {
        _ if !hopeless(mine, theirs) => match state {
            Attempt::Running | Attempt::Heavy => "a direct path is being tried".to_owned(),
            Attempt::Waiting => format!("waiting for {peer} to answer with its addresses"),
            Attempt::Failed { full_size_lost: true, .. } => {
                "the direct path loses packets of full size, so it is not used".to_owned()
            }
            Attempt::Failed { full_size_lost: false, .. } => {
                "the last attempt at a direct path was not answered; it will be repeated".to_owned()
            }
        },
        (mine, theirs) => {
            let why = match (mine, theirs) {
                (true, true) => "both NATs pick a new port for every destination".to_owned(),
                (true, false) => format!(
                    "the NAT here picks a new port for every destination and {peer}'s NAT lets in only ports it has sent to"
                ),
                (false, _) => format!(
                    "{peer}'s NAT picks a new port for every destination and the NAT here lets in only ports it has sent to"
                ),
            };
            match state {
                Attempt::Heavy => format!("{why}; many ports are being tried"),
                Attempt::Failed { heavy: true, .. } => format!("{why}; many ports were tried, and will be again"),
                Attempt::Running | Attempt::Waiting | Attempt::Failed { .. } => why,
            }
        }
    }
}

/// How far the search for a direct path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// Probes are on their way.
    Running,
    /// The peer has not answered the call.
    Waiting,
    /// Many sockets or ports are being tried.
    Heavy,
    /// A round ended without a path.
    Failed {
        /// Small probes were answered, probes of data size were not.
        full_size_lost: bool,
        /// Many sockets or ports were tried too.
        heavy: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::behaviour::ADDRESS_DEPENDENT;
    use super::*;

    fn nat(mapping: &str, filtering: &str) -> NatView {
        NatView { mapping: Some(mapping.into()), filtering: Some(filtering.into()), udp: Some(true), ports: None }
    }

    /// nat.md section 2.1, the measured matrix.
    #[test]
    fn hopeless_is_the_complement_of_the_measured_matrix() {
        let (ei, ad, apd) = (ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT);
        let kinds = [
            nat(ei, ei),
            nat(ei, ad),
            nat(ei, apd),
            nat(ad, ad),
            nat(ad, apd),
            nat(apd, ei),
            nat(apd, ad),
            nat(apd, apd),
        ];
        let works = [
            "11111111", // EIM/EIF
            "11111111", // EIM/ADF
            "11100100", // EIM/APDF
            "11000100", // ADM/ADF
            "11000100", // ADM/APDF
            "11111111", // APDM/EIF
            "11000100", // APDM/ADF
            "11000100", // APDM/APDF
        ];
        for (a, row) in kinds.iter().zip(works) {
            for (b, cell) in kinds.iter().zip(row.chars()) {
                assert_eq!(hopeless(a, b), cell == '0', "{a:?} × {b:?}");
            }
        }
    }

    #[test]
    fn unknown_nats_are_never_hopeless() {
        assert!(!hopeless(&NatView::default(), &nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT)));
    }

    #[test]
    fn the_sentence_names_the_side() {
        let hard = nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT);
        let easy = nat(ENDPOINT_INDEPENDENT, ADDRESS_AND_PORT_DEPENDENT);
        let failed = Attempt::Failed { full_size_lost: false, heavy: false };
        assert_eq!(why_relayed(&hard, &hard, "nas", failed), "both NATs pick a new port for every destination");
        assert!(why_relayed(&hard, &easy, "nas", failed).starts_with("the NAT here picks"));
        assert!(why_relayed(&easy, &hard, "nas", failed).starts_with("nas's NAT picks"));
        assert!(why_relayed(&easy, &hard, "nas", Attempt::Heavy).ends_with("; many ports are being tried"));
    }
}

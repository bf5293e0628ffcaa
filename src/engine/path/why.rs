//! Why packets to a peer go the way they go: the causes, one after the other, from what both ends know, and what would help.
//! Pure reasoning over [`Facts`]; whoever shows it adds the evidence itself.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use crate::engine::path::reason::{Attempt, Evidence, Found, How, NatView, hopeless};
use crate::wire::nat::{Mapper, PortModel, Seen};

/// An unanswered handshake is a cause after this long.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(2);

/// What one end knows of its own network.
#[derive(Debug, Clone, Default)]
pub struct Side {
    /// The NAT in front of it.
    pub nat: NatView,
    /// The rest.
    pub evidence: Evidence,
}

/// How packets go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Directly.
    Direct {
        /// The peer's address.
        remote: SocketAddr,
        /// How the way was found.
        found: Found,
        /// What it replaced: another address, or the relay; and how long that had been in use.
        before: Option<(Option<SocketAddr>, Duration)>,
    },
    /// Through the relay.
    Relay,
    /// Nowhere: there is no relay either.
    Nowhere,
    /// Nobody has talked to the peer lately.
    Idle,
}

/// Everything the reasoning uses.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The peer's name.
    pub peer: String,
    /// How packets go now.
    pub way: Way,
    /// This end.
    pub here: Side,
    /// The other end, as it said in its last call or answer; None: it has said nothing in this run.
    pub there: Option<Side>,
    /// The control link is up.
    pub coordinator: bool,
    /// The peer is connected to the coordinator, as far as that says, or was heard just now.
    pub online: bool,
    /// How long it has been gone, if that was seen.
    pub offline_for: Option<Duration>,
    /// How long a handshake of ours has been unanswered; None: there is a session, or nobody asked for one.
    pub handshake_for: Option<Duration>,
    /// How far the search is.
    pub attempt: Attempt,
    /// Rounds that failed in a row.
    pub failures: usize,
    /// The last round ended because the peer did not answer the call.
    pub called_in_vain: bool,
    /// Until the next round, if one is set.
    pub next_round: Option<Duration>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// A stable word for the first cause.
    pub code: &'static str,
    /// How packets go and the first cause, in one sentence.
    pub text: String,
    /// The causes behind it, one a sentence.
    pub because: Vec<String>,
    /// What would help, each by itself; empty: nothing needs to be done.
    pub fix: Vec<String>,
}

impl Facts {
    /// The causes, the first that explains everything behind it first.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        let mut out = match self.way {
            Way::Direct { remote, found, before } => return self.direct(remote, found, before),
            Way::Nowhere => self.nowhere(),
            Way::Idle if self.is_away() => self.away(),
            Way::Idle => Explanation {
                code: "idle",
                text: format!("nothing has gone to {} lately, so no way to it is kept", self.peer),
                because: vec!["the first packet goes by the relay and has a direct path looked for".to_owned()],
                fix: Vec::new(),
            },
            Way::Relay if self.is_away() => self.away(),
            Way::Relay => self.relayed(),
        };
        out.because.extend(self.what_next());
        out
    }

    fn is_away(&self) -> bool {
        !self.online && self.coordinator
    }

    fn direct(&self, remote: SocketAddr, found: Found, before: Option<(Option<SocketAddr>, Duration)>) -> Explanation {
        let peer = &self.peer;
        let by = match found.how {
            How::SameNetwork => "both machines are on one network".to_owned(),
            How::OpenAddress => {
                format!("everybody can reach {peer} there: the address is public, or its port is forwarded or mapped")
            }
            How::Punch => "both sent at the same moment, so that what is in front of each let the other in".to_owned(),
            How::FreshPort => {
                "both sent at the same moment from ports of their own; with the usual ones it had failed, as when a \
                               router has taken an early packet for its own"
                    .to_owned()
            }
            How::ManyPorts => {
                "many ports were tried, because a NAT between picks a new one for every destination".to_owned()
            }
            How::Tcp => {
                let whose = match self.here.nat.udp {
                    Some(false) => "no UDP gets out of this network".to_owned(),
                    _ => format!("no UDP gets out of {peer}'s network"),
                };
                format!("{whose}, so both sides made a TCP connection to each other at the same moment")
            }
        };
        let mut because = vec![by];
        match found.attempt {
            0 => {}
            1 => because.push("one attempt had failed before".to_owned()),
            n => because.push(format!("{n} attempts had failed before")),
        }
        because.extend(before.map(|(address, lasted)| {
            let what = address.map_or_else(|| "the relay".to_owned(), |address| format!("the path to {address}"));
            format!("it replaced {what}, in use for {}", span(lasted))
        }));
        let ip = if remote.is_ipv6() { "IPv6" } else { "IPv4" };
        let ip = if found.how == How::Tcp { format!("{ip}, TCP") } else { ip.to_owned() };
        Explanation {
            code: "direct",
            text: format!("{peer} is reached directly at {remote} ({ip})"),
            because,
            fix: Vec::new(),
        }
    }

    fn nowhere(&self) -> Explanation {
        let (code, because) = if self.coordinator {
            ("relay-unreachable", "the coordinator answers but its relay does not")
        } else {
            (
                "coordinator-unreachable",
                "the coordinator, which relays and introduces machines, is not reachable from here",
            )
        };
        Explanation {
            code,
            text: format!("there is no way to {} now: no direct path, and no relay", self.peer),
            because: vec![because.to_owned()],
            fix: vec![
                "`meshd status` says what is wrong with the coordinator; meshd keeps trying by itself".to_owned(),
            ],
        }
    }

    fn away(&self) -> Explanation {
        let peer = &self.peer;
        let since = self.offline_for.map_or_else(String::new, |time| format!(" for {}", span(time)));
        Explanation {
            code: "peer-offline",
            text: format!("{peer} is not connected to the coordinator{since}: it is switched off, or offline"),
            because: self.unanswered().into_iter().collect(),
            fix: vec![format!("start {peer}, or `meshd up` on it; `meshd status` there says what it misses")],
        }
    }

    fn unanswered(&self) -> Option<String> {
        let time = self.handshake_for.filter(|time| *time >= HANDSHAKE_PATIENCE)?;
        Some(format!("the handshake with it has been unanswered for {}", span(time)))
    }

    fn relayed(&self) -> Explanation {
        let peer = &self.peer;
        let relayed = |why: String| format!("{peer} is relayed: {why}");
        if let Some(unanswered) = self.unanswered() {
            return Explanation {
                code: "no-session",
                text: format!("{peer} does not answer: {unanswered}"),
                because: vec!["it is connected to the coordinator, so it runs".to_owned()],
                fix: vec![format!(
                    "compare the clocks of both machines, and see `meshd status` on {peer}; restarting meshd there makes a new \
                     session"
                )],
            };
        }
        if self.here.nat.udp == Some(false) {
            return Explanation {
                code: "udp-blocked-here",
                text: relayed("no UDP gets out of this network".to_owned()),
                because: vec![
                    "no STUN server answers here, at any port".to_owned(),
                    "a TCP connection between the two was tried instead, and not answered".to_owned(),
                ],
                fix: vec![
                    "allow outgoing UDP in this network's firewall, at least to the coordinator's ports 3478 and 3479"
                        .to_owned(),
                ],
            };
        }
        let Some(there) = &self.there else {
            return Explanation {
                code: "not-answered",
                text: relayed(format!("{peer} has not told its addresses yet")),
                because: Vec::new(),
                fix: Vec::new(),
            };
        };
        if there.nat.udp == Some(false) {
            return Explanation {
                code: "udp-blocked-there",
                text: relayed(format!("no UDP gets out of {peer}'s network")),
                because: vec![
                    format!("{peer} says that no STUN server answers it"),
                    "a TCP connection between the two was tried instead, and not answered".to_owned(),
                ],
                fix: vec![format!(
                    "allow outgoing UDP in the firewall of {peer}'s network, at least to the coordinator's ports 3478 and 3479"
                )],
            };
        }
        if let Some(explained) = self.no_common_family(there) {
            return explained;
        }
        if hopeless(&self.here.nat, &there.nat) {
            return self.hard(there);
        }
        match self.attempt {
            Attempt::Running | Attempt::Heavy => Explanation {
                code: "trying",
                text: relayed("a direct path is being tried".to_owned()),
                because: self.failed_before(),
                fix: Vec::new(),
            },
            Attempt::Waiting => Explanation {
                code: "not-answered",
                text: relayed(format!("{peer} has not answered with its addresses yet")),
                because: self.failed_before(),
                fix: Vec::new(),
            },
            Attempt::Failed { full_size_lost: true, .. } => Explanation {
                code: "full-size-lost",
                text: relayed("the direct path loses packets of full size, so it is not used".to_owned()),
                because: vec!["small probes came back, those of 1,312 bytes did not".to_owned()],
                fix: vec![
                    "look for a link with an MTU below 1,340 bytes on the way (PPPoE, a VPN under this one), and raise it"
                        .to_owned(),
                ],
            },
            Attempt::Failed { full_size_lost: false, .. } if self.called_in_vain => Explanation {
                code: "not-answered",
                text: relayed(format!("{peer} did not answer the last call for its addresses")),
                because: self.failed_before(),
                fix: vec![format!("see `meshd status` on {peer}; an older version may not know the call")],
            },
            Attempt::Failed { full_size_lost: false, .. } => self.punch_failed(there),
        }
    }

    fn no_common_family(&self, there: &Side) -> Option<Explanation> {
        let has = |side: &Side| Some((side.evidence.v4?, side.evidence.v6?));
        let (here, there) = (has(&self.here)?, has(there)?);
        let only = |(v4, v6): (bool, bool)| match (v4, v6) {
            (true, false) => Some("IPv4"),
            (false, true) => Some("IPv6"),
            (true, true) | (false, false) => None,
        };
        let (mine, theirs) = (only(here)?, only(there)?);
        (mine != theirs).then(|| Explanation {
            code: "no-common-family",
            text: format!(
                "{} is relayed: this machine has {mine} only, and {} has {theirs} only",
                self.peer, self.peer
            ),
            because: vec!["packets of one kind do not reach addresses of the other".to_owned()],
            fix: vec![format!("give this machine {theirs}, or {} {mine}", self.peer)],
        })
    }

    fn hard(&self, there: &Side) -> Explanation {
        let peer = &self.peer;
        let (mine, theirs) = (self.here.nat.is_hard(), there.nat.is_hard());
        let picks = |nat: &NatView| match nat.ports {
            Some(PortModel::Random) => "a new random port",
            Some(PortModel::Sequential { .. }) => "the next port in a row",
            Some(PortModel::Block { .. }) => "a new port of a block",
            Some(PortModel::Preserving | PortModel::Unknown) | None => "a new port",
        };
        let (code, why) = match (mine, theirs) {
            (true, true) if picks(&self.here.nat) == picks(&there.nat) => {
                ("both-hard", format!("both NATs pick {} for every destination", picks(&self.here.nat)))
            }
            (true, true) => (
                "both-hard",
                format!(
                    "the NAT here picks {} for every destination, {peer}'s {}",
                    picks(&self.here.nat),
                    picks(&there.nat)
                ),
            ),
            (true, false) => (
                "hard-here",
                format!(
                    "the NAT here picks {} for every destination, and {peer}'s lets in only ports it has sent to",
                    picks(&self.here.nat)
                ),
            ),
            (false, _) => (
                "hard-there",
                format!(
                    "{peer}'s NAT picks {} for every destination, and the one here lets in only ports it has sent to",
                    picks(&there.nat)
                ),
            ),
        };
        let mut because = vec![format!("so neither can know the port to send to before the other has sent to it")];
        for (is_hard, mapper, whose) in [
            (mine, self.here.evidence.mapper, "your router".to_owned()),
            (theirs, there.evidence.mapper, format!("{peer}'s router")),
        ] {
            match mapper {
                Mapper::Absent if is_hard => {
                    because.push(format!("{whose} maps no port when asked (UPnP, NAT-PMP, PCP)"))
                }
                Mapper::Found if is_hard => {
                    because.push(format!("{whose} has mapped a port, but it was not reached from the other side"));
                }
                Mapper::Absent | Mapper::Found | Mapper::Unknown => {}
            }
        }
        match self.attempt {
            Attempt::Heavy => because.push("many ports are being tried just now".to_owned()),
            Attempt::Failed { heavy: true, .. } => because.push("many ports were tried in vain".to_owned()),
            Attempt::Running | Attempt::Waiting | Attempt::Failed { .. } => {}
        }
        let mut fix = Vec::new();
        // One side is enough, and your own router is the nearest.
        fix.push(forward_here(&self.here.evidence));
        fix.push(forward_there(peer, &there.evidence));
        Explanation { code, text: format!("{peer} is relayed: {why}"), because, fix }
    }

    /// Both NATs would let a punch through, and yet it failed.
    fn punch_failed(&self, there: &Side) -> Explanation {
        let peer = &self.peer;
        let mine = self.here.evidence.seen.unwrap_or_default();
        let theirs = there.evidence.seen.unwrap_or_default();
        let told = there.evidence.seen.is_some();
        let (code, why, fix) = match (mine.heard > 0, theirs.heard > 0) {
            (true, false) if told => (
                "one-way-in",
                format!("{peer}'s packets arrive here, but ours do not arrive there"),
                vec![
                    format!(
                        "allow incoming UDP{} in the firewall of {peer} and of its network",
                        to_port(there.evidence.port)
                    ),
                    forward_there(peer, &there.evidence),
                ],
            ),
            (false, true) => (
                "one-way-out",
                format!("our packets arrive at {peer}, but nothing from {peer} arrives here"),
                vec![
                    format!(
                        "allow incoming UDP{} in the firewall of this machine and of its network",
                        to_port(self.here.evidence.port)
                    ),
                    forward_here(&self.here.evidence),
                ],
            ),
            (true, true) => (
                "answers-lost",
                "probes pass in both directions, but their answers do not come back".to_owned(),
                vec![
                    "look for a device that rewrites or delays UDP; `meshd netcheck` on both sides may show it"
                        .to_owned(),
                ],
            ),
            (_, _) => (
                "punch-failed",
                if told {
                    "packets were sent from both sides at the same time, and none arrived".to_owned()
                } else {
                    "the last attempt at a direct path was not answered".to_owned()
                },
                vec![
                    "look for a firewall between that drops UDP to unknown ports".to_owned(),
                    forward_here(&self.here.evidence),
                    forward_there(peer, &there.evidence),
                ],
            ),
        };
        let mut because = vec![probes("here", self.here.evidence.seen)];
        because.push(probes(peer, there.evidence.seen));
        because.extend(self.failed_before());
        Explanation { code, text: format!("{peer} is relayed: {why}"), because, fix }
    }

    fn failed_before(&self) -> Vec<String> {
        match self.failures {
            0 => Vec::new(),
            1 => vec!["one attempt has failed".to_owned()],
            n => vec![format!("{n} attempts have failed")],
        }
    }

    fn what_next(&self) -> Option<String> {
        let wait = self.next_round.filter(|_| self.way == Way::Relay)?;
        let sleeps = self.there.as_ref().is_some_and(|there| hopeless(&self.here.nat, &there.nat));
        Some(if sleeps {
            format!("the next attempt is in {}, or as soon as what is known of either NAT changes", span(wait))
        } else {
            format!("the next attempt is in {}", span(wait))
        })
    }
}

fn probes(who: &str, seen: Option<Seen>) -> String {
    seen.map_or_else(
        || format!("{who}: not known yet"),
        |Seen { sent, answered, heard }| {
            format!("{who}: {sent} probes sent, {answered} answered, {heard} of the other side's came in")
        },
    )
}

fn to_port(port: Option<u16>) -> String {
    port.map_or_else(String::new, |port| format!(" to port {port}"))
}

fn forward_here(evidence: &Evidence) -> String {
    let mut text = match evidence.port {
        Some(port) => {
            format!("forward UDP {port} to this machine in its router (`meshd up --port {port}` keeps the port)")
        }
        None => "forward a UDP port to this machine in its router (`meshd up --port N`)".to_owned(),
    };
    text.push_str(or_mapping(evidence.mapper, ", or switch on UPnP or NAT-PMP there"));
    text
}

fn forward_there(peer: &str, evidence: &Evidence) -> String {
    let mut text = String::from("forward UDP ");
    // Writing to a string cannot fail.
    let _ = match evidence.port {
        Some(port) => write!(text, "{port} to {peer} in its router"),
        None => write!(text, "to {peer} in its router (`meshd up --port N` there)"),
    };
    text.push_str(or_mapping(evidence.mapper, ", or switch on UPnP or NAT-PMP in that router"));
    text
}

const fn or_mapping(mapper: Mapper, text: &'static str) -> &'static str {
    match mapper {
        Mapper::Absent | Mapper::Unknown => text,
        Mapper::Found => "",
    }
}

/// A length of time as people say it.
#[must_use]
pub fn span(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0 => format!("{} ms", time.as_millis()),
        1..=119 => format!("{s} s"),
        120..=7_199 => format!("{} min", s / 60),
        _ => format!("{} h", s / 3_600),
    }
}

#[cfg(test)]
mod tests;

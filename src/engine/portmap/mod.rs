//! Gets a port mapped by the router in front: by PCP, else NAT-PMP, else UPnP.
//!
//! ```text
//! 0 ms     PCP: map                                 refused: the next begins at once
//! 250 ms   NAT-PMP: which address?                  a mapping is asked for when PCP is out of the question
//! 500 ms   UPnP: search, description, address?      the same when both are
//! ```
//!
//! The first grant ends the rest. It is renewed at half its life, checked in between (a router that lost its mappings shows it
//! by its epoch, RFC 6887 section 8.5), and deleted at the end. Without a grant it is tried again after a minute, five, and then
//! every half hour, or when the network changes. A node that was killed leaves a mapping until its lifetime ends, and finds it
//! again: the nonce of PCP follows from the node's secret and the place.
//!
//! What the router says is believed only as far as its own address goes: datagrams from elsewhere are not read, and the mapped
//! address is one more candidate, probed like any other before it is used.

mod asker;
mod upnp;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use blake2::digest::{FixedOutput, Mac};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::engine::io::PortMapping;
use crate::engine::portmap::asker::{Asker, Heard, Purpose, Step};
use crate::engine::portmap::upnp::Upnp;
use crate::time::Now;
use crate::trust::keys::Secret32;
use crate::wire::local::{PortMapper as Document, PortMapperProtocol};
use crate::wire::upnp::{Action, Service, Url};
use crate::wire::{nat_pmp, pcp};

/// What is asked for, in seconds: what RFC 6886 section 3.3 recommends.
pub const LIFETIME_S: u32 = 7_200;
/// Grants count as at least and at most so long.
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(86_400);
/// NAT-PMP begins so much after PCP.
const NAT_PMP_AFTER: Duration = Duration::from_millis(250);
/// UPnP begins so much after PCP.
const UPNP_AFTER: Duration = Duration::from_millis(500);
/// A router is asked so often whether it still knows us; by UPnP, which takes a TCP connection, more seldom.
const CHECK_EVERY: Duration = Duration::from_secs(120);
const CHECK_UPNP_EVERY: Duration = Duration::from_secs(600);
/// Pauses after a round in vain; the last one repeats.
const PAUSES: [Duration; 3] = [Duration::from_secs(60), Duration::from_secs(300), Duration::from_secs(1_800)];
/// A renewal that was not answered is repeated after a quarter of what is left, and at least this.
const RENEW_AGAIN: Duration = Duration::from_secs(30);
/// Events cause requests at most so often.
const EVENT_GAP: Duration = Duration::from_secs(5);
/// How long a deletion may take.
const STOP_PATIENCE: Duration = Duration::from_millis(800);

/// The way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gateway {
    /// The router's address on our side.
    pub router: Ipv4Addr,
    /// This machine's address towards it.
    pub own: Ipv4Addr,
}

impl Gateway {
    /// Whether there can be a NAT: a public address needs no mapping.
    #[must_use]
    pub const fn may_translate(&self) -> bool {
        let [a, b, ..] = self.own.octets();
        self.own.is_private() || (a == 100 && b & 0xc0 == 64)
    }
}

/// Which way a port is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// Internet Gateway Device.
    Upnp,
}

impl Protocol {
    /// The stable word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        }
    }
}

/// What the shell is to do. Drain after every call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this from the machine's address to the router's [`pcp::SERVER_PORT`].
    Send(Vec<u8>),
    /// Search for UPnP devices; answers go to [`PortMapper::found`].
    Search,
    /// Read this by HTTP; what comes of it goes to [`PortMapper::fetched`].
    Fetch(u32, Url),
    /// Make this call; what comes of it goes to [`PortMapper::called`].
    Call(u32, Service, Action),
    /// For the planner.
    Mapped(Option<PortMapping>),
}

/// A mapping that a router made.
#[derive(Debug, Clone)]
struct Grant {
    protocol: Protocol,
    external: SocketAddrV4,
    lifetime: Duration,
    /// The router said that it lasts.
    permanent: bool,
    expires: Now,
    renew_at: Now,
    check_at: Now,
    /// A check was not answered since.
    doubted: bool,
}

/// How far the end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    NotYet,
    /// A mapping is being deleted, until then at most.
    By(Now),
    Over,
}

/// The machine.
#[derive(Debug)]
pub struct PortMapper {
    internal_port: u16,
    secret: Secret32,
    rng: StdRng,
    gateway: Option<Gateway>,
    pcp: Asker,
    nat_pmp: Asker,
    upnp: Upnp,
    /// The router's address outside, as NAT-PMP told it.
    outside: Option<Ipv4Addr>,
    grant: Option<Grant>,
    /// The place outside that was held last here.
    last: Option<SocketAddrV4>,
    /// Looking for a grant.
    round: bool,
    /// Rounds in vain since the last event.
    in_vain: usize,
    again_at: Option<Now>,
    event_at: Option<Now>,
    /// The router's epoch in seconds, and when it was read.
    epoch: Option<(u32, Now)>,
    ending: Ending,
    /// What the planner was told last; None: nothing yet.
    told: Option<Option<PortMapping>>,
    out: VecDeque<Output>,
}

impl PortMapper {
    /// A machine that maps the UDP port `internal_port` of this machine. `secret` is only ever used to derive nonces.
    #[must_use]
    pub fn new(internal_port: u16, secret: Secret32, seed: u64) -> Self {
        Self {
            internal_port,
            secret,
            rng: StdRng::seed_from_u64(seed),
            gateway: None,
            pcp: Asker::default(),
            nat_pmp: Asker::default(),
            upnp: Upnp::default(),
            outside: None,
            grant: None,
            last: None,
            round: false,
            in_vain: 0,
            again_at: None,
            event_at: None,
            epoch: None,
            ending: Ending::NotYet,
            told: None,
            out: VecDeque::new(),
        }
    }

    /// The way out is this one, as read at start and after every change; the same one again is no news.
    pub fn set_gateway(&mut self, gateway: Option<Gateway>, now: Now) {
        if gateway == self.gateway || self.ending != Ending::NotYet {
            return;
        }
        self.gateway = gateway;
        (self.pcp, self.nat_pmp, self.upnp) = (Asker::default(), Asker::default(), Upnp::default());
        (self.outside, self.last, self.epoch, self.event_at) = (None, None, None, None);
        (self.grant, self.round, self.again_at, self.in_vain) = (None, false, None, 0);
        if gateway.is_some_and(|g| g.may_translate()) {
            self.begin_round(now);
        }
        self.tell();
    }

    /// The network changed in some way: asks the router whether it still knows us, or once more for a mapping.
    pub fn nudge(&mut self, now: Now) {
        if !self.may_ask() || self.event_at.is_some_and(|at| now.since(at) < EVENT_GAP) {
            return;
        }
        self.event_at = Some(now);
        if self.grant.is_some() {
            self.check(now);
        } else if !self.round {
            self.in_vain = 0;
            self.begin_round(now);
        }
    }

    /// Asks for what netcheck shows: which protocols the router speaks, also those that were not needed.
    pub fn survey(&mut self, now: Now) {
        if !self.may_ask() || self.round {
            return;
        }
        if matches!(self.nat_pmp.heard, Heard::Nothing | Heard::Silence) && !self.nat_pmp.is_under_way() {
            self.nat_pmp.start(Purpose::Probe, nat_pmp::address_request().to_vec(), now);
        }
        if matches!(self.upnp.heard, Heard::Nothing | Heard::Silence) && self.upnp.is_idle() {
            self.upnp.start(now);
        }
        self.handle_timeout(now);
    }

    /// Nothing is being asked for now.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        !self.pcp.is_under_way() && !self.nat_pmp.is_under_way() && self.upnp.is_idle()
    }

    /// Ends the mapping. To be driven until [`PortMapper::is_stopped`].
    pub fn stop(&mut self, now: Now) {
        if self.ending != Ending::NotYet {
            return;
        }
        self.ending = Ending::By(now + STOP_PATIENCE);
        let held = self.grant.take().map(|grant| (grant.protocol, grant.external.port()));
        // What was asked for may have been granted just now.
        let asked = self.pcp.waits_for(Purpose::Map).then_some((Protocol::Pcp, 0));
        let asked = asked.or_else(|| self.nat_pmp.waits_for(Purpose::Map).then_some((Protocol::NatPmp, 0)));
        let asked = asked.or_else(|| self.upnp.is_adding().map(|port| (Protocol::Upnp, port)));
        self.pcp.stop();
        self.nat_pmp.stop();
        self.upnp.stop();
        (self.round, self.again_at) = (false, None);
        let (Some((protocol, port)), Some(gateway)) = (held.or(asked), self.gateway) else { return };
        match protocol {
            Protocol::Pcp => self.pcp.start(Purpose::Delete, self.pcp_request(gateway, 0), now),
            Protocol::NatPmp => {
                let request = nat_pmp::map_request(self.internal_port, 0, 0).to_vec();
                self.nat_pmp.start(Purpose::Delete, request, now);
            }
            Protocol::Upnp => self.upnp.delete(port, &mut self.out),
        }
        self.handle_timeout(now);
    }

    /// The deletion is done, or took too long.
    #[must_use]
    pub fn is_stopped(&self, now: Now) -> bool {
        match self.ending {
            Ending::NotYet => false,
            Ending::By(by) => now >= by || self.is_quiet(),
            Ending::Over => true,
        }
    }

    /// A datagram on the socket that requests were sent from, or on the one for announcements.
    pub fn handle_datagram(&mut self, from: SocketAddr, bytes: &[u8], now: Now) {
        let Some(gateway) = self.gateway else { return };
        if from != SocketAddr::from((gateway.router, pcp::SERVER_PORT)) {
            return;
        }
        if let Some(answer) = pcp::decode(bytes) {
            self.hear_pcp(&answer, gateway, now);
        } else if let Some(answer) = nat_pmp::decode(bytes) {
            self.hear_nat_pmp(answer, now);
        }
        self.advance(now);
    }

    /// An answer to a search.
    pub fn found(&mut self, from: IpAddr, bytes: &[u8], now: Now) {
        if let Some(gateway) = self.gateway.filter(|g| from == g.router) {
            self.upnp.found(bytes, gateway.router, &mut self.out);
            self.advance(now);
        }
    }

    /// What reading brought, or why it brought nothing.
    pub fn fetched(&mut self, id: u32, document: Result<&str, &str>, now: Now) {
        self.upnp.fetched(id, document, &mut self.out);
        self.advance(now);
    }

    /// What a call brought, or why it brought nothing.
    pub fn called(&mut self, id: u32, document: Result<&str, &str>, now: Now) {
        use upnp::News;
        let Some(gateway) = self.gateway else { return };
        let inside = SocketAddrV4::new(gateway.own, self.internal_port);
        match self.upnp.called(id, document, inside, &mut self.rng, &mut self.out) {
            News::None => {}
            News::Granted { external, lifetime_s } => self.granted(Protocol::Upnp, external, lifetime_s, now),
            News::Outside(ip) => {
                if let Some(grant) = self.grant.as_mut().filter(|g| g.protocol == Protocol::Upnp) {
                    grant.external.set_ip(ip);
                }
                self.tell();
            }
            News::Failed => self.not_renewed(Protocol::Upnp, now),
            News::Refused => self.lose(Protocol::Upnp, now),
        }
        self.advance(now);
    }

    /// When [`PortMapper::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Now> {
        let grant = self.grant.as_ref().map(|g| g.renew_at.min(g.check_at).min(g.expires));
        let asking = [self.pcp.timeout(), self.nat_pmp.timeout(), self.upnp.timeout()];
        let ending = if let Ending::By(by) = self.ending { Some(by) } else { None };
        asking.into_iter().chain([grant, self.again_at, ending]).flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        if matches!(self.ending, Ending::By(by) if now >= by) {
            self.ending = Ending::Over;
            self.pcp.stop();
            self.nat_pmp.stop();
            self.upnp.stop();
            return;
        }
        if self.again_at.is_some_and(|at| at <= now) {
            self.begin_round(now);
        }
        if let Some(grant) = &self.grant {
            let (renew, check) = (grant.renew_at <= now, grant.check_at <= now);
            if grant.expires <= now {
                self.lose(grant.protocol, now);
            } else if renew {
                self.renew(now);
            } else if check {
                self.check(now);
            }
        }
        self.step(Protocol::Pcp, now);
        self.step(Protocol::NatPmp, now);
        self.upnp.step(now, &mut self.out);
        self.advance(now);
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// For people.
    #[must_use]
    pub fn status(&self, now: Now) -> Document {
        let held = |protocol| self.grant.as_ref().is_some_and(|g| g.protocol == protocol);
        let row = |protocol: Protocol, heard: &Heard| {
            let (state, text) = match heard {
                _ if held(protocol) => ("granted", None),
                Heard::Nothing => ("not-asked", None),
                Heard::Silence => ("silent", None),
                Heard::Answer => ("answers", None),
                Heard::Refusal(why) => ("refused", Some(why.clone())),
            };
            PortMapperProtocol { name: protocol.name().into(), state: state.into(), text }
        };
        let grant = self.grant.as_ref();
        let lasting = grant.filter(|g| !g.permanent);
        Document {
            enabled: true,
            gateway: self.gateway.map(|g| g.router.into()),
            internal_port: self.internal_port,
            protocol: grant.map(|g| g.protocol.name().into()),
            external: grant.map(|g| g.external.into()),
            lifetime_s: lasting.map(|g| g.lifetime.as_secs()),
            expires_s: lasting.map(|g| g.expires.since(now).as_secs()),
            protocols: vec![
                row(Protocol::Pcp, &self.pcp.heard),
                row(Protocol::NatPmp, &self.nat_pmp.heard),
                row(Protocol::Upnp, &self.upnp.heard),
            ],
            reason: self.reason(),
        }
    }

    fn reason(&self) -> Option<String> {
        let Some(gateway) = self.gateway else { return Some("this machine has no IPv4 router".into()) };
        if self.grant.is_some() {
            return None;
        }
        if !gateway.may_translate() {
            return Some("this machine's address is a public one".into());
        }
        if self.round {
            return Some("the router is being asked".into());
        }
        let heard = [&self.pcp.heard, &self.nat_pmp.heard, &self.upnp.heard];
        if heard.iter().all(|heard| matches!(heard, Heard::Silence | Heard::Nothing)) {
            return Some("the router answers neither PCP nor NAT-PMP nor UPnP; switch one of them on there".into());
        }
        Some("the router refuses".into())
    }

    fn may_ask(&self) -> bool {
        self.ending == Ending::NotYet && self.gateway.is_some_and(|g| g.may_translate())
    }

    fn begin_round(&mut self, now: Now) {
        let Some(gateway) = self.gateway else { return };
        (self.round, self.again_at) = (true, None);
        self.pcp.start(Purpose::Map, self.pcp_request(gateway, LIFETIME_S), now);
        self.nat_pmp.start(Purpose::Probe, nat_pmp::address_request().to_vec(), now + NAT_PMP_AFTER);
        self.upnp.start(now + UPNP_AFTER);
        self.step(Protocol::Pcp, now);
    }

    /// Takes the next step of a round, if an answer or its absence made one possible.
    fn advance(&mut self, now: Now) {
        if !self.round || !self.pcp.is_hopeless() {
            return;
        }
        let Some(gateway) = self.gateway else { return };
        self.nat_pmp.hurry(now);
        if !self.nat_pmp.is_under_way() && self.nat_pmp.heard == Heard::Answer {
            let wish = self.last.map_or(self.internal_port, |last| last.port());
            let request = nat_pmp::map_request(self.internal_port, wish, LIFETIME_S).to_vec();
            self.nat_pmp.start(Purpose::Map, request, now);
        }
        self.step(Protocol::NatPmp, now);
        if !self.nat_pmp.is_hopeless() {
            return;
        }
        self.upnp.hurry(now);
        self.upnp.step(now, &mut self.out);
        let inside = SocketAddrV4::new(gateway.own, self.internal_port);
        let wish = self.last.map_or(self.internal_port, |last| last.port());
        if self.upnp.is_ready() {
            self.upnp.add(wish, inside, LIFETIME_S, &mut self.out);
        } else if self.upnp.is_hopeless() {
            self.round = false;
            self.again_at = Some(now + PAUSES[self.in_vain.min(PAUSES.len() - 1)]);
            self.in_vain += 1;
            self.tell();
        }
    }

    fn step(&mut self, protocol: Protocol, now: Now) {
        loop {
            let asker = match protocol {
                Protocol::Pcp => &mut self.pcp,
                Protocol::NatPmp => &mut self.nat_pmp,
                Protocol::Upnp => return,
            };
            match asker.step(now) {
                Step::Wait => return,
                Step::Send(bytes) => self.out.push_back(Output::Send(bytes)),
                Step::GaveUp => {
                    self.not_renewed(protocol, now);
                    return;
                }
            }
        }
    }

    fn hear_pcp(&mut self, answer: &pcp::Answer, gateway: Gateway, now: Now) {
        use crate::wire::pcp::{About, ResultCode};
        let refused = match answer.about {
            About::Announce if answer.result == ResultCode::SUCCESS => {
                if self.pcp.waits_for(Purpose::Check) {
                    self.pcp.stop();
                }
                self.hear_epoch(answer.epoch_s, now);
                return;
            }
            About::Map { nonce, internal_port, external } => {
                if nonce != self.nonce(gateway) || internal_port != self.internal_port {
                    return;
                }
                if self.pcp.waits_for(Purpose::Delete) {
                    self.pcp.stop();
                    return;
                }
                if !self.pcp.waits_for(Purpose::Map) {
                    return;
                }
                self.epoch = Some((answer.epoch_s, now));
                if answer.result == ResultCode::SUCCESS && is_outside(external) && answer.lifetime_s > 0 {
                    self.pcp.stop();
                    self.pcp.heard = Heard::Answer;
                    self.granted(Protocol::Pcp, external, answer.lifetime_s, now);
                    return;
                }
                if answer.result == ResultCode::SUCCESS { "it has no address outside" } else { answer.result.text() }
            }
            // Nothing in these ties them to a request, so they end only what no server of this version would refuse.
            About::Unclear if answer.result == ResultCode::UNSUPPORTED_VERSION => answer.result.text(),
            About::Unclear | About::Announce => return,
        };
        self.pcp_refused(refused, now);
    }

    fn pcp_refused(&mut self, why: &str, now: Now) {
        if self.pcp.waits_for(Purpose::Map) {
            self.pcp.stop();
            self.pcp.heard = Heard::Refusal(why.to_owned());
            self.lose(Protocol::Pcp, now);
        }
    }

    fn hear_nat_pmp(&mut self, answer: nat_pmp::Answer, now: Now) {
        use crate::wire::nat_pmp::{About, ResultCode};
        if answer.result == ResultCode(1) {
            // A server of NAT-PMP alone, asked by PCP.
            self.pcp_refused("it speaks only NAT-PMP", now);
            return;
        }
        let success = answer.result == ResultCode::SUCCESS;
        match answer.about {
            About::Address(outside) if success => {
                if self.nat_pmp.waits_for(Purpose::Probe) || self.nat_pmp.waits_for(Purpose::Check) {
                    self.nat_pmp.stop();
                    let usable = is_outside(SocketAddrV4::new(outside, 1));
                    self.nat_pmp.heard =
                        if usable { Heard::Answer } else { Heard::Refusal("it has no address outside".into()) };
                }
                self.outside = Some(outside);
                if let Some(grant) = self.grant.as_mut().filter(|g| g.protocol == Protocol::NatPmp)
                    && is_outside(SocketAddrV4::new(outside, 1))
                {
                    grant.external.set_ip(outside);
                }
                self.hear_epoch(answer.epoch_s, now);
                self.tell();
            }
            About::Map { internal_port, external_port, lifetime_s } if internal_port == self.internal_port => {
                if self.nat_pmp.waits_for(Purpose::Delete) {
                    self.nat_pmp.stop();
                } else if self.nat_pmp.waits_for(Purpose::Map) {
                    self.nat_pmp.stop();
                    let external = self.outside.map(|ip| SocketAddrV4::new(ip, external_port));
                    if let Some(external) = external.filter(|e| success && lifetime_s > 0 && is_outside(*e)) {
                        self.epoch = Some((answer.epoch_s, now));
                        self.granted(Protocol::NatPmp, external, lifetime_s, now);
                    } else {
                        self.nat_pmp.heard = Heard::Refusal(answer.result.text().to_owned());
                        self.lose(Protocol::NatPmp, now);
                    }
                }
            }
            About::Address(_) if self.nat_pmp.waits_for(Purpose::Probe) => {
                self.nat_pmp.stop();
                self.nat_pmp.heard = Heard::Refusal(answer.result.text().to_owned());
            }
            About::Address(_) | About::Map { .. } | About::Unclear => {}
        }
    }

    /// Notes the router's epoch; one that does not fit the time passed means that the mappings are gone.
    /// PCP and NAT-PMP are spoken by the same server.
    fn hear_epoch(&mut self, epoch_s: u32, now: Now) {
        let lost = self.epoch.is_some_and(|(before, at)| is_reset(before, epoch_s, now.since(at)));
        if lost && let Some(event_at) = self.event_at.filter(|at| now.since(*at) < EVENT_GAP) {
            // Not so soon after the last event. The old epoch is remembered, so that the answer to a check shows it again.
            if let Some(grant) = &mut self.grant {
                grant.check_at = grant.check_at.min(event_at + EVENT_GAP);
            }
            return;
        }
        self.epoch = Some((epoch_s, now));
        if lost && self.grant.as_ref().is_some_and(|g| g.protocol != Protocol::Upnp) {
            self.event_at = Some(now);
            self.renew(now);
        }
    }

    fn granted(&mut self, protocol: Protocol, external: SocketAddrV4, lifetime_s: u32, now: Now) {
        let permanent = lifetime_s == 0;
        let granted = if permanent { LONGEST } else { Duration::from_secs(lifetime_s.into()) };
        let lifetime = granted.clamp(SHORTEST, LONGEST);
        let check = if protocol == Protocol::Upnp { CHECK_UPNP_EVERY } else { CHECK_EVERY };
        self.grant = Some(Grant {
            protocol,
            external,
            lifetime,
            permanent,
            expires: now + lifetime,
            renew_at: now + (lifetime / 2).min(Duration::from_secs(u64::from(LIFETIME_S) / 2)),
            check_at: now + check,
            doubted: false,
        });
        self.last = Some(external);
        (self.round, self.in_vain, self.again_at) = (false, 0, None);
        // What has not begun does not begin.
        if protocol != Protocol::NatPmp {
            self.nat_pmp.stop();
        }
        if protocol != Protocol::Upnp {
            self.upnp.stop();
        }
        self.tell();
    }

    /// A renewal or check was not answered.
    fn not_renewed(&mut self, protocol: Protocol, now: Now) {
        let purpose = match protocol {
            Protocol::Pcp => self.pcp.purpose,
            Protocol::NatPmp => self.nat_pmp.purpose,
            Protocol::Upnp => self.upnp.purpose(),
        };
        let Some(grant) = self.grant.as_mut().filter(|g| g.protocol == protocol) else { return };
        match purpose {
            // Whether it grants it again is asked once; a router that is away is not asked by two ways for hours.
            Purpose::Check if !grant.doubted => (grant.doubted, grant.renew_at) = (true, now),
            Purpose::Check => {}
            _ => grant.renew_at = now + (grant.expires.since(now) / 4).max(RENEW_AGAIN),
        }
    }

    /// The router no longer grants what it did.
    fn lose(&mut self, protocol: Protocol, now: Now) {
        if self.grant.as_ref().is_some_and(|g| g.protocol == protocol) {
            self.grant = None;
            self.tell();
            self.begin_round(now);
        }
    }

    fn renew(&mut self, now: Now) {
        let (Some(grant), Some(gateway)) = (self.grant.as_mut(), self.gateway) else { return };
        // Until it is known how this attempt ends.
        grant.renew_at = now + (grant.expires.since(now) / 4).max(RENEW_AGAIN);
        grant.check_at = grant.check_at.max(now + CHECK_EVERY);
        let (protocol, external) = (grant.protocol, grant.external);
        match protocol {
            Protocol::Pcp => {
                self.pcp.start(Purpose::Map, self.pcp_request(gateway, LIFETIME_S), now);
                self.step(Protocol::Pcp, now);
            }
            Protocol::NatPmp => {
                let request = nat_pmp::map_request(self.internal_port, external.port(), LIFETIME_S).to_vec();
                self.nat_pmp.start(Purpose::Map, request, now);
                self.step(Protocol::NatPmp, now);
            }
            Protocol::Upnp => {
                let inside = SocketAddrV4::new(gateway.own, self.internal_port);
                self.upnp.renew(external.port(), inside, LIFETIME_S, &mut self.out);
            }
        }
    }

    fn check(&mut self, now: Now) {
        let (Some(grant), Some(gateway)) = (self.grant.as_mut(), self.gateway) else { return };
        let every = if grant.protocol == Protocol::Upnp { CHECK_UPNP_EVERY } else { CHECK_EVERY };
        grant.check_at = now + every;
        match grant.protocol {
            Protocol::Pcp if !self.pcp.is_under_way() => {
                self.pcp.start(Purpose::Check, pcp::announce_request(gateway.own).to_vec(), now);
                self.step(Protocol::Pcp, now);
            }
            Protocol::NatPmp if !self.nat_pmp.is_under_way() => {
                self.nat_pmp.start(Purpose::Check, nat_pmp::address_request().to_vec(), now);
                self.step(Protocol::NatPmp, now);
            }
            Protocol::Upnp => self.upnp.check(&mut self.out),
            Protocol::Pcp | Protocol::NatPmp => {}
        }
    }

    fn tell(&mut self) {
        let mapping = self
            .grant
            .as_ref()
            .map(|grant| PortMapping { external: grant.external.into(), protocol: grant.protocol.name().to_owned() });
        let asked_in_vain = self.again_at.is_some();
        let news = self.told.as_ref().map_or(mapping.is_some() || asked_in_vain, |told| *told != mapping);
        if news {
            self.told = Some(mapping.clone());
            self.out.push_back(Output::Mapped(mapping));
        }
    }

    fn pcp_request(&self, gateway: Gateway, lifetime_s: u32) -> Vec<u8> {
        let wish = self.last.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, self.internal_port));
        let suggested = if lifetime_s == 0 { SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0) } else { wish };
        let (client, nonce, internal_port) = (gateway.own, self.nonce(gateway), self.internal_port);
        pcp::map_request(&pcp::Request { client, nonce, internal_port, suggested, lifetime_s }).to_vec()
    }

    /// The same after a restart, or the router would take us for somebody else until the old mapping ends.
    fn nonce(&self, gateway: Gateway) -> pcp::Nonce {
        let mut out = [0; 12];
        // The key is shorter than the longest that BLAKE2s takes.
        if let Ok(mut mac) = blake2::Blake2sMac256::new_from_slice(self.secret.expose()) {
            mac.update(b"meshd pcp nonce v1");
            mac.update(&gateway.router.octets());
            mac.update(&gateway.own.octets());
            mac.update(&self.internal_port.to_be_bytes());
            out.copy_from_slice(&mac.finalize_fixed()[..12]);
        }
        pcp::Nonce(out)
    }
}

/// An address that somebody could be reached at, here or behind a carrier's NAT.
fn is_outside(external: SocketAddrV4) -> bool {
    let ip = external.ip();
    let special =
        ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast() || ip.is_link_local();
    external.port() != 0 && !special && ip.octets()[0] != 0
}

/// RFC 6887 section 8.5: the server's clock went back, or the two clocks differ by more than a sixteenth and two seconds.
fn is_reset(before_s: u32, now_s: u32, passed: Duration) -> bool {
    let (before, now, here) = (u64::from(before_s), u64::from(now_s), passed.as_secs());
    if now + 1 < before {
        return true;
    }
    let there = now.saturating_sub(before);
    here + 2 < there - there / 16 || there + 2 < here - here / 16
}

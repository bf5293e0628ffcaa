//! The UPnP side: search, description, address outside, mapping. One request at a time.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;

use crate::engine::portmap::asker::{Heard, Purpose};
use crate::engine::portmap::{Output, is_outside};
use crate::time::Now;
use crate::wire::upnp::{self, Action, Reply, Service, Url, fault};

/// How long each search waits: a device may take a second (its MX) to answer.
const PATIENCE: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(1_500)];
/// Ports tried when the router has given away the one asked for.
const PORT_TRIES: u8 = 4;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum State {
    #[default]
    Idle,
    /// Searched so often; the next, or the end, is then.
    Search { sent: usize, next: Now },
    /// Reads the description.
    Fetch(Url),
    /// Asks for the address outside.
    Ask,
    /// Asks for a mapping.
    Add { port: u16, lifetime_s: u32, tries: u8 },
    /// Ends a mapping.
    Delete,
}

/// What a call brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing yet, or nothing.
    None,
    /// The address outside.
    Outside(Ipv4Addr),
    /// A mapping. 0: without an end.
    Granted { external: SocketAddrV4, lifetime_s: u32 },
    /// A check or renewal was not answered.
    Failed,
    /// A mapping was refused.
    Refused,
}

#[derive(Debug, Default)]
pub(super) struct Upnp {
    pub(super) heard: Heard,
    state: State,
    purpose: Purpose,
    /// The request that is being answered; answers to others are late.
    id: u32,
    service: Option<Service>,
    outside: Option<Ipv4Addr>,
}

impl Upnp {
    /// Begins to search at a time.
    pub(super) fn start(&mut self, at: Now) {
        self.stop();
        (self.service, self.outside) = (None, None);
        self.purpose = Purpose::Probe;
        self.state = State::Search { sent: 0, next: at };
    }

    /// Searches now if it was to search later.
    pub(super) fn hurry(&mut self, now: Now) {
        if let State::Search { sent: 0, next } = &mut self.state {
            *next = (*next).min(now);
        }
    }

    /// Waits for nothing more.
    pub(super) fn stop(&mut self) {
        self.state = State::Idle;
        self.id = self.id.wrapping_add(1);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// A mapping is being asked for.
    pub(super) const fn is_adding(&self) -> Option<u16> {
        if let State::Add { port, .. } = self.state { Some(port) } else { None }
    }

    /// A mapping may be asked for.
    pub(super) fn is_ready(&self) -> bool {
        self.is_idle() && self.heard == Heard::Answer && self.service.is_some() && self.outside.is_some()
    }

    /// It brings no mapping.
    pub(super) fn is_hopeless(&self) -> bool {
        self.is_idle() && matches!(self.heard, Heard::Silence | Heard::Refusal(_))
    }

    pub(super) const fn purpose(&self) -> Purpose {
        self.purpose
    }

    pub(super) const fn timeout(&self) -> Option<Now> {
        if let State::Search { next, .. } = self.state { Some(next) } else { None }
    }

    pub(super) fn step(&mut self, now: Now, out: &mut VecDeque<Output>) {
        while let State::Search { sent, next } = &mut self.state
            && *next <= now
        {
            let Some(patience) = PATIENCE.get(*sent) else {
                self.state = State::Idle;
                self.heard = Heard::Silence;
                return;
            };
            (*sent, *next) = (*sent + 1, now + *patience);
            out.push_back(Output::Search);
        }
    }

    pub(super) fn found(&mut self, answer: &[u8], router: Ipv4Addr, out: &mut VecDeque<Output>) {
        if matches!(self.state, State::Search { sent, .. } if sent > 0)
            && let Some(url) = upnp::location(answer, router)
        {
            self.id = self.id.wrapping_add(1);
            out.push_back(Output::Fetch(self.id, url.clone()));
            self.state = State::Fetch(url);
        }
    }

    pub(super) fn fetched(&mut self, id: u32, document: Result<&str, &str>, out: &mut VecDeque<Output>) {
        let State::Fetch(url) = &self.state else { return };
        if id != self.id {
            return;
        }
        let found = document.map(|text| upnp::service(text, url));
        self.state = State::Idle;
        match found {
            Ok(Some(service)) => {
                self.heard = Heard::Answer;
                self.service = Some(service);
                self.ask(Purpose::Probe, out);
            }
            Ok(None) => self.heard = Heard::Refusal("it describes no connection to the outside".into()),
            Err(why) => self.heard = Heard::Refusal(why.to_owned()),
        }
    }

    /// Asks whether the address outside is still the same.
    pub(super) fn check(&mut self, out: &mut VecDeque<Output>) {
        if self.is_idle() {
            self.ask(Purpose::Check, out);
        }
    }

    fn ask(&mut self, purpose: Purpose, out: &mut VecDeque<Output>) {
        self.purpose = purpose;
        if self.call(Action::ExternalAddress, out) {
            self.state = State::Ask;
        }
    }

    pub(super) fn add(&mut self, port: u16, inside: SocketAddrV4, lifetime_s: u32, out: &mut VecDeque<Output>) {
        self.purpose = Purpose::Probe;
        self.map(port, inside, lifetime_s, 0, out);
    }

    pub(super) fn renew(&mut self, port: u16, inside: SocketAddrV4, lifetime_s: u32, out: &mut VecDeque<Output>) {
        self.stop();
        self.purpose = Purpose::Map;
        self.map(port, inside, lifetime_s, PORT_TRIES, out);
    }

    fn map(&mut self, port: u16, internal: SocketAddrV4, lifetime_s: u32, tries: u8, out: &mut VecDeque<Output>) {
        if self.call(Action::Add { external_port: port, internal, lifetime_s }, out) {
            self.state = State::Add { port, lifetime_s, tries };
        }
    }

    pub(super) fn delete(&mut self, external_port: u16, out: &mut VecDeque<Output>) {
        self.purpose = Purpose::Delete;
        if self.call(Action::Delete { external_port }, out) {
            self.state = State::Delete;
        }
    }

    fn call(&mut self, action: Action, out: &mut VecDeque<Output>) -> bool {
        let Some(service) = &self.service else { return false };
        self.id = self.id.wrapping_add(1);
        out.push_back(Output::Call(self.id, service.clone(), action));
        true
    }

    pub(super) fn called(
        &mut self,
        id: u32,
        document: Result<&str, &str>,
        inside: SocketAddrV4,
        rng: &mut StdRng,
        out: &mut VecDeque<Output>,
    ) -> News {
        if id != self.id {
            return News::None;
        }
        match std::mem::take(&mut self.state) {
            State::Ask => self.asked(document),
            State::Add { port, lifetime_s, tries } => {
                let action = Action::Add { external_port: port, internal: inside, lifetime_s };
                let reply = document.map(|text| upnp::reply(&action, text));
                match (reply, self.outside) {
                    (Ok(Some(Reply::Done)), Some(outside)) => {
                        self.heard = Heard::Answer;
                        News::Granted { external: SocketAddrV4::new(outside, port), lifetime_s }
                    }
                    (Ok(Some(Reply::Fault(fault::ONLY_PERMANENT))), _) if lifetime_s != 0 => {
                        self.map(port, inside, 0, tries, out);
                        News::None
                    }
                    (Ok(Some(Reply::Fault(fault::CONFLICT))), _) if tries + 1 < PORT_TRIES => {
                        self.map(rng.random_range(20_000..60_000), inside, lifetime_s, tries + 1, out);
                        News::None
                    }
                    (Ok(Some(Reply::Fault(code))), _) => {
                        self.heard = Heard::Refusal(fault::text(code).to_owned());
                        News::Refused
                    }
                    (Err(why), _) => self.failed(why),
                    (Ok(_), _) => self.failed("its answer cannot be understood"),
                }
            }
            // Deleted or not: there is no more to be done about it.
            State::Delete => News::None,
            other => {
                self.state = other;
                News::None
            }
        }
    }

    fn asked(&mut self, document: Result<&str, &str>) -> News {
        match document.map(|text| upnp::reply(&Action::ExternalAddress, text)) {
            Ok(Some(Reply::Address(outside))) if is_outside(SocketAddrV4::new(outside, 1)) => {
                self.outside = Some(outside);
                News::Outside(outside)
            }
            Ok(Some(Reply::Address(_))) => self.failed("it has no address outside"),
            Ok(Some(Reply::Fault(code))) => self.failed(fault::text(code)),
            Ok(_) => self.failed("its answer cannot be understood"),
            Err(why) => self.failed(why),
        }
    }

    fn failed(&mut self, why: &str) -> News {
        if self.purpose == Purpose::Probe {
            self.heard = Heard::Refusal(why.to_owned());
        }
        News::Failed
    }
}

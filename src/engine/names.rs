//! Names: what this node answers to DNS questions about its network (RFC 1035, 1123, 2308, 3596, 6891).
//!
//! The zone is `NETWORK.internal`, one name a member, and the reverse names of the network's own ranges. Besides there are the
//! names that an admin typed, each for itself: `nas.home` says nothing about `tv.home`. Questions about a domain that an
//! admin gave servers go there. Everything else is somebody else's to answer.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::IpNet;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::trust::names::is_below;

/// The last label of every network's zone: reserved for private use (ICANN resolution 2024.07.29.06), so a name that leaks
/// out of the mesh resolves nowhere.
pub const TOP: &str = "internal";
/// How long an answer may be kept, in seconds: an address stays as long as its member does.
const TTL: u32 = 60;
/// How long a "no such name" may be kept, in seconds: somebody may be joining right now.
const NEGATIVE_TTL: u32 = 5;
/// The largest UDP answer without EDNS (RFC 1035 section 2.3.4).
const PLAIN_LIMIT: u16 = 512;
/// The largest with it: it passes every path unfragmented (DNS flag day 2020).
const EDNS_LIMIT: u16 = 1232;

/// What carried a question, which decides how long the answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One datagram.
    Udp,
    /// A stream: 65,535 bytes.
    Tcp,
}

/// What becomes of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To be sent back.
    Answer(Vec<u8>),
    /// To be asked of these servers, which an admin named for the domain.
    Ask(Vec<IpAddr>),
    /// Not about this network: to be asked elsewhere, or refused with [`refuse`].
    Elsewhere,
    /// No question at all.
    Nothing,
}

/// The names of one network.
#[derive(Debug, Clone)]
pub struct Zone {
    apex: Name,
    /// Members, by label.
    hosts: FxHashMap<String, Vec<IpAddr>>,
    /// Names that an admin typed, in full.
    extra: FxHashMap<String, Vec<IpAddr>>,
    /// Names inside the zone that are not there themselves, but something below them is.
    inner: FxHashSet<String>,
    /// Domains with servers of their own.
    splits: BTreeMap<String, Vec<IpAddr>>,
    reverse: FxHashMap<IpAddr, Name>,
    ranges: Vec<IpNet>,
    /// What a system resolver must be told to send here besides the zone, see [`Self::routing_domains`].
    sent_here: BTreeSet<String>,
}

impl Zone {
    /// The zone of a network with this name, these ranges and these members.
    #[must_use]
    pub fn new<'a>(
        network: &str,
        ranges: Vec<IpNet>,
        members: impl IntoIterator<Item = (&'a str, Ipv4Addr, Ipv6Addr)>,
    ) -> Self {
        // Names in records are checked to be labels; should one not be, it has no name here.
        let apex = Name::from_labels([network, TOP]).unwrap_or_else(|_| Name::root()).to_lowercase();
        let mut zone = Self {
            apex,
            hosts: FxHashMap::default(),
            extra: FxHashMap::default(),
            inner: FxHashSet::default(),
            splits: BTreeMap::new(),
            reverse: FxHashMap::default(),
            ranges,
            sent_here: BTreeSet::new(),
        };
        for (name, v4, v6) in members {
            let Ok(full) = zone.apex.prepend_label(name) else { continue };
            let addresses = vec![IpAddr::V4(v4), IpAddr::V6(v6)];
            for address in &addresses {
                zone.reverse.insert(*address, full.clone());
            }
            zone.hosts.insert(name.to_ascii_lowercase(), addresses);
        }
        zone
    }

    /// Adds a name that an admin typed, a full one in lower case. `back`: the addresses that are it when looked up. A member
    /// goes before it, by name and by address; of several names for an address the first added counts.
    pub fn add_name(&mut self, name: &str, addresses: Vec<IpAddr>, back: &[IpAddr]) {
        let Ok(full) = Name::from_ascii(format!("{name}.")) else { return };
        let domain = self.domain();
        if is_below(name, &domain) {
            let inside = name.len() - domain.len() - 1;
            if self.hosts.contains_key(&name[..inside]) {
                return;
            }
            let ends = name[..inside].match_indices('.').map(|(dot, _)| name[dot + 1..].to_owned());
            self.inner.extend(ends);
        } else {
            self.sent_here.insert(name.to_owned());
        }
        for address in back {
            if let Entry::Vacant(free) = self.reverse.entry(*address) {
                free.insert(full.clone());
                if !self.ranges.iter().any(|range| range.contains(address)) {
                    self.sent_here.insert(text(&Name::from(*address)));
                }
            }
        }
        self.extra.insert(name.to_owned(), addresses);
    }

    /// Questions about this domain, a full name in lower case, and everything in it go to these servers.
    pub fn add_split(&mut self, domain: &str, servers: Vec<IpAddr>) {
        if !servers.is_empty() {
            self.sent_here.insert(domain.to_owned());
            self.splits.insert(domain.to_owned(), servers);
        }
    }

    /// Domains about which a system resolver is to ask here besides [`Self::domain`] and [`Self::reverse_domains`]: the names
    /// and domains that admins typed, and the reverse names of their addresses. If these are more than `most`, the fullest
    /// parents stand for what is in them, and questions about the rest come here only to be passed on.
    #[must_use]
    pub fn routing_domains(&self, most: usize) -> Vec<String> {
        let mut domains = self.sent_here.clone();
        while domains.len() > most {
            let mut parents: BTreeMap<&str, usize> = BTreeMap::new();
            for domain in &domains {
                // Never everything: one label and what is above it stay what they are.
                if let Some((_, parent)) = domain.split_once('.').filter(|(_, parent)| !parent.is_empty()) {
                    *parents.entry(parent).or_default() += 1;
                }
            }
            // The fullest, and of those the narrowest.
            let best = parents.into_iter().max_by_key(|(parent, in_it)| (*in_it, parent.split('.').count()));
            let Some(parent) = best.map(|(parent, _)| parent.to_owned()) else { break };
            domains.retain(|domain| !is_below(domain, &parent));
            domains.insert(parent);
        }
        domains.into_iter().take(most).collect()
    }

    /// The zone's own name, as in `home.internal`.
    #[must_use]
    pub fn domain(&self) -> String {
        text(&self.apex)
    }

    /// The names under which addresses of this network are looked up, as in `71.100.in-addr.arpa`, for a resolver that is to
    /// send such questions here.
    #[must_use]
    pub fn reverse_domains(&self) -> Vec<String> {
        self.ranges
            .iter()
            .filter_map(|range| {
                // A label is an octet or a nibble; a range that ends within one has no name of its own.
                let bits_a_label = if range.addr().is_ipv4() { 8 } else { 4 };
                let labels = (range.prefix_len() % bits_a_label == 0).then(|| range.prefix_len() / bits_a_label)?;
                let name = Name::from(range.addr()).trim_to(usize::from(labels) + 2);
                Some(text(&name))
            })
            .collect()
    }

    /// What becomes of a question. `query` is a DNS message as it came, without a length before it.
    #[must_use]
    pub fn reply(&self, query: &[u8], transport: Transport) -> Reply {
        let Ok(message) = Message::from_vec(query) else { return header_only(query, ResponseCode::FormErr) };
        if message.metadata.message_type != MessageType::Query {
            return Reply::Nothing;
        }
        if message.metadata.op_code != OpCode::Query {
            return header_only(query, ResponseCode::NotImp);
        }
        let [question] = message.queries.as_slice() else { return header_only(query, ResponseCode::FormErr) };
        if !matches!(question.query_class, DNSClass::IN | DNSClass::ANY) {
            return Reply::Elsewhere;
        }
        let name = question.name.to_lowercase();
        let Some(found) = self.look_up(&name) else {
            return self.servers_of(&text(&name)).map_or(Reply::Elsewhere, Reply::Ask);
        };
        // Who says that there is nothing speaks for the zone, or for this one name.
        let owner =
            if self.extra.contains_key(&text(&name)) && !self.apex.zone_of(&name) { name } else { self.apex.clone() };
        answer(&message, question, found, authority(owner), transport)
    }

    /// What is known of a name; `None` if it is not this network's.
    fn look_up(&self, name: &Name) -> Option<Found> {
        let full = text(name);
        if self.apex.zone_of(name) {
            let depth = name.num_labels() - self.apex.num_labels();
            let typed = || self.extra.get(&full).cloned();
            return Some(match depth {
                0 => Found::Apex,
                1 => self.host(name).or_else(typed).map_or_else(|| self.no_name(&full), Found::Addresses),
                _ => typed().map_or_else(|| self.no_name(&full), Found::Addresses),
            });
        }
        if name.num_labels() == 1 {
            // A resolver without a search domain asks for the bare name.
            let typed = || self.extra.get(&format!("{full}.{}", self.domain())).cloned();
            return self.host(name).or_else(typed).map(Found::Addresses);
        }
        if let Some(addresses) = self.extra.get(&full) {
            return Some(Found::Addresses(addresses.clone()));
        }
        let address = name.parse_arpa_name().ok()?;
        if address.prefix_len() == address.max_prefix_len()
            && let Some(name) = self.reverse.get(&address.addr())
        {
            return Some(Found::Name(name.clone()));
        }
        if !self.ranges.iter().any(|range| range.contains(&address)) {
            return None;
        }
        Some(if address.prefix_len() < address.max_prefix_len() { Found::Nothing } else { Found::NoName })
    }

    fn no_name(&self, full: &str) -> Found {
        if self.inner.contains(full) { Found::Nothing } else { Found::NoName }
    }

    /// The servers of the narrowest domain that a name is or lies in.
    fn servers_of(&self, name: &str) -> Option<Vec<IpAddr>> {
        if self.splits.is_empty() {
            return None;
        }
        let above = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
        std::iter::once(name).chain(above).find_map(|domain| self.splits.get(domain)).cloned()
    }

    fn host(&self, name: &Name) -> Option<Vec<IpAddr>> {
        let label = std::str::from_utf8(name.iter().next()?).ok()?;
        self.hosts.get(label).cloned()
    }
}

fn authority(owner: Name) -> Record {
    let contact = owner.prepend_label("hostmaster").unwrap_or_else(|_| owner.clone());
    let soa = SOA::new(owner.clone(), contact, 1, 3_600, 600, 86_400, NEGATIVE_TTL);
    Record::from_rdata(owner, NEGATIVE_TTL, RData::SOA(soa))
}

/// A name as people write it, without the final dot.
fn text(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_owned()
}

enum Found {
    /// The zone itself.
    Apex,
    /// A member.
    Addresses(Vec<IpAddr>),
    /// An address's member.
    Name(Name),
    /// The name exists and has no records.
    Nothing,
    /// There is no such name.
    NoName,
}

fn answer(message: &Message, question: &Query, found: Found, authority: Record, transport: Transport) -> Reply {
    let mut reply = response(message, ResponseCode::NoError);
    reply.metadata.authoritative = true;
    let wanted = |kind| question.query_type == kind || question.query_type == RecordType::ANY;
    let record = |data| Record::from_rdata(question.name.clone(), TTL, data);
    match found {
        Found::Apex if wanted(RecordType::SOA) => {
            reply.add_answer(authority.clone());
        }
        Found::Addresses(addresses) => {
            for address in addresses {
                match address {
                    IpAddr::V4(v4) if wanted(RecordType::A) => reply.add_answer(record(RData::A(A(v4)))),
                    IpAddr::V6(v6) if wanted(RecordType::AAAA) => reply.add_answer(record(RData::AAAA(AAAA(v6)))),
                    _ => &mut reply,
                };
            }
        }
        Found::Name(name) if wanted(RecordType::PTR) => {
            reply.add_answer(record(RData::PTR(PTR(name))));
        }
        Found::Apex | Found::Name(_) | Found::Nothing => {}
        Found::NoName => reply.metadata.response_code = ResponseCode::NXDomain,
    }
    if reply.answers.is_empty() {
        // RFC 2308 section 3: with it resolvers know how long the "no" holds.
        reply.add_authority(authority);
    }
    let offered = message.edns.as_ref().map_or(PLAIN_LIMIT, |edns| edns.max_payload().clamp(PLAIN_LIMIT, EDNS_LIMIT));
    match reply.to_vec() {
        Ok(bytes) if transport == Transport::Tcp || bytes.len() <= usize::from(offered) => Reply::Answer(bytes),
        Ok(_) => reply.truncate().to_vec().map_or(Reply::Nothing, Reply::Answer),
        Err(_) => Reply::Nothing,
    }
}

fn response(message: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(message.metadata.id, message.metadata.op_code);
    reply.metadata.recursion_desired = message.metadata.recursion_desired;
    reply.metadata.response_code = code;
    reply.add_queries(message.queries.iter().cloned());
    if message.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(EDNS_LIMIT);
        reply.set_edns(edns);
    }
    reply
}

/// The refusal of a question: nobody here answers it.
#[must_use]
pub fn refuse(query: &[u8]) -> Reply {
    fail(query, ResponseCode::Refused)
}

/// The answer to a question whose answer could not be got.
#[must_use]
pub fn failed(query: &[u8]) -> Reply {
    fail(query, ResponseCode::ServFail)
}

fn fail(query: &[u8], code: ResponseCode) -> Reply {
    match Message::from_vec(query) {
        Ok(message) => response(&message, code).to_vec().map_or(Reply::Nothing, Reply::Answer),
        Err(_) => header_only(query, code),
    }
}

/// An answer that repeats nothing of a question that cannot be read, or is of no kind that is known.
fn header_only(query: &[u8], code: ResponseCode) -> Reply {
    let Some(&[id0, id1, flags, ..]) = query.first_chunk::<12>() else { return Reply::Nothing };
    // QR: an answer is never answered, or two servers could keep each other busy for ever.
    if flags & 0x80 != 0 {
        return Reply::Nothing;
    }
    let op_code = OpCode::from_u8((flags >> 3) & 0x0f);
    let mut reply = Message::error_msg(u16::from_be_bytes([id0, id1]), op_code, code);
    reply.metadata.recursion_desired = flags & 1 != 0;
    reply.to_vec().map_or(Reply::Nothing, Reply::Answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn zone() -> Zone {
        let members = [
            ("nas", Ipv4Addr::new(100, 71, 0, 2), "fd3b::2".parse().unwrap()),
            ("laptop", Ipv4Addr::new(100, 71, 0, 1), "fd3b::1".parse().unwrap()),
        ];
        let ranges = vec!["100.71.0.0/16".parse().unwrap(), "fd3b::/48".parse().unwrap()];
        let mut zone = Zone::new("home", ranges, members);
        let mut add = |name: &str, addresses: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            zone.add_name(name, addresses.clone(), &addresses);
        };
        add("nas.lan", &["192.168.1.10", "2001:db8::10"]);
        add("files.lan", &["192.168.1.10", "100.71.0.2"]);
        add("cam.home.internal", &["192.168.1.30"]);
        add("web.site1.home.internal", &["192.168.1.40"]);
        add("laptop.home.internal", &["192.168.1.50"]);
        zone.add_split("corp.example", vec!["10.0.0.53".parse().unwrap()]);
        zone.add_split("lab.corp.example", vec!["10.9.0.53".parse().unwrap()]);
        zone
    }

    fn ask(name: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        match zone().reply(&query.to_vec().unwrap(), Transport::Udp) {
            Reply::Answer(bytes) => {
                let reply = Message::from_vec(&bytes).unwrap();
                assert_eq!(reply.metadata.id, query.metadata.id);
                assert!(reply.metadata.authoritative && !reply.metadata.recursion_available);
                assert_eq!(reply.answers.is_empty(), !reply.authorities.is_empty(), "a no says how long it holds");
                Some((reply.metadata.response_code, reply.answers.iter().map(|a| a.data.to_string()).collect()))
            }
            Reply::Elsewhere => None,
            Reply::Ask(servers) => Some((ResponseCode::Refused, servers.iter().map(ToString::to_string).collect())),
            Reply::Nothing => panic!("no reply"),
        }
    }

    fn found(records: &[&str]) -> Option<(ResponseCode, Vec<String>)> {
        Some((ResponseCode::NoError, records.iter().map(|r| (*r).to_owned()).collect()))
    }

    #[test]
    fn members_have_names_and_addresses_have_them_back() {
        assert_eq!(ask("nas.home.internal.", RecordType::A), found(&["100.71.0.2"]));
        assert_eq!(ask("NAS.Home.Internal.", RecordType::AAAA), found(&["fd3b::2"]));
        assert_eq!(ask("nas.", RecordType::A), found(&["100.71.0.2"]), "the bare name");
        assert_eq!(ask("nas.home.internal.", RecordType::ANY), found(&["100.71.0.2", "fd3b::2"]));
        assert_eq!(ask("2.0.71.100.in-addr.arpa.", RecordType::PTR), found(&["nas.home.internal."]));
        let v6 = format!("{}{}.ip6.arpa.", "2.", ["0"; 27].join(".") + ".b.3.d.f");
        assert_eq!(ask(&v6, RecordType::PTR), found(&["nas.home.internal."]));
    }

    #[test]
    fn a_known_name_without_such_a_record_is_no_unknown_name() {
        // Resolvers that ask for A and AAAA at once take one "no such name" for both.
        assert_eq!(ask("nas.home.internal.", RecordType::MX), found(&[]));
        assert_eq!(ask("home.internal.", RecordType::A), found(&[]));
        assert_eq!(ask("71.100.in-addr.arpa.", RecordType::PTR), found(&[]));
        let unknown = Some((ResponseCode::NXDomain, Vec::new()));
        assert_eq!(ask("printer.home.internal.", RecordType::A), unknown);
        assert_eq!(ask("www.nas.home.internal.", RecordType::A), unknown);
        assert_eq!(ask("9.9.71.100.in-addr.arpa.", RecordType::PTR), unknown);
    }

    #[test]
    fn what_is_not_this_networks_is_asked_elsewhere() {
        for name in ["example.org.", "nas.office.internal.", "internal.", "printer.", "1.0.0.10.in-addr.arpa.", "."] {
            assert_eq!(ask(name, RecordType::A), None, "{name}");
        }
    }

    #[test]
    fn a_name_that_an_admin_typed_is_that_name_and_nothing_else() {
        assert_eq!(ask("NAS.lan.", RecordType::A), found(&["192.168.1.10"]));
        assert_eq!(ask("nas.lan.", RecordType::AAAA), found(&["2001:db8::10"]));
        assert_eq!(ask("nas.lan.", RecordType::MX), found(&[]));
        assert_eq!(ask("files.lan.", RecordType::AAAA), found(&[]));
        for other in
            ["lan.", "tv.lan.", "www.nas.lan.", "files.", "10.1.168.192.in-addr.arpa.x.", "11.1.168.192.in-addr.arpa."]
        {
            assert_eq!(ask(other, RecordType::A), None, "{other}");
        }
        // Back: the first of two names; and a member's address is the member's.
        assert_eq!(ask("10.1.168.192.in-addr.arpa.", RecordType::PTR), found(&["nas.lan."]));
        assert_eq!(ask("2.0.71.100.in-addr.arpa.", RecordType::PTR), found(&["nas.home.internal."]));
    }

    #[test]
    fn names_in_the_zone_are_bare_names_too_and_members_go_before_them() {
        assert_eq!(ask("cam.home.internal.", RecordType::A), found(&["192.168.1.30"]));
        assert_eq!(ask("cam.", RecordType::A), found(&["192.168.1.30"]));
        assert_eq!(ask("web.site1.home.internal.", RecordType::A), found(&["192.168.1.40"]));
        assert_eq!(ask("site1.home.internal.", RecordType::A), found(&[]), "something is below it");
        assert_eq!(ask("site2.home.internal.", RecordType::A), Some((ResponseCode::NXDomain, Vec::new())));
        assert_eq!(ask("laptop.home.internal.", RecordType::A), found(&["100.71.0.1"]));
        assert_eq!(ask("50.1.168.192.in-addr.arpa.", RecordType::PTR), None, "nor is it that backwards");
    }

    #[test]
    fn a_domain_with_servers_is_asked_there_by_its_narrowest_name() {
        let sent = |server: &str| Some((ResponseCode::Refused, vec![server.to_owned()]));
        for name in ["corp.example.", "www.CORP.example.", "a.b.corp.example."] {
            assert_eq!(ask(name, RecordType::A), sent("10.0.0.53"), "{name}");
        }
        assert_eq!(ask("x.lab.corp.example.", RecordType::SRV), sent("10.9.0.53"));
        for name in ["example.", "mycorp.example.", "corp.example.org."] {
            assert_eq!(ask(name, RecordType::A), None, "{name}");
        }
    }

    #[test]
    fn a_system_resolver_is_told_what_was_typed_or_its_parents_if_that_is_too_much() {
        let mut zone = zone();
        let all = zone.routing_domains(256);
        assert!(all.contains(&"nas.lan".to_owned()) && all.contains(&"corp.example".to_owned()), "{all:?}");
        assert!(all.contains(&"10.1.168.192.in-addr.arpa".to_owned()), "{all:?}");
        assert!(!all.iter().any(|name| name.ends_with("internal") || name.ends_with("71.100.in-addr.arpa")), "{all:?}");
        for n in 0..2_000u16 {
            let [a, b] = n.to_be_bytes();
            let address = IpAddr::V4(Ipv4Addr::new(10, 1, a, b));
            zone.add_name(&format!("host-{n}.branch.example"), vec![address], &[address]);
        }
        let few = zone.routing_domains(200);
        assert!(few.len() <= 200 && few.contains(&"branch.example".to_owned()), "{few:?}");
        assert!(few.contains(&"nas.lan".to_owned()), "{few:?}");
        assert!(few.iter().any(|name| name.ends_with("1.10.in-addr.arpa")), "{few:?}");
        assert!(!few.iter().any(|name| name == "example" || name == "arpa"), "{few:?}");
    }

    #[test]
    fn zones_for_a_system_resolver() {
        let zone = zone();
        assert_eq!(zone.domain(), "home.internal");
        assert_eq!(zone.reverse_domains(), ["71.100.in-addr.arpa", "0.0.0.0.0.0.0.0.b.3.d.f.ip6.arpa"]);
    }

    #[test]
    fn answers_and_rubbish_get_no_answer_that_could_be_answered() {
        let mut answer = Message::response(7, OpCode::Query);
        answer.add_query(Query::query(Name::from_ascii("nas.home.internal.").unwrap(), RecordType::A));
        assert_eq!(zone().reply(&answer.to_vec().unwrap(), Transport::Udp), Reply::Nothing);
        assert_eq!(zone().reply(b"", Transport::Udp), Reply::Nothing);
        assert_eq!(zone().reply(&[0; 11], Transport::Udp), Reply::Nothing);
        // Two questions, no question, an update: refused by a header.
        let mut none = Message::query();
        let codes = |message: &Message| match zone().reply(&message.to_vec().unwrap(), Transport::Udp) {
            Reply::Answer(bytes) => Message::from_vec(&bytes).unwrap().metadata.response_code,
            other => panic!("{other:?}"),
        };
        assert_eq!(codes(&none), ResponseCode::FormErr);
        none.metadata.op_code = OpCode::Update;
        assert_eq!(codes(&none), ResponseCode::NotImp);
    }

    #[test]
    fn a_refusal_repeats_the_question() {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii("example.org.").unwrap(), RecordType::A));
        let Reply::Answer(bytes) = refuse(&query.to_vec().unwrap()) else { panic!("no answer") };
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!((reply.metadata.response_code, reply.queries.len()), (ResponseCode::Refused, 1));
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            for transport in [Transport::Udp, Transport::Tcp] {
                if let Reply::Answer(answer) = zone().reply(&bytes, transport) {
                    prop_assert_eq!(&answer[..2], &bytes[..2]);
                    prop_assert!(answer[2] & 0x80 != 0);
                }
            }
            let _ = (refuse(&bytes), failed(&bytes));
        }
    }
}

//! The names of the network: for those who answer questions about them, and for people.
//!
//! Members have theirs by their records. Besides, an admin can give any full name addresses, and any domain servers; each of
//! these is a record of its own, for exactly what was typed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::engine::io::{Event, Output};
use crate::engine::names::{TOP, Zone};
use crate::engine::planner::Planner;
use crate::time::UnixSeconds;
use crate::trust::founding::{dns_name_record, dns_split_record};
use crate::trust::ledger::{Addresses, is_one_machine};
use crate::trust::names::{self, dns_label, domain_name, is_below};
use crate::trust::record::{MAX_DNS_ADDRESSES, MAX_DNS_SERVERS, SignedRecord};
use crate::wire::keys::IdentityKey;
use crate::wire::local::{DnsChange, DnsKind, DnsLine, DnsList, DnsWord, Problem};
use crate::wire::version::LOCAL;

/// The most names that admins can give addresses. Further ones resolve nowhere.
const MAX_NAMES: usize = 10_000;
/// The most domains that admins can give servers.
const MAX_SPLITS: usize = 64;
/// Ends of names that nobody can register, so that giving them addresses hides nothing: RFC 6762 appendix G, RFC 8375.
const PRIVATE_ENDS: [&str; 9] =
    ["internal", "home", "lan", "corp", "private", "intranet", "localdomain", "test", "home.arpa"];

impl Planner {
    /// Names or what they resolve to have changed.
    pub(super) fn names_changed(&mut self) {
        // Once for all records that come together.
        let said = matches!(self.outputs.back(), Some(Output::Event(Event::NamesChanged)));
        if !said {
            self.outputs.push_back(Output::Event(Event::NamesChanged));
        }
    }

    /// The zone and its version, if that is not `known`. `shadowed`: prefixes that something on this machine goes before.
    #[must_use]
    pub fn zone(&self, known: Option<u64>, shadowed: &BTreeSet<IpNet>) -> Option<(u64, Zone)> {
        // Both only ever grow.
        let version = self.ledger.log().len() as u64 + self.routes.generation;
        let genesis = self.ledger.genesis().filter(|_| known != Some(version))?;
        let ranges = vec![IpNet::V4(genesis.ipv4), IpNet::V6(genesis.ipv6)];
        let members = self.ledger.members().map(|member| (member.name.as_str(), member.ipv4, member.ipv6));
        let mut zone = Zone::new(&genesis.name, ranges, members);
        for (name, target) in self.ledger.dns_names().take(MAX_NAMES) {
            let (here, back) = self.reach_all(target, shadowed);
            zone.add_name(name, here, &back);
        }
        for (domain, target) in self.ledger.dns_splits().take(MAX_SPLITS) {
            zone.add_split(domain, self.servers_here(target, shadowed));
        }
        Some((version, zone))
    }

    /// The servers of a domain as this node asks them: not itself, which would ask itself for ever.
    fn servers_here(&self, target: &Addresses, shadowed: &BTreeSet<IpNet>) -> Vec<IpAddr> {
        let me = [IpAddr::V4(self.me.ipv4), IpAddr::V6(self.me.ipv6)];
        let (mut here, _) = self.reach_all(target, shadowed);
        here.retain(|server| !me.contains(server));
        here
    }

    /// The addresses by which this node reaches these, and all that are them.
    fn reach_all(&self, target: &Addresses, shadowed: &BTreeSet<IpNet>) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let reached = target.addresses.iter().map(|address| self.reach(*address, target.at, shadowed));
        let (mut here, mut back) = (Vec::new(), Vec::new());
        for by in reached {
            here.push(by.here);
            back.push(by.here);
            back.extend(by.alias.filter(|alias| *alias != by.here));
        }
        (here, back)
    }

    /// `home.internal`.
    fn zone_name(&self) -> String {
        self.ledger.genesis().map_or_else(String::new, |genesis| format!("{}.{TOP}", genesis.name))
    }

    /// What admins gave addresses and servers.
    #[must_use]
    pub fn dns_list(&self, shadowed: &BTreeSet<IpNet>) -> DnsList {
        let names = self.ledger.dns_names().enumerate().map(|(place, (name, target))| {
            let beyond = place >= MAX_NAMES;
            let why = match self.member_called(name) {
                Some(member) => Some(format!("the node {member} goes before it")),
                None if beyond => Some(format!("only the first {MAX_NAMES} names resolve")),
                None => None,
            };
            let here = if why.is_some() { Vec::new() } else { self.reach_all(target, shadowed).0 };
            let other = why.is_none() && here != target.addresses;
            let why = why.or_else(|| other.then(|| "reached by its network's alias".to_owned()));
            self.dns_line(DnsKind::Name, name, target, here, why)
        });
        let splits = self.ledger.dns_splits().map(|(domain, target)| {
            let here = self.servers_here(target, shadowed);
            let why = here.is_empty().then(|| "this node is the server itself".to_owned());
            self.dns_line(DnsKind::Split, domain, target, here, why)
        });
        DnsList { schema: LOCAL, names: names.collect(), splits: splits.collect() }
    }

    fn dns_line(
        &self,
        kind: DnsKind,
        name: &str,
        target: &Addresses,
        here: Vec<IpAddr>,
        why: Option<String>,
    ) -> DnsLine {
        let (name, addresses) = (name.to_owned(), target.addresses.clone());
        DnsLine { kind, name, addresses, at: target.at.as_ref().map(|at| self.name_ever(at)), here, why }
    }

    fn name_ever(&self, who: &IdentityKey) -> String {
        self.ledger.member_ever(who).map_or_else(|| who.node_id().to_string(), |member| member.name.clone())
    }

    /// The member whose name in the zone this is.
    fn member_called(&self, name: &str) -> Option<&str> {
        let zone = self.zone_name();
        let label = name.strip_suffix(&zone)?.strip_suffix('.')?;
        self.ledger.by_name(label).map(|member| member.name.as_str())
    }

    /// An admin's words on names and domains: the records to publish, and what to say. All or none.
    ///
    /// # Errors
    /// The first word that cannot be, and why. With `anyway` addresses that nobody leads to are taken.
    pub fn dns_words(
        &self,
        words: &[DnsWord],
        at: Option<&str>,
        anyway: bool,
        wall: UnixSeconds,
    ) -> Result<(Vec<SignedRecord>, Vec<DnsChange>), Problem> {
        let at = at.map(|wanted| self.find_member(wanted).map(|member| member.identity)).transpose()?;
        let routed = if anyway { None } else { Some(self.granted()) };
        let (mut records, mut changes) = (Vec::new(), Vec::new());
        let mut said: BTreeSet<(DnsKind, String)> = BTreeSet::new();
        for word in words {
            let name = self.full_name(word)?;
            if !said.insert((word.kind, name.clone())) {
                return Err(problem("usage", format!("{name} is there twice"), "give it all its addresses at once"));
            }
            let mut addresses = word.addresses.clone();
            addresses.dedup();
            self.check_addresses(word.kind, &addresses, at, routed.as_deref())?;
            let (record, change) = self.dns_word(word.kind, name, addresses, at, wall)?;
            records.extend(record);
            changes.push(change);
        }
        let more = |kind| changes.iter().filter(|c: &&DnsChange| c.kind == kind && !c.replaced).count();
        let (names, splits) = (more(DnsKind::Name), more(DnsKind::Split));
        let too_many_names = names > 0 && self.ledger.dns_names().count() + names > MAX_NAMES;
        if too_many_names || (splits > 0 && self.ledger.dns_splits().count() + splits > MAX_SPLITS) {
            return Err(problem(
                "too-many-names",
                format!("a network has at most {MAX_NAMES} names with addresses and {MAX_SPLITS} domains with servers"),
                "`meshd dns list` shows what there is, `meshd dns remove NAME` takes one away",
            ));
        }
        Ok((records, changes))
    }

    fn dns_word(
        &self,
        kind: DnsKind,
        name: String,
        addresses: Vec<IpAddr>,
        at: Option<IdentityKey>,
        wall: UnixSeconds,
    ) -> Result<(Option<SignedRecord>, DnsChange), Problem> {
        let (before, said) = match kind {
            DnsKind::Name => (self.ledger.dns_name(&name), self.ledger.dns_name_said_at(&name)),
            DnsKind::Split => (self.ledger.dns_split(&name), self.ledger.dns_split_said_at(&name)),
        };
        if addresses.is_empty() && before.is_none() {
            return Err(self.no_such_name(kind, &name));
        }
        let after = (!addresses.is_empty()).then(|| Addresses { addresses: addresses.clone(), at });
        let already = before == after.as_ref();
        let public =
            kind == DnsKind::Name && !addresses.is_empty() && !PRIVATE_ENDS.iter().any(|end| is_below(&name, end));
        let change = DnsChange {
            kind,
            name: name.clone(),
            addresses: addresses.clone(),
            at: at.as_ref().map(|at| self.name_ever(at)),
            already,
            replaced: before.is_some(),
            note: public.then(|| {
                format!("{name} may be somebody's on the Internet; all nodes of this network get this address now")
            }),
        };
        if already {
            return Ok((None, change));
        }
        let when = wall.max(said.map_or(0, |at| at.saturating_add(1)));
        let (signer, network) = (self.keys.identity.signing_key(), self.ledger.network());
        let record = match kind {
            DnsKind::Name => dns_name_record(&signer, network, &name, addresses, at, when),
            DnsKind::Split => dns_split_record(&signer, network, &name, addresses, at, when),
        };
        Ok((Some(record), change))
    }

    /// The full name that a person means.
    fn full_name(&self, word: &DnsWord) -> Result<String, Problem> {
        let zone = self.zone_name();
        let typed = word.name.trim().trim_end_matches('.').to_lowercase();
        // Without a dot it is a name like a node's.
        let name = match word.kind {
            DnsKind::Name if dns_label(&typed).is_ok() => format!("{typed}.{zone}"),
            DnsKind::Name | DnsKind::Split => typed,
        };
        domain_name(&name).map_err(|why| {
            let hint = match word.kind {
                DnsKind::Name => "such as `nas.home`; without a dot it is a name like a node's".to_owned(),
                DnsKind::Split => "such as `corp.example`".to_owned(),
            };
            problem("bad-name", format!("{:?} cannot be used: {why}", word.name), hint)
        })?;
        if word.addresses.is_empty() {
            return Ok(name);
        }
        let taken = |text: String, hint: &str| Err(problem("name-taken", text, hint));
        if name == zone {
            return taken(format!("{zone} is the network itself"), "give a name in it, or another one");
        }
        match word.kind {
            DnsKind::Split if is_below(&name, &zone) => {
                taken(format!("{name} lies in {zone}, which is the network's own"), "servers are for other domains")
            }
            DnsKind::Name => match self.member_called(&name) {
                Some(member) => taken(
                    format!("{name} is the node {member}"),
                    "choose another name; nodes have their names by themselves, see `meshd status`",
                ),
                None => Ok(name),
            },
            DnsKind::Split => Ok(name),
        }
    }

    /// Every prefix that some live member may lead to, with its node.
    fn granted(&self) -> Vec<(IpNet, IdentityKey)> {
        let members = self.ledger.members().map(|member| member.identity);
        members.flat_map(|who| self.ledger.grants(&who).into_iter().map(move |prefix| (prefix, who))).collect()
    }

    /// Whether a name or a domain can have these addresses. `routed`: what [`Self::granted`] says, if that matters.
    fn check_addresses(
        &self,
        kind: DnsKind,
        addresses: &[IpAddr],
        at: Option<IdentityKey>,
        routed: Option<&[(IpNet, IdentityKey)]>,
    ) -> Result<(), Problem> {
        let (most, what) = match kind {
            DnsKind::Name => (MAX_DNS_ADDRESSES, "addresses"),
            DnsKind::Split => (MAX_DNS_SERVERS, "servers"),
        };
        if addresses.len() > most {
            let text = format!("{} {what} are too many for one name", addresses.len());
            return Err(problem("usage", text, format!("give at most {most}")));
        }
        for address in addresses {
            if !is_one_machine(*address) {
                let text = format!("{address} is not the address of another machine");
                return Err(problem("bad-address", text, "give the address under which nodes reach it"));
            }
            let Some(routed) = routed else { continue };
            let at_it = |who: &IdentityKey| at.is_none_or(|at| at == *who);
            let leads = |(prefix, who): &(IpNet, IdentityKey)| {
                prefix.prefix_len() > 0 && prefix.contains(address) && at_it(who)
            };
            if self.mesh.iter().any(|range| range.contains(address)) {
                let has =
                    |m: &crate::trust::record::Member| IpAddr::V4(m.ipv4) == *address || IpAddr::V6(m.ipv6) == *address;
                if !self.ledger.members().any(has) {
                    let text = format!("{address} lies in the mesh's own range, and no node has it");
                    return Err(problem("address-not-routed", text, "`meshd status` lists the nodes' addresses"));
                }
            } else if at.is_none()
                && let several @ [_, _, ..] = self.networks_with(*address, routed).as_slice()
            {
                let names: Vec<String> = several.iter().map(|who| self.name_ever(who)).collect();
                let text = format!("{address} is in different networks behind {}", names.join(" and "));
                return Err(problem("several-networks", text, format!("say which is meant: `--at {}`", names[0])));
            } else if (is_private(*address) || at.is_some()) && !routed.iter().any(leads) {
                let text = match &at {
                    Some(at) => format!("{} may not lead to {address}", self.name_ever(at)),
                    None => format!("no node may lead to {address}, so other nodes do not reach it"),
                };
                let hint = "on an admin node `meshd routes approve NODE CIDR` first; or add `--anyway`";
                return Err(problem("address-not-routed", text, hint));
            }
        }
        Ok(())
    }

    fn no_such_name(&self, kind: DnsKind, name: &str) -> Problem {
        let known: Vec<&str> = match kind {
            DnsKind::Name => self.ledger.dns_names().map(|(name, _)| name).collect(),
            DnsKind::Split => self.ledger.dns_splits().map(|(domain, _)| domain).collect(),
        };
        let what = match kind {
            DnsKind::Name => "was given an address",
            DnsKind::Split => "was given servers",
        };
        let hint = match names::nearest(name, known) {
            Some(near) => format!("did you mean {near}?"),
            None => "`meshd dns list` shows what there is".to_owned(),
        };
        problem("no-such-name", format!("{name} never {what}"), hint)
    }
}

/// Addresses that are somebody else's everywhere else: only a route leads to them.
fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            v4.is_private() || v4.is_link_local() || (a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

fn problem(code: &str, text: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { code: code.to_owned(), text: text.into(), hint: hint.into() }
}

#[cfg(test)]
mod tests;

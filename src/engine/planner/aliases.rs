//! Other numbers for the networks behind nodes, so that several with the same numbers are reached at once.
//!
//! A network is a node and a prefix behind it. Its alias is as long, and stands for it one to one; two nodes with one and the
//! same alias for a prefix lead to one network. Everybody routes the alias to the node, whose packet path renumbers
//! ([`crate::engine::alias`]).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::engine::alias::exchange;
use crate::engine::planner::Planner;
use crate::time::UnixSeconds;
use crate::trust::founding::route_alias_record;
use crate::trust::record::SignedRecord;
use crate::wire::keys::{Digest32, IdentityKey};
use crate::wire::local::{AliasChange, AliasWish, Problem};
use crate::wire::version::LOCAL;

/// Where aliases are taken from: addresses that no site uses for itself (RFC 6598), and that the mesh takes its own from.
const SHARED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
/// A part of it that clouds and others answer in.
const AVOIDED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 0, 0), 16);
/// The shortest prefix that an alias is found for.
const SHORTEST_IPV4: u8 = 12;
/// The same for IPv6: enough bits of the local range (RFC 4193) are left to choose from.
const SHORTEST_IPV6: u8 = 24;
/// How many places are tried.
const TRIES: u32 = 4_096;
/// The most aliases in a network.
const MAX_ALIASES: usize = 1_024;

/// How this node reaches an address behind another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reached {
    /// By this one.
    pub(super) here: IpAddr,
    /// By this one always.
    pub(super) alias: Option<IpAddr>,
}

impl Planner {
    /// By which address this node reaches one behind `at`, or behind whoever leads to it. The real one, where packets for it
    /// go to that very network; else its alias, if it has one. `shadowed`: prefixes that something on this machine goes before.
    pub(super) fn reach(&self, address: IpAddr, at: Option<IdentityKey>, shadowed: &BTreeSet<IpNet>) -> Reached {
        let holds = |who: &IdentityKey, prefix: &IpNet| {
            prefix.contains(&address) && at.is_none_or(|at| at == *who) && self.ledger.may_announce(who, prefix)
        };
        let found = self.ledger.aliases().filter(|(who, prefix, _)| holds(who, prefix));
        let mut found: Vec<(&IdentityKey, IpNet, IpNet)> = found.collect();
        let longest = found.iter().map(|(_, prefix, _)| prefix.prefix_len()).max().unwrap_or(0);
        found.retain(|(_, prefix, _)| prefix.prefix_len() == longest);
        // One without an alias may be meant as well, or one of several: then it is what it was called.
        let Some((_, prefix, alias)) = found.first().copied() else { return Reached { here: address, alias: None } };
        if found.iter().any(|(_, _, other)| *other != alias) {
            return Reached { here: address, alias: None };
        }
        let mine = found.iter().any(|(who, _, _)| **who == self.me.identity);
        let asked = self.asked_for(&prefix).and_then(|who| self.ledger.alias(&who, &prefix));
        let real = mine || (asked == Some(alias) && !shadowed.contains(&prefix));
        let alias = exchange(address, alias);
        Reached { here: if real { address } else { alias }, alias: Some(alias) }
    }

    /// The different networks that have this address, each with a node that leads there: nodes with the longest prefix, by
    /// their alias for it.
    pub(super) fn networks_with(&self, address: IpAddr, routed: &[(IpNet, IdentityKey)]) -> Vec<IdentityKey> {
        let holds = |prefix: &IpNet| prefix.prefix_len() > 0 && prefix.contains(&address);
        let longest = routed.iter().filter(|(p, _)| holds(p)).map(|(p, _)| p.prefix_len()).max();
        let mut seen: BTreeSet<Option<IpNet>> = BTreeSet::new();
        let mut networks = Vec::new();
        for (prefix, who) in routed.iter().filter(|(p, _)| holds(p) && Some(p.prefix_len()) == longest) {
            if seen.insert(self.ledger.alias(who, prefix)) {
                networks.push(*who);
            }
        }
        networks
    }

    /// An admin's word on other numbers for a prefix behind a node: the record to publish (None: it is so already), and what
    /// to say.
    ///
    /// # Errors
    /// The node is unknown or has nothing to do with the prefix, or the numbers cannot be.
    pub fn alias_word(
        &self,
        wanted: &str,
        prefix: IpNet,
        wish: AliasWish,
        wall: UnixSeconds,
    ) -> Result<(Option<SignedRecord>, AliasChange), Problem> {
        let member = self.find_member(wanted)?;
        let (who, name) = (member.identity, &member.name);
        let before = self.ledger.alias(&who, &prefix);
        let may = self.ledger.may_announce(&who, &prefix);
        if !may && before.is_none() {
            let granted: Vec<String> = self.ledger.grants(&who).iter().map(ToString::to_string).collect();
            let hint = match granted.as_slice() {
                [] => format!("`meshd routes approve {name} {prefix}` first"),
                some => format!("its approved routes are: {}", some.join(", ")),
            };
            return Err(problem("no-such-route", format!("{name} may not lead to {prefix}"), hint));
        }
        if prefix.prefix_len() == 0 {
            let text = "an exit node carries everything, which has no other numbers";
            return Err(problem("usage", text, "name one of its subnets"));
        }
        let alias = match wish {
            AliasWish::None => None,
            AliasWish::Auto => Some(before.map_or_else(|| self.free_alias(&who, &prefix), Ok)?),
            AliasWish::Block(block) => {
                self.check_alias(&who, &prefix, block)?;
                Some(block)
            }
        };
        let shared = alias.and_then(|alias| {
            let mut others = self.ledger.aliases().filter(|(other, _, block)| **other != who && *block == alias);
            let (other, _, _) = others.next()?;
            Some(format!("{} has the same alias: both lead to one network", self.ledger.member(other)?.name))
        });
        let change = AliasChange {
            schema: LOCAL,
            prefix,
            node: name.clone(),
            id: who.node_id().to_string(),
            alias,
            already: before == alias,
            note: shared,
        };
        if before == alias {
            return Ok((None, change));
        }
        if before.is_none() && self.ledger.aliases().count() >= MAX_ALIASES {
            let text = format!("a network has at most {MAX_ALIASES} aliases");
            return Err(problem(
                "too-many-aliases",
                text,
                "`meshd routes` shows them, `meshd routes alias NODE CIDR none` ends one",
            ));
        }
        let said = self.ledger.alias_said_at(&who, &prefix);
        let when = wall.max(said.map_or(0, |at| at.saturating_add(1)));
        let record =
            route_alias_record(&self.keys.identity.signing_key(), self.ledger.network(), who, prefix, alias, when);
        Ok((Some(record), change))
    }

    fn check_alias(&self, who: &IdentityKey, prefix: &IpNet, block: IpNet) -> Result<(), Problem> {
        let same = block.prefix_len() == prefix.prefix_len() && block.addr().is_ipv4() == prefix.addr().is_ipv4();
        if !same {
            let text = format!("{block} cannot stand for {prefix}: it is not of the same size");
            return Err(problem("bad-alias", text, format!("give a /{}, or `auto`", prefix.prefix_len())));
        }
        self.check_prefix(&block)?;
        match self.used(who, prefix).find(|(net, _)| overlap(net, &block)) {
            None => Ok(()),
            // The same numbers for the same prefix: another router of that network.
            Some((net, by)) if net == block && self.ledger.aliases().any(|(_, p, a)| p == *prefix && a == block) => {
                tracing::debug!(%net, by, "an alias is shared");
                Ok(())
            }
            Some((net, by)) => {
                let text = format!("{block} overlaps {net}, which is {by}");
                Err(problem("alias-taken", text, "choose other numbers, or `auto`"))
            }
        }
    }

    /// Everything that has numbers, but for the alias of this prefix, and what it is.
    fn used<'a>(&'a self, who: &'a IdentityKey, prefix: &'a IpNet) -> impl Iterator<Item = (IpNet, String)> + 'a {
        let name = |who: &IdentityKey| self.ledger.member(who).map_or_else(String::new, |m| m.name.clone());
        let others = self.ledger.aliases().filter(move |(other, p, _)| (*other, *p) != (who, *prefix));
        let aliases = others.map(move |(other, p, alias)| (alias, format!("the alias of {p} behind {}", name(other))));
        let members = self.ledger.members();
        let granted = members.flat_map(|m| self.ledger.grants(&m.identity).into_iter().map(move |p| (p, &m.name)));
        let real = granted.filter(|(p, _)| p.prefix_len() > 0).map(|(p, name)| (p, format!("a network behind {name}")));
        aliases.chain(real)
    }

    /// Numbers that nothing has, the same at each try.
    fn free_alias(&self, who: &IdentityKey, prefix: &IpNet) -> Result<IpNet, Problem> {
        let used: Vec<IpNet> = self.used(who, prefix).map(|(net, _)| net).chain(self.mesh.iter().copied()).collect();
        let digest = Digest32::of(&[b"meshd alias v1", who.as_bytes(), prefix.to_string().as_bytes()]);
        let (a, b) =
            (digest.0.first_chunk().copied().unwrap_or_default(), digest.0.last_chunk().copied().unwrap_or_default());
        let (start, wide) = (u32::from_be_bytes(a), u128::from_be_bytes(b));
        for n in 0..TRIES {
            let candidate = match prefix {
                IpNet::V4(p) if p.prefix_len() >= SHORTEST_IPV4 => {
                    let free_bits = u32::from(p.prefix_len() - SHARED.prefix_len());
                    let number = start.wrapping_add(n) & (u32::MAX >> (32 - free_bits));
                    let shifted = number.checked_shl(32 - u32::from(p.prefix_len())).unwrap_or(0);
                    let first = Ipv4Addr::from(u32::from(SHARED.addr()) | shifted);
                    IpNet::V4(Ipv4Net::new_assert(first, p.prefix_len()))
                }
                IpNet::V6(p) if p.prefix_len() >= SHORTEST_IPV6 => {
                    let host = wide.wrapping_add(u128::from(n) << (128 - u32::from(p.prefix_len())));
                    let first = Ipv6Addr::from(0xfd_u128 << 120 | host & (u128::MAX >> 8));
                    IpNet::V6(Ipv6Net::new_assert(first, p.prefix_len()).trunc())
                }
                _ => break,
            };
            let avoided = overlap(&candidate, &IpNet::V4(AVOIDED));
            if !avoided && !used.iter().any(|net| overlap(net, &candidate)) {
                return Ok(candidate);
            }
        }
        let text = format!("no free numbers were found for {prefix}");
        Err(problem("no-free-alias", text, "give some yourself: `meshd routes alias NODE CIDR BLOCK`"))
    }
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn problem(code: &str, text: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { code: code.to_owned(), text: text.into(), hint: hint.into() }
}

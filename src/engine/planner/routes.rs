//! Which node leads to which prefix: what members advertise, what admins granted, and who is asked of several.
//!
//! A prefix counts when its node has signed that it leads there and an admin has signed that it may. Of several nodes that
//! lead to one prefix one is asked; it stays so while it is good, because flows would break. The longest prefix decides
//! before that, packet by packet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::engine::alias::RealFlows;
use crate::engine::drops::Drop;
use crate::engine::io::{OtherRouter, Output, PeerId, RoutePlan, RouteWish, Update};
use crate::engine::peer::Peer;
use crate::engine::place::Overlap;
use crate::engine::planner::sessions::IN_USE_COMMAND;
use crate::engine::planner::{Planner, Why};
use crate::time::{Now, UnixSeconds};
use crate::trust::advert::{ADVERT_VERSION, Advert, MAX_LAN, MAX_ROUTES, SignedAdvert};
use crate::trust::founding::{route_grant_record, route_revoke_record};
use crate::trust::record::{Member, SignedRecord};
use crate::wire::control::{ToCoordinator, refusal};
use crate::wire::keys::{IdentityKey, WgKey};
use crate::wire::local::{DrainedRoute, Problem, RouteChange, RouteLine, RoutePlace, RouteState};

/// Wider prefixes are ways of saying "everything", which is an exit node's business.
const SHORTEST_IPV4: u8 = 8;
/// The same for IPv6.
const SHORTEST_IPV6: u8 = 16;
/// A router that the coordinator misses is still there if it was heard of this recently.
const HEARD_LATELY: Duration = Duration::from_millis(1_500);
/// A router takes over from one that is as good but farther away if this much is gained, and a third of the way.
const WORTH_CHANGING: Duration = Duration::from_millis(20);
/// Routers of a network in use are looked at for that so long after the use began, and from then on so often.
const COMPARED_AFTER: Duration = Duration::from_secs(2);
const COMPARED_EVERY: Duration = Duration::from_secs(60);
/// So many of them at most.
const MOST_COMPARED: usize = 4;
/// After the coordinator refused an advertisement for coming too soon.
const ADVERTISE_AGAIN: Duration = Duration::from_secs(2);

/// What is known of routes.
#[derive(Debug)]
pub(super) struct RouteBook {
    wish: RouteWish,
    /// What cannot be reached from this node, and where it answers on what it leads to.
    cut: BTreeSet<IpNet>,
    lan: Vec<SocketAddr>,
    /// The newest advertisement of each member, our own among them.
    adverts: BTreeMap<IdentityKey, Heard>,
    /// Who is asked for a prefix now.
    chosen: BTreeMap<IpNet, PeerId>,
    /// What the workers were told besides the peers' own addresses: what goes to a peer, and what may come from it.
    told: BTreeMap<PeerId, Prefixes>,
    /// What the workers were told that this node leads to.
    serving: Vec<IpNet>,
    /// What the workers were told of other numbers for these.
    renumbered: Vec<(IpNet, IpNet)>,
    flows: Arc<RealFlows>,
    /// Counts changes of who is asked for what.
    pub(super) generation: u64,
    /// What the shell was told.
    plan: Option<RoutePlan>,
    /// Records have come that may change it.
    stale: bool,
    /// The number of the request that carried our advertisement last.
    said: Option<u64>,
    /// The coordinator does not know advertisements.
    pub(super) unknown_since: Option<Now>,
}

#[derive(Debug)]
struct Heard {
    advert: Advert,
    signed: SignedAdvert,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Prefixes {
    to: Vec<IpNet>,
    from: Vec<IpNet>,
    keep: Vec<IpNet>,
}

/// A node that leads to a prefix.
#[derive(Debug, Clone, Copy)]
struct Router {
    id: PeerId,
    standing: Standing,
    /// Other numbers for the prefix there.
    alias: Option<IpNet>,
}

/// How far a router stands by a prefix that it is set up for. The better comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It leads there.
    Serves,
    /// It leads there, and wants to be left: what is under way stays.
    Drains,
    /// It cannot reach it.
    Rests,
}

impl Standing {
    fn of(advert: &Advert, prefix: &IpNet) -> Self {
        match (advert.routes.contains(prefix), advert.draining.contains(prefix)) {
            (true, _) => Self::Serves,
            (false, true) => Self::Drains,
            (false, false) => Self::Rests,
        }
    }
}

impl RouteBook {
    pub(super) fn new(wish: RouteWish) -> Self {
        Self {
            wish,
            cut: BTreeSet::new(),
            lan: Vec::new(),
            adverts: BTreeMap::new(),
            chosen: BTreeMap::new(),
            told: BTreeMap::new(),
            serving: Vec::new(),
            renumbered: Vec::new(),
            flows: Arc::default(),
            generation: 0,
            plan: None,
            stale: false,
            said: None,
            unknown_since: None,
        }
    }
}

impl Planner {
    // ---- our own advertisement -------------------------------------------------------------------------------------

    /// The node was set up otherwise.
    pub(super) fn route_wish(&mut self, wish: RouteWish) {
        if wish.relay != self.routes.wish.relay {
            self.update(Update::Relaying(wish.relay));
        }
        self.routes.wish = wish;
        self.renew_advert();
        self.routes_changed();
    }

    /// The shell looked behind this node.
    pub(super) fn found_cut(&mut self, prefixes: BTreeSet<IpNet>) {
        self.routes.cut = prefixes;
        self.renew_advert();
        self.routes_changed();
    }

    /// The shell answers there who is on the same network.
    pub(super) fn answers_at(&mut self, lan: Vec<SocketAddr>) {
        self.routes.lan = lan;
        self.renew_advert();
        self.routes_changed();
    }

    /// Advertisements of earlier runs.
    pub(super) fn remember_adverts(&mut self, adverts: Vec<SignedAdvert>) {
        for signed in adverts {
            self.take_advert(signed);
        }
        if let Some(rate) = self.routes.wish.relay {
            self.update(Update::Relaying(Some(rate)));
        }
        self.renew_advert();
        self.routes_changed();
    }

    /// Members that relay for others.
    pub(super) fn volunteering(&self) -> Vec<PeerId> {
        let volunteers = self.routes.adverts.iter().filter(|(_, heard)| heard.advert.relay);
        volunteers.filter_map(|(identity, _)| self.by_identity.get(identity).copied()).collect()
    }

    /// Signs a new advertisement if what this node leads to is not what it said last.
    fn renew_advert(&mut self) {
        let me = self.me.identity;
        let wanted: BTreeSet<IpNet> = self.routes.wish.advertise.iter().take(MAX_ROUTES).copied().collect();
        let (cut, reached): (Vec<IpNet>, Vec<IpNet>) =
            wanted.iter().copied().partition(|prefix| self.routes.cut.contains(prefix));
        let (routes, resting, draining) = match self.routes.wish.draining {
            false => (reached, cut, Vec::new()),
            true => (Vec::new(), wanted.into_iter().collect(), reached),
        };
        let mut lan = self.routes.lan.clone();
        lan.truncate(MAX_LAN);
        if routes.is_empty() && resting.is_empty() {
            lan.clear();
        }
        let relay = self.routes.wish.relay.is_some();
        let same = match self.routes.adverts.get(&me) {
            Some(Heard { advert: said, .. }) => {
                said.relay == relay
                    && (&said.routes, &said.resting, &said.draining, &said.lan) == (&routes, &resting, &draining, &lan)
            }
            None => routes.is_empty() && resting.is_empty() && !relay,
        };
        if same {
            return;
        }
        let number = self.next_number;
        self.next_number += 1;
        let network = self.ledger.network();
        let advert = Advert { v: ADVERT_VERSION, network, identity: me, number, routes, resting, draining, lan, relay };
        let signed = SignedAdvert::sign(&advert, &self.keys.identity.signing_key());
        self.keep_advert(advert, signed);
        self.advertise();
        self.holdings_changed();
    }

    /// Tells the coordinator what this node leads to, if it leads anywhere or did.
    pub(super) fn advertise(&mut self) {
        self.timers.set(Why::Advertise, None);
        let Some(own) = self.routes.adverts.get(&self.me.identity) else { return };
        if self.control.connected {
            let advert = own.signed.clone();
            let re = self.request_number();
            self.routes.said = Some(re);
            self.routes.unknown_since = None;
            self.say(ToCoordinator::Advertise { re, advert });
        }
    }

    /// The number of a member's newest advertisement; 0: none is known.
    pub(super) fn advert_number(&self, of: &IdentityKey) -> u64 {
        self.routes.adverts.get(of).map_or(0, |heard| heard.advert.number)
    }

    /// This node's own newest advertisement.
    pub(super) fn own_advert(&self) -> Option<SignedAdvert> {
        self.routes.adverts.get(&self.me.identity).map(|heard| heard.signed.clone())
    }

    /// The coordinator refused a request; true: it was our advertisement.
    pub(super) fn advertising_refused(&mut self, re: u64, problem: &Problem) -> bool {
        if self.routes.said != Some(re) {
            return false;
        }
        match problem.code.as_str() {
            refusal::RATE_LIMITED => self.timers.set(Why::Advertise, Some(self.now + ADVERTISE_AGAIN)),
            refusal::UNKNOWN_MESSAGE => {
                self.routes.unknown_since.get_or_insert(self.now);
            }
            _ => tracing::warn!(code = problem.code, "the coordinator refused this node's routes: {}", problem.text),
        }
        true
    }

    // ---- what others say -------------------------------------------------------------------------------------------

    /// The coordinator hands advertisements on.
    pub(super) fn heard_adverts(&mut self, adverts: &[SignedAdvert]) {
        let mut changed = false;
        for signed in adverts {
            changed |= self.take_advert(signed.clone());
        }
        if changed {
            self.renew_advert();
            self.routes_changed();
            self.volunteers_changed();
        }
    }

    /// Judges an advertisement. True: it is new.
    fn take_advert(&mut self, signed: SignedAdvert) -> bool {
        let opened = signed.open(&self.ledger.network());
        let Ok(advert) = opened.inspect_err(|why| tracing::debug!(%why, "refused an advertisement")) else {
            self.drops.count(Drop::RefusedRecord);
            return false;
        };
        if self.ledger.member(&advert.identity).is_none() {
            self.drops.count(Drop::RefusedRecord);
            return false;
        }
        if self.routes.adverts.get(&advert.identity).is_some_and(|known| known.advert.number >= advert.number) {
            return false;
        }
        if advert.identity == self.me.identity {
            // Ours, from before this state directory was restored: what we say next must be newer.
            self.next_number = self.next_number.max(advert.number.saturating_add(1));
        }
        self.keep_advert(advert, signed);
        true
    }

    fn keep_advert(&mut self, advert: Advert, signed: SignedAdvert) {
        let of = advert.identity;
        self.outputs.push_back(Output::KeepAdvert { of, advert: Some(signed.clone()) });
        self.routes.adverts.insert(of, Heard { advert, signed });
    }

    /// A member is out.
    pub(super) fn router_gone(&mut self, identity: &IdentityKey, id: PeerId) {
        self.routes.told.remove(&id);
        if self.routes.adverts.remove(identity).is_some() {
            self.outputs.push_back(Output::KeepAdvert { of: *identity, advert: None });
            self.routes_changed();
        }
    }

    pub(super) fn is_router(&self, key: &WgKey) -> bool {
        let peer = self.by_wg.get(key).and_then(|id| self.peer(*id));
        peer.is_some_and(|peer| self.routes.adverts.contains_key(&peer.identity))
    }

    pub(super) fn presence_of_routers_changed(&mut self, changed: bool) {
        if changed && !self.routes.adverts.is_empty() {
            self.routes_changed();
        }
    }

    // ---- who is asked ----------------------------------------------------------------------------------------------

    /// To be decided anew, when all records that came together are read.
    pub(super) const fn routes_are_stale(&mut self) {
        self.routes.stale = true;
    }

    pub(super) fn freshen_routes(&mut self) {
        if self.routes.stale {
            self.routes_changed();
        }
    }

    /// Decides anew which node is asked for which prefix, and tells workers and shell what changed.
    pub(super) fn routes_changed(&mut self) {
        self.routes.stale = false;
        let routers = self.routers();
        let mut chosen = BTreeMap::new();
        let mut told: BTreeMap<PeerId, Prefixes> = BTreeMap::new();
        let mut several = false;
        for (prefix, routers) in &routers {
            let Some(id) = self.choose(prefix, routers) else { continue };
            chosen.insert(*prefix, id);
            told.entry(id).or_default().to.push(*prefix);
            let shared = routers.len() > 1 && prefix.prefix_len() > 0;
            several |= shared;
            for router in routers {
                let told = told.entry(router.id).or_default();
                told.from.push(*prefix);
                if shared && router.standing < Standing::Rests && self.is_there(router.id) {
                    told.keep.push(*prefix);
                }
            }
        }
        // One that is missed but still heard of may fall silent any moment.
        let in_doubt = |id: &PeerId| self.peer(*id).is_some_and(|peer| !peer.online && self.is_heard(peer));
        let doubt = self.control.connected && chosen.values().any(in_doubt);
        let used = |id: &PeerId| self.peer(*id).and_then(|p| p.talk.as_deref()).is_some_and(|t| t.is_wanted(self.now));
        let compare = several && chosen.values().any(used);
        let next = if doubt { Some(HEARD_LATELY) } else { compare.then_some(COMPARED_EVERY) };
        self.timers.set(Why::Routers, next.map(|time| self.now + time));
        if self.routes.chosen != chosen {
            self.routes.generation += 1;
            if self.ledger.aliases().next().is_some() {
                self.names_changed();
            }
        }
        self.routes.chosen = chosen;
        self.tell_workers(told);
        self.tell_shell(routers.into_keys());
    }

    /// Every usable prefix with the nodes that lead to it.
    fn routers(&self) -> BTreeMap<IpNet, Vec<Router>> {
        let mut routers: BTreeMap<IpNet, Vec<Router>> = BTreeMap::new();
        for (identity, heard) in &self.routes.adverts {
            let Some(id) = self.by_identity.get(identity).copied() else { continue };
            let advert = &heard.advert;
            for prefix in advert.prefixes() {
                if !self.ledger.may_announce(identity, prefix) {
                    continue;
                }
                let (standing, alias) = (Standing::of(advert, prefix), self.ledger.alias(identity, prefix));
                if self.is_wanted_from(identity, prefix) {
                    routers.entry(*prefix).or_default().push(Router { id, standing, alias });
                }
                // Led to always, also where the prefix itself is, or is this node's own.
                if let Some(alias) = alias.filter(|alias| self.is_wanted_from(identity, alias)) {
                    routers.entry(alias).or_default().push(Router { id, standing, alias: None });
                }
            }
        }
        for routers in routers.values_mut() {
            one_network(routers);
        }
        routers.retain(|_, routers| !routers.is_empty());
        routers
    }

    /// Whether this node would use a prefix of that member at all.
    fn is_wanted_from(&self, identity: &IdentityKey, prefix: &IpNet) -> bool {
        if prefix.prefix_len() == 0 {
            return self.routes.wish.exit_node == Some(*identity);
        }
        let shortest = if matches!(prefix, IpNet::V4(_)) { SHORTEST_IPV4 } else { SHORTEST_IPV6 };
        self.routes.wish.accept && prefix.prefix_len() >= shortest && !self.routes.wish.advertise.contains(prefix)
    }

    /// Of several routers: one that is connected rather than not, that serves rather than drains or rests; then the one asked
    /// so far unless another is much nearer; then the nearest, then the first.
    fn choose(&self, prefix: &IpNet, routers: &[Router]) -> Option<PeerId> {
        let health = |r: &Router| (!self.is_there(r.id), r.standing);
        let best = routers.iter().map(health).min()?;
        let good = || routers.iter().filter(|r| health(r) == best).map(|r| r.id);
        let nearest = good().min_by_key(|id| (self.distance(*id).unwrap_or(Duration::MAX), *id))?;
        let Some(asked) = self.routes.chosen.get(prefix).copied().filter(|asked| good().any(|id| id == *asked)) else {
            return Some(nearest);
        };
        let gains = match (self.distance(asked), self.distance(nearest)) {
            (Some(now), Some(then)) => now >= then + WORTH_CHANGING && now * 2 >= then * 3,
            _ => false,
        };
        Some(if gains { nearest } else { asked })
    }

    /// A peer came into use: if it leads to networks that others lead to as well, how far those are is found out.
    pub(super) fn compare_routers(&mut self, id: PeerId) {
        let prefixes = self.routes.told.get(&id).filter(|told| !told.to.is_empty()).map(|told| told.keep.clone());
        let prefixes = prefixes.unwrap_or_default();
        let shares = |told: &Prefixes| told.keep.iter().any(|prefix| prefixes.binary_search(prefix).is_ok());
        let others = self.routes.told.iter().filter(|(other, told)| **other != id && shares(told));
        let others: Vec<PeerId> = others.map(|(other, _)| *other).take(MOST_COMPARED).collect();
        if others.is_empty() {
            return;
        }
        for other in others {
            self.want(other, IN_USE_COMMAND);
        }
        self.timers.set(Why::Routers, Some(self.now + COMPARED_AFTER));
    }

    /// The node that is asked for a prefix now.
    pub(super) fn asked_for(&self, prefix: &IpNet) -> Option<IdentityKey> {
        let id = self.routes.chosen.get(prefix)?;
        self.peer(*id).map(|peer| peer.identity)
    }

    /// As far as is known. Without the coordinator nothing is known against anybody.
    fn is_there(&self, id: PeerId) -> bool {
        !self.control.connected || self.peer(id).is_some_and(|peer| peer.online || self.is_heard(peer))
    }

    fn is_heard(&self, peer: &Peer) -> bool {
        let stamps = peer.stamps();
        let heard = stamps.last_rx_direct.max(stamps.last_rx_relay);
        heard.is_some_and(|at| self.now.since(at) < HEARD_LATELY)
    }

    pub(super) fn distance(&self, id: PeerId) -> Option<Duration> {
        let talk = self.peer(id)?.talk.as_deref()?;
        talk.agent.direct().map(|(_, _, rtt)| rtt).or(talk.agent.relay_rtt)
    }

    fn tell_workers(&mut self, told: BTreeMap<PeerId, Prefixes>) {
        let nothing = Prefixes::default();
        let mut changed: Vec<PeerId> = Vec::new();
        for id in told.keys().chain(self.routes.told.keys().filter(|id| !told.contains_key(id))) {
            if told.get(id).unwrap_or(&nothing) != self.routes.told.get(id).unwrap_or(&nothing) {
                changed.push(*id);
            }
        }
        // Who is given a prefix is told before the one it is taken from, so that it is never nobody's in between.
        let gains = |id: &PeerId| {
            let before = self.routes.told.get(id).map_or(&[][..], |p| &p.to);
            // Both are in order.
            told.get(id).is_some_and(|p| p.to.iter().any(|prefix| before.binary_search(prefix).is_err()))
        };
        changed.sort_by_cached_key(|id| !gains(id));
        for id in changed {
            let Some(peer) = self.peer(id) else { continue };
            let Prefixes { to, from, keep } = told.get(&id).cloned().unwrap_or_default();
            let (key, traffic) = (peer.wg, Arc::clone(&peer.traffic));
            let own = self.prefixes_of(&peer.identity);
            let owns = own.iter().copied().chain(to).collect();
            let admits = own.into_iter().chain(from).collect();
            self.update(Update::Peer { peer: id, key, owns, admits, keeps: keep, traffic });
        }
        self.routes.told = told;
        let serving = self.served();
        let me = self.me.identity;
        let pair = |prefix: &IpNet| Some((*prefix, self.ledger.alias(&me, prefix)?));
        let pairs: Vec<(IpNet, IpNet)> = serving.iter().filter_map(pair).collect();
        if pairs != self.routes.renumbered {
            self.routes.renumbered.clone_from(&pairs);
            let flows = Arc::clone(&self.routes.flows);
            self.update(Update::Aliases { pairs, flows });
        }
        if serving != self.routes.serving {
            self.routes.serving.clone_from(&serving);
            self.update(Update::Serves(serving));
        }
    }

    /// What this node leads to: advertised by itself and granted by an admin.
    fn served(&self) -> Vec<IpNet> {
        let me = self.me.identity;
        let Some(own) = self.routes.adverts.get(&me) else { return Vec::new() };
        own.advert.prefixes().filter(|prefix| self.ledger.may_announce(&me, prefix)).copied().collect()
    }

    fn tell_shell(&mut self, usable: impl Iterator<Item = IpNet>) {
        let mut accepted: BTreeSet<IpNet> = usable.collect();
        if self.routes.wish.exit_node.is_some() {
            // Whether the exit node can be reached or not, and by which family: otherwise traffic would leave beside it.
            accepted.extend([IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())]);
        }
        let serving = self.routes.serving.clone();
        let others = self.other_routers(&accepted, &serving);
        let plan = RoutePlan { accepted: accepted.into_iter().collect(), serving, others };
        if self.routes.plan.as_ref() != Some(&plan) {
            self.routes.plan = Some(plan.clone());
            self.outputs.push_back(Output::Routes(plan));
        }
    }

    /// Who else leads to these prefixes.
    fn other_routers(&self, accepted: &BTreeSet<IpNet>, serving: &[IpNet]) -> BTreeMap<IpNet, Vec<Arc<OtherRouter>>> {
        let mut others: BTreeMap<IpNet, Vec<Arc<OtherRouter>>> = BTreeMap::new();
        for (who, Heard { advert, .. }) in &self.routes.adverts {
            let Some(member) = self.ledger.member(who).filter(|_| *who != self.me.identity) else { continue };
            let other = OtherRouter { identity: *who, name: member.name.clone(), lan: advert.lan.clone() };
            let other = Arc::new(other);
            // An accepted prefix is of interest only where its routers can be asked for.
            let concerns = |p: &&IpNet| (!advert.lan.is_empty() && accepted.contains(p)) || serving.contains(p);
            let prefixes = advert.prefixes().filter(|p| p.prefix_len() > 0).filter(concerns);
            for prefix in prefixes.filter(|prefix| self.ledger.may_announce(who, prefix)) {
                // One that leads to another network with the same numbers is no other router of this one.
                let meant = if serving.contains(prefix) { Some(self.me.identity) } else { self.asked_for(prefix) };
                let alias = |who: &IdentityKey| self.ledger.alias(who, prefix);
                if meant.is_none_or(|meant| alias(&meant) != alias(who)) {
                    continue;
                }
                others.entry(*prefix).or_default().push(Arc::clone(&other));
            }
        }
        others
    }

    // ---- for people ------------------------------------------------------------------------------------------------

    /// The prefixes that a member leads to, as far as an admin allows.
    pub(super) fn routes_of(&self, identity: &IdentityKey) -> Vec<IpNet> {
        let Some(heard) = self.routes.adverts.get(identity) else { return Vec::new() };
        heard.advert.prefixes().filter(|prefix| self.ledger.may_announce(identity, prefix)).copied().collect()
    }

    /// Every prefix that a member advertises or may, with what becomes of it here. `shadowed`: those that something on this
    /// machine goes before, and what.
    #[must_use]
    pub fn route_lines(&self, shadowed: &BTreeMap<IpNet, Overlap>) -> Vec<RouteLine> {
        let mut lines = Vec::new();
        for member in self.ledger.members() {
            let heard = self.routes.adverts.get(&member.identity);
            let mut prefixes: BTreeSet<IpNet> = self.ledger.grants(&member.identity).into_iter().collect();
            prefixes.extend(heard.iter().flat_map(|heard| heard.advert.prefixes()));
            lines.extend(prefixes.into_iter().map(|prefix| self.route_line(member, prefix, shadowed)));
        }
        lines.sort_by(|a, b| a.prefix.cmp(&b.prefix).then_with(|| a.node.cmp(&b.node)));
        lines
    }

    fn route_line(&self, member: &Member, prefix: IpNet, shadowed: &BTreeMap<IpNet, Overlap>) -> RouteLine {
        let (state, why) = self.route_state(member, &prefix, shadowed);
        let via = self.routes.chosen.get(&prefix).map(|id| self.name_of(*id));
        RouteLine {
            prefix,
            node: member.name.clone(),
            id: member.identity.node_id().to_string(),
            state,
            via: via.filter(|_| !shadowed.contains_key(&prefix)),
            place: shadowed.get(&prefix).and_then(|overlap| overlap.place).filter(|_| state == RouteState::Shadowed),
            why,
            alias: self.ledger.alias(&member.identity, &prefix),
        }
    }

    fn route_state(
        &self,
        member: &Member,
        prefix: &IpNet,
        shadowed: &BTreeMap<IpNet, Overlap>,
    ) -> (RouteState, Option<String>) {
        let (who, name) = (&member.identity, &member.name);
        let advert = self.routes.adverts.get(who).map(|heard| &heard.advert);
        let standing = advert.filter(|a| a.prefixes().any(|p| p == prefix)).map(|a| Standing::of(a, prefix));
        let approved = |why: String| (RouteState::Approved, Some(why));
        let mine = *who == self.me.identity;
        if !self.ledger.may_announce(who, prefix) {
            let why = format!("no admin has approved it: `meshd routes approve {name} {prefix}`");
            return (RouteState::Pending, Some(why));
        }
        let less = match standing {
            None => return approved(format!("{name} does not advertise it")),
            Some(Standing::Serves) => None,
            Some(Standing::Drains) if mine => Some("this node is drained; `meshd drain off` ends that".to_owned()),
            Some(Standing::Drains) => Some(format!("{name} is drained, so only what was under way goes through it")),
            Some(Standing::Rests) => Some(format!("{name} cannot reach it at the moment")),
        };
        if mine {
            return (if less.is_none() { RouteState::Active } else { RouteState::Approved }, less);
        }
        if prefix.prefix_len() == 0 && self.routes.wish.exit_node != Some(*who) {
            return approved(format!("`meshd set --exit-node {name}` uses it"));
        }
        if !self.is_wanted_from(who, prefix) {
            return approved(match self.routes.wish.advertise.contains(prefix) {
                true => "this node leads there itself".to_owned(),
                false if self.routes.wish.accept => {
                    "it is too wide for a route; an exit node takes everything".to_owned()
                }
                false => "this node does not accept routes (--accept-routes=false)".to_owned(),
            });
        }
        let alias = self.ledger.alias(who, prefix);
        let instead = || alias.map_or_else(String::new, |alias| format!("; {name}'s network is reached as {alias}"));
        if let Some(Overlap { by, place, .. }) = shadowed.get(prefix) {
            let why = match place {
                Some(RoutePlace::Home) => format!("{by}, and {name} is there too: it is reached directly"),
                Some(RoutePlace::Away) => format!("{by}, another network with the same numbers{}", instead()),
                Some(RoutePlace::Unknown) | None => format!("{by}{}", instead()),
            };
            return (RouteState::Shadowed, Some(why));
        }
        match self.routes.chosen.get(prefix) {
            Some(id) if self.by_identity.get(who) == Some(id) => {
                let nobody = |less: String| format!("{less}; nobody else leads there");
                let away = (!self.is_there(*id)).then(|| format!("{name} is offline"));
                (RouteState::Active, away.or(less.map(nobody)))
            }
            Some(id) => approved(match (less, alias) {
                (Some(less), _) => format!("{less}{}", instead()),
                (None, Some(_)) => format!("{} is asked for it{}", self.name_of(*id), instead()),
                (None, None) => format!(
                    "{} is asked for it; if these are two networks with the same numbers: `meshd routes alias {name} {prefix}`",
                    self.name_of(*id)
                ),
            }),
            None if alias.is_some() => approved(format!("several networks have these numbers{}", instead())),
            None => (RouteState::Approved, None),
        }
    }

    /// What this node leads to, and who else can be asked for it now.
    #[must_use]
    pub fn shared_routes(&self) -> Vec<DrainedRoute> {
        let others = |prefix: &IpNet| {
            let serves = |who: &IdentityKey, advert: &Advert| {
                let there = self.by_identity.get(who).is_some_and(|id| self.is_there(*id));
                there && advert.routes.contains(prefix) && self.ledger.may_announce(who, prefix)
            };
            let adverts = self.routes.adverts.iter().filter(|(who, heard)| serves(who, &heard.advert));
            let members = adverts.filter_map(|(who, _)| self.ledger.member(who));
            members.filter(|member| member.identity != self.me.identity).map(|member| member.name.clone()).collect()
        };
        self.routes.serving.iter().map(|prefix| DrainedRoute { prefix: *prefix, others: others(prefix) }).collect()
    }

    /// What waits for an admin, a sentence and the command each: this node's own prefixes, and on an admin everybody's.
    #[must_use]
    pub fn pending_routes(&self) -> Vec<(String, String)> {
        let admin = self.ledger.is_admin(&self.me.identity);
        let mut waiting = Vec::new();
        for (who, heard) in &self.routes.adverts {
            let mine = *who == self.me.identity;
            let Some(member) = self.ledger.member(who).filter(|_| mine || admin) else { continue };
            for prefix in heard.advert.prefixes().filter(|prefix| !self.ledger.may_announce(who, prefix)) {
                let name = &member.name;
                let text = format!("{name} advertises {prefix}, and no admin has approved it");
                let place = if admin { "" } else { "on an admin node: " };
                waiting.push((text, format!("{place}`meshd routes approve {name} {prefix}`")));
            }
        }
        waiting
    }

    /// An admin's word on a node and a prefix: the record to publish (None: it is so already), and what to say.
    ///
    /// # Errors
    /// The node is unknown, or the prefix cannot be a route.
    pub fn route_word(
        &self,
        wanted: &str,
        prefix: IpNet,
        allow: bool,
        wall: UnixSeconds,
    ) -> Result<(Option<SignedRecord>, RouteChange), Problem> {
        let member = self.find_member(wanted)?;
        let who = member.identity;
        if allow {
            self.check_prefix(&prefix)?;
        }
        let heard = self.routes.adverts.get(&who);
        let advertised: Vec<&IpNet> = heard.iter().flat_map(|heard| heard.advert.prefixes()).collect();
        let was = self.ledger.may_announce(&who, &prefix);
        if !allow && !was && self.ledger.route_said_at(&who, &prefix).is_none() {
            let granted: Vec<String> = self.ledger.grants(&who).iter().map(ToString::to_string).collect();
            return Err(Problem {
                code: "no-such-route".into(),
                text: format!("{} was never allowed to lead to {prefix}", member.name),
                hint: match granted.as_slice() {
                    [] => format!("{} has no approved routes; see `meshd routes`", member.name),
                    some => format!("its approved routes are: {}", some.join(", ")),
                },
            });
        }
        let note = (allow && !advertised.contains(&&prefix)).then(|| {
            let list: Vec<String> = advertised.iter().map(ToString::to_string).collect();
            let now = if list.is_empty() { "nothing".to_owned() } else { list.join(", ") };
            format!(
                "{} does not advertise {prefix} yet (but {now}); on it: `meshd up --advertise-routes …`",
                member.name
            )
        });
        let change = RouteChange {
            schema: crate::wire::version::LOCAL,
            prefix,
            node: member.name.clone(),
            id: who.node_id().to_string(),
            approved: allow,
            already: was == allow,
            note,
        };
        if was == allow {
            return Ok((None, change));
        }
        let said = self.ledger.route_said_at(&who, &prefix);
        let (signer, network) = (self.keys.identity.signing_key(), self.ledger.network());
        let record = if allow {
            let after = said.map_or(0, |at| at.saturating_add(1));
            route_grant_record(&signer, network, who, prefix, wall.max(after))
        } else {
            route_revoke_record(&signer, network, who, prefix, wall.max(said.unwrap_or(0)))
        };
        Ok((Some(record), change))
    }

    /// The node that a person wants all traffic to go through.
    ///
    /// # Errors
    /// It is unknown, is this one, or does not offer that, or no admin allows it.
    pub fn find_exit_node(&self, wanted: &str) -> Result<IdentityKey, Problem> {
        let member = self.member_of(self.find_peer(wanted)?);
        let Some(Member { identity, name, .. }) = member else { return Ok(self.me.identity) };
        let everything = |prefix: &&IpNet| prefix.prefix_len() == 0;
        let granted = self.ledger.grants(identity);
        let offered: Vec<&IpNet> = match self.routes.adverts.get(identity) {
            Some(heard) => heard.advert.prefixes().filter(everything).collect(),
            // Not heard of yet, as right after joining: an admin's word is enough to wait for it.
            None => granted.iter().filter(everything).collect(),
        };
        if offered.is_empty() {
            return Err(Problem {
                code: "no-exit-node".into(),
                text: format!("{name} does not offer to be an exit node"),
                hint: format!("on {name}: `meshd up --advertise-exit-node`; `meshd routes` lists who does"),
            });
        }
        if !offered.iter().any(|prefix| self.ledger.may_announce(identity, prefix)) {
            return Err(Problem {
                code: "no-exit-node".into(),
                text: format!("{name} offers to be an exit node, and no admin has approved it"),
                hint: format!("on an admin node: `meshd routes approve {name} exit-node`"),
            });
        }
        Ok(*identity)
    }

    /// What is wrong with the exit node, if there is to be one: a sentence, and whether nothing at all gets through.
    pub(super) fn exit_node_trouble(&self) -> Option<(String, bool)> {
        let wanted = self.routes.wish.exit_node?;
        let name = self.ledger.member_ever(&wanted).map_or("a node that is unknown", |m| m.name.as_str());
        let asked = self.routes.chosen.iter().find(|(prefix, _)| prefix.prefix_len() == 0).map(|(_, id)| *id);
        match asked {
            None => Some((
                format!(
                    "all traffic is to go through {name}, which does not offer that (or not with an admin's approval)"
                ),
                true,
            )),
            Some(id) if !self.is_there(id) => {
                Some((format!("all traffic goes through {name}, which is offline"), false))
            }
            Some(_) => None,
        }
    }

    /// Whether a prefix can be a route at all.
    ///
    /// # Errors
    /// What speaks against it.
    pub fn check_prefix(&self, prefix: &IpNet) -> Result<(), Problem> {
        let problem = |code: &str, text: String, hint: &str| Problem { code: code.into(), text, hint: hint.into() };
        if prefix.prefix_len() == 0 {
            return Ok(());
        }
        let shortest = if matches!(prefix, IpNet::V4(_)) { SHORTEST_IPV4 } else { SHORTEST_IPV6 };
        if prefix.prefix_len() < shortest {
            return Err(problem(
                "route-too-wide",
                format!("{prefix} would take in the way to the default gateway and half the Internet"),
                "for all traffic there is `--advertise-exit-node`; otherwise name the networks one by one",
            ));
        }
        if let Some(range) = self.mesh.iter().find(|range| range.contains(prefix) || prefix.contains(*range)) {
            return Err(problem(
                "route-covers-mesh",
                format!("{prefix} overlaps the mesh's own range {range}"),
                "nodes are reached by their mesh addresses without a route; name the network behind the node",
            ));
        }
        Ok(())
    }
}

/// Leaves those routers of a prefix that lead to one and the same network. An alias says that a network is another one: where
/// some have an alias, those without are meant by the prefix itself; where all have, it says nothing if they differ.
fn one_network(routers: &mut Vec<Router>) {
    if routers.iter().any(|router| router.alias.is_none()) {
        routers.retain(|router| router.alias.is_none());
    } else if routers.iter().any(|router| router.alias != routers[0].alias) {
        routers.clear();
    }
}

#[cfg(test)]
mod tests;

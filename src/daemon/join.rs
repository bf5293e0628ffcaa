//! Becoming a member: founding a network with a claim token, joining one with an invite token, and finishing either
//! after a lost answer.
//!
//! ```text
//! token ─► checked here (whole? expired? another network?) ─► coordinator reached, its key proven
//!   claim:   root key and four records made ─► join.json ─► Found  ─► Joined ─► records.jsonl, network.json
//!   invite:  Propose ─► chain verified from the token's network id ─► range free on this machine?
//!            ─► Member signed ─► join.json ─► Redeem ─► Joined ─► whole log ─► records.jsonl, network.json
//! ```
//!
//! Nothing is asked of the coordinator that changes it before everything that could fail here was checked. `join.json`
//! holds the request as sent, so that a node that was killed or lost the answer asks again with the same keys, and the
//! coordinator answers the same again.
//!
//! A new member starts from the coordinator's whole log, verified in the log's own order: judged after its own record, an
//! older member that once had its address or name would look like an intruder.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use rand::Rng;

use crate::daemon::apply::{Surroundings, range_clash};
use crate::daemon::background::other_network;
use crate::daemon::problem;
use crate::daemon::store::{Network, PendingJoin, Store};
use crate::time::UnixSeconds;
use crate::trust::founding;
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::ledger::{Judge, Ledger, is_sane_ipv4_range};
use crate::trust::names::dns_label;
use crate::trust::record::{Invite, SignedRecord, member_ipv6};
use crate::trust::token::{ClaimToken, InviteToken, Token};
use crate::wire::control::{ToCoordinator, ToNode, refusal};
use crate::wire::keys::{ControlKey, Digest32, NetworkId};
use crate::wire::local::Problem;

/// Proposals asked for when others are faster.
const PROPOSALS: u32 = 6;
/// Random ranges tried at founding until one is free on this machine.
const RANGES: u32 = 64;
/// How often a request is sent whose answer was lost.
const SENDS: u32 = 3;
/// The code of what a sound coordinator does not do.
const UNTRUSTED: &str = "untrusted-coordinator";
/// Pause before asking again.
const PAUSE: Duration = Duration::from_millis(400);

/// Answers one request; how, is the caller's business.
pub(super) trait Desk {
    /// Sends a request and waits for the answer to it.
    async fn ask(&mut self, request: ToCoordinator) -> Result<ToNode, Problem>;
    /// As a member: the coordinator's whole log, in order. Not verified.
    async fn log(&mut self) -> Result<Vec<SignedRecord>, Problem>;
}

/// Finds a coordinator and proves its key.
pub(super) trait Desks {
    /// What it connects.
    type Desk: Desk;
    /// Connects to the first of `urls` that answers as `coordinator`, as the node with this control secret.
    async fn connect(&self, urls: &[String], coordinator: ControlKey, secret: &Secret32)
    -> Result<Self::Desk, Problem>;
}

/// What the person asked for.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    /// The token, if one was given.
    pub(super) token: Option<&'a Token>,
    /// `--name`.
    pub(super) name: Option<&'a str>,
    /// The machine's host name as a label.
    pub(super) host_label: String,
    /// Founding: the network's name.
    pub(super) network_name: Option<&'a str>,
    /// Founding: the network's IPv4 range.
    pub(super) ipv4_range: Option<Ipv4Net>,
    /// What is on this machine.
    pub(super) surroundings: &'a Surroundings,
    /// The wall clock.
    pub(super) wall: UnixSeconds,
}

/// A member, ready to run.
#[derive(Debug)]
pub(super) struct Membership {
    /// Its keys.
    pub(super) keys: NodeKeys,
    /// Its network.
    pub(super) network: Network,
    /// What it knows of the network, oldest first.
    pub(super) records: Vec<SignedRecord>,
    /// Sentences for the person.
    pub(super) notes: Vec<String>,
}

/// Marks the token a node joined by, without its secret being recoverable.
#[must_use]
pub fn token_mark(token: &Token) -> Digest32 {
    match token {
        Token::Claim(claim) => claim_mark(claim),
        Token::Invite(invite) => invite_mark(invite),
    }
}

/// Makes this node a member, if it is not one, and reads what it needs to run.
///
/// # Errors
/// Whatever is wrong with the token, the machine, the coordinator or the state directory. Nothing was then changed that
/// the next try does not take up.
pub(super) async fn ensure<D: Desks>(
    store: &mut Store,
    wish: &Wish<'_>,
    desks: &D,
    rng: &mut impl Rng,
) -> Result<Membership, Problem> {
    let network = match store.network() {
        Ok(network) => network,
        // Kept aside; a token can put it right.
        Err(e) if e.code == "network-file" && wish.token.is_some() => None,
        Err(e) => return Err(e),
    };
    if let Some(network) = network {
        store.drop_pending();
        return resume(store, wish, network, desks).await;
    }
    if let Some(done) = finish_pending(store, wish, desks).await? {
        return Ok(done);
    }
    match wish.token {
        None => Err(problem(
            "not-joined",
            format!("this machine is in no network yet (nothing in {})", store.dir().display()),
            "join one with `meshd up TOKEN`: `meshd coordinator claim` prints the first token, `meshd invite` on an admin node the others",
        )),
        Some(Token::Claim(claim)) => found(store, wish, claim, desks, rng).await,
        Some(token @ Token::Invite(invite)) => {
            if let Some(repaired) = repair(store, token, invite)? {
                return Ok(repaired);
            }
            redeem(store, wish, invite, desks, rng).await
        }
    }
}

/// A member already: says so, and takes a newer address of the coordinator from a token of the same network.
async fn resume<D: Desks>(
    store: &mut Store,
    wish: &Wish<'_>,
    mut network: Network,
    desks: &D,
) -> Result<Membership, Problem> {
    let keys = store.keys()?.ok_or_else(|| {
        problem(
            "node-keys",
            format!("the key file node.json is missing in {}", store.dir().display()),
            "restore it from a backup; without one, move the state directory away and join anew with a new invite",
        )
    })?;
    let mut records = store.records()?;
    let mut notes = Vec::new();
    if ledger_of(network.network, &records).member_ever(&keys.identity_key()).is_none() {
        records = fetch_again(store, &network, &keys, &records, desks).await?;
        notes.push("records.jsonl was lost; what it held was fetched from the coordinator again, and verified".into());
    }
    if let Some(token) = wish.token {
        let (same, shown) = match token {
            Token::Invite(invite) => (invite.network == network.network, &invite.urls),
            Token::Claim(claim) => (claim.coordinator == network.coordinator, &claim.urls),
        };
        if !same {
            return Err(other_network(&network_name(&network, &records)));
        }
        notes.push(format!(
            "this node is in the network {:?} already; the token was not needed and not used",
            network_name(&network, &records)
        ));
        if let Token::Invite(invite) = token
            && (*shown != network.urls || invite.coordinator != network.coordinator)
            && is_from_an_admin(&network, &records, invite)
        {
            network.urls.clone_from(shown);
            network.coordinator = invite.coordinator;
            store.joined(&network, &[])?;
            notes.push("the coordinator's address was taken from the token".into());
        }
    }
    Ok(Membership { keys, network, records, notes })
}

/// `records.jsonl` was lost: the coordinator has the records too, and they prove themselves. What is left of the old ones
/// is kept, above all a Revoke that the coordinator may not want to show again.
async fn fetch_again<D: Desks>(
    store: &Store,
    network: &Network,
    keys: &NodeKeys,
    left: &[SignedRecord],
    desks: &D,
) -> Result<Vec<SignedRecord>, Problem> {
    let log = match desks.connect(&network.urls, network.coordinator, &keys.control).await {
        Ok(mut desk) => desk.log().await,
        Err(e) => Err(e),
    };
    let lost = |why: String| {
        problem(
            "records",
            format!(
                "records.jsonl in {} does not show this node as a member of its network, and {why}",
                store.dir().display()
            ),
            "try again when the coordinator can be reached, or restore records.jsonl from a backup",
        )
    };
    let log = log.map_err(|e| lost(format!("the coordinator could not be asked for it: {}", e.text)))?;
    let ledger = ledger_of(network.network, &[&log, left].concat());
    if ledger.member_ever(&keys.identity_key()).is_none() {
        return Err(lost("neither does the coordinator's log".into()));
    }
    store.replace_records(ledger.log())?;
    Ok(ledger.log().to_vec())
}

/// `network.json` was lost, but keys and records are there: a token of the same network says the rest.
fn repair(store: &mut Store, token: &Token, invite: &InviteToken) -> Result<Option<Membership>, Problem> {
    let Some(keys) = store.keys()? else { return Ok(None) };
    let records = store.records()?;
    let known = ledger_of(invite.network, &records);
    if known.member(&keys.identity_key()).is_none() {
        return Ok(None);
    }
    let network = network_of(token, invite.network);
    store.joined(&network, &records)?;
    let notes =
        vec!["this node is a member of the network already; the token repaired its state and was not used".into()];
    Ok(Some(Membership { keys, network, records, notes }))
}

/// Asks again what was asked before, with the same keys.
async fn finish_pending<D: Desks>(
    store: &mut Store,
    wish: &Wish<'_>,
    desks: &D,
) -> Result<Option<Membership>, Problem> {
    let Some(pending) = store.pending()? else { return Ok(None) };
    let Some(keys) = store.keys()? else { return Ok(None) };
    let another = wish.token.filter(|token| token_mark(token) != pending.network.token);
    if another.is_some_and(|token| coordinator_of(token).1 != pending.network.coordinator) {
        // The person gave up on that one.
        forget(store, &pending.request);
        return Ok(None);
    }
    match send(&pending, &keys, desks).await? {
        Ok(records) => {
            let mut notes = Vec::new();
            if another.is_some() {
                notes.push("an earlier join was finished instead; the token was not used".into());
            }
            settle(store, keys, pending, records, notes).map(Some)
        }
        Err(refused) => {
            forget(store, &pending.request);
            // With a token the join simply begins anew.
            if wish.token.is_some() && is_retryable(&refused, true) || another.is_some() {
                Ok(None)
            } else {
                Err(refused)
            }
        }
    }
}

async fn found<D: Desks>(
    store: &mut Store,
    wish: &Wish<'_>,
    claim: &ClaimToken,
    desks: &D,
    rng: &mut impl Rng,
) -> Result<Membership, Problem> {
    let network_name = checked_name(wish.network_name.unwrap_or("home"), "the network's name")?;
    let node_name = checked_name(wish.name.unwrap_or(&wish.host_label), "the node's name")?;
    let (ipv4, ipv6) = free_ranges(wish, rng)?;
    let keys = match store.keys()? {
        Some(keys) => keys,
        None => NodeKeys::generate(rng),
    };
    let root = Secret32::random(rng);
    let signer = root.signing_key();
    let records = founding::found(&keys, &signer, network_name, node_name, ipv4, ipv6, wish.wall, rng).to_vec();
    let id = founding::network_id(&signer);
    Ledger::new(id).admit_all(&records, Judge::Reader).map_err(|(_, why)| {
        problem("founding", format!("the network cannot be founded like this: {why}"), "choose another name or range")
    })?;
    let network = Network {
        v: 1,
        network: id,
        urls: claim.urls.clone(),
        coordinator: claim.coordinator,
        token: claim_mark(claim),
    };
    let request = ToCoordinator::Found { re: 1, claim: Digest32(*claim.secret.expose()), records };
    // Reached first, so that an unknown or wrong coordinator leaves no trace.
    let desk = desks.connect(&claim.urls, claim.coordinator, &keys.control).await?;
    let keys = store.keep_keys(keys)?;
    store.keep_root(root)?;
    let pending = PendingJoin { v: 1, network, request };
    commit(store, keys, pending, desk, desks).await?.map_err(claim_refused)
}

async fn redeem<D: Desks>(
    store: &mut Store,
    wish: &Wish<'_>,
    token: &InviteToken,
    desks: &D,
    rng: &mut impl Rng,
) -> Result<Membership, Problem> {
    let terms = token.terms().ok_or_else(|| {
        problem("bad-token", "the token's invite is not valid", "ask for a new one: `meshd invite` on an admin node")
    })?;
    let (name, exact) = wanted_name(wish, &terms)?;
    if terms.expires < wish.wall {
        return Err(expired(wish.wall - terms.expires));
    }
    let mut keys = match store.keys()? {
        Some(keys) => keys,
        None => NodeKeys::generate(rng),
    };
    let mut last = None;
    for _ in 0..PROPOSALS {
        let mut desk = desks.connect(&token.urls, token.coordinator, &keys.control).await?;
        let ask = ToCoordinator::Propose { re: 1, invite: terms.key, name: name.to_owned(), exact };
        let ToNode::Proposal { records, ipv4, name: proposed, .. } = answer(desk.ask(ask).await?)? else {
            return Err(nonsense("an answer that does not fit the question"));
        };
        let request = accept_proposal(wish, token, &keys, &records, ipv4, name, &proposed, exact)?;
        let network = Network {
            v: 1,
            network: token.network,
            urls: token.urls.clone(),
            coordinator: token.coordinator,
            token: invite_mark(token),
        };
        keys = store.keep_keys(keys)?;
        match commit(store, keys, PendingJoin { v: 1, network, request }, desk, desks).await? {
            Ok(member) => return Ok(member),
            Err(refused) if is_retryable(&refused, !exact) => last = Some(refused),
            Err(refused) => return Err(refused),
        }
        keys = store.keys()?.ok_or_else(|| problem("node-keys", "the key file vanished", ""))?;
    }
    Err(last.unwrap_or_else(|| nonsense("no usable proposal")))
}

/// Verifies what the coordinator proposes and signs it.
fn accept_proposal(
    wish: &Wish<'_>,
    token: &InviteToken,
    keys: &NodeKeys,
    records: &[SignedRecord],
    ipv4: Ipv4Addr,
    wanted: &str,
    proposed: &str,
    exact: bool,
) -> Result<ToCoordinator, Problem> {
    let mut ledger = Ledger::new(token.network);
    ledger.admit_all(records, Judge::Reader).map_err(|(n, why)| untrusted(format!("record {}: {why}", n + 1)))?;
    ledger.admit(&token.invite, Judge::Reader).map_err(|why| untrusted(format!("the invite: {why}")))?;
    let numbered = proposed.strip_prefix(wanted).and_then(|rest| rest.strip_prefix('-')).is_some_and(is_number)
        || proposed.rsplit_once('-').is_some_and(|(base, n)| wanted.starts_with(base) && is_number(n));
    if proposed != wanted && (exact || !numbered) {
        return Err(untrusted(format!("it proposes the name {proposed:?} instead of {wanted:?}")));
    }
    let genesis = ledger.genesis().ok_or_else(|| untrusted("the founding record is missing".into()))?;
    let ranges = [IpNet::V4(genesis.ipv4), IpNet::V6(genesis.ipv6)];
    if let Some(what) = wish.surroundings.clash(&ranges) {
        return Err(range_clash(&ranges, &what));
    }
    let ipv6 = member_ipv6(genesis.ipv6, &keys.identity_key());
    let member = founding::member_record(keys, &token.secret, token.network, proposed, ipv4, ipv6, wish.wall);
    ledger.admit(&member, Judge::Reader).map_err(|why| untrusted(why.to_string()))?;
    Ok(ToCoordinator::Redeem { re: 2, invite: token.invite.clone(), member })
}

/// Writes the join down, sends it, and settles it. The inner error is the coordinator's refusal: the join is forgotten.
async fn commit<D: Desks>(
    store: &mut Store,
    keys: NodeKeys,
    pending: PendingJoin,
    mut desk: D::Desk,
    desks: &D,
) -> Result<Result<Membership, Problem>, Problem> {
    store.keep_pending(&pending)?;
    let sent = match hand_in(&mut desk, &pending, &keys).await {
        Ok(answered) => answered,
        // The answer was lost; asking again is harmless.
        Err(e) if e.code != UNTRUSTED => send(&pending, &keys, desks).await?,
        Err(e) => return Err(e),
    };
    match sent {
        Ok(records) => settle(store, keys, pending, records, Vec::new()).map(Ok),
        Err(refused) => {
            if is_final(&refused) {
                forget(store, &pending.request);
            }
            Ok(Err(refused))
        }
    }
}

/// Sends a pending join until it is answered. The inner error is a refusal.
async fn send<D: Desks>(
    pending: &PendingJoin,
    keys: &NodeKeys,
    desks: &D,
) -> Result<Result<Vec<SignedRecord>, Problem>, Problem> {
    let mut last = None;
    for n in 0..SENDS {
        if n > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        let asked = match desks.connect(&pending.network.urls, pending.network.coordinator, &keys.control).await {
            Ok(mut desk) => hand_in(&mut desk, pending, keys).await,
            Err(e) => Err(e),
        };
        match asked {
            Ok(Err(refused)) if !is_final(&refused) => return Err(refused),
            Ok(answered) => return Ok(answered),
            Err(e) if e.code == UNTRUSTED => return Err(e),
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| nonsense("nothing")))
}

/// Sends a pending join once. Returns the records the new member starts with; the inner error is a refusal.
async fn hand_in(
    desk: &mut impl Desk,
    pending: &PendingJoin,
    keys: &NodeKeys,
) -> Result<Result<Vec<SignedRecord>, Problem>, Problem> {
    match desk.ask(pending.request.clone()).await? {
        ToNode::Joined { .. } => {}
        other => {
            return match answer(other) {
                Ok(_) => Err(nonsense("an answer that does not fit the question")),
                Err(refused) => Ok(Err(refused)),
            };
        }
    }
    let records = match &pending.request {
        // The founder's own four records are the beginning of the log.
        ToCoordinator::Found { records, .. } => records.clone(),
        _ => desk.log().await?,
    };
    let ledger = ledger_of(pending.network.network, &records);
    if ledger.member_ever(&keys.identity_key()).is_none() {
        return Err(untrusted("it says that this node joined, but its log does not".into()));
    }
    Ok(Ok(ledger.log().to_vec()))
}

fn settle(
    store: &Store,
    keys: NodeKeys,
    pending: PendingJoin,
    records: Vec<SignedRecord>,
    notes: Vec<String>,
) -> Result<Membership, Problem> {
    let network = pending.network;
    store.joined(&network, &records)?;
    Ok(Membership { keys, network, records, notes })
}

/// A join that came to nothing leaves no root key and nothing to resume.
fn forget(store: &Store, request: &ToCoordinator) {
    store.drop_pending();
    if matches!(request, ToCoordinator::Found { .. }) {
        store.drop_root();
    }
}

/// Turns a refusal into the problem it is.
fn answer(answer: ToNode) -> Result<ToNode, Problem> {
    match answer {
        ToNode::Refused { code, text, hint, .. } => Err(Problem { code, text, hint }),
        other => Ok(other),
    }
}

/// Refusals after which the same request can never succeed.
fn is_final(refused: &Problem) -> bool {
    !matches!(refused.code.as_str(), refusal::RATE_LIMITED | refusal::STORE_FAILED | refusal::VERSION)
}

/// Refusals that another proposal gets around.
fn is_retryable(refused: &Problem, name_may_change: bool) -> bool {
    refused.code == refusal::ADDRESS_TAKEN || (refused.code == refusal::NAME_TAKEN && name_may_change)
}

fn claim_refused(mut refused: Problem) -> Problem {
    if refused.hint.is_empty() && refused.code == refusal::ALREADY_USED {
        refused.hint =
            "the network exists already: join it with `meshd invite` on an admin node and `meshd up TOKEN` here".into();
    }
    refused
}

/// The network's ranges: as asked, or random ones that are free on this machine.
fn free_ranges(wish: &Wish<'_>, rng: &mut impl Rng) -> Result<(Ipv4Net, ipnet::Ipv6Net), Problem> {
    if let Some(range) = wish.ipv4_range
        && !is_sane_ipv4_range(range)
    {
        return Err(problem(
            "bad-range",
            format!("{range} cannot be a network's IPv4 range"),
            "use a private range between /8 and /29 with its host bits zero, such as 100.71.0.0/16",
        ));
    }
    let mut last = None;
    for _ in 0..RANGES {
        let (random, ipv6) = founding::random_ranges(rng);
        let ipv4 = wish.ipv4_range.unwrap_or(random);
        let ranges = [IpNet::V4(ipv4), IpNet::V6(ipv6)];
        match wish.surroundings.clash(&ranges) {
            None => return Ok((ipv4, ipv6)),
            Some(what) => last = Some(range_clash(&ranges, &what)),
        }
        if wish.ipv4_range.is_some() {
            break;
        }
    }
    Err(last.unwrap_or_else(|| problem("range-clash", "no free range", "")))
}

fn wanted_name<'a>(wish: &'a Wish<'_>, terms: &'a Invite) -> Result<(&'a str, bool), Problem> {
    match (&terms.name, wish.name) {
        (Some(fixed), Some(asked)) if fixed != asked => Err(problem(
            "name-fixed",
            format!("the invite is for the name {fixed:?}, not {asked:?}"),
            format!("leave `--name` out, or ask for an invite for {asked:?}"),
        )),
        (Some(fixed), _) => Ok((fixed, true)),
        (None, Some(asked)) => Ok((checked_name(asked, "the node's name")?, true)),
        (None, None) => Ok((&wish.host_label, false)),
    }
}

fn checked_name<'a>(name: &'a str, what: &str) -> Result<&'a str, Problem> {
    match dns_label(name) {
        Ok(()) => Ok(name),
        Err(why) => Err(problem(
            "bad-name",
            format!("{name:?} cannot be {what}: {why}"),
            "use lower-case letters, digits and hyphens, such as `nas` or `web-2`",
        )),
    }
}

fn expired(ago: u64) -> Problem {
    let ago = match ago {
        0..120 => format!("{ago} s"),
        120..7_200 => format!("{} min", ago / 60),
        7_200..172_800 => format!("{} h", ago / 3_600),
        _ => format!("{} days", ago / 86_400),
    };
    problem(
        refusal::EXPIRED,
        format!("the invite expired {ago} ago"),
        "ask for a new one: `meshd invite` on an admin node (or set this machine's clock, if that is wrong)",
    )
}

fn untrusted(what: String) -> Problem {
    problem(
        UNTRUSTED,
        format!("the coordinator's answer does not fit the token: {what}"),
        "tell whoever runs the network; nothing was joined",
    )
}

fn nonsense(what: &str) -> Problem {
    problem(
        UNTRUSTED,
        format!("the coordinator gave {what}"),
        "upgrade meshd here and on the coordinator's machine; nothing was joined",
    )
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn coordinator_of(token: &Token) -> (&[String], ControlKey) {
    match token {
        Token::Claim(claim) => (&claim.urls, claim.coordinator),
        Token::Invite(invite) => (&invite.urls, invite.coordinator),
    }
}

fn network_of(token: &Token, id: NetworkId) -> Network {
    let (urls, coordinator) = coordinator_of(token);
    Network { v: 1, network: id, urls: urls.to_vec(), coordinator, token: token_mark(token) }
}

fn claim_mark(claim: &ClaimToken) -> Digest32 {
    mark(b"claim", &claim.secret)
}

fn invite_mark(invite: &InviteToken) -> Digest32 {
    mark(b"invite", &invite.secret)
}

fn mark(kind: &[u8], secret: &Secret32) -> Digest32 {
    Digest32::of(&[b"meshd token mark v1", kind, secret.expose()])
}

/// Everything in `records` that the chain supports.
fn ledger_of(network: NetworkId, records: &[SignedRecord]) -> Ledger {
    let mut ledger = Ledger::new(network);
    for record in records {
        // What is refused leaves no trace; the planner says which and why.
        let _ = ledger.admit(record, Judge::Reader);
    }
    ledger
}

fn network_name(network: &Network, records: &[SignedRecord]) -> String {
    ledger_of(network.network, records).genesis().map_or_else(|| network.network.to_string(), |g| g.name.clone())
}

fn is_from_an_admin(network: &Network, records: &[SignedRecord], token: &InviteToken) -> bool {
    token.terms().is_some() && ledger_of(network.network, records).admit(&token.invite, Judge::Reader).is_ok()
}

/// The node's own mesh addresses with the networks' prefix lengths, and the network's name, as its records say.
pub(super) fn own_addresses(membership: &Membership, ledger: &Ledger) -> Result<(Vec<IpNet>, String), Problem> {
    let identity = membership.keys.identity_key();
    if ledger.is_revoked(&identity) {
        return Err(problem(
            refusal::REVOKED,
            "this node was removed from the network",
            "to come back, move the state directory away and join with a new invite",
        ));
    }
    let (Some(genesis), Some(member)) = (ledger.genesis(), ledger.member(&identity)) else {
        return Err(problem(
            "records",
            "records.jsonl does not show this node as a member of its network",
            "restore records.jsonl from a backup, or move the state directory away and join with a new invite",
        ));
    };
    let v4 = IpNet::new(IpAddr::V4(member.ipv4), genesis.ipv4.prefix_len());
    let v6 = IpNet::new(IpAddr::V6(member.ipv6), genesis.ipv6.prefix_len());
    Ok((v4.into_iter().chain(v6).collect(), genesis.name.clone()))
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;

//! A large network on one node: 10,000 routes and 2,000 names, everything on its disk, nobody to ask.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::RecordType;
use ipnet::IpNet;
use meshd::cli::demo::net::Segment;
use meshd::daemon::store::{Network, State, Store};
use meshd::os::clock;
use meshd::trust::advert::{ADVERT_VERSION, Advert, SignedAdvert};
use meshd::trust::founding::{Terms, found, invite_record, member_record, network_id, route_grant_record};
use meshd::trust::keys::{NodeKeys, Secret32};
use meshd::trust::record::member_ipv6;
use meshd::wire::keys::{ControlKey, Digest32};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::cost::proc_status;
use crate::runner::Case;
use crate::world::{Node, ensure, eventually, until};

pub fn cases() -> Vec<Case> {
    vec![Case { name: "cost::ten_thousand_routes_and_two_thousand_names", limit: Duration::from_secs(180), run: large }]
}

const MEMBERS: u16 = 2_000;
const ROUTERS: u16 = 10;
const ROUTES_EACH: u16 = 1_000;

/// Member `n` of the network.
fn name(n: u16) -> String {
    format!("node-{n}")
}

fn address(n: u16) -> Ipv4Addr {
    let [high, low] = (n + 10).to_be_bytes();
    Ipv4Addr::new(100, 71, high, low)
}

/// Writes the state of a node that founded such a network.
fn write_state(node: &Node) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(5);
    let (keys, root) = (NodeKeys::generate(&mut rng), Secret32::random(&mut rng));
    let now = clock::wall();
    let (ipv4, ipv6) = ("100.71.0.0/16".parse()?, "fd00:1:2::/48".parse()?);
    let network = network_id(&root.signing_key());
    let mut records = found(&keys, &root.signing_key(), "home", "me", ipv4, ipv6, now, &mut rng).to_vec();
    let admin = keys.identity.signing_key();
    let terms = Terms { uses: u32::from(MEMBERS), expires: now + 86_400, ..Terms::default() };
    let (secret, invite) = invite_record(&admin, network, terms, now, &mut rng);
    records.push(invite);
    let mut adverts = Vec::new();
    for n in 0..MEMBERS {
        let keys = NodeKeys::generate(&mut rng);
        let identity = keys.identity_key();
        let v6 = member_ipv6(ipv6, &identity);
        records.push(member_record(&keys, &secret, network, &name(n), address(n), v6, now));
        if n >= ROUTERS {
            continue;
        }
        let net = |i: u16| {
            IpNet::new(Ipv4Addr::new(10, u8::try_from(n).unwrap() * 8 + (i >> 8) as u8, i as u8, 0).into(), 24)
        };
        let routes = (0..ROUTES_EACH).map(net).collect::<Result<Vec<_>, _>>()?;
        records.extend(routes.iter().map(|prefix| route_grant_record(&admin, network, identity, *prefix, now)));
        let (resting, draining, lan, relay) = Default::default();
        let advert = Advert { v: ADVERT_VERSION, network, identity, number: 1, routes, resting, draining, lan, relay };
        adverts.push(SignedAdvert::sign(&advert, &keys.identity.signing_key()));
    }
    let failed = |p: meshd::wire::local::Problem| anyhow!(p.text);
    fs::create_dir_all(node.state_dir())?;
    let store = Store::open(&node.state_dir()).map_err(failed)?;
    store.keep_keys(keys).map_err(failed)?;
    store.keep_root(root).map_err(failed)?;
    // Nobody is there.
    let (urls, coordinator) = (vec!["https://203.0.113.10:8443".to_owned()], ControlKey([7; 32]));
    let known = Network { v: 1, network, urls, coordinator, token: Digest32::default() };
    store.joined(&known, &records).map_err(failed)?;
    store.keep_state(&State { v: 1, adverts, ..State::default() }).map_err(failed)
}

/// How long the node takes to say where so many names are, one after the other.
fn look_up(node: &Node, numbers: std::ops::Range<u16>) -> Result<Duration> {
    let server = node.address(true)?;
    node.namespace.enter(|| -> Result<Duration> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut buffer = [0; 1_500];
        let begin = Instant::now();
        for n in numbers {
            let mut question = Message::query();
            question.add_query(Query::query(format!("{}.home.internal.", name(n)).parse()?, RecordType::A));
            socket.send_to(&question.to_vec()?, (server, 53))?;
            let (length, _) = socket.recv_from(&mut buffer)?;
            let answers = Message::from_vec(&buffer[..length])?.answers;
            let data = answers.first().map(|answer| answer.data.to_string());
            ensure(data == Some(address(n).to_string()), || format!("{} is at {data:?}", name(n)))?;
        }
        Ok(begin.elapsed())
    })?
}

/// Bar: 40 MiB, for the release build, which `MESHD_LAB_RELEASE` names, with its code, and always for what is not code. How long
/// it takes is printed and depends on the machine, most of it for the signatures; how much work it is does not, and is held.
fn large() -> Result<()> {
    let release = std::env::var_os("MESHD_LAB_RELEASE");
    let internet = Segment::internet()?;
    let binary = release.clone().map_or_else(|| env!("CARGO_BIN_EXE_meshd").into(), Into::into);
    let node = Node { binary, ..Node::new("me", internet.host("me", 31)?) };
    write_state(&node)?;
    let count = || -> Result<usize> {
        // The interface's number is in the table's, and the table is there with the first route.
        let routes = node.namespace.ip("-4 route show table all")?;
        Ok(routes.lines().filter(|line| line.starts_with("10.") && line.contains(" table 7000")).count())
    };
    let begin = Instant::now();
    let mut command = node.meshd(&["up"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut starting = node.namespace.spawn(&mut command, "/run/lab/starting".as_ref())?;
    let log = || fs::read_to_string(node.state_dir().join("meshd.log")).unwrap_or_default();
    until("all routes are in the kernel", Duration::from_secs(60), || Ok((count()? == 10_000).then_some(())))
        .with_context(|| format!("{:?} are there\n{}", count(), node.run(&["status"]).unwrap_or_default()))?;
    let took = begin.elapsed();
    eventually("a name", Duration::from_secs(10), || look_up(&node, 0..1))?;
    let names = begin.elapsed();
    println!("10,000 routes are in the kernel {took:?} after the start; names answered after {names:?}");
    starting.wait()?;
    let all = look_up(&node, 0..MEMBERS)?;
    println!("2,000 names looked up one after the other in {all:?}");
    let resident = proc_status(&node, "VmRSS:")?;
    let anonymous = proc_status(&node, "RssAnon:")?;
    println!("{resident} KiB resident, {anonymous} KiB of it not from files");
    ensure(anonymous <= 40 << 10, || format!("{anonymous} KiB besides the code"))?;
    if release.is_some() {
        ensure(resident <= 40 << 10, || format!("{resident} KiB resident"))?;
    }
    // The work is said, and does not depend on how busy the machine is: one change of the kernel's tables, not one a record.
    let changes = log().matches("routes into the tunnel changed").count();
    ensure(changes == 1, || format!("the kernel's routes were changed {changes} times"))?;
    // And away again, with everything.
    let begin = Instant::now();
    node.run(&["down"])?;
    println!("down took {:?}", begin.elapsed());
    let left = node.namespace.ip("-4 route show table all")?;
    ensure(!left.contains("10."), || format!("left:\n{left}"))
}

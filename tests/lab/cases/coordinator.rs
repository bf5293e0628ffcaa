//! The coordinator dies, again and again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use meshd::cli::demo::net::{Nat, tool};
use meshd::wire::local::PathKind;

use crate::net;
use crate::runner::{Case, case};
use crate::world::{Icmp, Node, World, ensure, eventually, let_pass, until};

use super::healing::move_to;

pub fn cases() -> Vec<Case> {
    vec![
        case("coordinator::killed_direct_peers_talk_on_and_all_reconnect_within_ten_seconds", killed_and_back),
        case("coordinator::away_nodes_restart_from_disk_and_find_each_other", restart_without_it),
        case("coordinator::gone_for_good_nodes_behind_nats_find_each_other_through_each_other", through_each_other),
        Case {
            name: "coordinator::killed_fifty_times_it_keeps_every_answered_request",
            limit: Duration::from_secs(900),
            run: kill_loop,
        },
    ]
}

fn killed_and_back() -> Result<()> {
    let mut lab = net::home_nat()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    nodes[1].ping_until_direct("a")?;
    let pings = nodes[0].start_icmp(nodes[1].address(true)?, &["-q", "-c", "300", "-i", "0.02", "-W", "2"])?;
    lab.world.coordinator.kill()?;
    let seen = Icmp::wait(pings, Duration::from_secs(30))?;
    ensure(seen.received == seen.sent, || format!("without the coordinator: {seen:?}"))?;
    for node in &nodes {
        eventually("the coordinator is missed", Duration::from_secs(40), || {
            ensure(!node.status()?.coordinator.connected, || format!("{} thinks it is connected", node.name))
        })?;
        let health = node.status()?.health;
        ensure(!health.is_empty(), || format!("{} says nothing about it", node.name))?;
    }
    ensure(nodes[0].path("b")? == PathKind::Direct, || "the direct path is gone".to_owned())?;
    lab.world.coordinator.restart()?;
    let back = Instant::now();
    for node in &nodes {
        until(
            &format!("{} is reconnected", node.name),
            Duration::from_secs(10).saturating_sub(back.elapsed()),
            || Ok(node.status()?.coordinator.connected.then_some(())),
        )?;
    }
    Ok(())
}

fn restart_without_it() -> Result<()> {
    let mut lab = net::public()?;
    let nodes = lab.join()?;
    nodes[0].ping_until_direct("b")?;
    nodes[1].ping_until_direct("a")?;
    lab.world.coordinator.kill()?;
    for node in &nodes[..2] {
        node.run(&["down"])?;
    }
    for node in &nodes[..2] {
        node.run(&["up", "--timeout", "10s"])?;
    }
    let seen = nodes[0].icmp(nodes[1].address(true)?, &["-c", "5", "-i", "0.2", "-W", "5"])?;
    ensure(seen.received >= 4, || format!("after both restarted without a coordinator: {seen:?}"))
}

/// How soon every pair answers.
const ALL_ANSWER: Duration = Duration::from_secs(10);

/// ```text
///   hub .31 ──┐   coordinator .10/.11, deleted
///             ├── internet
///   [NAT ra .21] a   [NAT rb .22] b   [NAT rc .23] d, later behind [NAT rd .24]
/// ```
///
/// While d is off an admin removes `gone`: d can hear of that from peers only.
fn through_each_other() -> Result<()> {
    let world = World::new()?;
    let internet = &world.internet;
    let routers = [("ra", 21), ("rb", 22), ("rc", 23), ("rd", 24)]
        .map(|(name, number)| internet.router(name, number, Nat::Home))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let machines = [
        ("hub", internet.host("hub", 31)?),
        ("a", routers[0].lan.host("a", 2)?),
        ("b", routers[1].lan.host("b", 2)?),
        ("d", routers[2].lan.host("d", 2)?),
        ("gone", internet.host("gone", 32)?),
    ];
    let machines: Vec<(&str, &_)> = machines.iter().map(|(name, machine)| (*name, machine)).collect();
    let mut nodes = world.join(&machines)?;
    let gone = nodes.pop().context("five joined")?;
    for (i, from) in nodes.iter().enumerate() {
        for to in &nodes[i + 1..] {
            from.ping_until_direct(&to.name)?;
            to.ping_until_direct(&from.name)?;
        }
    }
    let addresses = nodes.iter().map(|node| node.address(true)).collect::<Result<Vec<_>>>()?;
    let away = &nodes[3];
    away.run(&["down"])?;
    nodes[0].run(&["remove", "gone"])?;
    eventually("the removal is known", Duration::from_secs(5), || {
        ensure(nodes[1].peer("gone").is_err(), || "a still lists it".to_owned())
    })?;
    gone.run(&["down"]).ok();
    let World { internet, mut coordinator } = world;
    coordinator.kill()?;
    let deleted = tool("ip").args(["netns", "delete", coordinator.node.namespace.name()]).status()?;
    ensure(deleted.success(), || "the coordinator's namespace cannot be deleted".to_owned())?;
    for node in &nodes[..3] {
        node.run(&["down"])?;
    }
    move_to(&away.namespace, &routers[3], 2)?;
    for router in &routers[..3] {
        // The interface goes down: the kernel forgets what was masqueraded there.
        router.namespace.ip("link set wan down")?;
        router.namespace.ip("link set wan up")?;
    }

    // They come up from disk, at the same time, each after waiting for the coordinator in vain.
    std::thread::scope(|scope| {
        let starting: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.run(&["up", "--timeout", "20s"]))).collect();
        starting.into_iter().try_for_each(|up| up.join().map_err(|_| anyhow!("a thread panicked"))?.map(drop))
    })?;
    let start = Instant::now();
    let pairs = || {
        let all =
            nodes.iter().flat_map(|from| nodes.iter().zip(&addresses).map(move |(to, address)| (from, to, *address)));
        all.filter(|(from, to, _)| from.name != to.name)
    };
    let answered: Vec<Duration> = std::thread::scope(|scope| {
        let asking: Vec<_> = pairs()
            .map(|(from, to, address)| {
                scope.spawn(move || {
                    let what = format!("{} answers {}", to.name, from.name);
                    eventually(&what, ALL_ANSWER, || {
                        let seen = from.icmp(address, &["-c", "1", "-W", "1"])?;
                        ensure(seen.received == 1, || format!("path {:?}", from.peer(&to.name).map(|p| p.path)))?;
                        Ok(start.elapsed())
                    })
                })
            })
            .collect();
        asking.into_iter().map(|ping| ping.join().map_err(|_| anyhow!("a thread panicked"))?).collect::<Result<_>>()
    })?;
    println!(
        "{} pairs answered, the last after {} ms",
        answered.len(),
        answered.iter().max().map_or(0, Duration::as_millis)
    );
    eventually("all is direct again", Duration::from_secs(10), || {
        pairs().try_for_each(|(from, to, _)| {
            ensure(from.path(&to.name)? == PathKind::Direct, || format!("{} to {} is not direct", from.name, to.name))
        })
    })?;
    eventually("d knows of the removal", Duration::from_secs(10), || {
        ensure(away.peer("gone").is_err(), || "it lists gone".to_owned())
    })?;
    // The internet is no longer needed.
    drop(internet);
    Ok(())
}

/// Each round: while an invite is asked for and a machine joins with the last answered one, the coordinator is killed,
/// each time at another moment.
fn kill_loop() -> Result<()> {
    let rounds: u8 = if std::env::var_os("MESHD_LAB_SHORT").is_some() { 10 } else { 50 };
    let mut lab = net::public()?;
    let admin = Node::new("a", super::join::namespace(&lab, "a"));
    admin.up(&lab.world.coordinator.claim()?)?;
    let mut unused: Vec<String> = vec![admin.invite()?];
    let mut joined: Vec<Node> = Vec::new();
    let (mut invites_answered, mut killed_in_flight) = (0, 0);
    for round in 0..rounds {
        eventually("the admin is connected", Duration::from_secs(15), || {
            ensure(admin.status()?.coordinator.connected, || "not connected".to_owned())
        })?;
        let node = Node::new(&format!("n{round}"), lab.world.internet.host(&format!("n{round}"), 100 + round)?);
        let token = unused.pop().context("no invite is left")?;
        let (invite, join) = std::thread::scope(|scope| -> Result<_> {
            let invite = scope.spawn(|| admin.invite());
            let join = scope.spawn(|| {
                let mut command = node.meshd(&["up", "--name", &node.name, "--timeout", "4s"]);
                node.namespace.output(command.env("MESHD_TOKEN", &token))
            });
            // Spread over the whole of both requests, which take less than a tenth of a second, and a little beyond.
            let_pass(Duration::from_millis(u64::from(round) * 37 % 120));
            lab.world.coordinator.kill()?;
            lab.world.coordinator.restart()?;
            let died = |_| anyhow::anyhow!("a request's thread panicked");
            Ok((invite.join().map_err(died)?, join.join().map_err(died)??))
        })?;
        match invite {
            Ok(token) => {
                invites_answered += 1;
                unused.push(token);
            }
            Err(_) => killed_in_flight += 1,
        }
        if join.status.success() {
            node.run(&["down"])?;
            joined.push(node);
        } else {
            killed_in_flight += 1;
            // Not answered: either way is right. The next round needs an invite that is certainly good.
            eventually("the admin can invite", Duration::from_secs(15), || {
                unused.push(admin.invite()?);
                Ok(())
            })?;
            let _ = node.run(&["down"]);
        }
    }
    println!("{} joined, {invites_answered} invited, {killed_in_flight} requests unanswered", joined.len());
    ensure(!joined.is_empty(), || "nothing was ever answered: the loop shows nothing".to_owned())?;
    // Every answered join is in the store, for a node that learns everything from there.
    let last = Node::new("last", lab.world.internet.host("last", 99)?);
    let token = eventually("the admin can invite", Duration::from_secs(15), || admin.invite())?;
    last.up(&token)?;
    for node in &joined {
        eventually(&format!("{} is known", node.name), Duration::from_secs(10), || last.peer(&node.name).map(drop))?;
    }
    // Every answered invite can be redeemed.
    for (number, token) in (0u8..).zip(unused.iter().take(5)) {
        let name = format!("late{number}");
        Node::new(&name, lab.world.internet.host(&name, 90 + number)?).up(token)?;
    }
    Ok(())
}

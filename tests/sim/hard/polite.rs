//! Nobody suffers from our punching: strangers, small routers, the peer's own NAT.

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use meshd::wire::probe::{self, Candidate, CandidateKind, MessageKind, PeerMessage, ProbeKeys, Punch, Role};

    use crate::dice::Dice;
    use crate::hard::cell::{stage, stage_with};
    use crate::scenario::Scenario;
    use crate::sim::Sim;
    use crate::town::Families;
    use crate::world::{Tapped, World};

    const SECOND: Duration = Duration::from_secs(1);

    /// A member with its keys names a stranger's address as its own, in every way there is.
    #[test]
    fn a_peer_that_lies_about_where_it_is_moves_three_packets_a_second() {
        for model in ["eim+apdf", "apdm+apdf", "apdm+apdf+seq", "linux+block512"] {
            let s = Scenario { seed: 3, ..Scenario::pair(model.parse().unwrap(), "linux".parse().unwrap()) };
            let (mut sim, _, a, b) = stage(&s);
            let (mine, theirs) = (sim.node(a).wg, sim.node(b).wg);
            let secret = sim.keys(b).wg;
            sim.kill(b, true);
            let keys = ProbeKeys::derive(&secret, &theirs, &mine).unwrap();
            let victim: std::net::IpAddr = "198.51.100.222".parse().unwrap();
            let candidates: Vec<Candidate> = (0..16)
                .map(|i| Candidate {
                    addr: SocketAddr::new(victim, 1000 + i),
                    kind: [CandidateKind::Mapped, CandidateKind::Reflexive, CandidateKind::Host][usize::from(i) % 3],
                })
                .collect();
            sim.world.tap();
            sim.ping(a, b, 1_000, Duration::from_millis(20));
            let mut hits = Vec::new();
            let mut number = u64::MAX / 2;
            for tick in 0..400u64 {
                let kinds = [MessageKind::Call, MessageKind::Answer, MessageKind::Go, MessageKind::Ports];
                for kind in kinds.into_iter().filter(|_| tick % 10 == 0) {
                    number += 1;
                    let role =
                        [Role::Opens, Role::Scans, Role::Grid, Role::Strides][usize::try_from(tick / 10 % 4).unwrap()];
                    let message = PeerMessage {
                        v: 1,
                        n: number,
                        kind,
                        round: u32::try_from(tick / 40).unwrap(),
                        candidates: candidates.clone(),
                        mapping: Some("address-and-port-dependent".into()),
                        filtering: Some("endpoint-independent".into()),
                        udp: Some(true),
                        primed: Some(true),
                        punch: Some(Punch { role, range: Some((1024, u16::MAX)), ..Punch::default() }),
                        ..PeerMessage::default()
                    };
                    let sealed = probe::seal(&keys, &message, [u8::try_from(tick % 251).unwrap(); 24]);
                    sim.forge_relayed(a, theirs, &sealed);
                }
                sim.run_for(Duration::from_millis(50));
                let now = sim.now();
                let outside =
                    |t: &Tapped| t.destination.ip() == victim && !t.source.ip().to_string().starts_with("192.168");
                hits.extend(sim.world.tapped().iter().filter(|t| outside(t)).map(|_| now));
            }
            assert!(!hits.is_empty(), "{model}: it is tried");
            // A tick is 50 ms, so a window of a second may show as one tick less.
            for window in hits.windows(4) {
                assert!(window[3].since(window[0]) >= SECOND - Duration::from_millis(50), "{model}: {window:?}");
            }
            sim.finish();
        }
    }

    /// Behind a proxy the coordinator cannot vouch for anybody: easy pairs still meet, hard punches are not made.
    #[test]
    fn without_a_voucher_easy_pairs_still_meet() {
        for (a, b, direct) in
            [("eim+apdf", "linux", true), ("eim+adf", "apdm+apdf", true), ("apdm+apdf", "eim+apdf", false)]
        {
            for seed in 0..10 {
                let s = Scenario { seed, ..Scenario::pair(a.parse().unwrap(), b.parse().unwrap()) };
                let (mut sim, _, a, b) = stage_with(&s, |sim| sim.proxied = true);
                sim.ping(a, b, 60, Duration::from_millis(50));
                let both = |s: &Sim| s.is_surely_direct(a, b) && s.is_surely_direct(b, a);
                assert_eq!(sim.run_until(3 * SECOND, both), direct, "{s}");
                sim.finish();
            }
        }
    }

    /// Fifty peers at once from behind one home router whose table holds 300 flows; somebody else uses that router too.
    #[test]
    fn fifty_peers_behind_a_small_router() {
        let mut world = World::new(Dice::new(5).fork("world"), crate::aloud());
        let mut town = crate::town::Town::new(
            &mut world,
            crate::link::Link::default(),
            20_000,
            Families::V4,
            Dice::new(5).fork("town"),
        );
        let server = town.server(&mut world, 30_000);
        let home = town.site(&mut world, "home", &["linux+table300".parse().unwrap()], None);
        let me = home.host(&mut world, "me", 1);
        let neighbour = home.host(&mut world, "neighbour", 2);
        let sites: Vec<_> = (0..50)
            .map(|i| {
                let name = format!("peer{i}");
                let site = town.site(&mut world, &name, &["eim+apdf".parse().unwrap()], None);
                (site.host(&mut world, &name, 1), name)
            })
            .collect();
        let mut sim = Sim::new("none", 5, world, server, Duration::from_millis(30));
        sim.limits.extra_sockets = 512;
        sim.checks = true;
        let a = sim.add_node("me", me);
        let peers: Vec<_> = sites.iter().map(|(host, name)| sim.add_node(name, *host)).collect();
        sim.start_server();
        sim.start(a);
        peers.iter().for_each(|p| sim.start(*p));
        assert!(sim.run_until(20 * SECOND, |s| s.is_synced(a) && peers.iter().all(|p| s.is_synced(*p))));
        sim.run_for(5 * SECOND);
        peers.iter().for_each(|p| {
            sim.ping(a, *p, 100, Duration::from_millis(50));
        });
        // The neighbour opens a flow every 100 ms; each must get out.
        sim.world.tap();
        let outside: SocketAddr = "203.0.113.2:9".parse().unwrap();
        for port in 0..50 {
            sim.world.send(neighbour, 7_000 + port, outside, vec![port as u8]);
            sim.run_for(Duration::from_millis(100));
        }
        let out = sim.world.tapped().iter().filter(|t| t.destination == outside).count();
        assert_eq!(out, 100, "each is seen in the home and on the internet");
        for peer in &peers {
            assert!(sim.is_surely_direct(a, *peer), "{:?}", sim.peer_status(a, *peer).path);
        }
        sim.finish();
    }
}

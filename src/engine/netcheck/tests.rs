use std::collections::BTreeMap;

use super::Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
use super::*;
use crate::wire::stun::ServerLayout;

const ALL: [Behaviour; 3] = [EndpointIndependent, AddressDependent, AddressAndPortDependent];
const ONE_WAY: Duration = Duration::from_millis(20);

/// A NAT with one public address. What it keeps is told by how much of the remote address goes into the key.
struct Nat {
    mapping: Behaviour,
    filtering: Behaviour,
    public: IpAddr,
    ports: BTreeMap<(SocketSlot, Option<IpAddr>, Option<u16>), u16>,
    allowed: Vec<(u16, SocketAddr)>,
    /// The port of the `n`-th mapping.
    choose: fn(u16) -> u16,
    hairpins: bool,
}

fn scope(behaviour: Behaviour, remote: SocketAddr) -> (Option<IpAddr>, Option<u16>) {
    match behaviour {
        EndpointIndependent => (None, None),
        AddressDependent => (Some(remote.ip()), None),
        AddressAndPortDependent => (Some(remote.ip()), Some(remote.port())),
    }
}

impl Nat {
    fn new(mapping: Behaviour, filtering: Behaviour, public: IpAddr) -> Self {
        let choose = |n| 40_000 + n;
        Self { mapping, filtering, public, ports: BTreeMap::new(), allowed: Vec::new(), choose, hairpins: false }
    }

    fn outbound(&mut self, slot: SocketSlot, to: SocketAddr) -> SocketAddr {
        let (ip, port) = scope(self.mapping, to);
        let next = (self.choose)(u16::try_from(self.ports.len()).unwrap());
        let port = *self.ports.entry((slot, ip, port)).or_insert(next);
        self.allowed.push((port, to));
        SocketAddr::new(self.public, port)
    }

    fn inbound(&self, from: SocketAddr, to: SocketAddr) -> Option<SocketSlot> {
        let open = self
            .allowed
            .iter()
            .any(|(port, remote)| *port == to.port() && scope(self.filtering, *remote) == scope(self.filtering, from));
        let owner = self.ports.iter().find(|(_, port)| **port == to.port())?;
        open.then_some(owner.0.0)
    }
}

fn run(
    servers: &[SocketAddr],
    layout: &ServerLayout,
    nat: &mut Nat,
    mut lost: impl FnMut(SocketSlot, SocketAddr, &[u8]) -> bool,
) -> (local::Netcheck, Duration) {
    let mut now = Now::from_millis(5);
    let start = now;
    let mut check = Netcheck::new(servers.to_vec(), 1, now);
    // When it arrives, at which socket, from where, what.
    let mut network: Vec<(Now, SocketSlot, SocketAddr, Vec<u8>)> = Vec::new();
    loop {
        while let Some((slot, to, bytes)) = check.poll_transmit() {
            let source = nat.outbound(slot, to);
            if let Some(slot) = nat.inbound(source, to).filter(|_| to.ip() == nat.public && nat.hairpins) {
                network.push((now + Duration::from_millis(1), slot, source, bytes));
                continue;
            }
            if lost(slot, to, &bytes) || !layout.endpoints.contains(&to) {
                continue;
            }
            let Some(answer) = stun::answer(&bytes, source, to, layout) else { continue };
            if let Some(slot) = nat.inbound(answer.send_from, source) {
                network.push((now + ONE_WAY + ONE_WAY, slot, answer.send_from, answer.bytes));
            }
        }
        network.sort_by_key(|(at, ..)| *at);
        let Some(deadline) = check.poll_timeout() else { break };
        match network.first() {
            Some((at, ..)) if *at <= deadline => {
                let (at, slot, from, bytes) = network.remove(0);
                now = at;
                check.handle_datagram(slot, from, &bytes, now);
            }
            _ => {
                now = deadline;
                check.handle_timeout(now);
            }
        }
    }
    (check.finish(), now.since(start))
}

fn endpoints(list: &[&str]) -> (Vec<SocketAddr>, ServerLayout) {
    let endpoints: Vec<SocketAddr> = list.iter().map(|e| e.parse().unwrap()).collect();
    (endpoints[..1].to_vec(), ServerLayout { endpoints })
}

const TWO_BY_TWO: [&str; 4] = ["203.0.113.1:3478", "203.0.113.1:3479", "203.0.113.2:3478", "203.0.113.2:3479"];
const TWO_BY_TWO_V6: [&str; 4] =
    ["[2001:db8::1]:3478", "[2001:db8::1]:3479", "[2001:db8::2]:3478", "[2001:db8::2]:3479"];

#[test]
fn all_nine_kinds_are_told_apart_with_a_full_server_in_both_families() {
    for (list, public) in [(TWO_BY_TWO, "198.51.100.7"), (TWO_BY_TWO_V6, "2001:db8:7::7")] {
        let (servers, layout) = endpoints(&list);
        for mapping in ALL {
            for filtering in ALL {
                let mut nat = Nat::new(mapping, filtering, public.parse().unwrap());
                let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
                assert_eq!(report.mapping.as_deref(), Some(mapping.name()), "{mapping:?} × {filtering:?}");
                assert_eq!(report.filtering.as_deref(), Some(filtering.name()), "{mapping:?} × {filtering:?}");
                assert!(report.udp);
                assert_eq!(report.ipv6, public.contains(':'));
                assert_eq!(report.reflexive, [format_address(public, 40_000)]);
                assert_eq!(report.servers[0].rtt_ms, Some(40.0));
                assert!(took <= LIMIT, "took {took:?}");
            }
        }
    }
}

fn format_address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

#[test]
fn a_nat_that_maps_by_destination_shows_how_it_chooses_ports() {
    let (servers, layout) = endpoints(&TWO_BY_TWO);
    type Choice = fn(u16) -> u16;
    let choices: [(Choice, &str, &str); 3] = [
        (|n| 40_000 + 2 * n, "sequential", "counts its ports up"),
        (|n| 20_000 + n * 331 % 512, "block", "takes its ports from about"),
        (|n| (n + 3).wrapping_mul(24_593) | 1_024, "random", "takes any port"),
    ];
    for (choose, name, said) in choices {
        for mapping in [AddressDependent, AddressAndPortDependent] {
            let public = "198.51.100.7".parse().unwrap();
            let mut nat = Nat { choose, ..Nat::new(mapping, AddressAndPortDependent, public) };
            let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
            assert_eq!(report.port_model.map(PortModel::name), Some(name), "{report:?}");
            assert!(report.meaning.contains(said), "{}", report.meaning);
            assert!(took <= LIMIT, "took {took:?}");
            assert_eq!(nat.ports.keys().filter(|(slot, ..)| matches!(slot, SocketSlot::Burst(_))).count(), 16);
            assert_eq!(report.hairpin, None, "not asked");
        }
    }
}

#[test]
fn what_a_hard_nat_means_depends_on_the_sockets_there_may_be() {
    let mut check = Netcheck::new(vec!["203.0.113.1:3478".parse().unwrap()], 1, Now::ZERO);
    let mut meaning = |sockets, model| {
        check.set_extra_sockets(sockets);
        check.meaning(true, true, &[], Some(AddressAndPortDependent), Some(AddressAndPortDependent), Some(model))
    };
    let counting = PortModel::Sequential { step: 1, per_second: 3 };
    assert!(meaning(0, counting).contains("only with peers whose NAT is easier"));
    assert!(meaning(8, counting).contains("can be foreseen"));
    assert!(meaning(8, PortModel::Random).contains("only with peers whose NAT is easier"));
    assert!(meaning(256, PortModel::Random).contains("drawn at random"));
    assert!(meaning(32, PortModel::Block { low: 1, high: 9 }).contains("small block"));
}

#[test]
fn nats_are_counted_up_to_the_first_public_router() {
    let depth = |hops: &[&str]| nat_depth(&hops.iter().map(|hop| hop.parse().ok()).collect::<Vec<_>>());
    assert_eq!(depth(&["192.168.1.1", "203.0.113.1", "10.0.0.1", ""]), Some(1));
    assert_eq!(depth(&["192.168.1.1", "100.64.0.1", "203.0.113.1"]), Some(2));
    assert_eq!(depth(&["203.0.113.1"]), Some(0));
    for silent in [&["192.168.1.1", "", "203.0.113.1"][..], &["", "203.0.113.1"], &["10.0.0.1", "10.0.0.2"], &[]] {
        assert_eq!(depth(silent), None, "{silent:?}");
    }
}

#[test]
fn hairpinning_is_seen_and_its_absence_too() {
    let (servers, layout) = endpoints(&TWO_BY_TWO);
    for hairpins in [true, false] {
        for filtering in ALL {
            let public = "198.51.100.7".parse().unwrap();
            let mut nat = Nat { hairpins, ..Nat::new(EndpointIndependent, filtering, public) };
            let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| false);
            assert_eq!(report.hairpin, Some(hairpins), "{filtering:?}");
            assert_eq!(report.port_model, None, "its sockets' own ports are not known");
            assert!(took <= LIMIT);
        }
    }
}

#[test]
fn a_kept_port_and_a_carrier_s_address_are_seen() {
    let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
    let other: SocketAddr = "192.0.2.9:3478".parse().unwrap();
    let mut check = Netcheck::new(vec![server, other], 1, Now::ZERO);
    check.set_local_addresses(vec!["100.64.3.4".parse().unwrap()]);
    check.set_local_port(SocketSlot::MappingV4, 50_000);
    for _ in 0..2 {
        let (slot, to, bytes) = check.poll_transmit().unwrap();
        let seen = "198.51.100.7:50000".parse().unwrap();
        let answer = stun::answer(&bytes, seen, to, &ServerLayout { endpoints: vec![to] }).unwrap();
        check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(10));
    }
    assert_eq!(check.finish().port_model, Some(PortModel::Preserving));
    assert_eq!(check.finish().double_nat, Some(true));
}

#[test]
fn losing_every_question_twice_changes_nothing() {
    let (servers, layout) = endpoints(&TWO_BY_TWO);
    for mapping in ALL {
        for filtering in ALL {
            let mut nat = Nat::new(mapping, filtering, "198.51.100.7".parse().unwrap());
            let mut sent = BTreeMap::new();
            let lost_twice = |slot: SocketSlot, to: SocketAddr, bytes: &[u8]| {
                let times = sent
                    .entry((slot, to, bytes.get(20..28).map(<[u8]>::to_vec).filter(|_| bytes.len() > 28)))
                    .or_insert(0);
                *times += 1;
                *times <= 2
            };
            let (report, took) = run(&servers, &layout, &mut nat, lost_twice);
            assert_eq!(report.mapping.as_deref(), Some(mapping.name()));
            assert_eq!(report.filtering.as_deref(), Some(filtering.name()));
            assert!(took <= LIMIT, "took {took:?}");
        }
    }
}

#[test]
fn one_address_with_two_ports_tells_only_what_it_can() {
    // As the coordinator offers itself: both ports on the list.
    let (_, layout) = endpoints(&["203.0.113.1:3478", "203.0.113.1:3479"]);
    for mapping in ALL {
        for filtering in ALL {
            let mut nat = Nat::new(mapping, filtering, "198.51.100.7".parse().unwrap());
            let (report, _) = run(&layout.endpoints, &layout, &mut nat, |_, _, _| false);
            let port_dependent = mapping == AddressAndPortDependent;
            assert_eq!(report.mapping.as_deref(), port_dependent.then_some(mapping.name()));
            let strict = filtering == AddressAndPortDependent;
            assert_eq!(report.filtering.as_deref(), strict.then_some(filtering.name()));
            assert_eq!(report.meaning.contains("too few addresses"), !port_dependent);
        }
    }
}

#[test]
fn two_servers_without_alternates_tell_the_mapping() {
    let servers: Vec<SocketAddr> = vec!["203.0.113.1:3478".parse().unwrap(), "192.0.2.9:19302".parse().unwrap()];
    for (mapping, expected) in [
        (EndpointIndependent, EndpointIndependent),
        (AddressDependent, AddressAndPortDependent),
        (AddressAndPortDependent, AddressAndPortDependent),
    ] {
        let mut nat = Nat::new(mapping, AddressDependent, "198.51.100.7".parse().unwrap());
        // Each server knows only itself.
        let mut check = Netcheck::new(servers.clone(), 1, Now::ZERO);
        while let Some((slot, to, bytes)) = check.poll_transmit() {
            let source = nat.outbound(slot, to);
            let answer = stun::answer(&bytes, source, to, &ServerLayout { endpoints: vec![to] }).unwrap();
            check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(30));
        }
        while let Some(at) = check.poll_timeout() {
            check.handle_timeout(at);
            while check.poll_transmit().is_some() {}
        }
        let report = check.finish();
        assert_eq!(report.mapping.as_deref(), Some(expected.name()));
        assert_eq!(report.filtering, None);
        assert!(report.meaning.contains("no server could answer from another address"), "{}", report.meaning);
    }
}

#[test]
fn blocked_udp_is_said_in_time() {
    let (servers, layout) = endpoints(&TWO_BY_TWO);
    let mut nat = Nat::new(EndpointIndependent, EndpointIndependent, "198.51.100.7".parse().unwrap());
    let (report, took) = run(&servers, &layout, &mut nat, |_, _, _| true);
    assert!(!report.udp && report.reflexive.is_empty() && report.mapping.is_none());
    assert!(report.meaning.starts_with("UDP does not reach"));
    assert_eq!(took, PATIENCE);
    assert!(Netcheck::new(Vec::new(), 1, Now::ZERO).is_done(), "no server, nothing to wait for");
}

#[test]
fn no_nat_is_recognised() {
    let server: SocketAddr = "203.0.113.1:3478".parse().unwrap();
    let me: SocketAddr = "198.51.100.7:50000".parse().unwrap();
    let mut check = Netcheck::new(vec![server], 1, Now::ZERO);
    check.set_local_addresses(vec![me.ip()]);
    let (slot, to, bytes) = check.poll_transmit().unwrap();
    let answer = stun::answer(&bytes, me, to, &ServerLayout { endpoints: vec![to] }).unwrap();
    check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(10));
    assert!(check.finish().meaning.starts_with("There is no NAT"));
}

#[test]
fn answers_from_strangers_and_to_other_questions_do_not_count() {
    let (servers, layout) = endpoints(&TWO_BY_TWO);
    let mut check = Netcheck::new(servers.clone(), 1, Now::ZERO);
    let (slot, to, bytes) = check.poll_transmit().unwrap();
    let me: SocketAddr = "198.51.100.7:50000".parse().unwrap();
    let answer = stun::answer(&bytes, me, to, &layout).unwrap();
    let stranger = "192.0.2.66:3478".parse().unwrap();
    check.handle_datagram(slot, stranger, &answer.bytes, Now::from_millis(10));
    check.handle_datagram(SocketSlot::FilteringV4, to, &answer.bytes, Now::from_millis(10));
    let other = stun::binding_request(&TransactionId([9; 12]), Change::default());
    let unasked = stun::answer(&other, stranger, to, &layout).unwrap();
    check.handle_datagram(slot, to, &unasked.bytes, Now::from_millis(10));
    check.handle_datagram(slot, to, b"junk", Now::from_millis(10));
    assert!(!check.finish().udp);
    check.handle_datagram(slot, to, &answer.bytes, Now::from_millis(40));
    assert_eq!(check.finish().reflexive, [me]);
}

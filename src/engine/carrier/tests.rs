//! The carrier in virtual time, against a relay that is reached, or not, and answers.

use proptest::prelude::*;

use super::*;

const PEER: WgKey = WgKey([2; 32]);
const SECRET: SessionSecret = SessionSecret::new([7; 32]);

fn relay() -> SocketAddr {
    "198.51.100.1:3478".parse().unwrap()
}

/// A carrier, its links, and a relay with half a round trip of this many milliseconds.
struct Rig {
    carrier: Carrier,
    now: Now,
    keys: SessionKeys,
    half_rtt: Duration,
    /// The two directions of UDP pass.
    up: bool,
    down: bool,
    opens: usize,
    heres: usize,
    pings: usize,
    wishes: Vec<Wish>,
    relay: Vec<bool>,
    gone: Vec<WgKey>,
    sent_down: u64,
    in_flight: VecDeque<(Now, Vec<u8>)>,
    answers_opens: bool,
    open_due: Option<Now>,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self {
            carrier: Carrier::new(),
            now: Now::from_millis(1_000),
            keys: SECRET.keys(),
            half_rtt: Duration::from_millis(15),
            up: true,
            down: true,
            opens: 0,
            heres: 0,
            pings: 0,
            wishes: Vec::new(),
            relay: Vec::new(),
            gone: Vec::new(),
            sent_down: 0,
            in_flight: VecDeque::new(),
            answers_opens: true,
            open_due: None,
        };
        rig.carrier.peer(PeerId(1), PEER);
        rig.carrier.control(true, rig.now);
        rig.carrier.websocket(true, rig.now);
        rig.settle();
        rig
    }

    fn settle(&mut self) {
        while let Some(output) = self.carrier.poll_output() {
            match output {
                Output::Open => {
                    self.opens += 1;
                    self.open_due = self.answers_opens.then(|| self.now + self.half_rtt * 2);
                }
                Output::Send { to, bytes } => {
                    let header = relay_udp::decode(&bytes).unwrap();
                    assert!(to == relay() && header.kind == Kind::Ping && self.keys.up.verify(&bytes));
                    self.pings += 1;
                    self.wishes.push(Wish::from_name(header.name));
                    if self.up && self.down {
                        self.sent_down += 1;
                        let mut pong = bytes;
                        let header = Header { kind: Kind::Pong, counter: self.sent_down, ..header };
                        self.keys.down.seal(&header, &mut pong);
                        self.in_flight.push_back((self.now + self.half_rtt * 2, pong));
                    }
                }
                Output::Here => self.heres += 1,
                Output::Relay(up) => self.relay.push(up),
                Output::Gone(peer) => self.gone.push(peer),
            }
        }
    }

    /// Passes time, with a packet to the peer every `every` if there is traffic. Returns how many went by UDP.
    fn pass(&mut self, time: Duration, every: Option<Duration>) -> usize {
        let end = self.now + time;
        let mut next_packet = self.now;
        let mut by_udp = 0;
        let mut steps = 0;
        loop {
            steps += 1;
            assert!(steps < 200_000, "a busy loop at {:?}", self.now);
            if every.is_some() && next_packet <= self.now {
                let mut datagram = vec![0; HEADER + 100];
                by_udp += usize::from(self.carrier.seal(&PEER, &mut datagram, self.now).is_some());
                next_packet = self.now + every.unwrap_or_default();
            }
            if self.open_due.is_some_and(|at| at <= self.now) {
                self.open_due = None;
                self.carrier.opened(9, &SECRET, vec![relay()], self.now);
                self.keys = SECRET.keys();
            }
            while self.in_flight.front().is_some_and(|(at, _)| *at <= self.now) {
                let (_, bytes) = self.in_flight.pop_front().unwrap();
                if self.down {
                    // A Pong of a session that has been given up is one of no session.
                    let _ = self.carrier.receive(&bytes, relay(), self.now);
                }
            }
            self.carrier.handle_timeout(self.now);
            self.settle();
            let wake = self.carrier.poll_timeout();
            assert!(wake.is_none_or(|at| at > self.now), "the same time again: {:?}", self.carrier.state);
            let in_flight = self.in_flight.front().map(|(at, _)| *at);
            let packet = every.map(|_| next_packet);
            let next = [wake, in_flight, packet, self.open_due].into_iter().flatten().min().unwrap_or(end);
            if next >= end {
                self.now = end;
                return by_udp;
            }
            self.now = next;
        }
    }

    fn traffic(&mut self, time_ms: u64) -> usize {
        self.pass(Duration::from_millis(time_ms), Some(Duration::from_millis(20)))
    }

    fn quiet(&mut self, time_s: u64) {
        assert_eq!(self.pass(Duration::from_secs(time_s), None), 0);
    }

    fn down_datagram(&mut self, kind: Kind, name: Name, payload: &[u8]) -> Vec<u8> {
        self.sent_down += 1;
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(payload);
        let header = Header { kind, counter: self.sent_down, session: 9, name };
        self.keys.down.seal(&header, &mut bytes);
        bytes
    }
}

#[test]
fn at_the_start_udp_is_there_when_the_websocket_is_late() {
    let mut rig = Rig::new();
    rig.carrier = Carrier::new();
    rig.carrier.peer(PeerId(1), PEER);
    rig.relay.clear();
    rig.carrier.control(true, rig.now);
    rig.pass(Duration::from_millis(140), None);
    assert_eq!((rig.opens, rig.relay.as_slice()), (0, &[][..]), "the WebSocket's head start");
    rig.pass(Duration::from_millis(100), None);
    assert_eq!((rig.opens, rig.relay.as_slice()), (1, &[true][..]));
    assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
    // In time, it is enough: nothing is asked for before there is something to relay.
    let mut rig = Rig::new();
    rig.pass(Duration::from_secs(60), None);
    assert_eq!(rig.opens, 0);
}

#[test]
fn an_idle_node_sends_nothing_and_has_the_websocket() {
    let mut rig = Rig::new();
    rig.quiet(3_600);
    assert_eq!((rig.opens, rig.pings, rig.carrier.carries()), (0, 0, Some(Carries::WebSocket)));
    assert_eq!((rig.relay.as_slice(), rig.carrier.poll_timeout()), (&[true][..], None));
}

#[test]
fn traffic_wakes_udp_and_moves_to_it_within_three_round_trips() {
    let mut rig = Rig::new();
    assert_eq!(rig.traffic(80), 0, "the WebSocket carries until UDP is proven");
    assert_eq!(rig.traffic(100), 5);
    assert_eq!((rig.opens, rig.carrier.carries()), (1, Some(Carries::Udp)));
    assert_eq!(rig.wishes, [Wish::Nothing, Wish::DeliverHere]);
    assert_eq!(rig.carrier.rtt(), Some(Duration::from_millis(30)));
    assert_eq!(rig.relay, [true]);
}

#[test]
fn a_packet_that_came_wakes_it_too() {
    let mut rig = Rig::new();
    rig.carrier.came_by_websocket(rig.now);
    rig.quiet(1);
    assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
}

#[test]
fn after_half_a_minute_without_traffic_udp_is_let_go_and_comes_back_without_asking_the_coordinator() {
    let mut rig = Rig::new();
    rig.traffic(1_000);
    let before = rig.pings;
    rig.quiet(29);
    assert!(rig.pings - before <= 8, "{} pings in a quiet half minute", rig.pings - before);
    assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
    rig.quiet(3);
    assert_eq!((rig.carrier.carries(), rig.heres), (Some(Carries::WebSocket), 1));
    assert_eq!(rig.wishes.last(), Some(&Wish::DeliverElsewhere));
    let before = rig.pings;
    rig.quiet(3_600);
    assert_eq!(rig.pings, before);
    rig.traffic(100);
    assert_eq!((rig.opens, rig.carrier.carries()), (1, Some(Carries::Udp)));
}

#[test]
fn silence_of_either_direction_under_traffic_is_left_within_a_second() {
    for (up, down) in [(false, true), (true, false), (false, false)] {
        for phase in 0..30 {
            let mut rig = Rig::new();
            rig.traffic(2_000 + 17 * phase);
            assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
            (rig.up, rig.down) = (up, down);
            rig.traffic(1_000);
            assert_eq!(
                (rig.carrier.carries(), rig.heres),
                (Some(Carries::WebSocket), 1),
                "up {up} down {down} {phase}"
            );
            assert_eq!(rig.relay, [true], "there was a relay all the time");
        }
    }
}

#[test]
fn a_lost_ping_or_two_changes_nothing() {
    let mut rig = Rig::new();
    rig.traffic(2_000);
    for _ in 0..20 {
        rig.up = false;
        rig.traffic(350);
        rig.up = true;
        rig.traffic(700);
        assert_eq!((rig.carrier.carries(), rig.heres), (Some(Carries::Udp), 0));
    }
}

#[test]
fn a_slow_relay_is_given_time() {
    let mut rig = Rig::new();
    rig.half_rtt = Duration::from_millis(400);
    rig.traffic(10_000);
    assert_eq!((rig.carrier.carries(), rig.heres), (Some(Carries::Udp), 0));
}

#[test]
fn blocked_udp_is_tried_ever_less_often_and_found_when_it_opens() {
    let mut rig = Rig::new();
    rig.up = false;
    rig.traffic(3_600_000);
    assert_eq!(rig.carrier.carries(), Some(Carries::WebSocket));
    assert!(rig.pings <= 60, "{} pings in an hour", rig.pings);
    rig.up = true;
    rig.carrier.network_changed(rig.now);
    rig.traffic(200);
    assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
}

#[test]
fn after_a_failure_it_comes_back_by_itself() {
    let mut rig = Rig::new();
    rig.traffic(2_000);
    rig.up = false;
    rig.traffic(1_500);
    rig.up = true;
    assert_eq!(rig.carrier.carries(), Some(Carries::WebSocket));
    rig.traffic(6_000);
    assert_eq!((rig.carrier.carries(), rig.opens), (Some(Carries::Udp), 1));
}

#[test]
fn a_coordinator_that_does_not_relay_by_udp_is_left_alone() {
    let mut rig = Rig::new();
    rig.answers_opens = false;
    rig.traffic(100);
    rig.carrier.refused(rig.now);
    rig.traffic(500_000);
    assert_eq!((rig.opens, rig.carrier.carries()), (1, Some(Carries::WebSocket)));
    // Another coordinator, perhaps.
    rig.answers_opens = true;
    rig.carrier.control(false, rig.now);
    rig.carrier.control(true, rig.now);
    rig.traffic(200);
    assert_eq!((rig.opens, rig.carrier.carries()), (2, Some(Carries::Udp)));
}

#[test]
fn a_coordinator_that_restarted_is_asked_for_a_new_session() {
    let mut rig = Rig::new();
    rig.traffic(1_000);
    rig.quiet(60);
    rig.carrier.control(false, rig.now);
    rig.carrier.control(true, rig.now);
    rig.traffic(200);
    assert_eq!((rig.opens, rig.carrier.carries()), (2, Some(Carries::Udp)));
}

#[test]
fn without_the_websocket_udp_stays_awake_and_is_the_relay() {
    let mut rig = Rig::new();
    rig.traffic(1_000);
    rig.carrier.websocket(false, rig.now);
    rig.quiet(600);
    assert_eq!((rig.carrier.carries(), rig.relay.as_slice()), (Some(Carries::Udp), &[true][..]));
    rig.up = false;
    rig.quiet(10);
    assert_eq!((rig.carrier.carries(), rig.relay.as_slice()), (None, &[true, false][..]));
    rig.carrier.websocket(true, rig.now);
    rig.quiet(1);
    assert_eq!(rig.relay, [true, false, true]);
}

#[test]
fn an_unreachable_relay_is_left_at_once() {
    let mut rig = Rig::new();
    rig.traffic(1_000);
    rig.carrier.send_failed("192.0.2.9:9".parse().unwrap(), rig.now);
    assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
    rig.carrier.send_failed(relay(), rig.now);
    rig.settle();
    assert_eq!((rig.carrier.carries(), rig.heres), (Some(Carries::WebSocket), 1));
}

#[test]
fn what_comes_is_believed_only_with_a_right_and_new_tag() {
    let mut rig = Rig::new();
    rig.traffic(1_000);
    let (from, now) = (relay(), rig.now);
    let good = rig.down_datagram(Kind::Recv, Name::of(&PEER), b"ciphertext");
    let mut forged = good.clone();
    forged[HEADER] ^= 1;
    assert_eq!(rig.carrier.receive(&forged, from, now), Err(Drop::BadRelayTag));
    assert_eq!(rig.carrier.receive(&good, from, now), Ok(Some(PEER)));
    assert_eq!(rig.carrier.receive(&good, from, now), Err(Drop::RelayReplayed));
    assert_eq!(rig.carrier.receive(&good[..20], from, now), Err(Drop::BadRelayDatagram));
    let stranger = rig.down_datagram(Kind::Recv, Name([9; 8]), b"x");
    assert_eq!(rig.carrier.receive(&stranger, from, now), Err(Drop::UnknownRelaySender));
    let up = rig.down_datagram(Kind::Send, Name::of(&PEER), b"x");
    assert_eq!(rig.carrier.receive(&up, from, now), Err(Drop::BadRelayDatagram));
    let gone = rig.down_datagram(Kind::Gone, Name::of(&PEER), b"");
    assert_eq!(rig.carrier.receive(&gone, from, now), Ok(None));
    rig.settle();
    assert_eq!(rig.gone, [PEER]);
}

#[test]
fn peers_that_share_a_name_and_peers_that_went_use_the_websocket() {
    let mut rig = Rig::new();
    let mut twin = PEER;
    twin.0[31] = 99;
    rig.traffic(1_000);
    let now = rig.now;
    let by_udp = |carrier: &mut Carrier, key: &WgKey| carrier.seal(key, &mut [0; HEADER + 9], now).is_some();
    assert!(by_udp(&mut rig.carrier, &PEER) && !by_udp(&mut rig.carrier, &twin));
    rig.carrier.peer(PeerId(2), twin);
    assert!(!by_udp(&mut rig.carrier, &PEER) && !by_udp(&mut rig.carrier, &twin));
    rig.carrier.peer(PeerId(3), WgKey([3; 32]));
    assert!(by_udp(&mut rig.carrier, &WgKey([3; 32])));
    rig.carrier.peer_gone(PeerId(3));
    assert!(!by_udp(&mut rig.carrier, &WgKey([3; 32])));
}

#[test]
fn addresses_are_tried_together_and_the_one_that_answers_is_used() {
    let mut carrier = Carrier::new();
    let now = Now::from_millis(5);
    let at: Vec<SocketAddr> = ["192.0.2.1:1", "192.0.2.2:2", "[2001:db8::1]:3", "192.0.2.4:4", "192.0.2.5:5"]
        .map(|a| a.parse().unwrap())
        .to_vec();
    carrier.opened(9, &SECRET, at.clone(), now);
    let tried: Vec<Output> = std::iter::from_fn(|| carrier.poll_output()).collect();
    let Some(Output::Send { bytes, .. }) = tried.get(2).cloned() else { panic!("{tried:?}") };
    assert_eq!(tried.len(), MAX_ADDRESSES);
    let mut pong = bytes;
    let header = relay_udp::decode(&pong).unwrap();
    SECRET.keys().down.seal(&Header { kind: Kind::Pong, counter: 1, ..header }, &mut pong);
    carrier.receive(&pong, at[2], now).unwrap();
    let next = std::iter::from_fn(|| carrier.poll_output()).find_map(|o| match o {
        Output::Send { to, .. } => Some(to),
        _ => None,
    });
    assert_eq!((next, carrier.carries()), (Some(at[2]), Some(Carries::Udp)));
}

proptest! {
    /// Whatever happens in whatever order: no busy loop, never UDP without a proof, and with both links and UDP up, UDP
    /// carries traffic in the end.
    #[test]
    fn it_always_finds_its_way_back(steps in proptest::collection::vec((0u8..10, 1u64..5_000), 1..40)) {
        let mut rig = Rig::new();
        for (what, ms) in steps {
            let now = rig.now;
            match what {
                0 => rig.up = !rig.up,
                1 => rig.down = !rig.down,
                2 => rig.carrier.websocket(false, now),
                3 => rig.carrier.websocket(true, now),
                4 => rig.carrier.control(false, now),
                5 => rig.carrier.control(true, now),
                6 => rig.carrier.network_changed(now),
                7 => rig.carrier.send_failed(relay(), now),
                _ => {}
            }
            rig.settle();
            if ms % 2 == 0 { rig.traffic(ms); } else { rig.pass(Duration::from_millis(ms), None); }
        }
        (rig.up, rig.down) = (true, true);
        rig.carrier.websocket(true, rig.now);
        rig.carrier.control(true, rig.now);
        rig.carrier.network_changed(rig.now);
        rig.settle();
        rig.traffic(12_000);
        prop_assert_eq!(rig.carrier.carries(), Some(Carries::Udp));
        prop_assert_eq!(rig.relay.last(), Some(&true));
    }
}

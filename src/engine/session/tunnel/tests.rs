//! Each test named `trap_x` shows that a bug of boringtun 0.7.1 does not reach through:
//!
//! | trap | left to itself, boringtun |
//! |---|---|
//! | B | gives up a silent peer after 90 s, and for ever |
//! | B2 | sends a new tunnel's first packet only after the keepalive interval |
//! | C | counts handshakes until told to stop: after the limit everything gets a cookie |
//! | D | counts each handshake a second time in the tunnel |
//! | E | uses a session of any age while nobody ticks it |
//! | F | after a suspend says "expired" at every tick |
//! | H | knows the newest handshake timestamp only as long as the tunnel object lives |
//! | I | lets unanswered handshakes push the live session out of its ring of eight |
//! | J | silently drops the upper eight bits of the index |
//! | K | forgets the keepalive after a request and its answer within one tick |
//! | L | has both ends renew an idle session at once, for ever |
//!
//! Times are those handed in; what depends on boringtun's own clock is in [`virtual_time`], built with the feature `sim`.

use std::net::Ipv4Addr;

use proptest::prelude::*;
use x25519_dalek::{PublicKey, StaticSecret};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

fn secret(n: u8) -> Secret32 {
    Secret32::new([n; 32])
}

fn public(n: u8) -> WgKey {
    WgKey(PublicKey::from(&StaticSecret::from([n; 32])).to_bytes())
}

/// An IPv4 packet of `len` bytes (at least 20).
fn packet(len: u16) -> Vec<u8> {
    let mut packet = vec![7; usize::from(len)];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet
}

/// Two tunnels to each other, with the keys 1 and 2.
struct Pair {
    a: Tunnel,
    b: Tunnel,
    now: Now,
}

fn fresh() -> Pair {
    Pair {
        a: Tunnel::new(&secret(1), &public(2), 0x00AA_0001),
        b: Tunnel::new(&secret(2), &public(1), 0x00BB_0001),
        now: Now::from_millis(1_000),
    }
}

fn connected() -> Pair {
    let mut pair = fresh();
    shake(&mut pair.a, &mut pair.b, pair.now);
    pair
}

fn initiation(tunnel: &mut Tunnel, now: Now) -> Vec<u8> {
    let mut out = [0; 200];
    let len = tunnel.initiate(&mut out, true, now).unwrap();
    out[..len].to_vec()
}

fn reply(tunnel: &mut Tunnel, datagram: &[u8], now: Now) -> Result<Vec<u8>, HandshakeResult> {
    let mut out = [0; 200];
    match tunnel.handshake(FROM, datagram, &mut out, now) {
        HandshakeResult::Reply { len } | HandshakeResult::Established { len } => Ok(out[..len].to_vec()),
        other => Err(other),
    }
}

fn sealed(tunnel: &mut Tunnel, packet: &[u8], now: Now) -> Vec<u8> {
    let mut out = vec![0; packet.len() + DATA_OVERHEAD];
    let len = tunnel.seal(packet, &mut out, now).unwrap();
    out[..len].to_vec()
}

fn opened(tunnel: &mut Tunnel, datagram: &[u8], now: Now) -> Opened {
    tunnel.open(Some(FROM), datagram, &mut vec![0; datagram.len()], now)
}

/// A whole handshake started by `a`, without delay.
fn shake(a: &mut Tunnel, b: &mut Tunnel, now: Now) {
    let init = initiation(a, now);
    let response = reply(b, &init, now).unwrap();
    let keepalive = reply(a, &response, now).unwrap();
    assert_eq!(opened(b, &keepalive, now), Opened::Keepalive { established: true });
}

fn tick(tunnel: &mut Tunnel, now: Now) -> Tick {
    tunnel.tick(&mut [0; 200], now)
}

#[test]
fn a_handshake_then_data_both_ways() {
    let Pair { mut a, mut b, now } = fresh();
    assert!(!a.can_send(now) && !b.can_send(now) && !a.is_initiating());
    let init = initiation(&mut a, now);
    assert!(a.is_initiating());
    let response = reply(&mut b, &init, now).unwrap();
    assert!(!b.can_send(now), "the responder may not send before the initiator has shown its key");
    let keepalive = reply(&mut a, &response, now).unwrap();
    assert!(a.can_send(now) && !a.is_initiating());
    assert_eq!(opened(&mut b, &keepalive, now), Opened::Keepalive { established: true });
    assert!(b.can_send(now));
    assert_eq!(b.last_handshake_age(now + SECOND), Some(SECOND));

    let datagram = sealed(&mut a, &packet(100), now);
    assert_eq!(opened(&mut b, &datagram, now), Opened::Packet { len: 100, established: false });
    assert_eq!(opened(&mut b, &datagram, now), Opened::Error(OpenError::Replayed));
    let datagram = sealed(&mut b, &packet(20), now);
    assert_eq!(opened(&mut a, &datagram, now), Opened::Packet { len: 20, established: false });
}

#[test]
fn the_first_data_message_may_establish_instead_of_the_keepalive() {
    let Pair { mut a, mut b, now } = fresh();
    let init = initiation(&mut a, now);
    let response = reply(&mut b, &init, now).unwrap();
    let _lost = reply(&mut a, &response, now).unwrap();
    let data = sealed(&mut a, &packet(60), now);
    assert_eq!(opened(&mut b, &data, now), Opened::Packet { len: 60, established: true });
}

#[test]
fn a_first_message_that_is_no_packet_establishes_and_the_next_one_says_so() {
    let Pair { mut a, mut b, now } = fresh();
    let init = initiation(&mut a, now);
    let response = reply(&mut b, &init, now).unwrap();
    let keepalive = reply(&mut a, &response, now).unwrap();
    let bad = sealed(&mut a, b"no packet", now);
    assert_eq!(opened(&mut b, &bad, now), Opened::Error(OpenError::BadInner));
    assert!(b.can_send(now));
    assert_eq!(opened(&mut b, &keepalive, now), Opened::Keepalive { established: true });
}

#[test]
fn a_message_of_the_peer_s_planner_is_told_from_a_packet_and_may_establish_too() {
    let Pair { mut a, mut b, now } = fresh();
    let init = initiation(&mut a, now);
    let response = reply(&mut b, &init, now).unwrap();
    let _lost = reply(&mut a, &response, now).unwrap();
    let message = peer::Message::NoWay { to: [7; 8] }.encode();
    let datagram = sealed(&mut a, &message, now);
    let mut out = [0; 200];
    let opened = b.open(None, &datagram, &mut out, now);
    assert_eq!(opened, Opened::Message { len: message.len(), established: true });
    assert_eq!(peer::Message::decode(&out[..message.len()]), Ok(peer::Message::NoWay { to: [7; 8] }));
    assert!(b.can_send(now));
    // It is data: who has nothing else to say answers with a keepalive.
    assert!(b.next_tick(now).is_some_and(|at| at <= now + KEEPALIVE_TIMEOUT));
    assert_eq!(b.open(None, &datagram, &mut out, now), Opened::Error(OpenError::Replayed));
}

#[test]
fn trap_b2_the_first_initiation_is_written_at_once_and_idle_costs_nothing() {
    let Pair { mut a, now, .. } = fresh();
    assert_eq!(a.next_tick(now), None);
    assert_eq!(tick(&mut a, now), Tick::Nothing);
    let mut out = [0; 200];
    assert_eq!(a.initiate(&mut out, false, now), Some(wireguard::INIT_LEN));
    assert_eq!(a.initiate(&mut out, false, now), None, "one is out already");
    assert_eq!(a.initiate(&mut out, true, now), Some(wireguard::INIT_LEN));
}

#[test]
fn trap_b_unanswered_handshakes_are_repeated_then_given_up_once_and_can_start_again() {
    let Pair { mut a, mut b, now } = fresh();
    let start = now;
    initiation(&mut a, now);
    let mut repeated = 0;
    let gave_up = loop {
        let at = a.next_tick(start).unwrap();
        match tick(&mut a, at) {
            Tick::Send { len } => {
                assert_eq!(len, wireguard::INIT_LEN);
                repeated += 1;
            }
            Tick::Expired => break at,
            Tick::Nothing => panic!("woken for nothing at {at:?}"),
        }
    };
    assert_eq!(gave_up.since(start), REKEY_ATTEMPT_TIME);
    assert!((15..=17).contains(&repeated), "{repeated} repetitions");
    assert_eq!(a.next_tick(gave_up), None);
    assert_eq!(tick(&mut a, gave_up + SECOND), Tick::Nothing, "said once");
    shake(&mut a, &mut b, gave_up + SECOND * 2);
    assert!(a.can_send(gave_up + SECOND * 3));
}

#[test]
fn an_answer_to_either_of_the_last_two_initiations_counts() {
    for answered in 0..2 {
        let Pair { mut a, mut b, now } = fresh();
        let inits = [initiation(&mut a, now), initiation(&mut a, now + SECOND)];
        let response = reply(&mut b, &inits[answered], now + SECOND).unwrap();
        reply(&mut a, &response, now + SECOND).unwrap();
        assert!(a.can_send(now + SECOND));
    }
}

#[test]
fn trap_d_the_tunnel_itself_never_limits() {
    let Pair { mut a, mut b, mut now } = fresh();
    for _ in 0..500 {
        now = now + Duration::from_millis(1);
        let init = initiation(&mut a, now);
        assert_eq!(reply(&mut b, &init, now).map(|r| r.len()), Ok(wireguard::RESPONSE_LEN));
    }
}

#[test]
fn trap_e_a_session_past_its_age_neither_seals_nor_opens_though_nobody_ticked() {
    let Pair { mut a, mut b, now } = connected();
    let almost = now + (REJECT_AFTER_TIME - SECOND);
    let early = sealed(&mut a, &packet(40), almost);
    let late = sealed(&mut a, &packet(40), almost);
    assert!(matches!(opened(&mut b, &early, almost), Opened::Packet { .. }));
    let old = now + REJECT_AFTER_TIME;
    assert!(!a.can_send(old) && !b.can_send(old));
    assert_eq!(a.seal(&packet(40), &mut [0; 200], old), None);
    assert_eq!(opened(&mut b, &late, old), Opened::Error(OpenError::UnknownSession));
}

#[test]
fn trap_h_a_replayed_initiation_is_refused_for_as_long_as_the_tunnel_lives() {
    let Pair { mut a, mut b, now } = fresh();
    let init = initiation(&mut a, now);
    reply(&mut b, &init, now).unwrap();
    let replayed = Err(HandshakeResult::Refused(RefusedHandshake::Replayed));
    assert_eq!(reply(&mut b, &init, now + SECOND), replayed);
    shake(&mut a, &mut b, now + SECOND * 2);
    assert_eq!(reply(&mut b, &init, now + SECOND * 500), replayed);
    // Which is why a tunnel is kept while its peer is a member: a new one knows no better.
    let mut forgetful = Tunnel::new(&secret(2), &public(1), 3);
    assert!(reply(&mut forgetful, &init, now).is_ok());
}

#[test]
fn trap_i_a_ring_gone_round_stops_sending_rather_than_sending_into_the_void() {
    let Pair { mut a, mut b, mut now } = connected();
    // The peer initiates again and again and never gets the answers. boringtun's ring has eight places.
    for _ in 0..RING {
        now = now + SECOND;
        let init = initiation(&mut a, now);
        reply(&mut b, &init, now).unwrap();
    }
    assert!(!b.can_send(now), "the place of the session is taken by one the peer may not know");
    now = now + SECOND;
    shake(&mut a, &mut b, now);
    let data = sealed(&mut b, &packet(50), now);
    assert_eq!(opened(&mut a, &data, now), Opened::Packet { len: 50, established: false });
}

#[test]
fn trap_j_the_index_is_24_bits_and_leads_back_to_the_tunnel() {
    let mut tunnel = Tunnel::new(&secret(1), &public(2), 0xFF12_3456);
    assert_eq!(tunnel.index(), 0x0012_3456);
    for n in 0..300 {
        let init = initiation(&mut tunnel, Now::from_millis(n));
        let sender = wireguard::sender_index(&init).unwrap();
        assert_eq!(wireguard::tunnel_index(sender), tunnel.index());
    }
}

#[test]
fn trap_k_data_that_is_not_answered_gets_a_keepalive_after_ten_seconds() {
    let Pair { mut a, mut b, now } = connected();
    // Request and answer in the same instant: the case that boringtun forgets.
    let request = sealed(&mut a, &packet(84), now);
    opened(&mut b, &request, now);
    let answer = sealed(&mut b, &packet(84), now);
    opened(&mut a, &answer, now);
    // The worker opened and sealed in silence, so the planner wakes by itself in time.
    let mut at = now;
    loop {
        at = a.next_tick(at).unwrap();
        match tick(&mut a, at) {
            Tick::Send { len } => {
                assert_eq!(len, wireguard::DATA_MIN_LEN);
                break;
            }
            Tick::Nothing => assert!(at < now + KEEPALIVE_TIMEOUT),
            Tick::Expired => panic!("nothing was tried"),
        }
    }
    assert_eq!(at, now + KEEPALIVE_TIMEOUT);
    assert_eq!(tick(&mut b, at), Tick::Nothing, "who spoke last has nothing to confirm");
}

#[test]
fn keepalives_are_not_answered() {
    let Pair { mut a, mut b, now } = connected();
    let keepalive = sealed(&mut a, &[], now);
    assert_eq!(opened(&mut b, &keepalive, now), Opened::Keepalive { established: false });
    assert_eq!(tick(&mut b, now + KEEPALIVE_TIMEOUT * 2), Tick::Nothing);
    assert_eq!(tick(&mut a, now + KEEPALIVE_TIMEOUT * 2), Tick::Nothing);
}

#[test]
fn sent_data_without_any_sign_of_life_starts_a_handshake() {
    let Pair { mut a, mut b, now } = connected();
    sealed(&mut a, &packet(84), now);
    sealed(&mut a, &packet(84), now + SECOND * 10);
    assert_eq!(tick(&mut a, now + (REPLY_TIMEOUT - SECOND)), Tick::Nothing);
    let due = now + REPLY_TIMEOUT;
    assert_eq!(tick(&mut a, due + SECOND), Tick::Send { len: wireguard::INIT_LEN });
    // A sign of life of any kind prevents it.
    sealed(&mut b, &packet(84), now);
    let keepalive = sealed(&mut a, &[], now + SECOND);
    opened(&mut b, &keepalive, now + SECOND);
    assert_eq!(tick(&mut b, due + SECOND), Tick::Nothing);
}

#[test]
fn only_the_initiator_renews_and_only_when_the_session_is_used() {
    let Pair { mut a, mut b, now } = connected();
    let old = now + REKEY_AFTER_TIME;
    assert_eq!(tick(&mut a, old), Tick::Nothing, "not used, not renewed");
    let data = sealed(&mut b, &packet(84), old);
    assert_eq!(tick(&mut b, old), Tick::Nothing, "the responder leaves it to the initiator");
    opened(&mut a, &data, old);
    assert_eq!(tick(&mut a, old), Tick::Nothing, "only received, and there is time");
    sealed(&mut a, &[], old);
    assert_eq!(tick(&mut a, old), Tick::Nothing, "a keepalive is not use");
    sealed(&mut a, &packet(84), old);
    assert_eq!(a.next_tick(old), Some(old));
    assert_eq!(tick(&mut a, old), Tick::Send { len: wireguard::INIT_LEN });
    assert!(a.can_send(old), "the old session goes on meanwhile");

    let Pair { mut a, mut b, now } = connected();
    let data = sealed(&mut b, &packet(84), now + REKEY_ON_RECEIVE);
    opened(&mut a, &data, now + REKEY_ON_RECEIVE);
    assert_eq!(tick(&mut a, now + REKEY_ON_RECEIVE), Tick::Send { len: wireguard::INIT_LEN });
}

#[test]
fn both_ends_may_initiate_at_once() {
    let Pair { mut a, mut b, now } = fresh();
    let (from_a, from_b) = (initiation(&mut a, now), initiation(&mut b, now));
    let later = now + SECOND;
    let (by_a, by_b) = (reply(&mut a, &from_b, later).unwrap(), reply(&mut b, &from_a, later).unwrap());
    let later = now + SECOND * 2;
    let (first_a, first_b) = (reply(&mut a, &by_b, later).unwrap(), reply(&mut b, &by_a, later).unwrap());
    let later = now + SECOND * 3;
    assert!(matches!(opened(&mut a, &first_b, later), Opened::Keepalive { .. }));
    assert!(matches!(opened(&mut b, &first_a, later), Opened::Keepalive { .. }));
    for _ in 0..3 {
        let data = sealed(&mut a, &packet(90), later);
        assert!(matches!(opened(&mut b, &data, later), Opened::Packet { len: 90, .. }));
        let data = sealed(&mut b, &packet(90), later);
        assert!(matches!(opened(&mut a, &data, later), Opened::Packet { len: 90, .. }));
    }
    assert!(!a.is_initiating() && !b.is_initiating());
}

#[test]
fn small_buffers_are_refused_without_a_panic_and_nothing_is_queued() {
    let Pair { mut a, mut b, now } = fresh();
    for len in 0..MIN_ROOM {
        assert_eq!(a.initiate(&mut vec![0; len], true, now), None);
    }
    let init = initiation(&mut a, now);
    for len in 0..MIN_ROOM {
        let refused = HandshakeResult::Refused(RefusedHandshake::Malformed);
        assert_eq!(b.handshake(FROM, &init, &mut vec![0; len], now), refused);
    }
    assert_eq!(a.seal(&packet(100), &mut [0; 1500], now), None, "no session");
    shake(&mut a, &mut b, now + SECOND);
    let now = now + SECOND;
    for len in 0..100 + DATA_OVERHEAD {
        assert_eq!(a.seal(&packet(100), &mut vec![0; len], now), None);
    }
    let data = sealed(&mut a, &packet(100), now);
    for len in 0..data.len() - 16 {
        assert_eq!(b.open(None, &data, &mut vec![0; len], now), Opened::Error(OpenError::Other));
    }
    assert_eq!(
        b.open(None, &data, &mut vec![0; data.len() - 16], now),
        Opened::Packet { len: 100, established: false }
    );
}

#[test]
fn messages_for_other_keys_and_unasked_answers_are_refused() {
    let Pair { mut a, mut b, now } = fresh();
    let mut stranger = Tunnel::new(&secret(3), &public(2), 5);
    let init = initiation(&mut stranger, now);
    assert_eq!(reply(&mut b, &init, now), Err(HandshakeResult::Refused(RefusedHandshake::WrongKey)));
    let mut elsewhere = Tunnel::new(&secret(1), &public(4), 6);
    let init = initiation(&mut elsewhere, now);
    assert_eq!(reply(&mut b, &init, now), Err(HandshakeResult::Refused(RefusedHandshake::WrongKey)));
    let init = initiation(&mut a, now);
    let response = reply(&mut b, &init, now).unwrap();
    reply(&mut a, &response, now).unwrap();
    assert_eq!(reply(&mut a, &response, now), Err(HandshakeResult::Refused(RefusedHandshake::Unexpected)));
    let data = sealed(&mut a, &packet(30), now);
    assert_eq!(reply(&mut b, &data, now), Err(HandshakeResult::Refused(RefusedHandshake::Malformed)));
}

#[test]
fn debug_shows_no_keys() {
    let Pair { a, .. } = connected();
    let shown = format!("{a:?}");
    assert!(shown.starts_with("Tunnel { index: 0xaa0001"), "{shown}");
    assert!(shown.len() < 250 && !shown.contains("private") && !shown.contains("key"), "{shown}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_altered_datagram_is_never_accepted(position in 0usize..132, bit in 0u8..8, cut in 0usize..132) {
        let Pair { mut a, mut b, now } = connected();
        let good = sealed(&mut a, &packet(100), now);
        let mut flipped = good.clone();
        flipped[position] ^= 1 << bit;
        prop_assert!(matches!(opened(&mut b, &flipped, now), Opened::Error(_)));
        prop_assert!(matches!(opened(&mut b, &good[..cut], now), Opened::Error(_)));
        prop_assert_eq!(opened(&mut b, &good, now), Opened::Packet { len: 100, established: false });
    }

    #[test]
    fn an_altered_handshake_is_never_accepted(position in 0usize..132, bit in 0u8..8, random in any::<Vec<u8>>()) {
        let Pair { mut a, mut b, now } = fresh();
        let mut init = initiation(&mut a, now);
        init[position] ^= 1 << bit;
        prop_assert!(reply(&mut b, &init, now).is_err());
        prop_assert!(reply(&mut b, &random, now).is_err());
        prop_assert!(matches!(opened(&mut b, &random, now), Opened::Error(_)));
    }
}

/// boringtun under its mock clock, which the tunnel sets to the times handed in.
#[cfg(feature = "sim")]
mod virtual_time {
    use super::*;
    use crate::engine::session::gate::{Gate, LIMIT, Verdict, peer_of_init};

    const DELAY: Duration = Duration::from_millis(30);

    /// Two tunnels, a wire, and planners that do nothing but tick.
    struct Wire {
        ends: [Tunnel; 2],
        now: Now,
        flying: Vec<(Now, usize, Vec<u8>)>,
        received: [u64; 2],
        initiations: [u64; 2],
        datagrams: u64,
        ticks: u64,
        expired: u64,
        cut: bool,
    }

    impl Wire {
        fn new() -> Self {
            let Pair { a, b, now } = fresh();
            Self {
                ends: [a, b],
                now,
                flying: Vec::new(),
                received: [0; 2],
                initiations: [0; 2],
                datagrams: 0,
                ticks: 0,
                expired: 0,
                cut: false,
            }
        }

        fn launch(&mut self, from: usize, datagram: Vec<u8>) {
            self.datagrams += 1;
            if classify(&datagram) == Kind::HandshakeInit {
                self.initiations[from] += 1;
            }
            if !self.cut {
                self.flying.push((self.now + DELAY, 1 - from, datagram));
            }
        }

        fn initiate(&mut self, from: usize) {
            let init = initiation(&mut self.ends[from], self.now);
            self.launch(from, init);
        }

        /// Sends a packet if there is a session, else starts a handshake unless one is under way.
        fn send(&mut self, from: usize) -> bool {
            if self.ends[from].can_send(self.now) {
                let datagram = sealed(&mut self.ends[from], &packet(84), self.now);
                self.launch(from, datagram);
                return true;
            }
            if !self.ends[from].is_initiating() {
                self.initiate(from);
            }
            false
        }

        fn arrive(&mut self, at: usize, datagram: &[u8]) {
            let mut out = [0; 2000];
            let tunnel = &mut self.ends[at];
            if classify(datagram) == Kind::Data {
                if let Opened::Packet { .. } = tunnel.open(Some(FROM), datagram, &mut out, self.now) {
                    self.received[at] += 1;
                }
            } else if let HandshakeResult::Reply { len } | HandshakeResult::Established { len } =
                tunnel.handshake(FROM, datagram, &mut out, self.now)
            {
                self.launch(at, out[..len].to_vec());
            }
        }

        fn run_until(&mut self, end: Now) {
            loop {
                self.flying.sort_by_key(|(at, ..)| *at);
                let arrival = self.flying.first().map(|(at, ..)| *at);
                let tick = (0..2).filter_map(|i| Some((self.ends[i].next_tick(self.now)?, i))).min();
                match (arrival, tick) {
                    (Some(at), tick) if at <= end && tick.is_none_or(|(t, _)| at <= t) => {
                        self.now = self.now.max(at);
                        let (_, to, datagram) = self.flying.remove(0);
                        self.arrive(to, &datagram);
                    }
                    (_, Some((at, i))) if at <= end => {
                        self.now = self.now.max(at);
                        self.ticks += 1;
                        let mut out = [0; 200];
                        match self.ends[i].tick(&mut out, self.now) {
                            Tick::Send { len } => self.launch(i, out[..len].to_vec()),
                            Tick::Expired => self.expired += 1,
                            Tick::Nothing => {}
                        }
                    }
                    _ => break,
                }
            }
            self.now = end;
        }

        fn run_for(&mut self, time: Duration) {
            self.run_until(self.now + time);
        }
    }

    #[test]
    fn steady_traffic_for_ten_minutes_loses_nothing_and_renews_every_two() {
        for talkers in [&[0][..], &[1], &[0, 1]] {
            let mut wire = Wire::new();
            wire.initiate(0);
            wire.run_for(SECOND);
            let mut sent = [0; 2];
            for _ in 0..600 {
                for from in talkers {
                    assert!(wire.send(*from), "a session is there at {:?}", wire.now);
                    sent[*from] += 1;
                }
                wire.run_for(SECOND);
            }
            assert_eq!(wire.received, [sent[1], sent[0]]);
            let inits = wire.initiations[0] + wire.initiations[1];
            assert!((4..=6).contains(&inits), "{inits} handshakes in ten minutes, talkers {talkers:?}");
            assert!(wire.ticks < 2000, "{} ticks", wire.ticks);
        }
    }

    #[test]
    fn trap_l_an_idle_tunnel_sends_nothing_and_is_not_even_ticked() {
        let mut wire = Wire::new();
        wire.send(0);
        wire.run_for(SECOND);
        wire.send(0);
        wire.run_for(SECOND * 20);
        let (datagrams, ticks) = (wire.datagrams, wire.ticks);
        assert!(datagrams <= 5, "handshake, data, a keepalive: {datagrams}");
        wire.run_for(SECOND * 200);
        let after_expiry = wire.ticks;
        assert!(after_expiry - ticks < 100);
        wire.run_for(SECOND * 5 * 3600);
        assert_eq!((wire.datagrams, wire.ticks), (datagrams, after_expiry));
    }

    #[test]
    fn trap_b_a_peer_that_was_away_for_ten_minutes_is_found_again() {
        let mut wire = Wire::new();
        wire.send(0);
        wire.run_for(SECOND);
        wire.cut = true;
        for _ in 0..600 {
            wire.send(0);
            wire.run_for(SECOND);
        }
        assert!(wire.expired >= 1);
        wire.cut = false;
        let mut waited = 0;
        while !wire.send(0) {
            wire.run_for(SECOND);
            waited += 1;
            assert!(waited <= 6, "at most one repetition of the handshake");
        }
        let before = wire.received[1];
        wire.run_for(SECOND);
        assert_eq!(wire.received[1], before + 1);
    }

    #[test]
    fn trap_f_after_three_hours_of_sleep_one_handshake_is_enough_and_lasts() {
        let mut wire = Wire::new();
        wire.send(0);
        wire.run_for(SECOND);
        wire.send(0);
        wire.run_for(SECOND);
        // Nobody ticks while the machine sleeps.
        wire.now = wire.now + SECOND * 3 * 3600;
        wire.send(0);
        wire.run_for(SECOND);
        // boringtun dates a session by its last idea of the time, and would find this one three hours old.
        for _ in 0..100 {
            assert!(wire.send(0) && wire.send(1), "at {:?}", wire.now);
            wire.run_for(SECOND);
        }
        assert_eq!(wire.received, [100, 101]);
    }

    #[test]
    fn the_first_session_of_an_old_tunnel_lasts_too() {
        for initiator in [0, 1] {
            let mut wire = Wire::new();
            wire.now = wire.now + SECOND * 86_400;
            wire.initiate(initiator);
            wire.run_for(SECOND);
            for _ in 0..110 {
                assert!(wire.send(0) && wire.send(1), "at {:?}", wire.now);
                wire.run_for(SECOND);
            }
        }
    }

    /// boringtun throws sessions away by its own idea of the time. If that was behind when a session began, the next
    /// handshake would find the session too old.
    #[test]
    fn the_next_handshake_does_not_throw_a_live_session_away() {
        for (first, second) in [(0, 1), (0, 0), (1, 0)] {
            let mut wire = Wire::new();
            wire.now = wire.now + SECOND * 3 * 3600;
            wire.initiate(first);
            wire.run_for(SECOND);
            assert!(wire.ends.iter().all(|end| end.can_send(wire.now)));
            wire.run_for(SECOND * 10);
            wire.initiate(second);
            assert!(wire.ends[second].can_send(wire.now));
            wire.run_for(DELAY + DELAY / 2);
            assert!(wire.ends[1 - second].can_send(wire.now), "before the new session is confirmed");
        }
    }

    #[test]
    fn a_session_that_took_a_minute_of_trying_is_as_good_as_any() {
        let mut wire = Wire::new();
        wire.now = wire.now + SECOND * 3600;
        wire.cut = true;
        wire.initiate(0);
        wire.run_for(SECOND * 80);
        wire.cut = false;
        wire.run_for(SECOND * 6);
        assert!(wire.ends[0].can_send(wire.now));
        wire.run_for(SECOND * 150);
        wire.initiate(1);
        wire.run_for(DELAY + DELAY / 2);
        assert!(wire.ends[0].can_send(wire.now), "the session is not yet three minutes old");
    }

    #[test]
    fn the_keys_of_a_dead_session_are_forgotten() {
        let mut wire = Wire::new();
        wire.send(0);
        wire.run_for(SECOND);
        assert!(wire.ends.iter().all(|end| end.tunn.time_since_last_handshake().is_some()));
        wire.run_for(REJECT_AFTER_TIME + SECOND);
        assert!(wire.ends.iter().all(|end| end.tunn.time_since_last_handshake().is_none()));
    }

    #[test]
    fn a_restarted_node_is_not_taken_for_a_replay() {
        let Pair { mut a, mut b, now } = fresh();
        let later = now + SECOND * 5000;
        shake(&mut a, &mut b, later);
        let mut restarted = Tunnel::new(&secret(1), &public(2), 9);
        shake(&mut restarted, &mut b, later + SECOND);
    }

    #[test]
    fn trap_c_the_gate_counts_per_second_and_not_for_ever() {
        let Pair { mut a, mut now, .. } = fresh();
        let mut gate = Gate::new(&public(2));
        let mut cookie = [0; 64];
        for _ in 0..LIMIT * 3 {
            now = now + SECOND;
            let init = initiation(&mut a, now);
            assert_eq!(gate.check(FROM, &init, &mut cookie, now), Verdict::Pass);
        }
        let init = initiation(&mut a, now);
        let verdicts: Vec<_> = (0..LIMIT + 10).map(|_| gate.check(FROM, &init, &mut cookie, now)).collect();
        let cookies = verdicts.iter().filter(|v| **v == Verdict::Cookie(64)).count();
        assert!((10..=12).contains(&cookies), "{cookies} cookies");
        assert_eq!(gate.check(FROM, &init, &mut cookie, now + SECOND), Verdict::Pass);
    }

    #[test]
    fn a_cookie_gets_an_honest_peer_through_a_flood_but_not_from_another_address() {
        let Pair { mut a, mut b, now } = fresh();
        let mut gate = Gate::new(&public(2));
        let mut cookie = [0; 64];
        let flood = initiation(&mut Tunnel::new(&secret(9), &public(2), 7), now);
        for _ in 0..LIMIT + 10 {
            gate.check(FROM, &flood, &mut cookie, now);
        }
        let init = initiation(&mut a, now);
        assert_eq!(gate.check(FROM, &init, &mut cookie, now), Verdict::Cookie(64));
        assert_eq!(a.handshake(FROM, &cookie, &mut [0; 200], now), HandshakeResult::CookieStored);
        assert!(a.is_initiating(), "a cookie is no answer");
        let init = initiation(&mut a, now + Duration::from_millis(10));
        let elsewhere = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 99));
        assert_eq!(gate.check(elsewhere, &init, &mut cookie, now), Verdict::Cookie(64));
        assert_eq!(gate.check(FROM, &init, &mut cookie, now), Verdict::Pass);
        assert_eq!(peer_of_init(&secret(2), &public(2), &init), Some(public(1)));
        assert!(reply(&mut b, &init, now).is_ok(), "what passed the gate is not counted or questioned again");
    }
}

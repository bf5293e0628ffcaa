use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

struct Bench {
    agent: PathAgent,
    rng: StdRng,
    now: Now,
}

impl Bench {
    fn new() -> Self {
        let now = Now::from_millis(1_000);
        Self { agent: PathAgent::new(true, now), rng: StdRng::seed_from_u64(1), now }
    }

    fn act<T>(&mut self, act: impl FnOnce(&mut PathAgent, &mut Context<'_, StdRng>) -> T) -> (T, Vec<Action>) {
        let mut actions = VecDeque::new();
        let mut cx = Context { now: self.now, rng: &mut self.rng, tx_prefix: [1, 2, 3, 4], actions: &mut actions };
        let result = act(&mut self.agent, &mut cx);
        (result, actions.into())
    }

    fn pass(&mut self, ms: u64) -> Vec<Action> {
        self.now = self.now + Duration::from_millis(ms);
        self.act(|agent, cx| agent.tick(Stamps::default(), cx)).1
    }

    /// The answer to the last probe of data size to this address, `rtt` after now.
    fn answer(&mut self, actions: &[Action], to: &str, rtt: u64) -> Vec<Action> {
        let leg = Leg::main(addr(to));
        let probe = actions.iter().rev().find_map(|a| match a {
            Action::Probe { txid, to, size: Some(_) } if *to == leg => Some(*txid),
            _ => None,
        });
        let txid = probe.expect("it was probed");
        self.now = self.now + Duration::from_millis(rtt);
        self.act(|agent, cx| agent.heard_answer_to_probe(&txid, leg, 1312, cx)).1
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn offer(text: &str, near: bool, open: bool) -> Offer {
    Offer { addr: addr(text), near, open }
}

const CLOSED: &str = "203.0.113.9:5000";
const OPEN: &str = "198.51.100.1:7000";
const NEAR: &str = "192.168.1.7:7000";

fn probed(actions: &[Action]) -> Vec<(SocketAddr, bool)> {
    let probe = |a: &Action| match a {
        Action::Probe { to, size, .. } => Some((to.remote, size.is_some())),
        _ => None,
    };
    actions.iter().filter_map(probe).collect()
}

fn primed(actions: &[Action]) -> Vec<SocketAddr> {
    actions.iter().filter_map(|a| if let Action::Prime { to, .. } = a { Some(to.remote) } else { None }).collect()
}

#[test]
fn whoever_is_called_opens_its_nat_and_probes_what_needs_no_opening() {
    let mut bench = Bench::new();
    let offers = [offer(CLOSED, false, false), offer(OPEN, false, true), offer(NEAR, true, false)];
    bench.agent.heard_candidates(&offers, NatView::default());
    bench.act(|agent, cx| agent.heard_call(1, Some(7), false, cx));
    let (_, actions) = bench.act(|agent, cx| agent.candidates_ready(cx));
    assert!(matches!(actions[0], Action::Tell { kind: MessageKind::Answer, round: 1, echo: Some(7), .. }));
    assert_eq!(probed(&actions), [(addr(OPEN), true), (addr(NEAR), true)]);
    assert_eq!(primed(&actions), [addr(CLOSED)]);
    assert_eq!(probed(&bench.pass(100)), [], "the rest waits for the go");
    let (awaited, actions) = bench.act(|agent, cx| agent.heard_go(1, Some(Duration::from_millis(60)), cx));
    assert!(awaited && probed(&actions).contains(&(addr(CLOSED), true)));
}

fn call(opened: bool) -> (Bench, Vec<Action>) {
    let mut bench = Bench::new();
    bench.agent.wake(bench.now);
    bench.act(|agent, cx| agent.candidates_ready(cx));
    let asked = bench.now.0;
    bench.pass(60);
    bench.agent.heard_candidates(&[offer(CLOSED, false, false)], NatView::default());
    let answer = HeardAnswer { round: 1, held: Some(10_000), echo: Some(asked), opened };
    let (heard, actions) = bench.act(|agent, cx| agent.heard_answer(&answer, None, cx));
    assert!(heard);
    let go = |a: &Action| matches!(a, Action::Tell { kind: MessageKind::Go, t: Some(50_000), .. });
    assert!(actions.iter().any(go), "the round trip is told: {actions:?}");
    (bench, actions)
}

#[test]
fn the_caller_starts_at_once_if_the_other_nat_is_open_and_half_a_round_trip_later_if_not() {
    assert_eq!(probed(&call(true).1), [(addr(CLOSED), true)]);
    let (mut bench, actions) = call(false);
    assert_eq!(probed(&actions), []);
    assert_eq!(probed(&bench.pass(24)), []);
    assert_eq!(probed(&bench.pass(1)), [(addr(CLOSED), true)]);
}

#[test]
fn probes_of_data_size_and_small_ones_alternate() {
    let (mut bench, first) = call(true);
    let mut sizes: Vec<bool> = probed(&first).iter().map(|p| p.1).collect();
    for ms in [20, 30, 50, 100] {
        sizes.extend(probed(&bench.pass(ms)).iter().map(|p| p.1));
    }
    assert_eq!(sizes, [true, false, true, false, true]);
}

#[test]
fn two_failed_rounds_ask_for_a_fresh_port_and_its_legs_use_it() {
    let (mut bench, _) = call(true);
    for _ in 0..2 {
        assert!(!bench.agent.wants_fresh_port());
        bench.pass(2_400);
        bench.pass(10_000);
        bench.act(|agent, cx| agent.candidates_ready(cx));
        if bench.agent.wants_fresh_port() {
            break;
        }
        let answer = HeardAnswer { round: 2, held: None, echo: None, opened: true };
        bench.agent.heard_candidates(&[offer(CLOSED, false, false)], NatView::default());
        assert!(bench.act(|agent, cx| agent.heard_answer(&answer, None, cx)).0);
    }
    assert!(bench.agent.wants_fresh_port());
    bench.agent.use_fresh_port(Some(SocketId(9)));
    bench.agent.heard_candidates(&[offer(CLOSED, false, false), offer(NEAR, true, false)], NatView::default());
    let answer = HeardAnswer { round: 3, held: None, echo: None, opened: true };
    let (_, actions) = bench.act(|agent, cx| agent.heard_answer(&answer, None, cx));
    bench.pass(200);
    let sockets = |to: &str| -> Vec<SocketId> {
        let of = |a: &Action| match a {
            Action::Probe { to: leg, .. } if leg.remote == addr(to) => Some(leg.socket),
            _ => None,
        };
        actions.iter().filter_map(of).collect()
    };
    assert!(sockets(CLOSED).iter().all(|s| *s == SocketId(9)), "{actions:?}");
    assert!(sockets(NEAR).iter().all(|s| *s == SocketId::V4), "{actions:?}");
}

/// A path in use, and another that answered once.
fn settled() -> Bench {
    let (mut bench, first) = call(true);
    bench.agent.heard_candidates(&[offer(CLOSED, false, false), offer(OPEN, false, false)], NatView::default());
    let more = bench.pass(50);
    bench.answer(&first, CLOSED, 0);
    bench.answer(&more, OPEN, 60);
    assert_eq!(bench.agent.direct().map(|d| d.0.remote), Some(addr(CLOSED)));
    bench
}

#[test]
fn a_better_path_takes_over_after_three_measurements() {
    let mut bench = settled();
    // Its round trip was measured as 50 ms and stays so.
    let mut measured = 0;
    for _ in 0..80 {
        let actions = bench.pass(1_000);
        if probed(&actions).contains(&(addr(OPEN), true)) {
            measured += 1;
            let actions = bench.answer(&actions, OPEN, 20);
            let selected =
                actions.iter().any(|a| matches!(a, Action::Turn { leg, .. } if *leg == Leg::main(addr(OPEN))));
            assert_eq!(selected, measured == 3, "measurement {measured}");
            if selected {
                return;
            }
        }
        // The path in use goes on answering.
        let alive = probed(&actions).iter().any(|(to, _)| *to == addr(CLOSED));
        if alive {
            let last = actions.iter().rev().find_map(|a| match a {
                Action::Probe { txid, to, .. } if to.remote == addr(CLOSED) => Some((*txid, *to)),
                _ => None,
            });
            let (txid, leg) = last.unwrap();
            bench.now = bench.now + Duration::from_millis(50);
            bench.act(|agent, cx| agent.heard_answer_to_probe(&txid, leg, 100, cx));
        }
    }
    panic!("never changed: {measured} measurements");
}

#[test]
fn sockets_that_are_closed_take_their_legs_with_them() {
    let mut bench = Bench::new();
    bench.agent.wake(bench.now);
    let leg = Leg { socket: SocketId(9), remote: addr(CLOSED) };
    let (_, actions) = bench.act(|agent, cx| agent.heard_probe(leg, false, true, cx));
    assert_eq!(probed(&actions), [(addr(CLOSED), true)], "a triggered check, from where it came");
    let Some(Action::Probe { txid, .. }) = actions.first() else { panic!("{actions:?}") };
    bench.agent.forget_sockets(&[SocketId(9)]);
    assert!(!bench.agent.sent(txid));
}

#[test]
fn a_call_that_comes_twice_does_not_undo_what_the_first_began() {
    const UNKNOWN: &str = "203.0.113.9:6001";
    let mut bench = Bench::new();
    let offers = [offer(CLOSED, false, false)];
    bench.agent.heard_candidates(&offers, NatView::default());
    bench.act(|agent, cx| agent.heard_call(1, Some(7), false, cx));
    bench.act(|agent, cx| agent.candidates_ready(cx));
    let leg = Leg::main(addr(UNKNOWN));
    let (_, actions) = bench.act(|agent, cx| agent.heard_probe(leg, false, true, cx));
    assert_eq!(probed(&actions), [(addr(UNKNOWN), true)], "an address that only the probe shows");
    bench.agent.heard_candidates(&offers, NatView::default());
    bench.act(|agent, cx| agent.heard_call(1, Some(9), false, cx));
    let actions = bench.answer(&actions, UNKNOWN, 40);
    assert!(actions.iter().any(|a| matches!(a, Action::Turn { leg: to, .. } if *to == leg)), "{actions:?}");
}

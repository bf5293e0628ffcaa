use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

const SEQ: Option<PortModel> = Some(PortModel::Sequential { step: 1, per_second: 200 });
const BLOCK: Option<PortModel> = Some(PortModel::Block { low: 20_000, high: 20_511 });

fn setting(role: Role, mine: Option<PortModel>, theirs: Option<PortModel>) -> Setting {
    Setting {
        role,
        leads: true,
        mine,
        theirs,
        target: "203.0.113.9:5000".parse().unwrap(),
        servers: vec!["203.0.113.1:3478".parse().unwrap()],
        relay_one_way: Duration::from_millis(30),
    }
}

fn ids(count: u16) -> Vec<SocketId> {
    (10..10 + count).map(SocketId).collect()
}

struct Bench {
    heavy: Heavy,
    rng: StdRng,
    now: Now,
    /// The next port of a NAT that counts.
    next: u16,
}

impl Bench {
    fn new(setting: Setting) -> Self {
        let now = Now::from_millis(5);
        Self { heavy: Heavy::new(setting, now), rng: StdRng::seed_from_u64(1), now, next: 40_000 }
    }

    fn open(&mut self, count: u16) {
        self.heavy.sockets_opened(&ids(count), self.now, &mut self.rng);
    }

    fn fire(&mut self) -> Vec<(Shot, u16)> {
        let shots = self.heavy.fire(1_000, [1, 2, 3, 4], &mut self.rng, self.now);
        shots
            .into_iter()
            .map(|shot| {
                let port = self.next;
                self.next += 1;
                (shot, port)
            })
            .collect()
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now + Duration::from_millis(ms);
    }
}

#[test]
fn openers_of_a_counting_nat_are_enclosed_by_questions_and_their_ports_told_first() {
    let mut bench = Bench::new(setting(Role::Opens, SEQ, None));
    bench.open(8);
    let shots = bench.fire();
    let openers: Vec<u16> = shots.iter().filter(|(s, _)| s.kind == ShotKind::Opener).map(|(_, p)| *p).collect();
    assert_eq!((shots.len(), openers.len()), (16, 8));
    assert_eq!(bench.heavy.poll_tell(), None, "the servers have not answered");
    bench.pass(30);
    for (shot, port) in shots.iter().filter(|(s, _)| s.kind == ShotKind::Stun) {
        assert!(bench.heavy.heard_stun(&shot.txid, SocketAddr::from(([198, 51, 100, 7], *port))));
    }
    assert!(bench.fire().is_empty());
    let told = bench.heavy.poll_tell().unwrap();
    assert_eq!(told.numbers[..8], openers);
    assert!(told.numbers.len() <= 12, "{:?}", told.numbers);
}

#[test]
fn a_lost_answer_leaves_the_ports_between_its_neighbours() {
    let mut bench = Bench::new(setting(Role::Opens, SEQ, None));
    bench.open(8);
    let shots = bench.fire();
    let stun: Vec<_> = shots.iter().filter(|(s, _)| s.kind == ShotKind::Stun).collect();
    for (shot, port) in stun.iter().enumerate().filter(|(i, _)| *i != 3).map(|(_, s)| s) {
        bench.heavy.heard_stun(&shot.txid, SocketAddr::from(([198, 51, 100, 7], *port)));
    }
    bench.pass(150);
    let repeated = bench.fire();
    assert_eq!(repeated.len(), 1, "only the silent one is asked again");
    assert_eq!(repeated[0].0, stun[3].0);
    bench.pass(150);
    bench.fire();
    let told = bench.heavy.poll_tell().unwrap();
    for (_, port) in shots.iter().filter(|(s, _)| s.kind == ShotKind::Opener) {
        assert!(told.numbers.contains(port), "{port} in {:?}", told.numbers);
    }
}

#[test]
fn a_block_is_scanned_without_repetition_and_a_hit_stops_it() {
    let mut bench = Bench::new(setting(Role::Scans, None, BLOCK));
    let told = Punch { role: Role::Opens, range: Some((20_000, 20_511)), ..Punch::default() };
    bench.heavy.heard_ports(told, bench.now, &mut bench.rng);
    let first = bench.heavy.fire(100, [0; 4], &mut bench.rng, bench.now);
    assert_eq!(first.len(), 100);
    let (hit, at) = (first[7], bench.now);
    bench.pass(40);
    let elsewhere = Leg { remote: "203.0.113.9:1".parse().unwrap(), ..hit.leg };
    assert_eq!(bench.heavy.answered(&hit.txid, elsewhere, bench.now), None);
    assert_eq!(bench.heavy.answered(&hit.txid, hit.leg, bench.now), Some(bench.now.since(at)));
    assert!(bench.fire().is_empty(), "the path is being proven");
    bench.pass(400);
    let rest = bench.fire();
    let mut ports: Vec<u16> = first.iter().chain(rest.iter().map(|(s, _)| s)).map(|s| s.leg.remote.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, (20_000..=20_511).collect::<Vec<_>>());
}

#[test]
fn all_ports_are_tried_up_to_twice_1024() {
    let mut bench = Bench::new(setting(Role::Scans, None, Some(PortModel::Random)));
    let told = Punch { role: Role::Opens, range: Some((1024, u16::MAX)), ..Punch::default() };
    bench.heavy.heard_ports(told, bench.now, &mut bench.rng);
    let mut all = 0;
    while !bench.heavy.is_over(bench.now) {
        all += bench.fire().len();
        bench.pass(500);
    }
    assert_eq!(all, MOST_SCANNED);
}

#[test]
fn strides_meet_for_any_two_errors_of_the_prediction() {
    // Which of the other's next ports each flow goes to, for both sides.
    let rows = |leads: bool| -> Vec<u16> {
        let mut bench = Bench::new(Setting { leads, ..setting(Role::Strides, SEQ, SEQ) });
        bench.open(9);
        for wait in [0, 150, 160] {
            bench.pass(wait);
            for (shot, port) in bench.fire() {
                bench.heavy.heard_stun(&shot.txid, SocketAddr::from(([198, 51, 100, 7], port)));
            }
        }
        bench.fire();
        assert!(bench.heavy.poll_tell().unwrap().counter.is_some());
        let counter = Counter { next: 50_000, step: 1, per_second: 200, age: 30_000 };
        let punch = Punch { role: Role::Strides, counter: Some(counter), ..Punch::default() };
        bench.heavy.heard_ports(punch, bench.now, &mut bench.rng);
        bench.pass(60);
        bench.fire().iter().map(|(shot, _)| shot.leg.remote.port()).collect()
    };
    let (one, two) = (rows(true), rows(false));
    let long_enough = usize::from(STRIDE_FLOWS)..=usize::from(MOST_STRIDE_FLOWS);
    assert!(long_enough.contains(&one.len()) && long_enough.contains(&two.len()));
    // The other's counter really was at `50_000 + e` when it sent its row; both errors vary.
    for (ours, theirs) in (5..33).flat_map(|a| (5..33).map(move |b| (a, b))) {
        let met = one.iter().enumerate().any(|(i, to)| {
            let j = usize::from(*to).checked_sub(50_000 + theirs);
            let back = j.and_then(|j| two.get(j));
            back.is_some_and(|back| usize::from(*back) == 50_000 + ours + i)
        });
        assert!(met, "errors {ours} and {theirs}");
    }
}

#[test]
fn a_row_into_a_block_tells_the_ports_it_got() {
    let mut bench = Bench::new(setting(Role::Counts, SEQ, BLOCK));
    bench.open(3);
    let shots = bench.fire();
    assert_eq!(shots.len(), usize::from(ROW) + 2);
    let row: Vec<u16> = shots[1..=usize::from(ROW)].iter().map(|(_, port)| *port).collect();
    assert!(shots[1..=usize::from(ROW)].iter().all(|(s, _)| (20_000..=20_511).contains(&s.leg.remote.port())));
    let (last, port) = shots[usize::from(ROW) + 1];
    bench.heavy.heard_stun(&last.txid, SocketAddr::from(([198, 51, 100, 7], port)));
    bench.pass(300);
    bench.fire();
    let mut told = bench.heavy.poll_tell().unwrap().numbers;
    told.sort_unstable();
    assert_eq!(told, row, "counted back from the last");
}

#[test]
fn no_sockets_or_no_answers_end_it() {
    let mut bench = Bench::new(setting(Role::Opens, SEQ, None));
    bench.open(0);
    assert!(bench.heavy.is_over(bench.now));
    let mut bench = Bench::new(setting(Role::Opens, SEQ, None));
    bench.pass(1_000);
    bench.fire();
    assert!(bench.heavy.is_over(bench.now), "the shell did not answer");
    let mut bench = Bench::new(setting(Role::Opens, SEQ, None));
    bench.open(8);
    bench.fire();
    bench.pass(300);
    bench.fire();
    bench.fire();
    assert!(bench.heavy.is_over(bench.now), "no server answered");
    assert_eq!(bench.heavy.poll_tell(), None);
}

#[test]
fn a_report_that_does_not_fit_the_role_is_ignored() {
    let mut bench = Bench::new(setting(Role::Scans, None, None));
    for role in [Role::Scans, Role::Grid, Role::Unknown] {
        let punch = Punch { role, range: Some((1, 9)), ..Punch::default() };
        bench.heavy.heard_ports(punch, bench.now, &mut bench.rng);
    }
    assert!(bench.fire().is_empty());
    let backwards = Punch { role: Role::Opens, range: Some((9, 1)), ..Punch::default() };
    bench.heavy.heard_ports(backwards, bench.now, &mut bench.rng);
    assert!(bench.fire().is_empty() && bench.heavy.is_over(bench.now));
}

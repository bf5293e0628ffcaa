//! Ten minutes of talking, directly and by the relay, through four renewals of the session: nothing is lost and nothing comes
//! twice.

use std::time::Duration;

use super::{assert_none_lost, settled};

pub(crate) fn run(seed: u64) {
    for nats in ["a=linux b=eim+adf", "a=apdm+apdf b=apdm+apdf"] {
        let (mut sim, _, a, b) = settled("rekey", seed, nats);
        let series = sim.ping(a, b, 6_000, Duration::from_millis(100));
        let mut ages = Vec::new();
        for _ in 0..30 {
            sim.run_for(Duration::from_secs(20));
            ages.push(sim.peer_status(a, b).last_handshake_s.unwrap());
        }
        sim.run_for(Duration::from_secs(1));
        assert_none_lost(&sim, series, Duration::ZERO);
        assert!(sim.pings(series).all(|p| p.answers == 1), "{nats}: an answer came twice");
        let renewals = ages.windows(2).filter(|pair| pair[1] < pair[0]).count();
        assert!(renewals >= 4, "{nats}: renewed {renewals} times: {ages:?}");
        assert!(ages.iter().all(|age| *age < 180), "{nats}: {ages:?}");
        sim.finish();
    }
}

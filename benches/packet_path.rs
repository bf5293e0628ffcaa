//! How long the steps of the packet path take, without system calls: `cargo bench --bench packet_path`.

#![allow(missing_docs, reason = "criterion's macro makes public functions")]

mod path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use path::CASES;

fn packet_path(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("path");
    for (name, make) in CASES {
        let case = std::cell::RefCell::new(make());
        group.throughput(Throughput::Elements(case.borrow().count()));
        group.bench_function(*name, |bencher| {
            bencher.iter_batched(|| case.borrow_mut().prepare(), |()| case.borrow_mut().run(), BatchSize::PerIteration);
        });
    }
}

criterion_group!(benches, packet_path);
criterion_main!(benches);

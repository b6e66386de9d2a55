//! Linear against exact attention as inputs grow: `cargo bench --bench scaling`.
//!
//! `Performer` with 256 features and `Flash`, n queries over n keys of 64 columns. Throughput is in
//! the multiplications and additions of the matrix products, so that it can be held against the
//! peak that is printed first: 8 n m d of the one, 4 n² d of the other, and 20 n m d and 14 n² d
//! with the backward pass.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Gradients, Inputs, PerformerConfig};
use peak_alloc::PeakAlloc;
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;
const FEATURES: usize = 256;

fn matrix(rows: usize, seed: u64) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, COLUMNS), || StandardNormal.sample(&mut rng))
}

/// With its operations forward, and with the backward pass.
type Entry = (&'static str, Box<dyn Attention<f32>>, fn(usize) -> [usize; 2]);

fn mechanisms() -> [Entry; 3] {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let config = PerformerConfig::new(COLUMNS, FEATURES);
    let performer = config.init(&mut rng).expect("the sizes are positive");
    let linear = |n| [8 * n * FEATURES * COLUMNS, 28 * n * FEATURES * COLUMNS];
    let exact = |n| [4 * n * n * COLUMNS, 14 * n * n * COLUMNS];
    [
        ("performer", Box::new(performer.clone()), linear),
        ("performer causal", Box::new(performer), linear),
        ("flash", Box::new(Flash::new()), exact),
    ]
}

fn scaling(c: &mut Criterion) {
    machine::print_limits();
    for n in [1 << 10, 1 << 12, 1 << 14, 1 << 16] {
        let [query, key, value] = [1, 2, 3].map(|seed| matrix(n, seed));
        for (name, attention, operations) in mechanisms() {
            let inputs = Inputs::dense(query.view(), key.view(), value.view());
            let mut inputs = inputs.expect("shapes fit");
            if name.contains("causal") {
                inputs = inputs.causal();
            }
            let mut out = Array2::zeros((n, COLUMNS));
            let mut grads = Gradients::zeros(&inputs, &attention).expect("they fit in memory");
            for (threads, pool) in machine::pools() {
                let mut group = c.benchmark_group(format!("scaling, {threads}"));
                let [forward, training] = operations(n);
                group.throughput(Throughput::Elements(forward as u64));
                group.bench_function(BenchmarkId::new(name, n), |bencher| {
                    pool.install(|| {
                        bencher.iter(|| attention.forward_into(&inputs, out.view_mut()))
                    });
                });
                if n > 1 << 14 {
                    continue;
                }
                group.throughput(Throughput::Elements(training as u64));
                let mut train = || {
                    let saved = attention.forward_train_into(&inputs, out.view_mut())?;
                    attention.backward_into(&inputs, &saved, query.view(), grads.view_mut())
                };
                group.bench_function(BenchmarkId::new(format!("{name} training"), n), |bencher| {
                    pool.install(|| bencher.iter(&mut train));
                });
            }
            PEAK.reset_peak_usage();
            let before = PEAK.current_usage();
            attention.forward_into(&inputs, out.view_mut()).expect("shapes fit");
            let peak = (PEAK.peak_usage() - before) as f64 / 1024.0;
            println!("{name}, {n}: {peak:.0} KiB beside inputs and output");
        }
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(10);
    targets = scaling
}
criterion_main!(all);

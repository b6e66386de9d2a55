//! Linear against exact attention as inputs grow: `cargo bench -p benches --bench scaling`.
//!
//! `Performer` with 256 features and `Flash`, n queries over n keys of 64 columns. Throughput is in
//! multiplications and additions of the matrix products, for comparison with the peak that is printed
//! first: 8 n m d for `Performer` and 4 n² d for `Flash`; 28 n m d and 14 n² d with the backward pass.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Inputs, PerformerConfig};
use peak_alloc::PeakAlloc;
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, matrix};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;
const FEATURES: usize = 256;

/// A mechanism with its operations, forward and with the backward pass.
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
        let [query, key, value] = [1, 2, 3].map(|seed| matrix(n, COLUMNS, seed));
        for (name, attention, operations) in mechanisms() {
            let inputs = Inputs::dense(query.view(), key.view(), value.view());
            let mut inputs = inputs.expect("shapes fit");
            if name.contains("causal") {
                inputs = inputs.with_causal();
            }
            let [of_forward, of_training] = operations(n);
            for (threads, pool) in machine::pools() {
                let id = || BenchmarkId::new(name, n);
                let mut group = workload::group(c, format!("scaling, {threads}"), of_forward);
                workload::forward(&mut group, id(), &pool, &*attention, &inputs);
                group.finish();
                // Exact attention takes seconds for larger inputs.
                if n <= 1 << 12 || n <= 1 << 14 && name != "flash" {
                    let group = format!("training scaling, {threads}");
                    let mut group = workload::group(c, group, of_training);
                    workload::training(&mut group, id(), &pool, &*attention, &inputs);
                }
            }
            let mut out = Array2::zeros((n, COLUMNS));
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
    config = workload::criterion();
    targets = scaling
}
criterion_main!(all);

//! Exact attention on dense inputs: `cargo bench -p benches --bench dense`.
//!
//! Throughput is in floating-point operations, 4 per pair and column forward and 14 forward and backward,
//! as counted in PyTorch's papers; "Gelem/s" means GFLOP/s.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{Flash, Float, Inputs};
use workload::{machine, matrix};

fn dense<F: Float>(c: &mut Criterion, sizes: &[(usize, usize)]) {
    let float = std::any::type_name::<F>();
    for (threads, pool) in machine::pools() {
        for &(n, d) in sizes {
            let [q, k, v] = [1, 2, 3].map(|seed| matrix::<F>(n, d, seed));
            let full = Inputs::dense(q.view(), k.view(), v.view()).expect("shapes fit");
            for (pattern, inputs, pairs) in
                [("full", full, n * n), ("causal", full.with_causal(), n * (n + 1) / 2)]
            {
                let id = || BenchmarkId::new("flash", format!("{n}x{d}"));
                let name = format!("{pattern} {float}, {threads}");
                let mut group = workload::group(c, format!("dense {name}"), 4 * pairs * d);
                workload::forward(&mut group, id(), &pool, &Flash::new(), &inputs);
                group.finish();
                let mut group =
                    workload::group(c, format!("training dense {name}"), 14 * pairs * d);
                workload::training(&mut group, id(), &pool, &Flash::new(), &inputs);
            }
        }
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    dense::<f32>(c, &[(128, 64), (1024, 64), (1024, 128), (4096, 64)]);
    dense::<f64>(c, &[(1024, 64)]);
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all);

//! Exact attention on dense inputs: `cargo bench --bench dense`.
//!
//! Throughput is in floating-point operations, 4 for each pair and column forward and 14 forward and
//! backward, as PyTorch's papers count them; "Gelem/s" reads GFLOP/s.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Float, Gradients, Inputs};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

fn matrix<F: Float>(rows: usize, columns: usize, seed: u64) -> Array2<F> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || {
        let value: f64 = StandardNormal.sample(&mut rng);
        F::of(value)
    })
}

fn dense<F: Float>(c: &mut Criterion, float: &str, sizes: &[(usize, usize)]) {
    let flash = Flash::new();
    for (threads, pool) in machine::pools() {
        for &(n, d) in sizes {
            let [q, k, v] = [1, 2, 3].map(|seed| matrix::<F>(n, d, seed));
            let full = Inputs::dense(q.view(), k.view(), v.view()).expect("shapes fit");
            for (pattern, inputs, pairs) in
                [("full", full, n * n), ("causal", full.causal(), n * (n + 1) / 2)]
            {
                let mut group = c.benchmark_group(format!("dense {float} {pattern}, {threads}"));
                let size = format!("{n}x{d}");
                let mut out = matrix::<F>(n, d, 4);
                group.throughput(Throughput::Elements((4 * pairs * d) as u64));
                group.bench_function(BenchmarkId::new("forward", &size), |bencher| {
                    pool.install(|| bencher.iter(|| flash.forward_into(&inputs, out.view_mut())));
                });
                let mut grads = Gradients::zeros(&inputs, &flash).expect("they fit in memory");
                let grad_out = matrix::<F>(n, d, 5);
                let mut train = || {
                    let saved = flash.forward_train_into(&inputs, out.view_mut())?;
                    flash.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut())
                };
                group.throughput(Throughput::Elements((14 * pairs * d) as u64));
                group.bench_function(BenchmarkId::new("forward and backward", &size), |bencher| {
                    pool.install(|| bencher.iter(&mut train));
                });
            }
        }
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    dense::<f32>(c, "f32", &[(128, 64), (1024, 64), (1024, 128), (4096, 64)]);
    dense::<f64>(c, "f64", &[(1024, 64)]);
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20);
    targets = benches
}
criterion_main!(all);

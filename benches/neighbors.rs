//! The ten nearest of 20,000 vectors, for all of them: `cargo bench --bench neighbors`.
//!
//! Beside it, what the product of the same matrices takes alone, in tiles that are not kept: by the
//! same kernel, for a threshold that no key reaches, and by `ndarray`.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::linalg::general_mat_mul;
use graph_attention::ndarray::{Array2, s};
use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::hint::black_box;

fn all_pairs(c: &mut Criterion) {
    machine::print_limits();
    let (n, dim, k) = (20_000, 64, 10);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let x: Array2<f32> = Array2::from_shape_simple_fn((n, dim), || StandardNormal.sample(&mut rng));
    for (threads, pool) in machine::pools() {
        let mut group = c.benchmark_group(format!("neighbors {n}x{dim}, k = {k}, {threads}"));
        // Multiply-adds.
        group.throughput(Throughput::Elements((n * n * dim) as u64));
        let mut tile = Array2::zeros((500, 1000));
        group.bench_function("product alone, ndarray", |bencher| {
            bencher.iter(|| {
                for (row, key) in (0..n * n / tile.len()).map(|at| (at / 20 * 500, at % 20 * 1000))
                {
                    let keys = x.slice(s![key..key + 1000, ..]);
                    let rows = x.slice(s![row..row + 500, ..]);
                    general_mat_mul(1.0, &rows, &keys.t(), 0.0, &mut tile);
                    black_box(&mut tile);
                }
            });
        });
        let index = ExactIndex::new(x.view(), Metric::Dot).expect("it fits");
        let none = NeighborSearch::new(k).threshold(f32::INFINITY);
        group.bench_function("product alone", |bencher| {
            pool.install(|| bencher.iter(|| index.search(x.view(), &none)));
        });
        for metric in [Metric::Dot, Metric::Cosine, Metric::Euclidean] {
            let index = ExactIndex::new(x.view(), metric).expect("it fits");
            let search = NeighborSearch::new(k).exclude_self(true);
            group.bench_function(BenchmarkId::new("exact", format!("{metric:?}")), |bencher| {
                pool.install(|| bencher.iter(|| index.search(x.view(), &search)));
            });
        }
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(10);
    targets = all_pairs
}
criterion_main!(all);

//! The ten nearest of 20,000 vectors, for all of them: `cargo bench -p benches --bench neighbors`.
//!
//! Compared with the product of the same matrices alone, in tiles that are not stored: with the same
//! kernel and a threshold that no key reaches, and with `ndarray`.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::linalg::general_mat_mul;
use graph_attention::ndarray::{Array2, s};
use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
use std::hint::black_box;
use workload::{machine, matrix};

fn all_pairs(c: &mut Criterion) {
    machine::print_limits();
    let (n, dim, k) = (20_000, 64, 10);
    let x: Array2<f32> = matrix(n, dim, 1);
    for (threads, pool) in machine::pools() {
        // Throughput in multiply-adds.
        let name = format!("neighbors, k = {k}, {threads}");
        let mut group = workload::group(c, name, n * n * dim);
        let id = |name: &str| BenchmarkId::new(name, format!("{n}x{dim}"));
        let mut tile = Array2::zeros((500, 1000));
        let mut product = || {
            for (row, key) in (0..n * n / tile.len()).map(|at| (at / 20 * 500, at % 20 * 1000)) {
                let keys = x.slice(s![key..key + 1000, ..]);
                let rows = x.slice(s![row..row + 500, ..]);
                general_mat_mul(1.0, &rows, &keys.t(), 0.0, &mut tile);
                black_box(&mut tile);
            }
        };
        // It uses no threads.
        if threads == machine::ONE_THREAD {
            let id = id("product alone, ndarray");
            group.bench_function(id, |bencher| bencher.iter(&mut product));
        }
        let index = ExactIndex::new(x.view(), Metric::Dot).expect("it fits");
        let none = NeighborSearch::new(k).threshold(f32::INFINITY);
        group.bench_function(id("product alone"), |bencher| {
            pool.install(|| bencher.iter(|| index.search(x.view(), &none)));
        });
        for metric in [Metric::Dot, Metric::Cosine, Metric::Euclidean] {
            let index = ExactIndex::new(x.view(), metric).expect("it fits");
            let search = NeighborSearch::new(k).exclude_self(true);
            group.bench_function(id(&format!("{metric:?}")), |bencher| {
                pool.install(|| bencher.iter(|| index.search(x.view(), &search)));
            });
        }
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = all_pairs
}
criterion_main!(all);

//! The ten nearest of 20,000 vectors, for all of them: `cargo bench -p benches --bench neighbors`.
//!
//! Compared with the product of the same matrices alone, in tiles that are not stored: with the same
//! kernel and a threshold that no key reaches, and with `ndarray`. Then the approximate index: the build, one
//! query at a time with several numbers of candidates, whose recall is printed, and searches that hide keys,
//! compared with the exact index. `neighbors.py` measures hnswlib and faiss on such keys.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::Inputs;
use graph_attention::ndarray::linalg::general_mat_mul;
use graph_attention::ndarray::{Array2, s};
use graph_attention::neighbors::{
    ExactIndex, HnswConfig, HnswIndex, Metric, NeighborIndex, NeighborSearch,
};
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

/// Rows around 200 centers.
fn clusters(n: usize, dim: usize, seed: u64) -> Array2<f32> {
    let centers: Array2<f32> = matrix(200, dim, 7);
    let mut rows: Array2<f32> = matrix(n, dim, seed);
    for (i, mut row) in rows.rows_mut().into_iter().enumerate() {
        // No period of the row's number.
        let center = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        row *= 0.5;
        row.scaled_add(2.0, &centers.row(center as usize % 200));
    }
    rows
}

fn recall(index: &HnswIndex<f32>, keys: &Array2<f32>, queries: &Array2<f32>, k: usize) -> f64 {
    let exact = ExactIndex::new(keys.view(), index.metric()).expect("it fits");
    let exact = exact.search(queries.view(), &NeighborSearch::new(k)).expect("it fits").graph;
    let (mut nearest, mut hits) = (Vec::new(), 0);
    for (query, row) in queries.rows().into_iter().enumerate() {
        index.nearest_into(row, k, &mut nearest).expect("the shape is right");
        let is_near = |key: usize| exact.neighbors(query).contains(&(key as u32));
        hits += nearest.iter().filter(|found| is_near(found.key)).count();
    }
    hits as f64 / exact.num_edges() as f64
}

fn approximate(c: &mut Criterion) {
    let (n, dim, k) = (20_000, 64, 10);
    let normal = || -> [Array2<f32>; 2] { [matrix(n, dim, 1), matrix(1000, dim, 2)] };
    let [mut long, short] = normal();
    long *= &matrix::<f32>(n, 1, 5).mapv(|x| (0.2 * x).exp());
    for (name, metric, [keys, queries]) in [
        ("normal, cosine", Metric::Cosine, normal()),
        ("normal, products", Metric::Dot, normal()),
        ("normal, Euclidean", Metric::Euclidean, normal()),
        ("lognormal norms, products", Metric::Dot, [long, short]),
        ("clusters, Euclidean", Metric::Euclidean, [clusters(n, dim, 3), clusters(1000, dim, 4)]),
    ] {
        let mut group = c.benchmark_group(format!("neighbors, approximate, {name}"));
        group.sample_size(10);
        let config = HnswConfig::new(metric);
        for (threads, pool) in machine::pools() {
            group.bench_function(format!("build, {threads}"), |bencher| {
                pool.install(|| bencher.iter(|| config.build(keys.clone())));
            });
        }
        let mut index = config.build(keys.clone()).expect("it fits");
        // With n candidates it compares with every key.
        for ef in [10, 20, 40, 70, 100, 150, 200, 300, n] {
            index.set_ef_search(ef).expect("not 0");
            println!("{name}, ef {ef}: recall {:.4}", recall(&index, &keys, &queries, k));
            let (mut nearest, mut number) = (Vec::new(), 0);
            group.bench_function(format!("one query, ef {ef}"), |bencher| {
                bencher.iter(|| {
                    number = (number + 1) % queries.nrows();
                    index.nearest_into(queries.row(number), k, &mut nearest)
                });
            });
        }
    }
}

fn filtered(c: &mut Criterion) {
    let keys: Array2<f32> = matrix(14_000, 64, 1);
    let queries: Array2<f32> = matrix(20, 64, 2);
    // No period of the key's number.
    let is_visible = |(query, key): (usize, usize)| {
        (query * 14_000 + key).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 0xffff < 0xffff * 3 / 100
    };
    let mask = Array2::from_shape_fn((20, 14_000), is_visible);
    let inputs = Inputs::dense(queries.view(), keys.view(), keys.view());
    let masked = inputs.and_then(|inputs| inputs.with_mask(mask.view())).expect("it fits");
    let nodes = keys.slice(s![..2000, ..]);
    let causal = Inputs::dense(nodes, nodes, nodes).expect("it fits").with_causal();
    for (name, inputs) in [("3 % of 14,000 visible, 20 queries", masked), ("causal, 2000", causal)]
    {
        let (queries, keys) = (inputs.query(), inputs.key());
        let search = NeighborSearch::new(10).visible_in(&inputs);
        let exact = ExactIndex::new(keys, Metric::Cosine).expect("it fits");
        let index = HnswConfig::new(Metric::Cosine).build(keys.to_owned()).expect("it fits");
        for (threads, pool) in machine::pools() {
            let mut group = c.benchmark_group(format!("neighbors, {name}, {threads}"));
            group.bench_function("exact", |bencher| {
                pool.install(|| bencher.iter(|| exact.search(queries, &search)));
            });
            group.bench_function("approximate", |bencher| {
                pool.install(|| bencher.iter(|| index.search(queries, &search)));
            });
        }
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = all_pairs, approximate, filtered
}
criterion_main!(all);

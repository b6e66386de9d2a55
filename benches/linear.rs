//! The products of projections: `Linear`, compared with the products of `ndarray`.
//! `cargo bench -p benches --bench linear`.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::LinearConfig;
use graph_attention::ndarray::{Array2, linalg::general_mat_mul};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, matrix};

/// Rows, inputs and outputs, and whether most inputs are 0.
const SHAPES: [([usize; 3], bool); 5] = [
    // A projection of 1024 tokens.
    ([1024, 512, 512], false),
    // The features of 50,000 nodes.
    ([50_000, 64, 64], false),
    // Words in papers, as in Cora.
    ([2708, 1433, 64], true),
    // Decoding 16 sequences, and one.
    ([16, 512, 512], false),
    ([1, 512, 512], false),
];

fn run(c: &mut Criterion, ([rows, inputs, outputs], is_sparse): ([usize; 3], bool)) {
    let config = LinearConfig::new(inputs, outputs).bias(false);
    let linear = config.init::<f32>(&mut Xoshiro256PlusPlus::seed_from_u64(1)).expect("sizes");
    let mut x = matrix::<f32>(rows, inputs, 1);
    if is_sparse {
        // Keeps 1.3 % of normal numbers.
        x.mapv_inplace(|x| if x > 2.24 { x } else { 0.0 });
    }
    let grad_out = matrix::<f32>(rows, outputs, 3);
    let weight = linear.weight();
    let mut out = Array2::zeros((rows, outputs));
    let shape = format!("{rows}x{inputs}x{outputs}");
    for (threads, pool) in machine::pools() {
        // Multiply-adds; with gradients there are three products.
        let work = rows * inputs * outputs;
        let mut group = workload::group(c, format!("linear, {threads}"), work);
        group.bench_function(BenchmarkId::new("Linear", &shape), |b| {
            pool.install(|| b.iter(|| linear.forward_into(x.view(), out.view_mut())));
        });
        group.bench_function(BenchmarkId::new("ndarray", &shape), |b| {
            pool.install(|| b.iter(|| general_mat_mul(1.0, &x, &weight.t(), 0.0, &mut out)));
        });
        group.finish();
        let mut group = workload::group(c, format!("linear, gradients, {threads}"), 2 * work);
        group.bench_function(BenchmarkId::new("Linear", &shape), |b| {
            pool.install(|| b.iter(|| linear.backward(x.view(), grad_out.view())));
        });
        group.bench_function(BenchmarkId::new("ndarray", &shape), |b| {
            pool.install(|| b.iter(|| (grad_out.dot(&weight), grad_out.t().dot(&x))));
        });
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    SHAPES.into_iter().for_each(|shape| run(c, shape));
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all);

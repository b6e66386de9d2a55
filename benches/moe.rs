//! What a mixture costs beside its experts: `cargo bench --bench moe`.
//!
//! `experts alone` is the expert run on all queries as many times as each query chooses one: the same
//! pairs without router, gathering and weighing. Since the machine's speed changes from one second to
//! the next, their ratio is also taken run by run, in turns, and printed.

mod machine;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::{Array2, ArrayView2};
use graph_attention::{Attention, Flash, Gradients, Graph, Inputs, MoeConfig, Result};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::time::Instant;

const COLUMNS: usize = 64;
const EXPERTS: usize = 8;
const CHOSEN: usize = 2;

fn matrix(rows: usize, seed: u64) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, COLUMNS), || StandardNormal.sample(&mut rng))
}

fn forward(
    attention: &dyn Attention<f32>,
    times: usize,
    inputs: &Inputs<'_, f32>,
    out: &mut Array2<f32>,
) -> Result<()> {
    (0..times).try_for_each(|_| attention.forward_into(inputs, out.view_mut()))
}

fn train(
    attention: &dyn Attention<f32>,
    times: usize,
    inputs: &Inputs<'_, f32>,
    out: &mut Array2<f32>,
    grad_out: ArrayView2<'_, f32>,
    grads: &mut Gradients<f32>,
) -> Result<()> {
    (0..times).try_for_each(|_| {
        let saved = attention.forward_train_into(inputs, out.view_mut())?;
        attention.backward_into(inputs, &saved, grad_out, grads.view_mut())
    })
}

/// The median over runs in turns of the time of one by that of the other.
fn ratio(mut one: impl FnMut() -> Result<()>, mut other: impl FnMut() -> Result<()>) -> f64 {
    let time = |run: &mut dyn FnMut() -> Result<()>| {
        let start = Instant::now();
        run().expect("shapes fit");
        start.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..21).map(|_| time(&mut one) / time(&mut other)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[10]
}

fn bench(c: &mut Criterion, pattern: &str, inputs: &Inputs<'_, f32>) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
    let experts = (0..EXPERTS).map(|_| Box::new(Flash::new()) as Box<dyn Attention<f32>>).collect();
    let moe = MoeConfig::new(COLUMNS, CHOSEN).init(experts, &mut rng).expect("valid sizes");
    let flash = Flash::new();
    let grad_out = matrix(inputs.num_queries(), 5);
    let mixtures: [(&str, &dyn Attention<f32>, usize); 2] =
        [("mixture", &moe, 1), ("experts alone", &flash, CHOSEN)];
    for (threads, pool) in machine::pools() {
        let size = format!("{pattern}, {CHOSEN} of {EXPERTS} experts, {threads}");
        let mut group = c.benchmark_group(format!("moe {size}"));
        let [mut out, mut other_out] = [grad_out.clone(), grad_out.clone()];
        let mut grads = Gradients::zeros(inputs, &moe).expect("they fit in memory");
        let mut other_grads = Gradients::zeros(inputs, &flash).expect("they fit in memory");
        for (name, attention, times) in mixtures {
            group.bench_function(BenchmarkId::new("forward", name), |bencher| {
                pool.install(|| bencher.iter(|| forward(attention, times, inputs, &mut out)));
            });
            let mut grads = Gradients::zeros(inputs, attention).expect("they fit in memory");
            group.bench_function(BenchmarkId::new("forward and backward", name), |bencher| {
                pool.install(|| {
                    bencher.iter(|| {
                        train(attention, times, inputs, &mut out, grad_out.view(), &mut grads)
                    });
                });
            });
        }
        group.finish();
        let forward = pool.install(|| {
            ratio(
                || forward(&moe, 1, inputs, &mut out),
                || forward(&flash, CHOSEN, inputs, &mut other_out),
            )
        });
        let train = pool.install(|| {
            let grad_out = grad_out.view();
            ratio(
                || train(&moe, 1, inputs, &mut out, grad_out, &mut grads),
                || train(&flash, CHOSEN, inputs, &mut other_out, grad_out, &mut other_grads),
            )
        });
        println!(
            "moe {size}: mixture / experts alone, in turns: forward {forward:.3}, forward and backward {train:.3}"
        );
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    for n in [1024, 4096] {
        let x = matrix(n, 1);
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).expect("shapes fit");
        bench(c, &format!("{n}x{COLUMNS}"), &inputs);
    }
    let (nodes, degree) = (50_000, 16);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let edges = (0..nodes * degree).map(|edge| (edge / degree, rng.random_range(0..nodes)));
    let graph = Graph::from_edges(nodes, nodes, edges).expect("edges in range");
    let _ = graph.transpose();
    let x = matrix(nodes, 2);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).expect("shapes fit");
    bench(c, &format!("graph of {nodes} nodes, {} edges", nodes * degree), &inputs);
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(10);
    targets = benches
}
criterion_main!(all);

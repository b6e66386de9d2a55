//! The cost of a mixture compared with its experts: `cargo bench -p benches --bench moe`.
//!
//! Each query uses 2 of 8 experts, which are all `Flash`; without routing, gathering and weighting this
//! is `Flash` twice on all queries. Because the machine's speed changes from one second to the next, both
//! are run alternately and the median of their ratios is printed.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Gradients, Inputs, MoeConfig, Result};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use std::time::Instant;
use workload::{machine, matrix, random_graph};

const COLUMNS: usize = 64;
const EXPERTS: usize = 8;
const CHOSEN: usize = 2;
const RUNS: usize = 5;

/// Returns the median ratio of two times over alternating runs.
fn ratio(mut one: impl FnMut() -> Result<()>, mut other: impl FnMut() -> Result<()>) -> f64 {
    let time = |run: &mut dyn FnMut() -> Result<()>| {
        let start = Instant::now();
        run().expect("shapes fit");
        start.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..RUNS).map(|_| time(&mut one) / time(&mut other)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[RUNS / 2]
}

fn bench(c: &mut Criterion, pattern: &str, inputs: &Inputs<'_, f32>) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
    let experts = (0..EXPERTS).map(|_| Box::new(Flash::new()) as Box<dyn Attention<f32>>).collect();
    let moe = MoeConfig::new(COLUMNS, CHOSEN).init(experts, &mut rng).expect("valid sizes");
    let flash = Flash::new();
    let n = inputs.num_queries();
    let grad_out = matrix(n, COLUMNS, 5);
    for (threads, pool) in machine::pools() {
        let name = format!("moe {pattern}, {threads}");
        let mechanisms: [&dyn Attention<f32>; 2] = [&moe, &flash];
        for attention in mechanisms {
            let id = || BenchmarkId::new(attention.name(), n);
            let mut group = workload::group(c, &name, inputs.num_pairs());
            workload::forward(&mut group, id(), &pool, attention, inputs);
            group.finish();
            let mut group = workload::group(c, format!("training {name}"), inputs.num_pairs());
            workload::training(&mut group, id(), &pool, attention, inputs);
        }
        let [mut out, mut other_out] = [grad_out.clone(), grad_out.clone()];
        let forward = |attention: &dyn Attention<f32>, out: &mut Array2<f32>| {
            attention.forward_into(inputs, out.view_mut())
        };
        let of_forward = pool.install(|| {
            let twice = || (0..CHOSEN).try_for_each(|_| forward(&flash, &mut other_out));
            ratio(|| forward(&moe, &mut out), twice)
        });
        let mut grads = Gradients::zeros(inputs, &moe).expect("they fit in memory");
        let mut other_grads = Gradients::zeros(inputs, &flash).expect("they fit in memory");
        let train =
            |attention: &dyn Attention<f32>, out: &mut Array2<f32>, grads: &mut Gradients<f32>| {
                let saved = attention.forward_train_into(inputs, out.view_mut())?;
                attention.backward_into(inputs, &saved, grad_out.view(), grads.view_mut())
            };
        let of_training = pool.install(|| {
            let twice =
                || (0..CHOSEN).try_for_each(|_| train(&flash, &mut other_out, &mut other_grads));
            ratio(|| train(&moe, &mut out, &mut grads), twice)
        });
        println!(
            "{name}: by {CHOSEN} experts, in turns: {of_forward:.3}, training {of_training:.3}"
        );
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    for n in [1024, 4096] {
        let x = matrix(n, COLUMNS, 1);
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).expect("shapes fit");
        bench(c, "dense", &inputs);
    }
    let nodes = 50_000;
    let graph = random_graph(nodes, 16, 3);
    let x = matrix(nodes, COLUMNS, 2);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).expect("shapes fit");
    bench(c, "graph", &inputs);
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all);

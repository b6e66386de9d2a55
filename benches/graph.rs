//! Exact attention on graphs and for one query: `cargo bench --bench graph`.
//!
//! Throughput is in edges, "Melem/s" reads million edges a second; 4 heads of 16 columns, keys drawn
//! with a power law and numbered at random, as in a social network stored as it came.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Gradients, Graph, Inputs};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

const HEADS: usize = 4;
const COLUMNS: usize = 64;

fn matrix(rows: usize, seed: u64) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, COLUMNS), || StandardNormal.sample(&mut rng))
}

fn power_law(nodes: usize, edges: usize) -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut names: Vec<usize> = (0..nodes).collect();
    names.shuffle(&mut rng);
    let edges = (0..edges).map(|_| {
        let popularity = (nodes as f64 * rng.random::<f64>().powi(3)) as usize;
        (rng.random_range(0..nodes), names[popularity])
    });
    Graph::from_edges(nodes, nodes, edges).expect("edges in range")
}

fn graphs(c: &mut Criterion) {
    machine::print_limits();
    let flash = Flash::new();
    for (threads, pool) in machine::pools() {
        let mut group = c.benchmark_group(format!("graph, {threads}"));
        for nodes in [200, 4_000, 50_000] {
            let graph = power_law(nodes, 16 * nodes);
            let _ = graph.transpose();
            let [q, k, v] = [2, 3, 4].map(|seed| matrix(nodes, seed));
            let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph)
                .and_then(|inputs| inputs.with_heads(HEADS))
                .expect("shapes fit");
            let mut out = matrix(nodes, 5);
            group.throughput(Throughput::Elements(inputs.num_pairs() as u64));
            group.bench_function(BenchmarkId::new("forward", nodes), |bencher| {
                pool.install(|| bencher.iter(|| flash.forward_into(&inputs, out.view_mut())));
            });
            let mut grads = Gradients::zeros(&inputs, &flash).expect("they fit in memory");
            let grad_out = matrix(nodes, 6);
            let mut train = || {
                let saved = flash.forward_train_into(&inputs, out.view_mut())?;
                flash.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut())
            };
            group.bench_function(BenchmarkId::new("forward and backward", nodes), |bencher| {
                pool.install(|| bencher.iter(&mut train));
            });
        }
    }
}

fn one_query(c: &mut Criterion) {
    let mut group = c.benchmark_group("one query, 1 head");
    for neighbours in [32, 256, 4096] {
        let [q, k, v] = [(1, 2), (neighbours, 3), (neighbours, 4)].map(|(n, seed)| matrix(n, seed));
        let inputs = Inputs::single(q.row(0), k.view(), v.view()).expect("shapes fit");
        let mut out = matrix(1, 5);
        group.throughput(Throughput::Elements(neighbours as u64));
        group.bench_function(BenchmarkId::new("forward", neighbours), |bencher| {
            bencher.iter(|| Flash::new().forward_into(&inputs, out.view_mut()));
        });
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20);
    targets = graphs, one_query
}
criterion_main!(all);

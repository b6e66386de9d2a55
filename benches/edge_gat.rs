//! The three scores of `EdgeGat`: `cargo bench --bench edge_gat`.
//!
//! Throughput is in edges. A power-law graph of 50,000 nodes and 800,000 edges in the order of the
//! targets, 64 features a node and 8 an edge, 4 heads of 16: what PyG's `GATConv`, `GATv2Conv` and
//! `TransformerConv` are measured on.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, EdgeGat, EdgeGatConfig, Gradients, Graph, Inputs, Score};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

const NODES: usize = 50_000;
const EDGES: usize = 16 * NODES;

fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || StandardNormal.sample(&mut rng))
}

fn power_law() -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut names: Vec<usize> = (0..NODES).collect();
    names.shuffle(&mut rng);
    let edge = |_| {
        let popularity = (NODES as f64 * rng.random::<f64>().powi(3)) as usize;
        (rng.random_range(0..NODES), names[popularity])
    };
    let mut edges: Vec<_> = (0..EDGES).map(edge).collect();
    edges.sort_by_key(|&(target, _)| target);
    Graph::from_edges(NODES, NODES, edges).expect("edges in range")
}

fn scores(c: &mut Criterion) {
    machine::print_limits();
    let graph = power_law();
    let _ = graph.transpose();
    let (nodes, features) = (matrix(NODES, 64, 2), matrix(EDGES, 8, 3));
    let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features.view()))
        .expect("shapes fit");
    for (threads, pool) in machine::pools() {
        let mut group = c.benchmark_group(format!("edge_gat, {threads}"));
        group.throughput(Throughput::Elements(EDGES as u64));
        for score in [Score::Gat, Score::GatV2, Score::DotProduct] {
            let config = EdgeGatConfig::new(score, 64, 16, 4).edge_dim(8);
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
            let gat: EdgeGat<f32> = config.init(&mut rng).expect("the sizes are positive");
            let score = format!("{score:?}");
            let mut out = matrix(NODES, 64, 5);
            group.bench_function(BenchmarkId::new("forward", &score), |bencher| {
                pool.install(|| bencher.iter(|| gat.forward_into(&inputs, out.view_mut())));
            });
            let mut grads = Gradients::zeros(&inputs, &gat).expect("they fit in memory");
            let grad_out = matrix(NODES, 64, 6);
            let mut train = || {
                let saved = gat.forward_train_into(&inputs, out.view_mut())?;
                gat.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut())
            };
            group.bench_function(BenchmarkId::new("forward and backward", &score), |bencher| {
                pool.install(|| bencher.iter(&mut train));
            });
        }
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(10);
    targets = scores
}
criterion_main!(all);

//! The scores of `EdgeGat`: `cargo bench -p benches --bench edge_gat`.
//!
//! Throughput is in edges. The input is a power-law graph with 50,000 nodes and 800,000 edges in the
//! order of the targets, 64 features per node and 8 per edge, 4 heads of 16: the same as for PyG's
//! `GATConv`, `GATv2Conv` and `TransformerConv`.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{EdgeGat, EdgeGatConfig, Inputs, edge_gat::Score};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, matrix, power_law_graph};

const NODES: usize = 50_000;

fn scores(c: &mut Criterion) {
    machine::print_limits();
    let graph = power_law_graph(NODES, 16, true);
    let (nodes, features) = (matrix(NODES, 64, 2), matrix(graph.num_edges(), 8, 3));
    let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features.view()))
        .expect("shapes fit");
    for score in [Score::Gat, Score::GatV2, Score::Additive, Score::DotProduct] {
        let config = EdgeGatConfig::new(score, 64, 16, 4).edge_dim(8);
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
        let gat: EdgeGat<f32> = config.init(&mut rng).expect("the sizes are positive");
        for (threads, pool) in machine::pools() {
            let id = || BenchmarkId::new(format!("{score:?}"), NODES);
            let name = format!("edge_gat, {threads}");
            let mut group = workload::group(c, &name, inputs.num_pairs());
            workload::forward(&mut group, id(), &pool, &gat, &inputs);
            group.finish();
            let mut group = workload::group(c, format!("training {name}"), inputs.num_pairs());
            workload::training(&mut group, id(), &pool, &gat, &inputs);
        }
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = scores
}
criterion_main!(all);

//! A graph of a million nodes and ten million edges: `cargo bench -p benches --bench large`.
//!
//! Building it from a list in no order, compared with sorting the same list, and both passes of an `EdgeGat`
//! with 32 features per node and 4 heads of 8. Throughput is in edges. The peak memory of a pass is printed for
//! graphs of a quarter, half and the whole size, which shows that it is linear.

mod workload;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{
    Attention, EdgeGat, EdgeGatConfig, Gradients, Graph, Inputs, edge_gat::Score,
};
use peak_alloc::PeakAlloc;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, matrix};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const NODES: usize = 1_000_000;
const FEATURES: usize = 32;

/// Ten edges a node, in no order.
fn edges(nodes: usize) -> Vec<(usize, usize)> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut node = || rng.random_range(0..nodes);
    (0..10 * nodes).map(|_| (node(), node())).collect()
}

/// Runs it; returns the result and the peak of memory beside what was there before, in bytes.
fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    PEAK.reset_peak_usage();
    let before = PEAK.current_usage();
    let result = run();
    (result, PEAK.peak_usage() - before)
}

fn building(c: &mut Criterion) {
    let list = edges(NODES);
    let mut group = workload::group(c, "large, building", list.len());
    group.bench_function("from_edges", |bencher| {
        bencher.iter(|| Graph::from_edges(NODES, NODES, list.iter().copied()));
    });
    let packed: Vec<u64> = list.iter().map(|&(a, b)| (a as u64) << 32 | b as u64).collect();
    group.bench_function("a sort of the list", |bencher| {
        bencher.iter_batched_ref(
            || packed.clone(),
            |packed| packed.sort_unstable(),
            BatchSize::PerIteration,
        );
    });
}

fn passes(c: &mut Criterion) {
    machine::print_limits();
    let config = EdgeGatConfig::new(Score::Gat, FEATURES, 8, 4);
    let gat: EdgeGat<f32> =
        config.init(&mut Xoshiro256PlusPlus::seed_from_u64(4)).expect("the sizes are positive");
    for nodes in [NODES / 4, NODES / 2, NODES] {
        let list = edges(nodes);
        let (graph, built) = peak(|| Graph::from_edges(nodes, nodes, list).expect("in range"));
        let x = matrix(nodes, FEATURES, 2);
        let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).expect("shapes fit");
        let (mut out, grad_out) = (Array2::zeros((nodes, 32)), matrix(nodes, 32, 6));
        let forward = peak(|| gat.forward_into(&inputs, out.view_mut()).expect("shapes fit")).1;
        let mut grads = Gradients::zeros(&inputs, &gat).expect("they fit in memory");
        // With the transpose of the graph, which is kept.
        let training = || {
            let saved = gat.forward_train_into(&inputs, out.view_mut())?;
            gat.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut())
        };
        let (result, training) = peak(training);
        result.expect("shapes fit");
        let per = |bytes: usize| bytes / (nodes + graph.num_edges());
        println!(
            "{nodes} nodes, bytes per node and edge: build {}, forward {}, with backward {}",
            per(built),
            per(forward),
            per(training)
        );
        if nodes == NODES {
            for (threads, pool) in machine::pools() {
                let id = || BenchmarkId::new("Gat", NODES);
                let mut group = workload::group(c, format!("large, {threads}"), inputs.num_pairs());
                workload::forward(&mut group, id(), &pool, &gat, &inputs);
                group.finish();
                let name = format!("training large, {threads}");
                let mut group = workload::group(c, name, inputs.num_pairs());
                workload::training(&mut group, id(), &pool, &gat, &inputs);
            }
        }
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = building, passes
}
criterion_main!(all);

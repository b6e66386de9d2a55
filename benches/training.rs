//! Every mechanism on the same inputs, forward and backward: `cargo bench -p benches --bench training`.
//!
//! Computes all gradients, of queries, keys, values and parameters. Dense inputs of 1024 nodes in `f32`
//! and `f64`, and in `f32` a random graph of 20,000 nodes with 16 neighbours each, and 16 latent
//! neighbours for `DualSpace`, which it finds itself otherwise; 64 columns, one thread and all.
//! Throughput is in (query, key) pairs of the inputs.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{Float, Inputs};
use workload::{Places, machine, matrix, random_graph};

const COLUMNS: usize = 64;

fn all<F: Float>(c: &mut Criterion, workload: &str, size: usize, inputs: Inputs<'_, F>) {
    let places = Places::new(&inputs);
    let inputs = places.add_to(inputs);
    for (threads, pool) in machine::pools() {
        let name = format!("training {workload} {}, {threads}", std::any::type_name::<F>());
        let mut group = workload::group(c, name, inputs.num_pairs());
        for attention in workload::mechanisms(COLUMNS) {
            let id = BenchmarkId::new(attention.name(), size);
            workload::training(&mut group, id, &pool, &*attention, &inputs);
        }
    }
}

fn dense<F: Float>(c: &mut Criterion) {
    let n = 1024;
    let x = matrix::<F>(n, COLUMNS, 2);
    all(c, "dense", n, Inputs::dense(x.view(), x.view(), x.view()).expect("shapes fit"));
}

fn graph(c: &mut Criterion) {
    let (nodes, degree) = (20_000, 16);
    let [graph, latent] = [3, 4].map(|seed| random_graph(nodes, degree, seed));
    let x = matrix::<f32>(nodes, COLUMNS, 2);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)
        .and_then(|inputs| inputs.with_latent(&latent))
        .expect("shapes fit");
    all(c, "graph", nodes, inputs);
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    dense::<f32>(c);
    graph(c);
    dense::<f64>(c);
}

criterion_group! {
    name = all_of_them;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all_of_them);

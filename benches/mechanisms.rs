//! Every mechanism on the same inputs, forward: `cargo bench -p benches --bench mechanisms`.
//!
//! One query over 16 … 4096 neighbours, dense inputs of 128 … 4096 nodes, and a random graph of 50,000
//! nodes with 16 neighbours each, and 16 latent neighbours for `DualSpace`, which it finds itself
//! otherwise; 64 columns, `f32`, and `f64` at 256 neighbours and 1024 nodes, one thread and all.
//! Throughput is in (query, key) pairs of the inputs, so a mechanism that processes fewer pairs appears
//! faster.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{Float, Inputs};
use workload::{Places, machine, matrix, random_graph};

const COLUMNS: usize = 64;

fn all<F: Float>(c: &mut Criterion, workload: &str, size: usize, inputs: Inputs<'_, F>) {
    let places = Places::new(&inputs);
    let inputs = places.add_to(inputs);
    for (threads, pool) in machine::pools() {
        // Work of microseconds is not shared among threads.
        if workload == "one query" && threads != machine::ONE_THREAD {
            continue;
        }
        let name = format!("{workload} {}, {threads}", std::any::type_name::<F>());
        let mut group = workload::group(c, name, inputs.num_pairs());
        for attention in workload::mechanisms(COLUMNS) {
            let id = BenchmarkId::new(attention.name(), size);
            workload::forward(&mut group, id, &pool, &*attention, &inputs);
        }
    }
}

fn vectors<F: Float>(c: &mut Criterion, one_query: &[usize], dense: &[usize]) {
    for &neighbours in one_query {
        let [query, keys] = [1, neighbours].map(|rows| matrix::<F>(rows, COLUMNS, 2));
        let inputs = Inputs::dense(query.view(), keys.view(), keys.view()).expect("shapes fit");
        all(c, "one query", neighbours, inputs);
    }
    for &n in dense {
        let x = matrix::<F>(n, COLUMNS, 2);
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).expect("shapes fit");
        all(c, "dense", n, inputs);
    }
}

fn graph(c: &mut Criterion) {
    let (nodes, degree) = (50_000, 16);
    let [graph, latent] = [3, 4].map(|seed| random_graph(nodes, degree, seed));
    let x = matrix::<f32>(nodes, COLUMNS, 2);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)
        .and_then(|inputs| inputs.with_latent(&latent))
        .expect("shapes fit");
    all(c, "graph", nodes, inputs);
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    vectors::<f32>(c, &[16, 256, 4096], &[128, 1024, 4096]);
    graph(c);
    vectors::<f64>(c, &[256], &[1024]);
}

criterion_group! {
    name = all_of_them;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all_of_them);

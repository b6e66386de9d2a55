//! Exact attention on graphs and for one query: `cargo bench -p benches --bench graph`.
//!
//! Throughput is in edges, "Melem/s" means million edges per second; 4 heads of 16 columns, keys drawn
//! with a power law and numbered at random, as in a social network in its original order. Then other numbers of
//! heads on one thread, with uniformly drawn keys, 16 or 3 edges per node, and one query with 500,000 edges; before
//! each, how many edges per second the machine could read: the keys and values of an edge side by side, in random
//! order. Then a graph of communities and a grid, with 50,000 nodes in no order and reordered.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{Flash, Inputs, Reordering};
use workload::{hub, machine, matrix, power_law_graph, random_graph};

const COLUMNS: usize = 64;

fn graphs(c: &mut Criterion) {
    machine::print_limits();
    for (threads, pool) in machine::pools() {
        for nodes in [200, 4_000, 50_000] {
            let graph = power_law_graph(nodes, 16, false);
            let [q, k, v] = [2, 3, 4].map(|seed| matrix::<f32>(nodes, COLUMNS, seed));
            let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph)
                .and_then(|inputs| inputs.with_heads(4))
                .expect("shapes fit");
            let id = || BenchmarkId::new("flash", nodes);
            let name = format!("power-law graph, {threads}");
            let mut group = workload::group(c, &name, inputs.num_pairs());
            workload::forward(&mut group, id(), &pool, &Flash::new(), &inputs);
            group.finish();
            let mut group = workload::group(c, format!("training {name}"), inputs.num_pairs());
            workload::training(&mut group, id(), &pool, &Flash::new(), &inputs);
        }
    }
}

/// Heads of queries, of keys and values, and columns of each.
const SHAPES: [[usize; 3]; 5] = [[4, 4, 16], [8, 8, 8], [1, 1, 64], [2, 2, 32], [8, 2, 16]];

fn shapes(c: &mut Criterion) {
    let [(threads, pool), _] = machine::pools();
    for (kind, nodes, degree) in [
        ("16 edges per node", 200, 16),
        ("16 edges per node", 50_000, 16),
        ("3 edges per node", 200, 3),
        ("3 edges per node", 50_000, 3),
        ("one query", 50_000, 0),
    ] {
        let graph = if degree > 0 { random_graph(nodes, degree, 1) } else { hub(nodes) };
        for [heads, kv_heads, dim] in SHAPES {
            let reads = machine::random_reads(nodes, 2 * kv_heads * dim * size_of::<f32>());
            println!("\n{nodes} keys: at most {:.1} million edges/s in random order", reads / 1e6);
            let [q, k, v] =
                [(graph.num_queries(), heads, 2), (nodes, kv_heads, 3), (nodes, kv_heads, 4)]
                    .map(|(rows, heads, seed)| matrix::<f32>(rows, heads * dim, seed));
            let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph)
                .and_then(|inputs| inputs.with_grouped_heads(heads, kv_heads))
                .expect("shapes fit");
            let shared =
                if kv_heads < heads { format!(", {kv_heads} of keys") } else { String::new() };
            let id = || BenchmarkId::new(format!("{heads} heads{shared} x {dim}"), nodes);
            let name = format!("{kind}, {threads}");
            let mut group = workload::group(c, &name, inputs.num_pairs());
            workload::forward(&mut group, id(), &pool, &Flash::new(), &inputs);
            group.finish();
            let mut group = workload::group(c, format!("training {name}"), inputs.num_pairs());
            workload::training(&mut group, id(), &pool, &Flash::new(), &inputs);
        }
    }
}

fn orders(c: &mut Criterion) {
    let [(threads, pool), _] = machine::pools();
    for (kind, graph) in [
        ("communities", workload::shuffled_communities(500, 100)),
        ("grid", workload::shuffled_grid(224)),
    ] {
        let nodes = graph.num_queries();
        let [q, k, v] = [2, 3, 4].map(|seed| matrix::<f32>(nodes, COLUMNS, seed));
        let ordered = |method| {
            let order = graph.reordering(method).expect("one node set");
            graph.permute(&order).expect("a permutation").graph().clone()
        };
        for (order, graph) in [
            ("no order", graph.clone()),
            ("reverse Cuthill-McKee", ordered(Reordering::ReverseCuthillMcKee)),
            ("by communities", ordered(Reordering::Communities)),
        ] {
            let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph)
                .and_then(|inputs| inputs.with_heads(4))
                .expect("shapes fit");
            let id = || BenchmarkId::new("flash", order);
            let mut group = workload::group(c, format!("{kind}, {threads}"), inputs.num_pairs());
            workload::forward(&mut group, id(), &pool, &Flash::new(), &inputs);
            group.finish();
            let name = format!("training {kind}, {threads}");
            let mut group = workload::group(c, name, inputs.num_pairs());
            workload::training(&mut group, id(), &pool, &Flash::new(), &inputs);
        }
    }
}

fn one_query(c: &mut Criterion) {
    let [(threads, pool), _] = machine::pools();
    for neighbours in [32, 256, 4096] {
        let [q, k, v] = [(1, 2), (neighbours, 3), (neighbours, 4)]
            .map(|(rows, seed)| matrix::<f32>(rows, COLUMNS, seed));
        let inputs = Inputs::single(q.row(0), k.view(), v.view()).expect("shapes fit");
        let mut group = workload::group(c, format!("one query, {threads}"), neighbours);
        let id = BenchmarkId::new("flash", neighbours);
        workload::forward(&mut group, id, &pool, &Flash::new(), &inputs);
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = graphs, shapes, orders, one_query
}
criterion_main!(all);

//! The cost of rotations: `GraphRope` around `Flash`, and `EdgeRope`, compared with `Flash` alone.
//! `cargo bench -p benches --bench graph_rope`.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::{Attention, Flash, Graph, GraphRopeConfig, Inputs, graph_rope::Layout};
use workload::{Places, machine, matrix, random_graph};

/// The layout does not affect the time.
fn mechanisms(head_dim: usize) -> [Box<dyn Attention<f32>>; 3] {
    let config = GraphRopeConfig::new(head_dim, Layout::Half);
    let of_nodes = config.init(Flash::new()).expect("the head size is even");
    let of_edges = config.init_edges().expect("the head size is even");
    [Box::new(Flash::new()), Box::new(of_nodes), Box::new(of_edges)]
}

fn run(c: &mut Criterion, pattern: &str, graph: Option<&Graph>, [n, heads, dim]: [usize; 3]) {
    let [query, key, value] = [1, 2, 3].map(|seed| matrix(n, heads * dim, seed));
    let inputs = match graph {
        None => Inputs::dense(query.view(), key.view(), value.view()),
        Some(graph) => Inputs::graph(query.view(), key.view(), value.view(), graph),
    };
    let inputs = inputs.and_then(|inputs| inputs.with_heads(heads)).expect("shapes fit");
    let places = Places::new(&inputs);
    let inputs = places.add_to(inputs);
    for (threads, pool) in machine::pools() {
        for attention in mechanisms(dim) {
            let group = format!("rope {pattern}, {threads}");
            let id = || BenchmarkId::new(attention.name(), format!("{n}x{heads}x{dim}"));
            let mut forward = workload::group(c, &group, inputs.num_pairs());
            workload::forward(&mut forward, id(), &pool, &*attention, &inputs);
            forward.finish();
            let mut training = workload::group(c, format!("training {group}"), inputs.num_pairs());
            workload::training(&mut training, id(), &pool, &*attention, &inputs);
        }
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    for sizes in [[1024, 1, 64], [1024, 8, 64]] {
        run(c, "dense", None, sizes);
    }
    let graph = random_graph(50_000, 16, 3);
    for [heads, dim] in [[4, 16], [1, 64]] {
        run(c, "graph", Some(&graph), [50_000, heads, dim]);
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all);

//! What rotations cost: `GraphRope` around `Flash`, and `EdgeRope`, beside `Flash` alone.
//! `cargo bench --bench graph_rope`.

mod machine;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::{Array1, Array2};
use graph_attention::{Attention, Flash, Gradients, Graph, GraphRopeConfig, Inputs, Layout};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

fn mechanisms(head_dim: usize) -> Vec<(&'static str, Box<dyn Attention<f32>>)> {
    let mut mechanisms: Vec<(_, Box<dyn Attention<f32>>)> = vec![("flash", Box::new(Flash::new()))];
    for (names, layout) in [
        (["graph_rope, halves", "edge_rope, halves"], Layout::Half),
        (["graph_rope, interleaved", "edge_rope, interleaved"], Layout::Interleaved),
    ] {
        let config = GraphRopeConfig::new(head_dim, layout);
        let of_nodes = config.init(Flash::new()).expect("the head size is even");
        let of_edges = config.init_edges().expect("the head size is even");
        mechanisms.push((names[0], Box::new(of_nodes)));
        mechanisms.push((names[1], Box::new(of_edges)));
    }
    mechanisms
}

fn run(c: &mut Criterion, group: &str, graph: Option<&Graph>, [n, heads, dim]: [usize; 3]) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut normal = |columns| {
        Array2::<f32>::from_shape_simple_fn((n, columns), || StandardNormal.sample(&mut rng))
    };
    let [query, key, value] = [(); 3].map(|()| normal(heads * dim));
    let positions = 100.0 * normal(1);
    let inputs = match graph {
        None => Inputs::dense(query.view(), key.view(), value.view()),
        Some(graph) => Inputs::graph(query.view(), key.view(), value.view(), graph),
    };
    let inputs = inputs.and_then(|inputs| inputs.with_heads(heads)).expect("shapes fit");
    let distances = (0..inputs.num_pairs()).map(|pair| (pair % 101) as f32).collect::<Array1<_>>();
    let inputs = inputs.with_positions(positions.view(), positions.view());
    let inputs = inputs.and_then(|inputs| inputs.with_distances(distances.view()));
    let inputs = inputs.expect("there is one for each");
    for (threads, pool) in machine::pools() {
        let mut group = c.benchmark_group(format!("rope {group} {n}x{heads}x{dim}, {threads}"));
        group.throughput(Throughput::Elements(inputs.num_pairs() as u64));
        for (name, attention) in mechanisms(dim) {
            let mut out = Array2::zeros((n, heads * dim));
            let mut grads = Gradients::zeros(&inputs, &attention).expect("they fit in memory");
            group.bench_function(BenchmarkId::new("forward", name), |bencher| {
                pool.install(|| bencher.iter(|| attention.forward_into(&inputs, out.view_mut())));
            });
            let mut train = || {
                let saved = attention.forward_train_into(&inputs, out.view_mut())?;
                attention.backward_into(&inputs, &saved, query.view(), grads.view_mut())
            };
            group.bench_function(BenchmarkId::new("forward and backward", name), |bencher| {
                pool.install(|| bencher.iter(&mut train));
            });
        }
    }
}

fn dense(c: &mut Criterion) {
    machine::print_limits();
    for sizes in [[1024, 1, 64], [1024, 8, 64]] {
        run(c, "dense", None, sizes);
    }
}

fn graph(c: &mut Criterion) {
    let (nodes, degree) = (50_000, 16);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
    let edges = (0..nodes * degree).map(|edge| (edge / degree, rng.random_range(0..nodes)));
    let graph = Graph::from_edges(nodes, nodes, edges).expect("edges in range");
    let _ = graph.transpose();
    for [heads, dim] in [[4, 16], [1, 64]] {
        run(c, "graph", Some(&graph), [nodes, heads, dim]);
    }
}

criterion_group!(benches, dense, graph);
criterion_main!(benches);

//! Shared code of the benches: seeded inputs, the list of mechanisms, and measurement.
#![allow(dead_code, reason = "every bench is a crate of its own and uses its part")]

pub(crate) mod machine;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use graph_attention::ndarray::{Array1, Array2};
use graph_attention::neighbors::Metric;
use graph_attention::{
    Attention, DualSpaceConfig, EdgeGatConfig, Flash, Float, Gradients, Graph, GraphRopeConfig,
    Inputs, LocalGlobal, MoeConfig, MultiHeadConfig, PerformerConfig, PoincareConfig, Result,
    ScaledDotProduct,
    dual_space::{Fusion, LatentSearch},
    edge_gat::Score,
    graph_rope::Layout,
    local_global::Window,
    poincare::Coordinates,
};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use rayon::ThreadPool;
use std::time::Duration;

/// A point takes about three seconds; with `--quick`, one second or a single run, whichever is longer.
/// Uses the instruction set in `GRAPH_ATTENTION_SIMD`.
pub(crate) fn criterion() -> Criterion {
    let simd = graph_attention::testing::hold_simd().expect("the CPU has the instruction set");
    println!("instruction set: {simd}");
    let criterion = Criterion::default().sample_size(10).nresamples(10_000);
    criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

/// Draws normal entries.
pub(crate) fn matrix<F: Float>(rows: usize, columns: usize, seed: u64) -> Array2<F> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || {
        let value: f64 = StandardNormal.sample(&mut rng);
        F::from_f64(value)
    })
}

/// Names nodes at random.
fn shuffled(nodes: usize, edges: Vec<(usize, usize)>) -> Graph {
    let mut names: Vec<usize> = (0..nodes).collect();
    names.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(9));
    let edges = edges.into_iter().map(|(query, key)| (names[query], names[key]));
    prepare(Graph::from_edges(nodes, nodes, edges))
}

/// Builds a graph of groups of nodes, in no order: 16 edges a node, 9 of 10 in the group.
pub(crate) fn shuffled_communities(groups: usize, size: usize) -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
    let nodes = groups * size;
    let edges = (0..16 * nodes).map(|edge| {
        let first = edge / 16 / size * size;
        let group = if rng.random_bool(0.9) { first..first + size } else { 0..nodes };
        (edge / 16, rng.random_range(group))
    });
    let edges = edges.collect();
    shuffled(nodes, edges)
}

/// Builds a square grid, in no order, in which every node has its 8 neighbours.
pub(crate) fn shuffled_grid(side: usize) -> Graph {
    let near = |x: usize| x.saturating_sub(1)..(x + 2).min(side);
    let edges = (0..side * side).flat_map(|node| {
        let (y, x) = (node / side, node % side);
        let all = near(y).flat_map(move |y| near(x).map(move |x| y * side + x));
        all.filter(move |&other| other != node).map(move |other| (node, other))
    });
    let edges = edges.collect();
    shuffled(side * side, edges)
}

/// Builds a graph in which every node has `degree` random neighbours.
pub(crate) fn random_graph(nodes: usize, degree: usize, seed: u64) -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let edges = (0..nodes * degree).map(|edge| (edge / degree, rng.random_range(0..nodes)));
    prepare(Graph::from_edges(nodes, nodes, edges))
}

/// Builds a graph of one query with 500,000 edges to random keys.
pub(crate) fn hub(keys: usize) -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    prepare(Graph::from_edges(1, keys, (0..500_000).map(|_| (0, rng.random_range(0..keys)))))
}

/// Builds a graph with keys drawn with a power law and numbered at random, as in a social network in its
/// original order; the edges are in the order of their queries or in random order.
pub(crate) fn power_law_graph(nodes: usize, degree: usize, sorted: bool) -> Graph {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut names: Vec<usize> = (0..nodes).collect();
    names.shuffle(&mut rng);
    let edge = |_| {
        let popularity = (nodes as f64 * rng.random::<f64>().powi(3)) as usize;
        (rng.random_range(0..nodes), names[popularity])
    };
    let mut edges: Vec<_> = (0..nodes * degree).map(edge).collect();
    if sorted {
        edges.sort_by_key(|&(query, _)| query);
    }
    prepare(Graph::from_edges(nodes, nodes, edges))
}

/// Computes the transpose, which a graph otherwise computes and caches in the first backward pass.
fn prepare(graph: Result<Graph>) -> Graph {
    let graph = graph.expect("edges in range");
    let _ = graph.transpose();
    graph
}

/// Positions and distances, for the mechanisms that read them.
#[derive(Debug)]
pub(crate) struct Places<F>([Array2<F>; 2], Array1<F>);

impl<F: Float> Places<F> {
    pub(crate) fn new(inputs: &Inputs<'_, F>) -> Self {
        let positions =
            |n: usize| Array2::from_shape_fn((n, 1), |(node, _)| F::from_f64((node % 1009) as f64));
        let distances = (0..inputs.num_pairs()).map(|pair| F::from_f64((pair % 101) as f64));
        Self([positions(inputs.num_queries()), positions(inputs.num_keys())], distances.collect())
    }

    pub(crate) fn add_to<'a>(&'a self, inputs: Inputs<'a, F>) -> Inputs<'a, F> {
        let [of_queries, of_keys] = &self.0;
        let inputs = inputs.with_positions(of_queries.view(), of_keys.view());
        let inputs = inputs.and_then(|inputs| inputs.with_distances(self.1.view()));
        inputs.expect("there is one for each")
    }
}

/// Returns every mechanism of the crate, for queries, keys and values with the given number of columns.
pub(crate) fn mechanisms<F: Float>(columns: usize) -> Vec<Box<dyn Attention<F>>> {
    all(columns).expect("the sizes are valid")
}

fn all<F: Float>(columns: usize) -> Result<Vec<Box<dyn Attention<F>>>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let experts = (0..8).map(|_| Box::new(Flash::new()) as Box<dyn Attention<F>>).collect();
    let dual = DualSpaceConfig::new(Fusion::Gated, columns);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), &mut rng)?;
    // If the inputs have no latent neighbours, the search for them is measured too. A single query is not
    // a node.
    let search = LatentSearch::new(16, Metric::Cosine).exclude_self(false);
    let rope = GraphRopeConfig::new(columns, Layout::Half);
    Ok(vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(MultiHeadConfig::new(columns, 4).init(Flash::new(), &mut rng)?),
        Box::new(MoeConfig::new(columns, 2).init(experts, &mut rng)?),
        Box::new(LocalGlobal::sliding_window(Window::new(128), Flash::new())?),
        Box::new(dual.with_search(search)),
        Box::new(EdgeGatConfig::new(Score::GatV2, columns, columns / 4, 4).init(&mut rng)?),
        Box::new(PoincareConfig::new().coordinates(Coordinates::Tangent).init()?),
        Box::new(PerformerConfig::new(columns, 4 * columns).init(&mut rng)?),
        Box::new(rope.init(Flash::new())?),
        Box::new(rope.init_edges()?),
    ])
}

/// Measures the forward pass into an existing array.
pub(crate) fn forward<F: Float>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    pool: &ThreadPool,
    attention: &dyn Attention<F>,
    inputs: &Inputs<'_, F>,
) {
    let mut out = Array2::zeros((inputs.num_queries(), attention.output_dim(inputs)));
    group.bench_function(id, |bencher| {
        let mut run = || attention.forward_into(inputs, out.view_mut()).expect("inputs that suit");
        pool.install(|| bencher.iter(&mut run));
    });
}

/// Measures both passes, with all gradients in existing arrays.
pub(crate) fn training<F: Float>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    pool: &ThreadPool,
    attention: &dyn Attention<F>,
    inputs: &Inputs<'_, F>,
) {
    let grad_out = matrix(inputs.num_queries(), attention.output_dim(inputs), 6);
    let mut out = Array2::zeros(grad_out.raw_dim());
    let mut grads = Gradients::zeros(inputs, attention).expect("they fit in memory");
    let mut run = || {
        let saved = attention.forward_train_into(inputs, out.view_mut())?;
        attention.backward_into(inputs, &saved, grad_out.view(), grads.view_mut())
    };
    group.bench_function(id, |bencher| {
        pool.install(|| bencher.iter(|| run().expect("inputs that suit")));
    });
}

/// Creates a group with throughput in the given number of elements.
pub(crate) fn group<'a>(
    c: &'a mut Criterion,
    name: impl Into<String>,
    elements: usize,
) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(elements as u64));
    group
}

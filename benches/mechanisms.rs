//! Every mechanism on the same workloads: `cargo bench --bench mechanisms`.
//!
//! Throughput is in (query, key) pairs; outputs are preallocated and seeds fixed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graph_attention::ndarray::{Array1, Array2};
use graph_attention::neighbors::Metric;
use graph_attention::{
    Attention, Coordinates, DualSpaceConfig, EdgeGatConfig, Flash, Fusion, Graph, GraphRopeConfig,
    Inputs, LatentSearch, Layout, LocalGlobal, MoeConfig, MultiHeadConfig, PerformerConfig,
    PoincareConfig, ScaledDotProduct, Score, Window,
};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

const COLUMNS: usize = 64;

fn mechanisms() -> Vec<Box<dyn Attention<f32>>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let multi_head = MultiHeadConfig::new(COLUMNS, 4).init(Flash::new(), &mut rng);
    let gat = EdgeGatConfig::new(Score::GatV2, COLUMNS, COLUMNS / 4, 4).init(&mut rng);
    let experts = (0..8).map(|_| Box::new(Flash::new()) as Box<dyn Attention<f32>>).collect();
    let moe = MoeConfig::new(COLUMNS, 2).init(experts, &mut rng);
    // Exact search included; a single query is not a node.
    let search = LatentSearch::new(16, Metric::Cosine).exclude_self(false);
    let dual = DualSpaceConfig::new(Fusion::Gated, COLUMNS);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), &mut rng);
    let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent).init();
    // Wide enough for all pairs.
    let window = LocalGlobal::by_order(Window::new(10_000), Flash::new());
    let performer = PerformerConfig::new(COLUMNS, 4 * COLUMNS).init(&mut rng);
    let rope = GraphRopeConfig::new(COLUMNS, Layout::Half);
    vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(multi_head.expect("4 heads divide the columns")),
        Box::new(moe.expect("2 of 8 experts")),
        Box::new(window.expect("the dilation is positive")),
        Box::new(dual.expect("the sizes are positive").with_search(search)),
        Box::new(gat.expect("the sizes are positive")),
        Box::new(poincare.expect("the defaults are valid")),
        Box::new(performer.expect("the sizes are positive")),
        Box::new(rope.init(Flash::new()).expect("the number of columns is even")),
        Box::new(rope.init_edges().expect("the number of columns is even")),
    ]
}

fn matrix(rows: usize) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    Array2::from_shape_simple_fn((rows, COLUMNS), || StandardNormal.sample(&mut rng))
}

fn forward(c: &mut Criterion, group: &str, size: usize, inputs: &Inputs<'_, f32>) {
    let mut group = c.benchmark_group(group);
    group.throughput(Throughput::Elements(inputs.num_pairs() as u64));
    // For those that read them.
    let positions = |n: usize| Array2::from_shape_fn((n, 1), |(node, _)| node as f32);
    let at = [positions(inputs.num_queries()), positions(inputs.num_keys())];
    let distances = (0..inputs.num_pairs()).map(|pair| (pair % 7) as f32).collect::<Array1<_>>();
    let inputs = inputs.with_positions(at[0].view(), at[1].view());
    let inputs = inputs.and_then(|inputs| inputs.with_distances(distances.view()));
    let inputs = &inputs.expect("there is one for each");
    for attention in mechanisms() {
        let mut out = Array2::zeros((inputs.num_queries(), attention.output_dim(inputs)));
        group.bench_function(BenchmarkId::new(attention.name(), size), |bencher| {
            bencher.iter(|| attention.forward_into(inputs, out.view_mut()));
        });
    }
}

fn single(c: &mut Criterion) {
    for neighbours in [16, 256, 4096] {
        let (query, keys) = (matrix(1), matrix(neighbours));
        let inputs = Inputs::dense(query.view(), keys.view(), keys.view()).expect("shapes fit");
        forward(c, "single", neighbours, &inputs);
    }
}

fn dense(c: &mut Criterion) {
    for n in [128, 1024] {
        let x = matrix(n);
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).expect("shapes fit");
        forward(c, "dense", n, &inputs);
    }
}

fn graph(c: &mut Criterion) {
    let (nodes, degree) = (10_000, 16);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let edges = (0..nodes * degree).map(|edge| (edge / degree, rng.random_range(0..nodes)));
    let graph = Graph::from_edges(nodes, nodes, edges).expect("edges in range");
    let x = matrix(nodes);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).expect("shapes fit");
    forward(c, "graph", nodes, &inputs);
}

criterion_group!(benches, single, dense, graph);
criterion_main!(benches);

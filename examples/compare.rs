//! Runs every mechanism of the crate over one graph and prints what each costs and does.
//!
//! ```sh
//! cargo run --release --example compare               # Zachary's karate club
//! cargo run --release --example compare -- edges.csv  # undirected edges, "u,v" or "u v" a line
//! ```
//!
//! Every node attends to its neighbours and itself, with random features; its position is the number of
//! its neighbours, and the distance of a neighbour 1. Dev-dependencies:
//! `peak_alloc`, `rand`, `rand_distr`.

use graph_attention::ndarray::{Array1, Array2};
use graph_attention::neighbors::Metric;
use graph_attention::{
    Attention, Coordinates, DualSpaceConfig, EdgeGatConfig, Error, Flash, Fusion, Graph,
    GraphRopeConfig, Inputs, LatentSearch, Layout, LocalGlobal, MoeConfig, MultiHeadConfig,
    PerformerConfig, PoincareConfig, Result, ScaledDotProduct, Score, Window,
};
use peak_alloc::PeakAlloc;
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::time::{Duration, Instant};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const HEADS: usize = 4;
const COLUMNS: usize = 32;

/// The list of mechanisms: a new one is added here.
fn mechanisms(rng: &mut Xoshiro256PlusPlus) -> Result<Vec<Box<dyn Attention<f32>>>> {
    let experts: Vec<Box<dyn Attention<f32>>> = vec![
        Box::new(Flash::new()),
        Box::new(Flash::new().with_scale(1.0)?),
        Box::new(PoincareConfig::new().coordinates(Coordinates::Tangent).init()?),
    ];
    let rope = GraphRopeConfig::new(COLUMNS / HEADS, Layout::Half);
    let dual = DualSpaceConfig::new(Fusion::Gated, COLUMNS);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), rng)?;
    Ok(vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(MultiHeadConfig::new(COLUMNS, HEADS).init(Flash::new(), rng)?),
        Box::new(MoeConfig::new(COLUMNS, 2).init(experts, rng)?),
        // Without the edges between nodes whose numbers are far apart.
        Box::new(LocalGlobal::by_order(Window::new(12), Flash::new())?),
        Box::new(dual.with_search(LatentSearch::new(5, Metric::Cosine))),
        Box::new(EdgeGatConfig::new(Score::GatV2, COLUMNS, COLUMNS / HEADS, HEADS).init(rng)?),
        Box::new(PoincareConfig::new().coordinates(Coordinates::Tangent).init()?),
        Box::new(PerformerConfig::new(COLUMNS / HEADS, 64).init(rng)?),
        Box::new(rope.init(Flash::new())?),
        Box::new(rope.init_edges()?),
    ])
}

/// The inputs that a mechanism takes: those with projections make the heads themselves.
fn fit<'a>(attention: &dyn Attention<f32>, inputs: Inputs<'a, f32>) -> Result<Inputs<'a, f32>> {
    match attention.forward(&inputs.with_heads(HEADS)?) {
        Err(Error::Unsupported { .. }) => Ok(inputs),
        _ => inputs.with_heads(HEADS),
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (title, edges) = match std::env::args().nth(1) {
        Some(path) => (path.clone(), parse_edges(&std::fs::read_to_string(path)?)?),
        None => ("Zachary's karate club".to_owned(), KARATE_CLUB.to_vec()),
    };
    let nodes = edges.iter().map(|&(u, v)| u.max(v) + 1).max().unwrap_or(0);
    let both_ways = edges.iter().flat_map(|&(u, v)| [(u, v), (v, u)]);
    let graph = Graph::from_edges(nodes, nodes, both_ways)?.with_self_loops()?;
    println!("{title}: {nodes} nodes, {} pairs; f32, {HEADS} heads", graph.num_edges());

    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1977);
    let features = Array2::from_shape_simple_fn((nodes, COLUMNS), || StandardNormal.sample(rng));
    let x = features.view();
    let degree = |(node, _): (usize, usize)| graph.neighbors(node).len() as f32;
    let positions = Array2::from_shape_fn((nodes, 1), degree);
    let mut distances = Array1::ones(graph.num_edges());
    for node in 0..nodes {
        let itself = graph.row(node).filter(|&(neighbour, _)| neighbour == node);
        itself.for_each(|(_, edge)| distances[edge] = 0.0);
    }
    let inputs = Inputs::graph(x, x, x, &graph)?
        .with_positions(positions.view(), positions.view())?
        .with_distances(distances.view())?;
    let exact = ScaledDotProduct::new().forward(&inputs.with_heads(HEADS)?)?;

    println!("mechanism              forward   fwd + bwd  peak memory  entropy mean/max  distance");
    for attention in mechanisms(rng)? {
        let inputs = fit(&*attention, inputs)?;
        let mut out = Array2::zeros((nodes, attention.output_dim(&inputs)));
        let grad_out = Array2::ones(out.raw_dim());
        let forward = median_time(|| attention.forward_into(&inputs, out.view_mut()))?;
        let train = || {
            let (_, saved) = attention.forward_train(&inputs)?;
            attention.backward(&inputs, &saved, grad_out.view()).map(drop)
        };
        let training = median_time(train)?;
        PEAK.reset_peak_usage();
        let before = PEAK.current_usage();
        train()?;
        let peak = PEAK.peak_usage() - before;
        let entropy = match attention.weights(&inputs) {
            Err(Error::NoWeights { .. }) => "-".to_owned(),
            weights => {
                let (mean, max) = entropy(&graph, &weights?);
                // No distribution over m neighbours has more than ln m.
                let degrees = (0..nodes).map(|node| graph.neighbors(node).len());
                assert!(max <= (degrees.max().unwrap_or(1) as f32).ln() + 1e-4);
                format!("{mean:.3} / {max:.3}")
            }
        };
        assert!(out.iter().all(|value| value.is_finite()));
        let norm = |array: &Array2<f32>| array.iter().map(|x| x * x).sum::<f32>().sqrt();
        let distance = norm(&(&out - &exact)) / norm(&exact);
        if attention.name() == "flash" {
            assert!(distance < 1e-5, "flash is the same function");
        }
        let (name, kib) = (attention.name(), peak as f64 / 1024.0);
        println!(
            "{name:<20} {forward:>9.1?}  {training:>10.1?}  {kib:>7.1} KiB  {entropy:>16}  {distance:.1e}"
        );
    }
    println!("peak memory: of forward and backward, beside the inputs, gradients included");
    println!("entropy: of the weights of a node, in nats; distance: |out - exact| / |exact|");
    Ok(())
}

/// The median over at least 5 runs and 0.1 seconds.
fn median_time(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let (mut times, start) = (Vec::new(), Instant::now());
    while times.len() < 5 || start.elapsed() < Duration::from_millis(100) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// Mean and maximum over nodes and heads of −Σ p ln p.
fn entropy(graph: &Graph, weights: &Array2<f32>) -> (f32, f32) {
    let (mut sum, mut max, mut count) = (0.0, 0f32, 0usize);
    for node in 0..graph.num_queries() {
        for head in 0..weights.ncols() {
            let terms = graph.row(node).map(|(_, edge)| weights[[edge, head]]);
            let entropy: f32 = terms.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
            (sum, max, count) = (sum + entropy, max.max(entropy), count + 1);
        }
    }
    (sum / count.max(1) as f32, max)
}

/// Two node numbers a line, with a comma or white space between; a first line of names is skipped.
fn parse_edges(text: &str) -> std::result::Result<Vec<(usize, usize)>, String> {
    let mut edges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let fields = line.split(|c: char| c == ',' || c.is_whitespace());
        let fields: Vec<_> = fields.filter(|field| !field.is_empty()).collect();
        match fields[..] {
            [] => {}
            [u, v, ..] => match (u.parse(), v.parse()) {
                (Ok(u), Ok(v)) => edges.push((u, v)),
                _ if number == 0 => {}
                _ => return Err(format!("line {}: expected two numbers, got {line}", number + 1)),
            },
            _ => return Err(format!("line {}: expected two numbers, got {line}", number + 1)),
        }
    }
    Ok(edges)
}

/// Friendships in a karate club (Zachary 1977, doi 10.1086/jar.33.4.3629752).
#[rustfmt::skip]
const KARATE_CLUB: [(usize, usize); 78] = [
    (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 10), (0, 11), (0, 12),
    (0, 13), (0, 17), (0, 19), (0, 21), (0, 31), (1, 2), (1, 3), (1, 7), (1, 13), (1, 17), (1, 19),
    (1, 21), (1, 30), (2, 3), (2, 7), (2, 8), (2, 9), (2, 13), (2, 27), (2, 28), (2, 32), (3, 7),
    (3, 12), (3, 13), (4, 6), (4, 10), (5, 6), (5, 10), (5, 16), (6, 16), (8, 30), (8, 32), (8, 33),
    (9, 33), (13, 33), (14, 32), (14, 33), (15, 32), (15, 33), (18, 32), (18, 33), (19, 33),
    (20, 32), (20, 33), (22, 32), (22, 33), (23, 25), (23, 27), (23, 29), (23, 32), (23, 33),
    (24, 25), (24, 27), (24, 31), (25, 31), (26, 29), (26, 33), (27, 33), (28, 31), (28, 33),
    (29, 32), (29, 33), (30, 32), (30, 33), (31, 32), (31, 33), (32, 33),
];

//! Runs every mechanism of the crate on one graph and prints its cost and results.
//!
//! ```sh
//! cargo run --release -p examples --example compare               # Zachary's karate club
//! cargo run --release -p examples --example compare -- edges.csv  # one undirected edge "u,v" per line
//! ```
//!
//! Every node attends to its neighbours and itself, with random features; its position is the number of
//! hops from node 0. Longer than 100 lines, because it contains all mechanisms and a data set.
//! Dev-dependencies: `peak_alloc`, `rand_distr`.

use examples::data;
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{dual_space::*, edge_gat::*, graph_rope::*, local_global::*, poincare::*};
use graph_attention::{ndarray::Array2, neighbors::Metric, *};
use peak_alloc::PeakAlloc;
use rand_distr::StandardNormal;
use std::time::{Duration, Instant};

const DIM: usize = 32;
#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

/// The list of mechanisms; add new ones here.
fn mechanisms(rng: &mut Xoshiro256PlusPlus) -> Result<Vec<Box<dyn Attention<f32>>>> {
    let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent);
    let experts: Vec<Box<dyn Attention<f32>>> =
        vec![Box::new(Flash::new()), Box::new(poincare.init()?)];
    let dual = DualSpaceConfig::new(Fusion::Gated, DIM);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), rng)?;
    let rope = GraphRopeConfig::new(DIM, Layout::Half);
    let layer = |rng: &mut Xoshiro256PlusPlus| {
        let heads = MultiHeadConfig::new(DIM, 4).init(Flash::new(), rng)?;
        TransformerLayerConfig::new(DIM, 4 * DIM).init(heads, rng)
    };
    Ok(vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(MultiHeadConfig::new(DIM, 4).init(Flash::new(), rng)?),
        Box::new(MoeConfig::new(DIM, 1).init(experts, rng)?),
        // Ignores edges between nodes with distant numbers.
        Box::new(LocalGlobal::sliding_window(Window::new(12), Flash::new())?),
        Box::new(dual.with_search(LatentSearch::new(5, Metric::Cosine))),
        Box::new(EdgeGatConfig::new(Score::GatV2, DIM, DIM / 4, 4).init(rng)?),
        Box::new(poincare.init()?),
        Box::new(PerformerConfig::new(DIM, 64).init(rng)?),
        Box::new(rope.init(Flash::new())?),
        Box::new(rope.init_edges()?),
        Box::new(layer(rng)?),
        Box::new(StackConfig::new().init(vec![layer(rng)?, layer(rng)?])?),
    ])
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    // The best instruction set of the CPU, or the one in the environment variable GRAPH_ATTENTION_SIMD.
    let simd = graph_attention::testing::hold_simd()?;
    let file = std::env::args().nth(1);
    let graph = match file {
        None => data::Nodes::karate_club().graph,
        Some(file) => {
            let edges = data::pairs(&data::text(file)?)?;
            let n = edges.iter().map(|&(u, v)| u.max(v) + 1).max().unwrap_or(0);
            data::undirected(n, &edges)?
        }
    };
    let (n, graph) = (graph.num_queries(), graph.with_self_loops()?);
    println!("{n} nodes, {} pairs, {DIM} columns of f32; {simd}", graph.num_edges());
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1977);
    let x = Array2::from_shape_simple_fn((n, DIM), || 0.5 * rng.sample::<f32, _>(StandardNormal));
    let positions = graph.hops_from(&[[0]], 99.0)?;
    let distances = graph.hop_distances(&graph, 1, 1.0)?;
    let inputs = Inputs::self_attention(x.view(), &graph)?
        .with_positions(positions.view(), positions.view())?
        .with_distances(distances.view())?;
    let exact = Flash::new().forward(&inputs)?;
    let norm = |array: &Array2<f32>| array.iter().map(|x| x * x).sum::<f32>().sqrt();

    println!("mechanism              forward   fwd + bwd  peak memory  entropy mean/max  distance");
    for attention in mechanisms(rng)? {
        let out = attention.forward(&inputs)?;
        let forward = median_time(|| attention.forward(&inputs))?;
        let before = PEAK.current_usage();
        PEAK.reset_peak_usage();
        let training = median_time(|| {
            let (out, saved) = attention.forward_train(&inputs)?;
            attention.backward(&inputs, &saved, out.view())
        })?;
        let kib = (PEAK.peak_usage() - before) as f64 / 1024.0;
        let entropy =
            attention.attention_weights(&inputs).map_or("-".to_owned(), |w| entropy(&graph, &w));
        let (name, distance) = (attention.name(), norm(&(out - &exact)) / norm(&exact));
        print!("{name:<20} {forward:>9.1?}  {training:>10.1?}  {kib:>7.1} KiB");
        println!("  {entropy:>16}  {distance:.1e}");
        assert!(distance.is_finite() && (name != "scaled_dot_product" || distance < 1e-5));
    }
    println!("peak memory: in forward and backward, with gradients, without the inputs");
    println!("entropy: of the weights of a node, in nats; distance: |out - exact| / |exact|");
    Ok(())
}

fn median_time<T>(run: impl Fn() -> Result<T>) -> Result<Duration> {
    let mut times = [Duration::ZERO; 51];
    for time in &mut times {
        let start = Instant::now();
        run()?;
        *time = start.elapsed();
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// Returns the mean and maximum of −Σ p ln p over nodes and heads.
fn entropy(graph: &Graph, weights: &Array2<f32>) -> String {
    let terms = weights.mapv(|p| if p > 0.0 { -p * p.ln() } else { 0.0 });
    let mut entropies = Array2::<f32>::zeros((graph.num_queries(), weights.ncols()));
    for (node, mut entropy) in entropies.rows_mut().into_iter().enumerate() {
        graph.row(node).for_each(|(_, pair)| entropy += &terms.row(pair));
    }
    let max = entropies.fold(0f32, |max, &entropy| max.max(entropy));
    format!("{:.3} / {max:.3}", entropies.mean().unwrap_or(0.0))
}

//! A graph of 200,000 nodes: a two-layer graph attention network learns the kind of every node from 256 nodes at a
//! time and a sample of their neighbours, so that training takes a few megabytes besides the graph and its
//! features.
//!
//! ```sh
//! cargo run --release -p examples --example sampled_training            # 200,000 nodes
//! cargo run --release -p examples --example sampled_training -- 1000000
//! ```
//!
//! Dev-dependencies: `peak_alloc`, `rand_distr`.

use graph_attention::ndarray::{Array2, Axis};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq};
use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, edge_gat::Score, params};
use peak_alloc::PeakAlloc;
use rand_distr::{Distribution, StandardNormal};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const KINDS: usize = 4;
const COLUMNS: usize = 16;
const BATCH: usize = 256;
/// The neighbours that are sampled for each of the 256 nodes, and for each of these neighbours.
const FANOUTS: [usize; 2] = [8, 8];
const STEPS: usize = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let n = std::env::args().nth(1).map_or(Ok(200_000), |n| n.parse())?;
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
    // Half of a node's neighbours are of its kind, and its features only hint at it.
    let kinds: Vec<usize> = (0..n).map(|_| rng.random_range(0..KINDS)).collect();
    let mut of_kind = vec![Vec::new(); KINDS];
    kinds.iter().enumerate().for_each(|(node, &kind)| of_kind[kind].push(node));
    let edges = (0..16 * n).map(|edge| {
        let node = edge / 16;
        let same = &of_kind[kinds[node]];
        (
            node,
            if edge % 2 == 0 {
                same[rng.random_range(0..same.len())]
            } else {
                rng.random_range(0..n)
            },
        )
    });
    let graph = Graph::from_edges(n, n, edges)?.with_self_loops()?;
    let features = Array2::from_shape_fn((n, COLUMNS), |(node, column)| {
        let noise: f32 = StandardNormal.sample(rng);
        noise + if column == kinds[node] { 1.0 } else { 0.0 }
    });
    drop(of_kind);
    let held = PEAK.current_usage_as_mb();
    println!("{n} nodes, {} edges: {held:.0} MB with features", graph.num_edges());

    let mut first = EdgeGatConfig::new(Score::GatV2, COLUMNS, 8, 4).init(rng)?;
    let mut second = EdgeGatConfig::new(Score::GatV2, 4 * 8, KINDS, 1).init(rng)?;
    PEAK.reset_peak_usage();
    let mut right = Vec::new();
    for step in 1..=STEPS {
        let seeds = seq::index::sample(rng, n, BATCH).into_vec();
        let batch = graph.sample(&seeds, &FANOUTS, rng)?;
        // The first layer computes the seeds and their neighbours, the second one only the seeds.
        let graphs = [batch.layer(0)?, batch.layer(1)?];
        let x = batch.rows_of_nodes(features.view())?;
        let inputs = Inputs::self_attention(x.view(), &graphs[0])?;
        let (out, first_saved) = first.forward_train(&inputs)?;
        let hidden = out.mapv(|x: f32| x.max(0.0));
        let hidden_inputs = Inputs::self_attention(hidden.view(), &graphs[1])?;
        let (out, second_saved) = second.forward_train(&hidden_inputs)?;

        // Cross-entropy of softmax(out): its gradient is the softmax minus the kind.
        let mut grad_out = out.mapv(f32::exp);
        grad_out /= &grad_out.sum_axis(Axis(1)).insert_axis(Axis(1));
        right.push(0);
        for (row, &seed) in seeds.iter().enumerate() {
            let of_right = out[[row, kinds[seed]]];
            right[step - 1] += usize::from(out.row(row).iter().all(|&logit| logit <= of_right));
            grad_out[[row, kinds[seed]]] -= 1.0;
        }
        grad_out /= BATCH as f32;

        let grads = second.backward(&hidden_inputs, &second_saved, grad_out.view())?;
        let grad_hidden =
            grads.self_attention()? * hidden.mapv(|y| if y > 0.0 { 1.0 } else { 0.0 });
        let of_first = first.backward_params(&inputs, &first_saved, grad_hidden.view())?;
        params::update(&mut first, &of_first, |_, mut param, grad| param.scaled_add(-0.5, &grad))?;
        params::update(&mut second, &grads.params, |_, mut param, grad| {
            param.scaled_add(-0.5, &grad);
        })?;
        if step % 40 == 0 {
            let last: usize = right[step - 40..].iter().sum();
            let share = last as f32 / (40 * BATCH) as f32;
            println!(
                "step {step}: {:.1} % of 40 batches right; {} nodes in the last",
                100.0 * share,
                batch.nodes().len()
            );
        }
    }
    let extra = PEAK.peak_usage_as_mb() - held;
    // Inputs and outputs of one layer for all nodes would take more.
    let bound = (n * (COLUMNS + 4 * 8) * 4) as f32 / 1e6;
    println!("training took {extra:.1} MB; one layer of all nodes takes {bound:.1} MB");
    assert!(extra < 30.0, "the memory of a batch does not grow with the graph");
    let last: usize = right[STEPS - 40..].iter().sum();
    assert!(last > 40 * BATCH * 7 / 10, "it learns");
    Ok(())
}

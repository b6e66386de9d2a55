//! Four kinds of attention in one mixture; its router learns which nodes need which.
//!
//! ```sh
//! cargo run --release -p examples --example mixture
//! ```
//!
//! There are four kinds of nodes, identified by four of their columns. The target of each kind is a
//! different kind of attention: to adjacent nodes (`LocalGlobal`), by hyperbolic distance (`Poincare`),
//! softmax attention to all (`Performer`, which approximates it), or by link strengths (`EdgeGat`, which
//! has to learn it). The router is not told which expert is meant for which kind: it learns from the
//! error, and from a small loss that keeps all experts in use. Dev-dependency: `rand_distr`.

use graph_attention::ndarray::Array2;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, EdgeGatConfig, Flash, Inputs, LocalGlobal, MoeConfig, PerformerConfig,
    PoincareConfig, Result, ScaledDotProduct, edge_gat::Score, local_global::Window, moe::Routing,
    params, poincare::Coordinates,
};
use rand_distr::{Distribution, StandardNormal};

const NODES: usize = 64;
const COLUMNS: usize = 8;

fn main() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
    let nodes = Array2::from_shape_fn((NODES, COLUMNS), |(node, column)| match column {
        0..4 => f32::from(column == node % 4),
        _ => normal(),
    });
    let strengths = Array2::from_shape_simple_fn((NODES * NODES, 1), || normal().abs());
    let x = nodes.view();
    let inputs = Inputs::dense(x, x, x)?.with_edge_features(strengths.view())?;

    let beside = || LocalGlobal::sliding_window(Window::new(2), Flash::new());
    let poincare = || PoincareConfig::new().coordinates(Coordinates::Tangent).init();
    // Queries are zero, so that only link strengths make a difference.
    let (indifferent, bias) = (Array2::zeros(x.raw_dim()), 3.0 * &strengths);
    let by_strength = inputs.with_arrays(indifferent.view(), x, x)?.with_bias(bias.view())?;
    let outputs = [
        beside()?.forward(&inputs)?,
        poincare()?.forward(&inputs)?,
        ScaledDotProduct::new().forward(&inputs)?,
        ScaledDotProduct::new().forward(&by_strength)?,
    ];
    let target = Array2::from_shape_fn(x.raw_dim(), |at| outputs[at.0 % 4][at]);

    let gat = EdgeGatConfig::new(Score::Gat, COLUMNS, COLUMNS, 1).edge_dim(1);
    let experts: Vec<Box<dyn Attention<f32>>> = vec![
        Box::new(beside()?),
        Box::new(poincare()?),
        Box::new(PerformerConfig::new(COLUMNS, 64).init(&mut rng)?),
        Box::new(gat.init(&mut rng)?),
    ];
    // Each node uses two experts, so that the router learns which is better.
    let mut moe = MoeConfig::new(COLUMNS, 2).noise(true).init(experts, &mut rng)?;
    let before = report("before training", &moe.route(&inputs)?);
    let mut losses = Vec::new();
    for step in 0..=2000 {
        // Noise in the beginning, so that every expert is tried.
        moe.set_noise((step < 1500).then_some(step))?;
        let (out, saved) = moe.forward_train(&inputs)?;
        let error = (out - &target) / NODES as f32;
        losses.push(0.5 * NODES as f32 * error.mapv(|e| e * e).sum());
        let mut grads = moe.backward(&inputs, &saved, error.view())?;
        let routing = moe.routing(&saved)?;
        let (_, grad_logits) = routing.switch_load_balance()?;
        moe.router_backward(&inputs, routing, (0.1 * grad_logits).view(), grads.view_mut())?;
        // (The projection of the Performer is a buffer, so its features remain estimates of a softmax.)
        params::update(&mut moe, &grads.params, |_, mut param, grad| {
            param.scaled_add(-1.0, &grad);
        })?;
    }
    let after = report("after training", &moe.route(&inputs)?);
    println!("loss {:.4} before, {:.4} after", losses[0], losses[2000]);
    assert!(before < 0.5 && after > 0.9, "each kind goes to the expert meant for it");
    assert!(losses[2000] < losses[0] / 10.0, "and gets its target");
    Ok(())
}

/// Prints the routing. Returns the share of nodes whose first choice is the expert meant for them.
fn report(when: &str, routing: &Routing<f32>) -> f32 {
    let mut counts = Array2::<f32>::zeros((4, 4));
    for (node, experts) in routing.experts().rows().into_iter().enumerate() {
        counts[[node % 4, experts[0]]] += 1.0;
    }
    println!(
        "{when}: entropy of the routing {:.2}, share of each expert {:.2?}; first choices:",
        routing.entropy(),
        routing.shares()
    );
    println!("  kind  beside  poincare  performer  edge_gat");
    for (kind, counts) in counts.rows().into_iter().enumerate() {
        println!("  {kind:4}  {:6}  {:8}  {:9}  {:8}", counts[0], counts[1], counts[2], counts[3]);
    }
    counts.diag().sum() / NODES as f32
}

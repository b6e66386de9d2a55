//! Four kinds of attention in one mixture, whose router learns which nodes need which.
//!
//! ```sh
//! cargo run --release --example mixture
//! ```
//!
//! Sixty-four nodes in a ring, some of which are hubs, as in the upper layers of an HNSW index. There
//! are four kinds of nodes, told apart by four of their columns, and each is to output what one way
//! of looking at the others gives:
//!
//! | kind | target | expert meant for it | which reads |
//! |---|---|---|---|
//! | 0 | softmax attention to the nodes beside it | `Flash` | pairs of layer 0 |
//! | 1 | hyperbolic attention to the hubs | `Poincare` | pairs of layer 1 |
//! | 2 | exact softmax attention to all nodes | `Performer`, which is near it | all pairs |
//! | 3 | those beside it, by the strengths of the links | `EdgeGat`, which has to learn it | pairs of layer 0 and their features |
//!
//! The experts of a mixture get the same inputs, so one that is to see a single layer has to hide the
//! other pairs itself: `OnLayer`. Nobody tells the router what is meant for what: it learns from the
//! error of the outputs, and from a small loss that keeps all experts busy. Dev-dependencies: `rand`,
//! `rand_distr`.

use graph_attention::ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use graph_attention::{
    Attention, Coordinates, EdgeGatConfig, Flash, GradientsMut, Graph, Inputs, MoeConfig, Params,
    PerformerConfig, PoincareConfig, Result, Routing, Saved, ScaledDotProduct, Score, params,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

const NODES: usize = 64;
const COLUMNS: usize = 8;
const KINDS: usize = 4;
const STEPS: u64 = 2000;

/// An expert that sees the pairs of one layer alone.
#[derive(Debug)]
struct OnLayer<A>(u8, A);

impl<A: Attention<f32>> OnLayer<A> {
    /// Runs it on the same inputs without the pairs of other layers.
    fn hide<T>(
        &self,
        inputs: &Inputs<'_, f32>,
        run: impl FnOnce(&A, &Inputs<'_, f32>) -> Result<T>,
    ) -> Result<T> {
        let layers = inputs.layers("on_layer")?;
        let mut mask = Array2::from_elem((inputs.num_queries(), inputs.num_keys()), false);
        for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
            mask[[pair.query, pair.key]] = layers[pair.index] == self.0;
        }
        run(&self.1, &inputs.with_mask(mask.view())?)
    }
}

impl<A: Attention<f32>> Params<f32> for OnLayer<A> {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, f32>)) {
        self.1.visit_params(visitor);
    }
    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, f32>)) {
        self.1.visit_params_mut(visitor);
    }
}

impl<A: Attention<f32>> Attention<f32> for OnLayer<A> {
    fn name(&self) -> &'static str {
        self.1.name()
    }
    fn output_dim(&self, inputs: &Inputs<'_, f32>) -> usize {
        self.1.output_dim(inputs)
    }
    fn forward_into(&self, inputs: &Inputs<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<()> {
        self.hide(inputs, |expert, inputs| expert.forward_into(inputs, out))
    }
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, f32>,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<Saved> {
        self.hide(inputs, |expert, inputs| expert.forward_train_into(inputs, out))
    }
    fn backward_into(
        &self,
        inputs: &Inputs<'_, f32>,
        saved: &Saved,
        grad_out: ArrayView2<'_, f32>,
        grads: GradientsMut<'_, f32>,
    ) -> Result<()> {
        self.hide(inputs, |expert, inputs| expert.backward_into(inputs, saved, grad_out, grads))
    }
}

fn main() -> Result<()> {
    // A pair is of the first layer that has it: beside each other, to a hub, the rest.
    let beside = (0..NODES).flat_map(|i| (0..5).map(move |at| (i, (i + NODES + at - 2) % NODES)));
    let beside = Graph::from_edges(NODES, NODES, beside)?;
    let to_hubs = (0..NODES).flat_map(|i| (0..NODES).step_by(9).map(move |hub| (i, hub)));
    let to_hubs = Graph::from_edges(NODES, NODES, to_hubs)?;
    let (graph, layers) = Graph::union(&[&beside, &to_hubs, &Graph::window(NODES, NODES)?])?;

    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    let nodes = draw_nodes(&mut rng);
    let mut draw = || -> f32 { StandardNormal.sample(&mut rng) };
    let strengths = Array2::from_shape_simple_fn((graph.num_edges(), 1), || draw().abs());
    let x = nodes.view();
    let inputs = Inputs::graph(x, x, x, &graph)?
        .with_layers(&layers)?
        .with_edge_features(strengths.view())?;

    // Queries of zeros, for which only the strengths of the links make a difference.
    let (indifferent, bias) = (Array2::zeros(x.raw_dim()), 3.0 * &strengths);
    let links = inputs.with_arrays(indifferent.view(), x, x)?.with_bias(bias.view())?;
    let poincare = || PoincareConfig::new().coordinates(Coordinates::Tangent).init();
    let answers = [
        OnLayer(0, Flash::new()).forward(&inputs)?,
        OnLayer(1, poincare()?).forward(&inputs)?,
        ScaledDotProduct::new().forward(&inputs)?,
        OnLayer(0, ScaledDotProduct::new()).forward(&links)?,
    ];
    let target =
        Array2::from_shape_fn(x.raw_dim(), |(node, column)| answers[node % KINDS][[node, column]]);

    let gat = EdgeGatConfig::new(Score::Gat, COLUMNS, COLUMNS, 1).edge_dim(1);
    let experts: Vec<Box<dyn Attention<f32>>> = vec![
        Box::new(OnLayer(0, Flash::new())),
        Box::new(OnLayer(1, poincare()?)),
        Box::new(PerformerConfig::new(COLUMNS, 64).init(&mut rng)?),
        Box::new(OnLayer(0, gat.init(&mut rng)?)),
    ];
    // Each node asks two experts, so that the router learns which of them is the better one.
    let config = MoeConfig::new(COLUMNS, 2).noise(true).capacity_factor(1.25);
    let mut moe = config.init(experts, &mut rng)?;

    let meant_before = report("before training", &moe.route(&inputs)?);
    let mut losses = Vec::new();
    for step in 0..=STEPS {
        // With noise at first, so that every expert is tried.
        moe.set_noise((step < STEPS * 3 / 4).then_some(step))?;
        let (out, saved) = moe.forward_train(&inputs)?;
        // Half of the squared error of a node, on average.
        let error = out - &target;
        losses.push(0.5 * error.mapv(|e| e * e).sum() / NODES as f32);
        if step % 500 == 0 {
            println!("step {step:4}: loss {:.4}", losses[step as usize]);
        }
        let mut grads = moe.backward(&inputs, &saved, (error / NODES as f32).view())?;
        let routing = moe.routing(&saved)?;
        let (_, grad_logits) = routing.switch_load_balance()?;
        moe.router_backward(&inputs, routing, (0.1 * grad_logits).view(), grads.view_mut())?;
        params::update(&mut moe, &grads.params, |name, mut param, grad| {
            // The features of the Performer stay estimates of a softmax.
            if !name.ends_with("projection_matrix") {
                param.scaled_add(-1.0, &grad);
            }
        })?;
    }
    let routing = moe.route(&inputs)?;
    let meant = report("after it", &routing);
    let unseen = draw_nodes(&mut rng);
    let unseen = Inputs::dense(unseen.view(), unseen.view(), unseen.view())?;
    let meant_of_unseen = report("after it, of nodes that were not in it", &moe.route(&unseen)?);

    assert!(meant_before < 0.5, "at first the choice means nothing");
    // Two thousand steps: another instruction set rounds them to other parameters.
    assert!(meant > 0.9 && meant_of_unseen > 0.8, "each kind goes to the expert meant for it");
    assert_eq!(routing.num_dropped(), 0, "none of which is asked by more than it takes");
    assert!(losses[STEPS as usize] < losses[0] / 20.0, "and gets the answer it needs");
    Ok(())
}

/// The kind in the first columns, anything in the others.
fn draw_nodes(rng: &mut Xoshiro256PlusPlus) -> Array2<f32> {
    Array2::from_shape_fn((NODES, COLUMNS), |(node, column)| match column {
        0..KINDS => f32::from(column == node % KINDS),
        _ => StandardNormal.sample(rng),
    })
}

/// Prints what goes where. The share of the nodes whose first choice is the expert meant for them.
fn report(when: &str, routing: &Routing<f32>) -> f64 {
    let mut counts = [[0; KINDS]; KINDS];
    for (node, experts) in routing.experts().rows().into_iter().enumerate() {
        counts[node % KINDS][experts[0]] += 1;
    }
    println!("first choices {when}");
    println!("         flash  poincare  performer  edge_gat");
    for (kind, [flash, poincare, performer, edge_gat]) in counts.iter().enumerate() {
        println!("  kind {kind} {flash:5}  {poincare:8}  {performer:9}  {edge_gat:8}");
    }
    let (shares, entropy) = (routing.shares(), routing.entropy());
    let dropped = routing.num_dropped();
    println!("  shares of both choices {shares:.2?}, entropy {entropy:.3}, dropped {dropped}\n");
    (0..KINDS).map(|kind| counts[kind][kind]).sum::<u32>() as f64 / NODES as f64
}

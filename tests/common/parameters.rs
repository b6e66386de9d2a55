//! Every mechanism, with each form of its parameters and buffers, for tests of saving and loading.

use graph_attention::ndarray::Array1;
use graph_attention::{
    Attention, DualSpace, DualSpaceConfig, EdgeGat, EdgeGatConfig, Flash, Float, GraphRopeConfig,
    LocalGlobal, Moe, MoeConfig, MultiHead, MultiHeadConfig, Performer, PerformerConfig, Poincare,
    PoincareConfig, ScaledDotProduct, StackConfig, TransformerLayerConfig,
    dual_space::Fusion,
    edge_gat::Score,
    graph_rope::Layout,
    local_global::Window,
    moe::Gating,
    performer::Features,
    rowwise::{Activation, NormConfig, Normalization},
};

use super::random::rng;

pub(crate) fn multi_head<F: Float, A: Attention<F>>(
    config: &MultiHeadConfig,
    inner: A,
    seed: u64,
) -> MultiHead<F, A> {
    config.init(inner, &mut rng(seed)).unwrap()
}

fn edge_gat<F: Float>(config: &EdgeGatConfig, seed: u64) -> EdgeGat<F> {
    config.init(&mut rng(seed)).unwrap()
}

fn rope(seed: u64) -> GraphRopeConfig {
    GraphRopeConfig::new(6, Layout::Half).base(seed as f64 + 1.0).learn_frequencies(true)
}

fn poincare<F: Float>(seed: u64) -> Poincare<F> {
    let config = PoincareConfig::new().curvature(seed as f64).temperature(0.1 * seed as f64);
    config.learn_curvature(true).learn_temperature(true).init().unwrap()
}

fn performer<F: Float>(config: &PerformerConfig, seed: u64) -> Performer<F> {
    config.init(&mut rng(seed)).unwrap()
}

fn dual_space<F: Float>(fusion: Fusion, seed: u64) -> DualSpace<F> {
    let branch = |seed| multi_head(&MultiHeadConfig::new(6, 2), Flash::new(), seed);
    let config = DualSpaceConfig::new(fusion, 6);
    config.init(branch(seed + 3), poincare(seed), branch(seed + 4), &mut rng(seed)).unwrap()
}

/// Returns a transformer layer around a mechanism with a buffer.
fn layer<F: Float>(config: &TransformerLayerConfig, seed: u64) -> impl Attention<F> + use<F> {
    let inner = performer(&PerformerConfig::new(3, 4), seed);
    let heads = multi_head(&MultiHeadConfig::new(6, 2), inner, seed + 1);
    config.init(heads, &mut rng(seed)).unwrap()
}

/// Returns a mixture whose experts have buffers, with expert biases as after training.
fn balanced<F: Float>(seed: u64) -> Moe<F> {
    let fixed = GraphRopeConfig::new(6, Layout::Half).base(seed as f64 + 2.0);
    let learned = PerformerConfig::new(3, 8).learn_projection(true);
    let experts: Vec<Box<dyn Attention<F>>> = vec![
        Box::new(performer(&PerformerConfig::new(6, 4), seed)),
        Box::new(multi_head(&MultiHeadConfig::new(6, 2), performer(&learned, seed), seed)),
        Box::new(fixed.init(Flash::new()).unwrap()),
    ];
    let config = MoeConfig::new(6, 2).gating(Gating::Sigmoid);
    let mut moe = config.init(experts, &mut rng(seed)).unwrap();
    moe.set_expert_bias(Array1::from_iter((0..3).map(|e| F::from_f64(0.1 * (seed + e) as f64))))
        .unwrap();
    moe
}

/// Returns the mechanisms. Another seed gives other parameters and buffers.
pub(crate) fn mechanisms<F: Float>(seed: u64) -> Vec<Box<dyn Attention<F>>> {
    let config = MultiHeadConfig::new(6, 2);
    let separate = config.clone().key_dim(5).value_dim(3).output_dim(4);
    let [gat, gat_v2, dot] = [Score::Gat, Score::GatV2, Score::DotProduct]
        .map(|score| EdgeGatConfig::new(score, 5, 3, 2).edge_dim(2));
    let mechanisms: Vec<Box<dyn Attention<F>>> = vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(multi_head(&config, Flash::new(), seed)),
        Box::new(multi_head(&config.clone().bias(false), ScaledDotProduct::new(), seed)),
        Box::new(multi_head(&separate, Flash::new(), seed)),
        Box::new(multi_head(&config, multi_head(&config, Flash::new(), seed + 1), seed)),
        Box::new(edge_gat(&gat, seed)),
        Box::new(edge_gat(&gat.key_dim(7).average_heads(true), seed)),
        Box::new(edge_gat(&gat_v2.clone().share_weights(true), seed)),
        Box::new(edge_gat(&gat_v2.residual(true).bias(false), seed)),
        Box::new(edge_gat(&dot.gate(true), seed)),
        Box::new(poincare(seed)),
        Box::new(performer(&PerformerConfig::new(3, 8), seed)),
        Box::new(performer(&PerformerConfig::new(3, 3).features(Features::Elu), seed)),
        Box::new({
            let experts: Vec<Box<dyn Attention<F>>> = vec![
                Box::new(multi_head(&config, Flash::new(), seed + 2)),
                Box::new(Flash::new()),
                Box::new(poincare(seed + 1)),
            ];
            MoeConfig::new(6, 2).noise(true).init(experts, &mut rng(seed)).unwrap()
        }),
        Box::new(rope(seed).init(multi_head(&config, Flash::new(), seed)).unwrap()),
        Box::new(rope(seed).init_edges().unwrap()),
        Box::new(rope(seed).learn_frequencies(false).init_edges().unwrap()),
        Box::new(balanced(seed)),
        Box::new({
            let local = Box::new(balanced(seed));
            let global = Box::new(performer(&PerformerConfig::new(6, 4), seed));
            LocalGlobal::gated(6, 1, local, global, &mut rng(seed)).unwrap()
        }),
        Box::new({
            let config = DualSpaceConfig::new(Fusion::Gated, 6);
            let branch = |seed| performer(&PerformerConfig::new(6, 4), seed);
            let [graph, latent] = [branch(seed + 1), branch(seed + 2)];
            config.init(graph, latent, balanced(seed), &mut rng(seed)).unwrap()
        }),
        Box::new(LocalGlobal::sliding_window(Window::new(3), Flash::new()).unwrap()),
        Box::new(LocalGlobal::joint(Flash::new(), Flash::new())),
        Box::new({
            let local = Box::new(multi_head(&config, Flash::new(), seed + 3));
            let global = Box::new(poincare(seed));
            LocalGlobal::gated(6, 1, local, global, &mut rng(seed)).unwrap()
        }),
        Box::new(dual_space(Fusion::Linear { output_dim: 5 }, seed)),
        Box::new(dual_space(Fusion::Gated, seed)),
        Box::new(layer(&TransformerLayerConfig::new(6, 5), seed)),
        Box::new({
            let config = TransformerLayerConfig::new(6, 5).activation(Activation::Silu).gated(true);
            layer(&config.normalization(Normalization::Rms).bias(false), seed)
        }),
        Box::new({
            let layers = (0..2).map(|layer| balanced(seed + layer));
            StackConfig::new().norm(NormConfig::new(Normalization::Layer, 6)).init(layers).unwrap()
        }),
    ];
    super::assert_every_mechanism(mechanisms.iter().map(|mechanism| mechanism.name()));
    mechanisms
}

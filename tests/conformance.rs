//! Every mechanism against the laws of the contract. A new mechanism is added to `mechanisms`.

mod common;

use graph_attention::ndarray::array;
use graph_attention::testing::{Report, Shapes, check_attention, check_gradients};
use graph_attention::{
    Attention, DualSpace, DualSpaceConfig, EdgeGatConfig, Error, Flash, Float, Graph,
    GraphRopeConfig, Inputs, LocalGlobal, MoeConfig, MultiHeadConfig, PerformerConfig,
    PoincareConfig, ScaledDotProduct, StackConfig, TransformerLayerConfig,
    dual_space::Fusion,
    edge_gat::Score,
    graph_rope::Layout,
    local_global::Window,
    moe::Gating,
    performer::{Features, Projection},
    poincare::{Aggregation, Coordinates},
    rowwise::{Activation, NormConfig, Normalization},
    score::{BucketBias, Buckets, SoftCap},
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use std::sync::Arc;

type Entry<F> = (Shapes, Box<dyn Attention<F>>);

/// Returns every mechanism in its main forms, each with inputs of distinct sizes.
fn mechanisms<F: Float>() -> Vec<Entry<F>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(8);
    let flash = |queries, keys| Flash::new().with_tiles(queries, keys).unwrap();
    let one_head = || Shapes::new(3, 3, 2);
    let heads = || Shapes::new(2 * 3, 2 * 3, 2 * 5).heads(2);
    let grouped = || Shapes::new(6 * 3, 2 * 3, 2 * 5).kv_heads(6, 2);
    let separate = MultiHeadConfig::new(6, 2).key_dim(5).value_dim(7).output_dim(3);
    let all_sizes = separate.head_dim(3).value_head_dim(2).kv_heads(1);
    // With and without edge features; heads with more and with fewer columns than a SIMD vector.
    let gat = |score, dim, heads| EdgeGatConfig::new(score, 5, dim, heads).edge_dim(3);
    let v2 = || gat(Score::GatV2, 4, 2);
    let bipartite = EdgeGatConfig::new(Score::DotProduct, 5, 3, 2).key_dim(4);
    let edges = || Shapes::new(5, 5, 5).edge_dim(3);
    let no_edges = |key_dim| Shapes::new(5, key_dim, key_dim).edge_dim(0);
    let gats = [
        (edges().bias_heads(2), gat(Score::Gat, 4, 2)),
        (edges(), gat(Score::Gat, 18, 1).edge_values(true).residual(true).gate(true)),
        (no_edges(5), EdgeGatConfig::new(Score::Gat, 5, 3, 2).average_heads(true)),
        (edges().bias_heads(2), v2()),
        (edges(), v2().share_weights(true).edge_values(true).average_heads(true)),
        (edges(), gat(Score::GatV2, 19, 1).negative_slope(0.0).residual(true)),
        (edges().bias_heads(2), gat(Score::Additive, 4, 2)),
        (edges(), gat(Score::Additive, 19, 1).edge_values(true).residual(true)),
        (edges().bias_heads(2), gat(Score::DotProduct, 4, 2).gate(true)),
        (edges(), gat(Score::DotProduct, 17, 2).edge_values(false).average_heads(true)),
        (edges(), gat(Score::Gat, 2, 3).share_weights(false).bias(false)),
        (no_edges(4).bias_heads(2), bipartite.clone()),
        (Shapes::new(5, 4, 4).edge_dim(2), bipartite.edge_dim(2).residual(false)),
    ]
    .map(|(shapes, config)| {
        (shapes, Box::new(config.init(&mut rng).unwrap()) as Box<dyn Attention<F>>)
    });
    let others: Vec<Entry<F>> = vec![
        (one_head(), Box::new(ScaledDotProduct::new())),
        (heads(), Box::new(ScaledDotProduct::new().with_scale(-0.7).unwrap())),
        (grouped(), Box::new(ScaledDotProduct::new())),
        (Shapes::new(1, 1, 1), Box::new(ScaledDotProduct::new())),
        (one_head(), Box::new(Flash::new())),
        (heads(), Box::new(flash(2, 3).with_scale(0.3).unwrap())),
        (grouped(), Box::new(flash(1, 1))),
        (heads(), Box::new(flash(3, 2))),
        // Functions of the logits that the laws allow: not of positions, and without sinks.
        (heads(), Box::new(flash(3, 2).with_score(SoftCap::new(2.0).unwrap()))),
        (
            grouped(),
            Box::new({
                let edge_types = BucketBias::new(Buckets::edge_layers(3).unwrap(), 6).unwrap();
                Flash::new().with_score((SoftCap::new(0.5).unwrap(), edge_types))
            }),
        ),
        (one_head(), Box::new(ScaledDotProduct::new().with_score(SoftCap::new(3.0).unwrap()))),
        (
            Shapes::new(6, 6, 6).bias_heads(3),
            Box::new(MultiHeadConfig::new(6, 3).init(Flash::new(), &mut rng).unwrap()),
        ),
        (
            Shapes::new(6, 5, 7).bias_heads(2),
            Box::new(all_sizes.init(ScaledDotProduct::new(), &mut rng).unwrap()),
        ),
        (
            Shapes::new(4, 4, 4),
            // Parameters inside parameters.
            Box::new({
                let inner = MultiHeadConfig::new(4, 1).init(Flash::new(), &mut rng).unwrap();
                MultiHeadConfig::new(4, 1).init(inner, &mut rng).unwrap()
            }),
        ),
        (
            Shapes::new(4, 4, 4).bias_heads(2),
            // A mechanism inside a mechanism, behind pointers.
            Box::new({
                let inner: Box<dyn Attention<F>> = Box::new(flash(2, 2));
                let config = MultiHeadConfig::new(4, 2).bias(false);
                config.init(Arc::new(inner), &mut rng).unwrap()
            }),
        ),
    ];
    let tangent = || PoincareConfig::new().coordinates(Coordinates::Tangent);
    let learned = |config: PoincareConfig| config.learn_curvature(true).learn_temperature(true);
    let linear = Aggregation::TangentAtOrigin;
    let same_sizes = || Shapes::new(2 * 3, 2 * 3, 2 * 3).heads(2);
    let in_the_ball = |shapes: Shapes| shapes.scale(0.1);
    let poincare = [
        (in_the_ball(Shapes::new(3, 3, 3)), PoincareConfig::new()),
        (in_the_ball(heads()), learned(PoincareConfig::new().curvature(1.7).temperature(0.6))),
        (in_the_ball(grouped()), PoincareConfig::new().aggregation(linear)),
        (one_head(), learned(tangent())),
        (grouped().scale(0.5), learned(tangent().curvature(0.3)).temperature(2.0)),
        (heads(), learned(tangent().aggregation(linear))),
        (Shapes::new(19, 19, 35).scale(0.3), tangent()),
        (same_sizes().scale(0.3), learned(tangent().aggregation(Aggregation::TangentAtQuery))),
        (in_the_ball(same_sizes()), PoincareConfig::new().aggregation(Aggregation::FrechetMean)),
        (heads().scale(0.3), learned(tangent().aggregation(Aggregation::FrechetMean))),
    ]
    .map(|(shapes, config)| (shapes, Box::new(config.init().unwrap()) as Box<dyn Attention<F>>));
    let features = |count| PerformerConfig::new(3, count);
    let relu = Features::Relu { epsilon: 0.01 };
    let performers = [
        (one_head(), features(7)),
        (heads(), features(8).features(Features::Hyperbolic).scale(0.9)),
        (grouped(), features(37)),
        (grouped(), features(6).features(Features::Hyperbolic).projection(Projection::Iid)),
        (heads(), features(5).features(relu)),
        (grouped(), features(3).features(Features::Elu)),
        (one_head().scale(0.3), features(64).features(Features::Trigonometric)),
    ];
    // The projection as a parameter, and twice as a buffer.
    let fixed = performers[2..4].to_vec();
    let learned = performers.map(|(shapes, config)| (shapes, config.learn_projection(true)));
    let performers: Vec<Entry<F>> = (learned.into_iter().chain(fixed))
        .map(|(shapes, config)| -> Entry<F> { (shapes, Box::new(config.init(&mut rng).unwrap())) })
        .collect();
    // Experts of one kind and of several, with all or some of them chosen, also nested. No capacity: it
    // would make the output of a query depend on other queries.
    let boxed = |expert: Flash| Box::new(expert) as Box<dyn Attention<F>>;
    let scaled = |scale| boxed(flash(2, 3).with_scale(scale).unwrap());
    let plain = || {
        (0..3)
            .map(|_| Box::new(ScaledDotProduct::new()) as _)
            .collect::<Vec<Box<dyn Attention<F>>>>()
    };
    let flashes = || vec![scaled(0.3), scaled(-0.5), scaled(1.0), scaled(2.0)];
    let mut projected = |heads| -> Box<dyn Attention<F>> {
        let config = MultiHeadConfig::new(6, heads).bias(heads == 1);
        Box::new(config.init(Flash::new(), &mut rng).unwrap())
    };
    let several = vec![projected(1), boxed(Flash::new()), projected(3)];
    let inside = vec![projected(1), projected(1)];
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(9);
    let mut moe = |config: MoeConfig, experts| config.init(experts, &mut rng).unwrap();
    let around: Vec<Box<dyn Attention<F>>> =
        vec![boxed(Flash::new()), Box::new(moe(MoeConfig::new(6, 1), inside)), scaled(0.1)];
    let raw = |config: MoeConfig| config.renormalize(false);
    let sigmoid = |dim, k| MoeConfig::new(dim, k).gating(Gating::Sigmoid);
    let performer = PerformerConfig::new(6, 8).init(&mut Xoshiro256PlusPlus::seed_from_u64(12));
    let rotated = GraphRopeConfig::new(6, Layout::Half).axes(2).init(Flash::new());
    let with_buffers: Vec<Box<dyn Attention<F>>> =
        vec![Box::new(performer.unwrap()), Box::new(rotated.unwrap()), scaled(0.2)];
    let six = || Shapes::new(6, 6, 6);
    let moes = [
        (one_head(), moe(MoeConfig::new(3, 2), flashes())),
        (one_head(), moe(MoeConfig::new(3, 2), plain())),
        (heads().whole_queries(), moe(MoeConfig::new(6, 2), flashes())),
        (grouped().whole_queries(), moe(raw(MoeConfig::new(18, 1)), flashes())),
        (six(), moe(MoeConfig::new(6, 3), several)),
        (six(), moe(raw(MoeConfig::new(6, 2)), around)),
        (heads().whole_queries(), moe(sigmoid(6, 2), flashes())),
        (one_head(), moe(raw(sigmoid(3, 3)), flashes())),
        (six(), {
            let mut biased = moe(sigmoid(6, 2), with_buffers);
            biased.set_expert_bias(array![0.5, -0.25, 0.0].mapv(F::from_f64)).unwrap();
            biased
        }),
    ]
    .map(|(shapes, moe)| (shapes, Box::new(moe) as Box<dyn Attention<F>>));
    let rope = |head_dim| GraphRopeConfig::new(head_dim, Layout::Half).base(5.0);
    let several_axes = |head_dim| GraphRopeConfig::new(head_dim, Layout::Interleaved).axes(2);
    let mixed = array![[0.5, -1.5, 0.0], [1.25, 0.75, -0.5]];
    let ropes: Vec<Entry<F>> = vec![
        (Shapes::new(6, 6, 5).axes(1), Box::new(rope(6).init(Flash::new()).unwrap())),
        (
            Shapes::new(2 * 7, 2 * 7, 2 * 5).heads(2),
            Box::new(
                several_axes(7).rotary_dim(6).learn_frequencies(true).init(flash(2, 3)).unwrap(),
            ),
        ),
        (
            Shapes::new(6 * 6, 2 * 6, 2 * 5).kv_heads(6, 2),
            Box::new({
                let config = rope(6).frequencies(mixed.clone()).learn_frequencies(true);
                config.init(ScaledDotProduct::new()).unwrap()
            }),
        ),
        (
            Shapes::new(8, 8, 8).bias_heads(2),
            Box::new({
                let inner = several_axes(4).learn_frequencies(true).init(Flash::new()).unwrap();
                MultiHeadConfig::new(8, 2).init(inner, &mut rng).unwrap()
            }),
        ),
        (
            // Parameters inside parameters, and a rotation inside a rotation.
            Shapes::new(6, 6, 6).bias_heads(3),
            Box::new({
                let heads = MultiHeadConfig::new(6, 3).init(Flash::new(), &mut rng).unwrap();
                let inner = rope(6).frequencies(mixed).learn_frequencies(true).init(heads).unwrap();
                several_axes(6).learn_frequencies(true).init(inner).unwrap()
            }),
        ),
        (
            heads().axes(1),
            Box::new({
                let inner = PerformerConfig::new(3, 16).init(&mut rng).unwrap();
                rope(3).rotary_dim(2).learn_frequencies(true).init(inner).unwrap()
            }),
        ),
        (
            heads().scale(0.3).axes(1),
            Box::new(rope(3).rotary_dim(2).init(tangent().init().unwrap()).unwrap()),
        ),
        (Shapes::new(34, 34, 19), Box::new(rope(34).init_edges().unwrap())),
        (
            Shapes::new(2 * 7, 2 * 7, 2 * 5).heads(2),
            Box::new({
                let config = GraphRopeConfig::new(7, Layout::Interleaved).rotary_dim(4);
                config.learn_frequencies(true).init_edges().unwrap()
            }),
        ),
        (
            Shapes::new(6 * 6, 2 * 6, 2 * 5).kv_heads(6, 2),
            Box::new({
                let config = rope(6).frequencies(array![[0.5, -1.5, 0.75]]).learn_frequencies(true);
                config.init_edges().unwrap()
            }),
        ),
        (
            Shapes::new(8, 8, 8).bias_heads(2),
            Box::new(
                MultiHeadConfig::new(8, 2).init(rope(4).init_edges().unwrap(), &mut rng).unwrap(),
            ),
        ),
    ];
    // The laws are about all pairs, so the windows contain all pairs: in one block and in three.
    let sliding_window = |window, flash| LocalGlobal::sliding_window(window, flash).unwrap();
    let mut projected = || -> Box<dyn Attention<F>> {
        Box::new(MultiHeadConfig::new(6, 1).init(Flash::new(), &mut rng).unwrap())
    };
    let [local, global] = [projected(), projected()];
    let mut gate = |head_dim, heads, local, global| {
        LocalGlobal::gated(head_dim, heads, local, global, &mut rng).unwrap()
    };
    let local_globals = [
        (one_head(), sliding_window(Window::new(7), Flash::new())),
        (grouped(), sliding_window(Window::new(9).globals(&[2, 0]), flash(3, 2))),
        (heads(), LocalGlobal::joint(flash(2, 3), flash(2, 2).with_scale(-0.6).unwrap())),
        (grouped(), gate(3, 6, scaled(0.3), scaled(1.1))),
        (six(), gate(6, 1, local, global)),
    ]
    .map(|(shapes, attention)| (shapes, Box::new(attention) as Box<dyn Attention<F>>));
    // Inner mechanisms with and without parameters; a cross branch that must project its query; one
    // `DualSpace` inside another and in a mixture.
    let linear = |output_dim, dim| DualSpaceConfig::new(Fusion::Linear { output_dim }, dim);
    let gated = |dim| DualSpaceConfig::new(Fusion::Gated, dim);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(10);
    let plain = |config: DualSpaceConfig, rng: &mut _| -> DualSpace<F> {
        config.init(flash(2, 3), ScaledDotProduct::new(), Flash::new(), rng).unwrap()
    };
    let multi_head = |dim, rng: &mut _| {
        let config = MultiHeadConfig::new(dim, 1).key_dim(5).value_dim(3);
        config.output_dim(4).init(Flash::new(), rng).unwrap()
    };
    let mut projected = |config: DualSpaceConfig| {
        let [graph, latent, cross] = [5, 5, 4].map(|dim| multi_head(dim, &mut rng));
        config.init(graph, latent, cross, &mut rng).unwrap()
    };
    let around = [projected(linear(5, 4)), projected(gated(4))];
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(11);
    let inside = plain(gated(6), &mut rng);
    let nested = linear(7, 6).init(inside, flash(1, 2), flash(3, 3), &mut rng).unwrap();
    let routed: Vec<Box<dyn Attention<F>>> =
        vec![Box::new(plain(gated(6), &mut rng)), Box::new(plain(linear(6, 6), &mut rng))];
    let routed = MoeConfig::new(6, 1).init(routed, &mut rng).unwrap();
    let [a, b] = around;
    let projections = || Shapes::new(5, 5, 3);
    let duals: Vec<Entry<F>> = vec![
        (six(), Box::new(plain(linear(5, 6), &mut rng))),
        (six(), Box::new(plain(gated(6), &mut rng))),
        (projections(), Box::new(a)),
        (projections(), Box::new(b)),
        (six(), Box::new(nested)),
        (six(), Box::new(routed)),
    ];
    let duals = duals.into_iter().map(|(shapes, dual)| (shapes.reads_latent(), dual));
    // Around mechanisms with and without parameters; post-norm with keys of other sizes; inside and around
    // others. A stack without cross-attention is checked by the laws of its own, in `stack`.
    let layer = |hidden| TransformerLayerConfig::new(6, hidden);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(13);
    let mut heads_of = |config: MultiHeadConfig| config.init(Flash::new(), &mut rng).unwrap();
    let bipartite = heads_of(MultiHeadConfig::new(6, 2).key_dim(5).value_dim(3));
    let [a, b, c, d] = [1, 2, 3, 1].map(|heads| heads_of(MultiHeadConfig::new(6, heads)));
    let swiglu = layer(4).activation(Activation::Silu).gated(true).bias(false).norm_first(true);
    let swiglu = swiglu.normalization(Normalization::Rms).epsilon(0.01);
    let geglu = layer(5).activation(Activation::Gelu).gated(true);
    let gat = EdgeGatConfig::new(Score::GatV2, 6, 3, 2).edge_dim(3).init(&mut rng).unwrap();
    let positions = GraphRopeConfig::new(6, Layout::Half).axes(2).init(Flash::new()).unwrap();
    let rows = |shapes: Shapes| shapes.drops_rows();
    let in_stack = layer(3).norm_first(true).activation(Activation::Gelu);
    let in_stack = [a, b].map(|inner| in_stack.init(inner, &mut rng).unwrap());
    let norm = NormConfig::new(Normalization::Rms, 6).epsilon(0.1);
    let crossing = StackConfig::new().cross_attention(true);
    let post = layer(3).init(flash(2, 3), &mut rng).unwrap();
    let mixed: Vec<Box<dyn Attention<F>>> = vec![Box::new(post.clone()), scaled(0.2)];
    let routed: Vec<Box<dyn Attention<F>>> = vec![Box::new(post.clone()), Box::new(d)];
    let layers: Vec<Entry<F>> = vec![
        (rows(six()), Box::new(layer(5).init(flash(3, 2), &mut rng).unwrap())),
        (rows(six()), Box::new(layer(4).norm_first(true).init(positions, &mut rng).unwrap())),
        (
            rows(Shapes::new(6, 5, 3).bias_heads(2)),
            Box::new(geglu.init(bipartite, &mut rng).unwrap()),
        ),
        (rows(six().bias_heads(3)), Box::new(swiglu.init(c, &mut rng).unwrap())),
        (rows(six()), Box::new(layer(3).activation(Activation::Gelu).init(gat, &mut rng).unwrap())),
        (rows(six()), Box::new(MoeConfig::new(6, 1).init(routed, &mut rng).unwrap())),
        (
            rows(six()),
            Box::new(crossing.clone().checkpointing(true).norm(norm).init(mixed).unwrap()),
        ),
        (rows(six()), Box::new(crossing.clone().init(in_stack).unwrap())),
        (
            // One layer: with keys of 1e8 the second would be as steep in the values as in the keys.
            Shapes::new(6, 6, 6).heads(2),
            Box::new(crossing.init([flash(2, 3)]).unwrap()),
        ),
    ];
    let leaves = others.into_iter().chain(gats).chain(poincare).chain(performers);
    let leaves = leaves.chain(moes).chain(ropes).chain(local_globals);
    leaves.chain(duals).chain(layers).collect()
}

/// Asserts that nothing was refused, except weights of pairs where means in the Poincaré ball need weights of
/// one sign.
fn assert_complete<F: Float>(mechanism: &dyn Attention<F>, report: &Report) {
    let has_means = format!("{mechanism:?}").contains("Poincare {");
    let is_allowed = |case: &&str| has_means && case.contains("weights of pairs");
    let refused: Vec<_> = report.refused.iter().filter(|case| !is_allowed(case)).collect();
    assert_eq!(refused, Vec::<&&str>::new(), "{}", mechanism.name());
    assert!(report.checked.len() >= 14, "{report:?}");
}

#[test]
fn no_mechanism_is_left_out() {
    common::hold_simd();
    let names = mechanisms::<f64>().into_iter().map(|(_, mechanism)| mechanism.name());
    common::assert_every_mechanism(names);
}

#[test]
fn laws_hold_in_f64() {
    common::hold_simd();
    for (shapes, mechanism) in mechanisms::<f64>() {
        let report = check_attention(&*mechanism, &shapes).unwrap_or_else(|e| panic!("{e}"));
        assert_complete(&*mechanism, &report);
    }
}

#[test]
fn laws_hold_in_f32() {
    common::hold_simd();
    for (shapes, mechanism) in mechanisms::<f32>() {
        let report = check_attention(&*mechanism, &shapes).unwrap_or_else(|e| panic!("{e}"));
        assert_complete(&*mechanism, &report);
    }
}

#[test]
fn backward_is_the_derivative_of_forward() {
    common::hold_simd();
    mechanisms::<f64>().into_par_iter().for_each(|(shapes, mut mechanism)| {
        let report = check_gradients(&mut *mechanism, &shapes).unwrap_or_else(|e| panic!("{e}"));
        assert_complete(&*mechanism, &report);
    });
}

#[test]
fn weights_have_a_backward_pass_where_they_exist() {
    common::hold_simd();
    for mechanism in common::mechanisms::<f64>() {
        let x = 0.1 * common::random::matrix(5, 4, 1);
        let graph = Graph::from_edges(5, 5, [(0, 1), (0, 2), (3, 4)]).unwrap();
        let (edges, distances) =
            (common::random::matrix(25, 2, 2), common::random::matrix(1, 25, 3));
        let positions = common::random::matrix(5, 1, 4);
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
        let inputs = inputs.with_edge_features(edges.view()).unwrap().with_latent(&graph).unwrap();
        let inputs = inputs.with_distances(distances.row(0)).unwrap();
        let inputs = inputs.with_positions(positions.view(), positions.view()).unwrap();
        let name = mechanism.name();
        match mechanism.attention_weights(&inputs) {
            Ok(weights) => {
                let grads = mechanism.attention_weights_backward(&inputs, weights.view());
                assert!(grads.unwrap().key.iter().any(|&grad| grad != 0.0), "{name}");
                let wrong = mechanism.attention_weights_backward(&inputs, x.view());
                assert!(matches!(wrong, Err(Error::Shape { .. })), "{name}: {wrong:?}");
            }
            Err(error) => {
                assert_eq!(error, Error::NoWeights { mechanism: name });
                let grads = mechanism.attention_weights_backward(&inputs, x.view());
                assert_eq!(grads.unwrap_err(), error);
            }
        }
    }
}

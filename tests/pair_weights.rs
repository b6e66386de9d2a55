//! Weights of pairs after the softmax, and the bias of `EdgeGat`.

mod common;

use common::close::assert_close;
use common::random::matrix;
use graph_attention::ndarray::{Array2, Axis, array, s};
use graph_attention::{
    Attention, Dropout, EdgeGat, EdgeGatConfig, EdgeRope, Error, Flash, Gradients, Graph,
    GraphRopeConfig, Inputs, LocalGlobal, MultiHeadConfig, PerformerConfig, PoincareConfig, Result,
    ScaledDotProduct, Segments, edge_gat::Score, graph_rope::Layout, local_global::Window,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};

const SCORES: [Score; 4] = [Score::Gat, Score::GatV2, Score::Additive, Score::DotProduct];

fn gat(score: Score, edge_dim: usize) -> EdgeGat<f64> {
    let config = EdgeGatConfig::new(score, 8, 5, 2).edge_dim(edge_dim).residual(false).bias(false);
    config.init(&mut Xoshiro256PlusPlus::seed_from_u64(1)).unwrap()
}

fn rope() -> EdgeRope<f64> {
    GraphRopeConfig::new(4, Layout::Half).init_edges().unwrap()
}

/// Mechanisms whose output is a sum over pairs of weight times value, for two heads of 4 columns.
fn sums() -> Vec<Box<dyn Attention<f64>>> {
    let window = LocalGlobal::sliding_window(Window::new(5).globals(&[2]), Flash::new()).unwrap();
    let performer = PerformerConfig::new(4, 16).init(&mut Xoshiro256PlusPlus::seed_from_u64(2));
    vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(Flash::new().with_tiles(8, 5).unwrap()),
        Box::new(window),
        Box::new(performer.unwrap()),
        Box::new(rope()),
    ]
}

fn gats() -> Vec<Box<dyn Attention<f64>>> {
    let all = SCORES.into_iter().flat_map(|score| [0, 3].map(|edge_dim| (score, edge_dim)));
    all.map(|(score, edge_dim)| Box::new(gat(score, edge_dim)) as Box<dyn Attention<f64>>).collect()
}

/// 23 nodes with 8 columns, dense or with some edges in no order, without weights.
struct Sample {
    nodes: Array2<f64>,
    graph: Graph,
    features: Array2<f64>,
    distances: Array2<f64>,
    is_dense: bool,
}

impl Sample {
    fn new(is_dense: bool) -> Self {
        let edges = (0..150).map(|edge| (edge * 7 % 23, edge * edge * 5 % 22));
        let num_pairs = if is_dense { 23 * 23 } else { 150 };
        Self {
            nodes: matrix(23, 8, 1),
            graph: Graph::from_edges(23, 23, edges).unwrap(),
            features: matrix(num_pairs, 3, 2),
            distances: matrix(num_pairs, 1, 3).mapv(f64::abs),
            is_dense,
        }
    }

    fn num_pairs(&self) -> usize {
        self.distances.len()
    }

    /// Inputs that suit a mechanism.
    fn inputs(&self, mechanism: &dyn Attention<f64>) -> Inputs<'_, f64> {
        let nodes = self.nodes.view();
        let inputs = if self.is_dense {
            Inputs::dense(nodes, nodes, nodes).unwrap()
        } else {
            Inputs::self_attention(nodes, &self.graph).unwrap()
        };
        if mechanism.name() == "edge_gat" {
            let reads_features = format!("{mechanism:?}").contains("lin_edge");
            let inputs = inputs.with_edge_features(self.features.view()).unwrap();
            let none = self.features.slice(s![.., ..0]);
            return if reads_features { inputs } else { inputs.with_edge_features(none).unwrap() };
        }
        let inputs = inputs.with_heads(2).unwrap();
        inputs.with_distances(self.distances.column(0)).unwrap()
    }
}

fn run(
    mechanism: &dyn Attention<f64>,
    inputs: &Inputs<'_, f64>,
) -> Result<(Array2<f64>, Gradients<f64>)> {
    let (out, saved) = mechanism.forward_train(inputs)?;
    let grad_out = matrix(out.nrows(), out.ncols(), 9);
    let grads = mechanism.backward(inputs, &saved, grad_out.view())?;
    Ok((out, grads))
}

fn for_all(mut check: impl FnMut(&dyn Attention<f64>, &Sample) -> Result<()>) -> Result<()> {
    common::hold_simd();
    for is_dense in [true, false] {
        let sample = Sample::new(is_dense);
        for mechanism in sums().into_iter().chain(gats()) {
            check(&*mechanism, &sample)?;
        }
    }
    Ok(())
}

#[test]
fn weights_of_one_change_no_bit() -> Result<()> {
    common::hold_simd();
    for_all(|mechanism, sample| {
        let inputs = sample.inputs(mechanism);
        // Without weights, Performer does not visit the pairs of dense inputs.
        if mechanism.name() == "performer" && sample.is_dense {
            return Ok(());
        }
        let ones = Array2::ones((sample.num_pairs(), 2));
        let (out, mut grads) = run(mechanism, &inputs.with_pair_weights(ones.view())?)?;
        grads.pair_weights = None;
        let (expected, of_plain) = run(mechanism, &inputs)?;
        assert_eq!(out, expected, "{}", mechanism.name());
        assert_eq!(grads, of_plain, "{}", mechanism.name());
        Ok(())
    })
}

#[test]
fn factors_of_dropout_are_dropout() -> Result<()> {
    common::hold_simd();
    let dropout = Dropout { probability: 0.4, seed: 3 };
    for_all(|mechanism, sample| {
        let inputs = sample.inputs(mechanism);
        let factors =
            Array2::from_shape_fn((sample.num_pairs(), 2), |(pair, h)| dropout.multiplier(pair, h));
        let (out, mut grads) = run(mechanism, &inputs.with_pair_weights(factors.view())?)?;
        grads.pair_weights = None;
        let (expected, of_dropout) = run(mechanism, &inputs.with_dropout(dropout)?)?;
        assert_eq!(out, expected, "{}", mechanism.name());
        assert_eq!(grads, of_dropout, "{}", mechanism.name());
        Ok(())
    })
}

#[test]
fn outputs_are_linear_in_the_weights_and_attention_weights_do_not_see_them() -> Result<()> {
    common::hold_simd();
    for_all(|mechanism, sample| {
        let name = mechanism.name();
        let inputs = sample.inputs(mechanism);
        for columns in [1, 2] {
            let [a, b] = [4, 5].map(|seed| matrix(sample.num_pairs(), columns, seed));
            let sum = &a + &b;
            let (of_a, grads) = run(mechanism, &inputs.with_pair_weights(a.view())?)?;
            let (of_b, _) = run(mechanism, &inputs.with_pair_weights(b.view())?)?;
            let (of_sum, _) = run(mechanism, &inputs.with_pair_weights(sum.view())?)?;
            assert_close(name, 1e-12, &of_sum, &(&of_a + &of_b));
            // So the gradient of the weights times the weights is the loss.
            let grad_out = matrix(of_a.nrows(), of_a.ncols(), 9);
            let grad = grads.pair_weights.unwrap();
            let [loss, by_weights] = [(of_a * grad_out).sum(), (grad * &a).sum()];
            assert!((loss - by_weights).abs() < 1e-11, "{name}: {loss} and {by_weights}");

            let plain = mechanism.attention_weights(&inputs)?;
            let weighted = mechanism.attention_weights(&inputs.with_pair_weights(a.view())?)?;
            assert_eq!(weighted, plain, "{name}");
        }
        let zeros = Array2::zeros((sample.num_pairs(), 1));
        let (out, grads) = run(mechanism, &inputs.with_pair_weights(zeros.view())?)?;
        assert!(out.iter().all(|&x| x == 0.0), "{name}");
        assert!(grads.query.iter().chain(&grads.value).all(|&x| x == 0.0), "{name}");
        assert!(grads.pair_weights.unwrap().iter().any(|&x| x != 0.0), "{name}");
        Ok(())
    })
}

#[test]
fn a_weight_of_zero_keeps_the_others_share() -> Result<()> {
    common::hold_simd();
    let nodes = array![[0.0, 4.0], [0.0, 8.0], [0.0, 12.0]];
    let graph = Graph::from_edges(3, 3, [(0, 0), (0, 2), (0, 1)])?;
    let flat = array![[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]];
    let inputs = Inputs::graph(flat.view(), flat.view(), nodes.view(), &graph)?;
    let weights = array![[1.0], [0.0], [0.5]];
    let out = Flash::new().forward(&inputs.with_pair_weights(weights.view())?)?;
    assert_close("out", 1e-15, &out.row(0).to_owned(), &array![0.0, (4.0 + 0.5 * 8.0) / 3.0]);
    let keep = array![true, false, true];
    let out = Flash::new().forward(&inputs.with_pair_mask(keep.view())?)?;
    assert_close("out", 1e-15, &out.row(0).to_owned(), &array![0.0, 6.0]);
    Ok(())
}

#[test]
fn nan_in_the_weight_of_a_hidden_pair_changes_nothing() -> Result<()> {
    common::hold_simd();
    for_all(|mechanism, sample| {
        let name = mechanism.name();
        let inputs = sample.inputs(mechanism);
        // Pairs are hidden from both heads, and some only from head 1.
        let mut bias = Array2::zeros((sample.num_pairs(), 2));
        let mut weights = matrix(sample.num_pairs(), 2, 7);
        for pair in (0..sample.num_pairs()).step_by(3) {
            bias[[pair, 1]] = f64::NEG_INFINITY;
            if pair % 2 == 0 {
                bias[[pair, 0]] = f64::NEG_INFINITY;
            }
        }
        let run_with = |weights: &Array2<f64>| {
            run(mechanism, &inputs.with_bias(bias.view())?.with_pair_weights(weights.view())?)
        };
        let expected = run_with(&weights)?;
        let hidden = bias.mapv(|bias| bias == f64::NEG_INFINITY);
        let grad = expected.1.pair_weights.clone().unwrap();
        assert!(grad.iter().zip(&hidden).all(|(&grad, hidden)| !hidden || grad == 0.0), "{name}");
        for (weight, &is_hidden) in weights.iter_mut().zip(&hidden) {
            if is_hidden {
                *weight = f64::NAN;
            }
        }
        assert_eq!(run_with(&weights)?, expected, "{name}");

        let mask = Array2::from_shape_fn((23, 23), |(i, j)| (i + 2 * j) % 4 != 0);
        let masked = inputs.with_mask(mask.view())?;
        let of_pairs: Vec<_> = (0..23).flat_map(|query| masked.row(query)).collect();
        let mut weights = Array2::from_elem((sample.num_pairs(), 1), f64::NAN);
        of_pairs.iter().for_each(|pair| weights[[pair.index, 0]] = 0.5);
        let (out, grads) = run(mechanism, &masked.with_pair_weights(weights.view())?)?;
        assert!(out.iter().chain(&grads.query).chain(&grads.key).all(|x| x.is_finite()), "{name}");
        assert!(grads.pair_weights.unwrap().iter().all(|x| x.is_finite()), "{name}");
        Ok(())
    })
}

#[test]
fn permuted_edges_have_permuted_gradients() -> Result<()> {
    common::hold_simd();
    let sample = Sample::new(false);
    let order: Vec<usize> = (0..150).map(|edge| edge * 53 % 150).collect();
    let mut ends = vec![(0, 0); 150];
    for query in 0..23 {
        sample.graph.row(query).for_each(|(key, edge)| ends[edge] = (query, key));
    }
    let permuted = Sample {
        graph: Graph::from_edges(23, 23, order.iter().map(|&edge| ends[edge]))?,
        features: sample.features.select(Axis(0), &order),
        distances: sample.distances.select(Axis(0), &order),
        nodes: sample.nodes.clone(),
        is_dense: false,
    };
    let weights = matrix(150, 2, 7);
    let of_permuted = weights.select(Axis(0), &order);
    for mechanism in sums().into_iter().chain(gats()) {
        let inputs = sample.inputs(&*mechanism).with_pair_weights(weights.view())?;
        let (out, grads) = run(&*mechanism, &inputs)?;
        let inputs = permuted.inputs(&*mechanism).with_pair_weights(of_permuted.view())?;
        let (of_inputs, of_weights) = run(&*mechanism, &inputs)?;
        let name = mechanism.name();
        assert_close(name, 1e-12, &of_inputs, &out);
        let expected = grads.pair_weights.unwrap().select(Axis(0), &order);
        assert_close(name, 1e-12, &of_weights.pair_weights.unwrap(), &expected);
    }
    Ok(())
}

#[test]
fn packed_weights_are_a_loop() -> Result<()> {
    common::hold_simd();
    let segments = Segments::from_lengths(&[9, 0, 14])?;
    let sample = Sample::new(true);
    let nodes = sample.nodes.view();
    let weights = matrix(segments.num_pairs(), 2, 7);
    let distances = matrix(segments.num_pairs(), 1, 8).mapv(f64::abs);
    let others: [Box<dyn Attention<f64>>; 2] =
        [Box::new(gat(Score::GatV2, 0)), Box::new(gat(Score::Gat, 0))];
    for mechanism in sums().into_iter().chain(others) {
        let name = mechanism.name();
        let heads = if name == "edge_gat" { 1 } else { 2 };
        let packed = Inputs::packed(nodes, nodes, nodes, &segments)?.with_heads(heads)?;
        let packed = packed.with_distances(distances.column(0))?;
        let (out, grads) = run(&*mechanism, &packed.with_pair_weights(weights.view())?)?;
        let grads = grads.pair_weights.unwrap();
        for segment in [0, 2] {
            let rows = s![segments.queries(segment), ..];
            let pairs = s![segments.pairs(segment), ..];
            let nodes = nodes.slice(rows);
            let alone = Inputs::dense(nodes, nodes, nodes)?.with_heads(heads)?;
            let of_pairs = distances.slice(pairs);
            let alone = alone.with_distances(of_pairs.column(0))?;
            let alone = alone.with_pair_weights(weights.slice(pairs))?;
            let (of_segment, saved) = mechanism.forward_train(&alone)?;
            assert_close(name, 1e-13, &out.slice(rows).to_owned(), &of_segment);
            let grad_out = matrix(out.nrows(), out.ncols(), 9);
            let of_segment = mechanism.backward(&alone, &saved, grad_out.slice(rows))?;
            let expected = of_segment.pair_weights.unwrap();
            assert_close(name, 1e-12, &grads.slice(pairs).to_owned(), &expected);
        }
    }
    Ok(())
}

#[test]
fn selected_queries_add_to_the_gradients_of_their_pairs() -> Result<()> {
    common::hold_simd();
    for_all(|mechanism, sample| {
        let name = mechanism.name();
        let weights = matrix(sample.num_pairs(), 2, 7);
        let inputs = sample.inputs(mechanism).with_pair_weights(weights.view())?;
        let (out, expected) = run(mechanism, &inputs)?;
        let grad_out = matrix(out.nrows(), out.ncols(), 9);
        let mut sum = Gradients::zeros(&inputs, mechanism)?;
        let rest: Vec<usize> = (0..23).filter(|query| ![4, 7, 8].contains(query)).collect();
        for queries in [vec![4, 7, 8], rest] {
            let selected = inputs.select_queries(&queries)?;
            let (some, saved) = mechanism.forward_train(&selected.inputs())?;
            assert_close(name, 1e-12, &some, &out.select(Axis(0), &queries));
            let grad_out = grad_out.select(Axis(0), &queries);
            selected.backward(sum.view_mut(), |inputs, grads| {
                mechanism.backward_into(inputs, &saved, grad_out.view(), grads)
            })?;
        }
        let [actual, expected] = [sum, expected].map(|grads| grads.pair_weights.unwrap());
        assert_close(name, 1e-12, &actual, &expected);
        Ok(())
    })
}

#[test]
fn shards_of_the_edges_have_the_gradients_of_the_whole() -> Result<()> {
    common::hold_simd();
    let sample = Sample::new(false);
    let weights = matrix(150, 2, 7);
    let bias = matrix(150, 2, 8);
    let flash = Flash::new();
    let all = sample.inputs(&flash).with_pair_weights(weights.view())?;
    let (out, expected) = run(&flash, &all)?;
    let grad_out = matrix(out.nrows(), out.ncols(), 9);
    let gat = gat(Score::Gat, 3);
    let of_gat = sample.inputs(&gat).with_pair_weights(weights.view())?.with_bias(bias.view())?;
    let (gat_out, gat_expected) = run(&gat, &of_gat)?;
    let gat_grad = matrix(gat_out.nrows(), gat_out.ncols(), 9);

    let mut ends = vec![(0, 0); 150];
    for query in 0..23 {
        sample.graph.row(query).for_each(|(key, edge)| ends[edge] = (query, key));
    }
    let halves = [0, 1].map(|half| -> Vec<usize> { (0..150).filter(|e| e % 2 == half).collect() });
    let shards = halves.each_ref().map(|edges| Sample {
        graph: Graph::from_edges(23, 23, edges.iter().map(|&edge| ends[edge])).unwrap(),
        features: sample.features.select(Axis(0), edges),
        distances: sample.distances.select(Axis(0), edges),
        nodes: sample.nodes.clone(),
        is_dense: false,
    });
    let of_halves =
        |array: &Array2<f64>| halves.each_ref().map(|edges| array.select(Axis(0), edges));
    let (weights, biases) = (of_halves(&weights), of_halves(&bias));
    let inputs = |at: usize| shards[at].inputs(&flash).with_pair_weights(weights[at].view());
    let merged = flash.forward_partial(&inputs(0)?)?.merge(&flash.forward_partial(&inputs(1)?)?)?;
    assert_close("flash", 1e-13, &merged.out().to_owned(), &out);
    let gat_inputs = |at: usize| {
        let inputs = shards[at].inputs(&gat).with_pair_weights(weights[at].view())?;
        inputs.with_bias(biases[at].view())
    };
    let of_gats =
        gat.forward_partial(&gat_inputs(0)?)?.merge(&gat.forward_partial(&gat_inputs(1)?)?)?;
    for (at, edges) in halves.iter().enumerate() {
        let grads = flash.backward_partial(&inputs(at)?, &merged, grad_out.view(), None)?;
        let of_whole = expected.pair_weights.as_ref().unwrap().select(Axis(0), edges);
        assert_close("flash", 1e-12, &grads.pair_weights.unwrap(), &of_whole);
        let grads = gat.backward_partial(&gat_inputs(at)?, &of_gats, gat_grad.view(), None)?;
        let of_whole = gat_expected.pair_weights.as_ref().unwrap().select(Axis(0), edges);
        assert_close("edge_gat", 1e-12, &grads.pair_weights.unwrap(), &of_whole);
        let of_whole = gat_expected.bias.as_ref().unwrap().select(Axis(0), edges);
        assert_close("edge_gat, bias", 1e-12, &grads.bias.unwrap(), &of_whole);
    }
    Ok(())
}

#[test]
fn mechanisms_around_others_pass_them_on() -> Result<()> {
    common::hold_simd();
    let sample = Sample::new(false);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
    let heads = MultiHeadConfig::new(8, 2).bias(false).init(Flash::new(), &mut rng)?;
    let inputs = Inputs::self_attention(sample.nodes.view(), &sample.graph)?;
    let weights = matrix(150, 2, 7);
    let twice = 2.0 * &weights;
    let (out, grads) = run(&heads, &inputs.with_pair_weights(weights.view())?)?;
    let (of_twice, _) = run(&heads, &inputs.with_pair_weights(twice.view())?)?;
    assert_close("multi_head", 1e-13, &of_twice, &(2.0 * &out));
    assert!(grads.pair_weights.unwrap().iter().all(|&grad| grad != 0.0));
    Ok(())
}

#[test]
fn refusals_and_wrong_numbers_of_heads_are_named() -> Result<()> {
    common::hold_simd();
    let sample = Sample::new(false);
    let [one, three] = [Array2::ones((150, 1)), Array2::ones((150, 3))];
    let inputs = sample.inputs(&Flash::new());
    let poincare = PoincareConfig::new().init::<f64>()?;
    let small = 0.01 * &sample.nodes;
    let of_ball = Inputs::self_attention(small.view(), &sample.graph)?;
    let refused = poincare.forward(&of_ball.with_pair_weights(one.view())?).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "poincare does not support weights of pairs: leave it out of the inputs"
    );
    for mechanism in sums() {
        let result = mechanism.forward(&inputs.with_pair_weights(three.view())?);
        common::refused(result, "Shape | pair_weights | , 2] | , 3]");
    }
    let (out, saved) = Flash::new().forward_train(&inputs.with_pair_weights(one.view())?)?;
    let mut grads = Gradients::zeros(&inputs, &Flash::new())?;
    grads.pair_weights = Some(one.clone());
    let result = Flash::new().backward_into(&inputs, &saved, out.view(), grads.view_mut());
    assert!(matches!(result, Err(Error::MissingInput { .. })), "{result:?}");
    grads.pair_weights = Some(three);
    let inputs = inputs.with_pair_weights(one.view())?;
    let result = Flash::new().backward_into(&inputs, &saved, out.view(), grads.view_mut());
    common::refused(result, "Shape | grads.pair_weights | [150, 1] | [150, 3]");
    Ok(())
}

#[test]
fn a_bias_of_edges_shifts_hides_and_reaches_each_score() -> Result<()> {
    common::hold_simd();
    for is_dense in [true, false] {
        let sample = Sample::new(is_dense);
        for score in SCORES {
            for edge_dim in [0, 3] {
                let gat = gat(score, edge_dim);
                let inputs = sample.inputs(&gat);
                let plain = gat.attention_weights(&inputs)?;
                let bias = matrix(sample.num_pairs(), 2, 6);
                let biased = inputs.with_bias(bias.view())?;
                let weights = gat.attention_weights(&biased)?;
                // p' ∝ p e^b
                let mut expected = &plain * &bias.mapv(f64::exp);
                for query in 0..23 {
                    let pairs: Vec<usize> = inputs.row(query).map(|pair| pair.index).collect();
                    for head in 0..2 {
                        let sum: f64 = pairs.iter().map(|&pair| expected[[pair, head]]).sum();
                        pairs.iter().for_each(|&pair| expected[[pair, head]] /= sum);
                    }
                }
                assert_close(format_args!("{score:?}"), 1e-13, &weights, &expected);
                // The gradients of the logits of a query add up to 0.
                let (_, grads) = run(&gat, &biased)?;
                let grad = grads.bias.unwrap();
                for query in 0..23 {
                    for head in 0..2 {
                        let of_pairs = inputs.row(query).map(|pair| grad[[pair.index, head]]);
                        assert!(of_pairs.sum::<f64>().abs() < 1e-13);
                    }
                }

                // −∞ for both heads is a mask, also where the hidden data is NaN.
                let keep: Vec<bool> = (0..sample.num_pairs()).map(|pair| pair % 3 != 1).collect();
                let keep = graph_attention::ndarray::Array1::from(keep);
                let hides = keep.mapv(|keep| if keep { 0.0 } else { f64::NEG_INFINITY });
                let hides = hides.insert_axis(Axis(1));
                let mut features = sample.features.clone();
                for (mut row, &keep) in features.rows_mut().into_iter().zip(&keep) {
                    if !keep {
                        row.fill(f64::NAN);
                    }
                }
                let poisoned = inputs.with_edge_features(features.slice(s![.., ..edge_dim]))?;
                let (out, grads) = run(&gat, &poisoned.with_bias(hides.view())?)?;
                let (expected, of_masked) = run(&gat, &inputs.with_pair_mask(keep.view())?)?;
                assert_close("out", 1e-13, &out, &expected);
                assert_close("query", 1e-12, &grads.query, &of_masked.query);
                assert_close("key", 1e-12, &grads.key, &of_masked.key);
                for (actual, expected) in grads.params.iter().zip(&of_masked.params) {
                    assert_close("params", 1e-12, actual, expected);
                }
            }
        }
    }
    Ok(())
}

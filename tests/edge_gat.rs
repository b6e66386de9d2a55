//! `EdgeGat` beyond the laws of every mechanism: what its scores can express and learn, what it
//! refuses, its initial parameters, precision, threads and memory.

mod common;

use common::close::{assert_close, assert_close_in_size};
use common::random::{normal, rng};
use common::{on_one_thread, refused};
use graph_attention::ndarray::{
    Array2, Array3, ArrayD, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMutD, Axis,
};
use graph_attention::ndarray::{Ix1, Ix2, IxDyn, array, concatenate, s};
use graph_attention::{
    Attention, EdgeGat, EdgeGatConfig, Flash, Float, Gradients, Graph, Inputs, Params, Result,
    edge_gat::Score, params,
};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

const SCORES: [Score; 3] = [Score::Gat, Score::GatV2, Score::DotProduct];

fn permutation(rng: &mut Xoshiro256PlusPlus, len: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..len).collect();
    numbers.shuffle(rng);
    numbers
}

fn complete(queries: usize, keys: usize) -> Graph {
    Graph::from_mask(Array2::from_elem((queries, keys), true).view()).unwrap()
}

// What the scores can express.

/// Returns for each head and query the keys, in descending order of attention.
fn rankings(gat: &EdgeGat<f64>, inputs: &Inputs<'_, f64>) -> Vec<Vec<Vec<usize>>> {
    let weights = gat.attention_weights(inputs).unwrap();
    let num_keys = inputs.num_keys();
    let of_query = |weights: Vec<f64>| {
        let mut keys: Vec<usize> = (0..num_keys).collect();
        keys.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        keys
    };
    let of_head = |weights: Vec<f64>| {
        weights.chunks(num_keys).map(|weights| of_query(weights.to_vec())).collect()
    };
    weights.columns().into_iter().map(|weights| of_head(weights.to_vec())).collect()
}

/// Returns all rankings for many draws of parameters and inputs, with and without shared weights and edge
/// features, dense and on a complete graph.
fn rankings_of_draws(score: Score) -> Vec<Vec<Vec<usize>>> {
    let (mut rng, graph) = (rng(1), complete(7, 6));
    let mut all = Vec::new();
    for draw in 0..100 {
        let edge_dim = if draw % 2 == 0 { 3 } else { 0 };
        let shared = score != Score::DotProduct && draw % 4 < 2;
        let config = EdgeGatConfig::new(score, 5, 4, 3).share_weights(shared).edge_dim(edge_dim);
        let gat = config.init(&mut rng).unwrap();
        let (query, key) = (normal(7, 5, &mut rng), normal(6, 5, &mut rng));
        // The same for all edges.
        let feature = normal(1, edge_dim, &mut rng);
        let features = feature.broadcast((7 * 6, edge_dim)).unwrap();
        for inputs in [
            Inputs::dense(query.view(), key.view(), key.view()).unwrap(),
            Inputs::graph(query.view(), key.view(), key.view(), &graph).unwrap(),
        ] {
            all.extend(rankings(&gat, &inputs.with_edge_features(features).unwrap()));
        }
    }
    assert_eq!(all.len(), 100 * 2 * 3);
    all
}

/// Theorem 1 of Brody et al. 2022.
#[test]
fn in_a_head_of_gat_all_queries_rank_the_keys_alike() {
    common::hold_simd();
    for queries in rankings_of_draws(Score::Gat) {
        assert!(queries.iter().all(|keys| *keys == queries[0]), "{queries:?}");
    }
}

#[test]
fn the_other_scores_let_queries_prefer_different_keys() {
    common::hold_simd();
    for score in [Score::GatV2, Score::DotProduct] {
        let all = rankings_of_draws(score);
        let differ = |queries: &&Vec<Vec<usize>>| queries.iter().any(|it| it[0] != queries[0][0]);
        let count = all.iter().filter(differ).count();
        assert!(count > all.len() / 2, "{score:?}: {count}");
    }
}

/// Weights with which query i looks up the value of the key that carries attribute i, of k. A query
/// is its attribute, a key its attribute and its value, all one-hot.
///
/// Unit c < k of the hidden layer is \[query = c\] + \[attribute = c\] − 1: after LeakyReLU of slope α
/// it is 1 where both have c, 0 where one has, −α where none has. The sum of the k units is
/// 1 − (k − 1)α for a key that matches, and −(k − 2)α for another: 1 − α less, whatever the two
/// attributes are. The attention vector takes that sum times 20/(1 − α), so another key weighs e⁻²⁰
/// as much. The other k units carry the value to the output and are not scored.
fn lookup_by_hand(k: usize, slope: f64) -> EdgeGat<f64> {
    let mut att = ArrayD::zeros(IxDyn(&[1, 1, 2 * k]));
    att.slice_mut(s![.., .., ..k]).fill(20.0 / (1.0 - slope));
    let to_units = Array2::from_shape_fn((2 * k, k), |(i, j)| f64::from(i == j));
    let mut minus_one = ArrayD::zeros(IxDyn(&[2 * k]));
    minus_one.slice_mut(s![..k]).fill(-1.0);
    let state = [
        ("att", att),
        ("lin_l.weight", Array2::eye(2 * k).into_dyn()),
        ("lin_l.bias", ArrayD::zeros(IxDyn(&[2 * k]))),
        ("lin_r.weight", to_units.into_dyn()),
        ("lin_r.bias", minus_one),
        ("bias", ArrayD::zeros(IxDyn(&[2 * k]))),
    ];
    let config = EdgeGatConfig::new(Score::GatV2, k, 2 * k, 1).key_dim(2 * k).negative_slope(slope);
    config.from_params(state).unwrap()
}

/// Returns one row per key: its attribute and its value, one-hot.
fn dictionary<F: Float>(attributes: &[usize], values: &[usize]) -> Array2<F> {
    let k = attributes.len();
    let mut keys = Array2::zeros((k, 2 * k));
    for (j, (&attribute, &value)) in attributes.iter().zip(values).enumerate() {
        keys[[j, attribute]] = F::one();
        keys[[j, k + value]] = F::one();
    }
    keys
}

fn all_permutations(k: usize) -> Vec<Vec<usize>> {
    if k == 0 {
        return vec![vec![]];
    }
    let insert = |mut rest: Vec<usize>, at| {
        rest.insert(at, k - 1);
        rest
    };
    all_permutations(k - 1)
        .into_iter()
        .flat_map(|rest| (0..k).map(move |at| insert(rest.clone(), at)))
        .collect()
}

#[test]
fn gat_v2_by_hand_looks_up_any_dictionary() {
    common::hold_simd();
    let mut rng = rng(2);
    let some = (0..50).map(|_| permutation(&mut rng, 10)).collect::<Vec<_>>();
    let all = all_permutations(4);
    assert_eq!(all.len(), 24);
    for attributes in all.iter().chain(&some) {
        let k = attributes.len();
        let (gat, graph) = (lookup_by_hand(k, 0.2), complete(k, k));
        let values = permutation(&mut rng, k);
        let (query, key) = (Array2::eye(k), dictionary(attributes, &values));
        let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph).unwrap();
        let weights = gat.attention_weights(&inputs).unwrap();
        let out = gat.forward(&inputs).unwrap();
        for (j, (&attribute, &value)) in attributes.iter().zip(&values).enumerate() {
            assert!(weights[[attribute * k + j, 0]] > 0.999, "{attributes:?}");
            assert!(out[[attribute, k + value]] > 0.999, "{attributes:?}");
        }
    }
}

// What the scores can learn.

/// A layer and a linear read-out of its outputs, for k classes.
struct Model {
    gat: EdgeGat<f32>,
    read_out: ArrayD<f32>,
    bias: ArrayD<f32>,
}

impl Params<f32> for Model {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.gat.visit_params(visitor);
        visitor("read_out", self.read_out.view());
        visitor("read_out.bias", self.bias.view());
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.gat.visit_params_mut(visitor);
        visitor("read_out", self.read_out.view_mut());
        visitor("read_out.bias", self.bias.view_mut());
    }
}

/// Adam (Kingma & Ba 2015) with its usual constants.
#[derive(Default)]
struct Adam {
    moments: Vec<[ArrayD<f32>; 2]>,
    steps: i32,
}

impl Adam {
    fn step(&mut self, model: &mut Model, gradients: &[ArrayD<f32>], rate: f32) {
        let zeros = |grad: &ArrayD<f32>| [(); 2].map(|()| ArrayD::zeros(grad.raw_dim()));
        if self.steps == 0 {
            self.moments = gradients.iter().map(zeros).collect();
        }
        self.steps += 1;
        let [of_mean, of_square] = [0.9f32, 0.999].map(|decay| 1.0 - decay.powi(self.steps));
        let mut moments = self.moments.iter_mut();
        let update = |_: &str, mut param: ArrayViewMutD<'_, f32>, grad: ArrayViewD<'_, f32>| {
            let [mean, square] = moments.next().unwrap();
            mean.zip_mut_with(&grad, |mean, &grad| *mean = 0.9 * *mean + 0.1 * grad);
            square.zip_mut_with(&grad, |sq, &grad| *sq = 0.999 * *sq + 0.001 * grad * grad);
            let mut step = mean.clone();
            step.zip_mut_with(square, |step, &square| {
                *step *= rate / of_mean / ((square / of_square).sqrt() + 1e-8);
            });
            param -= &step;
        };
        params::update(model, gradients, update).unwrap();
    }
}

/// A batch of random dictionaries of k keys.
struct Dictionaries {
    k: usize,
    count: usize,
    graph: Graph,
    query: Array2<f32>,
}

impl Dictionaries {
    fn new(k: usize, count: usize) -> Self {
        let graph = Graph::block_diagonal(&vec![&complete(k, k); count]).unwrap();
        let query = concatenate(Axis(0), &vec![Array2::eye(k).view(); count]).unwrap();
        Self { k, count, graph, query }
    }

    /// Keys, and the class that each query should output.
    fn draw(&self, rng: &mut Xoshiro256PlusPlus) -> (Array2<f32>, Vec<usize>) {
        let mut keys = Array2::zeros((self.count * self.k, 2 * self.k));
        let mut classes = vec![0; self.count * self.k];
        for (mut keys, classes) in
            keys.axis_chunks_iter_mut(Axis(0), self.k).zip(classes.chunks_mut(self.k))
        {
            let (attributes, values) = (permutation(rng, self.k), permutation(rng, self.k));
            keys.assign(&dictionary(&attributes, &values));
            attributes.iter().zip(values).for_each(|(&at, value)| classes[at] = value);
        }
        (keys, classes)
    }

    fn inputs<'a>(&'a self, keys: &'a Array2<f32>) -> Inputs<'a, f32> {
        Inputs::graph(self.query.view(), keys.view(), keys.view(), &self.graph).unwrap()
    }
}

impl Model {
    fn new(k: usize, score: Score, head_dim: usize, heads: usize) -> Self {
        let config = EdgeGatConfig::new(score, k, head_dim, heads).key_dim(2 * k);
        let mut rng = rng(3);
        let gat = config.init(&mut rng).unwrap();
        let bound = (6.0 / (k + head_dim * heads) as f32).sqrt();
        let uniform = || rng.random_range(-bound..bound);
        let read_out = Array2::from_shape_simple_fn((k, head_dim * heads), uniform).into_dyn();
        Self { gat, read_out, bias: ArrayD::zeros(IxDyn(&[k])) }
    }

    fn read_out(&self) -> ArrayView2<'_, f32> {
        self.read_out.view().into_dimensionality().unwrap()
    }

    fn logits(&self, out: &Array2<f32>) -> Array2<f32> {
        out.dot(&self.read_out().t()) + self.bias.view().into_dimensionality::<Ix1>().unwrap()
    }

    /// The gradients of the mean cross-entropy.
    fn gradients(&self, inputs: &Inputs<'_, f32>, classes: &[usize]) -> Vec<ArrayD<f32>> {
        let (out, saved) = self.gat.forward_train(inputs).unwrap();
        // Softmax minus one-hot.
        let mut grad = self.logits(&out);
        for (mut row, &class) in grad.rows_mut().into_iter().zip(classes) {
            let max = row.fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
            row.mapv_inplace(|logit| (logit - max).exp());
            let sum = row.sum();
            row /= sum;
            row[class] -= 1.0;
        }
        grad /= classes.len() as f32;
        let grad_out = grad.dot(&self.read_out());
        let mut grads = self.gat.backward(inputs, &saved, grad_out.view()).unwrap().params;
        grads.push(grad.t().dot(&out).into_dyn());
        grads.push(grad.sum_axis(Axis(0)).into_dyn());
        grads
    }

    /// Trains on new dictionaries at every step; returns the accuracy on a thousand others.
    fn train(&mut self, steps: usize) -> f64 {
        let (mut rng, mut adam) = (rng(4), Adam::default());
        let k = self.bias.len();
        let training = Dictionaries::new(k, 32);
        for step in 0..steps {
            let (keys, classes) = training.draw(&mut rng);
            let gradients = self.gradients(&training.inputs(&keys), &classes);
            // Falls linearly to 0.
            let rate = 0.01 * (1.0 - step as f32 / steps as f32);
            adam.step(self, &gradients, rate);
        }
        let fresh = Dictionaries::new(k, 1000);
        let (keys, classes) = fresh.draw(&mut rng);
        let logits = self.logits(&self.gat.forward(&fresh.inputs(&keys)).unwrap());
        let is_right = |&(row, &class): &(ArrayView1<'_, f32>, &usize)| {
            row.iter().enumerate().all(|(other, &logit)| other == class || logit < row[class])
        };
        let right = logits.rows().into_iter().zip(&classes).filter(is_right).count();
        right as f64 / classes.len() as f64
    }
}

/// One head of `Gat` ranks the keys the same for all queries, and so does a linear read-out of it: one
/// query in k is right. This does not hold for several heads: they differ in how sharply they attend,
/// and a read-out can subtract one from another. But they learn slowly: these 8 heads are at 46 %
/// here, and at 99 % after ten times as many steps.
#[test]
fn a_head_of_gat_v2_learns_to_look_up_and_one_of_gat_cannot() {
    common::hold_simd();
    for (score, head_dim, heads, expected) in [
        (Score::GatV2, 32, 1, 0.999..=1.0),
        (Score::DotProduct, 32, 1, 0.999..=1.0),
        (Score::Gat, 64, 1, 0.05..=0.15),
        (Score::Gat, 8, 8, 0.15..=0.85),
    ] {
        let accuracy = Model::new(10, score, head_dim, heads).train(300);
        assert!(expected.contains(&accuracy), "{heads} of {score:?}: {accuracy}");
    }
}

// What is refused.

fn init(config: &EdgeGatConfig) -> Result<EdgeGat<f64>> {
    config.init(&mut rng(5))
}

#[test]
fn configurations_that_contradict_themselves() {
    common::hold_simd();
    const HUGE: usize = usize::MAX / 8;
    let new = EdgeGatConfig::new;
    let config = |score| new(score, 5, 4, 2);
    for score in SCORES {
        for (config, expected) in [
            (new(score, 0, 4, 2), "InvalidArgument | input_dim | at least 1 | got 0"),
            (new(score, 5, 0, 2), "InvalidArgument | head_dim | at least 1 | got 0"),
            (new(score, 5, 4, 0), "InvalidArgument | num_heads | at least 1 | got 0"),
            (config(score).key_dim(0), "InvalidArgument | key_dim | at least 1 | got 0"),
            (
                config(score).residual(false).gate(true),
                "InvalidArgument | gate | `residual(true)` | got no residual",
            ),
            (new(score, HUGE, 4, 2), "TooLarge | weight | , 2305843009213693951]"),
            (new(score, 5, HUGE, 9), "TooLarge | expected a size that fits in memory"),
            (config(score).edge_dim(HUGE), "TooLarge | lin_edge.weight | [8, 2305843009213693951]"),
        ] {
            refused(init(&config), expected);
        }
        for slope in [-0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let expected = format!(
                "InvalidArgument | negative_slope | a finite number of at least 0 | got {slope}"
            );
            refused(init(&config(score).negative_slope(slope)), &expected);
        }
        init(&config(score).negative_slope(0.0)).unwrap();
    }
    let shared = config(Score::DotProduct).share_weights(true);
    let expected = "InvalidArgument | share_weights | false for Score::DotProduct | got true";
    refused(init(&shared), expected);
    for score in [Score::Gat, Score::GatV2] {
        let shared = config(score).key_dim(3).share_weights(true);
        let expected =
            "InvalidArgument | share_weights | false, since key_dim = 3 differs | got true";
        refused(init(&shared), expected);
        init(&shared.key_dim(5).share_weights(true)).unwrap();
    }
}

/// Returns two queries of 5 columns, three keys of `key` columns and values of `value` columns.
fn zeros(query: usize, key: usize, value: usize) -> [Array2<f64>; 3] {
    [(2, query), (3, key), (3, value)].map(Array2::zeros)
}

fn dense(arrays: &[Array2<f64>; 3]) -> Inputs<'_, f64> {
    let [query, key, value] = arrays;
    Inputs::dense(query.view(), key.view(), value.view()).unwrap()
}

#[test]
fn inputs_that_do_not_fit_the_configuration() {
    common::hold_simd();
    let arrays = zeros(5, 4, 4);
    let bare = dense(&arrays);
    let [features, narrow] = [Array2::zeros((6, 3)), Array2::zeros((6, 2))];
    let bias = Array3::zeros((3, 2, 3));
    let weights = Array2::zeros((6, 3));
    let of_queries = zeros(4, 4, 4);
    let of_keys = zeros(5, 5, 4);
    let of_values = zeros(5, 4, 5);
    let [of_queries, of_keys, of_values] = [&of_queries, &of_keys, &of_values]
        .map(|arrays| dense(arrays).with_edge_features(features.view()).unwrap());
    let full = bare.with_edge_features(features.view()).unwrap();
    let heads = zeros(6, 4, 4);
    for score in SCORES {
        let gat = init(&EdgeGatConfig::new(score, 5, 4, 2).key_dim(4).edge_dim(3)).unwrap();
        for (inputs, expected) in [
            (of_queries, "Shape | query | [2, 5] | [2, 4]"),
            (of_keys, "Shape | key | [3, 4] | [3, 5]"),
            (of_values, "Shape | value | [3, 4] | [3, 5]"),
            (
                bare.with_edge_features(narrow.view()).unwrap(),
                "Shape | edge_features | [6, 3] | [6, 2]",
            ),
            (
                bare,
                "MissingInput | edge_gat needs edge features: set them with `Inputs::with_edge_features`",
            ),
            (full.with_bias(bias.view()).unwrap(), "Shape | bias | [2, 2, 3] | [3, 2, 3]"),
            (
                full.with_pair_weights(weights.view()).unwrap(),
                "Shape | pair_weights | [6, 2] | [6, 3]",
            ),
            (dense(&heads).with_heads(2).unwrap(), "Unsupported | edge_gat | several heads"),
        ] {
            refused(gat.forward(&inputs), expected);
            refused(gat.forward_train(&inputs), expected);
            refused(gat.attention_weights(&inputs), expected);
            // The saved state comes from inputs that fit.
            let (out, saved) = gat.forward_train(&full).unwrap();
            refused(gat.backward(&inputs, &saved, out.view()), expected);
        }
        let mut narrow = Array2::zeros((2, 7));
        let expected = "Shape | out | [2, 8] | [2, 7]";
        refused(gat.forward_into(&full, narrow.view_mut()), expected);
        refused(gat.forward_train_into(&full, narrow.view_mut()), expected);
    }
}

#[test]
fn states_that_are_not_of_the_configuration() {
    common::hold_simd();
    for score in SCORES {
        let config = EdgeGatConfig::new(score, 5, 4, 2).key_dim(3).edge_dim(2);
        let state = params::state(&init(&config).unwrap());
        let loaded = config.from_params(state.iter().rev().cloned()).unwrap();
        assert_eq!(params::state(&loaded), state);
        let from = |state: Vec<(String, ArrayD<f64>)>| config.from_params(state);
        for at in 0..state.len() {
            let name = &state[at].0;
            let mut missing = state.clone();
            missing.remove(at);
            refused(from(missing), &format!("MissingParam | parameter {name}: "));

            let mut reshaped = state.clone();
            let mut shape = reshaped[at].1.shape().to_vec();
            let expected = format!("{shape:?}");
            *shape.last_mut().unwrap() += 1;
            reshaped[at].1 = ArrayD::zeros(&shape[..]);
            refused(from(reshaped), &format!("Shape | {name} | {expected} | {shape:?}"));

            let mut unknown = state.clone();
            unknown[at].0 = "lin_x.weight".into();
            refused(from(unknown), &format!("UnknownParam | lin_x.weight | {name}"));

            let twice = state.iter().chain([&state[at]]).cloned().collect();
            refused(from(twice), &format!("DuplicateParam | parameter {name}: "));
        }
    }
}

#[test]
fn a_shared_weight_may_come_under_either_name_or_both() {
    common::hold_simd();
    for (score, shared) in [
        (Score::Gat, vec![["lin_src.weight", "lin_dst.weight"]]),
        (Score::GatV2, vec![["lin_l.weight", "lin_r.weight"], ["lin_l.bias", "lin_r.bias"]]),
    ] {
        let config = EdgeGatConfig::new(score, 5, 4, 2).share_weights(true);
        let state = params::state(&init(&config).unwrap());
        for names in shared {
            let is_shared = |name: &str| name == names[0] || name == "lin.weight";
            let renamed = |to: &[&str], scale: f64| {
                let mut new = Vec::new();
                for (name, value) in &state {
                    if is_shared(name) {
                        let value = |n: i32| value * scale.powi(n);
                        new.extend((0..).zip(to).map(|(n, to)| (to.to_string(), value(n))));
                    } else {
                        new.push((name.clone(), value.clone()));
                    }
                }
                assert_eq!(new.len(), state.len() + to.len() - 1);
                config.from_params(new)
            };
            for to in [&names[..], &names[..1], &names[1..]] {
                assert_eq!(params::state(&renamed(to, 1.0).unwrap()), state);
            }
            // A bias of zeros is the same at any scale.
            if names[0].ends_with("weight") {
                let expected =
                    format!("InvalidArgument | share_weights | different | {}", names[1]);
                refused(renamed(&names, 2.0), &expected);
            }
        }
    }
}

#[test]
fn a_transformer_conv_without_residual_leaves_its_skip() {
    common::hold_simd();
    let config = EdgeGatConfig::new(Score::DotProduct, 5, 4, 2);
    let state = params::state(&init(&config).unwrap());
    let without = config.clone().residual(false).from_params(state.clone()).unwrap();
    let expected: Vec<_> =
        state.iter().filter(|(name, _)| !name.starts_with("lin_skip.")).cloned().collect();
    assert_eq!(expected.len(), state.len() - 2);
    assert_eq!(params::state(&without), expected);
    refused(config.from_params(expected), "MissingParam | lin_skip.weight");
}

#[test]
fn gradients_and_states_that_do_not_fit() {
    common::hold_simd();
    let (arrays, features) = (zeros(5, 5, 5), Array2::zeros((6, 3)));
    let inputs = dense(&arrays).with_edge_features(features.view()).unwrap();
    for score in SCORES {
        let gat = init(&EdgeGatConfig::new(score, 5, 4, 2).edge_dim(3)).unwrap();
        let (out, saved) = gat.forward_train(&inputs).unwrap();
        let backward = |spoil: &dyn Fn(&mut Gradients<f64>)| {
            let mut grads = Gradients::zeros(&inputs, &gat)?;
            spoil(&mut grads);
            gat.backward_into(&inputs, &saved, out.view(), grads.view_mut())
        };
        backward(&|_| {}).unwrap();
        let bad = || Array2::zeros((7, 9));
        refused(backward(&|it| it.query = bad()), "Shape | grads.query | [2, 5] | [7, 9]");
        refused(backward(&|it| it.key = bad()), "Shape | grads.key | [3, 5] | [7, 9]");
        refused(backward(&|it| it.value = bad()), "Shape | grads.value | [3, 5] | [7, 9]");
        let features = backward(&|it| it.edge_features = Some(bad()));
        refused(features, "Shape | grads.edge_features | [6, 3] | [7, 9]");
        refused(
            backward(&|it| it.bias = Some(bad().into_dyn())),
            "MissingInput | an additive bias",
        );
        refused(backward(&|it| it.pair_weights = Some(bad())), "MissingInput | weights of pairs");
        for (at, (name, value)) in params::state(&gat).iter().enumerate() {
            let grad = backward(&|it| it.params[at] = bad().into_dyn());
            refused(grad, &format!("Shape | grads.params: {name} | {:?} | [7, 9]", value.shape()));
        }
        let fewer = backward(&|it| drop(it.params.pop()));
        refused(fewer, "Shape | number of grads.params");
        let grad_out = out.slice(s![.., 1..]);
        let expected = "Shape | grad_out | [2, 8] | [2, 7]";
        refused(gat.backward(&inputs, &saved, grad_out), expected);

        let (_, others) = Flash::new().forward_train(&inputs).unwrap();
        let expected = "SavedMismatch | edge_gat | got one saved by flash";
        refused(gat.backward(&inputs, &others, out.view()), expected);
        refused(Flash::new().backward(&inputs, &saved, arrays[0].view()), "SavedMismatch | flash");
        let single = cast::<f32>(&gat);
        let [query, key, value] = arrays.each_ref().map(|array| array.mapv(|x| x as f32));
        let features = inputs.edge_features("").unwrap().mapv(|x| x as f32);
        let inputs_f32 = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let inputs_f32 = inputs_f32.with_edge_features(features.view()).unwrap();
        let (_, others) = single.forward_train(&inputs_f32).unwrap();
        refused(gat.backward(&inputs, &others, out.view()), "SavedMismatch | f64 | f32");
    }
}

// Initial parameters.

#[test]
fn weights_are_drawn_from_the_whole_of_glorots_interval() {
    common::hold_simd();
    for score in SCORES {
        let config = EdgeGatConfig::new(score, 60, 50, 4).edge_dim(30).residual(true).gate(true);
        let of_seed = |seed| params::state(&config.init::<f64>(&mut rng(seed)).unwrap());
        let (one, two) = (of_seed(1), of_seed(2));
        assert_eq!(one, of_seed(1));
        for ((name, value), (_, other)) in one.iter().zip(&two) {
            if name.ends_with("bias") {
                assert!(value.iter().all(|&x| x == 0.0), "{name}");
                continue;
            }
            assert_ne!(value, other, "{name}");
            let [.., rows, columns] = *value.shape() else { panic!("{name}") };
            let bound = (6.0 / (rows + columns) as f64).sqrt();
            let scaled = value.mapv(|x| x / bound);
            assert!(scaled.iter().all(|x| x.abs() <= 1.0), "{name}");
            // The ends, mean and variance of a uniform distribution.
            for sign in [-1.0, 1.0] {
                assert!(scaled.iter().any(|x| x * sign > 0.9), "{name}");
            }
            let deviations = 5.0 / (value.len() as f64).sqrt();
            assert!(scaled.mean().unwrap().abs() < deviations, "{name}");
            let variance = scaled.mapv(|x| x * x).mean().unwrap();
            assert!((variance - 1.0 / 3.0).abs() < deviations, "{name}: {variance}");
        }
    }
}

// Precision and threads.

/// Returns the same parameters in another precision.
fn cast<F: Float>(gat: &EdgeGat<f64>) -> EdgeGat<F> {
    let state = params::state(gat).into_iter();
    gat.config().from_params(state.map(|(name, value)| (name, value.mapv(F::from_f64)))).unwrap()
}

/// Returns the output and all gradients, with their names.
fn arrays_of_training<F: Float>(
    gat: &EdgeGat<F>,
    inputs: &Inputs<'_, F>,
) -> Vec<(String, ArrayD<F>)> {
    let (out, saved) = gat.forward_train(inputs).unwrap();
    let grads = gat.backward(inputs, &saved, out.view()).unwrap();
    let names = params::state(gat).into_iter().map(|(name, _)| name);
    let features = grads.edge_features.unwrap();
    [("query", grads.query), ("key", grads.key), ("value", grads.value), ("features", features)]
        .map(|(name, grad)| (name.to_owned(), grad.into_dyn()))
        .into_iter()
        .chain([("out".to_owned(), out.into_dyn())])
        .chain(names.zip(grads.params))
        .collect()
}

#[test]
fn single_precision_agrees_with_double() {
    common::hold_simd();
    let mut rng = rng(6);
    let n = 200;
    let edges = (0..10 * n).map(|_| (rng.random_range(0..n), rng.random_range(0..n)));
    let graph = Graph::from_edges(n, n, edges.collect::<Vec<_>>()).unwrap();
    // Exact in both.
    let nodes = normal::<f32>(n, 10, &mut rng);
    let features = normal::<f32>(graph.num_edges(), 3, &mut rng);
    let [nodes_f64, features_f64] = [&nodes, &features].map(|array| array.mapv(f64::from));
    let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features.view()))
        .unwrap();
    let inputs_f64 = Inputs::graph(nodes_f64.view(), nodes_f64.view(), nodes_f64.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features_f64.view()))
        .unwrap();
    for score in SCORES {
        let config = EdgeGatConfig::new(score, 10, 8, 2).edge_dim(3);
        let single = config.init::<f32>(&mut rng).unwrap();
        let state = params::state(&single).into_iter();
        let state = state.map(|(name, value)| (name, value.mapv(f64::from)));
        let double = config.from_params(state).unwrap();
        let expected = arrays_of_training(&double, &inputs_f64);
        for ((name, actual), (_, expected)) in
            arrays_of_training(&single, &inputs).iter().zip(&expected)
        {
            // A constant added to all logits changes nothing, so this gradient is 0 up to rounding.
            if score == Score::DotProduct && name == "lin_key.bias" {
                let zeros = ArrayD::<f64>::zeros(expected.raw_dim());
                assert_close("in f64", 1e-9, expected, &zeros);
                assert_close("in f32", 1e-2, &actual.mapv(f64::from), &zeros);
                continue;
            }
            let what = format_args!("{score:?}, {name}");
            assert_close_in_size(what, 1e-5, 0.0, &actual.mapv(f64::from), expected);
        }
    }
}

/// Returns a query and a key of 40,000 pairs each among 40,000 more, unordered; and the same sorted, with
/// the permutation.
struct Hubs {
    nodes: Array2<f64>,
    features: Array2<f64>,
    graph: Graph,
    order: Vec<usize>,
    sorted: Graph,
}

impl Hubs {
    fn new() -> Self {
        let (mut rng, n) = (rng(7), 40_000);
        let mut edges: Vec<(usize, usize)> =
            (0..n).map(|_| (rng.random_range(0..n), rng.random_range(0..n))).collect();
        edges.extend((0..n).flat_map(|i| [(0, i), (i, 1)]));
        edges.shuffle(&mut rng);
        let mut order: Vec<usize> = (0..edges.len()).collect();
        order.sort_by_key(|&edge| edges[edge]);
        let sorted = order.iter().map(|&edge| edges[edge]).collect::<Vec<_>>();
        Self {
            nodes: normal(n, 6, &mut rng),
            features: normal(edges.len(), 3, &mut rng),
            graph: Graph::from_edges(n, n, edges).unwrap(),
            order,
            sorted: Graph::from_edges(n, n, sorted).unwrap(),
        }
    }

    fn inputs<'a>(&'a self, graph: &'a Graph, features: &'a Array2<f64>) -> Inputs<'a, f64> {
        let nodes = self.nodes.view();
        Inputs::graph(nodes, nodes, nodes, graph)
            .and_then(|inputs| inputs.with_edge_features(features.view()))
            .unwrap()
    }
}

fn of_hubs(score: Score) -> EdgeGat<f64> {
    init(&EdgeGatConfig::new(score, 6, 5, 2).edge_dim(3)).unwrap()
}

#[test]
fn the_order_of_the_edges_does_not_matter() {
    common::hold_simd();
    let hubs = Hubs::new();
    let features = hubs.features.select(Axis(0), &hubs.order);
    for score in SCORES {
        let gat = of_hubs(score);
        let mixed = arrays_of_training(&gat, &hubs.inputs(&hubs.graph, &hubs.features));
        let sorted = arrays_of_training(&gat, &hubs.inputs(&hubs.sorted, &features));
        for ((name, mixed), (_, sorted)) in mixed.iter().zip(&sorted) {
            let what = format_args!("{score:?}, {name}");
            if name == "features" {
                let mixed = mixed.select(Axis(0), &hubs.order);
                assert_close_in_size(what, 1e-10, 0.0, &mixed, sorted);
            } else if score == Score::DotProduct && name == "lin_key.bias" {
                assert_close(what, 1e-8, mixed, sorted);
            } else {
                assert_close_in_size(what, 1e-10, 0.0, mixed, sorted);
            }
        }
    }
}

/// Wherever they stand: in any vector, or after the last whole one.
#[test]
fn the_order_of_the_columns_of_a_head_does_not_matter() {
    common::hold_simd();
    let mut rng = rng(9);
    let nodes = normal(30, 6, &mut rng);
    let edges = (0..200).map(|_| (rng.random_range(0..30), rng.random_range(0..30)));
    let graph = Graph::from_edges(30, 30, edges.collect::<Vec<_>>()).unwrap();
    let features = normal(200, 3, &mut rng);
    let inputs = Inputs::self_attention(nodes.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features.view()))
        .unwrap();
    for score in [Score::Gat, Score::GatV2, Score::DotProduct, Score::Additive] {
        for (dim, heads) in [(1, 4), (7, 2), (16, 2), (20, 2), (33, 2), (48, 1)] {
            let gat = init(&EdgeGatConfig::new(score, 6, dim, heads).edge_dim(3)).unwrap();
            let of_heads = (0..heads).map(|head| (head, permutation(&mut rng, dim)));
            let order: Vec<usize> = of_heads
                .flat_map(|(head, order)| order.into_iter().map(move |c| head * dim + c))
                .collect();
            let mut permuted = gat.clone();
            permuted.visit_params_mut(&mut |_, mut param| {
                let rest = param.len() / order.len();
                let old: Vec<f64> = param.iter().copied().collect();
                let new = order.iter().flat_map(|&column| &old[column * rest..][..rest]);
                param.iter_mut().zip(new).for_each(|(param, &new)| *param = new);
            });
            let grad_out = normal(30, dim * heads, &mut rng);
            let [expected, actual] =
                [(&gat, grad_out.clone()), (&permuted, grad_out.select(Axis(1), &order))].map(
                    |(gat, grad_out)| {
                        let (out, saved) = gat.forward_train(&inputs).unwrap();
                        let grads = gat.backward(&inputs, &saved, grad_out.view()).unwrap();
                        (out, [grads.query, grads.key, grads.value, grads.edge_features.unwrap()])
                    },
                );
            let what = format_args!("{score:?}, {heads} heads of {dim}");
            assert_close_in_size(what, 1e-12, 0.0, &actual.0, &expected.0.select(Axis(1), &order));
            for (actual, expected) in actual.1.iter().zip(&expected.1) {
                assert_close_in_size(what, 1e-12, 0.0, actual, expected);
            }
        }
    }
}

#[cfg(feature = "parallel")]
#[test]
fn one_two_and_seven_threads_give_the_same_bits() {
    common::hold_simd();
    let hubs = Hubs::new();
    let inputs = hubs.inputs(&hubs.graph, &hubs.features);
    for score in SCORES {
        let gat = of_hubs(score);
        let [one, two, seven] = [1, 2, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| arrays_of_training(&gat, &inputs))
        });
        assert!(one == two, "{score:?}");
        assert!(one == seven, "{score:?}");
    }
}

// Memory.

/// The number of nodes of the graphs below.
const N: usize = 1000;
const HEADS: usize = 2;
const EDGE_DIM: usize = 3;

/// Returns the peak bytes besides inputs and outputs, in inference and in training, on a graph of this degree
/// whose edges are sorted by query or unordered.
fn peaks(score: Score, degree: usize, is_sorted: bool) -> [u64; 2] {
    let mut rng = rng(8);
    let mut edges: Vec<_> =
        (0..N * degree).map(|at| (at / degree, rng.random_range(0..N))).collect();
    if !is_sorted {
        edges.shuffle(&mut rng);
    }
    let graph = Graph::from_edges(N, N, edges).unwrap();
    // Part of the graph: computed once and kept there.
    let _ = graph.transpose();
    let config = EdgeGatConfig::new(score, 8, 16, HEADS).edge_dim(EDGE_DIM);
    let gat = config.init::<f32>(&mut rng).unwrap();
    let (nodes, features) = (normal(N, 8, &mut rng), normal(N * degree, EDGE_DIM, &mut rng));
    let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)
        .and_then(|inputs| inputs.with_edge_features(features.view()))
        .unwrap();
    let mut out = Array2::zeros((N, 16 * HEADS));
    let grad_out = Array2::ones(out.raw_dim());
    let mut grads = Gradients::zeros(&inputs, &gat).unwrap();
    let inference = on_one_thread(|| gat.forward_into(&inputs, out.view_mut()).unwrap());
    let training = on_one_thread(|| {
        let saved = gat.forward_train_into(&inputs, out.view_mut()).unwrap();
        gat.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut()).unwrap();
    });
    [inference.bytes_max, training.bytes_max]
}

/// Two numbers per head, and the signs of 16 columns in one number where they tell the derivatives; for unordered
/// edges also their index and the gradients of their features. A vector per edge would be 16 · HEADS numbers more.
#[test]
fn inference_needs_no_memory_per_edge_and_training_a_few_numbers_per_head() {
    common::hold_simd();
    for score in SCORES {
        let of_head = if matches!(score, Score::GatV2) { 3 } else { 2 };
        for (is_sorted, numbers, index) in
            [(true, of_head * HEADS, 0), (false, of_head * HEADS + EDGE_DIM, size_of::<u32>())]
        {
            let [few, many] = [64, 256].map(|degree| peaks(score, degree, is_sorted));
            assert!(many[0] < few[0] * 11 / 10, "{score:?}: {few:?} {many:?}");
            let per_edge = (many[1] - few[1]) as f64 / ((256 - 64) * N) as f64;
            let allowed = numbers * size_of::<f32>() + index + 1;
            assert!(per_edge < allowed as f64, "{score:?}: {per_edge} bytes, {is_sorted}");
        }
    }
}

/// The arrays of a saved state mean something else in another configuration, even if their shapes are the
/// same.
#[test]
fn the_state_of_another_configuration_is_refused() {
    common::hold_simd();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let x = Array2::<f64>::ones((4, 5));
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let config = |score, dim, heads| EdgeGatConfig::new(score, 5, dim, heads);
    let configs = [
        config(Score::Gat, 4, 2),
        config(Score::GatV2, 4, 2),
        config(Score::GatV2, 2, 4),
        config(Score::DotProduct, 4, 2),
        config(Score::DotProduct, 4, 2).residual(false),
    ];
    for (i, a) in configs.iter().enumerate() {
        let (out, saved) = a.init(&mut rng).unwrap().forward_train(&inputs).unwrap();
        for (j, b) in configs.iter().enumerate() {
            let result = b.init::<f64>(&mut rng).unwrap().backward(&inputs, &saved, out.view());
            assert_eq!(result.is_ok(), i == j, "{a:?}, {b:?}");
        }
    }
}

#[test]
fn a_slope_that_is_only_finite_in_f64_is_refused_in_f32() {
    common::hold_simd();
    let config = EdgeGatConfig::new(Score::Gat, 2, 2, 1).negative_slope(1e300);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    assert!(config.init::<f64>(&mut rng).is_ok());
    let error = config.init::<f32>(&mut rng).unwrap_err().to_string();
    assert!(error.contains("negative_slope") && error.contains("1000000"), "{error}");
}

#[test]
fn additive_attention_by_hand() {
    common::hold_simd();
    for (dim, heads, edge_dim) in [(3, 2, 0), (19, 1, 2), (5, 3, 1)] {
        let config = EdgeGatConfig::new(Score::Additive, 4, dim, heads).edge_dim(edge_dim);
        let gat = config.init::<f64>(&mut rng(3)).unwrap();
        let rng = &mut rng(4);
        let [q, k]: [Array2<f64>; 2] = [3, 6].map(|rows| 3.0 * normal(rows, 4, rng));
        let x: Array2<f64> = normal(18, edge_dim, rng);
        let inputs = Inputs::dense(q.view(), k.view(), k.view()).unwrap();
        let inputs = inputs.with_edge_features(x.view()).unwrap();
        let param = |name: &str| params::get(&gat, name).unwrap();
        let matrix = |name: &str| param(name).into_dimensionality::<Ix2>().unwrap();
        let project = |x: &Array2<f64>, side: &str| {
            let bias = param(&format!("lin_{side}.bias")).into_dimensionality::<Ix1>().unwrap();
            x.dot(&matrix(&format!("lin_{side}.weight")).t()) + bias
        };
        let (of_query, of_key) = (project(&q, "r"), project(&k, "l"));
        let of_edge = if edge_dim > 0 {
            x.dot(&matrix("lin_edge.weight").t())
        } else {
            Array2::zeros((18, dim * heads))
        };
        let attention = param("att");
        let mut weights = Array2::zeros((18, heads));
        for ((pair, head), weight) in weights.indexed_iter_mut() {
            let (query, key) = (pair / 6, pair % 6);
            for c in 0..dim {
                let at = head * dim + c;
                let sum = of_query[[query, at]] + of_key[[key, at]] + of_edge[[pair, at]];
                *weight += attention[[0, head, c]] * sum.tanh();
            }
        }
        weights.mapv_inplace(f64::exp);
        for query in 0..3 {
            let mut rows = weights.slice_mut(s![6 * query..6 * (query + 1), ..]);
            let sums = rows.sum_axis(Axis(0));
            rows /= &sums;
        }
        let actual = gat.attention_weights(&inputs).unwrap();
        assert_close(format_args!("{dim} x {heads}"), 1e-14, &actual, &weights);
    }
}

#[test]
fn nan_in_a_key_that_a_bias_hides_from_one_head_stays_in_the_others() {
    common::hold_simd();
    for score in [Score::Gat, Score::GatV2, Score::DotProduct, Score::Additive] {
        let layer = EdgeGatConfig::new(score, 2, 3, 2).init::<f64>(&mut rng(5)).unwrap();
        let query = array![[0.5, -0.3]];
        let key = array![[0.1, 0.9], [f64::NAN, 0.4], [-0.7, 0.2]];
        let graph = Graph::from_edges(1, 3, [(0, 0), (0, 1), (0, 2)]).unwrap();
        let bias = array![[0.0, 0.3], [f64::NEG_INFINITY, 0.1], [0.2, 0.0]];
        let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph).unwrap();
        let inputs = inputs.with_bias(bias.view()).unwrap();
        let (out, saved) = layer.forward_train(&inputs).unwrap();
        let is_nan: Vec<bool> = out.iter().map(|x| x.is_nan()).collect();
        assert_eq!(is_nan, [false, false, false, true, true, true], "{score:?}");
        let grad_out = array![[1.0, -2.0, 0.5, 1.0, 1.0, 1.0]];
        let grads = layer.backward(&inputs, &saved, grad_out.view()).unwrap();
        let of_bias = grads.bias.unwrap();
        for pair in 0..3 {
            let expected = if pair == 1 { 0.0 } else { of_bias[[pair, 0]] };
            assert!(of_bias[[pair, 0]].is_finite() && of_bias[[pair, 0]] == expected, "{score:?}");
            assert!(of_bias[[pair, 1]].is_nan(), "{score:?}");
        }
    }
}

#[test]
fn nan_in_the_gradient_of_an_output_does_not_reach_keys_that_a_bias_hides() {
    common::hold_simd();
    for score in [Score::Gat, Score::GatV2, Score::DotProduct, Score::Additive] {
        let layer = EdgeGatConfig::new(score, 2, 3, 2).init::<f64>(&mut rng(5)).unwrap();
        let query = array![[0.5, -0.3]];
        let key = array![[0.1, 0.9], [0.6, 0.4], [-0.7, 0.2]];
        let graph = Graph::from_edges(1, 3, [(0, 0), (0, 1), (0, 2)]).unwrap();
        let bias = array![[0.0, 0.3], [f64::NEG_INFINITY, 0.1], [0.2, 0.0]];
        let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph).unwrap();
        let inputs = inputs.with_bias(bias.view()).unwrap();
        let (_, saved) = layer.forward_train(&inputs).unwrap();
        let grad_out = array![[f64::NAN, -2.0, 0.5, 1.0, -1.0, 1.0]];
        let grads = layer.backward(&inputs, &saved, grad_out.view()).unwrap();
        let of_bias = grads.bias.unwrap();
        for pair in 0..3 {
            let of_first = of_bias[[pair, 0]];
            assert!(if pair == 1 { of_first == 0.0 } else { of_first.is_nan() }, "{score:?}");
            assert!(of_bias[[pair, 1]].is_finite(), "{score:?}");
        }
    }
}

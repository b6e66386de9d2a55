//! Tests of what is special to a mixture of experts: selection of queries, routing and balancing. The laws
//! of every mechanism are in `conformance`.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use common::close::{assert_close, assert_close_in_size};
use common::random::{matrix, rng};
use common::refused;
use graph_attention::ndarray::{
    Array, Array1, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis,
    Dimension, array, s,
};
use graph_attention::testing::{Shapes, check_gradients};
use graph_attention::{
    Attention, Causal, Dropout, EdgeGatConfig, Error, Flash, Float, Gradients, GradientsMut, Graph,
    Inputs, Moe, MoeConfig, MultiHeadConfig, Pair, Params, PerformerConfig, PoincareConfig, Result,
    Saved, ScaledDotProduct,
    edge_gat::Score,
    moe::{Gating, Priority, Routing},
    params,
    poincare::Coordinates,
};
use rand::RngExt;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

type Expert = Box<dyn Attention<f64>>;

/// Asserts that two computations in `f64` in different order agree.
#[track_caller]
fn close<D: Dimension>(what: impl Display, actual: &Array<f64, D>, expected: &Array<f64, D>) {
    assert_close_in_size(what, 1e-12, 1.0, actual, expected);
}

#[track_caller]
fn close_gradients(what: &str, actual: &Gradients<f64>, expected: &Gradients<f64>) {
    close(format_args!("{what}, query"), &actual.query, &expected.query);
    close(format_args!("{what}, key"), &actual.key, &expected.key);
    close(format_args!("{what}, value"), &actual.value, &expected.value);
    for (name, actual, expected) in [
        ("bias", dynamic(&actual.bias), dynamic(&expected.bias)),
        ("edge features", dynamic(&actual.edge_features), dynamic(&expected.edge_features)),
        ("distances", dynamic(&actual.distances), dynamic(&expected.distances)),
    ] {
        assert_eq!(actual.is_some(), expected.is_some(), "{what}, {name}");
        if let (Some(actual), Some(expected)) = (actual, expected) {
            close(format_args!("{what}, {name}"), &actual, &expected);
        }
    }
}

fn dynamic<D: Dimension>(array: &Option<Array<f64, D>>) -> Option<ArrayD<f64>> {
    array.as_ref().map(|array| array.clone().into_dyn())
}

/// A mechanism that reads every channel:
/// o_i = q_i + Σ_j m_ij s_ij v_j + Σ_{j latent} v_j, s = (1 + layer) · distance + Σ features + bias
/// + positions of query · key.
#[derive(Debug)]
struct ReadsAll;

impl ReadsAll {
    fn for_each_pair(
        inputs: &Inputs<'_, f64>,
        mut visit: impl FnMut(Pair, f64, f64, f64),
    ) -> Result<()> {
        let (features, distances) = (inputs.edge_features("all")?, inputs.distances("all")?);
        let (layers, (query, key)) = (inputs.edge_layers("all")?, inputs.positions("all")?);
        for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
            let logit = inputs.bias().map_or(0.0, |bias| bias.at(pair, 0));
            if logit == f64::NEG_INFINITY {
                continue;
            }
            let slope = 1.0 + f64::from(layers[pair.index]);
            let score = slope * distances[pair.index]
                + features.row(pair.index).sum()
                + logit
                + query.row(pair.query).dot(&key.row(pair.key));
            visit(pair, inputs.dropout_multiplier(pair, 0), score, slope);
        }
        Ok(())
    }
}

impl Params<f64> for ReadsAll {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
}

impl Attention<f64> for ReadsAll {
    fn name(&self) -> &'static str {
        "reads_all"
    }
    fn output_dim(&self, inputs: &Inputs<'_, f64>) -> usize {
        inputs.value().ncols()
    }
    fn forward_into(
        &self,
        inputs: &Inputs<'_, f64>,
        mut out: ArrayViewMut2<'_, f64>,
    ) -> Result<()> {
        out.assign(&inputs.query());
        Self::for_each_pair(inputs, |pair, multiplier, score, _| {
            let value = inputs.value();
            out.row_mut(pair.query).scaled_add(multiplier * score, &value.row(pair.key));
        })?;
        let latent = inputs.latent("all")?;
        for query in 0..inputs.num_queries() {
            for (key, _) in latent.row(query) {
                out.row_mut(query).scaled_add(1.0, &inputs.value().row(key));
            }
        }
        Ok(())
    }
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, f64>,
        out: ArrayViewMut2<'_, f64>,
    ) -> Result<Saved> {
        self.forward_into(inputs, out)?;
        Ok(Saved::new("reads_all", ()))
    }
    fn backward_into(
        &self,
        inputs: &Inputs<'_, f64>,
        saved: &Saved,
        grad_out: ArrayView2<'_, f64>,
        mut grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        saved.state::<()>("reads_all")?;
        grads.check("reads_all", inputs, self)?;
        if let Some(query) = &mut grads.query {
            *query += &grad_out;
        }
        let mut grad_value = grads.value.expect("asked for");
        for query in 0..inputs.num_queries() {
            for (key, _) in inputs.latent("all")?.row(query) {
                grad_value.row_mut(key).scaled_add(1.0, &grad_out.row(query));
            }
        }
        Self::for_each_pair(inputs, |pair, multiplier, score, slope| {
            let grad = grad_out.row(pair.query);
            grad_value.row_mut(pair.key).scaled_add(multiplier * score, &grad);
            let grad_score = multiplier * grad.dot(&inputs.value().row(pair.key));
            if let Some(grads) = &mut grads.distances {
                grads[pair.index] += slope * grad_score;
            }
            let (query, key) = inputs.positions("all").expect("they have been read");
            if let Some(grads) = &mut grads.query_positions {
                grads.row_mut(pair.query).scaled_add(grad_score, &key.row(pair.key));
            }
            if let Some(grads) = &mut grads.key_positions {
                grads.row_mut(pair.key).scaled_add(grad_score, &query.row(pair.query));
            }
            if let Some(grads) = &mut grads.edge_features {
                grads.row_mut(pair.index).map_inplace(|grad| *grad += grad_score);
            }
            if let (Some(grads), Some(bias)) = (&mut grads.bias, inputs.bias()) {
                grads[bias.slot(pair, 0)] += grad_score;
            }
        })
    }
}

/// Arrays for every channel.
struct Data {
    graph: Graph,
    latent: Graph,
    query: Array2<f64>,
    key: Array2<f64>,
    value: Array2<f64>,
    mask: Array2<bool>,
    /// num_queries × num_keys, and one row per pair.
    bias: [Array2<f64>; 2],
    edge_bias: Array2<f64>,
    features: Array2<f64>,
    layers: Vec<u8>,
    positions: [Array2<f64>; 2],
}

const QUERIES: usize = 23;
const KEYS: usize = 19;
const COLUMNS: usize = 6;

impl Data {
    fn new() -> Self {
        let mut rng = rng(1);
        let mut edges = |count: usize| {
            let mut edge = |_| (rng.random_range(0..QUERIES), rng.random_range(0..KEYS));
            (0..count).map(&mut edge).collect::<Vec<_>>()
        };
        let (graph, latent) = (edges(131), edges(41));
        let pairs = QUERIES * KEYS;
        let hidden = matrix(QUERIES, KEYS, 3);
        Self {
            graph: Graph::from_edges(QUERIES, KEYS, graph).unwrap(),
            latent: Graph::from_edges(QUERIES, KEYS, latent).unwrap(),
            query: 0.5 * matrix(QUERIES, COLUMNS, 4),
            key: 0.5 * matrix(KEYS, COLUMNS, 5),
            value: 0.5 * matrix(KEYS, COLUMNS, 6),
            mask: hidden.mapv(|x| x < 0.7),
            bias: [matrix(QUERIES, KEYS, 7), matrix(pairs, 2, 8)],
            edge_bias: matrix(131, 1, 9),
            features: 0.1 * matrix(pairs, 3, 10),
            layers: (0..pairs).map(|pair| (pair % 5) as u8).collect(),
            positions: [matrix(QUERIES, 2, 11), matrix(KEYS, 2, 12)],
        }
    }

    /// Returns dense inputs and a graph, with all data channels.
    fn all_data(&self) -> [Inputs<'_, f64>; 2] {
        let (query, key, value) = (self.query.view(), self.key.view(), self.value.view());
        [
            Inputs::dense(query, key, value).unwrap(),
            Inputs::graph(query, key, value, &self.graph).unwrap(),
        ]
        .map(|inputs| {
            let pairs = inputs.num_pairs();
            inputs
                .with_edge_features(self.features.slice(s![..pairs, ..]))
                .and_then(|inputs| inputs.with_distances(self.features.slice(s![..pairs, 1])))
                .and_then(|inputs| inputs.with_edge_layers(&self.layers[..pairs]))
                .and_then(|inputs| {
                    inputs.with_positions(self.positions[0].view(), self.positions[1].view())
                })
                .and_then(|inputs| inputs.with_latent(&self.latent))
                .unwrap()
        })
    }

    /// Returns inputs with each channel that changes the result, one at a time.
    fn inputs(&self) -> Vec<Inputs<'_, f64>> {
        let [dense, graph] = self.all_data();
        let dropout = Dropout { probability: 0.3, seed: 5 };
        vec![
            dense,
            dense.with_heads(2).unwrap().with_bias(self.bias[1].view()).unwrap(),
            dense.with_causal(),
            dense.with_causal_alignment(Causal::BottomRight).with_dropout(dropout).unwrap(),
            dense.with_mask(self.mask.view()).unwrap().with_causal(),
            dense.with_bias(self.bias[0].view()).unwrap().with_dropout(dropout).unwrap(),
            graph,
            graph.with_heads(2).unwrap().with_dropout(dropout).unwrap(),
            graph
                .with_bias(self.edge_bias.view())
                .unwrap()
                .with_causal_alignment(Causal::BottomRight),
            graph.with_mask(self.mask.view()).unwrap().with_causal().with_dropout(dropout).unwrap(),
        ]
    }
}

fn readers() -> Vec<Expert> {
    let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent);
    let gat = EdgeGatConfig::new(Score::GatV2, COLUMNS, 3, 2).edge_dim(3).init(&mut rng(13));
    vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        // Blocks of queries that are cut by the causal pattern in several ways.
        Box::new(Flash::new().with_tiles(5, 4).unwrap()),
        Box::new(poincare.init().unwrap()),
        Box::new(gat.unwrap()),
        Box::new(ReadsAll),
    ]
}

/// Returns whether a mechanism takes the inputs.
fn takes(attention: &dyn Attention<f64>, inputs: &Inputs<'_, f64>) -> bool {
    let refuses = inputs.num_heads() > 1 || inputs.bias().is_some();
    match attention.name() {
        "edge_gat" => !refuses,
        "reads_all" => inputs.num_heads() == 1,
        _ => true,
    }
}

#[test]
fn selected_queries_get_the_answers_that_they_get_among_all() {
    let data = Data::new();
    // Many, with consecutive ones; few; one; none.
    let selections: [&[usize]; 4] =
        [&[0, 1, 2, 5, 7, 8, 9, 11, 15, 16, 17, 18, 22], &[3, 21], &[6], &[]];
    for (case, inputs) in data.inputs().into_iter().enumerate() {
        for attention in readers().iter().filter(|attention| takes(&**attention, &inputs)) {
            let all = attention.forward(&inputs).unwrap();
            for queries in selections {
                let what = format!("{}, inputs {case}, {queries:?}", attention.name());
                let selected = inputs.select_queries(queries).unwrap();
                assert_eq!(selected.queries(), queries);
                let (out, saved) = attention.forward_train(&selected.inputs()).unwrap();
                close(&what, &out, &all.select(Axis(0), queries));

                // The gradients from only these queries, added to existing ones.
                let grad_out = matrix(queries.len(), COLUMNS, 14);
                let mut grads = Gradients::zeros(&inputs, attention).unwrap();
                grads.query.fill(1.0);
                let backward = |inputs: &Inputs<'_, f64>, grads: GradientsMut<'_, f64>| {
                    attention.backward_into(inputs, &saved, grad_out.view(), grads)
                };
                selected.backward(grads.view_mut(), backward).unwrap();
                grads.query -= 1.0;
                let mut grad_all = Array2::zeros((QUERIES, COLUMNS));
                for (&query, row) in queries.iter().zip(grad_out.rows()) {
                    grad_all.row_mut(query).assign(&row);
                }
                let (_, saved) = attention.forward_train(&inputs).unwrap();
                let expected = attention.backward(&inputs, &saved, grad_all.view()).unwrap();
                close_gradients(&what, &grads, &expected);
            }
            // A selection from a selection.
            let some = inputs.select_queries(selections[0]).unwrap();
            let some = some.inputs();
            let fewer = some.select_queries(&[0, 2, 3, 4, 7, 8, 9, 10, 12]).unwrap();
            let out = attention.forward(&fewer.inputs()).unwrap();
            let what = format!("{}, inputs {case}, some of some", attention.name());
            close(what, &out, &all.select(Axis(0), &[0, 2, 5, 7, 11, 15, 16, 17, 22]));
        }
    }
}

#[test]
fn rows_that_lie_apart_are_gathered_and_scattered_all_the_same() {
    let data = Data::new();
    let inputs = data.all_data()[1];
    let queries = [0, 1, 2, 7, 9, 10, 22];
    let grad_out = matrix(queries.len(), COLUMNS, 31);
    let train = |inputs: &Inputs<'_, f64>, grads: GradientsMut<'_, f64>| {
        let selected = inputs.select_queries(&queries).unwrap();
        let (out, saved) = ReadsAll.forward_train(&selected.inputs()).unwrap();
        let backward = |inputs: &Inputs<'_, f64>, grads: GradientsMut<'_, f64>| {
            ReadsAll.backward_into(inputs, &saved, grad_out.view(), grads)
        };
        selected.backward(grads, backward).unwrap();
        out
    };
    let mut expected_grads = Gradients::zeros(&inputs, &ReadsAll).unwrap();
    let expected = train(&inputs, expected_grads.view_mut());

    // Every other column of larger arrays, for data and gradients.
    let spread = |array: ArrayView2<'_, f64>| {
        let mut spread = Array2::from_elem((array.nrows(), 2 * array.ncols()), 7.0);
        spread.slice_mut(s![.., ..;2]).assign(&array);
        spread
    };
    let query = spread(data.query.view());
    let features = spread(inputs.edge_features("all").unwrap());
    let apart = inputs
        .with_arrays(query.slice(s![.., ..;2]), data.key.view(), data.value.view())
        .and_then(|inputs| inputs.with_edge_features(features.slice(s![.., ..;2])))
        .unwrap();
    let mut grads = Gradients::zeros(&inputs, &ReadsAll).unwrap();
    let mut of_query = spread(grads.query.view());
    let mut of_features = spread(grads.edge_features.as_ref().unwrap().view());
    let mut lent = grads.view_mut();
    lent.query = Some(of_query.slice_mut(s![.., ..;2]));
    lent.edge_features = Some(of_features.slice_mut(s![.., ..;2]));
    assert_eq!(train(&apart, lent), expected);
    assert_eq!(of_query, spread(expected_grads.query.view()));
    assert_eq!(of_features, spread(expected_grads.edge_features.unwrap().view()));
    assert_eq!(grads.value, expected_grads.value);
}

#[test]
fn selections_are_checked() {
    let data = Data::new();
    let [dense, graph] = data.all_data();
    for inputs in [dense, graph] {
        for queries in [[0, 23], [4, 2], [4, 4]] {
            let words = format!("below 23, in ascending order | got {} at position 1", queries[1]);
            let words = format!("InvalidArgument | queries | {words}");
            refused(inputs.select_queries(&queries), &words);
        }
        let selected = inputs.select_queries(&[1, 2]).unwrap();
        let mut wrong = Gradients::zeros(&selected.inputs(), &Flash::new()).unwrap();
        let nothing = |_: &Inputs<'_, f64>, _: GradientsMut<'_, f64>| Ok(());
        let words = "Shape | grads.query | [23, 6] | [2, 6]";
        refused(selected.backward(wrong.view_mut(), nothing), words);
    }
}

/// Computes softmax attention of one head over all keys, naively.
fn softmax_attention(
    scale: f64,
    q: ArrayView2<f64>,
    k: ArrayView2<f64>,
    v: ArrayView2<f64>,
) -> Array2<f64> {
    let mut weights = (scale * q.dot(&k.t())).mapv(f64::exp);
    for mut row in weights.rows_mut() {
        let sum = row.sum();
        row /= sum;
    }
    weights.dot(&v)
}

fn scaled(scale: f64) -> Expert {
    Box::new(Flash::new().with_scale(scale).unwrap())
}

const SCALES: [f64; 4] = [0.9, -0.4, 0.1, 2.0];

fn flashes() -> Vec<Expert> {
    SCALES.map(scaled).into()
}

fn moe(config: MoeConfig, experts: Vec<Expert>) -> Moe<f64> {
    let mut moe = config.init(experts, &mut rng(15)).unwrap();
    // A new router's bias is zero; set others, so that mistakes show.
    moe.visit_params_mut(&mut |name, mut param| {
        if name == "router.bias" {
            param.iter_mut().zip(matrix(1, 9, 16).iter()).for_each(|(bias, &x)| *bias = 0.3 * x);
        }
    });
    moe
}

fn param(moe: &Moe<f64>, name: &str) -> ArrayD<f64> {
    params::state(moe).into_iter().find(|(known, _)| known == name).unwrap().1
}

#[test]
fn a_mixture_is_the_weighted_sum_of_what_its_experts_say() {
    let data = Data::new();
    let (q, k, v) = (data.query.view(), data.key.view(), data.value.view());
    let inputs = Inputs::dense(q, k, v).unwrap().with_heads(2).unwrap();
    let expert_bias = array![0.0, 0.4, -0.2, 0.1];
    for chosen in 1..=4 {
        for renormalize in [true, false] {
            let config = MoeConfig::new(COLUMNS, chosen).renormalize(renormalize);
            let mut moe = moe(config, flashes());
            moe.set_expert_bias(expert_bias.clone()).unwrap();
            let router: Array2<f64> = param(&moe, "router.weight").into_dimensionality().unwrap();
            let bias: Array1<f64> = param(&moe, "router.bias").into_dimensionality().unwrap();

            let mut expected = Array2::zeros((QUERIES, COLUMNS));
            let mut ranked = Vec::new();
            for (i, mut out) in expected.rows_mut().into_iter().enumerate() {
                let p = (router.dot(&q.row(i)) + &bias).mapv(f64::exp);
                let p = &p / p.sum();
                let mut order = [0, 1, 2, 3];
                order.sort_by(|&a, &b| (p[b] + expert_bias[b]).total_cmp(&(p[a] + expert_bias[a])));
                let order = &order[..chosen];
                let sum: f64 = order.iter().map(|&e| p[e]).sum();
                for &e in order {
                    let weight = if renormalize { p[e] / sum } else { p[e] };
                    for columns in [0..3, 3..6] {
                        let head =
                            |x: &ArrayView2<f64>| x.slice(s![.., columns.clone()]).to_owned();
                        let (k, v) = (head(&k), head(&v));
                        let q = q.slice(s![i..=i, columns.clone()]);
                        let answer = softmax_attention(SCALES[e], q, k.view(), v.view());
                        out.slice_mut(s![columns]).scaled_add(weight, &answer.row(0));
                    }
                }
                ranked.extend_from_slice(order);
            }
            let what = format_args!("{chosen} chosen, renormalize {renormalize}");
            close(what, &moe.forward(&inputs).unwrap(), &expected);
            let routing = moe.route(&inputs).unwrap();
            assert_eq!(routing.experts().iter().copied().collect::<Vec<_>>(), ranked);
        }
    }
}

#[test]
fn a_mixture_of_one_or_of_the_same_is_that_expert() {
    let data = Data::new();
    for (case, inputs) in data.inputs().into_iter().enumerate() {
        for number in 0..readers().len() {
            let expert = || readers().swap_remove(number);
            if !takes(&*expert(), &inputs) {
                continue;
            }
            let (expected, saved) = expert().forward_train(&inputs).unwrap();
            let grad_out = matrix(QUERIES, COLUMNS, 17);
            let expected_grads = expert().backward(&inputs, &saved, grad_out.view()).unwrap();
            for (count, k) in [(1, 1), (3, 1), (5, 3), (3, 3)] {
                let experts = (0..count).map(|_| expert()).collect();
                let mixture = moe(MoeConfig::new(COLUMNS, k), experts);
                let (out, saved) = mixture.forward_train(&inputs).unwrap();
                let what = format!("{}, inputs {case}, {k} of {count}", expert().name());
                close(&what, &out, &expected);
                let grads = mixture.backward(&inputs, &saved, grad_out.view()).unwrap();
                // All experts output the same, so the router has no gradient.
                close_gradients(&what, &grads, &expected_grads);
                for grad in &grads.params[..2] {
                    assert_close(&what, 1e-11, grad, &ArrayD::zeros(grad.raw_dim()));
                }
                if count == 1 {
                    assert_eq!(out, expected);
                    assert_eq!(grads.key, expected_grads.key);
                }
            }
        }
    }
}

#[test]
fn a_permutation_of_the_experts_permutes_nothing_else() {
    let data = Data::new();
    let inputs = data.all_data()[1];
    let order = [2, 0, 3, 1];
    let one = moe(MoeConfig::new(COLUMNS, 2), flashes());
    let state = ["router.weight", "router.bias", "router.expert_bias"]
        .map(|name| (name, param(&one, name).select(Axis(0), &order)));
    let experts = order.map(|expert| scaled(SCALES[expert])).into();
    let other = MoeConfig::new(COLUMNS, 2).from_params(experts, state).unwrap();
    close("out", &other.forward(&inputs).unwrap(), &one.forward(&inputs).unwrap());
    let [one, other] = [&one, &other].map(|moe| moe.route(&inputs).unwrap());
    for (new, &old) in order.iter().enumerate() {
        assert_eq!(other.queries(new), one.queries(old));
    }
}

/// The calls of an expert, with the number of queries forward and backward.
type Calls = Arc<Mutex<Vec<(&'static str, usize)>>>;

#[derive(Debug)]
struct Counted(Calls, Flash);

impl Params<f64> for Counted {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
}

impl Attention<f64> for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }
    fn output_dim(&self, inputs: &Inputs<'_, f64>) -> usize {
        self.1.output_dim(inputs)
    }
    fn forward_into(&self, inputs: &Inputs<'_, f64>, out: ArrayViewMut2<'_, f64>) -> Result<()> {
        self.0.lock().unwrap().push(("forward", inputs.num_queries()));
        self.1.forward_into(inputs, out)
    }
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, f64>,
        out: ArrayViewMut2<'_, f64>,
    ) -> Result<Saved> {
        self.0.lock().unwrap().push(("train", inputs.num_queries()));
        self.1.forward_train_into(inputs, out)
    }
    fn backward_into(
        &self,
        inputs: &Inputs<'_, f64>,
        saved: &Saved,
        grad_out: ArrayView2<'_, f64>,
        grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        self.0.lock().unwrap().push(("backward", inputs.num_queries()));
        self.1.backward_into(inputs, saved, grad_out, grads)
    }
}

#[test]
fn an_expert_runs_once_on_its_own_queries_or_not_at_all() {
    let data = Data::new();
    let inputs = data.all_data()[0];
    let calls: [Calls; 4] = Default::default();
    let counted = |calls: &Calls| Box::new(Counted(calls.clone(), Flash::new())) as Expert;
    let mut moe = moe(MoeConfig::new(COLUMNS, 2), calls.iter().map(counted).collect());
    // No query chooses expert 1.
    moe.set_expert_bias(array![0.0, -2.0, 0.0, 0.0]).unwrap();
    let counts = [0, 1, 2, 3].map(|e| moe.route(&inputs).unwrap().queries(e).len());
    assert_eq!((counts[1], counts.iter().sum::<usize>()), (0, 2 * QUERIES));
    assert!(calls.iter().all(|calls| calls.lock().unwrap().is_empty()));

    moe.forward(&inputs).unwrap();
    let (out, saved) = moe.forward_train(&inputs).unwrap();
    moe.backward(&inputs, &saved, out.view()).unwrap();
    for (calls, count) in calls.iter().zip(counts) {
        let expected = match count {
            0 => vec![],
            count => vec![("forward", count), ("train", count), ("backward", count)],
        };
        assert_eq!(*calls.lock().unwrap(), expected);
    }
}

/// Creates a mixture whose router has no weights: its logits are the bias.
fn with_logits(config: MoeConfig, experts: Vec<Expert>, logits: &[f64]) -> Moe<f64> {
    let mut moe = config.init(experts, &mut rng(30)).unwrap();
    moe.visit_params_mut(&mut |name, mut param| match name {
        "router.weight" => param.fill(0.0),
        "router.bias" => param.assign(&Array1::from(logits.to_vec())),
        _ => {}
    });
    moe
}

#[test]
fn ties_and_nan_go_to_the_lower_numbers() {
    let data = Data::new();
    let inputs = data.all_data()[0];
    for (logits, expected) in [
        ([0.0, 0.0, 0.0, 0.0], [0, 1]),
        ([0.5, 1.0, 0.5, 1.0], [1, 3]),
        ([0.5, 1.0, 0.5, 0.5], [1, 0]),
        ([0.0, f64::NAN, 0.0, 9.0], [0, 1]),
        // NaN is not chosen, and not compared with.
        ([0.0, 0.0, f64::NAN, 9.0], [0, 1]),
        ([0.0, 1.0, 0.0, f64::INFINITY], [0, 1]),
        ([f64::NEG_INFINITY, 0.0, -1e4, -1e3], [1, 3]),
    ] {
        let moe = with_logits(MoeConfig::new(COLUMNS, 2), flashes(), &logits);
        let routing = moe.route(&inputs).unwrap();
        assert_eq!(routing.experts().row(4).to_vec(), expected);
        let out = moe.forward(&inputs).unwrap();
        let is_number = logits.iter().all(|&z| z < f64::INFINITY);
        let expected = |x: &f64| if is_number { x.is_finite() } else { x.is_nan() };
        assert!(out.iter().all(expected), "{logits:?}");
    }
    // Chosen for their bias, with probabilities that underflow.
    let mut moe = with_logits(MoeConfig::new(COLUMNS, 2), flashes(), &[0.0, -800.0, -800.0, 0.0]);
    moe.set_expert_bias(array![0.0, 2.0, 2.0, 0.0]).unwrap();
    let routing = moe.route(&inputs).unwrap();
    assert_eq!(routing.weights().row(0).to_vec(), [0.5, 0.5]);
}

#[test]
fn query_by_query_a_full_expert_drops_those_who_come_later() {
    let data = Data::new();
    let (q, k, v) = (data.query.view(), data.key.view(), data.value.view());
    let inputs = Inputs::dense(q, k, v).unwrap().with_causal();
    // ⌈0.5 · 2 · 23 / 4⌉ = 6.
    let config = MoeConfig::new(COLUMNS, 2).priority(Priority::Query);
    let free = moe(config.clone(), flashes());
    let limited = moe(config.clone().capacity_factor(0.5), flashes());
    let (all, routing) = (free.route(&inputs).unwrap(), limited.route(&inputs).unwrap());
    assert_eq!((all.experts(), all.weights()), (routing.experts(), routing.weights()));
    let mut dropped = 0;
    for expert in 0..4 {
        let wanted = all.queries(expert);
        assert_eq!(routing.queries(expert), &wanted[..wanted.len().min(6)]);
        dropped += wanted.len().saturating_sub(6);
    }
    assert_eq!((all.num_dropped(), routing.num_dropped()), (0, dropped));
    assert_eq!(all.shares(), routing.shares());
    assert!(dropped > 10);

    // Dropped choices are missing; the others keep their weights.
    let out = limited.forward(&inputs).unwrap();
    let answers = SCALES.map(|scale| scaled(scale).forward(&inputs).unwrap());
    for query in 0..QUERIES {
        let mut expected = Array1::zeros(COLUMNS);
        for (&expert, &weight) in all.experts().row(query).iter().zip(all.weights().row(query)) {
            if routing.queries(expert).contains(&query) {
                expected.scaled_add(weight, &answers[expert].row(query));
            }
        }
        let what = format_args!("query {query}");
        assert_close_in_size(what, 1e-12, 1.0, &out.row(query), &expected);
    }
    // Changed later queries, in the same number, make no difference.
    let mut changed = data.query.clone();
    changed.slice_mut(s![12.., ..]).mapv_inplace(|x| 3.0 - x);
    let changed = inputs.with_arrays(changed.view(), k, v).unwrap();
    let changed = limited.forward(&changed).unwrap();
    assert_eq!(changed.slice(s![..12, ..]), out.slice(s![..12, ..]));

    for renormalize in [true, false] {
        for priority in [Priority::Rank, Priority::Gate, Priority::Query] {
            let config = config.clone().capacity_factor(0.3).renormalize(renormalize);
            let mut limited = moe(config.priority(priority).capacity(3), flashes());
            check_gradients(&mut limited, &Shapes::new(6, 6, 6)).unwrap();
        }
    }
}

/// Routes by the logits of n queries among N experts.
fn routed(config: &MoeConfig, logits: &Array2<f64>) -> Routing<f64> {
    Routing::from_logits(config, logits.clone(), None).unwrap()
}

#[test]
fn first_choices_are_served_before_second_ones() {
    // Expert 0 is the second choice of three queries, with gate 0.27, and the first of one, with 0.99.
    let queries = array![[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 0.0]];
    let inputs = Inputs::dense(queries.view(), queries.view(), queries.view()).unwrap();
    let config = MoeConfig::new(2, 2).capacity_factor(0.75);
    let eye = [
        ("router.weight", Array2::eye(2).into_dyn()),
        ("router.bias", ArrayD::zeros(vec![2])),
        ("router.expert_bias", ArrayD::zeros(vec![2])),
    ];
    let moe = |config: &MoeConfig| -> Moe<f64> {
        config.from_params(vec![scaled(1.0), scaled(2.0)], eye.clone()).unwrap()
    };
    let served = |config: MoeConfig| {
        let routing = moe(&config).route(&inputs).unwrap();
        assert_eq!(routing.num_dropped(), 2);
        [routing.queries(0).to_vec(), routing.queries(1).to_vec()]
    };
    assert_eq!(served(config.clone()), [[0, 1, 3], [0, 1, 2]]);
    assert_eq!(served(config.clone().priority(Priority::Gate)), [[0, 1, 3], [0, 1, 2]]);
    assert_eq!(served(config.clone().priority(Priority::Query)), [[0, 1, 2], [0, 1, 2]]);
    // The same limit as an absolute number, and as the lower of two.
    let absolute = MoeConfig::new(2, 2).capacity(3);
    assert_eq!(served(absolute.clone()), served(config.clone()));
    assert_eq!(served(absolute.capacity_factor(9.0)), served(config.clone()));
    assert_eq!(served(config.clone().capacity(9)), served(config));
}

#[test]
fn the_order_of_queries_matters_only_where_it_is_said() {
    let (n, num_experts, k) = (40, 4, 3);
    let logits = 2.0 * matrix(n, num_experts, 40);
    let order: Vec<usize> = (0..n).rev().collect();
    let config = MoeConfig::new(6, k).capacity(13);
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for priority in [Priority::Rank, Priority::Gate, Priority::Query] {
            let config = config.clone().gating(gating).priority(priority);
            let one = routed(&config, &logits);
            let other = routed(&config, &logits.select(Axis(0), &order));
            // Choices and weights follow the queries.
            assert_eq!(other.experts(), one.experts().select(Axis(0), &order));
            assert_eq!(other.weights(), one.weights().select(Axis(0), &order));
            let mut unlike = 0;
            for expert in 0..num_experts {
                let mut renumbered: Vec<usize> =
                    other.queries(expert).iter().map(|&query| order[query]).collect();
                renumbered.sort_unstable();
                let queries = one.queries(expert);
                unlike += queries.iter().filter(|query| !renumbered.contains(query)).count();
                // The number of served queries does not depend on the order; their ranks may, by query.
                assert_eq!(renumbered.len(), queries.len());
                let ranks = |queries: &[usize]| -> Vec<usize> {
                    let rank =
                        |query: &usize| one.experts().row(*query).iter().position(|&e| e == expert);
                    let mut ranks: Vec<_> = queries.iter().filter_map(rank).collect();
                    ranks.sort_unstable();
                    ranks
                };
                if priority != Priority::Query {
                    assert_eq!(ranks(&renumbered), ranks(queries));
                }
            }
            assert!(one.num_dropped() > 20, "{}", one.num_dropped());
            assert_eq!(unlike == 0, priority == Priority::Gate, "{gating:?} {priority:?} {unlike}");
        }
        // Without a limit nothing depends on the order.
        let config = MoeConfig::new(6, k).gating(gating);
        let [one, other] =
            [logits.clone(), logits.select(Axis(0), &order)].map(|logits| routed(&config, &logits));
        for expert in 0..num_experts {
            let renumbered = other.queries(expert).iter().rev().map(|&query| order[query]);
            assert!(renumbered.eq(one.queries(expert).iter().copied()));
        }
    }
}

#[test]
fn by_gate_the_larger_one_is_served_first() {
    // Expert 0 is the first choice of all, and all gates round to 1 in any precision.
    let logits = array![[400.0, 0.0, 1.0], [900.0, 0.0, 0.0], [400.0, 0.0, 0.0], [700.0, 0.0, 0.0]];
    let config = MoeConfig::new(1, 1).capacity(2).priority(Priority::Gate);
    assert_eq!(routed(&config, &logits).queries(0), [1, 3]);
    let single = logits.mapv(|z| z as f32);
    let single = Routing::from_logits(&config, single, None).unwrap();
    assert_eq!(single.queries(0), [1, 3]);
    // Of the two with 400, the one whose other logits are smaller; with sigmoids they tie: the first.
    let three = config.clone().capacity(3);
    assert_eq!(routed(&three, &logits).queries(0), [1, 2, 3]);
    let sigmoid = three.gating(Gating::Sigmoid);
    assert_eq!(routed(&sigmoid, &logits).queries(0), [0, 1, 3]);
    // Ties in order, and NaN last.
    let logits = array![[f64::NAN, 0.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [3.0, 1.0]];
    assert_eq!(routed(&config, &logits).queries(0), [1, 4]);
    assert_eq!(routed(&config.capacity(4), &logits).queries(0), [1, 2, 3, 4]);
}

fn experts_are_chosen_by_logits<F: Float>(low: f64, high: f64) {
    // The choice of torch.topk, even if only one probability is not zero.
    let logits =
        array![[-50.0, 0.0, high, 100.0], [low, low - 1.0, high, low + 1.0]].mapv(F::from_f64);
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        let chosen = |k: usize, logits: &Array2<F>, bias: Option<[f64; 4]>| {
            let config = MoeConfig::new(1, k).gating(gating);
            let bias = bias.map(|bias| Array1::from_iter(bias.map(F::from_f64)));
            let bias = bias.as_ref().map(|bias| bias.view());
            Routing::from_logits(&config, logits.clone(), bias).unwrap()
        };
        assert_eq!(chosen(2, &logits, None).experts(), array![[2, 3], [2, 3]]);
        assert_eq!(chosen(4, &logits, None).experts(), array![[2, 3, 1, 0], [2, 3, 0, 1]]);
        // The same bias for all, or for some, which are still ordered by logits.
        let same = chosen(4, &logits, Some([1e6; 4]));
        assert_eq!(same.experts(), array![[2, 3, 1, 0], [2, 3, 0, 1]]);
        let some = chosen(3, &logits, Some([3.0, 3.0, 0.0, 0.0]));
        assert_eq!(some.experts(), array![[1, 0, 2], [0, 1, 2]]);
        // Gates that are all 1 or close to 1.
        let large = array![[97.0, 99.0, 98.0, 96.0]].mapv(F::from_f64);
        assert_eq!(chosen(4, &large, None).experts(), array![[1, 2, 0, 3]]);
        // Renormalised gates also come from logits: a ratio of e⁻¹, far below the smallest number.
        let config = MoeConfig::new(1, 2).gating(gating);
        let bias = array![9.0, 9.0, 0.0, 0.0].mapv(F::from_f64);
        let routing = Routing::from_logits(&config, logits.clone(), Some(bias.view())).unwrap();
        assert_eq!(routing.experts().row(1), array![0, 1]);
        for (weight, expected) in routing.weights().row(1).iter().zip([1.0, (-1f64).exp()]) {
            let expected = expected / (1.0 + (-1f64).exp());
            let tolerance = 2.0 * F::epsilon().as_f64();
            assert_abs_diff_eq!(weight.as_f64(), expected, epsilon = tolerance);
        }
    }
}

#[test]
fn experts_are_chosen_by_logits_where_probabilities_underflow() {
    experts_are_chosen_by_logits::<f32>(-200.0, 250.0);
    experts_are_chosen_by_logits::<f64>(-2000.0, 950.0);
}

#[test]
fn experts_behind_minus_infinity_are_asked_last() {
    let out = f64::NEG_INFINITY;
    let logits = array![[out, 1.0, out, -3.0], [out, out, out, out], [1.0, out, 2.0, -1e9]];
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for renormalize in [true, false] {
            let config = MoeConfig::new(1, 3).gating(gating).renormalize(renormalize);
            let bias = array![9.0, 0.0, 8.0, 0.0];
            let routing = Routing::from_logits(&config, logits.clone(), Some(bias.view())).unwrap();
            assert_eq!(routing.experts().row(0), array![1, 3, 0]);
            assert_eq!(routing.weights()[[0, 2]], 0.0);
            assert!(routing.weights().row(0).iter().all(|w| w.is_finite()));
            // No expert has a gate.
            assert_eq!(routing.experts().row(1), array![0, 1, 2]);
            assert!(routing.weights().row(1).iter().all(|w| w.is_nan()));
            assert_eq!(routing.experts().row(2), array![0, 2, 3]);
            let grads = routing.weights_vjp(Array2::ones((3, 3)).view()).unwrap();
            for query in [0, 2] {
                assert!(grads.row(query).iter().all(|grad| grad.is_finite()));
            }
        }
    }
}

#[test]
fn sigmoid_gates_are_those_of_deepseek_v3() {
    let logits = 1.5 * matrix(30, 5, 41);
    let bias = array![0.3, -0.2, 0.0, 0.15, -0.4];
    let sigma = |z: f64| 1.0 / (1.0 + (-z).exp());
    for k in 1..=5 {
        let config = MoeConfig::new(1, k).gating(Gating::Sigmoid);
        let raw = config.clone().renormalize(false);
        let [normal, raw] = [config, raw].map(|config| {
            Routing::from_logits(&config, logits.clone(), Some(bias.view())).unwrap()
        });
        for (query, z) in logits.rows().into_iter().enumerate() {
            let s = z.mapv(sigma);
            let mut order = [0, 1, 2, 3, 4];
            order.sort_by(|&a, &b| (s[b] + bias[b]).total_cmp(&(s[a] + bias[a])));
            assert_eq!(normal.experts().row(query).to_vec(), order[..k]);
            assert_eq!(raw.experts().row(query).to_vec(), order[..k]);
            let sum: f64 = order[..k].iter().map(|&e| s[e]).sum();
            for (rank, &expert) in order[..k].iter().enumerate() {
                let weight = normal.weights()[[query, rank]];
                assert_abs_diff_eq!(weight, s[expert] / sum, epsilon = 1e-15);
                assert_eq!(raw.weights()[[query, rank]], s[expert]);
            }
            assert_abs_diff_eq!(raw.probabilities().row(query), &s / s.sum(), epsilon = 1e-15);
        }
    }
}

#[test]
fn gradients_of_given_logits_are_exact() {
    // The last query's gates are nearly one-hot, so the difference from the mean is small.
    let mut logits = 2.0 * matrix(6, 5, 42);
    logits.row_mut(5).assign(&array![9.0, -9.0, -8.0, -9.25, -9.5]);
    let step = 1e-3;
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for (renormalize, k) in [(true, 1), (true, 3), (true, 5), (false, 1), (false, 3)] {
            let config = MoeConfig::new(1, k).gating(gating).renormalize(renormalize);
            let grad_weights = matrix(6, k, 43);
            let loss =
                |logits: &Array2<f64>| (&routed(&config, logits).weights() * &grad_weights).sum();
            let grads = routed(&config, &logits).weights_vjp(grad_weights.view()).unwrap();
            assert_eq!(grads.dim(), (6, 5));
            for (at, &grad) in grads.indexed_iter() {
                let moved = |delta: f64| {
                    let mut logits = logits.clone();
                    logits[at] += delta;
                    loss(&logits)
                };
                let numeric =
                    8.0 * (moved(step) - moved(-step)) - (moved(2.0 * step) - moved(-2.0 * step));
                let numeric = numeric / (12.0 * step);
                let is_close = abs_diff_eq!(grad, numeric, epsilon = 1e-11);
                assert!(is_close, "{config:?} {at:?}: {grad} {numeric}");
            }
            if renormalize && k == 1 {
                assert!(grads.iter().all(|&grad| grad == 0.0));
            }
        }
    }
}

#[test]
fn the_gradient_of_a_certain_router_keeps_its_digits() {
    // w₁ = e⁻¹⁸ / (1 + e⁻¹⁸), and dz₀ = −dz₁ = w₀ w₁ (dw₀ − dw₁).
    let tiny = (-18f64).exp() / (1.0 + (-18f64).exp());
    let expected = (1.0 - tiny) * tiny * (0.7 - 0.3);
    for renormalize in [true, false] {
        let config = MoeConfig::new(1, 2).renormalize(renormalize);
        let routing = Routing::from_logits(&config, array![[18f32, 0.0]], None).unwrap();
        let grads = routing.weights_vjp(array![[0.7f32, 0.3]].view()).unwrap();
        let expected = array![[expected, -expected]];
        let what = format_args!("renormalize {renormalize}");
        assert_close_in_size(what, 1e-6, 0.0, &grads.mapv(f64::from), &expected);
    }
}

#[test]
fn a_routing_of_given_logits_is_that_of_a_router() {
    let data = Data::new();
    let inputs = data.all_data()[0];
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        let config = MoeConfig::new(COLUMNS, 2).gating(gating).capacity(7);
        let mut moe = moe(config.clone(), flashes());
        moe.set_expert_bias(array![0.1, 0.0, -0.2, 0.3]).unwrap();
        let routing = moe.route(&inputs).unwrap();
        let logits = routing.logits().to_owned();
        let bias = Some(moe.expert_bias());
        assert_eq!(Routing::from_logits(&config, logits.clone(), bias).unwrap(), routing);
    }
    let from = |config: MoeConfig, logits: Array2<f64>, bias: Option<Array1<f64>>| {
        Routing::from_logits(&config, logits, bias.as_ref().map(|bias| bias.view()))
    };
    let config = || MoeConfig::new(1, 2);
    let logits = || Array2::zeros((5, 3));
    refused(from(config(), Array2::zeros((5, 0)), None), "InvalidArgument | experts | at least 1");
    refused(from(config(), Array2::zeros((5, 1)), None), "InvalidArgument | k | between 1 and 1");
    refused(from(config().capacity(0), logits(), None), "InvalidArgument | capacity | got 0");
    let bias = Some(array![0.0, 0.0]);
    refused(from(config(), logits(), bias), "Shape | expert_bias | [3] | [2]");
    let bias = Some(array![0.0, f64::NAN, 0.0]);
    refused(from(config(), logits(), bias), "InvalidArgument | expert_bias | finite | got NaN");
    let routing = from(config(), logits(), None).unwrap();
    let words = "Shape | grad_weights | [5, 2] | [5, 3]";
    refused(routing.weights_vjp(logits().view()), words);
    let nothing = from(config(), Array2::zeros((0, 3)), None).unwrap();
    assert_eq!(nothing.weights_vjp(Array2::zeros((0, 2)).view()).unwrap().dim(), (0, 3));
    // A capacity does not change weights, and an expert without queries has none.
    assert_eq!((nothing.queries(0).len(), nothing.num_dropped()), (0, 0));
}

fn what_balancing_has_learned_comes_back<F: Float>() {
    let x = matrix(300, COLUMNS, 44).mapv(F::from_f64);
    let keys = x.slice(s![..3, ..]);
    let inputs = Inputs::dense(x.view(), keys, keys).unwrap();
    let config = MoeConfig::new(COLUMNS, 1).renormalize(false);
    let experts = || -> Vec<Box<dyn Attention<F>>> {
        let performer = PerformerConfig::new(COLUMNS, 4).init(&mut rng(45)).unwrap();
        vec![Box::new(Flash::new()), Box::new(performer), Box::new(Flash::new())]
    };
    let mut trained = config.init(experts(), &mut rng(46)).unwrap();
    trained.visit_params_mut(&mut |name, mut param| {
        if name == "router.bias" {
            param[[0]] = F::from_f64(3.0);
        }
    });
    let before = trained.route(&inputs).unwrap().shares();
    for _ in 0..600 {
        let routing = trained.route(&inputs).unwrap();
        trained.update_expert_bias(&routing, 0.002).unwrap();
    }
    let shares = trained.route(&inputs).unwrap().shares();
    assert!(before[0] > 0.8 && shares.iter().all(|share| (share - 1.0 / 3.0).abs() < 0.06));

    let state = params::state(&trained);
    let loaded = config.from_params(experts(), state.clone()).unwrap();
    assert_eq!(loaded.expert_bias(), trained.expert_bias());
    assert_eq!(loaded.route(&inputs).unwrap().shares(), shares);
    // In a mixture of mixtures too, where an optimiser leaves it alone.
    let mut outer = MoeConfig::new(COLUMNS, 1).init(vec![Box::new(trained)], &mut rng(47)).unwrap();
    let (out, saved) = outer.forward_train(&inputs).unwrap();
    let grads = outer.backward(&inputs, &saved, out.view()).unwrap();
    let mut updated = Vec::new();
    params::update(&mut outer, &grads.params, |name, mut param, _| {
        updated.push(name.to_owned());
        param.fill(F::zero());
    })
    .unwrap();
    assert_eq!(
        updated,
        ["router.weight", "router.bias", "experts.0.router.weight", "experts.0.router.bias"]
    );
    let buffers = params::buffers(&outer);
    let names: Vec<&str> = buffers.iter().map(|(name, _)| name.as_str()).collect();
    let expected = [
        "router.expert_bias",
        "experts.0.router.expert_bias",
        "experts.0.experts.1.projection_matrix",
    ];
    assert_eq!(names, expected);
    assert_eq!(buffers[1].1, loaded.expert_bias().into_dyn());
    // A state without the bias is refused, not loaded as zeros.
    let without = state.into_iter().filter(|(name, _)| name != "router.expert_bias");
    let missing = Error::MissingParam { name: "router.expert_bias".into() };
    assert_eq!(config.from_params(experts(), without).unwrap_err(), missing);
}

#[test]
fn the_expert_bias_is_saved_and_loaded() {
    what_balancing_has_learned_comes_back::<f32>();
    what_balancing_has_learned_comes_back::<f64>();
}

#[test]
fn gradients_are_exact_with_edge_features_and_every_channel() {
    let gat = |score| -> Expert {
        let config = EdgeGatConfig::new(score, COLUMNS, 5, 1).edge_dim(3);
        Box::new(config.init(&mut rng(18)).unwrap())
    };
    for (renormalize, gating) in
        [(true, Gating::Softmax), (false, Gating::Softmax), (true, Gating::Sigmoid)]
    {
        // The weight of the noise comes between the router's other parameters and the experts'.
        let config = MoeConfig::new(COLUMNS, 2).renormalize(renormalize).noise(true).gating(gating);
        let experts = vec![gat(Score::Gat), gat(Score::GatV2), gat(Score::DotProduct)];
        let report = check_gradients(&mut moe(config.clone(), experts), &Shapes::new(6, 6, 6));
        assert!(report.unwrap().refused.iter().all(|case| case.contains("bias")));

        let experts: Vec<Expert> = vec![Box::new(ReadsAll), scaled(0.5), Box::new(ReadsAll)];
        check_gradients(&mut moe(config, experts), &Shapes::new(6, 6, 6)).unwrap();
    }
}

#[test]
fn noise_is_seeded_normal_and_differentiable() {
    let x = matrix(4001, COLUMNS, 19);
    let inputs = Inputs::dense(x.view(), x.slice(s![..3, ..]), x.slice(s![..3, ..])).unwrap();
    let config = MoeConfig::new(COLUMNS, 2).noise(true);
    let mut noisy = moe(config, flashes());
    let quiet = noisy.route(&inputs).unwrap();
    assert_eq!(quiet, moe(MoeConfig::new(COLUMNS, 2), flashes()).route(&inputs).unwrap());
    noisy.set_noise(Some(7)).unwrap();
    let routing = noisy.route(&inputs).unwrap();
    assert_eq!(routing, noisy.route(&inputs).unwrap());
    // With fresh weights of 0 the deviation is softplus(0) = ln 2.
    let noise = (&routing.logits() - &quiet.logits()) / 2f64.ln();
    let count = noise.len() as f64;
    let mean = noise.sum() / count;
    let variance = noise.mapv(|x| x * x).sum() / count - mean * mean;
    // Five standard errors: 1/√16004 and √(2/16004).
    assert!(mean.abs() < 0.04 && (variance - 1.0).abs() < 0.056, "{mean} {variance}");
    // The noise differs between queries, experts and seeds.
    let correlation = |a: ArrayView2<f64>, b: ArrayView2<f64>| (&a * &b).sum() / a.len() as f64;
    noisy.set_noise(Some(8)).unwrap();
    let other = (&noisy.route(&inputs).unwrap().logits() - &quiet.logits()) / 2f64.ln();
    for correlation in [
        correlation(noise.slice(s![..-1, ..]), noise.slice(s![1.., ..])),
        correlation(noise.slice(s![.., ..3]), noise.slice(s![.., 1..])),
        correlation(noise.view(), other.view()),
    ] {
        assert!(correlation.abs() < 0.05, "{correlation}");
    }
    // The deviation is softplus(W_noise q).
    let weight = matrix(4, COLUMNS, 20);
    noisy.visit_params_mut(&mut |name, mut param| {
        if name == "router.noise_weight" {
            param.assign(&weight);
        }
    });
    let deviation = x.dot(&weight.t()).mapv(|u| u.exp().ln_1p());
    let expected = &quiet.logits() + &(other * deviation);
    close("all", &noisy.route(&inputs).unwrap().logits().to_owned(), &expected);

    // Selected queries keep their noise.
    let selected = inputs.select_queries(&[2, 3, 11]).unwrap();
    let some = noisy.route(&selected.inputs()).unwrap();
    close("some", &some.logits().to_owned(), &expected.select(Axis(0), &[2, 3, 11]));

    check_gradients(&mut noisy, &Shapes::new(6, 6, 6)).unwrap();
    noisy.set_noise(None).unwrap();
    assert_eq!(noisy.route(&inputs).unwrap(), quiet);
    // Without noise its weight has a gradient of zero.
    check_gradients(&mut noisy, &Shapes::new(6, 6, 6)).unwrap();
}

#[test]
fn losses_have_their_closed_forms() {
    let x = matrix(8, COLUMNS, 21);
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let config = |k| MoeConfig::new(COLUMNS, k).renormalize(false);
    // With equal probabilities the loss is 1, whichever expert is chosen.
    let uniform = with_logits(config(1), flashes(), &[0.25; 4]).route(&inputs).unwrap();
    assert_abs_diff_eq!(uniform.switch_load_balance().unwrap().0, 1.0, epsilon = 1e-14);
    assert_abs_diff_eq!(uniform.entropy(), 4f64.ln(), epsilon = 1e-14);
    assert_abs_diff_eq!(uniform.z_loss().unwrap().0, (0.25 + 4f64.ln()).powi(2), epsilon = 1e-14);
    // All go to expert 0: I = (2, 0, 0, 0).
    assert_eq!(uniform.shares(), [1.0, 0.0, 0.0, 0.0]);
    assert_abs_diff_eq!(uniform.importance_cv2().unwrap().0, 3.0, epsilon = 1e-14);
    let all = with_logits(config(4), flashes(), &[0.25; 4]).route(&inputs).unwrap();
    assert_eq!(all.shares(), [0.25; 4]);
    assert_abs_diff_eq!(all.importance_cv2().unwrap().0, 0.0, epsilon = 1e-14);
    assert_abs_diff_eq!(all.switch_load_balance().unwrap().0, 1.0, epsilon = 1e-14);
    // One expert gets all, with certainty.
    let one = with_logits(config(1), flashes(), &[0.0, 0.0, 99.0, 0.0]).route(&inputs).unwrap();
    assert_abs_diff_eq!(one.switch_load_balance().unwrap().0, 4.0, epsilon = 1e-14);
    assert!(one.entropy() < 1e-30);
    assert_abs_diff_eq!(one.z_loss().unwrap().0, 99.0 * 99.0, epsilon = 1e-10);

    // From the definitions, with unequal numbers.
    let routing = moe(config(2).capacity_factor(0.5), flashes()).route(&inputs).unwrap();
    let p = routing.probabilities();
    let mean_p = p.mean_axis(Axis(0)).unwrap();
    let (mut chosen, mut importance) = ([0.0; 4], [0.0; 4]);
    for (&expert, &weight) in routing.experts().iter().zip(routing.weights()) {
        chosen[expert] += 1.0 / 16.0;
        importance[expert] += weight;
    }
    assert_eq!(routing.shares(), chosen);
    let balance: f64 = (0..4).map(|e| 4.0 * chosen[e] * mean_p[e]).sum();
    assert_abs_diff_eq!(routing.switch_load_balance().unwrap().0, balance, epsilon = 1e-14);
    let mean = importance.iter().sum::<f64>() / 4.0;
    let variance = importance.iter().map(|i| (i - mean).powi(2)).sum::<f64>() / 4.0;
    assert_abs_diff_eq!(
        routing.importance_cv2().unwrap().0,
        variance / mean.powi(2),
        epsilon = 1e-14
    );
    let log_sums = routing.logits().mapv(f64::exp).sum_axis(Axis(1)).mapv(f64::ln);
    let z = log_sums.mapv(|z| z * z).mean().unwrap();
    assert_abs_diff_eq!(routing.z_loss().unwrap().0, z, epsilon = 1e-13);
    let entropy = -p.mapv(|p| p * p.ln()).sum() / 8.0;
    assert_abs_diff_eq!(routing.entropy(), entropy, epsilon = 1e-14);

    // Without queries.
    let empty = Inputs::dense(x.slice(s![..0, ..]), x.view(), x.view()).unwrap();
    let routing = moe(config(2), flashes()).route(&empty).unwrap();
    for (value, grad) in [
        routing.switch_load_balance().unwrap(),
        routing.importance_cv2().unwrap(),
        routing.z_loss().unwrap(),
    ] {
        assert_eq!((value, grad.dim()), (0.0, (0, 4)));
    }
    assert_eq!((routing.entropy(), routing.num_dropped()), (0.0, 0));
    assert_eq!(routing.shares(), [0.0; 4]);
}

#[test]
fn losses_reach_the_router_and_the_queries() {
    type Loss = fn(&graph_attention::moe::Routing<f64>) -> Result<(f64, Array2<f64>)>;
    let losses: [Loss; 3] = [
        |routing| routing.switch_load_balance(),
        |routing| routing.importance_cv2(),
        |routing| routing.z_loss(),
    ];
    let keys = matrix(3, COLUMNS, 22);
    let softmax = [MoeConfig::new(COLUMNS, 2), MoeConfig::new(COLUMNS, 3).renormalize(false)];
    let sigmoid = softmax.clone().map(|config| config.gating(Gating::Sigmoid));
    for (config, loss) in [softmax, sigmoid]
        .iter()
        .flatten()
        .flat_map(|config| losses.map(|loss| (config.clone().noise(true), loss)))
    {
        let mut moe = moe(config, flashes());
        moe.set_noise(Some(3)).unwrap();
        let mut query = matrix(7, COLUMNS, 23);
        let value = |moe: &Moe<f64>, query: &Array2<f64>| {
            let inputs = Inputs::dense(query.view(), keys.view(), keys.view()).unwrap();
            loss(&moe.route(&inputs).unwrap()).unwrap().0
        };
        let inputs = Inputs::dense(query.view(), keys.view(), keys.view()).unwrap();
        let mut grads = Gradients::zeros(&inputs, &moe).unwrap();
        // Gradients are added to existing ones.
        grads.query.fill(1.0);
        grads.params.iter_mut().for_each(|grad| grad.fill(1.0));
        let routing = moe.route(&inputs).unwrap();
        let (_, grad_logits) = loss(&routing).unwrap();
        let grad_logits = grad_logits.view();
        moe.router_backward(&inputs, &routing, grad_logits, grads.view_mut()).unwrap();

        let step = 1e-4;
        let difference = |f: &mut dyn FnMut(f64) -> f64| {
            let difference = 8.0 * (f(step) - f(-step)) - (f(2.0 * step) - f(-2.0 * step));
            difference / (12.0 * step)
        };
        for (place, &grad) in grads.query.indexed_iter() {
            let old = query[place];
            let numeric = difference(&mut |delta| {
                query[place] = old + delta;
                value(&moe, &query)
            });
            query[place] = old;
            assert_abs_diff_eq!(grad - 1.0, numeric, epsilon = 1e-10);
        }
        for (param, grads) in grads.params.iter().enumerate() {
            for (entry, &grad) in grads.iter().enumerate() {
                let numeric = difference(&mut |delta| {
                    let mut number = 0..;
                    let mut add = |delta: f64, moe: &mut Moe<f64>| {
                        moe.visit_params_mut(&mut |_, mut array| {
                            if number.next() == Some(param) {
                                *array.iter_mut().nth(entry).unwrap() += delta;
                            }
                        });
                        number = 0..;
                    };
                    add(delta, &mut moe);
                    let value = value(&moe, &query);
                    add(-delta, &mut moe);
                    value
                });
                let is_close = abs_diff_eq!(grad - 1.0, numeric, epsilon = 1e-10);
                assert!(is_close, "{param}: {grad} {numeric}");
            }
        }
    }
}

#[test]
fn the_expert_bias_balances_without_touching_the_weights() {
    let x = matrix(509, COLUMNS, 24);
    let inputs = Inputs::dense(x.view(), x.slice(s![..3, ..]), x.slice(s![..3, ..])).unwrap();
    let config = MoeConfig::new(COLUMNS, 1).renormalize(false);
    let mut moe = moe(config, flashes());
    moe.visit_params_mut(&mut |name, mut param| {
        if name == "router.bias" {
            param.iter_mut().zip([3.0, 1.0, 0.0, 0.5]).for_each(|(bias, x)| *bias = x);
        }
    });
    let before = moe.route(&inputs).unwrap();
    assert!(before.shares()[0] > 0.9, "{:?}", before.shares());
    moe.update_expert_bias(&before, 0.25).unwrap();
    assert_eq!(moe.expert_bias().to_vec(), [-0.25, 0.25, 0.25, 0.25]);
    for _ in 0..500 {
        let routing = moe.route(&inputs).unwrap();
        moe.update_expert_bias(&routing, 0.002).unwrap();
    }
    let after = moe.route(&inputs).unwrap();
    assert!(after.shares().iter().all(|share| (share - 0.25).abs() < 0.06), "{:?}", after.shares());
    assert_eq!(after.probabilities(), before.probabilities());
    for ((query, rank), &expert) in after.experts().indexed_iter() {
        assert_eq!(after.weights()[[query, rank]], after.probabilities()[[query, expert]]);
    }
    // Balanced loads change nothing.
    let balanced = with_logits(MoeConfig::new(COLUMNS, 4), flashes(), &[0.0; 4]);
    let routing = balanced.route(&inputs).unwrap();
    let bias = moe.expert_bias().to_owned();
    moe.update_expert_bias(&routing, 0.1).unwrap();
    assert_eq!(moe.expert_bias(), bias);
}

#[test]
fn parameters_carry_the_number_of_their_expert() {
    let projected = |seed| -> Expert {
        let config = MultiHeadConfig::new(COLUMNS, 2).bias(false);
        Box::new(config.init(Flash::new(), &mut rng(seed)).unwrap())
    };
    let experts = || vec![projected(25), scaled(1.0), projected(26)];
    let config = MoeConfig::new(COLUMNS, 2).noise(true);
    let moe = moe(config.clone(), experts());
    let state = params::state(&moe);
    let names: Vec<&str> = state.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "router.weight",
            "router.bias",
            "router.noise_weight",
            "experts.0.in_proj_weight",
            "experts.0.out_proj.weight",
            "experts.2.in_proj_weight",
            "experts.2.out_proj.weight",
            "router.expert_bias",
        ]
    );
    assert_eq!(params::zeros(&moe).len(), 7);
    let loaded = config.from_params(vec![projected(1), scaled(1.0), projected(2)], state.clone());
    let data = Data::new();
    let inputs = data.all_data()[0];
    assert_eq!(loaded.unwrap().forward(&inputs).unwrap(), moe.forward(&inputs).unwrap());
    let refusal = config.from_params(experts(), state.into_iter().skip(1));
    refused(refusal, "MissingParam | router.weight");

    // Fresh weights fill ±1/√6.
    let fresh: Moe<f64> = MoeConfig::new(COLUMNS, 1)
        .init((0..40).map(|_| scaled(1.0)).collect(), &mut rng(27))
        .unwrap();
    let weight = param(&fresh, "router.weight");
    let largest = weight.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    assert!(largest <= 6f64.powf(-0.5) && largest > 0.95 * 6f64.powf(-0.5), "{largest}");
    assert!(param(&fresh, "router.bias").iter().all(|&bias| bias == 0.0));
    assert_eq!(fresh.experts().len(), 40);
    assert_eq!(fresh.config(), &MoeConfig::new(COLUMNS, 1));
}

#[test]
fn bad_calls_are_refused() {
    let data = Data::new();
    let (q, k, v) = (data.query.view(), data.key.view(), data.value.view());
    let bare = Inputs::dense(q, k, v).unwrap();
    let init = |config: &MoeConfig, experts: Vec<Expert>| config.init(experts, &mut rng(28));
    for (config, words) in [
        (MoeConfig::new(6, 0), "k | between 1 and 4 | got 0"),
        (MoeConfig::new(6, 5), "k | between 1 and 4 | got 5"),
        (MoeConfig::new(0, 1), "query_dim | at least 1 | got 0"),
        (MoeConfig::new(6, 1).capacity_factor(0.0), "capacity_factor | positive | got 0"),
        (MoeConfig::new(6, 1).capacity_factor(f64::NAN), "capacity_factor | positive | got NaN"),
        (MoeConfig::new(6, 1).capacity_factor(1.0 / 0.0), "capacity_factor | positive | got inf"),
        (MoeConfig::new(6, 1).capacity(0), "capacity | at least 1 | got 0"),
    ] {
        refused(init(&config, flashes()), &format!("InvalidArgument | {words}"));
    }
    let one = MoeConfig::new(6, 1);
    refused(init(&one, vec![]), "InvalidArgument | experts | at least 1 | got 0");
    let huge = MoeConfig::new(usize::MAX / 8, 1);
    refused(init(&huge, flashes()), "TooLarge | router.weight");

    let gat = |dim| -> Expert {
        let config = EdgeGatConfig::new(Score::GatV2, 6, dim, 1).edge_dim(3);
        Box::new(config.init(&mut rng(29)).unwrap())
    };
    let all = |experts| with_logits(MoeConfig::new(6, 3), experts, &[0.0; 3]);
    let third = all(vec![scaled(1.0), scaled(2.0), gat(6)]);
    refused(third.forward(&bare), "MissingInput | expert 2 (edge_gat) | edge features");
    let tangent = PoincareConfig::new().coordinates(Coordinates::Tangent);
    let hyperbolic = all(vec![scaled(1.0), scaled(2.0), Box::new(tangent.init().unwrap())]);
    let weights = Array2::ones((bare.num_pairs(), 1));
    let weighted = bare.with_pair_weights(weights.view()).unwrap();
    let words = "Unsupported | expert 2 (poincare) | weights of pairs";
    refused(hyperbolic.forward_train(&weighted), words);
    // An expert inside a mixture inside a mixture.
    let inner = Box::new(all(vec![gat(6), gat(6), gat(6)]));
    let outer = all(vec![scaled(1.0), inner, scaled(2.0)]);
    refused(outer.forward(&bare), "MissingInput | expert 1 (expert 0 (edge_gat)) | edge features");
    let narrow = bare.with_edge_features(data.positions[0].view());
    assert!(narrow.is_err());
    let narrow = data.features.slice(s![.., ..2]);
    let narrow = bare.with_edge_features(narrow).unwrap();
    refused(third.forward(&narrow), "Shape | expert 2 (edge_gat): edge_features | [437, 3] | 2]");
    let unequal = all(vec![scaled(1.0), scaled(2.0), gat(5)]);
    let words = "Shape | expert 2 (edge_gat) | expert 0 (flash) | shape [6] | got [5]";
    refused(unequal.forward(&bare), words);
    // The number of the query in the whole inputs.
    let mut outside = 0.1 * &data.query;
    outside.row_mut(21).fill(1.0);
    let (near, near_values) = (0.1 * &data.key, 0.1 * &data.value);
    let ball = Inputs::dense(outside.view(), near.view(), near_values.view()).unwrap();
    let poincare = || Box::new(PoincareConfig::new().init().unwrap()) as Expert;
    let mut weight = ArrayD::zeros(vec![2, 6]);
    weight[[1, 0]] = 10.0;
    let zeros = || ArrayD::zeros(vec![2]);
    let state =
        [("router.weight", weight), ("router.bias", zeros()), ("router.expert_bias", zeros())];
    let points = MoeConfig::new(6, 1).from_params(vec![poincare(), poincare()], state).unwrap();
    assert!(points.route(&ball).unwrap().queries(1)[..] != *(0..22).collect::<Vec<_>>());
    refused(points.forward(&ball), "Domain | query | in row 21, got");

    let mut moe = moe(MoeConfig::new(6, 2), flashes());
    let wide = Inputs::dense(data.features.slice(s![..5, ..]), k, v).unwrap();
    refused(moe.route(&wide), "Shape | query | [5, 6] | [5, 3]");
    refused(moe.attention_weights(&bare), "NoWeights | moe");
    refused(moe.set_noise(Some(1)), "InvalidArgument | noise | without noise");
    assert!(moe.set_noise(None).is_ok());
    refused(moe.set_expert_bias(Array1::zeros(3)), "Shape | expert_bias | [4] | [3]");
    let infinite = array![0.0, f64::INFINITY, 0.0, 0.0];
    refused(moe.set_expert_bias(infinite), "InvalidArgument | expert_bias | finite | got inf");
    let routing = third.route(&bare).unwrap();
    refused(moe.update_expert_bias(&routing, 0.1), "Shape | routing | [4] | [3]");
    let routing = moe.route(&bare).unwrap();
    refused(
        moe.update_expert_bias(&routing, f64::NAN),
        "InvalidArgument | step | finite | got NaN",
    );
    assert!(moe.expert_bias().iter().all(|&bias| bias == 0.0));
    assert_eq!(routing.queries(4), [0; 0]);

    let mut grads = Gradients::zeros(&bare, &moe).unwrap();
    let mut router_backward = |inputs, routing, grad_logits: &Array2<f64>| {
        moe.router_backward(inputs, routing, grad_logits.view(), grads.view_mut())
    };
    let logits = Array2::zeros((QUERIES, 4));
    let wrong = Array2::zeros((QUERIES, 3));
    let words = "Shape | grad_logits | [23, 4] | [23, 3]";
    refused(router_backward(&bare, &routing, &wrong), words);
    let other = third.route(&bare).unwrap();
    refused(router_backward(&bare, &other, &logits), "Shape | routing | [23, 4] | [23, 3]");
    refused(router_backward(&wide, &routing, &logits), "Shape | grads.query");

    let (out, saved) = moe.forward_train(&bare).unwrap();
    assert_eq!(moe.routing(&saved).unwrap(), &routing);
    let (_, flash) = Flash::new().forward_train(&bare).unwrap();
    refused(moe.routing(&flash), "SavedMismatch | moe | flash");
    refused(moe.backward(&bare, &flash, out.view()), "SavedMismatch | moe | flash");
    let fewer = bare.select_queries(&[0, 1, 2]).unwrap();
    let grad_out = Array2::zeros((3, 6));
    let words = "Shape | saved routing | [3, 4] | [23, 4]";
    refused(moe.backward(&fewer.inputs(), &saved, grad_out.view()), words);
    let others = all(vec![scaled(1.0), scaled(2.0), Box::new(ScaledDotProduct::new())]);
    let (_, saved) = others.forward_train(&bare).unwrap();
    let flashes = all(vec![scaled(1.0), scaled(2.0), scaled(3.0)]);
    refused(flashes.backward(&bare, &saved, out.view()), "SavedMismatch | scaled_dot_product");
}

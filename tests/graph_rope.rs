//! Rotary embeddings: comparison with other implementations (`tests/golden/graph_rope.py`), and laws.

mod common;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use common::close::{assert_close, assert_close_in_size};
use common::golden::{dynamic, size};
use common::random::{matrix, rng};
use graph_attention::ndarray::{
    Array1, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis, array, s,
};
use graph_attention::testing::{Shapes, check_gradients};
use graph_attention::{
    Attention, Channel, DualSpaceConfig, EdgeRope, Error, Flash, Float, Gradients, GradientsMut,
    Graph, GraphRope, GraphRopeConfig, Inputs, LocalGlobal, MoeConfig, MultiHeadConfig, Params,
    PerformerConfig, Result, Saved, ScaledDotProduct, dual_space::Fusion, graph_rope::Layout,
    params,
};
use rand::RngExt;
use serde_json::Value;

const LAYOUTS: [Layout; 2] = [Layout::Interleaved, Layout::Half];

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/graph_rope.json")).unwrap()
}

/// Reads a matrix of the golden data; a vector becomes one column.
fn golden_matrix(value: &Value) -> Array2<f64> {
    let array = dynamic(value);
    let array = if array.ndim() == 1 { array.insert_axis(Axis(1)) } else { array };
    array.into_dimensionality().unwrap()
}

/// Returns positions that can be shifted without rounding: multiples of 1/64.
fn positions(rows: usize, axes: usize, seed: u64) -> Array2<f64> {
    let mut rng = rng(seed);
    Array2::from_shape_simple_fn((rows, axes), || f64::from(rng.random_range(-640..640)) / 64.0)
}

#[track_caller]
fn assert_gradients_close(what: &str, tolerance: f64, a: &Gradients<f64>, b: &Gradients<f64>) {
    for (array, a, b) in
        [("query", &a.query, &b.query), ("key", &a.key, &b.key), ("value", &a.value, &b.value)]
    {
        assert_close_in_size(format_args!("{what}, {array}"), tolerance, 1.0, a, b);
    }
}

/// Returns the output, and the gradients of the sum of its squares.
fn train(
    attention: &dyn Attention<f64>,
    inputs: &Inputs<'_, f64>,
) -> (Array2<f64>, Gradients<f64>) {
    let (out, saved) = attention.forward_train(inputs).unwrap();
    let grads = attention.backward(inputs, &saved, (2.0 * &out).view()).unwrap();
    (out, grads)
}

/// A mechanism that outputs the queries, to show how they were rotated.
#[derive(Debug)]
struct Show;

impl<F: Float> Params<F> for Show {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

impl<F: Float> Attention<F> for Show {
    fn name(&self) -> &'static str {
        "show"
    }
    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        inputs.query().ncols()
    }
    fn forward_into(&self, inputs: &Inputs<'_, F>, mut out: ArrayViewMut2<'_, F>) -> Result<()> {
        out.assign(&inputs.query());
        Ok(())
    }
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        self.forward_into(inputs, out)?;
        Ok(Saved::new("show", ()))
    }
    fn backward_into(
        &self,
        _: &Inputs<'_, F>,
        _: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        if let Some(mut query) = grads.query {
            query += &grad_out;
        }
        Ok(())
    }
}

/// Returns x rotated by its positions.
fn rotated<F: Float>(
    config: &GraphRopeConfig,
    x: &Array2<F>,
    at: &Array2<F>,
    heads: usize,
) -> Array2<F> {
    let rope: GraphRope<F, _> = config.init(Show).unwrap();
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap().with_heads(heads).unwrap();
    rope.forward(&inputs.with_positions(at.view(), at.view()).unwrap()).unwrap()
}

/// Asserts that two computations in `f64` in different order agree, for angles up to a few hundred.
const TOLERANCE: f64 = 2e-13;

#[test]
fn peers_agree() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 18);
    let mut with_distances = 0;
    for case in cases {
        let layout = match case["layout"].as_str().unwrap() {
            "half" => Layout::Half,
            _ => Layout::Interleaved,
        };
        let [query, key, value, grad_out, frequencies] =
            ["query", "key", "value", "grad_out", "frequencies"]
                .map(|name| golden_matrix(&case[name]));
        let config = GraphRopeConfig::new(size(&case["head_dim"]), layout)
            .rotary_dim(size(&case["rotary_dim"]))
            .learn_frequencies(true);
        let config = match case["base"].as_f64() {
            Some(base) => config.base(base).axes(size(&case["axes"])),
            None => config.frequencies(frequencies.clone()),
        };
        let (heads, kv_heads) = (size(&case["heads"]), size(&case["kv_heads"]));
        let mut inputs = Inputs::dense(query.view(), key.view(), value.view())
            .and_then(|inputs| inputs.with_grouped_heads(heads, kv_heads))
            .unwrap();
        if case["causal"].as_bool().unwrap() {
            inputs = inputs.with_causal();
        }
        let ropes: Vec<Box<dyn Attention<f64>>>;
        let (distances, query_at, key_at);
        if case["distances"].is_null() {
            query_at = golden_matrix(&case["query_positions"]);
            key_at = golden_matrix(&case["key_positions"]);
            inputs = inputs.with_positions(query_at.view(), key_at.view()).unwrap();
            let plain = config.init(ScaledDotProduct::new()).unwrap();
            ropes = vec![Box::new(config.init(Flash::new()).unwrap()), Box::new(plain)];
        } else {
            distances = golden_matrix(&case["distances"]);
            inputs = inputs.with_distances(distances.column(0)).unwrap();
            ropes = vec![Box::new(config.init_edges().unwrap())];
            with_distances += 1;
        }
        for rope in ropes {
            let what = |array: &str| format!("{}, {}, {array}", case["name"], rope.name());
            let own = params::state(&rope)[0].1.clone().into_dimensionality().unwrap();
            assert_close_in_size(what("frequencies"), 1e-15, 1.0, &own, &frequencies);
            let (out, saved) = rope.forward_train(&inputs).unwrap();
            assert_close_in_size(what("out"), TOLERANCE, 1.0, &out, &golden_matrix(&case["out"]));
            let grads = rope.backward(&inputs, &saved, grad_out.view()).unwrap();
            let grad_frequencies = grads.params[0].clone().into_dimensionality().unwrap();
            let grad_distances = grads.distances.map(|grad| grad.insert_axis(Axis(1)));
            for (name, grad) in [
                ("grad_query", &grads.query),
                ("grad_key", &grads.key),
                ("grad_value", &grads.value),
                ("grad_frequencies", &grad_frequencies),
            ]
            .into_iter()
            .chain(grad_distances.as_ref().map(|grad| ("grad_distances", grad)))
            {
                assert_close_in_size(what(name), TOLERANCE, 1.0, grad, &golden_matrix(&case[name]));
            }
        }
    }
    assert!(with_distances >= 6);
}

#[test]
fn angles_are_exact_however_large() {
    let golden = golden();
    let angles = golden["angles"].as_array().unwrap();
    assert!(angles.len() >= 10);
    for angle in angles {
        let [frequency, position, sin, cos] = [0, 1, 2, 3].map(|n| angle[n].as_f64().unwrap());
        for layout in LAYOUTS {
            let config = GraphRopeConfig::new(2, layout).frequencies(array![[frequency]]);
            let out = rotated(&config, &array![[1.0, 0.0]], &array![[position]], 1);
            let what = format_args!("{frequency} · {position}, {layout:?}");
            assert_close(what, 2.0 * f64::EPSILON, &out, &array![[cos, sin]]);
        }
    }
}

#[test]
fn norms_are_kept_and_other_columns_too() {
    let (n, heads, head_dim, rotary_dim) = (13, 3, 11, 6);
    let x = matrix(n, heads * head_dim, 1);
    let at = 1e4 * matrix(n, 2, 2);
    for layout in LAYOUTS {
        let config = GraphRopeConfig::new(head_dim, layout).rotary_dim(rotary_dim).axes(2);
        let out = rotated(&config, &x, &at, heads);
        for (x, y) in x.rows().into_iter().zip(out.rows()) {
            for head in 0..heads {
                let head = head * head_dim..(head + 1) * head_dim;
                let (x, y) = (x.slice(s![head.clone()]), y.slice(s![head]));
                assert_eq!(x.slice(s![rotary_dim..]), y.slice(s![rotary_dim..]));
                let pair = |p: usize| match layout {
                    Layout::Interleaved => [2 * p, 2 * p + 1],
                    Layout::Half => [p, p + rotary_dim / 2],
                };
                for [a, b] in (0..rotary_dim / 2).map(pair) {
                    let (before, after) = (x[a].hypot(x[b]), y[a].hypot(y[b]));
                    assert_abs_diff_eq!(before, after, epsilon = 1e-15 * (1.0 + before));
                    assert!((x[a] - y[a]).abs() > 1e-6, "{} is not rotated", x[a]);
                }
            }
        }
    }
}

#[test]
fn frequencies_are_powers_of_the_base_split_among_the_axes() {
    let of = |config: GraphRopeConfig| config.init::<f64, _>(Flash::new()).unwrap().frequencies();
    let one = of(GraphRopeConfig::new(64, Layout::Half));
    // The exponent is −2p/d, not −4p/d.
    let lowest = 1.333_521_432_163_324e-4;
    assert_relative_eq!(one[[0, 31]], lowest, epsilon = 0.0, max_relative = 1e-14);
    assert_relative_eq!(one[[0, 16]], 1e-2, epsilon = 0.0, max_relative = 1e-14);
    assert_eq!(one[[0, 0]], 1.0);
    // Seven pairs, three axes: blocks of 3, 2 and 2.
    let three = of(GraphRopeConfig::new(16, Layout::Half).rotary_dim(14).axes(3).base(64.0));
    let expected = array![
        [1.0, 0.25, 0.0625, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0, 0.125, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.125],
    ];
    assert_close("blocks", 1e-15, &three, &expected);
}

#[test]
fn shifting_all_positions_changes_nothing() {
    let (n, heads, head_dim) = (37, 2, 8);
    let mut rng = rng(3);
    let x = matrix(n, heads * head_dim, 4);
    let graph = Graph::from_edges(n, n, (0..9 * n).map(|e| (e % n, (e * e + e / n) % n))).unwrap();
    let mixed = matrix(2, head_dim / 2, 5);
    let dense = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let sparse = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
    for layout in LAYOUTS {
        let config = || GraphRopeConfig::new(head_dim, layout).learn_frequencies(true);
        let heads_inside = MultiHeadConfig::new(heads * head_dim, heads);
        let ropes: Vec<(usize, Box<dyn Attention<f64>>)> = vec![
            (1, Box::new(config().init(Flash::new()).unwrap())),
            (1, Box::new(config().init(ScaledDotProduct::new()).unwrap())),
            (2, Box::new(config().axes(2).init(Flash::new()).unwrap())),
            (2, Box::new(config().frequencies(mixed.clone()).init(Flash::new()).unwrap())),
            (
                1,
                Box::new(
                    heads_inside.init(config().init(Flash::new()).unwrap(), &mut rng).unwrap(),
                ),
            ),
        ];
        for (axes, rope) in ropes {
            let at = positions(n, axes, 6);
            for inputs in [dense, sparse] {
                let inputs = match rope.name() {
                    "multi_head" => inputs,
                    _ => inputs.with_heads(heads).unwrap(),
                };
                let (out, grads) =
                    train(&rope, &inputs.with_positions(at.view(), at.view()).unwrap());
                for shift in [1e5, -1e5, 1e9] {
                    let at = &at + &Array1::from_shape_fn(axes, |axis| shift * (1 + axis) as f64);
                    let inputs = inputs.with_positions(at.view(), at.view()).unwrap();
                    let (shifted, shifted_grads) = train(&rope, &inputs);
                    // The limit is 1e-11; with angles that are rounded after multiplication errors reach 1e-10.
                    let what = format!("{}, {axes} axes, {layout:?}, {shift:e}", rope.name());
                    assert_close_in_size(&what, 1e-13, 1.0, &shifted, &out);
                    assert_gradients_close(&what, 1e-13, &shifted_grads, &grads);
                }
            }
        }
    }
}

#[test]
fn shifts_change_nothing_in_f32_either() {
    let (n, head_dim) = (29, 64);
    let x = matrix(n, head_dim, 7).mapv(|x| x as f32);
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let rope = GraphRopeConfig::new(head_dim, Layout::Half).init(Flash::new()).unwrap();
    let at = positions(n, 1, 8).mapv(|x| x as f32);
    let far = &at + 1e5;
    let [near, far] = [&at, &far]
        .map(|at| rope.forward(&inputs.with_positions(at.view(), at.view()).unwrap()).unwrap());
    assert_abs_diff_eq!(near, far, epsilon = 1e-5);
}

#[test]
fn without_distance_it_is_plain_attention() {
    let (n, heads, head_dim) = (23, 3, 6);
    let [q, k, v] = [9, 10, 11].map(|seed| matrix(n, heads * head_dim, seed));
    let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_heads(heads).unwrap();
    let (out, grads) = train(&ScaledDotProduct::new(), &inputs);
    let zeros = Array1::zeros(n * n);
    let same = Array2::from_elem((n, 1), 77.5);
    let with_zeros = inputs.with_distances(zeros.view()).unwrap();
    let with_same = inputs.with_positions(same.view(), same.view()).unwrap();
    for layout in LAYOUTS {
        let config = GraphRopeConfig::new(head_dim, layout);
        let ropes: [(Box<dyn Attention<f64>>, _); 2] = [
            (Box::new(config.init_edges().unwrap()), with_zeros),
            (Box::new(config.init(Flash::new()).unwrap()), with_same),
        ];
        for (rope, inputs) in ropes {
            let (rope_out, rope_grads) = train(&rope, &inputs);
            assert_close_in_size(rope.name(), 1e-14, 1.0, &rope_out, &out);
            assert_gradients_close(rope.name(), 1e-14, &rope_grads, &grads);
        }
    }
}

#[test]
fn distances_that_are_differences_of_positions_are_positions() {
    let (n_q, n_k, heads, kv_heads, head_dim) = (31, 43, 4, 2, 10);
    let q = matrix(n_q, heads * head_dim, 12);
    let [k, v] = [13, 14].map(|seed| matrix(n_k, kv_heads * head_dim, seed));
    let (query_at, key_at) = (positions(n_q, 1, 15), positions(n_k, 1, 16));
    let graph = Graph::from_edges(n_q, n_k, (0..200).map(|e| (e * 7 % n_q, e * e % n_k))).unwrap();
    let mut edges = vec![(0, 0); graph.num_edges()];
    for query in 0..n_q {
        graph.row(query).for_each(|(key, edge)| edges[edge] = (query, key));
    }
    let all = (0..n_q * n_k).map(|pair| (pair / n_k, pair % n_k)).collect::<Vec<_>>();
    let dense = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
    let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph).unwrap();
    for (inputs, pairs) in [(dense, &all), (dense.with_causal(), &all), (sparse, &edges)] {
        let distances = pairs.iter().map(|&(i, j)| key_at[[j, 0]] - query_at[[i, 0]]);
        let distances = distances.collect::<Array1<f64>>();
        let inputs = inputs.with_grouped_heads(heads, kv_heads).unwrap();
        let inputs = inputs.with_positions(query_at.view(), key_at.view()).unwrap();
        let inputs = inputs.with_distances(distances.view()).unwrap();
        for layout in LAYOUTS {
            let config =
                GraphRopeConfig::new(head_dim, layout).rotary_dim(8).learn_frequencies(true);
            let of_nodes = config.init(Flash::new()).unwrap();
            let of_edges = config.init_edges().unwrap();
            let (out, grads) = train(&of_nodes, &inputs);
            let (edge_out, edge_grads) = train(&of_edges, &inputs);
            let what = format!("{layout:?}, {} pairs", pairs.len());
            assert_close_in_size(&what, 1e-14, 1.0, &edge_out, &out);
            assert_gradients_close(&what, 1e-13, &edge_grads, &grads);
            let [a, b] = [&grads, &edge_grads].map(|grads| grads.params[0].clone());
            assert_close_in_size(format_args!("{what}, frequencies"), 1e-13, 1.0, &b, &a);
            let weights = of_nodes.attention_weights(&inputs).unwrap();
            let edge_weights = of_edges.attention_weights(&inputs).unwrap();
            assert_close(format_args!("{what}, weights"), 1e-14, &edge_weights, &weights);
        }
    }
}

#[test]
fn a_rotation_inside_a_rotation_turns_twice() {
    let (n, head_dim) = (17, 6);
    let (x, at) = (matrix(n, head_dim, 17), positions(n, 2, 18));
    let theta = matrix(2, head_dim / 2, 19);
    let config =
        |factor: f64| GraphRopeConfig::new(head_dim, Layout::Half).frequencies(factor * &theta);
    let nested = GraphRopeConfig::new(head_dim, Layout::Half).frequencies(theta.clone());
    let nested: GraphRope<f64, _> = nested.init(config(1.0).init(Show).unwrap()).unwrap();
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let out = nested.forward(&inputs.with_positions(at.view(), at.view()).unwrap()).unwrap();
    assert_close_in_size("twice", 1e-14, 1.0, &out, &rotated(&config(2.0), &x, &at, 1));
}

/// Returns the rows that contain a NaN, and whether all others are unchanged.
fn rows_changed(out: &Array2<f64>, expected: &Array2<f64>) -> Vec<usize> {
    let mut rows = Vec::new();
    for (at, (row, expected)) in out.rows().into_iter().zip(expected.rows()).enumerate() {
        if row.iter().any(|x| x.is_nan()) {
            rows.push(at);
        } else {
            assert_eq!(row, expected, "row {at}");
        }
    }
    rows
}

#[test]
fn bad_positions_touch_the_rows_that_read_them() {
    let (n, head_dim) = (5, 4);
    let [x, at] = [matrix(n, head_dim, 20), positions(n, 1, 21)];
    // Node 4 sees nothing, and no node sees node 0.
    let graph = Graph::from_edges(n, n, [(0, 1), (0, 2), (1, 2), (2, 3), (3, 1), (3, 4)]).unwrap();
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
    let config = GraphRopeConfig::new(head_dim, Layout::Interleaved).learn_frequencies(true);
    let rope = config.init(Flash::new()).unwrap();
    let (out, grads) = train(&rope, &inputs.with_positions(at.view(), at.view()).unwrap());
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (node, queries) in [(0, vec![]), (1, vec![0, 3]), (2, vec![0, 1]), (4, vec![3])] {
            let mut key_at = at.clone();
            key_at[[node, 0]] = bad;
            let inputs = inputs.with_positions(at.view(), key_at.view()).unwrap();
            let (new, new_grads) = train(&rope, &inputs);
            assert_eq!(rows_changed(&new, &out), queries);
            assert_eq!(rows_changed(&new_grads.query, &grads.query), queries);
            let is_nan = new_grads.params[0].iter().any(|x| x.is_nan());
            assert_eq!(is_nan, !queries.is_empty());
        }
        for (node, queries) in [(0, vec![0]), (1, vec![1]), (4, vec![])] {
            let mut query_at = at.clone();
            query_at[[node, 0]] = bad;
            let inputs = inputs.with_positions(query_at.view(), at.view()).unwrap();
            let (new, new_grads) = train(&rope, &inputs);
            assert_eq!(rows_changed(&new, &out), queries);
            assert_eq!(rows_changed(&new_grads.query, &grads.query), queries);
        }
    }

    let distances = Array1::from_iter([0.5, 1.5, -2.0, 3.0, 0.25, 1.0]);
    let rope: EdgeRope<f64> = config.init_edges().unwrap();
    // A bias hides the first edge, from this head only.
    let mut bias = Array2::zeros((6, 1));
    bias[[0, 0]] = f64::NEG_INFINITY;
    let inputs = inputs.with_bias(bias.view()).unwrap();
    let (out, grads) = train(&rope, &inputs.with_distances(distances.view()).unwrap());
    for bad in [f64::NAN, f64::INFINITY] {
        for (edge, queries, keys) in [(0, vec![], vec![]), (4, vec![3], vec![1, 4])] {
            let mut distances = distances.clone();
            distances[edge] = bad;
            let (new, new_grads) = train(&rope, &inputs.with_distances(distances.view()).unwrap());
            assert_eq!(rows_changed(&new, &out), queries);
            assert_eq!(rows_changed(&new_grads.query, &grads.query), queries);
            assert_eq!(rows_changed(&new_grads.key, &grads.key), keys);
            let column =
                |grads: &Gradients<f64>| grads.distances.clone().unwrap().insert_axis(Axis(1));
            let is_nan = new_grads.params[0].iter().any(|x| x.is_nan());
            assert_eq!(is_nan, !queries.is_empty());
            let edges = if queries.is_empty() { vec![] } else { vec![4, 5] };
            assert_eq!(rows_changed(&column(&new_grads), &column(&grads)), edges);
        }
    }
}

#[test]
fn what_nobody_reads_has_no_gradient_whatever_it_holds() {
    let head_dim = 4;
    let key = matrix(3, 2 * head_dim, 27);
    let mut query = matrix(2, 2 * head_dim, 28);
    // Query 1 sees nothing; the first head does not see key 0.
    query.row_mut(1).fill(f64::NAN);
    let graph = Graph::from_edges(2, 3, [(0, 0), (0, 1), (0, 2)]).unwrap();
    let mut bias = Array2::zeros((3, 2));
    bias[[0, 0]] = f64::NEG_INFINITY;
    let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph).unwrap();
    let inputs = inputs.with_heads(2).unwrap().with_bias(bias.view()).unwrap();
    let (query_at, mut key_at) = (positions(2, 1, 29), positions(3, 1, 30));
    let distances = array![1.0, 2.0, 3.0];
    for layout in LAYOUTS {
        let config = GraphRopeConfig::new(head_dim, layout).learn_frequencies(true);
        let of_nodes = config.init(Flash::new()).unwrap();
        let of_edges = config.init_edges().unwrap();
        let at = inputs.with_positions(query_at.view(), key_at.view()).unwrap();
        let apart = inputs.with_distances(distances.view()).unwrap();
        for (rope, inputs) in [(&of_nodes as &dyn Attention<f64>, at), (&of_edges, apart)] {
            let (_, grads) = train(rope, &inputs);
            assert!(grads.params[0].iter().all(|x| x.is_finite()), "{}", rope.name());
            assert!(grads.key.iter().all(|x| x.is_finite()), "{}", rope.name());
        }
        key_at[[0, 0]] = f64::NAN;
        let at = inputs.with_positions(query_at.view(), key_at.view()).unwrap();
        let (_, grads) = train(&of_nodes, &at);
        let of_first_head = grads.key.slice(s![0, ..head_dim]);
        assert!(of_first_head.iter().all(|&x| x == 0.0), "{of_first_head}");
        assert!(grads.key.slice(s![0, head_dim..]).iter().all(|x| x.is_nan()));
        key_at[[0, 0]] = 0.5;
    }
}

#[test]
fn gradient_descent_finds_the_frequencies() {
    // Learns rotations from the outputs that they give.
    let (n, head_dim) = (31, 4);
    let (x, at) = (matrix(n, head_dim, 22), positions(n, 1, 23) / 4.0);
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let inputs = inputs.with_positions(at.view(), at.view()).unwrap();
    let config = |theta| GraphRopeConfig::new(head_dim, Layout::Half).frequencies(theta);
    let target = config(array![[0.8, 0.3]]).init::<f64, _>(Flash::new()).unwrap();
    let target = target.forward(&inputs).unwrap();
    let config = config(array![[0.7, 0.35]]).learn_frequencies(true);
    let mut rope = config.init(Flash::new()).unwrap();
    for _ in 0..200 {
        let (out, saved) = rope.forward_train(&inputs).unwrap();
        let grads = rope.backward(&inputs, &saved, (out - &target).view()).unwrap();
        params::update(&mut rope, &grads.params, |_, mut theta, grad| {
            theta.scaled_add(-0.02, &grad)
        })
        .unwrap();
    }
    assert_abs_diff_eq!(rope.frequencies(), array![[0.8, 0.3]], epsilon = 1e-3);
}

#[test]
fn frequencies_come_and_go_by_name() {
    let config = GraphRopeConfig::new(4, Layout::Half).learn_frequencies(true);
    let inner = config.init(Flash::new()).unwrap();
    let mut rope: GraphRope<f64, _> = config.init(inner).unwrap();
    let names = |rope| params::state(rope).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(&rope), ["frequencies", "inner.frequencies"]);
    let new: ArrayD<f64> = array![[3.0, 4.0]].into_dyn();
    let state = [("inner.frequencies", 2.0 * &new), ("frequencies", new)];
    params::load_state(&mut rope, state).unwrap();
    assert_eq!(rope.frequencies(), array![[3.0, 4.0]]);
    assert_eq!(rope.inner().frequencies(), array![[6.0, 8.0]]);
    let fixed: EdgeRope<f32> = GraphRopeConfig::new(4, Layout::Half).init_edges().unwrap();
    assert!(params::zeros(&fixed).is_empty());
    // In the precision of the configuration, for any precision of the data.
    assert_eq!(fixed.frequencies(), array![[1.0, 0.01]]);
}

#[test]
fn frequencies_that_are_not_learned_are_buffers() {
    let config = |base| GraphRopeConfig::new(4, Layout::Half).base(base);
    let fixed: EdgeRope<f32> = config(1e4).init_edges().unwrap();
    let rounded = [("frequencies".to_owned(), array![[1.0f32, 0.01]].into_dyn())];
    assert_eq!(params::state(&fixed), rounded);
    assert_eq!(params::buffers(&fixed), rounded);

    // Loading a state of the same configuration changes no digit; another's is restored as it was saved.
    let mut same: EdgeRope<f32> = config(1e4).init_edges().unwrap();
    params::load_state(&mut same, params::state(&fixed)).unwrap();
    assert_eq!(same.frequencies(), array![[1.0, 0.01]]);
    let mut other: EdgeRope<f32> = config(9.0).init_edges().unwrap();
    params::load_state(&mut other, params::state(&fixed)).unwrap();
    assert_eq!(other.frequencies(), array![[1.0, f64::from(0.01f32)]]);
    let mut double: EdgeRope<f64> = config(9.0).init_edges().unwrap();
    let exact: EdgeRope<f64> = config(1e4).init_edges().unwrap();
    params::load_state(&mut double, params::state(&exact)).unwrap();
    assert_eq!(double.frequencies(), array![[1.0, 0.01]]);

    // Learned and fixed frequencies have the same name, so each loads the other's.
    let learned: EdgeRope<f64> = config(7.0).learn_frequencies(true).init_edges().unwrap();
    params::load_state(&mut double, params::state(&learned)).unwrap();
    assert_eq!(double.frequencies(), learned.frequencies());
    assert_eq!((params::zeros(&learned).len(), params::buffers(&learned).len()), (1, 0));

    // Inside other mechanisms, prefixed with their names.
    let inner: GraphRope<f64, _> = config(1e4).init(Flash::new()).unwrap();
    let outer = config(100.0).learn_frequencies(true).init(inner).unwrap();
    let layer = MultiHeadConfig::new(4, 1).bias(false);
    let layer = layer.init(outer, &mut rng(5)).unwrap();
    let state = params::state(&layer).into_iter().map(|(name, _)| name);
    let expected =
        ["in_proj_weight", "out_proj.weight", "inner.frequencies", "inner.inner.frequencies"];
    assert_eq!(state.collect::<Vec<_>>(), expected);
    assert_eq!(params::zeros(&layer).len(), 3);
}

#[test]
fn bad_configurations_are_errors() {
    let new = |head_dim| GraphRopeConfig::new(head_dim, Layout::Half);
    for (config, field) in [
        (new(0), "rotary_dim"),
        (new(7), "rotary_dim"),
        (new(8).rotary_dim(3), "rotary_dim"),
        (new(8).rotary_dim(0), "rotary_dim"),
        (new(8).rotary_dim(10), "rotary_dim"),
        (new(8).axes(0), "axes"),
        (new(8).axes(5), "axes"),
        (new(8).base(0.0), "base"),
        (new(8).base(-2.0), "base"),
        (new(8).base(f64::NAN), "base"),
        (new(8).base(f64::INFINITY), "base"),
        (new(2).frequencies(array![[f64::INFINITY]]), "frequencies"),
    ] {
        let error = config.init::<f64, _>(Flash::new()).unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgument { argument: at, .. } if at == field),
            "{error}"
        );
        assert_eq!(config.init_edges::<f64>().unwrap_err(), error);
    }
    let shape = new(8).frequencies(array![[1.0, 2.0, 3.0]]).init::<f64, _>(Flash::new());
    let expected = vec![1, 4];
    let error = Error::Shape { what: "frequencies".into(), expected, actual: vec![1, 3] };
    assert_eq!(shape.unwrap_err(), error);
    assert!(new(4).frequencies(Array2::zeros((0, 2))).init::<f64, _>(Flash::new()).is_err());
    let error = new(8).axes(2).init_edges::<f64>().unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { argument: "axes", .. }), "{error}");
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let x = matrix(3, 8, 24);
    let at = positions(3, 1, 25);
    let two = positions(3, 2, 26);
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let config = GraphRopeConfig::new(4, Layout::Half);
    let rope = config.init(Flash::new()).unwrap();
    let edges = config.init_edges().unwrap();
    let in_heads = inputs.with_heads(2).unwrap();
    let missing = |mechanism: &'static str, channel| {
        Err(Error::MissingInput { mechanism: mechanism.into(), channel })
    };
    assert_eq!(rope.forward(&in_heads), missing("graph_rope", Channel::Positions));
    assert_eq!(edges.forward(&in_heads), missing("edge_rope", Channel::Distances));
    let shape = |what: &'static str, expected: [usize; 2], actual: [usize; 2]| {
        let (expected, actual) = (expected.to_vec(), actual.to_vec());
        Err(Error::Shape { what: what.into(), expected, actual })
    };
    let wrong_axes = in_heads.with_positions(two.view(), two.view()).unwrap();
    assert_eq!(rope.forward(&wrong_axes), shape("query positions", [3, 1], [3, 2]));
    // One head of 8 columns.
    let wrong_heads = inputs.with_positions(at.view(), at.view()).unwrap();
    assert_eq!(rope.forward(&wrong_heads), shape("query", [3, 4], [3, 8]));
    let distances = Array1::zeros(9);
    let wrong_heads = inputs.with_distances(distances.view()).unwrap();
    assert_eq!(edges.forward(&wrong_heads), shape("query", [3, 4], [3, 8]));
}

/// Linear attention over rotated rows estimates exact attention over them.
#[test]
fn performer_inside_estimates_the_rotated_softmax() {
    let [query, key, value] = [1, 2, 3].map(|seed| 0.4 * matrix(23, 8, seed));
    let at = positions(23, 1, 4);
    let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
    let inputs = inputs.with_positions(at.view(), at.view()).unwrap();
    let rope = GraphRopeConfig::new(8, Layout::Half);
    let exact = rope.init(Flash::new()).unwrap().forward(&inputs).unwrap();
    let unrotated = Flash::new().forward(&inputs).unwrap();
    let mut rng = rng(5);
    let performer = PerformerConfig::new(8, 20_000).init(&mut rng).unwrap();
    let estimate = rope.init(performer).unwrap().forward(&inputs).unwrap();
    let distance = |a: &Array2<f64>| (a - &exact).mapv(|x| x * x).sum().sqrt();
    assert!(distance(&estimate) < 0.1 * distance(&unrotated), "{}", distance(&estimate));
}

#[test]
fn positions_are_trained_inside_other_mechanisms() -> Result<()> {
    let rng = &mut rng(31);
    let config = GraphRopeConfig::new(4, Layout::Half).axes(2);
    let rope = || config.init::<f64, _>(Flash::new());
    let experts = (0..2).map(|_| Ok(Box::new(rope()?) as Box<dyn Attention<f64>>));
    let experts = experts.collect::<Result<Vec<_>>>()?;
    let twice = config.clone().learn_frequencies(true).init(rope()?)?;
    let dual = DualSpaceConfig::new(Fusion::Gated, 4);
    let mechanisms: [(bool, Box<dyn Attention<f64>>); 4] = [
        (false, Box::new(MultiHeadConfig::new(4, 1).init(twice, rng)?)),
        (false, Box::new(MoeConfig::new(4, 1).init(experts, rng)?)),
        (false, Box::new(LocalGlobal::gated(4, 1, rope()?, rope()?, rng)?)),
        (true, Box::new(dual.init(rope()?, rope()?, rope()?, rng)?)),
    ];
    for (reads_latent, mut mechanism) in mechanisms {
        let shapes = Shapes::new(4, 4, 4);
        let shapes = if reads_latent { shapes.reads_latent() } else { shapes };
        check_gradients(&mut mechanism, &shapes).unwrap_or_else(|e| panic!("{e}"));
    }
    Ok(())
}

//! `LocalGlobal` against plain attention under an explicit mask, and against sums by hand.

mod common;

use approx::assert_abs_diff_eq;
use common::close::{assert_close, close};
use common::random::{matrix, normal, rng};
use common::strategies::causal_patterns;
use graph_attention::ndarray::{Array1, Array2, Axis, array, s};
use graph_attention::testing::{Shapes, check_attention, check_gradients};
use graph_attention::{
    Attention, Causal, Channel, Dropout, EdgeGatConfig, Error, Flash, Gradients, Graph, Inputs,
    LocalGlobal, MultiHeadConfig, Params, Result, ScaledDotProduct, edge_gat::Score,
    local_global::Window, params,
};
use proptest::collection::vec;
use proptest::prelude::*;
use rand::{RngExt, rngs::Xoshiro256PlusPlus};

/// The pattern of a sliding window, as a mask of pairs.
#[derive(Clone, Debug)]
struct Pattern {
    sides: [i64; 2],
    dilation: i64,
    globals: Vec<usize>,
}

impl Pattern {
    fn attention(&self, flash: Flash) -> LocalGlobal<f64> {
        let [left, right] = self.sides.map(|keys| keys as usize);
        let window = Window::sides(left, right).dilation(self.dilation as usize);
        LocalGlobal::sliding_window(window.globals(&self.globals), flash).unwrap()
    }

    /// `offset` is the key at which query 0 stands.
    fn mask(&self, num_queries: usize, num_keys: usize, offset: i64) -> Array2<bool> {
        let is_global = |place: i64| self.globals.iter().any(|&global| global as i64 == place);
        Array2::from_shape_fn((num_queries, num_keys), |(query, key)| {
            let (query, key) = (query as i64 + offset, key as i64);
            let steps = (query - key) / self.dilation;
            let in_reach = (-self.sides[1]..=self.sides[0]).contains(&steps);
            let in_window = steps * self.dilation == query - key && in_reach;
            in_window || is_global(query) || is_global(key)
        })
    }
}

/// Asserts that two mechanisms, each on its own inputs, have equal outputs and gradients.
#[track_caller]
fn assert_same(
    what: &str,
    ours: (&dyn Attention<f64>, &Inputs<'_, f64>),
    theirs: (&dyn Attention<f64>, &Inputs<'_, f64>),
) {
    if let Err(error) = is_same(ours, theirs) {
        panic!("{what}: {error}");
    }
}

fn is_same(
    (attention, inputs): (&dyn Attention<f64>, &Inputs<'_, f64>),
    (oracle, plain): (&dyn Attention<f64>, &Inputs<'_, f64>),
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (out, saved) = attention.forward_train(inputs)?;
    let (expected, plain_saved) = oracle.forward_train(plain)?;
    close("out", 1e-12, &out, &expected)?;
    close("out without training", 0.0, &attention.forward(inputs)?, &out)?;
    let grad_out = matrix(out.nrows(), out.ncols(), 99);
    let grads = attention.backward(inputs, &saved, grad_out.view())?;
    let expected = oracle.backward(plain, &plain_saved, grad_out.view())?;
    close("grads.query", 1e-12, &grads.query, &expected.query)?;
    close("grads.key", 1e-12, &grads.key, &expected.key)?;
    close("grads.value", 1e-12, &grads.value, &expected.value)?;
    match (&grads.bias, &expected.bias) {
        (None, None) => {}
        (Some(bias), Some(expected)) => close("grads.bias", 1e-12, bias, expected)?,
        _ => return Err("grads.bias of one alone".into()),
    }
    Ok(())
}

#[test]
fn sliding_window_is_attention_under_the_mask_at_every_size() -> Result<()> {
    for n in [1, 2, 7, 95, 96, 97, 193] {
        let mut rng = rng(n as u64);
        let [q, k, v] = [3, 3, 2].map(|columns| normal(n, columns, &mut rng));
        let inputs = Inputs::dense(q.view(), k.view(), v.view())?;
        for sides in [[0, 0], [1, 1], [30, 30], [0, 2], [95, 5], [96, 96], [300, 300]] {
            for dilation in [1, 2, 3] {
                for globals in [vec![], vec![0], vec![n - 1, n / 2, 0, n / 2]] {
                    let pattern = Pattern { sides, dilation, globals };
                    let mask = pattern.mask(n, n, 0);
                    let attention = pattern.attention(Flash::new());
                    for inputs in [inputs, inputs.with_causal()] {
                        let plain = inputs.with_mask(mask.view())?;
                        let what = format!("{n} {pattern:?} {:?}", inputs.causal_alignment());
                        let oracle = ScaledDotProduct::new();
                        assert_same(&what, (&attention, &inputs), (&oracle, &plain));
                    }
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Windows around global positions touch, overlap and cross the ends, in every class.
    #[test]
    fn sliding_window_is_attention_under_the_mask_whatever_the_globals(
        (num_queries, num_keys) in (1..70usize, 1..70usize),
        causal in causal_patterns(),
        globals in vec(0..110usize, 0..9),
        (left, right, dilation) in (0..9i64, 0..9i64, 1..5i64),
    ) {
        let offset = match causal {
            Some(Causal::Offset(offset)) => offset as i64,
            Some(Causal::BottomRight) => num_keys as i64 - num_queries as i64,
            _ => 0,
        };
        let len = (num_queries as i64 + offset.max(0)).max(num_keys as i64) as usize;
        let globals = globals.into_iter().map(|global| global % len).collect();
        let pattern = Pattern { sides: [left, right], dilation, globals };
        let mask = pattern.mask(num_queries, num_keys, offset);
        let [q, k, v] = [(num_queries, 6, 17), (num_keys, 6, 18), (num_keys, 4, 19)]
            .map(|(rows, columns, seed)| matrix(rows, columns, seed));
        let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_heads(2).unwrap();
        let inputs = causal.map_or(inputs, |causal| inputs.with_causal_alignment(causal));
        let plain = inputs.with_mask(mask.view()).unwrap();
        let attention = pattern.attention(Flash::new().with_tiles(9, 8).unwrap());
        is_same((&attention, &inputs), (&ScaledDotProduct::new(), &plain))
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

/// Copies of the queries, keys and values would be three times the output, and as much again in the
/// gradients.
#[test]
fn globals_copy_little() -> Result<()> {
    let (n, columns) = (4096, 4);
    let x = matrix(n, columns, 18);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    // Few enough multiplications to stay on the one thread whose allocations are counted.
    let peaks = |window: Window| -> Result<[u64; 2]> {
        let attention = LocalGlobal::sliding_window(window, Flash::new().with_tiles(16, 16)?)?;
        let mut out = Array2::zeros((n, columns));
        let forward = allocation_counter::measure(|| {
            attention.forward_into(&inputs, out.view_mut()).unwrap()
        });
        let saved = attention.forward_train_into(&inputs, out.view_mut())?;
        let mut grads = Gradients::zeros(&inputs, &attention)?;
        let backward = allocation_counter::measure(|| {
            let grads = grads.view_mut();
            attention.backward_into(&inputs, &saved, x.view(), grads).unwrap();
        });
        Ok([forward, backward].map(|info| info.bytes_max))
    };
    let alone = peaks(Window::new(1))?;
    let of_array = (n * columns * size_of::<f64>()) as u64;
    let with_globals = peaks(Window::new(1).globals(&[7, 2_000, 4_000]))?;
    for (alone, with_globals) in alone.into_iter().zip(with_globals) {
        assert!(with_globals < alone + 2 * of_array, "{with_globals} beside {alone}, {of_array}");
    }
    Ok(())
}

/// Inputs with grouped heads of any layout, mask, bias and dropout.
#[test]
fn sliding_window_honours_every_channel() -> Result<()> {
    let mut rng = rng(5);
    for (num_queries, num_keys) in [(101, 101), (41, 103), (103, 41), (5, 103), (103, 5)] {
        // Every other row and column of larger arrays, backwards.
        let [q, k, v] = [(num_queries, 6 * 3), (num_keys, 2 * 3), (num_keys, 2 * 5)]
            .map(|(rows, columns)| normal(2 * rows, 3 * columns, &mut rng));
        let [q, k, v] = [&q, &k, &v].map(|array| array.slice(s![..;-2, ..;3]));
        let pairs = num_queries * num_keys;
        let hides =
            Array2::from_shape_simple_fn((num_queries, num_keys), || rng.random_range(0..5) > 0);
        let matrix = normal(num_queries, num_keys, &mut rng);
        let mut per_head = normal(pairs, 6, &mut rng);
        per_head.mapv_inplace(|logit| if logit > 1.0 { f64::NEG_INFINITY } else { logit });
        let shared = per_head.slice(s![.., ..1]).to_owned();
        let dropout = Dropout { probability: 0.3, seed: 3 };
        let dense = Inputs::dense(q, k, v)?.with_grouped_heads(6, 2)?;
        let globals = vec![1, num_keys.min(num_queries) - 1];
        for (sides, dilation, globals) in [
            ([2, 2], 1, vec![]),
            ([17, 9], 1, globals.clone()),
            ([5, 5], 3, vec![]),
            ([0, 4], 7, globals),
        ] {
            let pattern = Pattern { sides, dilation, globals };
            for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight)] {
                let (inputs, offset) = match causal {
                    None => (dense, 0),
                    Some(Causal::TopLeft) => (dense.with_causal(), 0),
                    Some(alignment) => (
                        dense.with_causal_alignment(alignment),
                        num_keys as i64 - num_queries as i64,
                    ),
                };
                let mask = pattern.mask(num_queries, num_keys, offset);
                let mut both = mask.clone();
                both.zip_mut_with(&hides, |both, &shows| *both &= shows);
                let attention = pattern.attention(Flash::new().with_scale(0.7)?.with_tiles(13, 7)?);
                let oracle = ScaledDotProduct::new().with_scale(0.7)?;
                let with = |inputs: Inputs<'_, f64>, mask, channels: Result<_>| {
                    let what = format!("{num_queries} {num_keys} {pattern:?} {causal:?}");
                    let plain = inputs.with_mask(mask)?;
                    assert_same(&what, (&attention, &channels?), (&oracle, &plain));
                    Result::Ok(())
                };
                with(inputs, mask.view(), Ok(inputs))?;
                with(inputs, both.view(), inputs.with_mask(hides.view()))?;
                for bias in [&matrix, &per_head, &shared] {
                    let inputs = inputs.with_bias(bias.view())?.with_dropout(dropout)?;
                    with(inputs, mask.view(), Ok(inputs))?;
                    with(inputs, both.view(), inputs.with_mask(hides.view()))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_window_over_everything_is_dense_attention() -> Result<()> {
    let x = normal(131, 6, &mut rng(1));
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?;
    for radius in [130, usize::MAX] {
        let attention = LocalGlobal::sliding_window(Window::new(radius), Flash::new())?;
        for inputs in [inputs, inputs.with_causal()] {
            assert_eq!(attention.forward(&inputs)?, Flash::new().forward(&inputs)?);
        }
    }
    let globals: Vec<usize> = (0..131).collect();
    let attention = LocalGlobal::sliding_window(Window::new(0).globals(&globals), Flash::new())?;
    assert_same("all global", (&attention, &inputs), (&Flash::new(), &inputs));
    Ok(())
}

#[test]
fn sliding_window_hides_edges_of_a_graph_and_selected_queries_keep_their_places() -> Result<()> {
    let mut rng = rng(6);
    let (num_queries, num_keys) = (37, 41);
    let edges = (0..900).map(|_| (rng.random_range(0..num_queries), rng.random_range(0..num_keys)));
    let graph = Graph::from_edges(num_queries, num_keys, edges.collect::<Vec<_>>())?;
    let [q, k, v] = [num_queries, num_keys, num_keys].map(|rows| normal(rows, 4, &mut rng));
    let logits = normal(900, 1, &mut rng);
    let matrix = normal(num_queries, num_keys, &mut rng);
    let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph)?
        .with_bias(logits.view())?
        .with_dropout(Dropout { probability: 0.2, seed: 1 })?;
    let dense = Inputs::dense(q.view(), k.view(), v.view())?
        .with_dropout(Dropout { probability: 0.2, seed: 1 })?;
    // Evenly spaced and not.
    let some: [Vec<usize>; 3] = [
        (0..num_queries).filter(|query| query % 5 < 2).collect(),
        (2..num_queries).step_by(3).collect(),
        vec![31],
    ];
    for (sides, dilation, globals) in [([4, 3], 1, vec![]), ([2, 2], 3, vec![7, 30, 40])] {
        let pattern = Pattern { sides, dilation, globals };
        let attention = pattern.attention(Flash::new());
        for (causal, offset) in [(Causal::TopLeft, 0), (Causal::BottomRight, 4)] {
            let mask = pattern.mask(num_queries, num_keys, offset);
            let sparse = sparse.with_causal_alignment(causal);
            let plain = sparse.with_mask(mask.view())?;
            let oracle = ScaledDotProduct::new();
            assert_same("graph", (&attention, &sparse), (&oracle, &plain));
            let all =
                [sparse, dense.with_causal_alignment(causal), dense.with_bias(matrix.view())?];
            for (inputs, queries) in
                all.iter().flat_map(|inputs| some.iter().map(move |q| (inputs, q)))
            {
                if inputs.causal_alignment().is_none() && offset > 0 {
                    continue;
                }
                let selected = inputs.select_queries(queries)?;
                let plain = inputs.with_mask(mask.view())?.select_queries(queries)?;
                let (inputs, plain) = (selected.inputs(), plain.inputs());
                assert_same("selected", (&attention, &inputs), (&oracle, &plain));
                let weights = attention.attention_weights(&inputs)?;
                assert_close("selected", 1e-13, &weights, &oracle.attention_weights(&plain)?);
            }
        }
    }
    Ok(())
}

#[test]
fn nan_reaches_the_queries_that_see_it_and_no_others() -> Result<()> {
    let n = 107;
    let x = normal(n, 3, &mut rng(7));
    for (sides, dilation, globals) in [([9, 9], 1, vec![]), ([4, 0], 2, vec![50, 106])] {
        let pattern = Pattern { sides, dilation, globals };
        let mask = pattern.mask(n, n, 0);
        let attention = pattern.attention(Flash::new().with_tiles(16, 16)?);
        let clean = Inputs::dense(x.view(), x.view(), x.view())?;
        let (expected, saved) = attention.forward_train(&clean)?;
        let clean_grads = attention.backward(&clean, &saved, x.view())?;
        for node in [0, 31, 50, 106] {
            let mut poisoned = x.clone();
            poisoned.row_mut(node).fill(f64::NAN);
            for (key, value) in [(&poisoned, &x), (&x, &poisoned)] {
                let inputs = Inputs::dense(x.view(), key.view(), value.view())?;
                let out = attention.forward(&inputs)?;
                for (query, row) in out.rows().into_iter().enumerate() {
                    if mask[[query, node]] {
                        assert!(row.iter().all(|o| o.is_nan()), "{query} {node}");
                    } else {
                        assert_eq!(row, expected.row(query), "{query} {node}");
                    }
                }
            }
            // In its query and the gradient of its output: reaches the keys it sees.
            let inputs = Inputs::dense(poisoned.view(), x.view(), x.view())?;
            let (out, saved) = attention.forward_train(&inputs)?;
            let grads = attention.backward(&inputs, &saved, poisoned.view())?;
            for other in 0..n {
                assert_eq!(out.row(other)[0].is_nan(), other == node);
                assert_eq!(grads.query.row(other)[0].is_nan(), other == node);
                for (grad, clean) in
                    [(&grads.key, &clean_grads.key), (&grads.value, &clean_grads.value)]
                {
                    let (grad, clean) = (grad[[other, 0]], clean[[other, 0]]);
                    assert_eq!(grad.is_nan(), mask[[node, other]], "{node} {other}");
                    if !grad.is_nan() {
                        assert_abs_diff_eq!(grad, clean, epsilon = 1e-12);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_sliding_window_are_the_derivatives() {
    for window in [Window::new(0), Window::new(1), Window::new(1).dilation(2).globals(&[2, 0, 2])] {
        let flash = Flash::new().with_tiles(2, 3).unwrap();
        let mut attention = LocalGlobal::sliding_window(window, flash).unwrap();
        let shapes = Shapes::new(4 * 3, 2 * 3, 2 * 5).kv_heads(4, 2);
        let report = check_gradients(&mut attention, &shapes).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(report.refused, Vec::<&str>::new());
    }
}

/// Returns a graph with parallel edges, nodes with only one kind of edge, and one node without edges.
fn layered(rng: &mut Xoshiro256PlusPlus) -> Result<(Graph, Vec<u8>)> {
    let mut edges: Vec<_> =
        (0..300).map(|_| (rng.random_range(0..28), rng.random_range(0..31))).collect();
    let mut layers: Vec<u8> = (0..300).map(|_| rng.random_range(0..3)).collect();
    for (query, layer) in [(28, 0), (28, 0), (29, 2), (29, 1)] {
        edges.push((query, edges.len() % 31));
        layers.push(layer);
    }
    Ok((Graph::from_edges(31, 31, edges)?, layers))
}

#[test]
fn the_union_is_one_softmax() -> Result<()> {
    let mut rng = rng(8);
    let (graph, layers) = layered(&mut rng)?;
    let x = normal(31, 6, &mut rng);
    let all_layers: Vec<u8> = (0..31 * 31).map(|_| rng.random_range(0..3)).collect();
    let logits = normal(graph.num_edges(), 2, &mut rng)
        .mapv(|logit| if logit > 0.8 { f64::NEG_INFINITY } else { logit });
    let sparse = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_heads(2)?;
    let sparse = sparse.with_edge_layers(&layers)?;
    let dense = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?;
    let dense = dense.with_edge_layers(&all_layers)?;
    let dropout = Dropout { probability: 0.4, seed: 2 };
    for inputs in [
        sparse,
        sparse.with_causal().with_dropout(dropout)?,
        sparse.with_bias(logits.view())?,
        dense,
        dense.with_causal().with_dropout(dropout)?,
    ] {
        let union = LocalGlobal::joint(Flash::new(), Flash::new());
        assert_same("union", (&union, &inputs), (&ScaledDotProduct::new(), &inputs));
        let weights = union.attention_weights(&inputs)?;
        assert_close("union", 1e-14, &weights, &Flash::new().attention_weights(&inputs)?);
    }

    // With their own scales: logits by hand.
    let inputs = sparse.with_heads(1)?;
    let union = LocalGlobal::joint(Flash::new().with_scale(0.9)?, Flash::new().with_scale(-0.4)?);
    let out = union.forward(&inputs)?;
    for query in 0..31 {
        let logits = graph.row(query).map(|(key, edge)| {
            let scale = if layers[edge] == 0 { 0.9 } else { -0.4 };
            (key, scale * x.row(query).dot(&x.row(key)))
        });
        let (mut sum, mut mean) = (0.0, Array1::<f64>::zeros(6));
        for (key, logit) in logits {
            sum += logit.exp();
            mean.scaled_add(logit.exp(), &x.row(key));
        }
        let expected = if sum > 0.0 { mean / sum } else { mean };
        assert_close(format_args!("query {query}"), 1e-13, &out.row(query), &expected);
    }
    Ok(())
}

fn boxed(attention: impl Attention<f64> + 'static) -> Box<dyn Attention<f64>> {
    Box::new(attention)
}

#[test]
fn the_gate_weighs_two_answers_and_leaves_one_kind_alone() -> Result<()> {
    let mut rng = rng(9);
    let (graph, layers) = layered(&mut rng)?;
    let x = normal(31, 6, &mut rng);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_heads(2)?;
    let inputs = inputs.with_edge_layers(&layers)?;
    let (sharp, soft) = (Flash::new().with_scale(2.0)?, Flash::new().with_scale(0.3)?);
    let mut attention =
        LocalGlobal::gated(3, 2, boxed(sharp.clone()), boxed(soft.clone()), &mut rng)?;
    let mut names = Vec::new();
    attention.visit_params(&mut |name, _| names.push(name.to_owned()));
    assert_eq!(names, ["gate.weight", "gate.bias"]);
    let weight = normal(2, 3, &mut rng);
    let bias = array![0.4, -1.1];
    let state =
        [("gate.weight", weight.clone().into_dyn()), ("gate.bias", bias.clone().into_dyn())];
    params::load_state(&mut attention, state)?;
    let out = attention.forward(&inputs)?;
    let weights = attention.attention_weights(&inputs)?;

    let one_kind = |is_global: bool| {
        let edges: Vec<usize> =
            (0..layers.len()).filter(|&edge| (layers[edge] > 0) == is_global).collect();
        let mut ends = vec![(0, 0); layers.len()];
        for query in 0..31 {
            graph.row(query).for_each(|(key, edge)| ends[edge] = (query, key));
        }
        Graph::from_edges(31, 31, edges.iter().map(|&edge| ends[edge])).map(|graph| (graph, edges))
    };
    let (mut total, mut seen_kinds) = (Array2::<f64>::zeros((304, 2)), [0; 4]);
    let (local_graph, local_edges) = one_kind(false)?;
    let (global_graph, global_edges) = one_kind(true)?;
    let local = Inputs::graph(x.view(), x.view(), x.view(), &local_graph)?.with_heads(2)?;
    let global = Inputs::graph(x.view(), x.view(), x.view(), &global_graph)?.with_heads(2)?;
    let (local_out, global_out) = (sharp.forward(&local)?, soft.forward(&global)?);
    let (local_weights, global_weights) =
        (sharp.attention_weights(&local)?, soft.attention_weights(&global)?);
    for query in 0..31 {
        let kinds = [&local_graph, &global_graph].map(|graph| !graph.neighbors(query).is_empty());
        seen_kinds[usize::from(kinds[0]) + 2 * usize::from(kinds[1])] += 1;
        for head in 0..2 {
            let columns = s![query, 3 * head..3 * head + 3];
            let logit = weight.row(head).dot(&x.slice(columns)) + bias[head];
            let share = match kinds {
                [true, true] => 1.0 / (1.0 + f64::exp(-logit)),
                [is_local, _] => f64::from(u8::from(is_local)),
            };
            let expected =
                share * &local_out.slice(columns) + (1.0 - share) * &global_out.slice(columns);
            let what = format_args!("query {query}, head {head}");
            assert_close(what, 1e-14, &out.slice(columns), &expected);
            for (graph, edges, weights, share) in [
                (&local_graph, &local_edges, &local_weights, share),
                (&global_graph, &global_edges, &global_weights, 1.0 - share),
            ] {
                for (_, edge) in graph.row(query) {
                    total[[edges[edge], head]] = share * weights[[edge, head]];
                }
            }
        }
    }
    assert!(seen_kinds.iter().all(|&count| count > 0), "{seen_kinds:?}");
    assert_abs_diff_eq!(weights, total, epsilon = 1e-15);
    Ok(())
}

#[test]
fn a_bias_may_leave_a_head_one_kind() -> Result<()> {
    let mut rng = rng(10);
    let x = normal(3, 4, &mut rng);
    let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2)])?;
    // Head 0 of query 0 does not see its global pair.
    let bias = array![[0.0, 0.0], [f64::NEG_INFINITY, 0.0]];
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_heads(2)?;
    let inputs = inputs.with_edge_layers(&[0, 4])?.with_bias(bias.view())?;
    let [local, global] = [boxed(Flash::new()), boxed(Flash::new())];
    let mut attention = LocalGlobal::gated(2, 2, local, global, &mut rng)?;
    let zeros = [
        ("gate.weight", Array2::<f64>::zeros((2, 2)).into_dyn()),
        ("gate.bias", Array1::<f64>::zeros(2).into_dyn()),
    ];
    params::load_state(&mut attention, zeros)?;
    let out = attention.forward(&inputs)?;
    assert_eq!(out.slice(s![0, ..2]), x.slice(s![1, ..2]));
    let mean = (&x.slice(s![1, 2..]) + &x.slice(s![2, 2..])) / 2.0;
    assert_abs_diff_eq!(out.slice(s![0, 2..]), mean, epsilon = 1e-15);
    Ok(())
}

#[test]
fn a_gate_between_mechanisms_with_edge_features_keeps_the_laws() -> Result<()> {
    let gat = |score| EdgeGatConfig::new(score, 5, 4, 2).edge_dim(3).init(&mut rng(20));
    let [local, global] = [boxed(gat(Score::GatV2)?), boxed(gat(Score::DotProduct)?)];
    let mut attention = LocalGlobal::gated(5, 1, local, global, &mut rng(21))?;
    let shapes = Shapes::new(5, 5, 5).edge_dim(3);
    for report in [check_attention(&attention, &shapes), check_gradients(&mut attention, &shapes)] {
        let report = report.unwrap_or_else(|e| panic!("{e}"));
        // Refused by graph attention networks.
        assert!(report.refused.iter().all(|case| case.contains("bias")), "{report:?}");
        assert!(report.checked.len() >= 14, "{report:?}");
    }
    Ok(())
}

#[test]
fn bad_calls_are_errors_that_say_what_is_wrong() -> Result<()> {
    let x = normal(7, 4, &mut rng(11));
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let refused = LocalGlobal::<f64>::sliding_window(Window::new(2).dilation(0), Flash::new());
    assert!(refused.unwrap_err().to_string().contains("dilation: expected at least 1, got 0"));
    let attention = LocalGlobal::sliding_window(Window::new(2).globals(&[7, 3]), Flash::new())?;
    let refused = attention.forward(&inputs).unwrap_err().to_string();
    assert_eq!(refused, "globals: expected positions below 7, got 7");
    assert!(attention.attention_weights(&inputs).is_err());
    // Positions are checked even if their queries are not selected.
    assert!(attention.forward(&inputs.select_queries(&[2])?.inputs()).is_err());
    let wide = normal(9, 4, &mut rng(12));
    assert!(attention.forward(&Inputs::dense(x.view(), wide.view(), wide.view())?).is_ok());

    let union = LocalGlobal::<f64>::joint(Flash::new(), Flash::new());
    let missing =
        Error::MissingInput { mechanism: "local_global".into(), channel: Channel::EdgeLayers };
    assert_eq!(union.forward(&inputs).unwrap_err(), missing);
    assert_eq!(union.attention_weights(&inputs).unwrap_err(), missing);

    let layers = vec![0; 49];
    let inputs = inputs.with_edge_layers(&layers)?;
    let gate = |head_dim, heads, global| {
        LocalGlobal::gated(head_dim, heads, boxed(Flash::new()), global, &mut rng(13))
    };
    for (head_dim, heads) in [(0, 1), (4, 0)] {
        let refused = gate(head_dim, heads, boxed(Flash::new()));
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let refused = gate(2, 2, boxed(Flash::new()))?.forward(&inputs).unwrap_err().to_string();
    assert!(refused.contains("heads of the inputs, which must match the gate"), "{refused}");
    let refused = gate(3, 1, boxed(Flash::new()))?.forward(&inputs).unwrap_err();
    assert!(matches!(refused, Error::Shape { what, .. } if what == "query"));
    let wider = MultiHeadConfig::new(4, 1).output_dim(5).init(Flash::new(), &mut rng(14))?;
    let refused = gate(4, 1, boxed(wider))?.forward(&inputs).unwrap_err().to_string();
    assert!(refused.contains("global (multi_head), which must match local (flash)"), "{refused}");
    let gat = EdgeGatConfig::new(Score::Gat, 4, 4, 1).edge_dim(2).init(&mut rng(15))?;
    let refused = gate(4, 1, boxed(gat))?.forward(&inputs).unwrap_err().to_string();
    assert!(refused.starts_with("global (edge_gat) needs edge features"), "{refused}");

    // Saved by another form of `LocalGlobal`.
    let (out, saved) = union.forward_train(&inputs)?;
    let refused = gate(4, 1, boxed(Flash::new()))?.backward(&inputs, &saved, out.view());
    assert!(matches!(refused, Err(Error::SavedMismatch { .. })));
    Ok(())
}

#[test]
fn shards_of_a_long_line_agree_with_the_whole() -> Result<()> {
    // Longer than a mask, as in the other tests, could be.
    let n = 20_011;
    let x = matrix(n, 4, 16);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_causal();
    let window = Window::new(70).dilation(2).globals(&[10_007]);
    let out = LocalGlobal::sliding_window(window, Flash::new())?.forward(&inputs)?;
    for query in [0, 9_999, 10_007, 10_008, 20_010] {
        let mut keys: Vec<usize> = match query {
            10_007 => (0..=query).collect(),
            _ => (0..=70).filter_map(|step: usize| query.checked_sub(2 * step)).collect(),
        };
        if query > 10_007 && !keys.contains(&10_007) {
            keys.push(10_007);
        }
        let seen = x.select(Axis(0), &keys);
        let single = Inputs::single(x.row(query), seen.view(), seen.view())?;
        let expected = ScaledDotProduct::new().forward(&single)?;
        assert_close(format_args!("query {query}"), 1e-13, &out.row(query), &expected.row(0));
    }
    Ok(())
}

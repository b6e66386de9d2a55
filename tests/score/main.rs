//! Functions of the logits: laws, an oracle of plain loops, gradients, and the golden answers of PyTorch,
//! transformers and ONNX.

#[path = "../common/mod.rs"]
mod common;
mod golden;

use common::close::{assert_close, assert_close_in_size};
use common::random::{matrix, normal, rng};
use common::{hold_simd, refused};
use graph_attention::local_global::Window;
use graph_attention::ndarray::{Array1, Array2, Axis, array, aview1, s};
use graph_attention::score::{
    Alibi, BucketBias, Buckets, Elementwise, ScoreFunction, ScorePair, Sinks, SoftCap,
};
use graph_attention::testing::{Shapes, check_gradients};
use graph_attention::{
    Attention, Causal, Channel, Dropout, Flash, Float, Gradients, Graph, GraphRopeConfig, Inputs,
    LocalGlobal, MultiHeadConfig, Pair, ScaledDotProduct, Segments, graph_rope::Layout,
};
use rand::RngExt;

const HEADS: usize = 4;

/// All ready-made functions with parameters one after the other, for [`HEADS`] heads.
fn everything<F: Float>() -> impl ScoreFunction<F> + Clone {
    let weight = |buckets: &Buckets, seed| normal(buckets.count(), HEADS, &mut rng(seed));
    let distances = Buckets::t5(12, 20, true).unwrap();
    let layers = Buckets::edge_layers(3).unwrap();
    let biases = (
        BucketBias::from_weight(distances.clone(), weight(&distances, 1)).unwrap(),
        BucketBias::from_weight(layers.clone(), weight(&layers, 2)).unwrap(),
    );
    let sinks = Sinks::from_logits(array![0.5, -1.0, 2.0, 9.0].mapv(F::from_f64)).unwrap();
    let alibi = Alibi::new(HEADS).unwrap().learned();
    ((SoftCap::new(1.5).unwrap(), alibi), (biases, sinks))
}

/// Inputs of every kind that [`everything`] reads.
struct Sample {
    arrays: [Array2<f64>; 3],
    graph: Graph,
    segments: Segments,
    dense: bool,
    layers: Vec<u8>,
    bias: Array2<f64>,
    mask: Vec<bool>,
}

impl Sample {
    fn new(queries: usize, keys: usize, pattern: &str) -> Self {
        let mut rng = rng(queries as u64 * 1000 + keys as u64);
        let arrays =
            [(queries, 4 * 5), (keys, 2 * 5), (keys, 2 * 3)].map(|(n, d)| normal(n, d, &mut rng));
        let edges: Vec<_> = (0..queries)
            .flat_map(|query| (0..keys).map(move |key| (query, key)))
            .filter(|_| rng.random_bool(if keys < 300 { 0.3 } else { 0.02 }))
            .collect();
        let graph = Graph::from_edges(queries, keys, edges).unwrap();
        let cut = [queries / 3, queries - queries / 3];
        let segments =
            Segments::from_query_key_lengths(&cut, &[keys - keys / 4, keys / 4]).unwrap();
        let pairs = match pattern {
            "dense" => queries * keys,
            "graph" => graph.num_edges(),
            _ => segments.num_pairs(),
        };
        let segments_or =
            if pattern == "packed" { segments } else { Segments::from_lengths(&[]).unwrap() };
        Self {
            arrays,
            graph,
            segments: segments_or,
            dense: pattern == "dense",
            layers: (0..pairs).map(|_| rng.random_range(0..3)).collect(),
            bias: normal(pairs, HEADS, &mut rng),
            mask: (0..pairs).map(|_| rng.random_bool(0.8)).collect(),
        }
    }

    fn inputs(&self) -> Inputs<'_, f64> {
        let [query, key, value] = self.arrays.each_ref().map(|array| array.view());
        let inputs = match (self.dense, self.segments.is_empty()) {
            (true, _) => Inputs::dense(query, key, value),
            (_, true) => Inputs::graph(query, key, value, &self.graph),
            _ => Inputs::packed(query, key, value, &self.segments),
        };
        let inputs = inputs.unwrap().with_grouped_heads(HEADS, 2).unwrap();
        inputs.with_edge_layers(&self.layers).unwrap()
    }

    fn variants(&self) -> Vec<Inputs<'_, f64>> {
        let plain = self.inputs();
        let biased = plain.with_bias(self.bias.view()).unwrap();
        let masked = biased.with_pair_mask(aview1(&self.mask)).unwrap();
        let dropped = plain.with_dropout(Dropout { probability: 0.2, seed: 3 }).unwrap();
        vec![
            plain,
            plain.with_causal(),
            masked.with_causal_alignment(Causal::BottomRight),
            dropped.with_causal_alignment(Causal::Offset(2)),
            masked.with_pair_weights(self.bias.view()).unwrap(),
        ]
    }
}

fn samples() -> Vec<Sample> {
    // The last one has a graph with few edges among many keys.
    [(1, 40), (5, 9), (37, 61), (130, 210), (61, 37), (4, 400)]
        .into_iter()
        .flat_map(|(queries, keys)| {
            ["dense", "graph", "packed"].map(|pattern| Sample::new(queries, keys, pattern))
        })
        .collect()
}

fn assert_same_gradients(what: &str, tolerance: f64, a: &Gradients<f64>, b: &Gradients<f64>) {
    assert_close(format!("{what}: query"), tolerance, &a.query, &b.query);
    assert_close(format!("{what}: key"), tolerance, &a.key, &b.key);
    assert_close(format!("{what}: value"), tolerance, &a.value, &b.value);
    if let (Some(a), Some(b)) = (&a.bias, &b.bias) {
        assert_close(format!("{what}: bias"), tolerance, a, b);
    }
    if let (Some(a), Some(b)) = (&a.pair_weights, &b.pair_weights) {
        assert_close(format!("{what}: weights of pairs"), tolerance, a, b);
    }
    for (number, (a, b)) in a.params.iter().zip(&b.params).enumerate() {
        assert_close_in_size(format!("{what}: parameter {number}"), tolerance, 1.0, a, b);
    }
}

/// Outputs and gradients.
fn run(attention: &impl Attention<f64>, inputs: &Inputs<'_, f64>) -> (Array2<f64>, Gradients<f64>) {
    let (out, saved) = attention.forward_train(inputs).unwrap();
    let grad_out = matrix(out.nrows(), out.ncols(), 77);
    let grads = attention.backward(inputs, &saved, grad_out.view()).unwrap();
    (out, grads)
}

#[test]
fn tiles_and_rows_are_the_plain_form() {
    hold_simd();
    for sample in samples() {
        for inputs in sample.variants() {
            let what = format!("{:?}, {:?}", inputs.pattern(), inputs.causal_alignment());
            let what = &what[..what.len().min(200)];
            let (out, grads) = run(&Flash::new().with_score(everything()), &inputs);
            let (plain, plain_grads) =
                run(&ScaledDotProduct::new().with_score(everything()), &inputs);
            assert_close(what, 1e-13, &out, &plain);
            assert_same_gradients(what, 1e-11, &grads, &plain_grads);
            let small = Flash::new().with_tiles(20, 7).unwrap().with_score(everything());
            assert_close(what, 1e-13, &run(&small, &inputs).0, &plain);
        }
    }
}

#[test]
fn single_precision_is_close() {
    hold_simd();
    let sample = Sample::new(60, 90, "dense");
    let [query, key, value] = sample.arrays.each_ref().map(|array| array.mapv(|x| x as f32));
    let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
    let inputs = inputs.with_grouped_heads(HEADS, 2).unwrap();
    let inputs = inputs.with_edge_layers(&sample.layers).unwrap();
    let out = Flash::new().with_score(everything()).forward(&inputs).unwrap();
    let exact = ScaledDotProduct::new().with_score(everything()).forward(&sample.inputs()).unwrap();
    assert_close("f32", 3e-6, &out.mapv(f64::from), &exact);
}

#[test]
fn gradients_are_derivatives() {
    hold_simd();
    fn check(attention: impl Attention<f64> + 'static, shapes: Shapes) {
        check_gradients(&mut { attention }, &shapes).unwrap();
    }
    let heads = || Shapes::new(4 * 3, 2 * 3, 2 * 2).kv_heads(HEADS, 2);
    let relative = || BucketBias::new(Buckets::clipped(2).unwrap(), HEADS).unwrap();
    let layers = || BucketBias::new(Buckets::edge_layers(256).unwrap(), HEADS).unwrap();
    let alibi = || Alibi::new(HEADS).unwrap().learned();
    let cap = || SoftCap::new(0.7).unwrap();
    let sinks = || Sinks::new(HEADS).unwrap();
    let bent = Elementwise::new(
        |s: f64, pair: ScorePair| s + 0.1 * (s * f64::from(pair.distance) + pair.head as f64).sin(),
        |s: f64, pair: ScorePair| {
            let distance = f64::from(pair.distance);
            1.0 + 0.1 * distance * (s * distance + pair.head as f64).cos()
        },
    );
    check(Flash::new().with_score(cap()), heads());
    check(Flash::new().with_score(alibi()), heads());
    check(Flash::new().with_score(relative()), heads());
    check(Flash::new().with_score(layers()), heads());
    check(Flash::new().with_score(sinks()), heads());
    check(Flash::new().with_score(bent), heads());
    check(Flash::new().with_score((alibi(), (cap(), relative()))), heads());
    check(Flash::new().with_score((sinks(), (sinks(), cap()))), heads());
    check(ScaledDotProduct::new().with_score((cap(), sinks())), heads());
    let window = LocalGlobal::sliding_window(
        Window::new(2).globals(&[1]),
        Flash::new().with_score((alibi(), sinks())),
    );
    check(window.unwrap(), heads());
    let one_head = Alibi::from_slopes(array![0.3]).unwrap().learned();
    let rope = GraphRopeConfig::new(3, Layout::Half).rotary_dim(2);
    let rope = rope.init(Flash::new().with_score((one_head, cap()))).unwrap();
    check(rope, Shapes::new(3, 3, 2).axes(1));
    let layer = MultiHeadConfig::new(8, HEADS).init(Flash::new().with_score(sinks()), &mut rng(4));
    check(layer.unwrap(), Shapes::new(8, 8, 8).bias_heads(HEADS));
}

#[test]
fn functions_that_do_nothing_change_no_bit() {
    hold_simd();
    let minus_infinity = Array1::from_elem(HEADS, f64::NEG_INFINITY);
    for sample in samples() {
        for inputs in sample.variants() {
            let (out, grads) = run(&Flash::new(), &inputs);
            let same = |other: (Array2<f64>, Gradients<f64>)| {
                assert_eq!(out, other.0);
                assert_eq!(grads.query, other.1.query);
                assert_eq!(grads.key, other.1.key);
                assert_eq!(grads.value, other.1.value);
                assert_eq!(grads.bias, other.1.bias);
            };
            same(run(&Flash::new().with_score(()), &inputs));
            same(run(&Flash::new().with_score(SoftCap::new(f64::INFINITY).unwrap()), &inputs));
            let sinks = Sinks::from_logits(minus_infinity.clone()).unwrap();
            same(run(&Flash::new().with_score(sinks), &inputs));
            let identity = Elementwise::new(|s: f64, _| s, |_: f64, _| 1.0);
            same(run(&Flash::new().with_score(identity), &inputs));
        }
    }
}

#[test]
fn a_large_soft_cap_is_none() {
    hold_simd();
    let sample = Sample::new(37, 61, "dense");
    let (out, grads) = run(&Flash::new(), &sample.inputs());
    // c tanh(s / c) = s − s³ / (3 c²) + …
    let capped = run(&Flash::new().with_score(SoftCap::new(1e7).unwrap()), &sample.inputs());
    assert_close("out", 1e-12, &out, &capped.0);
    assert_same_gradients("gradients", 1e-11, &grads, &capped.1);
}

/// The bias of each pair and head as an array, pairs × heads.
fn as_array(
    inputs: &Inputs<'_, f64>,
    mut bias: impl FnMut(Pair, usize, i32) -> f64,
) -> Array2<f64> {
    let mut array = Array2::zeros((inputs.num_pairs(), HEADS));
    let [queries, keys] = [inputs.num_queries(), inputs.num_keys()].map(|n| n as i32);
    let offset = match inputs.causal_alignment() {
        Some(Causal::BottomRight) => keys - queries,
        Some(Causal::Offset(offset)) => offset as i32,
        _ => 0,
    };
    for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
        for head in 0..HEADS {
            let distance = pair.key as i32 - pair.query as i32 - offset;
            array[[pair.index, head]] = bias(pair, head, distance);
        }
    }
    array
}

#[test]
fn tables_are_biases() {
    hold_simd();
    let buckets = Buckets::t5(12, 20, true).unwrap();
    let weight = matrix(12, HEADS, 5);
    let table = BucketBias::from_weight(buckets.clone(), weight.clone()).unwrap();
    let layers = Buckets::edge_layers(3).unwrap();
    let of_layers = BucketBias::from_weight(layers, matrix(3, HEADS, 6)).unwrap();
    let alibi = Alibi::new(HEADS).unwrap().learned();
    for sample in samples().iter().filter(|sample| sample.segments.is_empty()) {
        for causal in [None, Some(Causal::BottomRight), Some(Causal::Offset(3))] {
            let inputs = sample.inputs();
            let inputs = causal.map_or(inputs, |causal| inputs.with_causal_alignment(causal));
            let plain =
                |array: &Array2<f64>| run(&Flash::new(), &inputs.with_bias(array.view()).unwrap());

            let of_pair = as_array(&inputs, |_, head, distance| {
                weight[[buckets.of_distance(distance).unwrap(), head]]
            });
            let (out, grads) = run(&Flash::new().with_score(table.clone()), &inputs);
            let (expected, expected_grads) = plain(&of_pair);
            assert_close("relative positions", 1e-14, &out, &expected);
            let mut summed = Array2::zeros((12, HEADS));
            let of_bias = expected_grads.bias.unwrap();
            as_array(&inputs, |pair, head, distance| {
                summed[[buckets.of_distance(distance).unwrap(), head]] +=
                    of_bias[[pair.index, head]];
                0.0
            });
            assert_close("its gradient", 1e-12, &grads.params[0], &summed.into_dyn());
            assert_close("query", 1e-12, &grads.query, &expected_grads.query);

            let of_pair = as_array(&inputs, |pair, head, _| {
                matrix(3, HEADS, 6)[[usize::from(sample.layers[pair.index]), head]]
            });
            let (out, _) = run(&Flash::new().with_score(of_layers.clone()), &inputs);
            assert_close("edge layers", 1e-14, &out, &plain(&of_pair).0);

            let of_pair = as_array(&inputs, |_, head, distance| {
                -f64::from(distance.abs()) * 0.25f64.powi(head as i32 + 1)
            });
            let (out, grads) = run(&Flash::new().with_score(alibi.clone()), &inputs);
            let (expected, expected_grads) = plain(&of_pair);
            assert_close("ALiBi", 1e-14, &out, &expected);
            let mut summed = Array1::zeros(HEADS);
            let of_bias = expected_grads.bias.unwrap();
            as_array(&inputs, |pair, head, distance| {
                summed[head] -= f64::from(distance.abs()) * of_bias[[pair.index, head]];
                0.0
            });
            assert_close_in_size("slopes", 1e-12, 1.0, &grads.params[0], &summed.into_dyn());
        }
    }
}

#[test]
fn packed_batches_and_blocks_count_within_their_segments() {
    hold_simd();
    let sample = Sample::new(30, 40, "packed");
    let packed = Flash::new().with_score(everything());
    for inputs in sample.variants() {
        if inputs.dropout().is_some() {
            continue;
        }
        let (out, grads) = run(&packed, &inputs);
        let mut params: Vec<_> = grads.params.iter().map(|grad| grad * 0.0).collect();
        for number in 0..2 {
            let [queries, keys, pairs] = [
                sample.segments.queries(number),
                sample.segments.keys(number),
                sample.segments.pairs(number),
            ];
            let [query, key, value] = &sample.arrays;
            let alone = Inputs::dense(
                query.slice(s![queries.clone(), ..]),
                key.slice(s![keys.clone(), ..]),
                value.slice(s![keys, ..]),
            );
            let mut alone = alone.unwrap().with_grouped_heads(HEADS, 2).unwrap();
            alone = alone.with_edge_layers(&sample.layers[pairs.clone()]).unwrap();
            if inputs.bias().is_some() {
                let of_pairs = sample.bias.slice(s![pairs.clone(), ..]);
                alone = alone.with_bias(of_pairs).unwrap();
                if inputs.has(Channel::PairWeights) {
                    alone = alone.with_pair_weights(of_pairs).unwrap();
                }
                alone = alone.with_pair_mask(aview1(&sample.mask[pairs])).unwrap();
            }
            if let Some(causal) = inputs.causal_alignment() {
                alone = alone.with_causal_alignment(causal);
            }
            let (of_segment, saved) = packed.forward_train(&alone).unwrap();
            assert_eq!(out.slice(s![queries.clone(), ..]), of_segment);
            let grad_out = matrix(out.nrows(), out.ncols(), 77);
            let grad_out = grad_out.slice(s![queries.clone(), ..]);
            let of_segment = packed.backward(&alone, &saved, grad_out).unwrap();
            assert_eq!(grads.query.slice(s![queries, ..]), of_segment.query);
            params.iter_mut().zip(of_segment.params).for_each(|(sum, grad)| *sum += &grad);
        }
        for (whole, sum) in grads.params.iter().zip(&params) {
            assert_close_in_size("parameters", 1e-12, 1.0, whole, sum);
        }
    }

    // A block-diagonal graph of the same pairs.
    let blocks = [0, 1].map(|number| {
        let (queries, keys) = (sample.segments.queries(number), sample.segments.keys(number));
        Graph::from_mask(Array2::from_elem((queries.len(), keys.len()), true).view()).unwrap()
    });
    let graph = Graph::block_diagonal(&blocks.each_ref()).unwrap();
    let [query, key, value] = sample.arrays.each_ref().map(|array| array.view());
    let inputs = Inputs::graph(query, key, value, &graph).unwrap();
    let inputs = inputs.with_grouped_heads(HEADS, 2).unwrap();
    let inputs = inputs.with_edge_layers(&sample.layers).unwrap();
    for causal in [Causal::TopLeft, Causal::BottomRight] {
        let of_blocks = packed.forward(&inputs.with_causal_alignment(causal)).unwrap();
        let of_segments = sample.inputs().with_causal_alignment(causal);
        assert_close("blocks", 1e-14, &of_blocks, &packed.forward(&of_segments).unwrap());
    }
}

#[test]
fn selected_queries_keep_their_positions() {
    hold_simd();
    for pattern in ["dense", "graph"] {
        let sample = Sample::new(50, 50, pattern);
        let attention = Flash::new().with_score(everything());
        let some = [3, 4, 17, 18, 30, 31, 32, 33, 41, 49];
        for inputs in sample.variants() {
            let all = attention.forward(&inputs).unwrap();
            let selected = inputs.select_queries(&some).unwrap();
            let out = attention.forward(&selected.inputs()).unwrap();
            assert_close(pattern, 1e-14, &out, &all.select(Axis(0), &some));
        }
    }
}

#[test]
fn pairs_have_their_numbers_and_distances() {
    hold_simd();
    let sample = Sample::new(13, 21, "graph");
    for inputs in [sample.inputs(), Sample::new(13, 21, "dense").inputs()] {
        let known = as_array(&inputs, |pair, head, _| {
            (pair.query * 31 + pair.key * 7 + head) as f64 / 50.0 + pair.index as f64 / 100.0
        });
        let of_pair = known.clone();
        let from_pair = move |s: f64, pair: ScorePair| {
            let number = (pair.query * 31 + pair.key * 7 + pair.head) as f64 / 50.0;
            assert_eq!(number + pair.index as f64 / 100.0, of_pair[[pair.index, pair.head]]);
            assert_eq!(pair.distance, pair.key as i32 - pair.query as i32);
            s + number
        };
        let score = Elementwise::new(from_pair, |_: f64, _| 1.0);
        for selected in [None, Some([2, 3, 7, 8, 9, 10, 11, 12])] {
            let attention = Flash::new().with_score(&score);
            let (out, _) = match selected {
                None => run(&attention, &inputs),
                Some(queries) => {
                    run(&attention, &inputs.select_queries(&queries).unwrap().inputs())
                }
            };
            assert!(out.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn sinks_are_keys_without_values() {
    hold_simd();
    let sample = Sample::new(37, 61, "dense");
    let inputs = sample.inputs().with_causal_alignment(Causal::Offset(0));
    let logits = array![0.5, -1.0, 2.0, 9.0];
    let attention = Flash::new().with_score(Sinks::from_logits(logits.clone()).unwrap());
    let (out, grads) = run(&attention, &inputs);

    // One more key with the logit 0 · q, a bias and a value of 0.
    let [query, key, value] = &sample.arrays;
    let zero = |array: &Array2<f64>| {
        let mut longer = Array2::zeros((array.nrows() + 1, array.ncols()));
        longer.slice_mut(s![1.., ..]).assign(array);
        longer
    };
    let (key, value) = (zero(key), zero(value));
    let bias = Array2::from_shape_fn((37 * 62, HEADS), |(pair, head)| {
        let (query, key) = (pair / 62, pair % 62);
        if key == 0 {
            logits[head]
        } else if key <= query + 1 {
            0.0
        } else {
            f64::NEG_INFINITY
        }
    });
    let with_key = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
    let with_key = with_key.with_grouped_heads(HEADS, 2).unwrap();
    let (expected, expected_grads) = run(&Flash::new(), &with_key.with_bias(bias.view()).unwrap());
    assert_close("out", 1e-14, &out, &expected);
    assert_close("query", 1e-13, &grads.query, &expected_grads.query);
    let of_bias = expected_grads.bias.unwrap();
    let of_sinks = of_bias.slice(s![..;62, ..]).sum_axis(Axis(0));
    assert_close("sinks", 1e-13, &grads.params[0], &of_sinks.into_dyn());

    // Merged once with the results over two shards of the keys.
    let shard = |keys: std::ops::Range<usize>| {
        let [query, key, value] = sample.arrays.each_ref().map(|array| array.view());
        let (key, value) = (key.slice_move(s![keys.clone(), ..]), value.slice_move(s![keys, ..]));
        Inputs::dense(query, key, value).unwrap().with_grouped_heads(HEADS, 2).unwrap()
    };
    let shards = [shard(0..20), shard(20..61)];
    let whole = sample.inputs();
    let (out, grads) = run(&attention, &whole);
    let of_sinks = attention.sink_partial(&whole).unwrap();
    let mut merged = of_sinks.clone();
    for shard in &shards {
        merged = merged.merge(&attention.forward_partial(shard).unwrap()).unwrap();
    }
    assert_close("merged", 1e-14, &merged.out().to_owned(), &out);
    let grad_out = matrix(out.nrows(), out.ncols(), 77);
    let mut sum = Array2::zeros(grads.query.raw_dim());
    for shard in &shards {
        let of_shard = attention.backward_partial(shard, &merged, grad_out.view(), None).unwrap();
        assert!(of_shard.params[0].iter().all(|&grad| grad == 0.0));
        sum += &of_shard.query;
    }
    assert_close("query", 1e-14, &sum, &grads.query);
    let (_, of_log_sum) = merged.merge_vjp(&of_sinks, grad_out.view(), None).unwrap();
    let mut params = vec![Array1::zeros(HEADS).into_dyn()];
    attention.sink_partial_backward_into(&whole, of_log_sum.view(), &mut params).unwrap();
    assert_close("sinks", 1e-14, &params[0], &grads.params[0]);
    let wider = Array2::zeros((37, HEADS + 1));
    refused(
        attention.sink_partial_backward_into(&whole, wider.view(), &mut params),
        "Shape | grad_log_sum_exp | [37, 4] | [37, 5]",
    );
}

#[test]
fn a_query_without_keys_gets_zeros_beside_a_sink() {
    hold_simd();
    let x = matrix(3, 2, 1);
    let graph = Graph::from_edges(3, 3, [(0, 1)]).unwrap();
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
    let attention = Flash::new().with_score(Sinks::new(1).unwrap());
    let (out, grads) = run(&attention, &inputs);
    assert_eq!(out.slice(s![1.., ..]), Array2::<f64>::zeros((2, 2)));
    assert!(grads.params[0].iter().chain(&grads.query).all(|x| x.is_finite()));
    // A sink far above all logits, and one far below.
    for (sink, shares) in [(1e4, 0.0), (-1e4, 1.0)] {
        let attention = Flash::new().with_score(Sinks::from_logits(array![sink]).unwrap());
        let (out, grads) = run(&attention, &inputs);
        assert_eq!(out.row(0), &x.row(1) * shares);
        assert!(grads.params[0].iter().chain(&grads.query).all(|x| x.is_finite()));
    }
}

#[test]
fn nan_stays_in_its_rows() {
    hold_simd();
    let mut sample = Sample::new(40, 40, "dense");
    let attention = Flash::new().with_score(everything());
    let clean = run(&attention, &sample.inputs().with_causal());
    sample.arrays[1][[30, 2]] = f64::NAN;
    let (out, grads) = run(&attention, &sample.inputs().with_causal());
    assert_eq!(out.slice(s![..30, ..]), clean.0.slice(s![..30, ..]));
    assert!(out.slice(s![30.., ..6]).iter().all(|x| x.is_nan()));
    assert_eq!(grads.query.slice(s![..30, ..]), clean.1.query.slice(s![..30, ..]));
}

#[test]
fn windows_and_decoding_pass_the_function_on() {
    hold_simd();
    let sample = Sample::new(120, 120, "dense");
    let inputs = sample.inputs().with_causal();
    let score = (Alibi::new(HEADS).unwrap().learned(), Sinks::new(HEADS).unwrap());
    let window = Window::sides(20, 0).globals(&[0, 50]);
    let local =
        LocalGlobal::sliding_window(window, Flash::new().with_score(score.clone())).unwrap();
    let mask = Array2::from_shape_fn((120, 120), |(i, j): (usize, usize)| {
        i.abs_diff(j) <= 20 || [0, 50].contains(&i) || [0, 50].contains(&j)
    });
    let (out, grads) = run(&local, &inputs);
    let flash = Flash::new().with_score(score);
    let (expected, expected_grads) = run(&flash, &inputs.with_mask(mask.view()).unwrap());
    assert_close("window", 1e-13, &out, &expected);
    assert_same_gradients("window", 1e-12, &grads, &expected_grads);

    let whole = flash.forward(&inputs).unwrap();
    let mut caches = vec![graph_attention::KeyValueCache::new()];
    for rows in [0..50, 50..51, 51..120] {
        let [query, key, value] =
            sample.arrays.each_ref().map(|array| array.slice(s![rows.clone(), ..]));
        let new = Inputs::dense(query, key, value).unwrap().with_grouped_heads(HEADS, 2).unwrap();
        let out = flash.decode(&new.with_causal(), &mut caches).unwrap();
        assert_close("decode", 1e-13, &out, &whole.slice(s![rows, ..]).to_owned());
    }
}

#[test]
fn gradients_of_weights_include_sinks() {
    hold_simd();
    let sample = Sample::new(9, 12, "dense");
    let inputs = sample.inputs();
    let flash = Flash::new().with_score(everything());
    let weights = flash.attention_weights(&inputs).unwrap();
    let sums = weights.to_shape((9, 12, HEADS)).unwrap().sum_axis(Axis(1));
    assert!(sums.iter().all(|&sum| sum < 1.0));
    let grads = matrix(9 * 12, HEADS, 3);
    let grads = flash.attention_weights_backward(&inputs, grads.view()).unwrap();
    let [.., of_sinks] = &grads.params[..] else { unreachable!() };
    assert!(of_sinks.iter().all(|grad| grad.is_finite() && *grad != 0.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    hold_simd();
    refused(SoftCap::new(0.0), "InvalidArgument | cap | positive");
    refused(SoftCap::new(f64::NAN), "InvalidArgument | cap | NaN");
    refused(Alibi::<f64>::new(0), "InvalidArgument | heads");
    refused(Sinks::<f32>::from_logits(array![]), "InvalidArgument | heads");
    refused(Buckets::t5(1, 128, false), "InvalidArgument | buckets | at least 2");
    refused(Buckets::t5(7, 128, true), "InvalidArgument | buckets | even");
    refused(Buckets::t5(32, 8, true), "InvalidArgument | max_distance | above 8");
    refused(Buckets::clipped(0), "InvalidArgument | max_distance");
    refused(Buckets::edge_layers(257), "InvalidArgument | buckets | 257");
    let buckets = Buckets::clipped(3).unwrap();
    refused(
        BucketBias::from_weight(buckets.clone(), Array2::<f64>::zeros((6, 1))),
        "Shape | weight | 7",
    );
    refused(BucketBias::<f64>::new(buckets.clone(), 0), "InvalidArgument | heads");

    let sample = Sample::new(9, 12, "dense");
    let inputs = sample.inputs();
    let three = |score: &dyn ScoreFunction<f64>, expected| {
        refused(Flash::new().with_score(score).forward(&inputs), expected);
        refused(ScaledDotProduct::new().with_score(score).forward(&inputs), expected);
        let window = LocalGlobal::sliding_window(Window::new(2), Flash::new().with_score(score));
        refused(window.unwrap().forward(&inputs), expected);
    };
    three(&Alibi::new(3).unwrap(), "Shape | slopes | 4 | 3");
    three(&Sinks::new(3).unwrap(), "Shape | sinks | 4 | 3");
    three(&BucketBias::new(buckets, 3).unwrap(), "Shape | heads | 4 | 3");
    let layers = |count| BucketBias::new(Buckets::edge_layers(count).unwrap(), HEADS).unwrap();
    three(&layers(2), "InvalidArgument | edge layers | below 2");
    let [query, key, value] = sample.arrays.each_ref().map(|array| array.view());
    let without = Inputs::dense(query, key, value).unwrap().with_grouped_heads(HEADS, 2).unwrap();
    let score = layers(3);
    refused(
        Flash::new().with_score(&score).forward(&without),
        "MissingInput | bucket_bias | with_edge_layers",
    );
}

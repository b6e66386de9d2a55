//! Softmax attention over keys, edges or pairs in several shards: merged outputs and summed gradients are
//! those of the whole, for every mechanism that has a partial result.

mod common;

use common::close::{assert_close, assert_close_in_size};
use common::random::{normal, rng};
use graph_attention::ndarray::{
    Array1, Array2, Array3, ArrayD, ArrayView2, ArrayViewMut2, Axis, Ix2, Ix3, s,
};
use graph_attention::{
    Attention, Causal, Dropout, EdgeGat, EdgeGatConfig, EdgeRope, Flash, Float, Gradients, Graph,
    GraphRopeConfig, Inputs, LocalGlobal, Partial, Result, ScaledDotProduct, Segments,
    edge_gat::Score, graph_rope::Layout, local_global::Window,
};
use rand::RngExt;
use std::ops::Range;

/// A mechanism with a partial result.
trait Divisible<F: Float>: Attention<F> {
    fn forward_part(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>>;
    fn backward_part(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
    ) -> Result<Gradients<F>>;
    /// Whether the output is that of the softmax.
    fn ends_with_softmax(&self) -> bool {
        self.name() != "edge_gat"
    }
}

macro_rules! impl_divisible {
    ($($mechanism:ty),*) => {$(
        impl<F: Float> Divisible<F> for $mechanism {
            fn forward_part(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
                self.forward_partial(inputs)
            }
            fn backward_part(
                &self,
                inputs: &Inputs<'_, F>,
                partial: &Partial<F>,
                grad_out: ArrayView2<'_, F>,
                grad_log_sum_exp: Option<ArrayView2<'_, F>>,
            ) -> Result<Gradients<F>> {
                self.backward_partial(inputs, partial, grad_out, grad_log_sum_exp)
            }
        }
    )*};
}

impl_divisible!(Flash, ScaledDotProduct, LocalGlobal<F>, EdgeGat<F>, EdgeRope<F>);

/// Some of the pairs of whole inputs: the numbers of their queries, keys and pairs in the whole.
struct Shard<'a, F: Float> {
    queries: Vec<usize>,
    keys: Vec<usize>,
    pairs: Vec<usize>,
    inputs: Inputs<'a, F>,
}

impl<F: Float> Shard<'_, F> {
    /// Adds the gradients of a shard to those of the whole.
    fn add(&self, grads: &Gradients<F>, whole: &mut Gradients<F>) {
        add_rows(whole.query.view_mut(), &self.queries, &grads.query);
        add_rows(whole.key.view_mut(), &self.keys, &grads.key);
        add_rows(whole.value.view_mut(), &self.keys, &grads.value);
        if let (Some(whole), Some(grads)) = (&mut whole.edge_features, &grads.edge_features) {
            add_rows(whole.view_mut(), &self.pairs, grads);
        }
        if let (Some(whole), Some(grads)) = (&mut whole.bias, &grads.bias) {
            if let Ok(grads) = grads.view().into_dimensionality::<Ix2>() {
                let whole = whole.view_mut().into_dimensionality::<Ix2>().unwrap();
                add_rows(whole, &self.pairs, &grads.to_owned());
            } else {
                let grads = grads.view().into_dimensionality::<Ix3>().unwrap();
                for ((head, query, key), &grad) in grads.indexed_iter() {
                    whole[[head, self.queries[query], self.keys[key]]] += grad;
                }
            }
        }
        if let (Some(whole), Some(grads)) = (&mut whole.distances, &grads.distances) {
            self.pairs.iter().zip(grads).for_each(|(&pair, &grad)| whole[pair] += grad);
        }
        for (whole, grad) in whole.params.iter_mut().zip(&grads.params) {
            *whole += grad;
        }
    }
}

fn add_rows<F: Float>(mut whole: ArrayViewMut2<'_, F>, rows: &[usize], part: &Array2<F>) {
    assert_eq!(rows.len(), part.nrows());
    rows.iter().zip(part.rows()).for_each(|(&row, part)| {
        let mut row = whole.row_mut(row);
        row += &part;
    });
}

/// The arrays of gradients with their names.
fn named<F: Float>(grads: Gradients<F>) -> Vec<(String, ArrayD<F>)> {
    let mut all = vec![
        ("query".to_owned(), grads.query.into_dyn()),
        ("key".to_owned(), grads.key.into_dyn()),
        ("value".to_owned(), grads.value.into_dyn()),
    ];
    all.extend(grads.bias.map(|grad| ("bias".to_owned(), grad)));
    all.extend(grads.edge_features.map(|grad| ("edge_features".to_owned(), grad.into_dyn())));
    all.extend(grads.distances.map(|grad| ("distances".to_owned(), grad.into_dyn())));
    let params = grads.params.into_iter().enumerate();
    all.extend(params.map(|(number, grad)| (format!("param {number}"), grad)));
    all
}

fn assert_grads_close<F: Float>(
    what: &str,
    tolerance: f64,
    actual: Gradients<F>,
    expected: &Gradients<F>,
) {
    let rows = expected.query.nrows() as f64;
    for ((name, actual), (_, expected)) in named(actual).into_iter().zip(named(expected.clone())) {
        // Sums of many terms are larger than the terms. Those of parameters are over all rows, each with a
        // rounding error of its own: the error grows with the root of their number, though the sum may cancel.
        let is_param = name.starts_with("param");
        let tolerance = if is_param { tolerance * (rows.sqrt() / 4.0) } else { tolerance };
        assert_close_in_size(format_args!("{what}, {name}"), tolerance, 1.0, &actual, &expected);
    }
}

fn merged<F: Float>(
    mechanism: &dyn Divisible<F>,
    whole: &Inputs<'_, F>,
    shards: &[Shard<'_, F>],
) -> Result<(Partial<F>, Vec<Partial<F>>)> {
    let parts: Vec<_> =
        shards.iter().map(|shard| mechanism.forward_part(&shard.inputs)).collect::<Result<_>>()?;
    let columns = parts[0].out().ncols();
    let mut merged = Partial::empty(whole.num_queries(), columns, parts[0].sum().ncols())?;
    for (shard, part) in shards.iter().zip(&parts) {
        merged = merged.merge_queries(&shard.queries, part)?;
    }
    Ok((merged, parts))
}

/// The sum of the gradients of the shards in both ways: from the merged result, and through
/// [`Partial::merge_vjp`].
fn summed<F: Float>(
    mechanism: &dyn Divisible<F>,
    whole: &Inputs<'_, F>,
    shards: &[Shard<'_, F>],
    grad_out: &Array2<F>,
    grad_log_sum: Option<&Array2<F>>,
) -> Result<[Gradients<F>; 2]> {
    let (merged, parts) = merged(mechanism, whole, shards)?;
    let [mut from_merged, mut from_parts] =
        [Gradients::zeros(whole, mechanism)?, Gradients::zeros(whole, mechanism)?];
    for (shard, part) in shards.iter().zip(&parts) {
        let all = merged.select_queries(&shard.queries)?;
        let g = grad_out.select(Axis(0), &shard.queries);
        let h = grad_log_sum.map(|grad| grad.select(Axis(0), &shard.queries));
        let h = h.as_ref().map(|grad| grad.view());
        shard.add(&mechanism.backward_part(&shard.inputs, &all, g.view(), h)?, &mut from_merged);
        let (g, h) = all.merge_vjp(part, g.view(), h)?;
        let grads = mechanism.backward_part(&shard.inputs, part, g.view(), Some(h.view()))?;
        shard.add(&grads, &mut from_parts);
    }
    Ok([from_merged, from_parts])
}

/// Checks that outputs, log-sum-exps and gradients of the shards are those of the whole, to 1e-14 in `f64`.
fn check<F: Float>(
    what: &str,
    mechanism: &dyn Divisible<F>,
    whole: &Inputs<'_, F>,
    shards: &[Shard<'_, F>],
) -> Result<()> {
    let what = format!("{} of {what}, {}", mechanism.name(), std::any::type_name::<F>());
    let tolerance = if size_of::<F>() == 8 { 1e-14 } else { 4e-6 };
    let all = mechanism.forward_part(whole)?;
    let (merged, _) = merged(mechanism, whole, shards)?;
    let finite = |x: F| if x == F::neg_infinity() { F::from_f64(-77.0) } else { x };
    let log_sums = [&merged, &all].map(|partial| partial.log_sum_exp().mapv(finite));
    assert_close(format_args!("{what}, out"), tolerance, &merged.out(), &all.out());
    assert_close(format_args!("{what}, log_sum_exp"), tolerance, &log_sums[0], &log_sums[1]);

    let (queries, columns) = all.out().dim();
    let grad_out = normal::<F>(queries, columns, &mut rng(91));
    let grad_log_sum = normal::<F>(queries, all.sum().ncols(), &mut rng(92));
    if mechanism.ends_with_softmax() {
        let (out, saved) = mechanism.forward_train(whole)?;
        assert_close(format_args!("{what}, forward"), tolerance, &merged.out(), &out.view());
        let expected = mechanism.backward(whole, &saved, grad_out.view())?;
        for grads in summed(mechanism, whole, shards, &grad_out, None)? {
            assert_grads_close(&what, tolerance, grads, &expected);
        }
    }
    let view = Some(grad_log_sum.view());
    let expected = mechanism.backward_part(whole, &all, grad_out.view(), view)?;
    for grads in summed(mechanism, whole, shards, &grad_out, Some(&grad_log_sum))? {
        assert_grads_close(&format!("{what}, with h"), tolerance, grads, &expected);
    }
    Ok(())
}

/// Queries, keys and values of several heads, two of which share a head of keys and values.
struct Arrays<F> {
    query: Array2<F>,
    key: Array2<F>,
    value: Array2<F>,
}

const HEADS: usize = 4;

impl<F: Float> Arrays<F> {
    fn new(queries: usize, keys: usize) -> Self {
        let rng = &mut rng(queries as u64);
        Self {
            query: normal(queries, HEADS * 3, rng),
            key: normal(keys, HEADS / 2 * 3, rng),
            value: normal(keys, HEADS / 2 * 5, rng),
        }
    }

    fn dense(&self, queries: Range<usize>, keys: Range<usize>) -> Result<Inputs<'_, F>> {
        Inputs::dense(
            self.query.slice(s![queries, ..]),
            self.key.slice(s![keys.clone(), ..]),
            self.value.slice(s![keys, ..]),
        )?
        .with_grouped_heads(HEADS, HEADS / 2)
    }
}

fn numbers(range: Range<usize>) -> Vec<usize> {
    range.collect()
}

/// The numbers of the pairs of queries and keys in dense inputs.
fn dense_pairs(queries: &Range<usize>, keys: &Range<usize>, num_keys: usize) -> Vec<usize> {
    let row = |query: usize| keys.clone().map(move |key| query * num_keys + key);
    queries.clone().flat_map(row).collect()
}

fn softmaxes<F: Float>() -> [Box<dyn Divisible<F>>; 3] {
    [
        Box::new(Flash::new()),
        Box::new(Flash::new().with_tiles(16, 24).unwrap()),
        Box::new(ScaledDotProduct::new()),
    ]
}

/// The softmaxes, and that of rotated keys.
fn softmaxes_and_rope<F: Float>() -> Vec<Box<dyn Divisible<F>>> {
    let config = GraphRopeConfig::new(3, Layout::Half).rotary_dim(2).learn_frequencies(true);
    let mut all: Vec<Box<dyn Divisible<F>>> = softmaxes().into();
    all.push(Box::new(config.init_edges().unwrap()));
    all
}

/// Consecutive keys in shards, one of them empty and one of a single key.
fn cuts(num_keys: usize) -> Vec<Range<usize>> {
    let at = [0, num_keys / 3, num_keys / 3, num_keys / 3 + 1, num_keys];
    at.windows(2).map(|cut| cut[0]..cut[1]).collect()
}

fn dense_keys<F: Float>() -> Result<()> {
    for (queries, keys) in [(1, 4), (5, 13), (20, 37), (131, 149)] {
        let arrays = Arrays::<F>::new(queries, keys);
        let rng = &mut rng(7);
        // Hides some pairs of all heads, and others of one head; all of query 0's in some shards, and all
        // of query 3 everywhere.
        let mask = Array2::from_shape_fn((queries, keys), |(query, key)| {
            query != 3 && (query > 0 || key < keys / 3) && rng.random_bool(0.8)
        });
        let mut bias: Array3<F> = normal(HEADS * queries, keys, rng)
            .into_shape_with_order((HEADS, queries, keys))
            .unwrap();
        bias.iter_mut().step_by(7).for_each(|bias| *bias = F::neg_infinity());
        let distances: Array2<F> = normal(queries * keys, 1, rng);
        let pairs_of = |keys_of: &Range<usize>| dense_pairs(&(0..queries), keys_of, keys);
        let distances_of =
            |keys: Range<usize>| distances.select(Axis(0), &pairs_of(&keys)).remove_axis(Axis(1));
        let of_shards: Vec<_> = cuts(keys).into_iter().map(distances_of).collect();
        let of_whole = distances_of(0..keys);
        for what in ["all keys", "masked keys"] {
            let inputs = |keys: Range<usize>, distances| {
                let inputs = arrays.dense(0..queries, keys.clone())?.with_distances(distances)?;
                if what == "all keys" {
                    return Ok(inputs);
                }
                let inputs = inputs.with_mask(mask.slice(s![.., keys.clone()]))?;
                inputs.with_bias(bias.slice(s![.., .., keys]))
            };
            let shards = cuts(keys).into_iter().zip(&of_shards).map(|(of_shard, distances)| {
                Ok(Shard {
                    queries: numbers(0..queries),
                    keys: numbers(of_shard.clone()),
                    pairs: pairs_of(&of_shard),
                    inputs: inputs(of_shard, distances.view())?,
                })
            });
            let shards = shards.collect::<Result<Vec<_>>>()?;
            for mechanism in softmaxes_and_rope() {
                let what = format!("{what}, {queries} x {keys}");
                check(&what, &*mechanism, &inputs(0..keys, of_whole.view())?, &shards)?;
            }
        }
    }
    Ok(())
}

#[test]
fn keys_of_dense_inputs() -> Result<()> {
    common::hold_simd();
    dense_keys::<f64>()?;
    dense_keys::<f32>()
}

/// Keys in shards, of which a causal query sees those up to its own: the shard that starts at key a gets
/// only the queries that see a key there, and they see the keys up to a diagonal of their own.
fn causal_keys<F: Float>() -> Result<()> {
    for (queries, keys, offset) in [(6, 6, 0), (40, 40, 0), (40, 57, 17), (5, 30, 20)] {
        let arrays = Arrays::<F>::new(queries, keys);
        let whole = arrays.dense(0..queries, 0..keys)?;
        let whole = whole.with_causal_alignment(Causal::Offset(offset));
        let shards = cuts(keys).into_iter().map(|of_shard| {
            let first = of_shard.start.saturating_sub(offset).min(queries);
            let diagonal = Causal::Offset((first + offset).saturating_sub(of_shard.start));
            let inputs = arrays.dense(first..queries, of_shard.clone())?;
            Ok(Shard {
                queries: numbers(first..queries),
                keys: numbers(of_shard.clone()),
                pairs: dense_pairs(&(first..queries), &of_shard, keys),
                inputs: inputs.with_causal_alignment(diagonal),
            })
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        for mechanism in softmaxes() {
            check(&format!("causal, {queries} x {keys}"), &*mechanism, &whole, &shards)?;
        }
    }
    Ok(())
}

#[test]
fn keys_of_causal_inputs() -> Result<()> {
    common::hold_simd();
    causal_keys::<f64>()?;
    causal_keys::<f32>()
}

/// Blocks of queries and keys, as in ring attention: those after the diagonal are left out, and those on
/// it are causal.
#[test]
fn blocks_of_queries_and_keys() -> Result<()> {
    common::hold_simd();
    let arrays = Arrays::<f64>::new(50, 50);
    let whole = arrays.dense(0..50, 0..50)?.with_causal();
    let blocks = [0..20, 20..21, 21..50];
    let mut shards = vec![];
    for (number, queries) in blocks.iter().enumerate() {
        for keys in &blocks[..=number] {
            let inputs = arrays.dense(queries.clone(), keys.clone())?;
            shards.push(Shard {
                queries: numbers(queries.clone()),
                keys: numbers(keys.clone()),
                pairs: dense_pairs(queries, keys, 50),
                inputs: if queries == keys { inputs.with_causal() } else { inputs },
            });
        }
    }
    for mechanism in softmaxes() {
        check("blocks", &*mechanism, &whole, &shards)?;
    }
    Ok(())
}

/// Edges of a graph in random order; some queries have none.
fn edges(queries: usize, keys: usize) -> Vec<(usize, usize)> {
    let rng = &mut rng(5);
    let edge = |_| (rng.random_range(0..queries - 2), rng.random_range(0..keys));
    (0..6 * queries).map(edge).collect()
}

/// The owner of each key, or of each edge.
fn owners(len: usize) -> Vec<usize> {
    let rng = &mut rng(6);
    (0..len).map(|_| [0, 0, 1, 3][rng.random_range(0..4)]).collect()
}

/// The edges whose owner is a shard, as a graph, and their numbers.
fn edges_of(
    edges: &[(usize, usize)],
    keys: usize,
    queries: usize,
    is_own: impl Fn(usize) -> bool,
) -> Result<(Graph, Vec<usize>)> {
    let own: Vec<usize> = (0..edges.len()).filter(|&edge| is_own(edge)).collect();
    Ok((Graph::from_edges(queries, keys, own.iter().map(|&edge| edges[edge]))?, own))
}

fn graph_edges<F: Float>() -> Result<()> {
    let (queries, keys) = (45, 31);
    let arrays = Arrays::<F>::new(queries, keys);
    let edges = edges(queries, keys);
    let owners = owners(edges.len());
    let bias: Array2<F> = normal(edges.len(), HEADS, &mut rng(8));
    let graph = Graph::from_edges(queries, keys, edges.iter().copied())?;
    let inputs = |graph| -> Result<Inputs<'_, F>> {
        let Arrays { query, key, value } = &arrays;
        Inputs::graph(query.view(), key.view(), value.view(), graph)?
            .with_grouped_heads(HEADS, HEADS / 2)
    };
    let distances = Array1::from_iter((0..edges.len()).map(|edge| F::from_f64((edge % 11) as f64)));
    let whole = inputs(&graph)?
        .with_bias(bias.view())?
        .with_distances(distances.view())?
        .with_causal_alignment(Causal::Offset(20));
    let parts = (0..4).map(|owner| edges_of(&edges, keys, queries, |edge| owners[edge] == owner));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let of_parts: Vec<_> = (parts.iter())
        .map(|(_, own)| (bias.select(Axis(0), own), distances.select(Axis(0), own)))
        .collect();
    let shards = parts.iter().zip(&of_parts).map(|((graph, own), (bias, distances))| {
        Ok(Shard {
            queries: numbers(0..queries),
            keys: numbers(0..keys),
            pairs: own.clone(),
            inputs: inputs(graph)?
                .with_bias(bias.view())?
                .with_distances(distances.view())?
                .with_causal_alignment(Causal::Offset(20)),
        })
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;
    for mechanism in softmaxes_and_rope() {
        check("edges", &*mechanism, &whole, &shards)?;
    }
    Ok(())
}

#[test]
fn edges_of_a_graph() -> Result<()> {
    common::hold_simd();
    graph_edges::<f64>()?;
    graph_edges::<f32>()
}

/// Each shard owns some of the keys and only gets the queries that have edges to them.
fn graph_keys<F: Float>() -> Result<()> {
    let (queries, keys) = (45, 31);
    let arrays = Arrays::<F>::new(queries, keys);
    let edges = edges(queries, keys);
    let owners = owners(keys);
    let graph = Graph::from_edges(queries, keys, edges.iter().copied())?;
    let whole = Inputs::graph(arrays.query.view(), arrays.key.view(), arrays.value.view(), &graph)?
        .with_grouped_heads(HEADS, HEADS / 2)?;
    let parts: Vec<_> = (0..4)
        .map(|owner| {
            let own: Vec<usize> = (0..keys).filter(|&key| owners[key] == owner).collect();
            let pairs: Vec<usize> =
                (0..edges.len()).filter(|&edge| owners[edges[edge].1] == owner).collect();
            let mut asking: Vec<usize> = pairs.iter().map(|&edge| edges[edge].0).collect();
            asking.sort_unstable();
            asking.dedup();
            let local = pairs.iter().map(|&edge| {
                let (query, key) = edges[edge];
                (asking.binary_search(&query).unwrap(), own.binary_search(&key).unwrap())
            });
            let graph = Graph::from_edges(asking.len(), own.len(), local).unwrap();
            let arrays = [
                arrays.query.select(Axis(0), &asking),
                arrays.key.select(Axis(0), &own),
                arrays.value.select(Axis(0), &own),
            ];
            (asking, own, pairs, graph, arrays)
        })
        .collect();
    let shards = parts.iter().map(|(asking, own, pairs, graph, [query, key, value])| {
        let inputs = Inputs::graph(query.view(), key.view(), value.view(), graph)?;
        Ok(Shard {
            queries: asking.clone(),
            keys: own.clone(),
            pairs: pairs.clone(),
            inputs: inputs.with_grouped_heads(HEADS, HEADS / 2)?,
        })
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;
    for mechanism in softmaxes() {
        check("owned keys", &*mechanism, &whole, &shards)?;
    }
    Ok(())
}

#[test]
fn keys_of_a_graph_with_the_queries_that_ask() -> Result<()> {
    common::hold_simd();
    graph_keys::<f64>()?;
    graph_keys::<f32>()
}

/// The first half of the keys of each segment in one shard, the rest in another.
fn packed_keys<F: Float>() -> Result<()> {
    let (lens, key_lens) = ([3, 0, 19, 1, 30], [5, 2, 24, 0, 33]);
    let whole = Segments::from_query_key_lengths(&lens, &key_lens)?;
    let arrays = Arrays::<F>::new(whole.num_queries(), whole.num_keys());
    let bias: Array2<F> = normal(whole.num_pairs(), HEADS, &mut rng(8));
    let parts = [0, 1].map(|half| {
        let keys = |segment| {
            let Range { start, end } = whole.keys(segment);
            let middle = (start + end) / 2;
            if half == 0 { start..middle } else { middle..end }
        };
        let lens_of_part: Vec<_> = (0..5).map(|segment| keys(segment).len()).collect();
        let segments = Segments::from_query_key_lengths(&lens, &lens_of_part).unwrap();
        let numbers: Vec<usize> = (0..5).flat_map(keys).collect();
        let pairs: Vec<usize> = (0..5)
            .flat_map(|segment| {
                let all = whole.keys(segment);
                let own = keys(segment);
                let own = own.start - all.start..own.end - all.start;
                let first = whole.pairs(segment).start;
                let pairs = dense_pairs(&(0..lens[segment]), &own, all.len());
                pairs.into_iter().map(move |pair| first + pair)
            })
            .collect();
        let [key, value] =
            [&arrays.key, &arrays.value].map(|array| array.select(Axis(0), &numbers));
        let bias = bias.select(Axis(0), &pairs);
        (segments, numbers, pairs, key, value, bias)
    });
    let inputs =
        Inputs::packed(arrays.query.view(), arrays.key.view(), arrays.value.view(), &whole)?
            .with_grouped_heads(HEADS, HEADS / 2)?
            .with_bias(bias.view())?;
    let shards = parts.iter().map(|(segments, keys, pairs, key, value, bias)| {
        let inputs = Inputs::packed(arrays.query.view(), key.view(), value.view(), segments)?;
        Ok(Shard {
            queries: numbers(0..whole.num_queries()),
            keys: keys.clone(),
            pairs: pairs.clone(),
            inputs: inputs.with_grouped_heads(HEADS, HEADS / 2)?.with_bias(bias.view())?,
        })
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;
    for mechanism in softmaxes() {
        check("packed keys", &*mechanism, &inputs, &shards)?;
    }
    Ok(())
}

#[test]
fn keys_of_packed_inputs() -> Result<()> {
    common::hold_simd();
    packed_keys::<f64>()?;
    packed_keys::<f32>()
}

/// Pairs divided by masks keep their numbers and positions, so dropout, causal pattern and windows are those
/// of the whole.
fn masked_pairs<F: Float>() -> Result<()> {
    let n = 40;
    let arrays = Arrays::<F>::new(n, n);
    let owners = owners(n * n);
    let masks = [0, 1, 2, 3].map(|shard| Array1::from_iter(owners.iter().map(|&of| of == shard)));
    let segments = Segments::from_lengths(&[15, 25])?;
    let num_packed = segments.num_pairs();
    let packed = || {
        Inputs::packed(arrays.query.view(), arrays.key.view(), arrays.value.view(), &segments)?
            .with_grouped_heads(HEADS, HEADS / 2)
    };
    let layers: Vec<u8> = (0..n * n).map(|pair| (pair % 3 == 0).into()).collect();
    let window = || {
        let window = Window::sides(5, 3).dilation(2).globals(&[0, 9]);
        Box::new(LocalGlobal::sliding_window(window, Flash::new()).unwrap())
    };
    let joint = || {
        let sharp = Flash::new().with_scale(1.5).unwrap();
        Box::new(LocalGlobal::joint(Flash::new(), sharp))
    };
    let dropout = Dropout { probability: 0.3, seed: 4 };
    let all = || arrays.dense(0..n, 0..n);
    let mut mechanisms: Vec<Box<dyn Divisible<F>>> = vec![window(), joint()];
    mechanisms.extend(softmaxes_and_rope());
    let distances = Array1::from_iter((0..n * n).map(|pair| F::from_f64((pair % 11) as f64)));
    for mechanism in mechanisms {
        let dense = all()?.with_dropout(dropout)?.with_edge_layers(&layers)?;
        let dense = dense.with_distances(distances.view())?;
        let packed = packed()?.with_dropout(dropout)?.with_edge_layers(&layers[..num_packed])?;
        let packed = packed.with_distances(distances.slice(s![..num_packed]))?;
        for (what, inputs) in [
            ("dense pairs", dense),
            ("causal pairs", dense.with_causal()),
            ("packed pairs", packed),
            ("causal packed pairs", packed.with_causal_alignment(Causal::BottomRight)),
        ] {
            let pairs = inputs.num_pairs();
            let shards = masks.iter().map(|mask| {
                Ok(Shard {
                    queries: numbers(0..n),
                    keys: numbers(0..n),
                    pairs: numbers(0..pairs),
                    inputs: inputs.with_pair_mask(mask.slice(s![..pairs]))?,
                })
            });
            check(what, &*mechanism, &inputs, &shards.collect::<Result<Vec<_>>>()?)?;
        }
    }
    Ok(())
}

#[test]
fn pairs_divided_by_masks() -> Result<()> {
    common::hold_simd();
    masked_pairs::<f64>()?;
    masked_pairs::<f32>()
}

fn gat_inputs<'a, F: Float>(
    [query, key, features]: [&'a Array2<F>; 3],
    graph: &'a Graph,
    edge_dim: usize,
) -> Result<Inputs<'a, F>> {
    let inputs = Inputs::graph(query.view(), key.view(), key.view(), graph)?;
    if edge_dim == 0 { Ok(inputs) } else { inputs.with_edge_features(features.view()) }
}

/// Every score with and without features of the edges, and everything that follows the softmax.
fn gat_edges<F: Float>() -> Result<()> {
    let (queries, keys) = (45, 31);
    // Query 0 has more edges than a tile.
    let mut edges = edges(queries, keys);
    edges.extend((0..150).map(|edge| (0, edge % keys)));
    let owners = owners(edges.len());
    let rng = &mut rng(3);
    let (query, key) = (normal::<F>(queries, 6, rng), normal::<F>(keys, 5, rng));
    let features: Array2<F> = normal(edges.len(), 2, rng);
    let graph = Graph::from_edges(queries, keys, edges.iter().copied())?;
    let parts = (0..4).map(|owner| edges_of(&edges, keys, queries, |edge| owners[edge] == owner));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let of_parts: Vec<_> = parts.iter().map(|(_, own)| features.select(Axis(0), own)).collect();
    for score in [Score::Gat, Score::GatV2, Score::DotProduct] {
        for edge_dim in [0, 2] {
            let config = EdgeGatConfig::new(score, 6, 4, 3).key_dim(5).edge_dim(edge_dim);
            let config = config.residual(true);
            let config = match score {
                Score::DotProduct => config.gate(true),
                _ => config.average_heads(true),
            };
            let gat = config.init::<F>(rng)?;
            let what = format!("{score:?} with {edge_dim} edge features");
            let whole = gat_inputs([&query, &key, &features], &graph, edge_dim)?;
            let shards = parts.iter().zip(&of_parts).map(|((graph, own), features)| {
                Ok(Shard {
                    queries: numbers(0..queries),
                    keys: numbers(0..keys),
                    pairs: own.clone(),
                    inputs: gat_inputs([&query, &key, features], graph, edge_dim)?,
                })
            });
            let shards = shards.collect::<Result<Vec<_>>>()?;
            check(&what, &gat, &whole, &shards)?;

            let tolerance = if size_of::<F>() == 8 { 1e-14 } else { 4e-6 };
            let (out, saved) = gat.forward_train(&whole)?;
            let (merged, _) = merged(&gat, &whole, &shards)?;
            // Only the queries are read.
            let none = Array2::zeros((0, 5));
            let owner = Inputs::dense(query.view(), none.view(), none.view())?;
            let finished = gat.finish_partial(&owner, &merged)?;
            assert_close(&what, tolerance, &finished, &out);
            let grad_out = normal::<F>(queries, out.ncols(), rng);
            let mut grads = Gradients::zeros(&whole, &gat)?;
            let grad_partial = gat.finish_partial_backward_into(
                &whole,
                &merged,
                grad_out.view(),
                grads.view_mut(),
            )?;
            for shard in &shards {
                let grad = grad_partial.view();
                let of_shard = gat.backward_partial(&shard.inputs, &merged, grad, None)?;
                shard.add(&of_shard, &mut grads);
            }
            let expected = gat.backward(&whole, &saved, grad_out.view())?;
            assert_grads_close(&what, tolerance, grads, &expected);
        }
    }
    Ok(())
}

#[test]
fn edges_of_graph_attention() -> Result<()> {
    common::hold_simd();
    gat_edges::<f64>()?;
    gat_edges::<f32>()
}

/// Runs a function with inputs of 9 queries and 14 keys and with their shards, each with a dropout of its own.
fn with_dropped_shards<T>(
    arrays: &Arrays<f64>,
    bias: &Array2<f64>,
    run: impl FnOnce(&Inputs<'_, f64>, &[Shard<'_, f64>]) -> Result<T>,
) -> Result<T> {
    let pairs = cuts(14).into_iter().map(|own| dense_pairs(&(0..9), &own, 14));
    let pairs: Vec<_> = pairs.collect();
    let biases: Vec<_> = pairs.iter().map(|pairs| bias.select(Axis(0), pairs)).collect();
    let shards = cuts(14).into_iter().zip(&pairs).zip(&biases).zip(0..);
    let shards = shards.map(|(((own, pairs), bias), seed)| {
        let inputs = arrays.dense(0..9, own.clone())?.with_bias(bias.view())?;
        Ok(Shard {
            queries: numbers(0..9),
            keys: numbers(own),
            pairs: pairs.clone(),
            inputs: inputs.with_dropout(Dropout { probability: 0.2, seed })?,
        })
    });
    let whole = arrays.dense(0..9, 0..14)?.with_bias(bias.view())?;
    run(&whole, &shards.collect::<Result<Vec<_>>>()?)
}

/// A loss of outputs and log-sum-exps, merged from shards, is differentiated numerically.
#[test]
fn gradients_are_the_differences_of_merged_results() -> Result<()> {
    common::hold_simd();
    let (queries, keys) = (9, 14);
    let arrays = Arrays::<f64>::new(queries, keys);
    let bias = normal::<f64>(queries * keys, HEADS, &mut rng(8));
    let grad_out = normal::<f64>(queries, HEADS * 5, &mut rng(9));
    let grad_log_sum = normal::<f64>(queries, HEADS, &mut rng(10));
    for mechanism in softmaxes::<f64>() {
        let loss = |arrays: &Arrays<f64>, bias: &Array2<f64>| {
            with_dropped_shards(arrays, bias, |whole, shards| {
                let (merged, _) = merged(&*mechanism, whole, shards)?;
                let of_out = (&merged.out() * &grad_out).sum();
                Ok(of_out + (merged.log_sum_exp() * &grad_log_sum).sum())
            })
        };
        let both = with_dropped_shards(&arrays, &bias, |whole, shards| {
            summed(&*mechanism, whole, shards, &grad_out, Some(&grad_log_sum))
        })?;
        for grads in both {
            for seed in 20..24 {
                let rng = &mut rng(seed);
                let along = Arrays {
                    query: normal(queries, HEADS * 3, rng),
                    key: normal(keys, HEADS / 2 * 3, rng),
                    value: normal(keys, HEADS / 2 * 5, rng),
                };
                let along_bias = normal::<f64>(queries * keys, HEADS, rng);
                let at = |step: f64| {
                    let arrays = Arrays {
                        query: &arrays.query + &(step * &along.query),
                        key: &arrays.key + &(step * &along.key),
                        value: &arrays.value + &(step * &along.value),
                    };
                    loss(&arrays, &(&bias + &(step * &along_bias)))
                };
                let difference = (at(1e-5)? - at(-1e-5)?) / 2e-5;
                let of_bias = grads.bias.clone().unwrap().into_dimensionality::<Ix2>().unwrap();
                let slope = (&grads.query * &along.query).sum()
                    + (&grads.key * &along.key).sum()
                    + (&grads.value * &along.value).sum()
                    + (of_bias * &along_bias).sum();
                approx::assert_abs_diff_eq!(slope, difference, epsilon = 1e-7);
            }
        }
    }
    Ok(())
}

/// All logits have the same large bias, as under a mask of −1e9 that hides everything: the shards share
/// the weights as without it, which a log-sum-exp alone could not say.
#[test]
fn large_logits() -> Result<()> {
    common::hold_simd();
    for logit in [-1e9f32, 1e20, f32::MIN] {
        let (queries, keys) = (12, 30);
        let arrays = Arrays::<f32>::new(queries, keys);
        let bias = Array3::from_elem((1, queries, keys), logit);
        let inputs = |keys: Range<usize>| {
            let inputs = arrays.dense(0..queries, keys.clone())?;
            inputs.with_bias(bias.slice(s![.., .., keys]))
        };
        let shards = cuts(keys).into_iter().map(|of_shard| {
            Ok(Shard {
                queries: numbers(0..queries),
                keys: numbers(of_shard.clone()),
                pairs: dense_pairs(&(0..queries), &of_shard, keys),
                inputs: inputs(of_shard)?,
            })
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        let whole = inputs(0..keys)?;
        for mechanism in softmaxes::<f32>() {
            let what = format!("{}, {logit:e}", mechanism.name());
            let grad_out = normal::<f32>(queries, HEADS * 5, &mut rng(91));
            let (out, saved) = mechanism.forward_train(&whole)?;
            let expected = mechanism.backward(&whole, &saved, grad_out.view())?;
            let (merged, _) = merged(&*mechanism, &whole, &shards)?;
            assert_close(&what, 1e-6, &merged.out(), &out.view());
            for grads in summed(&*mechanism, &whole, &shards, &grad_out, None)? {
                assert_grads_close(&what, 4e-6, grads, &expected);
            }
        }
    }
    Ok(())
}

#[test]
fn nan_stays_in_the_rows_that_it_touches() -> Result<()> {
    common::hold_simd();
    // Query 1 has keys only in shard 1, and query 2 has none. The value of key 0, which queries 0 and 3 see,
    // is NaN, and so are the gradients of query 2.
    let (queries, keys) = (4, 6);
    let mut arrays = Arrays::<f64>::new(queries, keys);
    arrays.value.row_mut(0).fill(f64::NAN);
    let mask = Array2::from_shape_fn((queries, keys), |(query, key)| match query {
        1 => key >= 3,
        2 => false,
        _ => true,
    });
    let mut grad_out = normal::<f64>(queries, HEADS * 5, &mut rng(1));
    let mut grad_log_sum = normal::<f64>(queries, HEADS, &mut rng(2));
    grad_out.row_mut(2).fill(f64::NAN);
    grad_log_sum.row_mut(2).fill(f64::NAN);
    let inputs = |keys: Range<usize>| {
        arrays.dense(0..queries, keys.clone())?.with_mask(mask.slice(s![.., keys]))
    };
    let shards = [0..3, 3..6].map(|own: Range<usize>| Shard {
        queries: numbers(0..queries),
        keys: numbers(own.clone()),
        pairs: vec![],
        inputs: inputs(own).unwrap(),
    });
    for mechanism in softmaxes::<f64>() {
        let whole = inputs(0..keys)?;
        let grads = summed(&*mechanism, &whole, &shards, &grad_out, Some(&grad_log_sum))?;
        for grads in grads {
            let is_nan = |row: ArrayView2<'_, f64>| row.iter().any(|x| x.is_nan());
            let rows = |array: &Array2<f64>| -> Vec<bool> {
                array.rows().into_iter().map(|row| is_nan(row.insert_axis(Axis(0)))).collect()
            };
            let name = mechanism.name();
            assert_eq!(rows(&grads.query), [true, false, false, true], "{name}");
            assert!(grads.query.row(2).iter().all(|&grad| grad == 0.0), "{name}");
            // The weights of queries 0 and 3 depend on the NaN; those of the value itself do not.
            assert_eq!(rows(&grads.key), [true; 6], "{name}");
            assert_eq!(rows(&grads.value), [false; 6], "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_part_without_keys_has_no_gradient() -> Result<()> {
    common::hold_simd();
    let empty = Partial::<f64>::empty(2, 4, 2)?;
    let part = Partial::from_log_sum_exp(normal(2, 4, &mut rng(1)), normal(2, 2, &mut rng(2)))?;
    let merged = part.clone().merge(&empty)?;
    let nan = Array2::from_elem((2, 4), f64::NAN);
    let (grad_out, grad_log_sum) = merged.merge_vjp(&empty, nan.view(), None)?;
    assert_eq!((grad_out.sum(), grad_log_sum.sum()), (0.0, 0.0));
    // The only part gets the gradients themselves.
    let (g, h) = (normal(2, 4, &mut rng(3)), normal(2, 2, &mut rng(4)));
    assert_eq!(merged.merge_vjp(&part, g.view(), Some(h.view()))?, (g.clone(), h.clone()));
    // Nothing flows into a result over no keys.
    let (grad_out, grad_log_sum) = empty.merge_vjp(&empty, g.view(), Some(h.view()))?;
    assert_eq!((grad_out.sum(), grad_log_sum.sum()), (0.0, 0.0));
    Ok(())
}

//! Attention over keys in several shards whose results are not weighted sums of values: means of points of the
//! Poincaré ball, and the sums of linear attention. Merged outputs and summed gradients are those of the whole.

mod common;

use common::close::{assert_close, assert_close_in_size};
use common::random::{normal, rng};
use common::refused;
use graph_attention::ndarray::{Array1, Array2, ArrayD, ArrayView2, Axis, Ix2, array, s};
use graph_attention::performer::{Features, StateGradient};
use graph_attention::poincare::{Aggregation, Coordinates, PartialMean};
use graph_attention::{
    Attention, Dropout, Float, Gradients, Graph, Inputs, Partial, Performer, PerformerConfig,
    Poincare, PoincareConfig, Result, Segments,
};
use std::ops::Range;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 3;
const VALUE_DIM: usize = 2;

/// Points with heads of queries that share heads of keys, at about this distance from the origin.
struct Points<F> {
    query: Array2<F>,
    key: Array2<F>,
    value: Array2<F>,
}

impl<F: Float> Points<F> {
    fn new(queries: usize, keys: usize, distance: f64, seed: u64) -> Self {
        let rng = &mut rng(seed);
        let mut draw = |rows, heads: usize, dim: usize, around: f64| -> Array2<F> {
            let mut x: Array2<f64> = normal(rows, heads * dim, rng);
            for mut point in x.rows_mut() {
                for head in 0..heads {
                    let mut point = point.slice_mut(s![head * dim..(head + 1) * dim]);
                    // Half of the distance, and not all in one direction.
                    point[0] += around;
                    let norm = point.dot(&point).sqrt();
                    point *= distance / 2.0 / norm;
                }
            }
            x.mapv(F::from_f64)
        };
        Self {
            query: draw(queries, HEADS, DIM, 0.0),
            key: draw(keys, KV_HEADS, DIM, 0.0),
            value: draw(keys, KV_HEADS, VALUE_DIM, distance),
        }
    }

    fn inputs(&self, keys: Range<usize>) -> Result<Inputs<'_, F>> {
        let rows = s![keys, ..];
        let (key, value) = (self.key.slice(rows), self.value.slice(rows));
        Inputs::dense(self.query.view(), key, value)?.with_grouped_heads(HEADS, KV_HEADS)
    }
}

/// Consecutive keys in shards, one of them empty and one of a single key.
fn cuts(num_keys: usize) -> Vec<Range<usize>> {
    let at = [0, num_keys / 3, num_keys / 3, num_keys / 3 + 1, num_keys];
    at.windows(2).map(|cut| cut[0]..cut[1]).collect()
}

fn poincare<F: Float>(aggregation: Aggregation) -> Poincare<F> {
    let config = PoincareConfig::new().aggregation(aggregation).coordinates(Coordinates::Tangent);
    let config = config.temperature(0.7).curvature(1.3);
    config.learn_curvature(true).learn_temperature(true).init().unwrap()
}

/// Some of the pairs of whole inputs: the numbers of their keys and pairs in the whole.
struct Shard<'a, F: Float> {
    keys: Vec<usize>,
    pairs: Vec<usize>,
    inputs: Inputs<'a, F>,
}

fn add_rows<F: Float>(whole: &mut Array2<F>, rows: &[usize], part: &Array2<F>) {
    for (&row, part) in rows.iter().zip(part.rows()) {
        let mut row = whole.row_mut(row);
        row += &part;
    }
}

fn merged<F: Float>(
    poincare: &Poincare<F>,
    whole: &Inputs<'_, F>,
    shards: &[Shard<'_, F>],
) -> Result<PartialMean<F>> {
    let aggregation = poincare.forward_partial(whole)?.aggregation();
    let mut merged = PartialMean::empty(aggregation, whole.num_queries(), VALUE_DIM, HEADS)?;
    for shard in shards {
        merged = merged.merge(&poincare.forward_partial(&shard.inputs)?)?;
    }
    Ok(merged)
}

/// Checks that output and gradients of the shards are those of the whole.
fn check_means<F: Float>(
    what: &str,
    tolerance: f64,
    poincare: &Poincare<F>,
    whole: &Inputs<'_, F>,
    shards: &[Shard<'_, F>],
) -> Result<()> {
    let merged = merged(poincare, whole, shards)?;
    let (out, saved) = poincare.forward_train(whole)?;
    let finished = poincare.finish_partial(&merged)?;
    assert_close_in_size(format_args!("{what}, out"), tolerance, 0.1, &finished, &out);
    let of_whole = poincare.forward_partial(whole)?;
    let [actual, expected] = [&merged, &of_whole].map(|partial| {
        let infinite = |x: F| if x == F::neg_infinity() { F::from_f64(-77.0) } else { x };
        partial.sums().log_sum_exp().mapv(infinite)
    });
    assert_close_in_size(format_args!("{what}, log-sum-exp"), tolerance, 0.1, &actual, &expected);

    let grad_out = normal::<F>(out.nrows(), out.ncols(), &mut rng(91));
    let grad_log_sum = normal::<F>(out.nrows(), HEADS, &mut rng(92));
    let expected = poincare.backward(whole, &saved, grad_out.view())?;
    // With a gradient of the log-sum-exp, from the result over the whole.
    let mut with_log_sum = Gradients::zeros(whole, poincare)?;
    let of_log_sum = Some(grad_log_sum.view());
    let views = with_log_sum.view_mut();
    poincare.backward_partial_into(whole, &of_whole, grad_out.view(), of_log_sum, views)?;
    let params = &mut with_log_sum.params;
    poincare.finish_partial_backward_into(&of_whole, grad_out.view(), params)?;
    for (of_log_sum, expected) in [(None, &expected), (of_log_sum, &with_log_sum)] {
        let mut sum = Gradients::zeros(whole, poincare)?;
        poincare.finish_partial_backward_into(&merged, grad_out.view(), &mut sum.params)?;
        for shard in shards {
            let grads =
                poincare.backward_partial(&shard.inputs, &merged, grad_out.view(), of_log_sum)?;
            sum.query += &grads.query;
            add_rows(&mut sum.key, &shard.keys, &grads.key);
            add_rows(&mut sum.value, &shard.keys, &grads.value);
            if let (Some(bias), Some(grads)) = (&mut sum.bias, grads.bias) {
                let mut rows = bias.view().to_owned().into_dimensionality::<Ix2>().unwrap();
                add_rows(&mut rows, &shard.pairs, &grads.into_dimensionality::<Ix2>().unwrap());
                *bias = rows.into_dyn();
            }
            sum.params.iter_mut().zip(&grads.params).for_each(|(sum, grad)| *sum += grad);
        }
        let what = format!("{what}, h {}", of_log_sum.is_some());
        let close = |name: &str, actual: ArrayD<F>, expected: ArrayD<F>| {
            assert_close_in_size(
                format_args!("{what}, {name}"),
                tolerance,
                1.0,
                &actual,
                &expected,
            );
        };
        close("query", sum.query.into_dyn(), expected.query.clone().into_dyn());
        close("key", sum.key.into_dyn(), expected.key.clone().into_dyn());
        close("value", sum.value.into_dyn(), expected.value.clone().into_dyn());
        if let (Some(sum), Some(expected)) = (sum.bias, &expected.bias) {
            close("bias", sum, expected.clone());
        }
        for (sum, expected) in sum.params.into_iter().zip(&expected.params) {
            // That of the curvature is a difference of larger terms.
            let what = format_args!("{what}, param");
            assert_close_in_size(what, 10.0 * tolerance, 1.0, &sum, expected);
        }
    }
    Ok(())
}

const SUMS: [Aggregation; 2] = [Aggregation::Midpoint, Aggregation::TangentAtOrigin];

fn means_of_dense_keys<F: Float>(tolerance: f64) -> Result<()> {
    for aggregation in SUMS {
        let poincare = poincare::<F>(aggregation);
        for (queries, keys) in [(1, 4), (5, 13), (20, 37), (131, 149)] {
            let points = Points::<F>::new(queries, keys, 1.5, 3);
            let rng = &mut rng(7);
            let mut bias: Array2<F> = normal(queries * keys, HEADS, rng);
            bias.iter_mut().step_by(7).for_each(|bias| *bias = F::neg_infinity());
            // Query 3 sees no key, query 0 only those of the first shard.
            let mask = Array2::from_shape_fn((queries, keys), |(query, key)| {
                query != 3 && (query > 0 || key < keys / 3) && (query * 5 + key) % 4 != 0
            });
            let pairs_of = |own: &Range<usize>| -> Vec<usize> {
                (0..queries)
                    .flat_map(|query| own.clone().map(move |key| query * keys + key))
                    .collect()
            };
            let mut all = cuts(keys);
            all.push(0..keys);
            let of_shard = |own: &Range<usize>| bias.select(Axis(0), &pairs_of(own));
            let biases: Vec<_> = all.iter().map(of_shard).collect();
            for masked in [false, true] {
                let inputs = |own: Range<usize>, number: usize| {
                    let inputs = points.inputs(own.clone())?.with_bias(biases[number].view())?;
                    if masked { inputs.with_mask(mask.slice(s![.., own])) } else { Ok(inputs) }
                };
                let shards = cuts(keys).into_iter().enumerate().map(|(number, own)| {
                    let (keys, pairs) = (own.clone().collect(), pairs_of(&own));
                    Ok(Shard { keys, pairs, inputs: inputs(own, number)? })
                });
                let shards = shards.collect::<Result<Vec<_>>>()?;
                let whole = inputs(0..keys, biases.len() - 1)?;
                let what = format!("{aggregation:?}, {queries} x {keys}, {masked}");
                check_means(&what, tolerance, &poincare, &whole, &shards)?;
            }
        }
    }
    Ok(())
}

#[test]
fn means_of_points_over_dense_keys() -> Result<()> {
    common::hold_simd();
    means_of_dense_keys::<f64>(1e-14)?;
    means_of_dense_keys::<f32>(2e-5)
}

/// Edges of a graph, and pairs of packed inputs, divided at random, with dropout by the numbers of the whole.
#[test]
fn means_of_points_over_edges_and_masked_pairs() -> Result<()> {
    common::hold_simd();
    let (queries, keys) = (30, 21);
    let points = Points::<f64>::new(queries, keys, 1.0, 4);
    let edges: Vec<_> = (0..150).map(|edge| ((edge * 7) % 28, (edge * 11) % keys)).collect();
    let owner = |edge: usize| (edge * edge + edge / 3) % 3;
    let graphs = [0, 1, 2].map(|shard| {
        let own: Vec<usize> = (0..150).filter(|&edge| owner(edge) == shard).collect();
        (Graph::from_edges(queries, keys, own.iter().map(|&edge| edges[edge])).unwrap(), own)
    });
    let whole_graph = Graph::from_edges(queries, keys, edges.iter().copied())?;
    let of_graph = |graph| {
        let Points { query, key, value } = &points;
        Inputs::graph(query.view(), key.view(), value.view(), graph)?
            .with_grouped_heads(HEADS, KV_HEADS)
    };
    let segments = Segments::from_query_key_lengths(&[10, 0, 20], &[6, 2, 13])?;
    let masks = [0, 1, 2]
        .map(|shard| Array1::from_iter((0..segments.num_pairs()).map(|pair| owner(pair) == shard)));
    let dropout = Dropout { probability: 0.3, seed: 4 };
    let Points { query, key, value } = &points;
    let packed = Inputs::packed(query.view(), key.view(), value.view(), &segments)?
        .with_grouped_heads(HEADS, KV_HEADS)?
        .with_dropout(dropout)?;
    for aggregation in SUMS {
        let poincare = poincare::<f64>(aggregation);
        let shards = graphs.iter().map(|(graph, own)| {
            Ok(Shard { keys: (0..keys).collect(), pairs: own.clone(), inputs: of_graph(graph)? })
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        check_means("edges", 1e-14, &poincare, &of_graph(&whole_graph)?, &shards)?;
        let shards = masks.iter().map(|mask| {
            let inputs = packed.with_pair_mask(mask.view())?;
            Ok(Shard { keys: (0..keys).collect(), pairs: vec![], inputs })
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        check_means("packed", 1e-14, &poincare, &packed, &shards)?;
    }
    Ok(())
}

/// A loss of means and log-sum-exps, merged from shards, is differentiated numerically; some pairs have nearly all
/// the weight of their queries.
#[test]
fn gradients_of_partial_means_are_the_differences_of_merged_means() -> Result<()> {
    common::hold_simd();
    let (queries, keys) = (9, 7);
    for (aggregation, temperature) in [(SUMS[0], 0.1), (SUMS[0], 0.7), (SUMS[1], 0.1)] {
        let config = PoincareConfig::new().aggregation(aggregation).temperature(temperature);
        let poincare: Poincare<f64> = config.coordinates(Coordinates::Tangent).init()?;
        let points = Points::<f64>::new(queries, keys, 1.2, 10);
        let grad_out = normal::<f64>(queries, HEADS * VALUE_DIM, &mut rng(11));
        let grad_log_sum = normal::<f64>(queries, HEADS, &mut rng(12));
        let merged = |points: &Points<f64>| {
            let first = poincare.forward_partial(&points.inputs(0..3)?)?;
            first.merge(&poincare.forward_partial(&points.inputs(3..keys)?)?)
        };
        let all = merged(&points)?;
        let mut grads = Gradients::zeros(&points.inputs(0..keys)?, &poincare)?;
        for own in [0..3, 3..keys] {
            let (inputs, h) = (points.inputs(own.clone())?, Some(grad_log_sum.view()));
            let of_shard = poincare.backward_partial(&inputs, &all, grad_out.view(), h)?;
            grads.query += &of_shard.query;
            add_rows(&mut grads.key, &own.clone().collect::<Vec<_>>(), &of_shard.key);
            add_rows(&mut grads.value, &own.collect::<Vec<_>>(), &of_shard.value);
        }
        for seed in 20..24 {
            let along = Points::<f64>::new(queries, keys, 1.0, seed);
            let loss = |step: f64| {
                let at = |x: &Array2<f64>, along: &Array2<f64>| x + &(step * along);
                let merged = merged(&Points {
                    query: at(&points.query, &along.query),
                    key: at(&points.key, &along.key),
                    value: at(&points.value, &along.value),
                })?;
                let of_out = (poincare.finish_partial(&merged)? * &grad_out).sum();
                Ok::<_, graph_attention::Error>(
                    of_out + (merged.sums().log_sum_exp() * &grad_log_sum).sum(),
                )
            };
            let difference = (loss(1e-5)? - loss(-1e-5)?) / 2e-5;
            let slope = (&grads.query * &along.query).sum()
                + (&grads.key * &along.key).sum()
                + (&grads.value * &along.value).sum();
            let error = (slope - difference).abs();
            let what = format!("{aggregation:?}, {temperature}");
            assert!(error < 1e-6 * (1.0 + slope.abs()), "{what}: {slope} {difference}");
        }
    }
    Ok(())
}

/// Far from the origin T and |S| agree in all digits but the last, so T − |S| must not be computed from them.
#[test]
fn midpoints_far_from_the_origin() -> Result<()> {
    common::hold_simd();
    let poincare = poincare::<f64>(Aggregation::Midpoint);
    for (distance, of_out, of_grads) in
        [(3.0, 1e-14, 1e-13), (6.0, 1e-14, 1e-11), (30.0, 1e-14, f64::NAN)]
    {
        let points = Points::<f64>::new(12, 25, distance, 5);
        let whole = points.inputs(0..25)?;
        let shards = cuts(25).into_iter().map(|own| {
            Ok(Shard { keys: own.clone().collect(), pairs: vec![], inputs: points.inputs(own)? })
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        let finished = poincare.finish_partial(&merged(&poincare, &whole, &shards)?)?;
        let out = poincare.forward(&whole)?;
        assert_close_in_size(format_args!("{distance}"), of_out, 0.1, &finished, &out);
        if of_grads.is_finite() {
            check_means(&format!("{distance}"), of_grads, &poincare, &whole, &shards)?;
        }
    }
    Ok(())
}

/// The merge in any order, of queries that ask, and of parts without keys.
#[test]
fn partial_means_merge_in_any_order() -> Result<()> {
    common::hold_simd();
    for aggregation in SUMS {
        let poincare = poincare::<f64>(aggregation);
        let points = Points::<f64>::new(9, 20, 4.0, 6);
        let part = |keys: Range<usize>| poincare.forward_partial(&points.inputs(keys)?);
        let [a, b, c] = [part(0..7)?, part(7..8)?, part(8..20)?];
        let out = poincare.forward(&points.inputs(0..20)?)?;
        let empty = PartialMean::empty(aggregation, 9, VALUE_DIM, HEADS)?;
        for merged in [
            a.clone().merge(&b)?.merge(&c)?,
            c.clone().merge(&empty)?.merge(&a.clone().merge(&b)?)?,
            empty.clone().merge(&b)?.merge(&c)?.merge(&a)?,
        ] {
            assert_close_in_size("order", 1e-14, 0.1, &poincare.finish_partial(&merged)?, &out);
        }
        assert_eq!(a.clone().merge(&empty)?, a);
        assert_eq!(empty.clone().merge(&a)?, a);

        // Queries 4 and 2 have keys in the second part too.
        let asking = [4, 2];
        let some = c.select_queries(&asking)?;
        let merged = a.clone().merge_queries(&asking, &some)?;
        let whole = a.clone().merge(&c)?;
        for query in 0..9 {
            let expected = if asking.contains(&query) { &whole } else { &a };
            assert_eq!(merged.select_queries(&[query])?, expected.select_queries(&[query])?);
        }
        // Once more: as if the keys were there twice.
        let twice = a.clone().merge_queries(&[4, 4], &c.select_queries(&[4, 4])?)?;
        let expected = a.clone().merge(&c)?.merge(&c)?.select_queries(&[4])?;
        assert_eq!(twice.select_queries(&[4])?, expected);
        let sums = merged.sums().clone();
        assert_eq!(PartialMean::new(aggregation, sums)?, merged);
    }
    Ok(())
}

#[test]
fn means_without_sums_and_parts_that_do_not_fit_are_refused() -> Result<()> {
    let points = Points::<f64>::new(2, 3, 1.0, 7);
    let inputs = points.inputs(0..3)?;
    let same_dim = Inputs::dense(points.query.view(), points.query.view(), points.query.view())?;
    for aggregation in [Aggregation::TangentAtQuery, Aggregation::FrechetMean] {
        let poincare = poincare::<f64>(aggregation);
        let expected = "InvalidArgument | aggregation | Midpoint or TangentAtOrigin";
        refused(poincare.forward_partial(&same_dim), expected);
        refused(PartialMean::<f64>::empty(aggregation, 2, 2, 1), expected);
    }
    let [midpoint, linear] = SUMS.map(poincare::<f64>);
    let partial = midpoint.forward_partial(&inputs)?;
    let other = linear.forward_partial(&inputs)?;
    refused(
        partial.clone().merge(&other),
        "InvalidArgument | aggregation | Midpoint | TangentAtOrigin",
    );
    refused(linear.finish_partial(&partial), "InvalidArgument | partial.aggregation");
    refused(
        partial.clone().merge_queries(&[2], &partial.select_queries(&[0])?),
        "InvalidArgument | queries",
    );
    let narrow = PartialMean::empty(Aggregation::Midpoint, 2, 1, HEADS)?;
    refused(partial.clone().merge(&narrow), "Shape | partial.out");
    let nothing = Partial::<f64>::empty(2, 0, 1)?;
    refused(PartialMean::new(Aggregation::Midpoint, nothing), "Shape | sums of a head | [1] | [0]");
    let grad = Array2::<f64>::zeros((2, HEADS * VALUE_DIM));
    let wrong = grad.slice(s![..1, ..]);
    refused(midpoint.backward_partial(&inputs, &partial, wrong, None), "Shape | grad_out");
    refused(
        midpoint.backward_partial(&inputs, &partial, grad.view(), Some(grad.view())),
        "Shape | grad_log_sum_exp",
    );
    refused(midpoint.backward_partial(&inputs, &narrow, grad.view(), None), "Shape | partial.out");
    let result = midpoint.finish_partial_backward_into(&partial, grad.view(), &mut []);
    refused(result, "Shape | number of grads.params | [2] | [0]");

    let weights = Array2::ones((inputs.num_pairs(), 1));
    let weighted = inputs.with_pair_weights(weights.view())?;
    let words = "Unsupported | poincare | weights of pairs";
    refused(midpoint.forward_partial(&weighted), words);
    refused(midpoint.backward_partial(&weighted, &partial, grad.view(), None), words);

    // In `f32` farther out than sums of `f32` can represent.
    let far = Points::<f32>::new(2, 3, 30.0, 7);
    let narrow = poincare::<f32>(Aggregation::Midpoint);
    refused(
        narrow.forward_partial(&far.inputs(0..3)?),
        "InvalidArgument | inputs | 8/√c | farther",
    );
    Ok(())
}

#[cfg(feature = "serde")]
#[test]
fn partial_means_are_read_as_they_were_written_or_refused() -> Result<()> {
    let points = Points::<f64>::new(3, 4, 1.0, 9);
    let mask = array![[true; 4], [false; 4], [true; 4]];
    let inputs = points.inputs(0..4)?.with_mask(mask.view())?;
    for aggregation in SUMS {
        let partial = poincare::<f64>(aggregation).forward_partial(&inputs)?;
        let text = serde_json::to_string(&partial).unwrap();
        assert_eq!(serde_json::from_str::<PartialMean<f64>>(&text).unwrap(), partial);
        for (from, to, expected) in [
            (format!("{aggregation:?}"), "FrechetMean", "Midpoint or TangentAtOrigin"),
            ("\"sums\"".to_owned(), "\"terms\"", "terms"),
        ] {
            let wrong = text.replacen(&from, to, 1);
            let error = serde_json::from_str::<PartialMean<f64>>(&wrong).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
    Ok(())
}

/// NaN in a value touches the queries that see it, and no others.
#[test]
fn nan_stays_in_the_means_that_it_touches() -> Result<()> {
    common::hold_simd();
    for aggregation in SUMS {
        let poincare = poincare::<f64>(aggregation);
        let mut points = Points::<f64>::new(4, 6, 1.0, 8);
        points.value.row_mut(0).fill(f64::NAN);
        let mask = Array2::from_shape_fn((4, 6), |(query, key)| query != 1 || key >= 3);
        let part = |keys: Range<usize>| {
            poincare
                .forward_partial(&points.inputs(keys.clone())?.with_mask(mask.slice(s![.., keys]))?)
        };
        let merged = part(0..3)?.merge(&part(3..6)?)?;
        let out = poincare.finish_partial(&merged)?;
        for (query, row) in out.rows().into_iter().enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), query != 1, "{aggregation:?} {query}");
            assert_eq!(row.iter().all(|x| x.is_finite()), query == 1, "{aggregation:?} {query}");
        }
    }
    Ok(())
}

const FEATURES: [Features; 5] = [
    Features::Positive,
    Features::Hyperbolic,
    Features::Trigonometric,
    Features::Relu { epsilon: 0.1 },
    Features::Elu,
];

fn performer<F: Float>(features: Features, learn: bool) -> Performer<F> {
    let num_features = if features == Features::Elu { 4 } else { 16 };
    let config = PerformerConfig::new(4, num_features).features(features).learn_projection(learn);
    config.init(&mut rng(1)).unwrap()
}

/// Queries and keys in different shards: the states are merged, their gradients are added.
fn states<F: Float>(tolerance: f64) -> Result<()> {
    for features in FEATURES {
        let learn = features != Features::Elu;
        let performer = performer::<F>(features, learn);
        for (queries, keys) in [(1, 1), (7, 12), (150, 300)] {
            let rng = &mut rng(keys as u64);
            let [query, key] = [queries, keys].map(|rows| normal::<F>(rows, 4, rng));
            let (value, grad_out) = (normal::<F>(keys, 3, rng), normal::<F>(queries, 3, rng));
            let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
            let (_, saved) = performer.forward_train(&inputs)?;
            let expected = performer.backward(&inputs, &saved, grad_out.view())?;

            let mut all = performer.state(3)?;
            for own in cuts(keys) {
                let mut state = performer.state(3)?;
                state.add(key.slice(s![own.clone(), ..]), value.slice(s![own, ..]))?;
                all.merge(&state)?;
            }
            let mut params: Vec<ArrayD<F>> =
                expected.params.iter().map(|grad| grad * F::zero()).collect();
            let mut grads = Gradients::zeros(&inputs, &performer)?;
            let mut of_state: Option<StateGradient<F>> = None;
            for own in cuts(queries) {
                let rows = s![own, ..];
                let (grad_query, grad) =
                    all.attend_vjp(query.slice(rows), grad_out.slice(rows), &mut params)?;
                grads.query.slice_mut(rows).assign(&grad_query);
                match &mut of_state {
                    None => of_state = Some(grad),
                    Some(of_state) => of_state.add(&grad)?,
                }
            }
            let of_state = of_state.unwrap();
            for own in cuts(keys) {
                let rows = s![own, ..];
                // Any state will do.
                let [grad_key, grad_value] = performer.state(3)?.add_vjp(
                    key.slice(rows),
                    value.slice(rows),
                    &of_state,
                    &mut params,
                )?;
                grads.key.slice_mut(rows).assign(&grad_key);
                grads.value.slice_mut(rows).assign(&grad_value);
            }
            let what = format!("{features:?}, {queries} x {keys}");
            for (name, actual, expected) in [
                ("query", &grads.query, &expected.query),
                ("key", &grads.key, &expected.key),
                ("value", &grads.value, &expected.value),
            ] {
                assert_close_in_size(
                    format_args!("{what}, {name}"),
                    tolerance,
                    1.0,
                    actual,
                    expected,
                );
            }
            assert_eq!(params.len(), usize::from(learn));
            for (actual, expected) in params.iter().zip(&expected.params) {
                assert_close_in_size(
                    format_args!("{what}, params"),
                    tolerance,
                    1.0,
                    actual,
                    expected,
                );
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_states_are_those_of_the_mechanism() -> Result<()> {
    common::hold_simd();
    states::<f64>(1e-13)?;
    states::<f32>(2e-4)
}

/// A loss of the output of a merged state is differentiated numerically.
#[test]
fn gradients_of_states_are_the_differences_of_merged_states() -> Result<()> {
    common::hold_simd();
    for features in FEATURES {
        let performer = performer::<f64>(features, false);
        let draw = |rows, columns, seed| normal::<f64>(rows, columns, &mut rng(seed));
        // Not the numbers of the projection: they would be orthogonal to it, where ReLU has a kink.
        let (query, key, value) = (draw(5, 4, 11), draw(9, 4, 12), draw(9, 3, 13));
        let grad_out = draw(5, 3, 14);
        let merged = |key: ArrayView2<'_, f64>, value: ArrayView2<'_, f64>| {
            let mut all = performer.state(3)?;
            for rows in [0..4, 4..9] {
                let mut state = performer.state(3)?;
                state.add(key.slice(s![rows.clone(), ..]), value.slice(s![rows, ..]))?;
                all.merge(&state)?;
            }
            Ok::<_, graph_attention::Error>(all)
        };
        let all = merged(key.view(), value.view())?;
        let (grad_query, of_state) = all.attend_vjp(query.view(), grad_out.view(), &mut [])?;
        let [grad_key, grad_value] = all.add_vjp(key.view(), value.view(), &of_state, &mut [])?;
        for seed in 20..24 {
            let along = [draw(5, 4, seed), draw(9, 4, seed + 100), draw(9, 3, seed + 200)];
            let loss = |step: f64| {
                let all = merged(
                    (&key + &(step * &along[1])).view(),
                    (&value + &(step * &along[2])).view(),
                )?;
                Ok::<_, graph_attention::Error>(
                    (all.attend((&query + &(step * &along[0])).view())? * &grad_out).sum(),
                )
            };
            let difference = (loss(1e-5)? - loss(-1e-5)?) / 2e-5;
            let slope = (&grad_query * &along[0]).sum()
                + (&grad_key * &along[1]).sum()
                + (&grad_value * &along[2]).sum();
            let error = (slope - difference).abs();
            assert!(error < 1e-7 * (1.0 + slope.abs()), "{features:?}: {slope} {difference}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_states_that_do_not_fit_are_refused() -> Result<()> {
    let performer = performer::<f64>(Features::Positive, true);
    let x = array![[0.1, 0.9, -0.3, 0.2], [0.8, -0.2, 0.5, 0.4]];
    let (value, grad_out) = (array![[1.0], [2.0]], array![[1.0], [0.5]]);
    let mut state = performer.state(1)?;
    // Without keys nothing flows.
    let (grad_query, _) = state.attend_vjp(x.view(), grad_out.view(), &mut [])?;
    assert_close("empty", 0.0, &grad_query, &Array2::zeros((2, 4)));
    state.add(x.view(), value.view())?;
    let (_, grad) = state.attend_vjp(x.view(), grad_out.view(), &mut [])?;
    refused(
        state.attend_vjp(x.view(), value.slice(s![..1, ..]), &mut []),
        "Shape | grad_out | [2, 1]",
    );
    refused(state.attend_vjp(value.view(), value.view(), &mut []), "Shape | queries");
    let mut wrong = [Array2::<f64>::zeros((3, 4)).into_dyn()];
    refused(
        state.attend_vjp(x.view(), grad_out.view(), &mut wrong),
        "Shape | grad_params | [16, 4] | [3, 4]",
    );
    let mut more = [(); 2].map(|()| Array2::<f64>::zeros((16, 4)).into_dyn());
    refused(
        state.attend_vjp(x.view(), grad_out.view(), &mut more),
        "Shape | grad_params | [1] | [2]",
    );
    refused(state.add_vjp(x.view(), value.view(), &grad, &mut wrong), "Shape | grad_params");
    refused(state.add_vjp(x.view(), x.view(), &grad, &mut []), "Shape | values");
    let larger = &x * 4.0;
    refused(
        state.add_vjp(larger.view(), value.view(), &grad, &mut []),
        "InvalidArgument | keys | in the state | larger",
    );
    let mut other = performer.state(1)?;
    other.add(larger.view(), value.view())?;
    let (_, of_other) = other.attend_vjp(x.view(), grad_out.view(), &mut [])?;
    refused(grad.clone().add(&of_other), "InvalidArgument | other | same state");
    let wide = {
        let mut wide = performer.state(40)?;
        let value = Array2::ones((2, 40));
        wide.add(x.view(), value.view())?;
        wide.attend_vjp(x.view(), value.view(), &mut [])?.1
    };
    refused(grad.clone().add(&wide), "Shape | other");
    refused(state.add_vjp(x.view(), value.view(), &wide, &mut []), "Shape | grad_state");
    Ok(())
}

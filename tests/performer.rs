//! `Performer` against the formulas of its papers, another implementation, and its own alternative paths.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq, relative_eq};
use common::close::{assert_close, assert_close_in_size};
use common::golden;
use common::random::{self, rng};
use graph_attention::ndarray::{Array1, Array2, ArrayD, ArrayView1, Axis, IxDyn, array, s};
use graph_attention::{
    Attention, Causal, Dropout, Error, Flash, Float, Gradients, Graph, Inputs, MultiHead,
    MultiHeadConfig, Performer, PerformerConfig, Saved, params,
    performer::{Features, Projection},
};
use rand::{Rng, RngExt, rngs::Xoshiro256PlusPlus};
use serde_json::Value;
use std::collections::HashMap;

const RELU: Features = Features::Relu { epsilon: 1e-3 };

fn normal<F: Float>(rows: usize, columns: usize, scale: f64, rng: &mut impl Rng) -> Array2<F> {
    random::normal::<f64>(rows, columns, rng).mapv(|x| F::from_f64(scale * x))
}

fn projection_of<F: Float>(performer: &Performer<F>) -> Option<Array2<f64>> {
    let state = params::state(performer);
    let (_, projection) = state.first()?;
    Some(projection.mapv(F::as_f64).into_dimensionality().unwrap())
}

// ---- An oracle ----

/// Computes ln |φᵣ(x)| and its sign by plain loops in `f64`, with φ as in the papers up to constant
/// factors.
fn log_features(
    kind: Features,
    projection: Option<&Array2<f64>>,
    scale: f64,
    x: &[f64],
) -> Vec<(f64, f64)> {
    let positive = |log: f64| (log, 1.0);
    let signed = |value: f64| (value.abs().ln(), value.signum());
    let Some(projection) = projection else {
        // elu(x) + 1
        let elu_plus_1 = |&x: &f64| if x > 0.0 { signed(x + 1.0) } else { positive(x) };
        return x.iter().map(elu_plus_1).collect();
    };
    let half_square = scale * x.iter().map(|x| x * x).sum::<f64>() / 2.0;
    let products = projection
        .rows()
        .into_iter()
        .map(|w| scale.sqrt() * w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
    let products: Vec<f64> = products.collect();
    let each = |f: &dyn Fn(f64) -> (f64, f64)| products.iter().map(|&p| f(p)).collect::<Vec<_>>();
    match kind {
        Features::Positive => each(&|p| positive(p - half_square)),
        Features::Hyperbolic => {
            [each(&|p| positive(p - half_square)), each(&|p| positive(-p - half_square))].concat()
        }
        Features::Trigonometric => {
            let with = |(log, sign): (f64, f64)| (log + half_square, sign);
            [each(&|p| with(signed(p.cos()))), each(&|p| with(signed(p.sin())))].concat()
        }
        Features::Relu { epsilon } => each(&|p| signed(p.max(0.0) + epsilon)),
        other => unreachable!("{other:?} has no projection"),
    }
}

/// Computes Σ sign e^{log} as (log, sum), so that it does not overflow.
fn sum(terms: &[(f64, f64)]) -> (f64, f64) {
    let max = terms.iter().map(|term| term.0).fold(f64::NEG_INFINITY, f64::max);
    (max, terms.iter().map(|(log, sign)| sign * (log - max).exp()).sum())
}

/// Computes one head; `sees` returns what is added to the logit of a pair, or `None` if it is hidden.
fn oracle(
    kind: Features,
    projection: Option<&Array2<f64>>,
    scale: f64,
    [q, k, v]: [&Array2<f64>; 3],
    sees: &dyn Fn(usize, usize) -> Option<f64>,
) -> Array2<f64> {
    let features = |x: ArrayView1<'_, f64>| log_features(kind, projection, scale, &x.to_vec());
    let keys: Vec<_> = k.rows().into_iter().map(features).collect();
    let mut out = Array2::zeros((q.nrows(), v.ncols()));
    for (i, query) in q.rows().into_iter().enumerate() {
        let query = features(query);
        let mut kernels = Vec::new();
        for (j, key) in keys.iter().enumerate() {
            let Some(bias) = sees(i, j) else { continue };
            let terms: Vec<_> =
                query.iter().zip(key).map(|(a, b)| (a.0 + b.0, a.1 * b.1)).collect();
            let (log, value) = sum(&terms);
            kernels.push((j, (log + bias, value)));
        }
        let (_, total) = sum(&kernels.iter().map(|kernel| kernel.1).collect::<Vec<_>>());
        let max = kernels.iter().map(|kernel| kernel.1.0).fold(f64::NEG_INFINITY, f64::max);
        for (j, (log, value)) in kernels {
            out.row_mut(i).scaled_add(value * (log - max).exp() / total, &v.row(j));
        }
    }
    out
}

fn all_kinds() -> [(Features, usize); 5] {
    [
        (Features::Positive, 37),
        (Features::Hyperbolic, 22),
        (Features::Trigonometric, 358),
        (RELU, 19),
        (Features::Elu, 5),
    ]
}

#[test]
fn dense_causal_and_pairs_are_the_oracle() {
    for (kind, features) in all_kinds() {
        for (queries, keys) in [(1, 3), (131, 131), (127, 263), (263, 127), (257, 128)] {
            let mut rng = rng(5);
            let config = PerformerConfig::new(5, features).features(kind).scale(0.7);
            let performer = config.init::<f64>(&mut rng).unwrap();
            let projection = projection_of(&performer);
            // Small enough that cosines do not cancel.
            let size = if kind == Features::Trigonometric { 0.4 } else { 2.0 };
            let q = normal(queries, 5, size, &mut rng);
            let k = normal(keys, 5, size, &mut rng);
            let v = normal(keys, 3, 1.0, &mut rng);
            let expected = |sees: &dyn Fn(usize, usize) -> Option<f64>| {
                oracle(kind, projection.as_ref(), 0.7, [&q, &k, &v], sees)
            };
            let check = |what: &str, inputs: &Inputs<'_, f64>, expected: &Array2<f64>| {
                let what = format_args!("{kind:?} {queries} x {keys} {what}");
                assert_close(what, 1e-11, &performer.forward(inputs).unwrap(), expected);
            };
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
            check("dense", &inputs, &expected(&|_, _| Some(0.0)));
            let top_left = |i: usize, j: usize| (j <= i).then_some(0.0);
            check("causal", &inputs.with_causal(), &expected(&top_left));
            let bottom = inputs.with_causal_alignment(Causal::BottomRight);
            check(
                "bottom right",
                &bottom,
                &expected(&|i, j| (j + queries <= i + keys).then_some(0.0)),
            );
            let offset = inputs.with_causal_alignment(Causal::Offset(2));
            check("offset", &offset, &expected(&|i, j| (j <= i + 2).then_some(0.0)));
            // Every third key is padding.
            let flags = Array1::from_shape_fn(keys, |j| j % 3 != 1);
            let padding = flags.broadcast((queries, keys)).unwrap();
            let padded = inputs.with_mask(padding).unwrap();
            check("padded", &padded, &expected(&|_, j| (j % 3 != 1).then_some(0.0)));
            let both = |i: usize, j: usize| (j % 3 != 1 && j <= i).then_some(0.0);
            check("padded, causal", &padded.with_causal(), &expected(&both));
            let mask = Array2::from_shape_fn((queries, keys), |(i, j)| (i * 3 + j * 5) % 7 != 0);
            let masked = inputs.with_mask(mask.view()).unwrap();
            check("masked", &masked, &expected(&|i, j| mask[[i, j]].then_some(0.0)));
            let bias = normal(queries, keys, 1.0, &mut rng);
            let biased = inputs.with_bias(bias.view()).unwrap();
            check("biased", &biased, &expected(&|i, j| Some(bias[[i, j]])));
            let pairs = (0..queries).flat_map(|i| [(i, i % keys), (i, (i * 7 + 1) % keys)]);
            let graph = Graph::from_edges(queries, keys, pairs).unwrap();
            if keys > 3 {
                let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph).unwrap();
                let sees =
                    |i: usize, j: usize| graph.neighbors(i).contains(&(j as u32)).then_some(0.0);
                check("graph", &sparse, &expected(&sees));
            }
        }
    }
}

#[test]
fn large_norms_are_the_oracle_too() {
    // Features and kernels that overflow.
    for (kind, features) in all_kinds().into_iter().filter(|kind| kind.0 != Features::Trigonometric)
    {
        for size in [10.0, 100.0, 1000.0] {
            let mut rng = rng(6);
            let config = PerformerConfig::new(5, features).features(kind);
            let performer = config.init::<f64>(&mut rng).unwrap();
            let projection = projection_of(&performer);
            let [q, k, v] =
                [(211, 5), (211, 5), (211, 3)].map(|(n, d)| normal(n, d, 1.0, &mut rng));
            let (q, k) = (q * size, k * size);
            let scale = 1.0 / 5f64.sqrt();
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
            let graph_pairs = (0..211).flat_map(|i| (0..211).map(move |j| (i, j)));
            let graph = Graph::from_edges(211, 211, graph_pairs).unwrap();
            let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph).unwrap();
            for (what, inputs, causal) in [
                ("dense", inputs, false),
                ("causal", inputs.with_causal(), true),
                ("graph", sparse, false),
            ] {
                let sees = |i: usize, j: usize| (!causal || j <= i).then_some(0.0);
                let expected = oracle(kind, projection.as_ref(), scale, [&q, &k, &v], &sees);
                // Exponents of up to size² are rounded.
                let tolerance = 1e-13 * (1.0 + size * size);
                let what = format_args!("{kind:?} {size} {what}");
                assert_close(what, tolerance, &performer.forward(&inputs).unwrap(), &expected);
            }
        }
    }
}

/// Compares the gradients of ⟨grad_out, out⟩ through sums and through pairs.
#[test]
fn gradients_of_sums_are_those_of_pairs() {
    let (n_q, n_k, d, d_v, heads, kv_heads) = (263, 259, 5, 3, 4, 2);
    for (kind, features) in all_kinds() {
        // At the largest size, rows of the causal pattern underflow.
        for size in [0.3, 3.0, 300.0] {
            if kind == Features::Trigonometric && size > 1.0 {
                continue;
            }
            let mut rng = rng(7);
            let config = PerformerConfig::new(d, features).features(kind).learn_projection(true);
            let performer = config.init::<f64>(&mut rng).unwrap();
            let q = normal(n_q, heads * d, size, &mut rng);
            let k = normal(n_k, kv_heads * d, size, &mut rng);
            let v = normal(n_k, kv_heads * d_v, 1.0, &mut rng);
            let grad_out = normal(n_q, heads * d_v, 1.0, &mut rng);
            let no_bias = Array2::zeros((n_q, n_k));
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
            let inputs = inputs.with_grouped_heads(heads, kv_heads).unwrap();
            let causal = [Causal::TopLeft, Causal::BottomRight, Causal::Offset(3)];
            let causal = causal.map(|alignment| inputs.with_causal_alignment(alignment));
            for (case, inputs) in [inputs].into_iter().chain(causal).enumerate() {
                let run = |inputs: &Inputs<'_, f64>| {
                    let (out, saved) = performer.forward_train(inputs).unwrap();
                    (out, performer.backward(inputs, &saved, grad_out.view()).unwrap())
                };
                let (out, sums) = run(&inputs);
                let (expected, pairs) = run(&inputs.with_bias(no_bias.view()).unwrap());
                let what = format!("{kind:?} {size}, case {case}");
                let tolerance = 1e-12 * (1.0 + size * size);
                let close = |what: String, a: &Array2<f64>, b: &Array2<f64>| {
                    assert_close_in_size(what, tolerance, 1e-3, a, b);
                };
                close(format!("{what}: out"), &out, &expected);
                close(format!("{what}: query"), &sums.query, &pairs.query);
                close(format!("{what}: key"), &sums.key, &pairs.key);
                close(format!("{what}: value"), &sums.value, &pairs.value);
                let matrix = |grads: &Gradients<f64>| {
                    grads.params.first().map(|p| p.clone().into_dimensionality().unwrap())
                };
                if let (Some(a), Some(b)) = (matrix(&sums), matrix(&pairs)) {
                    close(format!("{what}: projection"), &a, &b);
                }
            }
        }
    }
}

// ---- Lemma 2, Theorem 2 ----

/// Returns the mean and its standard error.
fn mean(numbers: &[f64]) -> (f64, f64) {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, (variance / count).sqrt())
}

/// Estimates e^{x·y} with new projections.
fn estimates(config: &PerformerConfig, x: &[f64], y: &[f64], count: usize) -> Vec<f64> {
    let mut rng = rng(11);
    let rows = Array2::from_shape_vec((2, x.len()), [x, y].concat()).unwrap();
    let mut performer = config.init::<f64>(&mut rng).unwrap();
    (0..count)
        .map(|_| {
            performer.redraw(&mut rng).unwrap();
            let phi = performer.feature_map(rows.view()).unwrap();
            phi.row(0).dot(&phi.row(1))
        })
        .collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Computes the closed forms of the paper, for r independent projections.
fn lemma_2(kind: Features, x: &[f64], y: &[f64], r: f64) -> f64 {
    let sm = dot(x, y).exp();
    let square = |sign: f64| x.iter().zip(y).map(|(x, y)| (x + sign * y).powi(2)).sum::<f64>();
    let (sum, difference) = (square(1.0), square(-1.0));
    let positive = sum.exp() * sm.powi(2) * (1.0 - (-sum).exp()) / r;
    match kind {
        Features::Positive => positive,
        Features::Hyperbolic => (1.0 - (-sum).exp()) / 2.0 * positive,
        _ => sum.exp() / sm.powi(2) * (1.0 - (-difference).exp()).powi(2) / (2.0 * r),
    }
}

#[test]
fn estimates_are_unbiased_with_the_variance_of_lemma_2() {
    let x = [0.3, -0.4, 0.1];
    for y in [[0.2, 0.1, -0.3], [0.4, -0.4, 0.2], [-0.3, 0.35, 0.0]] {
        for (kind, features, r) in [
            (Features::Positive, 4, 4.0),
            (Features::Hyperbolic, 8, 4.0),
            (Features::Trigonometric, 8, 4.0),
        ] {
            let config = PerformerConfig::new(3, features).features(kind).scale(1.0);
            let exact = dot(&x, &y).exp();
            let expected = lemma_2(kind, &x, &y, r);
            let values = estimates(&config.clone().projection(Projection::Iid), &x, &y, 40_000);
            let (average, error) = mean(&values);
            assert!(
                abs_diff_eq!(average, exact, epsilon = 4.5 * error),
                "{kind:?}: {average} {exact} {error}"
            );
            assert!(error < 0.01 * exact, "{error}");
            let squares: Vec<f64> = values.iter().map(|value| (value - exact).powi(2)).collect();
            let (average, error) = mean(&squares);
            assert!(
                abs_diff_eq!(average, expected, epsilon = 4.5 * error),
                "{kind:?}: {average} {expected}"
            );
            assert!(error < 0.1 * expected, "{error} {expected}");
            // The crate predicts the same variance.
            let performer = config.init::<f64>(&mut rng(1)).unwrap();
            let (q, k) = (Array1::from(x.to_vec()), Array1::from(y.to_vec()));
            let variance = performer.relative_variance(q.view(), k.view()).unwrap();
            let absolute = variance * exact * exact;
            let is_same = relative_eq!(absolute, expected, epsilon = 0.0, max_relative = 1e-12);
            assert!(is_same, "{kind:?}: {absolute} {expected}");
            let wanted = performer.num_features_for(q.view(), k.view(), 0.01).unwrap();
            // A valid number: even, for features in pairs.
            let pairs = features as f64 / r;
            assert_eq!(wanted, (variance * r / 1e-4).ceil() * pairs);
            let enough = PerformerConfig::new(3, wanted as usize).features(kind);
            assert!(enough.init::<f64>(&mut rng(1)).is_ok(), "{kind:?}: {wanted}");
            // Orthogonal projections are unbiased too.
            let (average, error) = mean(&estimates(&config, &x, &y, 40_000));
            assert!(
                abs_diff_eq!(average, exact, epsilon = 4.5 * error),
                "{kind:?}: {average} {exact} {error}"
            );
        }
    }
}

#[test]
fn orthogonal_projections_err_less_by_theorem_2() {
    // m ≤ d
    let (d, m) = (5, 5);
    let x = [0.3, -0.3, 0.2, 0.1, 0.2];
    let y = [0.2, -0.4, 0.1, 0.2, 0.0];
    let config = PerformerConfig::new(d, m).scale(1.0);
    let exact = dot(&x, &y).exp();
    let squares = |config: &PerformerConfig| -> (f64, f64) {
        let values = estimates(config, &x, &y, 100_000);
        mean(&values.iter().map(|value| (value - exact).powi(2)).collect::<Vec<_>>())
    };
    let norms = (-(dot(&x, &x) + dot(&y, &y)) / 2.0).exp();
    let gain = 2.0 * (m as f64 - 1.0) / (m as f64 * (d as f64 + 2.0)) * (exact - norms).powi(2);
    let bound = lemma_2(Features::Positive, &x, &y, m as f64) - gain;
    let (orthogonal, error) = squares(&config);
    assert!(orthogonal < bound + 4.5 * error, "{orthogonal} {bound} {error}");
    // Independent projections fail this test.
    let (independent, error) = squares(&config.projection(Projection::Iid));
    assert!(independent > bound + 4.5 * error, "{independent} {bound} {error}");
}

#[test]
fn orthogonal_blocks_are_uniform_rotations_with_chi_norms() {
    let mut rng = rng(12);
    let (mut squares, mut of_squares, mut traces, mut of_traces) = (vec![], vec![], vec![], vec![]);
    let mut performer = PerformerConfig::new(3, 7).init::<f64>(&mut rng).unwrap();
    for _ in 0..20_000 {
        performer.redraw(&mut rng).unwrap();
        let mut w = projection_of(&performer).unwrap();
        for mut row in w.rows_mut() {
            let square = row.dot(&row);
            squares.push(square);
            of_squares.push((square - 3.0).powi(2));
            row /= square.sqrt();
        }
        for block in [s![0..3, ..], s![3..6, ..]] {
            let block = w.slice(block);
            let error = (block.dot(&block.t()) - Array2::<f64>::eye(3)).mapv(f64::abs).sum();
            assert_abs_diff_eq!(error, 0.0, epsilon = 1e-12);
            let trace = block.diag().sum();
            traces.push(trace);
            of_traces.push(trace * trace);
        }
    }
    // |w|² is χ² distributed with 3 degrees of freedom. The trace of a uniform orthogonal matrix has the
    // mean 0 and the variance 1; without the signs of R it would have another mean.
    for (numbers, expected) in [(squares, 3.0), (of_squares, 6.0), (traces, 0.0), (of_traces, 1.0)]
    {
        let (average, error) = mean(&numbers);
        assert!(
            abs_diff_eq!(average, expected, epsilon = 4.5 * error),
            "{average} {expected} {error}"
        );
    }
}

#[test]
fn errors_of_outputs_fall_with_the_root_of_the_features() {
    let (n, d) = (61, 16);
    let mut rng = rng(13);
    let mut unit = || {
        let mut x: Array2<f64> = normal(n, d, 1.0, &mut rng);
        x.rows_mut().into_iter().for_each(|mut row| row /= row.dot(&row).sqrt());
        x
    };
    let (q, k, v) = (unit(), unit(), unit());
    let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
    let exact = Flash::new().with_scale(1.0).unwrap().forward(&inputs).unwrap();
    for kind in [Features::Positive, Features::Hyperbolic, Features::Trigonometric] {
        let mut points = Vec::new();
        for num_features in [16, 64, 256, 1024] {
            let config = PerformerConfig::new(d, num_features).features(kind).scale(1.0);
            let mut square = 0.0;
            for seed in 0..20 {
                let performer = config.init::<f64>(&mut self::rng(seed)).unwrap();
                let error = performer.forward(&inputs).unwrap() - &exact;
                square += error.iter().map(|e| e * e).sum::<f64>();
            }
            points.push(((num_features as f64).ln(), square.sqrt().ln()));
        }
        let count = points.len() as f64;
        let middle = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (middle(|p| p.0), middle(|p| p.1));
        let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>()
            / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
        assert!((-0.7..=-0.3).contains(&slope), "{kind:?}: {slope}");
    }
}

// ---- Range ----

#[test]
fn nothing_overflows_up_to_norms_of_a_thousand_in_f32() {
    let graph = Graph::from_edges(211, 211, (0..211).flat_map(|i| [(i, i), (i, (i * 5) % 211)]));
    let graph = graph.unwrap();
    for (kind, features) in all_kinds() {
        for size in [1e-3, 1.0, 30.0, 1e3] {
            let mut rng = rng(14);
            let config =
                PerformerConfig::new(5, features).features(kind).scale(1.0).learn_projection(true);
            let performer = config.init::<f32>(&mut rng).unwrap();
            let unit = |rng: &mut Xoshiro256PlusPlus| {
                let mut x: Array2<f32> = normal(211, 5, 1.0, rng);
                for mut row in x.rows_mut() {
                    let norm = row.dot(&row).sqrt();
                    row *= size / norm;
                }
                x
            };
            let (q, k) = (unit(&mut rng), unit(&mut rng));
            let ones = Array2::<f32>::ones((211, 2));
            let dense = Inputs::dense(q.view(), k.view(), ones.view()).unwrap();
            let sparse = Inputs::graph(q.view(), k.view(), ones.view(), &graph).unwrap();
            for inputs in [dense, dense.with_causal(), sparse] {
                let (out, saved) = performer.forward_train(&inputs).unwrap();
                let grads = performer.backward(&inputs, &saved, out.view()).unwrap();
                let all = grads.query.iter().chain(&grads.key).chain(&grads.value).chain(&out);
                assert!(
                    all.chain(grads.params.iter().flatten()).all(|x| x.is_finite()),
                    "{kind:?}"
                );
                // The mean of ones is 1; cosines may cancel.
                if kind != Features::Trigonometric || size < 0.1 {
                    let ones = Array2::ones(out.raw_dim());
                    assert_close(format_args!("{kind:?} {size}"), 1e-5, &out, &ones);
                }
            }
        }
    }
}

/// Short and long vectors together, so that the exponents of two keys are relative to very different
/// numbers.
#[test]
fn nothing_overflows_with_norms_from_a_thousandth_to_a_thousand() {
    let (n_q, n_k) = (263, 300);
    let mut rng = rng(29);
    for (kind, features) in all_kinds() {
        let config =
            PerformerConfig::new(5, features).features(kind).scale(1.0).learn_projection(true);
        let performer = config.init::<f32>(&mut rng).unwrap();
        let mut mixed = |n: usize| {
            let mut x: Array2<f32> = normal(n, 5, 1.0, &mut rng);
            for mut row in x.rows_mut() {
                let size = 10f32.powf(rng.random_range(-3.0..3.0f32));
                row *= size / row.dot(&row).sqrt();
            }
            x
        };
        let (q, k) = (mixed(n_q), mixed(n_k));
        let (ones, grad_out) = (Array2::ones((n_k, 2)), normal::<f32>(n_q, 2, 1.0, &mut rng));
        let edges = (0..n_q).flat_map(|i| [(i, i), (i, (i * 5) % n_k), (i, (i * 7) % n_k)]);
        let graph = Graph::from_edges(n_q, n_k, edges).unwrap();
        let inputs = Inputs::dense(q.view(), k.view(), ones.view()).unwrap();
        let sparse = Inputs::graph(q.view(), k.view(), ones.view(), &graph).unwrap();
        let bottom = inputs.with_causal_alignment(Causal::BottomRight);
        for (case, inputs) in [inputs, inputs.with_causal(), bottom, sparse].iter().enumerate() {
            let (out, saved) = performer.forward_train(inputs).unwrap();
            let grads = performer.backward(inputs, &saved, grad_out.view()).unwrap();
            let arrays = [&out, &grads.query, &grads.key, &grads.value];
            let is_finite = arrays.iter().all(|array| array.iter().all(|x| x.is_finite()))
                && grads.params.iter().flatten().all(|x| x.is_finite());
            assert!(is_finite, "{kind:?}, case {case}");
            if kind != Features::Trigonometric {
                let ones = Array2::ones(out.raw_dim());
                assert_close(format_args!("{kind:?}, case {case}"), 1e-5, &out, &ones);
            }
        }
    }
}

#[test]
fn what_comes_later_changes_no_bit_of_causal_rows() {
    let mut rng = rng(15);
    for (kind, features) in all_kinds() {
        let config = PerformerConfig::new(5, features).features(kind);
        let performer = config.init::<f32>(&mut rng).unwrap();
        let [q, k, v] = [(300, 5), (300, 5), (300, 3)].map(|(n, d)| normal(n, d, 0.5, &mut rng));
        let run = |k: &Array2<f32>, v: &Array2<f32>| {
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_causal();
            performer.forward(&inputs).unwrap()
        };
        let all = run(&k, &v);
        for first in [1, 77, 128, 131, 256, 299] {
            let (mut k, mut v) = (k.clone(), v.clone());
            k.slice_mut(s![first.., ..]).mapv_inplace(|x| -30.0 * x);
            v.slice_mut(s![first.., ..]).fill(7.0);
            assert_eq!(run(&k, &v).slice(s![..first, ..]), all.slice(s![..first, ..]), "{kind:?}");
        }
    }
}

/// NaN in a query does not reach the gradients of keys that it does not see.
#[test]
fn bad_causal_queries_touch_only_what_they_see() {
    let mut rng = rng(30);
    for (kind, features) in all_kinds() {
        let config = PerformerConfig::new(5, features).features(kind);
        let performer = config.init::<f64>(&mut rng).unwrap();
        let [mut q, k, v] =
            [(300, 5), (300, 5), (300, 3)].map(|(n, d)| normal(n, d, 0.5, &mut rng));
        let mut run = |bad: Option<usize>| {
            if let Some(row) = bad {
                q.row_mut(row).fill(f64::NAN);
            }
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_causal();
            let (out, saved) = performer.forward_train(&inputs).unwrap();
            (performer.backward(&inputs, &saved, v.view()).unwrap(), out)
        };
        let (expected, clean) = run(None);
        let (grads, out) = run(Some(150));
        for (row, actual) in out.rows().into_iter().enumerate() {
            let is_right = if row == 150 { actual[0].is_nan() } else { actual == clean.row(row) };
            assert!(is_right, "{kind:?} {row}");
        }
        for (actual, expected) in [(&grads.key, &expected.key), (&grads.value, &expected.value)] {
            assert!(actual.slice(s![..151, ..]).iter().all(|x| x.is_nan()), "{kind:?}");
            assert_eq!(actual.slice(s![151.., ..]), expected.slice(s![151.., ..]), "{kind:?}");
        }
        for (row, actual) in grads.query.rows().into_iter().enumerate() {
            assert_eq!(row == 150, actual.iter().any(|x| x.is_nan()), "{kind:?} {row}");
        }
    }
}

/// NaN in a key or value does not reach the rows that do not see it.
#[test]
fn bad_causal_keys_and_values_touch_only_who_sees_them() {
    let mut rng = rng(33);
    for (kind, features) in all_kinds() {
        let config = PerformerConfig::new(5, features).features(kind);
        let performer = config.init::<f64>(&mut rng).unwrap();
        let [q, k, v] = [(300, 5), (300, 5), (300, 3)].map(|(n, d)| normal(n, d, 0.5, &mut rng));
        let run = |k: &Array2<f64>, v: &Array2<f64>| {
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
            performer.forward(&inputs.with_causal()).unwrap()
        };
        let clean = run(&k, &v);
        for bad in [f64::NAN, f64::INFINITY] {
            let (mut bad_k, mut bad_v) = (k.clone(), v.clone());
            (bad_k[[150, 4]], bad_v[[150, 0]]) = (bad, bad);
            for (what, out) in [("key", run(&bad_k, &v)), ("value", run(&k, &bad_v))] {
                let before = s![..150, ..];
                assert_eq!(out.slice(before), clean.slice(before), "{kind:?} {what} {bad}");
                let seen = out.slice(s![150.., 0]);
                assert!(seen.iter().all(|x| x.is_nan()), "{kind:?} {what} {bad}");
            }
        }
    }
}

/// Selects rows of a causal pattern that are more keys apart than a chunk.
#[test]
fn selected_queries_are_the_rows_of_the_whole() {
    let mut rng = rng(28);
    let performer = PerformerConfig::new(5, 24).init::<f64>(&mut rng).unwrap();
    let [q, k, v] = [(701, 10), (701, 10), (701, 6)].map(|(n, d)| normal(n, d, 0.7, &mut rng));
    let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_heads(2).unwrap();
    let inputs = inputs.with_causal();
    let all: Vec<usize> = (0..701).collect();
    for queries in [vec![0, 3, 300, 301, 302, 650], vec![5], vec![700], all] {
        let selected = inputs.select_queries(&queries).unwrap();
        let (out, saved) = performer.forward_train(&selected.inputs()).unwrap();
        let whole = performer.forward(&inputs).unwrap().select(Axis(0), &queries);
        let what = format!("{} queries", queries.len());
        assert_close(&what, 1e-12, &out, &whole);
        let grads = performer.backward(&selected.inputs(), &saved, out.view()).unwrap();
        // The whole inputs, with a gradient only in these rows.
        let (_, saved) = performer.forward_train(&inputs).unwrap();
        let mut grad_out = Array2::zeros((701, 6));
        queries.iter().zip(out.rows()).for_each(|(&i, row)| grad_out.row_mut(i).assign(&row));
        let expected = performer.backward(&inputs, &saved, grad_out.view()).unwrap();
        assert_close(format_args!("{what}, key"), 1e-12, &grads.key, &expected.key);
        assert_close(format_args!("{what}, value"), 1e-12, &grads.value, &expected.value);
        let rows = expected.query.select(Axis(0), &queries);
        assert_close(format_args!("{what}, query"), 1e-12, &grads.query, &rows);
    }
}

#[test]
fn padding_leaves_both_sums() {
    let mut rng = rng(16);
    let performer = PerformerConfig::new(5, 33).init::<f32>(&mut rng).unwrap();
    let [q, k, v] = [(11, 5), (290, 5), (290, 3)].map(|(n, d)| normal(n, d, 1.0, &mut rng));
    let flags = Array1::from_shape_fn(290, |j| j < 173);
    let mask = flags.broadcast((11, 290)).unwrap();
    let mut bad = k.clone();
    bad.slice_mut(s![173.., ..]).fill(f32::NAN);
    let padded = Inputs::dense(q.view(), bad.view(), v.view()).unwrap().with_mask(mask).unwrap();
    let (k, v) = (k.slice(s![..173, ..]), v.slice(s![..173, ..]));
    let short = Inputs::dense(q.view(), k, v).unwrap();
    assert_eq!(performer.forward(&padded).unwrap(), performer.forward(&short).unwrap());
}

// ---- State ----

#[test]
fn a_state_is_the_attention_over_its_keys() {
    for (kind, features) in all_kinds() {
        let mut rng = rng(17);
        let config = PerformerConfig::new(5, features).features(kind);
        let performer = config.init::<f64>(&mut rng).unwrap();
        let [q, k, v] = [(7, 5), (173, 5), (173, 3)].map(|(n, d)| normal(n, d, 0.5, &mut rng));
        let part = |x: &Array2<f64>, from: usize, to: usize| x.slice(s![from..to, ..]).to_owned();
        let expect = |state: &graph_attention::performer::PerformerState<f64>, from, to| {
            let (k, v) = (part(&k, from, to), part(&v, from, to));
            let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
            let expected = performer.forward(&inputs).unwrap();
            let what = format_args!("{kind:?} {from}..{to}");
            assert_close(what, 1e-10, &state.attend(q.view()).unwrap(), &expected);
            assert_eq!(state.num_keys(), to - from);
        };
        let mut state = performer.state(3).unwrap();
        assert_eq!(state.attend(q.view()).unwrap(), Array2::<f64>::zeros((7, 3)));
        state.add(part(&k, 0, 60).view(), part(&v, 0, 60).view()).unwrap();
        expect(&state, 0, 60);
        let mut other = performer.state(3).unwrap();
        other.add(part(&k, 60, 173).view(), part(&v, 60, 173).view()).unwrap();
        state.merge(&other).unwrap();
        expect(&state, 0, 173);
        for at in 0..100 {
            let (k, v) = (part(&k, at, at + 1), part(&v, at, at + 1));
            state.remove(k.view(), v.view()).unwrap();
        }
        expect(&state, 100, 173);
        state.remove(part(&k, 100, 173).view(), part(&v, 100, 173).view()).unwrap();
        assert_eq!(state.attend(q.view()).unwrap(), Array2::<f64>::zeros((7, 3)));
    }
}

#[test]
fn a_state_tells_when_removal_has_left_nothing_but_rounding() {
    let mut rng = rng(18);
    let performer = PerformerConfig::new(2, 64).scale(1.0).init::<f64>(&mut rng).unwrap();
    let near = array![[1.0, 0.0], [0.9, 0.1]];
    // Its features are e^{−200} times the others'.
    let far = array![[-20.0, 0.0]];
    let mut state = performer.state(1).unwrap();
    state.add(near.view(), array![[1.0], [1.0]].view()).unwrap();
    state.add(far.view(), array![[5.0]].view()).unwrap();
    assert_abs_diff_eq!(state.attend(near.view()).unwrap()[[0, 0]], 1.0, epsilon = 1e-12);
    state.remove(near.view(), array![[1.0], [1.0]].view()).unwrap();
    let error = state.attend(near.view()).unwrap_err().to_string();
    assert!(error.contains("removed"), "{error}");

    let bad = array![[f64::NAN, 0.0]];
    assert!(state.add(bad.view(), array![[1.0]].view()).unwrap_err().to_string().contains("row 0"));
    assert!(state.remove(near.view(), array![[1.0], [1.0]].view()).is_err());
    let other = PerformerConfig::new(2, 64).init::<f64>(&mut rng).unwrap().state(1).unwrap();
    assert!(state.merge(&other).is_err());
    assert!(performer.state(0).is_err());
}

/// Removed keys do not affect the output, or the output is an error, even if their values and keys
/// outweigh all remaining ones.
#[test]
fn removal_never_leaves_a_wrong_answer() {
    let near = array![[0.4, 0.1], [-0.3, 0.2]];
    let values = array![[1.0, -2.0], [3.0, 0.5]];
    for kind in
        [Features::Positive, Features::Hyperbolic, Features::Trigonometric, RELU, Features::Elu]
    {
        let features = if kind == Features::Elu { 2 } else { 64 };
        let config = PerformerConfig::new(2, features).features(kind).scale(1.0);
        let performer = config.init::<f64>(&mut rng(31)).unwrap();
        let mut refused = 0;
        for norm in [1.0, 3.0, 6.0, 10.0, 40.0, 1e3, 1e9] {
            for size in [1.0, 1e3, 1e9, 1e15, 1e20, 1e100] {
                let mut state = performer.state(2).unwrap();
                state.add(near.view(), values.view()).unwrap();
                let expected = state.attend(near.view()).unwrap();
                let (key, value) = (array![[norm, 0.3 * norm]], array![[size, 0.7 * size]]);
                let mut other = performer.state(2).unwrap();
                other.add(key.view(), value.view()).unwrap();
                state.merge(&other).unwrap();
                state.remove(key.view(), value.view()).unwrap();
                match state.attend(near.view()) {
                    Ok(out) => {
                        assert_close(
                            format_args!("{kind:?} {norm} {size:e}"),
                            1e-2,
                            &out,
                            &expected,
                        );
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("removed"), "{error}");
                        refused += 1;
                    }
                }
                // A state without keys keeps nothing of removed ones.
                let mut empty = state.clone();
                empty.remove(near.view(), values.view()).unwrap();
                empty.add(near.view(), values.view()).unwrap();
                assert_eq!(empty.attend(near.view()).unwrap(), expected);
                // Once the key is added again, it is not refused.
                state.add(key.view(), value.view()).unwrap();
                assert!(state.attend(key.view()).is_ok(), "{kind:?} {norm}");
            }
        }
        assert!(refused < 36, "{kind:?}: {refused}");
    }
}

/// The same if keys are added together and removed one by one, with different rounding.
#[test]
fn removal_one_by_one_never_leaves_a_wrong_answer() {
    let mut rng = rng(34);
    let (mut refused, mut answered) = (0, 0);
    let mut check = |performer: &Performer<f64>, [q, kept, kept_v, k, v]: [&Array2<f64>; 5]| {
        let mut state = performer.state(1).unwrap();
        state.add(kept.view(), kept_v.view()).unwrap();
        let expected = state.attend(q.view()).unwrap();
        state.add(k.view(), v.view()).unwrap();
        for row in 0..k.nrows() {
            state.remove(k.slice(s![row..=row, ..]), v.slice(s![row..=row, ..])).unwrap();
        }
        match state.attend(q.view()) {
            Ok(out) => {
                answered += 1;
                assert_close(format_args!("{:?}", performer.config()), 1e-2, &out, &expected);
            }
            Err(_) => refused += 1,
        }
    };
    let center = array![[0.8, -0.6]];
    for kind in [Features::Positive, Features::Hyperbolic] {
        let config = PerformerConfig::new(2, 64).features(kind).scale(1.0);
        let performer = config.init::<f64>(&mut rng).unwrap();
        let around = |norm: f64, count: usize, rng: &mut _| {
            &center * norm + normal::<f64>(count, 2, 1.0 / norm, rng)
        };
        // Long keys, whose exponents are rounded, and large values.
        for norm in [1.0, 30.0, 1e3] {
            for size in [1.0, 1e6, 1e8, 1e9, 1e12] {
                let (kept, k) = (around(norm, 4, &mut rng), around(norm, 40, &mut rng));
                let (kept_v, v) = (normal(4, 1, 1.0, &mut rng), normal(40, 1, size, &mut rng));
                check(&performer, [&kept, &kept, &kept_v, &k, &v]);
            }
        }
        // The remaining keys weigh less than rounding, so sums may become negative.
        for norm in [-6.0, -9.0, -20.0] {
            for _ in 0..20 {
                let (q, k) = (around(1.0, 1, &mut rng), around(1.0, 40, &mut rng));
                let (kept_v, v) = (Array2::ones((1, 1)), normal(40, 1, 1.0, &mut rng));
                check(&performer, [&q, &(&center * norm), &kept_v, &k, &v]);
            }
        }
    }
    // Cosines, with which rounding errors may look like cancellation.
    let config = PerformerConfig::new(1, 2).features(Features::Trigonometric).scale(1.0);
    let one = [("projection_matrix", ArrayD::<f64>::ones(IxDyn(&[1, 1])))];
    let performer = config.from_params(one).unwrap();
    for step in 0..100 {
        let key = 8.0 + 0.01 * f64::from(step);
        let query = -(key.cos() / key.sin()).abs().atan();
        let (near, values) = (array![[0.1], [-0.4]], array![[1.0], [3.0]]);
        let [query, key] = [query, key].map(|x| array![[x]]);
        check(&performer, [&query, &near, &values, &key, &array![[1.0]]]);
    }
    assert!(refused > 20 && answered > 20, "{refused} {answered}");
}

/// Adds and removes thousands of keys in turn.
#[test]
fn a_state_does_not_drift() {
    let mut rng = rng(32);
    let performer = PerformerConfig::new(5, 32).init::<f32>(&mut rng).unwrap();
    let [q, k, v] = [(7, 5), (5000, 5), (5000, 3)].map(|(n, d)| normal::<f32>(n, d, 1.0, &mut rng));
    let mut state = performer.state(3).unwrap();
    for at in 0..5000usize {
        state.add(k.slice(s![at..=at, ..]), v.slice(s![at..=at, ..])).unwrap();
        if let Some(old) = at.checked_sub(40) {
            state.remove(k.slice(s![old..=old, ..]), v.slice(s![old..=old, ..])).unwrap();
        }
    }
    let (k, v) = (k.slice(s![4960.., ..]), v.slice(s![4960.., ..]));
    let mut fresh = performer.state(3).unwrap();
    fresh.add(k, v).unwrap();
    assert_eq!(state.num_keys(), 40);
    let expected = fresh.attend(q.view()).unwrap();
    assert_abs_diff_eq!(state.attend(q.view()).unwrap(), expected, epsilon = 1e-6);
}

// ---- How wrong ----

#[test]
fn the_standard_error_is_the_error() {
    let mut rng = rng(19);
    let [q, k, v] = [(5, 4), (83, 4), (83, 3)].map(|(n, d)| normal::<f64>(n, d, 0.3, &mut rng));
    let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
    let exact = Flash::new().forward(&inputs).unwrap();
    for kind in [Features::Positive, Features::Hyperbolic, Features::Trigonometric] {
        let config = PerformerConfig::new(4, 256).features(kind).projection(Projection::Iid);
        let mut performer = config.init::<f64>(&mut rng).unwrap();
        let (mut actual, mut said) = (Array1::<f64>::zeros(5), Array1::<f64>::zeros(5));
        for _ in 0..300 {
            performer.redraw(&mut rng).unwrap();
            let error = performer.forward(&inputs).unwrap() - &exact;
            actual += &error.mapv(|e| e * e).sum_axis(Axis(1));
            let accuracy = performer.estimate_error(&inputs).unwrap();
            said += &accuracy.standard_error.column(0).mapv(|e| e * e);
            let effective = &accuracy.effective_features;
            assert!(effective.iter().all(|&m| m > 5.0 && m <= 256.0), "{kind:?}: {effective}");
        }
        // The mean of three hundred squares is accurate to some ten percent.
        for ratio in (&said / &actual).mapv(f64::sqrt) {
            assert!((0.8..1.25).contains(&ratio), "{kind:?}: {ratio}");
        }
    }
    let hopeless = PerformerConfig::new(4, 64).init::<f64>(&mut rng).unwrap();
    let far = (&q * 30.0, &k * 30.0);
    let inputs = Inputs::dense(far.0.view(), far.1.view(), v.view()).unwrap();
    let accuracy = hopeless.estimate_error(&inputs).unwrap();
    assert!(accuracy.effective_features.iter().all(|&m| m < 5.0), "{accuracy:?}");
    assert!(hopeless.relative_variance(far.0.row(0), far.1.row(0)).unwrap() > 1e10);
}

// ---- Parameters and errors ----

#[test]
fn a_projection_is_saved_and_loaded() {
    let config = PerformerConfig::new(3, 8).features(Features::Hyperbolic);
    let performer = config.init::<f64>(&mut rng(20)).unwrap();
    let state = params::state(&performer);
    assert_eq!(state[0].0, "projection_matrix");
    assert_eq!(state[0].1.shape(), [4, 3]);
    let loaded = config.from_params(state).unwrap();
    let x: Array2<f64> = normal(7, 3, 1.0, &mut rng(21));
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    assert_eq!(loaded.forward(&inputs).unwrap(), performer.forward(&inputs).unwrap());
    let mut redrawn = loaded.clone();
    redrawn.redraw(&mut rng(22)).unwrap();
    assert_ne!(redrawn.forward(&inputs).unwrap(), performer.forward(&inputs).unwrap());
    let wrong = [("projection_matrix", ArrayD::<f64>::zeros(IxDyn(&[8, 3])))];
    assert!(matches!(config.from_params(wrong), Err(Error::Shape { .. })));
    let elu = PerformerConfig::new(3, 3).features(Features::Elu);
    assert!(params::state(&elu.init::<f64>(&mut rng(1)).unwrap()).is_empty());
}

fn a_projection_is_trained_only_if_asked<F: Float>() {
    let x: Array2<F> = normal(9, 4, 1.0, &mut rng(33));
    let mask = Array2::from_shape_fn((9, 9), |(i, j)| (i + j) % 3 > 0);
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    // With sums, with causal sums, and pair by pair.
    for inputs in [inputs, inputs.with_causal(), inputs.with_mask(mask.view()).unwrap()] {
        for kind in [Features::Positive, Features::Hyperbolic, RELU] {
            let config = PerformerConfig::new(2, 6).features(kind);
            let layer = |config: &PerformerConfig| {
                let inner: Performer<F> = config.init(&mut rng(34)).unwrap();
                MultiHeadConfig::new(4, 2).init(inner, &mut rng(35)).unwrap()
            };
            let [mut fixed, mut learned] =
                [layer(&config), layer(&config.clone().learn_projection(true))];
            let steps = |layer: &mut MultiHead<F, Performer<F>>| {
                let mut names = Vec::new();
                for _ in 0..30 {
                    let (out, saved) = layer.forward_train(&inputs).unwrap();
                    let grads = layer.backward(&inputs, &saved, out.view()).unwrap();
                    // With weight decay, which needs no gradient.
                    params::update(layer, &grads.params, |name, mut param, grad| {
                        names.push(name.to_owned());
                        param.zip_mut_with(&grad, |x, &g| {
                            *x = F::from_f64(0.99) * *x - F::from_f64(0.01) * g
                        });
                    })
                    .unwrap();
                }
                names.contains(&"inner.projection_matrix".to_owned())
            };
            let before = projection_of(fixed.inner());
            assert_eq!(before, projection_of(learned.inner()));
            assert!(!steps(&mut fixed));
            assert_eq!(projection_of(fixed.inner()), before);
            assert!(steps(&mut learned));
            assert_ne!(projection_of(learned.inner()), before);

            // Both save and load it under the same name.
            let buffers: Vec<String> =
                params::buffers(&fixed).into_iter().map(|(name, _)| name).collect();
            assert_eq!(buffers, ["inner.projection_matrix"]);
            assert_eq!(params::buffers(&learned), []);
            params::load_state(&mut fixed, params::state(&learned)).unwrap();
            assert_eq!(projection_of(fixed.inner()), projection_of(learned.inner()));
            assert_eq!(fixed.forward(&inputs).unwrap(), learned.forward(&inputs).unwrap());
            // Other gradients do not depend on it.
            let (out, saved) = learned.forward_train(&inputs).unwrap();
            let with = learned.backward(&inputs, &saved, out.view()).unwrap();
            let (_, saved) = fixed.forward_train(&inputs).unwrap();
            let without = fixed.backward(&inputs, &saved, out.view()).unwrap();
            assert_eq!(without.query, with.query);
            assert_eq!(without.params[..], with.params[..without.params.len()]);
            assert_eq!(without.params.len() + 1, with.params.len());
        }
    }
}

#[test]
fn a_projection_is_a_buffer_unless_it_is_learned() {
    a_projection_is_trained_only_if_asked::<f32>();
    a_projection_is_trained_only_if_asked::<f64>();
    let config = PerformerConfig::new(2, 6);
    let nothing: [(&str, ArrayD<f64>); 0] = [];
    for config in [config.clone(), config.learn_projection(true)] {
        let missing = Error::MissingParam { name: "projection_matrix".into() };
        assert_eq!(config.from_params(nothing.clone()).unwrap_err(), missing);
    }
}

#[test]
fn bad_configurations_and_inputs_are_refused() {
    let init = |config: PerformerConfig| config.init::<f32>(&mut rng(23)).map(drop);
    let new = PerformerConfig::new;
    for (config, field) in [
        (new(0, 4), "head_dim"),
        (new(4, 0), "num_features"),
        (new(4, 5).features(Features::Hyperbolic), "num_features"),
        (new(4, 5).features(Features::Trigonometric), "num_features"),
        (new(4, 5).features(Features::Elu), "num_features"),
        (new(4, 5).features(Features::Relu { epsilon: 0.0 }), "features.epsilon"),
        (new(4, 5).features(Features::Relu { epsilon: f64::NAN }), "features.epsilon"),
        // Its square is the smallest denominator.
        (new(4, 5).features(Features::Relu { epsilon: 1e-20 }), "features.epsilon"),
        (new(4, 5).scale(-1.0), "scale"),
        (new(4, 5).scale(f64::INFINITY), "scale"),
    ] {
        let error = init(config).unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgument { argument: f, .. } if f == field),
            "{error}"
        );
    }
    let performer = new(4, 6).init::<f64>(&mut rng(24)).unwrap();
    let (x, y) = (Array2::<f64>::zeros((3, 4)), Array2::<f64>::zeros((3, 5)));
    let wrong = Inputs::dense(y.view(), x.view(), x.view()).unwrap();
    assert_eq!(
        performer.forward(&wrong).unwrap_err(),
        Error::Shape { what: "query".into(), expected: vec![3, 4], actual: vec![3, 5] }
    );
    let right = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let dropout = Dropout { probability: 0.5, seed: 1 };
    let dropped = right.with_dropout(dropout).unwrap();
    for inputs in [dropped, right.with_causal()] {
        assert!(matches!(performer.estimate_error(&inputs), Err(Error::InvalidArgument { .. })));
    }
    assert!(performer.relative_variance(x.row(0), y.row(0)).is_err());
    assert!(performer.num_features_for(x.row(0), x.row(1), f64::NAN).is_err());
    // An impossible number is infinite, an unknown one NaN: neither is small.
    let (far, nan) = (Array1::from_elem(4, 1e3), Array1::from_elem(4, f64::NAN));
    assert_eq!(performer.num_features_for(far.view(), far.view(), 0.1), Ok(f64::INFINITY));
    assert_eq!(performer.relative_variance(far.view(), far.view()), Ok(f64::INFINITY));
    assert!(performer.num_features_for(nan.view(), x.row(0), 0.1).unwrap().is_nan());
    // Without variance one feature is enough for any error.
    assert_eq!(performer.num_features_for(x.row(0), x.row(1), 1e-200), Ok(1.0));
    assert!(performer.feature_map(y.view()).is_err());
    let relu = new(4, 6).features(RELU).init::<f64>(&mut rng(25)).unwrap();
    assert!(relu.relative_variance(x.row(0), x.row(1)).is_err());
    let circular = new(4, 6).features(Features::Trigonometric).init::<f64>(&mut rng(26)).unwrap();
    assert_eq!(
        circular.attention_weights(&right),
        Err(Error::NoWeights { mechanism: "performer" })
    );
    // Saved for other keys, heads or features.
    let [q, k, short, v] =
        [(3, 8), (5, 8), (2, 8), (5, 6)].map(|(n, d)| Array2::<f64>::ones((n, d)));
    let two = Inputs::dense(q.view(), k.view(), v.view()).unwrap().with_heads(2).unwrap();
    let short_v = v.slice(s![..2, ..]);
    let few = Inputs::dense(q.view(), short.view(), short_v).unwrap().with_heads(2).unwrap();
    let left = s![.., ..4];
    let one = Inputs::dense(q.slice(left), k.slice(left), v.view()).unwrap();
    let no_bias = Array2::zeros((3, 5));
    let other = new(4, 8).init::<f64>(&mut rng(24)).unwrap();
    let with = |way: usize, inputs: Inputs<'_, f64>| {
        let (_, saved) = match way {
            0 => performer.forward_train(&inputs),
            1 => performer.forward_train(&inputs.with_causal_alignment(Causal::BottomRight)),
            _ => performer.forward_train(&inputs.with_bias(no_bias.view()).unwrap()),
        }
        .unwrap();
        saved
    };
    let refused = |performer: &Performer<f64>, inputs: Inputs<'_, f64>, saved: &Saved| {
        let grad_out = Array2::zeros((3, 6));
        let error = performer.backward(&inputs, saved, grad_out.view()).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    };
    refused(&other, two, &with(0, two));
    for way in 0..3 {
        refused(&performer, few, &with(way, two));
        refused(&performer, one, &with(way, two));
        refused(&performer, two, &with(way, one));
    }
    // Saved by another path.
    let (out, saved) = performer.forward_train(&right).unwrap();
    let two_heads = right.with_heads(1).unwrap();
    assert!(performer.backward(&two_heads, &saved, out.view()).is_ok());
}

#[test]
fn weights_are_those_of_the_outputs() {
    let mut rng = rng(27);
    let performer = PerformerConfig::new(5, 24).init::<f64>(&mut rng).unwrap();
    let [q, k, v] = [(7, 5), (11, 5), (11, 3)].map(|(n, d)| normal(n, d, 1.0, &mut rng));
    let inputs = Inputs::dense(q.view(), k.view(), v.view()).unwrap();
    let weights =
        performer.attention_weights(&inputs).unwrap().into_shape_with_order((7, 11)).unwrap();
    assert_abs_diff_eq!(weights.dot(&v), performer.forward(&inputs).unwrap(), epsilon = 1e-13);
    assert!(weights.iter().all(|&weight| weight > 0.0));
}

// ---- performer-pytorch ----

#[test]
fn outputs_and_gradients_are_those_of_performer_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("golden/performer.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let arrays: HashMap<&str, Array2<f64>> = case
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, value)| value.is_object())
            .map(|(name, value)| (name.as_str(), golden::array(value)))
            .collect();
        let projection = &arrays["projection"];
        let kind = if case["features"] == "relu" { RELU } else { Features::Positive };
        let config = PerformerConfig::new(projection.ncols(), projection.nrows());
        let config = config.features(kind).learn_projection(true);
        let state = [("projection_matrix", projection.clone().into_dyn())];
        let performer = config.from_params(state).unwrap();
        let [q, k, v] = ["query", "key", "value"].map(|name| arrays[name].view());
        let heads = case["heads"].as_u64().unwrap() as usize;
        let mut inputs = Inputs::dense(q, k, v).unwrap().with_heads(heads).unwrap();
        if case["causal"] == true {
            inputs = inputs.with_causal();
        }
        let (out, saved) = performer.forward_train(&inputs).unwrap();
        let grads = performer.backward(&inputs, &saved, arrays["grad_out"].view()).unwrap();
        let grad_projection = grads.params[0].clone().into_dimensionality().unwrap();
        for (name, actual) in [
            ("out", &out),
            ("grad_query", &grads.query),
            ("grad_key", &grads.key),
            ("grad_value", &grads.value),
            ("grad_projection", &grad_projection),
        ] {
            assert_close(format_args!("{}: {name}", case["name"]), 1e-13, actual, &arrays[name]);
        }
    }
}

#[test]
fn a_rest_and_what_was_found_are_attention_over_all_keys() {
    let mut rng = rng(901);
    let (queries, keys) = (normal::<f64>(9, 4, 0.8, &mut rng), normal::<f64>(40, 4, 0.8, &mut rng));
    let values = normal::<f64>(40, 3, 1.0, &mut rng);
    for features in [Features::Positive, Features::Hyperbolic] {
        let config = PerformerConfig::new(4, 64).features(features).scale(0.7);
        let performer = config.init::<f64>(&mut rng).unwrap();
        let mut state = performer.state(3).unwrap();
        state.add(keys.view(), values.view()).unwrap();
        let phi = [queries.view(), keys.view()].map(|x| performer.feature_map(x).unwrap());
        let estimates = phi[0].dot(&phi[1].t());
        // Query i sees i keys, those from 3i on; the last sees all.
        let sees = |query: usize, key: usize| query == 8 || (key + 40 - 3 * query) % 40 < query;
        let pairs = (0..9).flat_map(|q| (0..40).filter(move |&k| sees(q, k)).map(move |k| (q, k)));
        let graph = Graph::from_edges(9, 40, pairs).unwrap();
        let some = Inputs::graph(queries.view(), keys.view(), values.view(), &graph).unwrap();
        let rest = state.attend_rest(&some).unwrap();
        let exact = Flash::new().with_scale(0.7).unwrap().forward_partial(&some).unwrap();
        let merged = exact.merge(&rest).unwrap();
        for query in 0..9 {
            // By plain sums over the keys, with the exact weights of those seen.
            let weight = |key: usize| {
                let logit = 0.7 * queries.row(query).dot(&keys.row(key));
                if sees(query, key) { logit.exp() } else { estimates[[query, key]] }
            };
            let of_rest: f64 = (0..40).filter(|&key| !sees(query, key)).map(weight).sum();
            let log_sum = rest.log_sum_exp()[[query, 0]];
            assert!(
                query == 8 && log_sum == f64::NEG_INFINITY
                    || (log_sum - of_rest.ln()).abs() < 1e-10
            );
            let total: f64 = (0..40).map(weight).sum();
            for column in 0..3 {
                let sum: f64 = (0..40).map(|key| weight(key) * values[[key, column]]).sum();
                assert!((merged.out()[[query, column]] - sum / total).abs() < 1e-10, "{query}");
            }
        }
        // Query 0 sees none: the state alone.
        let alone = state.attend(queries.slice(s![..1, ..])).unwrap();
        assert!((&rest.out().slice(s![..1, ..]) - &alone).iter().all(|e| e.abs() < 1e-12));
    }
}

#[test]
fn a_rest_is_refused_or_empty_where_it_is_not_defined() {
    let mut rng = rng(902);
    let x = normal::<f32>(6, 4, 1.0, &mut rng);
    let graph = Graph::from_edges(6, 6, [(0, 1), (1, 2), (3, 3)]).unwrap();
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
    for features in [Features::Trigonometric, RELU, Features::Elu] {
        let num_features = if features == Features::Elu { 4 } else { 8 };
        let config = PerformerConfig::new(4, num_features).features(features);
        let state = config.init::<f32>(&mut rng).unwrap().state(4).unwrap();
        let error = state.attend_rest(&inputs).unwrap_err().to_string();
        assert!(error.starts_with("features: expected `Features::Positive`"), "{error}");
    }
    let performer = PerformerConfig::new(4, 8).init::<f32>(&mut rng).unwrap();
    let mut state = performer.state(4).unwrap();
    // Without keys there is no rest.
    let none = Graph::from_edges(6, 6, []).unwrap();
    let nothing = Inputs::graph(x.view(), x.view(), x.view(), &none).unwrap();
    assert!(state.attend_rest(&nothing).unwrap().sum().iter().all(|&sum| sum == 0.0));
    state.add(x.view(), x.view()).unwrap();
    let bias = Array2::zeros((3, 1));
    let error = state.attend_rest(&inputs.with_bias(bias.view()).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    let other = performer.state(3).unwrap().attend_rest(&inputs).unwrap_err();
    assert_eq!(
        other,
        Error::Shape { what: "value".into(), expected: vec![6, 3], actual: vec![6, 4] }
    );
    // NaN stays in its row.
    let mut queries = x.clone();
    queries[[3, 1]] = f32::NAN;
    let inputs = Inputs::graph(queries.view(), x.view(), x.view(), &graph).unwrap();
    let rest = state.attend_rest(&inputs).unwrap();
    for (query, row) in rest.out().rows().into_iter().enumerate() {
        assert!(row.iter().all(|out| out.is_nan() == (query == 3)), "{query}: {row}");
    }
}

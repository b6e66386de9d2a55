//! Softmax with large logits, with logits that are the lowest number, and with millions of logits.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq, relative_eq};
use common::close::{assert_close, assert_close_in_size};
use common::random::rng;
use graph_attention::ndarray::{
    Array1, Array2, ArrayView1, ArrayView2, Axis, array, concatenate, s,
};
use graph_attention::{
    Attention, EdgeGatConfig, EdgeRope, Flash, Float, Graph, GraphRopeConfig, Inputs, LocalGlobal,
    MultiHeadConfig, Params, Partial, PerformerConfig, PoincareConfig, Result, ScaledDotProduct,
    edge_gat::Score, graph_rope::Layout, local_global::Window, params, performer::Features,
};

/// Draws entries between −1 and 1.
fn matrix<F: Float>(rows: usize, columns: usize, seed: usize) -> Array2<F> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        F::from_f64((((i * 131 + j * 17 + seed * 71) * 2_654_435_761) % 2001) as f64 / 1000.0 - 1.0)
    })
}

/// Returns the mechanisms whose output is a weighted mean of the values, for heads of 4 columns.
fn means<F: Float>() -> Vec<Box<dyn Attention<F>>> {
    let features = PerformerConfig::new(4, 16).init::<F>(&mut rng(1)).unwrap();
    let rope: EdgeRope<F> = GraphRopeConfig::new(4, Layout::Half).init_edges().unwrap();
    let window = LocalGlobal::<F>::sliding_window(Window::new(9), Flash::new()).unwrap();
    vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(Flash::new().with_tiles(5, 7).unwrap()),
        Box::new(window),
        Box::new(rope),
        Box::new(features),
    ]
}

/// Checks all mechanisms that output means with one bias for all pairs.
fn check_one_bias<F: Float>(bias: f64, what: &str) -> Result<()> {
    for (num_queries, num_keys) in [(40, 40), (3, 8), (1, 100), (9, 301)] {
        let [query, key, value] = [(num_queries, 1), (num_keys, 2), (num_keys, 3)]
            .map(|(rows, seed)| matrix::<F>(rows, 4, seed));
        let edges = (0..num_queries).flat_map(|i| (0..num_keys).map(move |j| (i, j)));
        let graph = Graph::from_edges(num_queries, num_keys, edges)?;
        let distances = Array1::from_elem(num_queries * num_keys, F::one());
        let biases = Array2::from_elem((num_queries, num_keys), F::from_f64(bias));
        let of_pairs = Array2::from_elem((num_queries * num_keys, 1), F::from_f64(bias));
        let (q, k, v) = (query.view(), key.view(), value.view());
        let dense = Inputs::dense(q, k, v)?.with_bias(biases.view())?;
        let graph = Inputs::graph(q, k, v, &graph)?.with_bias(of_pairs.view())?;
        for inputs in [dense, graph].map(|inputs| inputs.with_distances(distances.view())) {
            let inputs = inputs?;
            for mechanism in means::<F>() {
                let case =
                    format!("{}, {what} {bias:e}, {num_queries} x {num_keys}", mechanism.name());
                let bound = 8.0 * F::epsilon().as_f64() * (num_keys as f64).sqrt();
                let (out, saved) = mechanism.forward_train(&inputs)?;
                let ones = out.mapv(|_| F::one());
                let grads = mechanism.backward(&inputs, &saved, ones.view())?;
                // Weights sum to 1 in every row, and so Σⱼ dvⱼ = Σᵢ gᵢ.
                for column in grads.value.columns() {
                    let sum: f64 = column.iter().map(|grad| grad.as_f64()).sum();
                    let mean = sum / num_queries as f64;
                    let is_one = abs_diff_eq!(mean, 1.0, epsilon = bound);
                    assert!(is_one, "{case}: Σ dv is {mean} of Σ g");
                }
                let weights = mechanism.attention_weights(&inputs)?;
                for query in 0..num_queries {
                    let pairs = inputs.row(query);
                    let sum: f64 = pairs.map(|pair| weights[[pair.index, 0]].as_f64()).sum();
                    let is_one = abs_diff_eq!(sum, 1.0, epsilon = bound);
                    assert!(is_one, "{case}: weights sum to {sum}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn weights_of_the_backward_pass_sum_to_one_under_any_bias() -> Result<()> {
    common::hold_simd();
    for bias in [0.0, 1e4, -1e6, 1e8, -1e9, -1e20, f64::from(f32::MIN)] {
        check_one_bias::<f32>(bias, "f32")?;
        check_one_bias::<f64>(bias, "f64")?;
    }
    for bias in [-1e15, 1e16, 1e300, f64::MIN] {
        check_one_bias::<f64>(bias, "f64")?;
    }
    Ok(())
}

#[test]
fn weights_of_the_backward_pass_sum_to_one_for_any_products() -> Result<()> {
    common::hold_simd();
    fn check<F: Float>(sizes: &[f64]) -> Result<()> {
        for &size in sizes {
            for num_queries in [1, 5, 20] {
                let num_keys = 100;
                // All logits are the same number, or differ.
                for is_one in [true, false] {
                    let query = Array2::from_elem((num_queries, 4), F::from_f64(0.3));
                    let key = match is_one {
                        true => Array2::from_elem((num_keys, 4), F::from_f64(size / 0.6)),
                        false => {
                            matrix::<F>(num_keys, 4, 2).mapv(|entry| entry * F::from_f64(size))
                        }
                    };
                    let value = matrix::<F>(num_keys, 4, 3);
                    let (q, k, v) = (query.view(), key.view(), value.view());
                    let distances = Array1::from_elem(num_queries * num_keys, F::one());
                    let inputs = Inputs::dense(q, k, v)?.with_distances(distances.view())?;
                    for mechanism in means::<F>() {
                        if mechanism.name() == "performer" {
                            continue; // its features are another function of such keys
                        }
                        let (out, saved) = mechanism.forward_train(&inputs)?;
                        let ones = out.mapv(|_| F::one());
                        let grads = mechanism.backward(&inputs, &saved, ones.view())?;
                        let sum: f64 = grads.value.column(0).iter().map(|x| x.as_f64()).sum();
                        let mean = sum / num_queries as f64;
                        let bound = 8.0 * F::epsilon().as_f64() * (num_keys as f64).sqrt();
                        let is_one = abs_diff_eq!(mean, 1.0, epsilon = bound);
                        assert!(is_one, "{}, {size:e}: {mean} of Σ g", mechanism.name());
                    }
                }
            }
        }
        Ok(())
    }
    check::<f32>(&[1.0, 1e4, 1e5, 1e6, 1e7, 1e8, 1e20])?;
    check::<f64>(&[1.0, 1e8, 1e15, 1e16, 1e200])
}

#[test]
fn with_one_key_in_sight_nothing_flows_to_the_query() -> Result<()> {
    common::hold_simd();
    fn check<F: Float>() -> Result<()> {
        for num_queries in [1, 20] {
            let [query, key, value] =
                [(num_queries, 1), (num_queries, 2), (num_queries, 3)].map(|(rows, seed)| {
                    matrix::<F>(rows, 4, seed).mapv(|entry| entry * F::from_f64(1e5))
                });
            let graph = Graph::from_edges(
                num_queries,
                num_queries,
                (0..num_queries).map(|i| (i, (i * 7) % num_queries)),
            )?;
            let distances = Array1::from_elem(num_queries, F::from_f64(1.7));
            let (q, k, v) = (query.view(), key.view(), value.view());
            let inputs = Inputs::graph(q, k, v, &graph)?.with_distances(distances.view())?;
            let mask = Array2::from_shape_fn((num_queries, num_queries), |(i, j)| i == j);
            let distances = Array1::from_elem(num_queries * num_queries, F::from_f64(1.7));
            let masked = Inputs::dense(q, k, v)?.with_mask(mask.view())?;
            let masked = masked.with_distances(distances.view())?;
            let grad_out = matrix::<F>(num_queries, 4, 4);
            for (case, inputs) in [("graph", inputs), ("masked", masked)] {
                for mechanism in
                    means::<F>().iter().filter(|mechanism| mechanism.name() != "performer")
                {
                    let (_, saved) = mechanism.forward_train(&inputs)?;
                    let grads = mechanism.backward(&inputs, &saved, grad_out.view())?;
                    let case = format!("{}, {case}, {num_queries}", mechanism.name());
                    assert!(grads.query.iter().all(|&grad| grad == F::zero()), "{case}");
                    assert!(grads.key.iter().all(|&grad| grad == F::zero()), "{case}");
                }
            }
        }
        Ok(())
    }
    check::<f32>()?;
    check::<f64>()
}

#[test]
fn a_projected_mean_under_a_bias_has_its_gradients() -> Result<()> {
    common::hold_simd();
    // The parameters are the same, so the gradients are the same up to rounding.
    let x = matrix::<f32>(30, 8, 1);
    let bias = Array2::from_elem((30, 30), -1e9f32);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_bias(bias.view())?;
    let config = MultiHeadConfig::new(8, 2);
    let plain = config.init(ScaledDotProduct::new(), &mut rng(1))?;
    let mut flash = config.init(Flash::new(), &mut rng(1))?;
    params::load_state(&mut flash, params::state(&plain))?;
    let run = |layer: &dyn Attention<f32>| {
        let (out, saved) = layer.forward_train(&inputs)?;
        Ok(layer.backward(&inputs, &saved, out.mapv(|_| 1.0).view())?.params)
    };
    let (expected, actual): (Vec<_>, Vec<_>) = (run(&plain)?, Result::Ok(run(&flash)?)?);
    for (param, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
        assert_close_in_size(format_args!("parameter {param}"), 1e-5, 1.0, actual, expected);
    }
    Ok(())
}

#[test]
fn hyperbolic_weights_under_a_bias_are_equal_weights() -> Result<()> {
    common::hold_simd();
    // In f32 the distances are rounded away beside −1e9; at a temperature of 1e20 they do not count.
    for num_queries in [3, 40] {
        let [query, key, value] = [(num_queries, 1), (40, 2), (40, 3)]
            .map(|(rows, seed)| matrix::<f32>(rows, 4, seed).mapv(|x| 0.4 * x));
        let bias = Array2::from_elem((num_queries, 40), -1e9f32);
        let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
        let ones = Array2::from_elem((num_queries, 4), 1f32);
        let run = |temperature: f64, inputs: &Inputs<'_, f32>| -> Result<[Array2<f32>; 2]> {
            let poincare = PoincareConfig::new().temperature(temperature).init::<f32>()?;
            let (out, saved) = poincare.forward_train(inputs)?;
            Ok([out, poincare.backward(inputs, &saved, ones.view())?.value])
        };
        let expected = run(1e20, &inputs)?;
        let actual = run(1.0, &inputs.with_bias(bias.view())?)?;
        for (what, (actual, expected)) in ["out", "value"].iter().zip(actual.iter().zip(&expected))
        {
            let what = format_args!("{what} of {num_queries}");
            assert_close_in_size(what, 1e-5, 0.0, actual, expected);
        }
    }
    Ok(())
}

#[test]
fn the_lowest_number_everywhere_is_no_mask() -> Result<()> {
    common::hold_simd();
    fn check<F: Float>() -> Result<()> {
        for num_queries in [1, 12] {
            let [query, key, value] = [(num_queries, 1), (9, 2), (9, 3)]
                .map(|(rows, seed)| matrix::<F>(rows, 4, seed).mapv(|x| x * F::from_f64(0.1)));
            let bias = Array2::from_elem((num_queries, 9), F::min_value());
            let distances = Array1::from_elem(num_queries * 9, F::one());
            let unbiased = Inputs::dense(query.view(), key.view(), value.view())?
                .with_distances(distances.view())?;
            let inputs = unbiased.with_bias(bias.view())?;
            let mean = value.sum_axis(Axis(0)) / F::from_f64(9.0);
            for mechanism in means::<F>().into_iter().filter(|m| m.name() != "local_global") {
                let out = mechanism.forward(&inputs)?;
                // Beside such a bias the logits are lost to rounding; a Performer has kernels instead,
                // and the bias cancels.
                let expected = match mechanism.name() {
                    "performer" => mechanism.forward(&unbiased)?,
                    _ => Array2::from_shape_fn(out.raw_dim(), |(_, c)| mean[c]),
                };
                assert_close(mechanism.name(), 8.0 * F::epsilon().as_f64(), &out, &expected);
            }
            let poincare = PoincareConfig::new().init::<F>()?;
            assert!(poincare.forward(&inputs)?.iter().all(|&x| x != F::zero()));
        }
        Ok(())
    }
    check::<f32>()?;
    check::<f64>()
}

#[test]
fn a_product_may_overflow_before_its_scale() -> Result<()> {
    common::hold_simd();
    let (query, key) = (array![[1.5e19f32; 64]], array![[2e17f32; 64], [-2e17; 64]]);
    let value = array![[1.0f32], [3.0]];
    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    let largest = query.mapv(|x| x * 2e-1 / 3e18) * 3e18;
    let inputs_of = |query: &Array2<f32>| -> Result<[f32; 2]> {
        let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
        let mechanisms: [&dyn Attention<f32>; 2] = [&ScaledDotProduct::new(), &Flash::new()];
        let [plain, flash] = mechanisms.map(|mechanism| mechanism.forward(&inputs));
        Ok([plain?[[0, 0]], flash?[[0, 0]]])
    };
    // q·k = 1.9e38 … 3.8e38 and more: above the largest number, an eighth of it below.
    for factor in [1.0, 2.0, 8.0] {
        assert_eq!(inputs_of(&(&largest * factor))?, [1.0, 1.0], "{factor}");
    }
    assert_eq!(ScaledDotProduct::new().forward(&inputs)?[[0, 0]], 1.0);
    Ok(())
}

#[test]
fn shards_of_large_logits_merge() -> Result<()> {
    common::hold_simd();
    // 10 keys of value 1 and 1000 of value 0, all with the same logit.
    let query = array![[1.0f32, 0.0]];
    let over = |num_keys: usize, value: f32, logit: f32| {
        let key = Array2::zeros((num_keys, 2));
        let value = Array2::from_elem((num_keys, 1), value);
        let bias = Array2::from_elem((1, num_keys), logit);
        let inputs =
            Inputs::dense(query.view(), key.view(), value.view())?.with_bias(bias.view())?;
        Flash::new().forward_partial(&inputs)
    };
    for logit in [0.0, 1e6, -1e9, 1e20, f32::MIN] {
        let merged = over(10, 1.0, logit)?.merge(&over(1000, 0.0, logit)?)?;
        let out = merged.out()[[0, 0]];
        let is_share = relative_eq!(out, 10.0 / 1010.0, epsilon = 0.0, max_relative = 1e-6);
        assert!(is_share, "{logit}: {out}");
    }
    // Taken apart and rebuilt from its arrays, also in another order.
    let (a, b) = (over(10, 1.0, -1e9)?, over(1000, 0.0, -1e9)?);
    let (out, shift, sum) = b.clone().into_parts();
    assert_eq!(Partial::new(out, shift, sum)?.merge(&a)?.out(), a.merge(&b)?.out());
    Ok(())
}

#[test]
fn edge_weights_of_large_logits_sum_to_one() -> Result<()> {
    common::hold_simd();
    let edges = [(0, 0), (0, 1), (0, 2)];
    let graph = Graph::from_edges(1, 3, edges)?;
    for score in [Score::Gat, Score::GatV2, Score::DotProduct] {
        let gat = EdgeGatConfig::new(score, 2, 3, 2).edge_dim(1).init::<f32>(&mut rng(1))?;
        for size in [1.0, 1.3e4, 1e6, 1e8] {
            let [query, key] = [(1, 1), (3, 2)]
                .map(|(rows, seed)| matrix::<f32>(rows, 2, seed).mapv(|entry| entry * size));
            // Neighbours that differ only a little, so that none of them has all the weight.
            let key =
                &key.row(0).to_owned().insert_axis(Axis(0)) + &(matrix::<f32>(3, 2, 3) * 1e-3);
            let features = Array2::from_elem((3, 1), size);
            let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph)?;
            let weights = gat.attention_weights(&inputs.with_edge_features(features.view())?)?;
            let (sums, what) = (weights.sum_axis(Axis(0)), format_args!("{score:?}, {size}"));
            let tolerance = f64::from(4.0 * f32::EPSILON);
            assert_close(what, tolerance, &sums, &Array1::ones(sums.len()));
        }
    }
    Ok(())
}

/// The output over keys with the logit 0 and the value 1, but for the first with the logit a and the
/// value 0: 1 − e^a / (e^a + n − 1).
fn check_long_row(num_queries: usize, num_keys: usize, a: f32) -> Result<()> {
    let query = Array2::from_elem((num_queries, 1), 1f32);
    let (mut key, mut value) = (Array2::zeros((num_keys, 1)), Array2::ones((num_keys, 1)));
    (key[[0, 0]], value[[0, 0]]) = (a, 0.0);
    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    let first = f64::from(a).exp();
    let expected = 1.0 - first / (first + (num_keys - 1) as f64);
    let check = |name: &str, out: ArrayView2<'_, f32>| {
        let out = f64::from(out[[0, 0]]);
        let is_close = relative_eq!(out, expected, epsilon = 0.0, max_relative = 1e-6);
        assert!(is_close, "{name}, {num_queries} x {num_keys}, {a}: {out} instead of {expected}");
    };
    let flash = Flash::new().with_scale(1.0)?;
    check("flash", flash.forward(&inputs)?.view());
    // Half of the keys in each of two shards.
    let half = |keys: std::ops::Range<usize>| {
        let (k, v) = (key.slice(s![keys.clone(), ..]), value.slice(s![keys, ..]));
        flash.forward_partial(&Inputs::dense(query.view(), k, v)?)
    };
    let merged = half(0..num_keys / 2)?.merge(&half(num_keys / 2..num_keys)?)?;
    check("two shards", merged.out());
    check("plain", ScaledDotProduct::new().with_scale(1.0)?.forward(&inputs)?.view());
    Ok(())
}

#[test]
fn long_rows_are_as_exact_as_short_ones() -> Result<()> {
    common::hold_simd();
    for a in [5.0, 7.0] {
        for num_keys in [100, 3000, 16_384, 65_536, 262_144] {
            check_long_row(1, num_keys, a)?;
            check_long_row(16, num_keys, a)?;
        }
    }
    Ok(())
}

/// `cargo test --release --test large_logits -- --ignored`
#[test]
#[ignore = "20 million keys: some seconds in release mode, a gigabyte"]
fn rows_of_millions() -> Result<()> {
    common::hold_simd();
    check_long_row(16, 4_194_304, 7.0)?;
    check_long_row(1, 4_194_304, 7.0)?;
    // Equal logits, and half of the values 1.
    let num_keys = 20_000_000;
    let (query, key) = (array![[1f32]], Array2::zeros((num_keys, 1)));
    let value = Array2::from_shape_fn((num_keys, 1), |(key, _)| (key % 2) as f32);
    let halves =
        concatenate![Axis(0), Array2::zeros((num_keys / 2, 1)), Array2::ones((num_keys / 2, 1))];
    for value in [value, halves] {
        let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
        let out = Flash::new().forward(&inputs)?[[0, 0]];
        assert_abs_diff_eq!(out, 0.5, epsilon = 5e-7);
    }
    Ok(())
}

/// If all weights are equal the output is the mean of the values, however they are summed.
#[test]
fn long_sums_of_all_kinds_are_exact() -> Result<()> {
    common::hold_simd();
    let num_keys = 40_000;
    let positive = |columns, seed| matrix::<f32>(num_keys, columns, seed).mapv(|x| x + 1.1);
    let check = |name: &str, out: ArrayView1<'_, f32>, terms: &Array2<f32>| {
        let mean = terms.mapv(f64::from).mean_axis(Axis(0)).expect("it has rows");
        for (&out, mean) in out.iter().zip(mean) {
            let out = f64::from(out);
            let is_mean = relative_eq!(out, mean, epsilon = 0.0, max_relative = 1e-6);
            assert!(is_mean, "{name}: {out} instead of {mean}");
        }
    };
    let (query, value) = (positive(4, 1), positive(3, 2));
    let key = Array2::from_shape_fn((num_keys, 4), |(_, c)| [0.3f32, -0.7, 0.2, 0.9][c]);
    let (q, k, v) = (query.view(), key.view(), value.view());
    let features =
        [Features::Positive, Features::Hyperbolic, Features::Relu { epsilon: 1e-3 }, Features::Elu];
    for features in features {
        let num_features = if features == Features::Elu { 4 } else { 16 };
        let performer =
            PerformerConfig::new(4, num_features).features(features).init(&mut rng(1))?;
        let dense = Inputs::dense(q.slice(s![..2, ..]), k, v)?;
        check("all keys", performer.forward(&dense)?.row(0), &value);
        let causal = Inputs::dense(q, k, v)?.with_causal();
        check("causal", performer.forward(&causal)?.row(num_keys - 1), &value);
        // The gradient of a value is a sum over the queries.
        let inputs = Inputs::dense(k, q.slice(s![..1, ..]), v.slice(s![..1, ..]))?;
        let (_, saved) = performer.forward_train(&inputs)?;
        let grad_value = performer.backward(&inputs, &saved, v)?.value;
        check("gradient", grad_value.row(0).mapv(|x| x / num_keys as f32).view(), &value);
    }

    // Features of edges in the values of a graph attention network.
    let graph = Graph::from_edges(1, num_keys, (0..num_keys).map(|key| (0, key)))?;
    let edge_features = positive(3, 3);
    let mut gat = EdgeGatConfig::new(Score::DotProduct, 4, 3, 1)
        .edge_dim(3)
        .bias(false)
        .residual(false)
        .init::<f32>(&mut rng(1))?;
    gat.visit_params_mut(&mut |name, mut param| {
        param.fill(0.0);
        if name == "lin_edge.weight" {
            param.indexed_iter_mut().for_each(|(at, x)| *x = f32::from(at[0] == at[1]));
        }
    });
    let inputs = Inputs::graph(q.slice(s![..1, ..]), k, k, &graph)?;
    let inputs = inputs.with_edge_features(edge_features.view())?;
    check("edge features", gat.forward(&inputs)?.row(0), &edge_features);
    Ok(())
}

/// Rising logits move the maximum again and again.
#[test]
fn rising_logits_lose_nothing() -> Result<()> {
    common::hold_simd();
    for num_queries in [1, 16] {
        for rise in [1e-4, 1e-2, 1.0] {
            let num_keys = 50_000;
            let query = Array2::from_elem((num_queries, 1), 1f32);
            let key = Array2::from_shape_fn((num_keys, 1), |(j, _)| j as f32 * rise);
            let value = matrix::<f32>(num_keys, 1, 5).mapv(|x| 2.0 + x);
            let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
            let last = f64::from(key[[num_keys - 1, 0]]);
            let terms = key.iter().zip(&value).map(|(&s, &v)| {
                let weight = (f64::from(s) - last).exp();
                [weight, weight * f64::from(v)]
            });
            let sums = terms.fold([0.0; 2], |sum, term| [sum[0] + term[0], sum[1] + term[1]]);
            let out = Flash::new().with_scale(1.0)?.forward(&inputs)?[[0, 0]];
            let (out, mean) = (f64::from(out), sums[1] / sums[0]);
            let is_mean = relative_eq!(out, mean, epsilon = 0.0, max_relative = 1e-6);
            assert!(is_mean, "{num_queries}, {rise}: {out} instead of {mean}");
        }
    }
    Ok(())
}

/// Checks that the mechanisms in the list of means do output means.
#[test]
fn means_have_no_parameters_that_scale_them() {
    common::hold_simd();
    for mechanism in means::<f64>() {
        let mut names = vec![];
        Params::visit_params(&*mechanism, &mut |name, _| names.push(name.to_owned()));
        assert!(names.iter().all(|name| name.contains("projection")), "{names:?}");
    }
}

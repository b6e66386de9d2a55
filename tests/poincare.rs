//! Poincaré attention against arbitrary precision (`tests/golden/poincare_attention.py`), and its laws.

mod common;

use approx::{assert_relative_eq, relative_eq};
use common::close::{assert_close, assert_close_in_size, error_in_bounds};
use common::golden;
use graph_attention::geometry::poincare::{conformal_factor, distance, midpoint, mobius_add};
use graph_attention::ndarray::{self, Array2, ArrayView2, Ix2, arr0, arr1, array};
use graph_attention::{
    Attention, Dropout, Error, Float, Graph, Inputs, Params, PoincareConfig, params,
    poincare::{Aggregation, Coordinates},
};
use serde_json::{Value, json};

struct Case<'v> {
    value: &'v Value,
    worst: (f64, String),
}

impl Case<'_> {
    fn config(&self, learn: bool) -> PoincareConfig {
        let number = |name: &str| self.value[name].as_f64().unwrap();
        PoincareConfig::new()
            .curvature(number("c"))
            .temperature(number("tau"))
            .coordinates(match self.value["coordinates"].as_str().unwrap() {
                "ball" => Coordinates::Ball,
                _ => Coordinates::Tangent,
            })
            .aggregation(match self.value["aggregation"].as_str().unwrap() {
                "midpoint" => Aggregation::Midpoint,
                "tangent_origin" => Aggregation::TangentAtOrigin,
                "tangent_query" => Aggregation::TangentAtQuery,
                _ => Aggregation::FrechetMean,
            })
            .learn_curvature(learn)
            .learn_temperature(learn)
    }

    /// Records the error of each entry, relative to the effect of one rounding unit in every input and in the
    /// largest entry.
    fn compare<F: Float>(&mut self, name: &str, actual: ArrayView2<'_, F>) {
        let expected = &self.value[name];
        let values = golden::array::<f64, Ix2>(expected);
        assert_eq!(actual.dim(), values.dim(), "{name}");
        let unit = F::epsilon().as_f64() / 2.0;
        let mut largest = values.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        if name == "grad_c" {
            largest = largest.max(self.terms_of_grad_c());
        } else if name != "out" && !self.is_sharp() {
            // Gradients that are 0 because their terms cancel count as large as the others.
            for name in ["grad_query", "grad_key", "grad_value"] {
                let other = golden::array::<f64, Ix2>(&self.value[name]);
                largest = other.iter().fold(largest, |max: f64, x| max.max(x.abs()));
            }
        }
        let perturbations = golden::array::<f64, Ix2>(&json!({
            "shape": expected["shape"],
            "data": expected["perturbation"],
        }));
        for ((a, b), perturbation) in actual.iter().zip(&values).zip(&perturbations) {
            let ratio = error_in_bounds(a.as_f64(), *b, unit * largest + perturbation);
            if ratio > self.worst.0 {
                self.worst = (ratio, format!("{name}: {a} instead of {b:e}"));
            }
        }
    }

    /// Returns whether nearly all weight is on one key of each query. Then the gradients of queries and keys
    /// are much smaller than the gradients of values, and each is compared by itself.
    fn is_sharp(&self) -> bool {
        self.value["name"].as_str().unwrap().starts_with("sharp_")
    }

    /// Scaling x by a, c by 1/a² and τ by a scales the outputs by a. So c times its gradient is half the
    /// sum of x ∂L/∂x and τ ∂L/∂τ less L, in which all may cancel.
    fn terms_of_grad_c(&self) -> f64 {
        let products = [
            ("query", "grad_query"),
            ("key", "grad_key"),
            ("value", "grad_value"),
            ("out", "grad_out"),
        ];
        let sum = |(x, grad): (&str, &str)| {
            let [x, grad] = [x, grad].map(|name| golden::array::<f64, Ix2>(&self.value[name]));
            (x * grad).mapv(f64::abs).sum()
        };
        products.into_iter().map(sum).sum::<f64>() / (2.0 * self.value["c"].as_f64().unwrap())
    }

    fn check<F: Float>(&mut self) {
        let [query, key, value, grad_out] = ["query", "key", "value", "grad_out"]
            .map(|name| golden::array::<F, Ix2>(&self.value[name]));
        let bias =
            (!self.value["bias"].is_null()).then(|| golden::array::<F, Ix2>(&self.value["bias"]));
        let edges = self.value["edges"].as_array();
        let graph = edges.map(|edges| {
            let at = |edge: &Value, end: usize| edge[end].as_u64().unwrap() as usize;
            let edges = edges.iter().map(|edge| (at(edge, 0), at(edge, 1)));
            Graph::from_edges(query.nrows(), key.nrows(), edges).unwrap()
        });
        let mut inputs = match &graph {
            Some(graph) => Inputs::graph(query.view(), key.view(), value.view(), graph).unwrap(),
            None => Inputs::dense(query.view(), key.view(), value.view()).unwrap(),
        };
        inputs = inputs.with_heads(self.value["heads"].as_u64().unwrap() as usize).unwrap();
        if let Some(bias) = &bias {
            inputs = inputs.with_bias(bias.view()).unwrap();
        }
        self.check_inputs(&inputs, &grad_out);
        if self.is_sharp() {
            // Also row by row.
            let (rows, columns) = (query.nrows(), key.nrows());
            let pairs = (0..rows * columns).map(|pair| (pair / columns, pair % columns));
            let graph = Graph::from_edges(rows, columns, pairs).unwrap();
            let inputs = Inputs::graph(query.view(), key.view(), value.view(), &graph).unwrap();
            let per_pair =
                bias.map(|bias| bias.into_shape_with_order((rows * columns, 1)).unwrap());
            match &per_pair {
                Some(bias) => self.check_inputs(&inputs.with_bias(bias.view()).unwrap(), &grad_out),
                None => self.check_inputs(&inputs, &grad_out),
            }
        }
    }

    fn check_inputs<F: Float>(&mut self, inputs: &Inputs<'_, F>, grad_out: &Array2<F>) {
        let out = self.config(false).init::<F>().unwrap().forward(inputs).unwrap();
        self.compare("out", out.view());
        let learned = self.config(true).init::<F>().unwrap();
        let (_, saved) = learned.forward_train(inputs).unwrap();
        let grads = learned.backward(inputs, &saved, grad_out.view()).unwrap();
        for (name, grad) in
            [("grad_query", &grads.query), ("grad_key", &grads.key), ("grad_value", &grads.value)]
        {
            self.compare(name, grad.view());
        }
        assert_eq!(grads.bias.is_some(), inputs.bias().is_some());
        if let Some(grad) = &grads.bias {
            let shape = &self.value["grad_bias"]["shape"];
            let columns = shape[1].as_u64().unwrap() as usize;
            let grad = grad.view().into_shape_with_order((grad.len() / columns, columns)).unwrap();
            self.compare("grad_bias", grad);
        }
        // The derivative of softplus is 1 − e^{−softplus}.
        for (param, (name, value)) in
            [("grad_c", learned.curvature()), ("grad_tau", learned.temperature())]
                .iter()
                .enumerate()
        {
            let slope = -(-value).exp_m1();
            let grad = grads.params[param].mapv(|grad| F::from_f64(grad.as_f64() / slope));
            let grad = grad.into_shape_with_order((1, 1)).unwrap();
            self.compare(name, grad.into_dimensionality::<Ix2>().unwrap().view());
        }
    }
}

#[test]
fn answers_of_arbitrary_precision() {
    let golden: Value =
        serde_json::from_str(include_str!("golden/poincare_attention.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 132);
    for value in cases {
        let mut case = Case { value, worst: (0.0, String::new()) };
        match value["precision"].as_str().unwrap() {
            "f32" => case.check::<f32>(),
            _ => case.check::<f64>(),
        }
        let name = value["name"].as_str().unwrap();
        let allowed = match name {
            // The mean lies 1e-6 from the direction of its heaviest value, and both are rounded: 1e-10 of
            // the gradient of a value of weight 1e-3.
            "deep_f64_midpoint_mixed" => 2000.0,
            // e^R is rounded by R ε, and R is 300.
            _ if name.starts_with("far_f64") => 512.0,
            _ => 64.0,
        };
        assert!(case.worst.0 <= allowed, "{name}: {:.1}: {}", case.worst.0, case.worst.1);
        println!("{name}: {:.1}: {}", case.worst.0, case.worst.1);
    }
}

fn noise(seed: &mut u64) -> f64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 33) as f64 / (1u64 << 30) as f64 - 1.0
}

fn points<F: Float>(rows: usize, columns: usize, scale: f64, seed: &mut u64) -> Array2<F> {
    Array2::from_shape_simple_fn((rows, columns), || F::from_f64(scale * noise(seed)))
}

/// Dense inputs go through tiles, graphs through rows: two implementations.
fn tiles_are_rows<F: Float>(tolerance: f64) {
    let mut seed = 3;
    for (num_queries, num_keys, dim, value_dim, heads, kv_heads) in [
        (8, 1, 1, 1, 1, 1),
        (31, 33, 2, 2, 1, 1),
        (95, 97, 3, 5, 2, 1),
        (97, 191, 7, 3, 2, 2),
        (193, 95, 16, 17, 1, 1),
        (385, 20, 5, 2, 1, 1),
    ] {
        for (case, scale) in [0.2, 1.0, 4.0, 0.2, 0.2, 0.5, 0.5].into_iter().enumerate() {
            let query = points::<F>(num_queries, heads * dim, scale, &mut seed);
            let key = points::<F>(num_keys, kv_heads * dim, scale, &mut seed);
            let mut value = points::<F>(num_keys, kv_heads * value_dim, scale, &mut seed);
            if case >= 5 {
                // Far from the origin, where sums are taken a second time.
                value.column_mut(0).mapv_inplace(|x| x + F::from_f64(4.0));
            }
            let bias = points::<F>(num_queries * num_keys, heads, 1.0, &mut seed);
            let noise = points::<F>(num_queries, num_keys, 1.0, &mut seed);
            let mask = noise.mapv(|noise| noise.as_f64() > -0.5);
            let grad_out = points::<F>(num_queries, heads * value_dim, 1.0, &mut seed);
            let edges = (0..num_queries * num_keys).map(|pair| (pair / num_keys, pair % num_keys));
            let graph = Graph::from_edges(num_queries, num_keys, edges).unwrap();
            let dense = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
            let sparse = Inputs::graph(query.view(), key.view(), value.view(), &graph).unwrap();
            let [dense, sparse] = [dense, sparse].map(|inputs| {
                let inputs = inputs.with_grouped_heads(heads, kv_heads).unwrap();
                match case {
                    0 => inputs.with_bias(bias.view()).unwrap().with_mask(mask.view()).unwrap(),
                    3 | 6 => inputs.with_causal(),
                    4 | 5 => inputs.with_dropout(Dropout { probability: 0.3, seed: 5 }).unwrap(),
                    _ => inputs,
                }
            });
            for aggregation in [Aggregation::Midpoint, Aggregation::TangentAtOrigin] {
                let config = PoincareConfig::new().coordinates(Coordinates::Tangent).curvature(0.7);
                let config = config.aggregation(aggregation).learn_curvature(true);
                let poincare = config.learn_temperature(true).init::<F>().unwrap();
                let run = |inputs: &Inputs<'_, F>| {
                    let (out, saved) = poincare.forward_train(inputs).unwrap();
                    (out, poincare.backward(inputs, &saved, grad_out.view()).unwrap())
                };
                let ((out, grads), (expected, expected_grads)) = (run(&dense), run(&sparse));
                let what = format!("{num_queries} x {num_keys} x {dim}, {case}, {aggregation:?}");
                // Farther out, a rounded direction is a larger distance.
                let tolerance = if case >= 5 { 10.0 * tolerance } else { tolerance };
                assert_close_in_size(&what, tolerance, 1e-300, &out, &expected);
                assert_close_in_size(&what, tolerance, 1e-300, &grads.query, &expected_grads.query);
                assert_close_in_size(&what, tolerance, 1e-300, &grads.key, &expected_grads.key);
                assert_close_in_size(&what, tolerance, 1e-300, &grads.value, &expected_grads.value);
                assert_eq!(grads.bias.is_some(), expected_grads.bias.is_some(), "{what}");
                if let (Some(a), Some(b)) = (&grads.bias, &expected_grads.bias) {
                    assert_close_in_size(&what, tolerance, 1e-300, a, b);
                }
                for (a, b) in grads.params.iter().zip(&expected_grads.params) {
                    let (a, b) = (a.sum().as_f64(), b.sum().as_f64());
                    let tolerance = tolerance * num_queries as f64;
                    assert_close_in_size(&what, tolerance, 1.0, &arr0(a), &arr0(b));
                }
            }
        }
    }
}

#[test]
fn tiles_are_rows_in_f64() {
    tiles_are_rows::<f64>(1e-12);
}

#[test]
fn tiles_are_rows_in_f32() {
    tiles_are_rows::<f32>(1e-4);
}

/// Points of the ball of the given norms.
fn in_the_ball(
    rows: usize,
    dim: usize,
    norms: std::ops::Range<f64>,
    seed: &mut u64,
) -> Array2<f64> {
    let mut x = points::<f64>(rows, dim, 1.0, seed);
    for mut row in x.rows_mut() {
        let norm = norms.start + (norms.end - norms.start) * (0.5 + 0.5 * noise(seed));
        let factor = norm / row.dot(&row).sqrt();
        row *= factor;
    }
    x
}

/// Applies a function of slices to every row.
fn map(x: &Array2<f64>, mut function: impl FnMut(&[f64], &mut [f64])) -> Array2<f64> {
    let mut mapped = x.clone();
    for (x, mut mapped) in x.rows().into_iter().zip(mapped.rows_mut()) {
        function(x.as_slice().unwrap(), mapped.as_slice_mut().unwrap());
    }
    mapped
}

/// Rotation in the first two axes and Möbius translation: an isometry.
fn moved(x: &Array2<f64>, by: &[f64], c: f64) -> Array2<f64> {
    map(x, |x, out| {
        let (sin, cos) = 0.7f64.sin_cos();
        let mut rotated = x.to_vec();
        (rotated[0], rotated[1]) = (cos * x[0] - sin * x[1], sin * x[0] + cos * x[1]);
        mobius_add(by, &rotated, c, out).unwrap();
    })
}

#[test]
fn isometries_move_the_means_and_leave_the_weights() {
    let (mut seed, c) = (11, 1.3);
    let radius = 1.0 / f64::sqrt(c);
    for norms in [0.0..0.5, 0.3..0.9, 0.9..0.99] {
        let norms = norms.start * radius..norms.end * radius;
        let [query, key, value] =
            [9, 13, 13].map(|rows| in_the_ball(rows, 3, norms.clone(), &mut seed));
        let by = in_the_ball(1, 3, 0.3 * radius..0.7 * radius, &mut seed);
        let by = by.as_slice().unwrap();
        let [moved_query, moved_key, moved_value] = [&query, &key, &value].map(|x| moved(x, by, c));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let other =
            Inputs::dense(moved_query.view(), moved_key.view(), moved_value.view()).unwrap();
        for aggregation in
            [Aggregation::Midpoint, Aggregation::TangentAtQuery, Aggregation::FrechetMean]
        {
            let config = PoincareConfig::new().curvature(c).temperature(0.8);
            let poincare = config.aggregation(aggregation).init::<f64>().unwrap();
            let [weights, moved_weights] =
                [&inputs, &other].map(|inputs| poincare.attention_weights(inputs).unwrap());
            let what = format!("{aggregation:?}, {norms:?}");
            assert_close_in_size(&what, 1e-11, 0.0, &moved_weights, &weights);
            let [out, moved_out] =
                [&inputs, &other].map(|inputs| poincare.forward(inputs).unwrap());
            assert_close_in_size(&what, 1e-11, 0.0, &moved_out, &moved(&out, by, c));
        }
        // The tangent space at the origin is not invariant.
        let config = PoincareConfig::new().curvature(c).aggregation(Aggregation::TangentAtOrigin);
        let poincare = config.init::<f64>().unwrap();
        let [out, moved_out] = [&inputs, &other].map(|inputs| poincare.forward(inputs).unwrap());
        let difference = (moved_out - moved(&out, by, c)).mapv(f64::abs);
        assert!(difference.iter().any(|&difference| difference > 1e-3), "{norms:?}");
    }
}

/// Tiles and rows against the weights and the public midpoint.
#[test]
fn a_head_is_the_midpoint_under_its_weights() {
    let (mut seed, c) = (5, 0.8);
    for norms in [0.0..1e-12, 0.0..0.6, 0.5..1.0, 1.1..1.118] {
        let [query, key] = [17, 23].map(|rows| in_the_ball(rows, 4, norms.clone(), &mut seed));
        let value = in_the_ball(23, 3, norms.clone(), &mut seed);
        let poincare = PoincareConfig::new().curvature(c).init::<f64>().unwrap();
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let weights = poincare.attention_weights(&inputs).unwrap();
        let out = poincare.forward(&inputs).unwrap();
        for (at, out) in out.rows().into_iter().enumerate() {
            let weights: Vec<f64> = (0..23).map(|key| weights[[at * 23 + key, 0]]).collect();
            let mut expected = [0.0; 3];
            midpoint(value.view(), &weights, c, &mut expected).unwrap();
            let mut logit_sum = 0.0;
            for (key, &weight) in key.rows().into_iter().zip(&weights) {
                let query = query.row(at);
                let d = distance(query.as_slice().unwrap(), key.as_slice().unwrap(), c).unwrap();
                logit_sum += weight * d.exp();
            }
            // p e^d is the same for all keys.
            for (key, &weight) in key.rows().into_iter().zip(&weights) {
                let query = query.row(at);
                let d = distance(query.as_slice().unwrap(), key.as_slice().unwrap(), c).unwrap();
                let share = weight * d.exp() * 23.0;
                let is_one = relative_eq!(share, logit_sum, epsilon = 0.0, max_relative = 1e-11);
                assert!(is_one, "{norms:?}: {share} {logit_sum}");
            }
            let mut error = distance(out.as_slice().unwrap(), &expected, c).unwrap();
            error /= norms.end * 2.0 / (1.0 - c * norms.end * norms.end);
            assert!(error < 1e-13, "{norms:?}: {error:e}");
        }
    }
}

#[test]
fn a_flat_ball_is_euclidean_space() {
    let mut seed = 2;
    let [query, key, value] = [9, 11, 11].map(|rows| points::<f64>(rows, 3, 1.0, &mut seed));
    let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
    for aggregation in [
        Aggregation::Midpoint,
        Aggregation::TangentAtOrigin,
        Aggregation::TangentAtQuery,
        Aggregation::FrechetMean,
    ] {
        for coordinates in [Coordinates::Ball, Coordinates::Tangent] {
            let config = PoincareConfig::new().curvature(1e-14).temperature(2.0);
            let config = config.aggregation(aggregation).coordinates(coordinates);
            let out = config.init::<f64>().unwrap().forward(&inputs).unwrap();
            for (query, out) in query.rows().into_iter().zip(out.rows()) {
                let logit = |key: usize| {
                    -2.0 * (&query - &key_row(&inputs, key)).mapv(|x| x * x).sum().sqrt() / 2.0
                };
                let weights: Vec<f64> = (0..11).map(|key| logit(key).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mean = arr1(&weights).dot(&value) / total;
                assert_close(format_args!("{aggregation:?} {coordinates:?}"), 1e-12, &out, &mean);
            }
        }
    }
}

fn key_row<'a>(inputs: &Inputs<'a, f64>, key: usize) -> ndarray::ArrayView1<'a, f64> {
    inputs.key().index_axis_move(ndarray::Axis(0), key)
}

#[test]
fn points_outside_are_errors_that_name_them() {
    let inside = array![[0.1, 0.2], [0.3, -0.4], [0.0, 0.5]];
    let outside = array![[0.1, 0.2], [0.6, 0.8], [0.0, 0.5]];
    let domain =
        |what: &'static str, norm| Error::Domain { what: what.into(), row: 1, norm, limit: 1.0 };
    let poincare = PoincareConfig::new().init::<f64>().unwrap();
    for (arrays, what) in [
        ([&outside, &inside, &inside], "query"),
        ([&inside, &outside, &inside], "key"),
        ([&inside, &inside, &outside], "value"),
    ] {
        let [query, key, value] = arrays.map(|array| array.view());
        let inputs = Inputs::dense(query, key, value).unwrap();
        assert_eq!(poincare.forward(&inputs), Err(domain(what, 1.0)));
        assert_eq!(poincare.forward_train(&inputs).unwrap_err(), domain(what, 1.0));
        assert_eq!(poincare.attention_weights(&inputs), Err(domain(what, 1.0)));
    }
    // The last number below 1 is inside.
    let edge = array![[1.0f32.next_down(), 0.0], [0.0, -1.0f32.next_down()]];
    let inputs = Inputs::dense(edge.view(), edge.view(), edge.view()).unwrap();
    let out = PoincareConfig::new().init::<f32>().unwrap().forward(&inputs).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
}

/// Returns the mechanisms in tangent coordinates, and the largest distance of their points from the center.
fn of_tangents(c: f64) -> [(PoincareConfig, f64); 4] {
    let config = PoincareConfig::new().curvature(c).coordinates(Coordinates::Tangent);
    let config = config.learn_curvature(true).learn_temperature(true);
    [
        (Aggregation::Midpoint, 350.0),
        (Aggregation::TangentAtOrigin, 350.0),
        (Aggregation::TangentAtQuery, 36.0),
        (Aggregation::FrechetMean, 36.0),
    ]
    .map(|(aggregation, largest)| (config.clone().aggregation(aggregation), largest))
}

fn every_finite_tangent_vector_is_a_point<F: Float>() {
    let mut seed = 21;
    let huge = F::max_value().as_f64();
    for lengths in [
        [1.0, 3.0, 20.0, 21.0, 25.0, 174.0],
        [0.0, 1e-30, 17.0, 19.0, 176.0, 400.0],
        [1.0, 1e3, 1e6, 1e15, 1e30, huge],
        [huge; 6],
    ] {
        for num_queries in [3, 9] {
            let far = |rows: usize, seed: &mut u64| {
                let mut x = in_the_ball(rows, 3, 1.0..1.0, seed);
                for (row, mut x) in x.rows_mut().into_iter().enumerate() {
                    x *= lengths[row % 6];
                }
                x.mapv(|x| F::from_f64(if x.abs() > huge { huge.copysign(x) } else { x }))
            };
            let (query, key, value) =
                (far(num_queries, &mut seed), far(6, &mut seed), far(6, &mut seed));
            let mut value = value;
            if lengths[0] == huge {
                // The length overflows.
                value.fill(F::max_value());
            }
            let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
            for (config, _) in of_tangents(1.7) {
                let poincare = config.init::<F>().unwrap();
                let (out, saved) = poincare.forward_train(&inputs).unwrap();
                let what = format!("{:?}: {lengths:?}", poincare.config());
                assert!(out.iter().all(|x| x.is_finite()), "{what}: {out}");
                assert_eq!(poincare.forward(&inputs).unwrap(), out, "{what}");
                let weights = poincare.attention_weights(&inputs).unwrap();
                for query in 0..num_queries {
                    let sum: F = (0..6).map(|key| weights[[query * 6 + key, 0]]).sum();
                    assert_close(&what, 1e-5, &arr0(sum), &arr0(F::one()));
                }
                let ones = Array2::<F>::ones(out.raw_dim());
                let grads = poincare.backward(&inputs, &saved, ones.view()).unwrap();
                for grad in [&grads.query, &grads.key, &grads.value] {
                    assert!(grad.iter().all(|x| x.is_finite()), "{what}: {grad}");
                }
                let mut params = grads.params.iter().flatten();
                assert!(params.all(|x| x.is_finite()), "{what}: {:?}", grads.params);
            }
        }
    }
}

#[test]
fn every_finite_tangent_vector_is_a_point_in_both_precisions() {
    every_finite_tangent_vector_is_a_point::<f32>();
    every_finite_tangent_vector_is_a_point::<f64>();
}

#[test]
fn a_vector_past_the_largest_distance_stands_for_a_shorter_one() {
    let (mut seed, c) = (31, 0.6);
    for (config, largest) in of_tangents(c) {
        let longest = 0.5 * largest / f64::sqrt(c);
        let mut draw = |rows| points::<f64>(rows, 3, 0.4 * longest, &mut seed);
        let [query, key, value] = [draw(9), draw(5), draw(5)];
        let lengthen = |x: &Array2<f64>, to: f64| {
            let mut x = x.clone();
            for row in [0, 3] {
                let norm = x.row(row).dot(&x.row(row)).sqrt();
                x.row_mut(row).mapv_inplace(|x| x * to / norm);
            }
            x
        };
        let grad_out = points::<f64>(9, 3, 1.0, &mut seed);
        let poincare = config.temperature(0.3 * largest).init::<f64>().unwrap();
        let run = |to: f64| {
            let [query, key, value] = [&query, &key, &value].map(|x| lengthen(x, to));
            let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
            let (out, saved) = poincare.forward_train(&inputs).unwrap();
            (out, poincare.backward(&inputs, &saved, grad_out.view()).unwrap())
        };
        let (expected, grads) = run(longest * (1.0 - 1e-13));
        let (out, past) = run(4.0 * longest);
        let what = format!("{largest}");
        if largest < 100.0 {
            // Farther out, the last place of ball coordinates is a large part of the distance.
            let (same, quarter) = run(16.0 * longest);
            assert_eq!(out, same, "{what}");
            for row in [0, 3] {
                let (grad, quarter) = (past.value.row(row), quarter.value.row(row));
                assert_eq!(grad, 4.0 * &quarter, "{what}");
                let along = value.row(row).dot(&grad).abs();
                assert!(along <= 1e-14 * value.row(row).mapv(f64::abs).dot(&grad.mapv(f64::abs)));
            }
            continue;
        }
        assert_close_in_size(&what, 1e-11, 0.0, &out, &expected);
        for (x, grad, past) in [
            (&query, &grads.query, &past.query),
            (&key, &grads.key, &past.key),
            (&value, &grads.value, &past.value),
        ] {
            let mut expected = grad.clone();
            for row in [0, 3] {
                let unit = &x.row(row) / x.row(row).dot(&x.row(row)).sqrt();
                let along = unit.dot(&grad.row(row));
                expected.row_mut(row).assign(&((&grad.row(row) - &(along * &unit)) / 4.0));
            }
            assert_close_in_size(&what, 1e-9, 0.0, past, &expected);
        }
        // The gradient of c holds the distance of such a vector fixed in units of 1/√c.
        let loss = |step: f64| {
            let mut moved = poincare.clone();
            moved.visit_params_mut(&mut |name, mut raw| {
                if name == "raw_curvature" {
                    raw += step;
                }
            });
            let [query, key, value] = [&query, &key, &value].map(|x| lengthen(x, 4.0 * longest));
            let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
            (moved.forward(&inputs).unwrap() * &grad_out).sum()
        };
        let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
        let grad_c = past.params[0].sum();
        let tolerance = 1e-6 * (1.0 + slope.abs());
        assert_close(&what, tolerance, &arr0(grad_c), &arr0(slope));
    }
}

/// Checks that the mean of one value is the value, and that its gradient is passed on unchanged.
fn one_value<F: Float>(radii: &[f64], tolerance: f64) {
    let mut seed = 77;
    for &radius in radii {
        let value = (0.5 * radius * in_the_ball(1, 3, 1.0..1.0, &mut seed)).mapv(F::from_f64);
        let grad = points::<F>(1, 3, 1.0, &mut seed);
        let inputs = Inputs::dense(value.view(), value.view(), value.view()).unwrap();
        let config = PoincareConfig::new().coordinates(Coordinates::Tangent);
        let poincare = config.init::<F>().unwrap();
        let (out, saved) = poincare.forward_train(&inputs).unwrap();
        let grads = poincare.backward(&inputs, &saved, grad.view()).unwrap();
        assert_close_in_size(format_args!("{radius}, out"), tolerance, 0.0, &out, &value);
        assert_close_in_size(format_args!("{radius}, grad"), tolerance, 0.0, &grads.value, &grad);
        assert!(grads.query.iter().chain(&grads.key).all(|&grad| grad == F::zero()));
    }
}

#[test]
fn the_mean_of_one_value_is_the_value() {
    one_value::<f32>(&[0.1, 4.0, 7.9], 2e-3);
    one_value::<f32>(&[8.1, 10.0, 12.0, 14.0, 16.0, 20.0, 35.0, 41.0, 100.0, 349.0], 1e-6);
    one_value::<f64>(&[0.1, 4.0, 7.9, 8.1, 10.0, 16.0, 20.0, 33.0, 39.0, 100.0, 349.0], 1e-9);
}

/// Plain gradient descent, starting where c grows fast: no step is refused.
#[test]
fn the_curvature_can_be_learned_in_f32() {
    let mut seed = 41;
    for (rate, length, rows, columns) in
        [(0.05, 14.6, 12, 64), (0.005, 14.6, 12, 64), (0.05, 22.6, 12, 128), (1.0, 20.0, 5, 400)]
    {
        let mut x = points::<f32>(rows, columns, 1.0, &mut seed);
        for mut row in x.rows_mut() {
            let norm = row.dot(&row).sqrt();
            let length = length * (1.0 - 0.1 * (noise(&mut seed) as f32).abs());
            row.mapv_inplace(|x| x * length / norm);
        }
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
        let config = PoincareConfig::new().coordinates(Coordinates::Tangent);
        let mut poincare = config.learn_curvature(true).init::<f32>().unwrap();
        let (mut first, mut last) = (f32::NAN, f32::NAN);
        for step in 0..200 {
            let (out, saved) = poincare.forward_train(&inputs).unwrap();
            let difference = out - 0.2 * &x;
            last = difference.mapv(|x| x * x).sum();
            if step == 0 {
                first = last;
            }
            let grads = poincare.backward(&inputs, &saved, (2.0 * difference).view()).unwrap();
            let grad = grads.params[0].sum();
            assert!(grad.is_finite() && last.is_finite(), "{rate}, {step}: {grad} {last}");
            poincare.visit_params_mut(&mut |_, mut raw| raw -= rate * grad);
        }
        println!("{rate}: {first} {last}, c = {}", poincare.curvature());
        assert!(last <= first);
    }
}

#[test]
fn bad_options_and_states_are_refused() {
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        for (config, field) in [
            (PoincareConfig::new().curvature(bad), "curvature"),
            (PoincareConfig::new().temperature(bad), "temperature"),
        ] {
            let error = config.init::<f32>().unwrap_err();
            assert!(
                matches!(&error, Error::InvalidArgument { argument: f, .. } if *f == field),
                "{error}"
            );
        }
    }
    let x = array![[0.1, 0.2], [0.3, -0.4]];
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let midpoint = PoincareConfig::new().init::<f64>().unwrap();
    let (out, saved) = midpoint.forward_train(&inputs).unwrap();
    let tangent = PoincareConfig::new().coordinates(Coordinates::Tangent).init::<f64>().unwrap();
    let error = tangent.backward(&inputs, &saved, out.view()).unwrap_err();
    assert!(error.to_string().contains("Tangent"), "{error}");

    // A value with another number of columns is not in the tangent space of a query.
    let value = array![[0.1], [0.2]];
    let inputs = Inputs::dense(x.view(), x.view(), value.view()).unwrap();
    let at_query = PoincareConfig::new().aggregation(Aggregation::TangentAtQuery);
    let error = at_query.init::<f64>().unwrap().forward(&inputs).unwrap_err();
    let expected = Error::Shape { what: "value".into(), expected: vec![2, 2], actual: vec![2, 1] };
    assert_eq!(error, expected);

    // A parameter after a bad step of an optimiser.
    let mut learned = PoincareConfig::new().learn_curvature(true).init::<f64>().unwrap();
    learned.visit_params_mut(&mut |_, mut raw| raw.fill(-1e4));
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    assert!(matches!(
        learned.forward(&inputs),
        Err(Error::InvalidArgument { argument: "curvature", .. })
    ));
    learned.visit_params_mut(&mut |_, mut raw| raw.fill(-100.0));
    let text = learned.forward(&inputs).unwrap_err().to_string();
    let expected = "curvature: expected a number above 1e-30 and below 1e30, got \
                    3.720075976020836e-44, the softplus of raw_curvature = -100.0";
    assert_eq!(text, expected);
    let text = PoincareConfig::new().temperature(1e30).init::<f32>().unwrap_err().to_string();
    assert_eq!(text, "temperature: expected a number above 1e-30 and below 1e30, got 1e30");
}

#[test]
fn learned_values_start_where_they_are_told() {
    let config = PoincareConfig::new().curvature(0.03).temperature(40.0);
    let poincare = config.learn_curvature(true).learn_temperature(true).init::<f64>().unwrap();
    assert_relative_eq!(poincare.curvature(), 0.03, epsilon = 0.0, max_relative = 1e-14);
    assert_relative_eq!(poincare.temperature(), 40.0, epsilon = 0.0, max_relative = 1e-14);
    let names: Vec<String> = params::state(&poincare).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["raw_curvature", "raw_temperature"]);
}

/// Returns points of every difficult kind.
fn awkward<F: Float>(rows: usize, dim: usize, seed: &mut u64) -> Array2<F> {
    let mut x = Array2::<F>::zeros((rows, dim));
    for at in 0..rows {
        let norm = match (noise(seed) * 4.0 + 4.0) as usize {
            0 => 0.0,
            1 => F::min_positive_value().as_f64(),
            2 => (noise(seed) * 150.0 - 150.0).exp2(),
            3 => 1.0 - F::epsilon().as_f64(),
            4 => 1.0 - (noise(seed) * 10.0 - 11.0).exp2(),
            _ => 0.5 + 0.5 * noise(seed),
        };
        let kind = (noise(seed) * 3.0 + 3.0) as usize;
        let mut row: Vec<f64> = match kind {
            // Equal or opposite to an earlier point, or collinear with it.
            0..=2 if at > 0 => {
                let factor = [1.0, -1.0, 0.5][kind];
                x.row(at / 2).iter().map(|x| factor * x.as_f64()).collect()
            }
            3 => (0..dim).map(|c| if c == 0 { norm } else { 0.0 }).collect(),
            _ => {
                let row: Vec<f64> = (0..dim).map(|_| noise(seed)).collect();
                let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.iter().map(|x| x * norm / length).collect()
            }
        };
        // Rounding may have moved it outside, by less than a sum of squares in f64 can show.
        let is_outside = |row: &[f64]| {
            let row: Vec<F> = row.iter().map(|&x| F::from_f64(x)).collect();
            conformal_factor(&row, F::one()).is_err()
        };
        while is_outside(&row) {
            row.iter_mut().for_each(|x| *x *= 1.0 - F::epsilon().as_f64());
        }
        x.row_mut(at).iter_mut().zip(row).for_each(|(x, value)| *x = F::from_f64(value));
    }
    x
}

fn everything_inside_is_finite<F: Float>(sets: usize, seed: &mut u64) {
    let midpoint = PoincareConfig::new().learn_curvature(true).learn_temperature(true);
    let origin = midpoint.clone().aggregation(Aggregation::TangentAtOrigin);
    let mechanisms = [midpoint, origin].map(|config| config.init::<F>().unwrap());
    for set in 0..sets {
        let (num_queries, num_keys, dim) = (3 + 7 * (set % 2), 5, 1 + set % 4);
        let [query, key, value] =
            [num_queries, num_keys, num_keys].map(|rows| awkward::<F>(rows, dim, seed));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        for poincare in &mechanisms {
            let (out, saved) = poincare.forward_train(&inputs).unwrap();
            assert!(out.iter().all(|x| x.is_finite()), "{query} {key} {value} {out}");
            let ones = Array2::<F>::ones(out.raw_dim());
            let grads = poincare.backward(&inputs, &saved, ones.view()).unwrap();
            for grad in [&grads.query, &grads.key, &grads.value] {
                assert!(grad.iter().all(|x| x.is_finite()), "{query} {key} {value} {grad}");
            }
            let params = grads.params.iter().flatten();
            assert!(params.into_iter().all(|x| x.is_finite()), "{query} {key} {value}");
        }
    }
}

/// The means that are computed pair by pair use points of the ball, which may round to the boundary: this
/// gives an error, but never NaN or infinity.
#[test]
fn means_formed_pair_by_pair_are_finite_or_errors() {
    let mut seed = 12;
    let mut num_errors = 0;
    for set in 0..2000 {
        let [query, key, value] =
            [3, 5, 5].map(|rows| awkward::<f64>(rows, 1 + set % 4, &mut seed));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        for aggregation in [Aggregation::TangentAtQuery, Aggregation::FrechetMean] {
            let poincare = PoincareConfig::new().aggregation(aggregation).init::<f64>().unwrap();
            match poincare.forward(&inputs) {
                Ok(out) => {
                    assert!(out.iter().all(|x| x.is_finite()), "{query} {key} {value} {out}")
                }
                Err(Error::Domain { .. }) => num_errors += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    println!("{num_errors} errors");
}

#[test]
fn everything_inside_gives_finite_answers() {
    everything_inside_is_finite::<f32>(1000, &mut 7);
    everything_inside_is_finite::<f64>(1000, &mut 8);
}

/// `cargo test --release --test poincare -- --ignored`
#[test]
#[ignore = "a million pairs each: some seconds in release mode"]
fn everything_inside_gives_finite_answers_a_million_times() {
    everything_inside_is_finite::<f32>(35_000, &mut 9);
    everything_inside_is_finite::<f64>(35_000, &mut 10);
}

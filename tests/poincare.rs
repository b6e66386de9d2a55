//! Poincaré attention against arbitrary precision (`tests/golden/poincare_attention.py`), and its laws.

use graph_attention::ndarray::{Array2, ArrayView2, Ix2};
use graph_attention::{
    Aggregation, Attention, Coordinates, Dropout, Float, Graph, Inputs, PoincareConfig,
};
use serde_json::{Value, json};

fn array<F: Float>(value: &Value) -> Array2<F> {
    let size = |n: usize| value["shape"][n].as_u64().unwrap() as usize;
    let data = value["data"].as_array().unwrap().iter().map(|n| F::of(n.as_f64().unwrap()));
    Array2::from_shape_vec((size(0), size(1)), data.collect()).unwrap()
}

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

    /// The error of each entry, in units of what one unit of rounding in every input and in the largest
    /// entry would do.
    fn compare<F: Float>(&mut self, name: &str, actual: ArrayView2<'_, F>) {
        let expected = &self.value[name];
        let values = array::<f64>(expected);
        assert_eq!(actual.dim(), values.dim(), "{name}");
        let unit = F::epsilon().as_f64() / 2.0;
        let mut largest = values.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        if name == "grad_c" {
            largest = largest.max(self.terms_of_grad_c());
        } else if name != "out" {
            // Gradients that are 0 since their terms cancel: as large as the others are.
            for name in ["grad_query", "grad_key", "grad_value"] {
                let other = array::<f64>(&self.value[name]);
                largest = other.iter().fold(largest, |max: f64, x| max.max(x.abs()));
            }
        }
        let perturbations = array::<f64>(&json!({
            "shape": expected["shape"],
            "data": expected["perturbation"],
        }));
        for ((a, b), perturbation) in actual.iter().zip(&values).zip(&perturbations) {
            let error = (a.as_f64() - b).abs();
            if error != 0.0 {
                let ratio = error / (unit * largest + perturbation);
                assert!(!ratio.is_nan(), "{} {name}: {a} instead of {b:e}", self.value["name"]);
                if ratio > self.worst.0 {
                    self.worst = (ratio, format!("{name}: {a} instead of {b:e}"));
                }
            }
        }
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
            let [x, grad] = [x, grad].map(|name| array::<f64>(&self.value[name]));
            (x * grad).mapv(f64::abs).sum()
        };
        products.into_iter().map(sum).sum::<f64>() / (2.0 * self.value["c"].as_f64().unwrap())
    }

    fn check<F: Float>(&mut self) {
        let [query, key, value, grad_out] =
            ["query", "key", "value", "grad_out"].map(|name| array::<F>(&self.value[name]));
        let bias = (!self.value["bias"].is_null()).then(|| array::<F>(&self.value["bias"]));
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
        let out = self.config(false).init::<F>().unwrap().forward(&inputs).unwrap();
        self.compare("out", out.view());
        let learned = self.config(true).init::<F>().unwrap();
        let (_, saved) = learned.forward_train(&inputs).unwrap();
        let grads = learned.backward(&inputs, &saved, grad_out.view()).unwrap();
        for (name, grad) in
            [("grad_query", &grads.query), ("grad_key", &grads.key), ("grad_value", &grads.value)]
        {
            self.compare(name, grad.view());
        }
        if let Some(grad) = &grads.bias {
            self.compare("grad_bias", grad.view());
        }
        // The derivative of softplus is 1 − e^{−softplus}.
        for (param, (name, value)) in
            [("grad_c", learned.curvature()), ("grad_tau", learned.temperature())]
                .iter()
                .enumerate()
        {
            let slope = -(-value).exp_m1();
            let grad = grads.params[param].mapv(|grad| F::of(grad.as_f64() / slope));
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
    assert_eq!(cases.len(), 112);
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
    Array2::from_shape_simple_fn((rows, columns), || F::of(scale * noise(seed)))
}

fn assert_near<F: Float>(what: &str, a: &Array2<F>, b: &Array2<F>, tolerance: f64) {
    assert_eq!(a.dim(), b.dim(), "{what}");
    let largest = b.iter().fold(1e-300, |max: f64, x| max.max(x.as_f64().abs()));
    for (a, b) in a.iter().zip(b) {
        let error = (a.as_f64() - b.as_f64()).abs();
        assert!(error <= tolerance * largest, "{what}: {a} instead of {b}");
    }
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
        for (case, scale) in [0.2, 1.0, 4.0, 0.2, 0.2].into_iter().enumerate() {
            let query = points::<F>(num_queries, heads * dim, scale, &mut seed);
            let key = points::<F>(num_keys, kv_heads * dim, scale, &mut seed);
            let value = points::<F>(num_keys, kv_heads * value_dim, scale, &mut seed);
            let bias = points::<F>(num_queries * num_keys, heads, 1.0, &mut seed);
            let noise = points::<F>(num_queries, num_keys, 1.0, &mut seed);
            let mask = noise.mapv(|noise| noise.as_f64() > -0.5);
            let grad_out = points::<F>(num_queries, heads * value_dim, 1.0, &mut seed);
            let edges = (0..num_queries * num_keys).map(|pair| (pair / num_keys, pair % num_keys));
            let graph = Graph::from_edges(num_queries, num_keys, edges).unwrap();
            let dense = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
            let sparse = Inputs::graph(query.view(), key.view(), value.view(), &graph).unwrap();
            let [dense, sparse] = [dense, sparse].map(|inputs| {
                let inputs = inputs.with_kv_heads(heads, kv_heads).unwrap();
                match case {
                    0 => inputs.with_bias(bias.view()).unwrap().with_mask(mask.view()).unwrap(),
                    3 => inputs.causal(),
                    4 => inputs.with_dropout(Dropout { probability: 0.3, seed: 5 }).unwrap(),
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
                assert_near(&what, &out, &expected, tolerance);
                assert_near(&what, &grads.query, &expected_grads.query, tolerance);
                assert_near(&what, &grads.key, &expected_grads.key, tolerance);
                assert_near(&what, &grads.value, &expected_grads.value, tolerance);
                if let (Some(a), Some(b)) = (&grads.bias, &expected_grads.bias) {
                    assert_near(&what, a, b, tolerance);
                }
                for (a, b) in grads.params.iter().zip(&expected_grads.params) {
                    let (a, b) = (a.sum().as_f64(), b.sum().as_f64());
                    let terms = num_queries as f64;
                    assert!(
                        (a - b).abs() <= tolerance * terms * b.abs().max(1.0),
                        "{what}: {a} {b}"
                    );
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

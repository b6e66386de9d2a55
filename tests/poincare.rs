//! Poincaré attention against arbitrary precision (`tests/golden/poincare_attention.py`), and its laws.

use graph_attention::ndarray::{Array2, ArrayView2, Ix2};
use graph_attention::{Aggregation, Attention, Coordinates, Float, Graph, Inputs, PoincareConfig};
use serde_json::Value;

fn array<F: Float>(value: &Value) -> Array2<F> {
    let size = |n: usize| value["shape"][n].as_u64().unwrap() as usize;
    let data = value["data"].as_array().unwrap().iter().map(|n| F::of(n.as_f64().unwrap()));
    Array2::from_shape_vec((size(0), size(1)), data.collect()).unwrap()
}

struct Case<'v> {
    value: &'v Value,
    /// Of the largest entry of an array, in units of rounding.
    worst: f64,
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
                _ => Aggregation::TangentAtOrigin,
            })
            .learn_curvature(learn)
            .learn_temperature(learn)
    }

    fn compare<F: Float>(&mut self, name: &str, actual: ArrayView2<'_, F>) {
        let expected = &self.value[name];
        let values = array::<f64>(expected);
        assert_eq!(actual.dim(), values.dim(), "{name}");
        let perturbation = expected["perturbation"].as_array().unwrap();
        let unit = F::epsilon().as_f64() / 2.0;
        let largest = values.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        for ((a, b), p) in actual.iter().zip(&values).zip(perturbation) {
            let allowed = unit * largest + p.as_f64().unwrap();
            let error = (a.as_f64() - b).abs();
            let ratio = if error == 0.0 { 0.0 } else { error / allowed };
            if ratio > 64.0 || ratio.is_nan() {
                println!(
                    "{} {name}: {a} instead of {b:e}: {ratio:.1}  (p {:.1e})",
                    self.value["name"],
                    p.as_f64().unwrap()
                );
            }
            self.worst = self.worst.max(ratio);
        }
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
    for value in golden["cases"].as_array().unwrap() {
        let aggregation = value["aggregation"].as_str().unwrap();
        if !["midpoint", "tangent_origin"].contains(&aggregation) {
            continue;
        }
        let mut case = Case { value, worst: 0.0 };
        match value["precision"].as_str().unwrap() {
            "f32" => case.check::<f32>(),
            _ => case.check::<f64>(),
        }
        println!("{}: {:.1}", value["name"], case.worst);
    }
}

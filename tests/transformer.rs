//! Tests of what is special to `TransformerLayer`: PyTorch's encoders, gates, norms, dropout.

mod common;

use common::close::assert_close_in_size;
use common::golden::{array, dynamic, size};
use common::{hold_simd, random, refused};
use graph_attention::ndarray::{
    Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis, Ix1, Ix2,
};
use graph_attention::{
    Attention, Dropout, Flash, GradientsMut, Inputs, LinearConfig, MultiHead, MultiHeadConfig,
    Params, Result, Saved, ScaledDotProduct, StackConfig, TransformerLayer, TransformerLayerConfig,
    params,
    rowwise::{Activation, NormConfig, Normalization},
};
use serde_json::Value;

/// For two computations in `f64` in different order, relative to the largest number of an array.
const TOLERANCE: f64 = 1e-12;

type Layer<A> = TransformerLayer<f64, MultiHead<f64, A>>;

fn layer_of(config: &TransformerLayerConfig, seed: u64) -> Layer<Flash> {
    let rng = &mut random::rng(seed);
    config.init(MultiHeadConfig::new(6, 2).init(Flash::new(), rng).unwrap(), rng).unwrap()
}

/// Changes all parameters, so that none is 0 or 1.
fn shake(mut mechanism: impl Params<f64>, seed: u64) {
    let mut at = seed as f64;
    mechanism.visit_params_mut(&mut |_, mut param| {
        param.mapv_inplace(|x| {
            at += 1.0;
            x + 0.3 * (at * 1.7).sin()
        });
    });
}

fn check_case(case: &Value, attention: &dyn Attention<f64>) {
    let name = case["name"].as_str().unwrap();
    let what = |array: &str| format!("{name}, {array}");
    let close = |array_name: &str, actual: &ArrayD<f64>, expected: &Value| {
        assert_close_in_size(what(array_name), TOLERANCE, 1.0, actual, &dynamic(expected));
    };
    let x: Array2<f64> = array(&case["x"]);
    let keep = (!case["hidden_keys"].is_null())
        .then(|| array::<f64, Ix1>(&case["hidden_keys"]).mapv(|hidden| hidden == 0.0));
    let mut inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    if let Some(keep) = &keep {
        inputs = inputs.with_mask(keep.view().insert_axis(Axis(0))).unwrap();
    }
    if case["causal"].as_bool().unwrap() {
        inputs = inputs.with_causal();
    }
    let (out, saved) = attention.forward_train(&inputs).unwrap();
    close("out", &out.into_dyn(), &case["out"]);
    let grad_out: Array2<f64> = array(&case["grad_out"]);
    let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
    close("x", &grads.self_attention().unwrap().into_dyn(), &case["grad_x"]);
    let expected = &case["grad_params"];
    assert_eq!(grads.params.len(), expected.as_object().unwrap().len());
    for (param, grad) in grads.named(attention).unwrap() {
        close(&param, grad, &expected[&param]);
    }
}

#[test]
fn encoders_of_pytorch_load_by_name() {
    hold_simd();
    let golden: Value =
        serde_json::from_str(include_str!("golden/torch_transformer.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 23);
    for case in cases {
        let flag = |name: &str| case[name].as_bool().unwrap();
        let activation = match case["activation"].as_str().unwrap() {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            other => panic!("{other}"),
        };
        let config = TransformerLayerConfig::new(6, 5)
            .activation(activation)
            .norm_first(flag("norm_first"))
            .epsilon(case["epsilon"].as_f64().unwrap())
            .bias(flag("bias"));
        let state = case["params"].as_object().unwrap();
        let state = state.iter().map(|(name, value)| (name, dynamic::<f64>(value)));
        let heads = MultiHeadConfig::new(6, 3).bias(flag("bias"));
        let heads = || heads.init(Flash::new(), &mut random::rng(1)).unwrap();
        if case["layers"].is_null() {
            check_case(case, &config.from_params(heads(), state).unwrap());
            continue;
        }
        let layers = (0..size(&case["layers"]))
            .map(|_| config.init(heads(), &mut random::rng(1)).unwrap())
            .collect::<Vec<_>>();
        let norm = NormConfig::new(Normalization::Layer, 6);
        let mut stack = StackConfig::new();
        if flag("norm") {
            stack = stack.norm(norm);
        }
        for stack in [stack.clone(), stack.checkpointing(true)] {
            check_case(case, &stack.from_params(layers.clone(), state.clone()).unwrap());
        }
    }
}

/// Rows divided by their root mean squares.
fn rms(x: &Array2<f64>, weight: &ArrayD<f64>, epsilon: f64) -> Array2<f64> {
    let mean_square = x.mapv(|x| x * x).mean_axis(Axis(1)).unwrap().insert_axis(Axis(1));
    let weight = weight.view().into_dimensionality::<Ix1>().unwrap();
    x / &mean_square.mapv(|square| (square + epsilon).sqrt()) * weight
}

#[test]
fn gates_and_rms_norms_are_their_equations() -> Result<()> {
    hold_simd();
    let config = TransformerLayerConfig::new(6, 5).normalization(Normalization::Rms).epsilon(0.01);
    let config = config.gated(true).bias(false);
    let x = random::matrix(4, 6, 2);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_causal();
    for activation in [Activation::Silu, Activation::Relu] {
        for norm_first in [false, true] {
            let config = config.clone().activation(activation).norm_first(norm_first);
            let mut layer = config.init(ScaledDotProduct::new(), &mut random::rng(3))?;
            shake(&mut layer, 4);
            let get = |name: &str| params::get(&layer, name).unwrap().to_owned();
            let matrix = |name: &str| get(name).into_dimensionality::<Ix2>().unwrap();
            let (w1, w2) = (matrix("linear1.weight"), matrix("linear2.weight"));
            let norm = |x: &Array2<f64>, name: &str| rms(x, &get(name), 0.01);
            let silu_or_relu = |u: f64| match activation {
                Activation::Silu => u / (1.0 + (-u).exp()),
                _ => u.max(0.0),
            };
            let feed_forward = |x: &Array2<f64>| {
                let before = x.dot(&w1.t());
                let (u, v) = before.view().split_at(Axis(1), 5);
                (u.mapv(silu_or_relu) * v).dot(&w2.t())
            };
            let attend = |x: &Array2<f64>| {
                ScaledDotProduct::new().forward(&inputs.with_arrays(
                    x.view(),
                    x.view(),
                    x.view(),
                )?)
            };
            let expected = if norm_first {
                let h = &x + &attend(&norm(&x, "norm1.weight"))?;
                &h + &feed_forward(&norm(&h, "norm2.weight"))
            } else {
                let h = norm(&(&x + &attend(&x)?), "norm1.weight");
                norm(&(&h + &feed_forward(&h)), "norm2.weight")
            };
            let what = format!("{activation:?}, {norm_first}");
            assert_close_in_size(what, TOLERANCE, 1.0, &layer.forward(&inputs)?, &expected);
        }
    }
    Ok(())
}

#[test]
fn fresh_parameters_fill_their_range() {
    let layer = TransformerLayerConfig::new(24, 96).gated(true);
    let layer = layer.init::<f64, _>(Flash::new(), &mut random::rng(4)).unwrap();
    for (name, value) in params::state(&layer) {
        let (low, high) = match name.as_str() {
            "norm1.weight" | "norm2.weight" => (1.0, 1.0),
            "norm1.bias" | "norm2.bias" => (0.0, 0.0),
            "linear1.weight" | "linear1.bias" => (-1.0 / 24f64.sqrt(), 1.0 / 24f64.sqrt()),
            _ => (-1.0 / 96f64.sqrt(), 1.0 / 96f64.sqrt()),
        };
        let smallest = value.iter().copied().fold(f64::MAX, f64::min);
        let largest = value.iter().copied().fold(f64::MIN, f64::max);
        assert!(smallest >= low && largest <= high, "{name}");
        // Some of the 24 or more draws come near either end.
        assert!(largest - smallest >= 0.8 * (high - low), "{name}");
    }
}

/// Outputs ones, whatever the inputs.
#[derive(Clone, Debug)]
struct Ones;

impl Params<f64> for Ones {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
}

impl Attention<f64> for Ones {
    fn name(&self) -> &'static str {
        "ones"
    }
    fn output_dim(&self, inputs: &Inputs<'_, f64>) -> usize {
        inputs.query().ncols()
    }
    fn forward_into(&self, _: &Inputs<'_, f64>, mut out: ArrayViewMut2<'_, f64>) -> Result<()> {
        out.fill(1.0);
        Ok(())
    }
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, f64>,
        out: ArrayViewMut2<'_, f64>,
    ) -> Result<Saved> {
        self.forward_into(inputs, out)?;
        Ok(Saved::new("ones", ()))
    }
    fn backward_into(
        &self,
        _: &Inputs<'_, f64>,
        _: &Saved,
        _: ArrayView2<'_, f64>,
        _: GradientsMut<'_, f64>,
    ) -> Result<()> {
        Ok(())
    }
}

/// A pre-norm layer around `Ones` with 40 columns and hidden values, whose weights are 0 except for those given.
fn probe(set: impl Fn(&str) -> Option<ArrayD<f64>>) -> TransformerLayer<f64, Ones> {
    let config = TransformerLayerConfig::new(40, 40).norm_first(true);
    let mut layer = config.init(Ones, &mut random::rng(1)).unwrap();
    layer.visit_params_mut(&mut |name, mut param| match set(name) {
        Some(value) => param.assign(&value),
        None => param.fill(0.0),
    });
    layer
}

#[test]
fn dropout_is_at_the_places_of_pytorch() -> Result<()> {
    hold_simd();
    let zeros = Array2::<f64>::zeros((100, 40));
    let dropout = Dropout { probability: 0.25, seed: 5 };
    let plain = Inputs::dense(zeros.view(), zeros.view(), zeros.view())?;
    let inputs = plain.with_dropout(dropout)?;
    let ones = || Some(ArrayD::ones(vec![40]));
    let eye = || Some(Array2::eye(40).into_dyn());

    // q + m₁ ⊙ 1; h + m₃ ⊙ 1; h + (m₂ ⊙ relu(1)) I, of which m₃ drops some again.
    let attention = probe(|_| None).forward(&inputs)?;
    let feed_forward =
        probe(|name| if name == "linear2.bias" { ones() } else { None }).forward(&inputs)?;
    let both = probe(|name| match name {
        "linear1.bias" => ones(),
        "linear2.weight" => eye(),
        _ => None,
    });
    let both = both.forward(&inputs)? - &attention;
    let feed_forward = feed_forward - &attention;
    for (mask, kept) in [(&attention, 0.75), (&feed_forward, 0.75), (&both, 0.75 * 0.75)] {
        let kept_entries = mask.iter().filter(|&&entry| entry != 0.0).count();
        // 4,000 draws: the standard error of the share is below 0.008; 5 of them are allowed.
        assert!((kept_entries as f64 / 4000.0 - kept).abs() < 0.04, "{kept_entries}");
        assert!(mask.iter().all(|&x| x == 0.0 || (x - 1.0 / kept).abs() < 1e-12));
    }
    // Different at each place, and the same again for the same seed only.
    assert_ne!(attention, feed_forward);
    assert!(
        both.iter().zip(&feed_forward).all(|(&both, &of_output)| both == 0.0 || of_output != 0.0)
    );
    let hidden_only = both.iter().zip(&feed_forward).filter(|(a, b)| **a == 0.0 && **b != 0.0);
    let hidden_only = hidden_only.count() as f64 / 4000.0;
    assert!((hidden_only - 0.75 * 0.25).abs() < 0.04, "{hidden_only}");
    assert_eq!(attention, probe(|_| None).forward(&inputs)?);
    let other = plain.with_dropout(Dropout { seed: 6, ..dropout })?;
    assert_ne!(attention, probe(|_| None).forward(&other)?);
    assert_eq!(probe(|_| None).forward(&plain)?, Array2::<f64>::ones((100, 40)));

    // Queries that a router selects draw by their numbers in the whole inputs.
    let some = [3, 4, 50];
    let selected = inputs.select_queries(&some)?;
    let of_some = probe(|_| None).forward(&selected.inputs())?;
    assert_eq!(of_some, attention.select(Axis(0), &some));
    Ok(())
}

#[test]
fn attention_weights_are_those_of_normalised_inputs() -> Result<()> {
    hold_simd();
    let x = random::matrix(4, 6, 3);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let config = TransformerLayerConfig::new(6, 5);
    let post = layer_of(&config, 1);
    assert_eq!(post.attention_weights(&inputs)?, post.inner().attention_weights(&inputs)?);
    let pre = layer_of(&config.norm_first(true), 1);
    let norm = NormConfig::new(Normalization::Layer, 6).init()?;
    let y = norm.forward(x.view())?;
    let normalized = inputs.with_arrays(y.view(), y.view(), y.view())?;
    assert_eq!(pre.attention_weights(&inputs)?, pre.inner().attention_weights(&normalized)?);

    // Their gradients, against central differences.
    let grad_weights = random::matrix(16, 2, 4);
    let loss = |x: &Array2<f64>| {
        let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
        (pre.attention_weights(&inputs).unwrap() * &grad_weights).sum()
    };
    let grads = pre.attention_weights_backward(&inputs, grad_weights.view())?.self_attention()?;
    for at in [(0, 0), (1, 3), (3, 5)] {
        let moved = |delta: f64| {
            let mut moved = x.clone();
            moved[at] += delta;
            loss(&moved)
        };
        let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!((numeric - grads[at]).abs() < 1e-8, "{numeric} {}", grads[at]);
    }
    Ok(())
}

#[test]
fn a_row_without_a_gradient_is_not_read() -> Result<()> {
    hold_simd();
    let mut x = random::matrix(4, 6, 3);
    let mut grad_out = random::matrix(4, 6, 4);
    x.row_mut(1).fill(f64::NAN);
    grad_out.row_mut(1).fill(0.0);
    // Nobody else reads it either.
    let mask = Array2::from_shape_fn((1, 4), |(_, key)| key != 1);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_mask(mask.view())?;
    for norm_first in [false, true] {
        let config = TransformerLayerConfig::new(6, 5).activation(Activation::Gelu);
        let layer = layer_of(&config.gated(true).norm_first(norm_first), 1);
        let (out, saved) = layer.forward_train(&inputs)?;
        assert!(out.row(1).iter().all(|y| y.is_nan()) && out.row(0).iter().all(|y| y.is_finite()));
        let grads = layer.backward(&inputs, &saved, grad_out.view())?;
        // In a pre-norm layer the gradients of `norm1` come through the attention, which reads the query.
        let of_sum = if norm_first { "norm2.weight" } else { "norm1.weight" };
        for name in ["linear1.weight", "linear2.weight", of_sum, "norm2.bias"] {
            let grad = grads.param(&layer, name)?;
            assert!(grad.iter().all(|grad| grad.is_finite()), "{name}, {norm_first}");
            assert!(grad.iter().any(|&grad| grad != 0.0), "{name}, {norm_first}");
        }
    }
    Ok(())
}

#[test]
fn bad_layers_and_inputs_are_refused() -> Result<()> {
    let rng = &mut random::rng(1);
    let mut init = |config: TransformerLayerConfig| config.init::<f64, _>(Flash::new(), rng);
    let config = TransformerLayerConfig::new;
    refused(init(config(0, 3)), "InvalidArgument | embed_dim | at least 1 | got 0");
    refused(init(config(3, 0)), "InvalidArgument | feedforward_dim | at least 1 | got 0");
    refused(init(config(3, usize::MAX).gated(true)), "TooLarge | weight");
    for epsilon in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(init(config(3, 3).epsilon(epsilon)), "InvalidArgument | epsilon | positive finite");
    }
    let state = params::state(&init(config(4, 3))?);
    let from = |config: TransformerLayerConfig| config.from_params(Flash::new(), state.clone());
    refused(from(config(4, 2)), "Shape | linear1.weight | [2, 4] | [3, 4]");
    refused(from(config(4, 3).bias(false)), "UnknownParam | linear1.bias");

    let (x, wide) = (random::matrix(3, 4, 1), random::matrix(3, 5, 1));
    let inputs = |q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>, layer: &Layer4| {
        layer.forward(&Inputs::dense(q.view(), k.view(), v.view()).unwrap())
    };
    type Layer4 = TransformerLayer<f64, Flash>;
    let post: Layer4 = init(config(4, 3))?;
    let pre: Layer4 = init(config(4, 3).norm_first(true))?;
    refused(inputs(&wide, &wide, &x, &post), "Shape | query | [3, 4] | [3, 5]");
    refused(inputs(&x, &x, &wide, &post), "Shape | inner output columns | [4] | [5]");
    refused(inputs(&x, &wide, &x, &pre), "Shape | key | [3, 4] | [3, 5]");
    refused(inputs(&x, &x, &wide, &pre), "Shape | value | [3, 4] | [3, 5]");
    let heads = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?;
    refused(post.forward(&heads), "Unsupported | transformer_layer | several heads");

    // The state of a layer with other options.
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let (out, saved) = post.forward_train(&inputs)?;
    refused(pre.backward(&inputs, &saved, out.view()), "SavedMismatch | norm_first: true");
    let gated = init(config(4, 3).gated(true))?;
    refused(gated.backward(&inputs, &saved, out.view()), "Shape | saved hidden values");

    let linear = LinearConfig::new(4, 2).init::<f64>(&mut random::rng(2))?;
    refused(linear.forward(wide.view()), "Shape | x | [3, 4] | [3, 5]");
    refused(linear.backward(x.view(), x.view()), "Shape | grad_out | [3, 2] | [3, 4]");
    refused(LinearConfig::new(0, 2).init::<f64>(&mut random::rng(2)), "InvalidArgument | inputs");
    let norm = NormConfig::new(Normalization::Rms, 4).init::<f64>()?;
    refused(norm.forward(wide.view()), "Shape | x | [3, 4] | [3, 5]");
    refused(norm.backward(x.view(), wide.view()), "Shape | grad_out | [3, 4] | [3, 5]");
    refused(NormConfig::new(Normalization::Rms, 0).init::<f64>(), "InvalidArgument | dim");
    Ok(())
}

#[test]
fn gradients_of_rows_are_derivatives() -> Result<()> {
    hold_simd();
    let (x, grad_out) = (random::matrix(3, 4, 1), random::matrix(3, 2, 2));
    let mut linear = LinearConfig::new(4, 2).init::<f64>(&mut random::rng(2))?;
    let grads = linear.backward(x.view(), grad_out.view())?;
    // Linear, so a step of any length gives the derivative.
    let loss = |linear: &graph_attention::Linear<f64>, x: &Array2<f64>| {
        (linear.forward(x.view()).unwrap() * &grad_out).sum()
    };
    let before = loss(&linear, &x);
    let direction = random::matrix(3, 4, 3);
    let expected = (&grads.x * &direction).sum();
    assert!((loss(&linear, &(&x + &direction)) - before - expected).abs() < 1e-12);
    let [weight, bias] = [random::matrix(2, 4, 4).into_dyn(), random::matrix(1, 2, 5).into_dyn()];
    let directions = [weight, bias.remove_axis(Axis(0))];
    let expected: f64 = grads.params.iter().zip(&directions).map(|(g, d)| (g * d).sum()).sum();
    let mut at = directions.iter();
    linear.visit_params_mut(&mut |_, mut param| param += at.next().unwrap());
    assert!((loss(&linear, &x) - before - expected).abs() < 1e-12);
    Ok(())
}

//! The answers of PyTorch's flex_attention, transformers' T5 and ONNX's reference implementation.

use crate::common::close::{assert_close, assert_close_in_size};
use crate::common::golden::{array, dynamic, size};
use crate::common::hold_simd;
use graph_attention::ndarray::{Array2, ArrayD};
use graph_attention::score::{Alibi, BucketBias, Buckets, ScoreFunction, Sinks, SoftCap};
use graph_attention::{Attention, Flash, Float, Inputs, ScaledDotProduct};
use serde_json::Value;

const HEADS: usize = 4;

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/score.json")).unwrap()
}

/// The score function of a case, with its parameters.
fn score<F: Float>(name: &str, params: &[ArrayD<F>]) -> Box<dyn ScoreFunction<F>> {
    let alibi = || Alibi::new(HEADS).unwrap().learned();
    let relative = |weight: &ArrayD<F>| {
        let weight = weight.clone().into_dimensionality().unwrap();
        BucketBias::from_weight(Buckets::t5(12, 20, true).unwrap(), weight).unwrap()
    };
    let sinks = |logits: &ArrayD<F>| {
        Sinks::from_logits(logits.clone().into_dimensionality().unwrap()).unwrap()
    };
    let cap = SoftCap::new(1.5).unwrap();
    match (name, params) {
        ("soft_cap", []) => Box::new(cap),
        ("alibi", [_]) => Box::new(alibi()),
        ("relative", [weight]) => Box::new(relative(weight)),
        ("sinks", [logits]) => Box::new(sinks(logits)),
        ("all", [_, weight, logits]) => {
            Box::new(((cap, alibi()), (relative(weight), sinks(logits))))
        }
        _ => panic!("unknown case {name}"),
    }
}

fn check_flex<F: Float>(tolerance: f64) {
    let golden = golden();
    let cases = golden["flex"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let list = |list: &Value| -> Vec<ArrayD<F>> {
            list.as_array().unwrap().iter().map(dynamic).collect()
        };
        let [query, key, value, grad_out, expected]: [Array2<F>; 5] =
            ["query", "key", "value", "grad_out", "out"].map(|name| array(&case[name]));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let inputs = inputs.with_heads(HEADS).unwrap();
        let score = score::<F>(name, &list(&case["params"]));
        let flash: Box<dyn Attention<F>> = Box::new(Flash::new().with_score(&*score));
        let plain: Box<dyn Attention<F>> = Box::new(ScaledDotProduct::new().with_score(&*score));
        for attention in [flash, plain] {
            let what = format!("{name}, {}", attention.name());
            let (out, saved) = attention.forward_train(&inputs).unwrap();
            assert_close(&what, tolerance, &out, &expected);
            let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
            let arrays = [grads.query, grads.key, grads.value].map(Array2::into_dyn);
            let all = arrays.iter().chain(&grads.params);
            let expected = list(&case["grads"]).into_iter().chain(list(&case["grad_params"]));
            for (number, (grad, expected)) in all.zip(expected).enumerate() {
                let what = format!("{what}, gradient {number}");
                assert_close_in_size(what, 10.0 * tolerance, 1e-3, grad, &expected);
            }
        }
    }
}

#[test]
fn flex_attention() {
    hold_simd();
    check_flex::<f64>(2e-15);
    check_flex::<f32>(1e-6);
}

#[test]
fn buckets_of_t5() {
    hold_simd();
    let golden = golden();
    for case in golden["t5"].as_array().unwrap() {
        let (count, max_distance) = (size(&case["count"]), size(&case["max_distance"]));
        let is_bidirectional = case["is_bidirectional"].as_bool().unwrap();
        let buckets = Buckets::t5(count, max_distance, is_bidirectional).unwrap();
        assert_eq!(buckets.count(), count);
        let list = |name: &str| -> Vec<i32> {
            case[name].as_array().unwrap().iter().map(|n| n.as_i64().unwrap() as i32).collect()
        };
        let (starts, of_start) = (list("distances"), list("buckets"));
        for distance in -1500..=1500 {
            let run = starts.partition_point(|&start| start <= distance) - 1;
            assert_eq!(
                buckets.of_distance(distance),
                Some(of_start[run] as usize),
                "distance {distance} of {count} buckets up to {max_distance}"
            );
        }
    }
}

#[test]
fn softcap_of_onnx_comes_before_the_mask() {
    hold_simd();
    let golden = golden();
    for case in golden["onnx"].as_array().unwrap() {
        let [query, key, value, expected]: [Array2<f64>; 4] =
            ["query", "key", "value", "out"].map(|name| array(&case[name]));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let mut inputs = inputs.with_heads(HEADS).unwrap();
        let bias: Option<Array2<f64>> = (!case["bias"].is_null()).then(|| array(&case["bias"]));
        if let Some(bias) = &bias {
            inputs = inputs.with_bias(bias.view()).unwrap();
        }
        let cap = SoftCap::new(case["cap"].as_f64().unwrap()).unwrap();
        let out = Flash::new().with_score(cap).forward(&inputs).unwrap();
        assert_close(format!("cap {}", case["cap"]), 2e-15, &out, &expected);
    }
}

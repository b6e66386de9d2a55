//! Arrays of the golden answers: `{"shape": [..], "data": [..]}`.

use graph_attention::Float;
use graph_attention::ndarray::{Array, ArrayD, Dimension, IxDyn};
use serde_json::Value;

pub(crate) fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// Of any number of axes. What JSON has no number for is written as text.
pub(crate) fn dynamic<F: Float>(value: &Value) -> ArrayD<F> {
    let shape: Vec<usize> = value["shape"].as_array().unwrap().iter().map(size).collect();
    let number = |n: &Value| n.as_f64().unwrap_or_else(|| n.as_str().unwrap().parse().unwrap());
    let data = value["data"].as_array().unwrap().iter().map(|n| F::from_f64(number(n))).collect();
    Array::from_shape_vec(IxDyn(&shape), data).unwrap()
}

pub(crate) fn array<F: Float, D: Dimension>(value: &Value) -> Array<F, D> {
    dynamic(value).into_dimensionality().unwrap()
}

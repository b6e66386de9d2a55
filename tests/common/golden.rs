//! Arrays of the golden data: `{"shape": [..], "data": [..]}`.

use graph_attention::Float;
use graph_attention::ndarray::{Array, ArrayD, Dimension, IxDyn};
use serde_json::Value;

pub(crate) fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// Reads an array with any number of axes. Infinities and NaN, which JSON has no numbers for, are strings.
pub(crate) fn dynamic<F: Float>(value: &Value) -> ArrayD<F> {
    let shape: Vec<usize> = value["shape"].as_array().unwrap().iter().map(size).collect();
    let number = |n: &Value| n.as_f64().unwrap_or_else(|| n.as_str().unwrap().parse().unwrap());
    let data = value["data"].as_array().unwrap().iter().map(|n| F::from_f64(number(n))).collect();
    Array::from_shape_vec(IxDyn(&shape), data).unwrap()
}

pub(crate) fn array<F: Float, D: Dimension>(value: &Value) -> Array<F, D> {
    dynamic(value).into_dimensionality().unwrap()
}

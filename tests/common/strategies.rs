//! Random problems for `proptest`, which shrinks those that fail.

use graph_attention::{Causal, ndarray::Array2};
use proptest::collection::vec;
use proptest::prelude::*;

/// Generates numbers of queries and keys, and edges between them in any order.
pub(crate) fn edge_lists() -> impl Strategy<Value = (usize, usize, Vec<(usize, usize)>)> {
    (1..12usize, 1..12usize).prop_flat_map(|(num_queries, num_keys)| {
        (Just(num_queries), Just(num_keys), vec((0..num_queries, 0..num_keys), 0..40))
    })
}

pub(crate) fn matrices(rows: usize, columns: usize) -> impl Strategy<Value = Array2<f64>> {
    vec(-2.0..2.0f64, rows * columns)
        .prop_map(move |data| Array2::from_shape_vec((rows, columns), data).unwrap())
}

/// Generates no causal pattern, or any.
pub(crate) fn causal_patterns() -> impl Strategy<Value = Option<Causal>> {
    prop_oneof![
        Just(None),
        Just(Some(Causal::TopLeft)),
        (0..40usize).prop_map(|offset| Some(Causal::Offset(offset))),
        Just(Some(Causal::BottomRight)),
    ]
}

/// Generates points of the Poincaré ball of curvature −c, at most `reach` of the way to its boundary; any
/// vectors if c = 0.
pub(crate) fn points(n: usize, c: f64, reach: f64) -> impl Strategy<Value = Vec<f64>> {
    let length = |x: &Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let directions =
        vec(-1.0..1.0f64, n).prop_filter("a direction", move |x: &Vec<f64>| length(x) > 0.1);
    (directions, 0.0..1.0f64).prop_map(move |(direction, part)| {
        let factor = reach * part / c.sqrt().max(0.5) / length(&direction);
        direction.iter().map(|x| x * factor).collect()
    })
}

//! Tests of tiles and rows at the edges of tiles and vectors, on every instruction set of the CPU and on
//! none, against the plain mechanism, which shares no kernel with them.

use super::dense::TileSizes;
use super::levels;
use super::normalizer::Normalizer;
use super::problem::{Problem, Rows, Upstream};
use crate::inputs::Pattern;
use crate::kernels::Float;
use crate::{Attention, Causal, Dropout, Gradients, Graph, Inputs, Result, ScaledDotProduct};
use approx::abs_diff_eq;
use ndarray::{Array1, Array2, ArrayView2, s};

const TILE: usize = 12;
/// A tile of whole rows, which are longer than the rows that are summed at a time.
const LONG_TILE: usize = 64;
/// More queries than two strips of `f64` have with AVX-512; the last strip is then a panel.
const STRIPS: usize = 72;

/// Entries between −1 and 1, different for all arrays.
fn matrix<F: Float>(rows: usize, columns: usize, seed: usize) -> Array2<F> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        F::from_f64((((i * 131 + j * 17 + seed * 71) * 2_654_435_761) % 2001) as f64 / 1000.0 - 1.0)
    })
}

/// Every second row and column, in reverse, of a matrix with NaN elsewhere.
fn scattered<F: Float>(matrix: &Array2<F>) -> Array2<F> {
    let (rows, columns) = matrix.dim();
    let mut around = Array2::from_elem((2 * rows, 2 * columns), F::nan());
    around.slice_mut(s![..;-2, ..;-2]).assign(matrix);
    around
}

fn assert_close<F: Float>(what: &str, case: &str, a: ArrayView2<'_, F>, b: ArrayView2<'_, F>) {
    assert_eq!(a.dim(), b.dim(), "{what}, {case}");
    let size = b.iter().fold(1.0, |size: f64, x| size.max(x.as_f64().abs()));
    let tolerance = 64.0 * F::epsilon().as_f64() * size;
    for (a, b) in a.iter().zip(b) {
        let is_close = abs_diff_eq!(a.as_f64(), b.as_f64(), epsilon = tolerance);
        assert!(is_close, "{what}, {case}: {a} for {b}");
    }
}

/// Outputs and gradients of both, on all instruction sets.
fn check<F: Float>(inputs: &Inputs<'_, F>, case: &str) -> Result<()> {
    let plain = ScaledDotProduct::new();
    let (expected, saved) = plain.forward_train(inputs)?;
    let grad_out = matrix(expected.nrows(), expected.ncols(), 9);
    let expected_grads = Attention::<F>::backward(&plain, inputs, &saved, grad_out.view())?;
    let problem = Problem::new(inputs, None)?;
    let is_dense = matches!(inputs.pattern(), Pattern::Dense);
    let tiles = match is_dense {
        true if inputs.num_queries() > 2 * TILE => vec![(TILE, TILE), (STRIPS, TILE)],
        true => vec![(TILE, TILE)],
        false => vec![(1, TILE), (1, LONG_TILE)],
    };
    for (level, (queries, keys)) in
        levels().into_iter().flat_map(|level| tiles.iter().map(move |&tile| (level, tile)))
    {
        let sizes = TileSizes { queries, keys };
        let case = &format!("{case}, {level:?}, tiles of {queries} x {keys}");
        let mut out = Array2::from_elem(expected.raw_dim(), F::nan());
        let nan = Array2::from_elem((inputs.num_queries(), inputs.num_heads()), F::nan());
        let mut normalizer = Normalizer { shift: nan.clone(), sum: nan };
        let mut grads = Gradients::zeros(inputs, &plain)?;
        if is_dense {
            F::dense_forward(&problem, sizes, level, out.view_mut(), &mut normalizer);
        } else {
            F::rows_forward(&problem, keys, level, out.view_mut(), &mut normalizer);
        }
        assert_close("out", case, out.view(), expected.view());
        let (out, grad_out) = (Rows::new("out", out.view())?, Rows::new("g", grad_out.view())?);
        let upstream = Upstream {
            out: out.slices(),
            normalizer: &normalizer,
            grad_out: grad_out.slices(),
            grad_log_sum_exp: None,
            grad_weights: None,
        };
        if is_dense {
            F::dense_backward(&problem, sizes, level, upstream, &mut grads.view_mut());
        } else {
            F::rows_backward(&problem, keys, level, upstream, &mut grads.view_mut());
        }
        for (what, actual, expected) in [
            ("query", &grads.query, &expected_grads.query),
            ("key", &grads.key, &expected_grads.key),
            ("value", &grads.value, &expected_grads.value),
        ] {
            assert_close(what, case, actual.view(), expected.view());
        }
        if let (Some(actual), Some(expected)) = (&grads.bias, &expected_grads.bias) {
            let [actual, expected] = [actual, expected].map(|bias| {
                let rows = bias.shape()[bias.ndim() - 1].max(1);
                bias.to_shape((bias.len() / rows, rows)).unwrap().into_owned()
            });
            assert_close("bias", case, actual.view(), expected.view());
        }
    }
    Ok(())
}

/// Every way of hiding, shifting and dropping pairs.
fn check_all<F: Float>(inputs: &Inputs<'_, F>, case: &str) -> Result<()> {
    let (num_queries, num_keys) = (inputs.num_queries(), inputs.num_keys());
    let mut bias = matrix::<F>(num_queries, num_keys, 5);
    bias.indexed_iter_mut().filter(|((i, j), _)| (i * 5 + j * 3) % 7 == 0).for_each(|(_, bias)| {
        *bias = F::neg_infinity();
    });
    let scattered_bias = scattered(&bias);
    let of_heads = matrix(inputs.num_pairs(), inputs.num_heads(), 6);
    let of_heads_bias = of_heads.clone();
    let mask = Array2::from_shape_fn((num_queries, num_keys), |(i, j)| (i + 2 * j) % 3 != 0);
    let transposed_mask = mask.t().to_owned();
    let dropout = Dropout { probability: 0.3, seed: 4 };
    check(inputs, case)?;
    let causal = inputs.with_causal_alignment(Causal::BottomRight).with_mask(mask.view())?;
    check(&causal, &format!("{case}, causal and masked"))?;
    let masked = inputs.with_mask(transposed_mask.t())?.with_dropout(dropout)?;
    check(&masked, &format!("{case}, mask of columns, dropout"))?;
    let of_heads = inputs.with_bias(of_heads.view())?;
    check(&of_heads.with_causal(), &format!("{case}, causal, bias of heads"))?;
    let heads = inputs.num_heads();
    for shape in [(heads, num_queries, num_keys), (heads, 1, num_keys), (1, num_queries, 1)] {
        let bias = matrix::<F>(shape.0, shape.1 * shape.2, 8);
        let bias = bias.into_shape_with_order(shape).unwrap();
        let grid = inputs.with_bias(bias.view())?.with_dropout(dropout)?;
        check(&grid, &format!("{case}, bias {shape:?}"))?;
        let mask = bias.mapv(|x| x > F::from_f64(-0.3));
        let grid = inputs.with_mask(mask.view())?.with_causal();
        check(&grid, &format!("{case}, mask {shape:?}"))?;
    }
    // Whole tiles are hidden, from all strips and from some.
    for rows in [TILE, 5, 33] {
        let blocks = Array2::from_shape_fn((num_queries, num_keys), |(i, j)| {
            (i / rows + j / TILE).is_multiple_of(2)
        });
        let masked = inputs.with_mask(blocks.view())?;
        check(&masked, &format!("{case}, mask of blocks of {rows}"))?;
        let of_heads = masked.with_bias(of_heads_bias.view())?;
        check(&of_heads, &format!("{case}, mask of blocks of {rows}, bias of heads"))?;
    }
    let pair_mask = Array1::from_shape_fn(inputs.num_pairs(), |pair| pair % 3 != 1);
    let pairs = inputs.with_pair_mask(pair_mask.view())?.with_mask(mask.view())?;
    check(&pairs, &format!("{case}, mask of pairs"))?;
    if matches!(inputs.pattern(), Pattern::Dense) {
        check(&inputs.with_bias(bias.view())?.with_causal(), &format!("{case}, causal, bias"))?;
        let strided = inputs.with_bias(scattered_bias.slice(s![..;-2, ..;-2]))?;
        check(&strided.with_dropout(dropout)?, &format!("{case}, strided bias, dropout"))?;
        check(&inputs.with_window([2, 2]), &format!("{case}, window"))?;
        check(&inputs.with_window([1, 4]), &format!("{case}, window to the right"))?;
        check(
            &inputs.with_window([3, 3]).with_mask(mask.view())?,
            &format!("{case}, masked window"),
        )?;
    }
    Ok(())
}

fn check_sizes<F: Float>() -> Result<()> {
    let sizes = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5];
    let num_queries = [&sizes[..], &[STRIPS - 3]].concat();
    // Heads of the queries, of keys and values; columns of both.
    let heads = [
        (1, 1, 1, 1),
        (1, 1, 16, 7),
        (2, 2, 5, 17),
        (4, 2, 3, 2),
        (3, 1, 33, 1),
        (4, 4, 9, 5),
        (8, 8, 20, 3),
        (8, 4, 2, 17),
        (16, 16, 1, 8),
    ];
    for (number, (num_queries, num_keys)) in
        num_queries.iter().flat_map(|&q| sizes.iter().map(move |&k| (q, k))).enumerate()
    {
        let (heads, kv_heads, dim, value_dim) = heads[number % heads.len()];
        let q = scattered(&matrix::<F>(num_queries, heads * dim, 1));
        let k = scattered(&matrix::<F>(num_keys, kv_heads * dim, 2));
        let v = matrix::<F>(num_keys, kv_heads * value_dim, 3);
        let (q, k) = (q.slice(s![..;-2, ..;-2]), k.slice(s![..;-2, ..;-2]));
        let shape =
            format!("{num_queries} x {num_keys}, {heads} x {dim}, {kv_heads} x {value_dim}");
        let dense = Inputs::dense(q, k, v.view())?.with_grouped_heads(heads, kv_heads)?;
        check_all(&dense, &format!("dense {shape}"))?;
        // Unequal rows, some empty, some with the same key twice, in no order.
        let edges = (0..9 * num_queries * num_keys.min(1)).map(|edge| {
            let query = edge * 7 % num_queries;
            (query - query % 3, edge * 5 % num_keys)
        });
        let graph = Graph::from_edges(num_queries, num_keys, edges)?;
        let graph = Inputs::graph(q, k, v.view(), &graph)?.with_grouped_heads(heads, kv_heads)?;
        check_all(&graph, &format!("graph {shape}"))?;
    }
    Ok(())
}

#[test]
fn tiles_and_rows_are_the_plain_mechanism_at_every_edge() -> Result<()> {
    check_sizes::<f32>()?;
    check_sizes::<f64>()
}

/// Keys of −∞ hide themselves. A gradient of 0 times such a key would be NaN.
fn check_infinite_keys<F: Float>() -> Result<()> {
    for (heads, kv_heads) in [(1, 1), (4, 4), (8, 4), (16, 16)] {
        let mut q = matrix::<F>(9, heads * 5, 1);
        let mut k = matrix::<F>(9, kv_heads * 5, 2);
        let v = matrix::<F>(9, kv_heads * 3, 3);
        q.row_mut(4).fill(F::one());
        k.slice_mut(s![..2, ..]).fill(F::neg_infinity());
        // Query 4 sees only these keys, the others do not see them.
        let edges = [(4, 0), (4, 1)].into_iter().chain(
            (0..9)
                .filter(|&query| query != 4)
                .flat_map(|query| (2..9).map(move |key| (query, key))),
        );
        let graph = Graph::from_edges(9, 9, edges)?;
        let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph)?;
        let inputs = inputs.with_grouped_heads(heads, kv_heads)?;
        check(&inputs, &format!("infinite keys, {heads} heads, {kv_heads} of keys"))?;
    }
    Ok(())
}

#[test]
fn a_query_that_sees_only_infinite_keys_has_no_gradient() -> Result<()> {
    check_infinite_keys::<f32>()?;
    check_infinite_keys::<f64>()
}

//! The forward pass.

use super::super::exp2::exp2;
use super::super::heads::Columns;
use super::super::matmul::Vector;
use super::super::problem::{FiniteRows, Problem};
use super::{Others, Pairs, Part, Tile, add_bad, for_each_part, level_for, scale_row};
use crate::float::Float;
use crate::inputs::{Pattern, head_columns};
use crate::partial::Partial;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array2, ArrayView1, ArrayViewMut2, Axis};
use std::f64::consts::{LN_2, LOG2_E};

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(crate) fn forward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let inputs = &problem.inputs;
    let (num_queries, num_keys) = (inputs.num_queries(), inputs.num_keys());
    let pairs = match inputs.pattern() {
        Pattern::Dense => Pairs::Dense { num_queries, num_keys },
        Pattern::Graph(graph) => Pairs::ByQuery(graph),
    };
    let tile_len = pairs.tile_len(tile_len);
    // Mask and causal pattern hide pairs before they come here; a bias does so head by head.
    let may_hide = problem.bias.is_some();
    let values = FiniteRows::new(problem.value.slices(), may_hide);
    let level = level_for::<F>(level, [problem.key_dim, problem.value_dim]);
    for_each_part(
        pairs,
        problem.work(),
        [out, log_sum_exp.view_mut()],
        None,
        |part, outs, _| {
            dispatch!(level, simd => {
                forward_rows(simd, problem, &values, tile_len, pairs, part, outs);
            });
        },
        |[mut out, mut log_sums], [outs, log_sums_of]| {
            let partials = outs.rows().into_iter().zip(log_sums_of.rows()).map(|(out, sums)| {
                let [out, sums] = [out, sums].map(|row| row.insert_axis(Axis(0)).to_owned());
                Partial::new(out, sums).expect("both have one row")
            });
            let merge = |a: Partial<F>, b| a.merge(&b).expect("segments have the same shape");
            if let Some(whole) = partials.reduce(merge) {
                out.assign(&whole.out().row(0));
                log_sums.assign(&whole.log_sum_exp().row(0));
            }
        },
    );
}

#[inline(always)]
fn forward_rows<S: Simd, F: Float>(
    simd: S,
    problem: &Problem<'_, F>,
    values: &FiniteRows<'_, F>,
    tile_len: usize,
    pairs: Pairs<'_>,
    part: &Part,
    [mut out, mut log_sum_exp]: [ArrayViewMut2<'_, F>; 2],
) {
    let (heads, key_dim, dim) = (problem.heads, problem.key_dim, problem.value_dim);
    let factor = problem.scale * F::of(LOG2_E);
    let keys = Others { rows: problem.key.slices(), are_keys: true };
    let values_of = Others { rows: values.slices(), are_keys: true };
    let columns = |dim: usize| {
        Columns::new(simd, heads, dim, |head| [head * dim, problem.kv_head(head) * dim])
    };
    let (mut key_columns, value_columns) = (columns(key_dim), columns(dim));
    let mut tile = Tile::new(simd, heads, tile_len);
    let mut scaled_query = vec![F::zero(); heads * key_dim];
    let mut maxima = vec![F::zero(); heads];
    let mut alphas = vec![F::zero(); heads];
    let mut sums = vec![F::zero(); heads];
    let mut row_out = vec![F::zero(); heads * dim];
    for (r, mut row) in part.rows(pairs).enumerate() {
        scale_row(factor, problem.query.row(row.row), &mut scaled_query);
        maxima.fill(F::neg_infinity());
        sums.fill(F::zero());
        row_out.fill(F::zero());

        while tile.fill(problem, &mut row, [keys.rows, values_of.rows]) {
            tile.score(simd, problem, &mut key_columns, &scaled_query, keys);
            for head in 0..heads {
                let [pairs, vectors] = tile.of_head(simd, head);
                let logits = &mut tile.weights[vectors];
                let old_max = maxima[head];
                let max = largest(simd, old_max, logits);
                // Before the first key there is no maximum to shift by, and nothing to rescale.
                let shift = if max == F::neg_infinity() { F::zero() } else { max };
                alphas[head] = match old_max {
                    _ if old_max == max => F::one(),
                    _ if old_max == F::neg_infinity() => F::zero(),
                    _ => (old_max - shift).exp2(),
                };
                maxima[head] = max;
                let sum = exponentials(simd, logits, shift);
                sums[head] = sums[head] * alphas[head] + sum;

                if let Some(dropout) = problem.dropout {
                    for (weight, pair) in tile.weights[pairs].iter_mut().zip(&tile.pairs) {
                        *weight *= dropout.multiplier::<F>(pair.index, head);
                    }
                }
            }
            let value = |t: usize| values_of.row(&tile.pairs[t]);
            value_columns.add_weighted(simd, &mut row_out, tile.weights(&alphas), value);
            for head in (0..heads).filter(|_| !values.bad.is_empty()) {
                let row_out = &mut row_out[head_columns(head, dim)];
                let weights = &tile.weights[head * tile.stride..];
                add_bad(problem, &tile, weights, head, values, row_out, |pair| {
                    (pair.key, problem.value(pair.key, head), true)
                });
            }
        }

        for head in 0..heads {
            // Nothing seen: not even 0/0.
            let is_empty = sums[head] == F::zero();
            let factor = F::one() / sums[head];
            for value in &mut row_out[head_columns(head, dim)] {
                *value = if is_empty { F::zero() } else { *value * factor };
            }
            let log_sum = maxima[head] * F::of(LN_2) + sums[head].ln();
            log_sum_exp[[r, head]] = if is_empty { F::neg_infinity() } else { log_sum };
        }
        out.row_mut(r).assign(&ArrayView1::from(&row_out));
    }
}

/// The largest of `max` and some logits, NaN left out. Whole vectors.
#[inline(always)]
fn largest<S: Simd, F: Float>(simd: S, max: F, logits: &[F]) -> F {
    let mut maxima = Vector::<S, F>::splat(simd, max);
    for logits in logits.chunks_exact(Vector::<S, F>::LEN) {
        let logits = Vector::<S, F>::from_slice(simd, logits);
        maxima = logits.simd_gt(maxima).select(logits, maxima);
    }
    maxima.reduce_max()
}

/// Replaces logits by 2^(logit − shift) and returns their sum. Whole vectors.
#[inline(always)]
fn exponentials<S: Simd, F: Float>(simd: S, logits: &mut [F], shift: F) -> F {
    let shift = Vector::<S, F>::splat(simd, shift);
    let mut sum = Vector::<S, F>::splat(simd, F::zero());
    for logits in logits.chunks_exact_mut(Vector::<S, F>::LEN) {
        let weights = exp2::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits) - shift);
        sum += weights;
        weights.store_slice(logits);
    }
    sum.reduce_sum()
}

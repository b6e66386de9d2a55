//! The forward pass.

use super::super::exp2::exp2;
use super::super::heads::Columns;
use super::super::matmul::Vector;
use super::super::problem::FiniteRows;
use super::{Outputs, Pairs, Part, Scorer, Tile, add_bad, for_each_part, level_for, parts};
use crate::float::Float;
use crate::inputs::head_columns;
use crate::partial::Partial;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array2, ArrayView1, ArrayViewMut2, Axis};
use std::f64::consts::LN_2;

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(in super::super) fn forward<'p, F: Float, C: Scorer<'p, F>>(
    problem: &'p C::Problem,
    tile_len: usize,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let softmax = C::softmax(problem);
    let pairs = Pairs::by_query(&softmax.inputs);
    let tile_len = pairs.tile_len(tile_len);
    // Mask and causal pattern hide pairs before they come here; a bias does so head by head.
    let may_hide = softmax.bias.is_some();
    let values = FiniteRows::new(softmax.value.slices(), may_hide);
    let level = level_for::<F>(level, [softmax.key_dim, softmax.value_dim]);
    let parts = parts(pairs);
    for_each_part(
        &parts,
        softmax.work(),
        Outputs::by_row([out, log_sum_exp.view_mut()], &parts),
        |part, outputs| {
            dispatch!(level, simd => {
                forward_rows::<_, _, C>(simd, problem, &values, tile_len, pairs, part, outputs);
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
fn forward_rows<'p, S: Simd, F: Float, C: Scorer<'p, F>>(
    simd: S,
    problem: &'p C::Problem,
    values: &FiniteRows<'_, F>,
    tile_len: usize,
    pairs: Pairs<'_>,
    part: &Part,
    outputs: Outputs<'_, F, 2, 0>,
) {
    let [mut out, mut log_sum_exp] = outputs.by_row;
    let softmax = C::softmax(problem);
    let (heads, dim) = (softmax.heads, softmax.value_dim);
    let columns = Columns::new(simd, heads, dim, |head| [head * dim, softmax.kv_head(head) * dim]);
    let mut tile = Tile::new(simd, heads, tile_len);
    let mut scorer = C::new(simd, problem, &tile);
    let mut maxima = vec![F::zero(); heads];
    let mut alphas = vec![F::zero(); heads];
    let mut sums = vec![F::zero(); heads];
    let mut row_out = vec![F::zero(); heads * dim];
    for (r, mut row) in part.rows(pairs).enumerate() {
        scorer.begin(simd, row.row);
        maxima.fill(F::neg_infinity());
        sums.fill(F::zero());
        row_out.fill(F::zero());

        while tile.fill(softmax, &mut row, [softmax.key.slices(), values.slices()]) {
            scorer.score(simd, &mut tile);
            tile.add_bias(simd, softmax);
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

                if softmax.has_dropout() {
                    for (weight, &pair) in tile.weights[pairs].iter_mut().zip(&tile.pairs) {
                        *weight *= softmax.multiplier(pair, head);
                    }
                }
            }
            let rows = tile.gather(values.slices());
            columns.add_weighted(simd, &mut row_out, tile.weights(&alphas), rows);
            scorer.add_values(simd, &tile, &alphas);
            for head in (0..heads).filter(|_| !values.bad.is_empty()) {
                let row_out = &mut row_out[head_columns(head, dim)];
                let weights = &tile.weights[head * tile.stride..];
                add_bad(softmax, &tile, weights, head, values, row_out, |pair| {
                    (pair.key, softmax.value(pair.key, head), true)
                });
            }
        }

        scorer.finish(simd, &mut row_out);
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

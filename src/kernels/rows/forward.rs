//! The forward pass.

use super::super::dense::SLACK;
use super::super::gathered::Columns;
use super::super::normalizer::{self, Normalizer};
use super::super::primitives::compensated;
use super::super::primitives::exp::exp;
use super::super::primitives::matmul::Vector;
use super::super::problem::{FiniteRows, Problem};
use super::super::score::ScoredRow;
use super::lanes::Lanes;
use super::{
    DotScorer, Outputs, Pairs, Part, Scorer, Tile, add_bad, for_each_part, level_for, parts,
};
use crate::inputs::head_columns;
use crate::kernels::Float;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};

/// [`forward`] with the logits of scaled dot-product attention.
pub(in super::super) fn dot_forward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    normalizer: &mut Normalizer<F>,
) {
    match Lanes::new(problem, level) {
        Some(lanes) => lanes.forward(tile_len, out, normalizer),
        None => forward::<_, DotScorer<'_, _>>(problem, tile_len, level, out, normalizer),
    }
}

/// Overwrites `out` and the normalizer.
pub(in super::super) fn forward<'p, F: Float, C: Scorer<'p, F>>(
    problem: &'p C::Problem,
    tile_len: usize,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    normalizer: &mut Normalizer<F>,
) {
    let softmax = C::softmax(problem);
    let pairs = Pairs::by_query(&softmax.inputs);
    let tile_len = pairs.tile_len(tile_len);
    // Pairs hidden by mask and causal pattern are already skipped; a bias hides them head by head.
    let may_hide = softmax.bias.is_some();
    let values = FiniteRows::new(softmax.value.slices(), may_hide);
    let level = level_for::<F>(level, [softmax.key_dim, softmax.value_dim]);
    let parts = parts(pairs);
    let Normalizer { shift, sum } = normalizer;
    for_each_part(
        &parts,
        softmax.work(),
        Outputs::by_row([out, shift.view_mut(), sum.view_mut()], &parts),
        |part, outputs| {
            forward_rows::<_, C>(level, problem, &values, tile_len, pairs, part, outputs);
        },
        |row, segments| merge_segments(softmax, row, segments),
    );
}

/// Merges the outputs, shifts and sums of the segments of a long row into the row.
pub(super) fn merge_segments<F: Float>(
    softmax: &Problem<'_, F>,
    [mut out, mut shift, mut sum]: [ArrayViewMut1<'_, F>; 3],
    [outs, shifts, sums]: [ArrayView2<'_, F>; 3],
) {
    for head in 0..softmax.heads {
        let columns = head_columns(head, softmax.value_dim);
        let of_segment = |segment| normalizer::Part {
            out: outs.slice_move(s![segment, columns.clone()]),
            shift: shifts[[segment, head]],
            sum: sums[[segment, head]],
        };
        let segments: Vec<_> = (0..outs.nrows()).map(of_segment).collect();
        let out = out.slice_mut(s![columns.clone()]);
        [shift[head], sum[head]] = normalizer::merge(&segments, out);
    }
}

fn forward_rows<'p, F: Float, C: Scorer<'p, F>>(
    level: Level,
    problem: &'p C::Problem,
    values: &FiniteRows<'_, F>,
    tile_len: usize,
    pairs: Pairs<'_>,
    part: &Part,
    outputs: Outputs<'_, F, 3, 0>,
) {
    let [mut out, mut shift_out, mut sum_out] = outputs.by_row;
    let softmax = C::softmax(problem);
    let (heads, dim) = (softmax.heads, softmax.value_dim);
    let columns = Columns::new(level, heads, dim, |head| [head * dim, softmax.kv_head(head) * dim]);
    let mut tile = Tile::new(level, heads, tile_len);
    let mut scorer = C::new(level, problem, &tile);
    let mut scored = ScoredRow::default();
    // m of each head, the factors of the previous sums, and l = Σ e^{s − m}. A single query over few keys takes less
    // time than a dozen allocations: one for all of them.
    let mut of_row = vec![F::one(); 3 * heads];
    let (maxima, of_row) = of_row.split_at_mut(heads);
    let (alphas, sums) = of_row.split_at_mut(heads);
    // Σ e^{s − m} v, where the output is not contiguous.
    let mut copy = Vec::new();
    // Both kinds of sums over the last tile, and the rounding errors of the sums, if a row has several tiles.
    let [mut of_tile, mut lacks] = [Vec::new(), Vec::new()];
    for (r, mut row) in part.rows(pairs).enumerate() {
        let mut row_out = out.row_mut(r);
        let values_of_row = match row_out.as_slice_mut() {
            Some(row_out) => row_out,
            None => {
                copy.resize(heads * dim, F::zero());
                &mut copy
            }
        };
        scorer.begin(row.row);
        maxima.fill(F::neg_infinity());
        let mut is_first = true;

        while tile.fill(softmax, &mut row, &[softmax.key.slices(), values.slices()]) {
            scorer.score(&mut tile);
            tile.apply_score(softmax, true, &mut scored);
            tile.add_bias(softmax);
            let (values_of, sums_of) = if is_first {
                lacks.clear();
                (&mut *values_of_row, &mut *sums)
            } else {
                of_tile.resize(heads * (dim + 1), F::zero());
                lacks.resize(heads * (dim + 1), F::zero());
                of_tile.split_at_mut(heads * dim)
            };
            exponentials(&mut tile, maxima, alphas, sums_of);
            tile.load_multipliers(softmax);
            tile.multiply_weights();
            columns.add_weighted(values_of, tile.weights(None), tile.gather(values.slices()));
            scorer.add_values(&tile, alphas);
            for head in (0..heads).filter(|_| !values.bad.is_empty()) {
                let values_of = &mut values_of[head_columns(head, dim)];
                let weights = &tile.weights[head * tile.stride..];
                add_bad(softmax, &tile, weights, head, values, values_of, |pair| {
                    (pair.key, softmax.value(pair.key, head), true)
                });
            }
            if !is_first {
                let sums = values_of_row.iter_mut().chain(sums.iter_mut());
                let alpha = |at: usize| match at.checked_sub(heads * dim) {
                    Some(head) => alphas[head],
                    None => alphas[at / dim],
                };
                add_tile(sums, &mut lacks, &of_tile, alpha);
            }
            is_first = false;
        }

        if is_first {
            sums.fill(F::zero());
        }
        scorer.finish(values_of_row);
        divide(level, values_of_row, dim, sums);
        if row_out.as_slice().is_none() {
            row_out.assign(&ArrayView1::from(&copy));
        }
        for ((shift, &max), &sum) in shift_out.row_mut(r).iter_mut().zip(&*maxima).zip(&*sums) {
            *shift = if sum == F::zero() { F::neg_infinity() } else { max };
        }
        sum_out.row_mut(r).iter_mut().zip(&*sums).for_each(|(out, &sum)| *out = sum);
    }
}

/// Divides the sums of each head, `dim` columns, by the sum of its weights.
#[inline(never)]
fn divide<F: Float>(level: Level, values: &mut [F], dim: usize, sums: &[F]) {
    dispatch!(level, _simd => {
        for (values, &sum) in values.chunks_exact_mut(dim.max(1)).zip(sums) {
            // Nothing seen: zeros, whatever was there before.
            let is_empty = sum == F::zero();
            let factor = F::one() / sum;
            for value in values {
                *value = if is_empty { F::zero() } else { *value * factor };
            }
        }
    });
}

/// sums ← α · sums + the sums of a tile, with compensation. `alpha` returns the factor of each sum.
#[inline(never)]
pub(super) fn add_tile<'s, F: Float>(
    sums: impl Iterator<Item = &'s mut F>,
    lacks: &mut [F],
    of_tile: &[F],
    alpha: impl Fn(usize) -> F,
) {
    for (at, ((sum, lack), &of_tile)) in sums.zip(lacks).zip(of_tile).enumerate() {
        compensated::add(sum, lack, alpha(at), of_tile);
    }
}

/// Replaces the logits s of a tile by e^{s − m}. The maxima m are raised if the logits exceed them by
/// more than the slack. Overwrites the factors of the previous sums, and the sums of the exponentials.
#[inline(never)]
fn exponentials<F: Float>(tile: &mut Tile<F>, maxima: &mut [F], alphas: &mut [F], sums: &mut [F]) {
    dispatch!(tile.level, simd => {
        // Step by step for all heads: their chains of dependent instructions run side by side.
        for (head, max) in alphas.iter_mut().enumerate() {
            let [_, vectors] = tile.of_head(head);
            *max = largest(simd, maxima[head], &tile.weights[vectors]);
        }
        for (alpha, old_max) in alphas.iter_mut().zip(&mut *maxima) {
            let max = if *alpha > *old_max + F::from_f64(SLACK) { *alpha } else { *old_max };
            *alpha = match *old_max {
                _ if *old_max == max => F::one(),
                // Before the first key there is nothing to rescale.
                _ if *old_max == F::neg_infinity() => F::zero(),
                _ => (*old_max - max).exp(),
            };
            *old_max = max;
        }
        for (head, (sum, &max)) in sums.iter_mut().zip(&*maxima).enumerate() {
            let [_, vectors] = tile.of_head(head);
            // Before the first key there is no maximum.
            let shift = if max == F::neg_infinity() { F::zero() } else { max };
            *sum = exponentials_of(simd, &mut tile.weights[vectors], shift);
        }
    });
}

/// Returns the largest of `max` and some logits, ignoring NaN. In whole vectors.
#[inline(always)]
fn largest<S: Simd, F: Float>(simd: S, max: F, logits: &[F]) -> F {
    let mut maxima = Vector::<S, F>::splat(simd, max);
    for logits in logits.chunks_exact(Vector::<S, F>::LEN) {
        let logits = Vector::<S, F>::from_slice(simd, logits);
        maxima = logits.simd_gt(maxima).select(logits, maxima);
    }
    maxima.reduce_max()
}

/// Replaces logits by e^{logit − shift} and returns their sum. In whole vectors.
#[inline(always)]
fn exponentials_of<S: Simd, F: Float>(simd: S, logits: &mut [F], shift: F) -> F {
    /// The number of vectors that are summed from zero: small terms added one by one to a large sum would
    /// be lost.
    const VECTORS_OF_SUM: usize = 8;
    let len = Vector::<S, F>::LEN;
    let shift = Vector::<S, F>::splat(simd, shift);
    let mut sum = Vector::<S, F>::splat(simd, F::zero());
    for logits in logits.chunks_mut(VECTORS_OF_SUM * len) {
        let mut of_block = Vector::<S, F>::splat(simd, F::zero());
        for logits in logits.chunks_exact_mut(len) {
            let weights = exp::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits) - shift);
            of_block += weights;
            weights.store_slice(logits);
        }
        sum += of_block;
    }
    sum.reduce_sum()
}

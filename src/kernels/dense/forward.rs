use super::{Block, HeadRows, PARTS, TileScorer, TileSizes, block, clip};
use crate::float::Float;
use crate::inputs::head_columns;
use crate::kernels::buffer::Buffer;
use crate::kernels::exp2::exp2;
use crate::kernels::matmul::{
    Matrix, Out, Target, Vector, columns_times, load, panel_width, splat, store,
};
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use crate::kernels::problem::FiniteRows;
use crate::kernels::transpose::{store_part, transposed};
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array2, ArrayViewMut2, s};
use std::f64::consts::LN_2;
use std::ops::Range;

/// Buffers of a forward pass over one block after the other.
struct ForwardScratch<F> {
    /// keys × width.
    scores: Buffer<F>,
    /// value_dim × width.
    out: Buffer<F>,
    maxima: Buffer<F>,
    sums: Buffer<F>,
    /// What rescales the outputs of a panel.
    alphas: Buffer<F>,
    /// For what is added to scores, and multiplies weights.
    rows: Vec<F>,
}

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(in super::super) fn forward<'p, F: Float, C: TileScorer<'p, F>>(
    whole: &'p C::Problem,
    sizes: TileSizes,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let problem = C::softmax(whole);
    let sizes = clip(problem, sizes);
    let values = FiniteRows::new(problem.value.slices(), problem.may_hide());
    let parts = parts(problem.inputs.num_queries(), sizes.queries, 4 * PARTS);
    let outs = row_chunks(out, parts.iter().map(Range::len));
    let log_sums = row_chunks(log_sum_exp.view_mut(), parts.iter().map(Range::len));
    let tasks = parts.iter().cloned().zip(outs).zip(log_sums).collect();
    parallel::for_each(tasks, problem.work(), |((queries, out), log_sum)| {
        dispatch!(level, simd => {
            forward_part::<_, _, C>(simd, whole, &values, sizes, queries, out, log_sum);
        });
    });
}

#[inline(always)]
fn forward_part<'p, S: Simd, F: Float, C: TileScorer<'p, F>>(
    simd: S,
    whole: &'p C::Problem,
    values: &FiniteRows<'_, F>,
    sizes: TileSizes,
    queries: Range<usize>,
    mut out: ArrayViewMut2<'_, F>,
    mut log_sum_exp: ArrayViewMut2<'_, F>,
) {
    let problem = C::softmax(whole);
    let width = sizes.queries.next_multiple_of(panel_width::<S, F>());
    let mut scorer = C::new(simd, whole, width);
    let mut scratch = ForwardScratch {
        scores: Buffer::zeros(sizes.keys * width),
        out: Buffer::zeros(problem.value_dim * width),
        maxima: Buffer::zeros(width),
        sums: Buffer::zeros(width),
        alphas: Buffer::zeros(panel_width::<S, F>()),
        rows: Vec::new(),
    };
    for rows in ranges(queries.len(), sizes.queries) {
        for head in 0..problem.heads {
            let block = block::<S, F>(problem, head, &queries, &rows);
            simd.vectorize(
                #[inline(always)]
                || forward_block(simd, &block, &mut scorer, values, sizes.keys, &mut scratch),
            );
            let dim = problem.value_dim;
            let out = out.slice_mut(s![rows.clone(), head_columns(head, dim)]);
            write_out(simd, &scratch, block.width, out);
            for lane in 0..rows.len() {
                let (max, sum) = (scratch.maxima[lane], scratch.sums[lane]);
                let is_empty = sum == F::zero();
                let log_sum =
                    if is_empty { F::neg_infinity() } else { max * F::of(LN_2) + sum.ln() };
                log_sum_exp[[rows.start + lane, head]] = log_sum;
            }
        }
    }
}

/// Divides the outputs by the sums, and gives each query its row.
#[inline(never)]
fn write_out<S: Simd, F: Float>(
    simd: S,
    scratch: &ForwardScratch<F>,
    width: usize,
    mut out: ArrayViewMut2<'_, F>,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let len = Vector::<S, F>::LEN;
            let at =
                |data: &[F], place: usize| Vector::<S, F>::from_slice(simd, &data[place..][..len]);
            let zero = Vector::<S, F>::splat(simd, F::zero());
            let one = Vector::<S, F>::splat(simd, F::one());
            let (num_queries, dim) = out.dim();
            transposed::<S, F>(
                simd,
                dim,
                num_queries,
                #[inline(always)]
                |column, lane| {
                    let sum = at(&scratch.sums, lane);
                    let mean = at(&scratch.out, column * width + lane) * (one / sum);
                    // Nothing seen: not even 0/0.
                    sum.simd_eq(zero).select(zero, mean)
                },
                #[inline(always)]
                |lane, column, entries| {
                    let mut row = out.row_mut(lane);
                    match row.as_slice_mut() {
                        Some(row) => store_part::<S, F>(entries, &mut row[column..]),
                        None => (row.iter_mut().skip(column).zip(entries.as_slice()))
                            .for_each(|(value, &entry)| *value = entry),
                    }
                },
            );
        },
    );
}

/// Leaves the outputs times the sums, the sums and the maxima in `scratch`.
#[inline(always)]
fn forward_block<'p, S: Simd, F: Float, C: TileScorer<'p, F>>(
    simd: S,
    block: &Block<'_, '_, F>,
    scorer: &mut C,
    values: &FiniteRows<'_, F>,
    keys_per_tile: usize,
    scratch: &mut ForwardScratch<F>,
) {
    let Block { problem, head, width, .. } = *block;
    let panel = panel_width::<S, F>();
    let kv_head = problem.kv_head(head);
    let values_of_head = HeadRows::new(values.slices(), kv_head, problem.value_dim);
    scorer.begin(simd, block);
    scratch.maxima.fill(F::neg_infinity());
    scratch.sums.fill(F::zero());
    scratch.out.fill(F::zero());

    for tile in block.tiles(keys_per_tile) {
        for column in (0..width).step_by(panel) {
            // Causal pattern and window hide the ends of a tile from whole panels.
            let lanes = block.lanes(column, panel);
            let visible = block.visible_keys(&lanes);
            let tile = tile.start.max(visible.start)..tile.end.min(visible.end);
            if tile.is_empty() {
                continue;
            }
            let scores = &mut scratch.scores[..tile.len() * width];
            let may_hide = block.may_hide_in(&lanes, &tile);

            // S, m' = max(m, max S)
            let old_max = load::<S, F>(simd, &scratch.maxima[column..]);
            let mut max = scorer.score(simd, block, &tile, column, old_max, scores);
            if may_hide {
                block.restrict(simd, lanes.clone(), &tile, scores, &mut scratch.rows);
                max = old_max;
                for scores in scores.chunks_exact(width) {
                    let score = load::<S, F>(simd, &scores[column..]);
                    max = [max[0].max(score[0]), max[1].max(score[1])];
                }
            }
            store::<S, F>(max, &mut scratch.maxima[column..]);

            // α = e^{m − m'}, P = e^{S − m'}, l ← α l + Σ P. Where there is no maximum yet the
            // shift is 0: −∞ − (−∞) never arises.
            let [zero, _] = splat::<S, F>(simd, F::zero());
            let [lowest, _] = splat::<S, F>(simd, F::neg_infinity());
            let shift = max.map(|max| max.simd_eq(lowest).select(zero, max));
            let alpha = [
                exp2::<S, F>(simd, old_max[0] - shift[0]),
                exp2::<S, F>(simd, old_max[1] - shift[1]),
            ];
            let sum = load::<S, F>(simd, &scratch.sums[column..]);
            let mut sum = [sum[0] * alpha[0], sum[1] * alpha[1]];
            for scores in scores.chunks_exact_mut(width) {
                let scores = &mut scores[column..];
                let score = load::<S, F>(simd, scores);
                let weight = [
                    exp2::<S, F>(simd, score[0] - shift[0]),
                    exp2::<S, F>(simd, score[1] - shift[1]),
                ];
                sum = [sum[0] + weight[0], sum[1] + weight[1]];
                store::<S, F>(weight, scores);
            }
            store::<S, F>(sum, &mut scratch.sums[column..]);
            block.drop_out(simd, lanes.clone(), &tile, scores, &mut scratch.rows);

            // O ← α O + P̃ V
            let weights = Matrix { data: &*scores, stride: width }.skip_columns(column);
            let left = values_of_head.left(tile.start);
            store::<S, F>(alpha, &mut scratch.alphas);
            let out = Out::panel(&mut scratch.out, width, column, panel);
            columns_times(simd, left, weights, Target::Rescale(&scratch.alphas), out);
            let bad_keys = values.bad.iter().copied().filter(|key| tile.contains(key));
            block.for_each_visible(lanes, bad_keys, |lane, key| {
                let weight = scores[(key - tile.start) * width + lane];
                for (c, &value) in problem.value(key, head).iter().enumerate() {
                    if !value.is_finite() {
                        scratch.out[c * width + lane] += weight * value;
                    }
                }
            });
        }
    }
}

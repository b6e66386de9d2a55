use super::{Block, HeadRows, MaskedTiles, PARTS, StripOfTile, TileScorer, TileSizes, block, clip};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::compensated::{self, TERMS_OF_SUM};
use crate::kernels::primitives::exp::exp;
use crate::kernels::primitives::matmul::{
    Matrix, Out, Target, Vector, columns_times, load, panel_len, panel_width, splat, store,
    strip_len,
};
use crate::kernels::primitives::transpose::{store_part, transposed};
use crate::kernels::problem::FiniteRows;
use crate::kernels::score::StripScratch;
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat};
use ndarray::{ArrayViewMut2, s};
use std::ops::Range;

/// A maximum is only raised if the logits exceed it by more than this, so that a sum over many tiles is
/// not rescaled, and rounded, by each.
pub(in super::super) const SLACK: f64 = 4.0;

/// The number of tiles after which sums are added to a compensated total.
const TILES_OF_SUM: usize = 32;

/// Buffers of a forward pass, used for one block at a time.
struct ForwardScratch<F: Float> {
    /// keys × width.
    scores: Buffer<F>,
    /// Σ e^{s − m} v and, in the last row, l = Σ e^{s − m}: (value_dim + 1) × width.
    sums: Buffer<F>,
    /// m, the shift of the exponentials.
    maxima: Buffer<F>,
    /// For a strip: the largest scores and the previous m, and the factors that rescale the sums.
    largest: Buffer<F>,
    alphas: Buffer<F>,
    totals: Totals<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
    strip: StripScratch<F>,
    masked: MaskedTiles,
}

/// The sums over earlier tiles of a long row.
struct Totals<F> {
    /// Totals with the layout of the sums, and their rounding errors; empty while there are none.
    totals: Vec<F>,
    lacks: Vec<F>,
    /// The factors that rescale them, one for each lane.
    alphas: Vec<F>,
}

impl<F: Float> Totals<F> {
    /// Adds sums to the totals and replaces them by zeros.
    #[inline(never)]
    fn take(&mut self, level: Level, sums: &mut [F], width: usize) {
        dispatch!(level, _simd => {
                if self.totals.is_empty() {
                    self.totals.resize(sums.len(), F::zero());
                    self.lacks.resize(sums.len(), F::zero());
                }
                let rows = (sums.chunks_exact_mut(width)).zip(
                    self.totals.chunks_exact_mut(width).zip(self.lacks.chunks_exact_mut(width)),
                );
                for (sums, (totals, lacks)) in rows {
                    let lanes = totals.iter_mut().zip(lacks).zip(&self.alphas);
                    for (sum, ((total, lack), &alpha)) in sums.iter_mut().zip(lanes) {
                        compensated::add(total, lack, alpha, *sum);
                        *sum = F::zero();
                    }
                }
                self.alphas.fill(F::one());
        });
    }

    /// Writes all sums to `sums` and becomes empty.
    fn finish(&mut self, level: Level, sums: &mut [F], width: usize) {
        if !self.totals.is_empty() {
            self.take(level, sums, width);
            sums.copy_from_slice(&self.totals);
            self.totals.clear();
            self.lacks.clear();
        }
    }
}

/// Overwrites `out` and the normalizer.
pub(in super::super) fn forward<'p, F: Float, C: TileScorer<'p, F>>(
    whole: &'p C::Problem,
    sizes: TileSizes,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    normalizer: &mut Normalizer<F>,
) {
    let problem = C::softmax(whole);
    let sizes = clip(problem, sizes);
    let values = FiniteRows::new(problem.value.slices(), problem.may_hide());
    let parts = parts(problem.inputs.num_queries(), sizes.queries, 4 * PARTS);
    let rows = || parts.iter().map(Range::len);
    let outs = row_chunks(out, rows());
    let shifts = row_chunks(normalizer.shift.view_mut(), rows());
    let sums = row_chunks(normalizer.sum.view_mut(), rows());
    let tasks = parts.iter().cloned().zip(outs).zip(shifts.zip(sums)).collect();
    parallel::for_each(tasks, problem.work(), |((queries, out), normalizer)| {
        forward_part::<_, C>(level, whole, &values, sizes, queries, out, normalizer);
    });
}

fn forward_part<'p, F: Float, C: TileScorer<'p, F>>(
    level: Level,
    whole: &'p C::Problem,
    values: &FiniteRows<'_, F>,
    sizes: TileSizes,
    queries: Range<usize>,
    mut out: ArrayViewMut2<'_, F>,
    (mut shifts, mut sums): (ArrayViewMut2<'_, F>, ArrayViewMut2<'_, F>),
) {
    let problem = C::softmax(whole);
    let dim = problem.value_dim;
    let width = sizes.queries.next_multiple_of(panel_len::<F>(level));
    let strip = strip_len::<F>(level);
    let mut scorer = C::new(whole, width);
    let mut scratch = ForwardScratch {
        scores: Buffer::zeros(sizes.keys * width),
        sums: Buffer::zeros((dim + 1) * width),
        maxima: Buffer::zeros(width),
        largest: Buffer::zeros(strip),
        alphas: Buffer::zeros(strip),
        totals: Totals { totals: Vec::new(), lacks: Vec::new(), alphas: vec![F::one(); width] },
        rows: Vec::new(),
        strip: StripScratch::default(),
        masked: MaskedTiles::default(),
    };
    for rows in ranges(queries.len(), sizes.queries) {
        for head in 0..problem.heads {
            let block = block(level, problem, head, &queries, &rows);
            scratch.masked.find(&block, sizes.keys);
            forward_block(&block, &mut scorer, values, sizes.keys, &mut scratch);
            let out = out.slice_mut(s![rows.clone(), head_columns(head, dim)]);
            write_out(level, &scratch, block.width, out);
            for (lane, row) in rows.clone().enumerate() {
                let sum = scratch.sums[dim * block.width + lane];
                let is_empty = sum == F::zero();
                let shift = if is_empty { F::neg_infinity() } else { scratch.maxima[lane] };
                (shifts[[row, head]], sums[[row, head]]) = (shift, sum);
            }
        }
    }
}

/// Divides the outputs by the sums and writes the row of each query.
#[inline(never)]
fn write_out<F: Float>(
    level: Level,
    scratch: &ForwardScratch<F>,
    width: usize,
    out: ArrayViewMut2<'_, F>,
) {
    dispatch!(level, simd => write_quotients(simd, scratch, width, out));
}

#[inline(always)]
fn write_quotients<S: Simd, F: Float>(
    simd: S,
    scratch: &ForwardScratch<F>,
    width: usize,
    mut out: ArrayViewMut2<'_, F>,
) {
    let (num_queries, dim) = out.dim();
    let sums_of_weights = &scratch.sums[dim * width..];
    transposed::<S, F>(
        simd,
        dim,
        num_queries,
        #[inline(always)]
        |column| &scratch.sums[column * width..][..width],
        #[inline(always)]
        |lane, column, rows| {
            for (lane, &entries) in (lane..).zip(rows) {
                let sum = sums_of_weights[lane];
                // Nothing seen: avoid 0/0.
                let mean = match sum == F::zero() {
                    true => Vector::<S, F>::splat(simd, F::zero()),
                    false => entries * Vector::<S, F>::splat(simd, F::one() / sum),
                };
                let mut row = out.row_mut(lane);
                match row.as_slice_mut() {
                    Some(row) => store_part::<S, F>(mean, &mut row[column..]),
                    None => (row.iter_mut().skip(column).zip(mean.as_slice()))
                        .for_each(|(value, &mean)| *value = mean),
                }
            }
        },
    );
}

/// Writes the sums and their shifts to `scratch`.
fn forward_block<'p, F: Float, C: TileScorer<'p, F>>(
    block: &Block<'_, '_, F>,
    scorer: &mut C,
    values: &FiniteRows<'_, F>,
    keys_per_tile: usize,
    scratch: &mut ForwardScratch<F>,
) {
    let Block { level, problem, head, width, .. } = *block;
    let kv_head = problem.kv_head(head);
    let dim = problem.value_dim;
    let values_of_head = HeadRows::new(values.slices(), kv_head, dim);
    scorer.begin(block);
    scratch.maxima.fill(F::neg_infinity());
    let ForwardScratch {
        scores,
        sums,
        maxima,
        largest,
        alphas,
        totals,
        rows,
        strip: scratch_of_strip,
        masked,
    } = scratch;
    let sums = &mut sums[..(dim + 1) * width];
    sums.fill(F::zero());

    for (number, tile) in block.tiles(keys_per_tile).enumerate() {
        if number % TILES_OF_SUM == TILES_OF_SUM - 1 {
            totals.take(level, sums, width);
        }
        for columns in block.strips() {
            let StripOfTile { columns, lanes, keys: tile, may_hide } =
                block.strip_of_tile(masked, columns, (number, &tile));
            if tile.is_empty() {
                continue;
            }
            let column = columns.start;
            let (largest, alphas) = (&mut largest[..columns.len()], &mut alphas[..columns.len()]);
            let scores = &mut scores[..tile.len() * width];

            // S, and the largest of m and S.
            largest.copy_from_slice(&maxima[columns.clone()]);
            scorer.score(block, &tile, column, largest, scores);
            if let Some(scoring) = &problem.scoring {
                largest.copy_from_slice(&maxima[columns.clone()]);
                let lanes = block.strip(&lanes, &tile);
                lanes.apply_with_max(problem, scoring, scores, scratch_of_strip, largest);
            }
            if may_hide {
                block.restrict(lanes.clone(), &tile, scores, rows);
                largest.copy_from_slice(&maxima[columns.clone()]);
                raise(level, width, column, scores, largest);
            }
            let sums_of_weights = &mut sums[dim * width + column..][..columns.len()];
            let of_strip = [&mut maxima[columns.clone()], &mut *alphas, sums_of_weights];
            exponentials(level, (width, column), scores, largest, of_strip);
            if !totals.totals.is_empty() {
                let of_strip = totals.alphas[column..].iter_mut().zip(&*alphas);
                of_strip.for_each(|(of_total, &alpha)| *of_total *= alpha);
            }
            block.multiply(lanes.clone(), &tile, scores, rows);

            // O ← α O + P̃ V
            let weights = Matrix::new(scores, width).skip_columns(column);
            let left = values_of_head.left(tile.start);
            let out = Out::columns(&mut *sums, width, columns);
            columns_times(level, left, weights, Target::Rescale(alphas), out);
            let bad_keys = values.bad.iter().copied().filter(|key| tile.contains(key));
            block.for_each_visible(lanes, bad_keys, |lane, key| {
                let weight = scores[(key - tile.start) * width + lane];
                for (c, &value) in problem.value(key, head).iter().enumerate() {
                    if !value.is_finite() {
                        sums[c * width + lane] += weight * value;
                    }
                }
            });
        }
    }
    totals.finish(level, sums, width);
}

/// Raises `largest` to the largest scores of a strip.
#[inline(never)]
fn raise<F: Float>(level: Level, width: usize, column: usize, scores: &[F], largest: &mut [F]) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        width: usize,
        column: usize,
        scores: &[F],
        largest: &mut [F],
    ) {
        let panel = panel_width::<S, F>();
        for (column, largest) in (column..).step_by(panel).zip(largest.chunks_exact_mut(panel)) {
            let mut max = load::<S, F>(simd, largest);
            for scores in scores.chunks_exact(width) {
                let score = load::<S, F>(simd, &scores[column..]);
                max = [max[0].max(score[0]), max[1].max(score[1])];
            }
            store::<S, F>(max, largest);
        }
    }
    dispatch!(level, simd => run(simd, width, column, scores, largest));
}

/// m' = `largest` if that is larger than m by more than the slack, α = e^{m − m'}, l ← α l + Σ P, and
/// replaces the scores S of the strip at (width, column) by P = e^{S − m'}. The lanes are m, α and l.
#[inline(never)]
fn exponentials<F: Float>(
    level: Level,
    place: (usize, usize),
    scores: &mut [F],
    largest: &[F],
    lanes: [&mut [F]; 3],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        (width, column): (usize, usize),
        scores: &mut [F],
        largest: &[F],
        [maxima, alphas, sums]: [&mut [F]; 3],
    ) {
        let panel = panel_width::<S, F>();
        let lanes = (maxima.chunks_exact_mut(panel))
            .zip(alphas.chunks_exact_mut(panel))
            .zip(sums.chunks_exact_mut(panel).zip(largest.chunks_exact(panel)));
        for (column, ((maxima, alphas), (sums, largest))) in (column..).step_by(panel).zip(lanes) {
            of_panel(simd, (width, column), scores, largest, [maxima, alphas, sums]);
        }
    }

    #[inline(always)]
    fn of_panel<S: Simd, F: Float>(
        simd: S,
        (width, column): (usize, usize),
        scores: &mut [F],
        largest: &[F],
        [maxima, alphas, sums]: [&mut [F]; 3],
    ) {
        let [slack, _] = splat::<S, F>(simd, F::from_f64(SLACK));
        let [zero, _] = splat::<S, F>(simd, F::zero());
        let [lowest, _] = splat::<S, F>(simd, F::neg_infinity());
        let old_max = load::<S, F>(simd, maxima);
        let mut max = load::<S, F>(simd, largest);
        // Without a maximum the shift is 0, so −∞ − (−∞) never occurs.
        let (mut shift, mut alpha) = (max, max);
        for half in 0..2 {
            let is_raised = max[half].simd_gt(old_max[half] + slack);
            max[half] = is_raised.select(max[half], old_max[half]);
            shift[half] = max[half].simd_eq(lowest).select(zero, max[half]);
            alpha[half] = exp::<S, F>(simd, old_max[half] - shift[half]);
        }
        store::<S, F>(max, maxima);
        store::<S, F>(alpha, alphas);
        let mut sum = [zero; 2];
        for scores in scores.chunks_mut(TERMS_OF_SUM * width) {
            let mut of_rows = [zero; 2];
            for scores in scores.chunks_exact_mut(width) {
                let scores = &mut scores[column..];
                let mut weight = load::<S, F>(simd, scores);
                for half in 0..2 {
                    weight[half] = exp::<S, F>(simd, weight[half] - shift[half]);
                    of_rows[half] += weight[half];
                }
                store::<S, F>(weight, scores);
            }
            sum = [sum[0] + of_rows[0], sum[1] + of_rows[1]];
        }
        let before = load::<S, F>(simd, sums);
        for half in 0..2 {
            sum[half] = before[half].mul_add(alpha[half], sum[half]);
        }
        store::<S, F>(sum, sums);
    }
    dispatch!(level, simd => run(simd, place, scores, largest, lanes));
}

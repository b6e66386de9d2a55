//! The sum that determines the midpoint of distant points, computed accurately.

use super::{DistanceScorer, DistanceTiles, HyperbolicProblem, Lanes};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::dense::{
    Block, FEW_QUERIES, HeadRows, PARTS, TileScorer, TileSizes, block, clip,
};
use crate::kernels::gathered::{Columns, Gather};
use crate::kernels::normalizer::Normalizer;
use crate::kernels::parallel::{self, row_chunks};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::exp::exp;
use crate::kernels::primitives::matmul::{
    Matrix, Out, Vector, load, panel_len, splat, squared_distances, store,
};
use crate::kernels::problem::Slices;
use crate::kernels::rows::{
    Outputs, Pairs, Part, Scorer, Tile, add_up, for_each_part, level_for, parts,
};
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat};
use ndarray::ArrayViewMut2;
use std::iter;
use std::ops::Range;

/// Adds Σⱼ pᵢⱼ sinh Rⱼ |uⱼ − ûᵢ|²/2 to `sums`, num_queries × heads, for queries and heads with a nonzero
/// û (num_queries × heads · dim); for the others it may add anything.
pub(in super::super) fn spread<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    directions: Slices<'_, F>,
    normalizer: &Normalizer<F>,
    sizes: TileSizes,
    level: Level,
    sums: ArrayViewMut2<'_, F>,
) {
    let softmax = &problem.softmax;
    let task = Task { problem, directions, normalizer };
    let pairs = Pairs::by_query(&softmax.inputs);
    if let Pairs::Dense { num_queries, .. } = pairs
        && num_queries >= FEW_QUERIES
    {
        let sizes = clip(softmax, sizes);
        let ranges = parallel::parts(num_queries, sizes.queries, 4 * PARTS);
        let chunks = row_chunks(sums, ranges.iter().map(Range::len));
        let tasks = ranges.iter().cloned().zip(chunks).collect();
        parallel::for_each(tasks, softmax.work(), |(queries, sums)| {
            task.blocks(level, sizes, queries, sums);
        });
        return;
    }
    let level = level_for::<F>(level, [softmax.key_dim, problem.dim]);
    let parts = parts(pairs);
    let tile_len = pairs.tile_len(sizes.keys);
    for_each_part(
        &parts,
        softmax.work(),
        Outputs::by_row([sums], &parts),
        |part, Outputs { by_row: [sums], .. }| {
            task.rows(level, tile_len, part, sums);
        },
        add_up,
    );
}

struct Task<'p, F: Float> {
    problem: &'p HyperbolicProblem<'p, F>,
    directions: Slices<'p, F>,
    normalizer: &'p Normalizer<F>,
}

impl<F: Float> Task<'_, F> {
    fn rows(&self, level: Level, tile_len: usize, part: &Part, mut sums: ArrayViewMut2<'_, F>) {
        let Self { problem, directions, normalizer } = *self;
        let softmax = &problem.softmax;
        let pairs = Pairs::by_query(&softmax.inputs);
        let mut columns: Columns<F> = problem.columns(level, problem.dim);
        let mut tile = Tile::new(level, softmax.heads, tile_len);
        let mut scorer = DistanceScorer::new(level, problem, &tile);
        let mut spreads = vec![F::zero(); tile.weights.len()];
        for (r, mut row) in part.rows(pairs).enumerate() {
            let query = row.row;
            let own = directions.row(query);
            if own.iter().all(|&entry| entry == F::zero()) {
                continue;
            }
            scorer.begin(query);
            while tile.fill(softmax, &mut row, &[softmax.key.slices(), problem.directions.slices()])
            {
                scorer.score(&mut tile);
                tile.add_bias(softmax);
                let rows = Gather { rows: problem.directions.slices(), at: &tile.others };
                columns.squared_distances(own, rows, &mut spreads, tile.stride);
                for head in 0..softmax.heads {
                    let [of_head, vectors] = tile.of_head(head);
                    let factors = normalizer.factors(query, head);
                    dispatch!(level, simd => weigh(simd, &mut tile.weights[vectors], factors));
                    let weights = &tile.weights[of_head.clone()];
                    let terms = weights.iter().zip(&spreads[of_head]).zip(&tile.pairs);
                    let half = F::from_f64(0.5);
                    sums[[r, head]] += terms.fold(F::zero(), |sum, ((&weight, &spread), pair)| {
                        let sinh = problem.masses[problem.key_at(pair.key, head)].sinh;
                        let weight = weight * softmax.multiplier(*pair, head);
                        sum + weight * (half * sinh * spread)
                    });
                }
            }
        }
    }

    /// In tiles.
    fn blocks(
        &self,
        level: Level,
        sizes: TileSizes,
        queries: Range<usize>,
        mut sums: ArrayViewMut2<'_, F>,
    ) {
        let Self { problem, directions, .. } = *self;
        let softmax = &problem.softmax;
        let width = sizes.queries.next_multiple_of(panel_len::<F>(level));
        let mut scorer = DistanceTiles::new(problem, width);
        let mut tile = Scores {
            scores: Buffer::zeros(sizes.keys * width),
            spreads: Buffer::zeros(sizes.keys * width),
            maxima: Buffer::zeros(panel_len::<F>(level)),
            rows: Vec::new(),
        };
        let mut packed = Buffer::zeros(problem.dim * width);
        let mut lanes = Lanes::<F, 3>::new(width);
        for rows in parallel::ranges(queries.len(), sizes.queries) {
            for head in 0..softmax.heads {
                let block = block(level, softmax, head, &queries, &rows);
                let columns = head_columns(head, problem.dim);
                let of_query = |query| &directions.row(query)[columns.clone()];
                if block.queries.clone().flat_map(of_query).all(|&entry| entry == F::zero()) {
                    continue;
                }
                block.pack_transposed(directions, problem.dim, F::one(), &mut packed);
                // m, 1/l and the sum. Lanes past the end have weights of 0.
                let factors = |query| self.normalizer.factors(query, head);
                let factors = block.queries.clone().map(factors);
                let padding = iter::repeat([F::infinity(), F::zero()]);
                let of_lanes = factors.chain(padding).take(width);
                lanes.fill(of_lanes.map(|[shift, inverse]| [shift, inverse, F::zero()]));
                scorer.begin(&block);
                for keys in block.tiles(sizes.keys) {
                    self.tile(&block, &keys, &scorer, &packed, &mut tile, &mut lanes);
                }
                for (lane, row) in rows.clone().enumerate() {
                    sums[[row, head]] += lanes.data[2 * width + lane];
                }
            }
        }
    }

    fn tile(
        &self,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        scorer: &DistanceTiles<'_, F>,
        packed: &[F],
        Scores { scores, spreads, maxima, rows }: &mut Scores<F>,
        lanes: &mut Lanes<F, 3>,
    ) {
        let problem = self.problem;
        let Block { level, width, .. } = *block;
        let panel = panel_len::<F>(level);
        let scores = &mut scores[..tile.len() * width];
        let spreads = &mut spreads[..tile.len() * width];
        let kv_head = problem.softmax.kv_head(block.head);
        let values = HeadRows::new(problem.directions.slices(), kv_head, problem.dim);
        for column in (0..width).step_by(panel) {
            scorer.score(block, tile, column, maxima, scores);
            let of_panel = block.lanes(&(column..column + panel));
            if block.may_hide_in(&of_panel, tile) {
                block.restrict(of_panel.clone(), tile, scores, rows);
            }
            dispatch!(level, simd => weigh_panel(simd, width, column, lanes, scores));
            block.drop_out(of_panel, tile, scores, rows);
            let right = Matrix::new(packed, width).skip_columns(column);
            let out = Out::columns(spreads, width, column..column + panel);
            squared_distances(level, tile.len(), values.left(tile.start), right, out);
            dispatch!(level, simd => {
                self.add_up(simd, block, tile, column, [scores, spreads], lanes);
            });
        }
    }

    /// Adds the sums of a panel.
    #[inline(always)]
    fn add_up<S: Simd>(
        &self,
        simd: S,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        [scores, spreads]: [&[F]; 2],
        lanes: &mut Lanes<F, 3>,
    ) {
        let (problem, width) = (self.problem, block.width);
        let mut sum = load::<S, F>(simd, &lanes.data[2 * lanes.stride + column..]);
        let of_keys = scores.chunks_exact(width).zip(spreads.chunks_exact(width));
        for (key, (weights, spreads)) in tile.clone().zip(of_keys) {
            let mass = problem.masses[problem.key_at(key, block.head)];
            let half = splat::<S, F>(simd, mass.sinh * F::from_f64(0.5))[0];
            let weights = load::<S, F>(simd, &weights[column..]);
            let spreads = load::<S, F>(simd, &spreads[column..]);
            sum[0] = (weights[0] * half).mul_add(spreads[0], sum[0]);
            sum[1] = (weights[1] * half).mul_add(spreads[1], sum[1]);
        }
        store::<S, F>(sum, &mut lanes.data[2 * lanes.stride + column..]);
    }
}

/// Buffers for one tile at a time.
struct Scores<F: Float> {
    /// keys × width.
    scores: Buffer<F>,
    spreads: Buffer<F>,
    /// Unused here.
    maxima: Buffer<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
}

/// Replaces the logits of a panel by p = e^{s − m} / l.
#[inline(always)]
fn weigh_panel<S: Simd, F: Float>(
    simd: S,
    width: usize,
    column: usize,
    lanes: &Lanes<F, 3>,
    scores: &mut [F],
) {
    let [lowest, highest, zero] =
        [F::neg_infinity(), F::infinity(), F::zero()].map(|x| splat::<S, F>(simd, x)[0]);
    let shifts = load::<S, F>(simd, &lanes.data[column..]);
    let inverses = load::<S, F>(simd, &lanes.data[lanes.stride + column..]);
    for scores in scores.chunks_exact_mut(width) {
        let mut weights = load::<S, F>(simd, &scores[column..]);
        for half in 0..2 {
            let is_hidden = weights[half].simd_eq(lowest);
            let is_empty = shifts[half].simd_eq(highest);
            let logit = is_hidden.select(lowest, weights[half] - shifts[half]);
            let exponential = exp::<S, F>(simd, is_empty.select(lowest, logit));
            weights[half] = is_empty.select(zero, exponential * inverses[half]);
        }
        store::<S, F>(weights, &mut scores[column..]);
    }
}

/// Replaces logits by p = e^{s − m} / l, in whole vectors.
#[inline(always)]
fn weigh<S: Simd, F: Float>(simd: S, logits: &mut [F], [shift, inverse]: [F; 2]) {
    let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
    let shift = Vector::<S, F>::splat(simd, shift);
    let inverse = Vector::<S, F>::splat(simd, inverse);
    for logits in logits.chunks_exact_mut(Vector::<S, F>::LEN) {
        let logit = Vector::<S, F>::from_slice(simd, logits);
        let logit = logit.simd_eq(lowest).select(lowest, logit - shift);
        (exp::<S, F>(simd, logit) * inverse).store_slice(logits);
    }
}

//! Softmax attention in tiles of queries × keys, one head at a time (Dao et al. 2022, 2205.14135;
//! Dao 2023, 2307.08691).
//!
//! Scores are stored transposed, keys × queries: the lanes of a vector are queries. So maxima,
//! exponentials and sums are computed lane by lane, a row of scores is a row of the right factor of P V,
//! and keys and values are read in place. Only the queries of a block are packed, times the scale.

mod backward;
mod dot_backward;
mod forward;

pub(super) use backward::{BackwardPart, KeyGradients, Summed, Targets, backward};
pub(super) use dot_backward::dot_backward;
pub(super) use forward::{SLACK, forward};

use super::parallel::ranges;
use super::primitives::buffer::Buffer;
use super::primitives::matmul::{
    Left, Matrix, Out, Vector, panel_len, rows_times_with_max, strip_len, vector_len,
};
use super::primitives::transpose::transposed;
use super::problem::{Problem, Slices};
use super::score::Strip;
use crate::gradients::PartOfBias;
use crate::inputs::{BiasAxes, Pair, Shown, hull, pair_weight_slot};
use crate::kernels::Float;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::ops::Range;

/// The number of queries in a block and keys in a tile.
#[derive(Clone, Copy, Debug)]
pub struct TileSizes {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
}

/// Fewer queries than this are processed row by row, because they would leave most lanes of a vector
/// empty.
pub(crate) const FEW_QUERIES: usize = 8;

/// The gradients of keys and values are summed in order in at most this many parts of the queries, each
/// with at least the given number of blocks, and then over the parts. These numbers depend only on the
/// problem, so that the sums do not depend on the threads.
pub(super) const PARTS: usize = 4;
pub(super) const BLOCKS_OF_PART: usize = 2;

/// One head of keys or values: row j starts at `j · stride`.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'r, F> {
    rows: Slices<'r, F>,
    column: usize,
    dim: usize,
}

impl<'r, F: Float> HeadRows<'r, F> {
    pub(super) fn new(rows: Slices<'r, F>, head: usize, dim: usize) -> Self {
        Self { rows, column: head * dim, dim }
    }

    #[inline(always)]
    pub(super) fn row(self, row: usize) -> &'r [F] {
        &self.rows.row(row)[self.column..][..self.dim]
    }

    /// Returns the rows from this one on, as a factor of a product.
    #[inline(always)]
    pub(super) fn left(self, from: usize) -> Left<'r, F> {
        let Slices { data, columns } = self.rows;
        let rows = Matrix { data: &data[from * columns..], stride: columns, column: self.column };
        Left { rows, len: self.dim }
    }
}

/// A block of queries of one head, in columns: lane r is query `queries.start + r`, and lanes past
/// the end are padding.
pub(super) struct Block<'p, 'a, F: Float> {
    pub(super) level: Level,
    pub(super) problem: &'p Problem<'a, F>,
    pub(super) head: usize,
    pub(super) queries: Range<usize>,
    /// The number of lanes, a multiple of the panel width.
    pub(super) width: usize,
    /// Whether anything except a causal pattern or a window may hide a pair.
    may_hide_anywhere: bool,
}

impl<F: Float> Block<'_, '_, F> {
    /// Overwrites `packed`, key_dim × width, with the queries times a factor, transposed.
    pub(super) fn pack_queries(&self, factor: F, packed: &mut [F]) {
        self.pack_transposed(self.problem.query.slices(), self.problem.key_dim, factor, packed);
    }

    /// Overwrites `packed`, dim × width, with a factor times the transpose of the head's columns of the
    /// rows of its queries, and zeros.
    #[inline(never)]
    pub(super) fn pack_transposed(
        &self,
        rows: Slices<'_, F>,
        dim: usize,
        factor: F,
        packed: &mut [F],
    ) {
        dispatch!(self.level, simd => self.transpose_rows(simd, rows, dim, factor, packed));
    }

    #[inline(always)]
    fn transpose_rows<S: Simd>(
        &self,
        simd: S,
        rows: Slices<'_, F>,
        dim: usize,
        factor: F,
        packed: &mut [F],
    ) {
        let rows = HeadRows::new(rows, self.head, dim);
        let (first, len, width) = (self.queries.start, self.queries.len(), self.width);
        let factor = Vector::<S, F>::splat(simd, factor);
        // Only the last block has lanes that are not queries.
        if len < width {
            packed.chunks_exact_mut(width).for_each(|lanes| lanes[len..].fill(F::zero()));
        }
        transposed::<S, F>(
            simd,
            len,
            dim,
            #[inline(always)]
            |lane| rows.row(first + lane),
            #[inline(always)]
            |column, lane, columns| {
                // Iterators over chunks of this length would divide by it.
                for (column, &entries) in (column..).zip(columns) {
                    let packed = &mut packed[column * width + lane..];
                    (entries * factor).store_slice(&mut packed[..Vector::<S, F>::LEN]);
                }
            },
        );
    }

    /// Returns the keys that it meets.
    #[inline(always)]
    pub(super) fn keys(&self) -> HeadRows<'_, F> {
        let problem = self.problem;
        HeadRows::new(problem.key.slices(), problem.kv_head(self.head), problem.key_dim)
    }

    /// Returns the keys that causal pattern and window leave visible to at least one of some lanes.
    pub(super) fn visible_keys(&self, lanes: &Range<usize>) -> Range<usize> {
        let inputs = &self.problem.inputs;
        let start = inputs.first_visible_key(self.queries.start + lanes.start);
        let end = inputs.num_visible_keys(self.queries.start + lanes.end - 1);
        start..end.max(start)
    }

    /// Returns the keys that they leave visible to all of some lanes.
    fn keys_of_all(&self, lanes: &Range<usize>) -> Range<usize> {
        let inputs = &self.problem.inputs;
        inputs.first_visible_key(self.queries.start + lanes.end - 1)
            ..inputs.num_visible_keys(self.queries.start + lanes.start)
    }

    /// Iterates over the visible keys in tiles.
    pub(super) fn tiles(
        &self,
        keys_per_tile: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<F> {
        let keys = self.visible_keys(&(0..self.queries.len()));
        let tiles = ranges(keys.len(), keys_per_tile);
        tiles.map(move |tile| keys.start + tile.start..keys.start + tile.end)
    }

    pub(super) fn may_hide_in(&self, lanes: &Range<usize>, keys: &Range<usize>) -> bool {
        self.may_hide_anywhere || self.cuts(lanes, keys)
    }

    /// Whether causal pattern or window hide some keys from some lanes.
    pub(super) fn cuts(&self, lanes: &Range<usize>, keys: &Range<usize>) -> bool {
        let seen = self.keys_of_all(lanes);
        keys.start < seen.start || keys.end > seen.end
    }

    /// Splits its columns into strips, the last of which may be a single panel.
    pub(super) fn strips(&self) -> impl Iterator<Item = Range<usize>> + use<F> {
        ranges(self.width, strip_len::<F>(self.level))
    }

    /// Returns what a strip sees of a tile.
    fn strip_of_tile(
        &self,
        masked: &MaskedTiles,
        columns: Range<usize>,
        (number, tile): (usize, &Range<usize>),
    ) -> StripOfTile {
        // Causal pattern and window may hide the ends of a tile from whole strips.
        let lanes = self.lanes(&columns);
        let visible = self.visible_keys(&lanes);
        let keys = tile.start.max(visible.start)..tile.end.min(visible.end);
        let strip = lanes.start / strip_len::<F>(self.level);
        let (keys, is_all) = masked.visible(strip, number, keys);
        let may_hide = self.cuts(&lanes, &keys) || self.may_hide_anywhere && !is_all;
        StripOfTile { columns, lanes, keys, may_hide }
    }

    /// Returns the lanes of some columns that are queries.
    pub(super) fn lanes(&self, columns: &Range<usize>) -> Range<usize> {
        columns.start..columns.end.min(self.queries.len())
    }

    /// Returns some lanes and keys, for a score function.
    fn strip(&self, lanes: &Range<usize>, keys: &Range<usize>) -> Strip {
        let Self { level, head, width, .. } = *self;
        let first = self.queries.start;
        let queries = first + lanes.start..first + lanes.end;
        Strip { level, head, queries, keys: keys.clone(), column: lanes.start, width }
    }

    pub(super) fn pair(&self, lane: usize, key: usize) -> Pair {
        self.problem.dense_pair(self.queries.start + lane, key)
    }

    /// Adds the bias to the scores of some lanes and masks hidden pairs. `rows` is scratch.
    #[inline(never)]
    pub(super) fn restrict(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        scores: &mut [F],
        rows: &mut Vec<F>,
    ) {
        let inputs = &self.problem.inputs;
        if !self.may_hide_anywhere {
            // Causal pattern and window alone: the first lanes do not see a key yet, the last ones no
            // longer.
            let lane_of = |query: usize| {
                query.saturating_sub(self.queries.start).clamp(lanes.start, lanes.end)
            };
            let seen = self.keys_of_all(&lanes);
            for (k, key) in keys.clone().enumerate().filter(|(_, key)| !seen.contains(key)) {
                let scores = &mut scores[k * self.width..];
                scores[lanes.start..lane_of(inputs.first_query_seeing(key))]
                    .fill(F::neg_infinity());
                scores[lane_of(inputs.num_queries_seeing(key))..lanes.end].fill(F::neg_infinity());
            }
            return;
        }
        let fill = |query, row: &mut [F]| self.fill_bias(query, keys, row);
        self.fill_rows(&lanes, keys.len(), rows, fill);
        dispatch!(self.level, simd => self.add_rows_of_bias(simd, &lanes, keys.len(), rows, scores));
    }

    #[inline(always)]
    fn add_rows_of_bias<S: Simd>(
        &self,
        simd: S,
        lanes: &Range<usize>,
        num_keys: usize,
        rows: &[F],
        scores: &mut [F],
    ) {
        let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
        self.for_lanes(
            simd,
            lanes,
            num_keys,
            rows,
            #[inline(always)]
            |at, bias| {
                let scores = &mut scores[at..][..Vector::<S, F>::LEN];
                let score = Vector::<S, F>::from_slice(simd, scores) + bias;
                // By the bias itself, so that a NaN score is hidden too.
                bias.simd_eq(lowest).select(lowest, score).store_slice(scores);
            },
        );
    }

    /// Overwrites `row` with the additive logits of a query, −∞ for hidden keys.
    fn fill_bias(&self, query: usize, keys: &Range<usize>, row: &mut [F]) {
        let Problem { inputs, bias, .. } = self.problem;
        let first = self.problem.dense_pair(query, keys.start);
        match bias {
            Some(bias) => bias.write_row(first, self.head, row),
            None => row.fill(F::zero()),
        }
        inputs.hide_masked(first, row);
        let visible = inputs.visible_keys(query);
        let [start, end] =
            [visible.start, visible.end].map(|key| key.clamp(keys.start, keys.end) - keys.start);
        row[..start].fill(F::neg_infinity());
        row[end..].fill(F::neg_infinity());
    }

    /// Multiplies the entries of some lanes by the factors of their weights, of dropout and of the pairs. `rows`
    /// is scratch.
    pub(super) fn multiply(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        entries: &mut [F],
        rows: &mut Vec<F>,
    ) {
        self.drop_out(lanes.clone(), keys, entries, rows);
        self.multiply_by_pair_weights(lanes, keys, entries, rows);
    }

    /// Multiplies the entries of some lanes by the weights of the pairs. `rows` is scratch.
    #[inline(never)]
    pub(super) fn multiply_by_pair_weights(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        entries: &mut [F],
        rows: &mut Vec<F>,
    ) {
        if !self.problem.has_pair_weights() {
            return;
        }
        self.fill_rows(&lanes, keys.len(), rows, |query, row| {
            let first = self.problem.dense_pair(query, keys.start);
            for (at, weight) in row.iter_mut().enumerate() {
                let pair = Pair { key: first.key + at, index: first.index + at, ..first };
                *weight = self.problem.pair_weight(pair, self.head);
            }
        });
        dispatch!(self.level, simd => {
            self.multiply_by_rows(simd, &lanes, keys.len(), rows, entries);
        });
    }

    /// Adds the gradients of the weights of the pairs of some lanes, keys × width, to those of the queries
    /// from `first` on.
    #[inline(never)]
    pub(super) fn add_pair_weight_gradients(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        grads: &[F],
        first: usize,
        sums: &mut ArrayViewMut2<'_, F>,
    ) {
        let num_keys = self.problem.inputs.num_keys();
        for lane in lanes {
            for (k, key) in keys.clone().enumerate() {
                let pair = self.pair(lane, key);
                let grad =
                    self.problem.unless_hidden(grads[k * self.width + lane], pair, self.head);
                let of_part = Pair { index: pair.index - first * num_keys, ..pair };
                let slot = pair_weight_slot(sums.ncols(), of_part, self.head);
                sums[slot] += grad;
            }
        }
    }

    /// Multiplies the entries of some lanes by the dropout factors of their weights. `rows` is scratch.
    pub(super) fn drop_out(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        weights: &mut [F],
        rows: &mut Vec<F>,
    ) {
        if self.problem.has_dropout() {
            self.multiply_by_dropout(lanes, keys, weights, rows);
        }
    }

    #[inline(never)]
    fn multiply_by_dropout(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        weights: &mut [F],
        rows: &mut Vec<F>,
    ) {
        let inputs = &self.problem.inputs;
        dispatch!(self.level, simd => {
            // The hashes of pairs are vectorised too.
            self.fill_rows(
                &lanes,
                keys.len(),
                rows,
                #[inline(always)]
                |query, row| {
                    let first = self.problem.dense_pair(query, keys.start);
                    inputs.dropout_multipliers(first, self.head, row);
                },
            );
            self.multiply_by_rows(simd, &lanes, keys.len(), rows, weights);
        });
    }

    #[inline(always)]
    fn multiply_by_rows<S: Simd>(
        &self,
        simd: S,
        lanes: &Range<usize>,
        num_keys: usize,
        rows: &[F],
        weights: &mut [F],
    ) {
        self.for_lanes(
            simd,
            lanes,
            num_keys,
            rows,
            #[inline(always)]
            |at, multipliers| {
                let weights = &mut weights[at..][..Vector::<S, F>::LEN];
                let weight = Vector::<S, F>::from_slice(simd, weights);
                (multipliers * weight).store_slice(weights);
            },
        );
    }

    /// Calls `fill` to write a number for each key into the row of each query, for
    /// [`for_lanes`](Self::for_lanes).
    #[inline(always)]
    fn fill_rows(
        &self,
        lanes: &Range<usize>,
        num_keys: usize,
        rows: &mut Vec<F>,
        fill: impl Fn(usize, &mut [F]),
    ) {
        let stride = num_keys.next_multiple_of(vector_len::<F>(self.level));
        rows.resize(lanes.len() * stride, F::zero());
        for (lane, row) in lanes.clone().zip(rows.chunks_exact_mut(stride)) {
            fill(self.queries.start + lane, &mut row[..num_keys]);
        }
    }

    /// Passes the numbers in `rows`, one row for each lane, to `visit`, key by key in vectors of lanes,
    /// with the position of the first in a tile of scores. Lanes past the last are zeros.
    #[inline(always)]
    fn for_lanes<S: Simd>(
        &self,
        simd: S,
        lanes: &Range<usize>,
        num_keys: usize,
        rows: &[F],
        mut visit: impl FnMut(usize, Vector<S, F>),
    ) {
        let stride = num_keys.next_multiple_of(Vector::<S, F>::LEN);
        transposed::<S, F>(
            simd,
            lanes.len(),
            num_keys,
            #[inline(always)]
            |row| &rows[row * stride..][..stride],
            #[inline(always)]
            |key, lane, keys| {
                for (k, &entries) in keys.iter().enumerate() {
                    visit((key + k) * self.width + lanes.start + lane, entries);
                }
            },
        );
    }

    /// Adds the gradients of the logits of some lanes, keys × width, to the gradient of the bias of the
    /// queries from `first` on.
    #[inline(never)]
    pub(super) fn add_bias_gradients(
        &self,
        lanes: Range<usize>,
        keys: &Range<usize>,
        grads: &[F],
        first: usize,
        grad_bias: &mut ArrayViewMut3<'_, F>,
    ) {
        dispatch!(self.level, simd => {
            self.transpose_bias_gradients(simd, &lanes, keys, grads, first, grad_bias);
        });
    }

    #[inline(always)]
    fn transpose_bias_gradients<S: Simd>(
        &self,
        simd: S,
        lanes: &Range<usize>,
        keys: &Range<usize>,
        grads: &[F],
        first: usize,
        grad_bias: &mut ArrayViewMut3<'_, F>,
    ) {
        let Some(bias) = self.problem.bias else { return };
        let first_pair = first * self.problem.inputs.num_keys();
        transposed::<S, F>(
            simd,
            keys.len(),
            lanes.len(),
            #[inline(always)]
            |key| &grads[key * self.width..][lanes.clone()],
            #[inline(always)]
            |lane, key, rows| {
                for (l, entries) in rows.iter().enumerate() {
                    let pair = self.pair(lanes.start + lane + l, keys.start + key);
                    let (query, index) = (pair.query - first, pair.index - first_pair);
                    let len = Vector::<S, F>::LEN.min(keys.len() - key);
                    let entries = &entries.as_slice()[..len];
                    bias.add_row(Pair { query, index, ..pair }, self.head, entries, grad_bias);
                }
            },
        );
    }

    /// sum += factor · the transpose of `lanes`, columns × width.
    #[inline(never)]
    pub(super) fn add_lanes(&self, factor: F, lanes: &[F], sum: ArrayViewMut2<'_, F>) {
        dispatch!(self.level, simd => self.add_transposed_lanes(simd, factor, lanes, sum));
    }

    #[inline(always)]
    fn add_transposed_lanes<S: Simd>(
        &self,
        simd: S,
        factor: F,
        lanes: &[F],
        mut sum: ArrayViewMut2<'_, F>,
    ) {
        let (num_queries, dim) = sum.dim();
        transposed::<S, F>(
            simd,
            dim,
            num_queries,
            #[inline(always)]
            |column| &lanes[column * self.width..][..self.width],
            #[inline(always)]
            |lane, column, rows| {
                for (lane, entries) in (lane..).zip(rows) {
                    let add = |(sum, &x): (&mut F, &F)| *sum += factor * x;
                    let mut sum = sum.row_mut(lane);
                    match sum.as_slice_mut() {
                        Some(sum) => sum[column..].iter_mut().zip(entries.as_slice()).for_each(add),
                        None => sum.iter_mut().skip(column).zip(entries.as_slice()).for_each(add),
                    }
                }
            },
        );
    }

    pub(super) fn sees(&self, lane: usize, key: usize) -> bool {
        self.problem.dense_bias(self.pair(lane, key), self.head).is_some()
    }

    /// Visits the visible pairs of some lanes with some keys.
    pub(super) fn for_each_visible(
        &self,
        lanes: impl Iterator<Item = usize>,
        keys: impl Iterator<Item = usize> + Clone,
        mut visit: impl FnMut(usize, usize),
    ) {
        for lane in lanes {
            for key in keys.clone().filter(|&key| self.sees(lane, key)) {
                visit(lane, key);
            }
        }
    }
}

/// What masks and bias show of the tiles of a block, strip by strip. A look at a mask costs less than the
/// products that it saves where it hides a whole tile or the ends of one, and less than masking the scores
/// where it hides nothing else.
#[derive(Default)]
pub(super) struct MaskedTiles {
    /// Strip after strip; empty if there are neither masks nor bias.
    shown: Vec<Shown>,
    tiles_of_strip: usize,
    /// The first query of the block.
    first_query: Option<usize>,
}

impl MaskedTiles {
    /// Looks at the masks of a block. Those of the block before stay if it was another head of the same
    /// queries, unless heads differ.
    pub(super) fn find<F: Float>(&mut self, block: &Block<'_, '_, F>, keys_per_tile: usize) {
        if !block.may_hide_anywhere {
            return;
        }
        let first_query = Some(block.queries.start);
        if self.first_query == first_query && !heads_differ(block.problem) {
            return;
        }
        self.first_query = first_query;
        self.shown.clear();
        let inputs = &block.problem.inputs;
        self.tiles_of_strip = block.tiles(keys_per_tile).count();
        for columns in block.strips() {
            let mut lanes = block.lanes(&columns);
            let visible = block.visible_keys(&lanes);
            if inputs.all_queries_share_mask() {
                lanes.end = lanes.end.min(lanes.start + 1);
            }
            let first_tile = self.shown.len();
            // Tiles of the strip, or their ends, may be out of its sight. Query by query, the order of a mask
            // in memory.
            self.shown.resize(first_tile + self.tiles_of_strip, Shown::NOTHING);
            for lane in lanes.clone() {
                let tiles = block.tiles(keys_per_tile).map(|tile| {
                    let start = visible.start.clamp(tile.start, tile.end);
                    start..visible.end.clamp(start, tile.end)
                });
                let query = block.queries.start + lane;
                inputs.for_each_shown(query, block.head, tiles, |number, shown| {
                    let of_tile = &mut self.shown[first_tile + number];
                    *of_tile = if lane == lanes.start { shown } else { shown.and(of_tile) };
                });
            }
        }
    }

    /// Returns a range of all keys that masks and bias show to the block, if there are any.
    pub(super) fn keys(&self) -> Option<Range<usize>> {
        let keys = self.shown.iter().map(|shown| shown.keys.clone());
        let seen = keys.filter(|keys| !keys.is_empty()).reduce(|a, b| hull(&a, &b));
        (!self.shown.is_empty()).then(|| seen.unwrap_or(0..0))
    }

    /// Returns the keys of a tile that masks and bias may show to the queries of a strip, given those that
    /// causal pattern and window leave, and whether they show all of these and there is no bias.
    #[inline]
    pub(super) fn visible(
        &self,
        strip: usize,
        tile: usize,
        keys: Range<usize>,
    ) -> (Range<usize>, bool) {
        match self.shown.get(strip * self.tiles_of_strip + tile) {
            None => (keys, false),
            Some(Shown { keys: shown, is_all }) => {
                (keys.start.max(shown.start)..keys.end.min(shown.end), *is_all)
            }
        }
    }
}

/// Whether masks and bias may differ between heads.
pub(super) fn heads_differ<F: Float>(problem: &Problem<'_, F>) -> bool {
    problem.bias.is_some_and(|bias| bias.num_heads() > 1)
}

/// Splits the gradient of the bias into one for each part of the queries, `None` where none is wanted.
pub(super) fn split_bias<'g, F: Float>(
    problem: &Problem<'_, F>,
    grad: Option<&'g mut ArrayViewMut3<'_, F>>,
    parts: &[Range<usize>],
) -> Vec<Option<PartOfBias<'g, F>>> {
    let (Some(grad), Some(axes)) = (grad, problem.inputs.bias_axes()) else {
        return parts.iter().map(|_| None).collect();
    };
    let shape = grad.raw_dim();
    let mut rest = Some(grad.view_mut());
    let part = |queries: &Range<usize>| {
        let len = match axes {
            BiasAxes::Pairs => queries.len() * problem.inputs.num_keys(),
            BiasAxes::Queries { .. } => queries.len(),
            BiasAxes::Keys | BiasAxes::Shared => {
                return Some(PartOfBias::Copy(Array3::zeros(shape)));
            }
        };
        let (rows, others) = rest.take()?.split_at(Axis(1), len);
        rest = Some(others);
        Some(PartOfBias::Own(rows))
    };
    parts.iter().map(part).collect()
}

/// Returns rows `rows` of the queries from `queries.start` on.
pub(super) fn block<'p, 'a, F: Float>(
    level: Level,
    problem: &'p Problem<'a, F>,
    head: usize,
    queries: &Range<usize>,
    rows: &Range<usize>,
) -> Block<'p, 'a, F> {
    Block {
        level,
        problem,
        head,
        queries: queries.start + rows.start..queries.start + rows.end,
        width: rows.len().next_multiple_of(panel_len::<F>(level)),
        may_hide_anywhere: problem.inputs.has_mask() || problem.bias.is_some(),
    }
}

/// Tiles larger than this only cost memory.
const LARGEST_TILE: usize = 1024;

/// Limits tiles to the size of the problem.
pub(super) fn clip<F: Float>(problem: &Problem<'_, F>, sizes: TileSizes) -> TileSizes {
    TileSizes {
        queries: block_len(problem.inputs.num_queries(), sizes.queries.min(LARGEST_TILE)),
        keys: sizes.keys.min(problem.inputs.num_keys()).clamp(1, LARGEST_TILE),
    }
}

/// Returns the number of queries in a block, at most `most`. If there are only a few blocks, their number is a power of
/// two and they are about equally long, so that threads finish together.
fn block_len(num_queries: usize, most: usize) -> usize {
    const FEW: usize = 8;
    // Of any instruction set.
    const WIDEST_PANEL: usize = 32;
    let most = most.min(num_queries).max(1);
    match num_queries.div_ceil(most).next_power_of_two() {
        blocks @ 2..=FEW => most.min(num_queries.div_ceil(blocks).next_multiple_of(WIDEST_PANEL)),
        _ => most,
    }
}

/// How a mechanism computes the logits of tiles. The forward pass is generic over it.
pub(super) trait TileScorer<'p, F: Float>: Sized {
    /// The problem of the mechanism.
    type Problem: Sync;

    /// Returns the softmax problem in it.
    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F>;

    /// Creates a scorer for blocks of up to the given number of lanes.
    fn new(problem: &'p Self::Problem, width: usize) -> Self;

    /// Loads the queries of a block.
    fn begin(&mut self, block: &Block<'_, '_, F>);

    /// Writes the logits of a strip for a tile of keys, and raises the maxima of its lanes to the largest
    /// logits. There are as many columns as maxima.
    fn score(
        &self,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        maxima: &mut [F],
        scores: &mut [F],
    );
}

/// The pairs of a tile in a strip.
pub(super) struct StripOfTile {
    pub(super) columns: Range<usize>,
    /// The columns that are queries.
    pub(super) lanes: Range<usize>,
    /// The keys that some of them may see.
    pub(super) keys: Range<usize>,
    /// Whether any of these pairs may be hidden.
    pub(super) may_hide: bool,
}

/// How a mechanism differentiates tiles. The backward pass is generic over it.
pub(super) trait TileVjp<'p, F: Float>: Sized {
    /// The problem of the mechanism, and the inputs of its backward pass.
    type Problem: Sync;

    /// Returns the softmax problem in it.
    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F>;

    /// Returns the rows whose weighted sums are gradients.
    fn summed(problem: &'p Self::Problem) -> Summed<'p, F>;

    /// Creates buffers for blocks of up to the given number of lanes, and tiles of up to the given number of
    /// keys.
    fn new(problem: &'p Self::Problem, width: usize, keys_per_tile: usize) -> Self;

    /// Loads the queries of a block.
    fn begin(&mut self, block: &Block<'_, '_, F>);

    /// Overwrites the factors of the gradients of values, and of those of queries and keys, for the pairs of a
    /// strip, with zeros for hidden pairs. Adds gradients that are not sums of rows to the part.
    fn differentiate(
        &mut self,
        block: &Block<'_, '_, F>,
        strip: &StripOfTile,
        weights_and_factors: [&mut [F]; 2],
        part: &mut BackwardPart<'_, F>,
    );

    /// Adds what is left over of a tile. `grad_query` is key_dim × width.
    fn finish_tile(
        &mut self,
        _block: &Block<'_, '_, F>,
        _tile: &Range<usize>,
        _weights_and_factors: [&[F]; 2],
        _grad_query: &mut [F],
        _part: &mut BackwardPart<'_, F>,
    ) {
    }

    /// Adds what is left over of a block, after the gradients of its queries.
    fn finish(&mut self, _block: &Block<'_, '_, F>, _part: &mut BackwardPart<'_, F>) {}
}

/// The logits of scaled dot-product attention.
pub(super) struct DotTiles<'p, F: Float> {
    problem: &'p Problem<'p, F>,
    /// Queries times the scale, key_dim × width.
    queries: Buffer<F>,
}

impl<'p, F: Float> TileScorer<'p, F> for DotTiles<'p, F> {
    type Problem = Problem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        problem
    }

    fn new(problem: &'p Self::Problem, width: usize) -> Self {
        Self { problem, queries: Buffer::zeros(problem.key_dim * width) }
    }

    fn begin(&mut self, block: &Block<'_, '_, F>) {
        block.pack_queries(self.problem.scale, &mut self.queries);
    }

    /// S = K Qᵀ
    fn score(
        &self,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        maxima: &mut [F],
        scores: &mut [F],
    ) {
        let width = block.width;
        let queries = Matrix::new(&self.queries, width).skip_columns(column);
        let keys = block.keys().left(tile.start);
        let out = Out::columns(scores, width, column..column + maxima.len());
        rows_times_with_max(block.level, tile.len(), keys, queries, maxima, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_blocks_are_about_equally_long() {
        let lens = [(0, 1), (1, 1), (96, 96), (97, 64), (128, 64), (200, 64), (256, 64), (384, 96)];
        for (num_queries, len) in lens.into_iter().chain([(512, 64), (700, 96), (1024, 96)]) {
            assert_eq!(block_len(num_queries, 96), len, "{num_queries} queries");
        }
        for (num_queries, most) in [(0, 1), (5, 1), (20, 5), (100, 1024), (10_000, 1024)] {
            assert_eq!(block_len(num_queries, most), most.min(num_queries).max(1));
        }
    }
}

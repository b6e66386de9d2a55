//! Softmax attention row by row, for a graph or for few queries. The pairs of a row are visited in tiles,
//! with a running maximum and sum, for all heads at once, so that a row of keys or values is fetched from
//! memory once.
//!
//! The backward pass runs twice over the pairs, once by query and once by key through the transposed
//! graph, and recomputes their weights each time. So every sum has one owner, which adds in one order: no
//! atomics, no memory per edge, and bitwise identical results for any number of threads. A row so long
//! that other threads would wait for it is cut into segments, whose sums are added in order.
//!
//! Dot-product attention over a graph has a driver of its own, `lanes`, for numbers of heads that fill vectors.
//! The forward pass here serves all other mechanisms, the backward pass dot products and rotary ones. `edge_gat` saves
//! two numbers for each pair and head instead of computing logits with features twice, and in `poincare` the gradient
//! of a weight is not a product with the gradient of the output: their backward passes are loops of their own, over
//! the same parts and tiles.

mod backward;
mod forward;
mod lanes;
mod pair_gradients;
mod weights;

pub(super) use backward::{
    backward, dot_backward, scaled_queries, weights_and_logits_vjp_of_query,
};
pub(super) use forward::{dot_forward, forward};
pub(super) use pair_gradients::{PairGradients, add_bias_gradients, add_pair_weight_gradients};
pub(super) use weights::weights;

use super::gathered::{Columns, Gather, Weights};
use super::parallel::{self, Rest};
use super::primitives::matmul::vector_len;
use super::problem::{FiniteRows, Problem, Slices};
use super::score::ScoredRow;
use crate::element::{try_vec, try_zeros};
use crate::error::Result;
use crate::graph::Graph;
use crate::inputs::{Inputs, Pair, Pattern};
use crate::kernels::Float;
use crate::prefetch::prefetch;
use crate::segments::Segments;
use fearless_simd::Level;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};
use std::ops::Range;
use std::ptr;

/// Longer tiles only cost memory.
const LARGEST_TILE: usize = 1024;

/// The largest number of parts in which rows are distributed to threads, and their smallest numbers of
/// pairs and rows.
const PARTS: usize = 64;
const WORK_OF_PART: usize = 512;

/// Rows with more pairs are cut into segments of this many.
const SEGMENT: usize = 16_384;

/// Rows are prefetched this many pairs ahead, if all of them take more than the given number of bytes;
/// smaller arrays stay in the caches.
const PREFETCH_AHEAD: usize = 24;
const PREFETCH_FROM: usize = 1 << 19;

/// Returns the instruction set for heads of these sizes: vectors of half the length if no head has more columns than a
/// long vector, or if the columns after the last long vector fill a short one.
pub(super) fn level_for<F>(level: Level, dims: [usize; 2]) -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let longest = 64 / size_of::<F>();
        let is_short = dims.iter().all(|&dim| dim <= longest);
        if is_short || dims.iter().any(|dim| dim % longest >= longest / 2) {
            return level.as_avx2().map_or(level, fearless_simd::Simd::level);
        }
    }
    let _ = dims;
    level
}

/// The side, queries or keys, that determines the rows of pairs.
#[derive(Clone, Copy)]
pub(super) enum Pairs<'g> {
    /// Queries that see all keys.
    Dense { num_queries: usize, num_keys: usize },
    /// Keys that all queries see.
    DenseByKey { num_queries: usize, num_keys: usize },
    /// The queries of a graph.
    ByQuery(&'g Graph),
    /// The keys of a graph; this is its transpose.
    ByKey(&'g Graph),
    /// Queries that see all keys of their segment.
    Packed(&'g Segments),
    /// Keys that all queries of their segment see.
    PackedByKey(&'g Segments),
}

impl<'g> Pairs<'g> {
    pub(super) fn by_query<F: Float>(inputs: &Inputs<'g, F>) -> Self {
        match inputs.pattern() {
            Pattern::Dense => {
                let (num_queries, num_keys) = (inputs.num_queries(), inputs.num_keys());
                Pairs::Dense { num_queries, num_keys }
            }
            Pattern::Graph(graph) => Pairs::ByQuery(graph),
            Pattern::Packed(segments) => Pairs::Packed(segments),
        }
    }

    /// Returns the same pairs by key.
    pub(super) fn by_key<F: Float>(inputs: &Inputs<'g, F>) -> Self {
        match Self::by_query(inputs) {
            Pairs::Dense { num_queries, num_keys } => Pairs::DenseByKey { num_queries, num_keys },
            Pairs::ByQuery(graph) => Pairs::ByKey(graph.transpose()),
            Pairs::Packed(segments) => Pairs::PackedByKey(segments),
            by_key => by_key,
        }
    }

    /// Iterates over the slots of all pairs.
    fn numbered(self) -> impl Iterator<Item = (usize, Pair)> {
        (0..self.num_rows()).flat_map(move |row| {
            let mut pairs = Vec::new();
            let slots = self.slots(row);
            Row { pairs: self, row, slots: slots.clone() }.list(slots.clone(), &mut pairs);
            slots.zip(pairs)
        })
    }

    fn num_rows(self) -> usize {
        match self {
            Pairs::Dense { num_queries, .. } => num_queries,
            Pairs::DenseByKey { num_keys, .. } => num_keys,
            Pairs::ByQuery(graph) | Pairs::ByKey(graph) => graph.num_queries(),
            Pairs::Packed(segments) => segments.num_queries(),
            Pairs::PackedByKey(segments) => segments.num_keys(),
        }
    }

    /// Returns the pairs of a row, numbered in the order of the rows.
    #[inline]
    fn slots(self, row: usize) -> Range<usize> {
        match self {
            Pairs::Dense { num_keys: len, .. } | Pairs::DenseByKey { num_queries: len, .. } => {
                row * len..(row + 1) * len
            }
            Pairs::ByQuery(graph) | Pairs::ByKey(graph) => graph.slots(row),
            Pairs::Packed(segments) => segments.pairs_of_query(row),
            Pairs::PackedByKey(segments) => segments.slots_of_key(row),
        }
    }

    pub(super) fn tile_len(self, largest: usize) -> usize {
        let len = |row: usize| self.slots(row).len();
        let longest = (0..self.num_rows()).map(len).max().unwrap_or(0);
        largest.min(longest).clamp(1, LARGEST_TILE)
    }
}

/// Consecutive rows, or some of the pairs of one row.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) rows: Range<usize>,
    pub(super) slots: Range<usize>,
    /// Whether it is a segment of a long row, and the first one.
    pub(super) is_segment: bool,
    pub(super) is_first: bool,
}

impl Part {
    /// Iterates over the rows, each with its pairs.
    pub(super) fn rows<'g>(&self, pairs: Pairs<'g>) -> impl Iterator<Item = Row<'g>> {
        let all = self.slots.clone();
        self.rows.clone().map(move |row| {
            let slots = pairs.slots(row);
            Row { pairs, row, slots: slots.start.max(all.start)..slots.end.min(all.end) }
        })
    }
}

/// Splits all rows in order. The parts depend only on the problem, not on the threads.
pub(super) fn parts(pairs: Pairs<'_>) -> Vec<Part> {
    let num_rows = pairs.num_rows();
    // A row has a fixed cost even without pairs.
    let work_until = |row: usize| row + row.checked_sub(1).map_or(0, |row| pairs.slots(row).end);
    let work = work_until(num_rows);
    let count = (work / WORK_OF_PART).clamp(1, PARTS);
    let shares_until = |row: usize| work_until(row) * count / work;
    let mut parts = Vec::new();
    let mut first = 0;
    let mut shares = 0;
    let close = |parts: &mut Vec<Part>, rows: Range<usize>| {
        if !rows.is_empty() {
            let slots = pairs.slots(rows.start).start..pairs.slots(rows.end - 1).end;
            parts.push(Part { rows, slots, is_segment: false, is_first: false });
        }
    };
    for row in 0..num_rows {
        let slots = pairs.slots(row);
        let is_long = slots.len() > SEGMENT;
        // Divides only where a share ends.
        let ends = (row + 1 + slots.end) * count >= (shares + 1) * work;
        if is_long {
            close(&mut parts, first..row);
            parts.extend(parallel::ranges(slots.len(), SEGMENT).map(|range| Part {
                rows: row..row + 1,
                slots: slots.start + range.start..slots.start + range.end,
                is_segment: true,
                is_first: range.start == 0,
            }));
        } else if ends {
            close(&mut parts, first..row + 1);
        }
        if is_long || ends {
            first = row + 1;
            shares = shares_until(first);
        }
    }
    close(&mut parts, first..num_rows);
    parts
}

/// The outputs of the tasks: N arrays with one row per row, M arrays with one row per pair in the order
/// of the rows, and sums with one row per part.
pub(super) struct Outputs<'a, F, const N: usize, const M: usize> {
    pub(super) by_row: [ArrayViewMut2<'a, F>; N],
    pub(super) by_slot: [ArrayViewMut2<'a, F>; M],
    pub(super) by_part: ArrayViewMut2<'a, F>,
}

impl<'a, F: Float, const N: usize> Outputs<'a, F, N, 0> {
    pub(super) fn by_row(by_row: [ArrayViewMut2<'a, F>; N], parts: &[Part]) -> Self {
        let by_part = ArrayViewMut2::from_shape((parts.len(), 0), &mut []).expect("it is empty");
        Self { by_row, by_slot: [], by_part }
    }
}

/// Runs a task for each part of the rows, with the part's own rows of the outputs. The segments of a long
/// row get rows of zeros instead, which `merge` then merges into the row.
pub(super) fn for_each_part<F: Float, const N: usize, const M: usize>(
    parts: &[Part],
    work: usize,
    outputs: Outputs<'_, F, N, M>,
    run: impl Fn(&Part, Outputs<'_, F, N, M>) + Sync + Send,
    merge: impl Fn([ArrayViewMut1<'_, F>; N], [ArrayView2<'_, F>; N]),
) {
    fn array<T, const N: usize>(items: Vec<T>) -> [T; N] {
        items.try_into().unwrap_or_else(|_| unreachable!("as many as the caller gave"))
    }
    // Compiled once, like `parallel::for_each`.
    let run: &(dyn Fn(&Part, Outputs<'_, F, N, M>) + Sync + Send) = &run;
    if let [part] = parts
        && !part.is_segment
    {
        return run(part, outputs);
    }
    let Outputs { by_row, by_slot, by_part } = outputs;
    split_and_run(
        parts,
        work,
        AnyOutputs { by_row: by_row.into(), by_slot: by_slot.into(), by_part },
        &|part, AnyOutputs { by_row, by_slot, by_part }| {
            run(part, Outputs { by_row: array(by_row), by_slot: array(by_slot), by_part });
        },
        &|rows, segments| merge(array(rows), array(segments)),
    );
}

/// [`Outputs`] with any number of arrays.
struct AnyOutputs<'a, F> {
    by_row: Vec<ArrayViewMut2<'a, F>>,
    by_slot: Vec<ArrayViewMut2<'a, F>>,
    by_part: ArrayViewMut2<'a, F>,
}

/// Merges the segments of a long row into the row, in each array.
type Merge<'m, F> = dyn Fn(Vec<ArrayViewMut1<'_, F>>, Vec<ArrayView2<'_, F>>) + 'm;

/// [`for_each_part`] for several parts, compiled once for all tasks.
fn split_and_run<F: Float>(
    parts: &[Part],
    work: usize,
    mut outputs: AnyOutputs<'_, F>,
    run: &(dyn Fn(&Part, AnyOutputs<'_, F>) + Sync + Send),
    merge: &Merge<'_, F>,
) {
    let num_segments = parts.iter().filter(|part| part.is_segment).count();
    let by_row = &mut outputs.by_row;
    let mut segments: Vec<Array2<F>> =
        by_row.iter().map(|rows| Array2::zeros((num_segments, rows.ncols()))).collect();
    let mut rest: Vec<_> = by_row.iter_mut().map(|rows| Rest::new(rows.view_mut())).collect();
    let mut rest_segments: Vec<_> =
        segments.iter_mut().map(|rows| Rest::new(rows.view_mut())).collect();
    let mut by_slot: Vec<_> = outputs.by_slot.into_iter().map(Rest::new).collect();
    let mut by_part = Rest::new(outputs.by_part);
    fn take<'a, F>(rest: &mut [Rest<'a, F>], len: usize) -> Vec<ArrayViewMut2<'a, F>> {
        rest.iter_mut().map(|rest| rest.take(len)).collect()
    }
    let mut tasks = Vec::with_capacity(parts.len());
    for part in parts {
        let by_row = if part.is_segment {
            if part.is_first {
                take(&mut rest, 1);
            }
            take(&mut rest_segments, 1)
        } else {
            take(&mut rest, part.rows.len())
        };
        let by_slot = take(&mut by_slot, part.slots.len());
        tasks.push((part, AnyOutputs { by_row, by_slot, by_part: by_part.take(1) }));
    }
    parallel::for_each(tasks, work, |(part, outputs)| run(part, outputs));

    let mut start = 0;
    let long_rows = parts.iter().filter(|part| part.is_segment);
    for of_row in long_rows.collect::<Vec<_>>().chunk_by(|a, b| a.rows == b.rows) {
        let end = start + of_row.len();
        let segments = segments.iter().map(|rows| rows.slice(s![start..end, ..])).collect();
        let row = of_row[0].rows.start;
        merge(outputs.by_row.iter_mut().map(|rows| rows.row_mut(row)).collect(), segments);
        start = end;
    }
}

/// Adds the sums over the segments of a long row.
pub(super) fn add_up<F: Float, const N: usize>(
    sums: [ArrayViewMut1<'_, F>; N],
    segments: [ArrayView2<'_, F>; N],
) {
    for (mut sum, segments) in sums.into_iter().zip(segments) {
        segments.rows().into_iter().for_each(|segment| sum += &segment);
    }
}

/// The remaining pairs of a row.
pub(super) struct Row<'g> {
    pub(super) pairs: Pairs<'g>,
    /// The query or key.
    pub(super) row: usize,
    pub(super) slots: Range<usize>,
}

impl Row<'_> {
    /// Skips the keys of a query of dense or packed inputs that causal pattern and window hide: those before
    /// and after a range. Returns whether any others may be hidden.
    #[inline]
    fn skip_hidden_ends<F: Float>(&mut self, inputs: &Inputs<'_, F>) -> bool {
        let slots = match self.pairs {
            Pairs::Dense { num_keys, .. } => 0..num_keys,
            Pairs::Packed(segments) => segments.keys(segments.of_query(self.row)),
            _ => return inputs.may_hide_pairs(),
        };
        if inputs.causal_alignment().is_some() || inputs.has_window() {
            let first = self.pairs.slots(self.row).start;
            let [start, end] = {
                let visible = inputs.visible_keys(self.row);
                [visible.start, visible.end.max(visible.start)].map(|key| first + key - slots.start)
            };
            self.slots.start = self.slots.start.max(start);
            self.slots.end = self.slots.end.min(end).max(self.slots.start);
        }
        inputs.has_mask()
    }

    /// Appends the pairs of some slots. Uses loops of known length: one by one through a filter would
    /// take as long as the arithmetic on a pair.
    #[inline(always)]
    fn list(&self, slots: Range<usize>, list: &mut Vec<Pair>) {
        let row = self.row;
        match self.pairs {
            Pairs::Dense { num_keys, .. } => {
                let first = row * num_keys;
                list.extend(slots.map(|index| Pair { query: row, key: index - first, index }));
            }
            Pairs::DenseByKey { num_queries, num_keys } => {
                let first = row * num_queries;
                list.extend(slots.map(|slot| {
                    let query = slot - first;
                    Pair { query, key: row, index: query * num_keys + row }
                }));
            }
            Pairs::ByQuery(graph) => {
                list.extend(numbered(graph, slots).map(|(key, index)| Pair {
                    query: row,
                    key,
                    index,
                }));
            }
            Pairs::ByKey(graph) => list.extend(numbered(graph, slots).map(|(query, index)| Pair {
                query,
                key: row,
                index,
            })),
            Pairs::Packed(segments) => {
                let first = segments.pairs_of_query(row).start;
                let keys = segments.keys(segments.of_query(row));
                list.extend(slots.map(|index| {
                    let key = keys.start + (index - first);
                    Pair { query: row, key, index }
                }));
            }
            Pairs::PackedByKey(segments) => {
                let segment = segments.of_key(row);
                let (queries, keys) = (segments.queries(segment), segments.keys(segment));
                let first = segments.slots_of_key(row).start;
                let first_index = segments.pairs(segment).start + (row - keys.start);
                list.extend(slots.map(|slot| {
                    let query = slot - first;
                    let index = first_index + query * keys.len();
                    Pair { query: queries.start + query, key: row, index }
                }));
            }
        }
    }
}

/// Returns the indices and the edge numbers of some slots.
#[inline(always)]
fn numbered(graph: &Graph, slots: Range<usize>) -> impl ExactSizeIterator<Item = (usize, usize)> {
    let indices = &graph.indices()[slots.clone()];
    let ids = graph.edge_ids().map(|ids| &ids[slots.clone()]);
    indices.iter().enumerate().map(move |(at, &index)| {
        (index as usize, ids.map_or(slots.start + at, |ids| ids[at] as usize))
    })
}

/// Returns the positions of the caller's pairs in the order of the rows; `None` if the orders are the
/// same.
pub(super) struct SlotOfPair(Option<Vec<u32>>);

impl SlotOfPair {
    pub(super) fn new(pattern: Pattern<'_>) -> Result<Self> {
        let Pattern::Graph(graph) = pattern else {
            return Ok(Self(None));
        };
        let Some(ids) = graph.edge_ids() else {
            return Ok(Self(None));
        };
        let mut slots = try_vec("pairs", &[ids.len()], 0)?;
        for (slot, &id) in ids.iter().enumerate() {
            slots[id as usize] = slot as u32;
        }
        Ok(Self(Some(slots)))
    }

    pub(super) fn is_identity(&self) -> bool {
        self.0.is_none()
    }

    #[inline(always)]
    pub(super) fn slot(&self, pair: usize) -> usize {
        self.0.as_ref().map_or(pair, |slots| slots[pair] as usize)
    }

    pub(super) fn in_callers_order<F: Float>(&self, rows: Array2<F>) -> Result<Array2<F>> {
        if self.is_identity() {
            return Ok(rows);
        }
        let mut ordered = try_zeros("pairs", rows.nrows(), rows.ncols())?;
        for (pair, mut row) in ordered.rows_mut().into_iter().enumerate() {
            row.assign(&rows.row(self.slot(pair)));
        }
        Ok(ordered)
    }
}

/// The pairs of a tile of one row, and a number for each head and pair, head by head.
pub(super) struct Tile<F> {
    pub(super) level: Level,
    /// A power of two.
    lanes: usize,
    pub(super) len: usize,
    /// The distance between heads: the length in whole vectors.
    pub(super) stride: usize,
    pub(super) pairs: Vec<Pair>,
    /// The slot of each pair, and its index on the other side.
    pub(super) slots: Vec<usize>,
    pub(super) others: Vec<usize>,
    /// Logits, −∞ for hidden pairs and past the end; then weights.
    pub(super) weights: Vec<F>,
    /// The factors of the weights, by dropout and weights of pairs; empty if there are none.
    multipliers: Vec<F>,
}

impl<F: Float> Tile<F> {
    pub(super) fn new(level: Level, heads: usize, len: usize) -> Self {
        let lanes = vector_len::<F>(level);
        debug_assert!(lanes.is_power_of_two());
        let stride = len.next_multiple_of(lanes);
        Self {
            level,
            lanes,
            len,
            stride,
            pairs: Vec::with_capacity(len),
            slots: Vec::with_capacity(len),
            others: Vec::with_capacity(len),
            weights: vec![F::zero(); heads * stride],
            multipliers: Vec::new(),
        }
    }

    /// Loads the next visible pairs of a row; returns `false` at its end. Prefetches the rows of later
    /// pairs.
    #[inline(never)]
    pub(super) fn fill(
        &mut self,
        problem: &Problem<'_, F>,
        row: &mut Row<'_>,
        soon: &[Slices<'_, F>],
    ) -> bool {
        self.pairs.clear();
        self.slots.clear();
        let may_hide = row.skip_hidden_ends(&problem.inputs) || problem.skips_hidden;
        while self.pairs.is_empty() && !row.slots.is_empty() {
            let start = row.slots.start;
            let slots = start..row.slots.end.min(start + self.len);
            row.slots.start = slots.end;
            if let Pairs::ByQuery(graph) | Pairs::ByKey(graph) = row.pairs {
                let ahead = graph.indices().get(slots.start + PREFETCH_AHEAD..).unwrap_or_default();
                for (n, rows) in soon.iter().enumerate() {
                    // Keys may also be the values.
                    let is_again = soon[..n].iter().any(|seen| ptr::eq(seen.data, rows.data));
                    if size_of_val(rows.data) >= PREFETCH_FROM && !is_again {
                        ahead
                            .iter()
                            .take(slots.len())
                            .for_each(|&row| prefetch(rows.row(row as usize)));
                    }
                }
            }
            row.list(slots.clone(), &mut self.pairs);
            self.slots.extend(slots);
            if may_hide {
                let sees = |pair: &Pair| problem.visits(*pair);
                let mut pairs = self.pairs.iter();
                self.slots.retain(|_| pairs.next().is_some_and(sees));
                self.pairs.retain(sees);
            }
        }
        self.others.clear();
        match row.pairs {
            Pairs::Dense { .. } | Pairs::ByQuery(_) | Pairs::Packed(_) => {
                self.others.extend(self.pairs.iter().map(|pair| pair.key));
            }
            _ => self.others.extend(self.pairs.iter().map(|pair| pair.query)),
        }
        !self.pairs.is_empty()
    }

    /// The rows of the other side.
    #[inline(always)]
    pub(super) fn gather<'r>(&'r self, rows: Slices<'r, F>) -> Gather<'r, F> {
        Gather { rows, at: &self.others }
    }

    /// Prefetches the rows of later pairs, unless they are in sequential order anyway.
    #[inline(always)]
    pub(super) fn prefetch_pairs(
        &self,
        pairs: Pairs<'_>,
        rows: Slices<'_, F>,
        row_of: impl Fn(usize) -> usize,
    ) {
        let (Pairs::ByQuery(graph) | Pairs::ByKey(graph)) = pairs else {
            return;
        };
        let ids = graph.edge_ids().unwrap_or_default();
        if size_of_val(rows.data) >= PREFETCH_FROM {
            for slot in &self.slots {
                if let Some(&id) = ids.get(slot + PREFETCH_AHEAD) {
                    prefetch(rows.row(row_of(id as usize)));
                }
            }
        }
    }

    /// Returns the range of a head's pairs, without and with those past the end that fill the last
    /// vector.
    #[inline(always)]
    pub(super) fn of_head(&self, head: usize) -> [Range<usize>; 2] {
        let (start, len) = (head * self.stride, self.pairs.len());
        // `next_multiple_of` would divide, in each of many loops over a few pairs.
        let padded = (len + self.lanes - 1) & !(self.lanes - 1);
        [start..start + len, start..start + padded]
    }

    /// Computes the factors for [`multiply`](Self::multiply) of the loaded pairs.
    #[inline]
    pub(super) fn load_multipliers(&mut self, problem: &Problem<'_, F>) {
        if problem.has_multipliers() {
            self.multipliers.resize(self.weights.len(), F::one());
            problem.multipliers(&self.pairs, &mut self.multipliers, self.stride);
        }
    }

    /// Multiplies numbers of the pairs for one head by the factors of their weights, if there are any.
    #[inline]
    pub(super) fn multiply(&self, head: usize, numbers: &mut [F]) {
        let multipliers = self.multipliers.get(head * self.stride..).unwrap_or_default();
        numbers.iter_mut().zip(multipliers).for_each(|(number, &multiplier)| *number *= multiplier);
    }

    /// Multiplies the weights by their factors, if there are any.
    #[inline]
    pub(super) fn multiply_weights(&mut self) {
        let heads = self.weights.chunks_exact_mut(self.stride);
        for (weights, multipliers) in heads.zip(self.multipliers.chunks_exact(self.stride)) {
            let weights = weights.iter_mut().zip(multipliers).take(self.pairs.len());
            weights.for_each(|(weight, &multiplier)| *weight *= multiplier);
        }
    }

    /// The weights, for sums that are multiplied by `factors` first, or overwritten.
    pub(super) fn weights<'w>(&'w self, factors: Option<&'w [F]>) -> Weights<'w, F> {
        Weights { factors, weights: &self.weights, stride: self.stride }
    }

    /// Copies numbers of the pairs to the rows of their slots, counted from `first` on, with a column for each head. Does
    /// nothing if the rows have no columns, which means that they are not wanted.
    pub(super) fn store(&self, numbers: &[F], first: usize, rows: &mut ArrayViewMut2<'_, F>) {
        if rows.ncols() > 0 {
            for (t, slot) in self.slots.iter().enumerate() {
                let of_heads = numbers[t..].iter().step_by(self.stride);
                let row = rows.row_mut(slot - first);
                row.into_iter().zip(of_heads).for_each(|(entry, &number)| *entry = number);
            }
        }
    }

    /// Applies the score function, if there is one, to the logits that a scorer has written.
    #[inline]
    pub(super) fn apply_score(
        &mut self,
        problem: &Problem<'_, F>,
        rows_are_queries: bool,
        scored: &mut ScoredRow,
    ) {
        let Some(scoring) = &problem.scoring else { return };
        scored.load(problem, scoring, &self.pairs, &self.others, rows_are_queries);
        for head in 0..problem.heads {
            let [entries, _] = self.of_head(head);
            let of_head = (&self.pairs[..], head, rows_are_queries);
            scored.apply(self.level, scoring, of_head, &mut self.weights[entries]);
        }
    }

    /// Completes the logits that a scorer has written for the visible pairs: adds the bias, and writes −∞
    /// for pairs that it hides and past the end.
    #[inline(never)]
    pub(super) fn add_bias(&mut self, problem: &Problem<'_, F>) {
        for head in 0..problem.heads {
            let [pairs, vectors] = self.of_head(head);
            self.weights[pairs.end..vectors.end].fill(F::neg_infinity());
            if problem.bias.is_some() {
                for (logit, &pair) in self.weights[pairs].iter_mut().zip(&self.pairs) {
                    *logit = match problem.bias_of(pair, head) {
                        Some(bias) => *logit + bias,
                        None => F::neg_infinity(),
                    };
                }
            }
        }
    }
}

/// How a mechanism computes the logits of pairs. The forward pass is generic over it.
pub(super) trait Scorer<'p, F: Float>: Sized {
    /// The problem of the mechanism.
    type Problem: Sync;

    /// Returns the softmax problem in it.
    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F>;

    /// Creates a scorer for tiles like this one.
    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self;

    /// Loads the row of a query.
    fn begin(&mut self, query: usize);

    /// Writes the logits of a tile to its weights buffer.
    fn score(&mut self, tile: &mut Tile<F>);

    /// Multiplies its own sums by `alphas`, then adds the contributions of pairs to the output besides
    /// their values, times their weights.
    fn add_values(&mut self, _: &Tile<F>, _alphas: &[F]) {}

    /// Adds those sums to the output, at the end of a row.
    fn finish(&mut self, _out: &mut [F]) {}
}

/// A scorer for either side, with products of one side's row with the other's. The backward pass is
/// generic over it.
pub(super) trait TwoSided<'p, F: Float>: Scorer<'p, F> {
    /// The number of gradients of data of a pair, 0 or 1, and of sums over all pairs.
    fn num_extras(_: &'p Self::Problem) -> [usize; 2] {
        [0; 2]
    }

    /// Creates a scorer for passes by query or by key; by key, the queries are already multiplied by the
    /// scale. Both give bitwise identical logits: if logits are large, a different rounding would change
    /// the weights.
    fn of_side(
        level: Level,
        problem: &'p Self::Problem,
        scaled_queries: Option<Slices<'p, F>>,
        tile: &Tile<F>,
    ) -> Self;

    /// Returns the factor of the own row: the rows of the other side, which are `others` without NaN and
    /// infinities, or rows computed from them.
    fn factors<'t>(&'t self, tile: &'t Tile<F>, others: Slices<'t, F>) -> Gather<'t, F> {
        tile.gather(others)
    }

    /// By query: overwrites the gradients of the pairs' data, given those of the logits of a tile.
    fn logits_vjp(&mut self, _: &Tile<F>, _grads: &[F], _of_pairs: &mut [F]) {}

    /// By query: adds the contribution of the row to the sums.
    fn finish_vjp(&mut self, _sums: &mut [F]) {}
}

/// The logits of scaled dot-product attention: one side's row against the other's.
pub(super) struct DotScorer<'p, F: Float> {
    columns: Columns<F>,
    /// The common row of all pairs, times the scale if it is a query.
    pub(super) own: Vec<F>,
    own_rows: Slices<'p, F>,
    factor: F,
    others: Slices<'p, F>,
}

impl<'p, F: Float> Scorer<'p, F> for DotScorer<'p, F> {
    type Problem = Problem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        problem
    }

    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self {
        Self::of_side(level, problem, None, tile)
    }

    fn begin(&mut self, row: usize) {
        let row = self.own_rows.row(row);
        self.own.iter_mut().zip(row).for_each(|(own, &value)| *own = self.factor * value);
    }

    fn score(&mut self, tile: &mut Tile<F>) {
        let Tile { stride, others, weights, .. } = tile;
        let rows = Gather { rows: self.others, at: others };
        self.columns.dots(&self.own, rows, weights, *stride);
    }
}

impl<'p, F: Float> TwoSided<'p, F> for DotScorer<'p, F> {
    fn of_side(
        level: Level,
        problem: &'p Problem<'p, F>,
        scaled_queries: Option<Slices<'p, F>>,
        _: &Tile<F>,
    ) -> Self {
        let (query, key) = (problem.query.slices(), problem.key.slices());
        let (own_rows, others, factor) = match scaled_queries {
            Some(queries) => (key, queries, F::one()),
            None => (query, key, problem.scale),
        };
        let columns = key_columns(level, problem, scaled_queries.is_some());
        Self { columns, own: vec![F::zero(); own_rows.columns], own_rows, factor, others }
    }
}

/// Returns the columns of the heads of queries and keys.
pub(super) fn key_columns<F: Float>(
    level: Level,
    problem: &Problem<'_, F>,
    own_are_keys: bool,
) -> Columns<F> {
    let dim = problem.key_dim;
    Columns::new(level, problem.heads, dim, |head| {
        let starts = [head * dim, problem.kv_head(head) * dim];
        if own_are_keys { [starts[1], starts[0]] } else { starts }
    })
}

/// Adds the values that are not finite in the rows of visible pairs, which the products left out.
/// `row_of` returns a pair's row, its head's columns in it, and whether the query sees any key.
#[inline]
fn add_bad<'r, F: Float>(
    problem: &Problem<'_, F>,
    tile: &Tile<F>,
    weights: &[F],
    head: usize,
    rows: &FiniteRows<'_, F>,
    sum: &mut [F],
    row_of: impl Fn(Pair) -> (usize, &'r [F], bool),
) {
    for (&pair, &weight) in tile.pairs.iter().zip(weights) {
        let (row, values, is_live) = row_of(pair);
        if is_live && rows.bad.binary_search(&row).is_ok() && problem.bias_of(pair, head).is_some()
        {
            for (sum, &value) in sum.iter_mut().zip(values) {
                if !value.is_finite() {
                    *sum += weight * value;
                }
            }
        }
    }
}

/// row += factor · values.
#[inline(always)]
pub(super) fn add_to_row<F: Float>(mut row: ArrayViewMut1<'_, F>, factor: F, values: &[F]) {
    let add = |(sum, &value): (&mut F, &F)| *sum += factor * value;
    match row.as_slice_mut() {
        Some(row) => row.iter_mut().zip(values).for_each(add),
        None => row.iter_mut().zip(values).for_each(add),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_pair_once_and_cut_long_rows() {
        let hub = (0..3 * SEGMENT + 5).map(|key| (700, key));
        let edges = (0..2000).map(|query| (query, query)).chain(hub);
        let graph = Graph::from_edges(2000, 4 * SEGMENT, edges).unwrap();
        let dense = Pairs::Dense { num_queries: 2, num_keys: 2 * SEGMENT + 1 };
        for (pairs, num_pairs, segments) in
            [(Pairs::ByQuery(&graph), graph.num_edges(), 4), (dense, 4 * SEGMENT + 2, 6)]
        {
            let parts = parts(pairs);
            let mut slots: Vec<usize> = parts.iter().flat_map(|part| part.slots.clone()).collect();
            assert_eq!(slots, (0..num_pairs).collect::<Vec<_>>());
            slots = (parts.iter())
                .flat_map(|part| part.rows(pairs).flat_map(|row| row.slots))
                .collect();
            assert_eq!(slots, (0..num_pairs).collect::<Vec<_>>());
            assert_eq!(parts.iter().filter(|part| part.is_segment).count(), segments);
            assert!(parts.iter().all(|part| part.is_segment || part.slots.len() <= SEGMENT));
            let mut rows: Vec<usize> = parts.iter().flat_map(|part| part.rows.clone()).collect();
            rows.dedup();
            assert_eq!(rows, (0..pairs.num_rows()).collect::<Vec<_>>());
        }
        assert!(parts(Pairs::Dense { num_queries: 0, num_keys: 3 }).is_empty());
        assert_eq!(parts(Pairs::Dense { num_queries: 3, num_keys: 0 }).len(), 1);
    }
}

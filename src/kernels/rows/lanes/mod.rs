//! Dot-product attention over a graph with a head in each lane.
//!
//! Queries, keys and values are copied once per call, column by column:
//!
//! ```text
//! k₀ of head 0 … k₀ of head 7 | k₁ of head 0 … k₁ of head 7 | k₂ …
//! ```
//!
//! So a vector of the products of a pair has one head in each lane: no sum runs across lanes, and the weights
//! of a pair are a vector that multiplies its values as it is. If there are fewer heads than lanes, a vector holds
//! several columns, each in a *block* of 16 bytes. The key and the value of a node stand side by side, so
//! that a pair reads one place in memory.
//!
//! This serves numbers of heads of keys that fill vectors or blocks, unless a bias or a mask hides pairs. The other
//! driver of [`rows`](super) serves the rest. With 16 pairs per row in the cache, 4 heads take four fifths of its time
//! forward and seven tenths with the backward pass, 8 heads seven and six tenths; with 3 pairs the copies take a
//! quarter of the time.

mod backward;
mod copies;
mod forward;
mod steps;
mod tile_pairs;

use super::super::primitives::buffer::Buffer;
use super::super::primitives::matmul::vector_len;
use super::super::problem::Problem;
use crate::graph::Graph;
use crate::inputs::Pattern;
use crate::kernels::Float;
use copies::{Copies, Transposition, Which, to_lanes};
use fearless_simd::Level;
#[cfg(target_arch = "x86_64")]
use fearless_simd::Simd;
use ndarray::ArrayViewMut2;
use steps::Shape;

/// Rows of queries, outputs and gradients that are copied at a time, so that they stay in the cache.
const ROWS_AT_A_TIME: usize = 32;

/// Dot-product attention over a graph, with the layout of its copies.
///
/// Heads are split into *groups* of as many heads of keys as a vector or a block has lanes. A group belongs to
/// several *slots*, if several heads of queries share a head of keys: slot s has the s-th vectors of a query,
/// and reads those of group s / sharing of a key.
pub(in super::super) struct Lanes<'p, F: Float> {
    problem: &'p Problem<'p, F>,
    graph: &'p Graph,
    level: Level,
    /// Heads of a group.
    width: usize,
    /// Lanes of a vector.
    len: usize,
    slots: usize,
    groups: usize,
    sharing: usize,
    /// The heads of all slots, and of all groups.
    query_heads: Vec<usize>,
    key_heads: Vec<usize>,
    /// The numbers of a slot or group: columns of a head in whole vectors, times the heads.
    key_len: usize,
    value_len: usize,
}

impl<'p, F: Float> Lanes<'p, F> {
    /// Returns `None` if this driver does not serve the problem. That must not depend on the number of rows or pairs:
    /// a query gives the same bits in any part of its graph, and forward and backward pass round logits alike.
    pub(in super::super) fn new(problem: &'p Problem<'p, F>, level: Level) -> Option<Self> {
        let Pattern::Graph(graph) = problem.inputs.pattern() else { return None };
        let may_hide = problem.bias.is_some() || problem.inputs.may_hide_pairs();
        if may_hide || problem.key_dim.min(problem.value_dim) == 0 {
            return None;
        }
        let kv_heads = problem.inputs.num_kv_heads();
        let (level, width) = level_and_width::<F>(level, kv_heads)?;
        let len = vector_len::<F>(level);
        let padded = |dim: usize| (dim * width).next_multiple_of(len);
        let (slots, sharing) = (problem.heads / width, problem.heads / kv_heads);
        let head =
            |slot: usize, lane: usize| (slot / sharing * width + lane) * sharing + slot % sharing;
        Some(Self {
            problem,
            graph,
            level,
            width,
            len,
            slots,
            groups: kv_heads / width,
            sharing,
            query_heads: (0..problem.heads).map(|n| head(n / width, n % width)).collect(),
            key_heads: (0..kv_heads).collect(),
            key_len: padded(problem.key_dim),
            value_len: padded(problem.value_dim),
        })
    }

    /// The vectors of own and other row that each slot reads, where queries are the rows.
    fn slots_by_query(&self) -> Vec<[usize; 2]> {
        (0..self.slots).map(|slot| [slot, slot / self.sharing]).collect()
    }

    fn shape<'s>(&self, slots: &'s [[usize; 2]], stride: usize) -> Shape<'s> {
        Shape { width: self.width, slots, stride }
    }

    /// Creates the memory for so many pairs of a row.
    fn tile<const N: usize>(&self, len: usize) -> Tile<F, N> {
        let len = len.next_multiple_of(self.len / self.width);
        let numbers = [(); N].map(|()| Buffer::stale(self.slots * len * self.width));
        Tile { stride: len * self.width, raw: Buffer::stale(len * self.len), numbers }
    }

    /// Returns where the columns of keys and values (`is_key`) or of queries and outputs stand, with `dim` columns of a
    /// head, in copies of `stride` columns.
    fn places(&self, is_key: bool, dim: usize, stride: usize) -> Transposition<'_> {
        let heads = if is_key { &self.key_heads } else { &self.query_heads };
        Transposition {
            level: self.level,
            width: self.width,
            heads,
            dim,
            columns: heads.len() * dim,
            stride,
            len_of_slot: (dim * self.width).next_multiple_of(self.len),
        }
    }

    /// Whether pairs copy their keys, instead of all keys being copied at once, so that the time does not depend on the
    /// number of keys.
    fn has_few_edges(&self) -> bool {
        self.graph.num_edges() < self.problem.inputs.num_keys()
    }

    /// Copies all keys, each followed by its value.
    fn keys(&self) -> Copies<F> {
        let problem = self.problem;
        Copies::new(problem.inputs.num_keys(), self.key_stride(), |rows, copies| {
            self.copy_keys(Which::From(rows.start), copies);
        })
    }

    /// Copies some keys, each followed by its value.
    fn keys_listed(&self, keys: &[u32]) -> Copies<F> {
        Copies::new(keys.len(), self.key_stride(), |pairs, copies| {
            self.copy_keys(Which::Listed(&keys[pairs]), copies);
        })
    }

    /// The numbers of a key and its value.
    fn key_stride(&self) -> usize {
        self.groups * (self.key_len + self.value_len)
    }

    fn copy_keys(&self, which: Which<'_>, copies: &mut [F]) {
        let (problem, stride) = (self.problem, self.key_stride());
        let of_key = self.places(true, problem.key_dim, stride);
        let of_value = self.places(true, problem.value_dim, stride);
        to_lanes(of_key, (problem.key.slices(), which), 0, copies);
        let first = self.groups * self.key_len;
        to_lanes(of_value, (problem.value.slices(), which), first, copies);
    }
}

/// Passes a matrix as one slice; if it is not contiguous, a copy, which is then copied back.
fn with_slice<F: Float>(mut matrix: ArrayViewMut2<'_, F>, visit: impl FnOnce(&mut [F])) {
    match matrix.as_slice_mut() {
        Some(matrix) => visit(matrix),
        None => {
            let mut copy = matrix.as_standard_layout().into_owned();
            visit(copy.as_slice_mut().expect("it has the standard layout"));
            matrix.assign(&copy);
        }
    }
}

/// Returns the instruction set and the heads of a group: the longest vector that heads fill, or the longest one at all
/// with a group in each block.
fn level_and_width<F: Float>(level: Level, kv_heads: usize) -> Option<(Level, usize)> {
    let block = 16 / size_of::<F>();
    #[cfg(target_arch = "x86_64")]
    let shorter = [level.as_avx512().map(Simd::level), level.as_avx2().map(Simd::level)];
    #[cfg(not(target_arch = "x86_64"))]
    let shorter = [None];
    for level in shorter.into_iter().flatten() {
        let width = vector_len::<F>(level);
        if kv_heads.is_multiple_of(width) {
            return Some((level, width));
        }
    }
    kv_heads.is_multiple_of(block).then_some((level, block))
}

/// The numbers of the pairs of a tile, N of each for each head.
struct Tile<F: Float, const N: usize> {
    /// The distance between slots.
    stride: usize,
    /// A vector of each pair.
    raw: Buffer<F>,
    numbers: [Buffer<F>; N],
}

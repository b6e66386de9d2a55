//! The nearest keys of queries, in tiles of keys × queries: the lanes of a vector are queries.
//!
//! A tile of similarities is computed like a matrix product and compared, one vector at a time, with the
//! similarity that each query needs to improve on its k-th neighbour so far. After the first few tiles,
//! almost no vector has such a lane. If a lane may improve, within the bound on the rounding error, its
//! similarity is computed again in `f64` in a fixed order, and only this value counts. So neither the
//! precision nor the instruction set of the tiles affects the result.

use super::keys::{Keys, Query};
use super::parallel::ranges;
use super::primitives::matmul::{Left, Matrix, PanelRow, Vector, load, panel_width, rows_with};
use super::problem::Rows;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdMask};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

/// The number of queries in a block and keys in a tile: both stay in the first-level cache.
const QUERIES: usize = 64;
const KEYS: usize = 96;

/// The arguments of [`nearest`] that decide which keys a query has.
#[derive(Clone, Copy)]
struct Search<'s, F> {
    k: usize,
    threshold: Option<F>,
    accepts: &'s (dyn Fn(usize, u32, F) -> bool + Sync),
}

/// A candidate key; the greatest is dropped first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) similarity: f64,
    pub(crate) key: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        other.similarity.total_cmp(&self.similarity).then(self.key.cmp(&other.key))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The neighbours of some queries, in the order of the queries.
#[derive(Debug)]
pub struct Lists<'l, F> {
    pub(crate) k: usize,
    /// The lengths of the lists of the next queries.
    pub(crate) lens: std::slice::IterMut<'l, usize>,
    /// k entries for each of the next queries.
    pub(crate) keys: &'l mut [u32],
    pub(crate) similarities: &'l mut [F],
}

impl<F: Float> Lists<'_, F> {
    /// Adds the keys and similarities of the next query, at most k.
    ///
    /// # Panics
    /// If there is no next query.
    pub(crate) fn push(&mut self, found: impl Iterator<Item = (u32, F)>) {
        let (keys, rest) = std::mem::take(&mut self.keys).split_at_mut(self.k);
        self.keys = rest;
        let (similarities, rest) = std::mem::take(&mut self.similarities).split_at_mut(self.k);
        self.similarities = rest;
        let len = self.lens.next().expect("one list for each query");
        for ((key, similarity), found) in keys.iter_mut().zip(similarities).zip(found) {
            (*key, *similarity) = found;
            *len += 1;
        }
    }
}

/// A query of a block, and the best keys so far.
struct Lane<'s, F: Float> {
    number: usize,
    /// `None` for a query that is similar to no key.
    query: Option<Query>,
    search: Search<'s, F>,
    nearest: BinaryHeap<Candidate>,
    absolute_error: f64,
}

impl<F: Float> Lane<'_, F> {
    /// Adds a key if it is among the nearest so far; returns whether it did.
    #[inline(always)]
    fn offer(&mut self, keys: &Keys<'_, F>, key: usize) -> bool {
        let Some(query) = &self.query else { return false };
        let candidate = Candidate { similarity: keys.similarity(query, key), key: key as u32 };
        let is_full = self.nearest.len() >= self.search.k;
        if is_full && self.nearest.peek().is_none_or(|worst| candidate >= *worst) {
            return false;
        }
        let reported = keys.reported(query, candidate.similarity);
        if !(self.search.accepts)(self.number, candidate.key, reported) {
            return false;
        }
        if is_full && let Some(mut worst) = self.nearest.peek_mut() {
            *worst = candidate;
        } else {
            self.nearest.push(candidate);
        }
        true
    }

    /// Returns the bound below which a similarity in a tile is not among the nearest.
    fn bound(&self, keys: &Keys<'_, F>) -> F {
        let worst = self.nearest.peek().filter(|_| self.nearest.len() >= self.search.k);
        let worst = worst.map_or(f64::NEG_INFINITY, |worst| worst.similarity);
        let threshold = self.search.threshold.zip(self.query.as_ref());
        let threshold =
            threshold.map_or(f64::NEG_INFINITY, |(least, query)| keys.needed(query, least));
        let needed = worst.max(threshold);
        if needed.is_infinite() && self.absolute_error.is_finite() {
            // Infinity minus its relative error would be NaN.
            return F::from_f64(needed);
        }
        F::from_f64(needed - self.absolute_error - keys.relative_error() * needed.abs())
    }
}

/// A block of queries, transposed.
struct Block<'s, F: Float> {
    lanes: Vec<Lane<'s, F>>,
    /// dim × width, zeros past the last query.
    packed: Vec<F>,
    width: usize,
    /// The bound of each lane.
    bounds: Vec<F>,
}

impl<'s, F: Float> Block<'s, F> {
    fn new<S: Simd>(
        _: S,
        keys: &Keys<'_, F>,
        queries: &Rows<'_, F>,
        rows: Range<usize>,
        search: Search<'s, F>,
    ) -> Self {
        let width = rows.len().next_multiple_of(panel_width::<S, F>());
        let mut packed = vec![F::zero(); keys.dim() * width];
        let lane = |(lane, number)| {
            let query = keys.prepare(queries.row(number));
            if let Some(query) = &query {
                for (packed, &value) in packed.chunks_exact_mut(width).zip(query.values()) {
                    packed[lane] = F::from_f64(value);
                }
            }
            let absolute_error = query.as_ref().map_or(0.0, |query| keys.absolute_error(query));
            Lane { number, query, search, nearest: BinaryHeap::new(), absolute_error }
        };
        let lanes: Vec<_> = rows.enumerate().map(lane).collect();
        // Lanes without a query need nothing.
        let mut bounds = vec![F::infinity(); width];
        for (bound, lane) in bounds.iter_mut().zip(&lanes) {
            *bound = if lane.query.is_some() { lane.bound(keys) } else { F::infinity() };
        }
        Self { lanes, packed, width, bounds }
    }

    #[inline(never)]
    fn visit<S: Simd, const SQUARE: bool>(
        &mut self,
        simd: S,
        keys: &Keys<'_, F>,
        tile: Range<usize>,
    ) {
        simd.vectorize(
            #[inline(always)]
            || self.visit_inline::<S, SQUARE>(simd, keys, tile),
        );
    }

    #[inline(always)]
    fn visit_inline<S: Simd, const SQUARE: bool>(
        &mut self,
        simd: S,
        keys: &Keys<'_, F>,
        tile: Range<usize>,
    ) {
        let Self { lanes, packed, width, bounds } = self;
        let factors = keys.factors(tile.clone());
        let (rows, dim) = (keys.rows(tile.clone()), keys.dim());
        let left = Left::new(rows, dim);
        let right = Matrix::new(packed, *width);
        rows_with::<S, F, SQUARE>(
            simd,
            tile.len(),
            left,
            right,
            *width,
            #[inline(always)]
            |first, column, sums, count| {
                let (lanes, bounds) = (&mut lanes[column..], &mut bounds[column..]);
                for (key, sums) in (first..).zip(sums).take(count) {
                    let bits = may_improve::<S, F>(simd, sums, factors[key], bounds);
                    if bits != 0 {
                        offer(simd, keys, tile.start + key, bits, lanes, bounds);
                    }
                }
            },
        );
    }
}

/// Returns the lanes whose similarity is not below their bound; NaN is not below.
#[inline(always)]
fn may_improve<S: Simd, F: Float>(simd: S, [a, b]: PanelRow<S, F>, factor: F, bounds: &[F]) -> u64 {
    let len = Vector::<S, F>::LEN;
    let factor = Vector::<S, F>::splat(simd, factor);
    let [bound_a, bound_b] = load::<S, F>(simd, bounds);
    let below = (factor * a).simd_lt(bound_a).to_bitmask();
    let below = below | (factor * b).simd_lt(bound_b).to_bitmask() << len;
    !below & (u64::MAX >> (64 - 2 * len))
}

/// Offers a key to the lanes with a set bit. Not inlined, because it is rarely needed.
#[inline(never)]
fn offer<S: Simd, F: Float>(
    simd: S,
    keys: &Keys<'_, F>,
    key: usize,
    mut bits: u64,
    lanes: &mut [Lane<'_, F>],
    bounds: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            while bits != 0 {
                let lane = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if let Some(state) = lanes.get_mut(lane)
                    && state.offer(keys, key)
                {
                    bounds[lane] = state.bound(keys);
                }
            }
        },
    );
}

/// Pushes the neighbours of some queries. `accepts` is given the numbers of a query and a key, and their
/// similarity; what is below the threshold, it must refuse. Both similarities are in the units of the metric.
pub(super) fn nearest<F: Float>(
    level: Level,
    keys: &Keys<'_, F>,
    queries: &Rows<'_, F>,
    rows: Range<usize>,
    threshold: Option<F>,
    accepts: &(dyn Fn(usize, u32, F) -> bool + Sync),
    mut lists: Lists<'_, F>,
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        keys: &Keys<'_, F>,
        queries: &Rows<'_, F>,
        rows: Range<usize>,
        search: Search<'_, F>,
        lists: &mut Lists<'_, F>,
    ) {
        for block in ranges(rows.len(), QUERIES) {
            let block = rows.start + block.start..rows.start + block.end;
            let mut block = Block::new(simd, keys, queries, block, search);
            for tile in ranges(keys.len(), KEYS) {
                if keys.squares() {
                    block.visit::<S, true>(simd, keys, tile);
                } else {
                    block.visit::<S, false>(simd, keys, tile);
                }
            }
            for lane in block.lanes {
                let nearest = lane.nearest.into_sorted_vec();
                lists.push(lane.query.iter().flat_map(|query| {
                    nearest.iter().map(|found| (found.key, keys.reported(query, found.similarity)))
                }));
            }
        }
    }
    let search = Search { k: lists.k, threshold, accepts };
    dispatch!(level, simd => run(simd, keys, queries, rows, search, &mut lists));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::keys::Metric;
    use crate::kernels::levels;
    use ndarray::Array2;

    /// Entries from −1 to 1 with ties and zeros among them.
    fn rows<F: Float>(len: usize, dim: usize, salt: usize) -> Rows<'static, F> {
        let entry = |(i, j)| F::from_f64(((i * 37 + j * 11 + salt) * 53 % 101) as f64 / 50.0 - 1.0);
        Rows::from(Array2::from_shape_fn((len, dim), entry))
    }

    fn lists<F: Float>(
        level: Level,
        keys: &Keys<'_, F>,
        queries: &Rows<'_, F>,
        len: usize,
        k: usize,
    ) -> Vec<Vec<(u32, F)>> {
        let (mut lens, mut found) = (vec![0; len], vec![0; len * k]);
        let mut similarities = vec![F::nan(); len * k];
        let lists =
            Lists { k, lens: lens.iter_mut(), keys: &mut found, similarities: &mut similarities };
        nearest(level, keys, queries, 0..len, None, &|_, _, _| true, lists);
        let neighbor = |at: usize| (found[at], similarities[at]);
        let list = |(query, &len): (usize, &usize)| (query * k..query * k + len).map(neighbor);
        lens.iter().enumerate().map(|list_of| list(list_of).collect()).collect()
    }

    fn check<F: Float>() {
        for (num_queries, num_keys, dim, k) in
            [(1, 1, 1, 1), (5, 97, 3, 7), (67, 193, 17, 10), (130, 211, 33, 300), (31, 96, 8, 2)]
        {
            let ball = Metric::Poincare { curvature: 0.5 / dim as f64 };
            for metric in [Metric::Cosine, Metric::Dot, Metric::Euclidean, ball] {
                let keys = Keys::new(rows::<F>(num_keys, dim, 1), num_keys, metric).unwrap();
                let queries = rows::<F>(num_queries, dim, 2);
                let k = k.min(num_keys);
                // Every key offered, without tiles and bounds.
                let expected: Vec<Vec<(u32, F)>> = (0..num_queries)
                    .map(|query| {
                        let query = keys.prepare(queries.row(query)).unwrap();
                        let candidate = |key| {
                            let similarity = keys.similarity(&query, key);
                            Candidate { similarity, key: key as u32 }
                        };
                        let mut all: Vec<_> = (0..num_keys).map(candidate).collect();
                        all.sort();
                        all.into_iter()
                            .take(k)
                            .map(|found| (found.key, keys.reported(&query, found.similarity)))
                            .collect()
                    })
                    .collect();
                for level in levels() {
                    let found = lists(level, &keys, &queries, num_queries, k);
                    assert_eq!(
                        found, expected,
                        "{metric:?} {num_queries} {num_keys} {dim} {level:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_bits() {
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn few_keys_are_looked_at_twice() {
        // By a bound that is too low the answer would be right, and slow.
        let (len, k) = (4000, 5);
        let keys = Keys::new(rows::<f32>(len, 16, 1), len, Metric::Cosine).unwrap();
        let queries = rows::<f32>(1, 16, 7);
        let search = Search { k, threshold: None, accepts: &|_, _, _| true };
        let unreachable = Search { threshold: Some(f32::INFINITY), ..search };
        let query = keys.prepare(queries.row(0)).unwrap();
        let absolute_error = keys.absolute_error(&query);
        assert!(absolute_error < 1e-5);
        let nearest = BinaryHeap::new();
        let mut lane = Lane { number: 0, query: Some(query), search, nearest, absolute_error };
        assert_eq!(lane.bound(&keys), f32::NEG_INFINITY);
        lane.search = unreachable;
        assert_eq!(lane.bound(&keys), f32::INFINITY);
        lane.search = search;
        for key in 0..len {
            lane.offer(&keys, key);
        }
        let worst = lane.nearest.peek().unwrap().similarity;
        let slack = worst - f64::from(lane.bound(&keys));
        assert!(slack > 0.0 && slack < 2e-5, "{slack}");
    }
}

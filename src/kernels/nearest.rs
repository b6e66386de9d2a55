//! The nearest keys of queries, in tiles of keys × queries: the lanes of a vector are queries.
//!
//! A tile of similarities is computed like a matrix product and compared, one vector at a time, with the
//! similarity that each query needs to improve on its k-th neighbour so far. After the first few tiles,
//! almost no vector has such a lane. If a lane may improve, within the bound on the rounding error, its
//! similarity is computed again in `f64` in a fixed order, and only this value counts. So neither the
//! precision nor the instruction set of the tiles affects the result.

use super::parallel::ranges;
use super::primitives::matmul::{Left, Matrix, PanelRow, Vector, load, panel_width, rows_with};
use super::problem::Rows;
use crate::error::{Error, Result};
use crate::float::{Float, all_finite, try_vec};
use crate::neighbors::{Metric, Neighbor, NeighborSearch};
use fearless_simd::{Level, Simd, SimdBase, SimdMask};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

/// The number of queries in a block and keys in a tile: both stay in the first-level cache.
const QUERIES: usize = 64;
const KEYS: usize = 96;

/// Keys, with the data for their similarities.
#[derive(Debug)]
pub struct Keys<'a, F: Float> {
    rows: Rows<'a, F>,
    metric: Metric,
    /// NaN or infinite for keys that are similar to none.
    norms: Vec<f64>,
    /// The factors that turn the sums of a tile into similarities; NaN for keys with unreliable sums.
    factors: Vec<F>,
    /// The largest finite norm.
    largest: f64,
}

impl<'a, F: Float> Keys<'a, F> {
    pub(crate) fn new(rows: Rows<'a, F>, num_keys: usize, metric: Metric) -> Result<Self> {
        if u32::try_from(num_keys).is_err() {
            return Err(Error::graph("num_keys", format!("at most {}", u32::MAX), num_keys));
        }
        let mut norms = try_vec("keys", &[num_keys], 0.0)?;
        let mut factors = try_vec("keys", &[num_keys], F::zero())?;
        let mut largest = 0.0;
        // Below this, underflow in a sum may not be negligible.
        let smallest = (F::min_positive_value() / F::epsilon()).as_f64();
        for (key, (norm, factor)) in norms.iter_mut().zip(&mut factors).enumerate() {
            *norm = norm_of(rows.row(key));
            *factor = match metric {
                _ if !norm.is_finite() => F::nan(),
                Metric::Cosine if *norm == 0.0 => F::zero(),
                Metric::Cosine if *norm < smallest => F::nan(),
                Metric::Cosine => F::from_f64(norm.recip()),
                Metric::Dot => F::one(),
                Metric::Euclidean => -F::one(),
            };
            largest = if norm.is_finite() { norm.max(largest) } else { largest };
        }
        Ok(Self { rows, metric, norms, factors, largest })
    }

    pub(crate) fn len(&self) -> usize {
        self.norms.len()
    }

    pub(crate) fn dim(&self) -> usize {
        self.rows.slices().columns
    }

    pub(crate) fn metric(&self) -> Metric {
        self.metric
    }

    /// Returns a query in the form for [`similarity`](Self::similarity); `None` if it is similar to no
    /// key.
    pub(crate) fn prepare(&self, query: &[F]) -> Option<Query> {
        let norm = norm_of(query);
        let divisor = if self.metric == Metric::Cosine && norm > 0.0 { norm } else { 1.0 };
        let values = query.iter().map(|value| value.as_f64() / divisor).collect();
        norm.is_finite().then_some(Query { values, norm })
    }

    /// Computes the similarity by which neighbours are chosen, NaN for a key that is similar to none.
    /// Bitwise identical for every instruction set.
    #[inline(always)]
    pub(crate) fn similarity(&self, query: &Query, key: usize) -> f64 {
        let norm = self.norms[key];
        if !norm.is_finite() {
            return f64::NAN;
        }
        let key = self.rows.row(key);
        match self.metric {
            Metric::Cosine if norm == 0.0 => 0.0,
            Metric::Cosine => (sum::<_, F, false>(&query.values, key) / norm).clamp(-1.0, 1.0),
            Metric::Dot => sum::<_, F, false>(&query.values, key),
            Metric::Euclidean => 0.0 - sum::<_, F, true>(&query.values, key),
        }
    }

    /// Returns a point for a key. Its Euclidean distance to the [`query_point`](Self::query_point) of a
    /// query decreases with their similarity. `None` for a key that is similar to none.
    #[cfg(feature = "hnsw")]
    pub(crate) fn key_point(&self, key: usize) -> Option<Vec<F>> {
        let norm = self.norms[key];
        if !norm.is_finite() {
            return None;
        }
        // One more coordinate makes all points unit vectors. For a zero vector the point is orthogonal to
        // all queries, so it is equally far from each.
        let (divisor, last) = match self.metric {
            Metric::Cosine if norm == 0.0 => (1.0, Some(1.0)),
            Metric::Cosine => (norm, Some(0.0)),
            Metric::Dot if self.largest == 0.0 => (1.0, Some(1.0)),
            Metric::Dot => {
                let part = (norm / self.largest).min(1.0);
                (self.largest, Some((1.0 - part * part).sqrt()))
            }
            Metric::Euclidean => (1.0, None),
        };
        let values = self.rows.row(key).iter().map(|value| value.as_f64() / divisor);
        Some(values.chain(last).map(F::from_f64).collect())
    }

    #[cfg(feature = "hnsw")]
    pub(crate) fn query_point(&self, query: &Query) -> Vec<F> {
        // The length of a query does not change the order of dot products.
        let (divisor, last) = match self.metric {
            Metric::Dot if query.norm > 0.0 => (query.norm, Some(0.0)),
            Metric::Cosine | Metric::Dot => (1.0, Some(0.0)),
            Metric::Euclidean => (1.0, None),
        };
        let values = query.values.iter().map(|value| value / divisor);
        values.chain(last).map(F::from_f64).collect()
    }

    /// Returns a bound on the absolute error of the similarities of a tile, in addition to the relative
    /// error [`relative_error`](Self::relative_error). Infinite if a sum may overflow.
    fn absolute_error(&self, query: &Query) -> f64 {
        let underflow = self.dim() as f64 * F::min_positive_value().as_f64();
        // The largest intermediate sum, and the error of the last.
        let (sum, error) = match self.metric {
            Metric::Cosine => (self.largest, self.relative_error()),
            Metric::Dot => {
                let largest = query.norm * self.largest;
                (largest, self.relative_error() * largest)
            }
            Metric::Euclidean => ((query.norm + self.largest).powi(2), 0.0),
        };
        if sum < F::max_value().as_f64() / 8.0 { error + underflow } else { f64::INFINITY }
    }

    /// A sum of d products rounds at most d + 1 times, each by half an epsilon, plus a few times for its
    /// factors and the final multiplication. This is twice the required bound.
    fn relative_error(&self) -> f64 {
        (self.dim() + 8) as f64 * F::epsilon().as_f64()
    }
}

/// A query in `f64`, for cosines divided by its norm.
#[derive(Debug)]
pub(crate) struct Query {
    values: Vec<f64>,
    norm: f64,
}

/// Computes the norm; NaN if a value is not finite.
fn norm_of<F: Float>(row: &[F]) -> f64 {
    let sum_of_squares =
        |scale: f64| row.iter().map(|value| (value.as_f64() / scale).powi(2)).sum::<f64>();
    let sum = sum_of_squares(1.0);
    if (1e-280..1e300).contains(&sum) {
        return sum.sqrt();
    }
    // In f64, squares may overflow or underflow even if the norm does not.
    let scale = row.iter().fold(0.0, |max: f64, value| max.max(value.as_f64().abs()));
    if !all_finite(row) {
        f64::NAN
    } else if scale == 0.0 {
        0.0
    } else {
        scale * sum_of_squares(scale).sqrt()
    }
}

/// Σ qᵢ kᵢ or Σ (qᵢ − kᵢ)² in eight sums, which compilers vectorise.
#[inline(always)]
fn sum<Q: Float, F: Float, const SQUARE: bool>(query: &[Q], key: &[F]) -> Q {
    let term = |query: Q, key: F| {
        let key = Q::from_f64(key.as_f64());
        if SQUARE { (query - key) * (query - key) } else { query * key }
    };
    let len = query.len().min(key.len());
    let (query, key) = (query[..len].chunks_exact(8), key[..len].chunks_exact(8));
    let rest = query.remainder().iter().zip(key.remainder());
    let rest = rest.fold(Q::zero(), |sum, (&query, &key)| sum + term(query, key));
    let mut sums = [Q::zero(); 8];
    for (query, key) in query.zip(key) {
        for lane in 0..8 {
            sums[lane] += term(query[lane], key[lane]);
        }
    }
    sums.into_iter().sum::<Q>() + rest
}

/// |a − b|² for two rows, bitwise identical for every instruction set.
#[cfg(feature = "hnsw")]
pub(super) fn squared_distance<F: Float>(level: Level, a: &[F], b: &[F]) -> F {
    #[inline(always)]
    fn run<S: Simd, F: Float>(_: S, a: &[F], b: &[F]) -> F {
        sum::<F, F, true>(a, b)
    }
    dispatch!(level, simd => run(simd, a, b))
}

/// A candidate key; the greatest is dropped first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) similarity: f64,
    pub(crate) key: u32,
}

impl Candidate {
    pub(crate) fn into_neighbor<F: Float>(self) -> Neighbor<F> {
        Neighbor { key: self.key as usize, similarity: F::from_f64(self.similarity) }
    }
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
    /// Adds the neighbours of the next query, at most k.
    ///
    /// # Panics
    /// If there is no next query.
    pub(crate) fn push(&mut self, neighbors: impl Iterator<Item = Neighbor<F>>) {
        let (keys, rest) = std::mem::take(&mut self.keys).split_at_mut(self.k);
        self.keys = rest;
        let (similarities, rest) = std::mem::take(&mut self.similarities).split_at_mut(self.k);
        self.similarities = rest;
        let len = self.lens.next().expect("one list for each query");
        for (place, found) in keys.iter_mut().zip(similarities).zip(neighbors) {
            // A key out of range stays out of range.
            *place.0 = u32::try_from(found.key).unwrap_or(u32::MAX);
            *place.1 = found.similarity;
            *len += 1;
        }
    }
}

/// A query of a block, and the best keys so far.
struct Lane<'s, F: Float> {
    number: usize,
    /// `None` for a query that is similar to no key.
    query: Option<Query>,
    search: &'s NeighborSearch<'s, F>,
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
        let found = Neighbor { key, similarity: F::from_f64(candidate.similarity) };
        if !self.search.accepts(self.number, found) {
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
        let threshold = self.search.threshold.map_or(f64::NEG_INFINITY, Float::as_f64);
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
        search: &'s NeighborSearch<'s, F>,
    ) -> Self {
        let width = rows.len().next_multiple_of(panel_width::<S, F>());
        let mut packed = vec![F::zero(); keys.dim() * width];
        let lane = |(lane, number)| {
            let query = keys.prepare(queries.row(number));
            if let Some(query) = &query {
                for (packed, &value) in packed.chunks_exact_mut(width).zip(&query.values) {
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
        let factors = &keys.factors[tile.clone()];
        let (rows, dim) = (keys.rows.rows(tile.clone()), keys.dim());
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

/// Pushes the neighbours of some queries.
pub(super) fn nearest<F: Float>(
    level: Level,
    keys: &Keys<'_, F>,
    queries: &Rows<'_, F>,
    rows: Range<usize>,
    search: &NeighborSearch<'_, F>,
    mut lists: Lists<'_, F>,
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        keys: &Keys<'_, F>,
        queries: &Rows<'_, F>,
        rows: Range<usize>,
        search: &NeighborSearch<'_, F>,
        lists: &mut Lists<'_, F>,
    ) {
        for block in ranges(rows.len(), QUERIES) {
            let block = rows.start + block.start..rows.start + block.end;
            let mut block = Block::new(simd, keys, queries, block, search);
            for tile in ranges(keys.len(), KEYS) {
                match keys.metric {
                    Metric::Euclidean => block.visit::<S, true>(simd, keys, tile),
                    Metric::Cosine | Metric::Dot => block.visit::<S, false>(simd, keys, tile),
                }
            }
            for lane in block.lanes {
                let nearest = lane.nearest.into_sorted_vec().into_iter();
                lists.push(nearest.map(Candidate::into_neighbor));
            }
        }
    }
    dispatch!(level, simd => run(simd, keys, queries, rows, search, &mut lists));
}

#[cfg(test)]
mod tests {
    use super::*;
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
    ) -> Vec<Vec<Neighbor<F>>> {
        let (mut lens, mut found) = (vec![0; len], vec![0; len * k]);
        let mut similarities = vec![F::nan(); len * k];
        let lists =
            Lists { k, lens: lens.iter_mut(), keys: &mut found, similarities: &mut similarities };
        nearest(level, keys, queries, 0..len, &NeighborSearch::new(k), lists);
        let neighbor =
            |at: usize| Neighbor { key: found[at] as usize, similarity: similarities[at] };
        let list = |(query, &len): (usize, &usize)| (query * k..query * k + len).map(neighbor);
        lens.iter().enumerate().map(|list_of| list(list_of).collect()).collect()
    }

    fn check<F: Float>() {
        for (num_queries, num_keys, dim, k) in
            [(1, 1, 1, 1), (5, 97, 3, 7), (67, 193, 17, 10), (130, 211, 33, 300), (31, 96, 8, 2)]
        {
            for metric in [Metric::Cosine, Metric::Dot, Metric::Euclidean] {
                let keys = Keys::new(rows::<F>(num_keys, dim, 1), num_keys, metric).unwrap();
                let queries = rows::<F>(num_queries, dim, 2);
                let k = k.min(num_keys);
                // Every key offered, without tiles and bounds.
                let expected: Vec<Vec<Neighbor<F>>> = (0..num_queries)
                    .map(|query| {
                        let query = keys.prepare(queries.row(query)).unwrap();
                        let candidate = |key| {
                            let similarity = keys.similarity(&query, key);
                            Candidate { similarity, key: key as u32 }
                        };
                        let mut all: Vec<_> = (0..num_keys).map(candidate).collect();
                        all.sort();
                        all.into_iter().take(k).map(Candidate::into_neighbor).collect()
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
        let search = NeighborSearch::new(k);
        let unreachable = search.threshold(f32::INFINITY);
        let query = keys.prepare(queries.row(0)).unwrap();
        let absolute_error = keys.absolute_error(&query);
        assert!(absolute_error < 1e-5);
        let nearest = BinaryHeap::new();
        let mut lane =
            Lane { number: 0, query: Some(query), search: &search, nearest, absolute_error };
        assert_eq!(lane.bound(&keys), f32::NEG_INFINITY);
        lane.search = &unreachable;
        assert_eq!(lane.bound(&keys), f32::INFINITY);
        lane.search = &search;
        for key in 0..len {
            lane.offer(&keys, key);
        }
        let worst = lane.nearest.peek().unwrap().similarity;
        let slack = worst - f64::from(lane.bound(&keys));
        assert!(slack > 0.0 && slack < 2e-5, "{slack}");
    }

    #[test]
    fn norms_neither_overflow_nor_underflow_on_the_way() {
        assert_eq!((norm_of(&[3f32, -4.0]), norm_of(&[0.0f32, -0.0])), (5.0, 0.0));
        for scale in [1e200, 1e-200] {
            assert!((norm_of(&[3.0 * scale, -4.0 * scale]) / (5.0 * scale) - 1.0).abs() < 1e-15);
        }
        assert!(norm_of(&[1.0, f64::NAN]).is_nan() && norm_of(&[f32::INFINITY]).is_nan());
    }
}

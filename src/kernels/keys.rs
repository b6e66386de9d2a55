//! Keys and their similarities to queries: exact ones in `f64`, and quick ones for a list of keys.

use super::primitives::matmul::Vector;
use super::problem::Rows;
use crate::dropout::mix;
use crate::element::all_finite;
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::prefetch::prefetch;
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{ArrayView1, ArrayView2};
use std::ops::Range;

/// The measure of similarity of two vectors; larger is nearer.
///
/// A vector with NaN or an infinity, or with a norm that is not finite, is similar to none: as a key it
/// is never found, as a query it has no neighbours.
///
/// ```
/// use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
/// use graph_attention::ndarray::array;
///
/// let keys = array![[1.0, 0.0], [3.0, 3.0]];
/// let query = array![[2.0, 0.0]];
/// for (metric, similarities) in [
///     (Metric::Cosine, [1.0, 0.5f64.sqrt()]),
///     (Metric::Dot, [2.0, 6.0]),
///     (Metric::Euclidean, [-1.0, -10.0]),
/// ] {
///     let index = ExactIndex::new(keys.view(), metric)?;
///     for neighbor in index.search(query.view(), &NeighborSearch::new(2))?.row(0) {
///         assert!((neighbor.similarity - similarities[neighbor.key]).abs() < 1e-12);
///     }
/// }
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Metric {
    /// q · k / (|q| |k|), from −1 to 1. A zero vector has similarity 0 to all.
    Cosine,
    /// q · k.
    Dot,
    /// −|q − k|², the negative of the squared Euclidean distance.
    Euclidean,
    /// −d(q, k), the negative of the distance in the Poincaré ball of curvature −c, with
    /// d = arcosh(1 + 2c |q − k|² / ((1 − c |q|²) (1 − c |k|²))) / √c, as in
    /// [`geometry::poincare::distance`](crate::geometry::poincare::distance).
    ///
    /// A vector outside the ball is similar to none. Neighbours are chosen by the quotient, not by Lorentz
    /// products of lifted points, in which the distance between near points far from the origin cancels.
    Poincare {
        /// c, positive.
        curvature: f64,
    },
}

/// Keys, with the data for their similarities.
#[derive(Clone, Debug)]
pub struct Keys<'a, F: Float> {
    rows: Rows<'a, F>,
    metric: Metric,
    /// NaN or infinite for keys that are similar to none.
    norms: Vec<f64>,
    /// The factors that turn the sums of a tile into similarities; NaN for keys with unreliable sums.
    factors: Vec<F>,
    /// The largest finite norm and factor.
    largest: f64,
    largest_factor: f64,
}

impl<'a, F: Float> Keys<'a, F> {
    pub(crate) fn new(rows: Rows<'a, F>, num_keys: usize, metric: Metric) -> Result<Self> {
        if let Metric::Poincare { curvature } = metric
            && !(curvature > 0.0 && curvature.is_finite())
        {
            return Err(Error::config("curvature", "a positive finite number", curvature));
        }
        let (norms, factors) = (Vec::new(), Vec::new());
        let mut keys = Self { rows, metric, norms, factors, largest: 0.0, largest_factor: 0.0 };
        keys.reserve(num_keys)?;
        keys.measure(num_keys);
        Ok(keys)
    }

    fn reserve(&mut self, num_keys: usize) -> Result<()> {
        if u32::try_from(num_keys).is_err() {
            return Err(Error::graph("num_keys", format!("at most {}", u32::MAX), num_keys));
        }
        let more = num_keys - self.len();
        let reserved = self.norms.try_reserve(more);
        if reserved.and_then(|()| self.factors.try_reserve(more)).is_err() {
            return Err(Error::TooLarge { what: "keys", shape: vec![num_keys, self.dim()] });
        }
        Ok(())
    }

    /// Computes the data of the rows that have none yet.
    fn measure(&mut self, num_keys: usize) {
        // Below this, underflow in a sum may not be negligible.
        let smallest = (F::min_positive_value() / F::epsilon()).as_f64();
        for key in self.norms.len()..num_keys {
            let norm = self.norm_of(self.rows.row(key));
            let factor = match self.metric {
                _ if !norm.is_finite() => F::nan(),
                Metric::Cosine if norm == 0.0 => F::zero(),
                Metric::Cosine if norm < smallest => F::nan(),
                Metric::Cosine => F::from_f64(norm.recip()),
                Metric::Dot => F::one(),
                Metric::Euclidean => -F::one(),
                Metric::Poincare { .. } => F::from_f64(-self.gap(norm).recip()),
            };
            if norm.is_finite() {
                self.largest = self.largest.max(norm);
                self.largest_factor = self.largest_factor.max(factor.as_f64().abs());
            }
            self.norms.push(norm);
            self.factors.push(factor);
        }
    }

    /// Adds keys after the others.
    pub(crate) fn extend(&mut self, keys: ArrayView2<'_, F>) -> Result<()> {
        let num_keys = self.len() + keys.nrows();
        self.reserve(num_keys)?;
        self.rows.extend("keys", self.len(), keys)?;
        self.measure(num_keys);
        Ok(())
    }

    /// Makes a key similar to none.
    pub(crate) fn hide(&mut self, key: usize) {
        self.norms[key] = f64::NAN;
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

    pub(crate) fn rows(&self, keys: Range<usize>) -> &[F] {
        self.rows.rows(keys)
    }

    #[inline(always)]
    pub(crate) fn row(&self, key: u32) -> &[F] {
        self.rows.row(key as usize)
    }

    pub(crate) fn factors(&self, keys: Range<usize>) -> &[F] {
        &self.factors[keys]
    }

    /// Whether similarities come from sums of squared differences, not of products.
    pub(crate) fn squares(&self) -> bool {
        matches!(self.metric, Metric::Euclidean | Metric::Poincare { .. })
    }

    /// Whether a key is similar to any vector.
    pub(crate) fn is_visible(&self, key: usize) -> bool {
        self.norms[key].is_finite()
    }

    /// Whether the key's [scores](scores) neither overflow nor underflow.
    pub(crate) fn is_ordinary(&self, key: usize) -> bool {
        let norm = self.norms[key];
        norm == 0.0 || ORDINARY.contains(&norm)
    }

    /// A number that equal keys share.
    pub(crate) fn hash(&self, key: u32) -> u64 {
        // −0 equals 0.
        let bits = |value: &F| (value.as_f64() + 0.0).to_bits();
        self.row(key).iter().fold(0, |hash, value| mix(hash ^ bits(value)))
    }

    /// Returns a query in the form for [`similarity`](Self::similarity); `None` if it is similar to no
    /// key.
    pub(crate) fn prepare(&self, query: &[F]) -> Option<Query> {
        let norm = self.norm_of(query);
        let divisor = if self.metric == Metric::Cosine && norm > 0.0 { norm } else { 1.0 };
        let values = query.iter().map(|value| value.as_f64() / divisor).collect();
        norm.is_finite().then_some(Query { values, norm })
    }

    /// As [`prepare`](Self::prepare), for any layout.
    pub(crate) fn prepare_row(&self, query: ArrayView1<'_, F>) -> Option<Query> {
        match query.as_slice() {
            Some(query) => self.prepare(query),
            None => self.prepare(&query.to_vec()),
        }
    }

    /// Computes the number by which neighbours are chosen, NaN for a key that is similar to none.
    /// [`reported`](Self::reported) converts it to the similarity. Bitwise identical for every
    /// instruction set.
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
            Metric::Poincare { .. } => 0.0 - sum::<_, F, true>(&query.values, key) / self.gap(norm),
        }
    }

    /// Converts to the units of the metric.
    pub(crate) fn reported(&self, query: &Query, similarity: f64) -> F {
        let Metric::Poincare { curvature } = self.metric else { return F::from_f64(similarity) };
        // arcosh(1 + x) without cancellation.
        let x = -2.0 * curvature * similarity / self.gap(query.norm);
        F::from_f64(0.0 - (x + (x * (x + 2.0)).sqrt()).ln_1p() / curvature.sqrt())
    }

    /// Converts the smallest accepted similarity back. The result may be slightly too small.
    pub(crate) fn needed(&self, query: &Query, threshold: F) -> f64 {
        let Metric::Poincare { curvature } = self.metric else { return threshold.as_f64() };
        // The reported distance is rounded.
        let distance = -threshold.as_f64().min(0.0) * (1.0 + 16.0 * F::epsilon().as_f64());
        let sinh = (distance * curvature.sqrt() / 2.0).sinh();
        -sinh * sinh * self.gap(query.norm) / curvature
    }

    /// 1 − c r², for a point of the Poincaré ball at this distance from the origin.
    fn gap(&self, norm: f64) -> f64 {
        let Metric::Poincare { curvature } = self.metric else { return 1.0 };
        let norm = norm * curvature.sqrt();
        (1.0 - norm) * (1.0 + norm)
    }

    /// Returns a bound on the absolute error of the similarities of a tile, in addition to the relative
    /// error [`relative_error`](Self::relative_error). Infinite if a sum may overflow.
    pub(crate) fn absolute_error(&self, query: &Query) -> f64 {
        let underflow = self.dim() as f64 * F::min_positive_value().as_f64();
        // The largest intermediate sum, and the error of the last.
        let (sum, error) = match self.metric {
            Metric::Cosine => (self.largest, self.relative_error()),
            Metric::Dot => {
                let largest = query.norm * self.largest;
                (largest, self.relative_error() * largest)
            }
            Metric::Euclidean => ((query.norm + self.largest).powi(2), 0.0),
            Metric::Poincare { .. } => {
                let sum = (query.norm + self.largest).powi(2);
                (sum * self.largest_factor.max(1.0), underflow * self.largest_factor)
            }
        };
        if sum < F::max_value().as_f64() / 8.0 { error + underflow } else { f64::INFINITY }
    }

    /// A sum of d products rounds at most d + 1 times, each by half an epsilon, plus a few times for its
    /// factors and the final multiplication. This is twice the required bound.
    pub(crate) fn relative_error(&self) -> f64 {
        (self.dim() + 8) as f64 * F::epsilon().as_f64()
    }

    /// Computes the norm; NaN if a value is not finite, or if the vector is not in the ball.
    fn norm_of(&self, row: &[F]) -> f64 {
        let norm = norm_of(row);
        if self.gap(norm) > 0.0 { norm } else { f64::NAN }
    }
}

/// A query in `f64`, for cosines divided by its norm.
#[derive(Debug)]
pub(crate) struct Query {
    values: Vec<f64>,
    norm: f64,
}

impl Query {
    pub(crate) fn values(&self) -> &[f64] {
        &self.values
    }

    /// Returns the query for [`scores`], or `None` if they would overflow, underflow or all be zero.
    pub(crate) fn point<F: Float>(&self, keys: &Keys<'_, F>) -> Option<Vec<F>> {
        let is_origin = self.norm == 0.0 && keys.squares();
        let values = || self.values.iter().map(|&value| F::from_f64(value)).collect();
        (is_origin || ORDINARY.contains(&self.norm)).then(values)
    }
}

/// The norms whose squares are far from the ends of the range of `f32`.
const ORDINARY: Range<f64> = 1e-15..1e15;

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
    let len = query.len().min(key.len());
    let (query, key) = (query[..len].chunks_exact(8), key[..len].chunks_exact(8));
    let rest = query.remainder().iter().zip(key.remainder());
    let rest = rest.fold(Q::zero(), |sum, (&q, &k)| sum + term::<_, _, SQUARE>(q, k));
    let mut sums = [Q::zero(); 8];
    for (query, key) in query.zip(key) {
        for lane in 0..8 {
            sums[lane] += term::<_, _, SQUARE>(query[lane], key[lane]);
        }
    }
    sums.into_iter().sum::<Q>() + rest
}

#[inline(always)]
fn term<Q: Float, F: Float, const SQUARE: bool>(query: Q, key: F) -> Q {
    let key = Q::from_f64(key.as_f64());
    if SQUARE { (query - key) * (query - key) } else { query * key }
}

/// The number of sums of [`quick_sum`]: at least one vector of every instruction set. A constant, so that the
/// result does not depend on the set.
const LANES: usize = 16;

/// As [`sum`], in the element's own precision, and faster for long rows.
#[inline(always)]
fn quick_sum<S: Simd, F: Float, const SQUARE: bool>(simd: S, query: &[F], key: &[F]) -> F {
    let len = query.len().min(key.len());
    let (query, key) = (query[..len].chunks_exact(LANES), key[..len].chunks_exact(LANES));
    let rest = sum::<_, _, SQUARE>(query.remainder(), key.remainder());
    let width = Vector::<S, F>::LEN;
    let mut count = LANES / width;
    let mut sums = [Vector::<S, F>::splat(simd, F::zero()); LANES];
    for (query, key) in query.zip(key) {
        for (i, sum) in sums[..count].iter_mut().enumerate() {
            let query = Vector::<S, F>::from_slice(simd, &query[i * width..][..width]);
            let key = Vector::<S, F>::from_slice(simd, &key[i * width..][..width]);
            let term = if SQUARE { (query - key) * (query - key) } else { query * key };
            *sum += term;
        }
    }
    // The upper half of the lanes is added to the lower half until one is left.
    while count > 1 {
        count /= 2;
        for i in 0..count {
            sums[i] += sums[i + count];
        }
    }
    let mut lanes = [F::zero(); LANES];
    sums[0].store_slice(&mut lanes[..width]);
    let mut half = width / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0] + rest
}

/// A vector that is compared with keys, and a positive factor of its scores.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'o, F> {
    pub(crate) values: &'o [F],
    pub(crate) factor: F,
}

impl<'o, F: Float> Origin<'o, F> {
    pub(crate) fn of_query(values: &'o [F]) -> Self {
        Self { values, factor: F::one() }
    }

    /// The scores of two keys are the same in both directions.
    pub(crate) fn of_key(keys: &'o Keys<'_, F>, key: u32) -> Self {
        Self { values: keys.row(key), factor: keys.factors[key as usize].abs() }
    }
}

/// The number of rows that are prefetched at a time: with all links of a key, but not so many that they leave
/// the cache before they are used.
const PREFETCHED: usize = 32;

/// Overwrites `scores` with the similarities of keys in the element's own precision, times the factor.
/// Bitwise identical for every instruction set.
pub(super) fn scores<F: Float>(
    level: Level,
    keys: &Keys<'_, F>,
    origin: Origin<'_, F>,
    ids: &[u32],
    scores: &mut Vec<f32>,
) {
    #[inline(always)]
    fn run<S: Simd, F: Float, const SQUARE: bool>(
        simd: S,
        keys: &Keys<'_, F>,
        origin: Origin<'_, F>,
        ids: &[u32],
        scores: &mut [f32],
    ) {
        for (ids, scores) in ids.chunks(PREFETCHED).zip(scores.chunks_mut(PREFETCHED)) {
            // Rows may be far apart in memory.
            for &id in ids {
                prefetch(keys.row(id));
            }
            for (&id, score) in ids.iter().zip(scores) {
                let sum = quick_sum::<S, F, SQUARE>(simd, origin.values, keys.row(id));
                *score = (keys.factors[id as usize] * origin.factor * sum).as_f64() as f32;
            }
        }
    }
    scores.resize(ids.len(), 0.0);
    if keys.squares() {
        dispatch!(level, simd => run::<_, F, true>(simd, keys, origin, ids, scores));
    } else {
        dispatch!(level, simd => run::<_, F, false>(simd, keys, origin, ids, scores));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_neither_overflow_nor_underflow_on_the_way() {
        assert_eq!((norm_of(&[3f32, -4.0]), norm_of(&[0.0f32, -0.0])), (5.0, 0.0));
        for scale in [1e200, 1e-200] {
            assert!((norm_of(&[3.0 * scale, -4.0 * scale]) / (5.0 * scale) - 1.0).abs() < 1e-15);
        }
        assert!(norm_of(&[1.0, f64::NAN]).is_nan() && norm_of(&[f32::INFINITY]).is_nan());
    }

    #[test]
    fn scores_are_the_similarities_with_the_same_bits_for_every_instruction_set() {
        for dim in [1, 7, 8, 31, 32, 75, 128] {
            let entry = |(i, j)| ((i * 37 + j * 11) * 53 % 101) as f32 / 101.0 - 0.5;
            let matrix = ndarray::Array2::from_shape_fn((19, dim), entry);
            let ball = Metric::Poincare { curvature: 2.0 / dim as f64 };
            for metric in [Metric::Cosine, Metric::Dot, Metric::Euclidean, ball] {
                let keys = Keys::new(Rows::from(matrix.clone()), 19, metric).unwrap();
                let query = keys.prepare_row(matrix.row(3)).unwrap();
                let point = query.point(&keys).unwrap();
                let ids: Vec<u32> = (0..19).rev().collect();
                let mut expected = None;
                for level in crate::kernels::levels() {
                    let mut found = Vec::new();
                    scores(level, &keys, Origin::of_query(&point), &ids, &mut found);
                    for (&id, &score) in ids.iter().zip(&found) {
                        let exact = keys.similarity(&query, id as usize);
                        assert!((f64::from(score) - exact).abs() < 1e-5 * exact.abs().max(1.0));
                    }
                    assert_eq!(expected.get_or_insert(found.clone()), &found, "{level:?}");
                }
            }
        }
    }
}

//! Attention with a kernel φ(q)·φ(k): the sums over keys are computed once for all queries.
//!
//! Rows are processed a chunk at a time: their products with the projection, features, and the products
//! of those with the sums. So only one chunk of the keys × features is stored.
//!
//! Exponential features have exponents, in units of ln 2, that would overflow. Exponents of the keys are
//! relative to the largest of each feature, and exponents of a query are relative to the largest sum of
//! its own and the keys' exponents: both cancel in the quotient, and no denominator is less than 1. With
//! a causal pattern the largest exponents are those up to a chunk's end, so that an earlier row may
//! underflow: it is reported, and the caller sums it pair by pair.

mod backward;
mod causal;
mod chunk;
mod forward;
mod products;

pub(crate) use backward::FeatureGradients;
pub(super) use backward::{backward, keys_backward, queries_backward};
pub(super) use causal::{backward as causal_backward, forward as causal_forward};
pub(super) use forward::{forward, sum_keys};

use super::parallel::ranges;
use super::primitives::compensated::{self, TERMS_OF_SUM};
use super::primitives::matmul::Target;
use super::problem::Rows;
use crate::inputs::{Inputs, head_columns};
use crate::kernels::Float;
use chunk::Chunk;
use ndarray::{Array2, ArrayView2};
use products::{add_scaled, transposed_product};

/// How features are computed from E = W x and h = scale |x|².
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Map<F> {
    /// 2^{E − h}.
    Exponential,
    /// 2^{E − h} and 2^{−E − h}.
    Both,
    /// 2^h cos E and 2^h sin E.
    Circular,
    /// max(E, 0) + ε.
    Relu(F),
    /// x + 1 for x ≥ 0, else e^x; without a projection.
    Elu,
}

impl<F: Float> Map<F> {
    /// Returns the number of features for the given number of columns of E.
    pub(crate) fn num_features(self, columns: usize) -> usize {
        match self {
            Self::Both | Self::Circular => 2 * columns,
            _ => columns,
        }
    }

    /// Whether features are powers of two, each with its own exponent.
    pub(crate) fn is_exponential(self) -> bool {
        matches!(self, Self::Exponential | Self::Both | Self::Elu)
    }
}

/// Inputs of attention with features.
#[derive(Debug)]
pub struct FeatureProblem<'p, F: Float> {
    pub(crate) inputs: Inputs<'p, F>,
    pub(crate) query: Rows<'p, F>,
    pub(crate) key: Rows<'p, F>,
    pub(crate) value: Rows<'p, F>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// The numbers of columns of a head of queries and keys, and of values.
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) map: Map<F>,
    /// W, transposed: dim × columns of E.
    pub(crate) projection: Array2<F>,
    /// The factor of |x|².
    pub(crate) square_scale: F,
    /// The keys that no mask hides, ascending.
    pub(crate) keys: Vec<usize>,
    /// Whether the backward pass computes the gradient of the projection; otherwise it is zeros.
    pub(crate) wants_projection: bool,
}

impl<F: Float> FeatureProblem<'_, F> {
    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features(self.projection.ncols())
    }

    pub(crate) fn query(&self, query: usize, head: usize) -> &[F] {
        &self.query.row(query)[head_columns(head, self.dim)]
    }

    pub(crate) fn key(&self, key: usize, kv_head: usize) -> &[F] {
        &self.key.row(key)[head_columns(kv_head, self.dim)]
    }

    pub(crate) fn value(&self, key: usize, kv_head: usize) -> &[F] {
        &self.value.row(key)[head_columns(kv_head, self.value_dim)]
    }

    pub(crate) fn kv_head(&self, head: usize) -> usize {
        head * self.kv_heads / self.heads
    }

    /// Returns the query heads that read a head of keys.
    fn group(&self, kv_head: usize) -> std::ops::Range<usize> {
        let size = self.heads / self.kv_heads;
        kv_head * size..(kv_head + 1) * size
    }

    /// Returns how many of `keys` the causal pattern leaves visible to a query.
    pub(crate) fn num_seen(&self, query: usize) -> usize {
        let end = self.inputs.num_visible_keys(query);
        self.keys.partition_point(|&key| key < end)
    }

    /// Returns the number of multiplications of one product with the features of all rows.
    fn work(&self) -> usize {
        let rows = self.inputs.num_queries() * self.heads + self.keys.len() * self.kv_heads;
        rows.saturating_mul(self.num_features()).saturating_mul(self.dim.max(self.value_dim))
    }
}

/// Σⱼ φ(kⱼ) vⱼᵀ and Σⱼ φ(kⱼ) of a head, times 2^{−shift} of each feature, compensated.
#[derive(Clone, Debug, PartialEq)]
pub struct KeySums<F> {
    /// The largest exponents, one for each feature; −∞ without keys.
    pub(crate) shifts: Vec<F>,
    /// One for each feature.
    pub(crate) totals: Vec<F>,
    /// Features × padded columns.
    pub(crate) sums: Vec<F>,
    /// The length of a row of the sums.
    pub(crate) stride: usize,
    /// The rounding errors of the totals, and of the sums.
    lacks: [Vec<F>; 2],
}

/// The sums over a chunk of rows of (features times a weight) and (features ⊗ row of a right factor):
/// features, and features × padded columns.
#[derive(Debug, Default)]
struct SumsOfChunk<F> {
    totals: Vec<F>,
    sums: Vec<F>,
    /// The sums of a few rows, starting from zero: adding all rows one by one would lose more digits.
    of_rows: Vec<F>,
}

impl<F: Float> KeySums<F> {
    pub(crate) fn zeros(features: usize, stride: usize) -> Self {
        Self {
            shifts: vec![F::neg_infinity(); features],
            totals: vec![F::zero(); features],
            sums: vec![F::zero(); features * stride],
            stride,
            lacks: [1, stride].map(|columns| vec![F::zero(); features * columns]),
        }
    }

    /// Creates sums with only the shifts.
    fn without_sums(shifts: &[F]) -> Self {
        Self { shifts: shifts.to_vec(), ..Self::zeros(shifts.len(), 0) }
    }

    /// Multiplies the sums of a feature by 2^{old − new} if its shift has grown.
    fn raise(&mut self, feature: usize, shift: F) {
        let old = self.shifts[feature];
        if shift > old {
            self.shifts[feature] = shift;
            self.rescale(feature, (old - shift).exp2());
        }
    }

    /// Multiplies the sums of a feature.
    fn rescale(&mut self, feature: usize, factor: F) {
        let row = feature * self.stride..(feature + 1) * self.stride;
        let [of_totals, of_sums] = &mut self.lacks;
        self.totals[feature] *= factor;
        of_totals[feature] *= factor;
        for sums in [&mut self.sums, of_sums] {
            sums[row.clone()].iter_mut().for_each(|sum| *sum *= factor);
        }
    }

    /// Adds the sums over other keys, `sign` times.
    pub(crate) fn add(&mut self, other: &Self, sign: F) {
        for (feature, &total) in other.totals.iter().enumerate() {
            self.raise(feature, other.shifts[feature]);
            let shift = other.shifts[feature] - self.shifts[feature];
            // Avoid the difference of infinities of two empty sums.
            let factor = if shift < F::zero() { sign * shift.exp2() } else { sign };
            let [of_totals, of_sums] = &mut self.lacks;
            let (sum, lack) = (&mut self.totals[feature], &mut of_totals[feature]);
            compensated::add(sum, lack, F::one(), factor * total);
            let row = feature * self.stride..(feature + 1) * self.stride;
            let sums = self.sums[row.clone()].iter_mut().zip(&mut of_sums[row.clone()]);
            for ((sum, lack), &other) in sums.zip(&other.sums[row]) {
                compensated::add(sum, lack, F::one(), factor * other);
            }
        }
    }

    /// Adds Σ φ rᵀ and Σ w φ over the rows of a chunk, relative to the same shifts: r are the rows of
    /// `right`, and the weights w are 1 if none are given.
    #[inline(never)]
    fn add_chunk(
        &mut self,
        chunk: &Chunk<F>,
        weights: Option<&[F]>,
        right: &[F],
        of_chunk: &mut SumsOfChunk<F>,
    ) {
        dispatch!(chunk.level, _simd => {
                let SumsOfChunk { totals, sums, of_rows } = of_chunk;
                sums.resize(self.sums.len(), F::zero());
                let right = (right, self.stride);
                let target = Target::Overwrite;
                transposed_product(chunk.level, chunk.len, chunk.left(), right, target, sums);
                totals.clear();
                totals.resize(self.totals.len(), F::zero());
                of_rows.resize(self.totals.len(), F::zero());
                for rows in ranges(chunk.len, TERMS_OF_SUM) {
                    of_rows.fill(F::zero());
                    for at in rows {
                        let weight = weights.map_or(F::one(), |weights| weights[at]);
                        add_scaled(of_rows, weight, chunk.row(at));
                    }
                    add_scaled(totals, F::one(), of_rows);
                }
                let [of_totals, of_sums] = &mut self.lacks;
                for (all, lacks, terms) in
                    [(&mut self.totals, of_totals, totals), (&mut self.sums, of_sums, sums)]
                {
                    for ((sum, lack), &mut term) in all.iter_mut().zip(lacks).zip(terms) {
                        compensated::add(sum, lack, F::one(), term);
                    }
                }
        });
    }
}

/// The results of a forward pass, and the gradient of its output.
#[derive(Debug)]
pub struct FeatureUpstream<'u, F: Float> {
    pub(crate) out: ArrayView2<'u, F>,
    /// num_queries × heads.
    pub(crate) denominators: &'u Array2<F>,
    pub(crate) grad_out: ArrayView2<'u, F>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use fearless_simd::Level;
    use ndarray::Array1;

    /// The results of a problem, forward and backward, dense and causal, as one list of numbers.
    fn all(problem: &FeatureProblem<'_, f64>, grad_out: &Array2<f64>, level: Level) -> Array1<f64> {
        let num_queries = problem.inputs.num_queries();
        let mut numbers = Vec::new();
        let mut collect = |out: &Array2<f64>, denominators: &Array2<f64>, grads| {
            let FeatureGradients { query, key, value, projection } = grads;
            for array in [out, denominators, &query, &key, &value, &projection] {
                numbers.extend(array.iter().copied());
            }
        };
        let zeros = || {
            let out = Array2::zeros((num_queries, problem.heads * problem.value_dim));
            (out, Array2::zeros((num_queries, problem.heads)))
        };
        let sums = sum_keys(problem, level);
        let (mut out, mut denominators) = zeros();
        forward(problem, &sums, level, out.view_mut(), &mut denominators);
        let upstream =
            |out, denominators| FeatureUpstream { out, denominators, grad_out: grad_out.view() };
        let grads = backward(problem, &sums, &upstream(out.view(), &denominators), level);
        collect(&out, &denominators, grads.unwrap());

        let (mut out, mut denominators) = zeros();
        let finite = vec![num_queries; problem.kv_heads];
        causal_forward(problem, &finite, level, out.view_mut(), &mut denominators);
        let is_summed = |query: usize, _: usize| problem.num_seen(query) > 0;
        for ((query, _), out) in out.indexed_iter_mut() {
            *out = if is_summed(query, 0) { *out } else { 0.0 };
        }
        let upstream = upstream(out.view(), &denominators);
        let grads = causal_backward(problem, &finite, &upstream, &is_summed, level);
        collect(&out, &denominators, grads.unwrap());
        Array1::from(numbers)
    }

    /// With and without vectors, at sizes around those of panels and chunks.
    #[test]
    fn every_instruction_set_gives_the_same() -> crate::error::Result<()> {
        let entries = |rows: usize, columns: usize, salt: usize| {
            Array2::from_shape_fn((rows, columns), |(i, j)| {
                ((i * 37 + j * 11 + salt) % 23) as f64 / 11.0 - 1.0
            })
        };
        let maps = [Map::Exponential, Map::Both, Map::Circular, Map::Relu(0.1), Map::Elu];
        for (num_queries, num_keys) in [(1, 1), (5, 131), (127, 2), (129, 128), (257, 300)] {
            for (dim, columns, value_dim) in [(1, 1, 1), (5, 7, 3), (3, 33, 17)] {
                for map in maps {
                    let columns = if map == Map::Elu { dim } else { columns };
                    let [query, key] = [(num_queries, 2 * 2), (num_keys, 2)]
                        .map(|(rows, heads)| entries(rows, heads * dim, heads));
                    let value = entries(num_keys, 2 * value_dim, 3);
                    let grad_out = entries(num_queries, 4 * value_dim, 5);
                    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
                    let inputs = inputs.with_grouped_heads(4, 2)?.with_causal();
                    // Exponents and angles of a size at which nothing cancels.
                    let problem = FeatureProblem {
                        inputs,
                        query: Rows::new("query", inputs.query())?,
                        key: Rows::new("key", inputs.key())?,
                        value: Rows::new("value", inputs.value())?,
                        heads: 4,
                        kv_heads: 2,
                        dim,
                        value_dim,
                        map,
                        projection: entries(dim, columns, 4) / (4 * dim) as f64,
                        square_scale: 0.1,
                        keys: (0..num_keys).filter(|key| key % 5 != 3).collect(),
                        wants_projection: true,
                    };
                    let expected = all(&problem, &grad_out, Level::new());
                    let largest = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
                    for level in levels() {
                        let actual = all(&problem, &grad_out, level);
                        for (a, b) in actual.iter().zip(&expected) {
                            let error = (a - b).abs() / largest;
                            assert!(
                                error < 1e-13,
                                "{level:?} {map:?} {num_queries} {num_keys} {dim}: {a} {b}"
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

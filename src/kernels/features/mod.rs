//! Attention by a kernel φ(q)·φ(k): the sums over keys are formed once for all queries.
//!
//! Rows go through a chunk at a time: their products with the projection, features, and the
//! products of those with the sums. So nothing is held of the size of keys × features, but one
//! chunk.
//!
//! Exponential features carry exponents, in units of ln 2, that would overflow. Those of the keys
//! are taken relative to the largest of each feature, those of a query relative to the largest of
//! its own plus the keys': both cancel in the quotient, and no denominator is less than 1. Under a
//! causal pattern the largest are those up to a chunk's end, so that an earlier row may underflow:
//! it is reported, for another to sum pair by pair.

mod backward;
mod causal;
mod chunk;
mod forward;
mod products;

pub(crate) use backward::FeatureGradients;
pub(super) use backward::backward;
pub(super) use causal::{backward as causal_backward, forward as causal_forward};
pub(super) use forward::{forward, sum_keys};

use super::problem::Rows;
use crate::float::Float;
use crate::inputs::{Inputs, head_columns};
use ndarray::{Array2, ArrayView2};

/// How features are made of E = W x, and h = scale |x|².
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
    /// Features of so many columns of E.
    pub(crate) fn num_features(self, columns: usize) -> usize {
        match self {
            Self::Both | Self::Circular => 2 * columns,
            _ => columns,
        }
    }

    /// Whether features are powers of two, each with an exponent of its own.
    pub(crate) fn is_exponential(self) -> bool {
        matches!(self, Self::Exponential | Self::Both | Self::Elu)
    }
}

/// Inputs of attention by features.
#[derive(Debug)]
pub struct FeatureProblem<'p, F: Float> {
    pub(crate) inputs: Inputs<'p, F>,
    pub(crate) query: Rows<'p, F>,
    pub(crate) key: Rows<'p, F>,
    pub(crate) value: Rows<'p, F>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Columns of a head of queries and keys, and of values.
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) map: Map<F>,
    /// W, transposed: dim × columns of E.
    pub(crate) projection: Array2<F>,
    /// What |x|² is multiplied by.
    pub(crate) square_scale: F,
    /// The keys that no mask hides, ascending.
    pub(crate) keys: Vec<usize>,
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

    /// The query heads that read a head of keys.
    fn group(&self, kv_head: usize) -> std::ops::Range<usize> {
        let size = self.heads / self.kv_heads;
        kv_head * size..(kv_head + 1) * size
    }

    /// How many of `keys` the causal pattern shows to a query.
    pub(crate) fn num_seen(&self, query: usize) -> usize {
        let end = self.inputs.num_visible_keys(query);
        self.keys.partition_point(|&key| key < end)
    }

    /// The multiplications of one product with the features of all rows.
    fn work(&self) -> usize {
        let rows = self.inputs.num_queries() * self.heads + self.keys.len() * self.kv_heads;
        rows.saturating_mul(self.num_features()).saturating_mul(self.dim.max(self.value_dim))
    }
}

/// Σⱼ φ(kⱼ) vⱼᵀ and Σⱼ φ(kⱼ) of a head, times 2^{−shift} of each feature.
#[derive(Clone, Debug, PartialEq)]
pub struct KeySums<F> {
    /// The largest exponents, one for each feature; −∞ where there are no keys.
    pub(crate) shifts: Vec<F>,
    /// One for each feature.
    pub(crate) totals: Vec<F>,
    /// Features × padded columns.
    pub(crate) sums: Vec<F>,
    /// Length of a row of them.
    pub(crate) stride: usize,
}

impl<F: Float> KeySums<F> {
    pub(crate) fn zeros(features: usize, stride: usize) -> Self {
        Self {
            shifts: vec![F::neg_infinity(); features],
            totals: vec![F::zero(); features],
            sums: vec![F::zero(); features * stride],
            stride,
        }
    }

    /// Shifts alone.
    fn without_sums(shifts: &[F]) -> Self {
        Self { shifts: shifts.to_vec(), ..Self::zeros(shifts.len(), 0) }
    }

    /// Multiplies the sums of a feature by 2^{old − new} where its shift has grown.
    fn raise(&mut self, feature: usize, shift: F) {
        let old = self.shifts[feature];
        if shift > old {
            self.shifts[feature] = shift;
            let factor = (old - shift).exp2();
            self.totals[feature] *= factor;
            let row = &mut self.sums[feature * self.stride..][..self.stride];
            row.iter_mut().for_each(|sum| *sum *= factor);
        }
    }

    /// Adds the sums over other keys, `sign` times.
    pub(crate) fn add(&mut self, other: &Self, sign: F) {
        for (feature, &total) in other.totals.iter().enumerate() {
            self.raise(feature, other.shifts[feature]);
            let shift = other.shifts[feature] - self.shifts[feature];
            // Not the difference of infinities of two sums over nothing.
            let factor = if shift < F::zero() { sign * shift.exp2() } else { sign };
            self.totals[feature] += factor * total;
            let row = feature * self.stride..(feature + 1) * self.stride;
            for (sum, &other) in self.sums[row.clone()].iter_mut().zip(&other.sums[row]) {
                *sum += factor * other;
            }
        }
    }
}

/// What a forward pass has left, and the gradient of its output.
#[derive(Debug)]
pub struct FeatureUpstream<'u, F: Float> {
    pub(crate) out: ArrayView2<'u, F>,
    /// num_queries × heads.
    pub(crate) denominators: &'u Array2<F>,
    pub(crate) grad_out: ArrayView2<'u, F>,
}

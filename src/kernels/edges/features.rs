//! The features of a tile of pairs, stored feature by feature: the lanes of a vector are pairs. So a
//! few numbers for each pair need no sums across lanes, however few they are.

use super::super::matmul::Vector;
use super::super::problem::Slices;
use crate::float::Float;
use crate::inputs::Pair;
use fearless_simd::{Simd, SimdBase, SimdFloat};

/// A number for each feature and pair of a tile.
pub(super) struct FeatureTile<F> {
    dim: usize,
    /// From feature to feature: whole vectors.
    stride: usize,
    data: Vec<F>,
}

/// A number for each head and feature.
#[derive(Clone)]
pub(super) struct Coefficients<F> {
    /// From head to head: whole vectors.
    pub(super) stride: usize,
    pub(super) data: Vec<F>,
}

impl<F: Float> Coefficients<F> {
    #[inline(always)]
    pub(super) fn zeros<S: Simd>(_: S, heads: usize, dim: usize) -> Self {
        let stride = dim.next_multiple_of(Vector::<S, F>::LEN);
        Self { stride, data: vec![F::zero(); heads * stride] }
    }

    /// From heads × features without gaps.
    #[inline(always)]
    pub(super) fn from_rows<S: Simd>(simd: S, rows: &[F], heads: usize, dim: usize) -> Self {
        let mut coefficients = Self::zeros(simd, heads, dim);
        for head in 0..heads {
            coefficients.data[head * coefficients.stride..][..dim]
                .copy_from_slice(&rows[head * dim..][..dim]);
        }
        coefficients
    }

    #[inline(always)]
    pub(super) fn of_head(&self, head: usize) -> &[F] {
        &self.data[head * self.stride..][..self.stride]
    }
}

/// Sums over pairs for each head and feature, lane by lane.
pub(super) struct FeatureSums<F> {
    dim: usize,
    lanes: Vec<F>,
}

impl<F: Float> FeatureSums<F> {
    #[inline(always)]
    pub(super) fn zeros<S: Simd>(_: S, heads: usize, dim: usize) -> Self {
        Self { dim, lanes: vec![F::zero(); heads * dim * Vector::<S, F>::LEN] }
    }

    pub(super) fn clear(&mut self) {
        self.lanes.fill(F::zero());
    }

    /// The sums.
    #[inline(always)]
    pub(super) fn store<S: Simd>(&self, simd: S, sums: &mut Coefficients<F>) {
        let len = Vector::<S, F>::LEN;
        for (at, lanes) in self.lanes.chunks_exact(len).enumerate() {
            let (head, feature) = (at / self.dim, at % self.dim);
            let lanes = Vector::<S, F>::from_slice(simd, lanes);
            sums.data[head * sums.stride + feature] = lanes.reduce_sum();
        }
    }
}

impl<F: Float> FeatureTile<F> {
    /// For tiles whose heads are `stride` apart.
    pub(super) fn new(dim: usize, stride: usize) -> Self {
        Self { dim, stride, data: vec![F::zero(); dim * stride] }
    }

    #[inline(always)]
    fn column(&self, feature: usize, count: usize) -> &[F] {
        &self.data[feature * self.stride..][..count]
    }

    /// The weights of a feature in [`Columns::add_weighted`](super::super::heads::Columns).
    #[inline(always)]
    pub(super) fn of_feature(&self, feature: usize) -> &[F] {
        self.column(feature, self.stride)
    }

    #[inline(always)]
    pub(super) fn of_feature_mut(&mut self, feature: usize) -> &mut [F] {
        &mut self.data[feature * self.stride..][..self.stride]
    }

    /// The features of some pairs, zeros past them up to a whole vector.
    #[inline(always)]
    pub(super) fn load<S: Simd>(&mut self, _: S, features: Slices<'_, F>, pairs: &[Pair]) {
        if self.dim == 0 {
            return;
        }
        for (t, pair) in pairs.iter().enumerate() {
            let row = features.row(pair.index);
            for (column, &value) in self.data.chunks_exact_mut(self.stride).zip(row) {
                column[t] = value;
            }
        }
        let end = pairs.len().next_multiple_of(Vector::<S, F>::LEN);
        for column in self.data.chunks_exact_mut(self.stride) {
            column[pairs.len()..end].fill(F::zero());
        }
    }

    /// row += what the tile holds for a pair.
    #[inline(always)]
    pub(super) fn add_to(&self, t: usize, row: &mut [F]) {
        for (value, column) in row.iter_mut().zip(self.data.chunks_exact(self.stride)) {
            *value += column[t];
        }
    }

    #[inline(always)]
    pub(super) fn clear(&mut self) {
        self.data.fill(F::zero());
    }

    /// scores[h · stride + t] += Σ coefficients of head h · features of pair t.
    #[inline(always)]
    pub(super) fn add_scores<S: Simd>(
        &self,
        simd: S,
        heads: usize,
        count: usize,
        coefficients: &Coefficients<F>,
        scores: &mut [F],
    ) {
        let len = Vector::<S, F>::LEN;
        let count = count.next_multiple_of(len);
        for head in (0..heads).filter(|_| self.dim > 0) {
            let coefficients = &coefficients.of_head(head)[..self.dim];
            let scores = &mut scores[head * self.stride..][..count];
            for (v, scores) in scores.chunks_exact_mut(len).enumerate() {
                let mut sum = Vector::<S, F>::from_slice(simd, scores);
                let columns = self.data.chunks_exact(self.stride);
                for (&coefficient, column) in coefficients.iter().zip(columns) {
                    let feature = Vector::<S, F>::from_slice(simd, &column[v * len..][..len]);
                    sum = feature.mul_add(Vector::<S, F>::splat(simd, coefficient), sum);
                }
                sum.store_slice(scores);
            }
        }
    }

    /// sums ← factors · sums + Σₜ weights[h · stride + t] · features of pair t. The weights past the
    /// end must be 0.
    #[inline(always)]
    pub(super) fn add_sums<S: Simd>(
        &self,
        simd: S,
        factors: &[F],
        weights: &[F],
        count: usize,
        sums: &mut FeatureSums<F>,
    ) {
        let len = Vector::<S, F>::LEN;
        let count = count.next_multiple_of(len);
        if self.dim == 0 {
            return;
        }
        let sums = sums.lanes.chunks_exact_mut(self.dim * len);
        for ((head, sums), &factor) in sums.enumerate().zip(factors) {
            let weights = &weights[head * self.stride..][..count];
            let factor = Vector::<S, F>::splat(simd, factor);
            for (feature, lanes) in sums.chunks_exact_mut(len).enumerate() {
                let mut sum = Vector::<S, F>::from_slice(simd, lanes) * factor;
                let features = self.column(feature, count).chunks_exact(len);
                for (weights, features) in weights.chunks_exact(len).zip(features) {
                    let features = Vector::<S, F>::from_slice(simd, features);
                    sum = Vector::<S, F>::from_slice(simd, weights).mul_add(features, sum);
                }
                sum.store_slice(lanes);
            }
        }
    }

    /// Feature c of pair t += Σ_h weights[h · stride + t] · coefficients of head h.
    #[inline(always)]
    pub(super) fn add_outer<S: Simd>(
        &mut self,
        simd: S,
        heads: usize,
        count: usize,
        weights: &[F],
        coefficients: &Coefficients<F>,
    ) {
        let len = Vector::<S, F>::LEN;
        let (stride, count) = (self.stride, count.next_multiple_of(len));
        for (feature, column) in self.data.chunks_exact_mut(stride.max(1)).enumerate() {
            for (v, lanes) in column[..count].chunks_exact_mut(len).enumerate() {
                let mut sum = Vector::<S, F>::from_slice(simd, lanes);
                for head in 0..heads {
                    let coefficient = coefficients.data[head * coefficients.stride + feature];
                    let coefficient = Vector::<S, F>::splat(simd, coefficient);
                    let weights = &weights[head * stride + v * len..][..len];
                    sum = coefficient.mul_add(Vector::<S, F>::from_slice(simd, weights), sum);
                }
                sum.store_slice(lanes);
            }
        }
    }
}

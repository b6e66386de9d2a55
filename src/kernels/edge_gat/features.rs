//! The features of a tile of pairs, stored feature by feature: the lanes of a vector are pairs. So even a
//! few numbers per pair need no sums across lanes.

use super::super::primitives::matmul::{Vector, vector_len};
use super::super::primitives::transpose::{add_part, to_columns, transposed};
use super::super::problem::Slices;
use super::super::rows::level_for;
use crate::inputs::Pair;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdFloat};

/// A number for each feature and pair of a tile.
pub(super) struct FeatureTile<F> {
    level: Level,
    dim: usize,
    /// The distance between features, in whole vectors.
    stride: usize,
    data: Vec<F>,
}

/// A number for each head and feature.
pub(super) struct Coefficients<F> {
    /// The distance between heads, in whole vectors.
    pub(super) stride: usize,
    pub(super) data: Vec<F>,
}

impl<F: Float> Coefficients<F> {
    pub(super) fn zeros(level: Level, heads: usize, dim: usize) -> Self {
        let stride = dim.next_multiple_of(vector_len::<F>(level));
        Self { stride, data: vec![F::zero(); heads * stride] }
    }

    /// Creates it from heads × features without gaps.
    pub(super) fn from_rows(level: Level, rows: &[F], heads: usize, dim: usize) -> Self {
        let mut coefficients = Self::zeros(level, heads, dim);
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
    /// The number of lanes of a vector.
    len: usize,
    lanes: Vec<F>,
}

impl<F: Float> FeatureSums<F> {
    pub(super) fn zeros(level: Level, heads: usize, dim: usize) -> Self {
        let len = vector_len::<F>(level);
        Self { dim, len, lanes: vec![F::zero(); heads * dim * len] }
    }

    pub(super) fn clear(&mut self) {
        self.lanes.fill(F::zero());
    }

    /// The sums.
    pub(super) fn store(&self, sums: &mut Coefficients<F>) {
        for (at, lanes) in self.lanes.chunks_exact(self.len).enumerate() {
            let (head, feature) = (at / self.dim, at % self.dim);
            sums.data[head * sums.stride + feature] = lanes.iter().copied().sum();
        }
    }
}

impl<F: Float> FeatureTile<F> {
    /// Creates it for tiles with heads `stride` apart.
    pub(super) fn new(level: Level, dim: usize, stride: usize) -> Self {
        Self { level, dim, stride, data: vec![F::zero(); dim * stride] }
    }

    /// The weights of a feature in [`Columns::add_weighted`](super::super::gathered::Columns).
    #[inline(always)]
    pub(super) fn of_feature(&self, feature: usize) -> &[F] {
        &self.data[feature * self.stride..][..self.stride]
    }

    #[inline(always)]
    pub(super) fn of_feature_mut(&mut self, feature: usize) -> &mut [F] {
        &mut self.data[feature * self.stride..][..self.stride]
    }

    /// Loads the features of some pairs, with zeros up to a whole vector.
    pub(super) fn load(&mut self, features: Slices<'_, F>, pairs: &[Pair]) {
        if self.dim == 0 {
            return;
        }
        let level = level_for::<F>(self.level, [self.dim; 2]);
        let size = [pairs.len(), self.dim];
        let row = |t: usize| features.row(pairs[t].index);
        to_columns(level, size, row, &mut self.data, self.stride);
        let end = self.padded(pairs.len());
        for column in self.data.chunks_exact_mut(self.stride) {
            column[pairs.len()..end].fill(F::zero());
        }
    }

    /// Overwrites the features of the first `count` pairs with zeros, up to a whole vector.
    pub(super) fn clear(&mut self, count: usize) {
        let end = self.padded(count);
        for column in self.data.chunks_exact_mut(self.stride) {
            column[..end].fill(F::zero());
        }
    }

    fn padded(&self, count: usize) -> usize {
        count.next_multiple_of(vector_len::<F>(self.level))
    }

    /// Adds the features of each pair to a row, whose number is that of the pair's slot less `first`.
    #[inline(never)]
    pub(super) fn add_to(&self, slots: &[usize], first: usize, rows: &mut [F]) {
        let dim = self.dim;
        dispatch!(level_for::<F>(self.level, [dim; 2]), simd => transposed(
            simd,
            dim,
            slots.len(),
            #[inline(always)]
            |feature| self.of_feature(feature),
            #[inline(always)]
            |pair, feature, vectors| {
                for (&slot, &vector) in slots[pair..].iter().zip(vectors) {
                    let row = &mut rows[(slot - first) * dim..][..dim];
                    add_part(simd, vector, &mut row[feature..]);
                }
            },
        ));
    }

    /// scores[h · stride + t] += Σ coefficients of head h · features of pair t.
    #[inline(never)]
    pub(super) fn add_scores(
        &self,
        heads: usize,
        count: usize,
        coefficients: &Coefficients<F>,
        scores: &mut [F],
    ) {
        dispatch!(self.level, simd => {
            self.add_scores_in_vectors(simd, heads, count, coefficients, scores);
        });
    }

    #[inline(always)]
    fn add_scores_in_vectors<S: Simd>(
        &self,
        simd: S,
        heads: usize,
        count: usize,
        coefficients: &Coefficients<F>,
        scores: &mut [F],
    ) {
        for start in (0..heads).step_by(4) {
            for lanes in (0..count).step_by(Vector::<S, F>::LEN) {
                if start + 4 <= heads {
                    self.add_scores_block::<S, 4>(simd, start, lanes, coefficients, scores);
                } else {
                    for head in start..heads {
                        self.add_scores_block::<S, 1>(simd, head, lanes, coefficients, scores);
                    }
                }
            }
        }
    }

    /// N heads and a vector of pairs.
    #[inline(always)]
    fn add_scores_block<S: Simd, const N: usize>(
        &self,
        simd: S,
        head: usize,
        pair: usize,
        coefficients: &Coefficients<F>,
        scores: &mut [F],
    ) {
        let (len, stride) = (Vector::<S, F>::LEN, self.stride);
        let mut sums = [Vector::<S, F>::splat(simd, F::zero()); N];
        let mut of_heads = [&coefficients.data[..0]; N];
        for n in 0..N {
            let scores = &scores[(head + n) * stride + pair..][..len];
            sums[n] = Vector::<S, F>::from_slice(simd, scores);
            of_heads[n] = &coefficients.of_head(head + n)[..self.dim];
        }
        for (feature, column) in self.data.chunks_exact(stride).enumerate() {
            let features = Vector::<S, F>::from_slice(simd, &column[pair..][..len]);
            for n in 0..N {
                let coefficient = Vector::<S, F>::splat(simd, of_heads[n][feature]);
                sums[n] = coefficient.mul_add(features, sums[n]);
            }
        }
        for n in 0..N {
            sums[n].store_slice(&mut scores[(head + n) * stride + pair..][..len]);
        }
    }

    /// sums ← factors · sums + Σₜ weights[h · stride + t] · features of pair t. The weights past the
    /// end must be 0.
    #[inline(never)]
    pub(super) fn add_sums(
        &self,
        factors: &[F],
        weights: &[F],
        count: usize,
        sums: &mut FeatureSums<F>,
    ) {
        dispatch!(self.level, simd => {
            self.add_sums_in_vectors(simd, factors, weights, count, sums);
        });
    }

    #[inline(always)]
    fn add_sums_in_vectors<S: Simd>(
        &self,
        simd: S,
        factors: &[F],
        weights: &[F],
        count: usize,
        sums: &mut FeatureSums<F>,
    ) {
        for (head, &factor) in factors.iter().enumerate() {
            let weights = &weights[head * self.stride..][..self.stride];
            for start in (0..self.dim).step_by(4) {
                if start + 4 <= self.dim {
                    let first = head * self.dim + start;
                    self.add_sums_block::<S, 4>(simd, factor, weights, count, [start, first], sums);
                } else {
                    for feature in start..self.dim {
                        let first = head * self.dim + feature;
                        let block = Self::add_sums_block::<S, 1>;
                        block(self, simd, factor, weights, count, [feature, first], sums);
                    }
                }
            }
        }
    }

    /// N features of one head, whose sums start at number `first`.
    #[inline(always)]
    fn add_sums_block<S: Simd, const N: usize>(
        &self,
        simd: S,
        factor: F,
        weights: &[F],
        count: usize,
        [feature, first]: [usize; 2],
        sums: &mut FeatureSums<F>,
    ) {
        let (len, stride) = (Vector::<S, F>::LEN, self.stride);
        let all_lanes = &mut sums.lanes[first * len..][..N * len];
        let factor = Vector::<S, F>::splat(simd, factor);
        let mut lanes = [factor; N];
        for (n, lanes) in lanes.iter_mut().enumerate() {
            *lanes = Vector::<S, F>::from_slice(simd, &all_lanes[n * len..][..len]) * factor;
        }
        let features = &self.data[feature * stride..][..N * stride];
        for pair in (0..count).step_by(len) {
            let weights = Vector::<S, F>::from_slice(simd, &weights[pair..][..len]);
            for (n, lanes) in lanes.iter_mut().enumerate() {
                let features = &features[n * stride + pair..][..len];
                *lanes = Vector::<S, F>::from_slice(simd, features).mul_add(weights, *lanes);
            }
        }
        for (n, lanes) in lanes.iter().enumerate() {
            lanes.store_slice(&mut all_lanes[n * len..][..len]);
        }
    }

    /// Feature c of pair t += Σ_h weights[h · stride + t] · coefficients of head h.
    #[inline(never)]
    pub(super) fn add_outer(
        &mut self,
        heads: usize,
        count: usize,
        weights: &[F],
        coefficients: &Coefficients<F>,
    ) {
        dispatch!(self.level, simd => {
            self.add_outer_in_vectors(simd, heads, count, weights, coefficients);
        });
    }

    #[inline(always)]
    fn add_outer_in_vectors<S: Simd>(
        &mut self,
        simd: S,
        heads: usize,
        count: usize,
        weights: &[F],
        coefficients: &Coefficients<F>,
    ) {
        let len = Vector::<S, F>::LEN;
        for start in (0..self.dim).step_by(4) {
            for lanes in (0..count).step_by(len) {
                if start + 4 <= self.dim {
                    self.add_outer_block::<S, 4>(simd, heads, start, lanes, weights, coefficients);
                } else {
                    for feature in start..self.dim {
                        let block = Self::add_outer_block::<S, 1>;
                        block(self, simd, heads, feature, lanes, weights, coefficients);
                    }
                }
            }
        }
    }

    /// N features and a vector of pairs.
    #[inline(always)]
    fn add_outer_block<S: Simd, const N: usize>(
        &mut self,
        simd: S,
        heads: usize,
        feature: usize,
        pair: usize,
        weights: &[F],
        coefficients: &Coefficients<F>,
    ) {
        let (len, stride) = (Vector::<S, F>::LEN, self.stride);
        let mut sums = [Vector::<S, F>::splat(simd, F::zero()); N];
        for (n, sum) in sums.iter_mut().enumerate() {
            let lanes = &self.data[(feature + n) * stride + pair..][..len];
            *sum = Vector::<S, F>::from_slice(simd, lanes);
        }
        for head in 0..heads {
            let weights = &weights[head * stride + pair..][..len];
            let weights = Vector::<S, F>::from_slice(simd, weights);
            let coefficients = &coefficients.of_head(head)[feature..][..N];
            for n in 0..N {
                let coefficient = Vector::<S, F>::splat(simd, coefficients[n]);
                sums[n] = coefficient.mul_add(weights, sums[n]);
            }
        }
        for (n, sum) in sums.iter().enumerate() {
            sum.store_slice(&mut self.data[(feature + n) * stride + pair..][..len]);
        }
    }
}

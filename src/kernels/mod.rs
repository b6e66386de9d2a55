//! The inner loops, on slices: the only place where speed may cost beauty.
//!
//! The instruction set is chosen at run time by `fearless_simd`, once for each task; every function
//! that computes in vectors is generic over it. Those that work on a vector are `#[inline(always)]`,
//! since a call across the boundary costs ten times the work; those that work on a whole tile of
//! rows enter the instruction set themselves and are called, since inlined everywhere they would make
//! the build take minutes.
//!
//! `matmul`, `exp`, `transpose` and `heads` are the primitives, `linear` makes projections of them, `problem` is
//! softmax attention laid out for them. `dense` walks it in tiles of queries × keys, `rows` row by
//! row, `edges` row by row with features of the pairs; none ever holds more than a tile of logits.
//! `nearest` walks queries × keys in tiles too, and keeps the best keys of each query.
//! What they are checked against is the plain `ScaledDotProduct`, and PyG's answers.

/// Calls `$op` with the token `$simd` of an instruction set, compiled for it.
///
/// `fearless_simd::dispatch!` compiles its argument for every x86 level there is; SSE4.2 is as slow
/// as SSE2 here, and each level costs seconds of build time.
macro_rules! dispatch {
    ($level:expr, $simd:ident => $op:expr) => {{
        let level: fearless_simd::Level = $level;
        #[cfg(target_arch = "x86_64")]
        {
            use fearless_simd::Simd as _;
            if let Some($simd) = level.as_avx512() {
                $simd.vectorize(#[inline(always)] || $op)
            } else if let Some($simd) = level.as_avx2() {
                $simd.vectorize(#[inline(always)] || $op)
            } else if let Some($simd) = level.as_sse2() {
                $simd.vectorize(#[inline(always)] || $op)
            } else {
                without_sse2!(level, $simd => $op)
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            fearless_simd::dispatch!(level, $simd => $op)
        }
    }};
}

/// Every x86-64 has SSE2; with the feature `scalar` tests also run without.
#[cfg(target_arch = "x86_64")]
macro_rules! without_sse2 {
    ($level:expr, $simd:ident => $op:expr) => {
        match $level {
            #[cfg(feature = "scalar")]
            fearless_simd::Level::Fallback($simd) => $op,
            _ => unreachable!("SSE2 is part of x86-64"),
        }
    };
}

pub(crate) mod asinh;
mod buffer;
mod compensated;
pub(crate) mod dense;
pub(crate) mod edges;
pub(crate) mod exp;
pub(crate) mod features;
pub(crate) mod heads;
pub(crate) mod hyperbolic;
pub(crate) mod level;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod nearest;
pub(crate) mod normalizer;
pub(crate) mod parallel;
pub(crate) mod prefetch;
pub(crate) mod problem;
pub(crate) mod rotary;
pub(crate) mod rows;
pub(crate) mod sincos;
#[cfg(test)]
mod softmax_tests;
pub(crate) mod transpose;

use crate::error::Result;
use crate::float::Float;
use crate::gradients::GradientsMut;
use crate::neighbors::NeighborSearch;
use dense::TileSizes;
use edges::{EdgeGradients, EdgeProblem};
use fearless_simd::Level;
use features::{FeatureGradients, FeatureProblem, FeatureUpstream, KeySums};
use hyperbolic::HyperbolicProblem;
use matmul::Target;
use ndarray::{Array1, Array2, ArrayViewMut2};
use nearest::{Keys, Lists};
use normalizer::Normalizer;
use problem::{Problem, Rows, Slices, Upstream};
use rotary::{Rotary, RotaryProblem};
use std::ops::Range;

/// The kernels as methods of their element: so they are compiled in this crate, once for each type
/// and instruction set, and not again in every crate that calls a mechanism.
pub trait Kernels: exp::HasExp + asinh::HasAsinh + sincos::HasSinCos {
    /// [`linear::width`].
    fn panel_width(level: Level) -> usize
    where
        Self: Float;

    /// [`linear::product_rows`].
    fn product_rows(
        level: Level,
        left: &Rows<'_, Self>,
        rows: Range<usize>,
        right: &Array2<Self>,
        target: Target<'_, Self>,
        out: ArrayViewMut2<'_, Self>,
    ) where
        Self: Float;

    /// [`linear::add_transposed_product_rows`].
    fn add_transposed_product(
        level: Level,
        left: &Rows<'_, Self>,
        right: &Rows<'_, Self>,
        rows: Range<usize>,
        sum: ArrayViewMut2<'_, Self>,
    ) where
        Self: Float;

    /// [`nearest::nearest`].
    fn nearest(
        level: Level,
        keys: &Keys<'_, Self>,
        queries: &Rows<'_, Self>,
        rows: Range<usize>,
        search: &NeighborSearch<'_, Self>,
        lists: Lists<'_, Self>,
    ) where
        Self: Float;

    /// [`nearest::squared_distance`].
    #[cfg(feature = "hnsw")]
    fn squared_distance(level: Level, a: &[Self], b: &[Self]) -> Self
    where
        Self: Float;

    /// [`dense::forward`].
    fn dense_forward(
        problem: &Problem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`dense::backward`].
    fn dense_backward(
        problem: &Problem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) where
        Self: Float;

    /// [`rows::forward`].
    fn rows_forward(
        problem: &Problem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`rows::backward`].
    fn rows_backward(
        problem: &Problem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) where
        Self: Float;

    /// [`rows::forward`] with the logits of [`edges`].
    fn edges_forward(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`edges::backward`].
    fn edges_backward(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grad_features: Option<ArrayViewMut2<'_, Self>>,
    ) -> Result<EdgeGradients<Self>>
    where
        Self: Float;

    /// [`rows::weights`] with the logits of [`edges`].
    fn edges_weights(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        normalizer: &Normalizer<Self>,
    ) -> Result<Array2<Self>>
    where
        Self: Float;

    /// [`dense::forward`] with the logits of [`hyperbolic`].
    fn hyperbolic_dense_forward(
        problem: &HyperbolicProblem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`rows::forward`] with the logits of [`hyperbolic`].
    fn hyperbolic_rows_forward(
        problem: &HyperbolicProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`hyperbolic::spread`].
    fn hyperbolic_spread(
        problem: &HyperbolicProblem<'_, Self>,
        directions: Slices<'_, Self>,
        normalizer: &Normalizer<Self>,
        sizes: TileSizes,
        level: Level,
        sums: ArrayViewMut2<'_, Self>,
    ) where
        Self: Float;

    /// [`hyperbolic::backward`].
    fn hyperbolic_rows_backward(
        problem: &HyperbolicProblem<'_, Self>,
        points: &hyperbolic::Points<Self>,
        upstream: &hyperbolic::Upstream<Self>,
        tile_len: usize,
        level: Level,
        wanted: [bool; 2],
        grad_bias: Option<ArrayViewMut2<'_, Self>>,
    ) -> Result<hyperbolic::PointGradients<Self>>
    where
        Self: Float;

    /// [`hyperbolic::dense_backward`].
    fn hyperbolic_dense_backward(
        problem: &HyperbolicProblem<'_, Self>,
        points: &hyperbolic::Points<Self>,
        upstream: &hyperbolic::Upstream<Self>,
        sizes: TileSizes,
        level: Level,
        grad_bias: Option<ArrayViewMut2<'_, Self>>,
    ) -> Result<hyperbolic::PointGradients<Self>>
    where
        Self: Float;

    /// [`features::sum_keys`].
    fn sum_keys(problem: &FeatureProblem<'_, Self>, level: Level) -> Vec<KeySums<Self>>
    where
        Self: Float;

    /// [`features::forward`].
    fn features_forward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        denominators: &mut Array2<Self>,
    ) where
        Self: Float;

    /// [`features::backward`].
    fn features_backward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        upstream: &FeatureUpstream<'_, Self>,
        level: Level,
    ) -> Result<FeatureGradients<Self>>
    where
        Self: Float;

    /// [`features::causal_forward`].
    fn causal_features_forward(
        problem: &FeatureProblem<'_, Self>,
        num_queries: &[usize],
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        denominators: &mut Array2<Self>,
    ) where
        Self: Float;

    /// [`features::causal_backward`].
    fn causal_features_backward(
        problem: &FeatureProblem<'_, Self>,
        num_queries: &[usize],
        upstream: &FeatureUpstream<'_, Self>,
        is_summed: &(dyn Fn(usize, usize) -> bool + Sync),
        level: Level,
    ) -> Result<FeatureGradients<Self>>
    where
        Self: Float;

    /// [`rotary::rotate`].
    fn rotate(
        rotary: &Rotary,
        level: Level,
        positions: &Rows<'_, Self>,
        x: &Rows<'_, Self>,
        out: ArrayViewMut2<'_, Self>,
    ) where
        Self: Float;

    /// [`rotary::rotate_vjp`].
    fn rotate_vjp(
        rotary: &Rotary,
        level: Level,
        positions: &Rows<'_, Self>,
        x: &Rows<'_, Self>,
        grad_out: &Array2<Self>,
        grad_x: Option<ArrayViewMut2<'_, Self>>,
        grad_frequencies: Option<&mut Array2<f64>>,
    ) where
        Self: Float;

    /// [`rows::forward`] with the logits of [`rotary`].
    fn rotary_forward(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) where
        Self: Float;

    /// [`rows::backward`] with the logits of [`rotary`]: returns the gradient of the frequencies.
    fn rotary_backward(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) -> Array1<Self>
    where
        Self: Float;

    /// [`rows::weights`] with the logits of [`rotary`].
    fn rotary_weights(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        normalizer: &Normalizer<Self>,
    ) -> Result<Array2<Self>>
    where
        Self: Float;
}

macro_rules! compile_kernels {
    ($($float:ty),*) => {$(
        impl Kernels for $float {
            fn panel_width(level: Level) -> usize {
                linear::width::<Self>(level)
            }

            fn product_rows(
                level: Level,
                left: &Rows<'_, Self>,
                rows: Range<usize>,
                right: &Array2<Self>,
                target: Target<'_, Self>,
                out: ArrayViewMut2<'_, Self>,
            ) {
                linear::product_rows(level, left, rows, right, target, out);
            }

            fn add_transposed_product(
                level: Level,
                left: &Rows<'_, Self>,
                right: &Rows<'_, Self>,
                rows: Range<usize>,
                sum: ArrayViewMut2<'_, Self>,
            ) {
                linear::add_transposed_product_rows(level, left, right, rows, sum);
            }

            fn nearest(
                level: Level,
                keys: &Keys<'_, Self>,
                queries: &Rows<'_, Self>,
                rows: Range<usize>,
                search: &NeighborSearch<'_, Self>,
                lists: Lists<'_, Self>,
            ) {
                nearest::nearest(level, keys, queries, rows, search, lists);
            }

            #[cfg(feature = "hnsw")]
            fn squared_distance(level: Level, a: &[Self], b: &[Self]) -> Self {
                nearest::squared_distance(level, a, b)
            }

            fn dense_forward(
                problem: &Problem<'_, Self>,
                sizes: TileSizes,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                dense::forward::<_, dense::DotTiles<'_, _>>(problem, sizes, level, out, normalizer);
            }

            fn dense_backward(
                problem: &Problem<'_, Self>,
                sizes: TileSizes,
                level: Level,
                upstream: Upstream<'_, Self>,
                grads: &mut GradientsMut<'_, Self>,
            ) {
                dense::backward(problem, sizes, level, upstream, grads);
            }

            fn rows_forward(
                problem: &Problem<'_, Self>,
                tile_len: usize,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                rows::forward::<_, rows::DotScorer<'_, _>>(problem, tile_len, level, out, normalizer);
            }

            fn rows_backward(
                problem: &Problem<'_, Self>,
                tile_len: usize,
                level: Level,
                upstream: Upstream<'_, Self>,
                grads: &mut GradientsMut<'_, Self>,
            ) {
                let scaled = rows::scaled_queries(problem);
                rows::backward::<_, rows::DotScorer<'_, _>>(
                    problem, &scaled, tile_len, level, upstream, grads,
                );
            }

            fn edges_forward(
                problem: &EdgeProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                rows::forward::<_, edges::EdgeScorer<'_, _>>(
                    problem, tile_len, level, out, normalizer,
                );
            }

            fn edges_backward(
                problem: &EdgeProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                upstream: Upstream<'_, Self>,
                grad_features: Option<ArrayViewMut2<'_, Self>>,
            ) -> Result<EdgeGradients<Self>> {
                edges::backward(problem, tile_len, level, upstream, grad_features)
            }

            fn edges_weights(
                problem: &EdgeProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                normalizer: &Normalizer<Self>,
            ) -> Result<Array2<Self>> {
                rows::weights::<_, edges::EdgeScorer<'_, _>>(problem, tile_len, level, normalizer)
            }

            fn hyperbolic_dense_forward(
                problem: &HyperbolicProblem<'_, Self>,
                sizes: TileSizes,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                dense::forward::<_, hyperbolic::DistanceTiles<'_, _>>(
                    problem, sizes, level, out, normalizer,
                );
            }

            fn hyperbolic_rows_forward(
                problem: &HyperbolicProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                rows::forward::<_, hyperbolic::DistanceScorer<'_, _>>(
                    problem, tile_len, level, out, normalizer,
                );
            }

            fn hyperbolic_spread(
                problem: &HyperbolicProblem<'_, Self>,
                directions: Slices<'_, Self>,
                normalizer: &Normalizer<Self>,
                sizes: TileSizes,
                level: Level,
                sums: ArrayViewMut2<'_, Self>,
            ) {
                hyperbolic::spread(problem, directions, normalizer, sizes, level, sums);
            }

            fn hyperbolic_rows_backward(
                problem: &HyperbolicProblem<'_, Self>,
                points: &hyperbolic::Points<Self>,
                upstream: &hyperbolic::Upstream<Self>,
                tile_len: usize,
                level: Level,
                wanted: [bool; 2],
                grad_bias: Option<ArrayViewMut2<'_, Self>>,
            ) -> Result<hyperbolic::PointGradients<Self>> {
                hyperbolic::backward(problem, points, upstream, tile_len, level, wanted, grad_bias)
            }

            fn hyperbolic_dense_backward(
                problem: &HyperbolicProblem<'_, Self>,
                points: &hyperbolic::Points<Self>,
                upstream: &hyperbolic::Upstream<Self>,
                sizes: TileSizes,
                level: Level,
                grad_bias: Option<ArrayViewMut2<'_, Self>>,
            ) -> Result<hyperbolic::PointGradients<Self>> {
                hyperbolic::dense_backward(problem, points, upstream, sizes, level, grad_bias)
            }

            fn sum_keys(problem: &FeatureProblem<'_, Self>, level: Level) -> Vec<KeySums<Self>> {
                features::sum_keys(problem, level)
            }

            fn features_forward(
                problem: &FeatureProblem<'_, Self>,
                sums: &[KeySums<Self>],
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                denominators: &mut Array2<Self>,
            ) {
                features::forward(problem, sums, level, out, denominators);
            }

            fn features_backward(
                problem: &FeatureProblem<'_, Self>,
                sums: &[KeySums<Self>],
                upstream: &FeatureUpstream<'_, Self>,
                level: Level,
            ) -> Result<FeatureGradients<Self>> {
                features::backward(problem, sums, upstream, level)
            }

            fn causal_features_forward(
                problem: &FeatureProblem<'_, Self>,
                num_queries: &[usize],
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                denominators: &mut Array2<Self>,
            ) {
                features::causal_forward(problem, num_queries, level, out, denominators);
            }

            fn causal_features_backward(
                problem: &FeatureProblem<'_, Self>,
                num_queries: &[usize],
                upstream: &FeatureUpstream<'_, Self>,
                is_summed: &(dyn Fn(usize, usize) -> bool + Sync),
                level: Level,
            ) -> Result<FeatureGradients<Self>> {
                features::causal_backward(problem, num_queries, upstream, is_summed, level)
            }

            fn rotate(
                rotary: &Rotary,
                level: Level,
                positions: &Rows<'_, Self>,
                x: &Rows<'_, Self>,
                out: ArrayViewMut2<'_, Self>,
            ) {
                rotary::rotate(rotary, level, positions, x, out);
            }

            fn rotate_vjp(
                rotary: &Rotary,
                level: Level,
                positions: &Rows<'_, Self>,
                x: &Rows<'_, Self>,
                grad_out: &Array2<Self>,
                grad_x: Option<ArrayViewMut2<'_, Self>>,
                grad_frequencies: Option<&mut Array2<f64>>,
            ) {
                rotary::rotate_vjp(rotary, level, positions, x, grad_out, grad_x, grad_frequencies);
            }

            fn rotary_forward(
                problem: &RotaryProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                out: ArrayViewMut2<'_, Self>,
                normalizer: &mut Normalizer<Self>,
            ) {
                rows::forward::<_, rotary::RotaryScorer<'_, _>>(
                    problem, tile_len, level, out, normalizer,
                );
            }

            fn rotary_backward(
                problem: &RotaryProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                upstream: Upstream<'_, Self>,
                grads: &mut GradientsMut<'_, Self>,
            ) -> Array1<Self> {
                let scaled = rows::scaled_queries(&problem.softmax);
                rows::backward::<_, rotary::RotaryScorer<'_, _>>(
                    problem, &scaled, tile_len, level, upstream, grads,
                )
            }

            fn rotary_weights(
                problem: &RotaryProblem<'_, Self>,
                tile_len: usize,
                level: Level,
                normalizer: &Normalizer<Self>,
            ) -> Result<Array2<Self>> {
                rows::weights::<_, rotary::RotaryScorer<'_, _>>(
                    problem, tile_len, level, normalizer,
                )
            }
        }
    )*};
}

compile_kernels!(f32, f64);

/// Every instruction set that this CPU has, and none at all with the feature `scalar`.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Level> {
    use fearless_simd::Simd;
    let best = Level::new();
    let mut levels = vec![best];
    #[cfg(feature = "scalar")]
    levels.push(Level::fallback());
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(best.as_avx2().map(Simd::level));
        levels.extend(best.as_sse2().map(Simd::level));
    }
    levels
}

//! The inner loops, on slices: the only place where speed is more important than readability.
//!
//! ```text
//! mechanism ── Problem (heads, slices of rows, bias, dropout) ── Kernels for f32, f64
//!                 │
//!     driver: `dense` in tiles of queries × keys, `rows` pair by pair, `performer` through sums over keys
//!                 │  parts of the problem, shared among threads by `parallel`
//!     scorer: how a mechanism computes logits of a tile (dot products, `poincare`, `rotary`, `edge_gat`)
//!                 │
//!     step over one tile: a product (`primitives::matmul`, `gathered`), exponentials, a transpose
//!                 │  here the instruction set is chosen, by `dispatch!`
//!     vectors of fearless_simd
//! ```
//!
//! Drivers and scorers are plain code, compiled once for each type. They pass on the [`Level`] of the
//! CPU, and never store more than a tile of logits. The steps over a tile choose the instruction set
//! themselves, which takes a nanosecond. So only the steps are compiled for each instruction set, and
//! they are called, not inlined. Everything that they call for each vector is `#[inline(always)]`,
//! including closures, because a call across the boundary of an instruction set costs ten times the work.
//!
//! `linear` computes projections with `ndarray`'s products, and `norm` normalises rows. `nearest` also
//! processes queries × keys in tiles, and keeps the best keys of each query; `keys` has similarities of
//! single pairs, also for the links of an HNSW index. All are checked against the plain `ScaledDotProduct`
//! and outputs of PyG.
//!
//! Kernels import `Element`, the description of a problem (`Inputs`, `Graph`, score functions), and the
//! `GradientsMut` that they add to: plain data, which imports nothing from here. Kernels import nothing from
//! `neighbors`, `partial` or the mechanisms, which pass on what they know as numbers, slices and closures.
//! Mechanisms call the kernels as methods of [`Float`].

/// Calls `$op` with the token `$simd` of an instruction set, compiled for it.
///
/// `fearless_simd::dispatch!` would compile its argument for every x86 level; SSE4.2 is as slow as SSE2
/// here, and each level costs seconds of build time.
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

pub(crate) mod dense;
pub(crate) mod edge_gat;
pub(crate) mod gathered;
pub(crate) mod keys;
pub(crate) mod level;
pub(crate) mod linear;
pub(crate) mod nearest;
pub(crate) mod norm;
pub(crate) mod normalizer;
pub(crate) mod parallel;
pub(crate) mod performer;
pub(crate) mod poincare;
pub(crate) mod primitives;
pub(crate) mod problem;
pub(crate) mod rotary;
pub(crate) mod rows;
pub(crate) mod score;
#[cfg(test)]
mod softmax_tests;

use crate::element::Element;
use crate::error::Result;
use crate::gradients::GradientsMut;
use dense::TileSizes;
use edge_gat::{BoxedScore, EdgeGradients, EdgeProblem};
use fearless_simd::Level;
use keys::{Keys, Origin};
use ndarray::{
    Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3,
};
use nearest::Lists;
use normalizer::Normalizer;
use performer::{FeatureGradients, FeatureProblem, FeatureUpstream, KeySums};
use poincare::HyperbolicProblem;
use problem::{Problem, Rows, Slices, Upstream};
use rotary::{Rotary, RotaryProblem};
use std::ops::Range;

/// The element types that mechanisms compute with: `f32` and `f64`.
///
/// `Inputs`, `Gradients` and other data need only [`Element`]. The kernels are what this trait adds.
pub trait Float: Kernels {}
impl Float for f32 {}
impl Float for f64 {}

/// Generates the trait and both implementations from one list.
macro_rules! kernels {
    ($($(#[$attribute:meta])*
    fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $kernel:expr;)*) => {
        /// The kernels as methods of their element type, so that they are compiled in this crate, once
        /// for each type and instruction set, and not again in every crate that calls a mechanism.
        pub trait Kernels:
            Element
            + primitives::buffer::HasPool
            + primitives::exp::HasExp
            + primitives::asinh::HasAsinh
            + primitives::sincos::HasSinCos
        {
            $($(#[$attribute])*
            fn $name($($argument: $type),*) $(-> $result)?
            where
                Self: Float;)*
        }

        impl Kernels for f32 {
            $($(#[$attribute])*
            fn $name($($argument: $type),*) $(-> $result)? {
                $kernel($($argument),*)
            })*
        }

        impl Kernels for f64 {
            $($(#[$attribute])*
            fn $name($($argument: $type),*) $(-> $result)? {
                $kernel($($argument),*)
            })*
        }
    };
}

kernels! {
    /// [`linear::linear`].
    fn linear(
        x: ArrayView2<'_, Self>,
        weight: ArrayView2<'_, Self>,
        bias: Option<ArrayView1<'_, Self>>,
    ) -> Result<Array2<Self>> = linear::linear;

    /// [`linear::linear_into`].
    fn linear_into(
        x: ArrayView2<'_, Self>,
        weight: ArrayView2<'_, Self>,
        bias: Option<ArrayView1<'_, Self>>,
        out: ArrayViewMut2<'_, Self>,
    ) -> Result<()> = linear::linear_into;

    /// [`linear::add_linear`].
    fn add_linear(
        x: ArrayView2<'_, Self>,
        weight: ArrayView2<'_, Self>,
        bias: Option<ArrayView1<'_, Self>>,
        out: ArrayViewMut2<'_, Self>,
    ) -> Result<()> = linear::add_linear;

    /// [`linear::linear_input_vjp`].
    fn linear_input_vjp(
        weight: ArrayView2<'_, Self>,
        grad_out: ArrayView2<'_, Self>,
        grad_x: ArrayViewMut2<'_, Self>,
    ) -> Result<()> = linear::linear_input_vjp;

    /// [`linear::linear_params_vjp`].
    fn linear_params_vjp(
        x: ArrayView2<'_, Self>,
        grad_out: ArrayView2<'_, Self>,
        grad_weight: ArrayViewMut2<'_, Self>,
        grad_bias: Option<ArrayViewMut1<'_, Self>>,
    ) -> Result<()> = linear::linear_params_vjp;

    /// [`nearest::nearest`].
    fn nearest(
        level: Level,
        keys: &Keys<'_, Self>,
        queries: &Rows<'_, Self>,
        rows: Range<usize>,
        threshold: Option<Self>,
        accepts: &(dyn Fn(usize, u32, Self) -> bool + Sync),
        lists: Lists<'_, Self>,
    ) = nearest::nearest;

    /// [`keys::scores`].
    fn scores(
        level: Level,
        keys: &Keys<'_, Self>,
        origin: Origin<'_, Self>,
        ids: &[u32],
        scores: &mut Vec<f32>,
    ) = keys::scores;

    /// [`norm::normalize_into`].
    fn normalize_into(
        norm: norm::RowNorm<'_, Self>,
        x: ArrayView2<'_, Self>,
        out: ArrayViewMut2<'_, Self>,
    ) -> Result<()> = norm::normalize_into;

    /// [`norm::normalize_vjp`].
    fn normalize_vjp(
        norm: norm::RowNorm<'_, Self>,
        x: ArrayView2<'_, Self>,
        grad_out: ArrayView2<'_, Self>,
        grad_x: Option<ArrayViewMut2<'_, Self>>,
        grad_weight: ArrayViewMut1<'_, Self>,
        grad_bias: Option<ArrayViewMut1<'_, Self>>,
    ) -> Result<()> = norm::normalize_vjp;

    /// [`dense::forward`].
    fn dense_forward(
        problem: &Problem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = dense::forward::<_, dense::DotTiles<'_, _>>;

    /// [`dense::dot_backward`].
    fn dense_backward(
        problem: &Problem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) -> Vec<f64> = dense::dot_backward;

    /// [`rows::dot_forward`].
    fn rows_forward(
        problem: &Problem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = rows::dot_forward;

    /// [`rows::dot_backward`].
    fn rows_backward(
        problem: &Problem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) -> Vec<f64> = rows::dot_backward;

    /// [`tanh::soft_cap`](primitives::tanh::soft_cap).
    fn soft_cap(level: Level, cap: Self, logits: &mut [Self]) = primitives::tanh::soft_cap;

    /// [`tanh::soft_cap_vjp`](primitives::tanh::soft_cap_vjp).
    fn soft_cap_vjp(level: Level, cap: Self, logits: &[Self], grads: &mut [Self])
        = primitives::tanh::soft_cap_vjp;

    /// [`rows::forward`] with the logits of [`edge_gat`].
    fn edges_forward(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = rows::forward::<_, edge_gat::EdgeScorer<'_, _>>;

    /// [`edge_gat::scores::gat`].
    fn gat_score(slope: Self, attention: Array2<Self>) -> BoxedScore<Self> = edge_gat::scores::gat;

    /// [`edge_gat::scores::gat_v2`].
    fn gat_v2_score(slope: Self, attention: Vec<Self>) -> BoxedScore<Self> = edge_gat::scores::gat_v2;

    /// [`edge_gat::scores::additive`].
    fn additive_score(attention: Vec<Self>) -> BoxedScore<Self> = edge_gat::scores::additive;

    /// [`edge_gat::scores::dot_product`].
    fn dot_product_score() -> BoxedScore<Self> = edge_gat::scores::dot_product;

    /// [`edge_gat::backward`].
    fn edges_backward(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) -> Result<EdgeGradients<Self>> = edge_gat::backward;

    /// [`rows::weights`] with the logits of [`edge_gat`].
    fn edges_weights(
        problem: &EdgeProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        normalizer: &Normalizer<Self>,
    ) -> Result<Array2<Self>> = rows::weights::<_, edge_gat::EdgeScorer<'_, _>>;

    /// [`dense::forward`] with the logits of [`poincare`].
    fn hyperbolic_dense_forward(
        problem: &HyperbolicProblem<'_, Self>,
        sizes: TileSizes,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = dense::forward::<_, poincare::DistanceTiles<'_, _>>;

    /// [`rows::forward`] with the logits of [`poincare`].
    fn hyperbolic_rows_forward(
        problem: &HyperbolicProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = rows::forward::<_, poincare::DistanceScorer<'_, _>>;

    /// [`poincare::spread`].
    fn hyperbolic_spread(
        problem: &HyperbolicProblem<'_, Self>,
        directions: Slices<'_, Self>,
        normalizer: &Normalizer<Self>,
        sizes: TileSizes,
        level: Level,
        sums: ArrayViewMut2<'_, Self>,
    ) = poincare::spread;

    /// [`poincare::backward`].
    fn hyperbolic_rows_backward(
        problem: &HyperbolicProblem<'_, Self>,
        points: &poincare::Points<Self>,
        upstream: &poincare::Upstream<Self>,
        tile_len: usize,
        level: Level,
        wanted: [bool; 2],
        grad_bias: Option<ArrayViewMut3<'_, Self>>,
    ) -> Result<poincare::PointGradients<Self>> = poincare::backward;

    /// [`poincare::dense_backward`].
    fn hyperbolic_dense_backward(
        problem: &HyperbolicProblem<'_, Self>,
        points: &poincare::Points<Self>,
        upstream: &poincare::Upstream<Self>,
        sizes: TileSizes,
        level: Level,
        grad_bias: Option<ArrayViewMut3<'_, Self>>,
    ) -> Result<poincare::PointGradients<Self>> = poincare::dense_backward;

    /// [`performer::sum_keys`].
    fn sum_keys(
        problem: &FeatureProblem<'_, Self>,
        level: Level,
    ) -> Vec<KeySums<Self>> = performer::sum_keys;

    /// [`performer::forward`].
    fn features_forward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        denominators: &mut Array2<Self>,
    ) = performer::forward;

    /// [`performer::backward`].
    fn features_backward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        upstream: &FeatureUpstream<'_, Self>,
        level: Level,
    ) -> Result<FeatureGradients<Self>> = performer::backward;

    /// [`performer::queries_backward`].
    fn features_queries_backward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        upstream: &FeatureUpstream<'_, Self>,
        level: Level,
    ) -> Result<(FeatureGradients<Self>, Vec<KeySums<Self>>)> = performer::queries_backward;

    /// [`performer::keys_backward`].
    fn features_keys_backward(
        problem: &FeatureProblem<'_, Self>,
        sums: &[KeySums<Self>],
        grad_sums: &[KeySums<Self>],
        level: Level,
    ) -> Result<FeatureGradients<Self>> = performer::keys_backward;

    /// [`performer::causal_forward`].
    fn causal_features_forward(
        problem: &FeatureProblem<'_, Self>,
        num_queries: &[usize],
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        denominators: &mut Array2<Self>,
    ) = performer::causal_forward;

    /// [`performer::causal_backward`].
    fn causal_features_backward(
        problem: &FeatureProblem<'_, Self>,
        num_queries: &[usize],
        upstream: &FeatureUpstream<'_, Self>,
        is_summed: &(dyn Fn(usize, usize) -> bool + Sync),
        level: Level,
    ) -> Result<FeatureGradients<Self>> = performer::causal_backward;

    /// [`rotary::rotate`].
    fn rotate(
        rotary: &Rotary,
        level: Level,
        positions: &Rows<'_, Self>,
        x: &Rows<'_, Self>,
        out: ArrayViewMut2<'_, Self>,
    ) = rotary::rotate;

    /// [`rotary::rotate_vjp`].
    fn rotate_vjp(
        rotary: &Rotary,
        level: Level,
        positions: &Rows<'_, Self>,
        x: &Rows<'_, Self>,
        grad_out: &Array2<Self>,
        grads: rotary::RotationGradients<'_, Self>,
    ) = rotary::rotate_vjp;

    /// [`rows::forward`] with the logits of [`rotary`].
    fn rotary_forward(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        out: ArrayViewMut2<'_, Self>,
        normalizer: &mut Normalizer<Self>,
    ) = rows::forward::<_, rotary::RotaryScorer<'_, _>>;

    /// [`rows::backward`] with the logits of [`rotary`]: returns the gradient of the frequencies.
    fn rotary_backward(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        upstream: Upstream<'_, Self>,
        grads: &mut GradientsMut<'_, Self>,
    ) -> Array1<Self> = rotary::backward;

    /// [`rows::weights`] with the logits of [`rotary`].
    fn rotary_weights(
        problem: &RotaryProblem<'_, Self>,
        tile_len: usize,
        level: Level,
        normalizer: &Normalizer<Self>,
    ) -> Result<Array2<Self>> = rows::weights::<_, rotary::RotaryScorer<'_, _>>;
}

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

//! Activations inside scores.

use crate::kernels::Float;
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::primitives::tanh::tanh;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat};
use std::fmt::Debug;

/// An activation of vectors of numbers.
pub(super) trait Activation<F: Float>: Copy + Debug + Send + Sync + 'static {
    fn of<S: Simd>(self, simd: S, x: Vector<S, F>) -> Vector<S, F>;

    /// Returns the derivative, given the result of [`of`](Self::of).
    fn derivative<S: Simd>(self, simd: S, result: Vector<S, F>) -> Vector<S, F>;

    /// Returns the derivative of results that are not positive, if it is 1 for positive results and the same for all
    /// others: then a bit for each result tells the derivative.
    fn slope(self) -> Option<F> {
        None
    }
}

/// LeakyReLU with this slope, of at least 0, on the negative side.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeakyRelu<F>(pub(super) F);

impl<F: Float> Activation<F> for LeakyRelu<F> {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: Vector<S, F>) -> Vector<S, F> {
        x * self.derivative(simd, x)
    }

    /// A result has the sign of its argument.
    #[inline(always)]
    fn derivative<S: Simd>(self, simd: S, result: Vector<S, F>) -> Vector<S, F> {
        let zero = Vector::<S, F>::splat(simd, F::zero());
        let one = Vector::<S, F>::splat(simd, F::one());
        result.simd_gt(zero).select(one, Vector::<S, F>::splat(simd, self.0))
    }

    #[inline(always)]
    fn slope(self) -> Option<F> {
        Some(self.0)
    }
}

/// The hyperbolic tangent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tanh;

impl<F: Float> Activation<F> for Tanh {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: Vector<S, F>) -> Vector<S, F> {
        let [magnitude, _] = tanh::<S, F>(simd, x, F::from_f64(-2.0));
        magnitude.copysign(x)
    }

    #[inline(always)]
    fn derivative<S: Simd>(self, simd: S, result: Vector<S, F>) -> Vector<S, F> {
        Vector::<S, F>::splat(simd, F::one()) - result * result
    }
}

/// Replaces numbers by their activations, in whole vectors.
#[inline(always)]
pub(super) fn activate<S: Simd, F: Float>(
    simd: S,
    activation: impl Activation<F>,
    values: &mut [F],
) {
    for values in values.chunks_exact_mut(Vector::<S, F>::LEN) {
        activation.of(simd, Vector::<S, F>::from_slice(simd, values)).store_slice(values);
    }
}

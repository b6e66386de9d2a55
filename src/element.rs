use crate::error::{Error, Result};
use ndarray::{Array, Array2, Dimension, Ix2, NdFloat};

mod sealed {
    /// Sealed, because the kernels exist only for these two types.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// An element of an array: `f32` or `f64`.
///
/// The trait is sealed. Generic code gets arithmetic from [`NdFloat`] and constants from
/// [`from_f64`](Self::from_f64). Code that calls a mechanism needs [`Float`](crate::Float), which includes this trait.
pub trait Element: sealed::Sealed + NdFloat + std::iter::Sum + Default {
    /// Converts from `f64`, rounding to the nearest value.
    fn from_f64(value: f64) -> Self;
    /// Converts to `f64`, exactly.
    fn as_f64(self) -> f64;
}

impl Element for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }
}

/// Returns the larger of two values, or NaN if either is NaN.
///
/// `Float::max` would drop a NaN, the only trace of an invalid logit.
#[inline(always)]
pub(crate) fn nan_max<F: Element>(a: F, b: F) -> F {
    if b > a || b.is_nan() { b } else { a }
}

/// Whether all are finite.
pub(crate) fn all_finite<F: Element>(values: &[F]) -> bool {
    // No early exit within a chunk, so that it can be vectorised.
    let chunk = |values: &[F]| values.iter().fold(true, |all, value| all & value.is_finite());
    values.chunks(1024).all(chunk)
}

/// Allocates copies of `value`, or returns an error if the allocation fails.
pub(crate) fn try_vec<T: Clone>(what: &'static str, shape: &[usize], value: T) -> Result<Vec<T>> {
    let too_large = || Error::TooLarge { what, shape: shape.to_vec() };
    let len =
        (shape.iter()).try_fold(1usize, |len, &n| len.checked_mul(n)).ok_or_else(too_large)?;
    // Try the allocation first, because `vec!` cannot return an error; but only `vec!` lets the operating
    // system provide zeros, page by page on use.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| too_large())?;
    Ok(vec![value; len])
}

/// 1 / (1 + e⁻ˣ)
pub(crate) fn sigmoid<F: Element>(x: F) -> F {
    F::one() / (F::one() + (-x).exp())
}

/// ln(1 + eˣ)
pub(crate) fn softplus<F: Element>(x: F) -> F {
    x.max(F::zero()) + (-x.abs()).exp().ln_1p()
}

/// Allocates a zero matrix, or returns an error if the allocation fails.
pub(crate) fn try_zeros<F: Element>(
    what: &'static str,
    rows: usize,
    columns: usize,
) -> Result<Array2<F>> {
    try_array(what, Ix2(rows, columns), F::zero())
}

/// An array of copies of `value`, or an error where the allocation is refused.
pub(crate) fn try_array<T: Clone, D: Dimension>(
    what: &'static str,
    shape: D,
    value: T,
) -> Result<Array<T, D>> {
    let data = try_vec(what, shape.slice(), value)?;
    let too_large = Error::TooLarge { what, shape: shape.slice().to_vec() };
    Array::from_shape_vec(shape, data).map_err(|_| too_large)
}

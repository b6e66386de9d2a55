use crate::error::{Error, Result};
use ndarray::{Array, Array2, Dimension, Ix2, NdFloat};

mod sealed {
    /// Sealed, so that nobody else sees the kernels behind it.
    pub trait Sealed: crate::kernels::Kernels {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The element types of this crate: `f32` and `f64`.
///
/// Sealed: the kernels are written for these two. Generic code gets its arithmetic from
/// [`NdFloat`], and constants by [`from_f64`](Self::from_f64).
pub trait Float: sealed::Sealed + NdFloat + std::iter::Sum + Default {
    /// The nearest value of this type.
    fn from_f64(value: f64) -> Self;
    /// The same value as an `f64`; exact.
    fn as_f64(self) -> f64;
}

impl Float for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Float for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }
}

/// The larger of two values, NaN if either is NaN.
///
/// `Float::max` drops a NaN, and with it the only trace of a bad logit.
#[inline(always)]
pub(crate) fn nan_max<F: Float>(a: F, b: F) -> F {
    if b > a || b.is_nan() { b } else { a }
}

/// Whether all are finite.
pub(crate) fn all_finite<F: Float>(values: &[F]) -> bool {
    // Without a way out within a chunk, so that it is done in vectors.
    let chunk = |values: &[F]| values.iter().fold(true, |all, value| all & value.is_finite());
    values.chunks(1024).all(chunk)
}

/// `len` copies of `value`, or an error where the allocation is refused.
pub(crate) fn try_vec<T: Clone>(what: &'static str, shape: &[usize], value: T) -> Result<Vec<T>> {
    let too_large = || Error::TooLarge { what, shape: shape.to_vec() };
    let len =
        (shape.iter()).try_fold(1usize, |len, &n| len.checked_mul(n)).ok_or_else(too_large)?;
    // Asked for first, since `vec!` may not fail; but only `vec!` leaves it to the operating system
    // to make zeros, page by page as they are used.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| too_large())?;
    Ok(vec![value; len])
}

/// A zero matrix, or an error where the allocation is refused.
pub(crate) fn try_zeros<F: Float>(
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

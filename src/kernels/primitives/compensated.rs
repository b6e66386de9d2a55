//! Long sums, with compensation (Kahan 1965): their error does not grow with the number of terms.

use crate::kernels::Float;

/// The number of terms that are summed from zero, before this sum is added to others: a term may be small beside
/// the sum, and adding one by one rounds each of them to the digits of the sum.
pub(crate) const TERMS_OF_SUM: usize = 16;

/// sum ← factor · sum + term. `lack` is the accumulated rounding error of the sum.
#[inline(always)]
pub(crate) fn add<F: Float>(sum: &mut F, lack: &mut F, factor: F, term: F) {
    let (before, added) = (*sum * factor, term + *lack * factor);
    *sum = before + added;
    let new_lack = added - (*sum - before);
    // Infinities have no rounding error.
    *lack = if new_lack.is_nan() { F::zero() } else { new_lack };
}

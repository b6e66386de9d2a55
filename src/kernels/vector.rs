//! Dot products and sums of scaled vectors.

use crate::float::Float;

/// Independent partial sums in [`dot`]: enough to fill the SIMD registers of any CPU, and they
/// make the sum more accurate than one running total.
const LANES: usize = 16;

/// Σ aᵢ bᵢ over the common length.
#[inline]
pub(crate) fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    let (mut chunks_a, mut chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut sums = [F::zero(); LANES];
    for (a, b) in (&mut chunks_a).zip(&mut chunks_b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
    let rest = rest.fold(F::zero(), |sum, (&a, &b)| sum + a * b);
    sums.iter().fold(rest, |sum, &lane| sum + lane)
}

/// y ← y + a x over the common length.
#[inline]
pub(crate) fn axpy<F: Float>(a: F, x: &[F], y: &mut [F]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// y ← a y.
#[inline]
pub(crate) fn scale<F: Float>(a: F, y: &mut [F]) {
    for y in y {
        *y *= a;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_is_right_at_every_length_around_the_lanes() {
        for n in [0, 1, LANES - 1, LANES, LANES + 1, 3 * LANES + 5] {
            let a: Vec<f64> = (0..n).map(|i| i as f64).collect();
            let b: Vec<f64> = (0..n).map(|i| 2.0 * i as f64 + 1.0).collect();
            let expected: f64 = (0..n).map(|i| (i * (2 * i + 1)) as f64).sum();
            assert_eq!(dot(&a, &b), expected);
        }
    }
}

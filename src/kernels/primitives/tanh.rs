//! tanh, for the soft cap of logits and for scores of edges.

use super::exp::exp_and_m1;
use super::matmul::Vector;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdFloat};

/// Returns |tanh x| and the derivative 1 − tanh² x, given s and `factor` with −2 x = `factor` · s. NaN for NaN.
///
/// ```text
/// e = e^{−2 |x|}      |tanh x| = (1 − e) / (1 + e)      1 − tanh² x = 4 e / (1 + e)²
/// ```
#[inline(always)]
pub(crate) fn tanh<S: Simd, F: Float>(simd: S, s: Vector<S, F>, factor: F) -> [Vector<S, F>; 2] {
    let splat = |value: f64| Vector::<S, F>::splat(simd, F::from_f64(value));
    let [e, less_1] = exp_and_m1::<S, F>(simd, s.abs() * factor);
    let inverse = splat(1.0) / (splat(1.0) + e);
    [less_1.abs() * inverse, splat(4.0) * e * (inverse * inverse)]
}

/// The factor that [`tanh`] takes for x = s / c.
fn factor_of<F: Float>(cap: F) -> F {
    F::from_f64(-2.0) / cap
}

/// Replaces each logit s by c tanh(s / c).
#[inline(never)]
pub(crate) fn soft_cap<F: Float>(level: Level, cap: F, logits: &mut [F]) {
    dispatch!(level, simd => cap_in_vectors(simd, cap, logits));
}

/// c tanh(s / c)
#[inline(always)]
fn capped<S: Simd, F: Float>(simd: S, s: Vector<S, F>, cap: F) -> Vector<S, F> {
    let [magnitude, _] = tanh::<S, F>(simd, s, factor_of(cap));
    (magnitude * cap).copysign(s)
}

#[inline(always)]
fn cap_in_vectors<S: Simd, F: Float>(simd: S, cap: F, logits: &mut [F]) {
    let mut chunks = logits.chunks_exact_mut(Vector::<S, F>::LEN);
    for logits in chunks.by_ref() {
        capped::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits), cap).store_slice(logits);
    }
    let rest = chunks.into_remainder();
    let mut padded = Vector::<S, F>::splat(simd, F::zero());
    padded.as_mut_slice()[..rest.len()].copy_from_slice(rest);
    rest.copy_from_slice(&capped::<S, F>(simd, padded, cap).as_slice()[..rest.len()]);
}

/// Multiplies each gradient by 1 − tanh²(s / c).
#[inline(never)]
pub(crate) fn soft_cap_vjp<F: Float>(level: Level, cap: F, logits: &[F], grads: &mut [F]) {
    dispatch!(level, simd => vjp_in_vectors(simd, cap, logits, grads));
}

#[inline(always)]
fn vjp_in_vectors<S: Simd, F: Float>(simd: S, cap: F, logits: &[F], grads: &mut [F]) {
    let (factor, len) = (factor_of(cap), Vector::<S, F>::LEN);
    let (chunks, rest) = logits.split_at(logits.len() - logits.len() % len);
    let (grads, rest_of_grads) = grads.split_at_mut(chunks.len());
    for (logits, grads) in chunks.chunks_exact(len).zip(grads.chunks_exact_mut(len)) {
        let [_, slope] = tanh::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits), factor);
        (Vector::<S, F>::from_slice(simd, grads) * slope).store_slice(grads);
    }
    let mut padded = Vector::<S, F>::splat(simd, F::zero());
    padded.as_mut_slice()[..rest.len()].copy_from_slice(rest);
    let [_, slopes] = tanh::<S, F>(simd, padded, factor);
    let slopes = slopes.as_slice().iter();
    rest_of_grads.iter_mut().zip(slopes).for_each(|(grad, &slope)| *grad *= slope);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    /// tanh x, and its derivative.
    fn both<F: Float>(level: Level, xs: &[F]) -> [Vec<F>; 2] {
        let (mut tanh, mut slopes) = (xs.to_vec(), vec![F::one(); xs.len()]);
        soft_cap(level, F::one(), &mut tanh);
        soft_cap_vjp(level, F::one(), xs, &mut slopes);
        [tanh, slopes]
    }

    fn check<F: Float>(units: f64) {
        let small = (0..4000).map(|i| (f64::from(i) / 100.0 - 30.0).exp2());
        let large = (0..2001).map(|i| f64::from(i) / 100.0);
        let positive: Vec<f64> = small.chain(large).collect();
        let xs: Vec<F> = positive.iter().flat_map(|&x| [x, -x]).map(F::from_f64).collect();
        for level in levels() {
            let [tanh, slopes] = both(level, &xs);
            for ((&x, tanh), slope) in xs.iter().zip(tanh).zip(slopes) {
                let x = x.as_f64();
                let epsilon = F::epsilon().as_f64();
                let error = (tanh.as_f64() - x.tanh()).abs();
                assert!(error <= units * epsilon * x.tanh().abs(), "{level:?}: tanh {x} = {tanh}");
                let exact = x.cosh().powi(-2);
                let error = (slope.as_f64() - exact).abs();
                // e^{−2 |x|} rounds 2 |x| log₂ e without fused multiply-add.
                let bound = (units + 4.0 * x.abs()) * epsilon;
                assert!(error <= bound * exact + 1e-37, "{level:?}: tanh' {x} = {slope}");
            }
            // Any remainder after whole vectors.
            for len in 0..xs.len().min(40) {
                let [tanh, _] = both(level, &xs[..len]);
                assert_eq!(tanh, both(level, &xs)[0][..len]);
            }
        }
    }

    #[test]
    fn good_to_a_few_units_in_the_last_place() {
        check::<f32>(4.0);
        check::<f64>(4.0);
    }

    #[test]
    fn special_values() {
        for level in levels() {
            let [tanh, slopes] =
                both(level, &[f32::INFINITY, f32::NEG_INFINITY, f32::MIN, 0.0, f32::NAN]);
            assert_eq!(tanh[..4], [1.0, -1.0, -1.0, 0.0]);
            assert_eq!(slopes[..4], [0.0, 0.0, 0.0, 1.0]);
            assert!(tanh[4].is_nan() && slopes[4].is_nan());
        }
    }
}

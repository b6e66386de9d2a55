//! Dot products and weighted sums of rows.

use super::matmul::Vector;
use crate::float::Float;
use fearless_simd::{Simd, SimdBase, SimdFloat};

/// Σ aᵢ bᵢ over the common length, without SIMD.
#[inline]
pub(crate) fn plain_dot<F: Float>(a: &[F], b: &[F]) -> F {
    a.iter().zip(b).fold(F::zero(), |sum, (&a, &b)| sum + a * b)
}

/// Σ aᵢ bᵢ over the common length.
#[inline(always)]
pub(crate) fn dot<S: Simd, F: Float>(simd: S, a: &[F], b: &[F]) -> F {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let mut sums = [zero; 2];
    let (a_pairs, b_pairs) = (a.chunks_exact(2 * len), b.chunks_exact(2 * len));
    let (mut a, mut b) = (a_pairs.remainder(), b_pairs.remainder());
    for (a, b) in a_pairs.zip(b_pairs) {
        for v in 0..2 {
            let [a, b] = [a, b].map(|x| Vector::<S, F>::from_slice(simd, &x[v * len..][..len]));
            sums[v] = a.mul_add(b, sums[v]);
        }
    }
    if a.len() >= len && b.len() >= len {
        let [x, y] = [a, b].map(|x| Vector::<S, F>::from_slice(simd, &x[..len]));
        sums[0] = x.mul_add(y, sums[0]);
        (a, b) = (&a[len..], &b[len..]);
    }
    let sum = (sums[0] + sums[1]).reduce_sum();
    sum + plain_dot(a, b)
}

/// sum ← factor · sum + Σₜ weights[t] · row(t), for rows of the length of `sum`.
///
/// The sum stays in registers over all rows.
#[inline(always)]
pub(crate) fn add_weighted_rows<'r, S: Simd, F: Float>(
    simd: S,
    sum: &mut [F],
    factor: F,
    weights: &[F],
    row: impl Fn(usize) -> &'r [F],
) {
    let len = Vector::<S, F>::LEN;
    let mut start = 0;
    while start + 4 * len <= sum.len() {
        add_weighted_columns::<S, F, 4>(simd, &mut sum[start..], factor, weights, &row, start);
        start += 4 * len;
    }
    while start + len <= sum.len() {
        add_weighted_columns::<S, F, 1>(simd, &mut sum[start..], factor, weights, &row, start);
        start += len;
    }
    let rest = &mut sum[start..];
    if !rest.is_empty() {
        rest.iter_mut().for_each(|sum| *sum *= factor);
        for (t, &weight) in weights.iter().enumerate() {
            rest.iter_mut().zip(&row(t)[start..]).for_each(|(sum, &value)| *sum += weight * value);
        }
    }
}

/// N vectors of columns from `start` on.
#[inline(always)]
fn add_weighted_columns<'r, S: Simd, F: Float, const N: usize>(
    simd: S,
    sum: &mut [F],
    factor: F,
    weights: &[F],
    row: &impl Fn(usize) -> &'r [F],
    start: usize,
) {
    let len = Vector::<S, F>::LEN;
    let sum = &mut sum[..N * len];
    let factor = Vector::<S, F>::splat(simd, factor);
    // Two sums in turn, so that an addition need not wait for the one before.
    let mut sums = [[Vector::<S, F>::splat(simd, F::zero()); N]; 2];
    for (n, sum) in sum.chunks_exact(len).enumerate() {
        sums[0][n] = Vector::<S, F>::from_slice(simd, sum) * factor;
    }
    let mut t = 0;
    while t < weights.len() {
        for (sums, t) in sums.iter_mut().zip([t, t + 1]) {
            if t < weights.len() {
                let weight = Vector::<S, F>::splat(simd, weights[t]);
                let row = &row(t)[start..][..N * len];
                for n in 0..N {
                    let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
                    sums[n] = weight.mul_add(row, sums[n]);
                }
            }
        }
        t += 2;
    }
    for (n, sum) in sum.chunks_exact_mut(len).enumerate() {
        (sums[0][n] + sums[1][n]).store_slice(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    /// Small integers, so that every order of summation gives the same sum.
    fn entries(len: usize, seed: usize) -> Vec<f64> {
        (0..len).map(|i| ((i * 7 + seed * 3) % 11) as f64 - 5.0).collect()
    }

    #[test]
    fn dot_is_the_plain_one_at_every_length() {
        for level in levels() {
            for n in 0..70 {
                let (a, b) = (entries(n, 1), entries(n, 2));
                assert_eq!(dispatch!(level, simd => dot(simd, &a, &b)), plain_dot(&a, &b));
            }
        }
    }

    #[test]
    fn weighted_rows_add_up_at_every_size() {
        for level in levels() {
            for (columns, rows) in
                (0..70).flat_map(|columns| (0..4).map(move |rows| (columns, rows)))
            {
                let (weights, data) = (entries(rows, 1), entries(rows * columns, 2));
                let row = |t: usize| &data[t * columns..][..columns];
                let mut sum = entries(columns, 3);
                let expected: Vec<f64> = (sum.iter().enumerate())
                    .map(|(c, sum)| {
                        2.0 * sum + (0..rows).map(|t| weights[t] * row(t)[c]).sum::<f64>()
                    })
                    .collect();
                dispatch!(level, simd => add_weighted_rows(simd, &mut sum, 2.0, &weights, row));
                assert_eq!(sum, expected);
            }
        }
    }
}

//! Products of chunks, with right factors and results in rows of whole panels.

use crate::kernels::Float;
use crate::kernels::primitives::matmul::{Left, Matrix, Out, Target, columns_times, rows_times};
use fearless_simd::Level;

/// left · right for some rows of `left`; `right` and `out` have rows of `stride`, whole panels.
pub(super) fn product<F: Float>(
    level: Level,
    rows: usize,
    left: Left<'_, F>,
    (right, stride): (&[F], usize),
    target: Target<'_, F>,
    out: &mut [F],
) {
    rows_times(level, rows, left, Matrix::new(right, stride), target, Out::new(out, stride));
}

/// leftᵀ · right for some rows of both; `out` has `left.len` rows of `stride`.
pub(super) fn transposed_product<F: Float>(
    level: Level,
    rows: usize,
    left: Left<'_, F>,
    (right, stride): (&[F], usize),
    target: Target<'_, F>,
    out: &mut [F],
) {
    let right = Matrix::new(&right[..rows * stride], stride);
    columns_times(level, left, right, target, Out::new(out, stride));
}

/// Transposes rows of `stride` into `stride` rows of `new_stride`, with zeros past the existing rows.
pub(super) fn transposed<F: Float>(rows: &[F], stride: usize, new_stride: usize, out: &mut Vec<F>) {
    // This many rows and columns at a time stay in the first-level cache.
    const BLOCK: usize = 16;
    out.clear();
    out.resize(stride * new_stride, F::zero());
    for (block, rows) in rows.chunks(BLOCK * stride).enumerate() {
        for first in (0..stride).step_by(BLOCK) {
            for c in first..stride.min(first + BLOCK) {
                let out = &mut out[c * new_stride + block * BLOCK..];
                for (out, row) in out.iter_mut().zip(rows.chunks_exact(stride)) {
                    *out = row[c];
                }
            }
        }
    }
}

/// Each row of `sums`, which start `stride` apart, += its factor · row.
#[inline(never)]
pub(super) fn add_outer<F: Float>(
    level: Level,
    factors: impl Iterator<Item = F>,
    row: &[F],
    (sums, stride): (&mut [F], usize),
) {
    dispatch!(level, _simd => {
        for (sum, factor) in sums.chunks_exact_mut(stride).zip(factors) {
            add_scaled(sum, factor, row);
        }
    });
}

/// Multiplies each row by its factor.
#[inline(never)]
pub(super) fn scale_rows<F: Float>(level: Level, factors: &[F], (rows, stride): (&mut [F], usize)) {
    dispatch!(level, _simd => {
        for (row, &factor) in rows.chunks_exact_mut(stride).zip(factors) {
            row.iter_mut().for_each(|entry| *entry *= factor);
        }
    });
}

/// sum += factor · row.
#[inline(always)]
pub(super) fn add_scaled<F: Float>(sum: &mut [F], factor: F, row: &[F]) {
    sum.iter_mut().zip(row).for_each(|(sum, &entry)| *sum += factor * entry);
}

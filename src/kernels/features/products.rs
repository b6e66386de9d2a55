//! The products of chunks, as functions that enter the instruction set.

use crate::float::Float;
use crate::kernels::linear::{Target, store_panel_row};
use crate::kernels::matmul::{Matrix, columns_times, panel_width, rows_times};
use fearless_simd::Simd;

/// Rows that start `stride` apart, of which the first `len` entries are read.
#[derive(Clone, Copy)]
pub(super) struct Left<'l, F> {
    pub(super) data: &'l [F],
    pub(super) stride: usize,
    pub(super) len: usize,
}

/// left · right for some rows of `left`; `right` and `out` have rows of `stride`, whole panels.
#[inline(never)]
pub(super) fn product<S: Simd, F: Float>(
    simd: S,
    rows: usize,
    left: Left<'_, F>,
    (right, stride): (&[F], usize),
    target: Target,
    out: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let left = |at: usize| &left.data[at * left.stride..][..left.len];
            let right = Matrix { data: right, stride };
            let panel = panel_width::<S, F>();
            rows_times(
                simd,
                rows,
                left,
                right,
                stride,
                #[inline(always)]
                |row, column, sums| {
                    let out = &mut out[row * stride + column..][..panel];
                    store_panel_row(simd, sums, target, out);
                },
            );
        },
    );
}

/// out += leftᵀ · right for some rows of both; `out` has `left.len` rows of `stride`.
#[inline(never)]
pub(super) fn add_transposed_product<S: Simd, F: Float>(
    simd: S,
    rows: usize,
    left: Left<'_, F>,
    (right, stride): (&[F], usize),
    out: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let features = left.len;
            let left = Matrix { data: &left.data[..rows * left.stride], stride: left.stride };
            let right = Matrix { data: &right[..rows * stride], stride };
            let panel = panel_width::<S, F>();
            columns_times(
                simd,
                features,
                left,
                right,
                stride,
                #[inline(always)]
                |row, column, sums| {
                    let out = &mut out[row * stride + column..][..panel];
                    store_panel_row(simd, sums, Target::Add, out);
                },
            );
        },
    );
}

/// Rows of `stride` as rows of `new_stride`, as many as `stride`, zeros past the rows that there
/// are.
pub(super) fn transposed<F: Float>(rows: &[F], stride: usize, new_stride: usize, out: &mut Vec<F>) {
    // So many rows and columns at a time stay in the first-level cache.
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

/// sum += factor · row.
pub(super) fn add_scaled<F: Float>(sum: &mut [F], factor: F, row: &[F]) {
    sum.iter_mut().zip(row).for_each(|(sum, &entry)| *sum += factor * entry);
}

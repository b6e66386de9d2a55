//! The forward pass: the sums of the keys, then the queries.

use super::chunk::{CHUNK, Chunk};
use super::{FeatureProblem, KeySums};
use crate::float::Float;
use crate::inputs::head_columns;
use crate::kernels::matmul::{Matrix, columns_times, load, panel_width, rows_times, store};
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{ArrayViewMut2, s};
use std::ops::Range;

/// Keys and queries are handed to threads in at most this many parts, of whole chunks. The sums of
/// the parts are added in order.
pub(super) const PARTS: usize = 8;

/// Values in whole panels, with a column of ones after them.
pub(super) fn pack_values<F: Float>(
    problem: &FeatureProblem<'_, F>,
    keys: &[usize],
    kv_head: usize,
    stride: usize,
    packed: &mut Vec<F>,
) {
    packed.clear();
    packed.resize(keys.len() * stride, F::zero());
    for (&key, packed) in keys.iter().zip(packed.chunks_exact_mut(stride)) {
        let value = problem.value(key, kv_head);
        packed[..value.len()].copy_from_slice(value);
        packed[value.len()] = F::one();
    }
}

/// The sums over the keys, for each head of them.
pub(in super::super) fn sum_keys<F: Float>(
    problem: &FeatureProblem<'_, F>,
    level: Level,
) -> Vec<KeySums<F>> {
    let ranges = parts(problem.keys.len(), CHUNK, PARTS);
    let stride = dispatch!(level, simd => value_stride(simd, problem));
    let zeros = || KeySums::zeros(problem.num_features(), stride);
    let mut tasks: Vec<_> = (0..problem.kv_heads)
        .flat_map(|head| ranges.iter().map(move |range| (head, range.clone())))
        .map(|(head, range)| (head, range, zeros()))
        .collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let (head, range, sums): &mut (usize, Range<usize>, KeySums<F>) = task;
        dispatch!(level, simd => sum_part(simd, problem, *head, range.clone(), sums));
    });
    let mut sums: Vec<KeySums<F>> = (0..problem.kv_heads).map(|_| zeros()).collect();
    tasks.into_iter().for_each(|(head, _, part)| sums[head].add(part));
    sums
}

#[inline(always)]
pub(super) fn value_stride<S: Simd, F: Float>(_: S, problem: &FeatureProblem<'_, F>) -> usize {
    (problem.value_dim + 1).next_multiple_of(panel_width::<S, F>())
}

#[inline(always)]
fn sum_part<S: Simd, F: Float>(
    simd: S,
    problem: &FeatureProblem<'_, F>,
    kv_head: usize,
    range: Range<usize>,
    sums: &mut KeySums<F>,
) {
    let mut chunk = Chunk::new(simd, problem);
    let mut values = Vec::new();
    for range in ranges(range.len(), CHUNK).map(|at| range.start + at.start..range.start + at.end) {
        let keys = &problem.keys[range];
        chunk.load(simd, problem, keys.len(), |at| problem.key(keys[at], kv_head));
        chunk.key_features(simd, problem.map, problem.projection.ncols(), sums, true);
        pack_values(problem, keys, kv_head, sums.stride, &mut values);
        add_outer(simd, &chunk, &values, problem.num_features(), sums.stride, &mut sums.sums);
    }
}

/// sums += featuresᵀ · rows.
#[inline(never)]
pub(super) fn add_outer<S: Simd, F: Float>(
    simd: S,
    chunk: &Chunk<F>,
    rows: &[F],
    features: usize,
    stride: usize,
    sums: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let left =
                Matrix { data: &chunk.features[..chunk.len * chunk.stride], stride: chunk.stride };
            let right = Matrix { data: rows, stride };
            columns_times(simd, features, left, right, stride, |row, column, [a, b]| {
                let sum = &mut sums[row * stride + column..];
                let [old_a, old_b] = load::<S, F>(simd, sum);
                store::<S, F>([old_a + a, old_b + b], sum);
            });
        },
    );
}

/// Overwrites `out`, whose rows are NaN where `is_bad(query, head)`.
pub(in super::super) fn forward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    level: Level,
    out: ArrayViewMut2<'_, F>,
) {
    let ranges = parts(problem.inputs.num_queries(), CHUNK, 2 * PARTS);
    let outs = row_chunks(out, ranges.iter().map(Range::len));
    let tasks = ranges.iter().cloned().zip(outs).collect();
    parallel::for_each(tasks, problem.work(), |(queries, out)| {
        dispatch!(level, simd => forward_part(simd, problem, sums, queries, out));
    });
}

#[inline(always)]
fn forward_part<S: Simd, F: Float>(
    simd: S,
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    queries: Range<usize>,
    mut out: ArrayViewMut2<'_, F>,
) {
    let mut chunk = Chunk::new(simd, problem);
    let mut quotients = Vec::new();
    for rows in ranges(queries.len(), CHUNK) {
        for head in 0..problem.heads {
            let sums = &sums[problem.kv_head(head)];
            let row = |at| problem.query(queries.start + rows.start + at, head);
            chunk.load(simd, problem, rows.len(), row);
            chunk.query_features(simd, problem.map, problem.projection.ncols(), &sums.shifts);
            quotients.resize(rows.len() * sums.stride, F::zero());
            times_sums(
                simd,
                &chunk,
                &sums.sums,
                problem.num_features(),
                sums.stride,
                &mut quotients,
            );
            let mut out = out.slice_mut(s![rows.clone(), head_columns(head, problem.value_dim)]);
            for (mut out, sums) in
                out.rows_mut().into_iter().zip(quotients.chunks_exact(sums.stride))
            {
                let denominator = sums[problem.value_dim];
                out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum / denominator);
            }
        }
    }
}

/// out = features · sums.
#[inline(never)]
pub(super) fn times_sums<S: Simd, F: Float>(
    simd: S,
    chunk: &Chunk<F>,
    sums: &[F],
    features: usize,
    stride: usize,
    out: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let left = |at: usize| &chunk.features[at * chunk.stride..][..features];
            let right = Matrix { data: sums, stride };
            rows_times(simd, chunk.len, left, right, stride, |row, column, sums| {
                store::<S, F>(sums, &mut out[row * stride + column..]);
            });
        },
    );
}

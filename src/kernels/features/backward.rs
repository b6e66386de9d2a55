//! The backward pass: the queries, which give the gradients of the sums, then the keys.

use super::chunk::{CHUNK, Chunk};
use super::forward::{PARTS, add_outer, pack_values, times_sums, value_stride};
use super::{FeatureProblem, KeySums, Map};
use crate::error::Result;
use crate::float::{Float, try_zeros};
use crate::inputs::head_columns;
use crate::kernels::matmul::{Matrix, columns_times, load, panel_width, rows_times, store};
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::ops::Range;

/// The gradients of the inputs, and of the projection: columns of E × dim.
#[derive(Debug)]
pub struct FeatureGradients<F> {
    pub(crate) query: Array2<F>,
    /// One row for each of [`FeatureProblem::keys`].
    pub(crate) key: Array2<F>,
    pub(crate) value: Array2<F>,
    pub(crate) projection: Array2<F>,
}

/// What the tasks share: transposed sums, and W as rows.
struct Shared<'p, F: Float> {
    problem: &'p FeatureProblem<'p, F>,
    grad_out: ArrayView2<'p, F>,
    sums: &'p [KeySums<F>],
    /// For each head of keys, columns × features: of the sums, later of their gradients.
    transposed: Vec<Vec<F>>,
    /// columns of E × padded dim.
    projection: Vec<F>,
    padded_dim: usize,
}

/// What one task adds up.
struct Sums<F> {
    /// For each head of keys, features × columns.
    keys: Vec<Vec<F>>,
    /// columns of E × padded dim.
    projection: Vec<F>,
}

/// Queries that are not finite are left out.
pub(in super::super) fn backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    grad_out: ArrayView2<'_, F>,
    is_live: &[bool],
    level: Level,
) -> Result<FeatureGradients<F>> {
    let columns = problem.projection.ncols();
    let panel = dispatch!(level, simd => panel_of::<_, F>(simd));
    let padded_dim = problem.dim.next_multiple_of(panel);
    let fstride = problem.num_features().next_multiple_of(panel);
    let stride = dispatch!(level, simd => value_stride(simd, problem));
    let mut projection = vec![F::zero(); columns * padded_dim];
    for ((c, column), &weight) in problem.projection.indexed_iter() {
        projection[column * padded_dim + c] = weight;
    }
    let mut shared = Shared {
        problem,
        grad_out,
        sums,
        transposed: sums.iter().map(|sums| transposed(&sums.sums, stride, fstride)).collect(),
        projection,
        padded_dim,
    };
    let num_queries = problem.inputs.num_queries();
    let new_sums = || Sums {
        keys: vec![vec![F::zero(); problem.num_features() * stride]; problem.kv_heads],
        projection: vec![F::zero(); columns * padded_dim],
    };
    let zeros = |rows, columns| try_zeros("gradients", rows, columns);
    let mut grads = FeatureGradients {
        query: zeros(num_queries, problem.heads * problem.dim)?,
        key: zeros(problem.keys.len(), problem.kv_heads * problem.dim)?,
        value: zeros(problem.keys.len(), problem.kv_heads * problem.value_dim)?,
        projection: zeros(columns, problem.dim)?,
    };

    let ranges = parts(num_queries, CHUNK, PARTS);
    let chunks = row_chunks(grads.query.view_mut(), ranges.iter().map(Range::len));
    let mut tasks: Vec<_> =
        ranges.iter().cloned().zip(chunks).map(|task| (task, new_sums())).collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let ((queries, grad), sums): &mut ((Range<usize>, ArrayViewMut2<'_, F>), Sums<F>) = task;
        dispatch!(level, simd => shared.queries(simd, queries.clone(), is_live, grad, sums));
    });
    let mut total = new_sums();
    for (_, sums) in tasks {
        total.add(sums);
    }

    shared.transposed = total.keys.iter().map(|sums| transposed(sums, stride, fstride)).collect();
    let ranges = parts(problem.keys.len(), CHUNK, PARTS);
    let keys = row_chunks(grads.key.view_mut(), ranges.iter().map(Range::len));
    let values = row_chunks(grads.value.view_mut(), ranges.iter().map(Range::len));
    let mut tasks: Vec<_> = (ranges.iter().cloned().zip(keys.zip(values)))
        .map(|task| (task, vec![F::zero(); columns * padded_dim]))
        .collect();
    let of_keys = &total.keys;
    type KeyTask<'g, F> = ((Range<usize>, (ArrayViewMut2<'g, F>, ArrayViewMut2<'g, F>)), Vec<F>);
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let ((keys, grads), projection): &mut KeyTask<'_, F> = task;
        dispatch!(level, simd => shared.keys(simd, keys.clone(), of_keys, grads, projection));
    });
    for (_, projection) in tasks {
        add_to(&mut total.projection, &projection);
    }
    for (row, padded) in
        grads.projection.rows_mut().into_iter().zip(total.projection.chunks(padded_dim.max(1)))
    {
        row.into_iter().zip(padded).for_each(|(grad, &sum)| *grad = sum);
    }
    Ok(grads)
}

#[inline(always)]
fn panel_of<S: Simd, F: Float>(_: S) -> usize {
    panel_width::<S, F>()
}

impl<F: Float> Sums<F> {
    fn add(&mut self, other: Self) {
        self.keys.iter_mut().zip(&other.keys).for_each(|(sums, other)| add_to(sums, other));
        add_to(&mut self.projection, &other.projection);
    }
}

fn add_to<F: Float>(sums: &mut [F], other: &[F]) {
    sums.iter_mut().zip(other).for_each(|(sum, &other)| *sum += other);
}

/// Rows of `stride` as rows of `new_stride`.
fn transposed<F: Float>(rows: &[F], stride: usize, new_stride: usize) -> Vec<F> {
    let mut transposed = vec![F::zero(); stride * new_stride];
    for (at, row) in rows.chunks_exact(stride).enumerate() {
        for (c, &entry) in row.iter().enumerate() {
            transposed[c * new_stride + at] = entry;
        }
    }
    transposed
}

impl<F: Float> Shared<'_, F> {
    #[inline(always)]
    fn queries<S: Simd>(
        &self,
        simd: S,
        queries: Range<usize>,
        is_live: &[bool],
        grad_query: &mut ArrayViewMut2<'_, F>,
        sums: &mut Sums<F>,
    ) {
        let Self { problem, sums: of_keys, .. } = *self;
        let mut chunk = Chunk::new(simd, problem);
        let (mut quotients, mut grads, mut rows_of_inputs) = (Vec::new(), Vec::new(), Vec::new());
        for rows in ranges(queries.len(), CHUNK) {
            for head in 0..problem.heads {
                let kv_head = problem.kv_head(head);
                let KeySums { shifts, sums: key_sums, stride } = &of_keys[kv_head];
                let query_at = |at: usize| queries.start + rows.start + at;
                chunk.load(simd, problem, rows.len(), |at| problem.query(query_at(at), head));
                chunk.query_features(simd, problem.map, problem.projection.ncols(), shifts);
                quotients.resize(rows.len() * stride, F::zero());
                times_sums(simd, &chunk, key_sums, problem.num_features(), *stride, &mut quotients);
                // o = N/D: the gradients of N and D in place of them.
                for (at, sums) in quotients.chunks_exact_mut(*stride).enumerate() {
                    let denominator = sums[problem.value_dim];
                    if !is_live[query_at(at)] {
                        sums.fill(F::zero());
                        chunk.features[at * chunk.stride..][..chunk.stride].fill(F::zero());
                        chunk.products[at * chunk.padded..][..chunk.padded].fill(F::zero());
                        continue;
                    }
                    let grad_out = self.grad_out.row(query_at(at));
                    let columns = head_columns(head, problem.value_dim);
                    let grad_out = grad_out.iter().skip(columns.start).take(columns.len());
                    let mut product = F::zero();
                    for (sum, &grad) in sums.iter_mut().zip(grad_out) {
                        product += grad * (*sum / denominator);
                        *sum = grad / denominator;
                    }
                    sums[problem.value_dim] = -product / denominator;
                }
                let features = problem.num_features();
                add_outer(simd, &chunk, &quotients, features, *stride, &mut sums.keys[kv_head]);
                self.features_vjp(simd, &mut chunk, &quotients, *stride, kv_head, &mut grads);
                let row = |at: usize| match is_live[query_at(at)] {
                    true => Some(problem.query(query_at(at), head)),
                    false => None,
                };
                self.inputs_vjp(
                    simd,
                    &chunk,
                    row,
                    &mut rows_of_inputs,
                    &mut sums.projection,
                    |at, c, grad| {
                        grad_query[[rows.start + at, head * problem.dim + c]] = grad;
                    },
                );
            }
        }
    }

    #[inline(always)]
    fn keys<S: Simd>(
        &self,
        simd: S,
        range: Range<usize>,
        grad_sums: &[Vec<F>],
        (grad_key, grad_value): &mut (ArrayViewMut2<'_, F>, ArrayViewMut2<'_, F>),
        grad_projection: &mut [F],
    ) {
        let Self { problem, sums: of_keys, .. } = *self;
        let mut chunk = Chunk::new(simd, problem);
        let (mut values, mut grads, mut rows_of_inputs) = (Vec::new(), Vec::new(), Vec::new());
        let mut grad_values = Vec::new();
        for rows in ranges(range.len(), CHUNK) {
            let keys = &problem.keys[range.start + rows.start..range.start + rows.end];
            for kv_head in 0..problem.kv_heads {
                let mut sums = of_keys[kv_head].clone();
                let stride = sums.stride;
                chunk.load(simd, problem, keys.len(), |at| problem.key(keys[at], kv_head));
                chunk.key_features(simd, problem.map, problem.projection.ncols(), &mut sums, false);
                pack_values(problem, keys, kv_head, stride, &mut values);
                grad_values.resize(keys.len() * stride, F::zero());
                let features = problem.num_features();
                times_sums(simd, &chunk, &grad_sums[kv_head], features, stride, &mut grad_values);
                for (at, grads) in grad_values.chunks_exact(stride).enumerate() {
                    for (c, &grad) in grads[..problem.value_dim].iter().enumerate() {
                        grad_value[[rows.start + at, kv_head * problem.value_dim + c]] = grad;
                    }
                }
                self.features_vjp(simd, &mut chunk, &values, stride, kv_head, &mut grads);
                let squares = &chunk.squares;
                let twice = F::of(2.0) * problem.square_scale;
                let row = |at: usize| Some(problem.key(keys[at], kv_head));
                self.inputs_vjp(
                    simd,
                    &chunk,
                    row,
                    &mut rows_of_inputs,
                    grad_projection,
                    |at, c, grad| {
                        // h = scale |x|²
                        let key = problem.key(keys[at], kv_head)[c];
                        grad_key[[rows.start + at, kv_head * problem.dim + c]] =
                            grad + twice * squares[at] * key;
                    },
                );
            }
        }
    }

    /// The gradient of E in place of it, from that of the products of features and sums, `left` times
    /// the transposed sums.
    #[inline(always)]
    fn features_vjp<S: Simd>(
        &self,
        simd: S,
        chunk: &mut Chunk<F>,
        left: &[F],
        stride: usize,
        kv_head: usize,
        grads: &mut Vec<F>,
    ) {
        let (len, fstride) = (chunk.len, chunk.stride);
        grads.resize(len * fstride, F::zero());
        rows_times_rows(
            simd,
            len,
            (left, stride, self.problem.value_dim + 1),
            (&self.transposed[kv_head], fstride),
            grads,
        );
        chunk.features_vjp(simd, self.problem.map, self.problem.projection.ncols(), grads);
    }

    /// Hands the gradients of the inputs through E to `set`, and adds those of the projection.
    #[inline(always)]
    fn inputs_vjp<'r, S: Simd>(
        &self,
        simd: S,
        chunk: &Chunk<F>,
        row: impl Fn(usize) -> Option<&'r [F]>,
        rows: &mut Vec<F>,
        grad_projection: &mut [F],
        mut set: impl FnMut(usize, usize, F),
    ) where
        F: 'r,
    {
        let Self { problem, padded_dim, .. } = *self;
        let columns = problem.projection.ncols();
        rows.clear();
        rows.resize(chunk.len * padded_dim, F::zero());
        if let Map::Elu = problem.map {
            for at in 0..chunk.len {
                for c in 0..problem.dim {
                    set(at, c, chunk.products[at * chunk.padded + c]);
                }
            }
            return;
        }
        for (at, rows) in rows.chunks_exact_mut(padded_dim.max(1)).enumerate() {
            if let Some(row) = row(at) {
                rows[..row.len()].copy_from_slice(row);
            }
        }
        add_gradient(simd, chunk, columns, rows, padded_dim, grad_projection);
        let left = (&chunk.products[..], chunk.padded, columns);
        rows_times_rows(simd, chunk.len, left, (&self.projection, padded_dim), rows);
        for (at, grads) in rows.chunks_exact(padded_dim.max(1)).enumerate() {
            for (c, &grad) in grads[..problem.dim].iter().enumerate() {
                set(at, c, grad);
            }
        }
    }
}

/// out = left · right; left is given by its data, the length from row to row, and that of a row.
#[inline(never)]
fn rows_times_rows<S: Simd, F: Float>(
    simd: S,
    len: usize,
    (left, left_stride, left_len): (&[F], usize, usize),
    (right, stride): (&[F], usize),
    out: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let left = |at: usize| &left[at * left_stride..][..left_len];
            let right = Matrix { data: right, stride };
            rows_times(simd, len, left, right, stride, |row, column, sums| {
                store::<S, F>(sums, &mut out[row * stride + column..]);
            });
        },
    );
}

/// sums += Eᵀ · rows.
#[inline(never)]
fn add_gradient<S: Simd, F: Float>(
    simd: S,
    chunk: &Chunk<F>,
    columns: usize,
    rows: &[F],
    stride: usize,
    sums: &mut [F],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let left =
                Matrix { data: &chunk.products[..chunk.len * chunk.padded], stride: chunk.padded };
            let right = Matrix { data: rows, stride };
            columns_times(simd, columns, left, right, stride, |row, column, [a, b]| {
                let sum = &mut sums[row * stride + column..];
                let [old_a, old_b] = load::<S, F>(simd, sum);
                store::<S, F>([old_a + a, old_b + b], sum);
            });
        },
    );
}

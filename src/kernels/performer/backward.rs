//! The backward pass: first the queries, which give the gradients of the sums, then the keys.

use super::chunk::{CHUNK, Chunk};
use super::forward::{PARTS, QuotientGradients, pack_values, value_stride};
use super::products::{add_outer, add_scaled, product, transposed, transposed_product};
use super::{FeatureProblem, FeatureUpstream, KeySums, Map, SumsOfChunk};
use crate::element::try_zeros;
use crate::error::Result;
use crate::kernels::Float;
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use crate::kernels::primitives::matmul::{Left, Target, panel_len};
use fearless_simd::Level;
use ndarray::{Array2, ArrayViewMut2, s};
use std::iter;
use std::ops::Range;

/// The gradients of the inputs, and of the projection: columns of E × dim.
#[derive(Debug)]
pub struct FeatureGradients<F> {
    pub(crate) query: Array2<F>,
    /// One row for each key in [`FeatureProblem::keys`].
    pub(crate) key: Array2<F>,
    pub(crate) value: Array2<F>,
    pub(crate) projection: Array2<F>,
}

impl<F: Float> FeatureGradients<F> {
    pub(super) fn zeros(problem: &FeatureProblem<'_, F>) -> Result<Self> {
        let zeros = |rows, columns| try_zeros("gradients", rows, columns);
        let keys = problem.keys.len();
        Ok(Self {
            query: zeros(problem.inputs.num_queries(), problem.heads * problem.dim)?,
            key: zeros(keys, problem.kv_heads * problem.dim)?,
            value: zeros(keys, problem.kv_heads * problem.value_dim)?,
            projection: zeros(problem.projection.ncols(), problem.dim)?,
        })
    }

    /// Adds the rows of a projection with padded rows.
    pub(super) fn add_projection(&mut self, padded_dim: usize, padded: &[F]) {
        let rows = self.projection.rows_mut().into_iter().zip(padded.chunks(padded_dim.max(1)));
        for (row, padded) in rows {
            row.into_iter().zip(padded).for_each(|(grad, &sum)| *grad += sum);
        }
    }
}

/// The gradient of a chunk's inputs, and of the projection.
pub(super) struct InputsVjp<F> {
    /// W as rows: columns of E × padded dim.
    weight: Vec<F>,
    pub(super) padded_dim: usize,
    columns: usize,
    dim: usize,
    is_linear: bool,
    twice_square_scale: F,
    /// The rows of inputs, then their gradients.
    rows: Vec<F>,
    /// The gradient of the projection, like `weight`; empty if unwanted.
    pub(super) grad_weight: Vec<F>,
}

impl<F: Float> InputsVjp<F> {
    pub(super) fn new(level: Level, problem: &FeatureProblem<'_, F>) -> Self {
        let panel = panel_len::<F>(level);
        let (dim, columns) = problem.projection.dim();
        let padded_dim = dim.next_multiple_of(panel);
        let mut weight = vec![F::zero(); columns * padded_dim];
        for ((c, column), &entry) in problem.projection.indexed_iter() {
            weight[column * padded_dim + c] = entry;
        }
        Self {
            grad_weight: vec![F::zero(); if problem.wants_projection { weight.len() } else { 0 }],
            weight,
            padded_dim,
            columns,
            dim: problem.dim,
            is_linear: problem.map != Map::Elu,
            twice_square_scale: F::from_f64(2.0) * problem.square_scale,
            rows: vec![F::zero(); CHUNK * padded_dim],
        }
    }

    /// Computes the gradients of a chunk's inputs from those of its E, and of its h if `with_squares`,
    /// and passes them to `set`; adds the gradient of the projection.
    pub(super) fn run(
        &mut self,
        chunk: &Chunk<F>,
        with_squares: bool,
        mut set: impl FnMut(usize, usize, F),
    ) {
        let (dim, stride) = (self.dim, self.padded_dim);
        let left = Left::new(&chunk.grad_products, chunk.padded).with_len(self.columns);
        if self.is_linear {
            for at in 0..chunk.len {
                self.rows[at * stride..][..dim].copy_from_slice(&chunk.inputs[at * dim..][..dim]);
            }
            let Self { rows, grad_weight, .. } = self;
            if !grad_weight.is_empty() {
                let right = (&rows[..], stride);
                transposed_product(chunk.level, chunk.len, left, right, Target::Add, grad_weight);
            }
            product(
                chunk.level,
                chunk.len,
                left,
                (&self.weight, stride),
                Target::Overwrite,
                &mut self.rows,
            );
        }
        for at in 0..chunk.len {
            let grads = match self.is_linear {
                true => &self.rows[at * stride..][..dim],
                false => &chunk.grad_products[at * chunk.padded..][..dim],
            };
            // h = scale |x|²
            let factor = self.twice_square_scale * chunk.grad_squares[at];
            let inputs = &chunk.inputs[at * dim..][..dim];
            for (c, (&grad, &input)) in grads.iter().zip(inputs).enumerate() {
                set(at, c, if with_squares { grad + factor * input } else { grad });
            }
        }
        // Zeros again past the columns of the inputs.
        self.rows.fill(F::zero());
    }
}

/// The sums of one task over its queries: the gradients of the sums of each head of keys, and of
/// the projection.
struct Sums<F> {
    keys: Vec<KeySums<F>>,
    projection: Vec<F>,
}

impl<F: Float> Sums<F> {
    fn add(&mut self, other: &Self) {
        for (sums, other) in self.keys.iter_mut().zip(&other.keys) {
            sums.add(other, F::one());
        }
        add_scaled(&mut self.projection, F::one(), &other.projection);
    }
}

/// For inputs without a causal pattern.
pub(in super::super) fn backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    upstream: &FeatureUpstream<'_, F>,
    level: Level,
) -> Result<FeatureGradients<F>> {
    let (mut grads, grad_sums) = queries_backward(problem, sums, upstream, level)?;
    add_keys_backward(problem, sums, &grad_sums, level, &mut grads);
    Ok(grads)
}

/// The first half of [`backward`]: the gradients of queries and projection, and of the sums of each head of keys,
/// relative to their shifts.
pub(in super::super) fn queries_backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    upstream: &FeatureUpstream<'_, F>,
    level: Level,
) -> Result<(FeatureGradients<F>, Vec<KeySums<F>>)> {
    let num_queries = problem.inputs.num_queries();
    let stride = value_stride(level, problem);
    let mut grads = FeatureGradients::zeros(problem)?;
    let zeros = || vec![KeySums::zeros(problem.num_features(), stride); problem.kv_heads];

    let ranges = parts(num_queries, CHUNK, PARTS);
    let chunks = row_chunks(grads.query.view_mut(), ranges.iter().map(Range::len));
    type QueryTask<'g, F> = (Range<usize>, ArrayViewMut2<'g, F>, Sums<F>);
    let mut tasks: Vec<QueryTask<'_, F>> = (ranges.iter().cloned().zip(chunks))
        .map(|(range, chunk)| (range, chunk, Sums { keys: zeros(), projection: Vec::new() }))
        .collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let (queries, grad, of_task): &mut QueryTask<'_, F> = task;
        {
            query_part(level, problem, sums, upstream, queries.clone(), grad, of_task);
        };
    });
    let mut tasks = tasks.into_iter().map(|(_, _, sums)| sums);
    let Some(mut total) = tasks.next() else { return Ok((grads, zeros())) };
    tasks.for_each(|sums| total.add(&sums));
    grads.add_projection(padded_dim(level, problem), &total.projection);
    Ok((grads, total.keys))
}

/// The second half of [`backward`]: the gradients of keys, values and projection, given those of the sums, which may
/// be over more keys.
pub(in super::super) fn keys_backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    grad_sums: &[KeySums<F>],
    level: Level,
) -> Result<FeatureGradients<F>> {
    let mut grads = FeatureGradients::zeros(problem)?;
    add_keys_backward(problem, sums, grad_sums, level, &mut grads);
    Ok(grads)
}

fn add_keys_backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    grad_sums: &[KeySums<F>],
    level: Level,
    grads: &mut FeatureGradients<F>,
) {
    let ranges = parts(problem.keys.len(), CHUNK, PARTS);
    let keys = row_chunks(grads.key.view_mut(), ranges.iter().map(Range::len));
    let values = row_chunks(grads.value.view_mut(), ranges.iter().map(Range::len));
    type KeyTask<'g, F> = (Range<usize>, [ArrayViewMut2<'g, F>; 2], Vec<F>);
    let mut tasks: Vec<KeyTask<'_, F>> = (ranges.iter().cloned().zip(keys.zip(values)))
        .map(|(range, (keys, values))| (range, [keys, values], Vec::new()))
        .collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let (keys, grads, projection): &mut KeyTask<'_, F> = task;
        {
            *projection = key_part(level, problem, sums, grad_sums, keys.clone(), grads);
        };
    });
    let of_keys: Vec<_> = tasks.into_iter().map(|(_, _, projection)| projection).collect();
    of_keys.iter().for_each(|sums| grads.add_projection(padded_dim(level, problem), sums));
}

pub(super) fn padded_dim<F: Float>(level: Level, problem: &FeatureProblem<'_, F>) -> usize {
    problem.projection.nrows().next_multiple_of(panel_len::<F>(level))
}

fn query_part<F: Float>(
    level: Level,
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    upstream: &FeatureUpstream<'_, F>,
    queries: Range<usize>,
    grad_query: &mut ArrayViewMut2<'_, F>,
    of_task: &mut Sums<F>,
) {
    let mut chunk = Chunk::new(level, problem);
    let mut inputs_vjp = InputsVjp::new(level, problem);
    let mut grad_features = Vec::new();
    let mut transposed_sums = Vec::new();
    let mut of_chunk = SumsOfChunk::default();
    for kv_head in 0..problem.kv_heads {
        let KeySums { shifts, totals, sums, stride, .. } = &sums[kv_head];
        transposed(sums, *stride, chunk.stride, &mut transposed_sums);
        let mut quotients = QuotientGradients::new(*stride);
        let of_sums = &mut of_task.keys[kv_head];
        for head in problem.group(kv_head) {
            for rows in ranges(queries.len(), CHUNK) {
                let first = queries.start + rows.start;
                chunk.load(rows.len(), |at| problem.query(first + at, head));
                chunk.query_features(shifts);
                let range = first..first + rows.len();
                quotients.load(upstream, range, head, problem.value_dim, |_| true);
                let QuotientGradients { numerators, denominators, .. } = &quotients;
                of_sums.add_chunk(&chunk, Some(denominators), numerators, &mut of_chunk);

                grad_features.resize(rows.len() * chunk.stride, F::zero());
                let right = (&transposed_sums[..], chunk.stride);
                let left = quotients.left(problem.value_dim);
                product(level, chunk.len, left, right, Target::Overwrite, &mut grad_features);
                let grads = (&mut grad_features[..], chunk.stride);
                add_outer(level, denominators.iter().copied(), totals, grads);
                chunk.features_vjp(&grad_features);
                // h cancels in a quotient.
                inputs_vjp.run(&chunk, false, |at, c, grad| {
                    grad_query[[rows.start + at, head * problem.dim + c]] = grad;
                });
            }
        }
    }
    of_task.projection = inputs_vjp.grad_weight;
}

/// Returns the gradient of the projection.
fn key_part<F: Float>(
    level: Level,
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    grad_sums: &[KeySums<F>],
    range: Range<usize>,
    [grad_key, grad_value]: &mut [ArrayViewMut2<'_, F>; 2],
) -> Vec<F> {
    let mut chunk = Chunk::new(level, problem);
    let mut inputs_vjp = InputsVjp::new(level, problem);
    let mut step = KeyStep::default();
    for kv_head in 0..problem.kv_heads {
        // With the shifts of all keys, so that no key raises them.
        let mut shifts = KeySums::without_sums(&sums[kv_head].shifts);
        step.take(&chunk, &grad_sums[kv_head]);
        for rows in ranges(range.len(), CHUNK) {
            let keys = &problem.keys[range.start + rows.start..range.start + rows.end];
            chunk.load(keys.len(), |at| problem.key(keys[at], kv_head));
            chunk.key_features(&mut shifts);
            step.run(problem, kv_head, keys, &grad_sums[kv_head], &chunk);
            chunk.features_vjp(&step.grad_features);
            let mut grad_value = grad_value.slice_mut(s![rows.clone(), ..]);
            step.store(problem, kv_head, &mut grad_value);
            inputs_vjp.run(&chunk, true, |at, c, grad| {
                grad_key[[rows.start + at, kv_head * problem.dim + c]] = grad;
            });
        }
    }
    inputs_vjp.grad_weight
}

/// Turns the gradients of sums over keys into those of a chunk of keys and values.
#[derive(Default)]
pub(super) struct KeyStep<F> {
    transposed: Vec<F>,
    pub(super) values: Vec<F>,
    /// Rows × stride for the values and the features.
    pub(super) grad_values: Vec<F>,
    pub(super) grad_features: Vec<F>,
    stride: usize,
}

impl<F: Float> KeyStep<F> {
    pub(super) fn take(&mut self, chunk: &Chunk<F>, grad_sums: &KeySums<F>) {
        self.stride = grad_sums.stride;
        transposed(&grad_sums.sums, grad_sums.stride, chunk.stride, &mut self.transposed);
    }

    pub(super) fn run(
        &mut self,
        problem: &FeatureProblem<'_, F>,
        kv_head: usize,
        keys: &[usize],
        grad_sums: &KeySums<F>,
        chunk: &Chunk<F>,
    ) {
        let (level, stride) = (chunk.level, self.stride);
        pack_values(problem, keys, kv_head, stride, &mut self.values);
        self.grad_values.resize(keys.len() * stride, F::zero());
        let right = (&grad_sums.sums[..], stride);
        product(level, keys.len(), chunk.left(), right, Target::Overwrite, &mut self.grad_values);
        self.grad_features.resize(keys.len() * chunk.stride, F::zero());
        let left = Left::new(&self.values, stride).with_len(problem.value_dim);
        let right = (&self.transposed[..], chunk.stride);
        product(level, keys.len(), left, right, Target::Overwrite, &mut self.grad_features);
        let grads = (&mut self.grad_features[..], chunk.stride);
        add_outer(level, iter::repeat(F::one()), &grad_sums.totals, grads);
    }

    pub(super) fn store(
        &self,
        problem: &FeatureProblem<'_, F>,
        head: usize,
        grad_value: &mut ArrayViewMut2<'_, F>,
    ) {
        for (at, grads) in self.grad_values.chunks_exact(self.stride.max(1)).enumerate() {
            for (c, &grad) in grads[..problem.value_dim].iter().enumerate() {
                grad_value[[at, head * problem.value_dim + c]] = grad;
            }
        }
    }
}

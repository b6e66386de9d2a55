//! The forward pass: the sums of the keys, then the queries.

use super::chunk::{CHUNK, Chunk};
use super::products::product;
use super::{FeatureProblem, KeySums, SumsOfChunk};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::parallel::{self, parts, ranges, row_chunks};
use crate::kernels::primitives::matmul::{Left, Target, panel_len};
use fearless_simd::Level;
use ndarray::{Array2, ArrayViewMut2};
use std::ops::Range;

/// The largest number of parts, of whole chunks, in which keys and queries are distributed to threads.
/// The sums of the parts are added in order.
pub(super) const PARTS: usize = 8;

/// Values in whole panels.
pub(super) fn pack_values<F: Float>(
    problem: &FeatureProblem<'_, F>,
    keys: &[usize],
    kv_head: usize,
    stride: usize,
    packed: &mut Vec<F>,
) {
    packed.clear();
    packed.resize(keys.len() * stride, F::zero());
    for (&key, packed) in keys.iter().zip(packed.chunks_exact_mut(stride.max(1))) {
        let value = problem.value(key, kv_head);
        packed[..value.len()].copy_from_slice(value);
    }
}

/// Computes the sums over the keys, for each head of keys.
pub(in super::super) fn sum_keys<F: Float>(
    problem: &FeatureProblem<'_, F>,
    level: Level,
) -> Vec<KeySums<F>> {
    let ranges = parts(problem.keys.len(), CHUNK, PARTS);
    let stride = value_stride(level, problem);
    let zeros = || KeySums::zeros(problem.num_features(), stride);
    let mut tasks: Vec<_> = (0..problem.kv_heads)
        .flat_map(|head| ranges.iter().map(move |range| (head, range.clone())))
        .map(|(head, range)| (head, range, zeros()))
        .collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let (head, range, sums): &mut (usize, Range<usize>, KeySums<F>) = task;
        {
            let mut chunk = Chunk::new(level, problem);
            add_keys(problem, *head, &problem.keys[range.clone()], &mut chunk, sums);
        };
    });
    let mut sums: Vec<KeySums<F>> = Vec::with_capacity(problem.kv_heads);
    for (head, _, part) in tasks {
        match sums.get_mut(head) {
            Some(sums) => sums.add(&part, F::one()),
            None => sums.push(part),
        }
    }
    // Without keys there are no tasks.
    sums.resize_with(problem.kv_heads, zeros);
    sums
}

pub(super) fn value_stride<F: Float>(level: Level, problem: &FeatureProblem<'_, F>) -> usize {
    problem.value_dim.next_multiple_of(panel_len::<F>(level))
}

/// Adds keys to their sums.
pub(super) fn add_keys<F: Float>(
    problem: &FeatureProblem<'_, F>,
    kv_head: usize,
    keys: &[usize],
    chunk: &mut Chunk<F>,
    sums: &mut KeySums<F>,
) {
    let (mut values, mut of_chunk) = (Vec::new(), SumsOfChunk::default());
    for keys in keys.chunks(CHUNK) {
        chunk.load(keys.len(), |at| problem.key(keys[at], kv_head));
        chunk.key_features(sums);
        pack_values(problem, keys, kv_head, sums.stride, &mut values);
        sums.add_chunk(chunk, None, &values, &mut of_chunk);
    }
}

/// Overwrites `out` and the denominators, num_queries × heads.
pub(in super::super) fn forward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    level: Level,
    out: ArrayViewMut2<'_, F>,
    denominators: &mut Array2<F>,
) {
    let ranges = parts(problem.inputs.num_queries(), CHUNK, 2 * PARTS);
    let outs = row_chunks(out, ranges.iter().map(Range::len));
    let denominators = row_chunks(denominators.view_mut(), ranges.iter().map(Range::len));
    let tasks = ranges.iter().cloned().zip(outs.zip(denominators)).collect();
    parallel::for_each(tasks, problem.work(), |(queries, outs)| {
        forward_part(level, problem, sums, queries, outs);
    });
}

fn forward_part<F: Float>(
    level: Level,
    problem: &FeatureProblem<'_, F>,
    sums: &[KeySums<F>],
    queries: Range<usize>,
    (mut out, mut denominators): (ArrayViewMut2<'_, F>, ArrayViewMut2<'_, F>),
) {
    let mut chunk = Chunk::new(level, problem);
    let (mut numerators, mut products) = (Vec::new(), Vec::new());
    for rows in ranges(queries.len(), CHUNK) {
        for head in 0..problem.heads {
            let sums = &sums[problem.kv_head(head)];
            let row = |at| problem.query(queries.start + rows.start + at, head);
            chunk.load(rows.len(), row);
            chunk.query_features(&sums.shifts);
            numerators.resize(rows.len() * sums.stride, F::zero());
            product(
                level,
                chunk.len,
                chunk.left(),
                (&sums.sums, sums.stride),
                Target::Overwrite,
                &mut numerators,
            );
            chunk.products_with(&sums.totals, &mut products);
            for (at, &denominator) in products.iter().enumerate() {
                denominators[[rows.start + at, head]] = denominator;
                let row = &numerators[at * sums.stride..][..problem.value_dim];
                write_quotient(out.row_mut(rows.start + at), head, row, denominator);
            }
        }
    }
}

/// out = numerator / denominator in a head's columns.
pub(super) fn write_quotient<F: Float>(
    mut out: ndarray::ArrayViewMut1<'_, F>,
    head: usize,
    numerator: &[F],
    denominator: F,
) {
    let columns = head_columns(head, numerator.len());
    let out = out.iter_mut().skip(columns.start).take(columns.len());
    out.zip(numerator).for_each(|(out, &sum)| *out = sum / denominator);
}

/// The gradients of numerators and denominators of a chunk of queries, o = N/D; zeros for rows that are
/// not summed here.
pub(super) struct QuotientGradients<F> {
    /// Rows × padded columns.
    pub(super) numerators: Vec<F>,
    pub(super) denominators: Vec<F>,
    stride: usize,
}

impl<F: Float> QuotientGradients<F> {
    pub(super) fn new(stride: usize) -> Self {
        Self { numerators: Vec::new(), denominators: Vec::new(), stride }
    }

    pub(super) fn left(&self, value_dim: usize) -> Left<'_, F> {
        Left::new(&self.numerators, self.stride).with_len(value_dim)
    }

    pub(super) fn load(
        &mut self,
        upstream: &super::FeatureUpstream<'_, F>,
        queries: Range<usize>,
        head: usize,
        value_dim: usize,
        is_summed: impl Fn(usize) -> bool,
    ) {
        self.numerators.clear();
        self.numerators.resize(queries.len() * self.stride, F::zero());
        self.denominators.clear();
        self.denominators.resize(queries.len(), F::zero());
        let columns = head_columns(head, value_dim);
        for (at, query) in queries.enumerate().filter(|&(at, _)| is_summed(at)) {
            let denominator = upstream.denominators[[query, head]];
            let grads = upstream.grad_out.row(query);
            let grads = grads.iter().skip(columns.start).take(columns.len());
            let out = upstream.out.row(query);
            let out = out.iter().skip(columns.start);
            let mut product = F::zero();
            let row = &mut self.numerators[at * self.stride..][..self.stride];
            for (numerator, (&grad, &out)) in row.iter_mut().zip(grads.zip(out)) {
                product += grad * out;
                *numerator = grad / denominator;
            }
            self.denominators[at] = -product / denominator;
        }
    }
}

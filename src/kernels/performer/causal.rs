//! Causal inputs: the sums grow from chunk to chunk of queries, and within a chunk the kernels of its own
//! pairs, the lower triangle, are computed.
//!
//! A key must not affect a row that does not see it, not even through the shifts of exponents. So the
//! sums at the start of a chunk are relative to the largest exponents before it, and the features of its
//! own pairs are relative to the largest exponent of each row: κᵢⱼ 2^{Aᵢ + Bⱼ}. The two parts of a row
//! are combined relative to the larger of their largest exponents, Z.
//!
//! A head of keys is one task, from the first chunk to the last. The backward pass goes once forward, for
//! the queries, and once back, for the keys, with the gradients of the sums. The shifts of these only
//! decrease on the way back, so they are multiplied by 2^{s − s'} ≤ 1 and nothing overflows.

use super::backward::{FeatureGradients, InputsVjp, KeyStep, padded_dim};
use super::chunk::{CHUNK, Chunk, shifted_powers};
use super::forward::{QuotientGradients, pack_values, value_stride, write_quotient};
use super::products::{add_outer, product, scale_rows, transposed, transposed_product};
use super::{FeatureProblem, FeatureUpstream, KeySums, SumsOfChunk};
use crate::error::Result;
use crate::kernels::Float;
use crate::kernels::parallel::{self, ranges};
use crate::kernels::primitives::matmul::{Left, Target, panel_len};
use fearless_simd::Level;
use ndarray::{Array2, ArrayViewMut2, Axis, s};
use std::ops::Range;

/// A chunk of queries, possibly empty, and the keys that they see and no previous query does.
struct Step {
    queries: Range<usize>,
    /// At most [`CHUNK`] positions in [`FeatureProblem::keys`].
    keys: Range<usize>,
}

/// Iterates over the first queries in order, with the keys between them: chunks of keys without queries
/// come before the queries that all see them. The grouping of the queries, and so the result of a row,
/// does not depend on the number of queries requested.
fn steps<F: Float>(problem: &FeatureProblem<'_, F>, num_wanted: usize) -> Vec<Step> {
    let num_queries = problem.inputs.num_queries();
    let mut steps = Vec::with_capacity(num_queries.div_ceil(CHUNK));
    let (mut start, mut seen) = (0, 0);
    while start < num_wanted {
        let mut end = num_queries.min(start + CHUNK);
        if problem.num_seen(end - 1) > seen + CHUNK {
            let first = problem.num_seen(start);
            let keys = ranges(first - seen, CHUNK).map(|keys| seen + keys.start..seen + keys.end);
            steps.extend(keys.map(|keys| Step { queries: start..start, keys }));
            seen = first;
            while problem.num_seen(end - 1) > seen + CHUNK {
                end -= 1;
            }
        }
        let queries = start..end.min(num_wanted);
        let last = problem.num_seen(queries.end - 1);
        steps.push(Step { queries, keys: seen..last });
        (start, seen) = (end, last);
    }
    steps
}

impl Step {
    /// Whether there are previous keys.
    fn has_sums(&self) -> bool {
        self.keys.start > 0
    }

    /// Returns how many of its keys each of its queries sees.
    fn limits<F: Float>(&self, problem: &FeatureProblem<'_, F>) -> impl Iterator<Item = usize> {
        self.queries.clone().map(|query| problem.num_seen(query) - self.keys.start)
    }

    fn padded_keys<F: Float>(&self, level: Level) -> usize {
        self.keys.len().next_multiple_of(panel_len::<F>(level))
    }
}

/// The factors of the two parts of the rows of a step.
#[derive(Default)]
struct Factors<F> {
    /// 2^{m − Z} for the sums, where m is the shift of the query's features; 0 without sums.
    of_sums: Vec<F>,
    /// 2^{A + B − Z} for the pairs, rows × padded; 0 if the key is not seen.
    of_pairs: Vec<F>,
    padded: usize,
}

impl<F: Float> Factors<F> {
    /// Computes the factors from m in `of_sums`, and A and B in the chunks. Zeros for rows that are not
    /// summed.
    fn load(
        &mut self,
        limits: impl Iterator<Item = usize>,
        query: &Chunk<F>,
        key: &Chunk<F>,
        is_summed: impl Fn(usize) -> bool,
    ) {
        self.padded = key.len.next_multiple_of(panel_len::<F>(key.level));
        self.of_pairs.resize(query.len * self.padded, F::zero());
        let keys = &key.shifts[..key.len];
        for (at, limit) in limits.enumerate() {
            let row = &mut self.of_pairs[at * self.padded..][..self.padded];
            if !is_summed(at) {
                row.fill(F::zero());
                self.of_sums[at] = F::zero();
                continue;
            }
            let largest = |max: F, &key: &F| if key > max { key } else { max };
            let largest = keys[..limit].iter().fold(F::neg_infinity(), largest);
            let (own, sums) = (query.shifts[at] + largest, self.of_sums[at]);
            let shift = if own > sums { own } else { sums };
            self.of_sums[at] =
                if sums == F::neg_infinity() { F::zero() } else { (sums - shift).exp2() };
            // Past the limit exponents may be positive; their powers are not used.
            row[..limit].copy_from_slice(&keys[..limit]);
            row[limit..].fill(F::neg_infinity());
            dispatch!(query.level, simd => {
                shifted_powers(simd, row, shift - query.shifts[at]);
            });
            row[limit..].fill(F::zero());
        }
    }

    /// Multiplies rows of pairs by their factors.
    #[inline(never)]
    fn multiply(&self, level: Level, pairs: &mut [F]) {
        dispatch!(level, _simd => {
            for (pair, &factor) in pairs.iter_mut().zip(&self.of_pairs) {
                // A pair that is not seen may hold anything.
                *pair = if factor == F::zero() { F::zero() } else { *pair * factor };
            }
        });
    }
}

/// Overwrites the rows of the first `num_queries[kv_head]` queries of each head, which only see finite
/// keys and values, and their denominators, which are less than 1 if terms may have underflowed.
pub(in super::super) fn forward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    num_queries: &[usize],
    level: Level,
    mut out: ArrayViewMut2<'_, F>,
    denominators: &mut Array2<F>,
) {
    let group = problem.heads / problem.kv_heads;
    let outs = out.axis_chunks_iter_mut(Axis(1), group * problem.value_dim);
    let of_heads = denominators.axis_chunks_iter_mut(Axis(1), group);
    let tasks = (0..problem.kv_heads).zip(outs.zip(of_heads)).collect();
    parallel::for_each(tasks, problem.work(), |(kv_head, (out, denominators))| {
        let num_queries = num_queries[kv_head];
        {
            forward_head(level, problem, kv_head, num_queries, out, denominators);
        };
    });
}

fn forward_head<F: Float>(
    level: Level,
    problem: &FeatureProblem<'_, F>,
    kv_head: usize,
    num_queries: usize,
    mut out: ArrayViewMut2<'_, F>,
    mut denominators: ArrayViewMut2<'_, F>,
) {
    let (mut query, mut key) = (Chunk::new(level, problem), Chunk::new(level, problem));
    let stride = value_stride(level, problem);
    let mut sums = KeySums::zeros(problem.num_features(), stride);
    let (mut values, mut numerators, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    let mut transposed_keys = Vec::new();
    let mut factors = Factors::default();
    let mut of_chunk = SumsOfChunk::default();
    let mut of_sums = Vec::new();
    for step in &steps(problem, num_queries) {
        let keys = &problem.keys[step.keys.clone()];
        key.load(keys.len(), |at| problem.key(keys[at], kv_head));
        key.own_features(false);
        pack_values(problem, keys, kv_head, stride, &mut values);
        let padded = step.padded_keys::<F>(level);
        transposed(key.rows(), key.stride, padded, &mut transposed_keys);
        for (of_group, head) in problem.group(kv_head).enumerate() {
            let rows = step.queries.len();
            query.load(rows, |at| problem.query(step.queries.start + at, head));
            numerators.clear();
            numerators.resize(rows * stride, F::zero());
            of_sums.clear();
            of_sums.resize(rows, F::zero());
            step.take_sums(&mut query, &sums.shifts, &mut factors);
            if step.has_sums() {
                product(
                    level,
                    rows,
                    query.left(),
                    (&sums.sums, stride),
                    Target::Overwrite,
                    &mut numerators,
                );
                query.products_with(&sums.totals, &mut of_sums);
            }
            query.own_features(true);
            factors.load(step.limits(problem), &query, &key, |_| true);
            pairs.resize(rows * padded, F::zero());
            product(
                level,
                rows,
                query.left(),
                (&transposed_keys, padded),
                Target::Overwrite,
                &mut pairs,
            );
            factors.multiply(level, &mut pairs);
            scale_rows(level, &factors.of_sums, (&mut numerators, stride));
            let left = Left::new(&pairs, padded).with_len(keys.len());
            product(level, rows, left, (&values, stride), Target::Add, &mut numerators);
            for (at, index) in step.queries.clone().enumerate() {
                let own = pairs[at * padded..][..padded].iter().copied().sum::<F>();
                let denominator = factors.of_sums[at] * of_sums[at] + own;
                denominators[[index, of_group]] = denominator;
                let row = &numerators[at * stride..][..problem.value_dim];
                write_quotient(out.row_mut(index), of_group, row, denominator);
            }
        }
        key.key_features(&mut sums);
        sums.add_chunk(&key, None, &values, &mut of_chunk);
    }
}

impl Step {
    /// The features of its queries relative to the sums, and their shifts.
    fn take_sums<F: Float>(&self, query: &mut Chunk<F>, shifts: &[F], factors: &mut Factors<F>) {
        factors.of_sums.clear();
        if self.has_sums() {
            query.query_features(shifts);
            factors.of_sums.extend_from_slice(&query.shifts[..query.len]);
        } else {
            factors.of_sums.resize(query.len, F::neg_infinity());
        }
    }
}

/// Computes the gradients of the rows of the first `num_queries[kv_head]` queries of each head, except
/// those that `is_summed(query, head)` excludes.
pub(in super::super) fn backward<F: Float>(
    problem: &FeatureProblem<'_, F>,
    num_queries: &[usize],
    upstream: &FeatureUpstream<'_, F>,
    is_summed: &(dyn Fn(usize, usize) -> bool + Sync),
    level: Level,
) -> Result<FeatureGradients<F>> {
    let mut grads = FeatureGradients::zeros(problem)?;
    let group = problem.heads / problem.kv_heads;
    type Task<'g, F> = (usize, [ArrayViewMut2<'g, F>; 3], Vec<F>);
    let queries = grads.query.axis_chunks_iter_mut(Axis(1), group * problem.dim);
    let keys = grads.key.axis_chunks_iter_mut(Axis(1), problem.dim);
    let values = grads.value.axis_chunks_iter_mut(Axis(1), problem.value_dim);
    let mut tasks: Vec<Task<'_, F>> = (0..problem.kv_heads)
        .zip(queries.zip(keys.zip(values)))
        .map(|(kv_head, (query, (key, value)))| (kv_head, [query, key, value], Vec::new()))
        .collect();
    parallel::for_each(tasks.iter_mut().collect(), problem.work(), |task: &mut _| {
        let (kv_head, grads, projection): &mut Task<'_, F> = task;
        let num_queries = num_queries[*kv_head];
        let head = Head { problem, kv_head: *kv_head, num_queries, upstream, is_summed };
        *projection = head.backward(level, grads);
    });
    let projections: Vec<_> = tasks.into_iter().map(|(_, _, projection)| projection).collect();
    let padded_dim = padded_dim(level, problem);
    projections.iter().for_each(|projection| grads.add_projection(padded_dim, projection));
    Ok(grads)
}

/// The backward pass of a head of keys.
struct Head<'h, 'p, 'u, F: Float> {
    problem: &'h FeatureProblem<'p, F>,
    kv_head: usize,
    num_queries: usize,
    upstream: &'h FeatureUpstream<'u, F>,
    is_summed: &'h (dyn Fn(usize, usize) -> bool + Sync),
}

impl<F: Float> Head<'_, '_, '_, F> {
    /// Returns the gradient of the projection.
    fn backward(
        &self,
        level: Level,
        [grad_query, grad_key, grad_value]: &mut [ArrayViewMut2<'_, F>; 3],
    ) -> Vec<F> {
        let Self { problem, kv_head, num_queries, .. } = *self;
        let mut inputs_vjp = InputsVjp::new(level, problem);
        let steps = steps(problem, num_queries);
        let shifts = self.queries(level, &steps, grad_query, &mut inputs_vjp);

        let mut key = Chunk::new(level, problem);
        let stride = value_stride(level, problem);
        let mut step_of_keys = KeyStep::default();
        let mut own = OwnPairs::new(level, problem);
        let mut grad_sums = KeySums::zeros(problem.num_features(), stride);
        for (at, step) in steps.iter().enumerate().rev() {
            let keys = &problem.keys[step.keys.clone()];
            key.load(keys.len(), |at| problem.key(keys[at], kv_head));
            key.key_features(&mut KeySums::without_sums(&shifts[at + 1]));
            step_of_keys.take(&key, &grad_sums);
            step_of_keys.run(problem, kv_head, keys, &grad_sums, &key);
            key.features_vjp(&step_of_keys.grad_features);
            lower(&mut grad_sums, &shifts[at]);
            if !step.queries.is_empty() {
                own.run(self, step, &mut grad_sums, &mut key, &mut step_of_keys);
                key.features_vjp(&own.grad_features);
            }
            let rows = step.keys.clone();
            step_of_keys.store(problem, 0, &mut grad_value.slice_mut(s![rows, ..]));
            inputs_vjp.run(&key, true, |at, c, grad| {
                grad_key[[step.keys.start + at, c]] = grad;
            });
        }
        inputs_vjp.grad_weight
    }

    /// Computes the gradients of the queries; returns the shifts before each step and after the last.
    fn queries(
        &self,
        level: Level,
        steps: &[Step],
        grad_query: &mut ArrayViewMut2<'_, F>,
        inputs_vjp: &mut InputsVjp<F>,
    ) -> Vec<Vec<F>> {
        let Self { problem, kv_head, .. } = *self;
        let (mut query, mut key) = (Chunk::new(level, problem), Chunk::new(level, problem));
        let stride = value_stride(level, problem);
        let mut sums = KeySums::zeros(problem.num_features(), stride);
        let mut quotients = QuotientGradients::new(stride);
        let (mut values, mut grad_features, mut grad_pairs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut transposed_sums, mut transposed_values) = (Vec::new(), Vec::new());
        let mut factors = Factors::default();
        let mut of_chunk = SumsOfChunk::default();
        let mut shifts = vec![sums.shifts.clone()];
        for step in steps {
            let keys = &problem.keys[step.keys.clone()];
            key.load(keys.len(), |at| problem.key(keys[at], kv_head));
            key.own_features(false);
            pack_values(problem, keys, kv_head, stride, &mut values);
            let padded = step.padded_keys::<F>(level);
            transposed(&values, stride, padded, &mut transposed_values);
            transposed(&sums.sums, stride, query.stride, &mut transposed_sums);
            for (of_group, head) in problem.group(kv_head).enumerate() {
                let rows = step.queries.len();
                let is_summed = |at: usize| (self.is_summed)(step.queries.start + at, head);
                query.load(rows, |at| problem.query(step.queries.start + at, head));
                let queries = step.queries.clone();
                quotients.load(self.upstream, queries, head, problem.value_dim, is_summed);
                step.take_sums(&mut query, &sums.shifts, &mut factors);
                // The part of the sums, nᵢ = αᵢ φᵢ S; its factor comes from the other part.
                let of_sums = query.features.clone();
                query.own_features(true);
                factors.load(step.limits(problem), &query, &key, is_summed);
                clear(&mut query, is_summed);

                grad_features.resize(rows * query.stride, F::zero());
                let left = self.grad_pairs(
                    level,
                    &quotients,
                    &factors,
                    (&transposed_values, padded),
                    &mut grad_pairs,
                );
                let left = left.with_len(keys.len());
                let right = (key.rows(), key.stride);
                product(level, rows, left, right, Target::Overwrite, &mut grad_features);
                query.features_vjp(&grad_features);
                if step.has_sums() {
                    query.features.copy_from_slice(&of_sums);
                    clear(&mut query, is_summed);
                    let left = quotients.left(problem.value_dim);
                    let right = (&transposed_sums[..], query.stride);
                    product(level, rows, left, right, Target::Overwrite, &mut grad_features);
                    let denominators = quotients.denominators.iter().copied();
                    let grads = (&mut grad_features[..], query.stride);
                    add_outer(level, denominators, &sums.totals, grads);
                    let grads = (&mut grad_features[..], query.stride);
                    scale_rows(level, &factors.of_sums, grads);
                    query.features_vjp(&grad_features);
                }
                inputs_vjp.run(&query, false, |at, c, grad| {
                    grad_query[[step.queries.start + at, of_group * problem.dim + c]] = grad;
                });
            }
            key.key_features(&mut sums);
            sums.add_chunk(&key, None, &values, &mut of_chunk);
            shifts.push(sums.shifts.clone());
        }
        shifts
    }

    /// Computes the gradients of the kernels of a step's pairs, rows × padded.
    fn grad_pairs<'g>(
        &self,
        level: Level,
        quotients: &QuotientGradients<F>,
        factors: &Factors<F>,
        (transposed_values, padded): (&[F], usize),
        grads: &'g mut Vec<F>,
    ) -> Left<'g, F> {
        let rows = quotients.denominators.len();
        grads.resize(rows * padded, F::zero());
        let left = quotients.left(self.problem.value_dim);
        product(level, rows, left, (transposed_values, padded), Target::Overwrite, grads);
        for (row, &g) in grads.chunks_exact_mut(padded.max(1)).zip(&quotients.denominators) {
            row.iter_mut().for_each(|grad| *grad += g);
        }
        factors.multiply(level, grads);
        Left::new(grads, padded)
    }
}

/// The pairs of a step on the way back, and its queries' part of the gradients of the sums before.
struct OwnPairs<F> {
    query: Chunk<F>,
    quotients: QuotientGradients<F>,
    factors: Factors<F>,
    of_chunk: SumsOfChunk<F>,
    /// The features of the keys, relative to the largest of each.
    grad_features: Vec<F>,
    pairs: Vec<F>,
    grad_pairs: Vec<F>,
    transposed_keys: Vec<F>,
    transposed_values: Vec<F>,
}

impl<F: Float> OwnPairs<F> {
    fn new(level: Level, problem: &FeatureProblem<'_, F>) -> Self {
        let stride = value_stride(level, problem);
        Self {
            query: Chunk::new(level, problem),
            quotients: QuotientGradients::new(stride),
            factors: Factors::default(),
            of_chunk: SumsOfChunk::default(),
            grad_features: Vec::new(),
            pairs: Vec::new(),
            grad_pairs: Vec::new(),
            transposed_keys: Vec::new(),
            transposed_values: Vec::new(),
        }
    }

    /// Adds to the gradients of the sums before the step, which have the same shifts as those sums.
    /// Writes the keys' own features to `key`.
    fn run(
        &mut self,
        head: &Head<'_, '_, '_, F>,
        step: &Step,
        grad_sums: &mut KeySums<F>,
        key: &mut Chunk<F>,
        step_of_keys: &mut KeyStep<F>,
    ) {
        let Head { problem, kv_head, .. } = *head;
        let Self { query, quotients, factors, of_chunk, .. } = self;
        let (level, stride) = (key.level, grad_sums.stride);
        key.own_features(false);
        self.grad_features.clear();
        self.grad_features.resize(key.len * key.stride, F::zero());
        let padded = step.padded_keys::<F>(level);
        transposed(key.rows(), key.stride, padded, &mut self.transposed_keys);
        transposed(&step_of_keys.values, stride, padded, &mut self.transposed_values);
        for head_of_query in problem.group(kv_head) {
            let rows = step.queries.len();
            let is_summed = |at: usize| (head.is_summed)(step.queries.start + at, head_of_query);
            query.load(rows, |at| problem.query(step.queries.start + at, head_of_query));
            let queries = step.queries.clone();
            quotients.load(head.upstream, queries, head_of_query, problem.value_dim, is_summed);
            step.take_sums(query, &grad_sums.shifts, factors);
            let of_sums = query.features.clone();
            query.own_features(true);
            factors.load(step.limits(problem), query, key, is_summed);
            clear(query, is_summed);

            self.pairs.resize(rows * padded, F::zero());
            let right = (&self.transposed_keys[..], padded);
            product(level, rows, query.left(), right, Target::Overwrite, &mut self.pairs);
            factors.multiply(level, &mut self.pairs);
            // nᵢ = … + Σ pᵢⱼ vⱼ, dᵢ = … + Σ pᵢⱼ, pᵢⱼ = 2^{Aᵢ + Bⱼ − Zᵢ} φᵢ·φⱼ
            let left = Left::new(&self.pairs, padded).with_len(key.len);
            let right = (&quotients.numerators[..], stride);
            let grad_values = &mut step_of_keys.grad_values;
            transposed_product(level, rows, left, right, Target::Add, grad_values);
            let right = (&self.transposed_values[..], padded);
            let left = head.grad_pairs(level, quotients, factors, right, &mut self.grad_pairs);
            let left = left.with_len(key.len);
            let right = (query.rows(), query.stride);
            transposed_product(level, rows, left, right, Target::Add, &mut self.grad_features);
            if step.has_sums() {
                query.features.copy_from_slice(&of_sums);
                clear(query, is_summed);
                for (at, &factor) in factors.of_sums.iter().enumerate() {
                    let row = &mut query.features[at * query.stride..][..query.stride];
                    row.iter_mut().for_each(|feature| *feature *= factor);
                }
                let QuotientGradients { numerators, denominators, .. } = &*quotients;
                grad_sums.add_chunk(query, Some(denominators), numerators, of_chunk);
            }
        }
    }
}

/// Clears the rows that are not summed.
fn clear<F: Float>(chunk: &mut Chunk<F>, is_summed: impl Fn(usize) -> bool) {
    for at in (0..chunk.len).filter(|&at| !is_summed(at)) {
        chunk.clear_row(at);
    }
}

/// Converts gradients of sums from their shifts to lower shifts.
fn lower<F: Float>(grads: &mut KeySums<F>, shifts: &[F]) {
    for (feature, &shift) in shifts.iter().enumerate() {
        let old = grads.shifts[feature];
        grads.shifts[feature] = shift;
        // The first have no shifts yet and are zeros.
        if old > shift {
            grads.rescale(feature, (shift - old).exp2());
        }
    }
}

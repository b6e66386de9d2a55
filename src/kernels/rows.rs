//! Softmax attention row by row: for a graph, or for few queries. The pairs of a row are visited in
//! tiles, with a running maximum and sum, and a tile is done for all heads while its rows are in the
//! first-level cache.
//!
//! The backward pass runs twice over the pairs, once by query and once by key through the transposed
//! graph, and computes their weights anew each time. So every sum has one owner, who adds in one
//! order: no atomics, no memory per edge, the same bits for any number of threads.

use super::exp2::exp2;
use super::matmul::Vector;
use super::parallel::{self, parts, row_chunks};
use super::problem::{FiniteRows, Problem, Slices, Upstream};
use super::vector::{add_weighted_rows, dot};
use crate::error::Channel;
use crate::float::Float;
use crate::gradients::GradientsMut;
use crate::graph::Graph;
use crate::inputs::{Pair, Pattern, head_columns};
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array2, ArrayViewMut2};
use std::f64::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Rows are handed to threads in at most this many parts, of at least so many rows.
const PARTS: usize = 64;
const ROWS_OF_PART: usize = 64;

/// Longer tiles only cost memory.
const LARGEST_TILE: usize = 1024;

/// What the rows of pairs belong to.
enum Pairs<'g> {
    /// Queries that see all keys.
    Dense { num_keys: usize },
    /// The queries of a graph.
    ByQuery(&'g Graph),
    /// The keys of a graph; this is its transpose.
    ByKey(&'g Graph),
}

/// What is left of a row of pairs.
struct Row<'g> {
    pairs: &'g Pairs<'g>,
    /// The query or key.
    row: usize,
    slots: Range<usize>,
}

impl<'g> Row<'g> {
    fn new(pairs: &'g Pairs<'g>, row: usize) -> Self {
        let slots = match pairs {
            Pairs::Dense { num_keys } => 0..*num_keys,
            Pairs::ByQuery(graph) | Pairs::ByKey(graph) => graph.slots(row),
        };
        Self { pairs, row, slots }
    }

    /// Appends the pairs of some slots. In loops of known length: one by one through a filter takes
    /// as long as the arithmetic on a pair.
    #[inline(always)]
    fn list(&self, slots: Range<usize>, list: &mut Vec<Pair>) {
        let row = self.row;
        match *self.pairs {
            Pairs::Dense { num_keys } => {
                let first = row * num_keys;
                list.extend(slots.map(|key| Pair { query: row, key, index: first + key }));
            }
            Pairs::ByQuery(graph) => {
                list.extend(numbered(graph, slots).map(|(key, index)| Pair {
                    query: row,
                    key,
                    index,
                }));
            }
            Pairs::ByKey(graph) => list.extend(numbered(graph, slots).map(|(query, index)| Pair {
                query,
                key: row,
                index,
            })),
        }
    }
}

/// The index and the edge number of some slots.
#[inline(always)]
fn numbered(graph: &Graph, slots: Range<usize>) -> impl ExactSizeIterator<Item = (usize, usize)> {
    let indices = &graph.indices()[slots.clone()];
    let ids = graph.edge_ids().map(|ids| &ids[slots.clone()]);
    indices.iter().enumerate().map(move |(at, &index)| {
        (index as usize, ids.map_or(slots.start + at, |ids| ids[at] as usize))
    })
}

/// The pairs of a tile of one row, and a number for each head and pair, head after head.
struct Tile<F> {
    len: usize,
    /// From head to head: the length in whole vectors.
    stride: usize,
    pairs: Vec<Pair>,
    /// Logits in units of ln 2, −∞ where hidden or past the end; then weights.
    weights: Vec<F>,
}

impl<F: Float> Tile<F> {
    #[inline(always)]
    fn new<S: Simd>(_: S, heads: usize, len: usize) -> Self {
        let stride = len.next_multiple_of(Vector::<S, F>::LEN);
        let weights = vec![F::zero(); heads * stride];
        Self { len, stride, pairs: Vec::with_capacity(len), weights }
    }

    /// The next visible pairs of a row; `false` at its end.
    #[inline(always)]
    fn fill(&mut self, problem: &Problem<'_, F>, row: &mut Row<'_>) -> bool {
        self.pairs.clear();
        while self.pairs.is_empty() && !row.slots.is_empty() {
            let start = row.slots.start;
            let slots = start..row.slots.end.min(start + self.len);
            row.slots.start = slots.end;
            row.list(slots, &mut self.pairs);
            if problem.inputs.has(Channel::Mask) {
                self.pairs.retain(|&pair| problem.inputs.sees(pair));
            }
        }
        !self.pairs.is_empty()
    }

    /// The place of a head's pairs, and with those past the end that fill the last vector.
    #[inline(always)]
    fn of_head<S: Simd>(&self, _: S, head: usize) -> [Range<usize>; 2] {
        let (start, len) = (head * self.stride, self.pairs.len());
        [start..start + len, start..start + len.next_multiple_of(Vector::<S, F>::LEN)]
    }

    /// The logits. `own` is the row that all pairs have in common, times the scale and log₂ e;
    /// `columns` are a head's in it and in the other row of a pair.
    ///
    /// Head by head over all pairs: the work on one pair is so short that the CPU fetches many rows
    /// at a time, and the rows of a tile stay in the first-level cache for the next head.
    #[inline(always)]
    fn score<'r, S: Simd>(
        &mut self,
        simd: S,
        problem: &Problem<'_, F>,
        own: &[F],
        columns: impl Fn(usize) -> [Range<usize>; 2],
        other: impl Fn(&Pair) -> &'r [F],
    ) {
        for head in 0..problem.heads {
            let [own_columns, other_columns] = columns(head);
            let own = &own[own_columns];
            let logits = &mut self.weights[head * self.stride..][..self.stride];
            for (logit, pair) in logits.iter_mut().zip(&self.pairs) {
                *logit = dot(simd, own, &other(pair)[other_columns.clone()]);
            }
        }
        for head in 0..problem.heads {
            let [pairs, vectors] = self.of_head(simd, head);
            self.weights[pairs.end..vectors.end].fill(F::neg_infinity());
            if problem.bias.is_some() {
                for (logit, &pair) in self.weights[pairs].iter_mut().zip(&self.pairs) {
                    *logit = match problem.bias_of(pair, head) {
                        Some(bias) => *logit + bias * F::of(LOG2_E),
                        None => F::neg_infinity(),
                    };
                }
            }
        }
    }
}

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(crate) fn forward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    level: Level,
    out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let longest_row = match problem.inputs.pattern() {
        Pattern::Dense => problem.inputs.num_keys(),
        Pattern::Graph(graph) => longest_row(graph),
    };
    let tile_len = tile_len.min(longest_row).clamp(1, LARGEST_TILE);
    // Mask and causal pattern hide pairs before they come here; a bias does so head by head.
    let may_hide = problem.bias.is_some();
    let values = FiniteRows::new(problem.value.slices(), may_hide);
    let parts = parts(problem.inputs.num_queries(), ROWS_OF_PART, PARTS);
    let outs = row_chunks(out, parts.iter().map(Range::len));
    let log_sums = row_chunks(log_sum_exp.view_mut(), parts.iter().map(Range::len));
    let tasks = parts.iter().cloned().zip(outs).zip(log_sums).collect();
    parallel::for_each(tasks, problem.work(), |((queries, out), log_sums)| {
        dispatch!(level, simd => {
            forward_rows(simd, problem, &values, tile_len, queries, out, log_sums);
        });
    });
}

#[inline(always)]
fn forward_rows<S: Simd, F: Float>(
    simd: S,
    problem: &Problem<'_, F>,
    values: &FiniteRows<'_, F>,
    tile_len: usize,
    queries: Range<usize>,
    mut out: ArrayViewMut2<'_, F>,
    mut log_sum_exp: ArrayViewMut2<'_, F>,
) {
    let (heads, key_dim, dim) = (problem.heads, problem.key_dim, problem.value_dim);
    let factor = problem.scale * F::of(LOG2_E);
    let (key_rows, value_rows) = (problem.key.slices(), values.slices());
    let pairs_of = match problem.inputs.pattern() {
        Pattern::Dense => Pairs::Dense { num_keys: problem.inputs.num_keys() },
        Pattern::Graph(graph) => Pairs::ByQuery(graph),
    };
    let mut tile = Tile::new(simd, heads, tile_len);
    let mut scaled_query = vec![F::zero(); heads * key_dim];
    let mut maxima = vec![F::zero(); heads];
    let mut sums = vec![F::zero(); heads];
    let mut row_out = vec![F::zero(); heads * dim];
    for (r, query) in queries.enumerate() {
        scale_row(factor, problem.query.row(query), &mut scaled_query);
        maxima.fill(F::neg_infinity());
        sums.fill(F::zero());
        row_out.fill(F::zero());

        let mut row = Row::new(&pairs_of, query);
        while tile.fill(problem, &mut row) {
            let columns =
                |head| [head_columns(head, key_dim), head_columns(problem.kv_head(head), key_dim)];
            let key = |pair: &Pair| key_rows.row(pair.key);
            tile.score(simd, problem, &scaled_query, columns, key);
            for head in 0..heads {
                let [pairs, vectors] = tile.of_head(simd, head);
                let logits = &mut tile.weights[vectors];
                let old_max = maxima[head];
                let largest = |max, &logit| if logit > max { logit } else { max };
                let max = logits.iter().fold(old_max, largest);
                // Before the first key there is no maximum to shift by, and nothing to rescale.
                let shift = if max == F::neg_infinity() { F::zero() } else { max };
                let alpha = match old_max {
                    _ if old_max == max => F::one(),
                    _ if old_max == F::neg_infinity() => F::zero(),
                    _ => (old_max - shift).exp2(),
                };
                maxima[head] = max;
                let sum = exponentials(simd, logits, shift);
                sums[head] = sums[head] * alpha + sum;

                if let Some(dropout) = problem.dropout {
                    for (weight, pair) in tile.weights[pairs.clone()].iter_mut().zip(&tile.pairs) {
                        *weight *= dropout.multiplier::<F>(pair.index, head);
                    }
                }
                let columns = head_columns(problem.kv_head(head), dim);
                let row_out = &mut row_out[head_columns(head, dim)];
                let value = |t: usize| &value_rows.row(tile.pairs[t].key)[columns.clone()];
                add_weighted_rows(simd, row_out, alpha, &tile.weights[pairs.clone()], value);
                add_bad(problem, &tile, pairs, head, values, row_out, |pair| {
                    (pair.key, problem.value(pair.key, head), true)
                });
            }
        }

        for head in 0..heads {
            // Nothing seen: not even 0/0.
            let is_empty = sums[head] == F::zero();
            let factor = F::one() / sums[head];
            for value in &mut row_out[head_columns(head, dim)] {
                *value = if is_empty { F::zero() } else { *value * factor };
            }
            let log_sum = maxima[head] * F::of(LN_2) + sums[head].ln();
            log_sum_exp[[r, head]] = if is_empty { F::neg_infinity() } else { log_sum };
        }
        out.row_mut(r).iter_mut().zip(&row_out).for_each(|(out, &value)| *out = value);
    }
}

/// Replaces logits by 2^(logit − shift) and returns their sum. Whole vectors.
#[inline(always)]
fn exponentials<S: Simd, F: Float>(simd: S, logits: &mut [F], shift: F) -> F {
    let shift = Vector::<S, F>::splat(simd, shift);
    let mut sum = Vector::<S, F>::splat(simd, F::zero());
    for logits in logits.chunks_exact_mut(Vector::<S, F>::LEN) {
        let weights = exp2::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits) - shift);
        sum += weights;
        weights.store_slice(logits);
    }
    sum.reduce_sum()
}

/// Adds what is not finite in the rows of visible pairs, which the products left out. `row_of`
/// gives a pair's row, its head's columns in it, and whether the query sees any key.
#[inline]
fn add_bad<'r, F: Float>(
    problem: &Problem<'_, F>,
    tile: &Tile<F>,
    weights: Range<usize>,
    head: usize,
    rows: &FiniteRows<'_, F>,
    sum: &mut [F],
    row_of: impl Fn(Pair) -> (usize, &'r [F], bool),
) {
    if rows.bad.is_empty() {
        return;
    }
    for (&pair, &weight) in tile.pairs.iter().zip(&tile.weights[weights]) {
        let (row, values, is_live) = row_of(pair);
        if is_live && rows.bad.binary_search(&row).is_ok() && problem.bias_of(pair, head).is_some()
        {
            for (sum, &value) in sum.iter_mut().zip(values) {
                if !value.is_finite() {
                    *sum += weight * value;
                }
            }
        }
    }
}

/// Queries with the gradient of their outputs, or keys with their values: `a` meets the other
/// side's `a` in a logit, and `b` meets `b` in the gradient of a weight.
struct Side<'r, F: Float> {
    a: Slices<'r, F>,
    b: Slices<'r, F>,
    finite_a: FiniteRows<'r, F>,
    finite_b: FiniteRows<'r, F>,
    /// Whether the columns are laid out in heads of keys and values.
    is_keys: bool,
}

impl<'r, F: Float> Side<'r, F> {
    fn new(a: Slices<'r, F>, b: Slices<'r, F>, is_keys: bool, may_hide: bool) -> Self {
        let finite_a = FiniteRows::new(a, may_hide);
        let finite_b = FiniteRows::new(b, may_hide);
        Self { a, b, finite_a, finite_b, is_keys }
    }

    #[inline(always)]
    fn columns(&self, problem: &Problem<'_, F>, head: usize, dim: usize) -> Range<usize> {
        head_columns(if self.is_keys { problem.kv_head(head) } else { head }, dim)
    }
}

/// Adds the gradients, given the outputs and log-sum-exp of the forward pass.
pub(crate) fn backward<F: Float>(
    problem: &Problem<'_, F>,
    graph: &Graph,
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) {
    let inputs = &problem.inputs;
    let num_rows = inputs.num_queries() * problem.heads;
    let terms: Vec<[F; 2]> = (0..num_rows)
        .map(|at| upstream.row_terms(at / problem.heads, at % problem.heads, problem.value_dim))
        .collect();
    let may_hide = problem.bias.is_some() || upstream.has_empty_rows();
    let queries = Side::new(problem.query.slices(), upstream.grad_out, false, may_hide);
    let keys = Side::new(problem.key.slices(), problem.value.slices(), true, may_hide);

    // By query. The gradient of the bias goes to places all over its array, in turn.
    let tile_of = |graph: &Graph| tile_len.min(longest_row(graph)).clamp(1, LARGEST_TILE);
    let run = |part: Part<'_, F>| {
        let own = Own { own: &queries, other: &keys, tile_len: tile_of(graph) };
        let pairs = &Pairs::ByQuery(graph);
        dispatch!(level, simd => backward_rows(simd, problem, own, &terms, pairs, part));
    };
    if grads.bias.is_some() {
        let rows = 0..inputs.num_queries();
        let (grad_a, grad_bias) =
            (grads.query.view_mut(), grads.bias.as_mut().map(|b| b.view_mut()));
        run(Part { rows, grad_a, grad_b: None, grad_bias });
    } else {
        let parts = parts(inputs.num_queries(), ROWS_OF_PART, PARTS);
        let grads = row_chunks(grads.query.view_mut(), parts.iter().map(Range::len));
        let part = |(rows, grad_a)| Part { rows, grad_a, grad_b: None, grad_bias: None };
        let tasks = parts.iter().cloned().zip(grads).map(part).collect();
        parallel::for_each(tasks, problem.work(), run);
    }

    // By key.
    let transposed = graph.transpose();
    let parts = parts(inputs.num_keys(), ROWS_OF_PART, PARTS);
    let grad_keys = row_chunks(grads.key.view_mut(), parts.iter().map(Range::len));
    let grad_values = row_chunks(grads.value.view_mut(), parts.iter().map(Range::len));
    let tasks = parts.iter().cloned().zip(grad_keys).zip(grad_values);
    let part =
        |((rows, grad_a), grad_b)| Part { rows, grad_a, grad_b: Some(grad_b), grad_bias: None };
    parallel::for_each(tasks.map(part).collect(), problem.work(), |part| {
        let own = Own { own: &keys, other: &queries, tile_len: tile_of(transposed) };
        let pairs = &Pairs::ByKey(transposed);
        dispatch!(level, simd => backward_rows(simd, problem, own, &terms, pairs, part));
    });
}

/// The side whose gradients are summed, and the other.
struct Own<'s, 'r, F: Float> {
    own: &'s Side<'r, F>,
    other: &'s Side<'r, F>,
    tile_len: usize,
}

/// Some rows of the side whose gradients are summed, and where those go.
struct Part<'g, F> {
    rows: Range<usize>,
    grad_a: ArrayViewMut2<'g, F>,
    grad_b: Option<ArrayViewMut2<'g, F>>,
    grad_bias: Option<ArrayViewMut2<'g, F>>,
}

#[inline(always)]
fn backward_rows<S: Simd, F: Float>(
    simd: S,
    problem: &Problem<'_, F>,
    Own { own, other, tile_len }: Own<'_, '_, F>,
    terms: &[[F; 2]],
    pairs_of: &Pairs<'_>,
    mut part: Part<'_, F>,
) {
    let (heads, key_dim, value_dim) = (problem.heads, problem.key_dim, problem.value_dim);
    let factor = problem.scale * F::of(LOG2_E);
    let is_live = |pair: Pair, head: usize| terms[pair.query * heads + head][0] != F::infinity();
    let other_of = |pair: Pair| if other.is_keys { pair.key } else { pair.query };
    let (a_rows, b_rows) = (other.a, other.b);
    let (finite_a, finite_b) = (other.finite_a.slices(), other.finite_b.slices());
    let mut tile = Tile::new(simd, heads, tile_len);
    // Of one head: L and δ of the query of each pair, and the gradient of its weight, then logit.
    let mut log_sums = vec![F::zero(); tile.stride];
    let mut deltas = vec![F::zero(); tile.stride];
    let mut grad_logits = vec![F::zero(); tile.stride];
    let mut scaled_a = vec![F::zero(); own.a.columns];
    let mut sum_a = vec![F::zero(); own.a.columns];
    let mut sum_b = vec![F::zero(); own.b.columns];
    for (r, row) in part.rows.clone().enumerate() {
        scale_row(factor, own.a.row(row), &mut scaled_a);
        let own_b = own.b.row(row);
        sum_a.fill(F::zero());
        sum_b.fill(F::zero());
        let mut row = Row::new(pairs_of, row);
        while tile.fill(problem, &mut row) {
            let columns = |head| {
                let columns = |side: &Side<'_, F>| side.columns(problem, head, key_dim);
                [columns(own), columns(other)]
            };
            let row = |pair: &Pair| a_rows.row(other_of(*pair));
            tile.score(simd, problem, &scaled_a, columns, row);
            for head in 0..heads {
                let own_b = &own_b[own.columns(problem, head, value_dim)];
                let columns = other.columns(problem, head, value_dim);
                for (t, pair) in tile.pairs.iter().enumerate() {
                    [log_sums[t], deltas[t]] = terms[pair.query * heads + head];
                    // dp = m g·v
                    let product = dot(simd, own_b, &b_rows.row(other_of(*pair))[columns.clone()]);
                    grad_logits[t] = problem.multiplier(pair.index, head) * product;
                }
                let [pairs, vectors] = tile.of_head(simd, head);
                let weights = &mut tile.weights[vectors];
                weights_and_logits_vjp(simd, weights, &log_sums, &deltas, &mut grad_logits);
                let grad_logits = &grad_logits[..tile.pairs.len()];
                if let (Some(grad), Some(bias)) = (&mut part.grad_bias, problem.bias) {
                    for (&pair, &grad_logit) in tile.pairs.iter().zip(grad_logits) {
                        grad[bias.slot(pair, head)] += grad_logit;
                    }
                }

                // s = scale a·a'
                let columns = other.columns(problem, head, key_dim);
                let sum = &mut sum_a[own.columns(problem, head, key_dim)];
                let a = |t: usize| &finite_a.row(other_of(tile.pairs[t]))[columns.clone()];
                add_weighted_rows(simd, sum, F::one(), grad_logits, a);
                // õ = m p v
                if part.grad_b.is_some() {
                    if problem.dropout.is_some() {
                        let weights = tile.weights[pairs.clone()].iter_mut();
                        for (weight, pair) in weights.zip(&tile.pairs) {
                            *weight *= problem.multiplier(pair.index, head);
                        }
                    }
                    let columns = other.columns(problem, head, value_dim);
                    let sum = &mut sum_b[own.columns(problem, head, value_dim)];
                    let b = |t: usize| &finite_b.row(other_of(tile.pairs[t]))[columns.clone()];
                    add_weighted_rows(simd, sum, F::one(), &tile.weights[pairs.clone()], b);
                    add_bad(problem, &tile, pairs.clone(), head, &other.finite_b, sum, |pair| {
                        let row = other_of(pair);
                        (row, &other.b.row(row)[columns.clone()], is_live(pair, head))
                    });
                }
                if !other.finite_a.bad.is_empty() {
                    tile.weights[pairs.clone()].copy_from_slice(grad_logits);
                    let sum = &mut sum_a[own.columns(problem, head, key_dim)];
                    add_bad(problem, &tile, pairs, head, &other.finite_a, sum, |pair| {
                        let row = other_of(pair);
                        (row, &other.a.row(row)[columns.clone()], is_live(pair, head))
                    });
                }
            }
        }
        for (sum, &grad) in part.grad_a.row_mut(r).iter_mut().zip(&sum_a) {
            *sum += problem.scale * grad;
        }
        if let Some(grad_b) = &mut part.grad_b {
            grad_b.row_mut(r).iter_mut().zip(&sum_b).for_each(|(sum, &grad)| *sum += grad);
        }
    }
}

/// p = e^{s − L} in place of the logits, ds = p (dp − δ) in place of the gradients of the weights; 0
/// for hidden pairs, whatever dp. Whole vectors.
#[inline(always)]
fn weights_and_logits_vjp<S: Simd, F: Float>(
    simd: S,
    logits: &mut [F],
    log_sums: &[F],
    deltas: &[F],
    grads: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
    let highest = Vector::<S, F>::splat(simd, F::infinity());
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let terms = log_sums.chunks_exact(len).zip(deltas.chunks_exact(len));
    let terms = terms.zip(grads.chunks_exact_mut(len));
    for (logits, ((log_sums, deltas), grads)) in logits.chunks_exact_mut(len).zip(terms) {
        let logit = Vector::<S, F>::from_slice(simd, logits);
        let log_sum = Vector::<S, F>::from_slice(simd, log_sums);
        let grad =
            Vector::<S, F>::from_slice(simd, grads) - Vector::<S, F>::from_slice(simd, deltas);
        // By the logit itself: −∞ less a log-sum that is NaN is not −∞ any more.
        let logit = log_sum.simd_eq(highest).select(lowest, logit);
        let is_hidden = logit.simd_eq(lowest);
        let weight = exp2::<S, F>(simd, is_hidden.select(lowest, logit - log_sum));
        is_hidden.select(zero, weight * grad).store_slice(grads);
        weight.store_slice(logits);
    }
}

#[inline(always)]
fn scale_row<F: Float>(factor: F, row: &[F], scaled: &mut [F]) {
    scaled.iter_mut().zip(row).for_each(|(scaled, &value)| *scaled = factor * value);
}

fn longest_row(graph: &Graph) -> usize {
    graph.offsets().windows(2).map(|row| row[1] - row[0]).max().unwrap_or(0)
}

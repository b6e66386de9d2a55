//! Softmax attention row by row: for each query its pairs in tiles, all heads in one visit of a
//! neighbour, with a running maximum and sum.

use super::problem::Problem;
use super::vector::{axpy, dot, scale};
use crate::float::{Float, nan_max};
use crate::gradients::GradientsMut;
use crate::inputs::{Pair, head_columns};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// Pairs and logits of one tile of a row; reused from row to row.
struct Tile<F> {
    pairs: Vec<Pair>,
    /// heads × tile: the logits, −∞ where hidden.
    logits: Vec<F>,
    /// heads × tile: pairs that this head skips.
    hidden: Vec<bool>,
}

impl<F: Float> Tile<F> {
    fn new(heads: usize, len: usize) -> Self {
        Self {
            pairs: Vec::with_capacity(len),
            logits: vec![F::zero(); heads * len],
            hidden: vec![false; heads * len],
        }
    }

    /// The next pairs of a row and their logits; `false` at the end of the row.
    fn fill(
        &mut self,
        problem: &Problem<'_, F>,
        row: &mut impl Iterator<Item = Pair>,
        len: usize,
    ) -> bool {
        self.pairs.clear();
        self.pairs.extend(row.take(len));
        for (t, &pair) in self.pairs.iter().enumerate() {
            for head in 0..problem.heads {
                let bias = problem.bias_of(pair, head);
                self.hidden[head * len + t] = bias.is_none();
                self.logits[head * len + t] = bias.map_or(F::neg_infinity(), |bias| {
                    let product = dot(problem.query(pair.query, head), problem.key(pair.key, head));
                    problem.scale * product + bias
                });
            }
        }
        !self.pairs.is_empty()
    }
}

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(crate) fn forward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    mut out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let (heads, dim) = (problem.heads, problem.value_dim);
    let len = tile_len.min(longest_row(problem));
    let mut tile = Tile::new(heads, len);
    let mut sums = vec![F::zero(); heads];
    let mut row_out = vec![F::zero(); heads * dim];
    for query in 0..problem.inputs.num_queries() {
        let mut row = problem.inputs.row(query);
        let mut maxima = log_sum_exp.row_mut(query);
        maxima.fill(F::neg_infinity());
        sums.fill(F::zero());
        row_out.fill(F::zero());

        while tile.fill(problem, &mut row, len) {
            for head in 0..heads {
                let logits = &mut tile.logits[head * len..][..tile.pairs.len()];
                let old_max = maxima[head];
                let max = logits.iter().copied().fold(old_max, nan_max);
                maxima[head] = max;
                let shift = finite_shift(max);
                // The sums so far, relative to the new maximum: once for the whole tile.
                let alpha = (old_max - shift).exp();
                let row_out = &mut row_out[head_columns(head, dim)];
                scale(alpha, row_out);
                sums[head] *= alpha;
                for logit in logits.iter_mut() {
                    *logit = (*logit - shift).exp();
                    sums[head] += *logit;
                }
            }
            for (t, &pair) in tile.pairs.iter().enumerate() {
                for head in 0..heads {
                    if !tile.hidden[head * len + t] {
                        let weight =
                            tile.logits[head * len + t] * problem.multiplier(pair.index, head);
                        let row_out = &mut row_out[head_columns(head, dim)];
                        axpy(weight, problem.value(pair.key, head), row_out);
                    }
                }
            }
        }

        for head in 0..heads {
            let row_out = &mut row_out[head_columns(head, dim)];
            if maxima[head] == F::neg_infinity() {
                row_out.fill(F::zero());
            } else {
                scale(F::one() / sums[head], row_out);
                maxima[head] += sums[head].ln();
            }
        }
        out.row_mut(query).iter_mut().zip(&row_out).for_each(|(out, &value)| *out = value);
    }
}

/// Adds the gradients, given the outputs and log-sum-exp of the forward pass.
pub(crate) fn backward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    out: ArrayView2<'_, F>,
    log_sum_exp: &Array2<F>,
    grad_out: ArrayView2<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) {
    let heads = problem.heads;
    let len = tile_len.min(longest_row(problem));
    let mut tile = Tile::new(heads, len);
    let mut deltas = vec![F::zero(); heads];
    let mut grad_row = vec![F::zero(); grad_out.ncols()];
    let mut grad_query = vec![F::zero(); heads * problem.key_dim];
    let inputs = &problem.inputs;
    let mut grad_key = Array2::zeros(inputs.key().raw_dim());
    let mut grad_value = Array2::zeros(inputs.value().raw_dim());
    for query in 0..inputs.num_queries() {
        grad_row.iter_mut().zip(grad_out.row(query)).for_each(|(row, &grad)| *row = grad);
        grad_query.fill(F::zero());
        // δ = g · o
        for (head, delta) in deltas.iter_mut().enumerate() {
            let columns = head_columns(head, problem.value_dim);
            *delta = columns.map(|column| grad_row[column] * out[[query, column]]).sum();
        }
        let mut row = inputs.row(query);
        while tile.fill(problem, &mut row, len) {
            for (t, &pair) in tile.pairs.iter().enumerate() {
                for head in 0..heads {
                    let log_sum = log_sum_exp[[query, head]];
                    if tile.hidden[head * len + t] || log_sum == F::neg_infinity() {
                        continue;
                    }
                    let grad_row = &grad_row[head_columns(head, problem.value_dim)];
                    let kv_head = problem.kv_head(head);
                    // p = e^{s − L}, õ += m p v
                    let weight = (tile.logits[head * len + t] - log_sum).exp();
                    let multiplier = problem.multiplier(pair.index, head);
                    let grad_value = row_slice(&mut grad_value, pair.key);
                    let grad_value = &mut grad_value[head_columns(kv_head, problem.value_dim)];
                    axpy(weight * multiplier, grad_row, grad_value);
                    // ds = p (m g·v − δ)
                    let grad_weight = multiplier * dot(grad_row, problem.value(pair.key, head));
                    let grad_logit = weight * (grad_weight - deltas[head]);
                    if let (Some(grad), Some(bias)) = (&mut grads.bias, problem.bias) {
                        grad[bias.slot(pair, head)] += grad_logit;
                    }
                    // s = scale q·k + b
                    let grad_product = problem.scale * grad_logit;
                    let grad_query = &mut grad_query[head_columns(head, problem.key_dim)];
                    axpy(grad_product, problem.key(pair.key, head), grad_query);
                    let grad_key = row_slice(&mut grad_key, pair.key);
                    let grad_key = &mut grad_key[head_columns(kv_head, problem.key_dim)];
                    axpy(grad_product, problem.query(query, head), grad_key);
                }
            }
        }
        let grads = grads.query.row_mut(query);
        grads.into_iter().zip(&grad_query).for_each(|(sum, &grad)| *sum += grad);
    }
    grads.key += &grad_key;
    grads.value += &grad_value;
}

/// What logits are shifted by before the exponential: their maximum, or 0 where there is none, so
/// that −∞ − (−∞) never arises.
#[inline]
pub(crate) fn finite_shift<F: Float>(max: F) -> F {
    if max == F::neg_infinity() { F::zero() } else { max }
}

/// At least 1, so that it is a valid tile.
fn longest_row<F: Float>(problem: &Problem<'_, F>) -> usize {
    let inputs = &problem.inputs;
    let len = |query| match inputs.pattern() {
        crate::Pattern::Dense => inputs.num_keys(),
        crate::Pattern::Graph(graph) => graph.slots(query).len(),
    };
    (0..inputs.num_queries()).map(len).max().unwrap_or(0).max(1)
}

fn row_slice<F>(matrix: &mut Array2<F>, row: usize) -> &mut [F] {
    let columns = matrix.ncols();
    let data = matrix.as_slice_mut().expect("a fresh matrix is contiguous");
    &mut data[row * columns..(row + 1) * columns]
}

//! Softmax attention in tiles of queries × keys, one head at a time (Dao et al. 2022, 2205.14135;
//! Dao 2023, 2307.08691), with the scores transposed: a tile is keys × queries, so that maxima,
//! exponentials and sums run along contiguous queries and the rows of keys and values are read as
//! they lie.

use super::graph::finite_shift;
use super::problem::Problem;
use super::vector::{axpy, scale};
use crate::float::{Float, nan_max};
use crate::gradients::GradientsMut;
use crate::inputs::{Pair, head_columns};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// Queries of a block and keys of a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileSizes {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
}

/// A block of queries of one head, and its scores against one tile of keys.
struct Block<'p, 'a, F: Float> {
    problem: &'p Problem<'a, F>,
    head: usize,
    queries: Range<usize>,
    /// key_dim × queries: the queries times the scale, transposed.
    scaled_queries: Vec<F>,
    keys: Range<usize>,
    /// keys × queries: logits, −∞ where hidden.
    scores: Vec<F>,
    /// keys × queries, up to date only while `any_hidden`.
    hidden: Vec<bool>,
    any_hidden: bool,
}

impl<'p, 'a, F: Float> Block<'p, 'a, F> {
    fn new(problem: &'p Problem<'a, F>, sizes: TileSizes) -> Self {
        let tile = sizes.queries * sizes.keys;
        Self {
            problem,
            head: 0,
            queries: 0..0,
            scaled_queries: Vec::with_capacity(problem.key_dim * sizes.queries),
            keys: 0..0,
            scores: vec![F::zero(); tile],
            hidden: vec![false; tile],
            any_hidden: false,
        }
    }

    fn load_queries(&mut self, head: usize, queries: Range<usize>) {
        (self.head, self.queries) = (head, queries);
        let problem = self.problem;
        pack_transposed(
            problem.key_dim,
            self.queries.clone().map(|query| problem.query(query, head)),
            problem.scale,
            &mut self.scaled_queries,
        );
    }

    /// Keys from this one on are hidden from the whole block by the causal pattern.
    fn num_visible_keys(&self) -> usize {
        let last = self.queries.end.saturating_sub(1);
        self.problem.inputs.num_visible_keys(last)
    }

    /// Logits of the block against a tile of keys.
    fn score(&mut self, keys: Range<usize>) {
        self.keys = keys;
        let Self { problem, head, .. } = *self;
        let key = |key| problem.key(key, head);
        transposed_products(
            self.keys.clone().map(key),
            &self.scaled_queries,
            self.width(),
            &mut self.scores,
        );

        let inputs = &problem.inputs;
        let below_diagonal = self.keys.end <= inputs.num_visible_keys(self.queries.start);
        self.any_hidden = false;
        if below_diagonal && inputs.mask().is_none() && problem.bias.is_none() {
            return;
        }
        for (k, key) in self.keys.clone().enumerate() {
            for (r, query) in self.queries.clone().enumerate() {
                let at = k * self.queries.len() + r;
                let pair = self.pair(query, key);
                let visible = key < inputs.num_visible_keys(query)
                    && inputs.mask().is_none_or(|mask| mask[[query, key]]);
                let bias = problem.bias_of(pair, head).filter(|_| visible);
                self.hidden[at] = bias.is_none();
                self.any_hidden |= bias.is_none();
                self.scores[at] = bias.map_or(F::neg_infinity(), |bias| self.scores[at] + bias);
            }
        }
    }

    fn width(&self) -> usize {
        self.queries.len()
    }

    fn pair(&self, query: usize, key: usize) -> Pair {
        let index = query * self.problem.inputs.num_keys() + key;
        Pair { query, key, index }
    }

    /// What dropout multiplies the weight of row r and key k of the tile by.
    fn multiplier(&self, k: usize, r: usize) -> F {
        let pair = self.pair(self.queries.start + r, self.keys.start + k);
        self.problem.multiplier(pair.index, self.head)
    }

    fn is_hidden(&self, at: usize) -> bool {
        self.any_hidden && self.hidden[at]
    }
}

/// Overwrites `out` and `log_sum_exp` (num_queries × heads).
pub(crate) fn forward<F: Float>(
    problem: &Problem<'_, F>,
    sizes: TileSizes,
    mut out: ArrayViewMut2<'_, F>,
    log_sum_exp: &mut Array2<F>,
) {
    let sizes = clip(problem, sizes);
    let dim = problem.value_dim;
    let mut block = Block::new(problem, sizes);
    let mut maxima = vec![F::zero(); sizes.queries];
    let mut sums = vec![F::zero(); sizes.queries];
    let mut alphas = vec![F::zero(); sizes.queries];
    let mut block_out = Array2::zeros((sizes.queries, dim));
    for (head, queries) in blocks(problem, sizes) {
        block.load_queries(head, queries.clone());
        let width = block.width();
        maxima.fill(F::neg_infinity());
        sums.fill(F::zero());
        block_out.fill(F::zero());

        for keys in ranges(block.num_visible_keys(), sizes.keys) {
            block.score(keys);
            // m' = max(m, rowmax S), α = e^{m − m'}; the maxima first hold m', then the shift.
            alphas.copy_from_slice(&maxima);
            for scores in block.scores.chunks_exact(width).take(block.keys.len()) {
                maxima.iter_mut().zip(scores).for_each(|(max, &score)| *max = nan_max(*max, score));
            }
            for r in 0..width {
                alphas[r] = (alphas[r] - finite_shift(maxima[r])).exp();
                sums[r] *= alphas[r];
            }
            // P = e^{S − m'}, l ← α l + Σ P
            for scores in block.scores.chunks_exact_mut(width).take(block.keys.len()) {
                for ((score, &max), sum) in scores.iter_mut().zip(&maxima).zip(&mut sums) {
                    *score = (*score - finite_shift(max)).exp();
                    *sum += *score;
                }
            }
            // O ← α O + P̃ V
            for (mut row, &alpha) in block_out.rows_mut().into_iter().zip(&alphas[..width]) {
                row *= alpha;
            }
            for (k, key) in block.keys.clone().enumerate() {
                let value = problem.value(key, head);
                for (r, mut row) in block_out.rows_mut().into_iter().enumerate().take(width) {
                    let at = k * width + r;
                    if !block.is_hidden(at) {
                        let weight = block.scores[at] * block.multiplier(k, r);
                        axpy(weight, value, row.as_slice_mut().unwrap_or_default());
                    }
                }
            }
        }

        for (r, query) in queries.clone().enumerate() {
            if maxima[r] == F::neg_infinity() {
                block_out.row_mut(r).fill(F::zero());
                log_sum_exp[[query, head]] = F::neg_infinity();
            } else {
                scale(F::one() / sums[r], block_out.row_mut(r).as_slice_mut().unwrap_or_default());
                log_sum_exp[[query, head]] = maxima[r] + sums[r].ln();
            }
        }
        out.slice_mut(s![queries, head_columns(head, dim)])
            .assign(&block_out.slice(s![..width, ..]));
    }
}

/// Adds the gradients, given the outputs and log-sum-exp of the forward pass.
pub(crate) fn backward<F: Float>(
    problem: &Problem<'_, F>,
    sizes: TileSizes,
    out: ArrayView2<'_, F>,
    log_sum_exp: &Array2<F>,
    grad_out: ArrayView2<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) {
    let sizes = clip(problem, sizes);
    let (key_dim, value_dim) = (problem.key_dim, problem.value_dim);
    let mut block = Block::new(problem, sizes);
    let mut grad_out_transposed = Vec::with_capacity(value_dim * sizes.queries);
    let mut grad_scores = vec![F::zero(); sizes.queries * sizes.keys];
    let mut deltas = vec![F::zero(); sizes.queries];
    for (head, queries) in blocks(problem, sizes) {
        block.load_queries(head, queries.clone());
        let width = block.width();
        let kv_head = problem.kv_head(head);
        let rows = s![queries.clone(), head_columns(head, value_dim)];
        let grad_out = grad_out.slice(rows).as_standard_layout().into_owned();
        let grad_out_row = |r: usize| grad_out.row(r).to_slice().unwrap_or_default();
        pack_transposed(
            value_dim,
            (0..width).map(grad_out_row),
            F::one(),
            &mut grad_out_transposed,
        );
        // δ = g · o
        for (r, delta) in deltas.iter_mut().enumerate().take(width) {
            *delta = (grad_out.row(r).iter().zip(out.slice(rows).row(r)))
                .map(|(&grad, &out)| grad * out)
                .sum();
        }
        let mut grad_query = Array2::<F>::zeros((width, key_dim));
        for keys in ranges(block.num_visible_keys(), sizes.keys) {
            block.score(keys);
            // dP̃ = g · v
            let value = |key| problem.value(key, head);
            let values = block.keys.clone().map(value);
            transposed_products(values, &grad_out_transposed, width, &mut grad_scores);

            for (k, key) in block.keys.clone().enumerate() {
                let mut grad_key = vec![F::zero(); key_dim];
                let mut grad_value = vec![F::zero(); value_dim];
                for (r, query) in queries.clone().enumerate() {
                    let (at, log_sum) = (k * width + r, log_sum_exp[[query, head]]);
                    if block.is_hidden(at) || log_sum == F::neg_infinity() {
                        continue;
                    }
                    // P = e^{S − L}, õ += m p v
                    let weight = (block.scores[at] - log_sum).exp();
                    let multiplier = block.multiplier(k, r);
                    axpy(weight * multiplier, grad_out_row(r), &mut grad_value);
                    // ds = p (m g·v − δ)
                    let grad_score = weight * (multiplier * grad_scores[at] - deltas[r]);
                    if let (Some(grad), Some(bias)) = (&mut grads.bias, problem.bias) {
                        grad[bias.slot(block.pair(query, key), head)] += grad_score;
                    }
                    // s = scale q·k + b
                    let grad_product = problem.scale * grad_score;
                    axpy(grad_product, problem.query(query, head), &mut grad_key);
                    let mut grad_query = grad_query.row_mut(r);
                    let grad_query = grad_query.as_slice_mut().unwrap_or_default();
                    axpy(grad_product, problem.key(key, head), grad_query);
                }
                let mut sum = grads.key.slice_mut(s![key, head_columns(kv_head, key_dim)]);
                sum.iter_mut().zip(grad_key).for_each(|(sum, grad)| *sum += grad);
                let mut sum = grads.value.slice_mut(s![key, head_columns(kv_head, value_dim)]);
                sum.iter_mut().zip(grad_value).for_each(|(sum, grad)| *sum += grad);
            }
        }
        let mut sum = grads.query.slice_mut(s![queries, head_columns(head, key_dim)]);
        sum += &grad_query;
    }
}

/// Tiles no larger than the problem.
fn clip<F: Float>(problem: &Problem<'_, F>, sizes: TileSizes) -> TileSizes {
    TileSizes {
        queries: sizes.queries.min(problem.inputs.num_queries()).max(1),
        keys: sizes.keys.min(problem.inputs.num_keys()).max(1),
    }
}

/// Every head and block of queries.
fn blocks<F: Float>(
    problem: &Problem<'_, F>,
    sizes: TileSizes,
) -> impl Iterator<Item = (usize, Range<usize>)> + use<F> {
    let num_queries = problem.inputs.num_queries();
    let heads = 0..problem.heads;
    heads.flat_map(move |head| ranges(num_queries, sizes.queries).map(move |range| (head, range)))
}

/// 0..len in steps.
fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |start| start..len.min(start + step))
}

/// Overwrites `packed` with the transpose of `factor` × rows.
fn pack_transposed<'r, F: Float>(
    columns: usize,
    rows: impl ExactSizeIterator<Item = &'r [F]>,
    factor: F,
    packed: &mut Vec<F>,
) {
    let width = rows.len();
    packed.clear();
    packed.resize(columns * width, F::zero());
    for (r, row) in rows.enumerate() {
        for (column, &value) in row.iter().enumerate() {
            packed[column * width + r] = factor * value;
        }
    }
}

/// Overwrites `products` (rows × width) with rows × `packed` (columns × width).
fn transposed_products<'r, F: Float>(
    rows: impl Iterator<Item = &'r [F]>,
    packed: &[F],
    width: usize,
    products: &mut [F],
) {
    for (row, products) in rows.zip(products.chunks_exact_mut(width)) {
        products.fill(F::zero());
        for (&factor, packed) in row.iter().zip(packed.chunks_exact(width)) {
            axpy(factor, packed, products);
        }
    }
}

//! The backward pass of scaled dot-product attention.

use super::backward::{BackwardPart, Summed, Targets, backward};
use super::{Block, HeadRows, StripOfTile, TileSizes, TileVjp};
use crate::gradients::GradientsMut;
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::exp::exp;
use crate::kernels::primitives::matmul::{
    Matrix, Out, Target, load, panel_width, rows_times, splat, store,
};
use crate::kernels::problem::{FiniteRows, Problem, Upstream};
use crate::kernels::score::StripScratch;
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat};
use std::ops::Range;

/// The inputs of the backward pass, and the factors of weights and logit gradients.
struct DotBackward<'r, F: Float> {
    problem: &'r Problem<'r, F>,
    upstream: Upstream<'r, F>,
    query: FiniteRows<'r, F>,
    key: FiniteRows<'r, F>,
    grad_out: FiniteRows<'r, F>,
}

/// Adds the gradients, given the outputs and normalizer of the forward pass. Returns those of the parameters of the
/// score function.
pub(in super::super) fn dot_backward<F: Float>(
    problem: &Problem<'_, F>,
    sizes: TileSizes,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) -> Vec<f64> {
    // A query without a visible key hides all of its pairs.
    let may_hide = problem.may_hide() || upstream.normalizer.has_empty_rows();
    let operands = DotBackward {
        problem,
        upstream,
        query: FiniteRows::new(problem.query.slices(), may_hide),
        key: FiniteRows::new(problem.key.slices(), may_hide),
        grad_out: FiniteRows::new(upstream.grad_out, may_hide),
    };
    let GradientsMut { query, key, value, bias, pair_weights, .. } = grads.reborrow();
    let (of_queries, of_keys) = (Vec::new(), Vec::new());
    let targets = Targets { query, key, value, bias, pair_weights, of_queries, of_keys };
    backward::<_, DotVjp<'_, _>>(&operands, sizes, level, targets)
}

/// Buffers for one block at a time.
struct DotVjp<'r, F: Float> {
    operands: &'r DotBackward<'r, F>,
    /// key_dim × width, and value_dim × width.
    queries: Buffer<F>,
    out: Buffer<F>,
    grad_out: Buffer<F>,
    /// The gradients of the weights of pairs, if wanted.
    of_pair_weights: Vec<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
    strip: StripScratch<F>,
    /// m, 1/l and δ; +∞, 0 and 0 for unused lanes, so that their weights are 0.
    shifts: Buffer<F>,
    inverses: Buffer<F>,
    deltas: Buffer<F>,
}

impl<'r, F: Float> TileVjp<'r, F> for DotVjp<'r, F> {
    type Problem = DotBackward<'r, F>;

    fn softmax(operands: &'r Self::Problem) -> &'r Problem<'r, F> {
        operands.problem
    }

    fn summed(operands: &'r Self::Problem) -> Summed<'r, F> {
        Summed {
            query: operands.query.slices(),
            key: operands.key.slices(),
            // s = scale q·k
            scale: operands.problem.scale,
            grad_out: operands.grad_out.slices(),
            value_dim: operands.problem.value_dim,
        }
    }

    fn new(operands: &'r Self::Problem, width: usize, _keys_per_tile: usize) -> Self {
        let Problem { key_dim, value_dim, .. } = *operands.problem;
        Self {
            operands,
            queries: Buffer::zeros(key_dim * width),
            out: Buffer::zeros(value_dim * width),
            grad_out: Buffer::zeros(value_dim * width),
            of_pair_weights: Vec::new(),
            rows: Vec::new(),
            strip: StripScratch::default(),
            shifts: Buffer::zeros(width),
            inverses: Buffer::zeros(width),
            deltas: Buffer::zeros(width),
        }
    }

    fn begin(&mut self, block: &Block<'_, '_, F>) {
        let DotBackward { problem, upstream, .. } = self.operands;
        let Block { level, head, width, .. } = *block;
        block.pack_queries(problem.scale, &mut self.queries);
        block.pack_transposed(upstream.grad_out, problem.value_dim, F::one(), &mut self.grad_out);
        block.pack_transposed(upstream.out, problem.value_dim, F::one(), &mut self.out);
        self.shifts.fill(F::infinity());
        self.inverses.fill(F::zero());
        for (lane, query) in block.queries.clone().enumerate() {
            [self.shifts[lane], self.inverses[lane]] = upstream.normalizer.factors(query, head);
        }
        // δ = g·o, by the same steps as g·v: with only one visible key o is v, and ds is 0.
        let Self { out, grad_out, deltas, .. } = self;
        column_products(level, width, problem.value_dim, [out, grad_out], deltas);
        for (query, delta) in block.queries.clone().zip(deltas.iter_mut()) {
            *delta += upstream.more_delta(query, head);
        }
    }

    fn differentiate(
        &mut self,
        block: &Block<'_, '_, F>,
        strip: &StripOfTile,
        [weights, grad_scores]: [&mut [F]; 2],
        part: &mut BackwardPart<'_, F>,
    ) {
        let Block { level, problem, head, width, .. } = *block;
        let BackwardPart { queries, grad_bias, grad_pair_weights, params, .. } = part;
        let StripOfTile { columns, lanes, keys: seen, may_hide } = strip;
        let first_query = queries.start;
        let values =
            HeadRows::new(problem.value.slices(), problem.kv_head(head), problem.value_dim);

        // S = K Qᵀ and dP̃ = V Gᵀ
        for (rows, packed, out) in [
            (block.keys(), &self.queries, &mut *weights),
            (values, &self.grad_out, &mut *grad_scores),
        ] {
            let right = Matrix::new(packed, width).skip_columns(columns.start);
            let out = Out::columns(out, width, columns.clone());
            rows_times(level, seen.len(), rows.left(seen.start), right, Target::Overwrite, out);
        }
        if let Some(scoring) = &problem.scoring {
            block.strip(lanes, seen).apply(problem, scoring, weights, &mut self.strip);
        }
        if *may_hide {
            block.restrict(lanes.clone(), seen, weights, &mut self.rows);
        }

        // dP = m w dP̃, and for now m dP̃ as the gradient of w.
        block.drop_out(lanes.clone(), seen, grad_scores, &mut self.rows);
        if grad_pair_weights.is_some() {
            self.of_pair_weights.clear();
            self.of_pair_weights.extend_from_slice(grad_scores);
        }
        block.multiply_by_pair_weights(lanes.clone(), seen, grad_scores, &mut self.rows);

        // P = e^{S − m} / l, dS = P (dP − δ)
        let terms = [&self.shifts, &self.inverses, &self.deltas];
        let terms = terms.map(|terms| &terms[columns.clone()]);
        weights_and_logits_vjp(level, width, columns.start, weights, grad_scores, terms);
        // dW = m P dP̃
        if let Some(sums) = grad_pair_weights {
            let grads = &mut self.of_pair_weights;
            grads.iter_mut().zip(&*weights).for_each(|(grad, &weight)| *grad *= weight);
            block.add_pair_weight_gradients(lanes.clone(), seen, grads, first_query, sums);
        }
        // P̃ = m w P
        block.multiply(lanes.clone(), seen, weights, &mut self.rows);
        if let Some(grad) = grad_bias {
            let grad = &mut grad.view_mut();
            block.add_bias_gradients(lanes.clone(), seen, grad_scores, first_query, grad);
        }
        if let Some(scoring) = &problem.scoring {
            let of_strip = block.strip(lanes, seen);
            of_strip.vjp(problem, scoring, grad_scores, &mut self.strip, params);
        }
    }

    /// Adds what the products left out: entries that are not finite, pair by pair.
    fn finish_tile(
        &mut self,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        [weights, grad_scores]: [&[F]; 2],
        grad_query: &mut [F],
        part: &mut BackwardPart<'_, F>,
    ) {
        let Block { problem, head, width, .. } = *block;
        let DotBackward { upstream, query, key, grad_out, .. } = self.operands;
        let (sums, kv_head) = (&mut part.keys, problem.kv_head(head));
        let lanes_of = |bad: &[usize]| -> Vec<usize> {
            let queries = bad.iter().filter(|query| block.queries.contains(query));
            let lanes = queries.map(|query| query - block.queries.start);
            lanes.filter(|&lane| self.shifts[lane] != F::infinity()).collect()
        };
        let not_finite = |x: &(usize, &F)| !x.1.is_finite();
        let bad = lanes_of(&grad_out.bad);
        block.for_each_visible(bad.into_iter(), tile.clone(), |lane, key| {
            let weight = weights[(key - tile.start) * width + lane];
            let grad = upstream.grad_out.row(block.queries.start + lane);
            let [_, sum] = sums.row_mut(sums.row(kv_head, key));
            let grad = grad[head_columns(head, problem.value_dim)].iter().enumerate();
            grad.filter(not_finite).for_each(|(c, &grad)| sum[c] += weight * grad);
        });
        let bad = lanes_of(&query.bad);
        block.for_each_visible(bad.into_iter(), tile.clone(), |lane, key| {
            let grad_score = problem.scale * grad_scores[(key - tile.start) * width + lane];
            let query = problem.query(block.queries.start + lane, head).iter().enumerate();
            let [sum, _] = sums.row_mut(sums.row(kv_head, key));
            query.filter(not_finite).for_each(|(c, &query)| sum[c] += grad_score * query);
        });
        let bad = key.bad.iter().copied().filter(|key| tile.contains(key));
        let lanes = 0..block.queries.len();
        let live = lanes.filter(|&lane| self.shifts[lane] != F::infinity());
        block.for_each_visible(live.collect::<Vec<_>>().into_iter(), bad, |lane, key| {
            let grad_score = grad_scores[(key - tile.start) * width + lane];
            for (c, &key) in problem.key(key, head).iter().enumerate().filter(not_finite) {
                grad_query[c * width + lane] += grad_score * key;
            }
        });
    }
}

/// Overwrites `sums` with Σ a b over the rows of two matrices, columns × width, lane by lane.
#[inline(never)]
fn column_products<F: Float>(
    level: Level,
    width: usize,
    num_rows: usize,
    [a, b]: [&[F]; 2],
    sums: &mut [F],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        width: usize,
        num_rows: usize,
        [a, b]: [&[F]; 2],
        sums: &mut [F],
    ) {
        for column in (0..width).step_by(panel_width::<S, F>()) {
            let mut sum = splat::<S, F>(simd, F::zero());
            for row in 0..num_rows {
                let at = row * width + column;
                let (a, b) = (load::<S, F>(simd, &a[at..]), load::<S, F>(simd, &b[at..]));
                sum = [a[0].mul_add(b[0], sum[0]), a[1].mul_add(b[1], sum[1])];
            }
            store::<S, F>(sum, &mut sums[column..]);
        }
    }
    dispatch!(level, simd => run(simd, width, num_rows, [a, b], sums));
}

/// Replaces the scores S of a strip by P = e^{S − m} / l, and dP by dS = P (dP − δ). Hidden pairs have S =
/// −∞ and get zeros, whatever dP.
#[inline(never)]
fn weights_and_logits_vjp<F: Float>(
    level: Level,
    width: usize,
    column: usize,
    scores: &mut [F],
    grads: &mut [F],
    terms: [&[F]; 3],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        width: usize,
        column: usize,
        scores: &mut [F],
        grads: &mut [F],
        [shifts, inverses, deltas]: [&[F]; 3],
    ) {
        let panel = panel_width::<S, F>();
        let terms = shifts.chunks_exact(panel).zip(inverses.chunks_exact(panel));
        let terms = terms.zip(deltas.chunks_exact(panel));
        for (column, ((shifts, inverses), deltas)) in (column..).step_by(panel).zip(terms) {
            of_panel(simd, (width, column), scores, grads, [shifts, inverses, deltas]);
        }
    }

    #[inline(always)]
    fn of_panel<S: Simd, F: Float>(
        simd: S,
        (width, column): (usize, usize),
        scores: &mut [F],
        grads: &mut [F],
        terms: [&[F]; 3],
    ) {
        let [shifts, inverses, deltas] = terms.map(
            #[inline(always)]
            |terms| load::<S, F>(simd, terms),
        );
        let [zero, _] = splat::<S, F>(simd, F::zero());
        let [lowest, _] = splat::<S, F>(simd, F::neg_infinity());
        let [highest, _] = splat::<S, F>(simd, F::infinity());
        for (scores, grads) in scores.chunks_exact_mut(width).zip(grads.chunks_exact_mut(width)) {
            let (scores, grads) = (&mut scores[column..], &mut grads[column..]);
            let score = load::<S, F>(simd, scores);
            let mut grad = load::<S, F>(simd, grads);
            let mut weight = score;
            for v in 0..2 {
                // By the score itself: −∞ minus a NaN shift is no longer −∞.
                let score = shifts[v].simd_eq(highest).select(lowest, score[v]);
                let is_hidden = score.simd_eq(lowest);
                let exponential = exp::<S, F>(simd, score - shifts[v]);
                weight[v] = is_hidden.select(zero, exponential * inverses[v]);
                grad[v] = is_hidden.select(zero, weight[v] * (grad[v] - deltas[v]));
            }
            store::<S, F>(grad, grads);
            store::<S, F>(weight, scores);
        }
    }
    dispatch!(level, simd => run(simd, width, column, scores, grads, terms));
}

//! The backward pass.

use super::super::gathered::{Columns, Gather, Weights};
use super::super::primitives::exp::exp;
use super::super::primitives::matmul::{Vector, vector_len};
use super::super::problem::{FiniteRows, Problem, Slices, Upstream, WeightGradients};
use super::super::score::{ScoredRow, Scoring};
use super::lanes::Lanes;
use super::{
    DotScorer, Outputs, PairGradients, Pairs, Part, Tile, TwoSided, add_bad, add_bias_gradients,
    add_pair_weight_gradients, add_to_row, add_up, for_each_part, level_for, parts,
};
use crate::gradients::GradientsMut;
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array1, Array2, ArrayViewMut2, Axis};

/// Adds the gradients, given the outputs and normalizer of the forward pass; the gradient of the per-pair
/// data, if the scorer has any, is added to the gradient of the distances. Returns the scorer's sums and the
/// gradients of the parameters of the score function. The scaled queries are those of [`scaled_queries`].
pub(in super::super) fn backward<'p, F: Float, C: TwoSided<'p, F>>(
    of_scorer: &'p C::Problem,
    scaled_queries: &'p [F],
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) -> Array1<F> {
    let problem = C::softmax(of_scorer);
    let [num_data, num_sums] = C::num_extras(of_scorer);
    let num_params = problem.scoring.as_ref().map_or(0, Scoring::num_params);
    let inputs = &problem.inputs;
    let may_hide = problem.bias.is_some() || upstream.normalizer.has_empty_rows();
    let queries = Side::new(problem.query.slices(), upstream.grad_out, false, may_hide);
    let keys = Side::new(problem.key.slices(), problem.value.slices(), true, may_hide);
    let level = level_for::<F>(level, [problem.key_dim, problem.value_dim]);
    let terms = terms(level, problem, upstream);

    // In the order of the rows, because each thread must own the memory that it adds to.
    let columns = if grads.bias.is_some() { problem.heads } else { 0 };
    let by_query = Pairs::by_query(inputs);
    let mut grad_logits = Array2::zeros((inputs.num_pairs(), columns));
    let mut grad_data = Array2::zeros((inputs.num_pairs(), num_data));
    let num_weights = if grads.pair_weights.is_some() { problem.heads } else { 0 };
    let mut of_pair_weights = Array2::zeros((inputs.num_pairs(), num_weights));
    let parts_by_query = parts(by_query);
    let mut sums = Array2::zeros((parts_by_query.len(), num_sums + num_params));
    let mut unasked = [(); 3].map(|()| Array2::zeros((0, 0)));
    let [for_query, for_key, for_value] = &mut unasked;
    if grads.query.is_some() || columns + num_data + num_weights + num_sums + num_params > 0 {
        let tile_len = by_query.tile_len(tile_len);
        let pass: Pass<'_, '_, _, C> = Pass {
            of_scorer,
            own: &queries,
            other: &keys,
            scaled_queries: None,
            tile_len,
            terms: &terms,
            grad_weights: upstream.grad_weights,
            pairs: by_query,
        };
        let query = asked_or(&mut grads.query, for_query, inputs.query().dim());
        for_each_part(
            &parts_by_query,
            problem.work(),
            Outputs {
                by_row: [query],
                by_slot: [grad_logits.view_mut(), grad_data.view_mut(), of_pair_weights.view_mut()],
                by_part: sums.view_mut(),
            },
            |part, Outputs { by_row: [grad_a], by_slot, by_part }| {
                let of_query = OfQuery { by_slot, sums: by_part };
                pass.run(level, part, grad_a, None, Some(of_query));
            },
            add_up,
        );
    }
    if grads.key.is_some() || grads.value.is_some() {
        let pairs = Pairs::by_key(inputs);
        let tile_len = pairs.tile_len(tile_len);
        let scaled = Slices { data: scaled_queries, ..problem.query.slices() };
        let pass: Pass<'_, '_, _, C> = Pass {
            of_scorer,
            own: &keys,
            other: &queries,
            scaled_queries: Some(scaled),
            tile_len,
            terms: &terms,
            grad_weights: upstream.grad_weights,
            pairs,
        };
        let parts = parts(pairs);
        let key = asked_or(&mut grads.key, for_key, inputs.key().dim());
        let value = asked_or(&mut grads.value, for_value, inputs.value().dim());
        for_each_part(
            &parts,
            problem.work(),
            Outputs::by_row([key, value], &parts),
            |part, Outputs { by_row: [grad_a, grad_b], .. }| {
                pass.run(level, part, grad_a, Some(grad_b), None);
            },
            add_up,
        );
    }

    add_bias_gradients(problem, &grad_logits, &mut grads.bias);
    add_pair_weight_gradients(problem, &of_pair_weights, grads);
    if let (Some(grad), 1) = (&mut grads.distances, num_data) {
        for (slot, pair) in by_query.numbered() {
            grad[pair.index] += grad_data[[slot, 0]];
        }
    }
    sums.sum_axis(Axis(0))
}

/// [`backward`] with the logits of scaled dot-product attention.
pub(in super::super) fn dot_backward<F: Float>(
    problem: &Problem<'_, F>,
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) -> Vec<f64> {
    if let Some(lanes) = Lanes::new(problem, level) {
        return lanes.backward(tile_len, upstream, grads);
    }
    let scaled = scaled_queries(problem);
    let params =
        backward::<_, DotScorer<'_, _>>(problem, &scaled, tile_len, level, upstream, grads);
    params.iter().map(|grad| grad.as_f64()).collect()
}

/// Returns the queries times the scale.
pub(in super::super) fn scaled_queries<F: Float>(problem: &Problem<'_, F>) -> Vec<F> {
    problem.query.slices().data.iter().map(|&entry| problem.scale * entry).collect()
}

/// Returns the array of a wanted gradient, or a temporary one.
pub(super) fn asked_or<'g, F: Float>(
    asked: &'g mut Option<ArrayViewMut2<'_, F>>,
    unasked: &'g mut Array2<F>,
    shape: (usize, usize),
) -> ArrayViewMut2<'g, F> {
    match asked {
        Some(asked) => asked.view_mut(),
        None => {
            *unasked = Array2::zeros(shape);
            unasked.view_mut()
        }
    }
}

/// Queries with the gradient of their outputs, or keys with their values: a logit is the product of both
/// sides' `a`, and the gradient of a weight is the product of both sides' `b`.
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
    fn head(&self, problem: &Problem<'_, F>, head: usize) -> usize {
        if self.is_keys { problem.kv_head(head) } else { head }
    }
}

/// The outputs of the pass by query besides the gradients of its rows.
struct OfQuery<'a, F> {
    /// The gradients of the logits, of the data and of the weight of each pair.
    by_slot: [ArrayViewMut2<'a, F>; 3],
    /// For the part, the scorer's sums and the gradients of the parameters of the score function.
    sums: ArrayViewMut2<'a, F>,
}

/// One pass over the pairs, summing the gradients of one side.
struct Pass<'s, 'p, F: Float, C: TwoSided<'p, F>> {
    of_scorer: &'p C::Problem,
    own: &'s Side<'s, F>,
    other: &'s Side<'s, F>,
    /// The queries times the scale, for the pass by key.
    scaled_queries: Option<Slices<'p, F>>,
    tile_len: usize,
    /// m, 1/l and δ of each query and head.
    terms: &'s [[F; 3]],
    grad_weights: Option<&'s WeightGradients<F>>,
    pairs: Pairs<'p>,
}

impl<'p, F: Float, C: TwoSided<'p, F>> Pass<'_, 'p, F, C> {
    /// Processes the rows of a part: adds the gradients of `a` and, if wanted, of `b`, and overwrites the
    /// other outputs.
    fn run(
        &self,
        level: Level,
        part: &Part,
        mut grad_a: ArrayViewMut2<'_, F>,
        mut grad_b: Option<ArrayViewMut2<'_, F>>,
        mut of_query: Option<OfQuery<'_, F>>,
    ) {
        let Self { own, other, terms, .. } = *self;
        let problem = C::softmax(self.of_scorer);
        let heads = problem.heads;
        let columns = |dim: usize| {
            Columns::new(level, heads, dim, |head| {
                [own.head(problem, head) * dim, other.head(problem, head) * dim]
            })
        };
        let (columns_a, mut columns_b) = (columns(problem.key_dim), columns(problem.value_dim));
        let (finite_a, finite_b) = (other.finite_a.slices(), other.finite_b.slices());

        let mut tile = Tile::new(level, heads, self.tile_len);
        let mut scorer = C::of_side(level, self.of_scorer, self.scaled_queries, &tile);
        // By key: m, 1/l and δ of the query of each pair.
        let mut terms_of_pairs =
            [(); 3].map(|()| vec![F::zero(); if other.is_keys { 0 } else { tile.weights.len() }]);
        let wants_pair_weights =
            of_query.as_ref().is_some_and(|grads| grads.by_slot[2].ncols() > 0);
        let mut of_pairs = PairGradients::new(&tile, wants_pair_weights);
        let mut grad_data = vec![F::zero(); tile.stride];
        let ones = vec![F::one(); heads];
        // For a score function: the logits that it is given, the pairs, and the gradients of its parameters. The pass by
        // key computes these too, for nothing.
        let (mut raw, mut scored) = (Vec::new(), ScoredRow::default());
        let mut grad_params = vec![0.0; problem.scoring.as_ref().map_or(0, Scoring::num_params)];
        let mut sum_a = vec![F::zero(); own.a.columns];
        let mut sum_b = vec![F::zero(); own.b.columns];
        let terms_of_queries = Slices { data: terms.as_flattened(), columns: 3 * heads };
        let soon = [other.a, other.b, terms_of_queries];
        let soon = if other.is_keys { &soon[..2] } else { &soon[..] };
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            scorer.begin(row.row);
            let own_b = own.b.row(row.row);
            sum_a.fill(F::zero());
            sum_b.fill(F::zero());
            while tile.fill(problem, &mut row, soon) {
                scorer.score(&mut tile);
                if problem.scoring.is_some() {
                    raw.clone_from(&tile.weights);
                    tile.apply_score(problem, other.is_keys, &mut scored);
                }
                tile.add_bias(problem);
                // dp = m g·v
                let stride = tile.stride;
                let of_b = tile.gather(other.b);
                columns_b.dots(own_b, of_b, &mut of_pairs.grads, stride);
                let grad_weights = self.grad_weights;
                if other.is_keys {
                    let vjp = |head: usize, _: &[Pair], [weights, grads]: [&mut [F]; 2]| {
                        let [shift, inverse, delta] = terms[row.row * heads + head];
                        let terms = ([shift, inverse], Some(delta));
                        weights_and_logits_vjp_of_query(level, weights, terms, grads);
                    };
                    of_pairs.differentiate(&mut tile, problem, grad_weights, vjp);
                } else {
                    let [shifts, inverses, deltas] = &mut terms_of_pairs;
                    for head in 0..heads {
                        let [of_head, _] = tile.of_head(head);
                        let (shifts, inverses) =
                            (&mut shifts[of_head.clone()], &mut inverses[of_head.clone()]);
                        let columns = shifts.iter_mut().zip(inverses).zip(&mut deltas[of_head]);
                        for (((shift, inverse), delta), query) in columns.zip(&tile.others) {
                            [*shift, *inverse, *delta] = terms[query * heads + head];
                        }
                    }
                    let vjp = |head: usize, _: &[Pair], [weights, grads]: [&mut [F]; 2]| {
                        let terms = terms_of_pairs.each_ref().map(|terms| &terms[head * stride..]);
                        weights_and_logits_vjp(level, weights, terms, grads);
                    };
                    of_pairs.differentiate(&mut tile, problem, grad_weights, vjp);
                }
                if let Some(OfQuery { by_slot: [of_logits, _, of_weights], .. }) = &mut of_query {
                    of_pairs.store(&tile, part.slots.start, [of_logits, of_weights]);
                }
                let grads = &mut of_pairs.grads;
                if let Some(scoring) = &problem.scoring {
                    for head in 0..heads {
                        let [of_head, _] = tile.of_head(head);
                        let pairs = (&tile.pairs[..], head, other.is_keys);
                        let both = [&mut raw[of_head.clone()], &mut grads[of_head]];
                        scored.vjp(level, scoring, pairs, both, &mut grad_params);
                    }
                }
                // s = scale a·a'
                let grad_logits = Weights { factors: Some(&ones), weights: grads, stride };
                let factors = scorer.factors(&tile, finite_a);
                columns_a.add_weighted(&mut sum_a, grad_logits, factors);
                if grad_b.is_some() {
                    let b = tile.gather(finite_b);
                    columns_b.add_weighted(&mut sum_b, tile.weights(Some(&ones)), b);
                }
                self.add_bad(&tile, grads, [&mut sum_a, &mut sum_b], grad_b.is_some());
                if let Some(OfQuery { by_slot: [_, of_data, _], .. }) = &mut of_query {
                    scorer.logits_vjp(&tile, grads, &mut grad_data);
                    tile.store(&grad_data, part.slots.start, of_data);
                }
            }
            if let Some(OfQuery { sums, .. }) = &mut of_query {
                let sums = sums.as_slice_mut().expect("a row of an array of our own");
                let (of_scorer, _) = sums.split_at_mut(sums.len() - grad_params.len());
                scorer.finish_vjp(of_scorer);
            }
            add_to_row(grad_a.row_mut(r), problem.scale, &sum_a);
            if let Some(grad_b) = &mut grad_b {
                add_to_row(grad_b.row_mut(r), F::one(), &sum_b);
            }
        }
        if let Some(OfQuery { mut sums, .. }) = of_query {
            let first = sums.len() - grad_params.len();
            let of_params = sums.iter_mut().skip(first);
            of_params.zip(&grad_params).for_each(|(sum, &grad)| *sum = F::from_f64(grad));
        }
    }

    /// Adds the entries of the other side's rows that are not finite, with [`add_bad`] for both sums.
    #[inline]
    fn add_bad(
        &self,
        tile: &Tile<F>,
        grad_logits: &[F],
        [sum_a, sum_b]: [&mut [F]; 2],
        wants_b: bool,
    ) {
        let Self { own, other, terms, .. } = *self;
        let problem = C::softmax(self.of_scorer);
        let wants_b = wants_b && !other.finite_b.bad.is_empty();
        let wants_a = !other.finite_a.bad.is_empty();
        let index = |pair: Pair| if other.is_keys { pair.key } else { pair.query };
        for head in 0..problem.heads {
            let is_live = |pair: Pair| terms[pair.query * problem.heads + head][0] != F::infinity();
            let of_head = head * tile.stride;
            let columns = |side: &Side<'_, F>, dim| head_columns(side.head(problem, head), dim);
            if wants_a {
                let sum = &mut sum_a[columns(own, problem.key_dim)];
                let columns = columns(other, problem.key_dim);
                add_bad(
                    problem,
                    tile,
                    &grad_logits[of_head..],
                    head,
                    &other.finite_a,
                    sum,
                    |pair| {
                        let row = index(pair);
                        (row, &other.a.row(row)[columns.clone()], is_live(pair))
                    },
                );
            }
            if wants_b {
                let sum = &mut sum_b[columns(own, problem.value_dim)];
                let columns = columns(other, problem.value_dim);
                add_bad(
                    problem,
                    tile,
                    &tile.weights[of_head..],
                    head,
                    &other.finite_b,
                    sum,
                    |pair| {
                        let row = index(pair);
                        (row, &other.b.row(row)[columns.clone()], is_live(pair))
                    },
                );
            }
        }
    }
}

/// Computes m, 1/l and δ = g·o for each query and head. δ uses the same steps as g·v of a pair: with only
/// one visible key o is v, and ds is 0.
fn terms<F: Float>(
    level: Level,
    problem: &Problem<'_, F>,
    upstream: Upstream<'_, F>,
) -> Vec<[F; 3]> {
    let Upstream { out, normalizer, grad_out, .. } = upstream;
    let (heads, dim, stride) = (problem.heads, problem.value_dim, vector_len::<F>(level));
    let mut columns = Columns::new(level, heads, dim, |head| [head * dim; 2]);
    let mut deltas = vec![F::zero(); heads * stride];
    let mut terms = Vec::with_capacity(problem.inputs.num_queries() * heads);
    for query in 0..problem.inputs.num_queries() {
        let rows = Gather { rows: out, at: &[query] };
        columns.dots(grad_out.row(query), rows, &mut deltas, stride);
        terms.extend((0..heads).map(|head| {
            let [shift, inverse] = normalizer.factors(query, head);
            [shift, inverse, deltas[head * stride] + upstream.more_delta(query, head)]
        }));
    }
    terms
}

/// Like [`weights_and_logits_vjp`], for pairs of one query. Without δ they are all of its pairs, and δ = Σ p dp. That
/// has the same rounding errors as these dp, so ds is 0 for a single pair.
#[inline(never)]
pub(in super::super) fn weights_and_logits_vjp_of_query<F: Float>(
    level: Level,
    logits: &mut [F],
    (factors, delta): ([F; 2], Option<F>),
    grads: &mut [F],
) {
    dispatch!(level, simd => weigh_query(simd, logits, (factors, delta), grads));
}

#[inline(always)]
fn weigh_query<S: Simd, F: Float>(
    simd: S,
    logits: &mut [F],
    ([shift, inverse], delta): ([F; 2], Option<F>),
    grads: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let (shift, inverse) =
        (Vector::<S, F>::splat(simd, shift), Vector::<S, F>::splat(simd, inverse));
    let terms = [shift, inverse, Vector::<S, F>::splat(simd, delta.unwrap_or(F::zero()))];
    let mut sum = zero;
    for (logits, grads) in logits.chunks_exact_mut(len).zip(grads.chunks_exact_mut(len)) {
        let numbers =
            [Vector::<S, F>::from_slice(simd, logits), Vector::<S, F>::from_slice(simd, grads)];
        let [weight, grad] = logits_vjp::<S, F>(simd, numbers, terms);
        weight.store_slice(logits);
        match delta {
            Some(_) => grad.store_slice(grads),
            // With a δ of 0 it is p dp.
            None => sum += grad,
        }
    }
    if delta.is_none() {
        let delta = Vector::<S, F>::splat(simd, sum.reduce_sum());
        for (weights, grads) in logits.chunks_exact(len).zip(grads.chunks_exact_mut(len)) {
            let grad = Vector::<S, F>::from_slice(simd, grads) - delta;
            (Vector::<S, F>::from_slice(simd, weights) * grad).store_slice(grads);
        }
    }
}

/// Replaces the logits by p = e^{s − m} / l, and the gradients of the weights by ds = p (dp − δ); 0 for
/// hidden pairs, whatever dp. In whole vectors.
#[inline(never)]
fn weights_and_logits_vjp<F: Float>(
    level: Level,
    logits: &mut [F],
    [shifts, inverses, deltas]: [&[F]; 3],
    grads: &mut [F],
) {
    dispatch!(level, simd => weigh_with_vjp(simd, logits, [shifts, inverses, deltas], grads));
}

#[inline(always)]
fn weigh_with_vjp<S: Simd, F: Float>(
    simd: S,
    logits: &mut [F],
    [shifts, inverses, deltas]: [&[F]; 3],
    grads: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let terms = shifts.chunks_exact(len).zip(inverses.chunks_exact(len));
    let terms = terms.zip(deltas.chunks_exact(len)).zip(grads.chunks_exact_mut(len));
    for (logits, (((shifts, inverses), deltas), grads)) in logits.chunks_exact_mut(len).zip(terms) {
        let load = |from: &[F]| Vector::<S, F>::from_slice(simd, from);
        let terms = [load(shifts), load(inverses), load(deltas)];
        let [weight, grad] = logits_vjp::<S, F>(simd, [load(logits), load(grads)], terms);
        weight.store_slice(logits);
        grad.store_slice(grads);
    }
}

/// Returns p and ds, given a logit, the gradient of the weight, m, 1/l and δ.
#[inline(always)]
pub(super) fn logits_vjp<S: Simd, F: Float>(
    simd: S,
    [logit, grad]: [Vector<S, F>; 2],
    [shift, inverse, delta]: [Vector<S, F>; 3],
) -> [Vector<S, F>; 2] {
    let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
    let highest = Vector::<S, F>::splat(simd, F::infinity());
    let zero = Vector::<S, F>::splat(simd, F::zero());
    // By the logit itself: −∞ minus a NaN shift is no longer −∞.
    let logit = shift.simd_eq(highest).select(lowest, logit);
    let is_hidden = logit.simd_eq(lowest);
    let weight = is_hidden.select(zero, exp::<S, F>(simd, logit - shift) * inverse);
    [weight, is_hidden.select(zero, weight * (grad - delta))]
}

//! The backward pass. It visits the pairs by query, recomputing their weights and storing two numbers for
//! each pair and head, and then by key, where it only computes sums from these numbers.

use super::super::gathered::{Columns, Weights, unrolled_dot};
use super::super::primitives::matmul::Vector;
use super::super::problem::{Slices, Upstream};
use super::super::rows::{
    Outputs, Pairs, Part, Scorer, SlotOfPair, Tile, add_up, for_each_part, level_for, parts,
    weights_and_logits_vjp, weights_of,
};
use super::features::{Coefficients, FeatureSums, FeatureTile};
use super::{Activated, EdgeProblem, EdgeScorer, Logit, add_projected, project, value_columns};
use crate::error::Result;
use crate::float::{Float, try_zeros};
use crate::inputs::head_columns;
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};

/// Gradients with respect to an [`EdgeProblem`].
#[derive(Debug)]
pub struct EdgeGradients<F> {
    pub(crate) query: Array2<F>,
    pub(crate) key: Array2<F>,
    pub(crate) value: Array2<F>,
    /// The gradient of `edge_attention` or `attention`, flattened.
    pub(crate) attention: Array1<F>,
    pub(crate) edge_weight: Array2<F>,
}

/// Computes the gradients, given the outputs and normalizer of the forward pass; adds the gradient of the
/// features. Outputs and normalizer may be over more keys than the problem has, but then
/// `grad_log_sum_exp` must be `Some`.
pub(in super::super) fn backward<F: Float>(
    problem: &EdgeProblem<'_, F>,
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grad_features: Option<ArrayViewMut2<'_, F>>,
) -> Result<EdgeGradients<F>> {
    let softmax = &problem.softmax;
    let inputs = &softmax.inputs;
    let heads = softmax.heads;
    let level = level_for::<F>(level, [softmax.key_dim, softmax.value_dim]);
    let columns = |rows: usize, dim: usize| try_zeros("gradients", rows, heads * dim);
    let mut query = columns(inputs.num_queries(), softmax.key_dim)?;
    let mut key = columns(inputs.num_keys(), softmax.key_dim)?;
    let mut value = columns(inputs.num_keys(), softmax.value_dim)?;

    // By query.
    let pairs = Pairs::by_query(inputs);
    let parts_of = parts(pairs);
    let slots = SlotOfPair::new(inputs.pattern())?;
    // Written directly if the edges are in the order of the rows.
    let (mut direct, scattered) = match grad_features.filter(|_| problem.feature_dim() > 0) {
        Some(grad) if slots.is_identity() && grad.is_standard_layout() => (Some(grad), None),
        grad => (None, grad),
    };
    let scattered_dim = if scattered.is_some() { problem.feature_dim() } else { 0 };
    let mut in_rows = try_zeros("grads.edge_features", inputs.num_pairs(), scattered_dim)?;
    let features = match &mut direct {
        Some(direct) => direct.view_mut(),
        None => in_rows.view_mut(),
    };
    let num_attention = match &problem.logit {
        Logit::DotProduct => 0,
        Logit::Additive { edge_attention, .. } => edge_attention.len(),
        Logit::Concatenated { attention, .. } => attention.len(),
    };
    let mut states = try_zeros("pairs of the backward pass", inputs.num_pairs(), 2 * heads)?;
    let mut sums =
        try_zeros("gradients", parts_of.len(), num_attention + problem.edge_weight.len())?;
    let pass =
        ByQuery { problem, upstream, num_attention, tile_len: pairs.tile_len(tile_len), pairs };
    for_each_part(
        &parts_of,
        softmax.work(),
        Outputs {
            by_row: [query.view_mut()],
            by_slot: [states.view_mut(), features],
            by_part: sums.view_mut(),
        },
        |part, outputs| pass.run(level, part, outputs),
        add_up,
    );
    let sums = sums.sum_axis(Axis(0));

    // By key.
    let pairs = Pairs::by_key(inputs);
    let parts_of = parts(pairs);
    let pass = ByKey {
        problem,
        upstream,
        states: states.view(),
        slots: &slots,
        tile_len: pairs.tile_len(tile_len),
        pairs,
    };
    for_each_part(
        &parts_of,
        softmax.work(),
        Outputs::by_row([key.view_mut(), value.view_mut()], &parts_of),
        |part, outputs| pass.run(level, part, outputs),
        add_up,
    );

    if let Some(mut grad) = scattered {
        for (pair, mut grad) in grad.rows_mut().into_iter().enumerate() {
            grad += &in_rows.row(slots.slot(pair));
        }
    }
    let edge_weight = sums.slice(s![num_attention..]).to_owned();
    let edge_weight = edge_weight.into_shape_with_order(problem.edge_weight.raw_dim());
    Ok(EdgeGradients {
        query,
        key,
        value,
        attention: sums.slice(s![..num_attention]).to_owned(),
        edge_weight: edge_weight.expect("one for each"),
    })
}

/// Replaces LeakyReLU(m) of the pairs of a tile by dm = ds · a · LeakyReLU'(m).
#[inline(never)]
fn activated_vjp<F: Float>(
    level: Level,
    problem: &EdgeProblem<'_, F>,
    activated: &mut Activated<F>,
    grads: &[F],
    stride: usize,
    count: usize,
) {
    dispatch!(level, simd => {
        activated_vjp_in_vectors(simd, problem, activated, grads, stride, count);
    });
}

#[inline(always)]
fn activated_vjp_in_vectors<S: Simd, F: Float>(
    simd: S,
    problem: &EdgeProblem<'_, F>,
    activated: &mut Activated<F>,
    grads: &[F],
    stride: usize,
    count: usize,
) {
    let Logit::Concatenated { slope, attention } = &problem.logit else {
        return;
    };
    let (len, dim) = (Vector::<S, F>::LEN, problem.softmax.value_dim);
    let zero = Vector::<S, F>::splat(simd, F::zero());
    for (t, row) in activated.rows.chunks_exact_mut(attention.len().max(1)).take(count).enumerate()
    {
        let of_heads = row.chunks_exact_mut(dim).zip(attention.chunks_exact(dim));
        for (head, (row, attention)) in of_heads.enumerate() {
            let grad = grads[head * stride + t];
            let (mut rows, attentions) = (row.chunks_exact_mut(len), attention.chunks_exact(len));
            let rest = attentions.remainder();
            let (positive, negative) =
                (Vector::<S, F>::splat(simd, grad), Vector::<S, F>::splat(simd, grad * *slope));
            for (row, attention) in rows.by_ref().zip(attentions) {
                let is_positive = Vector::<S, F>::from_slice(simd, row).simd_gt(zero);
                let attention = Vector::<S, F>::from_slice(simd, attention);
                (attention * is_positive.select(positive, negative)).store_slice(row);
            }
            for (value, &attention) in rows.into_remainder().iter_mut().zip(rest) {
                let slope = if *value > F::zero() { F::one() } else { *slope };
                *value = grad * slope * attention;
            }
        }
    }
}

/// sum += Σ of the first rows.
#[inline(never)]
fn add_rows<F: Float>(level: Level, sum: &mut [F], rows: &[F], count: usize) {
    dispatch!(level, _simd => {
        for row in rows.chunks_exact(sum.len().max(1)).take(count) {
            sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value);
        }
    });
}

/// The pass by query.
struct ByQuery<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    upstream: Upstream<'p, F>,
    num_attention: usize,
    tile_len: usize,
    pairs: Pairs<'p>,
}

impl<F: Float> ByQuery<'_, F> {
    /// Processes the rows of a part: overwrites the gradients of queries and the state of each pair
    /// (weights after dropout, then gradients of logits before the activation if there is a single
    /// logit); adds the gradients of features and, over the whole part, of attention and edge weight.
    fn run(&self, level: Level, part: &Part, outputs: Outputs<'_, F, 1, 2>) {
        let Self { problem, upstream, .. } = *self;
        let softmax = &problem.softmax;
        let (heads, dim, value_dim) = (softmax.heads, problem.feature_dim(), softmax.value_dim);
        let Outputs { by_row: [mut grad_query], by_slot: [mut states, mut grad_features], by_part } =
            outputs;
        let sums = by_part.into_slice().expect("a row of an array of our own");
        let (grad_attention, grad_weight) = sums.split_at_mut(self.num_attention);
        let wants_features = grad_features.ncols() > 0;
        let states = states.as_slice_mut().expect("an array of our own");
        let grad_features = grad_features.as_slice_mut().expect("it is in standard layout");
        let (keys, values) = (softmax.key.slices(), softmax.value.slices());

        let mut tile = Tile::new(level, heads, self.tile_len);
        let stride = tile.stride;
        let mut scorer = EdgeScorer::new(level, problem, &tile);
        let mut columns = value_columns(level, problem);
        // All columns as one head.
        let num_columns = heads * value_dim;
        let mut whole = Columns::new(level, 1, num_columns, |_| [0, 0]);
        let [mut shifts, mut inverses, mut deltas, mut grads, mut logits] =
            [(); 5].map(|()| vec![F::zero(); tile.weights.len()]);
        let ones = &problem.ones;
        let mut grad_tile = FeatureTile::new(level, if wants_features { dim } else { 0 }, stride);
        // Σ ds x and Σ p̃ x for a row; for single logits Σ ds x for the part.
        let mut logit_sums = FeatureSums::zeros(level, heads, dim);
        let mut value_sums = FeatureSums::zeros(level, heads, problem.value_feature_dim());
        // W x for those, and Wᵀ g.
        let mut coefficients = Coefficients::zeros(level, heads, dim);
        let mut of_grad_out = Coefficients::zeros(level, heads, problem.value_feature_dim());
        let mut sum = vec![F::zero(); grad_query.ncols()];
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let query = row.row;
            let grad_out = upstream.grad_out.row(query);
            scorer.begin(query);
            sum.fill(F::zero());
            for head in 0..heads {
                let [shift, inverse] = upstream.normalizer.factors(query, head);
                shifts[head * stride..][..stride].fill(shift);
                inverses[head * stride..][..stride].fill(inverse);
                let columns = head_columns(head, value_dim);
                let out = &upstream.out.row(query)[columns.clone()];
                deltas[head * stride..][..stride]
                    .fill(unrolled_dot(&grad_out[columns], out) + upstream.more_delta(query, head));
            }
            // Of all pairs of the query.
            let is_one_tile = row.slots.len() <= tile.len && upstream.grad_log_sum_exp.is_none();
            if problem.in_values {
                project(&mut columns, problem, &scorer.rows, grad_out, &mut of_grad_out);
                value_sums.clear();
            }
            if let Logit::DotProduct = problem.logit {
                logit_sums.clear();
            }
            while tile.fill(softmax, &mut row, [keys, values]) {
                let count = tile.pairs.len();
                scorer.score(&mut tile);
                tile.add_bias(softmax);
                logits.copy_from_slice(&tile.weights);
                // dp = m g·(v + W x)
                columns.dots(grad_out, tile.gather(values), &mut grads, stride);
                if problem.in_values {
                    scorer.features.add_scores(heads, count, &of_grad_out, &mut grads);
                }
                for head in 0..heads {
                    let [pairs, vectors] = tile.of_head(head);
                    let multiply = |numbers: &mut [F]| {
                        for (number, pair) in numbers.iter_mut().zip(&tile.pairs) {
                            *number *= softmax.multiplier(*pair, head);
                        }
                    };
                    if softmax.has_dropout() {
                        multiply(&mut grads[pairs.clone()]);
                    }
                    if let Some(of_weights) = upstream.grad_weights {
                        of_weights.add_to(&mut grads[pairs.clone()], &tile.pairs, head);
                    }
                    let terms = [&shifts, &inverses, &deltas].map(|terms| &terms[vectors.clone()]);
                    let [weights, grads_of] = [&mut tile.weights, &mut grads]
                        .map(|numbers| &mut numbers[vectors.clone()]);
                    if is_one_tile {
                        // δ = Σ p dp has the same rounding errors as these dp, so the result is 0 for a
                        // single pair.
                        weights_of(level, weights, [terms[0], terms[1]]);
                        let of_pairs = || weights.iter().zip(&*grads_of).take(count);
                        let delta: F = of_pairs().map(|(&weight, &grad)| weight * grad).sum();
                        let pairs = weights.iter().zip(grads_of.iter_mut()).take(count);
                        pairs.for_each(|(&weight, grad)| *grad = weight * (*grad - delta));
                        grads_of[count..].fill(F::zero());
                    } else {
                        weights_and_logits_vjp(level, weights, terms, grads_of);
                    }
                    if softmax.has_dropout() {
                        multiply(&mut tile.weights[pairs]);
                    }
                    if let Logit::Additive { slope, .. } = problem.logit {
                        for (grad, &logit) in
                            grads[vectors.clone()].iter_mut().zip(&logits[vectors])
                        {
                            *grad *= if logit > F::zero() { F::one() } else { slope };
                        }
                    }
                }

                grad_tile.clear();
                let of_pairs = Weights { factors: ones, weights: &grads, stride };
                match &problem.logit {
                    Logit::DotProduct => {
                        columns.add_weighted(&mut sum, of_pairs, tile.gather(keys));
                        scorer.features.add_sums(ones, &grads, count, &mut logit_sums);
                        grad_tile.add_outer(heads, count, &grads, &scorer.coefficients);
                    }
                    Logit::Additive { .. } => {
                        for (sum, grads) in sum.iter_mut().zip(grads.chunks_exact(stride)) {
                            *sum += grads[..count].iter().copied().sum::<F>();
                        }
                        scorer.features.add_sums(ones, &grads, count, &mut logit_sums);
                        grad_tile.add_outer(heads, count, &grads, &scorer.coefficients);
                    }
                    Logit::Concatenated { .. } => {
                        let activated = &mut scorer.activated;
                        let all = &scorer.rows[..count];
                        columns.add_weighted(grad_attention, of_pairs, activated.gather(all));
                        activated_vjp(level, problem, activated, &grads, stride, count);
                        add_rows(level, &mut sum, &activated.rows, count);
                        let rows = activated.gather(all);
                        let weight = problem.edge_weight();
                        for feature in 0..dim {
                            let x = scorer.features.of_feature(feature);
                            let x = Weights { factors: ones, weights: x, stride };
                            let grad = &mut grad_weight[feature * num_columns..][..num_columns];
                            whole.add_weighted(grad, x, rows);
                            if wants_features {
                                let grad = grad_tile.of_feature_mut(feature);
                                whole.dots(weight.row(feature), rows, grad, stride);
                            }
                        }
                    }
                }
                if problem.in_values {
                    let weights = &tile.weights;
                    scorer.features.add_sums(ones, weights, count, &mut value_sums);
                    grad_tile.add_outer(heads, count, weights, &of_grad_out);
                }
                for (t, slot) in tile.slots.iter().enumerate() {
                    let slot = slot - part.slots.start;
                    let (of_weights, of_grads) =
                        states[slot * 2 * heads..][..2 * heads].split_at_mut(heads);
                    for (head, (weight, grad)) in of_weights.iter_mut().zip(of_grads).enumerate() {
                        *weight = tile.weights[head * stride + t];
                        *grad = grads[head * stride + t];
                    }
                    if wants_features {
                        grad_tile.add_to(t, &mut grad_features[slot * dim..][..dim]);
                    }
                }
            }

            if let Logit::DotProduct = problem.logit {
                logit_sums.store(&mut coefficients);
                add_projected(&columns, problem, &scorer.rows, &coefficients, &mut sum);
                sum.iter_mut().for_each(|sum| *sum *= softmax.scale);
                let query = softmax.query.row(query);
                add_outer(softmax.scale, query, value_dim, &coefficients, grad_weight);
            }
            if problem.in_values {
                value_sums.store(&mut coefficients);
                add_outer(F::one(), grad_out, value_dim, &coefficients, grad_weight);
            }
            grad_query.row_mut(r).assign(&ArrayView1::from(&sum));
        }
        if let Logit::Additive { .. } = problem.logit {
            logit_sums.store(&mut coefficients);
            for (head, grad) in grad_attention.chunks_exact_mut(dim.max(1)).enumerate() {
                grad.copy_from_slice(&coefficients.of_head(head)[..dim]);
            }
        }
    }
}

/// The gradient of Wᵀ (features × columns) += factor · x row, in the columns of each head.
#[inline(always)]
fn add_outer<F: Float>(
    factor: F,
    row: &[F],
    dim: usize,
    x: &Coefficients<F>,
    grad_weight: &mut [F],
) {
    for (feature, grad) in grad_weight.chunks_exact_mut(row.len().max(1)).enumerate() {
        let of_heads = grad.chunks_exact_mut(dim).zip(row.chunks_exact(dim));
        for (head, (grad, row)) in of_heads.enumerate() {
            let x = factor * x.of_head(head)[feature];
            grad.iter_mut().zip(row).for_each(|(grad, &value)| *grad += x * value);
        }
    }
}

/// The pass by key, which sums over the queries of a key.
struct ByKey<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    upstream: Upstream<'p, F>,
    states: ArrayView2<'p, F>,
    slots: &'p SlotOfPair,
    tile_len: usize,
    pairs: Pairs<'p>,
}

impl<F: Float> ByKey<'_, F> {
    /// Processes the rows of a part: overwrites the gradients of keys and values.
    fn run(&self, level: Level, part: &Part, outputs: Outputs<'_, F, 2, 0>) {
        let Self { problem, upstream, states, slots, .. } = *self;
        let softmax = &problem.softmax;
        let heads = softmax.heads;
        let [mut grad_key, mut grad_value] = outputs.by_row;
        let (queries, grads_out) = (softmax.query.slices(), upstream.grad_out);
        let states = states.to_slice().expect("an array of our own");

        let mut tile = Tile::new(level, heads, self.tile_len);
        let mut activated = Activated::new(problem, &tile);
        let columns = value_columns(level, problem);
        let mut grads = vec![F::zero(); tile.weights.len()];
        let ones = &problem.ones;
        let mut sum_key = vec![F::zero(); grad_key.ncols()];
        let mut sum_value = vec![F::zero(); grad_value.ncols()];
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let key = row.row;
            sum_key.fill(F::zero());
            sum_value.fill(F::zero());
            while tile.fill(softmax, &mut row, [queries, grads_out]) {
                let (stride, count) = (tile.stride, tile.pairs.len());
                let all_states = Slices { data: states, columns: 2 * heads };
                tile.prefetch_pairs(self.pairs, all_states, |pair| slots.slot(pair));
                if let Logit::Concatenated { .. } = problem.logit {
                    tile.prefetch_pairs(self.pairs, problem.features.slices(), |pair| pair);
                }
                for (t, pair) in tile.pairs.iter().enumerate() {
                    let state = &states[2 * heads * slots.slot(pair.index)..][..2 * heads];
                    for (head, (&weight, &grad)) in
                        state[..heads].iter().zip(&state[heads..]).enumerate()
                    {
                        tile.weights[head * stride + t] = weight;
                        grads[head * stride + t] = grad;
                    }
                }
                let rows = tile.gather(grads_out);
                columns.add_weighted(&mut sum_value, tile.weights(ones), rows);
                match &problem.logit {
                    Logit::DotProduct => {
                        let of_pairs = Weights { factors: ones, weights: &grads, stride };
                        columns.add_weighted(&mut sum_key, of_pairs, tile.gather(queries));
                    }
                    Logit::Additive { .. } => {
                        for (sum, grads) in sum_key.iter_mut().zip(grads.chunks_exact(stride)) {
                            *sum += grads[..count].iter().copied().sum::<F>();
                        }
                    }
                    Logit::Concatenated { .. } => {
                        let own = softmax.key.row(key);
                        activated.fill(problem, own, queries, &tile);
                        activated_vjp(level, problem, &mut activated, &grads, stride, count);
                        add_rows(level, &mut sum_key, &activated.rows, count);
                    }
                }
            }
            let factor = match problem.logit {
                Logit::DotProduct => softmax.scale,
                _ => F::one(),
            };
            sum_key.iter_mut().for_each(|sum| *sum *= factor);
            grad_key.row_mut(r).assign(&ArrayView1::from(&sum_key));
            grad_value.row_mut(r).assign(&ArrayView1::from(&sum_value));
        }
    }
}

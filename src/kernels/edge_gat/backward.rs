//! The backward pass. It visits the pairs by query, recomputing their weights and storing two numbers for
//! each pair and head, and what else the score saves, and then by key, where it only computes sums from these numbers.

use super::super::gathered::{Gather, Weights, unrolled_dot};
use super::super::primitives::transpose::{store_part, to_columns, transposed};
use super::super::problem::{Slices, Upstream};
use super::super::rows::{
    Outputs, PairGradients, Pairs, Part, Scorer, SlotOfPair, Tile, add_bias_gradients,
    add_pair_weight_gradients, add_up, for_each_part, level_for, parts,
    weights_and_logits_vjp_of_query,
};
use super::features::{Coefficients, FeatureSums, FeatureTile};
use super::{EdgeColumns, EdgeProblem, EdgeScorer, ScoreSums};
use crate::element::try_zeros;
use crate::error::Result;
use crate::gradients::GradientsMut;
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use fearless_simd::Level;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

/// Gradients with respect to an [`EdgeProblem`].
#[derive(Debug)]
pub struct EdgeGradients<F> {
    pub(crate) query: Array2<F>,
    pub(crate) key: Array2<F>,
    pub(crate) value: Array2<F>,
    /// The gradient of the parameters of the score besides W.
    pub(crate) attention: Array1<F>,
    pub(crate) edge_weight: Array2<F>,
}

/// Computes the gradients, given the outputs and normalizer of the forward pass; adds the gradients of the
/// features, the bias and the weights of pairs, and no others, to `grads`. Outputs and normalizer may be over
/// more keys than the problem has, but then `grad_log_sum_exp` must be `Some`.
pub(in super::super) fn backward<F: Float>(
    problem: &EdgeProblem<'_, F>,
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
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
    let grad_features = grads.edge_features.as_mut().map(|grad| grad.view_mut());
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
    let num_attention = problem.score.0.num_attention();
    let num_states = 2 * heads + problem.score.0.num_saved(problem);
    let mut states = try_zeros("pairs of the backward pass", inputs.num_pairs(), num_states)?;
    let if_wanted =
        |is_wanted| try_zeros("grads", inputs.num_pairs(), if is_wanted { heads } else { 0 });
    let mut of_bias = if_wanted(grads.bias.is_some())?;
    let mut of_pair_weights = if_wanted(grads.pair_weights.is_some())?;
    let mut sums =
        try_zeros("gradients", parts_of.len(), num_attention + problem.edge_weight.len())?;
    let pass =
        ByQuery { problem, upstream, num_attention, tile_len: pairs.tile_len(tile_len), pairs };
    for_each_part(
        &parts_of,
        softmax.work(),
        Outputs {
            by_row: [query.view_mut()],
            by_slot: [states.view_mut(), features, of_bias.view_mut(), of_pair_weights.view_mut()],
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
    add_bias_gradients(softmax, &of_bias, &mut grads.bias);
    add_pair_weight_gradients(softmax, &of_pair_weights, grads);
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
    /// logit, then what the score saves); adds the gradients of features and, over the whole part, of
    /// attention and edge weight.
    fn run(&self, level: Level, part: &Part, outputs: Outputs<'_, F, 1, 4>) {
        let Self { problem, upstream, .. } = *self;
        let softmax = &problem.softmax;
        let (heads, dim, value_dim) = (softmax.heads, problem.feature_dim(), softmax.value_dim);
        let Outputs { by_row: [mut grad_query], by_slot, by_part } = outputs;
        let [mut states, mut grad_features, mut grad_bias, mut grad_pair_weights] = by_slot;
        let sums = by_part.into_slice().expect("a row of an array of our own");
        let (grad_attention, grad_weight) = sums.split_at_mut(self.num_attention);
        let wants_features = grad_features.ncols() > 0;
        let states = states.as_slice_mut().expect("an array of our own");
        let grad_features = grad_features.as_slice_mut().expect("it is in standard layout");
        let (keys, values) = (softmax.key.slices(), softmax.value.slices());

        let mut tile = Tile::new(level, heads, self.tile_len);
        let stride = tile.stride;
        let mut scorer = EdgeScorer::new(level, problem, &tile);
        let mut columns = EdgeColumns::new(level, problem);
        let mut of_pairs = PairGradients::new(&tile, grad_pair_weights.ncols() > 0);
        // m, 1/l and δ of each head; δ = Σ p dp over the pairs of a single tile is computed there.
        let mut terms = vec![([F::zero(); 2], None); heads];
        let has_bias = softmax.bias.is_some();
        let ones = &problem.ones;
        let mut grad_tile = FeatureTile::new(level, if wants_features { dim } else { 0 }, stride);
        // Σ p̃ x for a row, W times that, and Wᵀ g.
        let mut value_sums = FeatureSums::zeros(level, heads, problem.value_feature_dim());
        let mut coefficients = Coefficients::zeros(level, heads, dim);
        let mut of_grad_out = Coefficients::zeros(level, heads, problem.value_feature_dim());
        let mut sum = vec![F::zero(); grad_query.ncols()];
        let num_saved = problem.score.0.num_saved(problem);
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let query = row.row;
            let grad_out = upstream.grad_out.row(query);
            scorer.begin(query);
            sum.fill(F::zero());
            // Of all pairs of the query.
            let is_one_tile = row.slots.len() <= tile.len && upstream.grad_log_sum_exp.is_none();
            for (head, terms) in terms.iter_mut().enumerate() {
                let delta = || {
                    let columns = head_columns(head, value_dim);
                    let out = &upstream.out.row(query)[columns.clone()];
                    unrolled_dot(&grad_out[columns], out) + upstream.more_delta(query, head)
                };
                let factors = upstream.normalizer.factors(query, head);
                *terms = (factors, (!is_one_tile).then(delta));
            }
            if problem.in_values {
                columns.project(grad_out, &mut of_grad_out);
                value_sums.clear();
            }
            while tile.fill(softmax, &mut row, &[keys, values]) {
                let count = tile.pairs.len();
                scorer.score(&mut tile);
                tile.add_bias(softmax);
                // dp = m g·(v + W x)
                let grads = &mut of_pairs.grads;
                columns.columns.dots(grad_out, tile.gather(values), grads, stride);
                if problem.in_values {
                    scorer.features.add_scores(heads, count, &of_grad_out, grads);
                }
                let vjp = |head: usize, pairs: &[Pair], [weights, grads]: [&mut [F]; 2]| {
                    weights_and_logits_vjp_of_query(level, weights, terms[head], grads);
                    grads[count..].fill(F::zero());
                    // Where δ is NaN, so are now the gradients of hidden pairs.
                    for (&pair, grad) in pairs.iter().zip(grads).filter(|_| has_bias) {
                        if softmax.bias_of(pair, head).is_none() {
                            *grad = F::zero();
                        }
                    }
                };
                of_pairs.differentiate(&mut tile, softmax, upstream.grad_weights, vjp);
                // Before the scores change the gradients of the logits.
                let by_slot = [&mut grad_bias, &mut grad_pair_weights];
                of_pairs.store(&tile, part.slots.start, by_slot);
                let grads = &mut of_pairs.grads;

                grad_tile.clear(count);
                let mut sums = ScoreSums {
                    query: &mut sum,
                    attention: &mut *grad_attention,
                    edge_weight: &mut *grad_weight,
                    features: &mut grad_tile,
                    wants_features,
                };
                scorer.score.query_vjp(&tile, &scorer.features, grads, &mut sums);
                if problem.in_values {
                    let weights = &tile.weights;
                    scorer.features.add_sums(ones, weights, count, &mut value_sums);
                    grad_tile.add_outer(heads, count, weights, &of_grad_out);
                }
                let numbers = [&tile.weights, &*grads]
                    .map(|numbers| Slices { data: numbers, columns: stride });
                let saved = Slices { data: scorer.score.saved(), columns: num_saved };
                store_states(level, numbers, saved, heads, &tile.slots, part.slots.start, states);
                if wants_features {
                    grad_tile.add_to(&tile.slots, part.slots.start, grad_features);
                }
            }

            scorer.score.finish_query(&mut ScoreSums {
                query: &mut sum,
                attention: &mut *grad_attention,
                edge_weight: &mut *grad_weight,
                features: &mut grad_tile,
                wants_features,
            });
            if problem.in_values {
                value_sums.store(&mut coefficients);
                add_outer(F::one(), grad_out, value_dim, &coefficients, grad_weight);
            }
            grad_query.row_mut(r).assign(&ArrayView1::from(&sum));
        }
        scorer.score.finish_part(grad_attention);
    }
}

/// Overwrites, for each pair, the row with the number of its slot less `first` with its numbers for each head, and then
/// those that the score saves.
#[inline(never)]
fn store_states<F: Float>(
    level: Level,
    [weights, grads]: [Slices<'_, F>; 2],
    saved: Slices<'_, F>,
    heads: usize,
    slots: &[usize],
    first: usize,
    states: &mut [F],
) {
    let num_states = 2 * heads + saved.columns;
    for (pair, slot) in slots.iter().enumerate().filter(|_| saved.columns > 0) {
        let state = &mut states[(slot - first) * num_states..][..num_states];
        state[2 * heads..].copy_from_slice(saved.row(pair));
    }
    dispatch!(level_for::<F>(level, [2 * heads; 2]), simd => transposed(
        simd,
        2 * heads,
        slots.len(),
        #[inline(always)]
        |n| if n < heads { weights.row(n) } else { grads.row(n - heads) },
        #[inline(always)]
        |pair, n, vectors| {
            for (&slot, &vector) in slots[pair..].iter().zip(vectors) {
                let state = &mut states[(slot - first) * num_states..][..2 * heads];
                store_part(vector, &mut state[n..]);
            }
        },
    ));
}

/// The gradient of Wᵀ (features × columns) += factor · x row, in the columns of each head.
#[inline(always)]
pub(super) fn add_outer<F: Float>(
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
        let mut score = problem.score.0.tiles(level, problem, &tile);
        let soon = [grads_out, queries];
        let soon = &soon[..if problem.score.0.reads_queries_by_key() { 2 } else { 1 }];
        let all_states = Slices { data: states, columns: self.states.ncols() };
        let columns = EdgeColumns::new(level, problem).columns;
        // The weights of a tile, and the gradients of its logits.
        let mut numbers = vec![F::zero(); 2 * tile.weights.len()];
        let mut slots_of_tile = Vec::with_capacity(tile.len);
        let ones = &problem.ones;
        let mut sum_key = vec![F::zero(); grad_key.ncols()];
        let mut sum_value = vec![F::zero(); grad_value.ncols()];
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let key = row.row;
            sum_key.fill(F::zero());
            sum_value.fill(F::zero());
            while tile.fill(softmax, &mut row, soon) {
                let stride = tile.stride;
                tile.prefetch_pairs(self.pairs, all_states, |pair| slots.slot(pair));
                slots_of_tile.clear();
                slots_of_tile.extend(tile.pairs.iter().map(|pair| slots.slot(pair.index)));
                let state = |t: usize| all_states.row(slots_of_tile[t]);
                let size = [tile.pairs.len(), 2 * heads];
                to_columns(
                    level_for::<F>(level, [2 * heads; 2]),
                    size,
                    state,
                    &mut numbers,
                    stride,
                );
                let (weights, grads) = numbers.split_at(heads * stride);
                let weights = Weights { factors: Some(ones), weights, stride };
                columns.add_weighted(&mut sum_value, weights, tile.gather(grads_out));
                let saved = Gather { rows: all_states, at: &slots_of_tile };
                score.key_vjp(&tile, key, grads, saved, &mut sum_key);
            }
            score.finish_key(&mut sum_key);
            grad_key.row_mut(r).assign(&ArrayView1::from(&sum_key));
            grad_value.row_mut(r).assign(&ArrayView1::from(&sum_value));
        }
    }
}

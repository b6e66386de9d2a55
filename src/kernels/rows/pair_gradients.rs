//! What backward passes over pairs share: the gradients of the pairs of a tile, and of arrays with a number for
//! each pair.

use super::{Pairs, Tile};
use crate::gradients::GradientsMut;
use crate::inputs::Pair;
use crate::kernels::Float;
use crate::kernels::problem::{Problem, WeightGradients};
use ndarray::{Array2, ArrayViewMut2, ArrayViewMut3};

/// The gradients of the pairs of a tile, for each head.
pub(in super::super) struct PairGradients<F> {
    /// Those of the weights after dropout, then those of the logits.
    pub(in super::super) grads: Vec<F>,
    /// Those of the weights of pairs; empty if they are not wanted.
    of_pair_weights: Vec<F>,
}

impl<F: Float> PairGradients<F> {
    pub(in super::super) fn new(tile: &Tile<F>, wants_pair_weights: bool) -> Self {
        let zeros = vec![F::zero(); tile.weights.len()];
        let of_pair_weights = if wants_pair_weights { zeros.clone() } else { Vec::new() };
        Self { grads: zeros, of_pair_weights }
    }

    /// Replaces the logits of a tile by its weights after dropout, and the gradients of these weights by those of the
    /// logits. `vjp` does so for the weights of one head before dropout, in whole vectors.
    #[inline(always)]
    pub(in super::super) fn differentiate(
        &mut self,
        tile: &mut Tile<F>,
        problem: &Problem<'_, F>,
        grad_weights: Option<&WeightGradients<F>>,
        mut vjp: impl FnMut(usize, &[Pair], [&mut [F]; 2]),
    ) {
        let Self { grads, of_pair_weights } = self;
        tile.load_multipliers(problem);
        for head in 0..problem.heads {
            let [of_head, vectors] = tile.of_head(head);
            // dp = m dp̃
            let of_pair_weights = of_pair_weights.get_mut(of_head.clone()).unwrap_or_default();
            let of_head_grads = &grads[of_head.clone()];
            pair_weights_vjp(problem, &tile.pairs, head, of_head_grads, of_pair_weights);
            tile.multiply(head, &mut grads[of_head.clone()]);
            if let Some(grad_weights) = grad_weights {
                grad_weights.add_to(&mut grads[of_head.clone()], &tile.pairs, head);
            }
            let numbers = [&mut tile.weights[vectors.clone()], &mut grads[vectors]];
            vjp(head, &tile.pairs, numbers);
            let of_pairs = of_pair_weights.iter_mut().zip(&tile.weights[of_head]);
            of_pairs.for_each(|(of_weight, &weight)| *of_weight *= weight);
        }
        // p̃ = m p
        tile.multiply_weights();
    }

    /// Copies the gradients of the logits and of the weights of pairs to rows, as [`Tile::store`] does.
    pub(in super::super) fn store(
        &self,
        tile: &Tile<F>,
        first: usize,
        [of_logits, of_pair_weights]: [&mut ArrayViewMut2<'_, F>; 2],
    ) {
        tile.store(&self.grads, first, of_logits);
        tile.store(&self.of_pair_weights, first, of_pair_weights);
    }
}

/// Overwrites `grads` with the gradients of the weights of pairs, without the attention weights p as a factor:
/// those of the weights p̃, which are given, times the factors of dropout.
pub(super) fn pair_weights_vjp<F: Float>(
    problem: &Problem<'_, F>,
    pairs: &[Pair],
    head: usize,
    grad_weights: &[F],
    grads: &mut [F],
) {
    for ((grad, &of_weight), &pair) in grads.iter_mut().zip(grad_weights).zip(pairs) {
        let of_weight = problem.unless_hidden(of_weight, pair, head);
        *grad = of_weight * problem.inputs.dropout_multiplier(pair, head);
    }
}

/// Adds the gradients of the logits of all pairs, in the order of the rows, to those of the bias.
pub(in super::super) fn add_bias_gradients<F: Float>(
    problem: &Problem<'_, F>,
    of_logits: &Array2<F>,
    grads: &mut Option<ArrayViewMut3<'_, F>>,
) {
    if let (Some(grads), Some(bias)) = (grads, problem.bias) {
        for_each_pair(problem, of_logits, |pair, head, grad| grads[bias.slot(pair, head)] += grad);
    }
}

/// Adds the gradients of the weights of all pairs, in the order of the rows.
pub(in super::super) fn add_pair_weight_gradients<F: Float>(
    problem: &Problem<'_, F>,
    of_pair_weights: &Array2<F>,
    grads: &mut GradientsMut<'_, F>,
) {
    for_each_pair(problem, of_pair_weights, |pair, head, grad| {
        problem.inputs.add_pair_weight_gradient(pair, head, grad, grads);
    });
}

/// Passes numbers of all pairs and heads, in the order of the rows, to `add`.
fn for_each_pair<F: Float>(
    problem: &Problem<'_, F>,
    numbers: &Array2<F>,
    mut add: impl FnMut(Pair, usize, F),
) {
    if numbers.ncols() > 0 {
        for (slot, pair) in Pairs::by_query(&problem.inputs).numbered() {
            for (head, &number) in numbers.row(slot).iter().enumerate() {
                add(pair, head, number);
            }
        }
    }
}

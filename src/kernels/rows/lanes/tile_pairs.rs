//! Score functions and factors of the weights, which read and write the numbers of one head after another.

use super::super::super::score::ScoredRow;
use super::super::numbered;
use super::super::pair_gradients::pair_weights_vjp;
use super::Lanes;
use crate::graph::Graph;
use crate::inputs::Pair;
use crate::kernels::Float;
use ndarray::ArrayViewMut2;
use std::ops::Range;

/// The pairs of a tile of one row.
pub(super) struct TilePairs<'p, F: Float> {
    lanes: &'p Lanes<'p, F>,
    /// Whether the row is a query; else it is a key.
    is_query: bool,
    pairs: Vec<Pair>,
    others: Vec<usize>,
    scored: ScoredRow,
    /// The factors of the weights, head by head.
    multipliers: Vec<F>,
    /// The numbers of a head.
    of_head: [Vec<F>; 2],
}

impl<'p, F: Float> TilePairs<'p, F> {
    /// Returns `None` if nothing is to be read.
    pub(super) fn new(lanes: &'p Lanes<'p, F>, is_query: bool) -> Option<Self> {
        let is_plain = lanes.problem.scoring.is_none() && !lanes.problem.has_multipliers();
        (!is_plain).then(|| Self {
            lanes,
            is_query,
            pairs: Vec::new(),
            others: Vec::new(),
            scored: ScoredRow::default(),
            multipliers: Vec::new(),
            of_head: [Vec::new(), Vec::new()],
        })
    }

    /// Loads the pairs of some slots of a row.
    #[inline(never)]
    pub(super) fn load(&mut self, graph: &Graph, row: usize, slots: Range<usize>) {
        let Self { lanes, is_query, pairs, others, scored, multipliers, .. } = self;
        let problem = lanes.problem;
        pairs.clear();
        pairs.extend(numbered(graph, slots.clone()).map(|(other, index)| {
            let [query, key] = if *is_query { [row, other] } else { [other, row] };
            Pair { query, key, index }
        }));
        others.clear();
        others.extend(graph.indices()[slots].iter().map(|&other| other as usize));
        if let Some(scoring) = &problem.scoring {
            scored.load(problem, scoring, pairs, others, *is_query);
        }
        if problem.has_multipliers() {
            multipliers.resize(pairs.len() * problem.heads, F::one());
            problem.multipliers(pairs, multipliers, pairs.len());
        }
    }

    /// Applies the score function to the logits.
    #[inline(never)]
    pub(super) fn apply_score(&mut self, logits: &mut [F], stride: usize) {
        let Self { lanes, is_query, pairs, scored, of_head: [of_head, _], .. } = self;
        let Some(scoring) = &lanes.problem.scoring else { return };
        for (n, &head) in lanes.query_heads.iter().enumerate() {
            read(lanes.lane(n, logits, stride), pairs.len(), of_head);
            scored.apply(lanes.level, scoring, (pairs, head, *is_query), of_head);
            write(of_head, lanes.lane_mut(n, logits, stride));
        }
    }

    /// Replaces the gradients of the results of the score function by those of the logits, and adds those of its
    /// parameters.
    #[inline(never)]
    pub(super) fn score_vjp(
        &mut self,
        logits: &[F],
        grads: &mut [F],
        stride: usize,
        grad_params: &mut [f64],
    ) {
        let Self { lanes, is_query, pairs, scored, of_head: [of_head, grads_of], .. } = self;
        let Some(scoring) = &lanes.problem.scoring else { return };
        for (n, &head) in lanes.query_heads.iter().enumerate() {
            read(lanes.lane(n, logits, stride), pairs.len(), of_head);
            read(lanes.lane(n, grads, stride), pairs.len(), grads_of);
            let numbers = [&mut of_head[..], &mut grads_of[..]];
            scored.vjp(lanes.level, scoring, (pairs, head, *is_query), numbers, grad_params);
            write(grads_of, lanes.lane_mut(n, grads, stride));
        }
    }

    /// Multiplies weights or their gradients by the factors of the weights.
    #[inline(never)]
    pub(super) fn multiply(&self, numbers: &mut [F], stride: usize) {
        if self.multipliers.is_empty() {
            return;
        }
        let Self { lanes, pairs, .. } = self;
        for (n, &head) in lanes.query_heads.iter().enumerate() {
            let factors = &self.multipliers[head * pairs.len()..][..pairs.len()];
            let numbers = lanes.lane_mut(n, numbers, stride).zip(factors);
            numbers.for_each(|(number, &factor)| *number *= factor);
        }
    }

    /// Overwrites the gradients of the weights of pairs, pairs × heads, without the attention weights p as a factor.
    #[inline(never)]
    pub(super) fn pair_weights_vjp(
        &mut self,
        grads: &[F],
        stride: usize,
        mut out: ArrayViewMut2<'_, F>,
    ) {
        let Self { lanes, pairs, of_head: [of_head, grads_of], .. } = self;
        for (n, &head) in lanes.query_heads.iter().enumerate() {
            read(lanes.lane(n, grads, stride), pairs.len(), of_head);
            grads_of.resize(pairs.len(), F::zero());
            pair_weights_vjp(lanes.problem, pairs, head, of_head, grads_of);
            write(grads_of, out.column_mut(head).iter_mut());
        }
    }

    /// Multiplies numbers of pairs, pairs × heads, by the attention weights.
    #[inline(never)]
    pub(super) fn multiply_by_weights(
        &self,
        weights: &[F],
        stride: usize,
        mut numbers: ArrayViewMut2<'_, F>,
    ) {
        for (n, &head) in self.lanes.query_heads.iter().enumerate() {
            let weights = self.lanes.lane(n, weights, stride);
            let numbers = numbers.column_mut(head);
            numbers.into_iter().zip(weights).for_each(|(number, &weight)| *number *= weight);
        }
    }
}

impl<F: Float> Lanes<'_, F> {
    /// The numbers of the n-th head, slot by slot.
    fn lane<'n>(
        &self,
        n: usize,
        numbers: &'n [F],
        stride: usize,
    ) -> impl Iterator<Item = &'n F> + use<'n, F> {
        numbers[n / self.width * stride + n % self.width..].iter().step_by(self.width)
    }

    pub(super) fn lane_mut<'n>(
        &self,
        n: usize,
        numbers: &'n mut [F],
        stride: usize,
    ) -> impl Iterator<Item = &'n mut F> + use<'n, F> {
        numbers[n / self.width * stride + n % self.width..].iter_mut().step_by(self.width)
    }
}

fn read<'n, F: Float>(numbers: impl Iterator<Item = &'n F>, count: usize, copy: &mut Vec<F>) {
    copy.clear();
    copy.extend(numbers.take(count));
}

fn write<'n, F: Float>(copy: &[F], numbers: impl Iterator<Item = &'n mut F>) {
    numbers.zip(copy).for_each(|(number, &copy)| *number = copy);
}

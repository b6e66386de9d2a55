use super::{ScoreFunction, ScorePair, ScorePairs};
use crate::element::Element;
use crate::params::Params;
use ndarray::{ArrayViewD, ArrayViewMutD};
use std::fmt;

/// A function of one logit and its pair without parameters, from two closures: the function, and its derivative
/// with respect to the logit. PyTorch's `score_mod(score, b, h, q_idx, kv_idx)`, which has no sequence number b here.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::score::{Elementwise, ScorePair};
/// use graph_attention::{Attention, Flash, Inputs};
///
/// let x = Array2::from_shape_fn((40, 4), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// // Later keys count more, and negative logits count less.
/// let score = Elementwise::new(
///     |s: f64, pair: ScorePair| s.max(0.1 * s) + 0.01 * f64::from(pair.distance),
///     |s: f64, _: ScorePair| if s > 0.0 { 1.0 } else { 0.1 },
/// );
/// let out = Flash::new().with_score(score).forward(&inputs)?;
/// assert_eq!(out.dim(), (40, 4));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Elementwise<S, D> {
    score: S,
    derivative: D,
}

impl<S, D> Elementwise<S, D> {
    /// Creates a score function from f(s, pair) and ∂f/∂s(s, pair).
    pub fn new<F: Element>(score: S, derivative: D) -> Self
    where
        S: Fn(F, ScorePair) -> F,
        D: Fn(F, ScorePair) -> F,
    {
        Self { score, derivative }
    }
}

impl<S, D> fmt::Debug for Elementwise<S, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elementwise").finish_non_exhaustive()
    }
}

impl<F: Element, S, D> Params<F> for Elementwise<S, D> {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

impl<F: Element, S, D> ScoreFunction<F> for Elementwise<S, D>
where
    S: Fn(F, ScorePair) -> F + Send + Sync,
    D: Fn(F, ScorePair) -> F + Send + Sync,
{
    #[inline]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        pairs.for_each(
            logits,
            #[inline(always)]
            |pair, logit| *logit = (self.score)(*logit, pair),
        );
    }

    #[inline]
    fn vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], _: &mut [f64]) {
        pairs.for_each_with(
            logits,
            grads,
            #[inline(always)]
            |pair, logit, grad| *grad *= (self.derivative)(logit, pair),
        );
    }
}

//! Score functions one after the other.

use super::{ScoreFunction, ScorePairs, num_entries};
use crate::element::Element;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::params::{Params, prefixed};
use ndarray::{ArrayViewD, ArrayViewMutD};

impl<F: Element, A: Params<F>, B: Params<F>> Params<F> for (A, B) {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.0.visit_params(&mut prefixed(0, visitor));
        self.1.visit_params(&mut prefixed(1, visitor));
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.0.visit_params_mut(&mut prefixed(0, visitor));
        self.1.visit_params_mut(&mut prefixed(1, visitor));
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.0.visit_buffers(&mut prefixed(0, visitor));
        self.1.visit_buffers(&mut prefixed(1, visitor));
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.0.visit_buffers_mut(&mut prefixed(0, visitor));
        self.1.visit_buffers_mut(&mut prefixed(1, visitor));
    }
}

/// s ↦ B(A(s)). The sinks of both take part.
impl<F: Element, A: ScoreFunction<F>, B: ScoreFunction<F>> ScoreFunction<F> for (A, B) {
    #[inline]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        self.0.apply(pairs, logits);
        self.1.apply(pairs, logits);
    }

    #[inline]
    fn vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], grad_params: &mut [f64]) {
        let (of_first, of_second) = grad_params.split_at_mut(num_entries(&self.0));
        if self.1.changes_logits() {
            let mut between = logits.to_vec();
            self.0.apply(pairs, &mut between);
            self.1.vjp(pairs, &between, grads, of_second);
        }
        self.0.vjp(pairs, logits, grads, of_first);
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        self.0.check(inputs)?;
        self.1.check(inputs)
    }

    fn changes_logits(&self) -> bool {
        self.0.changes_logits() || self.1.changes_logits()
    }

    fn reads_edge_layers(&self) -> bool {
        self.0.reads_edge_layers() || self.1.reads_edge_layers()
    }

    /// log(e^a + e^b)
    fn sink(&self, head: usize) -> F {
        let (a, b) = (self.0.sink(head), self.1.sink(head));
        match (a == F::neg_infinity(), b == F::neg_infinity()) {
            (true, _) => b,
            (_, true) => a,
            _ => {
                let [a, b] = [a.as_f64(), b.as_f64()];
                F::from_f64(a.max(b) + (-(a - b).abs()).exp().ln_1p())
            }
        }
    }

    fn sink_vjp(&self, head: usize, grad: f64, grad_params: &mut [f64]) {
        let (of_first, of_second) = grad_params.split_at_mut(num_entries(&self.0));
        let [a, b] = [self.0.sink(head), self.1.sink(head)].map(Element::as_f64);
        let share = |of: f64, other: f64| match of {
            f64::NEG_INFINITY => 0.0,
            _ => 1.0 / (1.0 + (other - of).exp()),
        };
        self.0.sink_vjp(head, share(a, b) * grad, of_first);
        self.1.sink_vjp(head, share(b, a) * grad, of_second);
    }
}

//! Sliding windows and both kinds of edges over some of the pairs.

use super::{Form, LocalGlobal, NAME};
use crate::element::try_zeros;
use crate::error::{Error, Result};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::output_dim;
use crate::partial::{Partial, backward_partial};
use crate::score::ScoreFunction;
use ndarray::ArrayView2;

impl<F: Float, S: ScoreFunction<F>> LocalGlobal<F, S> {
    /// Returns the outputs of the one softmax and their normalizer, so that outputs over several sets of
    /// pairs can be merged with [`Partial::merge`], without [sinks](crate::score::Sinks).
    ///
    /// A window is defined by the positions of queries and keys in `inputs`. So for a
    /// [`sliding_window`](Self::sliding_window) divide the pairs by a mask or by edges, with all keys in
    /// every shard, or list the window as a [`Graph`](crate::Graph) and use [`Flash`](crate::Flash).
    ///
    /// # Errors
    /// As [`Attention::forward_into`](crate::Attention::forward_into); [`Error::InvalidArgument`] for a
    /// [`gated`](Self::gated) one: it has two softmaxes and adds their outputs after normalization. Merge
    /// each of them by itself, and apply the gate to the results.
    pub fn forward_partial(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        self.check_one_softmax()?;
        self.check_globals(inputs)?;
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        let Normalizer { shift, sum } = self.run_pairs(inputs, out.view_mut())?;
        Partial::new(out, shift, sum)
    }

    /// Adds to `grads` the gradients that the pairs in `inputs` contribute, given a result over these and
    /// any other pairs and its gradients, as
    /// [`Flash::backward_partial_into`](crate::Flash::backward_partial_into).
    ///
    /// # Errors
    /// As [`Attention::backward_into`](crate::Attention::backward_into) and
    /// [`forward_partial`](Self::forward_partial).
    pub fn backward_partial_into(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.check_one_softmax()?;
        self.check_globals(inputs)?;
        partial.check(inputs.num_queries(), output_dim(inputs), inputs.num_heads())?;
        grads.check(NAME, inputs, self)?;
        self.vjp(inputs, partial.upstream(grad_out, grad_log_sum_exp)?, grads)
    }

    backward_partial!(Partial);

    fn check_one_softmax(&self) -> Result<()> {
        match self.form {
            Form::Gated(_) => {
                let expected = "one softmax, from `sliding_window` or `joint`";
                Err(Error::config("local_global", expected, "`gated`, which has two"))
            }
            _ => Ok(()),
        }
    }
}

//! Graph attention over some of the edges.

use super::{EdgeGat, NAME};
use crate::attention::check_output;
use crate::element::try_zeros;
use crate::error::{Result, check_shape};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::normalizer::Normalizer;
use crate::partial::{Partial, backward_partial};
use ndarray::{Array2, ArrayView2};

/// Edges in several shards: each shard computes the softmax over its edges, the results are merged, and what
/// follows the softmax is computed once.
///
/// ```text
/// forward_partial   o = Σ_j p_ij (W h_j [+ W_e x_ij]) for each head, in every shard
/// merge             o over all edges
/// finish_partial    out = o [+ W_res h_i] [+ b],  or β W_res h_i + (1 − β) o
/// ```
///
/// The gradients of the parameters are the sum of those of
/// [`finish_partial_backward_into`](EdgeGat::finish_partial_backward_into), once, and of
/// [`backward_partial_into`](EdgeGat::backward_partial_into) of every shard.
///
/// ```
/// use graph_attention::{Attention, EdgeGatConfig, Gradients, Graph, Inputs, edge_gat::Score};
/// use graph_attention::ndarray::array;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let x = array![[1.0f64, 0.0], [0.0, 1.0], [2.0, 2.0]];
/// let config = EdgeGatConfig::new(Score::GatV2, 2, 4, 2).residual(true);
/// let gat = config.init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
/// let [all, first, second] = [
///     &[(0, 1), (1, 2), (0, 2)][..],
///     &[(0, 1), (1, 2)],
///     &[(0, 2)],
/// ].map(|edges| Graph::from_edges(3, 3, edges.iter().copied()).unwrap());
/// let [all, first, second] =
///     [&all, &first, &second].map(|graph| Inputs::self_attention(x.view(), graph).unwrap());
///
/// let merged = gat.forward_partial(&first)?.merge(&gat.forward_partial(&second)?)?;
/// let out = gat.finish_partial(&first, &merged)?; // reads only the queries
/// let (whole, saved) = gat.forward_train(&all)?;
/// assert!((&out - &whole).iter().all(|difference| difference.abs() < 1e-14));
///
/// let mut grads = Gradients::zeros(&all, &gat)?;
/// let grad = gat.finish_partial_backward_into(&all, &merged, out.view(), grads.view_mut())?;
/// for shard in [first, second] {
///     gat.backward_partial_into(&shard, &merged, grad.view(), None, grads.view_mut())?;
/// }
/// let whole = gat.backward(&all, &saved, out.view())?;
/// assert!((grads.query - whole.query).iter().all(|difference| difference.abs() < 1e-14));
/// # Ok::<(), graph_attention::Error>(())
/// ```
impl<F: Float> EdgeGat<F> {
    /// Returns the outputs of the heads, num_queries × (`num_heads` · `head_dim`), before they are averaged
    /// and before residual, gate and bias; and their normalizer. Results over several sets of edges can be
    /// merged with [`Partial::merge`].
    ///
    /// # Errors
    /// As [`Attention::forward_into`](crate::Attention::forward_into).
    pub fn forward_partial(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        let projected = self.project(inputs)?;
        let mut context = self.new_context(inputs)?;
        let inner = self.inner_inputs(inputs, &projected)?;
        let Normalizer { shift, sum } = self.attend(&inner, context.view_mut())?;
        Partial::new(context, shift, sum)
    }

    /// Returns the output, given the result over all edges: averages the heads and adds residual, gate and
    /// bias as configured. Of `inputs` it reads only the queries.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `partial` or the queries do not fit.
    pub fn finish_partial(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
    ) -> Result<Array2<F>> {
        self.check_partial(inputs, partial)?;
        let mut out = try_zeros("out", inputs.num_queries(), self.config.output_columns())?;
        self.finish(inputs, partial.out(), out.view_mut())?;
        Ok(out)
    }

    /// Runs the backward pass of [`finish_partial`](Self::finish_partial): adds the gradients of the
    /// queries and parameters that do not go through the softmax to `grads`, and returns the gradient of
    /// [`Partial::out`] for [`backward_partial_into`](Self::backward_partial_into).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if an array does not fit.
    pub fn finish_partial_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<Array2<F>> {
        self.check_partial(inputs, partial)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        Ok(self.finish_vjp(inputs, partial.out(), grad_out, &mut grads)?.into_owned())
    }

    /// Adds to `grads` the gradients that the edges in `inputs` contribute through the softmax, given a
    /// result over these and any other edges and its gradients: `grad_partial` of [`Partial::out`] and
    /// `grad_log_sum_exp` of [`Partial::log_sum_exp`], where `None` is zeros.
    ///
    /// # Errors
    /// As [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn backward_partial_into(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_partial: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.check_partial(inputs, partial)?;
        grads.check(NAME, inputs, self)?;
        let zeros;
        let grad_log_sum_exp = match grad_log_sum_exp {
            Some(grad) => grad,
            None => {
                zeros = try_zeros("grad_log_sum_exp", inputs.num_queries(), self.config.num_heads)?;
                zeros.view()
            }
        };
        let upstream = partial.upstream(grad_partial, Some(grad_log_sum_exp))?;
        self.attend_vjp(inputs, &self.project(inputs)?, upstream, grads)
    }

    backward_partial!(Partial);

    fn check_partial(&self, inputs: &Inputs<'_, F>, partial: &Partial<F>) -> Result<()> {
        let query = [inputs.num_queries(), self.config.query_dim];
        check_shape("query", &query, inputs.query().shape())?;
        partial.check(query[0], self.context_columns(), self.config.num_heads)
    }
}

use crate::attention::{Attention, Saved, check_output};
use crate::error::Result;
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::{Inputs, Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::problem::{Problem, check_scale, output_dim};
use crate::mechanisms::flash::row_products;
use crate::params::{Params, params_of};
use crate::partial::{Partial, backward_partial};
use crate::score::{ScoreFunction, add_entries, num_entries};
use crate::softmax::Softmax;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

const NAME: &str = "scaled_dot_product";

/// Scaled dot-product attention (Vaswani et al. 2017, 1706.03762), written for readability: it stores
/// the weights of all pairs at once.
///
/// ```text
/// sᵢⱼ = scale · qᵢ·kⱼ + bᵢⱼ      pᵢⱼ = e^{sᵢⱼ − mᵢ} / Σⱼ e^{sᵢⱼ − mᵢ},  mᵢ = maxⱼ sᵢⱼ      oᵢ = Σⱼ wᵢⱼ pᵢⱼ vⱼ
/// ```
///
/// with j over the visible pairs of query i, for each head, scale = 1/√d unless set, and w = 1 without
/// [weights of pairs](Inputs::with_pair_weights).
///
/// * **Reads** query (n_q × heads·d), key (n_k × kv_heads·d), value (n_k × kv_heads·d_v; d_v may
///   differ from d); mask, causal, bias, dropout, weights of pairs; dense inputs and graphs.
/// * **Output** n_q × heads·d_v. A query without visible keys, or without a logit above −∞, gets
///   zeros; a logit of +∞ or NaN makes its row NaN, as in PyTorch.
/// * **Cost** O(pairs · (d + d_v)) time per head, O(pairs · heads) memory. [`Flash`](crate::Flash)
///   is the same function in O(n) memory.
/// * **Errors** [`Error::Shape`](crate::Error::Shape) if the heads of queries and keys have different
///   sizes, or if the number of columns of the bias does not fit the heads.
///
/// PyTorch's `scaled_dot_product_attention` gives the same numbers, except for rows without visible keys,
/// for which its result depends on the version (NaN, later 0).
///
/// ```
/// use graph_attention::{Attention, Graph, Inputs, ScaledDotProduct};
/// use graph_attention::ndarray::array;
///
/// let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
/// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
/// let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?;
/// let out = ScaledDotProduct::new().forward(&inputs)?;
/// assert_eq!(out.row(1), nodes.row(2)); // one neighbour
/// assert_eq!(out.row(2).sum(), 0.0); // none
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ScaledDotProduct<S = ()> {
    /// `None` is 1/√d.
    pub(crate) scale: Option<f64>,
    pub(crate) score: S,
}

impl ScaledDotProduct {
    /// Creates the mechanism with the scale 1/√d.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<S> ScaledDotProduct<S> {
    /// Sets a function of the logits, as [`Flash::with_score`](crate::Flash::with_score).
    #[must_use]
    pub fn with_score<T>(self, score: T) -> ScaledDotProduct<T> {
        ScaledDotProduct { scale: self.scale, score }
    }

    /// Sets the scale of the dot products, 1/√d by default. A larger scale makes the weights sharper.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if `scale` is not finite.
    pub fn with_scale(mut self, scale: f64) -> Result<Self> {
        check_scale(scale)?;
        self.scale = Some(scale);
        Ok(self)
    }

    /// Returns the outputs and their normalizer, so that outputs over several sets of keys can be merged
    /// with [`Partial::merge`], without [sinks](crate::score::Sinks).
    ///
    /// # Errors
    /// As [`Attention::forward_into`].
    pub fn forward_partial<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>>
    where
        S: ScoreFunction<F>,
    {
        self.softmax(inputs, &self.problem(inputs)?)?.forward_partial(inputs)
    }

    /// Adds to `grads` the gradients that the keys in `inputs` contribute, given a result over these and any
    /// other keys and its gradients, as
    /// [`Flash::backward_partial_into`](crate::Flash::backward_partial_into).
    ///
    /// # Errors
    /// As [`Attention::backward_into`].
    pub fn backward_partial_into<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()>
    where
        S: ScoreFunction<F>,
    {
        grads.check(NAME, inputs, self)?;
        let problem = self.problem(inputs)?;
        let softmax = self.softmax(inputs, &problem)?;
        let mut entries = vec![0.0; num_entries(&self.score)];
        softmax.backward_partial_into(
            inputs,
            partial,
            grad_out,
            grad_log_sum_exp,
            &mut grads,
            |pair, head, grad, grads| logit_vjp(&problem, pair, head, grad, grads, &mut entries),
        )?;
        add_entries(&entries, grads.params);
        Ok(())
    }

    backward_partial!(Partial, F, S: ScoreFunction<F>);

    fn run<F: Float>(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<Softmax<F>>
    where
        S: ScoreFunction<F>,
    {
        check_output(self, "out", inputs, out.shape())?;
        let softmax = self.softmax_with_sinks(inputs, &self.problem(inputs)?)?;
        softmax.forward_into(inputs, out)?;
        Ok(softmax)
    }

    fn problem<'a, F: Float>(&'a self, inputs: &Inputs<'a, F>) -> Result<Problem<'a, F>>
    where
        S: ScoreFunction<F>,
    {
        self.score.check(inputs)?;
        Problem::new(inputs, self.scale)?.with_score(&self.score)
    }

    fn softmax<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        problem: &Problem<'_, F>,
    ) -> Result<Softmax<F>>
    where
        S: ScoreFunction<F>,
    {
        Softmax::new(inputs, |pair, head| {
            problem.score_of(pair, head, dot_logit(problem, pair, head))
        })
    }

    fn softmax_with_sinks<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        problem: &Problem<'_, F>,
    ) -> Result<Softmax<F>>
    where
        S: ScoreFunction<F>,
    {
        let mut softmax = self.softmax(inputs, problem)?;
        softmax.add_sinks(inputs, &self.score);
        Ok(softmax)
    }
}

/// Adds the gradients of queries, keys and the parameters of the score function, given that of a logit.
fn logit_vjp<F: Float>(
    problem: &Problem<'_, F>,
    pair: Pair,
    head: usize,
    grad: F,
    grads: &mut GradientsMut<'_, F>,
    entries: &mut [f64],
) {
    let grad = match problem.scoring {
        None => grad,
        Some(_) => problem.score_vjp(pair, head, dot_logit(problem, pair, head), grad, entries),
    };
    dot_logit_vjp(problem, pair, head, grad, grads);
}

/// scale q·k
pub(crate) fn dot_logit<F: Float>(problem: &Problem<'_, F>, pair: Pair, head: usize) -> F {
    // Scale first: the product of large queries and keys may overflow.
    let terms = problem.query(pair.query, head).iter().zip(problem.key(pair.key, head));
    terms.map(|(&query, &key)| problem.scale * query * key).sum()
}

/// Adds the gradients of queries and keys, given that of a [`dot_logit`].
pub(crate) fn dot_logit_vjp<F: Float>(
    problem: &Problem<'_, F>,
    pair: Pair,
    head: usize,
    grad_logit: F,
    grads: &mut GradientsMut<'_, F>,
) {
    let factor = problem.scale * grad_logit;
    let query_columns = head_columns(head, problem.key_dim);
    let key_columns = head_columns(problem.kv_head(head), problem.key_dim);
    let (query, key) = (problem.inputs.query(), problem.inputs.key());
    if let Some(grad) = &mut grads.query {
        let key = key.slice(s![pair.key, key_columns.clone()]);
        grad.slice_mut(s![pair.query, query_columns.clone()]).scaled_add(factor, &key);
    }
    if let Some(grad) = &mut grads.key {
        let query = query.slice(s![pair.query, query_columns]);
        grad.slice_mut(s![pair.key, key_columns]).scaled_add(factor, &query);
    }
}

impl<F: Float, S: Params<F>> Params<F> for ScaledDotProduct<S> {
    params_of!(self => self.score);
}

impl<F: Float, S: ScoreFunction<F>> Attention<F> for ScaledDotProduct<S> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.run(inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        Ok(Saved::new(NAME, self.run(inputs, out)?))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let softmax: &Softmax<F> = saved.state(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let problem = self.problem(inputs)?;
        let mut entries = vec![0.0; num_entries(&self.score)];
        softmax.backward_into(inputs, grad_out, &mut grads, |pair, head, grad, grads| {
            logit_vjp(&problem, pair, head, grad, grads, &mut entries);
        })?;
        let out = softmax.forward(inputs)?;
        let deltas = row_products(grad_out, out.view(), inputs.num_heads());
        softmax.sinks_vjp(&self.score, &deltas, &mut entries);
        add_entries(&entries, grads.params);
        Ok(())
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        Ok(self.softmax_with_sinks(inputs, &self.problem(inputs)?)?.into_weights())
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let problem = self.problem(inputs)?;
        let softmax = self.softmax_with_sinks(inputs, &problem)?;
        let mut entries = vec![0.0; num_entries(&self.score)];
        softmax.weights_backward_into(
            inputs,
            grad_weights,
            &mut grads,
            |pair, head, grad, grads| {
                logit_vjp(&problem, pair, head, grad, grads, &mut entries);
            },
        )?;
        let deltas = softmax.weight_products(inputs, grad_weights);
        softmax.sinks_vjp(&self.score, &deltas, &mut entries);
        add_entries(&entries, grads.params);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_abs_diff_eq;
    use ndarray::array;

    #[test]
    fn two_keys_by_hand() -> Result<()> {
        // Logits ln 3 and 0, so weights 3/4 and 1/4.
        let (q, k) = (array![[1.0]], array![[3f64.ln()], [0.0]]);
        let v = array![[4.0, 0.0], [0.0, 8.0]];
        let inputs = Inputs::dense(q.view(), k.view(), v.view())?;
        let attention = ScaledDotProduct::new();
        let weights = attention.attention_weights(&inputs)?;
        assert_abs_diff_eq!(weights, array![[0.75], [0.25]], epsilon = 1e-15);
        let (out, saved) = attention.forward_train(&inputs)?;
        assert_abs_diff_eq!(out, array![[3.0, 2.0]], epsilon = 1e-15);
        let partial = attention.forward_partial(&inputs)?;
        assert_abs_diff_eq!(partial.log_sum_exp(), array![[4f64.ln()]], epsilon = 1e-15);

        // g = (1, 0): dp = (4, 0), δ = 3, ds = (3/4, −3/4).
        let grads = attention.backward(&inputs, &saved, array![[1.0, 0.0]].view())?;
        assert_abs_diff_eq!(grads.query, array![[0.75 * 3f64.ln()]], epsilon = 1e-15);
        assert_abs_diff_eq!(grads.key, array![[0.75], [-0.75]], epsilon = 1e-15);
        assert_abs_diff_eq!(grads.value, array![[0.75, 0.0], [0.25, 0.0]], epsilon = 1e-15);
        Ok(())
    }
}

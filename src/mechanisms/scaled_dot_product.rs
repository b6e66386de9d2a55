use crate::attention::{Attention, Saved, check_output};
use crate::error::{Result, check_shape};
use crate::float::{Float, nan_max, try_zeros};
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pair, head_columns};
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::{Problem, check_scale, output_dim};
use crate::params::Params;
use crate::partial::Partial;
use ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, s};

const NAME: &str = "scaled_dot_product";

/// Scaled dot-product attention (Vaswani et al. 2017, 1706.03762), written for readability: it stores
/// the weights of all pairs at once.
///
/// ```text
/// sᵢⱼ = scale · qᵢ·kⱼ + bᵢⱼ      pᵢⱼ = e^{sᵢⱼ − mᵢ} / Σⱼ e^{sᵢⱼ − mᵢ},  mᵢ = maxⱼ sᵢⱼ      oᵢ = Σⱼ pᵢⱼ vⱼ
/// ```
///
/// with j over the visible pairs of query i, for each head, and scale = 1/√d unless set.
///
/// * **Reads** query (n_q × heads·d), key (n_k × kv_heads·d), value (n_k × kv_heads·d_v; d_v may
///   differ from d); mask, causal, bias, dropout; dense inputs and graphs.
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
pub struct ScaledDotProduct {
    /// `None` is 1/√d.
    pub(crate) scale: Option<f64>,
}

/// The weights of all pairs.
pub(crate) struct Softmax<F> {
    /// num_pairs × heads.
    pub(crate) weights: Array2<F>,
    pub(crate) normalizer: Normalizer<F>,
}

impl ScaledDotProduct {
    /// Creates the mechanism with the scale 1/√d.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
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
    /// with [`Partial::merge`].
    ///
    /// # Errors
    /// As [`Attention::forward_into`].
    pub fn forward_partial<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        let Normalizer { shift, sum } = self.run(inputs, out.view_mut())?.normalizer;
        Partial::new(out, shift, sum)
    }

    fn run<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Softmax<F>> {
        check_output(self, "out", inputs, out.shape())?;
        let problem = Problem::new(inputs, self.scale)?;
        let state = dot_softmax(&problem)?;
        // In f64, like the sums of the weights.
        let mut sums = try_zeros::<f64>("out", out.nrows(), out.ncols())?;
        for_each_pair(&problem, &state, |pair, head, weight| {
            let weight = (weight * problem.multiplier(pair, head)).as_f64();
            let mut sums = sums.slice_mut(s![pair.query, head_columns(head, problem.value_dim)]);
            let value = problem.value(pair.key, head);
            sums.iter_mut().zip(value).for_each(|(sum, &v)| *sum += weight * v.as_f64());
        });
        out.zip_mut_with(&sums, |out, &sum| *out = F::from_f64(sum));
        Ok(state)
    }
}

fn dot_softmax<F: Float>(problem: &Problem<'_, F>) -> Result<Softmax<F>> {
    softmax(problem, |pair, head| {
        // Scale first: the product of large queries and keys may overflow.
        let query = problem.query(pair.query, head).iter();
        let terms = query.zip(problem.key(pair.key, head));
        terms.map(|(&query, &key)| problem.scale * query * key).sum()
    })
}

/// Computes the weights of all pairs, row by row; the bias is added to the logits.
pub(crate) fn softmax<F: Float>(
    problem: &Problem<'_, F>,
    logit: impl Fn(Pair, usize) -> F,
) -> Result<Softmax<F>> {
    let inputs = &problem.inputs;
    let mut weights = try_zeros("weights", inputs.num_pairs(), problem.heads)?;
    let mut normalizer = Normalizer::empty(inputs.num_queries(), problem.heads)?;
    let Normalizer { shift, sum } = &mut normalizer;
    for ((query, head), total) in sum.indexed_iter_mut() {
        let visible = || {
            let pairs = inputs.row(query);
            pairs.filter_map(|pair| Some((pair, problem.bias_of(pair, head)?)))
        };
        let mut max = F::neg_infinity();
        for (pair, bias) in visible() {
            let logit = logit(pair, head) + bias;
            weights[[pair.index, head]] = logit;
            max = nan_max(max, logit);
        }
        // In f64: in an f32 sum of millions of terms the last ones would be lost.
        let mut sum = 0.0;
        for (pair, _) in visible() {
            let weight = &mut weights[[pair.index, head]];
            *weight = if max == F::neg_infinity() { F::zero() } else { (*weight - max).exp() };
            sum += weight.as_f64();
        }
        if max == F::neg_infinity() {
            continue;
        }
        *total = F::from_f64(sum);
        shift[[query, head]] = max;
        visible().for_each(|(pair, _)| weights[[pair.index, head]] /= *total);
    }
    Ok(Softmax { weights, normalizer })
}

/// Calls a function for every pair and head that takes part, with its weight.
pub(crate) fn for_each_pair<F: Float>(
    problem: &Problem<'_, F>,
    state: &Softmax<F>,
    mut visit: impl FnMut(Pair, usize, F),
) {
    for ((query, head), &sum) in state.normalizer.sum.indexed_iter() {
        if sum == F::zero() {
            continue;
        }
        for pair in problem.inputs.row(query) {
            if problem.bias_of(pair, head).is_some() {
                visit(pair, head, state.weights[[pair.index, head]]);
            }
        }
    }
}

impl<F: Float> Params<F> for ScaledDotProduct {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

impl<F: Float> Attention<F> for ScaledDotProduct {
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
        let state: &Softmax<F> = saved.state(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let problem = Problem::new(inputs, self.scale)?;
        let (pairs, heads) = (inputs.num_pairs(), problem.heads);
        check_shape("saved weights", &[pairs, heads], state.weights.shape())?;
        state.normalizer.check(inputs.num_queries(), heads)?;

        // The gradient of the weights, and its mean under them:
        // dpᵢⱼ = mᵢⱼ gᵢ·vⱼ, δᵢ = Σⱼ pᵢⱼ dpᵢⱼ
        let mut grad_weights = try_zeros("grad_weights", pairs, heads)?;
        let mut deltas = try_zeros::<F>("deltas", inputs.num_queries(), heads)?;
        for_each_pair(&problem, state, |pair, head, weight| {
            let grad_out = grad_out.slice(s![pair.query, head_columns(head, problem.value_dim)]);
            let value = problem.value(pair.key, head);
            let product = grad_out.iter().zip(value).map(|(&g, &v)| g * v).sum::<F>();
            let grad_weight = problem.multiplier(pair, head) * product;
            grad_weights[[pair.index, head]] = grad_weight;
            deltas[[pair.query, head]] += weight * grad_weight;
        });

        for_each_pair(&problem, state, |pair, head, weight| {
            let key_columns = head_columns(problem.kv_head(head), problem.key_dim);
            let value_columns = head_columns(problem.kv_head(head), problem.value_dim);
            // oᵢ += mᵢⱼ pᵢⱼ vⱼ
            let factor = weight * problem.multiplier(pair, head);
            let grad_out = grad_out.slice(s![pair.query, head_columns(head, problem.value_dim)]);
            if let Some(grad) = &mut grads.value {
                grad.slice_mut(s![pair.key, value_columns]).scaled_add(factor, &grad_out);
            }
            // pᵢ = softmax(sᵢ): dsᵢⱼ = pᵢⱼ (dpᵢⱼ − δᵢ)
            let grad_logit =
                weight * (grad_weights[[pair.index, head]] - deltas[[pair.query, head]]);
            // sᵢⱼ = scale qᵢ·kⱼ + bᵢⱼ
            if let (Some(grad), Some(bias)) = (&mut grads.bias, problem.bias) {
                grad[bias.slot(pair, head)] += grad_logit;
            }
            let grad_product = problem.scale * grad_logit;
            let query_columns = head_columns(head, problem.key_dim);
            let query = inputs.query();
            let query = query.slice(s![pair.query, query_columns.clone()]);
            let key = inputs.key();
            let key = key.slice(s![pair.key, key_columns.clone()]);
            if let Some(grad) = &mut grads.query {
                grad.slice_mut(s![pair.query, query_columns]).scaled_add(grad_product, &key);
            }
            if let Some(grad) = &mut grads.key {
                grad.slice_mut(s![pair.key, key_columns]).scaled_add(grad_product, &query);
            }
        });
        Ok(())
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        Ok(dot_softmax(&Problem::new(inputs, self.scale)?)?.weights)
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

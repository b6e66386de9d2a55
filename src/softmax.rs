//! Softmax attention with your own logits: [`Softmax`]; and the softmax over the edges of a graph alone:
//! [`segment_softmax`].
//!
//! Both are plain loops that store the weights of all pairs, for mechanisms that have no kernel;
//! [`guide::own_mechanism`](crate::guide::own_mechanism) shows one.

use crate::element::{nan_max, try_vec, try_zeros};
use crate::error::{Result, check_shape};
use crate::gradients::GradientsMut;
use crate::graph::Graph;
use crate::inputs::{Inputs, Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::output_dim;
use crate::partial::{Partial, PartialUpstream};
use crate::score::{ScoreFunction, with_sink};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};

/// The weights of softmax attention, computed from the logit of each pair and head.
///
/// ```text
/// sᵢⱼ = logit(i, j) + bᵢⱼ      pᵢⱼ = e^{sᵢⱼ} / Σⱼ e^{sᵢⱼ}      oᵢ = Σⱼ mᵢⱼ wᵢⱼ pᵢⱼ vⱼ
/// ```
///
/// with j over the visible pairs of query i, for each head. It honours every channel that changes the result:
/// mask, causal pattern, bias b, dropout m, weights of pairs w and (grouped) heads, in dense inputs and
/// graphs. You provide the logits as a function, and its derivative as another one in the backward pass.
///
/// Cost: O(pairs · d_v) time per head, not counting your function; O(pairs · heads) memory.
///
/// ```
/// use graph_attention::ndarray::{Array2, array};
/// use graph_attention::{GradientsMut, Inputs, Pair, softmax::Softmax};
///
/// let x = array![[0f64], [1.0], [3.0]];
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// // s = −(q − k)²
/// let difference = |pair: Pair| x[[pair.query, 0]] - x[[pair.key, 0]];
/// let softmax = Softmax::new(&inputs, |pair, _head| -difference(pair).powi(2))?;
/// let out = softmax.forward(&inputs)?;
/// assert!((out[[2, 0]] - 3.0).abs() < 0.1); // near its own value
///
/// // The gradient of the sum of the outputs with respect to the queries.
/// let mut grad_query = Array2::zeros((3, 1));
/// let mut grads = GradientsMut::of_params(&mut []);
/// grads.query = Some(grad_query.view_mut());
/// let grad_out = Array2::ones((3, 1));
/// softmax.backward_into(&inputs, grad_out.view(), &mut grads, |pair, _head, grad, grads| {
///     if let Some(query) = &mut grads.query {
///         query[[pair.query, 0]] -= grad * 2.0 * difference(pair);
///     }
/// })?;
/// assert!(grad_query[[0, 0]] > 0.0);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Softmax<F> {
    /// num_pairs × heads.
    weights: Array2<F>,
    normalizer: Normalizer<F>,
}

impl<F: Float> Softmax<F> {
    /// Computes the weights of all visible pairs. `logit` is called with the pair and the head, a number
    /// below [`Inputs::num_heads`], and must not add the bias of the inputs: this function does. It is not
    /// called for hidden pairs, nor for those that a bias of −∞ hides. [`Inputs::query_columns`] and
    /// [`Inputs::key_columns`] are the columns of a head.
    ///
    /// A query without visible keys, or without a logit above −∞, has weights 0. A logit of +∞ or NaN makes
    /// the weights of its row NaN.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the bias has another number of heads;
    /// [`Error::TooLarge`](crate::Error::TooLarge) if the weights do not fit in memory.
    pub fn new(inputs: &Inputs<'_, F>, mut logit: impl FnMut(Pair, usize) -> F) -> Result<Self> {
        let heads = inputs.num_heads();
        let bias = inputs.bias();
        if let Some(bias) = bias {
            bias.check_heads(heads)?;
        }
        inputs.check_pair_weights(heads)?;
        let mut weights = try_zeros("weights", inputs.num_pairs(), heads)?;
        let mut normalizer = Normalizer::empty(inputs.num_queries(), heads)?;
        let mut row = Vec::new();
        for query in 0..inputs.num_queries() {
            for head in 0..heads {
                row.clear();
                for pair in inputs.row(query) {
                    let bias = bias.map_or(F::zero(), |bias| bias.at(pair, head));
                    if bias != F::neg_infinity() {
                        weights[[pair.index, head]] = logit(pair, head) + bias;
                        row.push(pair.index);
                    }
                }
                let [shift, sum] = normalize(&row, head, &mut weights);
                normalizer.shift[[query, head]] = shift;
                normalizer.sum[[query, head]] = sum;
            }
        }
        Ok(Self { weights, normalizer })
    }

    /// Returns the number of columns of the output, heads · d_v, for
    /// [`Attention::output_dim`](crate::Attention::output_dim).
    #[must_use]
    pub fn output_dim(inputs: &Inputs<'_, F>) -> usize {
        output_dim(inputs)
    }

    /// Returns the attention weights before dropout and weights of pairs, num_pairs × heads, with 0 for
    /// hidden pairs, for [`Attention::attention_weights`](crate::Attention::attention_weights).
    #[must_use]
    pub fn weights(&self) -> ArrayView2<'_, F> {
        self.weights.view()
    }

    /// Returns the [`weights`](Self::weights) as an owned array.
    #[must_use]
    pub fn into_weights(self) -> Array2<F> {
        self.weights
    }

    /// Overwrites `out`, num_queries × (heads · d_v), with the weighted sums of the values, after dropout
    /// and weights of pairs.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `out` or the inputs do not fit.
    pub fn forward_into(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        self.check(inputs)?;
        let shape = [inputs.num_queries(), output_dim(inputs)];
        check_shape("out", &shape, out.shape())?;
        let dim = inputs.value().ncols() / inputs.num_kv_heads();
        // In f64, like the sums of the weights.
        let mut sums = try_vec("out", &[dim], 0.0)?;
        for query in 0..inputs.num_queries() {
            for head in 0..inputs.num_heads() {
                sums.fill(0.0);
                self.for_each_pair(inputs, query, head, |pair, weight| {
                    let weight = weight * inputs.dropout_multiplier(pair, head);
                    let weight = (weight * inputs.pair_weight(pair, head)).as_f64();
                    let value = inputs.value();
                    let value = value.slice(s![pair.key, inputs.value_columns(head)]);
                    sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v.as_f64());
                });
                let out = out.slice_mut(s![query, head_columns(head, dim)]);
                out.into_iter().zip(&sums).for_each(|(out, &sum)| *out = F::from_f64(sum));
            }
        }
        Ok(())
    }

    /// Runs [`forward_into`](Self::forward_into) and returns a new array.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    pub fn forward(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        self.forward_into(inputs, out.view_mut())?;
        Ok(out)
    }

    /// Adds the gradients of the values, the bias and the weights of pairs, given the gradient of the output,
    /// and calls `logit_vjp(pair, head, grad_logit, grads)` for each pair and head that has a logit. For
    /// every array or parameter x that the logit s depends on, it must add grad_logit · ∂s/∂x to the gradient
    /// of x. A pair whose own logit is −∞ comes with a `grad_logit` of 0.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `grad_out` or the inputs do not fit.
    pub fn backward_into<'g>(
        &self,
        inputs: &Inputs<'_, F>,
        grad_out: ArrayView2<'_, F>,
        grads: &mut GradientsMut<'g, F>,
        logit_vjp: impl FnMut(Pair, usize, F, &mut GradientsMut<'g, F>),
    ) -> Result<()> {
        let shape = [inputs.num_queries(), output_dim(inputs)];
        check_shape("grad_out", &shape, grad_out.shape())?;
        self.vjp(inputs, grads, None, logit_vjp, |pair, head, weight, grads| {
            value_vjp(inputs, grad_out, pair, head, weight, grads)
        })
    }

    /// Returns the outputs and their normalizer, so that outputs over several sets of keys can be merged
    /// with [`Partial::merge`].
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    pub fn forward_partial(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        let Normalizer { shift, sum } = self.normalizer.clone();
        Partial::new(self.forward(inputs)?, shift, sum)
    }

    /// Runs [`backward_into`](Self::backward_into) for a result over these and any other pairs: adds what
    /// these pairs contribute. `grad_log_sum_exp` is the gradient of [`Partial::log_sum_exp`], num_queries ×
    /// heads; `None` is zeros.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `partial`, a gradient or the inputs do not fit.
    pub fn backward_partial_into<'g>(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        grads: &mut GradientsMut<'g, F>,
        logit_vjp: impl FnMut(Pair, usize, F, &mut GradientsMut<'g, F>),
    ) -> Result<()> {
        partial.check(inputs.num_queries(), output_dim(inputs), inputs.num_heads())?;
        let upstream = partial.upstream(grad_out, grad_log_sum_exp)?;
        self.vjp(inputs, grads, Some(upstream), logit_vjp, |pair, head, weight, grads| {
            value_vjp(inputs, grad_out, pair, head, weight, grads)
        })
    }

    /// Runs the backward pass of the [`weights`](Self::weights) instead of the output: adds the gradient of
    /// the bias, given the gradient of the weights, num_pairs × heads, and calls `logit_vjp` like
    /// [`backward_into`](Self::backward_into). For losses on the weights, such as their entropy.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `grad_weights` or the inputs do not fit.
    pub fn weights_backward_into<'g>(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: &mut GradientsMut<'g, F>,
        logit_vjp: impl FnMut(Pair, usize, F, &mut GradientsMut<'g, F>),
    ) -> Result<()> {
        check_shape("grad_weights", self.weights.shape(), grad_weights.shape())?;
        self.vjp(inputs, grads, None, logit_vjp, |pair, head, weight, _| {
            // The entropy of a weight of 0 has an infinite gradient, and none after the softmax.
            if weight == F::zero() { weight } else { grad_weights[[pair.index, head]] }
        })
    }

    /// Computes dsᵢⱼ = pᵢⱼ (dpᵢⱼ − δᵢ), where `weight_vjp` returns dp: with δᵢ = Σⱼ pᵢⱼ dpᵢⱼ, or over more
    /// pairs, with the weight among all of them and δᵢ = gᵢ·oᵢ − hᵢ.
    fn vjp<'g>(
        &self,
        inputs: &Inputs<'_, F>,
        grads: &mut GradientsMut<'g, F>,
        over_more: Option<PartialUpstream<'_, F>>,
        mut logit_vjp: impl FnMut(Pair, usize, F, &mut GradientsMut<'g, F>),
        mut weight_vjp: impl FnMut(Pair, usize, F, &mut GradientsMut<'g, F>) -> F,
    ) -> Result<()> {
        self.check(inputs)?;
        let bias = inputs.bias();
        let mut row = Vec::new();
        for query in 0..inputs.num_queries() {
            for head in 0..inputs.num_heads() {
                row.clear();
                let factor = over_more.map_or(F::one(), |upstream| {
                    F::from_f64(upstream.weight_of_part(&self.normalizer, query, head))
                });
                let mut delta = F::zero();
                self.for_each_pair(inputs, query, head, |pair, weight| {
                    let weight = factor * weight;
                    let grad_weight = weight_vjp(pair, head, weight, grads);
                    delta += weight * grad_weight;
                    row.push((pair, weight, grad_weight));
                });
                if let Some(upstream) = over_more {
                    delta = upstream.delta(query, head);
                }
                for &(pair, weight, grad_weight) in &row {
                    let grad_logit = weight * (grad_weight - delta);
                    if let (Some(grad), Some(bias)) = (&mut grads.bias, bias) {
                        grad[bias.slot(pair, head)] += grad_logit;
                    }
                    logit_vjp(pair, head, grad_logit, grads);
                }
            }
        }
        Ok(())
    }

    /// Visits the visible pairs of a query and head with their weights, if any has a logit above −∞.
    fn for_each_pair(
        &self,
        inputs: &Inputs<'_, F>,
        query: usize,
        head: usize,
        mut visit: impl FnMut(Pair, F),
    ) {
        if self.normalizer.is_empty(query, head) {
            return;
        }
        let bias = inputs.bias();
        for pair in inputs.row(query) {
            if bias.is_none_or(|bias| bias.at(pair, head) != F::neg_infinity()) {
                visit(pair, self.weights[[pair.index, head]]);
            }
        }
    }

    /// Adds the sinks of a score function.
    pub(crate) fn add_sinks(&mut self, inputs: &Inputs<'_, F>, score: &impl ScoreFunction<F>) {
        for head in 0..inputs.num_heads() {
            let sink = score.sink(head);
            if sink == F::neg_infinity() {
                continue;
            }
            for query in 0..inputs.num_queries() {
                let of_keys = self.normalizer.terms(query, head);
                let [factor, shift, sum] = with_sink(sink.as_f64(), of_keys).map(F::from_f64);
                for pair in inputs.row(query) {
                    self.weights[[pair.index, head]] *= factor;
                }
                self.normalizer.shift[[query, head]] = shift;
                self.normalizer.sum[[query, head]] = sum;
            }
        }
    }

    /// Adds the gradients of sinks, given Σ p dp of each query and head.
    pub(crate) fn sinks_vjp(
        &self,
        score: &impl ScoreFunction<F>,
        deltas: &Array2<f64>,
        grad_params: &mut [f64],
    ) {
        self.normalizer.sinks_vjp(score, deltas, grad_params);
    }

    /// Returns Σ p dp of each query and head, given the gradient of the weights.
    pub(crate) fn weight_products(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
    ) -> Array2<f64> {
        Array2::from_shape_fn((inputs.num_queries(), inputs.num_heads()), |(query, head)| {
            let mut sum = 0.0;
            self.for_each_pair(inputs, query, head, |pair, weight| {
                // An infinite gradient of a weight of 0 counts for nothing.
                if weight != F::zero() {
                    sum += weight.as_f64() * grad_weights[[pair.index, head]].as_f64();
                }
            });
            sum
        })
    }

    /// Checks that these weights fit the inputs.
    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let heads = inputs.num_heads();
        check_shape("saved weights", &[inputs.num_pairs(), heads], self.weights.shape())?;
        self.normalizer.check(inputs.num_queries(), heads)
    }
}

/// Adds the gradient of the value of a pair; returns that of its weight.
fn value_vjp<F: Float>(
    inputs: &Inputs<'_, F>,
    grad_out: ArrayView2<'_, F>,
    pair: Pair,
    head: usize,
    weight: F,
    grads: &mut GradientsMut<'_, F>,
) -> F {
    // oᵢ = Σⱼ mᵢⱼ wᵢⱼ pᵢⱼ vⱼ
    let dim = inputs.value().ncols() / inputs.num_kv_heads();
    let dropout = inputs.dropout_multiplier(pair, head);
    let multiplier = dropout * inputs.pair_weight(pair, head);
    let grad_out = grad_out.slice_move(s![pair.query, head_columns(head, dim)]);
    if let Some(grad) = &mut grads.value {
        let mut grad = grad.slice_mut(s![pair.key, inputs.value_columns(head)]);
        grad.scaled_add(weight * multiplier, &grad_out);
    }
    let value = inputs.value();
    let value = value.slice_move(s![pair.key, inputs.value_columns(head)]);
    let product: F = grad_out.iter().zip(value).map(|(&g, &v)| g * v).sum();
    inputs.add_pair_weight_gradient(pair, head, weight * dropout * product, grads);
    multiplier * product
}

/// Replaces z by softmax(z); all NaN if one entry is NaN.
pub(crate) fn softmax<F: Float>(mut row: ArrayViewMut1<'_, F>) {
    let max = row.iter().copied().fold(F::neg_infinity(), nan_max);
    row.mapv_inplace(|z| (z - max).exp());
    let sum = row.sum();
    row.mapv_inplace(|p| p / sum);
}

/// Replaces dp by dz = p (dp − Σ p dp), where p = softmax(z).
pub(crate) fn softmax_vjp<F: Float>(p: ArrayView1<'_, F>, mut grad: ArrayViewMut1<'_, F>) {
    // Relative to the gradient of the largest p: if p is nearly 1, its difference from the mean would be
    // lost.
    let larger = |best: usize, next: usize| if p[next] > p[best] { next } else { best };
    let Some(largest) = (0..p.len()).reduce(larger) else { return };
    let reference = grad[largest];
    grad.mapv_inplace(|grad| grad - reference);
    let mean = p.dot(&grad);
    grad.zip_mut_with(&p, |grad, &p| *grad = p * (*grad - mean));
}

/// ln Σ eᶻ
pub(crate) fn log_sum_exp(z: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = z.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + z.map(|z| (z - max).exp()).sum::<f64>().ln()
}

/// Turns the logits of a row of pairs into weights; returns the normalizer m and l.
fn normalize<F: Float>(row: &[usize], head: usize, weights: &mut Array2<F>) -> [F; 2] {
    let max = row.iter().fold(F::neg_infinity(), |max, &pair| nan_max(max, weights[[pair, head]]));
    if max == F::neg_infinity() {
        row.iter().for_each(|&pair| weights[[pair, head]] = F::zero());
        return [max, F::zero()];
    }
    // In f64: a sum of millions of terms in f32 would lose the last ones.
    let mut sum = 0.0;
    for &pair in row {
        let weight = &mut weights[[pair, head]];
        *weight = (*weight - max).exp();
        sum += weight.as_f64();
    }
    let sum = F::from_f64(sum);
    row.iter().for_each(|&pair| weights[[pair, head]] /= sum);
    [max, sum]
}

/// Computes the softmax over the edges of each query. `logits` is edges × any number of columns. This is
/// PyG's `softmax(src, index)` with the queries as index. An edge whose logit is −∞ has weight 0.
///
/// O(edges) per column.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::{Graph, softmax::segment_softmax};
///
/// let graph = Graph::from_edges(2, 3, [(0, 0), (1, 2), (0, 1)])?;
/// let weights = segment_softmax(&graph, array![[3f64.ln()], [5.0], [0.0]].view())?;
/// assert!((weights - array![[0.75], [1.0], [0.25]]).iter().all(|error| error.abs() < 1e-15));
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if there is not one row per edge.
pub fn segment_softmax<F: Float>(graph: &Graph, logits: ArrayView2<'_, F>) -> Result<Array2<F>> {
    check_shape("logits", &[graph.num_edges(), logits.ncols()], logits.shape())?;
    let mut weights = try_zeros("weights", logits.nrows(), logits.ncols())?;
    weights.assign(&logits);
    for query in 0..graph.num_queries() {
        let row: Vec<usize> = graph.row(query).map(|(_, edge)| edge).collect();
        for column in 0..weights.ncols() {
            normalize(&row, column, &mut weights);
        }
    }
    Ok(weights)
}

/// Computes the gradient of the logits of [`segment_softmax`], given its result p and the gradient dp of the
/// result: dsₑ = pₑ (dpₑ − Σ p dp), with the sum over the edges of a query.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if there is not one row per edge, or the arrays differ in shape.
pub fn segment_softmax_vjp<F: Float>(
    graph: &Graph,
    weights: ArrayView2<'_, F>,
    grad_weights: ArrayView2<'_, F>,
) -> Result<Array2<F>> {
    check_shape("weights", &[graph.num_edges(), weights.ncols()], weights.shape())?;
    check_shape("grad_weights", weights.shape(), grad_weights.shape())?;
    let mut grad_logits = try_zeros("grad_logits", weights.nrows(), weights.ncols())?;
    for query in 0..graph.num_queries() {
        for column in 0..weights.ncols() {
            let edges = || graph.row(query).map(|(_, edge)| [edge, column]);
            let delta: F = edges().map(|at| weights[at] * grad_weights[at]).sum();
            edges().for_each(|at| grad_logits[at] = weights[at] * (grad_weights[at] - delta));
        }
    }
    Ok(grad_logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attention, Error, ScaledDotProduct};
    use approx::assert_abs_diff_eq;
    use ndarray::array;

    /// Edges in no order, one of them hidden, two parallel; query 2 has none.
    fn graph() -> Result<(Graph, Array2<f64>)> {
        let graph = Graph::from_edges(4, 3, [(3, 1), (0, 2), (1, 1), (0, 0), (3, 1), (0, 2)])?;
        let hidden = f64::NEG_INFINITY;
        let logits =
            array![[1.0, -2.0], [0.5, 3.0], [7.0, hidden], [-1.0, 0.0], [0.2, 0.1], [2.0, hidden]];
        Ok((graph, logits))
    }

    #[test]
    fn segments_are_the_rows_of_attention() -> Result<()> {
        let (graph, logits) = graph()?;
        let weights = segment_softmax(&graph, logits.view())?;
        let [query, key] = [4, 3].map(|rows| Array2::zeros((rows, 2)));
        let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph)?.with_heads(2)?;
        let inputs = inputs.with_bias(logits.view())?;
        assert_eq!(weights, ScaledDotProduct::new().attention_weights(&inputs)?);
        assert_eq!((weights[[2, 0]], weights[[2, 1]], weights[[5, 1]]), (1.0, 0.0, 0.0));

        let mut poisoned = logits;
        poisoned[[1, 0]] = f64::NAN;
        let poisoned = segment_softmax(&graph, poisoned.view())?;
        assert!(poisoned[[3, 0]].is_nan() && poisoned[[5, 0]].is_nan());
        assert_eq!((poisoned[[0, 0]], poisoned[[1, 1]]), (weights[[0, 0]], weights[[1, 1]]));
        Ok(())
    }

    #[test]
    fn segments_have_their_gradient() -> Result<()> {
        let (graph, logits) = graph()?;
        let grad = Array2::from_shape_fn((6, 2), |(edge, head)| ((3 * edge + head) as f64).cos());
        let weights = segment_softmax(&graph, logits.view())?;
        let grad_logits = segment_softmax_vjp(&graph, weights.view(), grad.view())?;
        for (at, &logit) in logits.indexed_iter().filter(|(_, logit)| logit.is_finite()) {
            let loss = |logit| -> Result<f64> {
                let mut logits = logits.clone();
                logits[at] = logit;
                Ok((segment_softmax(&graph, logits.view())? * &grad).sum())
            };
            let difference = (loss(logit + 1e-5)? - loss(logit - 1e-5)?) / 2e-5;
            assert_abs_diff_eq!(grad_logits[at], difference, epsilon = 1e-9);
        }
        let error = segment_softmax(&graph, grad.slice(s![..5, ..])).unwrap_err();
        assert_eq!(error, Error::shape("logits", &[6, 2], &[5, 2]));
        let grad = grad.slice(s![.., ..1]);
        let error = segment_softmax_vjp(&graph, weights.view(), grad).unwrap_err();
        assert_eq!(error, Error::shape("grad_weights", &[6, 2], &[6, 1]));
        Ok(())
    }
}

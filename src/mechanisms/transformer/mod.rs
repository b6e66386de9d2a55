//! A transformer layer around any mechanism: [`TransformerLayer`].

mod config;
mod feed_forward;

pub use config::TransformerLayerConfig;

use crate::attention::{Attention, Saved, check_output};
use crate::cache::KeyValueCache;
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::GradientsMut;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::parallel::{self, parts, row_chunks};
use crate::params::{self, Params, prefixed};
use crate::rowwise::Norm;
use feed_forward::{FeedForward, Hidden};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use std::mem::take;

const NAME: &str = "transformer_layer";

// The places of dropout besides the attention weights: PyTorch's `dropout1`, `dropout` and `dropout2`.
const ATTENTION: usize = 1;
const HIDDEN: usize = 2;
const FEED_FORWARD: usize = 3;

/// The largest number of parts, in whole blocks, in which rows are distributed to threads.
const PARTS: usize = 16;
const BLOCK: usize = 8;

/// What dropout of an entry costs, in multiplications.
const DROPOUT_WORK: usize = 8;

/// A transformer layer (Vaswani et al. 2017, 1706.03762; pre-norm Xiong et al. 2020, 2002.04745) around any inner
/// mechanism: attention and a feed-forward network, each with a residual connection and a norm.
///
/// ```text
/// post-norm (default)             pre-norm (`norm_first`)
/// h = norm₁(q + A(q, k, v))       h = q + A(norm₁(q), norm₁(k), norm₁(v))
/// y = norm₂(h + f(h))             y = h + f(norm₂(h))
///
/// f(x) = φ(x W₁ᵀ + b₁) W₂ᵀ + b₂             φ: an `Activation`
/// f(x) = (φ(u) ⊙ v) W₂ᵀ + b₂                `gated`, (u ‖ v) = x W₁ᵀ + b₁
/// ```
///
/// A is the inner mechanism, usually a [`MultiHead`](crate::MultiHead); the norms are a
/// [`Norm`](crate::rowwise::Norm) each.
///
/// * **Reads** query (n_q × `embed_dim`), key and value. In self-attention they are the same rows, as in PyTorch.
///   They may differ: in a post-norm layer keys and values go to A unchanged and have any number of columns that A
///   accepts; a pre-norm layer normalises them with the norm of the queries, so they have `embed_dim` columns
///   too. All channels are passed to A. Inputs with several heads are refused, because norms and feed-forward
///   network read whole rows: the heads are those of A.
/// * **Output** n_q × `embed_dim`. For a query without visible keys, A gives zeros or its biases, and the rest is
///   computed as always.
/// * **Dropout** of the inputs applies, with its one probability, at the four places of PyTorch's layer:
///   the attention weights (in A), the output of A, the hidden values of f, and the output of f. Each has a seed of
///   its own, and the last three draw by query and column. Without [`Inputs::with_dropout`] there is none.
/// * **Parameters** named and ordered as in the state dict of PyTorch's `nn.TransformerEncoderLayer`, which can be
///   loaded directly: those of A with the prefix `self_attn.`, then `linear1.weight`, `linear1.bias`,
///   `linear2.weight`, `linear2.bias`, `norm1.weight`, `norm1.bias`, `norm2.weight`, `norm2.bias`. With gates
///   the rows of `linear1` are first those of u and then those of v. An RMS norm has no bias.
/// * **Cost** A, and O(n_q · `embed_dim` · `feedforward_dim`). Training keeps n_q × (`embed_dim` +
///   2 `feedforward_dim`) numbers besides those of A; a post-norm layer keeps n_q × `embed_dim` more, and a
///   gated one n_q × `feedforward_dim`.
/// * **Errors** [`Error::Shape`](crate::Error::Shape) if the columns of the inputs do not fit, or the output of A
///   does not have `embed_dim` columns.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
/// use graph_attention::rowwise::Activation;
/// use graph_attention::{Attention, Flash, Graph, Inputs, MultiHeadConfig, TransformerLayerConfig};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
/// let heads = MultiHeadConfig::new(8, 2).init(Flash::new(), &mut rng)?;
/// let config = TransformerLayerConfig::new(8, 32).activation(Activation::Gelu).norm_first(true);
/// let layer = config.init(heads, &mut rng)?;
///
/// let nodes = Array2::<f32>::ones((3, 8));
/// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2), (2, 0)])?.with_self_loops()?;
/// assert_eq!(layer.forward(&Inputs::self_attention(nodes.view(), &graph)?)?.dim(), (3, 8));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TransformerLayer<F, A> {
    inner: A,
    feed_forward: FeedForward<F>,
    norms: [Norm<F>; 2],
    norm_first: bool,
    embed_dim: usize,
}

/// The state saved by a forward pass.
struct State<F> {
    inner: Saved,
    rows: Rows<F>,
}

/// What the backward pass needs besides the state of the inner mechanism. Norms are computed again.
struct Rows<F> {
    /// q + A(…): h of a pre-norm layer, the input of norm₁ of a post-norm layer.
    first_sum: Array2<F>,
    hidden: Hidden<F>,
    /// h + f(h), the input of norm₂, in a post-norm layer.
    second_sum: Option<Array2<F>>,
}

/// Multiplies each entry, which belongs to a query and a column, by its factor of dropout: 0 or
/// 1 / (1 − probability).
fn drop_entries<F: Float>(inputs: &Inputs<'_, F>, place: usize, x: ArrayViewMut2<'_, F>) {
    if inputs.dropout().is_none() {
        return;
    }
    let work = x.len().saturating_mul(DROPOUT_WORK);
    let parts = parts(x.nrows(), BLOCK, PARTS);
    let chunks = row_chunks(x, parts.iter().map(|part| part.len()));
    let tasks: Vec<_> = parts.iter().cloned().zip(chunks).collect();
    parallel::for_each(tasks, work, |(queries, mut x)| {
        for (query, mut row) in queries.zip(x.rows_mut()) {
            let Some((dropout, number)) = inputs.dropout_of_row(query) else { return };
            let dropout = dropout.of_place(place).of_pair::<F>(number);
            for (column, entry) in row.iter_mut().enumerate() {
                *entry *= dropout.multiplier(column);
            }
        }
    });
}

impl<F: Float, A: Attention<F>> TransformerLayer<F, A> {
    /// Returns the inner mechanism.
    pub fn inner(&self) -> &A {
        &self.inner
    }

    /// Checks the columns of the inputs that this layer reads itself.
    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        inputs.check_absent(NAME, &[Channel::Heads])?;
        let arrays = [("query", inputs.query()), ("key", inputs.key()), ("value", inputs.value())];
        for (what, array) in &arrays[..if self.norm_first { 3 } else { 1 }] {
            check_shape(*what, &[array.nrows(), self.embed_dim], array.shape())?;
        }
        Ok(())
    }

    /// Computes norm₁ of query, key and value in a pre-norm layer.
    fn normalized(&self, inputs: &Inputs<'_, F>) -> Result<Option<[Array2<F>; 3]>> {
        self.check(inputs)?;
        if !self.norm_first {
            return Ok(None);
        }
        let [norm, _] = &self.norms;
        let query = norm.forward(inputs.query())?;
        // In self-attention all three are the same rows.
        let normalized = |array: ArrayView2<'_, F>| {
            if is_same(array, inputs.query()) { Ok(query.clone()) } else { norm.forward(array) }
        };
        let (key, value) = (normalized(inputs.key())?, normalized(inputs.value())?);
        Ok(Some([query, key, value]))
    }

    /// The forward pass, given that of the inner mechanism. Overwrites `out`.
    fn run<T>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
        forward: impl FnOnce(&Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<T>,
    ) -> Result<(T, Rows<F>)> {
        check_output(self, "out", inputs, out.shape())?;
        let normalized = self.normalized(inputs)?;
        let inner_inputs = inner_inputs(inputs, &normalized)?;
        let columns = self.inner.output_dim(&inner_inputs);
        check_shape("inner output columns", &[self.embed_dim], &[columns])?;
        let mut sum = try_zeros("attention", inputs.num_queries(), columns)?;
        let answer = forward(&inner_inputs, sum.view_mut())?;
        drop_entries(inputs, ATTENTION, sum.view_mut());
        sum += &inputs.query();

        let [norm1, norm2] = &self.norms;
        let norm = if self.norm_first { norm2 } else { norm1 };
        let normalized = norm.forward(sum.view())?;
        if self.norm_first {
            let hidden =
                self.feed_forward.forward_into(normalized.view(), inputs, out.view_mut())?;
            drop_entries(inputs, FEED_FORWARD, out.view_mut());
            out += &sum;
            return Ok((answer, Rows { first_sum: sum, hidden, second_sum: None }));
        }
        let mut second_sum = try_zeros("feed-forward", sum.nrows(), sum.ncols())?;
        let hidden =
            self.feed_forward.forward_into(normalized.view(), inputs, second_sum.view_mut())?;
        drop_entries(inputs, FEED_FORWARD, second_sum.view_mut());
        second_sum += &normalized;
        norm2.forward_into(second_sum.view(), out)?;
        Ok((answer, Rows { first_sum: sum, hidden, second_sum: Some(second_sum) }))
    }
}

/// Whether two views show the same memory in the same way.
fn is_same<F>(a: ArrayView2<'_, F>, b: ArrayView2<'_, F>) -> bool {
    a.as_ptr() == b.as_ptr() && a.dim() == b.dim() && a.strides() == b.strides()
}

/// Returns the inputs of the inner mechanism: normalised, if they are.
fn inner_inputs<'b, F: Float>(
    inputs: &Inputs<'b, F>,
    normalized: &'b Option<[Array2<F>; 3]>,
) -> Result<Inputs<'b, F>> {
    match normalized {
        None => Ok(*inputs),
        Some([query, key, value]) => inputs.with_arrays(query.view(), key.view(), value.view()),
    }
}

impl<F: Float, A: Attention<F>> Params<F> for TransformerLayer<F, A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.inner.visit_params(&mut prefixed("self_attn", visitor));
        let FeedForward { linear1, linear2, .. } = &self.feed_forward;
        linear1.visit_params(&mut prefixed("linear1", visitor));
        linear2.visit_params(&mut prefixed("linear2", visitor));
        for (norm, prefix) in self.norms.iter().zip(["norm1", "norm2"]) {
            norm.visit_params(&mut prefixed(prefix, visitor));
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.inner.visit_params_mut(&mut prefixed("self_attn", visitor));
        let FeedForward { linear1, linear2, .. } = &mut self.feed_forward;
        linear1.visit_params_mut(&mut prefixed("linear1", visitor));
        linear2.visit_params_mut(&mut prefixed("linear2", visitor));
        for (norm, prefix) in self.norms.iter_mut().zip(["norm1", "norm2"]) {
            norm.visit_params_mut(&mut prefixed(prefix, visitor));
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.inner.visit_buffers(&mut prefixed("self_attn", visitor));
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.inner.visit_buffers_mut(&mut prefixed("self_attn", visitor));
    }
}

impl<F: Float, A: Attention<F>> Attention<F> for TransformerLayer<F, A> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, _: &Inputs<'_, F>) -> usize {
        self.embed_dim
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.run(inputs, out, |inputs, out| self.inner.forward_into(inputs, out)).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        let (inner, rows) =
            self.run(inputs, out, |inputs, out| self.inner.forward_train_into(inputs, out))?;
        Ok(Saved::new(NAME, State { inner, rows }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { inner, rows } = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        self.check_rows(inputs, rows)?;
        let Rows { first_sum, hidden, second_sum } = rows;
        let [norm1, norm2] = &self.norms;
        let params = take(&mut grads.params);
        let [of_inner, of_feed_forward, of_norm1, of_norm2] = self.split_params(params);

        // The gradient of the first sum, through the feed-forward network.
        let mut grad_sum = grad_out.to_owned();
        let mut grad_normalized = try_zeros("grads", grad_out.nrows(), grad_out.ncols())?;
        let feed_forward = &self.feed_forward;
        if let Some(second_sum) = second_sum {
            // y = norm₂(h + f(h)), h = norm₁(sum)
            let mut grad = Array2::zeros(grad_sum.raw_dim());
            let view = Some(grad.view_mut());
            norm2.backward_into(second_sum.view(), grad_out, view, of_norm2)?;
            grad_normalized.assign(&grad);
            drop_entries(inputs, FEED_FORWARD, grad.view_mut());
            let h = norm1.forward(first_sum.view())?;
            let grad_h = grad_normalized.view_mut();
            feed_forward.backward_into(h.view(), hidden, grad.view(), grad_h, of_feed_forward)?;
            grad_sum.fill(F::zero());
            let grad_h = grad_normalized.view();
            norm1.backward_into(first_sum.view(), grad_h, Some(grad_sum.view_mut()), of_norm1)?;
        } else {
            // y = h + f(norm₂(h)), h = sum
            let mut grad = grad_out.to_owned();
            drop_entries(inputs, FEED_FORWARD, grad.view_mut());
            let normalized = norm2.forward(first_sum.view())?;
            let grad_x = grad_normalized.view_mut();
            feed_forward.backward_into(
                normalized.view(),
                hidden,
                grad.view(),
                grad_x,
                of_feed_forward,
            )?;
            let grad_x = grad_normalized.view();
            norm2.backward_into(first_sum.view(), grad_x, Some(grad_sum.view_mut()), of_norm2)?;
        }

        // sum = q + A(…)
        if let Some(grad_query) = &mut grads.query {
            *grad_query += &grad_sum;
        }
        drop_entries(inputs, ATTENTION, grad_sum.view_mut());
        let grads = GradientsMut { params: of_inner, ..grads };
        self.attention_vjp(inputs, grads, of_norm1, |inputs, grads| {
            self.inner.backward_into(inputs, inner, grad_sum.view(), grads)
        })
    }

    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        self.run(inputs, out, |inputs, out| self.inner.decode_into(inputs, caches, out)).map(drop)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let normalized = self.normalized(inputs)?;
        self.inner.attention_weights(&inner_inputs(inputs, &normalized)?)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let [of_inner, _, of_norm1, _] = self.split_params(take(&mut grads.params));
        let grads = GradientsMut { params: of_inner, ..grads };
        self.attention_vjp(inputs, grads, of_norm1, |inputs, grads| {
            self.inner.attention_weights_backward_into(inputs, grad_weights, grads)
        })
    }
}

impl<F: Float, A: Attention<F>> TransformerLayer<F, A> {
    /// Splits gradients of parameters into those of the inner mechanism, the feed-forward network and the norms.
    fn split_params<'g>(&self, params: &'g mut [ArrayD<F>]) -> [&'g mut [ArrayD<F>]; 4] {
        let (inner, own) = params.split_at_mut(params::count(&self.inner));
        let of_norm = params::count(&self.norms[0]);
        let (feed_forward, norms) = own.split_at_mut(own.len() - 2 * of_norm);
        let (norm1, norm2) = norms.split_at_mut(of_norm);
        [inner, feed_forward, norm1, norm2]
    }

    /// Checks that a state fits the inputs and the options of this layer.
    fn check_rows(&self, inputs: &Inputs<'_, F>, state: &Rows<F>) -> Result<()> {
        let num_rows = inputs.num_queries();
        let sums = [Some(&state.first_sum), state.second_sum.as_ref()];
        for sum in sums.into_iter().flatten() {
            check_shape("saved sum", &[num_rows, self.embed_dim], sum.shape())?;
        }
        let hidden = state.hidden.arrays().into_iter();
        for (array, shape) in hidden.zip(self.feed_forward.shapes(num_rows)) {
            check_shape("saved hidden values", &shape, array.shape())?;
        }
        let actual = state.second_sum.is_none();
        if self.norm_first == actual {
            return Ok(());
        }
        let options = |norm_first| format!("norm_first: {norm_first}");
        Err(Error::saved_options(NAME, &options(self.norm_first), &options(actual)))
    }

    /// The backward pass of the inner mechanism and, in a pre-norm layer, of the norm before it.
    fn attention_vjp(
        &self,
        inputs: &Inputs<'_, F>,
        mut grads: GradientsMut<'_, F>,
        of_norm: &mut [ArrayD<F>],
        inner_vjp: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        let normalized = self.normalized(inputs)?;
        let Some(arrays) = &normalized else { return inner_vjp(inputs, grads) };
        let grads_of_x = [grads.query.take(), grads.key.take(), grads.value.take()];
        let mut grad_arrays = arrays.each_ref().map(|array| Array2::zeros(array.raw_dim()));
        let [query, key, value] = grad_arrays.each_mut().map(|grad| Some(grad.view_mut()));
        let inner_grads = GradientsMut { query, key, value, ..grads };
        inner_vjp(&inner_inputs(inputs, &normalized)?, inner_grads)?;
        let xs = [inputs.query(), inputs.key(), inputs.value()];
        for ((x, grad), grad_x) in xs.into_iter().zip(&grad_arrays).zip(grads_of_x) {
            self.norms[0].backward_into(x, grad.view(), grad_x, of_norm)?;
        }
        Ok(())
    }
}

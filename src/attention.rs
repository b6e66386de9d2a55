use crate::cache::{self, KeyValueCache};
use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::params::{self, Params};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewMut2};
use std::any::{Any, type_name};
use std::fmt;
use std::sync::Arc;

/// A map from queries, keys and values to outputs, with its exact vector–Jacobian product.
///
/// This is the one trait of all mechanisms, of this crate and your own. Sparsity, edges and heads are data
/// in the [`Inputs`], so the trait need not know them. It is object-safe: a mixture holds
/// `Vec<Box<dyn Attention<F>>>`.
///
/// [`testing::check_attention`](crate::testing::check_attention) checks the contract:
///
/// * Outputs are overwritten; gradients are added to the existing ones.
/// * A hidden pair (mask, causal, bias of −∞, not in the graph) is skipped: NaN or infinity in its
///   key, value or features changes nothing. NaN elsewhere gives NaN in the rows it touches.
/// * A query without visible keys aggregates zeros, and gradients do not flow through it.
/// * Finite inputs give finite outputs and gradients, also where rows are zeros.
/// * [Packed inputs](Inputs::packed) give each segment what it would get alone.
/// * The same inputs give the same bits.
/// * Channels that change the result are honoured or refused ([`Inputs::check_absent`]).
///
/// [`guide::own_mechanism`](crate::guide::own_mechanism) implements a mechanism step by step, and
/// [`guide::training`](crate::guide::training) combines several layers.
///
/// A mechanism without parameters implements the trait for both precisions. If the compiler cannot infer
/// the precision, name it: `check_attention::<f64>(&Flash::new(), &shapes)`.
///
/// ```
/// use graph_attention::{Attention, Inputs, ScaledDotProduct};
/// use graph_attention::ndarray::array;
///
/// let query = array![1.0, 0.0];
/// let keys = array![[9.0, 0.0], [0.0, 9.0]];
/// let values = array![[1.0], [0.0]];
/// let inputs = Inputs::single(query.view(), keys.view(), values.view())?;
///
/// let attention: Box<dyn Attention<f64>> = Box::new(ScaledDotProduct::new());
/// let (out, saved) = attention.forward_train(&inputs)?;
/// assert!(out[[0, 0]] > 0.99);
/// let gradients = attention.backward(&inputs, &saved, array![[1.0]].view())?;
/// assert_eq!(gradients.value.dim(), (2, 1));
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub trait Attention<F: Float>: Params<F> + fmt::Debug + Send + Sync {
    /// Returns the name used in errors, benchmarks and reports, such as `edge_gat`.
    fn name(&self) -> &'static str;

    /// Returns the number of columns of the output for these inputs.
    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize;

    /// Overwrites `out`, num_queries × [`output_dim`](Self::output_dim), with the output, for inference.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` or the inputs do not fit; [`Error::MissingInput`],
    /// [`Error::Unsupported`] or [`Error::MissingSetting`] for channels.
    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()>;

    /// Computes the same output as [`forward_into`](Self::forward_into), for training, and returns the
    /// state that [`backward_into`](Self::backward_into) needs. (Dropping the state and calling this again
    /// before the backward pass is gradient checkpointing.)
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved>;

    /// Adds to `grads` the gradients of ⟨grad_out, forward(inputs)⟩ with respect to the inputs and
    /// the parameters. `saved` must come from [`forward_train_into`](Self::forward_train_into) with the
    /// same inputs and parameters; this cannot be checked.
    ///
    /// # Errors
    /// [`Error::Shape`] if an array does not fit the inputs; [`Error::SavedMismatch`] if `saved` comes
    /// from another mechanism.
    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()>;

    /// Returns the attention weights, before dropout and [weights of
    /// pairs](crate::Inputs::with_pair_weights): num_pairs × heads, in the caller's pair order (in
    /// dense inputs the weight of query i for key j is in row `i · num_keys + j`). Hidden pairs have weight
    /// 0, and the weights of a query sum to 1, or to 0 if it sees no key.
    ///
    /// # Errors
    /// [`Error::NoWeights`] if the mechanism does not compute weights; otherwise as
    /// [`forward_into`](Self::forward_into).
    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let _ = inputs;
        Err(Error::NoWeights { mechanism: self.name() })
    }

    /// Runs the backward pass of [`attention_weights`](Self::attention_weights): adds to `grads` the
    /// gradients of ⟨grad_weights, attention_weights(inputs)⟩. Use it for losses on the weights, such as
    /// their entropy or their distance from target weights. Recomputes the weights, in O(pairs · heads)
    /// memory, so call it before the parameters change. A weight of 0 has no gradient, whatever
    /// `grad_weights` holds for it.
    ///
    /// # Errors
    /// [`Error::NoWeights`] if the mechanism has no such backward pass; [`Error::Shape`] if
    /// `grad_weights` is not num_pairs × heads or a gradient does not fit.
    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let _ = (inputs, grad_weights, grads);
        Err(Error::NoWeights { mechanism: self.name() })
    }

    /// Runs [`attention_weights_backward_into`](Self::attention_weights_backward_into) and returns new
    /// gradients.
    ///
    /// ```
    /// use graph_attention::{Attention, Flash, Inputs};
    /// use graph_attention::ndarray::array;
    ///
    /// let x = array![[1.0, 0.0], [0.0, 1.0]];
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    /// let weights = Flash::new().attention_weights(&inputs)?;
    /// // The entropy −Σ p log p of all rows. Where p is 0 the infinite derivative is not used.
    /// let grad_weights = weights.mapv(|p: f64| -p.ln() - 1.0);
    /// let grads = Flash::new().attention_weights_backward(&inputs, grad_weights.view())?;
    /// assert!(grads.query[[0, 0]] < 0.0); // a larger query is more certain
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`attention_weights_backward_into`](Self::attention_weights_backward_into).
    fn attention_weights_backward(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
    ) -> Result<Gradients<F>> {
        let mut gradients = Gradients::zeros(inputs, self)?;
        self.attention_weights_backward_into(inputs, grad_weights, gradients.view_mut())?;
        Ok(gradients)
    }

    /// Computes the next outputs of growing sequences, for inference: appends the new keys and values in
    /// `inputs` to the caches, and overwrites `out` with the outputs of the new queries over all cached rows.
    ///
    /// There is one cache for each sequence: one for dense inputs, and one for each segment of
    /// [packed](Inputs::packed) inputs, whose projections are shared. A [`Stack`](crate::Stack) has them for each
    /// layer, layer by layer. A mechanism that transforms
    /// keys (projects, rotates) transforms the new ones and passes them on; the innermost one appends them. By
    /// default a mechanism is the innermost: it appends the keys as they are, and computes
    /// [`forward_into`](Self::forward_into) over all of them.
    ///
    /// With a causal pattern the new queries see all earlier rows, and the new rows as in `inputs`.
    /// Decoding a sequence in any steps therefore gives the outputs of one causal call up to rounding.
    /// Without a causal pattern the queries see all rows, as in cross-attention. Positions and heads are
    /// honoured; what counts pairs of new rows (mask, bias, dropout, weights and data of pairs, a graph)
    /// is refused.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into); [`Error::Shape`] if there is not one cache for each sequence,
    /// or if its rows have other numbers of columns; [`Error::Unsupported`] or [`Error::InvalidArgument`] for
    /// inputs that are refused. The caches are then unchanged.
    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        cache::decode(self, inputs, caches, out)
    }

    /// Runs [`decode_into`](Self::decode_into) and returns a new output array. [`KeyValueCache`] has an
    /// example.
    ///
    /// # Errors
    /// As [`decode_into`](Self::decode_into).
    fn decode(&self, inputs: &Inputs<'_, F>, caches: &mut [KeyValueCache<F>]) -> Result<Array2<F>> {
        let mut out = try_zeros("out", inputs.num_queries(), self.output_dim(inputs))?;
        self.decode_into(inputs, caches, out.view_mut())?;
        Ok(out)
    }

    /// Runs [`forward_into`](Self::forward_into) and returns a new output array.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    fn forward(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let mut out = try_zeros("out", inputs.num_queries(), self.output_dim(inputs))?;
        self.forward_into(inputs, out.view_mut())?;
        Ok(out)
    }

    /// Runs [`forward_train_into`](Self::forward_train_into) and returns a new output array and the state.
    ///
    /// # Errors
    /// As [`forward_train_into`](Self::forward_train_into).
    fn forward_train(&self, inputs: &Inputs<'_, F>) -> Result<(Array2<F>, Saved)> {
        let mut out = try_zeros("out", inputs.num_queries(), self.output_dim(inputs))?;
        let saved = self.forward_train_into(inputs, out.view_mut())?;
        Ok((out, saved))
    }

    /// Runs [`backward_into`](Self::backward_into) and returns new gradients.
    ///
    /// # Errors
    /// As [`backward_into`](Self::backward_into).
    fn backward(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
    ) -> Result<Gradients<F>> {
        let mut gradients = Gradients::zeros(inputs, self)?;
        self.backward_into(inputs, saved, grad_out, gradients.view_mut())?;
        Ok(gradients)
    }

    /// Runs [`backward_into`](Self::backward_into) for the parameters only and returns their gradients in
    /// the order of [`Params`]. For a first layer, whose inputs are data and need no gradients.
    ///
    /// # Errors
    /// As [`backward_into`](Self::backward_into).
    fn backward_params(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
    ) -> Result<Vec<ArrayD<F>>> {
        let mut params = params::zeros(self);
        self.backward_into(inputs, saved, grad_out, GradientsMut::of_params(&mut params))?;
        Ok(params)
    }
}

/// Checks the shape of `out` or `grad_out`. Call it first in `forward_into` and `backward_into`.
///
/// # Errors
/// [`Error::Shape`], naming `what`, if it is not num_queries × [`output_dim`](Attention::output_dim).
pub fn check_output<F: Float>(
    attention: &(impl Attention<F> + ?Sized),
    what: &'static str,
    inputs: &Inputs<'_, F>,
    shape: &[usize],
) -> Result<()> {
    check_shape(what, &[inputs.num_queries(), attention.output_dim(inputs)], shape)
}

/// The state that a forward pass keeps for its backward pass: opaque, owned, returned by
/// [`Attention::forward_train_into`].
pub struct Saved {
    mechanism: &'static str,
    type_name: &'static str,
    state: Box<dyn Any + Send + Sync>,
}

impl Saved {
    /// Wraps the state of the mechanism of this name.
    pub fn new<T: Any + Send + Sync>(mechanism: &'static str, state: T) -> Self {
        Self { mechanism, type_name: type_name::<T>(), state: Box::new(state) }
    }

    /// Returns the state to the mechanism that saved it.
    ///
    /// # Errors
    /// [`Error::SavedMismatch`] if another mechanism saved it, or the same mechanism in another precision.
    pub fn state<T: Any>(&self, mechanism: &'static str) -> Result<&T> {
        let state = self.state.downcast_ref();
        state.filter(|_| mechanism == self.mechanism).ok_or(Error::SavedMismatch {
            mechanism,
            saved_by: self.mechanism,
            expected: type_name::<T>().into(),
            actual: self.type_name.into(),
        })
    }
}

impl fmt::Debug for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saved").field("mechanism", &self.mechanism).finish_non_exhaustive()
    }
}

macro_rules! impl_for_pointers {
    ($($pointer:ty),*) => {$(
        impl<F: Float, A: Attention<F> + ?Sized> Attention<F> for $pointer {
            fn name(&self) -> &'static str {
                (**self).name()
            }
            fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
                (**self).output_dim(inputs)
            }
            fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
                (**self).forward_into(inputs, out)
            }
            fn forward_train_into(
                &self,
                inputs: &Inputs<'_, F>,
                out: ArrayViewMut2<'_, F>,
            ) -> Result<Saved> {
                (**self).forward_train_into(inputs, out)
            }
            fn backward_into(
                &self,
                inputs: &Inputs<'_, F>,
                saved: &Saved,
                grad_out: ArrayView2<'_, F>,
                grads: GradientsMut<'_, F>,
            ) -> Result<()> {
                (**self).backward_into(inputs, saved, grad_out, grads)
            }
            fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
                (**self).attention_weights(inputs)
            }
            fn attention_weights_backward_into(
                &self,
                inputs: &Inputs<'_, F>,
                grad_weights: ArrayView2<'_, F>,
                grads: GradientsMut<'_, F>,
            ) -> Result<()> {
                (**self).attention_weights_backward_into(inputs, grad_weights, grads)
            }
            fn decode_into(
                &self,
                inputs: &Inputs<'_, F>,
                caches: &mut [KeyValueCache<F>],
                out: ArrayViewMut2<'_, F>,
            ) -> Result<()> {
                (**self).decode_into(inputs, caches, out)
            }
        }
    )*};
}

impl_for_pointers!(Box<A>, Arc<A>, &A, &mut A);

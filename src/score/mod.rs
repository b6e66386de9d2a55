//! Functions of the logits: soft caps, ALiBi, relative position biases, attention sinks, and your own.
//!
//! A [`ScoreFunction`] maps the logit of each pair to another one before the softmax, in the tiles of
//! [`Flash`](crate::Flash), so no array with a number for each pair is needed:
//!
//! ```text
//! sᵢⱼ = f(scale · qᵢ·kⱼ; i, j, head, θ) + bᵢⱼ          l = Σⱼ e^{sᵢⱼ} + e^{sink of the head}
//! ```
//!
//! f comes before bias and mask, the order of Gemma 2 and of ONNX's `Attention`. Its parameters θ are
//! parameters of the mechanism, and the backward pass is exact. This is what PyTorch's `flex_attention` (Dong et
//! al. 2024, 2412.05496) calls a `score_mod`;
//! [`guide::from_flex_attention`](crate::guide::from_flex_attention) translates five examples.
//!
//! | function | f(s) | parameters |
//! |---|---|---|
//! | [`SoftCap`] | c tanh(s / c) | none |
//! | [`Alibi`] | s − slope · abs(i − j) | `slopes`, if they are learned |
//! | [`BucketBias`] | s + weight of the pair's bucket: relative positions (T5), hops, edge types | `weight` |
//! | [`Sinks`] | s; adds a logit per head to the softmax that has no value | `sinks` |
//! | [`Elementwise`] | your closure, with your derivative | none |
//! | `(A, B)` | the second of the first | `0.` and `1.` |
//! | `()` | s | none |
//!
//! ```
//! use graph_attention::ndarray::Array2;
//! use graph_attention::score::{Alibi, SoftCap};
//! use graph_attention::{Attention, Flash, Inputs};
//!
//! let x = Array2::from_shape_fn((300, 8), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
//! let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?.with_causal();
//! // Gemma's soft cap, and then a penalty that grows with the distance.
//! let attention = Flash::new().with_score((SoftCap::new(30.0)?, Alibi::new(2)?));
//! let (out, saved) = attention.forward_train(&inputs)?;
//! let grads = attention.backward(&inputs, &saved, out.view())?;
//! assert_eq!(grads.query.dim(), (300, 8));
//! # Ok::<(), graph_attention::Error>(())
//! ```

mod alibi;
mod bucket_bias;
mod elementwise;
mod pairs;
mod pipe;
mod sinks;
mod soft_cap;

pub use alibi::Alibi;
pub use bucket_bias::{BucketBias, Buckets};
pub use elementwise::Elementwise;
pub(crate) use pairs::{Indices, Side};
pub use pairs::{ScorePair, ScorePairs};
pub use sinks::Sinks;
pub(crate) use sinks::with_sink;
pub use soft_cap::SoftCap;

use crate::element::Element;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::params::Params;
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
use std::fmt;

/// A function of the logits, for [`Flash::with_score`](crate::Flash::with_score) and
/// [`ScaledDotProduct::with_score`](crate::ScaledDotProduct::with_score).
///
/// A logit's result must depend on that logit, its pair and the parameters only, because kernels pass them in
/// slices of different lengths. Mark [`apply`](Self::apply) and [`vjp`](Self::vjp) `#[inline]`: they are
/// compiled for each instruction set, and their loops are vectorised if they are simple. For a function
/// without parameters [`Elementwise`] is shorter.
///
/// ```
/// use graph_attention::ndarray::{Array0, Array2, ArrayViewD, ArrayViewMutD, arr0};
/// use graph_attention::score::{ScoreFunction, ScorePairs};
/// use graph_attention::{Attention, Element, Flash, Inputs, Params};
///
/// /// s ↦ temperature · s, with a learned temperature.
/// #[derive(Debug)]
/// struct Temperature<F>(Array0<F>);
///
/// impl<F: Element> Params<F> for Temperature<F> {
///     fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
///         visitor("temperature", self.0.view().into_dyn());
///     }
///     fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
///         visitor("temperature", self.0.view_mut().into_dyn());
///     }
/// }
///
/// impl<F: Element> ScoreFunction<F> for Temperature<F> {
///     #[inline]
///     fn apply(&self, _: &ScorePairs<'_>, logits: &mut [F]) {
///         let temperature = self.0[()];
///         logits.iter_mut().for_each(|logit| *logit *= temperature);
///     }
///
///     #[inline]
///     fn vjp(&self, _: &ScorePairs<'_>, logits: &[F], grads: &mut [F], grad_params: &mut [f64]) {
///         let temperature = self.0[()];
///         for (grad, &logit) in grads.iter_mut().zip(logits) {
///             grad_params[0] += (*grad * logit).as_f64();
///             *grad *= temperature;
///         }
///     }
/// }
///
/// let x = Array2::from_shape_fn((20, 4), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// let learned = Flash::new().with_score(Temperature(arr0(1.5)));
/// let (out, saved) = learned.forward_train(&inputs)?;
/// let same = Flash::new().with_scale(1.5 / 2.0)?.forward(&inputs)?; // 1/√d is 1/2
/// assert!((&out - same).iter().all(|difference| difference.abs() < 1e-14));
/// let grads = learned.backward(&inputs, &saved, out.view())?;
/// assert!(grads.params[0][[]] != 0.0);
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub trait ScoreFunction<F: Element>: Params<F> + fmt::Debug + Send + Sync {
    /// Replaces each logit s by f(s).
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]);

    /// The backward pass of [`apply`](Self::apply): replaces each entry g of `grads`, the gradient of f(s), by
    /// g · f'(s), the gradient of s, and adds the gradients of the parameters to `grad_params`: one number for
    /// each entry of each parameter, in the order in which [`Params`] visits them. `logits` are the original
    /// logits s. A hidden pair has the logit 0 and the gradient 0.
    fn vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], grad_params: &mut [f64]);

    /// Checks that the function can be used with these inputs, such as their number of heads. The default
    /// accepts all.
    ///
    /// # Errors
    /// As the function needs.
    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let _ = inputs;
        Ok(())
    }

    /// Whether [`apply`](Self::apply) changes logits: `true` by default. If not, it is not called.
    fn changes_logits(&self) -> bool {
        true
    }

    /// Whether the function reads [`ScorePairs::layer`]: `false` by default.
    fn reads_edge_layers(&self) -> bool {
        false
    }

    /// Returns the logit of the attention sink of a head, which takes part in the softmax but has no value: −∞ by
    /// default, which is none.
    fn sink(&self, head: usize) -> F {
        let _ = head;
        F::neg_infinity()
    }

    /// Adds the gradients of the parameters, given that of the [`sink`](Self::sink) of a head.
    fn sink_vjp(&self, head: usize, grad: f64, grad_params: &mut [f64]) {
        let _ = (head, grad, grad_params);
    }
}

/// No function: logits stay as they are.
impl<F: Element> ScoreFunction<F> for () {
    fn apply(&self, _: &ScorePairs<'_>, _: &mut [F]) {}

    fn vjp(&self, _: &ScorePairs<'_>, _: &[F], _: &mut [F], _: &mut [f64]) {}

    fn changes_logits(&self) -> bool {
        false
    }
}

impl<F: Element> Params<F> for () {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

impl<F: Element, S: ScoreFunction<F> + ?Sized> ScoreFunction<F> for &S {
    #[inline]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        (**self).apply(pairs, logits);
    }

    #[inline]
    fn vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], params: &mut [f64]) {
        (**self).vjp(pairs, logits, grads, params);
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        (**self).check(inputs)
    }

    fn changes_logits(&self) -> bool {
        (**self).changes_logits()
    }

    fn reads_edge_layers(&self) -> bool {
        (**self).reads_edge_layers()
    }

    fn sink(&self, head: usize) -> F {
        (**self).sink(head)
    }

    fn sink_vjp(&self, head: usize, grad: f64, grad_params: &mut [f64]) {
        (**self).sink_vjp(head, grad, grad_params);
    }
}

/// A score function as the kernels call it: chosen at run time once for each tile, and compiled for each
/// instruction set.
pub(crate) trait AnyScore<F: Element>: fmt::Debug + Send + Sync {
    fn apply_to(&self, pairs: &ScorePairs<'_>, logits: &mut [F]);
    fn add_vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], params: &mut [f64]);
    /// The number of entries of all parameters.
    fn num_params(&self) -> usize;
}

impl<F: Element, S: ScoreFunction<F>> AnyScore<F> for S {
    fn apply_to(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        dispatch!(pairs.level, _simd => self.apply(pairs, logits));
    }

    fn add_vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], params: &mut [f64]) {
        dispatch!(pairs.level, _simd => self.vjp(pairs, logits, grads, params));
    }

    fn num_params(&self) -> usize {
        num_entries(self)
    }
}

/// The number of entries of all parameters.
pub(crate) fn num_entries<F: Element>(params: &(impl Params<F> + ?Sized)) -> usize {
    let mut count = 0;
    params.visit_params(&mut |_, param| count += param.len());
    count
}

/// Adds the gradients of all entries to the gradients of the parameters.
pub(crate) fn add_entries<F: Element>(entries: &[f64], params: &mut [ArrayD<F>]) {
    let all = params.iter_mut().flat_map(|param| param.iter_mut());
    all.zip(entries).for_each(|(sum, &entry)| *sum += F::from_f64(entry));
}

/// Returns Σ aᵢ bᵢ. The sums over up to 64 rows of 16 are in `F`, and vectorised; they are added in `f64`.
#[inline(always)]
fn dot<F: Element>(a: &[F], b: impl Fn(usize) -> F) -> f64 {
    const LANES: usize = 16;
    let mut sum = 0.0;
    for (number, block) in a.chunks(64 * LANES).enumerate() {
        let first = number * 64 * LANES;
        let mut lanes = [F::zero(); LANES];
        let mut rows = block.chunks_exact(LANES);
        let mut at = first;
        for row in rows.by_ref() {
            for (lane, (sum, &a)) in lanes.iter_mut().zip(row).enumerate() {
                *sum += a * b(at + lane);
            }
            at += LANES;
        }
        for (lane, &a) in rows.remainder().iter().enumerate() {
            sum += (a * b(at + lane)).as_f64();
        }
        sum += lanes.iter().map(|lane| lane.as_f64()).sum::<f64>();
    }
    sum
}

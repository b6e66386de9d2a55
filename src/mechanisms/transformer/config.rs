//! The configuration and the initial parameters.

use super::TransformerLayer;
use super::feed_forward::FeedForward;
use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::params;
use crate::rowwise::{Activation, Linear, LinearConfig, NormConfig, Normalization};
use ndarray::ArrayD;
use rand::Rng;

/// The sizes and options of a [`TransformerLayer`]. Build one with initial parameters with [`init`](Self::init),
/// or with given parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct TransformerLayerConfig {
    embed_dim: usize,
    feedforward_dim: usize,
    activation: Activation,
    gated: bool,
    normalization: Normalization,
    epsilon: f64,
    norm_first: bool,
    bias: bool,
}

impl TransformerLayerConfig {
    /// Creates the configuration of PyTorch's
    /// `nn.TransformerEncoderLayer(embed_dim, …, dim_feedforward=feedforward_dim)`: a feed-forward network with
    /// ReLU, layer norms after the residual connections, and biases.
    #[must_use]
    pub fn new(embed_dim: usize, feedforward_dim: usize) -> Self {
        Self {
            embed_dim,
            feedforward_dim,
            activation: Activation::Relu,
            gated: false,
            normalization: Normalization::Layer,
            epsilon: 1e-5,
            norm_first: false,
            bias: true,
        }
    }

    /// Sets the activation of the feed-forward network. Default: [`Activation::Relu`].
    #[must_use]
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// Sets whether the feed-forward network has gates (Shazeer 2020, 2002.05202): SwiGLU with
    /// [`Activation::Silu`], GEGLU with [`Activation::Gelu`], ReGLU with [`Activation::Relu`]. It then has a third
    /// matrix, so ⅔ of `feedforward_dim` gives as many parameters as without gates. Default: `false`.
    #[must_use]
    pub fn gated(mut self, gated: bool) -> Self {
        self.gated = gated;
        self
    }

    /// Sets how rows are normalised. Default: [`Normalization::Layer`].
    #[must_use]
    pub fn normalization(mut self, normalization: Normalization) -> Self {
        self.normalization = normalization;
        self
    }

    /// Sets ε of the norms: PyTorch's `layer_norm_eps`. Default: 1e-5.
    #[must_use]
    pub fn epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets whether the inputs of attention and feed-forward network are normalised (pre-norm), instead of the
    /// outputs of the residual connections (post-norm): PyTorch's `norm_first`. Default: `false`.
    #[must_use]
    pub fn norm_first(mut self, norm_first: bool) -> Self {
        self.norm_first = norm_first;
        self
    }

    /// Sets whether the feed-forward network and layer norms have biases. Default: `true`.
    #[must_use]
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Builds a layer around `inner`, with the initial parameters of PyTorch: weights and biases of the
    /// feed-forward network uniform in ±1/√inputs, norms with weights 1 and biases 0. The inner mechanism
    /// has its own.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0 or ε is not positive and finite, [`Error::TooLarge`].
    pub fn init<F: Float, A: Attention<F>>(
        &self,
        inner: A,
        rng: &mut impl Rng,
    ) -> Result<TransformerLayer<F, A>> {
        self.build(inner, |linear| linear.init(rng))
    }

    /// Builds a layer around `inner` with given parameters, named as in PyTorch's state dict (see
    /// [`TransformerLayer`]).
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float, A: Attention<F>>(
        &self,
        inner: A,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<TransformerLayer<F, A>> {
        let mut layer = self.build(inner, LinearConfig::zeros)?;
        params::load_state(&mut layer, state)?;
        Ok(layer)
    }

    fn build<F: Float, A>(
        &self,
        inner: A,
        mut init: impl FnMut(&LinearConfig) -> Result<Linear<F>>,
    ) -> Result<TransformerLayer<F, A>> {
        let Self { embed_dim, feedforward_dim, .. } = *self;
        for (argument, size) in [("embed_dim", embed_dim), ("feedforward_dim", feedforward_dim)] {
            if size == 0 {
                return Err(Error::config(argument, "at least 1", size));
            }
        }
        let rows = if self.gated { feedforward_dim.saturating_mul(2) } else { feedforward_dim };
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).bias(self.bias);
        let norm = NormConfig::new(self.normalization, embed_dim);
        let norm = norm.epsilon(self.epsilon).bias(self.bias);
        Ok(TransformerLayer {
            inner,
            feed_forward: FeedForward {
                activation: self.activation,
                is_gated: self.gated,
                linear1: init(&linear(embed_dim, rows))?,
                linear2: init(&linear(feedforward_dim, embed_dim))?,
            },
            norms: [norm.init()?, norm.init()?],
            norm_first: self.norm_first,
            embed_dim,
        })
    }
}

//! The options of a stack.

use super::Stack;
use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::params;
use crate::rowwise::NormConfig;
use ndarray::ArrayD;

/// The options of a [`Stack`]. Build one from layers with [`init`](Self::init), or with given parameters with
/// [`from_params`](Self::from_params).
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct StackConfig {
    norm: Option<NormConfig>,
    cross_attention: bool,
    checkpointing: bool,
}

impl StackConfig {
    /// Creates the configuration of a stack for self-attention, without a final norm and without checkpointing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a norm of the output of the last layer: the `norm` of PyTorch's `nn.TransformerEncoder`. A stack of
    /// pre-norm layers needs one.
    #[must_use]
    pub fn norm(mut self, norm: NormConfig) -> Self {
        self.norm = Some(norm);
        self
    }

    /// Sets whether every layer attends to the keys and values of the inputs, instead of the output of the layer
    /// before it. Default: `false`.
    #[must_use]
    pub fn cross_attention(mut self, cross_attention: bool) -> Self {
        self.cross_attention = cross_attention;
        self
    }

    /// Sets whether the forward pass keeps only the outputs of the layers, and the backward pass runs the forward
    /// pass of each layer again (Chen et al. 2016, 1604.06174). Gradients have the same bits. Default: `false`.
    #[must_use]
    pub fn checkpointing(mut self, checkpointing: bool) -> Self {
        self.checkpointing = checkpointing;
        self
    }

    /// Builds a stack of these layers, the first one first.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no layers, or as [`NormConfig::init`].
    pub fn init<F: Float, A: Attention<F>>(
        &self,
        layers: impl IntoIterator<Item = A>,
    ) -> Result<Stack<F, A>> {
        let layers: Vec<A> = layers.into_iter().collect();
        if layers.is_empty() {
            return Err(Error::config("layers", "at least 1", 0));
        }
        Ok(Stack {
            layers,
            norm: self.norm.as_ref().map(NormConfig::init).transpose()?,
            cross_attention: self.cross_attention,
            checkpointing: self.checkpointing,
        })
    }

    /// Builds a stack of these layers with given parameters, named as in PyTorch's state dict (see [`Stack`]).
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float, A: Attention<F>>(
        &self,
        layers: impl IntoIterator<Item = A>,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<Stack<F, A>> {
        let mut stack = self.init(layers)?;
        params::load_state(&mut stack, state)?;
        Ok(stack)
    }
}

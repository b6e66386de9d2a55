//! The configuration and the initial parameters.

use super::DualSpace;
use crate::attention::Attention;
use crate::element::{try_vec, try_zeros};
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::mechanisms::fill_uniform;
use crate::params;
use ndarray::ArrayD;
use rand::Rng;

/// How a [`DualSpace`] combines the outputs of its three branches.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub enum Fusion {
    /// W (graph ‖ latent ‖ cross) + b.
    Linear {
        /// The number of columns of the output.
        output_dim: usize,
    },
    /// Γ_1 graph + Γ_2 latent + Γ_3 cross with the gates Γ = softmax(W (graph ‖ latent ‖ cross) + b). A
    /// branch without visible neighbours is left out of the softmax.
    Gated,
}

/// The sizes and options of a [`DualSpace`]. Build one with initial parameters with [`init`](Self::init),
/// or with given parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct DualSpaceConfig {
    pub(super) fusion: Fusion,
    pub(super) branch_dim: usize,
}

impl DualSpaceConfig {
    /// Creates a configuration with a fusion of three branches whose outputs have `branch_dim` columns
    /// each.
    #[must_use]
    pub fn new(fusion: Fusion, branch_dim: usize) -> Self {
        Self { fusion, branch_dim }
    }

    /// Builds a `DualSpace` of these three mechanisms with initial fusion parameters, uniform in
    /// ±1/√(3 `branch_dim`) as in PyTorch's `nn.Linear`; the bias of a gate is zero.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0 or huge, [`Error::TooLarge`].
    pub fn init<F: Float>(
        &self,
        graph: impl Attention<F> + 'static,
        latent: impl Attention<F> + 'static,
        cross: impl Attention<F> + 'static,
        rng: &mut impl Rng,
    ) -> Result<DualSpace<F>> {
        let mut dual = self.zeros([Box::new(graph), Box::new(latent), Box::new(cross)])?;
        let bound = 1.0 / (dual.weight.ncols() as f64).sqrt();
        fill_uniform(dual.weight.view_mut(), bound, rng);
        if self.fusion != Fusion::Gated {
            fill_uniform(dual.bias.view_mut(), bound, rng);
        }
        Ok(dual)
    }

    /// Builds a `DualSpace` of these three mechanisms with given parameters for the fusion and the
    /// mechanisms (see [`DualSpace`]).
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float>(
        &self,
        graph: impl Attention<F> + 'static,
        latent: impl Attention<F> + 'static,
        cross: impl Attention<F> + 'static,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<DualSpace<F>> {
        let mut dual = self.zeros([Box::new(graph), Box::new(latent), Box::new(cross)])?;
        params::load_state(&mut dual, state)?;
        Ok(dual)
    }

    /// Validates the configuration and allocates the fusion as zeros.
    fn zeros<F: Float>(&self, branches: [Box<dyn Attention<F>>; 3]) -> Result<DualSpace<F>> {
        let rows = match self.fusion {
            Fusion::Linear { output_dim } => output_dim,
            Fusion::Gated => 3,
        };
        for (field, size) in [("branch_dim", self.branch_dim), ("output_dim", rows)] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        let columns = self.branch_dim.saturating_mul(3);
        Ok(DualSpace {
            config: self.clone(),
            weight: try_zeros("fusion weight", rows, columns)?,
            bias: try_vec("fusion bias", &[rows], F::zero())?.into(),
            branches,
            search: None,
        })
    }
}

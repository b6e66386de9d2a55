//! Sizes, options and fresh parameters.

use super::Moe;
use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::float::{Float, try_vec, try_zeros};
use crate::mechanisms::fill_uniform;
use crate::params;
use ndarray::{Array1, ArrayD};
use rand::Rng;

/// The sizes and options of a [`Moe`], from which [`init`](Self::init) makes one with fresh
/// parameters and [`from_params`](Self::from_params) one with given ones.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct MoeConfig {
    pub(super) query_dim: usize,
    pub(super) k: usize,
    pub(super) renormalize: bool,
    pub(super) noise: bool,
    pub(super) capacity_factor: Option<f64>,
}

impl MoeConfig {
    /// Queries of `query_dim` columns, all heads together, each to `k` experts, whose weights are
    /// renormalised; without noise and without a limit to what an expert takes.
    #[must_use]
    pub fn new(query_dim: usize, k: usize) -> Self {
        Self { query_dim, k, renormalize: true, noise: false, capacity_factor: None }
    }

    /// Whether the weights of the chosen experts are made to sum to 1, as in Mixtral (Jiang et al.
    /// 2024), or stay probabilities among all experts, as in the Switch Transformer (Fedus et al.
    /// 2021). With k = 1 a renormalised weight is always 1, so only the latter teaches the router anything
    /// through the outputs. Default: `true`.
    #[must_use]
    pub fn renormalize(mut self, renormalize: bool) -> Self {
        self.renormalize = renormalize;
        self
    }

    /// Noisy top-k gating (Shazeer et al. 2017): adds the parameter `router.noise_weight`. The noise
    /// itself is off until [`Moe::set_noise`] gives a seed. Default: `false`.
    #[must_use]
    pub fn noise(mut self, noise: bool) -> Self {
        self.noise = noise;
        self
    }

    /// An expert takes no more than ⌈factor · k · n / N⌉ of n queries, N the number of experts
    /// (Fedus et al. 2021): those that come first. The others that chose it get nothing from it, and
    /// what their other experts add keeps its weight, so a query that all its experts drop gets
    /// zeros: put a residual connection around.
    ///
    /// First come, first served means that later queries do not change what earlier ones get, as
    /// causal models need. But with a limit the answer to a query depends on those before it. Default: no
    /// limit.
    #[must_use]
    pub fn capacity_factor(mut self, factor: f64) -> Self {
        self.capacity_factor = Some(factor);
        self
    }

    /// A `Moe` of these experts with a fresh router: weights uniform in ±1/√`query_dim` as in
    /// PyTorch's `nn.Linear`, bias zero; the weight of the noise zero, as in Shazeer et al.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if there are no experts, `k` is not between 1 and their number,
    /// `query_dim` is 0 or the capacity factor not a positive number; [`Error::TooLarge`].
    pub fn init<F: Float>(
        &self,
        experts: Vec<Box<dyn Attention<F>>>,
        rng: &mut impl Rng,
    ) -> Result<Moe<F>> {
        let mut moe = self.zeros(experts)?;
        let bound = 1.0 / (self.query_dim as f64).sqrt();
        fill_uniform(moe.weight.view_mut(), bound, rng);
        Ok(moe)
    }

    /// A `Moe` of these experts with given parameters, the router's and the experts' (see [`Moe`]).
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float>(
        &self,
        experts: Vec<Box<dyn Attention<F>>>,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<Moe<F>> {
        let mut moe = self.zeros(experts)?;
        params::load_state(&mut moe, state)?;
        Ok(moe)
    }

    /// Validates, and allocates the router as zeros.
    fn zeros<F: Float>(&self, experts: Vec<Box<dyn Attention<F>>>) -> Result<Moe<F>> {
        let num_experts = experts.len();
        if num_experts == 0 {
            return Err(Error::config("experts", "at least 1", num_experts));
        }
        if !(1..=num_experts).contains(&self.k) {
            let expected = format!("between 1 and {num_experts}, the number of experts");
            return Err(Error::config("k", expected, self.k));
        }
        if self.query_dim == 0 {
            return Err(Error::config("query_dim", "at least 1", self.query_dim));
        }
        if let Some(factor) = self.capacity_factor.filter(|&f| !(f > 0.0 && f.is_finite())) {
            return Err(Error::config("capacity_factor", "a positive number", factor));
        }
        let matrix = |name| try_zeros(name, num_experts, self.query_dim);
        let vector = |name| try_vec(name, &[num_experts], F::zero()).map(Array1::from);
        Ok(Moe {
            config: self.clone(),
            weight: matrix("router.weight")?,
            bias: vector("router.bias")?,
            noise_weight: self.noise.then(|| matrix("router.noise_weight")).transpose()?,
            noise_seed: None,
            expert_bias: vector("expert_bias")?,
            experts,
        })
    }
}

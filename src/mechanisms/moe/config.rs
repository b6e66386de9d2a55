//! The configuration and the initial parameters.

use super::Moe;
use crate::attention::Attention;
use crate::element::{try_vec, try_zeros};
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::mechanisms::fill_uniform;
use crate::params;
use ndarray::{Array1, ArrayD};
use rand::Rng;

/// The function that turns the logit z_ie of an expert into its gate g_ie.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Gating {
    /// g_i = softmax(z_i): the gates of a query sum to 1.
    Softmax,
    /// g_ie = σ(z_ie) = 1 / (1 + e^{−z_ie}): the gates are independent, as in DeepSeek-V3 (DeepSeek-AI
    /// 2024, 2412.19437), which renormalises over the chosen experts and balances with the expert bias.
    Sigmoid,
}

/// The order in which queries are served if an expert has a capacity.
///
/// In every order an expert drops the same number of queries: those that exceed its capacity.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Priority {
    /// All first choices before any second choice, all second before any third, and so on; within a rank,
    /// earlier queries first, as in GShard (Lepikhin et al. 2020, 2006.16668), fairscale and Tutel. The
    /// number of choices of each rank that an expert drops does not depend on the order of the queries,
    /// but which queries of a rank are dropped does.
    Rank,
    /// As [`Rank`](Self::Rank), but within a rank the larger gate g_ie first, and among equal gates the
    /// earlier query. The result does not depend on the order of queries whose gates differ. Batch
    /// prioritised routing (Riquelme et al. 2021, 2106.05974) also orders first choices like this, but
    /// the other choices by the gate of their query's first choice.
    Gate,
    /// Query by query, all choices of one query before any of the next. The output of a query does not
    /// depend on later queries, as causal models need, but its second choice may displace a later query's
    /// first choice. With k = 1 the same as [`Rank`](Self::Rank).
    Query,
}

/// The sizes and options of a [`Moe`]. Build one with initial parameters with [`init`](Self::init), or
/// with given parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct MoeConfig {
    pub(super) query_dim: usize,
    pub(super) k: usize,
    pub(super) gating: Gating,
    pub(super) renormalize: bool,
    pub(super) noise: bool,
    pub(super) capacity_factor: Option<f64>,
    pub(super) capacity: Option<usize>,
    pub(super) priority: Priority,
}

impl MoeConfig {
    /// Creates a configuration that sends each query, of `query_dim` columns for all heads together, to
    /// `k` experts with renormalised weights, without noise and without capacity limits.
    #[must_use]
    pub fn new(query_dim: usize, k: usize) -> Self {
        Self {
            query_dim,
            k,
            gating: Gating::Softmax,
            renormalize: true,
            noise: false,
            capacity_factor: None,
            capacity: None,
            priority: Priority::Rank,
        }
    }

    /// Sets the function that turns logits into gates. Default: [`Gating::Softmax`].
    #[must_use]
    pub fn gating(mut self, gating: Gating) -> Self {
        self.gating = gating;
        self
    }

    /// Sets whether the weights of the chosen experts are scaled to sum to 1, as in Mixtral (Jiang et al.
    /// 2024) and DeepSeek-V3, or are the gates themselves, as in the Switch Transformer (Fedus et al.
    /// 2021). With k = 1 a renormalised weight is always 1, and the router gets no gradient from the
    /// outputs. Default: `true`.
    #[must_use]
    pub fn renormalize(mut self, renormalize: bool) -> Self {
        self.renormalize = renormalize;
        self
    }

    /// Sets whether the router has the parameter `router.noise_weight` of noisy top-k gating (Shazeer et
    /// al. 2017). The noise itself is off until [`Moe::set_noise`] sets a seed. Default: `false`.
    #[must_use]
    pub fn noise(mut self, noise: bool) -> Self {
        self.noise = noise;
        self
    }

    /// Limits each expert to ⌈factor · k · n / N⌉ of n queries, where N is the number of experts (Fedus
    /// et al. 2021). [`priority`](Self::priority) sets which queries are served first. A dropped query
    /// gets nothing from the full expert, and the weights of its other experts stay the same. A query
    /// that all of its experts drop gets zeros, so add a residual connection.
    ///
    /// With a limit the output of a query depends on the other queries, and with [`Priority::Rank`] and
    /// [`Priority::Query`] on their order: renumbering the nodes changes outputs. Choices and weights
    /// never depend on other queries. Default: no limit.
    #[must_use]
    pub fn capacity_factor(mut self, factor: f64) -> Self {
        self.capacity_factor = Some(factor);
        self
    }

    /// Limits each expert to a fixed number of queries. If there is also a
    /// [`capacity_factor`](Self::capacity_factor), the lower limit applies. Default: no limit.
    #[must_use]
    pub fn capacity(mut self, capacity: usize) -> Self {
        self.capacity = Some(capacity);
        self
    }

    /// Sets which queries are served first if an expert has a capacity. Default: [`Priority::Rank`].
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Builds a `Moe` of these experts with an initial router: weights uniform in ±1/√`query_dim` as in
    /// PyTorch's `nn.Linear`, bias zero, and noise weight zero as in Shazeer et al.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no experts, `k` is not between 1 and their number,
    /// `query_dim` is 0, the capacity factor is not a positive number, or the capacity is 0;
    /// [`Error::TooLarge`].
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

    /// Builds a `Moe` of these experts with given parameters and buffers for the router and the experts
    /// (see [`Moe`]).
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

    /// Validates the configuration and allocates the router as zeros.
    fn zeros<F: Float>(&self, experts: Vec<Box<dyn Attention<F>>>) -> Result<Moe<F>> {
        let num_experts = experts.len();
        self.check(num_experts)?;
        if self.query_dim == 0 {
            return Err(Error::config("query_dim", "at least 1", self.query_dim));
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

    /// Checks the settings that a [`Routing`](super::Routing) among `num_experts` experts reads.
    pub(super) fn check(&self, num_experts: usize) -> Result<()> {
        if num_experts == 0 {
            return Err(Error::config("experts", "at least 1", num_experts));
        }
        if !(1..=num_experts).contains(&self.k) {
            let expected = format!("between 1 and {num_experts}, the number of experts");
            return Err(Error::config("k", expected, self.k));
        }
        if let Some(factor) = self.capacity_factor.filter(|&f| !(f > 0.0 && f.is_finite())) {
            return Err(Error::config("capacity_factor", "a positive number", factor));
        }
        if self.capacity == Some(0) {
            return Err(Error::config("capacity", "at least 1", 0));
        }
        Ok(())
    }

    /// Returns how many of `num_queries` queries an expert takes.
    pub(super) fn capacity_of(&self, num_queries: usize, num_experts: usize) -> usize {
        let by_factor = self.capacity_factor.map_or(usize::MAX, |factor| {
            (factor * (self.k * num_queries) as f64 / num_experts as f64).ceil() as usize
        });
        by_factor.min(self.capacity.unwrap_or(usize::MAX))
    }
}

//! The assignment of queries to experts, with weights.

use super::config::{Gating, MoeConfig, Priority};
use crate::element::{sigmoid, softplus, try_vec, try_zeros};
use crate::error::{Result, check_shape};
use crate::kernels::Float;
use crate::prefetch::prefetch;
use crate::softmax::{log_sum_exp, softmax, softmax_vjp};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, Zip};

/// The experts that a [`Moe`](super::Moe) chose for each query, returned by
/// [`Moe::route`](super::Moe::route) or, for a forward pass, by [`Moe::routing`](super::Moe::routing). It
/// holds choices, weights and statistics, and computes the losses that balance the experts.
///
/// Losses are returned with their gradient with respect to the [`logits`](Self::logits), which you pass
/// to [`Moe::router_backward`](super::Moe::router_backward).
///
/// For your own router, make a `Routing` from its logits with [`from_logits`](Self::from_logits), and get
/// their gradient from [`weights_vjp`](Self::weights_vjp).
#[derive(Clone, Debug, PartialEq)]
pub struct Routing<F> {
    pub(super) gating: Gating,
    pub(super) renormalize: bool,
    /// n × N.
    pub(super) logits: Array2<F>,
    /// dz/du of the noise ε softplus(u) in the logits: n × N.
    pub(super) noise_slopes: Option<Array2<F>>,
    /// n × N.
    pub(super) probabilities: Array2<F>,
    /// n × k.
    pub(super) experts: Array2<usize>,
    /// n × k.
    pub(super) weights: Array2<F>,
    /// For each expert.
    pub(super) served: Vec<Served>,
}

/// The queries that an expert takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Served {
    /// Ascending.
    pub(super) queries: Vec<usize>,
    /// The column of the expert in the n × k arrays, for each query.
    pub(super) ranks: Vec<usize>,
}

impl Served {
    /// Creates it from (query, rank) pairs in any order.
    fn from_places(mut places: Vec<(usize, usize)>) -> Self {
        places.sort_unstable();
        let (queries, ranks) = places.into_iter().unzip();
        Self { queries, ranks }
    }

    /// Prefetches the row of a query that will soon be processed: the rows are not contiguous, so the CPU
    /// cannot predict the next one.
    pub(super) fn ask_ahead<F: Float>(&self, at: usize, rows: ArrayView2<'_, F>) {
        const AHEAD: usize = 12;
        if let Some(&query) = self.queries.get(at + AHEAD) {
            rows.row(query).to_slice().into_iter().for_each(prefetch);
        }
    }
}

impl<F: Float> Routing<F> {
    /// Computes the routing for the given logits (num_queries × num_experts), with the gates, choice,
    /// weights and capacity of a [`Moe`](super::Moe) with this configuration. `expert_bias` (num_experts)
    /// only affects the choice; `None` means zeros. The configuration's `query_dim` and noise are not
    /// used.
    ///
    /// ```
    /// use graph_attention::ndarray::array;
    /// use graph_attention::{MoeConfig, moe::{Gating, Routing}};
    ///
    /// // Gates as in DeepSeek-V3: σ(z) of the best two of four experts, divided by their sum.
    /// let config = MoeConfig::new(1, 2).gating(Gating::Sigmoid);
    /// let logits = array![[0.0, 1.0, -2.0, 3.0], [0.0, 0.0, 0.0, -1.0]];
    /// let routing = Routing::from_logits(&config, logits, None)?;
    /// assert_eq!(routing.experts(), array![[3, 1], [0, 1]]);
    /// assert_eq!(routing.queries(1), [0, 1]);
    /// assert_eq!(routing.weights().row(1), array![0.5, 0.5]);
    ///
    /// // The gradient of a loss with respect to the weights; here the loss is the sum of their first column.
    /// let grad_logits = routing.weights_vjp(array![[1.0, 0.0], [1.0, 0.0]].view())?;
    /// assert_eq!(grad_logits.row(1), array![0.125, -0.125, 0.0, 0.0]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there are no experts, `k` is not
    /// between 1 and their number, the capacity is invalid or a bias is not finite;
    /// [`Error::Shape`](crate::Error::Shape) if there is not one bias per expert;
    /// [`Error::TooLarge`](crate::Error::TooLarge).
    pub fn from_logits(
        config: &MoeConfig,
        logits: Array2<F>,
        expert_bias: Option<ArrayView1<'_, F>>,
    ) -> Result<Self> {
        let num_experts = logits.ncols();
        config.check(num_experts)?;
        let zeros = try_vec("expert_bias", &[num_experts], F::zero())?;
        let bias = expert_bias.unwrap_or_else(|| ArrayView1::from(&zeros));
        super::check_expert_bias(num_experts, bias)?;
        Self::new(config, logits, None, bias)
    }

    /// [`from_logits`](Self::from_logits) for checked arguments.
    pub(super) fn new(
        config: &MoeConfig,
        logits: Array2<F>,
        noise_slopes: Option<Array2<F>>,
        expert_bias: ArrayView1<'_, F>,
    ) -> Result<Self> {
        let (num_queries, num_experts) = logits.dim();
        let MoeConfig { k, gating, renormalize, .. } = *config;
        let mut probabilities = try_zeros("probabilities", num_queries, num_experts)?;
        let experts = try_vec("experts", &[num_queries, k], 0)?;
        let mut experts = Array2::from_shape_vec((num_queries, k), experts).expect("its length");
        let mut weights = try_zeros("weights", num_queries, k)?;
        let mut scores = vec![F::zero(); num_experts];
        for (query, logits) in logits.rows().into_iter().enumerate() {
            let mut probabilities = probabilities.row_mut(query);
            Zip::from(&mut probabilities).and(logits).for_each(|p, &z| *p = gating.log(z));
            softmax(probabilities.view_mut());
            let gate = |expert: usize| match gating {
                Gating::Softmax => probabilities[expert],
                Gating::Sigmoid => sigmoid(logits[expert]),
            };
            let (mut chosen, mut weights) = (experts.row_mut(query), weights.row_mut(query));
            if probabilities[0].is_nan() {
                chosen.iter_mut().zip(0..).for_each(|(chosen, expert)| *chosen = expert);
                weights.fill(F::nan());
                continue;
            }
            for (expert, score) in scores.iter_mut().enumerate() {
                let is_out = logits[expert] == F::neg_infinity();
                *score =
                    if is_out { F::neg_infinity() } else { gate(expert) + expert_bias[expert] };
            }
            // Gates too small or too close to 1 to differ are compared by their logits.
            let is_larger = |a: usize, b: usize| {
                let by_logit = logits[a] > logits[b];
                if expert_bias[a] == expert_bias[b] {
                    by_logit
                } else {
                    scores[a] > scores[b] || scores[a] == scores[b] && by_logit
                }
            };
            best(num_experts, is_larger, chosen.view_mut());
            Zip::from(&mut weights).and(&chosen).for_each(|weight, &expert| {
                *weight = if renormalize { gating.log(logits[expert]) } else { gate(expert) };
            });
            if renormalize {
                // Also correct if all of the gates underflow.
                softmax(weights.view_mut());
            }
        }
        let served = serve(config, logits.view(), experts.view());
        Ok(Self {
            gating,
            renormalize,
            logits,
            noise_slopes,
            probabilities,
            experts,
            weights,
            served,
        })
    }

    /// Returns the logits z, num_queries × num_experts, including noise.
    #[must_use]
    pub fn logits(&self) -> ArrayView2<'_, F> {
        self.logits.view()
    }

    /// Returns the gates divided by their sum over all experts, num_queries × num_experts: softmax(z), or
    /// σ(z) / Σ σ(z).
    #[must_use]
    pub fn probabilities(&self) -> ArrayView2<'_, F> {
        self.probabilities.view()
    }

    /// Returns the chosen experts of each query, num_queries × k, first choice first.
    #[must_use]
    pub fn experts(&self) -> ArrayView2<'_, usize> {
        self.experts.view()
    }

    /// Returns the weights of the [`experts`](Self::experts), num_queries × k, including those of full
    /// experts that dropped the query.
    #[must_use]
    pub fn weights(&self) -> ArrayView2<'_, F> {
        self.weights.view()
    }

    /// Returns the queries that an expert processes, ascending: those that chose it, up to its capacity.
    /// Empty for an expert that does not exist.
    #[must_use]
    pub fn queries(&self, expert: usize) -> &[usize] {
        self.served.get(expert).map_or(&[], |served| &served.queries)
    }

    /// Returns the share f of the choices for each expert. The shares sum to 1, and each is 1/N if the
    /// experts are balanced. Zeros if there are no queries. Dropped choices count.
    #[must_use]
    pub fn shares(&self) -> Vec<f64> {
        let total = self.experts.len().max(1) as f64;
        self.choices().into_iter().map(|count| count as f64 / total).collect()
    }

    /// Returns how many queries chose each expert.
    pub(super) fn choices(&self) -> Vec<usize> {
        let mut counts = vec![0; self.served.len()];
        self.experts.iter().for_each(|&expert| counts[expert] += 1);
        counts
    }

    /// Returns the mean over the queries of the entropy of their [`probabilities`](Self::probabilities),
    /// in nats: 0 if the router is certain, ln N if it is indifferent. 0 without queries.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        let terms = self.probabilities.iter().map(|p| p.as_f64());
        // 0 ln 0 = 0, and NaN stays.
        let sum: f64 = terms.map(|p| if p == 0.0 { 0.0 } else { -p * p.ln() }).sum();
        sum / self.logits.nrows().max(1) as f64
    }

    /// Returns how many of the k · num_queries choices were dropped by a full expert.
    #[must_use]
    pub fn num_dropped(&self) -> usize {
        self.experts.len() - self.served.iter().map(|served| served.queries.len()).sum::<usize>()
    }

    /// Iterates over the queries that an expert processes and the weights of its outputs.
    pub(super) fn weights_of<'s>(
        &'s self,
        served: &'s Served,
    ) -> impl Iterator<Item = (usize, F)> + 's {
        let places = served.queries.iter().zip(&served.ranks);
        places.map(|(&query, &rank)| (query, self.weights[[query, rank]]))
    }

    /// Computes the vector–Jacobian product of the [`weights`](Self::weights): turns their gradient
    /// (num_queries × k) into the gradient of the [`logits`](Self::logits) (num_queries × num_experts),
    /// with the choice held constant. For the weight of a dropped query pass the gradient 0, unless
    /// something else uses that weight.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::TooLarge`](crate::Error::TooLarge).
    pub fn weights_vjp(&self, grad_weights: ArrayView2<'_, F>) -> Result<Array2<F>> {
        check_shape("grad_weights", self.weights.shape(), grad_weights.shape())?;
        let (num_queries, num_experts) = self.logits.dim();
        let mut grad_logits = try_zeros("grad_logits", num_queries, num_experts)?;
        for (query, mut grad) in grad_logits.rows_mut().into_iter().enumerate() {
            let (chosen, weights) = (self.experts.row(query), self.weights.row(query));
            let mut of_weights = grad_weights.row(query).to_owned();
            // w = softmax over the chosen, softmax over all, or σ
            if self.renormalize {
                softmax_vjp(weights, of_weights.view_mut());
            } else if self.gating == Gating::Sigmoid {
                of_weights *= &weights;
            }
            Zip::from(&chosen).and(&of_weights).for_each(|&expert, &of| grad[expert] = of);
            if !self.renormalize && self.gating == Gating::Softmax {
                softmax_vjp(self.probabilities.row(query), grad);
            }
        }
        self.log_gates_vjp(&mut grad_logits);
        Ok(grad_logits)
    }

    /// Turns the gradient of the logarithms of the gates, up to a constant per query, into the gradient
    /// of the logits.
    pub(super) fn log_gates_vjp(&self, grad: &mut Array2<F>) {
        if self.gating == Gating::Sigmoid {
            // d ln σ(z) = σ(−z) dz
            grad.zip_mut_with(&self.logits, |grad, &z| *grad *= sigmoid(-z));
        }
    }
}

impl Gating {
    /// Returns ln g/(1 − g), which grows with the gate g of an expert and is unbounded.
    fn log_odds<F: Float>(self, logits: ArrayView1<'_, F>, expert: usize) -> f64 {
        let z = logits[expert].as_f64();
        match self {
            Self::Softmax => {
                let others = logits.iter().enumerate().filter(|&(other, _)| other != expert);
                z - log_sum_exp(others.map(|(_, z)| z.as_f64()))
            }
            Self::Sigmoid => z,
        }
    }

    /// Returns the logarithm of a gate, up to a constant per query.
    fn log<F: Float>(self, z: F) -> F {
        match self {
            Self::Softmax => z,
            // ln σ(z)
            Self::Sigmoid => -softplus(-z),
        }
    }
}

/// Chooses the experts with the largest values, largest first; ties go to the lower number.
fn best(
    num_experts: usize,
    is_larger: impl Fn(usize, usize) -> bool,
    mut chosen: ArrayViewMut1<'_, usize>,
) {
    for rank in 0..chosen.len() {
        let (taken, mut rest) = chosen.view_mut().split_at(Axis(0), rank);
        let free = (0..num_experts).filter(|expert| !taken.iter().any(|taken| taken == expert));
        let larger = |best: usize, next| if is_larger(next, best) { next } else { best };
        rest[0] = free.reduce(larger).expect("no more are chosen than there are");
    }
}

/// Returns the queries that each expert takes.
fn serve<F: Float>(
    config: &MoeConfig,
    logits: ArrayView2<'_, F>,
    experts: ArrayView2<'_, usize>,
) -> Vec<Served> {
    let (num_queries, num_experts) = logits.dim();
    let k = config.k;
    let capacity = config.capacity_of(num_queries, num_experts);
    let mut places = vec![Vec::new(); num_experts];
    let mut take = |query: usize, rank: usize| {
        let places = &mut places[experts[[query, rank]]];
        if places.len() < capacity {
            places.push((query, rank));
        }
    };
    // Without a limit the order makes no difference.
    let priority = if capacity < num_queries { config.priority } else { Priority::Query };
    match priority {
        Priority::Query => {
            (0..num_queries).for_each(|query| (0..k).for_each(|rank| take(query, rank)));
        }
        Priority::Rank => {
            (0..k).for_each(|rank| (0..num_queries).for_each(|query| take(query, rank)));
        }
        Priority::Gate => {
            for rank in 0..k {
                let gate = |query| {
                    let odds = config.gating.log_odds(logits.row(query), experts[[query, rank]]);
                    // NaN comes last.
                    if odds.is_nan() { f64::NEG_INFINITY } else { odds }
                };
                let mut queries: Vec<(f64, usize)> =
                    (0..num_queries).map(|query| (gate(query), query)).collect();
                queries.sort_by(|(a, _), (b, _)| b.total_cmp(a));
                queries.into_iter().for_each(|(_, query)| take(query, rank));
            }
        }
    }
    places.into_iter().map(Served::from_places).collect()
}

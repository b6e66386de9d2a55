//! Which query goes to which expert, and with what weight.

use super::MoeConfig;
use crate::error::Result;
use crate::float::{Float, nan_max, try_vec, try_zeros};
use crate::kernels::prefetch::prefetch;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, Zip};

/// Where a [`Moe`](super::Moe) sends the queries: from [`Moe::route`](super::Moe::route), or
/// from the [`Moe::routing`](super::Moe::routing) of a forward pass. Holds what was decided, reports
/// on it, and has the losses that keep the experts busy.
///
/// Losses come with their gradient with respect to the [`logits`](Self::logits), which
/// [`Moe::router_backward`](super::Moe::router_backward) carries on; see there.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing<F> {
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
    /// The column of n × k arrays in which the expert stands for each of them.
    pub(super) ranks: Vec<usize>,
}

impl Served {
    /// Asks the CPU for the row of a query that will soon be worked on: they lie apart, so that it
    /// does not guess which comes next.
    pub(super) fn ask_ahead<F: Float>(&self, at: usize, rows: ArrayView2<'_, F>) {
        const AHEAD: usize = 12;
        if let Some(&query) = self.queries.get(at + AHEAD) {
            rows.row(query).to_slice().into_iter().for_each(prefetch);
        }
    }
}

impl<F: Float> Routing<F> {
    /// Chooses by probability + bias, and weighs by probability alone.
    pub(super) fn new(
        config: &MoeConfig,
        logits: Array2<F>,
        noise_slopes: Option<Array2<F>>,
        expert_bias: &Array1<F>,
    ) -> Result<Self> {
        let (num_queries, num_experts) = logits.dim();
        let k = config.k;
        let mut probabilities = try_zeros("probabilities", num_queries, num_experts)?;
        probabilities.assign(&logits);
        probabilities.rows_mut().into_iter().for_each(softmax);

        let experts = try_vec("experts", &[num_queries, k], 0)?;
        let mut experts = Array2::from_shape_vec((num_queries, k), experts).expect("its length");
        let mut weights = try_zeros("weights", num_queries, k)?;
        let mut scores = vec![F::zero(); num_experts];
        for query in 0..num_queries {
            for (score, (&p, &bias)) in
                scores.iter_mut().zip(probabilities.row(query).iter().zip(expert_bias))
            {
                *score = p + bias;
            }
            let mut chosen = experts.row_mut(query);
            best(&scores, chosen.view_mut());
            let mut weights = weights.row_mut(query);
            let source = if config.renormalize { &logits } else { &probabilities };
            Zip::from(&mut weights).and(&chosen).for_each(|w, &e| *w = source[[query, e]]);
            if config.renormalize {
                // p_e / Σ p over the chosen, also where all of these are too small for a number.
                softmax(weights.view_mut());
            }
            if probabilities[[query, 0]].is_nan() {
                // As the probabilities are, though the logits of the chosen may be numbers.
                weights.fill(F::nan());
            }
        }

        let capacity = config.capacity_factor.map_or(usize::MAX, |factor| {
            (factor * (k * num_queries) as f64 / num_experts as f64).ceil() as usize
        });
        let mut served = vec![Served::default(); num_experts];
        for ((query, rank), &expert) in experts.indexed_iter() {
            let Served { queries, ranks } = &mut served[expert];
            if queries.len() < capacity {
                queries.push(query);
                ranks.push(rank);
            }
        }
        let renormalize = config.renormalize;
        Ok(Self { renormalize, logits, noise_slopes, probabilities, experts, weights, served })
    }

    /// z, num_queries × num_experts, noise included.
    #[must_use]
    pub fn logits(&self) -> ArrayView2<'_, F> {
        self.logits.view()
    }

    /// softmax(z), num_queries × num_experts.
    #[must_use]
    pub fn probabilities(&self) -> ArrayView2<'_, F> {
        self.probabilities.view()
    }

    /// The chosen experts of each query, num_queries × k, the first choice first.
    #[must_use]
    pub fn experts(&self) -> ArrayView2<'_, usize> {
        self.experts.view()
    }

    /// The weights of the [`experts`](Self::experts), num_queries × k, including those of experts that
    /// were full and dropped the query.
    #[must_use]
    pub fn weights(&self) -> ArrayView2<'_, F> {
        self.weights.view()
    }

    /// The queries that an expert works on, ascending: those that chose it, up to its capacity.
    /// Empty for an expert that does not exist.
    #[must_use]
    pub fn queries(&self, expert: usize) -> &[usize] {
        self.served.get(expert).map_or(&[], |served| &served.queries)
    }

    /// The share f of the choices that falls on each expert: they sum to 1, and each is 1/N if the
    /// experts are balanced. Zeros if there are no queries. Choices that are dropped count.
    #[must_use]
    pub fn shares(&self) -> Vec<f64> {
        let total = self.experts.len().max(1) as f64;
        self.choices().into_iter().map(|count| count as f64 / total).collect()
    }

    /// How many queries chose each expert.
    pub(super) fn choices(&self) -> Vec<usize> {
        let mut counts = vec![0; self.served.len()];
        self.experts.iter().for_each(|&expert| counts[expert] += 1);
        counts
    }

    /// The mean over the queries of the entropy of their [`probabilities`](Self::probabilities), in
    /// nats: 0 where the router is certain, ln N where it does not care. 0 without queries.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        let terms = self.probabilities.iter().map(|p| p.as_f64());
        // 0 ln 0 = 0, and NaN stays.
        let sum: f64 = terms.map(|p| if p == 0.0 { 0.0 } else { -p * p.ln() }).sum();
        sum / self.logits.nrows().max(1) as f64
    }

    /// How many choices, of k · num_queries, found an expert full.
    #[must_use]
    pub fn num_dropped(&self) -> usize {
        self.experts.len() - self.served.iter().map(|served| served.queries.len()).sum::<usize>()
    }

    /// The queries that an expert works on and the weights of its answers.
    pub(super) fn weights_of<'s>(
        &'s self,
        served: &'s Served,
    ) -> impl Iterator<Item = (usize, F)> + 's {
        let places = served.queries.iter().zip(&served.ranks);
        places.map(|(&query, &rank)| (query, self.weights[[query, rank]]))
    }

    /// The gradient of the logits from that of the weights, with the choice held constant.
    pub(super) fn weights_vjp(&self, grad_weights: ArrayView2<'_, F>) -> Result<Array2<F>> {
        let (num_queries, num_experts) = self.logits.dim();
        let mut grad_logits = try_zeros("grad_logits", num_queries, num_experts)?;
        for (query, mut grad) in grad_logits.rows_mut().into_iter().enumerate() {
            let (weights, grad_weights) = (self.weights.row(query), grad_weights.row(query));
            let chosen = self.experts.row(query);
            // w = softmax over the chosen, or over all: dz = w (dw − Σ w dw)
            let products = weights.iter().zip(&grad_weights).map(|(&w, &dw)| w * dw);
            let mean = products.sum::<F>();
            if !self.renormalize {
                Zip::from(&mut grad)
                    .and(&self.probabilities.row(query))
                    .for_each(|grad, &p| *grad = -p * mean);
            }
            for ((&expert, &w), &dw) in chosen.iter().zip(&weights).zip(&grad_weights) {
                grad[expert] += if self.renormalize { w * (dw - mean) } else { w * dw };
            }
        }
        Ok(grad_logits)
    }
}

/// softmax(z) in place of z; NaN throughout if one of them is.
fn softmax<F: Float>(mut row: ArrayViewMut1<'_, F>) {
    let max = row.iter().copied().fold(F::neg_infinity(), nan_max);
    row.mapv_inplace(|z| (z - max).exp());
    let sum = row.sum();
    row.mapv_inplace(|p| p / sum);
}

/// The largest scores, the largest first and ties to the lower number. NaN is not larger than
/// anything: where all are, the first are taken.
fn best<F: Float>(scores: &[F], mut chosen: ArrayViewMut1<'_, usize>) {
    for rank in 0..chosen.len() {
        let (taken, mut rest) = chosen.view_mut().split_at(ndarray::Axis(0), rank);
        let free = (0..scores.len()).filter(|expert| !taken.iter().any(|taken| taken == expert));
        let larger = |best: usize, next| if scores[next] > scores[best] { next } else { best };
        rest[0] = free.reduce(larger).expect("no more are chosen than there are");
    }
}

//! Losses that balance the experts and keep the logits small.

use super::Routing;
use crate::element::try_zeros;
use crate::error::Result;
use crate::kernels::Float;
use crate::softmax::{log_sum_exp, softmax_vjp};
use ndarray::{Array1, Array2, Axis, Zip};

impl<F: Float> Routing<F> {
    /// Returns the load-balancing loss of the Switch Transformer (Fedus et al. 2021, 2101.03961) and its
    /// gradient with respect to the logits.
    ///
    /// ```text
    /// L = N Σ_e f_e P_e    f_e: the share of choices for expert e (held constant),
    ///                      P_e: the mean over the queries of its probability
    /// ```
    ///
    /// With sigmoid gates the [`probabilities`](Self::probabilities) are gates divided by their sum, and
    /// this is the complementary loss of DeepSeek-V3 (2412.19437), with all queries as one sequence.
    ///
    /// The loss is 1 if the experts are balanced, and up to N if one gets all queries. This also holds
    /// for k > 1, because f counts all k choices of a query. It is 0 without queries.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if the gradient does not fit in memory.
    pub fn switch_load_balance(&self) -> Result<(F, Array2<F>)> {
        let (num_queries, num_experts) = self.logits.dim();
        let factor = num_experts as f64 / num_queries.max(1) as f64;
        let shares = Array1::from(self.shares()).mapv(|share| F::from_f64(factor * share));
        let mut grad_logits = try_zeros("grad_logits", num_queries, num_experts)?;
        let mut value = 0.0;
        for (p, mut grad) in self.probabilities.rows().into_iter().zip(grad_logits.rows_mut()) {
            // L = Σ p · s
            value += p.dot(&shares).as_f64();
            grad.assign(&shares);
            softmax_vjp(p, grad);
        }
        self.log_gates_vjp(&mut grad_logits);
        Ok((F::from_f64(value), grad_logits))
    }

    /// Returns the importance loss of Shazeer et al. 2017 (1701.06538) and its gradient with respect to
    /// the logits.
    ///
    /// ```text
    /// L = CV(I)² = variance of I_e over experts / (mean of I_e)²    I_e = Σ_i w_ie
    /// ```
    ///
    /// w are the weights of the chosen experts, renormalised if configured (and before any are dropped);
    /// the variance is the population variance. The loss is 0 if the experts are balanced, and up to N −
    /// 1 if one gets all queries. It is 0 without queries.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if the gradient does not fit in memory.
    pub fn importance_cv2(&self) -> Result<(F, Array2<F>)> {
        let (num_queries, num_experts) = self.logits.dim();
        if num_queries == 0 {
            return Ok((F::zero(), try_zeros("grad_logits", 0, num_experts)?));
        }
        let mut importance = Array1::<f64>::zeros(num_experts);
        Zip::from(&self.experts)
            .and(&self.weights)
            .for_each(|&expert, weight| importance[expert] += weight.as_f64());
        let count = num_experts as f64;
        let mean = importance.sum() / count;
        let variance = importance.iter().map(|i| (i - mean).powi(2)).sum::<f64>() / count;
        // L = V/μ², dV/dI_e = 2 (I_e − μ)/N, dμ/dI_e = 1/N
        let grad = |i: f64| 2.0 / (count * mean * mean) * (i - mean - variance / mean);
        let grad_weights = self.experts.mapv(|expert| F::from_f64(grad(importance[expert])));
        Ok((F::from_f64(variance / (mean * mean)), self.weights_vjp(grad_weights.view())?))
    }

    /// Returns the z-loss of ST-MoE (Zoph et al. 2022, 2202.08906), which keeps the logits small, and its
    /// gradient with respect to them.
    ///
    /// ```text
    /// L = mean over the queries of (ln Σ_e exp z_ie)²
    /// ```
    ///
    /// It is 0 without queries.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if the gradient does not fit in memory.
    pub fn z_loss(&self) -> Result<(F, Array2<F>)> {
        let (num_queries, num_experts) = self.logits.dim();
        let factor = 1.0 / num_queries.max(1) as f64;
        let mut grad_logits = try_zeros("grad_logits", num_queries, num_experts)?;
        let mut value = 0.0;
        for (query, mut grad) in grad_logits.axis_iter_mut(Axis(0)).enumerate() {
            let z = self.logits.row(query);
            let log_sum = log_sum_exp(z.iter().map(|z| z.as_f64()));
            value += factor * log_sum * log_sum;
            let slope = 2.0 * factor * log_sum;
            Zip::from(&mut grad).and(&z).for_each(|grad, &z| {
                *grad = F::from_f64(slope * (z.as_f64() - log_sum).exp());
            });
        }
        Ok((F::from_f64(value), grad_logits))
    }
}

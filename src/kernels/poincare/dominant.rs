//! The pair that has nearly all weight of a query.
//!
//! The gradients of a query's logits, p (dp − δ), sum to zero. For a pair with nearly all weight, dp and
//! δ are nearly equal, so the rounding error of their difference may exceed it; minus the sum of the
//! other gradients is accurate. So this pair is left out until all pairs of its query have been seen.

use super::{HyperbolicProblem, Radius};
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;

/// The smallest weight of a dominant pair. It exceeds a half by enough that two pairs cannot both have
/// it, however weights are rounded; for a pair with less weight the difference is accurate to a few ulps.
pub(crate) const DOMINANT: f64 = 0.75;

/// The gradients that follow from the gradient of one logit.
pub(crate) struct OfLogit<F> {
    /// Multiplied by (sinh R/2) u of the key, it is added to the gradient of the query's direction;
    /// multiplied by that of the query, to the gradient of the key's direction.
    pub(crate) direction: F,
    /// The gradients of the radii.
    pub(crate) query: F,
    pub(crate) key: F,
    pub(crate) kappa: F,
}

/// The distance of one pair, in `f64`.
pub(crate) struct PairDistance {
    query: Radius<f64>,
    key: Radius<f64>,
    /// |u_q − u_k|²
    squared: f64,
    /// sinh((R_q − R_k)/2) and sinh(d/2)
    radial: f64,
    sinh: f64,
}

impl PairDistance {
    pub(crate) fn new<F: Float>(
        problem: &HyperbolicProblem<'_, F>,
        pair: Pair,
        head: usize,
    ) -> Self {
        let softmax = &problem.softmax;
        let columns = |head: usize| head_columns(head, softmax.key_dim);
        let u = &softmax.query.slices().row(pair.query)[columns(head)];
        let v = &softmax.key.slices().row(pair.key)[columns(softmax.kv_head(head))];
        let squared = u.iter().zip(v).map(|(&u, &v)| (u.as_f64() - v.as_f64()).powi(2)).sum();
        let wide = |radius: Radius<F>| Radius::of(radius.array().map(F::as_f64));
        let query = wide(problem.query(pair.query, head));
        let key = wide(problem.key[problem.key_at(pair.key, head)]);
        let radial = (query.expm1 - key.expm1) * (query.half_inverse + key.half_inverse);
        let sinh = radial.hypot(f64::sqrt(squared) * query.root * key.root);
        Self { query, key, squared, radial, sinh }
    }

    /// Returns d/2; the logit is −κ d/2.
    pub(crate) fn half(&self) -> f64 {
        self.sinh.asinh()
    }

    /// As in the vectors of pairs, for a given gradient of the logit.
    pub(crate) fn vjp<F: Float>(&self, kappa: F, grad_logit: f64) -> OfLogit<F> {
        let Self { query, key, squared, radial, sinh } = *self;
        let radial_cosh =
            (query.expm1 + 1.0) * key.half_inverse + (key.expm1 + 1.0) * query.half_inverse;
        let is_same = sinh < (F::min_positive_value() / F::epsilon()).as_f64();
        let coefficient = match is_same {
            true => 0.0,
            false => -0.5 * kappa.as_f64() * grad_logit / sinh / sinh.hypot(1.0),
        };
        let along = radial * radial_cosh;
        let of_query = squared * query.half_cosh * key.half_sinh + along;
        let of_key = squared * key.half_cosh * query.half_sinh - along;
        OfLogit {
            direction: F::from_f64(-2.0 * coefficient),
            query: F::from_f64(coefficient * of_query),
            key: F::from_f64(coefficient * of_key),
            kappa: F::from_f64(-grad_logit * self.half()),
        }
    }
}

/// Adds a multiple of a point to the gradient of a direction.
pub(crate) fn add_point<F: Float>(grad: &mut [F], factor: F, point: &[F]) {
    grad.iter_mut().zip(point).for_each(|(grad, &u)| *grad += factor * u);
}

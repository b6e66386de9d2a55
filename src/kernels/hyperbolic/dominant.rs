//! The pair that has nearly all of a query's weight.
//!
//! The gradients of a query's logits, p (dp − δ), sum to zero. Of a pair with nearly all weight dp and
//! δ are nearly the same, so that their difference is rounded by more than it is; minus the sum of the
//! other gradients is what it should have been. So this one pair is left out until all pairs of its query
//! have been seen.

use super::HyperbolicProblem;
use crate::float::Float;
use crate::inputs::{Pair, head_columns};

/// The weight from which on a pair is this one. More than a half by so much that two pairs cannot both
/// have it, however weights are rounded; and of a pair with less the difference is right to some ulps.
pub(super) const DOMINANT: f64 = 0.75;

/// What follows from the gradient of one logit.
pub(super) struct OfLogit<F> {
    /// Times (sinh R/2) u of the key it is added to the gradient of the query's direction, times that of
    /// the query to the key's.
    pub(super) direction: F,
    /// The gradients of the radii.
    pub(super) query: F,
    pub(super) key: F,
    pub(super) kappa: F,
}

impl<F: Float> OfLogit<F> {
    pub(super) fn new(
        problem: &HyperbolicProblem<'_, F>,
        pair: Pair,
        head: usize,
        grad_logit: F,
    ) -> Self {
        let softmax = &problem.softmax;
        let direction =
            |row: &'_ [F], head: usize| row[head_columns(head, softmax.key_dim)].to_vec();
        let u = direction(softmax.query.slices().row(pair.query), head);
        let v = direction(softmax.key.slices().row(pair.key), softmax.kv_head(head));
        let squared: f64 = u.iter().zip(v).map(|(&u, v)| (u.as_f64() - v.as_f64()).powi(2)).sum();
        let query = problem.query(pair.query, head).array().map(Float::as_f64);
        let key = problem.key[problem.key_at(pair.key, head)].array().map(Float::as_f64);
        let [
            [expm1, half_inverse, half_sinh, _, half_cosh],
            [key_expm1, key_half_inverse, key_half_sinh, _, key_half_cosh],
        ] = [query, key];
        // As in the vectors of pairs, but for the gradient of the logit.
        let radial = (expm1 - key_expm1) * (half_inverse + key_half_inverse);
        let radial_cosh = (expm1 + 1.0) * key_half_inverse + (key_expm1 + 1.0) * half_inverse;
        let sinh = radial.hypot((squared * half_sinh).sqrt() * key_half_sinh.sqrt());
        let (kappa, grad_logit) = (problem.kappa.as_f64(), grad_logit.as_f64());
        let is_same = sinh < (F::min_positive_value() / F::epsilon()).as_f64();
        let coefficient = match is_same {
            true => 0.0,
            false => -0.5 * kappa * grad_logit / sinh / sinh.hypot(1.0),
        };
        let along = radial * radial_cosh;
        Self {
            direction: F::of(-2.0 * coefficient),
            query: F::of(coefficient * (squared * half_cosh * key_half_sinh + along)),
            key: F::of(coefficient * (squared * key_half_cosh * half_sinh - along)),
            kappa: F::of(-grad_logit * sinh.asinh()),
        }
    }
}

/// Adds a multiple of a point to the gradient of a direction.
pub(super) fn add_point<F: Float>(grad: &mut [F], factor: F, point: &[F]) {
    grad.iter_mut().zip(point).for_each(|(grad, &u)| *grad += factor * u);
}

//! Midpoints far from the origin, computed pair by pair from differences to one of their values.
//!
//! Rounding the direction of a midpoint at distance R moves the midpoint by e^R times the rounding error,
//! and its gradient by e^{2R} times the error. If one value has most of the mass, however, neither is
//! sensitive: the midpoint is close to that value, whatever its direction is. The directions of values
//! and midpoint are therefore represented by their differences from the direction r of the value with the
//! largest mass:
//!
//! ```text
//! a = Σ p̃ sinh R (u − r),  b = Σ p̃ sinh R |u − r|²/2,  M = Σ p̃ sinh R,  S = M r + a
//! |S| − M = (|a|² − 2 M b)/(|S| + M)
//! T − |S| = Σ p̃ e^{−R} + b − (|a|² − b²)/(|S| + M − b)
//! û − r = (a + (M − |S|) r)/|S|
//! ```

use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::poincare::{
    DOMINANT, HyperbolicProblem, OfLogit, PairDistance, PointGradients, Points, add_point,
};
use ndarray::{ArrayViewMut3, s};

/// A query and head: its visible pairs and their midpoint.
pub(super) struct DeepRow {
    query: usize,
    head: usize,
    pairs: Vec<DeepPair>,
    /// û, and r.
    pub(super) direction: Vec<f64>,
    /// û − r.
    offset: Vec<f64>,
    reference: Vec<f64>,
    /// |S|, and T − |S|.
    pub(super) norm: f64,
    pub(super) gap: f64,
}

struct DeepPair {
    pair: Pair,
    distance: PairDistance,
    /// The weight, before and after dropout.
    weight: f64,
    kept: f64,
    multiplier: f64,
    /// R and sinh R of the value.
    radius: f64,
    sinh: f64,
}

impl DeepRow {
    pub(super) fn new<F: Float>(
        problem: &HyperbolicProblem<'_, F>,
        query: usize,
        head: usize,
    ) -> Self {
        let softmax = &problem.softmax;
        let bias = |pair: Pair| softmax.bias.map_or(F::zero(), |bias| bias.at(pair, head));
        let kappa = problem.kappa.as_f64();
        let mut logits = Vec::new();
        let mut pairs = Vec::new();
        for pair in softmax.inputs.row(query) {
            if bias(pair) == F::neg_infinity() {
                continue;
            }
            let distance = PairDistance::new(problem, pair, head);
            logits.push(bias(pair).as_f64() - kappa * distance.half());
            let mass = &problem.masses[problem.key_at(pair.key, head)];
            let radius = 2.0 * mass.expm1.as_f64().ln_1p();
            let multiplier = softmax.multiplier(pair, head).as_f64();
            let (weight, kept) = (0.0, 0.0);
            let sinh = mass.sinh.as_f64();
            pairs.push(DeepPair { pair, distance, weight, kept, multiplier, radius, sinh });
        }
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
        for (pair, logit) in pairs.iter_mut().zip(&logits) {
            pair.weight = (logit - max).exp() / total;
            pair.kept = pair.weight * pair.multiplier;
        }

        let mass = |pair: &DeepPair| pair.kept * pair.sinh;
        let heaviest = (pairs.iter()).max_by(|a, b| mass(a).total_cmp(&mass(b)));
        let direction = |pair: &DeepPair| of_value(problem, pair.pair.key, head);
        let reference: Vec<f64> =
            heaviest.map_or(vec![0.0; problem.dim], |pair| direction(pair).collect());
        let mut a = vec![0.0; problem.dim];
        let (mut b, mut total, mut inverse) = (0.0, 0.0, 0.0);
        for pair in &pairs {
            let mut squared = 0.0;
            for ((a, u), r) in a.iter_mut().zip(direction(pair)).zip(&reference) {
                *a += mass(pair) * (u - r);
                squared += (u - r) * (u - r);
            }
            b += mass(pair) * squared / 2.0;
            total += mass(pair);
            inverse += pair.kept * (-pair.radius).exp();
        }
        // Relative to M, because M² may overflow.
        let [a_part, b_part] = [a.iter().map(|a| a * a).sum::<f64>().sqrt(), b].map(|x| x / total);
        let excess = a_part * a_part - 2.0 * b_part;
        // |S|/M, and |S|/M − 1.
        let ratio = (1.0 + excess).sqrt();
        let longer = excess / (1.0 + ratio);
        let sideways = (a_part * a_part - b_part * b_part) / (ratio + 1.0 - b_part);
        let gap = inverse + total * (b_part - sideways);
        let offset: Vec<f64> =
            a.iter().zip(&reference).map(|(a, r)| (a / total - longer * r) / ratio).collect();
        let direction = reference.iter().zip(&offset).map(|(r, offset)| r + offset).collect();
        Self { query, head, pairs, direction, offset, reference, norm: total * ratio, gap }
    }

    /// Adds to the gradients. The slopes are the derivative of the output by R, and across by sinh R.
    pub(super) fn vjp<F: Float>(
        &self,
        problem: &HyperbolicProblem<'_, F>,
        points: &Points<F>,
        [slope, ratio]: [f64; 2],
        grad_out: &[f64],
        grads: &mut PointGradients<F>,
        mut grad_bias: Option<&mut ArrayViewMut3<'_, F>>,
    ) {
        let Self { query, head, .. } = *self;
        let softmax = &problem.softmax;
        let (dim, key_dim, kv_head) = (problem.dim, softmax.key_dim, softmax.kv_head(head));
        let lorentz = (self.gap * (self.gap + 2.0 * self.norm)).sqrt();
        let radius = (self.norm / lorentz).asinh();
        let along: f64 = grad_out.iter().zip(&self.direction).map(|(g, u)| g * u).sum();
        let radial = slope * along / lorentz;
        let spread = 0.5 * radial * ((self.gap + self.norm) / lorentz);
        let across = |c: usize| ratio * (grad_out[c] - along * self.direction[c]) / lorentz;

        let mut grad_logits = Vec::with_capacity(self.pairs.len());
        for pair in &self.pairs {
            // u − û
            let u = of_value(problem, pair.pair.key, head);
            let away = u.zip(&self.reference).zip(&self.offset).map(|((u, r), o)| (u - r) - o);
            let away: Vec<f64> = away.collect();
            let squared: f64 = away.iter().map(|away| away * away).sum();
            let product: f64 = away.iter().enumerate().map(|(c, away)| across(c) * away).sum();
            let tangential = product - spread * squared;
            let later = pair.radius - radius;
            let grad_weight = radial * later.sinh() + pair.sinh * tangential;
            grad_logits.push(pair.kept * grad_weight);
            if !grads.value[0].is_empty() {
                let columns = head_columns(kv_head, dim);
                let grad = grads.value[0].slice_mut(s![pair.pair.key, columns]);
                for ((c, grad), away) in grad.into_iter().enumerate().zip(&away) {
                    *grad += F::from_f64(pair.kept * (across(c) - 2.0 * spread * away));
                }
                let cosh = pair.sinh.hypot(1.0);
                let of_radius = pair.kept * (radial * later.cosh() + cosh * tangential);
                grads.value[1][[pair.pair.key, kv_head]] += F::from_f64(of_radius);
            }
        }
        // As in the kernels: minus the sum of the others.
        if let Some(dominant) = self.pairs.iter().position(|pair| pair.weight > DOMINANT) {
            grad_logits[dominant] = 0.0;
            grad_logits[dominant] = -grad_logits.iter().sum::<f64>();
        }
        for (pair, grad_logit) in self.pairs.iter().zip(grad_logits) {
            let OfLogit { direction, query: of_query, key: of_key, kappa } =
                pair.distance.vjp(problem.kappa, grad_logit);
            let key = pair.pair.key;
            let [columns, kv_columns] = [head, kv_head].map(|head| head_columns(head, key_dim));
            if !grads.query[0].is_empty() {
                let mut grad = grads.query[0].slice_mut(s![query, columns.clone()]);
                let grad = grad.as_slice_mut().expect("a matrix of our own");
                add_point(grad, direction, &points.key.slices().row(key)[kv_columns.clone()]);
                grads.query[1][[query, head]] += of_query;
                grads.kappa[[query, head]] += kappa;
            }
            if !grads.key[0].is_empty() {
                let mut grad = grads.key[0].slice_mut(s![key, kv_columns]);
                let grad = grad.as_slice_mut().expect("a matrix of our own");
                add_point(grad, direction, &points.query.slices().row(query)[columns]);
                grads.key[1][[key, kv_head]] += of_key;
            }
            if let (Some(grad), Some(bias)) = (&mut grad_bias, softmax.bias) {
                grad[bias.slot(pair.pair, head)] += F::from_f64(grad_logit);
            }
        }
    }
}

/// Returns the direction of a value.
fn of_value<'p, F: Float>(
    problem: &'p HyperbolicProblem<'_, F>,
    key: usize,
    head: usize,
) -> impl Iterator<Item = f64> + use<'p, F> {
    let columns = head_columns(problem.softmax.kv_head(head), problem.dim);
    problem.directions.slices().row(key)[columns].iter().map(|u| u.as_f64())
}

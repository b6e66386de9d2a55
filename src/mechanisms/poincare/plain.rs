//! The weights of all pairs, and the two means that are computed pair by pair: the mean in the tangent
//! space at the query and the Fréchet mean. In ball coordinates, in `f64`, on one thread.

use super::hessian::{Hessian, add_difference};
use super::polar::Space;
use super::{Aggregation, Coordinates, Poincare};
use crate::element::try_zeros;
use crate::error::{Result, check_shape};
use crate::geometry::poincare::ball::{dot, norm_of};
use crate::geometry::poincare::{
    conformal_factor, distance, distance_vjp, exp_map, exp_map_origin, exp_map_origin_vjp,
    exp_map_vjp, log_map, log_map_origin, log_map_origin_vjp, log_map_vjp, midpoint,
};
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::poincare::HyperbolicProblem;
use crate::softmax::Softmax;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// The largest number of steps for the Fréchet mean.
const STEPS: usize = 100;

/// Computes the softmax of the distances.
pub(super) fn weights<F: Float>(problem: &HyperbolicProblem<'_, F>) -> Result<Softmax<F>> {
    Softmax::new(&problem.softmax.inputs, |pair, head| {
        let (query, key) =
            (problem.query(pair.query, head), problem.key[problem.key_at(pair.key, head)]);
        let directions = problem.softmax.query(pair.query, head).iter();
        let differences = directions.zip(problem.softmax.key(pair.key, head));
        let squared: F = differences.map(|(&a, &b)| (a - b) * (a - b)).sum();
        let radial = (query.expm1 - key.expm1) * (query.half_inverse + key.half_inverse);
        let across = squared.sqrt() * query.root * key.root;
        -problem.kappa * radial.hypot(across).asinh()
    })
}

/// The arguments of the means, as points in ball coordinates.
pub(super) struct Plain<'i, 'a, F: Float> {
    inputs: &'i Inputs<'a, F>,
    space: Space,
    c: f64,
    temperature: f64,
    coordinates: Coordinates,
    aggregation: Aggregation,
    query: Array2<f64>,
    key: Array2<f64>,
    value: Array2<f64>,
    softmax: &'i Softmax<F>,
}

/// The visible pairs of a query and head, and the mean of their values.
struct Row {
    query: usize,
    head: usize,
    pairs: Vec<Pair>,
    /// The weights, before and after dropout.
    weights: Vec<f64>,
    kept: Vec<f64>,
    /// The base point of the logarithms: the query or the mean.
    base: Vec<f64>,
    /// log(yⱼ), one per row, and Σ p log(yⱼ).
    logarithms: Array2<f64>,
    sum: Vec<f64>,
    /// The mean; NaN if any of its points is NaN.
    mean: Vec<f64>,
}

impl<'i, 'a, F: Float> Plain<'i, 'a, F> {
    pub(super) fn new(
        poincare: &Poincare<F>,
        inputs: &'i Inputs<'a, F>,
        softmax: &'i Softmax<F>,
    ) -> Result<Self> {
        let space = poincare.space()?;
        let Space { c, coordinates, .. } = space;
        let points = |array: ArrayView2<'_, F>, heads: usize| -> Result<Array2<f64>> {
            let mut points = array.mapv(F::as_f64).as_standard_layout().into_owned();
            if coordinates == Coordinates::Tangent {
                for_each_point(&mut points, heads, |_, point| {
                    space.shorten(point);
                    let tangent = point.to_vec();
                    exp_map_origin(&tangent, c, point)
                })?;
            }
            Ok(points)
        };
        let query = points(inputs.query(), inputs.num_heads())?;
        let [key, value] = [inputs.key(), inputs.value()];
        let [key, value] =
            [points(key, inputs.num_kv_heads())?, points(value, inputs.num_kv_heads())?];
        let (temperature, aggregation) = (poincare.temperature(), poincare.config.aggregation);
        Ok(Self {
            inputs,
            space,
            c,
            temperature,
            coordinates,
            aggregation,
            query,
            key,
            value,
            softmax,
        })
    }

    fn kv_head(&self, head: usize) -> usize {
        head * self.inputs.num_kv_heads() / self.inputs.num_heads()
    }

    fn query_columns(&self, head: usize) -> Range<usize> {
        head_columns(head, self.query.ncols() / self.inputs.num_heads())
    }

    fn key_columns(&self, head: usize) -> Range<usize> {
        head_columns(self.kv_head(head), self.key.ncols() / self.inputs.num_kv_heads())
    }

    fn value_columns(&self, head: usize) -> Range<usize> {
        head_columns(self.kv_head(head), self.value.ncols() / self.inputs.num_kv_heads())
    }

    fn out_columns(&self, head: usize) -> Range<usize> {
        head_columns(head, self.value.ncols() / self.inputs.num_kv_heads())
    }

    fn value(&self, key: usize, head: usize) -> &[f64] {
        &of_row(&self.value, key)[self.value_columns(head)]
    }

    /// Returns `None` for a query that sees no key, or whose pairs dropout has removed.
    fn row(&self, query: usize, head: usize) -> Result<Option<Row>> {
        let (pairs, weights) = self.weights_of(query, head);
        let multiplier = |pair: &Pair| self.multiplier(*pair, head);
        let kept: Vec<f64> =
            pairs.iter().zip(&weights).map(|(pair, weight)| weight * multiplier(pair)).collect();
        if kept.iter().all(|&weight| weight == 0.0) {
            return Ok(None);
        }
        let base = of_row(&self.query, query)[self.query_columns(head)].to_vec();
        let dim = self.value_columns(head).len();
        let mut row = Row {
            logarithms: try_zeros("logarithms", pairs.len(), dim)?,
            sum: vec![0.0; dim],
            mean: vec![f64::NAN; dim],
            query,
            head,
            pairs,
            weights,
            kept,
            base,
        };
        let is_number = |values: &[f64]| values.iter().all(|value| value.is_finite());
        let values = row.pairs.iter().all(|pair| is_number(self.value(pair.key, head)));
        if !values || !is_number(&row.base) || !is_number(&row.kept) {
            return Ok(Some(row));
        }
        if self.aggregation == Aggregation::TangentAtQuery {
            self.take_logarithms(&mut row)?;
            exp_map(&row.base, &row.sum, self.c, &mut row.mean)?;
        } else {
            self.seek_mean(&mut row)?;
        }
        Ok(Some(row))
    }

    fn multiplier(&self, pair: Pair, head: usize) -> f64 {
        let dropout = self.inputs.dropout();
        dropout.map_or(1.0, |dropout| dropout.multiplier(self.inputs.pair_number(pair), head))
    }

    /// Computes the logarithms at the base, and their sum.
    fn take_logarithms(&self, row: &mut Row) -> Result<()> {
        let Row { head, pairs, kept, base, logarithms, sum, .. } = row;
        sum.fill(0.0);
        for ((pair, &weight), mut logarithm) in pairs.iter().zip(&*kept).zip(logarithms.rows_mut())
        {
            let logarithm = logarithm.as_slice_mut().expect("a row of our own");
            log_map(base, self.value(pair.key, *head), self.c, logarithm)?;
            sum.iter_mut().zip(&*logarithm).for_each(|(sum, log)| *sum += weight * log);
        }
        Ok(())
    }

    /// Finds the point where the weighted logarithms sum to zero. Starts at the midpoint and uses
    /// Newton's method; if a step does not come closer, takes the midpoint with the weights p d/sinh d
    /// instead, which always does: d² is concave in cosh d, whose weighted sum that midpoint minimises.
    fn seek_mean(&self, row: &mut Row) -> Result<()> {
        let (dim, head) = (row.mean.len(), row.head);
        let mut values = Array2::zeros((row.pairs.len(), dim));
        for (pair, mut value) in row.pairs.iter().zip(values.rows_mut()) {
            value.assign(&ArrayView1::from(self.value(pair.key, head)));
        }
        row.base = vec![0.0; dim];
        midpoint(values.view(), &row.kept, self.c, &mut row.base)?;
        self.take_logarithms(row)?;
        let mut best = Self::residual(row);
        for _ in 0..STEPS {
            if best <= f64::EPSILON {
                break;
            }
            let last = row.base.clone();
            let step = self.solve(row, &row.sum)?;
            exp_map(&last, &step, self.c, &mut row.base)?;
            self.take_logarithms(row)?;
            let mut new = Self::residual(row);
            if new >= best {
                row.base.copy_from_slice(&last);
                self.take_logarithms(row)?;
                // At the end both only change the last digits.
                if best <= 64.0 * dim as f64 * f64::EPSILON {
                    break;
                }
                let weights = self.distances(row)?;
                let weights = weights.iter().zip(&row.kept);
                let weights: Vec<f64> =
                    weights.map(|(&d, p)| if d == 0.0 { *p } else { p * d / d.sinh() }).collect();
                midpoint(values.view(), &weights, self.c, &mut row.base)?;
                self.take_logarithms(row)?;
                new = Self::residual(row);
            }
            best = new;
        }
        row.mean.copy_from_slice(&row.base);
        Ok(())
    }

    /// Returns |Σ p log| relative to Σ p (|log| + |m|), its accuracy, because m is rounded.
    fn residual(row: &Row) -> f64 {
        let base = norm_of(&row.base);
        let logs = row.logarithms.rows().into_iter().zip(&row.kept);
        let norm = |log: ArrayView1<'_, f64>| norm_of(as_slice(&log));
        let scale: f64 = logs.map(|(log, p)| p * (base + norm(log))).sum();
        if scale == 0.0 { 0.0 } else { norm_of(&row.sum) / scale }
    }

    /// Returns √c λ at the base, which converts lengths there to distances in units of the radius of
    /// curvature.
    fn kappa(&self, row: &Row) -> Result<f64> {
        Ok(self.c.sqrt() * conformal_factor(&row.base, self.c)?)
    }

    /// Returns the distances from the base, in units of the radius of curvature.
    fn distances(&self, row: &Row) -> Result<Vec<f64>> {
        let kappa = self.kappa(row)?;
        let norm = |log: ArrayView1<'_, f64>| norm_of(as_slice(&log));
        Ok(row.logarithms.rows().into_iter().map(|log| kappa * norm(log)).collect())
    }

    /// Solves for b with the matrix Σ p H(log), minus the derivative of Σ p log with respect to the base.
    /// Uses conjugate gradients: the eigenvalues lie between Σ p and Σ p d coth d.
    fn solve(&self, row: &Row, b: &[f64]) -> Result<Vec<f64>> {
        let kappa = self.kappa(row)?;
        let logs = || row.logarithms.rows().into_iter();
        let hessians: Vec<_> = logs().map(|log| Hessian::new(as_slice(&log), kappa)).collect();
        let apply = |x: &[f64]| -> Vec<f64> {
            let mut y = vec![0.0; x.len()];
            for ((log, hessian), &p) in logs().zip(&hessians).zip(&row.kept) {
                hessian.add_product(p, as_slice(&log), x, &mut y);
            }
            y
        };
        let mut x = vec![0.0; b.len()];
        let (mut rest, mut direction) = (b.to_vec(), b.to_vec());
        let mut square = dot(&rest, &rest);
        let goal = f64::EPSILON * f64::EPSILON * square;
        for _ in 0..2 * b.len() + 10 {
            if square <= goal {
                break;
            }
            let image = apply(&direction);
            let step = square / dot(&direction, &image);
            x.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
            rest.iter_mut().zip(&image).for_each(|(rest, image)| *rest -= step * image);
            let next = dot(&rest, &rest);
            let ratio = next / square;
            direction.iter_mut().zip(&rest).for_each(|(d, rest)| *d = rest + ratio * *d);
            square = next;
        }
        Ok(x)
    }

    /// Overwrites `out`.
    pub(super) fn forward(&self, mut out: ArrayViewMut2<'_, F>) -> Result<()> {
        out.fill(F::zero());
        for query in 0..self.inputs.num_queries() {
            for head in 0..self.inputs.num_heads() {
                let Some(row) = self.row(query, head)? else { continue };
                let mut mean = row.mean;
                if self.coordinates == Coordinates::Tangent {
                    log_map_origin(&mean.clone(), self.c, &mut mean)?;
                }
                let out = out.slice_mut(s![query, self.out_columns(head)]);
                out.into_iter().zip(mean).for_each(|(out, mean)| *out = F::from_f64(mean));
            }
        }
        Ok(())
    }

    /// Adds the gradients of the inputs and returns the gradients of c and τ.
    pub(super) fn backward(
        &self,
        grad_out: ArrayView2<'_, F>,
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<[f64; 2]> {
        let zeros = |array: &Array2<f64>| try_zeros("gradients", array.nrows(), array.ncols());
        let (mut query, mut key, mut value) =
            (zeros(&self.query)?, zeros(&self.key)?, zeros(&self.value)?);
        let mut of_params = [0.0; 2];
        for at in 0..self.inputs.num_queries() {
            for head in 0..self.inputs.num_heads() {
                let Some(row) = self.row(at, head)? else { continue };
                let grad_out = grad_out.slice(s![at, self.out_columns(head)]);
                let grad_out: Vec<f64> = grad_out.iter().map(|grad| grad.as_f64()).collect();
                let arrays = [&mut query, &mut key, &mut value];
                let [grad_c, grad_temperature] = self.row_vjp(&row, grad_out, arrays, grads)?;
                of_params[0] += grad_c;
                of_params[1] += grad_temperature;
            }
        }
        let (inputs, kv_heads) = (self.inputs, self.inputs.num_kv_heads());
        of_params[0] +=
            self.points_vjp(query, inputs.query(), inputs.num_heads(), &mut grads.query)?;
        of_params[0] += self.points_vjp(key, inputs.key(), kv_heads, &mut grads.key)?;
        of_params[0] += self.points_vjp(value, inputs.value(), kv_heads, &mut grads.value)?;
        Ok(of_params)
    }

    /// The backward pass of the weights in place of the output: adds the gradients of the inputs and returns
    /// the gradients of c and τ.
    pub(super) fn weights_backward(
        &self,
        grad_weights: ArrayView2<'_, F>,
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<[f64; 2]> {
        check_shape("grad_weights", self.softmax.weights().shape(), grad_weights.shape())?;
        let zeros = |array: &Array2<f64>| try_zeros("gradients", array.nrows(), array.ncols());
        let (mut query, mut key) = (zeros(&self.query)?, zeros(&self.key)?);
        let mut of_params = [0.0; 2];
        for at in 0..self.inputs.num_queries() {
            for head in 0..self.inputs.num_heads() {
                let (pairs, weights) = self.weights_of(at, head);
                let arrays = [&mut query, &mut key];
                if weights.iter().any(|weight| weight.is_nan()) {
                    of_params = self.fill_nan(&pairs, head, arrays, grads);
                    continue;
                }
                // A pair without weight has no gradient; that of the weight may be anything.
                let grad = |pair: &Pair| grad_weights[[pair.index, head]].as_f64();
                let of_pairs = || pairs.iter().zip(&weights).filter(|(_, p)| **p != 0.0);
                let delta: f64 = of_pairs().map(|(pair, p)| p * grad(pair)).sum();
                let (pairs, grad_logits): (Vec<_>, Vec<_>) =
                    of_pairs().map(|(pair, p)| (*pair, p * (grad(pair) - delta))).unzip();
                let [grad_c, grad_temperature] =
                    self.logits_vjp(&pairs, head, &grad_logits, arrays, grads)?;
                of_params[0] += grad_c;
                of_params[1] += grad_temperature;
            }
        }
        let (inputs, kv_heads) = (self.inputs, self.inputs.num_kv_heads());
        of_params[0] +=
            self.points_vjp(query, inputs.query(), inputs.num_heads(), &mut grads.query)?;
        of_params[0] += self.points_vjp(key, inputs.key(), kv_heads, &mut grads.key)?;
        Ok(of_params)
    }

    /// Returns the visible pairs of a query and head, and their weights.
    fn weights_of(&self, query: usize, head: usize) -> (Vec<Pair>, Vec<f64>) {
        let bias = self.inputs.bias();
        let is_hidden =
            |pair: &Pair| bias.is_some_and(|bias| bias.at(*pair, head) == F::neg_infinity());
        let pairs: Vec<Pair> = self.inputs.row(query).filter(|pair| !is_hidden(pair)).collect();
        let weight = |pair: &Pair| self.softmax.weights()[[pair.index, head]].as_f64();
        let mut weights: Vec<f64> = pairs.iter().map(weight).collect();
        // Rounded `f32` weights do not sum to 1: the weight of a dominant pair lacks the weights of the
        // others.
        let total: f64 = weights.iter().sum();
        if total > 0.0 {
            weights.iter_mut().for_each(|weight| *weight /= total);
        }
        (pairs, weights)
    }

    fn row_vjp(
        &self,
        row: &Row,
        mut grad_out: Vec<f64>,
        [query, key, value]: [&mut Array2<f64>; 3],
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<[f64; 2]> {
        let head = row.head;
        let mut grad_c = 0.0;
        if row.mean.iter().any(|mean| mean.is_nan()) {
            for pair in &row.pairs {
                of_row_mut(value, pair.key)[self.value_columns(head)].fill(f64::NAN);
            }
            return Ok(self.fill_nan(&row.pairs, head, [query, key], grads));
        }
        let grad_query = &mut of_row_mut(query, row.query)[self.query_columns(head)];
        // out = log₀(m) in tangent coordinates
        if self.coordinates == Coordinates::Tangent {
            let mut grad_mean = vec![0.0; grad_out.len()];
            grad_c += log_map_origin_vjp(&row.mean, self.c, &grad_out, &mut grad_mean)?;
            grad_out = grad_mean;
        }
        // m = exp_q(Σ p log_q(y)), or the m where Σ p log_m(y) = 0, which has the derivative 0.
        let mut unused = vec![0.0; row.base.len()];
        let grad_sum = if self.aggregation == Aggregation::TangentAtQuery {
            let mut grad_sum = vec![0.0; grad_out.len()];
            grad_c +=
                exp_map_vjp(&row.base, &row.sum, self.c, &grad_out, &mut unused, &mut grad_sum)?;
            self.add_base_vjp(row, &grad_sum, grad_query)?;
            grad_sum
        } else {
            self.solve(row, &grad_out)?
        };
        let mut grad_weights = Vec::with_capacity(row.pairs.len());
        let mut grad_log = vec![0.0; grad_sum.len()];
        for ((pair, &p), log) in row.pairs.iter().zip(&row.kept).zip(row.logarithms.rows()) {
            grad_weights.push(self.multiplier(*pair, head) * dot(&grad_sum, as_slice(&log)));
            grad_log.iter_mut().zip(&grad_sum).for_each(|(log, sum)| *log = p * sum);
            let grad_value = &mut of_row_mut(value, pair.key)[self.value_columns(head)];
            let point = self.value(pair.key, head);
            grad_c += log_map_vjp(&row.base, point, self.c, &grad_log, &mut unused, grad_value)?;
        }
        // p = softmax(s): ds = p (dp − δ);  s = −d/τ + b
        let delta: f64 = grad_weights.iter().zip(&row.weights).map(|(grad, p)| grad * p).sum();
        let grads_and_weights = grad_weights.into_iter().zip(&row.weights);
        let mut grad_logits: Vec<f64> =
            grads_and_weights.map(|(grad, p)| p * (grad - delta)).collect();
        // They sum to 0. For a pair with nearly all weight, dp − δ loses digits; minus the sum of the
        // others does not.
        if let Some(dominant) = row.weights.iter().position(|&p| p > 0.5) {
            grad_logits[dominant] = 0.0;
            grad_logits[dominant] = -grad_logits.iter().sum::<f64>();
        }
        let arrays = [query, key];
        let [of_logits, grad_temperature] =
            self.logits_vjp(&row.pairs, head, &grad_logits, arrays, grads)?;
        Ok([grad_c + of_logits, grad_temperature])
    }

    /// Makes NaN of all gradients that a row with NaN among its logits touches; returns those of c and τ.
    fn fill_nan(
        &self,
        pairs: &[Pair],
        head: usize,
        [query, key]: [&mut Array2<f64>; 2],
        grads: &mut GradientsMut<'_, F>,
    ) -> [f64; 2] {
        for pair in pairs {
            of_row_mut(query, pair.query)[self.query_columns(head)].fill(f64::NAN);
            of_row_mut(key, pair.key)[self.key_columns(head)].fill(f64::NAN);
            if let (Some(grad), Some(bias)) = (&mut grads.bias, self.inputs.bias()) {
                grad[bias.slot(*pair, head)] = F::nan();
            }
        }
        [f64::NAN; 2]
    }

    /// Adds the gradients that follow from those of the logits of some pairs of a query and head; returns
    /// those of c and τ.
    fn logits_vjp(
        &self,
        pairs: &[Pair],
        head: usize,
        grad_logits: &[f64],
        [query, key]: [&mut Array2<f64>; 2],
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<[f64; 2]> {
        let [mut grad_c, mut grad_temperature] = [0.0; 2];
        for (pair, &grad_logit) in pairs.iter().zip(grad_logits) {
            if let (Some(grad), Some(bias)) = (&mut grads.bias, self.inputs.bias()) {
                grad[bias.slot(*pair, head)] += F::from_f64(grad_logit);
            }
            let a = &of_row(&self.query, pair.query)[self.query_columns(head)];
            let b = &of_row(&self.key, pair.key)[self.key_columns(head)];
            let grad_distance = -grad_logit / self.temperature;
            grad_temperature -= grad_distance * distance(a, b, self.c)? / self.temperature;
            let grad_query = &mut of_row_mut(query, pair.query)[self.query_columns(head)];
            let grad_key = &mut of_row_mut(key, pair.key)[self.key_columns(head)];
            grad_c += distance_vjp(a, b, self.c, grad_distance, grad_query, grad_key)?;
        }
        Ok([grad_c, grad_temperature])
    }

    /// Adds the gradient of q in exp_q(u), u = Σ p log_q(y), at fixed p, from the gradient g of u.
    ///
    /// When q moves by w, logarithms move by −H(log) w; and if u moved by −H(u) w, exp_q(u) would not
    /// move. So exp_q(u) moves as if only u moved, by H(u) w − Σ p H(log) w, and the gradient is (H(u) −
    /// Σ p H(log)) g. If one key has nearly all weight, the difference is small and is computed from the
    /// differences between its logarithm and the others.
    fn add_base_vjp(&self, row: &Row, g: &[f64], grad: &mut [f64]) -> Result<()> {
        let kappa = self.kappa(row)?;
        let pairs = || row.logarithms.rows().into_iter().zip(&row.kept).enumerate();
        let (first, _) = pairs().max_by(|(_, (_, p)), (_, (_, q))| p.total_cmp(q)).expect("a pair");
        let first_log = row.logarithms.row(first).to_vec();
        // u − log₀ = Σ p (log − log₀) − (1 − Σ p) log₀
        let is_dropped = self.inputs.dropout().is_some();
        let rest = if is_dropped { 1.0 - row.kept.iter().sum::<f64>() } else { 0.0 };
        let mut sum_less_first: Vec<f64> = first_log.iter().map(|log| -rest * log).collect();
        Hessian::new(&first_log, kappa).add_product(rest, &first_log, g, grad);
        for (at, (log, &p)) in pairs() {
            if at != first {
                let log = as_slice(&log);
                let less: Vec<f64> = first_log.iter().zip(log).map(|(a, b)| a - b).collect();
                sum_less_first.iter_mut().zip(&less).for_each(|(sum, less)| *sum -= p * less);
                add_difference(p, [&first_log, log, &less], kappa, g, grad);
            }
        }
        add_difference(1.0, [&row.sum, &first_log, &sum_less_first], kappa, g, grad);
        Ok(())
    }

    /// Adds the gradient of an input to `sink`, given the gradient of its points; returns the gradient of
    /// c.
    fn points_vjp(
        &self,
        mut grad: Array2<f64>,
        input: ArrayView2<'_, F>,
        heads: usize,
        sink: &mut Option<ArrayViewMut2<'_, F>>,
    ) -> Result<f64> {
        let mut grad_c = 0.0;
        if self.coordinates == Coordinates::Tangent {
            let tangents = input.mapv(F::as_f64).as_standard_layout().into_owned();
            let dim = tangents.ncols() / heads;
            for_each_point(&mut grad, heads, |at, grad| {
                let grad_point = grad.to_vec();
                // No query has seen it, whatever it is.
                if grad_point.iter().all(|&grad| grad == 0.0) {
                    return Ok(());
                }
                grad.fill(0.0);
                let columns = head_columns(at % heads, dim);
                let mut tangent = of_row(&tangents, at / heads)[columns].to_vec();
                let factor = self.space.shorten(&mut tangent);
                grad_c += exp_map_origin_vjp(&tangent, self.c, &grad_point, grad)?;
                if let Some(factor) = factor {
                    // As for a vector of fixed length in units of 1/√c.
                    let (along, square) = (dot(grad, &tangent), dot(&tangent, &tangent));
                    grad_c -= along / (2.0 * self.c);
                    for (grad, tangent) in grad.iter_mut().zip(&tangent) {
                        *grad = factor * (*grad - along / square * tangent);
                    }
                }
                Ok(())
            })?;
        }
        if let Some(sink) = sink {
            sink.zip_mut_with(&grad, |sink, &grad| *sink += F::from_f64(grad));
        }
        Ok(grad_c)
    }
}

/// Visits every point in rows of `heads` points, with its number.
fn for_each_point(
    points: &mut Array2<f64>,
    heads: usize,
    mut visit: impl FnMut(usize, &mut [f64]) -> Result<()>,
) -> Result<()> {
    let dim = points.ncols() / heads;
    let all = points.as_slice_mut().expect("a matrix of our own");
    let mut points = all.chunks_mut(dim.max(1)).enumerate();
    points.try_for_each(|(at, point)| visit(at, point))
}

fn of_row(array: &Array2<f64>, row: usize) -> &[f64] {
    let columns = array.ncols();
    &array.as_slice().expect("a matrix of our own")[row * columns..][..columns]
}

fn as_slice<'a>(row: &'a ArrayView1<'_, f64>) -> &'a [f64] {
    row.as_slice().expect("a row of our own")
}

fn of_row_mut(array: &mut Array2<f64>, row: usize) -> &mut [f64] {
    let columns = array.ncols();
    &mut array.as_slice_mut().expect("a matrix of our own")[row * columns..][..columns]
}

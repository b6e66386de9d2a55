//! The same attention computed pair by pair: for graphs, for biases, masks, dropout and weights of pairs,
//! which sums over all keys cannot honour, and for rows with sums that underflowed.

use super::map::FeatureMap;
use crate::element::{nan_max, try_zeros};
use crate::error::Result;
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::gathered::unrolled_dot;
use crate::kernels::performer::Map;
use crate::kernels::problem::Problem;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::f64::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Sums below this have lost terms to underflow.
pub(super) fn least_sum<F: Float>() -> F {
    F::min_positive_value().sqrt()
}

/// The features of rows, for each head.
struct Side<F> {
    heads: usize,
    /// log₂ of positive features; other features themselves.
    exponents: Array2<F>,
    /// 2^{exponent − shift}; other features themselves.
    features: Array2<F>,
    /// The largest exponents, rows × heads; |x|² in units of ln 2 for trigonometric features.
    shifts: Array2<F>,
}

impl<F: Float> Side<F> {
    fn new(map: &FeatureMap<F>, x: ArrayView2<'_, F>, heads: usize) -> Result<Self> {
        let (rows, features) = (x.nrows(), map.num_features);
        let mut side = Self {
            heads,
            exponents: try_zeros("features", rows, heads * features)?,
            features: try_zeros("features", rows, heads * features)?,
            shifts: try_zeros("features", rows, heads)?,
        };
        let is_exponential = map.map().is_exponential();
        for head in 0..heads {
            let x = x.slice(s![.., head_columns(head, map.head_dim)]);
            let products = map.products(x)?;
            let columns = head_columns(head, features);
            for (row, (x, products)) in x.rows().into_iter().zip(products.rows()).enumerate() {
                let mut exponents = side.exponents.slice_mut(s![row, columns.clone()]);
                map.exponents_or_features(x, products, exponents.view_mut());
                let shift = &mut side.shifts[[row, head]];
                if is_exponential {
                    *shift = exponents.iter().copied().fold(F::neg_infinity(), nan_max);
                } else if map.map() == Map::Circular {
                    *shift = map.square_scale() * x.dot(&x);
                }
                let mut features = side.features.slice_mut(s![row, columns.clone()]);
                features.zip_mut_with(&exponents, |feature, &exponent| {
                    *feature = if is_exponential { (exponent - *shift).exp2() } else { exponent };
                });
            }
        }
        Ok(side)
    }

    /// Returns the range of the features of a head of a row.
    fn range(&self, row: usize, head: usize) -> Range<usize> {
        let columns = self.features.ncols();
        head_columns(row * self.heads + head, columns / self.heads)
    }

    fn features(&self, row: usize, head: usize) -> &[F] {
        &data(&self.features)[self.range(row, head)]
    }

    fn exponents(&self, row: usize, head: usize) -> &[F] {
        &data(&self.exponents)[self.range(row, head)]
    }
}

fn data<F>(matrix: &Array2<F>) -> &[F] {
    matrix.as_slice().unwrap_or_default()
}

/// The kernel of a pair, κ 2^{exponent} up to a factor of its query.
struct Kernel<F> {
    kappa: F,
    exponent: F,
    /// The exponent that κ is relative to, if the features underflowed and κ is a sum of 2^{aᵣ + bᵣ −
    /// max}.
    underflow: Option<F>,
}

/// Attention computed pair by pair.
pub(super) struct Pairs<'p, F: Float> {
    map: &'p FeatureMap<F>,
    problem: Problem<'p, F>,
    query: Side<F>,
    key: Side<F>,
}

/// The terms that turn kernels into weights, num_queries × heads: p = κ e^{logit − max} / D.
#[derive(Debug)]
pub(super) struct RowSums<F> {
    /// −∞ if no key was seen.
    pub(super) maxima: Array2<F>,
    pub(super) denominators: Array2<F>,
}

impl<F: Float> RowSums<F> {
    pub(super) fn new(inputs: &Inputs<'_, F>) -> Result<Self> {
        let zeros = || try_zeros("denominators", inputs.num_queries(), inputs.num_heads());
        Ok(Self { maxima: zeros()?, denominators: zeros()? })
    }
}

/// The gradient of a loss with respect to the output, or to the weights.
#[derive(Clone, Copy)]
pub(super) enum Upstream<'u, F> {
    /// With the output and the sums of its rows.
    Out { out: ArrayView2<'u, F>, sums: &'u RowSums<F>, grad_out: ArrayView2<'u, F> },
    /// num_pairs × heads.
    Weights(ArrayView2<'u, F>),
}

/// A pair of a row, its kernel, and the logarithm of the factor of the kernel.
struct Term<F> {
    pair: Pair,
    kernel: Kernel<F>,
    logit: F,
}

impl<'p, F: Float> Pairs<'p, F> {
    pub(super) fn new(map: &'p FeatureMap<F>, inputs: &Inputs<'p, F>) -> Result<Self> {
        Ok(Self {
            map,
            problem: Problem::new(inputs, Some(1.0))?,
            query: Side::new(map, inputs.query(), inputs.num_heads())?,
            key: Side::new(map, inputs.key(), inputs.num_kv_heads())?,
        })
    }

    fn kernel(&self, pair: Pair, head: usize) -> Kernel<F> {
        let kv_head = self.problem.kv_head(head);
        let exponent = self.key.shifts[[pair.key, kv_head]];
        let key = self.key.features(pair.key, kv_head);
        let kappa = unrolled_dot(self.query.features(pair.query, head), key);
        if !self.map.map().is_exponential() || kappa >= least_sum() || kappa.is_nan() {
            return Kernel { kappa, exponent, underflow: None };
        }
        let exponents = || {
            let key = self.key.exponents(pair.key, kv_head);
            self.query.exponents(pair.query, head).iter().zip(key).map(|(&a, &b)| a + b)
        };
        let max = exponents().fold(F::neg_infinity(), nan_max);
        let kappa = exponents().map(|exponent| (exponent - max).exp2()).sum();
        let exponent = max - self.query.shifts[[pair.query, head]];
        Kernel { kappa, exponent, underflow: Some(max) }
    }

    /// Lists the visible pairs of a row.
    fn row(&self, query: usize, head: usize, terms: &mut Vec<Term<F>>) {
        terms.clear();
        for pair in self.problem.inputs.row(query) {
            if let Some(bias) = self.problem.bias_of(pair, head) {
                terms.push(Term { pair, kernel: self.kernel(pair, head), logit: bias });
            }
        }
        // Relative to the largest bias: a common part cancels, however large it is.
        let max = terms.iter().map(|term| term.logit).fold(F::neg_infinity(), nan_max);
        for term in terms {
            term.logit = (term.logit - max) + term.kernel.exponent * F::from_f64(LN_2);
        }
    }

    /// Returns the largest logit of a row and the sum of its kernels relative to that, in `f64`: in an
    /// `f32` sum of millions of terms the last ones would be lost.
    fn sum(terms: &[Term<F>]) -> [F; 2] {
        let max = terms.iter().map(|term| term.logit).fold(F::neg_infinity(), nan_max);
        if max == F::neg_infinity() {
            return [max, F::zero()];
        }
        let terms = terms.iter().map(|term| term.kernel.kappa * (term.logit - max).exp());
        [max, F::from_f64(terms.map(F::as_f64).sum())]
    }

    /// Overwrites some rows of the output, each for a query and head, and their sums.
    pub(super) fn forward(
        &self,
        rows: impl Iterator<Item = (usize, usize)>,
        out: &mut ArrayViewMut2<'_, F>,
        sums: &mut RowSums<F>,
    ) {
        let mut terms = Vec::new();
        let mut mean = vec![0.0; self.problem.value_dim];
        for (query, head) in rows {
            self.row(query, head, &mut terms);
            let [max, sum] = Self::sum(&terms);
            sums.maxima[[query, head]] = max;
            sums.denominators[[query, head]] = sum;
            let mut out = out.slice_mut(s![query, head_columns(head, self.problem.value_dim)]);
            mean.fill(0.0);
            for term in terms.iter().filter(|_| max != F::neg_infinity()) {
                let weight = term.kernel.kappa * ((term.logit - max).exp() / sum);
                let weight = (weight * self.problem.multiplier(term.pair, head)).as_f64();
                let value = self.problem.value(term.pair.key, head).iter();
                mean.iter_mut().zip(value).for_each(|(mean, v)| *mean += weight * v.as_f64());
            }
            out.iter_mut().zip(&mean).for_each(|(out, &mean)| *out = F::from_f64(mean));
        }
    }

    /// Returns the weights, num_pairs × heads.
    pub(super) fn weights(&self) -> Result<Array2<F>> {
        let inputs = &self.problem.inputs;
        let mut weights = try_zeros("weights", inputs.num_pairs(), inputs.num_heads())?;
        let mut terms = Vec::new();
        for (query, head) in all_rows(inputs) {
            self.row(query, head, &mut terms);
            let [max, sum] = Self::sum(&terms);
            if max == F::neg_infinity() {
                continue;
            }
            for term in &terms {
                let weight = term.kernel.kappa * ((term.logit - max).exp() / sum);
                weights[[term.pair.index, head]] = weight;
            }
        }
        Ok(weights)
    }

    /// Adds the gradients of some rows, and, if wanted, the gradient of the projection to the gradient of
    /// the kernels' weight.
    pub(super) fn backward(
        &self,
        rows: impl Iterator<Item = (usize, usize)>,
        upstream: Upstream<'_, F>,
        grads: &mut GradientsMut<'_, F>,
        grad_projection: &mut Option<Array2<F>>,
    ) -> Result<()> {
        let problem = &self.problem;
        let (mut grad_query, mut grad_key) =
            (SideGradient::new(&self.query)?, SideGradient::new(&self.key)?);
        let mut terms = Vec::new();
        for (query, head) in rows {
            self.row(query, head, &mut terms);
            let [max, sum] = match upstream {
                Upstream::Out { sums, .. } => {
                    [&sums.maxima, &sums.denominators].map(|array| array[[query, head]])
                }
                Upstream::Weights(_) => Self::sum(&terms),
            };
            if max == F::neg_infinity() {
                continue;
            }
            // pᵢⱼ = κᵢⱼ uᵢⱼ
            let factor = |term: &Term<F>| (term.logit - max).exp() / sum;
            let columns = head_columns(head, problem.value_dim);
            let kv_head = problem.kv_head(head);
            let delta: F = match upstream {
                Upstream::Out { out, grad_out, .. } => grad_out
                    .slice(s![query, columns.clone()])
                    .dot(&out.slice(s![query, columns.clone()])),
                Upstream::Weights(grad) => {
                    let weight = |term: &Term<F>| term.kernel.kappa * factor(term);
                    let product = |term| match weight(term) {
                        weight if weight == F::zero() => weight,
                        weight => weight * grad[[term.pair.index, head]],
                    };
                    terms.iter().map(product).sum()
                }
            };
            for term in &terms {
                let (Term { pair, kernel, .. }, factor) = (term, factor(term));
                let weight = kernel.kappa * factor;
                let grad_weight = match upstream {
                    // oᵢ = Σ mᵢⱼ wᵢⱼ pᵢⱼ vⱼ
                    Upstream::Out { grad_out, .. } => {
                        let grad_out = grad_out.slice(s![query, columns.clone()]);
                        let multiplier = problem.multiplier(*pair, head);
                        if let Some(grad) = &mut grads.value {
                            let columns = head_columns(kv_head, problem.value_dim);
                            let mut grad = grad.slice_mut(s![pair.key, columns]);
                            grad.scaled_add(multiplier * weight, &grad_out);
                        }
                        let products = grad_out.iter().zip(problem.value(pair.key, head));
                        let product: F = products.map(|(&g, &v)| g * v).sum();
                        let dropout = problem.inputs.dropout_multiplier(*pair, head);
                        let of_weight = weight * dropout * product;
                        problem.inputs.add_pair_weight_gradient(*pair, head, of_weight, grads);
                        multiplier * product
                    }
                    // A weight of 0 has no gradient, whatever the loss says.
                    Upstream::Weights(_) if weight == F::zero() => delta,
                    Upstream::Weights(grad) => grad[[pair.index, head]],
                };
                let centered = grad_weight - delta;
                let grad_logit = weight * centered;
                if let (Some(grad), Some(bias)) = (&mut grads.bias, problem.bias) {
                    grad[bias.slot(*pair, head)] += grad_logit;
                }
                // κᵢⱼ = φᵢ·φⱼ
                let (i, j) = ((pair.query, head), (pair.key, kv_head));
                let (a, b) = ((&self.query, i), (&self.key, j));
                match kernel.underflow {
                    None => {
                        let grad_kappa = factor * centered;
                        grad_query.add_features(a, grad_kappa, self.key.features(j.0, j.1));
                        grad_key.add_features(b, grad_kappa, self.query.features(i.0, i.1));
                    }
                    Some(max) => {
                        let factor = F::from_f64(LN_2) * (grad_logit / kernel.kappa);
                        let key = self.key.exponents(j.0, j.1);
                        let exponents = self.query.exponents(i.0, i.1).iter().zip(key);
                        for (feature, (&x, &y)) in exponents.enumerate() {
                            let grad = factor * (x + y - max).exp2();
                            grad_query.add_exponent(a, feature, grad);
                            grad_key.add_exponent(b, feature, grad);
                        }
                    }
                }
                grad_key.squares[[j.0, j.1]] += grad_logit;
            }
        }
        let inputs = &problem.inputs;
        self.side_vjp(
            &self.query,
            grad_query,
            inputs.query(),
            &mut grads.query,
            grad_projection,
            false,
        )?;
        self.side_vjp(&self.key, grad_key, inputs.key(), &mut grads.key, grad_projection, true)
    }

    /// Turns the gradients of features into the gradients of rows.
    fn side_vjp(
        &self,
        side: &Side<F>,
        grad: SideGradient<F>,
        x: ArrayView2<'_, F>,
        grad_x: &mut Option<ArrayViewMut2<'_, F>>,
        grad_weight: &mut Option<Array2<F>>,
        is_key: bool,
    ) -> Result<()> {
        let map = self.map;
        let weight = map.weight()?;
        let num_columns = weight.nrows();
        for head in 0..side.heads {
            let columns = head_columns(head, map.head_dim);
            let x = x.slice(s![.., columns.clone()]);
            let products = map.products(x)?;
            let mut grad_products = try_zeros("gradients", x.nrows(), num_columns)?;
            let mut grad_squares = vec![F::zero(); x.nrows()];
            for (row, mut out) in grad_products.rows_mut().into_iter().enumerate() {
                let range = side.range(row, head);
                let grads = &data(&grad.features)[range.clone()];
                let of_exponents = &data(&grad.exponents)[range];
                // A row that no query has seen may hold anything.
                if grads.iter().chain(of_exponents).all(|&grad| grad == F::zero()) {
                    continue;
                }
                let features = side.features(row, head);
                let exponent =
                    |at: usize| of_exponents[at] + F::from_f64(LN_2) * features[at] * grads[at];
                let exponents = || (0..features.len()).map(exponent);
                for (c, out) in out.iter_mut().enumerate() {
                    let second = c + num_columns;
                    let product = products[[row, c]];
                    *out = match map.map() {
                        Map::Exponential => exponent(c),
                        Map::Both => exponent(c) - exponent(second),
                        Map::Circular => features[c] * grads[second] - features[second] * grads[c],
                        Map::Relu(_) if product > F::zero() => grads[c],
                        Map::Relu(_) => F::zero(),
                        // log₂(1 + x) if x > 0, else x log₂ e
                        Map::Elu if product > F::zero() => {
                            exponent(c) * F::from_f64(LOG2_E) / (F::one() + product)
                        }
                        Map::Elu => exponent(c) * F::from_f64(LOG2_E),
                    };
                }
                grad_squares[row] = match map.map() {
                    Map::Exponential | Map::Both => -exponents().sum::<F>(),
                    // For queries it cancels.
                    Map::Circular if is_key => F::from_f64(LN_2) * grad.squares[[row, head]],
                    _ => F::zero(),
                };
            }
            if let Some(grad_x) = grad_x {
                let mut grad_x = grad_x.slice_mut(s![.., columns]);
                for ((mut grad_x, x), &grad) in
                    grad_x.rows_mut().into_iter().zip(x.rows()).zip(&grad_squares)
                {
                    if grad != F::zero() {
                        grad_x.scaled_add(F::from_f64(2.0) * map.square_scale() * grad, &x);
                    }
                }
                match map.projection {
                    Some(_) => F::linear_input_vjp(weight.view(), grad_products.view(), grad_x)?,
                    None => grad_x += &grad_products,
                }
            }
            if let Some(grad_weight) = grad_weight {
                F::linear_params_vjp(x, grad_products.view(), grad_weight.view_mut(), None)?;
            }
        }
        Ok(())
    }
}

/// The gradients of a [`Side`].
struct SideGradient<F> {
    features: Array2<F>,
    exponents: Array2<F>,
    /// The gradients of the shifts, in units of e.
    squares: Array2<F>,
}

impl<F: Float> SideGradient<F> {
    fn new(side: &Side<F>) -> Result<Self> {
        let (rows, columns) = side.features.dim();
        Ok(Self {
            features: try_zeros("gradients", rows, columns)?,
            exponents: try_zeros("gradients", rows, columns)?,
            squares: try_zeros("gradients", rows, side.heads)?,
        })
    }

    fn add_features(
        &mut self,
        (side, (row, head)): (&Side<F>, (usize, usize)),
        factor: F,
        other: &[F],
    ) {
        let range = side.range(row, head);
        let grads = &mut self.features.as_slice_mut().unwrap_or_default()[range];
        grads.iter_mut().zip(other).for_each(|(grad, &other)| *grad += factor * other);
    }

    fn add_exponent(
        &mut self,
        (side, (row, head)): (&Side<F>, (usize, usize)),
        feature: usize,
        grad: F,
    ) {
        let range = side.range(row, head);
        self.exponents.as_slice_mut().unwrap_or_default()[range][feature] += grad;
    }
}

/// Iterates over every query and head.
pub(super) fn all_rows<F: Float>(
    inputs: &Inputs<'_, F>,
) -> impl Iterator<Item = (usize, usize)> + use<F> {
    let (queries, heads) = (inputs.num_queries(), inputs.num_heads());
    (0..queries).flat_map(move |query| (0..heads).map(move |head| (query, head)))
}

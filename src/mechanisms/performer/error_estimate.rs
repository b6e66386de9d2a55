//! The error of the estimate: predicted from the inputs, and measured from the features.

use super::config::Features;
use super::{Path, Performer};
use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::inputs::{Inputs, head_columns};
use crate::kernels::Float;
use crate::kernels::level::level;
use ndarray::{Array2, ArrayView1};

/// The estimated error of a [`Performer`], returned by [`Performer::estimate_error`].
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorEstimate<F> {
    /// The standard error of each head's output, num_queries × heads: the square root of the sum of the
    /// variances of its columns.
    pub standard_error: Array2<F>,
    /// The number of projections of equal weight with the same variance, num_queries × heads: (Σ dᵣ)²/Σ
    /// dᵣ² over the terms of the denominator. If it is small, a few large terms dominate the sum, and the
    /// standard error is too small to be trusted.
    pub effective_features: Array2<F>,
}

impl<F: Float> Performer<F> {
    /// Returns the variance of φ(q)·φ(k) relative to the square of the estimated value e^{scale·q·k}, for
    /// independent projections (Lemma 2 of Choromanski et al. 2021, in closed form):
    ///
    /// ```text
    /// positive        (e^{s} − 1)/m                 s = scale |q + k|²
    /// hyperbolic      (e^{s} − 1)(1 − e^{−s})/m
    /// trigonometric   2 (cosh t − 1)/m              t = scale |q − k|²
    /// ```
    ///
    /// The square root is the relative error of a weight before normalisation; the estimate is useless
    /// unless it is well below 1. For positive features the error with orthogonal projections is not
    /// larger (Theorem 2).
    ///
    /// `query` and `key` are one head, of length head_dim.
    ///
    /// # Errors
    /// [`Error::Shape`] for a different length; [`Error::InvalidArgument`] for features that do not
    /// estimate a softmax.
    pub fn relative_variance(
        &self,
        query: ArrayView1<'_, F>,
        key: ArrayView1<'_, F>,
    ) -> Result<f64> {
        Ok(self.variance_of_one(query, key)? / self.config.num_features as f64)
    }

    /// Returns the number of features for which the square root of
    /// [`relative_variance`](Self::relative_variance) is at most `relative_error`, an even number for
    /// features in pairs. It may be huge or infinite. NaN for vectors with NaN.
    ///
    /// # Errors
    /// As [`relative_variance`](Self::relative_variance); [`Error::InvalidArgument`] if `relative_error`
    /// is not positive and finite.
    pub fn num_features_for(
        &self,
        query: ArrayView1<'_, F>,
        key: ArrayView1<'_, F>,
        relative_error: f64,
    ) -> Result<f64> {
        if !(relative_error > 0.0 && relative_error.is_finite()) {
            let expected = "a positive finite number";
            return Err(Error::config("relative_error", expected, relative_error));
        }
        let per_projection = self.config.features.per_projection() as f64;
        let variance = self.variance_of_one(query, key)? / per_projection;
        // Not divided by the square, which may be 0.
        let projections = (variance / relative_error / relative_error).ceil();
        // NaN stays.
        Ok(per_projection * if projections < 1.0 { 1.0 } else { projections })
    }

    /// Returns the relative variance times m.
    fn variance_of_one(&self, query: ArrayView1<'_, F>, key: ArrayView1<'_, F>) -> Result<f64> {
        self.check_estimate()?;
        check_shape("query", &[self.config.head_dim], query.shape())?;
        check_shape("key", &[self.config.head_dim], key.shape())?;
        let square = |sign: f64| {
            let terms =
                query.iter().zip(key).map(|(q, k)| (q.as_f64() + sign * k.as_f64()).powi(2));
            self.map.scale * terms.sum::<f64>()
        };
        Ok(match self.config.features {
            Features::Hyperbolic => square(1.0).exp_m1() * -(-square(1.0)).exp_m1(),
            // 2 (cosh t − 1) = (e^{t/2} − e^{−t/2})²
            Features::Trigonometric => (2.0 * (square(-1.0) / 2.0).sinh()).powi(2),
            _ => square(1.0).exp_m1(),
        })
    }

    /// Estimates the error of the outputs from the features, without computing exact attention: each
    /// projection contributes a term (nᵣ, dᵣ) to the numerator and the denominator, and the output
    /// o = Σ nᵣ/Σ dᵣ has, to first order, the variance Σ |nᵣ − o dᵣ|²/(Σ dᵣ)². Takes about as long as the
    /// forward pass. Blocks of orthogonal projections have a smaller error than this estimate.
    ///
    /// # Errors
    /// As the forward pass; [`Error::InvalidArgument`] for features that do not estimate a softmax, for
    /// inputs whose queries do not all see the same keys, and for inputs with bias or dropout.
    pub fn estimate_error(&self, inputs: &Inputs<'_, F>) -> Result<ErrorEstimate<F>> {
        self.check_estimate()?;
        self.map.check(inputs)?;
        let keys = match self.path(inputs) {
            Path::Nothing => Vec::new(),
            Path::Sums(keys) => keys,
            Path::Causal(_) | Path::Pairs => {
                let expected =
                    "dense inputs in which all queries see the same keys, without bias and dropout";
                return Err(Error::config("inputs", expected, "other inputs"));
            }
        };
        let zeros = || try_zeros("error estimate", inputs.num_queries(), inputs.num_heads());
        let mut accuracy = ErrorEstimate { standard_error: zeros()?, effective_features: zeros()? };
        if keys.is_empty() {
            return Ok(accuracy);
        }
        let problem = self.map.problem(inputs, keys)?;
        let sums = F::sum_keys(&problem, level());
        let features = self.config.num_features;
        let projections = features / self.config.features.per_projection();
        for head in 0..inputs.num_heads() {
            let sums = &sums[problem.kv_head(head)];
            let columns = head_columns(head, self.config.head_dim);
            let x = inputs.query();
            let x = x.slice(ndarray::s![.., columns]);
            let products = self.map.products(x)?;
            let mut row = ndarray::Array1::zeros(features);
            for (query, (x, products)) in x.rows().into_iter().zip(products.rows()).enumerate() {
                self.map.exponents_or_features(x, products, row.view_mut());
                if problem.map.is_exponential() {
                    row.iter_mut().zip(&sums.shifts).for_each(|(entry, &shift)| *entry += shift);
                    let max = row.iter().copied().fold(F::neg_infinity(), crate::element::nan_max);
                    row.mapv_inplace(|exponent| (exponent - max).exp2());
                }
                // The terms of the projections, one per row; the last column is the denominator.
                let width = problem.value_dim + 1;
                let mut terms = vec![F::zero(); projections * width];
                for (feature, &phi) in row.iter().enumerate() {
                    let terms = &mut terms[feature % projections * width..][..width];
                    let of_feature = &sums.sums[feature * sums.stride..][..width - 1];
                    terms.iter_mut().zip(of_feature).for_each(|(term, &sum)| *term += phi * sum);
                    terms[width - 1] += phi * sums.totals[feature];
                }
                let mut total = vec![F::zero(); width];
                let mut of_squares = F::zero();
                for terms in terms.chunks_exact(width) {
                    total.iter_mut().zip(terms).for_each(|(total, &term)| *total += term);
                    of_squares += terms[width - 1] * terms[width - 1];
                }
                let denominator = total[width - 1];
                let mut variance = F::zero();
                for terms in terms.chunks_exact(width) {
                    for (&term, &total) in terms[..width - 1].iter().zip(&total) {
                        let difference =
                            (term - total / denominator * terms[width - 1]) / denominator;
                        variance += difference * difference;
                    }
                }
                accuracy.standard_error[[query, head]] = variance.sqrt();
                accuracy.effective_features[[query, head]] = denominator * denominator / of_squares;
            }
        }
        Ok(accuracy)
    }

    fn check_estimate(&self) -> Result<()> {
        if self.config.features.is_estimate() {
            return Ok(());
        }
        let expected = "features that estimate a softmax";
        Err(Error::config("features", expected, format!("{:?}", self.config.features)))
    }
}

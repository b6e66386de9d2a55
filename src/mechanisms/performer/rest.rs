//! The keys that a search did not find.

use super::config::Features;
use super::state::{MOST_ROUNDING, PerformerState, ROUNDING};
use crate::element::{nan_max, try_zeros};
use crate::error::{Channel, Error, Result, check_shape};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::partial::Partial;
use ndarray::{Array2, ArrayView2, Axis};
use std::f64::consts::LN_2;

/// A rest this small is only the rounding error of the subtraction.
const LEAST_SHARE: f64 = 1e-10;

impl<F: Float> PerformerState<F> {
    /// Estimates attention over the keys of the state *without* those that each query sees in `inputs`, to
    /// be merged with exact attention over those: together they are attention over all keys, exact where
    /// it matters most.
    ///
    /// ```text
    /// R = the keys that the query sees      e^{scale·q·k} ≈ φ(q)·φ(k)
    /// l = Σ_{state} φ(q)·φ(kⱼ) − Σ_R φ(q)·φ(kⱼ)
    /// o = (Σ_{state} φ(q)·φ(kⱼ) vⱼ − Σ_R φ(q)·φ(kⱼ) vⱼ) / l
    /// ```
    ///
    /// For sparse attention over the pairs that a nearest-neighbour search found. Merge it with
    /// [`Flash::forward_partial`](crate::Flash::forward_partial) over the same inputs. That the largest
    /// weights are exact removes most of the variance of the estimate, and the rest corrects the bias of
    /// attention over the found keys alone, which gives them all of the weight. Without a backward pass.
    ///
    /// The keys and values that queries see must be among those of the state, with the same numbers; this
    /// cannot be checked. `inputs` have one head, queries and keys of head_dim columns and values of
    /// value_dim columns. Takes O(m d) for each pair.
    ///
    /// ```
    /// use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
    /// use graph_attention::ndarray::Array2;
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    /// use graph_attention::{Attention, Flash, Inputs, PerformerConfig};
    ///
    /// let x = Array2::from_shape_fn((60, 4), |(i, j)| ((i * 7 + j * 3) as f64).sin());
    /// let index = ExactIndex::new(x.view(), Metric::Dot)?;
    /// let found = index.search(x.view(), &NeighborSearch::new(10))?.graph;
    /// let some = Inputs::graph(x.view(), x.view(), x.view(), &found)?;
    ///
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    /// let mut state = PerformerConfig::new(4, 128).init::<f64>(&mut rng)?.state(4)?;
    /// state.add(x.view(), x.view())?;
    /// let exact = Flash::new().forward_partial(&some)?;
    /// let alone = exact.out().to_owned();
    /// let merged = exact.merge(&state.attend_rest(&some)?)?.out().to_owned();
    ///
    /// let all = Flash::new().forward(&Inputs::dense(x.view(), x.view(), x.view())?)?;
    /// let error = |out: &Array2<f64>| (out - &all).mapv(|e| e * e).sum();
    /// assert!(error(&merged) < 0.1 * error(&alone));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Unsupported`] for a bias, dropout, weights of pairs or several heads;
    /// [`Error::InvalidArgument`] if the features are not [`Features::Positive`] or
    /// [`Features::Hyperbolic`], whose sums are never negative, or if only rounding errors remain of keys
    /// that were removed from the state.
    pub fn attend_rest(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        if !matches!(self.map.features, Features::Positive | Features::Hyperbolic) {
            let expected = "`Features::Positive` or `Features::Hyperbolic`";
            return Err(Error::config("features", expected, format!("{:?}", self.map.features)));
        }
        let refused = [Channel::Heads, Channel::Bias, Channel::Dropout, Channel::PairWeights];
        inputs.check_absent(super::NAME, &refused)?;
        let (num_queries, dim) = (inputs.num_queries(), self.map.head_dim);
        check_shape("query", &[num_queries, dim], inputs.query().shape())?;
        check_shape("key", &[inputs.num_keys(), dim], inputs.key().shape())?;
        check_shape("value", &[inputs.num_keys(), self.value_dim], inputs.value().shape())?;

        let mut out = try_zeros("out", num_queries, self.value_dim)?;
        let mut shift = Array2::from_elem((num_queries, 1), F::neg_infinity());
        let mut sum = try_zeros("sum", num_queries, 1)?;
        let exponents = self.exponents(inputs.query())?;
        for (query, exponents) in exponents.rows().into_iter().enumerate() {
            let seen: Vec<usize> = inputs.row(query).map(|pair| pair.key).collect();
            let of_seen = self.exponents(inputs.key().select(Axis(0), &seen).view())?;
            // In units of ln 2, as all exponents.
            let shifts = exponents.iter().zip(&self.sums.shifts).map(|(e, shift)| e + shift);
            let largest = shifts.clone().fold(f64::NEG_INFINITY, nan_max);
            if largest == f64::NEG_INFINITY {
                continue;
            }
            let features: Vec<f64> = shifts.map(|shift| (shift - largest).exp2()).collect();
            let (mut total, mut rounding) = (0.0, 0.0);
            let mut values = vec![0.0; self.value_dim];
            let rows = self.sums.sums.chunks_exact(self.sums.stride);
            for ((feature, of_keys), row) in features.iter().zip(&self.sums.totals).zip(rows) {
                total += feature * of_keys;
                rounding += feature * row[self.value_dim + ROUNDING];
                values.iter_mut().zip(row).for_each(|(sum, of_keys)| *sum += feature * of_keys);
            }
            if rounding > MOST_ROUNDING * total {
                let expected = "sums larger than the rounding errors of removed keys";
                let actual = format!("smaller sums for query {query}");
                return Err(Error::config("state", expected, actual));
            }
            let mut rest = total;
            for (&key, of_key) in seen.iter().zip(of_seen.rows()) {
                let terms = exponents.iter().zip(of_key);
                let weight: f64 = terms.map(|(a, b)| (a + b - largest).exp2()).sum();
                rest -= weight;
                let value = inputs.value().row(key).mapv(F::as_f64);
                values.iter_mut().zip(value).for_each(|(sum, value)| *sum -= weight * value);
            }
            if rest <= LEAST_SHARE * total {
                continue;
            }
            shift[[query, 0]] = F::from_f64(largest * LN_2);
            sum[[query, 0]] = F::from_f64(rest / self.map.num_features as f64);
            let values = values.iter().map(|value| F::from_f64(value / rest));
            out.row_mut(query).iter_mut().zip(values).for_each(|(out, value)| *out = value);
        }
        Partial::new(out, shift, sum)
    }

    /// Computes log₂ of the features of each row, without their common factor.
    fn exponents(&self, x: ArrayView2<'_, F>) -> Result<Array2<f64>> {
        let x = x.mapv(F::as_f64);
        let products = self.map.products(x.view())?;
        let mut exponents = try_zeros("features", x.nrows(), self.map.num_features)?;
        for ((x, products), out) in
            x.rows().into_iter().zip(products.rows()).zip(exponents.rows_mut())
        {
            self.map.exponents_or_features(x, products, out);
        }
        Ok(exponents)
    }
}

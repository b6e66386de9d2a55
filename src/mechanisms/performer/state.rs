//! The sums over keys as a value.

use super::Performer;
use super::map::FeatureMap;
use crate::error::{Error, Result, check_shape};
use crate::float::{Float, try_zeros};
use crate::inputs::Inputs;
use crate::kernels::Kernels;
use crate::kernels::features::KeySums;
use fearless_simd::Level;
use ndarray::{Array2, ArrayView2};
use std::marker::PhantomData;

/// The running sums of a [`Performer`] head over keys and values, which come and go: for an index
/// that changes while it is queried.
///
/// ```text
/// S = Σⱼ φ(kⱼ) vⱼᵀ      z = Σⱼ φ(kⱼ)      query: φ(q)ᵀ S / φ(q)ᵀ z
/// ```
///
/// Adding, removing or asking takes O(m (d + d_v)) for each row; memory is O(m d_v). Sums are kept
/// in `f64` and relative to the largest exponent that each feature has met, so that nothing
/// overflows.
///
/// What is removed must have been added, with the same numbers: this cannot be checked. Removing
/// leaves the rounding of what was there, 10⁻¹⁶ of the largest sum so far; a query that this would
/// reach is an error. A state without keys starts afresh.
///
/// ```
/// use graph_attention::{Attention, Inputs, PerformerConfig};
/// use graph_attention::ndarray::{array, s};
/// use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let performer = PerformerConfig::new(2, 16).init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
/// let keys = array![[0.1, 0.9], [0.8, -0.2], [-0.5, 0.3]];
/// let values = array![[1.0], [2.0], [3.0]];
/// let query = array![[0.3, 0.4]];
///
/// let mut state = performer.state(1)?;
/// state.add(keys.view(), values.view())?;
/// let inputs = Inputs::dense(query.view(), keys.view(), values.view())?;
/// let all = performer.forward(&inputs)?;
/// assert!((state.query(query.view())? - all)[[0, 0]].abs() < 1e-12);
///
/// state.remove(keys.slice(s![2.., ..]), values.slice(s![2.., ..]))?;
/// assert_eq!(state.num_keys(), 2);
/// assert!(state.query(query.view())?[[0, 0]] < 2.0); // between the values that are left
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PerformerState<F> {
    map: FeatureMap<f64>,
    value_dim: usize,
    num_keys: usize,
    sums: KeySums<f64>,
    /// log₂ of the largest total that each feature has had.
    peaks: Vec<f64>,
    float: PhantomData<F>,
}

impl<F: Float> Performer<F> {
    /// Sums over no keys yet, for values of so many columns.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if there are none; [`Error::TooLarge`].
    pub fn state(&self, value_dim: usize) -> Result<PerformerState<F>> {
        if value_dim == 0 {
            return Err(Error::config("value_dim", "at least 1", value_dim));
        }
        let mut state = PerformerState {
            map: self.map.as_f64(),
            value_dim,
            num_keys: 0,
            sums: KeySums::zeros(0, 0),
            peaks: vec![f64::NEG_INFINITY; self.config.num_features],
            float: PhantomData,
        };
        let none = Array2::zeros((0, self.config.head_dim));
        let (_, sums) = state.sums_of(none, Array2::zeros((0, value_dim)))?;
        state.sums = sums;
        Ok(state)
    }
}

impl<F: Float> PerformerState<F> {
    /// How many keys there are.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        self.num_keys
    }

    /// Adds keys (n × head_dim) and their values (n × value_dim).
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidConfig`] for numbers that are not finite, which no removal
    /// would take out again.
    pub fn add(&mut self, keys: ArrayView2<'_, F>, values: ArrayView2<'_, F>) -> Result<()> {
        let (count, sums) = self.checked_sums(keys, values)?;
        self.sums.add(&sums, 1.0);
        self.num_keys += count;
        self.note_peaks();
        Ok(())
    }

    /// Removes keys that have been added, and their values.
    ///
    /// # Errors
    /// As [`add`](Self::add); [`Error::InvalidConfig`] for more keys than there are.
    pub fn remove(&mut self, keys: ArrayView2<'_, F>, values: ArrayView2<'_, F>) -> Result<()> {
        if keys.nrows() > self.num_keys {
            let expected = format!("at most the {} rows of the state", self.num_keys);
            return Err(Error::config("keys", expected, keys.nrows()));
        }
        let (count, sums) = self.checked_sums(keys, values)?;
        self.sums.add(&sums, -1.0);
        self.num_keys -= count;
        if self.num_keys == 0 {
            self.sums = KeySums::zeros(self.sums.shifts.len(), self.sums.stride);
            self.peaks.fill(f64::NEG_INFINITY);
        }
        Ok(())
    }

    /// Adds the keys of another state of the same mechanism: of another shard or layer, say.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if its projection or features are others, [`Error::Shape`] if its
    /// values have another size.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        check_shape("other's values", &[self.value_dim], &[other.value_dim])?;
        if self.map != other.map {
            let expected = "a state of the same mechanism";
            return Err(Error::config("other", expected, "one with another feature map"));
        }
        self.sums.add(&other.sums, 1.0);
        self.num_keys += other.num_keys;
        for (peak, &others) in self.peaks.iter_mut().zip(&other.peaks) {
            *peak = peak.max(others);
        }
        self.note_peaks();
        Ok(())
    }

    /// The attention of queries (n × head_dim) over the keys, n × value_dim: zeros if there are
    /// none.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidConfig`] where of the keys near a query so many have been
    /// removed that rounding is left of their sums.
    pub fn query(&self, queries: ArrayView2<'_, F>) -> Result<Array2<F>> {
        check_shape("queries", &[queries.nrows(), self.map.head_dim], queries.shape())?;
        let mut out = try_zeros("out", queries.nrows(), self.value_dim)?;
        if self.num_keys == 0 {
            return Ok(out);
        }
        let queries = queries.mapv(F::as_f64);
        let keys = Array2::zeros((0, self.map.head_dim));
        let values = Array2::zeros((0, self.value_dim));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let problem = self.map.problem(&inputs, Vec::new())?;
        let mut quotients = try_zeros("out", queries.nrows(), self.value_dim)?;
        let mut denominators = try_zeros("denominators", queries.nrows(), 1)?;
        let sums = std::slice::from_ref(&self.sums);
        f64::features_forward(
            &problem,
            sums,
            Level::new(),
            quotients.view_mut(),
            &mut denominators,
        );
        if self.map.map().is_exponential() {
            // What the same query would find if the sums were what rounding may have left of them.
            let peaks = self.peaks.iter().zip(&self.sums.shifts);
            let rounding = peaks.map(|(peak, shift)| f64::EPSILON * (peak - shift).exp2());
            let mut noise = KeySums { totals: rounding.collect(), ..self.sums.clone() };
            // Of the peaks where these are above anything that is left, 0 · ∞ elsewhere.
            noise.totals.iter_mut().filter(|total| !total.is_finite()).for_each(|t| *t = 0.0);
            let mut of_noise = try_zeros("denominators", queries.nrows(), 1)?;
            let mut unused = try_zeros("out", queries.nrows(), self.value_dim)?;
            let sums = std::slice::from_ref(&noise);
            f64::features_forward(&problem, sums, Level::new(), unused.view_mut(), &mut of_noise);
            for (row, (&sum, &noise)) in denominators.iter().zip(&of_noise).enumerate() {
                // Three digits.
                if sum < 1e3 * noise {
                    let actual = format!("sums that rounding has reached, for query {row}");
                    return Err(Error::config("state", "keys that have not been removed", actual));
                }
            }
        }
        out.zip_mut_with(&quotients, |out, &quotient| *out = F::of(quotient));
        Ok(out)
    }

    fn checked_sums(
        &self,
        keys: ArrayView2<'_, F>,
        values: ArrayView2<'_, F>,
    ) -> Result<(usize, KeySums<f64>)> {
        check_shape("keys", &[keys.nrows(), self.map.head_dim], keys.shape())?;
        check_shape("values", &[keys.nrows(), self.value_dim], values.shape())?;
        for (what, rows) in [("keys", keys), ("values", values)] {
            let is_bad = |(_, entry): &((usize, usize), &F)| !entry.is_finite();
            if let Some(((row, _), entry)) = rows.indexed_iter().find(is_bad) {
                return Err(Error::config(what, "finite numbers", format!("{entry} in row {row}")));
            }
        }
        self.sums_of(keys.mapv(F::as_f64), values.mapv(F::as_f64))
    }

    /// The sums over keys, and how many these are.
    fn sums_of(&self, keys: Array2<f64>, values: Array2<f64>) -> Result<(usize, KeySums<f64>)> {
        let queries = Array2::zeros((0, self.map.head_dim));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let problem = self.map.problem(&inputs, (0..keys.nrows()).collect())?;
        let sums = f64::sum_keys(&problem, Level::new()).into_iter().next();
        sums.map(|sums| (keys.nrows(), sums)).ok_or_else(|| Error::config("heads", "one", "none"))
    }

    fn note_peaks(&mut self) {
        let KeySums { shifts, totals, .. } = &self.sums;
        for (peak, (&shift, &total)) in self.peaks.iter_mut().zip(shifts.iter().zip(totals)) {
            // Before any key there is none.
            if total > 0.0 {
                *peak = peak.max(total.log2() + shift);
            }
        }
    }
}

//! The sums over keys as a value.

use super::Performer;
use super::map::FeatureMap;
use crate::error::{Error, Result, check_shape};
use crate::float::{Float, all_finite, try_zeros};
use crate::inputs::Inputs;
use crate::kernels::Kernels;
use crate::kernels::level::level;
use crate::kernels::performer::{KeySums, Map};
use ndarray::{Array2, ArrayView2, Axis};
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
/// Remove only keys that were added, with the same numbers: this cannot be checked. Each removal
/// leaves the rounding of the sums that it found, of keys and of values, some 10⁻¹⁶ of them. This is
/// added up, and a query whose answer it would reach is an error.
/// A state without keys starts afresh.
///
/// ```
/// use graph_attention::{Attention, Inputs, PerformerConfig};
/// use graph_attention::ndarray::{array, s};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
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
/// assert!((state.attend(query.view())? - all)[[0, 0]].abs() < 1e-12);
///
/// state.remove(keys.slice(s![2.., ..]), values.slice(s![2.., ..]))?;
/// assert_eq!(state.num_keys(), 2);
/// assert!(state.attend(query.view())?[[0, 0]] < 2.0); // between the values that are left
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PerformerState<F> {
    map: FeatureMap<f64>,
    value_dim: usize,
    num_keys: usize,
    /// Of the values, and of the columns after them: [`MAGNITUDE`] and what follows.
    sums: KeySums<f64>,
    float: PhantomData<F>,
}

/// Columns after those of the values: the largest of each value's, without signs, and what rounding
/// may have left of the totals, and of the magnitudes.
const MAGNITUDE: usize = 0;
const ROUNDING: usize = 1;
const ROUNDING_OF_MAGNITUDE: usize = 2;
const MORE_COLUMNS: usize = 3;

/// Three digits of an answer are right.
const MOST_ROUNDING: f64 = 1e-3;

impl<F: Float> Performer<F> {
    /// Sums over no keys yet, for values of so many columns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are none; [`Error::TooLarge`].
    pub fn state(&self, value_dim: usize) -> Result<PerformerState<F>> {
        if value_dim == 0 {
            return Err(Error::config("value_dim", "at least 1", value_dim));
        }
        let mut state = PerformerState {
            map: self.map.as_f64(),
            value_dim,
            num_keys: 0,
            sums: KeySums::zeros(0, 0),
            float: PhantomData,
        };
        let none = Array2::zeros((0, self.config.head_dim));
        state.sums = state.sums_of(none, Array2::zeros((0, value_dim + MORE_COLUMNS)))?;
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
    /// [`Error::Shape`]; [`Error::InvalidArgument`] for numbers that are not finite, or whose squares
    /// are not: no removal would take them out again.
    pub fn add(&mut self, keys: ArrayView2<'_, F>, values: ArrayView2<'_, F>) -> Result<()> {
        self.sums.add(&self.checked_sums(keys, values)?, 1.0);
        self.num_keys += keys.nrows();
        Ok(())
    }

    /// Removes keys that have been added, and their values.
    ///
    /// # Errors
    /// As [`add`](Self::add); [`Error::InvalidArgument`] for more keys than there are.
    pub fn remove(&mut self, keys: ArrayView2<'_, F>, values: ArrayView2<'_, F>) -> Result<()> {
        if keys.nrows() > self.num_keys {
            let expected = format!("at most the {} rows of the state", self.num_keys);
            return Err(Error::config("keys", expected, keys.nrows()));
        }
        let sums = self.checked_sums(keys, values)?;
        self.note_rounding();
        self.sums.add(&sums, -1.0);
        self.num_keys -= keys.nrows();
        if self.num_keys == 0 {
            self.sums = KeySums::zeros(self.sums.shifts.len(), self.sums.stride);
        }
        Ok(())
    }

    /// Adds the keys of another state of the same mechanism: of another shard or layer, say.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if its projection or features are others, [`Error::Shape`] if its
    /// values have another size.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        check_shape("other's values", &[self.value_dim], &[other.value_dim])?;
        if self.map != other.map {
            let expected = "a state of the same mechanism";
            return Err(Error::config("other", expected, "one with another feature map"));
        }
        self.sums.add(&other.sums, 1.0);
        self.num_keys += other.num_keys;
        Ok(())
    }

    /// The attention of queries (n × head_dim) over the keys, n × value_dim: zeros if there are
    /// none.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidArgument`] where of the keys near a query so many have been
    /// removed that rounding is left of their sums.
    pub fn attend(&self, queries: ArrayView2<'_, F>) -> Result<Array2<F>> {
        check_shape("queries", &[queries.nrows(), self.map.head_dim], queries.shape())?;
        let mut out = try_zeros("out", queries.nrows(), self.value_dim)?;
        if self.num_keys == 0 {
            return Ok(out);
        }
        let columns = self.value_dim + MORE_COLUMNS;
        let queries = queries.mapv(F::as_f64);
        let keys = Array2::zeros((0, self.map.head_dim));
        let values = Array2::zeros((0, columns));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let problem = self.map.problem(&inputs, Vec::new())?;
        let mut quotients = try_zeros("out", queries.nrows(), columns)?;
        let mut denominators = try_zeros("denominators", queries.nrows(), 1)?;
        let sums = std::slice::from_ref(&self.sums);
        f64::features_forward(&problem, sums, level(), quotients.view_mut(), &mut denominators);
        for (row, (quotients, denominator)) in
            quotients.rows().into_iter().zip(&denominators).enumerate()
        {
            let (values, more) = quotients.split_at(Axis(0), self.value_dim);
            let [of_keys, of_values] = match self.map.map() {
                // Cosines are at most 1, and would cancel.
                Map::Circular => self.largest_rounding().map(|sum| sum / denominator),
                _ => [more[ROUNDING], more[ROUNDING_OF_MAGNITUDE]],
            };
            // Rounding has no sign, but the sums that it has reached may have any.
            let of_magnitude = MOST_ROUNDING * more[MAGNITUDE].abs();
            if of_keys.abs() > MOST_ROUNDING || of_values.abs() > of_magnitude {
                let actual = format!("sums that rounding has reached, for query {row}");
                return Err(Error::config("state", "keys that have not been removed", actual));
            }
            out.row_mut(row).zip_mut_with(&values, |out, &value| *out = F::from_f64(value));
        }
        Ok(out)
    }

    fn checked_sums(
        &self,
        keys: ArrayView2<'_, F>,
        values: ArrayView2<'_, F>,
    ) -> Result<KeySums<f64>> {
        check_shape("keys", &[keys.nrows(), self.map.head_dim], keys.shape())?;
        check_shape("values", &[keys.nrows(), self.value_dim], values.shape())?;
        for (what, rows) in [("keys", keys), ("values", values)] {
            let is_bad = |(_, entry): &((usize, usize), &F)| !entry.is_finite();
            if let Some(((row, _), entry)) = rows.indexed_iter().find(is_bad) {
                return Err(Error::config(what, "finite numbers", format!("{entry} in row {row}")));
            }
        }
        let columns = self.value_dim + MORE_COLUMNS;
        let mut more = try_zeros("values", values.nrows(), columns)?;
        for (mut more, values) in more.rows_mut().into_iter().zip(values.rows()) {
            more.iter_mut().zip(values).for_each(|(more, &value)| *more = value.as_f64());
            more[self.value_dim + MAGNITUDE] =
                values.iter().fold(0.0, |max, value| max.max(value.as_f64().abs()));
        }
        let sums = self.sums_of(keys.mapv(F::as_f64), more)?;
        if all_finite(&sums.totals) && all_finite(&sums.sums) {
            return Ok(sums);
        }
        Err(Error::config("keys", "numbers whose squares and sums are finite", "larger ones"))
    }

    /// The sums over keys; values have all columns.
    fn sums_of(&self, keys: Array2<f64>, values: Array2<f64>) -> Result<KeySums<f64>> {
        let queries = Array2::zeros((0, self.map.head_dim));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let problem = self.map.problem(&inputs, (0..keys.nrows()).collect())?;
        let sums = f64::sum_keys(&problem, level()).into_iter().next();
        sums.ok_or_else(|| Error::config("heads", "one", "none"))
    }

    /// Of the sums that a removal finds: what is left of them afterwards may be of its size.
    fn note_rounding(&mut self) {
        let KeySums { totals, sums, stride, .. } = &mut self.sums;
        // Exponents are the same bits as when they were added.
        for (row, total) in sums.chunks_exact_mut(*stride).zip(totals) {
            let row = &mut row[self.value_dim..];
            row[ROUNDING] += f64::EPSILON * total.abs();
            row[ROUNDING_OF_MAGNITUDE] += f64::EPSILON * row[MAGNITUDE].abs();
        }
    }

    /// The rounding error that may be left in the sums of a query whose features are 1, of keys and of
    /// magnitudes.
    fn largest_rounding(&self) -> [f64; 2] {
        let rows = || self.sums.sums.chunks_exact(self.sums.stride);
        [ROUNDING, ROUNDING_OF_MAGNITUDE].map(|c| rows().map(|row| row[self.value_dim + c]).sum())
    }
}

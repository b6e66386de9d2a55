//! Running sums over keys.

use super::Performer;
use super::map::FeatureMap;
use crate::element::{all_finite, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::gradients::param_slot;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::Kernels;
use crate::kernels::level::level;
use crate::kernels::performer::{FeatureUpstream, KeySums, Map};
use ndarray::{Array2, ArrayD, ArrayView2, Axis, Ix2, s};
use std::marker::PhantomData;

/// The running sums of a [`Performer`] head over keys and values that can be added and removed, for an
/// index that changes while it is queried.
///
/// ```text
/// S = Σⱼ φ(kⱼ) vⱼᵀ      z = Σⱼ φ(kⱼ)      query: φ(q)ᵀ S / φ(q)ᵀ z
/// ```
///
/// Adding, removing or querying takes O(m (d + d_v)) for each row; memory is O(m d_v). Sums are kept in
/// `f64` relative to the largest exponent so far of each feature, so nothing overflows.
///
/// Only remove keys that were added, with the same numbers: this cannot be checked. Each removal leaves a
/// rounding error of about 10⁻¹⁶ of the sums over keys and values. These errors are added up, and a query
/// that they would affect returns an error. A state without keys starts from zero.
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
/// assert!(state.attend(query.view())?[[0, 0]] < 2.0); // between the remaining values
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PerformerState<F> {
    pub(super) map: FeatureMap<f64>,
    pub(super) value_dim: usize,
    num_keys: usize,
    /// The sums of the values and of the columns after them, from [`MAGNITUDE`] on.
    pub(super) sums: KeySums<f64>,
    float: PhantomData<F>,
}

/// The columns after the values: the largest magnitude of each value, and the possible rounding errors of
/// the totals and of the magnitudes.
const MAGNITUDE: usize = 0;
pub(super) const ROUNDING: usize = 1;
const ROUNDING_OF_MAGNITUDE: usize = 2;
const MORE_COLUMNS: usize = 3;

/// Three digits of an output are correct.
pub(super) const MOST_ROUNDING: f64 = 1e-3;

impl<F: Float> Performer<F> {
    /// Creates a state without keys, for values of `value_dim` columns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `value_dim` is 0; [`Error::TooLarge`].
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
    /// Returns the number of keys.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        self.num_keys
    }

    /// Adds keys (n × head_dim) and their values (n × value_dim).
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidArgument`] for numbers that are not finite or have squares that
    /// are not finite, because they could not be removed again.
    pub fn add(&mut self, keys: ArrayView2<'_, F>, values: ArrayView2<'_, F>) -> Result<()> {
        self.sums.add(&self.checked_sums(keys, values)?, 1.0);
        self.num_keys += keys.nrows();
        Ok(())
    }

    /// Removes keys that were added, and their values.
    ///
    /// # Errors
    /// As [`add`](Self::add); [`Error::InvalidArgument`] if there are more keys to remove than in the
    /// state.
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

    /// Adds the keys of another state of the same mechanism, for example of another shard or layer.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if its projection or features differ, [`Error::Shape`] if its values
    /// have a different size.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        check_shape("other's values", &[self.value_dim], &[other.value_dim])?;
        if self.map != other.map {
            let expected = "a state of the same mechanism";
            return Err(Error::config("other", expected, "a state with another feature map"));
        }
        self.sums.add(&other.sums, 1.0);
        self.num_keys += other.num_keys;
        Ok(())
    }

    /// Computes the attention of queries (n × head_dim) over the keys, n × value_dim; zeros without keys.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidArgument`] if so many of the keys close to a query were removed
    /// that only rounding errors remain of their sums.
    pub fn attend(&self, queries: ArrayView2<'_, F>) -> Result<Array2<F>> {
        check_shape("queries", &[queries.nrows(), self.map.head_dim], queries.shape())?;
        let mut out = try_zeros("out", queries.nrows(), self.value_dim)?;
        if self.num_keys > 0 {
            let (quotients, _) = self.quotients(&queries.mapv(F::as_f64))?;
            out.zip_mut_with(&quotients, |out, &value| *out = F::from_f64(value));
        }
        Ok(out)
    }

    /// Computes numerators / denominators of queries, n × value_dim, and the denominators, n × 1.
    fn quotients(&self, queries: &Array2<f64>) -> Result<(Array2<f64>, Array2<f64>)> {
        let columns = self.value_dim + MORE_COLUMNS;
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
            let (_, more) = quotients.split_at(Axis(0), self.value_dim);
            let [of_keys, of_values] = match self.map.map() {
                // Cosines are at most 1 and would cancel.
                Map::Circular => self.largest_rounding().map(|sum| sum / denominator),
                _ => [more[ROUNDING], more[ROUNDING_OF_MAGNITUDE]],
            };
            // The rounding bound is positive, but the affected sums may have any sign.
            let of_magnitude = MOST_ROUNDING * more[MAGNITUDE].abs();
            if of_keys.abs() > MOST_ROUNDING || of_values.abs() > of_magnitude {
                let expected = "sums larger than the rounding errors of removed keys";
                return Err(Error::config(
                    "state",
                    expected,
                    format!("smaller sums for query {row}"),
                ));
            }
        }
        quotients.slice_collapse(s![.., ..self.value_dim]);
        Ok((quotients, denominators))
    }

    /// Runs the backward pass of [`attend`](Self::attend): returns the gradients of the queries, n × head_dim, and of
    /// the sums of the state, given that of the output, n × value_dim.
    ///
    /// So queries and keys can be on different machines, in both passes: queries need the merged states, and keys the
    /// sum of the gradients of the states, both of O(m value_dim) numbers, whatever the numbers of queries and keys.
    /// [`add_vjp`](Self::add_vjp) turns the gradient of the state into those of keys and values.
    ///
    /// `grad_params` has the gradient of `projection_matrix` if it is
    /// [learned](super::PerformerConfig::learn_projection), to which that through the queries is added, or is empty.
    ///
    /// ```
    /// use graph_attention::{Attention, Inputs, PerformerConfig};
    /// use graph_attention::ndarray::{Array2, s};
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// let performer = PerformerConfig::new(4, 16).init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
    /// let x = Array2::from_shape_fn((8, 4), |(i, j)| ((i * 7 + j * 3) as f64).sin());
    /// let shards = [x.slice(s![..3, ..]), x.slice(s![3.., ..])]; // of keys and values, and of queries
    ///
    /// let mut all = performer.state(4)?;
    /// for keys in shards {
    ///     let mut state = performer.state(4)?;
    ///     state.add(keys, keys)?;
    ///     all.merge(&state)?;
    /// }
    /// // Of the loss |out|²/2.
    /// let (_, mut grad_state) = all.attend_vjp(shards[0], all.attend(shards[0])?.view(), &mut [])?;
    /// let (_, other) = all.attend_vjp(shards[1], all.attend(shards[1])?.view(), &mut [])?;
    /// grad_state.add(&other)?;
    /// let [_, grad_values] = performer.state(4)?.add_vjp(shards[0], shards[0], &grad_state, &mut [])?;
    ///
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    /// let (out, saved) = performer.forward_train(&inputs)?;
    /// let whole = performer.backward(&inputs, &saved, out.view())?.value;
    /// let difference = grad_values - whole.slice(s![..3, ..]);
    /// assert!(difference.iter().all(|difference| difference.abs() < 1e-13));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`attend`](Self::attend); [`Error::Shape`] if `grad_out` or the gradient of the projection does not fit.
    pub fn attend_vjp(
        &self,
        queries: ArrayView2<'_, F>,
        grad_out: ArrayView2<'_, F>,
        grad_params: &mut [ArrayD<F>],
    ) -> Result<(Array2<F>, StateGradient<F>)> {
        check_shape("queries", &[queries.nrows(), self.map.head_dim], queries.shape())?;
        check_shape("grad_out", &[queries.nrows(), self.value_dim], grad_out.shape())?;
        self.check_params(grad_params)?;
        let mut grad_queries = try_zeros("gradients", queries.nrows(), self.map.head_dim)?;
        let zeros = KeySums::zeros(self.sums.shifts.len(), self.sums.stride);
        let of_no_keys = StateGradient { sums: zeros, float: PhantomData };
        if self.num_keys == 0 {
            return Ok((grad_queries, of_no_keys));
        }
        let queries = queries.mapv(F::as_f64);
        let (quotients, denominators) = self.quotients(&queries)?;
        let columns = self.value_dim + MORE_COLUMNS;
        // Nothing flows through the other columns.
        let mut padded = [(); 2].map(|()| Array2::zeros((queries.nrows(), columns)));
        padded[0].slice_mut(s![.., ..self.value_dim]).assign(&quotients);
        padded[1].slice_mut(s![.., ..self.value_dim]).assign(&grad_out.mapv(F::as_f64));
        let [out, grad_out] = padded.each_ref().map(|array| array.view());
        let (keys, values) = (Array2::zeros((0, self.map.head_dim)), Array2::zeros((0, columns)));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let mut problem = self.map.problem(&inputs, Vec::new())?;
        problem.wants_projection = !grad_params.is_empty();
        let upstream = FeatureUpstream { out, denominators: &denominators, grad_out };
        let sums = std::slice::from_ref(&self.sums);
        let (grads, of_sums) = f64::features_queries_backward(&problem, sums, &upstream, level())?;
        grad_queries.zip_mut_with(&grads.query, |grad, &of_query| *grad = F::from_f64(of_query));
        self.add_projection(&grads.projection, grad_params);
        let mut sums = of_sums.into_iter().next().unwrap_or(of_no_keys.sums);
        sums.shifts.clone_from(&self.sums.shifts);
        Ok((grad_queries, StateGradient { sums, float: PhantomData }))
    }

    /// Runs the backward pass of [`add`](Self::add): returns the gradients of keys and values, given that of a state
    /// to which they were added, also by [`merge`](Self::merge). Does not read the sums of `self`, so every state of
    /// the mechanism will do. `grad_params` as for [`attend_vjp`](Self::attend_vjp).
    ///
    /// # Errors
    /// As [`add`](Self::add); [`Error::Shape`] if the gradients do not fit; [`Error::InvalidArgument`] for keys that
    /// are larger than any in the state that the gradient belongs to. (Other keys that are not in it cannot be
    /// recognised.)
    pub fn add_vjp(
        &self,
        keys: ArrayView2<'_, F>,
        values: ArrayView2<'_, F>,
        grad_state: &StateGradient<F>,
        grad_params: &mut [ArrayD<F>],
    ) -> Result<[Array2<F>; 2]> {
        let StateGradient { sums: of_state, .. } = grad_state;
        let own = self.checked_sums(keys, values)?;
        let expected = [own.shifts.len(), own.stride];
        check_shape("grad_state", &expected, &[of_state.shifts.len(), of_state.stride])?;
        self.check_params(grad_params)?;
        if own.shifts.iter().zip(&of_state.shifts).any(|(own, of_state)| own > of_state) {
            let expected = "keys in the state that grad_state belongs to";
            return Err(Error::config("keys", expected, "larger keys"));
        }
        let queries = Array2::zeros((0, self.map.head_dim));
        let mut padded = Array2::zeros((values.nrows(), self.value_dim + MORE_COLUMNS));
        padded.slice_mut(s![.., ..self.value_dim]).assign(&values.mapv(F::as_f64));
        let keys = keys.mapv(F::as_f64);
        let inputs = Inputs::dense(queries.view(), keys.view(), padded.view())?;
        let mut problem = self.map.problem(&inputs, (0..keys.nrows()).collect())?;
        problem.wants_projection = !grad_params.is_empty();
        let of_state = std::slice::from_ref(of_state);
        let grads = f64::features_keys_backward(&problem, of_state, of_state, level())?;
        self.add_projection(&grads.projection, grad_params);
        let of_values = grads.value.slice(s![.., ..self.value_dim]);
        Ok([grads.key.mapv(F::from_f64), of_values.mapv(F::from_f64)])
    }

    /// Checks the gradient of the projection, if it is wanted.
    fn check_params(&self, grad_params: &[ArrayD<F>]) -> Result<()> {
        match (grad_params, &self.map.projection) {
            ([], _) => Ok(()),
            ([grad], Some(projection)) => {
                check_shape("grad_params", projection.shape(), grad.shape())
            }
            (more, _) => {
                let expected = usize::from(self.map.projection.is_some());
                check_shape("number of grad_params", &[expected], &[more.len()])
            }
        }
    }

    fn add_projection(&self, grad_weight: &Array2<f64>, grad_params: &mut [ArrayD<F>]) {
        if let Some(grad) = grad_params.first_mut() {
            let factor = self.map.weight_factor();
            param_slot::<F, Ix2>(grad).zip_mut_with(grad_weight, |grad, &of_weight| {
                *grad += F::from_f64(factor * of_weight);
            });
        }
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
        Err(Error::config("keys", "numbers whose squares and sums are finite", "larger numbers"))
    }

    /// Computes the sums over keys; values have all columns.
    fn sums_of(&self, keys: Array2<f64>, values: Array2<f64>) -> Result<KeySums<f64>> {
        let queries = Array2::zeros((0, self.map.head_dim));
        let inputs = Inputs::dense(queries.view(), keys.view(), values.view())?;
        let problem = self.map.problem(&inputs, (0..keys.nrows()).collect())?;
        let sums = f64::sum_keys(&problem, level()).into_iter().next();
        sums.ok_or_else(|| Error::config("heads", "one head", "none"))
    }

    /// Records the rounding error of the sums before a removal, which may be as large as the sums after
    /// it.
    fn note_rounding(&mut self) {
        let KeySums { totals, sums, stride, .. } = &mut self.sums;
        // Exponents are bitwise identical to those when the keys were added.
        for (row, total) in sums.chunks_exact_mut(*stride).zip(totals) {
            let row = &mut row[self.value_dim..];
            row[ROUNDING] += f64::EPSILON * total.abs();
            row[ROUNDING_OF_MAGNITUDE] += f64::EPSILON * row[MAGNITUDE].abs();
        }
    }

    /// Returns the largest possible rounding errors in the sums of a query with features 1, for keys and
    /// for magnitudes.
    fn largest_rounding(&self) -> [f64; 2] {
        let rows = || self.sums.sums.chunks_exact(self.sums.stride);
        [ROUNDING, ROUNDING_OF_MAGNITUDE].map(|c| rows().map(|row| row[self.value_dim + c]).sum())
    }
}

/// The gradient of a loss with respect to the sums of a [`PerformerState`], from
/// [`attend_vjp`](PerformerState::attend_vjp): one number for each of its sums.
#[derive(Clone, Debug, PartialEq)]
pub struct StateGradient<F> {
    /// Relative to the shifts of the state.
    sums: KeySums<f64>,
    float: PhantomData<F>,
}

impl<F: Float> StateGradient<F> {
    /// Adds the gradient of the same state from other queries.
    ///
    /// # Errors
    /// [`Error::Shape`] if the states have different sizes; [`Error::InvalidArgument`] if their largest keys differ.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        let shape = |sums: &KeySums<f64>| [sums.shifts.len(), sums.stride];
        check_shape("other", &shape(&self.sums), &shape(&other.sums))?;
        if self.sums.shifts != other.sums.shifts {
            let expected = "the gradient of the same state";
            return Err(Error::config("other", expected, "that of a state with other keys"));
        }
        self.sums.add(&other.sums, 1.0);
        Ok(())
    }
}

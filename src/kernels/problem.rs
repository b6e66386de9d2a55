//! The inputs of softmax attention in the form that the kernels take.

use super::normalizer::Normalizer;
use super::score::Scoring;
use crate::element::{all_finite, try_zeros};
use crate::error::{Channel, Error, Result, check_shape};
use crate::inputs::{Bias, Inputs, Pair, Pattern, head_columns};
use crate::kernels::Float;
use crate::score::ScoreFunction;
use ndarray::{Array2, ArrayView2};
use std::borrow::Cow;
use std::ops::Range;

/// The checked inputs of exact softmax attention, with rows as slices.
#[derive(Debug)]
pub struct Problem<'a, F: Float> {
    pub(crate) inputs: Inputs<'a, F>,
    pub(crate) query: Rows<'a, F>,
    pub(crate) key: Rows<'a, F>,
    pub(crate) value: Rows<'a, F>,
    pub(crate) heads: usize,
    /// The number of columns per head of queries and keys.
    pub(crate) key_dim: usize,
    /// The number of columns per head of values.
    pub(crate) value_dim: usize,
    pub(crate) scale: F,
    pub(crate) bias: Option<Bias<'a, F>>,
    /// The function of the logits, if there is one.
    pub(crate) scoring: Option<Scoring<'a, F>>,
    /// Whether passes by row leave out pairs that the bias hides from all heads, as they do for a mask.
    pub(crate) skips_hidden: bool,
}

impl<'a, F: Float> Problem<'a, F> {
    /// Creates a problem. `scale` multiplies the dot products; `None` is 1/√d.
    pub(crate) fn new(inputs: &Inputs<'a, F>, scale: Option<f64>) -> Result<Self> {
        let heads = inputs.num_heads();
        let key_dim = inputs.query().ncols() / heads;
        let key_shape = [inputs.num_keys(), inputs.num_kv_heads() * key_dim];
        check_shape("key", &key_shape, inputs.key().shape())?;
        if let Some(bias) = inputs.bias() {
            bias.check_heads(heads)?;
        }
        inputs.check_pair_weights(heads)?;
        // Without columns every dot product is 0, so any finite scale will do.
        let scale = scale.unwrap_or(1.0 / (key_dim.max(1) as f64).sqrt());
        check_scale(F::from_f64(scale).as_f64())?;
        Ok(Self {
            inputs: *inputs,
            query: Rows::new("query", inputs.query())?,
            key: Rows::new("key", inputs.key())?,
            value: Rows::new("value", inputs.value())?,
            heads,
            key_dim,
            value_dim: inputs.value().ncols() / inputs.num_kv_heads(),
            scale: F::from_f64(scale),
            bias: inputs.bias(),
            scoring: None,
            skips_hidden: false,
        })
    }

    /// Sets the function of the logits.
    pub(crate) fn with_score(mut self, score: &'a impl ScoreFunction<F>) -> Result<Self> {
        if score.changes_logits() {
            self.scoring = Some(Scoring::new(&self.inputs, score)?);
        }
        Ok(self)
    }

    /// Returns the head of keys and values that a query head reads.
    #[inline]
    pub(crate) fn kv_head(&self, head: usize) -> usize {
        head * self.inputs.num_kv_heads() / self.heads
    }

    #[inline]
    pub(crate) fn query(&self, query: usize, head: usize) -> &[F] {
        &self.query.row(query)[head_columns(head, self.key_dim)]
    }

    /// Returns the part of a key that a query head reads.
    #[inline]
    pub(crate) fn key(&self, key: usize, head: usize) -> &[F] {
        &self.key.row(key)[head_columns(self.kv_head(head), self.key_dim)]
    }

    /// Returns the part of a value that a query head reads.
    #[inline]
    pub(crate) fn value(&self, key: usize, head: usize) -> &[F] {
        &self.value.row(key)[head_columns(self.kv_head(head), self.value_dim)]
    }

    /// Returns whether mask, causal pattern, window or bias may hide pairs of dense inputs.
    pub(crate) fn may_hide(&self) -> bool {
        let inputs = &self.inputs;
        inputs.has_mask()
            || inputs.causal_alignment().is_some()
            || inputs.has_window()
            || self.bias.is_some()
    }

    /// Returns the additive logit of a pair; `None` if it hides the pair from this head, which must then be
    /// skipped.
    #[inline]
    pub(crate) fn bias_of(&self, pair: Pair, head: usize) -> Option<F> {
        let bias = self.bias.map_or(F::zero(), |bias| bias.at(pair, head));
        (bias != F::neg_infinity()).then_some(bias)
    }

    /// Returns the number of keys that causal pattern and window leave to a range of queries of dense inputs.
    pub(crate) fn num_visible_keys(&self, queries: &Range<usize>) -> usize {
        let start = self.inputs.first_visible_key(queries.start);
        self.inputs.num_visible_keys(queries.end - 1).saturating_sub(start)
    }

    /// Returns a pair of dense inputs.
    #[inline]
    pub(crate) fn dense_pair(&self, query: usize, key: usize) -> Pair {
        debug_assert!(matches!(self.inputs.pattern(), Pattern::Dense));
        Pair { query, key, index: query * self.inputs.num_keys() + key }
    }

    /// Returns the additive logit of a pair of dense inputs; `None` if anything hides it from this head.
    #[inline]
    pub(crate) fn dense_bias(&self, pair: Pair, head: usize) -> Option<F> {
        if self.inputs.sees(pair) { self.bias_of(pair, head) } else { None }
    }

    /// Returns the number of multiplications of the dot products and weighted sums over all pairs.
    pub(crate) fn work(&self) -> usize {
        let columns = self.heads.saturating_mul(self.key_dim + self.value_dim);
        self.inputs.num_pairs_in_window().saturating_mul(columns)
    }

    /// Returns the factor of the weight of a pair: that of dropout times the weight of the pair.
    #[inline]
    pub(crate) fn multiplier(&self, pair: Pair, head: usize) -> F {
        let dropout = self.inputs.dropout_multiplier(pair, head);
        dropout * self.pair_weight(pair, head)
    }

    /// Overwrites the [`multiplier`](Self::multiplier)s of some pairs, head by head: a head has `stride` places.
    #[inline(never)]
    pub(crate) fn multipliers(&self, pairs: &[Pair], multipliers: &mut [F], stride: usize) {
        for (t, &pair) in pairs.iter().enumerate() {
            let dropout = self.inputs.pair_dropout(pair);
            for (head, multiplier) in multipliers[t..].iter_mut().step_by(stride).enumerate() {
                let dropout = dropout.map_or(F::one(), |dropout| dropout.multiplier(head));
                *multiplier = dropout * self.pair_weight(pair, head);
            }
        }
    }

    /// Returns the weight of a pair, for a product with its attention weight; 1 without weights of pairs.
    #[inline]
    pub(crate) fn pair_weight(&self, pair: Pair, head: usize) -> F {
        self.unless_hidden(self.inputs.pair_weight(pair, head), pair, head)
    }

    /// Returns a number of a pair and head, or 0 in place of infinities and NaN if the pair is hidden, so that
    /// a product with its weight, which is 0, is 0.
    #[inline]
    pub(crate) fn unless_hidden(&self, number: F, pair: Pair, head: usize) -> F {
        let may_leak = !number.is_finite();
        let is_hidden = || !self.inputs.sees(pair) || self.bias_of(pair, head).is_none();
        if may_leak && is_hidden() { F::zero() } else { number }
    }

    /// Whether any [`multiplier`](Self::multiplier) may differ from 1.
    pub(crate) fn has_multipliers(&self) -> bool {
        self.has_dropout() || self.has_pair_weights()
    }

    pub(crate) fn has_pair_weights(&self) -> bool {
        self.inputs.has(Channel::PairWeights)
    }

    pub(crate) fn has_dropout(&self) -> bool {
        self.inputs.dropout().is_some()
    }

    /// Whether a pass by row visits a pair.
    #[inline]
    pub(crate) fn visits(&self, pair: Pair) -> bool {
        let is_shown = |head| self.bias_of(pair, head).is_some();
        self.inputs.sees(pair) && (!self.skips_hidden || (0..self.heads).any(is_shown))
    }
}

/// The inputs of a backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'u, F> {
    /// The outputs of the forward pass, and its normalizer.
    pub(crate) out: Slices<'u, F>,
    pub(crate) normalizer: &'u Normalizer<F>,
    pub(crate) grad_out: Slices<'u, F>,
    /// With respect to the log-sum-exp, queries × heads; `None` is zeros.
    pub(crate) grad_log_sum_exp: Option<Slices<'u, F>>,
    /// Only read by the passes that go row by row.
    pub(crate) grad_weights: Option<&'u WeightGradients<F>>,
}

impl<F: Float> Upstream<'_, F> {
    /// Returns what is added to g·o in δ of ds = p (dp − δ).
    ///
    /// ```text
    /// ∂L/∂s = p, so a gradient h of L = m + log l adds p h to ds: it is −h in δ
    /// ```
    #[inline(always)]
    pub(crate) fn more_delta(&self, query: usize, head: usize) -> F {
        let of_weights = self.grad_weights.map(|grads| grads.deltas[[query, head]]);
        let of_log_sum_exp = self.grad_log_sum_exp.map(|grads| -grads.row(query)[head]);
        of_weights.unwrap_or(F::zero()) + of_log_sum_exp.unwrap_or(F::zero())
    }
}

/// The gradient of a loss with respect to the attention weights before dropout.
#[derive(Debug)]
pub(crate) struct WeightGradients<F> {
    /// Pairs × heads, in the caller's order; 0 for weights of 0.
    pub(crate) grads: Array2<F>,
    /// Σ p dp, queries × heads.
    pub(crate) deltas: Array2<F>,
}

impl<F: Float> WeightGradients<F> {
    /// Computes the deltas from the weights and their gradient.
    pub(crate) fn new(
        inputs: &Inputs<'_, F>,
        weights: &Array2<F>,
        grads: ArrayView2<'_, F>,
    ) -> Result<Self> {
        check_shape("grad_weights", weights.shape(), grads.shape())?;
        let mut kept = try_zeros("grad_weights", weights.nrows(), weights.ncols())?;
        let mut deltas = try_zeros("deltas", inputs.num_queries(), weights.ncols())?;
        for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
            for (head, &weight) in weights.row(pair.index).indexed_iter() {
                // The bias may hide a pair, and the entropy of a weight of 0 has an infinite gradient, and
                // none after the softmax.
                if weight != F::zero() {
                    let grad = grads[[pair.index, head]];
                    kept[[pair.index, head]] = grad;
                    deltas[[pair.query, head]] += weight * grad;
                }
            }
        }
        Ok(Self { grads: kept, deltas })
    }

    /// Adds the gradients of the weights of `pairs` to `grads`.
    #[inline]
    pub(crate) fn add_to(&self, grads: &mut [F], pairs: &[Pair], head: usize) {
        for (grad, pair) in grads.iter_mut().zip(pairs) {
            *grad += self.grads[[pair.index, head]];
        }
    }
}

/// Returns the number of output columns of softmax attention.
pub(crate) fn output_dim<F: Float>(inputs: &Inputs<'_, F>) -> usize {
    (inputs.value().ncols() / inputs.num_kv_heads()).saturating_mul(inputs.num_heads())
}

/// Checks that the scale of the logits is finite.
pub(crate) fn check_scale(scale: f64) -> Result<()> {
    if scale.is_finite() { Ok(()) } else { Err(Error::config("scale", "a finite number", scale)) }
}

/// A matrix as one slice in row-major order: borrowed if it is contiguous, else copied.
#[derive(Clone, Debug)]
pub struct Rows<'a, F: Clone> {
    data: Cow<'a, [F]>,
    columns: usize,
}

impl<'a, F: Float> Rows<'a, F> {
    pub(crate) fn new(what: &'static str, matrix: ArrayView2<'a, F>) -> Result<Self> {
        let (rows, columns) = matrix.dim();
        if let Some(data) = matrix.to_slice() {
            return Ok(Self { data: data.into(), columns });
        }
        let mut copy = try_zeros(what, rows, columns)?;
        copy.assign(&matrix);
        Ok(Self::from(copy))
    }

    /// Creates rows from an owned matrix, without a copy if it is contiguous.
    pub(crate) fn owned(what: &'static str, matrix: Array2<F>) -> Result<Self> {
        let (rows, columns) = matrix.dim();
        if matrix.is_standard_layout() {
            let len = matrix.len();
            let (mut data, offset) = matrix.into_raw_vec_and_offset();
            // Elements sliced off an owned matrix are still in its memory.
            data.drain(..offset.unwrap_or(0));
            data.truncate(len);
            return Ok(Self { data: data.into(), columns });
        }
        let mut copy = try_zeros(what, rows, columns)?;
        copy.assign(&matrix);
        Ok(Self::from(copy))
    }

    /// Adds rows of the same length after the first `len`.
    pub(crate) fn extend(
        &mut self,
        what: &'static str,
        len: usize,
        more: ArrayView2<'_, F>,
    ) -> Result<()> {
        let data = self.data.to_mut();
        if data.try_reserve(more.len()).is_err() {
            let shape = vec![len + more.nrows(), self.columns];
            return Err(Error::TooLarge { what, shape });
        }
        data.extend(more.iter().copied());
        Ok(())
    }

    #[inline]
    pub(crate) fn row(&self, row: usize) -> &[F] {
        self.slices().row(row)
    }

    /// Returns consecutive rows as one slice.
    #[inline]
    pub(crate) fn rows(&self, rows: Range<usize>) -> &[F] {
        &self.data[rows.start * self.columns..rows.end * self.columns]
    }

    #[inline]
    pub(crate) fn slices(&self) -> Slices<'_, F> {
        Slices { data: &self.data, columns: self.columns }
    }
}

impl<F: Float> From<Array2<F>> for Rows<'_, F> {
    /// The matrix must have been allocated in row-major order.
    fn from(matrix: Array2<F>) -> Self {
        let columns = matrix.ncols();
        Self { data: matrix.into_raw_vec_and_offset().0.into(), columns }
    }
}

/// A borrowed matrix as one slice in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct Slices<'r, F> {
    pub(crate) data: &'r [F],
    pub(crate) columns: usize,
}

impl<'r, F> Slices<'r, F> {
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> &'r [F] {
        &self.data[row * self.columns..][..self.columns]
    }
}

/// A matrix with zeros in place of infinities and NaN, and the rows that had any.
///
/// A product over a tile multiplies the rows of hidden pairs by zero, which is equivalent to skipping
/// them only if the rows are finite. So the product is computed with finite rows, and what infinities
/// and NaN contribute to the pairs that see them is added afterwards, entry by entry.
#[derive(Debug)]
pub(crate) struct FiniteRows<'r, F: Clone> {
    /// In row-major order, with zeros in place of infinities and NaN.
    pub(crate) data: Cow<'r, [F]>,
    pub(crate) columns: usize,
    /// The rows that contain infinities or NaN, ascending.
    pub(crate) bad: Vec<usize>,
}

impl<'r, F: Float> FiniteRows<'r, F> {
    /// Keeps the rows unchanged if `may_hide` is false: then no product has a hidden pair.
    pub(crate) fn new(rows: Slices<'r, F>, may_hide: bool) -> Self {
        let Slices { data, columns } = rows;
        let mut data = Cow::Borrowed(data);
        let mut bad = Vec::new();
        if may_hide && !all_finite(&data) {
            for (row, values) in data.to_mut().chunks_mut(columns.max(1)).enumerate() {
                if values.iter().any(|value| !value.is_finite()) {
                    bad.push(row);
                    let zero = |value: &mut F| *value = F::zero();
                    values.iter_mut().filter(|value| !value.is_finite()).for_each(zero);
                }
            }
        }
        Self { data, columns, bad }
    }

    #[inline]
    pub(crate) fn slices(&self) -> Slices<'_, F> {
        Slices { data: &self.data, columns: self.columns }
    }
}

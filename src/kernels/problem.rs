//! Softmax attention laid out for the kernels.

use crate::dropout::Dropout;
use crate::error::{Error, Result, check_shape};
use crate::float::Float;
use crate::inputs::{Bias, Inputs, Pair, head_columns};
use ndarray::{ArrayView2, CowArray, Ix2};

/// Inputs of exact softmax attention, checked, with every row a slice.
pub(crate) struct Problem<'a, F: Float> {
    pub(crate) inputs: Inputs<'a, F>,
    query: Rows<'a, F>,
    key: Rows<'a, F>,
    value: Rows<'a, F>,
    pub(crate) heads: usize,
    /// Columns of a head of the queries and keys.
    pub(crate) key_dim: usize,
    /// Columns of a head of the values.
    pub(crate) value_dim: usize,
    pub(crate) scale: F,
    pub(crate) bias: Option<Bias<'a, F>>,
    pub(crate) dropout: Option<Dropout>,
}

impl<'a, F: Float> Problem<'a, F> {
    /// `scale` multiplies the dot products; `None` is 1/√d.
    pub(crate) fn new(inputs: &Inputs<'a, F>, scale: Option<f64>) -> Result<Self> {
        let heads = inputs.heads();
        let key_dim = inputs.query().ncols() / heads;
        let key_shape = [inputs.num_keys(), inputs.kv_heads() * key_dim];
        check_shape("key", &key_shape, inputs.key().shape())?;
        if let Some(bias) = inputs.bias() {
            bias.check_heads(heads)?;
        }
        Ok(Self {
            inputs: *inputs,
            query: Rows::new(inputs.query()),
            key: Rows::new(inputs.key()),
            value: Rows::new(inputs.value()),
            heads,
            key_dim,
            value_dim: inputs.value().ncols() / inputs.kv_heads(),
            // Without columns every dot product is 0, whatever its scale: only keep it finite.
            scale: F::of(scale.unwrap_or(1.0 / (key_dim.max(1) as f64).sqrt())),
            bias: inputs.bias(),
            dropout: inputs.dropout(),
        })
    }

    /// The head of keys and values that a query head reads.
    #[inline]
    pub(crate) fn kv_head(&self, head: usize) -> usize {
        head * self.inputs.kv_heads() / self.heads
    }

    #[inline]
    pub(crate) fn query(&self, query: usize, head: usize) -> &[F] {
        &self.query.row(query)[head_columns(head, self.key_dim)]
    }

    /// The part of a key that a query head reads.
    #[inline]
    pub(crate) fn key(&self, key: usize, head: usize) -> &[F] {
        &self.key.row(key)[head_columns(self.kv_head(head), self.key_dim)]
    }

    /// The part of a value that a query head reads.
    #[inline]
    pub(crate) fn value(&self, key: usize, head: usize) -> &[F] {
        &self.value.row(key)[head_columns(self.kv_head(head), self.value_dim)]
    }

    /// The bias of a pair, `None` where it hides the pair: such a pair is skipped.
    #[inline]
    pub(crate) fn bias_of(&self, pair: Pair, head: usize) -> Option<F> {
        let bias = self.bias.map_or(F::zero(), |bias| bias.at(pair, head));
        (bias != F::neg_infinity()).then_some(bias)
    }

    /// What dropout multiplies the weight of a pair by.
    #[inline]
    pub(crate) fn multiplier(&self, pair: usize, head: usize) -> F {
        (self.dropout).map_or(F::one(), |dropout| dropout.multiplier(pair, head))
    }
}

/// The number of output columns of softmax attention.
pub(crate) fn output_dim<F: Float>(inputs: &Inputs<'_, F>) -> usize {
    (inputs.value().ncols() / inputs.kv_heads()).saturating_mul(inputs.heads())
}

/// `Ok` for a usable scale of the logits.
pub(crate) fn check_scale(scale: f64) -> Result<()> {
    if scale.is_finite() { Ok(()) } else { Err(Error::config("scale", "a finite number", scale)) }
}

/// A matrix whose rows are slices: the caller's where they can be, else of a copy.
struct Rows<'a, F>(CowArray<'a, F, Ix2>);

impl<'a, F: Float> Rows<'a, F> {
    fn new(matrix: ArrayView2<'a, F>) -> Self {
        let rows_are_slices = matrix.ncols() <= 1 || matrix.strides()[1] == 1;
        Self(if rows_are_slices {
            matrix.into()
        } else {
            matrix.as_standard_layout().into_owned().into()
        })
    }

    #[inline]
    fn row(&self, row: usize) -> &[F] {
        self.0.row(row).to_slice().expect("rows have unit stride")
    }
}

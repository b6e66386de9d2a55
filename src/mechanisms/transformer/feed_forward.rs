//! The feed-forward network.

use super::{BLOCK, HIDDEN, PARTS};
use crate::element::try_zeros;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::parallel::{self, parts, row_chunks};
use crate::rowwise::{Activation, Linear};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewMut2, Axis};

/// What the activation of an entry costs, in multiplications.
const WORK: usize = 40;

/// f = hidden W₂ᵀ + b₂, where hidden = φ(x W₁ᵀ + b₁), or φ(u) ⊙ v with gates and (u ‖ v) = x W₁ᵀ + b₁.
#[derive(Clone, Debug)]
pub(super) struct FeedForward<F> {
    pub(super) activation: Activation,
    pub(super) is_gated: bool,
    pub(super) linear1: Linear<F>,
    pub(super) linear2: Linear<F>,
}

/// What the backward pass needs of a forward pass.
pub(super) struct Hidden<F> {
    /// After dropout.
    pub(super) values: Array2<F>,
    /// The derivative of an entry of `values` by each of its one or two entries of x W₁ᵀ + b₁.
    slopes: Array2<F>,
}

impl<F: Float> FeedForward<F> {
    /// Overwrites `out` with f, and returns the hidden values.
    pub(super) fn forward_into(
        &self,
        x: ArrayView2<'_, F>,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Hidden<F>> {
        let mut slopes = self.linear1.forward(x)?;
        let (rows, columns) = (x.nrows(), self.linear2.weight().ncols());
        let mut values = try_zeros("hidden", rows, columns)?;
        let parts = parts(rows, BLOCK, PARTS);
        let lens = || parts.iter().map(|part| part.len());
        let work = values.len().saturating_mul(WORK);
        let arrays =
            row_chunks(values.view_mut(), lens()).zip(row_chunks(slopes.view_mut(), lens()));
        let tasks: Vec<_> = parts.iter().cloned().zip(arrays).collect();
        parallel::for_each(tasks, work, |(queries, (mut values, mut slopes))| {
            let rows = values.rows_mut().into_iter().zip(slopes.rows_mut());
            for (query, (mut values, mut slopes)) in queries.zip(rows) {
                let values = values.as_slice_mut().expect("a row of our own");
                let slopes = slopes.as_slice_mut().expect("a row of our own");
                self.activate(values, slopes);
                let Some((dropout, number)) = inputs.dropout_of_row(query) else { continue };
                let dropout = dropout.of_place(HIDDEN).of_pair::<F>(number);
                for (column, value) in values.iter_mut().enumerate() {
                    let factor = dropout.multiplier(column);
                    *value *= factor;
                    for slope in slopes.iter_mut().skip(column).step_by(columns) {
                        *slope *= factor;
                    }
                }
            }
        });
        self.linear2.forward_into(values.view(), out)?;
        Ok(Hidden { values, slopes })
    }

    /// Overwrites a row of x W₁ᵀ + b₁ with the slopes, and `values` with the hidden values.
    fn activate(&self, values: &mut [F], slopes: &mut [F]) {
        let (slopes, gates) = slopes.split_at_mut(values.len());
        if self.is_gated {
            for ((value, slope), gate) in values.iter_mut().zip(slopes).zip(gates) {
                let [at, slope_at] = self.activation.value_and_slope(slope.as_f64());
                let by = gate.as_f64();
                *value = F::from_f64(at * by);
                *slope = F::from_f64(slope_at * by);
                *gate = F::from_f64(at);
            }
        } else {
            for (value, slope) in values.iter_mut().zip(slopes) {
                let [at, slope_at] = self.activation.value_and_slope(slope.as_f64());
                *value = F::from_f64(at);
                *slope = F::from_f64(slope_at);
            }
        }
    }

    /// Adds the gradients of ⟨grad_out, f⟩ to those of x and of the parameters, W₁ and b₁ first.
    pub(super) fn backward_into(
        &self,
        x: ArrayView2<'_, F>,
        hidden: &Hidden<F>,
        grad_out: ArrayView2<'_, F>,
        grad_x: ArrayViewMut2<'_, F>,
        params: &mut [ArrayD<F>],
    ) -> Result<()> {
        let Hidden { values, slopes } = hidden;
        let (of_linear1, of_linear2) = params.split_at_mut(params.len() / 2);
        let (rows, columns) = values.dim();
        let mut grad_hidden = try_zeros("grad_hidden", rows, columns)?;
        let grad = Some(grad_hidden.view_mut());
        self.linear2.backward_into(values.view(), grad_out, grad, of_linear2)?;
        let mut grad_before = slopes.clone();
        for mut half in grad_before.axis_chunks_iter_mut(Axis(1), columns) {
            // Where the loss does not depend on a value, a NaN in its slope is not read.
            half.zip_mut_with(&grad_hidden, |slope, &grad| {
                *slope = if grad == F::zero() { grad } else { *slope * grad };
            });
        }
        self.linear1.backward_into(x, grad_before.view(), Some(grad_x), of_linear1)
    }

    /// The shapes of the arrays in [`Hidden`], for so many rows.
    pub(super) fn shapes(&self, rows: usize) -> [[usize; 2]; 2] {
        [[rows, self.linear2.weight().ncols()], [rows, self.linear1.weight().nrows()]]
    }
}

impl<F: Float> Hidden<F> {
    pub(super) fn arrays(&self) -> [&Array2<F>; 2] {
        [&self.values, &self.slopes]
    }
}

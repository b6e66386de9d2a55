//! `f32` inputs with points so far out that they must be processed in `f64`.

use super::Poincare;
use crate::attention::{Attention, Saved};
use crate::element::try_array;
use crate::error::Result;
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::Inputs;
use crate::kernels::Float;
use ndarray::{
    Array, Array2, Array3, ArrayView, ArrayView2, ArrayViewMut, ArrayViewMut2, Dimension,
};

/// A mechanism and the arrays of its inputs, in `f64`.
pub(super) struct Wide {
    poincare: Poincare<f64>,
    query: Array2<f64>,
    key: Array2<f64>,
    value: Array2<f64>,
    bias: Option<Array3<f64>>,
}

impl Wide {
    pub(super) fn new<F: Float>(poincare: &Poincare<F>, inputs: &Inputs<'_, F>) -> Result<Self> {
        Ok(Self {
            poincare: Poincare {
                config: poincare.config.clone(),
                raw_curvature: poincare.raw_curvature.as_ref().map(|raw| raw.mapv(F::as_f64)),
                raw_temperature: (poincare.raw_temperature.as_ref()).map(|raw| raw.mapv(F::as_f64)),
            },
            query: wide("query", inputs.query())?,
            key: wide("key", inputs.key())?,
            value: wide("value", inputs.value())?,
            bias: inputs.logits().map(|logits| wide("bias", logits)).transpose()?,
        })
    }

    fn inputs<'w, F: Float>(&'w self, inputs: &Inputs<'w, F>) -> Result<Inputs<'w, f64>> {
        let bias = self.bias.as_ref().map(|bias| bias.view());
        inputs.in_precision(self.query.view(), self.key.view(), self.value.view(), bias)
    }

    /// Overwrites `out`.
    pub(super) fn forward<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        let (wide, saved) = self.poincare.forward_train(&self.inputs(inputs)?)?;
        out.zip_mut_with(&wide, |out, &wide| *out = F::from_f64(wide));
        Ok(saved)
    }

    pub(super) fn attention_weights<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        Ok(self.poincare.attention_weights(&self.inputs(inputs)?)?.mapv(F::from_f64))
    }

    pub(super) fn backward<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let grad_out = grad_out.mapv(F::as_f64);
        let wide = self.poincare.backward(&self.inputs(inputs)?, saved, grad_out.view())?;
        add_all(grads, wide);
        Ok(())
    }

    pub(super) fn weights_backward<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let grad_weights = grad_weights.mapv(F::as_f64);
        let inputs = self.inputs(inputs)?;
        let wide = self.poincare.attention_weights_backward(&inputs, grad_weights.view())?;
        add_all(grads, wide);
        Ok(())
    }
}

fn add_all<F: Float>(grads: GradientsMut<'_, F>, mut wide: Gradients<f64>) {
    add(grads.query, &wide.query);
    add(grads.key, &wide.key);
    add(grads.value, &wide.value);
    if let Some(bias) = wide.view_mut().bias {
        add(grads.bias, &bias.to_owned());
    }
    for (grad, wide) in grads.params.iter_mut().zip(&wide.params) {
        add(Some(grad.view_mut()), wide);
    }
}

/// The same numbers in `f64`.
fn wide<F: Float, D: Dimension>(
    what: &'static str,
    array: ArrayView<'_, F, D>,
) -> Result<Array<f64, D>> {
    let mut wide = try_array(what, array.raw_dim(), 0.0)?;
    wide.zip_mut_with(&array, |wide, x| *wide = x.as_f64());
    Ok(wide)
}

fn add<F: Float, D: Dimension>(grad: Option<ArrayViewMut<'_, F, D>>, wide: &Array<f64, D>) {
    if let Some(mut grad) = grad {
        grad.zip_mut_with(wide, |grad, &wide| *grad += F::from_f64(wide));
    }
}

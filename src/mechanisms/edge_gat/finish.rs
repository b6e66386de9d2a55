//! What follows the softmax: averaged heads, residual, gate and bias.

use super::{EdgeGat, ParamGradients};
use crate::element::{sigmoid, try_zeros};
use crate::error::Result;
use crate::gradients::GradientsMut;
use crate::inputs::Inputs;
use crate::kernels::Float;
use ndarray::{
    Array1, Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix1, Ix2, Zip, concatenate, s,
};

/// The outputs of the heads: o before the residual, the residual, and β.
struct Gated<F> {
    attention: Array2<F>,
    residual: Array2<F>,
    beta: Array1<F>,
}

impl<F: Float> EdgeGat<F> {
    /// Joins the heads and computes the gate, if there is one.
    fn gated(
        &self,
        inputs: &Inputs<'_, F>,
        context: ArrayView2<'_, F>,
    ) -> Result<Option<Gated<F>>> {
        if !self.config.gate {
            return Ok(None);
        }
        let mut attention = try_zeros("attention", context.nrows(), self.config.output_columns())?;
        self.join_heads(context, attention.view_mut());
        let residual = self.linear(inputs.query(), self.names.residual)?;
        let features = gate_features(&attention, &residual);
        let logits = F::linear(features.view(), self.weight("lin_beta.weight"), None)?;
        let beta = logits.index_axis_move(Axis(1), 0).mapv(sigmoid);
        Ok(Some(Gated { attention, residual, beta }))
    }

    fn join_heads(&self, context: ArrayView2<'_, F>, mut joined: ArrayViewMut2<'_, F>) {
        if !self.config.average_heads {
            joined.assign(&context);
            return;
        }
        joined.fill(F::zero());
        let factor = F::one() / F::from_f64(self.config.num_heads as f64);
        for head in context.axis_chunks_iter(Axis(1), self.config.head_dim) {
            joined.scaled_add(factor, &head);
        }
    }

    /// Overwrites `out` with the result from the heads' outputs.
    pub(super) fn finish(
        &self,
        inputs: &Inputs<'_, F>,
        context: ArrayView2<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        if let Some(Gated { attention, residual, beta }) = self.gated(inputs, context)? {
            let rows = attention.rows().into_iter().zip(residual.rows()).zip(beta);
            for (mut out, ((attention, residual), beta)) in out.rows_mut().into_iter().zip(rows) {
                Zip::from(&mut out).and(attention).and(residual).for_each(|out, &o, &r| {
                    *out = beta * r + (F::one() - beta) * o;
                });
            }
        } else {
            self.join_heads(context, out.view_mut());
            self.add_residual(inputs, out.view_mut())?;
        }
        self.add_bias(out);
        Ok(())
    }

    pub(super) fn add_residual(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        if !self.config.residual {
            return Ok(());
        }
        let map = self.names.residual;
        F::add_linear(inputs.query(), self.weight(map.weight), self.bias(map), out)
    }

    pub(super) fn add_bias(&self, mut out: ArrayViewMut2<'_, F>) {
        if let Some(bias) = self.param::<Ix1>("bias") {
            out += &bias;
        }
    }

    /// Runs the backward pass of [`finish`](Self::finish): adds the gradients of the bias, the residual and
    /// the gate, and returns that of the context.
    pub(super) fn finish_vjp<'g>(
        &self,
        inputs: &Inputs<'_, F>,
        context: ArrayView2<'_, F>,
        grad_out: ArrayView2<'g, F>,
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<CowArray<'g, F, Ix2>> {
        let mut params = ParamGradients { gat: self, grads: &mut *grads.params };
        if let Some(mut bias) = params.view::<Ix1>("bias") {
            bias += &grad_out.sum_axis(Axis(0));
        }
        let (grad_joined, grad_residual) = match self.gated(inputs, context)? {
            Some(gated) => {
                let grads = self.gate_vjp(&gated, grad_out, &mut params)?;
                let [joined, residual] = grads.map(CowArray::from);
                (joined, residual)
            }
            None => (grad_out.into(), grad_out.into()),
        };
        if self.config.residual {
            let grad_x = grads.query.as_mut().map(|grad| grad.view_mut());
            params.linear(self.names.residual, inputs.query(), grad_residual.view(), grad_x)?;
        }
        if !self.config.average_heads {
            return Ok(grad_joined);
        }
        let mut grad_heads = self.new_context(inputs)?;
        let factor = F::one() / F::from_f64(self.config.num_heads as f64);
        for mut head in grad_heads.axis_chunks_iter_mut(Axis(1), self.config.head_dim) {
            head.scaled_add(factor, &grad_joined);
        }
        Ok(grad_heads.into())
    }

    /// Returns the gradients of o and r in out = β r + (1 − β) o; adds the gradient of the gate.
    fn gate_vjp(
        &self,
        Gated { attention, residual, beta }: &Gated<F>,
        grad_out: ArrayView2<'_, F>,
        params: &mut ParamGradients<'_, '_, F>,
    ) -> Result<[Array2<F>; 2]> {
        let weight = self.weight("lin_beta.weight");
        let difference = residual - attention;
        // β = σ(z), so dβ/dz = β (1 − β).
        let mut grad_logits = try_zeros("gate", attention.nrows(), 1)?;
        let [mut grad_attention, mut grad_residual] = [grad_out.to_owned(), grad_out.to_owned()];
        for (row, &beta) in beta.iter().enumerate() {
            grad_logits[[row, 0]] =
                beta * (F::one() - beta) * grad_out.row(row).dot(&difference.row(row));
            grad_attention.row_mut(row).mapv_inplace(|grad| (F::one() - beta) * grad);
            grad_residual.row_mut(row).mapv_inplace(|grad| beta * grad);
        }
        let features = gate_features(attention, residual);
        let mut grad_features = try_zeros("gate", features.nrows(), features.ncols())?;
        F::linear_params_vjp(
            features.view(),
            grad_logits.view(),
            params.weight("lin_beta.weight"),
            None,
        )?;
        F::linear_input_vjp(weight, grad_logits.view(), grad_features.view_mut())?;
        let out = attention.ncols();
        let [a, r, d] = [0, 1, 2].map(|n| grad_features.slice(s![.., n * out..(n + 1) * out]));
        grad_attention += &(&a + &d);
        grad_residual += &(&r - &d);
        Ok([grad_attention, grad_residual])
    }
}

/// \[o, r, o − r\] side by side.
fn gate_features<F: Float>(attention: &Array2<F>, residual: &Array2<F>) -> Array2<F> {
    let difference = attention - residual;
    concatenate(Axis(1), &[attention.view(), residual.view(), difference.view()])
        .expect("all have one shape")
}

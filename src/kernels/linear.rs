//! Affine maps of rows: the projections of mechanisms that have some.

use crate::error::Result;
use crate::float::{Float, try_zeros};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, CowArray};

/// Overwrites `out` with x Wᵀ + b, for `weight` W of outputs × inputs as PyTorch has it.
pub(crate) fn linear_into<F: Float>(
    x: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    bias: Option<ArrayView1<'_, F>>,
    mut out: ArrayViewMut2<'_, F>,
) {
    match bias {
        Some(bias) => out.rows_mut().into_iter().for_each(|mut row| row.assign(&bias)),
        None => out.fill(F::zero()),
    }
    general_mat_mul(F::one(), &x, &weight.t(), F::one(), &mut out);
}

/// x Wᵀ + b.
pub(crate) fn linear<F: Float>(
    x: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    bias: Option<ArrayView1<'_, F>>,
) -> Result<Array2<F>> {
    let mut out = try_zeros("projection", x.nrows(), weight.nrows())?;
    linear_into(x, weight, bias, out.view_mut());
    Ok(out)
}

/// y = x Wᵀ + b, so with g the gradient of y: grad_x += g W.
pub(crate) fn linear_input_vjp<F: Float>(
    weight: ArrayView2<'_, F>,
    grad_out: ArrayView2<'_, F>,
    mut grad_x: ArrayViewMut2<'_, F>,
) {
    general_mat_mul(F::one(), &grad_out, &weight, F::one(), &mut grad_x);
}

/// y = x Wᵀ + b, so with g the gradient of y: grad_W += gᵀ x, grad_b += Σ_rows g.
///
/// A row of x that the loss does not depend on (g = 0: a masked key, say) is skipped: NaN in it
/// does not reach grad_W.
pub(crate) fn linear_params_vjp<F: Float>(
    x: ArrayView2<'_, F>,
    grad_out: ArrayView2<'_, F>,
    mut grad_weight: ArrayViewMut2<'_, F>,
    grad_bias: Option<ArrayViewMut1<'_, F>>,
) {
    let mut x = CowArray::from(x);
    for (row, grad) in grad_out.rows().into_iter().enumerate() {
        let is_finite = x.row(row).iter().all(|value| value.is_finite());
        if !is_finite && grad.iter().all(|&grad| grad == F::zero()) {
            x.row_mut(row).fill(F::zero());
        }
    }
    general_mat_mul(F::one(), &grad_out.t(), &x, F::one(), &mut grad_weight);
    if let Some(mut grad_bias) = grad_bias {
        grad_bias += &grad_out.sum_axis(Axis(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn only_rows_without_a_gradient_are_skipped() {
        let x = array![[f64::NAN, 1.0], [2.0, f64::INFINITY], [3.0, 0.0]];
        let weight_gradient = |grad_out: Array2<f64>| {
            let mut grad = Array2::zeros((1, 2));
            linear_params_vjp(x.view(), grad_out.view(), grad.view_mut(), None);
            grad
        };
        assert_eq!(weight_gradient(array![[0.0], [0.0], [2.0]]), array![[6.0, 0.0]]);
        let touched = weight_gradient(array![[1.0], [0.0], [2.0]]);
        assert!(touched[[0, 0]].is_nan() && touched[[0, 1]] == 1.0);
    }
}

//! Layer norm and RMS norm of rows.
//!
//! Statistics and results are computed in `f64`, and rows of huge numbers are scaled down first, so no sum
//! overflows.

use super::parallel::{self, parts, row_chunks};
use super::problem::Rows;
use crate::error::Result;
use crate::float::{Float, try_zeros};
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};

/// The largest number of parts, in whole blocks, in which rows are distributed to threads.
const PARTS: usize = 16;
const BLOCK: usize = 32;

/// The gradients of weight and bias are sums over rows, in at most this many parts, which are added in order.
const SUMS: usize = 4;

/// What a normalised entry costs, in multiplications.
const WORK: usize = 8;

/// y = γ x̂ + β, where x̂ is x divided by its root mean square, after its mean was subtracted if `is_centred`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowNorm<'a, F> {
    pub(crate) is_centred: bool,
    /// Added to the mean square.
    pub(crate) epsilon: f64,
    /// γ
    pub(crate) weight: &'a [F],
    /// β
    pub(crate) bias: Option<&'a [F]>,
}

/// x̂ = (scale · x − mean) · inverse
struct Statistics {
    scale: f64,
    mean: f64,
    inverse: f64,
}

impl Statistics {
    fn of<F: Float>(row: &[F], is_centred: bool, epsilon: f64) -> Self {
        let largest = row.iter().fold(0.0, |largest: f64, x| largest.max(x.as_f64().abs()));
        // A power of two, so that scaling does not round.
        let scale = if largest > 2f64.powi(400) { 2f64.powi(-600) } else { 1.0 };
        let len = row.len() as f64;
        let mean = if is_centred { sum(row, |x| scale * x) / len } else { 0.0 };
        let square = |x: f64| (scale * x - mean) * (scale * x - mean);
        let mut mean_square = sum(row, square) / len + epsilon * scale * scale;
        if mean_square < f64::MIN_POSITIVE {
            mean_square = f64::MIN_POSITIVE; // equal huge numbers; a NaN stays
        }
        Self { scale, mean, inverse: 1.0 / mean_square.sqrt() }
    }

    #[inline(always)]
    fn normalized(&self, x: f64) -> f64 {
        (self.scale * x - self.mean) * self.inverse
    }
}

/// Σ term(x), in several sums that do not wait for each other.
#[inline(always)]
fn sum<F: Float>(row: &[F], term: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += term(x.as_f64());
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += term(x.as_f64());
    }
    sums.iter().sum()
}

/// Overwrites `out` with the normalised rows of x.
pub(crate) fn normalize_into<F: Float>(
    norm: RowNorm<'_, F>,
    x: ArrayView2<'_, F>,
    out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    let work = x.len().saturating_mul(WORK);
    let x = Rows::new("norm", x)?;
    let parts = parts(out.nrows(), BLOCK, PARTS);
    let outs = row_chunks(out, parts.iter().map(|part| part.len()));
    let tasks: Vec<_> = parts.iter().cloned().zip(outs).collect();
    parallel::for_each(tasks, work, |(rows, mut out)| {
        for (row, out) in rows.zip(out.rows_mut()) {
            normalize_row(norm, x.row(row), out);
        }
    });
    Ok(())
}

fn normalize_row<F: Float>(norm: RowNorm<'_, F>, x: &[F], out: ArrayViewMut1<'_, F>) {
    let statistics = Statistics::of(x, norm.is_centred, norm.epsilon);
    let entry = |x: F, weight: F| statistics.normalized(x.as_f64()) * weight.as_f64();
    let entries = out.into_iter().zip(x.iter().zip(norm.weight));
    match norm.bias {
        None => entries.for_each(|(out, (&x, &weight))| *out = F::from_f64(entry(x, weight))),
        Some(bias) => entries.zip(bias).for_each(|((out, (&x, &weight)), bias)| {
            *out = F::from_f64(entry(x, weight) + bias.as_f64());
        }),
    }
}

/// With g the gradient of y: grad_x += the gradient of x, grad_γ += Σ_rows g x̂, grad_β += Σ_rows g.
///
/// ```text
/// ĝ = γ g
/// grad_x = (ĝ − mean(ĝ) − x̂ mean(ĝ x̂)) / deviation      without mean(ĝ) if rows are not centred
/// ```
///
/// A row that the loss does not depend on (g = 0, for example a masked key) is skipped: NaN in it does not
/// reach any gradient.
pub(crate) fn normalize_vjp<F: Float>(
    norm: RowNorm<'_, F>,
    x: ArrayView2<'_, F>,
    grad_out: ArrayView2<'_, F>,
    grad_x: Option<ArrayViewMut2<'_, F>>,
    grad_weight: ArrayViewMut1<'_, F>,
    grad_bias: Option<ArrayViewMut1<'_, F>>,
) -> Result<()> {
    let (num_rows, columns) = x.dim();
    let work = x.len().saturating_mul(2 * WORK);
    let x = Rows::new("norm", x)?;
    let grad_out = Rows::new("norm", grad_out)?;
    let parts = parts(num_rows, BLOCK, SUMS);
    // The sums of each part: a row for γ, and one for β.
    let mut sums: Array2<f64> = try_zeros("norm", 2 * parts.len(), columns)?;
    let of_x: Vec<_> = match grad_x {
        None => parts.iter().map(|_| None).collect(),
        Some(grad_x) => row_chunks(grad_x, parts.iter().map(|part| part.len())).map(Some).collect(),
    };
    let tasks: Vec<_> =
        parts.iter().cloned().zip(of_x).zip(sums.axis_chunks_iter_mut(Axis(0), 2)).collect();
    parallel::for_each(tasks, work, |((rows, mut grad_x), sums)| {
        let (mut of_weight, mut of_bias) = sums.split_at(Axis(0), 1);
        let mut sums = [of_weight.row_mut(0), of_bias.row_mut(0)];
        for (at, row) in rows.enumerate() {
            let grad = grad_out.row(row);
            if grad.iter().any(|&grad| grad != F::zero()) {
                let grad_x = grad_x.as_mut().map(|grad_x| grad_x.row_mut(at));
                normalize_row_vjp(norm, x.row(row), grad, grad_x, &mut sums);
            }
        }
    });
    let add = |mut grad: ArrayViewMut1<'_, F>, first: usize| {
        for part in 0..parts.len() {
            grad.zip_mut_with(&sums.row(2 * part + first), |grad, &sum| *grad += F::from_f64(sum));
        }
    };
    add(grad_weight, 0);
    if let Some(grad_bias) = grad_bias {
        add(grad_bias, 1);
    }
    Ok(())
}

fn normalize_row_vjp<F: Float>(
    norm: RowNorm<'_, F>,
    x: &[F],
    grad: &[F],
    grad_x: Option<ArrayViewMut1<'_, F>>,
    [of_weight, of_bias]: &mut [ArrayViewMut1<'_, f64>; 2],
) {
    let statistics = Statistics::of(x, norm.is_centred, norm.epsilon);
    let entries = || {
        let entries = x.iter().zip(grad).zip(norm.weight);
        entries.map(|((x, grad), weight)| {
            let (normalized, grad) = (statistics.normalized(x.as_f64()), grad.as_f64());
            (normalized, grad, grad * weight.as_f64())
        })
    };
    let (mut mean, mut mean_product) = (0.0, 0.0);
    for ((normalized, grad, weighted), (of_weight, of_bias)) in
        entries().zip(of_weight.iter_mut().zip(of_bias.iter_mut()))
    {
        *of_weight += grad * normalized;
        *of_bias += grad;
        mean += weighted;
        mean_product += weighted * normalized;
    }
    let Some(grad_x) = grad_x else { return };
    let len = x.len() as f64;
    (mean, mean_product) = (if norm.is_centred { mean / len } else { 0.0 }, mean_product / len);
    for (grad_x, (normalized, _, weighted)) in grad_x.into_iter().zip(entries()) {
        let grad = (weighted - mean - normalized * mean_product) * statistics.inverse;
        *grad_x += F::from_f64(grad * statistics.scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, array};

    fn normalized(is_centred: bool, x: &Array2<f64>) -> Array2<f64> {
        let weight = vec![1.0; x.ncols()];
        let norm = RowNorm { is_centred, epsilon: 1e-5, weight: &weight, bias: None };
        let mut out = Array2::zeros(x.raw_dim());
        normalize_into(norm, x.view(), out.view_mut()).unwrap();
        out
    }

    #[test]
    fn numbers_of_any_size_are_normalised() {
        let x = array![[3.0, -1.0, 4.0, -2.0], [1.0, 1.0, 1.0, 1.0]];
        for is_centred in [true, false] {
            let expected = normalized(is_centred, &(&x * 1e20));
            for size in [1e100, 1e200, 1e300, 1e307] {
                let out = normalized(is_centred, &(&x * size));
                let same = out.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12);
                assert!(same, "{size}: {out}");
            }
        }
        assert_eq!(normalized(true, &(&x * 1e300)).row(1).sum(), 0.0);
        assert_eq!(normalized(true, &array![[0.0, 0.0]]), array![[0.0, 0.0]]);
    }

    #[test]
    fn nan_and_infinity_stay_in_their_rows() {
        let x = array![[f64::NAN, 1.0], [3.0, 1.0], [f64::INFINITY, 1.0]];
        for is_centred in [true, false] {
            let out = normalized(is_centred, &x);
            assert!(out.row(0).iter().all(|y| y.is_nan()));
            assert!(out.row(1).iter().all(|y| y.is_finite()));
            assert!(out.row(2).iter().any(|y| y.is_nan()));
            // Rows without a gradient are skipped.
            let norm = RowNorm { is_centred, epsilon: 1e-5, weight: &[1.0, 2.0], bias: None };
            let grad_out = array![[0.0, 0.0], [1.0, -3.0], [0.0, 0.0]];
            let (mut grad_x, mut grad_weight) = (Array2::zeros((3, 2)), Array1::zeros(2));
            let views = (grad_x.view_mut(), grad_weight.view_mut());
            normalize_vjp(norm, x.view(), grad_out.view(), Some(views.0), views.1, None).unwrap();
            assert!(grad_x.iter().chain(&grad_weight).all(|grad| grad.is_finite()));
        }
    }
}

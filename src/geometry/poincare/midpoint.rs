//! The weighted midpoint.

use super::ball::{Ball, check_lengths, norm, power_of_two_below, sum};
use crate::error::{Error, Result, check_shape};
use crate::kernels::Float;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Computes the weighted gyromidpoint: the weighted mean of the points on the hyperboloid, projected back
/// onto it.
///
/// ```text
/// m = ½ ⊗ (Σ wⱼ λⱼ xⱼ / Σ wⱼ (λⱼ − 1)) = S/(T + N)        Σ wⱼ xⱼ / Σ wⱼ at c = 0
/// S = Σ wⱼ λⱼ xⱼ,  T = Σ wⱼ (λⱼ − 1),  N² = T² − c|S|²,  λ = 2/(1 − c|·|²)
/// ```
///
/// `points` has one row per weight. In Klein coordinates the result is the Einstein midpoint, on the
/// hyperboloid the Lorentz centroid. Isometries of the ball move it together with the points.
///
/// If the points are far from the origin and close to each other, T and √c|S| agree in nearly all digits;
/// their difference is then computed as Σ wⱼ |√c xⱼ − S/|S||² / (1 − c|xⱼ|²). (Ungar 2009; Shimizu,
/// Mukuta and Harada 2021, arXiv:2006.08210.)
///
/// # Errors
/// [`Error::Shape`] if rows and weights or the lengths of rows and `out` differ,
/// [`Error::InvalidArgument`] for a c that is negative or not finite, and for weights that are negative,
/// infinite or all zero, [`Error::Domain`] for a point outside the ball.
pub fn midpoint<F: Float>(
    points: ArrayView2<'_, F>,
    weights: &[F],
    c: F,
    out: &mut [F],
) -> Result<()> {
    let ball = Ball::new(c)?;
    check_shape("points", &[weights.len(), out.len()], points.shape())?;
    let mean = Mean::new(ball, points, weights)?;
    ball.assign_point(out, |i| mean.m[i]);
    Ok(())
}

/// Computes the vector–Jacobian product of [`midpoint`]: adds to the gradients of points and weights and
/// returns the derivative with respect to c.
///
/// Differentiates m = S/(T + N), the root of Σ wⱼ φⱼ = 0, φⱼ = (αm z − c|z|² m)/αⱼ, z = xⱼ − m, α = 1 −
/// c|·|².
///
/// ```text
/// ∂m/∂wⱼ = φⱼ/N,  ∂m/∂xⱼ = wⱼ ∂φⱼ/∂xⱼ/N,  ∂m/∂c = Σ wⱼ ∂φⱼ/∂c/N        m held in φⱼ
/// ```
///
/// because the derivative of Σ wⱼ φⱼ with respect to m is −N at the root.
///
/// # Errors
/// As [`midpoint`].
pub fn midpoint_vjp<F: Float>(
    points: ArrayView2<'_, F>,
    weights: &[F],
    c: F,
    grad_out: &[F],
    mut grad_points: ArrayViewMut2<'_, F>,
    grad_weights: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, grad_out.len());
    check_shape("points", &[weights.len(), n], points.shape())?;
    check_shape("grad_points", points.shape(), grad_points.shape())?;
    check_lengths(weights.len(), &[("grad_weights", grad_weights.len())])?;
    let Mean { m, alpha: am, alphas, normaliser, scale } = Mean::new(ball, points, weights)?;

    let c = ball.c;
    let g = |i: usize| grad_out[i].as_f64();
    let g_m = sum(n, |i| g(i) * m[i]);
    let m_norm = norm(n, |i| m[i]);
    let mut grad_c = 0.0;
    for (j, &alpha) in alphas.iter().enumerate() {
        let x = |i: usize| points[[j, i]].as_f64();
        let z = |i: usize| x(i) - m[i];
        let (z_norm, x_norm) = (norm(n, z), norm(n, x));
        let g_z = sum(n, |i| g(i) * z(i));
        let g_phi = (am * g_z - ball.c_norm2(z_norm) * g_m) / alpha;
        grad_weights[j] += F::from_f64(g_phi / normaliser / scale);

        let share = weights[j].as_f64() / scale / normaliser / alpha;
        for (i, grad) in grad_points.row_mut(j).iter_mut().enumerate() {
            let of_z = am * g(i) - 2.0 * c * g_m * z(i);
            *grad += F::from_f64(share * (of_z + 2.0 * c * g_phi * x(i)));
        }
        let of_z = m_norm * m_norm * g_z + z_norm * z_norm * g_m;
        grad_c += share * (x_norm * x_norm * g_phi - of_z);
    }
    Ok(F::from_f64(grad_c))
}

/// The midpoint, with the data for its gradient.
struct Mean {
    m: Vec<f64>,
    /// 1 − c|m|²
    alpha: f64,
    /// 1 − c|xⱼ|²
    alphas: Vec<f64>,
    /// N, for weights divided by `scale`, the power of two below the largest, so that no sum over- or
    /// underflows.
    normaliser: f64,
    scale: f64,
}

impl Mean {
    fn new<F: Float>(ball: Ball, points: ArrayView2<'_, F>, weights: &[F]) -> Result<Self> {
        let expected = "finite numbers, at least 0 and not all 0";
        let mut largest = 0.0_f64;
        for weight in weights {
            if *weight < F::zero() || weight.is_infinite() {
                return Err(Error::config("weights", expected, weight));
            }
            // Not `max`, which would drop a NaN.
            let weight = weight.as_f64();
            largest = if weight > largest || weight.is_nan() { weight } else { largest };
        }
        if largest == 0.0 {
            return Err(Error::config("weights", expected, "no positive weight"));
        }
        let scale = power_of_two_below(largest);
        let weight = |j: usize| weights[j].as_f64() / scale;

        let (rows, n) = points.dim();
        let x = |j: usize, i: usize| points[[j, i]].as_f64();
        let alpha = |j| ball.alpha_of_row("points", j, n, |i| x(j, i));
        let alphas = (0..rows).map(alpha).collect::<Result<Vec<f64>>>()?;
        let coordinate = |i| sum(rows, |j| weight(j) * 2.0 * x(j, i) / alphas[j]);
        let mut m: Vec<f64> = (0..n).map(coordinate).collect();
        let t = sum(rows, |j| weight(j) * (2.0 - alphas[j]) / alphas[j]);
        let s_norm = norm(n, |i| m[i]);
        let s = ball.root * s_norm;
        let difference = if s > 0.5 * t {
            sum(rows, |j| {
                // |√c x − ŝ|² = (1 − r)² + r|x/|x| − ŝ|², r = √c|x|, 1 − r = α/(1 + r).
                let x_norm = norm(n, |i| x(j, i));
                let r = ball.root * x_norm;
                let unit = |i: usize| if x_norm == 0.0 { 0.0 } else { x(j, i) / x_norm };
                let off = |i: usize| unit(i) - m[i] / s_norm;
                let across = r * sum(n, |i| off(i) * off(i)) / alphas[j];
                weight(j) * (alphas[j] / ((1.0 + r) * (1.0 + r)) + across)
            })
        } else {
            t - s
        };
        let normaliser = difference.sqrt() * (t + s).sqrt();
        for m in &mut m {
            *m /= t + normaliser;
        }
        // 1 − c|S|²/(T + N)², where T² − c|S|² = N².
        let alpha = 2.0 * normaliser / (t + normaliser);
        Ok(Self { m, alpha, alphas, normaliser, scale })
    }
}

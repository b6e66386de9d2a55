//! Coordinates of two other models: the Klein ball and the hyperboloid.

use super::ball::{Ball, add, assign, check_lengths, dot, norm, norm_of, stretch, sum};
use crate::error::{Error, Result, check_shape};
use crate::kernels::Float;

/// Converts a point to the Klein ball, in which geodesics are straight lines.
///
/// ```text
/// k = 2x/(1 + c|x|²)        1 − c|k|² = ((1 − c|x|²)/(1 + c|x|²))²;  2x at c = 0
/// ```
///
/// Accurate to a few ulps. However, Klein coordinates close to the boundary have only half the digits of
/// Poincaré coordinates, and from 1 − c|x|² of 10⁻⁸ (10⁻⁴ for `f32`) on, k is the last point inside.
/// (Ungar 2009.)
///
/// # Errors
/// [`Error::Shape`] for vectors of different lengths, [`Error::InvalidArgument`] for a c that is
/// negative or not finite, [`Error::Domain`] for a point outside the ball.
pub fn to_klein<F: Float>(x: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_lengths(x.len(), &[("out", out.len())])?;
    let scale = 2.0 / (2.0 - ball.alpha("x", x)?);
    ball.assign_point(out, |i| scale * x[i].as_f64());
    Ok(())
}

/// Computes the vector–Jacobian product of [`to_klein`]: adds to `grad_x` and returns the derivative with
/// respect to c.
///
/// Differentiates k = 2x/(1 + c|x|²).
///
/// # Errors
/// As [`to_klein`].
pub fn to_klein_vjp<F: Float>(x: &[F], c: F, grad_out: &[F], grad_x: &mut [F]) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_x", grad_x.len())])?;
    let alpha = ball.alpha("x", x)?;
    let (x_norm, den) = (norm_of(x), 2.0 - alpha);
    let g = |i: usize| grad_out[i].as_f64();
    let along = 2.0 * alpha / (den * den);
    add(grad_x, stretch(n, |i| x[i].as_f64(), x_norm, g, along, 2.0 / den));
    Ok(F::from_f64(-2.0 * dot(grad_out, x) * (x_norm / den) * (x_norm / den)))
}

/// Converts Klein coordinates to a point of the Poincaré ball: the inverse of [`to_klein`].
///
/// ```text
/// x = k/(1 + √(1 − c|k|²))        k/2 at c = 0
/// ```
///
/// Accurate to a few ulps. (Ungar 2009.)
///
/// # Errors
/// [`Error::Shape`] for vectors of different lengths, [`Error::InvalidArgument`] for a c that is
/// negative or not finite, [`Error::Domain`] for a point outside the ball.
pub fn from_klein<F: Float>(k: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_lengths(k.len(), &[("out", out.len())])?;
    let den = 1.0 + ball.alpha("k", k)?.sqrt();
    ball.assign_point(out, |i| k[i].as_f64() / den);
    Ok(())
}

/// Computes the vector–Jacobian product of [`from_klein`]: adds to `grad_k` and returns the derivative
/// with respect to c.
///
/// Differentiates x = k/(1 + β), β = √(1 − c|k|²).
///
/// # Errors
/// As [`from_klein`].
pub fn from_klein_vjp<F: Float>(k: &[F], c: F, grad_out: &[F], grad_k: &mut [F]) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, k.len());
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_k", grad_k.len())])?;
    let beta = ball.alpha("k", k)?.sqrt();
    let (k_norm, den) = (norm_of(k), 1.0 + beta);
    let g = |i: usize| grad_out[i].as_f64();
    add(grad_k, stretch(n, |i| k[i].as_f64(), k_norm, g, 1.0 / (beta * den), 1.0 / den));
    Ok(F::from_f64(dot(grad_out, k) * (k_norm / den) * (k_norm / den) / (2.0 * beta)))
}

/// Converts a point to the hyperboloid −x₀² + |xₛ|² = −1/c, x₀ > 0.
///
/// ```text
/// [x₀, xₛ] = [(λ − 1)/√c, λ x],  λ = 2/(1 − c|x|²)
/// ```
///
/// `out` has one more coordinate than x. Every coordinate is accurate to a few ulps. There is no limit at
/// c = 0, where x₀ is infinite.
///
/// # Errors
/// [`Error::Shape`] unless `out` has one more coordinate than x, [`Error::InvalidArgument`] for a c that
/// is not positive and finite, [`Error::Domain`] for a point outside the ball.
pub fn to_lorentz<F: Float>(x: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::curved(c)?;
    check_shape("out", &[x.len() + 1], &[out.len()])?;
    let alpha = ball.alpha("x", x)?;
    out[0] = F::from_f64((2.0 - alpha) / alpha / ball.root);
    assign(&mut out[1..], |i| 2.0 * x[i].as_f64() / alpha);
    Ok(())
}

/// Computes the vector–Jacobian product of [`to_lorentz`]: adds to `grad_x` and returns the derivative
/// with respect to c.
///
/// Differentiates [x₀, xₛ] = [(2/α − 1)/√c, 2x/α], α = 1 − c|x|².
///
/// # Errors
/// As [`to_lorentz`].
pub fn to_lorentz_vjp<F: Float>(x: &[F], c: F, grad_out: &[F], grad_x: &mut [F]) -> Result<F> {
    let (ball, n) = (Ball::curved(c)?, x.len());
    check_shape("grad_out", &[n + 1], &[grad_out.len()])?;
    check_lengths(n, &[("grad_x", grad_x.len())])?;
    let alpha = ball.alpha("x", x)?;
    let (g_time, g_space) = (grad_out[0].as_f64(), &grad_out[1..]);
    let of_alpha = -2.0 * (g_time / ball.root + dot(g_space, x)) / alpha / alpha;
    let g = |i: usize| g_space[i].as_f64();
    add(grad_x, |i| 2.0 * g(i) / alpha - 2.0 * ball.c * of_alpha * x[i].as_f64());
    let time = (2.0 - alpha) / alpha / ball.root;
    Ok(F::from_f64(-norm_of(x).powi(2) * of_alpha - g_time * time / (2.0 * ball.c)))
}

/// Converts coordinates on the hyperboloid to a point of the Poincaré ball: the inverse of
/// [`to_lorentz`].
///
/// ```text
/// x = xₛ/(1 + √c x₀)
/// ```
///
/// Reads all coordinates of `point` and does not check that −x₀² + |xₛ|² is −1/c. Accurate to a few ulps.
///
/// # Errors
/// [`Error::Shape`] unless `point` has one more coordinate than `out`, [`Error::InvalidArgument`] for a c
/// that is not positive and finite, [`Error::Domain`] if x would be outside the ball, that is, unless
/// |xₛ| < x₀ + 1/√c.
pub fn from_lorentz<F: Float>(point: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::curved(c)?;
    check_shape("point", &[out.len() + 1], &[point.len()])?;
    let den = lorentz_denominator(ball, point)?;
    ball.assign_point(out, |i| point[i + 1].as_f64() / den);
    Ok(())
}

/// Computes the vector–Jacobian product of [`from_lorentz`]: adds to `grad_point` and returns the
/// derivative with respect to c.
///
/// Differentiates x = xₛ/(1 + √c x₀).
///
/// # Errors
/// As [`from_lorentz`].
pub fn from_lorentz_vjp<F: Float>(
    point: &[F],
    c: F,
    grad_out: &[F],
    grad_point: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::curved(c)?, grad_out.len());
    check_shape("point", &[n + 1], &[point.len()])?;
    check_shape("grad_point", &[n + 1], &[grad_point.len()])?;
    let den = lorentz_denominator(ball, point)?;
    let g_x = sum(n, |i| grad_out[i].as_f64() * (point[i + 1].as_f64() / den));
    grad_point[0] += F::from_f64(-ball.root * g_x / den);
    add(&mut grad_point[1..], |i| grad_out[i].as_f64() / den);
    Ok(F::from_f64(-point[0].as_f64() / (2.0 * ball.root) * g_x / den))
}

/// Computes 1 + √c x₀ of a point in the ball.
fn lorentz_denominator<F: Float>(ball: Ball, point: &[F]) -> Result<f64> {
    let time = point[0].as_f64();
    let space = norm(point.len() - 1, |i| point[i + 1].as_f64());
    // In this order nothing is rounded if the two are close to each other; NaN is allowed.
    if space - time >= ball.root.recip() {
        let limit = time + ball.root.recip();
        return Err(Error::Domain { what: "point".into(), row: 0, norm: space, limit });
    }
    Ok(1.0 + ball.root * time)
}

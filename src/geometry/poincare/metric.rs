//! The conformal factor and the distance.

use super::ball::{Ball, add, check_lengths, norm, norm_of};
use super::radial::{asinh_ratio, asinh_ratio_derivative};
use crate::error::Result;
use crate::kernels::Float;

/// Computes the conformal factor λ: the length of a vector at x is λ times its Euclidean norm.
///
/// ```text
/// λ = 2 / (1 − c|x|²)
/// ```
///
/// Accurate to a few ulps wherever x is; largest, about 1/ε, close to the boundary. (Ganea et al. 2018,
/// arXiv:1805.09112.)
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn conformal_factor<F: Float>(x: &[F], c: F) -> Result<F> {
    Ok(F::from_f64(2.0 / Ball::new(c)?.alpha("x", x)?))
}

/// Computes the vector–Jacobian product of [`conformal_factor`]: adds to `grad_x` and returns the
/// derivative with respect to c. Grows as λ².
///
/// Differentiates λ = 2/α, α = 1 − c|x|².
///
/// # Errors
/// As [`conformal_factor`], and [`Error::Shape`](crate::Error::Shape).
pub fn conformal_factor_vjp<F: Float>(x: &[F], c: F, grad_out: F, grad_x: &mut [F]) -> Result<F> {
    let ball = Ball::new(c)?;
    check_lengths(x.len(), &[("grad_x", grad_x.len())])?;
    let alpha = ball.alpha("x", x)?;
    let g = 2.0 * grad_out.as_f64() / alpha / alpha;
    add(grad_x, |i| 2.0 * ball.c * x[i].as_f64() * g);
    Ok(F::from_f64(norm_of(x).powi(2) * g))
}

/// Computes the distance d(x, y), the length of the geodesic from x to y.
///
/// ```text
/// d = (2/√c) asinh( √c |x − y| / √((1 − c|x|²)(1 − c|y|²)) )        2|x − y| at c = 0
/// ```
///
/// The relative error is a few ulps however close the points are to each other (10⁻³⁰⁰) or to the
/// boundary. (Ungar 2009; the form with asinh instead of arcosh has no cancellation.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn distance<F: Float>(x: &[F], y: &[F], c: F) -> Result<F> {
    let ball = Ball::new(c)?;
    check_lengths(x.len(), &[("y", y.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let p = norm(x.len(), |i| y[i].as_f64() - x[i].as_f64()) / (ax * ay).sqrt();
    Ok(F::from_f64(2.0 * p * asinh_ratio(ball.c_norm2(p))))
}

/// Computes the vector–Jacobian product of [`distance`]: adds to the gradients of the points and returns
/// the derivative with respect to c.
///
/// Differentiates d = 2p asinh(√c p)/(√c p), p = |z|/√(αx αy), z = y − x.
///
/// ```text
/// ∂d/∂x = (2/√(αx αy + c|z|²)) (−z/|z| + c|z| x/αx)        of length λ; y likewise
/// ```
///
/// At x = y the distance has a cusp, like |x| at 0; the gradient is 0 there by convention.
///
/// # Errors
/// As [`distance`].
pub fn distance_vjp<F: Float>(
    x: &[F],
    y: &[F],
    c: F,
    grad_out: F,
    grad_x: &mut [F],
    grad_y: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("grad_x", grad_x.len()), ("grad_y", grad_y.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let length = norm(n, z);
    if length == 0.0 {
        return Ok(F::zero());
    }
    let root_den = (ax * ay + ball.c_norm2(length)).sqrt();
    let g = 2.0 * grad_out.as_f64() / root_den;
    let (in_x, in_y) = (ball.c * length / ax, ball.c * length / ay);
    add(grad_x, |i| g * (in_x * x[i].as_f64() - z(i) / length));
    add(grad_y, |i| g * (in_y * y[i].as_f64() + z(i) / length));

    let p = length / (ax * ay).sqrt();
    let of_asinh = 2.0 * p * p * p * asinh_ratio_derivative(ball.c_norm2(p));
    let of_alphas = length / root_den * (norm_of(x).powi(2) / ax + norm_of(y).powi(2) / ay);
    Ok(F::from_f64(grad_out.as_f64() * (of_asinh + of_alphas)))
}

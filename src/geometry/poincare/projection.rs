//! Explicit projection of points on or outside the boundary.

use super::ball::{Ball, add, assign, check_lengths, dot, norm_of, stretch};
use crate::error::{Error, Result};
use crate::kernels::Float;

/// Computes the nearest point of the ball that is at least `margin` times the radius inside the boundary.
///
/// ```text
/// project(x) = x              if √c|x| ≤ 1 − margin
///              R x/|x|        otherwise, R = (1 − margin)/√c
/// ```
///
/// x is any vector, inside the ball or not; at c = 0 it does not change. Use it for points that an
/// optimiser has moved outside. As a consequence, no point is farther from the origin than
///
/// ```text
/// 2 artanh(1 − margin)/√c ≈ ln(2/margin)/√c
/// ```
///
/// and all points farther out in the same direction become the same point (a margin of 10⁻⁵ limits the
/// distance to 12.2/√c, and 4 ε to 17/√c for `f32` and 35/√c for `f64`).
///
/// # Errors
/// [`Error::Shape`] for vectors of different lengths, [`Error::InvalidArgument`] for a c that is negative
/// or not finite or a margin that is not from 4 ε to 1 (rounding would undo a smaller margin),
/// [`Error::Domain`] for an infinite x.
pub fn project<F: Float>(x: &[F], c: F, margin: F, out: &mut [F]) -> Result<()> {
    check_lengths(x.len(), &[("out", out.len())])?;
    let scale = match outside(x, c, margin)? {
        Some((norm, limit)) => limit / norm,
        None => 1.0,
    };
    assign(out, |i| scale * x[i].as_f64());
    Ok(())
}

/// Computes the vector–Jacobian product of [`project`]: adds to `grad_x` and returns the derivative with
/// respect to c. Outside, the part of the gradient along x is lost.
///
/// Differentiates project(x) = x inside, R x/|x| outside.
///
/// # Errors
/// As [`project`].
pub fn project_vjp<F: Float>(
    x: &[F],
    c: F,
    margin: F,
    grad_out: &[F],
    grad_x: &mut [F],
) -> Result<F> {
    let n = x.len();
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_x", grad_x.len())])?;
    let g = |i: usize| grad_out[i].as_f64();
    let Some((norm, limit)) = outside(x, c, margin)? else {
        add(grad_x, g);
        return Ok(F::zero());
    };
    add(grad_x, stretch(n, |i| x[i].as_f64(), norm, g, 0.0, limit / norm));
    // dR/dc = −R/(2c)
    Ok(F::from_f64(-dot(grad_out, x) / norm * limit / (2.0 * c.as_f64())))
}

/// Returns the norm and R if the norm is larger.
fn outside<F: Float>(x: &[F], c: F, margin: F) -> Result<Option<(f64, f64)>> {
    let ball = Ball::new(c)?;
    let least = 4.0 * F::epsilon().as_f64();
    let value = margin.as_f64();
    if !(value >= least && value < 1.0) {
        return Err(Error::config("margin", "a number from 4 ε to below 1", margin));
    }
    let norm = norm_of(x);
    if norm.is_infinite() {
        return Err(Error::Domain { what: "x".into(), row: 0, norm, limit: f64::INFINITY });
    }
    let limit = (1.0 - value) / ball.root;
    Ok((norm > limit).then_some((norm, limit)))
}

//! Products of numbers and matrices with points, through the tangent space at the origin.

use super::ball::{Ball, add, check_lengths, dot, norm, norm_of, stretch, sum};
use super::maps::Step;
use super::radial::{
    artanh_ratio, artanh_ratio_derivative, sech2, tanh_ratio, tanh_ratio_derivative,
};
use crate::error::{Result, check_shape};
use crate::kernels::Float;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Computes r ⊗ x, the point r times as far from the origin as x, in the same direction.
///
/// ```text
/// r ⊗ x = tanh(r artanh(√c|x|)) x/(√c|x|)        r x at c = 0
/// ```
///
/// artanh is computed from 1 − c|x|², so the only errors are the rounding of the result and an ulp of r
/// artanh. (Ungar 2009; Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn mobius_scalar_mul<F: Float>(r: F, x: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_lengths(x.len(), &[("out", out.len())])?;
    let alpha = ball.alpha("x", x)?;
    let (r, radius) = (r.as_f64(), ball.root * norm_of(x));
    let artanh = artanh_ratio(radius, alpha);
    let scale = r * artanh * tanh_ratio((r * radius * artanh).abs());
    ball.assign_point(out, |i| scale * x[i].as_f64());
    Ok(())
}

/// Computes the vector–Jacobian product of [`mobius_scalar_mul`]: adds to `grad_x` and returns the
/// derivatives with respect to r and c.
///
/// Differentiates r ⊗ x = tanh(t) x/ρ, t = r artanh(ρ), ρ = √c|x|.
///
/// # Errors
/// As [`mobius_scalar_mul`].
pub fn mobius_scalar_mul_vjp<F: Float>(
    r: F,
    x: &[F],
    c: F,
    grad_out: &[F],
    grad_x: &mut [F],
) -> Result<(F, F)> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_x", grad_x.len())])?;
    let alpha = ball.alpha("x", x)?;
    let (r, x_norm) = (r.as_f64(), norm_of(x));
    let radius = ball.root * x_norm;
    let artanh = artanh_ratio(radius, alpha);
    let t = (r * radius * artanh).abs();
    let (tanh, sech2) = (tanh_ratio(t), sech2(t));
    let g = |i: usize| grad_out[i].as_f64();
    let (along, across) = (sech2 * r / alpha, r * artanh * tanh);
    add(grad_x, stretch(n, |i| x[i].as_f64(), x_norm, g, along, across));

    let g_x = dot(grad_out, x);
    let grad_c = if radius < 0.35 {
        // d(t²)/dc = r²|x|² artanh/α, all as ratios.
        let of_tanh = tanh_ratio_derivative(t) * (r * artanh) * (r * artanh) / alpha;
        let of_artanh = tanh * artanh_ratio_derivative(radius, alpha);
        g_x * r * x_norm * x_norm * (of_tanh + of_artanh)
    } else {
        // The same as one difference: close to the boundary the two terms above are large.
        g_x * (along - across) / (2.0 * ball.c)
    };
    Ok((F::from_f64(g_x * sech2 * artanh), F::from_f64(grad_c)))
}

/// Computes the product of a matrix and a point: the linear map M in the tangent space at the origin.
///
/// ```text
/// M ⊗ x = exp₀(M log₀(x)) = tanh(|Mx|/|x| artanh(√c|x|)) Mx/(√c|Mx|)        Mx at c = 0
/// ```
///
/// The result is 0 if Mx is 0. Its only errors are its own rounding and the error of M log₀(x).
/// (Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if M is not `out` × `x`,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn mobius_mat_vec<F: Float>(m: ArrayView2<'_, F>, x: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_shape("m", &[out.len(), x.len()], m.shape())?;
    let alpha = ball.alpha("x", x)?;
    let artanh = artanh_ratio(ball.root * norm_of(x), alpha);
    let image = image(m, |j| artanh * x[j].as_f64());
    let step = Step::new(ball, norm(image.len(), |i| image[i]), 1.0);
    ball.assign_point(out, |i| step.scale * image[i]);
    Ok(())
}

/// Computes the vector–Jacobian product of [`mobius_mat_vec`]: adds to `grad_m` and `grad_x` and returns
/// the derivative with respect to c.
///
/// Differentiates M ⊗ x = exp₀(M log₀(x)).
///
/// # Errors
/// As [`mobius_mat_vec`].
pub fn mobius_mat_vec_vjp<F: Float>(
    m: ArrayView2<'_, F>,
    x: &[F],
    c: F,
    grad_out: &[F],
    mut grad_m: ArrayViewMut2<'_, F>,
    grad_x: &mut [F],
) -> Result<F> {
    let ball = Ball::new(c)?;
    let (rows, n) = (grad_out.len(), x.len());
    check_shape("m", &[rows, n], m.shape())?;
    check_shape("grad_m", &[rows, n], grad_m.shape())?;
    check_lengths(n, &[("grad_x", grad_x.len())])?;
    let alpha = ball.alpha("x", x)?;
    let x_norm = norm_of(x);
    let radius = ball.root * x_norm;
    let artanh = artanh_ratio(radius, alpha);
    let image = image(m, |j| artanh * x[j].as_f64());
    let image_norm = norm(rows, |i| image[i]);
    let step = Step::new(ball, image_norm, 1.0);

    let g = |i: usize| grad_out[i].as_f64();
    let grad_image = stretch(rows, |i| image[i], image_norm, g, step.sech2, step.scale);
    let grad_image: Vec<f64> = (0..rows).map(grad_image).collect();
    for (mut row, g) in grad_m.rows_mut().into_iter().zip(&grad_image) {
        for (grad, x) in row.iter_mut().zip(x) {
            *grad += F::from_f64(g * artanh * x.as_f64());
        }
    }
    let mut grad_log = vec![0.0; n];
    for (row, g) in m.rows().into_iter().zip(&grad_image) {
        for (grad, m) in grad_log.iter_mut().zip(row) {
            *grad += g * m.as_f64();
        }
    }
    let grad_log = |j: usize| grad_log[j];
    add(grad_x, stretch(n, |j| x[j].as_f64(), x_norm, grad_log, alpha.recip(), artanh));
    let of_exp = step.scale_by_c(ball) * sum(rows, |i| g(i) * image[i]);
    let of_log = x_norm * x_norm * artanh_ratio_derivative(radius, alpha);
    Ok(F::from_f64(of_exp + of_log * sum(n, |j| grad_log(j) * x[j].as_f64())))
}

/// M p
fn image<F: Float>(m: ArrayView2<'_, F>, p: impl Fn(usize) -> f64) -> Vec<f64> {
    let of_row = |row: ndarray::ArrayView1<'_, F>| sum(row.len(), |j| row[j].as_f64() * p(j));
    m.rows().into_iter().map(of_row).collect()
}
